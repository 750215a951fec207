"""sweep.py: laws, Gaussian process, stopping rules against closed forms; then the command line."""

import csv
import dataclasses
import html.parser
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, browse, events, log_range, outcome, small_disk, wait_for

import bayes
import files
import findings
import interval
import report
import space
import sweep
from command import trainer_parser

PUBLISHED = ROOT / "hparams/history_v5inrfwe.json"
PACKAGE = ROOT / "tests/data/sweeps"  # what W&B's sweeps 0.3.0 decides

# A trainer with a closed-form score, best at lr 10^-3.2; FAULT makes it fail as train.py does.
TRAINER = """
import csv, json, math, os, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
folder, lr, epochs = "runs/" + given["name"], float(given["lr"]), int(given.get("epochs", 22))
fault = os.environ.get("FAULT", "")
def fail(code, line):
    sys.exit(print(line, file=sys.stderr) or code)
if int(given.get("size", 32)) % 32:
    fail(2, "error: flags: size is not a multiple of 32")
if fault in ("1", "2"):
    fail(int(fault), "error: DATA: no such folder; give one")
if "--resume" in sys.argv:
    assert json.load(open(folder + "/hparams.json"))["lr"] == given["lr"]
else:
    os.makedirs(folder)
    with open(folder + "/t", "w") as f:
        json.dump(given, f)
    os.replace(folder + "/t", folder + "/hparams.json")
log = folder + "/log.csv"
rows = list(csv.DictReader(open(log))) if os.path.exists(log) else []
seen = folder + "/seen"
if fault == "elsewhere" and not os.path.exists(seen):
    open(seen, "w")
    fail(2, f"error: {folder}: another process is training there")
for e in range(len(rows) + 1, (int(given["stop-epoch"]) or epochs) + 1):
    time.sleep(float(os.environ.get("SLOW", "0")))
    if fault == "once" and e == 3 and not os.path.exists(seen):
        open(seen, "w")
        os.kill(os.getpid(), 9)
    if fault == "oom" and lr > 1e-3:
        fail(3, "error: out of memory")
    if fault == "always":
        raise RuntimeError("broken cable")
    v = .96 - .02 * (math.log10(lr) + 3.2) ** 2 - .3 * math.exp(-e / 1.6)
    v = {"zero": 0, "nan": math.nan}.get(fault, v)
    device = given.get("device", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    rows.append({"epoch": e, "loss": 1 / e, "hmean": v, "hmean_lo": v - .002, "hmean_hi": v + .002,
                 "seconds": 36, "device": device,
                 "sharing": os.environ.get("TRIALS_SIDE_BY_SIDE")})
    with open(log + ".t", "w") as f:
        w = csv.DictWriter(f, rows[0].keys())
        w.writeheader()
        w.writerows(rows)
    os.replace(log + ".t", log)
"""


def spec(**more):
    parameters = {"optim.lr": log_range(1e-4, 1e-2), "T_max": {"values": [20, 22, 24]}}
    base = {"method": "bayes", "metric": {"name": "val/hmean", "goal": "maximize"}, "run_cap": 6}
    return {**base, "parameters": parameters, **more}


def short(**more):
    """A sweep for the trainer above: 8 epochs."""
    sweep_ = spec(**more)
    return {**sweep_, "parameters": {**sweep_["parameters"], "epochs": {"value": 8}}}


# ---------------------------------------------------------------- distributions


def samples(entry_, n=2000):
    dim = space.parse_dimension("x", entry_)
    return dim, np.array([dim.value(u) for u in (np.arange(n) + 0.5) / n])


NORMAL = space.normal_cdf


def law(distribution, *numbers, q=None):
    keys = space.DISTRIBUTIONS[distribution].split()
    values = dict(zip(keys, numbers)) | ({} if q is None else {"q": q})
    return {"distribution": distribution, **values}


LAWS = [
    ({"min": 2.0, "max": 5.0}, lambda x: (x - 2) / 3),
    (law("uniform", 2, 5), lambda x: (x - 2) / 3),
    (law("log_uniform", -2, 3), lambda x: (math.log(x) + 2) / 5),
    (law("log_uniform_values", 1e-3, 10), lambda x: math.log10(x * 1e3) / 4),
    (law("normal", 3, 2), lambda x: NORMAL((x - 3) / 2)),
    (law("log_normal", 1, 0.5), lambda x: NORMAL((math.log(x) - 1) / 0.5)),
]


@pytest.mark.parametrize("given, cdf", LAWS, ids=[json.dumps(given) for given, _ in LAWS])
def test_continuous_law(given, cdf):
    dim, x = samples(given, 300)
    shares = (np.arange(300) + 0.5) / 300
    assert np.abs(np.array([cdf(v) for v in x]) - shares).max() < 1e-6
    assert np.abs([dim.encode(float(v)) - u for v, u in zip(x, shares)]).max() < 1e-6


STEPS = [
    (law("q_uniform", 0, 10, q=2), lambda x: x / 10),
    (law("q_uniform", 0.0, 1.0, q=0.1), lambda x: x),
    (law("q_log_uniform", 0, 4, q=5), lambda x: math.log(max(x, 1)) / 4),
    (law("q_log_uniform_values", 1, 100, q=10), lambda x: math.log10(max(x, 1)) / 2),
    (law("q_normal", 1, 2, q=0.5), lambda x: NORMAL((x - 1) / 2)),
    (law("q_log_normal", 0, 1, q=1), lambda x: NORMAL(math.log(max(x, 1e-9)))),
]


@pytest.mark.parametrize("given, cdf", STEPS, ids=[given["distribution"] for given, _ in STEPS])
def test_stepped_law_has_the_mass_between_its_steps(given, cdf):
    """The mass of a step is the continuous law's from half a step below it to half above; at the
    ends of a range the outer halves go to the steps inside it."""
    dim, x = samples(given, 20000)
    q = given["q"]
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
    dim = space.parse_dimension("x", {"values": [24, 20, 22]})
    assert [dim.encode(x) for x in (12, 16, 26)] == [-2, -1, 1.5]
    unknown = [dim.encode(x) for x in (21, 23, "a", "b")]
    assert len(set(unknown)) == 4 and -2 < min(unknown) and max(unknown) < -1
    assert dim.encode(21.0) == dim.encode(21)  # of an hparams file and of a sweep: one value
    dim = space.parse_dimension("x", {"values": ["a", "b"]})
    assert dim.encode(1.0) == dim.encode(1) != dim.encode(True) != dim.encode("True")
    dim = space.parse_dimension("x", log_range(5e-5, 6e-4))
    assert (dim.value(0.0), dim.value(1.0)) == (5e-5, 6e-4)  # as written


BAD_PARAMETERS = [
    ({}, "parameters"),
    ({"lr": {}}, "lr"),
    ({"lr": 3}, "lr"),
    ({"lr": {"min": 2.0, "max": 1.0}}, "must be less than"),
    ({"lr": log_range(0, 1)}, "logarithm"),
    ({"lr": {"distribution": "zipf", "min": 0, "max": 1}}, "zipf"),
    ({"lr": {"values": []}}, "values"),
    ({"lr": {"values": [1, 1.0]}}, "twice"),
    ({"lr": {"values": [[1], {}]}}, "not a list of numbers and words"),
    ({"lr": {"values": [1, 2], "probabilities": [0.5, 0.6]}}, "probabilities"),
    ({"lr": {"min": 0.0, "max": math.inf}}, "max"),
    ({"lr": {"min": "a", "max": 1}}, "min"),
    ({"lr": {"min": 0.0, "max": 1.0, "step": 0.1}}, "step"),
    ({"lr": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}}, "q"),
    ({"lr": {"distribution": "normal", "sigma": -1}}, "sigma"),
    ({"lr": {"distribution": "log_uniform", "min": 5e-5, "max": 5e4}}, "exponent"),
    ({"a.lr": {"value": 1}, "b.lr": {"value": 2}}, "twice"),
]


def test_what_is_not_used_here_is_refused_with_what_to_use_instead(tmp_path):
    for name, instead in (
        ("beta", "uniform or normal"),
        ("q_beta", "q_uniform or q_normal"),
        ("inv_log_uniform", "log_uniform with min -max and max -min"),
        ("inv_log_uniform_values", "log_uniform_values"),
    ):
        with pytest.raises(files.UsageError, match=f"'{name}'; use {instead}"):
            space.parse_dimension("x", {"distribution": name, "min": 1, "max": 2})
    path, words = tmp_path / "s.json", ["${env}", "python", "${program}", "${args_no_hyphens}"]
    for more in ("--size=960", "preset=a"):  # what the trials would lack
        files.write_json(path, spec(command=[*words, more]))
        with pytest.raises(files.UsageError, match=f"s.json: command: {more} is not used; give it"):
            sweep.load_spec(path)
    files.write_json(path, spec(command=words))
    assert sweep.load_spec(path)["command"] == words


def test_the_schema_is_that_of_wandbs_package():
    """The same sweeps are accepted and refused, but for what a sweep here needs or cannot use."""
    golden, ours, theirs = json.loads((PACKAGE / "schema.json").read_text()), [], []
    for change, accepted in golden["cases"]:
        try:
            space.check_spec({**golden["base"], **change})
            ours += [] if accepted else [change]
        except files.UsageError as error:
            theirs += [str(error)] if accepted else []
    laws = [x["parameters"]["a"]["distribution"] for x in ours if x != {"seed": 1}]
    assert {*laws} == {"log_uniform", "q_log_uniform"} and len(laws) == len(ours) - 1  # exponents
    words = {"sigma above 0": 4, "values is not a list": 1, "one value twice": 1, "needs steps": 1}
    assert {word: sum(word in line for line in theirs) for word in words} == words
    assert len(theirs) == sum(words.values())


def test_keys_without_effect_are_accepted_and_unknown_ones_refused():
    assert all(space.check_spec(spec(**{key: "x"})) for key in space.NO_EFFECT)
    with pytest.raises(files.UsageError, match="'run_capp'; did you mean run_cap"):
        space.check_spec(spec(run_capp=1))


