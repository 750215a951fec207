"""Voting, mean maps, gate and submission against closed forms, invariances, round trips."""

import json
import shutil
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
import shapely
import torch

import data
import ensemble
import evaluate
import files
import labels
from dbnet import DBNet, save_checkpoint
from ensemble import (
    Member,
    canonical,
    overlaps,
    read_submission,
    region_points,
    submission_regions,
    vote,
    write_submission,
)
from evaluate import Network, mean_map
from hparams import Hparams

CPU = torch.device("cpu")
HP = Hparams(backbone="mobilenetv3_small_050", neck=16, size=96, thresh=0.1, box_thresh=0.1)


def box(x, y, w, h):
    return np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], float)


def star(rng, points, centre, radius):
    """A simple polygon: sorted angles, radii between a half and the whole."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, points))
    reach = radius * rng.uniform(0.5, 1, points)
    return centre + reach[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def shuffled(rng, polygon):
    """The same outline from another vertex, perhaps the other way round."""
    polygon = polygon[::-1] if rng.random() < 0.5 else polygon
    return np.roll(polygon, rng.integers(len(polygon)), 0)


def random_members(rng, members=5, words=12, points=(4, 60)):
    """Words on a grid, seen by most members with a shift, some seen twice, and false alarms."""
    result = []
    shapes = [
        star(rng, rng.integers(points[0], points[1] + 1), ((n % 4) * 60 + 40, n // 4 * 60 + 40), 25)
        for n in range(words)
    ]
    for _ in range(members):
        polygons = [s + rng.normal(0, 1.5, 2) for s in shapes if rng.random() < 0.8]
        polygons += [p + 1 for p in polygons[:2]]
        polygons += [star(rng, 6, rng.uniform(0, 300, 2), 20) for _ in range(2)]
        result.append((polygons, rng.random(len(polygons))))
    return result


def as_set(found):
    return {(tuple(p.ravel().tolist()), round(c, 9)) for p, c in zip(*found)}


# ---------------------------------------------------------------- voting


def test_members_that_agree_return_the_member():
    rng = np.random.default_rng(0)
    for k in (1, 2, 3, 5):
        polygons = [
            star(rng, points, (x, y), 24)
            for points, x in zip((4, 5, 17, 60), (40, 100, 160, 220))
            for y in (40, 100)
        ]
        scores = np.sort(rng.random(8))[::-1]
        found = vote([(polygons, scores)] * k, [1.0] * k, k)
        assert np.allclose(found[1], scores)
        for polygon, expected in zip(found[0], polygons):
            assert np.array_equal(polygon, canonical(expected))


def test_order_of_members_polygons_and_vertices_does_not_matter():
    rng = np.random.default_rng(1)
    for trial in range(10):
        members = random_members(rng)
        members.append(members[trial % 5])  # two equal members, so that there are ties
        weights = [1.0, 1.5, 0.5, 1.0, 1.0, 1.0]
        expected = as_set(vote(members, weights, 2.9))
        assert expected
        order, mixed = rng.permutation(6), []
        for k in order:
            polygons, scores = members[k]
            inner = rng.permutation(len(polygons))
            mixed.append(([shuffled(rng, polygons[n]) for n in inner], scores[inner]))
        assert as_set(vote(mixed, [weights[k] for k in order], 2.9)) == expected


def test_two_boxes_of_one_member_are_one_vote():
    twice = (
        [box(0, 0, 100, 20), box(1, 0, 100, 20), box(0, 1, 100, 20)],
        np.array([0.9, 0.8, 0.7]),
    )
    once = ([box(0, 0, 100, 20)], np.array([0.9]))
    assert not vote([twice, ([], np.zeros(0)), ([], np.zeros(0))], [1.0] * 3, 2)[0]
    assert len(vote([twice, once, ([], np.zeros(0))], [1.0] * 3, 2)[0]) == 1
    rng = np.random.default_rng(2)
    for _ in range(20):
        members = random_members(rng)
        owner = np.repeat(range(5), [len(p) for p, _ in members])
        clusters = ensemble.cluster_words(
            overlaps([q for p, _ in members for q in p], owner), owner
        )
        assert sorted(n for c in clusters for n in c) == list(range(len(owner)))
        assert all(len(set(owner[c])) == len(c) for c in clusters)


def test_the_elected_polygon_is_the_medoid_of_its_word():
    rng = np.random.default_rng(3)
    for _ in range(20):
        polygons = [box(10, 10, 120, 30) + rng.normal(0, 3, (4, 2)) for _ in range(5)]
        members = [([p], np.array([0.5])) for p in polygons]
        areas = [shapely.Polygon(p) for p in polygons]
        support = [sum(a.intersection(b).area / a.union(b).area for b in areas) for a in areas]
        found = vote(members, [1.0] * 5, 5)
        assert len(found[0]) == 1
        assert np.array_equal(found[0][0], canonical(polygons[int(np.argmax(support))]))


def test_vertices_are_not_averaged():
    """A word with its vertices from other starts: their mean is a point, the vote is the word."""
    word = box(100, 100, 156, 40)
    members = [([np.roll(word, k, 0) + k], np.array([0.9])) for k in (0, 1, 2, 3)]
    mean = np.mean([p[0] for p, _ in members], 0)
    assert shapely.Polygon(mean).area < 1
    (polygon,), confidence = vote(members, [1.0] * 4, 4)
    assert shapely.Polygon(polygon).area == 156 * 40 and confidence == pytest.approx([0.9])


def test_threshold_counts_weights_and_confidence_is_their_share():
    word, other = box(0, 0, 50, 10), box(0, 50, 50, 10)
    members = [([word], np.array([0.8])), ([word, other], np.array([0.6, 0.9])), ([], np.zeros(0))]
    polygons, confidence = vote(members, [0.5, 1.0, 1.5], 1.5)
    assert len(polygons) == 1 and confidence == pytest.approx([(0.4 + 0.6) / 3])
    assert len(vote(members, [0.5, 1.0, 1.5], 1.0)[0]) == 2
    assert not vote(members, [0.5, 1.0, 1.5], 1.6)[0]


def test_a_member_without_the_page_neither_votes_nor_counts():
    word = ([box(0, 0, 50, 10)], np.array([0.8]))
    nothing = ([], np.zeros(0))
    assert len(vote([word, word, None], [1.0] * 3, 3)[0]) == 1  # both of two
    assert not vote([word, word, nothing], [1.0] * 3, 3)[0]  # two of three
    assert vote([word, None, None], [1.0] * 3, 2)[1] == pytest.approx([0.8])
    assert not vote([None, None, nothing], [1.0] * 3, 2)[0]


# ---------------------------------------------------------------- maps


def page_image(seed=0, height=90, width=70):
    """A page with dark bars on light paper and its labels."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 230, np.uint8)
    image += rng.integers(0, 20, image.shape, np.uint8)
    words = [box(8, y, rng.integers(20, 50), 8) for y in range(10, height - 12, 20)]
    for word in words:
        cv2.fillPoly(image, [word.astype(int)], (30, 30, 30))
    return image, words


