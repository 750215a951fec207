"""Speed of each part next to its peer in the same process.

python tests/by_hand/bench.py [PART ...] [--growth] [--device cuda]

One thread, medians of alternating rounds (a machine that changes its speed changes both), the
machine and versions first. Peers come from tests/requirements.txt; an absent one is named and
skipped. `--growth` adds how each part grows with words, page size or trials. `--device cuda`
measures inference and the training step on the GPU, at the sizes that users train: `step` ends
within nine minutes, its rows the most telling first, and says which it left out.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.py

import contextlib
import gc
import gzip
import importlib.metadata
import itertools
import json
import platform
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pyclipper
import shapely
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT

import augment
import data
import db_postprocess
import labels
import pictures
import sweep
import synth
import train
from cleval import cleval
from command import Parser
from db_postprocess import polygons_from_map, rect_corners, shrink_distance
from dbnet import DBNet, db_loss, load_network
from engine import amp_dtype
from hparams import Hparams
from predict import Network, predict
from tune import score_page

DECODING = {"thresh": 0.3, "box_thresh": 0.3, "unclip_ratio": 1.6, "max_candidates": 1000}
DECODING["min_size"] = 3
WORDS = {10: (10, 1), 50: (25, 2), 120: (30, 4), 250: (42, 6), 500: (63, 8)}  # rows x columns
LOADER_NEED = 128 / 16  # pages/s a core: what a GPU is to take, from the cores beside it
STEP_SECONDS = 480  # of the rows of the training step; its floor, a minute, comes after them


def median_ms(*runs, rounds=7):
    """Median milliseconds of each function, rounds alternating between them; None stays None."""
    times = [[] for _ in runs]
    for _ in range(rounds):
        for run, kept in zip(runs, times):
            if run is not None:
                begin = time.perf_counter()
                run()
                kept.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(kept) if kept else None for kept in times]


def compare(label, ours, peer=None, rounds=7):
    """One line: our median, the peer's and their ratio."""
    mine, other = median_ms(ours, peer, rounds=rounds)
    line = f"{label:46s} {mine:9.2f} ms"
    if peer is not None:
        line += f"   peer {other:9.2f} ms   {other / mine:6.1f} x"
    print(line, flush=True)


def peer_module(name, package):
    """The peer's module, or None with a line that says how to get it. A file of ours with its name
    stands aside meanwhile."""
    ours, path = sys.modules.pop(name, None), sys.path[:]
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != ROOT]
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"  no {package}, its column is left out: pip install -r tests/requirements.txt")
    finally:
        sys.path[:] = path
        sys.modules |= {name: ours} if ours else {}


def page_of_lines(size=1024, rows=30, columns=4, seed=0):
    """rows x columns slightly turned quads on a page: list of [4, 2]."""
    rng = np.random.default_rng(seed)
    wide, high = size / columns, size / rows
    rects = []
    for row, column in np.ndindex(rows, columns):
        x, width = wide * (column + 0.5 + rng.uniform(-0.04, 0.04)), wide * rng.uniform(0.3, 0.8)
        height, turn = min(high * rng.uniform(0.55, 0.78), 40), rng.uniform(-0.03, 0.03)
        rects.append((x, high * (row + 0.5), width, height, turn))
    return list(rect_corners(np.array(rects)))


def drawn_targets(quads, size):
    return data.make_targets(quads, [False] * len(quads), size, size)


def probability_map(quads, size=1024):
    return cv2.GaussianBlur(drawn_targets(quads, size)[0].astype(np.float32), (0, 0), 1.5)


