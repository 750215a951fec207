"""Speed of each part next to its peer in the same process.

python tests/by_hand/bench.py [PART ...] [--growth] [--device cuda]

One thread, medians of alternating rounds (a machine that changes its speed changes both), the
machine and versions first. Peers come from tests/requirements.txt; an absent one is named and
skipped. `--growth` adds how each part grows with words, page size or trials. `--device cuda`
measures inference and the training step on the GPU, at the sizes that users train: `step` ends
within nine minutes, its rows the most telling first, and says which it left out. `recipes` counts,
without a GPU, what each recipe of hparams/ will need on one.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.py

import contextlib
import functools
import gc
import gzip
import importlib
import itertools
import json
import math
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
from typing import NamedTuple
from unittest import mock

import cv2
import numpy as np
import shapely
import torch
import torch._dynamo.utils
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
import light
import pictures
import processes
import sweep
import synth
import train
from cleval import cleval
from command import Parser
from db_postprocess import polygons_from_map, rect_corners, shrink_distance
from dbnet import DBNet, db_loss
from engine import amp_dtype
from folding import load_network
from hparams import FIELDS, Hparams, read_hparams
from predict import Network, predict
from tune import score_page

DECODING = {"thresh": 0.3, "box_thresh": 0.3, "unclip_ratio": 1.6, "max_candidates": 1000}
DECODING["min_size"] = 3
WORDS = {10: (10, 1), 50: (25, 2), 120: (30, 4), 250: (42, 6), 500: (63, 8)}  # rows x columns
LOADER_NEED = 128 / 16  # pages/s a core: what a GPU is to take, from the cores beside it
STEP_SECONDS = 480  # of the rows of the training step; its floor, a minute, comes after them
H100 = 3.35e12, 989e12  # bytes/s and FLOP/s in bf16, of the data sheet

# of the estimates of what a recipe needs
PAGES = 3300
STEADY = 0.34  # of an H100's bandwidth that a step of eager operators is expected to reach
HOST_US = 10  # to queue an operator of forward or backward
RESERVE = 1.1  # what the allocator holds, as a multiple of what is in use
CONTEXT = 1.5  # GiB: CUDA, cuDNN and their workspaces
TRAINER = 3.0  # GiB of RAM of the trainer beside a GPU
LOADER = 0.15  # GiB of RAM of a loader process: .12 with photographs of 4000 px
CORES = 16


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


def common_targets(pyclipper, polygons, height, width, shrink_ratio=0.4):
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
    ours = partial(drawn_targets, quads, size)
    clipper = peer_module("pyclipper", "pyclipper")
    peer = clipper and partial(common_targets, clipper, quads, size, size)
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
        partial(score_page, item, grid, Hparams(max_candidates=600), "page"),
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
    processes.keep_memory()
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
        image = light.add_noise(image, rng, 4)
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


# ---------------------------------------------------------------- the training step

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


class Bench:
    """A trainer of train.py on random pages of any canvas (batch, H, W)."""

    def __init__(self, backbone, batch, device, **options):
        """options: hyperparameters."""
        hp = Hparams(backbone=backbone, pretrained="none", batch=batch, **options)
        self.trainer = train.Trainer(hp, device, train.RunPages([], [], {}, {}), {})
        self.trainer.train_mode()
        self.batches = {}

    def batch(self, shape):
        """Pages and maps on the device."""
        if shape not in self.batches:
            batch, height, width = shape
            quads = [quad * [width / 1024, height / 1024] for quad in page_of_lines()]
            maps = data.make_targets(quads, [False] * len(quads), height, width)
            maps = torch.from_numpy(maps).expand(batch, -1, -1, -1).contiguous()
            rng = np.random.default_rng(0)
            pages = torch.from_numpy(rng.integers(0, 255, (batch, height, width, 3), np.uint8))
            self.batches[shape] = [part.to(self.trainer.device) for part in (pages, maps)]
        return self.batches[shape]

    def steps(self, shape, count=1):
        """Take steps as train.py does: (last loss, ms until they were queued, ms until they were
        done)."""
        pages, maps = self.batch(shape)
        begin = time.perf_counter()
        for _ in range(count):
            losses = self.trainer.train_step(pages, maps, 1e-4, 1)
        queued = time.perf_counter() - begin
        loss = losses[0].item()
        return loss, 1e3 * queued, 1e3 * (time.perf_counter() - begin)


def step_rows(gpu):
    """Rows of the step's table, the most telling first: what is printed, the least seconds that it
    takes, batch x height x width, names of VARIANTS, hyperparameters."""
    square, receipts = ((8, 960, 960), (8, 960, 512)) if gpu else ((2, 160, 160), (2, 160, 96))
    both, loss = ("cudnn.benchmark", "1x1 products"), ("compiled loss",)
    return [
        (time_step, 25, square, (), {}),
        (time_step, 25, square, (), {"amp": "fp16"}),
        (time_canvases, 25, square, (), {}),
        (time_step, 40, square, both[:1], {}),
        (time_step, 25, square, both[1:], {}),
        (time_step, 40, square, both, {}),
        (profile_step, 30, square, (), {}),
        (time_step, 25, receipts, (), {}),
        (time_step, 25, square, (), {}),  # again: has the machine changed its speed?
        (time_step, 60, square, loss, {}),
        (time_step, 60, square, both + loss, {}),
        (time_canvases, 150, square, (), {"compile": True}),
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
    what a new canvas costs; and its floor, which needs no GPU."""
    device, end = torch.device(args.device), time.perf_counter() + STEP_SECONDS
    gpu, first, left_out = device.type == "cuda", None, []
    backbone = "efficientnet_b4" if gpu else "mobilenetv3_small_050"
    name = f"{device} {torch.cuda.get_device_name()}" if gpu else device
    amp = f"{amp_dtype('auto', device) or torch.float32}".removeprefix("torch.")
    print(f"training step of {backbone}, {amp}, {name}; ratios are to the first row")
    rates = measure_rates(device)
    signal.signal(signal.SIGALRM, out_of_time)
    for run, least, shape, variants, options in step_rows(gpu):
        label = row_label(run, shape, variants, options)
        if (left := end - time.perf_counter()) < least:
            left_out.append(label)
            continue
        release(gpu)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            with contextlib.ExitStack() as stack:
                for variant in variants:
                    stack.enter_context(VARIANTS[variant]())
                bench = Bench(backbone, shape[0], device, **options)
                ms = run(label, bench, shape, gpu, first)
            first = first or ms and (shape, ms)
        except Exception as error:  # noqa: BLE001 a row that fails is a finding, and others follow
            late = time.perf_counter() > end - 1  # whatever the compiler made of the alarm
            reason = "out of time" if late else f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"  {label:52s} failed: {reason[:150]}", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            bench = None  # before the next row's
    release(gpu)
    print(f"  left out, over {STEP_SECONDS} s: {'; '.join(left_out) or 'nothing'}", flush=True)
    print_floor("efficientnet_b4", [(8, 960, 960)], rates if gpu else H100)


