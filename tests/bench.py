"""Speed of each part next to its peer in the same process, one thread: python tests/bench.py

Prints the machine, versions and for each part the median milliseconds of ours and the peer's and their ratio.
Peers come from tests/requirements.txt; an absent one is named and skipped. Rounds alternate between the two, so a
machine that changes its speed changes both.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import gzip
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyclipper
import shapely

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
from db_postprocess import polygons_from_map, rect_corners, shrink_distance
from evaluate import cleval

cv2.setNumThreads(1)
DECODING = dict(thresh=0.3, box_thresh=0.3, unclip_ratio=1.6, max_candidates=1000, min_size=3)


def compare(label, ours, peer=None, rounds=9):
    """Print medians of alternating rounds, the peer's and the ratio."""
    times = [], []
    for _ in range(rounds):
        for run, kept in zip((ours, peer), times):
            if run is not None:
                begin = time.perf_counter()
                run()
                kept.append(1e3 * (time.perf_counter() - begin))
    mine = statistics.median(times[0])
    line = f"{label:42s} {mine:8.2f} ms"
    if peer is not None:
        other = statistics.median(times[1])
        line += f"   peer {other:8.2f} ms   {other / mine:5.1f} times faster"
    print(line, flush=True)


def absent(label, package):
    print(f"{label:42s} {package} is not installed: pip install -r tests/requirements.txt")


def page_of_lines(size=1024, rows=30, columns=4, seed=0):
    """120 slightly turned quads on a page: list of [4, 2]."""
    rng = np.random.default_rng(seed)
    rects = [
        (
            130 + 250 * c + rng.uniform(-10, 10),
            20 + 33 * r,
            rng.uniform(80, 200),
            rng.uniform(18, 26),
            rng.uniform(-0.03, 0.03),
        )
        for r in range(rows)
        for c in range(columns)
    ]
    return list(rect_corners(np.array(rects)))


def probability_map(quads, size=1024):
    shrink = data.make_targets(quads, [False] * len(quads), size, size)[0]
    return cv2.GaussianBlur(shrink.astype(np.float32), (0, 0), 1.5)


# ---------------------------------------------------------------- targets


def common_targets(polygons, height, width, shrink_ratio=0.4):
    """The algorithm that most code bases share, re-stated: clip, fill, and distances to whole edges in numpy."""
    shrink, border = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    mask = np.zeros((height, width), np.float32)
    for polygon in polygons:
        area, length = data.polygon_area(polygon), data.polygon_perimeter(polygon)
        reach = shrink_distance(area, length, shrink_ratio)
        paths = []
        for sign in (-1, 1):
            clipper = pyclipper.PyclipperOffset()
            clipper.AddPath(
                polygon.astype(int).tolist(), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON
            )
            paths.append(np.array(clipper.Execute(sign * reach)[0]))
        cv2.fillPoly(shrink, [paths[0].astype(np.int32)], 1.0)
        cv2.fillPoly(mask, [paths[1].astype(np.int32)], 1.0)
        low, high = paths[1].min(0), paths[1].max(0)
        xs, ys = np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1))
        distances = [edge_distance(xs, ys, a, b) for a, b in zip(polygon, np.roll(polygon, -1, 0))]
        near = 1 - np.clip(np.min(distances, 0) / reach, 0, 1)
        y0, y1, x0, x1 = (
            max(low[1], 0),
            min(high[1] + 1, height),
            max(low[0], 0),
            min(high[0] + 1, width),
        )
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


def bench_targets():
    quads = page_of_lines()
    ignore = [False] * len(quads)
    compare(
        "targets, 1024 px, 120 quads",
        lambda: data.make_targets(quads, ignore, 1024, 1024),
        lambda: common_targets(quads, 1024, 1024),
    )


# ---------------------------------------------------------------- decoding


