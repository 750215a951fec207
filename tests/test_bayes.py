"""bayes.py: the Gaussian process against closed forms, then what is suggested."""

import itertools
import json
import math

import numpy as np
import optima
import pytest
import torch
from conftest import ROOT, log_range
from scipy import stats
from sklearn import gaussian_process
from sklearn.gaussian_process import kernels

import bayes
import findings
import space
import sweep


def cube_space(d, goal="minimize", **more):
    parameters = {f"x{i}": {"min": 0.0, "max": 1.0} for i in range(d)}
    metric = {"name": "y", "goal": goal}
    return {"method": "bayes", "metric": metric, "parameters": parameters, **more}


def entry(params, value=None, state="finished", **more):
    return {"params": params, "value": value, "state": state, **more}


# ---------------------------------------------------------------- Gaussian process


def gp_data(n=12, d=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, d))
    x[:, -1] = rng.integers(0, 3, n)
    theta = np.log([0.4, 0.9, 1.3, 1.7, 0.01])
    return rng, x, rng.standard_normal(n), rng.random(n) * 0.1, np.array([0, 0, 1], bool), theta


def direct_covariance(a, b, theta):
    """Matern-5/2 of page 85 of Rasmussen & Williams, point by point, plus the constant mean's."""
    k = np.empty((len(a), len(b)))
    for i, j in itertools.product(range(len(a)), range(len(b))):
        parts = [a[i, 0] - b[j, 0], a[i, 1] - b[j, 1], float(a[i, 2] != b[j, 2])]
        r = math.sqrt(sum((p / math.exp(t)) ** 2 for p, t in zip(parts, theta)))
        s = math.sqrt(5) * r
        k[i, j] = math.exp(theta[3]) * (1 + s + s * s / 3) * math.exp(-s) + bayes.MEAN_VARIANCE
    return k


def test_likelihood_and_gradient():
    _, x, y, own, category, theta = gp_data()
    cov = direct_covariance(x, x, theta) + np.diag(own + math.exp(theta[4]) + bayes.JITTER)
    expected = -0.5 * y @ np.linalg.solve(cov, y) - 0.5 * np.linalg.slogdet(2 * math.pi * cov)[1]
    gaps = bayes.squared_gaps(x, x, category)
    value, grad = bayes.log_likelihood(theta, gaps, y, own)
    assert abs(value - expected) < 1e-10
    for i in range(5):
        step = 1e-6 * np.eye(5)[i]
        up, down = (bayes.log_likelihood(theta + s, gaps, y, own)[0] for s in (step, -step))
        assert abs((up - down) / 2e-6 - grad[i]) < 1e-6


def test_posterior():
    rng, x, y, own, category, theta = gp_data()
    z = np.c_[rng.random((7, 2)), rng.integers(0, 3, 7)]
    cov = direct_covariance(x, x, theta) + np.diag(own + math.exp(theta[4]) + bayes.JITTER)
    cross = direct_covariance(x, z, theta)
    mean = cross.T @ np.linalg.solve(cov, y)
    var = np.diag(direct_covariance(z, z, theta) - cross.T @ np.linalg.solve(cov, cross))
    got = bayes.Posterior(x, y, own, category, theta)(z)
    assert np.abs(got[0] - mean).max() < 1e-10 and np.abs(got[1] ** 2 - var).max() < 1e-10

    thetas, weights = np.array([theta, theta + 0.5]), np.array([0.3, 0.7])
    each = np.array([bayes.Posterior(x, y, own, category, t)(z) for t in thetas])
    mean, square = weights @ each[:, 0], weights @ (each[:, 0] ** 2 + each[:, 1] ** 2)
    got = bayes.Posterior(x, y, own, category, thetas, weights)(z)
    assert np.abs(got[0] - mean).max() < 1e-10
    assert np.abs(got[1] ** 2 - (square - mean**2)).max() < 1e-10


