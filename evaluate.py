"""How good is a detector: CLEval and IoU metrics, prediction, intervals, pictures.

python evaluate.py runs/x/best.pt                score a checkpoint on what its run validated on
python evaluate.py runs/x/best.pt --data DATA    on labelled pages; flags override its thresholds
python evaluate.py predictions.json --data DATA  any detector's output, in the competition's JSON
python evaluate.py a.pt --compare b.pt           paired difference with its interval
python evaluate.py best.pt --images DIR --pictures OUT --out predictions.json
python evaluate.py best.pt --images DIR --rank   without labels: the pages to label next
python evaluate.py runs/x-fold*/last.pt --tune --write tuned.json"""

import base64
import hashlib
import io
import json
import os
import sys
import time
import warnings
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

import cleval
import data
import pictures
import report
from db_postprocess import DECODING, decode_page
from dbnet import load_checkpoint, load_network, save_checkpoint
from engine import amp_dtype, choose_device
from files import DataError, Parser, UsageError, exit_code, replace_file, write_json
from hparams import Hparams, add_flags, given_flags, read_hparams
from interval import SEEN, bootstrap_groups, make_score, paired_difference
from labels import PICTURES, SPLITS, Page, load_labels, lookalike, pages_to_json, read_competition
from tune import GRID, METRICS, TUNED, draw_landscape, halves, print_tuning, tune

# ---------------------------------------------------------------- prediction


class Network(NamedTuple):
    """A network that predicts: its model and its Hparams. sizes: the page sizes whose maps are
    averaged, where they are not hp.size alone."""

    model: torch.nn.Module
    hp: Hparams
    sizes: tuple = ()

    def hp_by_size(self):
        """Its Hparams at each of the page sizes."""
        return [replace(self.hp, size=size) for size in self.sizes or (self.hp.size,)]


class Sheet(NamedTuple):
    """A page at one size, as one network sees it."""

    network: int
    prob: np.ndarray  # uint8 [H', W'], H' and W' multiples of 32: the map, filled tile by tile
    shape: tuple  # its rows and columns without padding


@dataclass
class PageUnderWay:
    """A page from its loading to its last map."""

    index: int
    sheets: list
    missing: int = 0  # tiles whose maps are not back yet


class Tile(NamedTuple):
    """A window of a sheet, on its way through the network."""

    owner: PageUnderWay
    sheet: Sheet
    y: int
    x: int
    picture: np.ndarray  # uint8 [h, w, 3]


def map_shape(page_size, hp):
    """(rows, columns) of the map of a page (width, height)."""
    return data.scaled(page_size, data.fit_factor(page_size, hp))[::-1]


def predict_each(networks, pages, device, job, tile=0, failed=None):
    """Yields (index, job(page, K maps uint8 [h, w])) of pages in their order, the maps by K
    networks; sets page.size. Page xy = map xy * page.size / map size. tile: see `cut_page`.

    Pages of one padded shape share a batch on a GPU, so that none sees padding it would not have
    alone. Jobs run in threads beside the networks. At most some 200 pages are under way at a time.
    Pages that cannot be read raise DataError or, with a dict `failed`, enter it by index."""
    threads = min(8, cv2.getNumberOfCPUs())
    batch_size = 8 if device.type == "cuda" else 1
    load = partial(load_page, networks=networks, tile=tile, failed=failed)
    results, turn = {}, 0  # futures by index; the index whose result comes next
    bar = report.progress(desc="predicting", total=len(pages))
    with ThreadPoolExecutor(threads) as loaders, ThreadPoolExecutor(threads) as workers, bar:
        # pages are decoded, scaled and cut into tiles, some way ahead of the networks
        loading = (loaders.submit(load, index, page) for index, page in enumerate(pages))
        loaded = (future.result() for future in run_ahead(loading, 4 if tile else 32))

        # tiles go through their network in batches; one is at work while the last is fetched
        batches = batch_tiles(loaded, batch_size)
        launched = (launch(networks, tiles, device) for tiles in batches)
        for tiles, maps, event in run_ahead(launched, 1):
            if event is not None:
                event.synchronize()

            # their maps are pasted; once a page has all of them, its job starts
            for piece, prob in zip(tiles, maps.numpy()):
                paste(piece, prob)
                owner = piece.owner
                owner.missing -= 1
                if not owner.missing:
                    page = pages[owner.index]
                    done = workers.submit(run_job, job, networks, page, owner.sheets)
                    results[owner.index] = done
                    bar.update()

            # results leave in the order of the pages
            while turn in results or failed and turn in failed:
                if turn in results:
                    if len(results) <= 64 and not results[turn].done():
                        break
                    yield turn, results.pop(turn).result()
                turn += 1
        for index in sorted(results):
            yield index, results[index].result()


def run_ahead(started, count):
    """The items of an iterator, which starts something with each, `count` of them later."""
    waiting = deque()
    for item in started:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def load_page(index, page, networks, tile, failed):
    """The tiles of a page for each network and page size; sets page.size. Raises DataError or, with
    a dict `failed`, enters it there and returns none."""
    views = [(k, hp) for k, network in enumerate(networks) for hp in network.hp_by_size()]
    try:
        image = data.open_page(page, [hp for _, hp in views], tile)
        under_way = PageUnderWay(index, [])
        tiles = []
        for k, hp in views:
            tiles += cut_page(image, page, hp, tile, k, under_way)
    except DataError as error:
        if failed is None:
            raise
        failed[index] = error
        return []
    under_way.missing = len(tiles)
    return tiles


