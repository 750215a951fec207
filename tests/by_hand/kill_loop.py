"""SIGKILLs at random moments over a training and a sweep, always resumed.

python tests/by_hand/kill_loop.py [--kills 35 20 30] [--seed 0]

Each part runs once undisturbed and once killed again and again, on the CPU with a tiny network. The
two must end the same: weights in last.pt and best.pt bit for bit, log.csv with each epoch once, the
sweep with the same trials, curves and decisions, none repeated, none lost; after each kill every
file must be whole. Prints a table; exit code 1 on any difference. The training's processes are
forked from one that has imported train.py, so that kills fall into its work and not into imports;
the sweep's are real ones, killed alone (its trainer lives on as an orphan) or together with the
trainer. A third part kills real trainers with two loader processes, which must be gone five seconds
later. About 12 minutes on two cores.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import (
    NETWORK,
    ROOT,
    draw_pages,
    events,
    flat,
    marked,
    outcome,
    processes,
    read_log,
    tiny_sweep,
    wait_for,
)

import train
from command import Parser
from dbnet import load_checkpoint

TINY = [*NETWORK, "--data=pages", "--size=64", "--batch=2"]
EPOCHS = 16
SWEEP = tiny_sweep(early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2})
LOG = Path("../log.txt")  # of all processes; they run in a folder below


def child(function, *args):
    """Process id of a fork that runs function; the parent stays free of threads."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = function(*args)
        except BaseException:  # noqa: BLE001 -- the fork must end here, whatever happened
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    return pid


def exit_code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def call(function, *args):
    assert exit_code_of(child(function, *args)) == 0, "\n".join(LOG.read_text().splitlines()[-5:])


def temporaries(folder):
    return [path for path in folder.rglob("*") if ".tmp" in path.name]


def check_files(folder):
    """Assert that every file under a folder is whole, but for the temporary ones of a kill."""
    for path in set(folder.rglob("*")) - set(temporaries(folder)):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "log.csv":
            epochs = [int(row["epoch"]) for row in read_log(path.parent)]
            assert epochs == list(range(1, len(epochs) + 1)), (path, epochs)
        elif path.suffix == ".pt":
            load_checkpoint(path)


def check_whole(folder):
    check_files(folder)
    assert temporaries(folder) == []


def same_weights(a, b):
    """Assert that two run folders hold the same tensors and the same log."""
    for file in ("last.pt", "best.pt"):
        one, two = (flat(load_checkpoint(folder / file)) for folder in (a, b))
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert not torch.is_tensor(value) or torch.equal(value, two[name]), (b, file, name)
    assert read_log(a) == read_log(b), f"{b}: log.csv differs"


def train_main(*flags):
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
        ended = exit_code_of(pid)
        assert ended in (0, -signal.SIGKILL), f"exit code {ended}; see log.txt"
        counts += ended != 0
        if folder.exists():
            call(check_files, folder)
            caught += bool(temporaries(folder))
        if ended == 0 or counts == kills:
            call(train_main, f"--name={name}", *resumed(name))
            call(check_whole, folder)
            call(same_weights, Path("runs/calm"), folder)
            runs, epochs = runs + 1, epochs + EPOCHS
    return ["training", counts, caught, f"{epochs} epochs in {runs - 1} runs"]


def kill_loaders(rng, kills):
    """Returns the table's row."""
    flags = [*TINY, f"--epochs={4 * EPOCHS}", f"--T_max={4 * EPOCHS}", "--workers=2"]
    call(train.main, [*flags, "--workers=0", "--name=calm_l"])
    counts, caught, runs = 0, 0, 1
    while counts < kills:
        name, folder = f"loaders{runs}", Path(f"runs/loaders{runs}")
        command = [sys.executable, ROOT / "train.py", *flags, f"--name={name}", *resumed(name)]
        with open(LOG, "ab") as log:
            env = os.environ | {"MARK": name}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        while process.poll() is None and len(marked(name)) < 4:  # with its fork server and loaders
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 3))
        process.kill()
        ended = process.wait()
        assert ended in (0, -signal.SIGKILL), f"exit code {ended}; see log.txt"
        wait_for("loader processes to end", lambda: not marked(name), 5)  # noqa: B023
        counts += ended != 0
        call(check_files, folder)
        caught += bool(temporaries(folder))
        if ended == 0 or counts == kills:
            call(train.main, [*flags, "--workers=0", f"--name={name}", *resumed(name)])
            call(check_whole, folder)
            call(same_weights, Path("runs/calm_l"), folder)
            runs += 1
    return ["loaders", counts, caught, f"nothing left, {runs - 1} runs of {4 * EPOCHS} epochs"]


def start_sweep(name):
    command = [sys.executable, ROOT / "sweep.py", "s.json", "--name", name, *TINY]
    with open(LOG, "ab") as log:
        return subprocess.Popen([*command, "--epochs=2", "--T_max=2"], stdout=log, stderr=log)


def trainers(name):
    return list(processes(f"--name={name}/trial-"))


def kill_sweep(rng, kills):
    """Returns the table's row."""
    Path("s.json").write_text(json.dumps(SWEEP))
    begin = time.monotonic()
    assert start_sweep("calm_s").wait() == 0, "see log.txt"
    whole = time.monotonic() - begin
    counts, orphans, caught, written = 0, 0, 0, {}
    calm, folder = Path("runs/calm_s"), Path("runs/killed_s")
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
        if folder.exists() and not trainers("killed_s"):
            call(check_files, folder)
            caught += bool(temporaries(folder))
        for trial in [e["trial"] for e in events(folder, "finished")]:
            last = folder / f"trial-{trial:03d}" / "last.pt"
            assert written.setdefault(trial, last.stat().st_mtime_ns) == last.stat().st_mtime_ns
    assert start_sweep("killed_s").wait() == 0, "see log.txt"
    call(check_whole, folder)
    assert outcome(folder) == outcome(calm), (outcome(folder), outcome(calm))
    for trial in calm.glob("trial-*/"):
        call(same_weights, trial, folder / trial.name)
    return ["sweep", counts, caught, f"trials of 2 epochs, {orphans} kills left an orphan"]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, nargs=3, default=(35, 20, 30), help="a part")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        work = Path(folder, "work")
        work.mkdir()
        os.chdir(work)
        call(draw_pages, "pages", 16)
        print("part      SIGKILLs  in mid-write  what")
        try:
            for part, kills in zip((kill_training, kill_sweep, kill_loaders), args.kills):
                begin = time.monotonic()
                name, count, caught, what = part(rng, kills)
                seconds = f"{time.monotonic() - begin:.0f} s"
                print(f"{name:9s} {count:8d}  {caught:12d}  {what}; equal, {seconds}", flush=True)
        except (AssertionError, TimeoutError) as error:
            print(f"DIFFERENT: {error}")
            print("\n".join(LOG.read_text().splitlines()[-15:]))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
