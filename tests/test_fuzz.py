"""Each target of by_hand/fuzz.py for a moment; ten minutes are `python tests/by_hand/fuzz.py`."""

import pytest

pytest.importorskip("hypothesis")
import fuzz


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_moment_of_fuzzing(target):
    assert fuzz.fuzz(target, 0.3, phases=[fuzz.Phase.generate]) >= 5
