"""Threshold tuning: reuse against one-by-one decoding, choice against closed forms, the cache."""

import json
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
import torch

import cleval
import data
import evaluate
import files
import formats
import hparams
import interval
import labels
import pictures
import predict
import sources
import tune
from db_postprocess import decode_page
from dbnet import load_checkpoint, save_checkpoint
from evaluate import cached_maps, held_out_pages, load_source, write_setting
from hparams import Hparams
from tune import TUNED, halves, score_grid, setting_values

HP = Hparams(backbone="test_efficientnet", neck=16, size=160)
SMALL = {
    "thresh": (0.2, 0.3, 0.4),
    "box_thresh": (0.3, 0.5, 0.7),
    "unclip_ratio": (0.0, 1.5, 2.0),
    "mode": ("polygon", "box"),
    "min_size": (0.0, 6.0),
}


def synthetic_page(seed, noise=0.25, width=120, height=160):
    """((map uint8 [h, w], scale [2]), page): words as a network shows them, blotches."""
    rng = np.random.default_rng(seed)
    page = labels.Page(f"{seed}.png", None, size=(width / 0.8, height / 0.8), group=f"g{seed // 2}")
    for y in range(8, height - 16, 16):
        x, w, h = rng.integers(4, 20), rng.integers(20, 90), rng.integers(7, 12)
        corners = np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], float)
        page.add(f"{y}", corners / 0.8, ignore=rng.random() < 0.1)
    polygons = [polygon * 0.8 for polygon in page.polygons]
    shrink = data.make_targets(polygons, [False] * len(polygons), height, width)[0]
    prob = cv2.GaussianBlur(shrink.astype(np.float32) * 0.9, (0, 0), 1.0)
    blotches = cv2.GaussianBlur(rng.standard_normal((height, width), np.float32), (0, 0), 2.5)
    prob = np.clip(prob + noise * blotches / blotches.std() * (0.3 + prob), 0, 1)
    return (np.round(prob * 255).astype(np.uint8), np.array([0.8, 0.8])), page


def synthetic_set(seeds, **kind):
    return map(list, zip(*(synthetic_page(seed, **kind) for seed in seeds)))


def one_by_one(item, values, hp=HP, metric="page"):
    """Numbers of a page by the usual decoding and metric."""
    (prob, scale), page = item
    found = decode_page(prob, np.array(prob.shape[::-1]) / scale, replace(hp, **values))
    assert len(found[0]) <= hp.max_candidates
    return cleval.page_row(metric, page, found[0])[:6]


@pytest.mark.parametrize("metric", cleval.METRICS)
@pytest.mark.parametrize("limit", [500, 3])
@pytest.mark.parametrize("hp", [HP, replace(HP, max_candidates=3), replace(HP, shrink_ratio=0.6)])
def test_every_setting_counts_as_if_decoded_alone(hp, limit, metric, monkeypatch):
    """Labels that lie on each other, whose detections are rivals, and one without text, too."""
    monkeypatch.setattr(cleval, "MAX_DETECTIONS", limit)
    for seed in range(2):
        item = synthetic_page(seed)
        page = item[1]
        page.texts[:4] = ["TOTAL", "###", "", None]
        for n in (2, 3):
            page.add(f"twice {n}", page.polygons[n] + 1, text="4.20")
        table = tune.score_page(item, SMALL, hp, metric).reshape(108, -1)
        assert table[:, :3].std(0)[metric != "page" :].min() > 0.01  # so that a mix-up shows
        for n in range(len(table)):
            alone = one_by_one(item, setting_values(SMALL, n), hp, metric)
            assert np.array_equal(table[n], alone), (seed, n)


@pytest.mark.parametrize("metric", cleval.METRICS)
def test_pages_without_words_score_zero(metric):
    (prob, scale), page = synthetic_page(7)
    empty = labels.Page("empty", None)
    for item in (((prob * 0, scale), page), ((prob, scale), empty), ((prob * 0, scale), empty)):
        table = tune.score_page(item, SMALL, HP, metric).reshape(108, -1)
        assert (table[5] == one_by_one(item, setting_values(SMALL, 5), metric=metric)).all()
        assert not cleval.METRICS[metric](table).any()


