"""What do people's label files say? Pages and their words, read from and written to the
competition's JSON, ICDAR's, PaddleOCR's and labelme's files, and read from COCO's. Polygons are
[P, 2] in page pixels, EXIF orientation applied; pixel (i, j) covers [i, i+1) x [j, j+1)."""

import contextlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import shapely

from db_postprocess import DECIMALS, MAX_CROSSING, MAX_PAGE_POINTS, MAX_POINTS
from files import DataError, UsageError, read_json, read_text, shown

SPLITS = ("train", "val", "test")
COCO_TEXTS = "text", "transcription", "utf8_string", "caption"
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ICDAR = re.compile(r"(\s*-?[\d.]+\s*,){7}\s*-?[\d.]")  # how a file of any name begins
# limits of what is read from files, so that a hostile one ends in an error and not in swap
MAX_PAGE_BYTES, MAX_PAGES, MAX_TEXT, MAX_PARTS, MAX_COORDINATE = 2**24, 100_000, 10_000, 100, 1e6


@dataclass
class Page:
    """One picture and its N labelled (or predicted) words. polygons: N arrays [P, 2], page pixels.
    ignore: N bools (don't care). texts: N strings or None. confidences: N floats, 1.0 for labels.
    size: (width, height) if the label file states it, or of the opened picture. What only the
    picture tells, `data.inspect_pages` sets: digest of its bytes, thumbnail, and repaired, the
    words as training takes them."""

    name: str
    path: Path
    polygons: list = field(default_factory=list)
    ignore: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    confidences: list = field(default_factory=list)
    group: str | None = None
    size: tuple | None = None
    digest: str | None = None
    thumbnail: np.ndarray | None = None
    repaired: tuple | None = None

    def add(self, word_id, points, text=None, ignore=False, confidence=1.0):
        self.ids.append(str(word_id))
        self.polygons.append(points)
        self.texts.append(text)
        self.ignore.append(bool(ignore) or text == "###")
        self.confidences.append(float(confidence))


def get(value, key, default=None):
    """value[key]; the default also where a file holds something else than an object."""
    return value.get(key, default) if isinstance(value, dict) else default


def parse_polygon(points, where):
    """Points [[x, y], ...] as a float64 array [P, 2]. Raises DataError naming `where`."""
    count = len(points) if isinstance(points, list) else 0
    if not 3 <= count <= MAX_POINTS:
        raise DataError(where, f"{count} points", f"3 to {MAX_POINTS} are needed")
    polygon = np.zeros(0)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        polygon = np.array(points, np.float64)
    if polygon.shape != (count, 2) or not (np.abs(polygon) <= MAX_COORDINATE).all():
        raise DataError(where, f"its points are not [x, y] of numbers within {MAX_COORDINATE:g}")
    if count > MAX_CROSSING and not shapely.is_valid(shapely.polygons(polygon)):
        raise DataError(where, "crosses itself", f"up to {MAX_CROSSING} points may do so")
    return polygon


def fill_page(page, where, words, width=None, height=None):
    """Add words (id, points, text, ignore, confidence) and a stated size. Raises DataError."""
    if width is not None and height is not None:
        if not all(type(n) in (int, float) and 1 <= n <= MAX_COORDINATE for n in (width, height)):
            raise DataError(where, f"no picture has {shown(f'{width!r} x {height!r}')} px")
        page.size = int(width), int(height)
    count = 0
    for word_id, points, text, ignore, confidence in words:
        place = f"{where}: word {shown(word_id)}"
        polygon = parse_polygon(points, place)
        if (count := count + len(polygon)) > MAX_PAGE_POINTS:
            raise DataError(where, "too many words", f"up to {MAX_PAGE_POINTS} points are read")
        confidence = 1.0 if confidence is None else confidence  # of what was drawn by hand
        if type(confidence) not in (int, float) or not 0 <= confidence <= 1:
            raise DataError(place, f"confidence {shown(repr(confidence))} is not in 0..1")
        if ignore not in (None, False, True):
            raise DataError(place, f"ignore flag {shown(repr(ignore))} is not true or false")
        whole = isinstance(text, str) and not re.search("[\ud800-\udfff]", text)
        if text is not None and not (whole and len(text) <= MAX_TEXT):
            raise DataError(place, f"transcription is not a text of up to {MAX_TEXT} characters")
        page.add(word_id, polygon, text, ignore, confidence)
    if len(set(page.ids)) < len(page.ids):  # JSON's keys cannot, labelme's shapes may
        raise DataError(where, "a word's id comes twice", "give each an id of its own")
    return page


