"""H-means of detectors on pages turned, scaled, blurred, darkened and so on, as numbers for
docs/pictures.py, which draws docs/stress.png.

python tests/by_hand/stress.py DATA OUT.json EVERY SOURCE...

A SOURCE is a checkpoint, or a peer of tests/by_hand/peers.py. Of DATA's val pages the first and
each EVERY-th after it are taken. The changes are those of evaluate.py --stress."""

import sys
from pathlib import Path

import numpy as np
from peers import PEERS

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cleval
import labels
import sources
from augment import STRESS
from engine import choose_device
from files import write_json
from predict import predict
from stress import stressed_page


def checkpoint_reader(path, device):
    """A function from pages to N polygons [P, 2] a page, by a checkpoint."""
    source = sources.load_source(path)
    network = source.network(device)

    def read(pages):
        stream = predict(network, pages, device, lambda page, found: found[0])
        return [polygons for _, polygons in stream]

    return read


def peer_reader(name):
    """The same by a peer."""
    detect = PEERS[name](name)

    def read(pages):
        return [[np.array(box, float) for box in detect(page)] for page in pages]

    return read


def hmean(read, pages):
    found = read(pages)
    rows = [cleval.page_row("page", page, own) for page, own in zip(pages, found)]
    return cleval.mean_scores(np.sum(rows, 0))[2]


def main():
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    folder, out, every, *names = sys.argv[1:]
    pages = labels.load_labels(folder, "val")[:: int(every)]
    device = choose_device("auto")
    readers = [
        peer_reader(name) if name in PEERS else checkpoint_reader(name, device) for name in names
    ]

    curves = {kind: [] for kind in STRESS}
    for kind, levels in STRESS.items():
        for level in levels:
            changed = [stressed_page(page, kind, level) for page in pages]
            scores = [round(float(hmean(read, changed)), 4) for read in readers]
            curves[kind].append([level, scores])
            print(kind, level, *scores, flush=True)
            write_json(out, {"pages": len(pages), "names": names, "curves": curves}, indent=1)


if __name__ == "__main__":
    main()
