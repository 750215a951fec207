"""Tests import the scripts by name and run them as a user does, from an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def script(tmp_path):
    """script("train.py", *flags) -> CompletedProcess, run in tmp_path with one thread."""

    def run(name, *flags, timeout=120):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(ROOT / name), *map(str, flags)]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def one_line():
    """Checks that a failed run said what is wrong in one line that holds all `words`; returns it."""

    def check(result, *words, code=2):
        assert result.returncode == code, result.stdout + result.stderr
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        for word in words:
            assert word in lines[0]
        return lines[0]

    return check
