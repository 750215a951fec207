"""What has a sweep found? The values of its runs, stopped ones projected to their end, the part of
luck in the best one, what each parameter matters. It computes, report.py draws; the Gaussian
process is handed in."""

import functools
import math
import shlex

import numpy as np

import space
from space import Cube, flags, identity, is_number, parse_space

SEED_PRIOR = (0.0, 1.0)  # of the noise in a report: runs may differ by nothing but their seed


# ---------------------------------------------------------------- values


def observations(history, sign):
    """History entries -> the values to maximise, NaN of failed and pending runs, and variances."""
    value = np.full(len(history), np.nan)
    variance = np.array([h.get("sd", 0) for h in history], float) ** 2
    done = [h for h in history if h["state"] == "finished"]
    curves = [sign * np.array(h["history"]) for h in done if h.get("history")]
    for i, h in enumerate(history):
        if h["state"] == "finished":
            value[i] = sign * h["value"]
        elif h["state"] == "stopped":
            curve = sign * np.array(h.get("history") or [h["value"]], float)
            value[i], sd = project(curve, curves, h.get("epochs", 0))
            variance[i] += sd * sd
    return value, variance


def ruined(values):
    """values to maximise [n] -> which of them are failures by any measure: far below the rest."""
    middle = np.median(values)
    spread = max(np.median(np.abs(values - middle)) * 1.4826, 1e-9)
    return values < middle - 10 * spread


def project(history, curves, epochs):
    """history [e] of a stopped run, curves of finished ones [epochs each] -> its final value, sd:
    ridge regression of their gains from epoch e on by their values there: who lags gains more."""
    e, here = len(history), float(np.mean(history[-2:]))  # a single value is noisy
    whole = np.array([c for c in curves if len(c) >= epochs > e])
    if not len(whole):
        return here, max(float(np.std([c[-1] for c in curves] or history)), 1e-6)
    finals, level = whole[:, -1], whole[:, max(e - 2, 0) : e].mean(1)
    spread = float(np.subtract(*np.quantile(finals[~ruined(finals)], [0.75, 0.25]))) / 1.35
    gain = finals - level
    off = np.abs(gain - np.median(gain))
    keep = off <= 5 * max(np.median(off), spread / 2)
    level, gain, n = level[keep], gain[keep], keep.sum()
    unit = max(float(level.std()), 1e-9)
    x, at = (level - level.mean()) / unit, np.clip((here - level.mean()) / unit, -3, 3)
    slope = x @ gain / (x @ x + 2)  # the penalty is worth two runs
    residual = gain - gain.mean() - slope * x
    # the finals' spread, worth two runs, gives way to the residuals'; wider where few runs are
    # known and far from them, and as Student's t is wider than a normal law at 95 %
    prior = max(spread, abs(np.median(gain)) / 20, 1e-6) ** 2
    variance = (residual @ residual + 2 * prior) / n * (1 + 1 / n + at**2 / (x @ x + 2))
    sd = math.sqrt(variance) * student(int(n), 0.05) / 1.96
    return here + float(gain.mean() + slope * at), sd


def chance_to_win(history, curves, epochs):
    """Probability that a stopped run would end above the best finished one (0.5 if none is)."""
    mean, sd = project(history, curves, epochs)
    return space.normal_cdf((mean - max((c[-1] for c in curves), default=mean)) / sd)


# ---------------------------------------------------------------- findings

PAIRED = 0.3  # standard error of a paired difference in those of a score: .08 of .27 points


class Row:
    """A trial as a report shows it: numbers, words, estimates; NaN for what is not known."""

    def __init__(self, trial, cube):
        self.number, self.state, self.why = trial.number, trial.state, trial.why
        self.epochs, self.history = len(trial.history), list(trial.history) * trial.recorded
        self.last = trial.history[-1] if trial.history else math.nan
        self.pages = trial.rows[-1][1:3] if trial.rows else [math.nan] * 2  # interval over pages
        self.params, self.values = trial.params, [trial.params[d.name] for d in cube.free]
        self.point, self.flags = cube.encode(trial.params), " ".join(flags(trial.params))
        self.verdict = next((v for v in reversed(trial.judged) if v["stop"]), None)
        self.ruined, self.chance = False, math.nan  # of a stopped one to beat the best
        self.paired = paired(trial.rows)
        # what its configuration is worth, what one repetition gives, where a stopped one would end
        self.expected = self.repeated = self.final = estimate(math.nan, math.nan, (0, 1))


