"""Do all engines make the maps that PyTorch makes in float32?

python tests/by_hand/maps.py DATA

Twenty pages of DATA's val split in twelve shapes, by the shipped weights and by random networks of
other kinds. Each row is an engine and a number type: mean and largest difference of probabilities,
and the share of pixels on the other side of the threshold 0.25.
"""

import sys
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT
from test_engine import random_network

import labels
import pictures
import sources
from command import Parser
from engine import Runtime, launch, load_engine
from folding import network_of

CPU = torch.device("cpu")
ROWS = ("torch", "bf16"), ("onnxruntime", "off"), ("openvino", "off"), ("openvino", "bf16")
SHAPES = [(height, width) for height in (448, 640, 896, 1120) for width in (320, 416, 608)]
BACKBONES = "tf_efficientnet_b4", "mobilenetv3_large_100", "convnext_tiny"


def shipped():
    source = sources.load_source(str(ROOT / "weights/receipts-lite2.pt"))
    return network_of(source.state, source.path, CPU)


def print_rows(name, model, pages):
    expected = [launch(model, page, "off", CPU)().numpy() for page in pages]
    for engine, amp in ROWS:
        run = load_engine(Runtime(CPU, engine, amp), f"maps-{name}", lambda: model)
        differences, crossed = [], []
        for page, truth in zip(pages, expected):
            maps = launch(run, page, amp, CPU)().numpy()
            differences.append(np.abs(maps.astype(float) - truth).ravel() / 255)
            crossed.append(((maps > 63) != (truth > 63)).ravel())
        difference = np.concatenate(differences)
        share = np.concatenate(crossed).mean()
        type_name = amp.replace("off", "float32")
        row = f"{difference.mean():.5f} {difference.max():.3f} {share:.6f}"
        print(f"{name:22s} {engine:11s} {type_name:7s} {row}", flush=True)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("data")
    args = parser.parse_args()
    batches = []
    for n, page in enumerate(labels.load_labels(args.data, "val")[:20]):
        height, width = SHAPES[n % len(SHAPES)]
        image = pictures.read_image(page.path)
        batches.append(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)[None])
    print("network                engine      type    mean    largest across 0.25")
    print_rows("receipts-lite2.pt", shipped(), batches)
    for backbone in BACKBONES:
        print_rows(backbone, random_network(backbone), batches)


if __name__ == "__main__":
    main()
