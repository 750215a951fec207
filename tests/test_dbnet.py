"""The network: shapes of many backbones, the loss against a direct formula, checkpoints that cannot
be half."""

import os
import re
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbnet import (
    DBNet,
    balanced_bce,
    db_loss,
    largest_weights,
    load_checkpoint,
    save_checkpoint,
)
from files import DataError, UsageError
from folding import load_network
from hparams import Hparams

SMALL = "mobilenetv3_small_050"


def random_maps(batch, size):
    """(logits [B, 2, S, S], maps uint8 [B, 4, S, S] as data.make_targets gives them)."""
    g = torch.Generator().manual_seed(0)
    share = torch.tensor([0.1, 0, 0.9, 0.3]).view(1, 4, 1, 1)
    maps = (torch.rand(batch, 4, size, size, generator=g) < share).byte()
    maps[:, 1] = torch.randint(0, 256, (batch, size, size), generator=g)
    return torch.randn(batch, 2, size, size, generator=g), maps


def direct_loss(logits, maps):
    """The paper's formula, page by page, in float64 with an explicit sort."""
    total = []
    for logit, (shrink, thresh, mask, near) in zip(logits.double(), maps.double()):
        p, t = logit[0].sigmoid(), logit[1].sigmoid()
        bce = -(shrink * p.log() + (1 - shrink) * (1 - p).log())
        positive, negative = (shrink * mask) > 0, ((1 - shrink) * mask) > 0
        n = min(max(3 * int(positive.sum()), 1000), int(negative.sum()))
        hardest = bce[negative].sort(descending=True)[0][:n]
        bce = (bce[positive].sum() + hardest.sum()) / max(1, positive.sum() + n)
        l1 = ((t - (0.3 + 0.4 * thresh / 255)).abs() * near).sum() / (near.sum() + 1)
        b = (50 * (p - t)).sigmoid() * mask
        dice = 1 - (2 * (b * shrink).sum() + 1) / (b.sum() + (shrink * mask).sum() + 1)
        total.append(5 * bce + 10 * l1 + dice)
    return torch.stack(total).mean()


