"""Which thresholds? A grid of decoding settings scored on cached maps, the plateau of those that
cannot be told from the best, and cross-fitting: what to expect of the choice on other pages."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import cv2
import numpy as np

import cleval
from db_postprocess import decode_candidates, decode_page, find_candidates, grown_sides, to_page
from files import DataError, replace_file
from interval import bootstrap, bootstrap_groups, make_score, paired_difference
from report import progress

GRID = {
    "thresh": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7),
    "box_thresh": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "unclip_ratio": (0.0, 1.4, 1.7, 2.0, 2.3, 2.6),
    "mode": ("polygon", "box"),
    "min_size": (0.0, 3.0, 5.0, 7.0),
}
TUNED = tuple(GRID)  # the axes of every grid, in this order
METRICS = {"hmean": "page", "micro": "micro", "iou50": "iou50"}  # --metric: which of cleval's
VARIANTS = {"page": "page", "micro": "official", "iou50": "page"}  # of CLEval


def choice_rows(page, metric, labels, det, keep):
    """M detections on a page, S choices [S, M] of them -> rows [S, k], the first 6 numbers of each
    one's cleval.page_row. labels: cleval.Labels of the page."""
    if metric == "iou50":
        shared, union, valid, *_ = cleval.shared_areas(page.polygons, det, page.ignore)
        close = shared > cleval.MORE_THAN_HALF * union
        num_gt = len(page.ignore) - sum(page.ignore)
        hits = [len(cleval.one_to_one(close & choice)) for choice in keep]
        return [(num_gt, m, n, n, 0, 0) for m, n in zip((keep & valid).sum(1), hits)]
    counts = cleval.count_kept(labels, cleval.page_pairs(labels, det), keep, VARIANTS[metric])
    return counts[:, :6] if metric == "micro" else np.insert(cleval.micro_scores(counts), 3, 1, 1)


def score_page(item, grid, hp, metric="page"):
    """((map uint8 [h, w], scale [2]), page) -> choice_rows at every setting of a grid, [*lengths of
    the axes TUNED, k]. What settings share is done once: contours a thresh; blobs grown and
    compared with the labels a thresh, unclip_ratio and mode."""
    (prob, scale), page = item
    ignore, gt = np.array(page.ignore, bool), cleval.as_points(page.polygons)
    texts = page.texts if metric == "micro" else [None] * len(gt)
    labels = cleval.prepare_labels(gt, texts, ignore, VARIANTS[metric])
    fixed = {"max_candidates": hp.max_candidates, "shrink_ratio": hp.shrink_ratio}
    fixed |= {"box_thresh": min(grid["box_thresh"]), "min_size": 0}  # all that a setting may keep
    box_thresh, min_size = np.ix_(grid["box_thresh"], grid["min_size"], [0])[:2]
    limit, columns = (cleval.MAX_DETECTIONS, 4) if metric == "page" else (np.inf, 6)
    result = np.zeros([*map(len, grid.values()), columns])
    for t, thresh in enumerate(grid["thresh"]):
        blobs = find_candidates(prob, thresh)
        for u, ratio in enumerate(grid["unclip_ratio"]):
            short = grown_sides(blobs.rects, ratio, hp.shrink_ratio).min(1)
            for m, mode in enumerate(grid["mode"]):
                polygons, scores = decode_candidates(blobs, unclip_ratio=ratio, mode=mode, **fixed)
                det = cleval.as_points(to_page(polygons, scale, prob.shape[::-1] / scale))
                keep = (scores >= box_thresh) & (short[: len(scores)] >= min_size)
                keep &= keep.cumsum(2) <= limit  # [box_thresh, min_size, M]
                choices = {choice.tobytes(): choice for choice in np.concatenate(keep)}
                rows = choice_rows(page, metric, labels, det, np.array([*choices.values()]))
                found = dict(zip(choices, rows))  # once for all that keep the same
                result[t, :, u, m] = [[found[c.tobytes()] for c in same_box] for same_box in keep]
    return result


