"""What other detectors find on labelled pages, as a user would run them.

python tests/by_hand/peers.py PEER DATA OUT.json

PEER is rapidocr-onnxruntime (1.4.4: PP-OCRv4 mobile), rapidocr (3.10: PP-OCRv6 small) or tesseract
(lines of page segmentation mode 11). OUT.json is in the form of evaluate.py's predictions, so the
same metric judges it:

python evaluate.py OUT.json --data DATA
python evaluate.py best.pt --data DATA --compare OUT.json
"""

import csv
import importlib
import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data
import labels
import pictures
from command import Parser
from predictions import write_predictions

DETECTION_ONLY = {"use_det": True, "use_cls": False, "use_rec": False}


def rapidocr(name):
    engine = importlib.import_module(name.replace("-", "_")).RapidOCR()

    def detect(page):
        image = page.path
        if not isinstance(image, np.ndarray):
            image = pictures.read_image(page.path)
        found = engine(image[..., ::-1], **DETECTION_ONLY)
        boxes = found[0] if isinstance(found, tuple) else found.boxes  # 1.4, 3
        return [] if boxes is None else boxes

    return detect


def tesseract(_):
    def detect(page):
        command = ["tesseract", str(page.path), "-", "--psm", "11", "tsv"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
        place = ("page_num", "block_num", "par_num", "line_num")
        read = {tuple(r[k] for k in place) for r in rows if r["level"] == "5" and r["text"].strip()}
        lines = [r for r in rows if r["level"] == "4" and tuple(r[k] for k in place) in read]
        boxes = [[int(r[k]) for k in ("left", "top", "width", "height")] for r in lines]
        return [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes]

    return detect


PEERS = {"rapidocr-onnxruntime": rapidocr, "rapidocr": rapidocr, "tesseract": tesseract}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("data", help="folder or label file")
    parser.add_argument("out", help="predictions.json to write")
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    pages = labels.load_labels(args.data, args.split)
    detect, found, begin = PEERS[args.peer](args.peer), [], time.perf_counter()
    for page in tqdm(pages, disable=not sys.stderr.isatty()):
        boxes = [np.array(box, float) for box in detect(page)]
        found.append((boxes, np.ones(len(boxes))))
    seconds = time.perf_counter() - begin
    data.inspect_pages(pages)
    write_predictions(args.out, pages, found)
    print(f"{args.peer}: {len(pages)} pages, {len(pages) / seconds:.2f} images/s, {args.out}")


if __name__ == "__main__":
    main()
