"""How several networks vote: mean maps, polygon voting, the gate against the best member, the CSV.

python ensemble.py runs/run8-fold*/last.pt --data DATA   on labelled pages that no member trained on
python ensemble.py                                       the finished set of fold runs under runs/
python ensemble.py a.pt b.pt other.json --method voting --votes 2 --data DATA
python ensemble.py best.pt --data TEST --sample sample_submission.csv --submission out.csv
python ensemble.py --validate out.csv --data TEST        what is wrong with a submission, and where

One checkpoint is an ensemble of one. Exit code 5: not shown to be better than the best member."""

import csv
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
import predict
import predictions
import sources
from command import Parser, add_flags
from db_postprocess import DECODING, decode_page, first_that_fit, signed_area
from engine import choose_device
from files import (
    DataError,
    UsageError,
    exit_code,
    print_error,
    read_bytes,
    read_json,
    read_text,
    replace_file,
    text_aside,
)
from hparams import Hparams, checked, saved_hparams
from interval import Difference, bootstrap_groups, make_score, paired_difference
from overlap import make_shapes, overlap_area, to_shapely, touching

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
    """What K members have found on one page -> the words that enough of them see: polygons (list of
    [P, 2], see `canonical`) and confidences [N], highest first. The order of members, polygons and
    vertices makes no difference.

    members: K x (N polygons [P, 2], scores [N]), None for one that has not predicted the page.
    weights: K numbers.
    votes: least sum of the weights of those who see a word; on a page that some have not
        predicted, the same share of the weights of the others.

    A confidence is the sum of weight x score over the sum of all weights. The polygon of a word is
    that of one member, since the mean of polygons that are shifted or turned fits no word."""
    # the regions of all members in one list, in an order that depends on their values alone
    voters = sorted(
        (weight, rank_regions(*found)) for found, weight in zip(members, weights) if found
    )
    voter_weights = np.array([weight for weight, _ in voters])
    owner = np.repeat(np.arange(len(voters)), [len(regions) for _, regions in voters])
    regions = [region for _, ranked in voters for region in ranked]
    overlap = overlaps([np.array(points) for points, _ in regions], owner)
    score = np.array([score for _, score in regions])

    # one word for each cluster with enough votes
    needed = votes * voter_weights.sum() / sum(weights) - 1e-9
    words = []
    for cluster in cluster_words(overlap, owner):
        weight = voter_weights[owner[cluster]]
        if weight.sum() >= needed:
            points, _ = regions[medoid(cluster, weight, overlap, score)]
            words.append((weight @ score[cluster] / voter_weights.sum(), points))
    words.sort(key=lambda word: (-round(word[0], 12), word[1]))
    polygons = [np.array(points) for _, points in words]
    return first_that_fit(polygons, np.array([confidence for confidence, _ in words]))


def rank_regions(polygons, scores):
    """[(points of the canonical polygon, score)] in order of coordinates."""
    outlines = (canonical(np.asarray(polygon, float)).tolist() for polygon in polygons)
    return sorted(zip(outlines, map(float, scores)))


def overlaps(polygons, owner):
    """N polygons, members [N] -> {(i, j): IoU} of pairs i < j of different members where > 0."""
    shapes = make_shapes(to_shapely(polygons))
    i, j = touching(shapes.box, shapes.box)
    different = owner[i] < owner[j]
    i, j = i[different], j[different]
    shared = overlap_area(shapes, i, shapes, j)
    iou = shared / (shapes.area[i] + shapes.area[j] - shared)
    return dict(zip(zip(i.tolist(), j.tolist()), np.round(iou, 9).tolist()))


def cluster_words(overlap, owner):
    """IoUs {(i, j): IoU} and the members [N] of regions -> lists of indices of regions that are one
    word, sorted, in which no member comes twice. Pairs join from the highest IoU down to SAME_WORD,
    equal ones in the order of their indices."""
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
        iou = [1.0 if m == n else overlap.get(tuple(sorted((m, n))), 0.0) for m in cluster]
        return round(float(weight @ iou), 9)

    return max(cluster, key=lambda n: (support(n), score[n], -n))