def cut_page(image, page, hp, tile, network, under_way):
    """The Tiles of one Sheet of a page: the whole of it at `fit_factor` or, where that is less than
    hp.size map pixels for `tile` > 0 page pixels, enlarged to this, in windows of hp.size that
    overlap by a quarter."""
    whole = data.fit_factor(page.size, hp)
    factor = max(whole, hp.size / tile if tile else 0)
    width, height = data.scaled(page.size, factor)
    if width * height > pictures.MAX_PIXELS:
        problem = f"size {hp.size}, --tile {tile}: over {pictures.MAX_PIXELS >> 20} M pixels"
        raise DataError(page.path, problem, "use a larger --tile or a smaller --size")
    image = data.resize_page(image, width, height)

    sheet = Sheet(network, np.empty(image.shape[:2], np.uint8), (height, width))
    under_way.sheets.append(sheet)
    window = -(-hp.size // 32) * 32 if factor > whole else max(image.shape)
    rows, columns = (window_starts(length, window) for length in image.shape[:2])
    corners = [(y, x) for y in rows for x in columns]
    return [Tile(under_way, sheet, y, x, image[y : y + window, x : x + window]) for y, x in corners]


def window_starts(length, window):
    """Where windows that overlap by a quarter begin, so that they cover a length."""
    spare, stride = max(length - window, 0), window * 3 // 4
    return [min(start, spare) for start in range(0, spare + stride, stride)]


def batch_tiles(pages, batch_size):
    """Lists of at most `batch_size` tiles of one network and shape, from pages (lists of tiles).
    None waits for more than 128 pages."""
    queues = defaultdict(list)
    for count, tiles in enumerate(pages, 1):
        for tile in tiles:
            kind = tile.sheet.network, tile.picture.shape
            queues[kind].append(tile)
            if len(queues[kind]) == batch_size:
                yield queues.pop(kind)
        if count % 128 == 0:
            yield from queues.values()
            queues.clear()
    yield from queues.values()


@torch.no_grad()
def launch(networks, tiles, device):
    """Start a batch of tiles on their network: (tiles, maps uint8 [B, h, w], the event at their end
    on a GPU)."""
    network = networks[tiles[0].sheet.network]
    pictures = torch.from_numpy(np.stack([tile.picture for tile in tiles]))  # [B, h, w, 3]
    if device.type == "cuda":
        pictures = pictures.pin_memory()
    dtype = amp_dtype(network.hp.amp, device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = network.model(pictures.to(device, non_blocking=True))  # [B, 1, h, w]
    maps = (logits[:, 0].float().sigmoid() * 255).round().to(torch.uint8)
    maps = maps.to("cpu", non_blocking=True)
    event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    return tiles, maps, event


def paste(tile, prob):
    """Put a tile's map [h, w] into its sheet, from the middle of its overlap with those before."""
    height, width = prob.shape
    top = height // 8 if tile.y else 0
    left = width // 8 if tile.x else 0
    bottom, right = tile.y + height, tile.x + width
    tile.sheet.prob[tile.y + top : bottom, tile.x + left : right] = prob[top:, left:]


def run_job(job, networks, page, sheets):
    """job(page, maps) with what the Sheets of a page became: a map uint8 [h, w] of each network."""
    maps = []
    for k, network in enumerate(networks):
        views = [s.prob[: s.shape[0], : s.shape[1]] for s in sheets if s.network == k]
        if network.sizes:
            maps.append(mean_map(views, [1] * len(views), map_shape(page.size, network.hp)))
        else:
            maps += views
    return job(page, maps)


def mean_map(maps, weights, shape):
    """K maps uint8 [h, w] of any sizes -> their weighted mean uint8, `shape` (rows, columns)."""
    total = np.zeros(shape, np.float32)
    for prob, weight in zip(maps, weights):
        if prob.shape != shape:
            prob = cv2.resize(prob, shape[::-1])
        total += np.float32(weight) * prob
    return np.round(total / np.float32(sum(weights))).astype(np.uint8)


def predict(network, pages, device, job, tile=0, failed=None):
    """Yields (index, job(page, found)) of pages in their order, found: (polygons [P, 2] in page
    pixels, scores [N]) by a network. tile, failed: see `predict_each`."""

    def decode(page, maps):
        return job(page, decode_page(maps[0], page.size, network.hp))

    return predict_each([network], pages, device, decode, tile, failed)


# ---------------------------------------------------------------- pictures

COLOURS = {"label": (60, 90, 255), "hit": (0, 150, 0), "found": (0, 150, 0), "miss": (230, 0, 0)}
COLOURS |= {"false alarm": (255, 120, 0), "joined": (160, 0, 200)}


def draw_page(page, polygons, scores=(), side=1400):
    """A page with its labels (thin blue), hits (green), false alarms (orange), labels joined with
    others (purple) and other misses (red) at IoU 0.5, or what was found (green) where labels are
    not known (None), the scores of what was found, and a strip that counts it: uint8 RGB [H, W, 3],
    the longer side >= side."""
    image = pictures.read_image(page.path)
    zoom = max(1.0, side / max(image.shape[:2]))
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    image = cv2.addWeighted(image, 0.75, np.full_like(image, 255), 0.25, 0)
    labels, known = page.polygons or [], page.polygons is not None
    pairs, valid, outcome, _ = cleval.iou_matches(labels, polygons, page.ignore)
    hits = {m for _, m in pairs} if known else {*range(len(polygons))}
    layers = {
        "hit" if known else "found": [polygons[m] for m in sorted(hits)],
        "label": [p for p, o in zip(labels, outcome) if o in ("hit", "")],
        "false alarm": [p for m, p in enumerate(polygons) if m not in hits and valid[m]],
        "joined": [p for p, o in zip(labels, outcome) if o == "joined"],
        "miss": [p for p, o in zip(labels, outcome) if o not in ("hit", "", "joined")],
    }
    strip, x = np.full((40, image.shape[1], 3), 255, np.uint8), 8
    small, font = min(1.0, image.shape[1] / 720), cv2.FONT_HERSHEY_SIMPLEX
    for kind, outlines in layers.items():
        outlines = [np.round(p * zoom).astype(np.int32) for p in outlines]
        cv2.polylines(image, outlines, True, COLOURS[kind], 1 + (kind != "label"), cv2.LINE_AA)
        if kind != "label" and (known or kind == "found"):
            text = f"{len(outlines)} {kind}"
            cv2.putText(strip, text, (x, 28), font, 0.8 * small, COLOURS[kind], 2, cv2.LINE_AA)
            x += round((16 * len(text) + 20) * small)
    for polygon, score in zip(polygons, scores):
        x, y = np.round(polygon[polygon[:, 0].argmax()] * zoom).astype(int).tolist()
        for colour, width in (((255, 255, 255), 3), ((0, 60, 160), 1)):  # legible on any ground
            place = f"{score:.2f}", (x + 3, y + 4), font, 0.45, colour, width, cv2.LINE_AA
            cv2.putText(image, *place)
    return np.concatenate([strip, image])


def picture_file(page, folder):
    """Where a page is drawn: folder/NAME, with .jpg added unless it is one (a.jpg, a.png.jpg)."""
    jpeg = page.name.lower().endswith((".jpg", ".jpeg"))
    return Path(folder, page.name if jpeg else f"{page.name}.jpg")


def draw_picture(page, polygons, scores, folder):
    """Write a page as a JPEG into a folder, see `draw_page`, `picture_file`."""
    file = picture_file(page, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    sharp = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    image = draw_page(page, polygons, scores)[..., ::-1]
    replace_file(file, cv2.imencode(".jpg", image, sharp)[1])


# ---------------------------------------------------------------- threshold tuning


def cached_maps(source, pages, hp, device):
    """Maps of a checkpoint on pages: list of (uint8 [h, w], scale [2]), in the order of pages. Kept
    in maps/ beside the checkpoint under a name made of digests of the checkpoint, the pictures and
    what else the maps depend on: another of these never meets an old file."""
    made_of = [pictures.picture_digest(source), hp.size, hp.fit, str(amp_dtype(hp.amp, device)), 2]
    made_of += [(page.name, pictures.picture_digest(page.path)) for page in pages]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path = Path(source).parent / "maps" / f"{Path(source).stem}-{key}.npz"
    if path.exists():
        try:
            with np.load(path) as file:
                return [(file[str(i)], scale) for i, scale in enumerate(file["scales"])]
        except Exception:  # noqa: BLE001 (zipfile and numpy raise what the damaged bytes lead to)
            print(f"warning: {path}: damaged, predicting again", file=sys.stderr)
    networks = [Network(load_network(source, device)[0], hp)]
    found = predict_each(networks, pages, device, lambda page, maps: maps[0])
    maps = [np.ascontiguousarray(prob) for _, prob in found]
    scales = np.array([m.shape[::-1] for m in maps]) / [page.size for page in pages]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, scales=scales, **{str(i): prob for i, prob in enumerate(maps)})
    try:
        replace_file(path, buffer.getbuffer())
    except OSError as error:  # others' runs may be read-only
        print(f"warning: {path}: maps are not kept ({error.strerror})", file=sys.stderr)
    return list(zip(maps, scales))


def held_out_pages(sources, folder=None, image_dir=None):
    """The pages that each of several fold runs held out, by the record in its checkpoint. folder:
    where the data lie now, if not where the runs found them. Raises DataError when the runs are not
    different folds of one split or the pages are not there."""
    labels, owner, parts = None, {}, []
    for source in sources:
        state = load_checkpoint(source, ("model", "hparams", "scores"))
        hp, held = state["hparams"], sorted(state["scores"].get("pages", ()))
        if labels is None:
            first, folder = hp, data.resolve_data(folder or data.set_names(hp.data)[0])
            found = load_labels(folder, "train", image_dir or hp.image_dir or None)
            labels = {page.name: page for page in found}
        for key in ("data", "image_dir", "folds", "split", "size", "fit", "shrink_ratio"):
            if (own := getattr(hp, key)) != (other := getattr(first, key)):
                what = f"{key} is {own!r}, in {sources[0]} {other!r}"
                raise DataError(source, what, "tuning needs folds of one split")
        if not hp.folds or not held:
            raise DataError(source, "no fold run with a finished epoch", "tune one, or the folds")
        for name in held:
            if name not in labels:
                raise DataError(source, f"its held-out page {name} is not in the data")
            if owner.setdefault(name, source) != source:
                what = f"page {name} is held out by {owner[name]} too"
                raise DataError(source, what, "give one run a fold")
        parts.append([labels[name] for name in held])
    return parts


def check_target(path, sources):
    """Raises UsageError when --write cannot put values into path."""
    there = Path(path).exists()
    if not path.endswith(".json") and (not path.endswith(".pt") or sources[1:] or there):
        raise UsageError(f"--write {path}", "not a .json file or, of one source, a new .pt file")
    if there:
        read_hparams(path)  # told before the tuning


def write_setting(path, sources, values):
    """Put values into a copy of the checkpoint (.pt) or an hparams file (.json), new or not."""
    state = load_checkpoint(sources[0])
    hp = {**asdict(state["hparams"]), **values}
    if path.endswith(".pt"):
        return save_checkpoint(path, {**state, "hparams": hp})
    own = ("name", "folds", "fold", "split", "stop_epoch", "workers", "init")
    hp = {key: value for key, value in hp.items() if key not in own}
    write_json(path, {**(read_hparams(path) if Path(path).exists() else hp), **values}, indent=1)


def run_tune(args, overrides):
    """evaluate.py --tune. Raises DataError."""
    if args.write:
        check_target(args.write, args.sources)
    hp, maps, seen = load_checkpoint(args.source)["hparams"], [], Counter()
    hp = overridden(args.source, hp, overrides)
    held = args.sources[1:] and held_out_pages(args.sources, args.data, args.image_dir)
    page_lists = held or [choose_pages(args)]
    pages = [page for own in page_lists for page in own]
    if not any(page.polygons for page in pages):
        raise DataError("--tune", "the pages have no labels")
    if args.split == "test":
        print("warning: test pages choose the thresholds: no test score any more", file=sys.stderr)
    for source, own in zip(args.sources, page_lists):
        seen.update({how: n for how, n in warn_of_leaks(source, own).items() if how != "tuned"})
        maps += cached_maps(source, own, hp, args.device)
    parts = np.repeat(range(len(page_lists)), [*map(len, page_lists)])
    parts = parts if held else halves(bootstrap_groups(pages))
    grid = {key: (overrides[key],) if key in overrides else GRID[key] for key in TUNED}
    result, table = tune(maps, pages, parts, grid, hp, args.metric or "hmean", seen)
    chosen = {key: result["recommended"][key] for key in TUNED}
    picture = Path(args.source).parent / "tune.png"
    if args.json:
        print(json.dumps(result, default=lambda score: score.to_json()))
    else:
        print_tuning(result)
        print(f"{len(pages)} pages, cross-fitted over {len(set(parts))} parts; {picture}")
        if result["gain"].over.unit == "pages":
            print(data.NO_GROUPS)
    if args.write:
        tuned = ",".join(pictures.picture_digest(page.path) for page in pages)
        write_setting(args.write, args.sources, {**chosen, "tuned": tuned})
    try:
        draw_landscape(picture, table, grid, chosen, result["metric"])
    except OSError as error:
        print(f"warning: {picture}: not drawn ({error.strerror})", file=sys.stderr)


# ---------------------------------------------------------------- report

WORST = 12


def page_details(page, polygons):
    """Of a page's labels that count: heights in px, whether `polygons` hit them at IoU 0.5."""
    outcome = cleval.iou_matches(page.polygons, polygons, page.ignore)[2]
    return data.word_heights(page)[outcome != ""], outcome[outcome != ""] == "hit"


def decoding_line(hp):
    return ", ".join(f"{key} {getattr(hp, key)}" for key in ("size", "fit", *DECODING))


def thumbnail(page, polygons):
    image = draw_page(page, polygons)
    zoom = min(520 / image.shape[1], 2000 / image.shape[0])
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
    code = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])[1]
    return "data:image/jpeg;base64," + base64.b64encode(code).decode()


