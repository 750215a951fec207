"""What is a sample? A picture and its labelled words, checked, brought to the size of training and
augmented, and the target maps the network learns; and which pages are trained on.

python data.py check DATA [--pictures OUT]    what DATA holds and what will go wrong
python data.py diff OLD NEW                   labels added, removed and moved, by page
python data.py synth OUT --pages 64 --seed 0  draw synthetic receipts with exact labels
python data.py split DATA --folds 5           stratified, grouped folds as one JSON with a hash
python data.py convert DATA OUT --to paddle   labels from one format to another

DATA is a folder (train.json, val.json, test.json, or these in jsons/, and images/; or ICDAR's
gt_*.txt, PaddleOCR's Label.txt, labelme's *.json, COCO's as CVAT, Label Studio and Roboflow name
them) or one label file with its pictures beside it."""

import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np
import shapely
from PIL import Image, ImageOps, JpegImagePlugin

import labels
from augment import (
    PAD_COLOUR,
    augment_colours,
    augment_photograph,
    draw_canvas,
    draw_homography,
    draw_pose,
    warp_page,
)
from cleval import iou_matches, line_neighbours, shared_areas
from db_postprocess import SHRINK_RATIO, polygon_area, shrink_distance
from files import (
    DataError,
    Parser,
    UsageError,
    exit_code,
    guard,
    read_bytes,
    read_json,
    replace_file,
    shown,
    write_json,
)
from hparams import FITS, Hparams, resolve_hparams
from report import progress
from synth import synthetic_page

NEAR_DUPLICATE = 0.97  # correlation of thumbnails; copies: 1.00, receipts of one shop: up to 0.96
SAME_TEXTS = 0.95  # shared transcriptions; one receipt: 0.97 and more, of one shop: up to 0.92
NO_GROUPS = "each page is a group: if one shop has several, name it, or intervals are too narrow"
LOOKED_AT = 500  # labels of a page whose habits check looks at
ALIKE = 8  # batches drawn together and sorted by the shape of their pages

# limits of what is read from files, so that a hostile one ends in an error and not in swap
MAX_PICTURE_BYTES = 2**28
MAX_JPEG_HEADER = 2**24
MAX_PIXELS = 2**27
FORMATS = ("PNG", "BMP", "WEBP", "TIFF")  # and JPEG
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
FICLONE = 0x40049409  # ioctl: share the blocks of another file (btrfs, XFS)
REDUCED = {1: 0, 2: 16, 4: 32, 8: 64}  # bits of cv2.IMREAD_REDUCED_COLOR_2, _4, _8

# errors and limits are ours
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None


# ---------------------------------------------------------------- pictures


class Header(NamedTuple):
    kind: str  # the format's name in Pillow
    width: int
    height: int
    end: int  # position in the file
    transparent: bool


def read_header(raw):
    """Header of a picture's bytes. Raises whatever Pillow does on a broken one."""
    if raw.startswith(b"\xff\xd8"):
        # Image.open would go on to the pictures behind the first one
        file = io.BytesIO(raw[:MAX_JPEG_HEADER])
        picture = JpegImagePlugin.JpegImageFile(file)
    else:
        file = io.BytesIO(raw)
        picture = Image.open(file, formats=FORMATS)

    # the fourth channel of a bitmap is often unused; 16-bit grey would be clipped
    may_be = picture.format != "BMP" and picture.mode != "I;16"
    transparent = may_be and picture.has_transparency_data
    return Header(picture.format, *picture.size, file.tell(), transparent)


def read_image(path):
    """uint8 RGB [H, W, 3] of a whole picture. Raises DataError, see `decode_picture`."""
    return read_page(path)[0]


def read_page(path, hps=(), tile=0):
    """(picture uint8 RGB [H, W, 3], (width, height)) of a file, see `decode_picture`."""
    return decode_picture(read_bytes(path, MAX_PICTURE_BYTES), path, hps, tile)


def open_page(page, hps=(), tile=0):
    """The picture of a page, uint8 RGB [H, W, 3], see `decode_picture`; sets page.size (width,
    height) and page.digest. Raises DataError."""
    labels.check_name(page.name, shown(page.name))  # what is predicted has to be read back
    raw = read_bytes(page.path, MAX_PICTURE_BYTES)
    page.digest = bytes_digest(raw)
    image, page.size = decode_picture(raw, page.path, hps, tile)
    return image


def jpeg_reduction(width, height, factor):
    """8, 4, 2 or 1: by how much libjpeg may divide a picture that will be scaled by `factor`."""
    if 1 <= abs(width - height) <= 7:
        return 1  # once divided it may be square, and then a turn by EXIF no longer shows
    for divisor in (8, 4, 2):
        missing = max(-width % divisor, -height % divisor)  # pixels the last row or column lacks
        if factor * max(divisor, 4 * missing) <= 1:  # at most a quarter pixel of the result
            return divisor
    return 1


def decode_picture(raw, path, hps=(), tile=0):
    """(picture uint8 RGB [H, W, 3], (width, height)) of a file's bytes, EXIF orientation applied,
    on white where it is transparent. A JPEG is decoded to 1/2, 1/4 or 1/8 of its sides, rounded up,
    where no fit of hps (or hp.size pixels of each `tile`) needs more; width and height are those of
    the whole picture. Raises DataError that names `path` on a broken or truncated file, or one of
    more than MAX_PIXELS.

    Pillow reads the header and OpenCV, three times as fast, the pixels: OpenCV alone would allocate
    what the header says, and fills a truncated file with grey."""
    broken = DataError(path, "not a picture in JPEG, PNG, BMP, WebP or TIFF, or broken")
    try:
        header = read_header(raw)
    except Exception:  # noqa: BLE001 Pillow raises whatever a broken header leads it to
        raise broken from None

    width, height = header.width, header.height
    if width * height > MAX_PIXELS:
        raise DataError(path, f"{width} x {height} px", f"up to {MAX_PIXELS >> 20} M are read")
    kind = header.kind
    if kind in ENDS and raw.find(ENDS[kind], header.end) < 0:  # phones add a film behind it
        raise DataError(path, "truncated", "fetch it again or leave it out of the labels")

    factors = [max(fit_factor((width, height), hp), tile and hp.size / tile) for hp in hps]
    factor = max(factors, default=1)
    divisor = jpeg_reduction(width, height, factor) if kind == "JPEG" else 1
    try:
        image = decode_on_white(raw) if header.transparent else decode_opaque(raw, divisor)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 so do broken pixels
        raise broken from None
    if image is None:
        raise broken
    turned = (image.shape[1] < image.shape[0]) != (width < height)
    return image, (height, width) if turned else (width, height)


