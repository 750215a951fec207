"""How much do polygons share? Vertices as arrays, valid areas, points inside them, overlaps.

Pages have many pairs of polygons, so areas become arrays of edges, all pairs computed at once."""

from typing import NamedTuple

import numpy as np
import shapely


class Shapes(NamedTuple):
    """N areas by their edges, horizontal ones left out."""

    edges: np.ndarray  # [5, E] upper y, lower y, x at the upper y, dx / dy, side: +1 or -1
    first: np.ndarray  # [N] index of an area's first edge
    count: np.ndarray  # [N] its number of edges
    area: np.ndarray  # [N] in square pixels
    box: np.ndarray  # [N, 4] x0 y0 x1 y1; NaN, which touches nothing, where there is no area


def starts(counts):
    """Lengths [N] of parts that lie one after the other -> [N] where each begins."""
    return np.cumsum(counts) - counts


def expand(counts):
    """Counts [N] -> owner [sum], offset [sum]: for each n the pairs (n, 0) to (n, count - 1)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(len(owner)) - starts(counts)[owner]
    return owner, offset


def join_vertices(polygons):
    """N polygons [P, 2] -> the vertices of all [V, 2], numbers of vertices [N]."""
    size = np.array([len(points) for points in polygons], int)
    xy = np.concatenate([np.zeros((0, 2)), *polygons])
    return xy, size


def as_points(polygons):
    """Polygons as nested sequences -> float arrays [P >= 3, 2]. A polygon of fewer than three
    vertices, or with a number that is not finite, becomes three times (0, 0), without area."""
    polygons = [np.asarray(points, float).reshape(-1, 2) for points in polygons]
    none = np.zeros((3, 2))
    vertices, _ = join_vertices(polygons)
    all_finite = np.isfinite(vertices).all()  # at once: it nearly always holds

    def has_area(points):
        return len(points) > 2 and (all_finite or np.isfinite(points).all())

    return [points if has_area(points) else none for points in polygons]


def touching(a, b):
    """Boxes [N, 4], [M, 4] as x0 y0 x1 y1 -> index pairs [K], [K] of those that overlap."""
    ax0, ay0, ax1, ay1 = a.T[..., None]
    bx0, by0, bx1, by1 = b.T
    columns = (ax0 < bx1) & (bx0 < ax1)  # [N, M]
    rows = (ay0 < by1) & (by0 < ay1)
    return np.nonzero(columns & rows)


def to_shapely(polygons):
    """N polygons [P >= 3, 2] -> [N] valid shapely areas. A polygon that crosses itself becomes the
    union of its loops, one under 1e-6 square pixels becomes empty."""
    xy, size = join_vertices(polygons)
    owner, _ = expand(size)
    areas = shapely.polygons(shapely.linearrings(xy, indices=owner))

    invalid = ~shapely.is_valid(areas)
    areas[invalid] = shapely.make_valid(areas[invalid], method="structure", keep_collapsed=False)
    tiny = shapely.area(areas) < 1e-6
    areas[tiny] = shapely.Polygon()
    return areas


def make_shapes(areas):
    """[N] valid shapely areas -> Shapes. An area may have several parts, and holes, whose edges run
    the other way round than those of outlines."""
    boundaries = shapely.boundary(shapely.normalize(areas))
    rings, owner = shapely.get_parts(boundaries, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)

    # an edge leads from a vertex to the next one of its ring
    within = np.diff(ring) == 0
    sloping = np.abs(np.diff(xy[:, 1])) > 1e-9
    edge = np.flatnonzero(within & sloping)
    ax, ay = xy.T.take(edge, 1)
    bx, by = xy.T.take(edge + 1, 1)
    edges = [
        np.minimum(ay, by),
        np.maximum(ay, by),
        np.where(ay < by, ax, bx),
        (bx - ax) / (by - ay),
        np.sign(ay - by),
    ]

    count = np.bincount(owner[ring[edge]], minlength=len(areas))
    return Shapes(
        edges=np.stack(edges),
        first=starts(count),
        count=count,
        area=shapely.area(areas),
        box=shapely.bounds(areas),
    )


def edges_at(shapes, edge, y):
    """Edges [K], y [K] of a point on each -> x of the points [K], dx / dy [K] and sides [K]."""
    upper, _, x, slope, side = shapes.edges.take(edge, 1)
    return x + (y - upper) * slope, slope, side


def contains(shapes, n, points):
    """Shapes, index [T], points [T, 2] -> [T] whether shape n[t] holds point t: an odd number of
    its edges lies to the right of the point."""
    # every point with every edge of its shape
    t, e = expand(shapes.count[n])
    edge = shapes.first[n][t] + e
    upper, lower = shapes.edges[:2].take(edge, 1)
    px, py = points.T.take(t, 1)
    x, _, _ = edges_at(shapes, edge, py)
    same_row = (upper <= py) & (py < lower)
    right = same_row & (px < x)
    crossed = np.bincount(t[right], minlength=len(n))
    return crossed % 2 == 1


def overlap_area(a, i, b, j):
    """Shapes a and b, indices [K], [K] -> [K] area of shape i[k] of a inside shape j[k] of b.

    An area is the signed sum over its edges of the strips from the far left to the edge. Two strips
    share, in the rows common to both, what lies left of the nearer edge (#):
          top  |#######/ edge of a  | edge of b
               |######/             |"""
    # every edge of a with every edge of b, if they have rows in common
    k, e = expand(a.count[i] * b.count[j])
    count = b.count[j][k]
    edge_a = a.first[i][k] + e // count
    edge_b = b.first[j][k] + e % count
    upper_a, lower_a = a.edges[:2].take(edge_a, 1)
    upper_b, lower_b = b.edges[:2].take(edge_b, 1)
    top = np.maximum(upper_a, upper_b)
    rows = np.minimum(lower_a, lower_b) - top
    common = rows > 0
    k = k[common]
    top = top[common]
    rows = rows[common]
    xa, slope_a, side_a = edges_at(a, edge_a[common], top)
    xb, slope_b, side_b = edges_at(b, edge_b[common], top)

    # how far a's edge lies right of b's in the first row and after the last
    start = xa - xb
    stop = start + rows * (slope_a - slope_b)
    gap = np.abs(start) + np.abs(stop)
    swapped = np.maximum(-start * stop, 0)  # above 0 where the edges cross
    cross = swapped / np.maximum(gap, 1e-300)

    # twice the mean x of the nearer edge
    both = xa + xb + rows * (slope_a + slope_b) / 2
    width = both + cross - gap / 2
    strips = side_a * side_b * rows * width / 2
    return np.bincount(k, strips, len(i))
