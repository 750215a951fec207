"""How good is a detector? It is run, scored, drawn, compared, tuned and exported here.

python evaluate.py runs/x/best.pt                score a checkpoint on what its run validated on
python evaluate.py runs/x/best.pt --data DATA    on labelled pages; flags override its thresholds
python evaluate.py predictions.json --data DATA  any detector's output, in the competition's JSON
python evaluate.py a.pt --compare b.pt           paired difference with its interval
python evaluate.py best.pt --images DIR --pictures OUT --out predictions.json
python evaluate.py best.pt --images DIR --rank   without labels: the pages to label next
python evaluate.py runs/x-fold*/last.pt --tune --write tuned.json

In Python: polygons, scores = Detector("weights/receipts-lite2.pt")("a.jpg")"""

import hashlib
import io
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
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
from augment import STRESS, stress
from command import Parser, add_flags, given_flags
from db_postprocess import DECODING, decode_page
from dbnet import load_checkpoint, network_of, save_checkpoint
from drawing import draw_page, embedded_picture, picture_file, write_picture
from engine import amp_dtype, choose_device, export_onnx, print_rapidocr
from files import (
    DataError,
    UsageError,
    check_writable,
    exit_code,
    guard,
    print_error,
    replace_file,
    write_json,
)
from hparams import Hparams, checked, read_hparams
from interval import SEEN, Difference, bootstrap_groups, make_score, paired_difference
from labels import PICTURES, SPLITS, Page, load_labels, lookalike, pages_to_json, read_competition
from tune import GRID, METRICS, TUNED, draw_landscape, halves, print_tuning, tune

# a checkpoint's values that flags may replace
FIRST_LOOK = 512  # px by area, of --size auto
TEXT_HEIGHT = 20  # px of the median line, for weights that do not say theirs
LOOK_SIDES = (320, 1600)  # px, least and most, root of the area that is read
LOOK_ENLARGED = 2  # at most, map px a page px
OVERRIDES = ("size", "fit", *(key for key in DECODING if key != "shrink_ratio"), "amp")

# ---------------------------------------------------------------- sources


@dataclass
class Source:
    """A checkpoint or a predictions file, read once a command."""

    path: str
    state: dict  # of a checkpoint
    hp: Hparams | None  # of a checkpoint, with the values of flags
    regions: dict | None  # of a predictions file: {page name: (polygons, scores)}

    def override(self, values):
        """Take other values, and say where they bring pages to another size than its own."""
        own, self.hp = self.hp, replace(self.hp, **values)
        if (own.size, own.fit) != (self.hp.size, self.hp.fit):
            sizes = (
                f"size {self.hp.size}, fit {self.hp.fit} instead of its own {own.size}, {own.fit}"
            )
            remark = "text will be larger or smaller than the network was trained on"
            print(f"warning: {self.path}: {sizes}; {remark}", file=sys.stderr)

    def network(self, device, **options):
        """A Network on a device. Raises DataError."""
        return Network(network_of(self.state, self.path, device), self.hp, **options)


def load_source(path):
    """The Source at a path: predictions if it ends in .json, else a checkpoint. Raises DataError,
    UsageError."""
    if path.endswith(".json"):
        return Source(path, {}, None, read_predictions(path))
    state = load_checkpoint(path)
    return Source(path, state, state["hparams"], None)


def read_predictions(path):
    """{page name: (polygons, scores)} of a predictions.json. Raises DataError."""
    pages = read_competition(path, need_pictures=False)
    return {page.name: (page.polygons, np.array(page.confidences)) for page in pages}


def write_predictions(path, pages, predictions):
    """Write (polygons, scores) of pages as JSON in the competition's form, a line a page."""
    entries = []
    for page, (polygons, scores) in zip(pages, predictions):
        words = Page(page.name, page.path, size=page.size)
        for number, (polygon, score) in enumerate(zip(polygons, scores), 1):
            words.add(f"{number:04d}", polygon, confidence=score)
        entry = json.dumps(pages_to_json([words])["images"], ensure_ascii=False)
        entries.append(entry[1:-1])
    replace_file(path, '{"images": {' + ",\n".join(entries) + "}}\n")


def check_pages(source, pages, needed=True):
    """Raises DataError where a predictions file lacks all pages or, where each is needed, one; says
    so where it lacks some."""
    missing = [page.name for page in pages if page.name not in source.regions]
    if not missing:
        return
    problem = f"{len(missing)} of {len(pages)} pages are not in it (first: {missing[0]})"
    if needed or len(missing) == len(pages):
        hint = lookalike(missing[0], source.regions)
        raise DataError(source.path, problem, f"a page without words needs an entry too{hint}")
    print(f"warning: {source.path}: {problem}; it does not vote on them", file=sys.stderr)


def page_digest(page):
    return page.digest or pictures.picture_digest(page.path)


def seen_digests(origin, hp):
    """{way, of SEEN: digests of the pages that a checkpoint and its ancestors have seen so}."""
    ways = {"tuned": hp.tuned.split(",") if hp else ()} | origin
    return {way: {*digests} for way, digests in ways.items() if way in SEEN}


