"""Hostile files and ordinary slips against the real commands.

python tests/by_hand/hostile.py [WORD ...] [--seconds 60] [--mib 2048]

Makes each input in a folder of its own, runs the command on it in a process of limited memory and
time, and prints what it got: exit code, seconds, peak MiB (90 are this script's own), message.
Exit code 1 when one ended in anything but lines of ours, took too long or too much, ran what it
read, changed a file that it refused, or did not end as said beside it. With WORDs only the inputs
whose command or name holds one of them.
"""

import dataclasses
import json
import math
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, draw_pages, run_script, write_labels, write_picture

from command import Parser

QUAD = [[10, 10], [60, 10], [60, 30], [10, 30]]
DEEP = 100_000
REFUSED = -1  # in place of an exit code: 1 or 2


def text(name, content):
    """A case's maker: a valid picture and a file of this content: text, bytes, a function that
    gives one of them, or the number of zero bytes of a file that takes no room."""

    def make(folder):
        write_picture(folder)
        path = folder / name
        if isinstance(content, int):
            path.touch()
            os.truncate(path, content)
        else:
            raw = content() if callable(content) else content
            path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())

    return make


labels, icdar = partial(text, "train.json"), partial(text, "gt_a.txt")
paddle = partial(text, "Label.txt")


def words_of(words):
    return labels(json.dumps({"images": {"a.png": {"words": words}}}))


def entry(fields):
    return labels('{"images": {"a.png": {' + fields + "}}}")


def word(points="[[10,10],[60,10],[60,30],[10,30]]", more=""):
    return entry('"words": {"1": {"points": ' + points + more + "}}")


def named(name):
    return labels(json.dumps({"images": {name: {"words": {}}}}))


def labelme(*shapes, **more):
    return text("a.json", json.dumps({"shapes": shapes, "imagePath": "a.png", **more}))


def raw_picture(name, raw):
    def make(folder):
        named(name)(folder)
        (folder / "images" / name).write_bytes(raw() if callable(raw) else raw)

    return make


def png(width, height, data=b""):
    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png_bomb(side):
    packer, row = zlib.compressobj(9), bytes(side + 1)
    return png(side, side, b"".join(packer.compress(row) for _ in range(side)) + packer.flush())


def jpeg(width, height):
    raw = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    at = raw.index(b"\xff\xc0")
    return raw[: at + 5] + struct.pack(">HH", height, width) + raw[at + 9 :]


def jpeg_with_a_decoy(width, height):
    """Its first header begins no marker: decoders skip such bytes."""
    raw = jpeg(width, height)
    at = raw.index(b"\xff\xc0")
    return raw[:at] + b"\0" + jpeg(16, 16)[at + 1 : at + 19] + raw[at:]


def tiff(width, height, *more, kind=4):
    """more: tags after the first ones, which decoders ignore where they come twice."""
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (279, 9), *more)
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4)


def webp(width, height):
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + size + bytes(40)


def bmp(width, height):
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def link(target):
    def make(folder):
        named("link.png")(folder)
        (folder / "images" / "link.png").symlink_to(target)

    return make


