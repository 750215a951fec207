"""The runs behind a table of results on real receipts.

python tests/by_hand/experiments.py DATA [--minutes 28] [--lite2 PT]

Does what is not done yet: trainings, the most telling first, three seeds each, then five folds
with their thresholds and ensemble, then the sweep with and without stopping. After `--minutes` the
command at hand is told to stop, saves itself, and the next call goes on with it. `--list` prints
the commands that are left, `--table` the runs that are there: mean and standard deviation of the
last epoch's H-mean over seeds, and the interval of the paired difference, by group, to the run that
a row changes. --lite2 is a state dict of timm's tf_efficientnet_lite2 (default: its download). Run
folders are runs/NAME-seedN.
"""

import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, read_log

from cleval import mean_scores
from command import Parser
from dbnet import load_checkpoint
from ensemble import EXIT_NOT_BETTER
from interval import bootstrap_groups, paired_difference
from labels import load_labels

SEEDS = 3
SYNTH = "python data.py synth data/pretrain --pages 3000 --unit line"
SCRATCH = "--hparams hparams/best.json --backbone tf_efficientnet_lite2 --neck 96"
LITE2 = f"{SCRATCH} --pretrained WEIGHTS"
B4 = "--hparams hparams/best.json --no-pretrained"
PRETRAIN = "--data data/pretrain --epochs 4 --T_max 4"

# NAME: flags of train.py, and the NAME that it changes; a starred one is trained once, for others
# to start from
RUNS = {
    "lite2": (LITE2, None),
    "lite2-scratch": (f"{SCRATCH} --no-pretrained", "lite2"),
    "b4": (B4, "lite2"),
    "*synth-lite2": (f"{LITE2} {PRETRAIN}", None),
    "lite2-synth": (f"{SCRATCH} --init runs/synth-lite2/last.pt", "lite2"),
    "*synth-b4": (f"{B4} {PRETRAIN}", None),
    "b4-synth": (f"{B4} --init runs/synth-b4/last.pt", "b4"),
    "lite2-704": (f"{LITE2} --size 704", "lite2"),
    "lite2-960": (f"{LITE2} --size 960", "lite2"),
    "lite2-longer": (f"{LITE2} --fit longer --size 1216", "lite2"),  # as many pixels
    "lite2-adam": (f"{LITE2} --optimizer adam --weight-decay 1e-4 --lr 5e-4", "lite2"),
    "lite2-no-ema": (f"{LITE2} --no-ema", "lite2"),
    "lite2-44-epochs": (f"{LITE2} --epochs 44 --T_max 44", "lite2"),
    "lite2-aug-1": (f"{LITE2} --aug-strength 1", "lite2"),
    "lite2-aug-0": (f"{LITE2} --aug-strength 0", "lite2"),
    "lite2-shrink-0.6": (f"{LITE2} --shrink-ratio 0.6", "lite2"),
    "run8": ("--hparams hparams/run8.json --no-pretrained", None),
    "baseline": ("--hparams hparams/baseline.json --no-pretrained", "run8"),
    "run3": ("--hparams hparams/run3.json --no-pretrained", "run8"),
    "run7": ("--hparams hparams/run7.json --no-pretrained", "run8"),
}
FOLDS = [Path(f"runs/cv-fold{k}") for k in range(1, 6)]
MEMBERS = " ".join(f"{folder}/last.pt" for folder in FOLDS)
SWEEPS = {"sweep_lr_wd": {}, "sweep_whole": {"early_terminate": None}}  # with stopping, without


