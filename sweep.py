"""Hyperparameter search that keeps its best run: Gaussian process, Hyperband loop, report.

python sweep.py                                        quick sweep on synthetic receipts, CPU
python sweep.py hparams/sweep_lr_wd.json --data DATA   a sweep; further flags go to train.py
python sweep.py hparams/sweep_lr_wd.json --workers 2 --devices 0,1 --enqueue hparams/run8.json
python sweep.py --status runs/sweep_lr_wd              how far it is; start it again to go on
python sweep.py runs/sweep_lr_wd --continue-trial 8    take a stopped run to its last epoch
python sweep.py --replay hparams/history_v5inrfwe.json   what each stopping rule would have done
python sweep.py --report runs/sweep_lr_wd              ranking, importance, luck, best configuration

The file has W&B's sweep schema in JSON. A trial is runs/<sweep>/trial-003/, made by train.py up to
its next band (--stop-epoch) and from there on by --resume: what is decided depends on whole epochs
only, never on when somebody looked, so a sweep killed at any moment ends like one that was not.
"""

import argparse
import csv
import fcntl
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------- search space

RANGE, MOMENTS = {"min", "max"}, {"mu", "sigma"}
# distribution -> the keys it takes and the law behind it, as in the schema of W&B's sweeps 0.3.0
DISTRIBUTIONS = {
    "constant": ({"value"}, None), "categorical": ({"values"}, None),
    "categorical_w_probabilities": ({"values", "probabilities"}, None),
    "int_uniform": (RANGE, "uniform"), "uniform": (RANGE, "uniform"),
    "log_uniform": (RANGE, "log"), "log_uniform_values": (RANGE, "log"),
    "inv_log_uniform": (RANGE, "log"), "inv_log_uniform_values": (RANGE, "log"),
    "normal": (MOMENTS, "normal"), "log_normal": (MOMENTS, "log normal"),
    "beta": ({"a", "b"}, "beta"), "q_uniform": (RANGE | {"q"}, "uniform"),
    "q_log_uniform": (RANGE | {"q"}, "log"), "q_log_uniform_values": (RANGE | {"q"}, "log"),
    "q_normal": (MOMENTS | {"q"}, "normal"), "q_log_normal": (MOMENTS | {"q"}, "log normal"),
    "q_beta": ({"a", "b", "q"}, "beta")}
MAX_LEVELS = 1000


@dataclass(frozen=True)
class Dimension:
    """One parameter as the unit interval. Where it has levels, level j covers edges[j] to
    edges[j + 1], its share of the probability, and the kernel sees coords[j]; else law's
    quantile at u is the value, rounded to multiples of q."""
    name: str
    law: tuple = None             # (uniform | log | normal | log normal | beta, number, number)
    q: float = 0
    levels: tuple = ()
    edges: np.ndarray = None      # [levels + 1]
    coords: np.ndarray = None     # [levels]
    category: bool = False

    def index(self, u):
        return np.clip(np.searchsorted(self.edges, u, side="right") - 1, 0, len(self.levels) - 1)

    def value(self, u):
        """u in 0..1 -> the parameter's value."""
        if self.levels:
            return self.levels[int(self.index(u))]
        # 12 digits, so that the ends of a log range come back as they were written
        return rounded(float(f"{quantile(self.law, u):.12g}"), self.q)

    def feature(self, u):
        """u [n] -> coordinates the kernel sees [n]: values are rounded before it, not after."""
        if not self.levels:
            return u
        return np.where((u < 0) | (u > 1), u, self.coords[self.index(u)])

    def encode(self, value):
        """A value -> u; outside 0..1 for a value outside the range, -1 for an unknown one."""
        keys = [identity(v) for v in self.levels]
        if identity(value) in keys:
            j = keys.index(identity(value))
            return float(self.edges[j] + self.edges[j + 1]) / 2
        return cumulative(self.law, value) if self.law and is_number(value) else -1.0


def identity(value):
    """A key equal for equal values: 1 and 1.0 are one value, True and 1, 0 and None are two."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number", float(value)
    return type(value).__name__, json.dumps(value, sort_keys=True)


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def rounded(x, q):
    """The multiple of q nearest to x, an integer if q is one."""
    if not q:
        return x
    return round(x / q) * q if isinstance(q, int) else float(f"{round(x / q) * q:.12g}")


def normal_cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def beta_cdf(x, a, b):
    """Regularised incomplete beta function by its continued fraction (DLMF 8.17.22, Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a) \
        + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    f = d
    for m in range(1, 1000):
        for t in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                  -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            d, c = 1 / (1 + t * d), 1 + t / c
            f *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(front) * f


def bisect(cdf, u, low, high):
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle) < u else (low, middle)
    return (low + high) / 2


def cumulative(law, x):
    """Value -> u under a law; a uniform or log law goes on straight beyond its range."""
    kind, a, b = law
    if kind == "beta":
        return beta_cdf(x, a, b)
    if kind.startswith("log"):
        if x <= 0:
            return -1.0
        x = math.log(x)
    return normal_cdf((x - a) / b) if kind.endswith("normal") else (x - a) / (b - a)


def quantile(law, u):
    """u in 0..1 -> value under a law; tails without end are cut at a share of 1e-9."""
    kind, a, b = law
    if kind == "beta":
        return bisect(lambda x: beta_cdf(x, a, b), u, 0.0, 1.0)
    if kind.endswith("normal"):
        x = a + b * bisect(normal_cdf, min(max(u, 1e-9), 1 - 1e-9), -7.0, 7.0)
    else:
        x = a + u * (b - a)
    return math.exp(x) if kind.startswith("log") else x


def parse_law(where, kind, spec):
    """A numeric parameter's (law, first number, second number); raises ValueError."""
    law = DISTRIBUTIONS[kind][1]
    first, second, default = {"beta": ("a", "b", (1, 1))}.get(
        law, ("mu", "sigma", (0, 1)) if "normal" in law else ("min", "max", (None, None)))
    a, b = spec.get(first, default[0]), spec.get(second, default[1])
    for key, x in ((first, a), (second, b)):
        if not is_number(x) or kind == "int_uniform" and type(x) is not int:
            fail(where, f"{key} is {x!r}", f"{kind} needs a number, an integer if int_uniform")
    if first == "min" and a >= b:
        fail(where, f"min {a} is not less than max {b}", "swap them or widen the range")
    if first != "min" and (b <= 0 or first == "a" and a <= 0):
        fail(where, f"{first} {a}, {second} {b}", "a, b and sigma must be above 0")
    if kind.endswith("_values"):
        if a <= 0:
            fail(where, f"min {a} has no logarithm", "give a min above 0")
        a, b = math.log(a), math.log(b)
    if kind == "inv_log_uniform":
        a, b = -b, -a             # 1 / x is log-uniform between e^min and e^max
    if law in ("log", "log normal") and max(abs(a), abs(b)) > 700:
        fail(where, f"{first} {a}, {second} {b} are exponents of e",
             "write values with log_uniform_values")
    return law, float(a), float(b)


def parse_dimension(name, spec):
    """One entry of `parameters` -> Dimension; raises ValueError naming parameter and key."""
    where = f"parameters: {name}"
    if not isinstance(spec, dict):
        fail(where, f"is {json.dumps(spec)}", 'a constant is written {"value": ...}')
    kind = spec.get("distribution") or guess_distribution(where, spec)
    if kind not in DISTRIBUTIONS:
        fail(where, f"unknown distribution {kind!r}", "known: " + ", ".join(DISTRIBUTIONS))
    keys = DISTRIBUTIONS[kind][0]
    for key in set(spec) - keys - {"distribution"}:
        fail(where, f"key {key!r} does not belong to {kind}", f"it takes {sorted(keys)}")
    if "value" in keys or "values" in keys:
        return parse_values(where, name, kind, spec)
    law, q = parse_law(where, kind, spec), spec.get("q", 1) if "q" in keys else 0
    if "q" in keys and not (is_number(q) and q > 0):
        fail(where, f"q is {q!r}", "give a step above 0")
    integer = kind == "int_uniform"
    return with_steps(name, law, 1 if integer else q, integer)