def binned(x, y, what):
    """Mean of y in up to 5 equally filled bins of x, as bars: (mean, label, [range, size])."""
    if not len(x):
        return []
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 6)))
    edges = np.resize(edges, max(len(edges), 2))  # of equal values: one bin, that of no width
    counts, sums = (np.histogram(x, edges, weights=weights)[0] for weights in (None, y))
    bins = zip(sums / np.maximum(counts, 1), edges, edges[1:], counts)
    return [(y, f"{y:.4f}", [f"{a:.0f} to {b:.0f}", f"{n} {what}"]) for y, a, b, n in bins]


def write_report(path, title, hp, pages, rows, details, worst, seen):
    """One HTML page. rows: of METRICS; details: page_details of pages; worst: [(hmean, index,
    polygons)] of those to show; seen: as of warn_of_leaks."""
    summary, (heights, hits) = summarise(pages, rows, seen), zip(*details)
    hmeans, words = rows["page"][:, 2], np.array([len(h) for h in heights])
    counts, edges = np.histogram(hmeans, np.arange(min(int(20 * hmeans.min()), 15), 21) / 20)
    figures = []
    for hmean, i, polygons in worst:
        name = f"{pages[i].name}: hmean {hmean:.4f}, {words[i]} words, {hits[i].sum()} hit"
        figures.append((name, thumbnail(pages[i], polygons)))
    blocks = report.scores_blocks(
        title,
        f"{words.sum()} words. Decoding: {decoding_line(hp) if hp else 'as in the file'}.",
        {summary.names[metric]: score for metric, score in summary.scores.items()},
        summary.counts,
        pages=[(count, count, [f"{edge:.2f}"]) for count, edge in zip(counts.tolist(), edges)],
        density=binned(words, hmeans, "pages"),
        heights=binned(np.concatenate(heights), np.concatenate(hits).astype(float), "words"),
        worst=figures,
    )
    replace_file(path, report.page(title, blocks))


