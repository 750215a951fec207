"""by_hand/bench.py: a variant computes what the step computes, and kernels count once."""

from types import SimpleNamespace

import bench
import torch
from torch.autograd import DeviceType


def test_products_are_the_convolutions():
    """Values and gradients; what is no plain 1 x 1 convolution is left alone, so is the class."""
    torch.manual_seed(0)
    convs = [torch.nn.Conv2d(8, 4, 1), torch.nn.Conv2d(8, 4, 1, bias=False)]
    convs += [torch.nn.Conv2d(8, 4, 1, stride=2), torch.nn.Conv2d(8, 8, 1, groups=2)]
    convs += [torch.nn.Conv2d(8, 4, 3, padding=1), torch.nn.Conv2d(8, 4, 1, padding=1)]
    page, plain = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last), []
    for conv in convs:
        leaf = page.clone().requires_grad_()
        expected = conv(leaf)
        expected.square().sum().backward()
        plain.append((expected, leaf.grad, conv.weight.grad.clone()))
        conv.zero_grad()
    before = torch.nn.Conv2d.forward
    with bench.products():
        for conv, expected in zip(convs, plain):
            leaf = page.clone().requires_grad_()
            out = conv(leaf)
            out.square().sum().backward()
            for a, b in zip((out, leaf.grad, conv.weight.grad), expected, strict=True):
                torch.testing.assert_close(a, b)
            assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.nn.Conv2d.forward is before


def event(name, device, start, end, children=(), note=False):
    span = SimpleNamespace(elapsed_us=lambda: end - start)
    kind = {"device_type": device, "is_user_annotation": note, "cpu_children": children}
    return SimpleNamespace(name=name, time_range=span, **kind)


def test_a_kernel_is_counted_once():
    inner = event("aten::add", DeviceType.CPU, 10, 40)
    events = [event("aten::conv", DeviceType.CPU, 0, 50, [inner]), inner]
    events += [event("gemm", DeviceType.CUDA, 20, 120), event("gemm", DeviceType.CUDA, 120, 220)]
    events += [event("Adam.step", DeviceType.CUDA, 0, 900, note=True)]
    spent, calls = bench.count_once(events, DeviceType.CUDA)
    assert spent == {"gemm": 0.2} and calls == {"gemm": 2}
    spent, calls = bench.count_once(events, DeviceType.CPU)
    assert spent == {"aten::conv": 0.02, "aten::add": 0.03} and calls.total() == 2