class Findings:
    """What a sweep has found, as report.py shows it: numbers, words and Rows. fit and posterior
    are sweep.py's `fit` and `Posterior`."""

    def __init__(self, sweep, fit, posterior):
        cube, sign = Cube(parse_space(sweep.spec)), sweep.sign
        self.name, self.method, self.metric = sweep.folder.name, sweep.spec["method"], sweep.metric
        others = [t.number for t in sweep.trials if t.known]
        self.notes = sweep.notes + [f"Trials {str(others)[1:-1]} ran elsewhere."] * bool(others)
        self.sign, self.epochs, self.names = sign, sweep.epochs, [d.name for d in cube.free]
        kind = (100, 2, (0, 1)) if sweep.metric in space.SHARES else (1, 4, (-math.inf, math.inf))
        self.points, self.digits, limits = kind  # the first two: as it is shown
        self.trials = [Row(t, cube) for t in sweep.trials]
        self.rows = [r for r in self.trials if r.state in ("finished", "stopped")]
        for row, lost in zip(self.rows, ruined(sign * last(self.rows)) if self.rows else ()):
            row.ruined = bool(lost)
        self.sound = [r for r in self.rows if not r.ruined] or self.rows
        ranked = sorted(self.rows, key=lambda r: (-sign * r.last, r.number))
        self.finished = [r for r in ranked if r.state == "finished"]
        self.stopped = [r for r in ranked if r.state == "stopped"]
        self.failed = [r for r in self.trials if r.state == "failed"]
        # final and early values are only pooled, and said to be, where there is nothing else
        self.pooled = len(self.finished) < 6 and bool(self.stopped)
        pool = self.rows if self.pooled else self.finished
        self.fair, self.out = ([r for r in pool if r.ruined == lost] for lost in (False, True))
        groups = {"finished, last epoch": self.finished, "stopped, at the stop": self.stopped}
        groups |= {"all, each at the last epoch it had": self.rows} if self.pooled else {}
        self.spread = [line for name, rows in groups.items() for line in spread(name, rows)]
        seconds = [row[0] for t in sweep.trials if not t.known for row in t.rows]
        self.hours = sum(seconds) / 3600 if seconds else math.nan
        self.spent = sum(r.epochs for r in self.trials if r.number not in others)
        self.saved = sum(sweep.epochs - r.epochs for r in self.stopped if r.number not in others)

        enough = len(self.sound) > 2 and cube.free
        model = Worth(sweep, cube, self.sound, fit, posterior) if enough else None
        self.importance = model.importance() if model else []
        self.noise, self.replicas = (model.noise, model.replicas) if model else (math.nan, False)
        for row in self.sound if model else ():
            mean, sd = (float(x[0]) for x in model(row.point))
            row.expected = estimate(mean, sd, limits)
            again = math.hypot(sd, self.noise, row.paired)
            row.repeated = estimate(mean, again, limits, student(len(self.sound) - 1, 0.05))
        whole = [[sign * v for v in r.history] for r in self.finished if r.history]
        for row in self.stopped:
            if whole and row.history:
                known = [sign * v for v in row.history], whole, sweep.epochs
                mean, sd = project(*known)
                row.final, row.chance = estimate(sign * mean, sd, limits), chance_to_win(*known)

        self.top = [r for r in self.finished or self.stopped if not r.ruined]  # best value first
        worth = {r: sign * np.nan_to_num(r.expected["mean"], nan=r.last) for r in self.top}
        self.first = max(self.top, key=worth.get, default=None)  # best posterior mean first
        self.rivals = [r.number for r in self.stopped if r.chance > 0.2]
        mean, sd = (np.array([r.expected[k] for r in self.finished]) for k in ("mean", "sd"))
        near = np.abs(mean - mean[:1]) <= 1.96 * np.hypot(sd, sd[:1])
        self.ties = [r.number for r, like in zip(self.finished, near) if like]
        self.luck = luck(self.fair, sign)
        known = self.fair, self.first, model, limits
        self.parameters = [facts(d, i, *known) for i, d in enumerate(cube.free)]
        self.params = self.first.params if self.first else {}
        self.command = shlex.join(["python", "train.py", *sweep.extra, *flags(self.params)])
        best = sorted(self.fair, key=lambda r: -sign * r.last)[: 3 * (len(self.fair) > 5)]
        self.edges = [at_edge(d, [r.params[d.name] for r in best]) for d in cube.free if best]
        self.notes += filter(None, self.edges)


