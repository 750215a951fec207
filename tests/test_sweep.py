"""sweep.py: laws, Gaussian process, stopping rules against closed forms; then the command line."""

import html.parser
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
import report
import space
import sweep

# A trainer with train.py's command line and a closed-form score, best at lr 10^-3.2; FAULT makes it
# fail in the ways of the real one.
TRAINER = """
import argparse, csv, json, math, os, sys, time
HP = dict(lr=1e-3, weight_decay=1e-4, T_max=22, epochs=8, thresh=.3, ema=True, stop_epoch=0,
          name="")
p = argparse.ArgumentParser(allow_abbrev=False)
for k, v in HP.items():
    p.add_argument(*dict.fromkeys((f"--{k}", "--" + k.replace("_", "-"))),
                   type=(lambda t: t == "true") if isinstance(v, bool) else type(v))
p.add_argument("--resume", action="store_true")
p.add_argument("--print-hparams", action="store_true")
p.add_argument("--hparams")
p.add_argument("--device", default=os.environ.get("CUDA_VISIBLE_DEVICES", ""))
a, rest = p.parse_known_args()
if rest:
    sys.exit(print("error: unrecognized arguments:", *rest, file=sys.stderr) or 2)
hp = {**HP, **{k: v for k, v in vars(a).items() if k in HP and v is not None}}
fault = os.environ.get("FAULT", "")
if fault == "refuse" and 2e-4 < hp["lr"] < 8e-4:
    sys.exit(print("error: flags: eta_min is above lr", file=sys.stderr) or 2)
if a.print_hparams:
    sys.exit(print(json.dumps(hp)))
d = "runs/" + hp["name"]
if a.resume:
    saved = json.load(open(d + "/hparams.json"))
    for k in set(HP) - {"stop_epoch", "name"}:
        if getattr(a, k) not in (None, saved[k]):
            sys.exit(print("error: --resume cannot change", k, file=sys.stderr) or 2)
    hp = {**saved, "stop_epoch": a.stop_epoch or 0}
else:
    os.makedirs(d)
    with open(d + "/t", "w") as f:
        json.dump(hp, f)
    os.replace(d + "/t", d + "/hparams.json")
log = d + "/log.csv"
rows = list(csv.DictReader(open(log))) if os.path.exists(log) else []
if fault == "elsewhere" and not os.path.exists(d + "/seen"):
    open(d + "/seen", "w")
    sys.exit(print(f"error: {d}: another process is training there", file=sys.stderr) or 2)
for e in range(len(rows) + 1, min(hp["epochs"], hp["stop_epoch"] or 99) + 1):
    time.sleep(float(os.environ.get("SLOW", "0")))
    once = d + "/crashed"
    if fault == "once" and e == 3 and not os.path.exists(once):
        open(once, "w")
        os.kill(os.getpid(), 9)
    if fault == "oom" and hp["lr"] > 1e-3:
        sys.exit(print("CUDA out of memory", file=sys.stderr) or 3)
    if fault == "always":
        raise RuntimeError("broken cable")
    v = .96 - .02 * (math.log10(hp["lr"]) + 3.2) ** 2 - .3 * math.exp(-e / 1.6)
    rows.append({"epoch": e, "loss": 1 / e, "hmean": v, "hmean_lo": v - .002, "hmean_hi": v + .002,
                 "seconds": 36, "device": a.device})
    with open(log + ".t", "w") as f:
        w = csv.DictWriter(f, rows[0].keys())
        w.writeheader()
        w.writerows(rows)
    os.replace(log + ".t", log)
"""


def log_range(low, high):
    return {"distribution": "log_uniform_values", "min": low, "max": high}


def spec(**more):
    base = {
        "method": "bayes",
        "metric": {"name": "val/hmean", "goal": "maximize"},
        "run_cap": 6,
        "parameters": {"optim.lr": log_range(1e-4, 1e-2), "T_max": {"values": [20, 22, 24]}},
    }
    return {k: v for k, v in {**base, **more}.items() if v is not ...}


def cube_space(d, goal="minimize", **more):
    return {
        "method": "bayes",
        "metric": {"name": "y", "goal": goal},
        "parameters": {f"x{i}": {"min": 0.0, "max": 1.0} for i in range(d)},
        **more,
    }


def entry(params, value=None, state="finished", **more):
    return {"params": params, "value": value, "state": state, **more}


# ---------------------------------------------------------------- distributions


def samples(entry_, n=2000):
    dim = space.parse_dimension("x", entry_)
    return dim, np.array([dim.value(u) for u in (np.arange(n) + 0.5) / n])


NORMAL = space.normal_cdf
LAWS = [
    ({"min": 2.0, "max": 5.0}, lambda x: (x - 2) / 3),
    ({"distribution": "uniform", "min": 2, "max": 5}, lambda x: (x - 2) / 3),
    ({"distribution": "log_uniform", "min": -2, "max": 3}, lambda x: (math.log(x) + 2) / 5),
    (log_range(1e-3, 10), lambda x: math.log10(x * 1e3) / 4),
    (
        {"distribution": "inv_log_uniform", "min": -2, "max": 3},
        lambda x: 1 - (math.log(1 / x) + 2) / 5,
    ),
    (
        {"distribution": "inv_log_uniform_values", "min": 0.1, "max": 10},
        lambda x: math.log10(x * 10) / 2,
    ),
    ({"distribution": "normal", "mu": 3, "sigma": 2}, lambda x: NORMAL((x - 3) / 2)),
    (
        {"distribution": "log_normal", "mu": 1, "sigma": 0.5},
        lambda x: NORMAL((math.log(x) - 1) / 0.5),
    ),
    ({"distribution": "beta", "a": 2, "b": 3}, lambda x: x * x * (6 - 8 * x + 3 * x * x)),
    ({"distribution": "beta", "a": 0.5, "b": 0.5}, lambda x: 2 / math.pi * math.asin(math.sqrt(x))),
]


@pytest.mark.parametrize("law, cdf", LAWS, ids=[json.dumps(law) for law, _ in LAWS])
def test_continuous_law(law, cdf):
    dim, x = samples(law, 300)
    shares = (np.arange(300) + 0.5) / 300
    assert np.abs(np.array([cdf(v) for v in x]) - shares).max() < 1e-6
    assert np.abs([dim.encode(float(v)) - u for v, u in zip(x, shares)]).max() < 1e-6