def row_label(run, shape, variants, options):
    named = [*variants, *(f"{key}={value}" for key, value in options.items())]
    what = {profile_step: ", where its time goes", time_canvases: ", new canvases"}
    return f"{' x '.join(map(str, shape))} {', '.join(named) or 'eager'}{what.get(run, '')}"


def out_of_time(*_):
    raise TimeoutError("the part's time is over")


def release(gpu):
    """What a row held, so that the next one's memory is its own."""
    gc.collect()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_rates(device):
    """(bytes/s read and written by a copy, FLOP/s of a matrix product) of a device, printed."""
    gpu = device.type == "cuda"
    kind, side, count = (torch.bfloat16, 8192, 2**29) if gpu else (torch.float32, 256, 2**22)
    source = torch.empty(count, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device, dtype=kind)

    def timed(work):
        """Seconds of one of ten in a row."""

        def ten():
            for _ in range(10):
                work()
            if gpu:
                torch.cuda.synchronize()

        ten()
        return median_ms(ten, rounds=3)[0] / 1e4

    copied = 2 * source.nbytes / timed(lambda: target.copy_(source))
    multiplied = 2 * side**3 / timed(lambda: matrix @ matrix)
    product = f"{side} x {side} product in {str(kind).removeprefix('torch.')}"
    print(f"  copy {copied / 1e12:.3f} TB/s, {product} {multiplied / 1e12:.2f} TFLOP/s", flush=True)
    return copied, multiplied