def picture_path(places, name, where, need=True):
    """Path of a picture inside the first of the places (folders) that has it. Raises DataError."""
    where = f"{where}: image {shown(name)}"
    spaces = "[\xa0\u2000-\u200a\u202f\u3000]"  # macOS writes such ones
    plain = re.sub(spaces, " ", name if isinstance(name, str) else "\n")
    if not plain.isprintable() or not 0 < len(name.encode()) < 256:
        raise DataError(where, "not a file name")
    place = next((p for p in places if os.path.isfile(p / name)), places[0])
    if not Path(os.path.realpath(place / name)).is_relative_to(os.path.realpath(place)):
        raise DataError(where, "leads out of the data folder")
    if need and not os.path.isfile(place / name):
        raise DataError(where, f"no such picture in {place}", "see --image-dir")
    return place / name


def find_page(places, way, where):
    """A Page of the longest end of a tool's way to a picture that is there. Raises DataError."""
    parts = PurePosixPath(str(way).replace("\\", "/").lstrip("/")).parts[-MAX_PARTS:]
    ends = ["/".join(parts[k:]) for k in range(len(parts)) if ".." not in parts[k:]] or [""]
    name = next((end for end in ends for p in places if os.path.isfile(p / end)), ends[-1])
    return Page(name, picture_path(places, name, where))


def image_dir_of(label_file, image_dir=None):
    """The folders in which the pictures of a label file may lie, the likeliest first: --image-dir,
    or images/ beside it or beside its folder (train, jsons, ...), or else its own; in each of them
    a folder of its split's name. Raises UsageError."""
    beside, stem = Path(label_file).parent, Path(label_file).stem.removeprefix("instances_")
    inner = beside.name in (*SPLITS, "valid", "jsons", "annotations")
    roots = [beside / "images", (beside.parent if inner else beside) / "images"]
    roots = [root for root in roots if root.is_dir()] or [beside]
    if image_dir is not None:
        roots = [Path(image_dir), Path(image_dir, "images")]
    if not roots[0].is_dir():
        where = f"--image-dir {image_dir}" if image_dir else roots[0]
        raise UsageError(where, "no such folder")
    places = []
    for root in roots:
        own = [root / name for name in (stem, beside.name) if (root / name).is_dir()]
        places += [*own, root] if own else [root, *(root / split for split in SPLITS)]
    return [place for place in places if place.is_dir()]


def read_competition(label_file, image_dir=None, need_pictures=True):
    """Pages of {"images": {name: {"words": {id: {"points": [[x, y], ...], ...}}}}}, labels or
    predictions; a group may stand in meta.json beside it. Words whose points are [] or null are
    none; where no page has "words", all are there to be predicted."""
    sheet = read_json(label_file)
    if get(sheet, "shapes") is not None:
        return list(read_labelme([label_file], image_dir))
    images = get(sheet, "images")
    if isinstance(images, list) and isinstance(sheet.get("annotations", []), list):
        return list(read_coco(label_file, sheet, image_dir))
    if not isinstance(images, dict):
        raise DataError(label_file, 'no "images" object at the top', "is this a label file?")
    meta_file = Path(label_file).parent / "meta.json"
    meta = get(read_json(meta_file), "images") if meta_file.is_file() else {}
    fields = ("points", []), ("transcription", None), ("ignore", False), ("confidence", 1.0)
    places, pages = image_dir_of(label_file, image_dir), []
    known = any(get(entry, "words") is not None for entry in images.values())
    for name in list(images):
        entry, where = images.pop(name), f"{label_file}: image {shown(name)}"
        words = get(entry, "words") if known else {}
        if not isinstance(words, dict):
            raise DataError(where, 'no "words" object', 'a page without text has "words": {}')
        page = Page(name, picture_path(places, name, label_file, need_pictures))
        page.group = get(entry, "group", get(get(meta, name), "group"))
        if not isinstance(page.group, str | None):
            raise DataError(where, f"group {shown(repr(page.group))} is not a text")
        drawn = ((k, w) for k, w in words.items() if not isinstance(w, dict) or w.get("points", w))
        words = ((key, *(get(word, *field) for field in fields)) for key, word in drawn)
        pages.append(fill_page(page, where, words, get(entry, "img_w"), get(entry, "img_h")))
    return pages


