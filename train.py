"""Train a DBNet text detector on receipts: from a folder of labelled pages to a checkpoint and its
H-mean.

python train.py --hparams hparams/quickstart.json        minutes on a CPU, on synthetic receipts
python train.py --hparams hparams/run8.json --data DATA  the published best run on your receipts
python train.py --hparams hparams/run8.json --data DATA --folds 5 --fold all  cross-validation
python train.py --name run8 --resume                     go on after a stop; exact
python train.py --lr 5e-4 --print-hparams                print the resolved values, train nothing

Values: default < --hparams file.json < --flag. The run folder is runs/NAME/ with hparams.json,
log.csv (a row an epoch), last.pt (everything exact resume needs), prev.pt (the one before), best.pt
(small, to share) and pictures/.
"""

import argparse
import copy
import csv
import dataclasses
import difflib
import io
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import data
from db_postprocess import MODES, SHRINK_RATIO
from dbnet import (
    DBNet,
    NetworkError,
    db_loss,
    load_checkpoint,
    load_network,
    replace_file,
    save_checkpoint,
    teacher_loss,
)
from evaluate import (
    amp_dtype,
    choose_device,
    draw_pictures,
    page_groups,
    page_row,
    predict,
    summary,
)

EXIT_USAGE, EXIT_MEMORY, EXIT_NOT_FINITE = 2, 3, 4
QUICK_START = "python train.py --hparams hparams/quickstart.json"
EMA_DECAY = 0.999
FETCH_EVERY = 10  # steps between looks at the losses; each look waits for the GPU
COLUMNS = (
    "epoch lr loss loss_shrink loss_thresh loss_binary precision recall hmean hmean_lo hmean_hi "
    "seconds images_s wait peak_gib"
).split()


def value(default, text, low=None, high=None, choices=None):
    """A hyperparameter with its help text and what is allowed (bounds inclusive)."""
    return dataclasses.field(
        default=default, metadata=dict(help=text, low=low, high=high, choices=choices)
    )


@dataclass(frozen=True)
class Hparams:
    """Every training default is written here and nowhere else. Names are those of sweeps and JSON
    files."""

    data: str = value("synth", "folder or label file; synth and synth-small are drawn on first use")
    val_data: str = value("", "labels to validate on, if DATA has no val split")
    image_dir: str = value("", "where the pictures lie, if not in images/ or beside the labels")
    name: str = value("", "run folder under runs/ (default: stem of the hparams file)")
    backbone: str = value("efficientnet_b4", "any timm model with features at strides 4 to 32")
    pretrained: str = value(
        "timm", "backbone weights: timm (download), none, or the path of a state dict"
    )
    init: str = value("", "checkpoint of a run to start the whole network from")
    neck: int = value(256, "channels of the feature pyramid, a multiple of 4", 16, 1024)
    size: int = value(960, "longer page side in px, a multiple of 32", 64, 4096)
    batch: int = value(8, "pages a step", 1, 4096)
    epochs: int = value(22, "length of the run", 1, 100000)
    stop_epoch: int = value(0, "pause after this epoch, inside the schedule (0: never)", 0, 100000)
    lr: float = value(3e-4, "peak learning rate", 1e-12, 10)
    weight_decay: float = value(1e-4, "L2 for adam, decoupled for adamw", 0, 10)
    optimizer: str = value("adam", "adam or adamw", choices=("adam", "adamw"))
    T_max: int = value(22, "epochs of the cosine from lr to eta_min", 1, 100000)
    eta_min: float = value(1e-5, "learning rate at the end of the cosine", 0, 10)
    warmup: float = value(0.0, "epochs of linear warm-up, counted in steps", 0, 1000)
    clip: float = value(5.0, "largest norm of the gradient (0: off)", 0, 1e6)
    ema: bool = value(True, "validate and keep a moving average of the weights")
    amp: str = value("auto", "mixed precision on CUDA", choices=("auto", "bf16", "fp16", "off"))
    compile: bool = value(False, "torch.compile the training step")
    seed: int = value(0, "of weights, order and augmentation", 0, 2**31 - 1)
    workers: int = value(-1, "loader processes (-1: by the machine)", -1, 256)
    folds: int = value(0, "cross-validation: part the train pages in this many (0: off)", 0, 100)
    fold: int = value(
        1, "which fold to validate on, from 1; `--fold all` runs each in turn", 1, 100
    )
    split: str = value("", "hash of the folds, filled in by the run")
    pseudo_labels: str = value("", "predictions.json whose pages are added to training")
    min_confidence: float = value(0.8, "pseudo labels under this are don't care", 0, 1)
    teacher: str = value("", "checkpoints, comma-separated, whose mean map is learned too")
    teacher_weight: float = value(5.0, "of the loss towards the teachers' map", 0, 1000)
    shrink_ratio: float = value(SHRINK_RATIO, "of the shrink map", 0.1, 0.95)
    aug_strength: float = value(1.0, "scales all augmentation; 0 is none", 0, 4)
    aug_rotate: float = value(2.0, "degrees", 0, 45)
    aug_scale: float = value(0.15, "up to 1 + this larger or smaller", 0, 2)
    aug_shift: float = value(0.1, "of the page size", 0, 1)
    aug_perspective: float = value(0.05, "change of depth across the page", 0, 0.5)
    aug_mirror: float = value(0.0, "probability", 0, 1)
    aug_brightness: float = value(0.2, "of the full range", 0, 1)
    aug_contrast: float = value(0.3, "relative", 0, 1)
    aug_color: float = value(0.05, "tint of a channel, of the full range", 0, 1)
    aug_noise: float = value(0.05, "standard deviation, of the full range", 0, 1)
    aug_blur: float = value(1.0, "standard deviation in px", 0, 20)
    aug_sharpen: float = value(0.7, "weight of the unsharp mask", 0, 5)
    aug_shadow: float = value(0.4, "depth of a shadow", 0, 1)
    aug_fog: float = value(0.3, "depth of a white veil", 0, 1)
    thresh: float = value(0.3, "probability above which a pixel is text", 0.01, 0.99)
    box_thresh: float = value(0.3, "least mean probability of a region", 0, 1)
    unclip_ratio: float = value(
        2.0, "growth A r / L of a region; 0: exact inverse of the shrink", 0, 10
    )
    max_candidates: int = value(600, "most regions a page, by score", 1, 100000)
    min_size: float = value(3.0, "short side in map px after the unclip", 0, 1000)
    mode: str = value("polygon", "shape of a region", choices=MODES)


