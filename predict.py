"""What does a network find on pages? Pages load ahead of the network and are cut into tiles.
Tiles are batched by shape, predicted and pasted into maps. `predict_each` makes the maps,
`predict` decodes them into words."""

import math
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch

import data
import pictures
from db_postprocess import decode_page, polygon_area
from engine import launch
from files import DataError
from hparams import Hparams
from mistakes import short_sides
from progress import progress

FIRST_LOOK = 512  # px, root of the page's area, at the first look of --size auto
LOOK_HP = Hparams(fit="area", thresh=0.25, box_thresh=0.45, unclip_ratio=0.0)  # for decoding it
LOOK_SCORE = 0.6  # mean score of words that a look can be trusted with
LOOK_SIDES = (320, 1600)  # map px, least and most root of the text box's area
LOOK_ENLARGED = 2  # map px per page px, at most
LOOK_PAGES = 256  # looked at before they are read
LOOK_STEP = 64  # sides read are multiples of it: engines generate code for each shape

# ---------------------------------------------------------------- networks


class Network(NamedTuple):
    """A model, or what `engine.load_engine` makes of it, with its Hparams. sizes: the page sizes of
    the maps that are averaged; empty for hp.size alone. tile: if not 0, a page is scaled by
    hp.size / tile; a page whose `page_factor` is already that large gets no map from this network.
    """

    model: Callable
    hp: Hparams
    sizes: tuple = ()
    tile: int = 0

    def hp_by_size(self):
        """Its Hparams at each of the page sizes."""
        if not self.sizes:
            return [self.hp]
        return [replace(self.hp, size=size, look=False) for size in self.sizes]


def flipped(model):
    """Test-time flip: logits of the mean probability of a page and its mirror image."""

    def logits(pages):  # uint8 [B, H, W, 3] -> [B, 1, H, W]
        page, mirrored = model(torch.cat([pages, pages.flip(2)])).float().sigmoid().chunk(2)
        return torch.logit((page + mirrored.flip(3)) / 2, eps=1e-6)

    return logits


# ---------------------------------------------------------------- how large a page is read


class Look(NamedTuple):
    """What the first look measures on a page: the box and the height of its text."""

    box: tuple  # left, top, right, bottom, page px
    line: float  # median height of a word, page px
    score: float  # mean of the words
    sideways: bool  # whether lines run up or down


def page_factor(page, hp):
    """The factor by which a page is scaled for a network. It fits the page to hp.size. After a
    first look, it scales the text to hp.text_height, within LOOK_SIDES and LOOK_ENLARGED."""
    if not (hp.look and page.look):
        return pictures.fit_factor(page.size, hp)
    left, top, right, bottom = page.look.box
    side = ((right - left) * (bottom - top)) ** 0.5
    factor = hp.text_height / page.look.line
    low, high = LOOK_SIDES
    return min(max(factor, low / side), high / side, LOOK_ENLARGED)


def map_shape(page, hp):
    """(rows, columns) of the map of a page."""
    return pictures.scaled(page.size, page_factor(page, hp))[::-1]


def take_looks(network, pages, device):
    """Yields pages. LOOK_PAGES of them at a time are predicted at FIRST_LOOK px before, which sets
    page.look; None where no text is found, or where a page cannot be read.

    A page without words, or on which words score low, is predicted again at twice that size: lines
    of small print run together into words that are several lines high and score low.

    Looks are decoded with the thresholds of LOOK_HP, not with the network's own. A look decides at
    which size the map is made, so a map would depend on thresholds, and --tune could not try all of
    them on the same maps."""

    def job(page, found):
        page.look = look_at(page, *found)

    for start in range(0, len(pages), LOOK_PAGES):
        portion = pages[start : start + LOOK_PAGES]
        looking = portion  # all of them at first, then those that one look is not enough for
        for size in (FIRST_LOOK, 2 * FIRST_LOOK):
            own = {key: getattr(network.hp, key) for key in ("amp", "shrink_ratio")}
            quick = replace(LOOK_HP, size=size, **own)
            for _ in predict(Network(network.model, quick), looking, device, job, {}):
                pass
            looking = [p for p in looking if not p.look or p.look.score < LOOK_SCORE]
        yield from portion


def look_at(page, polygons, scores):
    """The Look of a page from the N polygons [P, 2] found on it and their scores [N]; None if there
    are none."""
    if not polygons:
        return None
    line = float(np.median(short_sides(polygons)))
    points = np.concatenate(polygons)
    sides = np.array([np.ptp(polygon, axis=0) for polygon in polygons])
    upright = sides[:, 0] >= sides[:, 1]
    sideways = sides[~upright].sum() > sides[upright].sum()  # long lines count for more
    margin = 3 * line + 0.03 * max(page.size)  # the first look can miss faint text at the edges
    low = (points.min(0) - margin).clip(0, page.size)
    high = (points.max(0) + margin).clip(0, page.size)
    box = (*low.tolist(), *high.tolist())
    return Look(box, max(line, 1.0), np.mean(scores), sideways)


