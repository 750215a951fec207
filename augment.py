"""What does a camera do to a page? One homography and one bend move its pixels and its labels;
paper, light and lens change its colours. Every kind of change has its own strength in Hparams.

A shared generator draws even at a strength of 0, and each kind of `augment_photograph` has its
own: a new strength of one kind does not change the draws of the others."""

import math
from typing import NamedTuple

import cv2
import numpy as np
import shapely

from light import add_noise, draw_desk, multiply, shade, smooth_field

PAD_COLOUR = (124, 116, 104)  # ImageNet's mean: padding is close to 0 after normalisation
GRID = 8  # px between the points of a bend; it is interpolated between them
EDGE = 24  # px; longer edges of a label get points in between, so that they can bend

# ---------------------------------------------------------------- geometry


def draw_homography(rng, hp, width, height, fit, centre=None, quarters=0):
    """Draw a 3 x 3 homography from page px to canvas px. It scales the page by `fit`, then mirrors,
    zooms, rotates, tilts and shifts it by uniform draws within hp's strengths. The shift is a
    share of the page's sides.

    centre: canvas xy [2] of the page's middle before the shift; by default the page is at the top
    left, as in data.resize_page. quarters: number of clockwise quarter turns."""
    strength = hp.aug_strength
    angle, zoom, shift_x, shift_y, tilt_x, tilt_y = rng.uniform(-strength, strength, 6)
    mirrored = rng.random() < hp.aug_mirror * strength

    # move the page's middle to the origin, mirror and scale
    middle = np.array([width, height]) / 2
    zoom = fit * (1 + hp.aug_scale) ** zoom
    wide = -zoom if mirrored else zoom
    scale = np.diag([wide, zoom, 1])
    to_origin = scale @ move(-middle)

    # rotate about the origin
    turn = rotation(angle * hp.aug_rotate + 90 * quarters)

    # perspective
    tilt = np.eye(3)
    depth = np.array([tilt_x, tilt_y]) * hp.aug_perspective
    limit = 0.8 * fit / zoom  # with 1 for 0.8, a corner of the page could lie behind the camera
    tilt[2, :2] = depth.clip(-limit, limit) / (fit * max(width, height))

    # move the page to its place
    if centre is None:
        centre = middle * fit
    shift = np.array([shift_x, shift_y]) * hp.aug_shift * 2 * middle * fit
    to_place = move(centre + shift)
    return to_place @ tilt @ turn @ to_origin


def move(by):
    """3 x 3 matrix that translates by `by` [2]."""
    matrix = np.eye(3)
    matrix[:2, 2] = by
    return matrix


def rotation(degrees):
    """3 x 3 matrix that rotates about the origin, clockwise on the screen."""
    turn = np.deg2rad(degrees)
    cos, sin = np.cos(turn), np.sin(turn)
    return np.array(
        [
            (cos, -sin, 0),
            (sin, cos, 0),
            (0, 0, 1),
        ]
    )


class Bend:
    """A smooth displacement of canvas pixels, like paper that is not flat: x shifts by a sine wave
    of y, and y by one of x. The slope is at most 1/4, so the map is one-to-one."""

    def __init__(self, rng, hp, shape):
        """shape: canvas (h, w)."""
        longer = max(shape)
        length = rng.uniform(0.4, 1.5, 2) * longer  # of a wave, px
        self.frequency = 2 * np.pi / length
        self.phase = rng.uniform(0, 2 * np.pi, 2)

        strongest = hp.aug_bend * hp.aug_strength * longer
        steepest = 0.25 / self.frequency
        most = np.minimum(strongest, steepest)
        self.amplitude = rng.uniform(-1, 1, 2) * most  # in px

    def displacement(self, points):
        """Bent-canvas points [..., 2] -> offsets [..., 2] to the flat canvas."""
        yx = points[..., ::-1]  # the shift of x depends on y, and the shift of y on x
        return self.amplitude * np.sin(self.frequency * yx + self.phase)

    def apply(self, points):
        """Points [P, 2] of the flat canvas -> the same points [P, 2] on the bent canvas."""
        seen = points
        for _ in range(12):  # fixed-point iteration: each step divides the error by at least 4
            seen = points - self.displacement(seen)
        return seen