def common_targets(polygons, height, width, shrink_ratio=0.4):
    """The algorithm that most code bases share, re-stated: clip, fill, and distances to whole
    edges in numpy."""
    shrink, border = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    mask = np.zeros((height, width), np.float32)
    for polygon in polygons:
        area, length = (
            db_postprocess.polygon_area(polygon),
            cv2.arcLength(np.float32(polygon), True),
        )
        reach = shrink_distance(area, length, shrink_ratio)
        paths = []
        for sign in (-1, 1):
            clipper = pyclipper.PyclipperOffset()
            path, closed = polygon.astype(int).tolist(), pyclipper.ET_CLOSEDPOLYGON
            clipper.AddPath(path, pyclipper.JT_ROUND, closed)
            paths.append(np.array(clipper.Execute(sign * reach)[0]))
        cv2.fillPoly(shrink, [paths[0].astype(np.int32)], 1.0)
        cv2.fillPoly(mask, [paths[1].astype(np.int32)], 1.0)
        low, high = paths[1].min(0), paths[1].max(0)
        xs, ys = np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1))
        distances = [edge_distance(xs, ys, a, b) for a, b in zip(polygon, np.roll(polygon, -1, 0))]
        near = 1 - np.clip(np.min(distances, 0) / reach, 0, 1)
        y0, y1 = max(low[1], 0), min(high[1] + 1, height)
        x0, x1 = max(low[0], 0), min(high[0] + 1, width)
        part = near[y0 - low[1] : y1 - low[1], x0 - low[0] : x1 - low[0]]
        border[y0:y1, x0:x1] = np.maximum(border[y0:y1, x0:x1], part)
    return shrink, border * 0.4 + 0.3, mask


def edge_distance(xs, ys, a, b):
    """By the law of cosines, as published code does."""
    to_a, to_b = (xs - a[0]) ** 2 + (ys - a[1]) ** 2, (xs - b[0]) ** 2 + (ys - b[1]) ** 2
    edge = ((a - b) ** 2).sum()
    cosine = (edge - to_a - to_b) / (2 * np.sqrt(to_a * to_b) + 1e-9)
    distance = np.sqrt(to_a * to_b * np.clip(1 - cosine**2, 0, None) / edge)
    return np.where(cosine < 0, np.minimum(np.sqrt(to_a), np.sqrt(to_b)), distance)


def bench_targets(args):
    for words in WORDS if args.growth else [120]:
        time_targets(page_of_lines(1024, *WORDS[words]), 1024, 7)
    for size in (512, 2048) if args.growth else []:
        time_targets([q * (size / 1024) for q in page_of_lines()], size, 3)


def time_targets(quads, size, rounds):
    ours, peer = partial(drawn_targets, quads, size), partial(common_targets, quads, size, size)
    compare(f"targets, {size} px, {len(quads)} quads", ours, peer, rounds)


def rapid_decoder():
    """RapidOCR's DB post-processing as a function of a map, or None."""
    utils = peer_module("rapidocr_onnxruntime.ch_ppocr_det.utils", "rapidocr-onnxruntime")
    if utils is None:
        return None
    process = utils.DBPostProcess(thresh=0.3, box_thresh=0.3, max_candidates=1000, unclip_ratio=1.6)
    return lambda prob: process(prob[None, None], prob.shape)


def bench_decode(args):
    rapid = rapid_decoder()
    cases = [(1024, words) for words in (WORDS if args.growth else [120])]
    for size, words in cases + ([(512, 120), (2048, 120)] if args.growth else []):
        quads = page_of_lines(size, *WORDS[words])
        prob = probability_map(quads, size)
        for mode in ("box", "polygon"):
            label = f"decode {mode}, {size} px, {len(quads)} lines (peer: boxes)"
            ours = partial(polygons_from_map, prob, **DECODING, mode=mode)
            compare(label, ours, rapid and partial(rapid, prob))
    print_round_trip()


def print_round_trip():
    """Polygons -> targets -> polygons: mean IoU with the exact inverse of the shrink and with the
    default ratio."""
    quads = page_of_lines()
    shrink = drawn_targets(quads, 1024)[0] * 255
    shapes = np.array([shapely.Polygon(q) for q in quads])
    for ratio, name in ((0, "0, the exact inverse"), (2.0, "2.0, the default")):
        how = {**DECODING, "thresh": 0.5, "unclip_ratio": ratio, "mode": "polygon"}
        found = np.array([shapely.Polygon(f) for f in polygons_from_map(shrink, **how)[0]])
        a, b = shapely.STRtree(found).query(shapes, "intersects")
        overlap = shapely.area(shapely.intersection(shapes[a], found[b]))
        iou = overlap / (shapely.area(shapes[a]) + shapely.area(found[b]) - overlap)
        mean = np.mean([iou[a == k].max(initial=0) for k in range(len(quads))])
        words = f"{len(found)} of {len(quads)} words"
        print(f"round trip, unclip_ratio {name:22s} mean IoU {mean:.3f}, {words}")