# ---------------------------------------------------------------- members


class Member(NamedTuple):
    """Who votes: a checkpoint with its network, or a predictions file."""

    source: sources.Source
    network: predict.Network | None
    name: str
    digest: str  # of the weights, or of the file

    @property
    def scores(self):
        """What the run recorded on the pages that it held out."""
        return self.source.state.get("scores") or {}


class Ensemble(NamedTuple):
    """K members, weights [K] of mean 1; decoding of their mean map, or least weight of a vote;
    digests or names of the pages whose scores chose or weigh the members."""

    members: list
    weights: list
    method: str
    hp: Hparams | None
    votes: float
    device: torch.device
    scored: set


def load_member(path, overrides, scales, flip, device, engine):
    """The Member of a network or predictions.json. Raises DataError that names the file."""
    source = sources.load_source(path, engine)
    digest = source.digest()
    network = None
    if source.hp:
        source.override(overrides)
        network = source.network(device, sizes=scales)
        if flip:
            network = network._replace(model=predict.flipped(network.model))

        # without the weights, which would fill the memory
        kept = {key: source.state.get(key) for key in ("scores", "origin")}
        source.state = kept | {"runtime": str(source.runtime(device))}
    return Member(source, network, path, digest)


def discover(folder="runs"):
    """last.pt of each fold of the one set of fold runs under `folder` that is finished. Raises
    UsageError."""
    sets = defaultdict(dict)  # {Hparams that folds share: {fold: (last.pt, epochs done)}}
    for file in sorted(Path(folder).glob("**/hparams.json")):
        hp = saved_hparams(read_json(file), file)
        if not hp.folds:
            continue
        log = file.with_name("log.csv")
        done = len(read_text(log).splitlines()) - 1 if log.exists() else 0
        name = str(file.parent).replace(f"-fold{hp.fold}", "-fold*")

        # the height of text is that of a fold's own train pages
        key = replace(hp, name=name, fold=1, text_height=0, workers=-1, stop_epoch=0, cache=False)
        sets[key][hp.fold] = str(file.with_name("last.pt")), done

    finished = {}
    states = []
    for hp, runs in sets.items():
        # how many epochs of each fold are done
        epochs = [runs[fold][1] if fold in runs else "no" for fold in range(1, hp.folds + 1)]
        if {*epochs} == {hp.epochs}:
            finished[hp.name] = [runs[fold][0] for fold in sorted(runs)]
        states.append(f"{hp.name}: {', '.join(map(str, epochs))} of {hp.epochs} epochs")
    if len(finished) == 1:
        return finished.popitem()[1]
    if finished:
        raise UsageError(
            f"{len(finished)} sets of fold runs are finished, {' and '.join(finished)}", "name one"
        )
    raise UsageError(
        f"{folder}/",
        f"no set of fold runs is finished ({'; '.join(states) or 'none is there'})",
        "name checkpoints",
    )