class Pose(NamedTuple):
    """How a photograph's page lies; see `draw_homography` and `warp_page`."""

    centre: np.ndarray | None
    quarters: int
    bend: Bend | None
    ground: np.ndarray | None


def draw_pose(rng, hp, shape):
    """Draw the Pose of a page on a canvas (h, w): quarter turns, ground and bend, within hp's
    strengths. Strengths of 0 leave the page at the top left. With aug_turn or aug_ground it lies in
    the middle, even at an aug_strength of 0, which neither turns nor bends it."""
    turned = rng.random() < hp.aug_turn * hp.aug_strength
    grounded = rng.random() < hp.aug_ground * hp.aug_strength
    quarters = rng.integers(1, 4) * turned
    bend_rng, ground_rng = rng.spawn(2)

    bend = Bend(bend_rng, hp, shape) if hp.aug_bend else None
    ground = draw_ground(ground_rng, shape) if grounded else None
    centre = np.array(shape[::-1]) / 2 if hp.aug_turn or hp.aug_ground else None
    return Pose(centre, quarters, bend, ground)


def draw_canvas(rng, hp):
    """Draw the size (w, h) of a canvas, in multiples of 32. Its aspect ratio is about 2:3 to
    3:2 and does not depend on the page."""
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    sides = np.array([stretch, 1 / stretch])
    if hp.fit == "longer":
        sides /= sides.max()
    steps = np.round(hp.size * sides / 32).astype(int)
    sides = 32 * steps
    return tuple(sides.tolist())


def add_points(polygon):
    """Polygon [P, 2] with its edges split into parts of at most EDGE px."""
    edges = np.roll(polygon, -1, 0) - polygon
    lengths = np.hypot(*edges.T)
    counts = np.ceil(lengths / EDGE).astype(int).clip(1)
    parts = []
    for start, edge, count in zip(polygon, edges, counts):
        shares = np.arange(count) / count
        parts.append(start + shares[:, None] * edge)
    return np.concatenate(parts)


def warp_page(
    image,
    polygons,
    matrix,
    shape,
    page_size=None,
    bend=None,
    ground=None,
):
    """Warp a page and its polygons by a homography and a Bend onto a canvas of `shape` (h, w). The
    canvas does not clip polygons.

    image: uint8 [H, W, 3], perhaps shrunk; page_size: its (width, height) before it was shrunk;
    ground: background uint8 [h, w, 3], overwritten, or None for PAD_COLOUR. Returns the image
    uint8 [h, w, 3], the polygons and their `cut_off`."""
    picture_size = image.shape[1::-1]
    shrunk = np.divide(page_size or picture_size, picture_size)
    to_page = np.diag([*shrunk, 1])
    to_edges = move([0.5, 0.5])  # OpenCV has 0 in a pixel's centre, we at its edge
    place = np.linalg.inv(to_edges) @ matrix @ to_page @ to_edges

    options = {"borderValue": PAD_COLOUR}
    if ground is not None:
        options = {"borderMode": cv2.BORDER_TRANSPARENT, "dst": ground}
    polygons = [cv2.perspectiveTransform(p[None], matrix)[0] for p in polygons]
    if bend is None:
        image = cv2.warpPerspective(image, place, shape[::-1], **options)
    else:
        x, y = bent_sources(bend, place, shape)
        image = cv2.remap(image, x, y, cv2.INTER_LINEAR, **options)
        polygons = [bend.apply(add_points(p)) for p in polygons]
    return image, polygons, cut_off(polygons, shape)


