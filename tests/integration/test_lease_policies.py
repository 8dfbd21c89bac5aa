"""The lease's policies on a real server. That policy idle trains in between: test_end_to_end.py."""

import os

import psutil
import pytest
from live import Server, wait_for
from stream import Stream

pytestmark = pytest.mark.server

BATCH = ["--train-batch-size", "4", "--train-max-wait", "3600"]


def started(tmp_path_factory, *args: str) -> Server:
    return Server(tmp_path_factory.mktemp("lease") / "data", *BATCH, *args)


def vote(server: Server) -> None:
    for question in ("Hello!", "What is 2 + 3?", "Tell me a joke.", "What color is the sky?"):
        server.vote(server.chat(question)["id"])


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """The default policy; few versions may be loaded at once."""
    server = started(tmp_path_factory, "--keep-versions", "1", "--max-staleness", "0")
    yield server
    assert server.stop() == 0, server.tail()


def test_while_idle_is_the_policy_a_request_stops_the_trainer_in_the_middle_of_a_step(idle):
    server = idle
    for _ in range(20):
        step = server.training()["step"]
        for topic in ("cats", "dogs", "cows", "pigs"):
            server.vote(server.chat(f"Tell me all about {topic}. " * 60)["id"])
        wait_for(
            lambda: server.training()["lease"]["trainer_state"] == "running",
            60,
            "a step",
            0.001,
        )
        answer = Stream(server, max_tokens=200)
        lease = server.training()["lease"]
        if lease["suspensions"]:
            break
        answer.wait()
        wait_for(lambda: server.training()["step"] > step, 120, "the step")  # noqa: B023
    trainer = psutil.Process(server.training()["trainer"]["pid"])
    assert trainer.status() == psutil.STATUS_STOPPED
    assert os.sched_getscheduler(trainer.pid) == os.SCHED_IDLE
    spent = trainer.cpu_times().user
    answer.wait()
    assert trainer.cpu_times().user - spent < 0.1
    wait_for(lambda: server.training()["step"] > step, 120, "the step that was stopped")
    lease = server.training()["lease"]
    assert lease["revocations"] >= lease["suspensions"] > 0
    assert lease["revoke_p50_ms"] < 1000


def test_clients_that_go_away_keep_no_version_loaded(idle):
    """SGLang counts them among an adapter's users for good, and of several samples one less than there are."""
    if idle.training()["live_version"] == "v0":
        vote(idle)
        idle.flush()
    seen = set()
    for _ in range(4):
        seen.add(idle.training()["live_version"])
        Stream(idle, max_tokens=2000).cut()
        body = {"messages": [{"role": "user", "content": "word " * 9000}], "model": "any"}
        assert idle.http.post("/v1/chat/completions", json=body).status_code == 400
        two = idle.chat("Tell me a joke.", n=2, temperature=1.0)
        ids = two["metadata"]["completion_ids"]
        assert (ids[0], len(set(ids))) == (two["id"], 2)
        # The choice that is meant, not the first one.
        idle.vote(ids[1])
        assert all(idle.receipt(rid)["response_tokens"] for rid in ids)
        vote(idle)
        idle.flush()
    assert len(seen | {idle.training()["live_version"]}) == 5
    assert idle.training()["last_error"] is None


@pytest.mark.slow
def test_with_a_share_a_step_completes_although_requests_are_always_in_flight(tmp_path_factory):
    server = started(tmp_path_factory, "--lease-policy", "share", "--lease-share", "0.5")
    try:
        lease = server.training()["lease"]
        assert (lease["policy"], lease["share"], lease["metered_s"]) == ("share", 0.5, 0.0)
        assert os.sched_getscheduler(server.trainer_pid()) == os.SCHED_IDLE
        before, latest = server.training()["step"], Stream(server, max_tokens=400)
        completions = [server.chat(text, max_tokens=4)["id"] for text in ("a", "b", "c", "d")]
        for completion in completions:
            server.vote(completion)

        def has_stepped() -> bool:
            nonlocal latest
            # The next begins before the last one ends.
            earlier, latest = latest, Stream(server, max_tokens=400)
            status = server.training()
            assert status["lease"]["granted"] is False
            earlier.wait()
            return status["step"] > before

        wait_for(has_stepped, 120, "a step while requests are in flight")
        latest.wait()
        assert server.training()["lease"]["metered_s"] > 0
    finally:
        assert server.stop() == 0, server.tail()


def test_slo_gives_by_the_request_and_takes_back_at_once(tmp_path_factory):
    """One request runs at a time, so that a second one waits for its first token."""
    server = started(
        tmp_path_factory,
        *("--lease-policy", "slo", "--slo-ttft-ms", "2000", "--max-running-requests", "1"),
    )

    def share() -> float:
        return server.training()["lease"]["share"]

    try:
        assert share() == 0.0
        for _ in range(6):
            Stream(server, max_tokens=2).wait()
        wait_for(lambda: share() > 0, 30, "a share")
        # A step goes by the share from now on.
        vote(server)
        server.flush()
        given = share()
        running = Stream(server, max_tokens=1500)
        waiting = Stream(server, max_tokens=2, wait=False)
        wait_for(lambda: share() == 0.0, 30, "the brake of a request that waits")
        assert not waiting.started.is_set()
        running.wait()
        waiting.wait()
        wait_for(lambda: 0 < share() <= given / 2 + 0.04, 30, "half of the share")
    finally:
        assert server.stop() == 0, server.tail()
