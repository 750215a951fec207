"""What does the network learn of a page? Target maps of its labels: the shrunk words, the distance
to their outlines, and where a loss looks."""

import math
from typing import NamedTuple

import cv2
import numpy as np

from db_postprocess import SHRINK_RATIO, polygon_area, shrink_distance


class Edges(NamedTuple):
    """P edges a -> b of an outline as `distance_to_outline` needs them, float32 [P, 1] each.

    a ----- half -----+----- half ----- b     u = (ux, uy): the direction of the edge
                      |--- along ---|         along = x ux + y uy + along_0, from the middle
                                    | across  across = x uy - y ux + across_0
                                 (x, y)
    """

    ux: np.ndarray
    uy: np.ndarray
    along_0: np.ndarray
    half: np.ndarray  # of the length
    across_0: np.ndarray
    a_y: np.ndarray
    b_y: np.ndarray
    slope: np.ndarray  # the edge lies on the line x = slope y + start
    start: np.ndarray


def edge_tables(polygons):
    """The edges of N polygons [P, 2]: N float32 arrays [9, P, 1], whose rows are those of Edges.
    All polygons at once, since numpy's small calls would cost more than the pixels."""
    a = np.concatenate(polygons)
    b = np.concatenate([np.concatenate([p[1:], p[:1]]) for p in polygons])
    edge = b - a  # [V, 2]
    half = np.hypot(*edge.T) / 2
    ux, uy = (edge / np.maximum(2 * half, 1e-9)[:, None]).T
    level = np.abs(edge[:, 1]) < 1e-9
    slope = edge[:, 0] / np.where(level, 1, edge[:, 1])
    table = Edges(
        ux=ux,
        uy=uy,
        along_0=-(a[:, 0] * ux + a[:, 1] * uy) - half,
        half=half,
        across_0=a[:, 1] * ux - a[:, 0] * uy,
        a_y=a[:, 1],
        b_y=b[:, 1],
        slope=slope,
        start=a[:, 0] - slope * a[:, 1],
    )
    table = np.array(table, np.float32)[:, :, None]
    ends = np.cumsum([len(p) for p in polygons])[:-1]
    return np.split(table, ends, 1)


def distance_to_outline(table, rows, columns):
    """Distance from pixel centres to the outline of a polygon, in px, float32 [height, width], and
    which of them lie inside by the even-odd rule, bool [height, width].

    table: [9, P, 1] of `edge_tables`; rows, columns: slices of the window, as of `pixel_window`."""
    y = np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5)
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5)
    count = table.shape[1]
    if count > max(16, 2**24 // (len(y) * len(x))):
        # many edges on a large window would fill the memory
        middle = count // 2
        first, inside_first = distance_to_outline(table[:, :middle], rows, columns)
        second, inside_second = distance_to_outline(table[:, middle:], rows, columns)
        return np.minimum(first, second), inside_first ^ inside_second

    edges = Edges(*table)
    along = (x * edges.ux + edges.along_0)[:, None]
    along = along + (y * edges.uy)[:, :, None]  # [P, height, width]
    across = (x * edges.uy + edges.across_0)[:, None]
    across = across - (y * edges.ux)[:, :, None]

    # distance^2 = across^2 + overshoot^2, the overshoot being what of |along| is beyond an end
    np.abs(along, out=along)
    along -= edges.half[:, None]
    flat = along.reshape(-1, len(x))
    cv2.max(flat, 0, flat)
    along *= along
    across *= across
    along += across

    # a pixel is inside if a ray from it to the right crosses an odd number of edges
    crosses = (y >= edges.a_y) != (y >= edges.b_y)  # [P, height]
    crossing = np.where(crosses, y * edges.slope + edges.start, np.float32(-np.inf))
    right_of = x < crossing[:, :, None]  # [P, height, width]
    return np.sqrt(along.min(0)), np.logical_xor.reduce(right_of, 0)


def make_targets(polygons, ignore, height, width, shrink_ratio=SHRINK_RATIO):
    """Target maps of one page, uint8 [4, height, width] (arXiv 1911.08947, section 3.4). polygons:
    N arrays [P, 2] in map pixels; ignore: N bools. Channels:

    0  shrink map: 1 inside the outline moved in by D = A (1 - r^2) / L, for a word too thin for
       that on its middle line
    1  threshold map: 255 on the outline, falling linearly to 0 at distance D
    2  mask of the shrink map: 0 on ignored words
    3  mask of the threshold map: 1 within D of a word

    Words are independent, so where they meet the larger value counts."""
    maps = np.zeros((4, height, width), np.uint8)
    maps[2] = 1
    tables = edge_tables(polygons) if polygons else []

    for i in np.argsort(ignore, kind="stable"):  # ignored words last, for they erase
        polygon = polygons[i]
        length = cv2.arcLength(polygon.astype(np.float32), True)
        reach = 0
        if length:
            area = polygon_area(polygon)
            reach = shrink_distance(area, length, shrink_ratio)

        # the part of the maps that the word can change, as a view
        rows, columns = pixel_window(polygon, reach, height, width)
        window = maps[:, rows, columns]
        if not window.size or (reach <= 0 and not ignore[i]):
            continue

        distance, inside = distance_to_outline(tables[i], rows, columns)
        if ignore[i]:
            window[[0, 2, 3]] *= ~inside
            continue

        # shrunk word; one too thin for that keeps the pixels farthest inside
        core = inside & (distance >= reach)
        if not core.any():
            core = inside & (distance == distance[inside].max(initial=-1))
        shrink, thresh, _, near = window
        shrink |= core

        # distance to the outline
        near |= inside | (distance < reach)
        far = cv2.convertScaleAbs(distance, alpha=255 / reach)
        cv2.max(thresh, 255 - far, thresh)
    return maps


def pixel_window(polygon, margin, height, width):
    """Slices (rows, columns) of the page's pixels within `margin` of a polygon's bounding box."""
    left, top = polygon.min(0).tolist()
    right, bottom = polygon.max(0).tolist()
    left = max(math.floor(left - margin), 0)
    top = max(math.floor(top - margin), 0)
    right = min(math.ceil(right + margin), width)
    bottom = min(math.ceil(bottom + margin), height)
    rows = slice(top, max(top, bottom))
    columns = slice(left, max(left, right))
    return rows, columns
