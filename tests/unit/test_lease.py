"""The lease: granted exactly when nobody is busy; revocations are acknowledged and timed; nobody holds it when dead."""

import os
import subprocess
import sys
import threading
import time

import pytest

from alchemist.protocol.errors import PeerProtocolError
from alchemist.protocol.lease import Gate, Lease
from alchemist.protocol.shm import create
from alchemist.protocol.states import LEASE, LeaseState, TrainerEvent, TrainerState


def running() -> tuple[Lease, Gate]:
    """A lease whose trainer is in the middle of a step."""
    lease = Lease.create()
    lease.advance(TrainerEvent.ATTACHED)
    lease.advance(TrainerEvent.STEP_BEGUN)
    return lease, Gate(lease, alive=lambda: True)


@pytest.mark.parametrize("front", [0, 3])
@pytest.mark.parametrize("engine", [False, True])
def test_granted_exactly_when_both_sides_are_idle(front, engine):
    lease = Lease.create()
    lease.set_front_busy(front)
    lease.set_engine_busy(engine)
    assert Lease.attach(lease.segment.handle).is_granted is (front == 0 and not engine)


def test_waiting_trainer_wakes_when_the_last_side_becomes_idle():
    lease = Lease.create()
    peer = Lease.attach(lease.segment.handle)
    lease.set_front_busy(1)
    lease.set_engine_busy(True)
    woke = threading.Event()
    thread = threading.Thread(target=lambda: peer.wait(30) and woke.set())
    thread.start()
    lease.set_front_busy(0)
    assert not woke.wait(0.2)
    started = time.monotonic()
    lease.set_engine_busy(False)
    assert woke.wait(5)
    assert time.monotonic() - started < 1.0
    thread.join()


def test_wait_gives_up_after_its_timeout():
    lease = Lease.create()
    lease.set_front_busy(1)
    started = time.monotonic()
    assert lease.wait(0.1) is False
    assert 0.1 <= time.monotonic() - started < 2


def test_gate_acknowledges_a_revocation_with_its_latency_and_returns_after_the_grant():
    lease, gate = running()
    gate.start()
    gate()
    assert lease.num_acks == 0
    lease.set_engine_busy(True)
    thread = threading.Thread(target=gate)
    thread.start()
    while lease.state is not TrainerState.YIELDED:
        assert thread.is_alive()
    lease.set_engine_busy(False)
    thread.join(5)
    assert not thread.is_alive()
    assert lease.num_acks == 1
    assert 0 <= lease.latencies_ms()[0] < 5000
    assert lease.state is TrainerState.RUNNING
    assert gate.waited_s > 0


def test_what_is_enqueued_is_waited_for_before_the_lease_is_given_up():
    lease = Lease.create()
    lease.advance(TrainerEvent.ATTACHED)
    lease.advance(TrainerEvent.STEP_BEGUN)
    acks_at_drain = []

    def drain():
        acks_at_drain.append(lease.num_acks)
        time.sleep(0.03)

    gate = Gate(lease, alive=lambda: True, drain=drain)
    gate()
    assert not acks_at_drain
    lease.set_engine_busy(True)
    threading.Timer(0.2, lease.set_engine_busy, [False]).start()
    gate()
    assert acks_at_drain == [0]
    assert lease.num_acks == 1
    assert lease.latencies_ms()[0] >= 30


def test_a_revocation_before_the_work_began_has_no_latency():
    lease, gate = running()
    lease.set_engine_busy(True)
    gate.start()
    threading.Timer(0.05, lease.set_engine_busy, [False]).start()
    gate()
    assert lease.num_acks == 0


def test_a_busy_time_within_one_layer_is_counted_as_missed():
    lease, gate = running()
    lease.set_front_busy(1)
    lease.set_front_busy(0)
    gate.start()
    gate()
    assert lease.num_missed == 0
    lease.set_front_busy(1)
    lease.set_front_busy(0)
    gate()
    gate()
    assert (lease.num_missed, lease.num_acks) == (1, 0)


def test_a_gate_of_an_orphan_ends_its_process():
    lease = Lease.create()
    lease.set_engine_busy(True)
    code = (
        "import msgspec, sys\n"
        "from alchemist.protocol.lease import Lease, Gate\n"
        "from alchemist.protocol.states import TrainerEvent\n"
        "from alchemist.protocol.shm import SegmentHandle\n"
        "lease = Lease.attach(msgspec.json.decode(sys.argv[1], type=SegmentHandle))\n"
        "lease.advance(TrainerEvent.ATTACHED)\n"
        "lease.advance(TrainerEvent.STEP_BEGUN)\n"
        "Gate(lease, alive=lambda: False)()\n"
        "sys.exit(3)\n"
    )
    import msgspec

    handle = msgspec.json.encode(lease.segment.handle).decode()
    assert subprocess.run([sys.executable, "-c", code, handle], timeout=60).returncode == 0


