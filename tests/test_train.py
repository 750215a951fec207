"""Training: values in, exact resume, kills at bad moments, one line for whatever goes wrong."""

import copy
import csv
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from conftest import (
    CLOCKS,
    NETWORK,
    ROOT,
    error_line,
    flat,
    run_python,
    wait_for,
    write_labels,
    write_picture,
)

import command
import data
import engine
import evaluate
import files
import hparams
import interval
import labels
import pictures
import processes
import progress
import sources
import train

CPU, STEP = torch.device("cpu"), (train.Trainer, "train_step")
TINY = ("--data=s", *NETWORK, "--size=96", "--batch=2", "--epochs=4", "--T_max=4", "--lr=0.003")
TINY += ("--thresh=0.2", "--box-thresh=0.2", "--unclip-ratio=0", "--aug-strength=0.5")
# every kind of augmentation, so that each exact resume below is one with all of them
PRESET = json.loads((ROOT / "hparams/photographs.json").read_text())
AUGMENTED = [f"--{key}={value}" for key, value in PRESET.items() if key.startswith("aug_")]
TINY += (*AUGMENTED, "--aug-mirror=0.5")
LEARNS = ("--aug-strength=0", "--aug-turn=0", "--aug-ground=0", "--lr=0.006")
NO_PAGES = train.RunPages([], [], {}, {})
MAY_DIFFER = CLOCKS | {"timing", "name", "stop_epoch", "workers", "cache"}


def run(*flags):
    return train.main([*TINY, *map(str, flags)])


def resume(name, *flags):
    return train.main(["--name", name, "--resume", *flags])


def logged(folder):
    """Rows of a run's log.csv as {epoch: {column: float}}."""
    with open(f"{folder}/log.csv", newline="") as file:
        rows = [{key: float(text) for key, text in row.items()} for row in csv.DictReader(file)]
    return {int(row["epoch"]): row for row in rows}


def last(name, file="last.pt"):
    return train.load_checkpoint(f"runs/{name}/{file}")


def assert_same_as_whole(name):
    """A run's last.pt is the undisturbed one's bit for bit, but for clock times and the name."""
    a, b = flat(last("whole")), flat(last(name))
    assert a.keys() == b.keys()
    for key in a:
        if MAY_DIFFER.isdisjoint(key.split("/")):
            same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
            assert same, key


def before(patch, owner, name, act):
    """act(*args) goes before each call of owner.name."""
    real = getattr(owner, name)

    def called(*args, **options):
        act(*args)
        return real(*args, **options)

    patch.setattr(owner, name, called)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, receipts):
    """The folder of a run of four epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "s").symlink_to(receipts)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("--name", "whole") == 0
    return folder / "runs/whole"


@pytest.fixture
def whole(work, trained):
    """A copy of that run as runs/whole of an empty working directory: hard links, as no file of a
    run is written in place."""
    return shutil.copytree(trained, work / "runs/whole", copy_function=os.link)


def test_a_paused_and_a_stopped_run_go_on_bit_for_bit(whole, monkeypatch, capsys):
    def stop(trainer, pages, maps, lr, number):
        if number == 7:  # the second step of epoch 3
            os.kill(os.getpid(), signal.SIGTERM)

    before(monkeypatch, *STEP, stop)
    before(monkeypatch, train, "Pace", lambda steps, device: steps_left.append(steps))
    steps_left = []
    go_on = "go on: python train.py --name parts --resume"
    assert run("--name", "parts", "--stop-epoch", 2) == 0
    assert f"paused after epoch 2 of 4; {go_on}" in capsys.readouterr().out
    assert resume("parts") == 128 + signal.SIGTERM
    assert f"stopped in epoch 3, step 2 of 3; {go_on}" in capsys.readouterr().out
    assert (last("parts")["epoch"], last("parts")["step"]) == (2, 2)
    assert resume("parts") == 0
    out = capsys.readouterr().out
    assert "resuming runs/parts in epoch 3, step 2\n" in out
    assert out.splitlines()[-1].startswith("best hmean ")
    assert steps_left == [6, 6, 4]  # to the pause, from there, and from within epoch 3
    assert_same_as_whole("parts")
    lines = (whole.with_name("parts") / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2", "3", "4"]
    assert lines[0] == ",".join(train.COLUMNS)


def test_a_run_records_how_high_its_words_are(whole):
    """The median of the short sides of its train words, in pixels of its size."""
    recorded = last("whole")["hparams"].text_height
    heights = []
    for page in labels.load_labels("s", "train"):
        height, width = cv2.imread(str(page.path)).shape[:2]
        factor = 96 / max(width, height)
        heights += [min(cv2.minAreaRect(np.float32(p))[1]) * factor for p in page.polygons]
    assert recorded == pytest.approx(np.median(heights))


def test_a_run_on_large_words_can_be_read_again(work):
    """Of a page that is one label, 1280 px high: its hparams.json and last.pt were refused."""
    data.synth("one", 4, 7, size=96, words=4)
    for split in ("train", "val"):
        images = files.read_json(f"one/{split}.json")["images"]
        for name in images:
            height, width = cv2.imread(f"one/images/{name}").shape[:2]
            points = [[0, 0], [width, 0], [width, height], [0, height]]
            images[name] = {"words": {"1": {"points": points}}}
        write_labels(work / "one", images, split)
    flags = "--data=one", "--size=2048", "--fit=area", "--name=one"
    args = train.parse_args([*TINY, *flags])
    hp = train.read_pages(train.resolve_run(args), {})[1]
    assert hp.text_height > 1000
    assert hparams.saved_hparams(dataclasses.asdict(hp), "x") == hp


PROGRAM = f"""
import os, runpy, signal, sys
number, sync = int(sys.argv.pop(1)), os.fsync
def interrupted(file):
    if os.path.exists("runs/ended/prev.pt"):  # last.pt is the first to be written after it
        os.fsync = sync
        if number == signal.SIGKILL:
            os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), number)
    sync(file)
os.fsync = interrupted
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_signal_to_a_real_process_while_it_writes(whole, work, warm, number, code, capsys):
    """SIGKILL leaves half of the checkpoint after epoch 2; SIGTERM is told how to go on."""
    (work / "program.py").write_text(PROGRAM)
    words = "program.py", int(number), *TINY, "--name=ended"
    ended = run_python(*words, cwd=work, python=warm)
    assert ended.returncode == code, ended.stderr
    assert ("go on: python train.py --name ended --resume" in ended.stdout) == (code == 143)
    assert resume("ended") == 0
    place = "after epoch 1" if number == signal.SIGKILL else "(after epoch 2|in epoch 3, step .)"
    assert re.search(f"resuming runs/ended {place}\n", capsys.readouterr().out)
    assert_same_as_whole("ended")


def test_a_save_that_fails_ends_the_run_and_a_damaged_one_is_not_used(whole, monkeypatch, capsys):
    def fail(path, state):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", fail)
        assert run("--name", "flip") == 3
    error_line(capsys.readouterr().err, "out of memory; lower --size")
    assert resume("flip", "--stop-epoch=3") == 0
    assert "has no checkpoint yet" in capsys.readouterr().out
    path = whole.with_name("flip") / "last.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)
    with monkeypatch.context() as patch:  # it took the place of prev.pt, the only whole one
        patch.setattr(train, "save_checkpoint", fail)
        assert resume("flip") == 3
    out = capsys.readouterr().out
    assert "last.pt: damaged" in out and "prev.pt, epoch 2" in out
    assert resume("flip") == 0
    assert "resuming runs/flip after epoch 2\n" in capsys.readouterr().out
    assert_same_as_whole("flip")


def test_workers_and_cache_do_not_change_the_run(whole, work, monkeypatch):
    assert run("--name", "workers", "--workers", 2) == 0
    assert_same_as_whole("workers")
    reads = Counter()
    before(monkeypatch, pictures, "read_bytes", lambda path, *_: reads.update([path.name]))
    monkeypatch.setattr(data, "RESERVE", 0)
    assert run("--name", "cache", "--cache") == 0
    assert_same_as_whole("cache")
    for page in labels.load_labels("s", "train"):  # inspected, read once; not once in each epoch
        assert reads[page.name] == 2, reads
    assert not (work / "runs/cache/cache").exists()


def test_a_cache_leaves_room_for_checkpoints(work, monkeypatch):
    pages = labels.load_labels("s", "train")
    data.inspect_pages(pages)
    kept = []
    for i, reserve in enumerate((0, 2**62)):
        monkeypatch.setattr(data, "RESERVE", reserve)
        data.Receipts(pages, hparams.Hparams(size=96), work / "cache").page(i)
        kept.append(sorted(path.name for path in (work / "cache").iterdir()))
    assert kept == [["0.npy"]] * 2


