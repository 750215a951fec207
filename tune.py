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
from overlap import as_points
from progress import progress

GRID = {
    "thresh": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7),
    "box_thresh": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "unclip_ratio": (0.0, 1.4, 1.7, 2.0, 2.3, 2.6),
    "mode": ("polygon", "box"),
    "min_size": (0.0, 3.0, 5.0, 7.0),
}
TUNED = tuple(GRID)  # the axes of every grid, in this order
METRICS = {  # --metric: which of cleval's
    "hmean": "page",
    "micro": "micro",
    "iou50": "iou50",
}
VARIANTS = {"page": "page", "micro": "official", "iou50": "page"}  # of CLEval


def grid_shape(grid):
    return [len(values) for values in grid.values()]


# ---------------------------------------------------------------- scores of all settings


def choice_rows(page, metric, labels, det, keep):
    """M detections on a page and S choices of them, `keep` [S, M] -> rows [S, k]: the first six
    numbers that cleval.page_row has for each choice, all four for metric page. metric: of
    cleval.METRICS. labels: cleval.Labels of the page."""
    if metric == "iou50":
        overlaps = cleval.shared_areas(page.polygons, det, page.ignore)
        close = overlaps.shared > cleval.MORE_THAN_HALF * overlaps.union
        num_gt = np.count_nonzero(~overlaps.ignore)
        rows = []
        for choice in keep:
            num_det = np.count_nonzero(choice & overlaps.valid)
            hits = len(cleval.one_to_one(close & choice))
            rows.append((num_gt, num_det, hits, hits, 0, 0))
        return rows

    pairs = cleval.page_pairs(labels, det)
    counts = cleval.count_kept(labels, pairs, keep, VARIANTS[metric])
    if metric == "micro":
        return counts[:, :6]
    scores = cleval.micro_scores(counts)
    return np.insert(scores, 3, 1, axis=1)


def score_page(item, grid, hp, metric):
    """The rows of a page at every setting of a grid, [*lengths of the axes TUNED, k]. item: ((map
    uint8 [h, w], scale [2]), page).

    What settings share is done once: contours for each thresh; growing blobs and comparing them
    with the labels for each thresh, unclip_ratio and mode."""
    (prob, scale), page = item
    page_size = prob.shape[::-1] / scale
    gt = as_points(page.polygons)
    texts = page.texts if metric == "micro" else [None] * len(gt)
    ignore = np.array(page.ignore, bool)
    labels = cleval.prepare_labels(gt, texts, ignore, VARIANTS[metric])

    # decoded with all that a setting may keep
    decode = partial(
        decode_candidates,
        box_thresh=min(grid["box_thresh"]),
        min_size=0,
        max_candidates=hp.max_candidates,
        shrink_ratio=hp.shrink_ratio,
    )
    box_thresh, min_size, _ = np.ix_(grid["box_thresh"], grid["min_size"], [0])
    limit = cleval.MAX_DETECTIONS if metric == "page" else np.inf
    columns = 4 if metric == "page" else 6
    result = np.zeros([*grid_shape(grid), columns])

    for t, thresh in enumerate(grid["thresh"]):
        blobs = find_candidates(prob, thresh)
        for u, ratio in enumerate(grid["unclip_ratio"]):
            short = grown_sides(blobs.rects, ratio, hp.shrink_ratio).min(1)
            for m, mode in enumerate(grid["mode"]):
                polygons, scores = decode(blobs, unclip_ratio=ratio, mode=mode)
                det = as_points(to_page(polygons, scale, page_size))

                # which of them each box_thresh and min_size keeps; blobs come best first, so that
                # the decoded ones are the first of all
                keep = (scores >= box_thresh) & (short[: len(scores)] >= min_size)
                keep &= keep.cumsum(2) <= limit  # [box_thresh, min_size, M]
                score = partial(choice_rows, page, metric, labels, det)
                rows = score_once(np.concatenate(keep), score)
                result[t, :, u, m] = rows.reshape(*keep.shape[:2], columns)
    return result


def score_once(choices, score):
    """Choices [S, M] of detections, a function of several of them -> its rows [S, k]. Many settings
    choose the same: each choice is scored once, known by its bytes."""
    keys = [choice.tobytes() for choice in choices]
    unlike = dict(zip(keys, choices))
    rows = score(np.array([*unlike.values()]))
    row_of = dict(zip(unlike, rows))
    return np.array([row_of[key] for key in keys])


