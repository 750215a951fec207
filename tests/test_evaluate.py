"""evaluate.py as a user types it: scores of prediction files, comparisons, pictures, refusals."""

import html
import json
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import onnxruntime
import pytest
import shapely
import torch
from conftest import ROOT, browse, error_line, write_labels, write_picture, write_predictions
from PIL import Image

import augment
import cleval
import data
import dbnet
import drawing
import engine
import evaluate
import pictures
import predict
import sources
import stress
from db_postprocess import polygons_from_map
from dbnet import DBNet, save_checkpoint
from files import DataError, read_json
from folding import load_network
from hparams import Hparams
from labels import Page, load_labels
from predict import Network
from predictions import read_predictions

CPU = torch.device("cpu")
TINY = Hparams(data="s", backbone="test_efficientnet", pretrained="none", neck=16, size=96)


def predictions(change=lambda i, points: points, name="p", keep=lambda i: True):
    """A predictions file made from the val labels of `s`."""
    images = {}
    for page in load_labels("s", "val"):
        kept = {i: np.asarray(change(i, p)) for i, p in enumerate(page.polygons) if keep(i)}
        words = {f"{i:04d}": {"points": p.tolist(), "confidence": 0.5} for i, p in kept.items()}
        images[page.name] = {"words": words}
    write_labels(Path(), images, name)
    return f"{name}.json"


def checkpoint(name="a.pt", chosen=False, **values):
    """A checkpoint that trained on the train pages of `s`, perhaps chosen by its val pages."""
    torch.manual_seed(0)
    hp = replace(TINY, **values)
    state = {"model": DBNet(hp.backbone, hp.neck).state_dict(), "hparams": asdict(hp)}
    pages = (load_labels("s", split) for split in ("train", "val"))
    trained, held = ([pictures.picture_digest(page.path) for page in own] for own in pages)
    origin = {"trained": trained, "chosen": held if chosen else [], "unknown": []}
    save_checkpoint(name, {**state, "origin": origin, "epoch": 1, "scores": {}})
    return name


@pytest.fixture
def run(work, capsys):
    """run(*flags) beside the receipts -> out and err; the exit code is as expected."""

    def call(*flags, code=0):
        assert evaluate.main([str(flag) for flag in flags]) == code, flags
        return capsys.readouterr()

    return call


def scored(run, *flags):
    return json.loads(run(*flags, "--data", "s", "--json").out)


def test_labels_as_predictions_are_perfect_in_each_metric(run):
    result, out = scored(run, predictions()), run("p.json", "--data", "s").out
    for scores in (result, result["micro"], result["iou50"]):
        assert (scores["precision"], scores["recall"], scores["hmean"]) == (1, 1, 1)
        assert scores["interval"] == [1, 1]
    assert (result["pages"], result["pages_without_labels"]) == (2, 0)
    assert result["labels"] == {"hit": 12, "joined": 0, "split": 0, "loose": 0, "missed": 0}
    texts = ["competition's", "official", "IoU 0.5", "2 pages, 0 without", "[1.0000, 1.0000]"]
    texts += [f"0 of {pair['pairs']} from {pair['gap'][0]}" for pair in result["pairs"]]
    for text in [*texts, "labels: 12 hit, 0 joined, 0 split, 0 loose, 0 missed; neighbours joined"]:
        assert text in out


def test_characters_guessed_by_shape_are_called_so_where_there_is_no_transcription(work, run):
    images = read_json("s/val.json")["images"]
    words = [word for image in images.values() for word in image["words"].values()]
    for kept, by_shape in ((len(words), False), (1, False), (0, True)):
        for word in words[kept:]:
            word.pop("transcription", None)
        write_labels(work, images, "v")
        flags = "--data", "v.json", "--image-dir", "s/images", "--html", "r.html"
        out = run(predictions(), *flags, "--compare", predictions()).out
        for text in (out, (work / "r.html").read_text()):
            assert ("CLEval, official: characters guessed by shape" in text) == by_shape
            assert ("CLEval, official: characters of transcriptions" in text) != by_shape
        assert out.count("guessed by shape") == 2 * by_shape  # the score and the difference


def test_compare_is_paired_and_two_pages_can_say_nothing(run):
    full, part = predictions(), predictions(name="q", keep=lambda i: i % 3)
    same = scored(run, full, "--compare", full)["compare"]["page"]
    over = "2 pages, too narrow"
    verdict = "cannot tell from under 6 pages or groups"
    assert same == {"difference": 0, "interval": [0, 0], "over": over, "verdict": verdict}
    a, b = scored(run, full)["hmean"], scored(run, part)["hmean"]
    gain = scored(run, full, "--compare", part)["compare"]["page"]
    assert gain["difference"] == pytest.approx(a - b) and gain["interval"][0] > 0
    assert gain["verdict"] == verdict
    assert f"{verdict}, vs p.json" in run(part, "--data", "s", "--compare", full).out


def test_what_cannot_be_compared_is_refused_before_a_network_has_predicted(run, monkeypatch):
    monkeypatch.setattr(evaluate, "predict", Mock(side_effect=AssertionError))
    write_labels(Path(), {}, "q")
    flags = checkpoint(), "--data", "s", "--compare", "q.json", "--out", "p.json"
    error_line(run(*flags, code=1).err, "q.json: 2 of 2 pages are not in it")


def test_pages_with_nothing_but_dont_care_count_as_without_labels(work, run):
    images = read_json("s/val.json")["images"]
    for word in next(iter(images.values()))["words"].values():
        word["ignore"] = True
    write_labels(work, images, "v")
    flags = "--data", "v.json", "--image-dir", "s/images", "--json"
    result = json.loads(run(predictions(), *flags).out)
    assert result["pages_without_labels"] == 1 and result["hmean"] == 0.5

    # there is nothing to choose thresholds by
    for word in [word for image in images.values() for word in image["words"].values()]:
        word["ignore"] = True
    write_labels(work, images, "v")
    tune = (checkpoint(), *flags[:4], "--tune", "--write", "t.json")
    error_line(run(*tune, code=1).err, "--tune: the pages have no labels")
    assert not Path("t.json").exists()


def test_scores_in_sample_say_so(run):
    assert run(checkpoint()).err == ""
    assert "in sample" not in run("a.pt").out and scored(run, "a.pt")["in_sample"] == {}
    (line,) = run("a.pt", "--data", "s", "--split", "train").err.splitlines()
    assert line.startswith("warning: a.pt: trained on 6 of these 6 pages")
    digests = ",".join(pictures.picture_digest(page.path) for page in load_labels("s", "val"))
    checkpoint("tuned.pt", tuned=digests)
    both = ("tuned", "thresholds chosen on 2 of them"), ("chosen", "epoch chosen on 2 of them")
    for path, (how, words) in zip(("tuned.pt", checkpoint("best.pt", chosen=True)), both):
        out, err = run(path, "--html", "r.html")
        assert err.startswith(f"warning: {path}: {words[:-4]}these 2 pages (first: synth_")
        words = f"over 2 pages, too narrow, in sample: {words}"
        assert out.count(words) == 3 and words in Path("r.html").read_text()
        result = json.loads(run(path, "--json", "--compare", "a.pt").out)
        assert result["in_sample"] == {how: 2} and f"over {result['over']}" == words
        parts = result["micro"], result["iou50"], result["compare"]["page"]
        assert all(f"over {part['over']}" == words for part in parts)


def test_checkpoint_flags_override_what_it_carries(run):
    assert "size 96, fit longer, thresh 0.9" in run(checkpoint(thresh=0.9)).out
    out = run("a.pt", "--thresh", 0.1, "--mode", "box", "--size", 64, "--fit", "area").out
    assert "size 64, fit area, thresh 0.1" in out and "mode box" in out
    state = torch.load(checkpoint(fit="area"), weights_only=True)
    assert "size 96, fit area" in run("a.pt").out
    del state["hparams"]["fit"]
    save_checkpoint("old.pt", state)
    assert "size 96, fit longer" in run("old.pt").out  # as it was trained


def test_another_size_than_its_own_is_warned_of_and_a_training_file_gives_it(run):
    Path("h.json").write_text('{"lr": 0.1, "size": 64, "thresh": 0.2}')
    warning = (
        "warning: a.pt: size 64, fit longer instead of its own 96, longer; text will be larger"
    )
    assert run(checkpoint(), "--size", 96).err == ""
    for flags in (("--size", 64), ("--hparams", "h.json")):
        out, err = run("a.pt", *flags)
        assert err.startswith(warning) and err.count("\n") == 1 and "size 64, fit longer" in out
    assert "thresh 0.2" in run("a.pt", "--hparams", "h.json").out


