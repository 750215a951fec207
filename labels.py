"""What do people's label files say? Pages and their words, read from the competition's JSON,
ICDAR's, PaddleOCR's, labelme's and COCO's files. Polygons are [P, 2] in page pixels, EXIF
orientation applied; pixel (i, j) covers [i, i+1) x [j, j+1)."""

import re
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from os.path import exists, isabs, isfile, realpath, relpath
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import shapely

from db_postprocess import MAX_CROSSING, MAX_PAGE_POINTS, MAX_POINTS, rect_corners
from files import CONTROL, DataError, UsageError, read_json, read_text, shown

SPLITS = "train", "val", "test"
PICTURES = ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"
COCO_TEXTS = "text", "transcription", "utf8_string", "caption"
COCO_FLAGS = "iscrowd", "ignore", "difficult"
NO_CATEGORIES = "only COCO's labels have them; leave it out"
COCO_IGNORED = "ignore", "ignored", "illegible", "difficult", "###"  # names of categories
ICDAR = re.compile(r"(\s*-?[\d.]+\s*,){7}\s*-?[\d.]")  # how a file of any name begins
# an empty file, or a first line that may have a fault; not a list of names, such as classes.txt
NEARLY_ICDAR = re.compile(r"\s*($|(?=.*\d)([^,\n]{0,12},){7})")
A_NUMBER = r"[-.\w]{0,20}\d[-.\w]{0,20}\s*(,|$)"  # also with letters, by mistake
WHOLE = re.compile('"images"|\t\\[')  # what a file of several pages holds
WRAPPED = re.compile(r'^\s*(?:"(.*)"|(###))\s*$')  # quotes, or spaces around the mark, go
PRICE = re.compile(r"\d{1,3}(,\d{3})*(\.\d+)?")
NO_TEXTS = "", "TEMPORARY", "待识别"  # the last two are those of a new box in PPOCRLabel
PROPOSAL = "proposal: "  # how the label of a labelme shape begins that is not yet a word
LINE_END = re.compile("\r\n?|\n")

# names of files and folders: `valid` is Roboflow's, those with capitals are CVAT's, which calls an
# export without splits `default`
SPLIT_NAMES = {
    "train": "train Train",
    "val": "val valid validation Validation",
    "test": "test Test",
    None: "default .",
}

# files that hold a split, the last one Label Studio's
WHOLE_SPLITS = "{}.json", "jsons/{}.json", "annotations/instances_{}.json", "{}.txt"
WHOLE_SPLITS += "{}/Label.txt", "{}/_annotations.coco.json", "{}/result.json"

# limits of what is read from files, so that a hostile one ends in an error and not in swap
MAX_PAGE_BYTES = 2**24
MAX_PAGES = 100_000
MAX_TEXT = 10_000
MAX_PARTS = 100  # of a path
MAX_COORDINATE = 1e6
MAX_FAULTS = 20  # so many, or a few more, are named at once

# ---------------------------------------------------------------- faults


def gather(function, items):
    """[function(*item)] of items, tuples. After a DataError the next items are read, too, until
    there are MAX_FAULTS: the last is raised, with the others as its `others`. A UsageError is
    raised at once."""
    results = []
    faults = []
    for item in items:
        try:
            results.append(function(*item))
        except UsageError:
            raise
        except DataError as error:
            faults += [*error.others, error]
        if len(faults) >= MAX_FAULTS:
            break
    raise_together(faults)
    return results


def raise_together(faults):
    """Raise the last of DataErrors, if there is one, with the others as its `others`."""
    if faults:
        error = faults.pop()
        error.others = faults
        raise error


# ---------------------------------------------------------------- pages and words