# ---------------------------------------------------------------- export


class Probability(torch.nn.Module):
    """RGB [B, 3, H, W] in 0..1, H and W multiples of 32 -> probabilities [B, 1, H, W]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pages):
        return self.model((255 * pages).permute(0, 2, 3, 1)).sigmoid()


def export(source, path, overrides):
    """Write a checkpoint to share: as .onnx, see `export_onnx`, or as a new .pt its averaged
    weights in half precision. Both hold their decoding, and no score: it was of another one."""
    if path.endswith(".onnx"):
        return export_onnx(source, path, overrides)
    if not path.endswith(".pt") or Path(path).exists():
        raise UsageError(f"--export {path}", "is no new .pt", "give one, or a .onnx file")
    state = load_checkpoint(source)
    weights = (state.get("ema") or state["model"]).items()
    weights = {key: value.half() if value.ndim > 1 else value for key, value in weights}
    if not all(value.isfinite().all() for value in weights.values()):
        raise DataError(source, "weights beyond half precision", "give an .onnx file")
    shared = {key: state[key] for key in ("epoch", "origin") if key in state}
    hp = asdict(replace(state["hparams"], **overrides))
    save_checkpoint(path, {"model": weights, "hparams": hp, **shared})
    print(f"{path}: {Path(path).stat().st_size / 2**20:.1f} MiB")


@torch.no_grad()
def export_onnx(source, path, overrides):
    """Write a checkpoint as an ONNX model of Probability, of any B, H, W, with size, decoding
    and seen pages as metadata, and print RapidOCR's settings. Raises DataError if maps differ."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise UsageError("--export", "needs a package", "pip install onnx onnxruntime") from None
    model, hp, state = load_network(source)
    model, hp, buffer = Probability(model).eval(), replace(hp, **overrides), io.BytesIO()
    free = {0: "batch", 2: "height", 3: "width"}
    options = {"input_names": ["pages"], "output_names": ["map"], "dynamo": False}
    options["dynamic_axes"] = {"pages": free, "map": free}
    with warnings.catch_warnings(action="ignore"):  # the newer exporter needs one more package
        torch.onnx.export(model, (torch.rand(1, 3, 96, 64),), buffer, **options)
    graph = onnx.load_from_string(buffer.getvalue())
    about = {key: getattr(hp, key) for key in ("backbone", "size", "fit", *DECODING)}
    about |= {"input": "RGB 0..1", "epoch": state.get("epoch")}
    for how, digests in seen_digests(state.get("origin") or {}, hp).items():  # too good on these
        about[SEEN[how].replace(" ", "_")] = " ".join(sorted(digests))
    onnx.helper.set_model_props(graph, {key: str(value) for key, value in about.items()})
    graph = graph.SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    pages = [torch.rand(shape) for shape in ((1, 3, 160, 96), (2, 3, 64, 224))]
    maps = [torch.tensor(session.run(None, {"pages": p.numpy()})[0]) for p in pages]
    error = max((model(p) - m).abs().max().item() for p, m in zip(pages, maps))
    if not error < 1e-4:
        raise DataError(source, f"as ONNX its maps differ by {error:.1g}; nothing written")
    replace_file(path, graph)
    print(f"{path}: {len(graph) / 2**20:.1f} MiB, maps differ by {error:.1g} from PyTorch's")
    print_rapidocr(path, hp)