def warn_of_leaks(source, pages):
    """Warn on stderr of pages that a Source has seen before, by the digests in it, or that these
    are not known. Returns {way, of SEEN: number of pages}."""
    origin = source.state.get("origin") or {"unknown": [source.path]}
    if origin["unknown"]:
        names = ", ".join(origin["unknown"])
        remark = f"pages that {names} trained on, and that chose its epoch, are not known"
        print(f"warning: {source.path}: {remark}", file=sys.stderr)

    digests = [page_digest(page) for page in pages]
    counts = {}
    for way, seen in seen_digests(origin, source.hp).items():
        names = [page.name for page, digest in zip(pages, digests) if digest in seen]
        if names:
            share = f"{len(names)} of these {len(pages)} pages (first: {names[0]})"
            remark = "the score will be optimistic"
            print(f"warning: {source.path}: {SEEN[way]} {share}; {remark}", file=sys.stderr)
            counts[way] = len(names)
    return counts


# ---------------------------------------------------------------- prediction


class Network(NamedTuple):
    """A network that predicts: its model and its Hparams. sizes: the page sizes whose maps are
    averaged, where they are not hp.size alone. tile: if not 0, a page is enlarged until so many of
    its px are hp.size map px; one that is no larger has no map by this network."""

    model: torch.nn.Module
    hp: Hparams
    sizes: tuple = ()
    tile: int = 0

    def hp_by_size(self):
        """Its Hparams at each of the page sizes."""
        if not self.sizes:
            return [self.hp]
        return [replace(self.hp, size=size, look=False) for size in self.sizes]


def flipped(model):
    """A network whose map is the mean of the page's and of the mirrored page's, mirrored back."""

    def logits(pages):  # uint8 [B, H, W, 3] -> [B, 1, H, W]
        page, mirrored = model(torch.cat([pages, pages.flip(2)])).float().sigmoid().chunk(2)
        return torch.logit((page + mirrored.flip(3)) / 2, eps=1e-6)

    return logits


class Look(NamedTuple):
    """What a first look tells of a page: where its text lies and how high it is."""

    box: tuple  # left, top, right, bottom, page px
    line: float  # height of the median line, page px


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


def page_factor(page, hp):
    """By what a page is scaled for a network: to hp.size or, after a first look, so that its median
    line gets the height that lines had in training, within LOOK_SIDES of what is read."""
    if not (hp.look and page.look):
        return pictures.fit_factor(page.size, hp)
    left, top, right, bottom = page.look.box
    side = ((right - left) * (bottom - top)) ** 0.5
    factor = (hp.text_height or TEXT_HEIGHT) / page.look.line
    low, high = LOOK_SIDES
    return min(max(factor, low / side), high / side, LOOK_ENLARGED)


def map_shape(page, hp):
    """(rows, columns) of the map of a page."""
    return pictures.scaled(page.size, page_factor(page, hp))[::-1]


def predict_each(networks, pages, device, job, failed=None):
    """Yields (index, job(page, K maps uint8 [h, w])) of pages in their order, the maps by K
    networks; sets page.size. Page xy = map xy * page.size / map size.

    Pages of one padded shape share a batch on a GPU, so that none sees padding it would not have
    alone. Jobs run in threads beside the networks. At most some 200 pages are under way at a time.
    Pages that cannot be read raise DataError or, with a dict `failed`, enter it by index."""
    assert not all(network.tile for network in networks)  # small pages would have no map
    looking = [network for network in networks if network.hp.look]
    if looking:
        take_looks(looking[0], pages, device, failed)

    threads = min(8, cv2.getNumberOfCPUs())
    batch_size = 8 if device.type == "cuda" else 1
    pages_ahead = 4 if any(network.tile for network in networks) else 32
    load = partial(load_page, networks=networks, failed=failed)
    results, turn = {}, 0  # futures by index; the index whose result comes next
    bar = report.progress(desc="predicting", total=len(pages))
    with ThreadPoolExecutor(threads) as loaders, ThreadPoolExecutor(threads) as workers, bar:
        # pages are decoded, scaled and cut into tiles, some way ahead of the networks
        loading = (loaders.submit(load, index, page) for index, page in enumerate(pages))
        loaded = (future.result() for future in run_ahead(loading, pages_ahead))

        # tiles go through their network in batches; one is at work while the last is fetched
        batches = batch_tiles(loaded, batch_size)
        launched = (launch(networks, tiles, device) for tiles in batches)
        for tiles, maps, event in run_ahead(launched, 1):
            if event is not None:
                event.synchronize()

            # their maps are pasted; once a page has all of them, its job starts
            for tile, prob in zip(tiles, maps.numpy()):
                paste(tile, prob)
                owner = tile.owner
                owner.missing -= 1
                if not owner.missing:
                    work = job, networks, pages[owner.index], owner.sheets
                    results[owner.index] = workers.submit(run_job, *work)
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


def take_looks(network, pages, device, failed):
    """Look at pages once, at FIRST_LOOK px by area: sets page.look where there is text."""
    quick = replace(network.hp, size=FIRST_LOOK, fit="area", look=False)

    def job(page, found):
        page.look = look_at(page, found[0])

    for _ in predict(Network(network.model, quick), pages, device, job, failed):
        pass


def look_at(page, polygons):
    """The Look of a page at polygons [P, 2] found on it; None without any."""
    if not polygons:
        return None
    line = float(np.median(data.word_heights(Page("", None, polygons))))
    points = np.concatenate(polygons)
    margin = 3 * line + 0.03 * max(page.size)  # a first look misses faint lines at the ends
    low = (points.min(0) - margin).clip(0, page.size)
    high = (points.max(0) + margin).clip(0, page.size)
    return Look((*low.tolist(), *high.tolist()), max(line, 1.0))


