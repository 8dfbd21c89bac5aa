"""How a server ends, what it leaves, and what the next one finds. One data directory goes through four servers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3

import pytest
import torch
from live import Server, wait_for
from remains import Footprint, query
from safetensors.torch import load_file, save_file
from stream import Stream

pytestmark = pytest.mark.server

ARGS = [
    *("--train-batch-size", "4", "--train-max-wait", "3600", "--shutdown-timeout", "8"),
    *("--learning-rate", "0.002", "--max-grad-norm", "0"),
]
LEARNING_RATE = 0.002
QUESTIONS = ["hello", "what is 2 plus 3?", "what colour is the sky?", "name an animal"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("life") / "data"


def train_round(server):
    for question, rating in zip(QUESTIONS, ("up", "down", "up", "down"), strict=True):
        server.vote(server.chat(question)["id"], rating)
    step = wait_for(lambda: settled(server), 180, "a step")
    return step["live_version"]


def settled(server):
    status = server.training()
    return status if status["pending"] == 0 and status["state"] == "idle" else None


@pytest.fixture(scope="module")
def first(data_dir):
    """The first server's end, and what it had promised."""
    server = Server(data_dir, *ARGS)
    old = [server.chat(f"{question} ") for question in QUESTIONS[:2]]
    assert train_round(server) == "v1"
    assert train_round(server) == "v2"
    promised = {"old": [c["id"] for c in old], "new": server.chat("good night")["id"]}
    promised["pending"] = server.vote(server.chat("count to three")["id"])["id"]
    promised["answer"] = server.chat("what day is it?")["choices"][0]["message"]["content"]
    endless = Stream(server, max_tokens=8000)
    waiting = server.vote(endless.id, "down")
    assert waiting["state"] == "waiting"
    promised["waiting"] = waiting["id"]
    short = Stream(server, max_tokens=24)
    footprint = Footprint(server)
    server.process.send_signal(signal.SIGTERM)

    refused = wait_for(lambda: refusal(server), 8, "503")
    for stream in (short, endless):
        stream.wait()
    # No second signal before its end: that would abort the short answer, too.
    server.process.wait(60)
    status = server.stop()
    return server, footprint, status, refused, short, endless, promised


def refusal(server):
    response = server.http.get("/v1/models")
    return response if response.status_code == 503 else None


def test_sigterm_ends_with_status_0_and_refuses_new_requests(first):
    server, _, status, refused, *_ = first
    assert status == 0, server.tail()
    assert refused.json()["error"]["message"] == "the server is shutting down"
    assert "Traceback" not in server.log.read_text()


def test_a_short_answer_in_flight_is_finished_and_an_endless_one_aborted(first):
    *_, short, endless, _ = first
    assert short.error is None
    assert (short.num_tokens, short.finish_reason) == (24, "length")
    assert endless.num_tokens is None or endless.num_tokens < 8000
    assert endless.finish_reason in (None, "abort")


def test_nothing_is_left_of_a_server_that_was_asked_to_end(first):
    _, footprint, *_ = first
    assert any("alchemist-" in str(path) for path in footprint.paths)
    footprint.wait_gone()


def test_acknowledged_votes_are_in_the_ledger(first, data_dir):
    promised = first[-1]
    rows = dict(query(data_dir, "SELECT id, state FROM feedback"))
    assert list(rows.values()).count("trained") == 8
    assert rows[promised["pending"]] == "pending"
    # Its answer was cut off by the shutdown; that much of it was served and is what the vote is about.
    assert rows[promised["waiting"]] == "pending"


@pytest.fixture(scope="module")
def second(first, data_dir):
    """A restart: it finds two directories nobody committed."""
    shutil.copytree(data_dir / "versions/v2", data_dir / "versions/v99")
    (data_dir / "versions/.tmp-v3-1").mkdir()
    server = Server(data_dir, *ARGS)
    yield server
    server.stop()


def test_restart_brings_back_versions_step_and_pending_votes(first, second):
    promised = first[-1]
    status = second.training()
    assert (status["live_version"], status["step"]) == ("v2", 2)
    assert (status["pending"], status["trained"]) == (2, 8)
    states = {v["version"]: v["state"] for v in second.versions()}
    assert states == {"v0": "retired", "v1": "retired", "v2": "live"}
    answer = second.chat("what day is it?")
    assert answer["metadata"]["weight_version"] == "v2"
    assert answer["choices"][0]["message"]["content"] == promised["answer"]


def test_uncommitted_version_directories_are_removed(second, data_dir):
    assert {path.name for path in (data_dir / "versions").iterdir()} == {"v0", "v1", "v2"}


def test_votes_on_an_earlier_run_and_an_older_version_train_recomputed(first, second, data_dir):
    promised = first[-1]
    before = second.training()
    votes = [second.vote(promised["old"][0])["id"], second.vote(promised["new"], "down")["id"]]
    assert second.receipt(promised["old"][0])["version"] == "v0"
    assert second.receipt(promised["new"])["version"] == "v2"
    status = wait_for(lambda: settled(second), 180, "a step")
    assert (status["live_version"], status["step"]) == ("v3", 3)
    assert status["tokens_reused"] == before["tokens_reused"]
    assert status["tokens_recomputed"] > before["tokens_recomputed"]
    v3 = second.versions()[-1]
    assert set(v3["feedback_ids"]) == {promised["pending"], promised["waiting"], *votes}


