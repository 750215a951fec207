"""Loader processes, which are on by default on a GPU only: whatever happens to a run, it ends in
ten seconds with its line and code, and nothing of it is left."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import NETWORK, ROOT, error_line, events, marked, run_python, tiny_sweep, wait_for

PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
step, save = train.Trainer.train_step, train.save_checkpoint
def troubled_step(trainer, pages, maps, lr, number):
    if number == 4 and not os.path.exists("troubled"):
        open("troubled", "w").close()
        raise RuntimeError("a bug in the step")
    return step(trainer, pages, maps, lr, number)
def troubled_save(path, state):
    if state["epoch"] == 2:
        raise OSError(28, "No space left on device", str(path))
    save(path, state)
if __name__ == "__main__":
    trouble = sys.argv.pop(1)
    if trouble == "step":
        train.Trainer.train_step = troubled_step
    if trouble == "save":
        train.save_checkpoint = troubled_save
    sys.exit(train.main(sys.argv[1:]))
"""
RUN = [*NETWORK, "--data=s", "--size=96", "--epochs=90", "--T_max=90", "--batch=2", "--workers=2"]


@pytest.fixture
def start(work, warm):
    """start(trouble, *before) -> a trainer with two loader processes that runs into it, its output
    in the file `said`; before: words of a command that runs it. All are killed in the end."""
    shutil.copytree("s", "own", symlinks=False)
    (work / "program.py").write_text(PROGRAM)
    started = []

    def begin(trouble, *before, flags=()):
        before = [*before, sys.executable] if before else warm
        words = [*before, "program.py", trouble, *RUN, "--data=own", *flags]
        env = os.environ | {"MARK": str(work)}
        with open("said", "w") as file:
            started.append(subprocess.Popen(words, stdout=file, stderr=file, env=env))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
    for pid in marked(work):
        os.kill(pid, signal.SIGKILL)


def said():
    with open("said") as file:
        return file.read()


@pytest.mark.parametrize(
    "trouble, code, line",
    [
        ("page", 1, "cannot be read (No such file or directory)"),
        ("save", 1, "last.pt: No space left on device"),
    ],
)
def test_an_error_ends_the_run_and_its_loader_processes(start, work, trouble, code, line):
    trainer = start(trouble)
    wait_for("an epoch", lambda: "epoch   1/90" in said() or trainer.poll() is not None)
    if trouble == "page":
        shutil.rmtree("own/images")
    assert trainer.wait(20) == code, said()
    assert line in said()
    wait_for("the loader processes to end", lambda: not marked(work), 5)
    assert os.path.exists("runs/run/last.pt")


SWEEP = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import sweep
sweep.TRAINER, sweep.AGAIN = [*sys.argv.pop(1).split("|"), "program.py", "step"], 0.2
sys.exit(sweep.main())
"""


def test_a_sweep_goes_on_after_a_trainer_that_fails(start, work, warm, monkeypatch):
    """A step of the first trial raises what nothing explains: its trainer and loader processes end,
    another goes on from the epoch before, and the next trial has its turn."""
    (work / "s.json").write_text(json.dumps(tiny_sweep(method="random", run_cap=2)))
    monkeypatch.setenv("MARK", str(work))
    flags = [*NETWORK, "--data=own", "--size=96", "--epochs=2", "--T_max=2", "--batch=2"]
    done = run_python(
        "-c", SWEEP, "|".join(warm), "s.json", *flags, "--workers=2", cwd=work, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trial 1 crashed (exit code 1): retry 1 of 2 from epoch 1" in done.stdout
    (crashed,) = events("runs/s", "crashed")
    assert crashed["code"] == 1 and crashed["tail"][-1] == "RuntimeError: a bug in the step"
    assert [e["trial"] for e in events("runs/s", "finished")] == [1, 2]
    wait_for("the loader processes to end", lambda: not marked(work), 5)


def test_a_full_shared_memory_is_named(start, work):
    mount = "mount -t tmpfs -o size=200k tmpfs /dev/shm"
    inside = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*inside, mount], capture_output=True, check=False).returncode:
        pytest.skip("needs root and unshare")
    trainer = start("none", *inside, f'{mount} && exec "$@"', "sh", flags=("--size=320",))
    assert trainer.wait(60) == 1
    error_line(said(), "/dev/shm: is full; lower --workers, or raise its size (Docker: --shm-size")
    wait_for("the loader processes to end", lambda: not marked(work), 5)


def test_a_killed_trainer_leaves_nothing(start, work):
    trainer = start("none")
    wait_for("an epoch", lambda: "epoch   1/90" in said() or trainer.poll() is not None)
    assert len(marked(work)) >= 4  # itself, two loader processes, their fork server
    trainer.kill()
    trainer.wait()
    wait_for("the loader processes to end", lambda: not marked(work), 5)


def test_what_torchrun_leaves_when_it_is_killed_stops_and_is_kept(start, work):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    agent = start("none", sys.executable, *torchrun, "--no-python", flags=("--batch=4",))
    wait_for("an epoch", lambda: "epoch   1/90" in said() or agent.poll() is not None)
    agent.kill()
    agent.wait()
    wait_for("both trainers to stop", lambda: not marked(work), 10)
    assert "go on: python train.py --name run --resume" in said()
