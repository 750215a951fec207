"""How do maps become polygons on the page? Numpy in, numpy out, no torch.

Differentiable Binarization (Liao et al. 2020, arXiv 1911.08947, section 3.5): `find_candidates`
finds the blobs of a map above `thresh`, which costs most and is done once for many settings of the
rest; `decode_candidates` filters them and grows the survivors by what the training targets were
shrunk by. Neither raises on any map. Coordinates are (x, y), and pixel (i, j) covers [i, i+1) x
[j, j+1)."""

from typing import NamedTuple

import cv2
import numpy as np
import pyclipper
import shapely

from overlap import expand, join_vertices, starts

MODES = ("polygon", "box")
SHRINK_RATIO = 0.4
DECODING = (  # hyperparameters that decode a page
    "thresh",
    "box_thresh",
    "unclip_ratio",
    "max_candidates",
    "min_size",
    "mode",
    "shrink_ratio",  # of the training targets, which the unclip undoes
)
RAGGED = 0.55  # px; the stairs of a turned line make up to 0.5; a hull that adds more is bent
CLIPPER_SCALE = 256  # clipper works on integers; 1/256 px is far below what a label resolves

# what a file of polygons may hold
MAX_POINTS = 500  # of a polygon
MAX_CROSSING = 20  # of a polygon that may cross itself
MAX_PAGE_POINTS = 20_000  # of a page
DECIMALS = 4  # of a page pixel

# ---------------------------------------------------------------- a map's polygons on the page


def decode_page(prob, page_size, hp):
    """Polygons (list of N [P, 2], page px) and scores [N] of a map [h, w]: the best that a file may
    hold, see `to_page`, `first_that_fit`. page_size: [2] width, height. hp: has the attributes
    DECODING."""
    settings = {key: getattr(hp, key) for key in DECODING}
    polygons, scores = polygons_from_map(prob, **settings)
    scale = np.array(prob.shape[::-1]) / page_size
    return first_that_fit(to_page(polygons, scale, page_size), scores)


def polygons_from_map(prob, *, thresh, **settings):
    """Polygons (list of N [P, 2], map px) and scores [N] of a map: `find_candidates`, then
    `decode_candidates`."""
    return decode_candidates(find_candidates(prob, thresh), **settings)


def first_that_fit(polygons, scores):
    """The first of polygons [P, 2] and scores [N] that have at most MAX_PAGE_POINTS together."""
    count = (np.cumsum([*map(len, polygons)]) <= MAX_PAGE_POINTS).sum()
    return polygons[:count], scores[:count]


def to_page(polygons, scale, page_size):
    """Polygons in map pixels -> polygons in page pixels, inside the page, of at most MAX_POINTS
    points. One that would cross itself, because its points are moved onto the page's edge one by
    one, is cut along the edge instead."""
    xy, sizes = join_vertices(polygons)
    xy /= scale
    inside = xy.clip(0, page_size)

    # only long polygons and those with a moved point may cross themselves or be too long
    doubtful = sizes > MAX_CROSSING
    moved = (inside != xy).any(1)
    owner, _ = expand(sizes)
    doubtful[owner[moved]] = True

    on_page = split_outlines(inside, sizes)
    for i in np.flatnonzero(doubtful):
        written = shapely.polygons(on_page[i].round(DECIMALS))
        if sizes[i] > MAX_POINTS or not shapely.is_valid(written):
            on_page[i] = cut_polygon(polygons[i] / scale, page_size)
    return on_page


def cut_polygon(polygon, page_size):
    """The largest part of a polygon [P, 2] inside the page as [P', 2] that does not cross itself,
    to DECIMALS; its upright box if nothing is left of it, or over MAX_POINTS points."""
    outline = shapely.Polygon(polygon)
    page = shapely.box(0, 0, *page_size)
    area = shapely.make_valid(outline, method="structure", keep_collapsed=False)
    parts = shapely.get_parts(shapely.intersection(area, page, grid_size=10**-DECIMALS))

    ring = shapely.get_exterior_ring(max(parts, key=shapely.area, default=None))
    points = shapely.get_coordinates(ring)[:0:-1]  # clockwise on the screen
    if 0 < len(points) <= MAX_POINTS:
        return points
    return shapely.get_coordinates(shapely.box(*outline.bounds))[:4].clip(0, page_size)