def run_ahead(started, count):
    """The items of an iterator, which starts something with each, `count` of them later."""
    waiting = deque()
    for item in started:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def load_page(index, page, networks, failed):
    """The tiles of a page for each network and page size; sets page.size. Raises DataError or, with
    a dict `failed`, enters it there and returns none."""
    views = [(k, hp) for k, network in enumerate(networks) for hp in network.hp_by_size()]
    smallest_tile = min((network.tile for network in networks if network.tile), default=0)
    under_way = PageUnderWay(index, [])
    tiles = []
    try:
        if isinstance(page.path, np.ndarray):  # a Detector's picture
            image, page.size = page.path, page.path.shape[1::-1]
        else:
            hps = [reading_hp(page, hp) for _, hp in views]
            image = data.open_page(page, hps, smallest_tile)
        for k, hp in views:
            tiles += cut_page(image, page, hp, k, networks[k].tile, under_way)
    except DataError as error:
        if failed is None:
            raise
        failed[index] = error
        return []
    under_way.missing = len(tiles)
    return tiles


def reading_hp(page, hp):
    """Hparams whose size is as large as a page is read."""
    if not (hp.look and page.look):
        return hp
    longer = math.ceil(page_factor(page, hp) * max(page.size))
    return replace(hp, fit="longer", size=longer)


