"""What has a sweep found? What its runs are worth, where stopped ones would have ended, how much of
the best one's lead is luck, and which parameters matter.

report.py draws what is computed here. The Gaussian process is bayes.py's, one floor up, whose
`fit_gp` and `Posterior` are handed in."""

import math
import os
import shlex
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

import space
from interval import expected_lead, outlier_limit, printed_samples, spearman, student
from space import Cube, flags, identity, is_number, parse_space

PAIRED = 0.3  # standard error of a paired difference over that of a score: .08 and .27 points
# middle and width of the prior on the log noise variance, where 0 means that runs differ by little
# but their seed; it is wide where replicas can tell
SEED_PRIOR = (0.0, 1.0)
REPLICAS_PRIOR = (0.0, 2.0)

# ---------------------------------------------------------------- estimates


@dataclass
class Estimate:
    """A mean, its standard deviation and its 95 % interval; NaN for what is not known."""

    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def text(self, show):
        """Mean and interval, as far as they are known, with `show` turning a number into text."""
        if np.isnan(self.low):
            return show(self.mean)
        return f"{show(self.mean)} ({show(self.low)} to {show(self.high)})"

    def may_equal(self, other):
        return abs(self.mean - other.mean) <= 1.96 * math.hypot(self.sd, other.sd)


@dataclass
class Curve(Estimate):
    """Estimates [m] along an axis of the cube, at u [m]."""

    u: np.ndarray = ()


def estimate(mean, sd, limits, width=1.96):
    """Estimate whose interval is the mean -+ width sd, cut off at limits (low, high)."""
    ends = mean, mean - width * sd, mean + width * sd
    mean, low, high = np.clip(ends, *limits)
    return Estimate(mean, sd, low, high)


def mean_estimate(values, limits):
    """Estimate of the mean of values [n], by Student's t; without an interval for one value."""
    n = len(values)
    if n == 1:
        return Estimate(values[0])
    error = np.std(values, ddof=1) / math.sqrt(n)
    return estimate(np.mean(values), error, limits, student(n - 1, 0.05))


def ruined(values):
    """values to maximise [n] -> bool [n], which of them are failures by any measure: 10 spreads
    below the median. A spread is at least 0.2 % of it, since most values may be equal when they are
    rounded."""
    middle = np.median(values)
    spread = max(np.median(np.abs(values - middle)) * 1.4826, 2e-3 * abs(middle), 1e-9)
    return values < middle - 10 * spread


def paired(rows):
    """Standard error of a run's difference to another one on the same pages, from its interval over
    pages; 0 if that is not known. rows are [seconds, low, high] an epoch."""
    if not rows:
        return 0.0
    # the 95 % interval of the last epoch is 2 x 1.96 standard errors wide
    return PAIRED * float(np.nan_to_num(np.ptp(rows[-1][1:3]))) / 3.92


# ---------------------------------------------------------------- projections


def observations(history, sign):
    """History entries, see bayes.py's `suggest` -> values to maximise [n] and their variances [n].
    A stopped run has the value it would have ended with, a failed or pending one has NaN."""
    values = np.full(len(history), np.nan)
    variances = np.array([run.get("sd", 0) for run in history], float) ** 2
    curves = [
        sign * np.array(run["history"])
        for run in history
        if run["state"] == "finished" and run.get("history")
    ]
    for i, run in enumerate(history):
        if run["state"] == "finished":
            values[i] = sign * run["value"]
        elif run["state"] == "stopped":
            curve = sign * np.array(run.get("history") or [run["value"]], float)
            values[i], sd = project(curve, curves, run.get("epochs", 0))
            variances[i] += sd * sd
    return values, variances


def project(history, curves, epochs):
    """history [e] of a stopped run, curves [epochs] of finished ones -> the value the run would
    have ended with, and its sd. Gains from epoch e on are regressed on the level there: a run that
    lags gains more."""
    stop = len(history)
    here = level_at(np.array(history), stop)
    whole = np.array([curve for curve in curves if len(curve) >= epochs > stop])
    if not len(whole):
        spread = np.std([curve[-1] for curve in curves] or history)
        return here, max(spread, 1e-6)

    finals = whole[:, -1]
    spread = robust_spread(finals)
    level, gain = usual_gains(level_at(whole, stop), finals, spread)

    # ridge regression; the penalty is worth two runs
    unit = max(float(level.std()), 1e-9)
    x = (level - level.mean()) / unit
    at = np.clip((here - level.mean()) / unit, -3, 3)
    slope = x @ gain / (x @ x + 2)

    residual = gain - gain.mean() - slope * x
    prior = max(spread, abs(np.median(gain)) / 20, 1e-6) ** 2
    return here + float(gain.mean() + slope * at), prediction_sd(x, at, residual, prior)


