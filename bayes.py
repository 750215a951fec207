"""Which configuration next? A Gaussian process of the runs so far, and the point of the search space
where it expects most improvement.

`suggest` is the way in. It needs numpy only and knows nothing of files, trainers or stopping."""

import itertools
import math

import numpy as np

from files import UsageError
from findings import observations
from space import Cube, entries, leaf, maximised, parse_space, plain

# ---------------------------------------------------------------- Gaussian process and optimiser

# Priors, as (middle, width), on the logs of the length scales (in sides of the unit cube), of the
# signal's variance and of the noise's variance; values are standardised. They are normal, but that
# of the noise is Cauchy's, whose long tails let the values speak for themselves.
SCALE_PRIOR = (-1.0, 0.7)
SIGNAL_PRIOR = (0.7, 1.0)
NOISE_PRIOR = (-5.0, 2.0)
MEAN_VARIANCE = 1.0  # of the unknown constant mean, which is integrated out
JITTER = 1e-8  # keeps covariances positive definite

REACH = 0.15  # how far a failed run repels others, in sides of the cube
SMALL_SPACE = 2000  # up to so many combinations, all are scored
DRAWS = 32  # samples of what the known runs are worth


def matern(squared):
    """Matern-5/2 correlation of squared scaled distances, and -2 times its derivative by them."""
    root = np.sqrt(5 * squared)
    decay = np.exp(-root)
    return (1 + root + root * root / 3) * decay, 5 / 3 * (1 + root) * decay


def squared_gaps(a, b, category):
    """a [n, d], b [m, d] -> squared differences [d, n * m]; 0 or 1 for a category (Hamming)."""
    gap = a.T[:, :, None] - b.T[:, None, :]
    squared = gap.reshape(a.shape[1], -1) ** 2
    return np.where(category[:, None], squared > 0, squared)


def log_likelihood(theta, gaps, y, variance):
    """theta = log (length scales [d], signal, noise variance), gaps [d, n * n], y [n] with variance
    [n] -> log marginal likelihood and its gradient (Rasmussen & Williams 2006, eq. 5.8, 5.9)."""
    d, n = len(gaps), len(y)
    weights = np.exp(-2 * theta[:d])
    signal, noise = np.exp(theta[d:])
    correlation, slope = (m.reshape(n, n) for m in matern(weights @ gaps))

    cov = signal * correlation + MEAN_VARIANCE
    cov[np.diag_indices(n)] += noise + variance + JITTER
    half_logdet = np.log(np.diag(np.linalg.cholesky(cov))).sum()
    inverse = np.linalg.inv(cov)
    alpha = inverse @ y
    value = -0.5 * y @ alpha - half_logdet - 0.5 * n * math.log(2 * math.pi)

    outer = np.outer(alpha, alpha) - inverse  # twice the derivative by the covariance
    by_scales = signal * weights * (gaps @ (outer * slope).ravel())
    by_signal = signal * (outer * correlation).sum()
    by_noise = noise * np.trace(outer)
    return value, 0.5 * np.r_[by_scales, by_signal, by_noise]


def minimise(f, x, evaluations):
    """BFGS (Nocedal & Wright 2006, algorithm 6.1). f(x) -> (value, gradient); returns x, value."""
    value, grad = f(x)
    inverse = np.eye(len(x))  # of the Hessian
    size = min(1.0, 1.5 / np.abs(grad).max())
    for _ in range(evaluations):
        # a shorter step until the value falls enough
        step = -size * (inverse @ grad)
        new_value, new_grad = f(x + step)
        if not new_value <= value + 1e-4 * (grad @ step):
            size *= 0.3
            continue

        bend = new_grad - grad
        gain = value - new_value
        x, value, grad = x + step, new_value, new_grad
        if gain < 1e-4:
            break
        if step @ bend > 1e-12:
            turn = np.eye(len(x)) - np.outer(step, bend) / (step @ bend)
            inverse = turn @ inverse @ turn.T + np.outer(step, step) / (step @ bend)
        size = min(1.0, 1.5 / np.abs(inverse @ grad).max())
    return x, value