# ---------------------------------------------------------------- blobs of a map


class Candidates(NamedTuple):
    """Blobs of one thresholded map, best score first. outlines: N arrays [P, 2] through the centres
    of a blob's outermost pixels, clockwise on the screen: its hull, which evens out ragged edges,
    where `convex` [N], else its contour. margins: [N] from there to the edge of the pixels, half a
    pixel minus what a hull adds. sizes: [2, N] number of pixels, those of holes included, and their
    perimeter. rects: [N, 5] rectangles of the same areas, see `min_area_rects`. scores: [N], mean
    probability inside the contour."""

    outlines: list
    convex: np.ndarray
    margins: np.ndarray
    sizes: np.ndarray
    rects: np.ndarray
    scores: np.ndarray


def find_candidates(prob, thresh):
    """Candidates of a probability map [H, W] (float in 0..1 or uint8 in 0..255) above `thresh`
    (0..1). Blobs inside the hole of another count; holes themselves and single pixels do not."""
    contours = find_contours(prob, thresh)
    scores = np.array([contour_score(prob, contour) for contour in contours])
    if prob.dtype == np.uint8:
        scores /= 255
    best_first = np.argsort(-scores, kind="stable")
    contours = [contours[i][:, 0] for i in best_first]

    # Pick's theorem; a contour has as many pixels on it as steps
    area, length, steps = measure(contours)
    pixels = area + steps / 2 + 1
    perimeter = length + 4

    # what the hull adds to the pixels if its edge is half a pixel outside, in px of their outline
    outlines = [cv2.convexHull(contour)[:, 0] + 0.5 for contour in contours]
    hull_area, hull_length, _ = measure(outlines)
    gap = (hull_area + hull_length / 2 + 1 - pixels) / perimeter

    # a ragged or bent blob keeps its contour
    convex = gap <= RAGGED
    for i in np.flatnonzero(~convex):
        simple = cv2.approxPolyDP(contours[i], 0.002 * perimeter[i], True)[:, 0]
        outlines[i] = (simple if len(simple) > 2 else contours[i]) + 0.5

    return Candidates(
        outlines,
        convex,
        margins=0.5 - np.where(convex, gap, 0),
        sizes=np.stack([pixels, np.where(convex, hull_length + 4, perimeter)]),
        rects=min_area_rects(contours, pixels),
        scores=scores[best_first],
    )


