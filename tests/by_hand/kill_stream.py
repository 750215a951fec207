"""SIGKILLs at random moments over a prediction that writes a .jsonl file, always repeated.

python tests/by_hand/kill_stream.py [--pages 2000] [--kills 10] [--seed 0]

Real processes of evaluate.py with a tiny network on drawn pictures. The lines must be those of a
run that nothing disturbed, none twice; so must be those of four shards that ran side by side.
Prints the peak memory of runs over 100 pages and over all. Exit code 1 on any difference.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT

from command import Parser
from dbnet import DBNet, save_checkpoint
from hparams import Hparams

HP = Hparams(backbone="mobilenetv3_small_050", neck=16, size=96, thresh=0.1, box_thresh=0.0)


def start(out, *flags, images="pictures"):
    command = [sys.executable, ROOT / "evaluate.py", "a.pt", "--device=cpu", "--engine=torch"]
    log = open("log.txt", "ab")  # noqa: SIM115 (the process writes it)
    flags = [f"--images={images}", f"--out={out}", *flags]
    return subprocess.Popen([*command, *flags], stdout=log, stderr=log)


def finish(process):
    """Peak memory of a process in MiB; it must end well."""
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, Path("log.txt").read_text()[-500:]
    return usage.ru_maxrss / 1024


def lines(*paths):
    """Sorted lines of pages, without the first one of each file."""
    return sorted(line for path in paths for line in Path(path).read_text().splitlines()[1:])


def draw(folder, count):
    Path(folder).mkdir()
    rng = np.random.default_rng(0)
    for n in range(count):
        height, width = rng.integers(40, 130, 2)
        picture = rng.integers(0, 255, (height, width, 3), np.uint8)
        cv2.imwrite(f"{folder}/{n:05d}.png", picture)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--pages", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        draw("few", 100)
        draw("pictures", args.pages)
        torch.manual_seed(0)
        state = {"model": DBNet(HP.backbone, HP.neck).state_dict(), "hparams": asdict(HP)}
        save_checkpoint("a.pt", state)

        few = finish(start("few.jsonl", images="few"))
        begin = time.monotonic()
        many = finish(start("calm.jsonl"))
        seconds = time.monotonic() - begin
        print(
            f"peak memory: 100 pages {few:.0f} MiB, {args.pages} pages {many:.0f} MiB", flush=True
        )
        calm = lines("calm.jsonl")
        assert len(calm) == len({*calm}) == args.pages

        counts = []
        while len(counts) < args.kills:
            process = start("killed.jsonl")
            time.sleep(rng.uniform(0.2, 0.5) * seconds)
            process.kill()
            if process.wait() == 0:
                Path("killed.jsonl").unlink()  # it was ready: anew
                continue
            there = Path("killed.jsonl").exists()
            counts.append(Path("killed.jsonl").read_bytes().count(b"\n") if there else 0)
        finish(start("killed.jsonl"))
        print(f"{args.kills} kills, lines in the file after each: {counts}", flush=True)

        shards = [start(f"{k}.jsonl", f"--shard={k}/4") for k in (1, 2, 3, 4)]
        for process in shards:
            finish(process)
        same = lines("killed.jsonl") == calm == lines("1.jsonl", "2.jsonl", "3.jsonl", "4.jsonl")
        print("lines of killed runs and of four shards: " + ("equal" if same else "DIFFERENT"))
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
