"""Geometry: offsets against closed forms, decoding against drawn shapes, round trips."""

import itertools
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
import turned
from conftest import write_predictions

import db_postprocess as db
import tune
from cleval import from_top_left
from db_postprocess import MODES, offset_polygon, polygon_area, polygons_from_map, rect_corners
from hparams import Hparams
from labels import Page
from predictions import read_predictions
from targets import make_targets


def decode(prob, mode="box", **changes):
    how = {"thresh": 0.5, "box_thresh": 0.3, "unclip_ratio": 0, "max_candidates": 1000}
    return polygons_from_map(prob, **{**how, "min_size": 3, "mode": mode, **changes})


def iou(a, b):
    a, b = shapely.Polygon(a), shapely.Polygon(b)
    return a.intersection(b).area / a.union(b).area


def random_quad(rng, centre, low=12, angle=12):
    sides, degrees = rng.uniform([2 * low, low], [160, 30]), rng.uniform(-angle, angle)
    return quad_at(centre, sides, degrees)


def quad_at(centre, sides, degrees=0.0):
    return rect_corners(np.array([[*centre, *sides, np.deg2rad(degrees)]]))[0]


def drawn(polygon, height=400, width=400):
    return cv2.fillPoly(np.zeros((height, width), np.uint8), [np.round(polygon).astype(int)], 255)


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
    half = np.array([(0, 0), (40, 0), (40, 18), (60, 18), (60, 0), (100, 0)])
    bell = [*half, *(half[::-1] * (1, -1) + (0, 40))]
    assert len(offset_polygon(bell, -4)) == 2


def test_convex_outlines_move_as_half_planes():
    """Against the intersection of half-planes; a sharp corner and both ends of a line are cut."""
    rng, hulls = np.random.default_rng(0), []
    for n in (3, 4, 5, 9, 30):
        hulls.append(cv2.convexHull(rng.uniform(0, 50, (n, 2)).astype(np.float32))[:, 0])
    distance = rng.uniform(0.5, 20, len(hulls))
    for hull, d, moved in zip(hulls, distance, db.offset_convex(hulls, distance)):
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
    (line,) = db.offset_convex([np.array([(5, 5), (25, 5)])], np.array([3.0]))
    assert iou(line, shapely.box(2, 2, 28, 8).exterior.coords) > 1 - 1e-9


def test_curved_words_keep_their_outline_and_ragged_ones_do_not():
    prob = np.zeros((200, 400), np.uint8)
    cv2.ellipse(prob, (200, 180), (150, 150), 0, 200, 340, 255, 16)
    prob[20:28, 10:120] = 255
    prob[26:28, 20:110:7] = 0
    word, arc = sorted(decode(prob, "polygon")[0], key=len)
    assert shapely.Polygon(arc).area < 0.6 * shapely.Polygon(arc).convex_hull.area
    assert len(word) == 4 and shapely.Polygon(arc).contains(shapely.Point(200, 30))


@pytest.mark.parametrize("shrink_ratio", [0.4, 0.6])
def test_unclip_zero_inverts_the_shrink_of_every_rectangle(shrink_ratio):
    rng = np.random.default_rng(1)
    w, h = rng.uniform(5, 900, 200), rng.uniform(5, 90, 200)
    d = db.shrink_distance(w * h, 2 * (w + h), shrink_ratio)
    area, perimeter = (w - 2 * d) * (h - 2 * d), 2 * (w + h - 4 * d)
    np.testing.assert_allclose(db.unclip_distance(area, perimeter, 0, shrink_ratio), d, rtol=1e-9)
    paper = db.unclip_distance(area, perimeter, 1.5)
    np.testing.assert_allclose(paper, area * 1.5 / perimeter)
    assert db.shrink_distance(100 * 20, 240) == pytest.approx(2000 * (1 - 0.4**2) / 240)


@pytest.mark.parametrize("mode", MODES)
def test_blob_is_measured_by_the_pixels_it_covers(mode):
    prob = np.zeros((60, 200), np.float32)
    prob[20:26, 30:130] = 0.8  # 100 x 6 pixels
    (polygon,), (score,) = decode(prob, mode, unclip_ratio=1.5)
    d = 1.5 * 600 / 212
    exact = shapely.box(30 - d, 20 - d, 130 + d, 26 + d)
    assert iou(polygon, exact.exterior.coords) > 1 - 1e-9
    assert score == pytest.approx(0.8)
    for least, count in ((6 + 2 * d - 1e-6, 1), (6 + 2 * d + 1e-6, 0)):  # the size is the grown one
        assert len(decode(prob, mode, unclip_ratio=1.5, min_size=least)[0]) == count


