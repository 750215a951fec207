"""Which values, within which bounds? The one table of hyperparameters, and its reading from JSON
files and flags."""

import argparse
import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path

import files
from db_postprocess import MODES, SHRINK_RATIO
from files import DataError, read_json

HIDE = argparse.SUPPRESS


def value(default, text, low=None, high=None, choices=None):
    """A hyperparameter with its help text and what is allowed (bounds inclusive)."""
    return dataclasses.field(
        default=default, metadata={"help": text, "low": low, "high": high, "choices": choices}
    )


@dataclass(frozen=True)
class Hparams:
    """Every training default is written here and nowhere else. Names are those of sweeps and JSON
    files."""

    # data
    data: str = value("synth", "folder or label file; synth and synth-small are drawn on first use")
    val_data: str = value("", "labels to validate on, if DATA has no val split")
    image_dir: str = value("", "where the pictures lie, if not in images/ or beside the labels")
    name: str = value("", "run folder under runs/ (default: stem of the hparams file)")
    folds: int = value(0, "cross-validation: part the train pages in this many (0: off)", 0, 100)
    fold: int = value(1, "which fold to validate on, from 1; all: each in turn", 1, 100)
    split: str = value("", HIDE)
    pseudo_labels: str = value("", "predictions.json whose pages are added to training")
    min_confidence: float = value(0.8, "pseudo labels under this are don't care", 0, 1)
    # network
    backbone: str = value("efficientnet_b4", "any timm model with features at strides 4 to 32")
    pretrained: str = value("timm", "its weights: timm (download), none, or a state dict's path")
    init: str = value("", "checkpoint of a run to start the whole network from")
    neck: int = value(256, "channels of the feature pyramid, a multiple of 4", 16, 1024)
    shrink_ratio: float = value(SHRINK_RATIO, "of the shrink map", 0.1, 0.95)
    teacher: str = value("", "checkpoints, comma-separated, whose mean map is learned too")
    teacher_weight: float = value(5.0, "of the loss towards the teachers' map", 0, 1000)
    # schedule
    size: int = value(960, "longer page side in px, a multiple of 32", 64, 4096)
    batch: int = value(8, "pages a step, over all processes", 1, 4096)
    epochs: int = value(22, "length of the run", 1, 100000)
    stop_epoch: int = value(0, "pause after this epoch, inside the schedule (0: never)", 0, 100000)
    optimizer: str = value("adam", "adam or adamw", choices=("adam", "adamw"))
    lr: float = value(3e-4, "peak learning rate", 1e-12, 10)
    T_max: int = value(22, "epochs of the cosine from lr to eta_min", 1, 100000)
    eta_min: float = value(1e-5, "learning rate at the end of the cosine", 0, 10)
    warmup: float = value(0.0, "epochs of linear warm-up, counted in steps", 0, 1000)
    weight_decay: float = value(1e-4, "L2 for adam, decoupled for adamw", 0, 10)
    clip: float = value(5.0, "largest norm of the gradient (0: off)", 0, 1e6)
    ema: bool = value(True, "validate and keep a moving average of the weights")
    freeze_bn: bool = value(False, "batch norm keeps its statistics: fine-tuning, small batches")
    seed: int = value(0, "of weights, order and augmentation", 0, 2**31 - 1)
    # machine
    amp: str = value("auto", "mixed precision on CUDA", choices=("auto", "bf16", "fp16", "off"))
    compile: bool = value(False, "torch.compile the network: minutes, and again for new canvases")
    cache: bool = value(False, "decode each train page once; needs the room on disk")
    workers: int = value(-1, "loader processes (-1: by the machine)", -1, 256)
    sync_bn: bool = value(False, "torchrun on GPUs: batch norm over the pages of all processes")
    # augmentation
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
    # decoding
    thresh: float = value(0.3, "probability above which a pixel is text", 0.01, 0.99)
    box_thresh: float = value(0.3, "least mean probability of a region", 0, 1)
    unclip_ratio: float = value(2.0, "growth A r / L of a region; 0: exact inverse", 0, 10)
    max_candidates: int = value(600, "most regions a page, by score", 1, 100000)
    min_size: float = value(3.0, "short side in map px after the unclip", 0, 1000)
    mode: str = value("polygon", "shape of a region", choices=MODES)


FIELDS = {f.name: f for f in dataclasses.fields(Hparams)}


class UsageError(DataError):
    """The user's values do not work: one line with key, value and what is allowed; exit code 2."""


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a line of text"}


def checked(key, raw, where):
    """One value as its field's type. Raises UsageError with key, value and what is allowed."""
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, 1, 0.7)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{where}: unknown key {files.shown(key)!r}{hint}")
    kind, meta = FIELDS[key].type, FIELDS[key].metadata
    if kind is float and type(raw) is int and abs(raw) < 1e300:
        raw = float(raw)
    if kind is int and type(raw) is float and raw.is_integer():
        raw = int(raw)
    shown = files.shown(repr(raw))
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
    values = read_json(path)
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
        allowed = "folds is 0 or at least 2, fold at most folds"
        raise UsageError(f"{where}: fold = {hp.fold} of folds = {hp.folds}; {allowed}")
    if hp.name and (Path(hp.name).is_absolute() or ".." in Path(hp.name).parts):
        raise UsageError(f"{where}: name = {hp.name!r} leads out of runs/")
