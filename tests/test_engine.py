"""On what a network runs: devices and engines. GPUs are emulated."""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, run_python

import engine
import ensemble
import evaluate
import sources
from dbnet import DBNet
from engine import Runtime, choose_device, choose_runtime
from files import UsageError
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_whose_driver_is_too_old_is_one_line(name, monkeypatch):
    """NVML counts it all the same; every command ended in a traceback."""

    def fail(*_, **__):
        raise RuntimeError("The NVIDIA driver is too old (found version 12020). Please update\n...")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", fail)
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(UsageError) as error:
        choose_device(name)
    line = f"--device {name}: torch cannot use it (The NVIDIA driver is too old (found version"
    assert str(error.value).startswith(f"{line} 12020)); update the driver, ")


@pytest.mark.parametrize("name", ["cuda:1", "cuda:200", "cuda:999", "mps", "meta"])
def test_a_device_that_is_not_here_is_one_line(name, monkeypatch):
    """torch takes cuda:200 for number 200 - 256, which is no GPU's."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="not here, with 1 CUDA devices; use cpu"):
        choose_device(name)


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


@pytest.fixture(scope="session")
def openvino_package():
    """OpenVINO, imported once; tests/requirements.txt has it."""
    package = engine.find_package("openvino")
    assert package, "pip install -r tests/requirements.txt"
    return package


@pytest.fixture
def openvino(openvino_package, monkeypatch):
    """OpenVINO, which conftest hides."""
    monkeypatch.setitem(sys.modules, "openvino", openvino_package)


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


def test_threads_that_share_an_onnx_model_get_their_own_maps(openvino, tmp_path):
    """Also for pages of one shape, where a mix-up raises no error."""
    file = tmp_path / "m.onnx"
    file.write_bytes(engine.onnx_graph(random_network(BACKBONES[0])))
    run = engine.load_engine(Runtime(CPU, "openvino", "off"), "", None, str(file))
    shapes = [(1, 96, 64, 3), (1, 64, 224, 3), (1, 64, 224, 3)] * 8
    pages = [torch.randint(256, shape).byte() for shape in shapes]
    alone = [run(page) for page in pages]
    with ThreadPoolExecutor(4) as threads:
        together = [*threads.map(run, pages)]
    assert all(map(torch.equal, together, alone))


FIRST_LOOK = """
import sys, threading
import engine
compiled = engine.openvino_core().compile_model(sys.argv[1], "CPU", {})
tensors = [compiled.create_infer_request().get_input_tensor(0) for _ in range(8)]
go = False

def look(tensor):
    while not go:
        pass
    tensor.data

sys.setswitchinterval(1e-5)
threads = [threading.Thread(target=look, args=[tensor], daemon=True) for tensor in tensors]
for thread in threads:
    thread.start()
go = True
for thread in threads:
    thread.join()
"""


def test_threads_that_are_the_first_to_look_into_a_tensor_do_not_wait_for_ever(openvino, tmp_path):
    """OpenVINO's bindings let them: a command whose network came from the cache could hang."""
    file = tmp_path / "probability.onnx"
    file.write_bytes(engine.onnx_graph(random_network(BACKBONES[0])))
    done = run_python("-c", FIRST_LOOK, file, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


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
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")  # a user without a home
    load("c")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")  # a disk that cannot be written to
    load("c")
    assert made[-2:] == ["c", "c"]


DROPPED_IN_A_THREAD = """
import os, signal, threading, time
import torch, engine

class Network(torch.nn.Module):
    def forward(self, pages):
        return pages[..., :1].permute(0, 3, 1, 2) - 99.5

runtime = engine.Runtime(torch.device("cpu"), "openvino", "off")
networks = [engine.load_engine(runtime, "digest", Network)]
assert networks[0](torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).max() == -99.5
thread = threading.Thread(target=networks.clear)
thread.start()
thread.join()

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.1)
"""


def test_signals_are_handled_after_a_thread_has_dropped_the_last_network(
    openvino, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run_python("-c", DROPPED_IN_A_THREAD, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, "handled\n"), result.stderr


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


def test_an_onnx_model_remembers_what_its_network_has_seen(work, capsys):
    weights = str(ROOT / "weights/receipts-lite2.pt")
    evaluate.main([weights, "--export", "m.onnx", "--size=auto"])
    source, again = sources.load_source(weights), sources.load_source("m.onnx")
    for key in ("fit", "look", "text_height", "thresh", "unclip_ratio", "mode", "tuned"):
        assert getattr(again.hp, key) == getattr(source.hp, key), key
    sorted_origin = {way: sorted(digests) for way, digests in source.state["origin"].items()}
    assert again.state["origin"] == sorted_origin and len(sorted_origin["trained"]) > 400

    # but not the pages of its run
    assert ensemble.main(["m.onnx"]) == 2
    assert "the pages: members do not share known data; add --data" in capsys.readouterr().err


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
