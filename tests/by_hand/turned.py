"""How well boxes and polygons fit words that are turned.

python tests/by_hand/turned.py

Draws the shrink maps of rectangular words at random places: a pixel belongs to a word if its centre
does. Prints for each angle the mean IoU of what is decoded with the exact unclip, and the mean of
its area divided by the word's.
"""

import sys
from pathlib import Path

import numpy as np
import shapely

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from db_postprocess import MODES, grown_sides, polygons_from_map, rect_corners

ANGLES = (0, 0.5, 1, 2, 4, 8, 15, 22.5, 30, 45)  # degrees


def draw_word(rng, degrees):
    """A word's shrunk map uint8 [h, w], 3 to 12 px high and 1 to 20 times as wide, and the word as
    [4, 2], map px."""
    height = rng.uniform(3, 12)
    width = height * 20 ** rng.random()
    side = int(np.hypot(width, height)) + 4
    x, y = side / 2 + rng.uniform(-0.5, 0.5, 2)
    shrunk = np.array([[x, y, width, height, np.deg2rad(degrees)]])

    # pixel centres in the word's own axes
    rows, columns = np.indices((side, side)) + 0.5
    cos, sin = np.cos(shrunk[0, 4]), np.sin(shrunk[0, 4])
    along = (columns - x) * cos + (rows - y) * sin
    across = (rows - y) * cos - (columns - x) * sin
    prob = (abs(along) <= width / 2) & (abs(across) <= height / 2)

    word = shrunk.copy()
    word[:, 2:4] = grown_sides(shrunk, unclip_ratio=0, shrink_ratio=0.4)
    return np.uint8(prob) * 255, rect_corners(word)[0]


def fit_of_words(mode, degrees, count=200, seed=0):
    """Mean IoU and mean ratio of areas of `count` decoded words, turned by some degrees."""
    rng = np.random.default_rng(seed)
    fits = []
    for _ in range(count):
        prob, word = draw_word(rng, degrees)
        (polygon, *_), _ = polygons_from_map(
            prob,
            thresh=0.5,
            box_thresh=0,
            unclip_ratio=0,
            max_candidates=9,
            min_size=0,
            mode=mode,
        )
        decoded, exact = shapely.Polygon(polygon), shapely.Polygon(word)
        shared = decoded.intersection(exact).area
        fits.append((shared / decoded.union(exact).area, decoded.area / exact.area))
    return np.mean(fits, 0)


if __name__ == "__main__":
    print("degrees" + "".join(f"{mode:>12} IoU   area" for mode in MODES))
    for degrees in ANGLES:
        fits = [fit_of_words(mode, degrees) for mode in MODES]
        print(f"{degrees:7}" + "".join(f"{iou:16.3f}{area:7.3f}" for iou, area in fits))
