"""Which configuration next? A Gaussian process is fitted to the runs so far, and the next run goes
where it promises the largest improvement.

`suggest` is all that sweep.py needs to propose a run. Points lie in the unit cube of space.Cube,
one side a parameter. Values are standardised, and larger is better. `fit_gp` and `Posterior` also
serve findings.py."""

import itertools
import math

import numpy as np

from findings import observations
from space import Cube, entries, leaf, maximised, parse_space, plain

# ---------------------------------------------------------------- Gaussian process

# Priors, as (middle, width), on the logs of the length scales (in sides of the unit cube), of the
# signal variance and of the noise variance. The first two are normal. The third is Cauchy, whose
# long tails let the values decide how noisy they are.
SCALE_PRIOR = (-1.0, 0.7)
SIGNAL_PRIOR = (0.7, 1.0)
NOISE_PRIOR = (-5.0, 2.0)
MEAN_VARIANCE = 1.0  # of the unknown constant mean, which is integrated out
JITTER = 1e-8  # keeps covariances positive definite
MUCH_NOISE = -1.0  # log variance from which a second fit begins


def matern(squared):
    """Matern-5/2 correlation of squared scaled distances, and -2 times its derivative by them."""
    root = np.sqrt(5 * squared)
    decay = np.exp(-root)
    correlation = (1 + root + root * root / 3) * decay
    slope = 5 / 3 * (1 + root) * decay
    return correlation, slope


def squared_gaps(a, b, category):
    """Points a [n, d] and b [m, d] -> squared differences [d, n * m].

    Where category [d] is true, the difference is 0 for equal values and 1 for others (Hamming)."""
    gap = a.T[:, :, None] - b.T[:, None, :]  # [d, n, m]
    squared = gap.reshape(len(gap), -1) ** 2
    return np.where(category[:, None], squared > 0, squared)


def log_likelihood(theta, gaps, y, variance):
    """Log marginal likelihood of theta, and its gradient [d + 2] (Rasmussen & Williams 2006, eq.
    5.8, 5.9).

    theta [d + 2]: logs of d length scales, the signal variance and the noise variance.
    gaps [d, n * n]: squared differences of the points.
    y, variance [n]: values and the variances of their known errors."""
    d, n = len(gaps), len(y)
    weights = np.exp(-2 * theta[:d])
    signal, noise = np.exp(theta[d:])
    correlation, slope = matern(weights @ gaps)  # [n * n] each

    cov = signal * correlation.reshape(n, n) + MEAN_VARIANCE
    cov[np.diag_indices(n)] += noise + variance + JITTER
    root = np.linalg.cholesky(cov)
    half_logdet = np.log(np.diag(root)).sum()
    inverse = np.linalg.inv(cov)
    alpha = inverse @ y
    fit = -0.5 * y @ alpha
    value = fit - half_logdet - 0.5 * n * math.log(2 * math.pi)

    # the chain rule, by way of the covariance
    by_cov = (np.outer(alpha, alpha) - inverse).ravel()  # twice the derivative
    by_scales = signal * weights * (gaps @ (by_cov * slope))
    by_signal = signal * (by_cov @ correlation)
    by_noise = noise * (alpha @ alpha - np.trace(inverse))
    return value, 0.5 * np.r_[by_scales, by_signal, by_noise]


def minimise(f, x, evaluations):
    """BFGS (Nocedal & Wright 2006, algorithm 6.1). f(x) -> (value, gradient); returns x, value."""
    value, grad = f(x)
    identity = np.eye(len(x))
    inverse = identity  # of the Hessian
    step = -grad
    for _ in range(evaluations):
        # try a step, a shorter one until the value falls enough
        step *= min(1.0, 1.5 / np.abs(step).max())
        new_value, new_grad = f(x + step)
        if not new_value <= value + 1e-4 * (grad @ step):
            step *= 0.3
            continue

        # take it
        bend = new_grad - grad
        gain = value - new_value
        x = x + step
        value = new_value
        grad = new_grad
        if gain < 1e-4:
            break

        # learn the curvature from it, from the first step also its scale (eq. 6.20)
        curvature = step @ bend
        if curvature > 1e-12:
            if inverse is identity:
                inverse = identity * curvature / (bend @ bend)
            turn = identity - np.outer(step, bend) / curvature
            inverse = turn @ inverse @ turn.T + np.outer(step, step) / curvature
        step = -inverse @ grad
    return x, value


