"""Which labels are wrong: each kind on drawn pages with perfect maps, habits, files, training."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NETWORK as NETWORK_FLAGS
from conftest import error_line, write_labels, write_picture

import audit
import cleval
import data
import dbnet
import evaluate
import labels
import looks
import mistakes
import train
import trees
from files import DataError
from hparams import Hparams
from sources import Source
from synth import synthetic_page
from targets import make_targets

NETWORK = "mobilenetv3_small_050", 64, "none"
HP = Hparams(backbone=NETWORK[0], neck=64, thresh=0.3, box_thresh=0.3, unclip_ratio=0.0)
COUNT = 10
PLAN = audit.Plan(mistakes.KINDS, share=0.3, rounds=3, seed=0)


def perfect_map(polygons, size):
    """The map of a network that knows the true labels."""
    shrink = make_targets(polygons, [False] * len(polygons), size[1], size[0])[0]
    return shrink * np.uint8(255)


@pytest.fixture(scope="module", autouse=True)
def few_trees():
    """Drawn pages need fewer of them than real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "ROUNDS", 15)
        patch.setattr(audit, "FOLDS", 2)
        yield


@pytest.fixture(scope="module")
def drawn():
    """Drawn pages with true labels, and their perfect maps."""
    pages, maps = [], []
    for k in range(COUNT):
        image, words = synthetic_page((5, k), size=480, words=60, difficulty=0.0, unit="line")
        page = labels.Page(f"{k}.png", image, size=image.shape[1::-1])
        for n, word in enumerate(words):
            page.add(n, np.array(word["points"], float), word["transcription"])
        pages.append(page)
        maps.append(perfect_map(page.polygons, page.size))
    return pages, maps


def with_mistakes(pages, kinds, share, seed=0):
    """Copies of pages with mistakes, and what these are, by page."""
    wrong, truth = [], []
    for k, page in enumerate(pages):
        rng = np.random.default_rng((7, seed, k))
        count = round(share * len(page.polygons))
        made = mistakes.make_mistakes(rng, page.polygons, page.ignore, page.size, count, kinds)
        other = labels.Page(page.name, page.path, size=page.size)
        for n, (polygon, skip) in enumerate(zip(made.polygons, made.ignore)):
            other.add(n, polygon, None, skip)
        wrong.append(other)
        truth.append(made)
    return wrong, truth


def read(pages, maps, seed=0):
    plan = PLAN._replace(seed=seed)
    return [audit.read_page(page, prob, HP, plan) for page, prob in zip(pages, maps)]


def find(pages, maps):
    readings = read(pages, maps)
    verdicts = audit.judge(readings, PLAN.kinds)
    suspects = audit.find_suspects(readings, verdicts)
    return suspects, audit.summarise(readings, verdicts, suspects)


def is_true(suspect, made):
    """Whether a suspect is one of the mistakes that were made on its page."""
    if suspect.kind == "missing":
        bare = [outline for kind, outline in made.bare if kind == "missing"]
        return bool(bare) and cleval.shared_areas([suspect.points], bare, None).shared.any()
    return all(made.kinds[n] == suspect.kind for n in suspect.labels)


@pytest.fixture(scope="module")
def found(drawn):
    """Suspects of pages with six kinds of mistakes, and the truth by page."""
    pages, maps = drawn
    wrong, truth = with_mistakes(pages, mistakes.KINDS, 0.15)
    suspects, summary = find(wrong, maps)
    return suspects, summary, {page.name: made for page, made in zip(wrong, truth)}


def test_pages_without_mistakes_have_no_suspect_above_a_half(drawn):
    suspects, summary = find(*drawn)
    assert [s for s in suspects if s.probability > 0.5] == []
    assert summary.rows[-1][2] < 0.02 * sum(len(page.polygons) for page in drawn[0])