def test_likelihood_as_scipy_and_its_gradient_as_torch_have_them():
    _, x, y, own, category, theta = gp_data()
    gaps = bayes.squared_gaps(x, x, category)
    value, slope = bayes.log_likelihood(theta, gaps, y, own)
    cov = direct_covariance(x, x, theta) + np.diag(own + math.exp(theta[4]) + bayes.JITTER)
    expected = stats.multivariate_normal(np.zeros(len(y)), cov).logpdf(y)
    assert value == pytest.approx(expected, abs=1e-9)

    t = torch.tensor(theta, requires_grad=True)
    squared = 5 * torch.exp(-2 * t[:3]) @ torch.tensor(gaps)
    root = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    matern = (1 + root + root**2 / 3) * torch.exp(-root)
    cov = t[3].exp() * matern.reshape(len(y), len(y)) + bayes.MEAN_VARIANCE
    cov = cov + torch.diag(t[4].exp() + torch.tensor(own) + bayes.JITTER)
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(y), dtype=cov.dtype), cov)
    normal.log_prob(torch.tensor(y)).backward()
    np.testing.assert_allclose(slope, t.grad, rtol=1e-8, atol=1e-8)


def test_posterior_as_scikit_learn_has_it():
    rng, x, y, own, _, theta = gp_data()
    matern = kernels.Matern(np.exp(theta[:3]), nu=2.5)
    kernel = kernels.ConstantKernel(math.exp(theta[3])) * matern
    kernel += kernels.ConstantKernel(bayes.MEAN_VARIANCE)
    error = own + math.exp(theta[4]) + bayes.JITTER
    peer = gaussian_process.GaussianProcessRegressor(kernel, alpha=error, optimizer=None).fit(x, y)

    ordered = np.zeros(3, bool)
    gaps = bayes.squared_gaps(x, x, ordered)
    value, _ = bayes.log_likelihood(theta, gaps, y, own)
    assert value == pytest.approx(peer.log_marginal_likelihood_value_, abs=1e-9)
    z = rng.random((50, 3))
    posterior = bayes.Posterior(x, y, own, ordered, theta)
    np.testing.assert_allclose(posterior(z), peer.predict(z, return_std=True), atol=1e-9)
    mean, cov = posterior.joint(z)
    np.testing.assert_allclose((mean, *cov), np.vstack(peer.predict(z, return_cov=True)), atol=1e-9)


def test_log_ei_as_scipy_has_it():
    """sd (density + z cdf), in logs: near the best, and far below it by the next terms of Mills'
    ratio."""
    z = np.linspace(-6, 8, 200)
    sd = np.geomspace(0.01, 10, 200)
    exact = np.log(sd * (stats.norm.pdf(z) + z * stats.norm.cdf(z)))
    np.testing.assert_allclose(bayes.log_ei(3 + z * sd, sd, 3.0), exact, atol=1e-6)
    z = np.linspace(-18, -37, 200)
    log_mills = stats.norm.logcdf(z) - stats.norm.logpdf(z)
    exact = stats.norm.logpdf(z) + np.log1p(z * np.exp(log_mills))
    np.testing.assert_allclose(bayes.log_ei(z, np.ones(200), 0.0), exact, atol=0.01)


def test_log_ei_against_integration():
    for mean, sd in itertools.product((-3.0, -1.0, 0.0, 2.0), (0.1, 0.7, 2.0)):
        f = np.linspace(0, max(mean, 0) + 12 * sd, 400001)[:-1]
        f = f + (f[1] - f[0]) / 2
        density = np.exp(-0.5 * ((f - mean) / sd) ** 2) / sd / math.sqrt(2 * math.pi)
        exact = float((f * density).sum() * (f[1] - f[0]))
        got = float(bayes.log_ei(np.array([mean]), np.array([sd]), 0.0)[0])
        if exact > 1e-100:
            assert abs(got - math.log(exact)) < 1e-5
    far = bayes.log_ei(-np.array([19.9, 20.1, 40.0, 1e3]), np.ones(4), 0.0)
    assert np.isfinite(far).all() and (np.diff(far) < 0).all()
    assert abs(far[0] - far[1] - (20.1**2 - 19.9**2) / 2) < 0.05


