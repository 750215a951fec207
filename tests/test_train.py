"""Training: values in, exact resume, kills at bad moments, one line for whatever goes wrong."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
import torch
from conftest import NETWORK, ROOT, error_line, run_python

import data
import evaluate
import files
import hparams
import labels
import train

TINY = ("--data=s", *NETWORK, "--size=96", "--batch=2", "--epochs=4", "--T_max=4", "--lr=0.003")
TINY += ("--thresh=0.2", "--box-thresh=0.2", "--unclip-ratio=0", "--aug-strength=0.5")
TIMES = {"seconds", "images_s", "wait", "peak_gib", "val_seconds"}
MAY_DIFFER = TIMES | {"name", "stop_epoch", "workers", "cache"}


def run(*flags):
    return train.main([*TINY, *map(str, flags)])


def last(work, name):
    return train.load_checkpoint(work / "runs" / name / "last.pt")


def log_rows(name):
    with open(f"runs/{name}/log.csv") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def flat(value, path=""):
    """Nested dicts and lists as {path: leaf}."""
    value = dataclasses.asdict(value) if isinstance(value, hparams.Hparams) else value
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in flat(x, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, x in enumerate(value) for k, v in flat(x, f"{path}/{i}").items()}
    return {path: value}


def assert_same_run(a, b):
    """Two last.pt are equal bit for bit, but for clock times and the run's name."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key in a:
        if key.split("/")[-1] in MAY_DIFFER or "timing" in key:
            continue
        same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
        assert same, key


