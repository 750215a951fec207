"""How good is a detector: CLEval and IoU metrics, prediction, intervals, pictures.

python evaluate.py runs/x/best.pt                score a checkpoint on what its run validated on
python evaluate.py runs/x/best.pt --data DATA    on labelled pages; flags override its thresholds
python evaluate.py predictions.json --data DATA  any detector's output, in the competition's JSON
python evaluate.py a.pt --compare b.pt           paired difference with its interval
python evaluate.py best.pt --images DIR --pictures OUT --out predictions.json
python evaluate.py runs/x-fold*/best.pt --tune --write tuned.json

`hmean` is the receipt competition's CLEval (mean over pages); official CLEval (micro) and IoU 0.5
are named as such.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import os
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

import data
from cleval import (
    MAX_DETECTIONS,
    METRICS,
    as_points,
    bootstrap_groups,
    count_kept,
    iou_matches,
    micro_scores,
    min_area_sides,
    page_pairs,
    page_row,
    paired_difference,
    prepare_labels,
    summarise,
)
from db_postprocess import DECODING, MODES, decode_page
from dbnet import NetworkError, load_checkpoint, load_network, save_checkpoint
from files import DataError, Parser, read_json, replace_file, write_json
from labels import PICTURES, SPLITS, Page, has_split, load_labels, pages_to_json, read_competition
from report import LEVELS, SCORES_PAGE, binned, html_bars, html_curves, html_table
from tune import GRID, TUNED, draw_landscape, halves, print_tuning, tune

# ---------------------------------------------------------------- prediction


def amp_dtype(amp, device):
    """Type to compute in, or None for float32: `auto` is bf16 where the GPU has it, else fp16; CPUs
    use float32."""
    if device.type != "cuda" or amp == "off":
        return None
    if amp == "auto":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def ahead(pool, function, items, count):
    """function(item) of each item in order, computed on a pool at most `count` items ahead."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Sheet(NamedTuple):
    """A page on its way through the network."""

    index: int
    prob: np.ndarray  # uint8 [H', W'] that grows tile by tile, H' and W' multiples of 32
    shape: tuple  # its rows and columns without padding
    scale: np.ndarray  # [2] page xy = map xy / scale
    tiles: list  # (y, x, picture uint8 [h, w, 3]) to predict, then those not back yet


def load_sheet(index, path, size, tile):
    """Sheet of a picture at longer side `size`; where that is more than `tile` > 0 page pixels, at
    `size` map pixels for `tile` page pixels, in windows of `size` that overlap by a quarter.
    Raises DataError."""
    image = data.read_image(path)
    height, width = image.shape[:2]
    enlarge = max(1, max(height, width) / tile) if tile else 1
    if height * width * (size * enlarge / max(height, width)) ** 2 > data.MAX_PIXELS:
        limit = f"over {data.MAX_PIXELS >> 20} M pixels; use a larger --tile or a smaller --size"
        raise DataError(f"{path}: tiles of {tile} px at --size {size} enlarge it to {limit}")
    image, scale = data.resize_page(image, round(size * enlarge))
    window = -(-size // 32) * 32

    def starts(length):
        spare, stride = max(length - window, 0), window * 3 // 4
        return [min(start, spare) for start in range(0, spare + stride, stride)]

    corners = [(y, x) for y in starts(image.shape[0]) for x in starts(image.shape[1])]
    tiles = [(y, x, image[y : y + window, x : x + window]) for y, x in corners]
    shape = round(height * scale[1]), round(width * scale[0])
    return Sheet(index, np.empty(image.shape[:2], np.uint8), shape, scale, tiles)


def paste(sheet, tile, prob):
    """Put a tile's map [h, w] into its sheet, from the middle of its overlap with those before."""
    (y, x, _), (h, w) = tile, prob.shape
    top, left = h // 8 * (y > 0), w // 8 * (x > 0)
    sheet.prob[y + top : y + h, x + left : x + w] = prob[top:, left:]
    sheet.tiles.remove(tile)


def batches(sheets, batch):
    """Tiles of sheets, those of one shape together: lists of at most `batch` (sheet, tile). None
    waits for more than 128 pages."""
    queues = {}
    for sheet in sheets:
        for tile in list(sheet.tiles):
            queue = queues.setdefault(tile[2].shape, [])
            queue.append((sheet, tile))
            if len(queue) == batch:
                yield queues.pop(tile[2].shape)
        if sheet.index % 128 == 127:
            yield from queues.values()
            queues = {}
    yield from queues.values()


@torch.no_grad()
def launch(model, tiles, dtype, device):
    """Start the network on a batch of (sheet, tile): uint8 maps [B, h, w] on the CPU, and the event
    after which they are there (None: now)."""
    pages = torch.from_numpy(np.stack([picture for _, (_, _, picture) in tiles]))
    pages = pages.pin_memory() if device.type == "cuda" else pages
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = model(pages.to(device, non_blocking=True))  # [B, 1, H, W]
    maps = (logits[:, 0].float().sigmoid() * 255).round().to(torch.uint8)
    maps, event = maps.to("cpu", non_blocking=True), None
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))  # of this GPU, current or not
    return maps, event


