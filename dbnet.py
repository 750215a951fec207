"""The network: timm backbone -> feature pyramid -> DB head; its loss; its checkpoints.
DBNet (Liao et al. 2020, arXiv 1911.08947). B batch, C channels, H W input size, h w a quarter."""

import hashlib
import io
import logging
import math
import os
import shutil
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files import DataError, UsageError, nearest, replace_file
from hparams import saved_hparams
from labels import raise_together

# limits of a checkpoint, so that a hostile file ends in an error and not in swap
MAX_BYTES = 8 << 30
MAX_PICKLE = 64 << 20
MAX_NODES = 10**6  # dicts, lists, keys and values

# types of a checkpoint's fields
STATE = {
    "epoch": int,
    "step": int,
    "losses": list,
    "timing": list,
    "rows": list,
    "best": dict,
    "scores": dict,
    "origin": dict,
    "pages": dict,
    "hparams": dict,
    "model": dict,
}
KEPT = "last.pt", "prev.pt"  # the checkpoints of a run that a resume takes, the newest first
# digests of the pages trained on and of those that chose an epoch; ancestors that record neither
ORIGIN = {"trained", "chosen", "unknown"}

K = 50  # steepness of the differentiable step, eq. 2
STRIDES = (4, 8, 16, 32)
EMA_DECAY = 0.999


# ---------------------------------------------------------------- network


