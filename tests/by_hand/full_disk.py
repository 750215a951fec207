"""A disk filled to the last byte at each kind of write: python tests/by_hand/full_disk.py

Root is needed, to mount a tmpfs. Each command meets a disk with ever more room, from not a byte to
enough. Until it is enough, the command must end with an error of one line, whatever was written
before must be whole, and nothing half-written may lie about; then the same command must go on and
end like the undisturbed one. Prints a row a kind of write; exit code 1 on any difference; without
root it says so in one line and exits 0. About 2 minutes on two idle cores.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from kill_loop import ROOT, SWEEP, TINY, call, check_files, child, outcome, same_weights

PAGE = os.sysconf("SC_PAGE_SIZE")  # what a tmpfs gives and takes


def fill(free):
    """Fill the disk of the working folder but for `free` bytes."""
    with open("filler", "wb", buffering=0) as file:
        try:
            while True:
                os.posix_fallocate(file.fileno(), file.seek(0, 2), 1 << 20)
                file.seek(0, 2)
        except OSError:
            pass
        size, step = os.fstat(file.fileno()).st_size, PAGE
        try:
            while True:
                os.posix_fallocate(file.fileno(), size, step)
                size += step
        except OSError:
            pass
        os.ftruncate(file.fileno(), max(size - free, 0))


def digests(folder):
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main_of(script, *flags):
    """The exit code of a script's main() in a child; its output goes to log.txt."""

    def run():
        sys.argv = [script, *map(str, flags)]
        module = __import__(script.removesuffix(".py"))
        return module.main(list(map(str, flags)))

    log = Path(LOG)
    log.unlink(missing_ok=True)
    code = os.waitstatus_to_exitcode(os.waitpid(child(run, log=log), 0)[1])
    lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line]
    return code, lines, log.read_text(errors="replace")


def rising(levels, run, folder, same_until_done=True):
    """Run at each number of free bytes until it works; returns (failures, an error line)."""
    failures, said = 0, ""
    for free in [*levels, None]:
        fill(free) if free is not None else Path("filler").unlink(missing_ok=True)
        before = digests(folder)
        code, lines, text = run()
        Path("filler").unlink(missing_ok=True)
        if code == 0:
            break
        assert free is not None, f"fails with room: {text}"
        assert len(lines) == 1 and "Traceback" not in text, text
        failures, said = failures + 1, lines[0]
        if same_until_done:
            assert digests(folder) == before, set(digests(folder).items()) ^ set(before.items())
        call(check_whole, Path(folder), log=LOG)
    return failures, said


def check_whole(folder):
    assert check_files(folder) == 0, [p for p in folder.rglob("*") if ".tmp" in p.name]


# ---------------------------------------------------------------- kinds of write


def training():
    """last.pt, prev.pt, best.pt, their side files and log.csv, in an epoch's order."""
    flags = [*TINY, "--epochs=3", "--T_max=3"]
    assert main_of("train.py", *flags, "--name=calm")[0] == 0
    assert main_of("train.py", *flags, "--name=full", "--stop-epoch=1")[0] == 0
    files = [Path("runs/full", n).stat().st_size for n in ("best.pt", "last.pt")]
    best, last = (-(-size // PAGE) * PAGE for size in files)
    # before, inside and just after each write; a checkpoint's temporary stands beside the old one
    levels = [0, PAGE, best + PAGE, last - PAGE, last + PAGE, last + 2 * PAGE, last + 4 * PAGE]

    def run():
        return main_of("train.py", *flags, "--name=full", "--resume")

    failures, said = rising(levels, run, "runs/full", same_until_done=False)
    call(same_weights, Path("runs/calm"), Path("runs/full"), log=LOG)
    return failures, said


def predictions():
    return output("evaluate.py", "runs/calm/best.pt", "--data=pages", "--out=out/p.json")


def submission():
    flags = ("runs/calm/best.pt", "--data=pages", "--split=val", "--submission=out/s.csv")
    return output("ensemble.py", *flags)


def split():
    return output("data.py", "split", "pages", "--folds=2", "--out=out/split.json")


def output(script, *flags):
    """A command whose output exists from before: that stays, or is replaced whole."""
    code, _, text = main_of(script, *flags)
    assert code in (0, 3), text

    def run():
        code, lines, text = main_of(script, *flags)
        return (0 if code == 3 else code), lines, text

    return rising([0, 0], run, "out")


def sweep():
    """sweep.json, state.jsonl, report.md, the trials' logs and all that train.py writes."""
    Path("s.json").write_text(json.dumps({**SWEEP, "run_cap": 2}))
    flags = ["s.json", *TINY, "--epochs=2", "--T_max=2", "--name"]

    def run(name="full_s"):
        command = [sys.executable, ROOT / "sweep.py", *flags, name]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stderr.splitlines(), done.stdout + done.stderr

    assert run("calm_s")[0] == 0
    checkpoints = 40 * PAGE + 2 * Path("runs/full/last.pt").stat().st_size
    levels = [0, PAGE, 3 * PAGE, 5 * PAGE, checkpoints // 3, checkpoints, checkpoints * 2]
    failures, said = rising(levels, run, "runs", same_until_done=False)
    assert outcome("full_s") == outcome("calm_s")
    return failures, said


def draw_pages():
    import data

    data.synth("pages", 16, 0, size=96, words=4, difficulty=0.2)


def main():
    global LOG

    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        disk, LOG = Path(folder, "disk"), Path(folder, "log.txt")
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            print("skipped: mounting a tmpfs needs root")
            return 0
        try:
            os.chdir(disk)
            Path("out").mkdir()
            call(draw_pages, log=LOG)
            for kind in (training, predictions, submission, split, sweep):
                failures, said = kind()
                row = f"{kind.__name__:12s} {failures:2d} times full, then equal  {said}"
                print(row, flush=True)
        except AssertionError as error:
            print(f"FAILED {kind.__name__}: {error}")
            return 1
        finally:
            os.chdir(ROOT)
            subprocess.run(["umount", "--lazy", disk], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
