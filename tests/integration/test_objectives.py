"""What is trained and how, live: preference pairs, a user's own loss, and votes on versions that are too old."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from live import Server, wait_for

pytestmark = pytest.mark.server

TESTS = Path(__file__).parents[1]


def start(folder, *args):
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return Server(folder / "data", "--train-max-wait", "3600", *args, env=env)


def ask(server, text):
    return server.chat(text, temperature=1.0)


def train(server, is_done):
    server.http.post("/v1/training/flush").raise_for_status()

    def status():
        found = server.training()
        return found if found["state"] == "idle" and is_done(found) else None

    return wait_for(status, 120, "a step")


def two_answers(server, text):
    """Two answers to one prompt that differ."""
    first = ask(server, text)
    for _ in range(50):
        second = ask(server, text)
        if second["choices"] != first["choices"]:
            return first["id"], second["id"]
    raise AssertionError("the model gave fifty equal answers")


@pytest.mark.parametrize("loss_type", ["sigmoid", pytest.param("ipo", marks=pytest.mark.slow)])
def test_pairs_are_trained_and_single_votes_wait(tmp_path, loss_type):
    server = start(tmp_path, "--objective", "dpo", "--loss-type", loss_type, "--beta", "0.5")
    try:
        good, bad = two_answers(server, "Tell me a story about a fox.")
        pair = [server.vote(good, "up")["id"], server.vote(bad, "down")["id"]]
        alone = server.vote(ask(server, "What is 2 + 3?")["id"], "up")["id"]
        corrected = server.vote(ask(server, "Hello!")["id"], "down", correction="Good day to you.")[
            "id"
        ]
        status = train(server, lambda s: s["trained"] == 3)
        assert (status["trained"], status["pending"], status["failed"]) == (3, 1, 0)
        step = status["last_step"]
        assert step["num_samples"] == 4
        assert step["loss"] > 0
        assert status["tokens_reused"] > 0
        states = {
            vote_id: server.http.get(f"/v1/feedback/{vote_id}").json()["state"]
            for vote_id in (*pair, corrected, alone)
        }
        assert list(states.values()) == ["trained", "trained", "trained", "pending"]
    finally:
        assert server.stop() == 0, server.tail()


@pytest.mark.slow
def test_a_correction_beyond_the_models_context_fails_alone(tmp_path):
    server = start(tmp_path, "--objective", "sft")
    try:
        long = server.vote(ask(server, "Hello!")["id"], "down", correction="fox " * 8192)["id"]
        server.vote(ask(server, "What is 2 + 3?")["id"], "up")
        status = train(server, lambda s: s["trained"] == 1)
        assert (status["failed"], status["live_version"]) == (1, "v1")
        found = server.http.get(f"/v1/feedback/{long}").json()
        assert found["state"] == "failed"
        assert re.fullmatch(r"\d+ tokens; the model takes 8192", found["reason"]), found
    finally:
        assert server.stop() == 0, server.tail()


def test_versions_too_old_are_not_recorded_and_their_votes_come_last(tmp_path):
    server = start(
        tmp_path, "--objective", "sft", "--max-staleness", "0", "--train-batch-size", "1"
    )
    try:
        server.http.post("/v1/training/pause").raise_for_status()
        first, old = (ask(server, f"What is 2 + {n}?") for n in (3, 4))
        assert server.receipt(first["id"])["recorded_tokens"] > 0
        server.vote(first["id"], "up")
        server.http.post("/v1/training/resume").raise_for_status()
        train(server, lambda s: s["trained"] == 1)
        server.http.post("/v1/training/pause").raise_for_status()
        base = server.chat("What color is a banana?", model="base")
        assert base["metadata"]["weight_version"] == "v0"
        receipt = server.receipt(base["id"])
        # What its prompt begins with was recorded when v0 was live.
        assert receipt["recorded_tokens"] < receipt["prompt_tokens"] / 2
        new = ask(server, "What is 3 + 5?")
        receipt = server.receipt(new["id"])
        assert receipt["recorded_tokens"] == receipt["prompt_tokens"]
        # The earlier vote is on an answer of v0, and waits for the later one.
        votes = [server.vote(answer["id"], "up")["id"] for answer in (old, new)]
        server.http.post("/v1/training/resume").raise_for_status()
        train(server, lambda s: s["trained"] == 3)
        steps = [server.http.get(f"/v1/feedback/{vote}").json()["version"] for vote in votes]
        assert steps == ["v3", "v2"]
    finally:
        assert server.stop() == 0, server.tail()


def test_a_users_loss_trains(tmp_path):
    server = start(tmp_path, "--objective", "user_losses:hinge")
    try:
        server.vote(ask(server, "What is 2 + 3?")["id"], "up")["id"]
        status = train(server, lambda s: s["trained"] == 1)
        assert (status["trained"], status["live_version"]) == (1, "v1")
        assert status["objective"] == "user_losses:hinge"
    finally:
        assert server.stop() == 0, server.tail()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ("broken", "user_losses:broken failed: KeyError: 'advantage'"),
        # Its loss and what follows from it for log-probabilities are finite: the optimizer is the first to see.
        pytest.param("steep", "the gradient's norm is inf", marks=pytest.mark.slow),
    ],
)
def test_a_broken_loss_fails_its_votes_only(tmp_path, loss, reason):
    server = start(tmp_path, "--objective", f"user_losses:{loss}")
    try:
        failed = server.vote(ask(server, "What is 2 + 3?")["id"], "up")["id"]
        train(server, lambda s: s["failed"] == 1)
        found = server.http.get(f"/v1/feedback/{failed}").json()
        assert reason in found["reason"]
        assert server.training()["live_version"] == "v0"
        assert ask(server, "What is 2 + 3?")["choices"]
    finally:
        assert server.stop() == 0, server.tail()


@pytest.mark.slow
def test_a_batch_that_gets_the_trainer_killed_is_tried_in_halves(tmp_path):
    server = start(tmp_path, "--objective", "user_losses:killed_by_two", "--train-batch-size", "2")
    try:
        server.http.post("/v1/training/pause").raise_for_status()
        votes = [server.vote(ask(server, f"What is {i} + 3?")["id"], "up")["id"] for i in (2, 4)]
        server.http.post("/v1/training/resume").raise_for_status()
        status = train(server, lambda s: s["trained"] == 2)
        assert (status["failed"], status["live_version"]) == (0, "v2")
        assert status["trainer"]["restarts"] == 1
        versions = {server.http.get(f"/v1/feedback/{vote}").json()["version"] for vote in votes}
        assert versions == {"v1", "v2"}
    finally:
        assert server.stop() == 0, server.tail()