def cut_page(image, page, hp, network, tile, under_way):
    """The Tiles of one Sheet of a page: the whole of it at `page_factor`, or what a Look found of it,
    or, with `tile` > 0, enlarged to hp.size map pixels for `tile` page pixels, in windows of hp.size
    that overlap by a quarter; none where that is not larger."""
    factor = page_factor(page, hp)
    window = None
    if tile:
        if hp.size / tile <= factor:
            return []
        factor = hp.size / tile
        window = -(-hp.size // 32) * 32
    width, height = pictures.scaled(page.size, factor)
    if width * height > pictures.MAX_PIXELS:
        problem = f"size {hp.size}, --tile {tile}: over {pictures.MAX_PIXELS >> 20} M pixels"
        raise DataError(page.path, problem, "use a larger --tile or a smaller --size")
    image = data.resize_page(image, width, height)

    sheet = Sheet(network, np.zeros(image.shape[:2], np.uint8), (height, width))
    under_way.sheets.append(sheet)
    if hp.look and page.look and not tile:
        return [cut_look(image, page.look, factor, sheet, under_way)]
    rows, columns = (window_starts(length, window or length) for length in image.shape[:2])
    corners = [(y, x) for y in rows for x in columns]
    parts = [image[y:, x:][:window, :window] for y, x in corners]
    return [Tile(under_way, sheet, y, x, part) for (y, x), part in zip(corners, parts)]


def cut_look(image, look, factor, sheet, under_way):
    """The Tile of what a Look found, its sides multiples of 32; the map is 0 elsewhere."""
    edges = factor * np.array(look.box) / 32
    left, top = np.floor(edges[:2]).astype(int) * 32
    right, bottom = np.ceil(edges[2:]).astype(int) * 32
    part = image[top:bottom, left:right]
    place = sheet._replace(prob=sheet.prob[top:, left:])
    return Tile(under_way, place, 0, 0, part)


def window_starts(length, window):
    """Where windows that overlap by a quarter begin, so that they cover a length."""
    spare, stride = max(length - window, 0), window * 3 // 4
    return [min(start, spare) for start in range(0, spare + stride, stride)]


def batch_tiles(pages, batch_size):
    """Lists of at most `batch_size` tiles of one network and shape, from pages (lists of tiles).
    No tile waits for more than 128 pages."""
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
    """Start a batch of tiles on their network: (tiles, maps uint8 [B, h, w], on a GPU the event at
    their end)."""
    network = networks[tiles[0].sheet.network]
    batch = torch.from_numpy(np.stack([tile.picture for tile in tiles]))  # [B, h, w, 3]
    if device.type == "cuda":
        batch = batch.pin_memory()
    dtype = amp_dtype(network.hp.amp, device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = network.model(batch.to(device, non_blocking=True))  # [B, 1, h, w]
    maps = (logits[:, 0].float().sigmoid() * 255).round().to(torch.uint8)
    maps = maps.to("cpu", non_blocking=True)
    event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    return tiles, maps, event


def paste(tile, prob):
    """Put a tile's map [h, w] into its sheet, from the middle of its overlap with those before."""
    height, width = prob.shape
    top = height // 8 if tile.y else 0
    left = width // 8 if tile.x else 0
    place = tile.sheet.prob[tile.y :, tile.x :]
    place[top:height, left:width] = prob[top:, left:]


def run_job(job, networks, page, sheets):
    """job(page, maps) with what the Sheets of a page became: a map uint8 [h, w] of each network
    that has any."""
    maps = []
    for k, network in enumerate(networks):
        views = [s.prob[: s.shape[0], : s.shape[1]] for s in sheets if s.network == k]
        if network.sizes:
            views = [mean_map(views, [1] * len(views), map_shape(page, network.hp))]
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


def predict(network, pages, device, job, failed=None):
    """Yields (index, job(page, found)) of pages in their order, found: (polygons [P, 2] in page
    pixels, scores [N], highest first) by a network. failed: see `predict_each`."""

    def decode(page, maps):
        found = [decode_page(prob, page.size, network.hp) for prob in maps]
        return job(page, join_looks(*found, network.tile / 8) if found[1:] else found[0])

    looks = [network._replace(tile=0), network] if network.tile else [network]
    return predict_each(looks, pages, device, decode, failed)


def join_looks(whole, tiled, limit):
    """(polygons, scores) found on a page at once, and found tile by tile -> those of the tiles, but
    words higher than `limit` px as found at once, for tiles cut them. It may be a block of small
    print, though: then the tiles find words in it, all under half its height."""
    polygons, scores = [*tiled[0]], [*tiled[1]]
    middles = [polygon.mean(0).tolist() for polygon in polygons]
    heights = data.word_heights(Page("", None, polygons))
    dropped = set()
    for outline, score, height in zip(*whole, data.word_heights(Page("", None, whole[0]))):
        area = outline.astype(np.float32)
        inside = [n for n, xy in enumerate(middles) if cv2.pointPolygonTest(area, xy, False) > 0]
        tallest = max(heights[inside], default=height)
        if height > limit and tallest >= height / 2:
            dropped.update(inside)
            polygons.append(outline)
            scores.append(score)
    order = np.argsort(-np.array(scores), kind="stable").tolist()
    kept = [n for n in order if n not in dropped]
    return [polygons[n] for n in kept], np.array([scores[n] for n in kept])


class Detector:
    """Finds text in pictures: polygons, scores = Detector("weights/receipts-lite2.pt")("a.jpg").

    weights: a checkpoint. device: as --device. values: of OVERRIDES, instead of the checkpoint's.
    Raises DataError, UsageError."""

    def __init__(self, weights, device="auto", **values):
        for key in values:
            if key not in OVERRIDES:
                raise UsageError("Detector", f"{key} is not one of {', '.join(OVERRIDES)}")
        values = choose_look(values)
        values = {key: checked(key, value, "Detector") for key, value in values.items()}
        source = load_source(str(weights))
        if source.regions is not None:
            raise UsageError(weights, "not a checkpoint")
        source.override(values)
        self.device = choose_device(device)
        self.network = source.network(self.device)

    def __call__(self, picture):
        """A picture, a path or uint8 RGB [H, W, 3], -> N polygons [P, 2] in its pixels and scores
        [N], highest first; a list of pictures -> a list of these. Raises DataError."""
        images = picture if isinstance(picture, list) else [picture]
        for image in images:
            is_array = isinstance(image, np.ndarray)
            if is_array and (image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size):
                raise DataError("an array", "not a picture, uint8 RGB [H, W, 3]")
        pages = [Page("a picture", image) for image in images]
        stream = predict(self.network, pages, self.device, lambda page, found: found)
        results = [found for _, found in stream]
        return results if isinstance(picture, list) else results[0]


# ---------------------------------------------------------------- pictures


def draw_picture(page, polygons, scores, folder):
    """Write a page with what was found as a JPEG, to `picture_file`. Raises OSError."""
    image = draw_page(pictures.read_image(page.path), page, polygons, scores)
    write_picture(picture_file(page, folder), image)


def try_drawing(page, found, folder):
    """Draw a page if there is a folder. Returns an error to print at the end, or None."""
    if not folder:
        return None
    try:
        return draw_picture(page, *found, folder)
    except OSError as error:
        return f"{error.filename}: not drawn ({error.strerror})"


# ---------------------------------------------------------------- threshold tuning


def maps_path(source, pages, hp, device):
    """Where the maps of a checkpoint on pages are kept: in maps/ beside it, under a name made of
    the digests of all that the maps depend on, so that no other maps are ever taken for them."""
    path = Path(source.path)
    look = hp.look and (hp.text_height or TEXT_HEIGHT)
    kind = str(amp_dtype(hp.amp, device))
    made_of = [pictures.picture_digest(path), hp.size, hp.fit, look, kind, 3]
    made_of += [(page.name, page_digest(page)) for page in pages]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    return path.parent / "maps" / f"{path.stem}-{key}.npz"


def cached_maps(source, pages, hp, device):
    """Maps of a checkpoint on pages, predicted or from `maps_path`: list of (uint8 [h, w], scale
    [2]), in the order of pages."""
    path = maps_path(source, pages, hp, device)
    if path.exists():
        try:
            with np.load(path) as file:
                return [(file[str(i)], scale) for i, scale in enumerate(file["scales"])]
        except Exception:  # noqa: BLE001 (zipfile and numpy raise what the damaged bytes lead to)
            print(f"warning: {path}: damaged, predicting again", file=sys.stderr)

    network = source.network(device)._replace(hp=hp)
    stream = predict_each([network], pages, device, lambda page, maps: maps[0])
    maps = [np.ascontiguousarray(prob) for _, prob in stream]
    scales = np.array([m.shape[::-1] for m in maps]) / [page.size for page in pages]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, scales=scales, **{str(i): prob for i, prob in enumerate(maps)})
    try:
        replace_file(path, buffer.getbuffer())
    except OSError as error:  # the run may lie on a disk that is read-only
        print(f"warning: {path}: maps are not kept ({error.strerror})", file=sys.stderr)
    return list(zip(maps, scales))


def held_out_pages(sources, folder=None, image_dir=None):
    """The pages that each of several fold runs held out, by the record in its checkpoint. folder:
    where the data lie now, if not where the runs found them. Raises DataError when the runs are not
    different folds of one split or the pages are not there."""
    first = sources[0].state["hparams"]
    for source in sources:
        check_same_split(source, sources[0].path, first)
    folder = data.resolve_data(folder or data.set_names(first.data)[0])
    labels = load_labels(folder, "train", image_dir or first.image_dir or None)
    labels = {page.name: page for page in labels}

    owner, page_lists = {}, []
    for source in sources:
        names = sorted(source.state["scores"]["pages"])
        for name in names:
            if name not in labels:
                raise DataError(source.path, f"its held-out page {name} is not in the data")
            if owner.setdefault(name, source.path) != source.path:
                problem = f"page {name} is held out by {owner[name]} too"
                raise DataError(source.path, problem, "give one run a fold")
        page_lists.append([labels[name] for name in names])
    return page_lists


def check_same_split(source, path, first):
    """Raises DataError unless a source is a fold run of the same split as that of `path`, whose
    Hparams are `first`."""
    hp = source.state["hparams"]
    for key in ("data", "image_dir", "folds", "split", "size", "fit", "shrink_ratio"):
        if getattr(hp, key) != getattr(first, key):
            problem = f"{key} is {getattr(hp, key)!r}, in {path} {getattr(first, key)!r}"
            raise DataError(source.path, problem, "tuning needs folds of one split")
    if not hp.folds or not source.state.get("scores", {}).get("pages"):
        problem = "not a fold run with a finished epoch"
        raise DataError(source.path, problem, "tune one run, or all its folds")


def check_target(path, sources):
    """Raises UsageError when --write cannot put values into path."""
    exists = Path(path).exists()
    new_checkpoint = path.endswith(".pt") and len(sources) == 1 and not exists
    if not path.endswith(".json") and not new_checkpoint:
        raise UsageError(f"--write {path}", "not a .json file or, of one source, a new .pt file")
    if exists:
        read_hparams(path)  # what is wrong with it is said before the tuning


def write_setting(path, source, values):
    """Put values into a copy of the checkpoint (.pt) or an hparams file (.json), new or not."""
    hp = {**asdict(source.state["hparams"]), **values}
    if path.endswith(".pt"):
        return save_checkpoint(path, {**source.state, "hparams": hp})
    if Path(path).exists():
        hp = {**read_hparams(path), **values}
    else:
        for key in ("name", "folds", "fold", "split", "stop_epoch", "workers", "init"):
            del hp[key]  # of this run alone
    write_json(path, hp, indent=1)


def run_tune(args, overrides):
    """evaluate.py --tune. Raises DataError."""
    if args.write:
        check_target(args.write, args.sources)
    sources = [load_source(path) for path in args.sources]
    for source in sources[1:]:
        source.state.pop("optimizer", None)  # those of all folds would fill the memory
    first = sources[0]
    first.override(overrides)

    # fold runs are tuned on what each held out
    if len(sources) > 1:
        page_lists = held_out_pages(sources, args.data, args.image_dir)
    else:
        page_lists = [labelled_pages(args, first)]
    pages = [page for part in page_lists for page in part]
    if not any(page.polygons for page in pages):
        raise DataError("--tune", "the pages have no labels")
    if args.split == "test":
        print("warning: test pages choose the thresholds: no test score any more", file=sys.stderr)

    maps, seen = [], Counter()
    for source, part in zip(sources, page_lists):
        seen.update(warn_of_leaks(source, part))
        maps += cached_maps(source, part, first.hp, args.device)
    del seen["tuned"]  # the thresholds are chosen anew

    parts = np.repeat(range(len(page_lists)), [len(part) for part in page_lists])
    if len(sources) == 1:
        parts = halves(bootstrap_groups(pages))
    grid = {key: (overrides[key],) if key in overrides else GRID[key] for key in TUNED}
    result, table = tune(maps, pages, parts, grid, first.hp, args.metric or "hmean", seen)
    chosen = {key: result["recommended"][key] for key in TUNED}
    picture = Path(first.path).parent / "tune.png"
    if args.json:
        print(json.dumps(result, default=lambda score: score.to_json()))
    else:
        print_tuning(result)
        print(f"{len(pages)} pages, cross-fitted over {len(set(parts))} parts; {picture}")
        if result["gain"].over.unit == "pages":
            print(data.NO_GROUPS)
    if args.write:
        tuned = ",".join(page_digest(page) for page in pages)
        write_setting(args.write, first, {**chosen, "tuned": tuned})
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
    values = {key: getattr(hp, key) for key in ("size", "fit", *DECODING)}
    if hp.look:
        values["size"] = "auto"
    return ", ".join(f"{key} {value}" for key, value in values.items())


def binned(x, y, unit):
    """Mean of y in up to 5 equally filled bins of x, as bars: (mean, label, [range, size])."""
    if not len(x):
        return []
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 6)))
    edges = np.resize(edges, max(len(edges), 2))  # of equal values: one bin, that of no width
    counts = np.histogram(x, edges)[0]
    means = np.histogram(x, edges, weights=y)[0] / np.maximum(counts, 1)
    bins = zip(means, edges, edges[1:], counts)
    return [
        (mean, f"{mean:.4f}", [f"{low:.0f} to {high:.0f}", f"{count} {unit}"])
        for mean, low, high, count in bins
    ]


