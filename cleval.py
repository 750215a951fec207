"""How good are polygons? CLEval of a page, matching by IoU, scores of many pages.

CLEval (Baek et al. 2020, arXiv 2006.06244) counts characters; each of its rules is a function here.
`hmean` is the receipt competition's variant, a mean over pages; `micro` is official CLEval."""

from typing import NamedTuple

import cv2
import numpy as np
import shapely

from overlap import (
    Shapes,
    as_points,
    contains,
    expand,
    join_vertices,
    make_shapes,
    overlap_area,
    starts,
    to_shapely,
    touching,
)

AREA_PRECISION = 0.3  # share of a detection's area that has to lie on a label
MORE_THAN_HALF = 0.5 + 1e-9  # exactly half is not more, however the areas are rounded
MAX_DETECTIONS = 500  # the competition scores the first 500 detections of a page
SCORES = ("precision", "recall", "hmean")
COUNTS = (
    "num_char_gt",
    "num_char_det",
    "num_char_tp_recall",
    "num_char_tp_precision",
    "gran_score_recall",
    "gran_score_precision",  # up to here what the scores are made of
    "num_char_fp",
    "num_splitted",
    "num_merged",
    "num_char_overlapped",
)
OUTCOMES = ("hit", "joined", "split", "loose", "missed")  # of labels, see iou_matches
GAPS = (0, 0.3, 0.6, 1, 1.5, 2.5, None)  # ends of six bins, see line_neighbours

# ---------------------------------------------------------------- CLEval


class Labels(NamedTuple):
    """N labels of a page, to be compared with many sets of detections."""

    num_chars: np.ndarray  # [N]
    centres: np.ndarray  # [C, 2] of their characters, label after label
    ignore: np.ndarray  # [N] don't care
    shapes: Shapes  # don't-care ones without what other labels cover of them


class Pairs(NamedTuple):
    """T pairs of a label and one of M detections that may meet."""

    det: list  # M polygons
    label: np.ndarray  # [T]
    detection: np.ndarray  # [T]
    char: np.ndarray  # [H] characters of a label inside a detection
    pair: np.ndarray  # [H] and the pair of each
    inside: np.ndarray  # [T] how many a pair has
    share: np.ndarray  # [T] of the detection's area on the label; 32 bits, so that 0.3 is 0.3


def cleval(gt_polygons, det_polygons, *, ignore=None, texts=None, variant="page"):
    """Labels N x [P, 2] and detections M x [P, 2] in pixels of a page -> dict of COUNTS, which add
    up over pages, and recall, precision, hmean, all 0 without labels.
    ignore: N flags of don't-care labels; texts: N strings or None, "###" is don't care too.
    variant: "page", the receipt competition's, counts a label's characters by its shape and only
    the first 500 detections; "official", the clovaai package's, counts those of its text, by its
    shape where that is None. A polygon that crosses itself is the union of its loops; one without
    area (a line, NaN) matches nothing and has 100 characters by shape. Raises ValueError."""
    if variant not in ("page", "official"):
        raise ValueError(f'variant {variant!r} is unknown; use "page" or "official"')
    gt, det = as_points(gt_polygons), as_points(det_polygons)
    if variant == "page":
        det = det[:MAX_DETECTIONS]
    texts = [None] * len(gt) if texts is None else texts
    if len(texts) != len(gt):
        raise ValueError(f"{len(gt)} labels, {len(texts)} texts; give one a label")

    ignore = as_flags(ignore, len(gt))
    labels = prepare_labels(gt, texts, ignore, variant)
    pairs = page_pairs(labels, det)
    everything = np.ones((1, len(det)), bool)
    (counts,) = count_kept(labels, pairs, everything, variant)
    scores = micro_scores(counts)
    return dict(zip(COUNTS + SCORES, [*counts.tolist(), *scores.tolist()]))


def as_flags(ignore, count):
    """Flags of `count` labels, None for none -> bool [N]. Raises ValueError on another number."""
    if ignore is None:
        return np.zeros(count, bool)
    if len(ignore) != count:
        raise ValueError(f"{count} labels, {len(ignore)} ignore flags; give one a label")
    return np.asarray(ignore, bool)