def bent_sources(bend, place, shape):
    """The picture x and y, float32 [h, w] each, of the pixels of a bent canvas, for cv2.remap.
    place: homography from picture to canvas pixels; pixel centres have integer coordinates."""
    height, width = shape
    rows = math.ceil(height / GRID) + 2  # one cell of margin on each side
    columns = math.ceil(width / GRID) + 2

    # cv2.resize below puts grid point k at pixel GRID * k + (GRID - 1) / 2
    y = GRID * np.arange(-1, rows - 1) + (GRID - 1) / 2
    x = GRID * np.arange(-1, columns - 1) + (GRID - 1) / 2
    points = np.meshgrid(x, y)
    grid = np.stack(points, -1)  # [rows, columns, 2]
    flat = grid + bend.displacement(grid + 0.5)
    flat = flat.reshape(1, -1, 2)
    source = cv2.perspectiveTransform(flat, np.linalg.inv(place))
    source = np.float32(source.reshape(rows, columns, 2))

    source = cv2.resize(source, (columns * GRID, rows * GRID))
    return cv2.split(source[GRID : GRID + height, GRID : GRID + width])


def cut_off(polygons, shape):
    """For each polygon whether less than half of it lies on the canvas (h, w)."""
    cut = np.zeros(len(polygons), bool)
    canvas = shapely.box(0, 0, *shape[::-1])
    for i, polygon in enumerate(polygons):
        leaves = polygon.min() < 0 or (polygon.max(0) > shape[::-1]).any()
        if not leaves:
            continue
        outline = shapely.polygons(polygon)
        hull = shapely.convex_hull(outline)
        visible = hull.intersection(canvas)
        cut[i] = visible.area < hull.area / 2
    return cut


def draw_ground(rng, shape):
    """A random background uint8 [h, w, 3]: wood, cloth or a desk, with up to 3 objects."""
    height, width = shape
    ground = draw_desk(rng, height, width)
    for _ in range(rng.integers(4)):
        corners = rng.uniform(-0.5, 1.5, (4, 2)) * (width, height)
        corners = corners.astype(np.int32)
        thing = cv2.convexHull(corners)
        colour = rng.integers(256, size=3).tolist()
        cv2.fillConvexPoly(ground, thing, colour, cv2.LINE_AA)
    sigma = rng.uniform(0.5, 3)
    return cv2.GaussianBlur(ground, (0, 0), sigma)


# ---------------------------------------------------------------- colours of any page


def augment_colours(image, rng, hp):
    """Light and camera. Each kind changes half of the pages, by up to hp.aug_* times
    hp.aug_strength. image: uint8 [H, W, 3] -> uint8 [H, W, 3]."""
    on = rng.random(8) < 0.5
    amount = rng.uniform(-1, 1, 8) * hp.aug_strength
    tint = rng.uniform(-1, 1, 3) * hp.aug_color * hp.aug_strength
    seed = int(rng.integers(2**63))

    # contrast, brightness and tint in one table
    gain = 1 + on[0] * amount[0] * hp.aug_contrast
    level = np.arange(-128, 128)[:, None] * gain + 128
    brightness = on[1] * amount[1] * hp.aug_brightness
    level = level + 255 * (brightness + on[2] * tint)
    table = level.clip(0, 255).astype(np.uint8)  # [256, 3]
    image = cv2.LUT(image, table[:, None])

    # light on the page
    amount = abs(amount)
    if on[3] and hp.aug_shadow:
        depth = amount[3] * hp.aug_shadow
        image = shade(image, seed, depth)
    if on[4] and hp.aug_fog:
        field = smooth_field(seed, *image.shape[:2])
        depth = amount[4] * hp.aug_fog
        image = whiten(image, 255 * depth * field)

    # blur, sharpening and noise of the camera
    if on[5] and hp.aug_blur:
        sigma = 1e-3 + amount[5] * hp.aug_blur
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    if on[6] and hp.aug_sharpen:
        gain = amount[6] * hp.aug_sharpen
        blurred = cv2.GaussianBlur(image, (0, 0), 1.0)
        image = cv2.addWeighted(image, 1 + gain, blurred, -gain, 0)
    if on[7] and hp.aug_noise:
        sigma = 255 * amount[7] * hp.aug_noise
        image = add_noise(image, seed, sigma)
    return image