def fit_gp(x, y, variance, category, start=None, noise=NOISE_PRIOR, handicap=0):
    """Maximum a posteriori fit: (theta, its loss, the loss as a function of theta), where the loss
    is the negative log of the posterior density, without constants.

    x [n, d], y [n]: points and their standardised values, with known variance [n].
    category [d]: which parameters have no order.
    start [d + 2]: the theta to search from, by default the middle of the priors. From there a fit
        may end where scales are short and noise is taken for signal. So a second one begins with
        MUCH_NOISE, unless the prior expects that, and the likelier end is taken.
    noise: the prior of the log noise variance.
    handicap: by how much, in the log, the second end must be likelier."""
    gaps = squared_gaps(x, x, category)
    d = len(gaps)
    priors = [SCALE_PRIOR] * d + [SIGNAL_PRIOR, noise]
    middle, width = np.array(priors).T
    middle[:d] += 0.5 * math.log(d)  # distances grow with the root of d

    def loss(theta):
        if np.abs(theta).max() > 25:
            return math.inf, theta
        value, slope = log_likelihood(theta, gaps, y, variance)
        z = (theta - middle) / width
        normal = z[:-1]
        square = z[-1] ** 2
        penalty = 0.5 * normal @ normal + math.log1p(square)
        z[-1] *= 2 / (1 + square)  # now z is the penalty's slope
        return penalty - value, z / width - slope

    evaluations = 12 if len(y) > 100 else 24  # each takes long where there are many runs
    first = middle if start is None else start
    theta, lowest = minimise(loss, first, evaluations)
    if start is None and noise[0] < MUCH_NOISE:
        noisy = np.r_[middle[:-1], MUCH_NOISE]
        end = minimise(loss, noisy, evaluations)
        if end[1] + handicap < lowest:
            theta, lowest = end
    return theta, lowest, loss


class Posterior:
    """Gaussian process given x [n, d] and y [n], averaged over thetas [k, d + 2] with weights [k].

    A call with points [m, d] returns mean and sd [m] of the noise-free function (Rasmussen &
    Williams 2006, algorithm 2.1)."""

    def __init__(self, x, y, variance, category, thetas, weights=(1.0,)):
        self.x = x
        self.category = category
        self.weights = np.array(weights)

        d = x.shape[1]
        thetas = np.atleast_2d(thetas)
        self.scales = np.exp(-2 * thetas[:, :d])
        self.signal, self.noise = np.exp(thetas[:, d:]).T[..., None]  # [k, 1] each
        self.error = self.noise[0] + np.median(variance)  # variance of the next value

        diagonal = np.arange(len(x))
        cov = self.covariance(x, x)  # [k, n, n]
        cov[:, diagonal, diagonal] += self.noise + variance + JITTER
        root = np.linalg.cholesky(cov)
        self.whiten = np.linalg.inv(root)
        y = np.atleast_2d(y)  # [s, n], or one set [1, n]
        self.alpha = y @ self.whiten.transpose(0, 2, 1) @ self.whiten  # [k, s, n]

    def covariance(self, a, b):
        """Points a [n, d] and b [m, d] -> [k, n, m]."""
        gaps = squared_gaps(a, b, self.category)
        correlation, _ = matern(self.scales @ gaps)
        cov = self.signal * correlation + MEAN_VARIANCE
        return cov.reshape(-1, len(a), len(b))

    def each(self, z):
        """Means [k, s, m] at points z [m, d] for each of s sets of values y [s, n], and the
        variance [k, m], which they share."""
        cross = self.covariance(self.x, z)
        explained = ((self.whiten @ cross) ** 2).sum(1)
        left = self.signal + MEAN_VARIANCE - explained
        return self.alpha @ cross, np.maximum(left, 1e-14)

    def joint(self, z):
        """Mean [m] and covariance [m, m] at points z [m, d], under the first theta."""
        cross = self.covariance(self.x, z)[0]
        explained = self.whiten[0] @ cross
        mean = self.alpha[0, 0] @ cross
        return mean, self.covariance(z, z)[0] - explained.T @ explained

    def __call__(self, z):
        means, left = self.each(z)
        mean = self.weights @ means[:, 0]
        variance = self.weights @ (left + (means[:, 0] - mean) ** 2)
        return mean, np.sqrt(variance)