@dataclass
class Page:
    """One picture and its N labelled (or predicted) words.

    path: of the picture; or the picture itself, uint8 RGB [H, W, 3], where no file holds it.
    polygons: N arrays [P, 2], page pixels; None if its labels are not known.
    ignore: N bools (don't care). texts: N strings or None. confidences: N floats, 1.0 for labels.
    size: (width, height) if the label file states it, or of the opened picture.
    source: the label file.

    `data.inspect_pages` sets what only the picture tells: digest of its bytes, thumbnail, and
    repaired, the words as training takes them (data.Repaired)."""

    name: str
    path: Path
    polygons: list = field(default_factory=list)
    ignore: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    confidences: list = field(default_factory=list)
    group: str | None = None
    size: tuple | None = None
    look: tuple | None = None  # predict.Look of a first look
    digest: str | None = None
    thumbnail: np.ndarray | None = None
    repaired: tuple | None = None
    source: Path | None = None

    def add(self, word_id, points, text=None, ignore=False, confidence=1.0):
        self.ids.append(str(word_id))
        self.polygons.append(points)
        self.texts.append(text)
        self.ignore.append(bool(ignore) or text == "###")
        self.confidences.append(float(confidence))


class Word(NamedTuple):
    """A word as a file has it, of any types until `fill_page` has checked them."""

    id: object
    points: object
    text: object = None
    ignore: object = False
    confidence: object = 1.0


def get(value, key, default=None):
    """value[key]; the default also where a file holds something else than an object."""
    return value.get(key, default) if isinstance(value, dict) else default


def parse_polygon(points, where):
    """Points [[x, y], ...] as a float64 array [P, 2]. Raises DataError naming `where`."""
    count = len(points) if isinstance(points, list) else 0
    if not 3 <= count <= MAX_POINTS:
        raise DataError(where, f"{count} points", f"3 to {MAX_POINTS} are needed")

    polygon = np.zeros(0)
    with suppress(TypeError, ValueError, OverflowError):
        polygon = np.array(points, np.float64)
    if polygon.shape != (count, 2) or not (np.abs(polygon) <= MAX_COORDINATE).all():
        raise DataError(where, f"its points are not [x, y] of numbers within {MAX_COORDINATE:g}")

    if count > MAX_CROSSING and not shapely.is_valid(shapely.polygons(polygon)):
        raise DataError(where, "crosses itself", f"up to {MAX_CROSSING} points may do so")
    return polygon


def check_word(where, word_id, points, text, ignore, confidence):
    """What Page.add takes. Raises DataError naming `where` and the word."""
    where = f"{where}: word {shown(word_id)}"
    points = parse_polygon(points, where)
    if confidence is None:  # as in files of what was drawn by hand
        confidence = 1.0
    if type(confidence) not in (int, float) or not 0 <= confidence <= 1:
        raise DataError(where, f"confidence {shown(repr(confidence))} is not in 0..1")
    if ignore not in (None, False, True):
        raise DataError(where, f"ignore flag {shown(repr(ignore))} is not true or false")
    is_text = isinstance(text, str) and not re.search("[\ud800-\udfff]", text)
    if text is not None and not (is_text and len(text) <= MAX_TEXT):
        raise DataError(where, f"transcription is not a text of up to {MAX_TEXT} characters")
    return word_id, points, text, ignore, confidence


def fill_page(page, words, width=None, height=None, group=None):
    """The page, with words (Words, or tuples of their fields), a stated size and a group added.
    Raises DataError."""
    where = f"{page.source}: image {shown(page.name)}"
    if not isinstance(group, str | None):
        raise DataError(where, f"group {shown(repr(group))} is not a text")
    page.group = group or None  # "" names none
    size = width, height
    if None not in size:
        if not all(type(n) in (int, float) and 1 <= n <= MAX_COORDINATE for n in size):
            raise DataError(where, f"no picture has {shown(f'{width!r} x {height!r}')} px")
        page.size = int(width), int(height)

    for word in gather(partial(check_word, where), words):
        page.add(*word)
    if sum(map(len, page.polygons)) > MAX_PAGE_POINTS:
        raise DataError(where, "too many words", f"up to {MAX_PAGE_POINTS} points are read")
    page.ids = tell_apart(page.ids)
    return page


def tell_apart(ids):
    """The ids, each once: labelme copies a shape with its id, and the number of a new shape may be
    the id of another. The first keeps it, the next becomes ID-2."""
    given = set(ids)
    apart = {}  # in their order
    for word_id in ids:
        name = word_id
        number = 2
        while name in apart or name != word_id and name in given:
            name = f"{word_id}-{number}"
            number += 1
        apart[name] = word_id
    return list(apart)


