"""Label formats: what people's tools write is read; every pair of formats goes there and back."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import data
from data import DataError, load_labels

SAMPLES = Path(__file__).parent / "data" / "convert"
# what a format cannot hold; where ICDAR loses an outline it keeps the smallest rectangle
LOST = {
    "json": set(),
    "labelme": {"groups"},
    "paddle": {"ids", "confidences", "sizes", "groups"},
    "icdar": {"ids", "confidences", "sizes", "groups", "texts", "outlines"},
}


def random_pages(rng, folder, quads=False):
    """Pages with words of every kind a label file may hold, written as the competition's JSON."""
    (folder / "images").mkdir(parents=True)
    pages = []
    for name in ("a.png", "b 1.jpg", "[c].png"):
        cv2.imwrite(str(folder / "images" / name), np.zeros((90, 120, 3), np.uint8))
        page = data.Page(name, None, size=(120, 90), group=str(rng.choice(["g", "h", "가"])))
        for i in range(int(rng.integers(0, 9))):
            points = rng.uniform(0, 90, (4 if quads else int(rng.integers(3, 9)), 2)).round(4)
            text = rng.choice(["12.00", 'a, "b" | c', "김밥\t1", "text", "1,2", "", " x\\", "###"])
            confidence = rng.choice([1.0, round(rng.random(), 6)])
            page.add(f"w{i}", points, str(text) or None, bool(rng.random() < 0.3), confidence)
        pages.append(page)
    data.write_json(folder / "train.json", data.pages_to_json(pages))
    return load_labels(folder, "train")


def kinds(pages, again):
    return {
        kind.split(" (")[0].replace("ignore flags", "ignore") for kind in data.losses(pages, again)
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("to", list(data.FORMATS))
@pytest.mark.parametrize("back", list(data.FORMATS))
def test_there_and_back(tmp_path, to, back, seed, capsys):
    """Nothing is lost but what one of the two formats cannot hold, and convert says so."""
    pages = random_pages(np.random.default_rng(seed), tmp_path / "in")
    data.convert(tmp_path / "in", tmp_path / "there", to)
    said = capsys.readouterr().out
    there = load_labels(tmp_path / "there", "train")
    assert kinds(pages, there) <= LOST[to]
    assert all(f"{n} {kind}" in said for kind, n in data.losses(pages, there).items())
    data.convert(tmp_path / "there", tmp_path / "back", back)
    again = load_labels(tmp_path / "back", "train")
    assert kinds(pages, again) <= LOST[to] | LOST[back]
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
            assert other == ("###" if skip else text and text.strip("\n"))


def sample(tmp_path, name):
    """A sample file with empty pictures of the size it expects beside it."""
    for picture in ("receipt_1.jpg", "receipt_2.jpg"):
        cv2.imwrite(str(tmp_path / picture), np.full((640, 480, 3), 255, np.uint8))
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


def test_convert_command(tmp_path, script, one_line):
    sample(tmp_path, "Label.txt")
    result = script("data.py", "convert", ".", "out", "--to", "icdar")
    assert result.returncode == 0, result.stderr
    assert "2 pages, 6 words as icdar; lost: " in result.stdout and "1 outlines" in result.stdout
    lines = (tmp_path / "out" / "gt_receipt_1.txt").read_text().splitlines()
    assert lines[0] == "120,40,360,44,359,80,119,76,햇살 마트" and lines[3].endswith(",###")
    assert script("data.py", "check", "out").returncode == 0
    one_line(script("data.py", "convert", ".", "out", "--to", "json"), "out: exists", code=1)
    one_line(script("data.py", "convert", ".", "b", "--to", "jsn"), "jsn", "json", code=2)


def test_pages_that_would_share_a_file_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "a.jpg"):
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((9, 9, 3), np.uint8))
    images = {name: {"words": {}} for name in ("a.png", "a.jpg")}
    (tmp_path / "train.json").write_text(json.dumps({"images": images}))
    with pytest.raises(DataError, match="gt_a.txt would hold several pages"):
        data.convert(tmp_path, tmp_path / "out", "icdar")
    assert not list(tmp_path.glob("out*"))
    data.convert(tmp_path, tmp_path / "out", "paddle")
