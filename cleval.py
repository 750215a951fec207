"""How good are polygons? CLEval of a page, matching by IoU, scores of many pages.

CLEval (Baek et al. 2020, arXiv 2006.06244) counts characters; each of its rules is a function here.
`hmean` is the receipt competition's variant, a mean over pages; `micro` is official CLEval."""

from typing import NamedTuple

import cv2
import numpy as np
import shapely

AREA_PRECISION = 0.3  # share of a detection's area that has to lie on a label
MAX_DETECTIONS = 500  # the competition scores the first 500 detections of a page
SCORES = ("precision", "recall", "hmean")
COUNTS = ("num_char_gt", "num_char_det", "num_char_tp_recall", "num_char_tp_precision")
COUNTS += ("gran_score_recall", "gran_score_precision")  # up to here what the scores are made of
COUNTS += ("num_char_fp", "num_splitted", "num_merged", "num_char_overlapped")
OUTCOMES = ("hit", "joined", "split", "loose", "missed")  # of labels, see iou_matches
GAPS = ((0, 0.3), (0.3, 0.6), (0.6, 1), (1, 1.5), (1.5, 2.5), (2.5, None))  # of line_neighbours


def cleval(gt_polygons, det_polygons, *, ignore=None, texts=None, variant="page"):
    """Labels N x [P, 2] and detections M x [P, 2] in pixels of a page -> dict of COUNTS, which add
    up over pages, and recall, precision, hmean, all 0 without labels.
    ignore: N flags of don't-care labels; texts: N strings or None, "###" is don't care too.
    variant: "page", the receipt competition's, counts a label's characters by its shape and only
    the first 500 detections; "official", the clovaai package's, counts those of its text, by its
    shape where that is None. Polygons are taken as written, the loops of one that crosses itself
    united; one without area (line, NaN) matches nothing, by shape it has 100. Raises ValueError."""
    if variant not in ("page", "official"):
        raise ValueError(f'variant {variant!r} is unknown; use "page" or "official"')
    gt = as_points(gt_polygons)
    det = as_points(det_polygons)[: MAX_DETECTIONS if variant == "page" else None]
    texts = [None] * len(gt) if texts is None else texts
    ignore = np.zeros(len(gt), bool) if ignore is None else np.asarray(ignore, bool)
    if not len(gt) == len(texts) == len(ignore):
        raise ValueError(f"{len(gt)} labels, {len(texts)} texts, {len(ignore)} ignore flags")
    labels = prepare_labels(gt, texts, ignore, variant)
    (counts,) = count_kept(labels, page_pairs(labels, det), np.ones((1, len(det)), bool), variant)
    return dict(zip(COUNTS + SCORES, counts.tolist() + micro_scores(counts).tolist()))


class Labels(NamedTuple):  # N labels of a page, to be compared with many sets of detections
    num_chars: np.ndarray  # [N]
    centres: np.ndarray  # [C, 2] of their characters, label after label
    ignore: np.ndarray  # [N] don't care
    shapes: "Shapes"  # don't-care ones less what other labels cover of them


class Pairs(NamedTuple):  # T pairs of a label and one of M detections that may meet
    det: list  # M polygons
    label: np.ndarray  # [T]
    detection: np.ndarray  # [T]
    ignore: np.ndarray  # [T] the label is don't care
    char: np.ndarray  # [H] characters of a label inside a detection
    pair: np.ndarray  # [H] and the pair of each
    inside: np.ndarray  # [T] how many a pair has
    share: np.ndarray  # [T] of the detection's area on the label; 32 bits, so that 0.3 is 0.3


def prepare_labels(polygons, texts, ignore, variant):
    """Labels of polygons as of `as_points`, texts and flags [N], as in `cleval`."""
    ignore = ignore | np.array([text == "###" for text in texts], bool)
    num_chars, areas = pseudo_chars(polygons), to_shapely(polygons)
    if variant == "official":  # those of don't-care labels only say where they reach
        num_chars = np.array([n if t is None else len(t) for n, t in zip(num_chars, texts)], int)
        aspect = reading_aspect([polygons[n] for n in np.flatnonzero(ignore)])
        num_chars[ignore] = np.minimum(np.rint(0.5 + np.maximum(aspect, 1 / aspect)), 10)
    box, dont_care, others = shapely.bounds(areas), np.flatnonzero(ignore), np.flatnonzero(~ignore)
    i, j = touching(box[dont_care], box[others])
    for n, other in zip(dont_care[i], others[j]):
        areas[n] = shapely.difference(areas[n], areas[other])
    return Labels(num_chars, char_centres(polygons, num_chars, variant), ignore, make_shapes(areas))