def predict_maps(model, pages, size, amp, device, tile=0, failed=None):
    """
    Probability maps of pages, nearly in their order: yields (index, uint8 [h, w], scale).
    Each page is resized so that its longer side is `size` (data.resize_page; tile: see load_sheet);
    pages of one padded shape share a batch on a GPU, so none sees padding that it would not have
    alone. page xy = map xy / scale. The next batch is at work before the last one is waited for.
    Pages that cannot be read raise DataError or, with a dict `failed`, enter it as {index: error}.
    """
    dtype, cuda = amp_dtype(amp, device), device.type == "cuda"

    def load(i):
        try:
            return load_sheet(i, pages[i].path, size, tile)
        except DataError as error:
            if failed is None:
                raise
            failed[i] = error

    def fetch(tiles, maps, event):
        if event is not None:
            event.synchronize()
        for (sheet, tile), prob in zip(tiles, maps.numpy()):
            paste(sheet, tile, prob)
            if not sheet.tiles:
                yield sheet.index, sheet.prob[: sheet.shape[0], : sheet.shape[1]], sheet.scale

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        flying = None
        sheets = ahead(pool, load, range(len(pages)), 4 if tile else 32)
        for tiles in batches(filter(None, sheets), 8 if cuda else 1):
            started = tiles, *launch(model, tiles, dtype, device)
            if flying:
                yield from fetch(*flying)
            flying = started
        if flying:
            yield from fetch(*flying)


def predict_each(model, pages, hp, device, job=None, progress=False, tile=0, failed=None):
    """
    What the network finds on pages, in their order: yields (index, found), found = (polygons
    [P, 2] in page px, scores [N]), or (index, job(page, found)). Decoding and job run in threads
    beside the network; at most some 200 pages are under way at a time, whatever their number.
    hp: dict with size, amp and the decoding's keys; tile, failed: see predict_maps. Sets page.size.
    """
    waiting, turn, skipped = {}, 0, {} if failed is None else failed

    def work(page, prob, scale):
        page_size = np.array(prob.shape[::-1]) / scale
        page.size = tuple(np.rint(page_size).astype(int).tolist())
        found = decode_page(prob, scale, page_size, SimpleNamespace(**hp))
        return job(page, found) if job else found

    def finished(limit):
        nonlocal turn
        while turn in skipped or turn in waiting and (len(waiting) > limit or waiting[turn].done()):
            if turn not in skipped:
                yield turn, waiting.pop(turn).result()
            turn += 1

    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # shapes vary
    hidden = not (progress and sys.stderr.isatty())
    bar = tqdm(total=len(pages), desc="predicting", unit=" pages", leave=False, disable=hidden)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:
            maps = predict_maps(model, pages, hp["size"], hp["amp"], device, tile, failed)
            for i, prob, scale in maps:
                waiting[i] = pool.submit(work, pages[i], prob, scale)
                bar.update()
                yield from finished(64)
            yield from finished(0)
    finally:
        torch.backends.cudnn.benchmark = benchmark


def predict(model, pages, hp, device, job=None, **options):
    """predict_each of all pages as a list, None where one could not be read."""
    found = dict(predict_each(model, pages, hp, device, job, **options))
    return [found.get(i) for i in range(len(pages))]


# ---------------------------------------------------------------- pictures

COLOURS = {"label": (60, 90, 255), "hit": (0, 150, 0), "miss": (230, 0, 0)}
COLOURS["false alarm"] = (255, 120, 0)


def draw_page(page, polygons, side=1400):
    """A page with its labels (thin blue), hits (green), misses (red) and false alarms (orange),
    matched at IoU 0.5, or with what was found (green) where labels are not known (None): uint8 RGB
    [H, W, 3], the longer side at least `side`, and a strip on top that counts them."""
    image = data.read_image(page.path)
    zoom = max(1.0, side / max(image.shape[:2]))
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    image = cv2.addWeighted(image, 0.75, np.full_like(image, 255), 0.25, 0)
    labels, ignore = page.polygons or [], page.ignore
    pairs, valid = iou_matches(labels, polygons, ignore)
    if page.polygons is None:
        pairs, valid = [(-1, m) for m in range(len(polygons))], valid & False
    hit_labels, hits = {n for n, _ in pairs}, {m for _, m in pairs}
    lost = [n for n in range(len(labels)) if n not in hit_labels and not ignore[n]]
    known = [n for n in range(len(labels)) if n in hit_labels or ignore[n]]
    alarms = [m for m in range(len(polygons)) if m not in hits and valid[m]]
    layers = (
        ("hit", 2, [polygons[m] for m in sorted(hits)]),
        ("label", 1, [labels[n] for n in known]),
        ("false alarm", 2, [polygons[m] for m in alarms]),
        ("miss", 2, [labels[n] for n in lost]),
    )
    for kind, thickness, outlines in layers:
        outlines = [np.round(p * zoom).astype(np.int32) for p in outlines]
        cv2.polylines(image, outlines, True, COLOURS[kind], thickness, cv2.LINE_AA)
    strip, x = np.full((40, image.shape[1], 3), 255, np.uint8), 8
    small, font = min(1.0, image.shape[1] / 640), cv2.FONT_HERSHEY_SIMPLEX
    for kind, _, outlines in (layers[0], *layers[2:]) if page.polygons is not None else layers[:1]:
        plural = "" if len(outlines) == 1 else "es" if kind == "miss" else "s"
        text, colour = f"{len(outlines)} {kind}{plural}", COLOURS[kind]
        text = text if page.polygons is not None else f"{len(outlines)} found"
        cv2.putText(strip, text, (x, 28), font, 0.8 * small, colour, 2, cv2.LINE_AA)
        x += round((16 * len(text) + 20) * small)
    return np.concatenate([strip, image])