def bench_metric(args):
    with gzip.open(ROOT / "tests/data/cleval/golden.json.gz", "rt") as file:
        cases = [c for c in json.load(file)["cases"] if c["kind"] == "quad" and len(c["gt"]) >= 40]
    pages = [(as_quads(c["gt"]), as_quads(c["det"]), c["transcriptions"]) for c in cases[:12]]
    words = np.mean([len(p[0]) for p in pages])
    time_cleval(f"CLEval, {len(pages)} pages of {words:.0f} words", pages)
    for count in WORDS if args.growth else []:
        quads = page_of_lines(1024, *WORDS[count])
        found = [q + np.random.default_rng(0).normal(0, 1, 2) for q in quads]
        page = quads, found, ["words"] * len(quads)
        time_cleval(f"CLEval, a page of {len(quads)} words", [page])


def as_quads(polygons):
    return [np.array(polygon, float) for polygon in polygons]


def time_cleval(label, pages):
    """pages: (label quads, detected quads, transcriptions)."""
    package = peer_module("cleval", "cleval")

    def ours():
        for gt, det, texts in pages:
            cleval(gt, det, texts=texts, variant="official")

    def peer():
        for gt, det, texts in pages:
            flat = [np.array(boxes, np.float32).reshape(-1, 8) for boxes in (det, gt)]
            package.CLEvalMetric()(*flat, det_letters=[""] * len(det), gt_letters=texts)

    compare(label, ours, package and peer, 5)


def bench_thresholds(args):
    """245 settings on one page: all at once, one by one, and one by one with the peers."""
    for words in WORDS if args.growth else [50]:
        quads = page_of_lines(1024, *WORDS[words])
        prob, page = probability_map(quads), labels.Page("page", None, size=(1024, 1024))
        for quad in quads:
            page.add(len(page.ids), quad)
        item = ((prob * 255).astype(np.uint8), np.ones(2)), page
        for mode in ("box", "polygon"):
            time_thresholds(f"245 settings, {len(quads)} words, {mode}", item, quads, mode)


def time_thresholds(label, item, quads, mode):
    highest = {"thresh": 0.5, "box_thresh": 0.8}
    grid = {key: np.linspace(0.2, high, 7).round(3).tolist() for key, high in highest.items()}
    grid |= {"unclip_ratio": [0, 1.5, 1.7, 2.0, 2.2], "mode": [mode], "min_size": [3]}
    prob, labels = item[0][0], np.array(quads, np.float32).reshape(-1, 8)
    setting = {"thresh": 0.3, "box_thresh": 0.4, "unclip_ratio": 1.5, "max_candidates": 600}
    decoder, package = rapid_decoder(), peer_module("cleval", "cleval")

    def one():
        found, _ = polygons_from_map(prob, **setting, min_size=3, mode=mode)
        cleval(quads, found, variant="page")

    def peer():
        boxes = np.array(decoder(prob / np.float32(255))[0], np.float32).reshape(-1, 8)
        letters = {"det_letters": [""] * len(boxes), "gt_letters": ["words"] * len(labels)}
        package.CLEvalMetric()(boxes, labels, **letters)

    runs = (
        partial(score_page, item, grid, Hparams(max_candidates=600)),
        one,
        peer if decoder and package else None,
    )
    whole, single, other = median_ms(*runs, rounds=5)
    line = f"{label:46s} {whole:9.2f} ms   one by one {245 * single / whole:6.1f} x"
    print(line + (f"   peers {245 * other / whole:6.1f} x" if other else ""), flush=True)


def bench_optimiser(args):
    """The next of Hartmann-6's parameters given n runs, ours and Optuna's GPSampler."""
    names = [f"x{i}" for i in range(6)]
    ranges = {name: {"min": 0.0, "max": 1.0} for name in names}
    space = {"method": "bayes", "metric": {"name": "y", "goal": "minimize"}, "parameters": ranges}
    optuna = peer_module("optuna", "optuna")
    for n in (12, 30, 60, 120, 200) if args.growth else (60,):
        x = np.random.default_rng(n).random((n, 6))
        y = -np.exp(-4 * (x - 0.3) ** 2).prod(1)
        history = [
            {"params": dict(zip(names, map(float, p))), "value": float(v), "state": "finished"}
            for p, v in zip(x, y)
        ]
        ours = partial(suggest, space, history)
        peer = optuna and partial(ask_optuna, optuna, history, names)
        compare(f"suggestion after {n} runs, 6 parameters", ours, peer, 5)


