"""A trainer that lives and does nothing: killed and replaced, unless it is the lease that makes it wait."""

from __future__ import annotations

import os
import signal
import time

import pytest
from live import running, wait_for
from remains import assert_each_vote_trained_once
from stream import Stream

TIMEOUT_S = 4.0
ARGS = ["--train-batch-size", "4", "--train-max-wait", "3600"]


@pytest.mark.slow
def test_a_trainer_that_hangs_is_replaced_and_its_votes_are_trained_once(tmp_path):
    data_dir = tmp_path / "data"
    with running(data_dir, *ARGS, "--trainer-timeout-s", str(TIMEOUT_S)) as server:
        votes = {server.vote(server.chat("Hello!")["id"])["id"]}
        server.flush()
        pid = server.trainer_pid()
        votes |= {server.vote(server.chat(f"What is {i} + 3?")["id"])["id"] for i in range(2)}
        os.kill(pid, signal.SIGSTOP)
        # While a request is in flight the trainer has to wait: it is not its fault that nothing happens.
        busy = Stream(server, max_tokens=8000)
        assert server.http.post("/v1/training/flush").status_code == 200
        wait_for(lambda: server.training()["state"] == "training", 30, "the step")
        time.sleep(3 * TIMEOUT_S)
        status = server.training()
        assert not busy.done.is_set()
        assert (status["trainer"], status["state"]) == ({"pid": pid, "restarts": 0}, "training")
        busy.cut()
        # Now it is.
        began = time.monotonic()
        wait_for(lambda: server.training()["trainer"]["restarts"] == 1, 60, "the kill")
        assert time.monotonic() - began > 0.5 * TIMEOUT_S
        status = server.training()
        assert status["pending"] == 2
        assert status["last_error"] == "the trainer made no progress in a step for 4 s"
        # Chat never noticed.
        assert server.chat("Good night")["choices"][0]["finish_reason"] in ("stop", "length")
        wait_for(lambda: server.training()["trained"] == 3, 300, "the votes")
        status = server.training()
        assert status["trainer"]["pid"] not in (pid, None)
        assert (status["pending"], status["failed"], status["last_error"]) == (0, 0, None)
    assert_each_vote_trained_once(data_dir, votes)