FIELDS = {f.name: f for f in dataclasses.fields(Hparams)}


class UsageError(ValueError):
    """The user's values do not work: one line with key, value and what is allowed; exit code 2."""


# ---------------------------------------------------------------- configuration


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a line of text"}


def checked(key, raw, where):
    """One value as its field's type. Raises UsageError with key, value and what is allowed."""
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, 1, 0.7)
        raise UsageError(
            f"{where}: unknown key {data.shown(key)!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    kind, meta = FIELDS[key].type, FIELDS[key].metadata
    if kind is float and type(raw) is int and abs(raw) < 1e300:
        raw = float(raw)
    if kind is int and type(raw) is float and raw.is_integer():
        raw = int(raw)
    shown = data.shown(repr(raw))
    if type(raw) is not kind or kind is str and not raw.isprintable():
        raise UsageError(f"{where}: {key} = {shown} is not {KINDS[kind]}")
    low, high, choices = meta["low"], meta["high"], meta["choices"]
    if low is not None and not low <= raw <= high:  # also catches NaN
        raise UsageError(f"{where}: {key} = {shown} is not within {low} to {high}")
    if choices and raw not in choices:
        raise UsageError(f"{where}: {key} = {shown} is not one of {', '.join(choices)}")
    return raw


def from_text(key, text):
    """A flag's text as the field's type, for `checked`."""
    kind = FIELDS[key].type
    if kind is bool and text.lower() in ("true", "1", "yes", "false", "0", "no"):
        return text.lower() in ("true", "1", "yes")
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def read_hparams(path):
    """The values of a flat JSON file as a dict. Raises UsageError."""
    try:
        values = data.read_json(path)
    except data.DataError as error:
        raise UsageError(str(error)) from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: not a JSON object of hyperparameters")
    return {key: checked(key, raw, path) for key, raw in values.items()}


def validate(hp, where="hparams"):
    """Rules between values. Raises UsageError."""
    if hp.size % 32:
        raise UsageError(f"{where}: size = {hp.size} is not a multiple of 32")
    if hp.neck % 4:
        raise UsageError(f"{where}: neck = {hp.neck} is not a multiple of 4")
    if hp.eta_min > hp.lr:
        raise UsageError(f"{where}: eta_min = {hp.eta_min} is above lr = {hp.lr}")
    if hp.folds == 1 or hp.folds and hp.fold > hp.folds:
        raise UsageError(
            f"{where}: fold = {hp.fold} of folds = {hp.folds}; folds is 0 or at least 2, "
            "fold at most folds"
        )
    if hp.name and (Path(hp.name).is_absolute() or ".." in Path(hp.name).parts):
        raise UsageError(f"{where}: name = {hp.name!r} leads out of runs/")


def make_parser():
    parser = data.Parser(
        description=__doc__, usage="python train.py [--hparams JSON] [--key value ...]"
    )
    parser.add_argument("--hparams", metavar="JSON", help="values to start from")
    parser.add_argument("--seeds", type=int, metavar="N", help="N replicas: seed, seed + 1, ...")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run that --name names"
    )
    parser.add_argument(
        "--print-hparams", action="store_true", help="print the resolved JSON and stop"
    )
    parser.add_argument(
        "--baseline", metavar="RUN", help="run folder to print the difference to, epoch by epoch"
    )
    parser.add_argument(
        "--device", default="auto", help="cuda, cuda:1 or cpu (default: cuda where there is one)"
    )
    group = parser.add_argument_group("hyperparameters")
    for f in FIELDS.values():
        names = list(dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}")))
        options = dict(nargs="?", const="true") if f.type is bool else {}
        group.add_argument(
            *names,
            metavar=f.type.__name__.upper(),
            help=f"{f.metadata['help']} ({f.default!r})",
            **options,
        )
        if f.type is bool:
            group.add_argument(
                f"--no-{f.name}",
                dest=f.name,
                action="store_const",
                const="false",
                help=argparse.SUPPRESS,
            )
    group.add_argument(
        "--no-pretrained",
        dest="pretrained",
        action="store_const",
        const="none",
        help="start from random weights",
    )
    return parser