STEPS = [
    ({"distribution": "q_uniform", "min": 0, "max": 10, "q": 2}, lambda x: x / 10),
    ({"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.1}, lambda x: x),
    (
        {"distribution": "q_log_uniform", "min": 0, "max": 4, "q": 5},
        lambda x: math.log(max(x, 1)) / 4,
    ),
    (
        {"distribution": "q_log_uniform_values", "min": 1, "max": 100, "q": 10},
        lambda x: math.log10(max(x, 1)) / 2,
    ),
    ({"distribution": "q_normal", "mu": 1, "sigma": 2, "q": 0.5}, lambda x: NORMAL((x - 1) / 2)),
    (
        {"distribution": "q_log_normal", "mu": 0, "sigma": 1, "q": 1},
        lambda x: NORMAL(math.log(max(x, 1e-9))),
    ),
    ({"distribution": "q_beta", "a": 1, "b": 1, "q": 0.25}, lambda x: x),
]


@pytest.mark.parametrize("law, cdf", STEPS, ids=[law["distribution"] for law, _ in STEPS])
def test_stepped_law_has_the_mass_between_its_steps(law, cdf):
    """The mass of a step is the continuous law's from half a step below it to half above; at the
    ends of a range the outer halves go to the steps inside it."""
    dim, x = samples(law, 20000)
    q = law["q"]
    assert np.allclose(x / q, np.round(x / q), atol=1e-9)
    levels = np.unique(x)
    for level in levels[1:-1]:
        mass = min(cdf(level + q / 2), 1) - max(cdf(level - q / 2), 0)
        assert abs((x == level).mean() - mass) < 2e-3
    assert all(isinstance(v, type(q)) for v in dim.levels[:3])


def test_integers_and_categories():
    _, x = samples({"min": 1, "max": 4})
    assert [int((x == k).sum()) for k in (1, 2, 3, 4)] == [500] * 4
    dim = space.parse_dimension("x", {"values": [True, 1, 0, None, "0", False]})
    assert dim.category and [dim.value(dim.encode(v)) for v in dim.levels] == list(dim.levels)
    assert len({dim.encode(v) for v in dim.levels}) == 6
    dim = space.parse_dimension("x", {"values": ["a", "b"], "probabilities": [0.9, 0.1]})
    assert [dim.value(u) for u in (0.0, 0.89, 0.91, 1.0)] == ["a", "a", "b", "b"]
    dim = space.parse_dimension("x", {"distribution": "int_uniform", "min": 1, "max": 10**9})
    assert all(isinstance(dim.value(u), int) for u in (0.0, 0.3, 1.0))


def test_a_value_of_probability_0_is_never_tried():
    dim = space.parse_dimension("x", {"values": ["a", "b", "c"], "probabilities": [0, 1, 0]})
    assert [dim.value(u) for u in (0.0, 0.5, 1.0)] == ["b"] * 3
    space_ = {**cube_space(0), "parameters": {"x": {"values": [1, 2], "probabilities": [0, 1]}}}
    assert [h["params"] for h in drive(space_, lambda p: 0.0, 1)] == [{"x": 2}]
    assert sweep.suggest(space_, [entry({"x": 2}, 0.0)], np.random.default_rng(0)) is None


def test_ends_of_a_log_range_come_back_as_written():
    dim = space.parse_dimension("x", log_range(5e-5, 6e-4))
    assert (dim.value(0.0), dim.value(1.0)) == (5e-5, 6e-4)


BAD_PARAMETERS = [
    ({}, "parameters"),
    ({"lr": {}}, "lr"),
    ({"lr": 3}, "lr"),
    ({"lr": {"min": 2.0, "max": 1.0}}, "not less than"),
    ({"lr": {"min": 1, "max": 1}}, "not less"),
    ({"lr": log_range(0, 1)}, "logarithm"),
    ({"lr": log_range(-1.0, 1)}, "logarithm"),
    ({"lr": {"distribution": "zipf", "min": 0, "max": 1}}, "zipf"),
    ({"lr": {"values": []}}, "values"),
    ({"lr": {"values": 3}}, "values"),
    ({"lr": {"values": [1, 1.0]}}, "twice"),
    ({"lr": {"values": [[1], {}]}}, "a list or an object"),
    ({"lr": {"values": [1, 2], "probabilities": [0.5, 0.6]}}, "probabilities"),
    ({"lr": {"min": 0.0, "max": math.inf}}, "max"),
    ({"lr": {"min": "a", "max": 1}}, "min"),
    ({"lr": {"min": 0.0, "max": 1.0, "step": 0.1}}, "step"),
    ({"lr": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}}, "q"),
    ({"lr": {"distribution": "normal", "sigma": -1}}, "sigma"),
    ({"lr": {"distribution": "log_uniform", "min": 5e-5, "max": 5e4}}, "exponent"),
    ({"a.lr": {"value": 1}, "b.lr": {"value": 2}}, "twice"),
]


@pytest.mark.parametrize("parameters, word", BAD_PARAMETERS)
def test_a_space_that_is_none_is_refused_by_name(parameters, word):
    with pytest.raises(ValueError, match=word):
        space.check_spec(spec(parameters=parameters))


SCHEMA_KEYS = [
    "apiVersion",
    "kind",
    "controller",
    "description",
    "program",
    "job",
    "image_uri",
    "entity",
    "project",
    "method",
    "command",
    "name",
    "run_cap",
    "metric",
    "metrics",
    "scheduler",
    "early_terminate",
    "parameters",
]


def test_every_key_of_the_schema_is_accepted_and_others_refused():
    for key in SCHEMA_KEYS:
        value = {"early_terminate": {"type": "hyperband", "min_iter": 2}, "command": ["${program}"]}
        assert space.check_spec(spec() if key in spec() else spec(**{key: value.get(key, "x")}))
    for key in ("paramaters", "epochs", "runcap"):
        with pytest.raises(ValueError, match=key):
            space.check_spec(spec(**{key: 1}))
    for key in ("min_iter", "max_iter", "eta", "s", "strict"):
        rule = {"type": "hyperband", "min_iter": 3, key: 4}
        assert space.check_spec(spec(early_terminate=rule))
    with pytest.raises(ValueError, match="patience"):
        space.check_spec(spec(early_terminate={"type": "hyperband", "min_iter": 3, "patience": 5}))
    for name, keys in space.DISTRIBUTIONS.items():
        good = {
            "value": 1,
            "values": [1, 2],
            "probabilities": [0.5, 0.5],
            "min": 1,
            "max": 9,
            "mu": 1,
            "sigma": 1,
            "a": 1,
            "b": 2,
            "q": 1,
        }
        chosen = {"distribution": name, **{k: good[k] for k in keys.split()}}
        assert space.parse_dimension("x", chosen)
        with pytest.raises(ValueError, match="'width'"):
            space.parse_dimension("x", {**chosen, "width": 1})


@pytest.mark.parametrize(
    "change, word",
    [
        ({"run_cap": 0}, "run_cap"),
        ({"run_cap": 2.5}, "run_cap"),
        ({"method": "anneal"}, "method"),
        ({"metric": {"goal": "maximize"}}, "metric"),
        ({"metric": {"name": "x", "goal": "up"}}, "goal"),
        ({"early_terminate": {"type": "envelope"}}, "type"),
        ({"seed": -1}, "seed"),
        ({"early_terminate": {"type": "hyperband", "eta": 2}}, "min_iter"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "min_iter"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 1}}, "eta"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 27, "s": 2000}}, "s is 2000"),
        ({"command": "train.py"}, "command"),
        ({"command": ["${program}", 3]}, "command"),
        ({"parameters": {"epochs": {"values": [5, 10]}}}, "epochs"),
    ],
)
def test_a_sweep_that_is_none_is_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        space.check_spec(spec(**change))