def picture_file(page, folder):
    """Where a page is drawn: folder/NAME, with .jpg added unless it is one (a.jpg, a.png.jpg)."""
    jpeg = page.name.lower().endswith((".jpg", ".jpeg"))
    return Path(folder, page.name if jpeg else f"{page.name}.jpg")


def draw_picture(page, polygons, folder):
    """Write a page as a JPEG into a folder, see `draw_page`, `picture_file`."""
    file = picture_file(page, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    sharp = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    replace_file(file, cv2.imencode(".jpg", draw_page(page, polygons)[..., ::-1], sharp)[1])


def draw_pictures(pages, found, folder):
    """draw_picture of each page."""
    items = list(zip(pages, (polygons for polygons, _ in found)))
    data.map_threads(lambda item: draw_picture(*item, folder), items, "drawing pages")


# ---------------------------------------------------------------- threshold tuning


def picture_digest(page):
    return hashlib.sha256(Path(page.path).read_bytes()).hexdigest()


def cached_maps(source, pages, hp, device):
    """
    Maps of a checkpoint on pages: list of (uint8 [h, w], scale [2]), in the order of pages.
    Kept in maps/ beside the checkpoint under a name made of the SHA-256 of the checkpoint, of the
    pictures and of what else the maps depend on: another of these never meets an old file.
    """
    made_of = [hashlib.sha256(Path(source).read_bytes()).hexdigest(), hp["size"]]
    made_of += [str(amp_dtype(hp["amp"], device)), [(p.name, picture_digest(p)) for p in pages]]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path = Path(source).parent / "maps" / f"{Path(source).stem}-{key}.npz"
    if path.exists():
        try:
            with np.load(path) as file:
                return [(file[str(i)], scale) for i, scale in enumerate(file["scales"])]
        except Exception:  # zipfile and numpy raise whatever the damaged bytes lead to
            print(f"warning: {path}: damaged, predicting again", file=sys.stderr)
    model = load_network(source, device)[0]
    maps = [None] * len(pages)
    bar = tqdm(total=len(pages), desc=source, leave=False, disable=not sys.stderr.isatty())
    with bar:
        for i, prob, scale in predict_maps(model, pages, hp["size"], hp["amp"], device):
            maps[i] = np.ascontiguousarray(prob), scale
            bar.update()
    arrays = {str(i): prob for i, (prob, _) in enumerate(maps)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, scales=np.array([scale for _, scale in maps]), **arrays)
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, buffer.getbuffer())
    except OSError as error:  # others' runs may be read-only
        print(f"warning: {path}: maps are not kept ({error.strerror})", file=sys.stderr)
    return maps


def held_out_pages(sources, folder=None, image_dir=None):
    """
    Pages that each of several fold runs held out, by the record in its checkpoint: a list of lists.
    folder: where the data lie now, if not where the runs found them
    raises DataError when the runs are not different folds of one split or the pages are not there.
    """
    states = [load_checkpoint(source, ("model", "hparams", "scores")) for source in sources]
    first, labels, owner, parts = states[0]["hparams"], None, {}, []
    for source, state in zip(sources, states):
        hp = state["hparams"]
        for key in ("data", "image_dir", "folds", "split", "size", "shrink_ratio"):
            if hp.get(key) != first.get(key):
                both = f"{key} is {hp.get(key)!r}, in {sources[0]} {first.get(key)!r}"
                raise DataError(f"{source}: {both}; tuning needs folds of one split")
        if not hp["folds"]:
            raise DataError(f"{source}: not a fold run; tune one checkpoint or the folds")
        if labels is None:
            folder = data.resolve_data(folder or hp["data"])
            found = load_labels(folder, "train", image_dir or hp["image_dir"] or None)
            labels = {page.name: page for page in found}
        held = sorted(state["scores"].get("pages", ()))
        for name in held:
            if name not in labels:
                raise DataError(f"{source}: its held-out page {name} is not in the data")
            if owner.setdefault(name, source) != source:
                both = f"page {name} is held out by {owner[name]} too"
                raise DataError(f"{source}: {both}; give one run a fold")
        if not held:
            raise DataError(f"{source}: no record of held-out pages; let an epoch finish")
        parts.append([labels[name] for name in held])
    return parts


