"""From a competition's own folder to a checked submission, each step as a user types it.

python tests/by_hand/competition.py [OUT] [--small]

Makes OUT/DATA (default: a temporary folder) of the full size: 3,272 + 404 + 413 pages, 382,462
words, `jsons/{train,val,test}.json` of over 300 MB with all the keys that such files have, test
pages without words, `images/{train,val,test}/`. Pictures are a few drawn receipts, each in a light
of its own, so that none counts as another's near-duplicate. Then it walks: check, train on all
pages, and on the first of them folds, the published report's sweep, --replay, --tune; the ensemble
on all val pages, a submission of all test pages, --validate. Networks are tiny: what is looked at
is whether a step works, its time and its memory. Prints a row a step, with the last line it said;
exit code 1 if one failed. About half an hour on two cores; --small: a few pages, under a minute.
"""

import contextlib
import json
import os
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import NETWORK, ROOT

import data
import pictures
from command import Parser

FULL = {"pages": {"train": 3272, "val": 404, "test": 413}, "words": 382_462, "kinds": 48}
FULL |= {"side": 640, "size": 160, "part": (32, 12, 5), "folds": 5}
FULL |= {"runs": 12, "epochs": 22, "min_iter": 10}
SMALL = {"pages": {"train": 24, "val": 8, "test": 8}, "words": 240, "kinds": 4, "side": 128}
SMALL |= {"size": 64, "part": (12, 4, 2), "folds": 2, "runs": 1, "epochs": 2, "min_iter": 1}
SWEEP = """program: train.py
method: bayes
metric: {{name: val/hmean, goal: maximize}}
parameters:
  models.optimizer.lr: {{distribution: log_uniform_values, min: 2.5e-4, max: 6e-4}}
  models.optimizer.weight_decay: {{distribution: log_uniform_values, min: 5e-5, max: 5e-4}}
  models.scheduler.T_max: {{values: [20, 22, 24]}}
  models.scheduler.eta_min: {{distribution: log_uniform_values, min: 5e-6, max: 5e-5}}
  models.head.postprocess.thresh: {{value: 0.29}}
  models.head.postprocess.box_thresh: {{value: 0.25}}
  models.head.postprocess.max_candidates: {{value: 600}}
  trainer.epochs: {{value: {epochs}}}
early_terminate: {{type: hyperband, min_iter: {min_iter}, eta: 2, s: 2}}
run_cap: {runs}
"""
WORD = {"orientation": "Horizontal", "language": ["ko"], "illegibility": False, "tags": ["auto"]}
LOG = {"worker": "worker", "timestamp": "2024-05-30", "tool_version": "", "source": None}
LICENCE = {"usability": True, "public": False, "commercial": True, "type": None, "holder": "nobody"}
REST = {"num_patches": None, "tags": ["autoannotated"], "relations": {}, "annotation_log": LOG}

# ---------------------------------------------------------------- the folder


def relight(image, rng):
    """uint8 [H, W, 3] in an uneven light, as a JPEG's bytes."""
    light = cv2.resize(rng.uniform(0.75, 1.1, (32, 32)).astype(np.float32), image.shape[1::-1])
    image = cv2.multiply(image, cv2.merge([light] * 3), dtype=cv2.CV_8U)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def page_entry(size, words, rng):
    """A page's entry with all keys; its digits are its own, as two receipts differ."""
    digits = str.maketrans(string.digits, "".join(rng.permutation([*string.digits])))
    entry = {"paragraphs": {}, "words": {}, "chars": {}, "img_w": size[0], "img_h": size[1]}
    for i, word in enumerate(words, 1):
        text = word["transcription"].translate(digits)
        entry["words"][f"{i:04d}"] = {"transcription": text, "points": word["points"], **WORD}
    return entry | REST | {"license_tag": LICENCE}


