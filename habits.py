"""How are pages labelled? Their tilt, what is labelled besides words, and what another hand
changed, all by the shapes of labels."""

from collections import Counter

import cv2
import numpy as np

from cleval import iou_matches, line_neighbours, shared_areas

LOOKED_AT = 500  # labels of a page whose habits check looks at


def describe_tilt(pages):
    """How the labels of inspected pages lie, on one line, and the preset to train with."""
    pages = [page for page in pages if page.polygons]
    if not pages:
        return "no labels: no preset to name"
    tilts = np.abs([page_tilt(page) for page in pages])
    overlap = np.mean([overlapping_share(page) > 0.05 for page in pages])  # few pages decide a mean
    spans = np.median([label_span(page) for page in pages])
    tilted = np.mean(tilts > 2)
    line = f"tilt {np.median(tilts):.1f} degrees by the median, over 2 on {tilted:.0%} of pages; "
    line += f"labels span {spans:.0%} of a picture and overlap on {overlap:.0%} of pages"
    if overlap > 0.25:
        line += " (upright boxes on tilted lines?)"
    if tilted < 0.1 and overlap <= 0.25 and spans >= 0.5:
        return f"{line}: scans, for hparams/best.json or hparams/receipts-lite2.json"
    return f"{line}: photographs, for hparams/photographs.json"


def page_tilt(page):
    """Median angle of the labels' longest edges in degrees, within 45: quarter turns count as 0."""
    edges = [np.roll(polygon, -1, 0) - polygon for polygon in page.polygons]
    longest = np.array([edge[np.hypot(*edge.T).argmax()] for edge in edges])
    angles = np.degrees(np.arctan2(*longest.T[::-1]))
    return np.median((angles + 45) % 90 - 45)


def label_span(page):
    """Share of the picture that the box around all labels covers."""
    points = np.concatenate(page.polygons).clip(0, page.size)
    return np.prod(np.ptp(points, 0) / page.size)


def overlapping_share(page):
    """Share of the labels that have more than 15 % of the smaller one in common with another."""
    polygons = page.polygons[:LOOKED_AT]
    overlaps = shared_areas(polygons, polygons, None)
    smaller = np.minimum.outer(overlaps.gt, overlaps.gt)
    overlap = overlaps.shared > 0.15 * smaller
    np.fill_diagonal(overlap, False)
    return overlap.any(1).mean()


def describe_habits(pages, contrasts):
    """What pages label besides words, by shape, on one line, and what follows from it."""
    counts = Counter()
    for page, contrast in zip(pages, contrasts):
        if page.polygons:
            counts.update(label_habits(page.polygons[:LOOKED_AT], contrast))
    total = counts.pop("labels", 0)
    shares = [f"{n / total:.1%} {kind}" for kind, n in counts.items() if n > 0.002 * total]
    if not shares:
        return "habits: no labels of rules, colons, single letters or blank paper"
    line = f"habits: {', '.join(shares)}. Each counts in the score, a rule as up to 100 characters"
    line += ". Weights that learned other labels miss them until they are fine-tuned"
    return f"{line}. data.py synth --habit competition draws such labels"


def label_habits(polygons, contrast):
    """{kind: how many} of N labels that hold no word, by their shape and contrast [N]."""
    sides = np.array([cv2.minAreaRect(np.float32(p))[1] for p in polygons])  # [N, 2]
    long, short = sides.max(1), sides.min(1)
    height = np.median(short)
    single = (long < 1.4 * short) & (short > height / 2)
    return {
        "labels": len(polygons),
        "rules": np.count_nonzero((long > 12 * short) & (short < 0.6 * height)),
        "colons or dots": np.count_nonzero((long < 0.8 * height) & (short < height / 2)),
        "letters of spaced titles": count_spaced([polygons[n] for n in np.flatnonzero(single)]),
        "without ink": np.count_nonzero(contrast < np.median(contrast) / 4),
    }


def count_spaced(letters):
    """How many single characters stand in a row of three or more at equal gaps."""
    if len(letters) < 3:
        return 0
    label, following, gap = line_neighbours(letters)
    next_of = dict(zip(label, zip(following, gap)))  # {a letter: (the next one, gap to it)}
    spaced = set()
    for first, (second, gap) in next_of.items():
        third, next_gap = next_of.get(second, (None, 0))
        if min(gap, next_gap) > max(0.3, 0.7 * max(gap, next_gap)):
            spaced |= {first, second, third}
    return len(spaced)


def surplus(labels, others):
    """Outlines [P, 2] of labels, without those that the others have as well. An outline that comes
    twice is left once if the others have it once."""
    counts = Counter(tuple(polygon.round(4).flat) for polygon in labels)
    counts.subtract(tuple(polygon.round(4).flat) for polygon in others)
    return [np.reshape(points, (-1, 2)) for points in counts.elements()]


def page_changes(old, new):
    """How many labels of a page were added, removed and moved. Equal ones, which need not have an
    area or come in the same order, are none of these."""
    old, new = surplus(old, new), surplus(new, old)
    pairs = iou_matches(old, new).pairs
    moved = sum(len(old[i]) != len(new[j]) or np.abs(old[i] - new[j]).max() > 0.1 for i, j in pairs)
    return len(new) - len(pairs), len(old) - len(pairs), moved