def prepare_labels(polygons, texts, ignore, variant):
    """N polygons from `as_points`, texts and flags [N] as in `cleval` -> Labels."""
    ignore = ignore | np.array([text == "###" for text in texts], bool)
    num_chars = pseudo_chars(polygons)
    if variant == "official":
        given = [n if text is None else len(text) for n, text in zip(num_chars, texts)]
        num_chars = np.array(given, int)
        # characters of don't-care labels only say where these reach
        aspect = reading_aspect([polygons[n] for n in np.flatnonzero(ignore)])
        num_chars[ignore] = up_to_10_chars(np.maximum(aspect, 1 / aspect))

    # a don't-care label loses what other labels cover of it
    areas = to_shapely(polygons)
    box = shapely.bounds(areas)
    dont_care = np.flatnonzero(ignore)
    others = np.flatnonzero(~ignore)
    i, j = touching(box[dont_care], box[others])
    for n, other in zip(dont_care[i], others[j]):
        areas[n] = shapely.difference(areas[n], areas[other])

    centres = char_centres(polygons, num_chars, variant)
    return Labels(num_chars, centres, ignore, make_shapes(areas))


def page_pairs(labels, det):
    """Labels and M polygons from `as_points` -> Pairs."""
    shapes = make_shapes(to_shapely(det))
    near = labels.shapes.box + (-1, -1, 1, 1)  # a centre cut to pixels lies up to one outside
    label, detection = touching(near, shapes.box)

    # each character of a label that lies inside the detection
    pair, k = expand(labels.num_chars[label])
    char = starts(labels.num_chars)[label][pair] + k
    held = contains(shapes, detection[pair], labels.centres[char])
    char, pair = char[held], pair[held]
    inside = np.bincount(pair, minlength=len(label))

    shared = overlap_area(labels.shapes, label, shapes, detection)
    share = np.float32(shared / shapes.area[detection])
    return Pairs(det, label, detection, char, pair, inside, share)


def count_kept(labels, pairs, keep, variant):
    """Labels, Pairs and S choices [S, M] of detections -> counts [S, 10] in the order of COUNTS."""
    num_gt, num_det = len(labels.ignore), len(pairs.det)

    # detections on don't-care labels are not judged
    meets = (pairs.inside > 0) | (pairs.share >= AREA_PRECISION)
    meets &= labels.ignore[pairs.label]
    on_dont_care = np.bincount(pairs.detection, pairs.share * meets, num_det)
    judged = on_dont_care < np.float32(AREA_PRECISION)  # [M]

    match = instance_matches(pairs, labels.ignore, keep, judged)  # [S, T]
    pieces = tally(match, pairs.label, num_gt)  # [S, N] of a label
    joined = tally(match, pairs.detection, num_det)  # [S, M] labels in a detection
    unmatched = keep & judged & (joined == 0)

    total = labels.num_chars[~labels.ignore].sum()
    held = tally(match[:, pairs.pair], pairs.char, len(labels.centres))  # [S, C]
    recalled = (held > 0).sum(1)
    detected = match @ pairs.inside  # a character once for each detection that has it
    alarms = false_alarms(pairs.det, unmatched, variant)

    columns = [
        np.full_like(recalled, total),
        detected + alarms,
        recalled,
        recalled,
        np.maximum(pieces - 1, 0).sum(1),  # granularity
        np.maximum(joined - 1, 0).sum(1),
        alarms,
        (pieces > 1).sum(1),
        (joined > 1).sum(1),
        detected - recalled,
    ]
    return np.stack(columns, 1)


def instance_matches(pairs, ignore, keep, judged):
    """[S, T] whether a kept pair matches. A detection is close to a label if it holds characters of
    it and AREA_PRECISION of the detection lies on the label."""
    label, detection = pairs.label, pairs.detection
    num_gt, num_det = len(ignore), len(pairs.det)
    kept = keep[:, detection]
    care = ~ignore[label]
    counting = kept & care & judged[detection]
    holds = pairs.inside > 0
    close = holds & (pairs.share >= AREA_PRECISION)

    # the only detection close to its label, or one of several that count
    alone = tally(kept & close, label, num_gt) == 1
    split = tally(counting & close, label, num_gt) > 1
    one_label = close & (alone | split)[:, label]

    # a detection that holds characters of several labels and lies on them together
    holds &= care
    several = np.bincount(detection, holds, num_det) > 1
    share = np.bincount(detection, pairs.share * holds, num_det)
    joins = several & (share >= AREA_PRECISION)
    many_labels = holds & joins[detection]
    return counting & (one_label | many_labels)


def false_alarms(det, unmatched, variant):
    """M polygons, flags [S, M] of those that match nothing -> [S] how many characters these add to
    those detected: in "page" as many as labels of their shape have, in "official" 1 each, or up to
    10 where they are upright."""
    some = np.flatnonzero(unmatched.any(0))
    polygons = [det[m] for m in some]
    if variant == "page":
        cost = pseudo_chars(polygons)
    else:
        cost = up_to_10_chars(1 / (1e-5 + reading_aspect(polygons)))
    return unmatched[:, some] @ cost


