"""Random files and random geometry.

python tests/by_hand/fuzz.py [TARGET ...] [--minutes 10] [--seed 0]

Readers (labels in every format, pictures, hparams, sweep files, submissions) may raise nothing but
an error of ours; decoding, metric and voting may raise nothing, give no NaN, and keep what must
hold. Prints executions, how many of them the reader took, and seconds per target; a target ends at
its first failure, with the smallest input that shows it, and the exit code is 1.
"""

import dataclasses
import io
import json
import operator
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import cv2
import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import write_picture

import cleval
import data
import db_postprocess
import ensemble
import files
import formats
import hparams
import labels
import space
import sweep
from command import Parser
from pictures import read_image

HELD = tempfile.TemporaryDirectory(prefix="fuzz-")  # goes when the process ends
FOLDER = Path(HELD.name)
SIZES = {"a.png": (80, 60), "b.jpg": (80, 60)}  # width, height
for picture, (width, height) in SIZES.items():
    write_picture(FOLDER, picture, (height, width))

# ---------------------------------------------------------------- readers

odd = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
odd |= st.sampled_from([10**400, -1, 1e308, "###", "a.png", "../a.png", "\ud800", "\0", "a\nb"])


def nested(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)


anything = st.recursive(odd, nested, max_leaves=12)


def mostly(strategy, other=anything):
    """Nine values in ten as they should be, so that the input gets past the first check."""
    return st.integers(0, 9).flatmap(lambda n: strategy if n else other)


def objects(**fields):
    """Objects with these optional fields, and seldom another."""
    known = st.fixed_dictionaries({}, optional={k: mostly(v) for k, v in fields.items()})
    other = mostly(st.just({}), st.dictionaries(st.text(max_size=5), odd))
    return st.builds(operator.or_, known, other)


number = mostly(st.floats(-100, 200, width=16), odd)
points = st.lists(mostly(st.lists(number, min_size=2, max_size=2)), min_size=2, max_size=9)
flag, chars, side = st.booleans(), st.text(max_size=6), st.integers(1, 99)
names = mostly(st.sampled_from(["a.png", "b.jpg"]), st.text(max_size=9))
words = objects(points=points, transcription=chars, ignore=flag, confidence=st.floats(0, 1))
words = st.dictionaries(chars, mostly(words), max_size=4)
entries = objects(words=words, img_w=side, img_h=side, group=chars)
competition = objects(images=st.dictionaries(names.map(str), mostly(entries), max_size=3))
paddle_word = objects(points=points, transcription=chars, difficult=flag)
paddle_line = st.tuples(names, mostly(st.lists(paddle_word, max_size=3)))
kinds, share = st.sampled_from(["polygon", "rectangle"]), st.floats(0, 1)
shape = {"points": points, "shape_type": kinds, "confidence": share}
shape |= {"flags": objects(ignore=flag), "label": chars, "description": chars, "id": chars}
sheet = {"shapes": st.lists(mostly(objects(**shape)), max_size=3), "imagePath": names}
sheet = objects(**sheet, imageWidth=side, imageHeight=side, version=chars)
icdar_text = st.one_of(chars, chars.map('"{}"'.format), st.just("1,024.50"))
marks, values = (
    st.sampled_from([",", ", ", " "]),
    st.lists(number.map(str), min_size=4, max_size=14),
)
icdar_line = st.builds(lambda mark, v, text: mark.join([*v, text]), marks, values, icdar_text)


@st.composite
def label_file(draw):
    """(file name, bytes) of a label file in one of the formats; one in ten with bytes broken."""
    kind = draw(st.sampled_from(["train.json", "Label.txt", "gt_a.txt", "b.txt", "sheet.json"]))
    if kind in ("gt_a.txt", "b.txt"):
        text = "\n".join(draw(st.lists(mostly(icdar_line, chars), max_size=5)))
    elif kind == "Label.txt":
        lines = draw(st.lists(paddle_line, max_size=3))
        text = "\n".join(f"{name}\t{json.dumps(words)}" for name, words in lines)
    else:
        text = json.dumps(draw(mostly(competition if kind == "train.json" else sheet)))
    return kind, draw(broken(text))