def resolve_hparams(args):
    """Hparams of default < --hparams < flags, or on --resume those of the run folder < flags that
    may change."""
    flags = {
        k: checked(k, from_text(k, v), f"--{k}")
        for k, v in vars(args).items()
        if k in FIELDS and v is not None
    }
    values = read_hparams(args.hparams) if args.hparams else {}
    if args.resume:
        values = resumed_values(values, flags)
    hp = Hparams(**{**values, **flags})
    validate(hp, args.hparams or "flags")
    return hp


def resumed_values(values, flags):
    """The run folder's values. Raises UsageError when a flag or file would change the run."""
    name = flags.get("name") or values.get("name")
    if not name:
        raise UsageError("--resume: which run? add --name")
    saved = read_hparams(Path("runs", name, "hparams.json"))
    for key, new in {**values, **flags}.items():
        if (
            key not in ("stop_epoch", "workers", "name")
            and saved.get(key, FIELDS[key].default) != new
        ):
            raise UsageError(
                f"--resume: {key} is {saved.get(key)!r} in run {name} and cannot become {new!r}; "
                "start a new run"
            )
    return {**saved, "stop_epoch": values.get("stop_epoch", 0)}


def choose_run_folder(hp, stem):
    """(folder, hp with its name) of a new run, not made yet. Raises UsageError when --name names
    one that exists."""
    name, number = hp.name or stem, 1
    while not hp.name and Path("runs", name).exists():
        number += 1
        name = f"{stem}-{number}"
    folder = Path("runs", name)
    if folder.exists():
        raise UsageError(
            f"--name {name}: {folder} exists; choose another name, or --resume to go on with it"
        )
    return folder, dataclasses.replace(hp, name=name)


# ---------------------------------------------------------------- data


def check_pages(train, val, hp):
    """Print counts; raises DataError when no positive pixel would remain."""
    for name, pages in (("train", train), ("val", val)):
        print(f"{name:5s} {data.format_counts(data.describe(pages, hp.size))}")
    for page in train:
        scale = hp.size / max(page.size)
        polygons, ignore, _ = data.repair_words(page)
        height, width = math.ceil(page.size[1] * scale), math.ceil(page.size[0] * scale)
        if data.make_targets([p * scale for p in polygons], ignore, height, width, hp.shrink_ratio)[
            0
        ].any():
            return
    raise data.DataError(
        f"{hp.data}: no positive pixel in {len(train)} train pages at size {hp.size}; "
        "are all words ignored?"
    )


