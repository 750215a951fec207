"""What does a camera do to a page? One homography and one bend move its pixels and its labels; paper,
light and lens change its colours. Every kind has its own strength in Hparams.

The draws of a kind are always made, and the kinds of photographs draw from a generator of their own:
one strength does not change what the others do."""

from typing import NamedTuple

import cv2
import numpy as np
import shapely

from synth import add_noise, draw_desk, multiply, shade, smooth_field

PAD_COLOUR = (124, 116, 104)  # ImageNet's mean: padding is close to 0 after normalisation
GRID = 8  # px between the points where a bend is computed; between them it is linear
EDGE = 24  # px; longer edges of a label get points in between, so that they can bend

# ---------------------------------------------------------------- geometry


def draw_homography(rng, hp, width, height, fit, centre=None, quarters=0):
    """One 3 x 3 map from page pixels to canvas pixels of a page scaled by `fit`: resize, then rotate,
    scale, shift (by a share of the page's own sides), perspective and mirror by uniform draws within
    hp's strengths. centre: [2] canvas px where the page's middle lies before the shift; by default
    the page is at the top left, as in data.resize_page. quarters: of a turn, clockwise."""
    strength = hp.aug_strength
    angle, zoom, shift_x, shift_y, tilt_x, tilt_y = rng.uniform(-strength, strength, 6)
    mirrored = rng.random() < hp.aug_mirror * strength

    # about the page's middle: scale and mirror, then turn
    zoom = fit * (1 + hp.aug_scale) ** zoom
    wide = -zoom if mirrored else zoom
    middle = np.array([width, height]) / 2
    to_origin = np.array(
        [
            [wide, 0, -wide * middle[0]],
            [0, zoom, -zoom * middle[1]],
            [0, 0, 1],
        ]
    )
    turn = np.deg2rad(angle * hp.aug_rotate + 90 * quarters)
    cos, sin = np.cos(turn), np.sin(turn)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

    # depth changes across the page, which then goes to its place
    tilt = np.eye(3)
    tilt[2, :2] = np.array([tilt_x, tilt_y]) * hp.aug_perspective / (fit * max(width, height))
    place = np.eye(3)
    shift = np.array([shift_x, shift_y]) * hp.aug_shift * 2 * middle * fit
    place[:2, 2] = (middle * fit if centre is None else centre) + shift
    return place @ tilt @ rotation @ to_origin


class Bend:
    """A smooth displacement of canvas pixels, as of paper that does not lie flat: a wave along x and
    one along y. Its slope stays under 1/4, so that each point has one source."""

    def __init__(self, rng, hp, shape):
        """shape: canvas (h, w)."""
        height, width = shape
        length = rng.uniform(0.4, 1.5, 2) * max(height, width)  # of a wave, in px
        self.frequency = 2 * np.pi / length
        self.phase = rng.uniform(0, 2 * np.pi, 2)
        most = np.minimum(hp.aug_bend * hp.aug_strength * max(height, width), 0.25 / self.frequency)
        self.amplitude = rng.uniform(-1, 1, 2) * most  # in px

    def displacement(self, points):
        """Canvas points [..., 2] -> [..., 2] how far from there the flat page's pixel lies."""
        return self.amplitude * np.sin(self.frequency * points[..., ::-1] + self.phase)

    def apply(self, points):
        """Points [P, 2] on the flat canvas -> where they are seen on the bent one [P, 2]."""
        seen = points
        for _ in range(12):  # a contraction: the error falls to a quarter each time
            seen = points - self.displacement(seen)
        return seen


class View(NamedTuple):
    """How a photograph's page is taken; see `draw_homography` and `warp_page`."""

    centre: np.ndarray | None
    quarters: int
    bend: Bend | None
    ground: np.ndarray | None


def draw_view(rng, hp, shape):
    """The View of a page on a canvas (h, w): turned by quarters, on another ground, bent, by draws
    within hp's strengths; the page as it lies where they are 0."""
    turned, grounded = rng.random(2) < (hp.aug_turn, hp.aug_ground)
    quarters = int(rng.integers(1, 4)) if turned else 0
    seeds = rng.integers(2**63, size=2)
    bend = Bend(np.random.default_rng(seeds[0]), hp, shape) if hp.aug_bend else None
    ground = draw_ground(np.random.default_rng(seeds[1]), shape) if grounded else None
    photograph = hp.aug_turn or hp.aug_ground
    centre = np.array(shape[::-1]) / 2 if photograph else None
    return View(centre, quarters, bend, ground)


