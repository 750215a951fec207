"""How several networks vote: mean maps, polygon voting, the gate against the best member, the CSV.

python ensemble.py runs/run8-fold*/last.pt --data DATA   on labelled pages that no member trained on
python ensemble.py                                       the one name's fold runs under runs/
python ensemble.py a.pt b.pt other.json --method voting --votes 2 --data DATA
python ensemble.py best.pt --data TEST --sample sample_submission.csv --submission out.csv
python ensemble.py --validate out.csv --data TEST        what is wrong with a submission, and where

One checkpoint is an ensemble of one. Exit code 5: not shown to be better than the best member."""

import codecs
import csv
import hashlib
import io
import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import cleval
import data
import evaluate
import labels
import pictures
from db_postprocess import DECODING, decode_page, first_that_fit, signed_area
from dbnet import load_network
from engine import choose_device
from files import (
    DataError,
    Parser,
    UsageError,
    check_writable,
    exit_code,
    guard,
    read_bytes,
    read_json,
    read_text,
    replace_file,
)
from hparams import Hparams, add_flags, checked, saved_hparams
from interval import Difference, bootstrap_groups, make_score, paired_difference

SAME_WORD = 0.5  # IoU from which two members mean the same word
HEADER = ["filename", "polygons"]
EXIT_NOT_BETTER = 5

# ---------------------------------------------------------------- voting


def canonical(polygon):
    """Polygon [P, 2] -> the same outline clockwise on the screen from its top left vertex."""
    if signed_area(polygon) < 0:
        polygon = polygon[::-1]
    start = np.lexsort((polygon[:, 0], polygon.sum(1)))[0]
    return np.roll(polygon, -start, 0)


def vote(members, weights, votes):
    """K x (N polygons [P, 2], scores [N]) of one page, None where a member has not seen it, and K
    weights -> polygons (list of [P, 2], see canonical) of the words that enough members see and
    confidences [N] = sum of weight x score over the weights of all, highest first, whatever the
    order of members, polygons and vertices. votes: least sum of the weights of those who see a
    word; of a page that some have not seen the same share of the others' weights. Of each word one
    member's polygon is taken: the mean of shifted quads is no quad."""
    seen = sorted((w, rank_regions(*m)) for m, w in zip(members, weights) if m is not None)
    weights_seen = np.array([weight for weight, _ in seen])
    regions = [region for _, ranked in seen for region in ranked]
    owner = np.repeat(np.arange(len(seen)), [len(ranked) for _, ranked in seen])
    overlap = overlaps([np.array(points) for points, _ in regions], owner)
    score = np.array([score for _, score in regions])
    result = []
    for cluster in cluster_words(overlap, owner):
        weight = weights_seen[owner[cluster]]
        if weight.sum() >= votes * weights_seen.sum() / sum(weights) - 1e-9:
            points = regions[medoid(cluster, weight, overlap, score)][0]
            result.append((weight @ score[cluster] / weights_seen.sum(), points))
    result.sort(key=lambda item: (-round(item[0], 12), item[1]))
    words = [np.array(points) for _, points in result]
    return first_that_fit(words, np.array([confidence for confidence, _ in result]))


def rank_regions(polygons, scores):
    """[(points of the canonical polygon, score)] in order of coordinates."""
    outlines = (canonical(np.asarray(polygon, float)).tolist() for polygon in polygons)
    return sorted(zip(outlines, map(float, scores)))


def overlaps(polygons, owner):
    """N polygons, members [N] -> {(i, j): IoU} of pairs i < j of different members where > 0."""
    shapes = cleval.make_shapes(cleval.to_shapely(polygons))
    i, j = cleval.touching(shapes.box, shapes.box)
    different = owner[i] < owner[j]
    i, j = i[different], j[different]
    shared = cleval.overlap_area(shapes, i, shapes, j)
    iou = shared / (shapes.area[i] + shapes.area[j] - shared)
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
    """Index with the largest weighted sum of IoUs with its cluster; ties by score, then index."""

    def support(n):
        iou = [1.0 if m == n else overlap.get((min(m, n), max(m, n)), 0.0) for m in cluster]
        return round(float(weight @ iou), 9)

    return max(cluster, key=lambda n: (support(n), score[n], -n))