def test_pages_without_any_word_are_predicted_ranked_and_not_scored(work, run):
    """The least sure one is the first to label; a page on which nothing is found goes before."""
    square = np.array([(1, 1), (30, 1), (30, 9), (1, 9)], float)
    sure = {"synth_00000.jpg": [0.9] * 9, "synth_00001.jpg": [0.9] * 8 + [0.2]}
    sure["synth_00002.jpg"] = []
    write_labels(work / "s", {name: {"words": {}} for name in sure}, "blank")
    found = [([square + k for k in range(len(s))], np.array(s)) for s in sure.values()]
    write_predictions("p.json", [Page(name, None, size=(70, 90)) for name in sure], found)
    out = run("p.json", "--data", "s/blank.json", "--rank").out
    lines = [line for line in out.splitlines() if " words, 90 % of them score " in line]
    names = [line.split()[-1] for line in lines]
    assert names == ["synth_00002.jpg", "synth_00001.jpg", "synth_00000.jpg"]
    assert lines[0] == "   0 words, 90 % of them score 0.0000 or more  synth_00002.jpg"
    assert lines[1] == "   9 words, 90 % of them score 0.7600 or more  synth_00001.jpg"
    assert "3 pages without labels, nothing to score, 18 words found\n" in out
    assert "hmean" not in out and "not kept: add --out predictions.json" in out
    out = run(checkpoint(), "--data", "s/blank.json", "--out", "o.json").out
    assert "3 pages without labels, nothing to score" in out and "not kept" not in out
    run("p.json", "--data", "s/blank.json", "--out", "p.jsonl")
    again, before = read_predictions("p.jsonl"), read_predictions("p.json")
    assert {n: [*s] for n, (_, s) in again.items()} == {n: [*s] for n, (_, s) in before.items()}
    assert len(read_predictions("o.json")) == 3
    assert "8 pages without labels" in run("a.pt", "--images", "s/images").out


def test_runs_are_compared_where_they_validated_and_pages_that_one_trained_on_say_so(work, run):
    """Of a run on two sets that are those of the first."""
    data.synth("other", 4, 9, size=96, words=4)
    checkpoint("one.pt")
    both = run(checkpoint("two.pt", data="s,other"), "--compare", "one.pt").out
    assert "vs one.pt" in both and "in sample" not in both
    checkpoint("f1.pt", folds=2, fold=1)
    out = run("f1.pt", "--compare", checkpoint("f2.pt", folds=2, fold=2)).out
    assert out.splitlines()[-1].count("in sample: trained on 3 of them  cannot tell") == 1


def test_a_difference_says_how_many_pages_were_seen_by_either_network(run):
    """Also where each has seen other ones, as two folds have."""
    state = torch.load(checkpoint("all.pt"), weights_only=True)
    trained = state["origin"]["trained"]
    for name, part in (("one.pt", trained[:1]), ("others.pt", trained[1:])):
        state["origin"]["trained"] = part
        save_checkpoint(name, state)
    for pair in (("all.pt", "one.pt"), ("one.pt", "all.pt"), ("others.pt", "one.pt")):
        out = run(pair[0], "--compare", pair[1], "--data", "s", "--split", "train").out
        assert "in sample: trained on 6 of them" in out.splitlines()[-1]


def test_a_cpu_computes_in_bf16_only_when_told(run):
    kinds = [engine.amp_dtype(amp, CPU) for amp in ("auto", "off", "fp16", "bf16")]
    assert kinds == [None, None, None, torch.bfloat16]
    checkpoint()
    whole, half = (scored(run, "a.pt", "--amp", amp)["hmean"] for amp in ("off", "bf16"))
    assert half == pytest.approx(whole, abs=0.05)


def test_the_chosen_gpu_says_whether_it_computes_in_bf16(monkeypatch):
    """Turing, then Ampere, emulated; ROCm's capabilities are 9.0 and above."""
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda gpu: [(7, 5), (8, 0)][gpu.index]
    )
    for gpu, auto in (("cuda:0", torch.float16), ("cuda:1", torch.bfloat16)):
        kinds = [engine.amp_dtype(k, torch.device(gpu)) for k in ("auto", "off", "fp16", "bf16")]
        assert kinds == [auto, None, torch.float16, torch.bfloat16]


REFUSED = [
    (2, "p.json", "needs labels to be scored; add --data"),
    (1, "p.json --data s --compare less.json", "less.json: 1 of 2 pages are not in it"),
    (2, "p.json --data s --thresh 0.5", "only with a checkpoint"),
    (2, "p.json --data s --box-thresh 0", "only with a checkpoint"),
    (2, "p.json --data s --tile 64", "only with a checkpoint"),
    (2, "p.json --data nowhere", "nowhere: no such file"),
    (2, "a.pt --data s --device abacus", "not a device"),
    (2, "p.json --data s --device cpu", "--device: only with a checkpoint; leave it out"),
    (2, "a.pt --export x.onnx --device cpu", "--device: not with --export; leave it out"),
    (2, "p.json --data t", "t: no labels of split val; use --split train"),
    (1, "p.json --data s --out p.json/o.json", "error: p.json/o.json: Not a directory; what was"),
    (2, "p.json --data s --out p.json", "p.json: is read by this command; write to another file"),
    (2, "p.json --data s --out s/meta.json", "s/meta.json: is read by this command"),
    (1, "junk.pt --data s", "junk.pt: damaged, or not a checkpoint"),
    (2, "none.pt --data s", "none.pt: cannot be read"),
    (1, "none.onnx --data s", "none.onnx: cannot be read (No such file or directory)"),
    (1, "brace.json --data s", "brace.json: not a JSON file"),
    (1, "list.json --data s", 'list.json: no "images" object'),
    (1, "word.json --data s", "image x: word 7"),
    (2, "lost.pt", "lost.pt: the pages of its run, gone, are not here; name pages by --data or"),
    (2, "a.pt b.pt", "several sources: only with --tune"),
    (2, "a.pt wide.png", "to compare two: --compare; for pictures: --images"),
    (2, "a.pt --device cuda:64", "--device cuda:64: not here"),
    (1, "a.pt --images empty --tile 64", "no picture in it"),
    (2, "a.pt --images gone", "no such file"),
    (2, "a.pt --images s --tile 0", "--tile: at least 32 page pixels"),
    (2, "a.pt --images s --tile 31", "--tile: at least 32 page pixels"),
    (2, "a.pt --images s --data s", "--data: not with --images; leave it out"),
    (2, "a.pt --images s --json", "--json: the pages have no labels"),
    (2, "a.pt --data s --stress --compare p.json", "--compare: only a checkpoint with --stress"),
    (2, "a.pt --mix p.json --data s", "--mix p.json: has no weights; give a checkpoint"),
    (2, "a.pt --data s --rank", "--rank: the pages have labels"),
    (2, "a.pt --split test", "--split: only with --data"),
    (2, "a.pt b.pt --tune --split test --data s", "--split: not with folds"),
    (2, "a.pt --tune --hparams h.json", "--hparams: not with --tune"),
    (2, "a.pt --export x.onnx --out o.json", "--out: not with --tune or --export"),
    (2, "a.pt --export x.onnx --amp fp16", "--amp: an ONNX model is in float32"),
    (2, "p.json --tune --data s", "--tune: only with a checkpoint"),
    (2, "p.json --data s --hparams h.json", "--hparams: only with a checkpoint"),
    (2, "a.pt --hparams h.json", "h.json: unknown key 'box_tresh'; did you mean box_thresh"),
    (1, "large.pt --images wide.png --tile 32", "wide.png: size 960, --tile 32: over 128 M pixels"),
]
WITHOUT = "--compare", "--images", "--tile", "--out", "--export", "--html", "--pictures"
REFUSED += [(2, f"a.pt --tune {flag} 96", f"{flag}: not with --tune") for flag in WITHOUT]


