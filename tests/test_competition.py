"""From a competition's folder to a submission, as tests/by_hand/competition.py walks, in small and
in one process, which imports torch once."""

import csv
import importlib
import json

import competition
from conftest import ROOT

import sweep


def test_a_competition_folder_becomes_a_submission(work, warm, monkeypatch, capsys):
    def step(name, command, folder, accepted=(0,)):
        monkeypatch.chdir(folder)
        script, *words = map(str, command)
        code = importlib.import_module(script.removesuffix(".py")).main(words)
        assert code in accepted, (name, code, capsys.readouterr().err)
        return True

    monkeypatch.setattr(competition, "step", step)
    monkeypatch.setattr(sweep, "TRAINER", [*warm, str(ROOT / "train.py")])
    assert competition.main(["walk", "--small"]) == 0
    said, small = capsys.readouterr().out, competition.SMALL
    assert f"40 pages, {small['words']} words" in said
    assert "out.csv: 8 pages" in said
    folder = work / "walk"
    words = 0
    for split, count in small["pages"].items():
        images = json.loads((folder / f"DATA/jsons/{split}.json").read_text())["images"]
        assert len(images) == count
        assert all((folder / "DATA/images" / split / name).is_file() for name in images)
        words += sum(len(entry["words"]) for entry in images.values())
    assert words == small["words"]
    with open(folder / "out.csv") as file:  # `images` are those of test, the last split
        assert [row["filename"] for row in csv.DictReader(file)] == [*images]