BAD_SWEEPS = [
    ({"run_cap": 0}, "run_cap"),
    ({"method": "anneal"}, "method"),
    ({"metric": {"name": "x", "goal": "up"}}, "goal"),
    ({"metric": {"name": "x", "target": "high"}}, "target"),
    ({"metric": {"name": "x", "gaol": "maximize"}}, "did you mean goal"),
    ({"early_terminate": {"type": "envelope"}}, "type"),
    ({"seed": -1}, "seed"),
    ({"early_terminate": {"type": "hyperband", "eta": 2}}, "min_iter"),
    ({"early_terminate": {"type": "hyperband", "min_iter": 3, "max_iter": 27}}, "max_iter and s"),
    ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "min_iter"),
    ({"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 1}}, "eta"),
    ({"early_terminate": {"type": "hyperband", "max_iter": 27, "s": 2000}}, "s is 2000"),
    ({"early_terminate": {"type": "hyperband", "min_iter": 3, "patience": 5}}, "patience"),
    ({"early_terminate": {"type": "pause", "bands": 3}}, "bands is 3"),
    ({"early_terminate": {"type": "pause", "bands": [0]}}, "bands"),
    ({"early_terminate": {"type": "pause", "bands": []}}, "bands"),
    ({"replicate": "yes"}, "replicate: is 'yes'; give false, or true"),
    ({"replicate": True, "method": "random"}, "replicate: is True; give false"),
    ({"parameters": {"epochs": {"values": [5, 10]}}}, "epochs"),
    ({"early_terminate": {"type": "pause", "preserve_threshold": 96.6}}, "write 0.966"),
    ({"metric": {"name": "val/hmean", "target": 97}}, "a percentage; write 0.97"),
]
BAD_SWEEPS += [({"parameters": parameters}, word) for parameters, word in BAD_PARAMETERS]
STEPLESS = {"a\2": {"min": 0.0, "max": 1.0}}  # a name that would break the line of an error
BAD_SWEEPS += [({"method": "grid", "parameters": STEPLESS}, r"'a\\x02': method grid needs steps")]
REPLICAS = {"optim.lr": {"value": 1e-3}, "seed": {"values": [0, 1]}}
BAD_SWEEPS += [({"replicate": True, "parameters": REPLICAS}, "replicate sets it")]


@pytest.mark.parametrize("change, word", BAD_SWEEPS)
def test_a_sweep_that_is_none_is_refused_by_name(change, word):
    with pytest.raises(files.UsageError, match=word):
        space.check_spec(spec(**change))


@pytest.mark.parametrize("path", sorted((ROOT / "hparams").glob("sweep_*.json")))
def test_shipped_sweeps_in_wandb_form_are_what_the_package_accepted(path):
    golden, data = json.loads((PACKAGE / "schema.json").read_text()), json.loads(path.read_text())
    form, dropped = space.wandb_form(data)
    assert space.check_spec(data) and form == golden["shipped"][path.stem]
    assert (form == data) == (path.stem in golden["unchanged"]) == (not dropped)


# ---------------------------------------------------------------- stopping


def test_hyperbands_table():
    """Table 1 of Li et al. 2018, and by its formula the one of 243 epochs."""
    first = [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)]
    table = [first, first[1:], first[2:], [(6, 27), (2, 81)], [(5, 81)]]
    assert list(sweep.brackets(81, 3)) == table
    longer = [(n * 3, e) for n, e in first] + [(1, 243)]
    table = [longer, longer[1:], longer[2:], [(18, 27), (6, 81), (2, 243)], [(9, 81), (3, 243)]]
    assert list(sweep.brackets(243, 3)) == [*table, [(6, 243)]]


def test_brackets_judge_a_run_once_at_an_epoch():
    """With an eta under 2 several rungs round to one epoch; a run that was stopped there, between
    two of them, stayed pending for ever."""
    assert next(sweep.brackets(6, 1.5)) == [(5, 1), (2, 2), (1, 4), (1, 6)]
    rule = {"type": "brackets", "eta": 1.5}
    state = sweep.Sweep(None, short(early_terminate=rule, run_cap=5), 6, [])
    queue = [("", {"lr": 1e-3 * k, "T_max": 22, "epochs": 8}) for k in range(1, 6)]
    while job := sweep.next_job(state, queue):
        trial, target = job
        state.write("epochs", trial, history=[0.1 * trial.number] * target, rows=[])
        sweep.settle(state, trial)
    assert [t.state for t in state.trials] == ["stopped"] * 4 + ["finished"]


BANDS = [
    ({"min_iter": 10, "eta": 2, "s": 2}, [10, 20]),
    ({"min_iter": 15, "eta": 3}, [15]),
    ({"max_iter": 22, "eta": 2, "s": 2}, [5, 11]),
    ({"min_iter": 3}, [3, 9]),
    ({"max_iter": 27, "s": 2, "min_iter": 5}, [3, 9]),
]


@pytest.mark.parametrize("rule, bands", BANDS)
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


def test_wandbs_rule_against_the_package():
    cases = json.loads((PACKAGE / "hyperband.json").read_text())
    for case in cases:
        curves, rule = case["curves"], case["rule"]
        others = [curves[:i] + curves[i + 1 :] for i in range(len(curves))]
        stopped = [sweep.should_stop(c, o, rule) for c, o in zip(curves, others)]
        assert np.flatnonzero(stopped).tolist() == case["stopped"], rule
    assert sum(len(case["stopped"]) for case in cases) == 226


def test_preserve_threshold_is_in_the_metrics_units():
    rule = {"type": "hyperband", "min_iter": 1, "eta": 2, "preserve_threshold": 0.3}
    for goal, value in (("minimize", 0.29), ("maximize", 0.31)):
        ours = spec(metric={"name": "y", "goal": goal}, early_terminate=rule)
        state = sweep.Sweep(Path("s"), ours, 8, [])
        curve = [state.sign * value]
        better = [[curve[0] + 0.1 * k] for k in (1, 2, 3)]
        assert not sweep.judge(curve, better, state.rule, 8)["stop"]
        curve[0] -= 0.02
        assert sweep.judge(curve, better, state.rule, 8)["stop"]


def test_leader_is_never_stopped():
    rng = np.random.default_rng(0)
    rules = [{"type": "hyperband", "min_iter": 4, "eta": 4}, {"type": "pause", "epochs": 8}]
    rules.append({"type": "brackets", "epochs": 4})
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


def test_replay_of_the_published_sweep(capsys):
    sweep.run(["--replay", str(PUBLISHED)])
    out = capsys.readouterr().out
    assert "hyperband: stopped 5, 9, 10, 11, 12 at epoch 10; 6 at epoch 20. 62 of 264" in out
    assert "best run 8 kept" in out


@pytest.mark.parametrize("rule", ['{"type": "hyperband", "min_iter": 15, "eta": 3}', "a.yaml", "b"])
def test_replay_of_another_rule(rule, cli):
    (cli.folder / "a.yaml").write_text("early_terminate: {type: hyperband, min_iter: 15, eta: 3}")
    shutil.copy(ROOT / "hparams/sweep_refined.json", cli.folder / "b")
    out = cli("--replay", PUBLISHED, "--rule", rule)[1].splitlines()
    told = "5, 6, 9, 10, 11, 12 at epoch 15. 42 of 264 epochs saved (16%), best run 8 kept"
    assert out[1:] == [f"{rule}: stopped {told}"]
    for text, words in (
        ('{"type": "pause", "preserve_threshold": 96.5}', "0.965"),
        ("{", "--rule"),
    ):
        code = 1 if text == "{" else 2
        cli.refused("--replay", PUBLISHED, "--rule", text, words=[words], code=code)


# ---------------------------------------------------------------- command line


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Runs sweep.py's command line in a folder of its own with the trainer above: in this process,
    or apart, in one of its own."""
    trainer = tmp_path / "trainer.py"
    trainer.write_text(TRAINER)
    (tmp_path / "run.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sweep\n"
        f"sweep.TRAINER = [sys.executable, {str(trainer)!r}]\n"
        "sweep.AGAIN = 0.2\n"
        "sweep.usable_gpus = lambda devices: sum(int(device) < 8 for device in devices)\n"
        "sys.exit(sweep.main())\n"
    )
    monkeypatch.setattr(sweep, "TRAINER", [sys.executable, "-S", str(trainer)])
    monkeypatch.setattr(sweep, "AGAIN", 0.2)
    monkeypatch.setattr(
        sweep, "usable_gpus", lambda devices: sum(int(device) < 8 for device in devices)
    )
    monkeypatch.chdir(tmp_path)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def call(*args, apart=False, sweep_=None, **env):
        """Exit code, output and errors; the process if it is apart."""
        if sweep_ is not None:
            (tmp_path / "s.json").write_text(json.dumps(sweep_))
        if apart:
            command = [sys.executable, "run.py", *map(str, args)]
            pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            return subprocess.Popen(command, env={**os.environ, **env}, **pipes)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for key, value in env.items():
                patch.setenv(key, value)
            try:
                code = sweep.main([*map(str, args)])
            except SystemExit as ended:
                code = ended.code
        return code, *capsys.readouterr()

    def refused(*args, code=2, words=(), **options):
        """A call ends with this code and one line with these words."""
        got, _, err = call(*args, **options)
        assert got == code and len(err.splitlines()) == 1, (args, got, err)
        assert all(word in err for word in words), (words, err)

    call.folder, call.runs, call.refused = tmp_path, tmp_path / "runs/s", refused
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def devices(folder, column="device"):
    return [row[column] for row in csv.DictReader((folder / "log.csv").open())]


def test_a_sweep_from_start_to_report(cli):
    sweep_ = short(early_terminate={"type": "pause"})
    code, out, err = cli("s.json", "--weight-decay=0.5", sweep_=sweep_)
    assert (code, err) == (0, "")
    last = [e["history"][-1] for e in events(cli.runs, "epochs")]
    told = re.fullmatch(
        r"best hmean (0\.9\d+) expected of trial \d, luckiest (0\.\d+) of trial \d",
        out.splitlines()[-1],
    )
    assert told and told[2] == f"{max(last):.4f}" and float(told[1]) < float(told[2]) + 2e-3
    told = (cli.runs / "report.md").read_text()
    assert "## Finished trials" in told and "0.01 hours" not in told and " hours used, " in told
    assert "python train.py --weight-decay=0.5 --lr=" in told
    assert cli("--report", "runs/s", "--html", "page.html")[1] == told
    check_page(cli.runs, (cli.folder / "page.html").read_text())
    code, out, _ = cli("--status", "runs/s")
    assert code == 0 and "6 trials of 6" in out and "no sweep is running" in out
    assert "pause: stopped" in cli("--replay", "runs/s")[1]
    first = outcome(cli.runs)
    assert cli("s.json", "--weight-decay=0.5")[0] == 0 and outcome(cli.runs) == first
    check_page(cli.runs, browse(cli.folder / "page.html"))


def test_a_sweep_whose_output_is_closed_runs(cli, monkeypatch):
    """As `>&-` closes it, also in a job of cron's."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli("s.json", sweep_=short(run_cap=1))[::2] == (0, "")
    assert len(events(cli.runs, "finished")) == 1


def test_killed_at_any_moment_it_ends_like_the_undisturbed_sweep(cli):
    cli("s.json", sweep_=short(early_terminate={"type": "pause"}, run_cap=5))
    calm = outcome(cli.runs)
    (cli.folder / "runs").rename(cli.folder / "calm")
    for seen in ("trial-001/hparams.json", "trial-002/log.csv", "trial-003.log"):
        process = cli("s.json", apart=True, SLOW="0.05")
        wait_for(seen, (cli.runs / seen).exists)
        process.kill()
        process.communicate()
    with open(cli.runs / "state.jsonl", "a") as file:
        file.write('{"event": "finished", "tri')
    (cli.runs / ".report.md.123.tmp").write_text("# Swe")
    assert cli("s.json")[0] == 0
    assert outcome(cli.runs) == calm and not list(cli.runs.glob(".*"))


def test_interrupted_it_stops_its_trial_and_goes_on(cli):
    process = cli("s.json", apart=True, sweep_=short(run_cap=2), SLOW="0.5")
    wait_for("an epoch", (cli.runs / "trial-001/log.csv").exists)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].startswith("error: interrupted") and process.returncode == 130
    assert cli("s.json")[0] == 0
    assert [len(e["history"]) for e in events(cli.runs, "epochs")][-2:] == [8, 8]


def test_flags_are_corrected_before_the_first_epoch(cli):
    """A missing folder is no reason for a new name; where epochs are there it would be."""
    cli.refused("s.json", "--data=wrong", code=1, sweep_=short(run_cap=1), FAULT="1")
    assert cli("s.json", "--data=right")[::2] == (0, "")
    cli.refused("s.json", "--data=other", words=["holds trials with data right, which would"])


def test_a_parameter_taken_out_before_the_first_epoch_is_none_of_the_trials(cli):
    wide = short(run_cap=1)
    wide["parameters"]["clip"] = {"values": [3.0, 4.0, 5.0]}
    cli.refused("s.json", "--data=wrong", code=1, sweep_=wide, FAULT="1")
    assert "clip" in events(cli.runs, "new")[0]["params"]
    assert cli("s.json", "--data=right", sweep_=short(run_cap=1))[::2] == (0, "")
    assert "clip" not in cli("--status", "runs/s")[1]