def write_html(path, source, pages, found, rows, summary):
    """One HTML page. found: (polygons, scores) of pages; rows: {metric: rows [n, k]}."""
    details = [page_details(page, polygons) for page, (polygons, _) in zip(pages, found)]
    heights, hits = zip(*details)
    words = np.array([len(page_heights) for page_heights in heights])
    hmeans = rows["page"][:, 2]

    worst = []
    for n in np.argsort(hmeans, kind="stable")[:WORST].tolist():
        caption = f"{pages[n].name}: hmean {hmeans[n]:.4f}, {words[n]} words, {hits[n].sum()} hit"
        image = draw_page(pictures.read_image(pages[n].path), pages[n], found[n][0])
        worst.append((caption, embedded_picture(image)))

    lowest = min(int(20 * hmeans.min()), 15)
    counts, edges = np.histogram(hmeans, np.arange(lowest, 21) / 20)
    decoding = decoding_line(source.hp) if source.hp else "as in the file"
    blocks = report.scores_blocks(
        source.path,
        f"{words.sum()} words. Decoding: {decoding}.",
        {summary.names[metric]: score for metric, score in summary.scores.items()},
        summary.counts,
        pages=[(count, count, [f"{edge:.2f}"]) for count, edge in zip(counts.tolist(), edges)],
        density=binned(words, hmeans, "pages"),
        heights=binned(np.concatenate(heights), np.concatenate(hits).astype(float), "words"),
        worst=worst,
    )
    replace_file(path, report.page(source.path, blocks))


