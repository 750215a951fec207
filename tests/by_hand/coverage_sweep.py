"""Are a sweep's report and its stopping as sure as they say? Simulated sweeps, before and after:
before is what a fit without the seed's noise, and normal intervals of half the spread, would say.

python tests/by_hand/coverage_sweep.py worth       the best run's worth, and ties, of random points
python tests/by_hand/coverage_sweep.py suggested   the same of points that suggest() proposes
python tests/by_hand/coverage_sweep.py replicas    the same where one configuration ran three times
python tests/by_hand/coverage_sweep.py stopping    projections of stopped runs; what is saved, kept
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bayes
import findings
import sweep
from space import Cube, parse_space

SPEC = json.loads((sweep.ROOT / "hparams" / "sweep_lr_wd.json").read_text())
CUBE = Cube(parse_space(SPEC))
PAGES = 0.0053  # half an interval over 404 pages: 1.96 x .27 points
SEEDS = {"worth": 810_000, "suggested": 820_000, "replicas": 830_000, "stopping": 850_000}


# ---------------------------------------------------------------- the best run's worth


def smooth(rng, sd):
    """A smooth random function of points [n, d] in the unit cube whose sd there is sd."""
    waves, phase = rng.standard_normal((64, 4)) * 2, rng.uniform(0, 2 * math.pi, 64)
    weight, sample = rng.standard_normal(64), rng.random((2000, 4))

    def value(u):
        return np.cos(u @ waves.T + phase) @ weight

    middle, spread = value(sample).mean(), value(sample).std()
    return lambda u: 0.962 + sd * (value(u) - middle) / spread


def simulated_sweep(seed, n, sd=0.0, noise=0.0027, pages=False, suggested=False, replicas=0):
    """n finished trials of true worth .962, or that spread by sd, each seen with the noise of its
    seed; with intervals over pages or without; the best one run again -> (Sweep, worths)."""
    rng = np.random.default_rng(seed)
    truth, trials, worths = smooth(rng, sd), [], []

    def add(params):
        u = CUBE.features(np.array([CUBE.encode(params)]))
        worths.append(float(truth(u)[0]))
        value = worths[-1] + noise * rng.standard_normal()
        rows = [[1.0, value - PAGES, value + PAGES]] if pages else []
        trials.append(sweep.Trial(len(trials) + 1, params, "finished", [value], rows))

    state = sweep.Sweep(Path("s"), SPEC, 1, trials)
    for _ in range(n):
        drawn = sweep.suggest(SPEC, state.history(), rng) if suggested else None
        add(drawn or CUBE.decode(rng.random(4)))
    best = max(trials, key=lambda t: t.history[-1]).params
    for _ in range(replicas):
        add(best)
    return state, np.array(worths)


def believed(state):
    """(value, posterior mean, sd) of each trial, before and after, and how many are tied with the
    best one, before and after."""
    rows = [findings.Row(trial, CUBE) for trial in state.trials]
    model = findings.Worth(state, CUBE, rows, bayes.fit_gp, bayes.Posterior)
    value = findings.last(rows)
    x = model.known[0]
    alone = bayes.Posterior(*model.known, bayes.fit_gp(*model.known, noise=(-10.0, 3.0))[0])(x)
    before = model.middle + model.unit * alone[0], model.unit * alone[1]
    after = model(np.array([row.point for row in rows]))
    top = int(value.argmax())
    half = findings.PAIRED * np.ptp(rows[top].pages) / 2
    half = half if math.isfinite(half) else 1.96 * before[1][top]
    apart = np.abs(after[0] - after[0][top]) / np.hypot(after[1], after[1][top])
    return value, before, after, (np.abs(value - value[top]) <= half).sum(), (apart <= 1.96).sum()


def measure_worth(seed, sweeps, **setting):
    """Means over sweeps: luck of the observed best; of the posterior before and after, at the best
    value and (after) at the best mean, its bias and coverage; runs tied, share of all tied."""
    told = []
    for k in range(sweeps):
        state, worth = simulated_sweep((seed, k), **setting)
        value, before, after, tied_before, tied = believed(state)
        top, first = value.argmax(), after[0].argmax()
        line = [value[top] - worth[top]]
        for (mean, sd), i in ((before, top), (after, top), (after, first)):
            line += [mean[i] - worth[i], abs(mean[i] - worth[i]) <= 1.96 * sd[i]]
        told.append([*line, tied_before, tied, tied_before == len(worth), tied == len(worth)])
    return np.mean(told, 0)


def worth_table(name, sweeps):
    print(
        "points   bias: observed | before: bias, covered | after: bias, covered at the best value,"
    )
    print("         at the best mean | of the runs tied with the best before, after; all are, both")
    for n in (8, 12, 30):
        for sd, noise in ((0, 0.0027), (0, 0.0012), (0, 0.001), (0.0024, 0.0027), (0.0024, 0.001)):
            for pages in (False, True):
                setting = {"n": n, "sd": sd, "noise": noise, "pages": pages}
                setting |= {"suggested": name == "suggested", "replicas": 2 * (name == "replicas")}
                m = measure_worth(SEEDS[name], sweeps, **setting)
                told = f"n {n:2d}  sd {100 * sd:.2f}  noise {100 * noise:.2f}  pages {pages:d}"
                told += f"  {100 * m[0]:+.2f} | {100 * m[1]:+.2f} {m[2]:4.0%} | {100 * m[3]:+.2f}"
                told += f" {m[4]:4.0%}  {100 * m[5]:+.2f} {m[6]:4.0%} | {m[7]:4.1f} {m[8]:4.1f}"
                print(f"{told}  {m[9]:4.0%} {m[10]:4.0%}", flush=True)


# ---------------------------------------------------------------- stopped runs

EPOCHS = 22
COSINE = (1 + np.cos(math.pi * np.arange(1, EPOCHS + 1) / EPOCHS)) / 2
SLOW = {"mild": 0.5, "medium": 0.8}  # how much of a run's lead is still to come at the start


def simulated_curves(rng, n, rho, order="iid"):
    """Cosine-schedule curves [n, EPOCHS] whose epoch 10 ranks them with about rho; 8 % are ruined.
    order: iid, bo (later runs are better), or of SLOW (the better, the slower they start)."""
    quality = rng.standard_normal(n)
    if order == "bo":
        quality = 0.8 * quality + 1.5 * np.arange(n) / n
    final, spread = 0.962 + 0.0024 * quality, 0.0024 * math.sqrt(1 / rho**2 - 1)
    fall = np.abs(rng.standard_normal(n)) * 0.05 + 0.02
    final = np.where(rng.random(n) < 0.08, final - fall, final)
    noise = 0.001 * (0.3 + 0.7 * COSINE)
    gap = math.sqrt(max(spread**2 - noise[9] ** 2, 0)) / COSINE[9] * rng.standard_normal(n)
    gap = np.maximum(0.004 + gap + SLOW.get(order, 0) * 0.0024 * quality, -0.006)
    start = 0.25 * np.exp(-np.arange(1, EPOCHS + 1) / 1.6)
    curves = final[:, None] - gap[:, None] * COSINE - start
    return final, curves + noise * rng.standard_normal((n, EPOCHS))


def project_before(history, curves, epochs):
    """The gain by the rise instead of the level, half the spread as prior, a normal interval."""
    e, half = len(history), max(len(history) // 2, 1)
    whole = np.array([c for c in curves if len(c) >= epochs > e])
    if not len(whole):
        return findings.project(history, curves, epochs)

    def at(curve, epoch):
        return np.mean(curve[..., max(epoch - 2, 0) : epoch], axis=-1)

    finals, own = whole[:, -1], np.array(history)
    spread = np.subtract(*np.quantile(finals[~findings.ruined(finals)], [0.75, 0.25])) / 1.35
    gain, rise = finals - at(whole, e), at(whole, e) - at(whole, half)
    off = np.abs(gain - np.median(gain))
    keep = off <= 5 * max(np.median(off), spread / 2)
    gain, rise = gain[keep], rise[keep]
    unit = max(rise.std(), 1e-9)
    x, here = (rise - rise.mean()) / unit, (at(own, e) - at(own, half) - rise.mean()) / unit
    slope, here = x @ (gain - gain.mean()) / (x @ x + 2), np.clip(here, -3, 3)
    residual = gain - gain.mean() - slope * x
    prior = max(spread / 2, abs(np.median(gain)) / 20, 1e-6) ** 2
    variance = (residual @ residual + 2 * prior) / (len(gain) + 1)
    variance *= 1 + 1 / len(gain) + here**2 / (x @ x + 2)
    return float(at(own, e) + gain.mean() + slope * here), math.sqrt(variance)


def revive_before(state):
    """While one paused run has a chance of 3 % by itself, not while all of them have 7 %."""
    stopped = [state.curve(t) for t in state.trials if t.state == "stopped"]
    known = state.finished(), state.epochs
    chances = [findings.chance_to_win(curve, *known) for curve in stopped]
    return revive_after(state) if max(chances, default=0) >= 0.03 else None


revive_after, project_after = sweep.revive, findings.project


def measure_stopping(seed, sweeps, n, rho, order):
    """Means over sweeps under `pause`: share of epochs saved, truly best run kept; and over their
    stopped runs: coverage of the 95 % interval, that of the first band's, bias; and the share that
    would have won of those given less than 3 %."""
    kept, hits, wins = [], [], []
    for k in range(sweeps):
        final, y = simulated_curves(np.random.default_rng((seed, k)), n, rho, order)
        trained = sweep.simulate(y, {"type": "pause"})
        kept.append((1 - trained.mean() / EPOCHS, trained[final.argmax()] == EPOCHS))
        whole = [list(c) for c in y[trained == EPOCHS]]
        best = max(c[-1] for c in whole)
        for i in np.flatnonzero((trained < EPOCHS) & (final > 0.962 - 0.0144)):
            known = list(y[i, : trained[i]]), whole, EPOCHS
            mean, sd = findings.project(*known)
            hits.append((abs(y[i, -1] - mean) <= 1.96 * sd, mean - y[i, -1], trained[i] == 5))
            if findings.chance_to_win(*known) < 0.03:
                wins.append(y[i, -1] > best)
    hits = np.array(hits, float)
    first = hits[hits[:, 2] == 1, 0].mean()
    return *np.mean(kept, 0), hits[:, 0].mean(), first, hits[:, 1].mean(), np.mean(wins or [0])


def stopping_table(sweeps, labels):
    print("epochs saved, best kept | covered, of the first band, bias | under 3 % that win")
    cases = [(order, rho) for order in ("iid", "bo") for rho in (0.7, 0.9)]
    cases += [(order, 0.9) for order in SLOW]
    ways = {"before": (project_before, revive_before, 0.0)}
    ways["after"] = project_after, revive_after, sweep.CHANCE
    for label in labels:
        findings.project, sweep.revive, sweep.CHANCE = ways[label]
        totals = {}
        for order, rho in cases:
            for n in (12, 30, 64):
                count = max(sweeps * 12 // n, 1)
                m = measure_stopping(SEEDS["stopping"], count, n, rho, order)
                told = f"{label:6s} {order:6s} rho {rho}  n {n}  {m[0]:.3f} {m[1]:.3f} | {m[2]:.3f}"
                print(f"{told} {m[3]:.3f} {100 * m[4]:+.2f} | {m[5]:.3f}", flush=True)
                totals.setdefault(order, []).append(m[:2])
        for order, found in totals.items():
            saved, best = np.mean(found, 0)
            few = np.mean(found[::3], 0)
            print(f"{label:6s} {order:6s} all  saved {saved:.2f} kept {best:.3f}", end="")
            print(f"; n = 12: {few[0]:.2f} {few[1]:.3f}")


if __name__ == "__main__":
    name, sweeps, *labels = sys.argv[1:] + ["100"] * (len(sys.argv) < 3)
    if name == "stopping":
        stopping_table(int(sweeps), labels or ("before", "after"))
    else:
        worth_table(name, int(sweeps))
