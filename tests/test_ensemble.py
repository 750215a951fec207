"""Voting, mean maps, gate and submission against closed forms, invariances, round trips."""

import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
import torch
from conftest import run_script, write_picture, write_predictions

import ensemble
import files
import pictures
import predict
import sources
from dbnet import DBNet, save_checkpoint
from ensemble import Member, canonical, read_submission, region_points, submission_regions, vote
from hparams import Hparams
from interval import Sample, Score
from labels import Page, read_competition
from predict import Network, mean_map
from predictions import read_predictions

CPU = torch.device("cpu")
RUNTIME = f"member networks: device cpu (1 threads), float32, torch {torch.__version__}\n"
HP = Hparams(backbone="test_efficientnet", neck=16, size=96, thresh=0.1, box_thresh=0.1)


def box(x, y, w, h):
    return np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], float)


def star(rng, points, centre, radius):
    """A simple polygon: sorted angles, radii between a half and the whole."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, points))
    reach = radius * rng.uniform(0.5, 1, points)
    return centre + reach[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def saw(*polygons, score=0.9):
    """What one member finds on a page."""
    return list(polygons), np.full(len(polygons), score)


def random_members(rng, members=5, words=12):
    """Words on a grid, seen by most members with a shift, some seen twice, and false alarms."""
    corners = [(n % 4 * 60 + 40, n // 4 * 60 + 40) for n in range(words)]
    shapes = [star(rng, rng.integers(4, 61), corner, 25) for corner in corners]
    result = []
    for _ in range(members):
        polygons = [s + rng.normal(0, 1.5, 2) for s in shapes if rng.random() < 0.8]
        polygons += [p + 1 for p in polygons[:2]]
        polygons += [star(rng, 6, rng.uniform(0, 300, 2), 20) for _ in range(2)]
        result.append((polygons, rng.choice((0.5, 0.9), len(polygons))))
    return result


def test_members_that_agree_return_the_member():
    rng = np.random.default_rng(0)
    for k in (1, 2, 3, 5):
        kinds = zip((4, 5, 17, 60), (40, 100, 160, 220))
        polygons = [star(rng, points, (x, y), 24) for points, x in kinds for y in (40, 100)]
        scores = np.sort(rng.random(8))[::-1]
        found, confidences = vote([(polygons, scores)] * k, [1.0] * k, k)
        assert len(found) == 8 and np.allclose(confidences, scores)
        assert all(map(np.array_equal, found, map(canonical, polygons)))


def test_order_of_members_polygons_and_vertices_does_not_matter():
    rng = np.random.default_rng(1)
    for trial in range(10):
        members = random_members(rng)
        members.append(members[trial % 5])  # two equal members, so that there are ties
        weights, mixed = rng.permutation([1.0, 1.5, 0.5, 1.0, 1.0, 1.0]), []
        expected, scores = vote(members, weights, 1.9)
        order = rng.permutation(6)
        for polygons, confidences in (members[k] for k in order):
            inner = rng.permutation(len(polygons))
            turned = [polygons[n][:: rng.choice((1, -1))] for n in inner]
            mixed.append(([np.roll(p, rng.integers(60), 0) for p in turned], confidences[inner]))
        found, confidences = vote(mixed, weights[order], 1.9)
        assert len(found) == len(expected) > 0 and all(map(np.array_equal, found, expected))
        assert np.allclose(confidences, scores)


def test_a_word_is_one_cluster_with_no_member_twice():
    rng = np.random.default_rng(2)
    for _ in range(20):
        members = random_members(rng)
        owner = np.repeat(range(5), [len(p) for p, _ in members])
        overlap = ensemble.overlaps([q for p, _ in members for q in p], owner)
        clusters = ensemble.cluster_words(overlap, owner)
        assert sorted(n for c in clusters for n in c) == list(range(len(owner)))
        assert all(len(set(owner[c])) == len(c) for c in clusters)


def test_members_with_the_page_vote_once_and_by_weight():
    word, none = saw(box(0, 0, 50, 10), score=0.8), saw()
    both = saw(box(0, 0, 50, 10), box(0, 50, 50, 10), score=0.6)
    twice = saw(box(0, 0, 50, 10), box(0.5, 0, 50, 10), box(0, 0.5, 50, 10))
    for members, weights, threshold, expected in (
        ([twice, none, none], [1, 1, 1], 2, []),  # boxes of one member are one vote
        ([twice, word, none], [1, 1, 1], 2, [(0.9 + 0.8) / 3]),
        ([word, both, none], [0.5, 1.0, 1.5], 1.6, []),  # of the word 1.5, of the other 1
        ([word, both, none], [0.5, 1.0, 1.5], 1.5, [(0.4 + 0.6) / 3]),
        ([word, both, none], [0.5, 1.0, 1.5], 1.0, [(0.4 + 0.6) / 3, 0.6 / 3]),
        ([word, word, none], [1, 1, 1], 3, []),  # two of three
        ([word, word, None], [1, 1, 1], 3, [0.8]),  # both of two that have the page
        ([word, None, None], [1, 1, 1], 2, [0.8]),
        ([None, None, none], [1, 1, 1], 2, []),
    ):
        assert vote(members, weights, threshold)[1] == pytest.approx(expected)


def test_the_elected_polygon_is_the_medoid_of_its_word_and_no_mean_of_vertices():
    rng = np.random.default_rng(3)
    for _ in range(20):
        shapes = [box(10, 10, 120, 30) + rng.normal(0, 3, (4, 2)) for _ in range(5)]
        polygons = [np.roll(shape, k, 0) for k, shape in enumerate(shapes)]
        areas = [shapely.Polygon(p) for p in polygons]
        support = [sum(a.intersection(b).area / a.union(b).area for b in areas) for a in areas]
        (elected,), confidence = vote([saw(p) for p in polygons], [1.0] * 5, 5)
        assert np.array_equal(elected, canonical(polygons[int(np.argmax(support))]))
        assert confidence == pytest.approx([0.9])


def page_image(seed=0, height=90, width=70):
    """A page with dark bars on light paper and its labels."""
    rng = np.random.default_rng(seed)
    image = rng.integers(230, 250, (height, width, 3), np.uint8)
    words = [box(8, y, rng.integers(20, 50), 8) for y in range(10, height - 12, 20)]
    for word in words:
        cv2.fillPoly(image, [word.astype(int)], (30, 30, 30))
    return image, words


def tiny_network(seed=0):
    torch.manual_seed(seed)
    return DBNet(HP.backbone, HP.neck).eval()


def network_map(folder, image, *sizes, flip=False):
    write_picture(folder, image=image)
    model = predict.flipped(tiny_network()) if flip else tiny_network()
    network = Network(model, replace(HP, amp="off"), sizes)
    pages = [Page("a.png", folder / "images/a.png")]
    ((_, (prob,)),) = predict.predict_each([network], pages, CPU, lambda page, maps: maps)
    return prob.astype(int)


def test_mean_of_equal_maps_is_the_map():
    prob = np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)
    for weights in ([1.0], [1.0] * 3, [0.7, 1.3], [0.9, 1.3, 0.8]):
        assert np.array_equal(mean_map([prob] * len(weights), weights, prob.shape), prob)
    low, high = np.zeros((4, 4), np.uint8), np.full((8, 8), 200, np.uint8)
    assert (mean_map([low, high], [1.0, 3.0], (4, 4)) == 150).all()


def test_a_mirrored_page_gives_the_mirrored_mean_of_both(tmp_path):
    image, _ = page_image(width=64, height=96)  # no padding, which would lie on the other side
    mirror = np.ascontiguousarray(image[:, ::-1])
    plain = network_map(tmp_path, image, flip=True)
    assert np.abs(network_map(tmp_path, mirror, flip=True)[:, ::-1] - plain).max() <= 1
    own, other = network_map(tmp_path, image), network_map(tmp_path, mirror)[:, ::-1]
    assert np.abs((own + other) / 2 - plain).max() <= 1
    assert np.abs(plain - own).max() > 1  # a network that is not symmetric by itself


@pytest.mark.parametrize("method", ["maps", "voting"])
def test_a_member_and_an_ensemble_of_it_alone_predict_what_evaluate_predicts(tmp_path, method):
    write_picture(tmp_path, image=page_image()[0])
    page, network = Page("a.png", tmp_path / "images/a.png"), Network(tiny_network(), HP)
    source = sources.Source("a", {}, HP, {})
    members = [Member(source, each, "a", "") for each in (network, Network(tiny_network(1), HP))]
    both = ensemble.Ensemble(members, [1.0, 1.0], method, HP, 1, CPU, set())
    (alone, _), (together,) = ensemble.predict_all(both, [page], [[0]])
    ((_, (expected, scores)),) = predict.predict(network, [page], CPU, lambda page, found: found)
    for polygons, confidences in (*alone, *together):
        assert len(scores) and np.allclose(confidences, scores)
        assert all(map(np.allclose, map(canonical, polygons), map(canonical, expected)))


def test_scales_keep_the_networks_own_map_size(tmp_path):
    image, _ = page_image()
    once = network_map(tmp_path, image, 96)
    assert np.array_equal(once, network_map(tmp_path, image, 96, 96)) and once.shape == (96, 75)
    maps = [network_map(tmp_path, image, size).astype(np.uint8) for size in (64, 128)]
    assert [m.shape for m in maps] == [(96, 75)] * 2
    both = network_map(tmp_path, image, 64, 128)
    assert np.abs(both - mean_map(maps, [1, 1], (96, 75))).max() <= 1


def make_run(folder, age, **hp):
    """A run folder that is so many epochs old."""
    files.write_json(folder / "hparams.json", asdict(replace(HP, name=folder.name, **hp)))
    files.replace_file(folder / "log.csv", "epoch\n" + "1\n" * age)


def test_discover_takes_the_one_finished_set_of_a_name_or_says_what_it_found(tmp_path):
    def make(name, *numbers, age=2, folds=3):
        for fold in numbers:
            path, height = tmp_path / f"{name}-fold{fold}", 20.0 + fold  # of its own train pages
            make_run(path, age, epochs=2, folds=folds, fold=fold, text_height=height)

    def fails(words):
        with pytest.raises(files.UsageError, match=words):
            ensemble.discover(tmp_path)

    make("plain", 1, folds=0)
    fails("no set of fold runs is finished .none is there.")
    make("a", 3, 1)
    fails("no set .* finished .*/a-fold.: 2, no, 2 of 2 epochs.; name checkpoints")
    make("a", 2, age=1)
    fails("no set .* finished .*/a-fold.: 2, 1, 2 of 2 epochs")
    make("a", 2)
    make("b", 2)  # of the same values; another name
    make("twin", 1, 2, 3, age=1)
    found = [str(tmp_path / f"a-fold{fold}/last.pt") for fold in (1, 2, 3)]
    assert ensemble.discover(tmp_path) == found
    make("b", 1, 3)
    fails("^2 sets of fold runs are finished, .*/a-fold. and .*/b-fold.: name one$")


def named(name, score=None, **hp):
    hp = replace(HP, **hp)
    source = sources.Source(name, {"scores": {"hmean": score}}, hp, {})
    return Member(source, Network(None, hp), name, "")


def test_members_are_chosen_and_weighted_by_scores_and_decoded_at_the_largest_size(monkeypatch):
    members = [named(n, h) for n, h in zip("abcd", (0.5, 0.8, 0.6, 0.7))]
    choose = ensemble.choose_members
    assert [m.name for m in choose(members, 2, None)[0]] == ["b", "d"]
    assert [m.name for m in choose(members, 3, None)[0]] == ["b", "c", "d"]
    assert choose(members, 4, None) == (members, [1] * 4)
    _, weights = choose(members, 4, "scores")
    assert np.mean(weights) == pytest.approx(1) and weights[1] / weights[0] == pytest.approx(1.6)
    assert choose(members, 4, ensemble.numbers("2,1,1,4"))[1] == [1.0, 0.5, 0.5, 2.0]
    apart = [*members, named("e", size=128)]
    hp, group = ensemble.common_decoding(apart), ensemble.Ensemble
    page, maps = Page("p", None, size=(30, 90)), [np.zeros((9, 3), np.uint8)] * 6
    seen = []
    monkeypatch.setattr(ensemble, "decode_page", lambda prob, *_: seen.append(prob.shape))
    for members in (apart, [*apart, named("f", size=128, fit="area")]):
        together = group(members, [1] * 6, "maps", hp, 0, None, set())
        ensemble.combine(together, page, range(len(members)), maps, None)
    assert seen == [(128, 43), (222, 74)]  # the largest, whatever its fit


def test_weights_of_any_size_have_a_finite_sum():
    members = [named(n, 0.5) for n in "ab"]
    for text, expected in (("1e308,1e308", [1, 1]), ("1.5e308,5e307", [1.5, 0.5])):
        _, weights = ensemble.choose_members(members, 2, ensemble.numbers(text))
        assert weights == pytest.approx(expected)
    maps = [np.full((4, 4), value, np.uint8) for value in (0, 200)]
    _, weights = ensemble.choose_members(members, 2, [1e308, 1e308])
    assert (mean_map(maps, weights, (4, 4)) == 100).all()


def test_decide_tells_only_what_holds_for_the_whole_interval():
    def decide(low, high, pages=6):
        score = Score(1, 1, high, [low, high], Sample("pages", pages, True))
        return ensemble.decide(score, 0.966, 0.965)

    assert decide(0.966, 0.97) == "success"
    assert decide(0.9652, 0.9658) == "acceptable"
    assert decide(0.95, 0.964) == "fall back to hparams/run3.json"
    assert decide(0.9652, 0.967) == "cannot tell: from acceptable to success"
    assert decide(0.95, 0.97).endswith("run3.json to success")
    assert decide(0.97, 0.97, pages=1) == "cannot tell from under 6 pages or groups"


def test_what_the_writer_writes_the_validator_accepts_and_reads_back(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "out.csv"
    names = ["plain.jpg", "with, comma.jpg", 'quo"te.jpg', "한글.png", "no text.jpg"]
    pages = [Page(name, None, size=(600, 400)) for name in names]
    for most in (0, 3, 30, 30, 700):
        found = []
        for count in (*rng.integers(most + 1, size=4), 0):
            kinds = zip(rng.integers(3, 61, count), rng.uniform(-20, 620, (count, 2)))
            polygons = [star(rng, *kind, rng.uniform(0.3, 60)) for kind in kinds]
            found.append((polygons, rng.random(count)))
        ensemble.write_submission(path, pages, found)
        regions, problems = read_submission(path, names, {p.name: p.size for p in pages}, True)
        assert problems == [] and list(regions) == names and regions["no text.jpg"] == []
        for name, one in zip(names, found):
            expected = submission_regions(*one, (600, 400))
            assert len(regions[name]) == len(expected) <= 500
            assert all(map(np.array_equal, regions[name], expected))
    assert path.read_text(encoding="utf-8").startswith("filename,polygons\n")


def test_regions_are_whole_by_confidence_and_unlike():
    polygons = [box(10 * n, 0, 8, 8) for n in range(600)]
    regions = submission_regions(polygons, np.arange(600) / 600, (6000, 10))
    assert len(regions) == 500 and regions[0].min(0).tolist() == [5990, 0]
    same = [box(0, 0, 9, 9), np.roll(box(0.2, 0, 9, 9), 1, 0)[::-1], box(0, 0, 9, 5)]
    assert len(submission_regions(same, [0.1, 0.9, 0.5], (20, 20))) == 2
    assert region_points(box(3, 3, 0.2, 9), (20, 20)) is None
    assert region_points(box(-30, 0, 9, 9), (20, 20)) is None


def test_a_triangle_gets_its_longest_edge_halved():
    points = region_points(np.array([(0, 0), (40, 0), (0, 30)]), (100, 100))
    assert points.tolist() == [[0, 0], [40, 0], [20, 15], [0, 30]]
    rng = np.random.default_rng(0)
    for _ in range(200):
        triangle = np.round(star(rng, 3, (50, 50), 40)).astype(int)
        points = region_points(triangle, (100, 100))
        corners = {*map(tuple, triangle)}
        assert points is None or len(points) == 4 and corners < {*map(tuple, points)}


SQUARE, OTHER = "0 0 9 0 9 9 0 9", "20 0 29 0 29 9 20 9"
GOOD = f"filename,polygons\na.jpg,{SQUARE}|{OTHER}\nb.jpg,\n"
SQUARES = [f"{x} {y} {x + 1} {y} {x + 1} {y + 1} {x} {y + 1}" for x in range(50) for y in range(10)]
DAMAGE = {
    "header": (GOOD.replace("polygons", "polygon"), "line 1", "filename,polygons"),
    "no header": (GOOD.split("\n", 1)[1], "line 1", "header"),
    "bom": ("\ufeff" + GOOD, "line 1", "a byte order mark before the header"),
    "nothing": ("", "line 1", "header"),
    "not text": (GOOD + "\udcff\udcfe,\n", "bad.csv: not text in UTF-8"),
    "float": (GOOD.replace("29 9", "29.0 9"), "line 2: a.jpg: region 2", "29.0 9"),
    "exponent": (GOOD.replace("29 9", "1e3 9"), "line 2: a.jpg: region 2", "1e3 9"),
    "two spaces": (GOOD.replace("9 0 9 9", "9 0  9 9"), "region 1", "one space between"),
    "other digits": (GOOD.replace("0 0 9", "٠ 0 9"), "region 1", "whole numbers"),
    "odd": (GOOD.replace("20 9\n", "20\n"), "region 2", "7 numbers"),
    "triangle": (GOOD.replace(" 0 9|", "|"), "region 1", "6 numbers"),
    "negative": (GOOD.replace("0 9|", "-1 9|"), "region 1", "leaves the page"),
    "outside": (GOOD.replace("29 9", "101 9"), "region 2", "leaves the page 100x50"),
    "line": (GOOD.replace(SQUARE, "0 0 3 0 6 0 9 0"), "region 1", "no area"),
    "twice": (GOOD.replace(OTHER, "9 9 9 0 0 0 0 9"), "region 2", "is there already"),
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


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_found(tmp_path, kind):
    text, *words = DAMAGE[kind]
    path, names = tmp_path / "bad.csv", ["a.jpg", "b.jpg"]
    path.write_bytes(text.encode(errors="surrogateescape"))
    try:
        problems = read_submission(path, names, {"a.jpg": (100, 50), "b.jpg": None}, True)[1]
    except files.DataError as error:
        problems = [str(error)]
    assert all(word in problems[0] for word in words) and len(problems[0]) < 300, problems
    assert len(problems) == 1 or kind in ("fields", "comma", "empty line")


def save_member(path, weights=0, held=(), trained=(), **hp):
    """A checkpoint that held out the pages at some paths and trained on others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {"hmean": 0.5 + weights / 100, "pages": {page.name: 0.5 for page in held}}
    digests = [[pictures.picture_digest(page) for page in pages] for pages in (trained, held)]
    scores["digests"] = digests[1]
    origin = dict(zip(("trained", "chosen"), digests)) | {"unknown": []}
    state = {"model": tiny_network(weights).state_dict(), "hparams": asdict(replace(HP, **hp))}
    save_checkpoint(path, {**state, "scores": scores, "origin": origin, "epoch": 1})


