"""Does training work on this device? One line a check, about five minutes on a GPU.

python tests/by_hand/smoke.py [ROW ...] [--device cuda] [--data DATA] [--seconds 180]

Every check runs the scripts as a user types them, on a tiny network and drawn pages (or DATA, a
folder with train and val labels), in a temporary folder. On a CPU, what needs a GPU is skipped by
name. Exit code 1 if a check failed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import NETWORK, ROOT, draw_pages, marked, processes, read_log, wait_for

import data
import labels
from command import Parser
from hparams import Hparams

SIZE = 192


class Skipped(Exception):
    pass


class Failed(Exception):
    pass


# ---------------------------------------------------------------- commands


def start(script, *words):
    """A script as a process whose output goes to the file `said`."""
    with open("said", "w") as said:
        command = [sys.executable, str(ROOT / script), *words]
        environment = os.environ | {"MARK": os.getcwd(), "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, stdout=said, stderr=said, env=environment)


def said():
    return Path("said").read_text(errors="replace")


def end(process, args, *codes):
    """Wait for a process. Raises Failed unless it ends with one of the codes, and all of its loader
    processes with it; TimeoutExpired."""
    code = process.wait(args.seconds)
    if code not in codes:
        raise Failed(f"exit code {code} instead of {codes[0]}: {last_line()}")
    wait_for("its loader processes to end", lambda: not marked(os.getcwd()), 20)


def last_line():
    return (said().strip().splitlines() or [""])[-1]


def run(args, script, *words, codes=(0,)):
    end(start(script, *words, f"--device={args.device}"), args, *codes)


def train(args, name, *words, codes=(0,)):
    run(args, "train.py", *train_words(args, name, *words), codes=codes)


def train_words(args, name, *words):
    loaders = 2 if on_cpu(args) else -1  # -1: as the machine has cores
    own = f"--data={args.data}", f"--name={name}"
    short = f"--size={SIZE}", "--batch=4", "--epochs=2", "--T_max=2", f"--workers={loaders}"
    return (*NETWORK, *own, *short, *words)


def begin(args, name):
    """A long training, in its second epoch."""
    words = train_words(args, name, "--epochs=40", "--T_max=40", f"--device={args.device}")
    process = start("train.py", *words)

    def is_there():
        return "epoch   1/" in said() or process.poll() is not None

    wait_for("the first epoch", is_there, args.seconds)
    return process


def on_cpu(args):
    return torch.device(args.device).type == "cpu"


def need_cuda(args):
    if on_cpu(args):
        raise Skipped("needs CUDA")


def last_epoch(name):
    rows = read_log(Path("runs", name))
    return f"epoch {rows[-1]['epoch']}, loss {float(rows[-1]['loss']):.3f}"


# ---------------------------------------------------------------- checks


def check_epochs(args):
    """Two epochs, two loader processes, validation, last.pt."""
    train(args, "first")
    return last_epoch("first")


def check_stop(args):
    """SIGTERM after the first epoch: saved, exit code 143."""
    process = begin(args, "stopped")
    process.send_signal(signal.SIGTERM)
    end(process, args, 143)
    return re.search("stopped .*(?=; go on)", said())[0]


def check_resume(args):
    """The run that was stopped goes on."""
    epochs = len(read_log(Path("runs/stopped"))) + 1
    run(args, "train.py", "--resume", "--name=stopped", f"--stop-epoch={epochs}")
    resumed = re.search("resuming .*", said())[0]
    return f"{resumed}, then {last_epoch('stopped')}"


def check_bf16(args):
    train(args, "bf16", "--amp=bf16", "--epochs=1", "--T_max=1")
    return last_epoch("bf16")


def check_fp16(args):
    need_cuda(args)
    train(args, "fp16", "--amp=fp16", "--epochs=1", "--T_max=1")
    return last_epoch("fp16")


def check_memory(args):
    """A batch that fits on no GPU: exit code 3 before the first step."""
    need_cuda(args)
    train(args, "large", "--size=4096", "--batch=64", codes=(3,))
    return last_line()


def check_loader(args):
    """A loader process is killed: exit code 137 and one line."""
    process = begin(args, "killed")
    loaders = processes("from multiprocessing.forkserver").keys() & {*marked(os.getcwd())}
    os.kill(max(loaders), signal.SIGKILL)  # the lowest is the fork server
    end(process, args, 137)
    return last_line()


def check_evaluate(args):
    run(args, "evaluate.py", "runs/first/last.pt")
    return re.search("hmean .*", said())[0]


def check_ensemble(args):
    """Two members on labelled pages; the gate may stay shut."""
    members = "runs/first/last.pt", "runs/bf16/last.pt"
    run(args, "ensemble.py", *members, f"--data={args.data}", codes=(0, 5))
    return last_line()


def check_compile(args):
    """Two canvases, compiled once. On a CPU this is minutes of g++; the tests compile a
    smaller network there."""
    need_cuda(args)
    os.environ["TORCH_LOGS"] = "recompiles"
    try:
        train(args, "compiled", "--compile", "--epochs=1", "--T_max=1", "--batch=2")
    finally:
        del os.environ["TORCH_LOGS"]
    again = said().count("Recompiling function")
    pages = labels.load_labels(args.data, "train")
    data.inspect_pages(pages)
    batches = data.epoch_batches(pages, Hparams(size=SIZE, batch=2), 0)
    canvases = {batch[0][2:] for batch in batches}
    return f"{len(canvases)} canvases, compiled again {again} times, {last_epoch('compiled')}"


CHECKS = {
    "epochs": check_epochs,
    "stop": check_stop,
    "resume": check_resume,
    "bf16": check_bf16,
    "fp16": check_fp16,
    "memory": check_memory,
    "loader": check_loader,
    "evaluate": check_evaluate,
    "ensemble": check_ensemble,
    "compile": check_compile,
}


def outcome(check, args):
    """("ok", "skipped" or "FAILED", what it says)."""
    try:
        return "ok", check(args)
    except Skipped as reason:
        return "skipped", str(reason)
    except Exception as error:  # noqa: BLE001 a check that fails is a finding, and others follow
        return "FAILED", f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        for pid in marked(os.getcwd()):
            os.kill(pid, signal.SIGKILL)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*CHECKS, []], default=[], help="(all)")
    parser.add_argument("--device", default="cuda", help="or cpu (cuda)")
    parser.add_argument("--data", help="folder of pages (drawn)")
    parser.add_argument("--seconds", type=int, default=180, help="most of one command (180)")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="smoke-")
    if args.data:
        args.data = str(Path(args.data).resolve())
    os.chdir(folder)
    if not args.data:
        draw_pages("pages", 16)
        args.data = "pages"

    failed = 0
    for name in args.rows or CHECKS:
        began = time.monotonic()
        word, text = outcome(CHECKS[name], args)
        failed += word == "FAILED"
        print(f"{word:8s} {name:9s} {time.monotonic() - began:5.0f} s  {text}", flush=True)
        if word == "FAILED":
            print(said(), file=sys.stderr)
    shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
