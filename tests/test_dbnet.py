"""The network: shapes of many backbones, the loss against a direct formula, checkpoints that cannot
be half."""

import os
import re
import zipfile

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbnet import DBNet, balanced_bce, db_loss, largest_weights, load_checkpoint, save_checkpoint
from files import DataError, UsageError

SMALL = "mobilenetv3_small_050"


def random_maps(batch=2, size=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    maps = torch.zeros(batch, 4, size, size, dtype=torch.uint8)
    maps[:, 0] = torch.rand(batch, size, size, generator=g) < 0.1
    maps[:, 1] = torch.randint(0, 256, (batch, size, size), generator=g)
    maps[:, 2] = torch.rand(batch, size, size, generator=g) < 0.9
    maps[:, 3] = torch.rand(batch, size, size, generator=g) < 0.3
    return maps


def direct_loss(logits, maps):
    """The paper's formula, page by page, in float64 with an explicit sort."""
    total = []
    for logit, (shrink, thresh, mask, near) in zip(logits.double(), maps.double()):
        p, t = logit[0].sigmoid(), logit[1].sigmoid()
        bce = -(shrink * p.log() + (1 - shrink) * (1 - p).log())
        positive, negative = (shrink * mask) > 0, ((1 - shrink) * mask) > 0
        n = min(max(3 * int(positive.sum()), 1000), int(negative.sum()))
        hardest = bce[negative].sort(descending=True)[0][:n]
        bce = (bce[positive].sum() + hardest.sum()) / (positive.sum() + n)
        l1 = ((t - (0.3 + 0.4 * thresh / 255)).abs() * near).sum() / (near.sum() + 1)
        b = (50 * (p - t)).sigmoid() * mask
        dice = 1 - (2 * (b * shrink).sum() + 1) / (b.sum() + (shrink * mask).sum() + 1)
        total.append(5 * bce + 10 * l1 + dice)
    return torch.stack(total).mean()


def test_loss_is_the_papers_formula():
    logits = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    maps = random_maps()
    loss, parts = db_loss(logits, maps)
    expected = direct_loss(logits, maps)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx((5 * parts[0] + 10 * parts[1] + parts[2]).item(), rel=1e-6)
    (a,), (b,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_loss_of_a_batch_is_the_mean_over_its_pages():
    logits, maps = torch.randn(3, 2, 32, 32), random_maps(3, 32)
    each = [db_loss(logits[i : i + 1], maps[i : i + 1])[0] for i in range(3)]
    torch.testing.assert_close(db_loss(logits, maps)[0], torch.stack(each).mean())


def test_loss_is_finite_without_text_and_with_everything_masked():
    maps = torch.zeros(2, 4, 32, 32, dtype=torch.uint8)
    maps[0, 2] = 1  # a page without text; the other page is all don't care
    logits = (10 * torch.randn(2, 2, 32, 32)).requires_grad_()
    loss, _ = db_loss(logits, maps)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert logits.grad[0, 0].abs().sum() > 0  # no text still teaches where none is


def test_masked_pixels_do_not_count():
    logits, maps = torch.randn(1, 2, 32, 32), random_maps(1, 32)
    maps[:, :, :16] = 0
    other = logits.clone()
    other[:, :, :16] += 3
    torch.testing.assert_close(db_loss(logits, maps)[0], db_loss(other, maps)[0])


def test_loss_is_float32_under_autocast():
    logits, maps = torch.randn(1, 2, 32, 32), random_maps(1, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = db_loss(logits.bfloat16(), maps)
    assert loss.dtype == torch.float32


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
    g = torch.Generator().manual_seed(0)
    values = torch.rand(4, 500, generator=g).exp()
    values[1, :100] = 0
    count = torch.tensor([1.0, 37.0, 499.0, 0.0])
    kept = largest_weights(values, count)
    for row, weight, n in zip(values, kept, count.int().tolist()):
        assert (row * weight).sum() == pytest.approx(
            row.sort(descending=True)[0][:n].sum().item(), rel=1e-5
        )
    ties = largest_weights(torch.tensor([[3.0, 1, 1, 1, 0]]), torch.tensor([2.0]))
    torch.testing.assert_close(ties, torch.tensor([[1, 1 / 3, 1 / 3, 1 / 3, 0]]))
    tied = largest_weights(torch.ones(1, 10), torch.tensor([4.0]))
    torch.testing.assert_close(tied, torch.full((1, 10), 0.4))


def test_hard_negatives_are_three_to_one():
    logit = torch.linspace(-6, 6, 10_000)[None]
    target = torch.zeros(1, 10_000)
    target[0, :2000] = 1
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")[0]
    expected = (loss[:2000].sum() + loss[2000:].sort(descending=True)[0][:6000].sum()) / 8000
    torch.testing.assert_close(balanced_bce(logit, target, torch.ones_like(target))[0], expected)


def test_efficientnet_b4_is_the_default_with_its_channels():
    net = DBNet()
    assert [c.in_channels for c in net.lateral] == [32, 56, 160, 448]
    assert [c.out_channels for c in net.lateral] == [256] * 4 and [
        c.out_channels for c in net.smooth
    ] == [64] * 4


def test_each_backbone_is_normalised_by_its_own_config():
    lite = DBNet("tf_efficientnet_lite2", 32)
    assert (lite.mean / 255).flatten().tolist() == [0.5] * 3 and (
        lite.std / 255
    ).flatten().tolist() == [0.5] * 3
    assert (DBNet(SMALL, 32).mean / 255).flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize("name", ["efficientnet_b5", "convnext_tiny", "hrnet_w18", SMALL])
def test_one_step_with_any_timm_backbone(name):
    torch.manual_seed(0)
    net = DBNet(name, 32)
    pages = torch.randint(0, 256, (2, 32, 64, 3), dtype=torch.uint8)
    logits = net(pages)
    assert logits.shape == (2, 2, 32, 64)
    loss, _ = db_loss(logits, random_maps(2, 64)[:, :, :32])
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    net.eval()
    with torch.no_grad():
        assert net(pages).shape == (2, 1, 32, 64)


def test_unknown_backbone_and_weights_that_do_not_fit(tmp_path):
    with pytest.raises(
        UsageError, match="'efficientnet_b44': not a timm model; near names: efficientnet"
    ):
        DBNet("efficientnet_b44")
    with pytest.raises(DataError, match="No such file"):
        DBNet(SMALL, pretrained=str(tmp_path / "none.pt"))
    torch.save({"conv_stem.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="tensors missing"):
        DBNet(SMALL, pretrained=str(tmp_path / "w.pt"))
    (tmp_path / "w.pt").write_bytes(b"junk")
    with pytest.raises(DataError, match="not a PyTorch state dict"):
        DBNet(SMALL, pretrained=str(tmp_path / "w.pt"))


def test_pretrained_path_loads_the_backbone(tmp_path):
    source = DBNet(SMALL, 32).backbone.state_dict()
    torch.save(
        {k: v.half() for k, v in source.items()} | {"classifier.weight": torch.zeros(3)},
        tmp_path / "w.pt",
    )
    loaded = DBNet(SMALL, 32, str(tmp_path / "w.pt")).backbone.state_dict()
    for key, tensor in source.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(loaded[key], tensor.half().float())


def test_hub_out_of_reach_names_both_remedies(monkeypatch):
    def refuse(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no route to host\nmore")
        return create(*args, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(DataError, match=r"no route to host.*--pretrained PATH.*--no-pretrained"):
        DBNet(SMALL, 32, "timm")


# ---------------------------------------------------------------- checkpoints

STATE = {"model": {"w": torch.arange(6.0)}, "hparams": {"lr": 0.1}}


def test_checkpoint_round_trip_and_flips_of_any_byte(tmp_path):
    """Every byte of the file changed in turn: the very same content, or an error."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE)
    state = load_checkpoint(path)
    assert state["model"]["w"].tolist() == list(range(6)) and state["hparams"].lr == 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    content, told = path.read_bytes(), 0
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        try:
            other = load_checkpoint(path)
        except DataError as error:
            told += "damaged" in str(error) or "lacks" in str(error)
        else:  # padding and times of the ZIP file
            assert other["model"]["w"].equal(state["model"]["w"])
            assert other["hparams"] == state["hparams"]
    assert told > 100


def test_a_kill_before_the_replacement_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {**STATE, "epoch": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {**STATE, "epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1
    save_checkpoint(path, {**STATE, "epoch": 2})
    assert load_checkpoint(path)["epoch"] == 2


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {**STATE, "epoch": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        save_checkpoint(path, {**STATE, "epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"junk")
    with pytest.raises(DataError, match="not a checkpoint"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(DataError, match="lacks model, hparams"):
        load_checkpoint(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_checkpoint(tmp_path / "none.pt")


def test_checkpoints_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil(), "hparams": {}}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"model": {"w": torch.zeros(1).expand(10**12)}}, "more than the file"),
        ({"model": {"w": torch.zeros(4)}, "ema": {"w": [1]}}, "ema is not a dict of tensors"),
        ({"model": [torch.zeros(4)]}, "model is a list"),
        ({"model": {}, "hparams": {"neck": 10**9}}, "neck = 1000000000 is not within"),
        ({"model": {}, "hparams": {"backbone": 5}}, "backbone = 5 is not a line of text"),
        ({"model": {}, "hparams": {"thresh": "low"}}, "thresh = 'low' is not a number"),
        ({"model": {}, "hparams": {"size": float("nan")}}, "size = nan is not a whole number"),
        ({"model": {}, "hparams": {"sise": 96}}, "unknown key 'sise'; did you mean size"),
        ({"model": {}, "hparams": [1]}, "hparams is a list"),
        ({"model": {}, "scores": {"pages": {"a.jpg": "good"}}}, "'<=' not supported"),
        ({"model": {}, "scores": {"pages": {"a.jpg": float("nan")}}}, "scores are not within"),
        ({"model": {"w": torch.zeros(2, 2).to_sparse()}}, "more than the file"),
        ({"model": {}, "extra": {1, 2}}, "it holds a set"),
    ],
)
def test_hostile_fields_are_refused(tmp_path, wrong, why):
    torch.save({"hparams": {}, **wrong}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=f"not a checkpoint of train.py.*{re.escape(why)}"):
        load_checkpoint(tmp_path / "a.pt")


def test_bombs_are_refused(tmp_path):
    """Entries that unpack to more than the file, and lists that contain each other."""
    path, bomb = tmp_path / "a.pt", tmp_path / "bomb.pt"
    torch.save({"model": {"w": torch.zeros(2**22)}, "hparams": {}}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.namelist():
            out.writestr(entry, source.read(entry))
    assert bomb.stat().st_size < 2**18
    with pytest.raises(DataError, match="not a checkpoint"):
        load_checkpoint(bomb)
    nest = []
    for _ in range(40):
        nest = [nest, nest]
    torch.save({"model": {}, "hparams": {}, "nest": nest}, path)
    with pytest.raises(DataError, match="more than the file"):
        load_checkpoint(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a file"):
        load_checkpoint(tmp_path / "pipe")
