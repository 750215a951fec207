"""Hyperparameter search that keeps its best run: Gaussian process, Hyperband loop, report.

python sweep.py                                        quick sweep on synthetic receipts, CPU
python sweep.py hparams/sweep_lr_wd.json --data DATA   a sweep; further flags go to train.py
python sweep.py hparams/sweep_lr_wd.json --devices 0,1 --enqueue hparams/run8.json
python sweep.py hparams/sweep_lr_wd.json --workers 8 --launcher "srun --gpus=1"
python sweep.py --report runs/sweep_lr_wd --html report.html

The file has W&B's sweep schema in JSON. A trial is runs/<sweep>/trial-003/, made by train.py up to
its next band (--stop-epoch) and from there on by --resume: what is decided depends on whole epochs
only, never on when somebody looked, so a sweep killed at any moment ends like one that was not.
"""

import argparse
import contextlib
import csv
import errno
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files import lock
from report import Plot, every, markdown, p, page, short, span
from space import (
    METRIC,
    NO_EFFECT,
    Cube,
    beta_cdf,
    bisect,
    check_rule,
    check_spec,
    closest,
    fail,
    flags,
    identity,
    is_number,
    leaf,
    load_spec,
    maximised,
    normal_cdf,
    parse_space,
    read_json,
    wandb_form,
)

# ---------------------------------------------------------------- Gaussian process

# normal priors on the logs of length scale (of a unit cube's side in d dimensions), signal
# variance and noise variance of standardised values: mean, standard deviation
SCALE_PRIOR, SIGNAL_PRIOR, NOISE_PRIOR = (-1.0, 0.7), (0.7, 1.0), (-10.0, 3.0)
MEAN_VARIANCE = 1.0  # of the unknown constant mean, integrated out
JITTER = 1e-8
REACH = 0.15  # of a failure, of the cube's side
SMALL_SPACE = 2000  # combinations that are all scored


def matern(squared):
    """Matern-5/2 correlation of squared scaled distances, and -2 times its derivative by them."""
    root = np.sqrt(5 * squared)
    decay = np.exp(-root)
    return (1 + root + root * root / 3) * decay, 5 / 3 * (1 + root) * decay


def squared_gaps(a, b, category):
    """a [n, d], b [m, d] -> squared differences [d, n * m]; of categories 0 or 1 (Hamming)."""
    gap = a.T[:, :, None] - b.T[:, None, :]
    gap *= gap
    gap[category] = gap[category] != 0
    return gap.reshape(a.shape[1], -1)


def log_likelihood(theta, gaps, y, variance):
    """theta = log (length scales [d], signal and noise variance), gaps [d, n * n], y [n],
    variance [n] (each value's own, known) -> log marginal likelihood and its gradient by theta
    (Rasmussen & Williams 2006, eq. 5.8 and 5.9)."""
    d, n = len(gaps), len(y)
    weights, (signal, noise) = np.exp(-2 * theta[:d]), np.exp(theta[d:])
    corr, slope = (m.reshape(n, n) for m in matern(weights @ gaps))
    cov = signal * corr + MEAN_VARIANCE
    cov[np.diag_indices(n)] += noise + variance + JITTER
    half_logdet = np.log(np.diag(np.linalg.cholesky(cov))).sum()
    inverse = np.linalg.inv(cov)
    alpha = inverse @ y
    value = -0.5 * y @ alpha - half_logdet - 0.5 * n * math.log(2 * math.pi)
    outer = np.outer(alpha, alpha) - inverse
    grad = [
        signal * weights * (gaps @ (outer * slope).ravel()),
        [signal * (outer * corr).sum(), noise * np.trace(outer)],
    ]
    return value, 0.5 * np.concatenate(grad)


def minimise(f, x, evaluations, memory=8):
    """L-BFGS (Nocedal & Wright 2006, algorithm 7.4): f(x) -> (value, gradient); x, value."""
    value, grad = f(x)
    pairs = []
    while evaluations > 0:
        step, kept = -grad, []
        for s, t in reversed(pairs):
            kept.append((s @ step) / (s @ t))
            step = step - kept[-1] * t
        if pairs:
            s, t = pairs[-1]
            step = step * (s @ t) / (t @ t)
        for (s, t), a in zip(pairs, reversed(kept)):
            step = step + s * (a - (t @ step) / (s @ t))
        size = min(1.0, 1.5 / np.abs(step).max())
        while evaluations > 0:
            new_value, new_grad = f(x + size * step)
            evaluations -= 1
            if new_value <= value + 1e-4 * size * (grad @ step):
                break
            size *= 0.3
        else:
            break
        s, t, gain = size * step, new_grad - grad, value - new_value
        x, value, grad = x + s, new_value, new_grad
        if s @ t > 1e-12:
            pairs = (pairs + [(s, t)])[-memory:]
        if gain < 1e-4:
            break
    return x, value


def fit(x, y, variance, category, starts=None):
    """x [n, d], standardised y [n], variance [n] -> theta of the largest posterior density, and
    its negative log; from starts, else from two: smooth without noise and rough with it."""
    n, d = x.shape
    gaps = squared_gaps(x, x, category)
    mean = np.r_[np.full(d, SCALE_PRIOR[0] + 0.5 * math.log(d)), SIGNAL_PRIOR[0], NOISE_PRIOR[0]]
    sd = np.r_[np.full(d, SCALE_PRIOR[1]), SIGNAL_PRIOR[1], NOISE_PRIOR[1]]

    def loss(theta):
        if np.abs(theta).max() > 25:
            return math.inf, theta
        value, grad = log_likelihood(theta, gaps, y, variance)
        z = (theta - mean) / sd
        return 0.5 * z @ z - value, z / sd - grad

    evaluations = int(np.clip(1.2e5 / n**2, 12, 40))
    rough = mean + np.r_[np.full(d, -0.7), 0, 6]
    found = [minimise(loss, start, evaluations) for start in starts or (mean, rough)]
    return min(found, key=lambda f: f[1])


class Posterior:
    """GP posterior at points [m, d] given x [n, d], y [n]: called, gives mean and sd [m] of the
    noise-free function (Rasmussen & Williams 2006, algorithm 2.1)."""

    def __init__(self, x, y, variance, category, theta):
        d = x.shape[1]
        self.x, self.category = x, category
        self.weights, (self.signal, noise) = np.exp(-2 * theta[:d]), np.exp(theta[d:])
        cov = self.covariance(x)
        cov[np.diag_indices(len(x))] += noise + variance + JITTER
        self.whiten = np.linalg.inv(np.linalg.cholesky(cov))
        self.alpha = self.whiten.T @ (self.whiten @ y)

    def covariance(self, z):
        scale = np.sqrt(self.weights) * ~self.category
        a, b = self.x * scale, z * scale
        gaps = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
        for j in np.flatnonzero(self.category):
            gaps += self.weights[j] * (self.x[:, j, None] != z[:, j])
        return self.signal * matern(np.maximum(gaps, 0))[0] + MEAN_VARIANCE

    def __call__(self, z):
        k = self.covariance(z)
        left = self.signal + MEAN_VARIANCE - ((self.whiten @ k) ** 2).sum(0)
        return self.alpha @ k, np.sqrt(np.maximum(left, 1e-14))


def log_ei(mean, sd, best):
    """Log of E[max(f - best, 0)] for f ~ N(mean, sd^2), exact far below best too, where EI itself
    is 0 in float64 (Ament et al. 2023)."""
    z = (mean - best) / sd
    cdf = 0.5 * np.frompyfunc(math.erfc, 1, 1)(-z / math.sqrt(2)).astype(float)
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    near = np.log(np.maximum(density + z * cdf, 1e-300))
    far = np.minimum(z, -1.0)
    tail = -0.5 * far**2 - 0.5 * math.log(2 * math.pi) - 2 * np.log(-far)
    tail += np.log1p(np.maximum(-3 / far**2, -0.9))
    return np.log(sd) + np.where(z > -20, near, tail)


# ---------------------------------------------------------------- optimiser


def observations(history, sign):
    """History entries -> for each the value to maximise and its own variance, NaN where the run
    has none (failed, pending)."""
    value, variance = np.full(len(history), np.nan), np.zeros(len(history))
    done = [h for h in history if h["state"] == "finished"]
    curves = [sign * np.array(h["history"]) for h in done if h.get("history")]
    for i, h in enumerate(history):
        if h["state"] == "finished":
            value[i] = sign * h["value"]
        elif h["state"] == "stopped":
            curve = sign * np.array(h.get("history") or [h["value"]], float)
            mean, sd = project(curve, curves, h.get("epochs", 0))
            value[i], variance[i] = mean, sd * sd
    value[~np.isfinite(value)] = np.nan
    return value, variance


def warps(y, variance):
    """y [n] to maximise -> candidates (standardised warped y, its variance, -log Jacobian).
    Box-Cox powers of the distance to the best value; power 1 leaves y as it is, 0 is the log.
    A tail far below the rest is first drawn in, or one ruined run would flatten all others."""
    below = y.max() - y
    unit = max(np.median(below), 1e-12)
    slope = np.where(below > 6 * unit, 6 * unit / np.maximum(below, unit), 1.0)
    below = np.where(below > 6 * unit, 6 * unit * (1 - np.log(slope)), below)
    for power in (0.3, 1.0, 0.0):
        t = 1 + 2 * below / unit
        z = -(t**power - 1) / power if power else -np.log(t)
        rate = 2 / unit * t ** (power - 1)
        scale = max(z.std(), 1e-12)
        cost = len(y) * math.log(scale) - np.log(rate).sum()
        yield (z - z.mean()) / scale, variance * (rate * slope / scale) ** 2, cost