@pytest.mark.parametrize("name", ["sweep_lr_wd", "sweep_narrow", "sweep_refined"])
def test_shipped_sweeps_in_wandb_form_pass_wandbs_schema(name):
    data = json.loads((ROOT / "hparams" / f"{name}.json").read_text())
    space.check_spec(data)
    schema = pytest.importorskip("sweeps.config", reason="pip install sweeps==0.3.0 'numpy<2'")
    assert schema.schema_violations_from_proposed_config(space.wandb_form(data)[0]) == []
    if name != "sweep_refined":
        assert schema.schema_violations_from_proposed_config(data) == []


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
        k[i, j] = math.exp(theta[3]) * (1 + s + s * s / 3) * math.exp(-s) + sweep.MEAN_VARIANCE
    return k


def test_likelihood_and_gradient():
    _, x, y, own, category, theta = gp_data()
    cov = direct_covariance(x, x, theta) + np.diag(own + math.exp(theta[4]) + sweep.JITTER)
    expected = -0.5 * y @ np.linalg.solve(cov, y) - 0.5 * np.linalg.slogdet(2 * math.pi * cov)[1]
    gaps = sweep.squared_gaps(x, x, category)
    value, grad = sweep.log_likelihood(theta, gaps, y, own)
    assert abs(value - expected) < 1e-10
    for i in range(5):
        step = 1e-6 * np.eye(5)[i]
        up, down = (sweep.log_likelihood(theta + s, gaps, y, own)[0] for s in (step, -step))
        assert abs((up - down) / 2e-6 - grad[i]) < 1e-6


def test_posterior():
    rng, x, y, own, category, theta = gp_data()
    z = np.c_[rng.random((7, 2)), rng.integers(0, 3, 7)]
    cov = direct_covariance(x, x, theta) + np.diag(own + math.exp(theta[4]) + sweep.JITTER)
    cross = direct_covariance(x, z, theta)
    mean = cross.T @ np.linalg.solve(cov, y)
    var = np.diag(direct_covariance(z, z, theta) - cross.T @ np.linalg.solve(cov, cross))
    got = sweep.Posterior(x, y, own, category, theta)(z)
    assert np.abs(got[0] - mean).max() < 1e-10 and np.abs(got[1] ** 2 - var).max() < 1e-10


def test_log_ei_against_integration():
    for mean, sd in itertools.product((-3.0, -1.0, 0.0, 2.0), (0.1, 0.7, 2.0)):
        f = np.linspace(0, max(mean, 0) + 12 * sd, 400001)[:-1]
        f = f + (f[1] - f[0]) / 2
        density = np.exp(-0.5 * ((f - mean) / sd) ** 2) / sd / math.sqrt(2 * math.pi)
        exact = float((f * density).sum() * (f[1] - f[0]))
        got = float(sweep.log_ei(np.array([mean]), np.array([sd]), 0.0)[0])
        if exact > 1e-100:
            assert abs(got - math.log(exact)) < 1e-5
    far = sweep.log_ei(-np.array([19.9, 20.1, 40.0, 1e3]), np.ones(4), 0.0)
    assert np.isfinite(far).all() and (np.diff(far) < 0).all()
    assert abs(far[0] - far[1] - (20.1**2 - 19.9**2) / 2) < 0.05


def test_minimise_finds_rosenbrocks_minimum():
    def f(x):
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, np.array(
            [-400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)]
        )

    x, value = sweep.minimise(f, np.array([-1.2, 1.0]), 200)
    assert value < 1e-3 and np.abs(x - 1).max() < 0.1


# ---------------------------------------------------------------- suggest


def drive(space, f, n, seed=0, **more):
    rng, history = np.random.default_rng(seed), []
    for _ in range(n):
        params = sweep.suggest(space, history, rng)
        history.append(entry(params, f(params), **more))
    return history


def test_branin_in_30_runs():
    def branin(p):
        x, y = 15 * p["x0"] - 5, 15 * p["x1"]
        return (
            (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2
            + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x)
            + 10
        )

    best = [min(h["value"] for h in drive(cube_space(2), branin, 30, s)) for s in range(3)]
    assert np.median(best) - 0.397887 < 0.01


def test_suggest_is_deterministic_and_does_not_touch_the_history():
    history = drive(cube_space(3), lambda p: sum(p.values()), 8)
    before = json.dumps(history)
    a, b = (sweep.suggest(cube_space(3), history, np.random.default_rng(5)) for _ in range(2))
    assert a == b and json.dumps(history) == before


def test_twelve_combinations_in_twelve_runs_then_none():
    space = {
        **cube_space(1),
        "parameters": {
            "a": {"values": [True, 1, "1", None]},
            "b": {"values": [1, 2, 3]},
            "c": {"value": 7},
        },
    }
    for method in ("bayes", "random", "grid"):
        history = drive({**space, "method": method}, lambda p: p["b"], 12)
        assert len({json.dumps(h["params"], sort_keys=True) for h in history}) == 12
        assert all(h["params"]["c"] == 7 for h in history)
        assert sweep.suggest({**space, "method": method}, history, np.random.default_rng(0)) is None


def test_a_space_of_constants_has_one_run():
    space = {**cube_space(1), "parameters": {"a": {"value": 1}, "b": {"values": ["x"]}}}
    for method in ("bayes", "random", "grid"):
        history = drive({**space, "method": method}, lambda p: 0.0, 1)
        assert history[0]["params"] == {"a": 1, "b": "x"}
        assert sweep.suggest({**space, "method": method}, history, np.random.default_rng(0)) is None


def test_starts_spread_over_every_parameter():
    history = drive(cube_space(5), lambda p: 0.0, 5)
    u = np.array([[h["params"][f"x{i}"] for i in range(5)] for h in history])
    assert (np.ptp(u, 0) > 0.5).all()


def test_one_ruined_run_does_not_blind_the_search():
    space, rng = cube_space(1, "maximize"), np.random.default_rng(0)
    history = [entry({"x0": x}, 0.966 - 0.02 * (x - 0.7) ** 2) for x in (0.1, 0.3, 0.5, 0.9, 0.99)]
    history.append(entry({"x0": 0.0}, 0.2))
    assert abs(sweep.suggest(space, history, rng)["x0"] - 0.7) < 0.1


