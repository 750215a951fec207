"""Hyperparameter search that keeps its best run: Gaussian process, Hyperband loop, report.

python sweep.py                                        quick sweep on synthetic receipts, CPU
python sweep.py hparams/sweep_lr_wd.json --data DATA   a sweep; further flags go to train.py
python sweep.py hparams/sweep_lr_wd.json --devices 0,1 --enqueue hparams/run8.json
python sweep.py hparams/sweep_lr_wd.json --parallel 8 --launcher "srun --gpus=1"
python sweep.py hparams/sweep_refined.json --enqueue runs/sweep_lr_wd --known   learns from another
python sweep.py --report runs/sweep_lr_wd --html report.html

The file has W&B's sweep schema, in JSON or YAML. A trial is runs/<sweep>/trial-003/, made by
train.py up to its next band (--stop-epoch) and from there on by --resume: decisions depend on whole
epochs only, never on when somebody looked, so a sweep that is killed ends like one that was not.
"""

import os
import signal
import sys


def end_import(*_):
    os.write(2, b"error: interrupted; nothing has begun\n")
    os._exit(130)


# the imports below would answer CTRL-C with a traceback
if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_import)

import contextlib
import csv
import errno
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import files
import space
from bayes import Posterior, fit_gp, suggest
from files import (
    KEPT,
    DataError,
    UsageError,
    exit_code,
    lock,
    lock_folder,
    nearest,
    read_json,
)
from findings import Findings, chance_to_win, paired, project
from report import markdown, page, sweep_blocks
from space import Cube, flags, is_number, leaf, maximised, parse_space, plain

# ---------------------------------------------------------------- stopping rules

# Type pause judges at these shares of the epochs and pauses the lower half: the first is as late as
# a cosine schedule needs to tell runs apart at all, and four cheap looks catch a run that slips
# later. After the cap, paused runs continue band by band, the most likely winner first, as long as
# their chances of beating the best add up to CHANCE or more.
BAND_SHARES = (0.25, 0.375, 0.5, 0.7)
CHANCE = 0.07


def eta_of(rule):
    return rule.get("eta", 2 if rule["type"] == "pause" else 3)


def bands_of(rule, epochs):
    """early_terminate -> epochs, ascending, at which runs are judged."""
    eta = eta_of(rule)
    if rule["type"] == "brackets":
        return sorted({rung for rungs in brackets(epochs, eta) for _, rung in rungs})
    if rule["type"] == "pause":
        return sorted(rule.get("bands") or {max(1, int(share * epochs)) for share in BAND_SHARES})
    if "max_iter" in rule:
        bands = [rule["max_iter"] / eta ** (k + 1) for k in range(int(rule["s"]))]
        return sorted(int(band) for band in bands if band >= 1)

    bands = [float(rule["min_iter"])]
    while bands[-1] * eta <= epochs:
        bands.append(bands[-1] * eta)
    return [int(band) for band in bands]


def brackets(max_iter, eta):
    """Hyperband's brackets (Li et al. 2018, table 1), those that stop runs earliest first. Each is
    a list of rungs (runs, epochs)."""
    deepest = int(math.log(max_iter) / math.log(eta) + 1e-9)
    for s in range(deepest, -1, -1):
        runs = (deepest + 1) // (s + 1) * eta**s
        rungs = [(runs / eta**i, max_iter / eta ** (s - i)) for i in range(s + 1)]

        # with an eta under 2 several rungs may round to one epoch; runs are judged there once, at
        # the first of these rungs
        runs_at = {}
        for rung in rungs:
            count, epochs = (max(1, int(x + 1e-9)) for x in rung)
            runs_at.setdefault(epochs, count)
        yield [(count, epochs) for epochs, count in runs_at.items()]


def judge(values, others, rule, epochs):
    """A run's verdict at the last band that it has reached.

    values [e]: a value an epoch, larger is better; others: the same of the other runs; rule: an
    early_terminate.

    Returns {stop: False} before the first band, and then {rule, epoch, value, bar, rank, of, stop}:
    `epoch` is the band, `bar` the value to reach, `of` the number of runs that reached the band. If
    a guard keeps a run whose value is below the bar, `why` names the guard."""
    bands = [band for band in bands_of(rule, epochs) if band <= len(values)]
    if not bands:
        return {"stop": False}

    # the values of all runs at the band, the best first
    band = max(bands)
    at_band = [curve[band - 1] for curve in others if len(curve) >= band] + [values[band - 1]]
    at_band = sorted(at_band)[::-1]

    # the best 1/eta; the bar is the last of them in brackets, else the next one. A run on it stays
    kept = int(len(at_band) / eta_of(rule))
    last_kept = rule["type"] == "brackets" and kept > 0
    bar = at_band[kept - 1] if last_kept else at_band[kept]
    value = values[band - 1] if rule.get("strict", True) else max(values)
    below = value < bar

    guard = ""
    if rule["type"] == "pause" and sum(len(curve) >= epochs for curve in others) < 3:
        guard = "fewer than 3 finished runs"
    if max(values) >= rule.get("preserve_threshold", math.inf):
        guard = "preserve_threshold"

    verdict = {
        "rule": rule["type"],
        "epoch": band,
        "value": value,
        "bar": bar,
        "of": len(at_band),
        "rank": 1 + sum(other > value for other in at_band),
        "stop": bool(below and not guard),
    }
    if below and guard:
        verdict["why"] = guard
    return verdict


def should_stop(values, others, early_terminate):
    """Whether a run is to be stopped, that is paused, now.

    values [e]: a value an epoch, larger is better; others: the same of every other run;
    early_terminate: as in the sweep file, where `epochs` is the length of a whole run (default: the
    longest curve). Type hyperband is W&B's rule to the letter (sweeps 0.3.0,
    hyperband_stopping.py). Raises UsageError."""
    if not early_terminate:
        return False
    space.check_rule(early_terminate)
    longest = max(map(len, [values, *others]))
    return judge(values, others, early_terminate, early_terminate.get("epochs", longest))["stop"]


# ---------------------------------------------------------------- trial states

ROOT = Path(__file__).resolve().parent
TRAINER = [sys.executable, str(ROOT / "train.py")]

# what an event of state.jsonl and a trial of a history file hold, by examples
CURVE = {"history": [0.0], "rows": [[0.0]]}
VERDICT = {"rule": "", "epoch": 0, "value": 0.0, "bar": 0.0, "rank": 0, "of": 0, "stop": True}
EVENTS = {
    "new": {"number": 0, "params": {}},
    "epochs": CURVE,
    "judged": {"verdict": VERDICT},
    "crashed": {},
    "finished": {},
    "stopped": {},
    "failed": {"why": ""},
    "continued": {"whole": True},
}
KNOWN = {"state": "", **CURVE, "recorded": True, "known": True}  # from another sweep
RECORD = {"number": 0, "params": {}, "state": "", "value": 0.0, "epoch": 0}
MEND = "correct it or put back a copy"


