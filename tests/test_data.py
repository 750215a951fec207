"""Samples: labels in, checks, folds, augmentation and target maps."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import cv2
import hostile
import numpy as np
import pytest
import shapely

import data
import files
import labels
import synth
from data import make_folds, make_targets, read_image, repair_words
from db_postprocess import rect_corners, shrink_distance
from files import DataError
from hparams import Hparams
from labels import load_labels

HP = Hparams(size=256, seed=1)


def write_page(folder, name="a.png", shape=(120, 200), words=None, **entry):
    (folder / "images").mkdir(exist_ok=True)
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    cv2.imwrite(str(folder / "images" / name), image)
    words = (
        {"0001": {"points": [[10, 10], [60, 10], [60, 30], [10, 30]]}} if words is None else words
    )
    return {name: {"words": words, **entry}}


def write_labels(folder, images, split="train"):
    (folder / f"{split}.json").write_text(json.dumps({"images": images}))
    return folder


# ---------------------------------------------------------------- target maps


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
    polygons = [
        rect_corners(
            np.array([[x, y, rng.uniform(20, 90), rng.uniform(9, 30), rng.uniform(-0.7, 0.7)]])
        )[0]
        for x in (30, 110, 190)
        for y in (30, 90, 150)
    ]
    polygons.append(
        np.array([(20, 175), (120, 170), (118, 196), (70, 182), (24, 199)])
    )  # concave, cut by the page
    maps = make_targets(polygons, [False] * len(polygons), 190, 240)
    shrink, thresh, near = exact_targets(polygons, 190, 240)
    assert maps[0].astype(bool).tolist() == shrink.tolist()
    assert np.abs(maps[1] / 255 - thresh).max() < 0.01
    assert (maps[3].astype(bool) != near).mean() < 1e-4
    assert (maps[2] == 1).all()


def test_targets_do_not_depend_on_order_or_vertices():
    polygon = np.array([(20.0, 20), (90, 25), (88, 50), (18, 44)])
    other = polygon + (10, 20)
    a = make_targets([polygon, other], [False, False], 100, 128)
    b = make_targets([np.roll(other, 1, 0)[::-1], np.roll(polygon, 2, 0)], [False, False], 100, 128)
    assert (a == b).all()


def test_ignored_words_are_masked_and_thin_words_keep_a_line():
    quad = np.array([(10.0, 10), (60, 10), (60, 30), (10, 30)])
    maps = make_targets([quad], [True], 40, 80)
    assert not maps[0].any() and not maps[3].any()
    assert not maps[2, 10:30, 10:60].any() and maps[2].sum() == 40 * 80 - 20 * 50
    thin = np.array([(10.0, 10.2), (60, 10.2), (60, 12.1), (10, 12.1)])
    assert make_targets([thin], [False], 40, 80)[0].any()
    for point in (True, False):  # labels exist whose points are all the same
        maps = make_targets([np.full((4, 2), 20.0)], [point], 40, 80)
        assert not maps[[0, 1, 3]].any() and maps[2].all()


def test_targets_off_the_page_are_empty():
    quad = np.array([(-50.0, -50), (-10, -50), (-10, -30), (-50, -30)])
    assert not make_targets([quad], [False], 32, 32)[[0, 1, 3]].any()


# ---------------------------------------------------------------- augmentation


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
    hp = dataclasses.replace(
        HP,
        size=384,
        aug_rotate=20.0,
        aug_scale=0.4,
        aug_shift=0.2,
        aug_perspective=0.3,
        aug_mirror=mirror,
    )
    image, quads, colours = coloured_page()
    kept = 0
    for seed in range(30):
        matrix = data.draw_homography(np.random.default_rng(seed), hp, 400, 400)
        warped, mapped, cut = data.warp_page(image, quads, matrix, (hp.size, hp.size))
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
            assert (
                core.sum() <= area <= mask.sum() * 1.02 + 20
            )  # nothing of the word lies outside its quad
    assert kept > 200


def test_no_augmentation_is_resize_page():
    hp = dataclasses.replace(HP, aug_strength=0.0)
    image = coloured_page(size=512)[0]
    matrix = data.draw_homography(np.random.default_rng(0), hp, 512, 512)
    np.testing.assert_allclose(matrix, np.diag([0.5, 0.5, 1]), atol=1e-12)
    assert (data.augment_colours(image, np.random.default_rng(0), hp) == image).all()


def test_resize_page_keeps_aspect_and_the_way_back():
    image = np.zeros((1000, 403, 3), np.uint8)
    small, scale = data.resize_page(image, 640)
    assert small.shape == (640, 288, 3)
    np.testing.assert_allclose(np.array([403, 1000]) * scale, [258, 640])


@pytest.mark.parametrize(
    "kind", ["brightness", "contrast", "color", "noise", "blur", "sharpen", "shadow", "fog"]
)
def test_each_colour_augmentation_works_alone(kind):
    off = {
        f"aug_{k}": 0.0
        for k in ["brightness", "contrast", "color", "noise", "blur", "sharpen", "shadow", "fog"]
    }
    hp = dataclasses.replace(HP, **{**off, f"aug_{kind}": 0.5})
    image = coloured_page()[0]
    out = [data.augment_colours(image, np.random.default_rng(s), hp) for s in range(12)]
    changed = [bool((o != image).any()) for o in out]
    assert any(changed) and all(o.shape == image.shape and o.dtype == np.uint8 for o in out)
    assert kind == "color" or not all(changed)


# ---------------------------------------------------------------- samples


def test_samples_depend_on_seed_epoch_and_index_only(tmp_path):
    images = {}
    for i in range(4):
        images |= write_page(tmp_path, f"{i}.png")
    pages = load_labels(write_labels(tmp_path, images), "train")
    data.inspect_pages(pages)
    receipts = data.Receipts(pages, HP)
    again = data.Receipts(pages, HP)
    a, b = receipts[3, 2, 256, 128], [again[0, 1, 256, 256], again[3, 2, 256, 128]][1]
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert (receipts[4, 2, 256, 128][0] != a[0]).any()
    assert a[0].shape == (256, 128, 3) and a[1].shape == (4, 256, 128)


def test_epochs_visit_every_page_and_fill_the_last_batch():
    hp = dataclasses.replace(HP, batch=4)
    pages = [labels.Page(str(i), None, size=(100, 100)) for i in range(10)]
    batches = data.epoch_batches(pages, hp, epoch=5)
    assert [len(b) for b in batches] == [4, 4, 4]
    assert {key[1] for b in batches for key in b} == set(range(10))
    assert {(e, h, w) for b in batches for e, _, h, w in b} == {(5, hp.size, hp.size)}
    assert batches != data.epoch_batches(pages, hp, epoch=6)
    assert [len(b) for b in data.epoch_batches(pages[:3], hp, 0)] == [4]


def test_a_batch_is_the_smallest_canvas_that_holds_its_pages():
    rng = np.random.default_rng(0)
    hp = dataclasses.replace(HP, batch=4, size=640)
    pages = [labels.Page(str(i), None, size=tuple(rng.integers(200, 2000, 2))) for i in range(128)]
    keys = [b for epoch in range(3) for b in data.epoch_batches(pages, hp, epoch)]
    for batch in keys:
        shapes = [
            data.resize_page(np.zeros((*pages[i].size[::-1], 3), np.uint8), 640)[0].shape
            for _, i, _, _ in batch
        ]
        assert {key[2:] for key in batch} == {tuple(np.max(shapes, 0)[:2])}
    square = 640**2 * len(keys)
    alone = np.mean([min(p.size) / max(p.size) for p in pages])
    used = sum(b[0][2] * b[0][3] for b in keys) / square
    assert alone < used < 1.2 * alone, (alone, used)


# ---------------------------------------------------------------- repairs


def page_of(*polygons, size=(200, 120)):
    page = labels.Page("p", None, size=size)
    for i, polygon in enumerate(polygons):
        page.add(i, np.array(polygon, float))
    return page


def test_repair_rule():
    page = page_of(
        [(10, 10), (60, 10), (60, 30), (10, 30)],  # good
        [(10, 10), (60, 30), (60, 10), (10, 30)],  # corners swapped
        [(10, 10), (60, 10), (30, 10)],  # no area
        [(168, 10), (248, 10), (248, 30), (168, 30)],  # six tenths outside
        [(150, 10), (210, 10), (210, 30), (150, 30)],  # a sixth outside
    )
    polygons, ignore, counts = repair_words(page)
    assert ignore == [False, False, True, True, False]
    assert counts == {"self-crossing": 1, "zero-area": 1, "outside": 1, "clipped": 1}
    assert shapely.Polygon(polygons[1]).area == 50 * 20
    assert shapely.Polygon(polygons[4]).bounds == (150, 10, 200, 30)
    assert (
        page.polygons[1] == [(10, 10), (60, 30), (60, 10), (10, 30)]
    ).all()  # labels stay as written


# ---------------------------------------------------------------- label formats


def test_competition_json(tmp_path):
    words = {
        "a": {"points": [[1, 2], [30, 2], [30, 9]], "transcription": "hi"},
        "b": {"points": [[1, 12], [30, 12], [30, 19], [1, 19]], "ignore": True},
        "c": {"points": [[1, 22], [30, 22], [30, 29], [1, 29]], "transcription": "###"},
    }
    write_labels(
        tmp_path,
        write_page(tmp_path, words=words, group="g") | write_page(tmp_path, "b.png", words={}),
    )
    (tmp_path / "meta.json").write_text(json.dumps({"images": {"b.png": {"group": "h"}}}))
    page, empty = load_labels(tmp_path, "train")
    assert (
        page.ids == ["a", "b", "c"] and page.ignore == [False, True, True] and page.texts[0] == "hi"
    )
    assert page.group == "g" and empty.group == "h" and empty.polygons == []
    assert load_labels(tmp_path / "train.json")[0].polygons[0].tolist() == [
        [1, 2],
        [30, 2],
        [30, 9],
    ]


def test_icdar_folder(tmp_path):
    write_page(tmp_path, "x1.png")
    (tmp_path / "gt_x1.txt").write_text(
        "\ufeff1,2,30,2,30,9,1,9,a, b\n1,12,30,12,30,19,1,19,###\n1,22,30,22,30,29,1,29,7\n"
    )
    (page,) = load_labels(tmp_path)
    assert page.texts == ["a, b", "###", "7"] and page.ignore == [False, True, False]
    assert page.polygons[1].tolist() == [[1, 12], [30, 12], [30, 19], [1, 19]]


def test_paddle_label_txt(tmp_path):
    write_page(tmp_path, "x.png")
    quad = [[1, 2], [30, 2], [30, 9], [1, 9]]
    words = [{"points": quad, "transcription": text, "difficult": text == "a"} for text in "a*b"]
    (tmp_path / "Label.txt").write_text(f"images/x.png\t{json.dumps(words)}\n")
    (page,) = load_labels(tmp_path)
    assert page.ignore == [True, True, False] and page.texts == ["a", "*", "b"]
    assert page.path.is_file()


def test_labels_round_trip_through_json(tmp_path):
    images = write_page(tmp_path, group="g", img_w=200, img_h=120)
    pages = load_labels(write_labels(tmp_path, images), "train")
    files.write_json(tmp_path / "val.json", labels.pages_to_json(pages))
    again = load_labels(tmp_path, "val")
    assert [p.__dict__ | {"polygons": 0} for p in pages] == [
        p.__dict__ | {"polygons": 0} for p in again
    ]
    assert (pages[0].polygons[0] == again[0].polygons[0]).all()


@pytest.mark.parametrize(
    "points, message",
    [
        ([[1, 2], [3, 4]], "word 0003 has 2 points; 3 to"),
        ([[1, 2], [3, "x"], [4, 5]], "word 0003 has points that are not"),
        ([[1, 2, 3], [3, 4, 5], [4, 5, 6]], "word 0003 has points that are not"),
        ([[1, 2], [3, 1e9], [4, 5]], "word 0003 has a coordinate that is not finite"),
        ([[1, 2], [3, float("nan")], [4, 5]], "word 0003 has a coordinate that is not finite"),
        (7, "word 0003 has points that are not"),
    ],
)
def test_bad_points_name_file_image_and_word(tmp_path, points, message):
    write_labels(tmp_path, write_page(tmp_path, words={"0003": {"points": points}}))
    with pytest.raises(DataError, match=message) as error:
        load_labels(tmp_path, "train")
    assert "train.json: image a.png" in str(error.value)


@pytest.mark.parametrize("flag", ["false", 2, [], {"a": 1}, 0.5])
def test_a_flag_is_true_or_false(tmp_path, flag):
    quad = [[1, 2], [30, 2], [30, 9], [1, 9]]
    write_labels(tmp_path, write_page(tmp_path, words={"7": {"points": quad, "ignore": flag}}))
    with pytest.raises(DataError, match="a.png: word 7: ignore flag .* is not true or false"):
        load_labels(tmp_path, "train")


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "b/../../a.png"])
def test_picture_names_cannot_leave_the_folder(tmp_path, name):
    write_page(tmp_path)
    write_labels(tmp_path, {name: {"words": {}}})
    with pytest.raises(DataError, match="leads out of the data folder"):
        load_labels(tmp_path, "train")


def test_link_out_of_the_folder_is_refused_but_images_may_be_a_link(tmp_path):
    inner, outer = tmp_path / "in", tmp_path / "out"
    inner.mkdir(), outer.mkdir()
    write_page(outer)
    (inner / "images").symlink_to(outer / "images")
    assert load_labels(write_labels(inner, {"a.png": {"words": {}}}), "train")
    (outer / "secret.png").write_bytes(b"x")
    (outer / "images" / "link.png").symlink_to(outer / "secret.png")
    with pytest.raises(DataError, match="a link that leads out"):
        load_labels(write_labels(inner, {"link.png": {"words": {}}}), "train")


# ---------------------------------------------------------------- pictures


def test_exif_orientation_is_applied(tmp_path):
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, :40] = 255
    raw = cv2.imencode(".jpg", image)[1].tobytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "turned.jpg").write_bytes(raw[:2] + segment + raw[2:])
    turned = read_image(tmp_path / "turned.jpg")
    assert turned.shape == (80, 40, 3) and turned[:30].mean() > 250 and turned[50:].mean() < 5


def test_truncated_and_broken_pictures_are_errors(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    for suffix in (".jpg", ".png"):
        raw = cv2.imencode(suffix, image)[1].tobytes()
        (tmp_path / f"cut{suffix}").write_bytes(raw[: len(raw) // 2])
        with pytest.raises(DataError, match=f"cut{suffix}: truncated"):
            read_image(tmp_path / f"cut{suffix}")
    raw = cv2.imencode(".jpg", image)[1].tobytes()
    thumbnail = b"\xff\xe1\0\x08\xff\xda\xff\xd9.."  # its end is not the picture's
    (tmp_path / "cut.jpg").write_bytes(raw[:2] + thumbnail + raw[2 : len(raw) // 2])
    with pytest.raises(DataError, match="cut.jpg: truncated"):
        read_image(tmp_path / "cut.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(DataError, match="not a picture"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif"])
def test_header_size_is_the_decoders(suffix):
    options = {".jpg": [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]], ".webp": [[], [1 << 6, 80]]}
    for flags in options.get(suffix, [[]]):
        raw = cv2.imencode(suffix, np.zeros((200, 300, 3), np.uint8), flags)[1].tobytes()
        assert data.header_size(raw) == (300, 200)
    assert data.header_size(b"") is None


def test_odd_but_whole_pictures_are_read(tmp_path):
    """Phones add a film behind a JPEG, screenshot tools something behind a PNG; OS/2's bitmaps."""
    image = np.random.default_rng(0).integers(0, 255, (20, 32, 3), np.uint8)
    old = hostile.struct.pack("<IHHIIHHHH", 26, 0, 0, 26, 12, 32, 20, 1, 24)
    pictures = {
        "film.jpg": cv2.imencode(".jpg", image)[1].tobytes() + b"..\xff\xd9..\xff\xda..",
        "tail.png": cv2.imencode(".png", image)[1].tobytes() + b"." * 100,
        "os2.bmp": b"BM" + old + image.tobytes(),
    }
    for name, raw in pictures.items():
        (tmp_path / name).write_bytes(raw)
        assert read_image(tmp_path / name).shape == image.shape


