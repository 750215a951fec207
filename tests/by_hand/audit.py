"""How well are wrong labels found? Mistakes are put into labels, and the suspects are counted.

python tests/by_hand/audit.py DATA WEIGHTS MAPS.npz    average precision and more, 3 shares, 3 seeds
python tests/by_hand/audit.py DATA WEIGHTS MAPS.npz --own own.json    DATA's labels as they are

DATA's val pages are predicted once in bf16, as large as --audit reads them, and their maps kept in
MAPS.npz. Five kinds of mistakes are made alike, in a share of the labels, by seeds that the audit
does not use. Prints average precision by kind and in all, precision among the first 50 and 200,
recall at precision .5 and the expected calibration error (10 bins), beside what a list of that
length would show by luck if each probability were exact. Beside it, on the same predictions: labels
by 1 - IoU; ObjectLab (Tkachenko et al. 2023) if `cleanlab` can be imported; pages by H-mean.

DATA's own mistakes count as false alarms. --own writes what the audit suspects in the labels as
they are; --known takes that list, cut down by eye to what is truly wrong, and leaves these places
out."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import audit
import evaluate
import labels
import mistakes
import sources
from cleval import cleval, shared_areas
from db_postprocess import decode_page
from files import read_json, write_json
from interval import spearman
from predict import predict_each

KINDS = mistakes.KINDS[:5]
SEED = 1234  # far from the audit's own


# ---------------------------------------------------------------- pages


def read_maps(path, source, pages):
    """Maps of pages, predicted once."""
    if not Path(path).exists():
        device = evaluate.choose_device("auto")
        network = source.network(device)
        stream = predict_each([network], pages, device, lambda page, maps: maps[0].copy())
        np.savez_compressed(path, **{str(k): prob for k, prob in stream})
    with np.load(path) as file:
        maps = [file[str(k)] for k in range(len(pages))]
    return maps


def with_mistakes(pages, share, seed):
    """Copies of pages with mistakes, and the Mistaken of each."""
    wrong, truth = [], []
    for k, page in enumerate(pages):
        rng = np.random.default_rng((SEED, seed, k))
        count = int(share * len(page.polygons) + rng.random())
        made = mistakes.make_mistakes(rng, page.polygons, page.ignore, page.size, count, KINDS)
        other = replace(page, polygons=[], ignore=[], texts=[], ids=[], confidences=[])
        for n, (polygon, skip) in enumerate(zip(made.polygons, made.ignore)):
            other.add(n, polygon, None, skip)
        wrong.append(other)
        truth.append(made)
    return wrong, truth


def run_audit(pages, maps, hp):
    plan = audit.make_plan(pages)
    readings = [audit.read_page(page, prob, hp, plan) for page, prob in zip(pages, maps)]
    return audit.find_suspects(readings, audit.judge(readings, plan.kinds))


# ---------------------------------------------------------------- figures


def average_precision(is_true, total):
    """Of flags [N] in the order of suspicion, with `total` to be found."""
    is_true = np.asarray(is_true, float)
    precision = np.cumsum(is_true) / np.arange(1, len(is_true) + 1)
    return (precision * is_true).sum() / max(total, 1)


def recall_at(is_true, total, least=0.5):
    """The highest recall at which precision is at least that."""
    is_true = np.asarray(is_true, float)
    precision = np.cumsum(is_true) / np.arange(1, len(is_true) + 1)
    good = np.flatnonzero(precision >= least)
    return is_true[: good[-1] + 1].sum() / total if len(good) else 0.0


def calibration_error(chances, is_true, bins=10):
    chances, is_true = np.asarray(chances), np.asarray(is_true, float)
    of = np.minimum((chances * bins).astype(int), bins - 1)
    gaps = [abs((chances - is_true)[of == b].sum()) for b in range(bins)]
    return sum(gaps) / max(len(chances), 1)


def error_of_luck(chances, draws=200):
    """The expected calibration error of a list of these probabilities if each were exact."""
    rng = np.random.default_rng(0)
    lists = rng.random((draws, len(chances))) < chances
    return np.mean([calibration_error(chances, is_true) for is_true in lists])


def mistake_of(suspect, made):
    """The mistake that a suspect has found, as (kind, number), or None."""
    if suspect.kind == "missing":
        bare = [outline if kind == "missing" else np.zeros((3, 2)) for kind, outline in made.bare]
        areas = shared_areas([suspect.points], bare, None)
        near = areas.shared[0] > 0.5 * areas.gt[0]
        return ("missing", int(near.argmax())) if near.any() else None
    kinds = {made.kinds[n] for n in suspect.labels}
    origins = {made.origins[n] for n in suspect.labels}
    if kinds != {suspect.kind} or suspect.kind == "split" and len(origins) > 1:
        return None
    return suspect.kind, suspect.labels[0]


def judge_suspects(suspects, truth, known):
    """(kind, probability, whether true) of suspects; those at known places, that are not injected,
    are left out, and a mistake counts once."""
    rows, seen = [], set()
    for suspect in suspects:
        name = suspect.page.name
        mistake = mistake_of(suspect, truth[name])
        is_true = mistake is not None and (name, *mistake) not in seen
        if is_true:
            seen.add((name, *mistake))
        elif mistake is None and name in known:
            areas = shared_areas([suspect.points], known[name], None)
            if (areas.shared > 0.3 * np.minimum(areas.gt[:, None], areas.det)).any():
                continue
        rows.append((suspect.kind, suspect.probability, is_true))
    return rows


# ---------------------------------------------------------------- others


def best_ious(page, found):
    if not found:
        return np.zeros(len(page.polygons))
    areas = shared_areas(page.polygons, found, None)
    return (areas.shared / areas.union).max(1)


def boxes(polygons):
    corners = [[*polygon.min(0), *polygon.max(0)] for polygon in polygons]
    return np.array(corners, np.float32).reshape(-1, 4)


def object_lab(pages, found):
    """Scores of pages and of the labels of each by ObjectLab, high is good; None without it."""
    try:
        from cleanlab.object_detection import rank
    except ImportError as error:
        print(f"no ObjectLab: {error}")
        return None
    sheets = [
        {"bboxes": boxes(p.polygons), "labels": np.zeros(len(p.polygons), int)} for p in pages
    ]
    predictions = []
    for polygons, scores in found:
        rows = np.hstack([boxes(polygons), np.float32(scores)[:, None]])
        cell = np.empty(1, object)
        cell[0] = rows
        predictions.append(cell)
    of_pages = rank.get_label_quality_scores(sheets, predictions, verbose=False)
    of_labels = rank.compute_badloc_box_scores(labels=sheets, predictions=predictions)
    return of_pages, of_labels


def number_of(made):
    """How many mistakes a page has."""
    missing = sum(kind == "missing" for kind, _ in made.bare)
    wrong = sum(kind != "" for kind in made.kinds)
    return wrong + missing - made.kinds.count("split") // 2


def compare(pages, truth, suspects, found):
    """{method: (average precision of wrong labels, rank correlation of pages)}."""
    wrong = np.concatenate([[kind != "" for kind in made.kinds] for made in truth])
    count = [number_of(made) for made in truth]
    share = np.array(count) / [len(page.polygons) for page in pages]

    chances = {page.name: np.zeros(len(page.polygons)) for page in pages}
    doubts = dict.fromkeys(chances, 0.0)
    for suspect in suspects:
        doubts[suspect.page.name] += suspect.probability
        for n in suspect.labels:
            chances[suspect.page.name][n] = suspect.probability
    words = [len(page.polygons) for page in pages]
    ious = [best_ious(page, polygons) for page, (polygons, _) in zip(pages, found)]
    hmeans = [cleval(p.polygons, polygons)["hmean"] for p, (polygons, _) in zip(pages, found)]
    methods = {
        "audit": (np.concatenate([*chances.values()]), np.array([*doubts.values()]) / words),
        "1 - IoU": (1 - np.concatenate(ious), 1 - np.array([iou.mean() for iou in ious])),
        "1 - H-mean": (None, 1 - np.array(hmeans)),
    }
    if theirs := object_lab(pages, found):
        of_labels = np.concatenate([np.asarray(scores, float) for scores in theirs[1]])
        methods["ObjectLab"] = (-of_labels, -theirs[0])
    result = {}
    for name, (of_labels, of_pages) in methods.items():
        precision = np.nan
        if of_labels is not None:
            order = np.argsort(-np.nan_to_num(of_labels), kind="stable")
            precision = average_precision(wrong[order], wrong.sum())
        result[name] = precision, spearman(of_pages, share)
    return result


# ---------------------------------------------------------------- main


def one_run(pages, maps, hp, found, known, share, seed):
    """{figure: value} of one seed, and rows of judge_suspects."""
    wrong, truth = with_mistakes(pages, share, seed)
    suspects = run_audit(wrong, maps, hp)
    of_page = {page.name: made for page, made in zip(wrong, truth)}
    rows = judge_suspects(suspects, of_page, known)
    totals = {kind: sum(made.kinds.count(kind) for made in truth) for kind in KINDS}
    totals["split"] //= 2
    totals["missing"] = sum(kind == "missing" for made in truth for kind, _ in made.bare)

    figures = {}
    for kind in KINDS:
        flags = [is_true for name, _, is_true in rows if name == kind]
        figures[kind] = average_precision(flags, totals[kind])
    flags = [is_true for *_, is_true in rows]
    total = sum(totals.values())
    figures["all"] = average_precision(flags, total)
    figures["first 50"] = np.mean(flags[:50])
    figures["first 200"] = np.mean(flags[:200])
    figures["recall at .5"] = recall_at(flags, total)
    chances = [chance for _, chance, _ in rows]
    figures["calibration error"] = calibration_error(chances, flags)
    figures["of that by luck"] = error_of_luck(chances)
    figures["mistakes"] = total
    figures["mistakes listed"] = sum(flags)
    figures["sum of chances"] = sum(chances)
    for name, (labels_, pages_) in compare(wrong, truth, suspects, found).items():
        figures[f"labels, {name}"] = labels_
        figures[f"pages, {name}"] = pages_
    return figures, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("weights")
    parser.add_argument("maps")
    parser.add_argument("--shares", default="0.02,0.05,0.1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--own")
    parser.add_argument("--known")
    args = parser.parse_args()

    pages = labels.load_labels(args.data, "val")
    source = sources.load_source(args.weights)
    source.override({"amp": "bf16"})
    source.hp = evaluate.enlarge(source.hp)
    maps = read_maps(args.maps, source, pages)
    for page, prob in zip(pages, maps):
        page.size = page.size or evaluate.pictures.read_image(page.path).shape[1::-1]
    found = [decode_page(prob, page.size, source.hp) for page, prob in zip(pages, maps)]
    if args.own:
        audit.LISTED = 0.001  # all that could be wrong
        suspects = run_audit(pages, maps, source.hp)
        return write_json(args.own, [suspect.to_json() for suspect in suspects], indent=1)

    known = {}
    for entry in read_json(args.known) if args.known else ():
        known.setdefault(entry["page"], []).append(np.array(entry["points"]))
    for share in map(float, args.shares.split(",")):
        runs, of_all = [], []
        for seed in range(args.seeds):
            figures, rows = one_run(pages, maps, source.hp, found, known, share, seed)
            runs.append(figures)
            of_all += rows
            print(
                f"{share} {seed}",
                {key: round(float(v), 3) for key, v in runs[-1].items()},
                flush=True,
            )
        mean = {key: np.mean([run[key] for run in runs]) for key in runs[0]}
        _, chances, flags = zip(*of_all)
        mean["calibration error of all seeds"] = calibration_error(chances, flags)
        mean["of that by luck, all seeds"] = error_of_luck(chances)
        print(f"{share} mean", {key: round(float(v), 3) for key, v in mean.items()}, flush=True)


if __name__ == "__main__":
    main()