def decode_opaque(raw, divisor):
    flags = cv2.IMREAD_COLOR_RGB | REDUCED[divisor]
    return cv2.imdecode(np.frombuffer(raw, np.uint8), flags)


def decode_on_white(raw):
    """OpenCV would leave the colour, often black, that an editor gave to transparent pixels."""
    picture = Image.open(io.BytesIO(raw), formats=FORMATS)
    picture = ImageOps.exif_transpose(picture).convert("RGBA")
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture)
    return np.array(page)


def bytes_digest(raw):
    """16 hex digits of the SHA-256 of a file's bytes: they name a picture wherever it lies."""
    return hashlib.sha256(raw).hexdigest()[:16]


def picture_digest(path):
    """The digest of a file, see `bytes_digest`. An inspected page has it already: page.digest."""
    stat = os.stat(path)
    return file_digest(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(labels.MAX_PAGES)  # each member of an ensemble asks for the same pages
def file_digest(path, *_):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def map_threads(function, items, desc):
    """[function(item) for item in items] on threads (OpenCV frees the interpreter)."""
    with ThreadPoolExecutor(min(16, cv2.getNumberOfCPUs())) as pool:
        return list(progress(pool.map(function, items), desc, len(items)))


def inspect_pages(pages, desc="reading pages"):
    """Open every picture once, under a bar named `desc`. Sets of each page: size (width, height);
    digest of the picture's bytes; thumbnail [1024] for `near_duplicates`; repaired, the words as
    training takes them. Returns the contrast of each page's labels, see `label_contrast`. Raises
    DataError on the last picture that cannot be read, after a line for each of the others."""

    def inspect(page):
        try:
            image = open_page(page, [Hparams(fit="area")])
        except DataError as error:
            return error
        page.thumbnail = thumbnail(image)
        page.repaired = repair_words(page)
        return label_contrast(page, image)

    results = map_threads(inspect, pages, desc)
    errors = [result for result in results if isinstance(result, DataError)]
    for error in errors[:-1]:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        raise errors[-1]
    return results


def label_contrast(page, image):
    """Standard deviation of grey in the box around each of a page's first LOOKED_AT labels [N]: a
    box without ink has little. image: the page, shrunk or not."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = image.shape[1] / page.size[0]
    windows = [pixel_window(p * scale, 0, *grey.shape) for p in page.polygons[:LOOKED_AT]]
    return np.array([grey[window].std() if grey[window].size else 0 for window in windows])


# ---------------------------------------------------------------- sizes


def fit_factor(page_size, hp):
    """By what a page (width, height) is scaled: its longer side becomes hp.size or, with hp.fit
    "area", its area hp.size squared, so that a long, narrow receipt keeps its print; but its longer
    side becomes at most three times hp.size."""
    longer = max(page_size)
    mean = math.sqrt(math.prod(page_size)) if hp.fit == "area" else longer
    return hp.size / max(mean, longer / 3)


def scaled(page_size, factor):
    """A page (width, height) in whole pixels after scaling."""
    return tuple(max(1, round(side * factor)) for side in page_size)


def resize_page(image, w, h):
    """A page [H, W, 3] uint8 brought to w x h, padded right and below to multiples of 32."""
    method = cv2.INTER_AREA if w < image.shape[1] else cv2.INTER_LINEAR
    image = cv2.resize(image, (w, h), interpolation=method)
    return cv2.copyMakeBorder(image, 0, -h % 32, 0, -w % 32, cv2.BORDER_CONSTANT, value=PAD_COLOUR)


def word_heights(page):
    """Short side of each word's smallest rectangle [N], page pixels."""
    return np.array([min(cv2.minAreaRect(p.astype(np.float32))[1]) for p in page.polygons])


# ---------------------------------------------------------------- targets


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
    edge = b - a
    half = np.hypot(*edge.T) / 2
    ux, uy = (edge / np.maximum(2 * half, 1e-9)[:, None]).T
    slope = edge[:, 0] / np.where(np.abs(edge[:, 1]) < 1e-9, 1, edge[:, 1])
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
    ends = np.cumsum([len(p) for p in polygons])[:-1]
    return np.split(np.array(table, np.float32)[:, :, None], ends, 1)


def distance_to_outline(table, rows, columns):
    """Distance from pixel centres to the outline of a polygon, in px, and which lie inside. table:
    [9, P, 1] of `edge_tables`; rows, columns: slices, as of `pixel_window`. Returns float32 and, by
    the even-odd rule, bool [height, width] of these."""
    y = np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5)
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5)
    count = table.shape[1]
    if count > max(16, 2**24 // (len(y) * len(x))):
        # many edges on a large window would fill the memory
        first, inside_first = distance_to_outline(table[:, : count // 2], rows, columns)
        second, inside_second = distance_to_outline(table[:, count // 2 :], rows, columns)
        return np.minimum(first, second), inside_first ^ inside_second

    edges = Edges(*table)
    along = (x * edges.ux + edges.along_0)[:, None] + (y * edges.uy)[:, :, None]
    across = (x * edges.uy + edges.across_0)[:, None] - (y * edges.ux)[:, :, None]

    # distance^2 = across^2 + overshoot^2, the overshoot being what of |along| is beyond an end
    np.abs(along, out=along)  # [P, height, width]
    along -= edges.half[:, None]
    flat = along.reshape(-1, len(x))
    cv2.max(flat, 0, flat)
    along *= along
    across *= across
    along += across

    # a pixel is inside if a ray from it to the right crosses an odd number of edges
    crosses = (y >= edges.a_y) != (y >= edges.b_y)  # [P, height]
    crossing = np.where(crosses, y * edges.slope + edges.start, np.float32(-np.inf))
    return np.sqrt(along.min(0)), np.logical_xor.reduce(x < crossing[:, :, None], 0)


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
        reach = shrink_distance(polygon_area(polygon), length, shrink_ratio) if length else 0
        rows, columns = pixel_window(polygon, reach, height, width)
        window = maps[:, rows, columns]
        if not window.size or (reach <= 0 and not ignore[i]):
            continue

        distance, inside = distance_to_outline(tables[i], rows, columns)
        if ignore[i]:
            window[[0, 2, 3]] *= ~inside
            continue
        core = inside & (distance >= reach)
        if not core.any():
            core = inside & (distance == distance[inside].max(initial=-1))
        shrink, thresh, _, near = window
        shrink |= core
        near |= inside | (distance < reach)
        cv2.max(thresh, 255 - cv2.convertScaleAbs(distance, alpha=255 / reach), thresh)
    return maps


def pixel_window(polygon, margin, height, width):
    """Slices (rows, columns) of the page's pixels within `margin` of a polygon's bounding box."""
    left, top = polygon.min(0).tolist()
    right, bottom = polygon.max(0).tolist()
    left, right = max(math.floor(left - margin), 0), min(math.ceil(right + margin), width)
    top, bottom = max(math.floor(top - margin), 0), min(math.ceil(bottom + margin), height)
    return slice(top, max(top, bottom)), slice(left, max(left, right))


# ---------------------------------------------------------------- samples


class Repaired(NamedTuple):
    """The N words of a page as training takes them."""

    polygons: list  # N arrays [P, 2], page pixels
    ignore: list  # N bools
    counts: dict  # {kind of repair: how many words}


def repair_words(page):
    """The words of a page (with page.size) made fit for training, a Repaired. The rule, in this
    order: a self-crossing outline becomes its convex hull; a word with an area under 1 px^2 or more
    than half of it outside the page is ignored; a smaller part outside the page is cut off."""
    polygons = [*page.polygons]
    owner = np.repeat(np.arange(len(polygons)), [len(p) for p in polygons])
    points = np.concatenate([*polygons, np.zeros((0, 2))])
    shapes = shapely.polygons(shapely.linearrings(points, indices=owner))
    crossing = ~shapely.is_valid(shapes)
    shapes = np.where(crossing, shapely.convex_hull(shapes), shapes)
    inside = shapely.intersection(shapes, shapely.box(0, 0, *page.size))
    area = shapely.area(shapes)
    left = shapely.area(inside)

    kept = (area >= 1) & (left >= area / 2)
    crossing &= kept
    clipped = kept & (left < area - 1e-6)
    for i in np.flatnonzero(crossing | clipped):
        part = max(shapely.get_parts(inside[i]), key=shapely.area)
        polygons[i] = shapely.get_coordinates(part.exterior)[:-1]

    kinds = {
        "self-crossing": crossing,
        "zero-area": area < 1,
        "outside": (area >= 1) & (left < area / 2),
        "clipped": clipped,
    }
    counts = {kind: int(words.sum()) for kind, words in kinds.items()}
    ignore = [skip or not keep for skip, keep in zip(page.ignore, kept.tolist())]
    return Repaired(polygons, ignore, counts)


class Receipts:
    """Training samples of inspected pages, a dataset for torch's DataLoader: [(epoch, i, H, W)] ->
    (page uint8 [H, W, 3], target maps uint8 [4, H, W]).

    The random draws of sample i in epoch e come from default_rng((seed, e, i)): they are the same
    in any process and in any order. cache: a folder that keeps decoded pages for all processes, as
    many as fit on the disk."""

    def __init__(self, pages, hp, cache=None):
        self.hp, self.cache, self.pages = hp, cache, []
        for page in pages:  # packed: a loader process gets arrays and not a million objects
            polygons, ignore, _ = page.repaired
            ends = np.cumsum([len(polygon) for polygon in polygons], dtype=int)[:-1]
            points = np.concatenate([*polygons, np.zeros((0, 2))])
            self.pages.append((page.path, page.size, points, ends, np.array(ignore, bool)))

    def page(self, i):
        """Page i, uint8 [H, W, 3], shrunk where it will be scaled by less than half: bilinear
        sampling would skip pixels."""
        file = Path(self.cache or "", f"{i}.npy")
        if self.cache and file.exists():
            return np.load(file)

        image, size = read_page(self.pages[i][0], [self.hp])
        factor = fit_factor(size, self.hp)
        if factor < 0.5:
            image = cv2.resize(image, scaled(size, factor), interpolation=cv2.INTER_AREA)
        if self.cache:
            np.save(buffer := io.BytesIO(), image)
            with contextlib.suppress(OSError):  # no room for it
                replace_file(file, buffer.getbuffer())
        return image

    def __getitem__(self, key):
        epoch, i, *shape = key
        hp, rng = self.hp, np.random.default_rng((self.hp.seed, epoch, i))
        _, size, points, ends, ignore = self.pages[i]
        polygons = np.split(points, ends) if len(points) else []
        photo_rng = np.random.default_rng((hp.seed, epoch, i, 1))  # does not move the draws of rng
        pose = draw_pose(photo_rng, hp, tuple(shape))
        matrix = draw_homography(rng, hp, *size, fit_factor(size, hp), pose.centre, pose.quarters)
        image, polygons, cut = warp_page(
            self.page(i), polygons, matrix, tuple(shape), size, pose.bend, pose.ground
        )
        image = augment_colours(image, rng, hp)
        image = augment_photograph(image, photo_rng, hp)
        return image, make_targets(polygons, ignore | cut, *shape, hp.shrink_ratio)


def epoch_batches(pages, hp, epoch, step=32):
    """Batches of (epoch, i, H, W): a permutation of the pages, its start repeated so that the last
    batch is full. Pages of like shape go together, on the smallest canvas [H, W] that holds each at
    hp.size: a receipt fills half of a square, and the rest would be computed for nothing. Only
    ALIKE batches in a row are sorted by shape, so that epochs differ.

    Sides are multiples of 32, or of `step` where this costs less than 5 % of the canvas: on a GPU,
    64 leaves fewer canvases for cuDNN to choose its kernels for."""
    rng = np.random.default_rng((hp.seed, epoch))
    sides = np.array([scaled(page.size, fit_factor(page.size, hp)) for page in pages])  # [N, 2]
    sides = np.ceil(sides / 32).astype(int) * 32
    order = np.resize(rng.permutation(len(pages)), -(-len(pages) // hp.batch) * hp.batch)
    for k in range(0, len(order), ALIKE * hp.batch):
        part = order[k : k + ALIKE * hp.batch]
        part[:] = part[np.lexsort(sides[part].T)]
    batches = rng.permutation(order.reshape(-1, hp.batch))

    canvases = sides[batches].max(1)  # [B, 2]
    for k in np.flatnonzero(rng.random(len(canvases)) < hp.aug_ground):
        canvases[k] = draw_canvas(rng, hp)
    coarse = -(-canvases // step) * step
    cheap = coarse.prod(1) < 1.05 * canvases.prod(1)
    canvases = np.where(cheap[:, None], coarse, canvases).tolist()
    return [[(epoch, i, h, w) for i in batch] for batch, (w, h) in zip(batches.tolist(), canvases)]


# ---------------------------------------------------------------- duplicates, groups and folds


def thumbnail(image):
    """Normalised 32 x 32 high-pass picture of a page as a float32 vector [1024]."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32) - cv2.blur(small, (9, 9)).astype(np.float32)
    return small.ravel() / max(np.linalg.norm(small), 1e-6)


def stack_thumbnails(pages):
    """Thumbnails of inspected pages [N, 1024]."""
    return np.array([page.thumbnail for page in pages])


def near_duplicates(thumbnails, least=NEAR_DUPLICATE):
    """Yields pairs a < b of pages whose thumbnails [N, 1024] correlate above `least`: one picture
    in another size, quality or brightness, but not cropped or turned."""
    for k in range(0, len(thumbnails), 256):  # [256, N] at a time: 100 MB for 100,000 pages
        close = thumbnails[k : k + 256] @ thumbnails[k:].T > least
        yield from (np.argwhere(np.triu(close, 1)) + k).tolist()


def same_texts(pages):
    """Yields pairs a < b of pages that share more than 8 kinds of transcriptions and SAME_TEXTS of
    all that they have: one receipt in two pictures. Their hashes, 1024, find the candidates."""
    texts = [Counter(t for t in page.texts if t not in (None, "", "###")) for page in pages]
    counts = np.zeros((len(pages), 1024), np.float32)
    for words, row in zip(texts, counts):
        if len(words) <= 8:
            continue
        for word, count in words.items():
            row[zlib.crc32(word.encode(errors="replace")) % 1024] += count
    counts /= np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-6)

    for a, b in near_duplicates(counts, 0.9):
        shared = texts[a] & texts[b]
        if len(shared) > 8 and shared.total() > SAME_TEXTS * (texts[a] | texts[b]).total():
            yield a, b


def same_receipts(pages):
    """Pairs a < b of inspected pages that show one receipt, by picture or by text."""
    return itertools.chain(near_duplicates(stack_thumbnails(pages)), same_texts(pages))


def page_groups(pages):
    """Group number of each inspected page [N], one for those that share a `group` or show one
    receipt."""
    group = np.arange(len(pages))
    first = {}
    named = [(first.setdefault(p.group, i), i) for i, p in enumerate(pages) if p.group is not None]
    for a, b in itertools.chain(named, same_receipts(pages)):
        if group[a] != group[b]:
            low, high = sorted(group[[a, b]])
            group[group == high] = low
    return group


def make_folds(pages, groups, folds, seed=0):
    """Fold 1..folds of each page [N]: whole groups, balanced in pages, words and small words.
    Greedy: groups from the largest to the smallest (ties in random order), each into the fold that
    leaves the sums of the three quantities most even. Small words are shorter than the median over
    all pages. Raises DataError when there are fewer groups than folds."""
    names, member = np.unique(groups, return_inverse=True)
    if not 2 <= folds <= len(names):
        raise DataError("folds", f"{folds} of {len(names)} groups", "2 to that many are possible")

    # what each page brings [N, 3], as shares of the whole
    heights = [word_heights(p) / max(p.size) for p in pages]
    median = np.median(np.concatenate(heights)) if any(map(len, heights)) else 0
    load = np.array([(1, len(h), (h < median).sum()) for h in heights], float)
    load /= np.maximum(load.sum(0), 1)

    total = np.stack([np.bincount(member, column) for column in load.T], 1)  # of groups
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-total[order].sum(1), kind="stable")]
    sums = np.zeros((folds, 3))
    fold_of = np.zeros(len(names), int)
    for g in order:
        growth = (sums + total[g]) ** 2 - sums**2
        fold_of[g] = np.argmin(growth.sum(1))
        sums[fold_of[g]] += total[g]
    return fold_of[member] + 1


def split_json(pages, groups, folds, seed=0):
    """The split as a JSON object: {"folds", "seed", "hash", "images": {name: {"fold", "group"}}}.
    The hash is over the sorted (name, fold) pairs: equal hashes mean equal splits."""
    fold_of = make_folds(pages, groups, folds, seed).tolist()
    pairs = sorted((page.name, fold) for page, fold in zip(pages, fold_of))
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
    images = {}
    for page, fold, group in zip(pages, fold_of, groups):
        images[page.name] = {"fold": fold, "group": pages[group].group or pages[group].name}
    return {"folds": folds, "seed": seed, "hash": digest, "images": images}


# ---------------------------------------------------------------- the pages of a run


def run_pages(hp):
    """(train pages, val pages, {set: val split} of the later sets that have one, split or None) of
    a run, all inspected. Train pages are those of all sets in hp.data; val pages those of the
    first: a fold of its train pages where hp.folds is set; else its val split or hp.val_data; else
    a tenth of its train pages by group. Raises DataError."""
    first, *later = set_names(hp.data)
    folder, image_dir = resolve_data(first), hp.image_dir or None
    if later and image_dir:
        raise UsageError("--image-dir", "not with several sets", "give each an images/ folder")
    own = labels.load_labels(folder, "train", image_dir)
    val = []
    if not hp.folds and (hp.val_data or labels.has_split(folder, "val")):
        val = labels.load_labels(hp.val_data or folder, "val", image_dir)

    train, others = own, {}
    for name in later:
        folder = resolve_data(name)
        train = train + labels.load_labels(folder, "train")
        if labels.has_split(folder, "val"):
            others[name] = labels.load_labels(folder, "val")

    pages = sum(others.values(), train + val)
    inspect_pages(pages)
    groups = page_groups(pages)  # over all sets: they may share receipts
    held = np.arange(len(pages)) >= len(train)
    split = None
    if not val:
        split, out = hold_out(own, groups[: len(own)], hp)
        held[: len(own)] = out
        val = [page for page, skip in zip(own, held) if skip]
        train = [page for page, skip in zip(train, held) if not skip]
    warn_of_shared_groups(hp, pages, groups, held)
    return train, val, others, split


def hold_out(pages, groups, hp):
    """(split, which pages are held out) of a set's train pages: fold hp.fold of hp.folds, or about
    a tenth. Raises DataError where all are of one group."""
    folds = hp.folds or min(10, len(set(groups.tolist())))
    if folds < 2:
        data = set_names(hp.data)[0]
        raise DataError(data, "no val split, and one group of pages", "see --val-data")
    if not hp.folds:
        print(f"no val split: holding out one of {folds} parts by group", file=sys.stderr)
    split = split_json(pages, groups, folds)
    fold = hp.fold if hp.folds else 1
    return split, [split["images"][page.name]["fold"] == fold for page in pages]


def warn_of_shared_groups(hp, pages, groups, held):
    trained = set(groups[~held].tolist())
    shared = [p.path for p, g, out in zip(pages, groups, held) if out and g in trained]
    if shared:
        what = f"{len(shared)} val pages (first: {shared[0]}) share a group with train pages"
        remedy = "the score will be optimistic; see data.py check"
        print(f"warning: {hp.data}: {what}; {remedy}", file=sys.stderr)


def pseudo_pages(hp, known):
    """Pages of hp.pseudo_labels, a predictions file: words under hp.min_confidence are don't care.
    Pictures lie beside the file or with the first set of hp.data. Pages that `known`, the run's own
    inspected train and val pages, hold already, by name or near-duplicate, are left out. Raises
    DataError."""
    image_dir = None
    if not (Path(hp.pseudo_labels).parent / "images").is_dir():
        first = resolve_data(set_names(hp.data)[0])
        image_dir = hp.image_dir or (first.parent if first.is_file() else first)
    names = {page.name for page in known}
    pages = labels.read_competition(hp.pseudo_labels, image_dir)
    pages = [page for page in pages if page.name not in names]
    if not pages:
        raise DataError(hp.pseudo_labels, f"every page of it is labelled in {hp.data} already")

    for page in pages:
        doubtful = [confidence < hp.min_confidence for confidence in page.confidences]
        page.ignore = [*map(max, page.ignore, doubtful)]
    inspect_pages(pages, "reading pseudo-labelled pages")
    likeness = stack_thumbnails(pages) @ stack_thumbnails(known).T
    return [page for page, new in zip(pages, likeness.max(1) <= NEAR_DUPLICATE) if new]


# what scripts without --data use, drawn once: full receipts, and small ones that a CPU can learn
SYNTH_SETS = {
    "synth": {"count": 320, "seed": 0, "size": 1280, "words": 117},
    "synth-small": {"count": 160, "seed": 0, "size": 256, "words": 12, "difficulty": 0.3},
}


def set_names(data):
    """The sets of a --data value: one that exists, or with commas between. Raises UsageError."""
    names = [data] if os.path.exists(data) else data.split(",")
    if len({os.path.realpath(name) for name in names if name}) < len(names):
        raise UsageError(f"--data {data}", "a set without a name, or one that comes twice")
    return names


def resolve_data(data):
    """Path of one set; SYNTH_SETS are drawn under data/ on first use. Raises UsageError."""
    if len(set_names(data)) > 1:
        raise UsageError(data, "several sets", "name one; train.py alone takes more")
    if data not in SYNTH_SETS or Path(data).exists():
        return Path(data)
    folder = Path("data", data)
    synth(folder, **SYNTH_SETS[data])
    return folder


def load_splits(data, image_dir=None, categories=()):
    """{split: pages} of every split that DATA names, or of the one that it is under None."""
    splits = [s for s in labels.SPLITS if labels.has_split(data, s)] or [None]
    return {split: labels.load_labels(data, split, image_dir, categories) for split in splits}


def describe(pages):
    """Counts of inspected pages on one line, zeros left out."""
    words = [len(page.polygons) for page in pages]
    counts = Counter(pages=len(pages), words=sum(words))
    counts["words a page (median)"] = np.median(words or [0])
    counts["without text"] = words.count(0)
    for page in pages:
        counts.update(ignored=sum(page.ignore), **page.repaired.counts)
    return ", ".join(f"{n:.9g} {kind}" for kind, n in counts.items() if n)


def describe_print(pages, hp):
    """How high the words of inspected pages become, on one line, and whether that is enough."""
    heights = [word_heights(p) * fit_factor(p.size, hp) for p in pages if p.polygons]
    if not heights:
        return "no words: unlabelled, to be predicted and not scored"
    median = np.median(np.concatenate(heights))
    low = np.mean([np.median(h) < 10 for h in heights])
    line = f"size {hp.size}, fit {hp.fit}: words {median:.1f} px high by the median"
    line += f", on {low:.0%} of pages under 10 px"
    return line + " (too small to read: use a larger --size)" if median < 10 else line


# ---------------------------------------------------------------- check: what will go wrong


def check(data, hp, image_dir=None, pictures=None):
    """Print what DATA holds and what will go wrong; draw samples of its first split into a folder
    `pictures`. Raises DataError as training would."""
    with new_folder(pictures) if pictures else contextlib.nullcontext() as folder:
        splits = {split or "all": pages for split, pages in load_splits(data, image_dir).items()}
        rows = [(split, page) for split, pages in splits.items() for page in pages]
        pages = [page for _, page in rows]
        stated = [page.size for page in pages]
        with libjpeg_lines() as lines:
            contrasts = inspect_pages(pages)

        for split, some in splits.items():
            print(f"{split:5s} {describe(some)}")
            for line in dict.fromkeys(describe_print(some, replace(hp, fit=fit)) for fit in FITS):
                print(f"{split:5s} {line}")
        print(describe_tilt(pages))
        print(describe_habits(pages, contrasts))
        print_findings(
            damaged_pictures(rows if lines else []),
            turned_pages(rows),
            other_sizes(rows, stated),
            shown_twice(rows),
            shared_groups(rows),
        )
        if pictures:
            draw_samples(next(iter(splits.values())), hp, folder)
            print(f"{pictures}: samples as training sees them")
    if not any(page.group for page in pages):
        print(NO_GROUPS)
    print(f"{data}: no errors")


def print_findings(*checks):
    """Print what checks yield, (kind, finding): five of each kind, then how many more there are."""
    counts = Counter()
    for kind, finding in itertools.chain(*checks):
        counts[kind] += 1
        if counts[kind] <= 5:
            print(f"{kind}: {finding}")
    for kind, count in counts.items():
        if count > 5:
            print(f"{kind}: {count - 5} more")


def describe_tilt(pages):
    """How the labels of inspected pages lie, on one line, and the values to train with."""
    pages = [page for page in pages if page.polygons]
    if not pages:
        return "no labels: no preset to name"
    tilts = np.abs([page_tilt(page) for page in pages])
    overlap = np.mean([overlapping_share(page) for page in pages])
    spans = np.median([label_span(page) for page in pages])
    tilted = np.mean(tilts > 2)
    line = f"tilt {np.median(tilts):.1f} degrees by the median, over 2 on {tilted:.0%} of pages; "
    line += f"labels span {spans:.0%} of a picture, {overlap:.0%} overlap another"
    if overlap > 0.04:
        line += " (upright boxes on tilted lines?)"
    if tilted < 0.1 and overlap <= 0.04 and spans >= 0.5:
        return f"{line}: scans, for hparams/best.json or hparams/receipts-lite2.json"
    return f"{line}: photographs, for hparams/photographs.json"


def page_tilt(page):
    """Median angle of the labels' longest edges in degrees, within 45: quarter turns count as 0."""
    edges = [np.roll(polygon, -1, 0) - polygon for polygon in page.polygons]
    longest = np.array([edge[np.hypot(*edge.T).argmax()] for edge in edges])
    angles = np.degrees(np.arctan2(*longest.T[::-1]))
    return np.median((angles + 45) % 90 - 45)


def label_span(page):
    """Share of the picture that the box around all labels covers."""
    points = np.concatenate(page.polygons).clip(0, page.size)
    return np.prod(np.ptp(points, 0) / page.size)


def overlapping_share(page):
    """Share of the labels that have more than 15 % of the smaller one in common with another."""
    polygons = page.polygons[:LOOKED_AT]
    overlaps = shared_areas(polygons, polygons, None)
    smaller = np.minimum.outer(overlaps.gt, overlaps.gt)
    overlap = overlaps.shared > 0.15 * smaller
    np.fill_diagonal(overlap, False)
    return overlap.any(1).mean()


def describe_habits(pages, contrasts):
    """What pages label besides words, by shape, on one line, and what follows from it."""
    counts = Counter()
    for page, contrast in zip(pages, contrasts):
        if page.polygons:
            counts.update(label_habits(page.polygons[:LOOKED_AT], contrast))
    total = counts.pop("labels", 0)
    shares = [f"{n / total:.1%} {kind}" for kind, n in counts.items() if n > 0.002 * total]
    if not shares:
        return "habits: no labels of rules, colons, single letters or blank paper"
    line = f"habits: {', '.join(shares)}; each counts as a label in the score"
    return f"{line}, and weights trained on other habits miss it until they are fine-tuned"


def label_habits(polygons, contrast):
    """{kind: how many} of N labels that hold no word, by their shape and contrast [N]."""
    sides = np.array([cv2.minAreaRect(np.float32(p))[1] for p in polygons])  # [N, 2]
    long, short = sides.max(1), sides.min(1)
    height = np.median(short)
    single = (long < 1.4 * short) & (short > height / 2)
    return {
        "labels": len(polygons),
        "rules": np.count_nonzero((long > 12 * short) & (short < 0.6 * height)),
        "colons or dots": np.count_nonzero((long < 0.8 * height) & (short < height / 2)),
        "letters of spaced titles": count_spaced([polygons[n] for n in np.flatnonzero(single)]),
        "without ink": np.count_nonzero(contrast < np.median(contrast) / 4),
    }


def count_spaced(letters):
    """How many of single characters stand in a row of three or more at equal gaps."""
    if len(letters) < 3:
        return 0
    label, following, gap = line_neighbours(letters)
    next_of = dict(zip(label, zip(following, gap)))
    spaced = set()
    for first, (second, gap) in next_of.items():
        third, next_gap = next_of.get(second, (None, 0))
        if min(gap, next_gap) > max(0.3, 0.7 * max(gap, next_gap)):
            spaced |= {first, second, third}
    return len(spaced)


@contextlib.contextmanager
def libjpeg_lines():
    """A list that gets the lines libjpeg writes to standard error meanwhile, behind Python's back.
    What Python itself writes there is let through."""
    lines = []
    with tempfile.TemporaryFile() as file, os.fdopen(os.dup(2), "w") as stderr:
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(stderr):
                yield lines
        finally:
            os.dup2(stderr.fileno(), 2)
        file.seek(0)
        text = file.read().decode(errors="replace")
        lines += [line for line in text.splitlines() if "JPEG" in line]


def damaged_pictures(rows):
    for split, page in rows:
        with libjpeg_lines() as lines:
            read_page(page.path, [Hparams(fit="area")])
        if lines:
            yield "warning: damaged picture", f"{split} {page.name}: {lines[0]}; fetch it again"


def turned_pages(rows):
    for split, page in rows:
        room = np.array(page.size) + 1
        reach = np.concatenate([*page.polygons, np.zeros((1, 2))]).max(0)
        if (reach > room).any() and (reach <= room[::-1]).all():
            remedy = "its labels fit only once it is turned; check its EXIF rotation"
            yield "warning: turned page", f"{split} {page.name}: {remedy}"


def other_sizes(rows, stated):
    for (split, page), size in zip(rows, stated):
        if size and size != page.size:
            what = f"is {page.size}, the label file says {size}"
            yield "warning: another size", f"{split} {page.name} {what}"


def shown_twice(rows):
    """One finding a page that is like an earlier one of its split, and one across splits."""
    reported = set()
    for a, b in same_receipts([page for _, page in rows]):
        across = rows[a][0] != rows[b][0]
        if (across, b) not in reported:
            reported.add((across, b))
            pair = ", ".join(f"{split} {page.name}" for split, page in (rows[a], rows[b]))
            place = "warning: near-duplicates across splits"
            yield place if across else "near-duplicates within a split", pair


def shared_groups(rows):
    pairs = {(page.group, split) for split, page in rows if page.group is not None}
    counts = Counter(group for group, _ in pairs)
    for group in sorted(group for group, count in counts.items() if count > 1):
        yield "warning: group in more than one split", group


def diff(old, new, image_dir=None):
    """Print how the labels of NEW differ from those of OLD, a line a page, and a total. Pages are
    matched by name and labels by IoU > 0.5; a label is moved if a point is by over 0.1 px."""
    before, after = (
        {page.name: page for pages in load_splits(data, image_dir).values() for page in pages}
        for data in (old, new)
    )
    names = sorted(before.keys() | after.keys())
    total = np.zeros(3, int)
    same = 0
    for name in names:
        if name not in before or name not in after:
            print(f"{name}: only in {old if name in before else new}")
            continue
        changes = page_changes(before[name].polygons, after[name].polygons)
        total += changes
        if any(changes):
            print("{}: {} added, {} removed, {} moved".format(name, *changes))
        else:
            same += 1
    line = "{} of {} pages differ: {} labels added, {} removed, {} moved"
    print(line.format(len(names) - same, len(names), *total))


def page_changes(old, new):
    """How many labels of a page were added, removed and moved."""
    pairs = iou_matches(old, new).pairs
    moved = sum(len(old[i]) != len(new[j]) or np.abs(old[i] - new[j]).max() > 0.1 for i, j in pairs)
    return len(new) - len(pairs), len(old) - len(pairs), moved


def draw_samples(pages, hp, folder):
    """Draw the first samples of the first epoch, augmented and on their canvas. Green: shrunk
    words; red: the threshold map; blue: what no loss looks at."""
    receipts = Receipts(pages, hp)
    for key in list(itertools.chain(*epoch_batches(pages, hp, 0)))[:8]:
        image, (shrink, thresh, mask, near) = receipts[key]
        light = np.stack([thresh // 2 * near, 127 * shrink, 127 * (1 - mask)], 2)
        name = f"{key[1]:05d}-{PurePosixPath(pages[key[1]].name).stem[:50]}.jpg"
        cv2.imwrite(str(folder / name), (image // 2 + light)[..., ::-1])


# ---------------------------------------------------------------- new folders: convert and synth


@contextlib.contextmanager
def new_folder(out):
    """A folder to fill that becomes `out`, whole or not at all. Raises UsageError if `out` is."""
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(out, "exists", "choose another folder or remove it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert(data, out, to, image_dir=None, categories=(), link=False):
    """Write the labels of every split of DATA to folder OUT, in a format of labels.FORMATS, and the
    pictures beside them: copies, or with `link` hard links. Prints what the format could not hold.
    Raises DataError."""
    splits = load_splits(data, image_dir, categories)
    with new_folder(out) as partial:
        for split, pages in splits.items():
            for name, text in labels.FORMATS[to](pages, split, split or Path(out).name):
                if (partial / name).exists():
                    raise DataError(data, f"{name} would hold several pages", "rename pictures")
                replace_file(partial / name, text)
            folder = partial / ("images" if to == "json" else "") / (split or "")
            for page in pages:
                place_picture(page.path, folder / page.name, link)
        again = [page for s in splits for page in labels.load_labels(partial, s or "train")]

    pages = [page for some in splits.values() for page in some]
    lost = ", ".join(f"{count} {kind}" for kind, count in labels.losses(pages, again).items())
    words = sum(len(page.polygons) for page in pages)
    print(f"{out}: {len(pages)} pages, {words} words as {to}; lost: {lost or 'nothing'}")


def place_picture(source, path, link):
    """Copy a picture, where the file system can without using room until one of the two changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if link:
        with contextlib.suppress(OSError):  # not on another file system
            return os.link(source.resolve(), path)
    with open(source, "rb") as old, open(path, "wb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
        except OSError:
            shutil.copyfileobj(old, new)


def synth(out, count, seed, **kind):
    """Draw `count` synthetic receipts into OUT: train.json, val.json (a quarter) and images/. A
    complete OUT of the same arguments is left alone; anything else there is a UsageError."""
    spec = {"pages": count, "seed": seed, **kind}

    def draw(i):
        image, words = synthetic_page((seed, i), **kind)
        page = labels.Page(f"synth_{i:05d}.jpg", None, size=image.shape[1::-1], group=f"{out} {i}")
        code = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (partial / "images" / page.name).write_bytes(code)
        for k, word in enumerate(words, 1):
            page.add(f"{k:04d}", word["points"], word["transcription"])
        return page

    try:
        with new_folder(out) as partial:
            print(f"drawing {count} synthetic receipts into {out}", file=sys.stderr)
            (partial / "images").mkdir()
            pages = map_threads(draw, range(count), "drawing receipts")
            val = max(1, count // 4)
            write_json(partial / "train.json", labels.pages_to_json(pages[val:]))
            write_json(partial / "val.json", labels.pages_to_json(pages[:val]))
            write_json(partial / "synth.json", spec)
    except (OSError, UsageError):
        # something is there: perhaps the same set, which another process drew faster
        made = Path(out, "synth.json")
        if not made.is_file() or read_json(made) != spec:
            raise


# ---------------------------------------------------------------- the command line


def parse_args(argv):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, what):
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(run=run, parser=sub)
        return sub.add_argument

    def data_command(name, run, what):
        add = command(name, run, what)
        add("data", help="folder or label file")
        add("--image-dir", help="where the pictures lie, if not in images/ or beside labels")
        return add

    add = data_command("check", run_check, "what DATA holds and what will go wrong")
    add("--size", help=f"of pages (that of --hparams, or {Hparams().size})")
    add("--hparams", metavar="JSON", help="values of the training that is planned")
    add("--pictures", metavar="OUT", help="folder to make; samples as training sees them")

    add = command("diff", run_diff, "labels added, removed and moved, by page")
    add("old", help="folder or label file")
    add("new", help="another with pages of the same names")
    add("--image-dir", help="where the pictures of both lie")

    add = command("synth", run_synth, "draw synthetic receipts, a quarter of them val")
    add("out", help="folder to make")
    add("--pages", type=int, default=64, help="how many (%(default)s)")
    add("--seed", type=int, default=0, help="another seed, other pages (%(default)s)")
    add("--size", type=int, default=1280, help="longer page side (%(default)s)")
    add("--words", type=int, default=117, help="words a page, about (%(default)s)")
    add("--unit", choices=("word", "line"), default="word", help="what is labelled (%(default)s)")

    add = data_command("split", run_split, "stratified folds; groups and near-duplicates together")
    add("--folds", type=int, default=5, help="how many (%(default)s)")
    add("--seed", type=int, default=0, help="breaks ties (%(default)s)")
    add("--split", choices=labels.SPLITS, default="train", help="which split of DATA (%(default)s)")
    add("--out", help="JSON to write (runs/split-DATA-FOLDS.json)")

    add = data_command("convert", run_convert, "labels in another format; says what it cannot hold")
    add("out", help="folder to make; the pictures are copied into it")
    add("--to", choices=tuple(labels.FORMATS), default="json", help="format to write (%(default)s)")
    add("--categories", default="", help="COCO: those that are words, as text,word (default: all)")
    add("--link", action="store_true", help="hard links: no room, but a tool may turn the original")

    args, unknown = parser.parse_known_args(argv)
    if unknown:  # the nearest flag is one of this command, not of another
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for flag, least in (("pages", 2), ("size", 32), ("words", 1), ("seed", 0)):
        value = vars(args).get(flag)
        if isinstance(value, int) and value < least:
            raise UsageError(f"--{flag} {value}", f"at least {least} is needed")
    return args


def run_check(args):
    check(resolve_data(args.data), resolve_hparams(args), args.image_dir, args.pictures)


def run_diff(args):
    diff(args.old, args.new, args.image_dir)


def run_synth(args):
    synth(args.out, args.pages, args.seed, size=args.size, words=args.words, unit=args.unit)
    print(f"{args.out}: {args.pages} synthetic receipts")


def run_convert(args):
    categories = args.categories.split(",") if args.categories else ()
    convert(resolve_data(args.data), args.out, args.to, args.image_dir, categories, args.link)


def run_split(args):
    pages = labels.load_labels(resolve_data(args.data), args.split, args.image_dir)
    guard([args.out], [file for page in pages for file in (page.path, page.source)])
    inspect_pages(pages)
    split = split_json(pages, page_groups(pages), args.folds, args.seed)
    out = args.out or Path("runs", f"split-{Path(args.data).stem}-{args.folds}.json")
    write_json(out, split, indent=1)
    sizes = np.bincount([v["fold"] for v in split["images"].values()])[1:]
    print(f"{out}: {args.folds} folds of {sizes.tolist()} pages, hash {split['hash']}")


def main(argv=None):
    return exit_code(lambda: (args := parse_args(argv)).run(args))


if __name__ == "__main__":
    sys.exit(main())