def check_like(x, example, where, name="it"):
    """Raises DataError unless x has the keys and JSON types of an example. A list in the example
    has one item, which stands for every item."""
    number = type(example) is float and is_number(x)
    if type(x) is not type(example) and not number:
        raise DataError(where, f"{name} is {x!r:.80}", MEND)
    if isinstance(example, dict):
        for key in example:
            check_like(x.get(key), example[key], where, key)
    elif isinstance(example, list):
        for item in x:
            check_like(item, example[0], where, name)


def finite(values):
    return all(abs(value) < 1e100 for value in values)


@dataclass(eq=False)
class Trial:
    number: int
    params: dict
    state: str = "pending"  # pending | stopped | finished | failed
    history: list = ()  # metric, a value an epoch
    rows: list = ()  # [seconds, low, high] an epoch, the interval being over pages
    judged: tuple = ()  # verdicts
    crashes: int = 0
    whole: bool = False  # train it to the last epoch without another verdict
    revived: bool = False
    why: str = ""  # reason of a failure
    process: object = None  # the trainer at work on it now
    target: int = 0  # the epoch it is trained to; 0: a trainer of a killed sweep is waited for
    slot: int = -1  # index of the device that it ran on last
    log_start: int = 0  # bytes in its log before the process that runs now
    recorded: bool = True  # its curve is known; a history file may hold the last value only
    known: bool = False  # taken over from another sweep

    def __post_init__(self):
        self.params = plain(self.params)
        self.name = f"trial-{self.number:03d}"


