"""files.py and hparams.py: JSON and YAML values against each other, errors, reading, writing whole
or not at all, locks."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from conftest import ROOT, error_line, small_disk

import files
import hparams

YAML = """
lr: 5e-4          # PyYAML reads a text
weight_decay: 5.0e-05
thresh: 0.3
T_max: 24
ema: True
amp: off          # of YAML 1.1 a boolean
backbone: efficientnet_b4
name: "24"
"""
VALUES = {"lr": 5e-4, "weight_decay": 5e-5, "thresh": 0.3, "T_max": 24, "ema": True, "amp": "off"}
VALUES |= {"backbone": "efficientnet_b4", "name": "24"}


def test_yaml_has_the_values_of_json(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.json"
    a.write_text(YAML)
    b.write_text(json.dumps(VALUES))
    assert files.read_json(a) == files.read_json(b) == VALUES
    assert hparams.read_hparams(a) == hparams.read_hparams(b) == VALUES
    a.write_text(
        "- [1, -3, +2, .5, -.5, 1., 1e3, null, true, ~, False, x]\n"
        "- {a: '1', b: {}, 'c d': []}\n- 2024-01-01\n-\n"
    )
    told = [
        [1, -3, 2, 0.5, -0.5, 1.0, 1e3, None, True, None, False, "x"],
        {"a": "1", "b": {}, "c d": []},
        "2024-01-01",
        None,
    ]
    assert files.read_json(a) == told


@pytest.mark.parametrize("path", sorted((ROOT / "hparams").glob("*.json")), ids=lambda p: p.stem)
def test_the_shipped_files_as_yaml(path, tmp_path):
    yaml = pytest.importorskip("yaml")
    data = files.read_json(path)
    (tmp_path / "a.yml").write_text(yaml.safe_dump(data))
    assert files.read_json(tmp_path / "a.yml") == data


BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\nb: {c: 1, c: 2}", "key c comes twice"),
        (BOMB, "aliases"),
        ("a: &a [*a]", "aliases"),
        ("[" * 5000, "recursion"),
        ("? [1, 2]\n: 3", "unhashable"),
        ("a: 1\n---\nb: 2", "single document"),
        ("a: b: c", "line 1, column 5"),
        ("", "a.yaml: not a YAML file \\(it is empty\\)$"),
        ("# nothing\n", "not a YAML file \\(it is empty\\)$"),
        ("a: \x00", "not a YAML file"),
        (" " * (1 << 20) + "a", "larger than 1 MiB"),
    ],
    ids=range(11),
)
def test_what_is_no_yaml_is_one_line(text, words, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(files.DataError, match=words) as error:
        files.read_json(tmp_path / "a.yaml")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", " \n"])
def test_json_that_holds_nothing_is_said_to_be_empty(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(files.DataError, match="a.json: not a JSON file \\(it is empty\\)$"):
        files.read_json(tmp_path / "a.json")


def test_a_tag_makes_no_object(tmp_path):
    (tmp_path / "a.yaml").write_text("a: !!python/object/apply:os.system [ls]")
    assert files.read_json(tmp_path / "a.yaml") == {"a": ["ls"]}


@pytest.mark.parametrize(
    "values",
    [
        {"models.optimizer.lr": 1e-3, "T_max": 7},
        {"models": {"optimizer": {"lr": 1e-3}}, "scheduler": {"T_max": 7}},
        {"models": {"optimizer.lr": 1e-3, "scheduler": {"a.T_max": 7}}},
    ],
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_of_nested_and_dotted_names_the_last_part_counts(values, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_text(json.dumps(values))
    assert hparams.read_hparams(path) == {"lr": 1e-3, "T_max": 7}
    for text, words in (
        ('{"a": {"lr": 1}, "b": {"lr": 1}}', "key lr comes twice"),
        ('{"a.lr": 1, "lr": 1}', "key lr comes twice"),
        ('{"a": {"T_Max": 7}}', "unknown key 'T_Max'; did you mean T_max?"),
        (
            '{"models.thresh": 29}',
            "thresh = 29 is not within 0.01 to 0.99; a percentage? write 0.29",
        ),
        ('{"lr": ".."}', "lr = '..' is not a number"),
        (
            '{"method": "grid", "parameters": {"lr": {"value": 1}, "wd": {"value": 1}}}',
            f"is a sweep and not a file of hyperparameters; run it: sweep.py {path}",
        ),
    ):
        path.write_text(text)
        with pytest.raises(files.DataError) as error:
            hparams.read_hparams(path)
        assert words in str(error.value)


def test_a_huge_number_is_no_percentage():
    with pytest.raises(files.UsageError, match="is not within 32 to 8192$"):
        hparams.checked("size", 10**400, "x")
    with pytest.raises(files.UsageError, match="is not within 32 to 8192$"):
        hparams.checked("size", 9000, "x")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"size": 100}, "flags: size = 100 is not a multiple of 32"),
        ({"neck": 18}, "neck = 18 is not a multiple of 4"),
        ({"lr": 1e-6}, "eta_min = 1e-05 is above lr = 1e-06"),
        ({"folds": 5, "fold": 7}, "flags: fold = 7, but folds = 5"),
        ({"folds": 1}, "folds = 1 is not 0 or within 2 to 100"),
        ({"name": "/x"}, "name = '/x' leads out of runs/"),
        ({"name": "a/../../x"}, "leads out of runs/"),
    ],
)
def test_values_that_do_not_go_together(values, words):
    with pytest.raises(files.UsageError) as error:
        hparams.validate(hparams.Hparams(**values))
    assert words in str(error.value)
    assert hparams.validate(hparams.Hparams(folds=5, fold=5, name="a..b/c"))


@pytest.mark.parametrize(
    "name", ["می\u200cخواهم", "👨\u200d👩\u200d👧", "ex\u00adample", "a\u202fb"]
)
def test_letters_without_a_width_are_text(name):
    assert hparams.checked("data", name, "--data") == name and files.shown(name) == name
    for control in ("\n", "\r", "\0", "\x85", "\u2028", "\udcff"):
        with pytest.raises(files.UsageError, match="is not a line of text"):
            hparams.checked("data", name + control, "--data")
        assert files.shown(name + control).isascii()


# ---------------------------------------------------------------- errors


def test_an_error_is_where_what_and_remedy():
    assert str(files.DataError("a.json")) == "a.json"
    assert str(files.DataError("a.json", "is empty")) == "a.json: is empty"
    error = files.DataError(Path("a.json"), "is empty", "fill it")
    assert str(error) == "a.json: is empty; fill it" and error.code == 1
    assert str(files.DataError("", remedy="go on")) == "; go on"
    for kind, code, given in ((files.DataError, 1, None), (files.UsageError, 2, None)):
        again = pickle.loads(pickle.dumps(kind("a", "b", "c", given)))
        assert (type(again), str(again), again.code) == (kind, "a: b; c", code)
    assert pickle.loads(pickle.dumps(files.DataError("a", code=137))).code == 137
    told = "Caught DataError in worker 0.\nTraceback:\n  x\nfiles.DataError: a.jpg: broken\n"
    assert str(files.DataError(told)) == "a.jpg: broken"  # as torch brings it from a loader process


try:
    np.empty(2**62, np.uint8)
except MemoryError as error:
    FULL = error  # Unable to allocate 4.00 EiB for an array


@pytest.mark.parametrize(
    "error, code, line",
    [
        (files.DataError("a", "b"), 1, "a: b"),
        (files.DataError("a", "b", "c", 137), 137, "a: b; c"),
        (files.UsageError("a", "b"), 2, "a: b"),
        (FileNotFoundError(2, "No such file", "x"), 1, f"x: No such file; {files.KEPT}"),
        (OSError("gone"), 1, f"output: gone; {files.KEPT}"),
        (MemoryError(), 3, "out of memory; lower --size"),
        (RuntimeError("CUDA out of memory. Tried"), 3, "out of memory; lower --size"),
        (FULL, 3, "out of memory; lower --size"),
        (MemoryError("Caught MemoryError in DataLoader worker process 0.\n"), 3, "out of memory"),
        (cv2.error("alloc.cpp:73: error: (-4:Insufficient memory) Failed"), 3, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted; "),
    ],
)
def test_exit_codes(error, code, line, capsys):
    assert files.exit_code(Mock(side_effect=error)) == code
    assert error_line(capsys.readouterr().err).startswith(f"error: {line}")


def test_exit_codes_without_an_error():
    assert (files.exit_code(lambda: None), files.exit_code(lambda: 5)) == (0, 5)
    for bug in (RuntimeError("shapes differ"), ZeroDivisionError(), AssertionError()):
        with pytest.raises(type(bug)):
            files.exit_code(Mock(side_effect=bug))


def run_code(code, **environment):
    """Python's output of a program that imports files.py."""
    command = [sys.executable, "-c", "import files\n" + code]
    options = {"capture_output": True, "timeout": 60, "env": {**os.environ, **environment}}
    return subprocess.run(command, check=False, cwd=ROOT, **options)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_lacks_letters_gets_question_marks(encoding):
    code = "files.exit_code(lambda: print('가\\udcff', 'done'))"
    result = run_code(code, PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(b" done\n") and b"?" in result.stdout


# ---------------------------------------------------------------- reading


def test_what_a_read_would_wait_for_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        for read in (files.read_bytes, files.read_text, files.read_json):
            with pytest.raises(files.DataError, match=f"{path}: not a regular file"):
                read(path)
    with pytest.raises(files.UsageError, match="no such file"):
        files.read_text(tmp_path / "gone")
    with pytest.raises(files.DataError, match=r"cannot be read \(No such file or directory\)"):
        files.read_bytes(tmp_path / "gone")


def test_a_key_twice_among_many_is_found_at_once():
    pairs = [(str(n), n) for n in range(300_000)]
    assert len(files.unique_dict(pairs)) == 300_000
    began = time.process_time()
    with pytest.raises(ValueError, match="key 7 comes twice in one object"):
        files.unique_dict([*pairs, ("7", 0)])
    assert time.process_time() - began < 5


def test_texts_of_other_encodings(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffCafé".encode())
    assert files.read_text(path) == "Café"
    path.write_bytes("Café".encode("cp1252"))
    assert files.read_text(path, other="cp1252") == "Café"
    with pytest.raises(files.DataError, match="not text in UTF-8; save it as such"):
        files.read_text(path)
    with pytest.raises(files.DataError, match="larger than 0 MiB"):
        files.read_text(path, 3)


# ---------------------------------------------------------------- writing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"b": "가"})
    assert path.read_text() == '{"b": "가"}\n'
    with pytest.raises(ValueError):
        files.write_json(path, float("nan"))
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError) as error:
        files.replace_file(path, b"other")
    assert error.value.filename == str(path) and names(path.parent) == ["a.json"]
    assert path.read_text() == '{"b": "가"}\n'


def test_a_path_that_is_not_utf8_is_written_with_escapes_and_read_back(tmp_path):
    path = "caf\udce9.pt"  # as Python has the bytes of an old disk
    files.replace_file(tmp_path / "a.html", f"<h1>{path}</h1>")
    assert (tmp_path / "a.html").read_bytes() == rb"<h1>caf\udce9.pt</h1>"
    files.write_json(tmp_path / "a.json", {"init": path})
    assert files.read_json(tmp_path / "a.json") == {"init": path}


def test_a_name_that_fills_255_bytes_is_written(tmp_path):
    path = tmp_path / ("가" * 84 + "abc")
    files.check_writable(path)
    files.replace_file(path, "x")
    assert path.read_text() == "x" and names(tmp_path) == [path.name]
    for write in (files.check_writable, lambda path: files.replace_file(path, "x")):
        with pytest.raises(OSError, match="File name too long"):
            write(tmp_path / ("a" * 256))


@pytest.mark.parametrize("name", ["a" * 255, "가" * 85])
def test_a_folder_whose_name_fills_255_bytes_is_made(name, tmp_path):
    with files.new_folder(tmp_path / name) as partial:
        (partial / "a").write_text("x")
        assert not (tmp_path / name).exists()
    assert names(tmp_path) == [name] and (tmp_path / name / "a").read_text() == "x"


def test_a_new_folder_is_whole_or_absent_and_replaces_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "a/b") as partial:
        (partial / "c").write_text("x")
        1 / 0  # noqa: B018
    assert names(tmp_path / "a") == []
    (tmp_path / "empty").mkdir()
    with files.new_folder(tmp_path / "empty"):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full/.hidden").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with (
            pytest.raises(files.UsageError, match="exists; choose another folder"),
            files.new_folder(tmp_path / name),
        ):
            pass
    assert (tmp_path / "full/.hidden").read_text() == (tmp_path / "file").read_text() == "kept"


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("far/target.json")
    for text in ("first", "second"):
        files.check_writable(link)
        files.replace_file(link, text)
        assert link.is_symlink() and (tmp_path / "far/target.json").read_text() == text
        assert names(tmp_path) == ["far", "link.json"] and names(tmp_path / "far") == [
            "target.json"
        ]