@pytest.mark.parametrize("kind", mistakes.KINDS)
def test_mistakes_of_each_kind_are_found_and_the_rest_is_left_alone(found, kind):
    suspects, _, truth = found
    made = sum(page.kinds.count(kind) for page in truth.values())
    if kind == "missing":
        made = sum(k == kind for page in truth.values() for k, _ in page.bare)
    made //= 2 if kind == "split" else 1
    assert made >= 5
    first = [s for s in suspects if s.kind == kind][:made]
    right = [s for s in first if is_true(s, truth[s.page.name])]
    assert len(right) >= 0.75 * made


def test_probabilities_of_suspects_are_shares_of_true_ones(found):
    suspects, _, truth = found
    right = np.array([is_true(s, truth[s.page.name]) for s in suspects])
    chances = np.array([s.probability for s in suspects])
    assert abs(chances.sum() - right.sum()) < 0.35 * right.sum()
    assert right[chances > 0.8].mean() > 0.8


def test_suspects_come_best_first_and_once_a_label(found):
    suspects, summary, truth = found
    chances = [s.probability for s in suspects]
    assert chances == sorted(chances, reverse=True)
    places = [(s.page.name, n) for s in suspects for n in s.labels]
    assert len(places) == len(set(places))
    made = sum(len(page.bare) for page in truth.values())
    kind, _, count, low, high = summary.rows[-1]
    assert kind == "in all" and low <= count <= high and count > made


def test_proposals_lie_where_text_is(found, drawn):
    true_labels = {page.name: page.polygons for page in drawn[0]}
    for suspect in found[0]:
        if suspect.kind not in ("missing", "moved", "split") or suspect.probability < 0.5:
            continue
        if not is_true(suspect, found[2][suspect.page.name]):
            continue
        (outline,) = suspect.proposals
        areas = cleval.shared_areas([outline], true_labels[suspect.page.name], None)
        assert (areas.shared / areas.union).max() > 0.6


def test_labels_without_an_area_may_lie_off_the_page(drawn):
    """The hull of such a label is a line, and no polygon has two points."""
    pages, maps = copy.deepcopy(drawn[0][:4]), drawn[1][:4]
    for page in pages:
        for n in range(4):
            y = 10.0 + 40 * n
            page.add(f"line {n}", np.array([[-90, y], [-10, y], [-50, y]]))
            page.add(f"dot {n}", np.array([[-5, y]] * 3))
    suspects, _ = find(pages, maps)
    assert any(s.labels and s.page.ids[s.labels[0]].startswith("line") for s in suspects)
    outlines = [outline for s in suspects for outline in (s.points, *s.proposals)]
    assert min(map(len, outlines)) >= 3


def test_the_seed_decides(drawn):
    first, again, other = (read(drawn[0][:2], drawn[1], seed)[1].examples for seed in (0, 0, 1))
    for kind, rows in first.items():
        np.testing.assert_array_equal(rows, again[kind])
    assert any(not np.array_equal(rows, other.get(kind)) for kind, rows in first.items())


def test_what_a_labeller_always_does_is_no_suspect(drawn):
    pages, maps = drawn
    pages = copy.deepcopy(pages)
    for page in pages[:8]:
        for n, polygon in enumerate(page.polygons[:6]):  # long thin rules, on which no text is
            left, bottom = polygon[:, 0].min(), polygon[:, 1].max() + 1
            rule = np.array([[left, bottom], [left + 90, bottom]])
            page.add(f"rule {n}", np.concatenate([rule, rule[::-1] + (0, 2)]))
    suspects, _ = find(pages[:8], maps)
    likely = [s for s in suspects if s.probability > 0.5 and s.kind == "spurious"]
    assert len(likely) <= 2


