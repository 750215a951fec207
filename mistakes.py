"""Which mistakes do labellers make? Errors of each kind, put into the labels of a page by a seed.

Outlines are [P, 2], in px of any kind."""

from dataclasses import dataclass, field

import cv2
import numpy as np

from cleval import shared_areas

KINDS = ("missing", "spurious", "moved", "joined", "split", "ignored")
TRIES = 30  # at a random outline
NEAR = 2.0  # heights from a label to one that it is joined with


@dataclass
class Mistaken:
    """A page's labels with mistakes."""

    polygons: list = field(default_factory=list)
    ignore: list = field(default_factory=list)
    kinds: list = field(default_factory=list)  # of each label, "" if it is right
    origins: list = field(default_factory=list)  # index of the label that it was; -1 if it is new
    bare: list = field(default_factory=list)  # (kind, outline) of text that lost its label

    def add(self, polygon, kind="", origin=-1, ignore=False):
        self.polygons.append(polygon)
        self.kinds.append(kind)
        self.origins.append(origin)
        self.ignore.append(ignore)


# ---------------------------------------------------------------- outlines


def hull(*polygons):
    """The convex outline around polygons."""
    points = np.concatenate(polygons).astype(np.float32)
    return cv2.convexHull(points)[:, 0].astype(float)


def own_axes(polygon):
    """Unit vectors [2, 2] along a polygon's longest edge and across it."""
    edges = np.roll(polygon, -1, 0) - polygon
    length = np.hypot(*edges.T)
    x, y = edges[length.argmax()] / max(length.max(), 1e-9)
    return np.array([[x, y], [-y, x]])


def short_sides(polygons):
    """N polygons [P, 2] -> short side of the smallest rectangle around each [N], in their unit."""
    sides = [cv2.minAreaRect(polygon.astype(np.float32))[1] for polygon in polygons]
    return np.array([min(pair) for pair in sides])


def ends(polygon, axes):
    """The lowest and the highest place [2, 2] of a polygon along two axes."""
    place = polygon @ axes.T
    return np.stack([place.min(0), place.max(0)])


def iou(a, b):
    """IoU of two outlines."""
    areas = shared_areas([a], [b], None)
    return areas.shared.item() / max(areas.union.item(), 1e-9)


def move_label(rng, polygon):
    """An outline moved as a whole, or at one end, so that the IoU with where it was is .2 to .65,
    or as the last of TRIES moved it."""
    axes = own_axes(polygon)
    low, high = ends(polygon, axes)
    long, short = high - low
    other = polygon
    for _ in range(TRIES):
        place = polygon @ axes.T
        along = rng.uniform(-0.7, 0.7) * long
        if rng.random() < 0.5:
            place += along / 2, rng.uniform(-0.7, 0.7) * short
        else:
            share = (place[:, 0] - low[0]) / max(long, 1e-9)  # 0 at one end, 1 at the other
            place[:, 0] += along * (share if rng.random() < 0.5 else 1 - share)
        other = place @ axes
        if 0.2 <= iou(polygon, other) <= 0.65:
            break
    return other


def cut_label(rng, polygon):
    """Two upright pieces of an outline, up to .3 of its height apart."""
    axes = own_axes(polygon)
    (left, top), (right, bottom) = ends(polygon, axes)
    middle = left + rng.uniform(0.25, 0.75) * (right - left)
    half = rng.uniform(0, 0.15) * (bottom - top)
    pieces = []
    for start, stop in ((left, middle - half), (middle + half, right)):
        corners = np.array([[start, top], [stop, top], [stop, bottom], [start, bottom]])
        pieces.append(corners @ axes)
    return pieces


def put_anywhere(rng, polygons, width, height):
    """The outline of one of the labels at a place without any; None if none is found."""
    for _ in range(TRIES):
        outline = polygons[rng.integers(len(polygons))]
        outline = outline - outline.min(0)
        room = (width, height) - outline.max(0)
        outline = outline + rng.random(2) * room.clip(0)
        if (room > 0).all() and not shared_areas([outline], polygons, None).shared.any():
            return outline
    return None


def nearest_label(polygons, n, free):
    """Which of the free labels is nearest to label n, by their boxes; None if it is not NEAR."""
    boxes = np.array([[*polygon.min(0), *polygon.max(0)] for polygon in polygons])
    low = np.maximum(boxes[:, :2], boxes[n, :2])
    high = np.minimum(boxes[:, 2:], boxes[n, 2:])
    distance = np.hypot(*(low - high).clip(0).T)
    others = [m for m in free if m != n]
    if not others:
        return None
    other = min(others, key=lambda m: distance[m])
    height = (boxes[n, 2:] - boxes[n, :2]).min()
    return other if distance[other] < NEAR * height else None


# ---------------------------------------------------------------- a page


def make_mistakes(rng, polygons, ignore, size, count, kinds):
    """Labels N x [P, 2] with N ignore flags of a page of size (width, height) -> Mistaken, with up
    to `count` mistakes of kinds in turn, each at another label that is not don't care. One that
    finds no place, or no neighbour to join, is not made."""
    free = [n for n, skip in enumerate(ignore) if not skip]
    free = rng.permutation(free).tolist()
    start = rng.integers(len(kinds))
    page = Mistaken()
    changed = set()
    for k in range(count):
        kind = kinds[(start + k) % len(kinds)]
        if not free:
            break

        # a mistake without a label of the page
        if kind == "spurious":
            outline = put_anywhere(rng, polygons + page.polygons, *size)
            if outline is not None:
                page.add(outline, kind)
            continue

        # what the label n becomes: another one, two, or nothing if it is missing
        n = free.pop()
        if kind == "joined":
            other = nearest_label(polygons, n, free)
            if other is None:
                continue
            free.remove(other)
            changed.add(other)
            page.add(hull(polygons[n], polygons[other]), kind, n)
        elif kind == "moved":
            page.add(move_label(rng, polygons[n]), kind, n)
        elif kind == "split":
            for piece in cut_label(rng, polygons[n]):
                page.add(piece, kind, n)
        elif kind == "ignored":
            page.add(polygons[n], kind, n, ignore=True)
        changed.add(n)

        # text that has no label now
        if kind in ("missing", "moved"):
            page.bare.append((kind, polygons[n]))

    # the other labels as they are
    for n, polygon in enumerate(polygons):
        if n not in changed:
            page.add(polygon, "", n, ignore[n])
    return page