def guess_distribution(where, spec):
    """The distribution W&B assumes where a parameter names none."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if not RANGE <= set(spec):
        fail(where, f"has keys {sorted(spec)}", "give value, values, or min and max")
    return "int_uniform" if all(type(spec[k]) is int for k in RANGE) else "uniform"


def parse_values(where, name, kind, spec):
    values = [spec["value"]] if "value" in spec else spec.get("values")
    if not isinstance(values, list) or not values:
        fail(where, "values is not a list with an entry", "list what to try")
    if len({identity(v) for v in values}) < len(values):
        fail(where, "values has one value twice", "name each once")
    if kind == "categorical_w_probabilities":
        share = spec.get("probabilities")
        if not isinstance(share, list) or len(share) != len(values) \
                or not all(is_number(p) and p >= 0 for p in share) or abs(sum(share) - 1) > 1e-6:
            fail(where, f"probabilities {share} are not {len(values)} shares of 1", "correct them")
    else:
        share = np.full(len(values), 1 / len(values))
    # three numbers or more are points on a scale, anything else is a set of names
    scale = len(values) > 2 and all(is_number(v) for v in values)
    ranks = np.argsort(np.argsort(values)) if scale else np.arange(len(values))
    coords = (ranks + 0.5) / len(values) if scale else ranks.astype(float)
    return Dimension(name, None, 0, tuple(values), np.r_[0, np.cumsum(share)], coords, not scale)


def with_steps(name, law, q, integer):
    """Dimension of a numeric parameter; a level for each multiple of q where they are few."""
    if not q:
        return Dimension(name, law)
    low, high = (quantile(law, u) / q for u in (0.0, 1.0))
    first, last = (round(low), round(high)) if "normal" in law[0] else (
        math.ceil(low - 1e-9), math.floor(high + 1e-9))
    if first > last:
        fail(f"parameters: {name}", f"no multiple of q = {q} in the range", "give a smaller q")
    if last - first >= MAX_LEVELS:
        return Dimension(name, law, q)
    if integer:
        law = ("uniform", first - 0.5, last + 0.5)
    edges = [0.0] + [cumulative(law, (k + 0.5) * q) for k in range(first, last)] + [1.0]
    return Dimension(name, law, q, tuple(rounded(k * q, q) for k in range(first, last + 1)),
                     np.array(edges), (np.array(edges[1:]) + edges[:-1]) / 2)


def parse_space(space):
    """W&B sweep dict -> list of Dimension, nested parameters joined by dots; raises ValueError."""
    parameters = space.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        fail("parameters", "is missing or empty", "name at least one hyperparameter")
    dims = []
    for name, spec in parameters.items():
        if isinstance(spec, dict) and set(spec) == {"parameters"}:
            dims += [replace(d, name=f"{name}.{d.name}") for d in parse_space(spec)]
        else:
            dims.append(parse_dimension(name, spec))
    return dims


def fail(where, what, remedy):
    raise ValueError(f"{where}: {what}; {remedy}")


# ---------------------------------------------------------------- Gaussian process

# normal priors on the logs of length scale (of a unit cube's side in d dimensions), signal
# variance and noise variance of standardised values: mean, standard deviation
SCALE_PRIOR, SIGNAL_PRIOR, NOISE_PRIOR = (-1.0, 0.7), (0.7, 1.0), (-10.0, 3.0)
MEAN_VARIANCE = 1.0               # of the unknown constant mean, integrated out
JITTER = 1e-8
REACH = 0.15                      # of a failure, of the cube's side
SMALL_SPACE = 2000                # combinations that are all scored


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
    grad = [signal * weights * (gaps @ (outer * slope).ravel()),
            [signal * (outer * corr).sum(), noise * np.trace(outer)]]
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

    evaluations = int(np.clip(1.2e5 / n ** 2, 12, 40))
    rough = mean + np.r_[np.full(d, -0.7), 0, 6]
    return min((minimise(loss, start, evaluations) for start in starts or (mean, rough)),
               key=lambda found: found[1])


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
    tail = -0.5 * far ** 2 - 0.5 * math.log(2 * math.pi) - 2 * np.log(-far) \
        + np.log1p(np.maximum(-3 / far ** 2, -0.9))
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
        z = -(t ** power - 1) / power if power else -np.log(t)
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


class Cube:
    """The parameters of a sweep that vary, as a unit cube of points u [n, d]."""

    def __init__(self, dims):
        self.dims, self.free = dims, [d for d in dims if len(d.levels) != 1]
        self.category = np.array([d.category for d in self.free], bool)
        self.stepped = np.array([bool(d.levels) for d in self.free], bool)

    def features(self, u):
        return np.stack([d.feature(u[:, i]) for i, d in enumerate(self.free)], 1)

    def decode(self, u):
        values = {d.name: d.value(float(x)) for d, x in zip(self.free, u)}
        return {d.name: values.get(d.name, d.levels[0] if d.levels else None) for d in self.dims}

    def encode(self, params):
        return [d.encode(params[d.name]) for d in self.free]

    def key(self, params):
        return tuple(identity(params[d.name]) for d in self.free)

    def combinations(self):
        """Every point, if all parameters have levels (of a probability above 0)."""
        middles = [((d.edges[1:] + d.edges[:-1]) / 2)[np.diff(d.edges) > 0] for d in self.free]
        return itertools.product(*middles)


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
        draws = rng.permutation(np.array(list(cube.combinations())).reshape(-1, len(cube.free)))
    else:
        draws = rng.random((512, len(cube.free)))
    u = np.array([cube.encode(h["params"]) for h in history]).reshape(-1, len(cube.free))
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


def maximised(space):
    return space.get("metric", {}).get("goal", "minimize") == "maximize"


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
        return np.exp(-0.5 * gaps / REACH ** 2).sum(1)
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
RULE_KEYS = {
    "hyperband": {"min_iter", "max_iter", "eta", "s", "strict"},
    "brackets": {"max_iter", "eta"}, "pause": {"bands", "eta"}}
GUARDS = {"type", "epochs", "preserve_threshold", "revive"}


def check_rule(rule):
    """Raises ValueError for an early_terminate that is none, naming the key."""
    where = "early_terminate"
    if not isinstance(rule, dict) or rule.get("type") not in RULE_KEYS:
        fail(where, f"{json.dumps(rule)[:80]} has no known type", f"known: {', '.join(RULE_KEYS)}")
    known = RULE_KEYS[rule["type"]] | GUARDS
    for key, x in rule.items():
        if key not in known:
            fail(where, f"unknown key {key!r}", f"{rule['type']} takes {', '.join(sorted(known))}")
        if key not in ("type", "strict", "bands") and not is_number(x):
            fail(where, f"{key} is {x!r}", "give a number")
    if rule.get("eta", 3) <= 1 or min(rule.get(k, 1) for k in ("min_iter", "max_iter")) < 1:
        fail(where, "eta must be above 1, min_iter and max_iter at least 1", "correct it")
    if rule["type"] == "hyperband" and not ("min_iter" in rule or {"max_iter", "s"} <= set(rule)):
        fail(where, "hyperband has no bands", "give min_iter, or max_iter and s")


def eta_of(rule):
    return rule.get("eta", 2 if rule["type"] == "pause" else 3)


def bands_of(rule, epochs):
    """early_terminate -> epochs, ascending, at which runs are judged."""
    eta = eta_of(rule)
    if rule["type"] == "brackets":
        return sorted({r for rungs in brackets(rule.get("max_iter", epochs), eta)
                       for _, r in rungs})
    if rule["type"] == "pause":
        return sorted(rule.get("bands") or {max(1, int(share * epochs)) for share in SHARES})
    if "max_iter" in rule:
        parts = [rule["max_iter"] / eta ** (k + 1) for k in range(int(rule["s"]))]
        return sorted(int(b) for b in parts if b >= 1)
    bands = [float(rule["min_iter"])]
    while bands[-1] * eta <= epochs:
        bands.append(bands[-1] * eta)
    return [int(b) for b in bands]


def ignored_keys(rule):
    """Keys of a W&B hyperband entry that W&B's rule never reads beside the others."""
    if rule["type"] != "hyperband":
        return []
    return [k for k in (("min_iter",) if "max_iter" in rule else ("s",)) if k in rule]


