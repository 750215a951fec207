"""How several networks vote: mean maps, polygon voting, the gate against the best member, the CSV.

python ensemble.py runs/run8-fold*/best.pt --data DATA   on labelled pages that no member trained on
python ensemble.py                                       the one whole set of fold runs under runs/
python ensemble.py a.pt b.pt other.json --method voting --threshold 2 --data DATA
python ensemble.py best.pt --data TEST --sample sample_submission.csv --submission out.csv
python ensemble.py --validate out.csv --data TEST        what is wrong with a submission, and where

One checkpoint is an ensemble of one. Exit code 0: better than the best member or nothing to
compare; 2: something is wrong with the input; 3: not shown to be better than the best member.
"""

import csv
import difflib
import io
import json
import math
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import shapely
import torch
from tqdm import tqdm

import data
from cleval import (
    MAX_DETECTIONS,
    bootstrap_groups,
    mean_scores,
    metric_rows,
    paired_difference,
    score_all,
    summary,
    to_shapely,
)
from db_postprocess import DECODING, decode_page
from dbnet import NetworkError, load_network
from evaluate import (
    OVERRIDES,
    add_overrides,
    amp_dtype,
    choose_device,
    exit_code,
    given_overrides,
    own_pages,
    print_line,
    print_scores,
    trained_on,
    write_predictions,
)
from files import DataError, Parser, read_json, read_text, replace_file
from labels import (
    PICTURES,
    SPLITS,
    Page,
    find_labels,
    folder_labels,
    has_split,
    image_dir_of,
    load_labels,
    picture_path,
    read_competition,
)

SAME_WORD = 0.5  # IoU from which two members mean the same word
HEADER = ["filename", "polygons"]
EXIT_NOT_BETTER = 3

# ---------------------------------------------------------------- voting


def canonical(polygon):
    """Polygon [P, 2] -> the same outline clockwise on the screen from its top left vertex."""
    if signed_area(polygon) < 0:
        polygon = polygon[::-1]
    start = np.lexsort((polygon[:, 0], polygon.sum(1)))[0]
    return np.concatenate([polygon[start:], polygon[:start]])


def signed_area(polygon):
    """Area of a polygon [P, 2], negative where it runs counter-clockwise on the screen."""
    x, y = polygon.T
    return (x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]) / 2


def vote(members, weights, threshold):
    """
    Words that enough members see: one vote a member, and of each word one member's polygon.
    members: K x (N polygons [P, 2], scores [N]) of one page, None where a member has not seen it;
      weights: K; threshold: least sum of the weights of those who see the word, and for a page
      that some have not seen the same share of the weights of the others
    returns: polygons (list of [P, 2], see canonical) and confidences [N] = sum of weight x score
      over the weights of all, highest first. Does not depend on the order of members, polygons
      or vertices. Vertices are never averaged: the mean of shifted quads is no quad.
    """
    seen = sorted((w, rank_regions(*m)) for m, w in zip(members, weights) if m is not None)
    weights_seen = np.array([weight for weight, _ in seen])
    regions = [region for _, ranked in seen for region in ranked]
    owner = np.repeat(np.arange(len(seen)), [len(ranked) for _, ranked in seen])
    overlap = overlaps([np.array(points) for points, _ in regions], owner)
    score = np.array([score for _, score in regions])
    result = []
    for cluster in cluster_words(overlap, owner):
        weight = weights_seen[owner[cluster]]
        if weight.sum() >= threshold * weights_seen.sum() / sum(weights) - 1e-9:
            points = regions[medoid(cluster, weight, overlap, score)][0]
            result.append((weight @ score[cluster] / weights_seen.sum(), points))
    result.sort(key=lambda item: (-round(item[0], 12), item[1]))
    return [np.array(points) for _, points in result], np.array([c for c, _ in result])


def rank_regions(polygons, scores):
    """Polygons and scores -> [(points of the canonical polygon, score)] in order of coordinates."""
    pairs = zip(polygons, scores)
    return sorted((canonical(np.asarray(p, float)).tolist(), float(s)) for p, s in pairs)


