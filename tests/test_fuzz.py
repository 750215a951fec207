"""Each target of tests/fuzz.py for a moment; ten minutes of it are `python tests/fuzz.py`."""

import pytest

pytest.importorskip("hypothesis")
import fuzz  # noqa: E402


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_moment_of_fuzzing(target):
    assert fuzz.fuzz(target, 0.3, phases=[fuzz.Phase.generate]) >= 5