def page_pairs(labels, det):
    """Pairs of Labels and M polygons as of `as_points`; cut centres lie up to a pixel outside."""
    shapes, num_chars = make_shapes(to_shapely(det)), labels.num_chars
    label, detection = touching(labels.shapes.box + (-1, -1, 1, 1), shapes.box)
    pair, k = expand(num_chars[label])
    char = (np.cumsum(num_chars) - num_chars)[label][pair] + k
    found = contains(shapes, detection[pair], labels.centres[char])
    char, pair = char[found], pair[found]
    inside, ignore = np.bincount(pair, minlength=len(label)), labels.ignore[label]
    share = overlap_area(labels.shapes, label, shapes, detection) / shapes.area[detection]
    return Pairs(det, label, detection, ignore, char, pair, inside, np.float32(share))


def count_kept(labels, pairs, keep, variant):
    """Labels, Pairs and S choices [S, M] of detections -> counts [S, 10] in the order of COUNTS."""
    counting = pairs.ignore & ((pairs.inside > 0) | (pairs.share >= AREA_PRECISION))
    together = np.bincount(pairs.detection, pairs.share * counting, len(pairs.det))
    judged = together < np.float32(AREA_PRECISION)  # [M], as so little of it is on don't care
    match = instance_matches(pairs, keep, judged, len(labels.ignore))  # [S, T]
    pieces = tally(match, pairs.label, len(labels.ignore))  # [S, N] of a label
    joined = tally(match, pairs.detection, len(pairs.det))  # [S, M] labels in a detection
    recalled = (tally(match[:, pairs.pair], pairs.char, len(labels.centres)) > 0).sum(1)
    detected = match @ pairs.inside  # a character once for each detection that has it
    alarms = false_alarms(pairs, keep & judged & (joined == 0), variant)
    total = np.full_like(recalled, labels.num_chars[~labels.ignore].sum())
    columns = [total, detected + alarms, recalled, recalled]
    columns += [np.maximum(many - 1, 0).sum(1) for many in (pieces, joined)]  # granularity
    columns += [alarms, (pieces > 1).sum(1), (joined > 1).sum(1)]
    return np.stack([*columns, detected - recalled], 1)


def instance_matches(pairs, keep, judged, num_gt):
    """[S, T] whether a kept pair matches. A detection is close to a label if it holds characters of
    it and AREA_PRECISION of the detection lies on the label."""
    label, detection = pairs.label, pairs.detection
    kept, holds = keep[:, detection], pairs.inside > 0
    counting = kept & ~pairs.ignore & judged[detection]
    close = holds & (pairs.share >= AREA_PRECISION)
    one_to_one = close & (tally(kept & close, label, num_gt) == 1)[:, label]
    one_to_many = close & (tally(counting & close, label, num_gt) > 1)[:, label]
    holds &= ~pairs.ignore
    several = np.bincount(detection, holds, len(pairs.det)) > 1
    together = np.bincount(detection, pairs.share * holds, len(pairs.det)) >= AREA_PRECISION
    many_to_one = holds & (several & together)[detection]
    return counting & (one_to_one | one_to_many | many_to_one)


def false_alarms(pairs, alarms, variant):
    """Which detections match nothing [S, M] -> [S] characters that they cost, as detected in vain:
    "page" as many as labels of that shape, "official" 1 each, upright ones up to 10."""
    some = np.flatnonzero(alarms.any(0))
    polygons = [pairs.det[m] for m in some]
    if variant == "page":
        return alarms[:, some] @ pseudo_chars(polygons)
    upright = np.rint(0.5 + 1 / (1e-5 + reading_aspect(polygons)))
    return alarms[:, some] @ np.minimum(upright, 10).astype(int)


def tally(flags, index, size):
    """Flags [S, T], index [T] below size -> [S, size] how many flags each index has."""
    s, t = np.nonzero(flags)
    return np.bincount(s * size + index[t], minlength=len(flags) * size).reshape(len(flags), size)


def as_points(polygons):
    """Polygons, any nested sequence -> float arrays [P >= 3, 2]; without area if not finite."""
    polygons, none = [np.asarray(p, float).reshape(-1, 2) for p in polygons], np.zeros((3, 2))
    finite = np.isfinite(np.concatenate([none, *polygons])).all()
    return [p if len(p) > 2 and (finite or np.isfinite(p).all()) else none for p in polygons]


def min_area_sides(points):
    """Sides of a polygon's smallest rotated rectangle, the one nearer to the horizontal first."""
    _, (width, height), angle = cv2.minAreaRect(points.astype(np.float32))
    return (width, height) if abs(angle) <= 45 else (height, width)


