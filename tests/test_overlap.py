"""Areas that polygons share, against shapely."""

import numpy as np
import shapely
from test_cleval import box

import overlap


def test_overlap_equals_shapely():
    rng, polygons = np.random.default_rng(0), []
    for count in rng.integers(3, 12, 60):
        angle, radius = np.sort(rng.random(count)) * 2 * np.pi, rng.uniform(5, 40, count)
        ray = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        polygons.append(rng.uniform(0, 60, 2) + ray)
    polygons += [box(10, 10, 30, 20), box(10, 10, 30, 20), box(20, 10, 5, 20)]  # shared edges
    polygons += [rng.uniform(0, 60, (7, 2)) for _ in range(10)]  # crossed
    areas = overlap.to_shapely(overlap.as_points(polygons))
    areas[0] = shapely.difference(areas[60], shapely.box(15, 15, 20, 20))  # with a hole
    areas[1] = shapely.union_all([shapely.box(0, 0, 9, 9), shapely.box(30, 30, 50, 44)])
    shapes = overlap.make_shapes(areas)
    i, j = (index.ravel() for index in np.indices((len(areas), len(areas))))
    expected = shapely.area(shapely.intersection(areas[i], areas[j]))
    assert np.allclose(overlap.overlap_area(shapes, i, shapes, j), expected, atol=1e-7)