def choose_members(candidates, keep, weights):
    """The `keep` candidates of the best recorded scores, in their order, and their weights of mean
    1. weights: K numbers, "scores" for the recorded ones, or None for equal ones. Raises DataError,
    UsageError."""
    if not 1 <= keep <= len(candidates):
        raise UsageError("--best, --drop-worst", f"keep {keep} of {len(candidates)} members")
    if keep < len(candidates) or weights == "scores":
        for member in candidates:
            if "hmean" not in member.scores:
                raise DataError(member.name, "no out-of-fold score", "leave out --best, --weights")
    best = sorted(candidates, key=lambda member: -member.scores.get("hmean", 0))[:keep]
    members = [member for member in candidates if member in best]

    if weights == "scores":
        weights = [member.scores["hmean"] for member in members]
    weights = weights or [1.0] * keep
    if len(weights) != keep or not all(0 < weight < math.inf for weight in weights):
        raise UsageError("--weights", f"{keep} positive numbers are needed, one a member")
    shares = np.array(weights) / max(weights)  # their sum is finite
    return members, (shares / shares.mean()).tolist()


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
    lists of lists of (polygons, scores) a page, as predict.predict; sets page.size."""
    members = ensemble.members
    networks = {k: member.network for k, member in enumerate(members) if member.network}

    def job(page, maps):
        map_of = dict(zip(networks, maps))
        alone = [member.source.regions.get(page.name) for member in members]
        for k, prob in map_of.items():
            alone[k] = decode_page(prob, page.size, networks[k].hp)
        return alone + [combine(ensemble, page, subset, map_of, alone) for subset in subsets]

    if networks:
        stream = predict.predict_each([*networks.values()], pages, ensemble.device, job)
        by_page = [result for _, result in stream]
    else:
        data.inspect_pages(pages)  # for their sizes
        by_page = [job(page, []) for page in pages]
    by_voter = list(zip(*by_page))
    return by_voter[: len(members)], by_voter[len(members) :]


def combine(ensemble, page, subset, maps, alone):
    """(polygons, scores) of the members in a subset (indices) on one page. maps: {index: uint8 [h,
    w]} of networks; alone: (polygons, scores) of each member, or None. Raises DataError for a page
    that no voter has predicted."""
    if ensemble.method == "voting":
        voters = [found if k in subset else None for k, found in enumerate(alone)]
        if not any(voters):  # the result would look like that of a page without text
            raise DataError(page.name, "no member has predicted it", "add predictions of it")
        return vote(voters, ensemble.weights, ensemble.votes)
    shape = max(predict.map_shape(page, m.network.hp) for m in ensemble.members)
    weights = [ensemble.weights[k] for k in subset]
    mean = predict.mean_map([maps[k] for k in subset], weights, shape)
    return decode_page(mean, page.size, ensemble.hp)


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
    """What the ensemble finds on labelled pages, (polygons, scores) of each, and its Judgement.
    seen: counts as of `sources.warn_of_leaks`, of each member, and at the end of all together."""
    # one prediction for the members, all of them together, and all but one
    names = [member.name for member in ensemble.members]
    everyone = range(len(names))
    left_out = []  # lists of all members but one
    if len(everyone) > 2:
        left_out = [[m for m in everyone if m != k] for k in everyone]
    alone, (together, *without) = predict_all(ensemble, pages, [everyone, *left_out])

    # their scores
    groups = bootstrap_groups(pages)
    rows = cleval.metric_rows(pages, together)
    others = [cleval.metric_rows(pages, found, ["page"])["page"] for found in alone + without]
    scores = [
        make_score(other, cleval.mean_scores, groups, before)
        for other, before in zip(others, seen[:-1] + seen[-1:] * len(without))
    ]
    result = Judgement(
        summary=evaluate.summarise(pages, rows, seen[-1]),
        members=list(zip(names, ensemble.weights, scores)),
        leave_one_out=list(zip(names, scores[len(names) :])),
    )
    if len(everyone) == 1:
        return together, result

    # the difference to the best member
    best = max(everyone, key=lambda k: (scores[k].hmean, names[k]))
    gain = paired_difference(rows["page"], others[best], cleval.mean_scores, groups, seen[-1])
    if gain.verdict != "better":  # the best member was picked on these same pages
        # why it cannot tell: " from under 6 pages or groups", or nothing
        gain = replace(gain, verdict="not shown to be better" + gain.verdict.partition("tell")[2])
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


def decide(score, success, acceptable):
    """Which of three verdicts holds for all of a Score's interval, if any. Under 6 pages or groups
    it cannot tell, as with a difference: the interval of a single one has no width."""
    if score.over.count < 6:
        return "cannot tell from under 6 pages or groups"
    verdicts = "success", "acceptable", "fall back to hparams/run3.json"
    # the number of a verdict: how many of the two bars an end of the interval is below
    low, high = ((end < success) + (end < acceptable) for end in score.interval)
    if low == high:
        return verdicts[low]
    return f"cannot tell: from {verdicts[low]} to {verdicts[high]}"


# ---------------------------------------------------------------- submission


def region_points(polygon, page_size):
    """Polygon [P, 2] -> integers [P' >= 4, 2] on the page (width, height), none repeated; None if
    nothing is left. A triangle gets a point in the middle of its longest edge."""
    points = np.round(np.clip(polygon, 0, page_size)).astype(int)
    points = points[(points != np.roll(points, 1, 0)).any(1)]
    if len(points) == 3:
        edge = np.roll(points, -1, 0) - points
        n = np.hypot(*edge.T).argmax()
        points = np.insert(points, n + 1, points[n] + edge[n] // 2, 0)

    repeated = (points == np.roll(points, 1, 0)).all(1)
    return points if len(points) >= 4 and not repeated.any() and signed_area(points) else None


def submission_regions(polygons, scores, page_size):
    """Regions of one page for a submission: at most MAX_DETECTIONS, by confidence, none twice."""
    regions = {}
    for n in np.argsort(-np.asarray(scores), kind="stable"):
        points = region_points(polygons[n], page_size)
        if points is not None:
            regions.setdefault(canonical(points).tobytes(), points)
    return list(regions.values())[: cleval.MAX_DETECTIONS]


def write_submission(path, pages, found):
    """CSV of `filename,polygons`, one row a page (with page.size), whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for page, (polygons, scores) in zip(pages, found):
        regions = submission_regions(polygons, scores, page.size)
        field = "|".join(" ".join(map(str, region.flat)) for region in regions)
        writer.writerow([page.name, field])
    replace_file(path, text.getvalue())


def read_table(path):
    """Rows [(line, fields)] of a CSV with the header HEADER. Raises DataError on another file."""
    text = read_text(path, 2**26)
    try:
        csv.field_size_limit(2**20)
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(path, f"not a CSV file ({error})") from None
    header = rows[0][1] if rows else []
    if header != HEADER:
        raise DataError(
            f"{path}: line 1",
            f"the header is {','.join(header)[:60]!r}",
            f"write {','.join(HEADER)}",
        )
    if not text.endswith("\n"):
        raise DataError(path, "no line end after the last row", "is the file cut off?")
    return rows[1:]


def read_sample(path):
    """File names of a sample submission, in its order. Raises DataError."""
    rows = read_table(path)
    names = [row[0] for _, row in rows if row]
    if not 0 < len(set(names)) == len(rows):
        raise DataError(path, f"no page, an empty line or a page twice among its {len(rows)} rows")
    return names


def parse_region(text, page_size):
    """`x y x y ...` -> int array [P, 2]. Raises ValueError that says what is wrong with it."""
    if not re.fullmatch("-?[0-9]{1,7}( -?[0-9]{1,7})*", text):
        raise ValueError(f"is {text[:40]!r}; whole numbers with one space between are needed")
    numbers = np.array(text.split(), int)
    if len(numbers) < 8 or len(numbers) % 2:
        raise ValueError(f"has {len(numbers)} numbers; x y of at least 4 points are needed")
    points = numbers.reshape(-1, 2)
    if points.min() < 0 or (page_size and (points > page_size).any()):
        raise ValueError(f"leaves the page {'x'.join(map(str, page_size or ()))}".strip())
    if not signed_area(points):
        raise ValueError("has no area")
    return points


def parse_field(field, where, page_size):
    """The polygons field of a row -> (regions, problems)."""
    texts = field.split("|") if field else []
    regions = {}
    problems = []
    if len(texts) > cleval.MAX_DETECTIONS:
        problems.append(f"{where}: {len(texts)} regions; {cleval.MAX_DETECTIONS} are allowed")
    for n, text in enumerate(texts, 1):
        try:
            points = parse_region(text, page_size)
            outline = canonical(points).tobytes()
            if outline in regions:
                raise ValueError("is there already")
            regions[outline] = points
        except ValueError as error:
            problems.append(f"{where}: region {n} {error}")
    return list(regions.values()), problems


def read_submission(path, names, sizes, ordered):
    """A submission as {name: list of int arrays [P, 2]}, and everything that is wrong with it, a
    line each. names: the pages it has to hold, in their order where `ordered`; sizes: {name:
    (width, height)}. Raises DataError where `read_table` does."""
    regions = {}
    problems = []
    first = {}  # {name of a page: number of its line}
    for line, row in read_table(path):
        where = f"{path}: line {line}"
        if len(row) != 2:
            problems.append(f"{where}: {len(row)} fields; 2 are needed, quote a name with a comma")
            continue
        name, field = row
        if name in first:
            problems.append(f"{where}: {name}: is there already in line {first[name]}")
            continue
        if names and name not in names:
            problems.append(f"{where}: {name}: not a page that is asked for")
        first[name] = line
        regions[name], wrong = parse_field(field, f"{where}: {name}", sizes.get(name))
        problems += wrong
    if missing := [name for name in names or () if name not in first]:
        hint = labels.lookalike(missing[0], first)
        problems.append(f"{path}: {len(missing)} pages have no row (first: {missing[0]}){hint}")
    if read_bytes(path).startswith(b"\xef\xbb\xbf"):  # a sample may have one
        problems.append(f"{path}: line 1: a byte order mark before the header; save without it")
    if ordered and not problems and list(regions) != list(names):
        name = next(a for a, b in zip(regions, names) if a != b)
        problems.append(f"{path}: line {first[name]}: {name}: not in the order of the sample")
    return regions, problems


# ---------------------------------------------------------------- command line


def numbers(text):
    """Numbers with commas between, or `scores`."""
    return text if text == "scores" else [*map(float, text.split(","))]


def parse_args(argv):
    parser = Parser(usage="python ensemble.py [SOURCE ...] [options]", description=__doc__)
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="checkpoints; for voting any predictions.json")
    add("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    add("--engine", choices=evaluate.ENGINES, help="what runs the networks, as in evaluate.py")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add = parser.add_argument_group("pages (default: what the runs validated on)").add_argument
    add("--data", help="folder or label file, or a folder of pictures")
    add("--split", choices=labels.SPLITS, help="of DATA (default val, for a submission test)")
    add("--image-dir", metavar="DIR", help="where the pictures lie, if not beside the labels")
    add = parser.add_argument_group("how they vote").add_argument
    add("--method", choices=("maps", "voting"), help="(default maps)")
    add("--votes", "--threshold", type=float, help="least sum of weights (default: over half)")
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
    add("--allow-empty", action="store_true", help="--validate accepts a file without any region")
    add("--hparams", metavar="JSON", help="take the values below from this file")
    add_flags(parser, evaluate.OVERRIDES, "values (default: the checkpoints')")
    return parser.parse_args(argv)


def load_pages(args):
    """Pages of --data: a split, or the pictures of a plain folder; those that --sample names.
    Raises DataError."""
    folder = data.resolve_data(args.data)
    split = args.split or ("test" if args.submission or args.validate else "val")
    if not args.split and not labels.has_split(folder, split) and labels.has_split(folder, "val"):
        sources.warn(args.data, f"no {split} split, val is taken")
        split = "val"
    if args.split or labels.find_labels(folder, split) or labels.find_labels(folder, None):
        pages = labels.load_labels(folder, split, args.image_dir)
    else:
        place = labels.image_dir_of(folder / f"{split}.json", args.image_dir)[0]
        pages = evaluate.picture_pages(place)
    if not args.sample:
        return pages

    by_name = {page.name: page for page in pages}
    names = read_sample(args.sample)
    if missing := [name for name in names if name not in by_name]:
        hint = labels.lookalike(missing[0], by_name)
        raise DataError(args.sample, f"{len(missing)} pages not in {args.data}: {missing[0]}{hint}")
    return [by_name[name] for name in names]


def runs_pages(args, members):
    """The pages to vote on without --data: those that the members' runs validated on or, when these
    are different folds, the val split beside them. Raises DataError."""
    runs = [member.network.hp for member in members if member.network]
    places = {(hp.data, hp.val_data, hp.image_dir, hp.folds) for hp in runs}
    if len(places) != 1 or not runs[0].data:
        raise UsageError("the pages", "members do not share known data", "add --data")
    if len({hp.fold for hp in runs}) == 1 or not runs[0].folds:
        return evaluate.validated_pages(args, runs[0])
    folder = data.resolve_data(data.set_names(runs[0].data)[0])
    return labels.load_labels(folder, "val", runs[0].image_dir or None)


def build(args):
    """The Ensemble of the command line; says who is in it. Raises DataError."""
    overrides = evaluate.read_overrides(args)
    method = args.method or "maps"
    args.sources = paths = args.sources or discover()
    files = [path for path in paths if path.endswith(predictions.SUFFIXES)]
    if files and method == "maps":
        raise UsageError(files[0], "has no maps", "use --method voting")
    device = choose_device(args.device or "auto", files != paths)
    scales = [checked("size", size, "--scales") for size in args.scales or ()]

    # the candidates, each once
    by_digest = {}
    for path in paths:
        member = load_member(path, overrides, scales, args.flip, device, args.engine)
        twin = by_digest.setdefault(member.digest, member)
        if twin is not member:
            raise UsageError(path, f"the same as {twin.name}", "it would vote twice")
    candidates = [*by_digest.values()]

    # who of them votes, and who does not
    keep = len(candidates) - args.drop_worst if args.best is None else args.best
    members, weights = choose_members(candidates, keep, args.weights)
    shares = {member.name: f"weight {w:.4f}" for member, w in zip(members, weights)}
    for member in candidates:
        hmean = f"{member.scores['hmean']:.4f}" if "hmean" in member.scores else "none"
        print(
            f"member {member.name}: {shares.get(member.name, 'left out')}, recorded hmean {hmean}",
            file=sys.stderr,
        )

    for runtime in {m.source.state["runtime"] for m in members if m.network}:
        print(f"member networks: {runtime}", file=sys.stderr)

    # how they vote; the pages whose scores chose or weigh them
    votes = len(members) / 2 + 1e-6 if args.votes is None else args.votes
    if not 0 < votes <= len(members):
        raise UsageError(f"--votes {votes}", f"not within 0 to {len(members)}, all weights")
    hp = common_decoding(members) if method == "maps" else None
    scored = set()
    if args.best or args.drop_worst or args.weights == "scores":
        for member in candidates:
            scored.update(member.scores.get("digests") or member.scores.get("pages", ()))
    return Ensemble(members, weights, method, hp, votes, device, scored)


def validate(args):
    """Print what is wrong with a submission. Returns the exit code."""
    pages = load_pages(args) if args.data else []
    problems = []
    try:
        data.inspect_pages([page for page in pages if not page.size])  # where no file states it
    except DataError as error:  # what can be checked without the picture follows
        problems += [*error.others, error]
    sizes = {page.name: page.size for page in pages}
    names = sizes or args.sample and read_sample(args.sample)
    regions, faults = read_submission(args.validate, names, sizes, args.sample)
    problems += faults
    count = sum(map(len, regions.values()))
    if not count and not problems and not args.allow_empty:
        problems.append(f"{args.validate}: no page has a region; --allow-empty accepts that")
    for problem in problems[:20]:
        print_error(problem)
    print(f"{args.validate}: {len(regions)} pages, {count} regions, {len(problems)} errors")
    return bool(problems)


def run_gate(args, ensemble, pages):
    """Predict labelled pages and print the gate's verdict. Returns what was found and the exit
    code. Raises DataError on pages that a member trained on."""
    voters = [member.source for member in ensemble.members]
    seen = [sources.warn_of_leaks(source, pages) for source in voters]
    together = sources.count_seen(voters, pages)
    if together["trained"]:
        raise DataError("the gate", "members trained on some pages", "judge outside all folds")
    scored = [{page.name, sources.page_digest(page)} & ensemble.scored for page in pages]
    together["scored"] = sum(map(bool, scored))

    found, judgement = gate(ensemble, pages, [*seen, together])
    decision = args.decide and decide(judgement.summary.scores["page"], *args.decide)
    if args.json:
        result = judgement.to_json() | {"method": ensemble.method}
        if decision:
            result["decision"] = decision
        print(json.dumps(result))
    else:
        print_gate(ensemble.method, judgement)
        if decision:
            print(f"decision by the ensemble's score alone: {decision}")
    if judgement.gain and judgement.gain.verdict != "better":
        return found, EXIT_NOT_BETTER
    return found, 0


def check_voting_flags(args):
    """Raises UsageError on flags that have no effect, or not together."""
    values = f"device engine flip scales hparams {' '.join(evaluate.OVERRIDES)}"
    networks = not all(path.endswith(predictions.SUFFIXES) for path in args.sources or [""])
    others = f"json method votes weights best drop_worst decide submission out {values}"
    rules = [
        (others, not args.validate, "not with --validate"),
        ("validate", not args.sources, "not with members"),
        ("allow_empty", args.validate, "only with --validate"),
        ("votes", args.method == "voting", "only with --method voting"),
        (values, networks, "only with a checkpoint"),
        ("amp", args.engine != "onnxruntime", "onnxruntime computes in float32"),
        ("drop_worst", args.best is None, "not with --best"),
        ("split image_dir", args.data, "only with --data"),
        ("sample", args.submission or args.validate, "only with --submission"),
    ]
    evaluate.refuse_idle(args, rules)
    evaluate.check_forms(args)
    high, low = args.decide or (1, 0)
    if not 1 >= high > low >= 0:
        raise UsageError(
            f"--decide {high:g} {low:g}",
            "the first must exceed the second, both within 0 to 1",
            "for 96.6 % write 0.966",
        )


def run(args):
    check_voting_flags(args)
    if args.validate:
        return validate(args)
    pages = load_pages(args) if args.data else None  # before the members: it may not be there
    ensemble = build(args)
    pages = pages or runs_pages(args, ensemble.members)
    labelled = any(page.polygons for page in pages)
    for member in ensemble.members:
        if not member.network:
            sources.check_pages(member.source, pages, labelled)
    beside = args.submission and Path(args.submission).with_suffix(".json")
    derived = [] if args.out else [beside]
    evaluate.check_outputs([args.out, args.submission], evaluate.files_read(args, pages), derived)
    out = args.out or beside

    code = 0
    if labelled:
        with text_aside(out):
            found, code = run_gate(args, ensemble, pages)
    elif not out:
        raise UsageError(
            "the pages",
            "have no labels to judge on",
            "name another --split, or add --submission or --out",
        )
    else:
        evaluate.refuse_idle(args, [("decide json", False, "the pages have no labels")])
        _, (found,) = predict_all(ensemble, pages, [range(len(ensemble.members))])
    if out:
        predictions.write_predictions(out, pages, found)
    if args.submission:
        write_submission(args.submission, pages, found)
        count = sum(len(polygons) for polygons, _ in found)
        print(f"{args.submission}: {len(pages)} pages, {count} regions found", file=sys.stderr)
    evaluate.warn_of_more_pages(pages)
    return code


def main(argv=None):
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
