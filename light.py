"""How does a sheet look in a picture? Light, noise, the ground under it, and the camera. Functions
that take a `seed` accept a generator, too."""

from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np

# ---------------------------------------------------------------- light and noise


def normal_quantiles(count):
    """`count` equally likely values of the standard normal distribution."""
    normal = NormalDist()
    values = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    return np.array(values)


NORMAL = normal_quantiles(256)  # random bytes become noise by one table look-up


def add_noise(image, seed, sigma):
    """uint8 image of any shape plus normal noise of standard deviation `sigma`."""
    rng = np.random.default_rng(seed)
    random_bytes = rng.bytes(image.size)
    levels = np.frombuffer(random_bytes, np.uint8)
    levels = levels.reshape(image.shape)

    noise = np.round(NORMAL * sigma)
    table = np.int8(noise.clip(-127, 127))
    return cv2.add(image, cv2.LUT(levels, table), dtype=cv2.CV_8U)


def smooth_field(seed, height, width, cells=4):
    """Random smooth field [height, width] float32 within 0..1."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((cells, cells), np.float32)
    field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return field.clip(0, 1)


def multiply(image, factor):
    """uint8 [H, W, 3] times factor [H, W], rounded."""
    factor = factor.astype(np.float32, copy=False)
    factors = cv2.merge([factor, factor, factor])
    return cv2.multiply(image, factors, dtype=cv2.CV_8U)


def shade(image, seed, depth):
    """Darken one side of a random straight line with a soft edge by up to `depth` (0..1)."""
    rng = np.random.default_rng(seed)
    least = 0, -0.3, 0.02
    most = 2 * np.pi, 0.3, 0.3
    angle, offset, softness = rng.uniform(least, most)

    # signed distance from the line, in units of the soft edge
    height, width = image.shape[:2]
    y = np.arange(height, dtype=np.float32)
    x = np.arange(width, dtype=np.float32)
    across = (x / width - 0.5) * np.cos(angle)
    down = (y / height - 0.5) * np.sin(angle)
    side = across + down[:, None] - offset
    side /= softness

    darkness = (side.clip(-1, 1, out=side) + 1) / 2
    return multiply(image, 1 - depth * darkness)


# ---------------------------------------------------------------- grounds


def draw_desk(rng, h, w):
    """Wood or cloth under the sheet, uint8 [h, w, 3]."""
    grey = rng.uniform(30, 190)
    warmth = rng.uniform(-0.2, 0.2)
    colour = grey * (1 + warmth * np.array([1, 0, -1]))

    # fibres or threads, as long and as wide as it happens
    step_y, step_x = rng.choice([3, 20, 200], 2)
    cells = h // step_y + 2, w // step_x + 2
    grain = rng.standard_normal(cells, np.float32)
    light = 1 + 0.07 * cv2.resize(grain, (w, h))

    plain = np.full((h, w, 3), np.uint8(colour))
    return multiply(plain, light)


def draw_lid(rng, h, w):
    """A scanner's lid, white or dark, uint8 [h, w, 3]."""
    grey = rng.uniform(225, 255) if rng.random() < 0.75 else rng.uniform(5, 60)
    return np.full((h, w, 3), int(grey), np.uint8)


# ---------------------------------------------------------------- cameras


class Camera(NamedTuple):
    """What photographs or scans do to a page at difficulty 1. turn: standard deviation in degrees.
    tilt: how far corners move, in heights of the sheet. fill: least and greatest share of the page
    that the sheet fills. light: range of brightness. blur: largest sigma, in text sizes. grey:
    share of pictures without colour."""

    turn: float
    tilt: float
    fill: tuple
    light: float
    blur: float
    grey: float


PHOTO = Camera(
    turn=5,
    tilt=0.035,
    fill=(0.9, 0.98),
    light=0.4,
    blur=0.075,
    grey=0.1,
)
SCAN = Camera(
    turn=0.8,
    tilt=0.003,
    fill=(0.98, 1.005),
    light=0.07,
    blur=0.04,
    grey=0.95,
)


def photograph(rng, page, size, camera, level):
    """A picture [H, W, 3] uint8 of the page [H, W, 3] uint8, whose text size is `size` pixels."""
    # uneven light, and a shadow over most photographs
    light = 1 + (smooth_field(rng, *page.shape[:2], 2) - 0.5) * camera.light * level
    page = multiply(page, light)
    depth = rng.uniform(0.15, 0.5) * level
    if camera is PHOTO and rng.random() < 0.6:
        page = shade(page, rng, depth)

    # blur, which follows the text size, and noise
    sigma = rng.uniform(0, camera.blur) * size * (0.3 + 0.7 * level)
    page = cv2.GaussianBlur(page, (0, 0), max(0.3, sigma))
    page = add_noise(page, rng, rng.uniform(1, 14) * level)

    # tone: scans may lose their blacks, and both kinds of picture their whites
    low = 0
    if camera is SCAN:
        low = max(0, rng.uniform(-1, 1.2) * level)
    high = rng.uniform(0.82, 1.15)
    gamma = rng.uniform(0.85, 1.2)
    shades = np.linspace(0, 1, 256)
    tone = np.clip((shades - low) / (high - low), 0, 1) ** gamma
    page = cv2.LUT(page, np.uint8(tone * 255))

    # a JPEG, in colour or grey
    grey = rng.random() < camera.grey
    page = cv2.cvtColor(page, cv2.COLOR_RGB2GRAY if grey else cv2.COLOR_RGB2BGR)
    quality = int(rng.uniform(95 - 55 * level, 96))
    _, jpeg = cv2.imencode(".jpg", page, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB)