def tally(flags, index, size):
    """Flags [S, T], index [T] below size -> [S, size] how many flags each index has."""
    s, t = np.nonzero(flags)
    cell = s * size + index[t]
    counts = np.bincount(cell, minlength=len(flags) * size)
    return counts.reshape(len(flags), size)


# ---------------------------------------------------------------- characters


def min_area_sides(polygons):
    """N polygons -> sides [N, 2] of their smallest rotated rectangles, first the side that is
    nearer to the horizontal."""
    sides = np.zeros((len(polygons), 2))
    for n, points in enumerate(polygons):
        _, size, angle = cv2.minAreaRect(points.astype(np.float32))
        sides[n] = size if abs(angle) <= 45 else size[::-1]
    return sides


def rectangle_around(polygon):
    """Corners [4, 2] of the smallest rectangle around a polygon [P, 2], clockwise. The first one is
    the nearest to the polygon's first vertex, where the top of a word begins (`char_centres`)."""
    corners = cv2.boxPoints(cv2.minAreaRect(np.float32(polygon)))
    first = np.abs(corners - polygon[0]).sum(1).argmin()
    return np.roll(corners, -first, 0)


def from_top_left(polygon):
    """The same polygon [P, 2], begun at its upper left vertex, the one with the least x + y: there
    `char_centres` expects the top of a word to begin."""
    return np.roll(polygon, -polygon.sum(1).argmin(), 0)


def pseudo_chars(polygons):
    """N polygons -> [N] characters by shape: min(round(0.5 + long side / short side), 100). Halves
    round to even, but ratios 3, 4, ... do not: the reference's rounding errors keep them below."""
    short, long = np.sort(min_area_sides(polygons), 1).T
    aspect = np.where(short > 1e-6, long / np.maximum(short, 1e-6), 100)
    num_chars = np.ceil(aspect - 1e-5).clip(2, 100)
    return num_chars.astype(int)


def up_to_10_chars(aspect):
    return np.minimum(np.rint(0.5 + aspect), 10).astype(int)


def reading_aspect(polygons):
    """N polygons -> [N] width / height. Quads begin with their top left vertex, and their width and
    height are means of opposite sides."""
    sides = min_area_sides(polygons)
    is_quad = np.array([len(points) == 4 for points in polygons], bool)
    quads = [points for points in polygons if len(points) == 4]
    corners = np.reshape(quads, (-1, 4, 2))
    edges = corners[:, [1, 2, 3, 0]] - corners
    length = np.hypot(edges[..., 0], edges[..., 1])  # [Q, 4] top, right, bottom, left
    sides[is_quad] = (length[:, :2] + length[:, 2:]) / 2
    width, height = sides.T + 1e-5
    return width / height


def char_centres(polygons, num_chars, variant):
    """N polygons, [N] numbers of characters -> [C, 2] centres, label after label: the first half of
    the vertices is the top of the word, the second its bottom, read backwards; sections between
    vertices have the same number of steps, and a centre is the mean of four. "page" cuts steps to
    whole pixels as the competition does, "official" turns quads over twice as tall as wide."""
    polygons = [p if len(p) > 3 else p[[0, 1, 2, 2]] for p in polygons]  # a triangle's bottom
    if variant == "official":
        for n in np.flatnonzero(reading_aspect(polygons) < 0.5):
            if len(polygons[n]) == 4:
                polygons[n] = polygons[n][[3, 0, 1, 2]]

    xy, size = join_vertices(polygons)
    label, k = expand(num_chars)
    first = starts(size)[label]
    size = size[label]
    steps = num_chars[label]

    # a character lies between two points of the top and two of the bottom
    half = size // 2
    step = np.stack([k, k + 1])  # [2, C]
    section, part = np.divmod(step * (half - 1), steps)
    end = np.where(section < half - 1, size - 1 - section, half)  # odd: a vertex is left over
    begin = np.stack([section, end])  # [top or bottom, 2, C]
    following = np.stack([section + 1, size - 2 - section])
    start = xy.T.take(first + begin, 1)  # [x or y, top or bottom, 2, C]
    stop = xy.T.take(first + following, 1)
    point = start + (stop - start) / steps * part
    if variant == "page":
        point = np.where(part > 0, np.trunc(point), point)
    return point.reshape(2, 4, -1).mean(1).T


# ---------------------------------------------------------------- IoU


class Overlaps(NamedTuple):
    """What N labels and M detections share."""

    shared: np.ndarray  # [N, M] areas, 0 for don't care
    union: np.ndarray  # [N, M]
    valid: np.ndarray  # [M] whether a detection counts
    gt: np.ndarray  # [N] areas of labels
    det: np.ndarray  # [M] of detections
    ignore: np.ndarray  # [N]


