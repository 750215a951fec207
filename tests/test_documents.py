"""The documents: their commands parse, their links lead somewhere, what they name exists."""

import ast
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from test_rooms import FLOORS

import data
import ensemble
import evaluate
import hparams
import sweep
import train
from command import resolve_hparams

DOCUMENTS = sorted(path for pattern in ("*.md", "weights/*.md") for path in ROOT.glob(pattern))
README_LINES = 130
TORCHRUN_FLAGS = {
    "--nnodes",
    "--nproc-per-node",
    "--max-restarts",
    "--rdzv-backend",
    "--rdzv-endpoint",
}

# words about how the project is made, paths of a machine, and marks of work undone
FORBIDDEN = (
    r"\b(session|sub-?agent|TO[D]O|FIX[M]E|XX[X]|the\s+issue|issue\s+#?\d+)\b"
    r"|/(?:root|tmp|work)/"
)


def read(name):
    return (ROOT / name).read_text()


# ---------------------------------------------------------------- commands


def code_blocks(text):
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands_of(text):
    """The command lines of a document, shell variables expanded: those in code blocks, and those
    that a sentence has between backticks."""
    for block in code_blocks(text):
        variables = {}
        joined = block.replace("\\\n", " ").replace("$SLURM_ARRAY_TASK_ID", "1")
        joined = re.sub(r'"[^"]*"', lambda quoted: quoted[0].replace("\n", " "), joined)
        for line in joined.splitlines():
            line = line.removeprefix("$ ")
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            assignment = re.fullmatch(r'([A-Z0-9]+)="(.*?)".*', line)
            if assignment:
                variables[assignment[1]] = assignment[2]
            elif re.match(r"(python|torchrun|pip|ruff|wandb) ", line):
                yield from re.split(r" && ", line)

    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", prose):
        if re.match(r"(python|torchrun) ", code):
            yield from re.split(r" && ", code.replace("\n", " "))


COMMANDS = [(path.name, command) for path in DOCUMENTS for command in commands_of(path.read_text())]


def check_train(words, processes=1):
    args = train.parse_args(words)
    if args.fold == "all":
        args.fold = None
    if not args.resume:
        hp = resolve_hparams(args)
        assert hp.batch >= processes, f"{processes} processes need a page each"
        if processes == 1:
            train.check_trainer_flags(args, hp)


def check_torchrun(words):
    """Flags of torchrun, then train.py's, with a page for each process."""
    flags = words[: words.index("train.py")]
    values = dict(flag.split("=") for flag in flags)
    assert values.keys() <= TORCHRUN_FLAGS
    processes = int(values.get("--nnodes", 1)) * int(values["--nproc-per-node"])
    check_train(words[len(flags) + 1 :], processes)


def check_evaluate(words):
    evaluate.check_scoring_flags(evaluate.parse_args(words))


def check_ensemble(words):
    ensemble.check_voting_flags(ensemble.parse_args(words))


def check_sweep(words):
    _, options = sweep.parse(words)
    sweep.trainer_args(options.extra, sweep.OURS)
    sweep.resolve(options.extra)
    if options.sweep and not options.sweep.startswith("runs/"):
        sweep.load_spec(options.sweep)


def check_other(script, words):
    """A script that is run by hand exists, and its source has the flags."""
    source = read(script)
    for word in words:
        if word.startswith("--"):
            assert word in source, word


