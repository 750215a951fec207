"""What is a sample? A picture and its labelled words, checked, brought to the size of training and
augmented; and which pages are trained on.

python data.py check DATA [--pictures OUT]    what DATA holds and what will go wrong
python data.py diff OLD NEW                   labels added, removed and moved, by page
python data.py synth OUT --pages 64 --seed 0  draw synthetic receipts with exact labels
python data.py split DATA --folds 5           stratified, grouped folds as one JSON with a hash
python data.py convert DATA OUT --to paddle   labels from one format to another

DATA is a folder (train.json, val.json, test.json, or these in jsons/, and images/; or ICDAR's
gt_*.txt, PaddleOCR's Label.txt, labelme's *.json, COCO's as CVAT, Label Studio and Roboflow name
them) or one label file with its pictures beside it."""

import contextlib
import fcntl
import io
import itertools
import json
import os
import shutil
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np
import shapely

import formats
import labels
from augment import (
    PAD_COLOUR,
    augment_colours,
    augment_photograph,
    draw_canvas,
    draw_homography,
    draw_pose,
    warp_page,
)
from command import Parser, resolve_hparams
from db_postprocess import split_outlines
from drawing import SAMPLE_COLOURS, draw_legend, write_picture
from files import (
    DataError,
    UsageError,
    exit_code,
    guard,
    new_folder,
    read_json,
    replace_file,
    shown,
    text_aside,
    write_json,
)
from habits import LOOKED_AT, describe_habits, describe_tilt, page_changes
from hparams import FITS, Hparams
from mistakes import short_sides
from overlap import expand, join_vertices
from pictures import bytes_digest, fit_factor, libjpeg_lines, open_picture, read_page, scaled
from progress import progress
from synth import synthetic_page
from targets import make_targets, pixel_window

NEAR_DUPLICATE = 0.97  # correlation of thumbnails; copies: 1.00, receipts of one shop: up to 0.96
SAME_TEXTS = 0.95  # shared transcriptions; one receipt: 0.97 and more, of one shop: up to 0.92
NO_GROUPS = "no page names its group: if a shop has several pages, intervals are too narrow"
FICLONE = 0x40049409  # ioctl: share the blocks of another file (btrfs, XFS)
RESERVE = 2**32  # bytes of the disk that --cache leaves for checkpoints
ALIKE = 8  # batches drawn together and sorted by the shape of their pages

# ---------------------------------------------------------------- inspected pages


def open_page(page, hps, tile=0):
    """pictures.open_picture of a page that a label file could name. Raises DataError."""
    labels.check_name(page.name, shown(page.name))  # what is predicted has to be read back
    return open_picture(page, hps, tile)


def map_threads(function, items, desc):
    """[function(item) for item in items] on threads (OpenCV frees the interpreter)."""
    with ThreadPoolExecutor(min(16, cv2.getNumberOfCPUs())) as pool:
        return list(progress(pool.map(function, items), desc, len(items)))


def inspect_pages(pages, desc="reading pages"):
    """Open every picture once, under a bar named `desc`. Each page gets its size (width, height);
    digest, of the picture's bytes; thumbnail [1024], for `near_duplicates`; repaired, the words as
    training takes them. Returns the contrast of each page's labels, see `label_contrast`, or None
    where a picture has none. Raises DataError on the last picture that cannot be read, with the
    others as its `others`."""

    def inspect(page):
        try:
            image = open_page(page, [Hparams(fit="area")])
        except DataError as error:
            return DataError(*error.args)  # without its traceback, which holds the file's bytes
        page.thumbnail = thumbnail(image)
        if page.polygons is not None:  # a picture with labels
            page.repaired = repair_words(page)
            return label_contrast(page, image)

    results = map_threads(inspect, pages, desc)
    labels.raise_together([result for result in results if isinstance(result, DataError)])
    return results