def pseudo_chars(polygons):
    """N polygons -> [N] characters by shape: min(round(0.5 + long side / short side), 100). Halves
    round to even, but ratios 3, 4, ... do not: the reference's rounding errors keep them below."""
    short, long = np.sort(np.reshape([min_area_sides(p) for p in polygons], (-1, 2)), 1).T
    aspect = np.where(short > 1e-6, long / np.maximum(short, 1e-6), 100)
    return np.clip(np.ceil(aspect - 1e-5), 2, 100).astype(int)


def reading_aspect(polygons):
    """N polygons -> [N] width / height; of quads, first vertex top left, by means of the sides."""
    quad = np.array([len(points) == 4 for points in polygons], bool)
    sides = np.array([min_area_sides(points) for points in polygons]).reshape(-1, 2)
    corners = np.array([points for points in polygons if len(points) == 4]).reshape(-1, 4, 2)
    length = np.hypot(*np.moveaxis(corners[:, [1, 2, 3, 0]] - corners, 2, 0))  # [Q, 4]
    sides[quad] = (length[:, :2] + length[:, 2:]) / 2
    return (sides[:, 0] + 1e-5) / (sides[:, 1] + 1e-5)


def char_centres(polygons, num_chars, variant):
    """N polygons, [N] numbers of characters -> [C, 2] centres, label after label: the first half of
    the vertices is the top of the word, the second its bottom, read backwards; sections between
    vertices have the same number of steps, and a centre is the mean of four. "page" cuts steps to
    whole pixels as the competition does, "official" turns quads over twice as tall as wide."""
    polygons = [p if len(p) > 3 else p[[0, 1, 2, 2]] for p in polygons]  # a triangle's bottom
    if variant == "official":
        tall = reading_aspect(polygons) < 0.5
        polygons = [p[[3, 0, 1, 2]] if t and len(p) == 4 else p for p, t in zip(polygons, tall)]
    xy = np.concatenate([np.zeros((0, 2)), *polygons])
    size = np.array([len(points) for points in polygons], int)
    label, k = expand(num_chars)
    first, size, steps = (np.cumsum(size) - size)[label], size[label], num_chars[label]
    half = size // 2
    section, part = np.divmod(np.stack([k, k + 1]) * (half - 1), steps)  # [2, C]
    end = np.where(section < half - 1, size - 1 - section, half)
    start = xy.T.take(first + np.stack([section, end]), 1)  # [x or y, top or bottom, 2, C]
    stop = xy.T.take(first + np.stack([section + 1, size - 2 - section]), 1)
    point = start + (stop - start) / steps * part
    point = np.where((part > 0) & (variant == "page"), np.trunc(point), point)
    return point.reshape(2, 4, -1).mean(1).T


def shared_areas(gt_polygons, det_polygons, ignore):
    """Polygons and ignore as in `cleval` -> areas [N, M] that pairs share, 0 for don't care, and of
    their unions; [M] whether a detection counts: at most half of it is on a don't-care label (ICDAR
    2015, task 4.1); areas of labels [N], of detections [M]; ignore [N]. Raises ValueError."""
    gt, det = (make_shapes(to_shapely(as_points(p))) for p in (gt_polygons, det_polygons))
    ignore = np.zeros(len(gt.area), bool) if ignore is None else np.asarray(ignore, bool)
    if len(ignore) != len(gt.area):
        raise ValueError(f"{len(gt.area)} labels, {len(ignore)} ignore flags; give one a label")
    i, j = touching(gt.box, det.box)
    shared = np.zeros((len(gt.area), len(det.area)))
    shared[i, j] = overlap_area(gt, i, det, j)
    valid = ~(shared[ignore] > 0.5 * det.area).any(0)
    shared *= ~ignore[:, None] & valid
    return shared, gt.area[:, None] + det.area - shared, valid, gt.area, det.area, ignore


def one_to_one(close):
    """Flags [N, M] -> pairs (label, detection), each once, in order."""
    of_label, of_detection = {}, {}
    for label, detection in np.argwhere(close).tolist():
        if label not in of_label and detection not in of_detection:
            of_label[label], of_detection[detection] = detection, label
    return list(of_label.items())


