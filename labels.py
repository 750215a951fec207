"""What do people's label files say? Pages and their words, read from and written to the
competition's JSON, ICDAR's, PaddleOCR's and labelme's files, within the limits of what is read.

DATA is a folder (train.json, val.json, test.json and images/; or ICDAR's gt_*.txt, PaddleOCR's
Label.txt, labelme's *.json) or one label file with its pictures beside it. Polygons are [P, 2] in
page pixels, EXIF orientation applied; pixel (i, j) covers [i, i+1) x [j, j+1).
"""

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import shapely

from files import DataError, read_json, read_text, shown

SPLITS = ("train", "val", "test")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# limits of what is read from files, so that a hostile one ends in an error and not in swap
MAX_PAGE_BYTES = 2**24
MAX_PAGES, MAX_WORDS, MAX_TEXT = 100_000, 5_000, 10_000
MAX_POINTS, MAX_CROSSING, MAX_PAGE_POINTS = 500, 20, 20_000
MAX_COORDINATE = 1e6


@dataclass
class Page:
    """One picture and its N labelled (or predicted) words, as written in the label file.

    polygons: N arrays [P, 2], page pixels. ignore: N bools (don't care). texts: N strings or None.
    confidences: N floats, 1.0 for labels. size: (width, height) if the file states it or after
    `read_pages`.
    """

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


# ---------------------------------------------------------------- formats in


def parse_polygon(points, where):
    """Points [[x, y], ...] as a float64 array [P, 2]. Raises DataError naming `where`."""
    count = len(points) if isinstance(points, (list, tuple)) else 0
    if count > MAX_POINTS or count < 3 and isinstance(points, list):
        raise DataError(f"{where} has {count} points; 3 to {MAX_POINTS} are needed")
    try:
        polygon = np.array(points, np.float64)
    except (TypeError, ValueError, OverflowError):
        polygon = np.zeros(0)
    if polygon.shape != (count, 2):
        raise DataError(f"{where} has points that are not [x, y] pairs of numbers")
    if not (np.abs(polygon) <= MAX_COORDINATE).all():
        raise DataError(f"{where} has a coordinate that is not finite or beyond {MAX_COORDINATE:g}")
    if count > MAX_CROSSING and not shapely.is_valid(shapely.polygons(polygon)):
        raise DataError(f"{where} crosses itself; up to {MAX_CROSSING} points may do so")
    return polygon


def fill_page(page, where, words):
    """Add words (id, points, text, ignore, confidence) as a file gives them. Raises DataError."""
    for number, (word_id, points, text, ignore, confidence) in enumerate(words):
        if number == MAX_WORDS:
            raise DataError(f"{where}: more words than {MAX_WORDS} on one page")
        place = f"{where}: word {shown(word_id)}"
        polygon = parse_polygon(points, place)
        if type(confidence) not in (int, float) or not 0 <= confidence <= 1:
            raise DataError(f"{place}: confidence {shown(repr(confidence))} is not in 0..1")
        if ignore not in (None, False, True):
            raise DataError(f"{place}: ignore flag {shown(repr(ignore))} is not true or false")
        if text is not None and not (isinstance(text, str) and len(text) <= MAX_TEXT):
            raise DataError(f"{place}: transcription is not a text of up to {MAX_TEXT} characters")
        if text and any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError(f"{place}: transcription holds half a character (a lone surrogate)")
        page.add(word_id, polygon, text, ignore, confidence)
    if len(set(page.ids)) < len(page.ids):  # JSON's keys cannot, labelme's shapes may
        twice = shown(Counter(page.ids).most_common(1)[0][0])
        raise DataError(f"{where}: word {twice} comes twice; give each an id of its own")
    if (points := sum(map(len, page.polygons))) > MAX_PAGE_POINTS:
        raise DataError(f"{where}: {points} points on one page; up to {MAX_PAGE_POINTS} are read")
    return page


