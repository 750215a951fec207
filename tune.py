"""Which thresholds? A grid of decoding settings scored on cached maps, the plateau of those that
cannot be told from the best, and cross-fitting: what to expect of the choice on other pages."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import cv2
import numpy as np
from tqdm import tqdm

import cleval
from db_postprocess import decode_candidates, decode_page, find_candidates, grown_sides, to_page
from files import DataError, replace_file

GRID = {
    "thresh": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45),
    "box_thresh": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "unclip_ratio": (0.0, 1.4, 1.7, 2.0, 2.3, 2.6),
    "mode": ("polygon", "box"),
    "min_size": (0.0, 3.0, 5.0, 7.0),
}
TUNED = tuple(GRID)  # the axes of every grid, in this order


def score_page(item, grid, hp):
    """((map uint8 [h, w], scale [2]), page) -> precision, recall, hmean (cleval "page") at every
    setting of a grid, [*lengths of the axes TUNED, 3]. What settings share is done once: contours a
    thresh; blobs grown and compared with the labels a thresh, unclip_ratio and mode."""
    (prob, scale), page = item
    ignore, gt = np.array(page.ignore, bool), cleval.as_points(page.polygons)
    labels = cleval.prepare_labels(gt, [None] * len(gt), ignore, "page")
    page_size = np.array(prob.shape[::-1]) / scale
    fixed = {"max_candidates": hp.max_candidates, "shrink_ratio": hp.shrink_ratio}
    fixed |= {"box_thresh": min(grid["box_thresh"]), "min_size": 0}  # all that a setting may keep
    result = np.zeros([*map(len, grid.values()), 3])
    for t, thresh in enumerate(grid["thresh"]):
        blobs = find_candidates(prob, thresh)
        for u, ratio in enumerate(grid["unclip_ratio"]):
            short = grown_sides(blobs.rects, ratio, hp.shrink_ratio).min(1)
            for m, mode in enumerate(grid["mode"]):
                polygons, scores = decode_candidates(blobs, unclip_ratio=ratio, mode=mode, **fixed)
                polygons = to_page(polygons, scale, page_size)
                pairs = cleval.page_pairs(labels, cleval.as_points(polygons))
                result[t, :, u, m] = score_choices(labels, pairs, scores, short, grid)
    return result


def score_choices(labels, pairs, scores, short, grid):
    """Pairs of M detections, their scores [M] and short sides [M or more] -> the page's scores
    [box_thresh, min_size, 3] with those that settings keep, once for all that keep the same."""
    keep = scores >= np.array(grid["box_thresh"])[:, None, None]
    keep = keep & (short[: len(scores)] >= np.array(grid["min_size"])[:, None])
    keep &= keep.cumsum(2) <= cleval.MAX_DETECTIONS
    choices = {choice.tobytes(): choice for choice in np.concatenate(keep)}
    counts = cleval.count_kept(labels, pairs, np.array([*choices.values()]), "page")
    found = dict(zip(choices, cleval.micro_scores(counts)))
    return np.array([[found[choice.tobytes()] for choice in row] for row in keep])


def score_grid(maps, pages, grid, hp):
    """score_page of n pages, on all cores -> [n, *lengths of the axes TUNED, 3]."""
    job, items = partial(score_page, grid=grid, hp=hp), list(zip(maps, pages))
    workers = min(os.cpu_count() or 1, 16, len(items) // 4)
    if workers < 2:
        return np.array([job(item) for item in items])
    context = multiprocessing.get_context("forkserver")  # OpenCV's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
        results = pool.map(job, items)
        return np.array([*tqdm(results, "tuning", len(items), leave=False, disable=None)])


def mean_interval(values, groups, draws=4000):
    """Values [n, s] of pages -> 95 % intervals [s, 2] of their means, low and high."""
    rows = np.hstack([values, np.ones((len(values), 1))])
    return cleval.bootstrap(rows, cleval.mean_scores, groups=groups, draws=draws)


def choose_setting(hmeans, groups, grid):
    """H-means [n, S] of pages at the settings of a grid, in C order of the axes TUNED -> the best
    setting, the recommended one, [S] whether a setting is on the plateau: a paired bootstrap does
    not tell it from the best. Recommended is the middle: the least sum of grid steps to others on
    the plateau of the best one's mode and kind of unclip (by ratio or exact); ties by score."""
    mean = hmeans.mean(0)
    best = int(mean.argmax())
    plateau = mean_interval(hmeans - hmeans[:, [best]], groups, 1000)[:, 1] >= 0
    index = np.indices([*map(len, grid.values())]).reshape(len(TUNED), -1).T  # [S, axes]
    exact = np.array(grid["unclip_ratio"])[index[:, 2]] == 0
    alike = np.flatnonzero(plateau & (index[:, 3] == index[best, 3]) & (exact == exact[best]))
    steps = np.abs(index[alike, None] - index[alike]).sum((1, 2))
    return best, int(alike[np.lexsort((-mean[alike], steps))[0]]), plateau