def brackets(max_iter, eta):
    """Hyperband's table (Li et al. 2018, table 1): brackets, the most eager to stop first, each
    its rungs as (runs, epochs each run has had by then)."""
    deepest = int(math.log(max_iter) / math.log(eta) + 1e-9)
    table = []
    for s in range(deepest, -1, -1):
        runs = (deepest + 1) // (s + 1) * eta ** s
        table.append([(max(1, int(runs / eta ** i + 1e-9)),
                       max(1, int(max_iter / eta ** (s - i) + 1e-9))) for i in range(s + 1)])
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
    bar = field[int(len(field) / eta_of(rule)) - (rule["type"] == "brackets" and
                                                  len(field) >= eta_of(rule))]
    value = values[band - 1] if rule.get("strict", True) else max(values)
    why = ""
    if max(values) >= rule.get("preserve_threshold", math.inf):
        why = "preserve_threshold"
    elif rule["type"] == "pause" and sum(len(c) >= epochs for c in others) < 3:
        why = "fewer than 3 finished runs"
    return {"rule": rule["type"], "epoch": band, "value": value, "bar": bar, "of": len(field),
            "rank": 1 + sum(v > value for v in field), "stop": bool(value < bar and not why),
            **({"why": why} if why and value < bar else {})}


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
        return float(np.mean(curve[max(at - 2, 0):at]))

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
    variance *= 1 + 1 / len(gain) + here ** 2 / (x @ x + 2)
    return recent(history, e) + float(gain.mean() + slope * here), math.sqrt(variance)


def chance_to_win(history, curves, epochs):
    """Probability that a stopped run would end above the best finished one (0.5 if none is)."""
    if not curves:
        return 0.5
    mean, sd = project(history, curves, epochs)
    return normal_cdf((mean - max(c[-1] for c in curves)) / sd)


def replay(curves, rule, epochs):
    """Whole curves [n][epochs] and a rule -> verdicts of the stops [n] (None: ran through) and
    epochs trained [n], runs taken one after the other, revived as the rule says."""
    curves = [list(map(float, c)) for c in curves]
    if rule["type"] == "brackets":
        return replay_brackets(curves, rule, epochs)
    trained, stops = [], []
    bands = [b for b in bands_of(rule, epochs) if b < epochs]
    for i, curve in enumerate(curves):
        past = [c[:k] for c, k in zip(curves, trained)]
        verdicts = (judge(curve[:b], past, rule, epochs) for b in bands)
        stops.append(next((v for v in verdicts if v["stop"]), None))
        trained.append(stops[i]["epoch"] if stops[i] else epochs)
    touched = set()
    while True:
        now = [c[:k] for c, k in zip(curves, trained)]
        i = to_revive(now, [k < epochs for k in trained], touched, rule, epochs)
        if i is None:
            return stops, trained
        touched.add(i)
        trained[i] = next((b for b in bands if b > trained[i]), epochs)


def to_revive(curves, stopped, touched, rule, epochs):
    """Index of the stopped run most likely to beat the best finished one, None if none may."""
    limit = rule.get("revive", math.inf if rule["type"] == "pause" else 0)
    whole = [c for c in curves if len(c) >= epochs]
    open_ = [i for i, s in enumerate(stopped) if s and (i in touched or len(touched) < limit)]
    chances = {i: chance_to_win(curves[i], whole, epochs) for i in open_}
    best = max(open_, key=chances.get, default=None)
    return best if best is not None and chances[best] >= CHANCE else None


def replay_brackets(curves, rule, epochs):
    trained, first = [0] * len(curves), 0
    for rungs in itertools.cycle(brackets(rule.get("max_iter", epochs), eta_of(rule))):
        group = list(range(first, min(first + rungs[0][0], len(curves))))
        if not group:
            return [None] * len(curves), trained
        first += len(group)
        for k, (_, rung) in enumerate(rungs):
            rung = min(rung, epochs)
            for i in group:
                trained[i] = rung
            ranked = sorted(group, key=lambda i: -curves[i][rung - 1])
            group = ranked[:max(1, int(len(group) / eta_of(rule)))]


def simulate(curves, early_terminate):
    """curves [n, epochs] of whole runs -> epochs [n] the sweep would train each (stop_bench)."""
    rule = {k: v for k, v in early_terminate.items() if k in GUARDS | RULE_KEYS["pause"] |
            RULE_KEYS["hyperband"]}
    return np.array(replay(curves, rule, len(curves[0]))[1])


# ---------------------------------------------------------------- sweep file

ROOT = Path(__file__).resolve().parent
TRAINER = [sys.executable, str(ROOT / "train.py")]
METRICS = ("loss", "loss_shrink", "loss_thresh", "loss_binary", "precision", "recall", "hmean")
TOP_KEYS = {"method", "metric", "parameters", "early_terminate", "run_cap", "seed", "program",
            "project", "name", "description", "command", "entity", "apiVersion", "kind",
            "controller", "job", "image_uri", "metrics", "scheduler"}
NO_EFFECT = TOP_KEYS - {"method", "metric", "parameters", "early_terminate", "run_cap", "seed"}
OURS = ("seed",)
QUICK = {
    "method": "bayes", "metric": {"name": "hmean", "goal": "maximize"}, "run_cap": 6,
    "early_terminate": {"type": "pause"},
    "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 5e-4, "max": 1e-2},
        "weight_decay": {"distribution": "log_uniform_values", "min": 1e-6, "max": 1e-3},
        "data": {"value": "synth-small"}, "backbone": {"value": "mobilenetv3_small_100"},
        "pretrained": {"value": "none"}, "size": {"value": 256}, "neck": {"value": 64},
        "batch": {"value": 2}, "aug_strength": {"value": 0.3}, "epochs": {"value": 4},
        "T_max": {"value": 4}, "workers": {"value": 0}}}


def read_json(path, what):
    """Parsed JSON of a file under 16 MB; raises ValueError naming file and line."""
    try:
        if os.path.getsize(path) > 1 << 24:
            fail(path, f"is larger than 16 MB, no {what}", "check the path")
        return json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        fail(path, f"cannot be read ({error.strerror})", f"give the path of a {what}")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        fail(path, f"is not JSON ({error})", "W&B's YAML must be exported as JSON")


def check_spec(spec):
    """A sweep dict -> itself, with defaults; raises ValueError naming the first wrong key."""
    if not isinstance(spec, dict):
        fail("sweep", "is not a JSON object", "see hparams/sweep_lr_wd.json")
    for key in spec:
        if key not in TOP_KEYS:
            fail("sweep", f"unknown key {key!r}", f"known: {', '.join(sorted(TOP_KEYS))}")
    if spec.get("method") not in ("bayes", "random", "grid"):
        fail("method", f"is {spec.get('method')!r}", "give bayes, random or grid")
    metric = spec.get("metric", {"name": "hmean", "goal": "maximize"})
    known = {"name", "goal", "target", "impute", "impute_while_running"}
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str) \
            or set(metric) - known:
        fail("metric", f"is {json.dumps(metric)[:80]}", "give name and goal")
    if metric.get("goal", "minimize") not in ("maximize", "minimize"):
        fail("metric: goal", f"is {metric['goal']!r}", "give maximize or minimize")
    for key, low in (("run_cap", 1), ("seed", 0)):
        if key in spec and (type(spec[key]) is not int or spec[key] < low):
            fail(key, f"is {spec[key]!r}", f"give an integer of at least {low}")
    if spec.get("early_terminate") is not None:
        check_rule(spec["early_terminate"])
    names = [d.name.rsplit(".", 1)[-1] for d in parse_space(spec)]
    for name in names:
        if names.count(name) > 1:
            fail("parameters", f"{name} is named twice (the last part counts)", "remove one")
    return {**spec, "metric": metric}


def say_what_has_no_effect(spec):
    keys = sorted(NO_EFFECT & set(spec)) + [f"metric.{k}" for k in spec["metric"] if "imp" in k]
    if keys:
        print(f"without effect here: {', '.join(keys)}")
    ignored = ignored_keys(spec.get("early_terminate") or {"type": ""})
    if ignored:
        print(f"early_terminate: {ignored[0]} is ignored beside "
              f"{'max_iter' if ignored[0] == 'min_iter' else 'min_iter'}, as by W&B")


def flags(params):
    """Params -> train.py flags; of a dotted name the last part counts."""
    def text(x):
        return str(x).lower() if isinstance(x, bool) else x if isinstance(x, str) else json.dumps(x)
    return [f"--{name.rsplit('.', 1)[-1]}={text(x)}" for name, x in params.items()]


