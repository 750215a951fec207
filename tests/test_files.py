"""files.py and hparams.py: JSON and YAML values against each other, names and words of a command
line."""

import itertools
import json

import pytest
from conftest import ROOT, error_line

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
        ("", "not a YAML file"),
        ("a: \x00", "not a YAML file"),
        (" " * (1 << 20) + "a", "larger than 1 MiB"),
    ],
    ids=range(10),
)
def test_what_is_no_yaml_is_one_line(text, words, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(files.DataError, match=words) as error:
        files.read_json(tmp_path / "a.yaml")
    assert len(str(error.value).splitlines()) == 1


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
            f"is a sweep, no hyperparameters; run it: sweep.py {path}",
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
    args = hparams.trainer_parser().parse_args(words)
    assert hparams.given_flags(args) == {key: value}


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
        hparams.trainer_parser().parse_args(words.split())
    assert ended.value.code == 2 and answer in error_line(capsys.readouterr().err)
