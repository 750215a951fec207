"""Samples: pictures, augmentation, target maps, folds, and the command line."""

import gc
import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import hostile
import numpy as np
import pytest
import shapely
from conftest import run_script
from PIL import Image

import augment
import data
import drawing
import files
import habits
import labels
import pictures
import predict
import synth
import train
from data import make_folds, repair_words
from db_postprocess import rect_corners, shrink_distance
from files import DataError, UsageError
from hparams import Hparams
from labels import load_labels
from pictures import read_image
from targets import make_targets

HP = Hparams(size=256, seed=1)
QUAD = [[10, 10], [60, 10], [60, 30], [10, 30]]
NOISE = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)


def write_page(folder, name="a.png", shape=(120, 200), words=None, noise=None, **entry):
    """Writes a picture; its entry of a label file, with one word unless told."""
    (folder / "images").mkdir(exist_ok=True)
    rng = np.random.default_rng(noise)
    image = NOISE[: shape[0], : shape[1]] if noise is None else rng.integers(0, 255, shape)
    cv2.imwrite(str(folder / "images" / name), image)
    return {name: {"words": {"0001": {"points": QUAD}} if words is None else words, **entry}}


def write_labels(folder, images, split="train"):
    (folder / f"{split}.json").write_text(json.dumps({"images": images}))
    return folder


def exact_targets(polygons, height, width):
    """The per-pixel definition in float64, by shapely: (shrink, threshold 0..1, threshold mask)."""
    y, x = np.mgrid[:height, :width] + 0.5
    points = shapely.points(x, y)
    shrink, thresh = np.zeros((height, width), bool), np.zeros((height, width))
    near = np.zeros((height, width), bool)
    for polygon in map(shapely.Polygon, polygons):
        reach = shrink_distance(polygon.area, polygon.length)
        distance = shapely.distance(points, polygon.exterior)
        inside = shapely.contains(polygon, points)
        shrink |= inside & (distance >= reach)
        near |= inside | (distance < reach)
        thresh = np.maximum(thresh, 1 - distance / reach)
    return shrink, thresh.clip(0), near


def test_targets_equal_the_per_pixel_definition():
    rng = np.random.default_rng(0)
    sizes = rng.uniform((20, 9, -0.7), (90, 30, 0.7), (9, 3))
    places = [(x, y) for x in (30, 110, 190) for y in (30, 90, 150)]
    polygons = list(rect_corners(np.concatenate([places, sizes], 1)))
    concave = [(20, 175), (120, 170), (118, 196), (70, 182), (24, 199)]  # and cut by the page
    polygons.append(np.array(concave))
    maps = make_targets(polygons, [False] * len(polygons), 190, 240)
    shrink, thresh, near = exact_targets(polygons, 190, 240)
    assert maps[0].astype(bool).tolist() == shrink.tolist()
    assert np.abs(maps[1] / 255 - thresh).max() < 0.01
    assert (maps[3].astype(bool) != near).mean() < 1e-4
    assert (maps[2] == 1).all()


def test_targets_do_not_depend_on_order_or_vertices():
    polygon = np.array([(20.0, 20), (90, 25), (88, 50), (18, 44)])
    other, keep = polygon + (10, 20), [False, False]
    a = make_targets([polygon, other], keep, 100, 128)
    b = make_targets([np.roll(other, 1, 0)[::-1], np.roll(polygon, 2, 0)], keep, 100, 128)
    assert (a == b).all() and a[0].any()


def test_ignored_words_are_masked_and_thin_words_keep_a_line():
    maps = make_targets([np.array(QUAD, float)], [True], 40, 80)
    assert not maps[0].any() and not maps[3].any()
    assert not maps[2, 10:30, 10:60].any() and maps[2].sum() == 40 * 80 - 20 * 50
    thin = np.array([(10.0, 10.2), (60, 10.2), (60, 12.1), (10, 12.1)])
    assert make_targets([thin], [False], 40, 80)[0].any()
    for point in (True, False):  # labels exist whose points are all the same
        maps = make_targets([np.full((4, 2), 20.0)], [point], 40, 80)
        assert not maps[[0, 1, 3]].any() and maps[2].all()
    off_the_page = np.array(QUAD, float) - (100, 0)
    assert not make_targets([off_the_page], [False], 32, 32)[[0, 1, 3]].any()


