"""On what a network runs: devices, engines, lost processes, PyTorch's errors. GPUs are emulated."""

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import import_module
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_python

import engine
import evaluate
import sources
from dbnet import DBNet
from engine import Runtime, choose_device, choose_runtime
from files import DataError, UsageError
from folding import fold
from predictions import read_predictions

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def test_a_gpu_that_this_torch_cannot_work_on_is_one_line(monkeypatch):
    """Two GPUs, emulated: the wheel has kernels for the second one only."""
    made_current, trouble = [], "no kernel image is available for execution on the device"

    def ones(*_, device):
        if device.index != 1:
            raise RuntimeError(f"CUDA error: {trouble}\nFor debugging pass CUDA_LAUNCH_BLOCKING=1")

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert choose_device("cuda:1") == torch.device("cuda:1") == made_current[0]
    for name in ("auto", "cuda", "cuda:0"):
        with pytest.raises(UsageError, match="but sm_75, sm_80; install") as error:
            choose_device(name)
        assert str(error.value).startswith(f"--device {name}: torch serves no such GPU, but sm")
    assert "\n" not in str(error.value) and len(made_current) == 2
    assert choose_device("cuda", work=False) == torch.device("cuda")  # to score a JSON, say
    trouble = "device is busy"  # no fault of the command's
    with pytest.raises(RuntimeError, match=trouble):
        choose_device("cuda")