def test_a_tie_at_half_the_union_is_no_hit():
    """Thirty labels 30 px wide, detected 10 px beside: IoU 1/2, but for rounding."""
    page, det = labels.Page("ties", None), []
    for n, (x, y) in enumerate(np.random.default_rng(0).uniform(0, 999, (30, 2))):
        corners = np.array([(0, 0), (24, 18), (18, 26), (-6, 8)]) + (x, y + 1000 * n)
        page.add(f"{n}", corners)
        det.append(corners + (8, 6))
    ((num_gt, num_det, *hits),) = tune.choice_rows(page, "iou50", None, det, np.ones((1, 30), bool))
    assert (num_gt, num_det) == (30, 30) and not any(hits)


def test_processes_give_what_one_gives(monkeypatch):
    maps, pages = synthetic_set(range(8))
    grid = {**SMALL, "thresh": (0.3,), "unclip_ratio": (2.0,)}
    monkeypatch.setattr("cv2.getNumberOfCPUs", lambda: 2)
    parallel = score_grid(maps, pages, grid, HP, "page")
    monkeypatch.setattr("cv2.getNumberOfCPUs", lambda: 1)
    assert np.array_equal(parallel, score_grid(maps, pages, grid, HP, "page"))


def table_of(grid):
    return np.zeros([len(grid[key]) for key in TUNED])


def noisy(table, pages, spread, seed=0):
    """H-means [n, S] with the means of a table and independent noise a page and setting."""
    noise = np.random.default_rng(seed).normal(0, spread, (pages, table.size))
    return table.ravel() + noise - noise.mean(0)


def as_rows(hmeans):
    """H-means [n, S] of pages -> their rows [n, S, 4] in cleval's "page"."""
    return np.stack([hmeans, hmeans, hmeans, np.ones_like(hmeans)], -1)


def choose_setting(hmeans, groups, grid):
    return tune.choose_setting(as_rows(hmeans), cleval.mean_scores, groups, grid)


def crossfit(hmeans, parts, groups, grid):
    """[n, 2] H-means of pages at the settings of the other parts."""
    return tune.crossfit(as_rows(hmeans), cleval.mean_scores, parts, groups, grid)[..., 2].T


def test_the_middle_of_the_plateau_is_chosen_and_not_its_tip():
    grid = {**SMALL, "thresh": tuple(range(7)), "box_thresh": tuple(range(7)), "mode": ("box",)}
    table = table_of(grid) + 0.5
    table[1:6, 2:7, 1:, 0, :] = 0.9
    table[5, 6, 1, 0, 0] = 0.903  # lucky, at the plateau's corner
    best, middle, plateau = choose_setting(noisy(table, 40, 0.05), range(40), grid)
    assert best == table.argmax() and plateau[best]
    assert np.unravel_index(middle, table.shape)[:2] == (3, 4)
    assert plateau.reshape(table.shape).sum() == pytest.approx(5 * 5 * 2 * 2, abs=6)
    assert not plateau.reshape(table.shape)[0].any()
    table[2, 1, 0, 0, 1] = 1.2  # better than all noise: alone
    best, middle, plateau = choose_setting(noisy(table, 40, 0.05), range(40), grid)
    assert best == middle == table.argmax() and plateau.sum() == 1


def test_the_middle_keeps_the_mode_and_the_kind_of_unclip():
    for at in [(1, 1, 0, 0, 0), (1, 1, 0, 1, 0), (1, 1, 1, 1, 0), (1, 1, 2, 0, 1)]:
        table = table_of(SMALL)
        table[0, :, :, at[3]] = -1  # so that there is more plateau in the other mode
        table[at] = 1e-4
        _, middle, plateau = choose_setting(noisy(table, 30, 0.05), range(30), SMALL)
        chosen = np.unravel_index(middle, table.shape)
        assert plateau.mean() > 0.6 and chosen[3] == at[3] and (chosen[2] == 0) == (at[2] == 0)


def test_the_number_beside_the_recommended_setting_is_said_to_be_of_all_ways_to_decode(capsys):
    values = setting_values(SMALL, 0) | {"in_sample": {"hmean": 0.9}}
    rows = as_rows(np.full(6, 0.9))
    score = interval.make_score(rows, cleval.mean_scores, range(6))
    gain = interval.paired_difference(rows, rows, cleval.mean_scores, range(6))
    result = dict.fromkeys(("before", "best", "recommended"), values) | {"metric": "hmean"}
    result |= {"crossfitted": score, "crossfitted_best": score, "gain": gain}
    tune.print_tuning(result | {"settings": 108, "plateau": 80})
    words = "recommended: 80 cannot be told from the best; the middle of those of its mode and kind"
    assert words in capsys.readouterr().out


