"""How good are polygons? CLEval of a page and IoU matching, the rows and scores of a set of pages,
bootstrap intervals and paired differences.

`hmean` is the receipt competition's CLEval (mean over pages); official CLEval (micro) and IoU 0.5
are named as such.
"""

from typing import NamedTuple

import cv2
import numpy as np
import shapely

AREA_PRECISION = 0.3  # share of a detection's area that has to lie on a label
MAX_DETECTIONS = 500  # the competition scores the first 500 detections of a page
COUNTS = [
    "num_char_gt",
    "num_char_det",
    "num_char_tp_recall",
    "num_char_tp_precision",
    "gran_score_recall",
    "gran_score_precision",
    "num_char_fp",
    "num_splitted",
    "num_merged",
    "num_char_overlapped",
]


def cleval(gt_polygons, det_polygons, *, ignore=None, texts=None, variant="page"):
    """
    Character-level detection metric of one page (Baek et al. 2020, arXiv 2006.06244).
    gt_polygons: N x [P, 2], det_polygons: M x [P, 2], in pixels of the page; P may differ
    ignore: N flags of don't-care labels; texts: N strings or None, "###" = don't care
    variant: "page", the receipt competition's: a label has as many characters as its aspect
      ratio says, a false alarm costs as many, detections after the first 500 do not count;
      "official", the clovaai package's: a label has the characters of its text (by its aspect
      where texts or the text is None), a false alarm costs 1 unless it is upright, 10 at most
    returns: dict of the counts COUNTS and of recall, precision, hmean; a page without labels
      scores 0, 0, 0. Counts add up over pages, see micro_rows and mean_rows.
    Polygons are taken as written, not clipped and not rounded. The loops of one that crosses
    itself are united; one without area (a line, fewer than 3 points, NaN) matches nothing, and
    by shape it has 100 characters, as in the reference.
    raises ValueError when the variant is unknown or the lengths differ.
    """
    if variant not in ("page", "official"):
        raise ValueError(f'variant {variant!r} is unknown; use "page" or "official"')
    gt = as_points(gt_polygons)
    det = as_points(det_polygons)[: MAX_DETECTIONS if variant == "page" else None]
    texts = [None] * len(gt) if texts is None else texts
    ignore = np.zeros(len(gt), bool) if ignore is None else np.asarray(ignore, bool)
    if not len(gt) == len(texts) == len(ignore):
        each = f"{len(gt)} labels, {len(texts)} texts and {len(ignore)} ignore flags"
        raise ValueError(f"{each}; give one of each a label")
    ignore = ignore | np.array([text == "###" for text in texts], bool)
    labels = prepare_labels(gt, texts, ignore, variant)
    (counts,) = count_kept(labels, page_pairs(labels, det), np.ones((1, len(det)), bool), variant)
    precision, recall, hmean = micro_scores(counts).tolist()
    counts = dict(zip(COUNTS, counts.tolist()))
    return counts | {"recall": recall, "precision": precision, "hmean": hmean}


def iou_matches(gt_polygons, det_polygons, ignore=None):
    """
    One-to-one matching at IoU > 0.5 of one page, labels and detections in the order given; a
    detection with more than half of its area on a don't-care label is left out (ICDAR 2015,
    task 4.1). Polygons and ignore as in cleval.
    returns: pairs (label, detection), [M] whether a detection counts
    raises ValueError when the lengths differ.
    """
    gt, det = (make_shapes(to_shapely(as_points(p))) for p in (gt_polygons, det_polygons))
    ignore = np.zeros(len(gt.area), bool) if ignore is None else np.asarray(ignore, bool)
    if len(ignore) != len(gt.area):
        raise ValueError(f"{len(gt.area)} labels, {len(ignore)} ignore flags; give one a label")
    i, j = touching(gt.box, det.box)
    overlap = overlap_area(gt, i, det, j)
    valid = np.ones(len(det.area), bool)
    valid[j[ignore[i] & (overlap > 0.5 * det.area[j])]] = False
    close = overlap > 0.5 * (gt.area[i] + det.area[j] - overlap)
    pairs, gt_free, det_free = [], ~ignore, valid.copy()
    for n, m in zip(i[close].tolist(), j[close].tolist()):
        if gt_free[n] and det_free[m]:
            gt_free[n] = det_free[m] = False
            pairs.append((n, m))
    return pairs, valid


