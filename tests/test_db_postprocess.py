"""Geometry: offsets against closed forms, decoding against drawn shapes, round trips."""

import cv2
import numpy as np
import pytest
import shapely

from data import make_targets, polygon_area, polygon_perimeter
from db_postprocess import (
    MODES,
    SHRINK_RATIO,
    offset_convex,
    offset_polygon,
    polygons_from_map,
    rect_corners,
    shrink_distance,
    unclip_distance,
)

DECODE = {
    "thresh": 0.5,
    "box_thresh": 0.3,
    "unclip_ratio": 0,
    "max_candidates": 1000,
    "min_size": 3,
}


def iou(a, b):
    a, b = shapely.Polygon(a), shapely.Polygon(b)
    return a.intersection(b).area / a.union(b).area


def random_quad(rng, centre, low=12, angle=12):
    width, height = rng.uniform(2 * low, 160), rng.uniform(low, 30)
    return rect_corners(
        np.array([[*centre, width, height, np.deg2rad(rng.uniform(-angle, angle))]])
    )[0]


def test_offset_is_the_exact_one():
    """Against shapely's buffer; outward corners are arcs of a quarter pixel's tolerance."""
    rng = np.random.default_rng(0)
    for n in (3, 4, 7, 12):
        angle = np.sort(np.linspace(0, 2 * np.pi, n, endpoint=False) + rng.uniform(0, 0.9 / n, n))
        polygon = 100 + 60 * np.stack([np.cos(angle), np.sin(angle)], 1)
        for distance in (-9.0, -0.5, 0.5, 13.25):
            (moved,) = offset_polygon(polygon, distance)
            exact = shapely.Polygon(polygon).buffer(distance, quad_segs=64)
            assert iou(moved, exact.exterior.coords) > (0.99 if distance > 0 else 0.9999)
    assert offset_polygon(np.array([(0, 0), (90, 0), (90, 30), (0, 30)]), -15.01) == []


def test_offset_parts_a_waist():
    bell = np.array(
        [
            (0, 0),
            (40, 0),
            (40, 18),
            (60, 18),
            (60, 0),
            (100, 0),
            (100, 40),
            (60, 40),
            (60, 22),
            (40, 22),
            (40, 40),
            (0, 40),
        ]
    )
    assert len(offset_polygon(bell, -4)) == 2


def test_convex_outlines_move_as_half_planes():
    """Against the intersection of half-planes; a sharp corner and both ends of a line are cut."""
    rng, hulls = np.random.default_rng(0), []
    for n in (3, 4, 5, 9, 30):
        hulls.append(cv2.convexHull(rng.uniform(0, 50, (n, 2)).astype(np.float32))[:, 0])
    distance = rng.uniform(0.5, 20, len(hulls))
    for hull, d, moved in zip(hulls, distance, offset_convex(hulls, distance)):
        exact = shapely.box(-99, -99, 200, 200)
        edges = np.stack([hull, np.roll(hull, -1, 0)], 1).astype(float)  # [P, 2, 2]
        units = np.diff(edges, axis=1)[:, 0] / np.hypot(*np.diff(edges, axis=1)[:, 0].T)[:, None]
        sharp = [i for i in range(len(hull)) if units[i - 1] @ units[i] < 0]
        cuts = [(units[i - 1] - units[i]) / np.hypot(*(units[i - 1] - units[i])) for i in sharp]
        normals = [*zip(hull, units @ [[0, -1], [1, 0]]), *zip(hull[sharp], cuts)]
        for at, normal in normals:
            along = np.array([-normal[1], normal[0]])
            edge = at + normal * d
            far = [edge - 999 * along, edge + 999 * along]
            exact &= shapely.Polygon([*far, far[1] - 999 * normal, far[0] - 999 * normal])
        assert len(moved) == len(hull) + len(sharp) and shapely.Polygon(moved).is_valid
        assert iou(moved, exact.exterior.coords) > 1 - 1e-9
    (line,) = offset_convex([np.array([(5, 5), (25, 5)])], np.array([3.0]))
    assert iou(line, shapely.box(2, 2, 28, 8).exterior.coords) > 1 - 1e-9


