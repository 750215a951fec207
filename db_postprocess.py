"""How do maps become polygons on the page? Numpy in, numpy out, no torch.

Differentiable Binarization (Liao et al. 2020, arXiv 1911.08947, section 3.5): `find_candidates` has
the blobs of a map above `thresh`, which costs most and is done once for many settings of the rest;
`decode_candidates` filters them and grows the survivors by what the training targets shrank them.
Neither raises on any map. Coordinates are (x, y) and pixel (i, j) covers [i, i+1) x [j, j+1)."""

from typing import NamedTuple

import cv2
import numpy as np
import pyclipper
import shapely

SHRINK_RATIO = 0.4
MODES = ("polygon", "box")
DECODING = ("thresh", "box_thresh", "unclip_ratio", "max_candidates", "min_size", "mode")
DECODING += ("shrink_ratio",)  # the one of training, which the unclip undoes
RAGGED = 0.5  # px; the stairs of a turned line; a hull that stands out more is bent or two lines
CLIPPER_SCALE = 256  # clipper works on integers; 1/256 px is far below what a label resolves
# of files: points of a polygon, of one that may cross itself, of a page; decimals in page pixels
MAX_POINTS, MAX_CROSSING, MAX_PAGE_POINTS, DECIMALS = 500, 20, 20_000, 4


def decode_page(prob, page_size, hp):
    """Polygons (list of N [P, 2], page px, see `to_page`) and scores [N] of a map [h, w], all that
    a file may hold. page_size: [2] width, height; hp: has the attributes DECODING."""
    polygons, scores = polygons_from_map(prob, **{key: getattr(hp, key) for key in DECODING})
    polygons = to_page(polygons, np.array(prob.shape[::-1]) / page_size, page_size)
    return first_that_fit(polygons, scores)


def first_that_fit(polygons, scores):
    """The first of polygons [P, 2] and scores [N], as many as have MAX_PAGE_POINTS together."""
    count = (np.cumsum([len(points) for points in polygons]) <= MAX_PAGE_POINTS).sum()
    return polygons[:count], scores[:count]


def to_page(polygons, scale, page_size):
    """Polygons in map pixels -> in page pixels, inside the page, of at most MAX_POINTS points. What
    crosses itself, as moving points onto the page's edge may lead to, is cut instead."""
    size = np.array([len(points) for points in polygons], int)
    xy = np.concatenate([np.zeros((0, 2)), *polygons]) / scale
    inside, owner = xy.clip(0, page_size), np.repeat(np.arange(len(size)), size)
    found, doubtful = split_outlines(inside, size), size > MAX_CROSSING
    doubtful[owner[(inside != xy).any(1)]] = True
    for i in np.flatnonzero(doubtful):
        written = shapely.polygons(found[i].round(DECIMALS))
        if size[i] > MAX_POINTS or not shapely.is_valid(written):
            found[i] = cut_polygon(polygons[i] / scale, page_size)
    return found


def cut_polygon(polygon, page_size):
    """The largest part of a polygon [P, 2] inside the page as [P', 2] that does not cross itself,
    to DECIMALS; its upright box where nothing is left of it, or over MAX_POINTS points."""
    outline, page = shapely.Polygon(polygon), shapely.box(0, 0, *page_size)
    area = shapely.make_valid(outline, method="structure", keep_collapsed=False)
    parts = shapely.get_parts(shapely.intersection(area, page, grid_size=10**-DECIMALS))
    ring = shapely.get_exterior_ring(max(parts, key=shapely.area, default=None))
    points = shapely.get_coordinates(ring)[:0:-1]  # clockwise on the screen
    box = shapely.get_coordinates(shapely.box(*outline.bounds))[:4].clip(0, page_size)
    return points if 0 < len(points) <= MAX_POINTS else box


def polygons_from_map(prob, *, thresh, **decoding):
    """Polygons (list of N [P, 2], map px) and scores [N] of a map; see the two that it joins."""
    return decode_candidates(find_candidates(prob, thresh), **decoding)


class Candidates(NamedTuple):
    """Blobs of one thresholded map, best score first. outlines: N arrays [P, 2] through the centres
    of a blob's outermost pixels, clockwise on the screen: its hull, which evens out ragged edges,
    where `convex` [N], else its contour. margins: [N] from there to the edge of the pixels, half a
    pixel less what a hull adds. sizes: [2, N] area and perimeter of the pixels. rects: [N, 5] their
    smallest rectangle (centre x, centre y, width, height, angle in radians within 45 degrees of
    upright). scores: [N], mean probability inside the contour."""

    outlines: list
    convex: np.ndarray
    margins: np.ndarray
    sizes: np.ndarray
    rects: np.ndarray
    scores: np.ndarray


