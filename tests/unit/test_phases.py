"""Time by phase: what is inside another phase is not that one's."""

import time

import pytest
import torch

from alchemist.trainer.replay import Phases


def test_a_phase_inside_another_is_taken_out_of_it():
    phases = Phases(torch.device("cpu"))
    with phases.phase("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with phases.phase("inner"):
                time.sleep(0.03)
                with phases.phase("innermost"):
                    time.sleep(0.01)
    seconds = phases.seconds
    assert seconds["outer"] == pytest.approx(0.02, abs=0.015)
    assert seconds["inner"] == pytest.approx(0.06, abs=0.03)
    assert seconds["innermost"] == pytest.approx(0.02, abs=0.015)
    # Read twice, and gone on with.
    with phases.phase("outer"):
        time.sleep(0.02)
    assert phases.seconds["outer"] == pytest.approx(0.04, abs=0.03)
    assert phases.seconds.get("never", 0.0) == 0.0


def test_a_phase_that_fails_is_counted():
    phases = Phases(torch.device("cpu"))
    with pytest.raises(ValueError, match="as asked"), phases.phase("outer"), phases.phase("inner"):
        raise ValueError("as asked")
    assert set(phases.seconds) == {"outer", "inner"}