def test_groups_widen_the_noise():
    """Pages of one group are copies of each other: 40 pages know no more than their 4 groups."""
    table = table_of(SMALL)
    table[0, 0, 0, 0, 0] = 0.02
    copies = np.repeat(noisy(table, 4, 0.05, seed=3), 10, 0)
    alone = choose_setting(copies, range(40), SMALL)[2].sum()
    grouped = choose_setting(copies, np.repeat(range(4), 10).tolist(), SMALL)[2].sum()
    assert grouped > 1.5 * alone


def test_crossfitting_never_looks_at_the_pages_it_scores():
    parts, groups = np.repeat([0, 1, 2], 8), np.array([f"g{n // 2}" for n in range(24)])
    hmeans = np.random.default_rng(0).random((24, table_of(SMALL).size))
    before = crossfit(hmeans, parts, groups, SMALL)
    for part in range(3):
        own = parts == part
        changed = hmeans + 100 * own[:, None]
        assert np.allclose(crossfit(changed, parts, groups, SMALL)[own], before[own] + 100)
        chosen = choose_setting(hmeans[~own], groups[~own], SMALL)[:2]
        assert np.array_equal(before[own], hmeans[own][:, chosen])


def test_the_best_of_equal_settings_is_luck_and_crossfitting_says_so():
    grid, inside, fitted = {**SMALL, "min_size": (0.0,)}, [], []
    for seed in range(60):
        hmeans = 0.9 + np.random.default_rng(seed).normal(0, 0.05, (12, 54))
        inside.append(hmeans.mean(0).max())
        fitted.append(crossfit(hmeans, np.arange(12) % 2, range(12), grid).mean(0))
    spread = 0.05 / np.sqrt(12)  # of a mean of 12 pages; the best of 54 lies 2.3 of it above
    assert np.mean(inside) - 0.9 == pytest.approx(2.3 * spread, rel=0.1)
    assert np.mean(fitted, 0) == pytest.approx([0.9, 0.9], abs=4 * spread / np.sqrt(60))