def level_at(curves, epoch):
    """curves [..., epochs] -> mean of the last two values up to an epoch: a single one is noisy."""
    return curves[..., max(epoch - 2, 0) : epoch].mean(-1)


def robust_spread(values):
    """Standard deviation of values [n] as their quartiles tell it, failures left out."""
    low, high = np.quantile(values[~ruined(values)], [0.25, 0.75])
    return (high - low) / 1.35


def usual_gains(level, finals, spread):
    """Levels and gains of the runs whose gain is not an outlier, for a spread of final values."""
    gain = finals - level
    distance = np.abs(gain - np.median(gain))
    usual = distance <= 5 * max(np.median(distance), spread / 2)
    return level[usual], gain[usual]


def prediction_sd(x, at, residual, prior):
    """Standard deviation of a regression on x [n], whose residuals are [n], at a new point. It is
    wider far from the known runs, and where they are few: the prior variance counts as two runs,
    and 1.96 sd reach as far as Student's t does."""
    n = len(x)
    noise = (residual @ residual + 2 * prior) / n
    distance = 1 + 1 / n + at**2 / (x @ x + 2)
    return math.sqrt(noise * distance) * student(n, 0.05) / 1.96


def chance_to_win(history, curves, epochs):
    """Probability that a stopped run would end above the best finished one (0.5 without one)."""
    mean, sd = project(history, curves, epochs)
    best = max((curve[-1] for curve in curves), default=mean)
    return space.normal_cdf((mean - best) / sd)


# ---------------------------------------------------------------- worth


class Importance(NamedTuple):
    share: float  # of the variance of runs anywhere in the space, due to a parameter's main effect
    by_chance: float  # share of permutations of the scores, these among them, that give as much


class Worth:
    """What configurations are worth: a Gaussian process of the metric, without the noise of a seed,
    given sound rows. Points u [m, d] of the cube -> mean and sd [m], in the metric's units.

    The intervals over pages tell how much noise the pages make. How much the seed makes (`noise`,
    the sd of one run) is learnt from replicas, which are runs alike but for their seed; without
    replicas, a prior expects much of it."""

    def __init__(self, sweep, cube, rows, fit, posterior):
        history = sweep.history()
        entries = [history[row.number - 1] for row in rows]
        values, variances = observations(entries, sweep.sign)
        self.cube = cube
        self.sign = sweep.sign
        self.middle = values.mean()
        self.unit = max(values.std(), 1e-9)

        x = cube.features(np.array([row.point for row in rows]))
        y = (values - self.middle) / self.unit
        self.known = x, y, variances / self.unit**2, cube.category
        self.replicas = len(np.unique(x, axis=0)) < len(x)
        self.prior = REPLICAS_PRIOR if self.replicas else SEED_PRIOR

        self.fit = fit
        self.posterior = posterior
        self.model = posterior(*self.known, *self.sample())
        self.noise = self.unit * math.sqrt(self.model.weights @ self.model.noise[:, 0])

    def __call__(self, u):
        mean, sd = self.model(self.cube.features(np.atleast_2d(u)))
        return self.sign * (self.middle + self.unit * mean), self.unit * sd

    def sample(self):
        """Draws of theta [k, d + 2] around its best fit and their weights [k] by posterior density
        (importance sampling). Few runs leave theta open: the best fit alone would make the Gaussian
        process too sure of itself."""
        best, _, loss = self.fit(*self.known, noise=self.prior)
        draws = int(np.clip(1e7 / len(self.known[0]) ** 2, 20, 200))
        steps = np.random.default_rng(0).standard_normal((draws, len(best)))
        theta = best + 0.7 * steps

        # log of the posterior density over that of the draws, without constants
        log = 0.5 * (steps**2).sum(1) - [loss(t)[0] for t in theta]
        weights = np.exp(log - log.max())
        keep = weights > 1e-3
        return theta[keep], weights[keep] / weights[keep].sum()

    def along(self, point, i, limits):
        """Curve along the i-th parameter through a point [d]."""
        u = np.linspace(0, 1, 81)
        points = np.where(np.arange(len(point)) == i, u[:, None], point)
        return Curve(**vars(estimate(*self(points), limits)), u=u)

    def importance(self):
        """The Importance of each parameter, under the best fit (functional ANOVA, Hutter et al.
        2014)."""
        x, y, variance, category = self.known
        d = len(category)
        rng = np.random.default_rng(0)

        # [d, 12, 64, d]: one parameter at 12 values, the others at 64 random points each
        grid = np.linspace(0.04, 0.96, 12)[:, None, None]
        varied = np.eye(d, dtype=bool)[:, None, None]
        points = np.where(varied, grid, rng.random((64, d)))
        points = self.cube.features(points.reshape(-1, d))

        def main_effects(order):
            """Shares [d] of each parameter, the scores being in this order. They are not those of
            the runs' own variance: runs lie closer together than the points, or further apart."""
            known = x, y[order], variance[order], category
            theta = self.fit(*known, noise=self.prior)[0]
            model = self.posterior(*known, theta)
            mean = model(points)[0].reshape(d, 12, 64)
            return mean.mean(2).var(1) / (mean.var((1, 2)) + model.error)

        orders = [np.arange(len(y))]
        for _ in range(int(np.clip(2e3 / len(y), 19, 99))):
            orders.append(rng.permutation(orders[-1]))
        shares, *permuted = map(main_effects, orders)
        by_chance = np.mean([shares, *permuted] >= shares - 1e-9, 0)  # Phipson & Smyth 2010
        return list(map(Importance, shares, by_chance))


