"""On what does a network run? The device, the number type and the engine that predicts."""

import contextlib
import importlib
import io
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch

from files import UsageError, replace_file

ENGINES = "auto", "torch", "openvino", "onnxruntime"


# ---------------------------------------------------------------- device


def choose_device(name, work=True):
    """torch.device of --device, made the current one; `auto` is CUDA where there is one. work:
    whether anything will be computed on it. Raises UsageError if there is no such device or, with
    `work`, if the installed torch has no kernels for it or cannot use its driver."""
    gpus = torch.cuda.device_count()
    where = f"--device {name}"
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(where, "not a device", "use cuda, cuda:1 or cpu") from None
    # torch takes cuda:999 for -25
    is_gpu_here = device.type == "cuda" and 0 <= (device.index or 0) < gpus
    if device.type != "cpu" and not is_gpu_here:
        raise UsageError(where, f"not here, with {gpus} CUDA devices", "use cpu")
    try:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what asks for no device means the current one
        if work:
            torch.ones(1, device=device)  # the least that runs a kernel
    except RuntimeError as error:
        if not torch.cuda.is_available():  # GPUs are counted without asking their driver
            what = f"torch cannot use it ({str(error).partition('. ')[0]})"
            remedy = "update the driver, install torch's wheel for that driver, or use cpu"
            raise UsageError(where, what, remedy) from None
        if "no kernel image" not in str(error):
            raise
        raise UsageError(
            where,
            f"torch serves no such GPU, but {', '.join(torch.cuda.get_arch_list())}",
            "install torch's wheel for that GPU, or use cpu",
        ) from None
    return device


def describe_machine(device, dtype, engine="torch"):
    """The device, the number type and the versions of a run, as one line."""
    kind = str(dtype or torch.float32).removeprefix("torch.")
    if device.type != "cuda":
        place = f"device {device} ({torch.get_num_threads()} threads)"
        version = find_package(engine).__version__.split("-")[0]
        return f"{place}, {kind}, {engine} {version}"

    recent = torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype is torch.bfloat16 and not recent:
        kind += " (emulated here: --amp fp16 is faster)"
    if dtype is None and recent:
        kind += " (convolutions in TF32)"
    name = torch.cuda.get_device_name(device)
    cuda = torch.version.cuda
    return f"device {device} ({name}), {kind}, torch {torch.__version__}, CUDA {cuda}"


def amp_dtype(amp, device):
    """Type to compute in, or None for float32: `auto` is bf16 where the GPU has it, else fp16; CPUs
    use float32 unless amp is bf16, which makes prediction faster where they have AMX."""
    if amp == "off" or (device.type != "cuda" and amp != "bf16"):
        return None
    recent = amp == "auto" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if amp == "bf16" or recent else torch.float16


# ---------------------------------------------------------------- prediction


class Runtime(NamedTuple):
    """On what a network predicts: the device, a name of ENGINES without `auto`, and --amp, which
    is not `auto` on a CPU."""

    device: torch.device
    engine: str
    amp: str

    def __str__(self):
        return describe_machine(self.device, amp_dtype(self.amp, self.device), self.engine)


def choose_runtime(device, engine, amp, is_onnx):
    """The Runtime of --engine and --amp for a checkpoint or an ONNX model: on a CPU `auto` is
    OpenVINO where it is installed, and bf16 where the processor has it. Raises UsageError."""
    if engine in (None, "auto"):
        engine = "onnxruntime" if is_onnx else "torch"
        if device.type == "cpu" and find_package("openvino"):
            engine = "openvino"
    where = f"--engine {engine}"
    if engine not in ENGINES:
        raise UsageError(where, f"not one of {', '.join(ENGINES)}")
    if is_onnx and engine == "torch":
        raise UsageError(where, "does not read ONNX", "use openvino or onnxruntime")
    if engine != "torch" and device.type != "cpu":
        raise UsageError(where, f"not for {device}", "add --device cpu")
    if not find_package(engine):
        raise UsageError(where, "needs a package", f"pip install {engine}")

    if engine == "onnxruntime":
        amp = "off"
    elif amp == "auto" and device.type == "cpu":
        amp = "bf16" if has_bf16() else "off"
    return Runtime(device, engine, amp)


def find_package(name):
    """A module, or None where it cannot be imported."""
    sys.modules["openvino_telemetry"] = None  # it would report conversions to OpenVINO's makers
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)


def has_bf16():
    """Whether the processor multiplies in bf16 itself; others emulate that, and are slow."""
    with contextlib.suppress(OSError):  # not Linux
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def load_engine(runtime, digest, make, onnx=None):
    """A function that predicts: pages uint8 [B, H, W, 3] -> logits [B, 1, H, W]. Its network is the
    DBNet that make() returns or, if `onnx` is given, an ONNX model of Probability: its path, or for
    onnxruntime its bytes. digest: of the DBNet's weights; names what OpenVINO has compiled."""
    if runtime.engine == "torch":
        return make()
    if runtime.engine == "openvino":
        run = Compiled(compile_openvino(runtime, digest, make, onnx))
        if not onnx:
            return run
    else:
        run = onnx_function(onnx or onnx_graph(make()))

    def logits(pages):
        pages = pages.permute(0, 3, 1, 2) / 255
        return torch.logit(run(pages), eps=1e-6)

    return logits