def test_a_value_that_train_py_refuses_is_corrected_in_the_file(cli):
    """The error says to correct it: trials with such a value are given up, others go on."""
    sweep_ = short(method="grid", run_cap=9)
    sweep_["parameters"] |= {"lr": {"values": [1e-3, 2e-3]}, "T_max": {"value": 22}}
    del sweep_["parameters"]["optim.lr"]
    assert cli("s.json", sweep_=sweep_ | {"run_cap": 1})[0] == 0
    cli.refused("s.json", code=2, words=["correct that"], sweep_=sweep_, FAULT="2")
    cli.refused("s.json", code=2, words=["correct that"], FAULT="2")
    sweep_["parameters"]["lr"]["values"][1] = 3e-3
    assert cli("s.json", sweep_=sweep_)[::2] == (0, "")
    states = [(t.params["lr"], t.state) for t in sweep.read_sweep(cli.runs).trials]
    assert states == [(1e-3, "finished"), (2e-3, "failed"), (3e-3, "finished")]
    assert "taken out before it began" in (cli.runs / "report.md").read_text()


def test_a_sweep_repeats_itself_and_another_learns_from_its_replicas(cli):
    values = {"optim.lr": {"values": [1e-4, 1e-3, 1e-2]}, "epochs": {"value": 8}}
    sweep_ = {**spec(replicate=True, parameters=values), "early_terminate": {"type": "pause"}}
    code, out, err = cli("s.json", "--seed=5", "--parallel=2", sweep_=sweep_)
    assert (code, err) == (0, "")
    new = [e["params"] for e in events(cli.runs, "new")]
    again = {lr: [p["seed"] for p in new if "seed" in p and p["lr"] == lr] for lr in (1e-4, 1e-3)}
    assert len(new) == 6 and sum(map(len, again.values())) == 3 and again[1e-3]
    assert all(seeds == list(range(6, 6 + len(seeds))) for seeds in again.values())
    assert "lr=0.001 epochs=8 seed=6" in cli("--status", "runs/s")[1]
    code, _, err = cli("s.json", "--name=t", "--enqueue", "runs/s", "--known", sweep_=sweep_)
    assert (code, err) == (0, "")
    known = [e["params"] for e in events(cli.folder / "runs/t", "new") if "known" in e]
    # here, without that flag, the first run of a configuration needs its seed, too
    begun = [params | {"seed": params.get("seed", 5)} for params in new]
    assert sorted(map(str, known)) == sorted(map(str, begun))
    code, out, err = cli("s.json", "--wandb")
    assert code == 0 and "replicate" in err and "replicate" not in out


def test_a_replica_counts_on_from_the_sweeps_own_seed():
    state = sweep.Sweep(Path("s"), spec(parameters={"x": {"values": [1, 2, 3, 4]}}), 1, [])
    state.spec["replicate"], state.hparams = True, sweep.resolve(["--seed=5"])
    for n, x in enumerate((1, 2, 3, 4), 1):
        state.trials.append(sweep.Trial(n, {"x": x}, "finished", [0.9 - 0.01 * abs(x - 2)]))
    params, source = sweep.propose(state, ())
    assert source == "suggest" and params["seed"] == 6 and params["x"] in (1, 2, 3)


def test_workers_devices_and_the_launcher(cli):
    flags = ("--parallel", 2, "--devices", "4,7", "--launcher", "env X=1")
    assert cli("s.json", *flags, sweep_=short(), SLOW="0.02")[::2] == (0, "")
    assert len({json.dumps(e["params"]) for e in events(cli.runs, "new")}) == 6
    assert {devices(folder.parent)[0] for folder in cli.runs.glob("*/log.csv")} == {"4", "7"}
    for flags in (("--parallel=0",), ("--devices=1", "--parallel=2"), ("--launcher=none",)):
        cli.refused("s.json", "--name=m", *flags, words=[flags[-1].split("=")[0]])


@pytest.mark.parametrize(
    "given, words",
    [
        ("", "--devices: has ''; give GPUs, each once, such as 0,1"),
        ("a", "--devices: has 'a'"),
        ("0,", "--devices: has ''"),
        ("-1", "--devices: has '-1'"),
        ("0,1,0", "--devices: has '0'"),
        ("0,99", "--devices: there is no GPU 99 here"),
    ],
)
def test_devices_that_are_not_there_are_refused(cli, given, words):
    cli.refused("s.json", f"--devices={given}", sweep_=short(run_cap=1), words=[words])
    assert not (cli.folder / "runs").exists()


def test_a_launchers_devices_are_elsewhere(cli):
    flags = ("--devices=99", "--launcher=env")
    assert cli("s.json", *flags, sweep_=short(run_cap=1))[::2] == (0, "")


def test_cuda_says_which_devices_there_are():
    import torch

    count = torch.cuda.device_count()
    assert sweep.usable_gpus([str(k) for k in range(count)] + ["99"]) == count


def test_a_sweep_waits_for_its_own_trainers_alone():
    """It returns for one that has ended, and for one that another part has waited for already,
    while a child that is none of its trainers goes on."""
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    other = subprocess.Popen(sleeps)
    trainers = [subprocess.Popen(sleeps), subprocess.Popen([sys.executable, "-c", ""])]
    try:
        begin = time.monotonic()
        sweep.wait_for_one(trainers)
        assert [process.poll() for process in trainers] == [None, 0]
        sweep.wait_for_one(trainers)  # the second is reaped by now
        assert time.monotonic() - begin < 30 and other.poll() is None
    finally:
        for process in (other, trainers[0]):
            process.kill()
            process.wait()


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_trials_side_by_side_share_the_cores(cli, monkeypatch):
    """A trainer has its share of the cores for loading, unless a launcher places the trials."""
    assert cli("s.json", "--devices=0,1", sweep_=short(run_cap=1))[::2] == (0, "")
    assert devices(cli.runs / "trial-001", "sharing") == ["2"] * 8
    flags = ("--name=t", "--parallel=2", "--launcher=env")
    assert cli("s.json", *flags, sweep_=short(run_cap=1))[::2] == (0, "")
    assert devices(cli.folder / "runs/t/trial-001", "sharing") == [""] * 8

    import hparams
    import train

    def loaders(cores, **values):
        monkeypatch.setattr(train.cv2, "getNumberOfCPUs", lambda: cores)
        hp = hparams.Hparams(**values)
        device = types.SimpleNamespace(type="cuda")
        pages = types.SimpleNamespace(train=[])
        at_the_end = {"epoch": hp.epochs, "step": 0, "folder": None, "device": device}
        trainer = types.SimpleNamespace(hp=hp, pages=pages, **at_the_end)
        return train.make_loader(trainer, device).num_workers

    assert loaders(64) == 16
    monkeypatch.setenv("TRIALS_SIDE_BY_SIDE", "8")
    assert (loaders(64), loaders(4), loaders(64, workers=5)) == (7, 1, 5)  # one core is its own


def test_flags_that_are_no_hyperparameters_survive_a_pause(cli):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    sweep_ = short(early_terminate=rule, run_cap=1)
    assert cli("s.json", "--device=cpu", sweep_=sweep_)[::2] == (0, "")
    assert devices(cli.runs / "trial-001") == ["cpu"] * 8


@pytest.mark.parametrize("given", [{"min": 1e-4, "max": 1e-2}, {"min": 1, "max": 4000}])
def test_a_grid_without_steps_is_refused_before_the_first_trial(cli, given):
    """Also where a configuration is enqueued, which would train first."""
    (cli.folder / "h.json").write_text('{"lr": 1e-3}')
    sweep_ = short(method="grid", parameters={"batch": given, "lr": {"values": [1e-4, 1e-3]}})
    told = "s.json: parameters: batch: method grid needs steps, at most 1000; give values or q_*"
    cli.refused("s.json", "--enqueue", "h.json", sweep_=sweep_, words=[told])
    assert not (cli.folder / "runs").exists()


@pytest.mark.parametrize("name", ["seeds", "stop_epoch", "name"])
def test_what_the_sweep_sets_is_no_parameter(cli, name):
    """Trials with `seeds` would train in other folders and crash, the others have no effect."""
    parameters = {"lr": log_range(1e-4, 1e-2), name: {"value": 2}}
    told = f"parameters: {name}: is the sweep's to set; leave it out"
    cli.refused("s.json", sweep_=short(parameters=parameters), words=[told])
    assert not (cli.folder / "runs").exists()


def test_values_that_do_not_go_together_fail_their_trial_only(cli):
    """Neither the lowest, the highest nor the middle point shows that sizes are multiples of 32."""
    sizes = {"size": {"values": [64, 100, 96, 130, 128]}, "lr": log_range(1e-4, 1e-2)}
    code, _, err = cli("s.json", sweep_=short(parameters=sizes, run_cap=8, method="random"))
    refused = [e for e in events(cli.runs, "failed") if "multiple of 32" in e["why"]]
    assert (code, err) == (0, "") and 1 <= len(refused) == len(events(cli.runs, "failed"))
    assert len(events(cli.runs, "finished")) == 8 - len(refused)


@pytest.mark.parametrize(
    "parameters, flags, words",
    [
        (
            {"lr": (1e-4, 1e-2), "eta_min": (1e-5, 1e-3)},
            [],
            "eta_min = 0.001 is above lr = 0.0001; change",
        ),
        ({"lr": (1e-4, 1e-2)}, ["--eta-min=2e-4"], "eta_min = 0.0002 is above lr = 0.0001; change"),
        ({"lr": (1e-6, 1e-2)}, [], "eta_min = 1e-05 is above lr = 1e-06; change"),
        ({"eta_min": (1e-5, 1e-3)}, [], "eta_min = 0.001 is above lr = 0.0003; change"),
        (
            {"lr": [1e-2, 1e-5, 1e-3], "eta_min": [1e-6, 1e-4]},
            [],
            "eta_min = 0.0001 is above lr = 1e-05; change",
        ),
    ],
)
def test_rates_that_cross_are_refused_before_the_first_trial(cli, parameters, flags, words):
    ranges = {
        key: log_range(*x) if isinstance(x, tuple) else {"values": x}
        for key, x in parameters.items()
    }
    told = f"error: a trial of this sweep: {words}"
    cli.refused("s.json", *flags, sweep_=short(parameters=ranges), words=[told])
    assert not (cli.folder / "runs").exists()


def test_what_no_trial_can_take_is_named_with_its_file(cli):
    told = "error: a trial of this sweep: none.json: no such file; change the parameters or flags"
    cli.refused("s.json", "--hparams=none.json", sweep_=short(), words=[told])
    (cli.folder / "h.json").write_text('{"sizee": 96}')
    told = "h.json: unknown key 'sizee'; did you mean size?"
    cli.refused("s.json", "--hparams=h.json", words=[told])


def test_rates_that_do_not_cross_are_taken(cli):
    """Also where the flag alone would be above the default lr."""
    sweep_ = short(parameters={"lr": log_range(1e-3, 1e-2), "epochs": {"value": 8}}, run_cap=1)
    assert cli("s.json", "--eta-min=5e-4", sweep_=sweep_)[::2] == (0, "")


def test_a_sweep_that_ends_at_its_target_says_so(cli):
    """Else it stood there with one trial of six, and no word why."""
    metric = {"name": "hmean", "goal": "maximize", "target": 0.9}
    code, out, err = cli("s.json", sweep_=short(metric=metric))
    assert (code, err) == (0, "") and len(events(cli.runs, "new")) == 1
    assert "hmean has reached metric.target: no more trials\n" in out
    assert "target" not in cli("s.json", "--name=t", sweep_=short(metric=metric, run_cap=1))[1]


def test_a_sweep_of_zeros_says_why_in_its_last_line(cli):
    code, out, _ = cli("s.json", sweep_=short(run_cap=2), FAULT="zero")
    last = out.splitlines()[-1]
    assert code == 0 and last.startswith("best hmean 0 of all 2 trials: no text was found")
    assert "too few epochs (8)" in last and last.endswith("runs/s/trial-002.log")


