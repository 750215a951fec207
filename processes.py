"""Which processes train together? Those that torchrun started, the signals that stop them together,
and what PyTorch's errors mean."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import cv2
import torch
import torch.distributed as dist

from engine import choose_device
from files import DataError, UsageError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 8  # seconds that a process may stand still after a signal
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

# ---------------------------------------------------------------- a group


def join_group():
    """Join the processes that torchrun started. Returns their store; None for a single process."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None

    # torchrun's store keeps what processes wrote before it started them again
    store, number, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)

    gpus = torch.cuda.is_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        timeout=timedelta(minutes=10),  # for either backend
        store=store,
        rank=number,
        world_size=size,
    )
    threading.Thread(target=follow_agent, args=(os.getppid(),), daemon=True).start()

    # NCCL, unlike gloo, waits in silence for a process that is lost
    if gpus:
        heard, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written)
        threading.Thread(target=end_if_blocked, args=(heard, store), daemon=True).start()
    return store


def device_of_process(name):
    """torch.device of --device; under torchrun each process has its own GPU. Kubeflow starts one
    process a machine, without LOCAL_RANK. Raises UsageError."""
    gpus = torch.cuda.device_count()
    if dist.is_initialized() and gpus and name.startswith(("auto", "cuda")):
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if processes > gpus:
            raise UsageError(
                "torchrun",
                f"{processes} processes, {gpus} GPUs",
                "lower --nproc-per-node",
            )
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return choose_device(name)


def follow_agent(agent):
    """Stop this process, as a SIGTERM does, when the torchrun that started it is gone."""
    while os.getppid() == agent:
        time.sleep(1)
    print("torchrun is gone: stopping", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)


def end_if_blocked(heard, store):
    """End this process when a process of the group is lost: GRACE seconds after a stop signal, if
    its main thread has stood still for that long and nothing is being saved. The main thread waits
    for the lost one in a call to the device, during which Python runs no handler of a signal; but
    its number comes through the pipe `heard`."""
    number = 0
    while number not in STOP_SIGNALS:
        number = os.read(heard, 1)[0]
    store.add("stopping", 1)

    still = 0
    place = None
    while still < GRACE:
        time.sleep(1)
        if store.add("stopping", 0) == process_count():
            return  # all are there, and stop together
        before = place
        frame = sys._current_frames()[threading.main_thread().ident]
        place = frame, frame.f_lasti
        saving = any(thread.name == "save" for thread in threading.enumerate())
        still += 1
        if place != before or saving:
            still = 0
    os._exit(128 + number)


def rank():
    """The number of this process in its group, from 0; process 0 alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(make):
    """What make() gives in process 0, in every process."""
    box = [make() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]


def total(values):
    """A tensor on the CPU summed over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


# ---------------------------------------------------------------- signals


class Stop:
    """CTRL-C and SIGTERM as a flag that the loop looks at between steps, inside `with stop:`."""

    def __init__(self):
        self.signal = None  # what this process received
        self.agreed = None  # what all processes act upon

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.request) for number in STOP_SIGNALS}

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def request(self, number, _):
        again = self.signal == number == signal.SIGINT
        if again and not dist.is_initialized():
            raise KeyboardInterrupt  # the second CTRL-C does not wait for the step
        self.signal = number

    def agree(self):
        """The signal that any process received, or None. All processes call this at the same step,
        so that they stop together."""
        received = torch.tensor([self.signal == number for number in STOP_SIGNALS]).double()
        counts = total(received).tolist()
        self.agreed = next((n for n, count in zip(STOP_SIGNALS, counts) if count), None)
        return self.agreed


# ---------------------------------------------------------------- errors


def explain_errors(work, store=None):
    """work(). Raises DataError where an error of PyTorch has words for users, else that error."""
    try:
        return work()
    except ValueError as error:
        if "value per channel" not in str(error):
            raise
        # a page of 32 x 32 px, or a backbone that takes means over the page, such as skresnet18
        what = "one page a process is one value a channel, which has no spread"
        raise UsageError("batch norm", what, "raise --batch, or use --freeze-bn") from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        text = str(error)
        if "shared memory" in text and "No space left" in text:
            remedy = "lower --workers, or raise its size (Docker: --shm-size=8g)"
            raise DataError("/dev/shm", "is full", remedy) from None

        if "TORCHDYNAMO_VERBOSE" in text and "out of memory" not in text:
            remedy = "without g++ and Python's headers leave it out (--resume --no-compile)"
            raise UsageError("--compile", text.splitlines()[0], remedy) from None

        # a worker that was killed tears its pipe, or PyTorch notices that it is gone
        torn = not isinstance(error, RuntimeError | BrokenPipeError)
        killed = "DataLoader worker" in text or "Pin memory thread" in text
        if torn or (killed and not text.startswith("Caught")):
            remedy = "was memory or /dev/shm full? lower --workers"
            raise DataError("a loader process", "was killed", remedy, 137) from None

        if store and any(word in text for word in ("gloo", "NCCL", "peer", "onnection")):
            remedy = "the run folder keeps the last whole epoch"
            raise DataError("a process of the group", "was lost", remedy, 137) from None
        raise


# ---------------------------------------------------------------- loader processes


def start_worker(_):
    # CTRL-C goes to the whole group; the trainer saves, and needs the batches for it
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=follow_trainer, daemon=True).start()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    keep_memory()


def keep_memory():
    """Let this process keep the memory that it frees (glibc's mallopt(3)). A sample takes and frees
    dozens of arrays of a few MB. Linux would get each of them back, and clear its pages again for
    the next: that is a fifth of the time of a sample of scans."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**28)
        mallopt(M_MMAP_THRESHOLD, 2**25)


def follow_trainer():
    """End a loader process when its trainer is gone, which the fork server between them hides."""
    torch.multiprocessing.parent_process().join()
    os._exit(1)