@pytest.fixture(scope="module")
def whole(tmp_path_factory, receipts):
    """A run of four epochs."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "s").symlink_to(receipts)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("--name", "whole") == 0
    return folder / "runs/whole"


@pytest.fixture
def undisturbed(work, whole):
    shutil.copytree(whole, work / "runs/whole")
    return last(work, "whole")


# ---------------------------------------------------------------- stops and failed saves


def test_loader_processes_leave_the_stop_signals_to_the_trainer():
    code = "import signal, train; train.start_worker(0); "
    code += "print(*(signal.getsignal(n) == signal.SIG_IGN for n in train.STOP_SIGNALS))"
    done = run_python("-c", code, cwd=ROOT)
    assert done.stdout == "True True\n", done.stderr


def test_whatever_a_save_fails_of_ends_the_run(work, monkeypatch, capsys):
    def fail(path, state):
        raise MemoryError

    monkeypatch.setattr(train, "save_checkpoint", fail)
    assert run("--name", "full") == 3
    assert "out of memory; lower --size" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(work, monkeypatch, capsys):
    step = train.Trainer.train_step

    def spoil(trainer, pages, maps, lr, number):
        losses = step(trainer, pages, maps, lr, number)
        if number == 5:  # the last of epoch 2
            next(trainer.model.parameters()).data.fill_(torch.nan)
        return losses

    monkeypatch.setattr(train.Trainer, "train_step", spoil)
    assert run("--name", "nan") == 4
    assert "epoch 2: weights are not finite" in capsys.readouterr().err
    assert last(work, "nan")["epoch"] == 1


# ---------------------------------------------------------------- resume


def test_resume_does_without_the_weights_it_began_with(work, whole):
    shutil.copy(whole / "best.pt", work / "begin.pt")
    assert run("--name", "copied", "--init", "begin.pt", "--stop-epoch", 2) == 0
    before = last(work, "copied")["origin"]
    (work / "begin.pt").unlink()
    assert train.main(["--name", "copied", "--resume", "--stop-epoch", "3"]) == 0
    for name, epoch in (("last.pt", 3), ("prev.pt", 2)):
        assert train.load_checkpoint(work / "runs/copied" / name)["epoch"] == epoch
    assert last(work, "copied")["origin"] == before and before["chosen"]


def test_two_and_two_epochs_equal_four_bit_for_bit(work, undisturbed, capsys):
    assert run("--name", "parts", "--stop-epoch", 2) == 0
    paused = "paused after epoch 2 of 4; go on: python train.py --name parts --resume"
    assert paused in capsys.readouterr().out
    assert train.main(["--name", "parts", "--resume"]) == 0
    assert_same_run(undisturbed, last(work, "parts"))
    rows = log_rows("parts")
    assert [r["epoch"] for r in rows] == [1, 2, 3, 4] and tuple(rows[0]) == train.COLUMNS
    assert capsys.readouterr().out.splitlines()[-1].startswith("best hmean ")


def test_signal_inside_an_epoch_resumes_exactly(work, undisturbed, monkeypatch, capsys):
    step, calls = train.Trainer.train_step, []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train.Trainer, "train_step", signalled)
    assert run("--name", "stopped") == 128 + signal.SIGTERM
    assert "go on: python train.py --name stopped --resume" in capsys.readouterr().out
    assert (last(work, "stopped")["epoch"], last(work, "stopped")["step"]) == (1, 2)
    assert train.main(["--name", "stopped", "--resume"]) == 0
    assert_same_run(undisturbed, last(work, "stopped"))


def test_sigkill_while_a_checkpoint_is_written(work, undisturbed, capsys):
    """The process kills itself with half of last.pt written after epoch 2."""
    program = f"""
    import os, signal, sys
    sys.path.insert(0, {str(ROOT)!r})
    import dbnet, train
    replace, seen = dbnet.replace_file, []
    def dying(path, data):
        if path.name == "last.pt":
            seen.append(path)
            if len(seen) == 2:
                half = bytes(data)[: len(data) // 2]
                path.with_name("." + path.name + ".0.tmp").write_bytes(half)
                os.kill(os.getpid(), signal.SIGKILL)
        replace(path, data)
    dbnet.replace_file = dying
    train.main(sys.argv[1:])
    """
    program = textwrap.dedent(program)
    died = run_python("-c", program, *TINY, "--name", "killed", cwd=work)
    assert died.returncode == -signal.SIGKILL
    assert train.main(["--name", "killed", "--resume"]) == 0
    assert "resuming runs/killed after epoch " in capsys.readouterr().out
    assert_same_run(undisturbed, last(work, "killed"))


def test_damaged_last_falls_back_to_prev(work, undisturbed, capsys):
    assert run("--name", "flip", "--stop-epoch", 3) == 0
    path = work / "runs/flip/last.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)
    assert train.main(["--name", "flip", "--resume"]) == 0
    assert "last.pt: damaged" in (out := capsys.readouterr().out) and "prev.pt, epoch 2" in out
    assert_same_run(undisturbed, last(work, "flip"))


def test_resume_before_the_first_checkpoint_starts_over(work, undisturbed, capsys):
    run("--name", "early", "--stop-epoch", 1)
    for file in (work / "runs/early").glob("*.pt"):
        file.unlink()
    assert train.main(["--name", "early", "--resume"]) == 0
    assert "has no checkpoint yet" in capsys.readouterr().out
    assert_same_run(undisturbed, last(work, "early"))


def test_workers_and_cache_do_not_change_the_run(work, undisturbed, monkeypatch):
    read, files = data.read_image, []
    assert run("--name", "workers", "--workers", 2) == 0
    assert_same_run(undisturbed, last(work, "workers"))
    monkeypatch.setattr(data, "read_image", lambda path: files.append(path.name) or read(path))
    assert run("--name", "cache", "--cache", "--resume") == 1
    assert run("--name", "cache", "--cache") == 0
    assert_same_run(undisturbed, last(work, "cache"))
    counts = Counter(files)
    for page in labels.load_labels("s", "train"):  # inspected, read once; not once in each epoch
        assert counts[page.name] == 2, counts
    assert not (work / "runs/cache/cache").exists()


# ---------------------------------------------------------------- what a run leaves


def test_evaluate_prints_the_digits_of_the_log(work, capsys):
    assert run("--name", "learned", "--epochs", 14, "--T_max", 14, "--aug-strength", 0) == 0
    rows = log_rows("learned")
    best = last(work, "learned")["best"]
    row = rows[best["epoch"] - 1]
    assert row["hmean"] == best["hmean"] == max(r["hmean"] for r in rows) > 0.1
    assert f"best hmean {best['hmean']:.4f} epoch {best['epoch']}" in capsys.readouterr().out
    assert evaluate.main(["runs/learned/best.pt", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for key in ("precision", "recall", "hmean"):
        assert result[key] == row[key]
    assert result["interval"] == [row["hmean_lo"], row["hmean_hi"]]


def test_run_folder(work, undisturbed):
    folder = work / "runs/whole"
    names = {"hparams.json", "log.csv", "pictures", "last.pt", "prev.pt", "best.pt"}
    assert {p.name for p in folder.iterdir()} == names
    assert len(list((folder / "pictures").glob("*.jpg"))) == 2
    best = torch.load(folder / "best.pt", weights_only=True)
    assert set(best) == {"model", "hparams", "epoch", "scores", "origin"}
    assert best["hparams"] == files.read_json(folder / "hparams.json")
    val = labels.load_labels("s", "val")
    assert set(best["scores"]["pages"]) == {p.name for p in val}
    digests = {data.picture_digest(p.path) for p in labels.load_labels("s", "train")}
    assert set(best["origin"]["trained"]) == digests and not best["origin"]["unknown"]
    assert set(best["origin"]["chosen"]) == {data.picture_digest(p.path) for p in val}
    assert undisturbed["origin"] == best["origin"] | {"chosen": []}


def test_a_checkpoint_knows_the_pages_of_what_it_began_from_and_learned_from(work, whole, capsys):
    """Other pages, another folder, the old pictures under new names; a checkpoint without a record
    is said to be unknown."""
    data.synth("other", 4, 9, size=96, words=4)
    shutil.copy(whole / "best.pt", "begin.pt")
    state = torch.load("begin.pt", weights_only=True)
    train.save_checkpoint("old.pt", {k: v for k, v in state.items() if k != "origin"})
    flags = ("--data=other", "--epochs=1", "--init=begin.pt", "--teacher=old.pt", "--name=child")
    assert run(*flags) == 0
    said = capsys.readouterr().err
    assert "warning: old.pt: pages that old.pt trained on are not known" in said
    shutil.copytree("s", "renamed")
    for split in ("train", "val"):
        read = files.read_json(f"renamed/{split}.json")["images"]
        for name in read:
            os.rename(f"renamed/images/{name}", f"renamed/images/r{name}")
        images = {"images": {f"r{name}": entry for name, entry in read.items()}}
        files.write_json(f"renamed/{split}.json", images)
    for split, word in (("train", "trained on 6 of these 6 pages"), ("val", "was chosen on these")):
        assert evaluate.main(["runs/child/last.pt", "--data", "renamed", "--split", split]) == 0
        said = capsys.readouterr().err
        assert word in said and "pages that old.pt trained on are not known" in said


def test_names_count_up_from_the_hparams_file(work):
    (work / "small.json").write_text(json.dumps({"epochs": 1}))
    for expected in ("small", "small-2"):
        assert train.main(["--hparams", "small.json", *TINY, "--epochs", "1"]) == 0
        assert files.read_json(work / "runs" / expected / "hparams.json")["name"] == expected


def test_baseline_difference_is_printed(work, undisturbed, capsys):
    capsys.readouterr()
    assert run("--name", "again", "--baseline", "runs/whole", "--stop-epoch", 1) == 0
    assert "vs baseline +0.0000" in capsys.readouterr().out


def wandb_rows(folder):
    """History of an offline run by W&B's own protocol buffers: records in LevelDB's log format."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    raw, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is padding
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        record, at = record + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            parsed, record = pb.Record.FromString(record), b""
            if parsed.WhichOneof("record_type") == "history":
                items = parsed.history.item
                rows.append(
                    {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return path, [row for row in rows if "val/hmean" in row]


def test_mirrors_hold_the_numbers_of_log_csv(work, monkeypatch):
    """As a W&B agent starts it, paused and resumed: each epoch once, under the same id."""
    wandb = pytest.importorskip("wandb")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for key, text in (("MODE", "offline"), ("SWEEP_ID", "s1"), ("RUN_ID", "run7")):
        monkeypatch.setenv(f"WANDB_{key}", text)
    assert run("--log=tensorboard", "--ema=True", "--stop-epoch=1") == 0
    assert train.main(["--name", "run7", "--resume", "--artifact"]) == 0
    wandb.finish()
    log = log_rows("run7")
    path, rows = wandb_rows(work / "runs/run7")
    assert path.name == "run-run7.wandb" and [r["epoch"] for r in rows] == [1, 2, 3, 4]
    board = events.EventAccumulator("runs/run7/tensorboard").Reload()
    assert len(board.Tags()["images"]) == 2
    for tag in ("val/hmean", "val/hmean_lo", "train/loss", "train/lr", "train/seconds"):
        column = [row[tag.split("/")[1]] for row in log]
        assert [row[tag] for row in rows] == column
        assert [(e.step, e.value) for e in board.Scalars(tag)] == [
            (k, pytest.approx(x, rel=1e-6)) for k, x in enumerate(column, 1)
        ]


def test_missing_package_is_one_line(work, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb.sdk", None)
    assert run("--log", "wandb") == 2
    error_line(capsys.readouterr().err, "pip install wandb") and not (work / "runs").exists()


def test_init_starts_from_a_checkpoint(work, undisturbed, capsys):
    flags = ("--stop-epoch=1", "--lr=1e-9", "--eta-min=0")
    assert run("--name", "fine", "--init", "runs/whole/best.pt", *flags) == 0
    before = train.load_checkpoint(work / "runs/whole/best.pt")["model"]["shrink_head.0.weight"]
    torch.testing.assert_close(
        last(work, "fine")["model"]["shrink_head.0.weight"], before, atol=1e-6, rtol=0
    )
    assert run("--name", "other", "--init", "runs/whole/best.pt", "--neck", 32) == 2
    assert "weights of another network" in capsys.readouterr().err


# ---------------------------------------------------------------- parts of a step


@pytest.mark.parametrize("t_max", [20, 22, 24])
def test_schedule_is_torchs_cosine(t_max):
    hp = hparams.Hparams(lr=5e-4, eta_min=6e-6, T_max=t_max)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t_max, 6e-6)
    for epoch in range(22):
        assert train.learning_rate(hp, epoch, epoch + 1) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-9
        )
        optimizer.step(), schedule.step()


def test_warm_up_is_linear():
    hp = hparams.Hparams(lr=1e-3, warmup=2.0)
    assert train.learning_rate(hp, 0, 0.5) == pytest.approx(train.learning_rate(hp, 0, 9) / 4)


def test_ema_is_a_moving_average():
    ema, weight = [torch.zeros(2)], [torch.ones(2)]
    expected = 0.0
    for step in range(200):
        train.update_ema(ema, weight, step)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
    assert ema[0].tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize(
    "t_max, word", [(4, None), (2, "rises again"), (8, "still has lr 2.1e-03")]
)
def test_schedules_that_do_not_end_with_the_run_are_named(t_max, word, capsys):
    train.check_schedule(hparams.Hparams(lr=3e-3, epochs=4, T_max=t_max))
    assert word in capsys.readouterr().out if word else capsys.readouterr().out == ""


def test_traced_once_for_all_canvases(monkeypatch):
    graphs, build = [], torch.compile

    def traced(model, **options):
        return build(model, backend=lambda graph, _: graphs.append(graph) or graph, **options)

    monkeypatch.setattr(torch, "compile", traced)
    small = {"backbone": "resnet10t", "pretrained": "none", "neck": 16}
    plain, compiled = (
        train.Trainer(hparams.Hparams(compile=c, **small), torch.device("cpu"))
        for c in (False, True)
    )
    for height, width in ((64, 96), (96, 64), (64, 64)):
        pages = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
        torch.testing.assert_close(compiled.forward(pages), plain.forward(pages))
    assert len(graphs) == 1


def test_frozen_batch_norm_keeps_its_statistics():
    hp = hparams.Hparams(
        backbone="mobilenetv3_small_050", pretrained="none", neck=16, freeze_bn=True
    )
    trainer = train.Trainer(hp, torch.device("cpu"))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items() if "running" in k}
    trainer.train_mode()
    maps = torch.ones(2, 4, 64, 64, dtype=torch.uint8)
    trainer.train_step(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), maps, 1e-3, 0)
    assert all(torch.equal(v, trainer.model.state_dict()[k]) for k, v in before.items())


