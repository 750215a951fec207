"""Intervals against closed forms, simulated pages and their groups."""

import itertools
import json
import tracemalloc
from dataclasses import asdict
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats
from test_cleval import page_of, random_page

from cleval import METRICS, mean_scores, metric_rows, micro_scores
from interval import (
    SEEN,
    Sample,
    Score,
    bootstrap,
    count_sample,
    expanded_bca,
    expected_lead,
    make_score,
    outlier_limit,
    paired_difference,
    read_score,
    spearman,
    student,
    student_975_squared,
)


def test_groups_that_do_not_fit_the_pages_are_refused():
    with pytest.raises(ValueError, match="2 groups, 3 pages"):
        bootstrap(np.ones((3, 4)), mean_scores, "ab")
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(np.ones((0, 4)), mean_scores)


def hmean_rows(hmean):
    return np.stack([hmean, hmean, hmean, np.ones(len(hmean))], 1)


def test_interval_of_a_mean_is_normal_and_copies_do_not_narrow_it():
    hmean = np.random.default_rng(3).normal(0.8, 0.1, 400)
    alone, error = bootstrap(hmean_rows(hmean), mean_scores, draws=20000)[2], hmean.std() / 20
    assert alone == pytest.approx(hmean.mean() + [-1.97 * error, 1.97 * error], abs=0.06 * error)
    copies, groups = hmean_rows(np.repeat(hmean, 4)), np.repeat(np.arange(400), 4).tolist()
    grouped = bootstrap(copies, mean_scores, groups)
    assert np.allclose(grouped, bootstrap(hmean_rows(hmean), mean_scores))
    assert np.ptp(grouped[2]) > 1.7 * np.ptp(bootstrap(copies, mean_scores)[2])


@pytest.mark.parametrize("size, t", [(5, 2.776), (10, 2.262), (20, 2.093), (404, 1.966)])
def test_ends_are_percentiles_of_student_and_move_outwards_as_in_bca(size, t):
    """Samples that are normal, and the closed form of BCa for a bias and an acceleration."""
    normal = np.vectorize(NormalDist().inv_cdf)((np.arange(200_000) + 0.5) / 200_000)
    t *= np.sqrt(size / (size - 1))
    for bias, skewness in ((0, 0), (0.2, 0), (0, -0.1), (-0.1, 0.05)):
        lead = np.array([-3.0, 1, 1, 1]) if skewness else np.array([-1.0, 1])
        third = (lead**3).sum() / (6 * (lead**2).sum() ** 1.5)
        without = -lead * np.sign(skewness or 1) * np.sign(third or 1)
        a = abs(third) * np.sign(skewness)
        samples = np.stack([normal, 2 * normal + 1], 1)
        scores = np.array([bias, 2 * bias + 1])
        low, high = (bias + (bias + z) / (1 - a * (bias + z)) for z in (-t, t))
        low, high = min(low, -t), max(high, t)  # never inwards
        found = expanded_bca(samples, scores, np.stack([without, without], 1), size)
        expected = np.array([(low, high), (2 * low + 1, 2 * high + 1)])
        assert found == pytest.approx(expected, rel=0.02, abs=0.01)


def test_ends_are_those_of_scipys_bca_where_they_lie_outside_the_percentiles():
    """On scipy's own draws of skewed values, without the correction for few groups."""
    rng = np.random.default_rng(11)
    moved = 0
    for sign, size in itertools.product((1, -1), (15, 40, 200)):
        values = sign * rng.gamma(0.5, 1, size)
        how = {"n_resamples": 9999, "vectorized": True, "rng": np.random.default_rng(size)}
        bca = stats.bootstrap([values], np.mean, method="BCa", **how)
        samples = bca.bootstrap_distribution
        percentiles = np.quantile(samples, [0.025, 0.975])

        without = (values.sum() - values) / (size - 1)
        columns = samples[:, None], np.array([values.mean()]), without[:, None]
        ((low, high),) = expanded_bca(*columns, size=10**9)
        exact = bca.confidence_interval
        width = np.ptp(percentiles)
        assert low == pytest.approx(min(exact.low, percentiles[0]), abs=2e-3 * width)
        assert high == pytest.approx(max(exact.high, percentiles[1]), abs=2e-3 * width)
        moved += max(percentiles[0] - low, high - percentiles[1]) > 0.05 * width
    assert moved >= 3