# ---------------------------------------------------------------- folds


def fold_pages(n=60):
    rng, pages = np.random.default_rng(0), []
    for i in range(n):
        page = labels.Page(f"{i}.png", None, group=f"shop {rng.integers(20)}", size=(500, 1000))
        for k in range(rng.integers(5, 120)):
            page.add(k, np.array([(0, 0), (50, 0), (50, 1), (0, 1)]) * rng.uniform(5, 25))
        pages.append(page)
    return pages


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


def test_folds_are_grouped_balanced_and_deterministic():
    pages = fold_pages()
    thumbnails = np.eye(60, 1024, dtype=np.float32)
    thumbnails[7] = thumbnails[3]  # a near-duplicate in another shop
    groups = data.page_groups(pages, thumbnails)
    folds = make_folds(pages, groups, 5)
    assert set(folds) == {1, 2, 3, 4, 5} and folds[3] == folds[7]
    for shop in {p.group for p in pages}:
        assert len({f for f, p in zip(folds, pages) if p.group == shop}) == 1
    words = np.bincount(folds, [len(p.polygons) for p in pages])[1:]
    assert words.max() / words.min() < 1.25
    assert (folds == make_folds(pages, groups, 5)).all()
    a, b = data.split_json(pages, groups, 5), data.split_json(pages[::-1], groups[::-1], 4)
    assert a["hash"] == data.split_json(pages, groups, 5)["hash"] != b["hash"]
    with pytest.raises(DataError, match="folds of"):
        make_folds(pages, groups, 40)


