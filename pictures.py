"""How is a picture read? Bounded, whole or not at all, turned as EXIF says, on white where it is
transparent, and no larger than it is needed."""

import contextlib
import functools
import hashlib
import io
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin

from files import DataError, read_bytes

# limits of what is read from files, so that a hostile one ends in an error and not in swap
MAX_PICTURE_BYTES = 2**28
MAX_JPEG_HEADER = 2**24
MAX_PIXELS = 2**27
FORMATS = ("PNG", "BMP", "WEBP", "TIFF")  # and JPEG
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
REDUCED = {1: 0, 2: 16, 4: 32, 8: 64}  # bits of cv2.IMREAD_REDUCED_COLOR_2, _4, _8

# errors and limits are ours
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None


# ---------------------------------------------------------------- reading


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


def files_below(folder, closed):
    """Files of a folder and below, in no order. Links to folders are followed, except into the
    folders `closed` (real paths): those that are being read, since such a link would never end. A
    folder that may not be read, such as lost+found, is left out with a warning. Raises OSError."""
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        where = os.fspath(folder)
        print(f"warning: {where}: a folder that may not be read is left out", file=sys.stderr)
        return []
    files = []
    for entry in entries:
        if not os.path.isdir(entry):  # also a link to itself, of which entry.is_dir() raises
            files.append(Path(entry))
        elif (real := os.path.realpath(entry)) not in closed:
            files += files_below(entry, {*closed, real})
    return files


def read_image(path):
    """uint8 RGB [H, W, 3] of a whole picture. Raises DataError, see `decode_picture`."""
    return read_page(path)[0]


def read_page(path, hps=(), tile=0):
    """(picture uint8 RGB [H, W, 3], (width, height)) of a file, see `decode_picture`."""
    return decode_picture(read_bytes(path, MAX_PICTURE_BYTES), path, hps, tile)


def open_picture(page, hps, tile):
    """The picture of a page, uint8 RGB [H, W, 3], see `decode_picture`; sets page.size (width,
    height) and page.digest. Raises DataError."""
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


def decode_picture(raw, path, hps, tile):
    """(picture uint8 RGB [H, W, 3], (width, height)) of a file's bytes, EXIF orientation applied,
    on white where it is transparent. A JPEG is decoded to 1/2, 1/4 or 1/8 of its sides, rounded up,
    if that is enough for all of hps: for their fit and, with tiles, for `tile` px that become
    hp.size. Width and height are those of the whole picture. Raises DataError that names `path` on
    a broken or truncated file, or one of more than MAX_PIXELS.

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
    # by EXIF; a reduced picture keeps its longer side, see `jpeg_reduction`
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


# ---------------------------------------------------------------- digests and sizes


def bytes_digest(raw):
    """16 hex digits of the SHA-256 of bytes. Those of a file name a picture wherever it lies."""
    return hashlib.sha256(raw).hexdigest()[:16]


def picture_digest(path):
    """The digest of a file, see `bytes_digest`. An inspected page has it already: page.digest."""
    stat = os.stat(path)
    return file_digest(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(100_000)  # each member of an ensemble asks for the same pages
def file_digest(path, *_):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


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


# ---------------------------------------------------------------- damage


@contextlib.contextmanager
def libjpeg_lines():
    """A list that gets the lines libjpeg writes to standard error meanwhile, behind Python's back.
    What Python itself writes there is let through."""
    lines = []
    with tempfile.TemporaryFile() as file, os.fdopen(os.dup(2), "w") as stderr:
        os.dup2(file.fileno(), 2)
        try:
            # libjpeg does not write to a sys.stderr that is another file, as in tests and notebooks
            python = stderr if sys.stderr is sys.__stderr__ else sys.stderr
            with contextlib.redirect_stderr(python):
                yield lines
        finally:
            os.dup2(stderr.fileno(), 2)
        file.seek(0)
        text = file.read().decode(errors="replace")
        lines += [line for line in text.splitlines() if "JPEG" in line]