def time_step(label, bench, shape, gpu, first):
    """Prints a row and returns its ms; steps are queued by tens as in training. The first loss of
    like rows is alike, or a variant computes something else. Where queueing a step takes the host
    as long as the step takes, the device waits for the host."""
    loss, _, start = bench.steps(shape)
    bench.steps(shape, 3)  # memory is found, and kernels are chosen
    count = 10 if gpu else 1
    times = [bench.steps(shape, count)[1:] for _ in range(3)]
    queued, ms = (statistics.median(kind) / count for kind in zip(*times))
    line = f"  {label:52s} {ms:8.1f} ms {1e3 * shape[0] / ms:7.1f} images/s"
    line += f" {first[1] / ms:5.2f} x" if first and first[0] == shape else " " * 8
    line += f"  queued in {queued:.1f} ms, first step {start / 1e3:.1f} s, loss {loss:.3f}"
    if gpu:
        peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        line += ", peak {:.1f} GiB, reserved {:.1f}".format(*(size / 2**30 for size in peak))
    print(line, flush=True)
    return ms


def time_canvases(label, bench, shape, gpu, first):
    """Prints what the first step on each of three canvases takes longer than the second one, and
    how many graphs were compiled for it."""
    batch, height, width = shape
    side = height // 64 * 32
    parts = []
    for canvas in (shape, (batch, height, side), (batch, side, width)):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        start, again = (bench.steps(canvas)[2] / 1e3 for _ in range(2))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        parts.append(f"{canvas[1]} x {canvas[2]} {start - again:.2f} s, {graphs} graphs")
    print(f"  {label}: {'; '.join(parts)}", flush=True)


def profile_step(label, bench, shape, gpu, first):
    """Prints what takes longest in a step: kernels on a GPU, each counted once (an operator's
    device time is that of its kernels), and the operators that start them."""
    bench.steps(shape, 4)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=kinds) as profiler:
        bench.steps(shape)
    if gpu:
        print_longest(f"{label}, kernels", *count_once(profiler.events(), DeviceType.CUDA))
        print_longest(f"{label}, operators", *device_time(profiler.key_averages()))
    else:
        print_longest(f"{label}, operators", *count_once(profiler.events(), DeviceType.CPU))


def print_longest(label, spent, calls):
    total = spent.total()
    print(f"  {label}: {total:.1f} ms in {calls.total()} of a step")
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


def device_time(averages):
    """(ms on the device, calls) by name of the operators of a profile's averages."""
    spent, calls = Counter(), Counter()
    for average in averages:
        if average.device_type == DeviceType.CPU and average.self_device_time_total:
            spent[average.key] = average.self_device_time_total / 1e3
            calls[average.key] = average.count
    return spent, calls


# ---------------------------------------------------------------- without a GPU


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


class Saved:
    """Bytes that operators keep for their backward, counted once a storage, without parameters."""

    def __init__(self, model):
        self.parameters = {id_of(parameter) for parameter in model.parameters()}
        self.storages = {}

    def keep(self, tensor):
        if id_of(tensor) not in self.parameters:
            self.storages[id_of(tensor)] = tensor.untyped_storage()  # kept, or its id might return
        return tensor

    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)


def id_of(tensor):
    return tensor.untyped_storage()._cdata


class Need(NamedTuple):
    """What a step needs."""

    traffic: Traffic
    saved: int  # bytes
    parameters: int


@functools.lru_cache
def count_step(backbone, neck, shape):
    """Need of a step in bf16, counted on tensors without content."""
    batch, height, width = shape
    with FakeTensorMode():
        model = DBNet(backbone, neck)
        pages = torch.empty(batch, height, width, 3, dtype=torch.uint8)
        maps = torch.empty(batch, 4, height, width, dtype=torch.uint8)
        saved = Saved(model)
        with Traffic() as traffic:
            with saved.hooks():
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(pages)
                loss = db_loss(logits, maps)[0]
            loss.backward()
    return Need(traffic, saved.bytes(), sum(p.numel() for p in model.parameters()))


def print_floor(backbone, shapes, rates):
    """What a step costs at the least where operators run one by one. rates: bytes/s, FLOP/s."""
    copied, multiplied = (rate / 1e12 for rate in rates)
    print(f"floor of a step of {backbone}, bf16, at {copied:.2f} TB/s and {multiplied:.0f} TFLOP/s")
    for shape in shapes:
        traffic = count_step(backbone, Hparams().neck, shape).traffic
        total, flops = traffic.bytes.total(), traffic.flops
        line = f"  {shape[0]} x {shape[1]} x {shape[2]}  {total / 1e9:6.1f} GB"
        line += f" {total / copied / 1e9:6.1f} ms  {flops / 1e12:5.2f} TFLOP"
        line += f" {flops / multiplied / 1e9:5.1f} ms"
        print(f"{line}  {traffic.calls.total()} operators")
    for name, size in traffic.bytes.most_common(8):
        calls = traffic.calls[name]
        print(f"    {size / 1e9:9.1f} GB {size / total:4.0%} {calls:5d} calls  {name}")