def draw_canvas(rng, hp):
    """(w, h), multiples of 32, of a canvas whose shape is not the page's: up to 3 by 2 or 2 by 3."""
    aspect = np.exp(rng.uniform(-0.4, 0.4))
    sides = hp.size * np.array([aspect, 1 / aspect]) ** 0.5
    if hp.fit == "longer":
        sides *= hp.size / sides.max()
    return tuple(int(32 * max(1, round(side / 32))) for side in sides)


def add_points(polygon):
    """Polygon [P, 2] with points between those that are more than EDGE px apart."""
    edges = np.roll(polygon, -1, 0) - polygon
    counts = np.ceil(np.hypot(*edges.T) / EDGE).astype(int).clip(1, 64)
    parts = [
        start + edge * (np.arange(count) / count)[:, None]
        for start, edge, count in zip(polygon, edges, counts)
    ]
    return np.concatenate(parts)


def warp_page(image, polygons, matrix, shape, page_size=None, bend=None, ground=None):
    """Page and polygons through a homography, and a Bend, onto a canvas of `shape` (h, w); words stay
    whole. image: uint8 [H, W, 3], shrunk or not -> uint8 [h, w, 3]; page_size: its (width, height)
    before; ground: uint8 [h, w, 3] to lie on, or None for PAD_COLOUR.
    Returns it, the mapped polygons and for each whether less than half is still on the canvas."""
    shrunk = np.divide(page_size or image.shape[1::-1], image.shape[1::-1])
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts from pixel centres
    place = np.linalg.inv(half) @ (matrix @ np.diag([*shrunk, 1])) @ half

    options = {"flags": cv2.INTER_LINEAR, "borderValue": PAD_COLOUR}
    if ground is not None:
        options = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_TRANSPARENT, "dst": ground}
    if bend is None:
        image = cv2.warpPerspective(image, place, shape[::-1], **options)
    else:
        options["interpolation"] = options.pop("flags")
        image = cv2.remap(image, *bent_sources(bend, place, shape), **options)

    polygons = [cv2.perspectiveTransform(p[None], matrix)[0] for p in polygons]
    if bend is not None:
        polygons = [bend.apply(add_points(p)) for p in polygons]
    return image, polygons, cut_off(polygons, shape)


