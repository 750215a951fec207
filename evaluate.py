"""How good is a detector? It is run, scored, drawn, compared, tuned and exported here.

python evaluate.py runs/x/best.pt                score a checkpoint on what its run validated on
python evaluate.py runs/x/best.pt --data DATA    on labelled pages; flags override its thresholds
python evaluate.py predictions.json --data DATA  any detector's output, in the competition's JSON
python evaluate.py model.onnx --data DATA        what --export wrote, by OpenVINO or onnxruntime
python evaluate.py a.pt --compare b.pt           paired difference with its interval
python evaluate.py best.pt --images DIR --pictures OUT --out predictions.json
python evaluate.py best.pt --images DIR --out x.jsonl --shard K/N  a part; repeat it to go on
python evaluate.py best.pt --images DIR --rank   without labels: the pages to label next
python evaluate.py best.pt --data DATA --stress  turned, scaled, blurred, dark and noisy pages
python evaluate.py best.pt --images DIR --size auto  crops to the text after a first look
python evaluate.py runs/x-fold*/last.pt --tune --write tuned.json
python evaluate.py runs/x-fold*/last.pt --audit suspects.html  labels that are probably wrong
python evaluate.py old.pt --mix new.pt --export mean.pt  the mean of their weights

In Python: polygons, scores = Detector("weights/receipts-lite2.pt")("a.jpg")"""

import io
import json
import os
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import asdict, replace
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import audit
import cleval
import data
import pictures
import predictions
import report
from command import Parser, add_flags, given_flags
from db_postprocess import DECODING
from dbnet import ORIGIN, save_checkpoint
from drawing import draw_page, embedded_picture, is_drawn, picture_file, write_picture
from engine import (
    ENGINES,
    Runtime,
    choose_device,
    find_package,
    load_engine,
    onnx_graph,
)
from files import (
    DataError,
    UsageError,
    check_writable,
    exit_code,
    guard,
    is_stream,
    print_error,
    replace_file,
    text_aside,
    write_json,
)
from folding import network_of
from hparams import checked, read_hparams
from interval import bootstrap_groups, make_score, paired_difference
from labels import PICTURES, SPLITS, Page, find_labels, has_split, load_labels
from mistakes import short_sides
from predict import flipped, mean_map, predict, predict_each
from sources import (
    EXPORTED,
    EXPORTED_SEEN,
    check_pages,
    count_seen,
    load_source,
    mix,
    page_digest,
    seen_digests,
    warn,
    warn_of_leaks,
)
from stress import run_stress
from tune import GRID, METRICS, TUNED, draw_landscape, halves, print_tuning, tune

# files to write: {flag: {suffix: how such a file begins}}
FORMS = {
    "out": dict.fromkeys(predictions.SUFFIXES, '{"images": {'),
    "html": {".html": "<!doctype html>"},
    "audit": {".json": "[", ".html": "<!doctype html>"},
    "submission": {".csv": "filename,polygons"},
}
# suffixes of pictures that cannot be read, such as a phone's
UNREAD = ".heic", ".heif", ".avif", ".gif", ".pdf"
# a checkpoint's values that flags may replace
OVERRIDES = ("size", "fit", *(key for key in DECODING if key != "shrink_ratio"), "amp")

# ---------------------------------------------------------------- detector


class Detector:
    """Finds text in pictures: polygons, scores = Detector("weights/receipts-lite2.pt")("a.jpg").

    weights: a checkpoint or ONNX model. device, engine: as --device, --engine. values: of
    OVERRIDES, instead of the checkpoint's. Raises DataError, UsageError."""

    def __init__(self, weights, device="auto", engine=None, **values):
        for key in values:
            if key not in OVERRIDES:
                raise UsageError("Detector", f"{key} is not one of {', '.join(OVERRIDES)}")
        values = choose_look(values)
        values = {key: checked(key, value, "Detector") for key, value in values.items()}
        source = load_source(str(weights), engine)
        if not source.hp:
            raise UsageError(weights, "not a checkpoint")
        source.override(values)
        self.device = choose_device(device)
        self.network = source.network(self.device)

    def __call__(self, picture):
        """A picture, a path or uint8 RGB [H, W, 3], also Pillow's, -> N polygons [P, 2] in its
        pixels, from the upper left and clockwise, and scores [N], highest first; a list of pictures
        -> a list of these. Raises DataError."""

        def from_top_left(page, found):
            polygons, scores = found
            return [cleval.from_top_left(polygon) for polygon in polygons], scores

        pages = []
        for image in picture if isinstance(picture, list) else [picture]:
            if not isinstance(image, str | os.PathLike):
                image = np.asarray(image)
                if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
                    raise DataError("an array", "not a picture, uint8 RGB [H, W, 3]")
            pages.append(Page("a picture", image))
        stream = predict(self.network, pages, self.device, from_top_left)
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


