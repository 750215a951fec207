"""Many processes: torchrun over gloo gives the single process's numbers, whoever is lost."""

import json
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import NETWORK, ROOT, error_line, read_log, run_python, write_labels

import files
import train
from hparams import Hparams
from interval import read_score

BASE = [*NETWORK, "--data=s,o", "--size=96", "--thresh=0.2", "--box-thresh=0.2", "--unclip-ratio=0"]
FIRST = "--name=first --epochs=8 --T_max=8 --batch=2 --lr=0.006 --aug-strength=0"
TUNE = "--init=runs/first/best.pt --freeze-bn --epochs=3 --batch=5 --lr=1e-4 --warmup=1"


@pytest.fixture(scope="module")
def house(tmp_path_factory, receipts):
    """7 train and 5 val pages, and a set of fewer val pages than processes; a network to start from
    and the single process's run."""
    folder = tmp_path_factory.mktemp("ddp")
    for name in "so":
        (folder / name).mkdir()
        (folder / name / "images").symlink_to(receipts / "images")
    pages = {}
    for split in ("train", "val"):
        pages |= json.loads((receipts / f"{split}.json").read_text())["images"]
    names = sorted(pages)
    for split, part in (("train", names[:7]), ("val", names[3:])):
        write_labels(folder / "s", {name: pages[name] for name in part}, split)
        write_labels(folder / "o", {name: pages[name] for name in names[-2:]}, split)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*BASE, *FIRST.split()]) == 0
        assert train.main([*BASE, *TUNE.split(), "--name=one"]) == 0
    return folder


PROGRAM = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import files
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


def assert_same_numbers(folder, name):
    a, b = (read_log(folder / "runs" / n) for n in ("one", name))
    assert [r["epoch"] for r in b] == ["1", "2", "3"] == [r["epoch"] for r in a]
    for x, y in zip(a, b):
        for key in ("loss", "loss_shrink", "loss_thresh", "loss_binary"):
            assert float(x[key]) == pytest.approx(float(y[key]), abs=1e-5)
        for key in ("hmean", "precision", "recall", "hmean_lo", "hmean_hi"):
            assert float(x[key]) == float(y[key])
    assert float(a[0]["hmean"]) > 0.1
    scores, same = (train.load_last(folder / "runs" / n)["scores"] for n in ("one", name))
    assert scores == same and len(scores["pages"]) == 5
    over = str(read_score(scores["others"]["o"]).over)  # its train pages are its val pages
    assert over.startswith("2 pages, too narrow, in sample: trained on 2 of them")


def test_three_processes_lose_one_start_again_and_stop_together(house, warm, monkeypatch):
    """Shares of 2, 2 and 1 pages; one process is killed in epoch 2 and torchrun starts the group
    again; one gets SIGTERM in epoch 3 and all stop there; a single process ends the run."""
    (house / "program.py").write_text(PROGRAM)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=3 --max-restarts=1"
    torchrun = [*torchrun.split(), "--no-python", *warm]
    command = [*torchrun, "program.py", *BASE, *TUNE.split(), "--name=three"]
    result = run_python(*command, cwd=house, timeout=300)
    assert "resuming runs/three after epoch 1" in result.stdout, result.stderr
    assert "stopped in epoch 3, step 1 of 2; go on: " in result.stdout, result.stderr
    assert [result.stdout.count(f"epoch   {k}/3") for k in (1, 2, 3)] == [1, 1, 0]
    error_line(result.stderr, "a process of the group: was lost")
    monkeypatch.chdir(house)
    assert train.main(["--name", "three", "--resume"]) == 0
    assert_same_numbers(house, "three")


def test_a_step_sends_gradients_only(monkeypatch):
    """Batch norm's statistics are process 0's, sent when they are used: see averaged_model."""
    sent, hp = [], Hparams(backbone="test_efficientnet", pretrained="none", neck=16)
    monkeypatch.setattr(dist, "_broadcast_coalesced", lambda *_: sent.append(1))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = train.Trainer(hp, torch.device("cpu"), train.RunPages([], [], {}, {}), {})
        assert sent  # once, to begin with the same
        sent.clear()
        maps = torch.ones(2, 4, 64, 64, dtype=torch.uint8)
        trainer.train_step(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), maps, 1e-3, 0)
        assert not sent and trainer.model.shrink_head[1].num_batches_tracked == 1
    finally:
        dist.destroy_process_group()


def test_the_first_process_to_fail_says_why(monkeypatch, capsys):
    def main(number, failure):
        monkeypatch.setattr(train, "rank", lambda: number)
        monkeypatch.setattr(train, "execute", Mock(side_effect=failure))
        return train.main([])

    store = dist.HashStore()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    monkeypatch.setattr(train, "join_group", lambda: store)
    assert main(1, torch.OutOfMemoryError("CUDA out of memory")) == 3
    assert main(0, lost) == main(2, lost) == 137
    error_line(capsys.readouterr().err, "out of memory")
    with pytest.raises(RuntimeError, match="a bug"):
        main(3, RuntimeError("a bug"))
    assert capsys.readouterr().err == ""

    # all lines of its error, and none of another process
    store = dist.HashStore()
    faults = files.DataError("a.json", "is wrong"), files.DataError("b.json", "is wrong")
    faults[1].others = faults[:1]
    assert main(2, faults[1]) == main(0, faults[0]) == 1
    assert capsys.readouterr().err == "error: a.json: is wrong\nerror: b.json: is wrong\n"