def keep_split(hp, split):
    """hp with the hash of its split, which is written to runs/. Raises DataError when a resumed
    run's pages would fall into other folds than before."""
    if hp.split not in ("", split["hash"]):
        raise data.DataError(
            f"{hp.data}: its pages make another split ({split['hash']}) than when run {hp.name} "
            f"began ({hp.split}); put the data back or start a new run"
        )
    data.write_json(Path("runs", f"split-{split['hash']}.json"), split, indent=1)
    print(f"fold {hp.fold} of {hp.folds}, split {split['hash']}")
    return dataclasses.replace(hp, split=split["hash"])


def start_worker(_):
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def make_loader(train, hp, device, start_epoch, start_step):
    """One stream of batches over all epochs that are left: no epoch begins with an empty queue."""
    batches = [b for e in range(start_epoch, hp.epochs) for b in data.epoch_batches(train, hp, e)]
    workers = hp.workers
    if workers < 0:
        workers = min(16, os.cpu_count() or 1) if device.type == "cuda" else 0
    # not fork: OpenCV's and OpenMP's threads do not survive it, and the workers would wait for them
    context = torch.multiprocessing.get_context("forkserver") if workers else None
    return torch.utils.data.DataLoader(
        data.Receipts(train, hp),
        batch_sampler=batches[start_step:],
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        multiprocessing_context=context,
        generator=torch.Generator(),  # or it would draw from the global one, which resume puts back
    )


# ---------------------------------------------------------------- one step


def learning_rate(hp, epoch, progress):
    """CosineAnnealingLR by epoch (from 0), times the warm-up by progress in epochs."""
    cosine = hp.eta_min + (hp.lr - hp.eta_min) * (1 + math.cos(math.pi * epoch / hp.T_max)) / 2
    return cosine * min(1.0, progress / hp.warmup if hp.warmup else 1.0)


def float_tensors(model):
    """Weights and batch-norm statistics of a network, in a fixed order."""
    return [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]


@torch.no_grad()
def update_ema(ema, model, step):
    """Exponential moving average of lists of tensors, in place; short memory in the first steps."""
    torch._foreach_lerp_(ema, model, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))


