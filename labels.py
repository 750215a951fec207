"""What do people's label files say? Pages and their words, read from and written to the
competition's JSON, ICDAR's, PaddleOCR's and labelme's files. Polygons are [P, 2] in page pixels,
EXIF orientation applied; pixel (i, j) covers [i, i+1) x [j, j+1)."""

import contextlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import shapely

from db_postprocess import DECIMALS, MAX_CROSSING, MAX_PAGE_POINTS, MAX_POINTS
from files import DataError, UsageError, read_json, read_text, shown

SPLITS = ("train", "val", "test")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ICDAR = re.compile(r"(\s*-?[\d.]+\s*,){7}\s*-?[\d.]")  # how a file of any name begins
# limits of what is read from files, so that a hostile one ends in an error and not in swap
MAX_PAGE_BYTES, MAX_PAGES, MAX_TEXT, MAX_PARTS, MAX_COORDINATE = 2**24, 100_000, 10_000, 100, 1e6


@dataclass
class Page:
    """One picture and its N labelled (or predicted) words. polygons: N arrays [P, 2], page pixels.
    ignore: N bools (don't care). texts: N strings or None. confidences: N floats, 1.0 for labels.
    size: (width, height) if the label file states it, or of the opened picture."""

    name: str
    path: Path
    polygons: list = field(default_factory=list)
    ignore: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    confidences: list = field(default_factory=list)
    group: str | None = None
    size: tuple | None = None

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
    try:
        polygon = np.array(points, np.float64)
    except (TypeError, ValueError, OverflowError):
        polygon = np.zeros(0)
    if polygon.shape != (count, 2) or not (np.abs(polygon) <= MAX_COORDINATE).all():
        raise DataError(where, f"its points are not [x, y] of numbers within {MAX_COORDINATE:g}")
    if count > MAX_CROSSING and not shapely.is_valid(shapely.polygons(polygon)):
        raise DataError(where, "crosses itself", f"up to {MAX_CROSSING} points may do so")
    return polygon


def fill_page(page, where, words):
    """Add words (id, points, text, ignore, confidence) as a file gives them. Raises DataError."""
    count = 0
    for word_id, points, text, ignore, confidence in words:
        place = f"{where}: word {shown(word_id)}"
        polygon = parse_polygon(points, place)
        if (count := count + len(polygon)) > MAX_PAGE_POINTS:
            raise DataError(where, "too many words", f"up to {MAX_PAGE_POINTS} points are read")
        if type(confidence) not in (int, float) or not 0 <= confidence <= 1:
            raise DataError(place, f"confidence {shown(repr(confidence))} is not in 0..1")
        if ignore not in (None, False, True):
            raise DataError(place, f"ignore flag {shown(repr(ignore))} is not true or false")
        whole = isinstance(text, str) and not re.search("[\ud800-\udfff]", text)
        if text is not None and not (whole and len(text) <= MAX_TEXT):
            raise DataError(place, f"transcription is not a text of up to {MAX_TEXT} characters")
        page.add(word_id, polygon, text, ignore, confidence)
    if len(set(page.ids)) < len(page.ids):  # JSON's keys cannot, labelme's shapes may
        twice = shown(Counter(page.ids).most_common(1)[0][0])
        raise DataError(where, f"word {twice} comes twice", "give each an id of its own")
    return page


def stated_size(entry, width, height, where):
    """(width, height) of a picture as its label file states them, or None. Raises DataError."""
    size = get(entry, width), get(entry, height)
    if None in size:
        return None
    if not all(type(n) in (int, float) and 1 <= n <= MAX_COORDINATE for n in size):
        raise DataError(where, f"{width}, {height} are no picture's: {shown(repr(size))}")
    return int(size[0]), int(size[1])


def picture_path(image_dir, name, where, need=True):
    """Path of a picture inside image_dir. Raises DataError."""
    where = f"{where}: image {shown(name)}"
    spaces = "[\xa0\u2000-\u200a\u202f\u3000]"  # macOS writes such ones
    plain = re.sub(spaces, " ", name if isinstance(name, str) else "\n")
    if not plain.isprintable() or not 0 < len(name.encode()) < 256:
        raise DataError(where, "not a file name")
    path, parts = Path(image_dir, name), PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise DataError(where, "the name leads out of the data folder")
    if need and not path.is_file():
        raise DataError(where, f"no such picture in {image_dir}", "see --image-dir")
    if need and not path.resolve().is_relative_to(Path(image_dir).resolve()):
        raise DataError(where, "a link that leads out of the data folder")
    return path