def score_grid(maps, pages, grid, hp, metric):
    """score_page of n pages, on all cores -> [n, *lengths of the axes TUNED, k]."""
    job = partial(score_page, grid=grid, hp=hp, metric=metric)
    items = list(zip(maps, pages))
    workers = min(cv2.getNumberOfCPUs(), 16, len(items) // 4)
    if workers < 2:
        return np.array([job(item) for item in items])

    context = multiprocessing.get_context("forkserver")  # OpenCV's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
        results = progress(pool.map(job, items), "tuning", len(items))
        return np.array([*results])


# ---------------------------------------------------------------- choice


def choose_setting(rows, to_scores, groups, grid):
    """Rows [n, S, k] of pages at the settings of a grid, in C order of the axes TUNED -> the best
    setting, the recommended one, [S] whether one is on the plateau: a paired bootstrap does not
    tell it from the best. The recommended one is the middle of those on the plateau that have the
    best one's mode and kind of unclip (by ratio or exact): its grid steps to them add up to the
    least; ties go to the higher score."""
    hmeans = to_scores(rows.sum(0))[:, 2]  # [S]
    best = int(hmeans.argmax())
    plateau = near_best(rows, to_scores, groups, best)

    # settings on the plateau that decode in the best one's way
    index = np.indices(grid_shape(grid)).reshape(len(TUNED), -1)  # [axes, S]
    _, _, ratio, mode, _ = index
    exact = np.array(grid["unclip_ratio"])[ratio] == 0
    same_way = (mode == mode[best]) & (exact == exact[best])
    alike = np.flatnonzero(plateau & same_way)

    # the one from which grid steps to the others add up to the least
    place = index[:, alike]
    apart = np.abs(place[:, :, None] - place[:, None])  # [axes, settings, settings]
    steps = apart.sum((0, 2))
    order = np.lexsort((-hmeans[alike], steps))
    return best, int(alike[order[0]]), plateau


def near_best(rows, to_scores, groups, best):
    """[S] whether the interval of a setting's difference to the best one reaches 0."""
    n, settings, k = rows.shape

    def differences(sums):  # [..., (1 + s) * k], the best one's first -> [..., s]
        of_settings = sums.reshape(*sums.shape[:-1], -1, k)
        drawn = to_scores(of_settings)[..., 2]
        return drawn[..., 1:] - drawn[..., :1]

    high = []
    for some in np.array_split(range(settings), -(-settings // 256)):  # all may be gigabytes
        part = rows[:, [best, *some]].reshape(n, -1)
        high.append(bootstrap(part, differences, groups, draws=1000)[:, 1])
    return np.concatenate(high) >= -1e-12  # sums are rounded


def crossfit(rows, to_scores, parts, groups, grid):
    """Rows [n, S, k] of pages -> [2, n, k] at the settings (best, recommended) of other parts."""
    n, _, k = rows.shape
    result = np.zeros((2, n, k))
    groups = np.array(groups, object)
    for part in set(parts.tolist()):
        rest = parts != part
        best, middle, _ = choose_setting(rows[rest], to_scores, groups[rest], grid)
        result[0, ~rest] = rows[~rest, best]
        result[1, ~rest] = rows[~rest, middle]
    return result


def halves(groups):
    """Part 0 or 1 of each page [n]: half of the groups each. Raises DataError with one group."""
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise DataError("--tune", "all pages are of one group", "cross-fitting needs two")
    order = np.random.default_rng(0).permutation(len(names))
    return np.argsort(order)[group] % 2


def setting_values(grid, setting):
    """{key: value} of a setting's number in the C order of the axes TUNED."""
    index = np.unravel_index(setting, grid_shape(grid))
    return {key: grid[key][i] for key, i in zip(TUNED, index)}


# ---------------------------------------------------------------- evaluate.py --tune


def tune(maps, pages, parts, grid, hp, name, seen):
    """Score all settings of a grid on cached maps. Returns what --json prints, with Scores and a
    Difference in it, and the H-means of the settings [*lengths of the axes TUNED].

    maps: (uint8 [h, w], scale [2]) of each page. parts [n]: the part of each page in cross-fitting.
    name: of METRICS. seen: of the pages, as in `interval.count_sample`."""
    metric = METRICS[name]
    to_scores = cleval.METRICS[metric]
    groups = bootstrap_groups(pages)
    table = score_grid(maps, pages, grid, hp, metric)
    rows = table.reshape(len(pages), -1, table.shape[-1])  # [n, S, k]
    best, middle, plateau = choose_setting(rows, to_scores, groups, grid)

    # the setting before, the best and the recommended one, by each metric
    settings = {
        "before": {key: getattr(hp, key) for key in TUNED},
        "best": setting_values(grid, best),
        "recommended": setting_values(grid, middle),
    }
    result = {"pages": len(pages), "settings": rows.shape[1], "metric": name}
    judged = {}
    for setting, values in settings.items():
        other = replace(hp, **values)
        found = []
        for prob, scale in maps:
            found.append(decode_page(prob, prob.shape[::-1] / scale, other))
        by_metric = cleval.metric_rows(pages, found)
        judged[setting] = by_metric
        hmeans = {}
        for key, kind in METRICS.items():
            scores = cleval.METRICS[kind](by_metric[kind].sum(0))
            hmeans[key] = float(scores[2])
        result[setting] = {**values, "in_sample": hmeans}
    result["plateau"] = int(plateau.sum())

    # thresholds are chosen anew; those before may have been chosen on these same pages
    anew = dict(seen or {})
    anew.pop("tuned", None)
    fitted_best, fitted = crossfit(rows, to_scores, parts, groups, grid)  # [n, k] each
    before = judged["before"][metric][:, : rows.shape[2]]
    result["crossfitted_best"] = make_score(fitted_best, to_scores, groups, anew)
    result["crossfitted"] = make_score(fitted, to_scores, groups, anew)
    result["gain"] = paired_difference(fitted, before, to_scores, groups, seen)
    return result, to_scores(table.sum(0))[..., 2]


def print_tuning(result):
    """What `tune` found: settings with their H-means, and what to expect of the choice."""
    name = result["metric"]
    remarks = {
        "before": "before",
        "best": f"best {name} of {result['settings']} on these same pages",
        "recommended": f"recommended: {result['plateau']} cannot be told from the best; "
        "the middle of those of its mode and kind of unclip; on these same pages",
    }
    for setting, remark in remarks.items():
        columns = [f"{key} {value:.4f}" for key, value in result[setting]["in_sample"].items()]
        columns += [f"{key} {result[setting][key]}" for key in TUNED]
        print(*columns, remark, sep="  ")
    instead = f"by the best setting instead {result['crossfitted_best'].hmean:.4f}"
    print(f"{result['crossfitted'].line(name)}  cross-fitted: what to expect; {instead}")
    print(f"{result['gain'].line(name)}  gain, cross-fitted")


# ---------------------------------------------------------------- picture

CELL = 64  # px of a setting's square
LEFT, TOP = 110, 60  # px beside and above the squares


def draw_landscape(path, table, grid, chosen, name):
    """Write a PNG of H-means [*lengths of the axes TUNED] over thresh x box_thresh, with a frame
    around the chosen setting, from which the other values come. Raises OSError."""
    row, column, *others = [grid[key].index(chosen[key]) for key in TUNED]
    table = table[:, :, *others]  # [thresh, box_thresh]

    # a coloured square for each setting
    spread = max(table.max() - table.min(), 1e-9)
    level = (table - table.min()) / spread * 255
    level = level.round().astype(np.uint8)
    heat = cv2.applyColorMap(level, cv2.COLORMAP_VIRIDIS)
    heat = heat.repeat(CELL, 0).repeat(CELL, 1)
    margins = TOP, 40, LEFT, 20
    image = cv2.copyMakeBorder(heat, *margins, cv2.BORDER_CONSTANT, value=(255, 255, 255))

    def write(text, x, y, grey=0):
        font = cv2.FONT_HERSHEY_SIMPLEX
        color = (grey, grey, grey)
        cv2.putText(image, text, (x, y), font, 0.45, color, 1, cv2.LINE_AA)

    # axes
    fixed = ", ".join(f"{key} {chosen[key]}" for key in TUNED[2:])
    write("box_thresh", LEFT, 20)
    write("thresh", 8, TOP + 16)
    write(f"{name} %, {fixed}", 8, len(image) - 12)
    for t, value in enumerate(grid["thresh"]):
        write(f"{value:g}", LEFT - 40, TOP + t * CELL + 36)
    for b, value in enumerate(grid["box_thresh"]):
        write(f"{value:g}", LEFT + b * CELL + 20, TOP - 8)

    for (t, b), hmean in np.ndenumerate(100 * table):
        x = LEFT + b * CELL + 8
        y = TOP + t * CELL + 36
        grey = 255 if level[t, b] < 128 else 0
        write(f"{hmean:.2f}", x, y, grey)

    # a red frame around the chosen one
    x = LEFT + column * CELL
    y = TOP + row * CELL
    cv2.rectangle(image, (x, y), (x + CELL, y + CELL), (0, 0, 255), 3)
    _, png = cv2.imencode(".png", image)
    replace_file(path, png)
