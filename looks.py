"""How does an outline look on a map? Features of labels, of pairs of neighbours and of text without
a label, by which right and wrong ones differ. Outlines are [P, 2], map px."""

from typing import NamedTuple

import cv2
import numpy as np

from cleval import line_gaps, line_neighbours, shared_areas
from db_postprocess import DECODING, polygon_area, polygons_from_map, shrink_distance
from mistakes import ends, hull, own_axes, short_sides
from targets import distance_to_outline, edge_tables, pixel_window

WIDEST = 2.0  # gap of a pair of neighbours, in heights
FAR = 10.0  # gap from text to a label, in heights, at most

# ---------------------------------------------------------------- a page


class View(NamedTuple):
    """A page's map with what was found on it and a set of labels, in map px."""

    prob: np.ndarray  # uint8 [h, w]
    words: list  # outlines found
    parts: list  # outlines found at the threshold audit.SURE
    polygons: list  # labels
    height: float  # the usual one of a label
    loads: tuple = ()  # areas of words [M], and of parts, that lie on labels


def with_labels(view, polygons):
    """The View with these labels."""
    shared = [shared_areas(polygons, found, None).shared for found in (view.words, view.parts)]
    loads = tuple(areas.sum(0) for areas in shared)
    return view._replace(polygons=polygons, loads=loads)


def look(prob, hp, threshold=None):
    """Outlines on a map and their mean probabilities."""
    settings = {key: getattr(hp, key) for key in DECODING}
    if threshold:
        settings["thresh"] = threshold
    return polygons_from_map(prob, **settings)


# ---------------------------------------------------------------- an outline


def areas_of(polygons):
    return np.array([polygon_area(polygon) for polygon in polygons])


def valley(profile):
    """How far a profile [K] falls, at most, between two higher places; 0 with a single peak."""
    left = np.maximum.accumulate(profile)
    right = np.maximum.accumulate(profile[::-1])[::-1]
    depth = np.minimum(left, right) - profile
    return depth.max()


def profile_of(place, values, step):
    """Means of values [K] in steps of `step` px along place [K]; empty steps are left out."""
    distance = place - place.min()
    steps = (distance / step).astype(int)
    counts = np.bincount(steps)
    sums = np.bincount(steps, values)
    some = counts > 0
    return sums[some] / counts[some]


def ink_features(prob, outline, table):
    """[6] of one outline: mean probability in the shrunk outline, from there to the outline, and as
    far around it; valleys along it and across; share of its length without text. All 0 if it holds
    no pixel of the map. table: its edges, of targets.edge_tables."""
    length = cv2.arcLength(outline.astype(np.float32), True)
    area = polygon_area(outline)
    reach = max(shrink_distance(area, max(length, 1)), 1)
    rows, columns = pixel_window(outline, reach, *prob.shape)
    window = prob[rows, columns] / 255
    if not window.size:
        return np.zeros(6)

    # the three parts of the window; an outline too thin to be shrunk is its own core
    distance, inside = distance_to_outline(table, rows, columns)
    core = inside & (distance >= reach)
    if not core.any():
        core = inside
    if not core.any():
        return np.zeros(6)
    around = ~inside & (distance < reach)

    # their means
    masks = np.stack([core, inside & ~core, around])
    sums = (masks * window).sum((1, 2))
    means = sums / masks.sum((1, 2)).clip(1)

    # profiles: across by all pixels inside, along by those of the core
    y, x = np.nonzero(inside)
    along, across = own_axes(outline) @ (x, y)
    values = window[inside]
    crosswise = profile_of(across, values, 1)

    in_core = core[inside]
    along = along[in_core]
    lengthwise = profile_of(along, values[in_core], reach)

    empty = (lengthwise < 0.5).mean()
    valleys = valley(lengthwise), valley(crosswise)
    return np.array([*means, *valleys, empty])


