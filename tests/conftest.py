"""What the tests and tests/by_hand share: tiny data sets, networks and sweeps, commands as a user
runs them. Tests import the scripts by name and run from an empty folder."""

import contextlib
import csv
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # sums are bit-equal only for one number of threads

CLOCKS = {"seconds", "images_s", "wait", "peak_gib", "val_seconds"}  # of log.csv: no two agree
NETWORK = ("--backbone=test_efficientnet", "--pretrained=none", "--neck=64")

# ---------------------------------------------------------------- tiny things


def draw_pages(folder, count=8):
    """A data folder of drawn receipts, three quarters in train and the rest in val."""
    import data  # and torch with it, which not all who import this need

    data.synth(folder, count, 0, size=96, words=4, difficulty=0.2)


def write_picture(folder, name="a.png", image=(120, 200)):
    """folder/images/name: an image [H, W, 3] or a grey one of a shape (H, W)."""
    image = np.full((*image, 3), 200, np.uint8) if isinstance(image, tuple) else image
    path = Path(folder, "images", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def write_labels(folder, images, split="train"):
    """folder/split.json of {picture's name: entry}; returns the folder."""
    (folder / f"{split}.json").write_text(json.dumps({"images": images}))
    return folder


def write_predictions(path, pages, found):
    """A predictions file of what was found, (polygons, scores) a page."""
    import predictions

    predictions.write_predictions(path, pages, found)


def log_range(low, high):
    return {"distribution": "log_uniform_values", "min": low, "max": high}


def tiny_sweep(**changes):
    """A sweep over lr, as its file holds it."""
    lr = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
    sweep = {"method": "bayes", "metric": {"name": "loss", "goal": "minimize"}, "run_cap": 3}
    return {**sweep, "parameters": {"lr": lr}, **changes}


def flat(value, path=""):
    """Nested dicts, lists, tuples and dataclasses as {path: leaf}."""
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in flat(x, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), path)
    return {path: value}


def read_log(folder):
    """Rows of a run's log.csv but for the clocks; [] where there is none."""
    path = Path(folder, "log.csv")
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in csv.DictReader(lines)]


def events(folder, *kinds):
    """A sweep's events of these kinds, or all, whose line is whole."""
    path = Path(folder, "state.jsonl")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [e for e in map(json.loads, lines) if e["event"] in kinds or not kinds]


def outcome(folder):
    """What must not depend on how often a sweep was killed."""
    return {
        "new": [e["params"] for e in events(folder, "new")],
        "curves": {e["trial"]: e["history"] for e in events(folder, "epochs")},
        "judged": [(e["trial"], e["verdict"]) for e in events(folder, "judged")],
        "ended": [(e["trial"], e["event"]) for e in events(folder, "finished", "failed")],
    }


# ---------------------------------------------------------------- commands


def run_python(*words, cwd, timeout=120, python=(sys.executable,)):
    """Python with one thread on a command line of these words: CompletedProcess."""
    command = [*python, *map(str, words)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    options = {"cwd": cwd, "env": env, "timeout": timeout, "capture_output": True, "text": True}
    return subprocess.run(command, check=False, **options)


def run_script(name, *flags, **options):
    """A script of the root as a user runs it, as `run_python` does."""
    return run_python(ROOT / name, *flags, **options)


def error_line(said, *words):
    """The one error line of an output; it has all words."""
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    return line


def processes(word):
    """{process id: words of its command line} where one begins with `word`."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(w.startswith(word) for w in words):
                found[int(process.name)] = words
    return found


def marked(mark):
    """Process ids, but for our own, whose environment says MARK=mark; children inherit it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"MARK={mark}\0".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def wait_for(what, ready, seconds=300):
    """ready()'s value once it is true. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (value := ready()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of this size (tmpfs) on a folder; yields whether it could be mounted."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def browse(path):
    """A page's DOM as headless Chromium has it (Debian: chromium); skips where there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={path.parent / 'user'}", path.as_uri()]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=120, check=True
    ).stdout.decode()


# ---------------------------------------------------------------- processes of the whole suite


def pytest_xdist_auto_num_workers(config):
    """One a core, four at most since each holds torch, for a whole run; for tests that were named
    none, since workers would import more than the tests take."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and not config.option.keyword
    cores = len(os.sched_getaffinity(0))
    return min(cores, 4) if whole and cores > 1 else 0


# ---------------------------------------------------------------- fixtures


@pytest.fixture(autouse=True)
def plain_engine(monkeypatch, tmp_path_factory):
    """PyTorch in float32 predicts, whatever is installed and the processor can do, unless a test
    asks for something else; what OpenVINO compiles stays out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    if "engine" in sys.modules:  # else torch is not needed
        monkeypatch.setattr(sys.modules["engine"], "has_bf16", lambda: False)


@pytest.fixture
def script(tmp_path, monkeypatch, capfd):
    """script("data.py", *flags) -> CompletedProcess of a command in tmp_path, as `run_script` has
    it, but in this process, whose packages are loaded."""

    def call(name, *flags):
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        main = importlib.import_module(name.removesuffix(".py")).main
        try:
            code = main([*map(str, flags)])
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(flags, code, *capfd.readouterr())

    return call


@pytest.fixture
def one_line():
    """Checks that a failed run said what is wrong in one line with all `words`; returns it."""

    def check(result, *words, code=2):
        assert result.returncode == code, result.stdout + result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
        return error_line(result.stderr, *words)

    return check


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Words before a script's name that run it as `python` does, without the time of its imports:
    see warm.py."""
    path = tmp_path_factory.mktemp("warm") / "socket"
    os.environ["WARM"] = str(path)
    command = [sys.executable, str(ROOT / "tests/warm.py")]
    with subprocess.Popen([*command, "--serve"], stdin=subprocess.PIPE) as server:
        wait_for("the server", lambda: path.exists() or server.poll() is not None)
        yield command
        server.stdin.close()


@pytest.fixture(scope="session")
def receipts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("receipts") / "s"
    draw_pages(folder)
    return folder


@pytest.fixture
def work(tmp_path, receipts, monkeypatch):
    """An empty working directory with the receipts at `s`; puts signal handlers back."""
    (tmp_path / "s").symlink_to(receipts)
    monkeypatch.chdir(tmp_path)
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in old.items():
        signal.signal(number, handler)
