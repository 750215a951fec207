"""evaluate.py as a user types it: scores of prediction files, comparisons, pictures, refusals."""

import html
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import conftest
import cv2
import numpy as np
import pytest
import shapely
import torch

import cleval
import data
import evaluate
import labels
from db_postprocess import polygons_from_map
from dbnet import DBNet, save_checkpoint
from hparams import Hparams


def predictions(work, change=lambda i, points: points, name="p.json", keep=lambda i: True):
    """A predictions file made from the val labels of `s`."""
    images = {}
    for page in labels.load_labels("s", "val"):
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
    return conftest.error_line(capsys.readouterr().err)


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
    for text in ("competition's", "official", "IoU 0.5", "2 pages, 0 without", "[1.0000, 1.0000]"):
        assert text in out


def test_compare_is_paired(work, capsys):
    full, part = predictions(work), predictions(work, keep=lambda i: i % 3, name="q.json")
    same = scored(capsys, full, "--compare", full)["compare"]["page"]
    assert same == {"difference": 0, "interval": [0, 0], "verdict": "cannot tell"}
    a, b = scored(capsys, full)["hmean"], scored(capsys, part)["hmean"]
    gain = scored(capsys, full, "--compare", part)["compare"]["page"]
    assert gain["difference"] == pytest.approx(a - b) and gain["interval"][0] > 0
    assert evaluate.main([part, "--data", "s", "--compare", full]) == 0
    assert "cannot tell, vs p.json" in capsys.readouterr().out  # of two pages


def test_other_pages_are_refused(work, capsys):
    full = json.loads((work / predictions(work)).read_text())
    del full["images"][min(full["images"])]
    (work / "less.json").write_text(json.dumps(full))
    line = error_line(capsys, "p.json", "--data", "s", "--compare", "less.json", code=1)
    assert "less.json: 1 of 2 pages are not in it" in line
    assert "which labels?; add --data" in error_line(capsys, "p.json")
    for flag, value in (("--thresh", "0.5"), ("--box-thresh", "0"), ("--tile", "64")):
        assert "a predictions file is decoded" in error_line(
            capsys, "p.json", "--data", "s", flag, value
        )


TINY = Hparams(data="s", backbone="mobilenetv3_small_050", pretrained="none", neck=16, size=96)


@pytest.fixture
def checkpoint(work):
    def make(name, chosen=(), **values):
        torch.manual_seed(0)
        hp = replace(TINY, **values)
        state = {"model": DBNet(hp.backbone, hp.neck).state_dict(), "hparams": asdict(hp)}
        digests = [
            [data.picture_digest(page.path) for page in labels.load_labels("s", split)]
            for split in ("train", "val")
        ]
        state["origin"] = {
            "trained": digests[0],
            "chosen": digests[1] * bool(chosen),
            "unknown": [],
        }
        state |= {"epoch": 1, "scores": {}}
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
    network = evaluate.Network(*evaluate.load_network(work / checkpoint("a.pt"))[:2])
    pages, device = labels.load_labels("s", "train"), torch.device("cpu")
    together = dict(evaluate.predict_maps([network], pages, device))
    for i, page in enumerate(pages):
        ((_, (alone,)),) = evaluate.predict_maps([network], [page], device)
        assert (alone == together[i][0]).all() and max(alone.shape) == 96
        assert page.size == data.read_image(page.path).shape[1::-1]


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
        ("a.pt", b"junk", "a.pt: damaged, or not a checkpoint"),
        ("a.json", b"{oops", "a.json: not a JSON file"),
        ("a.json", b"[]", 'a.json: no "images" object'),
        ("a.json", b'{"images": {"x": {"words": {"7": {"points": [[1, 2]]}}}}}', "image x: word 7"),
    ],
)
def test_bad_files_are_one_line(work, capsys, name, content, words):
    (work / name).write_bytes(content)
    assert words in error_line(capsys, name, "--data", "s", code=1)


def test_missing_files_and_devices(work, capsys):
    assert "none.pt: cannot be read" in error_line(capsys, "none.pt", "--data", "s", code=1)
    path = predictions(work)
    assert "nowhere: no such file" in error_line(capsys, path, "--data", "nowhere")
    assert "not a device" in error_line(capsys, "p.json", "--data", "s", "--device", "abacus")


def test_few_pages_can_say_nothing(work, capsys):
    """Two pages on which one is better: no 95 % interval leaves out 0, whatever its ends."""
    full, part = predictions(work), predictions(work, keep=lambda i: i % 3, name="q.json")
    gain = scored(capsys, full, "--compare", part)["compare"]["page"]
    assert gain["interval"][0] > 0 and gain["verdict"] == "cannot tell"
    rows = np.array([(0.8, 0.8, h, 1.0) for h in np.linspace(0.5, 0.9, 6)])
    for pages, verdict in ((5, "cannot tell"), (6, "better")):
        a, groups = rows[:pages], range(pages)
        result = cleval.paired_difference(a + (0, 0, 0.01, 0), a, cleval.mean_scores, groups)
        assert result["verdict"] == verdict and result["difference"] == pytest.approx(0.01)
    grouped = cleval.paired_difference(rows + 0.01, rows, cleval.mean_scores, [1, 2, 3] * 2)
    assert grouped["verdict"] == "cannot tell"