def overlaps(polygons, owner):
    """N polygons, members [N] -> {(i, j): IoU} of pairs i < j of different members where > 0."""
    areas = to_shapely(polygons)
    i, j = shapely.STRtree(areas).query(areas)
    i, j = np.stack([i, j])[:, owner[i] < owner[j]]
    shared = shapely.area(shapely.intersection(areas[i], areas[j]))
    iou = shared / (shapely.area(areas[i]) + shapely.area(areas[j]) - shared)
    return dict(zip(zip(i.tolist(), j.tolist()), np.round(iou, 9).tolist()))


def cluster_words(overlap, owner):
    """IoUs {(i, j): IoU}, members [N] -> sorted lists of indices, none with a member twice. Pairs
    join from the highest IoU down to SAME_WORD, equal ones in the order of their indices."""
    cluster_of = [[n] for n in range(len(owner))]
    pairs = sorted((-iou, i, j) for (i, j), iou in overlap.items() if iou >= SAME_WORD)
    for _, i, j in pairs:
        first, second = cluster_of[i], cluster_of[j]
        if first is not second and not set(owner[first]) & set(owner[second]):
            first.extend(second)
            for n in second:
                cluster_of[n] = first
    return [sorted(cluster) for n, cluster in enumerate(cluster_of) if min(cluster) == n]


def medoid(cluster, weight, overlap, score):
    """Indices [M], their weights [M], IoUs, scores [N] -> the index with the largest weighted sum
    of IoUs with the cluster; ties by score, then by index."""

    def support(n):
        iou = [1.0 if m == n else overlap.get((min(m, n), max(m, n)), 0.0) for m in cluster]
        return round(float(weight @ iou), 9)

    return max(cluster, key=lambda n: (support(n), score[n], -n))


# ---------------------------------------------------------------- maps


def map_shape(page_size, size):
    """(rows, columns) of the map of a page (width, height) at a page size, see data.resize_page."""
    width, height = (max(1, round(side * (size / max(page_size)))) for side in page_size)
    return height, width