def maps_path(source, pages, device):
    """Where the maps of a checkpoint on pages are kept: in maps/ beside it, under a name made of
    the digests of all that the maps depend on, so that no other maps are ever taken for them."""
    path = Path(source.path)
    hp = source.hp
    look = hp.look and hp.text_height
    kind = source.runtime(device)[1:]
    # the last number is raised when the same values begin to give other maps
    made_of = [pictures.picture_digest(path), hp.size, hp.fit, look, kind, 6]
    made_of += [(page.name, page_digest(page)) for page in pages]
    key = pictures.bytes_digest(json.dumps(made_of).encode())
    return path.parent / "maps" / f"{path.stem}-{key}.npz"


def cached_maps(source, pages, hp, device):
    """Maps of a checkpoint on pages, predicted or from `maps_path`: list of (uint8 [h, w], scale
    [2]), in the order of pages."""
    source = replace(source, hp=hp)
    path = maps_path(source, pages, device)
    if path.exists():
        try:
            with np.load(path) as file:
                return [(file[str(i)], scale) for i, scale in enumerate(file["scales"])]
        except Exception:  # noqa: BLE001 (zipfile and numpy raise what the damaged bytes lead to)
            warn(path, "damaged, predicting again")

    network = source.network(device)
    stream = predict_each([network], pages, device, lambda page, maps: maps[0])
    maps = [np.ascontiguousarray(prob) for _, prob in stream]
    scales = np.array([m.shape[::-1] for m in maps]) / [page.size for page in pages]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, scales=scales, **{str(i): prob for i, prob in enumerate(maps)})
    try:
        replace_file(path, buffer.getbuffer())
    except OSError as error:  # the run may lie on a disk that is read-only
        warn(path, f"maps are not kept ({error.strerror})")
    return list(zip(maps, scales))


def held_out_pages(sources, folder, image_dir):
    """Lists of the pages that each of several fold runs held out, by the record in its checkpoint.
    folder: where the data lie now, if not where the runs found them. Raises DataError if the runs
    are not different folds of one split, or if the pages are not there."""
    # are they folds of one split?
    first = sources[0].state["hparams"]
    for source in sources:
        hp = source.state["hparams"]
        for key in ("data", "image_dir", "folds", "split", "size", "fit", "shrink_ratio"):
            value, wanted = getattr(hp, key), getattr(first, key)
            if value != wanted:
                problem = f"{key} is {value!r}, in {sources[0].path} {wanted!r}"
                raise DataError(source.path, problem, "tuning needs folds of one split")
        if not hp.folds or not source.state.get("scores", {}).get("pages"):
            problem = "not a fold run with a finished epoch"
            raise DataError(source.path, problem, "tune one run, or all its folds")
    if len(sources) < first.folds:
        count = f"{len(sources)} of its {first.folds} folds"
        warn(sources[0].path, f"{count} are given: pages of the others are left out")

    # the pages of each, by name; none may be held out twice
    folder = data.resolve_data(folder or data.set_names(first.data)[0])
    pages = load_labels(folder, "train", image_dir or first.image_dir or None)
    by_name = {page.name: page for page in pages}
    owner = {}  # {name of a page: path of the run that held it out}
    page_lists = []
    for source in sources:
        names = sorted(source.state["scores"]["pages"])
        for name in names:
            if name not in by_name:
                raise DataError(source.path, f"its held-out page {name} is not in the data")
            if name in owner:
                problem = f"page {name} is held out by {owner[name]} too"
                raise DataError(source.path, problem, "give one run a fold")
            owner[name] = source.path
        page_lists.append([by_name[name] for name in names])
    return page_lists


def check_target(path, sources):
    """Raises UsageError when --write cannot put values into path."""
    exists = Path(path).exists()
    new_checkpoint = path.endswith(".pt") and len(sources) == 1 and not exists
    if not path.endswith(".json") and not new_checkpoint:
        raise UsageError(f"--write {path}", "not a .json file or, for one source, a new .pt file")
    if exists:
        read_hparams(path)  # what is wrong with it is said before the tuning


def write_setting(path, source, values):
    """Put values into a copy of the checkpoint (.pt) or an hparams file (.json), new or not. What
    differs in a file that exists stays, with a warning."""
    hp = asdict(source.hp) | values  # with a flag's size, at which they were tuned
    if path.endswith(".pt"):
        # its scores were those of other values
        scores = source.state.get("scores", {})
        held_out = {key: scores[key] for key in ("pages", "digests") if key in scores}
        return save_checkpoint(path, source.state | {"hparams": hp, "scores": held_out})
    if Path(path).exists():
        kept = read_hparams(path) | values
        others = ", ".join(key for key in kept if kept[key] != hp[key])
        if others:
            warn(path, f"keeps its own {others}; for those of the run write a new file")
        hp = kept
    else:
        for key in ("name", "folds", "fold", "split", "stop_epoch", "workers", "init"):
            del hp[key]  # of this run alone
    write_json(path, hp, indent=1)


