"""Draw the pictures of the README from synthetic pages and published numbers alone:

python docs/pictures.py [detections] [sweep]

detections.jpg: what the shipped weights find on two drawn receipts, by `evaluate.py --pictures`.
sweep.png: the first plots of the report on the published sweep, by `sweep.py --report --html`, as
headless Chromium (Debian: chromium) shows them. Each is 800 px wide, of less than 150 KB, and
written beside this file."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from files import DataError, Parser, exit_code, replace_file
from synth import synthetic_page

WIDTH, MOST = 800, 150_000  # px, bytes
PLOTS = "<figure>.*?</figure>", 2, 640  # how they stand in a report, how many, their height in px
RECEIPTS = (18, 22)  # seeds: a Latin receipt on wood, one with Hangul


def run(*words):
    """A command of the root. Raises DataError with its last line."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(words[0], *done.stderr.splitlines()[-1:])


def detections(folder):
    """Two receipts side by side with what was found, as a JPEG's bytes."""
    for seed in RECEIPTS:
        page = synthetic_page(seed, words=60, difficulty=0.35)[0]
        cv2.imwrite(str(folder / f"{seed}.png"), page[..., ::-1])
    weights, found = ROOT / "weights" / "receipts-lite2.pt", folder / "found"
    run("evaluate.py", weights, "--images", folder, "--pictures", found)
    pages = [cv2.imread(str(found / f"{seed}.png.jpg")) for seed in RECEIPTS]
    height = min(page.shape[0] for page in pages)
    pages = [cv2.resize(p, (round(p.shape[1] * height / p.shape[0]), height)) for p in pages]
    page = np.concatenate(pages, 1)
    size = WIDTH, round(page.shape[0] * WIDTH / page.shape[1])
    page = cv2.resize(page, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", page, [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()


def sweep(folder):
    """The plots of a sweep's report, as a PNG's bytes. Raises DataError without a browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise DataError("sweep.png", "needs a browser", "apt-get install chromium")
    page, shot = folder / "sweep.html", folder / "sweep.png"
    run("sweep.py", "--report", ROOT / "hparams" / "history_v5inrfwe.json", "--html", page)
    text, (figure, count, height) = page.read_text(), PLOTS
    figures = re.findall(figure, text, re.DOTALL)[:count]
    style = text[: text.index("</style>")] + "svg { font-size: 15px }</style>"  # as on phones
    page.write_text(style + "".join(figures))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={folder / 'user'}", f"--window-size={WIDTH},{height}"]
    command = [browser, *flags, f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    return cv2.imencode(".png", cv2.imread(str(shot)))[1].tobytes()


PICTURES = {"detections.jpg": detections, "sweep.png": sweep}


def main(argv=None):
    parser = Parser(description=__doc__)
    names = {Path(name).stem: name for name in PICTURES}
    parser.add_argument("pictures", nargs="*", help=f"of {', '.join(names)} (default: all)")
    return exit_code(lambda: draw([names[n] for n in parser.parse_args(argv).pictures or names]))


def draw(names):
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            code = PICTURES[name](Path(folder))
        if len(code) > MOST:
            raise DataError(name, f"{len(code)} bytes", f"up to {MOST} are meant for the README")
        replace_file(Path(__file__).with_name(name), code)
        print(f"docs/{name}: {len(code) / 1e3:.0f} KB")


if __name__ == "__main__":
    sys.exit(main())