# ---------------------------------------------------------------- what a run leaves


def test_scores_of_later_sets_and_differences_are_marked_as_in_sample(work, capsys):
    """The second set has the first one's train pages as val pages, and the other way round. Two
    pages may be one picture, and count as two."""
    shutil.copytree("s", "twins")
    first, second = labels.load_labels("twins", "val")
    shutil.copy(first.path, second.path)
    shutil.copytree("twins", "swapped")
    os.rename("swapped/train.json", "swapped/part.json")
    os.rename("swapped/val.json", "swapped/train.json")
    os.rename("swapped/part.json", "swapped/val.json")
    flags = "--data=twins,swapped", "--epochs=1", "--T_max=1"
    assert run(*flags, "--name=a") == 0
    scores = last("a")["scores"]
    assert scores["over"]["seen"] == {"trained": 2}
    assert scores["others"]["swapped"]["over"]["seen"] == {"trained": 6}
    capsys.readouterr()
    assert run(*flags, "--name=b", "--baseline=runs/a") == 0
    *_, gain, shown, _ = capsys.readouterr().out.splitlines()
    assert "too narrow, in sample: trained on 2 of them  cannot tell" in gain
    assert shown.endswith("over 6 pages, too narrow, in sample: trained on 6 of them")


def test_a_baseline_on_the_same_pages_in_another_order_is_compared_page_by_page(
    monkeypatch, capsys
):
    """Each page is better by .1; paired by place, the difference would have an interval."""
    digests = [f"{(7 * n) % 16:x}" for n in range(16)]
    scores, theirs = (
        {
            "hmean": 0.5,
            "digests": digests[::step],
            "labels": digests[::step],
            "groups": [f"{n}.png" for n in range(16)][::step],
            "pages": {f"{n}.png": low + n / 32 for n in list(range(16))[::step]},
        }
        for step, low in ((1, 0.3), (-1, 0.2))
    )
    monkeypatch.setattr(train, "load_last", lambda folder: {"scores": theirs, "epoch": 3})
    train.print_gain(scores, Path("x"))
    assert "[+0.1000, +0.1000] over 16 pages  better, vs epoch 3 of x" in capsys.readouterr().out


def test_a_baseline_on_other_pages_of_the_same_names_has_no_paired_difference(work, capsys):
    data.synth("other", 8, 9, size=96, words=4)
    flags = "--epochs=1", "--T_max=1"
    assert run(*flags, "--name=a") == 0
    assert run(*flags, "--data=other", "--name=b", "--baseline=runs/a") == 0
    assert last("a")["scores"]["pages"].keys() == last("b")["scores"]["pages"].keys()
    out = capsys.readouterr().out
    assert "baseline runs/a: no last epoch on these pages and labels; no paired difference" in out
    assert "baseline runs/a: scored on other pages or labels, so no difference by epoch" in out
    assert " of runs/a" not in out and "vs baseline" not in out


def test_a_baseline_that_was_scored_by_other_labels_has_no_paired_difference(work, capsys):
    """Corrected labels change the score of one and the same network."""
    shutil.copytree("s", "corrected")
    flags = "--epochs=1", "--T_max=1"
    assert run(*flags, "--data=corrected", "--name=a") == 0
    assert run(*flags, "--data=s", "--name=b", "--baseline=runs/a") == 0  # elsewhere, but the same
    assert ", vs epoch 1 of runs/a" in capsys.readouterr().out
    sheet = json.loads(Path("corrected/val.json").read_text())
    for image in sheet["images"].values():
        image["words"].popitem()
    Path("corrected/val.json").write_text(json.dumps(sheet))
    assert run(*flags, "--data=corrected", "--name=c", "--baseline=runs/a") == 0
    out = capsys.readouterr().out
    assert "baseline runs/a: no last epoch on these pages and labels; no paired difference" in out
    assert " of runs/a" not in out


def test_a_finished_run_that_recorded_no_labels_is_compared(whole, capsys):
    """As versions before its record did; it ended in a KeyError."""
    shutil.copytree("runs/whole", "runs/old")
    state = torch.load("runs/old/last.pt")
    del state["scores"]["labels"]
    train.save_checkpoint("runs/old/last.pt", state)
    for name, other in (("old", "whole"), ("whole", "old")):
        assert resume(name, f"--baseline=runs/{other}") == 0
        assert f", vs epoch 4 of runs/{other}\n" in capsys.readouterr().out


