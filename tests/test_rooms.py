"""The rooms: imports point down, floors without torch, and no room outgrows its budget."""

import ast
import io
import tokenize

import pytest
from conftest import ROOT, run_python

FLOORS = (
    ("overlap", "light"),
    ("files", "db_postprocess", "cleval", "interval", "synth", "report", "trees") + ("progress",),
    ("hparams", "labels", "pictures", "targets", "habits", "augment", "drawing", "tune", "space")
    + ("mistakes",),
    ("command", "formats", "looks", "mirrors"),
    ("data", "dbnet", "engine", "predictions", "findings"),
    ("folding", "predict", "processes", "bayes", "audit"),
    ("sources",),
    ("stress",),
    ("evaluate", "sweep"),
    ("train", "ensemble"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
NO_TORCH = [room for rooms in FLOORS[:4] for room in rooms]
COMMANDS = {"train", "ensemble", "evaluate", "sweep", "data"}
IMPORTABLE = {"data", "evaluate"}  # commands that also serve the floors above them

# tokens of code that a room may have; comments, docstrings and blank lines are free
BUDGETS = {"files": 1500, "db_postprocess": 2400, "cleval": 3900, "interval": 1800}
BUDGETS |= {"synth": 5300, "report": 3700, "hparams": 1650, "labels": 4430, "augment": 3600}
BUDGETS |= {"tune": 2500, "space": 3400, "data": 6200, "dbnet": 2950, "engine": 2000}
BUDGETS |= {"evaluate": 8000, "findings": 4500, "sweep": 9650, "train": 8800, "ensemble": 5600}
BUDGETS |= {"pictures": 1150, "targets": 1150, "habits": 910, "bayes": 3580, "drawing": 1100}
BUDGETS |= {"overlap": 1150, "light": 1100, "command": 820, "formats": 900, "predict": 2850}
BUDGETS |= {"audit": 4500, "mistakes": 1300, "looks": 1500, "trees": 1250, "predictions": 600}
BUDGETS |= {"sources": 1350, "folding": 900, "processes": 1100, "mirrors": 650, "stress": 1050}
BUDGETS |= {"progress": 130}
TOKENS_A_LINE = 11.5  # of code, on average: a budget is met by deleting, not by packing
FREE = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}

SCRIPTS = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]


def docstring_lines(tree):
    """Numbers of the lines that docstrings fill."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(
            node
        ):
            text = node.body[0]
            lines |= {*range(text.lineno, text.end_lineno + 1)}
    return lines


def count_code(room):
    """(tokens, lines) of a room's code."""
    source = (ROOT / f"{room}.py").read_text()
    free_lines = docstring_lines(ast.parse(source))
    tokens, lines = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] not in FREE and token.start[0] not in free_lines:
            tokens += 1
            lines |= {*range(token.start[0], token.end[0] + 1)}
    return tokens, len(lines)


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


@pytest.mark.parametrize(
    ("rooms", "heavy"),
    [
        ([*NO_TORCH, "findings"], ["torch", "torchvision", "timm"]),
        (["bayes", "sweep"], ["torch", "torchvision", "timm", "cv2"]),
    ],
    ids=["lower floors", "sweep"],
)
def test_the_lower_floors_and_the_sweep_do_not_load_what_takes_long(rooms, heavy):
    """One after the other in one process, so that the first room that does is named."""
    code = (
        "import importlib, sys\n"
        f"for room in {rooms}:\n"
        "    importlib.import_module(room)\n"
        f"    print(room, sys.modules.keys() & {heavy})"
    )
    loaded = run_python("-c", code, cwd=ROOT)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines() == [f"{room} set()" for room in rooms]


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("room", FLOOR)
def test_only_commands_are_scripts(room):
    guards = [is_main_guard(node) for node in ast.parse((ROOT / f"{room}.py").read_text()).body]
    assert any(guards) == guards[-1] == (room in COMMANDS)


@pytest.mark.parametrize("room", BUDGETS)
def test_a_room_is_within_its_budget(room):
    assert count_code(room)[0] <= BUDGETS[room]


@pytest.mark.parametrize("room", BUDGETS)
def test_a_room_is_not_packed(room):
    tokens, lines = count_code(room)
    assert tokens <= TOKENS_A_LINE * lines


@pytest.mark.parametrize("room", FLOOR)
def test_no_function_is_over_60_lines_but_argument_parsers(room):
    tree = ast.parse((ROOT / f"{room}.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    parsers = {"parse_args", "trainer_parser", "add_arguments"}
    assert {name: n for name, n in lengths.items() if n > 60 and name not in parsers} == {}


def test_rooms_over_200_lines_have_section_rulers():
    for room in FLOOR:
        source = (ROOT / f"{room}.py").read_text()
        if len(source.splitlines()) > 200:
            assert "# ----------------------------------------------------------------" in source, (
                room
            )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_over_100_columns(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > 100] == []
