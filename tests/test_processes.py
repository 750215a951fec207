"""Processes that train together: their devices, lost ones, PyTorch's errors. GPUs are emulated."""

import platform
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_python

import processes
from files import DataError, UsageError


def test_each_process_has_its_own_gpu_and_touches_no_other(monkeypatch):
    """The second of two processes on two GPUs, emulated."""
    touched = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: touched.append(str(device)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: touched.append(str(device)))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    devices = [str(processes.device_of_process(name)) for name in ("auto", "cuda", "cpu")]
    assert devices == ["cuda:1", "cuda:1", "cpu"]
    assert touched == ["cuda:1"] * 4 + ["cpu"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 processes, 2 GPUs"):
        processes.device_of_process("auto")
    # Kubeflow's PyTorchJob: one process a machine, and it ended in a KeyError
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert str(processes.device_of_process("auto")) == "cuda:0"


@pytest.mark.parametrize("gpus", [False, True])
def test_processes_wait_ten_minutes_for_each_other_in_either_backend(gpus, monkeypatch):
    joined, threads = [], []
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: joined.append((a, k)))

    def note(target, **_):
        threads.append(target)
        return SimpleNamespace(start=int)

    monkeypatch.setattr(processes.threading, "Thread", note)
    monkeypatch.setattr(signal, "set_wakeup_fd", int)
    assert processes.join_group() is not None
    (((backend,), options),) = joined
    assert backend == ("cpu:gloo,cuda:nccl" if gpus else "gloo")
    assert options["timeout"] == timedelta(minutes=10)
    assert (
        threads == [processes.follow_agent] + [processes.end_if_blocked] * gpus
    )  # gloo notices a loss


BLOCKED = f"""
import ctypes, os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import processes
import torch.distributed as dist
trouble = sys.argv[1]
processes.GRACE = 2
def work():
    for _ in range(1000):
        sum(range(1000))
store = dist.HashStore()
if trouble == "all there":
    store.add("stopping", 1)
processes.process_count = lambda: 2
heard, written = os.pipe()
os.set_blocking(written, False)
signal.set_wakeup_fd(written)
threading.Thread(target=processes.end_if_blocked, args=(heard, store), daemon=True).start()
signal.signal(signal.SIGUSR1, lambda *_: None)  # no signal to stop
os.kill(os.getpid(), signal.SIGUSR1)
with processes.Stop() as _:
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Timer(8, lambda: os._exit(9)).start()
    if trouble == "saving":
        threading.Thread(target=time.sleep, args=(60,), name="save", daemon=True).start()
    while trouble == "working":
        work()
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)  # for ever, whatever signal comes
"""


def test_a_process_that_waits_for_a_lost_one_ends_soon_after_a_signal(warm, tmp_path):
    """Its main thread is blocked in a call during which Python runs no handler. Left alone are a
    process that saves, one that computes, and one whose group is whole; these are ended by the test
    (9)."""
    (tmp_path / "blocked.py").write_text(BLOCKED)

    def run(trouble):
        began = time.monotonic()
        ended = run_python("blocked.py", trouble, cwd=tmp_path, python=warm)
        return ended, time.monotonic() - began

    codes = {"lost": 143, "saving": 9, "working": 9, "all there": 9}
    with ThreadPoolExecutor() as pool:
        for trouble, (ended, seconds) in zip(codes, pool.map(run, codes), strict=True):
            assert ended.returncode == codes[trouble], (trouble, ended.stderr)
            assert seconds > 2


try:
    torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
except ValueError as error:
    ONE_VALUE = error

# as torch._inductor.exc.InductorError says it
NO_COMPILER = RuntimeError(
    "InvalidCxxCompiler: No working compiler\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack"
)


@pytest.mark.parametrize(
    "error, what, code",
    [
        (
            RuntimeError("Pin memory thread exited unexpectedly"),
            "a loader process: was killed",
            137,
        ),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal"), "a loader process", 137),
        (EOFError(), "a loader process: was killed", 137),
        (RuntimeError("NCCL communicator was aborted"), "a process of the group: was lost", 137),
        (RuntimeError("No space left: shared memory"), "/dev/shm: is full", 1),
        (NO_COMPILER, "--compile: InvalidCxxCompiler: No working compiler; without g++", 2),
        (ONE_VALUE, "batch norm: one page a process is one value a channel", 2),
        (DataError("a.jpg", "is broken"), "a.jpg: is broken", 1),
    ],
)
def test_errors_of_pytorch_have_words(error, what, code):
    def fail():
        raise error

    with pytest.raises(DataError) as told:
        processes.explain_errors(fail, store=object())
    assert str(told.value).startswith(what) and told.value.code == code
    with pytest.raises(RuntimeError, match="NCCL"):
        processes.explain_errors(lambda: (_ for _ in ()).throw(RuntimeError("NCCL")))


def test_an_environment_without_a_port_is_not_that_of_torchrun(monkeypatch):
    """As clusters set it for other programs."""
    for key, text in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(key, text)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert processes.join_group() is None


FAULTS = f"""
import resource, sys
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
import processes

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        arrays = [np.ones(2**20) for _ in range(3)]  # 8 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
processes.keep_memory()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of another C library")
def test_a_loader_process_keeps_the_memory_that_it_frees(tmp_path):
    """Each page of memory that comes back from Linux is a fault, and is cleared first."""
    plain, kept = map(int, run_python("-c", FAULTS, cwd=tmp_path).stdout.split())
    assert plain > 20_000 and kept < plain / 4