@pytest.mark.parametrize("mode", MODES)
def test_blobs_of_one_pixel_height_are_kept(mode):
    prob = np.zeros((40, 200), np.uint8)
    prob[20, 10:100] = 255
    (polygon,), scores = decode(prob, mode)
    _x, _y, w, h = cv2.boundingRect(polygon.astype(np.float32))
    assert h >= 5 and w >= 92 and scores[0] == 1.0
    assert not decode(prob, mode, min_size=20)[0]
    prob[:] = 0
    prob[5, 5] = 255
    assert not decode(prob, mode, min_size=0)[0]  # a single pixel


def test_filters_and_order():
    prob = np.zeros((100, 100), np.float32)
    for i, p in enumerate((0.6, 0.9, 0.7)):
        prob[10 + 30 * i : 20 + 30 * i, 10:90] = p
    polygons, scores = decode(prob)
    np.testing.assert_allclose(scores, [0.9, 0.7, 0.6], atol=1e-6)
    assert [round(p.mean(0)[1]) for p in polygons] == [45, 75, 15]
    assert len(decode(prob, box_thresh=0.65)[0]) == 2
    assert decode(prob, max_candidates=1)[1] == pytest.approx([0.9])  # best score, not first found
    assert decode(np.zeros((32, 32), np.float32))[0] == []
    with pytest.raises(ValueError, match="mode 'quad'"):
        decode(prob, "quad")


def test_uint8_and_float_maps_agree():
    noise = np.random.default_rng(3).integers(0, 256, (200, 200), np.uint8)
    prob = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    found, scores = decode(prob, "polygon")
    other, same = decode(prob.astype(np.float64) / 255, "polygon")
    assert len(found) == len(other) > 5
    np.testing.assert_allclose(scores, same, atol=1e-6)


def test_holes_are_not_words_but_islands_in_them_are():
    prob = np.zeros((100, 100), np.uint8)
    prob[5:95, 5:95] = 255
    prob[15:85, 15:85] = 0
    prob[40:60, 40:60] = 255
    assert len(decode(prob)[0]) == 2


@pytest.mark.parametrize("mode", MODES)
def test_round_trip_through_target_maps(mode):
    """With the exact inverse of the shrink: IoU >= 0.85 from 12 px on, none lost at 8 px."""
    rng = np.random.default_rng(4)
    centres = [(120 + 200 * column, 40 + 62 * row) for row in range(15) for column in range(4)]
    quads = [random_quad(rng, centre) for centre in centres]
    small = [quad_at(centre, (rng.uniform(8, 150), 8.0)) for centre in centres]
    for words in (small, quads):
        shrink = make_targets(words, [False] * len(words), 960, 960)[0]
        found, _ = decode(shrink * 255, mode)
        assert len(found) == len(words)
    best = [max(iou(q, f) for f in found if abs(q.mean(0) - f.mean(0)).max() < 20) for q in quads]
    assert np.mean(best) >= 0.85, np.mean(best)


def test_box_mode_is_the_exact_offset_of_the_rectangle():
    prob = drawn(random_quad(np.random.default_rng(5), (200, 200), 20, 40))
    (inner,), _ = decode(prob, unclip_ratio=1e-9)
    (outer,), _ = decode(prob, unclip_ratio=2.0)
    d = 2.0 * polygon_area(inner) / cv2.arcLength(np.float32(inner), True)
    (exact,) = offset_polygon(inner, d)
    assert iou(outer, shapely.Polygon(exact).minimum_rotated_rectangle.exterior.coords) > 0.99


def test_boxes_run_clockwise_from_the_top_left_whatever_their_turn():
    for degrees in range(-44, 45, 4):
        for sides in ((120, 30), (30, 120)):  # lying and standing
            (box,), _ = decode(drawn(quad_at((200, 200), sides, degrees)))
            (x, y), (_, down) = box[1] - box[0], box[2] - box[1]
            assert abs(y) < x and down > 0


@pytest.mark.parametrize("degrees", turned.ANGLES)
def test_boxes_of_turned_words_fit_as_well_as_polygons(degrees):
    box, area = turned.fit_of_words("box", degrees, 100)
    polygon, _ = turned.fit_of_words("polygon", degrees, 100)
    assert box >= 0.99 * polygon and abs(area - 1) <= 0.015, (box, polygon, area)
    assert polygon > 0.925