def label_contrast(page, image):
    """Standard deviation of grey in the box around each of a page's first LOOKED_AT labels [N]: a
    box without ink has little. image: the page, shrunk or not."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = image.shape[1] / page.size[0]
    windows = [pixel_window(p * scale, 0, *grey.shape) for p in page.polygons[:LOOKED_AT]]
    return np.array([grey[window].std() if grey[window].size else 0 for window in windows])


# ---------------------------------------------------------------- sizes


def resize_page(image, w, h, step=32):
    """A page [H, W, 3] uint8 brought to w x h, padded right and below to multiples of `step`."""
    method = cv2.INTER_AREA if w < image.shape[1] else cv2.INTER_LINEAR
    image = cv2.resize(image, (w, h), interpolation=method)
    below, right = -h % step, -w % step
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=PAD_COLOUR)


# ---------------------------------------------------------------- samples


class Repaired(NamedTuple):
    """The N words of a page as training takes them."""

    polygons: list  # N arrays [P, 2], page pixels
    ignore: list  # N bools
    counts: dict  # {kind of repair: how many words}


def repair_words(page):
    """The words of a page (with page.size) made fit for training, a Repaired. The rule, in this
    order: a self-crossing outline becomes its convex hull; a word with an area under 1 px^2 or more
    than half of it outside the page is ignored; a smaller part outside the page is cut off."""
    # all words at once: their outlines, or hulls, and what of them is on the page
    polygons = [*page.polygons]
    points, sizes = join_vertices(polygons)
    owner, _ = expand(sizes)
    shapes = shapely.polygons(shapely.linearrings(points, indices=owner))
    crossing = ~shapely.is_valid(shapes)
    shapes = np.where(crossing, shapely.convex_hull(shapes), shapes)
    inside = shapely.intersection(shapes, shapely.box(0, 0, *page.size))
    area = shapely.area(shapes)
    left = shapely.area(inside)

    # what is kept; of that, outlines that are changed
    kept = (area >= 1) & (left >= area / 2)
    crossing &= kept
    clipped = kept & (left < area - 1e-6)
    for i in np.flatnonzero(crossing | clipped):
        part = max(shapely.get_parts(inside[i]), key=shapely.area)
        polygons[i] = shapely.get_coordinates(part.exterior)[:-1]

    kinds = {
        "self-crossing": crossing,
        "zero-area": area < 1,
        "outside": (area >= 1) & ~kept,
        "clipped": clipped,
    }
    counts = {kind: int(words.sum()) for kind, words in kinds.items()}
    return Repaired(polygons, np.logical_or(page.ignore, ~kept).tolist(), counts)


class Receipts:
    """Training samples of inspected pages, a dataset for torch's DataLoader: [(epoch, i, H, W)] ->
    (page uint8 [H, W, 3], target maps uint8 [4, H, W]).

    The random draws of sample i in epoch e come from default_rng((seed, e, i)): they are the same
    in any process and in any order. cache: a folder that keeps decoded pages for all processes, as
    many as leave RESERVE of the disk free."""

    def __init__(self, pages, hp, cache=None):
        self.hp = hp
        self.cache = cache
        self.pages = []  # packed: a loader process gets arrays and not a million objects
        for page in pages:
            polygons, ignore, _ = page.repaired
            points, sizes = join_vertices(polygons)
            self.pages.append((page.path, page.size, points, sizes, np.array(ignore, bool)))

    def page(self, i):
        """Page i, uint8 [H, W, 3], shrunk where it will be scaled by less than half: bilinear
        sampling would skip pixels."""
        file = Path(self.cache or "", f"{i}.npy")
        if self.cache and file.exists():
            return np.load(file)

        image, size = read_page(self.pages[i][0], [self.hp])
        factor = fit_factor(size, self.hp)
        if factor < 0.5:
            image = cv2.resize(image, scaled(size, factor), interpolation=cv2.INTER_AREA)
        if self.cache and shutil.disk_usage(self.cache.parent).free > RESERVE:
            buffer = io.BytesIO()
            np.save(buffer, image)
            with contextlib.suppress(OSError):  # another process may have filled the disk
                replace_file(file, buffer.getbuffer())
        return image

    def __getitem__(self, key):
        """key: (epoch, i, H, W), H and W of the canvas; returns what the class describes."""
        epoch, i, *shape = key
        hp = self.hp
        rng = np.random.default_rng((hp.seed, epoch, i))
        _, size, points, sizes, ignore = self.pages[i]
        polygons = split_outlines(points, sizes)

        # page and words onto the canvas
        photo_rng = np.random.default_rng((hp.seed, epoch, i, 1))  # does not move the draws of rng
        pose = draw_pose(photo_rng, hp, tuple(shape))
        matrix = draw_homography(rng, hp, *size, fit_factor(size, hp), pose.centre, pose.quarters)
        image, polygons, cut = warp_page(
            self.page(i), polygons, matrix, tuple(shape), size, pose.bend, pose.ground
        )

        image = augment_colours(image, rng, hp)
        image = augment_photograph(image, photo_rng, hp)
        return image, make_targets(polygons, ignore | cut, *shape, hp.shrink_ratio)


def epoch_batches(pages, hp, epoch, step=32):
    """Batches of (epoch, i, H, W): a permutation of the pages, its start repeated so that the last
    batch is full. Pages of like shape go together, on the smallest canvas [H, W] that holds each at
    hp.size: a receipt fills half of a square, and the rest would be computed for nothing. Only
    ALIKE batches in a row are sorted by shape, so that epochs differ.

    Sides are multiples of 32, or of `step` where this costs less than 5 % of the canvas: on a GPU,
    64 leaves fewer canvases for cuDNN to choose its kernels for."""
    rng = np.random.default_rng((hp.seed, epoch))
    sides = np.array([scaled(page.size, fit_factor(page.size, hp)) for page in pages])  # [N, 2]
    sides = np.ceil(sides / 32).astype(int) * 32

    # pages in random order, those of like shape together
    count = -(-len(pages) // hp.batch) * hp.batch
    order = np.resize(rng.permutation(len(pages)), count)
    for k in range(0, count, ALIKE * hp.batch):
        part = order[k : k + ALIKE * hp.batch]  # a view: what is written into it changes `order`
        part[:] = part[np.lexsort(sides[part].T)]
    batches = rng.permutation(order.reshape(-1, hp.batch))

    # the smallest canvas that holds a batch, or one of any shape, which shows ground
    canvases = sides[batches].max(1)  # [B, 2]
    grounded = rng.random(len(canvases)) < hp.aug_ground * hp.aug_strength
    for k in np.flatnonzero(grounded):
        canvases[k] = draw_canvas(rng, hp)
    coarse = -(-canvases // step) * step
    cheap = coarse.prod(1) < 1.05 * canvases.prod(1)
    canvases = np.where(cheap[:, None], coarse, canvases).tolist()

    keys = []
    for batch, (w, h) in zip(batches.tolist(), canvases):
        keys.append([(epoch, i, h, w) for i in batch])
    return keys


# ---------------------------------------------------------------- duplicates, groups and folds


def thumbnail(image):
    """Normalised 32 x 32 high-pass picture of a page as a float32 vector [1024]."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32) - cv2.blur(small, (9, 9)).astype(np.float32)
    return small.ravel() / max(np.linalg.norm(small), 1e-6)