def test_text_that_a_labeller_always_leaves_out_is_known_by_its_place(drawn):
    """Words as others, but far below the rest of each page: only dropped labels are missing."""
    pages, maps = drawn
    wrong, truth = with_mistakes(pages, ("missing",), 0.1)
    lower = []
    for page, prob in zip(wrong, maps):
        page.size = (page.size[0], page.size[1] + 150)
        word = page.polygons[0] - page.polygons[0].min(0)
        stamp = perfect_map([word + (20, 90)], (page.size[0], 150))
        lower.append(np.concatenate([prob, stamp]))
    suspects, _ = find(wrong, lower)
    of_page = {page.name: made for page, made in zip(wrong, truth)}
    likely = [s for s in suspects if s.probability > 0.5 and s.kind == "missing"]
    assert len(likely) > 10
    assert all(is_true(s, of_page[s.page.name]) for s in likely)


def test_a_map_that_shows_nothing_proves_nothing(drawn):
    """Right and wrong labels look alike on it, but for a few of a rare shape."""
    pages, maps = drawn
    suspects, _ = find(pages[:4], [np.zeros_like(prob) for prob in maps[:4]])
    assert len([s for s in suspects if s.probability > 0.5]) <= 3


# ---------------------------------------------------------------- scales


def two_normals(rng, gap, count):
    """Log odds, but for a constant, of 4000 things from N(0, 1) and others from N(gap, 1), and of
    600 examples."""
    things = np.concatenate([rng.normal(0, 1, 4000), rng.normal(gap, 1, count)])
    return gap * things, gap * rng.normal(gap, 1, 600)


def test_probabilities_are_shares_of_a_mixture():
    things, examples = two_normals(np.random.default_rng(0), 4, 100)
    is_class = np.arange(4100) >= 4000
    scale = trees.make_scale(things, examples, 0, 4100)
    assert 80 < scale.count < 120
    chances = scale.probabilities(things)
    np.testing.assert_allclose(chances.sum(), scale.count, rtol=0.02)
    truth = 1 / (1 + 40 * np.exp(8 - things))  # by the densities and shares
    assert np.abs(chances - truth).max() < 0.2
    assert is_class[chances > 0.8].mean() > 0.9


def test_shares_that_the_trees_saw_change_no_probability():
    things, examples = two_normals(np.random.default_rng(1), 3, 60)
    chances = trees.make_scale(things, examples, 0, 4060).probabilities(things)
    scale = trees.make_scale(things - 7, examples - 7, 0, 4060)
    np.testing.assert_allclose(scale.probabilities(things - 7), chances, atol=1e-6)


def test_scores_that_are_too_flat_or_too_steep_are_mended():
    things, examples = two_normals(np.random.default_rng(0), 4, 100)
    truth = 1 / (1 + 40 * np.exp(8 - things))  # by the densities and shares
    for times in (0.5, 1.25):
        scale = trees.make_scale(times * things, times * examples, 0, 4100)
        assert scale.slope > 1 if times < 1 else scale.slope < 1
        assert np.abs(scale.probabilities(times * things) - truth).max() < 0.15


def test_counts_are_right_on_average():
    """The lowest of many bounds alone is too low."""
    counts = []
    for seed in range(60):
        things, examples = two_normals(np.random.default_rng(seed), 4, 60)
        counts.append(trees.make_scale(things, examples, 0, 4060).count)
    assert abs(np.mean(counts) - 60) < 1.5


def test_things_without_any_of_the_class_have_no_probability():
    things, examples = two_normals(np.random.default_rng(2), 6, 0)
    assert trees.make_scale(things, examples, 0, 4000).probabilities(things).max() < 0.05


def test_mistakes_that_nothing_shows_count_too():
    things, examples = two_normals(np.random.default_rng(0), 6, 50)  # and 50 unseen
    scale = trees.make_scale(things, examples, 600, 4100)
    assert 80 < scale.count * scale.weight < 120