def test_a_dead_trainer_holds_nothing():
    lease, _ = running()
    lease.reset_trainer()
    assert lease.state is TrainerState.DETACHED
    lease.set_front_busy(1)
    lease.set_front_busy(0)
    assert lease.is_granted


def work(gate: Gate, seconds: float) -> int:
    """A trainer of 2 ms layers; how many it did."""
    until = time.monotonic() + seconds
    layers = 0
    while time.monotonic() < until:
        layer = time.monotonic() + 0.002
        while time.monotonic() < layer:
            pass
        layers += 1
        gate()
    return layers


def test_with_a_share_the_trainer_works_for_that_part_of_a_busy_time():
    lease, gate = running()
    lease.set_share(0.3)
    lease.set_front_busy(1)
    gate.start()
    began = time.monotonic()
    work(gate, 2.0)
    # Waking late on a busy machine can only make it less.
    part = 1 - gate.waited_s / (time.monotonic() - began)
    assert 0.15 <= part <= 0.34
    assert lease.metered_s > 0.2
    assert lease.state is TrainerState.RUNNING


def test_with_all_of_the_time_it_never_sleeps():
    lease, gate = running()
    lease.set_share(1.0)
    lease.set_engine_busy(True)
    gate.start()
    work(gate, 0.1)
    assert (gate.waited_s, gate.state) == (0.0, LeaseState.METERED)
    assert lease.num_acks == 0


def test_a_share_taken_away_is_a_revocation():
    lease, gate = running()
    lease.set_share(1.0)
    lease.set_front_busy(1)
    gate.start()
    gate()
    lease.set_share(0.0)
    thread = threading.Thread(target=gate)
    thread.start()
    while lease.state is not TrainerState.YIELDED:
        assert thread.is_alive()
    assert (gate.state, lease.num_acks) == (LeaseState.REVOKED, 1)
    lease.set_share(1.0)
    thread.join(5)
    assert not thread.is_alive()
    assert gate.state is LeaseState.METERED


def test_an_idle_time_ends_metering():
    lease, gate = running()
    lease.set_share(0.5)
    lease.set_front_busy(1)
    gate()
    assert gate.state is LeaseState.METERED
    lease.set_front_busy(0)
    gate()
    assert gate.state is LeaseState.GRANTED


def test_whoever_asks_is_told_the_state_when_it_changes():
    lease, _ = running()
    seen = []
    gate = Gate(lease, alive=lambda: True, on_state=seen.append)
    gate()
    assert not seen
    lease.set_share(1.0)
    lease.set_front_busy(1)
    gate()
    gate()
    assert seen == [LeaseState.METERED]
    lease.set_share(0.0)
    threading.Timer(0.05, lease.set_front_busy, [0]).start()
    gate()
    assert seen == [LeaseState.METERED, LeaseState.REVOKED, LeaseState.GRANTED]


def test_gates_are_counted():
    lease, gate = running()
    for _ in range(3):
        gate()
    assert lease.num_gates == 3


def test_only_a_control_block_is_attached():
    segment = create("other", 1 << 16)
    with pytest.raises(PeerProtocolError, match="control block"):
        Lease.attach(segment.handle)
    assert os.getpid() == segment.handle.pid


def test_every_entry_of_the_table_happens_at_the_gate():
    lease, gate = running()
    seen, advance = set(), gate._advance
    comes_next = []

    def watch(event):
        seen.add((gate.state, event))
        advance(event)
        if gate.state is LeaseState.REVOKED:
            threading.Timer(0.05, *comes_next.pop(0)).start()

    gate._advance = watch
    lease.set_share(1.0)
    lease.set_front_busy(1)
    gate()
    assert gate.state is LeaseState.METERED
    lease.set_front_busy(0)
    gate()
    assert gate.state is LeaseState.GRANTED
    lease.set_front_busy(1)
    gate()
    lease.set_share(0.0)
    comes_next.append((lease.set_front_busy, [0]))
    gate()
    assert gate.state is LeaseState.GRANTED
    lease.set_front_busy(1)
    comes_next.append((lease.set_share, [0.5]))
    gate()
    assert gate.state is LeaseState.METERED
    assert not comes_next
    assert seen == set(LEASE.table)