def compile_openvino(runtime, digest, make, onnx):
    """OpenVINO's compiled model, see `load_engine`. Those of the last 8 DBNets are kept in the
    user's cache, since to make one takes as long as many pages."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if runtime.amp == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": lanes(),
        "ENABLE_CPU_PINNING": False,  # two commands would bind their threads to the same cores
    }
    core = openvino_core()
    if onnx:
        return core.compile_model(onnx, "CPU", options)

    name = f"{digest}-{runtime.amp}-{openvino.__version__.split('-')[0]}"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        file = Path(cache, "receipt-text", name).expanduser()
    except RuntimeError:  # a user without a home, as of a service: nothing can be kept there
        file = Path(os.devnull, name)
    with contextlib.suppress(OSError, RuntimeError):  # not there, or damaged
        return core.import_model(file.read_bytes(), "CPU", options)

    with warnings.catch_warnings(action="ignore"):  # of torch.jit
        graph = openvino.convert_model(
            make(),
            example_input=torch.zeros(1, 96, 64, 3, dtype=torch.uint8),
        )
    compiled = core.compile_model(graph, "CPU", options)
    buffer = io.BytesIO()
    compiled.export_model(buffer)
    with contextlib.suppress(OSError):  # a disk that is full or read-only
        replace_file(file, buffer.getvalue())
        for old in sorted(file.parent.iterdir(), key=os.path.getmtime)[:-8]:
            old.unlink()
    return compiled


@cache
def openvino_core():
    """OpenVINO itself, kept until the process ends: it gives the main thread a stack for signals
    and, dropped by any other thread, leaves that stack unmapped; then Ctrl-C would be a crash."""
    import openvino

    # without this first look into a tensor, two threads that take their first look at once wait for
    # ever: one holds a lock of OpenVINO's bindings and waits for Python's, the other holds Python's
    openvino.Tensor(torch.zeros(1).numpy()).data.sum()
    return openvino.Core()


class Compiled:
    """A network that OpenVINO has compiled, as a function. A DBNet: pages uint8 [B, H, W, 3] ->
    logits [B, 1, H, W]; an ONNX model of Probability: pages float32 [B, 3, H, W] -> probabilities
    [B, 1, H, W]. Several threads may call it, and each gets its own maps: two pages at once are
    faster than one after the other on all cores."""

    def __init__(self, compiled):
        self.submit = ThreadPoolExecutor(lanes()).submit
        self.requests = SimpleQueue()
        for _ in range(lanes()):
            self.requests.put(compiled.create_infer_request())

    def __call__(self, pages):
        request = self.requests.get()
        try:
            output = request.infer(pages.numpy())[0]
        finally:
            self.requests.put(request)
        return torch.from_numpy(output)


def lanes():
    """How many pages OpenVINO predicts at once."""
    return min(2, torch.get_num_threads())


def launch(model, batch, amp, device):
    """Start a network on pages uint8 [B, H, W, 3], H and W multiples of 32: a function that waits
    for its maps uint8 [B, H, W]."""
    if isinstance(model, Compiled):
        return model.submit(compute_maps, model, batch, amp, device).result
    maps = compute_maps(model, batch, amp, device)
    if device.type != "cuda":
        return lambda: maps
    event = torch.cuda.current_stream(device).record_event()

    def wait():
        event.synchronize()
        return maps

    return wait


@torch.no_grad()
def compute_maps(model, batch, amp, device):
    """Maps uint8 [B, H, W] of pages uint8 [B, H, W, 3], in the CPU's memory. A GPU fills them in
    later, once it has done all that it was given so far."""
    pages = torch.from_numpy(batch)
    if device.type == "cuda":
        pages = pages.pin_memory()
    dtype = amp_dtype(amp, device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = model(pages.to(device, non_blocking=True))  # [B, 1, H, W]
    maps = (logits[:, 0].float().sigmoid() * 255).round().to(torch.uint8)
    return maps.to("cpu", non_blocking=True)


# ---------------------------------------------------------------- ONNX


class Probability(torch.nn.Module):
    """RGB [B, 3, H, W] in 0..1, H and W multiples of 32 -> probabilities [B, 1, H, W]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pages):
        return self.model((255 * pages).permute(0, 2, 3, 1)).sigmoid()


def onnx_graph(model):
    """A DBNet as the bytes of an ONNX model of Probability, for any B, H and W."""
    buffer = io.BytesIO()
    free = {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings(action="ignore"):  # the newer exporter needs one more package
        torch.onnx.export(
            Probability(model).eval(),
            torch.rand(1, 3, 96, 64),
            buffer,
            input_names=["pages"],
            output_names=["map"],
            dynamic_axes={"pages": free, "map": free},
            dynamo=False,
        )
    return buffer.getvalue()


def onnx_function(graph):
    """onnxruntime's function of an ONNX model of Probability, a path or bytes: pages float32 [B, 3,
    H, W] -> probabilities [B, 1, H, W]."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda pages: torch.from_numpy(session.run(None, {"pages": pages.numpy()})[0])