def fit_best(x, y, variance, category):
    """Warped y and variance, and theta, of the warp with the largest posterior density; each
    warp's search starts where the one before ended."""
    fits, starts = [], None
    for z, own, cost in warps(y, variance):
        theta, loss = fit(x, z, own, category, starts)
        fits.append((loss + cost, z, own, theta))
        starts = [theta]
    return min(fits, key=lambda f: f[0])[1:]


def suggest(space, history, rng):
    """space (W&B sweep dict), history [{params, value, state: finished | stopped | failed |
    pending}, ...], rng (numpy Generator) -> params of the next run, none that was tried before;
    None when all were. Stopped entries have `history`, a value an epoch, and `epochs`, the number
    a whole run has; where finished ones have `history` too, the stopped are extrapolated by it.
    Raises ValueError for a space that is not one."""
    cube = Cube(parse_space(space))
    seen = {cube.key(h["params"]) for h in history}
    finite = bool(cube.stepped.all())
    count = math.prod(len(d.levels) for d in cube.free) if finite else math.inf
    if space.get("method") == "grid":
        if not finite:
            fail("method: grid", "a parameter has no steps", "give values, int_uniform or q_*")
        return first_new(cube, cube.combinations(), seen)
    if count <= SMALL_SPACE:
        points = list(cube.combinations())
        draws = rng.permutation(np.array(points).reshape(len(points), len(cube.free)))
    else:
        draws = rng.random((512, len(cube.free)))
    u = np.array([cube.encode(h["params"]) for h in history]).reshape(len(history), len(cube.free))
    value, variance = observations(history, 1 if maximised(space) else -1)
    waiting = np.array([h["state"] == "pending" for h in history], bool)
    known = np.isfinite(value)
    if space.get("method", "bayes") == "random" or not len(cube.free):
        ranked = draws
    elif (known | waiting).sum() < max(4, len(cube.free)) or known.sum() < 2:
        ranked = spread_out(np.clip(u, 0, 1), draws)
    else:
        ranked = by_improvement(cube, u, value, variance, waiting, draws, rng, count <= SMALL_SPACE)
    more = cube.combinations() if finite else (rng.random(len(cube.free)) for _ in range(1000))
    return first_new(cube, itertools.chain(ranked, draws, more), seen)


def first_new(cube, points, seen):
    """The first of the points whose params nobody tried."""
    candidates = (cube.decode(u) for u in points)
    return next((params for params in candidates if cube.key(params) not in seen), None)


def spread_out(u, draws):
    """draws [m, d], the one first that keeps the wrap-around L2 discrepancy of u [n, d] and it
    lowest (Hickernell 1998): quasi-random starts that fill the gaps between what is known."""
    gap = np.abs(draws[:, None] - u[None])
    discrepancy = np.prod(1.5 - gap * (1 - gap), axis=2).sum(1)
    return draws[np.argsort(discrepancy, kind="stable")]


def by_improvement(cube, u, value, variance, waiting, draws, rng, small):
    """Points [m, d] by log expected improvement, the best first. The incumbent is the best
    posterior mean; pending runs are believed to give their posterior mean; failures repel."""
    known, x = np.isfinite(value), cube.features(u)
    failed = x[~known & ~waiting]
    z, own, theta = fit_best(x[known], value[known], variance[known], cube.category)
    posterior = Posterior(x[known], z, own, cube.category, theta)
    means = posterior(x[known])[0]
    if waiting.any():
        z, own = np.r_[z, posterior(x[waiting])[0]], np.r_[own, np.zeros(waiting.sum())]
        posterior = Posterior(np.r_[x[known], x[waiting]], z, own, cube.category, theta)

    def score(points):
        f = cube.features(points)
        return log_ei(*posterior(f), means.max()) + log_feasible(cube, f, x[known], failed)

    if small:
        return draws[np.argsort(-score(draws), kind="stable")]
    top = np.clip(u[known][np.argsort(-means, kind="stable")[:4]], 0, 1).repeat(48, 0)
    near = top + rng.standard_normal(top.shape) * 10 ** rng.uniform(-3, -0.5, (len(top), 1))
    points = np.concatenate([draws, np.clip(near, 0, 1)])
    points = points[np.argsort(-score(points), kind="stable")]
    found, scores = climb(score, points[:6], rng, cube.stepped)
    return np.concatenate([found[np.argsort(-scores, kind="stable")], points])


def log_feasible(cube, z, x, failed):
    """Log probability, squared, that a run at z [m, d] does not fail: a vote of the runs nearby,
    so that a failure repels near its point and nowhere else."""
    if not len(failed):
        return 0.0

    def votes(points):
        gaps = squared_gaps(z, points, cube.category).sum(0).reshape(len(z), len(points))
        return np.exp(-0.5 * gaps / REACH**2).sum(1)

    good = 0.1 + votes(x)
    return 2 * np.log(good / (good + votes(failed)))


def climb(score, points, rng, stepped, rounds=14, tries=24):
    """Local search of score from points [m, d]: normal steps whose radius shrinks when none of
    them helps, and jumps to other levels of parameters that have levels; points, scores [m]."""
    value, (m, d) = score(points), points.shape
    radius, rows = np.full((m, 1, 1), 0.1), np.arange(m)
    for _ in range(rounds):
        shape = (m, tries, d)
        moved = rng.random(shape) < max(0.5, 2 / d)
        trial = points[:, None] + rng.standard_normal(shape) * radius * moved
        jump = stepped & (rng.random(shape) < 1 / d)
        trial = np.clip(np.where(jump, rng.random(shape), trial), 0, 1)
        new = score(trial.reshape(-1, d)).reshape(m, tries)
        best = new.argmax(1)
        better = new[rows, best] > value
        points = np.where(better[:, None], trial[rows, best], points)
        value = np.maximum(value, new[rows, best])
        radius[~better] *= 0.4
    return points, value


# ---------------------------------------------------------------- early stopping

# Type pause judges at these shares of the epochs and pauses the lower half. The first band is a
# quarter, as late as a cosine schedule needs to tell runs apart at all; four cheap looks save
# more than two because a run that slips later is still caught. What looks lost is not: after the
# cap, paused runs go on band by band, most likely winner first, while one has at least a CHANCE
# of beating the best. The chance comes from finished runs: their gain from the band to the end,
# by how fast they were rising there, so that a slow starter is not taken for a bad one.
SHARES, CHANCE = (0.25, 0.375, 0.5, 0.7), 0.03


def eta_of(rule):
    return rule.get("eta", 2 if rule["type"] == "pause" else 3)


def bands_of(rule, epochs):
    """early_terminate -> epochs, ascending, at which runs are judged."""
    eta = eta_of(rule)
    if rule["type"] == "brackets":
        return sorted({rung for rungs in brackets(epochs, eta) for _, rung in rungs})
    if rule["type"] == "pause":
        return sorted(rule.get("bands") or {max(1, int(share * epochs)) for share in SHARES})
    if "max_iter" in rule:
        parts = [rule["max_iter"] / eta ** (k + 1) for k in range(int(rule["s"]))]
        return sorted(int(b) for b in parts if b >= 1)
    bands = [float(rule["min_iter"])]
    while bands[-1] * eta <= epochs:
        bands.append(bands[-1] * eta)
    return [int(b) for b in bands]


def brackets(max_iter, eta):
    """Hyperband's table (Li et al. 2018, table 1): brackets, the most eager to stop first, each
    its rungs as (runs, epochs each run has had by then)."""
    deepest = int(math.log(max_iter) / math.log(eta) + 1e-9)
    table = []
    for s in range(deepest, -1, -1):
        runs = (deepest + 1) // (s + 1) * eta**s
        rungs = [(runs / eta**i, max_iter / eta ** (s - i)) for i in range(s + 1)]
        table.append([tuple(max(1, int(x + 1e-9)) for x in rung) for rung in rungs])
    return table


def judge(values, others, rule, epochs):
    """values [e]: a run's, larger is better; others: curves of the other runs; rule:
    early_terminate -> None before the first band, else {rule, epoch: the band, value, rank, of:
    how many runs reached it, bar: the value missed or met, stop, why: a guard that spoke}."""
    reached = [b for b in bands_of(rule, epochs) if b <= len(values)]
    if not reached:
        return None
    band = reached[-1]
    field = sorted([c[band - 1] for c in others if len(c) >= band] + [values[band - 1]])[::-1]
    place = int(len(field) / eta_of(rule))
    bar = field[place - (rule["type"] == "brackets" and len(field) >= eta_of(rule))]
    value = values[band - 1] if rule.get("strict", True) else max(values)
    why = ""
    if max(values) >= rule.get("preserve_threshold", math.inf):
        why = "preserve_threshold"
    elif rule["type"] == "pause" and sum(len(c) >= epochs for c in others) < 3:
        why = "fewer than 3 finished runs"
    verdict = {"rule": rule["type"], "epoch": band, "value": value, "bar": bar, "of": len(field)}
    verdict |= {"rank": 1 + sum(v > value for v in field), "stop": bool(value < bar and not why)}
    return verdict | ({"why": why} if why and value < bar else {})


def should_stop(values, others, early_terminate):
    """values [e]: a value an epoch, larger is better; others: the same of every other run;
    early_terminate as in the sweep file, `epochs` in it (default: the longest curve) being the
    length of a whole run -> whether the run is to be stopped, that is paused, now. hyperband is
    W&B's rule to the letter (sweeps 0.3.0, hyperband_stopping.py). Raises ValueError."""
    if not early_terminate:
        return False
    check_rule(early_terminate)
    longest = max([len(values)] + [len(c) for c in others])
    verdict = judge(values, others, early_terminate, early_terminate.get("epochs", longest))
    return bool(verdict and verdict["stop"])