def test_bad_input_is_one_line(work, run):
    checkpoint("a.pt", folds=2, fold=1)
    checkpoint("b.pt", folds=2, fold=2)
    checkpoint("lost.pt", data="gone")
    checkpoint("large.pt", size=960)
    Path("h.json").write_text('{"lr": 0.1, "box_tresh": 0.4}')
    images = read_json(predictions())["images"]
    write_labels(work, dict([*images.items()][1:]), "less")
    write_labels(work, {"x": {"words": {"7": {"points": [[1, 2]]}}}}, "word")
    for name, text in (("junk.pt", "junk"), ("brace.json", "{oops"), ("list.json", "[]")):
        Path(name).write_text(text)
    Path("empty").mkdir()
    Path("t").mkdir()
    write_labels(Path("t"), images)
    cv2.imwrite("wide.png", np.zeros((900, 4000, 3), np.uint8))
    for code, flags, words in REFUSED:
        err = run(*flags.split(), code=code).err
        assert error_line(err, words) and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "flags, words",
    [
        ("a.pt --tnue", "did you mean --tune?"),
        ("", "SOURCE"),
        ("lr=1e-3", "lr=1e-3: no such file; for a flag write --lr=1e-3"),
    ],
)
def test_a_misspelt_or_missing_argument_is_one_line(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(flags.split())
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


def test_a_full_memory_or_disk_is_one_line(run, monkeypatch):
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(predict, "launch", full)
    error_line(run(checkpoint(), code=3).err, "out of memory; lower --size")
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    err = run(predictions(), "--data", "s", "--out", "new/out.json", code=1).err
    error_line(err, "error: new/out.json: No space left on device; ")
    assert not list(Path().rglob("*.tmp"))


def test_any_folder_is_predicted_and_a_broken_file_does_not_stop_it(work, run):
    path, rng = checkpoint(thresh=0.1, box_thresh=0.0), np.random.default_rng(0)
    for name, shape in (("a.png", (40, 300, 3)), ("sub/b.jpg", (500, 90, 3))):
        write_picture(work, name, rng.integers(0, 255, shape, np.uint8))
    Path("images/c.jpg").write_bytes(b"no picture")
    Path("images/d.jpg").symlink_to("nowhere")
    out, err = run(path, "--images", "images", "--out", "p.json", "--pictures", "pics", code=1)
    assert "2 pages" in out and " images/s, cpu" in out
    assert err.count("\n") == 2 and "images/c.jpg: not a picture" in err
    assert "images/d.jpg: cannot be read" in err
    images = read_json("p.json")["images"]
    assert list(images) == ["a.png", "sub/b.jpg"] and images["a.png"]["img_w"] == 300
    assert {p.name for p in Path("pics").rglob("*.jpg")} == {"a.png.jpg", "b.jpg"}
    run(path, "--images", "images/a.png", "--out", "q.json")
    assert read_json("q.json")["images"] == {"a.png": images["a.png"]}


def test_predictions_of_names_that_look_alike_are_named_so(run):
    composed, parted = "émile.png", "e\u0301mile.png"
    write_picture(Path(), composed, (60, 40))
    write_labels(Path(), {composed: {"words": {}}}, "val")
    write_labels(Path(), {parted: {"words": {}}}, "q")
    err = run("q.json", "--data", ".", code=1).err
    words = f"needs an entry too; two names that look alike: {composed!a} and {parted!a}, rename"
    error_line(err, "q.json: 1 of 1 pages are not in it (first: émile.png)", words)


def test_a_name_that_cannot_be_read_back_is_refused_alone(run):
    """And a FIFO: a read from it would never end."""
    names = ["می\u200cخواهم.png", "👨\u200d👩\u200d👧.png", "ex\u00adample.png", f"{'a' * 251}.jpg"]
    for name in (*names, "two\nlines.png"):
        write_picture(Path(), name, (60, 40))
    err = run(checkpoint(), "--images", "images", "--out", "p.json", code=1).err
    assert error_line(err, "'two\\nlines.png': not a file name; it is") and err.count("\n") == 1
    assert read_predictions("p.json").keys() == {*names}
    os.mkfifo("fifo.png")
    err = run("a.pt", "--images", "fifo.png", "--out", "q.json", code=1).err
    error_line(err, "fifo.png: not a regular file")


def test_a_picture_that_cannot_be_drawn_is_named_and_the_rest_is_read(work, run, monkeypatch):
    names = ["a.png", "b" * 251 + ".png", "c.png"]  # with .jpg after it the second is too long
    for name in names:
        write_picture(work, name, (60, 40))
    flags = "--images", "images", "--pictures", "pics", "--out", "p.json"
    out, err = run(checkpoint(), *flags, code=1)
    assert error_line(err, names[1][:50], "not drawn (File name too long)")
    assert "3 pages without labels" in out
    assert [*read_json("p.json")["images"]] == names
    assert {p.name for p in Path("pics").iterdir()} == {"a.png.jpg", "c.png.jpg"}
    # a full disk, and pages with labels
    monkeypatch.setattr(drawing, "replace_file", Mock(side_effect=OSError(28, "No space", "x.jpg")))
    out, err = run("a.pt", "--data", "s", "--pictures", "other", "--out", "q.json", code=1)
    assert err.splitlines() == ["error: x.jpg: not drawn (No space)"] * 2
    assert "hmean" in out and len(read_json("q.json")["images"]) == 2
    # a folder that cannot be made is found before pages are predicted
    monkeypatch.setattr(evaluate, "found_on", None)
    err = run("a.pt", "--data", "s", "--pictures", "/proc/nothing/here", code=1).err
    assert error_line(err, "/proc/nothing/here")


def test_pictures_of_a_kind_that_cannot_be_read_are_counted(work, run):
    checkpoint()
    shutil.copytree("s/images", "photos/today")
    for name in ("a.HEIC", "today/b.heic", "c.gif", "notes.txt"):
        Path("photos", name).write_bytes(b"")
    said = run("a.pt", "--images", "photos").err
    assert said == "warning: photos: 2 .heic, 1 .gif files are left out; save them as JPEG\n"
    assert run("a.pt", "--images", "photos/today/synth_00000.jpg").err == ""


def test_a_tiff_of_several_pages_is_named(work, run):
    checkpoint()
    Path("scans").mkdir()
    sheet = Image.new("RGB", (90, 60), "white")
    sheet.save("scans/one.tif")
    sheet.save("scans/Three.TIFF", save_all=True, append_images=[sheet, sheet])
    Path("scans/broken.tiff").write_bytes(Path("scans/Three.TIFF").read_bytes()[:200])
    os.mkfifo("scans/pipe.tif")
    said = run("a.pt", "--images", "scans", "--out", "p.json", code=1).err
    assert "warning: scans/Three.TIFF: 3 pages, only the first is read" in said
    assert said.count("warning") == 1 and said.count("error: scans/") == 2
    assert len(read_predictions("p.json")) == 2


def test_a_damaged_jpeg_is_named_at_the_end(work, run):
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.jpg"):
        write_picture(work, name, rng.integers(0, 255, (200, 200, 3), np.uint8))
    raw = bytearray(Path("images/b.jpg").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 400] = bytes(400)
    Path("images/b.jpg").write_bytes(raw)
    out, err = run(checkpoint(), "--images", "images", "--out", "p.json")
    assert err.startswith("warning: damaged picture: b.jpg: ") and err.count("\n") == 1
    assert "2 pages" in out
    write_labels(work, {name: {"words": {}} for name in ("a.jpg", "b.jpg")}, "damaged")
    images = read_json("damaged.json")["images"]
    images["a.jpg"]["words"]["1"] = {"points": [[1, 1], [30, 1], [30, 9], [1, 9]]}
    write_labels(work, images, "damaged")
    assert "damaged picture: b.jpg: " in run("a.pt", "--data", "damaged.json").err


def test_drawn_pages_of_any_name_replace_neither_each_other_nor_the_pages(run):
    Path("mine/folder.png").mkdir(parents=True)
    jpegs, strange = ["a.jpg", "b.JPG"], ["한글 영수증.png", "émile\u0301.png", "a b'\"&<.png"]
    for name in (*jpegs, "a.png", *strange, "bad-\udcff.png", "bad-\udcfe.png"):
        Path("mine", name).write_bytes(cv2.imencode(name[-4:], np.full((60, 40), 200))[1])
    before = {p: p.read_bytes() for p in Path("mine").iterdir() if p.is_file()}
    run(checkpoint(), "--images", "mine", "--out", "p.json", "--pictures", "pics")
    others = ["a.png", *strange, "bad-\\xff.png", "bad-\\xfe.png"]
    assert read_predictions("p.json").keys() == {*jpegs, *others}
    assert {p.name for p in Path("pics").iterdir()} == {*jpegs, *(f"{n}.jpg" for n in others)}
    err = run("a.pt", "--images", "mine", "--pictures", "mine", code=2).err
    error_line(err, "mine/a.jpg: is read by this command; write to another file")
    assert before == {p: p.read_bytes() for p in Path("mine").iterdir() if p.is_file()}


def test_drawn_pages_replace_drawn_pages_and_no_photographs(work, run):
    """photos has another picture of the same name, which nothing could bring back."""
    write_picture(work, "a.jpg", (60, 40))
    write_picture(Path("photos"), "a.jpg", (50, 50))
    other = Path("photos/images/a.jpg").read_bytes()
    flags = checkpoint(), "--images", "images", "--pictures"
    error = "photos/images/a.jpg: exists, and is no drawn page; draw into another folder"
    error_line(run(*flags, "photos/images", "--out", "p.json", code=2).err, error)
    assert Path("photos/images/a.jpg").read_bytes() == other and not Path("p.json").exists()
    run(*flags, "pics")
    run(*flags, "pics")


def test_linked_folders_are_read_and_what_a_first_run_has_drawn_is_not(work, monkeypatch):
    for name in ("images/sub/b.jpg", "images/found/a.jpg", "elsewhere/c.png", "images/a.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("images/found/own.jpg").touch()  # an original
    drawing.write_picture(Path("images/found/a.jpg"), np.zeros((9, 9, 3), np.uint8))
    links = {"linked": "../elsewhere", "sub/up": "..", "gone": "nowhere", "sub/found": "../found"}
    for link, target in links.items():
        Path("images", link).symlink_to(target)
    Path("elsewhere/back").symlink_to("../images")
    for folder, drawn in (("images", "images/found"), (".", "found")):
        names = [page.name for page in evaluate.picture_pages(folder, drawn)]
        own = ["found/own.jpg", "linked/c.png", "sub/b.jpg", "sub/found/own.jpg"]
        assert names == ["a.jpg", *own]
        monkeypatch.chdir(work / "images")
    assert [page.name for page in evaluate.picture_pages("found", "found")] == ["own.jpg"]


def test_a_link_to_itself_and_a_closed_folder_do_not_stop_the_rest(work, run, monkeypatch):
    """As a link that leads nowhere, and as lost+found, which only root may read."""
    write_picture(work, "a.png", (60, 40))
    Path("images/loop.jpg").symlink_to("loop.jpg")
    Path("images/lost+found").mkdir()

    def scandir(folder, listing=os.scandir):
        if Path(folder).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    monkeypatch.setattr(pictures.os, "scandir", scandir)
    err = run(checkpoint(), "--images", "images", "--out", "p.json", code=1).err
    warning, error = err.splitlines()
    assert warning == "warning: images/lost+found: a folder that may not be read is left out"
    assert error.startswith("error: images/loop.jpg: cannot be read")
    assert [*read_json("p.json")["images"]] == ["a.png"]


def test_what_is_found_on_pages_without_labels_is_no_false_alarm(run):
    """As the test split of a competition: its pages are in a label file, and have no words."""
    images = read_json(predictions())["images"]
    write_labels(Path("s"), {name: {} for name in images}, "unknown")
    run("p.json", "--data", "s/unknown.json", "--pictures", "pics")
    for file in Path("pics").iterdir():
        drawn = pictures.read_image(file).astype(int)
        colours = drawing.COLOURS["found"], drawing.COLOURS["false alarm"]
        found, wrong = (np.abs(drawn - colour).max(2).min() for colour in colours)
        assert found < 60 < wrong


def test_pictures_that_cannot_be_read_are_named_in_their_order(work, run):
    names = [f"images/{n:02d}.jpg" for n in range(30)]
    write_picture(work, "a.jpg", (60, 40))
    for n, name in enumerate(names):
        Path(name).write_bytes(b"no picture" * 10**5 * (n < 5))
    err = run(checkpoint(), "--images", "images", "--out", "p.json", code=1).err
    assert [line.split(": ")[1] for line in err.splitlines()] == names


def joining(i, points):
    """The detection of label 0 is elsewhere, that of label 4 reaches over the next, too."""
    low = points.min(0)
    return (points - low) * (2.4 if i == 4 else 1, 1) + low + (0 if i else 40)


def test_pictures_show_labels_hits_joined_misses_and_false_alarms(run):
    path = predictions(joining, keep=lambda i: i != 1)
    out = run(path, "--data", "s", "--pictures", "pics").out
    assert "6 hit, 2 joined, 0 split, 0 loose, 4 missed" in out
    drawn = [cv2.imread(str(file))[40:, :, ::-1].astype(int) for file in Path("pics").iterdir()]
    assert len(drawn) == 2 and all(max(image.shape) >= 1400 for image in drawn)
    for colour in drawing.COLOURS.values():
        assert all((np.abs(image - colour).max(2) < 100).sum() > 50 for image in drawn)


def test_confidences_stand_on_pictures_beside_their_words(work):
    write_picture(work, "p.png", np.full((200, 300, 3), 120, np.uint8))
    page, box = Page("p.png", work / "images/p.png", None), np.array([(50, 60), (200, 60)])
    polygon = np.concatenate([box, box[::-1] + (0, 20)]).astype(float)
    image = pictures.read_image(page.path)
    plain, scored = (drawing.draw_page(image, page, [polygon], s).astype(int) for s in ([], [0.87]))
    changed = np.argwhere(np.abs(plain - scored).max(2) > 50)
    zoom = 1400 / 300
    (top, left), (bottom, right) = changed.min(0) - (40, 0), changed.max(0) - (40, 0)
    assert 5 < bottom - top < 25 and 20 < right - left < 50
    assert 0 < left - 200 * zoom < 10 and 60 * zoom - 20 < top and bottom < 60 * zoom + 15
    assert scored[changed[:, 0], changed[:, 1]].min() < 60 and scored.max() == 255


def page_maps(networks, pages, tile=0):
    """K maps of each page, and K more by tiles where these enlarge it."""
    if tile:
        networks = [*networks, *(network._replace(tile=tile) for network in networks)]
    stream = predict.predict_each(networks, pages, CPU, lambda page, maps: maps)
    return [maps for _, maps in stream]


def test_letters_and_lines_grow_with_the_picture_and_the_strip_names_every_colour(work):
    """On 12 megapixels a confidence is as large as on a small picture, shown as large."""
    image = np.full((4000, 3000, 3), 120, np.uint8)
    page = Page(
        "p.png", None, [np.array([(300, 300), (900, 300), (900, 400), (300, 400)])], [False]
    )
    far = page.polygons[0] + (0, 2000)
    plain, scored = (
        drawing.draw_page(image, page, [page.polygons[0], far], scores).astype(int)
        for scores in ([], [0.87, 0.5])
    )
    strip = len(scored) - 4000
    changed = np.argwhere(np.abs(plain - scored).max(2)[: strip + 2000] > 50)
    assert 25 < np.ptp(changed[:, 0]) < 50
    for kind in ("label", "hit", "false alarm", "joined", "miss"):
        close = np.abs(scored[:strip] - drawing.COLOURS[kind]).max(2) < 60
        assert close.any() and np.ptp(np.argwhere(close)[:, 0]) > 30
    row = scored[strip + 350, 850:950]  # one line of the label and one of the detection
    assert 4 <= (np.abs(row - scored[strip + 350, 800]).max(1) > 50).sum() <= 10


def test_a_detector_takes_paths_and_pictures_and_lists_of_them(work, capsys):
    weights = checkpoint(thresh=0.1, box_thresh=0.0)
    path = next(Path("s/images").iterdir())
    evaluate.main([weights, "--images", str(path), "--out", "p.json", "--min-size", "1"])
    detector = evaluate.Detector(weights, device="cpu", min_size=1)
    (expected, expected_scores), *_ = read_predictions("p.json").values()
    picture = pictures.read_image(path)
    flipped = np.ascontiguousarray(picture[..., ::-1])[..., ::-1]  # a view with another stride
    for one in (path, str(path), picture, flipped, Image.fromarray(picture)):
        polygons, scores = detector(one)
        assert len(polygons) == len(expected) > 0 and np.allclose(scores, expected_scores)
        assert all(map(np.allclose, polygons, expected)) and (np.diff(scores) <= 0).all()
    several = detector([path, picture])
    assert len(several) == 2 and np.array_equal(several[0][1], several[1][1])
    assert detector([]) == []
    nothing, scores = evaluate.Detector(weights, box_thresh=1)(path)
    assert nothing == [] and len(scores) == 0


def test_a_detector_says_what_is_wrong(work):
    checkpoint()
    for words, make in (
        ("lr is not one of size, fit", lambda: evaluate.Detector("a.pt", lr=1)),
        ("thresh = 3 is not within", lambda: evaluate.Detector("a.pt", thresh=3)),
        (
            "--engine numpy: not one of auto, torch",
            lambda: evaluate.Detector("a.pt", engine="numpy"),
        ),
        ("p.json: not a checkpoint", lambda: evaluate.Detector(predictions())),
        ("gone.pt: cannot be read", lambda: evaluate.Detector("gone.pt")),
        ("s: is a folder; name a file in it", lambda: evaluate.Detector("s")),
        ("gone.jpg: cannot be read", lambda: evaluate.Detector("a.pt")("gone.jpg")),
        ("not a picture, uint8 RGB", lambda: evaluate.Detector("a.pt")(np.zeros((9, 9)))),
        ("not a picture, uint8 RGB", lambda: evaluate.Detector("a.pt")(np.zeros((9, 9, 3)))),
        (
            "not a picture, uint8 RGB",
            lambda: evaluate.Detector("a.pt")([np.zeros((0, 9, 3), "u1")]),
        ),
        ("not a picture, uint8 RGB", lambda: evaluate.Detector("a.pt")(("a.jpg", "b.jpg"))),
        ("not a picture, uint8 RGB", lambda: evaluate.Detector("a.pt")(None)),
    ):
        with pytest.raises(DataError, match=words):
            make()


@pytest.fixture
def loads(monkeypatch):
    """Paths of the checkpoints that were loaded so far."""
    paths, load = [], sources.load_checkpoint
    monkeypatch.setattr(sources, "load_checkpoint", lambda path: paths.append(path) or load(path))
    monkeypatch.setattr(dbnet, "read_saved", Mock(side_effect=dbnet.read_saved))
    yield paths
    assert dbnet.read_saved.call_count == len(paths)  # by no other way


def test_a_checkpoint_is_loaded_once_a_command(run, loads):
    for flags in (
        ["a.pt"],
        ["a.pt", "--compare", checkpoint("b.pt")],
        ["a.pt", "--data", "s", "--pictures", "pics", "--html", "r.html"],
        ["a.pt", "--images", "s/images"],
        ["a.pt", "--export", "half.pt"],
        ["a.pt", "--tune", "--write", "tuned.pt", "--thresh", "0.3", "--mode", "box"],
    ):
        loads.clear()
        dbnet.read_saved.reset_mock()
        checkpoint()
        run(*flags)
        assert loads == [word for word in flags if word in ("a.pt", "b.pt")]


def test_help_does_not_name_defaults_of_training(capsys):
    with pytest.raises(SystemExit, match="0"):
        evaluate.main(["--help"])
    shown = capsys.readouterr().out
    assert "default: the checkpoint's" in shown and "--thresh THRESH" in shown
    assert not re.search("--[a-z-]+ [0-9]", shown)


def test_two_runs_are_compared_on_the_set_that_both_have(work, run):
    """Before, each needed --data: the other set of the first is not here, or the second's is."""
    data.synth("other", 8, 9, size=96, words=4)
    checkpoint("a.pt")
    ab, ba, abc = (
        checkpoint(f"{name}.pt", data=sets)
        for name, sets in (("ab", "s,other"), ("ba", "other,s"), ("abc", "s,other,gone"))
    )
    own = json.loads(run("a.pt", "--json").out)
    for first, second in ((ab, "a.pt"), (ba, "a.pt"), (abc, "a.pt"), ("a.pt", abc), ("a.pt", ba)):
        out, err = run(first, "--compare", second, "--json")
        result = json.loads(out)
        del result["compare"]
        assert result == own, (first, second)
        assert "pages: those of s, which both runs have" in err
    _, err = run(ab, "--compare", ba)
    assert "pages: those of s, which both" in err
    for first, second in (("a.pt", "a.pt"), (ab, ab)):
        assert "pages: those" not in run(first, "--compare", second).err


def test_no_output_replaces_labels_of_another_set_of_the_run(work, run, monkeypatch):
    monkeypatch.setattr(evaluate, "check_forms", lambda args: None)
    data.synth("other", 8, 9, size=96, words=4)
    checkpoint("a.pt", data="s,other")
    labels = Path("other/val.json").read_bytes()
    for flag in ("--out", "--html", "--audit"):
        err = run("a.pt", flag, "other/val.json", code=2).err
        assert "error: other/val.json: is read by this command" in err
    assert Path("other/val.json").read_bytes() == labels


class Ink(torch.nn.Module):
    """Finds dark places and what is near, so that pipelines can be tested without training."""

    def __init__(self, *reach):
        super().__init__()
        self.near = torch.nn.MaxPool2d(reach, 1, [n // 2 for n in reach])

    def forward(self, pages):  # uint8 or float [B, H, W, 3] -> logits [B, 1, H, W]
        return self.near(120 - pages.float().mean(3)[:, None]) / 4


@pytest.mark.parametrize("batch", [1, 8])
def test_networks_and_pages_in_one_pass_get_the_maps_they_get_alone(work, monkeypatch, batch):
    """Bit for bit, also of networks of different sizes and with pages of one shape in a batch."""
    in_batches, pages = predict.batch_tiles, load_labels("s", "train")
    monkeypatch.setattr(predict, "batch_tiles", lambda loaded, _: in_batches(loaded, batch))
    kinds = (3, 96), (5, 64), (5, 96)
    networks = [Network(Ink(1, n), replace(TINY, size=size)) for n, size in kinds]
    together = page_maps(networks, pages)
    for page, maps in zip(pages, together, strict=True):
        assert page.size == pictures.read_image(page.path).shape[1::-1]
        for network, prob in zip(networks, maps, strict=True):
            ((alone,),) = page_maps([network], [page])
            assert np.array_equal(prob, alone) and max(prob.shape) == network.hp.size
    assert len({prob.tobytes() for maps in together for prob in maps}) == 18


def test_tiles_merge_into_the_map_of_the_whole_page(work):
    def ink_map(size, tile):
        network = Network(Ink(1, 1), replace(TINY, size=size, amp="off"))
        pages = evaluate.picture_pages("big.png")
        ((*_, found),) = page_maps([network], pages, tile)
        assert pages[0].size == (300, 700)
        return found

    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (700, 300, 3), np.uint8), (0, 0), 4)
    cv2.imwrite("big.png", (128 + 8 * (image.astype(float) - 128)).clip(0, 255).astype(np.uint8))
    whole, tiled = ink_map(700, 0), ink_map(96, 96)
    assert whole.shape == tiled.shape == (700, 300) and (whole == tiled).all()
    assert 50 < whole.mean() < 200
    assert ink_map(96, 192).shape == (350, 150) and ink_map(96, 700).shape == (96, 41)


@pytest.mark.parametrize("size", [(300, 900), (480, 480)])
def test_words_come_back_to_their_pixels_whatever_the_fit(work, size):
    """Black words drawn on a page 3:1 and on one 1:1, found by a network that sees black: their
    rectangle is back within a map pixel; by networks of both fits at once as alone, in tiles too;
    the corners of the map are the page's within .01."""
    image = np.full((*size[::-1], 3), 255, np.uint8)
    image[120:168, 60:240] = 0
    cv2.imwrite("one.png", image)
    (page,) = evaluate.picture_pages("one.png")
    networks = [Network(Ink(1, 1), replace(TINY, size=384, fit=fit)) for fit in ("area", "longer")]
    shapes = [(384, 384)] * 2 if size[0] == size[1] else [(665, 222), (384, 128)]
    for tile in (0, 192):
        (together,) = page_maps(networks, [page], tile)
        for network, prob, shape in zip(networks, together[-2:], shapes, strict=True):
            assert tile or prob.shape == shape == predict.map_shape(page, network.hp)
            scale = np.array(prob.shape[::-1]) / size
            np.testing.assert_allclose(prob.shape[::-1] / scale, size, atol=0.01)
            mode = replace(network.hp, unclip_ratio=1e-9, mode="box", min_size=0)
            (polygon,), _ = predict.decode_page(prob, page.size, mode)
            wanted = [[60, 120], [240, 120], [240, 168], [60, 168]]
            assert np.abs(polygon - wanted).max() <= 1 / scale.min()
            ((*_, alone),) = page_maps([network], [page], tile)
            assert np.array_equal(prob, alone)


class Stroke(torch.nn.Module):
    """Finds ink that has a light place within `reach` pixels: large letters fall apart."""

    def __init__(self, reach):
        super().__init__()
        self.near = torch.nn.MaxPool2d(2 * reach + 1, 1, reach)

    def forward(self, pages):  # uint8 [B, H, W, 3] -> logits [B, 1, H, W]
        light = pages.float().mean(3)[:, None]
        return (torch.minimum(120 - light, self.near(light) - 120) / 4).clamp(-30, 30)


def test_tiles_find_small_print_and_leave_large_print_to_the_whole_page(work):
    """Small words, 8 px high, vanish on the whole page; a large one breaks in tiles, which find no
    more of it than two spots; five lines that the whole page joins to one block stay five."""
    image = np.full((1600, 1600, 3), 255, np.uint8)
    boxes = [(100, 100, 1400, 420), (100, 560, 200, 568), (900, 700, 1000, 708)]
    boxes += [(200, y, 900, y + 60) for y in range(900, 1200, 64)]
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = 0
    for x in (500, 1000):
        image[250:270, x : x + 20] = 255
    cv2.imwrite("page.png", image)
    whole = Network(Stroke(20), replace(TINY, size=160, box_thresh=0.6, unclip_ratio=1e-9))

    def heights(network):
        pages = evaluate.picture_pages("page.png")
        ((_, (polygons, scores)),) = predict.predict(network, pages, CPU, lambda _, found: found)
        assert (np.diff(scores) <= 0).all()
        return sorted(round(np.ptp(polygon[:, 1])) for polygon in polygons)

    assert heights(whole) == [320, 320]
    assert heights(whole._replace(tile=400)) == [8, 8, *[60] * 5, 320]


def test_a_jpeg_is_decoded_as_large_as_its_tiles_need_even_if_a_look_reads_it_small(work):
    image = np.random.default_rng(0).integers(0, 255, (1600, 1200, 3), np.uint8)
    cv2.imwrite("a.jpg", image)
    cv2.imwrite("a.png", cv2.imread("a.jpg"))
    hp = Hparams(size=832, fit="area", look=True, text_height=20.0)
    networks = [predict.Network(None, hp), predict.Network(None, hp, tile=1040)]
    tiles = []
    for name in ("a.jpg", "a.png"):
        page = Page(name, work / name, size=(1200, 1600))
        page.look = predict.Look((0, 0, 1200, 1600), 200.0, 0.9, False)
        whole, *rest = predict.load_page(0, page, networks, None)
        assert whole.sheet.network == 0 and {tile.sheet.network for tile in rest} == {1}
        tiles.append([tile.picture for tile in rest])
    assert all(map(np.array_equal, *tiles))


def test_predictions_are_in_the_order_of_pages_and_whole_or_absent(work):
    pages, network = evaluate.picture_pages("s/images"), Network(Ink(1, 1), TINY)
    stream = predict.predict_each([network], pages, CPU, lambda page, maps: page)
    assert [(i, page.name) for i, page in stream] == [*enumerate(p.name for p in pages)]
    assert len(pages) == 8
    with pytest.raises(ZeroDivisionError):
        write_predictions("p.json", pages, (1 / 0 for _ in pages))
    assert not list(work.glob("*p.json*"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_predictions_file_of_any_number_of_pages_reads_back_equal(work, count):
    names = ["a.png", 'q"uo,te.png', "한글.png"][:count]
    square = np.array([(0, 0), (9, 0), (9, 8.5), (0, 8.5)])
    found = [([square + k] * k, [0.25, 1.0][:k]) for k in range(count)]
    write_predictions("p.json", [Page(n, None, size=(70, 90)) for n in names], found)
    assert list(json.loads(Path("p.json").read_text())["images"]) == names
    for name, one in zip(names, found, strict=True):
        polygons, scores = read_predictions("p.json")[name]
        assert np.array_equal(polygons, one[0]) and scores.tolist() == one[1]


def test_weights_to_share_are_half_as_large_and_predict_the_same(run, work):
    state = torch.load(checkpoint(), weights_only=True)
    save_checkpoint("a.pt", {**state, "scores": {"hmean": 0.9, "pages": {"x": 0.9}}})
    run("a.pt", "--export", "half.pt", "--thresh", 0.4)
    for taken in ("half.pt", "a.pth"):
        error_line(run("a.pt", "--export", taken, code=2).err, "not a new .pt file")
    whole, half = (load_network(path) for path in ("a.pt", "half.pt"))
    assert Path("half.pt").stat().st_size < 0.6 * Path("a.pt").stat().st_size
    assert half[1] == replace(whole[1], thresh=0.4) and half[2]["origin"] == whole[2]["origin"]
    page = torch.randint(256, (1, 64, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert (whole[0](page).sigmoid() - half[0](page).sigmoid()).abs().max() < 0.01
    raw = bytearray(Path("half.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    Path("half.pt").write_bytes(raw)
    error_line(run("half.pt", code=1).err, "half.pt: damaged")


def test_a_mean_of_two_checkpoints_has_the_mean_weights_and_both_records(run, work):
    """Also of one with itself; another network is refused."""
    checkpoint("a.pt")
    state = torch.load(checkpoint("b.pt", chosen=True), weights_only=True)
    moved = {key: value + 1 if value.ndim == 4 else value for key, value in state["model"].items()}
    save_checkpoint("b.pt", {**state, "model": moved})

    run("a.pt", "--mix", "b.pt", "--export", "mean.pt")
    run("a.pt", "--mix", "a.pt", "--export", "same.pt")
    names = ("a.pt", "b.pt", "mean.pt", "same.pt")
    a, b, mean, same = (torch.load(name, weights_only=True) for name in names)
    for key, ours in a["model"].items():
        half = 0.5 * (ours.float() + b["model"][key].float())
        torch.testing.assert_close(mean["model"][key].float(), half, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(same["model"][key].float(), ours.float(), rtol=1e-3, atol=1e-3)
    assert mean["origin"] == {key: sorted(names) for key, names in b["origin"].items()}
    assert scored(run, "a.pt", "--mix", "a.pt") == scored(run, "a.pt")

    checkpoint("wide.pt", neck=32)
    line = run("a.pt", "--mix", "wide.pt", "--export", "c.pt", code=2).err
    error_line(line, "--mix wide.pt: not the same network as a.pt")


def test_the_weights_that_ship_find_the_words_of_a_drawn_receipt(run):
    weights = ROOT / "weights/receipts-lite2.pt"
    assert weights.stat().st_size < 12e6
    data.synth("lines", 2, 4, size=960, words=60, unit="line")
    found = json.loads(run(weights, "--data", "lines", "--size", 640, "--json").out)
    assert found["hmean"] > 0.97 and found["iou50"]["hmean"] > 0.9
    state = torch.load(weights, weights_only=True)
    assert not any(str(value).startswith("/") for value in state["hparams"].values())
    assert len(state["origin"]["trained"]) > 400 and not state["origin"]["unknown"]


def exported(run, name):
    """The onnxruntime session of a checkpoint's network."""
    assert "differ by" in run(checkpoint(chosen=True), "--export", name, "--thresh", 0.25).out
    return onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])


def test_an_exported_network_gives_pytorchs_maps_at_any_size(run):
    session = exported(run, "m.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert about["thresh"] == "0.25" and about["size"] == "96" and about["mode"] == "polygon"
    held = {pictures.picture_digest(page.path) for page in load_labels("s", "val")}
    assert set(about["epoch_chosen_on"].split()) == held and len(about["trained_on"].split()) == 6
    model = load_network("a.pt")[0]
    for height, width in ((96, 64), (64, 160)):
        page = torch.rand(2, height, width, 3).mul(255).round()
        found = session.run(None, {"pages": page.permute(0, 3, 1, 2).numpy() / 255})[0]
        with torch.no_grad():
            assert np.abs(model(page).sigmoid().numpy() - found).max() < 1e-4


def test_rapidocr_reads_a_receipt_with_the_exported_detector(run, monkeypatch):
    from rapidocr_onnxruntime import RapidOCR

    ink = Ink(9, 25)
    monkeypatch.setattr(evaluate, "network_of", lambda *_: ink)
    flags = {"size": 453, "fit": "area", "thresh": 0.3, "box-thresh": 0.5, "unclip-ratio": 0.2}
    flags = [word for key, value in flags.items() for word in (f"--{key}", value)]
    out = run(checkpoint(), "--export", "ink.onnx", *flags).out
    settings = re.search(r"2:1: (RapidOCR\(.*)", out)[1]
    assert "max_side_len=641" in settings and "det_limit_side_len=320" in settings
    image = np.full((320, 640, 3), 255, np.uint8)
    words = ("TOTAL", "12.50", "CASH", "20.00", "CHANGE", "7.50")
    for i, word in enumerate(words):
        at = 30 + 300 * (i % 2), 70 + 90 * (i // 2)
        cv2.putText(image, word, at, cv2.FONT_HERSHEY_SIMPLEX, 1.5, (0, 0, 0), 4, cv2.LINE_AA)
    reader = eval(settings, {"RapidOCR": RapidOCR})
    boxes, _ = reader(image, use_cls=False, use_rec=False)
    hp = {"thresh": 0.3, "box_thresh": 0.5, "unclip_ratio": 0.2, "min_size": 3, "mode": "box"}
    (found,) = ink(torch.from_numpy(image)[None]).sigmoid()[:, 0].numpy()
    ours, _ = polygons_from_map(found, **hp, max_candidates=100)
    assert len(boxes) == len(ours) == len(words)
    a, b = (shapely.polygons(np.array(p)) for p in (ours, boxes))
    shared = shapely.area(shapely.intersection(a[:, None], b))
    assert (shared / (shapely.area(a)[:, None] + shapely.area(b) - shared)).max(1).min() > 0.8
    assert {"TOTAL", "CASH", "CHANGE"} <= {text.strip() for _, text, _ in reader(image)[0]}


def report_numbers(page):
    """Numbers of a report: {metric: [precision, recall, hmean, low, high]}."""
    cells = (re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in page.split("<tr>"))
    rows = {html.unescape(c[0]): " ".join(c[1:]).replace(" to ", " ").split() for c in cells if c}
    numbers = {name: [float(v) for v in row] for name, row in rows.items() if row[0][0] in "01"}
    return {m: numbers[name] for m, name in cleval.NAMES.items()}


def check_report(page, result, names):
    for metric, row in report_numbers(page).items():
        r = result if metric == "page" else result[metric]
        expected = [r["precision"], r["recall"], r["hmean"], *r["interval"]]
        assert row == pytest.approx(expected, abs=6e-5)
    counts = [["number", *result["labels"].values()]]
    counts += [[f"from {p['gap'][0]}", p["pairs"], p["joined"]] for p in result["pairs"]]
    assert all(f"<td>{'</td><td>'.join(map(str, row))}</td>" in page for row in counts)
    bars = re.findall(r'<text class="value".*?>(.*?)</text>', page)
    assert sum(int(bar) for bar in bars if bar.isdigit()) == result["pages"]
    assert all(name in page for name in names) and page.count("data:image/jpeg;base64,") == 2


def test_a_report_shows_the_numbers_of_the_scores(work, run):
    path = predictions(joining, keep=lambda i: i != 1)
    result, page = scored(run, path, "--html", "r.html"), (work / "r.html").read_text()
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    check_report(page, result, read_json(path)["images"])
    check_report(browse(work / "r.html"), result, read_json(path)["images"])


@pytest.mark.parametrize("shape", [(9000, 30), (9000, 1), (1, 9000), (66_000, 30), (30, 66_000)])
def test_a_page_of_any_shape_is_in_the_report_and_drawn(work, shape):
    cv2.imwrite("long.png", np.full((*shape, 3), 200, np.uint8))
    page = Page("long.png", work / "long.png")
    drawn = drawing.draw_page(
        pictures.read_image(page.path), page, [np.array([(1, 1), (20, 1), (20, 9)])]
    )
    assert len(drawing.embedded_picture(drawn)) > 500
    drawing.write_picture(Path("long.jpg"), drawn)
    assert pictures.read_image("long.jpg").shape == drawn.shape


def test_a_predictions_file_has_the_scores_of_its_checkpoint(run, monkeypatch):
    monkeypatch.setattr(sources, "network_of", lambda *_: Ink(3, 3))
    path, written = checkpoint(thresh=0.1, box_thresh=0.9), ("--html", "r.html", "--out", "o.json")
    assert scored(run, path, *written) == scored(run, path) == scored(run, "o.json")
    words = [w for p in read_json("o.json")["images"].values() for w in p["words"].values()]
    assert words and all(0 <= word["confidence"] <= 1 for word in words)


# ---------------------------------------------------------------- a first look


class Recorded(torch.nn.Module):
    """A network that keeps the shapes of what it was given."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.shapes = []

    def forward(self, pages):
        self.shapes.append(tuple(pages.shape[1:3]))
        return self.model(pages)


def small_print(path, left=1300, top=1100, height=12, ink=255):
    """A white picture of 3,000 x 2,400 px with five lines in its middle. ink: 255 is black."""
    image = np.full((2400, 3000, 3), 255, np.uint8)
    boxes = []
    for k in range(5):
        y = top + 3 * k * height
        image[y : y + height, left : left + 300] = 255 - ink
        boxes.append([[left, y], [left + 300, y], [left + 300, y + height], [left, y + height]])
    cv2.imwrite(str(path), image)
    return np.array(boxes, float)


@pytest.fixture
def whole_words(monkeypatch):
    """First looks take the words of `Ink` as they are, since it draws them whole, not shrunk."""
    hp = replace(predict.LOOK_HP, unclip_ratio=1e-9, mode="box", min_size=0, box_thresh=0.1)
    monkeypatch.setattr(predict, "LOOK_HP", hp)


@pytest.mark.usefixtures("whole_words")
def test_a_first_look_reads_the_text_alone_at_the_height_of_training(work):
    boxes = small_print("far.png", ink=136)
    hp = replace(TINY, size=960, fit="area", look=True, text_height=24.0)
    hp = replace(hp, unclip_ratio=1e-9, mode="box", min_size=0, box_thresh=0.1)
    model = Recorded(Ink(1, 1))
    (page,) = evaluate.picture_pages("far.png")
    stream = predict.predict(Network(model, hp), [page], CPU, lambda _, found: found)
    ((_, (polygons, _)),) = stream

    # 24 px for lines of about 12: the text is enlarged twice, and nothing else is read
    assert predict.page_factor(page, hp) == pytest.approx(2, rel=0.3)
    look, again, read = model.shapes
    assert np.prod(look) == pytest.approx(512 * 512, rel=0.1)
    assert np.prod(again) == pytest.approx(1024 * 1024, rel=0.1)  # grey lines score low
    assert read[0] < 1000 and read[1] < 1600
    assert {side % 64 for side in read} == {0}  # few shapes in all
    found = sorted((polygon.tolist() for polygon in polygons), key=lambda points: points[0][1])
    np.testing.assert_allclose(found, boxes, atol=1.5)


@pytest.mark.usefixtures("whole_words")
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_text_that_lies_on_its_side_is_read_as_lines(work, quarters):
    boxes = small_print("page.png", left=300, top=100, height=60)
    image = np.rot90(cv2.imread("page.png"), quarters)
    cv2.imwrite("page.png", image)
    size = np.array([3000, 2400])
    for _ in range(quarters):  # rot90 takes (x, y) to (y, width - x)
        boxes = np.stack([boxes[..., 1], size[0] - boxes[..., 0]], 2)
        size = size[::-1]
    hp = replace(TINY, size=960, fit="area", look=True, text_height=24.0)
    hp = replace(hp, unclip_ratio=1e-9, mode="box", min_size=0)
    model = Recorded(Ink(1, 1))
    (page,) = evaluate.picture_pages("page.png")
    stream = predict.predict(Network(model, hp), [page], CPU, lambda _, found: found)
    ((_, (polygons, _)),) = stream

    assert page.look.sideways == (quarters % 2 == 1)
    _, read = model.shapes
    assert {side % 64 for side in read} == {0}
    assert read[1] < read[0]  # the five lines are a block that is higher than wide
    found = sorted((polygon.mean(0).tolist() for polygon in polygons), key=sum)
    centres = sorted(boxes.mean(1).tolist(), key=sum)
    np.testing.assert_allclose(found, centres, atol=4)


def test_a_page_without_text_is_read_as_it_would_be_without_a_look(work):
    cv2.imwrite("white.png", np.full((300, 200, 3), 255, np.uint8))
    hp = replace(TINY, size=96, look=True)
    (page,) = evaluate.picture_pages("white.png")
    ((_, (polygons, _)),) = predict.predict(
        Network(Ink(1, 1), hp), [page], CPU, lambda _, found: found
    )
    assert polygons == [] and page.look is None
    assert predict.page_factor(page, hp) == pictures.fit_factor((200, 300), hp)


@pytest.mark.usefixtures("whole_words")
@pytest.mark.parametrize("ink, looks", [(255, 1), (137, 1), (136, 2)])
def test_a_look_is_taken_again_where_words_score_low(work, ink, looks):
    """`Ink` gives these words scores of 1, .62 and .56."""
    small_print("page.png", left=300, top=100, height=60, ink=ink)
    hp = replace(TINY, size=960, fit="area", look=True, text_height=24.0)
    model = Recorded(Ink(1, 1))
    (page,) = predict.take_looks(Network(model, hp), evaluate.picture_pages("page.png"), CPU)
    assert len(model.shapes) == looks and page.look


def test_a_look_does_not_depend_on_thresholds(work):
    """--tune tries thresholds on the maps of one look, and keeps these maps for later tunings."""
    small_print("page.png", left=300, top=100, height=60)
    hp = replace(TINY, size=960, fit="area", look=True, text_height=24.0)
    others = {"thresh": 0.9, "box_thresh": 1.0, "unclip_ratio": 3.0, "mode": "box"}
    looks = []
    for values in ({}, others | {"min_size": 900.0, "max_candidates": 1}):
        network = Network(Ink(1, 1), replace(hp, **values))
        (page,) = predict.take_looks(network, evaluate.picture_pages("page.png"), CPU)
        looks.append(page.look)
    assert looks[0] and looks[0] == looks[1]


def test_what_a_look_reads_is_bounded():
    """The area between 320 and 1,600 px squared, and no more than two map pixels a page pixel."""
    hp = replace(TINY, look=True, text_height=20.0)
    page = Page("a", None, size=(4000, 4000))
    for line, box, factor in (
        (1.0, (0, 0, 4000, 4000), 1600 / 4000),
        (2000.0, (0, 0, 4000, 4000), 320 / 4000),
        (2.0, (0, 0, 400, 400), 2),
        (40.0, (0, 0, 4000, 1000), 0.5),
    ):
        page.look = predict.Look(box, line, 1.0, False)
        assert predict.page_factor(page, hp) == factor


def test_size_auto_is_a_flag_and_a_value_of_a_detector(run):
    """The command and the Detector find the same, and a size of its own ends a look."""
    small_print("far.png")
    checkpoint("a.pt", text_height=20.0)
    flags = ["--images", "far.png", "--size", "auto", "--out", "p.json"]
    assert "size auto" in run("a.pt", *flags).out
    polygons, _ = evaluate.Detector("a.pt", device="cpu", size="auto")("far.png")
    (written,) = read_predictions("p.json").values()
    assert len(written[0]) == len(polygons)
    assert evaluate.choose_look({"size": 640}) == {"size": 640, "look": False}
    assert evaluate.choose_look({"fit": "longer"}) == {"fit": "longer", "look": False}
    assert evaluate.choose_look({"size": "auto"}) == {"look": True}

    # an exported network is read as its checkpoint is
    run("a.pt", "--size", "auto", "--export", "m.onnx")
    assert "size auto" in run("m.onnx", *flags[:2], "--out", "m.json").out
    assert len(read_predictions("m.json")["far.png"][0]) == len(polygons)

    # an older checkpoint, which does not say how high its text was
    checkpoint("old.pt")
    run("old.pt", "--size", "auto", "--export", "new.pt", code=2)
    assert "does not record how high text was" in run("old.pt", *flags, code=2).err
    Path("height.json").write_text('{"text_height": 20, "look": true}')
    assert "size auto" in run("old.pt", *flags, "--hparams", "height.json").out

    # a size on the command line replaces the look of a file
    Path("tuned.json").write_text('{"text_height": 20, "look": true, "size": 96}')
    tuned = "a.pt", *flags[:2], "--out", "t.json", "--hparams", "tuned.json"
    for size in ((), ("--size", "auto")):
        assert "size auto (text " in run(*tuned, *size).out
    assert "size 64, " in run(*tuned, "--size", 64).out


# ---------------------------------------------------------------- stress


def test_stress_scores_each_kind_and_level(run):
    """A page as it is has its plain score, no kind or level is left out, and a curve is drawn of
    each kind."""
    checkpoint("a.pt")
    plain = scored(run, "a.pt")
    results = scored(run, "a.pt", "--stress", "--html", "s.html", "--compare", "a.pt")
    assert len(results) == sum(map(len, augment.STRESS.values()))
    for result in results:
        assert result["difference"]["difference"] == 0
        if (result["kind"], result["level"]) in (("darkened", 1), ("blurred", 0), ("jpeg", 100)):
            assert result["scores"][0]["hmean"] == pytest.approx(plain["hmean"], abs=1e-9)
    assert Path("s.html").read_text().count("<svg") == len(augment.STRESS)


def test_labels_of_an_enlarged_page_end_at_the_edge_of_its_picture(work):
    """Who finds all that can be seen has the full score; nothing can be found beyond the edge."""
    write_picture(work, "a.png", (200, 400))
    words = [
        np.array([(x, y), (x + w, y), (x + w, y + 8), (x, y + 8)], float)
        for x, y, w in ((20, 60, 340), (110, 80, 30), (240, 100, 90), (5, 120, 20))
    ]
    page = Page("a.png", Path("images/a.png"), words, [False] * 4)
    changed = stress.stressed_page(page, "scaled", 2)
    assert changed.ignore == [False, False, False, True]
    seen = [np.clip(2 * word - (200, 100), 0, (400, 200)) for word in words]
    for polygon, expected in zip(changed.polygons[:3], seen):
        assert np.allclose(polygon, expected)  # from the upper left, clockwise
    assert cleval.page_row("page", changed, seen[:3])[2] == 1
    same = stress.stressed_page(page, "scaled", 1)
    assert all(map(np.allclose, same.polygons, words))


def test_stress_marks_pages_that_a_network_was_trained_on(run, monkeypatch):
    """On each line, in --json and in --html, as for a score of unchanged pages."""
    monkeypatch.setattr(stress, "STRESS", {"darkened": (1, 0.5)})
    checkpoint("a.pt")
    checkpoint("b.pt", chosen=True)
    flags = "--data", "s", "--stress", "--compare", "b.pt"
    trained = "in sample: trained on 6 of them"
    said = run("a.pt", *flags, "--split", "train")
    lines = [line for line in said.out.splitlines() if line.startswith("darkened")]
    assert [line.count(trained) for line in lines] == [2, 2]  # the score and the difference
    assert said.err.count("trained on 6 of these 6 pages") == 2
    results = json.loads(run("a.pt", *flags, "--json", "--html", "s.html").out)
    for result in results:  # only the second network has seen some of the val pages
        own, other = (score["over"] for score in result["scores"])
        assert "in sample" not in own and "in sample: epoch chosen on 2 of them" in other
        assert "in sample: epoch chosen on 2 of them" in result["difference"]["over"]
    assert "b.pt, over 2 pages, too narrow, in sample: epoch chosen" in Path("s.html").read_text()


def test_stress_leaves_out_pages_whose_labels_are_out_of_view(run, monkeypatch):
    """They have nothing to be found, and would score 0 whatever the network does."""
    monkeypatch.setattr(stress, "STRESS", {"scaled": (1, 2)})
    checkpoint("a.pt")
    shutil.copytree("s", "t")
    sheet = json.loads(Path("t/val.json").read_text())
    first, _ = sheet["images"].values()
    corner = {"points": [[0, 0], [9, 0], [9, 5], [0, 5]]}
    first["words"] = {"0001": corner}
    Path("t/val.json").write_text(json.dumps(sheet))
    checkpoint("b.pt", chosen=True)  # of the pages that count, how many has it seen?
    flags = "--data", "t", "--stress", "--json"
    results = json.loads(run("a.pt", *flags, "--compare", "b.pt").out)
    for n, entry in zip((2, 1), results):
        own, other = (score["over"] for score in entry["scores"])
        assert own == f"{n} pages, too narrow"
        assert other == entry["difference"]["over"]
        assert other == f"{own}, in sample: epoch chosen on {n} of them"
    for entry in sheet["images"].values():
        entry["words"] = {"0001": corner}
    Path("t/val.json").write_text(json.dumps(sheet))
    said = run("a.pt", "--data", "t", "--stress", "--html", "s.html")
    assert said.out.count("scaled") == 1 and "scaled 2: no label is left in view" in said.err


@pytest.mark.parametrize("flags", ["--out=p.json", "--tune", "--export=x.pt", "--pictures=p"])
def test_stress_refuses_flags_without_effect(run, flags):
    checkpoint("a.pt")
    error_line(run("a.pt", "--data", "s", "--stress", flags, code=2).err, "--")