def test_each_process_has_its_own_gpu_and_touches_no_other(monkeypatch):
    """The second of two processes on two GPUs, emulated."""
    touched = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: touched.append(str(device)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: touched.append(str(device)))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    devices = [str(engine.device_of_process(name)) for name in ("auto", "cuda", "cpu")]
    assert devices == ["cuda:1", "cuda:1", "cpu"]
    assert touched == ["cuda:1"] * 4 + ["cpu"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 processes, 2 GPUs"):
        engine.device_of_process("auto")


@pytest.mark.parametrize(
    "capability, dtype, kind",
    [
        ((8, 0), None, "float32 (convolutions in TF32)"),
        ((7, 5), None, "float32"),
        ((8, 0), torch.bfloat16, "bfloat16"),
        ((7, 5), torch.bfloat16, "bfloat16 (emulated here: --amp fp16 is faster)"),
    ],
)
def test_a_gpu_is_named_with_what_it_computes_in(capability, dtype, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    line = engine.describe_machine(torch.device("cuda:1"), dtype)
    assert line.startswith(f"device cuda:1 (A GPU), {kind}, torch ")
    assert engine.describe_machine(torch.device("cpu"), None).count("float32, torch ") == 1


# ---------------------------------------------------------------- engines


@pytest.fixture
def openvino(monkeypatch):
    """OpenVINO, which conftest hides."""
    monkeypatch.delitem(sys.modules, "openvino")
    return pytest.importorskip("openvino")


def test_a_cpu_predicts_with_openvino_where_it_is_installed(monkeypatch):
    there = {"torch", "onnxruntime", "openvino"}
    monkeypatch.setattr(engine, "find_package", lambda name: name in there)
    monkeypatch.setattr(engine, "has_bf16", lambda: True)
    chosen = {
        (CPU, None, "auto", False): ("openvino", "bf16"),
        (CPU, "auto", "off", False): ("openvino", "off"),
        (CPU, "torch", "auto", False): ("torch", "bf16"),
        (CPU, "onnxruntime", "auto", False): ("onnxruntime", "off"),
        (CPU, None, "auto", True): ("openvino", "bf16"),
        (CUDA, None, "auto", False): ("torch", "auto"),
        (CUDA, "torch", "fp16", False): ("torch", "fp16"),
    }
    for given, result in chosen.items():
        assert choose_runtime(*given)[1:] == result, given
    monkeypatch.setattr(engine, "has_bf16", lambda: False)
    assert choose_runtime(CPU, None, "auto", False)[1:] == ("openvino", "off")
    assert choose_runtime(CPU, None, "bf16", False)[1:] == ("openvino", "bf16")

    there.remove("openvino")
    assert choose_runtime(CPU, None, "auto", False)[1:] == ("torch", "off")
    assert choose_runtime(CPU, None, "auto", True)[1:] == ("onnxruntime", "off")
    refused = {
        (CPU, "openvino", "auto", False): "openvino: needs a package; pip install openvino",
        (CUDA, "onnxruntime", "auto", False): "onnxruntime: not for cuda:0; add --device cpu",
        (CUDA, None, "auto", True): "onnxruntime: not for cuda:0; add --device cpu",
        (CPU, "torch", "auto", True): "torch: does not read ONNX; use openvino or onnxruntime",
    }
    for given, words in refused.items():
        with pytest.raises(UsageError, match=f"^--engine {words}$"):
            choose_runtime(*given)


def test_the_number_type_of_training_is_not_that_of_prediction(monkeypatch):
    monkeypatch.setattr(engine, "has_bf16", lambda: True)
    assert engine.amp_dtype("auto", CPU) is None
    assert choose_runtime(CPU, "torch", "auto", False).amp == "bf16"


def test_the_processor_says_whether_it_has_bf16(monkeypatch):
    monkeypatch.undo()  # what conftest sets
    for text, answer in (("flags: avx512f avx512_bf16 amx_bf16", True), ("flags: avx2", False)):
        monkeypatch.setattr(engine.Path, "read_text", lambda path, text=text: text)
        assert engine.has_bf16() is answer
    monkeypatch.setattr(engine.Path, "read_text", Mock(side_effect=FileNotFoundError))
    assert not engine.has_bf16()


BACKBONES = "mobilenetv3_small_050", "tf_efficientnet_lite0", "convnext_atto"


def random_network(backbone):
    """A DBNet whose maps use the whole range."""
    torch.manual_seed(0)
    model = DBNet(backbone, 32).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    last = model.shrink_head[-1]
    with torch.no_grad():
        logits = model(torch.randint(256, (1, 96, 96, 3)).byte())
        last.weight *= 3 / logits.std()
        last.bias.zero_()
    return fold(model)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_engines_agree(name, backbone, openvino, tmp_path, monkeypatch):
    """Maps of several shapes and batches, of a network and of what is kept of it."""
    import_module(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = random_network(backbone)
    made = []

    def make():
        made.append(model)
        return model

    for amp, most, mean in (("off", 1, 0.01), ("bf16", 90, 3)):
        if (name, amp) == ("onnxruntime", "bf16"):
            continue
        for _ in range(2):
            run = engine.load_engine(Runtime(CPU, name, amp), "digest", make)
            for shape in ((1, 96, 64), (3, 64, 224), (1, 288, 160)):
                page = torch.randint(256, (*shape, 3)).byte().numpy()
                expected = engine.launch(model, page, "off", CPU)()
                maps = engine.launch(run, page, amp, CPU)()
                assert maps.shape == shape and maps.dtype is torch.uint8
                error = (maps.float() - expected.float()).abs()
                assert error.max() <= most and error.mean() <= mean, amp
                assert expected.float().std() > 10
    assert len(made) == 2  # OpenVINO's in either number type, then from its cache
    assert sys.modules["openvino_telemetry"] is None


def test_the_cache_keeps_eight_and_mistrusts_what_is_damaged(openvino, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, made = random_network(BACKBONES[0]), []
    runtime = Runtime(CPU, "openvino", "off")
    page = torch.randint(256, (1, 64, 96, 3)).byte()

    def load(digest):
        run = engine.load_engine(runtime, digest, lambda: made.append(digest) or model)
        assert torch.allclose(run(page), model(page), atol=1e-3)

    load("a")
    load("a")
    (file,) = tmp_path.rglob("a-*")
    for damaged in (b"", b"junk", file.read_bytes()[:1000]):
        file.write_bytes(damaged)
        load("a")
    assert made == ["a"] * 4
    for n in range(10):
        file.with_name(str(n)).touch()
    load("b")
    kept = [path.name for path in file.parent.iterdir()]
    assert len(kept) == 8 and any(name.startswith("b-") for name in kept)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")  # a disk that cannot be written to
    load("c")
    assert made[-1] == "c"


def test_commands_run_on_any_engine(openvino, work, capsys):
    """And ONNX models as checkpoints: their size, decoding and pages seen are in them."""
    weights = str(ROOT / "weights/receipts-lite2.pt")
    evaluate.main([weights, "--export", "m.onnx", "--size=320"])
    capsys.readouterr()
    files = {}
    for source, name, line in (
        (weights, "torch", "torch 2"),
        (weights, "auto", "openvino 20"),
        (weights, "openvino", "openvino 20"),
        (weights, "onnxruntime", "onnxruntime 1"),
        ("m.onnx", "auto", "openvino 20"),
        ("m.onnx", "onnxruntime", "onnxruntime 1"),
    ):
        command = [source, "--engine", name, "--out", "o.json", "--images", "s/images"]
        assert evaluate.main(command + ["--size=320"] * (source == weights)) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"device cpu (1 threads), float32, {line}"), out
        assert "\nsize 320, fit area, " in out
        files[source, name] = read_predictions("o.json")
    expected = files[weights, "torch"]
    assert sum(len(polygons) for polygons, _ in expected.values()) > 10
    for (source, name), words in files.items():
        for page, (polygons, scores) in words.items():
            assert len(polygons) == len(expected[page][0]), (source, name)
            assert scores == pytest.approx(expected[page][1], abs=0.01)

    assert evaluate.main(["m.onnx", "--data", "s", "--json"]) == 0
    assert evaluate.main([weights, "--size=320", "--data", "s", "--json"]) == 0
    assert evaluate.main(["m.onnx"]) == 2
    out, err = capsys.readouterr()
    assert len({*out.splitlines()}) == 1 and "needs labels to be scored; add --data" in err
    detector = evaluate.Detector("m.onnx", engine="onnxruntime")
    polygons, scores = detector(next((work / "s/images").iterdir()))
    assert len(polygons) == len(scores)


def test_an_onnx_model_remembers_what_its_network_has_seen(work):
    weights = str(ROOT / "weights/receipts-lite2.pt")
    evaluate.main([weights, "--export", "m.onnx", "--size=auto"])
    source, again = sources.load_source(weights), sources.load_source("m.onnx")
    for key in ("fit", "text_height", "thresh", "unclip_ratio", "mode", "tuned"):
        assert getattr(again.hp, key) == getattr(source.hp, key), key
    sorted_origin = {way: sorted(digests) for way, digests in source.state["origin"].items()}
    assert again.state["origin"] == sorted_origin and len(sorted_origin["trained"]) > 400


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--engine=openvino", "--engine openvino: needs a package; pip install openvino"),
        ("--engine=onnxruntime --amp=bf16", "--amp: onnxruntime computes in float32"),
        ("--engine=torch --export=x.onnx", "--engine: not with --export"),
    ],
)
def test_what_an_engine_cannot_do_is_one_line(flags, words, work, capsys):
    weights = str(ROOT / "weights/receipts-lite2.pt")
    images = [] if "export" in flags else ["--images", "s/images"]
    assert evaluate.main([weights, *images, *flags.split()]) == 2
    assert words in capsys.readouterr().err


def test_what_is_no_exported_model_is_one_line(work, capsys):
    (work / "junk.onnx").write_bytes(b"junk")
    assert evaluate.main(["junk.onnx", "--data", "s"]) == 1
    assert "junk.onnx: not a model of --export" in capsys.readouterr().err
    for flag in ("--export=x.pt", "--tune", "--mix=a.pt"):
        assert evaluate.main(["junk.onnx", flag]) == 2
        assert "only with a checkpoint" in capsys.readouterr().err


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("gpus", [False, True])
def test_processes_wait_ten_minutes_for_each_other_in_either_backend(gpus, monkeypatch):
    joined, threads = [], []
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: joined.append((a, k)))

    def note(target, **_):
        threads.append(target)
        return SimpleNamespace(start=int)

    monkeypatch.setattr(engine.threading, "Thread", note)
    monkeypatch.setattr(signal, "set_wakeup_fd", int)
    assert engine.join_group() is not None
    (((backend,), options),) = joined
    assert backend == ("cpu:gloo,cuda:nccl" if gpus else "gloo")
    assert options["timeout"] == timedelta(minutes=10)
    assert threads == [engine.follow_agent] + [engine.end_if_blocked] * gpus  # gloo notices a loss


BLOCKED = f"""
import ctypes, os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import engine
import torch.distributed as dist
trouble = sys.argv[1]
engine.GRACE = 2
def work():
    for _ in range(1000):
        sum(range(1000))
store = dist.HashStore()
if trouble == "all there":
    store.add("stopping", 1)
engine.process_count = lambda: 2
heard, written = os.pipe()
os.set_blocking(written, False)
signal.set_wakeup_fd(written)
threading.Thread(target=engine.end_if_blocked, args=(heard, store), daemon=True).start()
signal.signal(signal.SIGUSR1, lambda *_: None)  # no signal to stop
os.kill(os.getpid(), signal.SIGUSR1)
with engine.Stop() as _:
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
    ],
)
def test_errors_of_pytorch_have_words(error, what, code):
    def fail():
        raise error

    with pytest.raises(DataError) as told:
        engine.explain_errors(fail, store=object())
    assert str(told.value).startswith(what) and told.value.code == code
    with pytest.raises(RuntimeError, match="NCCL"):
        engine.explain_errors(lambda: (_ for _ in ()).throw(RuntimeError("NCCL")))
