"""The controller of policy slo: backs off at once, rises slowly, and keeps the targets on recorded requests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alchemist.server.slo import (
    BACK_OFF,
    FLOOR,
    MARGIN,
    STEP,
    WINDOW,
    Observation,
    Targets,
    decide,
)

TARGETS = Targets(ttft_ms=200.0, tpot_ms=20.0)
EASY = Observation(ttft_ms=50.0, tpot_ms=8.0, num_tokens=24)
SLOW = Observation(ttft_ms=170.0, tpot_ms=8.0, num_tokens=24)
latency = st.none() | st.floats(0, 1e5)
observations = st.builds(
    Observation,
    ttft_ms=latency,
    tpot_ms=latency,
    total_ms=latency,
    num_tokens=st.integers(0, 4096),
)
shares = st.floats(0, 1)


def replay(trace, targets, share=0.0):
    """The share after each request."""
    decided = []
    for i in range(len(trace)):
        share = decide(share, trace[max(0, i + 1 - WINDOW) : i + 1], targets)
        decided.append(share)
    return decided


def test_room_to_spare_raises_the_share_step_by_step():
    assert replay([EASY] * 3, TARGETS) == pytest.approx([STEP, 2 * STEP, 3 * STEP])
    assert replay([EASY] * 100, TARGETS)[-1] == 1.0


def test_risk_halves_it_at_once_and_holds_it_for_a_window():
    up = [EASY] * 20
    decided = replay([*up, SLOW, *[EASY] * WINDOW], TARGETS)
    before = 20 * STEP
    assert decided[19] == pytest.approx(before)
    assert decided[20:-1] == pytest.approx([before * BACK_OFF] * WINDOW)
    assert decided[-1] == pytest.approx(before * BACK_OFF + STEP)


def test_at_risk_comes_before_missed():
    assert TARGETS.is_at_risk(Observation(ttft_ms=200.0 * MARGIN + 1))
    assert not TARGETS.is_at_risk(Observation(ttft_ms=200.0 * MARGIN - 1))
    assert MARGIN < 1


def test_lasting_trouble_leaves_nothing():
    decided = replay([SLOW] * 8, TARGETS, share=1.0)
    assert decided[-1] == 0.0
    assert all(share == 0.0 or share >= FLOOR for share in decided)


@pytest.mark.parametrize(
    ("targets", "seen", "pressure"),
    [
        (Targets(ttft_ms=100, tpot_ms=None), Observation(ttft_ms=50, tpot_ms=1e9), 0.5),
        (Targets(ttft_ms=None, tpot_ms=10), Observation(ttft_ms=1e9, tpot_ms=5), 0.5),
        (Targets(ttft_ms=100, tpot_ms=10), Observation(ttft_ms=50, tpot_ms=20), 2.0),
        # A whole answer: ten tokens may take 100 + 9 · 10 ms.
        (Targets(ttft_ms=100, tpot_ms=10), Observation(total_ms=95, num_tokens=10), 0.5),
        (Targets(ttft_ms=100, tpot_ms=10), Observation(total_ms=50, num_tokens=0), 0.5),
        (Targets(ttft_ms=100, tpot_ms=None), Observation(total_ms=1e9, num_tokens=1), None),
        (TARGETS, Observation(), None),
    ],
)
def test_pressure(targets, seen, pressure):
    assert targets.pressure(seen) == (pressure and pytest.approx(pressure))


def test_what_cannot_be_judged_changes_nothing():
    assert decide(0.3, [EASY, Observation()], TARGETS) == 0.3


@given(shares, st.lists(observations, min_size=1, max_size=3 * WINDOW))
def test_the_share_stays_within_bounds_and_the_function_is_pure(share, recent):
    first = decide(share, recent, TARGETS)
    assert first == decide(share, recent, TARGETS) == decide(share, recent[-WINDOW:], TARGETS)
    assert 0 <= first <= 1
    if TARGETS.is_at_risk(recent[-1]):
        assert first <= share * BACK_OFF
    else:
        assert first <= share + STEP


@given(shares, shares, st.lists(observations, min_size=1, max_size=WINDOW))
def test_a_larger_share_never_becomes_the_smaller(a, b, recent):
    low, high = sorted((a, b))
    assert decide(low, recent, TARGETS) <= decide(high, recent, TARGETS)
