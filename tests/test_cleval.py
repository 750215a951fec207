"""The metrics against golden counts, closed forms, shapely and invariances."""

import gzip
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import shapely

from cleval import (
    COUNTS,
    as_points,
    bootstrap,
    char_centres,
    cleval,
    iou50,
    iou_matches,
    iou_scores,
    make_shapes,
    mean_rows,
    mean_scores,
    micro_rows,
    micro_scores,
    overlap_area,
    pseudo_chars,
    to_shapely,
)

DATA = Path(__file__).parent / "data" / "cleval"
VARIANTS = ("page", "official")


def scores(counts):
    return counts["precision"], counts["recall"], counts["hmean"]


def micro(counts):
    return micro_scores(micro_rows(counts).sum(0))


def golden(kind):
    with gzip.open(DATA / "golden.json.gz") as file:
        return [case for case in json.load(file)["cases"] if case["kind"] == kind]


def score_all(kind):
    variant = "official" if kind == "quad" else "page"
    return [
        (
            cleval(case["gt"], case["det"], texts=case.get("transcriptions"), variant=variant),
            case["expected"],
        )
        for case in golden(kind)
    ]


def box(x, y, width, height):
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], float)


def random_page(rng, words=30):
    """Jittered words on a grid, detected with shifts, misses, doubles and false alarms."""
    gt = [
        box(20 + 130 * (n % 6), 20 + 40 * (n // 6), *rng.integers((30, 15), (120, 30)))
        + rng.normal(0, 1, (4, 2))
        for n in range(words)
    ]
    found = [points for points in gt if rng.random() < 0.8]
    found += [points for points in gt if rng.random() < 0.2]
    alarms = [box(*rng.integers(0, 700, 2), *rng.integers(10, 90, 2)) for _ in range(4)]
    return gt, [points + rng.normal(0, 4, (4, 2)) for points in found] + alarms


# ---------------------------------------------------------------- golden numbers


def test_quads_have_the_counts_of_the_official_package():
    pages = score_all("quad")
    equal = [all(ours[key] == theirs[key] for key in COUNTS) for ours, theirs in pages]
    error = [abs(ours["hmean"] - theirs["hmean"]) for ours, theirs in pages]
    assert len(pages) == 100 and sum(equal) >= 97
    assert np.mean(error) < 5e-4


def test_polygons_have_the_counts_of_the_competition_but_for_false_alarms():
    pages = score_all("pseudo")
    keys = [key for key in COUNTS if key not in ("num_char_fp", "num_char_det")]
    equal = [
        all(ours[key] == theirs[key] for key in keys)
        and ours["num_char_det"] - ours["num_char_fp"]
        == theirs["num_char_det"] - theirs["num_char_fp"]
        for ours, theirs in pages
    ]
    recall = [abs(ours["recall"] - theirs["recall"]) for ours, theirs in pages]
    hmean = [
        abs(ours["hmean"] - theirs["hmean"]) for ours, theirs in pages if theirs["num_char_fp"] == 0
    ]
    assert len(pages) == 100 and sum(equal) >= 85
    assert len(hmean) > 20 and np.mean(recall) < 2e-3 and np.mean(hmean) < 1e-3


def read_zip(name, prefix):
    pages = {}
    with zipfile.ZipFile(DATA / name) as archive:
        for member in sorted(archive.namelist()):
            rows = [
                line.split(",", 8)
                for line in archive.read(member).decode("utf-8-sig").splitlines()
                if line.strip()
            ]
            polygons = [np.array(row[:8], float).reshape(4, 2) for row in rows]
            pages[member.removeprefix(prefix)] = polygons, [row[8] for row in rows]
    return pages


def test_public_pages_have_the_published_hmean():
    gt = read_zip("gt_eval_doc_v1_kr.zip", "gt_")
    det = read_zip("res_eval_doc_v1_kr.zip", "res_")
    assert len(gt) == 100 and gt.keys() == det.keys()
    counts = [
        cleval(gt[name][0], det[name][0], texts=gt[name][1], variant="official") for name in gt
    ]
    assert micro(counts)[2] == pytest.approx(0.977989360950786, abs=1e-4)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("variant", VARIANTS)
def test_perfect_detection_scores_one(variant):
    words = [box(10, 10, 95, 20), box(10, 50, 20, 95), box(200.5, 40.25, 51, 10)]
    texts = ["abcde", "fghij", "k"]
    counts = cleval(words, words, texts=texts, variant=variant)
    assert scores(counts) == (1, 1, 1)
    assert counts["num_char_gt"] == (5 + 5 + 6 if variant == "page" else 11)


def test_characters_follow_the_aspect_of_the_smallest_rectangle():
    turned = box(0, 0, 95, 20) @ np.array([(0.8, 0.6), (-0.6, 0.8)])
    long = box(0, 0, 3000, 10)
    assert pseudo_chars(
        [box(0, 0, 95, 20), turned, turned[[2, 0, 1, 3]], long, box(0, 0, 30, 10), box(3, 3, 7, 7)]
    ).tolist() == [5, 5, 5, 100, 3, 2]


def test_centres_divide_the_middle_line():
    quad, hexagon = (
        box(0, 0, 80, 10),
        np.array([(0, 0), (40, 0), (80, 0), (80, 10), (40, 10), (0, 10)], float),
    )
    count = np.array([4, 4])
    expected = [[10, 5], [30, 5], [50, 5], [70, 5]]
    for variant in VARIANTS:
        assert char_centres([quad, hexagon], count, variant).tolist() == expected * 2
    upright = box(0, 0, 10, 80)
    assert char_centres([upright], np.array([2]), "official").tolist() == [[5, 60], [5, 20]]
    triangle = np.array([(0, 0), (8, 0), (4, 6)], float)
    (centre,) = char_centres([triangle], np.array([1]), "page")
    assert shapely.Polygon(triangle).contains(shapely.Point(centre))


def test_split_word_pays_one_character_of_recall():
    counts = cleval([box(0, 0, 80, 10)], [box(0, 0, 40, 10), box(40, 0, 40, 10)])
    assert (counts["num_char_gt"], counts["num_splitted"], counts["num_merged"]) == (8, 1, 0)
    assert (counts["precision"], counts["recall"]) == (1, 7 / 8)


def test_merged_words_pay_one_character_of_precision():
    words = [box(0, 0, 40, 10), box(50, 0, 40, 10)]
    counts = cleval(words, [box(0, 0, 90, 10)])
    assert (counts["num_char_gt"], counts["num_splitted"], counts["num_merged"]) == (8, 0, 1)
    assert (counts["precision"], counts["recall"]) == (7 / 8, 1)


def test_miss_double_and_false_alarm():
    words = [box(0, 0, 40, 10), box(100, 0, 60, 10)]
    missed = cleval(words, words[:1])
    assert (missed["precision"], missed["recall"]) == (1, 4 / 10)
    assert missed["hmean"] == pytest.approx(2 * 0.4 / 1.4)
    double = cleval(words[:1], words[:1] * 2)
    assert (double["num_char_overlapped"], double["num_char_det"]) == (4, 8)
    assert (double["precision"], double["recall"]) == (4 / 8, 3 / 4)
    alarm = words[:1] + [box(300, 300, 55, 10)]
    assert cleval(words[:1], alarm)["precision"] == 4 / (4 + 6)
    assert cleval(words[:1], alarm, texts=["abcd"], variant="official")["precision"] == 4 / 5
    upright = words[:1] + [box(300, 300, 10, 55)]
    counts = cleval(words[:1], upright, texts=["abcd"], variant="official")
    assert counts["precision"] == 4 / (4 + 6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dont_care_takes_labels_and_detections_out(variant):
    words = [box(0, 0, 40, 10), box(100, 0, 60, 10)]
    flagged = cleval(words, words, ignore=[False, True], texts=["abcd", "efghij"], variant=variant)
    assert flagged["num_char_gt"] == flagged["num_char_det"] == 4 and flagged["hmean"] == 1
    assert cleval(words, words, texts=["abcd", "###"], variant=variant) == flagged
    assert (
        cleval(words, words[:1], ignore=[False, True], texts=["abcd", "efghij"], variant=variant)
        == flagged
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_dont_care_loses_what_a_label_covers(variant):
    page, word = box(0, 0, 200, 100), box(20, 20, 60, 10)
    counts = cleval(
        [page, word],
        [word, box(150, 50, 30, 10)],
        ignore=[True, False],
        texts=["###", "abcdef"],
        variant=variant,
    )
    assert counts["num_char_fp"] == 0 and scores(counts) == (1, 1, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pages_without_labels_or_detections_score_zero(variant):
    for gt, det in ([], []), ([], [box(0, 0, 9, 9)]), ([box(0, 0, 9, 9)], []):
        assert scores(cleval(gt, det, variant=variant)) == (0, 0, 0)


def test_only_500_detections_count_for_the_competition():
    word, alarm = box(0, 0, 40, 10), box(500, 500, 40, 10)
    det = [alarm] * 500 + [word]
    assert cleval([word], det)["recall"] == 0
    assert cleval([word], det, variant="official")["recall"] == 1


def test_micro_sums_and_the_mean_averages():
    full, half = [box(0, 0, 90, 10)], [box(0, 0, 30, 10), box(50, 0, 30, 10)]
    counts = [cleval(full, full), cleval(half, half[:1])]
    assert micro(counts) == pytest.approx((1, 12 / 15, 2 * 0.8 / 1.8))
    assert mean_scores(mean_rows(counts).sum(0)) == pytest.approx((1, 3 / 4, (1 + 2 / 3) / 2))


def test_iou_matches_one_to_one():
    words = [box(0, 0, 40, 10), box(100, 0, 40, 10), box(200, 0, 40, 10)]
    assert iou50(words, words) == (3, 3, 3)
    shifted = [words[0] + (13, 0), words[1] + (14, 0)]  # IoU 27/53 and 26/54
    assert iou50(words, shifted) == (1, 3, 2)
    assert iou50(words[:1], words[:1] * 2) == (1, 1, 2)
    assert iou_matches(words, shifted)[0] == [(0, 0)]
    inside = [words[0], words[2] + (19, 0), words[1] + (21, 0)]
    assert iou50(words, inside, [False, True, True]) == (1, 1, 2)
    precision, recall, hmean = iou_scores(np.array([2, 4, 4]))
    assert (precision, recall) == (2 / 4, 2 / 4) and hmean == 1 / 2


# ---------------------------------------------------------------- geometry against shapely


def test_overlap_equals_shapely():
    rng = np.random.default_rng(0)
    polygons = []
    for n in range(60):
        points = rng.integers(3, 12)
        angle, radius = np.sort(rng.random(points)) * 2 * np.pi, rng.uniform(5, 40, points)
        polygons.append(
            rng.uniform(0, 60, 2) + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        )
    polygons += [box(10, 10, 30, 20), box(10, 10, 30, 20), box(20, 10, 5, 20)]  # shared edges
    polygons += [rng.uniform(0, 60, (7, 2)) for _ in range(10)]  # crossed
    areas = to_shapely(as_points(polygons))
    areas[0] = shapely.difference(areas[60], shapely.box(15, 15, 20, 20))  # with a hole
    areas[1] = shapely.union_all([shapely.box(0, 0, 9, 9), shapely.box(30, 30, 50, 44)])
    shapes = make_shapes(areas)
    i, j = (index.ravel() for index in np.indices((len(areas), len(areas))))
    expected = shapely.area(shapely.intersection(areas[i], areas[j]))
    assert np.allclose(overlap_area(shapes, i, shapes, j), expected, atol=1e-7)


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_start_and_direction_do_not_matter(variant):
    rng = np.random.default_rng(1)
    for _ in range(10):
        gt, det = random_page(rng)
        ignore, texts = rng.random(len(gt)) < 0.2, ["x" * rng.integers(1, 12) for _ in gt]
        gt, det = np.round(gt), np.round(det)
        counts = cleval(gt, det, ignore=ignore, texts=texts, variant=variant)
        a, b = rng.permutation(len(gt)), rng.permutation(len(det))
        shuffled = cleval(
            [gt[n] for n in a],
            [det[n] for n in b],
            ignore=ignore[a],
            texts=[texts[n] for n in a],
            variant=variant,
        )
        assert shuffled == counts
        if variant == "page":  # the official aspect of a false alarm depends on its first corner
            turned = [np.roll(points, rng.integers(4), 0)[:: rng.choice((1, -1))] for points in det]
            assert cleval(gt, turned, ignore=ignore, variant=variant) == counts
        else:
            moved = cleval(gt + 1000, det + 1000, ignore=ignore, texts=texts, variant=variant)
            assert moved == counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_label_read_from_any_corner_is_found_by_its_own_box(variant):
    word = np.array([(10, 10), (105, 14), (104, 34), (9, 30)], float)
    for start in range(4):
        counts = cleval([np.roll(word, start, 0)], [word], texts=["abcdef"], variant=variant)
        assert scores(counts) == (1, 1, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_and_broken_geometry_gives_finite_scores(variant):
    rng = np.random.default_rng(2)
    broken = [
        np.full((4, 2), np.nan),
        np.zeros((4, 2)),
        np.zeros((0, 2)),
        np.zeros((2, 2)),
        np.array([(0, 0), (50, 50), (100, 100)]),
        np.array([(0, 0), (9, 9), (9, 0), (0, 9)]),
        np.array([(np.inf, 0), (9, 9), (9, 0)]),
        box(0, 0, 40, 1e-12),
        box(0, 0, 1e9, 1e9),
    ]
    for _ in range(20):
        gt = [rng.uniform(0, 200, (rng.integers(3, 13), 2)) for _ in range(20)] + broken
        det = [rng.uniform(0, 200, (rng.integers(3, 13), 2)) for _ in range(20)] + broken
        ignore = rng.random(len(gt)) < 0.2
        counts = cleval(gt, det, ignore=ignore, variant=variant)
        values = np.array([*counts.values(), *iou50(gt, det, ignore)], float)
        assert np.isfinite(values).all() and (values >= 0).all()
        assert all(0 <= score <= 1 for score in scores(counts))


def test_crossed_label_is_found_by_its_own_points():
    bow_tie = np.array([(0, 0), (40, 20), (40, 0), (0, 20)], float)
    assert iou50([bow_tie], [bow_tie]) == (1, 1, 1)


def test_wrong_arguments_are_named():
    word = box(0, 0, 40, 10)
    with pytest.raises(ValueError, match="'micro' is unknown"):
        cleval([word], [word], variant="micro")
    with pytest.raises(ValueError, match="1 labels, 2 texts"):
        cleval([word], [word], texts=["a", "b"])
    with pytest.raises(ValueError, match="2 ignore flags"):
        iou50([word], [word], [True, False])
    with pytest.raises(ValueError, match="same pages"):
        bootstrap(np.ones((3, 4)), mean_scores, minus=np.ones((2, 4)))
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(np.ones((0, 4)), mean_scores)


# ---------------------------------------------------------------- intervals


def hmean_rows(hmean):
    return np.stack([hmean, hmean, hmean, np.ones(len(hmean))], 1)


def test_interval_of_a_mean_is_normal():
    hmean = np.random.default_rng(3).normal(0.8, 0.1, 400)
    low, high = bootstrap(hmean_rows(hmean), mean_scores, draws=20000)[2]
    error = hmean.std() / np.sqrt(len(hmean))
    assert low == pytest.approx(hmean.mean() - 1.96 * error, abs=0.06 * error)
    assert high == pytest.approx(hmean.mean() + 1.96 * error, abs=0.06 * error)


def test_groups_of_copies_widen_the_interval():
    hmean = np.random.default_rng(4).normal(0.8, 0.1, 100)
    rows, copies = hmean_rows(hmean), hmean_rows(np.repeat(hmean, 4))
    groups = np.repeat(np.arange(100), 4).tolist()
    grouped = bootstrap(copies, mean_scores, groups=groups)
    assert np.allclose(grouped, bootstrap(rows, mean_scores))
    assert np.ptp(grouped[2]) > 1.7 * np.ptp(bootstrap(copies, mean_scores)[2])


def test_many_pages_take_no_more_memory_and_give_the_same_interval():
    hmean, peaks = np.random.default_rng(6).normal(0.8, 0.1, 4000), []
    for pages in (1000, 4000):
        tracemalloc.start()
        interval = bootstrap(hmean_rows(hmean[:pages]), mean_scores, draws=1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]
    draw = np.random.default_rng(0).integers(4000, size=(1000, 4000))  # all draws at once
    expected = np.percentile(hmean[draw].mean(1), [2.5, 97.5])
    assert np.allclose(interval[2], expected, atol=1e-12)


def test_difference_is_paired():
    rng = np.random.default_rng(5)
    pages = [random_page(rng) for _ in range(30)]
    counts = [cleval(gt, det) for gt, det in pages]
    matches = [iou50(gt, det) for gt, det in pages]
    for rows, to_scores in (
        (mean_rows(counts), mean_scores),
        (micro_rows(counts), micro_scores),
        (np.array(matches, float), iou_scores),
    ):
        total = to_scores(rows.sum(0))
        interval = bootstrap(rows, to_scores)
        assert (interval[:, 0] < total).all() and (total < interval[:, 1]).all()
        assert (bootstrap(rows, to_scores) == interval).all()
        assert (bootstrap(rows, to_scores, minus=rows) == 0).all()
    better = mean_rows(counts) + (0, 0, 0.01, 0)
    assert np.allclose(bootstrap(better, mean_scores, minus=mean_rows(counts))[2], 0.01)