def test_what_a_run_prints_and_evaluate_says_are_the_digits_of_the_log(work, capsys):
    (work / "log.csv").write_text("epoch,hmean\n9,nan\n10,0.25\n")  # --rescore leaves a nan
    flags = ("--epochs=10", "--T_max=10", *LEARNS, "--baseline=.")
    (work / "learned.json").write_text("{}")
    assert run("--hparams", "learned.json", *flags) == 0
    rows, out = logged("runs/learned"), capsys.readouterr().out
    best = last("learned")["best"]
    row = rows[best["epoch"]]
    assert row["hmean"] == best["hmean"] == max(r["hmean"] for r in rows.values()) > 0.1
    assert f"best hmean {best['hmean']:.4f} epoch {best['epoch']}" in out
    assert f"vs baseline {rows[10]['hmean'] - 0.25:+.4f}" in out and "+nan" not in out
    assert "baseline .: no last epoch on these pages and labels; no paired difference" in out
    assert evaluate.main(["runs/learned/best.pt", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for key in ("precision", "recall", "hmean"):
        assert result[key] == row[key]
    assert result["interval"] == [row["hmean_lo"], row["hmean_hi"]]


def test_run_folder(whole):
    names = {"hparams.json", "log.csv", "pictures", "last.pt", "prev.pt", "best.pt"}
    assert {p.name for p in whole.iterdir()} == names
    assert len(list((whole / "pictures").glob("*.jpg"))) == 2
    best = torch.load(whole / "best.pt", weights_only=True)
    assert set(best) == {"model", "hparams", "epoch", "scores", "origin"}
    assert best["hparams"] == files.read_json(whole / "hparams.json")
    train_pages, val_pages = (labels.load_labels("s", split) for split in ("train", "val"))
    assert set(best["scores"]["pages"]) == {p.name for p in val_pages}
    digests = {pictures.picture_digest(p.path) for p in train_pages}
    assert set(best["origin"]["trained"]) == digests and not best["origin"]["unknown"]
    assert set(best["origin"]["chosen"]) == {pictures.picture_digest(p.path) for p in val_pages}
    assert last("whole")["origin"] == best["origin"] | {"chosen": []}


def test_init_begins_a_run_that_needs_it_no_more_and_knows_its_pages(whole, work, capsys):
    """Other pages, another folder, the old pictures under new names; a teacher without a record is
    said to be unknown."""
    data.synth("other", 4, 9, size=96, words=4)
    shutil.copy(whole / "best.pt", "begin.pt")
    state = torch.load("begin.pt", weights_only=True)
    train.save_checkpoint("old.pt", {k: v for k, v in state.items() if k != "origin"})
    flags = "--data=other --init=begin.pt --teacher=old.pt --lr=1e-9 --eta-min=0 --epochs=2"
    assert run("--name=child", *flags.split(), "--stop-epoch=1") == 0
    unknown = "pages that old.pt trained on, and that chose its epoch, are not known"
    key = "shrink_head.0.weight"
    assert f"warning: old.pt: {unknown}" in capsys.readouterr().err
    child = last("child")
    torch.testing.assert_close(child["model"][key], state["model"][key], atol=1e-6, rtol=0)
    (work / "begin.pt").write_bytes(b"")  # or gone
    assert resume("child") == 0
    assert last("child")["epoch"] == 2 and last("child", "prev.pt")["epoch"] == 1
    assert last("child")["origin"] == child["origin"] and child["origin"]["chosen"]
    capsys.readouterr()
    shutil.copytree("s", "renamed")
    for split, word in (("train", "trained on 6 of these"), ("val", "epoch chosen on 2 of these")):
        read = files.read_json(f"renamed/{split}.json")["images"]
        for name in read:
            os.rename(f"renamed/images/{name}", f"renamed/images/r{name}")
        write_labels(work / "renamed", {f"r{name}": read[name] for name in read}, split)
        assert evaluate.main(["runs/child/last.pt", "--data", "renamed", "--split", split]) == 0
        said = capsys.readouterr().err
        assert word in said and unknown in said


def test_train_pages_that_were_never_labelled_are_named(work, capsys):
    """They train as pages without text: pictures that are to be predicted, say."""
    data.synth("bare", 4, 9, size=96, words=4)
    sheet = json.loads(Path("bare/train.json").read_text())
    sheet["images"] = {name: {} for name in sheet["images"]}
    Path("bare/train.json").write_text(json.dumps(sheet))
    assert run("--data=s,bare", "--epochs=1", "--T_max=1", "--name=bare") == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "label" in line]
    assert warning.startswith("warning: bare: none of its train pages has a label")


def test_a_run_on_two_sets_is_scored_by_set_and_is_worth_what_the_first_says(work, capsys):
    """Pages of the other set have the names of the first's."""

    def evaluated(*flags):
        assert evaluate.main(["runs/two/last.pt", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["hmean"]

    def digests(split, *sets):
        pages = [page for name in sets for page in labels.load_labels(name, split)]
        return sorted(pictures.picture_digest(page.path) for page in pages)

    data.synth("other", 4, 9, size=96, words=4)
    flags = ("--data=s,other", "--epochs=8", "--T_max=8", *LEARNS, "--name=two")
    assert run(*flags, "--stop-epoch=7") == 0
    out = capsys.readouterr().out
    says = ["sets s,other: the run's value is that of s", "train 9 pages", "val   2 pages"]
    assert [text for text in (*says, "val of other 1 pages") if text not in out] == []
    assert train.main(["--name=two", "--resume", "--data=other,s"]) == 2
    what = "data is 's,other' in run two and cannot become 'other,s'"
    error_line(capsys.readouterr().err, what)
    assert resume("two") == 0
    lines = capsys.readouterr().out.splitlines()
    state, rows = last("two"), logged("runs/two")
    assert (
        rows[8]["hmean"] == state["scores"]["hmean"] == evaluated() == evaluated("--data=s") > 0.1
    )
    hmean = state["scores"]["others"]["other"]["hmean"]
    assert hmean == pytest.approx(evaluated("--data=other"))
    ends = state["scores"]["interval"]
    beside = f"hmean {rows[8]['hmean']:.4f} [{ends[0]:.4f}, {ends[1]:.4f}] over 2 pages, too narrow"
    beside += f"; other {train.scores_line(state['scores']['others']['other'])}"
    assert beside.endswith(" over 1 pages, too narrow")
    assert [beside in line for line in lines if line.startswith("epoch   8/8")] == [True]
    assert f"last {beside}" == lines[-2]
    assert lines[-1].endswith(" (chosen on these same pages, so optimistic)")
    assert state["best"]["hmean"] == max(row["hmean"] for row in rows.values())
    assert state["scores"]["pages"].keys() == {p.name for p in labels.load_labels("s", "val")}
    origin = last("two", "best.pt")["origin"]
    assert origin["trained"] == digests("train", "s", "other")
    assert origin["chosen"] == digests("val", "s")
    assert evaluate.main(["runs/two/best.pt", "--data=s,other"]) == 2
    error_line(capsys.readouterr().err, "s,other: several sets; name one")


def test_a_fold_is_named_as_all_folds_are_and_a_run_is_resumed_by_its_folder(work, capsys):
    folds = "--folds=2", "--fold=2", "--epochs=2", "--T_max=2"
    assert run("--name=r8", *folds, "--stop-epoch=1") == 0
    assert "run folder runs/r8-fold2" in capsys.readouterr().out
    assert train.main(["--resume", "runs/r8-fold2", "--stop-epoch=1"]) == 0
    assert "resuming runs/r8-fold2 after epoch 1" in capsys.readouterr().out
    assert run("--name=r8", *folds, "--resume") == 0
    assert last("r8-fold2")["epoch"] == 2
    assert train.main(["--resume", "runs/r8-fold2/last.pt"]) == 0
    (work / "h.json").write_text("{}")
    assert run("--hparams=h.json", *folds, "--stop-epoch=1") == 0
    names = {path.name for path in Path("runs").iterdir() if path.is_dir()}
    assert names == {"r8-fold2", "h-fold2"}
    sweep = train.parse_args(["--name=sweep/trial-001", "--fold=2"])
    assert sweep.name == "sweep/trial-001"


class Log(io.StringIO):
    """What stderr is where there is no terminal."""


def test_where_there_is_no_terminal_lines_say_how_far_it_is(monkeypatch):
    log = Log()
    monkeypatch.setattr(sys, "stderr", log)
    assert [*progress.progress(range(3), "quick")] == [0, 1, 2] and log.getvalue() == ""
    monkeypatch.setattr(progress, "EVERY", 0.05)
    for _ in progress.progress(range(6), "slow", 6):
        time.sleep(0.04)
    lines = log.getvalue().replace("\r", "").splitlines()
    assert 2 <= len(lines) <= 5
    assert all(re.fullmatch(r"slow: [1-6] of 6, 00:00 so far, 00:0\d left", s) for s in lines)
    monkeypatch.setattr(log, "isatty", lambda: True, raising=False)
    for _ in progress.progress(range(2), "bar"):
        pass
    assert "bar:   0%|" in log.getvalue()
    monkeypatch.setattr(sys, "stderr", None)  # 2>&-
    assert [*progress.progress(range(3), "closed")] == [0, 1, 2]


def test_names_count_up(work):
    for expected in ("small", "small-2", "small-3"):
        assert train.name_run(hparams.Hparams(), "small").name == expected
        Path("runs", expected).mkdir(parents=True)


def wandb_rows(path):
    """History of an offline run by W&B's own protocol buffers, once its end is written: records in
    LevelDB's log format, parts (CRC32, size, kind, bytes) in blocks of 32 KiB."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    raw, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        size, kind = struct.unpack_from("<HB", raw, at + 4)
        record, at = record + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4) and at <= len(raw):  # whole, or the last part
            parsed, record = pb.Record.FromString(record), b""
            items = parsed.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            if parsed.HasField("exit"):
                return [row for row in rows if "val/hmean" in row]
        room = 2**15 - at % 2**15
        at += room if room < 7 else 0  # the rest of a block is padding


def test_mirrors_hold_the_numbers_of_log_csv(work, monkeypatch, capsys):
    """As a W&B agent starts it, paused and resumed: each epoch once, under the same id."""
    wandb = pytest.importorskip("wandb")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for key, text in (("MODE", "offline"), ("SWEEP_ID", "s1"), ("RUN_ID", "run-7")):
        monkeypatch.setenv(f"WANDB_{key}", text)
    assert run("--log=tensorboard", "--ema=True", "--stop-epoch=1") == 0
    assert resume("run-7", "--artifact") == 0
    wandb.finish()
    (folder,) = (work / "runs/run-7").glob("wandb/offline-run-*")
    kept = folder.relative_to(work)
    assert f"wandb: {kept}; to send it: wandb sync {kept}\n" in capsys.readouterr().out
    (path,) = (work / "runs/run-7").glob("wandb/offline-run-*/run-run-7.wandb")
    rows = wait_for("W&B's last record", lambda: wandb_rows(path))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    board = events.EventAccumulator("runs/run-7/tensorboard").Reload()
    assert len(board.Tags()["images"]) == 2
    for tag in ("val/hmean", "val/hmean_lo", "train/loss", "train/lr", "train/seconds"):
        column = [row[tag.split("/")[1]] for row in logged("runs/run-7").values()]
        assert [row[tag] for row in rows] == column
        shown = [(e.step, e.value) for e in board.Scalars(tag)]
        assert shown == [(k, pytest.approx(x, rel=1e-6)) for k, x in enumerate(column, 1)]


def test_a_mirror_whose_package_is_gone_is_named_with_the_way_to_go_on(whole, monkeypatch, capsys):
    """The run has a mirror and continues on another machine, without --log."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (whole / "tensorboard").mkdir()
    assert resume("whole") == 2
    error_line(capsys.readouterr().err, "--log, runs/whole: ", "remove the mirror's folder there")
    (whole / "tensorboard").rmdir()
    assert resume("whole") == 0


# ---------------------------------------------------------------- parts of a step


@pytest.mark.parametrize("t_max", [20, 22, 24])
def test_schedule_is_torchs_cosine_after_a_linear_warm_up(t_max):
    hp = hparams.Hparams(lr=5e-4, eta_min=6e-6, T_max=t_max, warmup=2.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t_max, 6e-6)
    for epoch in range(22):
        for done, share in ((0.5, 0.25), (2, 1), (9, 1)):
            expected = pytest.approx(share * schedule.get_last_lr()[0], rel=1e-9)
            assert train.learning_rate(hp, epoch, done) == expected
        optimizer.step()
        schedule.step()


def test_ema_is_a_moving_average():
    ema, weight, expected = [torch.zeros(2)], [torch.ones(2)], 0.0
    for step in (0, 1, 50, 10**5):
        train.update_ema(ema, weight, step)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
        assert ema[0].tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize(
    "t_max, word", [(4, ""), (2, "lr ends at 1.5e-03, in"), (8, "lr ends at 2.1e-03, in")]
)
def test_schedules_that_do_not_end_with_the_run_are_named(t_max, word, capsys):
    train.check_schedule(hparams.Hparams(lr=3e-3, epochs=4, T_max=t_max))
    out = capsys.readouterr().out
    assert word in out and bool(word) == bool(out)


def small_trainer(**values):
    network = {"backbone": "test_efficientnet", "pretrained": "none", "neck": 16}
    return train.Trainer(hparams.Hparams(**(network | values)), CPU, NO_PAGES, {})


class TinyBackbone(torch.nn.Module):
    """A depthwise convolution and one of stride 4, 2, 2, 2: quickly compiled."""

    def __init__(self):
        super().__init__()
        self.default_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        convs = [torch.nn.Conv2d(3, 4, 3, 4, 1)]
        convs += [torch.nn.Conv2d(4, 4, 3, 2, 1, groups=4) for _ in range(3)]
        self.convs = torch.nn.ModuleList(convs)

    def forward(self, x):
        return [x := conv(x) for conv in self.convs]


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_compiled_once_for_all_canvases(monkeypatch):
    """Inductor itself: one graph forward and one backward, and eager's losses and gradients; the
    first canvas, as of a rehearsal, is a square."""
    from torch._inductor.graph import GraphLowering

    backbone = TinyBackbone(), [0, 1, 2, 3], [4] * 4
    monkeypatch.setattr("dbnet.make_backbone", lambda *_: copy.deepcopy(backbone))
    for name in ("force_layout_optimization", "fx_graph_cache"):  # the first is put back
        monkeypatch.setattr(f"torch._inductor.config.{name}", False)
    monkeypatch.setattr("torch.fx.experimental._config.use_duck_shape", True)
    monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
    monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)  # compiles sooner
    graphs = []
    before(monkeypatch, GraphLowering, "compile_to_module", graphs.append)
    plain, compiled = (small_trainer(compile=c) for c in (False, True))
    for height, width in ((128, 128), (96, 128), (128, 96), (96, 160), (160, 128)):
        pages = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
        maps = torch.randint(0, 2, (2, 4, height, width), dtype=torch.uint8)
        losses = [trainer.loss_of(pages, maps)[0] for trainer in (plain, compiled)]
        sum(losses).backward()
        torch.testing.assert_close(*losses)
    assert len(graphs) == 2
    for a, b in zip(plain.model.parameters(), compiled.model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_is_clipped_and_frozen_batch_norm_keeps_its_statistics(frozen):
    trainer = small_trainer(freeze_bn=frozen, clip=1e-3)
    old, new = copy.deepcopy(trainer.model.state_dict()), trainer.model.state_dict()
    trainer.train_mode()
    maps = torch.ones(2, 4, 64, 64, dtype=torch.uint8)
    trainer.train_step(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), maps, 1e-3, 0)
    assert {torch.equal(new[key], old[key]) for key in old if "running" in key} == {frozen}
    norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_rehearsal_takes_a_step_s_memory_and_moves_nothing(frozen):
    trainer = small_trainer(freeze_bn=frozen)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    seen, random = [], torch.get_rng_state()
    handle = trainer.model.register_forward_hook(lambda _, pages, __: seen.append(pages[0].shape))
    trainer.rehearse(2, 64, 96)
    handle.remove()
    assert seen == [(2, 64, 96, 3)] and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[key], v) for key, v in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters()) and not trainer.optimizer.state


