"""Draw the pictures of the README from synthetic pages and published numbers alone.

python docs/pictures.py [detections] [sweep] [stress]

detections.jpg: what the shipped weights find on two drawn receipts, by `evaluate.py --pictures`.
sweep.png: the first plots of the report on the published sweep, by `sweep.py --report --html`, as
headless Chromium (Debian: chromium) shows them.
stress.png: H-means on changed pages, from stress.json, which tests/by_hand/stress.py writes.
Each is 800 px wide, has at most 150 KB, and is written beside this file."""

import json
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

import report
from command import Parser
from files import DataError, exit_code, replace_file
from synth import synthetic_page

WIDTH = 800  # px
MAX_BYTES = 150_000
RECEIPTS = (18, 22)  # seeds: a Latin receipt on wood, one with Hangul
PLOTS = 2  # of a report
PLOTS_HEIGHT = 640  # px
STRESS_HEIGHT = 660  # px
STRESS_LINES = "best", "other", "stopped"  # blue, grey, dashed: in the order of the detectors
STRESS_STYLE = """
body { margin: 0; max-width: none } main { display: grid; grid-template-columns: 1fr 1fr }
svg { font-size: 15px }"""
STRESS_AXES = {
    "turned": "turned by degrees",
    "scaled": "scaled by",
    "blurred": "blurred, px",
    "darkened": "share of the light",
    "jpeg": "JPEG quality",
    "noisy": "noise, of 255",
}


def run(*words):
    """Run a command in the root. Raises DataError with the last line of its errors."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(words[0], *done.stderr.splitlines()[-1:])


def detections(folder):
    """Two receipts side by side with what was found, as the bytes of a JPEG. Raises DataError."""
    for seed in RECEIPTS:
        page = synthetic_page(seed, words=60, difficulty=0.35)[0]
        cv2.imwrite(str(folder / f"{seed}.png"), page[..., ::-1])
    weights = ROOT / "weights" / "receipts-lite2.pt"
    drawn = folder / "drawn"
    run("evaluate.py", weights, "--images", folder, "--pictures", drawn)

    # both at the height of the lower one, beside each other, at the width of the README
    pages = [cv2.imread(str(drawn / f"{seed}.png.jpg")) for seed in RECEIPTS]
    height = min(page.shape[0] for page in pages)
    pages = [cv2.resize(p, (round(p.shape[1] * height / p.shape[0]), height)) for p in pages]
    both = np.concatenate(pages, 1)
    size = WIDTH, round(both.shape[0] * WIDTH / both.shape[1])
    both = cv2.resize(both, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", both, [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()


def sweep(folder):
    """The first plots of a sweep's report, as the bytes of a PNG. Raises DataError."""
    page = folder / "sweep.html"
    run("sweep.py", "--report", ROOT / "hparams" / "history_v5inrfwe.json", "--html", page)

    # the page's head, with larger letters, and its first plots alone
    text = page.read_text()
    style = text[: text.index("</style>")] + "svg { font-size: 15px }</style>"
    figures = re.findall("<figure>.*?</figure>", text, re.DOTALL)[:PLOTS]
    page.write_text(style + "".join(figures))
    return screenshot(page, PLOTS_HEIGHT)


def stress(folder):
    """A curve for each detector and kind of change, as the bytes of a PNG. Raises DataError."""
    results = json.loads(Path(__file__).with_name("stress.json").read_text())
    cells = "".join(stress_cell(kind, rows) for kind, rows in results["curves"].items())
    text = report.page("Stress", [])
    style = text[: text.index("</style>")] + STRESS_STYLE + "</style>"
    page = folder / "stress.html"
    page.write_text(f"{style}<main>{cells}</main>")
    return screenshot(page, STRESS_HEIGHT)


def stress_cell(kind, rows):
    """The SVG of one kind of change. rows: [level, H-means of the detectors], a level each."""
    plot = report.Plot((0, len(rows) - 1), (0, 1), 390, 210)
    plot.axes([(k, f"{level:g}") for k, (level, _) in enumerate(rows)], STRESS_AXES[kind])
    for number, line in reversed(list(enumerate(STRESS_LINES))):
        plot.line([(k, scores[number]) for k, (_, scores) in enumerate(rows)], line)
    return plot.svg(kind)


def screenshot(page, height):
    """An HTML file as Chromium shows it, the bytes of a PNG. Raises DataError without a browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise DataError(page.name, "needs a browser", "apt-get install chromium")
    shot = page.with_suffix(".png")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={page.with_name('user')}", f"--window-size={WIDTH},{height}"]
    command = [browser, *flags, f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    return cv2.imencode(".png", cv2.imread(str(shot)))[1].tobytes()


PICTURES = {"detections.jpg": detections, "sweep.png": sweep, "stress.png": stress}


def draw(names):
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            content = PICTURES[name](Path(folder))
        if len(content) > MAX_BYTES:
            raise DataError(name, f"has {len(content)} bytes, more than {MAX_BYTES}")
        replace_file(Path(__file__).with_name(name), content)
        print(f"docs/{name}: {len(content) / 1e3:.0f} KB")


def main(argv=None):
    names = {Path(name).stem: name for name in PICTURES}
    parser = Parser(description=__doc__)
    parser.add_argument("pictures", nargs="*", help=f"of {', '.join(names)} (default: all)")

    def work():
        args = parser.parse_args(argv)
        draw([names[picture] for picture in args.pictures or names])

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
