"""How does a page look? What was found on it, and what was not, drawn onto its picture."""

import base64
from pathlib import Path

import cv2
import numpy as np

import cleval
from files import replace_file

COLOURS = {
    "hit": (0, 150, 0),
    "found": (0, 150, 0),
    "label": (60, 90, 255),
    "false alarm": (255, 120, 0),
    "joined": (160, 0, 200),
    "miss": (230, 0, 0),
}
SAMPLE_COLOURS = {  # of what training sees
    "words, shrunk": (0, 150, 0),
    "threshold map": (230, 0, 0),
    "no loss looks here": (60, 90, 255),
}
WHITE = 255, 255, 255
INK = 0, 60, 160  # of confidences
FOUND = ("hit", "found", "false alarm")  # outlines of detections, the others are of labels
SIDE = 1400  # px of a drawn page's longer side, at least; its lines are 1 px wide there
LONGEST = 60_000  # and at most: a JPEG has up to 65,535 px, and the strip above comes on top
DRAWN = b"\xff\xfe\0\x0cdrawn page"  # a comment in a JPEG's header: such a file may be replaced
FONT = cv2.FONT_HERSHEY_SIMPLEX

# ---------------------------------------------------------------- what to draw


def sort_outlines(page, polygons):
    """{kind, of COLOURS: polygons [P, 2]}: what was found on a page and, where its labels are
    known, these, by what became of each at IoU 0.5."""
    if page.polygons is None:
        return {"found": polygons}
    matches = cleval.iou_matches(page.polygons, polygons, page.ignore)
    hits = {m for _, m in matches.pairs}
    kinds = {"hit": [], "label": [], "false alarm": [], "joined": [], "miss": []}
    for m, polygon in enumerate(polygons):
        if m in hits:
            kinds["hit"].append(polygon)
        elif matches.valid[m]:
            kinds["false alarm"].append(polygon)

    # a label that was hit, or that does not count, is just a label
    names = {"hit": "label", "": "label", "joined": "joined"}
    for polygon, outcome in zip(page.polygons, matches.outcome):
        kinds[names.get(outcome, "miss")].append(polygon)
    return kinds


# ---------------------------------------------------------------- drawing


def draw_page(image, page, polygons, scores=()):
    """A page's picture, uint8 RGB, with the outlines of `sort_outlines` and the scores of what was
    found, under a strip that names and counts the COLOURS: uint8 RGB [H, W, 3], the page's longer
    side SIDE to LONGEST px long. Lines and letters grow with it."""
    longer = max(image.shape[:2])
    zoom = np.clip(1.0, SIDE / longer, LONGEST / longer)
    image = resize(image, zoom, cv2.INTER_CUBIC)
    image = cv2.addWeighted(image, 0.75, np.full_like(image, 255), 0.25, 0)
    unit = max(image.shape[:2]) / SIDE  # px of a line
    kinds = sort_outlines(page, polygons)

    for kind, outlines in kinds.items():
        # those of detections run around them, so that they hide neither print nor labels
        around = unit if kind in FOUND else 0
        moved = [zoom * points + around * np.sign(points - points.mean(0)) for points in outlines]
        moved = [np.round(points).astype(np.int32) for points in moved]
        cv2.polylines(image, moved, True, COLOURS[kind], round(unit), cv2.LINE_AA)

    for polygon, score in zip(polygons, scores):
        right = zoom * polygon[polygon[:, 0].argmax()]
        place = right + (3 * unit, 4 * unit)
        put_text(image, f"{score:.2f}", place, 0.45 * unit, WHITE, 3 * unit)  # on any ground
        put_text(image, f"{score:.2f}", place, 0.45 * unit, INK, unit)

    names = {}
    for kind, outlines in kinds.items():
        name = kind if kind == "label" else f"{len(outlines)} {kind}"
        names[name] = COLOURS[kind]
    return np.concatenate([draw_legend(names, image), image])


def resize(image, zoom, method):
    """A picture uint8 [H, W, 3] scaled by the factor `zoom`, by a method cv2.INTER_*. Each side
    keeps at least one pixel, also of a narrow strip that is scaled down."""
    size = [max(1, round(zoom * side)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=method)


def draw_legend(colours, image):
    """A white strip, uint8 [h, W, 3], as wide as an image, which may be narrow, with the names of
    colours {name: (r, g, b)}."""
    unit = max(image.shape[:2]) / SIDE
    width = image.shape[1]
    letter = min(unit, width / 860)
    strip = np.full((round(40 * unit), width, 3), 255, np.uint8)
    x = 8
    for name, colour in colours.items():
        put_text(strip, name, (x, 28 * unit), 0.8 * letter, colour, 2 * letter)
        x += (16 * len(name) + 20) * letter
    return strip


def put_text(image, text, place, size, colour, thickness):
    """Write onto uint8 [H, W, 3], from (x, y) at the left of the base line."""
    x, y = place
    cv2.putText(
        image,
        text,
        (round(x), round(y)),
        FONT,
        size,
        colour,
        max(1, round(thickness)),
        cv2.LINE_AA,
    )


# ---------------------------------------------------------------- files


def picture_file(page, folder):
    """Where a page is drawn: folder/NAME, with .jpg added unless it is one (a.jpg, a.png.jpg)."""
    jpeg = page.name.lower().endswith((".jpg", ".jpeg"))
    return Path(folder, page.name if jpeg else f"{page.name}.jpg")


def write_picture(file, image):
    """Write uint8 RGB [H, W, 3] as a JPEG with DRAWN in it, whose colours are as sharp as its
    greys. Raises OSError."""
    sharp = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    raw = cv2.imencode(".jpg", image[..., ::-1], sharp)[1].tobytes()
    replace_file(file, raw[:20] + DRAWN + raw[20:])  # behind the segment that begins each JPEG


def is_drawn(file):
    """Whether `write_picture` has written a file. Raises OSError."""
    with open(file, "rb") as start:
        return DRAWN in start.read(100)


def embedded_picture(image):
    """uint8 RGB [H, W, 3] as a small JPEG in a data URL."""
    zoom = min(520 / image.shape[1], 2000 / image.shape[0])
    image = resize(image, zoom, cv2.INTER_AREA)
    code = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])[1]
    return "data:image/jpeg;base64," + base64.b64encode(code).decode()
