"""Many processes: torchrun over gloo gives the single process's numbers, whoever is lost."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train

BASE = [
    "--backbone",
    "mobilenetv3_small_050",
    "--pretrained",
    "none",
    "--neck",
    "64",
    "--size",
    "96",
    "--thresh",
    "0.2",
    "--box-thresh",
    "0.2",
    "--unclip-ratio",
    "0",
    "--data",
    "s",
]
TUNE = [
    "--init",
    "first.pt",
    "--freeze-bn",
    "--epochs",
    "3",
    "--batch",
    "5",
    "--lr",
    "1e-4",
    "--warmup",
    "1",
]


@pytest.fixture(scope="module")
def house(tmp_path_factory, receipts):
    """7 train and 5 val pages, a network to start from and the single process's run."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "s").mkdir()
    (folder / "s/images").symlink_to(receipts / "images")
    pages = {}
    for split in ("train", "val"):
        pages |= json.loads((receipts / f"{split}.json").read_text())["images"]
    names = sorted(pages)
    for split, part in (("train", names[:7]), ("val", names[3:])):
        images = {name: pages[name] for name in part}
        (folder / f"s/{split}.json").write_text(json.dumps({"images": images}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = [
            "--name",
            "first",
            "--epochs",
            "14",
            "--T_max",
            "14",
            "--batch",
            "2",
            "--lr",
            "0.003",
            "--aug-strength",
            "0",
        ]
        assert train.main([*BASE, *flags]) == 0
        os.rename("runs/first/best.pt", "first.pt")
        os.rename("runs/first/best.pt.sha256", "first.pt.sha256")
        assert train.main([*BASE, *TUNE, "--name", "one"]) == 0
    return folder


PROGRAM = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
step = train.Trainer.train_step
place = [os.environ[key] for key in ("RANK", "TORCHELASTIC_RESTART_COUNT")]
def troubled(trainer, pages, maps, lr, number):
    if [*place, number] == ["1", "0", 3]:
        os.kill(os.getpid(), signal.SIGKILL)
    if [*place, number] == ["2", "1", 4]:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(trainer, pages, maps, lr, number)
train.Trainer.train_step = troubled
sys.exit(train.main(sys.argv[1:]))
"""


def rows(folder, name):
    return list(csv.DictReader(open(folder / "runs" / name / "log.csv")))


def assert_same_numbers(folder, name):
    a, b = rows(folder, "one"), rows(folder, name)
    assert [r["epoch"] for r in b] == ["1", "2", "3"] == [r["epoch"] for r in a]
    for x, y in zip(a, b):
        for key in ("loss", "loss_shrink", "loss_thresh", "loss_binary"):
            assert float(x[key]) == pytest.approx(float(y[key]), abs=1e-5)
        for key in ("hmean", "precision", "recall", "hmean_lo", "hmean_hi"):
            assert float(x[key]) == float(y[key])
    assert float(a[0]["hmean"]) > 0.1
    pages = [train.load_last(folder / "runs" / n)["scores"]["pages"] for n in ("one", name)]
    assert pages[0] == pages[1] and len(pages[0]) == 5


def test_three_processes_lose_one_start_again_and_stop_together(house, monkeypatch):
    """Shares of 2, 2 and 1 pages; one process is killed in epoch 2 and torchrun starts the group
    again; one gets SIGTERM in epoch 3 and all stop there; a single process ends the run."""
    (house / "program.py").write_text(PROGRAM)
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        "--max-restarts=1",
    ]
    result = subprocess.run(
        [sys.executable, *torchrun, "program.py", *BASE, *TUNE, "--name", "three"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=house,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "resuming runs/three after epoch 1" in result.stdout, result.stderr
    assert "stopped in epoch 3, step 1 of 2; go on: " in result.stdout, result.stderr
    assert [result.stdout.count(f"epoch   {k}/3") for k in (1, 2, 3)] == [1, 1, 0]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) <= 1 and all("was lost" in line for line in errors)
    monkeypatch.chdir(house)
    assert train.main(["--name", "three", "--resume"]) == 0
    assert_same_numbers(house, "three")


def test_the_first_process_to_fail_says_why(capsys):
    store = torch.distributed.HashStore()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    codes = [train.explain(e, store) for e in (torch.OutOfMemoryError("CUDA"), lost, lost)]
    assert codes == [3, 1, 1] and capsys.readouterr().err == f"error: {train.MEMORY_ADVICE}\n"
    with pytest.raises(RuntimeError, match="a bug"):
        train.explain(RuntimeError("a bug"), store)