# ---------------------------------------------------------------- command line


def test_check_reports_what_will_go_wrong(tmp_path, script):
    turned = {"1": {"points": [[10, 10], [60, 10], [60, 190], [10, 190]]}}
    images = write_page(tmp_path, "t.png", words=turned) | write_page(
        tmp_path, "a.png", group="g", img_w=1, img_h=2
    )
    write_labels(tmp_path, images)
    write_labels(tmp_path, write_page(tmp_path, "e.png", words={}, group="g"), "val")
    result = script("data.py", "check", ".", "--size", "32")
    assert result.returncode == 0, result.stderr
    for text in (
        "train 2 pages, 2 words",
        "1 without text",
        "median word height",
        "t.png: labels fit only a turned page",
        "a.png: is (200, 120), the label file says (1, 2)",
        "near-duplicates warning: across splits",
        "group g has pages in more than one split",
    ):
        assert text in result.stdout, text


def test_check_errors_are_one_line(tmp_path, script, one_line):
    (tmp_path / "images").mkdir()
    raw = cv2.imencode(".bmp", np.zeros((40, 40, 3), np.uint8))[1].tobytes()
    (tmp_path / "images" / "cut.bmp").write_bytes(raw[:900])
    write_labels(tmp_path, {"cut.bmp": {"words": {}}})
    one_line(script("data.py", "check", "."), "images/cut.bmp: not a picture", code=1)
    (tmp_path / "train.json").write_text("{oops")
    one_line(script("data.py", "check", "."), "train.json", "not a JSON file", code=1)
    (tmp_path / "train.json").write_text('{"images": {"gone.png": {"words": {}}}}')
    one_line(script("data.py", "check", "."), "gone.png", "no such picture", code=1)
    one_line(script("data.py", "check", "nowhere"), "nowhere: no such file", code=1)
    (tmp_path / "empty").mkdir()
    one_line(script("data.py", "check", "empty"), "empty: no labels", code=1)


