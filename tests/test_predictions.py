"""Files of predictions: streams that go on, shards, several files as one."""

import gc
import json
import os
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line, write_picture
from test_evaluate import checkpoint, run  # noqa: F401 (run is a fixture)

import ensemble
import evaluate
import labels
import predict
import predictions
from files import DataError, UsageError
from predictions import read_predictions, resume_lines
from sources import load_source


@pytest.fixture
def photos(work):
    """Twelve pictures of several shapes, one in a folder below and one that is broken."""
    rng = np.random.default_rng(0)
    for n in range(11):
        shape = (40 + 9 * n, 90, 3)
        write_picture(work, f"p{n:02d}.png", rng.integers(0, 255, shape, np.uint8))
    write_picture(work, "below/가 é.png", rng.integers(0, 255, (50, 60, 3), np.uint8))
    return work / "images"


@pytest.fixture
def launched(monkeypatch):
    """The shapes of the batches that went through a network."""
    shapes, launch = [], predict.launch

    def note(model, batch, *others):
        shapes.append(batch.shape)
        return launch(model, batch, *others)

    monkeypatch.setattr(predict, "launch", note)
    return shapes


def test_outlines_begin_at_the_upper_left_as_those_of_labels_do(work):
    """Otherwise, once they are labels, the characters of a word lie along its right edge."""
    box = np.array([[10.0, 5], [60, 8], [59, 20], [9, 17]])
    page = labels.Page("a.png", Path("a.png"), size=(90, 70))
    for first in range(4):
        line = predictions.page_line(page, [np.roll(box, -first, 0)], [1.0])
        (word,) = json.loads(line)["images"]["a.png"]["words"].values()
        assert word["points"] == box.tolist()


def lines_of(path):
    return Path(path).read_text().splitlines(keepends=True)


def found_by(run, out, *flags):  # noqa: F811
    run(checkpoint(thresh=0.1, box_thresh=0.0), "--images", "images", "--out", out, *flags)
    return read_predictions(out)


def same(some, others):
    assert some.keys() == others.keys()
    for name, (polygons, scores) in some.items():
        again, other_scores = others[name]
        assert len(polygons) == len(again) and np.array_equal(scores, other_scores)
        assert all(map(np.array_equal, polygons, again))


def test_a_stream_says_what_json_says(photos, run):  # noqa: F811
    whole = found_by(run, "whole.json")
    same(found_by(run, "whole.jsonl"), whole)
    assert len(whole) == 12 and sum(len(polygons) for polygons, _ in whole.values()) >= 12
    header, *lines = lines_of("whole.jsonl")
    assert json.loads(header)["images"] == {} and len(lines) == 12
    assert all(len(json.loads(line)["images"]) == 1 for line in lines)
    entries = [entry for line in lines for entry in json.loads(line)["images"].items()]
    assert dict(entries) == json.loads(Path("whole.json").read_text())["images"]


def test_a_stream_that_was_cut_anywhere_goes_on(photos, run, launched):  # noqa: F811
    """By a kill at any byte: what is whole is not predicted again, and half a line is cut off."""
    found_by(run, "calm.jsonl")
    content = Path("calm.jsonl").read_bytes()
    first = content.index(b"\n") + 1
    rng = random.Random(0)
    in_a_word = content.index(b'"points"') + 9  # before its confidence
    ends = 0, first // 2, first, in_a_word, len(content) - 1
    for end in (*ends, *rng.sample(range(first, len(content)), 6)):
        Path("cut.jsonl").write_bytes(content[:end])
        del launched[:]
        found_by(run, "cut.jsonl")
        assert sorted(lines_of("cut.jsonl")) == sorted(lines_of("calm.jsonl"))
        assert len(launched) == 12 - max(content[:end].count(b"\n") - 1, 0)
    del launched[:]
    out = run("a.pt", "--images", "images", "--out", "calm.jsonl").out
    assert not launched and "calm.jsonl: goes on after 12 pages" in out
    assert Path("calm.jsonl").read_bytes() == content