def stack_thumbnails(pages):
    """Thumbnails of inspected pages [N, 1024]."""
    return np.array([page.thumbnail for page in pages])


def near_duplicates(thumbnails, least=NEAR_DUPLICATE):
    """Yields pairs a < b of pages whose thumbnails [N, 1024] correlate above `least`: one picture
    in another size, quality or brightness, but not cropped or turned."""
    for k in range(0, len(thumbnails), 256):  # [256, N] at a time: 100 MB for 100,000 pages
        close = thumbnails[k : k + 256] @ thumbnails[k:].T > least
        yield from (np.argwhere(np.triu(close, 1)) + k).tolist()


def same_texts(pages):
    """Yields pairs a < b of pages that share more than 8 kinds of transcriptions and SAME_TEXTS of
    all that they have: one receipt in two pictures. Their hashes, 1024, find the candidates."""
    texts = [Counter(t for t in page.texts if t not in (None, "", "###")) for page in pages]

    counts = np.zeros((len(pages), 1024), np.float32)
    for words, row in zip(texts, counts):
        if len(words) <= 8:
            continue
        for word, count in words.items():
            row[zlib.crc32(word.encode(errors="replace")) % 1024] += count
    counts /= np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-6)

    for a, b in near_duplicates(counts, 0.9):
        shared = texts[a] & texts[b]
        either = texts[a] | texts[b]
        if len(shared) > 8 and shared.total() > SAME_TEXTS * either.total():
            yield a, b


def same_receipts(pages):
    """Pairs a < b of inspected pages that show one receipt, by picture or by text."""
    return itertools.chain(near_duplicates(stack_thumbnails(pages)), same_texts(pages))