def test_curved_words_keep_their_outline_and_ragged_ones_do_not():
    prob = np.zeros((200, 400), np.uint8)
    cv2.ellipse(prob, (200, 180), (150, 150), 0, 200, 340, 255, 16)
    prob[20:28, 10:120] = 255
    prob[26:28, 20:110:7] = 0
    (arc, word), _ = polygons_from_map(prob, **DECODE, mode="polygon")
    arc, word = sorted((arc, word), key=len)[::-1]
    assert shapely.Polygon(arc).area < 0.6 * shapely.Polygon(arc).convex_hull.area
    assert len(word) == 4 and shapely.Polygon(arc).contains(shapely.Point(200, 30))


@pytest.mark.parametrize("shrink_ratio", [0.4, 0.6])
def test_unclip_zero_inverts_the_shrink_of_every_rectangle(shrink_ratio):
    rng = np.random.default_rng(1)
    w, h = rng.uniform(5, 900, 200), rng.uniform(5, 90, 200)
    d = shrink_distance(w * h, 2 * (w + h), shrink_ratio)
    inner_w, inner_h = w - 2 * d, h - 2 * d
    back = unclip_distance(inner_w * inner_h, 2 * (inner_w + inner_h), 0, shrink_ratio)
    np.testing.assert_allclose(back, d, rtol=1e-9)
    paper = unclip_distance(inner_w * inner_h, 2 * (inner_w + inner_h), 1.5)
    np.testing.assert_allclose(paper, inner_w * inner_h * 1.5 / (2 * (inner_w + inner_h)))


@pytest.mark.parametrize("mode", MODES)
def test_blob_is_measured_by_the_pixels_it_covers(mode):
    prob = np.zeros((60, 200), np.float32)
    prob[20:26, 30:130] = 0.8  # 100 x 6 pixels
    (polygon,), (score,) = polygons_from_map(prob, **{**DECODE, "unclip_ratio": 1.5}, mode=mode)
    d = 1.5 * 600 / 212
    exact = shapely.box(30 - d, 20 - d, 130 + d, 26 + d)
    assert iou(polygon, exact.exterior.coords) > 1 - 1e-9
    assert score == pytest.approx(0.8)
    for least, count in ((6 + 2 * d - 1e-6, 1), (6 + 2 * d + 1e-6, 0)):  # the size is the grown one
        found = {**DECODE, "unclip_ratio": 1.5, "min_size": least}
        assert len(polygons_from_map(prob, **found, mode=mode)[0]) == count


@pytest.mark.parametrize("mode", MODES)
def test_blobs_of_one_pixel_height_are_kept(mode):
    prob = np.zeros((40, 200), np.uint8)
    prob[20, 10:100] = 255
    (polygon,), scores = polygons_from_map(prob, **DECODE, mode=mode)
    _x, _y, w, h = cv2.boundingRect(polygon.astype(np.float32))
    assert h >= 5 and w >= 92 and scores[0] == 1.0
    assert not polygons_from_map(prob, **{**DECODE, "min_size": 20}, mode=mode)[0]
    prob[:] = 0
    prob[5, 5] = 255
    assert not polygons_from_map(prob, **{**DECODE, "min_size": 0}, mode=mode)[0]  # a single pixel


def test_filters_and_order():
    prob = np.zeros((100, 100), np.float32)
    for i, p in enumerate((0.6, 0.9, 0.7)):
        prob[10 + 30 * i : 20 + 30 * i, 10:90] = p
    decode = {**DECODE, "mode": "box"}
    polygons, scores = polygons_from_map(prob, **decode)
    np.testing.assert_allclose(scores, [0.9, 0.7, 0.6], atol=1e-6)
    assert [round(p.mean(0)[1]) for p in polygons] == [45, 75, 15]
    assert len(polygons_from_map(prob, **{**decode, "box_thresh": 0.65})[0]) == 2
    polygons, scores = polygons_from_map(prob, **{**decode, "max_candidates": 1})
    assert scores.tolist() == pytest.approx([0.9])  # the best by score, not the first contour
    assert polygons_from_map(np.zeros((32, 32), np.float32), **decode)[0] == []
    with pytest.raises(ValueError, match="mode 'quad'"):
        polygons_from_map(prob, **{**decode, "mode": "quad"})