# ---------------------------------------------------------------- pictures


def lookalike(name, others):
    """Words that end an error where another name differs by its Unicode form alone, or ""."""
    form = normalize("NFC", name)
    for other in others:
        if normalize("NFC", other) == form:
            return f"; two names that look alike: {name!a} and {other!a}, rename one"
    return ""


def check_name(name, where):
    """Raises DataError on what a label file cannot hold as the name of a picture."""
    if not 0 < len(name) < 4096 or CONTROL.search(name):
        raise DataError(where, "not a file name", "it is empty, too long or of several lines")


def way_ends(way):
    """The ends of the path under which a tool saw a picture, longest first: the folder may have had
    another place there."""
    parts = PurePosixPath(str(way).replace("\\", "/").lstrip("/")).parts[-MAX_PARTS:]
    ends = [parts[k:] for k in range(len(parts))]
    return ["/".join(end) for end in ends if ".." not in end] or [""]


def find_page(places, names, source, need=True):
    """A Page of the label file `source`, of the first of the names that is a picture in one of the
    places (folders). Raises DataError where none is, but for need=False."""
    there = ((p, name) for name in names for p in places if isfile(p / name))
    place, name = next(there, (places[0], names[-1]))
    where = f"{source}: image {shown(name)}"
    check_name(name, where)
    path = place / name
    real_path = realpath(path)
    real_place = realpath(place)
    if not Path(real_path).is_relative_to(real_place):
        raise DataError(where, "leads out of the data folder", "copy it, or link all of images/")
    if need and not isfile(path):
        hint = lookalike(path.name, [other.name for other in path.parent.glob("*")])
        raise DataError(
            where,
            f"no such picture in {place}",
            f"see --image-dir, or put images/ beside that file{hint}",
        )
    # the copy of an absolute name would be the original, and its folder may be reached by a link;
    # ./NAME is another name of one picture
    inside = relpath(real_path, real_place) if isabs(name) else relpath(path, place)
    return Page(inside, path, source=source)


def image_dir_of(label_file, image_dir):
    """The folders in which the pictures of a label file may lie, the likeliest first: --image-dir
    and images/ in it; without that flag images/ beside the file or beside its folder (train, jsons,
    ...), or else its own. Folders of its split's name in them come first, and if there is none,
    those of all splits come last. Raises UsageError."""
    beside = Path(label_file).parent
    stem = Path(label_file).stem.removeprefix("instances_")
    if image_dir is None:
        roots = [beside / "images"]
        if re.fullmatch("(?i)train|val|valid|validation|test|jsons|annotations", beside.name):
            roots.append(beside.parent / "images")
        roots = [*filter(Path.is_dir, roots)] or [beside]
    else:
        roots = [Path(image_dir), Path(image_dir, "images")]
    if not roots[0].is_dir():
        where = f"--image-dir {image_dir}" if image_dir else roots[0]
        raise UsageError(where, "no such folder")

    places = []
    for root in roots:
        named = [root / name for name in (stem, beside.name) if (root / name).is_dir()]
        others = [] if named else [root / split for split in SPLITS]
        places += [*named, root, *others]
    return [*filter(Path.is_dir, places)]


# ---------------------------------------------------------------- the competition's JSON