def test_boxes_of_upright_words_are_their_pixels():
    """A pixel more than from centre to centre, to the last bit, however OpenCV rounds."""
    rng = np.random.default_rng(8)
    for _ in range(200):
        x, y, *sides = rng.integers(1, [150, 50, 3000, 120], dtype=int)
        prob = np.zeros((200, 3200), np.uint8)
        prob[y : y + sides[1], x : x + sides[0]] = 255
        contours, _ = cv2.findContours(prob, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        (rect,) = db.find_candidates(prob, 0.5).rects
        _, centre_to_centre, _ = cv2.minAreaRect(contours[0])
        assert sorted(rect[2:4]) == sorted(np.array(centre_to_centre) + 1)
        exact = [x + sides[0] / 2, y + sides[1] / 2, *sides, 0]
        np.testing.assert_allclose(rect, exact, atol=1e-3)


def test_a_rectangle_has_the_area_of_its_pixels_and_loses_a_quarter_at_most():
    line, arc = np.zeros((2, 200, 400), np.uint8)
    cv2.line(line, (20, 30), (380, 50), 255, 5)
    cv2.ellipse(arc, (200, 180), (150, 150), 0, 200, 340, 255, 16)
    (rect,) = db.find_candidates(line, 0.5).rects
    assert rect[2:4].prod() == pytest.approx(np.count_nonzero(line), rel=1e-3)
    rows, columns = np.nonzero(arc)
    (rect,) = db.find_candidates(arc, 0.5).rects
    height, width = np.ptp(rows), np.ptp(columns)
    assert rect[2:] == pytest.approx((width - height / 4, height - height / 4, 0))


def test_sizes_are_numbers_of_pixels_whatever_the_shape():
    """Against contours filled one by one, holes with them, on noise and drawings."""
    rng, count = np.random.default_rng(9), 0
    for prob in itertools.chain(*(strange_maps(rng) for _ in range(20))):
        contours, _ = cv2.findContours(
            np.uint8(prob > 102), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
        )
        filled = []
        for contour in contours:
            mask = np.zeros(prob.shape, np.uint8)
            cv2.drawContours(mask, [contour], 0, 1, cv2.FILLED)
            filled.append(np.count_nonzero(mask))
        pixels = db.find_candidates(prob, 0.4).sizes[0]
        missing = Counter(n for n in filled if n > 1) - Counter(pixels.tolist())
        assert not missing, missing  # find_candidates has islands in holes, too
        count += len(pixels)
    assert count > 500


def test_pages_are_decoded_by_the_values_of_a_run_and_inside_themselves():
    rng, scale, size = np.random.default_rng(6), np.array([0.5, 0.4]), np.array([200.0, 150.0])
    for mode in MODES:
        hp = Hparams(mode=mode, shrink_ratio=0.6, unclip_ratio=0.0)
        values = {key: getattr(hp, key) for key in ("thresh", "unclip_ratio", "shrink_ratio")}
        for prob in (drawn([(0, 20), (99, 20), (99, 40), (0, 40)], 60, 100), rng.random((60, 100))):
            found, scores = db.decode_page(prob, size, hp)
            raw, raw_scores = decode(prob, mode, **values)
            assert len(found) == len(raw) > 0 and (scores == raw_scores).all()
            for polygon, points in zip(found, raw):
                assert (polygon == np.clip(points / scale, 0, size)).all()
    assert db.decode_page(prob * 0, size, hp)[0] == []


RULE = [(60, 30, 120), (120, 29, 360), (360, 27, 535)]  # steps of a line: x, y, where it ends


def rule_line():
    """A printed line of 475 x 2 px, turned and bent a little: no hull, simplified to two points."""
    prob = np.zeros((60, 600), np.uint8)
    for x, y, end in RULE:
        prob[y : y + 2, x:end] = 255
    return prob


def test_a_rule_line_keeps_its_outline():
    (convex,) = db.find_candidates(rule_line(), 0.5).convex
    (polygon,), _ = decode(rule_line(), "polygon", unclip_ratio=2.0)
    exact = shapely.union_all([shapely.box(x, y, end, y + 2) for x, y, end in RULE])
    exact = exact.buffer(2.0 * 2 * 475 / (2 * 477))
    assert not convex and iou(polygon, exact.exterior.coords) > 0.9


def test_what_has_no_area_or_too_many_points_becomes_its_rectangle(monkeypatch):
    rectangle = decode(rule_line(), "box")[0]
    for changed, value in (("MAX_POINTS", 3), ("offset_polygon", lambda *_: [])):
        with monkeypatch.context() as patch:
            patch.setattr(db, changed, value)
            assert np.array_equal(decode(rule_line(), "polygon")[0], rectangle)


def random_star(rng, size):
    angle, radius = np.sort(rng.uniform(0, 2 * np.pi, 14)), rng.uniform(3, 60, (14, 1))
    return rng.uniform(0, size) + radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def test_what_would_cross_itself_at_the_edge_is_cut_there():
    """Points moved one by one onto the page's edge change sides; oracle: the intersection."""
    rng, page, cut = np.random.default_rng(0), shapely.box(0, 0, 100, 100), 0
    for _ in range(300):
        star = random_star(rng, (100, 100))
        parts = shapely.get_parts(shapely.make_valid(shapely.Polygon(star)) & page)
        exact = max(parts, key=shapely.area)
        (found,) = db.to_page([star * 3], 3, (100, 100))
        assert shapely.Polygon(found).is_valid and found.min() >= 0 and found.max() <= 100
        if not shapely.Polygon(star.clip(0, 100)).is_valid:
            cut += 1
            assert iou(found, exact.exterior.coords) > 0.999
            x, y = found.T
            assert x @ np.roll(y, -1) > y @ np.roll(x, -1)  # clockwise on the screen
        else:
            assert np.array_equal(found, (star * 3 / 3).clip(0, 100))
    assert 20 < cut < 280


def strange_maps(rng):
    """Maps uint8 [h, w] of sizes from one pixel on: noise, single pixels, one value, lines at all
    angles, rings, arcs, scribbles, stars, combs, rule lines."""
    noise = rng.integers(0, 256, rng.integers(1, 120, 2), np.uint8)
    yield noise
    yield cv2.GaussianBlur(noise, (0, 0), rng.uniform(0.5, 3)) // 2 * 2
    yield np.where(noise > 250, noise, 0).astype(np.uint8)
    yield np.full(rng.integers(1, 9, 2), rng.choice([0, 255]), np.uint8)
    yield noise[:1].copy()
    drawn = np.zeros((5, *rng.integers(20, 200, 2)), np.uint8)
    for _ in range(4):
        a, b, centre, axes = rng.integers(1, 200, (4, 2)).tolist()
        cv2.line(drawn[0], a, b, 255, int(rng.integers(1, 4)))
        cv2.circle(drawn[1], centre, axes[0] // 3, 255, int(rng.integers(1, 4)))
        angle, end = rng.uniform(0, 360, 2)
        cv2.ellipse(drawn[2], centre, axes, angle, 0, end, 255, int(rng.integers(1, 9)))
    points = rng.integers(0, drawn.shape[2], (8, 2))
    cv2.polylines(drawn[3], [points], False, 255, int(rng.integers(1, 6)))
    star = random_star(rng, drawn.shape[:0:-1])
    cv2.fillPoly(drawn[4], [np.round(star).astype(int)], 255)
    yield from drawn
    comb = np.zeros((int(rng.integers(8, 90)), 700), np.uint8)
    comb[: rng.integers(4, 90), 5 : -5 : rng.integers(2, 9)] = comb[3:5, 5:-5] = 255
    yield comb
    yield np.roll(rule_line(), rng.integers(-20, 20, 2), (0, 1))


def test_any_map_is_decoded_and_what_is_written_is_read_back(tmp_path, monkeypatch):
    """At all unclip ratios, in both modes, on pages smaller and larger than the map."""
    rng = np.random.default_rng(7)
    pages, found, cut = [], [], db.cut_polygon
    cuts = []
    monkeypatch.setattr(db, "cut_polygon", lambda *how: cuts.append(cut(*how)) or cuts[-1])
    for n, prob in enumerate(itertools.chain(*(strange_maps(rng) for _ in range(30)))):
        page_size = np.ceil(np.array(prob.shape[::-1]) * rng.choice([0.02, 0.4, 1, 3.7]))
        scale, blobs = np.array(prob.shape[::-1]) / page_size, db.find_candidates(prob, 0.4)
        for ratio, mode in itertools.product((*tune.GRID["unclip_ratio"], 1e-9, 10.0), MODES):
            how = {"box_thresh": 0, "max_candidates": 9999, "min_size": 0}
            decoded = db.decode_candidates(blobs, unclip_ratio=ratio, mode=mode, **how)
            words = db.to_page(decoded[0], scale, page_size), decoded[1]
            assert len(words[0]) == len(blobs.scores)
            found.append(db.first_that_fit(*words))
            pages.append(Page(f"{n}-{ratio}-{mode}", Path(), size=tuple(page_size)))
    write_predictions(tmp_path / "p.json", pages, found)
    again = read_predictions(tmp_path / "p.json")
    assert len(cuts) > 2
    for page, (polygons, scores) in zip(pages, found):
        read, confidences = again[page.name]
        assert len(read) == len(polygons) and (np.array(confidences) == scores.round(6)).all()
        for a, b in zip(map(from_top_left, polygons), read):
            assert np.abs(a - b).max() <= 0.51e-4 and (b >= 0).all() and (b <= page.size).all()


def test_a_page_holds_the_best_words_up_to_the_points_that_a_file_may_have():
    polygons, scores = [np.zeros((500, 2))] * 41, np.linspace(1, 0, 41)
    kept, best = db.first_that_fit(polygons, scores)
    assert len(kept) == len(best) == db.MAX_PAGE_POINTS // 500 == 40 and (best == scores[:40]).all()
    assert len(db.first_that_fit(polygons[:40], scores[:40])[0]) == 40