# ---------------------------------------------------------------- members


def flipped(model):
    """A network whose map is the mean of the page's and of the mirrored page's, mirrored back."""

    def logits(pages):  # uint8 [B, H, W, 3] -> [B, 1, H, W]
        page, mirrored = model(torch.cat([pages, pages.flip(2)])).float().sigmoid().chunk(2)
        return torch.logit((page + mirrored.flip(3)) / 2, eps=1e-6)

    return logits


class Member(NamedTuple):
    """A network or a predictions file (regions by page); its run's recorded scores; a digest."""

    name: str
    network: evaluate.Network | None
    regions: dict | None
    scores: dict
    digest: str = ""


class Ensemble(NamedTuple):
    """K members, weights [K] of mean 1; decoding of their mean map, or least weight of a vote;
    digests or names of the pages whose scores chose or weigh the members."""

    members: list
    weights: list
    method: str
    hp: Hparams | None
    votes: float
    device: torch.device
    scored: frozenset = frozenset()


def load_member(source, overrides, scales, flip, device):
    """A checkpoint or predictions.json. Raises DataError naming the file."""
    if not source.endswith(".json"):
        model, hp, state = load_network(source, device)
        model = flipped(model) if flip else model
        network = evaluate.Network(model, evaluate.overridden(source, hp, overrides), scales)
        weights = (t.half().numpy() for t in (state.get("ema") or state["model"]).values())
        digest = hashlib.sha256(b"".join(t.tobytes() for t in weights)).hexdigest()  # see --export
        return Member(source, network, None, state.get("scores") or {}, digest)
    return Member(
        source, None, evaluate.read_predictions(source), {}, pictures.picture_digest(source)
    )


def discover(folder="runs"):
    """last.pt of the one name's fold runs under `folder` that are all finished, else UsageError."""
    sets, same = defaultdict(dict), {"fold": 1, "workers": -1, "stop_epoch": 0, "cache": False}
    for file in sorted(Path(folder).glob("**/hparams.json")):
        if (hp := saved_hparams(read_json(file), file)).folds:
            log, name = file.with_name("log.csv"), str(file.parent)
            epochs = len(read_text(log).splitlines()) - 1 if log.exists() else 0
            key = replace(hp, name=name.replace(f"-fold{hp.fold}", "-fold*"), **same)
            sets[key][hp.fold] = str(file.with_name("last.pt")), epochs
    whole, found = [], []
    for hp, runs in sets.items():
        epochs = [runs[fold][1] if fold in runs else "no" for fold in range(1, hp.folds + 1)]
        whole += [runs] if {*epochs} == {hp.epochs} else []
        found.append(f"{hp.name}: {', '.join(map(str, epochs))} of {hp.epochs} epochs")
    if len(whole) == 1:
        return [runs[fold][0] for runs in whole for fold in sorted(runs)]
    what = f"{len(whole)} finished sets of fold runs, by fold: {'; '.join(found) or 'none'}"
    raise UsageError(f"{folder}/", what, "name checkpoints")


def choose_members(found, keep, given):
    """The `keep` members of the best recorded scores in their order, and their weights of mean 1:
    `given` numbers, `scores`, or None for equal ones. Raises DataError, UsageError."""
    if not 1 <= keep <= len(found):
        raise UsageError("--best, --drop-worst", f"keep {keep} of {len(found)} members")
    for member in found if keep < len(found) or given == "scores" else ():
        if "hmean" not in member.scores:
            raise DataError(member.name, "no out-of-fold score", "leave out --best, --weights")
    best = sorted(found, key=lambda member: -member.scores.get("hmean", 0))[:keep]
    members = [member for member in found if member in best]
    weights = [m.scores["hmean"] for m in members] if given == "scores" else given or [1.0] * keep
    if len(weights) != keep or not all(0 < w < math.inf for w in weights):
        raise UsageError("--weights", f"{keep} positive numbers are needed, one a member")
    return members, [w * keep / sum(weights) for w in weights]