SCRIPTS = {
    "train.py": check_train,
    "evaluate.py": check_evaluate,
    "ensemble.py": check_ensemble,
    "sweep.py": check_sweep,
    "data.py": data.parse_args,
}


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_a_command_parses(document, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    program, *words = shlex.split(command, comments=True)
    if program == "torchrun":
        check_torchrun(words)
    elif program == "pip":
        for required in (word for word in words if word.endswith(".txt")):
            assert (ROOT / required).is_file()
    elif program == "python" and words[0] in SCRIPTS:
        SCRIPTS[words[0]](words[1:])
    elif program == "python" and words[0].endswith(".py"):
        check_other(words[0], words[1:])
    elif program == "python":
        assert words[0] in ("-c", "-m")
    assert not re.search(r"\b[EP]\b|<|\.\.\.", re.sub(r'".*?"', "", command)), "cannot be pasted"


def test_each_document_has_commands_where_it_should():
    counted = {path.name: 0 for path in DOCUMENTS}
    for document, _ in COMMANDS:
        counted[document] += 1
    assert counted["README.md"] > 15
    assert counted["MANUAL.md"] > 35


def test_several_processes_need_a_page_each(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = "--nnodes=2 --nproc-per-node=8 train.py --hparams hparams/run8.json --batch"
    check_torchrun([*words.split(), "16"])
    with pytest.raises(AssertionError):
        check_torchrun([*words.split(), "8"])


# ---------------------------------------------------------------- links and names


def anchors(text):
    """Anchors of headings as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE),
        re.MULTILINE,
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_anchors_exist(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(path):
    """Those in backticks or a code block that lie in folders of the repository."""
    named = set(re.findall(r"\b(?:hparams|weights|docs|tests)/[\w/.-]*\w", path.read_text()))
    made = {"tests/by_hand", "weights/receipts-lite2.pt"}  # a folder; some check-outs lack weights
    for name in named - made:
        assert (ROOT / name).exists(), name


def names_of(room):
    """Functions and classes at the top of a module, and the methods of its classes."""
    names = set()
    for node in ast.parse(read(f"{room}.py")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


ROOMS = {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_functions_that_a_document_names_exist(path):
    for room, name in re.findall(r"`(\w+)\.([A-Za-z_][\w.]*)`", path.read_text()):
        if room in ROOMS and name not in ("py", "json"):
            assert name in names_of(room), f"{room}.{name}"


def test_names_that_a_document_imports_exist():
    imports = [
        (room, name)
        for path in DOCUMENTS
        for room, names in re.findall(r"from (\w+) import ([\w, ]+)", path.read_text())
        for name in names.split(", ")
    ]
    assert ("evaluate", "Detector") in imports
    for room, name in imports:
        assert name in names_of(room), f"{room}.{name}"


def test_design_names_each_room_and_readme_each_command():
    floors = []
    rows = re.findall(r"^\| (\d.*?)?\|? ?`(\w+)\.py` \|", read("DESIGN.md"), re.MULTILINE)
    for floor, room in rows:
        if floor:
            floors.insert(0, [])
        floors[0].append(room)
    assert [sorted(rooms) for rooms in floors] == [sorted(rooms) for rooms in FLOORS]
    tree = read("README.md").partition("## Files")[2].partition("```\n")[2].partition("```")[0]
    scripts = re.findall(r"(\w+)\.py ", tree)
    folders = re.findall(r"(\w+)/ ", tree)
    commands = {room for room in ROOMS if '__name__ == "__main__"' in read(f"{room}.py")}
    assert set(scripts) == commands
    for folder in {*folders} - {"runs"}:
        assert (ROOT / folder).is_dir(), folder


def test_manual_has_each_preset_and_each_exit_code():
    manual = read("MANUAL.md")
    for path in (ROOT / "hparams").glob("*.json"):
        assert f"`{path.name}`" in manual or path.name.startswith("sweep_"), path.name
    codes = manual.partition("## Exit codes")[2]
    for code in re.findall(r"(\d+) ", files_docstring()):
        assert re.search(rf"^\| .*\b{code}\b.* \|", codes, re.MULTILINE), code


def test_manual_has_each_strength_of_photographs():
    text = read("MANUAL.md").partition("**Augmentation.**")[2].partition("**Run folder.**")[0]
    strengths = set(re.findall(r"`(\w+)`", text))
    photographs = {
        name.removeprefix("aug_")
        for name, field in hparams.FIELDS.items()
        if name.startswith("aug_") and field.default == 0
    }
    assert photographs - {"mirror"} <= strengths


def files_docstring():
    """The table of exit codes in files.py, from its first code on."""
    return ast.get_docstring(ast.parse(read("files.py"))).partition("Exit codes")[2]


# ---------------------------------------------------------------- words and numbers


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_word_says_how_it_was_made(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert not re.search(FORBIDDEN, line), f"{path.name}:{number}: {line}"


def test_numbers_of_the_readme_stand_in_the_results():
    """README's one table repeats what RESULTS.md has with intervals and commands."""
    table = re.findall(r"^\|.*\|$", read("README.md"), re.MULTILINE)
    numbers = re.findall(r"(?<= )[.]\d+", "\n".join(table))
    assert len(numbers) >= 8
    results = read("RESULTS.md")
    for number in numbers:
        assert number in results, number


def is_ignored(path):
    """Whether git leaves a path out; None where this is no checkout."""
    command = ["git", "check-ignore", "--quiet", "--no-index", path]
    code = subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode
    return {0: True, 1: False}.get(code)


def test_git_leaves_out_what_the_commands_write():
    if is_ignored("README.md") is None:
        pytest.skip("no checkout")
    written = "runs/x/last.pt data/synth/train.json wandb/run predictions.json look/a.jpg"
    written += " weights/maps/a.npz weights/tune.png weights/best.onnx report.html out.csv"
    written += " suspects.json mended/a.jpg found.jsonl weights.pt mean.pt"
    assert [path for path in written.split() if not is_ignored(path)] == []
    kept = "weights/receipts-lite2.pt tests/data/cleval.json hparams/best.json train.py"
    assert [path for path in kept.split() if is_ignored(path)] == []


def test_contributing_is_five_lines_on_ladder_tokens_tests_by_hand_and_words():
    lines = [line for line in read("CONTRIBUTING.md").splitlines() if line[:1].isdigit()]
    words = "floors below it", "budget of tokens", "python -m pytest", "by_hand", "plain English"
    assert len(lines) == 5 and all(word in line for word, line in zip(words, lines))


def test_requirements_name_every_import():
    """requirements.txt has what the modules import at their top, and lower bounds alone."""
    packages = {"cv2": "opencv-python", "PIL": "pillow", "yaml": "pyyaml"}
    required = {}
    for line in read("requirements.txt").splitlines():
        if line and not line.startswith("#"):
            name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
            required[name.lower()] = bound
    imported = set()
    for room in ROOMS:
        for node in ast.parse(read(f"{room}.py")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    imported -= ROOMS | {*sys.stdlib_module_names}
    assert {packages.get(name, name) for name in imported} <= required.keys()

    exact = dict(line.split("==") for line in read("requirements.lock.txt").split() if "==" in line)
    pinned = {name.lower() for name in exact}
    assert required.keys() <= pinned