def test_the_plateau_of_a_ratio_of_sums_is_that_of_paired_bootstraps():
    """One setting at a time, and more settings than are drawn at once."""
    rng, grid = np.random.default_rng(0), {**SMALL, "thresh": tuple(range(9))}
    rows, groups = rng.integers(5, 60, (12, 324, 6)), [n // 2 for n in range(12)]
    rows[..., 2:4], rows[..., 4:] = rows[..., :2] - rng.integers(0, 5, (12, 324, 2)), 0
    best, _, plateau = tune.choose_setting(rows, cleval.micro_scores, groups, grid)
    to_scores = cleval.micro_scores

    def gain(sums):
        return to_scores(sums[..., :6]) - to_scores(sums[..., 6:])

    assert best == to_scores(rows.sum(0))[:, 2].argmax() and 10 < plateau.sum() < 314
    for n in range(324):
        both = rows[:, [n, best]].reshape(12, 12)
        high = interval.bootstrap(both, gain, groups, draws=1000)[2, 1]
        assert plateau[n] == (high >= 0)


def test_pages_whose_draws_fill_whole_blocks_have_a_plateau_too():
    """1000 draws of 1048 pages are one block, of 2095 two: none is left over."""
    for count in (1048, 2095):
        hmeans = np.linspace(0, 1, 2 * count).reshape(count, 2)
        plateau = tune.near_best(as_rows(hmeans), cleval.mean_scores, range(count), 1)
        assert plateau.tolist() == [False, True]


def test_halves_keep_groups_whole():
    names = [f"g{n % 7}" for n in range(40)]
    part = halves(names)
    assert len(set(zip(names, part))) == 7 and sorted(np.bincount(part[:7])) == [3, 4]
    with pytest.raises(files.DataError, match="one group"):
        halves(["a", "a"])


PLAIN, FOLDS = "runs/plain/best.pt", ("runs/a-fold1/best.pt", "runs/a-fold2/best.pt")


def save_run(path, hp, held_out=()):
    files.replace_file(path, "")  # so that there is a folder
    scores = {"hmean": 0.5, "pages": dict.fromkeys(held_out, 0.5)}
    state = {"model": {"weight": torch.arange(9.0)}, "epoch": 1, "scores": scores}
    origin = {"trained": [], "chosen": [], "unknown": []}
    save_checkpoint(path, {**state, "hparams": asdict(hp), "origin": origin})


def change(source, target, epoch=1, **hp):
    state = load_checkpoint(source)
    hp = asdict(replace(state["hparams"], **hp))
    save_checkpoint(target, {**state, "hparams": hp, "epoch": epoch})


def load_all(paths):
    return [load_source(path) for path in paths]


def maps_of(pages, **hp):
    return cached_maps(load_source(PLAIN), pages, replace(HP, **hp), torch.device("cpu"))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """DATA with 6 train, 4 val pages whose maps a stub network knows; 2 fold runs, a plain one."""
    (tmp_path / "DATA" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    maps, calls = {}, []
    for split, seeds in (("train", range(6)), ("val", range(6, 10))):
        items, pages = synthetic_set(seeds)
        for item, page, seed in zip(items, pages, seeds):
            maps[page.name], page.size = item, (150, 200)
            cv2.imwrite(f"DATA/images/{page.name}", np.full((200, 150, 3), seed, np.uint8))
        files.write_json(f"DATA/{split}.json", formats.pages_to_json(pages))

    def predict_each(networks, pages, device, job, *_):
        calls.append(len(pages))
        for i, page in enumerate(pages):
            page.size = (150, 200)
            yield i, job(page, [maps[page.name][0]])

    for fold, source in enumerate(FOLDS, 1):
        held = [f"{n}.png" for n in range(6) if n // 2 % 2 == fold - 1]
        save_run(source, replace(HP, data="DATA", folds=2, fold=fold), held)
    save_run(PLAIN, replace(HP, data="DATA"))
    for room in (evaluate, predict):
        monkeypatch.setattr(room, "predict_each", predict_each)
    monkeypatch.setattr(sources, "network_of", lambda *_: None)
    monkeypatch.setattr(evaluate, "GRID", SMALL)
    return calls


def test_the_cache_is_used_and_never_stale(house, capsys):
    pages = labels.load_labels("DATA", "val")
    first, again = maps_of(pages), maps_of(pages)
    assert house == [4]
    for (a, *scale), (b, *same) in zip(first, again):
        assert np.array_equal(a, b) and np.array_equal(scale, same) and a.dtype == b.dtype == "u1"
    maps_of(pages[:3])
    maps_of(pages[::-1])
    maps_of(pages, size=192)
    cv2.imwrite(str(pages[0].path), np.zeros((200, 150, 3), np.uint8))
    maps_of(pages)
    change(PLAIN, PLAIN, epoch=2)
    maps_of(pages)
    assert house == [4, 3, 4, 4, 4, 4] and capsys.readouterr().err == ""


def test_a_damaged_cache_is_predicted_again(house, tmp_path, capsys):
    pages = labels.load_labels("DATA", "val")
    first = maps_of(pages)
    (file,) = (tmp_path / "runs" / "plain" / "maps").iterdir()
    whole, rng = file.read_bytes(), np.random.default_rng(0)

    def flipped(at, bit):
        return whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]

    near = [*range(200), *range(whole.index(b"PK\x01\x02"), len(whole))]  # where the flags are
    sure = [whole[: len(whole) // 2], b"", flipped(len(whole) // 3, 8), b"PK"]
    some = [flipped(at, 1 << rng.integers(8)) for at in rng.choice(near, 150, False)]
    for n, damaged in enumerate(sure + some):
        file.write_bytes(damaged)
        again = maps_of(pages)
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, again))
        if n < len(sure):
            assert "damaged" in capsys.readouterr().err and file.read_bytes() == whole
    assert len(house) > len(sure) + 20  # many of the flips were noticed, too


def test_a_run_folder_that_cannot_be_written_is_tuned_without_a_cache(house, tmp_path, capsys):
    (tmp_path / "runs" / "plain" / "maps").write_bytes(b"in the way")
    (tmp_path / "runs" / "plain" / "tune.png").mkdir()
    code, out, err = run(capsys, PLAIN, "--tune", "--write", "tuned.json")
    assert code == 0 and "cross-fitted" in out and (tmp_path / "tuned.json").exists()
    assert "maps are not kept" in err and "tune.png: not drawn" in err and err.count("\n") == 2


def test_each_page_is_predicted_by_the_run_that_held_it_out(house, capsys):
    names = [[page.name for page in part] for part in held_out_pages(load_all(FOLDS), None, None)]
    assert names == [["0.png", "1.png", "4.png", "5.png"], ["2.png", "3.png"]]
    assert not capsys.readouterr().err
    (moved,) = held_out_pages(load_all(FOLDS[1:]), "DATA", None)
    assert [p.name for p in moved] == ["2.png", "3.png"]
    assert "1 of its 2 folds are given: pages of the others" in capsys.readouterr().err


def test_runs_of_other_splits_do_not_mix(house):
    def fails(words, *sources):
        with pytest.raises(files.DataError, match=words):
            held_out_pages(load_all(sources), None, None)

    change(FOLDS[0], "replica.pt", seed=1)
    fails("held out by runs/a-fold1/best.pt too", *FOLDS, "replica.pt")
    fails("held out by runs/a-fold1/best.pt too", *FOLDS, FOLDS[0])  # each page would count twice
    for key, value in (("folds", 3), ("data", "OTHER"), ("split", "abc"), ("size", 192)):
        change(FOLDS[1], "other.pt", **{key: value})
        fails(f"other.pt: {key} is", FOLDS[0], "other.pt")
    fails("plain/best.pt: not a fold run", PLAIN, PLAIN)
    save_run("other.pt", replace(HP, data="DATA", folds=2, fold=2), ["x.png"])
    fails("held-out page x.png is not in the data", FOLDS[0], "other.pt")


def test_written_values_go_into_a_copy(house, capsys):
    values = {"thresh": 0.2, "box_thresh": 0.7, "unclip_ratio": 0.0, "mode": "box", "min_size": 6.0}
    before = load_checkpoint(FOLDS[0])
    write_setting("tuned.pt", load_source(FOLDS[0]), values)
    after = load_checkpoint("tuned.pt")
    assert after["hparams"] == replace(before["hparams"], **values)
    assert "hmean" in before["scores"] and "hmean" not in after["scores"]  # that of other values
    assert after["scores"]["pages"] == before["scores"]["pages"]
    assert all(torch.equal(after["model"][k], before["model"][k]) for k in before["model"])
    files.write_json("mine.json", {"lr": 1e-3, "thresh": 0.3})
    write_setting("mine.json", load_source(FOLDS[0]), values)
    assert files.read_json("mine.json") == {"lr": 1e-3, **values}
    assert "mine.json: keeps its own lr; for those of the run write" in capsys.readouterr().err
    write_setting("new.json", load_source(FOLDS[0]), values)
    new = files.read_json("new.json")
    assert not {"name", "fold"} & new.keys() and new["mode"] == "box" and new["lr"] == HP.lr
    for path, taken in ((FOLDS[0], FOLDS[:1]), ("x.pt", FOLDS), ("x.txt", FOLDS[:1])):
        with pytest.raises(files.UsageError, match="--write"):
            evaluate.check_target(path, taken)


def run(capsys, *flags):
    code = evaluate.main([str(flag) for flag in flags])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("metric", tune.METRICS)
def test_a_tuned_checkpoint_scores_what_tuning_said(house, metric, capsys):
    asked = () if metric == "hmean" else ("--metric", metric)
    code, out, err = run(capsys, PLAIN, "--tune", "--write", "tuned.pt", "--json", *asked)
    result = json.loads(out)
    assert code == 0 and err == "" and result["pages"] == 4 and result["settings"] == 108
    best, middle, before = (result[key]["in_sample"] for key in ("best", "recommended", "before"))
    (low, high), fitted = result["crossfitted"]["interval"], result["crossfitted"]["hmean"]
    gain = fitted - before[metric]
    assert best[metric] >= middle[metric] and low <= fitted <= high
    assert result["gain"]["difference"] == pytest.approx(gain) and result["metric"] == metric
    for source, expected in (("tuned.pt", middle), (PLAIN, before)):
        _, out, _ = run(capsys, source, "--json")
        scores = json.loads(out)
        found = {key: s.get("hmean") for key, s in scores.items() if key in ("micro", "iou50")}
        found["hmean"] = scores["hmean"]
        assert found == pytest.approx(expected, abs=1e-12)
        assert scores["in_sample"] == ({"tuned": 4} if source == "tuned.pt" else {})
    assert cv2.imread("runs/plain/tune.png").shape == (60 + 3 * 64 + 40, 110 + 3 * 64 + 20, 3)
    chosen = setting_values(SMALL, 2 * 36)
    tune.draw_landscape("framed.png", table_of(SMALL), SMALL, chosen, "hmean")
    frame = np.argwhere((cv2.imread("framed.png") == (0, 0, 255)).all(2))
    assert ((frame.min(0) + frame.max(0)) / 2).tolist() == [60 + 2 * 64 + 32, 110 + 32]


def test_folds_are_tuned_out_of_fold_and_a_flag_fixes_its_value(house, capsys):
    code, out, _ = run(capsys, *FOLDS, "--tune", "--json", "--mode", "box", "--min-size", 3)
    result = json.loads(out)
    assert code == 0 and house == [4, 2] and result["pages"] == 6 and result["settings"] == 27
    assert result["best"]["mode"] == "box" and result["recommended"]["min_size"] == 3
    code, out, _ = run(capsys, *FOLDS, "--tune", "--write", "tuned.json")
    assert code == 0 and house == [4, 2] and "6 pages, cross-fitted over 2 parts" in out
    written, pages = files.read_json("tuned.json"), labels.load_labels("DATA", "train")
    assert set(TUNED) < written.keys()
    tuned = {pictures.picture_digest(page.path) for page in pages}
    assert {*written["tuned"].split(",")} == tuned and len(tuned) == 6
    # a run that trains with it knows these pages; what tuning expects says who was chosen there
    assert hparams.read_hparams("tuned.json")["tuned"] == written["tuned"]
    state = torch.load(FOLDS[0], weights_only=True)
    state["origin"]["chosen"] = sorted(tuned)
    save_checkpoint(FOLDS[0], state)
    result = json.loads(run(capsys, *FOLDS, "--tune", "--json")[1])
    for part in ("crossfitted", "crossfitted_best", "gain"):
        assert result[part]["over"].endswith("too narrow, in sample: epoch chosen on 4 of them")
    # thresholds that these pages have chosen before are on one side of the gain
    for fold in FOLDS:
        change(fold, fold, tuned=written["tuned"])
    result = json.loads(run(capsys, *FOLDS, "--tune", "--json")[1])
    words = [result[part]["over"] for part in ("crossfitted", "crossfitted_best", "gain")]
    assert ["thresholds chosen on 6 of them" in line for line in words] == [False, False, True]


def test_values_of_flags_are_written_beside_the_thresholds_that_were_chosen_for_them(house, capsys):
    files.write_json("mine.json", {"size": 96, "lr": HP.lr})
    for path in ("tuned.pt", "new.json", "mine.json"):
        flags = "--size", 128, "--max-candidates", 50, "--amp", "off", "--write", path
        code, _, err = run(capsys, PLAIN, "--tune", *flags)
        assert code == 0 and "mine.json" not in err
        is_checkpoint = path.endswith(".pt")
        new = asdict(load_checkpoint(path)["hparams"]) if is_checkpoint else files.read_json(path)
        assert (new["size"], new["max_candidates"]) == (128, 50)
        assert new.get("amp", "auto") == "auto"  # of the run, which trains with it


def test_bad_input_is_one_line(house, capsys):
    one_group = labels.load_labels("DATA", "val")
    for page in one_group:
        page.group = "shop"
    files.write_json("shop.json", formats.pages_to_json(one_group))
    one_group = (PLAIN, "--tune", "--data", "shop.json", "--image-dir", "DATA/images")
    for code, flags, words in (
        (2, ("p.json", "--tune"), "--tune: only with a checkpoint"),
        (2, (*FOLDS, "--tune", "--write", "x.pt"), ".json file"),
        (2, (*FOLDS, "--tune", "--write", "x.csv"), "a new .pt file"),
        (2, (*FOLDS,), "--tune"),
        (2, (FOLDS[0], "--write", "x.json"), "--tune"),
        (2, (FOLDS[0], "--metric", "micro"), "--metric: only with --tune"),
        (2, ("gone.pt", "--tune"), "gone.pt"),
        (1, (FOLDS[0], PLAIN, "--tune"), "folds is"),
        (1, one_group, "all pages are of one group"),
    ):
        found, _, err = run(capsys, *flags)
        assert found == code and err.count("\n") == 1 and words in err, err
    assert not house  # nothing was predicted before the mistake was found
