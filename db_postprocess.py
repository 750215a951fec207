"""Maps to polygons: contours, scores, rotated boxes and polygons. Numpy in, numpy out, no torch.

Post-processing of Differentiable Binarization (Liao et al. 2020, arXiv 1911.08947, section 3.5).
One page follows `polygons_from_map`: a probability map is thresholded, every blob becomes a
candidate with a score, candidates are filtered, and each survivor grows back by the distance that
the training targets shrank it.

Two steps, because they cost differently: `find_candidates` depends on the map and `thresh` alone;
`decode_candidates` holds everything else (box_thresh, unclip_ratio, max_candidates, min_size,
mode), so a search over thresholds pays for the contours once.

Coordinates are (x, y) and pixel (i, j) covers [i, i+1) x [j, j+1).
"""

from typing import NamedTuple

import cv2
import numpy as np
import pyclipper

SHRINK_RATIO = 0.4
MODES = ("polygon", "box")
CLIPPER_SCALE = 256  # clipper works on integers; 1/256 px is far below what a label resolves


class Candidates(NamedTuple):
    """Blobs of one thresholded map, best score first.

    contours: N int arrays [P, 2], the centres of each blob's outermost pixels. rects: [N, 5] as
    (centre x, centre y, width, height, angle in radians within 45 degrees of upright), the smallest
    rectangle around the blob's pixels. scores: [N], mean probability inside the contour.
    """

    contours: list
    rects: np.ndarray
    scores: np.ndarray


def offset_polygon(polygon, distance):
    """Move the outline of a polygon [P, 2] outwards (distance > 0) or inwards (< 0), in pixels.

    Shrinking and unclipping are this one operation with opposite sign. Corners that move outwards
    are rounded to a quarter of a pixel: blobs end in points, and mitred points grow into spikes.
    Returns a list of polygons [P', 2]: empty when nothing is left, several when a narrow waist
    parts. Vatti clipping by the library pyclipper.
    """
    path = np.round(np.asarray(polygon, np.float64) * CLIPPER_SCALE).astype(np.int64)
    clipper = pyclipper.PyclipperOffset(arc_tolerance=0.25 * CLIPPER_SCALE)
    clipper.AddPath(path.tolist(), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    paths = clipper.Execute(distance * CLIPPER_SCALE)
    return [np.array(p, np.float64) / CLIPPER_SCALE for p in paths]


def shrink_distance(area, perimeter, shrink_ratio=SHRINK_RATIO):
    """How far a label's outline moves inwards, in px: A (1 - r^2) / L (arXiv 1911.08947, eq. 4)."""
    return area * (1 - shrink_ratio**2) / perimeter


def unclip_distance(area, perimeter, unclip_ratio, shrink_ratio=SHRINK_RATIO):
    """How far a blob of `area` and `perimeter` grows back, in pixels; scalars or arrays.

    unclip_ratio > 0 is the paper's A' r' / L'. It fits one aspect ratio: a square wants 1.5, a long
    line 4. unclip_ratio = 0 is the exact inverse of the shrink for every rectangle: the d with
    d = shrink_distance(A' + L' d + 4 d^2, L' + 8 d).
    """
    if unclip_ratio > 0:
        return area * unclip_ratio / perimeter
    keep = shrink_ratio**2
    root = np.sqrt((keep * perimeter) ** 2 + 16 * (1 - keep**2) * area)
    return (root - keep * perimeter) / (8 * (1 + keep))


def find_candidates(prob, thresh):
    """Blobs of a probability map [H, W] (float in 0..1 or uint8 in 0..255) above `thresh` (0..1).

    Blobs inside the hole of another count, holes themselves do not.
    """
    scale = 255 if prob.dtype == np.uint8 else 1
    binary = (prob > thresh * scale).view(np.uint8)
    contours, tree = cv2.findContours(binary, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    contours = [c for c, node in zip(contours, tree[0]) if node[3] < 0] if contours else []
    scores = np.array([contour_score(prob, c) for c in contours]) / scale
    order = np.argsort(-scores, kind="stable")
    contours = [contours[i] for i in order]
    return Candidates([c[:, 0] for c in contours], min_area_rects(contours), scores[order])


def contour_score(prob, contour):
    """Mean of the map inside one contour, as PaddleOCR's `slow` score, on its bounding box only."""
    x, y, w, h = cv2.boundingRect(contour)
    mask = np.zeros((h, w), np.uint8)
    cv2.drawContours(mask, [contour], 0, 1, cv2.FILLED, offset=(-x, -y))
    return cv2.mean(prob[y : y + h, x : x + w], mask)[0]


def min_area_rects(contours):
    """Smallest rotated rectangle of each contour as [N, 5], see `Candidates`.

    A contour runs through pixel centres, so its rectangle moves by half a pixel and grows by half a
    pixel on each side: a blob one pixel thin is one pixel thick, not nothing.
    """
    rects = [cv2.minAreaRect(c) for c in contours]
    rects = np.array([(x, y, w, h, a) for (x, y), (w, h), a in rects]).reshape(-1, 5)
    rects[:, :2] += 0.5
    rects[:, 2:4] += 1
    lying = rects[:, 4] > 45
    rects[lying, 2:4] = rects[lying, 3:1:-1]
    rects[:, 4] = np.deg2rad(rects[:, 4] - 90 * lying)
    return rects


def rect_corners(rects):
    """Corners of rectangles [N, 5] as [N, 4, 2], clockwise from the top left one."""
    half = rects[:, None, 2:4] / 2 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])  # [N, 4, 2]
    cos, sin = np.cos(rects[:, 4:]), np.sin(rects[:, 4:])
    turned = [half[..., 0] * cos - half[..., 1] * sin, half[..., 0] * sin + half[..., 1] * cos]
    return rects[:, None, :2] + np.stack(turned, -1)


