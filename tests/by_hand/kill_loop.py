"""SIGKILLs at random moments over a training and a sweep, always resumed: python tests/by_hand/kill_loop.py

Each part runs once undisturbed and once killed again and again, on the CPU with a tiny network. The
two must end the same: weights in last.pt and best.pt bit for bit, log.csv with each epoch once, the
sweep with the same trials, curves and decisions, none repeated, none lost; after each kill every
file must be whole. Prints a table; exit code 1 on any difference. The training's processes are
forked from one that has imported train.py, so that kills fall into its work and not into imports;
the sweep's are real ones, killed alone (its trainer lives on as an orphan) or together with the
trainer. About 8 minutes on two cores.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import csv
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TINY = "--data=pages --backbone=mobilenetv3_small_050 --pretrained=none --neck=64 --size=64"
TINY = [*TINY.split(), "--batch=2"]
CLOCKS = [
    "seconds",
    "images_s",
    "wait",
    "peak_gib",
    "val_seconds",
]  # columns that no two runs share
EPOCHS = 16
SWEEP = {
    "method": "bayes",
    "metric": {"name": "loss", "goal": "minimize"},
    "run_cap": 3,
    "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2},
    "parameters": {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}},
}


def child(function, *args, log="log.txt"):
    """Process id of a fork that runs function; the parent stays free of threads."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = function(*args)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    return pid


def call(function, *args, log="log.txt"):
    code = os.waitstatus_to_exitcode(os.waitpid(child(function, *args, log=log), 0)[1])
    assert code == 0, "\n".join(Path(log).read_text().splitlines()[-5:])


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in r.items() if k not in CLOCKS} for r in csv.DictReader(file)]


def check_files(folder):
    """Every file under a folder is whole; returns how many temporary ones the kill left."""
    from dbnet import load_checkpoint

    temporary = 0
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.suffix == ".tmp" or ".tmp" in path.name:
            temporary += 1
        elif path.name.endswith(".json"):
            json.loads(path.read_text())
        elif path.name == "log.csv":
            epochs = [int(row["epoch"]) for row in read_log(path.parent)]
            assert epochs == list(range(1, len(epochs) + 1)), (path, epochs)
        elif path.suffix == ".pt":
            load_checkpoint(path)
    return temporary


def check_killed(folder):
    """The same after a kill, which may leave a temporary file: the exit code does not count it."""
    check_files(folder)


def same_weights(a, b):
    """Assert that two run folders hold the same tensors and the same log."""
    import torch

    def tensors(value, name=""):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in items:
                yield from tensors(part, f"{name}.{key}")

    for file in ("last.pt", "best.pt"):
        one, two = (dict(tensors(torch.load(f / file, weights_only=True))) for f in (a, b))
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert torch.equal(value, two[name]), f"{b / file}: {name} differs"
    assert read_log(a) == read_log(b), f"{b}: log.csv differs"


# ---------------------------------------------------------------- training


def train_main(*flags):
    import train

    return train.main([*TINY, f"--epochs={EPOCHS}", f"--T_max={EPOCHS}", *flags])


def resumed(name):
    return ["--resume"] if Path("runs", name, "hparams.json").exists() else []