def common_decoding(members):
    """Hparams to decode the mean map with. Raises UsageError when the members differ in it."""
    for key in DECODING:
        values = {getattr(member.network.hp, key): member.name for member in members}
        if len(values) > 1:
            shown = ", ".join(f"{value} in {name}" for value, name in values.items())
            remedy = f"say which by --{key}" if key in evaluate.OVERRIDES else "use --method voting"
            raise UsageError(key, f"members decode differently: {shown}", remedy)
    return members[0].network.hp


def predict_all(ensemble, pages, subsets):
    """What each of K members and each of the subsets (lists of member indices) find on pages: two
    lists of lists of (polygons, scores) a page, as evaluate.predict; sets page.size."""
    members = ensemble.members
    networks = {k: member.network for k, member in enumerate(members) if member.network}

    def job(page, maps):
        maps = dict(zip(networks, maps))
        found = [m.regions.get(page.name) if m.regions else None for m in members]
        for k, prob in maps.items():
            found[k] = decode_page(prob, page.size, networks[k].hp)
        return [*found, *(combine(ensemble, page, keep, maps, found) for keep in subsets)]

    if networks:
        stream = evaluate.predict_each([*networks.values()], pages, ensemble.device, job)
        found = [result for _, result in stream]
    else:
        data.inspect_pages(pages)  # for their sizes
        found = [job(page, []) for page in pages]
    found = list(zip(*found))
    return found[: len(members)], found[len(members) :]


def combine(ensemble, page, keep, maps, found):
    """(polygons, scores) of the members `keep` (indices) on one page."""
    if ensemble.method == "voting":
        votes = [f if k in keep else None for k, f in enumerate(found)]
        return vote(votes, ensemble.weights, ensemble.votes)
    maps, weights = zip(*((maps[k], ensemble.weights[k]) for k in keep))
    shape = max(evaluate.map_shape(page.size, m.network.hp) for m in ensemble.members)
    return decode_page(evaluate.mean_map(maps, weights, shape), page.size, ensemble.hp)


# ---------------------------------------------------------------- gate


class Judgement(NamedTuple):
    """How good an ensemble is on labelled pages, and each part of it."""

    summary: evaluate.Summary
    members: list  # [(name, weight, Score)]
    leave_one_out: list  # [(name, Score without this member)], of over two members
    best: str = ""  # name of the best member, of several
    gain: Difference | None = None  # to that member

    def to_json(self):
        result = self.summary.to_json()
        result["members"] = [
            {"name": name, "weight": weight, **score.to_json()}
            for name, weight, score in self.members
        ]
        result["leave_one_out"] = [
            {"without": name, **score.to_json()} for name, score in self.leave_one_out
        ]
        if self.gain:
            result["gate"] = {"best_member": self.best, **self.gain.to_json()}
        return result


def gate(ensemble, pages, seen):
    """What the ensemble finds on labelled pages, and its Judgement. seen: as of warn_of_leaks, for
    each member and for all."""
    names = [member.name for member in ensemble.members]
    everyone = list(range(len(names)))
    left_out = ([m for m in everyone if m != k] for k in everyone if len(everyone) > 2)
    alone, (together, *without) = predict_all(ensemble, pages, [everyone, *left_out])
    groups = bootstrap_groups(pages)

    def page_rows(predictions):
        return cleval.metric_rows(pages, predictions, ["page"])["page"]

    def score(rows, seen_before):
        return make_score(rows, cleval.mean_scores, groups, seen_before)

    rows = cleval.metric_rows(pages, together)
    alone_rows = [page_rows(predictions) for predictions in alone]
    scores = [score(*member) for member in zip(alone_rows, seen)]
    result = Judgement(
        summary=evaluate.summarise(pages, rows, seen[-1]),
        members=list(zip(names, ensemble.weights, scores)),
        leave_one_out=[(name, score(page_rows(p), seen[-1])) for name, p in zip(names, without)],
    )
    if len(everyone) == 1:
        return together, result

    best = max(everyone, key=lambda k: (scores[k].hmean, names[k]))
    pair = rows["page"], alone_rows[best]
    gain = paired_difference(*pair, cleval.mean_scores, groups, seen[-1])
    if gain.verdict != "better":  # the best member was picked on these same pages
        few = gain.verdict.partition("cannot tell")[2]
        gain = replace(gain, verdict=f"not shown to be better{few}")
    return together, result._replace(best=names[best], gain=gain)