def check_target(path, sources):
    """Raises DataError when --write cannot put values into path."""
    path = Path(path)
    if path.suffix not in (".pt", ".json"):
        raise DataError(f"--write {path}: give a .pt or a .json file")
    if path.suffix == ".pt" and (len(sources) > 1 or path.exists()):
        raise DataError(f"--write {path}: give a new file, .json for several checkpoints")


def write_setting(path, sources, values):
    """Put values into a copy of the checkpoint (.pt) or an hparams file (.json), new or not."""
    check_target(path, sources)
    if Path(path).suffix == ".pt":
        state = load_checkpoint(sources[0])
        save_checkpoint(path, {**state, "hparams": {**state["hparams"], **values}})
        return
    if Path(path).exists():
        hp = read_json(path)
    else:
        hp = load_checkpoint(sources[0])["hparams"]
        own = ("name", "folds", "fold", "split", "stop_epoch", "workers", "init")
        hp = {key: hp[key] for key in hp if key not in own}
    write_json(path, {**hp, **values}, indent=1)


def run_tune(args, overrides):
    """evaluate.py --tune. Raises DataError, NetworkError."""
    for source in args.sources:
        if source.endswith(".json"):
            raise DataError(f"{source}: has no maps to tune on; give checkpoints")
    if args.write:
        check_target(args.write, args.sources)
    hp = {**load_checkpoint(args.sources[0])["hparams"], **overrides}
    if len(args.sources) > 1:
        page_lists = held_out_pages(args.sources, args.data, args.image_dir)
    else:
        page_lists = [choose_pages(args)]
    pages = [page for page_list in page_lists for page in page_list]
    for source, page_list in zip(args.sources, page_lists):
        warn_of_leaks(source, page_list)
    if not any(page.polygons for page in pages):
        raise DataError("--tune: the pages have no labels")
    parts = np.repeat(range(len(page_lists)), [len(page_list) for page_list in page_lists])
    if len(page_lists) == 1:
        parts = halves(bootstrap_groups(pages))
    maps = [
        one
        for source, page_list in zip(args.sources, page_lists)
        for one in cached_maps(source, page_list, hp, args.device)
    ]
    grid = {key: (overrides[key],) if key in overrides else GRID[key] for key in TUNED}
    result, table = tune(maps, pages, parts, grid, SimpleNamespace(**hp))
    chosen = {key: result["recommended"][key] for key in TUNED}
    picture = Path(args.sources[0]).parent / "tune.png"
    if args.json:
        print(json.dumps(result))
    else:
        print_tuning(result)
        print(f"{len(pages)} pages, cross-fitted over {len(set(parts.tolist()))} parts; {picture}")
    if args.write:
        write_setting(args.write, args.sources, chosen)
    try:
        draw_landscape(picture, table, grid, chosen)
    except OSError as error:
        print(f"warning: {picture}: not drawn ({error.strerror})", file=sys.stderr)


# ---------------------------------------------------------------- report

WORST = 12


def page_details(page, found, chosen):
    """found, with low scores too, and the polygons chosen of it -> precision, recall, hmean (cleval
    "page") at LEVELS [19, 3]; of the labels that count, heights in px and whether a chosen polygon
    hits it at IoU 0.5."""
    ignore, scores = np.array(page.ignore, bool), np.asarray(found[1])
    labels = prepare_labels(as_points(page.polygons), [None] * len(ignore), ignore, "page")
    keep = scores >= LEVELS[:, None] - 1e-9
    keep &= keep.cumsum(1) <= MAX_DETECTIONS
    pairs = page_pairs(labels, as_points(found[0]))
    hit = np.zeros(len(ignore), bool)
    hit[[n for n, _ in iou_matches(page.polygons, chosen, ignore)[0]]] = True
    height = np.array([min(min_area_sides(np.asarray(p))) for p in page.polygons])
    return micro_scores(count_kept(labels, pairs, keep, "page")), height[~ignore], hit[~ignore]


def thumbnail(page, polygons):
    image = draw_page(page, polygons)
    zoom = min(520 / image.shape[1], 2000 / image.shape[0])
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
    code = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])[1]
    return "data:image/jpeg;base64," + base64.b64encode(code).decode()