# ---------------------------------------------------------------- warped values

DOUBT = 2  # nats


def draw_in(below, unit):
    """Distances to the best value [n] -> the same, but logarithmic beyond 6 units, and the slope
    [n] of this map. Otherwise one ruined run would flatten the differences of the rest."""
    limit = 6 * unit
    slope = limit / np.maximum(below, limit)
    drawn = np.minimum(below, limit) - limit * np.log(slope)
    return drawn, slope


def box_cox(below, unit, power):
    """Distances to the best value [n] -> their Box-Cox power, standardised and turned round so that
    larger is better, and the slope [n] of this map, without its sign."""
    t = 1 + 2 * below / unit
    z = (1 - t**power) / power
    scale = max(z.std(), 1e-12)
    standardised = (z - z.mean()) / scale
    rate = 2 / (unit * scale) * t ** (power - 1)
    return standardised, rate


def fit_warped(x, y, variance, category):
    """Points x [n, d], values y [n] to maximise, their variance [n] -> standardised warped y, its
    variance, and theta.

    Of two warps the one with the larger posterior density is taken: power 0.3, which serves noisy
    values, or power 1, which leaves y as it is. Power 1 must be likelier by DOUBT, or noise would
    choose. So must a fit with much noise: it explains any few values, and search would stray."""
    below = y.max() - y
    unit = max(np.median(below), 1e-12)
    below, slope = draw_in(below, unit)

    theta = None
    lowest = math.inf
    for power, handicap in ((0.3, 0), (1.0, DOUBT)):
        z, rate = box_cox(below, unit, power)
        z_variance = variance * (rate * slope) ** 2
        theta, loss, _ = fit_gp(x, z, z_variance, category, theta, handicap=DOUBT)
        loss += handicap - np.log(rate).sum()  # the density of y has the Jacobian of the warp
        if loss < lowest:
            lowest = loss
            best = z, z_variance, theta
    return best


# ---------------------------------------------------------------- scores of points

DRAWS = 32  # samples of what the known runs are worth
REACH = 0.15  # how far a failed run repels others, in sides of the cube
ROUNDS = 14  # of a local search
TRIES = 24  # steps that a point of it compares in a round


def log_ei(mean, sd, best):
    """Log E[max(f - best, 0)] for f ~ N(mean, sd^2), stable far below best too (Ament et al.
    2023)."""
    z = (mean - best) / sd
    erfc = np.frompyfunc(math.erfc, 1, 1)
    cdf = 0.5 * erfc(-math.sqrt(0.5) * z).astype(float)
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    near = np.log(np.maximum(density + z * cdf, 1e-300))

    # far below best both terms cancel, so take the asymptotic series
    far = np.minimum(z, -1.0)
    log_density = -0.5 * far**2 - 0.5 * math.log(2 * math.pi)
    correction = np.log1p(np.maximum(-3 / far**2, -0.9))
    tail = log_density - 2 * np.log(-far) + correction
    return np.log(sd) + np.where(z > -20, near, tail)


def log_noisy_ei(posterior, theta, x):
    """Log expected improvement over the best of the runs at x [n, d], as a function of points z
    [m, d]. The runs' values are noisy or pending, so DRAWS samples of their true worth are taken,
    and the improvement over each is averaged (Letham et al. 2019, eq. 6). Without noise this is
    log_ei over the best value."""
    rng = np.random.default_rng(0)
    mean, cov = posterior.joint(x)
    worth = rng.multivariate_normal(mean, cov, DRAWS, "ignore", method="eigh")  # [DRAWS, n]
    best = worth.max(1)[:, None]
    noiseless = np.r_[theta[:-1], -np.inf]
    exact = Posterior(x, worth, 0, posterior.category, noiseless)

    def score(z):
        (means,), (left,) = exact.each(z)
        improvements = log_ei(means, np.sqrt(left), best)
        return np.logaddexp.reduce(improvements) - math.log(DRAWS)

    return score


