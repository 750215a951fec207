"""An output never replaces an input: every flag of every command that writes a file, with each
input of that command as its target."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import tiny_sweep, write_labels

import command
import data
import ensemble
import evaluate
import pictures
import sweep
from dbnet import DBNet, save_checkpoint
from hparams import FIELDS, Hparams
from labels import load_labels

HP = Hparams(data="s", backbone="mobilenetv3_small_050", pretrained="none", neck=16, size=96)
SUBCOMMANDS = "check", "diff", "synth", "split", "convert"
MAINS = {"evaluate": evaluate.main, "ensemble": ensemble.main, "sweep": sweep.main}
MAINS |= dict.fromkeys(SUBCOMMANDS, data.main)

# flags and arguments, but for hyperparameters, that name what is written ...
OUTPUTS = {
    "train": set(),  # a run writes into runs/NAME, which is new, or its own
    "sweep": {"html"},  # and so does a sweep
    "ensemble": {"submission", "out"},
    "evaluate": {"out", "export", "html", "pictures", "write", "audit", "to"},
    "check": {"pictures"},
    "diff": set(),
    "synth": {"out"},
    "split": {"out"},
    "convert": {"out"},
}
# ... and all others
OTHERS = {
    "train": "hparams resume rescore seeds baseline device log artifact print_hparams",
    "sweep": "sweep name enqueue known parallel devices launcher continue_trial status report json "
    "replay rule wandb",
    "ensemble": "sources device engine json data split image_dir method votes weights scales flip "
    "best drop_worst decide sample validate allow_empty hparams",
    "evaluate": "sources compare mix device engine json data split image_dir images shard tile "
    "stress rank tune metric hparams flip",
    "check": "data image_dir size hparams",
    "diff": "old new image_dir",
    "synth": "pages seed size words unit habit",
    "split": "data image_dir folds seed split",
    "convert": "data image_dir to categories link",
}


class Built(Exception):
    """Carries a parser out of the function that would go on to parse with it."""


def parsers(monkeypatch):
    """{command: its parser}."""

    def stop(parser, *_):
        raise Built(parser)

    monkeypatch.setattr(command.Parser, "parse_known_args", stop)
    found = {"train": command.trainer_parser(), "sweep": sweep.make_parser()}
    for name, room in (("evaluate", evaluate), ("ensemble", ensemble), ("data", data)):
        with pytest.raises(Built) as error:
            room.parse_args([])
        (found[name],) = error.value.args
    (subparsers,) = found.pop("data")._subparsers._group_actions
    return found | subparsers.choices


def test_each_flag_is_known_to_write_or_not(monkeypatch):
    for name, parser in parsers(monkeypatch).items():
        flags = {action.dest for action in parser._actions} - {"help"}
        assert flags - {*FIELDS} == (OUTPUTS[name] | {*OTHERS[name].split()}) - {*FIELDS}, name
    assert OUTPUTS.keys() == OTHERS.keys() == {"train", *MAINS}


def write_checkpoint(path):
    """One that trained on the train pages of `s`."""
    digests = [pictures.picture_digest(page.path) for page in load_labels("s", "train")]
    state = {"model": DBNet(HP.backbone, HP.neck).state_dict(), "hparams": asdict(HP), "epoch": 1}
    origin = {"trained": digests, "chosen": [], "unknown": []}
    torch.manual_seed(0)
    save_checkpoint(path, {**state, "origin": origin, "scores": {}})


@pytest.fixture
def place(work):
    """A working directory with one of each kind of input."""
    folder = Path("own")  # `s` itself is other tests', too
    shutil.copytree("s", folder)
    Path("s").unlink()
    folder.rename("s")
    for name in ("a.pt", "b.pt"):
        write_checkpoint(name)
    val = load_labels("s", "val")
    found = {page.name: {"words": {}} for page in val}
    for name in ("p", "q"):
        write_labels(work, found, name)
    rows = "".join(f"{page.name},\n" for page in val)
    Path("sample.csv").write_text("filename,polygons\n" + rows)
    Path("h.json").write_text('{"thresh": 0.4}')

    history = {"sweep": tiny_sweep(), "epochs": 2, "trials": []}
    Path("history.json").write_text(json.dumps(history))
    Path("runs/w").mkdir(parents=True)
    record = {"sweep": tiny_sweep(), "extra": [], "hparams": asdict(Hparams())}
    Path("runs/w/sweep.json").write_text(json.dumps(record))
    Path("runs/w/state.jsonl").write_text("")
    return work


CORNERS = [[1, 2], [30, 2], [30, 9], [1, 9]]
PICTURE = "s/images/synth_00000.jpg"  # of val
TRAINED = "s/images/synth_00005.jpg"  # of train
SCORED = "a.pt b.pt h.json s/val.json " + PICTURE
CASES = (  # command, the words but for the output, what may write, the inputs
    ("evaluate", "a.pt --compare b.pt --hparams h.json --data s", "out html pictures", SCORED),
    ("evaluate", "p.json --compare q.json --data s", "out html pictures", "p.json q.json"),
    ("evaluate", "a.pt --hparams h.json", "out html pictures", f"s/train.json {TRAINED}"),
    ("evaluate", "a.pt --images s/images", "out pictures", f"a.pt {PICTURE}"),
    ("evaluate", "a.pt --data s --stress", "html", f"a.pt s/val.json {PICTURE}"),
    ("evaluate", "a.pt --mix b.pt --hparams h.json", "export", "a.pt b.pt h.json"),
    ("evaluate", "a.pt --mix b.pt --data s", "out html", "a.pt b.pt"),
    ("evaluate", "a.pt --tune --data s", "write", f"a.pt s/val.json {PICTURE}"),
    ("evaluate", "a.pt --tune", "write", f"s/train.json {TRAINED}"),
    ("evaluate", "a.pt --data s --hparams h.json", "audit", f"a.pt h.json s/val.json {PICTURE}"),
    ("evaluate", "a.pt", "audit", "s/train.json"),
    ("evaluate", "a.pt --data s --audit new.json", "to", f"s s/images s/val.json {PICTURE}"),
    (
        "ensemble",
        "a.pt --data s --split val --sample sample.csv --hparams h.json --submission new.csv",
        "out submission",
        f"a.pt h.json sample.csv s/val.json {PICTURE}",
    ),
    ("ensemble", "p.json q.json --method voting --data s", "out submission", "p.json q.json"),
    ("ensemble", "a.pt", "out submission", f"s/train.json {TRAINED}"),
    ("check", "check s --hparams h.json", "pictures", f"s s/images s/train.json h.json {PICTURE}"),
    ("split", "split s", "out", f"s/train.json {TRAINED}"),
    ("convert", "convert s", "out", f"s s/images s/train.json {PICTURE}"),
    ("synth", "synth", "out", "s s/train.json"),
    ("sweep", "--report history.json", "html", "history.json"),
    ("sweep", "--report runs/w", "html", "runs/w/sweep.json runs/w/state.jsonl"),
)
SUFFIX = {"submission": ".csv", "export": ".onnx", "write": ".json", "audit": ".json"}
WORDS_BEFORE = {
    ("synth", "out"): [],
    ("convert", "out"): [],
    ("evaluate", "to"): ["--to", "labelme"],
}


def test_each_flag_that_writes_has_a_case():
    tried = {name: set() for name in OUTPUTS}
    for name, _, flags, _ in CASES:
        tried[name] |= {*flags.split()}
    assert tried == OUTPUTS


def exit_code_of(name, words):
    try:
        return MAINS[name](words)
    except SystemExit as stop:
        return stop.code


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("name, words, flags, inputs", CASES)
def test_an_output_never_replaces_an_input(name, words, flags, inputs, place, capsys, monkeypatch):
    """Not even one that has the form of the output."""
    monkeypatch.setattr(evaluate, "check_forms", lambda args: None)
    inputs, flags = inputs.split(), flags.split()
    links = {}  # {suffix: names of the inputs with it}
    for suffix in {SUFFIX.get(flag, "") for flag in flags}:
        links[suffix] = [f"link{n}{suffix}" for n in range(len(inputs))]
        for link, target in zip(links[suffix], inputs):
            Path(link).symlink_to(target)
    before = contents()

    for flag in flags:
        for target in inputs + links[SUFFIX.get(flag, "")]:
            before_it = WORDS_BEFORE.get((name, flag), [f"--{flag}"])
            code = exit_code_of(name, [*words.split(), *before_it, target])
            err = capsys.readouterr().err
            assert code == 2, (flag, target, err)
            assert err.splitlines()[-1].startswith("error: "), (flag, target, err)
    assert contents() == before


def test_an_output_replaces_only_files_of_its_kind(place, capsys):
    """A slip of the keyboard costs no file, also one that the command does not read."""
    scored = "p.json --data s"
    voted = f"p.json --method voting {scored[7:]}"
    for name, text in (("x.html", "mine"), ("x.csv", "a,b\n"), ("x.jsonl", '{"a": 1}')):
        Path(name).write_text(text)
    before = contents()
    for main, words, flag, names in (
        (evaluate.main, scored, "--out", "a.pt s/train.json h.json x.jsonl new " + PICTURE),
        (evaluate.main, scored, "--html", "a.pt s/train.json x.html new.json " + PICTURE),
        (evaluate.main, "a.pt --data s", "--audit", "b.pt s/train.json h.json x.html -"),
        (ensemble.main, voted, "--out", "a.pt s/train.json h.json x.jsonl new"),
        (ensemble.main, voted, "--submission", "a.pt x.csv new.json -"),
    ):
        for path in names.split():
            assert main([*words.split(), flag, path]) == 2, (flag, path)
            (line,) = capsys.readouterr().err.splitlines()
            assert re.search(f"exists, and is not what {flag} writes|not a [.]", line), line
    assert contents() == before

    # what it has written is replaced, and the first half line that a kill left; also predictions
    # that are all quite sure, as of a detector without confidences
    sure = {page.name: {"words": {"1": {"points": CORNERS}}} for page in load_labels("s", "val")}
    write_labels(place, sure, "sure")
    for name in ("o.json", "o.jsonl"):
        for source in ("p.json", "sure.json"):
            Path(name).write_text('{"images"')
            for _ in range(2):
                words = f"{source} --data s --out {name} --html o.html"
                assert evaluate.main(words.split()) == 0
    # and a submission to which a spreadsheet has added a byte order mark
    Path("x.csv").write_text("\ufefffilename,polygons\n")
    words = f"{voted} --split val --out o.json --submission x.csv"
    ensemble.check_voting_flags(ensemble.parse_args(words.split()))


def test_pictures_are_not_drawn_over_those_that_are_read(place, capsys):
    before = contents()
    for words in ("a.pt --data s", "a.pt --images s/images", "p.json --data s"):
        assert evaluate.main([*words.split(), "--pictures", "s/images"]) == 2
        assert f"{PICTURE}: is read by this command" in capsys.readouterr().err
    assert contents() == before


def test_a_file_that_nobody_named_is_not_replaced(place, capsys):
    assert data.main(["split", "s", "--folds", "2"]) == 0
    file = Path("runs/split-s-2.json")
    split = json.loads(file.read_text())
    file.write_text("kept")
    assert data.main(["split", "s", "--folds", "2"]) == 2
    assert f"{file}: exists, and no flag names it" in capsys.readouterr().err
    assert file.read_text() == "kept"
    assert data.main(["split", "s", "--folds", "2", "--out", str(file)]) == 0
    assert json.loads(file.read_text()) == split


@pytest.mark.parametrize(
    "name, words",
    [
        ("evaluate", "p.json --data s --out x.json --html link.html"),
        ("evaluate", "p.json --data s --out x.json --pictures x.json"),
        ("evaluate", "a.pt --data s --audit x.json --to labelme x.json"),
        ("evaluate", "a.pt --images two --pictures x"),
        ("ensemble", "p.json --method voting --data s --out x.json --submission link.csv"),
    ],
)
def test_no_output_replaces_another(name, words, place, capsys):
    Path("two").mkdir()
    for link in ("link.html", "link.csv"):
        Path(link).symlink_to("x.json")
    for picture in ("a.png", "a.png.jpg"):  # both would be drawn as a.png.jpg
        shutil.copy(PICTURE, Path("two", picture))
    before = contents()
    assert exit_code_of(name, words.split()) == 2
    assert "2 outputs of this command; name another file" in capsys.readouterr().err
    assert contents() == before


@pytest.mark.parametrize(
    "words",
    [
        "evaluate.py p.json --data s --out -",
        "evaluate.py p.json --data s --json --out /dev/stdout",
        "ensemble.py p.json --method voting --data s --out -",
        "data.py split s --folds 2 --out -",
    ],
)
def test_an_output_that_is_printed_is_alone_on_stdout(words, place, script):
    """As in `| jq`; what is otherwise printed is still there, on stderr."""
    result = script(*words.split())
    assert result.returncode == 0, result.stderr
    assert isinstance(json.loads(result.stdout)["images"], dict)
    assert "pages" in result.stderr


@pytest.mark.parametrize(
    "words", ["evaluate.py p.json --data s --html -", "sweep.py --report history.json --html -"]
)
def test_a_page_that_is_printed_is_alone_on_stdout(words, place, script):
    result = script(*words.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("<!") and result.stdout.rstrip().endswith("</html>")
    assert "hmean" in result.stderr or "#" in result.stderr