def bent_sources(bend, place, shape):
    """Where in the picture the pixels of a bent canvas lie: x and y, float32 [h, w] each. place: the
    homography from the picture's to the canvas's pixels, both counted from pixel centres."""
    height, width = shape
    rows, columns = -(-height // GRID) + 2, -(-width // GRID) + 2
    # the resize below puts grid point k at pixel GRID k + (GRID - 1) / 2, from pixel centres
    y, x = (GRID * np.arange(n) + (GRID - 1) / 2 for n in (rows, columns))
    grid = np.stack(np.meshgrid(x - GRID, y - GRID), -1)  # one cell of margin
    flat = grid + bend.displacement(grid + 0.5)
    source = cv2.perspectiveTransform(flat.reshape(1, -1, 2), np.linalg.inv(place))
    source = np.float32(source.reshape(rows, columns, 2))
    source = cv2.resize(source, (columns * GRID, rows * GRID), interpolation=cv2.INTER_LINEAR)
    return cv2.split(source[GRID : GRID + height, GRID : GRID + width])


def cut_off(polygons, shape):
    """For each polygon whether less than half of it lies on the canvas (h, w)."""
    cut = np.zeros(len(polygons), bool)
    canvas = shapely.box(0, 0, *shape[::-1])
    for i, polygon in enumerate(polygons):
        if polygon.min() < 0 or (polygon.max(0) > shape[::-1]).any():
            hull = shapely.convex_hull(shapely.polygons(polygon))
            cut[i] = hull.intersection(canvas).area < hull.area / 2
    return cut


def draw_ground(rng, shape):
    """What a page may lie on, uint8 [h, w, 3]: wood, cloth or a desk, crossed by edges of things."""
    height, width = shape
    ground = draw_desk(rng, height, width)
    for _ in range(rng.integers(4)):
        corners = rng.uniform(-0.5, 1.5, (4, 2)) * (width, height)
        thing = cv2.convexHull(corners.astype(np.int32))
        cv2.fillConvexPoly(ground, thing, rng.integers(256, size=3).tolist(), cv2.LINE_AA)
    return cv2.GaussianBlur(ground, (0, 0), rng.uniform(0.5, 3))


# ---------------------------------------------------------------- colours of any page


def augment_colours(image, rng, hp):
    """Light and camera: each kind with its own strength hp.aug_* times hp.aug_strength, half of the
    pages each. image: uint8 [H, W, 3] -> uint8 [H, W, 3]."""
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
        image = whiten(image, veil)
    if on[5] and hp.aug_blur:
        image = cv2.GaussianBlur(image, (0, 0), 1e-3 + abs(amount[5]) * hp.aug_blur)
    if on[6] and hp.aug_sharpen:
        gain = abs(amount[6]) * hp.aug_sharpen
        image = cv2.addWeighted(image, 1 + gain, cv2.GaussianBlur(image, (0, 0), 1.0), -gain, 0)
    if on[7] and hp.aug_noise:
        image = add_noise(image, seed, 255 * abs(amount[7]) * hp.aug_noise)
    return image


def whiten(image, veil):
    """Lay a white veil [H, W], 0 to 255, over an image uint8 [H, W, 3], in steps of 1/255."""
    veil = cv2.merge([veil.astype(np.uint8)] * 3)
    return cv2.add(cv2.multiply(image, 255 - veil, scale=1 / 255), veil)


# ---------------------------------------------------------------- photographs


def augment_photograph(image, rng, hp):
    """Paper, light and lens of photographs: each kind with its own strength hp.aug_* times
    hp.aug_strength, half of the pages each. image: uint8 [H, W, 3] -> uint8 [H, W, 3]."""
    kinds = (
        (fade, hp.aug_fade),
        (bleed, hp.aug_bleed),
        (lay_ribbon, hp.aug_ribbon),
        (light_unevenly, hp.aug_light),
        (glare, hp.aug_glare),
        (blur_motion, hp.aug_motion),
        (lose_resolution, hp.aug_lowres),
        (compress, hp.aug_jpeg),
    )
    on = rng.random(len(kinds)) < 0.5
    amounts = rng.random(len(kinds)) * hp.aug_strength
    seeds = rng.integers(2**63, size=len(kinds))
    for (change, strength), chosen, amount, seed in zip(kinds, on, amounts, seeds):
        if chosen and strength and amount:
            image = change(image, np.random.default_rng(seed), amount * strength)
    return image


def paper_of(image):
    """The image without its print, uint8 [H, W, 3]: the brightest of each neighbourhood, smooth."""
    small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(cv2.dilate(small, np.ones((5, 5), np.uint8)), (0, 0), 3)
    paper = cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return cv2.max(paper, image)


def fade(image, rng, amount):
    """Thermal print that fades, unevenly, by up to a share `amount` of its contrast."""
    share = min(amount, 0.9) * smooth_field(rng, *image.shape[:2], int(rng.integers(2, 6)))
    ink = cv2.subtract(paper_of(image), image)
    return cv2.add(image, multiply(ink, share))


def bleed(image, rng, amount):
    """Print of the back that shines through: the page's own print, mirrored, blurred and paler by a
    factor `amount`. It has no labels."""
    ink = cv2.subtract(paper_of(image), image)
    ink = cv2.flip(ink, int(rng.integers(2)))  # about the horizontal or the vertical axis
    ink = np.roll(ink, rng.integers(image.shape[0]), 0)
    ink = cv2.GaussianBlur(ink, (0, 0), rng.uniform(0.5, 2))
    share = min(amount, 1.0) * smooth_field(rng, *image.shape[:2], 3)
    return cv2.subtract(image, multiply(ink, share))


def lay_ribbon(image, rng, amount):
    """A coloured band across the page, as at the end of a roll; `amount`: depth of its colour."""
    height, width = image.shape[:2]
    angle = rng.choice([0, np.pi / 2]) + rng.normal(0, 0.1)
    y, x = (np.arange(n, dtype=np.float32) / n for n in (height, width))
    across = x * np.float32(np.cos(angle)) + (y * np.float32(np.sin(angle)))[:, None]
    middle, reach = rng.uniform(0, 1), rng.uniform(0.02, 0.12)
    band = (1.5 - abs(across - middle) / reach).clip(0, 1)  # soft edges
    colour = rng.permutation([1.0, rng.uniform(0.2, 0.8), rng.uniform(0, 0.8)])
    absorbed = min(amount, 0.9) * (1 - colour)
    light = [1 - band * np.float32(a) for a in absorbed]
    return cv2.multiply(image, cv2.merge(light), dtype=cv2.CV_8U)


def light_unevenly(image, rng, amount):
    """Coloured light that changes over the page, and a shadow with a round outline, as of a hand."""
    size = image.shape[:2]
    field = smooth_field(rng, *size, int(rng.integers(2, 4))) - np.float32(0.5)
    gain = amount * rng.uniform(0.4, 1.2, 3)  # of the channels
    light = cv2.merge([1 + field * np.float32(g) for g in gain])
    image = cv2.multiply(image, light, dtype=cv2.CV_8U)
    hand = (smooth_field(rng, *size, 3) - np.float32(0.6)) * rng.uniform(6, 30)
    return multiply(image, 1 - min(0.6 * amount, 0.8) * hand.clip(0, 1))


def glare(image, rng, amount):
    """A white spot, as of a lamp; `amount`: how much of the print it covers in its middle."""
    height, width = image.shape[:2]
    y, x = (np.arange(n, dtype=np.float32) / n - rng.random() for n in (height, width))
    spread = rng.uniform(0.05, 0.3, 2)
    spot = np.exp(-((x / spread[0]) ** 2) - (y / spread[1])[:, None] ** 2)
    return whiten(image, 255 * min(amount, 0.9) * spot)


def blur_motion(image, rng, amount):
    """The camera moved: a straight blur of up to `amount` px."""
    length = max(2, round(amount))
    kernel = np.zeros((2 * length + 1, 2 * length + 1), np.float32)
    turn = rng.uniform(0, np.pi)
    reach = np.round(length / 2 * np.array([np.cos(turn), np.sin(turn)])).astype(int)
    start, end = length - reach, length + reach
    cv2.line(kernel, start.tolist(), end.tolist(), 1.0)
    return cv2.filter2D(image, -1, kernel / kernel.sum())


def lose_resolution(image, rng, amount):
    """Down by a factor of up to 1 + `amount`, and up again."""
    factor = 1 / (1 + amount)
    method = cv2.INTER_AREA if rng.random() < 0.5 else cv2.INTER_LINEAR
    small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=method)
    return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def compress(image, rng, amount):
    """JPEG; `amount` 1 is quality 10."""
    quality = round(max(95 - 85 * amount, 5))
    code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(code, cv2.IMREAD_COLOR)