@dataclass
class Sweep:
    """runs/<sweep>/: sweep.json (what is swept) and state.jsonl, one line for each event of a
    trial, which is the whole state. A line counts once its newline is on the disk; half a line is
    cut off. Without a folder nothing is written."""

    folder: Path
    spec: dict
    epochs: int
    trials: list
    extra: list = ()  # flags of every trial
    hparams: object = None  # Hparams of the space's middle, for what the sweep does not vary
    notes: list = field(default_factory=list)  # sentences of a history file

    def __post_init__(self):
        self.cube = Cube(parse_space(self.spec))
        self.metric = leaf(self.spec["metric"]["name"])
        self.sign = 1 if maximised(self.spec) else -1
        self.cap = self.spec.get("run_cap", math.inf)
        self.rule = {"type": ""} | (self.spec.get("early_terminate") or {})
        if "preserve_threshold" in self.rule:  # in the metric's units; values judged are maximised
            self.rule["preserve_threshold"] *= self.sign

    def write(self, event, trial=None, **more):
        """Apply an event, once it is on the disk. Raises OSError."""
        data = {"event": event, "trial": trial.number if trial else 0, **more}
        if self.folder:
            with open(self.folder / "state.jsonl", "a") as file:
                file.write(json.dumps(data) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.apply(data)

    def apply(self, event):
        """Change the state as an event says -> its trial."""
        kind = event["event"]
        if kind == "new":
            # the parameters and constants of today: `open_sweep` lets them change only where no
            # result of the trial does; a replica keeps its own seed
            kept = self.cube.names | {"seed"}
            own = {key: x for key, x in plain(event["params"]).items() if key in kept}
            params = own | self.cube.constants
            if "seed" in own:
                params["seed"] = own["seed"]
            trial = Trial(event["number"], params, **event.get("known", {}))
            self.trials.append(trial)
            self.cap += trial.known
            return trial

        trial = self.trials[event["trial"] - 1]
        if kind == "epochs":
            trial.history = event["history"]
            trial.rows = event["rows"]
        elif kind == "judged":
            trial.judged += (event["verdict"],)
            if event["verdict"]["stop"]:
                trial.state = "stopped"
        elif kind == "crashed":
            trial.crashes += 1
        elif kind == "continued":
            trial.state = "pending"
            trial.revived = True
            trial.whole = event["whole"]
            trial.crashes = 0
        else:
            trial.state = kind
            trial.why = event["why"] if kind == "failed" else ""
        return trial

    def replay(self, event, where):
        """Apply an event of state.jsonl. Raises DataError for an event that no sweep writes."""
        check_like(event, {"event": "", "trial": 0}, where)
        kind = event["event"]
        if kind not in EVENTS:
            raise DataError(where, f"event {kind!r:.80} is unknown", MEND)
        check_like(event, EVENTS[kind], where)
        check_like(event.get("known", KNOWN), KNOWN, where)
        count = len(self.trials)
        expected = event["number"] == count + 1 if kind == "new" else 0 < event["trial"] <= count
        if not expected:
            raise DataError(where, "a trial is missing, or there twice", MEND)
        self.check(self.apply(event), where)

    def check(self, trial, where):
        """Raises DataError for a trial that this sweep cannot have."""
        state = trial.state
        if state in ("finished", "stopped") and not (trial.history and finite(trial.history)):
            state = f"{state} without a value"
        sound = (
            state in ("pending", "failed", "finished", "stopped")
            and self.cube.names <= trial.params.keys()
            and all(len(row) == 3 for row in trial.rows)
        )
        if not sound:
            what = f"trial {trial.number} is {state}, params {trial.params}, rows {trial.rows}"
            raise DataError(where, f"{what:.200}", MEND)

    def history(self):
        """The trials as suggest() takes them."""
        entries = []
        seed = getattr(self.hparams, "seed", 0)
        for trial in self.trials:
            # a stopped run is projected from its last values and the number of its epochs
            with_curve = trial.recorded or trial.state == "stopped"
            entries.append(
                {
                    "params": {**trial.params, "seed": trial.params.get("seed", seed)},
                    "state": trial.state,
                    "value": trial.history[-1] if trial.history else None,
                    "history": list(trial.history) if with_curve else [],
                    "epochs": self.epochs,
                    "sd": paired(trial.rows),
                }
            )
        return entries

    def curve(self, trial):
        """A trial's values, larger being better; only the last one where its curve is not known."""
        values = trial.history if trial.recorded else trial.history[-1:]
        return [self.sign * value for value in values]

    def finished(self):
        """Curves of the finished trials, also of those of which only the last value is known."""
        return [self.curve(trial) for trial in self.trials if trial.state == "finished"]

    def others(self, judged):
        """Curves of all trials but `judged` that did not fail and whose curve is known."""
        return [
            self.curve(trial)
            for trial in self.trials
            if trial is not judged and trial.state != "failed" and trial.recorded
        ]


def checked_spec(spec, path):
    """Sweep dict of a file -> the same with defaults. Raises UsageError naming file and key."""
    try:
        return space.check_spec(spec)
    except UsageError as error:
        where, *rest = error.args
        raise UsageError(f"{path}: {where}", *rest) from None


def load_spec(path):
    """Sweep file -> its dict, with defaults. Raises DataError, UsageError naming file and key."""
    if Path(path).is_dir():
        remedy = "give its sweep file, or add --continue-trial; --report and --status take folders"
        raise UsageError(path, "is a folder", remedy)
    spec = read_json(path)
    if isinstance(spec, dict) and not {"method", "parameters"} & set(spec):
        raise UsageError(path, "has no method", f"one run is: train.py --hparams {path}")
    spec = checked_spec(spec, path)

    name = spec["metric"]["name"]
    if leaf(name) not in space.LOGGED or "test" in name:
        hint = f"but {', '.join(space.LOGGED)}{nearest(leaf(name), space.LOGGED)}"
        raise UsageError(f"{path}: metric", f"train.py writes no {files.shown(name)}", hint)

    command = spec.get("command") or []
    words = command if isinstance(command, list) else [command]
    for word in map(str, words):
        if word[:1] == "-" or "=" in word:
            remedy = "give it on the command line"
            raise UsageError(f"{path}: command", f"{word} is not used", remedy)
    return spec


def read_sweep(path):
    """A sweep folder, or a history (see --help), -> Sweep. Raises DataError, UsageError."""
    from hparams import saved_hparams  # here: it brings OpenCV, which suggest() does without

    path = Path(path)
    if not path.is_dir():
        return read_history(path)
    file = path / "sweep.json"
    if not file.exists():
        raise UsageError(path, "is not a sweep folder", "give runs/NAME of a sweep")
    data = read_json(file)
    check_like(data, {"sweep": {}, "extra": [""], "hparams": {}}, file)
    spec = checked_spec(data["sweep"], file)
    hparams = saved_hparams(data["hparams"], file)
    sweep = Sweep(path, spec, hparams.epochs, [], data["extra"], hparams)

    log = path / "state.jsonl"
    if log.exists():
        whole, _, _ = log.read_text("utf-8", "replace").rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            where = f"{log}: line {number}"
            sweep.replay(read_json(where, line), where)
    return sweep


def read_history(path):
    """A history file -> Sweep. Raises DataError, UsageError."""
    data = read_json(path)
    if not isinstance(data, dict) or "trials" not in data:
        what = "is a sweep file, or another file without trials"
        remedy = "give runs/NAME of a sweep that ran, or a history (see --help)"
        raise UsageError(path, what, remedy)
    optional = {"extra": [""], "notes": [""]}
    data = {key: [] for key in optional} | data
    check_like(data, {"sweep": {}, "epochs": 0, "trials": [{}], **optional}, path)
    spec = checked_spec(data["sweep"], path)
    epochs = data["epochs"]
    sweep = Sweep(Path("runs") / path.stem, spec, epochs, [], data["extra"], None, data["notes"])
    for number, record in enumerate(data["trials"], 1):
        where = f"{path}: trial {number}"
        check_like(record, RECORD, where)
        value = record["value"]
        epoch = record["epoch"]
        if record["number"] != number or record["state"] == "pending" or not 0 < epoch <= epochs:
            raise DataError(where, f"is {record!r:.200}", MEND)
        space.check_share(where, spec["metric"]["name"], value)
        trial = Trial(number, record["params"], record["state"], [value] * epoch, recorded=False)
        sweep.check(trial, where)
        sweep.trials.append(trial)
    return sweep


def open_locked(folder):
    """Lock a folder, since only the holder of the lock may write there, and read its Sweep. Returns
    (Sweep, None in a new folder; the lock). Raises UsageError if another process holds it."""
    held = lock_folder(folder, "lock", "another sweep is running on this folder")
    log = folder / "state.jsonl"
    if log.exists():  # without the half a line that a kill left
        os.truncate(log, log.read_bytes().rfind(b"\n") + 1)
    return (read_sweep(folder) if (folder / "sweep.json").exists() else None), held


def open_sweep(draft):
    """(Sweep, lock) of the draft's folder. A new folder is made. A sweep that is already there
    continues with the draft's settings if its trials stay comparable; if not, raises UsageError
    naming the key."""
    folder = draft.folder
    if (folder / "hparams.json").exists():
        raise UsageError(folder, "is a run of train.py's", "give --name NEW")
    folder.mkdir(parents=True, exist_ok=True)
    sweep, held = open_locked(folder)

    if sweep and sweep.trials:
        before = essence(sweep)
        now = essence(draft)
        begun = any(
            trial.history or (folder / trial.name / "hparams.json").exists()
            for trial in sweep.trials
            if trial.state != "failed"
        )
        for key in before | now:
            value = before.get(key)
            new = now.get(key)
            # a trial that has not begun takes a new constant, but has no value of what varies now
            if value != new and (begun or new == "varying"):
                said = "unset" if value in (None, "") else value
                what = f"holds trials with {key} {said}, which would not compare"
                raise UsageError(folder, what, "give the same, or --name NEW")
        had = {**sweep.spec, "flags": sweep.extra}
        given = {**draft.spec, "flags": draft.extra}
        changed = [key for key in sorted(had | given) if had.get(key) != given.get(key)]
        if changed:
            print(f"{folder} goes on with another {', '.join(changed)}")

        # values that train.py refused are corrected in the file: a trial that waits with them,
        # which would stop the sweep again and again, ends
        for trial in sweep.trials:
            has_run = trial.state != "pending" or (folder / trial.name / "hparams.json").exists()
            if not has_run and inside(sweep, trial) and not inside(draft, trial):
                sweep.write("failed", trial, why="its values were taken out before it began")

    made = {"sweep": draft.spec, "extra": draft.extra, "hparams": asdict(draft.hparams)}
    files.replace_file(folder / "sweep.json", json.dumps(made, indent=1))
    return read_sweep(folder), held


def inside(sweep, trial):
    """Whether what varies in a sweep can have the trial's values."""
    return all(0 <= u <= 1 for u in sweep.cube.encode(trial.params))


def essence(sweep):
    """{key: value} of all that comparable trials have in common: the metric, which parameters vary,
    and what constants, flags and --hparams give train.py, except values that change no result."""
    same = asdict(sweep.hparams) | dict.fromkeys(sweep.cube.names, "varying")
    same |= {"metric": sweep.metric, **sweep.cube.constants}
    return {key: x for key, x in same.items() if x == "varying" or key not in FREE}


def trainer_args(words, ours=()):
    """Flags for train.py -> its parsed arguments. Raises UsageError, also for a flag that sets one
    of `ours`, the keys that the sweep sets."""
    from command import trainer_parser

    parser = trainer_parser()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        if ours:  # a user typed them: the nearest flag may be one of the sweep's own
            parser.conflict_handler = "resolve"
            add_arguments(parser)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for key in ours:
        if vars(args).get(key) != parser.get_default(key):
            raise UsageError(f"--{key.replace('_', '-')}", "is the sweep's to set; leave it out")
    return args


def resolve(words):
    """train.py's flags -> Hparams. Raises DataError, UsageError."""
    from command import resolve_hparams

    return resolve_hparams(trainer_args(words))


def resolve_space(cube, extra):
    """Hparams of the space's middle. Raises DataError, UsageError where train.py would refuse
    that middle, the lowest or the highest point, or the lowest lr with the highest eta_min."""
    low, high, middle = (cube.decode(np.full(len(cube.free), u)) for u in (0.0, 1.0, 0.5))

    # the middle, but with the lowest lr and the highest eta_min: eta_min must not exceed lr
    crossed = dict(middle)
    worst = {"lr": min, "eta_min": max}
    for d in cube.free:
        values = list(filter(is_number, d.levels or (low[d.name], high[d.name])))
        if d.name in worst and values:
            crossed[d.name] = worst[d.name](values)

    for params in (crossed, low, high, middle):
        try:
            hparams = resolve(extra + flags(params))
        except UsageError as error:
            where, what, remedy, _ = error.args
            remedy = remedy or "change the parameters or flags"
            if where != "flags":
                what = f"{where}: {what}"
            raise UsageError("a trial of this sweep", what, remedy) from None
    return hparams  # those of the middle, the last one


# ---------------------------------------------------------------- processes

RETRIES = 2  # of a trial whose process or machine died, from its last checkpoint
AGAIN = 30  # seconds before a trial that crashed, or still runs on another host, is tried again
NEW = "a new trial"


def run_sweep(sweep, options, queue=(), only=None):
    """Run trials, or the one `only`, until the cap, then revive. Raises DataError, UsageError."""
    running = []
    failures = 0  # in a row
    trials = [only] if only else sweep.trials
    for trial in trials:
        if trial.state == "pending":
            settle(sweep, trial)
            if adopt(sweep, trial):
                running.append(trial)
    try:
        while True:
            # start what there is room for
            while len(running) < options.parallel:
                job = next_job(sweep, queue, only, running)
                if job is None:
                    break
                trial, trial.target = job
                free = set(range(options.parallel)) - {other.slot for other in running}
                if trial.slot not in free:
                    trial.slot = min(free)
                start_trainer(sweep, trial, options)
                running.append(trial)
            if not running:
                return

            # wait until a process ends, and see what it brought
            wait_for_one([trial.process for trial in running])
            for trial in [t for t in running if t.process.poll() is not None]:
                running.remove(trial)
                if trial.target:
                    collect(sweep, trial, trial.process.returncode)
                if trial.state != "pending":
                    failures = failures + 1 if trial.state == "failed" else 0
            if failures >= 3:
                what = f"three trials failed in a row, the last one: {trial.why}"
                raise DataError(sweep.folder, what, "see the .log files, then start it again")
    finally:
        # train.py saves and a resume loses nothing (under srun, which kills it, the epoch is lost);
        # the trial stays pending
        for trial in running:
            trial.process.send_signal(signal.SIGTERM)
        for trial in running:
            trial.process.wait()


def wait_for_one(processes):
    """Wait until one of these child processes has ended, whatever other children there are."""
    while all(process.poll() is None for process in processes):
        time.sleep(0.05)


def next_job(sweep, queue, only=None, busy=()):
    """The next job, (trial, epochs to train it to), for which a new trial may be proposed; None if
    there is nothing to do now."""
    if only:
        return (only, sweep.epochs) if only.state == "pending" and not busy else None
    goal = sweep.spec["metric"].get("target", math.inf * sweep.sign)
    if any(curve[-1] >= sweep.sign * goal for curve in sweep.finished()):
        return None

    choose = choose_bracket if sweep.rule["type"] == "brackets" else choose_trial
    while (job := choose(sweep, busy)) == NEW:
        params, source = propose(sweep, queue)
        if params is None:
            print(f"every combination was tried: {len(sweep.trials)} trials")
            sweep.cap = len(sweep.trials)
        else:
            sweep.write("new", number=len(sweep.trials) + 1, params=params, source=source)
            print(f"trial {len(sweep.trials)}: {' '.join(flags(params))}")
    return job


def choose_trial(sweep, busy):
    """The next job, (trial, epochs to train it to); NEW if a trial is to be proposed first; None if
    there is nothing to do now."""
    for trial in sweep.trials:
        if trial.state == "pending" and trial not in busy:
            return trial, next_target(sweep, trial)
    if len(sweep.trials) < sweep.cap:
        return NEW
    return None if busy else revive(sweep)


def next_target(sweep, trial):
    """Epochs after which the trial's process is to end: its next band, or the last epoch."""
    if trial.whole or not sweep.rule["type"]:
        return sweep.epochs
    bands = bands_of(sweep.rule, sweep.epochs)
    return min([b for b in bands if len(trial.history) < b < sweep.epochs], default=sweep.epochs)


def revive(sweep):
    """The job that continues the stopped run most likely to beat the best finished one; None if no
    run may continue, or if even all of them together are unlikely to win."""
    limit = sweep.rule.get("revive", math.inf if sweep.rule["type"] == "pause" else 0)
    more = sum(t.revived for t in sweep.trials if t.state != "failed") < limit
    finished = sweep.finished()
    chances = {
        trial: chance_to_win(sweep.curve(trial), finished, sweep.epochs)
        for trial in sweep.trials
        if trial.state == "stopped" and not trial.known and (more or trial.revived)
    }
    if not chances or sum(chances.values()) < CHANCE:
        return None

    trial = max(chances, key=chances.get)
    sweep.write("continued", trial, whole=False, why=f"chance to win {chances[trial]:.3f}")
    chance = f"chance to beat the best {chances[trial]:.0%}"
    print(f"trial {trial.number} goes on from epoch {len(trial.history)}: {chance}")
    return trial, next_target(sweep, trial)


def choose_bracket(sweep, busy):
    """What `choose_trial` returns, for type brackets. Brackets are filled in turn with the sweep's
    own trials, in order of number; those known from another sweep have no place in them.

    When all runs of a bracket have reached a rung, the best 1/eta go on, the others are paused."""
    end = 0  # of a bracket: the number of trials up to there
    ours = [trial for trial in sweep.trials if not trial.known]
    cap = sweep.cap - len(sweep.trials) + len(ours)
    table = itertools.cycle(brackets(sweep.epochs, eta_of(sweep.rule)))
    while end < cap:
        rungs = next(table)
        first = end
        end = min(end + rungs[0][0], cap)
        group = ours[first:end]

        # the first rung that a trial of the bracket has not reached yet
        for _, rung in rungs:
            group = [trial for trial in group if trial.state != "failed"]
            late = [trial for trial in group if len(trial.history) < rung]
            for trial in late:
                if trial not in busy:
                    # one that was paused takes the place of one that failed since
                    if trial.state == "stopped":
                        sweep.write("continued", trial, whole=False, why="another one failed")
                    return trial, rung

            # trials are at work on the rung or missing from the bracket, or the bracket is finished
            if late or len(ours) < end or not group or rung >= sweep.epochs:
                break
            group = promote(sweep, group, rung)
        if len(ours) < end:
            return NEW
    return None


def promote(sweep, group, rung):
    """Judge the trials of a bracket that have all reached a rung -> those that go on."""
    group = sorted(group, key=lambda trial: -sweep.sign * trial.history[rung - 1])
    keep = max(1, int(len(group) / eta_of(sweep.rule)))
    bar = group[keep - 1].history[rung - 1]
    for rank, trial in enumerate(group, 1):
        if rung not in [verdict["epoch"] for verdict in trial.judged]:
            verdict = {
                "rule": "brackets",
                "epoch": rung,
                "value": trial.history[rung - 1],
                "rank": rank,
                "of": len(group),
                "bar": bar,
                # --continue-trial may have taken it to its end
                "stop": rank > keep and trial.state != "finished",
            }
            sweep.write("judged", trial, verdict=verdict)
    return group[:keep]


def propose(sweep, queue):
    """(params, source) of the next trial: the first enqueued one that was not tried, else what
    suggest() returns, which is None once all were tried. Its generator is seeded by (seed, number
    of trials), so that a restarted sweep proposes the same."""
    tried = {sweep.cube.key(trial.params) for trial in sweep.trials}
    for source, params in queue:
        if sweep.cube.key(params) not in tried:
            return params, source
    rng = np.random.default_rng((sweep.spec.get("seed", 0), len(sweep.trials)))
    params = suggest(sweep.spec, sweep.history(), rng)
    return params and plain(params), "suggest"


def start_trainer(sweep, trial, options):
    """Start train.py up to the trial's target. Raises UsageError if the launcher is not there.

    The process inherits a lock of the trial; the locked file holds the number of its slot. If the
    sweep is killed, its successor waits for the orphan to reach its band instead of starting a
    second trainer in the same folder or on the same device."""
    folder = sweep.folder / trial.name
    begun = (folder / "hparams.json").exists()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)  # killed before there was anything to keep

    command = [*options.launcher, *TRAINER, *sweep.extra, *flags(trial.params)]
    if begun:
        command.append("--resume")
    command.append(f"--name={sweep.folder.name}/{trial.name}")
    command.append(f"--stop-epoch={trial.target if trial.target < sweep.epochs else 0}")
    environment = dict(os.environ)
    if options.devices:
        environment["CUDA_VISIBLE_DEVICES"] = options.devices[trial.slot]
    if not options.launcher:
        environment["TRIALS_SIDE_BY_SIDE"] = str(options.parallel)  # which share the cores

    with lock(f"{folder}.lock") as held, open(f"{folder}.log", "ab") as log:
        Path(held.name).write_text(str(trial.slot))
        trial.log_start = log.tell()
        try:
            trial.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                pass_fds=[held.fileno()],
            )
        except OSError as error:
            raise UsageError("--launcher", f"{command[0]}: {error.strerror}") from None