def test_uint8_and_float_maps_agree():
    prob = cv2.GaussianBlur(
        np.random.default_rng(3).integers(0, 256, (200, 200), np.uint8), (0, 0), 3
    )
    prob = cv2.normalize(prob, None, 0, 255, cv2.NORM_MINMAX)
    a = polygons_from_map(prob, **DECODE, mode="polygon")
    b = polygons_from_map(prob.astype(np.float64) / 255, **DECODE, mode="polygon")
    assert len(a[0]) == len(b[0]) > 5
    np.testing.assert_allclose(a[1], b[1], atol=1e-6)


def test_holes_are_not_words_but_islands_in_them_are():
    prob = np.zeros((100, 100), np.uint8)
    prob[5:95, 5:95] = 255
    prob[15:85, 15:85] = 0
    prob[40:60, 40:60] = 255
    assert len(polygons_from_map(prob, **DECODE, mode="box")[0]) == 2


@pytest.mark.parametrize("mode", MODES)
def test_round_trip_through_target_maps(mode):
    """Polygons -> targets -> polygons with the exact inverse: IoU >= 0.85 from 12 px on, none lost
    at 8 px."""
    rng = np.random.default_rng(4)
    quads = [random_quad(rng, (120 + 200 * c, 40 + 62 * r)) for r in range(15) for c in range(4)]
    shrink = make_targets(quads, [False] * len(quads), 960, 960)[0]
    found, _ = polygons_from_map(shrink * 255, **DECODE, mode=mode)
    assert len(found) == len(quads)
    best = [max(iou(q, f) for f in found if abs(q.mean(0) - f.mean(0)).max() < 20) for q in quads]
    assert np.mean(best) >= 0.85, np.mean(best)

    small = [
        random_quad(rng, (120 + 200 * c, 40 + 62 * r), 8, 5) for r in range(15) for c in range(4)
    ]
    small = [
        rect_corners(np.array([[*q.mean(0), rng.uniform(8, 150), 8.0, 0.0]]))[0] for q in small
    ]
    shrink = make_targets(small, [False] * len(small), 960, 960)[0]
    assert len(polygons_from_map(shrink * 255, **DECODE, mode=mode)[0]) == len(small)


def test_box_mode_is_the_exact_offset_of_the_rectangle():
    """The closed form against clipping of the same rectangle."""
    rng = np.random.default_rng(5)
    prob = np.zeros((400, 400), np.uint8)
    quad = random_quad(rng, (200, 200), 20, 40)
    cv2.fillPoly(prob, [np.round(quad).astype(np.int32)], 255)
    decode = {**DECODE, "mode": "box"}
    (inner,), _ = polygons_from_map(prob, **{**decode, "unclip_ratio": 1e-9})
    (outer,), _ = polygons_from_map(prob, **{**decode, "unclip_ratio": 2.0})
    d = 2.0 * polygon_area(inner) / polygon_perimeter(inner)
    (exact,) = offset_polygon(inner, d)
    assert iou(outer, shapely.Polygon(exact).minimum_rotated_rectangle.exterior.coords) > 0.99


def test_boxes_run_clockwise_from_the_top_left_whatever_their_turn():
    for degrees in range(-44, 45, 4):
        rect = np.array([[200, 200, 120, 30, np.deg2rad(degrees)]])
        for turned in (rect, rect[:, [0, 1, 3, 2, 4]]):  # lying and standing
            prob = np.zeros((400, 400), np.uint8)
            cv2.fillPoly(prob, [np.round(rect_corners(turned)[0]).astype(np.int32)], 255)
            (box,), _ = polygons_from_map(prob, **DECODE, mode="box")
            (x, y), (_, down) = box[1] - box[0], box[2] - box[1]
            assert abs(y) < x and down > 0


def test_shrink_ratio_is_the_papers():
    assert SHRINK_RATIO == 0.4
    assert shrink_distance(100 * 20, 240) == pytest.approx(2000 * (1 - 0.16) / 240)
