"""Label formats: what people's tools write is read; every pair of formats goes there and back."""

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

import data
import labels
from files import DataError
from labels import load_labels

SAMPLES = Path(__file__).parent / "data" / "convert"
OUTLINES = "outlines (their smallest rectangle is kept)"
QUAD = [[1, 2], [30, 2], [30, 9], [1, 9]]
# what a format cannot hold; where ICDAR loses an outline it keeps the smallest rectangle
LOST = {
    "json": set(),
    "labelme": {"groups"},
    "paddle": {"ids", "confidences", "sizes", "groups", "ignore flags"},  # `*` is its don't care
    "icdar": {"ids", "confidences", "sizes", "groups", "texts", "outlines"},
}


def blank(path, height=40, width=40):
    path.parent.mkdir(exist_ok=True, parents=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def random_pages(rng, folder, quads=False):
    """Pages with words of every kind a label file may hold, written as the competition's JSON."""
    pages, images = [], {}
    for name in ("a.png", "b 1.jpg", "[c].png"):
        blank(folder / "images" / name, 90, 120)
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
    (folder / "train.json").write_text(json.dumps({"images": images}))
    return pages


def lost(pages, again):
    """Counts of what differs between pages, by the words convert has for it."""
    counts, by_name = Counter(), {page.name: page for page in again}
    for page in pages:
        other = by_name[page.name]
        counts["sizes"] += page.size != other.size
        counts["groups"] += page.group != other.group
        for i, polygon in enumerate(page.polygons):
            counts["ids"] += page.ids[i] != other.ids[i]
            counts["confidences"] += page.confidences[i] != other.confidences[i]
            counts["ignore flags"] += page.ignore[i] != other.ignore[i]
            texts = [None if t in ("", "###") else t for t in (page.texts[i], other.texts[i])]
            counts["texts"] += texts[0] != texts[1]
            counts[OUTLINES] += polygon.tolist() != other.polygons[i].tolist()
        assert len(page.ids) == len(other.ids)
    return {kind: n for kind, n in counts.items() if n}


def kinds(pages, again):
    return {kind.split(" (")[0] for kind in lost(pages, again)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("to", list(labels.FORMATS))
@pytest.mark.parametrize("back", list(labels.FORMATS))
def test_there_and_back(tmp_path, to, back, seed, capsys):
    """Nothing is lost but what one of the two formats cannot hold, and convert says so."""
    pages = random_pages(np.random.default_rng(seed), tmp_path / "in")
    data.convert(tmp_path / "in", tmp_path / "there", to)
    said = capsys.readouterr().out
    there = load_labels(tmp_path / "there", "train")
    assert kinds(pages, there) <= LOST[to]
    shown = ", ".join(sorted(f"{n} {kind}" for kind, n in lost(pages, there).items()))
    assert ", ".join(sorted(said.strip().split("lost: ")[1].split(", "))) == (shown or "nothing")
    data.convert(tmp_path / "there", tmp_path / "back", back)
    again = load_labels(tmp_path / "back", "train")
    assert kinds(pages, again) <= LOST[to] | LOST[back]
    for file in (tmp_path / "there" / "train").glob("*.json"):  # as labelme finds the picture
        assert (file.parent / json.loads(file.read_text())["imagePath"]).is_file()
    if LOST[back] <= LOST[to]:
        assert "lost: nothing" in capsys.readouterr().out
    assert sorted(p.name for p in again) == sorted(p.name for p in pages)


def test_icdar_keeps_quads_and_texts_of_words_that_count(tmp_path):
    pages = random_pages(np.random.default_rng(5), tmp_path / "in", quads=True)
    data.convert(tmp_path / "in", tmp_path / "out", "icdar")
    assert "outlines" not in kinds(pages, load_labels(tmp_path / "out", "train"))
    by_name = {page.name: page for page in load_labels(tmp_path / "out", "train")}
    for page in pages:
        for text, skip, other in zip(page.texts, page.ignore, by_name[page.name].texts):
            assert other == ("###" if skip else text and text.replace("\n", " "))


def sample(tmp_path, name):
    """A sample file with empty pictures of the size it expects beside it."""
    for picture in ("receipt_1.jpg", "receipt_2.jpg"):
        blank(tmp_path / picture, 640, 480)
    (tmp_path / name).write_bytes((SAMPLES / name).read_bytes())
    return tmp_path


def test_a_label_file_of_ppocrlabel(tmp_path):
    one, two = load_labels(sample(tmp_path, "Label.txt"))
    assert (one.name, two.name) == ("receipt_1.jpg", "receipt_2.jpg")
    assert one.texts == ["햇살 마트", "Milk 1L", "12.00", "###"] and one.ignore == [0, 0, 0, 1]
    assert one.polygons[0].tolist() == [[120, 40], [360, 44], [359, 80], [119, 76]]
    assert [len(polygon) for polygon in two.polygons] == [4, 6] and two.ignore == [False, True]


def test_a_labelme_file(tmp_path):
    (page,) = load_labels(sample(tmp_path, "receipt_1.json"))
    assert page.name == "receipt_1.jpg" and page.size == (480, 640)
    assert page.texts == ["Sunny Mart", None, "TOTAL", "###"] and page.ignore == [0, 0, 0, 1]
    assert page.polygons[1].tolist() == [[30, 120], [210, 120], [210, 150], [30, 150]]
    assert len(page.polygons[2]) == 5
    assert load_labels(tmp_path / "receipt_1.json")[0].texts == page.texts


@pytest.mark.parametrize("to", list(labels.FORMATS))
def test_labels_without_a_split(tmp_path, to):
    sample(tmp_path, "Label.txt")
    data.convert(tmp_path / "Label.txt", tmp_path / "out", to)
    pages = load_labels(tmp_path / "out", "train")
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


def test_pages_that_would_share_a_file_are_refused(tmp_path):
    images = {name: {"words": {}} for name in ("a.png", "a.jpg")}
    for name in images:
        blank(tmp_path / "images" / name)
    (tmp_path / "train.json").write_text(json.dumps({"images": images}))
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
    write = (tmp_path / "gt_a.txt").write_bytes
    write(("\ufeff" + line + "\n").encode())
    blank(tmp_path / "a.JPG")
    (page,) = load_labels(tmp_path)
    assert page.name == "a.JPG" and page.polygons[0].tolist() == points and page.texts == [text]
    assert load_labels(tmp_path / "gt_a.txt")[0].texts == [text]
    if text:  # what we write is read the same
        data.convert(tmp_path, tmp_path / "out", "icdar")
        assert load_labels(tmp_path / "out")[0].texts == [text]


@pytest.mark.parametrize("text", ["1,2,3,4", "1,2,3,4,x", '"a"', " a ", '"', "1,2,"])
def test_texts_that_look_like_coordinates_survive_icdar(text):
    page = labels.Page("a.jpg", None)
    page.add("1", np.array(QUAD, float), text)
    (lines,) = labels.to_icdar([page], None).values()
    points, again = labels.parse_icdar_line(lines.rstrip("\n"))
    assert again == text and len(points) == 4


@pytest.mark.parametrize("pattern", ["gt_{}.txt", "res_{}.txt", "{}.txt", "gt_{}.jpg.txt"])
def test_icdar_names_and_windows_text(tmp_path, pattern):
    """Pictures share a stem's beginning; other text files lie about; Windows' own encoding; a page
    without text."""
    for stem in ("영수증 1", "영수증 1.b", "c"):
        blank(tmp_path / f"{stem}.jpg")
        line = "1,2,30,2,30,9,1,9,Café € 5\r\n" if stem != "c" else ""
        (tmp_path / pattern.format(stem)).write_bytes(line.encode("cp1252"))
    (tmp_path / "fileState.txt").write_text("x\t1\n")
    pages = load_labels(tmp_path)
    texts = {page.name: page.texts for page in pages}
    assert texts == {"c.jpg": []} | {f"영수증 1{end}.jpg": ["Café € 5"] for end in ("", ".b")}


def test_a_folder_of_ppocrlabel(tmp_path):
    """Its other files and crops lie beside Label.txt; Windows' line ends and byte order mark."""
    sample(tmp_path, "Label.txt")
    lines = (tmp_path / "Label.txt").read_text()
    (tmp_path / "Label.txt").write_bytes(("\ufeff" + lines).replace("\n", "\r\n").encode())
    (tmp_path / "fileState.txt").write_text("C:\\r\\receipt_1.jpg\t1\n")
    (tmp_path / "Cache.cach").write_text("receipts/receipt_1.jpg\t[]\n")
    (tmp_path / "rec_gt.txt").write_text("crop_img/receipt_1_crop_0.jpg\tMilk\n")
    blank(tmp_path / "crop_img" / "receipt_1.jpg")
    one, two = load_labels(tmp_path)
    assert one.name == "receipt_1.jpg" and one.ignore == [0, 0, 0, 1] and len(two.ids) == 2


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
    kinds = {"rectangle": [[30, 2], [1, 9]]}
    kinds |= dict.fromkeys(["polygon", "oriented_rectangle", "rotation", None], QUAD)
    shapes = [{"shape_type": kind, "points": points} for kind, points in kinds.items()]
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
    labelme(tmp_path, {"points": [[1, 2], [3, 4]]})
    with pytest.raises(DataError, match="a.json: word 0001: 2 points; 3 to"):
        load_labels(tmp_path)


def test_splits_in_folders_of_their_own(tmp_path):
    """The folders of PPOCRLabel's and labelme's users: each split beside its own pictures."""
    for split in ("train", "val"):
        sample(tmp_path / "in" / split, "Label.txt")
    with pytest.raises(DataError, match="in: its pictures lie in 2 folders; convert each"):
        data.convert(tmp_path / "in", tmp_path / "out", "json")
    assert not list(tmp_path.glob("out*"))
    data.convert(tmp_path / "in" / "val", tmp_path / "out", "json")


def test_pictures_in_sub_folders(tmp_path):
    images = {name: {"words": {}} for name in ("a/a.jpg", "./b/b.jpg")}
    for name in images:
        blank(tmp_path / "images" / name)
    (tmp_path / "train.json").write_text(json.dumps({"images": images}))
    for to in ("json", "paddle", "labelme"):
        data.convert(tmp_path, tmp_path / to, to)
        names = {page.name.removeprefix("./") for page in load_labels(tmp_path / to, "train")}
        assert names == {"a/a.jpg", "b/b.jpg"}
    with pytest.raises(DataError, match="image a/a.jpg: ICDAR knows no sub folders"):
        data.convert(tmp_path, tmp_path / "icdar", "icdar")


def test_spaces_of_every_kind_in_picture_names(tmp_path):
    """macOS writes a narrow one into the names of its screenshots."""
    for name in ("Screenshot 3.05.00\u202fPM.png", "a\u00a0b.png", "영수증\u3000(1).png"):
        blank(tmp_path / name)
        (tmp_path / "train.json").write_text(json.dumps({"images": {name: {"words": {}}}}))
        (tmp_path / "Label.txt").write_text(f"x/{name}\t[]\n")
        assert load_labels(tmp_path, "train")[0].name == load_labels(tmp_path)[0].name == name