@pytest.mark.parametrize("code", [1, 2])
def test_what_the_user_must_mend_stops_the_sweep_and_costs_no_trial(cli, code):
    words = ["trial 1: train.py stops: DATA: no such folder", "nothing is lost"]
    cli.refused("s.json", sweep_=short(run_cap=2), FAULT=str(code), code=code, words=words)
    assert not events(cli.runs, "failed", "crashed")
    assert cli("s.json")[0] == 0 and len(events(cli.runs, "finished")) == 2


def test_a_trainer_on_another_host_is_waited_for(cli):
    code, out, err = cli("s.json", sweep_=short(run_cap=2), FAULT="elsewhere")
    assert (code, err) == (0, "") and out.count("still runs on another host") == 2
    assert len(events(cli.runs, "finished")) == 2 and not events(cli.runs, "crashed")


def test_orphans_are_waited_for_each_on_its_device(cli):
    """Two trainers outlive their sweep, the first trial's on the second device: the next sweep
    goes on with each where it was, one as soon as the other."""
    process = cli("s.json", "--devices=4,7", apart=True, sweep_=short(run_cap=2), SLOW="60")
    for number in (1, 2):
        wait_for("a start", (cli.runs / f"trial-00{number}/hparams.json").exists)
    process.terminate()
    process.communicate()
    held = [files.lock(cli.runs / f"trial-00{number}.lock") for number in (1, 2)]
    for number, lock in enumerate(held):
        assert Path(lock.name).read_text() == str(number)
        Path(lock.name).write_text(str(1 - number))
    process = cli("s.json", "--devices=4,7", apart=True, SLOW="0.5")
    told = [process.stdout.readline() for _ in held]
    assert all("still runs from before" in line for line in told)
    path = cli.runs / "trial-002.lock"
    written = path.stat().st_mtime_ns
    held[1].close()  # and it goes on, for of two free devices either is right
    wait_for("trial 2 to go on", lambda: path.stat().st_mtime_ns > written)
    held[0].close()
    assert process.communicate()[1] == "" and process.returncode == 0
    for number, device in (1, "7"), (2, "4"):
        assert devices(cli.runs / f"trial-00{number}") == [device] * 8
    assert len(events(cli.runs, "finished")) == 2 and not events(cli.runs, "crashed")


def test_orphans_that_end_at_once_keep_their_devices(cli):
    """The sweep sleeps while both end, so that it sees two free devices."""
    sweep_ = short(run_cap=2, early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2})
    process = cli("s.json", "--devices=4,7", apart=True, sweep_=sweep_, SLOW="60")
    for number in (1, 2):
        wait_for("a start", (cli.runs / f"trial-00{number}/hparams.json").exists)
    process.terminate()
    process.communicate()
    held = [files.lock(cli.runs / f"trial-00{number}.lock") for number in (1, 2)]
    for number, lock in enumerate(held):
        Path(lock.name).write_text(str(1 - number))
    process = cli("s.json", "--devices=4,7", apart=True)
    for _ in held:
        process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text
    wait_for("both to wait", lambda: len(children().split()) == 2)
    process.send_signal(signal.SIGSTOP)
    for lock in held:
        lock.close()

    def ended(pid):
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()

    wait_for("both to end", lambda: all(map(ended, children().split())))
    process.send_signal(signal.SIGCONT)
    assert process.communicate()[1] == "" and process.returncode == 0
    for number, device in (1, "7"), (2, "4"):
        assert set(devices(cli.runs / f"trial-00{number}")) == {device}