def broken(text):
    """The text's bytes, one in ten with a few of them replaced or cut."""
    raw = text.encode("utf-8", "surrogatepass")
    return mostly(st.just(raw), spoilt(raw))


def spoilt(raw):
    """Bytes with a few of them replaced or cut."""

    def spoil(edit):
        at, more, length = edit
        return raw[: at % (len(raw) + 1)] + more + raw[at % (len(raw) + 1) + length :]

    return st.tuples(st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 9)).map(spoil)


def written(name, raw):
    (FOLDER / name).write_bytes(raw)
    return FOLDER / name


def read_labels(case):
    for old in [*FOLDER.glob("*.json"), *FOLDER.glob("*.txt")]:
        old.unlink()
    written(*case)
    return labels.load_labels(FOLDER, "train")


def check_labels(pages):
    data.inspect_pages(pages)
    for page in pages:
        assert page.path.resolve().is_relative_to(FOLDER.resolve())
        polygons, ignore, _ = data.repair_words(page)
        assert all(np.isfinite(polygon).all() for polygon in polygons)
        maps = data.make_targets(polygons, ignore, 64, 96)
        assert maps.shape == (4, 64, 96) and maps[[0, 2, 3]].max() <= 1
    files.write_json(FOLDER / "train.json", formats.pages_to_json(pages))
    again = labels.load_labels(FOLDER / "train.json")
    assert [p.texts for p in again] == [p.texts for p in pages]
    assert [p.ignore for p in again] == [p.ignore for p in pages]


SUFFIXES = [".jpg", ".png", ".bmp", ".webp", ".tif"]
PICTURES = [cv2.imencode(s, np.full((9, 20, 3), 200, np.uint8))[1].tobytes() for s in SUFFIXES]


def read_picture(raw):
    return raw, read_image(written("picture", raw))


def check_picture(case):
    raw, image = case
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert sorted(image.shape[:2]) == sorted(Image.open(io.BytesIO(raw)).size)


hparams_file = st.dictionaries(
    mostly(st.sampled_from(sorted(hparams.FIELDS)), st.text(max_size=6)), odd | anything, max_size=5
)


def read_hparams(raw):
    values = hparams.read_hparams(written("hparams", raw))
    return hparams.validate(hparams.Hparams(**values))


def check_hparams(hp):
    shown = json.dumps(dataclasses.asdict(hp), allow_nan=False)
    assert read_hparams(shown.encode()) == hp


laws = st.sampled_from(["uniform", "log_uniform_values", "int_uniform", "normal"])
dimension = {"value": odd, "values": st.lists(odd, max_size=3), "distribution": laws}
dimension |= dict.fromkeys(("min", "max", "mu", "sigma", "q"), number)
low, high = st.floats(1e-6, 1e-3), st.floats(1e-2, 1)
sound = st.fixed_dictionaries({"min": low, "max": high}) | st.fixed_dictionaries({"value": low})
parameter = mostly(st.sampled_from(["lr", "weight_decay", "eta_min"]), chars)
parameters = st.dictionaries(parameter, sound | mostly(objects(**dimension)), min_size=1)
goals = st.sampled_from(["maximize", "minimize"])
methods, rules = st.sampled_from(["bayes", "grid"]), st.sampled_from(["hyperband", "pause"])
spec_file = st.builds(
    operator.or_,
    st.fixed_dictionaries({"method": mostly(methods), "parameters": mostly(parameters)}),
    objects(
        metric=st.fixed_dictionaries({"name": chars, "goal": goals}),
        early_terminate=objects(type=rules, min_iter=number, eta=number, s=number),
        run_cap=st.integers(1, 9),
        seed=st.integers(0, 9),
    ),
)


def read_sweep(raw):
    return space.Cube(space.parse_space(sweep.load_spec(written("spec", raw))))


def check_sweep(cube):
    """A point of the cube has a value of every hyperparameter."""
    values = cube.decode(np.full(len(cube.free), 0.5))
    assert values and json.dumps(values, allow_nan=False)