def ruined(values):
    """values to maximise [n] -> which of them are failures by any measure: far below the rest."""
    values = np.asarray(values, float)
    middle = np.median(values)
    spread = max(np.median(np.abs(values - middle)) * 1.4826, 1e-9)
    return values < middle - 10 * spread


def project(history, curves, epochs):
    """history [e] of a run that stopped, curves of finished ones [epochs each] -> its value at
    the last epoch and that value's sd. Ridge regression of the finished runs' gain from epoch e
    on their rise before it; ruined runs are left out, and the sd starts from half the finals'
    spread and gives way to the residuals' own."""
    e, half = len(history), max(len(history) // 2, 1)

    def recent(curve, at):
        return float(np.mean(curve[max(at - 2, 0) : at]))

    whole = [c for c in curves if len(c) >= epochs > e]
    if not whole:
        return recent(history, e), max(float(np.std([c[-1] for c in curves] or history)), 1e-6)
    finals = np.array([c[-1] for c in whole])
    sound = finals[~ruined(finals)]
    spread = float(np.subtract(*np.quantile(sound, [0.75, 0.25]))) / 1.35
    gain = finals - [recent(c, e) for c in whole]
    off = np.abs(gain - np.median(gain))
    keep = off <= 5 * max(np.median(off), spread / 2)
    gain, rise = gain[keep], np.array([recent(c, e) - recent(c, half) for c in whole])[keep]
    unit = max(float(rise.std()), 1e-9)
    x = (rise - rise.mean()) / unit
    slope = x @ (gain - gain.mean()) / (x @ x + 2)
    left = gain - gain.mean() - slope * x
    here = float(np.clip((recent(history, e) - recent(history, half) - rise.mean()) / unit, -3, 3))
    prior = max(spread / 2, abs(np.median(gain)) / 20, 1e-6) ** 2
    variance = (left @ left + 2 * prior) / (len(gain) + 1)
    variance *= 1 + 1 / len(gain) + here**2 / (x @ x + 2)
    return recent(history, e) + float(gain.mean() + slope * here), math.sqrt(variance)


def chance_to_win(history, curves, epochs):
    """Probability that a stopped run would end above the best finished one (0.5 if none is)."""
    if not curves:
        return 0.5
    mean, sd = project(history, curves, epochs)
    return normal_cdf((mean - max(c[-1] for c in curves)) / sd)


# ---------------------------------------------------------------- sweep file

ROOT = Path(__file__).resolve().parent
TRAINER = [sys.executable, str(ROOT / "train.py")]


def say_what_has_no_effect(spec):
    keys = sorted(NO_EFFECT & set(spec)) + [f"metric.{k}" for k in spec["metric"] if "imp" in k]
    if keys:
        print(f"without effect here: {', '.join(keys)}")
    if not maximised(spec) and "hmean" in spec["metric"]["name"]:
        print("warning: metric hmean is minimised; for the best give goal maximize")
    rule = spec.get("early_terminate") or {}
    idle, beside = ("min_iter", "max_iter") if "max_iter" in rule else ("s", "min_iter")
    if rule.get("type") == "hyperband" and idle in rule:
        print(f"early_terminate: {idle} is ignored beside {beside}, as by W&B")


def command_flags(spec):
    """Words of a W&B `command` behind its program, ${envvar:NAME} filled in; the other macros stand
    for what is done anyway. Raises ValueError."""

    def variable(match):
        if match[1] not in os.environ:
            fail("command", f"environment variable {match[1]} is not set", "set it")
        return os.environ[match[1]]

    words = spec.get("command") or []
    behind = itertools.dropwhile(lambda w: w != "${program}" and not w.endswith(".py"), words)
    words = [re.sub(r"\$\{envvar:(\w+)\}", variable, w) for w in list(behind)[1:]]
    return [w for w in words if not w.startswith("${")]


def asked(given):
    """train.py started to resolve flags; for `answer`."""
    command = [*TRAINER, *given, "--print-hparams"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process):
    """(hparams, "") as train.py resolves them, or ({}, why it refuses them)."""
    out, err = process.communicate()
    if process.returncode == 0:
        return json.loads(out), ""
    return {}, (err.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")


def resolve(spec, extra):
    """The middle point's hparams as train.py resolves them, once it has accepted the lowest and
    the highest point too; raises ValueError with its own message."""
    cube = Cube(parse_space(spec))
    points = [cube.decode(np.full(len(cube.free), u)) for u in (0.0, 1.0, 0.5)]
    answers = [answer(process) for process in [asked(extra + flags(p)) for p in points]]
    for _, refused in answers:
        if refused:
            unknown = re.match(r"unrecognized arguments: ([^= ]+)", refused)
            remedy = f"{closest(unknown[1], own_flags()) if unknown else ''}correct the sweep file or the flag"
            fail("train.py refuses the sweep's values", refused, remedy)
    return answers[-1][0]


# ---------------------------------------------------------------- state


@dataclass(eq=False)
class Trial:
    number: int
    params: dict
    state: str = "pending"  # pending | stopped | finished | failed
    history: list = ()  # metric, a value an epoch
    rows: list = ()  # [seconds, low, high] an epoch, the interval being over pages
    judged: tuple = ()  # verdicts
    crashes: int = 0
    whole: bool = False  # go through to the last epoch, do not judge again
    revived: bool = False
    why: str = ""
    said: int = 0  # bytes in its log before the process that runs now

    @property
    def name(self):
        return f"trial-{self.number:03d}"


@dataclass
class Sweep:
    """runs/<sweep>/: sweep.json (what is swept) and state.jsonl, a line a trial event, the
    whole state. A line counts once its newline is on the disk; half a line is cut off."""

    folder: Path
    spec: dict
    epochs: int
    trials: list
    extra: list = ()  # flags of every trial
    hparams: dict = None  # as train.py resolves them, for what the sweep does not vary

    def __post_init__(self):
        self.sign = 1 if maximised(self.spec) else -1
        self.cap = self.spec.get("run_cap", math.inf)
        self.rule = {"type": ""} | (self.spec.get("early_terminate") or {})
        if "preserve_threshold" in self.rule:  # in the metric's units; values judged are maximised
            self.rule["preserve_threshold"] *= self.sign
        self.metric = leaf(self.spec["metric"]["name"].replace("/", "."))

    def write(self, event, trial=None, **more):
        """Apply an event, once it is on the disk (if there is a folder); raises ValueError with the
        file whole."""
        data = {"event": event, "trial": trial.number if trial else 0, **more}
        if self.folder:
            append_line(self.folder / "state.jsonl", json.dumps(data))
        self.apply(data)

    def apply(self, event):
        kind = event["event"]
        if kind == "new":
            self.trials.append(Trial(event["number"], event["params"]))
            if event["number"] != len(self.trials):
                raise ValueError("a trial is missing, or there twice")
            return
        trial = {t.number: t for t in self.trials}[event["trial"]]
        if kind == "epochs":
            trial.history, trial.rows = event["history"], event["rows"]
        elif kind == "judged":
            trial.judged += (event["verdict"],)
            if event["verdict"]["stop"]:
                trial.state = "stopped"
        elif kind == "crashed":
            trial.crashes += 1
        elif kind in ("finished", "stopped", "failed"):
            trial.state, trial.why = kind, event["why"] if kind == "failed" else ""
        elif kind == "continued":
            trial.state, trial.revived, trial.whole = "pending", True, event["whole"]
            trial.crashes = 0

    def history(self):
        """The trials as suggest() wants them."""
        return [
            {"params": t.params, "state": t.state, "history": list(t.history)}
            | {"epochs": self.epochs, "value": t.history[-1] if t.history else None}
            for t in self.trials
        ]

    def curve(self, trial):
        """A trial's values, larger being better."""
        return [self.sign * v for v in trial.history]

    def curves(self, least=1, without=None):
        alive = [t for t in self.trials if t is not without and t.state != "failed"]
        return [self.curve(t) for t in alive if len(t.history) >= least]


ROOM = "make room and start the sweep again; nothing is lost"


def read_sweep(path):
    """A sweep folder, or a history JSON {sweep, epochs, trials: [{number, params, value, state,
    epoch}]}, -> Sweep; raises ValueError."""
    path = Path(path)
    if path.is_dir() and not (path / "sweep.json").exists():
        fail(path, "is no sweep folder", "give runs/NAME of a sweep")
    data = read_json(path / "sweep.json" if path.is_dir() else path, "sweep folder")
    try:
        if not path.is_dir():
            return read_history(path, data)
        spec, hparams = check_spec(data["sweep"]), data["hparams"]
        sweep = Sweep(path, spec, hparams["epochs"], [], data["extra"], hparams)
    except (KeyError, TypeError, AttributeError) as error:
        fail(path, f"is no sweep that ran ({error!r})", "give runs/NAME, or a history file")
    log = path / "state.jsonl"
    text = log.read_bytes() if log.exists() else b""
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            sweep.apply(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError):
            fail(f"{log}: line {number}", "is damaged", "remove it, or start anew")
    return sweep


def read_history(path, data):
    """A history file's content -> Sweep; raises ValueError, KeyError or TypeError."""
    spec, epochs, trials = check_spec(data["sweep"]), data["epochs"], []
    names = {d.name for d in parse_space(spec)}
    for number, r in enumerate(data["trials"], 1):
        sound = r["number"] == number and r["state"] in ("finished", "stopped", "failed")
        sound = sound and names <= set(r["params"]) and is_number(r["value"])
        if not sound or not 0 < int(r["epoch"]) <= epochs <= 1e5:
            fail(f"{path}: trial {number}", f"is {json.dumps(r)[:200]}", "see hparams/history_*")
        trial = Trial(number, dict(r["params"]), r["state"], [r["value"]] * int(r["epoch"]))
        trial.rows = [[math.nan] * 3] * len(trial.history)
        trials.append(trial)
    return Sweep(Path("runs") / path.stem, spec, epochs, trials)


def open_locked(folder):
    """(Sweep, lock) of a folder for the one process that may write there; raises ValueError."""
    held = lock(folder / "lock")
    if held is None:
        fail(folder, "another sweep is running on this folder", "wait for it, or stop it")
    log = folder / "state.jsonl"
    if log.exists():  # what a kill left behind the last newline
        os.truncate(log, log.read_bytes().rfind(b"\n") + 1)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return (read_sweep(folder) if (folder / "sweep.json").exists() else None), held


def open_sweep(folder, spec, extra):
    """Lock and read the sweep folder, making it when it is not there; raises ValueError when it
    belongs to another space or another process."""
    path = folder / "sweep.json"
    hparams = None if path.exists() else resolve(spec, extra)  # refused: no folder is left behind
    if hparams and (folder / "hparams.json").exists():
        fail(folder, "is a run of train.py's", "give --name NEW")
    folder.mkdir(parents=True, exist_ok=True)
    sweep, held = open_locked(folder)
    for key in ("method", "metric", "parameters", "early_terminate", "seed"):
        if sweep and sweep.spec.get(key) != spec.get(key):
            fail(folder, f"holds a sweep with other {key}", "give --name NEW, or that sweep's file")
    if sweep and sweep.extra != extra:
        told = " ".join(sweep.extra) or "(none)"
        fail(folder, f"was started with train.py flags {told}", "give the same, or --name NEW")
    if sweep is None or sweep.spec != spec:
        hparams = sweep.hparams if sweep else hparams
        made = {"sweep": spec, "extra": extra, "hparams": hparams}
        write_whole(path, json.dumps(made, indent=1))
        sweep = read_sweep(folder)
    return sweep, held


def append_line(path, line):
    """Append a line to a file, or leave the file as it was."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        fail(path, f"cannot be written ({error.strerror})", ROOM)


def write_whole(path, text):
    """A file that is complete or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(path, f"cannot be written ({error.strerror})", ROOM)


# ---------------------------------------------------------------- trials

RETRIES = 2  # of a trial whose process or machine died, from its last checkpoint
AGAIN = 30  # seconds until a trial is started again that crashed or still runs on another host


def read_rows(sweep, trial):
    """Metric and [seconds, low, high] of each epoch in the trial's log.csv; raises ValueError
    when the metric is not among its columns."""
    path = sweep.folder / trial.name / "log.csv"
    if not path.exists():
        return [], []
    try:
        rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
        values = [float(row[sweep.metric]) for row in rows]
        columns = ("seconds", f"{sweep.metric}_lo", f"{sweep.metric}_hi")
        return values, [[float(row.get(c) or "nan") for c in columns] for row in rows]
    except KeyError:
        what = f"is no column of {path}, only {', '.join(rows[0])}"
        fail(f"metric {sweep.metric}", what, "name one of them in the sweep file")
    except (ValueError, TypeError, csv.Error) as error:
        fail(path, f"is damaged ({error})", "remove it: it is written anew from last.pt")


def next_target(sweep, trial):
    """Epochs after which the trial's process is to end: its next band, or the last epoch."""
    bands = bands_of(sweep.rule, sweep.epochs) if sweep.rule["type"] and not trial.whole else []
    return min([b for b in bands if len(trial.history) < b < sweep.epochs], default=sweep.epochs)


def settle(sweep, trial):
    """What follows from the epochs a pending trial has: finished, judged, or on to the next."""
    rule, done = sweep.rule, len(trial.history)
    if done >= sweep.epochs:
        sweep.write("finished", trial)
    elif (
        rule["type"] in ("", "brackets")
        or trial.whole
        or done not in bands_of(rule, sweep.epochs)
        or done in [v["epoch"] for v in trial.judged]
    ):
        return
    elif trial.revived:
        sweep.write("stopped", trial, why="waits for its chance against the others")
    else:
        verdict = judge(sweep.curve(trial), sweep.curves(without=trial), rule, sweep.epochs)
        verdict |= {k: sweep.sign * verdict[k] for k in ("value", "bar")}
        sweep.write("judged", trial, verdict=verdict)
        why = f" (kept: {verdict['why']})" if "why" in verdict else ""
        word = "paused" if verdict["stop"] else "goes on"
        told = f"{explain(verdict)}{why}; {trust(sweep, done)}"
        print(f"trial {trial.number} {word} at epoch {done}: {told}")


def explain(v):
    return f"{v['value']:.4f} is rank {v['rank']} of {v['of']}, bar {v['bar']:.4f}"


def trust(sweep, band):
    """How well the band's epoch has ranked the finished runs so far."""
    whole = sweep.curves(sweep.epochs)
    rho = f"{spearman([c[band - 1] for c in whole], [c[-1] for c in whole]):+.2f}"
    rho = rho if len(whole) > 2 else "unknown"
    return f"rank correlation of epoch {band} with the last {rho} (n = {len(whole)})"


def spearman(a, b):
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""

    def ranks(x):
        x = np.array(x)
        return (x < x[:, None]).sum(1) + (x <= x[:, None]).sum(1)

    a, b = (r - r.mean() if len(r) else r for r in (ranks(a), ranks(b)))
    return float(a @ b / math.sqrt((a @ a) * (b @ b))) if a.any() and b.any() else 0.0


def choose(sweep, busy):
    """(trial, epochs to train it to) to run next; (None, 0) for a new one; None for nothing now."""
    if sweep.rule["type"] == "brackets":
        return choose_bracket(sweep, busy)
    for trial in sweep.trials:
        if trial.state == "pending" and trial not in busy:
            return trial, next_target(sweep, trial)
    if len(sweep.trials) < sweep.cap:
        return None, 0
    return None if busy else revive(sweep)


def revive(sweep):
    """(trial, epochs) of the stopped run most likely to beat the best finished one, None if none
    may."""
    limit = sweep.rule.get("revive", math.inf if sweep.rule["type"] == "pause" else 0)
    more = sum(t.revived for t in sweep.trials if t.state != "failed") < limit
    stopped = [t for t in sweep.trials if t.state == "stopped" and (more or t.revived)]
    whole = sweep.curves(sweep.epochs)
    chances = {t: chance_to_win(sweep.curve(t), whole, sweep.epochs) for t in stopped}
    trial = max(stopped, key=chances.get, default=None)
    if trial is None or chances[trial] < CHANCE:
        return None
    sweep.write("continued", trial, whole=False, why=f"chance to win {chances[trial]:.3f}")
    at = f"trial {trial.number} goes on from epoch {len(trial.history)}"
    print(f"{at}: chance to beat the best {chances[trial]:.0%}")
    return trial, next_target(sweep, trial)


def choose_bracket(sweep, busy):
    """The same for type brackets, whose trials are numbered through its brackets in turn."""
    first = 0
    for rungs in itertools.cycle(brackets(sweep.epochs, eta_of(sweep.rule))):
        size = min(rungs[0][0], sweep.cap - first)
        if size <= 0:
            return None
        group = sweep.trials[first : first + size]
        job = in_bracket(sweep, group, [r for _, r in rungs], busy, len(group) == size)
        if job or len(group) < size:
            return job or (None, rungs[0][1])
        first += size


def in_bracket(sweep, group, rungs, busy, full):
    """Next (trial, rung) of one bracket; when all its runs have reached a rung the best 1/eta are
    promoted and the others wait, paused, with their checkpoints."""
    for rung in rungs:
        group = [t for t in group if t.state != "failed"]
        late = [t for t in group if len(t.history) < rung]
        ready = [t for t in late if t not in busy]
        if late or not full or not group or rung >= sweep.epochs:
            return (ready[0], rung) if ready else None
        group.sort(key=lambda t: -sweep.sign * t.history[rung - 1])
        keep = max(1, int(len(group) / eta_of(sweep.rule)))
        bar = group[keep - 1].history[rung - 1]
        for rank, trial in enumerate(group, 1):
            if rung not in [v["epoch"] for v in trial.judged]:
                verdict = {"rule": "brackets", "epoch": rung, "value": trial.history[rung - 1]}
                verdict |= {"rank": rank, "of": len(group), "bar": bar, "stop": rank > keep}
                sweep.write("judged", trial, verdict=verdict)
        group = group[:keep]
    return None


def propose(sweep, queue):
    """Params and source of the next trial: what is enqueued and untried, else suggest()'s;
    drawn from (seed, trial), so that a restarted sweep proposes what it would have proposed."""
    cube = Cube(parse_space(sweep.spec))
    tried = {cube.key(t.params) for t in sweep.trials}
    for path, params in queue:
        if cube.key(params) not in tried:
            return params, path
    rng = np.random.default_rng((sweep.spec.get("seed", 0), len(sweep.trials)))
    return suggest(sweep.spec, sweep.history(), rng), "suggest"


def read_enqueued(sweep, paths):
    """hparams files -> [(path, params of the sweep's parameters)], missing ones from the resolved
    hparams; warns where the space leaves one out."""
    queue = []
    for path in paths:
        given = read_json(path, "hparams file")
        if not isinstance(given, dict):
            fail(path, "is not a JSON object of hyperparameters", "see hparams/run8.json")
        for key in sorted(given.keys() - sweep.hparams.keys()):
            fail(path, f"unknown key {key!r}", f"{closest(key, sweep.hparams)}remove it")
        values, params = {**sweep.hparams, **given}, {}
        for d in parse_space(sweep.spec):
            params[d.name] = values[d.key]
            if len(d.levels) == 1:
                if identity(params[d.name]) != identity(d.levels[0]):
                    print(f"{path}: {d.key} = {params[d.name]}: the sweep's is {d.levels[0]}")
                params[d.name] = d.levels[0]
            elif not 0 <= d.encode(params[d.name]) <= 1:
                print(
                    f"warning: {path}: {d.name} = {params[d.name]} lies outside the space; the "
                    "search cannot come back to it. Widen its range"
                )
        queue.append((str(path), params))
    return queue


def start(sweep, trial, target, slot, options):
    """Start train.py up to epoch target. The process inherits a lock of the trial, which names its
    slot: should the sweep be killed, its successor waits for the orphan to reach its band instead
    of running a second trainer into the same folder or on the same device."""
    folder = sweep.folder / trial.name
    command = [*options.launcher, *TRAINER, *sweep.extra, *flags(trial.params)]
    if (folder / "hparams.json").exists():
        command += ["--resume"]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # killed before there was anything to keep
    command += [f"--name={sweep.folder.name}/{trial.name}"]
    command += [f"--stop-epoch={target if target < sweep.epochs else 0}"]
    env, devices = dict(os.environ), options.devices
    if devices:
        env["CUDA_VISIBLE_DEVICES"] = devices[slot]
    held = lock(sweep.folder / f"{trial.name}.lock")
    held.truncate(0)
    os.write(held.fileno(), str(slot).encode())
    pipes = {"stdin": subprocess.DEVNULL, "pass_fds": [held.fileno()], "start_new_session": True}
    with held, open(sweep.folder / f"{trial.name}.log", "ab") as log:
        trial.said = log.tell()
        try:
            return subprocess.Popen(command, stdout=log, stderr=log, env=env, **pipes)
        except OSError as error:
            fail("--launcher", f"{command[0]}: {error.strerror}", "give a command that exists here")


def adopt(sweep, trial):
    """{pid: (trial, process, no target, slot)} of a process that ends when the trainer does that
    a killed sweep left behind; empty where there is none."""
    path = sweep.folder / f"{trial.name}.lock"
    if held := lock(path):
        held.close()
        return {}
    print(f"trial {trial.number} still runs from before; waiting for it")
    wait = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX)"
    process = subprocess.Popen([sys.executable, "-c", wait, path])
    return {process.pid: (trial, process, 0, int(path.read_text() or 0))}


def collect(sweep, trial, target, code):
    """Record what a trainer process that ended with this exit code has brought."""
    tail = last_lines(sweep, trial)
    history, rows = read_rows(sweep, trial)
    if history != list(trial.history):
        sweep.write("epochs", trial, history=history, rows=rows)
    if code and disk_is_full(sweep, tail):
        fail(sweep.folder, f"trial {trial.number}: {os.strerror(errno.ENOSPC)}", ROOM)
    if code == 2:
        refused(sweep, trial, tail)
    elif not all(abs(v) < 1e100 for v in trial.history):
        sweep.write("failed", trial, why="non-finite metric", tail=tail)
    elif code in (3, 4):
        why = "out of memory" if code == 3 else "non-finite loss"
        sweep.write("failed", trial, why=why, tail=tail)
    elif code == 0 and len(history) >= target:
        print(f"trial {trial.number} epoch {len(history)}/{sweep.epochs}: {history[-1]:.4f}")
        settle(sweep, trial)
    elif trial.crashes >= RETRIES:  # whatever the code: srun gives 0 when its node dies
        why = f"crashed {RETRIES + 1} times, exit code {code}"
        sweep.write("failed", trial, why=why, tail=tail)
    else:
        sweep.write("crashed", trial, code=code, tail=tail)
        again = f"retry {trial.crashes} of {RETRIES} from epoch {len(history)}"
        print(f"trial {trial.number} crashed (exit code {code}): {again}")
        time.sleep(AGAIN)  # or an outage of a minute would use up all retries
    if trial.state == "failed":
        print(f"trial {trial.number} failed, {trial.why}: {' | '.join(tail[-2:])}")


def last_lines(sweep, trial):
    path = sweep.folder / f"{trial.name}.log"
    text = path.read_bytes()[trial.said :] if path.exists() else b""
    return text[-4000:].decode(errors="replace").strip().splitlines()[-5:]


def disk_is_full(sweep, tail):
    """A full disk is no fault of the trial's: it must not count as a crash."""
    words = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)
    said = any(word in line for word in words for line in tail)
    return said or shutil.disk_usage(sweep.folder).free < 1 << 20