# ---------------------------------------------------------------- export


def export(source, path, overrides):
    """Write a checkpoint to share: as .onnx, see `engine.export_onnx`, or as a new .pt its averaged
    weights in half precision. Both hold their decoding and the pages they have seen, and no score:
    that was of other values. Raises DataError, UsageError."""
    hp = replace(source.hp, **overrides)
    state = source.state
    if path.endswith(".onnx"):
        about = {key: getattr(hp, key) for key in ("backbone", "size", "fit", *DECODING)}
        about |= {"input": "RGB 0..1", "epoch": state.get("epoch")}
        for way, digests in seen_digests(state.get("origin") or {}, hp).items():
            about[SEEN[way].replace(" ", "_")] = " ".join(sorted(digests))
        export_onnx(path, network_of(state, source.path, "cpu"), about)
        return print_rapidocr(path, hp)

    if not path.endswith(".pt") or Path(path).exists():
        raise UsageError(f"--export {path}", "not a new .pt file", "give one, or a .onnx file")
    weights = state.get("ema") or state["model"]
    weights = {key: value.half() if value.ndim > 1 else value for key, value in weights.items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise DataError(source.path, "weights beyond half precision", "give an .onnx file")
    shared = {key: state[key] for key in ("epoch", "origin") if key in state}
    save_checkpoint(path, {"model": weights, "hparams": asdict(hp), **shared})
    print(f"{path}: {Path(path).stat().st_size / 2**20:.1f} MiB")


# ---------------------------------------------------------------- scores


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


def found_on(args, source, pages, job, failed=None):
    """Yields (index, job(page, (polygons, scores))) of pages in their order: from a predictions
    file, or by a network, see `predict`. Raises DataError."""
    if source.regions is not None:
        check_pages(source, pages)
        work = lambda page: job(page, source.regions[page.name])
        return enumerate(data.map_threads(work, pages, "scoring"))
    if not args.json:
        print(decoding_line(source.hp))
    network = source.network(args.device, tile=args.tile or 0)
    return predict(network, pages, args.device, job, failed)


def print_speed(args, source, begin, found, remark=""):
    """How many pages and words there were, and of a network since `begin` how fast."""
    words = sum(len(polygons) for polygons, _ in found)
    line = f"{len(found)} pages{remark}, {words} words found"
    if source.hp:
        seconds = time.perf_counter() - begin
        line += f" in {seconds:.1f} s ({len(found) / seconds:.2f} images/s, {args.device})"
    print(line)


def judge_source(args, source, pages, folder=None):
    """What a Source finds on labelled pages: (polygons, scores) of each, {metric: rows [n, k]}, how
    it has seen them before, see `warn_of_leaks`, and what went wrong when the pages were drawn into
    a folder."""
    seen = warn_of_leaks(source, pages) if source.hp else {}

    def job(page, found):
        rows = [cleval.page_row(metric, page, found[0]) for metric in cleval.METRICS]
        return found, rows, try_drawing(page, found, folder)

    begin = time.perf_counter()
    with pictures.libjpeg_lines() as lines:
        results = [result for _, result in found_on(args, source, pages, job)]
    found, rows, problems = zip(*results)
    if not args.json:
        print_speed(args, source, begin, found)
    warn_of_damage(lines, pages)
    rows = dict(zip(cleval.METRICS, map(np.array, zip(*rows))))
    return found, rows, seen, problems


def score_labelled(args, source, other, pages):
    """Score a Source on labelled pages, and against another if not None. Returns the exit code."""
    found, rows, seen, problems = judge_source(args, source, pages, args.pictures)
    if args.out:
        write_predictions(args.out, pages, found)
    summary = summarise(pages, rows, seen)
    if args.html:
        write_html(args.html, source, pages, found, rows, summary)

    differences = {}
    if other:
        _, other_rows, other_seen, _ = judge_source(args, other, pages)
        groups = bootstrap_groups(pages)
        for metric, to_scores in cleval.METRICS.items():
            pair = rows[metric], other_rows[metric]
            differences[metric] = paired_difference(*pair, to_scores, groups, other_seen | seen)

    if args.json:
        result = summary.to_json()
        if other:
            result["compare"] = {metric: d.to_json() for metric, d in differences.items()}
        print(json.dumps(result))
    else:
        print_summary(summary)
        for metric, difference in differences.items():
            print(f"{difference}, vs {other.path}: {summary.names[metric]}")
    return print_problems(problems)


def find_words(args, source, pages):
    """Write, draw or list what a Source finds on pages without labels. Returns the exit code."""
    for page in pages:
        page.polygons = None  # nothing on them is a false alarm

    def job(page, found):
        return page, found, try_drawing(page, found, args.pictures)

    begin = time.perf_counter()
    failed = {}
    with pictures.libjpeg_lines() as lines:
        results = [result for _, result in found_on(args, source, pages, job, failed)]
    pages = [page for page, _, _ in results]
    found = [each for _, each, _ in results]
    if args.out:
        write_predictions(args.out, pages, found)
    print_speed(args, source, begin, found, " without labels, nothing to score")
    list_pages(args, pages, found)
    warn_of_damage(lines, pages)
    return print_problems([*failed.values(), *(problem for _, _, problem in results)])


def list_pages(args, pages, found):
    """Print pages without labels with the confidence that 90 % of their words reach: with --rank
    all, those to label next first (Lewis and Gale 1994); else the first 20, if no file keeps them.
    """
    rows = []
    for page, (_, scores) in zip(pages, found):
        least = np.quantile(scores, 0.1) if len(scores) else 0.0
        rows.append((least, len(scores), page.name))
    kept = args.out or args.pictures
    shown = sorted(rows) if args.rank else rows[: 0 if kept else 20]
    for least, words, name in shown:
        print(f"{words:4d} words, 90 % of them from {least:.4f}  {name}")
    if not kept:
        print("not kept: add --out predictions.json, or --pictures DIR to look")


def warn_of_damage(lines, pages):
    """Name the damaged ones of pages that were read, if libjpeg wrote any lines meanwhile."""
    rows = [("", page) for page in pages] if lines else []
    for kind, text in data.damaged_pictures(rows):
        print(f"{kind}:{text}", file=sys.stderr)


def print_problems(problems):
    """Print what went wrong with single pages. Returns the exit code."""
    problems = [problem for problem in problems if problem]
    for problem in problems:
        print_error(problem)
    return 1 if problems else 0


# ---------------------------------------------------------------- stress


class Stressed(NamedTuple):
    """Scores of one kind and level of augment.STRESS."""

    kind: str
    level: float
    scores: list  # interval.Score of each Source
    difference: Difference | None  # of the first less the second


def stressed_page(page, kind, level):
    """A labelled page as augment.STRESS changes it, its picture in place of its path."""
    image = pictures.read_image(page.path)
    image, polygons, cut = stress(image, page.polygons, kind, level)
    ignore = [skip or gone for skip, gone in zip(page.ignore, cut.tolist())]
    return replace(page, path=image, polygons=polygons, ignore=ignore, look=None)


def run_stress(args, sources, pages):
    """evaluate.py --stress: H-means of one or two Sources on pages changed by each kind and level of
    augment.STRESS. Returns the exit code."""
    networks = [source.network(args.device) for source in sources]
    groups = bootstrap_groups(pages)
    results = []
    for kind, levels in STRESS.items():
        for level in levels:
            rows = stress_rows(networks, pages, kind, level, args.device)
            scores = [make_score(own, cleval.mean_scores, groups) for own in rows]
            difference = None
            if len(rows) == 2:
                difference = paired_difference(*rows, cleval.mean_scores, groups)
            results.append(Stressed(kind, level, scores, difference))
            if not args.json:
                print_stressed(results[-1])

    if args.json:
        print(json.dumps([stressed_json(result) for result in results]))
    if args.html:
        names = [source.path for source in sources]
        replace_file(args.html, report.page("Stress", stress_blocks(names, results)))


def stress_rows(networks, pages, kind, level, device):
    """Rows of the page metric [n, 4] by each network, of pages changed alike."""

    def job(page, found):
        return cleval.page_row("page", page, found[0])

    rows = [[] for _ in networks]
    for start in range(0, len(pages), 50):  # their pictures are in memory
        changed = [stressed_page(page, kind, level) for page in pages[start : start + 50]]
        for network, own in zip(networks, rows):
            own += [row for _, row in predict(network, changed, device, job)]
    return [np.array(own) for own in rows]


def print_stressed(result):
    line = f"{result.kind} {result.level:g}: {result.scores[0]}"
    if result.difference:
        line += f"; {result.difference} to {result.scores[1].hmean:.4f}"
    print(line, flush=True)


def stressed_json(result):
    entry = {"kind": result.kind, "level": result.level}
    entry["scores"] = [score.to_json() for score in result.scores]
    if result.difference:
        entry["difference"] = result.difference.to_json()
    return entry


def stress_blocks(names, results):
    """Blocks of report.page: a curve a kind, its interval as a band."""
    yield "#", "Stress: H-mean of changed pages"
    yield "p", "Blue, with its 95 % interval: " + "; grey: ".join(names)
    for kind in STRESS:
        points = [result for result in results if result.kind == kind]
        lowest = min(score.interval[0] for point in points for score in point.scores)
        plot = report.Plot((0, len(points) - 1), (min(0.9, lowest), 1), 560, 200)
        plot.axes([(k, f"{point.level:g}") for k, point in enumerate(points)], kind)

        lows = [(k, point.scores[0].interval[0]) for k, point in enumerate(points)]
        highs = [(k, point.scores[0].interval[1]) for k, point in enumerate(points)]
        plot.line(lows + highs[::-1], "band")
        for number in reversed(range(len(names))):
            curve = [(k, point.scores[number].hmean) for k, point in enumerate(points)]
            plot.line(curve, "best" if number == 0 else "other")
        yield "figure", kind, plot.svg(f"H-mean, {kind}", "narrow")


# ---------------------------------------------------------------- command line


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
    add("--stress", action="store_true", help="score them turned, scaled, blurred, dark, noisy")
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
    add_flags(parser, OVERRIDES, "values (default: the checkpoint's)")
    args = parser.parse_args(argv)
    args.source = args.sources[0]
    return args


def picture_pages(path):
    """Pages without known labels (None) of a picture, or of all pictures in a folder and below.
    Raises UsageError, DataError."""
    path = Path(path)
    if not path.exists():
        raise UsageError(path, "no such file or folder")
    folder, files = path.parent, [path]
    if path.is_dir():
        folder = path
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in PICTURES and p.is_file()]
    if not files:
        raise DataError(path, f"no picture in it ({' '.join(PICTURES)})")
    # a name whose bytes are not UTF-8 could not be written into a JSON file
    names = [os.fsencode(p.relative_to(folder)).decode("utf-8", "replace") for p in files]
    return [Page(name, file, None) for name, file in zip(names, files)]