def is_name(name):
    """Whether a value from a file may be a file's name: a text of what can be printed and of spaces
    of any kind, which macOS puts into names."""
    if not isinstance(name, str) or not 0 < len(name) < 256:
        return False
    plain = re.sub("[\xa0\u2000-\u200a\u202f\u3000]", " ", name)
    return plain.isprintable() and len(os.fsencode(name)) < 256


def picture_path(image_dir, name, where, need=True):
    """Path of a picture inside image_dir. Raises DataError if the name leads out of it or nothing
    is there."""
    where = f"{where}: image {shown(name)}"
    if not is_name(name):
        raise DataError(f"{where}: not a file name")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise DataError(f"{where}: the name leads out of the data folder")
    path = Path(image_dir, name)
    if need and not path.is_file():
        raise DataError(f"{where}: no such picture in {image_dir}; see --image-dir")
    if need and not path.resolve().is_relative_to(Path(image_dir).resolve()):
        raise DataError(f"{where}: a link that leads out of the data folder")
    return path


def image_dir_of(label_file, image_dir=None):
    """Where the pictures of a label file lie: --image-dir, images/ beside it (or beside its folder
    train, val or test), or its own folder."""
    beside = Path(label_file).parent
    if image_dir is None:
        above = beside.parent if beside.name in SPLITS else beside
        found = [p for p in (beside / "images", above / "images") if p.is_dir()]
        return found[0] if found else beside
    if not Path(image_dir).is_dir():
        raise DataError(f"--image-dir {image_dir}: no such folder")
    return Path(image_dir)


def find_picture(folder, name):
    """Name of a picture in folder, for tools that write a way to it before the name: the longest
    end of that way that is there."""
    name = name.replace("\\", "/").lstrip("/") if isinstance(name, str) else ""
    parts = PurePosixPath(name).parts
    for k in range(len(parts) if len(parts) < 100 else 0):
        end = "/".join(parts[k:])
        if ".." not in parts[k:] and is_name(end) and Path(folder, end).is_file():
            return end
    return parts[-1] if parts else ""


def stated_size(entry, width, height, where):
    """(width, height) of a picture as its label file states them, or None. Raises DataError."""
    size = entry.get(width), entry.get(height)
    if None in size:
        return None
    if not all(type(n) in (int, float) and 1 <= n <= MAX_COORDINATE for n in size):
        raise DataError(f"{where}: {width}, {height} are no picture's: {shown(repr(size))}")
    return int(size[0]), int(size[1])


def read_competition(label_file, image_dir=None, need_pictures=True):
    """Pages of {"images": {name: {"words": {id: {"points": [[x, y], ...], ...}}}}}, labels or
    predictions."""
    images = read_json(label_file)
    if isinstance(images, dict) and "shapes" in images:
        return read_labelme([label_file], image_dir)
    images = images.get("images") if isinstance(images, dict) else None
    if not isinstance(images, dict):
        raise DataError(f'{label_file}: no "images" object at the top; is this a label file?')
    meta_file = Path(label_file).parent / "meta.json"
    meta = read_json(meta_file) if meta_file.is_file() else {}
    meta = meta.get("images", {}) if isinstance(meta, dict) else {}
    folder, pages = image_dir_of(label_file, image_dir), []
    for name, entry in images.items():
        where = f"{label_file}: image {shown(name)}"
        words = entry.get("words") if isinstance(entry, dict) else None
        if not isinstance(words, dict):
            raise DataError(f'{where}: no "words" object; a page without text has "words": {{}}')
        page = Page(name, picture_path(folder, name, label_file, need_pictures))
        more = meta.get(name) if isinstance(meta, dict) else None
        page.group = entry.get("group", more.get("group") if isinstance(more, dict) else None)
        if page.group is not None and not isinstance(page.group, str):
            raise DataError(f"{where}: group {shown(repr(page.group))} is not a text")
        page.size = stated_size(entry, "img_w", "img_h", where)
        words = {key: word if isinstance(word, dict) else {} for key, word in words.items()}
        fields = ("points", []), ("transcription", None), ("ignore", False), ("confidence", 1.0)
        words = [(key, *(word.get(*f) for f in fields)) for key, word in words.items()]
        pages.append(fill_page(page, where, words))
    return pages