def run_tune(args, overrides):
    """evaluate.py --tune. Raises DataError."""
    sources = [load_source(path, args.engine) for path in args.sources]
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

    # all that can be wrong is found before the pages are predicted
    picture = Path(first.path).parent / "tune.png"
    inputs = files_read(args, pages)
    check_outputs([args.write], inputs)
    guard([picture], inputs)
    if args.write:
        check_target(args.write, args.sources)
    if all(all(page.ignore) for page in pages):
        raise DataError("--tune", "the pages have no labels")
    if args.split == "test":
        warn("--split test", "test pages choose the thresholds: no test score any more")

    parts = np.repeat(range(len(page_lists)), [len(part) for part in page_lists])
    if len(sources) == 1:
        parts = halves(bootstrap_groups(pages))

    maps = []
    seen = Counter()
    for source, part in zip(sources, page_lists):
        seen.update(warn_of_leaks(source, part))
        maps += cached_maps(source, part, first.hp, args.device)

    # tune, with the values of flags fixed
    grid = {key: (overrides[key],) if key in overrides else GRID[key] for key in TUNED}
    result, table = tune(maps, pages, parts, grid, first.hp, args.metric or "hmean", seen)
    chosen = {key: result["recommended"][key] for key in TUNED}
    if args.json:
        print(json.dumps(result, default=lambda score: score.to_json()))
    else:
        print_tuning(result)
        print(f"{len(pages)} pages, cross-fitted over {len(set(parts))} parts; {picture}")
        if result["gain"].over.unit == "pages":
            print(data.NO_GROUPS)

    if args.write:
        overrides.pop("amp", None)  # how maps were computed here is no matter of training
        first.hp = replace(first.hp, amp=first.state["hparams"].amp)
        tuned = ",".join(page_digest(page) for page in pages)
        # values of flags as well: the thresholds were chosen for this size
        write_setting(args.write, first, overrides | chosen | {"tuned": tuned})
    try:
        draw_landscape(picture, table, grid, chosen, result["metric"])
    except OSError as error:
        warn(picture, f"not drawn ({error.strerror})")


# ---------------------------------------------------------------- report

WORST = 12


def page_details(page, polygons):
    """Heights in px of a page's labels that count, and whether `polygons` hit them at IoU 0.5."""
    outcome = cleval.iou_matches(page.polygons, polygons, page.ignore).outcome
    counts = outcome != ""
    return short_sides(page.polygons)[counts], outcome[counts] == "hit"


def decoding_line(hp):
    values = {key: getattr(hp, key) for key in ("size", "fit", *DECODING)}
    if hp.look:
        values["size"] = f"auto (text {hp.text_height:g} px high)"
    return ", ".join(f"{key} {value}" for key, value in values.items())


def binned(x, y, unit):
    """Mean of y in up to 5 equally filled bins of x, as bars: (mean, label, [range, size])."""
    if not len(x):
        return []
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 6)))
    edges = np.resize(edges, max(len(edges), 2))  # equal values make one bin, without width
    counts = np.histogram(x, edges)[0]
    means = np.histogram(x, edges, weights=y)[0] / np.maximum(counts, 1)
    bins = zip(means, edges, edges[1:], counts)
    return [
        (mean, f"{mean:.4f}", [f"{low:.0f} to {high:.0f}", f"{count} {unit}"])
        for mean, low, high, count in bins
    ]


def write_html(path, source, pages, found, rows, summary):
    """Write a run's scores as one HTML page. found: (polygons, scores) of each page; rows: {metric:
    rows [n, k]}; summary: of `summarise`."""
    details = [page_details(page, polygons) for page, (polygons, _) in zip(pages, found)]
    heights, hits = zip(*details)
    words = np.array([len(page_heights) for page_heights in heights])
    hmeans = rows["page"][:, 2]

    # the worst pages, drawn
    worst = []
    for n in np.argsort(hmeans, kind="stable")[:WORST]:
        caption = f"{pages[n].name}: hmean {hmeans[n]:.4f}, {words[n]} words, {hits[n].sum()} hit"
        image = draw_page(pictures.read_image(pages[n].path), pages[n], found[n][0])
        worst.append((caption, embedded_picture(image)))

    # how many pages have which hmean, in steps of 1 / 20, at least from 0.75 on
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


def export(source, path):
    """Write a checkpoint to share: as .onnx, see `export_onnx`, or as a new .pt its averaged
    weights in half precision. Both hold their decoding and the pages they have seen, and no score:
    that was of other values. Raises DataError, UsageError."""
    hp = source.hp
    state = source.state
    if path.endswith(".onnx"):
        about = {key: getattr(hp, key) for key in EXPORTED}
        about |= {"input": "RGB 0..1", "epoch": state.get("epoch")}
        origin = state.get("origin")
        if not origin:  # of an older checkpoint
            origin = dict.fromkeys(ORIGIN, ()) | {"unknown": [source.path]}
        for way, digests in ({"tuned": hp.tuned.split(",")} | origin).items():
            about[EXPORTED_SEEN[way]] = " ".join(sorted(digests))
        export_onnx(path, network_of(state, source.path, "cpu"), about)
        return print_rapidocr(path, hp)

    if not path.endswith(".pt") or Path(path).exists():
        raise UsageError(f"--export {path}", "not a new .pt file", "give one, or a .onnx file")
    weights = {}
    for key, value in source.weights().items():
        weights[key] = value.half() if value.ndim > 1 else value
    if not all(value.isfinite().all() for value in weights.values()):
        raise DataError(source.path, "weights beyond half precision", "give an .onnx file")
    shared = {key: state[key] for key in ("epoch", "origin") if key in state}
    save_checkpoint(path, shared | {"model": weights, "hparams": asdict(hp)})
    print(f"{path}: {Path(path).stat().st_size / 2**20:.1f} MiB")