def reading_hp(page, hp):
    """Hparams to open a page with. After a first look size is the longer side that `page_factor`
    gives the page, so that `pictures` decodes no more pixels than are needed."""
    if not (hp.look and page.look):
        return hp
    longer = math.ceil(page_factor(page, hp) * max(page.size))
    return replace(hp, fit="longer", size=longer)


# ---------------------------------------------------------------- from pages to maps


class Sheet(NamedTuple):
    """The map of a page by one network at one size."""

    network: int
    prob: np.ndarray  # uint8 [H', W'], H' and W' multiples of 32: the map, filled tile by tile
    shape: tuple  # its rows and columns without padding


@dataclass
class PageUnderWay:
    """A page that still waits for maps of its tiles."""

    index: int
    sheets: list
    missing: int = 0  # tiles whose maps are not back yet


class Tile(NamedTuple):
    """A window of a page, at (y, x) of its sheet."""

    owner: PageUnderWay
    sheet: Sheet
    y: int
    x: int
    picture: np.ndarray  # uint8 [h, w, 3]
    sideways: bool = False  # the picture is turned by a quarter, counterclockwise


def predict_each(networks, pages, device, job, failed=None):
    """Yields (index, job(page, maps)) for each page that can be read, in order. maps: one map
    uint8 [h, w] for each network, except a tile network that skips the page. Page xy = map xy *
    page.size / map size. Sets page.size.

    A batch on a GPU holds tiles of one padded shape, so batching adds no padding. Jobs run in
    threads beside the networks. About 200 pages at most are in memory at a time. A page that
    cannot be read raises DataError; with a dict `failed`, failed[index] is the error instead."""
    assert not all(network.tile for network in networks)  # small pages would have no map
    looking = [network for network in networks if network.hp.look]
    looked = take_looks(looking[0], pages, device) if looking else pages
    threads = min(8, cv2.getNumberOfCPUs())
    batch_size = 8 if device.type == "cuda" else 1
    batches_ahead = 1 if device.type == "cuda" else 3
    pages_ahead = 4 if any(network.tile for network in networks) else 32
    load = partial(load_page, networks=networks, failed=failed)
    results = {}  # futures by index
    turn = 0  # the index whose result comes next
    bar = progress(desc="predicting", total=len(pages))
    with ThreadPoolExecutor(threads) as loaders, ThreadPoolExecutor(threads) as workers, bar:
        # pages are opened, scaled and cut into tiles ahead of the networks
        loading = (loaders.submit(load, index, page) for index, page in enumerate(looked))
        loaded = (future.result() for future in run_ahead(loading, pages_ahead))

        # tiles go through their network in batches; the next ones run while one is pasted
        batches = batch_tiles(loaded, batch_size)
        launched = (start_batch(networks, tiles, device) for tiles in batches)
        for tiles, wait in run_ahead(launched, batches_ahead):
            # the maps of the tiles are pasted; the job of a page starts after its last tile
            for tile, prob in zip(tiles, wait().numpy()):
                paste(tile, prob)
                owner = tile.owner
                owner.missing -= 1
                if not owner.missing:
                    work = job, networks, pages[owner.index], owner.sheets
                    results[owner.index] = workers.submit(run_job, *work)
                    bar.update()

            # results leave in the order of the pages
            while turn in results or (failed and turn in failed):
                if turn in results:
                    if len(results) <= 64 and not results[turn].done():
                        break
                    yield turn, results.pop(turn).result()
                turn += 1
        for index in sorted(results):
            yield index, results[index].result()


def run_ahead(started, count):
    """Yields the items of `started`, `count` items late. Drawing an item from `started` starts
    its work, so `count` items are at work while the caller uses one."""
    waiting = deque()
    for item in started:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def load_page(index, page, networks, failed):
    """The tiles of a page for each network and page size; sets page.size. Raises DataError; with a
    dict `failed`, failed[index] is the error and the list is empty."""
    views = [(k, hp) for k, network in enumerate(networks) for hp in network.hp_by_size()]
    smallest_tile = min((network.tile for network in networks if network.tile), default=0)
    under_way = PageUnderWay(index, [])
    tiles = []
    try:
        if isinstance(page.path, np.ndarray):  # a Detector's picture
            image, page.size = page.path, page.path.shape[1::-1]
        else:
            hps = [reading_hp(page, hp) for _, hp in views]
            if smallest_tile:  # tiles are scaled by hp.size, whatever a look says
                hps += [hp for _, hp in views]
            image = data.open_page(page, hps, smallest_tile)
        for k, hp in views:
            tiles += cut_page(image, page, hp, k, networks[k].tile, under_way)
    except DataError as error:
        if failed is None:
            raise
        failed[index] = DataError(*error.args)  # its traceback holds the file's bytes
        return []
    under_way.missing = len(tiles)
    return tiles


