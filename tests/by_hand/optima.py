"""How often does the fit of the Gaussian process end in a wrong optimum?

python tests/by_hand/optima.py [--seed 0]

Draws problems of 8 to 59 runs: a theta from the priors, points in the unit cube and the process's
noisy values there. The noise is the prior's, or there is much of it: e^-4 to e times the signal.
Prints how many fits end more than .5 and 2 nats above the best of eight starts, and the error of
the posterior mean in standard deviations of the values, after the fit and after the best start.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bayes
from command import Parser

PARAMETERS = {(1, 3): 200, (4, 8): 120}  # fewest and most: how many problems
RUNS = 8, 59
ELSEWHERE = 200  # points where the posterior mean is compared
LEVELS = -8, -5, -3, -1, 0  # log noise of the starts from the middle of the other priors


class Problem(NamedTuple):
    """A drawn problem."""

    known: tuple  # the arguments of fit_gp
    points: np.ndarray  # [ELSEWHERE, d]
    truth: np.ndarray  # [ELSEWHERE] the values there, without noise
    starts: list  # eight thetas [d + 2]


class Outcome(NamedTuple):
    """What became of a fit."""

    above: float  # nats above the best of eight starts
    error: float  # of the posterior mean, root mean square
    best_error: float  # the same after the best start


def draw_theta(rng, d, much):
    """A theta [d + 2] of the priors."""
    scales = bayes.SCALE_PRIOR[0] + bayes.SCALE_PRIOR[1] * rng.standard_normal(d)
    signal = bayes.SIGNAL_PRIOR[0] + bayes.SIGNAL_PRIOR[1] * rng.standard_normal()
    noise = bayes.NOISE_PRIOR[0] + bayes.NOISE_PRIOR[1] * rng.standard_cauchy()
    noise = np.clip(noise, -10, signal + 1)
    if much:
        noise = signal + rng.uniform(-4, 1)
    return np.r_[scales + 0.5 * np.log(d), signal, noise]


def draw_problem(rng, fewest, most, much):
    """A Problem of fewest to most parameters."""
    d = rng.integers(fewest, most, endpoint=True)
    n = rng.integers(*RUNS, endpoint=True)
    theta = draw_theta(rng, d, much)
    x = rng.random((n + ELSEWHERE, d))
    category = np.zeros(d, bool)

    gaps = bayes.squared_gaps(x, x, category)
    correlation, _ = bayes.matern(np.exp(-2 * theta[:d]) @ gaps)
    covariance = np.exp(theta[d]) * correlation.reshape(len(x), len(x))
    root = np.linalg.cholesky(covariance + 1e-8 * np.eye(len(x)))
    truth = root @ rng.standard_normal(len(x))

    values = truth[:n] + np.exp(theta[-1] / 2) * rng.standard_normal(n)
    middle = values.mean()
    unit = values.std()
    known = x[:n], (values - middle) / unit, np.zeros(n), category

    scale = bayes.SCALE_PRIOR[0] + 0.5 * np.log(d)
    starts = [np.r_[np.full(d, scale), bayes.SIGNAL_PRIOR[0], level] for level in LEVELS]
    starts += [draw_theta(rng, d, much) for _ in range(8 - len(LEVELS))]
    return Problem(known, x[n:], (truth[n:] - middle) / unit, starts)


def fit_problem(problem):
    """The Outcome of fit_gp on a Problem."""
    theta, lowest, loss = bayes.fit_gp(*problem.known)
    ends = [bayes.minimise(loss, start, 100) for start in problem.starts]
    best, best_loss = min(ends, key=lambda end: end[1])

    def error(theta):
        mean, _ = bayes.Posterior(*problem.known, theta)(problem.points)
        return np.sqrt(np.mean((mean - problem.truth) ** 2))

    return Outcome(lowest - best_loss, error(theta), error(best))


def fit_drawn(seed, fewest, most, count, much):
    """Outcomes [count, 3] of drawn problems."""
    rng = np.random.default_rng((seed, fewest, most, much))
    return np.array([fit_problem(draw_problem(rng, fewest, most, much)) for _ in range(count)])


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    print("noise  parameters  problems  over .5  over 2   error  of the best   where over .5")
    for much in (False, True):
        for (fewest, most), count in PARAMETERS.items():
            outcomes = fit_drawn(args.seed, fewest, most, count, much)
            wrong = outcomes[outcomes[:, 0] > 0.5]
            line = f"{'much' if much else 'prior':5}  {fewest} to {most}      {count:8}"
            line += f" {len(wrong):8} {(outcomes[:, 0] > 2).sum():7}"
            line += "   {1:.3f}   {2:.3f}".format(*outcomes.mean(0))
            if len(wrong):
                line += "         {1:.3f}   {2:.3f}".format(*wrong.mean(0))
            print(line, flush=True)


if __name__ == "__main__":
    main()