def print_rapidocr(path, hp):
    """The call that makes RapidOCR use an exported model. It knows boxes, the most of a page's
    longer side and the least of its shorter one: for `area` those of a page 2:1."""
    area = hp.fit == "area"
    longer, shorter = (round(hp.size * 2**0.5), round(hp.size / 2**0.5)) if area else [hp.size] * 2
    det = {"model_path": path, "mean": [0, 0, 0], "std": [1, 1, 1], "use_dilation": False}
    det |= {"limit_type": "min" if area else "max", "limit_side_len": shorter, "score_mode": "slow"}
    det |= {"thresh": hp.thresh, "box_thresh": hp.box_thresh}
    det |= {"unclip_ratio": hp.unclip_ratio or 2.4}  # exact for a word 4.5 times as long
    flags = ", ".join(f"det_{key}={value!r}" for key, value in det.items())
    pages = "boxes only, pages about 2:1" if area else "boxes only"
    print(f"rapidocr-onnxruntime 1.4.4, {pages}: RapidOCR(max_side_len={longer}, {flags})")


# ---------------------------------------------------------------- predictions as files


def check_pages(source, regions, pages, needed=True):
    """Raises DataError where the regions {name: ...} of a predictions file lack all pages or, where
    each is needed, one; says so where they lack some."""
    if missing := [page.name for page in pages if page.name not in regions]:
        what = f"{len(missing)} of {len(pages)} pages are not in it (first: {missing[0]})"
        if needed or len(missing) == len(pages):
            hint = lookalike(missing[0], regions)
            raise DataError(source, what, f"a page without words needs an entry too{hint}")
        print(f"warning: {source}: {what}; it does not vote on them", file=sys.stderr)