@torch.no_grad()
def export_onnx(path, model, about):
    """Write a network as an ONNX model of Probability; about: its metadata {key: value}. Raises
    UsageError without the packages, DataError where its maps differ."""
    onnx = find_package("onnx")
    if not onnx or not find_package("onnxruntime"):
        raise UsageError("--export", "needs a package", "pip install onnx onnxruntime")
    graph = onnx.load_from_string(onnx_graph(model))
    onnx.helper.set_model_props(graph, {key: str(value) for key, value in about.items()})
    graph = graph.SerializeToString()

    # the same maps of two batches of random pixels?
    again = load_engine(Runtime(None, "onnxruntime", "off"), "", None, graph)
    errors = []
    for shape in ((1, 160, 96, 3), (2, 64, 224, 3)):
        pages = torch.randint(256, shape).byte()
        difference = model(pages).sigmoid() - again(pages).sigmoid()
        errors.append(difference.abs().max().item())
    error = max(errors)
    if not error < 1e-4:
        raise DataError(path, f"as ONNX the maps differ by {error:.1g}; nothing is written")
    replace_file(path, graph)
    print(f"{path}: {len(graph) / 2**20:.1f} MiB, maps differ by {error:.1g} from PyTorch's")


def print_rapidocr(path, hp):
    """Print the call that makes RapidOCR use an exported model. RapidOCR knows boxes only, and sets
    a page's size by the most of its longer side and the least of its shorter one; for fit `area`
    these are the sides of a page 2:1."""
    area = hp.fit == "area"
    stretch = 2**0.5 if area else 1
    longer = round(hp.size * stretch)
    shorter = round(hp.size / stretch)
    det = {
        "model_path": path,
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
        "use_dilation": False,
        "limit_type": "min" if area else "max",
        "limit_side_len": shorter,
        "score_mode": "slow",
        "thresh": hp.thresh,
        "box_thresh": hp.box_thresh,
        "unclip_ratio": hp.unclip_ratio or 2.4,  # exact for a word 4.5 times as long
    }
    flags = ", ".join(f"det_{key}={value!r}" for key, value in det.items())
    pages = "boxes only, pages about 2:1" if area else "boxes only"
    print(f"rapidocr-onnxruntime 1.4.4, {pages}: RapidOCR(max_side_len={longer}, {flags})")


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


