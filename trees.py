"""How likely is it, by its features? Boosted trees, and a scale on which scores are probabilities.

A classifier cannot tell how usual a class is where it will be used. Scores of things as they are,
beside scores of examples of the class, bound it: the class is at most so usual that its examples
account for everything that scores as high as they do (mixture proportion estimation, Blanchard et
al. 2010; the best bin, Garg et al. 2021). Probabilities of all things add up to that many."""

from typing import NamedTuple

import numpy as np

BINS = 32  # of a feature
DEPTH = 4  # questions a tree
ROUNDS = 80  # trees
RATE = 0.15
RIDGE = 2.0
# for `make_scale`, in which a bar is a score that things and examples are counted from
LEAST_RECALL = 0.5  # least share of the examples that reach a bar
AS_GOOD = 1.1  # bars count whose bound is at most this many times the lowest
HIGHEST = 0.99  # no probability is above it
SLOPES = 1.0, 0.6, 0.8, 1.25, 1.5, 1.75, 2.0, 2.5  # tried: factors of log odds

# ---------------------------------------------------------------- classifier


class Trees(NamedTuple):
    """A boosted classifier of features [N, F]."""

    edges: np.ndarray  # [B - 1, F] between the bins of each feature
    start: float  # log odds without a tree
    trees: list  # ([(feature, edge) of each level], values [leaves])


def to_bins(features, edges):
    """Features [N, F] -> numbers of their bins [N, F]."""
    bins = np.zeros(features.shape, int)
    for k, column in enumerate(features.T):
        bins[:, k] = np.searchsorted(edges[:, k], column, "right")
    return bins


def fit_trees(features, is_class):
    """Features [N, F] and flags [N] -> Trees, by gradient boosting of the log odds (Friedman 2001).
    A tree asks one question a level, at all of its nodes (Prokhorenkova et al. 2018)."""
    edges = np.quantile(features, np.linspace(0, 1, BINS + 1)[1:-1], axis=0)
    bins = to_bins(features, edges)

    # log odds of all together; half a thing added to each side keeps them finite
    count = is_class.sum() + 0.5
    start = np.log(count / (len(bins) + 1 - count))
    score = np.full(len(bins), start)

    # each tree takes a Newton step: its leaves are slope / bend of the log likelihood
    trees = []
    for _ in range(ROUNDS):
        p = sigmoid(score)
        slope = is_class - p
        bend = p * (1 - p)
        questions, leaf = grow_tree(bins, slope, bend)
        value = leaf_sum(leaf, slope) / (leaf_sum(leaf, bend) + RIDGE)
        trees.append((questions, RATE * value))
        score += RATE * value[leaf]
    return Trees(edges, start, trees)


def leaf_sum(leaf, weights):
    return np.bincount(leaf, weights, 2**DEPTH)


def grow_tree(bins, slope, bend):
    """Bins [N, F] and derivatives [N] of the loss -> questions [(feature, edge)] of the tree that
    lowers it most, level by level, and the leaf of each [N]."""
    width = bins.shape[1]
    leaf = np.zeros(len(bins), int)
    questions = []
    for level in range(DEPTH):
        # both derivatives summed up by node, feature and bin; below an edge by running sums
        cell = (leaf[:, None] * width + np.arange(width)) * BINS + bins
        count = width * BINS * 2**level
        sums = []
        for weights in (slope, bend):
            total = np.bincount(cell.ravel(), np.repeat(weights, width), count)
            sums.append(total.reshape(-1, width, BINS).cumsum(2))  # [nodes, F, B]

        # what a question at each edge gains, summed over the nodes
        left, left_bend = sums
        right = left[..., -1:] - left
        right_bend = left_bend[..., -1:] - left_bend
        gain = left**2 / (left_bend + RIDGE) + right**2 / (right_bend + RIDGE)
        feature, edge = np.unravel_index(gain.sum(0).argmax(), (width, BINS))
        questions.append((feature, edge))
        leaf = 2 * leaf + (bins[:, feature] > edge)
    return questions, leaf


def tree_scores(model, features):
    """Trees and features [N, F] -> log odds [N]."""
    bins = to_bins(features, model.edges)
    score = np.full(len(bins), model.start)
    for questions, value in model.trees:
        leaf = np.zeros(len(bins), int)
        for feature, edge in questions:
            leaf = 2 * leaf + (bins[:, feature] > edge)
        score += value[leaf]
    return score


# ---------------------------------------------------------------- probabilities


class Scale(NamedTuple):
    """From log odds to probabilities of a class."""

    count: float  # how many things with a score are of the class
    slope: float  # log odds are multiplied by it, then the shift is added
    shift: float
    weight: float  # how many of the class one with a score stands for

    def probabilities(self, scores):
        return np.minimum(sigmoid(self.slope * scores + self.shift), HIGHEST)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def make_scale(scores, examples, lost, count):
    """Scores of things as they are [N] and of examples of a class [K] -> Scale, with the slope that
    fits best. lost: how many more examples have no score. count: how many things there are in all.

    Where the class seems to be near a half of them, things and examples only look alike: that
    proves nothing, so its estimated count is lowered."""
    examples = np.sort(examples)[::-1]
    total = len(examples) + lost
    if not len(examples):
        return Scale(0.0, 1.0, -np.inf, 1.0)

    # each bar bounds the class's count: things that reach it / share of examples that do; the mean
    # of the bars with low bounds, since the lowest alone is low by luck
    places = np.linspace(LEAST_RECALL * total, len(examples), 40).astype(int)
    places = np.unique(places.clip(1, len(examples)))
    recalls = places / total
    above = np.array([(scores >= examples[place - 1]).sum() for place in places])
    bounds = (above + 4.5 + 3 * np.sqrt(above + 2.25)) / recalls  # three standard errors of a count
    good = bounds <= AS_GOOD * bounds.min()
    expected = (above / recalls)[good].mean()

    # lower where things and examples look alike, and only those of the class that have a score
    telling = max(1 - (2 * expected / count) ** 2, 0)
    expected *= telling * len(examples) / total

    # the slope can only be judged where some things are of the class, and not all
    slopes = SLOPES if 0 < expected < len(scores) else SLOPES[:1]
    fits = [fit_scale(scores, examples, expected, slope) for slope in slopes]
    _, slope, shift = max(fits)
    return Scale(expected, slope, shift, total / len(examples))


def fit_scale(scores, examples, expected, slope):
    """Log odds of things [N] and examples [K] -> (log likelihood, slope, shift). With this shift,
    probabilities of things add up to `expected` (Saerens et al. 2002): the trees saw examples
    and things in other shares than the class has here. The likelihood says how well the slope tells
    examples from things (Ward et al. 2009)."""
    scores, examples = slope * scores, slope * examples

    # bisection: probabilities rise with the shift
    low, high = -60.0, 60.0
    for _ in range(50):
        shift = (low + high) / 2
        if sigmoid(scores + shift).sum() < expected:
            low = shift
        else:
            high = shift

    # odds that a score with probability p is an example's, not a thing's: p * examples / expected
    usual = len(examples) / max(expected, 1e-9)
    odds = usual * sigmoid(examples + low)
    likelihood = np.log(odds / (1 + odds)).sum()
    likelihood -= np.log1p(usual * sigmoid(scores + low)).sum()
    return likelihood, slope, low
