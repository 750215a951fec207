"""The rooms: imports point down, floors without torch, and no room outgrows its budget."""

import ast
import json
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = (
    ("db_postprocess", "cleval", "synth", "report", "files"),
    ("hparams", "labels", "augment", "tune", "space"),
    ("data", "dbnet"),
    ("evaluate", "sweep"),
    ("train", "ensemble"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = {"train", "ensemble", "evaluate", "sweep", "data"}
IMPORTABLE = {"data", "evaluate"}  # commands that also serve the floors above them
BUDGETS = {"files": 176, "db_postprocess": 242, "cleval": 451, "synth": 369, "report": 420}
BUDGETS |= {
    "hparams": 180,
    "labels": 423,
    "tune": 198,
    "space": 350,
    "augment": 110,
    "data": 820,
    "dbnet": 337,
}
BUDGETS |= {"evaluate": 870, "sweep": 1400, "train": 1045, "ensemble": 600}
MAIN_PATH = ("files", "hparams", "db_postprocess", "cleval", "data", "dbnet", "evaluate", "train")
SCRIPTS = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]


def lines_of(room):
    return (ROOT / f"{room}.py").read_text().splitlines()


def imports_of(room):
    """Names of the modules that a room imports, within functions too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{room}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_the_house_has_these_rooms():
    assert {path.stem for path in ROOT.glob("*.py")} == FLOOR.keys() == BUDGETS.keys()


@pytest.mark.parametrize("room", FLOOR)
def test_imports_point_down(room):
    ours = imports_of(room) & FLOOR.keys()
    assert {other for other in ours if FLOOR[other] >= FLOOR[room]} == set()
    assert ours & COMMANDS <= IMPORTABLE


@pytest.mark.parametrize("room", [*FLOORS[0], *FLOORS[1], "sweep"])
def test_the_lower_floors_and_the_sweep_load_no_torch(room):
    code = f"import json, sys, {room}; print(json.dumps([*sys.modules]))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=120)
    loaded = set(json.loads(loaded.stdout))
    assert room in loaded
    assert loaded & {"torch", "torchvision", "timm"} == set()
    assert room != "sweep" or "cv2" not in loaded


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("room", FLOOR)
def test_only_commands_are_scripts(room):
    guards = [is_main_guard(node) for node in ast.parse((ROOT / f"{room}.py").read_text()).body]
    assert sum(guards) == (room in COMMANDS)


@pytest.mark.parametrize("room", BUDGETS)
def test_a_room_is_within_its_budget(room):
    assert len(lines_of(room)) <= BUDGETS[room]


def test_the_house_is_within_its_budget():
    assert sum(len(lines_of(room)) for room in FLOOR) < 7800
    assert sum(len(lines_of(room)) for room in MAIN_PATH) < 4050


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_over_100_columns(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > 100] == []
