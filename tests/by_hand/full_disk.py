"""A disk filled to the last byte at each kind of write: python tests/by_hand/full_disk.py

Root is needed, to mount a tmpfs. Each command meets a disk with ever more room, from not a byte to
enough. Until it is enough, the command must end with an error of one line, whatever was written
before must be whole, and nothing half-written may lie about; then the same command must go on and
end like the undisturbed one. Prints a row a kind of write; exit code 1 on any difference; without
root it says so in one line and exits 0. About 2 minutes on two idle cores.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import hashlib
import importlib
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import draw_pages, error_line, outcome, run_script, small_disk
from kill_loop import LOG, SWEEP, TINY, call, check_whole, child, exit_code_of, same_weights

PAGE = os.sysconf("SC_PAGE_SIZE")  # what a tmpfs gives and takes


def fill(free):
    """Fill the disk of the working folder but for `free` bytes."""
    with open("filler", "wb") as file:
        size = 0
        for step in (1 << 20, PAGE):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), size, step)
                    size += step
        os.ftruncate(file.fileno(), max(size - free, 0))


def digests(folder):
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main_of(script, *flags):
    """The exit code and output of a script's main() in a child."""

    def run():
        return importlib.import_module(script).main(list(map(str, flags)))

    LOG.unlink(missing_ok=True)
    return exit_code_of(child(run)), LOG.read_text(errors="replace")


def rising(levels, run, folder, same_until_done=True):
    """Run at each number of free bytes until it works; returns (failures, an error line)."""
    failures, said = 0, ""
    for free in [*levels, None]:
        if free is not None:
            fill(free)
        before = digests(folder)
        code, text = run()
        Path("filler").unlink(missing_ok=True)
        if code == 0:
            break
        assert free is not None, f"fails with room: {text}"
        assert "Traceback" not in text, text
        failures, said = failures + 1, error_line(text)
        if same_until_done:
            assert digests(folder) == before, set(digests(folder).items()) ^ set(before.items())
        call(check_whole, Path(folder))
    return failures, said


def training():
    """last.pt, prev.pt, best.pt and log.csv, in an epoch's order."""
    flags = [*TINY, "--epochs=3", "--T_max=3"]
    assert main_of("train", *flags, "--name=calm")[0] == 0
    assert main_of("train", *flags, "--name=full", "--stop-epoch=1")[0] == 0
    files = [Path("runs/full", n).stat().st_size for n in ("best.pt", "last.pt")]
    best, last = (-(-size // PAGE) * PAGE for size in files)
    # before, inside and just after each write; a checkpoint's temporary stands beside the old one
    levels = [0, PAGE, best + PAGE, last - PAGE, last + PAGE, last + 2 * PAGE, last + 4 * PAGE]

    def run():
        return main_of("train", *flags, "--name=full", "--resume")

    result = rising(levels, run, "runs/full", same_until_done=False)
    call(same_weights, Path("runs/calm"), Path("runs/full"))
    return result


def output(*command):
    """A command whose output exists from before: that stays, or is replaced whole."""
    code, text = main_of(*command)
    assert code == 0, text
    return rising([0, 0], lambda: main_of(*command), "out")


OUTPUTS = {
    "predictions": ("evaluate", "runs/calm/best.pt", "--data=pages", "--out=out/p.json"),
    "submission": ("ensemble", "runs/calm/best.pt", "--data=pages", "--submission=out/s.csv"),
    "split": ("data", "split", "pages", "--folds=2", "--out=out/split.json"),
}


def sweep():
    """sweep.json, state.jsonl, report.md, the trials' logs and all that train.py writes."""
    Path("s.json").write_text(json.dumps({**SWEEP, "run_cap": 2}))
    flags = ["s.json", *TINY, "--epochs=2", "--T_max=2", "--name"]

    def run(name="full_s"):
        done = run_script("sweep.py", *flags, name, cwd=".", timeout=600)
        return done.returncode, done.stdout + done.stderr

    assert run("calm_s")[0] == 0
    checkpoints = 40 * PAGE + 2 * Path("runs/full/last.pt").stat().st_size
    levels = [0, PAGE, 3 * PAGE, 5 * PAGE, checkpoints // 3, checkpoints, checkpoints * 2]
    result = rising(levels, run, "runs", same_until_done=False)
    assert outcome("runs/full_s") == outcome("runs/calm_s")
    return result


def main():
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        disk = Path(folder, "disk")
        with small_disk(disk, "96m") as mounted:
            if not mounted:
                print("skipped: mounting a tmpfs needs root")
                return 0
            os.chdir(disk)
            Path("out").mkdir()
            call(draw_pages, "pages", 16)
            outputs = {name: partial(output, *command) for name, command in OUTPUTS.items()}
            for name, kind in {"training": training, **outputs, "sweep": sweep}.items():
                try:
                    failures, said = kind()
                except AssertionError as error:
                    print(f"FAILED {name}: {error}")
                    return 1
                print(f"{name:12s} {failures:2d} times full, then equal  {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