def write_report(path, title, hp, result, pages, rows, details, worst):
    """
    One self-contained HTML file. rows: of METRICS; details: page_details of pages; worst: [(hmean,
    index, polygons)] of the pages to show.
    """
    curves, heights, hits = zip(*details)
    hmeans, words = rows["page"][:, 2], np.array([len(h) for h in heights])
    keys = ("precision", "recall", "hmean")
    table = [("metric", *keys, "95 % interval")]
    for metric, (name, _) in METRICS.items():
        r = result if metric == "page" else result[metric]
        interval = " to ".join(f"{value:.4f}" for value in r["interval"])
        table.append((name, *(f"{r[key]:.4f}" for key in keys), interval))
    first = min(int(20 * hmeans.min()), 15)  # the histogram's twentieths
    count = np.histogram(hmeans, np.arange(first, 21) / 20)[0]
    edges = [(f"{k / 20:.2f}",) for k in range(first, 20)]
    curve, chosen = np.mean(curves, 0), hp["box_thresh"] if hp else None
    levels = [(f"{b:.2f}", *(f"{v:.4f}" for v in row)) for b, row in zip(LEVELS, curve)]
    shown = ", ".join(f"{key} {hp[key]}" for key in ("size", *DECODING)) if hp else "as in the file"
    figures = []
    for hmean, i, polygons in worst:
        name = f"{pages[i].name}: hmean {hmean:.4f}, {len(heights[i])} words, {hits[i].sum()} hit"
        picture = f'<img alt="page with overlays" src="{thumbnail(pages[i], polygons)}">'
        figures.append(f"<figure>{picture}<figcaption>{html.escape(name)}</figcaption></figure>")

    def section(head, text, *parts):
        return "".join((f"<h2>{head}</h2><p>{text}</p>", *parts))

    competition = "(competition's CLEval)"
    body = (
        f"<h1>{html.escape(title)}</h1><p>{result['pages']} pages, {words.sum()} words. Decoding: "
        f"{shown}. Intervals: bootstrap over groups of pages.</p>{html_table(table)}",
        section(
            "Pages by score",
            f"Pages with which hmean {competition}, by steps of 0.05.",
            html_bars(count, count, edges, count.max()),
        ),
        section(
            "Score by density",
            "Mean hmean of pages with so many words.",
            binned(words, hmeans, "pages"),
        ),
        section(
            "Recall by word height",
            "Share of words hit at IoU 0.5, by height in page px.",
            binned(np.concatenate(heights), np.concatenate(hits).astype(float), "words"),
        ),
        section(
            "Precision and recall over box_thresh",
            f"Means over pages {competition}; the dashed line is the value in use.",
            html_curves(curve, chosen),
            "<details><summary>The numbers</summary>",
            html_table([("box_thresh", *keys), *levels]),
            "</details>",
        ),
        section(
            f"The {len(worst)} worst pages",
            "Labels thin blue, hits green, misses red, false alarms orange, at IoU 0.5.",
            f'<div class="pages">{"".join(figures)}</div>',
        ),
    )
    replace_file(path, SCORES_PAGE % (html.escape(title), "".join(body)))


# ---------------------------------------------------------------- export


class Probability(torch.nn.Module):
    """RGB [B, 3, H, W] in 0..1, H and W multiples of 32 -> probabilities [B, 1, H, W]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pages):
        return self.model((255 * pages).permute(0, 2, 3, 1)).sigmoid()


@torch.no_grad()
def export(source, path, overrides):
    """
    Write a checkpoint as an ONNX model of Probability, of any B, H, W, with size, decoding, score
    as metadata. Raises DataError without the package onnx, NetworkError where onnxruntime gives
    other maps than PyTorch, by more than 1e-4.
    """
    try:
        import onnx
    except ImportError:
        raise DataError("--export: needs a package; pip install onnx onnxruntime") from None
    model, hp, state = load_network(source)
    model, hp, buffer = Probability(model).eval(), {**hp, **overrides}, io.BytesIO()
    axes = {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer exporter needs one more package
        names = {"input_names": ["pages"], "output_names": ["map"]}
        names["dynamic_axes"] = {"pages": axes, "map": axes}
        torch.onnx.export(model, (torch.rand(1, 3, 96, 64),), buffer, dynamo=False, **names)
    graph = onnx.load_from_string(buffer.getvalue())
    about = {key: hp[key] for key in ("backbone", "size", *DECODING)}
    about |= {"input": "RGB 0..1", "epoch": state.get("epoch")}
    about["hmean"] = (state.get("scores") or {}).get("hmean")
    onnx.helper.set_model_props(graph, {key: str(value) for key, value in about.items()})
    graph = graph.SerializeToString()
    error = onnx_error(model, graph)
    if error is not None and not error < 1e-4:
        raise NetworkError(f"{source}: as ONNX its maps differ by {error:.1g}; nothing written")
    replace_file(Path(path), graph)
    checked = "not compared, pip install onnxruntime" if error is None else f"differ by {error:.1g}"
    print(f"{path}: {len(graph) / 2**20:.1f} MiB, maps of PyTorch and onnxruntime: {checked}")


def onnx_error(model, graph):
    """Largest difference of maps on noise of two page sizes; None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    pages = [torch.rand(shape) for shape in ((1, 3, 160, 96), (2, 3, 64, 224))]
    maps = [session.run(None, {"pages": page.numpy()})[0] for page in pages]
    return max(float(np.abs(model(p).numpy() - m).max()) for p, m in zip(pages, maps))


# ---------------------------------------------------------------- command line