def test_the_optimizer_goes_on_where_it_was(second, data_dir):
    """θ₃ follows from θ₂ and the moments of v2 by AdamW's own formula, for whatever gradient there was."""
    old, new = (
        load_file(data_dir / f"versions/{v}/optimizer/state.safetensors") for v in ("v2", "v3")
    )
    theta_old, theta_new = (
        load_file(data_dir / f"versions/{v}/adapter_model.safetensors") for v in ("v2", "v3")
    )
    names = [name.removeprefix("exp_avg/") for name in new if name.startswith("exp_avg/")]
    assert names
    for name in names:
        assert float(new[f"step/{name}"]) == 3
        m_old, m_new = (state[f"exp_avg/{name}"].double() for state in (old, new))
        v_old, v_new = (state[f"exp_avg_sq/{name}"].double() for state in (old, new))
        gradient = (m_new - 0.9 * m_old) / 0.1
        # Stored moments are float32, and the gradient comes out of a difference of two of them.
        scale = float(v_new.abs().max()) + 1e-30
        assert float((v_new - 0.999 * v_old - 0.001 * gradient**2).abs().max()) < 1e-4 * scale
        update = (m_new / (1 - 0.9**3)) / ((v_new / (1 - 0.999**3)).sqrt() + 1e-8)
        expected = theta_old[name].double() - LEARNING_RATE * update
        assert torch.allclose(theta_new[name].double(), expected, rtol=0, atol=1e-6)


def test_ctrl_c_reaches_the_whole_group_and_still_ends_in_order(second):
    stream = Stream(second, max_tokens=24)
    footprint = Footprint(second)
    # What a terminal does: every process of the group gets the signal.
    os.killpg(second.process.pid, signal.SIGINT)
    stream.wait()
    assert second.process.wait(60) == 0, second.tail()
    assert stream.error is None
    assert (stream.num_tokens, stream.finish_reason) == (24, "length")
    footprint.wait_gone()


@pytest.fixture(scope="module")
def third(second, data_dir):
    """The live version's weights are not what they were when it was proven."""
    if second.process.poll() is None:
        second.stop()
    path = data_dir / "versions/v3/adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = tensors[name] + 0.05 * torch.randn(
                tensors[name].shape, generator=torch.Generator().manual_seed(0)
            )
    save_file(tensors, path)
    server = Server(data_dir, *ARGS)
    yield server
    if server.process.poll() is None:
        server.stop()


def test_a_version_that_fails_its_proof_is_refused_and_the_one_before_it_serves(third):
    status = third.training()
    assert (status["live_version"], status["state"]) == ("v2", "paused")
    assert "probe" in status["last_error"]
    assert third.chat("hello")["metadata"]["weight_version"] == "v2"
    states = {v["version"]: v["state"] for v in third.versions()}
    assert (states["v2"], states["v3"]) == ("live", "failed")


def test_its_votes_are_trained_again_once_somebody_resumes(third):
    assert third.training()["pending"] == 4
    assert third.http.post("/v1/training/resume").status_code == 200
    status = wait_for(lambda: settled(third), 180, "a step")
    assert (status["live_version"], status["trained"]) == ("v4", 12)
    v4 = third.versions()[-1]
    assert (v4["parent"], len(v4["feedback_ids"])) == ("v2", 4)


def test_a_dead_scheduler_ends_the_server_with_a_message(third):
    # It is still pending when the server ends.
    third.vote(third.chat("good morning")["id"])
    footprint = Footprint(third)
    scheduler = third.child("sglang::scheduler")
    assert scheduler is not None
    scheduler.kill()
    assert third.process.wait(60) == 1, third.tail()
    footprint.wait_gone()
    last = third.log.read_text().strip().splitlines()[-1]
    assert "scheduler" in last
    assert str(scheduler.pid) in last
    assert "SIGKILL" in last


def test_a_vote_that_has_waited_long_enough_does_not_wait_again(third, data_dir):
    """It came an hour before this server did."""
    assert third.process.poll() is not None
    with contextlib.closing(sqlite3.connect(data_dir / "ledger.sqlite3")) as ledger, ledger:
        ledger.execute("UPDATE feedback SET updated = updated - 3600 WHERE state = 'pending'")
        assert ledger.total_changes == 1
    server = Server(data_dir, *ARGS, "--train-max-wait", "600")
    status = wait_for(lambda: settled(server), 180, "a step")
    assert (status["live_version"], status["trained"]) == ("v5", 13)
    assert server.stop() == 0


@pytest.mark.parametrize("victim", ["alchemist.server", "scheduler"])
def test_an_end_during_launch_leaves_nothing(tmp_path, victim):
    """The server is told to end, or its scheduler dies, before either is ready."""
    server = Server(tmp_path / "data", wait=False)

    # Still importing: it has not named itself yet, and is the first interpreter to be spawned.
    scheduler = wait_for(lambda: server.child("spawn_main"), 300, "a scheduler process")
    footprint = Footprint(server)
    if victim == "scheduler":
        scheduler.kill()
        assert server.process.wait(60) == 1, server.tail()
        assert "alchemist: error: " in server.log.read_text()
    else:
        assert server.stop() == 0
    footprint.wait_gone()