def test_a_rehearsal_takes_the_memory_of_adam_s_moments_unless_they_are_there(monkeypatch):
    trainer, taken = small_trainer(), []
    before(monkeypatch, torch, "empty_like", taken.append)
    count = len([*trainer.model.parameters()])
    trainer.rehearse(1, 64, 64)
    assert len(taken) == 2 * count
    maps = torch.ones(1, 4, 64, 64, dtype=torch.uint8)
    trainer.train_step(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), maps, 1e-3, 0)
    taken.clear()
    trainer.rehearse(1, 64, 64)
    assert not taken


def test_a_rehearsed_run_is_the_same_run(whole, monkeypatch):
    def rehearse(trainer, *_):
        trainer.rehearse(2, 96, 96)

    before(monkeypatch, train, "train_run", rehearse)
    assert run("--name", "rehearsed") == 0
    assert_same_as_whole("rehearsed")


def test_loader_processes_start_before_the_rehearsal_and_end_by_themselves(whole, monkeypatch):
    """A GPU's run, emulated: its loader processes are at work when it rehearses, and none is left
    to be killed when the loader is gone."""
    seen = []

    def emulate(trainer, options, stop):
        options.device = SimpleNamespace(type="cuda")

    def note(word):
        return lambda *_: seen.append((word, len(torch.multiprocessing.active_children())))

    loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    before(monkeypatch, train, "train_run", emulate)
    before(monkeypatch, train.Trainer, "rehearse", note("rehearse"))
    before(monkeypatch, loader, "_shutdown_workers", note("shut down"))
    before(monkeypatch, multiprocessing.process.BaseProcess, "kill", note("kill"))
    assert run("--name", "rehearsed", "--workers=2") == 0
    assert seen[:2] == [("rehearse", 2), ("shut down", 2)]
    assert "kill" not in [word for word, _ in seen]
    assert_same_as_whole("rehearsed")