def steps(args):
    """(what comes of it, whether it is there, command), in order; a command that was stopped is
    given as it goes on."""

    def filled(command):
        weights, data = shlex.quote(args.lite2), shlex.quote(args.data)
        return command.replace("WEIGHTS", weights).replace("DATA", data)

    yield "data/pretrain", Path("data/pretrain/train.json").exists(), SYNTH
    for name, (flags, _) in RUNS.items():
        single = name.startswith("*")
        for seed in range(1 if single else SEEDS):
            run = name[1:] if single else f"{name}-seed{seed}"
            start = filled(f"python train.py {flags}" + " --data DATA" * ("--data" not in flags))
            start += f" --name {run} --seed {seed}"
            begun = Path("runs", run, "hparams.json").exists()
            go_on = f"python train.py --name {run} --resume"
            yield run, is_done(Path("runs", run)), go_on if begun else start
    cv = f"python train.py {LITE2} --data DATA --name cv --folds 5 --fold all"
    begun = (FOLDS[0] / "hparams.json").exists()
    yield "five folds", all(map(is_done, FOLDS)), filled(cv) + " --resume" * begun
    tuned, found = "runs/cv-tuned.json", "runs/cv-ensemble.json"
    yield tuned, Path(tuned).exists(), f"python evaluate.py {MEMBERS} --tune --write {tuned}"
    vote = f"python ensemble.py {MEMBERS} --hparams {tuned} --data DATA --out {found}"
    yield found, Path(found).exists(), filled(vote)
    spec = json.loads((ROOT / "hparams/sweep_lr_wd.json").read_text())
    for name, change in SWEEPS.items():
        file, report = Path(f"runs/{name}.json"), Path("runs", name, "report.md")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({**spec, **change}))
        yield report, report.exists(), filled(f"python sweep.py {file} --data DATA --no-pretrained")


def last_state(folder):
    return load_checkpoint(folder / "last.pt", ("hparams", "rows", "scores"))


def is_done(folder):
    rows = read_log(folder)
    return bool(rows) and len(rows) >= last_state(folder)["hparams"].epochs


def run(command, deadline):
    """Its exit code, 143 when the time was up: then it has saved what it has."""
    print(f"$ {command}", flush=True)
    script, *words = shlex.split(command)[1:]
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words])
    try:
        return process.wait(max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        return 143


def print_table(data):
    """One row a NAME: seeds, mean, standard deviation, and the paired difference by group."""
    pages = {}  # name: [N, 4] rows of cleval's "page" at the last epoch, means over seeds
    held = load_labels(data, "val")
    groups = dict(zip([page.name for page in held], bootstrap_groups(held)))
    for name, (_, other) in RUNS.items():
        folders = [f for s in range(SEEDS) if is_done(f := Path("runs", f"{name}-seed{s}"))]
        states = [last_state(folder) for folder in folders]
        if not states:
            continue
        values = [state["rows"][-1]["hmean"] for state in states]
        scores = [state["scores"]["pages"] for state in states]
        hmean = np.mean([[page[key] for key in groups] for page in scores], 0)
        pages[name] = np.stack([hmean, hmean, hmean, np.ones_like(hmean)], 1)
        sd = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "     -"
        line = f"{name:18s} {len(values)} seeds  hmean {statistics.mean(values):.4f}  sd {sd}"
        if other in pages:
            pair = pages[name], pages[other]
            difference = paired_difference(*pair, mean_scores, [*groups.values()])
            line += f"  {difference}, vs {other}"
        print(line)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("data", help="folder with train and val labels", metavar="DATA")
    add("--minutes", type=float, default=28, help="time of this part (28)")
    add("--lite2", default="timm", help="weights of tf_efficientnet_lite2 (timm)")
    add("--list", action="store_true", help="print the commands that are left")
    add("--table", action="store_true", help="print the results so far")
    args = parser.parse_args()
    if args.table:
        return print_table(args.data)
    deadline = time.monotonic() + 60 * args.minutes
    for what, there, command in steps(args):
        if there:
            continue
        if args.list:
            print(command)
        elif time.monotonic() > deadline:
            print(f"time is up; next: {what}")
            return 0
        elif (code := run(command, deadline)) not in (0, EXIT_NOT_BETTER):
            print(f"{what}: exit code {code}" + "; call again to go on" * (code == 143))
            return 0 if code == 143 else code


if __name__ == "__main__":
    sys.exit(main())