def repulsion(features, sound, failed, category):
    """Points features [m, d] -> 2 log (share of sound runs) [m], in a vote of the runs around each
    point. sound [n, d] and failed [f, d] are where the runs were; those near a point weigh most."""
    ended = np.r_[sound, failed]
    gaps = squared_gaps(features, ended, category).sum(0)
    gaps = gaps.reshape(len(features), -1)  # [m, n + f]
    votes = np.exp(-0.5 * gaps / REACH**2)
    good = 0.1 + votes[:, : len(sound)].sum(1)
    bad = votes[:, len(sound) :].sum(1)
    return 2 * np.log(good / (good + bad))


def most_telling(posterior, z):
    """Index of the point among z [m, d] where one more noisy value is expected to raise the largest
    posterior mean most (knowledge gradient, Frazier et al. 2009). Ties go to the larger mean."""
    mean, cov = posterior.joint(z)
    variance = np.maximum(np.diag(cov), 0) + posterior.error + JITTER
    moves = cov / np.sqrt(variance)  # column j: how the means move per sd of a value at point j

    # the largest mean after such a value, over 32 normal draws and their mirror images
    half = np.random.default_rng(0).standard_normal((32, 1))
    normal = np.r_[half, -half]
    raised = [(mean + normal * move).max(1).mean() for move in moves.T]
    return int(np.argmax(raised + 1e-6 * mean))


def by_score(points, scores):
    """Points [n, d], those of the highest scores [n] first."""
    return points[np.argsort(-scores, kind="stable")]


def fill_gaps(draws, u):
    """Draws [n, d], first those that cover the cube most evenly together with the runs u [r, d], by
    wrap-around L2 discrepancy (Hickernell 1998)."""
    gap = np.abs(draws[:, None] - np.clip(u, 0, 1))  # [n, r, d]
    kernel = np.prod(1.5 - gap * (1 - gap), axis=2)
    discrepancy = kernel.sum(1)
    return by_score(draws, -discrepancy)


def climb(score, points, rng, stepped):
    """Local search for a high score from points [m, d] -> the points reached, their scores [m].

    A step is normal, with a radius that shrinks in a round where no step helped. Where stepped [d]
    is true, it may also be a jump to another level."""
    m, d = points.shape
    shape = (m, TRIES, d)
    radius = np.full((m, 1, 1), 0.1)
    for _ in range(ROUNDS):
        # steps along some of the sides, some jumps, and staying
        moved = rng.random(shape) < max(0.5, 2 / d)
        step = rng.standard_normal(shape) * radius * moved
        trial = points[:, None] + step
        jump = stepped & (rng.random(shape) < 1 / d)
        trial = np.where(jump, rng.random(shape), trial)
        trial = np.clip(trial, 0, 1)
        trial[:, 0] = points

        scores = score(trial.reshape(-1, d)).reshape(m, TRIES)
        best = scores.argmax(1)
        points = trial[np.arange(m), best]
        radius[best == 0] *= 0.4
    return points, scores.max(1)


# ---------------------------------------------------------------- the next run

SMALL_SPACE = 2000  # up to so many combinations, all are scored


class Runs:
    """The runs of a history as suggest() needs them; n runs, d parameters that vary."""

    def __init__(self, cube, history, sign):
        self.params = [plain(entry["params"]) for entry in history]
        self.keys = [cube.key(params) for params in self.params]  # equal for equal values
        shape = len(history), len(cube.free)
        points = [cube.encode(params) for params in self.params]
        self.u = np.array(points).reshape(shape)  # [n, d]
        self.value, self.variance = observations(history, sign)  # [n], larger is better

        state = np.array([entry["state"] for entry in history], str)
        self.known = np.isfinite(self.value)  # [n] has a value
        self.waiting = state == "pending"  # [n]
        self.whole = state == "finished"  # [n]