def summarise(pages, rows, seen):
    """{metric: rows} of cleval.METRICS -> Summary; seen: as of warn_of_leaks."""
    groups = bootstrap_groups(pages)
    scores = {
        metric: make_score(rows[metric], to_scores, groups, seen)
        for metric, to_scores in cleval.METRICS.items()
    }

    # the counts of cleval.iou50, whose first six make its scores
    total = rows["iou50"].sum(0).astype(int).tolist()
    outcomes = total[6:11]
    pairs = total[11:17]
    joined = total[17:]
    gaps = zip(pairwise(cleval.GAPS), pairs, joined)
    counts = {
        "pages": len(pages),
        "pages_without_labels": sum(all(page.ignore) for page in pages),
        "labels": dict(zip(cleval.OUTCOMES, outcomes)),
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
    if not source.hp:
        regions = source.regions
        results = data.map_threads(lambda page: job(page, regions[page.name]), pages, "scoring")
        return enumerate(results)
    if not args.json:
        print(source.runtime(args.device))
        print(decoding_line(source.hp))
    network = source.network(args.device, tile=args.tile or 0)
    return predict(network, pages, args.device, job, failed)


def print_speed(args, source, begin, words, remark=""):
    """Print how many pages and words there were and, for a network, its speed since `begin`. words:
    their number, page by page."""
    line = f"{len(words)} pages{remark}, {sum(words)} words found"
    if source.hp:
        seconds = time.perf_counter() - begin
        line += f" in {seconds:.1f} s ({len(words) / seconds:.2f} images/s, {args.device})"
    print(line)


def judge_source(args, source, pages, folder=None):
    """Let a Source find words on labelled pages, and draw them into a folder if there is one.
    Returns four things: (polygons, scores) of each page; {metric: rows [n, k]}; how many pages it
    has seen before, see `warn_of_leaks`; what went wrong with each drawing, or None."""
    seen = warn_of_leaks(source, pages) if source.hp else {}

    def job(page, found):
        rows = [cleval.page_row(metric, page, found[0]) for metric in cleval.METRICS]
        return found, rows, try_drawing(page, found, folder)

    begin = time.perf_counter()
    results = [result for _, result in found_on(args, source, pages, job)]
    found, page_rows, problems = zip(*results)
    if not args.json:
        print_speed(args, source, begin, [len(polygons) for polygons, _ in found])

    # a row of each metric, page by page -> the rows of all pages, metric by metric
    rows = {}
    for metric, of_pages in zip(cleval.METRICS, zip(*page_rows)):
        rows[metric] = np.array(of_pages)
    return found, rows, seen, problems


def score_labelled(args, source, other, pages):
    """Score a Source on labelled pages, and against another if not None. Returns the exit code."""
    found, rows, seen, problems = judge_source(args, source, pages, args.pictures)
    if args.out:
        predictions.write_predictions(args.out, pages, found)
    summary = summarise(pages, rows, seen)
    if args.html:
        write_html(args.html, source, pages, found, rows, summary)

    differences = {}
    if other:
        _, other_rows, _, _ = judge_source(args, other, pages)
        groups = bootstrap_groups(pages)
        either = count_seen([source, other], pages)
        for metric, to_scores in cleval.METRICS.items():
            differences[metric] = paired_difference(
                rows[metric], other_rows[metric], to_scores, groups, either
            )

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
    # a .jsonl file that this command has begun goes on; other files are written at the end
    file = None
    done = {}
    if str(args.out).endswith(".jsonl") and source.hp and not is_stream(args.out):
        made_of = f"{source.digest()} {decoding_line(source.hp)}, tile {args.tile}, {source.hp.amp}"
        file, done = predictions.resume_lines(args.out, made_of, args.images or args.data)
        if done:
            print(f"{args.out}: goes on after {len(done)} pages, which are not drawn again")
    before = [done[page.name] for page in pages if page.name in done]
    pages = [page for page in pages if page.name not in done]

    def job(page, found):
        row = predictions.sureness(page.name, found[1])
        return row, predictions.page_line(page, *found), try_drawing(page, found, args.pictures)

    begin = time.perf_counter()
    failed = {}  # {index of a page that cannot be read: its error}
    rows = []
    lines = []
    problems = []
    for _, (row, line, problem) in found_on(args, source, pages, job, failed):
        rows.append(row)
        problems.append(problem)
        if file:
            file.write(line.encode())
            file.flush()
        elif args.out:
            lines.append(line)
    if args.out and not file:
        predictions.write_lines(args.out, lines)

    words = [count for _, count, _ in rows]
    print_speed(args, source, begin, words, " without labels, nothing to score")
    list_pages(args, before + rows)
    return print_problems([*(failed[n] for n in sorted(failed)), *problems])


def list_pages(args, rows):
    """Print pages without labels, rows of predictions.sureness. With --rank these are all pages,
    the ones to label next first; else the first 20, if no file keeps them."""
    kept = args.out or args.pictures
    shown = rows[:20]
    if args.rank:
        shown = sorted(rows)
    elif kept:
        shown = []
    for least, words, name in shown:
        print(f"{words:4d} words, 90 % of them score {least:.4f} or more  {name}")
    if not kept:
        print("not kept: add --out predictions.json, or --pictures DIR to look")


def warn_of_more_pages(pages):
    """Warn of each TIFF file of several pages, since only the first one is read."""
    for page in pages:
        count = 1
        is_tiff = str(page.path).lower().endswith((".tif", ".tiff"))
        if is_tiff and not is_stream(page.path):  # from which a read might never return
            with suppress(Exception), Image.open(page.path) as picture:  # broken: named once read
                count = picture.n_frames
        if count > 1:
            warn(page.path, f"{count} pages, only the first is read; save each as a file")


def warn_of_damage(lines, pages):
    """Name the damaged pictures of pages, if libjpeg wrote any lines while they were read."""
    rows = [("", page) for page in pages if lines and page.size]  # those that could be read
    for kind, text in data.damaged_pictures(rows):
        print(f"{kind}:{text}", file=sys.stderr)


def print_problems(problems):
    """Print what went wrong with single pages. Returns the exit code."""
    problems = [problem for problem in problems if problem]
    for problem in problems:
        print_error(problem)
    return 1 if problems else 0


# ---------------------------------------------------------------- audit


NO_AUDIT = "not with --audit"
ZOOM = 1.4  # of an audit: large text shows small words, and outlines that are a little off


def enlarge(hp):
    """Hparams that read text ZOOM times as large."""
    if hp.look:
        return replace(hp, text_height=ZOOM * hp.text_height)
    return replace(hp, size=32 * round(ZOOM * hp.size / 32))


def choose_voters(sources, pages):
    """{indices of sources: pages}: each page goes to the sources that were not trained on it, or to
    all if each was, with a warning."""
    trained = []
    for source in sources:
        origin = source.origin()
        if origin["unknown"]:
            warn(source.path, "not all pages that it was trained on are known")
        trained.append(seen_digests(origin, source.hp).get("trained", set()))

    voters = defaultdict(list)
    familiar = []
    for page in pages:
        digest = page_digest(page)
        fresh = [n for n, digests in enumerate(trained) if digest not in digests]
        if not fresh:
            familiar.append(page.name)
        voters[tuple(fresh or range(len(sources)))].append(page)
    if familiar:
        problem = f"{len(familiar)} of {len(pages)} pages (first: {familiar[0]}) were trained on"
        warn("--audit", f"{problem}; a network that has learned an error does not see it")
    return voters


def read_pages(args, sources, pages, plan):
    """An audit.PageReading of each page, by the mean map of several Sources."""
    networks = [source.network(args.device) for source in sources]
    if args.flip:
        networks = [network._replace(model=flipped(network.model)) for network in networks]
    hp = networks[0].hp

    def job(page, maps):
        prob = mean_map(maps, [1] * len(maps), maps[0].shape)
        return audit.read_page(page, prob, hp, plan)

    return [reading for _, reading in predict_each(networks, pages, args.device, job)]


def run_audit(args, overrides):
    """evaluate.py --audit. Raises DataError, UsageError."""
    sources = [load_source(path, args.engine) for path in args.sources]
    for source in sources:
        source.state.pop("optimizer", None)  # those of all folds would fill the memory
        if overrides:
            source.override(overrides)
        if args.size is None:  # also where a file of --hparams has a size, which most have
            source.hp = enlarge(source.hp)
    if len(sources) > 1 and not args.split and all(source.hp.folds for source in sources):
        parts = held_out_pages(sources, args.data, args.image_dir)
        pages = [page for part in parts for page in part]
    else:
        refuse_idle(args, [("image_dir", args.data, "only with --data, or with folds")])
        pages = labelled_pages(args, sources[0])

    folder = args.to and args.to[1]
    check_outputs([args.audit, folder], files_read(args, pages))
    plan = audit.make_plan(pages)
    voters = choose_voters(sources, pages)

    # the time is measured on a few pages, the first of which starts the network up
    first, theirs = next(iter(voters.items()))
    few = [sources[n] for n in first]
    read_pages(args, few, theirs[:1], plan)
    begin = time.perf_counter()
    read_pages(args, few, theirs[:3], plan)
    minutes = (time.perf_counter() - begin) / len(theirs[:3]) * len(pages) / 60
    labels = sum(len(page.polygons) for page in pages)
    print(f"{labels} labels on {len(pages)} pages: at most some {minutes:.1f} minutes")

    # the audit itself
    readings = []
    for numbers, theirs in voters.items():
        readings += read_pages(args, [sources[n] for n in numbers], theirs, plan)
    audit.write_audit(args.audit, readings, plan.kinds, folder)


# ---------------------------------------------------------------- command line


def shard(text):
    """(K, N) of K/N."""
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ArgumentTypeError(f"{text}: K/N is a part K from 1 to N of N parts")
    return part, parts


def parse_args(argv):
    parser = Parser(usage="python evaluate.py SOURCE [options]", description=__doc__)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="best.pt, or predictions.json of any detector")
    add("--compare", metavar="OTHER", help="another SOURCE: the paired difference, its interval")
    add("--mix", metavar="OTHER", help="take the mean of its weights and SOURCE's")
    add("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    add(
        "--engine", choices=ENGINES, help="what runs the network (default: OpenVINO if it is there)"
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    add = parser.add_argument_group("pages (default: what the run validated on)").add_argument
    add("--data", help="folder or label file")
    add("--split", choices=SPLITS, help="of DATA (default val)")
    add("--image-dir", help="where the pictures lie, if not in images/ or beside the labels")
    add("--images", metavar="PATH", help="pictures without labels: one, or a folder and below")
    add("--shard", type=shard, metavar="K/N", help="the K-th picture of --images, then each N-th")
    add("--tile", type=int, metavar="PX", help="cut larger pages into tiles")
    add("--stress", action="store_true", help="score them turned, scaled, blurred, dark, noisy")
    add("--flip", action="store_true", help="with --audit: the mirrored page votes, too")
    add("--rank", action="store_true", help="pages without labels, the ones to label next first")
    add = parser.add_argument_group("files to write").add_argument
    add("--out", metavar="JSON", help="predictions; x.jsonl of unlabelled pages: can be continued")
    wrong = "labels that are probably wrong, as .json or .html; reads text larger without --size"
    add("--audit", metavar="FILE", help=wrong)
    add("--to", nargs=2, metavar=("labelme", "DIR"), help="with --audit: pages to correct")
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


def picture_pages(path, drawn=None):
    """Pages without known labels (None) of a picture, or of all pictures in a folder and below,
    except pages that a first run has drawn into the folder `drawn`. Raises UsageError, DataError,
    OSError."""
    path = Path(path)
    if not path.exists():
        raise UsageError(path, "no such file or folder")
    folder = path.parent
    files = [path]
    if path.is_dir():
        folder = path
        # a link that leads nowhere is one that cannot be read
        below = pictures.files_below(path, {os.path.realpath(path)})
        files = sorted(file for file in below if file.suffix.lower() in PICTURES)
        kinds = Counter(file.suffix.lower() for file in below)
        unread = [f"{kinds[kind]} {kind}" for kind in UNREAD if kinds[kind]]
        if unread:
            warn(path, f"{', '.join(unread)} files are left out; save them as JPEG")
    if drawn:
        place = os.path.realpath(drawn) + os.sep
        inside = [file for file in files if os.path.realpath(file).startswith(place)]
        drawn_pages = {file for file in inside if os.path.isfile(file) and is_drawn(file)}
        files = [file for file in files if file not in drawn_pages]
    if not files:
        raise DataError(path, f"no picture in it ({' '.join(PICTURES)})")
    # a name whose bytes are not UTF-8 could not be written into a JSON file; escapes keep two apart
    names = [os.fsencode(p.relative_to(folder)).decode("utf-8", "backslashreplace") for p in files]
    return [Page(name, file, None) for name, file in zip(names, files)]


def labelled_pages(args, source, other=None):
    """The labelled pages to score on: --data, or what the run validated on and, if it is compared
    with another run, of the first set that both have. Raises DataError."""
    if args.data:
        folder = data.resolve_data(args.data)
        split = args.split or "val"
        if not has_split(folder, split):
            others = [name for name in SPLITS if has_split(folder, name)]
            if others and not find_labels(folder, None):
                raise UsageError(folder, f"no labels of split {split}", f"use --split {others[0]}")
        return load_labels(folder, split, args.image_dir)
    if not source.weights():
        raise UsageError(source.path, "needs labels to be scored", "add --data")
    hp = source.hp
    if other and other.weights():
        others = data.set_names(other.hp.data)
        shared = [name for name in data.set_names(hp.data) if name in others]
        if shared and hp.data != other.hp.data:
            print(f"pages: those of {shared[0]}, which both runs have", file=sys.stderr)
            hp = replace(hp, data=shared[0])
    if not all(data.resolve_data(name).exists() for name in data.set_names(hp.data)):
        problem = f"the pages of its run, {hp.data}, are not here"
        raise UsageError(source.path, problem, "name pages by --data or --images")
    return validated_pages(args, hp)


def validated_pages(args, hp):
    """The val pages of a run. args.run_files become the files of its other pages, which are read to
    find these: train pages, and val pages of later sets. Raises DataError."""
    train, val, others, _ = data.run_pages(hp)
    args.run_files = data.page_files(sum(others.values(), train))
    return val


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
    suffixes = {Path(source).suffix for source in args.sources}
    networks = not suffixes & {*predictions.SUFFIXES}
    checkpoints = networks and ".onnx" not in suffixes
    to_a_network = not str(args.compare).endswith(predictions.SUFFIXES)
    values = f"hparams {' '.join(OVERRIDES)}"
    several = len(args.sources) > 1
    one_set = not several or (args.audit and args.data)
    rules = [
        ("metric write", args.tune, "only with --tune"),
        ("compare images tile rank out html pictures", scoring, "not with --tune or --export"),
        ("out pictures tile images", not args.stress, "not with --stress"),
        ("stress", scoring and networks, "only with a checkpoint to score"),
        ("compare", to_a_network or not args.stress, "only a checkpoint with --stress"),
        ("export hparams mix", not args.tune, "not with --tune"),
        ("audit", scoring and networks, "only with a checkpoint, not with --tune or --export"),
        ("flip to", args.audit, "only with --audit"),
        ("compare images tile rank out html pictures stress mix json", not args.audit, NO_AUDIT),
        ("data split image_dir json", not args.export, "not with --export"),
        ("export mix tune", checkpoints, "only with a checkpoint"),
        (f"images engine tile {values}", networks, "only with a checkpoint or ONNX model"),
        ("engine device", not args.export, "not with --export"),
        ("device", networks or (args.compare and to_a_network), "only with a checkpoint"),
        ("shard", args.images, "only with --images"),
        ("amp", args.engine != "onnxruntime", "onnxruntime computes in float32"),
        ("amp", not str(args.export).endswith(".onnx"), "an ONNX model is in float32"),
        ("data", not args.images, "not with --images"),
        ("split", one_set, "not with folds, each on what it held out"),
        ("split image_dir", args.data or several, "only with --data"),
        ("tile", args.tile is None or args.tile >= 32, "at least 32 page pixels are needed"),
    ]
    refuse_idle(args, rules)
    check_forms(args)
    if several and not (args.tune or args.audit):
        remedy = "to compare two: --compare; for pictures: --images"
        raise UsageError("several sources", "only with --tune or --audit", remedy)
    if args.to and args.to[0] != "labelme":
        raise UsageError(f"--to {args.to[0]}", "only labelme is known")
    if args.to and Path(args.to[1]).exists():
        raise UsageError(args.to[1], "exists", "choose another folder")


def read_overrides(args):
    """{key: value} of --hparams < flags that replace a checkpoint's. Raises DataError."""
    values = read_hparams(args.hparams) if args.hparams else {}
    values = {
        key: values[key] for key in (*OVERRIDES, "look", "text_height", "tuned") if key in values
    }
    if args.size == "auto":
        args.size = None  # given_flags would refuse it, since a size is a number
        return choose_look(values | given_flags(args, OVERRIDES) | {"size": "auto"})
    flags = choose_look(given_flags(args, OVERRIDES))  # their size ends the look of a file
    return choose_look(values | flags)


def choose_look(values):
    """Values of OVERRIDES, where size may be a number or "auto", with the value of `look` that
    follows: "auto" stands for look = true. A number, or a fit, stands for look = false: with the
    look of a checkpoint they would have no effect."""
    if values.get("size") == "auto":
        return {key: value for key, value in values.items() if key != "size"} | {"look": True}
    if values.keys() & {"size", "fit"} and "look" not in values:
        return values | {"look": False}
    return values


def files_read(args, pages=()):
    """Paths, some of them None, of all files that a command reads: those that its words name, which
    may be patterns, and those of its pages."""
    values = vars(args)
    paths = args.sources + [values.get(key) for key in ("hparams", "compare", "mix", "sample")]
    paths += [file for path in filter(None, paths) for file in glob(path)]
    return paths + values.get("run_files", []) + data.page_files(pages)


def check_forms(args):
    """Raises UsageError where a file to write has the suffix of another kind, or would replace a
    file of another kind: a slip of the keyboard then costs no labels, values or checkpoints."""
    for flag, beginnings in FORMS.items():
        path = vars(args).get(flag)
        if not path or (flag in ("out", "html") and is_stream(path)):
            continue
        beginning = beginnings.get(Path(path).suffix)
        if beginning is None:
            raise UsageError(f"--{flag} {path}", f"not a {' or '.join(beginnings)} file")
        if not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            text = file.read(2**20)
        # labels look like predictions, but have no confidences; half a line has none, either
        is_whole = flag == "out" and path.endswith(".json")
        is_labels = is_whole and '"points"' in text and '"confidence"' not in text
        if is_labels or not beginning.startswith(text[: len(beginning)]):
            problem = f"exists, and is not what --{flag} writes"
            raise UsageError(path, problem, "name another file")


def check_outputs(outputs, inputs, derived=(), drawn=()):
    """Raises UsageError where `files.guard` does, if two outputs are one file, or if a drawn page
    would replace a picture that is not one; OSError if an output cannot be written.

    drawn: outputs, too: the folder of drawn pages and these pages. They may be too many to try
    whether each can be written."""
    named = [path for path in (*outputs, *drawn) if path]
    guard(named, inputs, derived)
    counts = Counter(os.path.realpath(path) for path in named if not is_stream(path))
    for path, count in counts.most_common(1):
        if count > 1:
            remedy = "name another file, or rename a picture"
            raise UsageError(path, f"{count} outputs of this command", remedy)
    for path in drawn:
        if os.path.isfile(path) and not is_drawn(path):
            raise UsageError(path, "exists, and is no drawn page", "draw into another folder")
    for path in filter(None, (*outputs, *derived)):
        check_writable(path)
    for folder in drawn[:1]:
        check_writable(Path(folder, ".page"))  # any name will do


def run(args):
    check_scoring_flags(args)
    overrides = read_overrides(args)
    works = not args.export and not args.source.endswith(predictions.SUFFIXES)
    args.device = choose_device(args.device or "auto", works)
    if args.tune:
        return run_tune(args, overrides)
    if args.audit:
        return run_audit(args, overrides)
    source = load_source(args.source, args.engine)
    if args.mix:
        source = mix(source, load_source(args.mix))
    if overrides:
        source.override(overrides)
    if args.export:
        check_outputs([args.export], files_read(args))
        return export(source, args.export)

    # the pages, and their part of a shard
    other = load_source(args.compare, args.engine) if args.compare else None
    if args.images:
        pages = picture_pages(args.images, args.pictures)
    else:
        pages = labelled_pages(args, source, other)
    first, step = args.shard or (1, 1)
    pages = pages[first - 1 :: step]

    # flags and outputs that do not go with them are refused before they are predicted
    labelled = any(page.polygons for page in pages)
    rules = [
        ("compare html json stress", labelled, "the pages have no labels"),
        ("rank", not labelled, "the pages have labels"),
    ]
    refuse_idle(args, rules)
    for one in filter(None, (source, other)):  # before the first of them predicts, maybe for hours
        if one.hp:
            one.runtime(args.device)
        else:
            check_pages(one, pages)
    if not labelled:
        for page in pages:
            page.polygons = None  # not known: nothing that is found is drawn as a false alarm
    inputs = files_read(args, pages)
    drawn = []
    if args.pictures:
        drawn = [args.pictures, *(picture_file(page, args.pictures) for page in pages)]
    check_outputs([args.out, args.html], inputs, drawn=drawn)

    code = 0
    with pictures.libjpeg_lines() as lines, text_aside(args.out, args.html):
        if args.stress:
            run_stress(args, [source, other] if other else [source], pages)
        elif labelled:
            code = score_labelled(args, source, other, pages)
        else:
            code = find_words(args, source, pages)
    warn_of_damage(lines, pages)
    if works:
        warn_of_more_pages(pages)
    return code


def main(argv=None):
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