def read_predictions(source):
    """{page name: (polygons, scores)} of a predictions.json. Raises DataError."""
    pages = read_competition(source, need_pictures=False)
    return {page.name: (page.polygons, np.array(page.confidences)) for page in pages}


@contextmanager
def predictions_file(path):
    """A predictions.json in the competition's form, with confidences, whole or not at all: gives
    write(page, found), which adds a page. Nothing happens without a path."""
    entries = []

    def write(page, found):
        if not path:
            return
        out = Page(page.name, page.path, size=page.size)
        for i, (polygon, confidence) in enumerate(zip(*found), 1):
            out.add(f"{i:04d}", polygon, confidence=confidence)
        entries.append(json.dumps(pages_to_json([out])["images"], ensure_ascii=False)[1:-1])

    if path:  # told before a prediction
        replace_file(f"{path}.try", "")
        os.unlink(f"{path}.try")
    yield write
    if path:
        replace_file(path, '{"images": {' + ",\n".join(entries) + "}}\n")


# ---------------------------------------------------------------- what a checkpoint has seen


def seen_digests(origin, hp):
    """{how, of SEEN: digests of the pages that a checkpoint and its ancestors have seen so}."""
    tuned = hp.tuned.split(",") if hp else ()
    return {how: {*values} for how, values in ({"tuned": tuned} | origin).items() if how in SEEN}


def warn_of_leaks(source, pages, hp=None):
    """Say on stderr, by the digests in a checkpoint, how it has seen some of the pages, or that it
    does not tell; hp: its Hparams if not those in it. Returns {how, of SEEN: number of pages}."""
    state, seen = {} if source.endswith(".json") else load_checkpoint(source), {}
    origin = state.get("origin") or {"unknown": [source]}
    if whose := ", ".join(origin["unknown"]):
        say = f"pages that {whose} trained on, and that chose its epoch, are not known"
        print(f"warning: {source}: {say}", file=sys.stderr)
    digests = [pictures.picture_digest(page.path) for page in pages]
    for how, known in seen_digests(origin, hp or state.get("hparams")).items():
        if found := [p.name for p, digest in zip(pages, digests) if digest in known]:
            some = f"{len(found)} of these {len(pages)} pages (first: {found[0]})"
            print(f"warning: {source}: {SEEN[how]} {some}, too good there", file=sys.stderr)
            seen[how] = len(found)
    return seen


class Summary(NamedTuple):
    """How good a detector is on labelled pages."""

    scores: dict  # {metric of cleval.METRICS: Score}
    counts: dict  # pages, pages_without_labels, labels by outcome, pairs of neighbours by gap
    names: dict  # {metric: what it is called}

    def to_json(self):
        parts = {metric: score.to_json() for metric, score in self.scores.items()}
        seen = self.scores["page"].over.seen
        return parts.pop("page") | parts | self.counts | {"in_sample": seen}


def summarise(pages, rows, seen=None):
    """{metric: rows} of cleval.METRICS -> Summary; seen: as of warn_of_leaks."""
    groups = bootstrap_groups(pages)
    scores = {
        metric: make_score(rows[metric], to_scores, groups, seen)
        for metric, to_scores in cleval.METRICS.items()
    }
    total = rows["iou50"].sum(0).astype(int).tolist()
    gaps = zip(pairwise(cleval.GAPS), total[11:17], total[17:])
    counts = {
        "pages": len(pages),
        "pages_without_labels": sum(all(page.ignore) for page in pages),
        "labels": dict(zip(cleval.OUTCOMES, total[6:11])),
        "pairs": [{"gap": ends, "pairs": n, "joined": k} for ends, n, k in gaps],
    }
    return Summary(scores, counts, cleval.metric_names(pages))


# ---------------------------------------------------------------- command line