def adopt(sweep, trial):
    """Whether a trainer that a killed sweep left still trains the trial. If so, trial.process ends
    when that trainer does."""
    path = sweep.folder / f"{trial.name}.lock"
    if held := lock(path):
        held.close()
        return False
    print(f"trial {trial.number} still runs from before; waiting for it")
    wait = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX)"
    # CTRL-C goes to all of a terminal's session, and would end this one with a traceback
    trial.process = subprocess.Popen([sys.executable, "-c", wait, path], start_new_session=True)
    trial.slot = int(path.read_text() or 0)
    return True


def collect(sweep, trial, code):
    """Record what a trainer with this exit code has brought. Raises DataError, UsageError."""
    # the last lines that this process has written, and the epochs that there are now
    said = (sweep.folder / f"{trial.name}.log").read_bytes()[trial.log_start :]
    tail = said[-4000:].decode(errors="replace").strip().splitlines()[-5:]
    history, rows = read_rows(sweep, trial)
    if history != list(trial.history):
        sweep.write("epochs", trial, history=history, rows=rows)
    if code:
        check_disk(sweep, trial, tail)

    # did train.py refuse, fail, finish or crash? Tracebacks and OSErrors end with 1, too: crashes
    errors = [line for line in tail if line.startswith("error: ") and not line.endswith(KEPT)]
    if code == 2 or (code == 1 and errors):
        line = (errors or tail or ["no message"])[-1]
        if "another process is training there" in line:  # locks of this host do not show it
            print(f"trial {trial.number} still runs on another host; asking again in {AGAIN} s")
            time.sleep(AGAIN)
            return
        why = refusal(sweep, trial, code, line)
    elif not finite(history):
        why = "non-finite metric"
    elif code in (3, 4):
        why = "out of memory" if code == 3 else "non-finite loss"
    elif code == 0 and len(history) >= trial.target:
        print(f"trial {trial.number} epoch {len(history)}/{sweep.epochs}: {history[-1]:.4f}")
        return settle(sweep, trial)
    elif trial.crashes < RETRIES:  # whatever the code: srun gives 0 when its node dies
        sweep.write("crashed", trial, code=code, tail=tail)
        retry = f"retry {trial.crashes} of {RETRIES} from epoch {len(history)}"
        print(f"trial {trial.number} crashed (exit code {code}): {retry}")
        return time.sleep(AGAIN)  # or an outage of a minute would use up all retries
    else:
        why = f"crashed {RETRIES + 1} times, exit code {code}"
    sweep.write("failed", trial, why=why, tail=tail)
    print(f"trial {trial.number} failed, {why}: {' | '.join(tail[-2:])}")