def unclip_contour(contour, rect, unclip_ratio, shrink_ratio):
    """Polygon [P, 2] of one contour [P', 2] grown back. A blob too thin for an outline of its own
    takes its rectangle's [5]."""
    outline = cv2.approxPolyDP(contour, 0.002 * cv2.arcLength(contour, True), True)[:, 0]
    area, perimeter = cv2.contourArea(outline), cv2.arcLength(outline, True)
    if len(outline) < 3 or area < 1:
        outline, grow = rect_corners(rect[None])[0], 0.0
        area, perimeter = rect[2] * rect[3], 2 * (rect[2] + rect[3])
    else:  # the half pixel from the pixels' centres to their edges, as in min_area_rects
        outline, grow = outline + 0.5, 0.5
        area, perimeter = area + perimeter / 2 + 1, perimeter + 4
    grow += unclip_distance(area, perimeter, unclip_ratio, shrink_ratio)
    return max(offset_polygon(outline, grow), key=cv2_area)


def cv2_area(polygon):
    return cv2.contourArea(polygon.astype(np.float32))


def decode_candidates(
    candidates,
    *,
    box_thresh,
    unclip_ratio,
    max_candidates,
    min_size,
    mode,
    shrink_ratio=SHRINK_RATIO,
):
    """Polygons (list of N [P, 2]) and scores [N] of candidates, best score first, in map pixels.

    Keeps scores >= box_thresh, of these the max_candidates best, of these the ones whose short side
    is at least min_size pixels after the unclip. mode: polygon (outline of the blob) or box (its
    rectangle, grown in closed form). Raises ValueError on an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    keep = int(np.searchsorted(-candidates.scores, -box_thresh, side="right"))
    keep = min(keep, max_candidates)
    rects, scores = candidates.rects[:keep].copy(), candidates.scores[:keep]
    sides = rects[:, 2:4]
    distance = unclip_distance(sides.prod(1), 2 * sides.sum(1), unclip_ratio, shrink_ratio)
    large = np.flatnonzero(sides.min(1) + 2 * distance >= min_size)
    if mode == "box":
        rects[:, 2:4] += 2 * distance[:, None]
        return list(rect_corners(rects[large])), scores[large]
    contours = candidates.contours
    return [
        unclip_contour(contours[i], rects[i], unclip_ratio, shrink_ratio) for i in large
    ], scores[large]


def polygons_from_map(prob, *, thresh, **decoding):
    """Polygons (list of N [P, 2], map pixels, not rounded) and scores [N] of a map [H, W].

    prob: float in 0..1 or uint8 in 0..255; decoding: the keywords of `decode_candidates`.
    """
    return decode_candidates(find_candidates(prob, thresh), **decoding)