def labelled_pages(args, source, other=None):
    """The labelled pages to score on: --data, or what the run validated on and, if it is compared
    with another run, of the first set that both have. Raises DataError."""
    if args.data:
        return load_labels(data.resolve_data(args.data), args.split or "val", args.image_dir)
    if not source.hp:
        raise UsageError(source.path, "needs labels to be scored", "add --data")
    hp = source.hp
    names = data.set_names(hp.data)
    if other and other.hp:
        shared = [name for name in names if name in data.set_names(other.hp.data)]
        if shared and names + data.set_names(other.hp.data) != 2 * shared:
            print(f"pages: those of {shared[0]}, which both runs have", file=sys.stderr)
            hp = replace(hp, data=shared[0])
    if not all(data.resolve_data(name).exists() for name in data.set_names(hp.data)):
        problem = f"the pages of its run, {hp.data}, are not here"
        raise UsageError(source.path, problem, "name pages by --data or --images")
    return data.run_pages(hp)[1]


def refuse_idle(args, rules):
    """Raises UsageError on an idle flag. rules: (flags, whether they have an effect, the reason why
    not)."""
    for flags, effective, reason in rules:
        if effective:
            continue
        for flag in flags.split():
            value = vars(args)[flag]
            if value is not None and value is not False:
                raise UsageError(f"--{flag.replace('_', '-')}", reason, "leave it out")


