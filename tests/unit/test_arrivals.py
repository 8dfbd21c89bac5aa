"""Values on their way from a device: in order, counted, and not before what they depend on."""

import numpy as np
import pytest
import torch

from alchemist.server.arrivals import Arrivals

CPU = torch.device("cpu")


def deferred() -> tuple[Arrivals, np.ndarray]:
    counts = np.zeros(2, np.int64)
    return Arrivals(CPU, counts, is_deferred=True), counts


def test_on_the_cpu_everything_is_done_at_once():
    counts, seen = np.zeros(2, np.int64), []
    arrivals = Arrivals(CPU, counts)
    given = torch.tensor([1, 2])
    arrivals.hold((given,), seen.append)
    arrivals.then((given,), seen.append)
    assert [id(t) for t in seen] == [id(given)] * 2
    assert counts.tolist() == [0, 0]


def test_what_is_asked_for_later_is_done_later():
    arrivals, counts = deferred()
    seen = []
    arrivals.then((torch.tensor([1]),), lambda t: seen.append(t.tolist()))
    arrivals.then((torch.tensor([2]), torch.tensor([3])), lambda *t: seen.append(len(t)))
    assert not seen
    assert counts.tolist() == [2, 0]
    arrivals.settle()
    assert seen == [[1], 2]
    assert counts.tolist() == [2, 2]


def test_values_are_those_of_the_moment_they_were_asked_for():
    arrivals, _ = deferred()
    given, seen = torch.tensor([1, 2]), []
    arrivals.then((given,), lambda t: seen.append(t.tolist()))
    given.fill_(9)
    arrivals.settle()
    assert seen == [[1, 2]]


def test_what_is_held_is_counted_and_waits_for_go():
    arrivals, counts = deferred()
    seen = []
    arrivals.hold((torch.tensor([1]),), lambda t: seen.append("held"))
    arrivals.settle(wait=True)
    assert not seen
    assert counts.tolist() == [1, 0]
    arrivals.go()
    arrivals.then((), lambda: seen.append("after"))
    arrivals.settle()
    assert seen == ["held", "after"]


def test_what_is_begun_while_settling_is_settled_too():
    arrivals, counts = deferred()
    seen = []
    arrivals.then((), lambda: arrivals.then((), lambda: seen.append("second")))
    arrivals.settle()
    assert seen == ["second"]
    assert counts.tolist() == [2, 2]


def test_a_failure_is_not_waited_for_and_stops_nothing_else():
    arrivals, counts = deferred()
    seen = []

    def fail():
        raise ValueError("as asked")

    arrivals.then((), fail)
    arrivals.then((), lambda: seen.append("next"))
    with pytest.raises(ValueError, match="as asked"):
        arrivals.settle()
    arrivals.settle()
    assert seen == ["next"]
    assert counts.tolist() == [2, 2]
