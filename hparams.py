"""Which values, within which bounds? The one table of hyperparameters, read from files."""

import argparse
import contextlib
import dataclasses

from db_postprocess import MODES, SHRINK_RATIO
from files import CONTROL, DataError, UsageError, nearest, read_json, shown, unique_dict

HIDE = argparse.SUPPRESS
AMP = "auto", "bf16", "fp16", "off"
FITS = "longer", "area"

# ---------------------------------------------------------------- the table


def value(default, text, low=None, high=None, choices=None, group=None):
    """The field of a hyperparameter. text: for --help. low, high: bounds, which are allowed values.
    group: begins a group of that title in --help, up to the next field that has one."""
    return dataclasses.field(default=default, metadata=locals())  # the arguments, by name


@dataclasses.dataclass(frozen=True)
class Hparams:
    """Every default of training, here and nowhere else, under its name in sweeps and JSON."""

    data: str = value("synth", "folder, label file or a,b; synth, synth-small: drawn", group="data")
    val_data: str = value("", "labels to validate on, if DATA has no val split")
    image_dir: str = value("", "where the pictures lie, if not in images/ or beside the labels")
    name: str = value("", "run folder under runs/ (default: stem of the hparams file)")
    folds: int = value(0, "cross-validation: part the train pages in this many (0: off)", 0, 100)
    fold: int = value(1, "which fold to validate on, from 1; all: each in turn", 1, 100)
    split: str = value("", HIDE)
    tuned: str = value("", HIDE)  # digests, with commas between, of the pages that chose thresholds
    pseudo_labels: str = value("", "predictions.json whose pages are added to training")
    min_confidence: float = value(0.8, "pseudo labels under this are don't care", 0, 1)
    doubt: str = value("", "suspects of evaluate.py --audit (JSON): don't care in training")
    doubt_above: float = value(0.5, "suspects of at least this probability", 0, 1)
    backbone: str = value("efficientnet_b4", "any timm model with strides 4 to 32", group="network")
    pretrained: str = value(
        "timm", "timm (download), a state dict's path, or none (--no-pretrained)"
    )
    init: str = value("", "checkpoint of a run to start the whole network from")
    neck: int = value(256, "channels of the feature pyramid, a multiple of 4", 16, 1024)
    shrink_ratio: float = value(SHRINK_RATIO, "of the shrink map", 0.1, 0.95)
    teacher: str = value("", "checkpoints, comma-separated, whose mean map is learned too")
    teacher_weight: float = value(5.0, "of the loss towards the teachers' map", 0, 1000)
    size: int = value(
        960, "of a page in px, see fit; a multiple of 32 in training", 32, 8192, group="schedule"
    )
    fit: str = value("longer", "which measure of a page becomes `size` px", choices=FITS)
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
    amp: str = value(
        "auto",
        "number type; off: float32, on GPUs TF32; auto: bf16 or fp16, on CPUs only to predict",
        choices=AMP,
        group="machine",
    )
    compile: bool = value(False, "torch.compile the network: minutes, once for all canvases")
    cache: bool = value(False, "decode each train page once; needs the room on disk")
    workers: int = value(-1, "loader processes (-1: by the machine)", -1, 256)
    sync_bn: bool = value(False, "torchrun on GPUs: batch norm over the pages of all processes")
    look: bool = value(False, HIDE)  # of prediction: --size auto
    text_height: float = value(0.0, HIDE, 0, 1e9)  # of the median word, px, see look; 0: unknown
    aug_strength: float = value(1.0, "scales all; 0 is none", 0, 4, group="augmentation, strengths")
    aug_rotate: float = value(10.0, "degrees", 0, 45)
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
    aug_turn: float = value(0.0, "probability of a quarter turn or a half one", 0, 1)
    aug_ground: float = value(
        0.0, "probability of another ground, and canvas, around the page", 0, 1
    )
    aug_bend: float = value(0.0, "bent paper: displacement, of the longer side", 0, 0.1)
    aug_fade: float = value(0.0, "faded print: share of its contrast", 0, 1)
    aug_bleed: float = value(0.0, "print of the back that shines through, unlabelled", 0, 1)
    aug_ribbon: float = value(0.0, "depth of a coloured band", 0, 1)
    aug_light: float = value(0.0, "uneven coloured light, shadow of a hand", 0, 1)
    aug_glare: float = value(0.0, "white spot of a lamp", 0, 1)
    aug_motion: float = value(0.0, "motion blur in px", 0, 50)
    aug_lowres: float = value(0.0, "lost resolution: down by 1 + this, and up", 0, 8)
    aug_jpeg: float = value(0.0, "JPEG; 1 is quality 10", 0, 1)
    thresh: float = value(0.3, "above it a pixel is text", 0.01, 0.99, group="decoding")
    box_thresh: float = value(0.3, "least mean probability of a region", 0, 1)
    unclip_ratio: float = value(2.0, "growth A r / L of a region; 0: exact inverse", 0, 10)
    max_candidates: int = value(600, "most regions a page, by score", 1, 100000)
    min_size: float = value(3.0, "short side in map px after the unclip", 0, 1000)
    mode: str = value("polygon", "shape of a region", choices=MODES)


