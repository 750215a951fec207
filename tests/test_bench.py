"""by_hand/bench.py: a variant computes what the step computes, kernels count once, bytes as by
hand; by_hand/experiments.py: the rows that are asked for."""

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import bench
import experiments
import torch
from torch.autograd import DeviceType

import labels
from hparams import Hparams


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


def test_operators_are_listed_by_their_time_on_the_device():
    averages = [
        SimpleNamespace(key=key, device_type=kind, self_device_time_total=us, count=2)
        for key, kind, us in (
            ("aten::convolution", DeviceType.CPU, 0),
            ("aten::cudnn_convolution", DeviceType.CPU, 3000),
            ("gemm", DeviceType.CUDA, 3000),
        )
    ]
    spent, calls = bench.device_time(averages)
    assert spent == {"aten::cudnn_convolution": 3} and calls.total() == 2


def test_what_is_kept_for_backward_is_counted_as_by_hand():
    layers = torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
    model = torch.nn.Sequential(*layers)
    saved = bench.Saved(model)
    with saved.hooks():
        model(torch.rand(2, 3, 8, 8))
    pixels = 2 * 8 * 8
    statistics = 4 + 4  # mean and deviation of the batch; parameters are not counted
    running = 4 + 4
    floats = 3 * pixels + 4 * pixels + 4 * pixels + statistics + running
    assert saved.bytes() == 4 * floats


def test_a_step_s_row_has_its_time_and_a_new_canvas_its_graphs(monkeypatch, capsys):
    """On a CPU; a row that fails is named, and the next one comes."""
    rows = [
        (bench.time_step, 0, (1, 64, 64), (), {}),
        (bench.time_canvases, 0, (1, 64, 64), (), {}),
        (bench.time_step, 0, (1, 64, 64), (), {"backbone": "none"}),
        (bench.time_step, 1e9, (1, 64, 64), (), {"amp": "fp16"}),
    ]
    monkeypatch.setattr(bench, "step_rows", lambda gpu: rows)
    monkeypatch.setattr(bench, "print_floor", lambda *_: None)
    bench.bench_step(Namespace(device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert "TB/s, 256 x 256 product in float32" in lines[1]
    assert "1 x 64 x 64 eager " in lines[2] and "queued in " in lines[2]
    assert lines[3].startswith("  1 x 64 x 64 eager, new canvases: 64 x 64 ")
    assert lines[3].count(" s, 0 graphs") == 3
    assert "backbone=none" in lines[4] and "failed: " in lines[4]
    assert lines[-1] == "  left out, over 480 s: 1 x 64 x 64 amp=fp16"


def test_a_package_that_is_absent_is_named_and_the_next_part_comes(monkeypatch, capsys):
    def needs_a_package(args):
        raise ImportError("No module named 'x'")

    parts = {"metric": needs_a_package, "targets": lambda args: print("targets are there")}
    monkeypatch.setattr(bench, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    monkeypatch.setattr(bench.cv2, "setNumThreads", int)  # this process keeps its threads
    monkeypatch.setattr(torch, "set_num_threads", int)
    bench.main()
    first, *rest = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in first and f"cv2 {bench.cv2.__version__}" in first
    assert rest == ["metric is left out: No module named 'x'", "targets are there"]


def test_multiples_of_64_leave_fewer_canvases_of_photographs_for_little_padding():
    shapes = bench.photograph_shapes(bench.PAGES)
    pages = [labels.Page("", None, size=size) for size in shapes]
    hp = Hparams(fit="area", size=832, epochs=1)
    fine, coarse = (bench.run_canvases(hp, pages, step) for step in (32, 64))
    assert (len(fine), len({*fine}), len({*coarse})) == (413, 68, 54)
    assert 1 < bench.pixels(coarse) / bench.pixels(fine) < 1.01


# ---------------------------------------------------------------- experiments.py


def asked(rows):
    names = experiments.chosen_rows(rows)
    return Namespace(rows=names, data="d", lite2="w.pt", list=False, minutes=9)


def test_chosen_rows_need_no_drawn_pages_and_go_by_seed(work):
    commands = [command for _, _, command in experiments.steps(asked("run8,b4"))]
    names = [command.split("--name ")[1] for command in commands]
    assert names == [
        f"{name}-seed{seed} --seed {seed}" for seed in range(3) for name in ("run8", "b4")
    ]
    assert not any("synth" in command for command in commands)
    commands = [command for _, _, command in experiments.steps(asked("b4-synth"))]
    assert commands[0] == experiments.SYNTH and "--name synth-b4 " in commands[1]
    assert len(commands) == 5
    assert experiments.main(["d", "--rows", "run9"]) == 2


def test_the_table_is_written_after_each_training(work, monkeypatch, capsys):
    """A training that was stopped by the time ends the part; runs/table.txt is of those before."""
    tables = []

    def run(command, deadline):
        Path("runs").mkdir(exist_ok=True)
        return 143 if "run8-seed1" in command else 0

    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(
        experiments, "table", lambda data: tables.append(data) or [f"{len(tables)}"]
    )
    assert experiments.work(asked("run8,b4")) == 0
    assert Path("runs/table.txt").read_text() == "3\n"
    assert capsys.readouterr().out.startswith("runs/run8-seed1: stopped; call again")
