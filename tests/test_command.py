"""command.py: flags by any of their names, errors of one line with the flag that was meant."""

from pathlib import Path

import pytest
from conftest import error_line

import command
import ensemble
import evaluate


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["--models.optimizer.lr=1e-3"], "lr", 1e-3),
        (["--models.optimizer.weight_decay", "0.5"], "weight_decay", 0.5),
        (["--a.ema"], "ema", True),
        (["--no-ema"], "ema", False),
        (["--model.no_ema"], "ema", False),
        (["--ema=False"], "ema", False),
        (["--no-pretrained"], "pretrained", "none"),
        (["--init=a.b=c_d"], "init", "a.b=c_d"),
    ],
)
def test_flags_by_any_of_their_names(words, key, value):
    args = command.trainer_parser().parse_args(words)
    assert command.given_flags(args) == {key: value}


@pytest.mark.parametrize(
    "words, answer",
    [
        (
            "models.optimizer.lr=1e-3",
            "unrecognized arguments: models.optimizer.lr=1e-3; use --lr=1e-3",
        ),
        ("+weight_decay=1e-3", "use --weight_decay=1e-3"),
        ("++a.lr=1e-3", "use --lr=1e-3"),
        ("-m lr=1e-3", "use --lr=1e-3"),
        ("--lr=1 T_max=7", "use --T_max=7"),
        ("--models.T_Max=7", "did you mean --T-max?"),
    ],
)
def test_hydras_arguments_are_answered_with_the_flag(words, answer, capsys):
    with pytest.raises(SystemExit) as ended:
        command.trainer_parser().parse_args(words.split())
    assert ended.value.code == 2 and answer in error_line(capsys.readouterr().err)


def test_a_value_without_dashes_is_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parser = command.Parser()
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--name")
    for word, flag in (("lr=1e-3", "lr=1e-3"), ("++model.size=640", "size=640")):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["a.pt", word])
        line = error_line(capsys.readouterr().err)
        assert line.startswith(f"error: {word}: no such file; for a flag write --{flag}")
    Path("lr=1").write_text("")
    assert parser.parse_args(["lr=1", "runs/lr=2/a.pt", "--name", "lr=3"]).name == "lr=3"


@pytest.mark.parametrize("words", ["a.pt --out=", "a.pt --hparams=", "a.pt --data d --images="])
def test_an_empty_value_is_refused_and_not_taken_for_a_missing_flag(words, capsys):
    """`--out "$FILE"` has one if the shell's variable is not set; the predictions were lost."""
    for room in (evaluate, ensemble):
        if "images" in words and room is ensemble:
            continue
        with pytest.raises(SystemExit, match="2"):
            room.parse_args(words.split())
        flag = words.split()[-1].rstrip("=")
        assert f"error: {flag} is empty" in error_line(capsys.readouterr().err)
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(["a.pt", ""])
    assert "error: sources is empty" in error_line(capsys.readouterr().err)

    # a hyperparameter may be empty, to replace the value of a preset
    assert command.given_flags(command.trainer_parser().parse_args(["--init", ""])) == {"init": ""}