def check_scoring_flags(args):
    """Raises UsageError on flags that have no effect, or not together."""
    scoring = not args.tune and not args.export
    networks = not any(source.endswith(".json") for source in args.sources)
    values = " ".join(("hparams", *OVERRIDES))
    several = len(args.sources) > 1
    rules = [
        ("metric write", args.tune, "only with --tune"),
        ("compare images tile rank out html pictures", scoring, "not with --tune or --export"),
        ("out pictures tile images", not args.stress, "not with --stress"),
        ("stress", scoring and networks, "only with a checkpoint to score"),
        ("export hparams", not args.tune, "not with --tune"),
        ("data split image_dir json", not args.export, "not with --export"),
        (f"images export tune tile {values}", networks, "only with a checkpoint"),
        ("data", not args.images, "not with --images"),
        ("split", not several, "not with folds, each on what it held out"),
        ("split image_dir", args.data or several, "only with --data"),
        ("tile", args.tile is None or args.tile >= 32, "at least 32 page pixels are needed"),
    ]
    refuse_idle(args, rules)
    if several and not args.tune:
        raise UsageError("several sources", "only with --tune", "to compare two: --compare")


def read_overrides(args):
    """{key: value} of --hparams < flags that replace a checkpoint's. Raises DataError."""
    values = read_hparams(args.hparams) if args.hparams else {}
    values = {key: values[key] for key in (*OVERRIDES, "look", "tuned") if key in values}
    if args.size == "auto":
        args.size = None
        return choose_look(values | given_flags(args, OVERRIDES) | {"size": "auto"})
    return choose_look(values | given_flags(args, OVERRIDES))


def choose_look(values):
    """Values of OVERRIDES, where size is a number or "auto", with the look that it stands for."""
    if values.get("size") == "auto":
        return {key: value for key, value in values.items() if key != "size"} | {"look": True}
    if "size" in values and "look" not in values:
        return values | {"look": False}
    return values


def check_outputs(outputs, inputs, pages, derived=()):
    """Raises UsageError where an output would replace an input, a page's picture or its label file
    or, under a derived name, any file; OSError where one cannot be written. Paths may be None."""
    files = [file for page in pages for file in (page.path, page.source)]
    guard(outputs, [*inputs, *files], derived)
    for path in filter(None, (*outputs, *derived)):
        check_writable(path)


def run(args):
    check_scoring_flags(args)
    overrides = read_overrides(args)
    works = not args.export and not args.source.endswith(".json")
    args.device = choose_device(args.device, works)
    if args.tune:
        return run_tune(args, overrides)
    source = load_source(args.source)
    if args.export:
        return export(source, args.export, overrides)

    if overrides:
        source.override(overrides)
    other = load_source(args.compare) if args.compare else None
    pages = picture_pages(args.images) if args.images else labelled_pages(args, source, other)
    labelled = any(page.polygons for page in pages)
    rules = [
        ("compare html json stress", labelled, "the pages have no labels"),
        ("rank", not labelled, "the pages have labels"),
    ]
    refuse_idle(args, rules)
    check_outputs([args.out, args.html], [args.source, args.compare, args.hparams], pages)
    if args.pictures:
        drawn = [picture_file(page, args.pictures) for page in pages]
        guard(drawn, [page.path for page in pages])
    if args.stress:
        return run_stress(args, [source, other] if other else [source], pages)
    if labelled:
        return score_labelled(args, source, other, pages)
    return find_words(args, source, pages)


def main(argv=None):
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