def suggest(space, history):
    return sweep.suggest(space, history, np.random.default_rng(0))


def ask_optuna(optuna, history, names):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ranges = {name: optuna.distributions.FloatDistribution(0, 1) for name in names}
    with warnings.catch_warnings(action="ignore"):  # GPSampler is experimental and says so
        study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=0))
    for run in history:
        values = {"params": run["params"], "value": run["value"], "distributions": ranges}
        study.add_trial(optuna.trial.create_trial(**values))
    trial = study.ask()
    return [trial.suggest_float(name, 0, 1) for name in names]


def bench_samples(args):
    """A training sample step by step: what one core of the input pipeline delivers."""
    with tempfile.TemporaryDirectory() as folder:
        image, words = draw_receipt(0)
        path = Path(folder, "page.jpg")
        cv2.imwrite(str(path), image[..., ::-1])
        for size in (640, 960, 1280) if args.growth else [960]:
            time_sample(path, [w["points"] for w in words], Hparams(size=size))
    compare("draw a synthetic receipt, 1280 px", partial(draw_receipt, 1), rounds=5)


def draw_receipt(number):
    return synth.synthetic_page((0, number), size=1280, words=117)


def time_sample(path, polygons, hp):
    image = pictures.read_image(path)
    height, width = image.shape[:2]
    shape = (hp.size, -(-round(hp.size * width / height) // 32) * 32)
    rng = np.random.default_rng(0)
    matrix = augment.draw_homography(rng, hp, width, height, data.fit_factor((width, height), hp))
    warped, mapped, cut = augment.warp_page(image, polygons, matrix, shape)
    steps = {
        "decode": lambda: pictures.read_image(path),
        "warp": lambda: augment.warp_page(image, polygons, matrix, shape),
        "colours": lambda: augment.augment_colours(warped, np.random.default_rng(1), hp),
        "targets": lambda: data.make_targets(mapped, cut, *shape),
    }
    times = dict(zip(steps, median_ms(*steps.values())))
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())
    pace = f"{1e3 / sum(times.values()):.1f} pages/s a core"
    print(f"sample {shape[0]} x {shape[1]}, {len(polygons)} words: {parts} ms; {pace}")


def bench_loader(args):
    """Training samples of drawn receipts and of photographs of them, as one loader process makes
    them, on the square canvas and on the receipts' own; CPU time, since cores may be shared."""
    print(f"loader, pages/s a core; needed for 128 images/s from 16 cores: {LOADER_NEED:.1f}")
    for side in (1280, 4000):
        with tempfile.TemporaryDirectory() as folder:
            pages = [write_photograph(number, side, Path(folder)) for number in range(3)]
            time_loader(pages, side, Hparams(batch=1), Path(folder))


def write_photograph(number, side, folder):
    """A drawn receipt, its longer side `side`, with a sensor's noise where it is enlarged."""
    image, words = draw_receipt(number)
    factor, rng = side / max(image.shape[:2]), np.random.default_rng(number)
    if factor > 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        image = synth.add_noise(image, rng, 4)
    page = labels.Page(f"{number}.jpg", folder / f"{number}.jpg", size=image.shape[1::-1])
    for word in words:
        page.add(len(page.ids), word["points"] * factor)
    page.repaired = data.repair_words(page)
    cv2.imwrite(str(page.path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return page


def time_loader(pages, side, hp, folder):
    keys = [key for batch in data.epoch_batches(pages, hp, 0) for key in batch]
    square = [(epoch, i, hp.size, hp.size) for epoch, i, _, _ in keys]
    (folder / "cache").mkdir()
    kinds = {"": data.Receipts(pages, hp), ", --cache": data.Receipts(pages, hp, folder / "cache")}
    for canvas, own in ((f"{hp.size} x {hp.size}", square), ("receipts' own", keys)):
        times = {kind: [] for kind in kinds}
        for _ in range(4):
            for (kind, receipts), key in itertools.product(kinds.items(), own):
                begin = time.process_time()
                receipts[key]
                times[kind].append(time.process_time() - begin)
        for kind, kept in times.items():
            pace = 1 / statistics.mean(sorted(kept)[: -len(own)])  # but for a cold cache
            enough = "enough" if pace >= LOADER_NEED else "TOO FEW"
            print(f"  {side} px, {canvas + kind:24s} {pace:7.1f} pages/s  {enough}", flush=True)


# what might make the step faster, each to be shown before it earns its lines in train.py


@contextlib.contextmanager
def cudnn_benchmark():
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def products():
    """Convolutions 1 x 1 as matrix products on the channels-last view."""
    plain = nn.Conv2d.forward

    def forward(conv, x):
        shape = conv.kernel_size, conv.stride, conv.padding, conv.groups
        if shape != ((1, 1), (1, 1), (0, 0), 1):
            return plain(conv, x)
        out = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)
        return out.permute(0, 3, 1, 2)

    return mock.patch.object(nn.Conv2d, "forward", forward)


def compiled_loss():
    return mock.patch.object(train, "db_loss", torch.compile(db_loss))


VARIANTS = {"cudnn.benchmark": cudnn_benchmark, "1x1 products": products}
VARIANTS |= {"compiled loss": compiled_loss}


def training_step(backbone, shape, device, **options):
    """A function that takes `count` real steps of train.py on random pages [B, H, W], waits for
    them and returns the last loss. options: hyperparameters."""
    hp = Hparams(backbone=backbone, pretrained="none", batch=shape[0], **options)
    trainer = train.Trainer(hp, device)
    trainer.train_mode()
    batch, height, width = shape
    rng = np.random.default_rng(0)
    quads = [q * [width / 1024, height / 1024] for q in page_of_lines()]
    maps = data.make_targets(quads, [False] * len(quads), height, width)
    maps = torch.from_numpy(maps).expand(batch, -1, -1, -1).contiguous().to(device)
    pages = rng.integers(0, 255, (batch, height, width, 3), np.uint8)
    pages = torch.from_numpy(pages).to(device)

    def step(count=1):
        for _ in range(count):
            losses = trainer.train_step(pages, maps, 1e-4, 1)
        return losses[0].item()

    return step


class Traffic(TorchDispatchMode):
    """Counts what each operator that computes has to read and write, and the FLOPs of convolutions
    (torch's own counter takes a backward of groups for a dense one)."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls, self.flops = Counter(), Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function._schema.name
        if function.namespace == "aten" and not function.is_view and "detach" not in name:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t)]
            self.bytes[name] += sum(t.nbytes for t in tensors)
            self.calls[name] += 1
        if name == "aten::convolution":
            self.flops += conv_flops(out, args[0], args[1], args[6])
        elif name == "aten::convolution_backward":
            self.flops += sum(args[10][:2]) * conv_flops(args[0], args[1], args[2], args[7])
        return out


def conv_flops(out, image, weight, transposed):
    return 2 * (image if transposed else out).numel() * weight[0].numel()


def print_floor(backbone, shapes):
    """What a step costs at the least on an H100 whose operators run one by one: no GPU needed."""
    print(f"floor of a step of {backbone}, bf16, at 3.35 TB/s and 989 TFLOP/s")
    for shape in shapes:
        with FakeTensorMode():
            model = DBNet(backbone, Hparams().neck)
            pages = torch.empty(*shape, 3, dtype=torch.uint8)
            maps = torch.empty(shape[0], 4, *shape[1:], dtype=torch.uint8)
            with Traffic() as traffic:
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(pages)
                db_loss(logits, maps)[0].backward()
        total, flops = sum(traffic.bytes.values()), traffic.flops
        line = f"  {shape[0]} x {shape[1]} x {shape[2]}  {total / 1e9:6.1f} GB"
        line += f" {total / 3.35e9:6.1f} ms  {flops / 1e12:5.2f} TFLOP {flops / 989e9:5.1f} ms"
        print(f"{line}  {sum(traffic.calls.values())} operators")
    for name, size in traffic.bytes.most_common(8):
        calls = traffic.calls[name]
        print(f"    {size / 1e9:9.1f} GB {size / total:4.0%} {calls:5d} calls  {name}")


def step_rows(gpu):
    """Rows of the step's table, the most telling first: what is printed, the least seconds that it
    takes, batch x height x width, names of VARIANTS, hyperparameters."""
    square, receipts = ((8, 960, 960), (8, 960, 512)) if gpu else ((2, 160, 160), (2, 160, 96))
    both, loss = ("cudnn.benchmark", "1x1 products"), ("compiled loss",)
    return [
        (time_step, 25, square, (), {}),
        (time_step, 40, square, both[:1], {}),
        (time_step, 25, square, both[1:], {}),
        (time_step, 40, square, both, {}),
        (time_step, 60, square, loss, {}),
        (time_step, 60, square, both + loss, {}),
        (profile_step, 30, square, (), {}),
        (time_step, 25, receipts, (), {}),
        (time_step, 25, square, (), {}),  # again: has the machine changed its speed?
        (time_step, 150, square, (), {"compile": True}),
        (profile_step, 30, square, both, {}),
        (time_step, 40, receipts, both + loss, {}),
        (time_step, 40, (2 * square[0], *square[1:]), both, {}),
        (time_step, 25, receipts, (), {"amp": "off"}),
        (time_step, 40, (4 * square[0], *square[1:]), both, {}),
        (time_step, 150, square, both, {"compile": True}),
    ]


def bench_step(args):
    """Images/s of the training step, plain and with what might make it faster; where its time goes;
    and its floor, which needs no GPU."""
    device, end = torch.device(args.device), time.perf_counter() + STEP_SECONDS
    gpu, first, left_out = device.type == "cuda", None, []
    backbone = "efficientnet_b4" if gpu else "mobilenetv3_small_050"
    name = f"{device} {torch.cuda.get_device_name()}" if gpu else device
    amp = f"{amp_dtype('auto', device) or torch.float32}".removeprefix("torch.")
    print(f"training step of {backbone}, {amp}, {name}; ratios are to the first row")
    signal.signal(signal.SIGALRM, out_of_time)
    for run, least, shape, variants, options in step_rows(gpu):
        named = [*variants, *(f"{key}={value}" for key, value in options.items())]
        label = f"{' x '.join(map(str, shape))} {', '.join(named) or 'eager'}"
        if (left := end - time.perf_counter()) < least:
            left_out.append(label + ", its kernels" * (run is profile_step))
            continue
        release(gpu)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            with contextlib.ExitStack() as stack:
                for variant in variants:
                    stack.enter_context(VARIANTS[variant]())
                step = training_step(backbone, shape, device, **options)
                ms = run(label, step, shape, gpu, first)
            first = first or ms and (shape, ms)
        except Exception as error:  # noqa: BLE001 a row that fails is a finding, and others follow
            late = time.perf_counter() > end - 1  # whatever the compiler made of the alarm
            reason = "out of time" if late else f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"  {label:52s} failed: {reason[:150]}", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            step = None  # and its trainer, before the next row's
    release(gpu)
    print(f"  left out, over {STEP_SECONDS} s: {'; '.join(left_out) or 'nothing'}", flush=True)
    print_floor("efficientnet_b4", [(8, 960, 960)])


def out_of_time(*_):
    raise TimeoutError("the part's time is over")


def release(gpu):
    """What a row held, so that the next one's memory is its own."""
    gc.collect()
    torch.compiler.reset()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_step(label, step, shape, gpu, first):
    """Prints a row and returns its ms; steps are queued by tens as in training. The first loss of
    like rows is alike, or a variant computes something else."""
    begin = time.perf_counter()
    loss = step()
    start, count = time.perf_counter() - begin, 10 if gpu else 1
    step(3)  # memory is found, and kernels are chosen
    ms = median_ms(partial(step, count), rounds=3)[0] / count
    line = f"  {label:52s} {ms:8.1f} ms {1e3 * shape[0] / ms:7.1f} images/s"
    line += f" {first[1] / ms:5.2f} x" if first and first[0] == shape else " " * 8
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if gpu else ""
    print(f"{line}  first step {start:.0f} s, loss {loss:.3f}{peak}", flush=True)
    return ms


def profile_step(label, step, shape, gpu, first):
    """Prints what takes longest in a step: kernels on a GPU, each counted once (an operator's
    device time is that of its kernels), operators on a CPU."""
    step(4)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=kinds) as profiler:
        step()
    spent, calls = count_once(profiler.events(), DeviceType.CUDA if gpu else DeviceType.CPU)
    total = spent.total()
    kind = "kernels" if gpu else "operators"
    print(f"  {label}: {total:.1f} ms in {calls.total()} {kind} of a step")
    for name, ms in spent.most_common(12):
        print(f"    {ms:9.1f} ms {ms / total:4.0%} {calls[name]:5d} calls  {name[:90]}", flush=True)


def count_once(events, device):
    """(ms, calls) by name of a profile's events that ran on a device, without those inside them and
    without the spans that annotate others."""
    spent, calls = Counter(), Counter()
    for event in events:
        if event.device_type == device and not event.is_user_annotation:
            inner = sum(e.time_range.elapsed_us() for e in event.cpu_children)
            spent[event.name] += (event.time_range.elapsed_us() - inner) / 1e3
            calls[event.name] += 1
    return spent, calls


def bench_inference(args):
    """Pictures to polygons, files included: networks of random weights, the weights that ship with
    their batch norms apart, folded and in bf16, RapidOCR's detector."""
    device, threads = torch.device(args.device), min(2, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    engine = peer_module("rapidocr_onnxruntime", "rapidocr-onnxruntime")

    def predict_all(network):
        return list(predict(network, pages, device, lambda page, found: found))

    with tempfile.TemporaryDirectory() as folder:
        pages = [labels.Page(f"{i}.jpg", Path(folder, f"{i}.jpg")) for i in range(4)]
        for i, page in enumerate(pages):
            cv2.imwrite(str(page.path), draw_receipt(i)[0][..., ::-1])
        print(f"inference, 4 synthetic pages of 1280 px, {device}, {threads} threads on a CPU")
        for backbone, neck in (("efficientnet_b4", 256), ("tf_efficientnet_lite2", 96)):
            model = DBNet(backbone, neck).to(device, memory_format=torch.channels_last).eval()
            for size in (640, 960):
                run = partial(predict_all, Network(model, Hparams(size=size)))
                rate(f"{backbone}, neck {neck}, {size} px", run)
        folded, hp, state = load_network(ROOT / "weights/receipts-lite2.pt", device)
        apart = DBNet(hp.backbone, hp.neck)
        apart.load_state_dict(state["model"])
        apart = apart.to(device, memory_format=torch.channels_last).eval()
        for label, model, amp in (
            ("batch norms apart", apart, "off"),
            ("folded", folded, "off"),
            ("folded, bf16", folded, "bf16"),
        ):
            run = partial(predict_all, Network(model, replace(hp, amp=amp)))
            rate(f"weights/receipts-lite2.pt, {label}", run)
        if engine:
            detect = engine.RapidOCR(intra_op_num_threads=threads)
            only = {"use_det": True, "use_cls": False, "use_rec": False}

            def detect_all():
                return [detect(str(page.path), **only) for page in pages]

            rate("RapidOCR 1.4.4, PP-OCRv4 mobile, CPU", detect_all)
    torch.set_num_threads(1)


def rate(label, run):
    run()
    (ms,) = median_ms(run, rounds=3)
    print(f"  {label:44s} {4e3 / ms:8.2f} images/s", flush=True)


PARTS = {
    part.__name__.removeprefix("bench_"): part
    for part in (bench_targets, bench_decode, bench_metric, bench_thresholds)
    + (bench_optimiser, bench_samples, bench_loader, bench_inference, bench_step)
}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="(all)")
    parser.add_argument("--growth", action="store_true", help="also other words, sizes, trials")
    parser.add_argument("--device", default="cpu", help="or cuda, for inference and step (cpu)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    packages = ("torch", "numpy", "opencv-python", "shapely", "pyclipper")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread"
    versions = [f"{p} {importlib.metadata.version(p)}" for p in packages]
    print(", ".join([machine, f"python {platform.python_version()}", *versions]))
    for part in args.parts or PARTS:
        PARTS[part](args)


if __name__ == "__main__":
    main()