def test_synth_and_split_commands(tmp_path, script):
    assert (
        script("data.py", "synth", "s", "--pages", 12, "--size", 160, "--words", 6).returncode == 0
    )
    pages = load_labels(tmp_path / "s", "train")
    assert len(pages) == 9 and len(load_labels(tmp_path / "s", "val")) == 3
    before = (tmp_path / "s" / "train.json").read_bytes()
    assert (
        script("data.py", "synth", "s", "--pages", 12, "--size", 160, "--words", 6).returncode == 0
    )
    assert (tmp_path / "s" / "train.json").read_bytes() == before
    assert script("data.py", "synth", "s", "--pages", 13).returncode == 1
    result = script("data.py", "split", "s", "--folds", 3)
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
    with pytest.raises(DataError, match="s: exists; choose another folder"):
        data.synth(tmp_path / "s", 3, 0, **kind)


def test_run_pages_holds_out_a_tenth_by_group(tmp_path):
    images = {}
    for i in range(20):
        images |= write_page(tmp_path, f"{i}.png", shape=(60 + i, 80), group=f"g{i // 2}")
    write_labels(tmp_path, images)
    for i in range(20):  # pictures that are not near-duplicates
        noise = np.random.default_rng(i).integers(0, 255, (60, 80, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), noise)
    hp = SimpleNamespace(
        data=str(tmp_path / "train.json"), val_data="", image_dir="", folds=0, fold=1
    )
    train, val, _split = data.run_pages(hp)
    assert (
        len(val) == 2 and len(train) == 18 and not {p.group for p in train} & {p.group for p in val}
    )
    write_labels(tmp_path, {"0.png": images["0.png"], "1.png": images["1.png"]})
    with pytest.raises(DataError, match="no val split, and one group of pages"):
        data.run_pages(hp)