def write_found(path, found):
    """Labels or predictions: found is {page name: (polygons, scores)}."""
    pages = (Page(name, None, size=(70, 90)) for name in found)
    write_predictions(path, pages, found.values())


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """DATA with train (4), val (6), test (3, no labels) pages; two fold runs; detectors p0 to p2:
    each finds the words of val, p2 but the first of a page, and one false alarm of its own."""
    root = tmp_path_factory.mktemp("house")
    folder = root / "DATA"
    for split, count in (("train", 4), ("val", 6), ("test", 3)):
        found = {}
        for n in range(count):
            image, words = page_image(10 * count + n)
            write_picture(folder, f"{split}{n}.png", image)
            found[f"{split}{n}.png"] = saw(*words if split != "test" else (), score=1)
        write_found(folder / f"{split}.json", found)
    pages = [folder / f"images/train{n}.png" for n in range(4)]
    for fold in (1, 2):
        run, hp = root / f"runs/a-fold{fold}", {"data": str(folder), "folds": 2, "fold": fold}
        save_member(run / "last.pt", fold, pages[fold - 1 :: 2], pages[2 - fold :: 2], **hp)
        make_run(run, HP.epochs, **hp)
    save_member(root / "thresh.pt", data=str(folder), thresh=0.2)
    save_member(root / "ratio.pt", 3, data=str(folder), shrink_ratio=0.5)
    val = read_predictions(folder / "val.json")
    for k in range(3):
        alarm = box(58, 5 + 30 * k, 10, 10)
        found = {name: saw(*words[k // 2 :], alarm) for name, (words, _) in val.items()}
        write_found(root / f"p{k}.json", found)
    write_found(root / "empty.json", {})
    for name in ("other", "val0"):
        write_found(root / f"{name}.json", {f"{name}.png": saw(box(0, 0, 9, 9))})
    files.write_json(root / "slip.json", {"lr": 1e-3, "box_tresh": 0.4})
    return root


@pytest.fixture
def run(house, monkeypatch, capsys):
    """run(*flags) in the house -> out and err; the exit code is as expected."""
    monkeypatch.chdir(house)

    def call(*flags, code=0):
        with pytest.raises(SystemExit) as stop:
            sys.exit(ensemble.main([str(flag) for flag in flags]))
        assert stop.value.code == code, flags
        return capsys.readouterr()

    return call


FOLDS = "runs/a-fold1/last.pt", "runs/a-fold2/last.pt"
MAPS = FOLDS[0], "--data", "DATA"
VOTING = "--method", "voting", "--data", "DATA"
DETECTORS = "p0.json", "p1.json", "p2.json", *VOTING


def test_voting_removes_what_only_one_detector_sees(run):
    out, err = run(*DETECTORS, "--decide", 0.966, 0.965)
    assert err.count("warning: ") == out.count("without p") == 3
    assert err.count("weight 1.0000, recorded hmean none\n") == err.count("member p") == 3
    assert "decision by the ensemble's score alone: success" in out
    result = json.loads(run(*DETECTORS, "--json").out)
    assert result["hmean"] == 1 and result["gate"]["verdict"] == "better"
    assert [one["hmean"] == 1 for one in result["leave_one_out"]] == [False, False, True]
    difference = 1 - max(m["hmean"] for m in result["members"])
    assert result["gate"]["difference"] == pytest.approx(difference) and difference > 0
    low, high = result["gate"]["interval"]
    assert 0 < low <= difference <= high + 1e-12


def test_few_pages_or_what_is_not_better_cannot_open_the_gate(run):
    val = read_predictions("DATA/val.json")
    for pages, code in ((1, 5), (5, 5), (6, 0)):
        write_found("DATA/few.json", dict([*val.items()][:pages]))
        run(*DETECTORS[:-1], "DATA/few.json", code=code)
    files.write_json("same.json", files.read_json("p0.json"))  # as good, by other bytes
    assert "not shown to be better" in run("p0.json", "same.json", *VOTING, code=5).out
    out = run(*DETECTORS, "--votes", 1, code=5).out  # all false alarms
    assert run(*DETECTORS, "--threshold", 1, code=5).out == out  # its older name
    assert "not shown to be better, vs the best member p1.json" in out and "worse" not in out
    assert "that member is the best on these same pages: the difference is rather too small" in out


def test_no_arguments_take_the_folds_and_the_pages_outside_them(run):
    out, err = run(code=5)  # untrained networks do not vote better
    says = (f"member {m}: weight 1.0000, recorded hmean 0.5{k}00\n" for k, m in enumerate(FOLDS, 1))
    assert err == "".join(says) + RUNTIME and "ensemble by maps of 2" in out and "6 pages" in out


def test_members_are_named_with_weights_and_scores_and_none_votes_twice(run):
    err = run(*FOLDS, "--data", "DATA", "--weights", "1,3", code=5).err
    assert f"member {FOLDS[1]}: weight 1.5000, recorded hmean 0.5200\n" in err
    out, err = run(*FOLDS, "--data", "DATA", "--best", "1", "--json")
    assert f"member {FOLDS[0]}: left out, recorded hmean 0.5100\n" in err
    (only,) = json.loads(out)["members"]
    assert (only["name"], only["weight"]) == (FOLDS[1], 1)
    # as another file, of another epoch, in half precision as --export writes it
    state = torch.load(FOLDS[0], weights_only=True)
    half = {key: v.half() if v.ndim > 1 else v for key, v in state["model"].items()}
    same = {"best": {"epoch": 9}, "half": {"model": half}, "ema": {"model": {}, "ema": half}}
    for name, change in same.items():
        save_checkpoint(f"{name}.pt", state | change)
        err = run(*FOLDS, f"{name}.pt", "--data", "DATA", code=2).err
        words = f"error: {name}.pt: the same as {FOLDS[0]}; it would vote twice\n"
        assert err == words


def test_pages_that_a_member_trained_on_are_refused(run, house):
    pages = [house / f"DATA/images/train{n}.png" for n in range(4)]
    out, err = run(*FOLDS, "--data", "DATA", "--split", "train", code=1)
    assert out == "" and "outside all folds" in err
    assert (
        err.count("epoch chosen on 2 of these") == err.count("trained on 2 of these 4 pages") == 2
    )
    # so are they where another ancestor is not known
    state = torch.load(FOLDS[0], weights_only=True)
    save_checkpoint("child.pt", state | {"origin": state["origin"] | {"unknown": ["gone.pt"]}})
    out, err = run("child.pt", FOLDS[1], "--data", "DATA", "--split", "train", code=1)
    assert out == "" and "child.pt: pages that gone.pt trained on" in err
    assert "child.pt: trained on 2 of these 4 pages" in err and "outside all folds" in err
    # a copy under another name is the same page, and the run's own data may be gone
    save_member(house / "moved.pt", trained=pages, data="gone")
    (house / "images").mkdir()
    shutil.copy(pages[1], "images/copy.png")
    write_found("copy.json", {"copy.png": saw(box(8, 10, 40, 8), score=1)})
    err = run(FOLDS[1], "moved.pt", "--data", "copy.json", code=1).err
    assert "trained on 1 of these 1 pages (first: copy.png)" in err
    # replicas of one fold may judge on the pages that both held out
    save_member(house / "replica.pt", 7, pages[::2], pages[1::2], folds=2, seed=1)
    write_found("DATA/one.json", {page.name: saw(box(8, 10, 40, 8)) for page in pages[::2]})
    out, err = run(FOLDS[0], "replica.pt", "--data", "DATA/one.json", code=5)
    assert "2 pages" in out and err.count("epoch chosen on 2 of these 2 pages") == 2
    lines = [line for line in out.splitlines() if "over 2 pages" in line]
    assert len(lines) == 6 and all("in sample: epoch chosen on 2 of them" in s for s in lines)
    # and the pages whose scores weigh them, or that chose the thresholds
    digests = ",".join(pictures.picture_digest(page) for page in pages[:2])
    files.write_json("tuned.json", {"thresh": 0.1, "tuned": digests})
    flags = FOLDS[0], "replica.pt", "--data", "DATA/one.json", "--weights", "scores"
    words = (
        "epoch chosen on 2 of them, thresholds chosen on 1 of them, members chosen or weighed by"
    )
    assert words in run(*flags, "--hparams", "tuned.json", code=5).out
    result = json.loads(run(*flags, "--json", code=5).out)
    assert result["in_sample"] == {"chosen": 2, "scored": 2}
    assert all("scores on 2 of them" in result[k]["over"] for k in ("micro", "iou50", "gate"))
    assert "scored" not in json.loads(run(*flags[:4], "--json", code=5).out)["over"]
    # an older checkpoint does not tell
    state = torch.load(FOLDS[0], weights_only=True)
    save_checkpoint("older.pt", {key: state[key] for key in ("model", "hparams", "scores")})
    err = run("older.pt", "--data", "DATA", "--split", "train").err
    assert "pages that older.pt trained on, and that chose its epoch, are not known" in err


def test_a_test_set_becomes_a_submission_in_the_order_of_the_sample(run):
    names, sample = ["test2.png", "test0.png", "test1.png"], ("--sample", "sample.csv")
    files.replace_file("sample.csv", "filename,polygons\n" + ",\n".join([*names, ""]))
    more = "--flip", "--scales", "64,96", "--submission", "out.csv"
    err = run(*MAPS, *sample, *more).err
    assert err.splitlines()[2:] == ["out.csv: 3 pages, 3 regions found"]
    regions, problems = read_submission("out.csv", names, {}, True)
    assert problems == [] and sum(map(len, regions.values()))
    beside = read_competition("out.json", need_pictures=False)
    assert [p.name for p in beside] == names and beside[0].size == (70, 90)
    assert all(0 < c < 1 for p in beside for c in p.confidences)
    assert "3 pages" in run("--validate", "out.csv", "--data", "DATA", *sample).out
    # the pictures alone do as well: no labels, names from the sample or from the folder
    run(*MAPS[:-1], "DATA/images", *sample, "--submission", "b.csv")
    run(*MAPS[:-1], "DATA/images", "--out", "c.json")
    assert len(read_predictions("c.json")) == 13
    # without a test split it is said which one is taken
    files.replace_file("OTHER/val.json", Path("DATA/val.json").read_text())
    Path("OTHER/images").symlink_to("../DATA/images")
    err = run(FOLDS[0], "--data", "OTHER", "--submission", "d.csv").err
    assert "warning: OTHER: no test split, val is taken\n" in err


def test_a_sample_may_have_a_byte_order_mark(run):
    text = "filename,polygons\ntest2.png,\ntest0.png,\n"
    Path("bom.csv").write_bytes(("\ufeff" + text).encode())
    run(*MAPS, "--sample", "bom.csv", "--submission", "e.csv")
    assert list(read_submission("e.csv", None, {}, False)[0]) == ["test2.png", "test0.png"]
    err = run("--validate", "bom.csv", code=1).err
    assert "bom.csv: line 1: a byte order mark before the header; save without it" in err


def test_names_that_look_alike_are_told_apart(run):
    composed, parted = "émile.png", "e\u0301mile.png"
    for name, file in ((composed, "nfc.csv"), (parted, "nfd.csv")):
        Path(file).write_text(f"filename,polygons\n{name},\n")
    alike = f"two names that look alike: {composed!a} and {parted!a}, rename one"
    err = run("--validate", "nfd.csv", "--sample", "nfc.csv", code=1).err
    assert f"nfd.csv: 1 pages have no row (first: {composed}); {alike}" in err
    Path("ALIKE").mkdir()
    shutil.copy("DATA/images/val0.png", f"ALIKE/{parted}")
    flags = "--data", "ALIKE", "--sample", "nfc.csv", "--submission", "alike.csv"
    err = run(FOLDS[0], *flags, code=1).err
    assert f"nfc.csv: 1 pages not in ALIKE: {composed}; {alike}" in err


def test_no_output_replaces_labels_members_or_what_nobody_named(run):
    shutil.copytree("DATA", "LAB")
    Path("keepme.json").write_text('{"images": {}}')
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    lab, here = ("--method", "voting", "--data", "LAB"), ("p0.json", "p1.json", *VOTING)
    write_found("t0.json", {f"test{n}.png": saw(box(9, 9, 30, 9)) for n in range(3)})
    for flags, words in (
        (("t0.json", *lab, "--submission", "LAB/test.csv"), "LAB/test.json: is read by this"),
        (("t0.json", *lab, "--submission", "t0.csv"), "t0.json: is read by this command"),
        (("t0.json", *lab, "--submission", "keepme.csv"), "keepme.json: exists, and no flag names"),
        ((*here, "--out", "p0.json"), "p0.json: is read by this command; write to another file"),
        ((*here, "--out", "./DATA/../DATA/val.json"), "DATA/val.json: is read by this command"),
        ((*here, "--out", "DATA/images/val0.png"), "val0.png: not a .json or .jsonl file"),
    ):
        err = run(*flags, code=2).err
        assert words in err and len(err.splitlines()) <= 3, err
    assert all(path.read_bytes() == raw for path, raw in before.items())
    run("t0.json", *lab, "--submission", "keepme.csv", "--out", "keepme.json")
    assert read_predictions("keepme.json").keys() == {f"test{n}.png" for n in range(3)}


def test_a_detector_without_some_pages_abstains_or_is_refused(run):
    found = {f"test{n}.png": saw(box(9, 9, 30, 9)) for n in range(3)}
    write_found("t0.json", found)
    write_found("t1.json", {"test0.png": saw(box(9, 9, 30, 9))})
    err = run("t0.json", "t1.json", *VOTING, "--split", "test", "--out", "both.json").err
    assert "t1.json: 2 of 3 pages are not in it" in err
    both = read_predictions("both.json")
    assert {name: len(polygons) for name, (polygons, _) in both.items()} == dict.fromkeys(found, 1)


def test_a_page_that_no_detector_has_seen_is_not_one_without_text(run):
    write_found("t0.json", {f"test{n}.png": saw(box(9, 9, 30, 9)) for n in range(2)})
    write_found("t1.json", {"test0.png": saw(box(9, 9, 30, 9))})
    flags = *VOTING, "--split", "test", "--out", "unseen.json", "--submission", "unseen.csv"
    err = run("t0.json", "t1.json", *flags, code=1).err
    last = err.splitlines()[-1]
    assert last == "error: test2.png: no member has predicted it; add predictions of it"
    assert not Path("unseen.json").exists() and not Path("unseen.csv").exists()


def test_detectors_vote_on_pictures_without_labels_as_on_labelled_ones(run):
    Path("PICTURES").mkdir()
    for picture in Path("DATA/images").glob("val*"):
        shutil.copy(picture, "PICTURES")
    voters = "p0.json", "p1.json", "--method", "voting"
    run(*voters, "--data", "PICTURES", "--out", "plain.json")
    run(*voters, "--data", "DATA", "--out", "labelled.json")
    plain = files.read_json("plain.json")
    assert len(plain["images"]) == 6 and plain == files.read_json("labelled.json")


def test_a_region_off_a_page_is_found_where_only_the_picture_tells_its_size(run):
    Path("ONE").mkdir()
    shutil.copy("DATA/images/val0.png", "ONE")
    files.replace_file("off.csv", "filename,polygons\nval0.png,1 1 900 1 900 9 1 9\n")
    out, err = run("--validate", "off.csv", "--data", "ONE", code=1)
    assert "1 errors" in out and "val0.png: region 1 leaves the page" in err

    # a picture that cannot be read hides no other fault
    Path("ONE/a.png").write_bytes(b"no picture")
    Path("ONE/b.png").write_bytes(b"no picture")
    out, err = run("--validate", "off.csv", "--data", "ONE", code=1)
    assert "4 errors" in out and "val0.png: region 1 leaves the page" in err
    assert "ONE/a.png: not a picture" in err and "ONE/b.png: not a picture" in err


def test_a_sample_without_pages_is_refused(run):
    """A submission for it was a traceback."""
    files.replace_file("none.csv", "filename,polygons\n")
    files.replace_file("one.csv", "filename,polygons\na.jpg,1 1 9 1 9 9 1 9\n")
    sample = "--sample", "none.csv"
    for flags in (("--validate", "one.csv"), (*MAPS, "--submission", "none-out.csv")):
        err = run(*flags, *sample, code=1).err
        assert "error: none.csv: no page, an empty line or a page twice among its 0 rows\n" in err
    assert not Path("none-out.csv").exists() and not Path("none-out.json").exists()


def test_an_empty_submission_is_an_error_and_allowed_by_a_flag(run):
    files.replace_file("blank.csv", "filename,polygons\na.jpg,\n")
    out, err = run("--validate", "blank.csv", code=1)
    assert "1 pages, 0 regions, 1 errors" in out
    assert err == "error: blank.csv: no page has a region; --allow-empty accepts that\n"
    assert run("--validate", "blank.csv", "--allow-empty").err == ""
    files.replace_file("wrong.csv", "filename,polygons\na.jpg,1 2\n")
    run("--validate", "wrong.csv", "--allow-empty", code=1)


def test_pages_that_are_not_there_are_found_before_a_checkpoint_is_loaded(run, monkeypatch):
    monkeypatch.setattr(ensemble, "load_member", None)
    for data in ("nowhere", "p0"):
        run(*FOLDS, "--data", data, code=2)


def test_a_checkpoint_is_loaded_once(run, monkeypatch):
    paths, load = [], sources.load_checkpoint
    monkeypatch.setattr(sources, "load_checkpoint", lambda path: paths.append(path) or load(path))
    run(*FOLDS, "--data", "DATA", "--weights", "scores", code=5)
    assert paths == [*FOLDS]


def test_help_does_not_name_defaults_of_training(capsys):
    with pytest.raises(SystemExit, match="0"):
        ensemble.main(["--help"])
    shown = capsys.readouterr().out
    values = shown.partition("default: the checkpoints'")[2]
    assert "--thresh THRESH" in values and not re.search("--[a-z-]+ [0-9]", values)


BAD = [
    (2, (*MAPS, "--allow-empty"), "--allow-empty: only with --validate"),
    (2, ("p0.json", "--data", "DATA"), "no maps; use --method voting"),
    (2, ("p0.json", "p0.json", *VOTING), "p0.json: the same as p0.json; it would vote twice"),
    (1, ("empty.json", *VOTING), "empty.json: 6 of 6 pages are not in it"),
    (2, ("gone.json", *VOTING), "gone.json: no such file"),
    (1, ("other.json", *VOTING), "6 of 6 pages are not in it"),
    (1, ("p0.json", "val0.json", *VOTING), "val0.json: 5 of 6 pages are not in it"),
    (2, ("gone.pt", "--data", "DATA"), "gone.pt"),
    (2, ("p0.json", "--method", "voting"), "add --data"),
    (2, (*DETECTORS, "--threshold", "4"), "--votes 4.0"),
    (2, (*DETECTORS, "--votes", "two"), "--votes"),
    (2, (*MAPS, "--votes", "1"), "--votes: only with --method voting; leave it out"),
    (2, (*DETECTORS, "--device", "cpu"), "--device: only with a checkpoint"),
    (2, (*FOLDS, "--data", "nowhere"), "nowhere: no such folder"),
    (2, (*DETECTORS, "--flip"), "--flip: only with a checkpoint"),
    (2, (*DETECTORS, "--box-thresh", "0"), "--box-thresh: only with a checkpoint"),
    (2, (FOLDS[0], "--split", "train"), "--split: only with --data"),
    (2, (*MAPS, "--engine", "onnxruntime", "--amp", "bf16"), "--amp: onnxruntime computes in"),
    (2, (*MAPS, "--best", "1", "--drop-worst"), "--drop-worst: not with --best"),
    (2, ("--validate", "p0.json", "--best", "1"), "--best: not with --validate"),
    (2, (FOLDS[0], "--validate", "p0.json"), "--validate: not with members; leave it out"),
    (
        2,
        (*MAPS, "--split", "test", "--out", "o.json", "--json"),
        "--json: the pages have no labels",
    ),
    (2, (*DETECTORS, "--decide", "96.6", "96.5"), "--decide 96.6 96.5: .*write 0.966"),
    (1, (*DETECTORS, "--best", "2"), "p0.json: no out-of-fold score"),
    (2, (*DETECTORS, "--best", "4"), "4 of 3 members"),
    (2, (*DETECTORS, "--weights", "1,1"), "3 positive numbers"),
    (2, (*DETECTORS, "--weights", "1,1,0"), "3 positive numbers"),
    (2, (*DETECTORS, "--weights", "1,1,nan"), "3 positive numbers"),
    (2, (*DETECTORS, "--weights", "1,1,x"), "--weights"),
    (2, (*DETECTORS, "--decide", "0.9", "0.95"), "--decide"),
    (2, (*MAPS, "--thresh", "3"), "--thresh: thresh = 3.0 is not within"),
    (2, (*MAPS, "--mode", "circle"), "--mode: mode = 'circle' is not one of polygon, box"),
    (2, (FOLDS[0], "--scales", "9,x"), "--scales"),
    (2, (FOLDS[0], "--scales", "9,96"), "--scales: size = 9.0 is not within"),
    (2, ("thresh.pt", *MAPS), "thresh: .*0.2 in thresh.pt, 0.1 in runs.*; .*--thresh"),
    (2, ("ratio.pt", *MAPS), "shrink_ratio: members decode differently.*--method voting"),
    (2, (*MAPS, "--split", "test"), "no labels"),
    (2, (*MAPS, "--sample", "p0.json"), "--sample: only with --submission"),
    (2, (*MAPS, "--submission", "x.json"), "not a .csv file"),
    (2, ("--validate", "gone.csv"), "gone.csv: no such file"),
    (2, (*MAPS, "--hparams", "slip.json"), "key 'box_tresh'; did you mean box_thresh"),
]


@pytest.mark.parametrize("code, flags, words", BAD)
def test_bad_input_is_one_line(run, code, flags, words):
    err = [line for line in run(*flags, code=code).err.splitlines() if line[:7] != "member "]
    assert len(err) == 1 and re.search(words, err[0]), err


def test_the_script_itself(tmp_path, one_line, house):
    result = run_script("ensemble.py", "--validate", house / "slip.json", cwd=tmp_path)
    one_line(result, "slip.json: line 1", "filename,polygons", code=1)