def estimate(mean, sd, limits, wide=1.96):
    mean, low, high = (np.clip(mean + side * wide * sd, *limits) for side in (0, -1, 1))
    return {"mean": mean, "sd": sd, "low": low, "high": high}


def last(rows):
    return np.array([row.last for row in rows])


def paired(rows):
    """Standard error of a difference to another run, from a run's interval over pages, or 0."""
    return PAIRED * float(np.nan_to_num(np.ptp(rows[-1][1:3]))) / 3.92 if rows else 0.0


def sample(fit, x, y, variance, category, noise):
    """Draws of theta [k, d + 2] around its best fit and their weights [k] by posterior density
    (importance sampling). Few runs leave theta open, and the best fit alone believes too much."""
    best, _, loss = fit(x, y, variance, category, noise=noise)
    draws = int(np.clip(1e7 / len(x) ** 2, 20, 200))
    steps = np.random.default_rng(0).standard_normal((draws, len(best)))
    theta = best + 0.7 * steps
    log = 0.5 * (steps**2).sum(1) - [loss(t)[0] for t in theta]
    weights = np.exp(log - log.max())
    keep = weights > 1e-3
    return theta[keep], weights[keep] / weights[keep].sum()


class Worth:
    """GP of the metric itself, of sound rows: mean and sd [m], in its units, of the worth at u.
    What the pages' intervals say of a comparison's noise is given; what the seed adds (noise, the
    sd of one run) is learnt: from replicas, alike but for `seed`, else by a prior of much of it."""

    def __init__(self, sweep, cube, rows, fit, posterior):
        history = sweep.history()
        value, variance = observations([history[row.number - 1] for row in rows], sweep.sign)
        self.cube, self.sign, self.middle, self.unit = cube, sweep.sign, value.mean(), value.std()
        self.unit = max(self.unit, 1e-9)
        x = cube.features(np.array([row.point for row in rows]))
        self.known = x, (value - self.middle) / self.unit, variance / self.unit**2, cube.category
        self.replicas = len(np.unique(x, axis=0)) < len(x)
        self.prior = SEED_PRIOR[0], SEED_PRIOR[1] * (2 if self.replicas else 1)
        self.fit, self.posterior = fit, posterior
        self.model = posterior(*self.known, *sample(fit, *self.known, self.prior))
        self.noise = self.unit * math.sqrt(self.model.weights @ self.model.noise[:, 0])

    def __call__(self, u):
        mean, sd = self.model(self.cube.features(np.atleast_2d(u)))
        return self.sign * (self.middle + self.unit * mean), self.unit * sd

    def importance(self):
        """Of each parameter: the share of the scores' variance that its main effect has in the
        best fit, and the share of permutations of the scores that give it as much."""
        x, y, own, category = self.known
        d, rng, order, shares = x.shape[1], np.random.default_rng(0), np.arange(len(y)), []
        grid, own_axis = np.linspace(0.04, 0.96, 12), np.eye(d, dtype=bool)[:, None, None]
        points = np.where(own_axis, grid[:, None, None], rng.random((64, d)))  # [d, 12, 64, d]
        points = self.cube.features(points.reshape(-1, d))
        for _ in range(1 + int(np.clip(2e3 / len(y), 19, 99))):
            known = x, y[order], own[order], category
            mean = self.posterior(*known, self.fit(*known, noise=self.prior)[0])(points)[0]
            shares.append(np.minimum(mean.reshape(d, 12, 64).mean(2).var(1), 1))  # y has variance 1
            order = rng.permutation(order)
        first, *others = np.array(shares)
        return list(zip(first, np.mean(others >= first - 1e-9, 0)))


def luck(rows, sign):
    """n, expected and found distance of the best row from the mean in sd, its 5 % limit, row."""
    n, value = len(rows), sign * last(rows)
    if n < 3:
        return {}
    found = (value.max() - value.mean()) / max(value.std(ddof=1), 1e-12)
    told = {"n": n, "expected": expected_maximum(n), "found": found, "limit": outlier_limit(n)}
    return told | {"row": rows[int(np.argmax(value))]}


def expected_maximum(n):
    """Expected largest of n standard normal values: integral of (x > 0) - Phi^n, by midpoints."""
    x = np.arange(-8, 8, 0.01) + 0.005
    return float(((x > 0) - np.array([space.normal_cdf(v) for v in x]) ** n).sum()) / 100


