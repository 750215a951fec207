"""Each target of by_hand/fuzz.py for a moment; ten minutes are `python tests/by_hand/fuzz.py`."""

import fuzz
import numpy as np
import pytest

ALL = {"metric", "decode", "voting"}  # targets without a reader: every case is checked
BUGS = {  # a mistake in what each target checks, which must be found
    "labels": (fuzz.formats, "pages_to_json", lambda pages: {"images": {}}),
    "pictures": (fuzz, "read_image", lambda path: np.zeros((2, 2, 3), np.uint8)),
    "hparams": (fuzz.hparams, "validate", lambda hp: fuzz.dataclasses.replace(hp, lr=np.nan)),
    "sweep": (fuzz.space.Cube, "decode", lambda cube, point: {}),
    "csv": (fuzz.ensemble, "read_submission", lambda *_: ({"a.png": [np.ones((3, 2), int)]}, [])),
    "metric": (fuzz.cleval, "iou50", lambda gt, *_: np.full(23, len(gt))),
    "decode": (fuzz.db_postprocess, "decode_candidates", lambda *_, **__: ([], [1.0])),
    "voting": (fuzz.ensemble, "vote", lambda *_: ([np.eye(3)], np.array([2.0]))),
}


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_moment_of_fuzzing(target):
    count, through = fuzz.fuzz(target, 0.3, phases=[fuzz.Phase.generate])
    assert through == count if target in ALL else 0 < through < count


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_mistake_is_found(target, monkeypatch):
    monkeypatch.setattr(*BUGS[target])
    with pytest.raises((AssertionError, ValueError)):
        fuzz.fuzz(target, 0.3, phases=[fuzz.Phase.generate])