def tiny_network(seed=0):
    torch.manual_seed(seed)
    return DBNet(HP.backbone, HP.neck).eval()


def test_mean_of_equal_maps_is_the_map():
    prob = np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)
    for weights in ([1.0], [1.0] * 3, [0.7, 1.3], [0.9, 1.3, 0.8]):
        assert np.array_equal(mean_map([prob] * len(weights), weights, prob.shape), prob)
    low, high = np.zeros((4, 4), np.uint8), np.full((8, 8), 200, np.uint8)
    assert (mean_map([low, high], [1.0, 3.0], (4, 4)) == 150).all()


def network_map(path, image, *sizes, flip=False):
    cv2.imwrite(str(path), image)
    model = ensemble.flipped(tiny_network()) if flip else tiny_network()
    network = Network(model, replace(HP, amp="off"), sizes)
    (found,) = evaluate.predict_maps([network], [labels.Page(path.name, path)], CPU)
    return found[1][0]


def test_a_mirrored_page_gives_the_mirrored_mean_of_both(tmp_path):
    image, _ = page_image(width=64, height=96)  # no padding, which would lie on the other side
    mirror = np.ascontiguousarray(image[:, ::-1])
    plain = network_map(tmp_path / "a.png", image, flip=True).astype(int)
    mirrored = network_map(tmp_path / "b.png", mirror, flip=True).astype(int)
    assert np.abs(mirrored[:, ::-1] - plain).max() <= 1
    both = [network_map(tmp_path / "a.png", image), network_map(tmp_path / "b.png", mirror)]
    assert np.abs(mean_map([both[0], both[1][:, ::-1]], [1, 1], (96, 64)) - plain).max() <= 1
    assert np.abs(plain - both[0]).max() > 1  # a network that is not symmetric by itself