def check_disk(sweep, trial, tail):
    """Raises DataError if the disk is full, which is not the trial's fault."""
    messages = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    full = any(message in line for message in messages for line in tail)
    if full or shutil.disk_usage(sweep.folder).free < 1 << 20:
        what = f"trial {trial.number}: {messages[0]}"
        raise DataError(sweep.folder, what, "make room and start again; nothing is lost")


def refusal(sweep, trial, code, line):
    """Why train.py, which ended with this code and error line, refuses the trial's values. If it
    would not refuse them, the user has to mend something else, such as missing data: raises
    DataError or UsageError with train.py's line."""
    try:
        resolve(sweep.extra + flags(trial.params))
    except UsageError as error:
        return f"train.py refuses its values: {error}"
    kind = UsageError if code == 2 else DataError
    what = line.removeprefix("error: ")
    raise kind(f"trial {trial.number}: train.py stops", what, "correct that; nothing is lost")


def read_rows(sweep, trial):
    """Metric and [seconds, low, high] of each epoch in log.csv. Raises DataError."""
    path = sweep.folder / trial.name / "log.csv"
    if not path.exists():
        return [], []
    columns = ("seconds", f"{sweep.metric}_lo", f"{sweep.metric}_hi")
    try:
        rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
        values = [float(row[sweep.metric]) for row in rows]
        return values, [[float(row.get(c) or "nan") for c in columns] for row in rows]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise DataError(path, f"is damaged ({error})", "remove it: last.pt has it too") from None


def settle(sweep, trial):
    """Record what follows from the epochs of a pending trial: it ends, is judged, or trains on."""
    rule = sweep.rule
    done = len(trial.history)
    if not finite(trial.history):  # a kill came before its failure was written
        return sweep.write("failed", trial, why="non-finite metric")
    if done >= sweep.epochs:
        return sweep.write("finished", trial)

    judging = rule["type"] not in ("", "brackets") and not trial.whole
    judged = [verdict["epoch"] for verdict in trial.judged]
    if not judging or done not in bands_of(rule, sweep.epochs) or done in judged:
        return
    if trial.revived:
        return sweep.write("stopped", trial, why="waits for its chance against the others")

    verdict = judge(sweep.curve(trial), sweep.others(trial), rule, sweep.epochs)
    for key in ("value", "bar"):
        verdict[key] *= sweep.sign
    sweep.write("judged", trial, verdict=verdict)
    word = "paused" if verdict["stop"] else "goes on"
    rank = "{value:.4f} is rank {rank} of {of}, bar {bar:.4f}".format(**verdict)
    guard = f" (kept: {verdict['why']})" if "why" in verdict else ""
    print(f"trial {trial.number} {word} at epoch {done}: {rank}{guard}")