def test_stopped_runs_enter_extrapolated_not_as_failures():
    """Ten curves that gain .02 from epoch 5 on; the run at .7 was stopped at epoch 5, leading."""

    def curve(final):
        return [final - 0.02 * (10 - e) / 5 for e in range(1, 11)]

    finals = {0.1: 0.90, 0.3: 0.92, 0.5: 0.94, 0.9: 0.93, 0.97: 0.92}
    history = [entry({"x0": x}, v, history=curve(v), epochs=10) for x, v in finals.items()]
    part = curve(0.96)[:5]
    history.append(entry({"x0": 0.7}, part[-1], "stopped", history=part, epochs=10))
    value, variance = sweep.observations(history, 1)
    assert abs(value[-1] - 0.96) < 0.004 and variance[-1] > 0 and (variance[:-1] == 0).all()
    assert (
        abs(sweep.suggest(cube_space(1, "maximize"), history, np.random.default_rng(0))["x0"] - 0.7)
        < 0.12
    )


def test_a_failure_repels_near_its_point_only():
    space = cube_space(1, "maximize")
    history = [entry({"x0": x}, -((x - 0.62) ** 2)) for x in (0.05, 0.3, 0.45, 0.8, 0.95)]
    free = sweep.suggest(space, history, np.random.default_rng(0))["x0"]
    crashed = history + [entry({"x0": free}, None, "failed")]
    shy = sweep.suggest(space, crashed, np.random.default_rng(0))["x0"]
    assert abs(free - 0.62) < 0.05 and abs(shy - free) > 0.02
    far = history + [entry({"x0": 0.0}, None, "failed")]
    assert abs(sweep.suggest(space, far, np.random.default_rng(0))["x0"] - free) < 0.03