class Matches(NamedTuple):
    """What became of N labels and M detections at IoU 0.5."""

    pairs: list  # (label, detection), each once
    valid: np.ndarray  # [M] whether a detection counts
    outcome: np.ndarray  # [N] of OUTCOMES, "" if don't care
    together: np.ndarray  # [N, N] whether one detection covers more than half of both labels


def shared_areas(gt_polygons, det_polygons, ignore):
    """Polygons and ignore as in `cleval` -> Overlaps. A detection counts if at most half of it is
    on a don't-care label (ICDAR 2015, task 4.1). Raises ValueError."""
    gt = make_shapes(to_shapely(as_points(gt_polygons)))
    det = make_shapes(to_shapely(as_points(det_polygons)))
    ignore = as_flags(ignore, len(gt.area))
    shared = np.zeros((len(gt.area), len(det.area)))
    i, j = touching(gt.box, det.box)
    shared[i, j] = overlap_area(gt, i, det, j)
    valid = ~(shared[ignore] > MORE_THAN_HALF * det.area).any(0)
    shared *= ~ignore[:, None] & valid
    union = gt.area[:, None] + det.area - shared
    return Overlaps(shared, union, valid, gt.area, det.area, ignore)


def one_to_one(close):
    """Flags [N, M] -> pairs (label, detection), each once, in order."""
    of_label, of_detection = {}, {}
    for label, detection in np.argwhere(close).tolist():
        if label not in of_label and detection not in of_detection:
            of_label[label] = detection
            of_detection[detection] = label
    return list(of_label.items())


def iou_matches(gt_polygons, det_polygons, ignore=None):
    """Polygons and ignore as in `cleval` -> Matches, pairs those with IoU > 0.5, one to one in
    order. An outcome is the first that holds: hit, in a pair; joined, one detection covers more
    than half of it and of another; split, two or more, each by more than half on it, add up to more
    than half of it; loose, more than half of it covered by one, or IoU > 0.2; missed."""
    shared, union, valid, gt, det, ignore = shared_areas(gt_polygons, det_polygons, ignore)
    pairs = one_to_one(shared > MORE_THAN_HALF * union)
    covered = shared > MORE_THAN_HALF * gt[:, None]  # [N, M]
    piece = shared > MORE_THAN_HALF * det
    together = np.float32(covered) @ covered.T > 0  # a product of bools is slow

    hit = np.zeros(len(gt), bool)
    hit[[label for label, _ in pairs]] = True
    joined = together.sum(1) > 1
    several = piece.sum(1) > 1
    split = several & ((shared * piece).sum(1) > MORE_THAN_HALF * gt)
    loose = (covered | (shared > 0.2 * union)).any(1)

    rules = [ignore, hit, joined, split, loose]
    outcome = np.select(rules, ["", *OUTCOMES[:4]], "missed")
    return Matches(pairs, valid, outcome, together)


def iou50(gt_polygons, det_polygons, ignore=None):
    """Polygons and ignore as in `cleval` -> [23] counts that add up over pages: labels, detections,
    hits twice and 0, 0 for micro_scores; labels of each of OUTCOMES; neighbours on a line by GAPS,
    without those that overlap; those that one detection has joined."""
    pairs, valid, outcome, together = iou_matches(gt_polygons, det_polygons, ignore)
    outcomes = [np.count_nonzero(outcome == name) for name in OUTCOMES]
    hits = len(pairs)
    row = [sum(outcomes), valid.sum(), hits, hits, 0, 0, *outcomes]

    label, after, gap = line_neighbours(as_points(gt_polygons))
    care = outcome != ""
    counting = care[label] & care[after] & (gap > -1e-6)  # labels that touch: 0, but rounded
    joined = counting & together[label, after]
    step = np.searchsorted(GAPS[1:-1], gap, "right")
    gaps = [np.bincount(step[pair], minlength=6) for pair in (counting, joined)]
    return np.concatenate([row, *gaps], dtype=float)


def line_boxes(polygons):
    """N polygons -> [N, 4] left, top, right and bottom end of each along and across their lines."""
    xy, size = join_vertices(polygons)
    first = starts(size)
    xy = xy @ (1, 1j)  # [V] complex
    xy *= np.exp(-1j * page_angle(xy, first))
    xy = xy.view(float).reshape(-1, 2)
    low = np.minimum.reduceat(xy, first)
    high = np.maximum.reduceat(xy, first)
    return np.hstack([low, high])