def whiten(image, veil):
    """Blend an image uint8 [H, W, 3] with white by an opacity `veil` [H, W]: 0 leaves it as it is,
    255 and more is white."""
    veil = cv2.merge([np.minimum(veil, 255).astype(np.uint8)] * 3)
    under = cv2.multiply(image, 255 - veil, scale=1 / 255)
    return cv2.add(under, veil)


# ---------------------------------------------------------------- photographs


def augment_photograph(image, rng, hp):
    """Paper, light and lens of photographs. Each kind changes half of the pages, by up to
    hp.aug_* times hp.aug_strength. image: uint8 [H, W, 3] -> uint8 [H, W, 3]."""
    kinds = {
        fade: hp.aug_fade,
        bleed: hp.aug_bleed,
        lay_ribbon: hp.aug_ribbon,
        light_unevenly: hp.aug_light,
        glare: hp.aug_glare,
        blur_motion: hp.aug_motion,
        lose_resolution: hp.aug_lowres,
        compress: hp.aug_jpeg,
    }
    on = rng.random(len(kinds)) < 0.5
    amounts = rng.random(len(kinds)) * hp.aug_strength
    generators = rng.spawn(len(kinds))
    for k, (change, strength) in enumerate(kinds.items()):
        amount = amounts[k] * strength
        if on[k] and amount:
            image = change(image, generators[k], amount)
    return image


def ink_of(image):
    """How much darker each pixel is than the paper, uint8 [H, W, 3]. The paper is the brightest of
    each neighbourhood, smooth."""
    small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    bright = cv2.dilate(small, np.ones((5, 5), np.uint8))
    bright = cv2.GaussianBlur(bright, (0, 0), 3)
    paper = cv2.resize(bright, image.shape[1::-1])
    return cv2.subtract(paper, image)  # 0 where the image is brighter


def fade(image, rng, amount):
    """Fade the print unevenly, like thermal print; `amount`: largest loss of contrast."""
    cells = int(rng.integers(2, 6))
    share = min(amount, 0.9) * smooth_field(rng, *image.shape[:2], cells)
    return cv2.add(image, multiply(ink_of(image), share))


def bleed(image, rng, amount):
    """Add print that shows through from the back: the page's own print, mirrored, blurred,
    at most `amount` strong. It has no labels."""
    ink = cv2.flip(ink_of(image), int(rng.integers(2)))
    ink = np.roll(ink, rng.integers(len(ink)), 0)
    sigma = rng.uniform(0.5, 2)
    ink = cv2.GaussianBlur(ink, (0, 0), sigma)
    share = min(amount, 1.0) * smooth_field(rng, *image.shape[:2], 3)
    faint = multiply(ink, share)
    return cv2.subtract(image, faint)


def lay_ribbon(image, rng, amount):
    """Add a coloured stripe down the page, like the end of a till roll; `amount`: its opacity."""
    height, width = image.shape[:2]
    middle = rng.uniform(0, 1)
    reach = rng.uniform(0.02, 0.12)
    x = np.arange(width, dtype=np.float32) / width
    y = np.linspace(-0.1, 0.1, height, dtype=np.float32)[:, None]
    slant = y * np.float32(rng.uniform(-1, 1))
    band = (1.5 - abs(x + slant - middle) / reach).clip(0, 1)  # soft edges
    absorbed = rng.permutation([0, *rng.uniform(0.2, 1, 2)])  # by channel
    absorbed = absorbed * min(amount, 0.9)
    light = [1 - band * np.float32(share) for share in absorbed]
    return multiply_channels(image, light)


def light_unevenly(image, rng, amount):
    """Uneven coloured light, and a shadow with a round outline like that of a hand."""
    size = image.shape[:2]
    cells = int(rng.integers(2, 4))
    field = smooth_field(rng, *size, cells) - 0.5
    gains = amount * rng.uniform(0.4, 1.2, 3)  # of the channels
    light = [1 + field * np.float32(gain) for gain in gains]
    image = multiply_channels(image, light)

    hand = smooth_field(rng, *size, 3) - 0.6
    hand = (hand * rng.uniform(6, 30)).clip(0, 1)
    depth = min(0.6 * amount, 0.8)
    return multiply(image, 1 - depth * hand)