cell = mostly(st.integers(0, 60), st.integers(-9, 90) | odd).map(str)
region = st.sampled_from([8, 8, 10, 12, 7, 2]).flatmap(
    lambda count: st.lists(cell, min_size=count, max_size=count).map(" ".join)
)
row = st.tuples(names.map(str), st.lists(region, max_size=4).map("|".join))


@st.composite
def table(draw):
    lines = [draw(mostly(st.just("filename,polygons"), chars))]
    lines += [",".join(cells) for cells in draw(st.lists(row, max_size=4))]
    return draw(broken("\n".join(lines) + draw(mostly(st.just("\n"), chars))))


def read_csv(raw):
    regions, problems = ensemble.read_submission(written("out.csv", raw), list(SIZES), SIZES, False)
    assert all(isinstance(problem, str) and problem for problem in problems)
    if not any(regions.values()):
        raise files.DataError("out.csv", "no region")
    return regions


def check_csv(regions):
    for name, polygons in regions.items():
        for polygon in polygons if name in SIZES else ():
            assert np.issubdtype(polygon.dtype, np.integer) and len(polygon) >= 4
            assert (polygon >= 0).all() and (polygon <= SIZES[name]).all()


# ---------------------------------------------------------------- geometry

coordinate = st.floats(-30, 130, width=32) | st.integers(-30, 130).map(float)
coordinate |= st.sampled_from([0.0, 50.0, 100.0])
polygon = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=9).map(np.array)
quad = st.tuples(coordinate, coordinate, st.floats(0, 60), st.floats(0, 40), st.floats(-4, 4)).map(
    lambda rect: db_postprocess.rect_corners(np.array([rect]))[0]
)
polygons = st.lists(quad | polygon, max_size=6)


def check_metric(case):
    """H in 0..1; the order of detections and of labels does not matter; a page against itself."""
    gt, det, ignore, seed = case
    ignore = (ignore + [False] * 6)[: len(gt)]
    order = np.random.default_rng(seed).permutation(len(det))
    for variant in ("page", "official"):
        counts = cleval.cleval(gt, det, ignore=ignore, variant=variant)
        values = [counts[key] for key in ("precision", "recall", "hmean")]
        assert all(0 <= value <= 1 for value in values), counts
        turned = cleval.cleval(gt, [det[i] for i in order], ignore=ignore, variant=variant)
        assert turned == counts, (counts, turned)
    n, m, tp, *counts = cleval.iou50(gt, det, ignore)
    assert 0 <= tp <= min(n, m) and n == len(gt) - sum(ignore) and m <= len(det)
    assert n == sum(counts[3:8]) and counts[3] == tp
    assert cleval.iou50(det, gt)[2] == cleval.iou50(gt, det)[2] or len(gt) > 1 and len(det) > 1
    boxes = [cv2.minAreaRect(np.float32(points)) for points in gt]
    boxes = [cv2.boxPoints(box).astype(float) for box in boxes if min(box[1]) > 5]
    sides = [np.linalg.norm(box[1] - box[0]) > np.linalg.norm(box[2] - box[1]) for box in boxes]
    boxes = [box if wide else np.roll(box, 1, 0) for box, wide in zip(boxes, sides)]  # along text
    apart = [box + (500 * i, 0) for i, box in enumerate(boxes)]
    if apart:
        assert cleval.cleval(apart, apart)["hmean"] == 1
        assert cleval.iou50(apart, apart)[2] == len(apart)


def check_decode(case):
    """Boxes are finite, scores fall within 0..1, at most as many as asked for."""
    seed, size, blur, thresh, box_thresh, unclip, min_size, count = case
    rng = np.random.default_rng(seed)
    prob = rng.random(size, np.float32)
    prob = cv2.GaussianBlur(prob, (0, 0), blur) if blur else prob
    prob = np.clip((prob - prob.min()) / max(np.ptp(prob), 1e-6), 0, 1).astype(np.float32)
    candidates = db_postprocess.find_candidates(prob, thresh)
    for mode in ("box", "polygon"):
        how = {"unclip_ratio": unclip, "max_candidates": count, "min_size": min_size, "mode": mode}
        decode = partial(db_postprocess.decode_candidates, candidates, **how)
        found, scores = decode(box_thresh=box_thresh)
        assert len(found) == len(scores) <= count
        assert all(np.isfinite(p).all() and p.ndim == 2 and len(p) >= 3 for p in found)
        assert all(box_thresh - 1e-6 <= score <= 1 + 1e-6 for score in scores)
        fewer, _ = decode(box_thresh=min(box_thresh + 0.2, 1))
        assert len(fewer) <= len(found)