def overlap_features(outlines, found, load):
    """N outlines, M outlines found on the map and the areas [M] of these on labels -> features
    [N, 6], and of each outline the index of the one found that shares most with it [N], -1 if none
    does."""
    areas = shared_areas(outlines, found, None)
    own = np.maximum(areas.gt, 1e-6)

    # two empty ones, so that there always are a first and a second
    two_more = (0, 0), (0, 2)
    shared = np.pad(areas.shared, two_more)
    union = np.pad(areas.union, two_more, constant_values=1)
    size = np.append(areas.det, [1, 1])
    load = np.append(load, [0, 0])

    # the one that shares most, and the next
    main = shared.argmax(1)
    most = shared.max(1)
    second = np.sort(shared, 1)[:, -2]
    inside = shared > 0.5 * size
    columns = [
        (shared / union).max(1),  # the best IoU
        shared.sum(1) / own,  # its share that is found
        inside.sum(1),  # how many lie mostly on it
        second / own,
        1 - most / size[main],  # share of the main one that lies beside it
        (load[main] - most) / size[main],  # and on other labels
    ]
    features = np.stack(columns, 1).clip(0, 4)
    return features, np.where(most > 0, main, -1)


def outline_features(view, outlines):
    """[N, 22] of N outlines: ink, what was found there, shape, and how far its ends are off."""
    if not outlines:
        return np.zeros((0, 22))
    tables = edge_tables(outlines)
    ink = [ink_features(view.prob, *pair) for pair in zip(outlines, tables)]
    words, main = overlap_features(outlines, view.words, view.loads[0])
    parts, _ = overlap_features(outlines, view.parts, view.loads[1])

    # shape
    short = short_sides(outlines).clip(0.5)
    area = areas_of(outlines).clip(0.5)
    aspect = np.log(area / short**2)
    taller = np.log(short / view.height)

    # how far the ends along and across are from those of what was found, in heights
    off = np.full((len(outlines), 2), 3.0)
    for n in np.flatnonzero(main >= 0):
        axes = own_axes(outlines[n])
        word = view.words[main[n]]
        gaps = ends(outlines[n], axes) - ends(word, axes)
        off[n] = np.abs(gaps).max(0) / short[n]
    return np.column_stack([ink, words, parts, aspect, taller, off.clip(0, 3)])


# ---------------------------------------------------------------- pairs, and text


def close_pairs(view, chosen):
    """Neighbours on a line among the chosen labels: pairs of indices [K, 2] and features [K, 3]."""
    if len(view.polygons) < 2:
        return [], np.zeros((0, 3))
    first, second, gap = line_neighbours(view.polygons)
    pairs = np.stack([first, second], 1)
    near = gap < WIDEST
    near &= np.isin(pairs, chosen).all(1)
    pairs = pairs[near]

    # how much higher one is, and how far their middles are off one line, in heights
    short = short_sides(view.polygons).clip(0.5)[pairs]  # [K, 2]
    steps = np.diff(np.log(short))[:, 0]
    off = np.zeros(len(pairs))
    for k, (i, j) in enumerate(pairs):
        one = view.polygons[i]
        other = view.polygons[j]
        _, across = own_axes(hull(one, other))
        off[k] = abs(across @ (one.mean(0) - other.mean(0)))
    off /= short.max(1)
    gap = gap[near].clip(-1)
    return pairs.tolist(), np.stack([gap, np.abs(steps), off], 1)


def text_outside(view, hp):
    """Outlines of text that no label covers, and features [K, 5]: score, area, gaps to labels."""
    rest = view.prob.copy()
    for polygon in view.polygons:  # filled at once, what two share would stay
        cv2.fillPoly(rest, [np.round(polygon).astype(np.int32)], 0)
    outlines, scores = look(rest, hp)
    area = areas_of(outlines).clip(1)
    larger = np.log(area / view.height**2)
    gaps = line_gaps(outlines, view.polygons) / view.height
    return outlines, np.column_stack([scores, larger, gaps.clip(max=FAR)])