def test_an_ensemble_of_one_predicts_what_evaluate_predicts(tmp_path):
    image, _ = page_image()
    cv2.imwrite(str(tmp_path / "a.png"), image)
    page, network = labels.Page("a.png", tmp_path / "a.png"), Network(tiny_network(), HP)
    for method in ("maps", "voting"):
        one = ensemble.Ensemble([Member("a", network, None, {})], [1.0], method, HP, 1, CPU)
        (alone,), (together,) = ensemble.predict_all(one, [page], [[0]])
        (expected,) = evaluate.predict(network, [page], CPU)
        assert len(expected[0])
        for found in (alone[0], together[0]):
            assert np.allclose(found[1], expected[1])
            for a, b in zip(found[0], expected[0]):
                assert np.allclose(canonical(a), canonical(b))


def test_scales_keep_the_networks_own_map_size(tmp_path):
    image, path = page_image()[0], tmp_path / "a.png"
    once = network_map(path, image, 96)
    assert np.array_equal(once, network_map(path, image, 96, 96)) and once.shape == (96, 75)
    maps = [network_map(path, image, size) for size in (64, 128)]
    assert [m.shape for m in maps] == [(96, 75)] * 2
    both = network_map(path, image, 64, 128).astype(int)
    assert np.abs(both - mean_map(maps, [1, 1], (96, 75))).max() <= 1


# ---------------------------------------------------------------- members


def test_discover_takes_the_one_whole_set(tmp_path):
    def make(name, **hp):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "best.pt").touch()
        files.write_json(folder / "hparams.json", asdict(replace(HP, name=name, **hp)))

    discover = ensemble.discover
    with pytest.raises(files.UsageError, match="found: none"):
        discover(tmp_path / "runs")
    make("plain")
    for fold in (3, 1):
        make(f"a-fold{fold}", folds=3, fold=fold)
    with pytest.raises(
        files.DataError, match="0 whole sets .*a-fold1/best.pt .of 3., .*a-fold3/best.pt .of 3"
    ):
        discover(tmp_path / "runs")
    make("a-fold2", folds=3, fold=2)
    make("b-fold2", folds=3, fold=2, lr=1e-3)
    found = discover(tmp_path / "runs")
    assert [f.split("/")[-2] for f in found] == ["a-fold1", "a-fold2", "a-fold3"]
    for fold in (1, 3):
        make(f"b-fold{fold}", folds=3, fold=fold, lr=1e-3)
    with pytest.raises(files.DataError, match="2 whole sets of fold runs"):
        discover(tmp_path / "runs")


def test_members_are_chosen_and_weighted_by_their_recorded_scores():
    members = [named(n, h) for n, h in zip("abcd", (0.5, 0.8, 0.6, 0.7))]
    choose, weigh = ensemble.choose_members, ensemble.member_weights
    assert [m.name for m in choose(members, 2, False)] == ["b", "d"]
    assert [m.name for m in choose(members, None, True)] == ["b", "c", "d"]
    assert choose(members, None, False) == members
    weights = weigh("scores", members)
    assert np.mean(weights) == pytest.approx(1) and weights[1] / weights[0] == pytest.approx(1.6)
    assert weigh(ensemble.numbers("2,1,1,4"), members) == [1.0, 0.5, 0.5, 2.0]
    for text in ("1,2", "1,1,1,0", "1,1,1,nan"):
        with pytest.raises(files.UsageError, match="--weights"):
            weigh(ensemble.numbers(text), members)
    with pytest.raises(files.UsageError, match="5 of 4"):
        choose(members, 5, False)
    with pytest.raises(files.DataError, match="x.json: no out-of-fold score"):
        choose([*members, Member("x.json", None, {}, {})], 2, False)