@torch.no_grad()
def predict_map(model, image, size, flip, amp, device):
    """RGB page uint8 [H, W, 3] -> probabilities float32 [h, w] at one page size; flip: their mean
    with those of the mirrored page, mirrored back. Raises NetworkError on another stride."""
    copies = [image, image[:, ::-1]] if flip else [image]
    padded = np.stack([data.resize_page(copy, size)[0] for copy in copies])  # [B, H', W', 3]
    dtype = amp_dtype(amp, device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = model(torch.from_numpy(padded).to(device))
    if logits.shape != (len(copies), 1, *padded.shape[1:3]):
        shapes = f"a map {list(logits.shape)} for pages {list(padded.shape)}"
        raise NetworkError(f"gives {shapes}; one channel at stride 1 is needed")
    h, w = map_shape(image.shape[1::-1], size)
    maps = logits[:, 0].float().sigmoid().cpu().numpy()[:, :h, :w]
    return (maps[0] + maps[1, :, ::-1]) / 2 if flip else maps[0]


def to_shape(prob, shape):
    return prob if prob.shape == shape else cv2.resize(prob, shape[::-1])


def member_map(member, image, scales, flip, device):
    """One member's map of a page, uint8 [h, w] at its own page size: the mean over page sizes."""
    hp, shape = member.hp, map_shape(image.shape[1::-1], member.hp["size"])
    try:
        sizes, amp = scales or [hp["size"]], hp["amp"]
        maps = [predict_map(member.model, image, s, flip, amp, device) for s in sizes]
    except NetworkError as error:
        raise NetworkError(f"{member.name}: {error}") from None
    mean = np.mean([to_shape(m, shape) for m in maps], 0)
    return np.round(mean * 255).astype(np.uint8)


def mean_map(maps, weights, shape):
    """K maps uint8 [h, w] of any sizes -> their weighted mean uint8, `shape` (rows, columns)."""
    total = np.zeros(shape, np.float32)
    for prob, weight in zip(maps, weights):
        total += np.float32(weight) * to_shape(prob, shape)
    return np.round(total / np.float32(sum(weights))).astype(np.uint8)


# ---------------------------------------------------------------- members


class Member(NamedTuple):
    """A network (model, hp, checkpoint's scores) or a predictions file (regions by page name)."""

    name: str
    model: object = None
    hp: dict | None = None
    scores: dict = {}
    regions: dict | None = None
    best: bool = False  # of its run's epochs, by the pages of its scores


def load_member(source, overrides, device):
    """A checkpoint or predictions.json. Raises DataError, NetworkError naming the file."""
    if not source.endswith(".json"):
        model, hp, state = load_network(source, device)
        scores = state.get("scores") or {}
        return Member(source, model, {**hp, **overrides}, scores, None, "optimizer" not in state)
    pages = read_competition(source, need_pictures=False)
    if not any(p.polygons for p in pages):
        none = f"no region on any of {len(pages)} pages"
        raise DataError(f"{source}: {none}; is this a predictions file?")
    regions = {p.name: (p.polygons, np.array(p.confidences)) for p in pages}
    return Member(source, regions=regions)


def discover(folder="runs"):
    """best.pt of the one set of runs under `folder` that are all folds of one configuration.

    Raises DataError when no set is whole or several are.
    """
    sets, private = defaultdict(dict), ("name", "fold", "workers", "stop_epoch")
    for file in sorted(Path(folder).glob("**/best.pt")):
        beside = file.with_name("hparams.json")
        hp = read_json(beside) if beside.is_file() else {}
        if hp.get("folds"):
            key = json.dumps({k: v for k, v in hp.items() if k not in private}, sort_keys=True)
            sets[hp["folds"], key].setdefault(hp["fold"], []).append(str(file))
    whole = [
        [files for fold in range(1, folds + 1) for files in found[fold]]
        for (folds, _), found in sets.items()
        if set(found) == set(range(1, folds + 1))
    ]
    if len(whole) == 1:
        return whole[0]
    if whole:
        shown = ", ".join(f"{files[0]} ..." for files in whole)
        raise DataError(f"{len(whole)} sets of fold runs under {folder}/: {shown}; name one's")
    part = [
        f"{Path(files[0]).parent} (fold {fold} of {folds})"
        for (folds, _), found in sets.items()
        for fold, files in sorted(found.items())
    ]
    found = f"no whole set of fold runs with a best.pt under {folder}/ (found: "
    raise DataError(f"{found}{', '.join(part) or 'none'}); name checkpoints")


def recorded_score(member):
    """H-mean that the run measured on the pages it held out. Raises DataError if there is none."""
    if "hmean" not in member.scores:
        need = "--best, --drop-worst, --weights need it"
        raise DataError(f"{member.name}: no out-of-fold score in it; {need}")
    return member.scores["hmean"]


def choose_members(members, best, drop_worst):
    """The `best` members, or all but the worst, by their recorded scores; the order stays."""
    keep = len(members) - 1 if drop_worst else best or len(members)
    if not 1 <= keep <= len(members):
        raise DataError(f"{keep} of {len(members)} members; 1 to {len(members)} are possible")
    if keep == len(members):
        return members
    ranked = sorted(range(len(members)), key=lambda k: -recorded_score(members[k]))
    return [members[k] for k in sorted(ranked[:keep])]


def parse_weights(text, members):
    """--weights (none, `scores` or K numbers) -> K weights whose mean is 1. Raises DataError."""
    if not text:
        return [1.0] * len(members)
    if text == "scores":
        weights = [recorded_score(member) for member in members]
    else:
        weights = parse_numbers("--weights", text, float)
    if len(weights) != len(members) or not all(0 < w < math.inf for w in weights):
        need = f"{len(members)} positive numbers are needed, one a member"
        raise DataError(f"--weights {text}: {need}")
    return [w * len(weights) / sum(weights) for w in weights]


def parse_numbers(flag, text, kind):
    try:
        return [kind(value) for value in text.split(",")]
    except ValueError:
        raise DataError(f"{flag} {text}: give numbers with commas between") from None


def common_decoding(members):
    """hp to decode the mean map with. Raises DataError when the members differ in it."""
    for key in (*DECODING, "amp"):
        values = {}
        for member in members:
            values.setdefault(member.hp[key], member.name)
        if len(values) > 1:
            shown = ", ".join(f"{value} in {name}" for value, name in values.items())
            if key == "shrink_ratio":
                kinds = f"members have maps of different kinds: {key} {shown}"
                raise DataError(f"{kinds}; use --method voting")
            if key != "amp":
                differ = f"members decode differently: {key} {shown}"
                raise DataError(f"{differ}; say which by --{key}")
    size = max(member.hp["size"] for member in members)
    return {**members[0].hp, "size": size}


# ---------------------------------------------------------------- pages that members trained on


def find_leaks(members, pages):
    """K sets of indices of pages that the members trained on; says on stderr what is not known."""
    leaks = []
    for member in members:
        known = trained_on(member.name, member.hp, member.scores, pages) if member.model else None
        if known is None:
            say = "its training pages are not here, so not checked that it never saw these"
            print(f"warning: {member.name}: {say}", file=sys.stderr)
        leaks.append(known or set())
    return leaks


def refuse_leaks(ensemble, leaks, pages):
    """Print each member's score on the pages it did not train on. Raises DataError, always."""
    for member, leak in zip(ensemble.members, leaks):
        clean = [page for n, page in enumerate(pages) if n not in leak]
        if clean:
            alone = ensemble._replace(members=[member], weights=[1.0])
            found = predict_all(alone, clean, [[0]])[0][0]
            result = summary("page", metric_rows("page", clean, found), bootstrap_groups(clean))
            print_line(result, f"{member.name}, {len(clean)} pages that it did not train on")
    k = max(range(len(leaks)), key=lambda k: len(leaks[k]))
    some = f"{len(leaks[k])} of these {len(pages)} pages (first: {pages[min(leaks[k])].name})"
    say = "judge on pages outside all folds, see --data"
    raise DataError(f"{ensemble.members[k].name} trained on {some}; {say}")


# ---------------------------------------------------------------- prediction


class Ensemble(NamedTuple):
    """K members and how they become one: weights [K] of mean 1, method, decoding of the mean map
    (hp), least sum of weights (threshold), page sizes to predict at (scales), mirroring (flip)."""

    members: list
    weights: list
    method: str
    hp: dict | None
    threshold: float
    scales: list | None
    flip: bool
    device: object


def predict_all(ensemble, pages, subsets):
    """
    What every member and every subset of members find on pages; sets page.size.
    subsets: lists of member indices
    returns: [K] and [len(subsets)] lists of (polygons, scores) a page, as evaluate.predict
    """
    results, loaders = [], min(8, os.cpu_count() or 1)
    bar = tqdm(total=len(pages), desc="predicting", leave=False, disable=not sys.stderr.isatty())
    with ThreadPoolExecutor(loaders) as load, ThreadPoolExecutor(loaders) as decoders, bar:
        for start in range(0, len(pages), 32):  # bounds how many decoded pictures wait in memory
            chunk = pages[start : start + 32]
            for page, image in zip(chunk, load.map(lambda p: data.read_image(p.path), chunk)):
                page.size = image.shape[1], image.shape[0]
                how = image, ensemble.scales, ensemble.flip, ensemble.device
                maps = [member_map(m, *how) if m.model else None for m in ensemble.members]
                job = decoders.submit(decode_all, ensemble, page, maps, subsets)
                results.append(job)
                bar.update()
                if len(results) > 64:  # maps wait for decoding that lags behind, but no more
                    results[-64].result()
    found = list(zip(*(job.result() for job in results)))
    return found[: len(ensemble.members)], found[len(ensemble.members) :]


def decode_all(ensemble, page, maps, subsets):
    """One page, maps of its members -> (polygons, scores) of every member, then of every subset."""
    found = [
        m.regions.get(page.name) if prob is None else decode(prob, page.size, m.hp)
        for m, prob in zip(ensemble.members, maps)
    ]
    return [*found, *(combine(ensemble, page, keep, maps, found) for keep in subsets)]


def decode(prob, page_size, hp):
    scale = np.array(prob.shape[::-1]) / page_size
    return decode_page(prob, scale, page_size, SimpleNamespace(**hp))


def combine(ensemble, page, keep, maps, found):
    """(polygons, scores) of the members `keep` (indices) on one page."""
    if ensemble.method == "voting":
        votes = [f if k in keep else None for k, f in enumerate(found)]
        return vote(votes, ensemble.weights, ensemble.threshold)
    shape = map_shape(page.size, ensemble.hp["size"])
    weights = [ensemble.weights[k] for k in keep]
    return decode(mean_map([maps[k] for k in keep], weights, shape), page.size, ensemble.hp)


# ---------------------------------------------------------------- gate


def gate(ensemble, pages):
    """
    Scores of every member, of every leave-one-out and of the ensemble on labelled pages, and the
    paired difference to the best member with its 95 % bootstrap interval.
    returns: (what the ensemble found, as evaluate.predict; the --json object)
    The best member is the best on these same pages, so the difference is rather too small.
    """
    names, everyone = [m.name for m in ensemble.members], list(range(len(ensemble.members)))
    left_out = everyone if len(everyone) > 2 else []
    subsets = [everyone, *([m for m in everyone if m != k] for k in left_out)]
    found, (together, *without) = predict_all(ensemble, pages, subsets)
    groups = bootstrap_groups(pages)
    rows, result = score_all(pages, together)
    member_rows = [metric_rows("page", pages, f) for f in found]
    result["method"] = ensemble.method
    result["members"] = [
        {"name": name, **summary("page", r, groups)} for name, r in zip(names, member_rows)
    ]
    result["leave_one_out"] = [
        {"without": names[k], **summary("page", metric_rows("page", pages, f), groups)}
        for k, f in zip(left_out, without)
    ]
    if len(everyone) > 1:
        best = max(everyone, key=lambda k: (result["members"][k]["hmean"], names[k]))
        difference = paired_difference(rows["page"], member_rows[best], mean_scores, groups)
        result["gate"] = {"best_member": names[best], **difference}
    return together, result


def print_gate(result):
    for member in result["members"]:
        print_line(member, member["name"])
    for one in result["leave_one_out"]:
        print_line(one, f"without {one['without']}")
    print(f"ensemble by {result['method']} of {len(result['members'])}:")
    print_scores(result)
    if "gate" not in result:
        return
    verdict, (low, high) = result["gate"]["verdict"], result["gate"]["interval"]
    best = f"against the best member {result['gate']['best_member']}"
    print(f"hmean {result['gate']['difference']:+.4f} [{low:+.4f}, {high:+.4f}] {best}: {verdict}")
    if verdict != "better":
        loss = "worse than" if verdict == "worse" else "not shown to be better than"
        print(f"the ensemble is {loss} its best member on these pages: predict with the member")


def decide(interval, success, acceptable):
    """Which of three verdicts holds for all of an interval [low, high] of H-means, if any."""
    verdicts = ("success", "acceptable", "fall back to hparams/run3.json")
    high, low = sorted(0 if v >= success else 1 if v >= acceptable else 2 for v in interval)
    if low == high:
        return verdicts[low]
    return f"cannot tell: from {verdicts[low]} to {verdicts[high]}"


# ---------------------------------------------------------------- submission


def region_points(polygon, page_size):
    """Polygon [P, 2] -> integers [P' >= 4, 2] on the page (width, height); None if nothing is left.

    Repeated points go; a triangle gets a point in the middle of its longest edge.
    """
    points = np.round(np.clip(polygon, 0, page_size)).astype(int)
    points = points[(points != np.roll(points, 1, 0)).any(1)]
    if len(points) == 3:
        edge = np.roll(points, -1, 0) - points
        n = int(np.argmax((edge**2).sum(1)))
        points = np.insert(points, n + 1, points[n] + edge[n] // 2, 0)
        points = points[(points != np.roll(points, 1, 0)).any(1)]
    return points if len(points) >= 4 and signed_area(points) else None


def submission_regions(polygons, scores, page_size):
    """Regions of one page for a submission: at most MAX_DETECTIONS, by confidence, none twice."""
    regions = {}
    for n in np.argsort(-np.asarray(scores), kind="stable"):
        points = region_points(polygons[n], page_size)
        if points is not None:
            regions.setdefault(tuple(canonical(points).ravel().tolist()), points)
    return list(regions.values())[:MAX_DETECTIONS]


def write_submission(path, pages, found):
    """CSV of `filename,polygons`, one row a page (with page.size), whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for page, (polygons, scores) in zip(pages, found):
        regions = submission_regions(polygons, scores, page.size)
        field = "|".join(" ".join(map(str, region.ravel().tolist())) for region in regions)
        writer.writerow([page.name, field])
    replace_file(path, text.getvalue())


def read_table(path):
    """A CSV of the header HEADER -> [(line, fields)]. Raises DataError when it is none."""
    csv.field_size_limit(2**20)
    text = read_text(path, 2**26, "utf-8")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error})") from None
    if not rows or rows[0][1] != HEADER:
        shown = ",".join(rows[0][1])[:60] if rows else ""
        raise DataError(f"{path}: line 1: the header is {shown!r}; {','.join(HEADER)} needed")
    if not text.endswith("\n"):
        raise DataError(f"{path}: no line end after the last row; is the file cut off?")
    return rows[1:]


def read_sample(path):
    """File names of a sample submission, in its order. Raises DataError."""
    rows = read_table(path)
    names = [row[0] for _, row in rows if row]
    if len(set(names)) != len(rows):
        raise DataError(f"{path}: an empty line or a page twice among its {len(rows)} rows")
    return names


def parse_region(text, page_size=None):
    """`x y x y ...` -> int array [P, 2]. Raises ValueError that says what is wrong with it."""
    tokens = text.split(" ")
    if not re.fullmatch("-?[0-9]{1,7}( -?[0-9]{1,7})*", text):
        wrong = next(token for token in tokens if not re.fullmatch("-?[0-9]{1,7}", token))
        raise ValueError(f"has {wrong[:40]!r}; whole numbers with one space between are needed")
    if len(tokens) % 2:
        raise ValueError(f"has {len(tokens)} numbers; x y pairs are needed")
    points = np.array(tokens, int).reshape(-1, 2)
    if len(points) < 4:
        raise ValueError(f"has {len(points)} points; at least 4 are needed")
    if points.min() < 0 or page_size and (points > page_size).any():
        raise ValueError(f"leaves the page {'x'.join(map(str, page_size or ()))}".strip())
    if not signed_area(points):
        raise ValueError("has no area")
    return points


def parse_field(field, where, page_size=None):
    """The polygons field of a row -> (regions, problems)."""
    texts, regions, problems, first = field.split("|") if field else [], [], [], {}
    if len(texts) > MAX_DETECTIONS:
        problems.append(f"{where}: {len(texts)} regions; at most {MAX_DETECTIONS} are allowed")
    for n, text in enumerate(texts, 1):
        try:
            points = parse_region(text, page_size)
        except ValueError as error:
            problems.append(f"{where}: region {n} {error}")
            continue
        before = first.setdefault(tuple(canonical(points).ravel().tolist()), n)
        if before != n:
            problems.append(f"{where}: region {n} is region {before} again")
        regions.append(points)
    return regions, problems


def read_submission(path, names=None, sizes=None, ordered=False):
    """
    A submission and everything that is wrong with it.
    names: the pages it has to hold, in their order where `ordered`; sizes: {name: (width, height)}
    returns: {name: list of int arrays [P, 2]}, list of problems, each one line
    """
    try:
        rows = read_table(path)
    except DataError as error:
        return {}, [str(error)]
    regions, problems, first = {}, [], {}
    for line, row in rows:
        where = f"{path}: line {line}"
        if len(row) != 2:
            problems.append(f"{where}: {len(row)} fields; 2 are needed, quote a name with a comma")
            continue
        where += f": {row[0]}"
        if row[0] in first:
            problems.append(f"{where}: is there already in line {first[row[0]]}")
            continue
        if names is not None and row[0] not in names:
            problems.append(f"{where}: not a page that is asked for")
        first[row[0]] = line
        regions[row[0]], wrong = parse_field(row[1], where, (sizes or {}).get(row[0]))
        problems += wrong
    missing = [name for name in names or () if name not in first]
    if missing:
        problems.append(f"{path}: {len(missing)} pages have no row (first: {missing[0]})")
    if ordered and not problems and list(regions) != list(names):
        name = next(a for a, b in zip(regions, names) if a != b)
        problems.append(f"{path}: line {first[name]}: {name}: not in the order of the sample")
    return regions, problems


# ---------------------------------------------------------------- command line


def parse_args(argv):
    parser = Parser(usage="python ensemble.py [SOURCE ...] [options]", description=__doc__)
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="checkpoints; for voting any predictions.json")
    add("--device", default="auto", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add = parser.add_argument_group("pages (default: what the runs validated on)").add_argument
    add("--data", help="folder or label file, or a folder of pictures")
    add("--split", choices=SPLITS, help="of DATA (default val, for a submission test)")
    add("--image-dir", metavar="DIR", help="where the pictures lie, if not beside the labels")
    add = parser.add_argument_group("how they vote").add_argument
    add("--method", choices=("maps", "voting"), default="maps", help="(default maps)")
    add("--threshold", type=float, help="voting: least sum of weights (default: more than half)")
    add("--weights", help="`scores` (as recorded on held-out pages) or numbers, one a member")
    add("--scales", metavar="SIZES", help="predict at these page sizes too, as 960,1120")
    add("--flip", action="store_true", help="predict the mirrored page too")
    add("--best", type=int, metavar="N", help="keep the N best members by recorded score")
    add("--drop-worst", action="store_true", help="leave out the worst by recorded score")
    marks = ("SUCCESS", "ACCEPTABLE")
    add("--decide", nargs=2, type=float, metavar=marks, help="which H-mean the interval reaches")
    add = parser.add_argument_group("files").add_argument
    add("--submission", metavar="CSV", help="write filename,polygons; and JSON beside it, or --out")
    add("--sample", metavar="CSV", help="a submission whose pages and order to keep")
    add("--out", metavar="JSON", help="write the predictions with confidences")
    add("--validate", metavar="CSV", help="check a submission and stop")
    add("--hparams", metavar="JSON", help="take the values below from this file")
    add_overrides(parser)
    return parser.parse_args(argv)


def read_overrides(args):
    """Decoding values of --hparams and of flags, flags first. Raises DataError."""
    values = read_json(args.hparams) if args.hparams else {}
    if not isinstance(values, dict):
        raise DataError(f"{args.hparams}: not a JSON object of hyperparameters")
    for key in values.keys() - OVERRIDES.keys():  # of training, unless it is a slip
        if near := difflib.get_close_matches(key, OVERRIDES, 1, 0.8):
            hint = f"did you mean {near[0]!r}?"
            raise DataError(f"{args.hparams}: unknown key {key[:80]!r}; {hint}")
    return given_overrides(args, {key: values[key] for key in OVERRIDES if key in values})


def load_pages(args):
    """Pages of --data: a split, or the pictures that --sample names, or those of a plain folder."""
    folder = data.resolve_data(args.data)
    wanted = "test" if args.submission or args.validate else "val"
    split = args.split or (wanted if has_split(folder, wanted) else "val")
    names = read_sample(args.sample) if args.sample else None
    if not folder.is_dir() or find_labels(folder, split) or folder_labels(folder):
        pages = {page.name: page for page in load_labels(folder, split, args.image_dir)}
        missing = [name for name in names or () if name not in pages]
        if missing:
            some = f"{len(missing)} of {len(names)} pages are not in {args.data}"
            raise DataError(f"{args.sample}: {some} (first: {missing[0]})")
        return [pages[name] for name in names or pages]
    where = args.sample or args.data
    if names is None and not args.split:
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if not names:
        return load_labels(folder, split, args.image_dir)  # says what is missing
    pictures = image_dir_of(folder / "labels", args.image_dir)
    return [Page(name, picture_path(pictures, name, where)) for name in names]


def choose_pages(args, members):
    """The pages to work on: --data, else those that the members' runs validated on or, when these
    are different folds, the val split beside them. Raises DataError."""
    if args.data:
        return load_pages(args)
    runs = [member.hp for member in members if member.hp]
    keys = ("data", "val_data", "image_dir", "folds", "fold")
    if not runs or any(hp[key] != runs[0][key] for hp in runs for key in keys[:4]):
        raise DataError("which pages? the members do not share their data; add --data")
    if all(hp["fold"] == runs[0]["fold"] for hp in runs) or not runs[0]["folds"]:
        return own_pages(runs[0])
    folder = data.resolve_data(runs[0]["data"])
    if not has_split(folder, "val"):
        raise DataError(f"{folder}: no val split outside the folds; name pages by --data")
    return load_labels(folder, "val", runs[0]["image_dir"] or None)


def check_page_sets(members, pages, labelled):
    """Raises DataError when a predictions file lacks pages: all, or any that it is compared on."""
    for member in (m for m in members if m.regions is not None):
        missing = [page.name for page in pages if page.name not in member.regions]
        if missing and (labelled or len(missing) == len(pages)):
            some = f"{len(missing)} of {len(pages)} pages are not in it (first: {missing[0]})"
            raise DataError(f"{member.name}: {some}; a page without words needs an entry too")
        if missing:
            say = f"does not vote on {len(missing)} of {len(pages)} pages that are not in it"
            print(f"warning: {member.name}: {say}", file=sys.stderr)


def build(args):
    """The ensemble of the command line. Raises DataError, NetworkError."""
    device, overrides = choose_device(args.device), read_overrides(args)
    sources = args.sources or discover()
    if not args.sources:
        print(f"members: {', '.join(sources)}", file=sys.stderr)
    if len(set(sources)) < len(sources):
        raise DataError("a member is named twice; it would vote twice")
    files = [source for source in sources if source.endswith(".json")]
    if files and args.method == "maps":
        raise DataError(f"{files[0]}: has no maps; use --method voting")
    if args.best is not None and args.drop_worst:
        raise DataError("--best and --drop-worst: give one of them")
    members = [load_member(source, overrides, device) for source in sources]
    members = choose_members(members, args.best, args.drop_worst)
    weights = parse_weights(args.weights, members)
    threshold = len(members) / 2 + 1e-6 if args.threshold is None else args.threshold
    if not 0 < threshold <= len(members):
        most = f"{len(members)}, the sum of the weights"
        raise DataError(f"--threshold {threshold}: not within 0 to {most}")
    scales = parse_numbers("--scales", args.scales, int) if args.scales else None
    if scales and not all(32 <= size <= 8192 for size in scales):
        raise DataError(f"--scales {args.scales}: page sizes within 32 to 8192 are needed")
    hp = common_decoding(members) if args.method == "maps" else None
    return Ensemble(members, weights, args.method, hp, threshold, scales, args.flip, device)


def validate(args):
    """Print what is wrong with a submission; returns the exit code."""
    names = sizes = None
    if args.data:
        pages = load_pages(args)
        names = [page.name for page in pages]
        sizes = {page.name: page.size for page in pages}
    elif args.sample:
        names = read_sample(args.sample)
    regions, problems = read_submission(args.validate, names, sizes, bool(args.sample))
    for problem in problems[:20]:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > 20:
        print(f"error: {args.validate}: {len(problems) - 20} more", file=sys.stderr)
    if not problems:
        count = sum(map(len, regions.values()))
        print(f"{args.validate}: {len(regions)} pages, {count} regions, no errors")
    return 2 if problems else 0


def judge(args, ensemble, pages):
    """Predict labelled pages and print the gate's verdict; returns (what was found, exit code)."""
    leaks = find_leaks(ensemble.members, pages)
    if any(leaks):
        refuse_leaks(ensemble, leaks, pages)
    names = {page.name for page in pages}
    best = [member for member in ensemble.members if member.best]
    selected = [member.name for member in best if names & set(member.scores.get("pages", ()))]
    if selected:
        say = f"some of these pages chose the epoch of {', '.join(selected)}"
        print(f"note: {say}: the scores are rather too good", file=sys.stderr)
    found, result = gate(ensemble, pages)
    if args.decide:
        result["decision"] = decide(result["interval"], *args.decide)
    if args.json:
        print(json.dumps(result))
    else:
        print_gate(result)
        if args.decide:
            print(f"decision: {result['decision']}")
    better = "gate" not in result or result["gate"]["verdict"] == "better"
    return found, 0 if better else EXIT_NOT_BETTER


def run(args):
    if args.validate:
        return validate(args)
    if args.decide and not args.decide[0] > args.decide[1]:
        raise DataError("--decide SUCCESS ACCEPTABLE: the first has to be the larger")
    if args.sample and not args.submission:
        raise DataError("--sample: add --submission, the file to write")
    if args.submission and Path(args.submission).suffix != ".csv":
        raise DataError(f"--submission {args.submission}: give a .csv file")
    ensemble = build(args)
    pages = choose_pages(args, ensemble.members)
    labelled, code = any(page.polygons for page in pages), 0
    check_page_sets(ensemble.members, pages, labelled)
    if labelled:
        found, code = judge(args, ensemble, pages)
    elif args.decide or not (args.submission or args.out):
        raise DataError("the pages have no labels to judge on; add --submission or --out")
    else:
        found = predict_all(ensemble, pages, [list(range(len(ensemble.members)))])[1][0]
    out = args.out or args.submission and Path(args.submission).with_suffix(".json")
    if out:
        write_predictions(out, pages, found)
    if args.submission:
        write_submission(args.submission, pages, found)
        count = sum(len(polygons) for polygons, _ in found)
        print(f"{args.submission}: {len(pages)} pages, {count} regions found", file=sys.stderr)
    return code


def main(argv=None):
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