def read_competition(label_file, image_dir=None, need_pictures=True, categories=()):
    """Pages of {"images": {name: {"words": {id: {"points": [[x, y], ...], ...}}}}}, labels or
    predictions; a group may stand in meta.json beside it. Words whose points are [] or null are
    left out; where no page of labels has "words", all pages are there to be predicted. JSON of
    labelme and COCO is read as such. Raises DataError."""
    sheet = read_sheet(label_file)
    images = get(sheet, "images")
    if isinstance(images, list):
        return read_coco(label_file, sheet, image_dir, categories)
    if categories:
        raise UsageError("--categories", NO_CATEGORIES)
    if get(sheet, "shapes") is not None:
        return read_labelme([label_file], image_dir)
    if not isinstance(images, dict):
        raise DataError(label_file, 'no "images" object at the top', "is this a label file?")

    meta_file = Path(label_file).parent / "meta.json"
    meta = get(read_json(meta_file), "images") if meta_file.is_file() else None
    places = image_dir_of(sheet_files(label_file)[0], image_dir)
    # predictions always have words: a file without them has another form, not pages without text
    is_labelled = not need_pictures or any(
        get(entry, "words") is not None for entry in images.values()
    )

    def read(name):
        entry = images.pop(name)  # so that its memory is freed
        where = f"{label_file}: image {shown(name)}"
        words = get(entry, "words") if is_labelled else {}
        if not isinstance(words, dict):
            raise DataError(where, 'no "words" object', 'a page without text has "words": {}')
        page = find_page(places, [name], label_file, need_pictures)
        group = get(entry, "group", get(get(meta, name), "group"))
        words = competition_words(words)
        return fill_page(page, words, get(entry, "img_w"), get(entry, "img_h"), group)

    return gather(read, zip(list(images)))


def sheet_files(path):
    """The files that a path names, which may be a pattern, or itself hold brackets."""
    return [path] if exists(path) else sorted(glob(str(path))) or [path]


def read_sheet(label_file):
    """The JSON of a label file. Each line of a .jsonl file is such a sheet, of other pages; the
    lines of the file, or of all files that a pattern names, become one. Raises DataError."""
    if Path(label_file).suffix != ".jsonl":
        return read_json(label_file)
    images = {}
    for file in sheet_files(label_file):
        for number, line in text_lines(file):
            where = f"{file}: line {number}"
            pages = get(read_json(where, line), "images")
            if not isinstance(pages, dict) or pages.keys() & images.keys():
                raise DataError(where, "not a page, or one that came before", "remove the line")
            images |= pages
    return {"images": images}


def competition_words(words):
    for word_id, word in words.items():
        # points that are [] or null; a word that lacks the key is an error, which fill_page raises
        if isinstance(word, dict) and not word.get("points", word):
            continue
        keys = "points", "transcription", "ignore", "confidence"
        yield word_id, *map(partial(get, word), keys)


# ---------------------------------------------------------------- COCO


def read_coco(label_file, sheet, image_dir, categories):
    """Pages of COCO's {"images": [{id, file_name}], "annotations": [{image_id, category_id,
    segmentation, bbox, iscrowd}]} as CVAT, Label Studio and Roboflow write it. Each polygon is a
    word, or else the bbox, turned by the attribute "rotation"; the text is the annotation's or its
    attribute "text", "transcription", "utf8_string" or "caption"; iscrowd, "ignore", "difficult"
    and categories of COCO_IGNORED = ignore. categories: the names of those that are words, or all
    are. Raises DataError, UsageError."""
    words = coco_words(label_file, sheet, categories)
    places = image_dir_of(label_file, image_dir)
    images = {repr(get(image, "id")): image for image in sheet["images"]}
    if len(images) < len(sheet["images"]):
        raise DataError(label_file, "two pictures have one id", "number them anew")

    def read(key, image):
        page = find_page(places, way_ends(get(image, "file_name")), label_file)
        return fill_page(page, words.pop(key, ()), get(image, "width"), get(image, "height"))

    pages = gather(read, images.items())
    if words:
        raise DataError(label_file, f"annotations of picture {next(iter(words))}, which it lacks")
    return pages