def make(out, part, plan):
    """The competition's folder `out`, `part` with its first pages, sample_submission.csv."""
    drawn, kinds, number, done = out.with_name("drawn"), [], 0, 0
    data.synth(drawn, plan["kinds"], 0, size=plan["side"], words=plan["side"] // 5)
    for split in ("train", "val"):
        for name, entry in json.loads((drawn / f"{split}.json").read_text())["images"].items():
            image = pictures.read_image(drawn / "images" / name)[..., ::-1]
            kinds.append((image, [*entry["words"].values()]))
    rng = np.random.default_rng(0)
    labelled = plan["pages"]["train"] + plan["pages"]["val"]
    for (split, count), some in zip(plan["pages"].items(), plan["part"]):
        images = {}
        (out / "images" / split).mkdir(parents=True)
        for _ in range(count):
            name, (image, words) = f"page_{number:06d}.jpg", kinds[number % len(kinds)]
            number += 1
            words = words[: number * plan["words"] // labelled - done] if split != "test" else []
            done += len(words)
            (out / "images" / split / name).write_bytes(relight(image, rng))
            images[name] = page_entry(image.shape[1::-1], words, rng)
        for folder, pages in ((out, images), (part, dict([*images.items()][:some]))):
            (folder / "jsons").mkdir(parents=True, exist_ok=True)
            with open(folder / "jsons" / f"{split}.json", "w", encoding="utf-8") as file:
                json.dump({"images": pages}, file, ensure_ascii=False, indent=4)
    (part / "images").symlink_to(out / "images")
    lines = ["filename,polygons", *(f"{name}," for name in images)]
    out.with_name("sample_submission.csv").write_text("\n".join([*lines, ""]))
    size = sum(path.stat().st_size for path in (out / "jsons").iterdir()) / 1e6
    print(f"{out}: {number} pages, {done} words, {size:.0f} MB of JSON", flush=True)


# ---------------------------------------------------------------- the walk


def family(root):
    """Process ids of a process and all below it."""
    found = [root]
    for pid in found:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended
                found += map(int, path.read_text().split())
    return found


def memory(pid):
    """(its share of memory, its peak) of a process in MiB; zeros when it has ended."""
    try:
        texts = [Path(f"/proc/{pid}/{name}").read_text() for name in ("smaps_rollup", "status")]
        lines = [line.split() for line in "\n".join(texts).splitlines()]
        found = {words[0]: int(words[1]) >> 10 for words in lines if words[-1:] == ["kB"]}
        return found["Pss:"], found["VmHWM:"]
    except (OSError, KeyError):
        return 0, 0


def step(name, command, folder, accepted=(0,)):
    """Run a command in a folder and print its row: whether its exit code is an accepted one."""
    begin, together, peaks = time.monotonic(), 0, {}
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(folder / f"{name}.log", "wb+") as log:
        words = [sys.executable, ROOT / command[0], *map(str, command[1:])]
        process = subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=log)
        while process.poll() is None:
            found = {pid: memory(pid) for pid in family(process.pid)}
            together = max(together, sum(share for share, _ in found.values()))
            peaks |= {pid: peak for pid, (_, peak) in found.items() if peak}
            time.sleep(0.4)
        log.seek(0)
        said = log.read().decode(errors="replace").split("\n")
    ok, (first, second) = process.returncode in accepted, [*sorted(peaks.values())[::-1], 0, 0][:2]
    row = f"{name:10s} {time.monotonic() - begin:7.1f} s {together:6d} {first:6d} {second:6d} MiB"
    last = next((line.split("\r")[-1] for line in said[::-1] if line.strip()), "")
    print(f"{row}  {'' if ok else f'FAILED {process.returncode}: '}{last[:100]}", flush=True)
    return ok


def walk(folder, plan):
    """All steps; returns whether each worked."""
    whole = [*NETWORK, "--data=DATA", "--size=96", "--batch=16", "--workers=2"]
    part = [*NETWORK, "--data=PART", f"--size={plan['size']}", "--batch=4"]
    length = [f"--epochs={plan['epochs']}", f"--T_max={plan['epochs']}", "--lr=3e-3"]
    folds = [f"--folds={plan['folds']}", "--fold=all", "--name=r8"]
    runs = [f"runs/r8-fold{k}/last.pt" for k in range(1, plan["folds"] + 1)]
    voting, files = ["--hparams=tuned.json", "--data=DATA"], "--submission=out.csv"
    (folder / "report.yaml").write_text(SWEEP.format(**plan))
    steps = {
        "check": ["data.py", "check", "DATA"],
        "train": ["train.py", *whole, "--epochs=1", "--T_max=1", "--name=whole"],
        "folds": ["train.py", *part, *length, *folds],
        "sweep": ["sweep.py", "report.yaml", *part, f"--init={runs[0]}"],
        "report": ["sweep.py", "--report", "runs/report", "--html", "sweep.html"],
        "replay": ["sweep.py", "--replay", "runs/report"],
        "tune": ["evaluate.py", *runs, "--tune", "--write", "tuned.json"],
        "ensemble": ["ensemble.py", *voting],
        "submission": ["ensemble.py", *voting, "--sample=sample_submission.csv", files],
        "validate": ["ensemble.py", "--validate", "out.csv", "--data=DATA", "--allow-empty"],
    }
    print("step            time  all at once, largest, next  last line", flush=True)
    may_fail = {"ensemble": (0, 5)}  # 5: not shown to be better than the best member
    return [step(name, words, folder, may_fail.get(name, (0,))) for name, words in steps.items()]


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, help="folder to work in, and to keep")
    parser.add_argument("--small", action="store_true", help="a few pages and two short trials")
    args = parser.parse_args(argv)
    plan = SMALL if args.small else FULL
    with tempfile.TemporaryDirectory(prefix="competition-") as temporary:
        folder = (args.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        make(folder / "DATA", folder / "PART", plan)
        print(f"made in {time.monotonic() - begin:.0f} s", flush=True)
        return 0 if all(walk(folder, plan)) else 1


if __name__ == "__main__":
    sys.exit(main())
