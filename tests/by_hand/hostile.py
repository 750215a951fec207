"""Hostile files against the real commands.

python tests/by_hand/hostile.py [WORD ...] [--seconds 60] [--mib 2048]

Makes each input in a folder of its own, runs the command on it in a process of limited memory and
time, and prints what it got: exit code, seconds, peak MiB (90 are this script's own), message.
Exit code 1 when one ended in anything but lines of ours, took too long or too much, or ran what it
read. With WORDs only the inputs whose command or name holds one of them.
"""

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, write_labels, write_picture

from command import Parser

QUAD = [[10, 10], [60, 10], [60, 30], [10, 30]]
DEEP = 100_000


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
    "labelme id twice": labelme(SHAPE | {"id": 1}, SHAPE | {"id": "1"}),
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


def cases():
    """(name, maker of the input in a folder, command, whether it is valid)."""
    for name, make in CHECK.items():
        yield name, make, "data.py check .", False
    for table, file, command in TABLES:
        for name, content in table.items():
            yield name, partial(beside_labels, text(file, content)), command, False
    for name, make in CHECKPOINTS.items():
        yield f"checkpoint, {name}", make, "evaluate.py x.pt --data synth-small", False
    for case in HARMLESS:
        yield *case, True


def run(command, folder, seconds, mib):
    """(exit code or "timeout", stderr, seconds, peak MiB) of a command that is held in bounds."""
    script, *words = command.split()
    words = [sys.executable, ROOT / script, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, ((mib + 4096) << 20,) * 2)

    with open(folder / ".err", "w+b") as err:
        start = time.monotonic()
        options = {"cwd": folder, "env": env, "stdout": subprocess.DEVNULL, "stderr": err}
        # no thread runs here, and the peak memory of a fork is its own
        process = subprocess.Popen(words, preexec_fn=limit, **options)  # noqa: PLW1509
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        took = time.monotonic() - start
        timer.cancel()
        err.seek(0)
        said = err.read().decode(errors="replace")
    return "timeout" if took > seconds else code, said, took, usage.ru_maxrss / 1024


def judge(code, said, took, peak, folder, fine, limits):
    """What is wrong with the way a case ended, or ''."""
    lines = said.strip().splitlines()
    wrong = [
        (code == "timeout", "too slow"),
        (peak > limits.mib, "too much memory"),
        ("Traceback" in said or isinstance(code, int) and code < 0, "crashed"),
        (fine and code != 0, "refused"),
        (not fine and code not in (1, 2), "accepted"),
        (not fine and not 1 <= len(lines) <= 21, f"{len(lines)} lines"),
        (any(len(line) > 1000 for line in lines), "a line without end"),
        (any(folder.rglob("pwned")), "RAN WHAT IT READ"),
    ]
    return ", ".join(what for bad, what in wrong if bad)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mib", type=int, default=2048)
    args, failed, count = parser.parse_args(), 0, 0
    print(f"{'command':11s} {'input':36s} {'exit':>4s} {'s':>5s} {'MiB':>5s}  message")
    for name, make, command, fine in cases():
        if args.words and not any(word in f"{command} {name}" for word in args.words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            make(folder)
            code, said, took, peak = result = run(command, folder, args.seconds, args.mib)
            wrong = judge(*result, folder, fine, args)
        count, failed = count + 1, failed + bool(wrong)
        said = (said.strip().splitlines() or [""])[-1][:110] + f"  <-- {wrong}" * bool(wrong)
        row = f"{command.split()[0]:11s} {name:36s} {code!s:>4s} {took:5.1f} {peak:5.0f}  {said}"
        print(row, flush=True)
    print(f"{count} inputs, {failed} of them not held")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
