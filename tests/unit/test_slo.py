"""The controller of policy slo: backs off at once, rises slowly, and keeps the targets on recorded requests."""

import math
from pathlib import Path

import msgspec
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

TRACE = Path(__file__).parents[1] / "data" / "slo_trace.json"
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
    is_of_last_cut=st.booleans(),
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


def test_a_rush_cuts_the_share_once_and_holds_it():
    echo = msgspec.structs.replace(SLOW, is_of_last_cut=True)
    decided = replay([SLOW, echo, echo, *[EASY] * WINDOW], TARGETS, share=0.8)
    assert decided == pytest.approx([0.4] * (2 + WINDOW) + [0.4 + STEP])
    assert replay([SLOW, echo, SLOW], TARGETS, share=0.8)[-1] == pytest.approx(0.2)


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
        assert first <= share * (1 if recent[-1].is_of_last_cut else BACK_OFF)
    else:
        assert first <= share + STEP


@given(shares, shares, st.lists(observations, min_size=1, max_size=WINDOW))
def test_a_larger_share_never_becomes_the_smaller(a, b, recent):
    low, high = sorted((a, b))
    assert decide(low, recent, TARGETS) <= decide(high, recent, TARGETS)


class Phase(msgspec.Struct):
    load: str
    requests: list[Observation]


class Trace(msgspec.Struct):
    targets: dict[str, float]
    phases: list[Phase]


@pytest.fixture(scope="module")
def recorded():
    return msgspec.json.decode(TRACE.read_bytes(), type=Trace)


def shares_by_phase(recorded: Trace) -> list[list[float]]:
    requests = [seen for phase in recorded.phases for seen in phase.requests]
    decided = iter(replay(requests, Targets(**recorded.targets)))
    return [[next(decided) for _ in phase.requests] for phase in recorded.phases]


def test_a_recorded_rush_halves_the_share_away_and_calm_gives_it_back(recorded):
    assert [phase.load for phase in recorded.phases] == ["calm", "heavy", "calm"]
    calm, heavy, after = shares_by_phase(recorded)
    assert calm[-1] > 0.1
    assert heavy[0] <= calm[-1] * BACK_OFF
    num_cuts = math.ceil(math.log(FLOOR / calm[-1], BACK_OFF))
    assert num_cuts <= 7
    assert set(heavy[num_cuts - 1 :]) == {0.0}
    assert set(after[: WINDOW - 1]) == {0.0}
    assert after[WINDOW - 1 :] == pytest.approx(
        [min(1.0, STEP * (i + 1)) for i in range(len(after) - WINDOW + 1)]
    )


def test_every_recorded_request_at_risk_halves_the_share_and_none_raises_it_by_more_than_a_step(
    recorded,
):
    targets = Targets(**recorded.targets)
    requests = [seen for phase in recorded.phases for seen in phase.requests]
    num_at_risk = sum(targets.is_at_risk(seen) for seen in requests)
    assert 20 < num_at_risk < len(requests) - 20
    share = 0.0
    for seen, after in zip(requests, replay(requests, targets), strict=True):
        if targets.is_at_risk(seen):
            assert after in (share * BACK_OFF, 0.0)
        else:
            assert after in (share, pytest.approx(min(1.0, share + STEP)))
        share = after


def test_with_targets_ten_times_wider_the_same_requests_give_all_of_the_time(recorded):
    wide = Targets(**{name: 10 * value for name, value in recorded.targets.items()})
    requests = [seen for phase in recorded.phases for seen in phase.requests]
    assert replay(requests, wide)[-1] == 1.0