def outlier_limit(n):
    """Distance from the mean, in sd, that the best of n equal runs exceeds in 5 % (Grubbs 1969)."""
    t = student(n - 2, 0.1 / n)
    return (n - 1) / math.sqrt(n) * math.sqrt(t * t / (n - 2 + t * t))


@functools.cache
def student(v, share):
    """The value that |t| exceeds with probability share, at v degrees of freedom: t is sqrt(v)
    times the tangent of an angle whose density is its cosine's power v - 1."""
    angle = (np.arange(100000) + 0.5) * math.pi / 200000
    mass = np.cumsum(np.cos(angle) ** (v - 1))
    angle = np.interp(1 - share, mass / mass[-1], angle + math.pi / 400000)
    return math.sqrt(v) * math.tan(angle)


def mean_interval(values):
    """Mean of values [n] and half its 95 % interval by Student's t, NaN for one value."""
    n = len(values)
    sd = float(np.std(values, ddof=1)) if n > 1 else math.nan
    return float(np.mean(values)), student(max(n - 1, 1), 0.05) * sd / math.sqrt(n)


def spread(label, rows):
    """(label, trials left out, n, mean, median, sd, low, high); once more without ruined rows."""
    out = [row for row in rows if row.ruined]
    for without in ([], out)[: 1 + bool(out)]:
        v = last([row for row in rows if row not in without])
        if len(v):
            sd, numbers = v.std(ddof=1) if len(v) > 1 else math.nan, [r.number for r in without]
            yield label, numbers, len(v), v.mean(), np.median(v), sd, v.min(), v.max()


def facts(d, i, rows, first, model, limits):
    """The score of rows against Dimension d, the i-th: ticks, the posterior's mean and interval
    along d through the first, groups, rank correlation and how much of it chance explains."""
    ticks = [(x, d.value(x)) for x in (0, 0.25, 0.5, 0.75, 1)]
    if 0 < len(d.levels) <= 8:
        ticks = [((a + b) / 2, v) for a, b, v in zip(d.edges, d.edges[1:], d.levels)]
    along, u = (), np.linspace(0, 1, 81)
    if first and model:
        points = np.where(np.arange(len(first.point)) == i, u[:, None], first.point)
        along = {"u": u, **estimate(*model(points), limits)}
    values = [row.values[i] for row in rows]
    ranked = len(rows) > 2 and not d.category and all(map(is_number, values))
    rho = spearman(values, last(rows)) if ranked else None
    groups = groups_of(d, values, rows, limits) if len(rows) > 2 else []
    told = {"key": d.name, "ticks": ticks, "along": along, "groups": groups}
    return told | {"rho": rho, "chance": 1.96 / math.sqrt(max(len(rows) - 1, 1))}


def at_edge(d, best):
    """The remark that the best runs lie at one end of Dimension d's range, with the one to try."""
    u = [d.encode(value) for value in best]
    side = (min(u) > 0.9) - (max(u) < 0.1)
    if not side or not d.law or "normal" in d.law[0]:
        return ""
    low, high = (max(space.quantile(d.law, x + side / 2), 0) for x in (0, 1))
    told = f"the best three runs lie at the {'upper' if side > 0 else 'lower'} end of its range"
    return f"{d.name}: {told}; try {low:.3g} to {high:.3g}"


def groups_of(d, values, rows, limits):
    """(ends, n, mean and interval, median) of the scores by a parameter's values, or in thirds."""
    keys = {identity(v): v for v in sorted(values, key=str)}
    groups = [([v], [identity(x) == key for x in values]) for key, v in keys.items()]
    if all(map(is_number, values)) and not (d.levels and len(keys) <= 8):
        order, x = sorted(values), np.array(values)
        a, b, c, e = (order[k * len(order) // 3 - (k == 3)] for k in range(4))
        groups = [([a, b], x < b), ([b, c], (b <= x) & (x < c)), ([c, e], c <= x)]
    got = [(ends, last(rows)[np.array(member)]) for ends, member in groups if any(member)]
    return [(ends, len(v), estimate(*mean_interval(v), limits, 1), np.median(v)) for ends, v in got]


def spearman(a, b):
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    # values below less values above: twice the distance from the mean rank
    a, b = (np.sign(np.subtract.outer(x, x)).sum(1) for x in (a, b))
    return float(a @ b / math.sqrt((a @ a) * (b @ b))) if a.any() and b.any() else 0.0