def test_a_page_that_cannot_be_read_is_tried_again(photos, run):  # noqa: F811
    (photos / "p05.png").write_bytes(b"no picture")
    flags = (checkpoint(), "--images", "images", "--out", "x.jsonl")
    error_line(run(*flags, code=1).err, "p05.png: not a picture")
    assert len(read_predictions("x.jsonl")) == 11
    write_picture(photos.parent, "p05.png", (70, 60))
    run(*flags)
    assert len(read_predictions("x.jsonl")) == 12


def test_a_stream_does_not_mix_what_was_predicted_otherwise(photos, run):  # noqa: F811
    found_by(run, "x.jsonl")
    content = Path("x.jsonl").read_bytes()
    flags = ("--images", "images", "--out", "x.jsonl")
    torch.manual_seed(1)
    checkpoint("wider.pt", neck=32, thresh=0.1, box_thresh=0.0)
    others = ["wider.pt"], ["a.pt", "--thresh", 0.2], ["a.pt", "--tile", 64], ["a.pt", "--amp=off"]
    for other in others:
        error = run(*other, *flags, code=2).err
        error_line(error, "x.jsonl: exists, and was not written for this folder with these weights")
    lists = b"[]\n", b'{"images": {"a.jpg": []}}\n'
    no_json = (
        b"\0\0\n",
        b"\n",
        b'{"images": {"a.jpg": {"wor\n',
    )  # as a crash or an editor leaves them
    for damaged in (b"{}\n", b'{"images": {"a.jpg": {}}}\n', b'{"\xff": 0}\n', *lists, *no_json):
        Path("damaged.jsonl").write_bytes(content + damaged)
        said = run("a.pt", *flags[:3], "damaged.jsonl", code=1).err
        error_line(said, "damaged.jsonl: line 14 is damaged; remove it")
        assert Path("damaged.jsonl").read_bytes() == content + damaged
    Path("notes.jsonl").write_text("mine")
    error_line(
        run("a.pt", *flags[:3], "notes.jsonl", code=2).err,
        "notes.jsonl: exists, and is not what --out",
    )
    assert Path("x.jsonl").read_bytes() == content and Path("notes.jsonl").read_text() == "mine"


def test_a_stream_does_not_mix_heights_of_text(photos, run):  # noqa: F811
    """`--size auto` is the same flag at whatever height text is read."""
    checkpoint(text_height=12.0)
    flags = ("a.pt", "--images", "images", "--size", "auto", "--out", "x.jsonl")
    assert "size auto (text 12 px high)" in run(*flags).out
    Path("higher.json").write_text('{"text_height": 24}')
    error = run(*flags, "--hparams", "higher.json", code=2).err
    error_line(error, "x.jsonl: exists, and was not written for this folder with these weights")
    assert "goes on after 12 pages, which are not drawn again" in run(*flags).out


def test_a_stream_that_goes_on_ranks_all_pages_that_were_asked_for(photos, run):  # noqa: F811
    checkpoint(thresh=0.1, box_thresh=0.0)
    flags = "--images", "images", "--rank", "--out"

    def ranked(*more):
        lines = run("a.pt", *flags, *more).out.splitlines()
        return [line for line in lines if "90 % of them" in line]

    whole = ranked("whole.jsonl")
    assert len(whole) == 12
    parts = [ranked("x.jsonl", "--shard", part) for part in ("1/3", "2/3")]
    assert [*map(len, parts)] == [4, 4]  # a shard ranks its own
    assert ranked("x.jsonl") == ranked("x.jsonl") == whole


def test_a_fifo_gets_the_lines_of_all_pages(photos, run):  # noqa: F811
    """A FIFO holds nothing to go on from, and is written into, as by every other command."""
    whole = found_by(run, "whole.json")
    os.mkfifo("x.jsonl")
    with ThreadPoolExecutor(1) as thread:
        content = thread.submit(Path("x.jsonl").read_bytes)
        run("a.pt", "--images", "images", "--out", "x.jsonl")
    Path("read.jsonl").write_bytes(content.result())
    same(read_predictions("read.jsonl"), whole)


