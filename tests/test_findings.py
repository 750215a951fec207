"""findings.py: projections, luck, importance; and the report that report.py makes of them."""

import itertools
import math
from pathlib import Path

import coverage_sweep
import numpy as np
import pytest
from conftest import ROOT, log_range

import bayes
import findings
import report
import space
import sweep

PUBLISHED = ROOT / "hparams/history_v5inrfwe.json"
LOSS = {"name": "train/loss", "goal": "minimize"}


def spec(**more):
    parameters = {"optim.lr": log_range(1e-4, 1e-2), "T_max": {"values": [20, 22, 24]}}
    base = {"method": "bayes", "metric": {"name": "val/hmean", "goal": "maximize"}, "run_cap": 6}
    return {**base, "parameters": parameters, **more}


def find(state):
    return findings.Findings(state, bayes.fit_gp, bayes.Posterior)


def text_of(found):
    return report.markdown(report.sweep_blocks(found))


def table_of(text, title):
    """Rows of cells of the table under a title."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]


# ---------------------------------------------------------------- values


def test_projection_recovers_a_gain_that_depends_on_the_level():
    """Finals .9; runs that lag have more to gain, exactly: no run is projected wrong."""
    curves = [[0.9 - g * (10 - e) / 10 for e in range(1, 11)] for g in np.linspace(0.01, 0.1, 10)]
    mean, sd = findings.project([0.9 - 0.07 * (10 - e) / 10 for e in range(1, 5)], curves, 10)
    assert abs(mean - 0.9) < 0.008 and sd < 0.03


@pytest.mark.parametrize(
    "order, rho, least", [("iid", 0.9, 0.88), ("mild", 0.9, 0.88), ("bo", 0.7, 0.7)]
)
def test_projections_are_as_sure_as_they_say(order, rho, least):
    """95 % intervals of the runs that the pause policy stopped; normal ones of half the spread
    covered .81 to .87, .78 to .85 and .66 to .70 of them."""
    assert coverage_sweep.measure_stopping(1, 16, 12, rho, order)[2] >= least


def test_the_mean_of_two_values_has_students_interval():
    mean = findings.mean_estimate([1.0, 2.0], (-math.inf, math.inf))
    assert abs(mean.high - 1.5 - 12.7062 * math.sqrt(0.5 / 2)) < 1e-3 and mean.sd == 0.5


# ---------------------------------------------------------------- findings


def test_the_best_run_is_not_believed():
    """Of equal runs the best one's posterior mean has lost most of its luck, its interval covers
    its true worth, and all are named as ties."""
    luck, *_, bias, covered, at_first, covered_first, _, _, _, all_tied = (
        coverage_sweep.measure_worth(1, 30, n=12)
    )
    assert luck > 0.0035 and abs(bias) < 0.002 and abs(at_first) < 0.0022
    assert covered >= 0.85 and covered_first >= 0.85 and all_tied >= 0.75


def test_a_real_difference_is_found():
    """Worths that differ by .24 points under noise of .04: few are named as ties."""
    *_, covered, _, _, _, named, _, all_tied = coverage_sweep.measure_worth(
        2, 12, n=30, sd=0.0024, noise=0.0004
    )
    assert covered >= 0.8 and named < 12 and all_tied == 0


def test_replicas_set_the_noise():
    """One configuration that ran three times, alike or not, says how far to believe the others."""
    states = [coverage_sweep.simulated_sweep(3, 10, sd=0.0024, noise=0.0003)[0] for _ in range(2)]
    best = max(states[0].trials, key=lambda t: t.history[-1])
    noises = []
    for state, gap in zip(states, (0.0002, 0.006)):
        for k in (1, 2):
            value = best.history[-1] - gap * k
            state.trials.append(sweep.Trial(10 + k, best.params, "finished", [value]))
        found = find(state)
        noises.append(found.noise)
        assert found.replicas
    assert noises[0] < 0.0008 and noises[1] > 0.003
    told = text_of(found)
    assert "is learnt from replicas" in told and "--seeds" not in told
    assert "is hardly known: `train.py --seeds 3` would tell" in text_of(finished([0.9] * 5))


def test_runs_alike_but_for_their_seed_are_replicas():
    parameters = {"lr": log_range(1e-4, 1e-2), "seed": {"values": [0, 1, 2]}}
    state = sweep.Sweep(Path("s"), spec(parameters=parameters), 1, [])
    for n, (lr, seed) in enumerate(itertools.product((1e-4, 1e-3, 1e-2), (0, 1, 2)), 1):
        trial = sweep.Trial(n, {"lr": lr, "seed": seed}, "finished", [0.9 + lr + 1e-4 * (n % 2)])
        state.trials.append(trial)
    found = find(state)
    assert found.replicas and found.importance[1][0] < 1e-6 and 2e-5 < found.noise < 3e-4


def finished(values, interval=0.0, **more):
    """Findings of a sweep of x in 0..1, evenly spread, that has these values."""
    state = sweep.Sweep(Path("s"), spec(parameters={"x": {"min": 0.0, "max": 1.0}}, **more), 1, [])
    for n, v in enumerate(values, 1):
        rows = [[1.0, v - interval, v + interval]]
        params = {"x": (n - 0.5) / len(values)}
        state.trials.append(sweep.Trial(n, params, "finished", [v], rows))
    return find(state)


def test_runs_at_two_values_that_a_list_has_lost_are_no_replicas():
    values = {"values": [24, 26, 28]}
    state = sweep.Sweep(Path("s"), spec(parameters={"T_max": values}, method="grid"), 1, [])
    for n, (x, y) in enumerate(((20, 0.95), (22, 0.97), (24, 0.96), (26, 0.96)), 1):
        state.trials.append(sweep.Trial(n, {"T_max": x}, "finished", [y], []))
    found = find(state)
    assert not found.replicas
    assert found.trials[0].expected.mean < found.trials[1].expected.mean


@pytest.mark.parametrize("key, values", [("T_max", [21, 23, 20, 24]), ("mode", list("abcd"))])
def test_neither_are_runs_at_two_names_or_inner_values_that_a_list_has_lost(key, values):
    """Their difference was taken for the noise of a run."""
    left = {"values": [20, 22, 24] if key == "T_max" else ["c", "d"]}
    state = sweep.Sweep(Path("s"), spec(parameters={key: left}, method="grid"), 1, [])
    for n, (x, y) in enumerate(zip(values, (0.94, 0.8, 0.9, 0.91)), 1):
        state.trials.append(sweep.Trial(n, {key: x}, "finished", [y], []))
    found = find(state)
    assert not found.replicas
    assert found.trials[0].expected.mean > found.trials[1].expected.mean


def test_importance_stands_beside_what_permuted_scores_give():
    (share, by_chance), *_ = finished(0.9 + 0.05 * np.arange(12) / 12).importance
    assert share > 0.9 and by_chance == 1 / 100  # their own order is one of 100
    by_chance = [
        finished(0.9 + 0.01 * np.random.default_rng(s).random(9)).importance for s in range(8)
    ]
    assert np.mean([b[0][1] for b in by_chance]) > 0.2


def test_importance_is_a_share_of_the_whole_space_wherever_the_runs_lie():
    """It was divided by the variance of the runs, here close together, and cut at 1. Permuted
    scores were cut to the same 1: 6 % of them gave as much, and no importance was shown."""
    ends = {"min": 0.0, "max": 1.0}
    state = sweep.Sweep(Path("s"), spec(parameters={"x": ends, "y": ends}), 1, [])
    rng = np.random.default_rng(4)
    for n in range(1, 25):
        x, y = rng.uniform(0.6 if n > 5 else 0, 0.95, 2)
        value = 0.9 - 0.1 * (x - 0.8) ** 2 + 1e-3 * rng.standard_normal()
        params = {"x": float(x), "y": float(y)}
        state.trials.append(sweep.Trial(n, params, "finished", [value]))
    (x, by_chance), (y, _) = find(state).importance
    assert 0.9 < x < x + y < 1 and by_chance < 0.02


def test_a_range_whose_best_runs_lie_at_its_end_is_named():
    told = "x: the best three runs lie at the {} end of its range; try {}"
    found = finished((0.9 + 0.002 * np.arange(30)).tolist())
    assert found.edges == [told.format("upper", "0.5 to 1.5")] and found.notes == found.edges
    assert told.format("upper", "0.5 to 1.5") in text_of(found)
    assert finished(0.9 - 0.002 * np.arange(30)).edges == [told.format("lower", "0 to 0.5")]
    assert finished([0.9, 0.91, 0.92, 0.93, 0.94]).edges == []  # too few runs
    assert finished(0.9 - 0.001 * np.abs(np.arange(30) - 15.0)).edges == []
    dim = space.parse_dimension("lr", log_range(1e-4, 1e-2))
    assert findings.at_edge(dim, [9e-3, 8e-3, 9.5e-3]).endswith("try 0.001 to 0.1")
    assert findings.at_edge(dim, [1.1e-4, 1.2e-4, 0.9e-4]).endswith("try 1e-05 to 0.001")
    assert findings.at_edge(dim, [9e-3, 8e-3, 1e-3]) == ""
    dim = space.parse_dimension("size", {"min": 256, "max": 1024})  # takes two integers again
    assert findings.at_edge(dim, [1024, 1024, 1023]).endswith("try 640 to 1409")
    dim = space.parse_dimension("batch", log_range(1, 8) | {"distribution": "q_log_uniform_values"})
    assert findings.at_edge(dim, [1, 1, 1]).endswith("try 1 to 3")  # 0 has no logarithm
    steps = {"distribution": "q_log_uniform_values", "q": 1e-4}
    dim = space.parse_dimension("lr", log_range(1e-4, 1e-2) | steps)
    assert findings.at_edge(dim, [1e-4, 1e-4, 1e-4]).endswith("try 1e-05 to 0.001")


def test_intervals_stay_within_0_and_100():
    found = finished([0.9999, 0.999, 0.996, 0.998, 0.9999, 0.9995])
    estimates = [e for row in found.trials for e in (row.expected, row.repeated)]
    estimates += [group.mean for item in found.parameters for group in item.groups]
    assert all(0 <= e.low <= e.mean and e.high <= 1 for e in estimates)
    assert any(e.high == 1 for e in estimates)
    assert found.parameters[0].along.high.max() <= 1


def test_ruined_runs_stay_out_of_means_by_parameter():
    values = [0.96, 0.961, 0.962, 0.959, 0.96, 0.961, 0.3, 0.96]
    found = finished(values)
    assert [group.n for group in found.parameters[0].groups] == [2, 2, 3]
    assert min(group.mean.mean for group in found.parameters[0].groups) > 0.95
    told = text_of(found)
    assert "Over the 7 finished runs; trial 7, far worse, left out." in told


def test_ruined_runs_are_far_worse_and_not_far_below_where_less_is_better():
    told = text_of(finished([1.0, 1.01, 1.02, 0.99, 1.0, 1.01, 9.0], metric=LOSS))
    assert "trial 7, far worse, left out" in told and "below, left" not in told


def test_the_best_that_was_stopped_is_compared_with_a_repetition_of_whole_length():
    state = sweep.Sweep(Path("s"), spec(parameters={"x": {"min": 0.0, "max": 1.0}}), 10, [])
    for n in range(1, 5):
        curve = [0.9 + 0.002 * n - 0.004 * max(k, 0) for k in range(-2, 8)]
        state.trials.append(sweep.Trial(n, {"x": n / 10}, "finished", curve))
    state.trials.append(sweep.Trial(5, {"x": 0.9}, "stopped", [0.915] * 3))
    found = find(state)
    assert found.luck.row.number == 5 and found.luck.row.expected.mean < 0.9
    assert "observed 91.50 at epoch 3. A repetition up to epoch 10 is" in text_of(found)


def test_a_run_a_point_below_equal_ones_is_no_failure():
    """Rounded values, or those that no parameter changes, are equal and have no spread."""
    assert not findings.ruined(np.array([0.966, 0.965, 0.965, 0.965, 0.964])).any()
    for values in ([0.96, 0.96, 0.96, 0.959, 0.93], [-0.2, -0.2, -0.2, -0.201, -0.9]):
        assert findings.ruined(np.array(values)).tolist() == [False] * 4 + [True]


def test_a_configuration_is_one_row_with_its_seeds():
    state = sweep.Sweep(Path("s"), spec(parameters={"x": {"min": 0.0, "max": 1.0}}), 1, [])
    state.hparams = sweep.resolve(["--seed=5"])
    runs = [({"x": 0.3}, 0.95), ({"x": 0.7}, 0.955), ({"x": 0.3, "seed": 6}, 0.97)]
    for n, (params, value) in enumerate([*runs, ({"x": 0.9}, 0.9)], 1):
        rows = [[1.0, value - 0.01, value + 0.01]]
        state.trials.append(sweep.Trial(n, params, "finished", [value], rows))
    found = find(state)
    header, _, *rows = table_of(text_of(found), "Finished trials")
    assert header[1:4] == ["trial", "hmean", "interval"] and header[-2:] == ["x", "seeds"]
    assert [row[:4] for row in rows] == [
        ["1", "1, 3", "96.00", "95.00 to 97.00"],
        ["2", "2", "95.50", "94.50 to 96.50"],
        ["3", "4", "90.00", "89.00 to 91.00"],
    ]
    assert [row[-2:] for row in rows] == [["0.3", "5, 6"], ["0.7", "5"], ["0.9", "5"]]
    assert found.ties[0] == 1 and 3 not in found.ties
    assert found.ranking[0].expected == found.trials[0].expected == found.trials[2].expected


def test_swept_seeds_are_one_row_too_and_a_ruined_replica_counts_in_the_mean():
    values = {"x": {"values": [1, 2, 3]}, "seed": {"values": [0, 1]}}
    state = sweep.Sweep(Path("s"), spec(parameters=values), 1, [])
    scores = [0.95, 0.951, 0.949, 0.3, 0.948, 0.952]
    for n, score in enumerate(scores, 1):
        params = {"x": (n + 1) // 2, "seed": 1 - n % 2}
        state.trials.append(sweep.Trial(n, params, "finished", [score]))
    header, _, *rows = table_of(text_of(find(state)), "Finished trials")
    assert header[-2:] == ["x", "seeds"] and "seed" not in header
    assert [(row[1], row[2], *row[-2:]) for row in rows] == [
        ("1, 2", "95.05", "1", "0, 1"),
        ("5, 6", "95.00", "3", "0, 1"),
        ("3, 4", "62.45", "2", "0, 1"),
    ]
    assert rows[2][4] != "-"  # the posterior mean of the one that is sound


def test_without_replicas_there_is_no_column_of_seeds():
    header, *_ = table_of(text_of(finished([0.9, 0.91, 0.92])), "Finished trials")
    assert header[-1] == "x"


def test_few_runs_have_no_rank_correlation():
    """Its limit, 1.96 / sqrt(n - 1), is none below five runs."""
    for n, words in (
        (3, "Too few runs for a rank correlation (n = 3)."),
        (4, "Too few runs for a rank correlation (n = 4)."),
        (5, "(n = 5, limit 0.98)"),
    ):
        told = text_of(finished([0.9 + 0.001 * k for k in range(n)]))
        assert words in told and "limit 1." not in told.split("## Score by parameter")[1]


def test_what_a_parameter_explains_is_a_sentence_of_all_runs():
    """Stopped ones, too, which the means above and below leave out."""
    line = (
        "By all 9 runs, its main effect explains {} of the variance over the space; {} of permuted"
        " scores give it as much"
    )
    assert report.importance(9, 0.3, 0.01) == line.format("30%", "1%") + "."
    told = report.importance(9, 0.03, 0.2)
    assert told == line.format("3%", "20%") + ": no importance is shown."
    state = sweep.read_sweep(PUBLISHED)
    for trial in state.trials[:8]:
        trial.state = "finished"
    told = text_of(find(state))
    assert "Over the 7 finished runs; trial 1, far worse, left out." in told
    assert "By all 11 runs, its main effect explains " in told


def test_hours_are_those_of_the_epochs():
    told = text_of(finished([0.9, 0.91, 0.92]))
    assert "(0.00 hours used, 0.00 saved; process starts not counted)" in told


def test_the_best_of_few_runs_has_no_posterior_mean():
    for values, words in (
        ([0.9], "Trial 1, the only sound one of the finished trials."),
        ([0.9, 0.91], "Trial 2, the best value of the finished trials, too few for a posterior"),
    ):
        told = text_of(finished(values)).split("## Best configuration")[1]
        assert words in told and "best posterior" not in told
    assert "the best posterior mean of the finished trials" in text_of(finished([0.9, 0.91, 0.92]))


def test_groups_of_numbers_are_in_their_order_and_one_run_has_a_mean():
    dim = space.parse_dimension("n", {"values": [4, 16, 8, 2]})
    groups = findings.groups_of(dim, [16, 4, 8, 4], np.array([0.9, 0.8, 0.7, 0.6]), (0, 1))
    assert [group.ends for group in groups] == [[4], [8], [16]]
    assert [group.n for group in groups] == [2, 1, 1]
    assert [group.mean.mean for group in groups] == pytest.approx([0.7, 0.7, 0.9])
    assert groups[1].mean.text("{:.2f}".format) == "0.70"
    assert groups[0].mean.text("{:.2f}".format) == "0.70 (0.00 to 1.00)"


def test_thirds_share_their_ends():
    ends, index = findings.thirds([5, 1, 4, 2, 3, 6, 7])
    assert list(ends) == [(1, 3), (3, 5), (5, 7)] and index.tolist() == [2, 0, 1, 0, 1, 2, 2]


# ---------------------------------------------------------------- the published sweep


def test_a_known_paused_run_is_not_to_be_continued_here():
    state = sweep.Sweep(Path("s"), spec(), 4, [])
    for n, lr in enumerate((1e-3, 2e-3, 3e-3, 4e-3), 1):
        curve = [0.8, 0.85, 0.88, 0.9 + 0.001 * n]
        params = {"lr": lr, "T_max": 22}
        state.trials.append(sweep.Trial(n, params, "finished", curve, []))
    for n, known in ((5, True), (6, False)):
        params = {"lr": 5e-3, "T_max": 20}
        state.trials.append(sweep.Trial(n, params, "stopped", [0.8, 0.86], known=known))
    found = find(state)
    assert found.trials[4].chance == found.trials[5].chance > 0.2 and found.rivals == [6]


def test_curves_that_were_not_recorded_are_not_projected():
    state = sweep.read_sweep(PUBLISHED)
    found = find(state)
    assert all(math.isnan(row.chance) and math.isnan(row.final.mean) for row in found.stopped)
    page = report.page("s", list(report.sweep_blocks(found)))
    assert "Learning curves" not in page and ">100%<" not in page
    row = found.luck.row  # Run 8, whose replica gave 96.70 and, on unseen pages, 96.26
    assert row.number == 8 and 0.961 < row.expected.mean < 0.965
    assert row.repeated.low < 0.9626 < row.expected.high and row.repeated.high > 0.966


def test_what_the_published_sweep_says_of_itself_is_so():
    state = sweep.read_sweep(PUBLISHED)
    curves = [
        [v] * 22
        for v in findings.last([findings.Row(t, coverage_sweep.CUBE) for t in state.trials])
    ]
    trained = sweep.simulate(curves, state.rule)
    stopped = {k: [n for n, e in enumerate(trained, 1) if e == k] for k in (10, 20)}
    assert stopped == {10: [5, 9, 10, 11, 12], 20: [6]}
    assert [t.number for t, e in zip(state.trials, trained) if len(t.history) != e] == [4, 6, 7, 8]
    assert (
        "10 and 6 at epoch 20" in state.notes[0] and "disagree on 4, 6, 7 and 8" in state.notes[0]
    )
    seen = {key: [t.params[key] for t in state.trials] for key in state.trials[0].params}
    assert [seen["T_max"].count(v) for v in (20, 22, 24)] == [2, 5, 5]
    assert [n for n, v in enumerate(seen["weight_decay"], 1) if v > 2e-4] == [1]
    ranges = [sorted(seen[key])[:: len(state.trials) - 1] for key in ("lr", "eta_min")]
    ranges.append(sorted(seen["weight_decay"])[:11:10])
    told = (
        "lr 0.00028 to 0.00059",
        "eta_min 6.4e-06 to 1.9e-05",
        "weight_decay 6.6e-05 to 0.00014",
    )
    for (low, high), words in zip(ranges, told):
        assert f"{low:.2g} to {high:.2g}" in words and words in state.notes[2]
    same = seen["eta_min"]
    assert same[0] == same[1] and same[4] == same[6] and len(set(same)) == 10
    assert "156 epochs used, 108 saved by stopping 9 runs" in report.markdown(
        report.sweep_blocks(find(state))
    )


def test_its_best_configuration_is_the_command_of_that_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = find(sweep.read_sweep(PUBLISHED))
    words = found.command.split()[2:]
    assert found.first.number == 3 and sweep.resolve(words) == sweep.resolve(
        ["--hparams=hparams/run3.json"]
    )


# ---------------------------------------------------------------- report


def test_names_from_a_file_are_no_markup():
    state = sweep.Sweep(Path("s"), spec(parameters={"<b>": {"min": 0.0, "max": 1.0}}), 1, [])
    for n in range(1, 9):
        state.trials.append(sweep.Trial(n, {"<b>": n / 9}, "finished", [n / 9], [[1.0, 0.1, 0.2]]))
    page = report.page("s", report.sweep_blocks(find(state)))
    assert "<b>&lt;b&gt;</b>" in page and "<b>" not in page.replace("<b>&lt;b&gt;</b>", "")
