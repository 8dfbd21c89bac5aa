"""What is seen of requests in flight: it brakes at once, and what is done goes to the controller."""

import asyncio

import pytest

from alchemist.protocol.lease import Lease
from alchemist.server.config import Config
from alchemist.server.pacing import Pacing, apply_policy
from alchemist.server.slo import STEP, Targets


def chunk(num_tokens: int, finish: str | None = None, rid: str = "a") -> dict:
    reason = {"type": finish} if finish else None
    return {"id": rid, "completion_tokens": num_tokens, "finish_reason": reason}


def made(ttft_ms=None, tpot_ms=None, share=0.5) -> tuple[Lease, Pacing]:
    lease = Lease.create()
    pacing = Pacing(lease, Targets(ttft_ms=ttft_ms, tpot_ms=tpot_ms))
    pacing.share = share
    lease.set_share(share)
    return lease, pacing


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 0.0),
        ({"lease_policy": "share", "lease_share": 0.3}, 0.3),
        ({"lease_policy": "none"}, 1.0),
        ({"lease_policy": "slo", "slo_ttft_ms": 100.0}, 0.0),
    ],
)
def test_the_share_a_policy_begins_with(options, share):
    lease = Lease.create()
    pacing = apply_policy(Config(**options), lease)
    assert lease.share == share
    assert (pacing is not None) == (options.get("lease_policy") == "slo")


async def test_a_first_token_that_is_late_stops_training_until_it_comes():
    lease, pacing = made(ttft_ms=50)
    with pacing.watch(is_stream=True) as pace:
        assert lease.share == 0.5
        await asyncio.sleep(0.06)
        assert lease.share == 0.0
        pace.saw(chunk(1))
        assert lease.share == 0.5
        pace.saw(chunk(2, "stop"))
    # It came at risk: half, for good.
    assert lease.share == pacing.share == 0.25


async def test_a_request_that_ends_without_a_word_takes_its_brake_with_it():
    lease, pacing = made(ttft_ms=10)
    with pacing.watch(is_stream=True):
        await asyncio.sleep(0.03)
        assert lease.share == 0.0
    assert lease.share == 0.5
    with pacing.watch(is_stream=True):
        pass
    await asyncio.sleep(0.03)
    assert lease.share == 0.5


async def test_tokens_that_come_slowly_stop_training_until_they_catch_up():
    lease, pacing = made(tpot_ms=10)
    with pacing.watch(is_stream=True) as pace:
        pace.saw(chunk(1))
        await asyncio.sleep(0.1)
        pace.saw(chunk(4))
        # Three gaps say too little.
        assert lease.share == 0.5
        pace.saw(chunk(5))
        assert lease.share == 0.0
        pace.saw(chunk(500))
        assert lease.share == 0.5
        pace.saw(chunk(501, "length"))
    assert lease.share == pytest.approx(0.5 + STEP)


async def test_other_requests_do_not_release_a_brake():
    lease, pacing = made(ttft_ms=20)
    with pacing.watch(is_stream=True):
        await asyncio.sleep(0.04)
        with pacing.watch(is_stream=True) as quick:
            quick.saw(chunk(1, "stop", rid="b"))
        assert lease.share == 0.0
        assert pacing.share == pytest.approx(0.5 + STEP)


async def test_requests_that_are_late_together_halve_the_share_once():
    lease, pacing = made(ttft_ms=10)
    with pacing.watch(is_stream=True) as one, pacing.watch(is_stream=True) as other:
        await asyncio.sleep(0.03)
        one.saw(chunk(1, "stop", rid="a"))
        assert (lease.share, pacing.share) == (0.0, 0.25)
        with pacing.watch(is_stream=True) as later:
            other.saw(chunk(1, "stop", rid="b"))
            assert pacing.share == 0.25
            await asyncio.sleep(0.03)
            later.saw(chunk(1, "stop", rid="c"))
    assert lease.share == pacing.share == 0.125


async def test_aborted_requests_say_nothing():
    lease, pacing = made(ttft_ms=1e6)
    with pacing.watch(is_stream=True) as pace:
        pace.saw(chunk(1, "abort"))
    assert lease.share == pacing.share == 0.5


async def test_a_whole_answer_is_judged_by_the_sum_of_both_targets():
    lease, pacing = made(ttft_ms=10, tpot_ms=10)
    with pacing.watch(is_stream=False) as pace:
        await asyncio.sleep(0.05)
        assert lease.share == 0.5
        pace.saw(chunk(24, "stop"))
    assert pacing.share == pytest.approx(0.5 + STEP)
    with pacing.watch(is_stream=False) as pace:
        await asyncio.sleep(0.05)
        pace.saw(chunk(2, "stop"))
    assert pacing.share == pytest.approx((0.5 + STEP) / 2)