def iou_matches(gt_polygons, det_polygons, ignore=None):
    """Polygons and ignore as in `cleval` -> pairs (label, detection) with IoU > 0.5, one to one in
    order; [M] whether a detection counts; [N] outcomes, "" if don't care; [N, N] whether one
    detection covers more than half of both labels. The outcome is the first that holds: hit, in a
    pair; joined, covered so with another; split, two or more, each by more than half on it, add up
    to more than half of it; loose, more than half of it covered by one, or IoU > 0.2; missed."""
    shared, union, valid, gt, det, ignore = shared_areas(gt_polygons, det_polygons, ignore)
    pairs = one_to_one(shared > 0.5 * union)
    covered, piece = shared > 0.5 * gt[:, None], shared > 0.5 * det
    together = np.float32(covered) @ covered.T > 0  # of bools the product is slow
    hit = np.isin(np.arange(len(ignore)), [*dict(pairs)])
    split = (piece.sum(1) > 1) & ((shared * piece).sum(1) > 0.5 * gt)
    loose = (covered | (shared > 0.2 * union)).any(1)
    rules = [ignore, hit, together.sum(1) > 1, split, loose]
    return pairs, valid, np.select(rules, ["", *OUTCOMES[:4]], OUTCOMES[4]), together


def line_neighbours(polygons):
    """Of N polygons those with a next one on their line: index [K], index of the next [K], gap [K]
    over their mean height, below 0 where they overlap. Lines run along the long edges of most. Next
    is the first to begin after .95 of the one's width if the lower's middle is beside the other."""
    first = np.cumsum([0, *map(len, polygons)])[:-1]
    xy = np.concatenate([np.zeros((0, 2)), *polygons]) @ (1, 1j)  # [V]
    edges = np.delete(np.diff(xy), first[1:] - 1)
    xy *= np.exp(-0.5j * np.angle((edges**2).sum()))  # a square has twice the angle
    left, top = (np.minimum.reduceat(part, first) for part in (xy.real, xy.imag))  # [N]
    right, bottom = (np.maximum.reduceat(part, first) for part in (xy.real, xy.imag))
    height, order = bottom - top, np.argsort(left)
    beside = abs(np.subtract.outer(top + bottom, top + bottom)) < np.maximum.outer(height, height)
    label, after = np.nonzero((beside & (left > (0.05 * left + 0.95 * right)[:, None]))[:, order])
    label, nearest = np.unique(label, return_index=True)
    after = order[after[nearest]]
    return label, after, 2 * (left[after] - right[label]) / (height[label] + height[after])


def iou50(gt_polygons, det_polygons, ignore=None):
    """Polygons and ignore as in `cleval` -> [23] counts that add up over pages: labels, detections,
    hits twice and 0, 0 for micro_scores; labels of each of OUTCOMES; neighbours on a line by GAPS;
    those that one detection has joined."""
    pairs, valid, outcome, together = iou_matches(gt_polygons, det_polygons, ignore)
    label, after, gap = line_neighbours(as_points(gt_polygons))
    known = (outcome[label] != "") & (outcome[after] != "")
    step = np.searchsorted([low for low, _ in GAPS[1:]], gap, "right")
    gaps = (np.bincount(step[w], minlength=6) for w in (known, together[label, after]))
    outcomes = [*map(outcome.tolist().count, OUTCOMES)]
    row = [sum(outcomes), valid.sum(), len(pairs), len(pairs), 0, 0, *outcomes]
    return np.concatenate([row, *gaps], dtype=float)


def micro_scores(sums):
    """Summed counts [..., 6 or more] in the order of COUNTS -> SCORES [..., 3]; x / 0 is 0."""
    hits, total = sums[..., 2:4] - sums[..., 4:6], sums[..., :2]  # of labels and of detections
    recall, precision = np.moveaxis(np.maximum(hits, 0) / np.where(total > 0, total, np.inf), -1, 0)
    hmean = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return np.stack([precision, recall, hmean], -1)


def mean_scores(sums):
    """Sums over pages [..., s + 1] of s scores and 1 -> the means of the scores [..., s]."""
    return sums[..., :-1] / sums[..., -1:]


METRICS = {
    "page": ("CLEval, competition's: pseudo characters, mean over pages", mean_scores),
    "micro": ("CLEval, official: characters of transcriptions, micro", micro_scores),
    "iou50": ("IoU 0.5, one to one", micro_scores),
}


def page_row(metric, page, polygons):
    """Numbers of a page [k] for one of METRICS, which adds them up over pages."""
    if metric == "iou50":
        return iou50(page.polygons, polygons, page.ignore)
    official = {"variant": "official", "texts": page.texts} if metric == "micro" else {}
    counts = cleval(page.polygons, polygons, ignore=page.ignore, **official)
    return np.array([counts[key] for key in (COUNTS if official else SCORES)] + [1], float)