def multiply_channels(image, factors):
    """uint8 [H, W, 3] times 3 factors [H, W]."""
    return cv2.multiply(image, cv2.merge(factors), dtype=cv2.CV_8U)


def glare(image, rng, amount):
    """Add a white spot, like a lamp's reflection; `amount`: opacity in its middle."""
    height, width = image.shape[:2]
    middle = rng.random(2)
    spread = rng.uniform(0.05, 0.3, 2)
    x = (np.linspace(0, 1, width) - middle[0]) / spread[0]
    y = (np.linspace(0, 1, height) - middle[1]) / spread[1]
    spot = np.exp(-(x**2) - y[:, None] ** 2)
    opacity = min(amount, 0.9)
    return whiten(image, 255 * opacity * spot)


def blur_motion(image, rng, amount):
    """Motion blur along a straight line of `amount` px."""
    length = max(2, round(amount))
    side = 2 * length + 1
    start = length // 2
    line = np.zeros((side, side), np.float32)
    line[length, start : start + length + 1] = 1

    angle = rng.uniform(0, 180)
    turn = cv2.getRotationMatrix2D((length, length), angle, 1)
    kernel = cv2.warpAffine(line, turn, line.shape)
    return cv2.filter2D(image, -1, kernel / kernel.sum())


def lose_resolution(image, rng, amount):
    """Downscale by a factor of 1 + `amount`, then upscale."""
    factor = 1 / (1 + amount)
    small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, image.shape[1::-1])


def compress(image, rng, amount):
    """JPEG: `amount` 0 is quality 95, `amount` 1 is quality 10."""
    quality = round(95 - 85 * amount)
    return as_jpeg(image, max(quality, 5))


def as_jpeg(image, quality):
    code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(code, cv2.IMREAD_COLOR)


# ---------------------------------------------------------------- stress

STRESS = {  # kind: its levels; one of them leaves the page unchanged
    "turned": (0, 5, 10, 20, 30, 45, 90, 180),  # degrees, clockwise, over a ground
    # factor of the sides; below 1, a ground surrounds the page
    "scaled": (0.35, 0.5, 0.7, 1, 1.4, 2),
    "blurred": (0, 1, 2, 3),  # standard deviation, px of a picture of 1,000 x 1,000 px
    "darkened": (1, 0.5, 0.25),  # share of the light that is left
    "jpeg": (100, 50, 20, 10),  # quality
    "noisy": (0, 10, 25, 50),  # standard deviation; white is 255
}


def stress(image, polygons, kind, level, seed=0):
    """Distort a page by one kind and level of STRESS. image: uint8 [H, W, 3], polygons: N [P, 2]
    -> image uint8 [h, w, 3], polygons, bool [N] (less than half of the polygon is visible)."""
    if kind == "turned":
        return lay_down(image, polygons, rotation(level), seed)
    if kind == "scaled":
        return lay_down(image, polygons, np.diag([level, level, 1.0]), seed)
    if kind == "blurred" and level:
        height, width = image.shape[:2]
        sigma = level * math.sqrt(height * width) / 1000
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    elif kind == "darkened":
        image = cv2.convertScaleAbs(image, alpha=level)
    elif kind == "jpeg" and level < 100:
        image = as_jpeg(image, level)
    elif kind == "noisy":
        image = add_noise(image, seed, level)
    return image, polygons, np.zeros(len(polygons), bool)


def lay_down(image, polygons, change, seed):
    """Warp a page by a 3 x 3 matrix about its middle, onto a ground that fits the rotated page.
    Returns what `stress` returns."""
    sides = np.array(image.shape[1::-1])
    zoom = np.linalg.norm(change[0, :2])
    turn = change[:2, :2] / zoom
    canvas = np.round(abs(turn) @ sides).astype(int)  # width, height

    matrix = move(canvas / 2) @ change @ move(-sides / 2)
    shape = tuple(canvas[::-1].tolist())
    rng = np.random.default_rng(seed)
    ground = draw_ground(rng, shape)
    return warp_page(image, polygons, matrix, shape, ground=ground)
