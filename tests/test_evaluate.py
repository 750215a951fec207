"""evaluate.py as a user types it: scores of prediction files, comparisons, pictures, refusals."""

import json

import cv2
import numpy as np
import pytest
import torch

import data
import evaluate
from dbnet import DBNet, save_checkpoint
from train import Hparams


def predictions(work, change=lambda i, points: points, name="p.json", keep=lambda i: True):
    """A predictions file made from the val labels of `s`."""
    images = {}
    for page in data.load_labels("s", "val"):
        words = {
            f"{i:04d}": {"points": np.asarray(change(i, p)).tolist(), "confidence": 0.5}
            for i, p in enumerate(page.polygons)
            if keep(i)
        }
        images[page.name] = {"words": words}
    (work / name).write_text(json.dumps({"images": images}))
    return name


def scored(capsys, *flags):
    capsys.readouterr()
    assert evaluate.main([*flags, "--data", "s", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_line(capsys, *flags, code=2):
    capsys.readouterr()
    assert evaluate.main([str(f) for f in flags]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_labels_as_predictions_are_perfect(work, capsys):
    result = scored(capsys, predictions(work))
    for scores in (result, result["micro"], result["iou50"]):
        assert (scores["precision"], scores["recall"], scores["hmean"]) == (1, 1, 1)
        assert scores["interval"] == [1, 1]
    assert (result["pages"], result["pages_without_labels"]) == (2, 0)


def test_missed_words_cost_recall_and_false_alarms_precision(work, capsys):
    half = scored(capsys, predictions(work, keep=lambda i: i % 2))
    assert half["precision"] == 1 and 0.2 < half["recall"] < 0.8
    moved = scored(capsys, predictions(work, lambda i, p: p + (0 if i % 2 else 500)))
    assert moved["precision"] < 1 and moved["recall"] == half["recall"]
    assert moved["iou50"]["recall"] == half["iou50"]["recall"]


def test_text_output_names_each_metric(work, capsys):
    assert evaluate.main([predictions(work), "--data", "s"]) == 0
    out = capsys.readouterr().out
    for text in (
        "competition's",
        "official",
        "IoU 0.5",
        "2 pages, 0 without labels",
        "[1.0000, 1.0000]",
    ):
        assert text in out


def test_compare_is_paired(work, capsys):
    full, part = predictions(work), predictions(work, keep=lambda i: i % 3, name="q.json")
    same = scored(capsys, full, "--compare", full)["compare"]["page"]
    assert same == {"difference": 0, "interval": [0, 0]}
    a, b = scored(capsys, full)["hmean"], scored(capsys, part)["hmean"]
    gain = scored(capsys, full, "--compare", part)["compare"]["page"]
    assert gain["difference"] == pytest.approx(a - b) and gain["interval"][0] > 0
    assert evaluate.main([part, "--data", "s", "--compare", full]) == 0
    assert "worse, vs p.json" in capsys.readouterr().out


def test_other_pages_are_refused(work, capsys):
    full = json.loads((work / predictions(work)).read_text())
    del full["images"][sorted(full["images"])[0]]
    (work / "less.json").write_text(json.dumps(full))
    line = error_line(capsys, "p.json", "--data", "s", "--compare", "less.json")
    assert "less.json: 1 of 2 pages are not in it" in line
    assert "which labels? add --data" in error_line(capsys, "p.json")
    assert "decoded already" in error_line(capsys, "p.json", "--data", "s", "--thresh", "0.5")


@pytest.fixture
def checkpoint(work):
    def make(name, **values):
        torch.manual_seed(0)
        hp = Hparams(
            data="s",
            backbone="mobilenetv3_small_050",
            pretrained="none",
            neck=16,
            size=96,
            **values,
        )
        state = {
            "model": DBNet(hp.backbone, hp.neck).state_dict(),
            "hparams": hp.__dict__,
            "epoch": 1,
            "scores": {},
        }
        save_checkpoint(work / name, state)
        return name

    return make


def test_checkpoint_flags_override_what_it_carries(checkpoint, capsys):
    path = checkpoint("a.pt", thresh=0.9)
    assert evaluate.main([path]) == 0
    assert "size 96, thresh 0.9" in capsys.readouterr().out
    assert evaluate.main([path, "--thresh", "0.1", "--mode", "box", "--size", "64"]) == 0
    out = capsys.readouterr().out
    assert "size 64, thresh 0.1" in out and "mode box" in out


def test_predictions_file_scores_like_its_checkpoint(checkpoint, work, capsys):
    path = checkpoint("a.pt", thresh=0.1, box_thresh=0.0)
    direct = scored(capsys, path, "--out", "out.json")
    again = scored(capsys, "out.json")
    assert again == direct
    words = json.loads((work / "out.json").read_text())["images"]
    assert all(0 <= w["confidence"] <= 1 for page in words.values() for w in page["words"].values())


def test_comparing_runs_of_other_folds_is_refused(checkpoint, capsys):
    a, b = checkpoint("a.pt", folds=2, fold=1), checkpoint("b.pt", folds=2, fold=2)
    assert "validated on other pages (fold 2, here 1)" in error_line(capsys, a, "--compare", b)


def test_pages_of_one_shape_in_a_batch_get_the_maps_they_get_alone(checkpoint, work):
    model, hp, _ = evaluate.load_network(work / checkpoint("a.pt"))
    pages = data.load_labels("s", "train")
    device = torch.device("cpu")
    together = {i: m for i, m, _ in evaluate.predict_maps(model, pages, 96, "off", device)}
    for i, page in enumerate(pages):
        ((_, alone, scale),) = evaluate.predict_maps(model, [page], 96, "off", device)
        assert (alone == together[i]).all()
        height, width = data.read_image(page.path).shape[:2]
        np.testing.assert_allclose(np.array(alone.shape[::-1]) / scale, (width, height))


def test_pictures_show_labels_hits_misses_and_false_alarms(work):
    path = predictions(work, lambda i, p: p + (0 if i else 40), keep=lambda i: i != 1)
    assert evaluate.main([path, "--data", "s", "--pictures", "pics"]) == 0
    files = sorted((work / "pics").iterdir())
    assert len(files) == 2
    for file in files:
        image = cv2.imread(str(file))[..., ::-1].astype(int)
        assert max(image.shape) >= 1400
        for colour in evaluate.COLOURS.values():
            assert (np.abs(image - colour).max(2) < 60).sum() > 50


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.pt", b"junk", "a.pt: not a checkpoint"),
        ("a.json", b"{oops", "a.json: not a JSON file"),
        ("a.json", b"[]", 'a.json: no "images" object'),
        (
            "a.json",
            b'{"images": {"x": {"words": {"7": {"points": [[1, 2]]}}}}}',
            "image x: word 7 has 1 points",
        ),
    ],
)
def test_bad_files_are_one_line(work, capsys, name, content, words):
    (work / name).write_bytes(content)
    assert words in error_line(capsys, name, "--data", "s")


def test_missing_files_and_devices(work, capsys):
    assert "none.pt: cannot be read" in error_line(capsys, "none.pt", "--data", "s")
    assert "nowhere: no such file" in error_line(capsys, predictions(work), "--data", "nowhere")
    assert "not a device" in error_line(capsys, "p.json", "--data", "s", "--device", "abacus")