def metric_rows(pages, found, metrics=METRICS):
    """{metric: page_row of n pages [n, k]}; found: polygons and their scores for each page."""
    return {m: np.array([page_row(m, p, f[0]) for p, f in zip(pages, found)]) for m in metrics}


class Shapes(NamedTuple):  # N areas by their edges, horizontal ones left out
    edges: np.ndarray  # [5, E] upper y, lower y, x at the upper y, dx / dy, side: +1 or -1
    first: np.ndarray  # [N] index of an area's first edge
    count: np.ndarray  # [N] its number of edges
    area: np.ndarray  # [N] in square pixels
    box: np.ndarray  # [N, 4] x0 y0 x1 y1; NaN, which touches nothing, where there is no area


def expand(counts):
    """Counts [N] -> owner [sum], offset [sum]: for each n the pairs (n, 0) to (n, count - 1)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def touching(a, b):
    """Boxes [N, 4], [M, 4] as x0 y0 x1 y1 -> index pairs [K], [K] of those that overlap."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.T[..., None], b.T
    return np.nonzero((ax0 < bx1) & (bx0 < ax1) & (ay0 < by1) & (by0 < ay1))


def to_shapely(polygons):
    """N polygons [P >= 3, 2] -> [N] valid areas, loops united, empty under 1e-6 square pixels."""
    owner = np.repeat(np.arange(len(polygons)), [len(points) for points in polygons])
    xy = np.concatenate([*polygons, np.zeros((0, 2))])
    areas = shapely.polygons(shapely.linearrings(xy, indices=owner))
    wrong = ~shapely.is_valid(areas)
    areas[wrong] = shapely.make_valid(areas[wrong], method="structure", keep_collapsed=False)
    areas[shapely.area(areas) < 1e-6] = shapely.Polygon()
    return areas


def make_shapes(areas):
    """[N] valid shapely areas, of several parts and with holes, which run backwards -> Shapes."""
    rings, owner = shapely.get_parts(shapely.boundary(shapely.normalize(areas)), return_index=True)
    xy, ring_of = shapely.get_coordinates(rings, return_index=True)
    start = np.flatnonzero((np.diff(ring_of) == 0) & (np.abs(np.diff(xy[:, 1])) > 1e-9))
    a, b = xy.T.take(start, 1), xy.T.take(start + 1, 1)
    down = a[1] < b[1]
    (x, upper), (x_lower, lower) = np.where(down, (a, b), (b, a))
    edges = np.stack([upper, lower, x, (x_lower - x) / (lower - upper), np.where(down, -1, 1)])
    size = np.bincount(owner[ring_of[start]], minlength=len(areas))
    return Shapes(edges, np.cumsum(size) - size, size, shapely.area(areas), shapely.bounds(areas))


def contains(shapes, n, points):
    """Whether shape n[t] holds point t [T, 2]: an odd number of its edges lie to the right [T]."""
    t, e = expand(shapes.count[n])
    upper, lower, x, slope, _ = shapes.edges.take(shapes.first[n][t] + e, 1)
    px, py = points.T.take(t, 1)
    right = (upper <= py) & (py < lower) & (px < x + (py - upper) * slope)
    return np.bincount(t[right], minlength=len(n)) % 2 == 1


def overlap_area(a, i, b, j):
    """Shapes a and b, indices [K], [K] -> [K] area of shape i[k] of a inside shape j[k] of b.
    An area is the signed sum over its edges of the strips from the far left to the edge. Two strips
    share, in the rows common to both, what lies left of the nearer edge (#):
          top  |#######/ edge of a  | edge of b
               |######/             |"""
    k, e = expand(a.count[i] * b.count[j])
    count = b.count[j][k]
    ea, eb = a.first[i][k] + e // count, b.first[j][k] + e % count
    top = np.maximum(a.edges[0].take(ea), b.edges[0].take(eb))
    rows = np.minimum(a.edges[1].take(ea), b.edges[1].take(eb)) - top
    common = rows > 0
    k, top, rows = k[common], top[common], rows[common]
    upper_a, _, xa, slope_a, side_a = a.edges.take(ea[common], 1)
    upper_b, _, xb, slope_b, side_b = b.edges.take(eb[common], 1)
    xa, xb = xa + (top - upper_a) * slope_a, xb + (top - upper_b) * slope_b
    start, stop = xa - xb, xa - xb + rows * (slope_a - slope_b)
    gap = np.abs(start) + np.abs(stop)
    cross = np.maximum(-start * stop, 0) / np.maximum(gap, 1e-300)  # the edges change places
    width = xa + xb + rows * (slope_a + slope_b) / 2 + cross - gap / 2
    return np.bincount(k, side_a * side_b * rows * width / 2, len(i))