def bench_decoding():
    prob = probability_map(page_of_lines())
    peer = None
    try:
        from rapidocr_onnxruntime.ch_ppocr_det.utils import DBPostProcess

        process = DBPostProcess(thresh=0.3, box_thresh=0.3, max_candidates=1000, unclip_ratio=1.6)

        def peer():
            return process(prob[None, None], (1024, 1024))

    except ImportError:
        absent("decode, against RapidOCR's DBPostProcess", "rapidocr-onnxruntime")
    compare(
        "decode boxes, 1024 px, 120 lines",
        lambda: polygons_from_map(prob, **DECODING, mode="box"),
        peer,
    )
    compare(
        "decode polygons (peer: its boxes)",
        lambda: polygons_from_map(prob, **DECODING, mode="polygon"),
        peer,
    )


def print_round_trip():
    """Polygons -> targets -> polygons: mean IoU with the exact inverse of the shrink and with the default ratio."""
    quads = page_of_lines()
    shrink = data.make_targets(quads, [False] * len(quads), 1024, 1024)[0] * 255
    shapes = np.array([shapely.Polygon(q) for q in quads])
    for ratio, name in ((0, "0, the exact inverse"), (2.0, "2.0, the default")):
        found, _ = polygons_from_map(
            shrink, **{**DECODING, "thresh": 0.5, "unclip_ratio": ratio}, mode="polygon"
        )
        found = np.array([shapely.Polygon(f) for f in found])
        a, b = shapely.STRtree(found).query(shapes, "intersects")
        overlap = shapely.area(shapely.intersection(shapes[a], found[b]))
        iou = overlap / (shapely.area(shapes[a]) + shapely.area(found[b]) - overlap)
        best = [iou[a == k].max(initial=0) for k in range(len(quads))]
        print(
            f"round trip, unclip_ratio {name:22s} mean IoU {np.mean(best):.3f}, {len(found)} of {len(quads)} words"
        )


# ---------------------------------------------------------------- metric


def bench_cleval():
    with gzip.open(ROOT / "tests/data/cleval/golden.json.gz", "rt") as file:
        cases = [c for c in json.load(file)["cases"] if c["kind"] == "quad" and len(c["gt"]) >= 40]
    pages = [(c["gt"], c["det"], c["transcriptions"]) for c in cases[:12]]
    arrays = [
        ([np.array(p, float) for p in gt], [np.array(p, float) for p in det], texts)
        for gt, det, texts in pages
    ]
    label = f"CLEval, {len(pages)} pages of {np.mean([len(p[0]) for p in pages]):.0f} words"
    peer = None
    try:
        from cleval import CLEvalMetric

        def peer():
            for gt, det, texts in pages:
                metric = CLEvalMetric()
                flat = [np.array(boxes, np.float32).reshape(-1, 8) for boxes in (det, gt)]
                metric(*flat, det_letters=[""] * len(det), gt_letters=texts)

    except ImportError:
        absent(label, "cleval")
    compare(
        label,
        lambda: [cleval(g, d, texts=t, variant="official") for g, d, t in arrays],
        peer,
        rounds=5,
    )


def bench_samples():
    image, words = data.synthetic_page((0, 0), size=1280, words=117)
    polygons = [w["points"] for w in words]
    from train import Hparams

    hp = Hparams()

    def sample():
        rng = np.random.default_rng(0)
        matrix = data.draw_homography(rng, hp, image.shape[1], image.shape[0])
        warped, mapped, cut = data.warp_page(image, polygons, matrix, (hp.size, hp.size))
        warped = data.augment_colours(warped, rng, hp)
        data.make_targets(mapped, cut, hp.size, hp.size)

    compare("sample, 960 px, 117 words (no decoding)", sample)
    compare(
        "draw a synthetic receipt, 1280 px",
        lambda: data.synthetic_page((0, 1), size=1280, words=117),
        rounds=5,
    )


def main():
    versions = {
        p: importlib.metadata.version(p) for p in ("numpy", "opencv-python", "shapely", "pyclipper")
    }
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread, python {platform.python_version()}"
    )
    print(", ".join(f"{k} {v}" for k, v in versions.items()))
    bench_targets()
    bench_decoding()
    print_round_trip()
    bench_cleval()
    bench_samples()


if __name__ == "__main__":
    main()