def test_minimise_finds_rosenbrocks_minimum():
    def f(x):
        bend, left = x[1] - x[0] ** 2, 1 - x[0]
        return 100 * bend**2 + left**2, np.array([-400 * x[0] * bend - 2 * left, 200 * bend])

    x, value = bayes.minimise(f, np.array([-1.2, 1.0]), 200)
    assert value < 1e-3 and np.abs(x - 1).max() < 0.1


def test_fit_finds_the_largest_posterior_density():
    _, x, y, own, category, start = gp_data()
    theta, lowest, loss = bayes.fit_gp(x, y, own, category)
    gaps = bayes.squared_gaps(x, x, category)

    def density(t):  # normal priors, Cauchy's of the noise, without their constants
        scales = (t[:3] - bayes.SCALE_PRIOR[0] - math.log(3) / 2) / bayes.SCALE_PRIOR[1]
        signal = (t[3] - bayes.SIGNAL_PRIOR[0]) / bayes.SIGNAL_PRIOR[1]
        noise = (t[4] - bayes.NOISE_PRIOR[0]) / bayes.NOISE_PRIOR[1]
        priors = math.exp(-(scales @ scales + signal**2) / 2) / (1 + noise**2)
        return bayes.log_likelihood(t, gaps, y, own)[0] + math.log(priors)

    assert abs(lowest + density(theta)) < 1e-9
    for at in (start, theta):
        value, grad = loss(at)
        assert abs(value + density(at)) < 1e-9
        for step, slope in zip(1e-5 * np.eye(5), grad):
            assert abs((density(at - step) - density(at + step)) / 2e-5 - slope) < 1e-5
            for side in (-1e4, 1e4):
                assert density(theta + side * step) < density(theta) + 1e-3


@pytest.mark.parametrize("fewest, most", optima.PARAMETERS)
def test_fits_of_noisy_values_end_in_the_best_of_eight_starts(fewest, most):
    """From the middle of the priors alone, 1 in 10 ends where noise is taken for signal."""
    outcomes = optima.fit_drawn(2, fewest, most, 30, much=True)
    assert (outcomes[:, 0] <= 0.5).all(), outcomes[:, 0].max()


def test_a_fit_begins_twice_unless_it_is_given_its_start_or_expects_noise(monkeypatch):
    _, x, y, own, category, theta = gp_data()
    begun = []
    minimise = bayes.minimise
    monkeypatch.setattr(bayes, "minimise", lambda f, x, n: begun.append(x) or minimise(f, x, n))
    bayes.fit_gp(x, y, own, category, theta)
    assert len(begun) == 1 and (begun[0] == theta).all()
    bayes.fit_gp(x, y, own, category)
    assert [start[-1] for start in begun[1:]] == [bayes.NOISE_PRIOR[0], bayes.MUCH_NOISE]
    bayes.fit_gp(x, y, own, category, noise=findings.SEED_PRIOR)
    assert [start[-1] for start in begun[3:]] == [findings.SEED_PRIOR[0]]


def test_the_noisy_end_must_be_likelier_by_the_handicap(monkeypatch):
    _, x, y, own, category, theta = gp_data()
    ends = [(theta, 7.0), (theta + 1, 5.5)]
    in_turn = itertools.cycle(ends)
    monkeypatch.setattr(bayes, "minimise", lambda *_: next(in_turn))
    for handicap, first in ((0, 1), (1, 1), (1.6, 0), (9, 0)):
        found, lowest, _ = bayes.fit_gp(x, y, own, category, handicap=handicap)
        assert (found == ends[first][0]).all() and lowest == ends[first][1]


def test_warped_values_keep_their_order_and_errors():
    rng = np.random.default_rng(5)
    x = rng.random((101, 2))
    y = np.sort(-(rng.exponential(1.0, 101) ** 2))
    own = np.full(101, 1e-4)
    z, error, _ = bayes.fit_warped(x, y, own, np.zeros(2, bool))
    assert (np.diff(z) > 0).all() and abs(z.mean()) < 1e-9 and abs(z.std() - 1) < 1e-9
    for i in (2, 20, 40, 70, 95):  # by differences: one run of a hundred hardly moves the unit
        step = (y[i + 1] - y[i]) * 0.01
        moved = bayes.fit_warped(x, y + step * (np.arange(101) == i), own, np.zeros(2, bool))[0]
        others = np.delete(moved - z, i)
        slope = (moved[i] - z[i] - others[i - 1 : i + 1].mean()) / step
        assert abs(math.sqrt(error[i] / own[i]) / slope - 1) < 0.05


