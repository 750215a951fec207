"""The runs behind a table of results on real receipts.

python tests/by_hand/experiments.py DATA [--rows run8,b4] [--minutes 28] [--lite2 PT]

Does what is not done yet: trainings, the most telling first, three seeds each, then five folds
with their thresholds and ensemble, then the sweep with and without stopping. `--rows` trains only
these, one seed of each before the next seed, and draws pages only if one of them learns from them.
After `--minutes` the command at hand is told to stop, saves itself, and the next call goes on with
it. `--list` prints the commands that are left, `--table` the runs that are there: mean and standard
deviation of the last epoch's H-mean over seeds, images/s, and the interval of the paired
difference, by group, to the run that a row changes; runs/table.txt has it after each training.
--lite2 is a state dict of timm's tf_efficientnet_lite2 (default: its download). Run folders are
runs/NAME-seedN.
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
from files import UsageError, exit_code, replace_file
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
ALL = list(RUNS)
FOLDS = [Path(f"runs/cv-fold{k}") for k in range(1, 6)]
MEMBERS = " ".join(f"{folder}/last.pt" for folder in FOLDS)
SWEEPS = {"sweep_lr_wd": {}, "sweep_whole": {"early_terminate": None}}  # with stopping, without


def filled(command, args):
    weights, data = shlex.quote(args.lite2), shlex.quote(args.data)
    return command.replace("WEIGHTS", weights).replace("DATA", data)


def training(name, seed, args):
    """A step, see `steps`: a training of RUNS."""
    flags, _ = RUNS[name]
    folder = Path("runs", run_name(name, seed))
    if (folder / "hparams.json").exists():
        return folder, is_done(folder), f"python train.py --name {folder.name} --resume"
    data = "" if "--data" in flags else " --data DATA"
    command = f"python train.py {flags}{data} --name {folder.name} --seed {seed}"
    return folder, False, filled(command, args)


def run_name(name, seed):
    return name[1:] if name.startswith("*") else f"{name}-seed{seed}"


def needed(rows):
    """Names of RUNS: the rows and, before them, those that they start from."""
    names = []
    for name in rows:
        flags, _ = RUNS[name]
        starts = [other for other in RUNS if f"--init runs/{other.removeprefix('*')}/" in flags]
        names += [*starts, name]
    return list(dict.fromkeys(names))


def trainings(args):
    """(name, seed) of RUNS in order: by row or, with --rows, by seed."""
    names = needed(args.rows)
    pairs = [(name, seed) for name in names for seed in range(1 if name[0] == "*" else SEEDS)]
    if args.rows != ALL:
        pairs.sort(key=lambda pair: pair[1])
    return pairs


def steps(args):
    """(what comes of it, whether it is there, command), in order; a command that was stopped is
    given as it goes on."""
    pairs = trainings(args)
    if any(PRETRAIN in RUNS[name][0] for name, _ in pairs):
        yield "data/pretrain", Path("data/pretrain/train.json").exists(), SYNTH
    for name, seed in pairs:
        yield training(name, seed, args)
    if args.rows == ALL:
        yield from later_steps(args)


def later_steps(args):
    """Folds, their thresholds and ensemble, and sweeps, as `steps` has them."""
    cv = f"python train.py {LITE2} --data DATA --name cv --folds 5 --fold all"
    begun = " --resume" if (FOLDS[0] / "hparams.json").exists() else ""
    yield "five folds", all(map(is_done, FOLDS)), filled(cv, args) + begun

    tuned, found = "runs/cv-tuned.json", "runs/cv-ensemble.json"
    yield tuned, Path(tuned).exists(), f"python evaluate.py {MEMBERS} --tune --write {tuned}"
    vote = f"python ensemble.py {MEMBERS} --hparams {tuned} --data DATA --out {found}"
    yield found, Path(found).exists(), filled(vote, args)

    spec = json.loads((ROOT / "hparams/sweep_lr_wd.json").read_text())
    for name, change in SWEEPS.items():
        file, report = Path(f"runs/{name}.json"), Path("runs", name, "report.md")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({**spec, **change}))
        command = f"python sweep.py {file} --data DATA --no-pretrained"
        yield report, report.exists(), filled(command, args)


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


def table(data):
    """Lines, one a NAME: seeds, mean, standard deviation, and the paired difference by group."""
    lines = []
    pages = {}  # name: [N, 4] rows of cleval's "page" at the last epoch, means over seeds
    held = load_labels(data, "val")
    groups = dict(zip([page.name for page in held], bootstrap_groups(held)))
    for name, (_, other) in RUNS.items():
        folders = [Path("runs", f"{name}-seed{seed}") for seed in range(SEEDS)]
        states = [last_state(folder) for folder in folders if is_done(folder)]
        if not states:
            continue

        values = [state["rows"][-1]["hmean"] for state in states]
        speed = statistics.mean(row["images_s"] for state in states for row in state["rows"])
        scores = [state["scores"]["pages"] for state in states]
        hmean = np.mean([[page[key] for key in groups] for page in scores], 0)
        pages[name] = np.stack([hmean, hmean, hmean, np.ones_like(hmean)], 1)

        sd = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "     -"
        line = f"{name:18s} {len(values)} seeds  hmean {statistics.mean(values):.4f}  sd {sd}"
        line += f"  {speed:.1f} images/s"
        if other in pages:
            pair = pages[name], pages[other]
            difference = paired_difference(*pair, mean_scores, [*groups.values()])
            line += f"  {difference}, vs {other}"
        lines.append(line)
    return lines


def keep_table(data):
    replace_file("runs/table.txt", "".join(f"{line}\n" for line in table(data)))


def chosen_rows(text):
    """Names of RUNS. Raises UsageError."""
    names = text.split(",")
    for name in names:
        if name not in ALL:
            raise UsageError(f"--rows {text}", f"no row {name}", f"there are {', '.join(ALL)}")
    return names


def work(args):
    """The steps that are left, until the time is up. Returns the exit code."""
    deadline = time.monotonic() + 60 * args.minutes
    for what, there, command in steps(args):
        if there:
            continue
        if args.list:
            print(command)
            continue
        if time.monotonic() > deadline:
            print(f"time is up; next: {what}")
            return 0

        code = run(command, deadline)
        if Path("runs").exists():
            keep_table(args.data)
        if code == 143:
            print(f"{what}: stopped; call again to go on")
            return 0
        if code not in (0, EXIT_NOT_BETTER):
            print(f"{what}: exit code {code}")
            return code
    return 0


def main(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("data", help="folder with train and val labels", metavar="DATA")
    add("--rows", default=",".join(ALL), help="train only these, separated by commas (all)")
    add("--minutes", type=float, default=28, help="time of this part (28)")
    add("--lite2", default="timm", help="weights of tf_efficientnet_lite2 (timm)")
    add("--list", action="store_true", help="print the commands that are left")
    add("--table", action="store_true", help="print the results so far")
    args = parser.parse_args(argv)

    def chosen():
        args.rows = chosen_rows(args.rows)
        if args.table:
            return print(*table(args.data), sep="\n")
        return work(args)

    return exit_code(chosen)


if __name__ == "__main__":
    sys.exit(main())