def score_grid(maps, pages, grid, hp, metric="page"):
    """score_page of n pages, on all cores -> [n, *lengths of the axes TUNED, k]."""
    job, items = partial(score_page, grid=grid, hp=hp, metric=metric), list(zip(maps, pages))
    workers = min(cv2.getNumberOfCPUs(), 16, len(items) // 4)
    if workers < 2:
        return np.array([job(item) for item in items])
    context = multiprocessing.get_context("forkserver")  # OpenCV's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
        return np.array([*progress(pool.map(job, items), "tuning", len(items))])


def choose_setting(rows, to_scores, groups, grid):
    """Rows [n, S, k] of pages at the settings of a grid, in C order of the axes TUNED -> the best
    setting, the recommended one, [S] whether one is on the plateau: a paired bootstrap does not
    tell it from the best. Recommended is the middle: the least sum of grid steps to others on the
    plateau of the best one's mode and kind of unclip (by ratio or exact); ties by score."""
    n, settings, k = rows.shape
    hmeans, high = to_scores(rows.sum(0))[:, 2], []
    best = int(hmeans.argmax())

    def differences(sums):  # [..., (1 + s) * k], the best one's first -> [..., s]
        drawn = to_scores(sums.reshape(*sums.shape[:-1], -1, k))[..., 2]
        return drawn[..., 1:] - drawn[..., :1]

    for some in np.array_split(range(settings), -(-settings // 256)):  # all may be gigabytes
        part = rows[:, [best, *some]].reshape(n, -1)
        high.append(bootstrap(part, differences, groups=groups, draws=1000)[:, 1])
    plateau = np.concatenate(high) >= -1e-12  # sums are rounded
    index = np.indices([*map(len, grid.values())]).reshape(len(TUNED), -1).T  # [S, axes]
    exact = np.array(grid["unclip_ratio"])[index[:, 2]] == 0
    alike = np.flatnonzero(plateau & (index[:, 3] == index[best, 3]) & (exact == exact[best]))
    steps = np.abs(index[alike, None] - index[alike]).sum((1, 2))
    return best, int(alike[np.lexsort((-hmeans[alike], steps))[0]]), plateau


def crossfit(rows, to_scores, parts, groups, grid):
    """Rows [n, S, k] of pages -> [2, n, k] at the settings (best, recommended) of other parts."""
    result, groups = np.zeros((2, len(rows), rows.shape[2])), np.array(groups, object)
    for part in set(parts.tolist()):
        rest = parts != part
        chosen = choose_setting(rows[rest], to_scores, groups[rest], grid)[:2]
        result[:, ~rest] = rows[~rest][:, chosen].swapaxes(0, 1)
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


def tune(maps, pages, parts, grid, hp, name="hmean", seen=None):
    """The --tune object with its Scores and a Difference, and H-means [*lengths of TUNED]. parts
    [n]: to cross-fit; name: of METRICS; seen: of the pages, as in `interval.count_sample`."""
    groups, metric = bootstrap_groups(pages), METRICS[name]
    to_scores, table = cleval.METRICS[metric], score_grid(maps, pages, grid, hp, metric)
    rows = table.reshape(len(pages), -1, table.shape[-1])  # [n, S, k]
    best, middle, plateau = choose_setting(rows, to_scores, groups, grid)

    result = {"pages": len(pages), "settings": rows.shape[1], "metric": name}
    settings = {"before": {key: getattr(hp, key) for key in TUNED}}
    settings |= {"best": setting_values(grid, best), "recommended": setting_values(grid, middle)}
    judged = {}
    for setting, values in settings.items():
        found = [decode_page(m, m.shape[::-1] / s, replace(hp, **values)) for m, s in maps]
        judged[setting] = by = cleval.metric_rows(pages, found)
        sums = {key: cleval.METRICS[m](by[m].sum(0)) for key, m in METRICS.items()}
        result[setting] = {**values, "in_sample": {key: float(s[2]) for key, s in sums.items()}}
    result["plateau"] = int(plateau.sum())

    fitted_best, fitted = crossfit(rows, to_scores, parts, groups, grid)  # [n, k] each
    before = judged["before"][metric][:, : rows.shape[2]]
    result["crossfitted_best"] = make_score(fitted_best, to_scores, groups)
    result["crossfitted"] = make_score(fitted, to_scores, groups, seen)
    result["gain"] = paired_difference(fitted, before, to_scores, groups, seen)
    return result, to_scores(table.sum(0))[..., 2]


def print_tuning(result):
    """What `tune` found: settings with their H-means, and what to expect of the choice."""
    name, same, plateau = result["metric"], "on these same pages", result["plateau"]
    remarks = {
        "before": "before",
        "best": f"best {name} of {result['settings']} {same}",
        "recommended": f"recommended, middle of {plateau} not told from the best; {same}",
    }
    for setting, remark in remarks.items():
        values = [f"{key} {value:.4f}" for key, value in result[setting]["in_sample"].items()]
        values += [f"{key} {result[setting][key]}" for key in TUNED]
        print(*values, remark, sep="  ")
    instead = f"by the best setting instead {result['crossfitted_best'].hmean:.4f}"
    print(f"{result['crossfitted'].line(name)}  cross-fitted: what to expect; {instead}")
    print(f"{result['gain'].line(name)}  gain, cross-fitted")


def draw_landscape(path, table, grid, chosen, name="hmean"):
    """PNG of H-means [*lengths of TUNED] over thresh x box_thresh, of the chosen setting framed."""
    row, column, *others = [grid[key].index(chosen[key]) for key in TUNED]
    table = table[:, :, *others]  # [thresh, box_thresh]
    cell, x0, y0 = 64, 110, 60
    level = (table - table.min()) / max(table.max() - table.min(), 1e-9) * 255
    heat = cv2.applyColorMap(level.round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    heat = cv2.resize(heat, None, fx=cell, fy=cell, interpolation=cv2.INTER_NEAREST)
    image = cv2.copyMakeBorder(heat, y0, 40, x0, 20, cv2.BORDER_CONSTANT, value=(255,) * 3)
    foot = f"{name} %, " + ", ".join(f"{key} {chosen[key]}" for key in TUNED[2:])
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