def losses(rng, *shape):
    """Losses of pages: 1.2 % on average, one page in a hundred over 8 %."""
    return np.minimum(rng.gamma(0.5, 0.024, shape), 1)


def test_intervals_of_few_skewed_pages_and_of_uneven_groups_cover_the_truth():
    rng, sizes, size = np.random.default_rng(8), [1, 1, 2, 2, 3, 3, 4, 6, 7, 11], 800
    names, truth = np.repeat(np.arange(10), sizes), 1 - losses(rng, 10**6).mean()
    shop = losses(rng, 10, size)[names]
    for groups, loss, least in (
        (range(20), losses(rng, 20, size), 0.91),
        (names, (shop + losses(rng, 40, size)) / 2, 0.9),
    ):
        rows = np.hstack([1 - loss, np.ones((len(loss), 1))])
        low, high = bootstrap(rows, mean_scores, groups, draws=2000).T
        assert ((low <= truth) & (truth <= high)).mean() > least
        assert (truth < low).mean() < 0.11  # luckier than the truth


def test_the_words_say_over_what_and_where_an_interval_is_too_narrow():
    for names, words in (
        ("abcdefghijkl", "12 pages"),
        ("aabbccddeeff", "6 groups, too narrow"),
        ("aaaaaabcdefg", "7 groups, too narrow"),
        ("abcdefghijkk", "11 groups"),
        ("aaaaaaaaaaaa", "1 groups, too narrow"),
    ):
        assert str(count_sample(list(names))) == words


def test_equal_pages_and_one_page_or_group_have_an_interval_without_width():
    for count in (1, 2, 20):
        assert (bootstrap(np.ones((count, 4)), mean_scores) == 1).all()
        assert (bootstrap(np.zeros((count, 6)), micro_scores) == 0).all()
    rows = hmean_rows(np.linspace(0.8, 1, 12))
    assert bootstrap(rows, mean_scores, ["a"] * 12)[2] == pytest.approx([0.9, 0.9])


def test_many_pages_take_no_more_memory_and_give_the_same_interval():
    hmean, peaks = np.random.default_rng(6).normal(0.8, 0.1, 4000), []
    for pages in (1000, 4000):
        tracemalloc.start()
        interval = bootstrap(hmean_rows(hmean[:pages]), mean_scores, draws=1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]
    draw = np.random.default_rng(0).integers(4000, size=(1000, 4000))  # all draws at once
    without = (hmean.sum() - hmean)[:, None] / 3999
    samples, score = hmean[draw].mean(1)[:, None], np.array([hmean.mean()])
    expected = expanded_bca(samples, score, without, 4000)
    assert np.allclose(interval[2], expected, atol=1e-12)


def test_difference_is_paired():
    rng = np.random.default_rng(5)
    gt, det = zip(*(random_page(rng) for _ in range(30)))
    pages, found = [page_of(polygons) for polygons in gt], [(polygons, None) for polygons in det]
    rows = metric_rows(pages, found)
    for name, to_scores in METRICS.items():
        total, interval = to_scores(rows[name].sum(0)), bootstrap(rows[name], to_scores)
        assert (interval[:, 0] < total).all() and (total < interval[:, 1]).all()
        assert (bootstrap(rows[name], to_scores) == interval).all()
        same = paired_difference(rows[name], rows[name], to_scores, range(30))
        assert same.interval == [0, 0] and same.difference == 0
    rows = rows["page"]
    few = [n % 5 for n in range(30)]
    for change, verdict in ((0.01, "better"), (-0.01, "worse"), (0, "cannot tell")):
        changed = rows + (0, 0, change, 0)
        result = paired_difference(changed, rows, mean_scores, range(30))
        assert result.interval == pytest.approx([change] * 2) and result.verdict == verdict
        assert str(result.over) == "30 pages"
        result = paired_difference(changed, rows, mean_scores, few)
        assert result.verdict == "cannot tell from under 6 pages or groups"