class DBNet(nn.Module):
    """Pages uint8 [B, H, W, 3] -> logits of the shrink map and, in training, of the threshold map.

    backbone: a timm name with features at STRIDES.
    neck: channels of the feature pyramid, a multiple of 4.
    pretrained: "timm" (download), "none" or the path of a state dict.
    Raises DataError."""

    def __init__(self, backbone, neck, pretrained="none"):
        super().__init__()
        self.backbone, self.levels, channels = make_backbone(backbone, pretrained)

        # pixels are normalised on the device, with the values the backbone was trained with
        for name in ("mean", "std"):
            level = 255 * torch.tensor(self.backbone.default_cfg[name]).view(1, 3, 1, 1)
            self.register_buffer(name, level, persistent=False)

        # feature pyramid
        lateral = [nn.Conv2d(c, neck, 1, bias=False) for c in channels]
        smooth = [nn.Conv2d(neck, neck // 4, 3, padding=1, bias=False) for _ in channels]
        for conv in (*lateral, *smooth):
            nn.init.kaiming_normal_(conv.weight)
        self.lateral = nn.ModuleList(lateral)
        self.smooth = nn.ModuleList(smooth)

        self.shrink_head = make_head(neck, bias=-2.0)
        self.thresh_head = make_head(neck, bias=0.0)

    def forward(self, pages):
        """uint8 [B, H, W, 3], H and W multiples of 32 -> logits [B, 2, H, W] in training (shrink,
        threshold), [B, 1, H, W] otherwise."""
        x = (pages.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std  # [B, 3, H, W]
        features = self.backbone(x)

        # top down: [B, neck, H/s, W/s] for each stride s (Lin et al. 2017)
        maps = [lateral(features[i]) for lateral, i in zip(self.lateral, self.levels)]
        for i in (2, 1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:])

        # all levels at a quarter of the input size, side by side
        size = maps[0].shape[2:]
        maps = [F.interpolate(smooth(m), size) for smooth, m in zip(self.smooth, maps)]
        fused = torch.cat(maps, 1)  # [B, neck, h, w]

        if not self.training:
            return self.shrink_head(fused)
        return torch.cat([self.shrink_head(fused), self.thresh_head(fused)], 1)


def make_head(channels, bias):
    """[B, channels, h, w] -> logits [B, 1, H, W], first about `bias`: below 0, nothing is text."""
    inner = channels // 4
    last = nn.ConvTranspose2d(inner, 1, 2, 2)
    nn.init.constant_(last.bias, bias)
    return nn.Sequential(
        nn.Conv2d(channels, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(inner, inner, 2, 2, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        last,
    )


def make_backbone(name, pretrained):
    """timm feature extractor, which of its outputs have STRIDES [4], their channels [4]. Raises
    UsageError where timm has none of that name or its strides are others, DataError where its
    weights cannot be had."""
    import timm  # takes seconds, which --help and --print-hparams need not wait for

    if not timm.is_model(name):
        raise UsageError(f"backbone {name!r}", f"not timm's{nearest(name, timm.list_models())}")
    try:
        model = timm.create_model(name, features_only=True)
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise UsageError(f"backbone {name}", f"timm cannot give its features ({error})") from None

    strides = model.feature_info.reduction()
    if missing := [s for s in STRIDES if s not in strides]:
        raise UsageError(f"backbone {name}", f"has strides {strides}; {missing} are missing")
    last_of = {stride: i for i, stride in enumerate(strides)}
    levels = [last_of[stride] for stride in STRIDES]

    if pretrained == "timm":
        model = download_backbone(name)
    elif pretrained != "none":
        load_backbone(model, pretrained)

    # in place, these activations would copy what backward needs
    for module in model.modules():
        if isinstance(module, (nn.SiLU, nn.Hardswish)):
            module.inplace = False

    channels = model.feature_info.channels()
    return model, levels, [channels[i] for i in levels]


def download_backbone(name):
    """timm feature extractor with its ImageNet weights. Raises DataError with the ways to do
    without the download."""
    import timm

    print(
        f"fetching the ImageNet weights of {name} (--no-pretrained: random weights instead)",
        flush=True,
    )
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs every retry
    try:
        return timm.create_model(name, features_only=True, pretrained=True)
    except Exception as error:  # noqa: BLE001 (the hub's client raises its own many kinds)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        remedy = "use --pretrained PATH (a state dict on disk) or --no-pretrained (random weights)"
        raise DataError(f"weights of {name}", f"no download ({reason})", remedy) from None


def load_backbone(model, path):
    """Load a timm state dict into a feature extractor, which has no classification head. Raises
    DataError if it does not fit."""
    where = f"--pretrained {path}"
    state = read_saved(path, where, "not a PyTorch state dict", legacy=True)[0]

    # older state dicts lack the counters of batch norm, which nothing here reads
    needed = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if key in state or not key.endswith("num_batches_tracked")
    }
    wrong = [key for key, t in needed.items() if getattr(state.get(key), "shape", None) != t.shape]
    if wrong:
        what = f"{len(wrong)} tensors are missing or of another shape (first: {wrong[0]})"
        raise DataError(where, f"not weights of this backbone: {what}")
    model.load_state_dict({key: state[key].float() for key in needed}, strict=False)


# ---------------------------------------------------------------- loss


def db_loss(logits, maps):
    """Logits [B, 2, H, W] (shrink, threshold) of any float type and maps uint8 [B, 4, H, W] of
    targets.make_targets -> loss, a scalar, and its parts [3] (BCE, L1, Dice).

    loss = 5 BCE (shrink map, hardest negatives) + 10 L1 (threshold map) + Dice (binary map),
    arXiv 1911.08947, eq. 2, 6, 7, 8; for the negatives see `balanced_bce`. Each page has its own
    loss, and a batch is their mean, so that it can be shared out over processes. All in float32,
    without a wait for the device."""
    with torch.autocast(logits.device.type, enabled=False):
        shrink_logit, thresh_logit = logits.float().flatten(2).unbind(1)  # [B, HW] each
        shrink, thresh, mask, near = maps.flatten(2).float().unbind(1)

        bce = balanced_bce(shrink_logit, shrink, mask)

        # threshold map: 0 to 255 stand for 0.3 to 0.7, and only the pixels near a word count
        prob = shrink_logit.sigmoid()
        border = thresh_logit.sigmoid()
        error = (border - (0.3 + 0.4 / 255 * thresh)).abs()
        l1 = (error * near).sum(1) / (near.sum(1) + 1)

        # Dice of the differentiable binary map with the shrink map
        binary = (K * (prob - border)).sigmoid() * mask
        overlap = 2 * (binary * shrink).sum(1) + 1
        dice = 1 - overlap / (binary.sum(1) + (shrink * mask).sum(1) + 1)

        parts = torch.stack([bce, l1, dice]).mean(1)
    return 5 * parts[0] + 10 * parts[1] + parts[2], parts.detach()


def teacher_loss(logits, target):
    """Logits [B, 2, H, W] and the teachers' mean map [B, H, W] -> cross-entropy between the shrink
    map and it, a float32 scalar (Hinton et al. 2015)."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), target)


def balanced_bce(logit, target, mask, ratio=3, floor=1000):
    """[B, N] each -> binary cross-entropy [B] of each page: the mean over all its positives and its
    hardest negatives. These are `ratio` a positive, but never fewer than `floor` (or all that the
    page has): a page with little text or none still learns where no text is."""
    loss = F.binary_cross_entropy_with_logits(logit, target, reduction="none") * mask
    positive = target * mask
    negative = (1 - target) * mask

    n_positive = positive.sum(1)
    n_negative = torch.minimum((ratio * n_positive).clamp(min=floor), negative.sum(1))
    kept = largest_weights(loss.detach() * negative, n_negative)

    total = (loss * positive).sum(1) + (loss * negative * kept).sum(1)
    return total / (n_positive + n_negative).clamp(min=1)


def largest_weights(values, count):
    """Values [B, N] >= 0, count [B] -> weights [B, N] that pick the `count` largest; values that
    tie for the last place share it evenly. Bisection on the bits of a float, which sort like its
    value: 31 passes, exact."""
    bits = values.contiguous().view(torch.int32)

    # the largest level that at least `count` values reach
    low = torch.zeros_like(count, dtype=torch.int32)
    for shift in range(30, -1, -1):
        trial = low + (1 << shift)
        low = torch.where((bits >= trial[:, None]).sum(1) >= count, trial, low)

    # all above it, and of those at it the share that is left
    above = bits > low[:, None]
    level = bits == low[:, None]
    left = (count - above.sum(1)) / level.sum(1).clamp(min=1)
    return above + level * left.clamp(0, 1)[:, None]


# ---------------------------------------------------------------- moving average


def float_tensors(model):
    """Weights and batch-norm statistics of a network, in a fixed order."""
    return [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]


@torch.no_grad()
def update_ema(ema, model, step):
    """Exponential moving average of lists of tensors, in place; short memory in the first steps."""
    torch._foreach_lerp_(ema, model, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path, state):
    """Write plain dicts of tensors and JSON types to `path`, whole or not at all: the ZIP file of
    torch.save, with the SHA-256 of all bytes before it as its comment, so that a change of any byte
    is noticed. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(-2, io.SEEK_END)  # where a ZIP file holds the length of its comment
    buffer.write((64).to_bytes(2, "little"))
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    replace_file(path, buffer.getbuffer())


def load_checkpoint(path, keys=("model", "hparams")):
    """A checkpoint's dict on the CPU, its hparams as Hparams. Raises DataError if the file is not a
    checkpoint of train.py with these keys, UsageError if it cannot be read."""
    remedy = "name a best.pt or last.pt of train.py; instead of a damaged last.pt use prev.pt"
    state, size = read_saved(path, path, "damaged, or not a checkpoint", remedy)
    if missing := [k for k in keys if k not in state]:
        raise DataError(path, f"not a checkpoint of train.py (it lacks {', '.join(missing)})")
    try:
        check_values(state, size)
        check_fields(state)
        return {**state, "hparams": saved_hparams(state["hparams"], "hparams")}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(path, f"not a checkpoint of train.py ({error})") from None


def read_saved(path, where, wrong, remedy="", legacy=False):
    """The dict that torch.save wrote to `path`, on the CPU, and the file's length. It takes no more
    memory than the file is long, whatever the file claims. legacy: the older format of torch.save
    will do too. Raises DataError(where, wrong, remedy), UsageError where nothing can be read."""
    try:
        if Path(path).is_dir():
            raise UsageError(where, "is a folder", "name a file in it, such as its last.pt")
        if Path(path).stat().st_size > MAX_BYTES or not Path(path).is_file():
            raise DataError(where, f"not a file of at most {MAX_BYTES >> 30} GiB", remedy)
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(where, f"cannot be read ({error.strerror})") from None

    try:
        if not legacy or zipfile.is_zipfile(io.BytesIO(content)):
            check_archive(content)
        state = dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        return state, len(content)
    except Exception as error:  # noqa: BLE001 (torch.load raises what the bytes lead to)
        raise DataError(where, f"{wrong} ({type(error).__name__})", remedy) from None


def check_archive(content):
    """Raises ValueError unless the bytes are a ZIP file of whole, uncompressed entries, with the
    comment of save_checkpoint or none."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        size = sum(entry.file_size for entry in entries)
        pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
        if not stored or size > len(content) or pickled > MAX_PICKLE or archive.testzip():
            raise ValueError("entries larger than the file, or another CRC32")

    plain = content[-22:-18] == b"PK\5\6"  # a ZIP file without a comment ends with this record
    if not plain and hashlib.sha256(content[:-64]).hexdigest().encode() != content[-64:]:
        raise ValueError("another SHA-256")


def check_values(state, size):
    """Raises ValueError or TypeError unless `state` is made of plain dicts, lists, JSON types and
    tensors of `size` bytes in all."""
    stack = [state]
    nodes = 0
    while stack:
        value = stack.pop()
        nodes += 1
        if torch.is_tensor(value):
            # a sparse or expanded one may stand for more than the file holds
            plain = value.layout is torch.strided and value.device.type == "cpu"
            size -= value.nbytes if plain and type(value) is torch.Tensor else math.inf
        elif isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            stack += value
        elif not isinstance(value, str | int | float | None):
            raise TypeError(f"it holds a {type(value).__name__}")
        if nodes + len(stack) > MAX_NODES or size < 0:
            raise ValueError("it holds more than the file is long")


def check_fields(state):
    """Raises ValueError or TypeError unless the fields of a checkpoint have their types."""
    for key, kind in STATE.items():
        if not isinstance(state.get(key, kind()), kind):
            raise TypeError(f"{key} is a {type(state[key]).__name__}")

    for row in state.get("rows", []):
        if not all(isinstance(number, (int, float)) for number in row.values()):
            raise TypeError("rows are not numbers")

    for name in ("model", "ema"):
        if not all(map(torch.is_tensor, (state.get(name) or {}).values())):
            raise TypeError(f"{name} is not a dict of tensors")

    scores = state.get("scores", {})
    origin = state.get("origin") or dict.fromkeys(ORIGIN, ())
    lists = [*origin.values(), *(scores.get(key, ()) for key in ("digests", "groups", "labels"))]
    lists += [part.values() for part in state.get("pages", {}).values()]
    texts = all(isinstance(text, str) for values in lists for text in values)
    if origin.keys() != ORIGIN or not texts:
        raise TypeError("origin, pages, digests, groups or labels are not texts")

    values = [scores.get("hmean", 0), *scores.get("pages", {}).values()]
    if not all(0 <= value <= 1 for value in values):
        raise ValueError("scores are not within 0 to 1, or not of pages")


def is_begun(folder):
    """Whether a run folder has a checkpoint to go on from."""
    return any((folder / name).exists() for name in KEPT)


def load_last(folder):
    """The newest whole checkpoint of a run, with its "path", or None. Says when that is not
    last.pt. Raises DataError where none is whole."""
    if not is_begun(folder):
        return None
    faults = []
    for name in KEPT:
        path = folder / name
        if faults and not path.exists():  # a run of one epoch has no prev.pt
            continue
        try:
            state = load_checkpoint(path, ("model", "optimizer", "hparams", "epoch", "rows"))
        except DataError as error:
            faults.append(error)
            continue
        if faults:
            print(f"warning: {faults[0]}; going on from {path}, epoch {state['epoch']}")
        return state | {"path": path}
    raise_together(faults)


def keep_previous(folder):
    """Make prev.pt another name of last.pt, without a moment in which either is missing."""
    temporary = folder / f".prev.pt.{os.getpid()}.tmp"
    try:
        os.link(folder / "last.pt", temporary)
    except OSError:  # a file system without hard links
        shutil.copy2(folder / "last.pt", temporary)
    os.replace(temporary, folder / "prev.pt")
    temporary.unlink(missing_ok=True)  # rename does nothing between two names of one file


def to_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_cpu(x) for x in value]
    return value