def test_a_stream_does_not_mix_pages_of_like_names(photos, run):  # noqa: F811
    """Pages of another folder with the same names would count as predicted."""
    found_by(run, "x.jsonl")
    content = Path("x.jsonl").read_bytes()
    photos.rename("others")
    error = run("a.pt", "--images", "others", "--out", "x.jsonl", code=2).err
    error_line(error, "x.jsonl: exists, and was not written for this folder", "name another file")
    Path("others").rename("images")
    assert "goes on after 12 pages" in run("a.pt", "--images", "./images/", "--out", "x.jsonl").out
    assert Path("x.jsonl").read_bytes() == content


def test_single_pictures_of_a_folder_share_a_file(photos, run):  # noqa: F811
    checkpoint()
    first, second, *_ = sorted(photos.glob("*.png"))
    for picture in (first, second):
        run("a.pt", "--images", str(picture), "--out", "x.jsonl")
    assert read_predictions("x.jsonl").keys() == {first.name, second.name}
    assert "goes on after 2 pages" in run("a.pt", "--images", "images", "--out", "x.jsonl").out


def test_two_commands_do_not_write_one_stream(tmp_path):
    path = tmp_path / "new/x.jsonl"
    file, done = resume_lines(path, "a")
    assert done == {}
    with pytest.raises(UsageError, match="another command writes it"):
        resume_lines(path, "a")
    file.close()
    resume_lines(path, "a")[0].close()


def test_shards_are_the_whole_and_a_pattern_reads_them_as_one(photos, run):  # noqa: F811
    whole = found_by(run, "whole.jsonl")
    for part in (1, 2, 3, 5, 4):
        found_by(run, f"parts/{part}.jsonl", "--shard", f"{part}/5")
    sizes = [len(read_predictions(f"parts/{part}.jsonl")) for part in range(1, 6)]
    assert sizes == [3, 3, 2, 2, 2]
    same(read_predictions("parts/*.jsonl"), whole)
    joined = "".join(Path(f"parts/{part}.jsonl").read_text() for part in range(1, 6))
    Path("joined.jsonl").write_text(joined)
    same(read_predictions("joined.jsonl"), whole)
    found_by(run, "parts/many.jsonl", "--shard", "40/40")
    assert read_predictions("parts/many.jsonl") == {}


def test_predictions_of_shards_are_scored_and_taken_as_pseudo_labels(work, run):  # noqa: F811
    flags = (checkpoint(thresh=0.1, box_thresh=0.0), "--images", "s/images")
    for part in (1, 2):
        run(*flags, "--out", f"parts/{part}.jsonl", "--shard", f"{part}/2")
    run(*flags, "--out", "whole.json")
    scores = [
        json.loads(run(source, "--data", "s", "--json").out)
        for source in ("whole.json", "parts/*.jsonl")
    ]
    assert scores[0] == scores[1]
    pages = labels.read_competition("parts/*.jsonl", "s/images")
    assert len(pages) == 8 and all(page.path.is_file() for page in pages)


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    for name in ("p1", "p[1]"):
        page = {"images": {f"{name}.png": {"words": {}}}}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(page))
    assert list(read_predictions(tmp_path / "p[1].jsonl")) == ["p[1].png"]
    assert list(read_predictions(tmp_path / "p[1-9].jsonl")) == ["p1.png"]
    one, other = (load_source(str(tmp_path / f"{name}.jsonl")) for name in ("p1", "p[1]"))
    assert one.digest() != other.digest()  # else an ensemble takes them for one member


def test_a_pattern_may_name_files_of_several_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        page = {"images": {f"{name}.png": {"words": {}}}}
        (tmp_path / name / "found.jsonl").write_text(json.dumps(page))
    assert list(read_predictions(tmp_path / "*" / "found.jsonl")) == ["a.png", "b.png"]