def find_candidates(prob, thresh):
    """Blobs of a probability map [H, W] (float in 0..1 or uint8 in 0..255) above `thresh` (0..1).
    Blobs inside the hole of another count; holes themselves and single pixels do not."""
    scale, level = (255, int(thresh * 255)) if prob.dtype == np.uint8 else (1, thresh)
    binary = (prob > level).view(np.uint8)  # an int, so that bytes are compared as bytes
    contours, tree = cv2.findContours(binary, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer = tree[0, :, 3] < 0 if contours else ()
    contours = [c for c, keep in zip(contours, outer) if keep and len(c) > 1]
    scores = np.array([contour_score(prob, c) for c in contours]) / scale
    order = np.argsort(-scores, kind="stable")
    contours = [contours[i][:, 0] for i in order]
    outlines = [cv2.convexHull(c)[:, 0] + 0.5 for c in contours]
    sizes, own = measure(outlines), measure(contours)
    gap = np.maximum(sizes[0] - own[0], 0) / own[1]  # what a hull adds, in px of its outline
    convex = gap <= RAGGED
    for i in np.flatnonzero(~convex):
        simple = cv2.approxPolyDP(contours[i], 0.002 * own[1, i], True)[:, 0]
        outlines[i] = (simple if len(simple) > 2 else contours[i]) + 0.5
    sizes = np.stack([own[0], np.where(convex, sizes[1], own[1])])
    margins, rects = 0.5 - np.where(convex, gap, 0), min_area_rects(contours)
    return Candidates(outlines, convex, margins, sizes, rects, scores[order])


def measure(outlines):
    """Outlines N x [P, 2] through pixel centres -> [2, N] area and perimeter of the pixels, whose
    edges lie half a pixel outside: a blob one pixel thin is one pixel thick, not nothing."""
    xy, before, start = join_outlines(outlines)
    area = np.add.reduceat(xy[before, 0] * xy[:, 1] - xy[:, 0] * xy[before, 1], start)
    length = np.add.reduceat(np.hypot(*(xy - xy[before]).T), start)
    return np.stack([np.abs(area) / 2 + length / 2 + 1, length + 4])


def join_outlines(outlines):
    """N outlines [P, 2] -> vertices [V, 2], index of the one before each [V], of each first [N]."""
    xy, end = np.concatenate([np.zeros((0, 2)), *outlines]), np.cumsum([0, *map(len, outlines)])
    before = np.arange(len(xy)) - 1
    before[end[:-1]] = end[1:] - 1
    return xy, before, end[:-1]


def split_outlines(xy, size):
    """Vertices [V, 2] and their numbers [N] -> N arrays [P, 2]."""
    end = np.cumsum(size).tolist()
    return [xy[a:b] for a, b in zip([0, *end], end)]


def contour_score(prob, contour):
    """Mean of the map inside one contour, as PaddleOCR's `slow` score, on its bounding box only."""
    x, y, w, h = cv2.boundingRect(contour)
    mask = np.zeros((h, w), np.uint8)
    cv2.drawContours(mask, [contour], 0, 1, cv2.FILLED, offset=(-x, -y))
    return cv2.mean(prob[y : y + h, x : x + w], mask)[0]


def min_area_rects(contours):
    """Smallest rotated rectangle of each contour's pixels as [N, 5], see `Candidates`."""
    rects = [(*centre, *sides, angle) for centre, sides, angle in map(cv2.minAreaRect, contours)]
    rects = np.array(rects).reshape(-1, 5) + (0.5, 0.5, 1, 1, 0)
    quarters = np.round(rects[:, 4] / 90)  # a rectangle's angle may name either of its sides
    rects[quarters % 2 == 1, 2:4] = rects[quarters % 2 == 1, 3:1:-1]
    rects[:, 4] = np.deg2rad(rects[:, 4] - 90 * quarters)
    return rects


def decode_candidates(
    blobs, *, box_thresh, unclip_ratio, max_candidates, min_size, mode, shrink_ratio=SHRINK_RATIO
):
    """Polygons (list of N [P, 2]) and scores [N] of Candidates, best score first, in map pixels:
    of scores >= box_thresh the max_candidates best, of these the ones whose short side is at least
    min_size pixels after the unclip. mode: polygon (outline of the blob; its rectangle where the
    unclip leaves nothing, or over MAX_POINTS points) or box (its rectangle, grown in closed form).
    Raises ValueError on an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    keep = int(np.searchsorted(-blobs.scores, -box_thresh, side="right"))
    rects = blobs.rects[:keep][:max_candidates]
    sides = grown_sides(rects, unclip_ratio, shrink_ratio)
    large = np.flatnonzero(sides.min(1) >= min_size)
    grown = np.hstack([rects[:, :2], sides, rects[:, 4:]])[large]
    if mode == "box":
        return list(rect_corners(grown)), blobs.scores[large]
    distance = unclip_distance(*blobs.sizes[:, large], unclip_ratio, shrink_ratio)
    distance += blobs.margins[large]
    convex = blobs.convex[large]
    polygons = offset_convex([blobs.outlines[i] for i in large[convex]], distance[convex])
    for i in np.flatnonzero(~convex):
        parts = offset_polygon(blobs.outlines[large[i]], distance[i])
        largest = max(parts, key=polygon_area, default=())
        whole = 0 < len(largest) <= MAX_POINTS
        polygons.insert(i, largest if whole else rect_corners(grown[[i]])[0])
    return polygons, blobs.scores[large]


def grown_sides(rects, unclip_ratio, shrink_ratio):
    """Rectangles [N, 5] as in `Candidates` -> [N, 2] their width and height after the unclip."""
    sides = rects[:, 2:4]
    distance = unclip_distance(sides.prod(1), 2 * sides.sum(1), unclip_ratio, shrink_ratio)
    return sides + 2 * distance[:, None]


def polygon_area(polygon):
    return abs(signed_area(polygon))


def signed_area(polygon):
    """Area of a polygon [P, 2], negative where it runs counter-clockwise on the screen."""
    return cv2.contourArea(polygon.astype(np.float32), oriented=True)


def rect_corners(rects):
    """Corners of rectangles [N, 5] as [N, 4, 2], clockwise from the top left one."""
    half = rects[:, None, 2:4] / 2 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])  # [N, 4, 2]
    cos, sin = np.cos(rects[:, 4:]), np.sin(rects[:, 4:])
    turned = [half[..., 0] * cos - half[..., 1] * sin, half[..., 0] * sin + half[..., 1] * cos]
    return rects[:, None, :2] + np.stack(turned, -1)


def offset_convex(outlines, distance):
    """Convex outlines N x [P >= 2, 2], clockwise on the screen, moved outwards by distances [N]:
    each edge along its normal, until neighbours meet. A corner sharper than a right angle is cut by
    one more edge, so that none moves further than 1.42 distances. Returns N arrays [P', 2]."""
    xy, before, start = join_outlines(outlines)
    angle = np.arctan2(*(xy - xy[before]).T[::-1])  # of the edge that ends in a vertex
    turn = np.empty_like(angle)
    turn[before] = (angle - angle[before] + 1e-9) % (2 * np.pi)
    points = 1 + (turn > np.pi / 2 + 1e-6)
    vertex = np.repeat(np.arange(len(xy)), points)
    second = np.r_[False, vertex[1:] == vertex[:-1]]
    half = (turn / points / 2)[vertex]
    normal = angle[vertex] - np.pi / 2 + half * np.where(second, 3, 1)
    reach = np.repeat(distance, np.add.reduceat(points, start)) / np.cos(half)
    moved = xy[vertex] + reach[:, None] * np.stack([np.cos(normal), np.sin(normal)], 1)
    return split_outlines(moved, np.add.reduceat(points, start))


def offset_polygon(polygon, distance):
    """Move the outline of a polygon [P, 2] outwards (distance > 0) or inwards (< 0), in pixels, by
    Vatti clipping. Corners that move outwards are rounded to a quarter of a pixel: blobs end in
    points, and mitred points grow into spikes. Returns a list of polygons [P', 2]: empty when
    nothing is left, several when a narrow waist parts."""
    path = np.round(np.asarray(polygon, np.float64) * CLIPPER_SCALE).astype(np.int64)
    clipper = pyclipper.PyclipperOffset(arc_tolerance=0.25 * CLIPPER_SCALE)
    clipper.AddPath(path.tolist(), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    return [np.array(p) / CLIPPER_SCALE for p in clipper.Execute(distance * CLIPPER_SCALE)]


def shrink_distance(area, perimeter, shrink_ratio=SHRINK_RATIO):
    """How far a label's outline moves inwards, in px: A (1 - r^2) / L (arXiv 1911.08947, eq. 4)."""
    return area * (1 - shrink_ratio**2) / perimeter


def unclip_distance(area, perimeter, unclip_ratio, shrink_ratio=SHRINK_RATIO):
    """How far a blob of `area` and `perimeter` grows back, in pixels; scalars or arrays.
    unclip_ratio > 0 is the paper's A' r' / L'. It fits one aspect ratio: a square wants 1.5, a long
    line 4. unclip_ratio = 0 is the exact inverse of the shrink for every rectangle: the d with
    d = shrink_distance(A' + L' d + 4 d^2, L' + 8 d)."""
    if unclip_ratio > 0:
        return area * unclip_ratio / perimeter
    keep = shrink_ratio**2
    root = np.sqrt((keep * perimeter) ** 2 + 16 * (1 - keep**2) * area)
    return (root - keep * perimeter) / (8 * (1 + keep))