def test_gradient_clipping_limits_the_step(work):
    hp = hparams.Hparams(backbone="mobilenetv3_small_050", pretrained="none", neck=16, clip=1e-3)
    trainer = train.Trainer(hp, torch.device("cpu"))
    trainer.model.train()
    maps = torch.ones(2, 4, 64, 64, dtype=torch.uint8)
    trainer.train_step(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), maps, 1e-3, 0)
    norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


# ---------------------------------------------------------------- values


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
    assert resolved(capsys, "--no-ema", "--no-pretrained")["ema"] is False
    assert resolved(capsys, "--no-pretrained")["pretrained"] == "none"
    assert set(resolved(capsys)) == set(hparams.FIELDS)


@pytest.mark.parametrize("name", ["baseline", "run8", "run3", "run7", "quickstart"])
def test_shipped_hparams_are_valid(name, capsys):
    hp = resolved(capsys, "--hparams", str(ROOT / "hparams" / f"{name}.json"))
    assert hp["backbone"] == "efficientnet_b4"
    if name == "run8":
        assert hp["lr"] == 0.0005134333170096499 and hp["weight_decay"] == 6.797303101020006e-05
        assert hp["eta_min"] == 6.388390006720873e-06 and (hp["T_max"], hp["epochs"]) == (24, 22)
        decoding = hp["thresh"], hp["box_thresh"], hp["max_candidates"], hp["mode"]
        assert decoding == (0.29, 0.25, 600, "polygon")


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"learning_rat": 1}', ["h.json", "unknown key 'learning_rat'"]),
        ('{"lr": %s}' % ("9" * 400), ["lr = 999", "is not a number"]),
        ('{"name": "a\\nb"}', ["name = 'a\\nb' is not a line of text"]),
        ('{"weigth_decay": 1}', ["unknown key", "did you mean weight_decay"]),
        ('{"lr": "fast"}', ["h.json", "lr = 'fast'", "a number"]),
        ('{"lr": -1}', ["lr = -1 is not within"]),
        ('{"lr": NaN}', ["lr = nan", "not within"]),
        ('{"batch": 2.5}', ["batch = 2.5", "a whole number"]),
        ('{"ema": 1}', ["ema = 1", "true or false"]),
        ('{"mode": "quad"}', ["mode = 'quad'", "polygon, box"]),
        ('{"size": 100}', ["size = 100", "multiple of 32"]),
        ('{"lr": 1e-6}', ["eta_min", "above lr"]),
        ('{"folds": 3, "fold": 4}', ["fold = 4 of folds = 3"]),
        ('{"name": "../x"}', ["leads out of runs/"]),
        ("{oops", ["h.json", "not a JSON file"]),
        ("[1]", ["h.json", "not a JSON object"]),
    ],
)
def test_bad_values_are_one_line(work, text, words, capsys):
    (work / "h.json").write_text(text)
    assert train.main(["--hparams", "h.json"]) == (1 if "JSON" in words[-1] else 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
    assert not (work / "runs").exists()


# ---------------------------------------------------------------- what goes wrong later


def test_two_processes_do_not_train_in_one_folder(work, undisturbed, capsys):
    with files.lock("runs/whole/hparams.json"):
        assert train.main(["--name", "whole", "--resume"]) == 2
    error_line(capsys.readouterr().err, "another process is training there")


def test_a_state_of_another_network_is_one_line(work, undisturbed, capsys):
    state = last(work, "whole")
    (work / "runs/whole/prev.pt").unlink()
    for key, wrong in (("optimizer", {}), ("rows", [{"lr": "x"}]), ("model", {}), ("epoch", "x")):
        train.save_checkpoint(work / "runs/whole/last.pt", state | {key: wrong})
        assert train.main(["--name", "whole", "--resume"]) == 1
        error_line(capsys.readouterr().err, "last.pt")


def test_existing_name_is_an_error(work, undisturbed, capsys):
    assert run("--name", "whole") == 2
    error_line(capsys.readouterr().err, "runs/whole: exists; choose another name, or --resume")
    assert train.main(["--name", "whole", "--resume", "--lr", "1"]) == 2
    error_line(capsys.readouterr().err, "--resume: lr is 0.003 in run whole and cannot become 1.0")
    assert train.main(["--resume"]) == 2


def test_non_finite_loss_stops_the_run_and_keeps_the_last_epoch(work, monkeypatch, capsys):
    real = train.db_loss

    def poisoned(logits, maps):
        poisoned.calls += 1
        loss, parts = real(logits, maps)
        return (loss * float("nan"), parts) if poisoned.calls > 4 else (loss, parts)

    poisoned.calls = 0
    monkeypatch.setattr(train, "db_loss", poisoned)
    assert run("--name", "nan") == 4
    error_line(capsys.readouterr().err, "epoch 2, step 2 of 3: loss is nan; lower --lr")
    assert last(work, "nan")["epoch"] == 1


def test_loss_outliers_are_flagged(capsys):
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.epoch, trainer.losses, trainer.failed = 0, [], []
    train.fetch_losses(trainer, [torch.ones(4)] * 20 + [torch.full((4,), 3.5)], 21)
    assert (
        "loss 3.500 in epoch 1, step 21 is above 3 times its running median"
        in capsys.readouterr().out
    )


def test_out_of_memory_is_one_line_with_the_remedy(work, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "db_loss", full)
    assert run("--name", "oom") == 3
    error_line(capsys.readouterr().err, "out of memory; lower --size (and --batch)")


def test_full_disk_is_one_line_and_keeps_what_was_written(work, monkeypatch, capsys):
    real = train.save_checkpoint

    def full(path, state):
        if state["epoch"] == 2 and path.name == "last.pt":
            raise OSError(28, "No space left on device", str(path))
        real(path, state)

    monkeypatch.setattr(train, "save_checkpoint", full)
    assert run("--name", "full") == 1
    error_line(capsys.readouterr().err, "No space left on device")
    assert last(work, "full")["epoch"] == 1


def test_nothing_to_learn_is_an_error_before_any_folder_is_made(work, capsys):
    labels = json.loads((work / "s/train.json").read_text())
    for entry in labels["images"].values():
        for word in entry["words"].values():
            word["ignore"] = True
    (work / "none.json").write_text(json.dumps(labels))
    assert run("--data", "none.json", "--val-data", "s/val.json", "--image-dir", "s/images") == 1
    error_line(capsys.readouterr().err, "no positive pixel in 6 train pages")
    assert not (work / "runs").exists()


def test_hub_out_of_reach(tmp_path, script, one_line, receipts):
    flags = [*TINY[2:], "--data", receipts, "--pretrained", "timm"]
    result = script("train.py", *flags)
    one_line(result, "no download", "--pretrained PATH", "--no-pretrained", code=1)


def test_command_line_errors(work, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--weigth_decay", "1"])
    error_line(capsys.readouterr().err, "--weigth-decay 1; did you mean --weight-decay?")
    assert train.main(["--data", "nowhere"]) == 2
    error_line(capsys.readouterr().err, "nowhere: no such file or folder")


def test_sigterm_to_a_real_process_saves_and_says_how_to_go_on(work):
    command = [sys.executable, "-u", ROOT / "train.py", *TINY, "--epochs=400", "--name=long"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("epoch   2/"):
            process.send_signal(signal.SIGTERM)
            break
    tail = process.stdout.read()
    assert process.wait(60) == 143
    assert "go on: python train.py --name long --resume" in tail
    assert last(work, "long")["epoch"] >= 2


# ---------------------------------------------------------------- folds, replicas, teachers


def test_all_folds_hold_each_page_out_once_and_go_on_after_a_failure(work, monkeypatch, capsys):
    real = data.run_pages

    def failing(hp):
        if hp.fold == 2 and not failing.mended:
            raise files.DataError("s", "fold 2 is cursed")
        return real(hp)

    failing.mended = False
    monkeypatch.setattr(data, "run_pages", failing)
    flags = ["--epochs", 1, "--folds", 3, "--fold", "all", "--name", "cv"]
    assert run(*flags) == 1
    assert "failed: cv-fold2" in capsys.readouterr().out
    failing.mended = True
    assert run(*flags) == 2  # exists
    assert "--resume to go on" in capsys.readouterr().err
    assert run(*flags, "--resume") == 0
    out = capsys.readouterr().out
    assert "runs/cv-fold1 is finished" in out and "runs/cv-fold3 is finished" in out
    assert "last hmean of 3 runs: mean " in out and "over 6 pages" in out
    states = [last(work, f"cv-fold{k}") for k in (1, 2, 3)]
    held = [set(s["scores"]["pages"]) for s in states]
    assert set.union(*held) == {p.name for p in labels.load_labels("s", "train")}
    assert sum(map(len, held)) == 6
    (digest,) = {s["hparams"].split for s in states}
    split = json.loads((work / f"runs/split-{digest}.json").read_text())
    assert all(
        split["images"][name]["fold"] == k for k, names in enumerate(held, 1) for name in names
    )
    assert run(*flags, "--resume", "--lr", 0.1) == 2
    assert "lr is 0.003, not 0.1" in capsys.readouterr().err


def test_changed_pages_are_not_resumed_as_the_same_folds(work, capsys):
    labels = json.loads((work / "s/train.json").read_text())
    (work / "labels.json").write_text(json.dumps(labels))
    flags = ["--data", "labels.json", "--image-dir", "s/images", "--folds", 2, "--name", "f"]
    assert run(*flags, "--stop-epoch", 1) == 0
    labels["images"].popitem()
    (work / "labels.json").write_text(json.dumps(labels))
    assert train.main(["--name", "f", "--resume"]) == 1
    error_line(capsys.readouterr().err, "its pages make split")


def test_replicas_differ_by_seed_alone(work, capsys):
    assert run("--epochs", 1, "--seeds", 2, "--name", "r") == 0
    assert "last hmean of 2 runs: mean " in capsys.readouterr().out
    a, b = last(work, "r-seed0"), last(work, "r-seed1")
    assert dataclasses.replace(a["hparams"], seed=1, name="r-seed1") == b["hparams"]
    assert not torch.equal(a["model"]["shrink_head.0.weight"], b["model"]["shrink_head.0.weight"])


def test_pseudo_labels_add_pages_and_mask_what_is_uncertain(work, capsys):
    extra = work / "extra"
    data.synth(extra, 4, 7, size=96, words=4)
    images = {}
    for page in labels.load_labels(extra, "train"):
        words = {
            i: {"points": p.tolist(), "confidence": 0.9 if k else 0.5}
            for k, (i, p) in enumerate(zip(page.ids, page.polygons))
        }
        (extra / "images" / page.name).rename(extra / "images" / f"new_{page.name}")
        images[f"new_{page.name}"] = {"words": words}
    (extra / "p.json").write_text(json.dumps({"images": images}))
    assert run("--pseudo-labels", "extra/p.json", "--epochs", 1, "--name", "p") == 0
    out = capsys.readouterr().out
    assert "pseudo 3 pages" in out and "3 ignored" in out
    assert last(work, "p")["hparams"].pseudo_labels == "extra/p.json"
    own = {n: {"words": {}} for n in json.loads((work / "s/val.json").read_text())["images"]}
    (work / "own.json").write_text(json.dumps({"images": own}))
    assert run("--pseudo-labels", "own.json", "--epochs", 1, "--name", "q") == 1
    error_line(capsys.readouterr().err, "labelled in s already")


def test_teacher_pulls_the_student_towards_its_map(work, undisturbed):
    logits, target = torch.randn(2, 2, 8, 8), torch.rand(2, 8, 8)
    direct = -(
        target * logits[:, 0].sigmoid().log() + (1 - target) * (1 - logits[:, 0].sigmoid()).log()
    )
    torch.testing.assert_close(train.teacher_loss(logits, target), direct.mean())
    flags = ["--teacher", "runs/whole/best.pt,runs/whole/last.pt", "--epochs", 1]
    assert run(*flags, "--name", "taught") == 0
    a, b = last(work, "taught"), undisturbed
    assert a["hparams"].teacher == "runs/whole/best.pt,runs/whole/last.pt"
    # the same first step, plus the teacher's part
    assert a["rows"][0]["loss"] > b["rows"][0]["loss"]
    assert run("--teacher", "none.pt", "--name", "untaught") == 1