def test_a_score_and_a_difference_print_themselves():
    rows = hmean_rows(np.linspace(0.8, 1, 20))
    score = make_score(rows, mean_scores, range(20), {"trained": 0})
    low, high = score.interval
    assert str(score) == f"hmean 0.9000 [{low:.4f}, {high:.4f}] over 20 pages"
    assert score.line("micro").startswith("micro 0.9000 [")
    assert score.full_line() == f"precision 0.9000  recall 0.9000  {score}"
    assert not score.seen

    seen = {"trained": 0, "chosen": 3, "tuned": 20}
    again = make_score(rows, mean_scores, [n % 4 for n in range(20)], seen)
    words = "epoch chosen on 3 of them, thresholds chosen on 20 of them"
    assert str(again).endswith(f" over 4 groups, too narrow, in sample: {words}")
    assert again.seen == {"chosen": 3, "tuned": 20}

    gain = paired_difference(rows, rows - (0, 0, 0.01, 0), mean_scores, range(20), {"scored": 2})
    words = f"over 20 pages, in sample: {SEEN['scored']} 2 of them"
    assert str(gain) == f"hmean +0.0100 [+0.0100, +0.0100] {words}  better"
    assert gain.line("iou50") == f"iou50 +0.0100 [+0.0100, +0.0100] {words}"
    assert [*gain.to_json()] == ["difference", "interval", "over", "verdict"]
    assert gain.to_json()["over"] == words[5:]


def test_a_stored_score_is_read_back_and_an_older_one_too():
    score = make_score(hmean_rows(np.linspace(0.8, 1, 12)), mean_scores, range(12), {"chosen": 3})
    assert read_score(json.loads(json.dumps(asdict(score)))) == score
    assert [*score.to_json()] == ["precision", "recall", "hmean", "interval", "over"]
    assert score.to_json()["over"] == "12 pages, in sample: epoch chosen on 3 of them"
    older = read_score({"hmean": 0.5, "interval": [0.4, 0.6], "over": "2 pages, too narrow"})
    assert str(older) == "hmean 0.5000 [0.4000, 0.6000] over 2 pages, too narrow"
    assert str(read_score({"hmean": 0.5})) == "hmean 0.5000 [nan, nan] over pages"
    assert older.seen == {} and Score(1, 1, 1, [1, 1], Sample("pages", 1, True)).to_json()


def test_the_quantile_of_student_is_near_the_published_ones():
    for freedom, quantile, error in (
        (2, 4.303, 0.041),
        (3, 3.182, 0.012),
        (4, 2.776, 0.006),
        (5, 2.571, 0.003),
        (10, 2.228, 0.001),
        (100, 1.984, 0.001),
    ):
        assert 0 <= student_975_squared(freedom) ** 0.5 / quantile - 1 + 1e-4 < error


def test_the_lead_of_the_best_is_in_sample_sd_which_is_too_small_on_average():
    for n, largest, spread in ((2, 0.5642, 0.7979), (3, 0.8463, 0.8862), (12, 1.6292, 0.9776)):
        assert expected_lead(n) == pytest.approx(largest / spread, abs=2e-4)  # d2 / 2 and c4
    runs = np.random.default_rng(0).standard_normal((100_000, 5))
    lead = (runs.max(1) - runs.mean(1)) / runs.std(1, ddof=1)
    assert expected_lead(5) == pytest.approx(lead.mean(), abs=3e-3)


def test_student_grubbs_and_spearman():
    for v, t in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (30, 2.0423)):
        assert abs(student(v, 0.05) - t) < 1e-4
    for n, limit in ((3, 1.153), (10, 2.176), (20, 2.557), (30, 2.745)):
        assert abs(outlier_limit(n) - limit) < 1e-3  # Grubbs 1969, table I, 5 %
    assert spearman([1, 2, 3, 4], [10, 20, 25, 1e9]) == 1
    assert abs(spearman([1, 2, 2, 3], [1, 2, 3, 4]) - 0.9486833) < 1e-6
