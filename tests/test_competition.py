"""From a competition's folder to a submission, as tests/by_hand/competition.py walks, in small."""

import csv
import json

from competition import SMALL
from conftest import ROOT, run_python


def test_a_competition_folder_becomes_a_submission(tmp_path):
    script = ROOT / "tests" / "by_hand" / "competition.py"
    done = run_python(script, "walk", "--small", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"40 pages, {SMALL['words']} words" in done.stdout
    assert "out.csv: 8 pages" in done.stdout
    folder = tmp_path / "walk"
    words = 0
    for split, count in SMALL["pages"].items():
        images = json.loads((folder / f"DATA/jsons/{split}.json").read_text())["images"]
        assert len(images) == count
        assert all((folder / "DATA/images" / split / name).is_file() for name in images)
        words += sum(len(entry["words"]) for entry in images.values())
    assert words == SMALL["words"]
    with open(folder / "out.csv") as file:  # `images` are those of test, the last split
        assert [row["filename"] for row in csv.DictReader(file)] == [*images]