class Trainer:
    """What changes while training, and nothing else: network, EMA, optimizer, scaler, position,
    best, log rows."""

    def __init__(self, hp, device):
        self.hp, self.device = hp, device
        torch.manual_seed(hp.seed)
        state = load_checkpoint(hp.init) if hp.init else None
        self.model = DBNet(hp.backbone, hp.neck, "none" if state else hp.pretrained)
        if state:
            try:
                self.model.load_state_dict(state.get("ema") or state["model"])
            except RuntimeError as error:
                raise UsageError(
                    f"--init {hp.init}: weights of another network ({str(error).splitlines()[0]})"
                ) from None
        self.model.to(device, memory_format=torch.channels_last)
        paths = [path for path in hp.teacher.split(",") if path]
        self.teachers = [load_network(path, device)[0] for path in paths]
        self.ema = copy.deepcopy(self.model).eval() if hp.ema else None
        self.averaged = [float_tensors(self.ema), float_tensors(self.model)] if hp.ema else None
        self.forward = torch.compile(self.model) if hp.compile else self.model
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[hp.optimizer]
        self.optimizer = kind(
            self.model.parameters(),
            hp.lr,
            weight_decay=hp.weight_decay,
            fused=True,
        )
        self.dtype = amp_dtype(hp.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.epoch, self.step, self.losses = (
            0,
            0,
            [],
        )  # epochs finished, steps and losses of the current one
        self.best, self.rows, self.scores = {"hmean": -1.0, "epoch": 0}, [], {}
        self.seconds, self.waited = 0.0, 0.0
        self.writer = None

    def train_step(self, pages, maps, lr, number):
        """pages uint8 [B, H, W, 3], maps uint8 [B, 4, H, W] -> losses [4] (sum, BCE, L1, Dice)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.forward(pages)  # [B, 2, H, W]
            with torch.no_grad():
                taught = [teacher(pages)[:, 0].float().sigmoid() for teacher in self.teachers]
        loss, parts = db_loss(logits, maps)
        if taught:
            loss = loss + self.hp.teacher_weight * teacher_loss(logits, sum(taught) / len(taught))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.hp.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.hp.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            update_ema(*self.averaged, number)
        return torch.cat([loss.detach()[None], parts])

    def state(self):
        """Everything exact resume needs, as plain dicts of CPU tensors and JSON types."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device)
            if self.device.type == "cuda"
            else None,
            "hparams": dataclasses.asdict(self.hp),
            "epoch": self.epoch,
            "step": self.step,
            "losses": [list(map(float, row)) for row in self.losses],
            "timing": [self.seconds, self.waited],
            "best": self.best,
            "rows": self.rows,
            "scores": self.scores,
        }

    def load(self, state):
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.epoch, self.step, self.losses = state["epoch"], state["step"], state["losses"]
        self.best, self.rows, self.scores = state["best"], state["rows"], state["scores"]
        self.seconds, self.waited = state["timing"]

    def save(self, folder, is_best=False):
        """Write last.pt (and best.pt) behind the training's back; waits for the save before."""
        self.wait()
        last = to_cpu(self.state())
        best = None
        if is_best:
            best = {k: last[k] for k in ("hparams", "epoch", "scores")} | {
                "model": last["ema"] or last["model"]
            }
        self.failed = []
        self.writer = threading.Thread(
            target=write_checkpoints, args=(folder, last, best, self.failed)
        )
        self.writer.start()

    def wait(self):
        """Wait for the save in flight. Raises OSError when it failed."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
            if self.failed:
                raise self.failed[0]


def to_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items()}
    return [to_cpu(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_checkpoints(folder, last, best, failed):
    try:
        if best is not None:
            save_checkpoint(folder / "best.pt", best)
        if (folder / "last.pt").exists():
            keep_previous(folder)
        save_checkpoint(folder / "last.pt", last)
        write_log(folder / "log.csv", last["rows"])
    except OSError as error:
        failed.append(error)


def keep_previous(folder):
    """Make prev.pt a second name of last.pt, without a moment in which either is missing or does
    not fit its side file."""
    last, prev = folder / "last.pt", folder / "prev.pt"
    sides = [Path(f"{path}.sha256") for path in (last, prev)]
    digests = [side.read_bytes() for side in sides if side.exists()]
    replace_file(sides[1], b"".join(digests))
    temporary = folder / f".{prev.name}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(last, temporary)
    except OSError:  # a file system without hard links
        shutil.copy2(last, temporary)
    os.replace(temporary, prev)
    temporary.unlink(missing_ok=True)  # rename does nothing between two names of one file
    replace_file(sides[1], digests[0])


def load_last(folder):
    """The newest whole checkpoint of a run, or None when none was written. Says so when it is not
    last.pt."""
    errors = []
    for name in ("last.pt", "prev.pt"):
        if (folder / name).exists():
            try:
                state = load_checkpoint(
                    folder / name, ("model", "optimizer", "hparams", "epoch", "rows")
                )
                if errors:
                    print(
                        f"warning: {errors[0]}; going on from {folder / name}, "
                        f"epoch {state['epoch']}"
                    )
                return state
            except ValueError as error:
                errors.append(str(error))
    if errors:
        raise UsageError(errors[0])
    return None


# ---------------------------------------------------------------- log


def write_log(path, rows):
    """log.csv, whole or not at all: one row an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data.write_text(path, text.getvalue())


def read_log(folder):
    """Rows of a run's log.csv as {epoch: {column: float}}. Raises UsageError if there is none."""
    path = Path(folder, "log.csv")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; is {folder} a run folder?")
    with open(path, newline="") as file:
        return {int(r["epoch"]): {k: float(v) for k, v in r.items()} for r in csv.DictReader(file)}


def print_row(row, epochs, baseline):
    """One aligned line with log.csv's columns; with a baseline the difference at the same epoch."""
    line = f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.2e}  loss {row['loss']:6.3f}"
    line += f" ({row['loss_shrink']:.3f} {row['loss_thresh']:.3f} {row['loss_binary']:.3f})"
    line += (
        f"  precision {row['precision']:.4f}  recall {row['recall']:.4f}  hmean {row['hmean']:.4f}"
    )
    line += f" [{row['hmean_lo']:.4f}, {row['hmean_hi']:.4f}]  {row['seconds']:.0f} s"
    line += (
        f"  {row['images_s']:.1f} images/s  wait {row['wait']:.0%}  peak {row['peak_gib']:.1f} GiB"
    )
    if row["epoch"] in baseline:
        line += f"  vs baseline {row['hmean'] - baseline[row['epoch']]['hmean']:+.4f}"
    print(line, flush=True)


# ---------------------------------------------------------------- the loop