def check_voting(case):
    """Confidences in 0..1, falling; regions that a member has; the members' order is the same."""
    members, threshold, seed = case
    rng = np.random.default_rng(seed)
    members = [(found, rng.random(len(found)).round(3)) for found in members]
    order = rng.permutation(len(members))
    found, confidences = ensemble.vote(members, [1.0] * len(members), threshold)
    assert (np.diff(confidences) <= 1e-9).all() and ((confidences >= 0) & (confidences <= 1)).all()
    known = {str(ensemble.canonical(np.asarray(p, float)).tolist()) for m, _ in members for p in m}
    assert all(str(region.tolist()) in known for region in found)
    assert threshold > 1 or len(members) > 1 or len(found) == len(members[0][0])
    again = ensemble.vote([members[i] for i in order], [1.0] * len(members), threshold)
    assert str([p.tolist() for p in found]) == str([p.tolist() for p in again[0]])


metric_case = st.tuples(polygons, polygons, st.lists(flag, max_size=6), st.integers(0, 99))
size = st.tuples(st.integers(1, 90), st.integers(1, 90))
blur, thresholds = st.sampled_from([0, 1, 3, 8]), (st.floats(0.05, 0.95), st.floats(0, 0.9))
limits = st.floats(0, 4), st.floats(0, 9), st.integers(1, 300)  # unclip_ratio, min_size, count
decode_case = st.tuples(st.integers(0, 10**6), size, blur, *thresholds, *limits)
members = st.lists(polygons, min_size=1, max_size=4)
pictures = st.sampled_from(PICTURES).flatmap(spoilt).flatmap(spoilt)
TARGETS = {  # what comes, what reads it, what must hold of what was read
    "labels": (label_file(), read_labels, check_labels),
    "pictures": (pictures, read_picture, check_picture),
    "hparams": (mostly(hparams_file).map(json.dumps).flatmap(broken), read_hparams, check_hparams),
    "sweep": (mostly(spec_file).map(json.dumps).flatmap(broken), read_sweep, check_sweep),
    "csv": (table(), read_csv, check_csv),
    "metric": (metric_case, None, check_metric),
    "decode": (decode_case, None, check_decode),
    "voting": (st.tuples(members, st.integers(1, 4), st.integers(0, 99)), None, check_voting),
}


def fuzz(target, seconds, seed=0, phases=(Phase.generate, Phase.shrink)):
    """Executions of a target within seconds and how many of them were read and checked; raises
    what it found, hypothesis having shrunk it."""
    strategy, read, check = TARGETS[target]
    end, count, through = time.monotonic() + seconds, 0, 0

    def counted(case):
        nonlocal count, through
        count += 1
        if read is not None:
            try:
                case = read(case)
            except files.DataError as error:
                assert not files.CONTROL.search(str(error)), ascii(str(error))
                return
        check(case)
        through += 1

    examples = min(100, max(20, int(20 * seconds)))
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    once = settings(max_examples=examples, phases=phases, **quiet)
    while not count or time.monotonic() < end:  # each round of examples has a seed of its own
        seed += 1
        hypothesis.seed(seed)(once(given(strategy)(lambda case: counted(case))))()
    return count, through


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], default=[])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args, failed = parser.parse_args(), False
    targets = args.targets or list(TARGETS)
    for target in targets:
        start = time.monotonic()
        try:
            count, through = fuzz(target, 60 * args.minutes / len(targets), args.seed)
            said = f"{count} executions, {through} read and checked, nothing found"
        except Exception:  # noqa: BLE001 -- whatever the code under test raises is a finding
            said, failed = traceback.format_exc(), True
        print(f"{target:8s} {time.monotonic() - start:6.1f} s  {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