def open_source(source, pages, overrides, args, job, failed=None):
    """A checkpoint or the predictions.json of any detector -> the hparams it uses (None for a file)
    and (index, job(page, found)) of pages in their order. Raises DataError, NetworkError."""
    if not str(source).endswith(".json"):
        model, hp, _ = load_network(source, args.device)
        hp = {**hp, **overrides}
        return hp, predict_each(model, pages, hp, args.device, job, True, args.tile, failed)
    by_name = {p.name: p for p in read_competition(source, need_pictures=False)}
    missing = [p.name for p in pages if p.name not in by_name]
    if missing:
        some = f"{len(missing)} of {len(pages)} pages are not in it (first: {missing[0]})"
        raise DataError(f"{source}: {some}; a page without words needs an entry too")

    def judge(page):
        found = by_name[page.name]
        return job(page, (found.polygons, np.array(found.confidences)))

    return None, enumerate(data.map_threads(judge, pages, "scoring"))


@contextmanager
def predictions_file(path):
    """A predictions.json in the competition's form, with confidences, whole or not at all: gives
    write(page, found), which adds a page. Nothing happens without a path."""
    if not path:
        yield lambda page, found: None
        return
    path, start = Path(path), '{"images": {'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def write(page, found):
        nonlocal start
        out = Page(page.name, page.path, size=page.size)
        for i, (polygon, confidence) in enumerate(zip(*found), 1):
            out.add(f"{i:04d}", polygon, confidence=confidence)
        images = json.dumps(pages_to_json([out])["images"], ensure_ascii=False)
        file.write(start + images[1:-1])
        start = ",\n"

    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield write
            file.write(f"{'' if start.startswith(',') else start}}}}}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk names no file; an error of another file keeps its name
        name = error.filename if error.filename not in (None, str(temporary)) else str(path)
        raise OSError(error.errno, error.strerror or str(error), name) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_predictions(path, pages, found):
    with predictions_file(path) as write:
        for page, one in zip(pages, found):
            write(page, one)


def own_pages(hp):
    """The pages a run validated on, from the hparams in its checkpoint."""
    return data.run_pages(SimpleNamespace(**hp))[1]


def print_line(result, what):
    low, high = result["interval"]
    shown = "  ".join(f"{key} {result[key]:.4f}" for key in ("precision", "recall", "hmean"))
    print(f"{shown} [{low:.4f}, {high:.4f}]  {what}")


def print_scores(result):
    for metric, (name, _) in METRICS.items():
        print_line(result if metric == "page" else result[metric], name)
    none = f"{result['pages_without_labels']} without labels (these score 0 in the competition's)"
    say = "intervals: bootstrap 95 % over groups of pages"
    print(f"{result['pages']} pages, {none}; {say}")


def compare(pages, rows, other_rows):
    """Paired difference of two predictions on the same pages, {metric: paired_difference}."""
    groups = bootstrap_groups(pages)
    return {
        metric: paired_difference(rows[metric], other_rows[metric], to_scores, groups)
        for metric, (_, to_scores) in METRICS.items()
    }


def print_comparison(difference, other):
    for metric, (name, _) in METRICS.items():
        d, (low, high) = difference[metric], difference[metric]["interval"]
        verdict = f"{d['verdict']}, vs {other}: {name}"
        print(f"hmean {d['difference']:+.4f} [{low:+.4f}, {high:+.4f}]  {verdict}")


OVERRIDES = {  # type and what is allowed: from, to or one of these
    "size": (int, 32, 8192),
    "thresh": (float, 0.01, 0.99),
    "box_thresh": (float, 0, 1),
    "unclip_ratio": (float, 0, 10),
    "max_candidates": (int, 1, 100000),
    "min_size": (float, 0, 1000),
    "mode": (str, *MODES),
    "amp": (str, "auto", "bf16", "fp16", "off"),
}


def add_overrides(parser):
    """A flag for each of OVERRIDES, in both spellings."""
    group = parser.add_argument_group("instead of the values in the checkpoint")
    for key, (kind, *allowed) in OVERRIDES.items():
        flag, shown = "--" + key.replace("_", "-"), (" | " if kind is str else " to ").join
        group.add_argument(flag, type=kind, metavar="X", help=shown(map(str, allowed)))
        if "_" in key:
            group.add_argument("--" + key, type=kind, dest=key, help=argparse.SUPPRESS)


def given_overrides(args, values=None):
    """{key: value} of OVERRIDES: flags, else values. Raises DataError on what is not allowed."""
    flags = {key: getattr(args, key) for key in OVERRIDES if getattr(args, key) is not None}
    values = {**(values or {}), **flags}
    for key, value in values.items():
        kind, *allowed = OVERRIDES[key]
        if kind is str and value not in allowed:
            raise DataError(f"--{key} {value}: not one of {', '.join(allowed)}")
        kinds = (int,) if kind is int else (int, float)
        if kind is not str and not (type(value) in kinds and allowed[0] <= value <= allowed[1]):
            whole = "whole numbers " * (kind is int)
            raise DataError(f"--{key} {value}: not within {whole}{allowed[0]} to {allowed[1]}")
    return values


def parse_args(argv):
    parser = Parser(usage="python evaluate.py SOURCE [options]", description=__doc__)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="best.pt, or predictions.json of any detector")
    add("--compare", metavar="OTHER", help="another SOURCE: the paired difference, its interval")
    add("--device", default="auto", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add = parser.add_argument_group("pages (default: what the run validated on)").add_argument
    add("--data", help="folder or label file")
    add("--split", default="val", choices=SPLITS, help="of DATA (default val)")
    add("--image-dir", help="where the pictures lie, if not in images/ or beside the labels")
    add("--images", metavar="PATH", help="pictures without labels: one, or a folder and below")
    add("--tile", type=int, default=0, metavar="PX", help="cut larger pages into tiles")
    add = parser.add_argument_group("files to write").add_argument
    add("--out", metavar="JSON", help="predictions with confidences")
    add("--export", metavar="ONNX", help="the network for onnxruntime, RapidOCR...; stops then")
    add("--html", metavar="FILE", help="a report: worst pages, scores by size, thresholds")
    add("--pictures", metavar="DIR", help="pages with labels, hits, misses and false alarms drawn")
    add = parser.add_argument_group("thresholds").add_argument
    add("--tune", action="store_true", help="search them, out of fold (give all), cross-fitted")
    add("--write", metavar="PATH", help="checkpoint (.pt, a copy) or hparams (.json) with them")
    add_overrides(parser)
    args = parser.parse_args(argv)
    args.source = args.sources[0]
    return args


def picture_pages(path):
    """Pages without known labels (None) of a picture, or of all pictures in a folder and below."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"--images {path}: no such file or folder")
    if path.is_dir():
        files = sorted(path.rglob("*"))
        files = [p for p in files if p.suffix.lower() in PICTURES and p.is_file()]
    else:
        files, path = [path], path.parent
    # names whose bytes are no UTF-8 could not be written into a JSON file
    names = [os.fsencode(p.relative_to(path)).decode("utf-8", "replace") for p in files]
    pages = [Page(name, file, None) for name, file in zip(names, files)]
    if not pages:
        raise DataError(f"--images {path}: no picture in it ({' '.join(PICTURES)})")
    return pages


def trained_on(source, hp, scores, pages):
    """
    Indices of the pages whose picture a run trained on, told by its bytes; None when what it, or
    the run that it began from, trained on is not here. Which pages it held out is taken from the
    record in its scores, not drawn again.
    """
    folder = next((f for f in (Path(hp["data"]), Path("data", hp["data"])) if f.exists()), None)
    if folder is None:
        return None
    held_out = scores.get("pages", {})
    if not hp["folds"] and (hp["val_data"] or has_split(folder, "val")):
        held_out = {}  # not parted from the train pages, and may have the same names
    sizes = {Path(page.path).stat().st_size for page in pages}
    try:
        train = load_labels(folder, "train", hp["image_dir"] or None)
        train = [page for page in train if page.name not in held_out]
        names = [hp["init"], *hp.get("teacher", "").split(",")]
        begun = [(name, load_checkpoint(name)) for name in names if name]
    except DataError:
        return None
    seen = {picture_digest(page) for page in train if page.path.stat().st_size in sizes}
    leaks = {n for n, page in enumerate(pages) if picture_digest(page) in seen}
    for name, state in begun:
        before = trained_on(name, state["hparams"], state.get("scores") or {}, pages)
        if before is None:
            return None
        leaks |= before
    return leaks


def chose_epoch(state, pages):
    """Whether a checkpoint is its run's best epoch by some of these pages, a best.pt."""
    own = (state.get("scores") or {}).get("pages", ())
    return "optimizer" not in state and any(page.name in own for page in pages)


def warn_of_leaks(source, pages):
    """Say on stderr when a checkpoint trained on some of the pages, or was chosen by them."""
    if source.endswith(".json"):
        return
    state = load_checkpoint(source)
    leaks = trained_on(source, state["hparams"], state.get("scores") or {}, pages)
    if leaks:
        some = f"{len(leaks)} of these {len(pages)} pages (first: {pages[min(leaks)].name})"
        print(f"warning: {source}: trained on {some}, too good there", file=sys.stderr)
    if chose_epoch(state, pages):
        say = "its epoch was chosen on these pages, so it is rather too good there; see last.pt"
        print(f"note: {source}: {say}", file=sys.stderr)


def choose_pages(args):
    """The labelled pages to score on. Raises DataError."""
    if args.data:
        return load_labels(data.resolve_data(args.data), args.split, args.image_dir)
    if args.source.endswith(".json"):
        raise DataError(f"{args.source}: which labels? add --data")
    hp = load_checkpoint(args.source)["hparams"]
    if args.compare and not args.compare.endswith(".json"):
        other = load_checkpoint(args.compare)["hparams"]
        for key in ("data", "val_data", "folds", "fold"):
            if hp[key] != other[key]:
                others = f"other pages ({key} {other[key]!r}, here {hp[key]!r})"
                say = "may have trained on these; name pages that neither has seen by --data"
                raise DataError(f"--compare: {args.compare} validated on {others} and {say}")
    return own_pages(hp)


def check_flags(args, overrides):
    """Raises DataError on flags that do not go together."""
    if args.tune:
        others = ("compare", "images", "tile", "out", "export", "html", "pictures")
        if given := [flag for flag in others if vars(args)[flag]]:
            raise DataError(f"--{given[0]}: not with --tune; --write, and then score that")
        return
    if len(args.sources) > 1 or args.write:
        raise DataError("several sources and --write are for --tune; see also --compare")
    given = [flag for flag in ("images", "export", "tile") if vars(args)[flag]] + list(overrides)
    if args.source.endswith(".json") and given:
        say = "a predictions file is decoded already; give a checkpoint"
        raise DataError(f"--{given[0]}: {say}")
    if args.images and (args.compare or args.data or args.html):
        raise DataError("--images: has no labels; leave out --compare, --data and --html")
    if args.tile and args.tile < 32:
        raise DataError(f"--tile {args.tile}: at least 32 page pixels are needed")


def score_source(source, pages, overrides, args, main=True, failed=None):
    """Predict pages or read their predictions and, of the main source, write what is asked for:
    {metric: rows [n, k]} of METRICS, empty for pages without labels. At most some 200
    pages are in memory at a time, whatever their number."""
    report, level = args.html if main else None, None

    def judge(page, found):
        everything = found
        if level is not None:
            found = found[0][: (found[1] >= level).sum()], found[1][found[1] >= level]
        if main and args.pictures:
            draw_picture(page, found[0], args.pictures)
        known = page.polygons is not None
        row = {metric: page_row(metric, page, found[0]) for metric in METRICS if known}
        return found, row, page_details(page, everything, found[0]) if report else None

    if report and not source.endswith(".json"):
        level = {**load_checkpoint(source)["hparams"], **overrides}["box_thresh"]
        overrides = {**overrides, "box_thresh": min(level, LEVELS[0])}
    hp, stream = open_source(source, pages, overrides, args, judge, failed)
    hp = hp and {**hp, "box_thresh": hp["box_thresh"] if level is None else level}
    if hp and not args.json:
        print(", ".join(f"{k} {hp[k]}" for k in ("size", *DECODING)))
    begin, words, rows = time.perf_counter(), 0, {metric: [] for metric in METRICS}
    details, worst = [], []
    with predictions_file(args.out if main else None) as write:
        for i, (found, row, detail) in stream:
            write(pages[i], found)
            words += len(found[0])
            for metric in row:
                rows[metric].append(row[metric])
            if report:
                details.append(detail)
                worst = sorted([*worst, (row["page"][2], i, found[0])], key=lambda w: w[:2])[:WORST]
    if hp and not args.json:
        seconds, done = time.perf_counter() - begin, len(pages) - len(failed or ())
        speed = f"{done / seconds:.2f} images/s, {args.device}"
        print(f"{done} pages, {words} words found in {seconds:.1f} s ({speed})")
    rows = {metric: np.array(rows[metric]) for metric in METRICS}
    if report:
        result = summarise(pages, rows)
        write_report(report, source, hp, result, pages, rows, details, worst)
    return rows


def run(args):
    overrides = given_overrides(args)
    args.device = choose_device(args.device)
    check_flags(args, overrides)
    if args.tune:
        return run_tune(args, overrides)
    if args.export:
        return export(args.source, args.export, overrides)
    failed = {} if args.images else None
    pages = picture_pages(args.images) if args.images else choose_pages(args)
    for page in pages if args.pictures else ():
        file = picture_file(page, args.pictures)
        if file.exists() and file.samefile(page.path):
            raise DataError(f"--pictures {args.pictures}: {file} is a page; give a new folder")
    for source in () if args.images else filter(None, (args.source, args.compare)):
        warn_of_leaks(source, pages)
    rows = score_source(args.source, pages, overrides, args, True, failed)
    if args.images:
        for error in failed.values():
            print(f"error: {error}", file=sys.stderr)
        return 1 if failed else 0
    result = summarise(pages, rows)
    if args.compare:
        result["compare"] = compare(pages, rows, score_source(args.compare, pages, {}, args, False))
    if args.json:
        print(json.dumps(result))
        return 0
    print_scores(result)
    if args.compare:
        print_comparison(result["compare"], args.compare)
    return 0


def choose_device(name):
    """torch.device of --device; `auto` is CUDA where there is one. Raises ValueError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DataError(f"--device {name}: not a device; use cuda, cuda:1 or cpu") from None
    gpus = torch.cuda.device_count()
    if device.type != "cpu" and (device.type != "cuda" or (device.index or 0) >= gpus):
        raise DataError(f"--device {name}: not here, with {gpus} CUDA devices; use cpu")
    return device


def exit_code(run):
    """The exit code of run(); 1, 2 or 3 with one line on stderr where it fails."""
    try:
        return run() or 0
    except DataError as error:
        line, code = error, 2
    except OSError as error:
        line, code = f"{error.filename or 'output'}: {error.strerror or error}", 1
    except torch.OutOfMemoryError:
        line, code = "out of memory: use a smaller --size, or --device cpu", 3
    print(f"error: {line}", file=sys.stderr)
    return code


def main(argv=None):
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