def iou50(gt_polygons, det_polygons, ignore=None):
    """As iou_matches, returns only counts without don't care: pairs, labels, detections."""
    pairs, valid = iou_matches(gt_polygons, det_polygons, ignore)
    num_ignored = 0 if ignore is None else int(np.sum(ignore))
    return len(pairs), len(gt_polygons) - num_ignored, int(valid.sum())


def ratio_scores(hits_det, num_det, hits_gt, num_gt):
    """Hits and totals [...] of precision and recall -> precision, recall, hmean [..., 3] in
    0..1; hits below 0 and x / 0 count as 0."""
    precision = np.maximum(hits_det, 0) / np.where(num_det > 0, num_det, np.inf)
    recall = np.maximum(hits_gt, 0) / np.where(num_gt > 0, num_gt, np.inf)
    total = precision + recall
    hmean = 2 * precision * recall / np.where(total > 0, total, np.inf)
    return np.stack([precision, recall, hmean], -1)


def micro_scores(sums):
    """Summed counts [..., 10] in the order of COUNTS -> precision, recall, hmean [..., 3]."""
    num_gt, num_det, tp_gt, tp_det, gran_gt, gran_det = np.moveaxis(sums, -1, 0)[:6]
    return ratio_scores(tp_det - gran_det, num_det, tp_gt - gran_gt, num_gt)


def mean_scores(sums):
    """Sums over pages [..., s + 1] of s scores and 1 -> the means of the scores [..., s]."""
    return sums[..., :-1] / sums[..., -1:]


def iou_scores(sums):
    """Summed pairs, labels, detections [..., 3] -> precision, recall, hmean [..., 3]."""
    tp, num_gt, num_det = np.moveaxis(sums, -1, 0)
    return ratio_scores(tp, num_det, tp, num_gt)


def micro_rows(counts):
    """cleval's counts of n pages -> [n, 10] in the order of COUNTS, for micro_scores: official
    CLEval is the score of the summed counts."""
    return np.array([[page[key] for key in COUNTS] for page in counts], float).reshape(-1, 10)


def mean_rows(counts):
    """cleval's counts of n pages -> [n, 4] precision, recall, hmean and 1, for mean_scores: the
    competition's is the mean over pages."""
    keys = ("precision", "recall", "hmean")
    return np.array([[*map(page.get, keys), 1] for page in counts], float).reshape(-1, 4)


