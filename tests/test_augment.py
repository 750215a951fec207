"""Photographs: labels follow the ink under every kind of geometry, kinds of colour work alone, and
what is off changes nothing."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

import augment
from hparams import Hparams

HP = Hparams(size=384, batch=2)
SHAPE = (384, 352)  # canvas (h, w)
GEOMETRY = {
    "aug_rotate": 30.0,
    "aug_scale": 0.6,
    "aug_shift": 0.2,
    "aug_perspective": 0.3,
    "aug_mirror": 0.5,
    "aug_turn": 0.5,
    "aug_bend": 0.03,
}
PHOTOGRAPH = {
    "aug_fade": 0.9,
    "aug_bleed": 0.9,
    "aug_ribbon": 0.9,
    "aug_light": 0.9,
    "aug_glare": 0.9,
    "aug_motion": 8.0,
    "aug_lowres": 3.0,
    "aug_jpeg": 1.0,
}


def inked_page():
    """White page with black bars uint8 [400, 400, 3], and the outlines of the bars."""
    page = np.full((400, 400, 3), 255, np.uint8)
    bars = []
    for top in range(40, 360, 40):
        for left in (40, 220):
            right, bottom = left + 140, top + 20
            page[top:bottom, left:right] = 0
            bars.append(
                np.array([[left, top], [right, top], [right, bottom], [left, bottom]], float)
            )
    return page, bars


def taken(hp, seed, page, bars):
    """Page and bars on a white ground, as the draws of `seed` take them."""
    pose = augment.draw_pose(np.random.default_rng((seed, 1)), hp, SHAPE)
    rng = np.random.default_rng(seed)
    matrix = augment.draw_homography(rng, hp, 400, 400, 384 / 400, pose.centre, pose.quarters)
    white = np.full((*SHAPE, 3), 255, np.uint8)
    return augment.warp_page(page, bars, matrix, SHAPE, bend=pose.bend, ground=white)


def distances(outlines, fine=4):
    """How far the canvas's pixel centres lie inside outlines, and how far outside, px [h, w]
    each."""
    height, width = fine * SHAPE[0], fine * SHAPE[1]
    label = np.zeros((height, width), np.uint8)
    for outline in outlines:
        corners = np.round((outline * fine - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(label, [corners], 1, shift=4)
    both = [cv2.distanceTransform(part, cv2.DIST_L2, 5) / fine for part in (label, 1 - label)]
    return [part[fine // 2 :: fine, fine // 2 :: fine] for part in both]


@pytest.mark.parametrize("kinds", [*GEOMETRY, "all"])
def test_labels_stay_within_a_pixel_of_their_ink(kinds):
    """No ink lies more than a pixel outside its label, no paper more than a pixel inside."""
    off = dict.fromkeys(GEOMETRY, 0.0)
    hp = replace(HP, **off | (GEOMETRY if kinds == "all" else {kinds: GEOMETRY[kinds]}))
    page, bars = inked_page()
    moved = False
    for seed in range(12):
        image, outlines, _ = taken(hp, seed, page, bars)
        ink = image[..., 0] < 128
        inwards, outwards = distances(outlines)
        assert not (ink & (outwards > 1)).any()
        assert not (~ink & (inwards > 1)).any()
        moved |= np.abs(outlines[0][0] - bars[0][0] * 384 / 400).max() > 3
    assert moved


def test_at_the_bounds_of_all_strengths_no_corner_is_behind_the_camera():
    """What crosses the horizon has no outline: its label would lie on other places."""
    hp = replace(HP, aug_strength=4.0, aug_scale=2.0, aug_perspective=0.5, aug_rotate=45.0)
    corners = np.array([(0, 0, 1), (400, 0, 1), (400, 600, 1), (0, 600, 1)])
    for seed in range(200):
        rng = np.random.default_rng(seed)
        matrix = augment.draw_homography(rng, hp, 400, 600, 384 / 600)
        assert (corners @ matrix[2] > 0.1).all()


def test_a_veil_above_the_full_range_is_white():
    veil = np.array([[0, 100, 255, 256, 400]], np.float32)
    image = augment.whiten(np.zeros((1, 5, 3), np.uint8), veil)
    assert image[0, :, 0].tolist() == [0, 100, 255, 255, 255]


def test_a_bend_is_undone_by_its_displacement():
    """apply() gives the points whose displacement leads back: seen + d(seen) = flat."""
    hp = replace(HP, aug_bend=0.1)
    for seed in range(20):
        bend = augment.Bend(np.random.default_rng(seed), hp, SHAPE)
        flat = np.random.default_rng(seed).uniform(0, 384, (200, 2))
        seen = bend.apply(flat)
        np.testing.assert_allclose(seen + bend.displacement(seen), flat, atol=1e-3)


def test_points_are_added_on_the_outline_and_change_nothing_else():
    polygon = np.array([[0.0, 0], [100, 0], [100, 10], [0, 10]])
    denser = augment.add_points(polygon)
    assert len(denser) == 2 * 5 + 2
    assert cv2.contourArea(np.float32(denser)) == 1000
    assert np.hypot(*(np.roll(denser, -1, 0) - denser).T).max() <= augment.EDGE


@pytest.mark.parametrize("kind", PHOTOGRAPH)
def test_each_kind_of_photograph_works_alone_and_on_half_of_the_pages(kind):
    hp = replace(HP, **{key: value * (key == kind) for key, value in PHOTOGRAPH.items()})
    page = augment.draw_ground(np.random.default_rng(0), SHAPE)
    page[50:60, 20:300] = 10  # print
    changed = 0
    for seed in range(40):
        image = augment.augment_photograph(page, np.random.default_rng(seed), hp)
        assert image.shape == page.shape and image.dtype == np.uint8
        changed += (image != page).any()
    assert 10 <= changed <= 30


def test_without_strengths_a_photograph_is_the_page_itself():
    page, _ = inked_page()
    pose = augment.draw_pose(np.random.default_rng(0), HP, SHAPE)
    assert (pose.centre, pose.quarters, pose.bend, pose.ground) == (None, 0, None, None)
    assert augment.augment_photograph(page, np.random.default_rng(0), HP) is page


def test_one_strength_does_not_change_the_draws_of_others():
    page = augment.draw_ground(np.random.default_rng(0), SHAPE)
    both = replace(HP, aug_fade=0.9, aug_glare=0.9)
    for seed in range(20):
        images = [
            augment.augment_photograph(page, np.random.default_rng(seed), hp)
            for hp in (replace(HP, aug_fade=0.9), replace(HP, aug_glare=0.9), both)
        ]
        faded, glared, together = [(image != page).any() for image in images]
        assert together == (faded or glared)


def test_print_that_shines_through_is_paler_than_print_and_only_darkens():
    page, _ = inked_page()
    shining = augment.bleed(page, np.random.default_rng(1), 0.5)
    assert (shining <= page).all()
    white = page[..., 0] == 255
    assert 100 < shining[..., 0][white].min() < 255


def test_a_faded_print_stays_on_its_paper():
    page, _ = inked_page()
    pale = augment.fade(page, np.random.default_rng(1), 0.9)
    ink = page[..., 0] == 0
    assert (pale[~ink] == 255).all() and pale[ink].max() > 60 and pale.max() == 255


def test_a_canvas_of_another_shape_keeps_the_size():
    for fit in ("area", "longer"):
        hp = replace(HP, size=640, fit=fit)
        for seed in range(50):
            width, height = augment.draw_canvas(np.random.default_rng(seed), hp)
            assert width % 32 == height % 32 == 0 and 0.6 < width / height < 1.6
            size = (width * height) ** 0.5 if fit == "area" else max(width, height)
            assert abs(size - 640) <= 40


def test_the_strength_scales_how_many_pages_are_turned_or_on_another_ground():
    hp = replace(HP, aug_turn=0.5, aug_ground=0.5)
    for strength, low, high in ((0, 0, 0), (0.2, 5, 40), (1, 70, 130)):
        some = replace(hp, aug_strength=float(strength))
        poses = [augment.draw_pose(np.random.default_rng(k), some, (64, 64)) for k in range(200)]
        assert low <= sum(pose.quarters > 0 for pose in poses) <= high
        assert low <= sum(pose.ground is not None for pose in poses) <= high
