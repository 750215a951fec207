"""What does a network compute to predict? Its parts are folded into fewer ones that give the same
maps."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dbnet import DBNet, load_checkpoint
from files import DataError, UsageError


def load_network(path, device="cpu"):
    """A checkpoint's DBNet for prediction, its Hparams and its whole dict, see `network_of`. Raises
    DataError."""
    state = load_checkpoint(path)
    return network_of(state, path, device), state["hparams"], state


def network_of(state, path, device):
    """The DBNet of a checkpoint's dict, for prediction: EMA's weights where there are any, folded.
    Raises DataError where the weights do not fit its Hparams."""
    hp = state["hparams"]
    try:
        model = DBNet(hp.backbone, hp.neck, "none")
        model.load_state_dict(state.get("ema") or state["model"])
    except (UsageError, RuntimeError) as error:
        what = f"weights do not fit its hparams ({str(error).splitlines()[0]})"
        raise DataError(path, what) from None
    return fold(model.eval()).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def fold(model):
    """A copy of a DBNet in eval mode that computes less: batch norms are folded into convolutions,
    padding is constant, the head has no transposed convolution. The DBNet itself where the copy's
    logits differ, because something else takes the output of a folded convolution too."""
    page = torch.arange(128 * 128 * 3).pow(2).to(torch.uint8).view(1, 128, 128, 3)
    folded = copy.deepcopy(model)
    logits = fold_norms(folded, page)
    fold_padding(folded)
    folded.shrink_head = fold_head(folded.shrink_head)
    if torch.allclose(folded(page), logits, rtol=1e-3, atol=1e-3):
        return folded
    return model


def fold_norms(model, page):
    """Fold each batch norm into the convolution before it (Jacob et al. 2018, arXiv 1712.05877).
    Returns the logits of a page as they were."""
    from timm.layers import BatchNormAct2d, Conv2dSame

    foldable = (nn.Conv2d, Conv2dSame, nn.ConvTranspose2d)  # subclasses scale their weights
    pairs = {}  # {convolution: the batch norm that takes its output}

    # one page through the network, each output marked with the module that made it
    def note(module, inputs, output):
        maker = getattr(inputs[0], "maker", None)
        if type(module) in (nn.BatchNorm2d, BatchNormAct2d) and type(maker) in foldable:
            pairs[maker] = module
        if torch.is_tensor(output) and (output is inputs[0] or not hasattr(output, "maker")):
            output.maker = module  # a container returns what its last part made

    with nn.modules.module.register_module_forward_hook(note):
        logits = model(page)

    names = {module: name for name, module in model.named_modules()}
    for conv, norm in pairs.items():
        model.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm, conv.transposed))
        model.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
    return logits


def fold_padding(model):
    """Give TensorFlow's convolutions of a stride constant padding, which engines can fold: theirs
    follows from the page's shape. It is always the same, as sides are multiples of the stride."""
    from timm.layers import Conv2dSame

    for name, conv in [*model.named_modules()]:
        if type(conv) is not Conv2dSame:
            continue
        sides = []
        for size, step, stride in zip(conv.kernel_size, conv.dilation, conv.stride):
            missing = max((size - 1) * step + 1 - stride, 0)
            sides = [missing // 2, missing - missing // 2, *sides]  # the width's first
        plain = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
        )
        plain.weight, plain.bias = conv.weight, conv.bias
        model.set_submodule(name, nn.Sequential(nn.ZeroPad2d(sides), plain))


def fold_head(head):
    """A head without batch norms as 1 x 1 convolutions: both transposed ones make 2 x 2 pixels of
    each pixel by itself. Here these are channels until the end, where they take their places."""
    first = head[3]
    norm = head[4]
    last = head[6]
    if not isinstance(norm, nn.Identity):
        return head

    # the 2 x 2 pixels (y, x) of the first one, side by side
    inner = first.out_channels
    wide = nn.Conv2d(first.in_channels, 4 * inner, 1)
    weight = first.weight.permute(2, 3, 1, 0)  # [2, 2, inner, channels]
    wide.weight = nn.Parameter(weight.reshape(4 * inner, -1, 1, 1))
    wide.bias = nn.Parameter(first.bias.repeat(4))

    # each of them becomes 2 x 2 pixels (v, u), in the order y, v, x, u
    part = last.weight.permute(2, 3, 1, 0).reshape(4, inner)
    weight = torch.block_diag(*[part] * 4).view(2, 2, 2, 2, -1).transpose(1, 2)
    narrow = nn.Conv2d(4 * inner, 16, 1)
    narrow.weight = nn.Parameter(weight.reshape(16, -1, 1, 1))
    narrow.bias = nn.Parameter(last.bias.repeat(16))
    return nn.Sequential(*head[:3], wide, nn.ReLU(inplace=True), narrow, nn.PixelShuffle(4))