def simulate(curves, early_terminate):
    """Curves [n, epochs] of whole runs, larger is better -> epochs [n] that a sweep trains each."""
    numbers = {"min": 0.0, "max": float(len(curves))}
    spec = {
        "metric": space.METRIC,
        "run_cap": len(curves),
        "early_terminate": early_terminate,
        "parameters": {"run": numbers},
    }
    queue = [("", {"run": k}) for k in range(len(curves))]
    sweep = Sweep(None, spec, len(curves[0]), [])
    with contextlib.redirect_stdout(None):
        while job := next_job(sweep, queue):
            trial, target = job
            curve = curves[trial.number - 1][:target]
            sweep.write("epochs", trial, history=list(map(float, curve)), rows=[])
            settle(sweep, trial)
    return np.array([len(trial.history) for trial in sweep.trials])


# ---------------------------------------------------------------- command line

QUICK = ROOT / "hparams" / "sweep_quick.json"
HISTORY = """{sweep: as in its file, epochs: of a whole run, trials: [{number: from 1, params: {},
value: at its last epoch, epoch: that, state: finished | stopped | failed}, ...]} and, if wanted,
extra: [flags of every trial], notes: [sentences]; JSON or YAML"""
FREE = {"workers", "cache"}  # flags that change no result
# flags that a sweep gives itself
OURS = {"stop_epoch", "resume", "rescore", "name", "seeds", "print_hparams"}
RECORDED = {"split", "tuned", "text_height"}  # what a run or --tune has written, no choices
# the options that each mode takes besides its own
TRAIN = "sweep parallel devices launcher"
MODES = {
    "report": "html json",
    "replay": "rule",
    "status": "",
    "wandb": "sweep",
    "continue_trial": TRAIN,
    "a run": f"{TRAIN} name",
    "enqueue": f"{TRAIN} name known",
}


def make_parser():
    from command import Parser

    parser = Parser(usage="sweep.py [SWEEP] [flags]", description=__doc__)
    add_arguments(parser)
    return parser


def add_arguments(parser):
    parser.add_argument("sweep", nargs="?", metavar="SWEEP", help="file (default: a quick sweep)")

    add = parser.add_argument_group("run").add_argument
    add("--name", help="folder under runs/ (default: the file's stem)")
    add("--enqueue", nargs="+", default=[], metavar="FILE|DIR", help="hparams, sweeps to try first")
    known = "take the enqueued sweep's trials as results instead of running them, beside run_cap"
    add("--known", action="store_true", help=known)
    parallel = "trials side by side (default: one a device), not a trial's loader processes"
    add("--parallel", type=int, metavar="N", help=parallel)
    add("--devices", type=lambda s: s.split(","), default=[], metavar="0,1", help="GPUs to use")
    add("--launcher", type=shlex.split, default=[], metavar="CMD", help='such as "srun --gpus=1"')
    add("--continue-trial", type=int, metavar="N", help="train this trial of SWEEP to its end")

    title = "look; DIR is a sweep's folder, FILE a history like hparams/history_v5inrfwe.json"
    add = parser.add_argument_group(title, HISTORY).add_argument
    add("--status", metavar="DIR", help="its trials, one a line")
    add("--report", metavar="DIR|FILE", help="print and write report.md: ranking, importance, luck")
    add("--html", metavar="FILE", help="with --report: the same with plots, one page")
    add("--json", action="store_true", help="with --report: print its numbers, one JSON object")
    add("--replay", metavar="DIR|FILE", help="what each stopping rule would have done")
    add("--rule", metavar="JSON|SWEEP", help="with --replay: what this early_terminate would have")
    add("--wandb", action="store_true", help="print SWEEP as W&B's schema has it")


def parse(argv):
    """Command line -> (mode, options); options.extra are flags for train.py. Raises UsageError."""
    parser = make_parser()
    options, extra = parser.parse_known_args(argv)
    given = [key for key in vars(options) if vars(options)[key] != parser.get_default(key)]
    mode = next((key for key in MODES if key in given), "a run")

    if extra and mode not in ("a run", "enqueue"):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    for key in given:
        if key != mode and key not in MODES[mode].split():
            homes = [home for home in MODES if key in MODES[home].split()]
            what = f"has no effect with {mode}, it belongs to {', '.join(homes) or 'nothing else'}"
            raise UsageError(f"--{key}".replace("_", "-"), what.replace("_", "-"))

    devices = len(options.devices)
    for device in options.devices:
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", device) or options.devices.count(device) > 1:
            raise UsageError("--devices", f"has {device!r}", "give GPUs, each once, such as 0,1")
    if options.parallel is None:
        options.parallel = devices or 1
    if options.parallel < 1 or 0 < devices < options.parallel:
        raise UsageError("--parallel", f"is {options.parallel}", "give 1 or more, one a device")
    options.extra = extra
    return mode, options


def run(argv):
    mode, options = parse(argv)
    actions = {
        "report": print_report,
        "replay": print_replay,
        "status": print_status,
        "wandb": print_wandb,
        "continue_trial": continue_trial,
    }
    return actions.get(mode, start_sweep)(options)


def start_sweep(options):
    extra = options.extra
    args = trainer_args(extra, OURS)  # first: the sweep file may be the value that a flag lacks
    if args.workers:
        print("--workers are the loader processes of each trial; trials side by side: --parallel")
    spec = load_spec(options.sweep or QUICK)
    name = options.name or (Path(options.sweep).stem if options.sweep else "quick")
    if Path(name).name != name or name == "..":
        raise UsageError("--name", f"{name} is not a folder's name", "give one without /")
    cube = Cube(parse_space(spec))
    trainer_args(extra, cube.names)
    for key in OURS & cube.names:
        raise UsageError(f"parameters: {key}", "is the sweep's to set", "leave it out")
    for key in sorted(cube.names - vars(args).keys()):
        hint = files.nearest(key, vars(args))
        raise UsageError(f"{options.sweep}: parameters: {key}", f"train.py has no such flag{hint}")
    hparams = resolve_space(cube, extra)

    # all that can be wrong is found before the folder is made
    draft = Sweep(Path("runs") / name, spec, hparams.epochs, [], extra, hparams)
    known = read_known(draft, options.enqueue) if options.known else []
    queue = [] if options.known else read_queue(draft, options.enqueue)
    check_devices(options)
    sweep, held = open_sweep(draft)
    print_idle(sweep)
    with held:
        if options.known:
            add_known(sweep, known)
        run_sweep(sweep, options, queue)
        found = write_report(sweep)
    print_end(sweep, found)
    return not found.finished