def pipe(name):
    def make(folder):
        named("p.png")(folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def star(points):
    """A polygon that crosses itself as often as it can."""
    angle = np.arange(points) * np.pi * (1 - 1 / points)
    return (60 + 40 * np.stack([np.cos(angle), np.sin(angle)], 1)).round(3).tolist()


class Touch:
    """Unpickled, it would write a file."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


SHAPE = {"label": "x", "points": QUAD, "shape_type": "polygon"}
CHECK = {  # data.py check on a folder
    "coordinate NaN": word("[[NaN,10],[60,10],[60,30],[10,30]]"),
    "coordinate Infinity": word("[[-Infinity,10],[60,10],[60,30],[10,30]]"),
    "coordinate 1e9": word("[[1e9,10],[60,10],[60,30],[10,30]]"),
    "coordinate of 400 digits": word(f"[[{'9' * 400},10],[60,10],[60,30],[10,30]]"),
    "coordinate of 100,000 digits": word(f"[[{'9' * 100_000},10],[60,10],[60,30],[10,30]]"),
    "coordinate is a list": word("[[[1],10],[60,10],[60,30],[10,30]]"),
    "coordinate is null": word("[[null,10],[60,10],[60,30],[10,30]]"),
    "points are ragged": word("[[1,2],[3],[4,5,6]]"),
    "points are an object": word('{"x": 1}'),
    "million-point polygon": word("[%s[1,2]]" % ("[1,2]," * 10**6)),
    "star of 499 points": words_of({1: {"points": star(499)}}),
    "30,000 words on a page": words_of({i: {"points": QUAD} for i in range(30_000)}),
    "confidence of 400 digits": word(more=f', "confidence": {"9" * 400}'),
    "confidence NaN": word(more=', "confidence": NaN'),
    "transcription is a number": word(more=', "transcription": 7'),
    "transcription of 10 MB": word(more=', "transcription": "%s"' % ("x" * 10**7)),
    "transcription, half a character": word(more=', "transcription": "\\ud800"'),
    "group is an object": entry('"words": {}, "group": {"a": [1]}'),
    "img_w is a text": entry('"words": {}, "img_w": "1", "img_h": []'),
    "img_w 1e999": entry('"words": {}, "img_w": 1e999, "img_h": 9'),
    "words is a list": entry('"words": [1]'),
    "word is a number": entry('"words": {"1": 7}'),
    "key twice in a word": word(more=', "points": []'),
    "key twice after 300,000 others": entry(
        "".join(f'"{i}": 1, ' for i in range(300_000)) + '"1": 1'
    ),
    "image twice": labels('{"images": {"a.png": {"words": {}}, "a.png": {"words": {}}}}'),
    "lists nested 100,000 deep": labels("[" * DEEP + "]" * DEEP),
    "objects nested 100,000 deep": labels('{"a":' * DEEP + "1" + "}" * DEEP),
    "lists, never closed": labels(lambda: "[" * 10**7),
    "120 MB of empty lists": labels(lambda: "[" + "[]," * (40 << 20) + "[]]"),
    "200 GB": labels(200 << 30),
    "empty file": labels(""),
    "not UTF-8": labels(b"\xff\xfe{\0}\0"),
    "a pipe": pipe("train.json"),
    "name ../a.png": named("../a.png"),
    "name /etc/passwd": named("/etc/passwd"),
    "name with a zero byte": named("a\0.png"),
    "name with line ends": named("a\nerror: all is well\n.png"),
    "name of 5,000 characters": named("a" * 5000),
    "name, half a character": labels('{"images": {"\\ud800.png": {"words": {}}}}'),
    "name is a folder": named("."),
    "name is empty": named(""),
    "picture links to /etc/passwd": link("/etc/passwd"),
    "picture links to itself": link("link.png"),
    "picture is a pipe": pipe("images/p.png"),
    "picture is empty": raw_picture("x.png", b""),
    "picture is a GIF": raw_picture("x.png", b"GIF89a\xff\xff\xff\xff\0\0\0"),
    "PNG says 50,000 x 50,000": raw_picture("x.png", png(50_000, 50_000)),
    "PNG says 4e9 x 4e9": raw_picture("x.png", png(2**32 - 1, 2**32 - 1)),
    "PNG cut within its header": raw_picture("x.png", png(9, 9)[:20]),
    "PNG bomb, 30,000 x 30,000": raw_picture("x.png", lambda: png_bomb(30_000)),
    "JPEG says 65,500 x 65,500": raw_picture("x.jpg", jpeg(65_500, 65_500)),
    "JPEG hides 32,000 x 32,000": raw_picture("x.jpg", jpeg_with_a_decoy(32_000, 32_000)),
    "JPEG of markers only": raw_picture("x.jpg", b"\xff\xd8" + b"\xff\xe0\0\0" * 10**6),
    "JPEG, 250 MB of fill": raw_picture("x.jpg", lambda: b"\xff\xd8" + b"\xff" * (250 << 20)),
    "BMP says 40,000 x -40,000": raw_picture("x.bmp", bmp(40_000, -40_000)),
    "WebP says 16,383 x 16,383": raw_picture("x.webp", webp(16_383, 16_383)),
    "TIFF says 50,000 x 50,000": raw_picture("x.tif", tiff(50_000, 50_000)),
    "TIFF says two sizes": raw_picture("x.tif", tiff(32_000, 32_000, (256, 9), (257, 9))),
    "TIFF, sizes of 8 bytes": raw_picture("x.tif", tiff(100, 100, kind=16)),
    "TIFF with its tags nowhere": raw_picture("x.tif", b"II*\0\xff\xff\xff\xff"),
    "ICDAR line of 100 MB": icdar(lambda: "1,2," * (25 << 20)),
    "ICDAR file of 10 MB of text": icdar(lambda: "1,2,30,2,30,9,1,9," + "x" * 10**7),
    "ICDAR nan": icdar("nan,2,30,2,30,9,inf,9,x"),
    "ICDAR million lines": icdar(lambda: "1,2,30,2,30,9,1,9\n" * 850_000),
    "Label.txt without tabs": paddle("a.png [1]"),
    "Label.txt, words are numbers": paddle("a.png\t[1, 2]"),
    "Label.txt nested": paddle("a.png\t" + "[" * DEEP),
    "Label.txt names ../../etc/passwd": paddle("../../etc/passwd\t[]"),
    "Label.txt name of 10 MB": paddle("a/" * 5_000_000 + "\t[]"),
    "labelme names ../../../etc/passwd": labelme(imagePath="../../../etc/passwd"),
    "labelme circle": labelme(SHAPE | {"shape_type": "circle"}),
    "labelme shapes are texts": labelme("x"),
    "labelme points are texts": labelme(SHAPE | {"points": "ab"}),
    "Label.txt, picture twice": paddle("a.png\t[]\nx/a.png\t[]"),
    "labelme without a picture": labelme(SHAPE, imagePath=None),
    "labelme rectangle, ragged": labelme({"shape_type": "rectangle", "points": [[], [None]]}),
    "labelme rectangle of texts": labelme({"shape_type": "rectangle", "points": ["ab", "cd"]}),
    "labelme imagePath is a list": labelme(imagePath=[1]),
}
HPARAMS = {  # train.py --print-hparams
    "nested 100,000 deep": "[" * DEEP,
    "value nested": '{"lr": ' + "[" * 500 + "]" * 500 + "}",
    "lr NaN": '{"lr": NaN}',
    "lr of 400 digits": '{"lr": %s}' % ("9" * 400),
    "epochs of 100,000 digits": '{"epochs": %s}' % ("9" * 100_000),
    "epochs Infinity": '{"epochs": Infinity}',
    "key twice": '{"lr": 1e-3, "lr": 1e-4}',
    "key of 1 MB": '{"%s": 1}' % ("x" * 10**6),
    "name ../../x": '{"name": "../../x"}',
    "name with line ends": '{"name": "a\\nb"}',
    "data with a zero byte": '{"data": "a\\u0000b"}',
    "mode is a list": '{"mode": [1]}',
    "half a character": '{"backbone": "\\ud800"}',
    "not an object": "7",
    "200 GB": 200 << 30,
}
SPACE = '{"method": "random", "parameters": {"lr": %s}}'
SWEEP = {  # sweep.py SPEC --wandb
    "nested 100,000 deep": "[" * DEEP,
    "parameters nested": SPACE % ('{"parameters":' * 500 + "{}" + "}" * 500),
    "key twice": '{"method": "random", "method": "grid", "parameters": {"lr": {"value": 1e-3}}}',
    "min NaN": SPACE % '{"min": NaN, "max": 1}',
    "max Infinity": SPACE % '{"min": 0, "max": Infinity}',
    "max of 400 digits": SPACE % ('{"min": 0, "max": %s}' % ("9" * 400)),
    "min above max": SPACE % '{"min": 2, "max": 1}',
    "values of lists": SPACE % '{"values": [[1], {"a": 2}]}',
    "values empty": SPACE % '{"values": []}',
    "million values": SPACE % ('{"values": [%s1]}' % ("1e-3," * 10**6)),
    "parameters are numbers": '{"method": "random", "parameters": 7}',
    "program with a shell": '{"program": "touch pwned", "method": "grid", "parameters": {}}',
    "command with a shell": '{"command": ["touch pwned"], "method": "grid", "parameters": {}}',
    "200 GB": 200 << 30,
}
HEAD = "filename,polygons\n"
CSV = {  # ensemble.py --validate
    "million columns": HEAD + "," * 10**6 + "\n",
    "million columns in the header": "," * 10**6 + "\n",
    "quote that never closes, 100 MB": lambda: HEAD + '"' + "x" * 10**8,
    "field of 100 MB": lambda: HEAD + "a.png," + "1 " * (50 << 20) + "\n",
    "region of a million points": lambda: HEAD + "a.png," + "1 2 " * 10**6 + "3 4\n",
    "million regions": lambda: HEAD + "a.png," + "1 2 9 2 9 8 1 8|" * 10**6 + "\n",
    "number of a million digits": HEAD + "a.png,1 2 3 " + "9" * 10**6 + " 1 2 3 4\n",
    "zero bytes": HEAD + "a.png,\0\0\n",
    "nan": HEAD + "a.png,nan nan 1 2 3 4 5 6\n",
    "name ../../etc/passwd": HEAD + "../../etc/passwd,1 2 9 2 9 8 1 8\n",
    "name with a formula": HEAD + "\"=cmd|'/c calc'!A0\",1 2 9 2 9 8 1 8\n",
    "million empty lines": HEAD + "\n" * 10**6,
    "not UTF-8": b"\xff\xfe\0",
    "200 GB": 200 << 30,
}
PREDICTIONS = {  # evaluate.py predictions.json --data DATA
    "coordinate NaN": '{"images": {"a.png": {"words": {"1": {"points": [[NaN,1],[2,3],[4,9]]}}}}}',
    "a page that is not in the data": '{"images": {"z.png": {"words": {}}}}',
    "nested 100,000 deep": "[" * DEEP,
    "pickle that runs a shell": pickle.dumps(Touch()),
    "200 GB": 200 << 30,
}


def zipped(parts, how=zipfile.ZIP_STORED):
    """A checkpoint as torch writes it, a ZIP file, of a pickle in parts."""

    def make(folder):
        with zipfile.ZipFile(folder / "x.pt", "w", how) as archive:
            archive.writestr("x/version", b"3\n")
            with archive.open("x/data.pkl", "w", force_zip64=True) as file:
                file.writelines(parts)

    return make


def laughter(depth):
    """2^depth lists in as many bytes as there are levels."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return pickle.dumps({"model": {}, "hparams": {}, "laughter": value}, protocol=2)


def endless_tensor(folder):
    import torch

    state = {"model": {"w": torch.zeros(1).expand(10**6, 10**6)}, "hparams": {}}
    torch.save(state, folder / "x.pt")


CHECKPOINTS = {  # evaluate.py x.pt
    "pickle runs a shell": text("x.pt", pickle.dumps(Touch())),
    "zipped pickle runs a shell": zipped([pickle.dumps(Touch())]),
    "ZIP bomb, 3 GB": zipped([bytes(1 << 20)] * (3 << 10), zipfile.ZIP_DEFLATED),
    "2^40 lists": zipped([laughter(40)]),
    "tensor of 4 TB": endless_tensor,
    "200 GB": text("x.pt", 200 << 30),
}


def beside_labels(make, folder):
    write_labels(folder, {"a.png": {"words": {"1": {"points": QUAD}}}}, "test")
    make(folder)


def page_of_stars(folder):
    words_of({i: {"points": star(19)} for i in range(20)})(folder)
    (folder / "p.json").write_bytes((folder / "train.json").read_bytes())


def long_page(folder):
    named("long.png")(folder)
    write_picture(folder, "long.png", (50_000, 1_000))


SHELL = text("h.json", '{"backbone": "$(touch pwned); touch pwned"}')
HARMLESS = (  # odd but valid: exit code 0 in the same bounds
    ("page of 50,000 px", long_page, "data.py check ."),
    ("stars of 19 points", page_of_stars, "data.py check ."),
    ("stars of 19 points", page_of_stars, "evaluate.py p.json --data train.json"),
    ("backbone $(touch pwned)", SHELL, "train.py --hparams h.json --print-hparams"),
)
TABLES = (  # inputs, the file that holds one, the command
    (HPARAMS, "h.json", "train.py --hparams h.json --print-hparams"),
    (SWEEP, "s.json", "sweep.py s.json --wandb"),
    (CSV, "o.csv", "ensemble.py --validate o.csv --data test.json"),
    (PREDICTIONS, "p.json", "evaluate.py p.json --data test.json"),
)

# ---------------------------------------------------------------- what people meet


class Slip(NamedTuple):
    """An ordinary mistake or an odd place, with what should come of it."""

    name: str
    make: Callable  # of the input in a folder; what it returns is held while the command runs
    command: str
    code: int = 0
    words: str = ""  # that stand in the output, "; " between them, or do not if one begins with !
    check: Callable = lambda folder, out: True  # whether it ended as it should
    environment: tuple = ()  # pairs
    interrupt: float = 0  # seconds after which CTRL-C comes


def page(name="a.png", count=1, folder=Path()):
    """Labels of one picture with words below each other."""
    image = np.full((200, 200, 3), 255, np.uint8)
    quads = [
        [[20, y], [120, y], [120, y + 20], [20, y + 20]] for y in range(20, 20 + 40 * count, 40)
    ]
    for quad in quads:
        cv2.rectangle(image, quad[0], quad[2], (0, 0, 0), -1)
    write_picture(folder, name, image)
    return {name: {"words": {str(n): {"points": quad} for n, quad in enumerate(quads, 1)}}}


def network(path, **values):
    """A tiny checkpoint."""
    import torch

    from dbnet import DBNet, save_checkpoint
    from hparams import Hparams

    torch.manual_seed(0)
    hp = Hparams(backbone="mobilenetv3_small_050", pretrained="none", neck=16, size=96, **values)
    state = {"model": DBNet(hp.backbone, hp.neck).state_dict(), "hparams": dataclasses.asdict(hp)}
    origin = {"trained": [], "chosen": [], "unknown": []}
    save_checkpoint(path, {**state, "origin": origin, "epoch": 1, "scores": {}})


def place(change=lambda folder: None):
    """A maker of labels of three splits, their predictions p.json and a checkpoint x.pt."""

    def make(folder):
        for split in ("train", "val", "test"):
            write_labels(folder, page(f"{split}.png", folder=folder), split)
        for name in ("p", "keepme"):
            (folder / f"{name}.json").write_bytes((folder / "val.json").read_bytes())
        network(folder / "x.pt", data=".")
        return change(folder)

    return make


def linked(name, target):
    return place(lambda folder: (folder / name).symlink_to(target))


def device(name, minor):
    return place(lambda folder: os.mknod(folder / name, 0o020600, os.makedev(1, minor)))


def fifo_reader(folder):
    """A process that reads the FIFO `f` into `got`."""
    os.mkfifo(folder / "f")
    return subprocess.Popen(["sh", "-c", "cat f > got"], cwd=folder)


def is_json(folder, out):
    return "images" in json.loads(out)


def pictures_named(*names):
    """A maker of a checkpoint and a folder `d` of pictures."""

    def make(folder):
        place()(folder)
        (folder / "d").mkdir()
        raw = (folder / "images/val.png").read_bytes()
        for name in names:
            (folder / "d" / name).write_bytes(raw)

    return make


def kept(count):
    """Whether p.json holds this many pages."""
    return lambda folder, out: len(json.loads((folder / "p.json").read_text())["images"]) == count


def icdar_lines(line, end="\n"):
    usual = [f"1,{y},30,{y},30,{y + 9},1,{y + 9},word" for y in (2, 22, 42)]
    return icdar(end.join([*usual, line, ""]))


NETWORK = "--backbone=mobilenetv3_small_050 --pretrained=none --neck=16 --size=96 --batch=2"
RUN = f"--data=s {NETWORK} --epochs=2 --T_max=2 --stop-epoch=1 --workers=0 --name=r"


def paused_run(change=lambda folder: None):
    """A maker of a run of two epochs that paused after the first, and of what changed since."""

    def make(folder):
        draw_pages(folder / "s")
        run_script("train.py", *RUN.split(), cwd=folder, timeout=600)
        return change(folder)

    return make


def relabelled(split, whole=False):
    """A change of a split of `s`: a page goes, or the last word of one."""

    def change(folder):
        path = folder / f"s/{split}.json"
        images = json.loads(path.read_text())["images"]
        name = min(images)
        if whole:
            del images[name]
        else:
            images[name]["words"].popitem()
        path.write_text(json.dumps({"images": images}))

    return change


def stopped_at_step_17(folder):
    import torch

    relabelled("train", whole=True)(folder)
    path = folder / "runs/r/last.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"step": 17}, path)


def moved_runs(folder):
    (folder / "runs").rename(folder / "real")
    (folder / "runs").symlink_to("real")


def held_run(folder):
    from files import lock_folder

    return lock_folder(folder / "runs/r", "hparams.json", "")


def damaged_jpeg(change):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    raw = bytearray(cv2.imencode(".jpg", cv2.GaussianBlur(noise, (0, 0), 2))[1])
    return raw_picture("x.jpg", bytes(change(raw)))


def zeroed(raw):
    middle = len(raw) // 2
    raw[middle : middle + 400] = bytes(400)
    return raw


def on_transparent_black(folder):
    image = np.zeros((40, 60, 4), np.uint8)
    image[10:20, 10:30, 3] = 255
    named("x.png")(folder)
    cv2.imwrite(str(folder / "images/x.png"), image)


def is_on_white(folder, out):
    from pictures import read_image

    image = read_image(folder / "images/x.png")
    return image[0, 0].min() == 255 and image[15, 15].max() == 0


LR = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
LOSS = {"name": "loss", "goal": "minimize"}
SPEC = {"method": "bayes", "metric": LOSS, "run_cap": 3, "parameters": {"lr": LR}}


def sweep_state(*lines):
    """A maker of a sweep's folder runs/w with these events."""

    def make(folder):
        from hparams import Hparams

        path = folder / "runs/w"
        path.mkdir(parents=True)
        record = {"sweep": SPEC, "extra": [], "hparams": dataclasses.asdict(Hparams())}
        (path / "sweep.json").write_text(json.dumps(record))
        (path / "state.jsonl").write_text("".join(line + "\n" for line in lines))

    return make


def event(kind, **values):
    return json.dumps({"event": kind, "trial": 1, "number": 1, **values})


FIRST = event("new", params={"lr": 1e-3})


def spec(**changes):
    """A maker of a sweep file s.json and a history of four runs."""

    def make(folder):
        (folder / "s.json").write_text(json.dumps({**SPEC, **changes}))
        trials = [
            {
                "number": n,
                "params": {"lr": n * 1e-3},
                "value": 1 / n,
                "epoch": 2,
                "state": "finished",
            }
            for n in range(1, 5)
        ]
        history = {"sweep": SPEC, "epochs": 2, "trials": trials}
        (folder / "history.json").write_text(json.dumps(history))

    return make


def no_run(folder, out):
    return not (folder / "runs").exists()


def two_sets(folder):
    for name in ("a", "b"):
        for split in ("train", "val"):
            pages = page(f"{name}{split}.png", 2, folder / name)
            write_labels(folder / name, pages, split)
    network(folder / "a.pt", data="a")
    network(folder / "ab.pt", data="a,b")


def overlapping_words(folder):
    quads = [[[x, 20], [x + 60, 20], [x + 60, 40], [x, 40]] for x in (20, 70)]
    write_picture(folder, "a.png", (200, 200))
    entry = {"words": {str(n): {"points": quad} for n, quad in enumerate(quads)}}
    for name in ("val", "p"):
        write_labels(folder, {"a.png": entry}, name)


def no_pairs(folder, out):
    return sum(row["pairs"] for row in json.loads(out)["pairs"]) == 0


def coco(folder):
    write_picture(folder)
    images = [{"id": 1, "file_name": "a.png", "width": 200, "height": 120}]
    box = {"image_id": 1, "bbox": [10, 10, 50, 20]}
    rows = [{**box, "id": n, "category_id": n, "iscrowd": int(n == 3)} for n in (1, 2, 3)]
    kinds = [{"id": n, "name": name} for n, name in ((1, "text"), (2, "logo"), (3, "word"))]
    sheet = {"images": images, "annotations": rows, "categories": kinds}
    (folder / "train.json").write_text(json.dumps(sheet))


def large_print(folder):
    """A word of 110 px beside small ones."""
    image = np.full((1200, 1600, 3), 255, np.uint8)
    face = cv2.FontFace("sans")
    cv2.putText(image, "TOTAL", (350, 500), (0, 0, 0), face, 130, 600)
    for y in range(700, 1100, 60):
        cv2.putText(image, "Milk 2.50", (100, y), (0, 0, 0), face, 30, 400)
    write_picture(folder, "a.png", image)


def has_large_word(folder, out):
    words = json.loads((folder / "p.json").read_text())["images"]["a.png"]["words"].values()
    return max(np.ptp(np.array(word["points"]), 0)[0] for word in words) > 300


def habits(folder):
    """Labels of words, rules and colons."""
    write_picture(folder, "a.png", (600, 600))
    boxes = [(40, y, 200, y + 20) for y in range(20, 500, 40)]
    boxes += [(20, 540, 560, 545), (20, 550, 560, 555), (230, 26, 234, 38), (230, 66, 234, 78)]
    quads = [[[a, b], [c, b], [c, d], [a, d]] for a, b, c, d in boxes]
    words = {str(n): {"points": quad} for n, quad in enumerate(quads)}
    write_labels(folder, {"a.png": {"words": words}})


def has_a_strip(folder, out):
    """Whether what was drawn has a white strip with coloured letters, below it or above."""
    drawn = [cv2.imread(str(path)) for path in (folder / "look").rglob("*.jpg")]
    rows = [image[end] for image in drawn for end in (0, -1)]
    return any(row.min() > 240 for row in rows)


def empty_submission(folder):
    (folder / "o.csv").write_text("filename,polygons\na.jpg,\n")


def four_broken(folder):
    write_labels(folder, {f"{n}.png": {"words": {}} for n in range(4)})
    for n in range(4):
        (folder / "images").mkdir(exist_ok=True)
        (folder / f"images/{n}.png").write_bytes(b"x")


def decomposed(folder):
    write_picture(folder, "e\u0301.png")
    write_labels(folder, {"\u00e9.png": {"words": {}}})


def sample(folder):
    (folder / "sample.csv").write_text("\ufefffilename,polygons\ntest.png,\n")


def second_network(folder):
    import torch

    state = torch.load(folder / "x.pt", weights_only=True)
    state["model"] = {key: value * 1.01 for key, value in state["model"].items()}
    torch.save(state, folder / "y.pt")


def converted(links):
    return lambda folder, out: (folder / "out/images/val/val.png").stat().st_nlink == links


VOTING = "ensemble.py p.json --method voting --data . --split"
IMAGES = "evaluate.py x.pt --images d"
WEIGHTS = ROOT / "weights/receipts-lite2.pt"
SLIPS = (
    # places that are no regular file
    Slip("predictions to -", place(), "evaluate.py p.json --data . --out -", check=is_json),
    Slip("to /dev/stdout", place(), "evaluate.py p.json --data . --out /dev/stdout", check=is_json),
    Slip(
        "to /dev/full", place(), "evaluate.py p.json --data . --out /dev/full", 1, "No space left"
    ),
    Slip(
        "to a link",
        linked("link.json", "target.json"),
        "evaluate.py p.json --data . --out link.json",
        check=lambda folder, out: (folder / "link.json").is_symlink(),
    ),
    Slip(
        "to a FIFO",
        place(fifo_reader),
        "evaluate.py p.json --data . --out f",
        check=lambda folder, out: is_json(folder, (folder / "got").read_text()),
    ),
    Slip(
        "HTML to a null device",
        device("null", 3),
        "evaluate.py p.json --data . --html null",
        check=lambda folder, out: (folder / "null").is_char_device(),
    ),
    # an input as the output
    Slip("labels as --out", place(), "evaluate.py p.json --data . --out val.json", 2),
    Slip("a run's labels as --out", place(), "evaluate.py x.pt --out train.json", 2),
    Slip("labels as --html", place(), "evaluate.py p.json --data . --html val.json", 2),
    Slip("labels as --write", place(), "evaluate.py x.pt --tune --data . --write val.json", 2),
    Slip(
        "a link to it as --export", linked("y.onnx", "x.pt"), "evaluate.py x.pt --export y.onnx", 2
    ),
    Slip("pages as --pictures", place(), "evaluate.py p.json --data . --pictures val.json", 2),
    Slip("labels beside it", place(), f"{VOTING} val --submission val.csv", 2, "is read by this"),
    Slip("a member beside it", place(), f"{VOTING} val --submission p.csv", 2, "is read by this"),
    Slip("a file nobody named", place(), f"{VOTING} val --submission keepme.csv", 2, "exists, and"),
    Slip("labels as a split", place(), "data.py split . --folds 2 --out train.json", 2),
    Slip("a sweep's state", sweep_state(), "sweep.py --report runs/w --html runs/w/state.jsonl", 2),
    # a run whose pages changed
    Slip(
        "fewer steps than it had",
        paused_run(stopped_at_step_17),
        "train.py --resume --name r",
        words="train pages have changed since; starts again with the pages there are now",
    ),
    Slip("a word less in train", paused_run(relabelled("train")), "train.py --resume --name r"),
    Slip(
        "a word less in val",
        paused_run(relabelled("val")),
        "train.py --resume --name r",
        2,
        "val pages have changed since; add --rescore",
    ),
    Slip(
        "the same, scored anew",
        paused_run(relabelled("val")),
        "train.py --resume --name r --rescore",
        words="epoch 1 scored anew",
    ),
    Slip("runs/ is a link", paused_run(moved_runs), "train.py --resume real/r --stop-epoch 1"),
    Slip("trained by another", paused_run(held_run), "train.py --resume --name r", 2),
    # names
    Slip(
        "names of 251 to 255 bytes",
        pictures_named(*("b" * n + ".png" for n in (247, 248, 251)), "c.png"),
        f"{IMAGES} --pictures P --out p.json",
        1,
        "not drawn (File name too long)",
        kept(4),
    ),
    Slip(
        "a folder of 255 bytes",
        place(),
        "data.py convert . " + "c" * 255,
        check=lambda folder, out: (folder / ("c" * 255)).is_dir(),
    ),
    Slip(
        "letters without width",
        pictures_named("می\u200cخواهم.png", "👨\u200d👩.png", "ex\u00adample.png"),
        f"{IMAGES} --out p.json",
        check=kept(3),
    ),
    Slip(
        "a name of two lines",
        pictures_named("a\nb.png", "c.png"),
        f"{IMAGES} --out p.json",
        1,
        "not a file name",
        kept(1),
    ),
    Slip("two forms of é", decomposed, "data.py check .", 1, "two names that look alike"),
    # lines of ICDAR
    Slip("7 numbers", icdar_lines("1,2,30,2,30,9,10,x"), "data.py check .", 1, "line 4"),
    Slip("a long price", icdar_lines("1,62,30,62,30,69,1,69,1,234,567,890"), "data.py check ."),
    Slip(
        "### behind a space",
        icdar_lines("1,62,30,62,30,69,1,69, ###"),
        "data.py check .",
        words="1 ignored",
    ),
    Slip("CR alone", icdar_lines("1,62,30,62,30,69,1,69,x", "\r"), "data.py check .", 0, "4 words"),
    # pictures
    Slip("400 bytes zeroed", damaged_jpeg(zeroed), "data.py check .", 0, "damaged picture"),
    Slip(
        "cut, with an end marker",
        damaged_jpeg(lambda raw: raw[: len(raw) // 2] + b"\xff\xd9"),
        "data.py check .",
        words="damaged picture",
    ),
    Slip("transparent black", on_transparent_black, "data.py check .", check=is_on_white),
    Slip("four broken", four_broken, "data.py check .", 1, "0.png; 1.png; 2.png; 3.png"),
    Slip(
        "a FIFO as --images",
        lambda folder: (place()(folder), os.mkfifo(folder / "f")),
        "evaluate.py x.pt --images f",
        1,
        "not a regular file",
    ),
    # states of sweeps
    Slip(
        "params is a list",
        sweep_state(event("new", params=[1])),
        "sweep.py --report runs/w",
        1,
        "state.jsonl: line 1",
    ),
    Slip(
        "history is NaN",
        sweep_state(FIRST, event("epochs", history=[math.nan], rows=["x"])),
        "sweep.py --report runs/w",
        1,
        "state.jsonl: line 2",
    ),
    Slip(
        "verdict without rule",
        sweep_state(FIRST, event("judged", verdict={"stop": True})),
        "sweep.py --report runs/w",
        1,
        "state.jsonl: line 2",
    ),
    Slip(
        "an unknown event",
        sweep_state(FIRST, event("surprise")),
        "sweep.py --report runs/w",
        1,
        "state.jsonl: line 2",
    ),
    # values
    Slip(
        "weights of 1e308",
        place(second_network),
        "ensemble.py x.pt y.pt --data . --weights 1e308,1e308",
        5,
        "weight 1.0000; !nan",
    ),
    Slip("no device", spec(), "sweep.py s.json --devices=", 2, "--devices"),
    Slip("device a", spec(), "sweep.py s.json --devices a", 2, "has 'a'"),
    Slip("device 99", spec(), "sweep.py s.json --devices 99", 2, "no GPU 99"),
    Slip("one device twice", spec(), "sweep.py s.json --devices 0,0", 2, "has '0'"),
    Slip("CTRL-C at once", place(), "train.py --data .", 130, "interrupted", interrupt=0.7),
    Slip(
        "a terminal in ASCII",
        pictures_named("가.png"),
        f"{IMAGES} --out p.json",
        check=kept(1),
        environment=(("PYTHONIOENCODING", "ascii"),),
    ),
    Slip(
        "a sample with a BOM",
        place(sample),
        "ensemble.py x.pt --data . --sample sample.csv --submission out.csv",
    ),
    # small things
    Slip("convert copies", place(), "data.py convert . out", check=converted(1)),
    Slip("convert --link", place(), "data.py convert . out --link", check=converted(2)),
    Slip("empty submission", empty_submission, "ensemble.py --validate o.csv", 1, "--allow-empty"),
    Slip("the same, allowed", empty_submission, "ensemble.py --validate o.csv --allow-empty"),
    Slip("help of training", place(), "train.py --help", words="--no-pretrained"),
    Slip(
        "help of scoring", place(), "evaluate.py --help", words="(default: the checkpoint's); !960"
    ),
    Slip("COCO's categories", coco, "data.py check .", words="logo; 1 ignored"),
    Slip("some of them", coco, "data.py convert . out --categories text", words="1 words"),
    Slip("none of them", coco, "data.py convert . out --categories price", 2, "price"),
    Slip(
        "no transcriptions",
        place(),
        "evaluate.py p.json --data .",
        words="characters guessed by shape, no transcriptions",
    ),
    Slip("colours of samples", place(), "data.py check . --pictures look", check=has_a_strip),
    Slip(
        "colours of pages",
        place(),
        "evaluate.py p.json --data . --pictures look",
        check=has_a_strip,
    ),
    Slip(
        "large print in tiles",
        large_print,
        f"evaluate.py {WEIGHTS} --images images --tile 640 --out p.json",
        check=has_large_word,
    ),
    Slip("nothing to enqueue", spec(), "sweep.py s.json --enqueue no.json", 2, "no.json", no_run),
    Slip(
        "known beside run_cap",
        spec(),
        "sweep.py --help",
        words="beside run_cap",
    ),
    Slip(
        "lr crosses eta_min",
        spec(parameters={"lr": LR | {"min": 1e-7}}),
        "sweep.py s.json",
        2,
        "eta_min = 1e-05 is above lr",
        no_run,
    ),
    Slip("no sweep to replay", spec(), "sweep.py --replay s.json", 2, "is a sweep file"),
    Slip("a sweep to enqueue", spec(), "sweep.py s.json --enqueue s.json", 2, "is a sweep file"),
    Slip("a value for a file", place(), "evaluate.py lr=1e-3", 2, "for a flag write --lr=1e-3"),
    Slip(
        "report of 4 runs",
        spec(),
        "sweep.py --report history.json",
        words="Too few runs for a rank",
    ),
    Slip(
        "workers of trials",
        spec(),
        "sweep.py s.json --workers 2 --epochs x",
        2,
        "--workers are the loader processes of each trial",
    ),
    Slip(
        "words that overlap",
        overlapping_words,
        "evaluate.py p.json --data . --json",
        check=no_pairs,
    ),
    Slip(
        "runs on a and on a,b",
        two_sets,
        "evaluate.py a.pt --compare ab.pt",
        words="pages: those of a, which both runs have",
    ),
    Slip("labels of rules", habits, "data.py check .", words="rules; colons or dots"),
    Slip(
        "labels as in the competition",
        place(),
        "data.py synth drawn --pages 2 --size 640 --habit competition",
    ),
)


def cases():
    """A Slip each."""
    for name, make in CHECK.items():
        yield Slip(name, make, "data.py check .", REFUSED)
    for table, file, command in TABLES:
        for name, content in table.items():
            yield Slip(name, partial(beside_labels, text(file, content)), command, REFUSED)
    for name, make in CHECKPOINTS.items():
        yield Slip(f"checkpoint, {name}", make, "evaluate.py x.pt --data synth-small", REFUSED)
    for case in HARMLESS:
        yield Slip(*case)
    yield from SLIPS


class Ended(NamedTuple):
    """How a command ended."""

    code: int | str  # or "timeout"
    out: str
    said: str  # on stderr
    seconds: float
    peak: float  # MiB


def run(slip, folder, args):
    """How a Slip's command ended, held in bounds."""
    script, *words = slip.command.split()
    words = [sys.executable, ROOT / script, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(slip.environment)

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, ((args.mib + 4096) << 20,) * 2)

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.monotonic()
        options = {"cwd": folder, "env": env, "stdout": out, "stderr": err}
        # no thread runs here, and the peak memory of a fork is its own
        process = subprocess.Popen(words, preexec_fn=limit, **options)  # noqa: PLW1509
        # os.kill, since Popen's own methods wait for a process that has ended
        kill = partial(os.kill, process.pid)
        timers = [threading.Timer(args.seconds, kill, [signal.SIGKILL])]
        if slip.interrupt:
            timers.append(threading.Timer(slip.interrupt, kill, [signal.SIGINT]))
        for timer in timers:
            timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        took = time.monotonic() - start
        for timer in timers:
            timer.cancel()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    code = "timeout" if took > args.seconds else code
    return Ended(code, *texts, took, usage.ru_maxrss / 1024)


def small_files(folder):
    """{path: content} of a folder's regular files."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path: path.read_bytes() for path in files if path.stat().st_size < 2**24}


def holds(slip, folder, out):
    """Whether the check of a Slip passes; what it cannot read does not."""
    try:
        return slip.check(folder, out)
    except (OSError, ValueError, KeyError):
        return False


def judge(slip, ended, folder, before, limits):
    """What is wrong with the way a Slip ended, or ''. before: its files, by `small_files`."""
    lines = ended.said.strip().splitlines()
    text = ended.out + ended.said
    refused = slip.code in (REFUSED, 2)
    expected = (1, 2) if slip.code == REFUSED else (slip.code,)
    words = [word for word in slip.words.split("; ") if word]
    absent = [word for word in words if word[0] != "!" and word not in text]
    present = [word for word in words if word[0] == "!" and word[1:] in text]
    lost = [path.name for path, raw in before.items() if refused and path.read_bytes() != raw]
    wrong = [
        (ended.code == "timeout", "too slow"),
        (ended.peak > limits.mib, "too much memory"),
        ("Traceback" in text or isinstance(ended.code, int) and ended.code < 0, "crashed"),
        (ended.code not in expected, f"not exit code {expected}"),
        (slip.code == REFUSED and not 1 <= len(lines) <= 21, f"{len(lines)} lines"),
        (any(len(line) > 1000 for line in lines), "a line without end"),
        (any(folder.rglob("pwned")), "RAN WHAT IT READ"),
        (lost, f"changed {lost}"),
        (absent or present, f"words {absent + present}"),
    ]
    problems = [what for bad, what in wrong if bad]
    if not problems and not holds(slip, folder, ended.out):
        problems = ["not as it should be"]
    return ", ".join(problems)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mib", type=int, default=2048)
    args = parser.parse_args()
    failed = count = 0
    print(f"{'command':11s} {'input':36s} {'exit':>4s} {'s':>5s} {'MiB':>5s}  message")
    for slip in cases():
        if args.words and not any(word in f"{slip.command} {slip.name}" for word in args.words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            held = slip.make(folder)
            before = small_files(folder)
            ended = run(slip, folder, args)
            if isinstance(held, subprocess.Popen):
                held.wait(10)
            wrong = judge(slip, ended, folder, before, args)
            del held
        count += 1
        failed += bool(wrong)
        message = (ended.said.strip().splitlines() or [""])[-1][:110]
        if wrong:
            message += f"  <-- {wrong}"
        script = slip.command.split()[0]
        row = f"{script:11s} {slip.name:36s} {ended.code!s:>4s} {ended.seconds:5.1f}"
        print(f"{row} {ended.peak:5.0f}  {message}", flush=True)
    print(f"{count} inputs, {failed} of them not held")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