def find_page(folder, way, where):
    """A Page of the longest end of a tool's way to a picture that is there. Raises DataError."""
    parts = PurePosixPath(str(way).replace("\\", "/").lstrip("/")).parts[-MAX_PARTS:]
    ends = ["/".join(parts[k:]) for k in range(len(parts)) if ".." not in parts[k:]] or [""]
    name = next((end for end in ends if os.path.isfile(Path(folder, end))), ends[-1])
    return Page(name, picture_path(folder, name, where))


def image_dir_of(label_file, image_dir=None):
    """Where the pictures of a label file lie: --image-dir, images/ beside it (or beside its folder
    train, val or test), or its own folder. Raises UsageError."""
    if image_dir is not None:
        if not Path(image_dir).is_dir():
            raise UsageError(f"--image-dir {image_dir}", "no such folder")
        return Path(image_dir)
    beside = Path(label_file).parent
    above = beside.parent if beside.name in SPLITS else beside
    return next((p / "images" for p in (beside, above) if (p / "images").is_dir()), beside)


def read_competition(label_file, image_dir=None, need_pictures=True):
    """Pages of {"images": {name: {"words": {id: {"points": [[x, y], ...], ...}}}}}, labels or
    predictions; a group may stand in meta.json beside it."""
    sheet = read_json(label_file)
    if get(sheet, "shapes") is not None:
        return read_labelme([label_file], image_dir)
    images = get(sheet, "images")
    if not isinstance(images, dict):
        raise DataError(label_file, 'no "images" object at the top', "is this a label file?")
    meta_file = Path(label_file).parent / "meta.json"
    meta = get(read_json(meta_file), "images") if meta_file.is_file() else {}
    fields = ("points", []), ("transcription", None), ("ignore", False), ("confidence", 1.0)
    folder, pages = image_dir_of(label_file, image_dir), []
    for name, entry in images.items():
        where, words = f"{label_file}: image {shown(name)}", get(entry, "words")
        if not isinstance(words, dict):
            raise DataError(where, 'no "words" object', 'a page without text has "words": {}')
        page = Page(name, picture_path(folder, name, label_file, need_pictures))
        page.size = stated_size(entry, "img_w", "img_h", where)
        page.group = get(entry, "group", get(get(meta, name), "group"))
        if not isinstance(page.group, str | None):
            raise DataError(where, f"group {shown(repr(page.group))} is not a text")
        words = [(key, *(get(word, *field) for field in fields)) for key, word in words.items()]
        pages.append(fill_page(page, where, words))
    return pages


def read_icdar(files, image_dir=None):
    """Pages of ICDAR files gt_NAME.txt, res_NAME.txt or NAME.txt, NAME with or without the
    picture's suffix; in UTF-8 or Windows-1252. Text `###` = ignore."""
    pages, pictures, image_dir = [], {}, image_dir_of(files[0], image_dir)
    for file in sorted(image_dir.iterdir()):
        if file.suffix.lower() in PICTURES:
            pictures.setdefault(file.stem, []).append(file.name)
            pictures[file.name] = [file.name]
    for file in files:
        name = re.sub("^(gt|res)_", "", file.stem)
        names = pictures.get(name, ())
        if len(names) != 1:
            raise DataError(file, f"{len(names)} pictures {name}.* in {image_dir}", "one is needed")
        lines = enumerate(read_text(file, MAX_PAGE_BYTES, other="cp1252").split("\n"), 1)
        words = ((f"{n:04d}", *parse_icdar_line(s), False, 1.0) for n, s in lines if s.strip())
        page = Page(names[0], picture_path(image_dir, names[0], file))
        pages.append(fill_page(page, file, words))
    return pages


