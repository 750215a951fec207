"""Label formats: what people's tools write is read; every pair of formats goes there and back."""

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path, PurePath

import cv2
import numpy as np
import pytest

import data
import formats
import labels
from files import DataError, UsageError
from labels import load_labels

SAMPLES = Path(__file__).parent / "data" / "convert"
OUTLINES = "outlines (their smallest rectangle is kept)"
QUAD = [[1, 2], [30, 2], [30, 9], [1, 9]]
# what a format cannot hold; where ICDAR loses an outline it keeps the smallest rectangle
LOST = {
    "json": set(),
    "labelme": set(),
    # `*` is its don't care, and `###` the text of what is ignored
    "paddle": {"ids", "confidences", "sizes", "groups", "ignore flags", "texts"},
    "icdar": {"ids", "confidences", "sizes", "groups", "texts", "outlines"},
}


def blank(path, height=40, width=40):
    path.parent.mkdir(exist_ok=True, parents=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def write_json(folder, images):
    """Writes the competition's JSON, and blank pictures."""
    for name in images:
        blank(folder / "images" / name, 90, 120)
    (folder / "train.json").write_text(json.dumps({"images": images}))


def random_pages(rng, folder, quads=False):
    """Pages with words of every kind a label file may hold, written as the competition's JSON."""
    pages, images = [], {}
    for name in ("a.png", "b 1.jpg", "[c].png"):
        page = labels.Page(name, None, size=(120, 90), group=str(rng.choice(["g", "h", "가"])))
        images[name] = {"words": {}, "img_w": 120, "img_h": 90, "group": page.group}
        for i in range(int(rng.integers(0, 9))):
            points = rng.uniform(0, 90, (4 if quads else int(rng.integers(3, 9)), 2)).round(4)
            text = str(rng.choice(["12.00", 'a, "b" | c', "김밥\t1", "text", "1,2", " x\\", "###"]))
            text = rng.choice([text, "a\nb", "*", None], p=[0.7, 0.1, 0.1, 0.1])
            confidence, ignore = rng.choice([1.0, round(rng.random(), 6)]), bool(rng.random() < 0.3)
            page.add(f"w{i}", points, text, ignore, confidence)
            word = {"points": points.tolist(), "confidence": confidence, "ignore": ignore}
            images[name]["words"][f"w{i}"] = word | {"transcription": text}
        pages.append(page)
    write_json(folder, images)
    return pages


def lost(pages, again):
    """Counts of what differs between pages, by the words convert has for it."""
    counts, by_name = Counter(), {page.name: page for page in again}
    for page in pages:
        other = by_name[page.name]
        counts.update(sizes=page.size != other.size, groups=page.group != other.group)
        texts = [[None if t == "###" else t for t in p.texts] for p in (page, other)]
        outlines = [[polygon.tolist() for polygon in p.polygons] for p in (page, other)]
        for kind, *values in (
            ("ids", page.ids, other.ids),
            ("confidences", page.confidences, other.confidences),
            ("ignore flags", page.ignore, other.ignore),
            ("texts", *texts),
            (OUTLINES, *outlines),
        ):
            counts[kind] += sum(a != b for a, b in zip(*values, strict=True))
    return {kind: n for kind, n in counts.items() if n}


def kinds(pages, again):
    return {kind.split(" (")[0] for kind in lost(pages, again)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("to", list(formats.FORMATS))
@pytest.mark.parametrize("back", list(formats.FORMATS))
def test_there_and_back(tmp_path, to, back, seed, capsys):
    """Nothing is lost but what one of the two formats cannot hold, and convert says so."""
    pages = random_pages(np.random.default_rng(seed), tmp_path / "in")
    data.convert(tmp_path / "in", tmp_path / "there", to)
    said = capsys.readouterr().out
    there = load_labels(tmp_path / "there", "train")
    assert kinds(pages, there) <= LOST[to]
    shown = {f"{n} {kind}" for kind, n in lost(pages, there).items()} or {"nothing"}
    assert set(said.strip().split("lost: ")[1].split(", ")) == shown
    data.convert(tmp_path / "there", tmp_path / "back", back)
    again = load_labels(tmp_path / "back", "train")
    assert kinds(pages, again) <= LOST[to] | LOST[back]
    for file in (tmp_path / "there" / "train").glob("*.json"):  # as labelme finds the picture
        assert (file.parent / json.loads(file.read_text())["imagePath"]).is_file()
    if LOST[back] <= LOST[to]:
        assert "lost: nothing" in capsys.readouterr().out
    assert sorted(p.name for p in again) == sorted(p.name for p in pages)


@pytest.mark.parametrize("to", list(formats.FORMATS))
def test_an_empty_text_that_a_format_takes_for_none_is_lost(tmp_path, to, capsys):
    """The characters of a missing one are guessed, so that official CLEval changes."""
    words = {
        n: {"points": QUAD, "transcription": text} for n, text in (("0001", ""), ("0002", "a"))
    }
    write_json(tmp_path / "in", {"a.png": {"words": words, "img_w": 120, "img_h": 90}})
    data.convert(tmp_path / "in", tmp_path / "out", to)
    (page,) = load_labels(tmp_path / "out", "train")
    kept = page.texts == ["", "a"]
    assert kept == (to == "json") == ("texts" not in capsys.readouterr().out)


def test_icdar_keeps_quads_and_texts_of_words_that_count(tmp_path):
    pages = random_pages(np.random.default_rng(5), tmp_path / "in", quads=True)
    data.convert(tmp_path / "in", tmp_path / "out", "icdar")
    again = {page.name: page for page in load_labels(tmp_path / "out", "train")}
    assert "outlines" not in kinds(pages, again.values())
    for page in pages:
        for text, skip, other in zip(page.texts, page.ignore, again[page.name].texts):
            assert other == ("###" if skip else text and text.replace("\n", " "))


def sample(tmp_path, name):
    """A sample file with empty pictures of the size it expects beside it."""
    for picture in ("receipt_1.jpg", "receipt_2.jpg"):
        blank(tmp_path / picture, 640, 480)
    (tmp_path / name).write_bytes((SAMPLES / name).read_bytes())
    return tmp_path


def test_a_folder_of_ppocrlabel(tmp_path):
    """Its other files and crops lie beside Label.txt; Windows' line ends and byte order mark."""
    lines = (sample(tmp_path, "Label.txt") / "Label.txt").read_text().replace("Milk 1L", "*")
    (tmp_path / "Label.txt").write_bytes(("\ufeff" + lines).replace("\n", "\r\n").encode())
    (tmp_path / "fileState.txt").write_text("C:\\r\\receipt_1.jpg\t1\n")
    (tmp_path / "Cache.cach").write_text("receipts/receipt_1.jpg\t[]\n")
    (tmp_path / "rec_gt.txt").write_text("crop_img/receipt_1_crop_0.jpg\tMilk\n")
    blank(tmp_path / "crop_img" / "receipt_1.jpg")
    one, two = load_labels(tmp_path)
    assert (one.name, two.name) == ("receipt_1.jpg", "receipt_2.jpg") and one.path.is_file()
    assert one.texts == ["햇살 마트", "*", "12.00", "###"] and one.ignore == [0, 1, 0, 1]
    assert one.polygons[0].tolist() == [[120, 40], [360, 44], [359, 80], [119, 76]]
    assert [len(polygon) for polygon in two.polygons] == [4, 6] and two.ignore == [False, True]


def test_a_box_that_ppocrlabel_was_told_no_text_of_has_none(tmp_path):
    """The name that it gives to a new box counted as nine characters in official CLEval."""
    blank(tmp_path / "a.jpg")
    texts = ["TEMPORARY", "待识别", "", None, "12.00"]
    words = [{"points": QUAD, "transcription": text, "difficult": False} for text in texts]
    (tmp_path / "Label.txt").write_text(f"x/a.jpg\t{json.dumps(words)}\n")
    assert load_labels(tmp_path)[0].texts == [None, None, None, None, "12.00"]


def test_a_labelme_file(tmp_path):
    (page,) = load_labels(sample(tmp_path, "receipt_1.json"))
    assert page.name == "receipt_1.jpg" and page.size == (480, 640)
    assert page.texts == ["Sunny Mart", None, "TOTAL", "###"] and page.ignore == [0, 0, 0, 1]
    assert page.polygons[1].tolist() == [[30, 120], [210, 120], [210, 150], [30, 150]]
    assert len(page.polygons[2]) == 5
    assert load_labels(tmp_path / "receipt_1.json")[0].texts == page.texts


def test_labels_without_a_split(tmp_path):
    sample(tmp_path, "Label.txt")
    for to in formats.FORMATS:
        data.convert(tmp_path / "Label.txt", tmp_path / to, to)
        pages = load_labels(tmp_path / to, "train")
        corners = [len(polygon) for page in pages for polygon in page.polygons]
        assert corners == [4, 4, 4, 4, 4, 4 if to == "icdar" else 6]


def test_convert_command(tmp_path, script, one_line):
    sample(tmp_path, "Label.txt")
    result = script("data.py", "convert", ".", "out", "--to", "icdar")
    assert result.returncode == 0, result.stderr
    assert "2 pages, 6 words as icdar; lost: " in result.stdout and "1 outlines" in result.stdout
    lines = (tmp_path / "out" / "gt_receipt_1.txt").read_text().splitlines()
    assert lines[0] == "120,40,360,44,359,80,119,76,햇살 마트" and lines[3].endswith(",###")
    assert script("data.py", "check", "out").returncode == 0
    one_line(script("data.py", "convert", ".", "out", "--to", "json"), "out: exists", code=2)
    one_line(script("data.py", "convert", ".", "b", "--to", "jsn"), "jsn", "json", code=2)


def test_splits_may_have_pictures_of_one_name(tmp_path, capsys):
    """As those of ICDAR 2015: each page is compared with what was written of it."""
    for split, count in (("train", 3), ("val", 2)):
        words = {f"{i:04d}": {"points": QUAD, "transcription": split} for i in range(count)}
        blank(tmp_path / "in" / "images" / split / "img_1.jpg")
        sheet = json.dumps({"images": {"img_1.jpg": {"words": words, "group": split}}})
        (tmp_path / "in" / f"{split}.json").write_text(sheet)
    data.convert(tmp_path / "in", tmp_path / "out", "icdar")
    assert capsys.readouterr().out.endswith("5 words as icdar; lost: 2 groups, 5 ids\n")


@pytest.mark.parametrize("to", ["paddle", "labelme"])
def test_a_name_that_begins_with_images_is_lost_and_said_so(tmp_path, to, capsys):
    """The folder images/ is where pictures are looked for; their names begin behind it."""
    write_json(tmp_path / "in", {"a.png": {"words": {}}})
    sheet = json.dumps({"images": {"images/a.png": {"words": {}}}})
    (tmp_path / "in" / "train.json").write_text(sheet)
    data.convert(tmp_path / "in", tmp_path / "out", to, tmp_path / "in")
    assert "lost: 1 names" in capsys.readouterr().out
    assert [page.name for page in load_labels(tmp_path / "out", "train")] == ["a.png"]


def test_a_picture_that_would_go_with_the_labels_of_another_is_refused(tmp_path):
    write_json(tmp_path / "in", {"x.png": {"words": {}}})
    blank(tmp_path / "in" / "images" / "train" / "x.png")
    sheet = json.dumps({"images": {"x.png": {"words": {}}, "train/x.png": {"words": {}}}})
    (tmp_path / "in" / "Label.json").write_text(sheet)
    (tmp_path / "in" / "train.json").unlink()
    with pytest.raises(DataError, match=r"image x.png: another would be taken for it; rename it"):
        data.convert(tmp_path / "in" / "Label.json", tmp_path / "out", "json")
    assert not (tmp_path / "out").exists()


def test_lines_of_predictions_are_labels_to_correct(tmp_path):
    """What evaluate.py wrote page by page becomes files of labelme, as its JSON does."""
    words = {"0001": {"points": QUAD, "confidence": 0.5}}
    write_json(tmp_path, {"a.png": {"words": words}, "b.png": {"words": {}}})
    images = json.loads((tmp_path / "train.json").read_text())["images"]
    lines = [json.dumps({"images": {name: entry}}) + "\n" for name, entry in images.items()]
    (tmp_path / "found.jsonl").write_text("".join(['{"images": {}, "made_of": "x"}\n', *lines]))
    data.convert(tmp_path / "found.jsonl", tmp_path / "out", "labelme")
    pages = load_labels(tmp_path / "out", "train")
    assert [(page.name, page.confidences) for page in pages] == [("a.png", [0.5]), ("b.png", [])]


def test_pages_that_would_share_a_file_are_refused(tmp_path):
    write_json(tmp_path, {name: {"words": {}} for name in ("a.png", "a.jpg")})
    with pytest.raises(DataError, match="gt_a.txt would hold several pages"):
        data.convert(tmp_path, tmp_path / "out", "icdar")
    assert not list(tmp_path.glob("out*"))
    data.convert(tmp_path, tmp_path / "out", "paddle")


@pytest.mark.parametrize(
    "line, points, text",
    [
        ("1,2,30,2,30,9,1,9,12.00", QUAD, "12.00"),
        ("1,2,30,2,30,9,1,9,1,024.50", QUAD, "1,024.50"),
        ('1,2,30,2,30,9,1,9,a, "b', QUAD, 'a, "b'),
        ('1,2,30,2,30,9,1,9,"', QUAD, '"'),
        ("1,2,30,2,30,9,1,9", QUAD, None),
        ('1,2,30,2,30,9,1,9,"7, 8"\r', QUAD, "7, 8"),
        # texts that look like coordinates, and like quoted ones
        ('1,2,30,2,30,9,1,9,"1,2,3,4"', QUAD, "1,2,3,4"),
        ('1,2,30,2,30,9,1,9,"1,2,3,4,x"', QUAD, "1,2,3,4,x"),
        ('1,2,30,2,30,9,1,9,""a""', QUAD, '"a"'),
        ('1,2,30,2,30,9,1,9," a "', QUAD, " a "),
        ('1,2,30,2,30,9,1,9,"1,2,"', QUAD, "1,2,"),
        ('1,2,30,2,30,9,1,9,5,6,,"q"', QUAD, '5,6,,"q"'),
        # ICDAR 2013 and CVAT: left, top, right, bottom
        ('1, 2, 30, 9, "Sale, 5%"', QUAD, "Sale, 5%"),
        ('1 2 30 9 "a b, c"', QUAD, "a b, c"),
        ("1 2 30 9", QUAD, None),
        ("1,2,30,9,5", QUAD, "5"),
        # outlines of any number of points, as CVAT and curved data sets write them
        ("1,2,30,2,30,9,x", [[1, 2], [30, 2], [30, 9]], "x"),
        ('1,2,30,2,31,5,30,9,1,9,"7"', [[1, 2], [30, 2], [31, 5], [30, 9], [1, 9]], "7"),
        ("1,2,9,2,9,3,9,5,1,5,1,3,a,b", [[1, 2], [9, 2], [9, 3], [9, 5], [1, 5], [1, 3]], "a,b"),
    ],
)
def test_icdar_lines(tmp_path, line, points, text):
    blank(tmp_path / "a.JPG")
    (tmp_path / "gt_a.txt").write_bytes(f"\ufeff{line}\n".encode())
    (page,) = load_labels(tmp_path)
    assert page.name == "a.JPG" and page.polygons[0].tolist() == points and page.texts == [text]
    assert load_labels(tmp_path / "gt_a.txt")[0].texts == [text]
    if text:  # what we write is read the same
        data.convert(tmp_path, tmp_path / "out", "icdar")
        assert load_labels(tmp_path / "out")[0].texts == [text]


LINES = ["1,2,30,2,30,9,1,9,a", "1,2,30,2,30,9,1,9,12.00", "1,2,30,2,30,9,1,9,###"]


def icdar(folder, *lines, end="\n"):
    """Pages of one ICDAR file of these lines behind the usual ones."""
    blank(folder / "a.jpg")
    (folder / "gt_a.txt").write_bytes(end.join([*LINES, *lines]).encode())
    return load_labels(folder)


@pytest.mark.parametrize(
    "rest, text",
    [("1,234,567,890", "1,234,567,890"), ("1,234,567,890.50", "1,234,567,890.50")]
    + [("12,345,678,901,x", "12,345,678,901,x"), ("1,234,567", "1,234,567")],
)
def test_a_long_price_is_text_where_lines_have_four_points(tmp_path, capsys, rest, text):
    (page,) = icdar(tmp_path, f"1,2,30,2,30,9,1,9,{rest}")
    assert page.polygons[3].tolist() == QUAD and page.texts[3] == text
    assert not capsys.readouterr().err
    data.convert(tmp_path, tmp_path / "out", "icdar")
    assert load_labels(tmp_path / "out")[0].texts == page.texts
    # alone it could as well be an outline
    (tmp_path / "gt_a.txt").write_text(f"1,2,30,2,30,9,1,9,{rest}\n")
    assert len(load_labels(tmp_path)[0].polygons[0]) == (4 if rest == "1,234,567" else 6)


def test_a_price_behind_two_corners(tmp_path):
    blank(tmp_path / "a.jpg")
    (tmp_path / "gt_a.txt").write_text("1,2,30,9,x\n1,2,30,9,y\n1,2,30,9,1,024\n")
    (page,) = load_labels(tmp_path)
    assert page.texts == ["x", "y", "1,024"]
    assert [polygon.tolist() for polygon in page.polygons] == [QUAD] * 3
    (tmp_path / "gt_a.txt").write_text("1,2,30,9,x\n1,2,30,9,y\n1,2,30,2,30,9,1,9,1,024\n")
    assert load_labels(tmp_path)[0].texts == ["x", "y", "1,024"]


def test_icdar_lines_unlike_the_others_are_counted(tmp_path, capsys):
    curved = "1,2,9,2,9,3,9,5,1,5,1,3,b"
    (page,) = icdar(tmp_path, curved, "1,2,30,9,c")
    assert [len(polygon) for polygon in page.polygons] == [4, 4, 4, 6, 4]
    assert page.texts[3:] == ["b", "c"]
    said = f"2 lines have more or less than the usual 8 numbers, the first: {tmp_path}/gt_a.txt: "
    assert capsys.readouterr().err == f"warning: {said}line 4\n"


@pytest.mark.parametrize(
    "line",
    ["10,10,50,10,50,20,10,x", "1,2,30,9,7", "1,2,30,2,30,9,1,", "1O,2,30,2,30,9,1,9,x"]
    + ["1,2,30,2,3O,9,1,9,x", "1,2,30,2,30,9,l1,9,x"],
)
def test_a_lost_coordinate_is_an_error(tmp_path, line):
    with pytest.raises(DataError, match=f"gt_a.txt: line 4: {line} begins with too few numbers"):
        icdar(tmp_path, line)


def test_a_text_in_quotes_is_no_lost_coordinate(tmp_path):
    """It may stand behind any number of coordinates."""
    (page,) = icdar(tmp_path, '1,2,30,9,"A4"', '1,2,30,2,30,9,"2019"')
    assert page.texts[3:] == ["A4", "2019"]


@pytest.mark.parametrize("line", ["1O,2,30,2,30,9,1,9,x", "1,,30,2,30,9,1,9,x", "1,O,3,O,3,9,1,9"])
def test_a_file_that_begins_with_a_fault_is_named_and_not_left_out(tmp_path, line):
    """Without `gt_` in their names files are known by their first line: the page was lost."""
    for name in "ab":
        blank(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("1,2,30,2,30,9,1,9,x\n1,2,30,2,30,9,1,9,x\n")
    (tmp_path / "b.txt").write_text(line)
    (tmp_path / "README.txt").write_text("Receipts of 2019, 2020, 2021, labelled by us")
    (tmp_path / "classes.txt").write_text("text,number,date,total,tax,shop,logo,other\n")
    with pytest.raises(DataError, match=f"b.txt: line 1: {line} begins with too few numbers"):
        load_labels(tmp_path)
    (tmp_path / "b.txt").write_text("1,2,30,2,30,9,1,9,x\n")
    assert len(load_labels(tmp_path)) == 2


def test_marks_of_what_is_ignored_may_have_spaces(tmp_path):
    (page,) = icdar(tmp_path, "1,2,30,2,30,9,1,9, ###", "1,2,30,2,30,9,1,9,### ")
    assert page.texts[3:] == ["###"] * 2 and page.ignore[3:] == [True] * 2


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_kind(tmp_path, end):
    (page,) = icdar(tmp_path, end=end)
    assert page.texts == ["a", "12.00", "###"] and page.ids == ["0001", "0002", "0003"]
    (tmp_path / "gt_a.txt").unlink()
    lines = [f'x/a.jpg\t[{{"points": {QUAD}, "transcription": "{end!r}"}}]', "", ""]
    (tmp_path / "Label.txt").write_bytes(end.join(lines).encode())
    assert len(load_labels(tmp_path)[0].polygons) == 1


def test_a_text_of_several_lines_stays_one_line_of_icdar(tmp_path):
    words = {"1": {"points": QUAD, "transcription": "a\rb\r\nc\nd"}}
    write_json(tmp_path / "in", {"a.jpg": {"words": words}})
    data.convert(tmp_path / "in", tmp_path / "out", "icdar")
    assert load_labels(tmp_path / "out", "train")[0].texts == ["a b c d"]


@pytest.mark.parametrize("pattern", ["gt_{}.txt", "res_{}.txt", "{}.txt", "gt_{}.jpg.txt"])
def test_icdar_names_and_windows_text(tmp_path, pattern):
    """Stems that begin alike; other text files; Windows' own encoding; a page without text."""
    for stem in ("영수증 1", "영수증 1.b", "c"):
        blank(tmp_path / f"{stem}.jpg")
        line = "1,2,30,2,30,9,1,9,Café € 5\r\n" if stem != "c" else ""
        (tmp_path / pattern.format(stem)).write_bytes(line.encode("cp1252"))
    (tmp_path / "fileState.txt").write_text("x\t1\n")
    texts = {page.name: page.texts for page in load_labels(tmp_path)}
    assert texts == {"c.jpg": []} | {f"영수증 1{end}.jpg": ["Café € 5"] for end in ("", ".b")}


def labelme(folder, *shapes, **sheet):
    folder.mkdir(exist_ok=True, parents=True)
    shapes = [{"label": "text", "points": QUAD, "shape_type": "polygon"} | s for s in shapes]
    sheet = {"imagePath": "a.jpg", "imageData": "QUJD" * 999, "shapes": shapes} | sheet
    (folder / "a.json").write_text(json.dumps(sheet))


@pytest.mark.parametrize(
    "path", ["a 1.JPG", "..\\pics\\a 1.JPG", "C:\\x\\sub\\a 1.JPG", "./sub/a 1.JPG"]
)
def test_labelme_picture_paths(tmp_path, path):
    where = tmp_path / ("sub" if "sub" in path else "")
    blank(where / "a 1.JPG")
    labelme(tmp_path, {}, imagePath=path, imageHeight=None, imageWidth=None)
    (page,) = load_labels(tmp_path)
    assert page.path == where / "a 1.JPG" and page.size is None
    labelme(tmp_path, {}, imagePath=str(where / "a 1.JPG"))  # absolute, and there
    assert load_labels(tmp_path)[0].path == where / "a 1.JPG"


def test_labelme_shapes(tmp_path):
    """Every kind that has corners is read; the others are errors that name the file and shape."""
    blank(tmp_path / "a.jpg")
    kinds = ("polygon", "oriented_rectangle", "rotation", None)
    shapes = [{"shape_type": kind, "points": QUAD} for kind in kinds]
    shapes.append({"shape_type": "rectangle", "points": [[30, 2], [1, 9]]})
    shapes += [{"difficult": True, "description": None, "id": None}, {"flags": None, "id": None}]
    shapes.append({"label": "###", "description": "a smudge"})
    labelme(tmp_path, *shapes)
    (page,) = load_labels(tmp_path)
    assert all(sorted(polygon.tolist()) == sorted(QUAD) for polygon in page.polygons)
    assert page.ignore == [False] * 5 + [True, False, True]
    for kind in ("circle", "line", "linestrip", "point", "points", "mask"):
        labelme(tmp_path, {}, {"shape_type": kind, "points": [[1, 2], [3, 4]]})
        with pytest.raises(DataError, match=f"a.json: shape 2 is a {kind}; draw it as a polygon"):
            load_labels(tmp_path)
    labelme(tmp_path, {"score": None}, {"score": 0.25}, {"score": 0.5, "confidence": 0.75})
    assert load_labels(tmp_path)[0].confidences == [1.0, 0.25, 0.75]  # X-AnyLabeling's, and ours
    labelme(tmp_path, {"points": [[1, 2], [3, 4]]})
    with pytest.raises(DataError, match="a.json: image a.jpg: word 0001: 2 points; 3 to"):
        load_labels(tmp_path)


def test_splits_in_folders_of_their_own(tmp_path):
    """The folders of PPOCRLabel's and labelme's users: each split beside its own pictures, which go
    with it, and none of which is changed."""
    for split in ("train", "val"):
        sample(tmp_path / "in" / split, "Label.txt")
    before = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*.*")}
    for to in formats.FORMATS:
        data.convert(tmp_path / "in", tmp_path / to, to)
        for split in ("train", "val"):
            pages = load_labels(tmp_path / to, split)
            folder = tmp_path / to / ("images" if to == "json" else "") / split
            assert sorted(page.path for page in pages) == sorted(folder.glob("*.jpg"))
            assert [len(page.polygons) for page in pages] == [4, 2]
    assert all(path.read_bytes() == raw for path, raw in before.items())


@pytest.mark.parametrize("to", ["icdar", "labelme", "paddle", "json"])
def test_a_picture_may_have_the_name_of_a_split(tmp_path, to):
    """test.json beside test.jpg is the label file of that picture; the others are pages, too."""
    entry = {"words": {"0001": {"points": QUAD}}}
    write_json(tmp_path / "in", dict.fromkeys(["a.jpg", "test.jpg", "train.jpg", "val.jpg"], entry))
    data.convert(tmp_path / "in" / "train.json", tmp_path / "out", to)
    for file in (tmp_path / "out").glob("gt_*.txt"):
        file.rename(file.with_name(file.name.removeprefix("gt_")))
    splits = data.load_splits(tmp_path / "out")
    assert [len(pages) for pages in splits.values()] == [4]
    whole = tmp_path / "in" / "train.json"  # beside a picture of its name it is still a split's
    blank(whole.with_suffix(".jpg"))
    assert len(load_labels(whole.parent, "train")) == 4


def test_a_picture_of_a_splits_name_may_end_in_capitals(tmp_path):
    """As those of cameras do."""
    for stem in ("a", "test"):
        blank(tmp_path / f"{stem}.JPG")
        sheet = {"shapes": [], "imagePath": f"{stem}.JPG"}
        (tmp_path / f"{stem}.json").write_text(json.dumps(sheet))
    assert [len(pages) for pages in data.load_splits(tmp_path).values()] == [2]


def test_paddle_files_are_those_that_ppocrlabel_opens(tmp_path, monkeypatch):
    """It opens a folder of pictures, shows what Label.txt in it says of FOLDER/PICTURE, keeps what
    fileState.txt names when it saves, and evaluates each line with Python's literals."""
    monkeypatch.chdir(tmp_path)
    words = {"1": {"points": QUAD, "transcription": "5.00", "ignore": True}, "2": {"points": QUAD}}
    write_json(tmp_path / "in", {"a.jpg": {"words": words}})
    for source, folder in (("in", "out/train"), ("in/train.json", "one")):
        data.convert(source, folder.split("/")[0], "paddle")
        name, tab, line = Path(folder, "Label.txt").read_text().partition("\t")
        opened = Path(folder).absolute() / "a.jpg"
        assert tab and opened.is_file() and name == "/".join(opened.parts[-2:])
        assert Path(folder, "fileState.txt").read_text() == f"{name}\t1\n"
        literal = line.replace("false", "False").replace("true", "True")
        assert [(w["transcription"], w["difficult"]) for w in eval(literal)] == [
            ("###", True),
            ("", False),
        ]
        (page,) = load_labels(Path(folder))
        assert page.ignore == [True, False] and page.name == "a.jpg"


def converted(tmp_path, out, *flags):
    """(picture of a set, the same picture in the set that `convert` made of it)."""
    write_json(tmp_path / "in", {"a.jpg": {"words": {}}})
    assert data.main(["convert", str(tmp_path / "in"), str(tmp_path / out), *flags]) == 0
    (page,) = load_labels(tmp_path / out, "train")
    return tmp_path / "in" / "images" / "a.jpg", page.path


def test_a_tool_that_turns_a_converted_picture_leaves_the_original(tmp_path):
    source, copy = converted(tmp_path, "out")
    raw = source.read_bytes()
    assert copy.read_bytes() == raw and copy.stat().st_nlink == source.stat().st_nlink == 1
    copy.write_bytes(b"turned in place")
    assert source.read_bytes() == raw


@pytest.mark.parametrize("link", [False, True])
def test_no_picture_is_copied_onto_itself(tmp_path, link):
    """It would be emptied before it is read."""
    blank(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    places = [tmp_path / "a.png"]
    if link:
        places = [tmp_path / "b.png"] * 2  # the second would go into a hard link to a.png
    with pytest.raises(FileExistsError):
        for place in places:
            data.place_picture(tmp_path / "a.png", place, link)
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize("to", list(formats.FORMATS))
@pytest.mark.parametrize("way", ["in", "link"])
def test_an_absolute_name_is_one_within_the_folder(tmp_path, to, way):
    """Its copy would have been the picture itself, which was emptied."""
    blank(tmp_path / "in" / "images" / "a.png")
    (tmp_path / "link").symlink_to("in")  # a name by it was ../../link/images/a.png
    before = (tmp_path / "in" / "images" / "a.png").read_bytes()
    sheet = {"images": {str(tmp_path / way / "images" / "a.png"): {"words": {}}}}
    (tmp_path / "in" / "train.json").write_text(json.dumps(sheet))
    data.convert(tmp_path / "in", tmp_path / "out", to)
    (page,) = load_labels(tmp_path / "out", "train")
    assert page.name == "a.png" and page.path.read_bytes() == before
    assert (tmp_path / "in" / "images" / "a.png").read_bytes() == before


def test_a_picture_under_two_names_comes_twice(tmp_path):
    write_json(tmp_path, {"a.png": {"words": {}}})
    sheet = {"images": {name: {"words": {}} for name in ("a.png", "./a.png")}}
    (tmp_path / "train.json").write_text(json.dumps(sheet))
    with pytest.raises(DataError, match="image a.png comes twice; join its labels"):
        load_labels(tmp_path, "train")


@pytest.mark.parametrize("there", [True, False])
def test_a_new_folder_may_be_a_link(tmp_path, there):
    """The link stays, and its target is filled."""
    write_json(tmp_path / "in", {"a.png": {"words": {}}})
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    data.convert(tmp_path / "in", tmp_path / "out", "json")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "train.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "disk"}
    with pytest.raises(UsageError, match="exists; choose another folder"):
        data.convert(tmp_path / "in", tmp_path / "out", "json")


def test_a_link_to_itself_is_one_line(tmp_path, script, one_line):
    write_json(tmp_path / "in", {"a.png": {"words": {}}})
    (tmp_path / "loop").symlink_to("loop")
    one_line(script("data.py", "convert", "in", "loop"), code=1)


def test_shapes_that_labelme_copied_or_added_have_ids_of_their_own(tmp_path):
    """A copy brings its id along, and the number of a new shape may be that of another's id."""
    words = {f"{n:04d}": {"points": QUAD} for n in (1, 2, 3)}
    write_json(tmp_path / "in", {"a.png": {"words": words}})
    data.convert(tmp_path / "in", tmp_path / "out", "labelme")
    file = next((tmp_path / "out").rglob("*.json"))
    sheet = json.loads(file.read_text())
    first, _, third = sheet["shapes"]
    new = {key: value for key, value in first.items() if key != "id"}
    sheet["shapes"] = [first, third, new, first, first]
    file.write_text(json.dumps(sheet))
    (page,) = load_labels(file.parent, "train")
    assert page.ids == ["0001", "0003", "0003-2", "0001-2", "0001-3"]
    assert labels.tell_apart(["a", "a", "a-2"]) == ["a", "a-3", "a-2"]


def test_pictures_are_linked_on_demand_and_copied_where_they_cannot_be(tmp_path, monkeypatch):
    source, linked = converted(tmp_path, "linked", "--link")
    assert linked.samefile(source)

    def no_links(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(data.os, "link", no_links)
    source, copy = converted(tmp_path, "copied", "--link")
    assert not copy.samefile(source) and copy.read_bytes() == source.read_bytes()


def test_a_file_system_that_can_shares_the_blocks_of_a_copy(tmp_path, monkeypatch):
    def clone(new, request, old):
        assert request == data.FICLONE
        new.write(os.pread(old, 1 << 20, 0))

    monkeypatch.setattr(data.fcntl, "ioctl", clone)
    monkeypatch.setattr(data.shutil, "copyfileobj", lambda *_: pytest.fail("copied"))
    source, copy = converted(tmp_path, "out")
    assert copy.read_bytes() == source.read_bytes()


def test_pictures_in_sub_folders(tmp_path):
    write_json(tmp_path, {name: {"words": {}} for name in ("a/a.jpg", "./b/b.jpg")})
    for to in ("json", "paddle", "labelme"):
        data.convert(tmp_path, tmp_path / to, to)
        names = {page.name.removeprefix("./") for page in load_labels(tmp_path / to, "train")}
        assert names == {"a/a.jpg", "b/b.jpg"}
    with pytest.raises(DataError, match="image a/a.jpg: ICDAR knows no sub folders"):
        data.convert(tmp_path, tmp_path / "icdar", "icdar")


SPACES = "Screenshot 3.05.00\u202fPM.png", "a\u00a0b.png", "영수증\u3000(1).png"
INVISIBLE = "می\u200cخواهم.png", "👨\u200d👩\u200d👧.png", "ex\u00adample.png", "\u202eabc.png"
INVISIBLE += (f"{'d' * 200}/{'가' * 80}.png",)


def test_spaces_and_invisible_letters_in_picture_names(tmp_path):
    """macOS writes a narrow space into the names of its screenshots; Persian words and emoji need
    joiners; a path of folders may be long."""
    for name in (*SPACES, *INVISIBLE):
        write_json(tmp_path, {name: {"words": {}}})
        (tmp_path / "Label.txt").write_text(f"x/{name}\t[]\n")
        assert load_labels(tmp_path, "train")[0].name == load_labels(tmp_path)[0].name == name


@pytest.mark.parametrize("name", ["a\nb.png", "a\0b.png", "a\u2028b.png", "\ud800.png", ""])
def test_what_breaks_a_line_is_not_a_name(tmp_path, name):
    with pytest.raises(DataError, match="not a file name") as error:
        labels.find_page([tmp_path], [name], "a.json")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["émile.png", "한글 영수증.png"])
def test_names_that_look_alike_are_told_apart(tmp_path, name):
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    for there, given in (forms, forms[::-1]):
        blank(tmp_path / there / "images" / there)
        (tmp_path / there / "train.json").write_text(json.dumps({"images": {given: {}}}))
        with pytest.raises(DataError) as error:
            load_labels(tmp_path / there, "train")
        alike = f"two names that look alike: {given!a} and {there!a}, rename one"
        assert f"no such picture in {tmp_path / there}" in str(error.value)
        assert str(error.value).endswith(f" beside that file; {alike}")
    assert labels.lookalike(name, ["other", name + "x"]) == ""


def test_a_page_knows_its_label_file(tmp_path):
    write_json(tmp_path / "json", {name: {"words": {}} for name in ("b.jpg", "a.jpg")})
    for to in formats.FORMATS:
        data.convert(tmp_path / "json", tmp_path / to / "out", to)
        for page in load_labels(tmp_path / to / "out", "train"):
            assert page.source.is_file()
            assert to in ("json", "paddle") or PurePath(page.name).stem in page.source.name


def coco(*annotations, name="a.jpg", categories=({"id": 1},), **image):
    """A file as CVAT, Label Studio and Roboflow write it; each annotation on the picture 7."""
    images = [{"id": 7, "file_name": name, "width": 40, "height": 30, **image}]
    drawn = [{"id": i, "image_id": 7, "category_id": 1, **a} for i, a in enumerate(annotations, 1)]
    return json.dumps({"images": images, "annotations": drawn, "categories": categories})


FLAT = [float(v) for point in QUAD for v in point]
BOX = {"segmentation": [], "bbox": [1, 2, 29, 7], "iscrowd": 0}
TOOLS = {  # where their exports lie, and how they name a picture
    "one.json": ("one.json", "a.jpg", "a.jpg"),
    "train.json": ("", "a.jpg", "images/a.jpg"),
    "_annotations.coco.json": ("", "a.jpg", "a.jpg"),
    "train/_annotations.coco.json": ("", "a.jpg", "train/a.jpg"),
    "result.json": ("", "images/a.jpg", "images/a.jpg"),
    "annotations/instances_default.json": ("", "a.jpg", "images/default/a.jpg"),
    "annotations/instances_train.json": ("", "a.jpg", "images/train/a.jpg"),
    "annotations/instances_Train.json": ("", "a.jpg", "images/Train/a.jpg"),
}


@pytest.mark.parametrize("file", TOOLS)
def test_coco_lies_where_the_tools_put_it(tmp_path, file):
    given, name, picture = TOOLS[file]
    blank(tmp_path / picture, 30, 40)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(coco({"segmentation": [FLAT], "bbox": [1, 2, 29, 7]}, name=name))
    (page,) = load_labels(tmp_path / given, "train")
    assert page.path == tmp_path / picture and page.size == (40, 30)
    assert page.name == "a.jpg"
    assert page.polygons[0].tolist() == QUAD and page.ids == ["1"] and page.ignore == [False]
    data.convert(tmp_path / given, tmp_path / "out", "json")
    assert load_labels(tmp_path / "out", "train")[0].polygons[0].tolist() == QUAD


def test_roboflows_valid_is_the_val_split(tmp_path):
    for split in ("train", "valid", "test"):
        blank(tmp_path / split / "a.jpg", 30, 40)
        (tmp_path / split / "_annotations.coco.json").write_text(coco(BOX))
    assert list(data.load_splits(tmp_path)) == ["train", "val", "test"]
    assert load_labels(tmp_path, "val")[0].path == tmp_path / "valid" / "a.jpg"


def test_cvats_validation_is_the_val_split(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("Train", "Validation", "Test"):
        blank(tmp_path / "images" / split / "a.jpg", 30, 40)
        (tmp_path / f"annotations/instances_{split}.json").write_text(coco(BOX))
    splits = data.load_splits(tmp_path)
    assert list(splits) == ["train", "val", "test"]
    assert splits["val"][0].path == tmp_path / "images/Validation/a.jpg"


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
def test_a_folder_of_a_splits_name_may_have_its_pictures_in_images_beside_it(tmp_path, name):
    blank(tmp_path / "images" / name / "a.jpg", 30, 40)
    (tmp_path / name).mkdir()
    (tmp_path / name / "Label.txt").write_text("a.jpg\t[]\n")
    (page,) = load_labels(tmp_path, "val")
    assert page.path == tmp_path / "images" / name / "a.jpg"


def test_coco_annotations(tmp_path):
    """Several polygons, boxes, turned ones, don't care, texts and scores under the tools' names."""
    blank(tmp_path / "a.jpg", 30, 40)
    turned = {**BOX, "attributes": {"rotation": 90.0, "occluded": False}}
    crowd = {**BOX, "iscrowd": 1, "attributes": {"text": "7,50", "iscrowd": False}}
    others = {"utf8_string": "a", "ignore": 1, "attributes": None}, {"caption": "b", "score": 0.5}
    several = {"segmentation": [FLAT, FLAT[2:]], "bbox": [0, 0, 1, 1], "transcription": "x"}
    (tmp_path / "c.json").write_text(
        coco(several, BOX, turned, crowd, *({**BOX, **o} for o in others))
    )
    (page,) = load_labels(tmp_path / "c.json")
    assert page.ids == ["1", "1.1", "2", "3", "4", "5", "6"]
    assert page.texts == ["x", "x", None, None, "7,50", "a", "b"]
    assert page.ignore == [False] * 4 + [True, True, False]
    assert page.confidences == [1.0] * 6 + [0.5]
    assert page.polygons[1].tolist() == QUAD[1:] and page.polygons[2].tolist() == QUAD
    corners = sorted(np.round(page.polygons[3], 3).tolist())
    assert corners == [[12, -9], [12, 20], [19, -9], [19, 20]]


@pytest.mark.parametrize("degrees", [0, 0.5, -3, 40, 95, 180, -120])
def test_a_turned_box_begins_where_its_text_does(tmp_path, degrees):
    """Metrics take the first half of its corners for the top of the word."""
    blank(tmp_path / "a.jpg", 30, 40)
    turned = {**BOX, "attributes": {"rotation": degrees}}
    (tmp_path / "c.json").write_text(coco(turned))
    (page,) = load_labels(tmp_path / "c.json")
    turn = np.exp(1j * np.deg2rad(degrees))
    expected = (np.array(QUAD) @ (1, 1j) - (15.5 + 5.5j)) * turn + (15.5 + 5.5j)
    np.testing.assert_allclose(page.polygons[0] @ (1, 1j), expected, atol=1e-9)


def test_an_upright_box_keeps_every_digit(tmp_path):
    """The last one differed, and a run of an earlier version was told that its pages changed."""
    blank(tmp_path / "a.jpg", 30, 40)
    (tmp_path / "c.json").write_text(coco({**BOX, "bbox": [10.1, 20.3, 30.7, 5.9]}))
    (page,) = load_labels(tmp_path / "c.json")
    assert page.polygons[0][[0, 2]].tolist() == [[10.1, 20.3], [10.1 + 30.7, 20.3 + 5.9]]


@pytest.mark.parametrize("corner", range(4))
def test_the_rectangle_that_icdar_keeps_begins_where_the_outline_does(tmp_path, corner):
    quad = QUAD[corner:] + QUAD[:corner]
    middle = np.mean(quad[2:], 0).tolist()
    write_json(tmp_path, {"a.png": {"words": {"1": {"points": [*quad[:3], middle, quad[3]]}}}})
    data.convert(tmp_path, tmp_path / "out", "icdar")
    (again,) = load_labels(tmp_path / "out", "train")
    np.testing.assert_allclose(again.polygons, [quad], atol=1e-3)


KINDS = [{"id": k, "name": name} for k, name in enumerate(("text", "logo", "Illegible"), 1)]


def test_coco_categories(tmp_path, capsys):
    blank(tmp_path / "a.jpg", 30, 40)
    drawn = [{**BOX, "category_id": k} for k in (1, 2, 1, 3)]
    (tmp_path / "c.json").write_text(coco(*drawn, categories=KINDS))
    (page,) = load_labels(tmp_path / "c.json")
    assert page.ids == ["1", "2", "3", "4"] and page.ignore == [False, False, False, True]
    said = capsys.readouterr().err
    assert (
        said == f"{tmp_path}/c.json: all categories are words: text (2), logo (1), Illegible (1); "
        "data.py convert --categories chooses\n"
    )
    (page,) = load_labels(tmp_path / "c.json", categories=["text"])
    assert page.ids == ["1", "3", "4"] and page.ignore == [False, False, True]
    assert load_labels(tmp_path / "c.json", categories=["text", "logo"])[0].ids == list("1234")
    assert not capsys.readouterr().err
    with pytest.raises(UsageError, match="c.json: no category 'word'; there are text .2., logo"):
        load_labels(tmp_path / "c.json", categories=["text", "word"])
    write_json(tmp_path / "other", {"a.jpg": {"words": {}}})
    for folder in ("other", sample(tmp_path / "other" / "images", "Label.txt")):
        with pytest.raises(UsageError, match="--categories: only COCO's labels have them"):
            load_labels(tmp_path / folder, "train", categories=["text"])


def test_categories_are_chosen_by_a_flag(tmp_path, script, one_line):
    blank(tmp_path / "a.jpg", 30, 40)
    drawn = [{**BOX, "category_id": k} for k in (1, 2, 1, 3)]
    (tmp_path / "c.json").write_text(coco(*drawn, categories=KINDS))
    result = script("data.py", "convert", "c.json", "out", "--categories", "text")
    assert result.returncode == 0 and not result.stderr
    assert "1 pages, 3 words as json" in result.stdout
    result = script("data.py", "convert", "c.json", "all", "--categories=logo,text")
    assert "1 pages, 4 words" in result.stdout and not result.stderr
    result = script("data.py", "check", "c.json")
    assert "c.json: all categories are words: text (2), logo (1), Illegible (1)" in result.stderr
    one_line(script("data.py", "convert", "out", "b", "--categories", "text"), "only COCO's labels")


def test_a_split_replaces_no_labels(tmp_path, script, one_line):
    write_json(tmp_path, {name: {"words": {}} for name in ("a.png", "b.png")})
    before = (tmp_path / "train.json").read_bytes()
    flags = "split", ".", "--folds", "2", "--out"
    for out in ("train.json", "./train.json", "images/a.png"):
        one_line(
            script("data.py", *flags, out), f"{out}: is read by this command; write to another"
        )
    assert (tmp_path / "train.json").read_bytes() == before
    assert script("data.py", *flags, "split.json").returncode == 0


def test_a_crowd_is_ignored_by_its_box(tmp_path):
    blank(tmp_path / "a.jpg", 30, 40)
    crowd = {**BOX, "segmentation": {"counts": [1], "size": [30, 40]}, "iscrowd": 1}
    (tmp_path / "c.json").write_text(coco(crowd))
    (page,) = load_labels(tmp_path / "c.json")
    assert page.ignore == [True] and page.polygons[0].tolist() == QUAD


@pytest.mark.parametrize("lists", [{"annotations": None}, {"annotations": 7}, {"categories": {}}])
def test_coco_without_its_lists_is_one_line(tmp_path, lists):
    blank(tmp_path / "a.jpg")
    (tmp_path / "c.json").write_text(json.dumps(json.loads(coco()) | lists))
    with pytest.raises(DataError, match='c.json: no lists "annotations" and "categories"'):
        load_labels(tmp_path / "c.json")


@pytest.mark.parametrize(
    "annotation, message",
    [
        ({"segmentation": {"counts": [1], "size": [3, 4]}}, "annotation 1: a mask .RLE.; export"),
        ({"segmentation": [[1, 2, 3]]}, "word 1: 2 points; 3 to"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "word 1: its points are not"),
        ({"segmentation": 7, "bbox": 7}, "annotation 1: bbox: 0 points"),
        ({"bbox": [1, 2, "a", 4]}, "annotation 1: bbox: its points are not"),
        ({"bbox": [1, 2, 3]}, "annotation 1: bbox: its points are not"),
        ({**BOX, "attributes": {"rotation": "x"}}, "annotation 1: bbox: its points are not"),
        ({**BOX, "attributes": {"difficult": "false"}}, "word 1: ignore flag 'false' is not true"),
        ({**BOX, "image_id": [8]}, r"c.json: annotations of picture \[8\], which it lacks"),
        ({**BOX, "text": 7}, "word 1: transcription is not a text"),
    ],
)
def test_bad_coco_is_one_line(tmp_path, annotation, message):
    blank(tmp_path / "a.jpg", 30, 40)
    (tmp_path / "c.json").write_text(coco(annotation))
    with pytest.raises(DataError, match=message):
        load_labels(tmp_path / "c.json")