def coco_words(label_file, sheet, categories):
    """{repr of a picture's id: its Words}; says which categories there are, if several."""
    annotations = sheet.get("annotations", [])
    listed = sheet.get("categories", [])
    if not isinstance(annotations, list) or not isinstance(listed, list):
        raise DataError(label_file, 'no lists "annotations" and "categories" beside "images"')
    names = {repr(get(c, "id")): str(get(c, "name")) for c in listed}

    words = {}
    counts = Counter()

    def read(number, annotation):
        # attributes of CVAT's, such as the text, count as keys of the annotation
        where = f"{label_file}: annotation {number}"
        attributes = get(annotation, "attributes") or {}
        is_object = isinstance(attributes, dict) and isinstance(annotation, dict)
        annotation = attributes | annotation if is_object else {}

        name = names.get(repr(annotation.get("category_id")), "without a name")
        is_ignored = name.lower() in COCO_IGNORED
        counts[name] += 1
        if categories and not is_ignored and name not in categories:
            return

        # its text, and an outline for each polygon
        text = next(filter(None, map(annotation.get, COCO_TEXTS)), None)
        # the flag as it stands there, since one such as "false" is refused later
        ignore = is_ignored or next(filter(None, map(annotation.get, COCO_FLAGS)), False)
        picture = repr(annotation.get("image_id"))
        for k, points in enumerate(coco_outlines(annotation, where)):
            word_id = f"{annotation.get('id', number)}.{k}".removesuffix(".0")
            word = word_id, points, text, ignore, annotation.get("score")
            words.setdefault(picture, []).append(word)

    gather(read, enumerate(annotations, 1))
    there = ", ".join(f"{shown(name)} ({count})" for name, count in counts.items())
    for name in categories:
        if name not in names.values():
            raise UsageError(label_file, f"no category {name!r}", f"there are {there}")
    if len(counts) > 1 and not categories:
        remedy = "data.py convert --categories chooses"
        print(f"{label_file}: all categories are words: {there}; {remedy}", file=sys.stderr)
    return words


def coco_outlines(annotation, where):
    """The polygons of an annotation, or its bbox, as lists of points. Raises DataError."""
    outlines = annotation.get("segmentation")
    if isinstance(outlines, dict) and not annotation.get("iscrowd"):  # a crowd's bbox will do
        raise DataError(where, "a mask (RLE)", "export it as a polygon")
    if outlines and isinstance(outlines, list):
        return [as_points(flat) if isinstance(flat, list) else flat for flat in outlines]

    box = annotation.get("bbox")
    pairs = [box[:2], box[2:], [annotation.get("rotation", 0), 0]] if isinstance(box, list) else []
    (x, y), (w, h), (angle, _) = parse_polygon(pairs, f"{where}: bbox")
    if not angle:  # as it is, to the last digit: a run's pages are compared with those of before
        return [rectangle([[x, y], [x + w, y + h]])]
    turned = x + w / 2, y + h / 2, w, h, np.deg2rad(angle)
    return rect_corners(np.array([turned])).tolist()  # from the upper left, unlike OpenCV's


def as_points(flat):
    """[x, y, x, y, ...] as [[x, y], ...]."""
    return [flat[k : k + 2] for k in range(0, len(flat), 2)]


def rectangle(points):
    """Corners of the upright rectangle between two points; any others are left as they are."""
    with suppress(TypeError, ValueError):
        (left, top), (right, bottom) = points
        return [[left, top], [right, top], [right, bottom], [left, bottom]]
    return points


# ---------------------------------------------------------------- ICDAR


def text_lines(path, *options):
    """[(number, line)] of a text's lines that hold something."""
    lines = LINE_END.split(read_text(path, *options))
    return [pair for pair in enumerate(lines, 1) if pair[1].strip()]