def parse_icdar_line(line):
    """A line in one of three dialects -> (points, text or None)."""
    line, numbers = line.strip(), []
    comma = "," if "," in line.split('"')[0] else None
    fields = line.split(comma, 2 * MAX_POINTS + 2)
    with contextlib.suppress(ValueError):
        for text in fields:
            numbers.append(float(text))
    count = len(numbers)
    quoted = count < len(fields) and fields[count].lstrip().startswith('"')
    dialect = outline if quoted or not 8 <= count < 12 else icdar_2015
    points, used = (icdar_2013 if count in (4, 5) else dialect)(numbers)
    text = "".join(line.split(comma, used)[used:])
    quote = re.fullmatch(r'\s*"(.*)"\s*', text)
    return points, (quote[1] if quote else text) or None


def icdar_2013(numbers):
    """left, top, right, bottom and the text, with commas or spaces; CVAT's too."""
    return rectangle(numbers[:2], numbers[2:4]), 4


def icdar_2015(numbers):
    """x1,y1,...,x4,y4,text: digits after the 8th number are text, as prices are."""
    return [numbers[k : k + 2] for k in range(0, 8, 2)], 8


def outline(numbers):
    """x1,y1,...,xn,yn of curved words: six points and more, or a text in quotes behind them."""
    used = len(numbers) // 2 * 2
    return [numbers[k : k + 2] for k in range(0, used, 2)], used


def rectangle(a, b):
    """Corners of the upright rectangle between two points, as lists of any length."""
    return [[*a], [*b[:1], *a[1:]], [*b], [*a[:1], *b[1:]]]


def read_paddle(label_file, image_dir=None):
    """Pages of PaddleOCR's lines: picture<TAB>[{"transcription", "points", "difficult"?}, ...]."""
    pages, folder = [], image_dir_of(label_file, image_dir)
    lines = enumerate(read_text(label_file).split("\n"), 1)
    for number, line in ((number, line) for number, line in lines if line.strip()):
        where = f"{label_file}: line {number}"
        name, _, words = line.partition("\t")
        words = read_json(f"{where}: after `picture<TAB>`", words)
        if not isinstance(words, list):
            raise DataError(where, "not `picture<TAB>JSON list of objects`")
        page, fields = find_page(folder, name, where), []
        for i, word in enumerate(words, 1):
            text = get(word, "transcription") or None
            skip = get(word, "difficult", False) or text == "*"
            fields.append((f"{i:04d}", get(word, "points", []), text, skip, 1.0))
        pages.append(fill_page(page, f"{where}: image {shown(page.name)}", fields))
    return pages


def read_labelme(files, image_dir=None):
    """Pages of labelme files, one a picture: polygons and rectangles; the text is the description,
    or else the label, unless that is "text"; `###`, flag "ignore" or "difficult" = ignore."""
    pages = []
    for file in files:
        sheet, words = read_json(file), []
        shapes = get(sheet, "shapes")
        if not isinstance(shapes, list):
            raise DataError(file, 'no "shapes" list of objects', "is this a labelme file?")
        for i, shape in enumerate(shapes, 1):
            points, kind = get(shape, "points", []), get(shape, "shape_type") or "polygon"
            if kind not in ("polygon", "rectangle", "oriented_rectangle", "rotation"):
                raise DataError(file, f"shape {i} is a {shown(kind)}", "draw it as a polygon")
            corners = [type(point) for point in points] if isinstance(points, list) else []
            if kind == "rectangle" and corners == [list, list]:
                points = rectangle(*points)  # of any values; parse_polygon judges them
            label = get(shape, "label")
            text = get(shape, "description") or (None if label == "text" else label)
            skip = get(shape, "difficult") or get(get(shape, "flags"), "ignore") or label == "###"
            word_id = f"{i:04d}" if get(shape, "id") is None else shape["id"]
            words.append((word_id, points, text, skip, get(shape, "confidence", 1.0)))
        page = find_page(image_dir_of(file, image_dir), get(sheet, "imagePath"), file)
        page.size = stated_size(sheet, "imageWidth", "imageHeight", file)
        pages.append(fill_page(page, file, words))
    return pages