def test_devices_are_written_into(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        null = Path(os.devnull)
    files.check_writable(null)
    files.replace_file(null, "x")
    assert null.is_char_device() and names(tmp_path) in (["null"], [])
    with pytest.raises(OSError) as error:
        files.replace_file("/dev/full", "x")
    assert error.value.filename == "/dev/full" and Path("/dev/full").is_char_device()


def test_a_fifo_is_written_into(tmp_path):
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    files.check_writable(fifo)  # waits for no reader
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    files.replace_file(fifo, "x" * 10**6)
    reader.join(10)
    assert read == [b"x" * 10**6] and fifo.is_fifo() and names(tmp_path) == ["fifo"]


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_a_content_is_printed(name, tmp_path):
    """In order with what is printed as text, into a terminal's pipe or a file, in any encoding."""
    code = (
        f"print(1); files.replace_file({name!r}, '가\\n'); files.check_writable({name!r}); print(2)"
    )
    result = run_code(code, PYTHONIOENCODING="ascii")
    assert result.stdout.decode() == "1\n가\n2\n", result.stderr
    with open(tmp_path / "out", "wb") as out:
        subprocess.run(
            [sys.executable, "-c", "import files;" + code], cwd=ROOT, stdout=out, check=True
        )
    assert (tmp_path / "out").read_text() == "1\n가\n2\n"


def test_whether_a_file_can_be_written_is_known_before(tmp_path):
    files.check_writable(tmp_path / "a/b/c.json")
    (tmp_path / "file").write_text("kept")
    files.check_writable(tmp_path / "file")
    files.check_writable("relative.json")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"
    for path in (tmp_path, tmp_path / "file/a.json", "/proc/a.json"):
        with pytest.raises(OSError) as error:
            files.check_writable(path)
        assert error.value.filename == str(path) and error.value.strerror
    with small_disk(tmp_path / "disk", "4k") as mounted:
        if not mounted:
            pytest.skip("no tmpfs can be mounted here")
        (tmp_path / "disk/full").write_bytes(bytes(4096))
        with pytest.raises(OSError, match="No space left"):
            files.check_writable(tmp_path / "disk/a.json")


def test_no_output_replaces_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("labels.json", "member.json", "other.json"):
        Path(name).write_text("{}")
    Path("link.json").symlink_to("labels.json")
    read = ["labels.json", Path("member.json"), None, "gone.json"]
    files.guard(["new.json", "other.json", None, "-"], read, [None, "new.csv"])
    for path in ("labels.json", "./labels.json", tmp_path / "labels.json", "link.json"):
        with pytest.raises(files.UsageError, match="is read by this command; write to another"):
            files.guard([path], read)
        with pytest.raises(files.UsageError, match="is read by this command; write to another"):
            files.guard([], read, [path])
    with pytest.raises(files.UsageError, match="other.json: exists, and no flag names it"):
        files.guard(["new.json"], read, ["other.json"])


# ---------------------------------------------------------------- locks


def test_one_process_holds_a_folder(tmp_path):
    (tmp_path / ".3f.tmp").write_text("of a killed process")
    (tmp_path / "kept.tmp").write_text("")
    held = files.lock_folder(tmp_path, "lock", "a sweep is running there")
    assert names(tmp_path) == ["kept.tmp", "lock"]
    (tmp_path / ".4f.tmp").write_text("of the holder")
    with pytest.raises(files.UsageError, match="a sweep is running there; wait for it, or stop it"):
        files.lock_folder(tmp_path, "lock", "a sweep is running there")
    assert (tmp_path / ".4f.tmp").exists()
    held.close()
    files.lock_folder(tmp_path, "lock", "").close()
