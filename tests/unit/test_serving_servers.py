"""A trainer that does not go on is not waited for without end."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import serving_servers
from serving_servers import PATIENCE_S, Backlog


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        # Coarser than asked for: every look is a request.
        self.now += 50 * seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(serving_servers, "time", clock)
    return clock


def backlog(status):
    """Of a server whose status is what `status` returns."""

    def answer(request):
        body = status() if request.url.path == "/v1/training" else {"meta_info": {"id": "r"}}
        return httpx.Response(200, text=json.dumps(body))

    http = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")
    return Backlog(SimpleNamespace(http=http), votes=0)


def state(step, gates, error=None):
    return {"state": "training", "step": step, "lease": {"gates": gates}, "last_error": error}


def test_a_trainer_that_stands_still_is_given_up_with_what_the_server_says(clock):
    stuck = backlog(lambda: state(3, 100, "v4 did not load"))
    with pytest.raises(RuntimeError, match=r"no progress of training for 60 s.*v4 did not load"):
        stuck._wait_for_step(4)
    assert clock.now == pytest.approx(PATIENCE_S, abs=3)


def test_a_slow_one_is_waited_for(clock):
    # A gate every fifty seconds.
    slow = backlog(lambda: state(int(clock.now > 150), int(clock.now // 50)))
    slow._wait_for_step(1)
    assert clock.now > 150


def test_one_that_stops_later_is_given_up_then(clock):
    gates = itertools.chain(range(200), itertools.repeat(200))
    stops = backlog(lambda: state(0, next(gates)))
    with pytest.raises(RuntimeError, match="the server reports no error"):
        stops._wait_for_step(1)
    assert clock.now == pytest.approx(PATIENCE_S + 200, abs=3)