FIELDS = {f.name: f for f in dataclasses.fields(Hparams)}
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a line of text",
}

# ---------------------------------------------------------------- checks


def checked(key, raw, where):
    """A value `raw` of a hyperparameter as its field's type. Raises UsageError with the key, the
    value and the bounds."""
    if key not in FIELDS:
        raise UsageError(where, f"unknown key {shown(key)!r}{nearest(key, FIELDS)}")
    field = FIELDS[key]
    kind = field.type
    given = f"{key} = {shown(repr(raw))}"

    # 3.0 becomes 3, and 1 becomes 1.0; a bool becomes nothing else
    with contextlib.suppress(ValueError, OverflowError, TypeError):
        if bool not in (kind, type(raw)) and kind(raw) == raw:
            raw = kind(raw)
    if type(raw) is not kind or (kind is str and CONTROL.search(raw)):
        raise UsageError(where, f"{given} is not {KINDS[kind]}")

    low, high, choices = map(field.metadata.get, ("low", "high", "choices"))
    if low is not None and not low <= raw <= high:  # also a NaN
        remedy = f"a percentage? write {raw / 100:g}" if high <= 1 < raw <= 100 else ""
        raise UsageError(where, f"{given} is not within {low} to {high}", remedy)

    if choices and raw not in choices:
        raise UsageError(where, f"{given} is not one of {', '.join(choices)}")
    return raw


def validate(hp, where="flags"):
    """hp, if its values go together in training. Raises UsageError."""
    mistakes = {
        f"size = {hp.size} is not a multiple of 32": hp.size % 32,
        f"neck = {hp.neck} is not a multiple of 4": hp.neck % 4,
        f"eta_min = {hp.eta_min} is above lr = {hp.lr}": hp.eta_min > hp.lr,
        "folds = 1 is not 0 or within 2 to 100": hp.folds == 1,
        f"fold = {hp.fold}, but folds = {hp.folds}": 0 < hp.folds < hp.fold,
        f"name = {hp.name!r} leads out of runs/": hp.name[:1] == "/" or ".." in hp.name.split("/"),
    }
    for mistake, is_made in mistakes.items():
        if is_made:
            raise UsageError(where, mistake)
    return hp


# ---------------------------------------------------------------- files


def last_parts(values):
    """Yields (last part of its nested or dotted name, value) for each value in a dict of dicts."""
    for key, inner in values.items():
        if isinstance(inner, dict):
            yield from last_parts(inner)
        else:
            yield key.rpartition(".")[2], inner


def read_hparams(path):
    """{key: value} of a JSON or YAML file, nested or not. Raises DataError, UsageError."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(path, "not a JSON object (or YAML) of values", "see hparams/run8.json")
    if {"method", "parameters"} <= values.keys():
        remedy = f"run it: sweep.py {path}"
        raise UsageError(path, "is a sweep and not a file of hyperparameters", remedy)
    try:
        values = unique_dict([*last_parts(values)])
    except ValueError as error:
        raise DataError(path, str(error)) from None
    return {key: checked(key, raw, path) for key, raw in values.items()}


def saved_hparams(values, where):
    """Hparams of a checkpoint or run folder; a key that it lacks has its default. Raises
    UsageError."""
    return Hparams(**{key: checked(key, raw, where) for key, raw in values.items()})


def changed(hp, **values):
    """hp with other values, checked as a reader of the run's files will check them: values beyond
    their bounds would make a run that nothing can read. Raises UsageError."""
    return saved_hparams(vars(hp) | values, "flags")