def test_trees_learn_what_no_single_feature_tells():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 4))
    is_class = (features[:, 0] > 0) & (features[:, 2] > 0)
    model = trees.fit_trees(features[:1000], is_class[:1000])
    right = (trees.tree_scores(model, features[1000:]) > 0) == is_class[1000:]
    assert right.mean() > 0.95


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_what_they_are_called(drawn):
    (page, *_), _ = drawn
    count = len(page.polygons)
    for kind in mistakes.KINDS:
        rng = np.random.default_rng(3)
        made = mistakes.make_mistakes(rng, page.polygons, page.ignore, page.size, 3, (kind,))
        wrong = [p for p, name in zip(made.polygons, made.kinds) if name == kind]
        areas = cleval.shared_areas(wrong, page.polygons, None)
        iou = areas.shared / areas.union
        more = {"missing": -3, "spurious": 3, "joined": -3, "split": 3}.get(kind, 0)
        assert len(made.polygons) == count + more
        if kind == "missing":
            assert [name for name, _ in made.bare] == ["missing"] * 3
        elif kind == "spurious":
            assert not areas.shared.any()
        elif kind == "moved":
            assert (iou.max(1) < 0.7).all()
        elif kind == "joined":
            assert ((areas.shared > 0.9 * areas.det).sum(1) >= 2).all()
        elif kind == "split":
            assert (areas.shared.sum(1) > 0.8 * areas.gt).all() and (iou.max(1) < 0.8).all()
        else:
            assert sum(made.ignore) == 3


# ---------------------------------------------------------------- files and commands


@pytest.fixture
def folder(drawn, tmp_path, monkeypatch):
    """A data folder of drawn pages, whose labels have mistakes; their maps replace a network's."""
    monkeypatch.chdir(tmp_path)
    data.synth("s", 8, 0, size=96, words=4, difficulty=0.2)
    pages, maps = drawn
    wrong, _ = with_mistakes(pages, mistakes.KINDS, 0.15)
    images = {}
    for page, prob in zip(wrong, maps):
        write_picture(tmp_path, page.name, page.path)
        words = {}
        for n, polygon, skip in zip(page.ids, page.polygons, page.ignore):
            words[n] = {"points": polygon.tolist(), "ignore": skip}
        images[page.name] = {"words": words}
    write_labels(tmp_path, images, "val")
    of_name = {page.name: prob for page, prob in zip(pages, maps)}

    def read_maps(networks, pages, device, job):
        for n, page in enumerate(pages):
            prob = of_name[page.name]
            page.size = prob.shape[::-1]
            yield n, job(page, [prob])

    monkeypatch.setattr(evaluate, "predict_each", read_maps)
    monkeypatch.setattr(audit, "WANTED", 120)
    state = {"model": dbnet.DBNet(*NETWORK).state_dict(), "hparams": asdict(HP)}
    dbnet.save_checkpoint("a.pt", state)
    return tmp_path


def run(*flags):
    return evaluate.main(["a.pt", "--data", ".", *flags])


def test_suspects_as_json_as_a_report_and_for_labelme_and_back(folder, capsys):
    assert run("--audit", "s.json", "--to", "labelme", "lm") == 0
    out = capsys.readouterr()
    assert "labels on 10 pages: at most some" in out.out and "in all" in out.out
    assert "a.pt: not all pages that it was trained on are known" in out.err
    suspects = json.loads((folder / "s.json").read_text())
    keys = {"page", "kind", "label", "points", "proposed", "probability"}
    assert all(keys <= suspect.keys() for suspect in suspects)
    assert {suspect["kind"] for suspect in suspects} <= {*mistakes.KINDS}
    assert all((s["label"] is None) == (s["kind"] == "missing") for s in suspects)

    # pages with suspects come back as they were, proposals only once they are renamed
    old = {page.name: page for page in labels.load_labels(".", "val")}
    assert data.main(["convert", "lm", "back"]) == 0
    for page in labels.load_labels("back", "train"):
        assert page.ids == old[page.name].ids and page.ignore == old[page.name].ignore
        for polygon, other in zip(page.polygons, old[page.name].polygons):
            np.testing.assert_allclose(polygon, other, atol=1e-3)
    assert {s["page"] for s in suspects} == {
        f"{path.stem}.png" for path in Path("lm").glob("*.json")
    }
    (file, *_) = sorted(Path("lm").glob("*.json"))
    file.write_text(file.read_text().replace(labels.PROPOSAL, "text "))
    (page,) = labels.load_labels(file, "train", "lm")
    assert len(page.polygons) > len(old[page.name].polygons)


