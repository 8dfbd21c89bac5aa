"""The trainer on a GPU is never more than a few layers ahead of it, and gives the lease up when those are done."""

import threading
import time

import pytest
import torch

from alchemist.protocol.lease import Gate, Lease
from alchemist.protocol.states import TrainerEvent
from alchemist.trainer.launches import AHEAD, Launches
from alchemist.trainer.replay import Phases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CYCLES = 40_000_000
"""Some 20 ms."""


def layer() -> torch.cuda.Event:
    torch.cuda._sleep(CYCLES)
    end = torch.cuda.Event()
    end.record()
    return end


def test_no_more_layers_are_enqueued_than_may_be():
    launches = Launches(DEVICE)
    gate = launches.bounded(lambda: None)
    ends = []
    for _ in range(6):
        gate()
        # The one that runs and those behind it.
        assert sum(not end.query() for end in ends) <= AHEAD
        ends.append(layer())
    launches.drain()
    assert all(end.query() for end in ends)


def test_a_revocation_is_acknowledged_when_what_was_enqueued_is_done():
    lease = Lease.create()
    lease.advance(TrainerEvent.ATTACHED)
    lease.advance(TrainerEvent.STEP_BEGUN)
    launches = Launches(DEVICE)
    gate = launches.bounded(Gate(lease, alive=lambda: True, drain=launches.drain))
    gate()
    ends = [layer()]
    gate()
    ends.append(layer())
    torch.cuda._sleep(1)
    lease.set_engine_busy(True)
    threading.Timer(0.5, lease.set_engine_busy, [False]).start()
    acks = []
    original = lease.acknowledge
    lease.acknowledge = lambda ns: (acks.append([end.query() for end in ends]), original(ns))
    gate()
    assert acks == [[True, True]]
    assert lease.num_acks == 1
    assert 0 < lease.latencies_ms()[0] < 500


def test_phases_are_as_long_as_the_device_took():
    phases = Phases(DEVICE)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started = time.perf_counter()
    with phases.phase("outer"):
        start.record()
        torch.cuda._sleep(CYCLES)
        end.record()
        with phases.phase("inner"):
            torch.cuda._sleep(2 * CYCLES)
    # Nothing has waited.
    assert time.perf_counter() - started < 0.01
    seconds = phases.seconds
    one = start.elapsed_time(end) / 1e3
    assert seconds["outer"] == pytest.approx(one, rel=0.2)
    assert seconds["inner"] == pytest.approx(2 * one, rel=0.2)