def refused(sweep, trial, tail):
    """What follows from exit code 2. Values that do not go together are a failure of the trial;
    anything else, as missing data, is for the user to mend."""
    what = tail[-1].removeprefix("error: ") if tail else "no message"
    if "another process is training there" in what:  # locks of this host do not show it
        print(f"trial {trial.number} still runs on another host; asking again in {AGAIN} s")
        time.sleep(AGAIN)
    elif why := answer(asked(sweep.extra + flags(trial.params)))[1]:
        sweep.write("failed", trial, why=f"train.py refuses its values: {why}", tail=tail)
    else:
        fail(f"trial {trial.number}: train.py stops", what, "correct that; nothing is lost")


def run_sweep(sweep, options, queue=(), only=None):
    """Run trials until the cap, then revive; options: workers, devices, launcher; only: just
    this trial. Raises ValueError when the sweep cannot go on."""
    busy, failures = {}, 0
    for trial in [only] if only else sweep.trials:
        if trial.state == "pending":
            settle(sweep, trial) if trial.history else None
            busy |= adopt(sweep, trial)
    try:
        while True:
            while len(busy) < options.workers:
                job = next_job(sweep, queue, only, [b[0] for b in busy.values()])
                if job is None:
                    break
                slot = min(set(range(options.workers)) - {b[3] for b in busy.values()})
                process = start(sweep, *job, slot, options)
                busy[process.pid] = job[0], process, job[1], slot
            if not busy:
                return
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            for pid in [p for p, b in busy.items() if b[1].poll() is not None]:
                trial, process, target, _ = busy.pop(pid)
                if target:
                    collect(sweep, trial, target, process.returncode)
                if trial.state != "pending":
                    failures = failures + 1 if trial.state == "failed" else 0
            if failures >= 3:
                what = f"three trials failed in a row, the last one: {trial.why}"
                fail(sweep.folder, what, "see the .log files there, then start the sweep again")
    finally:
        for _, process, *_ in busy.values():
            # train.py saves exactly (srun kills it: the epoch is lost); the trial stays pending
            process.send_signal(signal.SIGTERM)
        for _, process, *_ in busy.values():
            process.wait()