def find_contours(prob, thresh):
    """Outer contours [P, 1, 2] of more than one pixel of a map above `thresh`."""
    level = int(thresh * 255) if prob.dtype == np.uint8 else thresh  # bytes compare as bytes
    binary = (prob > level).view(np.uint8)
    contours, tree = cv2.findContours(binary, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return []
    outer = tree[0, :, 3] < 0
    return [contour for contour, keep in zip(contours, outer) if keep and len(contour) > 1]


def contour_score(prob, contour):
    """Mean of the map inside one contour, as PaddleOCR's `slow` score, on its bounding box only."""
    x, y, w, h = cv2.boundingRect(contour)
    mask = np.zeros((h, w), np.uint8)
    cv2.drawContours(mask, [contour], 0, 1, cv2.FILLED, offset=(-x, -y))
    return cv2.mean(prob[y : y + h, x : x + w], mask)[0]


def measure(outlines):
    """Area [N], length [N] and steps [N] from pixel to pixel, upright or diagonal, of outlines
    N x [P, 2] through pixel centres."""
    xy, before, first = join_outlines(outlines)
    x, y = xy.T
    dx, dy = (xy - xy[before]).T
    area = abs(np.add.reduceat(x * dy - y * dx, first)) / 2
    length = np.add.reduceat(np.hypot(dx, dy), first)
    steps = np.add.reduceat(np.maximum(abs(dx), abs(dy)), first)
    return area, length, steps


def min_area_rects(contours, pixels):
    """Rectangles [N, 5] (centre x, centre y, width, height, angle in radians within 45 degrees of
    upright) of contours through pixel centres, each as large as its number of `pixels` [N].

    The smallest rectangle w x h through the outermost pixel centres is smaller than the word whose
    pixels they are. An upright word is larger by one pixel each way; a turned word by less, because
    some centres lie close to its edges. On average over places a word covers as many centres as its
    area has pixels. So both sides grow by the x with (w + x) (h + x) = pixels, which is exactly 1
    for upright rectangles. A bent blob, which fills little of its rectangle, has a negative x; the
    short side loses at most a quarter."""
    rects = [(*centre, *sides, angle) for centre, sides, angle in map(cv2.minAreaRect, contours)]
    rects = np.array(rects).reshape(-1, 5)
    rects[:, :2] += 0.5

    w, h = rects[:, 2:4].T
    growth = (np.sqrt((w - h) ** 2 + 4 * pixels) - w - h) / 2
    growth = growth.round(3).clip(-np.minimum(w, h) / 4)  # OpenCV's sides are rounded
    rects[:, 2:4] += growth[:, None]

    # OpenCV's angle may name either side: turned by quarters, it is the width's
    quarters = np.round(rects[:, 4] / 90)
    odd = quarters % 2 == 1
    rects[odd, 2:4] = rects[odd, 3:1:-1]
    rects[:, 4] = np.deg2rad(rects[:, 4] - 90 * quarters)
    return rects


# ---------------------------------------------------------------- unclip


def decode_candidates(
    blobs,
    *,
    box_thresh,
    unclip_ratio,
    max_candidates,
    min_size,
    mode,
    shrink_ratio=SHRINK_RATIO,
):
    """Polygons (list of N [P, 2], map px) and scores [N] of Candidates, best score first: those of
    the max_candidates best blobs that score at least box_thresh and whose short side is at least
    min_size pixels after the unclip. mode: polygon (outline of the blob; its rectangle if the
    unclip leaves nothing, or over MAX_POINTS points) or box (its rectangle, grown in closed form).
    Raises ValueError on an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")

    count = np.searchsorted(-blobs.scores, -box_thresh, side="right")
    rects = blobs.rects[:count][:max_candidates]
    sides = grown_sides(rects, unclip_ratio, shrink_ratio)
    large = np.flatnonzero(sides.min(1) >= min_size)
    scores = blobs.scores[large]

    corners = rect_corners(np.hstack([rects[:, :2], sides, rects[:, 4:]])[large])
    if mode == "box":
        return list(corners), scores

    distance = unclip_distance(*blobs.sizes[:, large], unclip_ratio, shrink_ratio)
    distance += blobs.margins[large]
    outlines = [blobs.outlines[i] for i in large]
    return unclip_outlines(outlines, blobs.convex[large], distance, corners), scores


def unclip_outlines(outlines, convex, distance, corners):
    """Outlines N x [P, 2], `convex` [N] or not, moved outwards by distances [N]: N x [P', 2]. If
    nothing is left of one, or over MAX_POINTS points, its rectangle, corners [N, 4, 2], takes its
    place."""
    hulls = [outlines[i] for i in np.flatnonzero(convex)]
    polygons = offset_convex(hulls, distance[convex])

    for i in np.flatnonzero(~convex):
        parts = offset_polygon(outlines[i], distance[i])
        largest = max(parts, key=polygon_area, default=())
        if not 0 < len(largest) <= MAX_POINTS:
            largest = corners[i]
        polygons.insert(i, largest)  # in ascending order each one gets its own place
    return polygons


def grown_sides(rects, unclip_ratio, shrink_ratio):
    """Rectangles [N, 5] as in `Candidates` -> [N, 2] their width and height after the unclip."""
    sides = rects[:, 2:4]
    area = sides.prod(1)
    perimeter = 2 * sides.sum(1)
    distance = unclip_distance(area, perimeter, unclip_ratio, shrink_ratio)
    return sides + 2 * distance[:, None]


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


# ---------------------------------------------------------------- geometry


def polygon_area(polygon):
    return abs(signed_area(polygon))


def signed_area(polygon):
    """Area of a polygon [P, 2], negative where it runs counter-clockwise on the screen."""
    return cv2.contourArea(polygon.astype(np.float32), oriented=True)


def rect_corners(rects):
    """Corners of rectangles [N, 5] as [N, 4, 2], clockwise from the top left one."""
    x = rects[:, 2:3] / 2 * (-1, 1, 1, -1)  # [N, 4], before the turn
    y = rects[:, 3:4] / 2 * (-1, -1, 1, 1)
    cos = np.cos(rects[:, 4:])
    sin = np.sin(rects[:, 4:])
    turned = np.stack([x * cos - y * sin, x * sin + y * cos], 2)
    return rects[:, None, :2] + turned


def join_outlines(outlines):
    """N outlines [P, 2] -> vertices [V, 2], index of the one before each [V], of each first [N]."""
    xy, sizes = join_vertices(outlines)
    first = starts(sizes)
    before = np.arange(len(xy)) - 1
    before[first] += sizes  # the last one of the outline
    return xy, before, first


def split_outlines(xy, sizes):
    """Vertices [V, 2] and their numbers [N] -> N arrays [P, 2]."""
    end = np.cumsum(sizes).tolist()
    return [xy[start:stop] for start, stop in zip([0, *end], end)]


def offset_convex(outlines, distance):
    """Convex outlines N x [P >= 2, 2], clockwise on the screen, moved outwards by distances [N]:
    each edge along its normal, until neighbours meet. A corner sharper than a right angle is cut by
    one more edge, so that no point moves further than 1.42 distances. Returns N arrays [P', 2].

        turn of at most 90 degrees     sharper turn

          -------------o                 -------------o
                       |                              |
          --->---v     |                 --->---v     o
                 |     |                       /     /
                 |     |                      /     /

    The points of a vertex (1 or 2) share its turn. Each lies at an angle `aside` from the normal of
    the nearest edge, hence distance / cos(aside) away."""
    xy, before, first = join_outlines(outlines)
    dx, dy = (xy - xy[before]).T
    angle = np.arctan2(dy, dx)  # of the edge that ends in a vertex
    turn = np.empty_like(angle)
    turn[before] = (angle - angle[before] + 1e-9) % (2 * np.pi)

    # the moved points of all vertices; `second` of those that have two
    points = 1 + (turn > np.pi / 2 + 1e-6)
    vertex = np.repeat(np.arange(len(xy)), points)
    second = np.diff(vertex, prepend=-1) == 0

    aside = (turn / points / 2)[vertex]
    normal = angle[vertex] - np.pi / 2
    direction = normal + aside * (1 + 2 * second)
    counts = np.add.reduceat(points, first)
    reach = np.repeat(distance, counts) / np.cos(aside)
    unit = np.stack([np.cos(direction), np.sin(direction)], 1)
    moved = xy[vertex] + reach[:, None] * unit
    return split_outlines(moved, counts)


def offset_polygon(polygon, distance):
    """Move the outline of a polygon [P, 2] outwards (distance > 0) or inwards (< 0), in pixels, by
    Vatti clipping. Corners that move outwards are rounded to a quarter of a pixel: blobs end in
    points, and mitred points grow into spikes. Returns a list of polygons [P', 2]: empty when
    nothing is left, several when a narrow waist parts."""
    path = np.round(np.asarray(polygon, np.float64) * CLIPPER_SCALE).astype(np.int64)
    clipper = pyclipper.PyclipperOffset(arc_tolerance=0.25 * CLIPPER_SCALE)
    clipper.AddPath(path.tolist(), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    return [np.array(p) / CLIPPER_SCALE for p in clipper.Execute(distance * CLIPPER_SCALE)]