def crossfit(hmeans, parts, groups, grid):
    """H-means [n, S] of pages -> [n, 2] at the settings (best, recommended) of the other parts."""
    result, groups = np.zeros((len(hmeans), 2)), np.array(groups, object)
    for part in set(parts.tolist()):
        rest = parts != part
        best, middle, _ = choose_setting(hmeans[rest], groups[rest], grid)
        result[~rest] = hmeans[~rest][:, [best, middle]]
    return result


def halves(groups, seed=0):
    """Part 0 or 1 of each page [n]: half of the groups each. Raises DataError with one group."""
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise DataError("--tune", "all pages are of one group", "cross-fitting needs two")
    order = np.random.default_rng(seed).permutation(len(names))
    return np.argsort(order)[group] % 2


def setting_values(grid, setting):
    """{key: value} of a setting's number in the C order of the axes TUNED."""
    index = np.unravel_index(setting, [*map(len, grid.values())])
    return {key: grid[key][i] for key, i in zip(TUNED, index)}


def tune(maps, pages, parts, grid, hp):
    """The --tune object, mean H-means [*lengths of axes TUNED]. parts: [n] to cross-fit over."""
    groups = cleval.bootstrap_groups(pages)
    table = score_grid(maps, pages, grid, hp)[..., 2]
    hmeans = table.reshape(len(pages), -1)
    best, middle, plateau = choose_setting(hmeans, groups, grid)
    fitted = crossfit(hmeans, parts, groups, grid).T
    found = [decode_page(m, scale, np.array(m.shape[::-1]) / scale, hp) for m, scale in maps]
    own = cleval.metric_rows("page", pages, found)[:, 2]
    result = {"pages": len(pages), "settings": hmeans.shape[1]}
    result["before"] = {**{key: getattr(hp, key) for key in TUNED}, "hmean": float(own.mean())}
    for name, number in ("best", best), ("recommended", middle):
        in_sample = float(hmeans[:, number].mean())
        result[name] = {**setting_values(grid, number), "in_sample": in_sample}
    result["plateau"] = int(plateau.sum())
    expected = {"crossfitted_best": fitted[0], "crossfitted": fitted[1], "gain": fitted[1] - own}
    for name, values in expected.items():
        interval = mean_interval(values[:, None], groups)[0].tolist()
        result[name] = {"hmean": float(values.mean()), "interval": interval}
    return result, table.mean(0)


def print_tuning(result):
    """What `tune` found: settings with their H-means, and what to expect of the choice."""
    same, plateau = "on these same pages", result["plateau"]
    middle = f"recommended, middle of {plateau} not told from the best; {same}"
    best = f"best of {result['settings']} {same}"
    for what, then in {"before": "before", "best": best, "recommended": middle}.items():
        *values, (_, hmean) = result[what].items()
        shown = "  ".join(f"{key} {value}" for key, value in values)
        print(f"hmean {hmean:.4f}  {shown}  {then}")
    instead = f"by the best setting instead {result['crossfitted_best']['hmean']:.4f}"
    expected = f"cross-fitted: what to expect; {instead}"
    for what, sign, then in ("crossfitted", "", expected), ("gain", "+", "gain, cross-fitted"):
        hmean, low, high = result[what]["hmean"], *result[what]["interval"]
        print(f"hmean {hmean:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]  {then}")


def draw_landscape(path, table, grid, chosen):
    """PNG of mean H-means [*lengths of the axes TUNED] over thresh x box_thresh at the other values
    of the chosen setting {key: value}, which is framed."""
    row, column, *others = [grid[key].index(chosen[key]) for key in TUNED]
    table = table[:, :, *others]  # [thresh, box_thresh]
    cell, x0, y0 = 64, 110, 60
    level = (table - table.min()) / max(table.max() - table.min(), 1e-9) * 255
    heat = cv2.applyColorMap(level.round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    heat = cv2.resize(heat, None, fx=cell, fy=cell, interpolation=cv2.INTER_NEAREST)
    image = cv2.copyMakeBorder(heat, y0, 40, x0, 20, cv2.BORDER_CONSTANT, value=(255,) * 3)
    foot = "hmean %, " + ", ".join(f"{key} {chosen[key]}" for key in TUNED[2:])
    texts = [("box_thresh", x0, 20, 0), ("thresh", 8, y0 + 16, 0), (foot, 8, len(image) - 12, 0)]
    texts += [(f"{v:g}", x0 - 40, y0 + t * cell + 36, 0) for t, v in enumerate(grid["thresh"])]
    texts += [(f"{v:g}", x0 + b * cell + 20, y0 - 8, 0) for b, v in enumerate(grid["box_thresh"])]
    for (t, b), hmean in np.ndenumerate(100 * table):
        grey = 255 if level[t, b] < 128 else 0
        texts += [(f"{hmean:.2f}", x0 + b * cell + 8, y0 + t * cell + 36, grey)]
    font = cv2.FONT_HERSHEY_SIMPLEX
    for text, x, y, grey in texts:
        cv2.putText(image, text, (x, y), font, 0.45, (grey,) * 3, 1, cv2.LINE_AA)
    x, y = x0 + column * cell, y0 + row * cell
    cv2.rectangle(image, (x, y), (x + cell, y + cell), (0, 0, 255), 3)
    replace_file(path, cv2.imencode(".png", image)[1].tobytes())