def page_groups(pages):
    """Group number of each inspected page [N]: the index of its group's first page. Two pages are
    in one group if they share a `group`, show one receipt, or are linked by such pages."""
    group = np.arange(len(pages))
    first = {}  # {name of a group: its first page}
    named = []  # pairs of pages of one name
    for i, page in enumerate(pages):
        if page.group is not None:
            named.append((first.setdefault(page.group, i), i))

    # each pair joins the groups of its pages, under the lower number
    for a, b in itertools.chain(named, same_receipts(pages)):
        if group[a] != group[b]:
            low, high = sorted(group[[a, b]])
            group[group == high] = low
    return group


def make_folds(pages, groups, folds, seed=0):
    """Fold 1..folds of each page [N]: whole groups, balanced in pages, words and small words.
    Greedy: groups from the largest to the smallest (ties in random order), each into the fold that
    leaves the sums of the three quantities most even. Small words are shorter than the median over
    all pages. Raises UsageError when there are fewer groups than folds."""
    names, member = np.unique(groups, return_inverse=True)
    if not 2 <= folds <= len(names):
        raise UsageError("folds", f"{folds} of {len(names)} groups", "2 to that many are possible")

    # what each page brings [N, 3], as shares of the whole
    heights = [short_sides(p.polygons) / max(p.size) for p in pages]
    median = np.median(np.concatenate(heights)) if any(map(len, heights)) else 0
    load = np.array([(1, len(h), (h < median).sum()) for h in heights], float)
    load /= np.maximum(load.sum(0), 1)

    total = np.stack([np.bincount(member, column) for column in load.T], 1)  # of groups
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-total[order].sum(1), kind="stable")]
    sums = np.zeros((folds, 3))
    fold_of = np.zeros(len(names), int)
    for g in order:
        # sums of squares are lowest where they are even
        growth = (sums + total[g]) ** 2 - sums**2
        fold_of[g] = np.argmin(growth.sum(1))
        sums[fold_of[g]] += total[g]
    return fold_of[member] + 1


def split_json(pages, groups, folds, seed=0):
    """The split as a JSON object: {"folds", "seed", "hash", "images": {name: {"fold", "group"}}}.
    The hash is over the sorted (name, fold) pairs: equal hashes mean equal splits."""
    fold_of = make_folds(pages, groups, folds, seed).tolist()
    pairs = sorted((page.name, fold) for page, fold in zip(pages, fold_of))
    digest = bytes_digest(json.dumps(pairs).encode())
    images = {}
    for page, fold, group in zip(pages, fold_of, groups):
        images[page.name] = {"fold": fold, "group": pages[group].group or pages[group].name}
    return {"folds": folds, "seed": seed, "hash": digest, "images": images}


# ---------------------------------------------------------------- the pages of a run


def run_pages(hp):
    """(train pages, val pages, {set: val split} of the later sets that have one, split or None) of
    a run, all inspected. Train pages are those of all sets in hp.data; val pages those of the
    first: a fold of its train pages where hp.folds is set; else its val split or hp.val_data; else
    a tenth of its train pages by group. Raises DataError."""
    # the first set, with its val split if it has one
    first, *later = set_names(hp.data)
    folder = resolve_data(first)
    image_dir = hp.image_dir or None
    if later and image_dir:
        raise UsageError("--image-dir", "not with several sets", "give each an images/ folder")
    own = labels.load_labels(folder, "train", image_dir)
    val = []
    if not hp.folds and (hp.val_data or labels.has_split(folder, "val")):
        val = labels.load_labels(hp.val_data or folder, "val", image_dir)

    # the later sets
    train = own
    others = {}
    for name in later:
        folder = resolve_data(name)
        train = train + labels.load_labels(folder, "train")
        if labels.has_split(folder, "val"):
            others[name] = labels.load_labels(folder, "val")

    # train pages come first, then all that are held out of training
    pages = sum(others.values(), train + val)
    inspect_pages(pages)
    groups = page_groups(pages)  # over all sets: they may share receipts
    held = np.arange(len(pages)) >= len(train)

    # without a val split, some of the first set's train pages are held out
    split = None
    if not val:
        split, held[: len(own)] = hold_out(own, groups[: len(own)], hp)
        val = [page for page, skip in zip(own, held) if skip]
        train = [page for page, skip in zip(train, held) if not skip]
    warn_of_shared_groups(hp, pages, groups, held)
    return train, val, others, split