def suggest(spec, history, rng):
    """The params of the next run, under the names that they have in the sweep, or None once all
    combinations were tried.

    spec: a W&B sweep dict.
    history: [{params, value, state: finished | stopped | failed | pending}, ...]. An entry may have
        `sd`, the known error of its value. A stopped one has `history`, a value an epoch, and
        `epochs`, the length of a whole run; the `history` of finished ones, if given, tells where
        the stopped ones would have ended.
    rng: numpy Generator.

    No combination comes twice, except with `replicate` in the sweep: then a run that is worth
    repeating comes again with another `seed`. Raises UsageError."""
    cube = Cube(parse_space(spec))
    count = math.prod(len(d.levels) for d in cube.free)  # 0 where a parameter has no levels
    sign = 1 if maximised(spec) else -1
    runs = Runs(cube, history, sign)

    # all points of a small space, else some of it
    if 0 < count <= SMALL_SPACE:
        draws = rng.permutation(list(cube.combinations()))
    else:
        draws = rng.random((512, len(cube.free)))
    ranked, posterior = rank_points(spec, cube, runs, draws, count, rng)

    params = None
    if posterior and spec.get("replicate"):
        params = worth_repeating(cube, runs, ranked, posterior)
    if params is None:
        if count:
            more = cube.combinations()
        else:
            more = rng.random((1000, len(cube.free)))
        params = first_untried(cube, runs, itertools.chain(ranked, draws, more))
    if params is None:
        return None

    names = {leaf(name): name for name, _ in entries(spec["parameters"])}
    return {names.get(key, key): value for key, value in params.items()}


def rank_points(spec, cube, runs, draws, count, rng):
    """Points, the best first, and the posterior that ranked them, or None where chance, the grid or
    the gaps between few runs did.

    draws [n, d]: points to choose from; count: how many combinations there are, 0 for endless."""
    method = spec.get("method", "bayes")
    if method == "grid":
        return cube.combinations(), None
    if method == "random" or not cube.free:
        return draws, None

    begun = (runs.known | runs.waiting).sum()
    all_begun = len(set(runs.keys)) == count
    few = begun < max(4, len(cube.free)) and not all_begun
    if runs.known.sum() < 2 or few:
        return fill_gaps(draws, runs.u), None
    return by_improvement(cube, runs, draws, rng)


def by_improvement(cube, runs, draws, rng):
    """Points [m, d] by log expected improvement, less near failed runs, the best first; and the
    posterior, in which pending runs count as if they had ended as expected."""
    known = runs.known
    waiting = runs.waiting
    x = cube.features(runs.u)
    failed = x[~known & ~waiting]

    z, z_variance, theta = fit_warped(
        x[known],
        runs.value[known],
        runs.variance[known],
        cube.category,
    )
    posterior = Posterior(x[known], z, z_variance, cube.category, theta)
    improvement = log_noisy_ei(posterior, theta, x[known | waiting])

    # pending runs are taken to give their mean, so that not all repeat the same one
    if waiting.any():
        z = np.r_[z, posterior(x[waiting])[0]]
        z_variance = np.r_[z_variance, np.zeros(waiting.sum())]
        both = np.r_[x[known], x[waiting]]
        posterior = Posterior(both, z, z_variance, cube.category, theta)

    def score(points):
        features = cube.features(points)
        gain = improvement(features)
        if not len(failed):
            return gain
        return gain + repulsion(features, x[known], failed, cube.category)

    # climb from the best draws and from the best runs
    points = by_score(draws, score(draws))
    top = by_score(runs.u[known], posterior(x[known])[0])
    starts = np.r_[points[:4], np.clip(top[:4], 0, 1)]
    peaks, heights = climb(score, starts, rng, cube.stepped)
    ranked = np.r_[by_score(peaks, heights), points]
    return ranked, posterior


def worth_repeating(cube, runs, ranked, posterior):
    """Params, with another seed, of the finished run whose repetition tells most; None where one of
    the best 64 new points tells more."""
    whole = np.flatnonzero(runs.whole)
    fresh = [point for point in ranked[:64] if cube.key(cube.decode(point)) not in runs.keys]
    points = np.array([*runs.u[whole], *fresh])
    if not len(points):
        return None
    chosen = most_telling(posterior, cube.features(points))
    if chosen >= len(whole):
        return None

    # a seed above those of all its replicas
    key = runs.keys[whole[chosen]]
    replicas = [params for params, other in zip(runs.params, runs.keys) if other == key]
    seed = 1 + max(params.get("seed", 0) for params in replicas)
    return replicas[0] | {"seed": seed}


def first_untried(cube, runs, points):
    """Params of the first point whose combination no run has; None if there is none."""
    tried = set(runs.keys)
    for params in map(cube.decode, points):
        if cube.key(params) not in tried:
            return params
    return None
