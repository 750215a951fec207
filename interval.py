"""How sure is a score? Bootstrap intervals over pages or groups of pages, and paired differences.

A score, or the difference of two, is a dataclass that prints itself and says what it is over."""

import functools
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import NormalDist

import numpy as np

SEEN = {  # how a network may have seen a page before
    "trained": "trained on",
    "chosen": "epoch chosen on",
    "tuned": "thresholds chosen on",
    "scored": "members chosen or weighed by their scores on",
}

# ---------------------------------------------------------------- what a score says


@dataclass(frozen=True)
class Sample:
    """What an interval is over."""

    unit: str  # "pages", or "groups" where some pages share one
    count: int  # of them
    narrow: bool  # they are worth under 10 groups of equal size, so the interval is too narrow
    seen: dict = field(default_factory=dict)  # {how, of SEEN: number of pages seen so before}

    def __str__(self):
        remarks = [f"{self.count} {self.unit}"]
        if self.narrow:
            remarks.append("too narrow")
        if self.seen:
            ways = [f"{SEEN[how]} {count} of them" for how, count in self.seen.items()]
            remarks.append(f"in sample: {', '.join(ways)}")
        return ", ".join(remarks)


@dataclass(frozen=True)
class Score:
    """Precision, recall and H-mean within 0 to 1, and the H-mean's 95 % interval."""

    precision: float
    recall: float
    hmean: float
    interval: list  # [low, high]
    over: Sample | str  # words in checkpoints of older versions

    def __str__(self):
        return self.line()

    def line(self, name="hmean"):
        low, high = self.interval
        return f"{name} {self.hmean:.4f} [{low:.4f}, {high:.4f}] over {self.over}"

    def full_line(self):
        return f"precision {self.precision:.4f}  recall {self.recall:.4f}  {self}"

    @property
    def seen(self):
        """A Sample's `seen` as a Counter, so that | of two takes the larger number of each way;
        empty for scores of older checkpoints, which do not say it."""
        return Counter(self.over.seen if isinstance(self.over, Sample) else {})

    def to_json(self):
        return asdict(self) | {"over": str(self.over)}


@dataclass(frozen=True)
class Difference:
    """How much higher one H-mean is than another on the same pages."""

    difference: float
    interval: list  # [low, high]
    over: Sample
    verdict: str  # "better", "worse", or one that begins with "cannot tell"

    def __str__(self):
        return f"{self.line()}  {self.verdict}"

    def line(self, name="hmean"):
        low, high = self.interval
        return f"{name} {self.difference:+.4f} [{low:+.4f}, {high:+.4f}] over {self.over}"

    def to_json(self):
        return asdict(self) | {"over": str(self.over)}


def read_score(stored):
    """The Score that a checkpoint holds as `asdict` made it; older ones lack some of its values."""
    over = stored.get("over", "pages")
    return Score(
        precision=stored.get("precision", math.nan),
        recall=stored.get("recall", math.nan),
        hmean=stored["hmean"],
        interval=stored.get("interval", [math.nan, math.nan]),
        over=over if isinstance(over, str) else Sample(**over),
    )


def printed_samples(logs):
    """What the scores are over that train.py has printed last in some logs (paths), each once, in
    the words of a Sample; "pages" where it has printed none."""
    found = set()
    for path in logs:
        text = path.read_text("utf-8", "replace")
        found.update(re.findall(r"^last hmean .+?\] over ([^;\n]+)", text, re.MULTILINE)[-1:])
    return "; ".join(sorted(found)) or "pages"


# ---------------------------------------------------------------- from pages to scores


def bootstrap_groups(pages):
    """Names to draw by in a bootstrap: the group where there is one, else the page itself."""
    return [p.name if p.group is None else f"group {p.group}" for p in pages]


def count_sample(groups, seen=None):
    """The Sample of pages with these names of groups; seen: {how, of SEEN: number of pages}."""
    sizes = np.unique(groups, return_counts=True)[1]
    return Sample(
        unit="pages" if len(sizes) == len(groups) else "groups",
        count=len(sizes),
        narrow=bool(equal_groups(sizes) < 10),
        seen={how: count for how, count in (seen or {}).items() if count},
    )


def make_score(rows, to_scores, groups, seen=None):
    """Rows [n, k] of pages and to_scores as in `bootstrap` -> Score; groups and seen as in
    `count_sample`. Raises ValueError."""
    precision, recall, hmean = to_scores(rows.sum(0)).tolist()
    interval = bootstrap(rows, to_scores, groups)[2].tolist()
    return Score(precision, recall, hmean, interval, count_sample(groups, seen))


def paired_difference(rows, other, to_scores, groups, seen=None):
    """H-mean of rows [n, k] minus that of other rows of the same pages -> Difference; the rest as
    in `make_score`. Under 6 groups it cannot tell: 5 agree by chance 1 time in 16 (sign test)."""

    def differences(sums):  # [..., 2 k] -> [..., 3]
        ours, theirs = np.split(sums, 2, -1)
        return to_scores(ours) - to_scores(theirs)

    both = make_score(np.hstack([rows, other]), differences, groups, seen)
    low, high = both.interval
    if both.over.count < 6:
        verdict = "cannot tell from under 6 pages or groups"
    elif low > 0:
        verdict = "better"
    elif high < 0:
        verdict = "worse"
    else:
        verdict = "cannot tell"
    return Difference(both.hmean, both.interval, both.over, verdict)


# ---------------------------------------------------------------- bootstrap