def hold_out(pages, groups, hp):
    """(split, which pages [N] are held out) of a set's train pages: fold hp.fold of hp.folds, or
    about a tenth. Raises DataError where all are of one group."""
    folds = hp.folds or min(10, len(set(groups.tolist())))
    if folds < 2:
        data = set_names(hp.data)[0]
        raise DataError(data, "no val split, and one group of pages", "see --val-data")
    split = split_json(pages, groups, folds)
    fold_of = np.array([split["images"][page.name]["fold"] for page in pages])
    if hp.folds:
        return split, fold_of == hp.fold

    # the folds that bring it near a tenth: that of a large group may have most of the pages
    sizes = np.bincount(fold_of)[1:]
    held = fold_of == 0  # none yet
    for fold, size in enumerate(sizes, 1):
        if held.sum() + size / 2 < len(pages) / 10:
            held |= fold_of == fold
    if not held.any():
        held = fold_of == sizes.argmin() + 1
    print(f"no val split: {held.sum()} of {len(pages)} pages held out by group", file=sys.stderr)
    return split, held


def warn_of_shared_groups(hp, pages, groups, held):
    shared = np.flatnonzero(held & np.isin(groups, groups[~held]))
    if len(shared):
        which = f"{len(shared)} val pages (first: {pages[shared[0]].path})"
        problem = "share a group with train pages; the score will be optimistic; see data.py check"
        print(f"warning: {hp.data}: {which} {problem}", file=sys.stderr)


# what scripts without --data use, drawn once: full receipts, and small ones that a CPU can learn
SYNTH_SETS = {
    "synth": {"count": 320, "seed": 0, "size": 1280, "words": 117},
    "synth-small": {"count": 160, "seed": 0, "size": 256, "words": 12, "difficulty": 0.3},
}


def set_names(data):
    """The sets of a --data value: one that exists, or with commas between. Raises UsageError."""
    names = [data] if os.path.exists(data) else data.split(",")
    if len({os.path.realpath(name) for name in names if name}) < len(names):
        raise UsageError(f"--data {data}", "a set without a name, or one that comes twice")
    return names


def resolve_data(data):
    """Path of one set; SYNTH_SETS are drawn under data/ on first use. Raises UsageError."""
    if len(set_names(data)) > 1:
        raise UsageError(data, "several sets", "name one; train.py alone takes more")
    if data not in SYNTH_SETS or Path(data).exists():
        return Path(data)
    folder = Path("data", data)
    synth(folder, **SYNTH_SETS[data])
    return folder


def load_splits(data, image_dir=None, categories=()):
    """{split: pages} of every split that DATA names; where it names none, {None: its pages}."""
    splits = [s for s in labels.SPLITS if labels.has_split(data, s)] or [None]
    sets = labels.gather(
        lambda split: labels.load_labels(data, split, image_dir, categories), zip(splits)
    )
    return dict(zip(splits, sets))


def page_files(pages):
    """Paths of all files that pages are read from: pictures, labels, and the meta.json beside each
    file of labels. Some are None, or do not exist."""
    files = [path for page in pages for path in (page.path, page.source)]
    return files + [Path(page.source).with_name("meta.json") for page in pages if page.source]


def describe(pages):
    """Counts of inspected pages on one line, zeros left out."""
    words = [len(page.polygons) for page in pages]
    counts = Counter(pages=len(pages), words=sum(words))
    counts["words a page (median)"] = np.median(words or [0])
    counts["without text"] = words.count(0)
    for page in pages:
        counts.update(ignored=sum(page.ignore), **page.repaired.counts)
    return ", ".join(f"{n:.9g} {kind}" for kind, n in counts.items() if n)


def scaled_heights(pages, hp):
    """How high words become, px of hp.size: an array a page, of inspected pages with words."""
    return [short_sides(p.polygons) * fit_factor(p.size, hp) for p in pages if p.polygons]


def text_height(pages, hp):
    """The median of `scaled_heights`, 0 without words."""
    heights = scaled_heights(pages, hp)
    return float(np.median(np.concatenate(heights))) if heights else 0.0


def describe_heights(pages, hp):
    """How high the words of inspected pages become, on one line, and whether that is enough."""
    median = text_height(pages, hp)
    if not median:
        return "no words: unlabelled, to be predicted and not scored"
    low = np.mean([np.median(h) < 10 for h in scaled_heights(pages, hp)])
    line = f"size {hp.size}, fit {hp.fit}: words {median:.1f} px high by the median"
    line += f", on {low:.0%} of pages under 10 px"
    if median < 10:
        line += " (too small to read: use a larger --size)"
    return line


# ---------------------------------------------------------------- check: what will go wrong