def cut_page(image, page, hp, network, tile, under_way):
    """The Tiles of a page for one network at one size; adds their Sheet to `under_way`.

    Without `tile`, the page is scaled by `page_factor` and is one Tile, or its text box is one if
    it has a Look. With `tile`, the page is scaled by hp.size / tile and cut into windows of
    hp.size that overlap by 1/4 or more; no Tiles if `page_factor` is already that large."""
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
    is_look = hp.look and page.look and not tile
    image = data.resize_page(image, width, height, LOOK_STEP if is_look else 32)

    sheet = Sheet(network, np.zeros(image.shape[:2], np.uint8), (height, width))
    under_way.sheets.append(sheet)
    if is_look:
        return [cut_look(image, page.look, factor, sheet, under_way)]
    rows, columns = (window_starts(length, window or length) for length in image.shape[:2])
    corners = [(y, x) for y in rows for x in columns]
    parts = [image[y:, x:][:window, :window] for y, x in corners]
    return [Tile(under_way, sheet, y, x, part) for (y, x), part in zip(corners, parts)]


def cut_look(image, look, factor, sheet, under_way):
    """The Tile of a Look's box, whose sides are multiples of LOOK_STEP; the map stays 0 outside it.
    Text that lies on its side is turned: networks read lines best, also upside down."""
    low, high = factor * np.array(look.box).reshape(2, 2)
    low = low.astype(int)
    most = np.array(image.shape[1::-1])  # multiples of LOOK_STEP, too
    sides = np.ceil((high - low) / LOOK_STEP).astype(int) * LOOK_STEP
    sides = np.minimum(sides, most)
    left, top = np.minimum(low, most - sides)
    width, height = sides
    part = image[top : top + height, left : left + width]
    place = sheet._replace(prob=sheet.prob[top:, left:])
    if look.sideways:
        part = np.rot90(part)
    return Tile(under_way, place, 0, 0, part, look.sideways)


def window_starts(length, window):
    """Starts of windows that cover `length` and overlap by at least a quarter."""
    spare, stride = max(length - window, 0), window * 3 // 4
    return [min(start, spare) for start in range(0, spare + stride, stride)]


def batch_tiles(pages, batch_size):
    """Yields lists of up to `batch_size` tiles of one network and one shape. A tile waits for at
    most 128 pages."""
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


def start_batch(networks, tiles, device):
    """Start a batch of tiles on their network: (tiles, wait), see `engine.launch`."""
    network = networks[tiles[0].sheet.network]
    batch = np.stack([tile.picture for tile in tiles])
    return tiles, launch(network.model, batch, network.hp.amp, device)


def paste(tile, prob):
    """Copy a tile's map [h, w] into its sheet. Its first eighth, along each axis, is left to an
    earlier tile."""
    if tile.sideways:
        prob = np.rot90(prob, -1)
    height, width = prob.shape
    top = height // 8 if tile.y else 0
    left = width // 8 if tile.x else 0
    place = tile.sheet.prob[tile.y :, tile.x :]
    place[top:height, left:width] = prob[top:, left:]


def run_job(job, networks, page, sheets):
    """Crop the maps of a page, average those of network.sizes, return job(page, maps)."""
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


# ---------------------------------------------------------------- from maps to words


def predict(network, pages, device, job, failed=None):
    """Yields (index, job(page, found)) for each page that can be read, in order. found: N polygons
    [P, 2] in page px and their scores [N], the highest first. failed: see `predict_each`."""

    def decode(page, maps):
        found = [decode_page(prob, page.size, network.hp) for prob in maps]
        if len(found) == 1:  # no map of tiles
            return job(page, found[0])
        return job(page, join_looks(*found, network.tile / 8))

    looks = [network._replace(tile=0), network] if network.tile else [network]
    return predict_each(looks, pages, device, decode, failed)


def join_looks(whole, tiled, limit):
    """Merge (polygons, scores) of a whole page with those of its tiles.

    Tiles cut tall words: a word of the whole page that is taller than `limit` px replaces the
    words of the tiles inside it, unless these fill it: then it is a block of small print."""
    polygons, scores = [*tiled[0]], [*tiled[1]]
    middles = [polygon.mean(0).tolist() for polygon in polygons]
    heights = short_sides(polygons)
    areas = np.array([polygon_area(polygon) for polygon in polygons])
    dropped = set()
    for outline, score, height in zip(*whole, short_sides(whole[0])):
        if height <= limit:
            continue
        border = outline.astype(np.float32)
        inside = [n for n, xy in enumerate(middles) if cv2.pointPolygonTest(border, xy, False) > 0]
        small = max(heights[inside], default=height) < height / 2
        if small and areas[inside].sum() > polygon_area(outline) / 2:
            continue
        dropped.update(inside)
        polygons.append(outline)
        scores.append(score)
    order = np.argsort(-np.array(scores), kind="stable").tolist()
    kept = [n for n in order if n not in dropped]
    return [polygons[n] for n in kept], np.array([scores[n] for n in kept])
