"""The allowance: over time the trainer gets its share, whatever its layers and the server's sleeps are like."""

import math
import random

import pytest

from alchemist.protocol.allowance import MAX_DEBT_S, QUANTUM_S, Allowance


def simulate(
    share: float, layer_s: float, late_s: float, until: float = 200.0
) -> tuple[float, float]:
    """A trainer that always has work, on a clock of its own, with requests in flight throughout.

    Returns:
        share of the time it ran, and the longest run in seconds.
    """
    draw = random.Random(0)
    allowance = Allowance()
    now = ran = longest = 0.0
    while now < until:
        run = 0.0
        while True:
            layer = layer_s * draw.uniform(0.5, 1.5)
            run += layer
            allowance.ran(layer, share)
            if allowance.is_spent(share):
                break
        now, ran, longest = now + run, ran + run, max(longest, run)
        while (wait := allowance.until_earned(share)) > 1e-9:
            wait += late_s * draw.random()
            allowance.waited(wait, share)
            now += wait
    return ran / now, longest


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("layer_s", [0.001, 0.005, 0.04, 0.15])
@pytest.mark.parametrize("late_s", [0.0, 0.004])
def test_the_trainer_gets_its_share(share, layer_s, late_s):
    got, longest = simulate(share, layer_s, late_s)
    assert got == pytest.approx(share, rel=0.05)
    # Quanta: what is in hand, stretched by what is earned meanwhile, and the layer that runs over.
    assert longest <= 2 * QUANTUM_S / (1 - share) + 1.5 * layer_s


def test_no_share_is_never_a_quantum():
    allowance = Allowance()
    assert allowance.is_spent(0.0)
    allowance.waited(1e6, 0.0)
    assert allowance.until_earned(0.0) == math.inf
    assert allowance.ran(0.07, 0.0) == 0.07
    assert allowance.seconds == 0.0


def test_all_of_the_time_is_never_spent():
    allowance = Allowance()
    assert allowance.ran(1e6, 1.0) == 0.0
    assert not allowance.is_spent(1.0)
    assert allowance.until_earned(1.0) == 0.0


def test_what_ran_beyond_is_told_and_owed():
    allowance = Allowance()
    allowance.waited(1.0, 0.5)
    assert allowance.seconds == 2 * QUANTUM_S
    assert allowance.ran(0.1, 0.5) == pytest.approx(0.1 - 2 * QUANTUM_S / 0.5)
    owed = -allowance.seconds
    assert owed == pytest.approx(0.5 * 0.1 - 2 * QUANTUM_S)
    assert allowance.until_earned(0.5) == pytest.approx((owed + QUANTUM_S) / 0.5)


def test_debt_is_bounded_and_gone_when_the_share_is():
    allowance = Allowance()
    allowance.ran(100.0, 0.2)
    assert allowance.seconds == -MAX_DEBT_S
    allowance.ran(0.1, 0.0)
    assert allowance.seconds == 0.0