def noisy_model(noise, n=6, d=2, seed=0):
    """Points, values, theta and the posterior of a few noisy values."""
    rng = np.random.default_rng(seed)
    x, y = rng.random((n, d)), rng.standard_normal(n)
    theta = np.r_[np.full(d, -0.7), 0.3, noise]
    return x, y, theta, bayes.Posterior(x, y, 0, np.zeros(d, bool), theta)


def test_noisy_ei_against_monte_carlo(monkeypatch):
    monkeypatch.setattr(bayes, "DRAWS", 4000)
    x, _, theta, posterior = noisy_model(math.log(0.3))
    z, rng = np.random.default_rng(1).random((5, 2)), np.random.default_rng(2)
    for known in (x, np.concatenate([x, [[0.5, 0.5]]])):  # the last one is pending
        mean, cov = posterior.joint(np.concatenate([known, z]))
        drawn = rng.multivariate_normal(mean, cov, 200_000, method="eigh")
        n = len(known)
        gain = np.maximum(drawn[:, n:] - drawn[:, :n].max(1, keepdims=True), 0).mean(0)
        got = np.exp(bayes.log_noisy_ei(posterior, theta, known)(z))
        np.testing.assert_allclose(got, gain, rtol=0.1, atol=2e-3)


def test_noisy_ei_without_noise_is_the_exact_one():
    x, y, theta, posterior = noisy_model(-30.0)
    z = np.random.default_rng(1).random((40, 2))
    got = bayes.log_noisy_ei(posterior, theta, x)(z)
    exact = bayes.log_ei(*posterior(z), y.max())
    likely = exact > -15
    assert likely.sum() > 20
    np.testing.assert_allclose(got[likely], exact[likely], atol=0.01)


def test_replicas_pull_the_posterior_as_equal_observations_do():
    """Three values at one point are their mean, known with a third of the variance."""
    x, y, theta, _ = noisy_model(math.log(0.3))
    category, z = np.zeros(2, bool), np.random.default_rng(1).random((7, 2))
    thrice, values = np.concatenate([x, x[:1], x[:1]]), np.r_[y, y[0] + 0.4, y[0] - 1.0]
    once = np.r_[values[[0, 6, 7]].mean(), y[1:]]
    less = np.r_[0.3 / 3 - 0.3, np.zeros(5)]
    many = bayes.Posterior(thrice, values, 0, category, theta)(z)
    one = bayes.Posterior(x, once, less, category, theta)(z)
    np.testing.assert_allclose(many, one, atol=1e-6)


@pytest.mark.parametrize("noise, gap", [(-4.0, 0.05), (0.0, 0.4), (0.5, 0.02), (-1.0, 0.6)])
def test_what_tells_most_by_the_closed_form(noise, gap):
    """Of one known run and one new point, the expected maximum of two straight lines in a normal
    value (Clark 1961): |slope| times the improvement of the gap in its units."""
    x, z = np.array([[0.3]]), np.array([[0.3 + gap]])
    posterior = bayes.Posterior(x, [0.7], 0, np.zeros(1, bool), np.array([-0.7, 0.3, noise]))
    mean, cov = posterior.joint(np.concatenate([x, z]))
    gains = []
    for i in (0, 1):
        move = cov[:, i] / math.sqrt(cov[i, i] + math.exp(noise))
        slope = abs(move[0] - move[1])
        gains.append(np.exp(bayes.log_ei(-np.abs(mean[:1] - mean[1:]), slope, 0.0))[0])
    assert abs(gains[0] - gains[1]) > 0.02 * max(gains)
    assert bayes.most_telling(posterior, np.concatenate([x, z])) == int(gains[1] > gains[0])


# ---------------------------------------------------------------- suggest


def drive(space, f, n, seed=0, **more):
    rng, history = np.random.default_rng(seed), []
    for _ in range(n):
        params = bayes.suggest(space, history, rng)
        history.append(entry(params, f(params), **more))
    return history