# ---------------------------------------------------------------- luck


@dataclass
class Luck:
    """How far the best of n runs lies above their mean, in their sd."""

    n: int
    expected: float  # of n runs of equal worth
    found: float
    limit: float  # exceeded by 5 % of n runs of equal worth
    row: object  # the best run


def measure_luck(rows, sign):
    """Luck of rows, None for fewer than 3."""
    n = len(rows)
    if n < 3:
        return None
    values = sign * last(rows)
    found = (values.max() - values.mean()) / max(values.std(ddof=1), 1e-12)
    return Luck(
        n,
        expected_lead(n),
        found,
        outlier_limit(n),
        rows[np.argmax(values)],
    )


# ---------------------------------------------------------------- one parameter


class Group(NamedTuple):
    """Scores of the runs with one value of a parameter, or with one from low to high."""

    ends: list  # [value] or [low, high]
    n: int
    mean: Estimate
    median: float


class Parameter:
    """The score of rows against a Dimension, the i-th that varies: the posterior's Curve along it,
    Groups of scores, and rho, the rank correlation, None for categories and under 3 runs."""

    def __init__(self, dimension, i, rows, along, limits):
        values = [row.values[i] for row in rows]
        self.key = dimension.name
        self.ticks = axis_ticks(dimension)
        self.along = along
        self.groups = []
        self.rho = None
        self.chance = 1.96 / math.sqrt(max(len(rows) - 1, 1))  # |rho| that chance exceeds in 5 %
        if len(rows) > 2:
            self.groups = groups_of(dimension, values, last(rows), limits)
            if not dimension.category and all(map(is_number, values)):
                self.rho = spearman(values, last(rows))


def axis_ticks(dimension):
    """(u, value) of the labels of an axis: all levels, or five values of the range."""
    if not 0 < len(dimension.levels) <= 8:
        return [(u, dimension.value(u)) for u in (0, 0.25, 0.5, 0.75, 1)]
    return [(dimension.encode(level), level) for level in dimension.levels]


def groups_of(dimension, values, scores, limits):
    """Groups of scores [n] by a parameter's values [n]; by thirds where these are many numbers."""
    # the ends of each group, and the index of each value's group
    numbers = all(map(is_number, values))
    by_key = {identity(value): [value] for value in sorted(values, key=None if numbers else str)}
    if numbers and not (dimension.levels and len(by_key) <= 8):
        ends, index = thirds(values)
    else:
        ends, keys = by_key.values(), list(by_key)
        index = np.array([keys.index(identity(value)) for value in values])

    groups = []
    for k, pair in enumerate(ends):
        x = scores[index == k]
        if len(x):
            groups.append(Group(pair, len(x), mean_estimate(x, limits), np.median(x)))
    return groups