def named(name, score=None, **hp):
    return Member(name, Network(None, replace(HP, **hp)), None, {"hmean": score})


def test_members_of_a_mean_map_have_to_decode_alike():
    common = ensemble.common_decoding
    assert common([named("a"), named("b", size=128)]).size == 128
    with pytest.raises(files.UsageError, match="thresh: .*0.1 in a, 0.3 in b; .*--thresh"):
        common([named("a"), named("b", thresh=0.3)])
    with pytest.raises(files.UsageError, match="shrink_ratio: .*--method voting"):
        common([named("a"), named("b", shrink_ratio=0.5)])


def test_decide_tells_only_what_holds_for_the_whole_interval():
    border = (0.966, 0.965)
    assert ensemble.decide((0.966, 0.97), *border) == "success"
    assert ensemble.decide((0.9652, 0.9658), *border) == "acceptable"
    assert ensemble.decide((0.95, 0.964), *border) == "fall back to hparams/run3.json"
    assert ensemble.decide((0.9652, 0.967), *border) == "cannot tell: from acceptable to success"
    assert ensemble.decide((0.95, 0.97), *border).endswith("run3.json to success")


# ---------------------------------------------------------------- submission


def random_found(rng, words):
    polygons = [
        star(rng, rng.integers(3, 61), rng.uniform(-20, 620, 2), rng.uniform(0.3, 60))
        for _ in range(words)
    ]
    return polygons, rng.random(words)


def test_what_the_writer_writes_the_validator_accepts_and_reads_back(tmp_path):
    rng = np.random.default_rng(0)
    names = ["plain.jpg", "with, comma.jpg", 'quo"te.jpg', "한글.png", "no text.jpg"]
    for most in (0, 3, 30, 30, 700):
        pages = [labels.Page(name, None, size=(600, 400)) for name in names]
        found = [random_found(rng, rng.integers(most + 1)) for _ in names[:-1]]
        found.append(([], np.zeros(0)))
        write_submission(tmp_path / "out.csv", pages, found)
        sizes = {name: (600, 400) for name in names}
        regions, problems = read_submission(tmp_path / "out.csv", names, sizes, True)
        assert problems == [] and list(regions) == names and regions["no text.jpg"] == []
        for page, one in zip(pages, found):
            expected = submission_regions(*one, page.size)
            assert len(expected) <= 500
            assert all(map(np.array_equal, regions[page.name], expected))
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").startswith("filename,polygons\n")


def test_regions_are_whole_by_confidence_and_unlike():
    polygons = [box(10 * n, 0, 8, 8) for n in range(600)]
    regions = submission_regions(polygons, np.arange(600) / 600, (6000, 10))
    assert len(regions) == 500 and regions[0].min(0).tolist() == [5990, 0]
    same = [box(0, 0, 9, 9), np.roll(box(0.2, 0, 9, 9), 1, 0)[::-1], box(0, 0, 9, 5)]
    assert len(submission_regions(same, [0.1, 0.9, 0.5], (20, 20))) == 2
    assert region_points(box(3, 3, 0.2, 9), (20, 20)) is None
    assert region_points(box(-30, 0, 9, 9), (20, 20)) is None


def test_a_triangle_gets_its_longest_edge_halved():
    triangle = np.array([(0, 0), (40, 0), (0, 30)])
    points = region_points(triangle, (100, 100))
    assert points.tolist() == [[0, 0], [40, 0], [20, 15], [0, 30]]
    rng = np.random.default_rng(0)
    for _ in range(200):
        triangle = np.round(star(rng, 3, (50, 50), 40))
        points = region_points(triangle, (100, 100))
        if points is not None:
            assert len(points) == 4
            kept = {tuple(p) for p in triangle.astype(int).tolist()}
            assert kept < {tuple(p) for p in points.tolist()}