def print_gate(method, judgement):
    for name, _, score in judgement.members:
        print(f"{score.full_line()}  {name}")
    for name, score in judgement.leave_one_out:
        print(f"{score.full_line()}  without {name}")
    print(f"ensemble by {method} of {len(judgement.members)}:")
    evaluate.print_summary(judgement.summary)
    if judgement.gain:
        print(f"{judgement.gain}, vs the best member {judgement.best}")
        print("that member is the best on these same pages: the difference is rather too small")


def decide(interval, success, acceptable):
    """Which of three verdicts holds for all of an interval [low, high] of H-means, if any."""
    verdicts = ("success", "acceptable", "fall back to hparams/run3.json")
    low, high = (0 if v >= success else 1 if v >= acceptable else 2 for v in interval)
    unsure = f"cannot tell: from {verdicts[low]} to {verdicts[high]}"
    return verdicts[low] if low == high else unsure


# ---------------------------------------------------------------- submission


def region_points(polygon, page_size):
    """Polygon [P, 2] -> integers [P' >= 4, 2] on the page (width, height), none repeated; None if
    nothing is left. A triangle gets a point in the middle of its longest edge."""
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
        if (points := region_points(polygons[n], page_size)) is not None:
            regions.setdefault(tuple(canonical(points).ravel().tolist()), points)
    return list(regions.values())[: cleval.MAX_DETECTIONS]


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
    text = read_text(path, 2**26)
    try:
        csv.field_size_limit(2**20)
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(path, f"not a CSV file ({error})") from None
    if not rows or rows[0][1] != HEADER:
        shown = ",".join(rows[0][1])[:60] if rows else ""
        raise DataError(f"{path}: line 1", f"the header is {shown!r}", f"write {','.join(HEADER)}")
    if not text.endswith("\n"):
        raise DataError(path, "no line end after the last row", "is the file cut off?")
    return rows[1:]


def read_sample(path):
    """File names of a sample submission, in its order. Raises DataError."""
    rows = read_table(path)
    names = [row[0] for _, row in rows if row]
    if len(set(names)) != len(rows):
        raise DataError(path, f"an empty line or a page twice among its {len(rows)} rows")
    return names


def parse_region(text, page_size=None):
    """`x y x y ...` -> int array [P, 2]. Raises ValueError that says what is wrong with it."""
    if not re.fullmatch("-?[0-9]{1,7}( -?[0-9]{1,7})*", text):
        raise ValueError(f"is {text[:40]!r}; whole numbers with one space between are needed")
    numbers = np.array(text.split(" "), int)
    if len(numbers) < 8 or len(numbers) % 2:
        raise ValueError(f"has {len(numbers)} numbers; x y of at least 4 points are needed")
    points = numbers.reshape(-1, 2)
    if points.min() < 0 or page_size and (points > page_size).any():
        raise ValueError(f"leaves the page {'x'.join(map(str, page_size or ()))}".strip())
    if not signed_area(points):
        raise ValueError("has no area")
    return points


def parse_field(field, where, page_size=None):
    """The polygons field of a row -> (regions, problems)."""
    texts, regions, problems = field.split("|") if field else [], {}, []
    if len(texts) > cleval.MAX_DETECTIONS:
        problems.append(f"{where}: {len(texts)} regions; {cleval.MAX_DETECTIONS} are allowed")
    for n, text in enumerate(texts, 1):
        try:
            points = parse_region(text, page_size)
            outline = tuple(canonical(points).ravel().tolist())
            if outline in regions:
                raise ValueError("is there already")
            regions[outline] = points
        except ValueError as error:
            problems.append(f"{where}: region {n} {error}")
    return list(regions.values()), problems