class Stop:
    """CTRL-C and SIGTERM as a flag that the loop looks at after each step."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, _):
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.signal = number


class NotFinite(RuntimeError):
    """The loss became NaN or infinite."""


def fetch_losses(trainer, pending, steps):
    """Move the losses of the last steps [K][4] to the host; raise NotFinite, flag outliers."""
    rows = torch.stack(pending).tolist() if pending else []
    for row in rows:
        trainer.losses.append(row)
        number, epoch = len(trainer.losses), trainer.epoch + 1
        if not all(map(math.isfinite, row)):
            raise NotFinite(f"loss is {row[0]} in epoch {epoch}, step {number} of {steps}")
        recent = [r[0] for r in trainer.losses[-50:-1]]
        if len(recent) >= 10 and row[0] > 3 * statistics.median(recent):
            print(
                f"warning: loss {row[0]:.3f} in epoch {epoch}, step {number} "
                "is above 3 times its running median"
            )
    pending.clear()


def train_epoch(trainer, batches, steps, stop, eta):
    """The rest of one epoch; returns False when a signal stopped it. Losses and times go to the
    trainer."""
    hp, pending, done = trainer.hp, [], True
    trainer.model.train()
    bar = tqdm(
        range(trainer.step, steps),
        f"epoch {trainer.epoch + 1}",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    begin, first = time.perf_counter(), trainer.step
    for step in bar:
        asked = time.perf_counter()
        pages, maps = next(batches)
        trainer.waited += time.perf_counter() - asked
        pages = pages.to(trainer.device, non_blocking=True)
        maps = maps.to(trainer.device, non_blocking=True)
        number = trainer.epoch * steps + step
        lr = learning_rate(hp, trainer.epoch, (number + 1) / steps)
        pending.append(trainer.train_step(pages, maps, lr, number))
        trainer.step = step + 1
        if trainer.step % FETCH_EVERY == 0 or trainer.step == steps or stop.signal:
            fetch_losses(trainer, pending, steps)
        if eta and step - first == 5:
            eta(6)
        if stop.signal and trainer.step < steps:
            done = False
            break
    trainer.seconds += time.perf_counter() - begin
    return done


def announce(device, steps_left):
    """Returns a function that says once, after the first steps, how long the run will take."""
    start = time.perf_counter()

    def eta(steps_done):
        left = (time.perf_counter() - start) / steps_done * steps_left
        print(f"about {duration(left)} for {steps_left} steps, validation not counted", flush=True)
        if device.type == "cpu" and left > 3600:
            print(f"this is a CPU; the quick start is: {QUICK_START}", flush=True)

    return eta


def duration(seconds):
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def finish_epoch(trainer, val, steps):
    """Validate, append the epoch's row, advance. Returns (row, whether it is the best so far)."""
    hp = trainer.hp
    seconds, wait = trainer.seconds, trainer.waited / max(trainer.seconds, 1e-9)
    losses = np.mean(trainer.losses, 0)
    begin = time.perf_counter()
    model = trainer.ema if trainer.ema is not None else trainer.model

    def judge(page, found):  # beside the network
        return page_row("page", page, found[0])

    rows = np.array(predict(model.eval(), val, dataclasses.asdict(hp), trainer.device, judge))
    result = summary("page", rows, page_groups(val))
    peak = (
        torch.cuda.max_memory_allocated(trainer.device) / 2**30
        if trainer.device.type == "cuda"
        else 0.0
    )
    numbers = [result["precision"], result["recall"], result["hmean"], *result["interval"]]
    total = seconds + time.perf_counter() - begin
    lr = learning_rate(hp, trainer.epoch, trainer.epoch + 1)
    numbers = [lr, *losses, *numbers, total, steps * hp.batch / seconds, wait, peak]
    row = dict(zip(COLUMNS, [trainer.epoch + 1, *map(float, numbers)]))
    trainer.epoch, trainer.step, trainer.losses, trainer.seconds, trainer.waited = (
        trainer.epoch + 1,
        0,
        [],
        0.0,
        0.0,
    )
    trainer.rows.append(row)
    trainer.scores = {
        "hmean": row["hmean"],
        "pages": {p.name: float(r[2]) for p, r in zip(val, rows)},
    }
    is_best = row["hmean"] > trainer.best["hmean"]
    if is_best:
        trainer.best = {"hmean": row["hmean"], "epoch": row["epoch"]}
    return row, is_best