def usable_gpus(devices):
    """How many of these GPUs CUDA finds here, up to the first that is missing."""
    code = "import torch; print(torch.cuda.device_count())"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(  # in a session of its own, see adopt
        command, check=False, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    return int(answer.stdout or 0)


def check_devices(options):
    """Raises UsageError for a GPU that this machine lacks; a launcher's are on other machines."""
    if options.devices and not options.launcher:
        count = usable_gpus(options.devices)
        if count < len(options.devices):
            raise UsageError("--devices", f"there is no GPU {options.devices[count]} here")


def print_idle(sweep):
    """Print which keys of the sweep file have no effect."""
    spec = sweep.spec
    rule = spec.get("early_terminate") or {}
    keys = sorted(space.NO_EFFECT & set(spec))
    keys += [f"metric.{key}" for key in spec["metric"] if "impute" in key]
    idle = {"epochs"}
    idle.add("min_iter" if "max_iter" in rule else "s")  # W&B ignores it, too
    if sweep.rule["type"] == "brackets":
        idle |= {"preserve_threshold", "revive"}
    keys += [f"early_terminate.{key}" for key in sorted(idle & rule.keys())]
    if rule and min(bands_of(rule, sweep.epochs), default=sweep.epochs) >= sweep.epochs:
        keys.append(f"early_terminate (no band before epoch {sweep.epochs})")
    if keys:
        print(f"without effect here: {', '.join(keys)}")
    if sweep.sign < 0 and sweep.metric == "hmean":
        print("warning: metric hmean is minimised; for the best give goal maximize")


def print_end(sweep, found):
    """The sweep's result in the last line."""
    if len(found.trials) < sweep.cap:
        print(f"{sweep.metric} has reached metric.target: no more trials")
    print(*found.edges, f"{sweep.folder}/report.md", sep="\n")
    if not found.finished:
        return print("no trial finished")

    if sweep.metric in space.SHARES and not any(row.last for row in found.rows):
        reasons = f"too few epochs ({sweep.epochs}), no pretrained weights, thresh too high"
        log = f"{sweep.folder}/{sweep.trials[-1].name}.log"
        what = f"best {sweep.metric} 0 of all {len(found.rows)} trials: no text was found"
        return print(f"{what}; usual reasons: {reasons}; see {log}")

    lucky = found.finished[0]
    best = found.first or lucky
    worth = np.nan_to_num(best.expected.mean, nan=best.last)
    print("next, the best by what all trials say, and the luckiest, on pages that select it")
    expected = f"best {sweep.metric} {worth:.4f} expected of trial {best.number}"
    print(f"{expected}, luckiest {lucky.last:.4f} of trial {lucky.number}")


def read_past(path):
    """Sweep folder or history -> (Sweep, its trials with a value, the best first); hparams file ->
    (None, [a trial of its values]). Raises DataError, UsageError."""
    from hparams import read_hparams

    if not Path(path).is_dir():
        data = read_json(path)
        if isinstance(data, dict) and "parameters" in data:
            remedy = "give hparams, runs/NAME of a sweep that ran, or a history (see --help)"
            raise UsageError(path, "is a sweep file", remedy)
        if not isinstance(data, dict) or "trials" not in data:
            return None, [Trial(0, read_hparams(path))]
    past = read_sweep(path)
    trials = [trial for trial in past.trials if trial.state in ("finished", "stopped")]
    return past, sorted(trials, key=lambda trial: -past.sign * trial.history[-1])


def place(sweep, base, past, trial):
    """Bring a trial of the sweep `past`, None for an hparams file, into the space of `sweep`.
    Returns its params, and words such as `lr = 3` for all that does not fit.

    A value does not fit if it lies outside the space, or if no parameter sets it and the sweep's
    own trials have another one; a seed always fits. A value that the trial lacks comes from its own
    sweep, else from the dict `base`."""
    rest = asdict(past.hparams) if past and past.hparams else {}
    values = base | rest | trial.params
    params = {}
    unfit = []
    for d in sweep.cube.dims:
        value = values.get(d.name)
        params[d.name] = value
        if not 0 <= d.encode(value) <= 1:
            unfit.append(d.name)

    # values of the trial that no parameter sets, but that change its result
    own = vars(sweep.hparams)
    others = (trial.params.keys() & own.keys()) - params.keys() - FREE - OURS - RECORDED
    unfit += sorted(key for key in others if own[key] != values[key])
    words = [f"{key} = {values.get(key)}" for key in unfit if key != "seed"]
    return params, ", ".join(words)


def read_queue(sweep, paths):
    """[(source, params)] to try first: hparams files, and the trials of past sweeps, best first.
    The sweep's values fill in what they lack. Prints what lies outside the space. Raises DataError,
    UsageError."""
    queue = []
    for path in paths:
        past, trials = read_past(path)
        for trial in trials:
            source = f"{path}: trial {trial.number}" if past else path
            params, outside = place(sweep, asdict(sweep.hparams), past, trial)
            if outside:
                remark = "constants stay the sweep's, the others are tried"
                print(f"{source}: {outside} outside the space: {remark}")
            queue.append((source, params | sweep.cube.constants))
    return queue


def read_known(sweep, paths):
    """[(params, result)] of the trials of past sweeps that lie in the space, best first. Prints
    which do not. Raises DataError, UsageError."""
    known = []
    own = asdict(sweep.hparams)
    for path in paths:
        past, trials = read_past(path)
        if not past or (past.metric, past.epochs) != (sweep.metric, sweep.epochs):
            raise UsageError(path, f"no {sweep.metric} of {sweep.epochs} epochs", "drop --known")
        # the same flags may name a file that has changed since
        had = asdict(past.hparams) if past.hparams else {}
        fixed = had.keys() - past.cube.names - sweep.cube.names - FREE - OURS - RECORDED
        other = [f"{key} = {had[key]}" for key in sorted(fixed) if had[key] != own[key]]
        if other or past.extra != sweep.extra:
            words = ", ".join(other) or " ".join(past.extra) or "none"
            print(f"warning: {path}: its trials had other flags: {words}")

        for trial in trials:
            params, outside = place(sweep, sweep.cube.constants, past, trial)
            # that of a replica, or of the flags of its sweep
            seed = trial.params.get("seed", getattr(past.hparams, "seed", own["seed"]))
            if seed != own["seed"]:
                params["seed"] = seed
            if outside:
                print(f"{path}: trial {trial.number}: {outside} outside the space: left out")
            else:
                known.append((params, {key: vars(trial)[key] for key in KNOWN} | {"known": True}))
    return known


def add_known(sweep, known):
    """Make trials of past sweeps the sweep's own, each once; those that it has run are its own
    already."""
    for params, result in known:
        if params not in [trial.params for trial in sweep.trials if trial.state != "failed"]:
            sweep.write("new", number=len(sweep.trials) + 1, params=params, known=result)
    count = sum(trial.known for trial in sweep.trials)
    print(f"{count} trials are known; run_cap counts new ones only, {sweep.cap} are all in all")


def continue_trial(options):
    folder = Path(options.sweep or "")
    home = folder.absolute().parent  # not resolved: the folder may be a link
    if not (folder / "sweep.json").exists() or home.resolve() != Path("runs").resolve():
        raise UsageError(folder, "is not a sweep's folder in ./runs", "give runs/NAME")
    check_devices(options)
    sweep, held = open_locked(folder)
    number = options.continue_trial
    trial = next((trial for trial in sweep.trials if trial.number == number), None)
    if trial is None or trial.known or trial.state == "finished" or not finite(trial.history):
        raise UsageError(folder, f"has no trial {number} that can go on", "see --status")
    with held:
        sweep.write("continued", trial, whole=True, why="--continue-trial")
        run_sweep(sweep, options, only=trial)
        write_report(sweep)
    return trial.state == "failed"


def write_report(sweep):
    """Write report.md -> Findings."""
    found = Findings(sweep, fit_gp, Posterior)
    files.replace_file(sweep.folder / "report.md", markdown(sweep_blocks(found)))
    return found


def print_report(options):
    """Print the report, or with --json the numbers behind it, where null stands for unknown."""
    sweep = read_sweep(options.report)
    source = options.report
    report = sweep.folder / "report.md"  # which this command writes, too
    files.guard([options.html], [source, report, *Path(source).glob("*.json*")])
    found = Findings(sweep, fit_gp, Posterior)
    blocks = list(sweep_blocks(found))
    written = text = markdown(blocks)
    if options.html:
        files.replace_file(options.html, page(blocks[0][1], blocks))
    if options.json:
        # lists of rows that "trials" has already
        twice = ("rows", "ranking", "sound", "finished", "stopped", "failed", "fair", "out", "top")
        facts = {key: value for key, value in vars(found).items() if key not in twice}
        # JSON has no NaN: json writes it all the same, and reads it as None, which becomes null
        text = json.dumps(facts, default=lambda x: x.tolist() if hasattr(x, "tolist") else vars(x))
        numbers = json.loads(text, parse_constant=lambda _: None)
        text = json.dumps(numbers, indent=1) + "\n"
    with files.text_aside(options.html):
        print(text, end="")
    files.replace_file(report, written)  # last: the folder of a colleague can only be read
    print(f"written: {report}", file=sys.stderr)


def print_wandb(options):
    form, dropped = space.wandb_form(load_spec(options.sweep or QUICK))
    # YAML, which W&B reads, takes 5e-05 for a word and 5.0e-05 for a number
    print(re.sub(r'(?m)^( *("[^"]*": )?-?\d+)e', r"\1.0e", json.dumps(form, indent=1)))
    if dropped:
        print(f"dropped, W&B has no such key: {', '.join(dropped)}", file=sys.stderr)


def print_replay(options):
    """Print what the usual rules, or the one of --rule, would have stopped."""
    sweep = read_sweep(options.replay)
    alive = [trial for trial in sweep.trials if trial.history and trial.state != "failed"]
    if not alive:
        raise DataError(sweep.folder.name, "has no trial with a value yet", "replay it later")
    curves = whole_curves(sweep, alive)
    rules = read_rule(sweep, options.rule) if options.rule else usual_rules(sweep)

    numbers = np.array([str(trial.number) for trial in alive])
    best = int(np.argmax([curve[-1] for curve in curves]))
    best_number = alive[best].number
    total = len(curves) * sweep.epochs
    for name, rule in rules.items():
        trained = simulate(curves, rule)
        early = np.unique(trained[trained < sweep.epochs])
        stops = [f"{', '.join(numbers[trained == epoch])} at epoch {epoch}" for epoch in early]
        saved = total - trained.sum()
        share = f"{saved} of {total} epochs saved ({saved / total:.0%})"
        fate = "kept" if trained[best] == sweep.epochs else "lost"
        print(
            f"{name}: stopped {'; '.join(stops) or 'none'}. {share}, best run {best_number} {fate}"
        )


def whole_curves(sweep, trials):
    """Curves of the trials to the last epoch, larger is better. Prints how many are completed by an
    assumed value."""
    finished = sweep.finished()
    curves = []
    for trial in trials:
        curve = sweep.curve(trial)
        end = project(curve, finished, sweep.epochs)[0] if trial.recorded else curve[-1]
        curves.append((curve + [end] * sweep.epochs)[: sweep.epochs])

    n = len(trials)
    flat = sum(not trial.recorded for trial in trials)
    if flat:
        print(f"{flat} of {n} runs have no curve; their recorded value stands for every epoch")
    short = sum(trial.recorded and len(trial.history) < sweep.epochs for trial in trials)
    if short:
        print(f"{short} of {n} runs are not finished; their projected value stands for the rest")
    return curves


def usual_rules(sweep):
    hyperband = {"type": "hyperband", "min_iter": max(1, sweep.epochs * 10 // 22), "eta": 2}
    rules = {"hyperband": hyperband, "pause": {"type": "pause"}, "brackets": {"type": "brackets"}}
    if sweep.rule["type"]:
        rules[sweep.rule["type"]] = sweep.rule
    rules["hyperband, strict false"] = {**hyperband, "strict": False}
    return rules


def read_rule(sweep, given):
    """JSON, or the name of a file -> {given: its early_terminate}. Raises DataError, UsageError."""
    is_json = given.lstrip()[:1] == "{"
    rule = read_json("--rule", given) if is_json else read_json(given)
    if isinstance(rule, dict):
        rule = rule.get("early_terminate", rule)
    space.check_rule(rule, sweep.metric)
    return {given: Sweep(None, sweep.spec | {"early_terminate": rule}, sweep.epochs, []).rule}


def print_status(options):
    sweep = read_sweep(options.status)
    path = sweep.folder / "lock"
    try:
        running = "a" if path.exists() and lock(path) is None else "no"
    except OSError:  # nobody can lock a file in a folder that is read-only
        running = "perhaps a"
    states = [trial.state for trial in sweep.trials]
    cap = "no cap" if sweep.cap == math.inf else sweep.cap
    counts = [f"{len(states)} trials of {cap}"]
    if known := sum(trial.known for trial in sweep.trials):
        counts.append(f"{known} known, beside run_cap")
    counts += [f"{states.count(s)} {s}" for s in ("finished", "stopped", "failed", "pending")]
    print(f"{sweep.folder}: {', '.join(counts)}, {running} sweep is running")

    for trial in sweep.trials:
        epoch = f"epoch {len(trial.history):3d}/{sweep.epochs}"
        value = f"{trial.history[-1]:.4f}" if trial.history else "-"
        params = " ".join(flag[2:] for flag in flags(trial.params))
        remarks = [trial.why] if trial.why else []
        for verdict in trial.judged[-1:]:
            remarks.append("{rule} at {epoch}: rank {rank} of {of}".format(**verdict))
        line = f"  {trial.number:3d} {trial.state:8s} {epoch}  {value}  {params}"
        print(f"{line}  {'; '.join(remarks)}")


def main(argv=None):
    if sys.stdout:  # None where it was closed
        sys.stdout.reconfigure(line_buffering=True)  # a log up to the moment of a kill
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
