"""How often do intervals hold the truth, and how often is a verdict about equals wrong?

python tests/by_hand/coverage.py [--seed 2026] [--runs 4000]

Before: the percentile bootstrap, restated here; after: interval.bootstrap. Simulated pages:

skewed   a page loses a gamma-distributed share (shape .5, mean 1.2 %): most lose under 1 %, one in
         a hundred is ruined and loses over 8 %, much as on 76 pages of SROIE
ruined   an exponential share (mean 1 %) and, one page in 33, up to 30 % more: every second sample
         of 20 pages holds no such page, and no bootstrap can know of it
shops    half of a page's loss is its shop's, both skewed; shops have 4 pages each (even), or sizes
         that fall as 1 / rank (uneven)

Verdicts compare two detectors of equal worth by the paired difference of their means, the mean of
the pages' differences. Alike: both lose in the same way. Unlike: one loses a little on each page,
the other ruins rare ones. By page: what comes of shops that no label file names."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cleval import mean_scores
from command import Parser
from interval import bootstrap

LOSS = 0.012  # of a page, on average


def percentile(rows, to_scores, groups):
    """As interval.bootstrap: the plain percentile bootstrap (Efron and Tibshirani 1993)."""
    _, group = np.unique(groups, return_inverse=True)
    sums = np.zeros((group.max() + 1, rows.shape[1]))
    np.add.at(sums, group, rows)
    shares = np.full(len(sums), 1 / len(sums))
    weight = np.random.default_rng(0).multinomial(len(sums), shares, 4000)
    return np.percentile(to_scores(weight @ sums), [2.5, 97.5], axis=0).T


def skewed(rng, *shape):
    return rng.gamma(0.5, 2 * LOSS, shape)


def ruined(rng, *shape):
    return rng.exponential(0.01, shape) + (rng.random(shape) < 1 / 33) * rng.uniform(0, 0.3, shape)


def shop_of(count, even):
    """The shop of each page [n]."""
    sizes = np.full(count, 4) if even else np.maximum(1, 1.2 * count // np.arange(1, count + 1))
    return np.repeat(np.arange(count), sizes.astype(int))


def by_shop(rng, shop, runs):
    return (skewed(rng, shop[-1] + 1, runs)[shop] + skewed(rng, len(shop), runs)) / 2


def alike(rng, shop, runs):
    return by_shop(rng, shop, runs) - by_shop(rng, shop, runs)


def unlike(rng, shop, runs):
    return LOSS - by_shop(rng, shop, runs)


def before_and_after(values, groups):
    """Pages' values [n, runs] -> 95 % intervals of their means [low and high, runs], twice."""
    rows = np.hstack([values, np.ones((len(values), 1))])
    return [of(rows, mean_scores, groups).T for of in (percentile, bootstrap)]


def print_coverage(what, values, groups, truth, bound=""):
    shown = f"{what:28s}"
    for low, high in before_and_after(values, groups):
        held, lucky = ((low <= truth) & (truth <= high)).mean(), (low > truth).mean()
        shown += f"    {100 * held:5.1f} {100 * lucky:5.1f}"
    print(f"{shown}    {bound}")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--seed", type=int, default=2026, help="another seed, other pages (2026)")
    parser.add_argument("--runs", type=int, default=4000, help="simulated scorings a row (4000)")
    args = parser.parse_args()
    rng, runs = np.random.default_rng(args.seed), args.runs

    print("95 % intervals of H-mean: % that hold the truth, % that lie above it")
    print(f"{'':28s}    {'before':>11s}    {'after':>11s}    at least")
    for kind, mean, bound in ((skewed, LOSS, 92), (ruined, 0.01 + 0.15 / 33, "")):
        for count in (20, 40, 76, 404):
            values = 1 - kind(rng, count, runs)
            print_coverage(f"{kind.__name__}, {count} pages", values, range(count), 1 - mean, bound)
    for even in (True, False):
        for count, bound in ((5, ""), (6, ""), (10, 85), (48, 90)):
            shop = shop_of(count, even)
            what = f"{count} {'even' if even else 'uneven'} shops, {len(shop)} pages"
            print_coverage(what, 1 - by_shop(rng, shop, runs), shop, 1 - LOSS, bound)

    print("\nverdicts about equals: % that are wrong (nominal 5)")
    print(f"{'':36s}    before    after")
    for kind in (alike, unlike):
        for even in (True, False):
            for count in (6, 10, 48):
                shop = shop_of(count, even)
                values = kind(rng, shop, runs)
                for groups, by in ((shop, "by shop"), (range(len(shop)), "by page")):
                    shown = f"{kind.__name__}, {count} {'even' if even else 'uneven'} shops, {by}"
                    shown = f"{shown:36s}"
                    for low, high in before_and_after(values, groups):
                        shown += f"    {100 * ((low > 0) | (high < 0)).mean():5.1f}"
                    print(shown)


if __name__ == "__main__":
    sys.exit(main())
