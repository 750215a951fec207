"""What does a camera do to a page? One homography for its pixels and its labels, then light, blur
and noise, by draws within the strengths of Hparams."""

import cv2
import numpy as np
import shapely

from synth import add_noise, shade, smooth_field

PAD_COLOUR = (124, 116, 104)  # ImageNet's mean: padding is close to 0 after normalisation


def draw_homography(rng, hp, width, height, fit):
    """One 3 x 3 map from page pixels to a page scaled by `fit`: resize, then rotate, scale,
    shift (by a share of the page's own sides), perspective and mirror by uniform draws within hp's
    strengths. All zero: the page at the top left, as in `resize_page`."""
    strength = hp.aug_strength
    angle, zoom, shift_x, shift_y, tilt_x, tilt_y = rng.uniform(-strength, strength, 6)
    zoom = fit * (1 + hp.aug_scale) ** zoom
    wide = -zoom if rng.random() < hp.aug_mirror * strength else zoom
    cos, sin = np.cos(np.deg2rad(angle * hp.aug_rotate)), np.sin(np.deg2rad(angle * hp.aug_rotate))
    centre = np.array([width, height]) / 2
    shift = np.array([shift_x, shift_y]) * hp.aug_shift * 2 * centre * fit
    to_origin = np.array([[wide, 0, -wide * centre[0]], [0, zoom, -zoom * centre[1]], [0, 0, 1]])
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    tilt, back = np.eye(3), np.eye(3)
    tilt[2, :2] = np.array([tilt_x, tilt_y]) * hp.aug_perspective / (fit * max(width, height))
    back[:2, 2] = centre * fit + shift
    return back @ tilt @ turn @ to_origin


def warp_page(image, polygons, matrix, shape, page_size=None):
    """Page and polygons through a homography onto a canvas of `shape` (h, w); words stay whole.
    image: uint8 [H, W, 3], shrunk or not -> uint8 [h, w, 3]; page_size: its (width, height) before.
    Returns it, the mapped polygons and for each whether less than half is still on the canvas."""
    shrunk = np.divide(page_size or image.shape[1::-1], image.shape[1::-1])
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts from pixel centres
    place = np.linalg.inv(half) @ (matrix @ np.diag([*shrunk, 1])) @ half
    image = cv2.warpPerspective(image, place, shape[::-1], borderValue=PAD_COLOUR)
    polygons = [cv2.perspectiveTransform(p[None], matrix)[0] for p in polygons]
    cut = np.zeros(len(polygons), bool)
    for i, polygon in enumerate(polygons):
        if polygon.min() < 0 or (polygon.max(0) > shape[::-1]).any():
            hull = shapely.convex_hull(shapely.polygons(polygon))
            cut[i] = hull.intersection(shapely.box(0, 0, *shape[::-1])).area < hull.area / 2
    return image, polygons, cut


def augment_colours(image, rng, hp):
    """Light and camera: each kind with its own strength hp.aug_* times hp.aug_strength, half of the
    pages each. image: uint8 [H, W, 3] -> uint8 [H, W, 3]. The draws are always made, so that one
    strength does not change what the others do."""
    on = rng.random(8) < 0.5
    amount = rng.uniform(-1, 1, 8) * hp.aug_strength
    tint = rng.uniform(-1, 1, 3) * hp.aug_color * hp.aug_strength
    seed = int(rng.integers(2**63))
    level = np.arange(-128, 128)[:, None] * (1 + on[0] * amount[0] * hp.aug_contrast) + 128
    level = level + 255 * (on[1] * amount[1] * hp.aug_brightness + on[2] * tint)
    image = cv2.LUT(image, level.clip(0, 255).astype(np.uint8)[:, None])
    if on[3] and hp.aug_shadow:
        image = shade(image, seed, abs(amount[3]) * hp.aug_shadow)
    if on[4] and hp.aug_fog:
        veil = 255 * abs(amount[4]) * hp.aug_fog * smooth_field(seed, *image.shape[:2])
        veil = cv2.merge([veil.astype(np.uint8)] * 3)  # white, in steps of 1/255
        image = cv2.add(cv2.multiply(image, 255 - veil, scale=1 / 255), veil)
    if on[5] and hp.aug_blur:
        image = cv2.GaussianBlur(image, (0, 0), 1e-3 + abs(amount[5]) * hp.aug_blur)
    if on[6] and hp.aug_sharpen:
        gain = abs(amount[6]) * hp.aug_sharpen
        image = cv2.addWeighted(image, 1 + gain, cv2.GaussianBlur(image, (0, 0), 1.0), -gain, 0)
    if on[7] and hp.aug_noise:
        image = add_noise(image, seed, 255 * abs(amount[7]) * hp.aug_noise)
    return image
