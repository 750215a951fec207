"""Tests import the scripts by name and run them as a user does, from an empty folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data


@pytest.fixture
def script(tmp_path):
    """script("train.py", *flags) -> CompletedProcess, run in tmp_path with one thread."""

    def run(name, *flags, timeout=120):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(ROOT / name), *map(str, flags)]
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture
def one_line():
    """Checks that a failed run said what is wrong in one line with all `words`; returns it."""

    def check(result, *words, code=2):
        assert result.returncode == code, result.stdout + result.stderr
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        for word in words:
            assert word in lines[0]
        return lines[0]

    return check


@pytest.fixture(scope="session")
def receipts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("receipts") / "s"
    data.synth(folder, 8, 0, size=96, words=4, difficulty=0.2)
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