def read_coco(label_file, sheet, image_dir=None):
    """Pages of COCO's {"images": [{id, file_name}], "annotations": [{image_id, segmentation, bbox,
    iscrowd}]} as CVAT, Label Studio and Roboflow write it. Each polygon is a word, or else the
    bbox, turned by the attribute "rotation"; the text is the annotation's or its attribute "text",
    "transcription", "utf8_string" or "caption"; iscrowd, "ignore" or "difficult" = ignore."""
    words, places = {}, image_dir_of(label_file, image_dir)
    for number, one in enumerate(sheet.get("annotations", []), 1):
        where, attributes = f"{label_file}: annotation {number}", get(one, "attributes") or {}
        one = attributes | one if isinstance(attributes, dict) and isinstance(one, dict) else {}
        outlines, box, angle = one.get("segmentation"), one.get("bbox"), one.get("rotation", 0)
        if isinstance(outlines, dict):
            raise DataError(where, "a mask (RLE)", "export it as a polygon")
        if not outlines or not isinstance(outlines, list):
            box = [box[:2], box[2:], [angle, 0]] if isinstance(box, list) else []
            (x, y), (w, h), (angle, _) = parse_polygon(box, f"{where}: bbox")
            turned = cv2.boxPoints(((x + w / 2, y + h / 2), (w, h), angle)).ravel().tolist()
            outlines = [turned if angle else [x, y, x + w, y, x + w, y + h, x, y + h]]
        text = next((one[key] for key in COCO_TEXTS if one.get(key)), None)
        skip = one.get("iscrowd") or one.get("ignore") or one.get("difficult")
        for k, flat in enumerate(outlines):
            points = isinstance(flat, list) and [flat[i : i + 2] for i in range(0, len(flat), 2)]
            word = f"{one.get('id', number)}{f'.{k}' * (k > 0)}", points, text, skip
            words.setdefault(repr(one.get("image_id")), []).append((*word, one.get("score")))
    if len({repr(get(image, "id")) for image in sheet["images"]}) < len(sheet["images"]):
        raise DataError(label_file, "two pictures have one id", "number them anew")
    for number, image in enumerate(sheet["images"], 1):
        page = find_page(places, get(image, "file_name"), f"{label_file}: picture {number}")
        where = f"{label_file}: image {shown(page.name)}"
        own = words.pop(repr(get(image, "id")), ())
        yield fill_page(page, where, own, get(image, "width"), get(image, "height"))
    if words:
        raise DataError(label_file, f"annotations of picture {next(iter(words))}, which it lacks")


def read_icdar(files, image_dir=None):
    """Pages of ICDAR files gt_NAME.txt, res_NAME.txt or NAME.txt, NAME with or without the
    picture's suffix; in UTF-8 or Windows-1252. Text `###` = ignore."""
    pictures, place = {}, image_dir_of(files[0], image_dir)[0]
    for file in sorted(place.iterdir()):
        if file.suffix.lower() in PICTURES:
            pictures.setdefault(file.stem, []).append(file.name)
            pictures[file.name] = [file.name]
    for file in files:
        name = re.sub("^(gt|res)_", "", file.stem)
        if len(names := pictures.get(name, ())) != 1:
            raise DataError(file, f"{len(names)} pictures {name}.* in {place}", "one is needed")
        lines = enumerate(read_text(file, MAX_PAGE_BYTES, other="cp1252").split("\n"), 1)
        words = ((f"{n:04d}", *parse_icdar_line(s), False, 1.0) for n, s in lines if s.strip())
        yield fill_page(Page(names[0], picture_path([place], names[0], file)), file, words)


def parse_icdar_line(line):
    """A line -> (points, text or None). Four numbers, of ICDAR 2013 and CVAT, with commas or
    spaces: left, top, right, bottom. Eight, of ICDAR 2015: digits behind them are text, as prices
    are. Curved words have six points and more, or a text in quotes behind any number of them."""
    line, numbers = line.strip(), []
    comma = "," if "," in line.split('"')[0] else None
    fields = line.split(comma, 2 * MAX_POINTS + 2)
    with contextlib.suppress(ValueError):
        for text in fields:
            numbers.append(float(text))
    count = len(numbers)
    quoted = count < len(fields) and fields[count].lstrip().startswith('"')
    used = count // 2 * 2 if quoted or not 8 <= count < 12 else 8
    points = [numbers[k : k + 2] for k in range(0, used, 2)]
    points = rectangle(*points) if len(points) == 2 else points
    text = "".join(line.split(comma, used)[used:])
    return points, re.sub(r'^\s*"(.*)"\s*$', r"\1", text) or None


def rectangle(a, b):
    """Corners of the upright rectangle between two points, as lists of any length."""
    return [[*a], [*b[:1], *a[1:]], [*b], [*a[:1], *b[1:]]]