def check(data, hp, image_dir=None, pictures=None):
    """Print what DATA holds and what will go wrong; draw samples of its first split into a folder
    `pictures`. Raises DataError as training would."""
    with new_folder(pictures) if pictures else contextlib.nullcontext() as folder:
        # read all labels and pictures; what the label files state is kept to be compared
        splits = {split or "all": pages for split, pages in load_splits(data, image_dir).items()}
        rows = [(split, page) for split, pages in splits.items() for page in pages]
        pages = [page for _, page in rows]
        stated = [page.size for page in pages]
        with libjpeg_lines() as lines:
            contrasts = inspect_pages(pages)

        for split, some in splits.items():
            print(f"{split:5s} {describe(some)}")
            heights = [describe_heights(some, replace(hp, fit=fit)) for fit in FITS]
            for line in dict.fromkeys(heights):  # once where both fits have the same to say
                print(f"{split:5s} {line}")
        print(describe_tilt(pages))
        print(describe_habits(pages, contrasts))
        print_findings(
            left_out(pages if Path(data).is_dir() else ()),  # a file may hold one split of several
            damaged_pictures(rows if lines else []),
            turned_pages(rows),
            other_sizes(rows, stated),
            shown_twice(rows),
            shared_groups(rows),
        )
        if pictures:
            draw_samples(next(iter(splits.values())), hp, folder)
            print(f"{pictures}: samples as training sees them")
    if not any(page.group for page in pages):
        print(NO_GROUPS)
    print(f"{data}: no errors")


def print_findings(*checks):
    """Print what checks yield, pairs (kind, finding): five of each kind, then how many more there
    are."""
    counts = Counter()
    for kind, finding in itertools.chain(*checks):
        counts[kind] += 1
        if counts[kind] <= 5:
            print(f"{kind}: {finding}")
    for kind, count in counts.items():
        if count > 5:
            print(f"{kind}: {count - 5} more")


def left_out(pages):
    beside = {}  # {real path: path}, since the folders of two splits may be links to one
    for folder in {page.path.parent for page in pages}:
        for path in folder.iterdir():
            if path.suffix.lower() in labels.PICTURES:
                beside[os.path.realpath(path)] = path
    known = {os.path.realpath(page.path) for page in pages}
    if others := sorted(path for real, path in beside.items() if real not in known):
        what = "without an entry in the labels, the first:"
        yield "left out", f"{len(others)} pictures {what} {others[0]}"


def damaged_pictures(rows):
    for split, page in rows:
        with libjpeg_lines() as lines:
            read_page(page.path, [Hparams(fit="area")])
        if lines:
            yield "warning: damaged picture", f"{split} {page.name}: {lines[0]}; fetch it again"


def turned_pages(rows):
    for split, page in rows:
        room = np.array(page.size) + 1
        reach = np.concatenate([*page.polygons, np.zeros((1, 2))]).max(0)
        if (reach > room).any() and (reach <= room[::-1]).all():
            remedy = "its labels fit only once it is turned; check its EXIF rotation"
            yield "warning: turned page", f"{split} {page.name}: {remedy}"


def other_sizes(rows, stated):
    for (split, page), size in zip(rows, stated):
        if size and size != page.size:
            what = f"is {page.size}, the label file says {size}"
            yield "warning: another size", f"{split} {page.name} {what}"


def shown_twice(rows):
    """One finding a page that is like an earlier one of its split, and one across splits."""
    reported = set()
    for a, b in same_receipts([page for _, page in rows]):
        across = rows[a][0] != rows[b][0]
        if (across, b) not in reported:
            reported.add((across, b))
            pair = "{} {.name}, {} {.name}".format(*rows[a], *rows[b])
            place = "warning: near-duplicates across splits"
            yield place if across else "near-duplicates within a split", pair


def shared_groups(rows):
    pairs = {(page.group, split) for split, page in rows if page.group is not None}
    counts = Counter(group for group, _ in pairs)
    for group in sorted(group for group in counts if counts[group] > 1):
        yield "warning: group in more than one split", shown(group)