GOOD = "filename,polygons\na.jpg,0 0 9 0 9 9 0 9|20 0 29 0 29 9 20 9\nb.jpg,\n"
SQUARE = "0 0 9 0 9 9 0 9"
SQUARES = [f"{x} {y} {x + 1} {y} {x + 1} {y + 1} {x} {y + 1}" for x in range(50) for y in range(10)]
DAMAGE = {
    "header": (GOOD.replace("polygons", "polygon"), "line 1", "filename,polygons"),
    "no header": (GOOD.split("\n", 1)[1], "line 1", "header"),
    "bom": ("\ufeff" + GOOD, "line 1", "header"),
    "nothing": ("", "line 1", "header"),
    "float": (GOOD.replace("29 9", "29.0 9"), "line 2: a.jpg: region 2", "29.0 9"),
    "exponent": (GOOD.replace("29 9", "1e3 9"), "line 2: a.jpg: region 2", "1e3 9"),
    "two spaces": (GOOD.replace("9 0 9 9", "9 0  9 9"), "region 1", "one space between"),
    "other digits": (GOOD.replace("0 0 9", "٠ 0 9"), "region 1", "whole numbers"),
    "odd": (GOOD.replace("20 9\n", "20\n"), "region 2", "7 numbers"),
    "triangle": (GOOD.replace(" 0 9|", "|"), "region 1", "6 numbers"),
    "negative": (GOOD.replace("0 9|", "-1 9|"), "region 1", "leaves the page"),
    "outside": (GOOD.replace("29 9", "101 9"), "region 2", "leaves the page 100x50"),
    "line": (GOOD.replace(SQUARE, "0 0 3 0 6 0 9 0"), "region 1", "no area"),
    "twice": (
        GOOD.replace("20 0 29 0 29 9 20 9", "9 9 9 0 0 0 0 9"),
        "region 2",
        "is there already",
    ),
    "bar at the end": (GOOD.replace("20 9\n", "20 9|\n"), "region 3", "whole numbers"),
    "501": (GOOD.replace(SQUARE, "|".join(SQUARES)), "line 2: a.jpg", "501 regions"),
    "page twice": (GOOD + "a.jpg,\n", "line 4: a.jpg", "already in line 2"),
    "strange page": (GOOD + "c.jpg,\n", "line 4: c.jpg", "not a page"),
    "page missing": (GOOD.replace("b.jpg,\n", ""), "1 pages have no row", "b.jpg"),
    "order": ("filename,polygons\nb.jpg,\na.jpg,\n", "line 2: b.jpg", "order"),
    "fields": (GOOD.replace("b.jpg,", "b.jpg"), "line 3", "1 fields"),
    "comma": (GOOD.replace("0 9|", "0,9|"), "line 2", "3 fields"),
    "empty line": (GOOD.replace("b.jpg", "\nb.jpg"), "line 3", "0 fields"),
    "cut off": (GOOD[:-9], "cut off"),
    "quote": (GOOD.replace("a.jpg", '"a.jpg'), "not a CSV"),
    "endless number": (GOOD.replace("b.jpg,", "b.jpg,1 2 3 4 5 " + "9" * 9999), "line 3", "'1 2 3"),
    "endless field": (GOOD + "a.jpg," + "1 " * 2**20, "not a CSV", "larger than field limit"),
}


def problems_of(*args):
    try:
        return read_submission(*args)[1]
    except files.DataError as error:
        return [str(error)]


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_found(tmp_path, kind):
    text, *words = DAMAGE[kind]
    names, sizes = ["a.jpg", "b.jpg"], {"a.jpg": (100, 50), "b.jpg": None}
    (tmp_path / "good.csv").write_text(GOOD)
    assert read_submission(tmp_path / "good.csv", names, sizes, True)[1] == []
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8", newline="")
    problems = problems_of(tmp_path / "bad.csv", names, sizes, True)
    assert problems and all(word in problems[0] for word in words), problems
    assert len(problems[0]) < 300
    assert kind == "fields" or kind == "comma" or kind == "empty line" or len(problems) == 1


def test_a_file_that_is_not_text_is_one_problem(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"filename,polygons\n\xff\xfe,\n")
    (problem,) = problems_of(tmp_path / "x.csv")
    assert "x.csv: not text in UTF-8" in problem