def resolve(spec, extra):
    """The middle point's hparams as train.py resolves them, once it has accepted the lowest and
    the highest point too; raises ValueError with its own message."""
    cube = Cube(parse_space(spec))
    for u in (0.0, 1.0, 0.5):
        params = cube.decode(np.full(len(cube.free), u))
        done = subprocess.run(TRAINER + extra + flags(params) + ["--print-hparams"],
                              capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            fail("train.py refuses the sweep's values", lines[-1].removeprefix("error: "),
                 "correct the sweep file or the flag")
    return json.loads(done.stdout)


# ---------------------------------------------------------------- state


@dataclass
class Trial:
    number: int
    params: dict
    state: str = "pending"        # pending | stopped | finished | failed
    history: list = ()            # metric, a value an epoch
    rows: list = ()               # [seconds, low, high] an epoch, the interval being over pages
    judged: tuple = ()            # verdicts
    crashes: int = 0
    whole: bool = False           # go through to the last epoch, do not judge again
    revived: bool = False
    why: str = ""
    source: str = ""


class State:
    """runs/<sweep>/: sweep.json (what is swept) and state.jsonl, a line a trial event, the
    whole state. A line counts once its newline is on the disk; half a line is cut off."""

    def __init__(self, folder):
        self.folder, self.trials = Path(folder), []
        spec = read_json(self.folder / "sweep.json", "sweep folder")
        self.spec, self.extra = spec["sweep"], spec["extra"]
        self.epochs = spec["hparams"]["epochs"]
        self.sign = 1 if maximised(self.spec) else -1
        self.path = self.folder / "state.jsonl"
        text = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(text[:text.rfind(b"\n") + 1].splitlines(), 1):
            try:
                self.apply(json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError):
                fail(f"{self.path}: line {number}", "is damaged", "remove it, or start anew")

    def write(self, event, trial, **more):
        """Append an event, on the disk before it counts; raises ValueError with the file whole."""
        data = {"event": event, "trial": trial.number if trial else 0, **more}
        line = json.dumps(data).encode() + b"\n"
        with open(self.path, "ab+") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            try:
                file.truncate(whole)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                os.truncate(self.path, whole)
                fail(self.path, f"cannot be written ({error.strerror})",
                     "make room and start the sweep again; nothing is lost")
        self.apply(data)

    def apply(self, event):
        kind = event["event"]
        if kind == "new":
            self.trials.append(Trial(event["number"], event["params"], source=event["source"]))
            return
        trial = self.trials[event["trial"] - 1]
        if kind == "epochs":
            trial.history, trial.rows = event["history"], event["rows"]
        elif kind == "judged":
            trial.judged += (event["verdict"],)
            if event["verdict"]["stop"]:
                trial.state = "stopped"
        elif kind == "crashed":
            trial.crashes += 1
        elif kind in ("finished", "stopped"):
            trial.state = kind
        elif kind == "failed":
            trial.state, trial.why = "failed", event["why"]
        elif kind == "continued":
            trial.state, trial.revived = "pending", True
            trial.whole = event["whole"]

    def history(self):
        """The trials as suggest() wants them."""
        return [{"params": t.params, "state": t.state, "history": list(t.history),
                 "epochs": self.epochs, "value": t.history[-1] if t.history else None}
                for t in self.trials]

    def curves(self, without=None):
        return [[self.sign * v for v in t.history] for t in self.trials
                if t is not without and t.history and t.state != "failed"]


def lock(path):
    """An exclusive lock on a file; None when another process holds it."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError:
        file.close()
        return None


def open_sweep(folder, spec, extra):
    """Lock and read the sweep folder, making it when it is not there; raises ValueError when it
    belongs to another space or another process."""
    path, wanted = folder / "sweep.json", {"sweep": spec, "extra": extra}
    hparams = None if path.exists() else resolve(spec, extra)    # refused: no folder is left behind
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder / "lock")
    if held is None:
        fail(folder, "another sweep is running on this folder", "wait for it, or stop it")
    if not path.exists():
        write_whole(path, json.dumps({**wanted, "hparams": hparams}, indent=1))
    found = read_json(path, "sweep folder")
    for key in ("method", "metric", "parameters", "early_terminate", "seed"):
        if found["sweep"].get(key) != spec.get(key):
            fail(folder, f"holds a sweep with other {key}", "give --name NEW, or that sweep's file")
    if found["extra"] != extra:
        fail(folder, f"was started with train.py flags {' '.join(found['extra']) or '(none)'}",
             "give the same, or --name NEW")
    if found["sweep"] != spec:
        write_whole(path, json.dumps({**found, "sweep": spec}, indent=1))
    cut_half_line(folder / "state.jsonl")
    return State(folder), held


def cut_half_line(path):
    """Drop what a kill left behind the last newline; only for the process that holds the lock."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def write_whole(path, text):
    """A file that is complete or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(path, f"cannot be written ({error.strerror})", "make room")


# ---------------------------------------------------------------- trials


def read_rows(state, trial):
    """Metric and [seconds, low, high] of each epoch in the trial's log.csv; raises ValueError
    when the metric is not among its columns."""
    path = state.folder / f"trial-{trial.number:03d}" / "log.csv"
    if not path.exists():
        return [], []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    name = state.spec["metric"]["name"].rsplit("/", 1)[-1]
    if rows and name not in rows[0]:
        fail(f"metric {name}", f"{path} has no such column, only {', '.join(rows[0])}",
             "name one of them in the sweep file")
    number = lambda row, key: float(row.get(key) or "nan")
    return [number(r, name) for r in rows], \
        [[number(r, k) for k in ("seconds", "hmean_lo", "hmean_hi")] for r in rows]


def next_target(state, trial):
    """Epochs after which the trial's process is to end: its next band, or the last epoch."""
    rule = state.spec.get("early_terminate")
    bands = bands_of(rule, state.epochs) if rule and not trial.whole else []
    return min([b for b in bands if len(trial.history) < b < state.epochs], default=state.epochs)


def settle(state, trial):
    """What follows from the epochs a pending trial has: finished, judged, or on to the next."""
    rule, done = state.spec.get("early_terminate"), len(trial.history)
    if done >= state.epochs:
        state.write("finished", trial)
    elif not rule or trial.whole or rule["type"] == "brackets" or done not in bands_of(
            rule, state.epochs) or done in [v["epoch"] for v in trial.judged]:
        return
    elif trial.revived:
        state.write("stopped", trial, why="waits for its chance against the others")
    else:
        values = [state.sign * v for v in trial.history]
        verdict = judge(values, state.curves(trial), rule, state.epochs)
        verdict["value"], verdict["bar"] = (state.sign * verdict[k] for k in ("value", "bar"))
        state.write("judged", trial, verdict=verdict)
        word = "paused" if verdict["stop"] else "goes on"
        print(f"trial {trial.number} {word} at epoch {done}: {verdict['value']:.4f} is rank "
              f"{verdict['rank']} of {verdict['of']}, bar {verdict['bar']:.4f}"
              + (f" (kept: {verdict['why']})" if "why" in verdict else "") + trust(state, done))


def trust(state, band):
    """How well the band's epoch has ranked the finished runs so far."""
    whole = [c for c in state.curves() if len(c) >= state.epochs]
    if len(whole) < 3:
        return ""
    rho = spearman([c[band - 1] for c in whole], [c[-1] for c in whole])
    return f"; rank correlation of epoch {band} with the last {rho:+.2f} (n = {len(whole)})"


def spearman(a, b):
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    def ranks(x):
        x = np.array(x)
        return (x < x[:, None]).sum(1) + (x <= x[:, None]).sum(1)
    a, b = (r - r.mean() for r in (ranks(a), ranks(b)))
    return float(a @ b / math.sqrt((a @ a) * (b @ b))) if a.any() and b.any() else 0.0


def choose(state, busy, cap):
    """(trial, epochs to train it to) to run next; (None, 0) for a new one; None for nothing now."""
    rule = state.spec.get("early_terminate") or {"type": ""}
    idle = [t for t in state.trials if t not in busy]
    if rule["type"] == "brackets":
        return choose_bracket(state, busy, cap, rule)
    for trial in idle:
        if trial.state == "pending":
            return trial, next_target(state, trial)
    if len(state.trials) < cap:
        return None, 0
    alive = [t for t in state.trials if t.state != "failed" and t.history]
    if busy or not alive or not rule["type"]:
        return None
    i = to_revive([[state.sign * v for v in t.history] for t in alive],
                  [t.state == "stopped" for t in alive],
                  {i for i, t in enumerate(alive) if t.revived}, rule, state.epochs)
    if i is None:
        return None
    chance = chance_to_win([state.sign * v for v in alive[i].history], [
        c for c in state.curves() if len(c) >= state.epochs], state.epochs)
    state.write("continued", alive[i], whole=False, why=f"could still win: chance {chance:.3f}")
    print(f"trial {alive[i].number} goes on from epoch {len(alive[i].history)}: chance to beat the "
          f"best {chance:.0%}")
    return alive[i], next_target(state, alive[i])


def choose_bracket(state, busy, cap, rule):
    """The same for type brackets, whose trials are numbered through its brackets in turn."""
    first = 0
    for rungs in itertools.cycle(brackets(state.epochs, eta_of(rule))):
        size = min(rungs[0][0], cap - first)
        if size <= 0:
            return None
        group = state.trials[first:first + size]
        job = in_bracket(state, group, [r for _, r in rungs], busy, len(group) == size, rule)
        if job or len(group) < size:
            return job or (None, rungs[0][1])
        first += size


def in_bracket(state, group, rungs, busy, full, rule):
    """Next (trial, rung) of one bracket; when all its runs have reached a rung the best 1/eta are
    promoted and the others wait, paused, with their checkpoints."""
    for rung in rungs:
        group = [t for t in group if t.state != "failed"]
        late = [t for t in group if len(t.history) < rung]
        ready = [t for t in late if t not in busy]
        if late or not full or not group or rung >= state.epochs:
            return (ready[0], rung) if ready else None
        group.sort(key=lambda t: -state.sign * t.history[rung - 1])
        keep = max(1, int(len(group) / eta_of(rule)))
        for rank, trial in enumerate(group, 1):
            if rung not in [v["epoch"] for v in trial.judged]:
                state.write("judged", trial, verdict={
                    "rule": "brackets", "epoch": rung, "value": trial.history[rung - 1],
                    "rank": rank, "of": len(group), "bar": group[keep - 1].history[rung - 1],
                    "stop": rank > keep})
        group = group[:keep]
    return None


def propose(state, queue):
    """Params and source of the next trial: what is enqueued and untried, else suggest()'s;
    drawn from (seed, trial), so that a restarted sweep proposes what it would have proposed."""
    cube = Cube(parse_space(state.spec))
    tried = {cube.key(t.params) for t in state.trials}
    for path, params in queue:
        if cube.key(params) not in tried:
            return params, path
    rng = np.random.default_rng((state.spec.get("seed", 0), len(state.trials)))
    return suggest(state.spec, state.history(), rng), "suggest"


def read_enqueued(state, paths):
    """hparams files -> [(path, params of the sweep's parameters)], missing ones from the resolved
    hparams; warns where the space leaves one out."""
    resolved = read_json(state.folder / "sweep.json", "sweep folder")["hparams"]
    queue = []
    for path in paths:
        values, params = {**resolved, **read_json(path, "hparams file")}, {}
        for d in parse_space(state.spec):
            params[d.name] = values[d.name.rsplit(".", 1)[-1]]
            if not 0 <= d.encode(params[d.name]) <= 1:
                print(f"warning: {path}: {d.name} = {params[d.name]} lies outside the space; the "
                      "search cannot come back to it. Widen its range")
        queue.append((str(path), params))
    return queue


def start(state, trial, target, slot, options):
    """Start train.py up to epoch target. The process inherits a lock of the trial: should the
    sweep be killed, its successor waits for the orphan to reach its band instead of running a
    second trainer into the same folder."""
    name = f"trial-{trial.number:03d}"
    folder = state.folder / name
    held = lock(state.folder / f"{name}.lock")
    if held is None:
        print(f"trial {trial.number} still runs from before; waiting for it")
        held = open(state.folder / f"{name}.lock", "a")
        fcntl.flock(held, fcntl.LOCK_EX)
    command = options.launcher + TRAINER
    if (folder / "hparams.json").exists():
        command = command + ["--resume"]
    else:
        shutil.rmtree(folder, ignore_errors=True)      # killed before there was anything to keep
        command = command + state.extra + flags(trial.params)
    command += [f"--name={state.folder.name}/{name}",
                f"--stop-epoch={target if target < state.epochs else 0}"]
    env = dict(os.environ)
    if options.devices:
        env["CUDA_VISIBLE_DEVICES"] = options.devices[slot % len(options.devices)]
    with open(state.folder / f"{name}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                   env=env, start_new_session=True, pass_fds=[held.fileno()])
    held.close()
    return process


def collect(state, trial, target, code):
    """Record what a trainer process that ended with this exit code has brought."""
    if code != 2:
        history, rows = read_rows(state, trial)
        if history != list(trial.history):
            state.write("epochs", trial, history=history, rows=rows)
    tail = last_lines(state, trial)
    if code == 2:
        fail(f"trial {trial.number}: train.py refuses it", tail[-1] if tail else "",
             "correct the sweep file; the sweep goes on from here")
    if not all(map(math.isfinite, trial.history)):
        state.write("failed", trial, why="non-finite metric", tail=tail)
    elif code in (3, 4):
        why = "out of memory" if code == 3 else "non-finite loss"
        state.write("failed", trial, why=why, tail=tail)
    elif code == 0 and len(trial.history) >= target:
        print(f"trial {trial.number} epoch {len(trial.history)}/{state.epochs}: "
              f"{trial.history[-1]:.4f}")
        settle(state, trial)
    elif code == 0 and not trial.history:
        fail(f"trial {trial.number}", "ended without a row in log.csv", f"see {state.folder}")
    elif trial.crashes:
        state.write("failed", trial, why=f"crashed twice, exit code {code}", tail=tail)
    else:
        state.write("crashed", trial, code=code, tail=tail)
        print(f"trial {trial.number} crashed (exit code {code}): one more try")
    if trial.state == "failed":
        print(f"trial {trial.number} failed, {trial.why}: {' | '.join(tail[-2:])}")


def last_lines(state, trial):
    path = state.folder / f"trial-{trial.number:03d}.log"
    text = path.read_text(errors="replace") if path.exists() else ""
    return text[-4000:].strip().splitlines()[-5:]


def check_failures(state):
    ended = [t for t in state.trials if t.state != "pending"]
    if len(ended) >= 3 and all(t.state == "failed" for t in ended[-3:]):
        fail(state.folder, f"three trials failed in a row, the last one: {ended[-1].why}",
             f"see {state.folder}/trial-{ended[-1].number:03d}.log, then start with --name NEW")


def run_sweep(state, queue, options, only=None):
    """Run trials until the cap, then revive; options: workers, devices, launcher; only: just
    this trial. Raises ValueError when the sweep cannot go on."""
    cap, busy = state.spec.get("run_cap", math.inf), {}
    for trial in state.trials:
        if trial.state == "pending" and trial.history:
            settle(state, trial)
    try:
        while True:
            while len(busy) < options.workers:
                running = [b[0] for b in busy.values()]
                check_failures(state)
                if only:
                    job = (only, state.epochs) if only.state == "pending" and not running else None
                else:
                    job = None if target_met(state) else choose(state, running, cap)
                if job is None:
                    break
                trial, target = job
                if trial is None:
                    params, source = propose(state, queue)
                    if params is None:
                        print(f"every combination was tried: {len(state.trials)} trials")
                        cap = len(state.trials)
                        continue
                    state.write("new", None, number=len(state.trials) + 1, params=params,
                                source=source)
                    trial = state.trials[-1]
                    target = target or next_target(state, trial)
                    print(f"trial {trial.number}: {' '.join(flags(params))}")
                slot = min(set(range(options.workers)) - {b[3] for b in busy.values()})
                process = start(state, trial, target, slot, options)
                busy[process.pid] = trial, process, target, slot
            if not busy:
                return
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            for pid in [p for p, b in busy.items() if b[1].poll() is not None]:
                trial, process, target, _ = busy.pop(pid)
                collect(state, trial, target, process.returncode)
    finally:
        for trial, process, *_ in busy.values():
            process.send_signal(signal.SIGTERM)        # saves exactly; the trial stays pending
        for trial, process, *_ in busy.values():
            process.wait()


def target_met(state):
    goal = state.spec["metric"].get("target")
    return goal is not None and any(t.state == "finished" and state.sign * t.history[-1]
                                    >= state.sign * goal for t in state.trials)


# ---------------------------------------------------------------- report


@dataclass
class Record:
    """What report and replay need of a sweep, from a folder or from a history file."""
    title: str
    spec: dict
    epochs: int
    trials: list
    out: Path
    extra: list = ()

    @property
    def sign(self):
        return 1 if maximised(self.spec) else -1


def read_record(path):
    """Sweep folder or history JSON ({sweep, epochs, trials: [{number, params, value, state,
    epoch}]}) -> Record; raises ValueError."""
    path = Path(path)
    if path.is_dir() or (path / "sweep.json").exists():
        state = State(path)
        return Record(path.name, state.spec, state.epochs, state.trials, path, state.extra)
    data = read_json(path, "sweep folder or history file")
    try:
        trials = [Trial(r["number"], r["params"], r["state"], [r["value"]] * int(r["epoch"]),
                        [[math.nan] * 3] * int(r["epoch"])) for r in data["trials"]]
        return Record(path.stem, check_spec(data["sweep"]), int(data["epochs"]), trials,
                      Path("runs") / path.stem)
    except (KeyError, TypeError) as error:
        fail(path, f"is no history file (key {error})", "it needs sweep, epochs and trials")


def expected_maximum(n):
    """Expected largest of n standard normal values: the integral of 1 - Phi^n above 0 less that
    of Phi^n below, by the midpoint rule."""
    below = np.array([normal_cdf(x) for x in np.arange(-8, 8, 0.01) + 0.005]) ** n
    return float((1 - below[800:]).sum() - below[:800].sum()) / 100


def mean_interval(values):
    """Mean of values [n] and half its 95 % interval by Student's t."""
    n, v = len(values), len(values) - 1
    if n < 2:
        return float(np.mean(values)), math.nan
    t = bisect(lambda t: 1 - beta_cdf(v / (v + t * t), v / 2, 0.5), 0.95, 0.0, 1e3)
    return float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(n)


def table(header, rows):
    lines = [header, ["---"] * len(header)] + [[str(c) for c in row] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def short(x):
    return f"{x:.4g}" if isinstance(x, float) else str(x)


# standard error of a difference over the same pages, as a share of one score's: on 404 pages 0.08
# of 0.27 points
PAIRED = 0.3


class Report:
    """report.md of a Record. Scores that are shares are printed in points, 0 to 100."""

    def __init__(self, record):
        self.r, self.sign = record, record.sign
        self.metric = record.spec["metric"]["name"].rsplit("/", 1)[-1]
        self.points = 100 if self.metric in ("hmean", "precision", "recall") else 1
        self.cube = Cube(parse_space(record.spec))
        by_value = lambda t: (-self.sign * t.history[-1], t.number)
        have = [t for t in record.trials if t.history and t.state != "failed"]
        self.finished = sorted((t for t in have if t.state == "finished"), key=by_value)
        self.stopped = sorted((t for t in have if t.state == "stopped"), key=by_value)
        self.failed = [t for t in record.trials if t.state == "failed"]
        self.all = sorted(self.finished + self.stopped, key=lambda t: t.number)
        # final and early values are only pooled, and said to be, where there is nothing else
        self.fair = self.finished if len(self.finished) >= 6 or not self.stopped else self.all
        self.whole = [self.goal(t.history) for t in self.finished]
        bad = ruined(self.goal([t.history[-1] for t in self.all])) if self.all else []
        self.ruined = [t for t, b in zip(self.all, bad) if b]
        self.posterior = self.fit() if len(self.all) > 2 and self.cube.free else None

    def goal(self, values):
        return [self.sign * v for v in values]

    def show(self, x, digits=2):
        digits = digits if self.points == 100 else digits + 2
        return "-" if not math.isfinite(x) else f"{self.points * x:.{digits}f}"

    def fit(self):
        """GP of the metric itself, ruined runs left out: mean and sd [m] in its units at u. What
        the pages' intervals say of a comparison's noise is given: few runs cannot teach it."""
        history = [{"params": t.params, "state": t.state, "history": list(t.history),
                    "epochs": self.r.epochs, "value": t.history[-1]} for t in self.all]
        value, variance = observations(history, self.sign)
        noise = [PAIRED * (t.rows[-1][2] - t.rows[-1][1]) / 3.92 if t.rows else 0 for t in self.all]
        variance = variance + np.nan_to_num(noise) ** 2
        keep = ~ruined(value)
        x = self.cube.features(np.array([self.cube.encode(t.params) for t in self.all]))[keep]
        value, variance = value[keep], variance[keep]
        middle, unit = value.mean(), max(value.std(), 1e-9)
        y, own = (value - middle) / unit, variance / unit ** 2
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

    def text(self):
        parts = [self.head(), self.ranking(), self.early(), self.failures(), self.luck(),
                 self.distribution(), self.parameters(), self.stopping(), self.best()]
        return "\n".join(line for part in parts for line in part) + "\n"

    def head(self):
        r, seconds = self.r, [row[0] for t in self.r.trials for row in t.rows]
        spent = sum(len(t.history) for t in r.trials)
        saved = sum(r.epochs - len(t.history) for t in self.stopped)
        lines = [f"# Sweep {r.title}", "", f"{r.spec['method']}, {self.metric}, "
                 f"{'maximised' if self.sign > 0 else 'minimised'}; {len(r.trials)} trials of "
                 f"{r.epochs} epochs: {len(self.finished)} finished, {len(self.stopped)} stopped "
                 f"early (paused), {len(self.failed)} failed, "
                 f"{sum(t.state == 'pending' for t in r.trials)} under way.", ""]
        if seconds and np.isfinite(seconds).all():
            pace = sum(seconds) / len(seconds)
            lines += [f"{sum(seconds) / 3600:.2f} hours used for {spent} epochs, "
                      f"{saved * pace / 3600:.2f} hours ({saved} epochs) saved by stopping.", ""]
        else:
            lines += [f"{spent} epochs used, {saved} saved by stopping (no times recorded).", ""]
        return lines

    def ranking(self):
        if not self.finished:
            return ["## Finished trials", "", "None yet.", ""]
        rows, ties = [], self.ties()
        for rank, t in enumerate(self.finished, 1):
            low, high = t.rows[-1][1:3] if t.rows else (math.nan, math.nan)
            mean = self.at(t)[0]
            rows.append([rank, t.number, self.show(t.history[-1]),
                         f"{self.show(low)} to {self.show(high)}" if math.isfinite(low) else "-",
                         self.show(mean), len(t.history), *self.values(t)])
        names = [d.name.rsplit(".", 1)[-1] for d in self.cube.free]
        lines = ["## Finished trials", "", "Values are those of the last epoch, intervals 95 % "
                 "over pages, the posterior mean is the Gaussian process's.", ""]
        lines += table(["rank", "trial", self.metric, "interval", "posterior mean", "epochs",
                        *names], rows)
        if len(ties) > 1:
            lines += [f"Near-ties with the first, not to be told apart by this sweep: trials "
                      f"{', '.join(str(t.number) for t in ties)}.", ""]
        return lines

    def values(self, trial):
        return [short(trial.params[d.name]) for d in self.cube.free]

    def ties(self):
        """Finished trials whose difference to the first is within the noise of a comparison: 1.96
        standard errors of a paired difference; without intervals the posterior's sd stands in."""
        first = self.finished[0]
        low, high = first.rows[-1][1:3] if first.rows else (math.nan, math.nan)
        if math.isfinite(low):
            noise = PAIRED * (high - low) / 2
        else:
            noise = 1.96 * np.nan_to_num(self.at(first)[1])
        return [t for t in self.finished if abs(t.history[-1] - first.history[-1]) <= noise]

    def early(self):
        if not self.stopped:
            return []
        rows = []
        for t in self.stopped:
            mean, sd = project(self.goal(t.history), self.whole, self.r.epochs)
            mean *= self.sign
            chance = chance_to_win(self.goal(t.history), self.whole, self.r.epochs)
            v = next((v for v in reversed(t.judged) if v["stop"]), None)
            why = f"{v['rule']}: rank {v['rank']} of {v['of']}, bar {self.show(v['bar'])}" if v \
                else "not recorded"
            rows.append([t.number, len(t.history), self.show(t.history[-1]), why,
                         f"{self.show(mean)} ({self.show(mean - 1.96 * sd)} to "
                         f"{self.show(mean + 1.96 * sd)})", f"{chance:.0%}", *self.values(t)])
        names = [d.name.rsplit(".", 1)[-1] for d in self.cube.free]
        return ["## Stopped early", "", "Values at the epoch of the stop: not comparable with "
                "final ones. Each run is paused; `--continue-trial N` takes it to the end.", ""] \
            + table(["trial", "epoch", f"{self.metric} there", "stopped by",
                     "projected final (95 %)", "chance to win", *names], rows)

    def failures(self):
        if not self.failed:
            return []
        return ["## Failed", ""] + table(["trial", "why", *[d.name.rsplit(".", 1)[-1] for d in
                                          self.cube.free]],
                                         [[t.number, t.why, *self.values(t)] for t in self.failed])

    def luck(self):
        """What of the best value is owed to picking it."""
        lines = ["## How good is the best?", ""]
        group = self.fair
        value = np.array(self.goal([t.history[-1] for t in group]))
        sound = value[~ruined(value)] if len(value) else value
        n = len(sound)
        if n < 3:
            return lines + ["Fewer than 3 sound runs: cannot tell.", ""]
        sd, mean = sound.std(ddof=1), sound.mean()
        found = (sound.max() - mean) / max(sd, 1e-12)
        mixed = ", stopped ones with the value at their stop" if group is not self.finished else ""
        lines += [f"Best of {n} sound runs{mixed}: of {n} runs of equal worth the best is expected "
                  f"at {expected_maximum(n):+.2f} sd from their mean; found at {found:+.2f} sd. "
                  + ("That is no more than picking explains." if found < expected_maximum(n) + 1
                     else "That is more than picking explains."), ""]
        first = group[int(np.argmax(value))]
        if self.posterior:
            m, s = self.at(first)
            lines += [f"Trial {first.number}: observed {self.show(first.history[-1])}, posterior "
                      f"mean {self.show(m)} (95 % {self.show(m - 1.96 * s)} to "
                      f"{self.show(m + 1.96 * s)}): expect the latter on a repetition.", ""]
        return lines

    def distribution(self):
        lines, rows = ["## Distribution", ""], []
        for name, group in (("finished, last epoch", self.finished),
                            ("stopped, at the stop", self.stopped),
                            ("all, each at the last epoch it had",
                             self.all if self.fair is self.all and self.stopped else [])):
            value = np.array([t.history[-1] for t in group])
            bad = ruined(self.sign * value) if len(value) else np.zeros(0, bool)
            for label, v in ((name, value), (name + ", without failures (trial " + ", ".join(
                    str(t.number) for t, b in zip(group, bad) if b) + ")", value[~bad])):
                if len(v) and (label == name or bad.any()):
                    sd = v.std(ddof=1) if len(v) > 1 else math.nan
                    rows.append([label, len(v), self.show(v.mean()), self.show(np.median(v), 3),
                                 f"{self.points * sd:.3g}" if len(v) > 1 else "-",
                                 self.show(v.min()),
                                 self.show(v.max())])
        rows.append(["crashed or not finite: no value", len(self.failed), *"-----"])
        return lines + table(["runs", "n", "mean", "median", "sd (sample)", "min", "max"], rows)

    def parameters(self):
        """Score by parameter: groups over every run with a value, rank correlation, importance."""
        lines, weights = ["## Score by parameter", ""], self.importance()
        group, final = self.fair, self.fair is self.finished
        value = [t.history[-1] for t in group]
        lines += [f"Over the {len(group)} " + ("finished runs." if final else "runs with a value, "
                  "each at the last epoch it had (too few finished): a hint, no comparison."), ""]
        if len(group) < 3:
            return lines + ["Too few runs.", ""]
        bad = ruined(self.goal(value))
        for i, d in enumerate(self.cube.free):
            name = d.name.rsplit(".", 1)[-1]
            share = f", importance {weights[i]:.0%}" if weights is not None else ""
            lines += [f"**{name}**{share}. {self.correlation(d, group, value, bad)}", ""]
            rows = []
            for label, member in self.ranges(d, group):
                v = [x for x, m in zip(value, member) if m]
                mean, half = mean_interval(v)
                rows.append([label, len(v), f"{self.show(mean)} ± {self.show(half)}" if len(v) > 1
                             else self.show(mean), self.show(float(np.median(v)))])
            lines += table([name, "n", "mean ± 95 %", "median"], rows)
        return lines

    def ranges(self, d, group):
        """(label, membership) of a parameter's groups: its values, or three ranges of like size."""
        values = [t.params[d.name] for t in group]
        if d.levels and len({identity(v) for v in values}) <= 8 or not all(map(is_number, values)):
            keys = {identity(v): v for v in sorted(values, key=str)}
            return [(short(v), [identity(x) == k for x in values]) for k, v in keys.items()]
        order = sorted(values)
        cuts = [order[0], order[len(order) // 3], order[2 * len(order) // 3], order[-1]]
        groups = [(f"{short(a)} to {short(b)}", [a <= x < b or last and x == b for x in values])
                  for a, b, last in zip(cuts, cuts[1:], (False, False, True))]
        return [g for g in groups if any(g[1])]

    def correlation(self, d, group, value, bad):
        x = [t.params[d.name] for t in group]
        if d.category or not all(map(is_number, x)):
            return "Categories have no ranks."
        rho, n = spearman(x, value), len(x)
        real = abs(rho) > 1.96 / math.sqrt(n - 1)
        return (f"Rank correlation with the score {rho:+.2f} (n = {n})" if real else
                f"No rank correlation with the score ({rho:+.2f}, n = {n}; below "
                f"{1.96 / math.sqrt(n - 1):.2f} it is chance): the means below are no trend.")

    def importance(self):
        """Share of each parameter's main effect in the variance of the posterior mean [d]."""
        if not self.posterior:
            return None
        rng, d = np.random.default_rng(0), len(self.cube.free)
        base, effect = rng.random((128, d)), []
        total = float(self.posterior(base)[0].var())
        for i in range(d):
            curve = []
            for u in np.linspace(0.02, 0.98, 16):
                points = base.copy()
                points[:, i] = u
                curve.append(self.posterior(points)[0].mean())
            effect.append(float(np.var(curve)))
        return [e / max(total, 1e-18) if total > 1e-18 else 0.0 for e in effect]

    def stopping(self):
        rows = [v for t in self.r.trials for v in t.judged]
        lines = ["## Decisions", ""] if rows else []
        for band in sorted({v["epoch"] for v in rows}):
            stops = sum(v["stop"] for v in rows if v["epoch"] == band)
            whole = [c for c in self.whole if len(c) >= self.r.epochs]
            rho = f"{spearman([c[band - 1] for c in whole], [c[-1] for c in whole]):+.2f}" \
                if len(whole) > 2 else "unknown"
            lines += [f"Epoch {band}: {sum(v['epoch'] == band for v in rows)} judged, {stops} "
                      f"paused; rank correlation with the last epoch {rho} (n = {len(whole)})."]
        return lines + [""] if rows else []

    def best(self):
        if not self.all:
            return []
        sound = [t for t in self.finished or self.stopped if t not in self.ruined]
        first = max(sound, key=lambda t: self.sign * np.nan_to_num(
            self.at(t)[0], nan=t.history[-1]))
        kind = "finished" if self.finished else "stopped (none finished)"
        lines = ["## Best configuration", "", f"Trial {first.number}, the best posterior mean of "
                 f"the {kind} trials" + ("." if first is sound[0] else "; the highest value had "
                 f"trial {sound[0].number}."), ""]
        rivals = [t for t in self.stopped if self.finished and chance_to_win(
            self.goal(t.history), self.whole, self.r.epochs) > 0.2]
        if rivals:
            lines += ["Stopped trials that may well be better: " + ", ".join(
                str(t.number) for t in rivals) + "; --continue-trial tells.", ""]
        plain = {k.rsplit(".", 1)[-1]: v for k, v in first.params.items()}
        command = ["python", "train.py", *self.r.extra, *flags(first.params)]
        return lines + ["```", shlex.join(command), "```", "", "```json",
                        json.dumps(plain, indent=1), "```"]


def write_report(record):
    text = Report(record).text()
    record.out.mkdir(parents=True, exist_ok=True)
    write_whole(record.out / "report.md", text)
    return text


def print_replay(record):
    """What each stopping rule would have done: a line a rule."""
    n, epochs, sign = len(record.trials), record.epochs, record.sign
    whole = [[sign * v for v in t.history] for t in record.trials if t.state == "finished"]
    curves, numbers, made_up = [], [], 0
    for t in record.trials:
        if t.history and t.state != "failed":
            curve = [sign * v for v in t.history]
            flat = len(set(curve)) == 1
            end = curve[-1] if flat or len(curve) >= epochs else project(curve, whole, epochs)[0]
            made_up += len(curve) < epochs
            curves.append((curve + [end] * epochs)[:epochs])
            numbers.append(t.number)
    if not curves:
        fail(record.title, "has no trial with a value yet", "replay it later")
    if made_up:
        print(f"{made_up} of {len(curves)} curves end early: their missing epochs stand at the "
              "recorded value where there is one, else at the projected final one")
    best = int(np.argmax([c[-1] for c in curves]))
    own = record.spec.get("early_terminate")
    rules = {"hyperband": {"type": "hyperband", "min_iter": max(1, epochs * 10 // 22), "eta": 2}}
    if own:
        rules[own["type"]] = own
    rules = {**rules, "hyperband, strict false": {**rules["hyperband"], "strict": False},
             "pause": rules.get("pause", {"type": "pause"}), "brackets": {"type": "brackets"}}
    for name, rule in rules.items():
        stops, trained = replay(curves, rule, epochs)
        groups = {}
        for number, k in zip(numbers, trained):
            groups.setdefault(k, []).append(str(number))
        text = "; ".join(f"{', '.join(g)} at epoch {k}" for k, g in sorted(groups.items())
                         if k < epochs)
        saved = len(curves) * epochs - sum(trained)
        print(f"{name}: stopped {text or 'none'}. {saved} of {len(curves) * epochs} epochs saved "
              f"({saved / len(curves) / epochs:.0%}), best run {numbers[best]} "
              f"{'kept' if trained[best] == epochs else 'lost'}")


def print_status(state, running):
    counts = {k: sum(t.state == k for t in state.trials)
              for k in ("finished", "stopped", "failed", "pending")}
    cap = state.spec.get("run_cap", "no cap")
    print(f"{state.folder}: {len(state.trials)} trials of {cap}, "
          + ", ".join(f"{v} {k}" for k, v in counts.items())
          + (", a sweep is running" if running else ", no sweep is running"))
    for t in state.trials:
        value = f"{t.history[-1]:.4f}" if t.history else "-"
        notes = [t.why] if t.why else []
        notes += [f"{v['rule']} at {v['epoch']}: {v['value']:.4f}, rank {v['rank']} of {v['of']}, "
                  f"bar {v['bar']:.4f}" for v in t.judged[-1:]]
        print(f"  {t.number:3d} {t.state:8s} epoch {len(t.history):3d}/{state.epochs}  {value}  "
              f"{' '.join(f[2:] for f in flags(t.params))}  {'; '.join(notes)}")


# ---------------------------------------------------------------- command line


def wandb_form(spec):
    """The sweep without what W&B's schema refuses, and what was dropped."""
    form = {k: v for k, v in spec.items() if k not in OURS and v is not None}
    rule, dropped = form.get("early_terminate"), [k for k in OURS if k in spec]
    if rule and rule["type"] != "hyperband":
        del form["early_terminate"]
        dropped.append(f"early_terminate of type {rule['type']}")
    elif rule:
        form["early_terminate"] = {k: v for k, v in rule.items() if k in RULE_KEYS["hyperband"]
                                   | {"type"}}
        dropped += [f"early_terminate.{k}" for k in rule if k in GUARDS - {"type"}]
    return {**form, "program": "train.py"}, dropped


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sweep", nargs="?", help="sweep JSON; with --continue-trial the sweep's folder")
    p.add_argument("--name", help="folder under runs/ (default: the sweep file's stem)")
    p.add_argument("--workers", type=int, default=1, help="trials side by side")
    p.add_argument("--devices", type=lambda s: s.split(","), default=[],
                   help="GPUs to pin trials to, as 0,1")
    p.add_argument("--launcher", type=shlex.split, default=[],
                   help='prefix of each trial\'s command, as "srun --gpus=1"')
    p.add_argument("--enqueue", nargs="+", default=[], metavar="JSON",
                   help="hparams files to try first")
    p.add_argument("--status", metavar="DIR", help="print the trials of a sweep folder")
    p.add_argument("--continue-trial", type=int, metavar="N", help="take a trial to its last epoch")
    p.add_argument("--replay", metavar="DIR|FILE", help="what each stopping rule would have done")
    p.add_argument("--report", metavar="DIR|FILE", help="print report.md and write it")
    p.add_argument("--wandb", action="store_true", help="print the sweep file in W&B's form")
    return p.parse_known_args(argv)


def load_spec(options):
    """Sweep dict and folder name of the command line."""
    if options.sweep is None:
        return check_spec(QUICK), options.name or "quick"
    spec = check_spec(read_json(options.sweep, "sweep file"))
    return spec, options.name or Path(options.sweep).stem


def command(options, extra):
    if options.workers < 1:
        fail("--workers", f"is {options.workers}", "give at least 1")
    if options.report:
        print(write_report(read_record(options.report)), end="")
    elif options.replay:
        print_replay(read_record(options.replay))
    elif options.status:
        held = lock(Path(options.status) / "lock") if Path(options.status).is_dir() else None
        print_status(State(options.status), held is None)
    elif options.wandb:
        form, dropped = wandb_form(load_spec(options)[0])
        print(json.dumps(form, indent=1))
        if dropped:
            print(f"dropped, W&B has no such key: {', '.join(dropped)}", file=sys.stderr)
    elif options.continue_trial is not None:
        continue_trial(options)
    else:
        sweep(options, extra)


def sweep(options, extra):
    spec, name = load_spec(options)
    spec_keys = {d.name.rsplit(".", 1)[-1] for d in parse_space(spec)}
    for word in extra:
        key = word.lstrip("-").split("=")[0].replace("-", "_")
        if word.startswith("--") and key in spec_keys | {"stop_epoch", "resume"}:
            fail(f"--{key}", "is set by the sweep", "leave it out")
    say_what_has_no_effect(spec)
    state, held = open_sweep(Path("runs") / name, spec, extra)
    queue = read_enqueued(state, options.enqueue)
    run_sweep(state, queue, options)
    print(f"{state.folder}/report.md")
    report = Report(read_record(state.folder))
    write_report(report.r)
    best = report.finished[0] if report.finished else None
    print(f"best {report.metric} {best.history[-1]:.4f} trial {best.number}" if best
          else "no trial finished")
    held.close()


def continue_trial(options):
    folder = Path(options.sweep or "")
    held = lock(folder / "lock") if (folder / "sweep.json").exists() else \
        fail(folder, "is no sweep folder", "python sweep.py runs/NAME --continue-trial N")
    if held is None:
        fail(folder, "another sweep is running on this folder", "wait for it, or stop it")
    state = State(folder)
    trial = next((t for t in state.trials if t.number == options.continue_trial), None)
    if trial is None:
        fail(folder, f"has no trial {options.continue_trial}", f"it has 1 to {len(state.trials)}")
    if trial.state == "finished":
        print(f"trial {trial.number} is finished: {trial.history[-1]:.4f}")
        return
    state.write("continued", trial, whole=True, why="--continue-trial")
    run_sweep(state, [], options, only=trial)
    write_report(read_record(folder))


def main(argv=None):
    sys.stdout.reconfigure(line_buffering=True)        # a log up to the moment of a kill
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        command(*parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the trial in flight is saved. Start the sweep again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