def read_paddle(label_file, image_dir=None):
    """Pages of PaddleOCR's lines: picture<TAB>[{"transcription", "points", "difficult"?}, ...]."""
    places, lines = image_dir_of(label_file, image_dir), read_text(label_file).split("\n")
    for number, line in ((n, line) for n, line in enumerate(lines, 1) if line.strip()):
        where = f"{label_file}: line {number}"
        name, _, words = line.partition("\t")
        words = read_json(f"{where}: after `picture<TAB>`", words)
        if not isinstance(words, list):
            raise DataError(where, "not `picture<TAB>JSON list of objects`")
        page, fields = find_page(places, name, where), []
        for i, word in enumerate(words, 1):
            text = get(word, "transcription") or None
            skip = get(word, "difficult", False) or text == "*"
            fields.append((f"{i:04d}", get(word, "points", []), text, skip, 1.0))
        yield fill_page(page, f"{where}: image {shown(page.name)}", fields)


def read_labelme(files, image_dir=None):
    """Pages of labelme's files, one a picture: polygons and rectangles; text is the description, or
    else the label, unless that is "text"; `###`, flag "ignore" or "difficult" = ignore."""
    for file in files:
        sheet, words = read_json(file), []
        if not isinstance(shapes := get(sheet, "shapes"), list):
            raise DataError(file, 'no "shapes" list of objects', "is this a labelme file?")
        for i, shape in enumerate(shapes, 1):
            points, kind = get(shape, "points", []), get(shape, "shape_type") or "polygon"
            if kind not in ("polygon", "rectangle", "oriented_rectangle", "rotation"):
                raise DataError(file, f"shape {i} is a {shown(kind)}", "draw it as a polygon")
            corners = [*map(type, points)] if isinstance(points, list) else []
            if kind == "rectangle" and corners == [list, list]:
                points = rectangle(*points)  # of any values; parse_polygon judges them
            label = get(shape, "label")
            text = get(shape, "description") or (None if label == "text" else label)
            skip = get(shape, "difficult") or get(get(shape, "flags"), "ignore") or label == "###"
            word_id = f"{i:04d}" if get(shape, "id") is None else shape["id"]
            confidence = get(shape, "confidence", get(shape, "score"))  # X-AnyLabeling's
            words.append((word_id, points, text, skip, confidence))
        page = find_page(image_dir_of(file, image_dir), get(sheet, "imagePath"), file)
        yield fill_page(page, file, words, get(sheet, "imageWidth"), get(sheet, "imageHeight"))


def folder_labels(folder):
    """(reader, source) of a folder that holds one unnamed set of labels, or None."""
    for name in ("Label.txt", "_annotations.coco.json", "result.json"):  # the last: Label Studio's
        if (folder / name).is_file():
            return read_competition if "json" in name else read_paddle, folder / name
    if files := sorted(folder.glob("gt_*.txt")) or sorted(folder.glob("res_*.txt")):
        return read_icdar, files
    if files := [p for p in sorted(folder.glob("*.json")) if '"shapes"' in read_text(p)]:
        return read_labelme, files
    texts = {p: read_text(p, other="latin-1") for p in sorted(folder.glob("*.txt"))}
    files = [p for p, text in texts.items() if ICDAR.match(text) or not text.strip()]
    return (read_icdar, files) if any(map(ICDAR.match, texts.values())) else None


def find_labels(data, split):
    """(reader, source) of a split's labels in DATA, or None. A single file is every split's."""
    data = Path(data)
    names = {"val": ("val", "valid"), None: ("default", "")}.get(split, (split,))
    patterns = "{}.json", "jsons/{}.json", "annotations/instances_{}.json", "{}.txt"
    files = (data / pattern.format(name) for name in names for pattern in patterns)
    for file in filter(Path.is_file, (data, *files)):
        if file.suffix == ".json":
            return read_competition, file
        icdar = re.match("gt_|res_", file.name) or ICDAR.match(read_text(file, other="latin-1"))
        return (read_icdar, [file]) if icdar else (read_paddle, file)
    return next(filter(None, (folder_labels(data / name) for name in names)), None)


def load_labels(data, split=None, image_dir=None):
    """Pages of DATA: a folder and one of train, val, test, or one label file. Raises DataError that
    names file, image and word, or UsageError where there is no DATA."""
    if not Path(data).exists():
        raise UsageError(data, "no such file or folder")
    if not (found := find_labels(data, split) or find_labels(data, None)):
        known = "SPLIT.json, gt_*.txt, Label.txt, labelme's or COCO's"
        raise DataError(data, f"no labels of split {split or 'train, val or test'} ({known})")
    pages = list(found[0](found[1], image_dir))
    if not 0 < len(pages) <= MAX_PAGES:
        raise DataError(data, f"{len(pages) or 'no'} pages in it", f"up to {MAX_PAGES} are read")
    name, count = Counter(page.name for page in pages).most_common(1)[0]
    if count > 1:
        raise DataError(data, f"image {shown(name)} comes twice", "join its labels")
    return pages