def test_a_loader_leaves_a_core_to_the_trainer_and_counts_its_share_of_a_batch(monkeypatch):
    hp, gpu = hparams.Hparams(batch=64, size=1024), SimpleNamespace(type="cuda")
    monkeypatch.setattr(cv2, "getNumberOfCPUs", lambda: 12)
    loader = train.make_loader(standing(hp, epoch=hp.epochs), gpu)
    assert (loader.num_workers, loader.prefetch_factor) == (11, 1)
    monkeypatch.setattr(train, "process_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    loader = train.make_loader(standing(hp, epoch=hp.epochs), gpu)
    assert (loader.num_workers, loader.prefetch_factor) == (2, 4)


def test_a_gpu_gets_fewer_canvases_for_the_same_batches_resumed_or_not(monkeypatch):
    monkeypatch.setattr(data, "Receipts", lambda pages, *_: pages)
    rng = np.random.default_rng(0)
    sizes = rng.integers(500, 2000, (400, 2)).tolist()
    pages = train.RunPages([labels.Page("", None, size=tuple(size)) for size in sizes], [], {}, {})
    hp = hparams.Hparams(fit="area", size=832, epochs=2)

    def batches(kind, step=0):
        trainer = standing(hp, pages)
        trainer.step = step
        return train.make_loader(trainer, SimpleNamespace(type=kind)).batch_sampler

    gpu, cpu = batches("cuda"), batches("cpu")
    assert cpu == [b for epoch in (0, 1) for b in data.epoch_batches(pages.train, hp, epoch)]
    assert [[key[:2] for key in b] for b in gpu] == [[key[:2] for key in b] for b in cpu]
    assert len({b[0][2:] for b in gpu}) < len({b[0][2:] for b in cpu})
    assert batches("cuda", 7) == gpu[7:]
    hp = hparams.Hparams(fit="longer", size=832, epochs=2)  # few canvases, and any padding counts
    assert batches("cuda") == batches("cpu")


def kind_of(amp, _):
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


@pytest.mark.parametrize("first, then", list(itertools.permutations(["off", "bf16", "fp16"], 2)))
def test_a_run_goes_on_in_another_number_type(work, first, then, monkeypatch):
    """Types that a GPU would use, emulated on the CPU; fp16 alone scales its loss."""
    monkeypatch.setattr(engine, "amp_dtype", kind_of)
    monkeypatch.setattr(train, "amp_dtype", kind_of)
    flags = "--name=types", "--stop-epoch=1", "--epochs=2", "--size=64"
    assert run(*flags, f"--amp={first}") == 0
    assert bool(last("types")["scaler"]) == (first == "fp16")
    assert resume("types", f"--amp={then}") == 0
    assert bool(last("types")["scaler"]) == (then == "fp16")
    rows = logged("runs/types")
    assert rows.keys() == {1, 2} and 0 < rows[2]["loss"] < rows[1]["loss"]


def test_a_run_goes_on_compiled_or_not(whole, capsys):
    """The next machine may lack a compiler."""
    assert resume("whole", "--compile", "--print-hparams") == 0
    assert json.loads(capsys.readouterr().out)["compile"] is True


def test_loss_outliers_are_flagged(capsys):
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.epoch, trainer.losses, trainer.failed, trainer.steps = 0, [], [], 21
    train.fetch_losses(trainer, [torch.ones(4)] * 20 + [torch.full((4,), 3.5)])
    (line,) = capsys.readouterr().out.splitlines()
    assert "loss 3.500 in epoch 1, step 21 is above 3 times its running median" in line


# ---------------------------------------------------------------- values, and whatever goes wrong


def resolved(capsys, *flags):
    assert train.main([*flags, "--print-hparams"]) == 0
    return json.loads(capsys.readouterr().out)


def test_order_of_values_and_spellings(work, capsys):
    (work / "h.json").write_text('{"lr": 1e-3, "batch": 4, "T_max": 9}')
    hp = resolved(capsys, "--hparams", "h.json", "--batch", "16", "--weight_decay=0.5", "--T-max=3")
    assert (hp["lr"], hp["batch"], hp["weight_decay"], hp["T_max"]) == (1e-3, 16, 0.5, 3)
    assert resolved(capsys, "--weight-decay", "0.25")["weight_decay"] == 0.25
    assert resolved(capsys, "--ema=false")["ema"] is False
    assert resolved(capsys, "--ema=true", "--compile")["compile"] is True
    hp = resolved(capsys, "--no-ema", "--no-pretrained")
    assert hp["ema"] is False and hp["pretrained"] == "none"
    assert set(resolved(capsys)) == set(hparams.FIELDS)


@pytest.mark.parametrize("name", ["baseline", "run8", "run3", "run7", "quickstart"])
def test_shipped_hparams_are_valid(name, capsys):
    hp = resolved(capsys, "--hparams", str(ROOT / "hparams" / f"{name}.json"))
    assert hp["backbone"] == "efficientnet_b4"
    run8 = {"lr": 0.0005134333170096499, "weight_decay": 6.797303101020006e-05, "epochs": 22}
    run8 |= {"eta_min": 6.388390006720873e-06, "T_max": 24, "thresh": 0.29, "box_thresh": 0.25}
    run8 |= {"max_candidates": 600, "mode": "polygon"}
    assert name != "run8" or run8.items() <= hp.items()


@pytest.mark.parametrize(
    "code, given, line",
    [
        (2, '{"learning_rat": 1}', "h.json: unknown key 'learning_rat'"),
        (2, '{"lr": %s}' % ("9" * 400), f"lr = {'9' * 77}... is not a number"),
        (2, '{"name": "a\\nb"}', "name = 'a\\nb' is not a line of text"),
        (2, '{"weigth_decay": 1}', "unknown key 'weigth_decay'; did you mean weight_decay"),
        (2, '{"lr": "fast"}', "h.json: lr = 'fast' is not a number"),
        (2, '{"lr": -1}', "lr = -1 is not within"),
        (2, '{"lr": NaN}', "lr = nan is not within"),
        (2, '{"batch": 2.5}', "batch = 2.5 is not a whole number"),
        (2, '{"ema": 1}', "ema = 1 is not true or false"),
        (2, '{"mode": "quad"}', "mode = 'quad' is not one of polygon, box"),
        (2, '{"size": 100}', "h.json and flags: size = 100 is not a multiple of 32"),
        (2, '{"lr": 1e-6}', "eta_min = 1e-05 is above lr"),
        (2, '{"folds": 3, "fold": 4}', "fold = 4, but folds = 3"),
        (2, '{"name": "../x"}', "leads out of runs/"),
        (1, "{oops", "h.json: not a JSON file"),
        (1, "[1]", "h.json: not a JSON object"),
        (2, "--name=whole", "runs/whole: exists; choose another name, or --resume"),
        (2, "--name=whole --resume --lr=1", "lr is 0.003 in run whole and cannot become 1.0"),
        (2, "--name=whole --resume", "another process is training there"),
        (2, "--name=other --resume", "runs/other/hparams.json: no such file"),
        (2, "--name=whole --resume --epochs=9", "epochs is 4 in run whole and cannot become 9; "),
        (2, "--resume runs/whole --lr=1", "--init runs/whole/last.pt begins with its weights"),
        (2, "--resume", "--resume: names no run; add --name"),
        (2, "--lr=1 runs/whole", "unrecognized arguments: runs/whole"),
        (2, "--data=s --init=runs/whole/best.pt", "use --backbone test_efficientnet --neck 64"),
        (2, "--fold=2 --print-hparams", "--fold: only with --folds N, in the command or its file"),
        (2, "--seeds=0", "--seeds: at least 1 is needed"),
        (2, "--seed=2147483647 --seeds=2", "seed = 2147483648 is not within 0 to 2147483647"),
        (2, "--fold=all", "--fold: only with --folds N, in the command or its file"),
        (2, "--name=a --seeds=2 --resume", "--resume: no run like a-seed0 has begun; leave it out"),
        (2, "--artifact --print-hparams", "--artifact: only with --log wandb"),
        (2, "--min-confidence=0.5", "--min-confidence: only with --pseudo-labels"),
        (2, "--teacher-weight=2", "--teacher-weight: only with --teacher"),
        (2, "--folds=2 --val-data=s", "--val-data: not with --folds, which hold pages out"),
        (2, "--init=runs/whole/last.pt --pretrained=timm", "--pretrained: not with --init"),
        (2, "--sync-bn", "--sync-bn: only under torchrun"),
        (2, '{"sync_bn": true, "compile": true}', "--sync-bn: not with --compile"),
        (2, "--name=whole --rescore", "--rescore: only with --resume; leave it out"),
        (2, "--data=s --teacher=none.pt", "none.pt: cannot be read"),
        (
            2,
            "--data=s --init=runs/whole",
            "runs/whole: is a folder; name a file in it, such as its",
        ),
        (1, "--data=s --baseline=other", "other/log.csv: not a log.csv of train.py"),
        (2, "--weigth_decay 1", "--weigth-decay 1; did you mean --weight-decay?"),
        (2, "--data=nowhere", "nowhere: no such file or folder"),
        (2, "--data=s,train.json --image-dir=s", "--image-dir: not with several sets"),
        (2, "--log=wandb", "pip install wandb"),
        (1, "--data=s", "no download (no route to host); use --pretrained PATH (a state dict"),
        (1, "--data=s --pseudo-labels=ignored.json", "labelled in s already"),
        (1, "--data=ignored.json --val-data=s/train.json", "no word in 2 train pages"),
        (1, "--data=s --val-data=listed.json", "listed.json: no word in 2 val pages; label them"),
        (1, "--data=s --pseudo-labels=listed.json", "listed.json: no word in 2 new pages; name a"),
    ],
)
def test_what_cannot_work_is_one_line(whole, work, code, given, line, monkeypatch, capsys):
    def refuse(*args, **options):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    word = {"points": [[0, 0], [50, 0], [50, 50], [0, 50]], "ignore": True}
    names = files.read_json("s/val.json")["images"]
    write_labels(work, {name: {"words": {"1": word}} for name in names}, "ignored")
    (work / "images").symlink_to("s/images")
    for name in ("new0.png", "new1.png"):  # a list of pictures, none of them labelled
        noise = np.random.default_rng(ord(name[3])).integers(0, 255, (96, 64, 3), np.uint8)
        write_picture(work, name, noise)
    write_labels(work, {"new0.png": {}, "new1.png": {}}, "listed")
    (work / "h.json").write_text(given)
    (work / "other").mkdir()
    (work / "other/log.csv").write_text("step,loss\n1,0.5\n")
    flags = given.split() if given.startswith("--") else ["--hparams=h.json"]
    with pytest.raises(SystemExit) as ended, files.lock(whole / "hparams.json"):
        sys.exit(train.main(flags))
    said = capsys.readouterr().err
    assert ended.value.code == code and error_line(said, line) == said.splitlines()[-1]
    assert list(whole.parent.iterdir()) == [whole]


def test_a_state_of_another_network_is_one_line(whole, capsys):
    state = last("whole")
    (whole / "prev.pt").unlink()
    for key, wrong in (("optimizer", {}), ("rows", [{"lr": "x"}]), ("model", {}), ("epoch", "x")):
        train.save_checkpoint(whole / "last.pt", state | {key: wrong})
        assert resume("whole") == 1
        error_line(capsys.readouterr().err, "last.pt")


def spoil_weights(trainer, *_):
    if trainer.epoch and trainer.step:
        next(trainer.model.parameters()).data[0] = torch.nan


def fill_memory(trainer, *_):
    if trainer.epoch:
        raise torch.OutOfMemoryError("CUDA out of memory")


def fill_disk(path, state):
    if path.name == "last.pt" and state["epoch"] == 2:
        raise OSError(28, "No space left on device", str(path))


def lose_loader(dataset, key):
    if key[0] == 1:  # the epoch, from 0
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")


@pytest.mark.parametrize(
    "place, act, code, line",
    [
        (STEP, spoil_weights, 4, "epoch 2, step 2 of 3: loss is nan; lower --lr"),
        ((train, "finish_epoch"), spoil_weights, 4, "epoch 2: weights are not finite"),
        (STEP, fill_memory, 3, "out of memory; lower --size (and --batch)"),
        ((train, "save_checkpoint"), fill_disk, 1, "last.pt: No space left on device"),
        ((data.Receipts, "__getitem__"), lose_loader, 137, "a loader process: was killed"),
    ],
)
def test_epoch_2_ends_in_one_line_and_1_is_kept(work, place, act, code, line, monkeypatch, capsys):
    before(monkeypatch, *place, act)
    assert run("--name", "ended") == code
    error_line(capsys.readouterr().err, line)
    wait_for("the save of epoch 1", (work / "runs/ended/log.csv").exists)
    assert last("ended")["epoch"] == 1


def standing(hp, pages=NO_PAGES, epoch=0):
    """What `make_loader` asks of a Trainer at the start of an epoch."""
    return SimpleNamespace(hp=hp, pages=pages, epoch=epoch, step=0, folder=Path("runs/x"))


def test_loader_processes_leave_the_stop_signals_to_the_trainer(work, monkeypatch):
    for owner, name in ((cv2, "setNumThreads"), (torch, "set_num_threads")):
        monkeypatch.setattr(owner, name, int)  # this process keeps its threads
    monkeypatch.setattr(processes, "follow_trainer", int)  # and has no trainer
    hp = hparams.Hparams()
    train.make_loader(standing(hp, epoch=hp.epochs), CPU).worker_init_fn(0)
    assert {signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_IGN}


def test_what_is_wrong_for_all_folds_is_said_once(work, capsys):
    write_labels(work, files.read_json("s/train.json")["images"])
    flags = "--data=train.json", "--image-dir=s/images", "--folds=50", "--fold=all", "--name=many"
    assert run(*flags) == 2
    out, err = capsys.readouterr()
    assert err.count("error: folds: 50 of") == err.count("error: ") == 1 and "failed" not in out


def test_folds_of_which_none_began_are_not_to_be_resumed(work, capsys):
    """--resume would be refused: no run like none-fold1 has begun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "run_pages", Mock(side_effect=KeyboardInterrupt))
        assert run("--folds=2", "--fold=all", "--name=none") == 130
    line = "for all of these runs: the same command, with --resume if one of them"
    assert line in capsys.readouterr().out


def test_faults_of_the_data_are_said_once_and_not_for_each_fold(work, capsys):
    write_labels(work, {"gone.png": {"words": {}}, "lost.png": {"words": {}}})
    assert run("--data=train.json", "--folds=5", "--fold=all", "--name=many") == 1
    out, err = capsys.readouterr()
    assert err.count("error: ") == 2 and "failed" not in out


def test_a_fold_that_another_process_trains_does_not_stop_the_others(work, capsys):
    write_labels(work, files.read_json("s/train.json")["images"])
    flags = "--data=train.json", "--image-dir=s/images", "--folds=2", "--fold=all", "--epochs=2"
    flags = *flags, "--name=busy"
    assert run(*flags, "--stop-epoch=1") == 0
    with files.lock_folder(Path("runs/busy-fold1"), "hparams.json", train.BUSY):
        assert run(*flags, "--resume") == 1
    out, err = capsys.readouterr()
    assert "another process is training there" in err and "failed: busy-fold1" in out
    assert last("busy-fold1")["epoch"] == 1 and last("busy-fold2")["epoch"] == 2


def test_a_log_csv_that_a_spreadsheet_wrote_does_not_stop_the_runs_after_it(work, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "train_one", lambda hp, *_: trained.append(hp.name))
    monkeypatch.setattr(train, "report_members", list)
    for seed, log in enumerate(("epoch;hmean\n4;0,5\n", "epoch,hmean\n4,0.5\n", "epoch,hmean\n")):
        hp = hparams.Hparams(name=f"r-seed{seed}", seed=seed, epochs=4)
        files.write_json(f"runs/{hp.name}/hparams.json", dataclasses.asdict(hp))
        Path("runs", hp.name, "log.csv").write_text(log)
    assert resume("r", "--seeds=3") == 0
    assert trained == ["r-seed0", "r-seed2"]


def test_all_folds_hold_each_page_out_once_and_go_on_with_the_same(work, monkeypatch, capsys):
    def curse(hp):
        if hp.fold == 2:
            raise files.DataError("s", "fold 2 is cursed")

    images = files.read_json("s/train.json")["images"]
    write_labels(work, images)
    flags = ("--data=train.json", "--image-dir=s/images", "--epochs=1", "--folds=3", "--fold=all")
    with monkeypatch.context() as patch:
        before(patch, data, "run_pages", curse)
        assert run("--name=cv", *flags) == 1
    assert "failed: cv-fold2" in capsys.readouterr().out
    assert run("--name=cv", *flags) == 2
    error_line(capsys.readouterr().err, "exists; choose another name, or --resume to go on")
    assert train.main(["--name=cv", "--folds=3", "--fold=all", "--resume"]) == 0  # their own values
    out = capsys.readouterr().out
    assert "runs/cv-fold1 is finished" in out and "runs/cv-fold3 is finished" in out
    states = [last(f"cv-fold{k}") for k in (1, 2, 3)]
    held = [state["scores"]["pages"] for state in states]
    mean = np.mean([hmean for pages in held for hmean in pages.values()])
    assert "last hmean of 3 runs: mean " in out and f"out of fold: hmean {mean:.4f} [" in out
    assert re.search(r"out of fold: .* \[0\.\d+, 0\.\d+\] over 6 (pages|groups), too narrow\n", out)
    assert all(
        f"cv-fold{k}  last {train.scores_line(states[k - 1]['scores'])}\n" in out for k in (1, 2, 3)
    )
    assert sorted(name for names in held for name in names) == sorted(images)
    (digest,) = {state["hparams"].split for state in states}
    split = files.read_json(f"runs/split-{digest}.json")["images"]
    assert all(name in held[split[name]["fold"] - 1] for name in images)
    (work / "runs/cv-fold3/last.pt").rename("kept.pt")
    assert run("--name=cv", *flags, "--resume") == 1
    error_line(capsys.readouterr().err, "runs/cv-fold3: no last.pt, so no score; put it back")
    (work / "kept.pt").rename("runs/cv-fold3/last.pt")
    assert run("--name=cv", *flags, "--resume", "--lr=0.1") == 2
    error_line(capsys.readouterr().err, "lr is 0.003 in run cv-fold1 and cannot become 0.1")
    images.popitem()
    write_labels(work, images)
    assert resume("cv-fold1") == 1
    error_line(capsys.readouterr().err, "its pages make split")
    # its values are good for a new run, on other pages too
    assert train.main(["--hparams=runs/cv-fold1/hparams.json", "--name=new"]) == 0
    assert last("new")["hparams"].split not in ("", digest)


def test_a_run_that_began_with_the_values_of_another_goes_on_by_the_same_command(
    tmp_path, monkeypatch
):
    """A sweep gives a trial all its flags again. What a run finds for itself is not compared."""
    monkeypatch.chdir(tmp_path)
    other = {"lr": 2e-3, "split": "0a", "text_height": 20.0}
    found = {"split": "0b", "text_height": 31.5}
    files.write_json(tmp_path / "other.json", other)
    files.write_json(tmp_path / "runs/t/hparams.json", {"name": "t", **other, **found})
    args = command.trainer_parser().parse_args(["--hparams=other.json", "--name=t", "--resume"])
    hp = train.resolve_run(args)
    assert (hp.lr, hp.split, hp.text_height) == (2e-3, "0b", 31.5)


def test_a_finished_run_whose_pages_have_changed_since_is_named(work, capsys):
    """The mean of two replicas was that of scores on different labels, without a word."""
    shutil.copytree("s", "own")
    flags = "--data=own", "--epochs=1", "--T_max=1", "--seeds=2", "--name=r"
    assert run(*flags) == 0
    assert "warning: runs/r-seed" not in capsys.readouterr().out
    images = files.read_json("own/val.json")["images"]
    name, page = next(iter(images.items()))
    page["words"].popitem()
    write_labels(work / "own", images, "val")
    assert resume("r-seed1", "--rescore") == 0
    capsys.readouterr()
    assert run(*flags, "--resume") == 0
    line = f"runs/r-seed1: not on the pages of r-seed0: own/images/{name} labels changed"
    assert f"warning: {line}; --rescore scores" in capsys.readouterr().out


def test_folds_that_are_scored_anew_are_all_on_the_pages_of_now(work, capsys):
    """That fold whose val pages are as they were kept its record, and the warning came for good."""
    write_labels(work, files.read_json("s/train.json")["images"])
    flags = "--data=train.json", "--image-dir=s/images", "--epochs=1", "--T_max=1", "--folds=2"
    flags += "--fold=all", "--name=r"
    assert run(*flags) == 0
    images = files.read_json("train.json")["images"]
    words = next(iter(images.values()))["words"]
    words[min(words)]["transcription"] = "corrected"  # which does not change the folds
    write_labels(work, images)
    assert run(*flags, "--resume", "--rescore") == 0
    out = capsys.readouterr().out
    assert out.count("scored anew") == out.count("keeps its scores") == 1
    assert "not on the pages of" not in out


def test_pseudo_labels_add_pages_and_mask_what_is_uncertain(work, capsys):
    data.synth("extra", 4, 7, size=96, words=4)
    images = {}
    for page in labels.load_labels("extra", "train"):
        os.rename(page.path, f"extra/images/new_{page.name}")
        points = [p.tolist() for p in page.polygons]
        words = {i: {"points": p, "confidence": 0.9} for i, p in zip(page.ids, points)}
        words[page.ids[0]]["confidence"] = 0.5
        images[f"new_{page.name}"] = {"words": words}
    write_labels(work / "extra", images, "p")
    assert run("--pseudo-labels", "extra/p.json", "--epochs", 1, "--name", "p") == 0
    out = capsys.readouterr().out
    assert "pseudo 3 pages" in out and "3 ignored" in out and "train 9 pages" in out
    assert "warning: extra" not in out
    state = last("p")
    assert state["hparams"].pseudo_labels == "extra/p.json"
    assert state["origin"]["unknown"] == ["extra/p.json"]  # who knows what made them
    new = {pictures.picture_digest(path) for path in Path("extra/images").glob("new_*")}
    assert new <= {*state["origin"]["trained"]}
    flags = "--pseudo-labels=extra/p.json", "--min-confidence=0.95", "--epochs=1"
    assert run(*flags, "--name=p2", "--T_max=1") == 0
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("warning: extra")]
    assert line.endswith(" 100% of its words are don't care; lower --min-confidence 0.95")


def test_suspects_are_of_labelled_pages_not_of_pseudo_labelled_ones_of_their_names(work, capsys):
    """Such a run was refused, or a page of its own lost the labels where a val page is doubted."""
    data.synth("extra", 4, 7, size=96, words=4)
    page, other = labels.load_labels("s", "train")[0], labels.load_labels("extra", "train")[0]
    words = {"1": {"points": other.polygons[0].tolist(), "confidence": 0.9}}
    os.rename(other.path, f"extra/images/{page.name}")
    write_labels(work / "extra", {page.name: {"words": words}}, "p")
    points = page.polygons[0].tolist()
    suspect = {"page": page.name, "probability": 0.9, "points": points, "proposed": None}
    Path("suspects.json").write_text(json.dumps([suspect]))
    flags = "--pseudo-labels=extra/p.json", "--doubt=suspects.json", "--epochs=1", "--T_max=1"
    assert run(*flags, "--name=d") == 0
    out = capsys.readouterr().out
    assert "pseudo 1 pages" in out and "doubt 1 suspects of suspects.json" in out


def test_replicas_differ_by_seed_alone_and_learn_the_map_of_teachers(whole, capsys):
    logits, target = torch.randn(2, 2, 8, 8), torch.rand(2, 8, 8)
    p = logits[:, 0].sigmoid()
    direct = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(train.teacher_loss(logits, target), direct)
    teachers = "runs/whole/best.pt,runs/whole/last.pt"
    assert run("--teacher", teachers, "--epochs", 1, "--seeds", 2, "--name", "r") == 0
    out = capsys.readouterr().out
    a, b = last("r-seed0"), last("r-seed1")
    mean = (a["scores"]["hmean"] + b["scores"]["hmean"]) / 2
    assert "last hmean of 2 runs: mean " in out
    assert f"mean of replicas: hmean {mean:.4f} [" in out
    assert out.endswith(
        " over 2 pages, too narrow, in sample\n"
    )  # a teacher's epoch is chosen there
    # a baseline's paired difference, and thresholds that were chosen on the pages of the score
    held = ",".join(pictures.picture_digest(page.path) for page in labels.load_labels("s", "val"))
    flags = "--baseline", "runs/r-seed0", "--tuned", held
    assert run(*flags, "--teacher", teachers, "--epochs", 1, "--seed", 1, "--name", "b") == 0
    out, gain = capsys.readouterr().out, b["scores"]["hmean"] - a["scores"]["hmean"]
    assert f"hmean {gain:+.4f} [" in out and " groups, vs epoch 1 of runs/r-seed0\n" in out
    words = "over 2 pages, too narrow, in sample: thresholds chosen on 2 of them"
    assert words in out
    score = interval.read_score(last("b")["scores"])
    assert f"over {score.over}" == f"{words}, epoch chosen on 2 of them"
    assert dataclasses.replace(a["hparams"], seed=1, name="r-seed1") == b["hparams"]
    assert not torch.equal(a["model"]["shrink_head.0.weight"], b["model"]["shrink_head.0.weight"])
    # a baseline that is damaged takes nothing from a run
    Path("runs/r-seed0/last.pt").write_bytes(b"")
    assert run("--baseline", "runs/r-seed0", "--epochs", 1, "--name", "c") == 0
    out = capsys.readouterr().out
    assert "warning: runs/r-seed0/last.pt: damaged" in out and "\nbest hmean " in out
    # the same first step, plus the teacher's part
    assert a["hparams"].teacher == teachers
    assert a["rows"][0]["loss"] > last("whole")["rows"][0]["loss"]


# ---------------------------------------------------------------- pages that change under a run


def stop_at(patch, number):
    """A SIGTERM comes in the step of this number, from 0."""

    def stop(trainer, pages, maps, lr, step):
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)

    before(patch, *STEP, stop)


def stopped_inside(patch, name="s2"):
    """A run on a copy of the pages, stopped after two of three steps of epoch 2."""
    shutil.copytree("s", "own")
    with patch.context() as inside:
        stop_at(inside, 4)
        assert run("--data=own", "--name", name) == 128 + signal.SIGTERM
    assert (last(name)["epoch"], last(name)["step"]) == (1, 2)


def change_labels(split, change):
    """Rewrite own/SPLIT.json after change({picture's name: entry})."""
    images = files.read_json(f"own/{split}.json")["images"]
    change(images)
    write_labels(Path("own"), images, split)


@pytest.mark.parametrize("recorded", [True, False])
def test_an_epoch_whose_pages_were_removed_starts_again(work, recorded, monkeypatch, capsys):
    """Of three steps one or two are left; an older checkpoint does not say which pages it had."""
    stopped_inside(monkeypatch)
    if not recorded:
        state = torch.load("runs/s2/last.pt", weights_only=True)
        train.save_checkpoint(
            Path("runs/s2/last.pt"), {k: v for k, v in state.items() if k != "pages"}
        )
    first, second, third = sorted(files.read_json("own/train.json")["images"])[:3]
    change_labels("train", lambda images: [images.pop(name) for name in (first, second, third)])
    capsys.readouterr()
    assert resume("s2") == 0
    out = capsys.readouterr().out
    assert "warning: epoch 2 starts again with the pages there are now" in out
    what = f"own/images/{first} removed, own/images/{second} removed, own/images/{third} removed"
    assert (f"warning: runs/s2: train pages have changed since: {what}\n" in out) == recorded
    assert logged("runs/s2").keys() == {1, 2, 3, 4}
    assert len(last("s2")["pages"]["train"]) == 3


def test_train_pages_that_changed_between_epochs_are_named(work, capsys):
    shutil.copytree("s", "own")
    assert run("--data=own", "--name=s2", "--stop-epoch=1") == 0
    assert resume("s2", "--stop-epoch=2") == 0
    assert "have changed" not in capsys.readouterr().out
    first, second, third, *_ = sorted(files.read_json("own/train.json")["images"])
    shutil.copy(f"own/images/{first}", f"own/images/{second}")

    def change(images):
        images[third]["words"].popitem()
        images["new.jpg"] = images[third]

    shutil.copy(f"own/images/{third}", "own/images/new.jpg")
    change_labels("train", change)
    assert resume("s2", "--stop-epoch=3") == 0
    out = capsys.readouterr().out
    changes = f"new.jpg added, own/images/{second} picture changed, own/images/{third} labels"
    assert f"train pages have changed since: own/images/{changes} changed\n" in out
    assert "starts again" not in out and "resuming runs/s2 after epoch 2\n" in out
    assert resume("s2") == 0
    assert "have changed" not in capsys.readouterr().out


@pytest.mark.parametrize("inside", [False, True])
def test_scores_on_val_pages_that_changed_are_not_mixed(work, inside, monkeypatch, capsys):
    flags = ("--data=own", "--name=s2", *LEARNS, "--epochs=9", "--T_max=9")
    shutil.copytree("s", "own")
    with monkeypatch.context() as patch:
        if inside:
            stop_at(patch, 25)
        assert run(*flags, "--stop-epoch=9") == (128 + signal.SIGTERM if inside else 0)
    epoch = last("s2")["epoch"]
    assert epoch == (8 if inside else 9)
    old = last("s2")["scores"]
    name = min(files.read_json("own/val.json")["images"])
    change_labels("val", lambda images: images[name]["words"].popitem())
    kept = (work / "runs/s2/last.pt").read_bytes()
    capsys.readouterr()
    assert resume("s2") == 2
    line = error_line(capsys.readouterr().err, "runs/s2: val pages have changed since: own/images/")
    assert f"{name} labels changed; add --rescore, or start a new run with --init runs/s2" in line
    assert (work / "runs/s2/last.pt").read_bytes() == kept
    assert resume("s2", "--rescore") == 0
    out, rows, state = capsys.readouterr().out, logged("runs/s2"), last("s2")
    assert [k for k, row in rows.items() if row["hmean"] == row["hmean"]] == [9]
    assert state["best"] == {"hmean": rows[9]["hmean"], "epoch": 9}
    assert (f"epoch 9 scored anew: {train.scores_line(state['scores'])}\n" in out) != inside
    assert evaluate.main(["runs/s2/best.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hmean"] == rows[9]["hmean"]
    assert state["scores"]["pages"] != old["pages"] and rows[1]["loss"] > 0
    assert resume("s2") == 0


def test_a_run_whose_val_pages_have_not_changed_keeps_its_scores(whole, capsys):
    """Such as all folds but one, where --rescore is meant for that one."""
    best = (whole / "best.pt").read_bytes()
    assert resume("whole", "--rescore") == 0
    assert "its val pages have not changed, so it keeps its scores" in capsys.readouterr().out
    assert (whole / "best.pt").read_bytes() == best
    assert all(row["hmean"] == row["hmean"] for row in logged("runs/whole").values())


def test_a_finished_run_that_lost_best_pt_has_no_best_epoch(whole, capsys):
    (whole / "best.pt").unlink()
    assert resume("whole") == 0
    out = capsys.readouterr().out
    assert "runs/whole/best.pt: cannot be read" in out and out.splitlines()[-1].startswith("last ")
    assert resume("whole", "--rescore") == 0  # on the same pages, too
    assert "scored anew" in capsys.readouterr().out and (whole / "best.pt").exists()


def test_a_run_whose_checkpoints_were_deleted_does_not_begin_again(whole, capsys):
    """To save room, say; from epoch 1 it replaced log.csv and best.pt."""
    best = (whole / "best.pt").read_bytes()
    (whole / "last.pt").unlink()
    (whole / "prev.pt").unlink()
    assert resume("whole") == 1
    error_line(capsys.readouterr().err, "runs/whole: has a log.csv, but no last.pt; put it back")
    assert (whole / "best.pt").read_bytes() == best


def test_a_lost_last_pt_is_named_where_prev_pt_stands_in_for_it(whole, capsys):
    """Its scores, those of the epoch before, were shown as the run's last ones."""
    (whole / "last.pt").unlink()
    train.report_members([last("whole", "prev.pt")["hparams"]])
    line = "warning: runs/whole/last.pt: cannot be read (No such file or directory); going on from "
    assert f"{line}runs/whole/prev.pt, epoch 3\n" in capsys.readouterr().out
    (whole / "prev.pt").write_bytes(b"damaged")  # then the fault of each is said
    assert resume("whole") == 1
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("error: runs/whole/last.pt: cannot be read (No such file")
    assert second.startswith("error: runs/whole/prev.pt: ")


# ---------------------------------------------------------------- folders and signals


def test_runs_may_be_a_symbolic_link_or_hold_one(work, capsys):
    (work / "disk").mkdir()
    (work / "runs").symlink_to(work / "disk")
    assert run("--name=a/b c", "--epochs=2", "--stop-epoch=1") == 0
    assert "go on: python train.py --name 'a/b c' --resume\n" in capsys.readouterr().out
    os.rename("runs/a/b c", "runs/a/b")
    for folder in ("runs/", "runs/a"):  # no runs, but folders of some
        assert train.main(["--resume", folder]) == 2
        error_line(capsys.readouterr().err, "hparams.json: no such file")
    assert train.main(["--resume", str(work / "disk/a/b")]) == 0
    os.rename(work / "disk/a", work / "elsewhere")
    (work / "disk/a").symlink_to(work / "elsewhere")
    for name in ("runs/a/b", "./runs/a/b/", str(work / "runs/a/b/last.pt")):
        assert train.run_name(name.removesuffix("last.pt")) == "a/b"
    assert train.main(["--resume", str(work / "elsewhere/b")]) == 2
    error_line(capsys.readouterr().err, "leads out of runs/")


def test_of_two_that_make_one_run_one_is_refused(work, monkeypatch, capsys):
    """The folder appears while the other reads its pages; or both resume a run that was killed
    before it wrote hparams.json, one while the other writes it."""
    hp, folder = hparams.Hparams(name="x"), work / "runs/x"
    with monkeypatch.context() as patch:
        before(patch, train, "open_folder", lambda *_: folder.mkdir(parents=True))
        assert run("--name=x") == 2
    error_line(capsys.readouterr().err, "runs/x: exists; choose another name, or --resume")

    def rival(*_):
        with pytest.raises(files.UsageError, match="another process is training there"):
            train.open_folder(hp, folder, True)
        refused.append(1)

    refused = []
    before(monkeypatch, train, "write_json", rival)
    with train.open_folder(hp, folder, True):
        rival()
    assert len(refused) == 2
    assert hparams.read_hparams(folder / "hparams.json")["name"] == "x"
    train.open_folder(hp, folder, True).close()


def test_a_run_that_was_killed_before_it_wrote_its_values_needs_them_again(work, capsys):
    """With its name alone, a run of default values began."""
    Path("runs/k").mkdir(parents=True)
    Path("runs/k/hparams.json").touch()
    assert resume("k", "--print-hparams") == 1
    error_line(capsys.readouterr().err, "runs/k/hparams.json: not a JSON file")
    # values that change no result are none of its own
    assert resume("k", "--workers=0", "--amp=off", "--print-hparams") == 1
    assert run("--name=k", "--resume", "--print-hparams") == 0
    # values of another run bring its split, on which it was refused
    capsys.readouterr()
    files.write_json("other.json", {"folds": 2, "fold": 1, "split": "0a"})
    assert run("--hparams=other.json", "--name=k", "--resume", "--print-hparams") == 0
    assert json.loads(capsys.readouterr().out)["split"] == ""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_step_ends_the_process_at_once(
    work, number, code, monkeypatch, capsys
):
    """As in the hub's retries, which go on for minutes."""

    def retry(*args, **options):
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", retry)
    begun = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        sys.exit(train.main(["--data=s", "--size=96"]))
    assert ended.value.code == code and time.monotonic() - begun < 50
    assert not Path("runs").exists()
    if code == 130:
        error_line(capsys.readouterr().err, "interrupted")


def test_ctrl_c_while_torch_is_imported_is_one_line(work):
    trainer = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--data=s"], stderr=subprocess.PIPE, text=True
    )
    maps = Path(f"/proc/{trainer.pid}/maps")
    wait_for("the imports", lambda: "numpy" in maps.read_text() or "libtorch" in maps.read_text())
    trainer.send_signal(signal.SIGINT)
    assert trainer.communicate(timeout=60)[1] == "error: interrupted; nothing has begun\n"
    assert trainer.returncode == 130


def test_help_says_how_to_do_without_the_download():
    assert "--no-pretrained" in command.trainer_parser().format_help()


def test_ancestors_are_loaded_once(whole, monkeypatch):
    loaded = Counter()
    for room in (train, sources):
        before(monkeypatch, room, "load_checkpoint", lambda path, *_: loaded.update([str(path)]))
    flags = "--init=runs/whole/best.pt", "--teacher=runs/whole/last.pt", "--epochs=1"
    assert run("--name=child", *flags, "--T_max=1") == 0
    assert loaded["runs/whole/best.pt"] == loaded["runs/whole/last.pt"] == 1