def diff(old, new, image_dir=None):
    """Print how the labels of NEW differ from those of OLD, a line a page, and a total. Pages are
    matched by name and labels by IoU > 0.5; a label is moved if a point is by over 0.1 px. The
    total is over the pages of both. Raises DataError where two splits have pictures of one name, or
    where no page is in both."""
    # {name: page} of all splits
    before, after = {}, {}
    for data, named in (old, before), (new, after):
        for page in itertools.chain(*load_splits(data, image_dir).values()):
            if named.setdefault(page.name, page) is not page:
                problem = f"two splits have a picture {page.name}"
                raise DataError(data, problem, "name the label file or folder of one split")

    both = len(before.keys() & after.keys())
    if not both:
        raise DataError(new, f"none of its pages has the name of one in {old}")

    names = sorted({*before, *after})
    total = np.zeros(3, int)
    same = 0
    for name in names:
        if name not in before or name not in after:
            print(f"{name}: only in {old if name in before else new}")
            continue
        changes = page_changes(before[name].polygons, after[name].polygons)
        total += changes
        if any(changes):
            print("{}: {} added, {} removed, {} moved".format(name, *changes))
        else:
            same += 1
    line = "{} of {} pages differ: {} labels added, {} removed, {} moved"
    print(line.format(both - same, both, *total))


