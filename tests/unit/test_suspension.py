"""The trainer's process stands still while requests are in flight, and only then. With a real child that spins."""

import asyncio
import json
import subprocess
import sys
import time

import msgspec
import psutil
import pytest

from alchemist.protocol.lease import Gate, Lease
from alchemist.protocol.shm import SegmentHandle
from alchemist.protocol.states import TrainerEvent
from alchemist.server.lease_status import lease_status
from alchemist.server.suspension import Suspension

CHILD = """
import sys, threading, msgspec
from alchemist.protocol.lease import Lease
from alchemist.protocol.shm import SegmentHandle
lease = Lease.attach(msgspec.json.decode(sys.argv[1], type=SegmentHandle))
def spin():
    while True:
        sum(range(10000))
threading.Thread(target=spin, daemon=True).start()
while True:
    lease.note_gate(0)
"""


@pytest.fixture
def lease():
    lease = Lease.create()
    lease.advance(TrainerEvent.ATTACHED)
    lease.advance(TrainerEvent.STEP_BEGUN)
    return lease


@pytest.fixture
def child(lease):
    handle = msgspec.json.encode(lease.segment.handle).decode()
    assert msgspec.json.decode(handle, type=SegmentHandle) == lease.segment.handle
    process = subprocess.Popen([sys.executable, "-c", CHILD, handle])
    try:
        wait_until(lambda: lease.num_gates > 0)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(condition, timeout=30.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_stopped(process) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def goes_on(lease) -> bool:
    before = lease.num_gates
    time.sleep(0.05)
    return lease.num_gates > before


def suspension_of(lease, process) -> Suspension:
    suspension = Suspension(lease)
    suspension.attach(lambda: process.pid if process.poll() is None else None)
    return suspension


async def settle(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("not within two seconds")


async def stand(lease, suspension):
    """A request comes, and the trainer stands still."""
    lease.set_front_busy(1)
    await settle(suspension.latencies_ms)
    assert not goes_on(lease)


def test_it_stands_still_from_the_first_request_to_the_last_answer(lease, child):
    suspension = suspension_of(lease, child)

    async def serve():
        await stand(lease, suspension)
        assert is_stopped(child)
        lease.set_front_busy(2)
        lease.set_front_busy(1)
        assert not goes_on(lease)
        lease.set_front_busy(0)
        wait_until(lambda: goes_on(lease))

    asyncio.run(serve())
    status = lease_status(lease, suspension, "idle")
    assert (status["suspensions"], status["revocations"], status["revocations_missed"]) == (1, 1, 0)
    assert 0 < status["revoke_p50_ms"] < 2000
    json.dumps(status)


def test_every_time_it_was_stopped_has_a_latency(lease, child):
    """Also where the answer is there before the trainer was seen to stand."""
    suspension = suspension_of(lease, child)

    async def serve():
        for _ in range(50):
            lease.set_front_busy(1)
            lease.set_front_busy(0)

    asyncio.run(serve())
    assert lease.num_suspended == len(suspension.latencies_ms()) == 50
    wait_until(lambda: goes_on(lease))


def test_with_a_share_it_goes_on_and_stands_when_the_share_is_taken(lease, child):
    suspension = suspension_of(lease, child)

    async def serve():
        lease.set_share(0.1)
        lease.set_front_busy(1)
        wait_until(lambda: goes_on(lease))
        assert not suspension.latencies_ms()
        lease.set_share(0.0)
        await settle(suspension.latencies_ms)
        assert not goes_on(lease)
        lease.set_share(0.02)
        wait_until(lambda: goes_on(lease))

    asyncio.run(serve())


def test_only_a_trainer_at_work_is_stopped(lease, child):
    lease.advance(TrainerEvent.STEP_ENDED)
    suspension_of(lease, child)
    lease.set_front_busy(1)
    wait_until(lambda: goes_on(lease))
    assert lease.num_suspended == 0


def test_nothing_is_stopped_before_there_is_a_trainer_or_after_its_end(lease, child):
    Suspension(lease)
    lease.set_front_busy(1)
    wait_until(lambda: goes_on(lease))
    suspension_of(lease, child)
    child.kill()
    child.wait()
    lease.set_front_busy(2)
    assert lease.num_suspended == 0


def test_one_that_dies_while_it_stands_is_let_go(lease, child):
    suspension = suspension_of(lease, child)

    async def serve():
        await stand(lease, suspension)
        child.kill()
        child.wait()
        lease.set_front_busy(0)

    asyncio.run(serve())
    assert len(suspension.latencies_ms()) == 1


def test_the_end_of_the_server_lets_it_go_on_so_that_it_can_end(lease, child):
    suspension = suspension_of(lease, child)

    async def serve():
        await stand(lease, suspension)
        suspension.end()
        wait_until(lambda: goes_on(lease))

    asyncio.run(serve())


def test_the_time_it_stood_is_neither_missed_nor_metered_nor_a_long_stretch(lease):
    gate = Gate(lease, alive=lambda: True)
    gate()
    lease.set_front_busy(1)
    lease.note_suspended()
    time.sleep(0.2)
    lease.set_front_busy(0)
    gate()
    assert (lease.num_missed, lease.num_acks, lease.metered_s) == (0, 0, 0.0)
    assert lease.stretch_max_ms < 150
    lease.set_share(0.5)
    lease.set_front_busy(1)
    lease.note_suspended()
    time.sleep(0.2)
    gate()
    assert (lease.num_acks, gate.waited_s < 0.2) == (0, True)
    assert lease.metered_s == 0.0