def test_files_that_a_pattern_names_are_not_replaced(work, run, capsys):  # noqa: F811
    words = {page.name: {"words": {}} for page in labels.load_labels("s", "val")}
    for number, (name, entry) in enumerate(words.items()):
        Path(f"{number}.jsonl").write_text(json.dumps({"images": {name: entry}}) + "\n")
    before = Path("0.jsonl").read_text()
    commands = (evaluate, ()), (ensemble, ("--method", "voting"))
    for module, flags in commands:
        flags = "[01].jsonl", "--data", "s", "--out", "0.jsonl", *flags
        assert module.main([*flags]) == 2
        assert "0.jsonl: is read by this command" in capsys.readouterr().err
    assert Path("0.jsonl").read_text() == before


def test_what_is_no_stream_is_one_line(tmp_path):
    path, line = tmp_path / "x.jsonl", '{"images": {"a.png": {"words": {}}}}\n'
    for content, where in (
        (line + '{"images": {"b.p', "line 2: not a JSON file"),
        (line + "[]\n", "line 2: not a page"),
        (line + line, "line 2: not a page, or one that came before"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=where):
            read_predictions(path)
    with pytest.raises(UsageError, match="no such file"):
        read_predictions(tmp_path / "y*.jsonl")


def test_flags_of_shards_and_streams_are_checked(photos, run, capsys):  # noqa: F811
    checkpoint()
    error_line(run("a.pt", "--shard", "1/2", code=2).err, "--shard: only with --images")
    for shard in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(["a.pt", "--images", "images", "--shard", shard])
        line = error_line(capsys.readouterr().err, "--shard", shard)
        assert ("a part K from 1 to N" in line) == (shard in ("0/2", "3/2"))


def test_a_big_folder_does_not_fill_the_memory(work, run, monkeypatch):  # noqa: F811
    """Lines of pages are counted while they are alive, and pictures that are open."""

    class Line(str):
        __slots__ = ("__weakref__",)

    alive, most = weakref.WeakSet(), []
    page_line = predictions.page_line

    def counted(*page):
        line = Line(page_line(*page))
        alive.add(line)
        most.append(len(alive))
        return line

    monkeypatch.setattr(Line, "__hash__", lambda line: id(line), raising=False)
    monkeypatch.setattr(Line, "__eq__", lambda a, b: a is b, raising=False)
    monkeypatch.setattr(predictions, "page_line", counted)
    for n in range(400):
        write_picture(work, f"{n}.png", (32, 32))
    run(checkpoint(), "--images", "images", "--out", "x.jsonl", "--size", 32)
    gc.collect()
    assert len(most) == 400 == len(read_predictions("x.jsonl"))
    assert max(most) < 150 and not alive


def test_first_looks_are_taken_as_pages_come(work, run, monkeypatch):  # noqa: F811
    """So that a kill loses those of LOOK_PAGES pages, and not those of all."""
    events = []

    def noted(room, name):
        function = getattr(room, name)

        def call(*words):
            events.append(name)
            return function(*words)

        monkeypatch.setattr(room, name, call)

    monkeypatch.setattr(predict, "LOOK_PAGES", 16)
    noted(predict, "look_at")
    noted(predictions, "page_line")
    for n in range(100):
        write_picture(work, f"{n}.png", (32, 32))
    checkpoint(text_height=12.0)
    run("a.pt", "--images", "images", "--size", "auto", "--out", "x.jsonl")
    assert events.count("look_at") == 200  # the pages are blank, so they are looked at twice
    assert events.count("page_line") == 100
    assert events.index("page_line") < 160


def test_a_file_without_words_is_none_of_predictions(tmp_path):
    """It was scored, and voted, as a detector that finds no text on any page."""
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"images": {"a.png": {"regions": [[1, 1, 9, 1, 9, 9, 1, 9]]}}}))
    with pytest.raises(DataError, match='other.json: image a.png: no "words" object'):
        read_predictions(path)
    path.write_text(json.dumps({"images": {"a.png": {"words": {}}}}))
    assert list(read_predictions(path)) == ["a.png"]
