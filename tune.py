"""Which thresholds? A grid of decoding settings scored on cached maps, the plateau of those that
cannot be told from the best, and cross-fitting: what to expect of the choice on other pages.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from cleval import (
    MAX_DETECTIONS,
    as_points,
    bootstrap,
    bootstrap_groups,
    count_kept,
    mean_scores,
    metric_rows,
    micro_scores,
    page_pairs,
    prepare_labels,
)
from db_postprocess import decode_candidates, decode_page, find_candidates, to_page, unclip_distance
from files import DataError, replace_file

TUNED = ("thresh", "box_thresh", "unclip_ratio", "mode", "min_size")  # the axes of the grid
GRID = {
    "thresh": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45),
    "box_thresh": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "unclip_ratio": (0.0, 1.4, 1.7, 2.0, 2.3, 2.6),
    "mode": ("polygon", "box"),
    "min_size": (0.0, 3.0, 5.0, 7.0),
}


def score_page(item, grid, hp):
    """
    A page at every setting of a grid. item: ((map uint8 [h, w], scale [2]), page)
    returns: precision, recall, hmean (cleval "page") as [*lengths of the axes TUNED, 3]
    Contours are found once a thresh, blobs grown and compared with the labels once a thresh,
    unclip_ratio and mode; box_thresh and min_size only choose among these, all choices at once.
    """
    (prob, scale), page = item
    ignore = np.array(page.ignore, bool)
    labels = prepare_labels(as_points(page.polygons), [None] * len(ignore), ignore, "page")
    page_size, box_thresh = np.array(prob.shape[::-1]) / scale, np.array(grid["box_thresh"])
    fixed = {"box_thresh": box_thresh.min(), "min_size": 0, "max_candidates": hp.max_candidates}
    result = np.zeros([len(grid[key]) for key in TUNED] + [3])
    for t, u, r in np.ndindex(result.shape[0], *result.shape[2:4]):
        if u == r == 0:
            candidates = find_candidates(prob, grid["thresh"][t])
        rule = grid["unclip_ratio"][u], hp.shrink_ratio
        polygons, confidence = decode_candidates(
            candidates, unclip_ratio=rule[0], mode=grid["mode"][r], shrink_ratio=rule[1], **fixed
        )
        pairs = page_pairs(labels, as_points(to_page(polygons, scale, page_size)))
        sides = candidates.rects[: len(polygons), 2:4]
        short = sides.min(1) + 2 * unclip_distance(sides.prod(1), 2 * sides.sum(1), *rule)
        keep = confidence >= box_thresh[:, None, None]  # [box_thresh, min_size, M]
        keep = np.concatenate(keep & (short >= np.array(grid["min_size"])[:, None]))
        keep &= keep.cumsum(1) <= MAX_DETECTIONS
        kinds = {}
        kind = [kinds.setdefault(row.tobytes(), len(kinds)) for row in keep]
        one_of_each = [kind.index(k) for k in range(len(kinds))]
        found = micro_scores(count_kept(labels, pairs, keep[one_of_each], "page"))
        result[t, :, u, r] = found[kind].reshape(len(box_thresh), -1, 3)
    return result


def score_grid(maps, pages, grid, hp):
    """score_page of n pages, on all cores -> [n, *lengths of the axes TUNED, 3]."""
    job, items = partial(score_page, grid=grid, hp=hp), list(zip(maps, pages))
    workers = min(os.cpu_count() or 1, 16, len(items) // 4)
    if workers < 2:
        return np.array([job(item) for item in items])
    context = multiprocessing.get_context("forkserver")  # OpenCV's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
        results, hidden = pool.map(job, items), not sys.stderr.isatty()
        return np.array(list(tqdm(results, "tuning", len(items), leave=False, disable=hidden)))


def with_ones(hmeans):
    return np.concatenate([hmeans, np.ones((len(hmeans), 1))], 1)


def choose_setting(hmeans, groups, grid):
    """
    hmeans: [n, S] of n pages at the S settings of a grid, in C order of the axes TUNED
    returns: the best setting, the recommended one, [S] whether a setting is on the plateau
    The plateau has the settings that a paired bootstrap does not tell from the best one. The
    recommended setting is its middle: the least sum of grid steps to its other settings of the
    best one's mode and kind of unclip (by ratio or exact); ties by score.
    """
    mean = hmeans.mean(0)
    best = int(mean.argmax())
    difference = with_ones(hmeans - hmeans[:, [best]])
    plateau = bootstrap(difference, mean_scores, groups=groups, draws=1000)[:, 1] >= 0
    index = np.array(np.unravel_index(range(len(mean)), [len(grid[key]) for key in TUNED])).T
    exact = np.array(grid["unclip_ratio"])[index[:, 2]] == 0
    alike = np.flatnonzero(plateau & (index[:, 3] == index[best, 3]) & (exact == exact[best]))
    steps = np.abs(index[alike, None] - index[alike]).sum((1, 2))
    return best, int(alike[np.lexsort((-mean[alike], steps))[0]]), plateau


def crossfit(hmeans, parts, groups, grid):
    """H-means [n, 2] of pages at the settings (best, recommended) chosen on the pages of other
    parts. hmeans: [n, S]; parts: [n]."""
    result, groups = np.zeros((len(hmeans), 2)), np.array(groups, object)
    for part in set(parts.tolist()):
        rest = parts != part
        best, middle, _ = choose_setting(hmeans[rest], groups[rest], grid)
        result[~rest] = hmeans[~rest][:, [best, middle]]
    return result


def halves(groups, seed=0):
    """Part 0 or 1 of each page [n]: half of the groups each. Raises DataError with one group."""
    names = sorted(set(groups))
    if len(names) < 2:
        raise DataError("--tune: all pages are of one group; cross-fitting needs two")
    order = np.random.default_rng(seed).permutation(len(names))
    part = {names[n]: k % 2 for k, n in enumerate(order)}
    return np.array([part[name] for name in groups])


def setting_values(grid, setting):
    """{key: value} of a setting's number in the C order of the axes TUNED."""
    index = np.unravel_index(setting, [len(grid[key]) for key in TUNED])
    return {key: grid[key][i] for key, i in zip(TUNED, index)}