def test_pending_trials_are_believed():
    history = drive(cube_space(2), lambda p: (p["x0"] - 0.4) ** 2 + (p["x1"] - 0.6) ** 2, 8)
    rng = np.random.default_rng(1)
    points = []
    for _ in range(4):
        points.append(sweep.suggest(cube_space(2), history, rng))
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
    gaps = [
        np.linalg.norm(
            np.array(cube.encode(sweep.suggest(record.spec, history, np.random.default_rng(s))))[
                keep
            ]
            - run8
        )
        for s in range(6)
    ]
    assert np.mean(gaps) < 0.25


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize(
    "most, table",
    [
        (
            81,
            [
                [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
                [(27, 3), (9, 9), (3, 27), (1, 81)],
                [(9, 9), (3, 27), (1, 81)],
                [(6, 27), (2, 81)],
                [(5, 81)],
            ],
        ),
        (
            243,
            [
                [(243, 1), (81, 3), (27, 9), (9, 27), (3, 81), (1, 243)],
                [(81, 3), (27, 9), (9, 27), (3, 81), (1, 243)],
                [(27, 9), (9, 27), (3, 81), (1, 243)],
                [(18, 27), (6, 81), (2, 243)],
                [(9, 81), (3, 243)],
                [(6, 243)],
            ],
        ),
    ],
)
def test_hyperbands_table(most, table):
    assert sweep.brackets(most, 3) == table


@pytest.mark.parametrize(
    "rule, bands",
    [
        ({"min_iter": 10, "eta": 2, "s": 2}, [10, 20]),
        ({"min_iter": 15, "eta": 3}, [15]),
        ({"max_iter": 22, "eta": 2, "s": 2}, [5, 11]),
        ({"min_iter": 3}, [3, 9]),
        ({"max_iter": 27, "s": 2, "min_iter": 5}, [3, 9]),
    ],
)
def test_wandbs_bands(rule, bands):
    assert sweep.bands_of({"type": "hyperband", **rule}, 22) == bands


def test_wandbs_rule_by_hand():
    """With 4, 3, 2 and its own value at the band, eta 2 sets the bar at place 2, counted from 0."""
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    others = [[0, 4], [0, 3], [0, 2], [9]]
    assert not sweep.should_stop([0, 2.5], others, rule)
    assert not sweep.should_stop([0, 2], others, rule)
    assert sweep.should_stop([0, 1.5], others, rule)
    assert sweep.should_stop([5, 1.5], others, rule)
    assert not sweep.should_stop([5, 1.5], others, {**rule, "strict": False})
    assert not sweep.should_stop([1], others, rule)
    assert not sweep.should_stop([0, 1.5], others, {**rule, "preserve_threshold": 1.5})
    assert not sweep.should_stop([0, 1.5], others, None)


def test_wandbs_rule_against_the_package():
    package = pytest.importorskip("sweeps", reason="pip install sweeps==0.3.0 'numpy<2'")
    rng = np.random.default_rng(0)
    config = {
        "method": "bayes",
        "metric": {"name": "m", "goal": "maximize"},
        "parameters": {"a": {"min": 0.0, "max": 1.0}},
    }
    for _ in range(200):
        rule = {
            "type": "hyperband",
            "min_iter": int(rng.integers(1, 12)),
            "eta": int(rng.integers(2, 5)),
            "strict": bool(rng.integers(2)),
        }
        curves = [list(map(float, rng.random(k))) for k in rng.integers(1, 23, 8)]
        runs = [
            package.SweepRun(
                name=str(i), state=package.RunState.running, history=[{"m": v} for v in c]
            )
            for i, c in enumerate(curves)
        ]
        stopped = {r.name for r in package.stop_runs({**config, "early_terminate": rule}, runs)}
        for i, c in enumerate(curves):
            assert sweep.should_stop(c, curves[:i] + curves[i + 1 :], rule) == (str(i) in stopped)


def test_preserve_threshold_is_in_the_metrics_units():
    rule = {"type": "hyperband", "min_iter": 1, "eta": 2, "preserve_threshold": 0.3}
    for goal, value in (("minimize", 0.29), ("maximize", 0.31)):
        state = sweep.Sweep(
            Path("s"), spec(metric={"name": "y", "goal": goal}, early_terminate=rule), 8, []
        )
        curve = [state.sign * value]
        better = [[curve[0] + 0.1 * k] for k in (1, 2, 3)]
        assert not sweep.judge(curve, better, state.rule, 8)["stop"]
        curve[0] -= 0.02
        assert sweep.judge(curve, better, state.rule, 8)["stop"]


def test_leader_is_never_stopped():
    rng = np.random.default_rng(0)
    rules = [
        {"type": "hyperband", "min_iter": 4, "eta": 4},
        {"type": "pause", "epochs": 8},
        {"type": "brackets", "epochs": 4},
    ]
    for rule in rules:
        for _ in range(50):
            curves = list(np.cumsum(rng.random((6, 8)), 1))
            lead = int(np.argmax([c[3] for c in curves]))
            others = [list(c) for i, c in enumerate(curves) if i != lead]
            assert not sweep.should_stop(list(curves[lead][:4]), others, rule)


def simulated(rng, n=20, epochs=22):
    """Cosine-schedule curves: final, minus a gap that closes, plus noise."""
    e = np.arange(1, epochs + 1)
    h = (1 + np.cos(math.pi * e / epochs)) / 2
    final = 0.962 + 0.0024 * rng.standard_normal(n)
    gap = 0.004 + 0.002 * rng.standard_normal(n)
    noise = 0.001 * (0.3 + 0.7 * h) * rng.standard_normal((n, epochs))
    return final[:, None] - gap[:, None] * h - 0.25 * np.exp(-e / 1.6) + noise


def test_default_policy_saves_a_third_and_keeps_the_best():
    saved, kept = [], []
    for seed in range(12):
        y = simulated(np.random.default_rng(seed))
        trained = sweep.simulate(y, {"type": "pause"})
        saved.append(1 - trained.mean() / 22)
        kept.append(trained[y[:, -1].argmax()] == 22)
    assert np.mean(saved) > 0.3 and np.mean(kept) > 0.85


def test_projection_recovers_a_gain_that_depends_on_the_rise():
    """Finals .9; runs that rise faster have more to gain, exactly: no run is projected wrong."""
    curves = [[0.9 - g * (10 - e) / 10 for e in range(1, 11)] for g in np.linspace(0.01, 0.1, 10)]
    mean, sd = sweep.project([0.9 - 0.07 * (10 - e) / 10 for e in range(1, 5)], curves, 10)
    assert abs(mean - 0.9) < 0.008 and sd < 0.02
    flat, _ = sweep.project([0.85] * 4, curves, 10)
    assert flat < mean


def test_replay_of_the_published_sweep(capsys):
    sweep.print_replay(sweep.read_sweep(ROOT / "hparams" / "history_v5inrfwe.json"))
    out = capsys.readouterr().out
    assert "hyperband: stopped 5, 9, 10, 11, 12 at epoch 10; 6 at epoch 20. 62 of 264" in out
    assert "best run 8 kept" in out


def test_expected_maximum():
    assert abs(sweep.expected_maximum(2) - 1 / math.sqrt(math.pi)) < 1e-5
    assert abs(sweep.expected_maximum(3) - 1.5 / math.sqrt(math.pi)) < 1e-5
    assert f"{sweep.expected_maximum(11):.2f}" == "1.59"


def test_student_interval_and_spearman():
    assert abs(sweep.mean_interval([1.0, 2.0])[1] - 12.7062 * math.sqrt(0.5 / 2)) < 1e-3
    for n, limit in ((3, 1.153), (10, 2.176), (20, 2.557), (30, 2.745)):
        assert abs(sweep.outlier_limit(n) - limit) < 1e-3  # Grubbs 1969, table I, 5 %
    assert sweep.spearman([1, 2, 3, 4], [10, 20, 25, 1e9]) == 1
    assert abs(sweep.spearman([1, 2, 2, 3], [1, 2, 3, 4]) - 0.9486833) < 1e-6


# ---------------------------------------------------------------- command line


@pytest.fixture
def cli(tmp_path):
    """Runs sweep.py's command line in a folder of its own with the trainer above."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "run.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sweep\n"
        f"sweep.TRAINER = [sys.executable, {str(tmp_path / 'trainer.py')!r}]\n"
        "sweep.AGAIN = 0.2\n"
        "sys.exit(sweep.main())\n"
    )

    def call(*args, wait=True, sweep_=None, **env):
        if sweep_ is not None:
            (tmp_path / "s.json").write_text(json.dumps(sweep_))
        process = subprocess.Popen(
            [sys.executable, "run.py", *map(str, args)],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    call.folder = tmp_path
    return call


def events(folder, *kinds):
    lines = (folder / "runs/s/state.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] in kinds]


def wait_for(path):
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise TimeoutError(path)


def outcome(folder):
    return (
        [e["params"] for e in events(folder, "new")],
        {e["trial"]: e["history"] for e in events(folder, "epochs")},
        [e["verdict"] for e in events(folder, "judged")],
    )


def test_a_sweep_from_start_to_report(cli):
    pause = {"type": "pause"}
    code, out, err = cli("s.json", "--epochs=8", sweep_=spec(early_terminate=pause))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("best hmean 0.9")
    report = (cli.folder / "runs/s/report.md").read_text()
    assert "## Finished trials" in report and "python train.py --epochs=8 --optim" not in report
    assert "python train.py --epochs=8 --lr=" in report
    assert "0.01 hours" not in report and " hours used for " in report
    assert cli("--report", "runs/s", "--html", "page.html")[1] == report
    page = cli.folder / "page.html"
    for text in filter(None, (page.read_text(), browse(page))):
        check_page(cli.folder, text)
    code, out, _ = cli("--status", "runs/s")
    assert code == 0 and "6 trials of 6" in out and "no sweep is running" in out
    assert "pause: stopped" in cli("--replay", "runs/s")[1]
    first = outcome(cli.folder)
    assert cli("s.json", "--epochs=8")[0] == 0 and outcome(cli.folder) == first


def test_killed_at_any_moment_it_ends_like_the_undisturbed_sweep(cli):
    sweep_ = spec(early_terminate={"type": "pause"}, run_cap=5)
    cli("s.json", "--epochs=8", sweep_=sweep_)
    calm = outcome(cli.folder)
    (cli.folder / "runs").rename(cli.folder / "calm")
    for seen in ("trial-001/hparams.json", "trial-002/log.csv", "trial-003.log"):
        process = cli("s.json", "--epochs=8", wait=False, SLOW="0.05")
        wait_for(cli.folder / "runs/s" / seen)
        process.kill()
        process.communicate()
    with open(cli.folder / "runs/s/state.jsonl", "a") as file:
        file.write('{"event": "finished", "tri')
    (cli.folder / "runs/s/.report.md.123.tmp").write_text("# Swe")
    assert cli("s.json", "--epochs=8")[0] == 0
    assert outcome(cli.folder) == calm and not list(cli.folder.glob("runs/s/.*"))


def test_interrupted_it_stops_its_trial_and_goes_on(cli):
    process = cli("s.json", wait=False, sweep_=spec(run_cap=2), SLOW="0.5")
    wait_for(cli.folder / "runs/s/trial-001/log.csv")
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] and process.returncode == 130
    assert cli("s.json")[0] == 0
    assert [len(e["history"]) for e in events(cli.folder, "epochs")][-2:] == [8, 8]


def test_workers_devices_and_the_launcher(cli):
    code, _out, err = cli(
        "s.json",
        "--workers",
        2,
        "--devices",
        "4,7",
        "--launcher",
        "env X=1",
        sweep_=spec(run_cap=6),
        SLOW="0.02",
    )
    assert code == 0, err
    params = [json.dumps(e["params"]) for e in events(cli.folder, "new")]
    assert len(set(params)) == 6
    logs = [p.read_text() for p in (cli.folder / "runs/s").glob("trial-*/log.csv")]
    assert {log.splitlines()[1].rsplit(",", 1)[1] for log in logs} == {"4", "7"}


def test_flags_that_are_no_hyperparameters_survive_a_pause(cli):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    words = ["${program}", "--weight-decay=0.5"]
    sweep_ = spec(early_terminate=rule, run_cap=1, command=words)
    sweep_["parameters"]["weight_decay"] = {"value": 0.25}
    code, _, err = cli("s.json", "--device=cpu", sweep_=sweep_)
    rows = (cli.folder / "runs/s/trial-001/log.csv").read_text().splitlines()[1:]
    assert (code, err, len(rows)) == (0, "", 8) and all(row.endswith(",cpu") for row in rows)


def test_values_that_only_train_py_knows_to_be_wrong_fail_their_trial_only(cli):
    code, _out, err = cli("s.json", sweep_=spec(run_cap=8), FAULT="refuse")
    refused = [e for e in events(cli.folder, "failed") if "eta_min is above lr" in e["why"]]
    assert (code, err) == (0, "") and 1 <= len(refused) == len(events(cli.folder, "failed"))
    assert len(events(cli.folder, "finished")) == 8 - len(refused)


def test_a_trainer_on_another_host_is_waited_for(cli):
    code, out, err = cli("s.json", sweep_=spec(run_cap=2), FAULT="elsewhere")
    assert (code, err) == (0, "") and out.count("still runs on another host") == 2
    assert len(events(cli.folder, "finished")) == 2 and not events(cli.folder, "crashed")


def test_orphans_are_waited_for_each_on_its_device(cli):
    """Two trainers outlive their sweep, the first trial's on the second device: the next sweep
    goes on with each where it was, one as soon as the other."""
    process = cli("s.json", "--devices=4,7", wait=False, sweep_=spec(run_cap=2), SLOW="60")
    for number in (1, 2):
        wait_for(cli.folder / f"runs/s/trial-00{number}/hparams.json")
    process.terminate()
    process.communicate()
    held = [files.lock(cli.folder / f"runs/s/trial-00{number}.lock") for number in (1, 2)]
    for number, lock in enumerate(held):
        assert Path(lock.name).read_text() == str(number)
        Path(lock.name).write_text(str(1 - number))
    process = cli("s.json", "--devices=4,7", wait=False)
    told = [process.stdout.readline() for _ in held]
    assert all("still runs from before" in line for line in told)
    for lock in reversed(held):
        lock.close()
    assert process.communicate()[1] == "" and process.returncode == 0
    for number, device in (1, "7"), (2, "4"):
        log = (cli.folder / f"runs/s/trial-00{number}/log.csv").read_text().splitlines()
        assert len(log) == 9 and all(row.endswith("," + device) for row in log[1:])
    assert len(events(cli.folder, "finished")) == 2 and not events(cli.folder, "crashed")


def test_without_locks_there_is_no_other_sweep(tmp_path, monkeypatch):
    """Some network file systems have none."""

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", none)
    assert files.lock(tmp_path / "lock") is not None


def test_the_state_is_not_read_wrongly_when_a_line_is_missing(cli):
    assert cli("s.json", sweep_=spec(run_cap=2))[0] == 0
    path = cli.folder / "runs/s/state.jsonl"
    lines = path.read_text().splitlines(True)
    assert '"trial": 1,' in lines[1]
    none = lines[1].replace('"trial": 1,', '"trial": 0,')
    for rest in (lines[1:], lines[:1] + lines, [lines[0], none]):
        path.write_text("".join(rest))
        code, _, err = cli("--status", "runs/s")
        assert code == 2 and "is damaged" in err, rest


def test_enqueued_configurations_come_first(cli):
    (cli.folder / "known.json").write_text('{"lr": 0.0005, "T_max": 24}')
    (cli.folder / "wide.json").write_text('{"lr": 0.05}')
    code, out, _ = cli("s.json", "--enqueue", "known.json", "wide.json", sweep_=spec(run_cap=3))
    assert code == 0 and "wide.json: optim.lr = 0.05 lies outside the space" in out
    tried = [(e["params"]["optim.lr"], e["params"]["T_max"]) for e in events(cli.folder, "new")]
    assert tried[:2] == [(0.0005, 24), (0.05, 22)]
    (cli.folder / "typo.json").write_text('{"weight_dekay": 1}')
    code, _, err = cli("s.json", "--name=t", "--enqueue", "typo.json")
    assert code == 2 and "typo.json" in err and "weight_decay" in err


def test_what_the_sweep_holds_constant_an_enqueued_configuration_does_not_change(cli):
    (cli.folder / "known.json").write_text('{"lr": 0.0005, "epochs": 5}')
    parameters = {"lr": log_range(1e-4, 1e-2), "epochs": {"value": 6}}
    code, out, err = cli(
        "s.json", "--enqueue", "known.json", sweep_=spec(run_cap=1, parameters=parameters)
    )
    assert (code, err) == (0, "") and "known.json: epochs = 5: the sweep's is 6" in out
    assert events(cli.folder, "new")[0]["params"] == {"lr": 0.0005, "epochs": 6}


def test_brackets_train_no_epoch_twice(cli):
    code, _, err = cli(
        "s.json", sweep_=spec(early_terminate={"type": "brackets", "eta": 2}, run_cap=8)
    )
    assert code == 0, err
    length = {e["trial"]: len(e["history"]) for e in events(cli.folder, "epochs")}
    assert sorted(length.values()) == [1, 1, 1, 1, 2, 2, 4, 8]
    values = {e["trial"]: e["history"] for e in events(cli.folder, "epochs")}
    assert values[max(length, key=length.get)][0] == max(h[0] for h in values.values())


def test_a_stopped_trial_goes_on_from_its_checkpoint(cli):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    assert cli("s.json", sweep_=spec(early_terminate=rule))[0] == 0
    stopped = [e["trial"] for e in events(cli.folder, "judged") if e["verdict"]["stop"]]
    assert stopped
    code, _out, _ = cli("runs/s", "--continue-trial", stopped[0])
    assert code == 0
    last = events(cli.folder, "epochs")[-1]
    assert (last["trial"], len(last["history"])) == (stopped[0], 8)
    assert "has no trial 99" in cli("runs/s", "--continue-trial", 99)[2]


def test_a_crash_is_tried_again_and_out_of_memory_is_not(cli):
    assert cli("s.json", sweep_=spec(run_cap=2), FAULT="once")[0] == 0
    assert len(events(cli.folder, "crashed")) == 2 and not events(cli.folder, "failed")
    code, _out, _ = cli("s.json", "--name", "m", sweep_=spec(run_cap=6), FAULT="oom")
    failed = [
        e
        for e in map(json.loads, (cli.folder / "runs/m/state.jsonl").open())
        if e["event"] == "failed"
    ]
    assert code == 0 and failed and failed[0]["why"] == "out of memory"
    assert failed[0]["tail"] == ["CUDA out of memory"]
    assert "| out of memory |" in (cli.folder / "runs/m/report.md").read_text()


def test_three_failures_in_a_row_stop_the_sweep(cli):
    code, _, err = cli("s.json", sweep_=spec(), FAULT="always")
    assert code == 2 and "three trials failed in a row" in err and len(err.splitlines()) == 1
    assert len(events(cli.folder, "failed")) == 3
    assert "broken cable" in events(cli.folder, "failed")[0]["tail"][-1]
    assert cli("s.json")[0] == 0  # mended: what went before does not condemn the sweep
    assert len(events(cli.folder, "finished")) == 3
    assert cli("runs/s", "--continue-trial", 2, FAULT="once")[0] == 0  # with retries of its own
    assert events(cli.folder, "finished")[-1]["trial"] == 2


def test_bad_input_is_one_line_before_the_first_run(cli):
    cases = [
        (spec(parameters={}), "parameters"),
        (spec(run_cap=0), "run_cap"),
        (spec(parameters={"rl": {"min": 0.0, "max": 1.0}}), "--rl"),
        (spec(parameters={"lr": log_range(0, 1)}), "logarithm"),
    ]
    for bad, word in cases:
        code, _, err = cli("s.json", sweep_=bad)
        assert code == 2 and word in err and len(err.splitlines()) == 1
        assert not list(cli.folder.glob("runs/*/trial-*"))
    code, _, err = cli("none.json")
    assert code == 2 and "none.json" in err
    cli("s.json", "--lr=3", sweep_=spec(parameters={"lr": log_range(1e-4, 1)}))
    (cli.folder / "runs/taken").mkdir(parents=True)
    (cli.folder / "runs/taken/hparams.json").write_text("{}")
    for flags, word in [
        (["s.json", "--lr=3"], "--lr"),
        (["s.json", "--seeds", "3"], "--seeds"),
        (["s.json", "--fold", "all"], "--fold"),
        (["s.json", "--print-hparams"], "--print-hparams"),
        (["s.json", "--name", "a/b"], "--name"),
        (["s.json", "--name=.."], "--name"),
        (["s.json", "--name=taken"], "taken"),
        (["s.json", "--lancher=x"], "--launcher"),
        (["--lancher", "s.json"], "--launcher"),
        (["--status=x", "--htm=y"], "--html"),
        (["--data", "s.json"], "--data=s.json"),
        (["/tmp", "--continue-trial=1"], "/tmp"),
    ]:
        code, _, err = cli(*flags)
        assert code == 2 and word in err and len(err.splitlines()) == 1, (flags, err)
        assert not list(cli.folder.glob("runs/*/trial-*"))


def test_a_metric_that_never_arrives_stops_after_the_first_trial(cli):
    code, _, err = cli("s.json", sweep_=spec(metric={"name": "val/f1", "goal": "maximize"}))
    assert code == 2 and "f1" in err and "hmean_lo" in err
    assert len(events(cli.folder, "new")) == 1


def test_the_interval_is_of_the_metric(tmp_path):
    (tmp_path / "trial-001").mkdir()
    (tmp_path / "trial-001/log.csv").write_text(
        "loss,seconds,hmean,hmean_lo,hmean_hi\n2,9,.5,.4,.6"
    )
    for name, value, low in (("hmean", 0.5, 0.4), ("loss", 2, math.nan)):
        state = sweep.Sweep(tmp_path, spec(metric={"name": name}), 8, [sweep.Trial(1, {})])
        values, rows = sweep.read_rows(state, state.trials[0])
        assert values == [value] and rows[0][0] == 9
        assert rows[0][1] == low or math.isnan(low) and math.isnan(rows[0][1])


@pytest.mark.parametrize("line", ["1,high\n", "1\n", '1,"0.\xff'])
def test_a_damaged_log_is_named(tmp_path, line):
    state = sweep.Sweep(tmp_path, spec(metric={"name": "hmean"}), 8, [sweep.Trial(1, {})])
    log = tmp_path / "trial-001/log.csv"
    log.parent.mkdir()
    log.write_bytes(("epoch,hmean\n" + line).encode("latin1"))
    with pytest.raises(ValueError, match="log.csv.*damaged.*remove it"):
        sweep.read_rows(state, state.trials[0])


def test_a_folder_of_another_space_and_a_second_sweep_are_refused(cli):
    assert cli("s.json", sweep_=spec(run_cap=1))[0] == 0
    other = spec(parameters={"lr": log_range(1e-4, 1e-3)})
    code, _, err = cli("s.json", sweep_=other)
    assert code == 2 and "other parameters" in err
    assert cli("s.json", sweep_=spec(run_cap=2))[0] == 0  # a larger cap is the same sweep
    held = files.lock(cli.folder / "runs/s/lock")
    code, _, err = cli("s.json")
    assert code == 2 and "another sweep is running" in err
    assert "a sweep is running" in cli("--status", "runs/s")[1]
    held.close()
    assert cli("s.json")[0] == 0


def test_a_full_disk_leaves_the_state_whole(cli, monkeypatch):
    assert cli("s.json", sweep_=spec(run_cap=1))[0] == 0
    state = sweep.read_sweep(cli.folder / "runs/s")
    path = state.folder / "state.jsonl"
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        state.write("crashed", state.trials[0])
    assert path.read_bytes() == before and state.trials[0].crashes == 0


def test_a_disk_that_fills_up_stops_the_sweep_and_loses_nothing(cli):
    runs, page = cli.folder / "runs", os.sysconf("SC_PAGE_SIZE")
    runs.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", runs]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        assert cli("s.json", sweep_=spec(run_cap=2, early_terminate={"type": "pause"}))[0] == 0
        calm = outcome(cli.folder)
        shutil.rmtree(runs / "s")
        for pages in (0, 2, 4, 6):
            free = os.statvfs(runs).f_bavail
            (runs / "filler").write_bytes(bytes(page * (free - pages)))
            code, _, err = cli("s.json")
            (runs / "filler").unlink()
            if code == 0 and pages > 2:
                break
            assert code == 2 and "No space left" in err and len(err.splitlines()) == 1
            assert not list(runs.glob("s/.*"))
        assert cli("s.json")[::2] == (0, "") and outcome(cli.folder) == calm
        assert not events(cli.folder, "crashed", "failed")
    finally:
        subprocess.run(["umount", "--lazy", runs], check=True)


class Page(html.parser.HTMLParser):
    """The attributes of a page's circles, its text and whether its tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.circles, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.circles += [dict(attrs)] if tag == "circle" else []
        assert not any(k in ("src", "href") for k, _ in attrs) and tag != "script"
        if tag not in ("meta", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag == "html" or tag == self.open.pop()

    def handle_data(self, data):
        self.text += data


def browse(path):
    """The page's DOM as headless Chromium has it; empty where there is none (Debian: chromium)."""
    browser = shutil.which("chromium")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --dump-dom"
    user = f"--user-data-dir={path.parent / 'user'}"
    command = [browser, *flags.split(), user, path.as_uri()]
    return browser and subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def check_page(folder, text):
    """The page's points are the state's last values, and its text has the best one."""
    page = Page(text)
    last = {str(e["trial"]): e["history"][-1] for e in events(folder, "epochs")}
    ends = {str(e["trial"]) for e in events(folder, "finished")}
    assert page.open == []
    shown = {(c["data-trial"], float(c["data-value"]), c["data-state"]) for c in page.circles}
    assert shown == {(t, v, "finished" if t in ends else "stopped") for t, v in last.items()}
    best = max(ends, key=last.get)
    assert f"{100 * last[best]:.2f}" in page.text and "Stopped early" in page.text


def test_report_of_the_published_sweep(cli):
    code, out, _ = cli("--report", ROOT / "hparams/history_v5inrfwe.json")
    assert code == 0 and (cli.folder / "runs/history_v5inrfwe/report.md").read_text() == out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| all, each")]
    assert [rows[0][i] for i in (1, 2, 3, 4)] == ["12", "95.35", "96.215", "2.94"]
    assert [rows[1][i] for i in (1, 2, 3, 4)] == ["11", "96.20", "96.230", "0.255"]
    assert "expected at +1.59 sd from their mean; found at +1.57 sd" in out
    counts = dict(
        line.strip("| ").split(" | ")[:2]
        for line in out.splitlines()
        if line.startswith(("| 20 |", "| 22 |", "| 24 |"))
    )
    assert counts == {"24": "5", "22": "5", "20": "2"}
    for name in ("lr", "weight_decay"):
        line = next(x for x in out.splitlines() if x.startswith(f"**{name}**"))
        assert "No rank correlation" in line
    finished, stopped = out.split("## Stopped early")[0], out.split("## Stopped early")[1]
    assert "96.60" not in finished and "| 8 | 10 | 96.60 |" in stopped


@pytest.mark.parametrize(
    "key, value",
    [
        ("number", "<script>"),
        ("number", 7),
        ("state", "done"),
        ("value", None),
        ("value", "high"),
        ("epoch", 10**9),
        ("epoch", -1),
        ("params", {}),
        ("params", []),
    ],
)
def test_a_history_that_is_none_is_refused(cli, key, value):
    record = json.loads((ROOT / "hparams/history_v5inrfwe.json").read_text())
    record["trials"][2][key] = value
    (cli.folder / "h.json").write_text(json.dumps(record))
    code, _, err = cli("--report", "h.json")
    assert code == 2 and "h.json" in err and len(err.splitlines()) == 1


def test_names_from_a_file_are_no_markup():
    state = sweep.Sweep(Path("s"), spec(parameters={"<b>": {"min": 0.0, "max": 1.0}}), 1, [])
    for n in range(1, 9):
        state.trials.append(sweep.Trial(n, {"<b>": n / 9}, "finished", [n / 9], [[1.0, 0.1, 0.2]]))
    blocks = list(sweep.Report(state).blocks())
    assert "<b>" not in report.page("s", blocks).replace("<b>&lt;b&gt;</b>", "")


def test_wandb_form(cli):
    ours = spec(early_terminate={"type": "pause"}, seed=3)
    code, out, err = cli("s.json", "--wandb", sweep_=ours)
    form = json.loads(out)
    assert code == 0 and form["program"] == "train.py" and "early_terminate" not in form
    assert "seed" in err and "pause" in err


def test_wandbs_client_reads_the_shipped_sweep_as_it_is(cli):
    """It reads YAML, where 5e-05 is a string."""
    pytest.importorskip("wandb", reason="pip install wandb")
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution as validate
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    path = ROOT / "hparams/sweep_lr_wd.json"
    data = json.loads(path.read_text())
    assert load_sweep_config(path) == data and validate(data)["program"] == "train.py"
    (cli.folder / "form.yaml").write_text(cli(path, "--wandb")[1])
    assert load_sweep_config(cli.folder / "form.yaml") == data


def test_a_wandb_sweep_with_dotted_names_and_macros(cli):
    """As exported: nested and dotted names, the command's macros ignored, its own words kept."""
    words = ["${env}", "${interpreter}", "${program}", "--weight-decay=0.5", "${args}"]
    parameters = {
        "models.optimizer.lr": log_range(1e-4, 1e-2),
        "models": {"parameters": {"scheduler": {"parameters": {"T_max": {"value": 7}}}}},
    }
    code, _, err = cli("s.json", sweep_=spec(run_cap=1, command=words, parameters=parameters))
    hparams = json.loads((cli.folder / "runs/s/trial-001/hparams.json").read_text())
    assert (code, err, hparams["T_max"], hparams["weight_decay"]) == (0, "", 7, 0.5)
    assert 1e-4 < hparams["lr"] < 1e-2


def test_environment_variables_in_a_command(cli):
    words = [
        "${env}",
        "python",
        "train.py",
        "--device",
        "${envvar:WHERE}",
        "${args_json_file}",
        "--weight-decay=0.${envvar:TENTHS}",
        "${args_no_boolean_flags}",
    ]
    code, _, err = cli("s.json", sweep_=spec(run_cap=1, command=words), WHERE="cpu", TENTHS="5")
    hparams = json.loads((cli.folder / "runs/s/trial-001/hparams.json").read_text())
    assert (code, err, hparams["weight_decay"]) == (0, "", 0.5)
    assert (cli.folder / "runs/s/trial-001/log.csv").read_text().strip().endswith(",cpu")
    code, _, err = cli("s.json", WHERE="cpu")
    assert code == 2 and "TENTHS is not set" in err and cli("--status", "runs/s")[0] == 0


@pytest.mark.parametrize("name", ["sweep_lr_wd", "sweep_narrow", "sweep_refined"])
def test_what_wandbs_agent_calls_is_what_train_py_takes(name):
    """The agent's own code makes the command line of the sweep's middle point."""
    pytest.importorskip("wandb", reason="pip install wandb")
    from wandb.sdk.launch.sweeps import utils

    data = json.loads((ROOT / "hparams" / f"{name}.json").read_text())
    cube = space.Cube(space.parse_space(data))
    params = cube.decode(np.full(len(cube.free), 0.5)) | {"ema": False}
    args = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in params.items()}})
    for form in ("args", "args_no_hyphens", "args_no_boolean_flags"):
        words = [w if w.startswith("--") else f"--{w}" for w in args[form]]
        command = [sys.executable, ROOT / data["program"], *words, "--print-hparams"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        without = {"ema"} if form == "args_no_boolean_flags" else set()
        assert {k: json.loads(out)[k] for k in params.keys() - without} == {
            k: v for k, v in params.items() if k not in without
        }


def test_what_has_no_effect_is_named(cli):
    out = cli(
        "s.json",
        sweep_=spec(
            run_cap=1,
            program="train.py",
            project="receipts",
            early_terminate={"type": "hyperband", "min_iter": 4, "s": 2},
        ),
    )[1]
    assert "without effect here: program, project" in out
    assert "s is ignored beside min_iter" in out
    out = cli("s.json", "--name=m", sweep_=spec(run_cap=1, metric={"name": "hmean"}))[1]
    assert "metric hmean is minimised" in out