def line_neighbours(polygons):
    """N polygons -> K pairs of neighbours on a line: index [K] of one, index [K] of the next, gap
    [K] between them over their mean height, below 0 where they overlap. The next one is the first
    that lies beside it and begins after 95 % of its width."""
    left, top, right, bottom = line_boxes(polygons).T  # [N]
    height, middle = bottom - top, top + bottom

    # beside: the middle of one lies within the height of the other
    apart = np.abs(middle[:, None] - middle)  # twice as far as the middles
    beside = apart < np.maximum(height[:, None], height)
    after = left > (0.05 * left + 0.95 * right)[:, None]
    order = np.argsort(left)
    label, place = np.nonzero((beside & after)[:, order])
    label, first = np.unique(label, return_index=True)
    following = order[place[first]]

    distance = left[following] - right[label]
    gap = 2 * distance / (height[label] + height[following])
    return label, following, gap


def line_gaps(outlines, polygons):
    """K outlines, N polygons [P, 2] -> [K, 3] in their unit: how far each outline is from the
    nearest polygon, from the nearest one above or below it, and its lower end from the nearest
    lower end, across lines. 0 where they overlap, inf where there is none."""
    count = len(outlines)
    if not count or not len(polygons):
        return np.full((count, 3), np.inf)
    boxes = line_boxes([*outlines, *polygons])
    own = boxes[:count, None]  # [K, 1, 4]
    others = boxes[count:]  # [N, 4]

    # how far an outline begins behind a polygon's end, or ends before its beginning
    behind = own[..., :2] - others[:, 2:]
    before = others[:, :2] - own[..., 2:]
    apart = np.maximum(behind, before)  # [K, N, 2]
    along, across = apart.clip(0).T  # [N, K]
    above = np.where(along, np.inf, across)
    lower = np.abs(own[..., 3] - others[:, 3]).T
    nearest = [gap.min(0) for gap in (np.hypot(along, across), above, lower)]
    return np.stack(nearest, 1)


def page_angle(xy, first):
    """Complex vertices [V] of polygons that begin at first [N] -> the angle in radians of most long
    edges. The square of an edge has twice its angle, so that opposite edges add up and edges at
    right angles cancel, and the square of its length. Each polygon's last edge is left out."""
    between = first[1:] - 1  # from a polygon to the next one
    edges = np.delete(np.diff(xy), between)
    return 0.5 * np.angle((edges**2).sum())


# ---------------------------------------------------------------- many pages


def micro_scores(sums):
    """Summed counts [..., 6 or more] in the order of COUNTS -> SCORES [..., 3]; x / 0 is 0."""
    total, hits, granularity = np.split(sums[..., :6], 3, -1)  # of labels and of detections
    counted = np.maximum(hits - granularity, 0)
    shares = counted / np.where(total > 0, total, np.inf)
    recall, precision = shares[..., 0], shares[..., 1]
    hmean = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return np.stack([precision, recall, hmean], -1)


def mean_scores(sums):
    """Sums over pages [..., s + 1] of s scores and 1 -> the means of the scores [..., s]."""
    return sums[..., :-1] / sums[..., -1:]


METRICS = {"page": mean_scores, "micro": micro_scores, "iou50": micro_scores}
NAMES = {
    "page": "CLEval, competition's: pseudo characters, mean over pages",
    "micro": "CLEval, official: characters of transcriptions, micro",
    "iou50": "IoU 0.5, one to one",
}
BY_SHAPE = "CLEval, official: characters guessed by shape, no transcriptions, micro"


def metric_names(pages):
    """{metric: what it is called on these pages}: NAMES, but for pages without transcriptions."""
    texts = [text for page in pages for text in page.texts or ()]
    if all(text in (None, "###") for text in texts):
        return NAMES | {"micro": BY_SHAPE}
    return NAMES


def page_row(metric, page, polygons):
    """Numbers of a page [k] for one of METRICS, which adds them up over pages."""
    if metric == "iou50":
        return iou50(page.polygons, polygons, page.ignore)
    flags = {"ignore": page.ignore}
    if metric == "page":
        scores = cleval(page.polygons, polygons, **flags)
        return np.array([*map(scores.get, SCORES), 1], float)
    flags |= {"texts": page.texts, "variant": "official"}
    counts = cleval(page.polygons, polygons, **flags)
    return np.array([*map(counts.get, COUNTS)], float)


def metric_rows(pages, predictions, metrics=METRICS):
    """{metric: page_row of n pages [n, k]}; predictions: polygons and scores of each page."""
    rows = {}
    for metric in metrics:
        pairs = zip(pages, predictions)
        rows[metric] = np.array([page_row(metric, page, found) for page, (found, _) in pairs])
    return rows