def folder_labels(folder):
    """(reader, source) of a folder that holds one unnamed set of labels, or None."""
    folder = Path(folder)
    if (folder / "Label.txt").is_file():
        return read_paddle, folder / "Label.txt"
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
    if data.is_file() and data.suffix == ".json":
        return read_competition, data
    if data.is_file():
        icdar = ICDAR.match(read_text(data, other="latin-1"))
        icdar = icdar or data.name.startswith(("gt_", "res_"))
        return (read_icdar, [data]) if icdar else (read_paddle, data)
    if split is None:
        return None
    for suffix, reader in ((".json", read_competition), (".txt", read_paddle)):
        if (data / f"{split}{suffix}").is_file():
            return reader, data / f"{split}{suffix}"
    return folder_labels(data / split)


def load_labels(data, split=None, image_dir=None):
    """Pages of DATA: a folder and one of train, val, test, or one label file. Raises DataError that
    names file, image and word, or UsageError where there is no DATA."""
    if not Path(data).exists():
        raise UsageError(data, "no such file or folder")
    found = find_labels(data, split) or folder_labels(data)
    if found is None:
        known = "SPLIT.json, gt_*.txt, Label.txt or labelme's"
        raise DataError(data, f"no labels of split {split or 'train, val or test'} ({known})")
    pages = found[0](found[1], image_dir)
    if not 0 < len(pages) <= MAX_PAGES:
        raise DataError(data, f"{len(pages) or 'no'} pages in it", f"up to {MAX_PAGES} are read")
    name, count = Counter(page.name for page in pages).most_common(1)[0]
    if count > 1:
        raise DataError(data, f"image {shown(name)} comes twice", "join its labels")
    return pages


def has_split(data, split):
    """Whether DATA names this split itself (a single label file names none)."""
    return Path(data).is_dir() and find_labels(data, split) is not None


# ---------------------------------------------------------------- formats out


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


def to_json(pages, split):
    return {f"{split or 'train'}.json": json.dumps(pages_to_json(pages), ensure_ascii=False)}


def to_paddle(pages, split):
    lines = []
    for page in pages:
        keys = "transcription", "points", "difficult"
        words = [dict(zip(keys, (w[2] or "", w[1], w[3]))) for w in page_words(page)]
        lines.append(f"images/{page.name}\t{json.dumps(words, ensure_ascii=False)}\n")
    return {f"{split}.txt" if split else "Label.txt": "".join(lines)}


def icdar_file(page, split):
    lines = []
    for _, points, text, ignore, _ in page_words(page):
        if len(points) != 4:
            points = cv2.boxPoints(cv2.minAreaRect(np.float32(points))).tolist()
        numbers = [f"{v:.4f}".rstrip("0").rstrip(".") for point in points for v in point]
        text = "###" if ignore else " ".join((text or "").split("\n"))
        if parse_icdar_line(",".join([*numbers, text]))[1] != (text or None):
            text = f'"{text}"'
        lines.append(",".join([*numbers, text]) + "\n")
    if len(PurePosixPath(page.name).parts) > 1:
        raise DataError(f"image {page.name}", "ICDAR knows no sub folders", "move its picture")
    return "".join(lines)


def labelme_file(page, split):
    shapes = []
    for word_id, points, text, ignore, confidence in page_words(page):
        shape = {"label": "text", "points": points, "group_id": None, "shape_type": "polygon"}
        shape |= {"description": text or "", "flags": {"ignore": True} if ignore else {}}
        shapes.append(shape | {"id": word_id, "confidence": confidence})
    sheet = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imageData": None}
    sheet["imagePath"] = ("../" if split else "") + f"images/{page.name}"
    sheet["imageWidth"], sheet["imageHeight"] = page.size or (None, None)
    return json.dumps(sheet, ensure_ascii=False)


def to_files(pages, split, pattern, write):
    """{path: text} of a file a page. Raises DataError where two pages would share one."""
    files = {}
    for page in pages:
        path = str(Path(split or "", pattern.format(PurePosixPath(page.name).stem)))
        if path in files:
            raise DataError(f"image {page.name}", f"{path} would hold several pages", "rename it")
        files[path] = write(page, split)
    return files


to_icdar = partial(to_files, pattern="gt_{}.txt", write=icdar_file)
to_labelme = partial(to_files, pattern="{}.json", write=labelme_file)
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