def test_loss_is_the_papers_formula_in_float32_under_autocast():
    """Three negatives a positive; without text a floor of them, on a masked page none."""
    logits, maps = random_maps(3, 64)
    logits = (4 * logits).requires_grad_()
    maps[1, 0] = maps[2] = 0
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = db_loss(logits, maps)
        rounded = db_loss(logits.bfloat16(), maps)[0]
    expected = direct_loss(logits, maps)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert rounded.item() == pytest.approx(direct_loss(logits.bfloat16(), maps).item(), rel=1e-6)
    assert loss.item() == pytest.approx((5 * parts[0] + 10 * parts[1] + parts[2]).item(), rel=1e-6)
    (a,), (b,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
    assert a[1, 0].abs().sum() > 0  # no text still teaches where none is


@pytest.mark.parametrize("positives, negatives", [(0, 1000), (100, 1000), (333, 1000), (900, 2700)])
def test_balanced_bce_is_torchs_mean_over_positives_and_hardest_negatives(positives, negatives):
    """Three a positive, and 1,000 at least on every page, not only on one without text."""
    g = torch.Generator().manual_seed(positives)
    logit = 3 * torch.randn(5000, generator=g)
    target = (torch.arange(5000) < positives).float()
    mask = (torch.arange(5000) < 4800).float()
    free = logit[positives:4800]  # the hardest negative has the largest logit
    chosen = torch.cat([logit[:positives], free.sort(descending=True)[0][:negatives]])
    label = (torch.arange(len(chosen)) < positives).float()
    expected = F.binary_cross_entropy_with_logits(chosen, label)
    found = balanced_bce(logit[None], target[None], mask[None])
    torch.testing.assert_close(found, expected[None], rtol=1e-5, atol=0)


def test_balanced_bce_takes_all_negatives_where_there_are_few():
    logit = torch.randn(600, generator=torch.Generator().manual_seed(0))
    target = (torch.arange(600) < 100).float()
    found = balanced_bce(logit[None], target[None], torch.ones(1, 600))
    expected = F.binary_cross_entropy_with_logits(logit, target)
    torch.testing.assert_close(found, expected[None], rtol=1e-5, atol=0)


def test_activations_do_not_copy_what_backward_needs():
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten.clone.default
            return function(*args, **(kwargs or {}))

    for backbone in ("efficientnet_b0", SMALL):
        with FakeTensorMode():
            model, pages = DBNet(backbone, 16), torch.empty(1, 64, 64, 3, dtype=torch.uint8)
            with Copies() as copies:
                model(pages).sum().backward()
        assert copies.count == 0


def test_largest_weights_equals_a_sort():
    values = torch.rand(4, 500, generator=torch.Generator().manual_seed(0)).exp()
    values[1, :100] = 0
    count = torch.tensor([1.0, 37.0, 499.0, 0.0])
    kept = (values * largest_weights(values, count)).sum(1)
    for row, total, n in zip(values, kept, count.int().tolist()):
        largest = row.sort(descending=True)[0][:n]
        assert total.item() == pytest.approx(largest.sum().item(), rel=1e-5)
    ties = largest_weights(torch.tensor([[3.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), torch.tensor([2, 2]))
    torch.testing.assert_close(ties, torch.tensor([[1, 1 / 3, 1 / 3, 1 / 3, 0], [0.4] * 5]))


def test_efficientnet_b4_is_the_default_with_its_channels():
    net = DBNet(Hparams().backbone, Hparams().neck)
    assert [c.in_channels for c in net.lateral] == [32, 56, 160, 448]
    assert [c.out_channels for c in (*net.lateral, *net.smooth)] == [256] * 4 + [64] * 4


def test_each_backbone_is_normalised_by_its_own_config():
    imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    for name, own in (("tf_efficientnet_lite2", [[0.5] * 3] * 2), (SMALL, imagenet)):
        net = DBNet(name, 32)
        for level, expected in zip((net.mean, net.std), own):
            assert (level / 255).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["efficientnet_b5", "convnext_tiny", "hrnet_w18", SMALL])
def test_one_step_with_any_timm_backbone(name):
    torch.manual_seed(0)
    net = DBNet(name, 32)
    pages = torch.randint(0, 256, (2, 32, 64, 3), dtype=torch.uint8)
    logits = net(pages)
    assert logits.shape == (2, 2, 32, 64)
    loss, _ = db_loss(logits, random_maps(2, 64)[1][:, :, :32])
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    net.eval()
    with torch.no_grad():
        assert net(pages).shape == (2, 1, 32, 64)


def test_weights_of_a_path_are_loaded_or_refused(tmp_path):
    source = {k: v.half() for k, v in DBNet(SMALL, 32).backbone.state_dict().items()}
    torch.save(source | {"classifier.weight": torch.zeros(3)}, tmp_path / "w.pt")
    loaded = DBNet(SMALL, 32, str(tmp_path / "w.pt")).backbone.state_dict()
    assert loaded.keys() == source.keys()
    for key, tensor in source.items():
        torch.testing.assert_close(loaded[key].float(), tensor.float())
    torch.save({"conv_stem.weight": torch.zeros(1)}, tmp_path / "few.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    reasons = {"none": "No such file", "few": "first: conv_stem.weight", "junk": "not a PyTorch"}
    for name, why in reasons.items():
        with pytest.raises(DataError, match=why):
            DBNet(SMALL, 32, str(tmp_path / f"{name}.pt"))
    with pytest.raises(UsageError, match="b44': not timm's; did you mean efficientnet_b4"):
        DBNet("efficientnet_b44", 32)


# ---------------------------------------------------------------- checkpoints

STATE = {"model": {"w": torch.arange(6.0)}, "hparams": {"lr": 0.1}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.pt"


KINDS = (SMALL, 0), ("resnet10t", 0), ("repvit_m0_9", 23), ("xception41p", 42)


@pytest.mark.parametrize("name, left", KINDS)
def test_a_loaded_network_gives_the_same_maps_without_batch_norms(path, name, left):
    """Activations within the norms stay. Some of RepViT's norms take a sum, in modules that list a
    convolution right before them; some of Xception's outputs are also added to later ones."""
    torch.manual_seed(0)
    net = DBNet(name, 16).eval()
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for tensor in (norm.running_mean, norm.bias):
            torch.nn.init.normal_(tensor, std=0.3)
        for tensor in (norm.running_var, norm.weight):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    save_checkpoint(path, {"model": net.state_dict(), "hparams": {"backbone": name, "neck": 16}})
    model, _, state = load_network(path)
    pages = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        maps, expected = (network(pages).sigmoid() for network in (model, net))
    assert maps.std() > 0.01
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-4)
    kinds = [type(part) for head in (model.backbone, model.shrink_head) for part in head.modules()]
    assert sum(issubclass(kind, torch.nn.BatchNorm2d) for kind in kinds) == left
    torch.testing.assert_close(dict(state["model"]), dict(net.state_dict()), rtol=0, atol=0)


def test_checkpoint_round_trip_and_a_change_of_any_byte(path):
    save_checkpoint(path, STATE)
    state = load_checkpoint(path)
    assert state["model"]["w"].tolist() == list(range(6)) and state["hparams"].lr == 0.1
    assert list(path.parent.iterdir()) == [path]
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        refused(path, "damaged")
    path.write_bytes(content[:-66] + b"\0\0")  # as torch.save writes it
    assert load_checkpoint(path)["model"]["w"].equal(state["model"]["w"])


@pytest.mark.parametrize(
    "call, error", [("os.replace", KeyboardInterrupt()), ("os.fsync", OSError(28, "No space left"))]
)
def test_a_kill_or_a_full_disk_leaves_the_old_checkpoint(path, call, error, monkeypatch):
    def fail(*_):
        raise error

    save_checkpoint(path, {**STATE, "epoch": 1})
    monkeypatch.setattr(call, fail)
    with pytest.raises(type(error)):
        save_checkpoint(path, {**STATE, "epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1 and list(path.parent.iterdir()) == [path]
    save_checkpoint(path, {**STATE, "epoch": 2})
    assert load_checkpoint(path)["epoch"] == 2


def refused(path, why):
    with pytest.raises(DataError, match=why):
        load_checkpoint(path)


def test_what_is_not_a_checkpoint_is_refused_and_cannot_run_code(path):
    class Evil:
        def __reduce__(self):
            return (open, (str(path.with_name("ran")), "w"))

    refused(path, "cannot be read")
    path.write_bytes(b"junk")
    refused(path, "not a checkpoint")
    torch.save([1, 2], path)
    refused(path, "not a checkpoint")
    torch.save({"epoch": 1}, path)
    refused(path, "lacks model, hparams")
    torch.save({"model": Evil(), "hparams": {}}, path)
    refused(path, "not a checkpoint")
    assert list(path.parent.iterdir()) == [path]
    os.mkfifo(path.with_name("pipe"))
    refused(path.with_name("pipe"), "not a file")


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"model": {"w": torch.zeros(1).expand(10**12)}}, "more than the file"),
        ({"model": {"w": torch.zeros(4)}, "ema": {"w": [1]}}, "ema is not a dict of tensors"),
        ({"model": [torch.zeros(4)]}, "model is a list"),
        ({"hparams": {"neck": 10**9}}, "neck = 1000000000 is not within"),
        ({"hparams": {"backbone": 5}}, "backbone = 5 is not a line of text"),
        ({"hparams": {"thresh": "low"}}, "thresh = 'low' is not a number"),
        ({"hparams": {"size": float("nan")}}, "size = nan is not a whole number"),
        ({"hparams": {"sise": 96}}, "unknown key 'sise'; did you mean size"),
        ({"hparams": [1]}, "hparams is a list"),
        ({"scores": {"labels": [1, "a"]}}, "groups or labels are not texts"),
        ({"scores": {"pages": {"a.jpg": "good"}}}, "'<=' not supported"),
        ({"scores": {"pages": {"a.jpg": float("nan")}}}, "scores are not within"),
        ({"model": {"w": torch.zeros(2, 2).to_sparse()}}, "more than the file"),
        ({"extra": {1, 2}}, "it holds a set"),
    ],
)
def test_hostile_fields_are_refused(path, wrong, why):
    torch.save({"model": {}, "hparams": {}, **wrong}, path)
    refused(path, f"not a checkpoint of train.py.*{re.escape(why)}")


def test_bombs_are_refused(path):
    """Entries that unpack to more than the file, and lists that contain each other."""
    bomb = path.with_name("bomb.pt")
    torch.save({"model": {"w": torch.zeros(2**22)}, "hparams": {}}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.namelist():
            out.writestr(entry, source.read(entry))
    assert bomb.stat().st_size < 2**18
    refused(bomb, "damaged, or not a checkpoint")
    nest = []
    for _ in range(40):
        nest = [nest, nest]
    torch.save({"model": {}, "hparams": {}, "nest": nest}, path)
    refused(path, "more than the file")