def read_submission(path, names=None, sizes=None, ordered=False):
    """A submission as {name: list of int arrays [P, 2]}, and everything that is wrong with it, a
    line each. names: the pages it has to hold, in their order where `ordered`; sizes: {name:
    (width, height)}. Raises DataError when it is no table."""
    regions, problems, first = {}, [], {}
    rows = read_table(path)
    if read_bytes(path).startswith(codecs.BOM_UTF8):  # a sample may have one
        problems.append(f"{path}: line 1: a byte order mark before the header; save without it")
    for line, row in rows:
        where = f"{path}: line {line}"
        if len(row) != 2:
            problems.append(f"{where}: {len(row)} fields; 2 are needed, quote a name with a comma")
            continue
        name, field = row
        if name in first:
            problems.append(f"{where}: {name}: is there already in line {first[name]}")
            continue
        if names is not None and name not in names:
            problems.append(f"{where}: {name}: not a page that is asked for")
        first[name] = line
        regions[name], wrong = parse_field(field, f"{where}: {name}", (sizes or {}).get(name))
        problems += wrong
    if missing := [name for name in names or () if name not in first]:
        hint = labels.lookalike(missing[0], first)
        problems.append(f"{path}: {len(missing)} pages have no row (first: {missing[0]}){hint}")
    if ordered and not problems and list(regions) != list(names):
        name = next(a for a, b in zip(regions, names) if a != b)
        problems.append(f"{path}: line {first[name]}: {name}: not in the order of the sample")
    return regions, problems


# ---------------------------------------------------------------- command line


def numbers(text):
    """Numbers with commas between, or `scores`."""
    return text if text == "scores" else [float(number) for number in text.split(",")]


