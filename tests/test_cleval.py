"""The metrics against golden counts, closed forms and invariances."""

import gzip
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cleval as metric
import evaluate
from cleval import METRICS, OUTCOMES, cleval, iou50, iou_matches
from labels import Page

DATA = Path(__file__).parent / "data" / "cleval"
both_variants = pytest.mark.parametrize("variant", ["page", "official"])


def scores(counts):
    return counts["precision"], counts["recall"], counts["hmean"]


def golden(kind, variant):
    with gzip.open(DATA / "golden.json.gz") as file:
        cases = [case for case in json.load(file)["cases"] if case["kind"] == kind]
    assert len(cases) == 100
    for case in cases:
        texts = case.get("transcriptions")
        yield cleval(case["gt"], case["det"], texts=texts, variant=variant), case["expected"]


def box(x, y, width, height):
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], float)


def page_of(polygons, name="", texts=None, ignore=None, group=None):
    ignore = [False] * len(polygons) if ignore is None else ignore
    return SimpleNamespace(polygons=polygons, texts=texts, ignore=ignore, name=name, group=group)


def random_page(rng, words=30):
    """Jittered words on a grid, detected with shifts, misses, doubles and false alarms."""
    corners = [(20 + 130 * (n % 6), 20 + 40 * (n // 6)) for n in range(words)]
    gt = [box(*corner, *rng.integers((30, 15), (120, 30))) for corner in corners]
    gt = [points + rng.normal(0, 1, (4, 2)) for points in gt]
    found = [points for share in (0.8, 0.2) for points in gt if rng.random() < share]
    alarms = [box(*rng.integers(0, 700, 2), *rng.integers(10, 90, 2)) for _ in range(4)]
    return gt, [points + rng.normal(0, 4, (4, 2)) for points in found] + alarms


def test_quads_have_the_counts_of_the_official_package():
    pages = list(golden("quad", "official"))
    equal = [all(ours[key] == theirs[key] for key in metric.COUNTS) for ours, theirs in pages]
    assert sum(equal) >= 97
    assert np.mean([abs(ours["hmean"] - theirs["hmean"]) for ours, theirs in pages]) < 5e-4


def test_polygons_have_the_counts_of_the_competition_but_for_false_alarms():
    def but_alarms(counts):
        hits = counts["num_char_det"] - counts["num_char_fp"]
        others = [k for k in metric.COUNTS if k not in ("num_char_fp", "num_char_det")]
        return [*(counts[k] for k in others), hits]

    pages = list(golden("pseudo", "page"))
    assert sum(but_alarms(ours) == but_alarms(theirs) for ours, theirs in pages) >= 85
    clean = [(ours, theirs) for ours, theirs in pages if theirs["num_char_fp"] == 0]
    assert np.mean([abs(ours["recall"] - theirs["recall"]) for ours, theirs in pages]) < 2e-3
    assert np.mean([abs(ours["hmean"] - theirs["hmean"]) for ours, theirs in clean]) < 1e-3
    assert len(clean) > 20


def read_zip(name, prefix):
    pages = {}
    with zipfile.ZipFile(DATA / name) as archive:
        for member in sorted(archive.namelist()):
            lines = archive.read(member).decode("utf-8-sig").splitlines()
            rows = [line.split(",", 8) for line in lines if line.strip()]
            polygons = [np.array(row[:8], float).reshape(4, 2) for row in rows]
            pages[member.removeprefix(prefix)] = polygons, [row[8] for row in rows]
    return pages


def test_public_pages_have_the_published_hmean():
    gt = read_zip("gt_eval_doc_v1_kr.zip", "gt_")
    det = read_zip("res_eval_doc_v1_kr.zip", "res_")
    assert len(gt) == 100 and gt.keys() == det.keys()
    pages = [page_of(polygons, name, texts) for name, (polygons, texts) in gt.items()]
    rows = metric.metric_rows(pages, [det[p.name] for p in pages])
    result = evaluate.summarise(pages, rows, {}).to_json()
    assert result["micro"]["hmean"] == pytest.approx(0.977989360950786, abs=1e-4)


@both_variants
def test_perfect_detection_scores_one_from_whatever_corner_a_label_is_read(variant):
    words = [box(10, 10, 95, 20), box(10, 50, 20, 95), box(200.5, 40.25, 51, 10)]
    words.append(np.array([(210, 110), (305, 114), (304, 134), (209, 130)], float))
    for start in range(4):
        labels, texts = [np.roll(word, start, 0) for word in words], ["abcde", "fghij", "k", "abc"]
        counts = cleval(labels, words, texts=texts, variant=variant)
        assert scores(counts) == (1, 1, 1)
        assert counts["num_char_gt"] == (5 + 5 + 6 + 5 if variant == "page" else 14)


def test_characters_follow_the_aspect_of_the_smallest_rectangle():
    turned = box(0, 0, 95, 20) @ np.array([(0.8, 0.6), (-0.6, 0.8)])
    words = [box(0, 0, 95, 20), turned, turned[[2, 0, 1, 3]], box(0, 0, 3000, 10)]
    assert metric.pseudo_chars(words).tolist() == [5, 5, 5, 100]
    assert metric.pseudo_chars([box(0, 0, 30, 10), box(3, 3, 7, 7)]).tolist() == [3, 2]


@both_variants
def test_centres_divide_the_middle_line(variant):
    hexagon = np.array([(0, 0), (40, 0), (80, 0), (80, 10), (40, 10), (0, 10)], float)
    centres = metric.char_centres([box(0, 0, 80, 10), hexagon], np.array([4, 4]), variant)
    assert centres.tolist() == [[10, 5], [30, 5], [50, 5], [70, 5]] * 2
    centres = metric.char_centres([box(0, 0, 10, 80)], np.array([2]), variant).tolist()
    assert centres == ([[2.5, 40], [7.5, 40]] if variant == "page" else [[5, 60], [5, 20]])
    for points in ([(0, 0), (8, 0), (4, 6)], [(0, 0), (8, 0), (9, 4), (4, 6), (-1, 4)]):
        (centre,) = metric.char_centres([np.array(points, float)], np.array([1]), variant)
        ends = [0, 1, 2, -1]  # of top and bottom; an odd bottom has a vertex too many
        assert centre.tolist() == np.mean([points[n] for n in ends], 0).tolist()


def test_a_split_pays_one_character_of_recall_and_a_merge_one_of_precision():
    halves, whole = [box(0, 0, 40, 10), box(50, 0, 40, 10)], [box(0, 0, 90, 10)]
    split, merged = cleval(whole, halves), cleval(halves, whole)
    assert (split["num_char_gt"], split["num_splitted"], split["num_merged"]) == (9, 1, 0)
    assert (split["precision"], split["recall"]) == (1, 7 / 9)
    assert (merged["num_char_gt"], merged["num_splitted"], merged["num_merged"]) == (8, 0, 1)
    assert (merged["precision"], merged["recall"]) == (7 / 8, 1)


def test_miss_double_and_false_alarm():
    words = [box(0, 0, 40, 10), box(100, 0, 60, 10)]
    missed = cleval(words, words[:1])
    assert (missed["precision"], missed["recall"]) == (1, 4 / 10)
    assert missed["hmean"] == pytest.approx(2 * 0.4 / 1.4)
    double = cleval(words[:1], words[:1] * 2)
    assert (double["num_char_overlapped"], double["num_char_det"]) == (4, 8)
    assert (double["precision"], double["recall"]) == (4 / 8, 3 / 4)
    assert cleval([box(0, 0, 0.3 * 7, 10)], [box(0, 0, 7, 10)])["num_char_fp"] == 0  # 0.3 is enough
    alarm, upright = box(300, 300, 55, 10), box(300, 300, 10, 55)
    assert cleval(words[:1], [words[0], alarm])["precision"] == 4 / (4 + 6)
    for wrong, cost in ((alarm, 1), (upright, 6), (box(300, 300, 10, 955), 10)):
        counts = cleval(words[:1], [words[0], wrong], texts=["abcd"], variant="official")
        assert counts["num_char_fp"] == cost and counts["precision"] == 4 / (4 + cost)


def test_an_empty_transcription_has_no_characters_as_in_the_official_package():
    """It is not a missing one, whose characters are guessed: WildReceipt has 541, which would
    change micro."""
    words = [box(0, 0, 40, 10), box(100, 0, 60, 10)]
    for text, total in (("", 4), (None, 4 + 6)):
        counts = cleval(words, words, texts=["abcd", text], variant="official")
        assert counts["num_char_gt"] == total and counts["recall"] == 1
        page = Page("a.png", Path("a.png"))
        page.add("1", words[0], text)
        assert page.texts == [text]


@both_variants
def test_dont_care_takes_labels_and_detections_out(variant):
    words, how = [box(0, 0, 40, 10), box(100, 0, 60, 10)], {"variant": variant}
    how |= {"ignore": [False, True], "texts": ["abcd", "efghij"]}
    flagged = cleval(words, words, **how)
    assert flagged["num_char_gt"] == flagged["num_char_det"] == 4 and flagged["hmean"] == 1
    assert cleval(words, words, texts=["abcd", "###"], variant=variant) == flagged
    assert cleval(words, words[:1], **how) == flagged


@both_variants
def test_dont_care_loses_what_a_label_covers(variant):
    gt = [box(0, 0, 200, 100), box(20, 20, 60, 10)]
    det = [gt[1], box(150, 50, 30, 10)]
    counts = cleval(gt, det, ignore=[True, False], texts=["###", "abcdef"], variant=variant)
    assert counts["num_char_fp"] == 0 and scores(counts) == (1, 1, 1)
    both = cleval(gt, [gt[1], box(0, 20, 100, 10)], ignore=[True, False], variant=variant)
    assert both["recall"] == 0  # as in the reference: close, so that no other is the only one


@both_variants
def test_small_parts_of_dont_care_labels_take_a_detection_out_together(variant):
    det = [box(0, 0, 100, 10)]  # one label is not 0.3 of it, two are
    for count, alarms in ((1, True), (2, False)):
        gt = [box(0, 0, 20, 10), box(80, 0, 20, 10)][:count]
        counts = cleval(gt, det, ignore=[True] * count, variant=variant)
        assert (counts["num_char_fp"] > 0) == alarms


@both_variants
def test_pages_without_labels_or_detections_score_zero(variant):
    for gt, det in ([], []), ([], [box(0, 0, 9, 9)]), ([box(0, 0, 9, 9)], []):
        assert scores(cleval(gt, det, variant=variant)) == (0, 0, 0)


def test_only_500_detections_count_for_the_competition():
    word = box(0, 0, 40, 10)
    det = [box(500, 500, 40, 10)] * 500 + [word]
    assert cleval([word], det)["recall"] == 0
    assert cleval([word], det, variant="official")["recall"] == 1


def test_micro_sums_and_the_mean_averages():
    full, half = [box(0, 0, 90, 10)], [box(0, 0, 30, 10), box(50, 0, 30, 10)]
    pages = [page_of(full, "a"), page_of(half, "b", ignore=[False, False])]
    rows = metric.metric_rows(pages, [(full, [1.0]), (half[:1], [1.0])])
    result = evaluate.summarise(pages, rows, {}).to_json()
    assert scores(result) == pytest.approx((1, 3 / 4, (1 + 2 / 3) / 2))
    assert scores(result["micro"]) == pytest.approx((1, 12 / 15, 2 * 0.8 / 1.8))
    assert scores(result["iou50"]) == pytest.approx((1, 2 / 3, 2 * (2 / 3) / (5 / 3)))
    assert rows.keys() == METRICS.keys()
    assert (result["pages"], result["pages_without_labels"]) == (2, 0)
    assert [*result["labels"].items()] == [*zip(OUTCOMES, (2, 0, 0, 0, 1))]
    assert result["pairs"][4] == {"gap": (1.5, 2.5), "pairs": 1, "joined": 0}


def hits(gt, det, ignore=None):
    """Numbers of hits, labels and detections that count."""
    return tuple(iou50(gt, det, ignore)[[2, 0, 1]])


def test_iou_matches_one_to_one():
    words = [box(0, 0, 40, 10), box(100, 0, 40, 10), box(200, 0, 40, 10)]
    assert hits(words, words) == (3, 3, 3)
    shifted = [words[0] + (13, 0), words[1] + (14, 0)]  # IoU 27/53 and 26/54
    assert hits(words, shifted) == (1, 3, 2)
    assert hits(words[:1], words[:1] * 2) == (1, 1, 2)
    assert iou_matches(words, shifted)[0] == [(0, 0)]
    inside = [words[0], words[2] + (19, 0), words[1] + (21, 0)]
    assert hits(words, inside, [False, True, True]) == (1, 1, 2)


def turn(polygons, angle):
    (c, s), centre = (np.cos(angle), np.sin(angle)), (300, 200)
    return [(points - centre) @ ((c, s), (-s, c)) + centre for points in polygons]


OUTCOME = [  # detections (x, length) of two labels (0, 60) and (65, 20)
    ("hit hit", (0, 60), (65, 20)),
    ("hit hit", (0, 85), (65, 20)),
    ("hit joined", (0, 85)),  # IoU .71
    ("joined joined", (-40, 130)),  # IoU .46
    ("joined joined", (-40, 130), (0, 29), (31, 29)),
    ("split missed", (0, 29), (31, 29)),
    ("loose loose", (0, 29), (31, 90)),
    ("loose missed", (0, 13)),  # IoU .22
    ("loose missed", (-400, 460)),  # IoU .13, but all of it
    ("missed missed", (0, 11), (12, 11)),  # IoU .18 each, not half together
    ("missed missed",),
]


@pytest.mark.parametrize("angle", [0, 0.7, 2])
def test_a_label_has_the_first_outcome_that_holds(angle):
    def outcomes(*det, ignore=None):
        found = [turn([box(x, 0, w, 10) for x, w in line], angle) for line in (labels, det)]
        return " ".join(iou_matches(*found, ignore)[2])

    labels = (0, 60), (65, 20)
    for expected, *det in OUTCOME:
        assert outcomes(*det) == expected, det
    for ignore, expected in (([0, 1], "hit "), ([1, 0], " missed"), ([1, 1], " ")):
        assert outcomes((0, 85), ignore=ignore) == expected


@pytest.mark.parametrize("angle", [0, 0.7, np.pi / 2, 3])
def test_neighbours_are_counted_by_their_gap_over_their_height(angle):
    line = [box(x, 0, 30, 10) for x in (0, 32, 67, 105, 147, 197, 257)]  # gaps .2 .5 .8 1.2 2 3
    for labels, lines in ((line, 1), (line + [p + (3, 14) for p in line], 2), (line[:1], 0)):
        joined = [*labels[2:], box(0, 0, 62, 10), box(67, 0, 68, 10), box(147, 1, 80, 8)]
        row = iou50(turn(labels, angle), turn(joined, angle))
        assert row[11:17].tolist() == [lines] * 6
        assert row[17:].tolist() == ([1, 0, 1, 0, 1, 0] if lines else [0] * 6)
    hidden = iou50(turn(line, angle), turn(joined, angle), [n == 1 for n in range(7)])
    assert hidden[11:].tolist() == [0, 0, 1, 1, 1, 1] + [0, 0, 1, 0, 1, 0]
    assert not iou50([], line)[11:].any() and not iou50(line, [])[17:].any()  # empty pages


@pytest.mark.parametrize("angle", [0, 0.3, -0.7])
def test_gaps_to_the_nearest_are_measured_along_and_across_lines(angle):
    labels = turn([box(0, 0, 40, 10), box(60, 0, 40, 10), box(0, 50, 40, 10)], angle)
    outlines = turn([box(43, 4, 14, 8), box(70, 20, 40, 10), box(110, 60, 30, 10)], angle)
    expected = [[3, np.inf, 2], [10, 10, 20], [np.hypot(10, 50), np.inf, 10]]
    np.testing.assert_allclose(metric.line_gaps(outlines, labels), expected, atol=1e-6)
    assert (metric.line_gaps(outlines, []) == np.inf).all()
    assert metric.line_gaps([], labels).shape == (0, 3)


@both_variants
def test_order_start_and_direction_do_not_matter(variant):
    rng = np.random.default_rng(1)
    for _ in range(10):
        gt, det = map(np.round, random_page(rng))
        ignore, texts = rng.random(len(gt)) < 0.2, ["x" * rng.integers(1, 12) for _ in gt]
        how = {"ignore": ignore, "texts": texts, "variant": variant}
        counts = cleval(gt, det, **how)
        a, b = rng.permutation(len(gt)), rng.permutation(len(det))
        shuffled = {"ignore": ignore[a], "texts": [texts[n] for n in a], "variant": variant}
        assert cleval(gt[a], det[b], **shuffled) == counts
        if variant == "page":  # the official aspect of a false alarm depends on its first corner
            turned = [np.roll(points, rng.integers(4), 0)[:: rng.choice((1, -1))] for points in det]
            assert cleval(gt, turned, **how) == counts
        else:
            assert cleval(gt + 1000, det + 1000, **how) == counts


BROKEN = [
    *(np.full((4, 2), np.nan), np.zeros((4, 2)), np.zeros((0, 2)), np.zeros((2, 2))),
    *(np.array([(0, 0), (50, 50), (100, 100)]), np.array([(0, 0), (9, 9), (9, 0), (0, 9)])),
    *(np.array([(np.inf, 0), (9, 9), (9, 0)]), box(0, 0, 40, 1e-12), box(0, 0, 1e9, 1e9)),
]


@both_variants
def test_random_and_broken_geometry_gives_finite_scores_and_each_label_one_outcome(variant):
    rng = np.random.default_rng(2)
    for _ in range(20):
        gt, det = ([rng.uniform(0, 200, (rng.integers(3, 13), 2)) for _ in range(20)] for _ in "ab")
        gt, det = gt + BROKEN, det + BROKEN
        ignore = rng.random(len(gt)) < 0.2
        counts = cleval(gt, det, ignore=ignore, variant=variant)
        row = iou50(gt, det, ignore)
        values = np.array([*counts.values(), *row], float)
        assert np.isfinite(values).all() and (values >= 0).all()
        assert row[6:11].sum() == row[0] == (~ignore).sum() and row[6] == row[2]
        assert (row[17:] <= row[11:17]).all()
        assert all(0 <= score <= 1 for score in scores(counts))


def test_crossed_label_is_found_by_its_own_points_and_one_without_area_by_none():
    bow_tie = np.array([(0, 0), (40, 20), (40, 0), (0, 20)], float)
    assert hits([bow_tie], [bow_tie]) == (1, 1, 1)
    assert hits([box(0, 0, 1e-4, 1e-4)], [box(0, 0, 1e-4, 1e-4)]) == (0, 1, 1)
    for nothing in BROKEN[:5]:
        assert hits([nothing], [nothing]) == (0, 1, 1)
        assert cleval([nothing], [nothing])["num_char_fp"] == 100


def test_wrong_arguments_are_named():
    word = box(0, 0, 40, 10)
    for words, wrong in (
        ("'micro' is unknown", lambda: cleval([word], [word], variant="micro")),
        ("1 labels, 2 texts", lambda: cleval([word], [word], texts=["a", "b"])),
        ("2 ignore flags", lambda: iou50([word], [word], [True, False])),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


def test_a_tie_is_not_more_than_half_however_it_is_rounded():
    """IoU 1/2, half of a label covered, half of a detection on a label or on don't care."""
    label, wider, half = box(0, 0, 30, 10), box(10, 0, 30, 10), box(15, 0, 30, 10)
    rng = np.random.default_rng(4)
    for angle, offset in zip(rng.uniform(0, 3, 200), rng.uniform(0, 999, (200, 2))):
        words, shifted, covering = (
            [points + offset for points in turn([polygon], angle)]
            for polygon in (label, wider, half)
        )
        assert iou_matches(words, shifted).pairs == []
        assert not iou_matches(words, covering).together.any()
        assert iou_matches(words, covering, [True]).valid.all()


@pytest.mark.parametrize("angle", [0, 0.3, 0.7, 2])
def test_neighbours_that_overlap_have_no_gap_and_those_that_touch_one_of_0(angle):
    overlapping = turn([box(0, 0, 30, 10), box(28.8, 0, 30, 10)], angle)
    touching = turn([box(0, 0, 30, 10), box(30, 0, 30, 10), box(60, 0, 30, 10)], angle)
    whole = turn([box(0, 0, 90, 10)], angle)
    for words, pairs in ((overlapping, 0), (touching, 2)):
        row = iou50(words, whole)
        assert row[11:].tolist() == [pairs, 0, 0, 0, 0, 0] * 2
        assert row[6 + OUTCOMES.index("joined")] == len(words)