def bootstrap(rows, to_scores, *, minus=None, groups=None, draws=4000, seed=0):
    """
    Percentile bootstrap of corpus scores over pages, or over groups of pages.
    rows: [n, k] of each page and to_scores: sums [..., k] -> scores [..., s], one of the pairs
      mean_rows, mean_scores; micro_rows, micro_scores; iou50's counts, iou_scores
    minus: rows [n, k] of other predictions on the same pages, for the paired difference
    groups: n hashable names; pages of a group are drawn together, None = each page alone
    returns: 95 % interval [s, 2], low and high
    raises ValueError without pages, or when the numbers of rows differ.
    (Efron and Tibshirani 1993, chapter 13)
    """
    rows = np.asarray(rows, float)
    other = np.zeros_like(rows) if minus is None else np.asarray(minus, float)
    names = range(len(rows)) if groups is None else groups
    if not len(rows) == len(names) == len(other) or not len(rows):
        each = f"{len(rows)} pages, {len(names)} groups, {len(other)} pages to compare with"
        raise ValueError(f"{each}; give the same pages to all, at least one")
    index = {name: n for n, name in enumerate(dict.fromkeys(names))}
    group, size = [index[name] for name in names], len(index)
    sums = np.zeros((2, size, rows.shape[1]))  # [rows or minus, G, k]
    np.add.at(sums[0], group, rows)
    np.add.at(sums[1], group, other)
    rng, samples, block = np.random.default_rng(seed), [], max(1, 2**20 // size)
    for start in range(0, draws, block):  # all draws at once are gigabytes for 50,000 pages
        n = min(block, draws - start)
        draw = rng.integers(size, size=(n, size)) + size * np.arange(n)[:, None]
        weight = np.bincount(draw.ravel(), minlength=n * size).reshape(n, size).astype(float)
        sample = to_scores(weight @ sums[0])  # [n, s]
        samples.append(sample if minus is None else sample - to_scores(weight @ sums[1]))
    return np.percentile(np.concatenate(samples), [2.5, 97.5], axis=0).T


def paired_difference(rows, other, to_scores, groups):
    """
    H-mean of rows [n, k] less that of other rows on the same pages, as in `bootstrap`: a dict of
    the difference, its 95 % interval and the verdict better, worse or cannot tell. With fewer than
    6 groups it is always the last: all of 5 agree by chance 1 time in 16 (two-sided sign test).
    """
    difference = float(to_scores(rows.sum(0))[2] - to_scores(other.sum(0))[2])
    low, high = map(float, bootstrap(rows, to_scores, minus=other, groups=groups)[2])
    verdict = "better" if low > 0 else "worse" if high < 0 else "cannot tell"
    verdict = verdict if len(set(groups)) > 5 else "cannot tell"
    return {"difference": difference, "interval": [low, high], "verdict": verdict}


# ---------------------------------------------------------------- scores of a set of pages

METRICS = {
    "page": ("CLEval, competition's: pseudo characters, mean over pages", mean_scores),
    "micro": ("CLEval, official: characters of transcriptions, micro", micro_scores),
    "iou50": ("IoU 0.5, one to one", iou_scores),
}


def page_row(metric, page, polygons):
    """Addable numbers of a page [k] for one of METRICS."""
    if metric == "iou50":
        return np.array(iou50(page.polygons, polygons, page.ignore), float)
    variant = "page" if metric == "page" else "official"
    texts = page.texts if metric == "micro" else None
    counts = cleval(page.polygons, polygons, ignore=page.ignore, texts=texts, variant=variant)
    return (mean_rows if metric == "page" else micro_rows)([counts])[0]


def metric_rows(metric, pages, found):
    """page_row of n pages [n, k]; found: as `predict` returns."""
    return np.array([page_row(metric, page, f[0]) for page, f in zip(pages, found)])


def bootstrap_groups(pages):
    """Names to draw by in a bootstrap: the group where there is one, else the page itself."""
    return [p.name if p.group is None else f"group {p.group}" for p in pages]


def summary(metric, rows, groups):
    """precision, recall, hmean and the 95 % bootstrap interval of hmean over groups, as a dict of
    floats."""
    to_scores = METRICS[metric][1]
    precision, recall, hmean = map(float, to_scores(rows.sum(0)))
    low, high = map(float, bootstrap(rows, to_scores, groups=groups)[2])
    return {"precision": precision, "recall": recall, "hmean": hmean, "interval": [low, high]}


def summarise(pages, rows):
    """{metric: rows} of METRICS -> the --json object."""
    groups = bootstrap_groups(pages)
    result = {metric: summary(metric, rows[metric], groups) for metric in METRICS}
    result = {**result.pop("page"), **result}
    result["pages"] = len(pages)
    result["pages_without_labels"] = sum(all(p.ignore) for p in pages)
    return result


def score_all(pages, found):
    """All of METRICS: ({metric: rows}, the --json object)."""
    rows = {metric: metric_rows(metric, pages, found) for metric in METRICS}
    return rows, summarise(pages, rows)


# ---------------------------------------------------------------- characters of a polygon


def as_points(polygons):
    """Polygons, any nested sequence -> list of float arrays [P, 2], [0, 2] where points are
    not finite or fewer than 3."""
    polygons = [np.asarray(polygon, float).reshape(-1, 2) for polygon in polygons]
    none = np.zeros((0, 2))
    if not np.isfinite(np.concatenate([none, *polygons])).all():
        polygons = [points if np.isfinite(points).all() else none for points in polygons]
    return [points if len(points) > 2 else none for points in polygons]


def min_area_sides(points):
    """Polygon [P, 2] -> sides of its smallest rotated rectangle, the one nearer to the
    horizontal first; 0, 0 without points."""
    if not len(points):
        return 0.0, 0.0
    _, (width, height), angle = cv2.minAreaRect(points.astype(np.float32))
    return (width, height) if abs(angle) <= 45 else (height, width)


def pseudo_chars(polygons):
    """
    N polygons -> [N] characters by shape: min(round(0.5 + long side / short side), 100), sides
    of the smallest rotated rectangle. A square has 2 (halves round to even); another whole
    ratio is its own count, since rounding errors of the reference mostly keep it below.
    """
    sides = np.array([min_area_sides(points) for points in polygons]).reshape(-1, 2)
    long, short = sides.max(1), sides.min(1)
    aspect = np.where(short > 1e-6, long / np.maximum(short, 1e-6), 100)
    return np.clip(np.ceil(aspect - 1e-5), 2, 100).astype(int)


def reading_aspect(polygons):
    """N polygons -> [N] width / height: of a quad by the means of its opposite sides, first
    vertex at the top left; of others by the smallest rotated rectangle."""
    sides = np.zeros((len(polygons), 2))
    quads = np.array([len(points) == 4 for points in polygons], bool)
    if quads.any():
        corners = np.stack([points for points in polygons if len(points) == 4])  # [Q, 4, 2]
        edge = corners[:, [1, 2, 3, 0]] - corners
        length = np.hypot(edge[..., 0], edge[..., 1])
        sides[quads] = (length[:, :2] + length[:, 2:]) / 2
    for n in np.flatnonzero(~quads):
        sides[n] = min_area_sides(polygons[n])
    return (sides[:, 0] + 1e-5) / (sides[:, 1] + 1e-5)


def label_chars(polygons, texts, ignore, variant):
    """N labels -> [N] number of characters; of don't care they only say where it reaches."""
    if variant == "page":
        return pseudo_chars(polygons)
    count = np.array([0 if text is None else len(text) for text in texts], int)
    untold = [n for n, text in enumerate(texts) if text is None]
    count[untold] = pseudo_chars([polygons[n] for n in untold])
    if ignore.any():
        aspect = reading_aspect([polygons[n] for n in np.flatnonzero(ignore)])
        count[ignore] = np.minimum(np.rint(0.5 + np.maximum(aspect, 1 / aspect)), 10)
    return count


def alarm_chars(polygons, variant):
    """Detections without a match -> [M] characters that each costs."""
    if variant == "page":
        return pseudo_chars(polygons)
    return np.minimum(np.rint(0.5 + 1 / (1e-5 + reading_aspect(polygons))), 10).astype(int)


def char_centres(polygons, num_chars, variant):
    """
    N polygons, [N] numbers of characters -> [C, 2] centres, label after label. The first half
    of the vertices is the top of the word, the second half its bottom, read backwards; each
    section between vertices has the same number of steps, and a centre is the mean of four
    steps. "page" cuts the steps between vertices to whole pixels as the competition does;
    "official" reads quads taller than twice their width along their longer side.
    """
    if not len(polygons):
        return np.zeros((0, 2))
    triangle, none = [0, 1, 2, 2], np.full((4, 2), np.nan)  # its bottom shrinks to a point
    polygons = [p if len(p) > 3 else p[triangle] if len(p) else none for p in polygons]
    if variant == "official":
        upright = reading_aspect(polygons) < 0.5
        for n in np.flatnonzero(upright):
            if len(polygons[n]) == 4:
                polygons[n] = polygons[n][[3, 0, 1, 2]]
    size = np.array([len(points) for points in polygons])
    xy, first = np.concatenate(polygons), np.cumsum(size) - size
    label, k = expand(num_chars)
    first, size, steps = first[label], size[label], num_chars[label]
    half = size // 2
    section, part = np.divmod(np.stack([k, k + 1]) * (half - 1), steps)  # [2, C]
    after = np.minimum(section + 1, half - 1)
    end = np.where(section < half - 1, size - 1 - section, half)
    start = xy.T.take(first + np.stack([section, end]), 1)  # [x or y, top or bottom, 2, C]
    stop = xy.T.take(first + np.stack([after, size - 1 - after]), 1)
    point = start + (stop - start) / steps * part
    if variant == "page":
        point = np.where(part > 0, np.trunc(point), point)
    return point.reshape(2, 4, -1).mean(1).T


# ---------------------------------------------------------------- matching of labels, detections


class Labels(NamedTuple):
    """N labels of a page, ready to be compared with many sets of detections."""

    num_chars: np.ndarray  # [N]
    centres: np.ndarray  # [C, 2] of their characters, label after label
    ignore: np.ndarray  # [N] don't care
    shapes: "Shapes"
    free: "Shapes"  # the same, don't-care ones less what other labels cover of them


class Pairs(NamedTuple):
    """T pairs of a label and one of M detections whose boxes touch."""

    det: list  # M polygons
    valid: np.ndarray  # [M] not on don't-care labels
    n: np.ndarray  # [T] label
    m: np.ndarray  # [T] detection
    inside: np.ndarray  # [T] number of characters of n inside m
    char: np.ndarray  # [H] each of these
    pair: np.ndarray  # [H] and its pair
    close: np.ndarray  # [T] m lies on n
    single: np.ndarray  # [T] and on no other label; matches if n has no other close detection
    split: np.ndarray  # [T] matches if n has others
    merged: np.ndarray  # [T] matches: m lies on several labels together


def prepare_labels(polygons, texts, ignore, variant):
    num_chars, areas = label_chars(polygons, texts, ignore, variant), to_shapely(polygons)
    shapes = free = make_shapes(areas)
    if ignore.any():
        regions, mine, others = areas.copy(), np.flatnonzero(ignore), np.flatnonzero(~ignore)
        for n, m in zip(*touching(shapes.box[mine], shapes.box[others])):
            regions[mine[n]] = shapely.difference(regions[mine[n]], areas[others[m]])
        free = make_shapes(regions)
    return Labels(num_chars, char_centres(polygons, num_chars, variant), ignore, shapes, free)


def page_pairs(labels, det):
    """Labels and M polygons -> Pairs. What they say of a detection does not depend on which others
    are kept; CLEval's instance matching in `count_kept` adds what does."""
    shapes, num_det = make_shapes(to_shapely(det)), len(det)
    n, m = touching(labels.shapes.box + (-1, -1, 1, 1), shapes.box)  # whole pixels may lie outside
    first = np.cumsum(labels.num_chars) - labels.num_chars
    pair, k = expand(labels.num_chars[n])
    char = first[n][pair] + k
    found = contains(shapes, m[pair], labels.centres[char])
    char, pair = char[found], pair[found]
    inside, ignore = np.bincount(pair, minlength=len(n)), labels.ignore[n]
    share = np.zeros(len(n), np.float32)  # 32 bits, so that 0.3 exactly is 0.3
    some = np.flatnonzero((inside > 0) | ignore)
    share[some] = overlap_area(labels.free, n[some], shapes, m[some]) / shapes.area[m[some]]
    close = share >= AREA_PRECISION
    together = np.bincount(m, share * (ignore & (inside > 0)), num_det)
    valid = (together < np.float32(AREA_PRECISION)) & (np.bincount(m, close & ignore, num_det) == 0)
    both, close = ~ignore & valid[m], close & (inside > 0)
    merge = both & (inside > 0)
    merged = merge & (np.bincount(m, merge, num_det) >= 2)[m]
    merged &= (np.bincount(m, share * merge, num_det) >= AREA_PRECISION)[m]
    single = both & close & (np.bincount(m, close, num_det) == 1)[m]
    return Pairs(det, valid, n, m, inside, char, pair, close, single, both & close, merged)


def tally(flags, index, size):
    """Flags [S, T], index [T] below size -> [S, size] how many flags each index has."""
    s, t = np.nonzero(flags)
    return np.bincount(s * size + index[t], minlength=len(flags) * size).reshape(len(flags), size)


def count_kept(labels, pairs, keep, variant):
    """Labels, Pairs and S choices [S, M] of detections -> counts [S, 10] in the order of COUNTS.
    Matches are one to one, one label to many detections, many labels to one detection."""
    n, num_gt = pairs.n, len(labels.num_chars)
    kept = keep[:, pairs.m]  # [S, T]
    alone = tally(kept & pairs.close, n, num_gt) == 1
    several = tally(kept & pairs.split, n, num_gt) >= 2
    match = kept & (pairs.single & alone[:, n] | pairs.split & several[:, n] | pairs.merged)
    dets_a_label, labels_a_det = tally(match, n, num_gt), tally(match, pairs.m, keep.shape[1])
    tp = (tally(match[:, pairs.pair], pairs.char, len(labels.centres)) > 0).sum(1)
    covered = match @ pairs.inside  # a character once for each detection that has it
    alarms = keep & pairs.valid & (labels_a_det == 0)
    some = np.flatnonzero(alarms.any(0))
    fp = alarms[:, some] @ alarm_chars([pairs.det[m] for m in some], variant)
    num_chars = labels.num_chars[~labels.ignore].sum() + 0 * tp
    gran_gt, gran_det = (np.maximum(n - 1, 0).sum(1) for n in (dets_a_label, labels_a_det))
    split, merged = (dets_a_label > 1).sum(1), (labels_a_det > 1).sum(1)
    columns = num_chars, covered + fp, tp, tp, gran_gt, gran_det, fp, split, merged, covered - tp
    return np.stack(columns, 1)


# ---------------------------------------------------------------- areas and inclusion, vectorised


class Shapes(NamedTuple):
    """N areas by their edges, horizontal ones left out."""

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
    """N polygons [P, 2] -> [N] valid shapely areas; loops of a crossed one are united, and what
    has no points or under 1e-6 square pixels is empty."""
    rings = [points if len(points) else np.zeros((3, 2)) for points in polygons]
    owner = np.repeat(np.arange(len(rings)), [len(points) for points in rings])
    xy = np.concatenate([*rings, np.zeros((0, 2))])
    areas = shapely.polygons(shapely.linearrings(xy, indices=owner))
    wrong = ~shapely.is_valid(areas)
    areas[wrong] = shapely.make_valid(areas[wrong], method="structure", keep_collapsed=False)
    tiny = shapely.area(areas) < 1e-6
    if tiny.any():
        areas[tiny] = shapely.Polygon()
    return areas


def make_shapes(areas):
    """[N] valid shapely areas, several parts and holes allowed -> Shapes."""
    parts, part_of = shapely.get_parts(shapely.normalize(areas), return_index=True)
    rings, ring_of = shapely.get_rings(parts, return_index=True)  # holes run the other way
    xy, point_of = shapely.get_coordinates(rings, return_index=True)
    y = xy[:, 1]
    start = np.flatnonzero((np.diff(point_of) == 0) & (np.abs(np.diff(y)) > 1e-9))
    (x0, y0), (x1, y1) = xy.T.take(start, 1), xy.T.take(start + 1, 1)
    down, slope = y1 > y0, (x1 - x0) / (y1 - y0)
    rows = np.minimum(y0, y1), np.maximum(y0, y1)
    edges = np.stack([*rows, np.where(down, x0, x1), slope, np.where(down, -1, 1)])
    count = np.bincount(part_of[ring_of[point_of[start]]], minlength=len(areas))
    first, area = np.cumsum(count) - count, shapely.area(areas)
    return Shapes(edges, first, count, area, shapely.bounds(areas))


def contains(shapes, n, points):
    """Shapes, indices [T], points [T, 2] -> [T] whether shape n[t] holds point t: an odd number
    of its edges lie to the right."""
    t, e = expand(shapes.count[n])
    upper, lower, x, slope, _ = shapes.edges.take(shapes.first[n][t] + e, 1)
    px, py = points.T.take(t, 1)
    right = (upper <= py) & (py < lower) & (px < x + (py - upper) * slope)
    return np.bincount(t[right], minlength=len(n)) % 2 == 1


def overlap_area(a, i, b, j):
    """
    Shapes a and b, indices [K], [K] -> [K] area of shape i[k] of a inside shape j[k] of b.
    An area is the signed sum over its edges of the strips that reach from x = -infinity to the
    edge, and two strips share, in the rows common to both, what lies left of the nearer edge.
    """
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