def next_job(sweep, queue, only, running):
    """(trial, epochs to train it to), the trial a new one where it is time; None: nothing now."""
    if only:
        return (only, sweep.epochs) if only.state == "pending" and not running else None
    goal = sweep.spec["metric"].get("target", math.inf * sweep.sign)
    if any(c[-1] >= sweep.sign * goal for c in sweep.curves(sweep.epochs)):
        return None
    job = choose(sweep, running)
    if job is None or job[0]:
        return job
    params, source = propose(sweep, queue)
    if params is None:
        print(f"every combination was tried: {len(sweep.trials)} trials")
        sweep.cap = len(sweep.trials)
        return next_job(sweep, queue, only, running)
    sweep.write("new", number=len(sweep.trials) + 1, params=params, source=source)
    trial = sweep.trials[-1]
    print(f"trial {trial.number}: {' '.join(flags(params))}")
    return trial, job[1] or next_target(sweep, trial)


def replay(curves, rule, epochs):
    """Whole curves [n][epochs], larger being better, and a rule -> epochs trained [n]: what the
    sweep itself decides, one trial after the other, in memory."""
    spec = {"metric": METRIC, "run_cap": len(curves), "early_terminate": rule}
    sweep = Sweep(None, spec, epochs, [])
    with contextlib.redirect_stdout(None):
        while job := choose(sweep, ()):
            trial, target = job
            if trial is None:
                sweep.write("new", number=len(sweep.trials) + 1, params={})
                trial = sweep.trials[-1]
            curve = curves[trial.number - 1][: target or next_target(sweep, trial)]
            sweep.write("epochs", trial, history=list(map(float, curve)), rows=[])
            settle(sweep, trial)
    return [len(t.history) for t in sweep.trials]


def simulate(curves, early_terminate):
    """curves [n, epochs] of whole runs -> epochs [n] the sweep would train each."""
    return np.array(replay(curves, early_terminate, len(curves[0])))


# ---------------------------------------------------------------- report


def expected_maximum(n):
    """Expected largest of n standard normal values: the integral of 1 - Phi^n above 0 less that
    of Phi^n below, by the midpoint rule."""
    below = np.array([normal_cdf(x) for x in np.arange(-8, 8, 0.01) + 0.005]) ** n
    return float((1 - below[800:]).sum() - below[:800].sum()) / 100


def student(v, share):
    """The value that |t| exceeds with probability share, at v degrees of freedom."""
    return bisect(lambda t: 1 - beta_cdf(v / (v + t * t), v / 2, 0.5), 1 - share, 0.0, 1e3)


def mean_interval(values):
    """Mean of values [n] and half its 95 % interval by Student's t."""
    n, half = len(values), math.nan
    if n > 1:
        half = student(n - 1, 0.05) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)), half