def test_scores_in_sample_say_so(checkpoint, capsys):
    assert evaluate.main([checkpoint("a.pt")]) == 0 and capsys.readouterr().err == ""
    assert evaluate.main(["a.pt", "--data", "s", "--split", "train"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: a.pt: trained on 6 of these 6 pages")
    assert evaluate.main([checkpoint("best.pt", chosen=True)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: best.pt: its epoch was chosen on these pages")


def test_pages_with_nothing_but_dont_care_count_as_without_labels(work, capsys):
    labels = json.loads((work / "s" / "val.json").read_text())
    for word in next(iter(labels["images"].values()))["words"].values():
        word["ignore"] = True
    (work / "v.json").write_text(json.dumps(labels))
    flags = [predictions(work), "--data", "v.json", "--image-dir", "s/images", "--json"]
    capsys.readouterr()
    assert evaluate.main(flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pages_without_labels"] == 1 and result["hmean"] == 0.5


def test_a_full_disk_and_an_output_in_the_wrong_place_name_the_file(work, capsys, monkeypatch):
    path = predictions(work)
    line = error_line(capsys, path, "--data", "s", "--out", "p.json/out.json", code=1)
    assert line == "error: p.json: File exists; what was written before is whole"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    line = error_line(capsys, path, "--data", "s", "--out", "new/out.json", code=1)
    assert line.startswith("error: new/out.json: No space left on device; ")
    assert not list((work / "new").iterdir())


def test_flags_that_do_not_go_with_tuning_are_refused(checkpoint, capsys):
    path = checkpoint("a.pt")
    for flag, value in (("--tile", 96), ("--out", "p.json"), ("--images", "s"), ("--html", "r")):
        assert f"{flag}: not with --tune" in error_line(capsys, path, "--tune", flag, value)


def test_memory_and_devices_that_are_not_there_are_one_line(checkpoint, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    path = checkpoint("a.pt")
    assert "--device cuda:64: not here" in error_line(capsys, path, "--device", "cuda:64")
    monkeypatch.setattr(evaluate, "launch", full)
    assert "out of memory; lower --size" in error_line(capsys, path, code=3)


# ---------------------------------------------------------------- pictures without labels


def test_any_folder_is_predicted_and_a_broken_file_does_not_stop_it(checkpoint, work, capsys):
    path, folder = checkpoint("a.pt", thresh=0.1, box_thresh=0.0), work / "mine"
    (folder / "sub").mkdir(parents=True)
    for i, (name, shape) in enumerate({"a.png": (40, 300), "sub/b.jpg": (500, 90)}.items()):
        cv2.imwrite(
            str(folder / name), np.random.default_rng(i).integers(0, 255, (*shape, 3), np.uint8)
        )
    (folder / "c.jpg").write_bytes(b"no picture")
    flags = ("--images", "mine", "--out", "p.json", "--pictures", "pics")
    assert evaluate.main([path, *flags]) == 1
    out, err = capsys.readouterr()
    assert "2 pages" in out and "images/s" in out
    assert err.count("\n") == 1 and "mine/c.jpg: not a picture" in err
    images = json.loads((work / "p.json").read_text())["images"]
    assert list(images) == ["a.png", "sub/b.jpg"] and images["a.png"]["img_w"] == 300
    assert {p.name for p in (work / "pics").rglob("*.jpg")} == {"a.png.jpg", "b.jpg"}
    assert evaluate.main([path, "--images", "mine/a.png", "--out", "q.json"]) == 0
    alone = json.loads((work / "q.json").read_text())["images"]
    assert alone == {"a.png": images["a.png"]}
    (work / "empty").mkdir()
    line = error_line(capsys, path, "--images", "empty", "--tile", "64", code=1)
    assert "no picture in it" in line
    assert "no such file" in error_line(capsys, path, "--images", "gone")
    assert "leave out" in error_line(capsys, path, "--images", "mine", "--data", "s")


def test_drawn_pictures_neither_replace_each_other_nor_the_pages(checkpoint, work, capsys):
    path, folder = checkpoint("a.pt"), work / "mine"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "b.JPG"):
        cv2.imwrite(str(folder / name), np.full((60, 40, 3), 200, np.uint8))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert evaluate.main([path, "--images", "mine", "--pictures", "pics"]) == 0
    assert {p.name for p in (work / "pics").iterdir()} == {"a.jpg", "a.png.jpg", "b.JPG"}
    line = error_line(capsys, path, "--images", "mine", "--pictures", "mine")
    assert "mine/a.jpg is a page; give a new folder" in line
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_strange_names_do_not_stop_a_folder(checkpoint, work, capsys):
    path, folder = checkpoint("a.pt"), work / "mine"
    (folder / "folder.png").mkdir(parents=True)
    names = ["한글 영수증.png", "émile\u0301.png", "a b'\"&<.png", "bad-\udcff.png"]
    blank = cv2.imencode(".png", np.full((60, 40, 3), 200, np.uint8))[1].tobytes()
    for name in names:
        (folder / name).write_bytes(blank)
    assert evaluate.main([path, "--images", "mine", "--out", "p.json", "--pictures", "pics"]) == 0
    images = json.loads((work / "p.json").read_text())["images"]
    assert set(images) == {*names[:3], "bad-\ufffd.png"}
    assert {p.name for p in (work / "pics").iterdir()} == {f"{name}.jpg" for name in images}
    assert len(labels.read_competition("p.json", need_pictures=False)) == 4


class Ink(torch.nn.Module):
    """Finds dark places and what is near, so that pipelines can be tested without training."""

    def __init__(self, *reach):
        super().__init__()
        self.near = torch.nn.MaxPool2d(reach, 1, [n // 2 for n in reach])

    def forward(self, pages):  # uint8 or float [B, H, W, 3] -> logits [B, 1, H, W]
        return self.near(120 - pages.float().mean(3)[:, None]) / 4


def ink_map(size, tile):
    """The map of big.png by Ink, float64, and the page's size."""
    network = evaluate.Network(Ink(1, 1), replace(TINY, size=size, amp="off"))
    pages = evaluate.picture_pages("big.png")
    ((_, (found,)),) = evaluate.predict_maps([network], pages, torch.device("cpu"), tile)
    assert pages[0].size == (300, 700)
    return found.astype(float)


def test_tiles_merge_into_the_map_of_the_whole_page(work):
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (700, 300, 3), np.uint8), (0, 0), 4)
    cv2.imwrite("big.png", (128 + 8 * (image.astype(float) - 128)).clip(0, 255).astype(np.uint8))
    whole, tiled = ink_map(700, 0), ink_map(96, 96)
    assert whole.shape == tiled.shape == (700, 300) and (whole == tiled).all()
    assert 50 < whole.mean() < 200
    assert ink_map(96, 192).shape == (350, 150) and ink_map(96, 700).shape == (96, 41)


def test_tiles_that_would_enlarge_a_page_beyond_memory_are_refused(checkpoint, work, capsys):
    path = checkpoint("a.pt")
    cv2.imwrite("wide.png", np.zeros((900, 4000, 3), np.uint8))
    flags = ("--images", "wide.png", "--size", "960", "--tile", "32")
    assert "wide.png: tiles of 32 px at size 960" in error_line(capsys, path, *flags, code=1)


def test_predictions_are_in_the_order_of_pages_and_whole_or_absent(work):
    pages, network = evaluate.picture_pages("s/images"), evaluate.Network(Ink(1, 1), TINY)
    stream = evaluate.predict_each([network], pages, torch.device("cpu"), lambda page, maps: page)
    assert [(i, page.name) for i, page in stream] == [*enumerate(p.name for p in pages)]
    assert len(pages) == 8
    with pytest.raises(ZeroDivisionError), evaluate.predictions_file("p.json") as write:
        write(pages[0], ([], []))
        raise ZeroDivisionError
    assert not list(work.glob("*p.json*"))
    evaluate.write_predictions("p.json", pages[:0], [])
    assert json.loads((work / "p.json").read_text()) == {"images": {}}


# ---------------------------------------------------------------- export


@pytest.fixture
def exported(checkpoint, work, monkeypatch, capsys):
    """export(name, model): an ONNX file of a stub network, its session and metadata."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")

    def make(name, model=None):
        path = checkpoint("a.pt")
        if model is not None:
            state = {"epoch": 1, "scores": {}}
            monkeypatch.setattr(evaluate, "load_network", lambda *_: (model, Hparams(), state))
        assert evaluate.main([path, "--export", name, "--thresh", "0.25"]) == 0
        assert "differ by" in capsys.readouterr().out
        return onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])

    return make


def test_an_exported_network_gives_pytorchs_maps_at_any_size(exported, work):
    session = exported("m.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert about["thresh"] == "0.25" and about["size"] == "96" and about["mode"] == "polygon"
    model = evaluate.load_network("a.pt")[0]
    for height, width in ((96, 64), (64, 160)):
        page = torch.rand(2, height, width, 3).mul(255).round()
        found = session.run(None, {"pages": page.permute(0, 3, 1, 2).numpy() / 255})[0]
        with torch.no_grad():
            assert np.abs(model(page).sigmoid().numpy() - found).max() < 1e-4


def test_rapidocr_reads_a_receipt_with_the_exported_detector(exported, work):
    rapidocr = pytest.importorskip("rapidocr_onnxruntime")
    exported("ink.onnx", Ink(9, 25))
    image = np.full((320, 640, 3), 255, np.uint8)
    words = ("TOTAL", "12.50", "CASH", "20.00", "CHANGE", "7.50")
    for i, word in enumerate(words):
        at = 30 + 300 * (i % 2), 70 + 90 * (i // 2)
        cv2.putText(image, word, at, cv2.FONT_HERSHEY_SIMPLEX, 1.5, (0, 0, 0), 4, cv2.LINE_AA)
    reader = rapidocr.RapidOCR(
        det_model_path="ink.onnx",
        det_mean=[0, 0, 0],
        det_std=[1, 1, 1],
        det_limit_type="min",
        det_limit_side_len=32,
        det_score_mode="slow",
        det_unclip_ratio=0.2,
    )
    boxes, _ = reader(image, use_cls=False, use_rec=False)
    hp = {"thresh": 0.3, "box_thresh": 0.5, "unclip_ratio": 0.2}
    hp |= {"max_candidates": 100, "min_size": 3}
    (found,) = Ink(9, 25)(torch.from_numpy(image)[None]).sigmoid()[:, 0].numpy()
    ours, _ = polygons_from_map(found, **hp, mode="box")
    assert len(boxes) == len(ours) == len(words)
    a, b = (shapely.polygons(np.array(p)) for p in (ours, boxes))
    shared = shapely.area(shapely.intersection(a[:, None], b))
    assert (shared / (shapely.area(a)[:, None] + shapely.area(b) - shared)).max(1).min() > 0.8
    read, _ = reader(image)
    assert {"TOTAL", "CASH", "CHANGE"} <= {text.strip() for _, text, _ in read}


# ---------------------------------------------------------------- report


def report_numbers(page):
    """Numbers of a report: {metric: [precision, recall, hmean, low, high]}, {box_thresh: [...]}."""
    cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in page.split("<tr>")]
    rows = {
        html.unescape(row[0]): " ".join(row[1:]).replace(" to ", " ").split()
        for row in cells
        if row
    }
    numbers = {name: [float(v) for v in row] for name, row in rows.items() if row[0][0] in "01"}
    metrics = {m: numbers[name] for m, (name, _) in cleval.METRICS.items()}
    return metrics, {float(k): v for k, v in numbers.items() if re.fullmatch(r"0\.\d\d", k)}


def check_report(page, result, names):
    metrics, levels = report_numbers(page)
    for metric, row in metrics.items():
        r = result if metric == "page" else result[metric]
        expected = [r["precision"], r["recall"], r["hmean"], *r["interval"]]
        assert row == pytest.approx(expected, abs=6e-5)
    assert len(levels) == 19 and levels[0.5] == pytest.approx(metrics["page"][:3])
    assert levels[0.55] == levels[0.95] == [0, 0, 0]  # all confidences are 0.5
    bars = re.findall(r'<text class="value".*?>(.*?)</text>', page)
    assert sum(int(bar) for bar in bars if bar.isdigit()) == result["pages"]
    assert all(name in page for name in names) and page.count("data:image/jpeg;base64,") == 2


def test_a_report_shows_the_numbers_of_the_scores(work, capsys):
    path = predictions(work, lambda i, p: p + (0 if i % 3 else 40), keep=lambda i: i % 4)
    result = scored(capsys, path, "--html", "r.html")
    names = json.loads((work / path).read_text())["images"]
    page = (work / "r.html").read_text()
    check_report(page, result, names)
    parser = HTMLParser()
    parser.feed(page)
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    check_report(conftest.browse(work / "r.html"), result, names)


def test_a_page_of_any_shape_is_in_the_report(work):
    cv2.imwrite("long.png", np.full((9000, 30, 3), 200, np.uint8))
    page = labels.Page("long.png", work / "long.png")
    assert len(evaluate.thumbnail(page, [np.array([(1, 1), (20, 1), (20, 9)])])) > 1000


def test_the_levels_of_a_report_are_those_of_the_metric(checkpoint, work, capsys):
    """A checkpoint is decoded below its box_thresh for the report; the scores stay as they are."""
    path = checkpoint("a.pt", thresh=0.1, box_thresh=0.12)
    result = scored(capsys, path, "--html", "r.html")
    assert result == scored(capsys, path)
    levels = report_numbers((work / "r.html").read_text())[1]
    for level in (0.05, 0.1, 0.15):
        again = scored(capsys, path, "--box-thresh", str(level))
        assert levels[level][2] == pytest.approx(again["hmean"], abs=6e-5)
