"""The runs behind a table of results on real receipts.

python tests/experiments.py DATA [--minutes 28] [--lite2 PT]

Trains what is not finished yet, the most telling first, three seeds each; after `--minutes` the
run at hand is told to stop, saves itself, and the next call goes on with it. `--list` prints the
commands that are left, `--table` the runs that are there: mean and standard deviation of the last
epoch's H-mean over seeds, and the paired bootstrap interval of the difference to the run that a row
changes. --lite2 is a state dict of timm's tf_efficientnet_lite2 (default: timm's download). Run
folders are runs/NAME-seedN.
"""

import argparse
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import bootstrap
from train import load_last, read_log

SEEDS = 3
SYNTH = "python data.py synth data/pretrain --pages 3000 --unit line"
LITE2 = "--hparams hparams/best.json --backbone tf_efficientnet_lite2 --neck 96"
B4 = "--hparams hparams/best.json --no-pretrained"
PRETRAIN = "--data data/pretrain --epochs 4 --T_max 4"

# NAME: flags of train.py, and the NAME that it changes; a starred one is trained once, for others
# to start from
RUNS = {
    "lite2": (f"{LITE2} --pretrained WEIGHTS", None),
    "lite2-scratch": (f"{LITE2} --no-pretrained", "lite2"),
    "b4": (B4, "lite2"),
    "*synth-lite2": (f"{LITE2} --pretrained WEIGHTS {PRETRAIN}", None),
    "lite2-synth": (f"{LITE2} --init runs/synth-lite2/last.pt", "lite2"),
    "*synth-b4": (f"{B4} {PRETRAIN}", None),
    "b4-synth": (f"{B4} --init runs/synth-b4/last.pt", "b4"),
    "lite2-640": (f"{LITE2} --pretrained WEIGHTS --size 640", "lite2"),
    "lite2-1280": (f"{LITE2} --pretrained WEIGHTS --size 1280", "lite2"),
    "lite2-adam": (
        f"{LITE2} --pretrained WEIGHTS --optimizer adam --weight-decay 1e-4 --lr 5e-4",
        "lite2",
    ),
    "lite2-no-ema": (f"{LITE2} --pretrained WEIGHTS --no-ema", "lite2"),
    "lite2-44-epochs": (f"{LITE2} --pretrained WEIGHTS --epochs 44 --T_max 44", "lite2"),
    "lite2-aug-1": (f"{LITE2} --pretrained WEIGHTS --aug-strength 1", "lite2"),
    "lite2-aug-0": (f"{LITE2} --pretrained WEIGHTS --aug-strength 0", "lite2"),
    "lite2-shrink-0.6": (f"{LITE2} --pretrained WEIGHTS --shrink-ratio 0.6", "lite2"),
    "run8": ("--hparams hparams/run8.json --no-pretrained", None),
    "baseline": ("--hparams hparams/baseline.json --no-pretrained", "run8"),
    "run3": ("--hparams hparams/run3.json --no-pretrained", "run8"),
    "run7": ("--hparams hparams/run7.json --no-pretrained", "run8"),
}
AFTER = f"""python train.py {LITE2} --pretrained WEIGHTS --data DATA --name cv --folds 5 --fold all
python evaluate.py runs/cv-fold*/last.pt --tune --write tuned.json
python ensemble.py runs/cv-fold*/last.pt --hparams tuned.json --data DATA
python sweep.py hparams/sweep_lr_wd.json --data DATA --pretrained none
python sweep.py --report runs/sweep_lr_wd"""


def commands(args):
    """(run folder or None, command) of everything, in order; a command is a list of strings."""
    yield Path("data/pretrain"), SYNTH
    for name, (flags, _) in RUNS.items():
        single = name.startswith("*")
        for seed in range(1 if single else SEEDS):
            run = name[1:] if single else f"{name}-seed{seed}"
            where = "" if "--data" in flags else f"--data {shlex.quote(args.data)} "
            flags_ = flags.replace("WEIGHTS", shlex.quote(args.lite2))
            yield Path("runs", run), f"python train.py {flags_} {where}--name {run} --seed {seed}"


def is_done(folder):
    if folder.parts[0] == "data":
        return (folder / "train.json").exists()
    if not (folder / "log.csv").exists():
        return False
    state = load_last(folder)
    return len(read_log(folder)) >= state["hparams"]["epochs"]


def train(folder, command, deadline):
    """Start or resume one command; returns its exit code, 143 when the time was up."""
    if (folder / "hparams.json").exists():
        command = f"python train.py --name {folder.name} --resume"
    print(f"$ {command}", flush=True)
    words = [sys.executable, *shlex.split(command)[1:]]
    process = subprocess.Popen(words)
    try:
        return process.wait(max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait()


def print_table():
    """One row a NAME: seeds, mean, standard deviation, and the paired difference by page."""
    pages = {}  # name: [seeds, N] H-mean of each page at the last epoch
    for name, (_, other) in RUNS.items():
        folders = [f for s in range(SEEDS) if is_done(f := Path("runs", f"{name}-seed{s}"))]
        states = [load_last(folder) for folder in folders]
        if not states:
            continue
        values = [state["rows"][-1]["hmean"] for state in states]
        scores = [state["scores"]["pages"] for state in states]
        pages[name] = np.array([[page[key] for key in sorted(page)] for page in scores])
        sd = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "     -"
        line = f"{name:18s} {len(values)} seeds  hmean {statistics.mean(values):.4f}  sd {sd}"
        if other in pages:
            mine, theirs = (pages[k].mean(0)[:, None] for k in (name, other))
            weighted = [np.hstack([m, np.ones_like(m)]) for m in (mine, theirs)]
            low, high = bootstrap(
                weighted[0], lambda sums: sums[..., :1] / sums[..., 1:], minus=weighted[1]
            )[0]
            line += f"  {(mine - theirs).mean():+.4f} [{low:+.4f}, {high:+.4f}] vs {other}"
        print(line)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", help="folder with train and val labels", metavar="DATA")
    parser.add_argument("--minutes", type=float, default=28, help="time of this part (28)")
    parser.add_argument("--lite2", default="timm", help="weights of tf_efficientnet_lite2 (timm)")
    parser.add_argument("--list", action="store_true", help="print the commands that are left")
    parser.add_argument("--table", action="store_true", help="print the results so far")
    args = parser.parse_args()
    if args.table:
        return print_table()
    deadline = time.monotonic() + 60 * args.minutes
    for folder, command in commands(args):
        if is_done(folder):
            continue
        if args.list:
            print(command)
        elif time.monotonic() > deadline:
            print(f"time is up; next: {folder}")
            return 0
        elif code := train(folder, command, deadline):
            print(f"{folder}: exit code {code}" + ("; call again to go on" if code == 143 else ""))
            return 0 if code == 143 else code
    if args.list:
        print(AFTER.replace("DATA", args.data).replace("WEIGHTS", args.lite2))


if __name__ == "__main__":
    sys.exit(main())