def run(hp, folder, resume, device, baseline, stop):
    """Train to hp.epochs (or hp.stop_epoch). Returns the exit code."""
    begin = time.perf_counter()
    train, val, split = data.run_pages(hp)
    if hp.pseudo_labels:
        pseudo = data.pseudo_pages(hp, train + val)
        print(f"pseudo {data.format_counts(data.describe(pseudo, hp.size))}")
        train = train + pseudo
    check_pages(train, val, hp)
    if hp.folds:
        hp = keep_split(hp, split)
    trainer = Trainer(hp, device)
    if not resume:
        folder.mkdir(parents=True)
        data.write_json(folder / "hparams.json", dataclasses.asdict(hp), indent=1)
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    print(f"run folder {folder}", flush=True)
    state = load_last(folder) if resume else None
    if state:
        trainer.load(state)
        write_log(folder / "log.csv", trainer.rows)
        print(
            f"resuming {folder} after epoch {trainer.epoch}"
            + (f", step {trainer.step}" if trainer.step else "")
        )
    elif resume:
        print(f"{folder} has no checkpoint yet: starting at epoch 1")
    del state
    steps = -(-len(train) // hp.batch)
    last = min(hp.epochs, hp.stop_epoch or hp.epochs)
    batches = iter(make_loader(train, hp, device, trainer.epoch, trainer.step))
    eta = announce(device, hp.epochs * steps - trainer.epoch * steps - trainer.step)
    while trainer.epoch < last:
        done = train_epoch(trainer, batches, steps, stop, eta)
        eta = None
        if not done:
            trainer.save(folder)
            trainer.wait()
            print(
                f"stopped in epoch {trainer.epoch + 1}, step {trainer.step} of {steps}; "
                f"go on: {resume_command(hp)}"
            )
            return 128 + stop.signal
        row, is_best = finish_epoch(trainer, val, steps)
        print_row(row, hp.epochs, baseline)
        trainer.save(folder, is_best)
        if stop.signal and trainer.epoch < last:
            trainer.wait()
            print(f"stopped after epoch {trainer.epoch}; go on: {resume_command(hp)}")
            return 128 + stop.signal
    trainer.wait()
    if trainer.epoch < hp.epochs:
        print(f"paused after epoch {trainer.epoch} of {hp.epochs}; go on: {resume_command(hp)}")
    else:
        finish_run(trainer, val, folder)
        print(f"{folder}: {duration(time.perf_counter() - begin)} in this process")
    if trainer.rows:
        print(
            f"last hmean {trainer.rows[-1]['hmean']:.4f}; the next line is the maximum over "
            "epochs on the pages that select it"
        )
        print(f"best hmean {trainer.best['hmean']:.4f} epoch {trainer.best['epoch']}")
    return 0


def finish_run(trainer, val, folder):
    """Pictures of the first validation pages with the last weights."""
    model = trainer.ema if trainer.ema is not None else trainer.model
    found = predict(model.eval(), val[:8], dataclasses.asdict(trainer.hp), trainer.device)
    draw_pictures(val[:8], found, folder / "pictures")


def resume_command(hp):
    return f"python train.py --name {hp.name} --resume"


# ---------------------------------------------------------------- folds and replicas


def members(hp, stem, all_folds, seeds):
    """Hparams of each run of `--fold all` and `--seeds N`, named STEM-fold2-seed1."""
    result = []
    for fold in range(1, hp.folds + 1) if all_folds else [hp.fold]:
        for seed in range(hp.seed, hp.seed + seeds) if seeds else [hp.seed]:
            name = (hp.name or stem) + f"-fold{fold}" * all_folds + f"-seed{seed}" * bool(seeds)
            result.append(dataclasses.replace(hp, name=name, fold=fold, seed=seed))
    return result


def is_finished(hp, folder):
    """Whether a run folder holds all epochs. Raises UsageError when it is a run of other values."""
    saved = Hparams(**read_hparams(folder / "hparams.json"))
    for key in FIELDS:
        if key not in ("stop_epoch", "workers", "split") and getattr(saved, key) != getattr(
            hp, key
        ):
            raise UsageError(
                f"{folder}: {key} is {getattr(saved, key)!r}, not {getattr(hp, key)!r}"
            )
    return (folder / "log.csv").exists() and hp.epochs in read_log(folder)


def run_members(runs, resume, device, baseline):
    """Train runs in turn; a failure is named and the others go on. Returns the exit code."""
    by_name = {hp.name: hp for hp in runs}
    made = [name for name in by_name if Path("runs", name).exists()]
    if made and not resume:
        raise UsageError(f"runs/{made[0]} exists; choose another name, or --resume to go on")
    finished = {name for name in made if is_finished(by_name[name], Path("runs", name))}
    stop, failed = Stop(), []
    for hp in runs:
        folder = Path("runs", hp.name)
        if hp.name in finished:
            print(f"{folder} is finished")
            continue
        try:
            split = read_hparams(folder / "hparams.json")["split"] if folder.exists() else ""
            hp = dataclasses.replace(hp, split=split)
            code = run(hp, folder, folder.exists(), device, baseline, stop)
            if code:
                return code
        except FAILURES as error:
            explain(error, folder)
            failed.append(hp.name)
    report_members([hp for hp in runs if hp.name not in failed])
    for name in failed:
        print(f"failed: {name}; go on with --resume")
    return 1 if failed else 0


def report_members(runs):
    """Print each run's last H-mean, their mean and standard deviation, and over folds the H-mean of
    all pages, each scored by the run that held it out."""
    scores = {}
    for hp in runs:
        state = load_last(Path("runs", hp.name))
        scores[hp.name] = state["rows"][-1]["hmean"]
        print(f"{hp.name}  last hmean {scores[hp.name]:.4f}")
    if len(scores) > 1:
        values = list(scores.values())
        mean, sd = statistics.mean(values), statistics.stdev(values)
        print(f"last hmean of {len(values)} runs: mean {mean:.4f}, standard deviation {sd:.4f}")
    folds = {hp.fold: hp for hp in runs}
    if len(folds) > 1 and len(folds) == runs[0].folds == len(runs):
        pages = {}
        for hp in runs:
            pages |= load_last(Path("runs", hp.name))["scores"]["pages"]
        print(f"out of fold: hmean {statistics.mean(pages.values()):.4f} over {len(pages)} pages")


FAILURES = (UsageError, data.DataError, NetworkError, NotFinite, torch.OutOfMemoryError, OSError)


def main(argv=None):
    args = make_parser().parse_args(argv)
    all_folds, folder = args.fold == "all", None
    if all_folds:
        args.fold = None
    try:
        several = all_folds or args.seeds is not None
        hp = resolve_hparams(args) if not several else several_hparams(args, all_folds)
        if args.print_hparams:
            print(json.dumps(dataclasses.asdict(hp), indent=1))
            return 0
        device = choose_device(args.device)
        baseline = read_log(args.baseline) if args.baseline else {}
        stem = Path(args.hparams).stem if args.hparams else "run"
        if several:
            runs = members(hp, stem, all_folds, args.seeds)
            return run_members(runs, args.resume, device, baseline)
        if args.resume:
            folder = Path("runs", hp.name)
        else:
            folder, hp = choose_run_folder(hp, stem)
        return run(hp, folder, args.resume, device, baseline, Stop())
    except FAILURES as error:
        return explain(error, folder)
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how PyTorch says it on a CPU
            raise
        return explain(torch.OutOfMemoryError(), folder)
    except KeyboardInterrupt:
        print(f"error: interrupted; {folder} keeps the last whole epoch", file=sys.stderr)
        return 128 + signal.SIGINT


def several_hparams(args, all_folds):
    """Values shared by the runs of --fold all and --seeds. Raises UsageError."""
    args = argparse.Namespace(**{**vars(args), "resume": False})
    hp = resolve_hparams(args)
    if all_folds and not hp.folds:
        raise UsageError("--fold all: of how many? add --folds 5")
    if args.seeds is not None and args.seeds < 1:
        raise UsageError(f"--seeds = {args.seeds} is not at least 1")
    return hp


def explain(error, folder):
    """One line about a failure on stderr; returns the exit code."""
    if isinstance(error, torch.OutOfMemoryError):
        line, code = (
            "out of memory: lower --batch or --size, or use a smaller --backbone",
            EXIT_MEMORY,
        )
    elif isinstance(error, NotFinite):
        line, code = (
            f"{error}; lower --lr or use --amp off; {folder} keeps the last whole epoch",
            EXIT_NOT_FINITE,
        )
    elif isinstance(error, (UsageError, data.DataError, NetworkError)):
        line, code = str(error), EXIT_USAGE
    else:
        line = f"{error.filename or folder}: {error.strerror or error}"
        line, code = f"{line}; what was written before is whole", 1
    print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