def print_summary(summary):
    for metric, score in summary.scores.items():
        print(f"{score.full_line()}  {summary.names[metric]}")

    counts = summary.counts
    outcomes = ", ".join(f"{count} {kind}" for kind, count in counts["labels"].items())
    gaps = [f"{p['joined']} of {p['pairs']} from {p['gap'][0]}" for p in counts["pairs"]]
    print(f"labels: {outcomes}; neighbours joined, by gap / height: {', '.join(gaps)}")

    none = f"{counts['pages_without_labels']} without labels (these score 0 in the competition's)"
    print(f"{counts['pages']} pages, {none}; intervals: 95 %, expanded BCa bootstrap")
    if summary.scores["page"].over.unit == "pages":
        print(data.NO_GROUPS)


# of a checkpoint's values, those that flags may replace
OVERRIDES = ("size", "fit", *(key for key in DECODING if key != "shrink_ratio"), "amp")


def parse_args(argv):
    parser = Parser(usage="python evaluate.py SOURCE [options]", description=__doc__)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="best.pt, or predictions.json of any detector")
    add("--compare", metavar="OTHER", help="another SOURCE: the paired difference, its interval")
    add("--device", default="auto", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add = parser.add_argument_group("pages (default: what the run validated on)").add_argument
    add("--data", help="folder or label file")
    add("--split", choices=SPLITS, help="of DATA (default val)")
    add("--image-dir", help="where the pictures lie, if not in images/ or beside the labels")
    add("--images", metavar="PATH", help="pictures without labels: one, or a folder and below")
    add("--tile", type=int, metavar="PX", help="cut larger pages into tiles")
    add("--rank", action="store_true", help="pages without labels, the ones to label next first")
    add = parser.add_argument_group("files to write").add_argument
    add("--out", metavar="JSON", help="predictions with confidences")
    add("--export", metavar="FILE", help="x.onnx for onnxruntime, RapidOCR; x.pt in half the size")
    add("--html", metavar="FILE", help="a report: worst pages, scores by size and density")
    add("--pictures", metavar="DIR", help="pages with labels, hits, misses and false alarms drawn")
    add = parser.add_argument_group("thresholds").add_argument
    add("--tune", action="store_true", help="search them, out of fold (give all), cross-fitted")
    add("--metric", choices=[*METRICS], help="what --tune searches by (default hmean)")
    add("--write", metavar="PATH", help="checkpoint (.pt, a copy) or hparams (.json) with them")
    add("--hparams", metavar="JSON", help="take the values below from this file")
    add_flags(parser, OVERRIDES, "instead of the values in the checkpoint")
    args = parser.parse_args(argv)
    args.source = args.sources[0]
    return args


def picture_pages(path):
    """Pages without known labels (None) of a picture, or of all pictures in a folder and below."""
    path, files = Path(path), [Path(path)]
    if not path.exists():
        raise UsageError(path, "no such file or folder")
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in PICTURES and p.is_file()]
    if not files:
        raise DataError(path, f"no picture in it ({' '.join(PICTURES)})")
    folder = path if path.is_dir() else path.parent
    # names whose bytes are no UTF-8 could not be written into a JSON file
    names = [os.fsencode(p.relative_to(folder)).decode("utf-8", "replace") for p in files]
    return [Page(name, file, None) for name, file in zip(names, files)]


def choose_pages(args):
    """The labelled pages to score on. Raises DataError."""
    if args.data:
        return load_labels(data.resolve_data(args.data), args.split or "val", args.image_dir)
    if args.source.endswith(".json"):
        raise UsageError(args.source, "needs labels to be scored", "add --data")
    hp = load_checkpoint(args.source)["hparams"]
    if not all(data.resolve_data(name).exists() for name in data.set_names(hp.data)):
        what = f"the pages of its run, {hp.data}, are not here"
        raise UsageError(args.source, what, "name pages by --data or --images")
    return data.run_pages(hp)[1]


def refuse_idle(args, rules):
    """Raises UsageError on an idle flag. rules: (flags, whether they have an effect, else what)."""
    for flags, effect, what in rules:
        for flag in flags.split() if not effect else ():
            if (value := vars(args)[flag]) is not None and value is not False:
                raise UsageError(f"--{flag.replace('_', '-')}", what, "leave it out")


def check_flags(args):
    """Raises UsageError on flags that have no effect, or not together."""
    score, decoding = not args.tune and not args.export, " ".join(("hparams", *OVERRIDES))
    rules = [
        ("metric write", args.tune, "only with --tune"),
        ("compare images tile rank out html pictures", score, "not with --tune or --export"),
        ("export hparams", not args.tune, "not with --tune"),
        ("data split image_dir json", not args.export, "not with --export"),
        (f"images export tile {decoding}", args.source[-5:] != ".json", "only with a checkpoint"),
        ("data", not args.images, "not with --images"),
        ("split", not args.sources[1:], "not with folds, each on what it held out"),
        ("split image_dir", args.data or args.sources[1:], "only with --data"),
        ("tile", args.tile is None or args.tile >= 32, "at least 32 page pixels are needed"),
    ]
    refuse_idle(args, rules)
    if args.sources[1:] and not args.tune:
        raise UsageError("several sources", "only with --tune", "to compare two: --compare")