def fit_gp(x, y, variance, category, start=None, noise=NOISE_PRIOR):
    """x [n, d], standardised y [n], variance [n] -> theta of the largest posterior density, the
    density's negative log there, and that as a function of theta. The search begins at start, or
    else in the middle of the priors."""
    n, d = x.shape
    gaps = squared_gaps(x, x, category)
    middle, width = np.array([SCALE_PRIOR] * d + [SIGNAL_PRIOR, noise]).T
    middle[:d] += 0.5 * math.log(d)  # distances grow with the root of d

    def loss(theta):
        if np.abs(theta).max() > 25:
            return math.inf, theta
        value, slope = log_likelihood(theta, gaps, y, variance)
        z = (theta - middle) / width
        penalty = 0.5 * z[:-1] @ z[:-1] + math.log1p(z[-1] ** 2)
        z[-1] *= 2 / (1 + z[-1] ** 2)  # now z is the penalty's slope
        return penalty - value, z / width - slope

    evaluations = int(np.clip(1.2e5 / n**2, 12, 40))
    theta, lowest = minimise(loss, middle if start is None else start, evaluations)
    return theta, lowest, loss


class Posterior:
    """Gaussian process given x [n, d] and y [n], averaged over thetas [k, d + 2] by weights [k].

    Called with points [m, d], it gives mean and sd [m] of the noise-free function (Rasmussen &
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
        self.whiten = np.linalg.inv(np.linalg.cholesky(cov))
        self.alpha = np.atleast_2d(y) @ self.whiten.transpose(0, 2, 1) @ self.whiten  # [k, 1, n]

    def covariance(self, a, b):
        correlation, _ = matern(self.scales @ squared_gaps(a, b, self.category))
        return (self.signal * correlation + MEAN_VARIANCE).reshape(-1, len(a), len(b))

    def each(self, z):
        """Means [k, s, m] of each of several y [s, n] at points z [m, d], variance [k, m]."""
        cross = self.covariance(self.x, z)
        left = self.signal + MEAN_VARIANCE - ((self.whiten @ cross) ** 2).sum(1)
        return self.alpha @ cross, np.maximum(left, 1e-14)

    def joint(self, z):
        """Mean [m] and covariance [m, m] at points z [m, d], under the first theta."""
        cross = self.covariance(self.x, z)[0]
        explained = self.whiten[0] @ cross
        return self.alpha[0, 0] @ cross, self.covariance(z, z)[0] - explained.T @ explained

    def __call__(self, z):
        means, left = self.each(z)
        mean = self.weights @ means[:, 0]
        return mean, np.sqrt(self.weights @ (left + (means[:, 0] - mean) ** 2))


def log_ei(mean, sd, best):
    """Log E[max(f - best, 0)] for f ~ N(mean, sd^2), far below best too (Ament et al. 2023)."""
    z = (mean - best) / sd
    cdf = 0.5 * np.frompyfunc(math.erfc, 1, 1)(-math.sqrt(0.5) * z).astype(float)
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    near = np.log(np.maximum(density + z * cdf, 1e-300))

    far = np.minimum(z, -1.0)
    tail = -0.5 * far**2 - 0.5 * math.log(2 * math.pi) - 2 * np.log(-far)
    tail = tail + np.log1p(np.maximum(-3 / far**2, -0.9))
    return np.log(sd) + np.where(z > -20, near, tail)


def log_noisy_ei(posterior, theta, x):
    """Log expected improvement, as a function of z [m, d], over the best of the runs at x [n, d],
    whose values are noisy or pending. It is the mean over DRAWS samples of their worth, each taken
    as exact (Letham et al. 2019, eq. 6). Without noise it is log_ei of the best value."""
    rng = np.random.default_rng(0)
    worth = rng.multivariate_normal(*posterior.joint(x), DRAWS, "ignore", method="eigh")
    best = worth.max(1)[:, None]
    noiseless = np.r_[theta[:-1], -np.inf]
    exact = Posterior(x, worth, 0, posterior.category, noiseless)

    def score(z):
        (means,), (left,) = exact.each(z)
        return np.logaddexp.reduce(log_ei(means, np.sqrt(left), best)) - math.log(DRAWS)

    return score


def most_telling(posterior, z):
    """At which of the points z [m, d] another noisy value is expected to raise their best posterior
    mean most (Frazier et al. 2009); at a tie, where the mean is best."""
    mean, cov = posterior.joint(z)
    moves = cov / np.sqrt(np.maximum(np.diag(cov), 0) + posterior.error + JITTER)
    half = np.random.default_rng(0).standard_normal(32)
    normal = np.outer((1, -1), half).reshape(-1, 1)
    raised = [(mean + normal * move).max(1).mean() for move in moves.T]
    return int(np.argmax(raised + 1e-6 * mean))


def draw_in(below, unit):
    """Distances to the best value [n] -> the same, but logarithmic beyond 6 units, and the slope
    [n] of that. A far tail is drawn in, or a ruined run would flatten the rest."""
    far = below > 6 * unit
    slope = np.where(far, 6 * unit / np.maximum(below, unit), 1.0)
    return np.where(far, 6 * unit * (1 - np.log(slope)), below), slope


def box_cox(below, unit, power):
    """Distances to the best value [n] -> a standardised Box-Cox power of them, larger is better,
    and how fast it changes with them [n]."""
    t = 1 + 2 * below / unit
    z = (1 - t**power) / power
    scale = max(z.std(), 1e-12)
    rate = 2 / (unit * scale) * t ** (power - 1)
    return (z - z.mean()) / scale, rate


def fit_warped(x, y, variance, category):
    """x [n, d], y [n] to maximise, variance [n] -> standardised warped y, its variance and theta,
    of the largest posterior density. Power 0.3 serves noisy values; power 1, which leaves y as it
    is, must be likelier by 2 in the log, or noise would choose."""
    below = y.max() - y
    unit = max(np.median(below), 1e-12)
    below, slope = draw_in(below, unit)

    theta = None
    candidates = []
    for power, handicap in ((0.3, 0), (1.0, 2)):
        z, rate = box_cox(below, unit, power)
        z_variance = variance * (rate * slope) ** 2
        theta, loss, _ = fit_gp(x, z, z_variance, category, theta)
        loss = loss - np.log(rate).sum() + handicap  # the density of y has the Jacobian of the warp
        candidates.append((loss, z, z_variance, theta))
    return min(candidates, key=lambda candidate: candidate[0])[1:]


class Runs:
    """The runs of a history as suggest() needs them; n runs, d parameters that vary."""

    def __init__(self, cube, history, sign):
        self.params = [plain(entry["params"]) for entry in history]
        self.keys = [cube.key(params) for params in self.params]  # equal for equal values
        points = [cube.encode(params) for params in self.params]
        self.u = np.array(points).reshape(len(history), len(cube.free))  # [n, d]
        self.value, self.variance = observations(history, sign)  # [n], larger is better

        state = np.array([entry["state"] for entry in history], str)
        self.known = np.isfinite(self.value)  # [n] has a value
        self.waiting = state == "pending"  # [n]
        self.whole = state == "finished"  # [n]


def suggest(spec, history, rng):
    """The params of the next run, named as in the sweep; None when all were tried.

    spec: a W&B sweep dict.
    history: [{params, value, state: finished | stopped | failed | pending}, ...]. An entry may have
        `sd`, the known error of its value. A stopped one has `history`, a value an epoch, and
        `epochs`, the length of a whole run; finished ones' `history`, if any, extrapolates it.
    rng: numpy Generator.

    No combination comes twice, but with `replicate` in the sweep a run that is worth repeating
    does, with another `seed`. Raises UsageError."""
    cube = Cube(parse_space(spec))
    count = math.prod(len(d.levels) for d in cube.free)  # 0 where a parameter has no levels
    if spec.get("method") == "grid" and not count:
        raise UsageError("method: grid", "a parameter has no steps", "give values or q_*")
    runs = Runs(cube, history, 1 if maximised(spec) else -1)

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
        more = cube.combinations() if count else (rng.random(len(cube.free)) for _ in range(1000))
        params = first_untried(cube, runs, itertools.chain(ranked, draws, more))
    if params is None:
        return None
    names = {leaf(name): name for name, _ in entries(spec["parameters"])}
    return {names.get(key, key): value for key, value in params.items()}


def rank_points(spec, cube, runs, draws, count, rng):
    """Points, the best first, and the posterior that ranked them or None; draws [n, d] are points
    to choose from, count is how many combinations there are, or 0."""
    method = spec.get("method", "bayes")
    if method == "grid":
        return cube.combinations(), None
    if method == "random" or not cube.free:
        return draws, None

    begun = (runs.known | runs.waiting).sum()
    all_begun = len(set(runs.keys)) == count
    if runs.known.sum() < 2 or (begun < max(4, len(cube.free)) and not all_begun):
        return fill_gaps(draws, runs.u), None
    return by_improvement(cube, runs, draws, rng)


def by_score(points, scores):
    return points[np.argsort(-scores, kind="stable")]


def fill_gaps(draws, u):
    """Draws [n, d], those first that have the lowest wrap-around L2 discrepancy with the runs u
    (Hickernell 1998)."""
    gap = np.abs(draws[:, None] - np.clip(u, 0, 1))
    discrepancy = np.prod(1.5 - gap * (1 - gap), axis=2).sum(1)
    return by_score(draws, -discrepancy)


def worth_repeating(cube, runs, ranked, posterior):
    """Params, with another seed, of the finished run that tells most if repeated; None where a new
    point among the best 64 tells more."""
    whole = np.flatnonzero(runs.whole)
    fresh = [point for point in ranked[:64] if cube.key(cube.decode(point)) not in runs.keys]
    points = np.array([*runs.u[whole], *fresh])
    if not len(points):
        return None
    chosen = most_telling(posterior, cube.features(points))
    if chosen >= len(whole):
        return None

    key = runs.keys[whole[chosen]]
    replicas = [params for params, other in zip(runs.params, runs.keys) if other == key]
    seed = 1 + max(params.get("seed", 0) for params in replicas)
    return replicas[0] | {"seed": seed}


def first_untried(cube, runs, points):
    tried = set(runs.keys)
    untried = (params for params in map(cube.decode, points) if cube.key(params) not in tried)
    return next(untried, None)


def by_improvement(cube, runs, draws, rng):
    """Points [m, d] by log expected improvement, the best first, and the posterior, which pending
    runs belong to. Failures repel."""
    known, waiting = runs.known, runs.waiting
    x = cube.features(runs.u)
    z, z_variance, theta = fit_warped(
        x[known], runs.value[known], runs.variance[known], cube.category
    )
    posterior = Posterior(x[known], z, z_variance, cube.category, theta)
    improvement = log_noisy_ei(posterior, theta, x[known | waiting])

    # pending runs are taken to give their mean, so that not all repeat the same one
    if waiting.any():
        z = np.r_[z, posterior(x[waiting])[0]]
        z_variance = np.r_[z_variance, np.zeros(waiting.sum())]
        both = np.r_[x[known], x[waiting]]
        posterior = Posterior(both, z, z_variance, cube.category, theta)

    failed = x[~known & ~waiting]

    def score(points):
        features = cube.features(points)
        if not len(failed):
            return improvement(features)
        return improvement(features) + repulsion(features, x[known], failed, cube.category)

    # climb from the best draws and from the best runs
    points = by_score(draws, score(draws))
    top = by_score(runs.u[known], posterior(x[known])[0])
    starts = np.concatenate([points[:4], np.clip(top[:4], 0, 1)])
    peaks = by_score(*climb(score, starts, rng, cube.stepped))
    return np.concatenate([peaks, points]), posterior


def repulsion(features, sound, failed, category):
    """Twice the log of the share that sound runs [n, d] have in a vote of the runs near features
    [m, d]."""
    ended = np.concatenate([sound, failed])
    gaps = squared_gaps(features, ended, category).sum(0).reshape(len(features), -1)
    votes = np.exp(-0.5 * gaps / REACH**2)
    good = 0.1 + votes[:, : len(sound)].sum(1)
    bad = votes[:, len(sound) :].sum(1)
    return 2 * np.log(good / (good + bad))


def climb(score, points, rng, stepped, rounds=14, tries=24):
    """Local search of score from points [m, d] -> points, scores [m]. Steps are normal, of a radius
    that shrinks when none of them helps, or jumps to other levels of stepped parameters."""
    m, d = points.shape
    shape = (m, tries, d)
    radius = np.full((m, 1, 1), 0.1)
    for _ in range(rounds):
        moved = rng.random(shape) < max(0.5, 2 / d)
        trial = points[:, None] + rng.standard_normal(shape) * radius * moved
        jump = stepped & (rng.random(shape) < 1 / d)
        trial = np.clip(np.where(jump, rng.random(shape), trial), 0, 1)
        trial[:, 0] = points

        scores = score(trial.reshape(-1, d)).reshape(m, tries)
        best = scores.argmax(1)
        points = trial[np.arange(m), best]
        radius[best == 0] *= 0.4
    return points, scores.max(1)