def read_icdar(files, image_dir):
    """Pages of ICDAR files gt_NAME.txt, res_NAME.txt or NAME.txt, NAME with or without the
    picture's suffix; in UTF-8 or Windows-1252. Text `###` = ignore. How many numbers most lines
    have decides where one can be read in two ways; says how many others there are. Raises
    DataError."""
    # a label file may name its picture with or without the suffix
    place = image_dir_of(files[0], image_dir)[0]
    pictures = {}
    for file in sorted(place.iterdir()):
        if file.suffix.lower() in PICTURES:
            pictures.setdefault(file.stem, []).append(file.name)
            pictures[file.name] = [file.name]

    # do most lines have 4 numbers, or 8?
    sheets = [text_lines(file, MAX_PAGE_BYTES, "cp1252") for file in files]
    counts = Counter(len(parse_icdar_line(line)[0]) for lines in sheets for _, line in lines)
    usual = next((n for n in (4, 8) if 2 * counts[n] > counts.total()), None)
    unlike = []  # lines that have not

    def read(file, lines):
        name = re.sub("^(gt|res)_", "", file.stem)
        names = pictures.get(name, ())
        if len(names) != 1:
            raise DataError(file, f"{len(names)} pictures {name}.* in {place}", "one is needed")

        def read_line(number, line):
            numbers, text = parse_icdar_line(line, usual)
            where = f"{file}: line {number}"
            # too few, and a "text" that begins like one: a coordinate got lost, or holds a letter
            if len(numbers) < (usual or 4) and re.match(A_NUMBER, text or "") and '"' not in line:
                raise DataError(where, f"{shown(line)} begins with too few numbers")
            if usual and len(numbers) != usual:
                unlike.append(where)
            return Word(f"{number:04d}", rectangle(as_points(numbers)), text)

        words = gather(read_line, lines)
        return fill_page(find_page([place], names, file), words)

    pages = gather(read, zip(files, sheets))
    if unlike:
        what = f"{len(unlike)} lines have more or less than the usual {usual} numbers"
        print(f"warning: {what}, the first: {unlike[0]}", file=sys.stderr)
    return pages


def parse_icdar_line(line, usual=None):
    """A line -> (coordinates, text or None). Four numbers, of ICDAR 2013 and CVAT, with commas or
    spaces: left, top, right, bottom. Eight, of ICDAR 2015: digits behind them are text, as prices
    are. Curved words have six points and more, or a text in quotes behind any number of them.
    usual: how many numbers most lines have; then a longer price is text, too."""
    line = line.strip()
    comma = "," if "," in line.split('"')[0] else None
    fields = line.split(comma, 2 * MAX_POINTS + 2)
    numbers = []
    with suppress(ValueError):
        for text in fields:
            numbers.append(float(text))

    count = len(numbers)
    is_quoted = count < len(fields) and fields[count].lstrip().startswith('"')
    used = count // 2 * 2
    if 8 <= count < 12 and not is_quoted:
        used = 8
    elif usual and PRICE.fullmatch(",".join(fields[usual:count])) and not is_quoted:
        used = usual

    text = "".join(line.split(comma, used)[used:])
    return numbers[:used], WRAPPED.sub(r"\1\2", text) or None


# ---------------------------------------------------------------- PaddleOCR and labelme


def read_paddle(label_file, image_dir):
    """Pages of PaddleOCR's lines: picture<TAB>[{"transcription", "points", "difficult"?}, ...].
    Raises DataError."""
    places = image_dir_of(label_file, image_dir)

    def read(number, line):
        where = f"{label_file}: line {number}"
        name, _, listed = line.partition("\t")
        listed = read_json(f"{where}: after `picture<TAB>`", listed)
        if not isinstance(listed, list):
            raise DataError(where, "not `picture<TAB>JSON list of objects`")
        words = []
        for i, word in enumerate(listed, 1):
            text = get(word, "transcription")
            if text in NO_TEXTS:
                text = None
            ignore = get(word, "difficult") or text == "*"
            words.append(Word(f"{i:04d}", get(word, "points"), text, ignore))
        return fill_page(find_page(places, way_ends(name), label_file), words)

    return gather(read, text_lines(label_file))


def read_labelme(files, image_dir):
    """Pages of labelme's files, one a picture: polygons and rectangles; text is the description, or
    else the label, unless that is "text"; `###`, flag "ignore" or "difficult" = ignore. A shape
    whose label begins with PROPOSAL is left out. "group" is a key of ours, which labelme keeps.
    Raises DataError."""

    def read(file):
        sheet = read_json(file)
        shapes = get(sheet, "shapes")
        if not isinstance(shapes, list):
            raise DataError(file, 'no "shapes" list of objects', "is this a labelme file?")
        shapes = [s for s in shapes if not str(get(s, "label")).startswith(PROPOSAL)]
        words = gather(partial(labelme_word, file), enumerate(shapes, 1))
        places = image_dir_of(file, image_dir)
        page = find_page(places, way_ends(get(sheet, "imagePath")), file)
        return fill_page(page, words, *map(sheet.get, ("imageWidth", "imageHeight", "group")))

    return gather(read, zip(files))