def draw_samples(pages, hp, folder):
    """Draw the first samples of the first epoch, augmented and on their canvas, over a strip that
    names the colours."""
    receipts = Receipts(pages, hp)
    for key in list(itertools.chain(*epoch_batches(pages, hp, 0)))[:8]:
        image, (shrink, thresh, mask, near) = receipts[key]
        light = np.stack([thresh // 2 * near, 127 * shrink, 127 * (1 - mask)], 2)
        name = f"{key[1]:05d}-{PurePosixPath(pages[key[1]].name).stem[:50]}.jpg"
        image = image // 2 + light
        image = np.concatenate([image, draw_legend(SAMPLE_COLOURS, image)])
        write_picture(folder / name, image)


# ---------------------------------------------------------------- new folders: convert and synth


def convert(data, out, to, image_dir=None, categories=(), link=False):
    """Write the labels of every split of DATA to folder OUT, in a format of formats.FORMATS, and
    the pictures beside them: copies, or with `link` hard links. Prints what the format could not
    hold. Raises DataError."""
    splits = load_splits(data, image_dir, categories)
    placed = {}  # {path of a picture's copy: its page}
    with new_folder(out) as partial:
        for split, pages in splits.items():
            # label files
            for name, text in formats.FORMATS[to](pages, split, split or Path(out).name):
                if (partial / name).exists():
                    raise DataError(data, f"{name} would hold several pages", "rename pictures")
                replace_file(partial / name, text)

            # pictures
            folder = partial / ("images" if to == "json" else "") / (split or "")
            for page in pages:
                placed[folder / page.name] = page
                place_picture(page.path, folder / page.name, link)

        # what was written is read back, before the folder gets its name
        again = [page for s in splits for page in labels.load_labels(partial, s or "train")]
        losses = formats.losses(placed, again)

    lost = ", ".join(f"{count} {kind}" for kind, count in losses.items())
    words = sum(len(page.polygons) for page in placed.values())
    print(f"{out}: {len(placed)} pages, {words} words as {to}; lost: {lost or 'nothing'}")


def place_picture(source, path, link):
    """Copy a picture, where the file system can without using room until one of the two changes.
    Raises FileExistsError: what is there may be the original, or a hard link to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if link:
        with contextlib.suppress(OSError):  # not on another file system
            return os.link(source.resolve(), path)
    with open(source, "rb") as old, open(path, "xb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
        except OSError:
            shutil.copyfileobj(old, new)


def synth(out, count, seed, **kind):
    """Draw `count` synthetic receipts into OUT: train.json, val.json (a quarter) and images/. A
    complete OUT of the same arguments is left alone; anything else there is a UsageError."""
    spec = {"pages": count, "seed": seed, **kind}

    def draw(i):
        image, words = synthetic_page((seed, i), **kind)
        page = labels.Page(f"synth_{i:05d}.jpg", None, size=image.shape[1::-1], group=f"{out} {i}")
        code = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (partial / "images" / page.name).write_bytes(code)
        for k, word in enumerate(words, 1):
            page.add(f"{k:04d}", word["points"], word["transcription"])
        return page

    try:
        with new_folder(out) as partial:
            print(f"drawing {count} synthetic receipts into {out}", file=sys.stderr)
            (partial / "images").mkdir()
            pages = map_threads(draw, range(count), "drawing receipts")
            val = max(1, count // 4)
            write_json(partial / "train.json", formats.pages_to_json(pages[val:]))
            write_json(partial / "val.json", formats.pages_to_json(pages[:val]))
            write_json(partial / "synth.json", spec)
    except (OSError, UsageError):
        # something is there: perhaps the same set, which another process drew faster
        made = Path(out, "synth.json")
        if not made.is_file() or read_json(made) != spec:
            raise


# ---------------------------------------------------------------- the command line


def parse_args(argv):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, what):
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(run=run, parser=sub)
        return sub.add_argument

    def data_command(name, run, what):
        add = command(name, run, what)
        add("data", help="folder or label file")
        add("--image-dir", help="where the pictures lie, if not in images/ or beside labels")
        return add

    add = data_command("check", run_check, "what DATA holds and what will go wrong")
    add("--size", help=f"of pages (that of --hparams, or {Hparams().size})")
    add("--hparams", metavar="JSON", help="values of the training that is planned")
    add("--pictures", metavar="OUT", help="folder to make; samples as training sees them")

    add = command("diff", run_diff, "labels added, removed and moved, by page")
    add("old", help="folder or label file")
    add("new", help="another with pages of the same names")
    add("--image-dir", help="where the pictures of both lie")

    add = command("synth", run_synth, "draw synthetic receipts, a quarter of them val")
    add("out", help="folder to make")
    add("--pages", type=int, default=64, help="how many (%(default)s)")
    add("--seed", type=int, default=0, help="another seed, other pages (%(default)s)")
    add("--size", type=int, default=1280, help="longer page side (%(default)s)")
    add("--words", type=int, default=117, help="words a page, about (%(default)s)")
    add("--unit", choices=("word", "line"), help="what is labelled (word)")
    habit = "label as the receipt competition does: also single letters, colons, rules, back print"
    add("--habit", choices=("competition",), help=habit)

    add = data_command("split", run_split, "stratified folds; groups and near-duplicates together")
    add("--folds", type=int, default=5, help="how many (%(default)s)")
    add("--seed", type=int, default=0, help="breaks ties (%(default)s)")
    add("--split", choices=labels.SPLITS, default="train", help="which split of DATA (%(default)s)")
    add("--out", help="JSON to write (runs/split-DATA-FOLDS.json)")

    add = data_command("convert", run_convert, "labels in another format; says what it cannot hold")
    add("out", help="folder to make; the pictures are copied into it")
    add("--to", choices=[*formats.FORMATS], default="json", help="format to write (%(default)s)")
    add("--categories", default="", help="COCO: those that are words, as text,word (default: all)")
    link = "hard links, which take no room; but a tool that turns a picture turns the original"
    add("--link", action="store_true", help=link)

    args, unknown = parser.parse_known_args(argv)
    if unknown:  # the nearest flag is one of this command, not of another
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for flag, least in (("pages", 2), ("size", 32), ("words", 1), ("seed", 0)):
        value = vars(args).get(flag)
        if isinstance(value, int) and value < least:
            raise UsageError(f"--{flag} {value}", f"at least {least} is needed")
    return args


def run_check(args):
    check(resolve_data(args.data), resolve_hparams(args), args.image_dir, args.pictures)


def run_diff(args):
    diff(args.old, args.new, args.image_dir)


def run_synth(args):
    if args.habit and args.unit:
        raise UsageError("--unit", "not with --habit", "leave one of them out")
    unit = args.habit or args.unit or "word"
    synth(args.out, args.pages, args.seed, size=args.size, words=args.words, unit=unit)
    print(f"{args.out}: {args.pages} synthetic receipts")


def run_convert(args):
    categories = args.categories.split(",") if args.categories else ()
    convert(resolve_data(args.data), args.out, args.to, args.image_dir, categories, args.link)


def run_split(args):
    pages = labels.load_labels(resolve_data(args.data), args.split, args.image_dir)
    out = args.out or Path("runs", f"split-{Path(args.data).stem}-{args.folds}.json")
    guard([args.out], page_files(pages), [] if args.out else [out])
    inspect_pages(pages)
    split = split_json(pages, page_groups(pages), args.folds, args.seed)
    write_json(out, split, indent=1)
    sizes = np.bincount([v["fold"] for v in split["images"].values()])[1:]
    with text_aside(out):
        print(f"{out}: {args.folds} folds of {sizes.tolist()} pages, hash {split['hash']}")


def run(argv):
    args = parse_args(argv)
    return args.run(args)


def main(argv=None):
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
