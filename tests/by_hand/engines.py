"""How fast evaluate.py predicts on a CPU: engines, number types and sizes beside RapidOCR.

python tests/by_hand/engines.py DATA [--threads 2] [--sizes 704 832 960 auto] [--weights FILE]

Each row is a process of its own that reads the pictures of DATA's val split and writes a file of
predictions, as a user would run it: pages a second over the whole process, net of its start (by a
second process that reads one picture), and net by the processor's time, which other work on the
machine changes little; then the scores of what it wrote. Some eight minutes on two idle cores.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT

import evaluate
import labels
from command import Parser

ROWS = ("torch", "off"), ("torch", "bf16"), ("onnxruntime", None)
ROWS += ("openvino", "off"), ("openvino", "bf16")


def timed(script, *words, threads):
    """(seconds, those of the processor) of a script of the root in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    begin, spent = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, ROOT / script, *map(str, words)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
    return np.array([time.perf_counter() - begin, work])


def print_row(label, count, whole, start, shown):
    """A row of rates. whole, start: seconds of the processes of all pages and of one, see timed."""
    rates = count / whole[0], *(count - 1) / (whole - start)
    print(label, *(f"{rate:6.2f}" for rate in rates), shown, flush=True)


def scores(path, data):
    """hmean, official CLEval and IoU 0.5 of a file of predictions, as text."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert evaluate.main([path, "--data", data, "--json"]) == 0
    result = json.loads(out.getvalue())
    values = result["hmean"], result["micro"]["hmean"], result["iou50"]["hmean"]
    return " ".join(f"{value:.4f}" for value in values)


def copy_pictures(folder, pages):
    for page in pages:
        path = folder / page.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page.path, path)


def labels_of(folder, pages):
    """A label file of pages whose pictures lie in folder/images."""
    path = folder / "one.json"
    path.write_text(json.dumps({"images": {page.name: {"words": {}} for page in pages}}))
    copy_pictures(folder / "images", pages)
    return path


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["704", "832", "960", "auto"])
    parser.add_argument("--weights", default=str(ROOT / "weights/receipts-lite2.pt"))
    args = parser.parse_args()
    pages = labels.load_labels(args.data, "val")
    with tempfile.TemporaryDirectory() as place:
        whole, one, out = (Path(place, name) for name in ("whole", "one", "found.json"))
        copy_pictures(whole, pages)
        copy_pictures(one, pages[:1])
        count = len(pages)
        print(f"{count} pages, {args.threads} threads; pages a second")
        print("engine      type  size  whole    net    cpu hmean official iou50", flush=True)

        peer = "tests/by_hand/peers.py", "rapidocr-onnxruntime"
        lonely = labels_of(Path(place), pages[:1])
        start = timed(*peer, lonely, out, threads=args.threads)
        seconds = timed(*peer, args.data, out, threads=args.threads)
        print_row("RapidOCR             ", count, seconds, start, scores(str(out), args.data))

        for size in args.sizes:
            for engine, amp in ROWS:
                flags = ["--size", size, "--engine", engine, "--device", "cpu", "--out", out]
                if amp:
                    flags += ["--amp", amp]
                command = [args.weights, *flags, "--images"]
                if engine == "openvino":
                    timed("evaluate.py", *command, one, threads=args.threads)  # fills its cache
                start = timed("evaluate.py", *command, one, threads=args.threads)
                seconds = timed("evaluate.py", *command, whole, threads=args.threads)
                label = f"{engine:11s} {amp or 'off':4s} {size:>5s}"
                print_row(label, count, seconds, start, scores(str(out), args.data))


if __name__ == "__main__":
    main()