def read_icdar(files, image_dir=None):
    """Pages of ICDAR files gt_NAME.txt, res_NAME.txt or NAME.txt, NAME with or without the
    picture's suffix; in UTF-8 or Windows-1252. Text `###` = ignore."""
    pages, image_dir = [], image_dir_of(files[0], image_dir)
    pictures = pictures_of(image_dir)
    for file in files:
        name = re.sub("^(gt|res)_", "", file.stem)
        names = pictures.get(name, ())
        if len(names) != 1:
            raise DataError(f"{file}: {len(names)} pictures {name}.* in {image_dir}; one is needed")
        lines = enumerate(read_text(file, MAX_PAGE_BYTES, other="cp1252").split("\n"), 1)
        words = ((f"{n:04d}", *parse_icdar_line(s), False, 1.0) for n, s in lines if s.strip())
        page = Page(names[0], picture_path(image_dir, names[0], file))
        pages.append(fill_page(page, file, words))
    return pages


def pictures_of(folder):
    """{name without suffix, and with it: [names]} of the pictures in a folder."""
    names = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in PICTURES:
            names.setdefault(file.stem, []).append(file.name)
            names[file.name] = [file.name]
    return names


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_icdar_line(line):
    """`x1,y1,...,x4,y4,text` -> (points, text or None). Also `left, top, right, bottom, "text"`,
    with or without commas (ICDAR 2013), and outlines of more points.

    Digits after the 8th number are text, as prices are, unless the text is in quotes or four
    numbers or more follow.
    """
    line = line.strip()
    comma = "," if "," in line.split('"')[0] else None
    fields = line.split(comma, 2 * MAX_POINTS + 2)
    n = next((i for i, field in enumerate(fields) if not is_number(field)), len(fields))
    quoted = n < len(fields) and fields[n].lstrip().startswith('"')
    n = n if quoted or n >= 12 else min(n, 8)
    numbers = list(map(float, fields[: n - n % 2]))
    text = "".join(line.split(comma, len(numbers))[len(numbers) :])
    bare = text.strip()
    text = bare[1:-1] if len(bare) > 1 and bare[0] == bare[-1] == '"' else text
    points = list(zip(numbers[::2], numbers[1::2]))
    if len(points) == 2:
        points = rectangle(*points)
    return points, text or None


def rectangle(a, b):
    """Corners of the upright rectangle between two points, as lists of any length."""
    return [[*a], [*b[:1], *a[1:]], [*b], [*a[:1], *b[1:]]]