def outlier_limit(n):
    """How far, in sample sd from the mean, the largest of n equal normal runs lies with a
    probability of 5 % (Grubbs 1969)."""
    t = student(n - 2, 0.1 / n)
    return (n - 1) / math.sqrt(n) * math.sqrt(t * t / (n - 2 + t * t))


# standard error of a difference over the same pages, as a share of one score's: on 404 pages 0.08
# of 0.27 points
PAIRED = 0.3


class Report:
    """A Sweep's report as blocks: ("#" | "##" | "p", text), ("table", header, rows), ("code",
    language, text), ("figure", caption, svg). Shares are printed in points, 0 to 100."""

    def __init__(self, sweep):
        self.s, self.sign, self.metric = sweep, sweep.sign, sweep.metric
        self.points = 100 if self.metric in ("hmean", "precision", "recall") else 1
        self.cube = Cube(parse_space(sweep.spec))
        self.names = [d.key for d in self.cube.free]
        have = [t for t in sweep.trials if t.history and t.state != "failed"]
        have.sort(key=lambda t: (-sweep.curve(t)[-1], t.number))
        self.finished = [t for t in have if t.state == "finished"]
        self.stopped = [t for t in have if t.state == "stopped"]
        self.failed = [t for t in sweep.trials if t.state == "failed"]
        self.all = sorted(self.finished + self.stopped, key=lambda t: t.number)
        # final and early values are only pooled, and said to be, where there is nothing else
        self.fair = self.finished if len(self.finished) >= 6 or not self.stopped else self.all
        bad = ruined(self.sign * last(self.all)) if self.all else []
        self.ruined = [t for t, b in zip(self.all, bad) if b]
        self.sound = [t for t in self.finished or self.stopped if t not in self.ruined]
        self.posterior = self.fit() if len(self.all) > 2 and self.cube.free else None
        expected = {t: np.nan_to_num(self.at(t)[0], nan=t.history[-1]) for t in self.sound}
        self.first = max(self.sound, key=lambda t: self.sign * expected[t], default=None)
        self.weights = self.importance() if self.posterior else None

    def show(self, x, digits=2):
        digits = digits if self.points == 100 else digits + 2
        return f"{self.points * x:.{digits}f}" if math.isfinite(x) else "-"

    def interval(self, low, high):
        return f"{self.show(low)} to {self.show(high)}" if math.isfinite(low) else "-"

    def fit(self):
        """GP of the metric itself, ruined runs left out: mean and sd [m] in its units at u. What
        the pages' intervals say of a comparison's noise is given: few runs cannot teach it."""
        history = [h for h, t in zip(self.s.history(), self.s.trials) if t in self.all]
        value, variance = observations(history, self.sign)
        noise = [PAIRED * float(np.ptp(pages(t))) / 3.92 for t in self.all]
        variance = variance + np.nan_to_num(noise) ** 2
        keep = ~ruined(value)
        x = self.cube.features(np.array([self.cube.encode(t.params) for t in self.all]))[keep]
        value, variance = value[keep], variance[keep]
        middle, unit = value.mean(), max(value.std(), 1e-9)
        y, own = (value - middle) / unit, variance / unit**2
        model = Posterior(x, y, own, self.cube.category, fit(x, y, own, self.cube.category)[0])

        def at(u):
            mean, sd = model(self.cube.features(np.atleast_2d(u)))
            return self.sign * (middle + unit * mean), unit * sd

        return at

    def at(self, trial):
        """Posterior mean and sd at a trial; NaN without a GP and for a ruined run."""
        if not self.posterior or trial in self.ruined:
            return math.nan, math.nan
        return tuple(float(x[0]) for x in self.posterior(self.cube.encode(trial.params)))

    def project(self, trial):
        """A stopped trial's mean and sd at the last epoch, and its chance to beat the best."""
        curve, whole = self.s.curve(trial), [self.s.curve(t) for t in self.finished]
        mean, sd = project(curve, whole, self.s.epochs)
        return self.sign * mean, sd, chance_to_win(curve, whole, self.s.epochs)

    def blocks(self):
        yield from self.head()
        yield from self.ranking()
        yield from self.early()
        if self.failed:
            yield "##", "Failed"
            rows = [[t.number, t.why, *self.values(t)] for t in self.failed]
            yield "table", ["trial", "why", *self.names], rows
        yield from self.luck()
        yield from self.distribution()
        yield from self.parameters()
        yield from self.decisions()
        if self.first:
            yield from self.best()

    def values(self, trial):
        return [short(trial.params[d.name]) for d in self.cube.free]

    def head(self):
        s, seconds = self.s, [row[0] for t in self.s.trials for row in t.rows]
        spent, pending = sum(len(t.history) for t in s.trials), len(s.trials) - len(self.failed)
        saved = sum(s.epochs - len(t.history) for t in self.stopped)
        yield "#", f"Sweep {s.folder.name}"
        yield p(
            f"{s.spec['method']}, {self.metric}, {'maximised' if self.sign > 0 else 'minimised'};",
            f"{len(s.trials)} trials of {s.epochs} epochs: {len(self.finished)} finished,",
            f"{len(self.stopped)} stopped early (paused), {len(self.failed)} failed,",
            f"{pending - len(self.all)} under way.",
        )
        if seconds and np.isfinite(seconds).all():
            hours = sum(seconds) / 3600
            kept = f"{saved * hours / len(seconds):.2f} hours ({saved} epochs) saved by stopping."
            yield p(f"{hours:.2f} hours used for {spent} epochs, {kept}")
        else:
            yield p(f"{spent} epochs used, {saved} saved by stopping (no times recorded).")
        if self.all:
            yield from figures(self)

    def ranking(self):
        yield "##", "Finished trials"
        if not self.finished:
            yield p("None yet.")
            return
        yield p(
            "Values are those of the last epoch, intervals 95 % over pages, the posterior mean is",
            "the Gaussian process's.",
        )
        rows = [
            [rank, t.number, self.show(t.history[-1]), self.interval(*pages(t))]
            + [self.show(self.at(t)[0]), len(t.history), *self.values(t)]
            for rank, t in enumerate(self.finished, 1)
        ]
        header = ["rank", "trial", self.metric, "interval", "posterior mean", "epochs"]
        yield "table", header + self.names, rows
        ties = ", ".join(str(t.number) for t in self.ties())
        if "," in ties:
            yield p("Near-ties with the first, not to be told apart by this sweep: trials", ties)

    def ties(self):
        """Finished trials whose difference to the first is within the noise of a comparison: 1.96
        standard errors of a paired difference; without intervals the posterior's sd stands in."""
        first = self.finished[0]
        noise = PAIRED * np.ptp(pages(first)) / 2
        if not math.isfinite(noise):
            noise = 1.96 * np.nan_to_num(self.at(first)[1])
        return [t for t in self.finished if abs(t.history[-1] - first.history[-1]) <= noise]

    def early(self):
        if not self.stopped:
            return
        rows = []
        for t in self.stopped:
            mean, sd, chance = self.project(t)
            v = next((v for v in reversed(t.judged) if v["stop"]), None)
            told = f"{v['rule']}: rank {v['rank']} of {v['of']}" if v else "not recorded"
            told += f", bar {self.show(v['bar'])}" if v else ""
            final = f"{self.show(mean)} ({self.interval(mean - 1.96 * sd, mean + 1.96 * sd)})"
            row = [t.number, len(t.history), self.show(t.history[-1]), told, final]
            rows.append([*row, f"{chance:.0%}", *self.values(t)])
        yield "##", "Stopped early"
        yield p(
            "Values at the epoch of the stop: not comparable with final ones. Each run is paused;",
            "`--continue-trial N` takes it to the end.",
        )
        header = ["trial", "epoch", f"{self.metric} there", "stopped by", "projected final (95 %)"]
        yield "table", [*header, "chance to win", *self.names], rows

    def luck(self):
        """What of the best value is owed to picking it."""
        yield "##", "How good is the best?"
        value = self.sign * last(self.fair)
        sound = value[~ruined(value)] if len(value) else value
        n = len(sound)
        if n < 3:
            yield p("Fewer than 3 sound runs: cannot tell.")
            return
        expected, limit = expected_maximum(n), outlier_limit(n)
        found = (sound.max() - sound.mean()) / max(sound.std(ddof=1), 1e-12)
        pooled = ", stopped ones with the value at their stop" * (self.fair is not self.finished)
        yield p(
            f"Best of {n} sound runs{pooled}: of {n} runs of equal worth the best is expected at",
            f"{expected:+.2f} sd from their mean; found at {found:+.2f} sd. That is",
            f"{'no more' if found < limit else 'more'} than picking explains (5 % limit",
            f"{limit:.2f}).",
        )
        if self.posterior:
            first = self.fair[int(np.argmax(value))]
            m, s = self.at(first)
            yield p(
                f"Trial {first.number}: observed {self.show(first.history[-1])}, posterior mean",
                f"{self.show(m)} (95 % {self.interval(m - 1.96 * s, m + 1.96 * s)}): expect the",
                "latter on a repetition.",
            )

    def distribution(self):
        groups = {"finished, last epoch": self.finished, "stopped, at the stop": self.stopped}
        if self.fair is self.all and self.stopped:
            groups["all, each at the last epoch it had"] = self.all
        rows = []
        for name, group in groups.items():
            out = ", ".join(str(t.number) for t in group if t in self.ruined)
            sound = [t for t in group if t not in self.ruined] if out else []
            for trials, of in ((group, ""), (sound, f", without failures (trial {out})")):
                if trials:
                    v = last(trials)
                    sd = f"{self.points * v.std(ddof=1):.3g}" if len(v) > 1 else "-"
                    row = [name + of, len(v), self.show(v.mean()), self.show(np.median(v), 3), sd]
                    rows.append([*row, self.show(v.min()), self.show(v.max())])
        rows.append(["crashed or not finite: no value", len(self.failed), *"-----"])
        yield "##", "Distribution"
        yield "table", ["runs", "n", "mean", "median", "sd (sample)", "min", "max"], rows

    def parameters(self):
        """Score by parameter: groups over every run with a value, rank correlation, importance."""
        group, pooled = self.fair, "runs with a value, each at the last epoch it had (too few "
        pooled = "finished runs." if group is self.finished else pooled + "finished): a hint."
        yield "##", "Score by parameter"
        yield p(f"Over the {len(group)} {pooled}" if len(group) > 2 else "Too few runs.")
        for i, d in enumerate(self.cube.free if len(group) > 2 else ()):
            share = f", importance {self.weights[i]:.0%}" if self.weights else ""
            yield p(f"**{d.key}**{share}. {self.correlation(d)}")
            yield "figure", *parameter_plot(self, i, d)
            rows = []
            for label, trials in self.ranges(d):
                v = last(trials)
                mean, half = mean_interval(v)
                mean = self.show(mean) + f" ± {self.show(half)}" * (len(v) > 1)
                rows.append([label, len(v), mean, self.show(float(np.median(v)))])
            yield "table", [d.key, "n", "mean ± 95 %", "median"], rows

    def ranges(self, d):
        """(label, trials) of a parameter's groups: its values, or three ranges of like size."""
        pairs = [(t.params[d.name], t) for t in self.fair]
        keys = {identity(v): v for v in sorted((v for v, _ in pairs), key=str)}
        if d.levels and len(keys) <= 8 or not all(is_number(v) for v, _ in pairs):
            return [(short(v), [t for x, t in pairs if identity(x) == k]) for k, v in keys.items()]
        order, groups = sorted(v for v, _ in pairs), []
        cuts = [order[0], order[len(order) // 3], order[2 * len(order) // 3], order[-1]]
        for a, b, end in zip(cuts, cuts[1:], (False, False, True)):
            member = [t for x, t in pairs if a <= x < b or end and x == b]
            groups += [(f"{short(a)} to {short(b)}", member)] if member else []
        return groups

    def correlation(self, d):
        x = [t.params[d.name] for t in self.fair]
        if d.category or not all(map(is_number, x)):
            return "Categories have no ranks."
        rho, n = spearman(x, last(self.fair)), len(x)
        chance = 1.96 / math.sqrt(n - 1)
        if abs(rho) > chance:
            return f"Rank correlation with the score {rho:+.2f} (n = {n})"
        why = f"({rho:+.2f}, n = {n}; below {chance:.2f} it is chance)"
        return f"No rank correlation with the score {why}: the means below are no trend."

    def importance(self):
        """Share of each parameter's main effect in the variance of the posterior mean [d]."""
        rng, effect = np.random.default_rng(0), []
        base = rng.random((128, len(self.names)))
        total = float(self.posterior(base)[0].var())
        for i in range(len(self.names)):
            curve = []
            for u in np.linspace(0.02, 0.98, 16):
                points = base.copy()
                points[:, i] = u
                curve.append(self.posterior(points)[0].mean())
            effect.append(float(np.var(curve)))
        total = max(total, sum(effect), 1e-18)
        return [e / total for e in effect]

    def decisions(self):
        rows = [v for t in self.s.trials for v in t.judged]
        if rows:
            yield "##", "Decisions"
        for band in sorted({v["epoch"] for v in rows}):
            stops = [v["stop"] for v in rows if v["epoch"] == band]
            told = f"{len(stops)} judged, {sum(stops)} paused; {trust(self.s, band)}."
            yield p(f"Epoch {band}:", told)

    def best(self):
        kind = "finished" if self.finished else "stopped (none finished)"
        other = f"; the highest value had trial {self.sound[0].number}"
        other *= self.first is not self.sound[0]
        yield "##", "Best configuration"
        yield p(f"Trial {self.first.number}, the best posterior mean of the {kind} trials{other}.")
        rivals = [t for t in self.stopped if self.finished and self.project(t)[2] > 0.2]
        if rivals:
            numbers = ", ".join(str(t.number) for t in rivals)
            yield p(f"Stopped trials that may well be better: {numbers}; --continue-trial tells.")
        params = self.first.params
        yield "code", "", shlex.join(["python", "train.py", *self.s.extra, *flags(params)])
        yield "code", "json", json.dumps({leaf(k): v for k, v in params.items()}, indent=1)


def last(trials):
    return np.array([t.history[-1] for t in trials])


def pages(trial):
    """Interval of the last value over the pages; NaN where none was recorded."""
    return trial.rows[-1][1:3] if trial.rows else (math.nan, math.nan)


# ---------------------------------------------------------------- report as a page


def figures(r):
    """History, learning curves, parallel coordinates and importance of a Report as blocks."""
    sound = [t for t in r.all if t not in r.ruined]
    edge = "Values far below the rest stand at the lower edge." * bool(r.ruined)
    plot = Plot((0.5, len(r.s.trials) + 0.5), span(last(sound or r.all)))
    plot.axes(every(len(r.s.trials)), "trial", r.points)
    values = (r.s.curve(t)[-1] if t.state == "finished" else -math.inf for t in r.all)
    tops = [(t.number, r.sign * v) for t, v in zip(r.all, itertools.accumulate(values, max))]
    tops = [top for top in tops if math.isfinite(top[1])] or [(1, 0)]
    steps = [point for a, b in itertools.pairwise(tops) for point in ((b[0], a[1]), b)]
    plot.line(tops[:1] + steps, "best", "best so far of the finished")
    for t in r.all:
        plot.dot(t.number, t.history[-1], t)
    caption = f"{r.metric} by trial; hollow: stopped early, at the stop; line: the best finished."
    yield "figure", f"{caption} {edge}", plot.svg("optimisation history")
    early = [v for t in sound or r.all for v in t.history[len(t.history) // 4 :]]
    plot = Plot((1, max(r.s.epochs, 2)), span(early, 0.03))
    plot.axes(every(r.s.epochs), "epoch", r.points)
    for t in sorted(r.all, key=lambda t: t is r.first):
        kind = "best" if t is r.first else t.state
        plot.line(list(enumerate(t.history, 1)), kind, f"trial {t.number}")
        if t.state == "stopped":
            plot.dot(len(t.history), t.history[-1], t)
    caption = "Learning curves; a circle marks a stop, the blue one is the best configuration."
    yield "figure", f"{caption} {edge}", plot.svg("learning curves")
    if r.cube.free:
        yield "figure", *parallel(r, sound or r.all)
    if r.weights:
        plot = Plot((0, 1), (0, len(r.weights)), height=56 + 30 * len(r.weights))
        for i, (d, share) in enumerate(zip(r.cube.free, r.weights)):
            y, x = len(r.weights) - i, 0.2 + 0.7 * share
            corners = [(0.2, y - 0.2), (x, y - 0.2), (x, y - 0.8), (0.2, y - 0.8)]
            plot.line(corners, "bar", d.key)
            plot.text(0.19, y - 0.5, d.key, "end", dy=4)
            plot.text(x, y - 0.5, f"{share:.0%}", "start", 6, 4)
        plot.height -= 32  # no x axis
        caption = "Importance: share in the posterior mean's variance."
        yield "figure", caption, plot.svg("importance")


def parallel(r, trials):
    """Parallel coordinates of trials: a line each, the better the darker."""
    n = len(r.names)
    plot, ys = Plot((-0.3, n + 0.3), (0, 1)), span(last(trials), 0)
    axes = [[short(d.value(u)) for u in (0.0, 1.0)] + [d.key] for d in r.cube.free]
    for i, texts in enumerate([*axes, [*map(r.show, ys), r.metric]]):
        plot.line([(i, 0), (i, 1)], "axis")
        for text, y, dy in zip(texts, (0, 1, 0), (16, -4, 34)):
            plot.text(i, y, text, dy=dy)
    for t in sorted(trials, key=lambda t: (t is r.first, r.s.curve(t)[-1])):
        score = (t.history[-1] - ys[0]) / (ys[1] - ys[0] or 1)
        points = [*enumerate(r.cube.encode(t.params)), (n, score)]
        good = 0.15 + 0.85 * (score if r.sign > 0 else 1 - score) ** 2
        kind = "best" if t is r.first else f'{t.state}" style="opacity: {good:.2f}'
        plot.line(points, kind, f"trial {t.number}")
    return "Parallel coordinates; dashed: stopped early, value at the stop.", plot.svg("parameters")


def parameter_plot(r, i, d):
    """(caption, svg): the score against parameter i, with the GP's mean and 95 % band along it
    through the best configuration."""
    u, sound = np.linspace(0, 1, 81), [t for t in r.all if t not in r.ruined]
    ys = span(last(sound or r.all), 0.25)
    plot = Plot((0, 1), ys, 560, 260)
    ticks = [(x, short(d.value(x))) for x in (0, 0.25, 0.5, 0.75, 1)]
    if 0 < len(d.levels) <= 8:
        ticks = [((a + b) / 2, short(v)) for a, b, v in zip(d.edges, d.edges[1:], d.levels)]
    plot.axes(ticks, d.key, r.points)
    if r.posterior and r.first:
        points = np.repeat([r.cube.encode(r.first.params)], len(u), 0)
        points[:, i] = u
        mean, sd = r.posterior(points)
        band = [*zip(u, mean + 1.96 * sd), *zip(u[::-1], (mean - 1.96 * sd)[::-1])]
        plot.line(band, "band", "95 %")
        plot.line(list(zip(u, mean)), "best", "posterior mean")
    for t in r.all:
        plot.dot(d.encode(t.params[d.name]), t.history[-1], t)
    caption = f"{r.metric} against {d.key}; the GP's mean and 95 % band through the best."
    return caption, plot.svg(f"{r.metric} against {d.key}", "narrow")


def write_report(sweep, path=None):
    """Write report.md, and the page where a path is given; returns the former's text."""
    blocks = list(Report(sweep).blocks())
    text = markdown(blocks)
    write_whole(sweep.folder / "report.md", text)
    if path:
        write_whole(Path(path), page(blocks[0][1], blocks))
    return text


def print_replay(sweep):
    """What each stopping rule would have done: a line a rule."""
    epochs, whole = sweep.epochs, [sweep.curve(t) for t in sweep.trials if t.state == "finished"]
    alive = [t for t in sweep.trials if t.history and t.state != "failed"]
    curves = [sweep.curve(t) for t in alive]
    if not curves:
        fail(sweep.folder.name, "has no trial with a value yet", "replay it later")
    for i, curve in enumerate(curves):
        known = len(curve) >= epochs or len(set(curve)) == 1
        end = curve[-1] if known else project(curve, whole, epochs)[0]
        curves[i] = (curve + [end] * epochs)[:epochs]
    made_up = sum(len(t.history) < epochs for t in alive)
    if made_up:
        print(
            f"{made_up} of {len(curves)} curves end early: their missing epochs stand at the "
            "recorded value where there is one, else at the projected final one"
        )
    rules = {"hyperband": {"type": "hyperband", "min_iter": max(1, epochs * 10 // 22), "eta": 2}}
    rules |= {name: {"type": name} for name in ("pause", "brackets")}
    rules |= {sweep.rule["type"]: sweep.rule} if sweep.rule["type"] else {}
    rules["hyperband, strict false"] = {**rules["hyperband"], "strict": False}
    best, total = int(np.argmax([c[-1] for c in curves])), len(curves) * epochs
    for name, rule in rules.items():
        groups, trained = {}, replay(curves, rule, epochs)
        for trial, k in zip(alive, trained):
            groups.setdefault(k, []).append(str(trial.number))
        stops = [f"{', '.join(g)} at epoch {k}" for k, g in sorted(groups.items()) if k < epochs]
        saved = total - sum(trained)
        print(
            f"{name}: stopped {'; '.join(stops) or 'none'}. {saved} of {total} epochs saved "
            f"({saved / total:.0%}), best run {alive[best].number} "
            f"{'kept' if trained[best] == epochs else 'lost'}"
        )


def print_status(sweep):
    path = sweep.folder / "lock"
    running = "a" if path.exists() and lock(path) is None else "no"
    states = ("finished", "stopped", "failed", "pending")
    counts = ", ".join(f"{sum(t.state == k for t in sweep.trials)} {k}" for k in states)
    cap = sweep.spec.get("run_cap", "no cap")
    line = f"{len(sweep.trials)} trials of {cap}, {counts}, {running} sweep is running"
    print(f"{sweep.folder}: {line}")
    for t in sweep.trials:
        value = f"{t.history[-1]:.4f}" if t.history else "-"
        notes = [t.why] * bool(t.why)
        notes += [f"{v['rule']} at {v['epoch']}: {explain(v)}" for v in t.judged[-1:]]
        given = " ".join(f[2:] for f in flags(t.params))
        at = f"{len(t.history):3d}/{sweep.epochs}  {value}"
        print(f"  {t.number:3d} {t.state:8s} epoch {at}  {given}  {'; '.join(notes)}")


# ---------------------------------------------------------------- command line


def whole_number(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def make_parser():
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    p = argparse.ArgumentParser(usage="sweep.py [SWEEP] [flags]", description=__doc__, **form)
    p.error = lambda message: fail("sweep.py", message, "see --help")
    p.add_argument("sweep", nargs="?", metavar="SWEEP", help="sweep JSON (default: a quick sweep)")
    g = p.add_argument_group("run")
    g.add_argument("--name", help="folder under runs/ (default: the file's stem)")
    g.add_argument("--enqueue", nargs="+", default=[], metavar="JSON", help="hparams to try first")
    g.add_argument(
        "--workers",
        type=whole_number,
        metavar="N",
        help="trials side by side, from 1 (default: one a device)",
    )
    g.add_argument(
        "--devices",
        type=lambda s: s.split(","),
        default=[],
        metavar="0,1",
        help="GPUs of this host, one trial on each",
    )
    g.add_argument(
        "--launcher",
        type=shlex.split,
        default=[],
        metavar="COMMAND",
        help='prefix of each trial\'s command, as "srun --gpus=1"',
    )
    g.add_argument(
        "--continue-trial",
        type=whole_number,
        metavar="N",
        help="take trial N of the folder SWEEP to its last epoch",
    )
    g = p.add_argument_group("look; DIR is a sweep's folder, FILE a history (hparams/history_*)")
    g.add_argument("--status", metavar="DIR", help="its trials, one a line")
    g.add_argument(
        "--report",
        metavar="DIR|FILE",
        help="print report.md and write it: ranking, importance, luck, best configuration",
    )
    g.add_argument("--html", metavar="FILE", help="with --report: the same with plots, one page")
    g.add_argument("--replay", metavar="DIR|FILE", help="what each stopping rule would have done")
    g.add_argument("--wandb", action="store_true", help="print SWEEP as W&B's schema has it")
    return p


def own_flags():
    return make_parser()._option_string_actions


def command(options, extra):
    looks = (options.report, options.replay, options.status, options.wandb, options.continue_trial)
    if extra and any(looks):
        fail(extra[0], "is not known here", f"{closest(extra[0], own_flags())}see --help")
    if options.html and not options.report:
        fail("--html", "belongs to --report", "give --report DIR --html FILE")
    if options.devices and (options.workers or 1) > len(options.devices):
        fail("--workers", f"{options.workers} on {len(options.devices)} devices", "one a device")
    options.workers = options.workers or len(options.devices) or 1
    if options.report:
        print(write_report(read_sweep(options.report), options.html), end="")
    elif options.replay:
        print_replay(read_sweep(options.replay))
    elif options.status:
        print_status(read_sweep(options.status))
    elif options.wandb:
        form, dropped = wandb_form(load_spec(options.sweep or QUICK))
        # YAML, which W&B reads, takes 5e-05 for a word and 5.0e-05 for a number
        print(re.sub(r"(?<=[ -])(\d+)e", r"\1.0e", json.dumps(form, indent=1)))
        if dropped:
            print(f"dropped, W&B has no such key: {', '.join(dropped)}", file=sys.stderr)
    elif options.continue_trial:
        continue_trial(options)
    else:
        start_sweep(options, extra)


QUICK = ROOT / "hparams" / "sweep_quick.json"


def start_sweep(options, extra):
    spec = load_spec(options.sweep or QUICK)
    name = options.name or (Path(options.sweep).stem if options.sweep else "quick")
    if Path(name).name != name or name == "..":
        fail("--name", f"{name} is not one folder's name", "give a name without /")
    ours = {d.key for d in parse_space(spec)} | {"stop_epoch", "resume", "name", "seeds"}
    for word, value in zip(extra, [*extra[1:], ""]):
        key = word.split("=")[0].lstrip("-").replace("-", "_")
        several = key == "fold" and "all" in (value, word.split("=")[-1])
        if word.startswith("--") and (key in ours or several or key == "print_hparams"):
            fail(word, "is set by the sweep, or makes no single run", "leave it out")
    say_what_has_no_effect(spec)
    sweep, held = open_sweep(Path("runs") / name, spec, command_flags(spec) + extra)
    with held:
        run_sweep(sweep, options, read_enqueued(sweep, options.enqueue))
        write_report(sweep)
    print(f"{sweep.folder}/report.md")
    finished = Report(sweep).finished
    best = f"{finished[0].history[-1]:.4f} trial {finished[0].number}" if finished else ""
    if finished:
        print("the next line is the best of the trials on the pages that select it; see the report")
    print(f"best {sweep.metric} {best}" if finished else "no trial finished")


def continue_trial(options):
    folder = Path(options.sweep or "")
    if not (folder / "sweep.json").exists() or folder.resolve().parent != Path("runs").resolve():
        fail(folder, "is no sweep's folder in ./runs", "give runs/NAME --continue-trial N")
    sweep, held = open_locked(folder)
    trial = next((t for t in sweep.trials if t.number == options.continue_trial), None)
    if trial is None:
        what = f"has no trial {options.continue_trial}"
        fail(folder, what, f"it has 1 to {len(sweep.trials)}")
    if trial.state == "finished":
        print(f"trial {trial.number} is finished: {trial.history[-1]:.4f}")
        return
    with held:
        sweep.write("continued", trial, whole=True, why="--continue-trial")
        run_sweep(sweep, options, only=trial)
        write_report(sweep)


def main(argv=None):
    sys.stdout.reconfigure(line_buffering=True)  # a log up to the moment of a kill
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        words = sys.argv[1:] if argv is None else argv
        options, extra = make_parser().parse_known_args(words)
        flag = words[words.index(options.sweep) - 1] if options.sweep in words[1:] else ""
        if flag in extra and flag.startswith("--") and "=" not in flag:
            what = f"is no flag of sweep.py, so {options.sweep} would be the sweep file"
            fail(
                flag,
                what,
                f"{closest(flag, own_flags())}write {flag}={options.sweep}, or that file first",
            )
        command(options, extra)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.filename or 'output'}: {error.strerror}; nothing is lost"
        print(f"error: {what}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the trial in flight is saved. Start the sweep again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