def photograph_shapes(count, seed=0):
    """Sizes (w, h) of photographs: half as phones take them, half cropped to a receipt."""
    rng = np.random.default_rng(seed)
    phone = rng.choice([4 / 3, 16 / 9, 3 / 4], count, p=[0.7, 0.2, 0.1])
    cropped = np.exp(rng.normal(np.log(1.9), 0.4, count)).clip(0.6, 4)
    ratios = np.sqrt(np.where(rng.random(count) < 0.5, phone, cropped))
    sides = 2000 * np.stack([1 / ratios, ratios], 1)
    return [tuple(size) for size in sides.round().astype(int).tolist()]


def run_canvases(hp, pages, step):
    """The canvas [H, W] of each step of a run."""
    epochs = range(hp.epochs)
    batches = [batch for epoch in epochs for batch in data.epoch_batches(pages, hp, epoch, step)]
    return [batch[0][2:] for batch in batches]


def pixels(canvases):
    return sum(height * width for height, width in canvases)


def bench_recipes(args):
    """What each recipe needs on an H100 with CORES cores, on PAGES pages of drawn shapes. What is
    kept for backward is counted, on the largest canvas; the rest is estimated from it."""
    shapes = photograph_shapes(PAGES)
    pages = [labels.Page(f"{i}", None, size=size) for i, size in enumerate(shapes)]
    print(f"{PAGES} pages; from GPU on, every column is an estimate")
    head = "recipe, parameters, largest batch, kept for backward, canvases in 32, on a GPU, padding"
    columns = [*head.split(", "), "GPU", "RAM", "disk", "an H100 takes"]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for path in sorted(Path(ROOT, "hparams").glob("*.json")):
        values = json.loads(path.read_text())
        if values.keys() <= FIELDS.keys():  # not a sweep's file, or its history
            hp = Hparams(**read_hparams(path))
            print(f"| `{path.name}` | {' | '.join(recipe_columns(hp, pages))} |", flush=True)


def recipe_columns(hp, pages):
    own_step = train.canvas_step(hp, torch.device("cuda"))
    fine, coarse = (run_canvases(hp, pages, step) for step in (32, own_step))
    height, width = max(coarse, key=math.prod)
    need = count_step(hp.backbone, hp.neck, (hp.batch, height, width))

    # weights, their average, Adam's moments, gradients
    gib = 2**30
    gpu = RESERVE * (need.saved + 5 * 4 * need.parameters) / gib + CONTEXT
    waiting = min(2 * gib, 4 * (CORES - 1) * hp.batch * hp.size**2 * 7) / gib
    ram = TRAINER + (CORES - 1) * LOADER + waiting
    disk = (2 * 4 + 1) * 4 * need.parameters / gib  # last.pt, prev.pt, best.pt

    # a step takes as long as its memory, on the mean canvas, or as the host that queues it
    share = pixels(coarse) / len(coarse) / (height * width)
    device = share * need.traffic.bytes.total() / (STEADY * H100[0])
    host = need.traffic.calls.total() * HOST_US / 1e6
    seconds = len(coarse) * max(device, host)
    return (
        f"{need.parameters / 1e6:.1f} M",
        f"{hp.batch} x {height} x {width}",
        f"{need.saved / gib:.1f} GiB",
        f"{len({*fine})}",
        f"{len({*coarse})}",
        f"{pixels(coarse) / pixels(fine) - 1:.1%}",
        f"{gpu:.0f} GiB",
        f"{ram:.0f} GiB",
        f"{disk:.2f} GiB",
        f"{seconds / 60:.0f} min, {len(coarse) * hp.batch / seconds:.0f} images/s",
    )


# ---------------------------------------------------------------- inference


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
    + (bench_optimiser, bench_samples, bench_loader, bench_inference, bench_step, bench_recipes)
}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="(all)")
    parser.add_argument("--growth", action="store_true", help="also other words, sizes, trials")
    parser.add_argument("--device", default="cpu", help="or cuda, for inference and step (cpu)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread"
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, np, cv2, shapely)]
    print(", ".join([machine, f"python {platform.python_version()}", *versions]))
    for part in args.parts or PARTS:
        try:
            PARTS[part](args)
        except ImportError as error:
            print(f"{part} is left out: {error}")


if __name__ == "__main__":
    main()
