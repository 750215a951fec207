"""How sure is a score? Bootstrap intervals over pages or groups of pages, paired differences."""

import math
from statistics import NormalDist

import numpy as np

SCORES = ("precision", "recall", "hmean")


def bootstrap(rows, to_scores, groups=None, draws=4000, seed=0):
    """Rows [n, k] of pages, and to_scores: their sums [..., k] -> scores [..., s] -> 95 % intervals
    [s, 2] of these, see `expanded_bca`. groups: n names; pages of a group are drawn together, None
    is each page alone. Raises ValueError."""
    names = range(len(rows)) if groups is None else groups
    if not len(rows) or len(names) != len(rows):
        raise ValueError(f"{len(names)} groups, {len(rows)} pages; at least one page, a group each")
    _, group, sizes = np.unique(names, return_inverse=True, return_counts=True)
    size, sums = len(sizes), np.zeros((len(sizes), np.shape(rows)[1]))  # [G, k]
    np.add.at(sums, group, rows)
    rng, samples, block = np.random.default_rng(seed), [], max(1, 2**20 // size)
    for count in [block] * (draws // block) + [draws % block]:  # all at once may be gigabytes
        draw = rng.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
        weight = np.bincount(draw.ravel(), minlength=draw.size).reshape(draw.shape).astype(float)
        samples.append(to_scores(weight @ sums))
    without = to_scores(sums.sum(0) - sums if size > 1 else sums)  # [G, s]
    worth = len(rows) ** 2 / (sizes**2).sum()  # so many groups of one size (Kish 1965)
    return expanded_bca(np.concatenate(samples), to_scores(sums.sum(0)), without, worth)


def expanded_bca(samples, scores, without, size):
    """Samples [draws, s] of scores [s], and these without each group [G, s] -> 95 % intervals
    [s, 2]: percentiles of Student's t (Wallace 1959) with size - 1 degrees of freedom (Hesterberg
    2015), an end moved outwards as BCa would (Efron 1987), which inwards is noise of few groups."""
    normal, v, side = NormalDist(), max(size, 2) - 1, np.array([[-1], [1]])
    t = (v * math.expm1((1.96 * (8 * v + 3) / (8 * v + 1)) ** 2 / v) * (1 + 1 / v)) ** 0.5
    lead = without.mean(0) - without
    skew = (lead**3).sum(0) / (6 * np.maximum((lead**2).sum(0), 1e-200) ** 1.5)
    below = ((samples < scores - 1e-12).mean(0) + (samples <= scores + 1e-12).mean(0)) / 2
    bias = np.array([normal.inv_cdf(share) for share in below.clip(1e-3, 1 - 1e-3)])
    moved = bias + (bias + side * t) / np.maximum(1 - skew * (bias + side * t), 0.1)  # [2, s]
    ends = np.vectorize(normal.cdf)(side * np.maximum(side * moved, t))
    return np.array([np.quantile(one, pair) for one, pair in zip(samples.T, ends.T)])


def bootstrap_groups(pages):
    """Names to draw by in a bootstrap: the group where there is one, else the page itself."""
    return [p.name if p.group is None else f"group {p.group}" for p in pages]


def summary(to_scores, rows, groups):
    """Rows [n, k] -> dict of SCORES, hmean's 95 % interval and, in words, what that is over."""
    sizes = np.unique(groups, return_counts=True)[1]
    over = f"{len(sizes)} {'pages' if len(sizes) == len(groups) else 'groups'}"
    over += ", too narrow" * bool(len(groups) ** 2 < 10 * (sizes**2).sum())  # as in bootstrap
    found = {"interval": bootstrap(rows, to_scores, groups)[2].tolist(), "over": over}
    return dict(zip(SCORES, to_scores(rows.sum(0)).tolist())) | found


def paired_difference(rows, other, to_scores, groups):
    """H-mean of rows [n, k] less that of others of the same pages, interval as in `summary`, and
    the verdict. Under 6 groups none can tell: 5 agree by chance 1 time in 16 (sign test)."""
    both, few = np.hstack([rows, other]), len(set(groups)) < 6
    found = summary(lambda sums: np.subtract(*map(to_scores, np.split(sums, 2, -1))), both, groups)
    low, high = (0, 0) if few else found["interval"]
    unsure = "cannot tell" + " from under 6 pages or groups" * few
    found["verdict"] = "better" if low > 0 else "worse" if high < 0 else unsure
    return {"difference": found["hmean"]} | {k: found[k] for k in ("interval", "over", "verdict")}
