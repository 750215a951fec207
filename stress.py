"""Where does a detector break? H-means of labelled pages after changing them: turned, scaled,
blurred, darkened, compressed, noisy."""

import json
from dataclasses import replace
from typing import NamedTuple

import numpy as np

import cleval
import pictures
import report
from augment import STRESS, stress
from db_postprocess import cut_polygon
from files import replace_file
from interval import Difference, bootstrap_groups, make_score, paired_difference
from predict import predict
from sources import count_seen, warn, warn_of_leaks


class Stressed(NamedTuple):
    """Scores of one kind and level of augment.STRESS."""

    kind: str
    level: float
    scores: list  # interval.Score of each Source
    difference: Difference | None  # the first minus the second


def stressed_page(page, kind, level):
    """A labelled page as augment.STRESS changes it, with its new picture in place of its path. An
    enlarged page is in the picture with its middle only: labels are cut at the edge, since nothing
    can be found beyond it."""
    image = pictures.read_image(page.path)
    image, polygons, cut = stress(image, page.polygons, kind, level)
    ignore = [skip or gone for skip, gone in zip(page.ignore, cut.tolist())]
    if kind == "scaled" and level > 1:
        size = image.shape[1::-1]
        for n, polygon in enumerate(polygons):
            if (polygon != polygon.clip(0, size)).any():
                polygons[n] = cleval.from_top_left(cut_polygon(polygon, size))
    return replace(page, path=image, polygons=polygons, ignore=ignore, look=None)


def run_stress(args, sources, pages):
    """evaluate.py --stress: H-means of one or two Sources on pages changed by each kind and level
    of augment.STRESS. Raises DataError, OSError."""
    networks = [source.network(args.device) for source in sources]
    for source in sources:
        warn_of_leaks(source, pages)

    results = []
    if not args.json:
        print(sources[0].runtime(args.device))
    for kind, levels in STRESS.items():
        for level in levels:
            rows, in_view = stress_rows(networks, pages, kind, level, args.device)
            if not in_view.any():
                warn(f"{kind} {level:g}", "no label is left in view, so no score")
                continue

            # the scores of the pages that count
            rows = rows[:, in_view]
            kept = [page for page, visible in zip(pages, in_view) if visible]
            groups = bootstrap_groups(kept)
            scores = [  # in sample: a changed page counts, too
                make_score(own, cleval.mean_scores, groups, count_seen([source], kept))
                for source, own in zip(sources, rows)
            ]

            difference = None
            if len(rows) == 2:
                either = count_seen(sources, kept)
                difference = paired_difference(*rows, cleval.mean_scores, groups, either)
            results.append(Stressed(kind, level, scores, difference))
            if not args.json:
                print_stressed(results[-1])

    if args.json:
        print(json.dumps([stressed_json(result) for result in results]))
    if args.html:
        # the last scores: only where a page was enlarged, it may be out of view
        names = [f"{source.path}, over {score.over}" for source, score in zip(sources, scores)]
        replace_file(args.html, report.page("Stress", stress_blocks(names, results)))


def stress_rows(networks, pages, kind, level, device):
    """Change pages and score each network on them. Returns rows of the page metric, [networks, n,
    4], and flags [n] of the pages to count: those with labels in view, and those that never had
    any. A page that lost all its labels would score 0."""

    def job(page, found):
        return cleval.page_row("page", page, found[0])

    rows = [[] for _ in networks]
    in_view = []
    for start in range(0, len(pages), 50):  # their pictures are in memory
        some = pages[start : start + 50]
        changed = [stressed_page(page, kind, level) for page in some]
        in_view += [all(old.ignore) or not all(new.ignore) for old, new in zip(some, changed)]
        for network, own in zip(networks, rows):
            own += [row for _, row in predict(network, changed, device, job)]
    return np.array(rows), np.array(in_view)


def print_stressed(result):
    line = f"{result.kind} {result.level:g}: {result.scores[0]}"
    if result.difference:
        line += f"; {result.difference} to {result.scores[1].hmean:.4f}"
    print(line, flush=True)


def stressed_json(result):
    scores = [score.to_json() for score in result.scores]
    entry = {"kind": result.kind, "level": result.level, "scores": scores}
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