def test_a_file_of_suspects_may_lie_in_labelmes_folder(folder):
    """Even under the name that labelme's file of a page would have."""
    assert run("--audit", "first.json", "--to", "labelme", "first") == 0
    names = sorted(path.name for path in Path("first").glob("*.json"))
    assert run("--audit", f"lm/{names[0]}", "--to", "labelme", "./lm") == 0
    suspects = json.loads(Path("lm", names[0]).read_text())
    assert data.main(["convert", "lm", "back"]) == 0
    back = {page.name for page in labels.load_labels("back", "train")}
    assert back == {suspect["page"] for suspect in suspects} and len(back) == len(names)


def test_no_page_for_labelme_replaces_another_of_like_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outline = np.array([[10, 10], [30, 10], [30, 20.0]])
    suspects = []
    for name in ("x/1.png", "y/1.png", "1.png", "1.jpg", "2.png"):
        write_picture(tmp_path, name, np.zeros((40, 60, 3), np.uint8))
        page = labels.Page(name, tmp_path / "images" / name, size=(60, 40))
        page.add("1", outline)
        suspects.append(audit.Suspect(page, "spurious", (0,), outline, [], 0.9, 0.0))
    audit.write_labelme("lm", suspects)
    names = {page.name for page in labels.load_labels("lm", "train")}
    assert names == {suspect.page.name for suspect in suspects}
    assert Path("lm/2.json").exists()


def test_a_page_keeps_its_group_on_the_way_to_labelme_and_back(tmp_path, monkeypatch):
    """Without it pages of one shop are trained on and validated on."""
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path, "1.png", np.zeros((40, 60, 3), np.uint8))
    page = labels.Page("1.png", tmp_path / "images/1.png", size=(60, 40), group="a shop")
    page.add("1", np.array([[10, 10], [30, 10], [30, 20.0]]))
    audit.write_labelme("lm", [audit.Suspect(page, "spurious", (0,), page.polygons[0], [], 0.9, 0)])
    assert data.main(["convert", "lm", "back"]) == 0
    assert labels.load_labels("back", "train")[0].group == "a shop"


def test_a_suspected_label_for_labelme_begins_where_the_label_does(tmp_path, monkeypatch):
    """Its text may be turned; an outline that was found begins at its upper left."""
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path, "1.png", np.zeros((40, 60, 3), np.uint8))
    page = labels.Page("1.png", tmp_path / "images/1.png", size=(60, 40))
    down = np.array([[20, 5], [20, 35], [10, 35], [10, 5.0]])
    page.add("1", down)
    for proposals, first in (([], [20, 5]), ([down], [10, 5])):
        suspect = audit.Suspect(page, "spurious", (0,), down, proposals, 0.9, 0.0)
        ((_, _, text),) = audit.labelme_files([suspect])
        assert json.loads(text)["shapes"][-1]["points"][0] == first