# ---------------------------------------------------------------- stress

STRESS = {  # kind: its levels, the page as it is among them
    "turned": (0, 5, 10, 20, 30, 45, 90, 180),  # degrees, clockwise, on other ground
    "scaled": (0.35, 0.5, 0.7, 1, 1.4, 2),  # of the picture's sides; below 1 on other ground
    "blurred": (0, 1, 2, 3, 4),  # px of a picture of 1,000 x 1,000 px, standard deviation
    "darkened": (1, 0.5, 0.25, 0.12),  # of its light
    "jpeg": (100, 50, 20, 10),  # quality
    "noisy": (0, 10, 25, 50),  # standard deviation, of 255
}


def stress(image, polygons, kind, level, seed=0):
    """A page as a camera of STRESS sees it. image: uint8 [H, W, 3], polygons: N [P, 2] -> image
    uint8 [h, w, 3], polygons, and for each whether less than half of it is still to be seen."""
    if kind in ("turned", "scaled"):
        return turn_or_scale(image, polygons, kind, level, np.random.default_rng(seed))
    if kind == "blurred" and level:
        sigma = level * np.sqrt(image.shape[0] * image.shape[1]) / 1000
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    elif kind == "darkened":
        image = cv2.convertScaleAbs(image, alpha=level)
    elif kind == "jpeg" and level < 100:
        code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, level])[1]
        image = cv2.imdecode(code, cv2.IMREAD_COLOR)
    elif kind == "noisy" and level:
        image = add_noise(image, seed, level)
    return image, polygons, np.zeros(len(polygons), bool)


def turn_or_scale(image, polygons, kind, level, rng):
    """See `stress`: turned, on a canvas that holds the page, or scaled, on one of the page's size."""
    height, width = image.shape[:2]
    turn = np.deg2rad(level) if kind == "turned" else 0
    zoom = level if kind == "scaled" else 1
    cos, sin = np.cos(turn), np.sin(turn)
    canvas = np.array([width, height])
    if kind == "turned":
        canvas = abs(cos) * canvas + abs(sin) * canvas[::-1]
    canvas = np.round(canvas).astype(int)

    matrix = np.eye(3)
    matrix[:2, :2] = zoom * np.array([[cos, -sin], [sin, cos]])
    matrix[:2, 2] = canvas / 2 - matrix[:2, :2] @ (width / 2, height / 2)
    ground = draw_ground(rng, canvas[::-1])
    return warp_page(image, polygons, matrix, tuple(canvas[::-1].tolist()), ground=ground)