# ---------------------------------------------------------------- command line


def save_member(path, weights=0, held=(), trained=(), **hp):
    """A checkpoint that held out the pages at some paths and trained on others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {"hmean": 0.5 + weights / 100, "pages": {page.name: 0.5 for page in held}}
    digests = ([data.picture_digest(page) for page in pages] for pages in (trained, held))
    origin = dict(zip(("trained", "chosen"), digests)) | {"unknown": []}
    state = {"model": tiny_network(weights).state_dict(), "hparams": asdict(replace(HP, **hp))}
    save_checkpoint(path, {**state, "scores": scores, "origin": origin, "epoch": 1})


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """DATA with train (4), val (6), test (3, no labels) pages; two fold runs, three detectors."""
    root = tmp_path_factory.mktemp("house")
    (root / "DATA" / "images").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 6), ("test", 3)):
        pages = []
        for n in range(count):
            image, words = page_image(10 * count + n)
            page = labels.Page(f"{split}{n}.png", None, size=(70, 90), group=f"{split} {n}")
            cv2.imwrite(str(root / "DATA" / "images" / page.name), image)
            for k, word in enumerate(words if split != "test" else ()):
                page.add(k, word)
            pages.append(page)
        files.write_json(root / "DATA" / f"{split}.json", labels.pages_to_json(pages))
    common = {"data": str(root / "DATA"), "folds": 2}
    pages = [root / "DATA" / "images" / f"train{n}.png" for n in range(4)]
    for fold in (1, 2):
        folder = root / "runs" / f"a-fold{fold}"
        save_member(
            folder / "best.pt",
            fold,
            pages[fold - 1 :: 2],
            pages[2 - fold :: 2],
            fold=fold,
            **common,
        )
        files.write_json(folder / "hparams.json", asdict(replace(HP, **common, fold=fold)))
    write_detectors(root)
    return root


def write_detectors(root):
    """p0.json to p2.json: each finds the words and, on its own, one false alarm a page."""
    pages = labels.load_labels(root / "DATA", "val")
    for k in range(3):
        found = []
        for page in pages:
            one = labels.Page(page.name, page.path, size=(70, 90))
            for n, word in enumerate(page.polygons):
                one.add(n, word, confidence=0.9)
            one.add("alarm", box(58, 5 + 30 * k, 10, 10), confidence=0.8)
            found.append(one)
        files.write_json(root / f"p{k}.json", labels.pages_to_json(found))


@pytest.fixture
def run(house, monkeypatch, capsys):
    """run(*flags) in the house -> exit code, stdout, stderr."""
    monkeypatch.chdir(house)

    def call(*flags):
        try:
            code = ensemble.main([str(flag) for flag in flags])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


DETECTORS = ("p0.json", "p1.json", "p2.json", "--method", "voting", "--data", "DATA")


def test_voting_removes_what_only_one_detector_sees(run):
    code, out, err = run(*DETECTORS, "--decide", 0.966, 0.965)
    assert code == 0 and err == "", out + err
    assert out.count("without p") == 3 and "decision: success" in out
    code, out, _ = run(*DETECTORS, "--json")
    result = json.loads(out)
    assert result["hmean"] == 1 and result["gate"]["verdict"] == "better"
    difference = 1 - max(m["hmean"] for m in result["members"])
    assert result["gate"]["difference"] == pytest.approx(difference) and difference > 0
    low, high = result["gate"]["interval"]
    assert 0 < low <= difference <= high + 1e-12


def test_few_pages_cannot_open_the_gate(run):
    images = files.read_json("DATA/val.json")["images"]
    for pages, code in ((1, 5), (5, 5), (6, 0)):
        files.write_json("DATA/few.json", {"images": dict(list(images.items())[:pages])})
        assert run(*DETECTORS[:-1], "DATA/few.json")[0] == code


def test_an_ensemble_that_is_not_better_ends_with_5(run, house):
    shutil.copy(house / "p0.json", house / "same.json")
    code, out, _ = run("p0.json", "same.json", *DETECTORS[3:])
    assert code == 5 and "not shown to be better" in out
    code, out, _ = run(*DETECTORS, "--threshold", 1)  # a union keeps every false alarm
    assert code == 5 and "is worse than" in out


def test_no_arguments_take_the_folds_and_the_pages_outside_them(run):
    code, out, err = run()
    assert code == (0 if " better, vs the best member" in out else 5)
    assert err == "members: runs/a-fold1/best.pt, runs/a-fold2/best.pt\n"
    assert "ensemble by maps of 2" in out and "6 pages" in out


def test_pages_that_a_member_trained_on_are_refused(run, house):
    folds = [f"runs/a-fold{k}/best.pt" for k in (1, 2)]
    code, out, err = run(*folds, "--data", "DATA", "--split", "train")
    assert code == 1 and out == "" and "outside all folds" in err
    assert err.count("warning: ") == 2 and "trained on 2 of these 4 pages" in err
    # a copy under another name is the same page, wherever the data lie
    shutil.copy("DATA/images/train1.png", "DATA/images/copy.png")
    own = {"copy.png": files.read_json("DATA/train.json")["images"]["train1.png"]}
    files.write_json("DATA/copy.json", {"images": own})
    (house / "DATA" / "images").rename(house / "DATA" / "moved")
    code, _, err = run(folds[0], "--data", "DATA/copy.json", "--image-dir", "DATA/moved")
    (house / "DATA" / "moved").rename(house / "DATA" / "images")
    (house / "DATA" / "images" / "copy.png").unlink()
    assert code == 1 and "trained on 1 of these 1 pages (first: copy.png)" in err
    # replicas of one fold may judge on the pages that both held out
    pages = [house / "DATA" / "images" / f"train{n}.png" for n in range(4)]
    save_member(house / "replica.pt", 7, pages[::2], pages[1::2], folds=2, seed=1)
    images = files.read_json("DATA/train.json")["images"]
    kept = {page.name: images[page.name] for page in pages[::2]}
    files.write_json("DATA/one.json", {"images": kept})
    code, out, err = run(folds[0], "replica.pt", "--data", "DATA/one.json")
    assert code == 5 and "2 pages" in out and err.count("was chosen on these pages") == 2
    # an older checkpoint does not tell
    state = torch.load(folds[0], weights_only=True)
    save_checkpoint("older.pt", {key: state[key] for key in ("model", "hparams", "scores")})
    code, _, err = run("older.pt", "--data", "DATA", "--split", "train")
    assert code == 0 and "pages that older.pt trained on are not known" in err


def test_a_test_set_becomes_a_submission_in_the_order_of_the_sample(run, house):
    sample = ["test2.png", "test0.png", "test1.png"]
    (house / "sample.csv").write_text("filename,polygons\n" + "".join(f"{n},\n" for n in sample))
    flags = ("runs/a-fold1/best.pt", "--data", "DATA", "--flip", "--scales", "64,96")
    code, _, err = run(*flags, "--sample", "sample.csv", "--submission", "out.csv")
    assert code == 0 and err == "out.csv: 3 pages, 3 regions found\n"
    regions, problems = read_submission("out.csv", sample, ordered=True)
    assert problems == [] and sum(map(len, regions.values()))
    beside = labels.read_competition("out.json", need_pictures=False)
    assert [p.name for p in beside] == sample and beside[0].size == (70, 90)
    assert all(0 < c < 1 for p in beside for c in p.confidences)
    code, out, _ = run("--validate", "out.csv", "--data", "DATA", "--sample", "sample.csv")
    assert code == 0 and "3 pages" in out
    # the pictures alone do as well: no labels, names from the sample or from the folder
    code, _, err = run(
        flags[0], "--data", "DATA/images", "--sample", "sample.csv", "--submission", "b.csv"
    )
    assert code == 0, err
    code, _, err = run(flags[0], "--data", "DATA/images", "--out", "c.json")
    assert code == 0 and len(labels.read_competition("c.json", need_pictures=False)) == 13, err


def test_a_detector_without_some_pages_abstains_or_is_refused(run, house):
    tests = {
        f"test{n}.png": {"words": {"1": {"points": box(9, 9, 30, 9).tolist()}}} for n in range(3)
    }
    files.write_json("t0.json", {"images": tests})
    files.write_json("t1.json", {"images": {"test0.png": tests["test0.png"]}})
    both = ("t0.json", "t1.json", "--method", "voting", "--data", "DATA", "--split", "test")
    code, _, err = run(*both, "--out", "both.json")
    assert code == 0 and "t1.json: 2 of 3 pages are not in it" in err
    assert [len(p.polygons) for p in labels.read_competition("both.json", need_pictures=False)] == [
        1
    ] * 3
    files.write_json("p9.json", {"images": {"val0.png": tests["test0.png"]}})
    code, _, err = run("p0.json", "p9.json", *DETECTORS[3:])
    assert code == 1 and err.count("\n") == 1 and "p9.json: 5 of 6 pages are not in it" in err


MAPS = ("runs/a-fold1/best.pt", "--data", "DATA")
BAD = [
    (2, ("p0.json", "--data", "DATA"), "no maps; use --method voting"),
    (2, ("p0.json", "p0.json", *DETECTORS[3:]), "named twice"),
    (1, ("empty.json", *DETECTORS[3:]), "no region on any of 0 pages"),
    (1, ("gone.json", *DETECTORS[3:]), "gone.json: no such file"),
    (1, ("t9.json", *DETECTORS[3:]), "6 of 6 pages are not in it"),
    (1, ("gone.pt", "--data", "DATA"), "gone.pt"),
    (2, ("p0.json", "--method", "voting"), "add --data"),
    (2, (*DETECTORS, "--threshold", "4"), "--threshold 4.0"),
    (2, (*DETECTORS, "--threshold", "two"), "--threshold"),
    (1, (*DETECTORS, "--best", "2"), "no out-of-fold score"),
    (2, (*DETECTORS, "--weights", "1,1"), "3 positive numbers"),
    (2, (*DETECTORS, "--weights", "1,1,x"), "--weights"),
    (2, (*DETECTORS, "--decide", "0.9", "0.95"), "--decide"),
    (2, (*DETECTORS, "--thresh", "3"), "--thresh: thresh = '3' is not within"),
    (2, (*DETECTORS, "--mode", "circle"), "--mode: mode = 'circle' is not one of polygon, box"),
    (2, ("runs/a-fold1/best.pt", "--scales", "9,x"), "--scales"),
    (2, ("runs/a-fold1/best.pt", "--scales", "9,96"), "--scales: size = 9.0 is not within"),
    (2, (MAPS[0], "other.pt", *MAPS[1:]), "thresh: members decode differently: 0.1 in"),
    (2, (MAPS[0], "kind.pt", *MAPS[1:]), "shrink_ratio: members decode differently"),
    (2, (*MAPS, "--split", "test"), "no labels"),
    (2, (*MAPS, "--sample", "p0.json"), "add --submission"),
    (2, (*MAPS, "--submission", "x.json"), "not a .csv file"),
    (1, ("--validate", "gone.csv"), "gone.csv: no such file"),
    (2, (*DETECTORS, "--hparams", "slip.json"), "key 'box_tresh'; did you mean box_thresh"),
]


@pytest.mark.parametrize("code, flags, words", BAD)
def test_bad_input_is_one_line(run, house, code, flags, words):
    files.write_json("empty.json", {"images": {}})
    files.write_json("slip.json", {"lr": 1e-3, "box_tresh": 0.4})
    box_of = {"words": {"1": {"points": box(0, 0, 9, 9).tolist()}}}
    files.write_json("t9.json", {"images": {"other.png": box_of}})
    for name, value in (("other.pt", {"thresh": 0.2}), ("kind.pt", {"shrink_ratio": 0.5})):
        if name in flags and not (house / name).exists():
            save_member(house / name, data=str(house / "DATA"), **value)
    found, _, err = run(*flags)
    assert found == code and err.count("\n") == 1 and words in err, err


def test_the_script_itself(script, one_line, house):
    result = script("ensemble.py", "--validate", house / "p0.json")
    one_line(result, "p0.json: line 1", "filename,polygons", code=1)