def test_a_report_shows_crops_and_counts(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suspects, summary, _ = found
    monkeypatch.setattr(audit, "read_image", np.copy)  # these pages hold their pictures
    monkeypatch.setattr(audit, "A_PAGE", 5)
    audit.write_report("s.html", suspects[:8], summary)
    text = Path("s.html").read_text()
    assert "<summary>1 to 5</summary>" in text and "<summary>6 to 8</summary>" in text
    assert text.count("data:image/jpeg;base64,") == 8
    assert 'src="http' not in text and 'href="http' not in text
    assert "in all" in text and "habits" in text


def test_a_crop_of_a_strip_of_paper_is_drawn():
    outline = np.array([[0, 0], [1, 0], [1, 2000.0]])
    page = labels.Page("a.png", None, [outline], size=(1, 3000))
    suspect = audit.Suspect(page, "spurious", (0,), outline, [], 0.9, 0.0)
    assert "data:image" in audit.crop(suspect, np.zeros((3000, 1, 3), np.uint8))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--audit s.txt", "not a .json or .html file"),
        ("--audit s.json --html r.html", "--html: not with --audit"),
        ("--audit s.json --tune", "--audit: only with a checkpoint"),
        ("--audit s.json --to icdar out", "only labelme is known"),
        ("--audit s.json --to labelme images", "images: exists"),
        ("--flip", "--flip: only with --audit"),
        ("--to labelme out", "--to: only with --audit"),
    ],
)
def test_flags_without_effect_are_refused(folder, capsys, flags, words):
    assert run(*flags.split()) == 2
    error_line(capsys.readouterr().err, words)


def test_a_split_is_not_audited_by_folds_that_held_out_others(folder, capsys):
    """Only with --data is there a set to take it from: it was ignored, for the first one's fold."""
    assert evaluate.main(["a.pt", "b.pt", "--audit", "s.json", "--split", "train"]) == 2
    error_line(capsys.readouterr().err, "--split: not with folds")
    dbnet.save_checkpoint("b.pt", torch.load("a.pt"))
    assert evaluate.main(["a.pt", "b.pt", "--audit", "s.json", "--image-dir", "images"]) == 2
    error_line(capsys.readouterr().err, "--image-dir: only with --data")
    flags = "--data", ".", "--audit", "s.json", "--split", "val"
    assert evaluate.main(["a.pt", "b.pt", *flags]) == 0


def test_text_on_two_labels_is_not_outside_them():
    """If all labels are filled at once, OpenCV leaves out what an even number of them share."""
    box = np.array([[10, 10], [90, 10], [90, 90], [10, 90]], float)
    inner = box / 4 + 30
    prob = np.zeros((100, 100), np.uint8)
    prob[40:50, 40:50] = 255
    view = looks.View(prob, [], [], [box, inner], 10)
    outlines, features = looks.text_outside(view, HP)
    assert outlines == [] and features.shape == (0, 5)
    assert len(looks.text_outside(view._replace(polygons=[]), HP)[0]) == 1


def test_pages_are_audited_by_the_networks_that_did_not_see_them(folder, capsys):
    pages = labels.load_labels(".", "val")
    digests = [evaluate.page_digest(page) for page in pages]
    halves = digests[:5], digests[5:]
    sources = []
    for k, half in enumerate(halves):
        origin = {"trained": half, "chosen": [], "unknown": []}
        sources.append(Source(f"{k}.pt", {"origin": origin}, HP, {}))
    voters = evaluate.choose_voters(sources, pages)
    names = {numbers: [page.name for page in some] for numbers, some in voters.items()}
    all_names = [page.name for page in pages]
    assert names == {(1,): all_names[:5], (0,): all_names[5:]}
    assert capsys.readouterr().err == ""
    (numbers,) = evaluate.choose_voters(sources[:1], pages[:5])
    assert numbers == (0,)
    assert "5 of 5 pages (first: 0.png) were trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, size, look, height",
    [
        ("", 128, False, 12),  # 1.4 x 96 is 134.4
        ("--size 64", 64, False, 12),
        ("--size auto", 96, True, 16.8),
        ("--hparams h.json", 96, False, 12),  # a file of --tune has a size, too: 1.4 x 64 is 89.6
    ],
)
def test_pages_are_read_larger_unless_a_size_is_named(
    folder, monkeypatch, flags, size, look, height
):
    state = torch.load("a.pt")
    state["hparams"] |= {"size": 96, "text_height": 12.0}
    dbnet.save_checkpoint("a.pt", state)
    Path("h.json").write_text('{"size": 64}')
    read_maps, taken = evaluate.predict_each, []

    def take(networks, *rest):
        taken.append(networks[0].hp)
        return read_maps(networks, *rest)

    monkeypatch.setattr(evaluate, "predict_each", take)
    assert run("--audit", "s.json", *flags.split()) == 0
    hp = taken[-1]
    assert (hp.size, hp.look) == (size, look)
    assert hp.text_height == pytest.approx(height)