def parse_args(argv):
    parser = Parser(usage="python ensemble.py [SOURCE ...] [options]", description=__doc__)
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="checkpoints; for voting any predictions.json")
    add("--device", default="auto", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add = parser.add_argument_group("pages (default: what the runs validated on)").add_argument
    add("--data", help="folder or label file, or a folder of pictures")
    add("--split", choices=labels.SPLITS, help="of DATA (default val, for a submission test)")
    add("--image-dir", metavar="DIR", help="where the pictures lie, if not beside the labels")
    add = parser.add_argument_group("how they vote").add_argument
    add("--method", choices=("maps", "voting"), help="(default maps)")
    add("--votes", "--threshold", type=float, help="voting: least sum of weights (default: most)")
    add("--weights", type=numbers, help="`scores`, as recorded on held-out pages, or one a member")
    add("--scales", type=numbers, help="page sizes to predict at instead, as 960,1120")
    add("--flip", action="store_true", help="predict the mirrored page too")
    add("--best", type=int, metavar="N", help="keep the N best members by recorded score")
    add("--drop-worst", action="store_true", help="leave out the worst by recorded score")
    add("--decide", nargs=2, type=float, metavar="H", help="from success, acceptable: which it is")
    add = parser.add_argument_group("files").add_argument
    add("--submission", metavar="CSV", help="write filename,polygons; and JSON beside it, or --out")
    add("--sample", metavar="CSV", help="a submission whose pages and order to keep")
    add("--out", metavar="JSON", help="write the predictions with confidences")
    add("--validate", metavar="CSV", help="check a submission and stop")
    add("--hparams", metavar="JSON", help="take the values below from this file")
    add_flags(parser, evaluate.OVERRIDES, "instead of the values in the checkpoints")
    return parser.parse_args(argv)


def load_pages(args):
    """Pages of --data: a split, or the pictures of a plain folder; those that --sample names."""
    folder = data.resolve_data(args.data)
    split = args.split or ("test" if args.submission or args.validate else "val")
    if not args.split and not labels.has_split(folder, split) and labels.has_split(folder, "val"):
        print(f"warning: {args.data}: no {split} split, val is taken", file=sys.stderr)
        split = "val"
    if args.split or labels.find_labels(folder, split) or labels.find_labels(folder, None):
        pages = labels.load_labels(folder, split, args.image_dir)
    else:
        place = labels.image_dir_of(folder / f"{split}.json", args.image_dir)[0]
        pages = evaluate.picture_pages(place)
    pages = {page.name: page for page in pages}
    names = read_sample(args.sample) if args.sample else pages
    if missing := [name for name in names if name not in pages]:
        hint = labels.lookalike(missing[0], pages).removeprefix("; ")
        what = f"{len(missing)} pages not in {args.data}: {missing[0]}, ..."
        raise DataError(args.sample, what, hint)
    return [pages[name] for name in names]


def choose_pages(args, members):
    """The pages to work on: --data, else those that the members' runs validated on or, when these
    are different folds, the val split beside them. Raises DataError."""
    if args.data:
        return load_pages(args)
    runs = [member.network.hp for member in members if member.network]
    places = {(hp.data, hp.val_data, hp.image_dir, hp.folds) for hp in runs}
    if len(places) != 1:
        raise UsageError("the pages", "members do not share their data", "add --data")
    if len({hp.fold for hp in runs}) == 1 or not runs[0].folds:
        return data.run_pages(runs[0])[1]
    folder = data.resolve_data(data.set_names(runs[0].data)[0])
    return labels.load_labels(folder, "val", runs[0].image_dir or None)


def build(args):
    """The ensemble of the command line; says who is in it. Raises DataError."""
    overrides, method = evaluate.read_overrides(args), args.method or "maps"
    sources = args.sources or discover()
    files = [source for source in sources if source.endswith(".json")]
    if files and method == "maps":
        raise UsageError(files[0], "has no maps", "use --method voting")
    device = choose_device(args.device, files != sources)
    scales = [checked("size", size, "--scales") for size in args.scales or ()]
    found = [load_member(source, overrides, scales, args.flip, device) for source in sources]
    for k, member in enumerate(found):
        if (first := [m.digest for m in found].index(member.digest)) < k:
            raise UsageError(member.name, f"the same as {found[first].name}", "it would vote twice")
    by_score = args.best or args.drop_worst or args.weights == "scores"
    held = [m.scores.get("digests") or m.scores.get("pages", ()) for m in found if by_score]
    keep = len(found) - args.drop_worst if args.best is None else args.best
    members, weights = choose_members(found, keep, args.weights)
    shares = {member.name: f"weight {w:.4f}" for member, w in zip(members, weights)}
    for name, _, _, scores, _ in found:
        hmean = f"{scores['hmean']:.4f}" if "hmean" in scores else "none"
        share = shares.get(name, "left out")
        print(f"member {name}: {share}, recorded hmean {hmean}", file=sys.stderr)
    votes = len(members) / 2 + 1e-6 if args.votes is None else args.votes
    if not 0 < votes <= len(members):
        raise UsageError(f"--votes {votes}", f"not within 0 to {len(members)}, all weights")
    hp = common_decoding(members) if method == "maps" else None
    return Ensemble(members, weights, method, hp, votes, device, frozenset().union(*held))


def validate(args):
    """Print what is wrong with a submission; returns the exit code."""
    sizes = {page.name: page.size for page in load_pages(args)} if args.data else None
    names = list(sizes) if args.data else read_sample(args.sample) if args.sample else None
    regions, problems = read_submission(args.validate, names, sizes, bool(args.sample))
    for problem in problems[:20]:
        print(f"error: {problem}", file=sys.stderr)
    count = sum(map(len, regions.values()))
    print(f"{args.validate}: {len(regions)} pages, {count} regions, {len(problems)} errors")
    return 1 if problems else 0


def judge(args, ensemble, pages):
    """Predict labelled pages and print the gate's verdict; returns (what was found, exit code)."""
    members = [(member.name, member.network and member.network.hp) for member in ensemble.members]
    seen = [evaluate.warn_of_leaks(name, pages, hp) for name, hp in members]
    if any("trained" in how for how in seen):
        raise DataError("the gate", "members trained on some pages", "judge outside all folds")
    known = [{page.name, pictures.picture_digest(page.path)} & ensemble.scored for page in pages]
    seen.append({how: max(one.get(how, 0) for one in seen) for how in ("chosen", "tuned")})
    seen[-1]["scored"] = sum(map(bool, known))
    found, judgement = gate(ensemble, pages, seen)
    interval = judgement.summary.scores["page"].interval
    decision = decide(interval, *args.decide) if args.decide else None
    if args.json:
        result = judgement.to_json() | {"method": ensemble.method}
        print(json.dumps(result | ({"decision": decision} if decision else {})))
    else:
        print_gate(ensemble.method, judgement)
        if decision:
            print(f"decision by the ensemble's score alone: {decision}")
    closed = judgement.gain and judgement.gain.verdict != "better"
    return found, EXIT_NOT_BETTER if closed else 0


def check_flags(args):
    """Raises UsageError on flags that have no effect, or not together."""
    decoding = " ".join(("flip scales hparams", *evaluate.OVERRIDES))
    networks = not all(name.endswith(".json") for name in args.sources or [""])
    others = f"json method votes weights best drop_worst decide submission out {decoding}"
    rules = [
        (others, not args.validate, "not with --validate"),
        ("votes", args.method == "voting", "only with --method voting"),
        (decoding, networks, "only with a checkpoint"),
        ("drop_worst", args.best is None, "not with --best"),
        ("split image_dir", args.data, "only with --data"),
        ("sample", args.submission or args.validate, "only with --submission"),
    ]
    evaluate.refuse_idle(args, rules)
    high, low = args.decide or (1, 0)
    if not 1 >= high > low >= 0:
        raise UsageError(f"--decide {high:g} {low:g}", "no falling shares", "of 96.6 % write 0.966")


def check_outputs(args, ensemble, pages):
    """Where the predictions go, or None. Raises UsageError where an output would replace an input
    or, beside a submission, another file, and OSError where it cannot be written."""
    beside = Path(args.submission).with_suffix(".json") if args.submission else None
    derived = [] if args.out else [beside]
    inputs = [args.sample, args.hparams, *(member.name for member in ensemble.members)]
    inputs += [file for page in pages for file in (page.path, page.source)]
    guard([args.out, args.submission], inputs, derived)
    out = args.out or beside
    for path in filter(None, (out, args.submission)):
        check_writable(path)
    return out


def run(args):
    check_flags(args)
    if args.validate:
        return validate(args)
    if args.submission and not args.submission.endswith(".csv"):
        raise UsageError(f"--submission {args.submission}", "not a .csv file")
    ensemble = build(args)
    pages, code = choose_pages(args, ensemble.members), 0
    out = check_outputs(args, ensemble, pages)
    labelled = any(page.polygons for page in pages)
    for member in (m for m in ensemble.members if m.regions is not None):
        evaluate.check_pages(member.name, member.regions, pages, labelled)
    if labelled:
        found, code = judge(args, ensemble, pages)
    elif not (args.submission or args.out):
        raise UsageError("the pages", "have no labels to judge on", "add --submission or --out")
    else:
        evaluate.refuse_idle(args, [("decide json", False, "the pages have no labels")])
        ((found,),) = predict_all(ensemble, pages, [range(len(ensemble.members))])[1:]
    with evaluate.predictions_file(out) as write:  # nothing without a path
        for page, one in zip(pages, found):
            write(page, one)
    if args.submission:
        write_submission(args.submission, pages, found)
        count = sum(len(polygons) for polygons, _ in found)
        print(f"{args.submission}: {len(pages)} pages, {count} regions found", file=sys.stderr)
    return code


def main(argv=None):
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