def test_branin_in_30_runs():
    def branin(p):
        x, y = 15 * p["x0"] - 5, 15 * p["x1"]
        bowl = (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2
        return bowl + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10

    best = [min(h["value"] for h in drive(cube_space(2), branin, 30, s)) for s in range(3)]
    assert np.median(best) - 0.397887 < 0.01


def test_suggest_is_deterministic_and_does_not_touch_the_history():
    history = drive(cube_space(3), lambda p: sum(p.values()), 8)
    before = json.dumps(history)
    a, b = (bayes.suggest(cube_space(3), history, np.random.default_rng(5)) for _ in range(2))
    assert a == b and json.dumps(history) == before


FINITE = [
    ({"a": {"values": [True, 1, "1", None]}, "b": {"values": [1, 2, 3]}, "c": {"value": 7}}, 12),
    ({"a": {"value": 1}, "b": {"values": ["x"]}}, 1),
]


@pytest.mark.parametrize("method", ["bayes", "random", "grid"])
@pytest.mark.parametrize("parameters, count", FINITE)
def test_every_combination_once_then_none(method, parameters, count):
    space_ = {**cube_space(1), "parameters": parameters, "method": method}
    history = drive(space_, lambda p: len(str(p)), count)
    assert len({json.dumps(h["params"]) for h in history}) == count
    constants = {k: d["value"] for k, d in parameters.items() if "value" in d}
    assert all(constants.items() <= h["params"].items() for h in history)
    assert bayes.suggest(space_, history, np.random.default_rng(0)) is None


def test_names_come_back_as_they_are_in_the_space():
    space_ = {**cube_space(1), "parameters": {"models.optimizer.lr": log_range(1e-4, 1e-2)}}
    space_["parameters"]["nested"] = {"parameters": {"size": {"values": [1, 2]}}}
    for entry_ in drive(space_, lambda p: p["models.optimizer.lr"], 6):
        assert entry_["params"].keys() == {"models.optimizer.lr", "nested.size"}


def test_a_run_worth_repeating_is_proposed_with_another_seed():
    """Where noise is large the best of few combinations are run again, and go on being."""
    space_ = {**cube_space(1, "maximize"), "parameters": {"x": {"values": [1, 2, 3, 4, 5]}}}
    rng, seeds = np.random.default_rng(0), {x: [] for x in (1, 2, 3, 4, 5)}
    history = [entry({"x": x}, -abs(x - 2) + 0.3 * rng.standard_normal()) for x in seeds]
    assert bayes.suggest(space_, history, rng) is None
    space_["replicate"] = True
    for _ in range(10):
        params = bayes.suggest(space_, history, rng)
        seeds[params["x"]].append(params["seed"])
        history.append(entry(params, -abs(params["x"] - 2) + 0.3 * rng.standard_normal()))
    assert all(got == list(range(1, 1 + len(got))) for got in seeds.values())
    stopped = [h | {"state": "stopped", "history": [h["value"]], "epochs": 2} for h in history]
    assert bayes.suggest(space_, stopped, rng) is None  # nothing is new, or whole
    assert max(seeds, key=lambda x: len(seeds[x])) == 2 and not seeds[5]


def test_slots_do_not_all_repeat_one_run():
    """Eight pending at once, after runs whose best one is within the noise of others."""
    space_, counts = {**cube_space(1, "maximize"), "replicate": True}, []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        history = [entry({"x0": x}, 0.3 * rng.standard_normal()) for x in rng.random(8)]
        for _ in range(8):
            history.append(entry(bayes.suggest(space_, history, rng), None, "pending"))
        again = [(h["params"]["x0"], h["params"]["seed"]) for h in history if "seed" in h["params"]]
        assert len(set(again)) == len(again)
        counts.append(max(sum(x == y for y, _ in again) for x, _ in again) if again else 0)
    assert 0 < max(counts) < 8


def test_a_value_of_probability_0_is_never_tried():
    dim = space.parse_dimension("x", {"values": ["a", "b", "c"], "probabilities": [0, 1, 0]})
    assert [dim.value(u) for u in (0.0, 0.5, 1.0)] == ["b"] * 3
    space_ = {**cube_space(0), "parameters": {"x": {"values": [1, 2], "probabilities": [0, 1]}}}
    assert bayes.suggest(space_, [], np.random.default_rng(0)) == {"x": 2}
    assert bayes.suggest(space_, [entry({"x": 2}, 0.0)], np.random.default_rng(0)) is None


def test_starts_spread_over_every_parameter():
    history = drive(cube_space(5), lambda p: 0.0, 5)
    u = np.array([[h["params"][f"x{i}"] for i in range(5)] for h in history])
    assert (np.ptp(u, 0) > 0.5).all()


def test_one_ruined_run_does_not_blind_the_search():
    space, rng = cube_space(1, "maximize"), np.random.default_rng(0)
    history = [entry({"x0": x}, 0.966 - 0.02 * (x - 0.7) ** 2) for x in (0.1, 0.3, 0.5, 0.9, 0.99)]
    history.append(entry({"x0": 0.0}, 0.2))
    assert abs(bayes.suggest(space, history, rng)["x0"] - 0.7) < 0.1


def test_stopped_runs_enter_extrapolated_not_as_failures():
    """Ten curves that gain .02 from epoch 5 on; the run at .7 was stopped at epoch 5, leading."""

    def curve(final):
        return [final - 0.02 * (10 - e) / 5 for e in range(1, 11)]

    finals = {0.1: 0.90, 0.3: 0.92, 0.5: 0.94, 0.9: 0.93, 0.97: 0.92}
    history = [entry({"x0": x}, v, history=curve(v), epochs=10) for x, v in finals.items()]
    part = curve(0.96)[:5]
    history.append(entry({"x0": 0.7}, part[-1], "stopped", history=part, epochs=10))
    value, variance = findings.observations(history, 1)
    assert abs(value[-1] - 0.96) < 0.004 and variance[-1] > 0 and (variance[:-1] == 0).all()
    found = bayes.suggest(cube_space(1, "maximize"), history, np.random.default_rng(0))
    assert abs(found["x0"] - 0.7) < 0.12


def test_a_failure_repels_near_its_point_only():
    space = cube_space(1, "maximize")
    history = [entry({"x0": x}, -((x - 0.62) ** 2)) for x in (0.05, 0.3, 0.45, 0.8, 0.95)]
    free = bayes.suggest(space, history, np.random.default_rng(0))["x0"]
    crashed = history + [entry({"x0": free}, None, "failed")]
    shy = bayes.suggest(space, crashed, np.random.default_rng(0))["x0"]
    assert abs(free - 0.62) < 0.05 and abs(shy - free) > 0.02
    far = history + [entry({"x0": 0.0}, None, "failed")]
    assert abs(bayes.suggest(space, far, np.random.default_rng(0))["x0"] - free) < 0.03


def test_pending_trials_are_believed():
    history = drive(cube_space(2), lambda p: (p["x0"] - 0.4) ** 2 + (p["x1"] - 0.6) ** 2, 8)
    rng = np.random.default_rng(1)
    points = []
    for _ in range(4):
        points.append(bayes.suggest(cube_space(2), history, rng))
        history.append(entry(points[-1], None, "pending"))
    u = np.array([[p["x0"], p["x1"]] for p in points])
    gaps = [np.linalg.norm(a - b) for a, b in itertools.combinations(u, 2)]
    assert min(gaps) > 1e-3 and max(gaps) > 0.05


def test_after_run_8_of_the_published_sweep_the_search_stays_near_it():
    record = sweep.read_sweep(ROOT / "hparams" / "history_v5inrfwe.json")
    history = [entry(t.params, t.history[-1]) for t in record.trials[:8]]
    cube = space.Cube(space.parse_space(record.spec))
    keep = [i for i, d in enumerate(cube.free) if d.name != "T_max"]
    run8 = np.array(cube.encode(history[7]["params"]))[keep]
    gaps = []
    for seed in range(6):
        params = bayes.suggest(record.spec, history, np.random.default_rng(seed))
        gaps.append(np.linalg.norm(np.array(cube.encode(params))[keep] - run8))
    assert np.mean(gaps) < 0.25