def test_pseudo_pages_keep_their_flags_and_leave_out_what_is_known(tmp_path):
    """DATA may be one label file; a copy of a known page under another name is known."""
    quad, images = [[1, 2], [30, 2], [30, 9], [1, 9]], {}
    words = {"a": {"points": quad, "confidence": 0.9}, "b": {"points": quad, "confidence": 0.4}}
    words["c"] = {"points": quad, "ignore": True}
    for i, name in enumerate(("known.png", "copy.png", "new.png")):
        images |= write_page(tmp_path, name, words=words)
        noise = np.random.default_rng(i // 2).integers(0, 255, (60, 80, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "images" / name), noise)
    write_labels(tmp_path, {"known.png": images["known.png"]})
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "p.json").write_text(json.dumps({"images": images}))
    hp = {"data": str(tmp_path / "train.json"), "pseudo_labels": str(tmp_path / "p" / "p.json")}
    hp = SimpleNamespace(**hp, image_dir="", min_confidence=0.5)
    (page,) = data.pseudo_pages(hp, load_labels(tmp_path, "train"))
    assert page.name == "new.png" and page.ignore == [False, True, True]


# ---------------------------------------------------------------- hostile input


@pytest.mark.parametrize(
    "name", [n for n in hostile.CHECK if not any(w in n for w in ("MB", "GB", "million", "bomb"))]
)
def test_hostile_input_is_an_error_of_one_line(tmp_path, monkeypatch, name):
    """The quick ones of tests/by_hand/hostile.py in this process; the script itself bounds memory too."""
    monkeypatch.chdir(tmp_path)
    hostile.CHECK[name](tmp_path)
    with pytest.raises(DataError) as error:
        data.check(".", 960, None)
    said = str(error.value)
    assert said.isprintable() and len(said) < 500