def read_overrides(args):
    """{key: value} of --hparams < flags that replace a checkpoint's. Raises DataError."""
    values = read_hparams(args.hparams) if args.hparams else {}
    values = {key: values[key] for key in (*OVERRIDES, "tuned") if key in values}
    return values | given_flags(args, OVERRIDES)


def overridden(source, hp, overrides):
    """hp with other values; says where pages become of another size than the network's own."""
    other = replace(hp, **overrides)
    if (hp.size, hp.fit) != (other.size, other.fit):
        what = f"size {other.size}, fit {other.fit} instead of its own {hp.size}, {hp.fit}"
        print(f"warning: {source}: {what}: words become of another height", file=sys.stderr)
    return other


def print_found(found, args):
    """Of pages without labels, [(confidence that 90 % reach, words, name)]: with --rank all, those
    to label next first (Lewis and Gale 1994), else the first 20, where nothing keeps them."""
    kept = args.out or args.pictures
    for least, words, name in sorted(found) if args.rank else [] if kept else found[:20]:
        print(f"{words:4d} words, 90 % of them from {least:.4f}  {name}")
    if not kept:
        print("not kept: add --out predictions.json, or --pictures DIR to look")


def score_source(source, pages, overrides, args, main=True, failed=None):
    """Predict pages or read their predictions and, of the main source, write what is asked for:
    {metric: rows [n, k] of labelled pages}, and how pages were seen, as of warn_of_leaks."""
    labelled = pages[0].polygons is not None
    html, metrics = args.html if main else None, cleval.METRICS if labelled else ()

    def judge(page, found):
        if main and args.pictures:
            draw_picture(page, *found, args.pictures)
        row = {metric: cleval.page_row(metric, page, found[0]) for metric in metrics}
        return found, row, page_details(page, found[0]) if html else None

    if source.endswith(".json"):
        hp, seen, regions = None, {}, read_predictions(source)
        check_pages(source, regions, pages)
        stream = enumerate(data.map_threads(lambda p: judge(p, regions[p.name]), pages, "scoring"))
    else:
        model, hp, _ = load_network(source, args.device)
        hp = overridden(source, hp, overrides)
        seen = warn_of_leaks(source, pages, hp) if labelled else {}
        stream = predict(Network(model, hp), pages, args.device, judge, args.tile or 0, failed)
        if not args.json:
            print(decoding_line(hp))
    begin, judged, details, worst, listed = time.perf_counter(), [], [], [], []
    with predictions_file(args.out if main else None) as write:
        for i, (found, row, detail) in stream:
            write(pages[i], found)
            least = float(np.quantile(found[1], 0.1)) if len(found[1]) else 0.0
            listed.append((least, len(found[0]), pages[i].name))
            judged.append(row)
            if html:
                details.append(detail)
                worst = sorted([*worst, (row["page"][2], i, found[0])], key=lambda w: w[:2])[:WORST]
    if not args.json:
        seconds, words = time.perf_counter() - begin, sum(count for _, count, _ in listed)
        speed = f" in {seconds:.1f} s ({len(listed) / seconds:.2f} images/s, {args.device})"
        unknown = " without labels, nothing to score" * (not labelled)
        print(f"{len(listed)} pages{unknown}, {words} words found{speed * bool(hp)}")
    if not labelled:
        print_found(listed, args)
    rows = {key: np.array([row[key] for row in judged]) for key in metrics}
    if html:
        write_report(html, source, hp, pages, rows, details, worst, seen)
    return rows, seen


def run(args):
    work = not args.export and not str(args.source).endswith(".json")
    args.device = choose_device(args.device, work)
    check_flags(args)
    overrides = read_overrides(args)
    if args.tune:
        return run_tune(args, overrides)
    if args.export:
        return export(args.source, args.export, overrides)
    pages = picture_pages(args.images) if args.images else choose_pages(args)
    labelled = any(page.polygons for page in pages)
    failed = None if labelled else {}
    rules = [("compare html json", labelled, "the pages have no labels")]
    refuse_idle(args, [*rules, ("rank", not labelled, "the pages have labels")])
    for page in () if labelled else pages:
        page.polygons = None
    for page in pages if args.pictures else ():
        if (file := picture_file(page, args.pictures)).exists() and file.samefile(page.path):
            raise UsageError(file, "is a page", "give --pictures a new folder")
    rows, seen = score_source(args.source, pages, overrides, args, True, failed)
    if not labelled:
        for error in failed.values():
            print(f"error: {error}", file=sys.stderr)
        return 1 if failed else 0
    summary, differences = summarise(pages, rows, seen), {}
    if args.compare:
        others, theirs = score_source(args.compare, pages, {}, args, False)
        groups = bootstrap_groups(pages)
        for metric, to_scores in cleval.METRICS.items():
            pair = rows[metric], others[metric]
            differences[metric] = paired_difference(*pair, to_scores, groups, theirs | seen)
    if args.json:
        compare = {metric: difference.to_json() for metric, difference in differences.items()}
        result = summary.to_json() | ({"compare": compare} if args.compare else {})
        return print(json.dumps(result))
    print_summary(summary)
    for metric, difference in differences.items():
        print(f"{difference}, vs {args.compare}: {summary.names[metric]}")


def main(argv=None):
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