def has_split(data, split):
    """Whether DATA names this split itself (a single label file names none)."""
    return Path(data).is_dir() and find_labels(data, split) is not None


def page_words(page):
    """(id, points [[x, y], ...], text, ignore, confidence) of each word of a page, rounded."""
    points = [np.round(polygon, DECIMALS).tolist() for polygon in page.polygons]
    confidences = [round(confidence, 6) for confidence in page.confidences]
    return zip(page.ids, points, page.texts, page.ignore, confidences)


def pages_to_json(pages):
    """The competition's JSON object of pages; of their words, what is not plain."""
    images = {}
    plain = {"points": None, "transcription": None, "confidence": 1.0, "ignore": False}
    for page in pages:
        images[page.name] = entry = {"words": {}}
        for word_id, points, text, ignore, confidence in page_words(page):
            word = zip(plain, (points, text, confidence, ignore))
            entry["words"][word_id] = {k: value for k, value in word if value != plain[k]}
        entry |= zip(("img_w", "img_h"), map(int, page.size or ()))
        if page.group is not None:
            entry["group"] = page.group
    return {"images": images}


def to_json(pages, split, folder):
    yield f"{split or 'train'}.json", json.dumps(pages_to_json(pages), ensure_ascii=False)


def to_paddle(pages, split, folder):
    """PPOCRLabel shows FOLDER/PICTURE of the folder that it opens, and keeps what fileState.txt
    says was looked at; it and PaddleOCR know `###` and `*` only as ignored."""
    lines = seen = ""
    for page in pages:
        words = []
        for _, points, text, ignore, _ in page_words(page):
            text = "###" if ignore and text != "*" else text or ""
            words.append({"transcription": text, "points": points, "difficult": ignore})
        lines += f"{folder}/{page.name}\t{json.dumps(words, ensure_ascii=False)}\n"
        seen += f"{folder}/{page.name}\t1\n"
    yield Path(split or "", "Label.txt"), lines
    yield Path(split or "", "fileState.txt"), seen


def to_icdar(pages, split, folder):
    for page in pages:
        lines = []
        for _, points, text, ignore, _ in page_words(page):
            if len(points) != 4:
                points = cv2.boxPoints(cv2.minAreaRect(np.float32(points))).tolist()
            numbers = [f"{v:.4f}".rstrip("0").rstrip(".") for point in points for v in point]
            text = "###" if ignore else " ".join((text or "").split("\n"))
            if parse_icdar_line(",".join([*numbers, text]))[1] != (text or None):
                text = f'"{text}"'
            lines.append(",".join([*numbers, text]) + "\n")
        if len(Path(page.name).parts) > 1:
            raise DataError(f"image {page.name}", "ICDAR knows no sub folders", "move its picture")
        yield Path(split or "", f"gt_{Path(page.name).stem}.txt"), "".join(lines)


def to_labelme(pages, split, folder):
    for page in pages:
        shapes, stem, (width, height) = [], Path(page.name).stem, page.size or (None, None)
        for word_id, points, text, ignore, confidence in page_words(page):
            shape = {"label": "text", "points": points, "group_id": None, "shape_type": "polygon"}
            shape |= {"description": text or "", "flags": {"ignore": True} if ignore else {}}
            shapes.append(shape | {"id": word_id, "confidence": confidence})
        sheet = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": page.name}
        sheet |= {"imageData": None, "imageWidth": width, "imageHeight": height}
        yield Path(split or "", f"{stem}.json"), json.dumps(sheet, ensure_ascii=False)


FORMATS = {"json": to_json, "icdar": to_icdar, "paddle": to_paddle, "labelme": to_labelme}


def losses(pages, again):
    """What differs between pages and what was read back of them, as counts by kind."""
    outlines = "outlines (their smallest rectangle is kept)"
    kinds = "ids", outlines, "texts", "ignore flags", "confidences"  # of page_words
    lost, known = Counter(), {PurePosixPath(page.name): page for page in again}
    for page in pages:
        other = known[PurePosixPath(page.name)]
        lost.update(sizes=page.size != other.size, groups=page.group != other.group)
        for word, read in zip(page_words(page), page_words(other)):
            for kind, *values in zip(kinds, word, read):
                a, b = (None if value in ("", "###") else value for value in values)
                lost[kind] += a != b
    return dict(+lost)