def coloured_page(words=12, size=400):
    """A grey page on which every word is filled with a colour of its own."""
    image, rng = np.full((size, size, 3), 128, np.uint8), np.random.default_rng(2)
    quads, colours = [], []
    for i in range(words):
        centre = 60 + 90 * (i % 4), 60 + 110 * (i // 4)
        quads.append(rect_corners(np.array([[*centre, 70, 26, rng.uniform(-0.3, 0.3)]]))[0])
        colours.append([(37 * i) % 256, (91 * i + 60) % 256, (151 * i + 120) % 256])
        cv2.fillPoly(image, [np.round(quads[-1] * 16 - 8).astype(np.int32)], colours[-1], shift=4)
    return image, quads, colours


@pytest.mark.parametrize("mirror", [0.0, 1.0])
def test_every_word_keeps_its_colour_and_corners(mirror):
    """A swapped corner, a shifted or a lost word would show: each mapped quad holds its own colour
    alone."""
    strong = {"aug_rotate": 20.0, "aug_scale": 0.4, "aug_shift": 0.2, "aug_perspective": 0.3}
    hp = replace(HP, size=384, aug_mirror=mirror, **strong)
    image, quads, colours = coloured_page()
    kept = 0
    for seed in range(30):
        matrix = augment.draw_homography(np.random.default_rng(seed), hp, 400, 400, hp.size / 400)
        warped, mapped, cut = augment.warp_page(image, quads, matrix, (hp.size, hp.size))
        assert len(mapped) == len(quads)
        for quad, colour, gone in zip(mapped, colours, cut):
            visible = shapely.Polygon(quad).intersection(shapely.box(0, 0, 384, 384)).area
            assert gone == (visible < shapely.Polygon(quad).area / 2)
            if gone:
                continue
            kept += 1
            mask = np.zeros((384, 384), np.uint8)
            cv2.fillPoly(mask, [np.round(quad * 16 - 8).astype(np.int32)], 1, shift=4)
            core = cv2.erode(mask, np.ones((9, 9), np.uint8)).astype(bool)
            assert (np.abs(warped[core].astype(int) - colour).max(1) <= 1).mean() > 0.98
            area = (np.abs(warped.astype(int) - colour).max(2) <= 1).sum()
            # nothing of the word lies outside its quad
            assert core.sum() <= area <= mask.sum() * 1.02 + 20
    assert kept > 200


def test_no_augmentation_is_resize_page_which_keeps_aspect():
    hp = replace(HP, aug_strength=0.0)
    image = coloured_page(size=512)[0]
    matrix = augment.draw_homography(np.random.default_rng(0), hp, 512, 512, hp.size / 512)
    np.testing.assert_allclose(matrix, np.diag([0.5, 0.5, 1]), atol=1e-12)
    assert (augment.augment_colours(image, np.random.default_rng(0), hp) == image).all()
    small = data.resize_page(np.zeros((1000, 403, 3), np.uint8), *data.scaled((403, 1000), 0.64))
    assert small.shape == (640, 288, 3) and small[:, 257].max() == 0 < small[:, 258].min()


def test_no_page_becomes_longer_than_three_times_its_size():
    hp = replace(HP, size=640, fit="area")
    assert data.scaled((100, 10_000), data.fit_factor((100, 10_000), hp)) == (19, 1920)
    assert data.scaled((1000, 9000), data.fit_factor((1000, 9000), hp)) == (213, 1920)


@pytest.mark.parametrize("fit, sides", [("longer", (213, 640)), ("area", (370, 1109))])
def test_fit_says_what_becomes_size_wherever_a_page_is_scaled(tmp_path, fit, sides):
    """A page 3:1 and one 1:1, which both fits bring to size: factor, canvas, homography, shrinking;
    and back to page pixels within .01."""
    hp = replace(HP, size=640, fit=fit, aug_strength=0.0, batch=1)
    assert data.fit_factor((900, 900), hp) == data.fit_factor((640, 640), hp) * 640 / 900
    for size, (width, height) in (((1500, 4500), sides), ((900, 900), (640, 640))):
        factor = data.fit_factor(size, hp)
        assert data.scaled(size, factor) == (width, height)
        page = labels.Page("p.png", tmp_path / "p.png", [np.array([[0.0, 0], size, [0, size[1]]])])
        page.size, page.ignore = size, [False]
        page.repaired = repair_words(page)
        ((key,),) = data.epoch_batches([page], hp, 0)
        assert key == (0, 0, -(-height // 32) * 32, -(-width // 32) * 32)
        matrix = augment.draw_homography(
            np.random.default_rng(0), hp, *size, data.fit_factor(size, hp)
        )
        there = cv2.perspectiveTransform(page.polygons[0][None], matrix)[0]
        np.testing.assert_allclose(there, page.polygons[0] * factor, atol=1e-9)
        np.testing.assert_allclose(np.linalg.inv(matrix) @ matrix, np.eye(3), atol=1e-9)
        cv2.imwrite(str(page.path), np.full((*size[::-1], 3), 255, np.uint8))
        (image, _), stored = data.Receipts([page], hp)[key], data.Receipts([page], hp).page(0)
        assert stored.shape[1::-1] == (size if factor > 0.5 else (width, height))
        paper = np.argwhere(image.min(2) > 250)[-1] + 1  # [rows, columns]
        assert np.abs(paper - (height, width)).max() <= 1
        resized = data.resize_page(np.full((*size[::-1], 3), 255, np.uint8), width, height)
        assert resized.shape == image.shape
        assert (np.argwhere(resized.min(2) > 250)[-1] + 1).tolist() == [height, width]


COLOURS = ("brightness", "contrast", "color", "noise", "blur", "sharpen", "shadow", "fog")


@pytest.mark.parametrize("kind", COLOURS)
def test_each_colour_augmentation_works_alone(kind):
    hp = replace(HP, **{f"aug_{k}": 0.5 * (k == kind) for k in COLOURS})
    image = coloured_page()[0]
    out = [augment.augment_colours(image, np.random.default_rng(s), hp) for s in range(12)]
    changed = [bool((o != image).any()) for o in out]
    assert any(changed) and all(o.shape == image.shape and o.dtype == np.uint8 for o in out)
    assert kind == "color" or not all(changed)


def test_an_inspected_page_has_all_that_its_picture_tells(tmp_path, monkeypatch):
    """Of one reading: size, digest, thumbnail and repaired words."""
    write_labels(tmp_path, write_page(tmp_path, img_w=1, img_h=2))
    (page,) = pages = load_labels(tmp_path, "train")
    reads, read_bytes = [], pictures.read_bytes

    def count_reads(path, limit):
        reads.append(path)
        return read_bytes(path, limit)

    monkeypatch.setattr(pictures, "read_bytes", count_reads)
    data.inspect_pages(pages)
    assert reads == [page.path] and page.size == (200, 120)
    assert page.digest == pictures.picture_digest(page.path)
    assert (page.thumbnail == data.thumbnail(read_image(page.path))).all()
    assert page.repaired.polygons[0].tolist() == QUAD and page.repaired.ignore == [False]


def test_samples_depend_on_seed_epoch_and_index_only(tmp_path):
    images = {}
    for i in range(4):
        images |= write_page(tmp_path, f"{i}.png")
    pages = load_labels(write_labels(tmp_path, images), "train")
    data.inspect_pages(pages)
    receipts, again = data.Receipts(pages, HP), data.Receipts(pages, HP)
    a, b = receipts[3, 2, 256, 128], [again[0, 1, 256, 256], again[3, 2, 256, 128]][1]
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert (receipts[4, 2, 256, 128][0] != a[0]).any()
    assert a[0].shape == (256, 128, 3) and a[1].shape == (4, 256, 128)


def test_epochs_visit_every_page_and_fill_the_last_batch():
    hp = replace(HP, batch=4)
    pages = [labels.Page(str(i), None, size=(100, 100)) for i in range(10)]
    batches = data.epoch_batches(pages, hp, epoch=5)
    assert [len(b) for b in batches] == [4, 4, 4]
    assert {key[1] for b in batches for key in b} == set(range(10))
    assert {(e, h, w) for b in batches for e, _, h, w in b} == {(5, hp.size, hp.size)}
    assert batches != data.epoch_batches(pages, hp, epoch=6)
    assert [len(b) for b in data.epoch_batches(pages[:3], hp, 0)] == [4]


def test_the_strength_scales_how_many_canvases_are_those_of_another_ground():
    hp = replace(HP, batch=1, aug_ground=0.5)
    pages = [labels.Page(str(i), None, size=(100, 100)) for i in range(200)]
    for strength, low, high in ((0, 0, 0), (0.2, 5, 40), (1, 60, 130)):
        batches = data.epoch_batches(pages, replace(hp, aug_strength=float(strength)), 0)
        other = [h != w for ((_, _, h, w),) in batches]
        assert low <= sum(other) <= high


def test_a_batch_is_the_smallest_canvas_that_holds_its_pages():
    rng = np.random.default_rng(0)
    hp = replace(HP, batch=4, size=640)
    pages = [labels.Page(str(i), None, size=tuple(rng.integers(200, 2000, 2))) for i in range(128)]
    keys = [b for epoch in range(3) for b in data.epoch_batches(pages, hp, epoch)]
    for batch in keys:
        sizes = [(pages[i].size, data.fit_factor(pages[i].size, hp)) for _, i, _, _ in batch]
        blank = np.zeros((9, 9, 3), np.uint8)
        shapes = [data.resize_page(blank, *data.scaled(*size)).shape for size in sizes]
        assert {key[2:] for key in batch} == {tuple(np.max(shapes, 0)[:2])}
    alone = np.mean([min(p.size) / max(p.size) for p in pages])
    used = np.mean([batch[0][2] * batch[0][3] for batch in keys]) / 640**2
    assert alone < used < 1.2 * alone, (alone, used)


def test_a_coarser_step_leaves_fewer_canvases_for_under_5_percent():
    """The batches are the same; where 64 costs more, 32 stays."""
    rng = np.random.default_rng(0)
    hp = replace(HP, batch=8, size=960, fit="area")
    pages = [labels.Page(str(i), None, size=tuple(rng.integers(500, 2000, 2))) for i in range(400)]
    fine, coarse = data.epoch_batches(pages, hp, 0), data.epoch_batches(pages, hp, 0, step=64)
    assert data.epoch_batches(pages, hp, 0, step=32) == fine
    pairs = [(a[0], b[0]) for a, b in zip(fine, coarse, strict=True)]
    assert all(a[:2] == b[:2] for a, b in pairs)
    for (_, _, h, w), (_, _, high, wide) in pairs:
        up_h, up_w = -(-h // 64) * 64, -(-w // 64) * 64
        cheap = up_h * up_w < 1.05 * h * w
        assert (high, wide) == ((up_h, up_w) if cheap else (h, w))
    assert len({b[2:] for _, b in pairs}) < len({a[2:] for a, _ in pairs})


def test_repair_rule():
    page = labels.Page("p", None, size=(200, 120))
    for outline in (
        QUAD,
        [(10, 10), (60, 30), (60, 10), (10, 30)],  # corners swapped
        [(10, 10), (60, 10), (30, 10)],  # no area
        [(168, 10), (248, 10), (248, 30), (168, 30)],  # six tenths outside
        [(150, 10), (210, 10), (210, 30), (150, 30)],  # a sixth outside
    ):
        page.add(len(page.ids), np.array(outline, float))
    polygons, ignore, counts = repair_words(page)
    assert ignore == [False, False, True, True, False]
    assert counts == {"self-crossing": 1, "zero-area": 1, "outside": 1, "clipped": 1}
    assert shapely.Polygon(polygons[1]).area == 50 * 20
    assert shapely.Polygon(polygons[4]).bounds == (150, 10, 200, 30)
    assert page.polygons[1].tolist() == [[10, 10], [60, 30], [60, 10], [10, 30]]  # as written


def test_competition_json(tmp_path):
    words = {
        "a": {"points": [[1, 2], [30, 2], [30, 9]], "transcription": "hi"},
        "b": {"points": QUAD, "ignore": True},
        "c": {"points": QUAD, "transcription": "###"},
    }
    images = write_page(tmp_path, words=words, group="g") | write_page(tmp_path, "b.png", words={})
    write_labels(tmp_path, images)
    (tmp_path / "meta.json").write_text(json.dumps({"images": {"b.png": {"group": "h"}}}))
    page, empty = load_labels(tmp_path / "train.json")
    assert page.ids == ["a", "b", "c"] and page.ignore == [False, True, True]
    assert page.texts[0] == "hi" and page.group == "g" and empty.group == "h"
    assert page.polygons[0].tolist() == [[1, 2], [30, 2], [30, 9]] and empty.polygons == []


@pytest.mark.parametrize(
    "word, message",
    [
        ({"points": [[1, 2], [3, 4]]}, "2 points; 3 to 500 are needed"),
        ({"points": 7}, "0 points; 3 to 500 are needed"),
        ({"points": [[1, 2], [3, "x"], [4, 5]]}, "its points are not"),
        ({"points": [[1, 2, 3], [3, 4, 5], [4, 5, 6]]}, "its points are not"),
        ({"points": [[1, 2], [3, 1e9], [4, 5]]}, "its points are not"),
        ({"points": [[1, 2], [3, float("nan")], [4, 5]]}, "its points are not"),
        ({"points": QUAD, "ignore": "false"}, "ignore flag 'false' is not true or false"),
        ({"points": QUAD, "ignore": 2}, "ignore flag 2 is not true or false"),
        ({"points": QUAD, "ignore": [0.5]}, r"ignore flag \[0.5\] is not true or false"),
        ({"points": QUAD, "confidence": 1.5}, "confidence 1.5 is not in 0..1"),
        ({"points": QUAD, "transcription": 7}, "transcription is not a text"),
    ],
)
def test_bad_words_are_named_with_file_and_image(tmp_path, word, message):
    write_labels(tmp_path, write_page(tmp_path, words={"0003": word}))
    with pytest.raises(DataError, match=f"train.json: image a.png: word 0003: {message}"):
        load_labels(tmp_path, "train")


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "b/../../a.png", "link.png"])
def test_picture_names_cannot_leave_the_folder_but_images_may_be_a_link(tmp_path, name):
    inner, outer = tmp_path / "in", tmp_path / "out"
    inner.mkdir(), outer.mkdir()
    write_page(outer)
    (outer / "images" / "link.png").symlink_to(write_labels(outer, {}) / "train.json")
    (inner / "images").symlink_to(outer / "images")
    assert load_labels(write_labels(inner, {"a.png": {"words": {}}}), "train")
    with pytest.raises(DataError, match=f"image {name}: leads out of the data folder; copy"):
        load_labels(write_labels(inner, {name: {"words": {}}}), "train")


def write_competition(folder, merged=False, **pages):
    """A competition's folder: jsons/SPLIT.json with more keys than are read, indented, and pictures
    in images/SPLIT/ or images/; pages: how many of each split, those of test without words."""
    (folder / "jsons").mkdir(parents=True)
    word = {"points": QUAD, "orientation": "Horizontal", "language": ["ko"], "illegibility": False}
    word |= {"transcription": None, "word_tags": None, "confidence": None}
    entry = {"paragraphs": {}, "chars": {}, "img_w": 300, "img_h": 200, "relations": {}}
    entry |= {"annotation_log": {"worker": "w"}, "license_tag": {"type": None}, "tags": ["auto"]}
    for split, count in pages.items():
        place = folder / "images" / ("" if merged else split)
        place.mkdir(parents=True, exist_ok=True)
        names = [f"{split}_{i}.jpg" for i in range(count)]
        for seed, name in enumerate(names):
            noise = np.random.default_rng([*map(ord, split), seed]).integers(0, 255, (200, 300, 3))
            cv2.imwrite(str(place / name), noise)
        entry["words"] = {} if split == "test" else {"0001": word, "0002": word}
        images = {name: entry for name in names}
        (folder / "jsons" / f"{split}.json").write_text(json.dumps({"images": images}, indent=4))
    return folder


@pytest.mark.parametrize("given", ["", "jsons"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_competitions_folder(tmp_path, monkeypatch, capsys, given, merged):
    monkeypatch.chdir(tmp_path)
    write_competition(tmp_path / "c", merged, train=3, val=2, test=2)
    folder = str(tmp_path / "c" / given)
    splits = data.load_splits(folder)
    assert {split: len(pages) for split, pages in splits.items()} == {
        "train": 3,
        "val": 2,
        "test": 2,
    }
    for split, pages in splits.items():
        place = tmp_path / "c" / "images" / ("" if merged else split)
        assert {page.path.parent for page in pages} == {place}
    page = splits["val"][0]
    assert page.texts == [None] * 2 and page.ignore == [False] * 2 and page.confidences == [1.0] * 2
    train, val, _, split = data.run_pages(replace(HP, data=folder))
    assert len(train) == 3 and len(val) == 2 and split is None
    data.check(folder, HP)
    said = capsys.readouterr().out
    assert "test  2 pages, 2 without text\ntest  no words: unlabelled, to be predicted" in said
    assert said.count("test ") == 2 and "warning" not in said


def test_image_dir_may_have_a_folder_a_split(tmp_path):
    """For train and val together, and for predictions of pages of any split."""
    write_competition(tmp_path / "c", train=3, val=2, test=2)
    shutil.move(tmp_path / "c" / "images", tmp_path / "pictures")
    with pytest.raises(
        DataError, match=r"image test_1.jpg: no such picture in .*; see --image-dir"
    ) as error:
        data.load_splits(tmp_path / "c")
    assert len(error.value.others) == 3 + 2 + 2 - 1
    hp = replace(HP, data=str(tmp_path / "c"), image_dir=str(tmp_path / "pictures"))
    own, val, _, _ = data.run_pages(hp)
    assert {page.path.parent.name for page in own} == {"train"} and len(val) == 2
    found = {"test_1.jpg": {"words": {"1": {"points": QUAD, "confidence": 0.9}}}}
    (tmp_path / "p.json").write_text(json.dumps({"images": found}))
    (page,) = train.pseudo_pages(replace(hp, pseudo_labels=str(tmp_path / "p.json")), own)
    assert page.path == tmp_path / "pictures" / "test" / "test_1.jpg"
    # a picture of another split is none of this one's
    shutil.move(tmp_path / "pictures" / "train" / "train_1.jpg", tmp_path / "pictures" / "val")
    with pytest.raises(DataError, match="image train_1.jpg: no such picture in .*pictures/train"):
        data.run_pages(hp)


def test_words_without_points_are_none(tmp_path):
    empty = {"a": {"points": []}, "b": {"points": None, "transcription": "x"}, "c": {}}
    images = write_page(tmp_path, words=empty) | write_page(tmp_path, "b.png")
    page, other = load_labels(write_labels(tmp_path, images), "train")
    assert page.polygons == page.ids == [] and len(other.polygons) == 1
    images["a.png"]["words"]["c"] = {"polygon": [[1, 1], [9, 1], [9, 9]]}
    with pytest.raises(DataError, match="image a.png: word c: 0 points"):
        load_labels(write_labels(tmp_path, images), "train")
    del images["a.png"]["words"]
    with pytest.raises(DataError, match='image a.png: no "words" object'):  # b.png has them
        load_labels(write_labels(tmp_path, images), "train")
    (page,) = load_labels(write_labels(tmp_path, {"a.png": {}}), "train")
    assert page.polygons == []


def test_a_file_of_a_gib_is_read_and_a_larger_one_is_not(tmp_path, monkeypatch):
    """Here of a MiB, which takes less time."""
    assert files.MAX_BYTES == 1 << 30
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
    file = write_labels(tmp_path, write_page(tmp_path)) / "train.json"
    file.write_text(file.read_text().ljust(1 << 20))
    assert [page.name for page in load_labels(file)] == ["a.png"]
    file.write_text(file.read_text() + " ")
    with pytest.raises(DataError, match="train.json: larger than 1 MiB; split it"):
        load_labels(file)


def test_what_loader_processes_get_is_small(tmp_path):
    """Per word little more than its four points and its flag."""
    page = labels.Page("a", tmp_path / "a.png", size=(300, 200))
    for i in range(1000):
        page.add(i, np.array(QUAD) + i / 100, f"a text {i}")
    page.repaired = repair_words(page)
    pages = [replace(page) for _ in range(5)]
    assert len(pickle.dumps(data.Receipts(pages, HP))) < 5000 * 80


def test_equal_warnings_are_counted(tmp_path, capsys):
    images = {}
    for i in range(8):
        images |= write_page(tmp_path, f"{i}.png", img_w=1, img_h=2)
    data.check(write_labels(tmp_path, images), HP)
    said = capsys.readouterr().out
    assert said.count("the label file says (1, 2)") == said.count("near-duplicates within") - 1 == 5
    assert "warning: another size: 3 more\n" in said
    assert "near-duplicates within a split: 2 more\n" in said


def test_check_draws_samples_with_their_targets(tmp_path, monkeypatch, capsys):
    """A white page: green where words are learned, blue where they are ignored; padding is not."""
    monkeypatch.chdir(tmp_path)
    words = {"1": {"points": QUAD}, "2": {"points": np.add(QUAD, (0, 60)).tolist(), "ignore": True}}
    white = np.full((128, 128, 3), 255, np.uint8)
    images = write_page(tmp_path, "y.png", words=words)
    cv2.imwrite("images/y.png", white)
    write_labels(tmp_path, images)
    Path("h.json").write_text(json.dumps({"aug_strength": 0, "size": 128, "batch": 1}))
    assert data.main(["check", ".", "--hparams", "h.json", "--pictures", "out"]) == 0
    assert "out: samples as training sees them" in capsys.readouterr().out
    (file,) = Path("out").iterdir()
    assert file.name == "00000-y.jpg"
    drawn = read_image(file).astype(int)
    assert drawn.shape[0] > 128 and drawn.shape[1:] == (128, 3)
    for (x, y), colour in (((35, 20), (127, 254, 127)), ((35, 80), (127, 127, 254))):
        assert np.abs(drawn[y, x] - colour).max() < 30, drawn[y, x]
    assert drawn[10:12, 20:50, 0].mean() > 180  # the threshold map on an outline
    assert np.abs(drawn[120, 100] - 127).max() < 10
    before = file.read_bytes()
    assert data.main(["check", ".", "--pictures", "out"]) == 2
    assert "out: exists; choose another folder" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_drawn_sample_names_its_colours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = write_page(tmp_path, "y.png", words={"1": {"points": QUAD}})
    cv2.imwrite("images/y.png", np.full((960, 960, 3), 255, np.uint8))
    write_labels(tmp_path, images)
    assert data.main(["check", ".", "--size", "960", "--pictures", "out"]) == 0
    (file,) = Path("out").iterdir()
    strip = read_image(file)[960:].astype(int)
    for colour in drawing.SAMPLE_COLOURS.values():
        close = np.abs(strip - colour).max(2) < 90
        assert np.ptp(np.argwhere(close)[:, 0]) >= 8, colour


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    image, exif = np.zeros((40, 80, 3), np.uint8), Image.Exif()
    image[:16, :16], image[:, 48:] = (255, 0, 0), 255
    half = np.rot90(image, 2)
    turned = [image, image[:, ::-1], half, half[:, ::-1], image.swapaxes(0, 1)]
    turned += [np.rot90(image, -1), half.swapaxes(0, 1), np.rot90(image)]
    path, exif[274] = tmp_path / f"turned.{suffix}", orientation
    Image.fromarray(image).save(path, exif=exif, quality=95)
    read, expected = read_image(path).astype(int), turned[orientation - 1]
    assert read.shape == expected.shape and np.abs(read - expected).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_decoded_reduced_and_keeps_its_size(tmp_path, orientation):
    """Odd sides, turned or not; what is needed is the most that a network or a tile asks for."""
    path, exif = tmp_path / "a.jpg", Image.Exif()
    image = cv2.resize(NOISE[:20, :10], (495, 655), interpolation=cv2.INTER_CUBIC)
    exif[274] = orientation
    Image.fromarray(image).save(path, exif=exif, quality=95)
    page, whole = labels.Page("a.jpg", path), read_image(path)
    data.inspect_pages([page])
    assert page.size == whole.shape[1::-1] == ((495, 655) if orientation < 5 else (655, 495))
    for size, tile, step in (320, 0, 1), (160, 0, 4), (100, 0, 4), (64, 0, 8), (64, 300, 4):
        read, true_size = data.read_page(path, [replace(HP, size=s) for s in (64, size)], tile)
        assert true_size == page.size
        assert read.shape[1::-1] == tuple(-(-side // step) for side in true_size)
        small = cv2.resize(whole, read.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(read.astype(int) - small).mean() < 6


def test_what_gains_nothing_is_decoded_whole(tmp_path):
    """Other formats, pages just under twice the size, odd or nearly square ones: bit for bit."""
    for suffix, shape, sides in (
        (".jpg", (514, 300), 2),
        (".jpg", (513, 300), 1),
        (".jpg", (512, 300), 2),
        (".jpg", (511, 300), 1),
        (".jpg", (900, 899), 1),
        (".jpg", (900, 900), 2),
        (".png", (900, 300), 1),
        (".webp", (900, 300), 1),
        (".tif", (900, 300), 1),
    ):
        path = tmp_path / f"a{suffix}"
        cv2.imwrite(str(path), cv2.resize(NOISE, shape[::-1]))
        image, size = data.read_page(path, [HP])
        assert size == shape[::-1] and image.shape[0] == -(-shape[0] // sides)
        assert sides > 1 or (image == read_image(path)).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_sample_of_a_photograph_is_that_of_the_whole_picture(tmp_path, monkeypatch, orientation):
    """Close pixels, the same targets, from the cache too; a half, and a quarter that is shrunk."""
    image, words = synth.synthetic_page(3, size=1024, words=40)
    image = image[:, : image.shape[1] // 4 * 4]
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[274] = orientation
    Image.fromarray(image if orientation == 1 else np.rot90(image)).save(path, exif=exif)
    page = labels.Page(path.name, path)
    for word in words:
        page.add(len(page.ids), word["points"])
    data.inspect_pages([page])
    picture = read_image(path)
    for size in (480, 192):
        hp = replace(HP, size=size, aug_rotate=5.0, aug_scale=0.4, batch=1)
        key = data.epoch_batches([page], hp, 0)[0][0]
        (tmp_path / f"cache{size}").mkdir()
        stored = data.Receipts([page], hp, tmp_path / f"cache{size}")
        reduced, again = stored[key], stored[key]
        with monkeypatch.context() as patch:
            patch.setattr(data, "read_page", lambda *_: (picture, page.size))
            whole = data.Receipts([page], hp)[key]
        assert (reduced[0] != whole[0]).any() and (reduced[1] == whole[1]).all()
        assert np.abs(reduced[0].astype(int) - whole[0]).mean() < 2
        assert all((a == b).all() for a, b in zip(reduced, again, strict=True))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif"])
def test_a_picture_is_judged_by_its_header(tmp_path, suffix, monkeypatch):
    """It is read as it was written; over the limit it is refused before a pixel is decoded."""
    flags = {".webp": [cv2.IMWRITE_WEBP_QUALITY, 101]}.get(suffix, [])
    kinds = [flags, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]] if suffix == ".jpg" else [flags]
    for flags in kinds:
        raw = cv2.imencode(suffix, NOISE, flags)[1].tobytes()
        assert pictures.read_header(raw)[1:3] == (300, 200)
    (tmp_path / "a").write_bytes(raw)
    image = read_image(tmp_path / "a")
    assert image.dtype == np.uint8 and image.shape == NOISE.shape
    assert suffix == ".jpg" or (image == NOISE[..., ::-1]).all()
    assert pictures.picture_digest(tmp_path / "a") == hashlib.sha256(raw).hexdigest()[:16]
    monkeypatch.setattr(pictures, "MAX_PIXELS", 300 * 200 - 1)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="a: 300 x 200 px; up to"):
        read_image(tmp_path / "a")


@pytest.mark.parametrize("kind", ["rgba.png", "palette.png", "grey.png", "rgba.webp"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_transparent_picture_is_laid_on_white(tmp_path, kind, orientation):
    """Black print on a ground whose transparent pixels are black, too; half-seen is half white."""
    alpha, exif = np.zeros((60, 90), np.uint8), Image.Exif()
    alpha[20:40, 30:70], exif[274] = 255, orientation
    path = tmp_path / f"a.{kind[-4:].strip('.')}"
    if kind.startswith("rgba"):
        alpha[:, :10] = 128
        black = np.dstack([np.zeros((60, 90, 3), np.uint8), alpha])
        Image.fromarray(black).save(path, lossless=True, exact=True, exif=exif)
        half = slice(0, 10)
    else:
        flat = Image.fromarray(np.where(alpha, 1, 0).astype(np.uint8), "L")
        if kind == "palette.png":
            flat = flat.convert("P")
            flat.putpalette([0, 0, 0] * 2)
        flat.save(path, transparency=0, exif=exif)
        half = slice(0, 0)
    image = read_image(path)
    if orientation == 6:
        image = np.rot90(image)  # back to how it was stored
    assert image.shape == (60, 90, 3) and image.dtype == np.uint8
    assert image[20:40, 30:70].max() <= 1 and image[:20, 10:].min() == 255
    assert (abs(image[:, half].astype(int) - 127) <= 1).all()


def test_large_pictures_are_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.read_header(hostile.png(12_000, 11_000))[1:3] == (12_000, 11_000)


def test_pictures_are_whole_truncated_or_broken(tmp_path):
    """Phones add a film or a second picture behind a JPEG, screenshot tools something behind a PNG;
    OS/2's bitmaps. The end of a thumbnail is not the picture's."""
    photo, old = Image.fromarray(NOISE), (26, 0, 0, 26, 12, 300, 200, 1, 24)
    photo.save(tmp_path / "two", "MPO", save_all=True, append_images=[photo])
    two = (tmp_path / "two").read_bytes()
    jpg, png = (cv2.imencode(suffix, NOISE)[1].tobytes() for suffix in (".jpg", ".png"))
    whole = {
        "two.jpg": two,
        "film.jpg": jpg + b"..\xff\xd9..\xff\xda..",
        "tail.png": png + b"." * 100,
        "os2.bmp": b"BM" + hostile.struct.pack("<IHHIIHHHH", *old) + NOISE.tobytes(),
    }
    thumbnail = b"\xff\xe1\0\x08\xff\xda\xff\xd9.."
    half, third = jpg[: len(jpg) // 2], two[: len(two) // 3]
    cut = {"a.jpg": half, "b.jpg": half[:2] + thumbnail + half[2:], "c.jpg": third}
    cut["d.png"] = png[: len(png) // 2]
    for name, raw in (whole | cut | {"text.jpg": b"no picture"}).items():
        (tmp_path / name).write_bytes(raw)
    for name in whole:
        assert read_image(tmp_path / name).shape == NOISE.shape
    says = dict.fromkeys(cut, "truncated; fetch it again")
    says |= {"text.jpg": "not a picture", "none.jpg": "cannot be read"}
    for name, what in says.items():
        with pytest.raises(DataError, match=f"{name}: {what}"):
            read_image(tmp_path / name)


def test_a_pipe_in_place_of_a_picture_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png: not a regular file"):
        read_image(tmp_path / "a.png")


def test_near_duplicates_are_all_pairs_above_the_threshold():
    rng = np.random.default_rng(0)
    thumbnails = rng.standard_normal((600, 1024), np.float32)
    copies = rng.permutation(600)[:80].reshape(2, 40)
    noise = 0.1 * rng.standard_normal((40, 1024), np.float32)
    thumbnails[copies[0]] = thumbnails[copies[1]] + noise
    thumbnails[copies[0, :3]] = thumbnails[copies[1, 0]]  # four alike: six pairs
    thumbnails /= np.linalg.norm(thumbnails, axis=1, keepdims=True)
    close = np.triu(thumbnails @ thumbnails.T > data.NEAR_DUPLICATE, 1)
    assert sorted(data.near_duplicates(thumbnails)) == np.argwhere(close).tolist()
    assert close.sum() == 37 + 6


def test_thumbnails_tell_copies_from_other_pages():
    pages = [synth.synthetic_page((1, i), size=480, words=40)[0] for i in range(6)]
    thumbnails = np.array([data.thumbnail(page) for page in pages])
    page = pages[0]
    copies = [
        cv2.imdecode(cv2.imencode(".jpg", page, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1),
        cv2.resize(page, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
        (page * 0.6).astype(np.uint8),
    ]
    assert min(data.thumbnail(copy) @ thumbnails[0] for copy in copies) > data.NEAR_DUPLICATE
    assert not list(data.near_duplicates(thumbnails))
    blank = data.thumbnail(np.full((90, 60, 3), 255, np.uint8))
    assert not list(data.near_duplicates(np.array([blank, blank])))  # they say nothing


def test_transcriptions_tell_two_pictures_of_a_receipt_from_two_receipts():
    """Each as often as it comes: of 40 two may differ; few, or none that are known, say nothing."""
    texts = [f"{n // 2}.90 \udcff" for n in range(40)]
    changed = [texts[:-n] + [f"other {n}"] * n for n in (1, 2)]
    kinds = texts, texts[::-1], *changed, texts[:16], texts[:16], [None, "###"] * 40, ["word"] * 40
    other = [f"{n}.90 \udcff" for n in range(20)] * 3
    pages = [labels.Page(f"{n}.png", None) for n in range(10)]
    for page, words in zip(pages, (*kinds, ["word"] * 40, other), strict=True):
        for n, text in enumerate(words):
            page.add(n, np.array([(0, 0), (9, 0), (9, 9), (0, 9)]), text=text)
    assert sorted(data.same_texts(pages)) == [(0, 1), (0, 2), (1, 2)]
    for page, row in zip(pages, np.eye(10, 1024, dtype=np.float32)):
        page.thumbnail = row
    groups = data.page_groups(pages)
    assert groups.tolist() == [0, 0, 0, *range(3, 10)]


def test_folds_are_grouped_balanced_and_deterministic():
    rng, pages = np.random.default_rng(0), []
    for i in range(60):
        page = labels.Page(f"{i}.png", None, group=f"shop {rng.integers(20)}", size=(500, 1000))
        for k in range(rng.integers(5, 120)):
            page.add(k, np.array([(0, 0), (50, 0), (50, 1), (0, 1)]) * rng.uniform(5, 25))
        pages.append(page)
    thumbnails = np.eye(60, 1024, dtype=np.float32)
    thumbnails[7] = thumbnails[3]  # a near-duplicate in another shop
    for page, row in zip(pages, thumbnails):
        page.thumbnail = row
    groups = data.page_groups(pages)
    folds = make_folds(pages, groups, 5)
    assert set(folds) == {1, 2, 3, 4, 5} and folds[3] == folds[7]
    for shop in {p.group for p in pages}:
        assert len({f for f, p in zip(folds, pages) if p.group == shop}) == 1
    words = np.bincount(folds, [len(p.polygons) for p in pages])[1:]
    assert words.max() / words.min() < 1.25
    assert (folds == make_folds(pages, groups, 5)).all()
    a, b = data.split_json(pages, groups, 5), data.split_json(pages[::-1], groups[::-1], 4)
    assert a["hash"] == data.split_json(pages, groups, 5)["hash"] != b["hash"]
    with pytest.raises(DataError, match="folds: 40 of"):
        make_folds(pages, groups, 40)


def test_check_reports_what_will_go_wrong(tmp_path, script):
    turned = {"1": {"points": [[10, 10], [60, 10], [60, 190], [10, 190]]}}
    stated = write_page(tmp_path, group="g", img_w=1, img_h=2)
    write_labels(tmp_path, write_page(tmp_path, "t.png", words=turned) | stated)
    write_labels(tmp_path, write_page(tmp_path, "e.png", words={}, group="g"), "val")
    result = script("data.py", "check", ".", "--size", "32")
    assert result.returncode == 0, result.stderr
    says = ["train 2 pages, 2 words, 1 words a page (median)", "1 without text"]
    says += ["fit longer: words 5.6 px", "fit area: words 7.2"]
    says += ["on 100% of pages under 10 px (too small to read: use a larger --size)"]
    says += [
        "turned page: train t.png",
        "warning: near-duplicates across splits: train t.png, val e.png",
    ]
    says += [
        "is (200, 120), the label file says (1, 2)",
        "warning: group in more than one split: g",
    ]
    assert [text for text in says if text not in result.stdout] == []
    assert data.NO_GROUPS not in result.stdout
    assert "left out" not in result.stdout
    shutil.copytree(tmp_path / "images", tmp_path / "images/more")  # of no entry's folder
    for name in ("z.JPG", "b.png"):
        write_page(tmp_path, name)
    said = script("data.py", "check", ".").stdout
    line = "left out: 2 pictures without an entry in the labels, the first: images/b.png"
    assert line in said.splitlines()
    assert "left out" not in script("data.py", "check", "train.json").stdout
    write_labels(tmp_path, write_page(tmp_path, words={}), "val")
    write_labels(tmp_path, write_page(tmp_path, "t.png", words={}))
    assert data.NO_GROUPS in script("data.py", "check", ".", "--size", "32").stdout


def test_a_picture_of_another_split_is_not_left_out(tmp_path):
    """The folders of both splits may be links to one."""
    (tmp_path / "pool").mkdir()
    images = write_page(tmp_path / "pool", "a.png") | write_page(tmp_path / "pool", "b.png")
    (tmp_path / "images").mkdir()
    for split, name in (("train", "a.png"), ("val", "b.png")):
        (tmp_path / "images" / split).symlink_to("../pool/images")
        write_labels(tmp_path, {name: images[name]}, split)
    pages = [page for part in data.load_splits(tmp_path).values() for page in part]
    assert len(pages) == 2 and [*data.left_out(pages)] == []
    ((_, text),) = data.left_out(pages[:1])
    assert text.startswith("1 pictures without an entry in the labels, the first: ")


@pytest.mark.parametrize(
    "command, code, message",
    [
        ("check cut", 1, "cut/images/a.bmp: not a picture"),
        ("check oops", 1, "oops/train.json: not a JSON file"),
        ("check gone", 1, "gone/train.json: image a.bmp: no such picture in gone; see --image-dir"),
        ("check images", 1, "images: no labels of split"),
        ("split . --folds 5", 2, "folds: 5 of 1 groups; 2 to that many are possible"),
        ("check nowhere", 2, "nowhere: no such file or folder"),
        ("check cut,gone", 2, "cut,gone: several sets; name one; train.py alone takes more"),
        ("check . --image-dir nowhere", 2, "--image-dir nowhere: no such folder"),
        ("check . --size 100", 2, "size = 100 is not a multiple of 32"),
        ("check . --to json", 2, "error: unrecognized arguments: --to json (see --help)"),
        ("split . --pictures x", 2, "error: unrecognized arguments: --pictures x (see --help)"),
        ("synth s --pages 0", 2, "--pages 0: at least 2 is needed"),
        ("check . --sise 64", 2, "unrecognized arguments: --sise 64; did you mean --size?"),
        ("synth s --pages 1", 2, "--pages 1: at least 2 is needed"),
        ("synth s --unit line --habit competition", 2, "--unit: not with --habit"),
        ("synth s --seed -1", 2, "--seed -1: at least 0 is needed"),
        ("synth .", 2, "exists; choose another folder"),
        ("splt .", 2, "did you mean split?"),
        ("", 2, "the following arguments are required: COMMAND"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, command, code, message):
    """Exit code 1 where the data are wrong, 2 where the command is."""
    monkeypatch.chdir(tmp_path)
    write_labels(tmp_path, write_page(tmp_path))
    for name in ("cut", "oops", "gone"):
        (tmp_path / name).mkdir()
        write_labels(tmp_path / name, {"a.bmp": {"words": {}}})
    write_page(tmp_path / "cut", "a.bmp")
    os.truncate("cut/images/a.bmp", 900)
    (tmp_path / "oops" / "train.json").write_text("{oops")
    try:
        exit_code = data.main(command.split())
    except SystemExit as error:
        exit_code = error.code
    said = capsys.readouterr()
    assert exit_code == code and said.err.count("\n") == 1 and not said.out
    assert said.err.startswith("error: ") and message in said.err


def turned(boxes, degrees, centre=(300, 300)):
    """Corners [N, 4, 2] of boxes (left, top, right, bottom) after a turn about a centre."""
    left, top, right, bottom = np.float64(boxes).T
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], 1).reshape(-1, 4, 2)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return (corners - centre) @ np.array([[cos, sin], [-sin, cos]]) + centre


def page_of(polygons, size=(600, 600)):
    page = labels.Page("a.png", None, size=size)
    for i, polygon in enumerate(polygons):
        page.add(i, polygon)
    return page


LINES = [(60, y, x, y + 20) for y in range(40, 560, 30) for x in (250, 530)]
LINES = [(x - 180, y, x, bottom) for _, y, x, bottom in LINES]


def test_check_measures_tilt_and_names_the_values_to_train_with():
    scans, photographs = "hparams/best.json or hparams/receipts", "hparams/photographs.json"
    for degrees, preset in ((0, scans), (-1.5, scans), (5, photographs), (-30, photographs)):
        page = page_of(turned(LINES, degrees))
        assert habits.page_tilt(page) == pytest.approx(degrees)
        line = habits.describe_tilt([page] * 3)
        assert f"tilt {abs(degrees):.1f} degrees" in line and preset in line, line
    upright = page_of(turned(LINES, 90) * (1, 1))  # lines that run upwards are not tilted
    assert habits.page_tilt(upright) == pytest.approx(0, abs=1e-9)
    small = page_of(turned(LINES, 0) / 4 + 200)
    assert photographs in habits.describe_tilt([small])
    assert "no labels" in habits.describe_tilt([page_of([])])


def test_upright_boxes_on_tilted_lines_overlap():
    quads = turned(LINES, 8)
    boxes = np.stack([quads.min(1), quads.max(1)], 1).reshape(-1, 4)
    page = page_of(turned(boxes, 0))
    assert habits.page_tilt(page) == 0 and habits.overlapping_share(page) > 0.8
    line = habits.describe_tilt([page])
    assert "upright boxes on tilted lines?" in line and "hparams/photographs.json" in line
    # one such page among scans does not make photographs of them
    scans = [page_of(turned(LINES, 0))] * 9
    assert "hparams/best.json" in habits.describe_tilt([page, *scans])
    assert habits.overlapping_share(page_of(quads)) == 0


def test_habits_of_labelling_are_counted_by_shape():
    rules = [(60, 570, 540, 574), (60, 577, 540, 581)]
    colons = [(255, y + 6, 259, y + 18) for y in (40, 70, 100)]
    title = [(60 + 40 * k, 8, 78 + 40 * k, 28) for k in range(5)]
    alone = [(400, 8, 418, 28)]
    plain = turned(LINES, 3)
    every = turned([*LINES, *rules, *colons, *title, *alone], 3)
    contrast = np.full(len(every), 50.0)
    contrast[[3, 7]] = 2
    assert habits.label_habits(plain, np.full(len(plain), 50.0)) == {
        "labels": len(plain),
        "rules": 0,
        "colons or dots": 0,
        "letters of spaced titles": 0,
        "without ink": 0,
    }
    counts = habits.label_habits(every, contrast)
    assert [*counts.values()] == [len(every), 2, 3, 5, 2]
    line = habits.describe_habits([page_of(every), page_of([])], [contrast, np.zeros(0)])
    assert line.startswith("habits: 4.3% rules, 6.4% colons or dots, 10.6% letters of spaced"), line
    assert "Weights that learned other labels miss them" in line
    assert "--habit competition draws such labels" in line
    even = np.full(len(plain), 50.0)
    assert "no labels of rules" in habits.describe_habits([page_of(plain)], [even])


def test_a_box_without_ink_has_little_contrast(tmp_path):
    white = np.full((400, 300, 3), 250, np.uint8)
    cv2.putText(white, "TOTAL 12.00", (20, 100), 0, 1, (0, 0, 0), 2)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), white)
    boxes = [(15, 70, 260, 110), (15, 270, 260, 310), (900, 900, 950, 950)]
    words = {i: {"points": quad.tolist()} for i, quad in enumerate(turned(boxes, 0))}
    pages = load_labels(write_labels(tmp_path, {"a.png": {"words": words}}), "train")
    (contrast,) = data.inspect_pages(pages)
    assert contrast[0] > 50 and contrast[1] == contrast[2] == 0


def test_equal_labels_are_no_change_whatever_their_area_and_order():
    """A label without area overlaps nothing, and of two that overlap either may be met first."""
    flat, quad, near = np.full((3, 2), 5.0), np.float64(QUAD), np.float64(QUAD) + (5, 0)
    assert habits.page_changes([flat, quad, near], [near, quad, flat]) == (0, 0, 0)
    assert habits.page_changes([flat, flat], [flat]) == (0, 1, 0)
    assert habits.page_changes([quad, near], [quad, quad + 3]) == (0, 0, 1)


def test_a_group_is_shown_on_one_line(tmp_path):
    rows = [("train", labels.Page("a", None, group="a\nb")), ("val", labels.Page("b", None))]
    rows[1][1].group = rows[0][1].group
    assert [finding for _, finding in data.shared_groups(rows)] == [r"'a\nb'"]


def test_an_empty_text_names_no_group(tmp_path):
    """As a table leaves it where the shop is not known: such pages are not one shop."""
    images = {}
    for k, group in enumerate(["", "", "", "a", "a"]):
        images |= write_page(tmp_path, f"{k}.png", noise=k, group=group)
    write_labels(tmp_path, images)
    pages = load_labels(tmp_path, "train")
    assert [page.group for page in pages] == [None, None, None, "a", "a"]
    data.inspect_pages(pages)
    assert data.page_groups(pages).tolist() == [0, 1, 2, 3, 3]
    images["0.png"]["group"] = 0  # a number is no text, this one neither
    write_labels(tmp_path, images)
    with pytest.raises(DataError, match="group 0 is not a text"):
        load_labels(tmp_path, "train")


def test_diff_of_two_label_sets(tmp_path, script):
    moved, far = np.add(QUAD, 3).tolist(), np.add(QUAD, 80).tolist()
    old = {"1": {"points": QUAD}, "2": {"points": far}}
    new = {"1": {"points": moved}, "3": {"points": np.add(far, (-60, 0)).tolist()}}
    new["4"] = {"points": np.add(far, (0, -60)).tolist()}
    for folder, words, more in (("old", old, "gone.png"), ("new", new, "come.png")):
        (tmp_path / folder).mkdir()
        images = write_page(tmp_path / folder, words=words)
        images |= write_page(tmp_path / folder, "same.png", words=old)
        images |= write_page(tmp_path / folder, more)
        write_labels(tmp_path / folder, images)
    result = script("data.py", "diff", "old", "new")
    assert result.returncode == 0 and result.stdout.splitlines() == [
        "a.png: 2 added, 1 removed, 1 moved",
        "come.png: only in new",
        "gone.png: only in old",
        "1 of 2 pages differ: 2 labels added, 1 removed, 1 moved",
    ]
    result = script("data.py", "diff", "old", "old")
    assert result.stdout == "0 of 3 pages differ: 0 labels added, 0 removed, 0 moved\n"


def test_diff_of_other_pages_is_an_error(tmp_path, script, one_line):
    """It counted each page as different, with no label added, removed or moved."""
    for folder, name in (("old", "a.png"), ("new", "b.png")):
        (tmp_path / folder).mkdir()
        write_labels(tmp_path / folder, write_page(tmp_path / folder, name))
    said = one_line(script("data.py", "diff", "old", "new"), code=1)
    assert "new: none of its pages has the name of one in old" in said


def test_diff_refuses_names_that_splits_share(tmp_path, script, one_line):
    """One of the two pages would stand for both; split by split they are compared."""
    (tmp_path / "d").mkdir()
    for split, words in (("train", {"1": {"points": QUAD}}), ("val", {})):
        images = write_page(tmp_path / "d", words=words)
        (tmp_path / "d" / f"{split}.json").write_text(json.dumps({"images": images}))
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    (tmp_path / "e" / "train.json").write_bytes((tmp_path / "d" / "val.json").read_bytes())
    said = one_line(script("data.py", "diff", "d", "e"), code=1)
    assert "d: two splits have a picture a.png; name the label file or folder of one split" in said
    result = script("data.py", "diff", "d/train.json", "e/train.json")
    assert "1 of 1 pages differ: 0 labels added, 1 removed" in result.stdout


def error_lines(result, folder):
    """Lines of a command that found faults in labels, without the folder."""
    assert result.returncode == 1 and not result.stdout, result.stdout + result.stderr
    return result.stderr.replace(f"{folder}/", "").splitlines()


def test_all_faults_of_labels_are_named_at_once(tmp_path, script):
    """Of several words of a page, of pages, and of splits."""
    short, odd = {"points": QUAD[:2]}, {"points": QUAD, "ignore": "no"}
    images = write_page(tmp_path, "a.png", words={"1": short, "2": {"points": QUAD}, "3": odd})
    images |= write_page(tmp_path, "b.png") | write_page(tmp_path, "c.png", group=7)
    images |= {"gone.png": {"words": {}}, "d.png": {"words": [1]}}
    write_labels(tmp_path, images)
    write_labels(tmp_path, write_page(tmp_path, "e.png", words={"1": short}), "val")
    lines = error_lines(script("data.py", "check", tmp_path), tmp_path)
    starts = ["a.png: word 1: 2 points; 3 to", "a.png: word 3: ignore flag 'no'", "c.png: group 7"]
    starts += ["gone.png: no such picture", 'd.png: no "words" object']
    starts = [f"error: train.json: image {start}" for start in starts]
    starts.append("error: val.json: image e.png: word 1: 2 points")
    assert all(map(str.startswith, lines, starts)) and len(lines) == len(starts), lines


def test_no_more_than_the_first_faults_are_named(tmp_path, script):
    """A user who has all pictures elsewhere needs no line for each, and no time for each."""
    write_labels(tmp_path, {f"{n}.png": {"words": {}} for n in range(500)})
    lines = error_lines(script("data.py", "check", tmp_path), tmp_path)
    assert len(lines) == labels.MAX_FAULTS and "image 19.png: no such picture" in lines[-1]
    result = script("data.py", "check", tmp_path, "--image-dir", "nowhere")
    assert result.stderr == "error: --image-dir nowhere: no such folder\n"


def faulty_files(folder, name):
    """What a tool might leave behind: faults of every kind that its files can have."""
    two, sheet = QUAD[:2], {"imagePath": "a.png"}
    circle = {"shape_type": "circle", "points": two}
    if name == "coco":
        mask = {"segmentation": {"counts": [1]}, "image_id": 1}
        notes = [mask, {"image_id": 1, "bbox": [1]}, {**mask, "id": 9}]
        whole = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": notes}
        (folder / "train.json").write_text(json.dumps(whole))
    if name == "labelme":
        for stem, shapes in (("a", [circle, {"points": QUAD}, circle]), ("b", [{"points": two}])):
            (folder / f"{stem}.json").write_text(json.dumps({**sheet, "shapes": shapes}))
        (folder / "c.json").write_text('{"shapes": [')
    if name == "icdar":
        line = "1,2,30,2,30,9,1,9,x\n"
        (folder / "gt_a.txt").write_text(f"{3 * line}1,2,30,2,30,9,1,x\n{line}1,2,30,2,30,x\n")
        (folder / "gt_gone.txt").write_text(line)
    if name == "paddle":
        lines = ["a.png\t7", "gone.png\t[]", f'a.png\t[{{"points": {two}}}, 1]', "a.png\t["]
        (folder / "Label.txt").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "coco",
            ["annotation 1: a mask", "annotation 2: bbox: its points", "annotation 3: a mask"],
        ),
        (
            "labelme",
            ["shape 1 is a circle", "shape 3 is a", "word 0001: 2 points", "c.json: not a"],
        ),
        ("icdar", ["a.txt: line 4: 1,2", "a.txt: line 6: 1,2,30,2", "gone.txt: 0 pictures"]),
        (
            "paddle",
            ["line 1: not `", "gone.png: no", "0001: 2 points", "0002: 0 points", "line 4: "],
        ),
    ],
)
def test_all_faults_of_other_formats_are_named_at_once(tmp_path, script, name, says):
    cv2.imwrite(str(tmp_path / "a.png"), NOISE)
    faulty_files(tmp_path, name)
    lines = error_lines(script("data.py", "check", tmp_path), tmp_path)
    assert len(lines) == len(says), lines
    assert [say for say, line in zip(says, lines) if say not in line] == [], lines


def test_all_broken_pictures_are_named_at_once(tmp_path, script):
    images = {}
    for name in ("a.png", "b.png", "c.png", "d.jpg"):
        images |= write_page(tmp_path, name)
        os.truncate(tmp_path / "images" / name, 700)
    write_page(tmp_path, "c.png")
    result = script("data.py", "check", write_labels(tmp_path, images))
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and all(line.startswith("error: ") for line in lines)
    names = [line.split("/images/")[1] for line in lines]
    assert [name.split(":")[0] for name in names] == ["a.png", "b.png", "d.jpg"], lines


def test_broken_pictures_do_not_stay_in_memory(tmp_path):
    """Their errors held the bytes: 3,000 pictures in HEIC that are named .jpg are gigabytes."""
    pages = [labels.Page(name, tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg")]
    for page in pages:
        page.path.write_bytes(bytes(2**22))
    tracemalloc.start()
    with pytest.raises(DataError, match="c.jpg: not a picture") as error:
        data.inspect_pages(pages)
    failed = {}
    network = predict.Network(None, HP)
    for n, page in enumerate(pages):
        assert predict.load_page(n, page, [network], failed) == []
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2**21 and len(error.value.others) == 2 and len(failed) == 3


def damaged_jpegs():
    """{name: bytes} of JPEGs that decode to the end and that libjpeg is not content with."""
    raw, middle = cv2.imencode(".jpg", NOISE)[1].tobytes(), 20_000
    progressive = cv2.imencode(".jpg", NOISE, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    return {
        "zeros.jpg": raw[:middle] + bytes(400) + raw[middle + 400 :],
        "half.jpg": raw[: len(raw) // 2] + b"\xff\xd9",
        "progressive.jpg": progressive[: len(progressive) // 2] + b"\xff\xd9",
    }


def test_a_damaged_jpeg_is_named_and_libjpeg_itself_says_nothing(tmp_path, script):
    images = write_page(tmp_path, "whole.jpg")
    for name, raw in damaged_jpegs().items():
        images |= write_page(tmp_path, name)
        (tmp_path / "images" / name).write_bytes(raw)
    result = script("data.py", "check", write_labels(tmp_path, images))
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = [line for line in result.stdout.splitlines() if "damaged picture" in line]
    for name, line in zip(damaged_jpegs(), lines, strict=True):
        start = f"warning: damaged picture: train {name}: Corrupt JPEG data: "
        assert line.startswith(start) and line.endswith("fetch it again"), line


def test_synth_and_split_commands(tmp_path, script):
    draw = ("data.py", "synth", "s", "--pages", 12, "--size", 160, "--words", 6)
    assert script(*draw).returncode == 0
    assert [len(load_labels(tmp_path / "s", split)) for split in ("train", "val")] == [9, 3]
    drawn = tmp_path / "s" / "train.json"
    before = drawn.read_bytes(), drawn.stat().st_mtime_ns
    assert script(*draw).returncode == 0
    assert (drawn.read_bytes(), drawn.stat().st_mtime_ns) == before
    result = run_script("data.py", "split", "s", "--folds", 3, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    split = json.loads((tmp_path / "runs" / "split-s-3.json").read_text())
    assert split["hash"] in result.stdout
    assert sorted(v["fold"] for v in split["images"].values()) == [1] * 3 + [2] * 3 + [3] * 3


def test_a_set_is_drawn_whole_or_not_at_all(tmp_path, monkeypatch):
    """A crash leaves nothing; of two processes that draw the same set, the second finds it made."""
    kind = {"size": 96, "words": 4}
    data.synth(tmp_path / "other", 2, 0, **kind)
    draw = synth.synthetic_page

    def other_is_first(seed, **kind):
        if not (tmp_path / "s").exists():
            shutil.copytree(tmp_path / "other", tmp_path / "s")
        return draw(seed, **kind)

    monkeypatch.setattr(data, "synthetic_page", lambda seed, **kind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.synth(tmp_path / "s", 2, 0, **kind)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    monkeypatch.setattr(data, "map_threads", lambda draw, pages, desc: [draw(i) for i in pages])
    monkeypatch.setattr(data, "synthetic_page", other_is_first)
    data.synth(tmp_path / "s", 2, 0, **kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "s"]
    with pytest.raises(UsageError, match="s: exists; choose another folder"):
        data.synth(tmp_path / "s", 3, 0, **kind)


def write_set(folder, seed, **splits):
    """A set whose split has that many pages, two of a group, with the names of other sets' pages;
    seed: of its pictures."""
    folder.mkdir(parents=True)
    for split, count in splits.items():
        images, start = {}, 100 * len(split)
        for i in range(start, start + count):
            group, noise = f"{folder.name} {i // 2}", 1000 * seed + i
            images |= write_page(folder, f"{i}.png", (60, 80, 3), group=group, noise=noise)
        write_labels(folder, images, split)
    return images


def paths_of(pages):
    return {str(page.path) for page in pages}


def test_run_pages_holds_out_a_tenth_by_group(tmp_path):
    images = write_set(tmp_path / "s", 0, train=20)
    hp = replace(HP, data=str(tmp_path / "s/train.json"))
    train, val, others, _ = data.run_pages(hp)
    assert len(val) == 2 and len(train) == 18 and not others
    assert not {page.group for page in train} & {page.group for page in val}
    write_labels(tmp_path / "s", {name: images[name] for name in ("500.png", "501.png")})
    with pytest.raises(DataError, match="no val split, and one group of pages"):
        data.run_pages(hp)


@pytest.mark.parametrize(
    ("shops", "held"),
    [([90, *[1] * 10], 10), ([12, *[1] * 8], 2), ([18, 2], 2), ([14, 6], 6), ([2] * 20, 4)]
    + [([1] * count, held) for count, held in ((2, 1), (9, 1), (11, 2), (40, 4))],
)
def test_most_pages_are_not_held_out_where_most_are_of_one_shop(capsys, shops, held):
    """The largest group is in the first fold, and this one was taken: 90 of 100 pages."""
    pages = []
    for shop in np.repeat(np.arange(len(shops)), shops).tolist():
        pages.append(labels.Page(f"{len(pages)}.png", None, group=f"{shop}", size=(200, 120)))
        pages[-1].add(1, np.array(QUAD))
    groups = np.array([int(page.group) for page in pages])
    _, out = data.hold_out(pages, groups, HP)
    assert out.sum() == held and not set(groups[out]) & set(groups[~out])
    said = f"no val split: {held} of {len(pages)} pages held out by group\n"
    assert capsys.readouterr().err == said


def test_of_several_sets_all_train_and_the_first_is_validated(tmp_path, monkeypatch, capsys):
    """Their pages have the same names; a page or a group of one set in another's val is told."""
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "a", 1, val=2, train=4)
    images = write_set(tmp_path / "b", 2, val=3, train=5)
    write_set(tmp_path / "c", 3, train=6)
    monkeypatch.setitem(data.SYNTH_SETS, "synth", {"count": 4, "seed": 0, "size": 96, "words": 4})
    a_train, a_val, b_train, b_val = (
        paths_of(load_labels(name, split)) for name in "ab" for split in ("train", "val")
    )
    train, val, others, split = data.run_pages(replace(HP, data="a,b,c,synth"))
    assert paths_of(val) == a_val and split is None
    assert {name: len(pages) for name, pages in others.items()} == {"b": 3, "synth": 1}
    assert paths_of(others["b"]) == b_val
    assert len(paths_of(train)) == len(train) == 4 + 5 + 6 + 3
    assert a_train | b_train < paths_of(train)
    for fold in (0, 1, 2, 3):  # 0: a tenth is held out
        hp = replace(HP, data="c", folds=fold and 3, fold=fold or 1)
        own, held, _, own_split = data.run_pages(hp)
        train, val, others, split = data.run_pages(replace(hp, data="c,a"))
        assert paths_of(val) == paths_of(held) and split == own_split
        assert paths_of(train) == paths_of(own) | a_train and paths_of(others["a"]) == a_val
    assert "warning" not in capsys.readouterr().err
    shutil.copy("a/images/300.png", "b/images/500.png")
    images["501.png"]["group"] = "a 150"
    write_labels(tmp_path / "b", images)
    data.run_pages(replace(HP, data="a,b"))
    said = capsys.readouterr().err
    assert (
        "warning: a,b: 2 val pages (first: a/images/300.png) share a group with train pages" in said
    )
    (tmp_path / "a,b").symlink_to("c")
    assert len(data.run_pages(replace(HP, data="a,b"))[0]) == 4
    for names, message in (
        ("a,a/", "--data a,a/: a set without a name, or one that comes twice"),
        ("a,", "--data a,: a set without a name"),
        ("a,nowhere", "nowhere: no such file or folder"),
    ):
        with pytest.raises(UsageError, match=message):
            data.run_pages(replace(HP, data=names))


def test_pseudo_pages_keep_their_flags_and_leave_out_what_is_known(tmp_path):
    """DATA may be one label file; a copy of a known page under another name is known."""
    words = {"a": {"points": QUAD, "confidence": 0.9}, "b": {"points": QUAD, "confidence": 0.4}}
    words["c"], images = {"points": QUAD, "ignore": True}, {}
    for i, name in enumerate(("known.png", "copy.png", "new.png")):
        images |= write_page(tmp_path, name, (60, 80, 3), words, noise=i // 2)
    write_labels(tmp_path, {"known.png": images["known.png"]})
    (tmp_path / "p").mkdir()
    pseudo = write_labels(tmp_path / "p", images) / "train.json"
    known = str(tmp_path / "train.json")
    hp = replace(HP, data=known, pseudo_labels=str(pseudo), min_confidence=0.5)
    own = load_labels(tmp_path, "train")
    data.inspect_pages(own)
    (page,) = train.pseudo_pages(hp, own)
    assert page.name == "new.png"
    assert page.ignore == page.repaired.ignore == [False, True, True]
    for name in ("known.png", "copy.png"):
        write_labels(tmp_path / "p", {name: images[name]})
        with pytest.raises(DataError, match="every page of it is labelled in .* already"):
            train.pseudo_pages(hp, own)
    # another picture that has the same name, beside its own label file
    (tmp_path / "q").mkdir()
    write_labels(
        tmp_path / "q", write_page(tmp_path / "q", "known.png", (60, 80, 3), words, noise=9)
    )
    hp = replace(hp, pseudo_labels=str(tmp_path / "q" / "train.json"))
    assert [page.path for page in train.pseudo_pages(hp, own)] == [tmp_path / "q/images/known.png"]


SLOW = ("MB", "GB", "million", "bomb")


@pytest.mark.parametrize("name", [n for n in hostile.CHECK if not any(w in n for w in SLOW)])
def test_hostile_input_is_an_error_of_one_line(tmp_path, monkeypatch, name):
    """The quick ones of tests/by_hand/hostile.py in this process; the script bounds memory too."""
    monkeypatch.chdir(tmp_path)
    hostile.CHECK[name](tmp_path)
    with pytest.raises(DataError) as error:
        data.check(".", HP)
    assert str(error.value).isprintable() and len(str(error.value)) < 500