def labelme_word(file, number, shape):
    points = get(shape, "points")
    kind = get(shape, "shape_type") or "polygon"
    if kind not in ("polygon", "rectangle", "oriented_rectangle", "rotation"):
        raise DataError(file, f"shape {number} is a {shown(kind)}", "draw it as a polygon")
    if kind == "rectangle":
        points = rectangle(points)

    label = get(shape, "label")
    text = get(shape, "description") or (None if label == "text" else label)
    ignore = get(shape, "difficult") or get(get(shape, "flags"), "ignore") or label == "###"
    word_id = get(shape, "id") or f"{number:04d}"
    # a score is X-AnyLabeling's
    return word_id, points, text, ignore, get(shape, "confidence", get(shape, "score"))


# ---------------------------------------------------------------- which format?


def folder_labels(folder):
    """(reader, files) of a folder that holds a label file for each picture, or None."""
    if files := sorted(folder.glob("gt_*.txt")) or sorted(folder.glob("res_*.txt")):
        return read_icdar, files
    if files := [p for p in sorted(folder.glob("*.json")) if '"shapes"' in read_text(p)]:
        return read_labelme, files

    texts = {p: read_text(p, other="latin-1") for p in sorted(folder.glob("*.txt"))}
    if not any(map(ICDAR.match, texts.values())):
        return None
    # an empty file belongs to a page without text, and a faulty one has to be named
    return read_icdar, [p for p, text in texts.items() if NEARLY_ICDAR.match(text)]


def is_of_one_page(file):
    """Whether a label file describes one picture of its name, such as test.jpg for test.txt, and
    not a whole split."""
    beside = any(p.suffix.lower() in PICTURES for p in file.parent.glob(f"{file.stem}.*"))
    return beside and not WHOLE.search(read_text(file, other="latin-1"))


def find_labels(data, split):
    """(reader, source) of a split's labels in DATA, or None. A single file serves all splits."""
    data = Path(data)
    names = SPLIT_NAMES[split].split()
    files = (data / pattern.format(name) for name in names for pattern in WHOLE_SPLITS)
    for file in filter(Path.is_file, (data, *files)):
        if file != data and is_of_one_page(file):
            continue
        if file.suffix.startswith(".json"):  # and .jsonl
            return read_competition, file
        if re.match("gt_|res_", file.name) or ICDAR.match(read_text(file, other="latin-1")):
            return read_icdar, [file]
        return read_paddle, file
    return next(filter(None, (folder_labels(data / name) for name in names)), None)


def load_labels(data, split=None, image_dir=None, categories=()):
    """Pages of DATA: a folder and one of train, val, test, or one label file. categories: see
    `read_coco`. Raises DataError that names file, image and word; it brings further faults along,
    see `gather`. Raises UsageError where there is no DATA."""
    if not Path(data).exists():
        raise UsageError(data, "no such file or folder")
    labels = find_labels(data, split) or find_labels(data, None)
    if not labels:
        raise DataError(
            data,
            f"no labels of split {split or 'train, val or test'}",
            "name the file, or call it train.json, annotations/instances_train.json, result.json, "
            "train/_annotations.coco.json, Label.txt, gt_PICTURE.txt or, of labelme, PICTURE.json",
        )

    reader, source = labels
    if categories:
        if reader is not read_competition:
            raise UsageError("--categories", NO_CATEGORIES)
        reader = partial(reader, categories=categories)
    pages = reader(source, image_dir)
    if not 0 < len(pages) <= MAX_PAGES:
        raise DataError(data, f"{len(pages) or 'no'} pages in it", f"up to {MAX_PAGES} are read")
    name, count = Counter(page.name for page in pages).most_common(1)[0]
    if count > 1:
        raise DataError(data, f"image {shown(name)} comes twice", "join its labels")
    return pages


def has_split(data, split):
    """Whether DATA names this split itself (a single label file names none)."""
    return Path(data).is_dir() and find_labels(data, split)