def kill_training(rng, kills):
    """Returns the table's row."""
    begin = time.monotonic()
    call(train_main, "--name=calm")
    pace = (time.monotonic() - begin) / EPOCHS
    counts, caught, runs, epochs = 0, 0, 1, 0
    while counts < kills:
        name, folder = f"killed{runs}", Path(f"runs/killed{runs}")
        pid = child(train_main, f"--name={name}", *resumed(name))
        time.sleep(rng.uniform(0, 3 * pace))
        os.kill(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended in (0, -signal.SIGKILL), f"exit code {ended}; see log.txt"
        counts += ended != 0
        if folder.exists():
            call(check_killed, folder)
            caught += any(p.name.startswith(".") for p in folder.iterdir())
        if ended == 0 or counts == kills:
            call(train_main, f"--name={name}", *resumed(name))
            call(check_files, folder)
            call(same_weights, Path("runs/calm"), folder)
            runs, epochs = runs + 1, epochs + EPOCHS
    return ["training", counts, caught, f"{epochs} epochs in {runs - 1} runs"]


# ---------------------------------------------------------------- sweep


def start_sweep(name):
    command = [sys.executable, ROOT / "sweep.py", "s.json", "--name", name, *TINY]
    command += ["--epochs=2", "--T_max=2"]
    log = open("log.txt", "ab")
    return subprocess.Popen(command, stdout=log, stderr=log)


def trainers(name):
    """Process ids of the train.py processes of a sweep."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(w.startswith(f"--name={name}/trial-") for w in words):
            found.append(int(process.name))
    return found


def events(name):
    """Events whose line is whole, as JSON."""
    path = Path("runs", name, "state.jsonl")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def outcome(name):
    """What must not depend on kills: trials, curves, decisions, endings."""
    told = events(name)
    return {
        "new": [e["params"] for e in told if e["event"] == "new"],
        "curves": {e["trial"]: e["history"] for e in told if e["event"] == "epochs"},
        "judged": [(e["trial"], e["verdict"]) for e in told if e["event"] == "judged"],
        "ended": [(e["trial"], e["event"]) for e in told if e["event"] in ("finished", "failed")],
    }


def kill_sweep(rng, kills):
    """Returns the table's row."""
    Path("s.json").write_text(json.dumps(SWEEP))
    begin = time.monotonic()
    assert start_sweep("calm_s").wait() == 0, "see log.txt"
    whole = time.monotonic() - begin
    counts, orphans, caught, written = 0, 0, 0, {}
    while counts < kills:
        process = start_sweep("killed_s")
        if rng.random() < 0.8:  # else imports and the check of the space may be all that is killed
            while process.poll() is None and not trainers("killed_s"):
                time.sleep(0.05)
        try:
            code = process.wait(rng.uniform(0, 1.5 * whole / kills))
            assert code == 0, f"exit code {code}; see log.txt"
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        counts += 1
        alone = rng.random() < 0.4
        for pid in [] if alone else trainers("killed_s"):
            os.kill(pid, signal.SIGKILL)
        orphans += alone and bool(trainers("killed_s"))
        folder = Path("runs/killed_s")
        if folder.exists() and not trainers("killed_s"):
            call(check_killed, folder)
            caught += any(p.name.startswith(".") for p in folder.rglob("*"))
        for trial in [e["trial"] for e in events("killed_s") if e["event"] == "finished"]:
            last = folder / f"trial-{trial:03d}" / "last.pt"
            assert written.setdefault(trial, last.stat().st_mtime_ns) == last.stat().st_mtime_ns
    assert start_sweep("killed_s").wait() == 0, "see log.txt"
    call(check_files, Path("runs/killed_s"))
    assert outcome("killed_s") == outcome("calm_s"), (outcome("killed_s"), outcome("calm_s"))
    for folder in Path("runs/calm_s").glob("trial-*/"):
        call(same_weights, folder, Path("runs/killed_s") / folder.name)
    n = len(outcome("calm_s")["new"])
    return ["sweep", counts, caught, f"{n} trials of 2 epochs, {orphans} kills left an orphan"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, nargs=2, default=(35, 20), help="training, sweep")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    import data

    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        os.chdir(folder)
        call(lambda: data.synth("pages", 16, 0, size=96, words=4, difficulty=0.2) and 0)
        print("part      SIGKILLs  in mid-write  what")
        try:
            for part, kills in ((kill_training, args.kills[0]), (kill_sweep, args.kills[1])):
                begin = time.monotonic()
                name, count, caught, what = part(rng, kills)
                seconds = f"{time.monotonic() - begin:.0f} s"
                print(f"{name:9s} {count:8d}  {caught:12d}  {what}; equal, {seconds}", flush=True)
        except AssertionError as error:
            print(f"DIFFERENT: {error}")
            print("".join(Path("log.txt").read_text().splitlines(True)[-15:]))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