def test_flip_lets_the_mirrored_page_vote(folder, monkeypatch):
    taken = []
    read_maps = evaluate.predict_each

    def take(networks, *rest):
        taken.append(networks[0].model)
        return read_maps(networks, *rest)

    monkeypatch.setattr(evaluate, "predict_each", take)
    assert run("--audit", "s.json") == 0
    plain = taken[-1]
    assert run("--audit", "t.json", "--flip") == 0
    both = taken[-1]
    page = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        votes = both(page), both(page.flip(2)).flip(3)
        alone = plain(page), plain(page.flip(2)).flip(3)
    torch.testing.assert_close(*votes)
    mean = torch.stack(alone).sigmoid().mean(0)
    torch.testing.assert_close(votes[0].sigmoid(), mean)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


# ---------------------------------------------------------------- training


def suspect(page, kind, points, **more):
    points = [[float(x), float(y)] for x, y in points]
    return {"page": page.name, "kind": kind, "points": points, "proposed": None, **more}


def test_doubtful_labels_are_dont_care_in_training(folder):
    pages = labels.load_labels("s", "train")
    data.inspect_pages(pages)
    page, other = pages[:2]
    before = copy.deepcopy(page.repaired)
    box = [[1, 1], [9, 1], [9, 5], [1, 5]]
    entries = [
        suspect(page, "moved", page.polygons[0], probability=0.9, proposed=box),
        suspect(page, "missing", box, probability=0.6, proposed=box),
        suspect(other, "moved", other.polygons[0], probability=0.4),
    ]
    Path("doubt.json").write_text(json.dumps(entries))
    assert audit.mask_doubt(pages, "doubt.json", 0.5) == 2
    count = len(before.polygons)
    assert page.repaired.ignore[:count] == [True, *before.ignore[1:]]
    assert page.repaired.ignore[count:] == [True, True]
    np.testing.assert_allclose(page.repaired.polygons[-1], box)
    assert not any(other.ignore)
    with pytest.raises(DataError, match="no suspect of a train page"):
        audit.mask_doubt(pages, "doubt.json", 0.95)
    Path("doubt.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="not a list of suspects"):
        audit.mask_doubt(pages, "doubt.json", 0.5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"page": ["a.png"]}, "no suspect of a train page"),
        ({"parts": 5}, "suspect 1: its parts are not a list of outlines"),
        ({"proposed": 7}, "suspect 1: 0 points"),
    ],
)
def test_suspects_of_other_types_are_an_error(folder, more, message):
    pages = labels.load_labels("s", "train")
    entry = suspect(pages[0], "moved", [[1, 1], [9, 1], [9, 5]], probability=0.9) | more
    Path("doubt.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match=message):
        audit.mask_doubt(pages, "doubt.json", 0.5)


def test_a_doubted_page_of_a_name_that_two_sets_share_is_refused(folder):
    """The suspect would be looked for on the page of the other set."""
    pages = labels.load_labels("s", "train") + labels.load_labels("s", "train")[:1]
    entry = suspect(pages[-1], "moved", [[1, 1], [9, 1], [9, 5]], probability=0.9)
    Path("doubt.json").write_text(json.dumps([entry]))
    several = f"several train pages are called {pages[-1].name}"
    with pytest.raises(DataError, match=several):
        audit.mask_doubt(pages, "doubt.json", 0.5)
    # one of the two is held out in this fold
    data.inspect_pages(pages)
    with pytest.raises(DataError, match=several):
        audit.mask_doubt(pages[1:], "doubt.json", 0.5, {pages[0].name})


def test_a_fine_outline_that_was_written_can_be_read(folder):
    """Rounded to a tenth of a pixel this one would cross itself."""
    pages = labels.load_labels("s", "train")
    data.inspect_pages(pages)
    x = np.arange(30) / 8
    top = np.stack([x, 5 + 0.06 * (-1) ** np.arange(30)], 1)
    outline = np.concatenate([top, (top + (0, 0.04))[::-1]]) + 3
    found = audit.Suspect(pages[0], "moved", (0,), outline, [outline], 0.9, 0.0)
    Path("doubt.json").write_text(json.dumps([found.to_json()]))
    assert audit.mask_doubt(pages, "doubt.json", 0.5) == 1


def test_a_suspect_is_of_the_picture_that_was_audited_not_of_another_of_its_name(folder):
    """Such as a val page whose name a train page has, too, or a page of a second set."""
    data.synth("t", 8, 1, size=96, words=4, difficulty=0.2)
    pages = labels.load_labels("s", "train") + labels.load_labels("t", "train")
    data.inspect_pages(pages)
    page, other = pages[0], pages[6]
    assert page.name == other.name
    found = audit.Suspect(other, "spurious", (0,), other.polygons[0], [], 0.9, 0.0)
    Path("doubt.json").write_text(json.dumps([found.to_json()]))
    with pytest.raises(DataError, match="no suspect of a train page .* audit the train pages"):
        audit.mask_doubt(pages[:6], "doubt.json", 0.5)
    assert audit.mask_doubt(pages, "doubt.json", 0.5) == 1
    assert other.ignore[0] and not any(page.ignore)


def test_a_run_knows_what_it_doubted(folder, capsys):
    page, other, *_ = labels.load_labels("s", "train")
    entries = [suspect(page, "spurious", page.polygons[0], probability=0.9)]
    Path("doubt.json").write_text(json.dumps(entries))
    flags = ["--data=s", *NETWORK_FLAGS, "--size=64", "--batch=2", "--epochs=2", "--T_max=2"]
    flags += ["--device=cpu", "--name=d", "--workers=0"]
    assert train.main([*flags, "--doubt-above=0.5"]) == 2
    error_line(capsys.readouterr().err, "--doubt-above: only with --doubt")
    assert train.main([*flags, "--doubt=doubt.json", "--stop-epoch=1"]) == 0
    out = capsys.readouterr().out
    assert "doubt 1 suspects of doubt.json" in out and "1 ignored" in out

    # a fold that holds out all pages with suspects has none to mask; the others mask them
    folds = [*flags, "--doubt=doubt.json", "--name=f", "--folds=2", "--fold=all", "--epochs=1"]
    assert train.main([*folds, "--T_max=1"]) == 0
    out = capsys.readouterr().out
    assert "doubt 0 suspects" in out and "doubt 1 suspects" in out and "out of fold: " in out

    # other suspects change train pages, which a resumed run names; without any it stops
    resume = ["--name=d", "--resume", "--device=cpu", "--workers=0"]
    kept = Path("runs/d/last.pt").read_bytes()
    Path("doubt.json").write_text(json.dumps([entries[0] | {"probability": 0.2}]))
    assert train.main(resume) == 1
    error_line(capsys.readouterr().err, "no suspect of a train page")
    assert Path("runs/d/last.pt").read_bytes() == kept
    entries.append(suspect(other, "spurious", other.polygons[0], probability=0.7))
    Path("doubt.json").write_text(json.dumps(entries))
    assert train.main(resume) == 0
    out = capsys.readouterr().out
    assert f"train pages have changed since: {other.path} labels changed\n" in out
    assert "doubt 2 suspects of doubt.json" in out and "2 ignored" in out