def tune(maps, pages, parts, grid, hp):
    """The --tune object, mean H-means [*lengths of axes TUNED]. parts: [n] to cross-fit over."""
    groups = bootstrap_groups(pages)
    table = score_grid(maps, pages, grid, hp)[..., 2]
    hmeans = table.reshape(len(pages), -1)
    best, middle, plateau = choose_setting(hmeans, groups, grid)
    fitted = crossfit(hmeans, parts, groups, grid)
    found = [decode_page(m, scale, np.array(m.shape[::-1]) / scale, hp) for m, scale in maps]
    own = metric_rows("page", pages, found)[:, [2]]

    def score(hmean):  # [n, 1] with its interval
        low, high = bootstrap(with_ones(hmean), mean_scores, groups=groups)[0].tolist()
        return {"hmean": float(hmean.mean()), "interval": [low, high]}

    def setting(n):
        return {**setting_values(grid, n), "in_sample": float(hmeans[:, n].mean())}

    return {
        "pages": len(pages),
        "settings": hmeans.shape[1],
        "before": {**{k: getattr(hp, k) for k in TUNED}, "hmean": float(own.mean())},
        "best": setting(best),
        "recommended": setting(middle),
        "plateau": int(plateau.sum()),
        "crossfitted_best": score(fitted[:, [0]]),
        "crossfitted": score(fitted[:, [1]]),
        "gain": score(fitted[:, [1]] - own),
    }, table.mean(0)


def print_tuning(result):
    def line(what, hmean, then):
        shown = "  ".join(f"{key} {result[what][key]}" for key in TUNED)
        print(f"hmean {result[what][hmean]:.4f}  {shown}  {then}")

    def interval(what, form):
        low, high = (f"{value:{form}}" for value in result[what]["interval"])
        return f"hmean {result[what]['hmean']:{form}} [{low}, {high}]"

    line("before", "hmean", "before")
    line("best", "in_sample", f"best of {result['settings']} on these same pages")
    middle = f"recommended, middle of {result['plateau']} not told from the best"
    line("recommended", "in_sample", f"{middle}; on these same pages")
    other = f"by the best setting instead {result['crossfitted_best']['hmean']:.4f}"
    print(f"{interval('crossfitted', '.4f')}  cross-fitted: what to expect; {other}")
    print(f"{interval('gain', '+.4f')}  gain, cross-fitted")


def draw_landscape(path, table, grid, chosen):
    """PNG of mean H-means over thresh x box_thresh at a setting's other values; a frame around it.

    table: [*lengths of the axes TUNED]; chosen: {key: value}
    """
    at = [grid[key].index(chosen[key]) for key in TUNED]
    table = table[:, :, *at[2:]]  # [thresh, box_thresh]
    cell, left, top = 64, 110, 60
    rows, columns = table.shape
    level = (table - table.min()) / max(table.max() - table.min(), 1e-9) * 255
    heat = cv2.applyColorMap(level.round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    heat = cv2.resize(heat, None, fx=cell, fy=cell, interpolation=cv2.INTER_NEAREST)
    image = cv2.copyMakeBorder(heat, top, 40, left, 20, cv2.BORDER_CONSTANT, value=(255,) * 3)

    def write(text, x, y, colour=(0, 0, 0)):
        cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)

    for t, b in np.ndindex(rows, columns):
        colour = (255,) * 3 if level[t, b] < 128 else (0,) * 3
        write(f"{100 * table[t, b]:.2f}", left + b * cell + 8, top + t * cell + 36, colour)
    for t, value in enumerate(grid["thresh"]):
        write(f"{value:g}", left - 40, top + t * cell + 36)
    for b, value in enumerate(grid["box_thresh"]):
        write(f"{value:g}", left + b * cell + 20, top - 8)
    write("box_thresh", left, 20)
    write("thresh", 8, top + 16)
    others = ", ".join(f"{key} {chosen[key]}" for key in TUNED[2:])
    write(f"hmean %, {others}", 8, image.shape[0] - 12)
    corner = left + at[1] * cell, top + at[0] * cell
    cv2.rectangle(image, corner, (corner[0] + cell, corner[1] + cell), (0, 0, 255), 3)
    replace_file(Path(path), cv2.imencode(".png", image)[1].tobytes())
