"""Would static int8 be worth an engine? Its speed and maps beside those of bf16 on a CPU.

python tests/by_hand/int8.py DATA [--pages 20] [--size 704]

Quantises the shipped network by 12 pages of DATA's train split: with onnxruntime (MinMax, a scale
for each channel of the weights) and, where nncf is installed, with NNCF (symmetric, since OpenVINO
2026.4 crashes on asymmetric activations). A row for each engine on pages of the val split, one
thread: pages a second of the processor's time, the network alone, its code for each shape made
before, in three rounds that take turns; mean and largest difference of probabilities to float32;
hmean, official CLEval, IoU 0.5.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from engines import copy_pictures, scores

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT

import labels
import sources
from command import Parser
from engine import Compiled, Runtime, find_package, load_engine, onnx_graph, openvino_core
from folding import network_of
from formats import pages_to_json
from predict import Network, predict, predict_each
from predictions import write_predictions

CPU = torch.device("cpu")
CALIBRATED_BY = 12  # pages
ROUNDS = 3


def network_inputs(pages, hp):
    """What a network is given of pages, uint8 [1, H, W, 3] each."""
    batches = []

    def keep(batch):
        batches.append(batch)
        return torch.zeros(1, 1, *batch.shape[1:3])

    for _ in predict_each([Network(keep, hp)], pages, CPU, lambda page, maps: None):
        pass
    return batches


class Calibration:
    """Pages in the form in which onnxruntime's quantiser takes them."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"pages": as_floats(batch)}


def as_floats(batch):
    return (batch.permute(0, 3, 1, 2) / 255).contiguous().numpy()


def quantise_onnx(exact, path, batches):
    """Write the int8 form of an ONNX model."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(exact, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        path,
        Calibration(batches),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
    )


def quantise_nncf(model, batches):
    """The int8 form of a DBNet, compiled by OpenVINO: what is left in floats is bf16."""
    import nncf
    import openvino

    with warnings.catch_warnings(action="ignore"):  # of torch.jit
        graph = openvino.convert_model(model, example_input=batches[0])
    quantised = nncf.quantize(
        graph,
        nncf.Dataset([batch.numpy() for batch in batches]),
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(batches),
    )
    options = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    return Compiled(openvino_core().compile_model(quantised, "CPU", options))


def engines(model, folder, batches):
    """{label: function of pages} of all that is compared, float32 first."""
    exact, small = folder / "exact.onnx", folder / "int8.onnx"
    exact.write_bytes(onnx_graph(model))
    quantise_onnx(exact, small, batches)

    def make(engine, amp, graph=None):
        return load_engine(Runtime(CPU, engine, amp), "int8", lambda: model, graph and str(graph))

    rows = {
        "onnxruntime float32": make("onnxruntime", "off", exact),
        "onnxruntime int8": make("onnxruntime", "off", small),
        "OpenVINO float32": make("openvino", "off"),
        "OpenVINO bf16": make("openvino", "bf16"),
        "OpenVINO int8, onnxruntime's": make("openvino", "bf16", small),
    }
    if find_package("nncf"):
        rows["OpenVINO int8, NNCF's"] = quantise_nncf(model, batches)
    return rows


def measure_rates(rows, batches):
    """{label: pages a second of the processor's time in each round}."""
    rates = {label: [] for label in rows}
    for _ in range(ROUNDS):
        for label, run in rows.items():
            begin = time.process_time()
            for batch in batches:
                run(batch)
            rates[label].append(len(batches) / (time.process_time() - begin))
    return rates


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--pages", type=int, default=20)
    parser.add_argument("--size", type=int, default=704)
    args = parser.parse_args()
    source = sources.load_source(str(ROOT / "weights/receipts-lite2.pt"))
    hp = replace(source.hp, size=args.size, look=False, amp="off")
    pages = labels.load_labels(args.data, "val")[: args.pages]
    train = labels.load_labels(args.data, "train")
    examples = train[:: max(1, len(train) // CALIBRATED_BY)][:CALIBRATED_BY]

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["XDG_CACHE_HOME"] = place  # in which engines keep what they compile
        model = network_of(source.state, source.path, CPU)
        rows = engines(model, folder, network_inputs(examples, hp))

        batches = network_inputs(pages, hp)
        maps = {}
        for label, run in rows.items():
            maps[label] = [run(batch).sigmoid().numpy().copy() for batch in batches]
        rates = measure_rates(rows, batches)

        (folder / "val.json").write_text(json.dumps(pages_to_json(pages)))
        copy_pictures(folder / "images", pages)
        exact = maps["onnxruntime float32"]
        print("engine                        pages/s  difference  hmean official iou50")
        for label, run in rows.items():
            errors = [np.abs(ours - theirs).ravel() for ours, theirs in zip(maps[label], exact)]
            error = np.concatenate(errors)
            found = predict(Network(run, hp), pages, CPU, lambda page, words: words)
            out = folder / "found.json"
            write_predictions(out, pages, [words for _, words in found])
            speeds = " ".join(f"{rate:5.2f}" for rate in rates[label])
            shown = scores(str(out), str(folder / "val.json"))
            print(
                f"{label:29s} {speeds}  {error.mean():.5f} {error.max():.3f}  {shown}", flush=True
            )


if __name__ == "__main__":
    main()