def bootstrap(rows, to_scores, groups=None, draws=4000):
    """Rows [n, k] of pages and to_scores, from their sums [..., k] to scores [..., s] -> 95 %
    intervals [s, 2] of the scores, see `expanded_bca`. Pages of a group are drawn together; groups:
    n names, None makes each page a group. Raises ValueError."""
    names = range(len(rows)) if groups is None else groups
    if not len(rows) or len(names) != len(rows):
        raise ValueError(f"{len(names)} groups, {len(rows)} pages; at least one page, a group each")

    _, group, sizes = np.unique(names, return_inverse=True, return_counts=True)
    count = len(sizes)
    sums = np.zeros((count, np.shape(rows)[1]))  # [G, k]
    np.add.at(sums, group, rows)

    # in blocks, since all draws at once may be gigabytes. Groups of the i-th draw of a block are
    # numbered from count * i on, so that one bincount tells how often each draw has each group
    rng = np.random.default_rng(0)
    block = max(1, 2**20 // count)
    samples = []
    for start in range(0, draws, block):
        many = min(block, draws - start)  # never 0: `to_scores` may not take an empty block
        drawn = rng.integers(count, size=(many, count)) + count * np.arange(many)[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        samples.append(to_scores(times.astype(float) @ sums))

    # the scores of all groups, and of all but one
    everything = sums.sum(0)
    without = to_scores(everything - sums if count > 1 else sums)  # [G, s]
    samples = np.concatenate(samples)
    return expanded_bca(samples, to_scores(everything), without, equal_groups(sizes))


def equal_groups(sizes):
    """How many groups of one size are worth as much as those of sizes [G] (Kish 1965)."""
    return sizes.sum() ** 2 / (sizes**2).sum()


def expanded_bca(samples, scores, without, size):
    """Samples [draws, s] of scores [s], and the scores without each of `size` groups [G, s] -> 95 %
    intervals [s, 2]. Their ends are percentiles of the samples, as far out as Student's t asks for
    (Hesterberg 2015). BCa (Efron 1987) may move an end outwards; inwards it is noise of few groups.
    """
    normal = NormalDist()
    side = np.array([[-1], [1]])  # the low end and the high end

    # few groups spread too little: t instead of the normal, and 1 / v more variance
    freedom = max(size, 2) - 1
    t = (student_975_squared(freedom) * (1 + 1 / freedom)) ** 0.5

    # acceleration: the skewness of what single groups are worth
    lead = without.mean(0) - without
    squares = np.maximum((lead**2).sum(0), 1e-200)
    skew = (lead**3).sum(0) / (6 * squares**1.5)

    # bias: how far the score lies from the median of the samples; ties count half
    below = ((samples < scores - 1e-12).mean(0) + (samples <= scores + 1e-12).mean(0)) / 2
    bias = np.array([normal.inv_cdf(share) for share in below.clip(1e-3, 1 - 1e-3)])

    plain = bias + side * t  # [2, s]
    moved = bias + plain / np.maximum(1 - skew * plain, 0.1)
    outwards = side * np.maximum(side * moved, t)
    shares = np.vectorize(normal.cdf)(outwards)
    return np.array([np.quantile(column, ends) for column, ends in zip(samples.T, shares.T)])


def student_975_squared(freedom):
    """Square of the 97.5 % quantile of Student's t, approximately (Wallace 1959): the quantile is
    4 % too high at 2 degrees of freedom, 1 % at 3 and under .1 % from 7 on."""
    z = 1.96 * (8 * freedom + 3) / (8 * freedom + 1)
    return freedom * math.expm1(z**2 / freedom)


# ---------------------------------------------------------------- few runs


@functools.cache
def student(freedom, share):
    """The value that |t| exceeds with probability share, Student's t having `freedom` degrees of
    freedom: t is sqrt(freedom) times the tangent of an angle whose density is its cosine to the
    power of freedom - 1."""
    angle = (np.arange(100000) + 0.5) * math.pi / 200000
    mass = np.cumsum(np.cos(angle) ** (freedom - 1))
    angle = np.interp(1 - share, mass / mass[-1], angle + math.pi / 400000)
    return math.sqrt(freedom) * math.tan(angle)


def expected_lead(n):
    """Expected distance of the largest of n normal values from their mean, in their sample sd.

    The expected largest value is the integral of (x > 0) - Phi(x)^n, here a sum over midpoints. It
    is divided by the expected sample sd, which is below 1. That is allowed because the distance in
    sample sd does not depend on the sample sd."""
    x = np.arange(-8, 8, 0.01) + 0.005  # midpoints of steps of 1 / 100
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x]) ** n
    largest = float(((x > 0) - below).sum()) / 100
    spread = math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2)) * math.sqrt(2 / (n - 1))
    return largest / spread


def outlier_limit(n):
    """Distance from the mean, in sd, that the best of n equal runs exceeds in 5 % (Grubbs 1969)."""
    t = student(n - 2, 0.1 / n)
    return (n - 1) / math.sqrt(n) * math.sqrt(t * t / (n - 2 + t * t))


def spearman(a, b):
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    a = centred_ranks(a)
    b = centred_ranks(b)
    return float(a @ b / max(math.sqrt((a @ a) * (b @ b)), 1))


def centred_ranks(values):
    """Twice the distance of each value's rank from the mean rank [n]: how many values are below it,
    minus how many are above it."""
    return np.sign(np.subtract.outer(values, values)).sum(1)