def read_paddle(label_file, image_dir=None):
    """Pages of a PaddleOCR Label.txt: `path<TAB>[{"transcription", "points", "difficult"?}, ...]` a
    line."""
    pages, folder = [], image_dir_of(label_file, image_dir)
    for number, line in enumerate(read_text(label_file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{label_file}: line {number}"
        name, _, words = line.partition("\t")
        words = read_json(f"{where}: after `picture<TAB>`", words)
        if not isinstance(words, list) or not all(isinstance(word, dict) for word in words):
            raise DataError(f"{where}: not `picture<TAB>JSON list of objects`")
        name = find_picture(folder, name)
        page, fields = Page(name, picture_path(folder, name, where)), []
        for i, word in enumerate(words, 1):
            text, points = word.get("transcription") or None, word.get("points", [])
            skip = word.get("difficult", False) or text == "*"
            fields.append((f"{i:04d}", points, text, skip, 1.0))
        pages.append(fill_page(page, f"{where}: image {shown(name)}", fields))
    return pages


def read_labelme(files, image_dir=None):
    """Pages of labelme files, one a picture: polygons and rectangles; the text is the description,
    or else the label, unless that is "text"; `###`, flag "ignore" or "difficult" = ignore."""
    pages = []
    for file in files:
        sheet, words = read_json(file), []
        shapes = sheet.get("shapes") if isinstance(sheet, dict) else None
        if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
            raise DataError(f'{file}: no "shapes" list of objects; is this a labelme file?')
        folder = image_dir_of(file, image_dir)
        name = find_picture(folder, sheet.get("imagePath"))
        for i, shape in enumerate(shapes, 1):
            points, kind = shape.get("points", []), shape.get("shape_type") or "polygon"
            if kind not in ("polygon", "rectangle", "oriented_rectangle", "rotation"):
                raise DataError(f"{file}: shape {i} is a {shown(kind)}; draw it as a polygon")
            corners = list(map(type, points)) if isinstance(points, list) else []
            if kind == "rectangle" and corners == [list, list]:
                points = rectangle(*points)  # of any values; parse_polygon judges them
            label, flags = shape.get("label"), shape.get("flags")
            text = shape.get("description") or (None if label == "text" else label)
            skip = shape.get("difficult") or isinstance(flags, dict) and flags.get("ignore")
            word_id = f"{i:04d}" if shape.get("id") is None else shape["id"]
            skip, confidence = skip or label == "###", shape.get("confidence", 1.0)
            words.append((word_id, points, text, skip, confidence))
        page = Page(name, picture_path(folder, name, file))
        page.size = stated_size(sheet, "imageWidth", "imageHeight", file)
        pages.append(fill_page(page, file, words))
    return pages


def folder_labels(folder):
    """(reader, source) of a folder that holds one unnamed set of labels, or None."""
    folder = Path(folder)
    if (folder / "Label.txt").is_file():
        return read_paddle, folder / "Label.txt"
    for pattern in ("gt_*.txt", "res_*.txt"):
        if files := sorted(folder.glob(pattern)):
            return read_icdar, files
    if files := [p for p in sorted(folder.glob("*.json")) if '"shapes"' in read_text(p)]:
        return read_labelme, files
    texts = {p: read_text(p, other="latin-1") for p in sorted(folder.glob("*.txt"))}
    files = [p for p, text in texts.items() if is_icdar(text) or not text.strip()]
    return (read_icdar, files) if any(map(is_icdar, texts.values())) else None


def is_icdar(text):
    """Whether a text begins as ICDAR's files do, whatever its name: eight numbers and commas."""
    return bool(re.match(r"(\s*-?[\d.]+\s*,){7}\s*-?[\d.]", text))


def find_labels(data, split):
    """(reader, source) of a split's labels in DATA, or None. A single file is every split's."""
    data = Path(data)
    if data.is_file() and data.suffix == ".json":
        return read_competition, data
    if data.is_file():
        icdar = data.name.startswith(("gt_", "res_")) or is_icdar(read_text(data, other="latin-1"))
        return (read_icdar, [data]) if icdar else (read_paddle, data)
    if split is None:
        return None
    if (data / f"{split}.json").is_file():
        return read_competition, data / f"{split}.json"
    if (data / f"{split}.txt").is_file():
        return read_paddle, data / f"{split}.txt"
    return folder_labels(data / split)


def load_labels(data, split=None, image_dir=None):
    """List of Pages of DATA: a folder and one of train, val, test, or one label file (then split is
    not used).

    Raises DataError when nothing is found or anything is wrong with it, naming file, image and
    word.
    """
    if not Path(data).exists():
        raise DataError(f"{data}: no such file or folder")
    found = find_labels(data, split) or folder_labels(data)
    if found is None:
        split = f"{data}: no labels of split {split or 'train, val or test'}"
        raise DataError(f"{split} (SPLIT.json, gt_*.txt, Label.txt or labelme's)")
    pages = found[0](found[1], image_dir)
    names = sorted(page.name for page in pages)
    if twice := [a for a, b in itertools.pairwise(names) if a == b]:
        raise DataError(f"{data}: image {shown(twice[0])} comes twice; join its labels")
    if not 0 < len(pages) <= MAX_PAGES:
        raise DataError(f"{data}: {len(pages) or 'no'} pages in it; up to {MAX_PAGES} are read")
    return pages


def has_split(data, split):
    """Whether DATA names this split itself (a single label file names none)."""
    return Path(data).is_dir() and find_labels(data, split) is not None


# ---------------------------------------------------------------- formats out


def page_words(page):
    """(id, points [[x, y], ...], text, ignore, confidence) of each word of a page, rounded."""
    points = [np.round(polygon, 4).tolist() for polygon in page.polygons]
    confidences = [round(confidence, 6) for confidence in page.confidences]
    return zip(page.ids, points, page.texts, page.ignore, confidences)


def pages_to_json(pages):
    """Pages as the competition's JSON object; words keep confidence and transcription where there
    are any."""
    images = {}
    for page in pages:
        words = {}
        for word_id, points, text, ignore, confidence in page_words(page):
            words[word_id] = word = {"points": points}
            if text is not None:
                word["transcription"] = text
            if confidence != 1.0:
                word["confidence"] = confidence
            if ignore:
                word["ignore"] = True
        images[page.name] = {"words": words}
        if page.size:
            images[page.name].update(img_w=int(page.size[0]), img_h=int(page.size[1]))
        if page.group is not None:
            images[page.name]["group"] = page.group
    return {"images": images}


def dumped(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def to_paddle(pages, split):
    lines = []
    for page in pages:
        keys = "transcription", "points", "difficult"
        words = [dict(zip(keys, (w[2] or "", w[1], w[3]))) for w in page_words(page)]
        lines.append(f"images/{page.name}\t{dumped(words)}\n")
    return {f"{split}.txt" if split else "Label.txt": "".join(lines)}


def to_icdar(pages, split):
    files = {}
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
        if len(PurePosixPath(page.name).parts) > 1:
            raise DataError(f"image {page.name}: ICDAR knows no sub folders; move its picture")
        files[page_file(files, page, split, "gt_{}.txt")] = "".join(lines)
    return files


def to_labelme(pages, split):
    files = {}
    for page in pages:
        shapes = []
        for word_id, points, text, ignore, confidence in page_words(page):
            shape = {"label": "text", "points": points, "group_id": None, "shape_type": "polygon"}
            shape |= {"description": text or "", "flags": {"ignore": True} if ignore else {}}
            shapes.append(shape | {"id": word_id, "confidence": confidence})
        sheet = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imageData": None}
        sheet["imagePath"] = ("../" if split else "") + f"images/{page.name}"
        if page.size:
            sheet |= {"imageWidth": page.size[0], "imageHeight": page.size[1]}
        files[page_file(files, page, split, "{}.json")] = dumped(sheet)
    return files


def page_file(files, page, split, pattern):
    """Path of a page's own label file, one of `files` to be. Raises DataError."""
    path = str(Path(split or "", pattern.format(PurePosixPath(page.name).stem)))
    if path in files:
        raise DataError(f"image {page.name}: {path} would hold several pages; rename its picture")
    return path


def to_json(pages, split):
    return {f"{split or 'train'}.json": dumped(pages_to_json(pages))}


FORMATS = {"json": to_json, "icdar": to_icdar, "paddle": to_paddle, "labelme": to_labelme}


def losses(pages, again):
    """What differs between pages and what was read back of them, as counts by kind."""
    lost, known = {}, {PurePosixPath(page.name): page for page in again}
    for page in pages:
        other = known[PurePosixPath(page.name)]
        lines = {"sizes": [(page.size, other.size)], "groups": [(page.group, other.group)]}
        lines["ids"] = zip(page.ids, other.ids)
        lines["confidences"] = zip(page.confidences, other.confidences)
        lines["ignore flags"] = zip(page.ignore, other.ignore)
        texts = [[None if t == "###" else t or None for t in p.texts] for p in (page, other)]
        lines["texts"] = zip(*texts)
        outlines = [[np.round(q, 4).tolist() for q in p.polygons] for p in (page, other)]
        lines["outlines (their smallest rectangle is kept)"] = zip(*outlines)
        for kind, pairs in lines.items():
            lost[kind] = lost.get(kind, 0) + sum(a != b for a, b in pairs)
    return {kind: count for kind, count in lost.items() if count}