def thirds(values):
    """values [n] -> (low, high) of each third of them, and in which third each value is [n]."""
    order = sorted(values)
    n = len(order)
    cuts = [order[0], order[n // 3], order[2 * n // 3], order[-1]]
    return pairwise(cuts), np.searchsorted(cuts[1:3], values, side="right")


def at_edge(dimension, best):
    """The remark that the best runs' values lie at one end of a Dimension's range, with the range
    to try; empty if they do not."""
    places = [dimension.encode(value) for value in best]
    law = dimension.law
    at_low = max(places) < 0.1
    at_high = min(places) > 0.9
    if not law or "normal" in law[0] or not (at_low or at_high):
        return ""

    # its range, shifted by half its length on the scale of its law
    end, shift = ("upper", 0.5) if at_high else ("lower", -0.5)
    ends = (max(space.quantile(law, u + shift), 0) for u in (0, 1))
    low, high = (math.ceil(x) if type(best[0]) is int else f"{x:.3g}" for x in ends)
    where = f"the best three runs lie at the {end} end of its range"
    return f"{dimension.name}: {where}; try {low} to {high}"


# ---------------------------------------------------------------- findings


class Row:
    """A trial as a report shows it; NaN for what is not known. seed is the default."""

    def __init__(self, trial, cube, seed=0):
        self.number = trial.number
        self.state = trial.state
        self.why = trial.why
        self.known = trial.known  # it ran elsewhere and cannot go on here
        self.verdict = next((v for v in reversed(trial.judged) if v["stop"]), None)

        self.params = trial.params
        self.seed = trial.params.get("seed", seed)
        self.values = [trial.params[d.name] for d in cube.free]
        self.point = cube.encode(trial.params)
        self.flags = " ".join(flags(trial.params))

        self.epochs = len(trial.history)
        self.history = list(trial.history) if trial.recorded else []
        self.last = trial.history[-1] if trial.history else math.nan
        self.pages = trial.rows[-1][1:3] if trial.rows else [math.nan] * 2  # interval over pages
        self.paired = paired(trial.rows)
        self.ruined = False

        self.expected = Estimate()  # what its configuration is worth
        self.repeated = Estimate()  # what one repetition would give
        self.final = Estimate()  # where it would have ended, had it not been stopped
        self.chance = math.nan  # that it would have beaten the best


def last(rows):
    return np.array([row.last for row in rows])


def sound(rows):
    return [row for row in rows if not row.ruined]


def of_state(rows, state):
    return [row for row in rows if row.state == state]


class Spread(NamedTuple):
    label: str
    without: list  # numbers of the trials left out
    n: int
    mean: float
    median: float
    sd: float
    low: float
    high: float


def spreads(label, rows):
    """Spread of rows, and once more without the ruined ones if there are any."""
    lines = [(rows, [])]
    lost = [row.number for row in rows if row.ruined]
    if lost:
        lines.append((sound(rows), lost))
    return [spread(label, without, last(some)) for some, without in lines if some]


def spread(label, without, x):
    sd = x.std(ddof=1) if len(x) > 1 else math.nan
    return Spread(
        label,
        without,
        len(x),
        x.mean(),
        np.median(x),
        sd,
        x.min(),
        x.max(),
    )


@dataclass
class Configuration:
    """Finished runs alike but for their seed, as one line of the ranking."""

    runs: list  # Rows by number
    value: float  # mean of the runs'
    pages: list  # interval over pages, mean of the runs'
    expected: Estimate


def configurations(rows, names):
    """Rows -> Configurations; names are those of the rows' values."""
    alike = {}
    for row in sorted(rows, key=lambda row: row.number):
        pairs = zip(names, row.values)
        key = tuple(identity(value) for name, value in pairs if name != "seed")
        alike.setdefault(key, []).append(row)

    for runs in alike.values():
        yield Configuration(
            runs,
            value=last(runs).mean(),
            pages=np.mean([run.pages for run in runs], 0),
            expected=(sound(runs) or runs)[0].expected,
        )


class Findings:
    """What a sweep has found, as report.py shows it. fit and posterior are the Gaussian process,
    bayes.py's `fit_gp` and `Posterior`."""

    def __init__(self, sweep, fit, posterior):
        cube = Cube(parse_space(sweep.spec))
        # "." has none, and a link keeps its own
        self.name = os.path.basename(os.path.abspath(sweep.folder))
        self.method = sweep.spec["method"]
        self.metric = sweep.metric
        self.sign = sweep.sign
        self.epochs = sweep.epochs
        self.over = printed_samples(sweep.folder.glob("trial-*.log"))  # of the rows' `pages`
        self.names = [d.name for d in cube.free]

        # shares are shown as points, 0 to 100, of fewer digits
        self.points = 1
        self.digits = 4
        limits = (-math.inf, math.inf)
        if sweep.metric in space.SHARES:
            self.points = 100
            self.digits = 2
            limits = (0, 1)

        seed = getattr(sweep.hparams, "seed", 0)
        self.trials = [Row(trial, cube, seed) for trial in sweep.trials]
        self.group_runs()
        self.count_cost(sweep)

        model = None
        self.importance = []
        self.noise = math.nan
        self.replicas = False
        if len(self.sound) > 2 and cube.free:
            model = Worth(sweep, cube, self.sound, fit, posterior)
            self.estimate_worth(model, limits)
        self.project_stopped(limits)

        self.choose_best()
        self.luck = measure_luck(self.fair, self.sign)
        self.parameters = []
        for i, dimension in enumerate(cube.free):
            along = model.along(self.first.point, i, limits) if model and self.first else None
            self.parameters.append(Parameter(dimension, i, self.fair, along, limits))
        self.command = shlex.join(["python", "train.py", *sweep.extra, *flags(self.params)])
        self.remark(sweep, cube)

    def group_runs(self):
        """Rows by state, ranked by value, and those that may be compared."""
        self.rows = [row for row in self.trials if row.state in ("finished", "stopped")]
        if self.rows:
            for row, lost in zip(self.rows, ruined(self.sign * last(self.rows))):
                row.ruined = bool(lost)
        self.sound = sound(self.rows)  # at least half of them

        ranked = sorted(self.rows, key=lambda row: -self.sign * row.last)  # equal ones by number
        self.finished = of_state(ranked, "finished")
        self.stopped = of_state(ranked, "stopped")
        self.failed = of_state(self.trials, "failed")

        # final and early values are pooled, and said to be, only where there are few final ones
        self.pooled = len(self.finished) < 6 and bool(self.stopped)
        pool = ranked if self.pooled else self.finished
        self.fair = sound(pool)
        self.out = [row for row in pool if row.ruined]

        self.spread = spreads("finished, last epoch", self.finished)
        self.spread += spreads("stopped, at the stop", self.stopped)
        if self.pooled:
            self.spread += spreads("all, each at the last epoch it had", self.rows)

    def count_cost(self, sweep):
        """Epochs and hours spent and saved; trials known from another sweep cost nothing."""
        ours = [trial for trial in sweep.trials if not trial.known]
        self.spent = sum(len(t.history) for t in ours)
        self.saved = sum(sweep.epochs - len(t.history) for t in ours if t.state == "stopped")
        seconds = [row[0] for trial in ours for row in trial.rows]
        self.hours = sum(seconds) / 3600 if seconds else math.nan
        self.hours_saved = self.saved * self.hours / max(self.spent, 1)

    def estimate_worth(self, model, limits):
        """What each sound run's configuration is worth, and what a repetition would give."""
        self.importance = model.importance()
        self.noise = model.noise
        self.replicas = model.replicas
        width = student(len(self.sound) - 1, 0.05)
        for row in self.sound:
            mean, sd = (float(x[0]) for x in model(row.point))
            row.expected = estimate(mean, sd, limits)
            again = math.hypot(sd, self.noise, row.paired)
            row.repeated = estimate(mean, again, limits, width)

    def project_stopped(self, limits):
        """Where stopped runs would have ended. A finished run without a curve is known by its last
        value alone: it can be the one to beat, but no other run is projected by it."""
        curves = [self.sign * np.array(row.history or [row.last]) for row in self.finished]
        has_curves = any(row.history for row in self.finished)
        for row in self.stopped:
            if has_curves and row.history:
                known = self.sign * np.array(row.history), curves, self.epochs
                mean, sd = project(*known)
                row.final = estimate(self.sign * mean, sd, limits)
                row.chance = chance_to_win(*known)

    def choose_best(self):
        """The best run by posterior mean, stopped runs that may rival it, and the ranking."""
        self.top = sound(self.finished or self.stopped)
        self.first = max(self.top, key=self.rank_value, default=None)
        self.params = self.first.params if self.first else {}
        self.rivals = [row.number for row in self.stopped if row.chance > 0.2 and not row.known]

        ranking = configurations(self.finished, self.names)
        self.ranking = sorted(ranking, key=lambda c: -self.sign * c.value)
        self.ties = [
            configuration.runs[0].number
            for configuration in self.ranking
            if configuration.expected.may_equal(self.ranking[0].expected)
        ]

    def rank_value(self, row):
        return self.sign * np.nan_to_num(row.expected.mean, nan=row.last)

    def remark(self, sweep, cube):
        """Sentences about the sweep: a history's own, and what follows from its runs."""
        self.edges = []
        if len(self.fair) > 5:
            remarks = [at_edge(d, [row.params[d.name] for row in self.fair[:3]]) for d in cube.free]
            self.edges += filter(None, remarks)

        elsewhere = [str(trial.number) for trial in sweep.trials if trial.known]
        self.notes = list(sweep.notes)
        if elsewhere:
            self.notes.append(f"Trials {', '.join(elsewhere)} ran elsewhere.")
        self.notes += self.edges