def test_ctrl_c_does_not_reach_what_counts_gpus_or_waits_for_an_orphan(tmp_path, monkeypatch):
    """It goes to the processes of a terminal's session; these printed a traceback."""
    # a torch whose number of GPUs is the number of its session
    (tmp_path / "torch.py").write_text(
        "import os\nclass cuda:\n    device_count = lambda: os.getsid(0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert sweep.usable_gpus(["0"]) != os.getsid(0)

    state = sweep.Sweep(tmp_path, short(), 8, [])
    trial = sweep.Trial(1, {})
    with files.lock(tmp_path / "trial-001.lock"):
        assert sweep.adopt(state, trial)
        assert os.getsid(trial.process.pid) != os.getsid(0)
    assert trial.process.wait() == 0


def test_ctrl_c_while_the_packages_load_is_one_line(tmp_path):
    (tmp_path / "numpy.py").write_text("import time\nprint('loads', flush=True)\ntime.sleep(60)")
    command = [sys.executable, ROOT / "sweep.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
    assert process.stdout.readline() == "loads\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "error: interrupted; nothing has begun\n")


def test_without_locks_there_is_no_other_sweep(tmp_path, monkeypatch):
    """Some network file systems have none."""

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", none)
    assert files.lock(tmp_path / "lock") is not None


def test_the_status_of_a_folder_that_can_only_be_read_is_shown(cli, monkeypatch):
    assert cli("s.json", sweep_=short(run_cap=1))[0] == 0

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(sweep, "lock", refuse)
    code, out, err = cli("--status", "runs/s")
    assert (code, err) == (0, "") and "1 finished" in out and "perhaps a sweep is running" in out


def test_the_state_is_not_read_wrongly_when_a_line_is_missing(cli):
    assert cli("s.json", sweep_=short(run_cap=2))[0] == 0
    path = cli.runs / "state.jsonl"
    lines = path.read_text().splitlines(True)
    assert '"trial": 1,' in lines[1]
    none = lines[1].replace('"trial": 1,', '"trial": 0,')
    for rest in (lines[1:], lines[:1] + lines, [lines[0], none]):
        path.write_text("".join(rest))
        words = ["state.jsonl: line", "a trial is missing, or there twice"]
        cli.refused("--status", "runs/s", code=1, words=words)


def written_sweep(folder):
    """A sweep of two trials that ran, with all that an event may hold, in runs/s."""
    path = folder / "runs/s"
    path.mkdir(parents=True)
    hparams = dataclasses.asdict(sweep.resolve(["--epochs=2"]))
    files.write_json(path / "sweep.json", {"sweep": spec(), "extra": [], "hparams": hparams})
    state = sweep.read_sweep(path)
    result = {"state": "finished", "history": [0.8, 0.9], "rows": [], "recorded": True}
    result["known"] = True
    state.write("new", number=1, params={"lr": 1e-3, "T_max": 20}, known=result)
    state.write("new", number=2, params={"lr": 2e-3, "T_max": 22}, source="suggest")
    trial = state.trials[1]
    state.write("crashed", trial, code=1, tail=["x"])
    state.write("epochs", trial, history=[0.7], rows=[[1.0, 0.6, math.nan]])
    verdict = sweep.judge([0.7], [[0.8]], {"type": "hyperband", "min_iter": 1, "eta": 2}, 2)
    state.write("judged", trial, verdict=verdict)
    state.write("continued", trial, whole=False, why="chance")
    state.write("stopped", trial, why="waits")
    state.write("continued", trial, whole=True, why="--continue-trial")
    state.write("epochs", trial, history=[0.7, math.nan], rows=[[1.0, 0.6, 0.8]] * 2)
    state.write("failed", trial, why="non-finite metric", tail=[])
    return path / "state.jsonl"


def use(path):
    """All that reads a sweep's state."""
    state = sweep.read_sweep(path.parent)
    sweep.run(["--status", str(path.parent)])
    found = findings.Findings(state, bayes.fit_gp, bayes.Posterior)
    report.page("s", list(report.sweep_blocks(found)))
    sweep.next_job(sweep.Sweep(None, state.spec, state.epochs, [*state.trials]), ())


@pytest.mark.parametrize(
    "number, change, words",
    [
        (2, lambda e: e | {"params": [1]}, "params is [1]"),
        (2, lambda e: e | {"params": {"lr": 1}}, "trial 2 is pending, params {'lr': 1}, rows ()"),
        (3, lambda e: [math.nan], "it is [nan]"),
        (3, lambda e: e | {"event": "finish"}, "event 'finish' is unknown"),
        (3, lambda e: e | {"event": ["new"]}, "event is ['new']"),
        (3, lambda e: e | {"event": "finished"}, "trial 2 is finished without a value"),
        (4, lambda e: e | {"history": ["high"]}, "history is 'high'"),
        (
            4,
            lambda e: e | {"rows": [[1.0]]},
            "trial 2 is pending, params {'lr': 0.002, 'T_max': 22}, rows [[1.0]]",
        ),
        (5, lambda e: e | {"verdict": {"stop": True}}, "rule is None"),
        (5, lambda e: e | {"trial": 7}, "a trial is missing, or there twice"),
        (1, lambda e: e | {"known": {"state": "finished"}}, "history is None"),
        (1, lambda e: e | {"known": e["known"] | {"state": "done"}}, "trial 1 is done, params"),
    ],
)
def test_a_damaged_state_is_named_with_its_line(tmp_path, cli, number, change, words):
    path = written_sweep(tmp_path)
    use(path)
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(change(json.loads(lines[number - 1])))
    path.write_text("\n".join(lines) + "\n")
    told = [f"runs/s/state.jsonl: line {number}: ", words, "; correct it or put back a copy"]
    cli.refused("--status", "runs/s", code=1, words=told)


def places(value, path=()):
    """Paths of all values in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def put(value, path, wrong):
    """A JSON value with another one at a path."""
    if not path:
        return wrong
    value = value.copy()
    value[path[0]] = put(value[path[0]], path[1:], wrong)
    return value


def test_no_damage_of_the_state_ends_in_a_traceback(tmp_path, capsys):
    path = written_sweep(tmp_path)
    lines = path.read_text().splitlines()
    refused = 0
    for number, line in enumerate(lines):
        event = json.loads(line)
        for place, wrong in itertools.product(places(event), ([1], None, "x", {}, -1, math.nan)):
            changed = json.dumps(put(event, place, wrong))
            path.write_text("\n".join([*lines[:number], changed, *lines[number + 1 :]]) + "\n")
            try:
                use(path)
            except files.DataError as error:
                assert "state.jsonl: line " in str(error), error
                refused += 1
    assert refused > 200


def test_a_value_that_is_not_finite_fails_its_trial_after_a_kill_too():
    state = sweep.Sweep(None, spec(), 2, [sweep.Trial(1, {}, history=[0.5, math.nan])])
    sweep.settle(state, state.trials[0])
    assert (state.trials[0].state, state.trials[0].why) == ("failed", "non-finite metric")


@pytest.mark.parametrize("given", ["run8", "sweep_lr_wd", "list"])
def test_what_is_not_a_sweep_cannot_be_replayed(cli, given):
    (cli.folder / "list.json").write_text("[1]")
    path = "list.json" if given == "list" else ROOT / f"hparams/{given}.json"
    told = f"{path}: is a sweep file, or another file without trials; give runs/NAME of a sweep"
    cli.refused("--replay", path, words=[told])


def test_what_cannot_be_enqueued_leaves_nothing_behind(cli):
    (cli.folder / "other.yaml").write_text(json.dumps(spec()))
    told = "other.yaml: is a sweep file; give hparams, runs/NAME of a sweep that ran, or a history"
    sweep_ = short(run_cap=1)
    cli.refused("s.json", "--enqueue", "other.yaml", sweep_=sweep_, words=[told])
    cli.refused("s.json", "--enqueue", "other.yaml", "--known", words=[told])
    cli.refused("s.json", "--enqueue", "none.json", words=["none.json: no such file"])
    (cli.folder / "known.json").write_text('{"lr": 0.0005}')
    cli.refused("s.json", "--enqueue", "known.json", "--known", words=["no hmean of 8 epochs"])
    assert not (cli.folder / "runs").exists()


def test_enqueued_configurations_come_first(cli):
    """Outside the space they are tried and said to be; what the sweep holds constant stays."""
    (cli.folder / "known.json").write_text('{"lr": 0.0005, "T_max": 24, "epochs": 5}')
    (cli.folder / "wide.json").write_text('{"lr": 0.05}')
    code, out, _ = cli("s.json", "--enqueue", "known.json", "wide.json", sweep_=short(run_cap=3))
    assert code == 0 and "wide.json: lr = 0.05 outside the space" in out
    assert "known.json: epochs = 5 outside the space: constants stay the sweep's" in out
    tried = [tuple(e["params"].values()) for e in events(cli.runs, "new")]
    assert tried[:2] == [(0.0005, 24, 8), (0.05, 22, 8)]
    for text, words in (('{"weight_dekay": 1}', "weight_decay"), ('{"lr": "fast"}', "a number")):
        (cli.folder / "typo.json").write_text(text)
        cli.refused("s.json", "--name=t", "--enqueue", "typo.json", words=["typo.json", words])


def test_a_history_is_enqueued_best_first(cli):
    sweep_ = json.loads((ROOT / "hparams/sweep_lr_wd.json").read_text()) | {"run_cap": 2}
    sweep_["parameters"]["epochs"] = {"value": 3}
    sweep_.pop("early_terminate")
    code, out, _ = cli("s.json", "--enqueue", PUBLISHED, sweep_=sweep_)
    assert code == 0 and "trial 8: epochs = 22 outside the space: constants stay" in out
    tried = [e["params"]["lr"] for e in events(cli.runs, "new")]
    best = sorted(sweep.read_sweep(PUBLISHED).trials, key=lambda t: -t.history[-1])
    assert tried == [t.params["lr"] for t in best[:2]]


def history(n=6, **more):
    """A history of the trainer above: dotted names, values, and one trial that does not fit."""
    lrs = [1e-4 * 10 ** (2 * k / n) for k in range(n)] + [0.5]
    values = [0.96 - 0.02 * (math.log10(lr) + 3.2) ** 2 for lr in lrs]
    trials = [
        {"number": k, "params": {"a.lr": lr, "b.T_max": 22}, "value": v, "state": "finished"}
        | {"epoch": 8}
        for k, (lr, v) in enumerate(zip(lrs, values), 1)
    ]
    return {"sweep": spec(parameters={"a.lr": {"value": 1}}), "epochs": 8, "trials": trials, **more}


def test_a_past_sweep_of_another_goal_is_enqueued_by_its_own(cli):
    """A sweep of hmean tried the configurations with the highest loss first."""
    past = history()
    past["sweep"] |= {"metric": {"name": "loss", "goal": "minimize"}}
    for trial in past["trials"]:
        trial["value"] = 1 - trial["value"]
    (cli.folder / "h.json").write_text(json.dumps(past))
    assert cli("s.json", "--enqueue", "h.json", sweep_=short(run_cap=2))[0] == 0
    numbers = [e["source"].split()[-1] for e in events(cli.runs, "new")]
    assert numbers == ["3", "4"]


def test_known_trials_are_results_and_do_not_run(cli):
    (cli.folder / "h.yaml").write_text(json.dumps(history()))
    words = ("s.json", "--enqueue", "h.yaml", "--known")
    code, out, err = cli(*words, sweep_=short(run_cap=2))
    assert (code, err) == (0, "") and "h.yaml: trial 7: lr = 0.5 outside the space: left out" in out
    new = events(cli.runs, "new")
    assert [("known" in e) for e in new] == [True] * 6 + [False] * 2
    assert {p.name for p in cli.runs.glob("trial-*/")} >= {"trial-007", "trial-008"}
    assert not (cli.runs / "trial-001").exists()
    best = 10**-3.2
    assert abs(math.log10(new[-1]["params"]["lr"] / best)) < 0.5  # it knows where to look
    assert "6 trials are known; run_cap counts new ones only, 8 are all in all\n" in out
    assert "8 trials of 8, 6 known, beside run_cap, 8 finished" in cli("--status", "runs/s")[1]
    assert "Trials 1, 2, 3, 4, 5, 6 ran elsewhere." in (cli.runs / "report.md").read_text()
    first = outcome(cli.runs)
    assert cli(*words)[0] == 0 and outcome(cli.runs) == first

    assert (
        cli("s.json", "--name=t", "--enqueue", "runs/s", "--known", sweep_=short(run_cap=1))[0] == 0
    )
    learnt = events(cli.folder / "runs/t", "new")
    assert len(learnt) == 9 and len(learnt[0]["known"]["history"]) == 8
    for text, words in (
        (history(epochs=9), "h.yaml: no hmean of 8 epochs; drop --known"),
        ({"lr": 1e-3}, "h.yaml: no hmean of 8"),
    ):
        (cli.folder / "h.yaml").write_text(json.dumps(text))
        cli.refused("s.json", "--name=u", "--enqueue", "h.yaml", "--known", words=[words])


def test_known_trials_of_another_hparams_file_are_said_to_be(cli):
    """Its name is the same, and so are all words of the command."""
    words = ("s.json", "--hparams=base.json")
    (cli.folder / "base.json").write_text('{"size": 640}')
    assert cli(*words, sweep_=short(run_cap=1))[0] == 0
    words += ("--enqueue", "runs/s", "--known")
    assert "warning" not in cli(*words, "--name=t")[1]
    (cli.folder / "base.json").write_text('{"size": 960, "workers": 1}')
    out = cli(*words, "--name=u")[1]
    assert "warning: runs/s: its trials had other flags: size = 640\n" in out


def test_a_sweep_that_is_given_itself_has_its_trials_once(cli):
    """They would be replicas without noise, and stay in its state."""
    assert cli("s.json", sweep_=short(run_cap=2))[0] == 0
    code, out, err = cli("s.json", "--enqueue", "runs/s", "--known")
    assert (code, err) == (0, "") and "0 trials are known" in out
    assert len(events(cli.runs, "new")) == 2


def test_trials_are_known_only_where_they_had_the_values_that_the_sweeps_trials_have(cli):
    """Also those that the sweep's file does not name."""
    past = history()
    for trial, more in zip(past["trials"], ({"clip": 1}, {"clip": 5.0}, {"size": 64}, {"odd": 1})):
        trial["params"] |= more
    (cli.folder / "h.yaml").write_text(json.dumps(past))
    code, out, err = cli("s.json", "--enqueue", "h.yaml", "--known", sweep_=short(run_cap=1))
    assert (code, err) == (0, "") and "4 trials are known" in out
    for words in ("trial 1: clip = 1 outside the space", "trial 3: size = 64 outside the space"):
        assert f"h.yaml: {words}: left out" in out


def test_enqueued_trials_have_the_values_of_their_sweeps_flags(cli):
    """And what the sweep cannot take over from them is named."""
    assert cli("s.json", "--name=p", "--clip=2", "--neck=64", sweep_=short(run_cap=1))[0] == 0
    wider = short(run_cap=1)
    wider["parameters"]["clip"] = {"min": 1.0, "max": 9.0}
    assert cli("s.json", "--enqueue", "runs/p", sweep_=wider)[::2] == (0, "")
    assert events(cli.runs, "new")[0]["params"]["clip"] == 2
    (cli.folder / "known.json").write_text('{"lr": 0.0005, "size": 64, "name": "x"}')
    out = cli("s.json", "--name=t", "--enqueue", "known.json", sweep_=wider)[1]
    assert "known.json: size = 64 outside the space: constants stay the sweep's" in out
    (cli.folder / "tuned.json").write_text('{"lr": 0.0005, "tuned": "0a,0b", "text_height": 9}')
    out = cli("s.json", "--name=u", "--enqueue", "tuned.json", sweep_=wider)[1]
    assert "outside the space" not in out  # of what a run has written nothing is chosen


def test_known_paused_trials_do_not_run_either(cli):
    """They have no checkpoint here: to go on with one would be to train it from its first epoch."""
    past = history()
    past["trials"][0] |= {"state": "stopped", "epoch": 5, "value": 0.99}
    (cli.folder / "h.yaml").write_text(json.dumps(past))
    sweep_ = short(run_cap=3, early_terminate={"type": "pause"})
    code, out, err = cli("s.json", "--enqueue", "h.yaml", "--known", sweep_=sweep_)
    assert (code, err) == (0, "") and "trial 1 goes on" not in out
    assert min(e["trial"] for e in events(cli.runs, "epochs")) == 7
    cli.refused("runs/s", "--continue-trial", 1, words=["has no trial 1 that can go on"])


def test_trials_known_by_their_last_value_are_the_ones_to_beat_but_have_no_curve():
    """A history has no curves: no gain is learnt from it, and its best value still counts."""
    params = {"lr": 1e-3, "T_max": 22, "epochs": 8}
    known = [sweep.Trial(5, params, "finished", [0.98] * 8, recorded=False)]
    whole = [[0.8, 0.86, 0.9, 0.92, 0.93, 0.94, 0.95, 0.95 + 0.001 * k] for k in range(3)]
    own = [sweep.Trial(k, params, "finished", curve) for k, curve in enumerate(whole, 1)]
    paused = sweep.Trial(4, params, "stopped", [0.8, 0.86])
    state = sweep.Sweep(Path("s"), short(early_terminate={"type": "pause"}), 8, [*own, paused])
    curves = sweep.whole_curves(state, state.trials)
    chance = findings.Findings(state, bayes.fit_gp, bayes.Posterior).trials[3].chance
    state.trials += known
    assert sweep.whole_curves(state, state.trials)[:4] == curves
    found = findings.Findings(state, bayes.fit_gp, bayes.Posterior)
    assert found.trials[3].chance < 0.01 and chance > 0.2
    assert sweep.revive(state) is None


def test_a_percentage_in_a_history_is_refused(tmp_path):
    data = history()
    data["trials"][1]["value"] = 96.6
    (tmp_path / "h.json").write_text(json.dumps(data))
    with pytest.raises(
        files.UsageError, match="trial 2: 96.6 looks like a percentage; write 0.966"
    ):
        sweep.read_sweep(tmp_path / "h.json")


def test_brackets_train_no_epoch_twice(cli):
    rule = {"type": "brackets", "eta": 2}
    code, _, err = cli("s.json", sweep_=short(early_terminate=rule, run_cap=8))
    assert code == 0, err
    values = {e["trial"]: e["history"] for e in events(cli.runs, "epochs")}
    assert sorted(map(len, values.values())) == [1, 1, 1, 1, 2, 2, 4, 8]
    assert max(values.values(), key=len)[0] == max(h[0] for h in values.values())


def test_brackets_pause_no_finished_trial(cli):
    """One that --continue-trial took to its end is judged at the rung of a bracket that is filled
    later, and stays finished."""
    rule = {"type": "brackets", "eta": 2}
    assert cli("s.json", sweep_=short(early_terminate=rule, run_cap=3))[0] == 0
    number = next(e["trial"] for e in events(cli.runs, "judged") if e["verdict"]["stop"])
    assert cli("runs/s", "--continue-trial", number)[0] == 0
    assert cli("s.json", sweep_=short(early_terminate=rule, run_cap=8))[0] == 0
    state = sweep.read_sweep(cli.runs)
    assert {t.state for t in state.trials if len(t.history) == 8} == {"finished"}


def test_a_paused_trial_that_takes_the_place_of_a_failed_one_is_under_way():
    """After a kill only trials under way are looked for: as a paused one, its trainer was started a
    second time, into a lock that the first one held, and the sweep ended in a traceback."""
    rule = {"type": "brackets", "eta": 2}
    state = sweep.Sweep(None, short(early_terminate=rule, run_cap=7), 8, [])
    order = []
    while job := sweep.next_job(state, ()):
        trial, rung = job
        assert trial.state == "pending"
        order.append(trial.number)
        if order == [*range(1, 8), 7]:  # the best of seven, of which three go on
            state.write("failed", trial, why="out of memory")
            continue
        state.write("epochs", trial, history=[0.1 * trial.number] * rung, rows=[])
        sweep.settle(state, trial)
    assert order == [*range(1, 8), 7, 6, 5, 4, 6, 6]
    assert [t.state for t in state.trials] == ["stopped"] * 5 + ["finished", "failed"]


def test_brackets_are_filled_with_new_trials_alone(cli):
    """Known ones are results: none runs, none is judged, and brackets are as without them."""
    (cli.folder / "h.yaml").write_text(json.dumps(history()))
    words = ("s.json", "--enqueue", "h.yaml", "--known")
    rule = {"type": "brackets", "eta": 2}
    assert cli(*words, sweep_=short(early_terminate=rule, run_cap=8))[::2] == (0, "")
    assert {e["trial"] for e in events(cli.runs, "epochs", "judged")} == {*range(7, 15)}
    lengths = [len(t.history) for t in sweep.read_sweep(cli.runs).trials[6:]]
    assert sorted(lengths) == [1, 1, 1, 1, 2, 2, 4, 8]


def test_a_stopped_trial_goes_on_from_its_checkpoint(cli):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    assert cli("s.json", sweep_=short(early_terminate=rule))[0] == 0
    stopped = [e["trial"] for e in events(cli.runs, "judged") if e["verdict"]["stop"]]
    cli.runs.rename(cli.folder / "elsewhere")
    cli.runs.symlink_to(cli.folder / "elsewhere")
    cli.refused("elsewhere", "--continue-trial", 1, words=["is not a sweep's folder in ./runs"])
    assert cli("runs/s", "--continue-trial", stopped[0])[0] == 0
    last = events(cli.runs, "epochs")[-1]
    assert (last["trial"], len(last["history"])) == (stopped[0], 8)
    cli.refused("runs/s", "--continue-trial", 99, words=["has no trial 99"])


def test_a_trial_whose_values_are_not_finite_cannot_go_on(cli):
    """Its checkpoint holds them, too: to go on would be to end at once, without a word."""
    assert cli("s.json", sweep_=short(run_cap=1), FAULT="nan")[0] == 1
    assert events(cli.runs, "failed")[0]["why"] == "non-finite metric"
    cli.refused("runs/s", "--continue-trial", 1, words=["has no trial 1 that can go on; see --st"])


def test_a_crash_is_tried_again_and_out_of_memory_is_not(cli):
    assert cli("s.json", sweep_=short(run_cap=2), FAULT="once")[0] == 0
    assert len(events(cli.runs, "crashed")) == 2 and not events(cli.runs, "failed")
    assert cli("s.json", "--name", "m", sweep_=short(), FAULT="oom")[0] == 0
    failed = events(cli.folder / "runs/m", "failed")
    assert {e["why"] for e in failed} == {"out of memory"}
    assert failed[0]["tail"] == ["error: out of memory"]
    assert "| out of memory |" in (cli.folder / "runs/m/report.md").read_text()


def test_what_brings_no_finished_trial_ends_with_code_1(cli):
    """So that a script does not go on with it."""
    wide = short(run_cap=2, parameters={"lr": log_range(2e-3, 1e-2), "epochs": {"value": 8}})
    code, out, err = cli("s.json", sweep_=wide, FAULT="oom")
    assert (code, err) == (1, "") and out.splitlines()[-1] == "no trial finished"
    code, out, err = cli("runs/s", "--continue-trial", 1, FAULT="oom")
    assert (code, err) == (1, "") and "trial 1 failed, out of memory" in out
    assert cli("runs/s", "--continue-trial", 1)[0] == 0
    assert cli("s.json")[0] == 0


def test_three_failures_in_a_row_stop_the_sweep(cli):
    cli.refused("s.json", sweep_=short(), FAULT="always", code=1, words=["three trials failed"])
    assert len(events(cli.runs, "failed")) == 3
    assert len(events(cli.runs, "crashed")) == 6  # a traceback is no explanation
    assert "broken cable" in events(cli.runs, "failed")[0]["tail"][-1]
    assert cli("s.json")[0] == 0  # mended: what went before does not condemn the sweep
    assert len(events(cli.runs, "finished")) == 3
    assert cli("runs/s", "--continue-trial", 2, FAULT="once")[0] == 0  # with retries of its own
    assert events(cli.runs, "finished")[-1]["trial"] == 2


def test_bad_input_is_one_line_before_the_first_run(cli):
    for bad, *words in (
        (spec(parameters={}), "s.json", "parameters"),
        (spec(run_cap=0), "run_cap"),
        (spec(parameters={"rl": {"min": 0.0, "max": 1.0}}), "parameters: rl", "no such flag"),
        (spec(parameters={"lr": log_range(0, 1)}), "logarithm"),
        (spec(parameters={"lr": log_range(1e-3, 100)}), "lr = 100.0", "1e-12 to 10"),
        (spec(parameters={"size": {"values": [64, 100, 128]}}), "size = 100", "multiple of 32"),
        (spec(parameters={"amp": {"value": "fp8"}}), "amp = 'fp8'", "fp16"),
    ):
        cli.refused("s.json", sweep_=bad, words=words)
        assert not (cli.folder / "runs").exists()
    cli.refused("none.json", words=["none.json"])
    (cli.folder / "s.json").write_text(json.dumps(spec(parameters={"lr": log_range(1e-4, 1)})))
    (cli.folder / "runs/taken").mkdir(parents=True)
    (cli.folder / "runs/taken/hparams.json").write_text("{}")
    for words, word in (
        (["s.json", "--lr=3"], "--lr"),
        (["s.json", "lr=3"], "lr=3; use --lr=3"),
        (["a.b.lr=3"], "a.b.lr=3: no such file; for a flag write --lr=3"),
        (["s.json", "--known"], "--known: has no effect with a run, it belongs to enqueue"),
        (["--replay=x", "--parallel=2"], "--parallel: has no effect with replay"),
        (["--report=x", "--replay=y"], "--replay: has no effect with report"),
        (["--report=x", "--devices=1"], "--devices: has no effect with report"),
        (["s.json", "--seeds", "3"], "--seeds"),
        (["s.json", "--fold", "all"], "fold = 'all'"),
        (["s.json", "--print-hparams"], "--print-hparams"),
        (["s.json", "--name", "a/b"], "--name"),
        (["s.json", "--name=.."], "--name"),
        (["s.json", "--name=taken"], "taken"),
        (["s.json", "--lancher=x"], "did you mean --launcher"),
        (["s.json", "--weight_dekay=1"], "did you mean --weight-decay"),
        (["s.json", "--weight-decay=11"], "weight_decay = 11.0"),
        (["--lancher", "s.json"], "--launcher"),
        (["--status=x", "--htm=y"], "--html"),
        (["--data", "s.json"], "--data: expected one argument"),
        (["--image_dir", "s.json"], "--image-dir: expected one"),
        (["/tmp", "--continue-trial=1"], "/tmp"),
        (["s.yaml"], "s.yaml: no such file"),
        (["runs/taken"], "runs/taken: is a folder; give its sweep file, or add --continue-trial"),
    ):
        cli.refused(*words, words=[word])
        assert [p.name for p in (cli.folder / "runs").iterdir()] == ["taken"]


@pytest.mark.parametrize("name", ["val/f1", "test/hmean", "val_hmean", "val/Hmean"])
def test_a_metric_that_train_py_does_not_write_is_refused(cli, name):
    words = [f"s.json: metric: train.py writes no {name}; but hmean, precision"]
    words += ["did you mean hmean?"] * (name != "val/f1")
    cli.refused("s.json", sweep_=short(metric={"name": name}), words=words)
    assert not (cli.folder / "runs").exists()


def test_the_metrics_known_are_those_that_train_py_writes():
    import mirrors
    import train

    assert {name + key for key, name in space.LOGGED.items()} == {
        *mirrors.tagged(dict.fromkeys(train.COLUMNS))
    }


def logged(folder, metric, text):
    """A sweep in this folder that has one trial with this log.csv."""
    (folder / "trial-001").mkdir()
    (folder / "trial-001/log.csv").write_bytes(text.encode("latin1"))
    return sweep.Sweep(folder, spec(metric={"name": metric}), 8, [sweep.Trial(1, {})])


@pytest.mark.parametrize("name, value, low", [("hmean", 0.5, 0.4), ("loss", 2, math.nan)])
def test_the_interval_is_of_the_metric(tmp_path, name, value, low):
    state = logged(tmp_path, name, "loss,seconds,hmean,hmean_lo,hmean_hi\n2,9,.5,.4,.6")
    values, rows = sweep.read_rows(state, state.trials[0])
    assert values == [value] and rows == [pytest.approx([9, low, low + 0.2], nan_ok=True)]


@pytest.mark.parametrize("line", ["1,high\n", "1\n", '1,"0.\xff'])
def test_a_damaged_log_is_named(tmp_path, line):
    state = logged(tmp_path, "hmean", "epoch,hmean\n" + line)
    with pytest.raises(files.DataError, match="log.csv.*damaged.*remove it"):
        sweep.read_rows(state, state.trials[0])


def test_a_corrected_file_goes_on_where_trials_compare(cli):
    assert cli("s.json", sweep_=short(run_cap=1, metric={"name": "hmean"}))[0] == 0
    wider = {"optim.lr": log_range(1e-5, 1e-1), "T_max": {"values": [20, 22, 24, 26]}}
    metric = {"name": "val/hmean", "goal": "maximize"}
    rule = {"type": "pause", "bands": [2]}
    changed = short(run_cap=2, metric=metric, early_terminate=rule)
    changed["parameters"].update(wider)
    out = cli("s.json", sweep_=changed)[1]
    told = "runs/s goes on with another early_terminate, metric, parameters, run_cap"
    assert out.splitlines()[0] == told and len(events(cli.runs, "finished")) == 2
    for key, entry_ in (
        ("epochs", {"value": 9}),
        ("lr", {"value": 1e-3}),
        ("seed", {"values": [1, 2, 3]}),
    ):
        other = {**changed, "parameters": {**changed["parameters"], key: entry_}}
        other["parameters"].pop("optim.lr" if key == "lr" else "", None)
        cli.refused("s.json", sweep_=other, words=[f"holds trials with {key} ", "--name NEW"])
    other = {**changed, "metric": {"name": "loss"}}
    cli.refused("s.json", sweep_=other, words=["holds trials with metric hmean"])
    (cli.folder / "s.json").write_text(json.dumps(changed))
    told = ["holds trials with weight_decay 0.0001, which would", "--name NEW"]
    cli.refused("s.json", "--weight-decay=0.5", words=told)
    cli.refused("s.json", "--teacher=t.pt", words=["holds trials with teacher unset, which"])
    assert cli("s.json")[1].startswith("runs/s/report.md")


def test_trials_of_a_changed_hparams_file_do_not_compare(cli):
    """The flag names the same file, and new trials would have other values than those before."""
    given = cli.folder / "h.json"
    given.write_text('{"size": 96, "workers": 1}')
    assert cli("s.json", "--hparams=h.json", sweep_=short(run_cap=1))[0] == 0
    given.write_text('{"size": 128}')
    words = ["holds trials with size 96, which would not compare", "--name NEW"]
    cli.refused("s.json", "--hparams=h.json", sweep_=short(run_cap=2), words=words)
    given.write_text('{"size": 96}')
    assert cli("s.json", "--hparams=h.json")[0] == 0 and len(events(cli.runs, "new")) == 2


def test_a_constant_that_changes_nothing_may_be_added(cli):
    """Earlier trials had the same value by default or by a flag, or it changes no result."""
    assert cli("s.json", "--size=96", sweep_=short(run_cap=1))[0] == 0
    more = short(run_cap=2)
    more["parameters"] |= {"size": {"value": 96}, "clip": {"value": 5}, "workers": {"value": 1}}
    code, out, err = cli("s.json", sweep_=more)
    assert (code, err) == (0, "") and "goes on with another flags, parameters, run_cap" in out
    assert "2 trials of 2" in cli("--status", "runs/s")[1]
    state = sweep.Sweep(None, short(parameters={"seed": {"value": 5}}), 8, [])
    for number, params in enumerate(({"seed": 6}, {}), 1):  # a replica keeps its own seed
        trial = state.apply({"event": "new", "number": number, "params": params})
        assert trial.params["seed"] == 7 - number
    more["parameters"]["workers"] = {"values": [1, 2]}
    cli.refused("s.json", sweep_=more, words=["holds trials with workers unset, which would"])
    assert cli("--status", "runs/s")[0] == 0


def test_a_trial_without_an_epoch_takes_the_corrected_file_or_is_one_that_does_not_compare(cli):
    trial = cli.runs / "trial-001"
    other = short(run_cap=1)
    other["parameters"] |= {"epochs": {"value": 4}}
    wider = short(run_cap=1)
    wider["parameters"] |= {"clip": {"values": [1, 5]}}
    cli.refused("s.json", code=1, sweep_=short(run_cap=1), FAULT="1")
    cli.refused("s.json", sweep_=wider, words=["holds trials with clip 5.0, which would"])

    # a trial whose folder has its values has begun with them
    trial.mkdir()
    (trial / "hparams.json").write_text("{}")
    cli.refused("s.json", sweep_=other, words=["holds trials with epochs 8, which would"])
    (trial / "hparams.json").unlink()
    assert cli("s.json", sweep_=other)[::2] == (0, "")
    assert [len(e["history"]) for e in events(cli.runs, "epochs")] == [4]


def test_failed_trials_do_not_hold_a_sweep_to_their_values(cli):
    """After some ran out of memory, others with a smaller batch follow."""
    rates = short(parameters={"lr": {"min": 2e-3, "max": 9e-3}})
    code, _, err = cli("s.json", sweep_=rates, FAULT="oom")
    assert code == 1 and "three trials failed in a row" in err and "out of memory" in err
    assert cli("s.json", "--batch=2")[::2] == (0, "")
    assert len(events(cli.runs, "finished")) == 3


def test_a_corrected_hparams_file_is_that_of_the_trials_that_follow(cli):
    (cli.folder / "h.json").write_text('{"size": 96}')
    cli.refused("s.json", "--hparams=h.json", code=1, sweep_=short(run_cap=1), FAULT="1")
    (cli.folder / "h.json").write_text('{"size": 128}')
    assert cli("s.json", "--hparams=h.json")[::2] == (0, "")
    assert cli("s.json", "--hparams=h.json")[::2] == (0, "")


def test_flags_that_change_no_result_may_change(cli):
    assert cli("s.json", "--workers=8", sweep_=short(run_cap=1))[0] == 0
    out = cli("s.json", "--workers=2", "--cache", sweep_=short(run_cap=2))[1]
    assert "runs/s goes on with another flags, run_cap\n" in out
    workers = [
        json.loads((cli.runs / f"trial-00{n}/hparams.json").read_text())["workers"] for n in (1, 2)
    ]
    assert workers == ["8", "2"]
    data = json.loads((cli.runs / "sweep.json").read_text())
    assert data["extra"] == ["--workers=2", "--cache"]


def test_a_second_sweep_on_a_folder_is_refused(cli):
    assert cli("s.json", sweep_=short(run_cap=1))[0] == 0
    held = files.lock(cli.runs / "lock")
    cli.refused("s.json", words=["another sweep is running"])
    assert "a sweep is running" in cli("--status", "runs/s")[1]
    held.close()
    assert cli("s.json")[0] == 0


def test_a_full_disk_leaves_the_state_whole(tmp_path, monkeypatch):
    state = sweep.Sweep(tmp_path, spec(), 8, [])
    state.write("new", number=1, params={})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        state.write("crashed", state.trials[0])
    assert state.trials[0].crashes == 0  # whether or not the line is there: the sweep ends here


def test_a_disk_that_fills_up_stops_the_sweep_and_loses_nothing(cli):
    runs, page = cli.folder / "runs", os.sysconf("SC_PAGE_SIZE")
    with small_disk(runs, "4m") as mounted:
        if not mounted:
            pytest.skip("mounting a tmpfs needs root")
        sweep_ = short(run_cap=2, early_terminate={"type": "pause"})
        assert cli("s.json", sweep_=sweep_)[0] == 0
        calm = outcome(cli.runs)
        shutil.rmtree(cli.runs)
        for pages in (0, 2, 4, 6):
            free = os.statvfs(runs).f_bavail
            (runs / "filler").write_bytes(bytes(page * (free - pages)))
            code, _, err = cli("s.json")
            (runs / "filler").unlink()
            if code == 0 and pages > 2:
                break
            assert code == 1 and "No space left" in err and len(err.splitlines()) == 1
            assert not list(cli.runs.glob(".*"))
        assert cli("s.json")[::2] == (0, "") and outcome(cli.runs) == calm
        assert not events(cli.runs, "crashed", "failed")


def test_the_first_trial_is_named_without_torch(cli):
    """What a sweep's own process loads is small: nobody waits for torch to be told a typo."""
    text = (cli.folder / "run.py").read_text().replace("sys.exit(sweep.main())", "sweep.main()")
    told = "print('torch' in sys.modules)"
    (cli.folder / "run.py").write_text(text + told)
    out, _ = cli("s.json", apart=True, sweep_=short(run_cap=1)).communicate()
    out = out.splitlines()
    assert out[0].startswith("trial 1: --lr=") and out[-1] == "False"


class Page(html.parser.HTMLParser):
    """The attributes of a page's circles, its text and whether its tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.circles, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.circles += [dict(attrs)] if tag == "circle" else []
        assert not any(k in ("src", "href", "style") for k, _ in attrs) and tag != "script"
        if tag not in ("meta", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag == "html" or tag == self.open.pop()

    def handle_data(self, data):
        self.text += data


def check_page(runs, text):
    """The page's points are the state's last values, and its text has the best one."""
    page = Page(text)
    last = {str(e["trial"]): e["history"][-1] for e in events(runs, "epochs")}
    ends = {str(e["trial"]) for e in events(runs, "finished")}
    assert page.open == []
    shown = {(c["data-trial"], float(c["data-value"]), c["data-state"]) for c in page.circles}
    assert shown == {(t, v, "finished" if t in ends else "stopped") for t, v in last.items()}
    best = max(ends, key=last.get)
    assert f"{100 * last[best]:.2f}" in page.text and "Stopped early" in page.text


def test_report_of_the_published_sweep(cli):
    code, out, err = cli("--report", ROOT / "hparams/history_v5inrfwe.json")
    assert err == "written: runs/history_v5inrfwe/report.md\n"
    assert code == 0 and (cli.folder / "runs/history_v5inrfwe/report.md").read_text() == out
    lines = out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| all, each")]
    assert rows[0][1:5] == ["12", "95.35", "96.215", "2.94"]
    assert rows[1][1:5] == ["11", "96.20", "96.230", "0.255"]
    assert "expected at +1.63 sd from their mean; found at +1.57 sd" in out
    groups = ("| 20", "| 22", "| 24")
    groups = [line.strip("| ").split(" | ")[:2] for line in lines if line[:4] in groups]
    assert groups == [["20", "2"], ["22", "4"], ["24", "5"]]  # the ruined trial 1 left out
    assert "| 22 | 4 | 96.27 (" in out and "trial 1, far worse, left out" in out
    for name in ("lr", "weight_decay"):
        assert "No rank correlation" in next(x for x in lines if x.startswith(f"**{name}**"))
    finished, stopped = out.split("## Stopped early")
    assert "96.60" not in finished and "| 8 | 10 | 96.60 | not recorded | - | - |" in stopped
    assert "it is chance" not in out and out.count(": no importance is shown.") == 4


def test_a_report_has_the_sweeps_name_wherever_one_stands(cli, monkeypatch):
    assert cli("s.json", sweep_=short(run_cap=1))[0] == 0
    monkeypatch.chdir(cli.runs / "trial-001")
    assert cli("--report", "..")[1].startswith("# Sweep s\n")
    (cli.folder / "t").symlink_to(cli.runs)
    assert cli("--report", str(cli.folder / "t"))[1].startswith("# Sweep t\n")
    monkeypatch.chdir(cli.runs)
    assert cli("--report", ".")[1].startswith("# Sweep s\n")


def test_the_page_does_not_replace_the_report_that_is_written_with_it(cli):
    assert cli("s.json", sweep_=short(run_cap=1))[0] == 0
    told = (cli.runs / "report.md").read_text()
    words = ["report.md: is read by this command; write to another file"]
    cli.refused("--report", "runs/s", "--html", "runs/../runs/s/report.md", words=words)
    assert (cli.runs / "report.md").read_text() == told


def test_a_report_is_printed_where_it_cannot_be_written(cli):
    """As a folder that can only be read; --status shows such a one, too."""
    assert cli("s.json", sweep_=short(run_cap=1))[0] == 0
    (cli.runs / "report.md").unlink()
    (cli.runs / "report.md").mkdir()
    code, out, err = cli("--report", "runs/s", "--json", "--html", "page.html")
    assert code == 1 and json.loads(out)["name"] == "s" and len(err.splitlines()) == 1
    assert "report.md: Is a directory" in err and (cli.folder / "page.html").exists()


def test_a_report_names_its_unit_and_keeps_it(cli):
    """The console and --json have shares; the report has percent, also where the mouse points."""
    told = cli("--report", PUBLISHED, "--html", "page.html")[1]
    assert "bayes, hmean in percent, maximised; 12 trials" in told
    page = (cli.folder / "page.html").read_text()
    assert "<title>trial 8, stopped, 96.6, " in page and "stopped, 0.966" not in page
    assert cli("s.json", sweep_=short(run_cap=1, metric={"name": "loss"}))[0] == 0
    assert "bayes, loss, minimised" in cli("--report", "runs/s", "--html", "page.html")[1]
    assert "<title>trial 1, finished, 0.125, " in (cli.folder / "page.html").read_text()


def test_a_report_says_what_its_intervals_are_over_as_train_py_does(cli):
    """It said "over pages" where they were over groups, too narrow, or in sample."""
    sweep_ = short(run_cap=3)
    assert cli("s.json", sweep_=sweep_)[0] == 0
    assert "intervals: 95 %, over pages.\n" in cli("--report", "runs/s")[1]
    few = interval.Sample("groups", 4, narrow=True, seen={"trained": 2})
    for number, over in enumerate((interval.Sample("pages", 99, narrow=False), few, few), 1):
        score = interval.Score(0.9, 0.9, 0.9, [0.8, 0.95], over)
        with open(f"runs/s/trial-00{number}.log", "a") as log:
            print(f"epoch 1/1  {score}  3 s\nlast {score}; other {score}\nbest hmean 1", file=log)
    told = "over 4 groups, too narrow, in sample: trained on 2 of them; 99 pages.\n"
    assert f"intervals: 95 %, {told}" in cli("--report", "runs/s")[1]
    assert json.loads(cli("--report", "runs/s", "--json")[1])["over"] == told[5:-2]


def test_the_report_as_json(cli):
    code, out, _ = cli("--report", PUBLISHED, "--json")
    told = json.loads(out, parse_constant=lambda word: pytest.fail(word))
    assert code == 0 and told["first"]["number"] == 3 and told["ties"] == [3, 2]
    eighth = told["trials"][7]
    assert eighth["last"] == 0.966 and eighth["chance"] is eighth["final"]["mean"] is None
    assert eighth["expected"]["low"] < eighth["expected"]["mean"] < eighth["expected"]["high"]
    assert told["luck"]["n"] == 11 and len(told["importance"]) == len(told["names"]) == 4
    cli.refused(
        "s.json", "--json", words=["--json: has no effect with a run, it belongs to report"]
    )


HISTORY_FAULTS = [("number", "<script>"), ("number", 7), ("state", "done"), ("value", None)]
HISTORY_FAULTS += [("value", "high"), ("epoch", 10**9), ("epoch", -1), ("params", {})]
HISTORY_FAULTS += [("params", []), ("state", "pending"), ("value", math.nan)]


@pytest.mark.parametrize("key, value", HISTORY_FAULTS)
def test_a_history_that_is_none_is_refused(tmp_path, key, value):
    record = json.loads((ROOT / "hparams/history_v5inrfwe.json").read_text())
    record["trials"][2][key] = value
    (tmp_path / "h.json").write_text(json.dumps(record))
    with pytest.raises(files.DataError, match="h.json: trial 3: "):
        sweep.read_sweep(tmp_path / "h.json")


@pytest.mark.parametrize("key", ["extra", "notes"])
@pytest.mark.parametrize("value", [None, "one text", [1]])
def test_the_words_of_a_history_are_lists_of_texts(tmp_path, key, value):
    (tmp_path / "h.json").write_text(json.dumps(history() | {key: value}))
    with pytest.raises(files.DataError, match=f"h.json: {key} is "):
        sweep.read_sweep(tmp_path / "h.json")


def test_wandb_form(cli):
    ours = spec(early_terminate={"type": "pause"}, seed=3)
    code, out, err = cli("s.json", "--wandb", sweep_=ours)
    form = json.loads(out)
    assert code == 0 and form["program"] == "train.py" and "early_terminate" not in form
    assert "seed" in err and "pause" in err


def test_wandb_form_keeps_texts_that_look_like_numbers(cli):
    """Only numbers need a point before their exponent; a path with one would be another."""
    parameters = {"init": {"values": ["runs/a-7e12/last.pt", "b 3e.pt"]}, "lr": {"value": 5e-05}}
    ours = spec(method="grid", parameters=parameters, description="lr of 5e-4")
    code, out, _ = cli("s.json", "--wandb", sweep_=ours)
    assert code == 0 and json.loads(out)["parameters"] == parameters and '"value": 5.0e-05' in out
    assert json.loads(out)["description"] == "lr of 5e-4"


def test_wandbs_client_reads_the_shipped_sweep_as_it_is(cli):
    """It reads YAML, where 5e-05 is a string."""
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution as validate
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    path = ROOT / "hparams/sweep_lr_wd.json"
    data = json.loads(path.read_text())
    assert load_sweep_config(path) == data and validate(data)["program"] == "train.py"
    (cli.folder / "form.yaml").write_text(cli(path, "--wandb")[1])
    assert load_sweep_config(cli.folder / "form.yaml") == data


BASE = "metric: {name: val/hmean, goal: maximize}\n"
BATCH = "{distribution: q_log_uniform_values, q: 8, min: 8, max: 32}"
NARROW = "{distribution: normal, mu: 0.01, sigma: 1e-4}"
STOP = "early_terminate: {type: hyperband, s: 2, eta: 3, max_iter: 27}"
DOCS = [  # the forms that W&B's pages show
    ("method: random\nparameters: {optimizer: {parameters: {lr: {values: [.001, 1e-2]}}}}", 2),
    ("method: grid\nparameters:\n  lr:\n    values: [0.001, 1e-2]\n  seed: {value: 1}", 2),
    (f"method: bayes\nparameters:\n  lr: {{max: 1e-2, min: 1e-4}}\n  batch: {BATCH}", 1),
    (f"method: bayes\nparameters: {{lr: {NARROW}}}\n{STOP}", 1),
]


@pytest.mark.parametrize("text, runs", DOCS)
def test_sweeps_in_yaml_run(text, runs, cli):
    (cli.folder / "s.yaml").write_text(BASE + f"run_cap: {runs}\n" + text)
    code, out, err = cli("s.yaml", "--epochs=2", SLOW="0")
    assert (code, err) == (0, "") and len(events(cli.runs, "finished")) == runs, out


@pytest.mark.parametrize(
    "text, words",
    [
        ("method: bayes\nmetric: {name: validation_loss}\nparameters: {lr: {value: 1}}",
         "train.py writes no validation_loss; but hmean"),
        (BASE + "method: grid\nparameters: {epochs: {values: [5, 10, 15]}}", "epochs: varies"),
        (BASE + "method: random\nparameters: {learning_rate: {min: 1e-4, max: 0.1}}",
         "s.yaml: parameters: learning_rate: train.py has no such flag"),
        (BASE + "method: random\nparameters: {optimizer: {values: [adam, sgd]}}", "adam, adamw"),
        (BASE + "method: grid\nparameters: {a.T_Max: {values: [3, 5]}}", "did you mean T_max?"),
        (BASE + "method: grid\nmethod: grid", "key method comes twice"),
        ("- 1", "is not an object with a method"),
    ],
)  # fmt: skip
def test_a_yaml_sweep_that_cannot_run_is_refused_with_the_reason(text, words, cli):
    (cli.folder / "s.yaml").write_text(text)
    code = 1 if "twice" in words else 2
    cli.refused("s.yaml", words=[words], code=code)
    assert not (cli.folder / "runs").exists()


def test_no_option_of_the_sweep_hides_one_of_train_py():
    both = (p._option_string_actions.keys() for p in (sweep.make_parser(), trainer_parser()))
    assert set.intersection(*map(set, both)) == {"-h", "--help", "--name"}  # a trial's is given


def test_workers_are_the_loaders_and_said_to_be(cli):
    code, out, _ = cli("s.json", "--workers=8", sweep_=short(run_cap=1))
    assert code == 0
    assert (
        "--workers are the loader processes of each trial; trials side by side: --parallel" in out
    )
    assert json.loads((cli.runs / "trial-001/hparams.json").read_text())["workers"] == "8"


def test_nested_and_dotted_names_as_wandb_exports_them(cli):
    parameters = {
        "models.optimizer.lr": log_range(1e-4, 1e-2),
        "models": {"parameters": {"scheduler": {"parameters": {"T_max": {"value": 7}}}}},
    }
    assert cli("s.json", sweep_=short(run_cap=1, parameters=parameters))[::2] == (0, "")
    hparams = json.loads((cli.runs / "trial-001/hparams.json").read_text())
    assert hparams["T_max"] == "7" and 1e-4 < float(hparams["lr"]) < 1e-2


def test_a_name_with_hyphens_is_the_hyperparameter(cli):
    """To train.py --weight-decay and --weight_decay are the same, so they are to a sweep."""
    parameters = {"weight-decay": log_range(1e-5, 1e-3), "lr": log_range(1e-4, 1e-2)}
    both = {**parameters, "weight_decay": {"value": 1e-4}}
    cli.refused("s.json", sweep_=short(parameters=both), words=["weight_decay comes twice"])
    (cli.folder / "h.json").write_text('{"weight_decay": 1e-4, "lr": 1e-3}')
    sweep_ = short(parameters=parameters, run_cap=1)
    told = ["--weight-decay: is the sweep's to set"]
    cli.refused("s.json", "--weight-decay=0.5", sweep_=sweep_, words=told)
    code, out, _ = cli("s.json", "--enqueue", "h.json")
    assert code == 0 and "outside" not in out.replace("epochs = 22 outside", "")
    assert events(cli.runs, "new")[0]["params"]["weight_decay"] == 1e-4


@pytest.mark.parametrize("name", ["sweep_lr_wd", "sweep_narrow", "sweep_refined"])
def test_what_wandbs_agent_calls_is_what_train_py_takes(name):
    """The agent's own code makes the command line of the sweep's middle point."""
    from wandb.sdk.launch.sweeps import utils

    data = json.loads((ROOT / "hparams" / f"{name}.json").read_text())
    cube = space.Cube(space.parse_space(data))
    params = cube.decode(np.full(len(cube.free), 0.5)) | {"ema": False}
    args = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in params.items()}})
    for form in ("args", "args_no_hyphens", "args_no_boolean_flags"):
        words = [w if w.startswith("--") else f"--{w}" for w in args[form]]
        got = dataclasses.asdict(sweep.resolve(words))
        without = {"ema"} if form == "args_no_boolean_flags" else set()
        expected = {k: v for k, v in params.items() if k not in without}
        assert {k: got[k] for k in expected} == expected


def test_wandbs_agent_runs_a_dotted_sweep(cli, receipts, warm, monkeypatch):
    """`--wandb` of nested YAML, read and started by wandb's own code, trains by train.py."""
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution as validate
    from wandb.sdk.launch.sweeps.utils import load_sweep_config
    from wandb.wandb_agent import Agent

    (cli.folder / "s.yaml").write_text(f"""
method: bayes
metric: {{name: hmean, goal: maximize}}
parameters:
  models:
    parameters:
      optimizer: {{parameters: {{lr: {{distribution: log_uniform_values, min: 5e-4, max: 2e-3}}}}}}
      scheduler: {{parameters: {{T_max: {{values: [1, 2, 3]}}}}}}
  trainer.pretrained: {{value: none}}
  trainer.backbone: {{value: test_efficientnet}}
  trainer.data: {{value: {receipts}}}
  size: {{value: 64}}
  neck: {{value: 64}}
  epochs: {{value: 1}}
""")
    (cli.folder / "form.yaml").write_text(cli("s.yaml", "--wandb")[1])
    form = validate(load_sweep_config(cli.folder / "form.yaml"))
    assert form["metric"]["name"] == "val/hmean"
    dims = [space.parse_dimension(name, entry_) for name, entry_ in form["parameters"].items()]
    args = dict(zip(form["parameters"], ({"value": d.value(0.5)} for d in dims)))
    for key, value in {"DIR": str(cli.folder), "MODE": "offline", "SWEEP_ID": "x"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    for key in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # which the agent sets
        monkeypatch.setenv(key, "")
    python = cli.folder / "bin/python"  # as the agent finds it
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {" ".join(warm)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    agent = Agent(None, None, "x")
    agent._command_run({"program": str(ROOT / "train.py"), "run_id": "run7", "args": args})
    assert agent._run_processes["run7"].wait(120) == 0
    hparams = json.loads((cli.folder / "runs/run7/hparams.json").read_text())
    assert math.isclose(hparams["lr"], 1e-3) and hparams["T_max"] == 2 and hparams["size"] == 64
    assert list(cli.folder.glob("**/*run7*.wandb"))


def test_what_has_no_effect_is_named(cli):
    rule = {"type": "hyperband", "min_iter": 4, "s": 2}
    sweep_ = short(run_cap=1, program="train.py", project="receipts", early_terminate=rule)
    out = cli("s.json", sweep_=sweep_)[1]
    assert "without effect here: program, project, early_terminate.s\n" in out
    rule = {"type": "hyperband", "min_iter": 30}
    out = cli("s.json", "--name=b", sweep_=short(run_cap=1, early_terminate=rule))[1]
    assert "without effect here: early_terminate (no band before epoch 8)" in out
    rule = {"type": "brackets", "eta": 2, "epochs": 3, "preserve_threshold": 0.9, "revive": 1}
    out = cli("s.json", "--name=c", sweep_=short(run_cap=1, early_terminate=rule))[1]
    told = [f"early_terminate.{key}" for key in ("epochs", "preserve_threshold", "revive")]
    assert f"without effect here: {', '.join(told)}\n" in out
    out = cli("s.json", "--name=m", sweep_=short(run_cap=1, metric={"name": "hmean"}))[1]
    assert "metric hmean is minimised" in out


def test_suggest_can_be_taken_from_here():
    """As a plug-in path/sweep.py:suggest, for those who run other trainers."""
    assert sweep.suggest is bayes.suggest
