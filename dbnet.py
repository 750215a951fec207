"""The network: timm backbone -> feature pyramid -> DB head; its loss; its checkpoints.
DBNet (Liao et al. 2020, arXiv 1911.08947). B batch, C channels, H W input size, h w a quarter."""

import copy
import hashlib
import io
import logging
import math
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from files import DataError, UsageError, nearest, replace_file
from hparams import saved_hparams

MAX_BYTES, MAX_PICKLE, MAX_NODES = 8 << 30, 64 << 20, 10**6  # of a checkpoint
STATE = {"epoch": int, "step": int, "losses": list, "timing": list, "rows": list, "best": dict}
STATE |= {"scores": dict, "origin": dict, "hparams": dict, "model": dict}
ORIGIN = {"trained", "chosen", "unknown"}  # digests of pages, and ancestors that do not tell
K = 50  # steepness of the differentiable step, eq. 2
STRIDES = (4, 8, 16, 32)


class DBNet(nn.Module):
    """Pages in, logits of the shrink map (and in training of the threshold map) out. backbone: a
    timm name with features at STRIDES; neck: channels of the feature pyramid, a multiple of 4;
    pretrained: "timm" (its download), "none" or a state dict's path. Raises DataError."""

    def __init__(self, backbone, neck, pretrained="none"):
        super().__init__()
        self.backbone, self.levels, channels = make_backbone(backbone, pretrained)
        for name in ("mean", "std"):
            level = 255 * torch.tensor(self.backbone.default_cfg[name]).view(1, 3, 1, 1)
            self.register_buffer(name, level, persistent=False)
        self.lateral = nn.ModuleList(nn.Conv2d(c, neck, 1, bias=False) for c in channels)
        smooth = (nn.Conv2d(neck, neck // 4, 3, padding=1, bias=False) for _ in channels)
        self.smooth = nn.ModuleList(smooth)
        for conv in (*self.lateral, *self.smooth):
            nn.init.kaiming_normal_(conv.weight)
        self.shrink_head = make_head(neck, bias=-2.0)
        self.thresh_head = make_head(neck, bias=0.0)

    def forward(self, pages):
        """uint8 [B, H, W, 3], H and W multiples of 32 -> logits [B, 2, H, W] in training (shrink,
        threshold), [B, 1, H, W] otherwise."""
        x = (pages.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std  # [B, 3, H, W]
        features = self.backbone(x)
        maps = [lateral(features[i]) for lateral, i in zip(self.lateral, self.levels)]
        for i in (2, 1, 0):  # top down, [B, neck, H/s, W/s] of STRIDES s (Lin et al. 2017)
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:])
        size = maps[0].shape[2:]
        maps = [F.interpolate(smooth(m), size) for smooth, m in zip(self.smooth, maps)]
        fused = torch.cat(maps, 1)  # [B, neck, h, w]
        if not self.training:
            return self.shrink_head(fused)
        return torch.cat([self.shrink_head(fused), self.thresh_head(fused)], 1)


def make_head(channels, bias):
    """[B, neck, h, w] -> logits [B, 1, H, W], at first about `bias`: below 0, nothing is text."""
    inner = channels // 4
    last = nn.ConvTranspose2d(inner, 1, 2, 2)
    nn.init.constant_(last.bias, bias)
    conv = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
    up = nn.ConvTranspose2d(inner, inner, 2, 2, bias=False)
    relu, norms = nn.ReLU(inplace=True), [nn.BatchNorm2d(inner) for _ in range(2)]
    return nn.Sequential(conv, norms[0], relu, up, norms[1], relu, last)


def make_backbone(name, pretrained):
    """(timm feature extractor, which of its outputs have STRIDES, their channels [4])."""
    import timm  # takes seconds, and --help and --print-hparams do without

    if not timm.is_model(name):
        raise UsageError(f"backbone {name!r}", f"not timm's{nearest(name, timm.list_models())}")
    try:
        model = timm.create_model(name, features_only=True)
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise UsageError(f"backbone {name}", f"timm cannot give its features ({error})") from None
    strides = model.feature_info.reduction()
    if missing := [s for s in STRIDES if s not in strides]:
        raise UsageError(f"backbone {name}", f"has strides {strides}; {missing} are missing")
    levels = [max(i for i, s in enumerate(strides) if s == stride) for stride in STRIDES]
    if pretrained == "timm":
        model = download_backbone(name)
    elif pretrained != "none":
        load_backbone(model, pretrained)
    for module in model.modules():
        if isinstance(module, (nn.SiLU, nn.Hardswish)):  # in place they copy what backward needs
            module.inplace = False
    channels = model.feature_info.channels()
    return model, levels, [channels[i] for i in levels]


def download_backbone(name):
    """timm feature extractor with its ImageNet weights. Raises DataError with the remedies."""
    import timm

    print(f"fetching the ImageNet weights of {name} (--no-pretrained does without)", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs every retry
    try:
        return timm.create_model(name, features_only=True, pretrained=True)
    except Exception as error:  # noqa: BLE001 (the hub's client raises its own many kinds)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        remedy = "use --pretrained PATH (a state dict on disk) or --no-pretrained (random weights)"
        raise DataError(f"weights of {name}", f"no download ({reason})", remedy) from None


def load_backbone(model, path):
    """Load a timm state dict but for a head's layers. Raises DataError if it does not fit."""
    where = f"--pretrained {path}"
    state = read_saved(path, where, "not a PyTorch state dict", legacy=True)[0]
    own = model.state_dict()
    own = {k: v for k, v in own.items() if k in state or not k.endswith("num_batches_tracked")}
    if wrong := [k for k, v in own.items() if getattr(state.get(k), "shape", None) != v.shape]:
        what = f"{len(wrong)} tensors are missing or of another shape (first: {wrong[0]})"
        raise DataError(where, f"not weights of this backbone: {what}")
    model.load_state_dict({k: state[k].float() for k in own}, strict=False)


# ---------------------------------------------------------------- loss


def db_loss(logits, maps):
    """Logits [B, 2, H, W] (shrink, threshold) of any float type, maps uint8 [B, 4, H, W] of
    data.make_targets -> 5 BCE (shrink, hard negatives 3:1) + 10 L1 (threshold) + Dice (binary), a
    scalar, and these parts [3]. Each page has its own loss with its own negatives, a batch is their
    mean. float32 throughout, no host sync. arXiv 1911.08947, eq. 2, 6, 7, 8."""
    with torch.autocast(logits.device.type, enabled=False):
        shrink_logit, thresh_logit = logits.float().flatten(2).unbind(1)  # [B, HW] each
        shrink, thresh, mask, near = maps.flatten(2).float().unbind(1)
        bce = balanced_bce(shrink_logit, shrink, mask)
        prob, border = shrink_logit.sigmoid(), thresh_logit.sigmoid()
        error = (border - (0.3 + 0.4 / 255 * thresh)).abs()
        l1 = (error * near).sum(1) / (near.sum(1) + 1)
        binary = (K * (prob - border)).sigmoid() * mask
        overlap = 2 * (binary * shrink).sum(1) + 1
        dice = 1 - overlap / (binary.sum(1) + (shrink * mask).sum(1) + 1)
        parts = torch.stack([bce, l1, dice]).mean(1)
    return 5 * parts[0] + 10 * parts[1] + parts[2], parts.detach()


def teacher_loss(logits, target):
    """Logits [B, 2, H, W], the teachers' mean map [B, H, W] -> cross-entropy of the shrink map with
    it, a float32 scalar (Hinton et al. 2015)."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), target)


def balanced_bce(logit, target, mask, ratio=3, floor=1000):
    """[B, N] each -> binary cross-entropy [B] of pages over all positives and the `ratio` times as
    many hardest negatives, the `floor` hardest of a page without positives."""
    loss = F.binary_cross_entropy_with_logits(logit, target, reduction="none") * mask
    positive, negative = target * mask, (1 - target) * mask
    n_positive = positive.sum(1)
    n_negative = torch.minimum((ratio * n_positive).clamp(min=floor), negative.sum(1))
    kept = largest_weights(loss.detach() * negative, n_negative)
    total = (loss * positive).sum(1) + (loss * negative * kept).sum(1)
    return total / (n_positive + n_negative).clamp(min=1)


def largest_weights(values, count):
    """Values [B, N] >= 0, count [B] -> weights [B, N] that pick the `count` largest, ties shared
    evenly. Bisection on the bits of the float, which order like its value: 31 passes, exact."""
    bits = values.contiguous().view(torch.int32)
    low = torch.zeros_like(count, dtype=torch.int32)  # at least `count` values are >= low
    for shift in range(30, -1, -1):
        trial = low + (1 << shift)
        low = torch.where((bits >= trial[:, None]).sum(1) >= count, trial, low)
    above, level = bits > low[:, None], bits == low[:, None]
    left = (count - above.sum(1)) / level.sum(1).clamp(min=1)
    return above + level * left.clamp(0, 1)[:, None]


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path, state):
    """Write plain dicts of tensors and JSON types to `path`, whole or not at all: torch.save's ZIP,
    its comment the SHA-256 of all before it, so that a change of any byte is told."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(-2, io.SEEK_END)  # where a ZIP file says how long its comment is
    buffer.write((64).to_bytes(2, "little"))
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    replace_file(path, buffer.getbuffer())


def load_checkpoint(path, keys=("model", "hparams")):
    """A checkpoint's dict on the CPU, its hparams an Hparams. Raises DataError if it is none of
    ours, UsageError if it cannot be read."""
    remedy = "name a best.pt or last.pt of train.py; of a damaged last.pt use prev.pt"
    state, size = read_saved(path, path, "damaged, or not a checkpoint", remedy)
    if missing := [k for k in keys if k not in state]:
        raise DataError(path, f"not a checkpoint of train.py (it lacks {', '.join(missing)})")
    try:
        check_state(state, size)
        return {**state, "hparams": saved_hparams(state["hparams"], "hparams")}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(path, f"not a checkpoint of train.py ({error})") from None


def read_saved(path, where, wrong, remedy="", legacy=False):
    """(the dict that torch.save wrote to `path`, on the CPU; the file's length), in no more memory
    than the file is long, whatever it claims. legacy: not only a ZIP file. Raises DataError with
    `wrong` and `remedy`, UsageError where nothing can be read."""
    try:
        if Path(path).stat().st_size > MAX_BYTES or not Path(path).is_file():
            raise DataError(where, f"not a file of at most {MAX_BYTES >> 30} GiB")
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
    """Raises ValueError unless the bytes are a ZIP file of uncompressed, whole entries, that has no
    comment or save_checkpoint's."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        pickled = [e.file_size for e in entries if e.filename.endswith(".pkl")]
        stored = all(e.compress_type == zipfile.ZIP_STORED for e in entries)
        size = sum(e.file_size for e in entries)
        if not stored or size > len(content) or sum(pickled) > MAX_PICKLE or archive.testzip():
            raise ValueError("entries larger than the file, or another CRC32")
    plain = content[-22:-18] == b"PK\5\6"  # without a comment these are the last 22 bytes
    if not plain and hashlib.sha256(content[:-64]).hexdigest().encode() != content[-64:]:
        raise ValueError("another SHA-256")


def check_state(state, size):
    """Raises ValueError or TypeError unless `state` is made of plain dicts, lists, JSON types and
    tensors of `size` bytes in all, and its fields have their types."""
    stack, nodes = [state], 0
    while stack:
        value = stack.pop()
        nodes += 1
        if torch.is_tensor(value):
            dense = value.layout is torch.strided and value.device.type == "cpu"
            size -= value.nbytes if dense and type(value) is torch.Tensor else math.inf
        elif isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            stack += value
        elif not isinstance(value, (str, int, float, type(None))):
            raise TypeError(f"it holds a {type(value).__name__}")
        if nodes + len(stack) > MAX_NODES or size < 0:
            raise ValueError("it holds more than the file is long")
    for key, kind in STATE.items():
        if not isinstance(state.get(key, kind()), kind):
            raise TypeError(f"{key} is a {type(state[key]).__name__}")
    if not all(isinstance(x, (int, float)) for row in state.get("rows", []) for x in row.values()):
        raise TypeError("rows are not numbers")
    for name in ("model", "ema"):
        if not all(map(torch.is_tensor, (state.get(name) or {}).values())):
            raise TypeError(f"{name} is not a dict of tensors")
    scores, origin = state.get("scores", {}), state.get("origin") or dict.fromkeys(ORIGIN, ())
    lists = [*origin.values(), scores.get("digests", ()), scores.get("groups", ())]
    if origin.keys() != ORIGIN or not all(isinstance(x, str) for texts in lists for x in texts):
        raise TypeError("origin, digests or groups are not lists of texts")
    if not all(0 <= v <= 1 for v in (scores.get("hmean", 0), *scores.get("pages", {}).values())):
        raise ValueError("scores are not within 0 to 1, or not of pages")


@torch.no_grad()
def fold_norms(model):
    """A DBNet in eval mode with its batch norms folded into the convolutions before them: less to
    compute (Jacob et al. 2018, arXiv 1712.05877); as it is where others take these outputs too."""
    from timm.layers import BatchNormAct2d, Conv2dSame

    foldable = (nn.Conv2d, Conv2dSame, nn.ConvTranspose2d)  # other kinds scale their weights
    names, pairs = {module: name for name, module in model.named_modules()}, {}

    def note(module, inputs, output):
        maker = getattr(inputs[0], "maker", None)
        if type(module) in (nn.BatchNorm2d, BatchNormAct2d) and type(maker) in foldable:
            pairs[maker] = module
        if torch.is_tensor(output) and (output is inputs[0] or not hasattr(output, "maker")):
            output.maker = module  # a container returns what its last part made

    page = torch.arange(128 * 128 * 3).pow(2).to(torch.uint8).view(1, 128, 128, 3)
    with nn.modules.module.register_module_forward_hook(note):
        logits = model(page)
    folded = copy.deepcopy(model)
    for conv, norm in pairs.items():
        folded.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm, conv.transposed))
        folded.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
    same = torch.allclose(folded(page), logits, rtol=1e-3, atol=1e-3)
    return folded if same else model


def choose_device(name, work=True):
    """torch.device of --device, made the current one; `auto` is CUDA where there is one. Raises
    UsageError, and where it is to work also if the installed torch has no kernels for it."""
    gpus, where = torch.cuda.device_count(), f"--device {name}"
    try:
        device = torch.device(("cpu", "cuda")[gpus > 0] if name == "auto" else name)
    except RuntimeError:
        raise UsageError(where, "not a device", "use cuda, cuda:1 or cpu") from None
    if device.type != "cpu" and (device.type != "cuda" or (device.index or 0) >= gpus):
        raise UsageError(where, f"not here, with {gpus} CUDA devices", "use cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what asks for no device means the current one
    try:
        if work:
            torch.ones(1, device=device)  # the least that runs a kernel
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        what = f"torch serves no such GPU, but {', '.join(torch.cuda.get_arch_list())}"
        raise UsageError(where, what, "install torch's wheel for that GPU, or use cpu") from None
    return device


def load_network(path, device="cpu"):
    """DBNet for prediction (see `fold_norms`) with the weights of a checkpoint (EMA's where there
    are any), its Hparams and its whole dict. Raises DataError, as where weights do not fit."""
    state = load_checkpoint(path)
    hp = state["hparams"]
    try:
        model = DBNet(hp.backbone, hp.neck, "none")
        model.load_state_dict(state.get("ema") or state["model"])
    except (UsageError, RuntimeError) as error:
        what = f"weights do not fit its hparams ({str(error).splitlines()[0]})"
        raise DataError(path, what) from None
    model = fold_norms(model.eval()).to(device, memory_format=torch.channels_last)
    return model, hp, state
