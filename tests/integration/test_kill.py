"""Any process is killed at any instant while votes come in: every acknowledged vote is trained exactly once."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from live import Server, wait_for
from remains import Footprint, assert_each_vote_trained_once

pytestmark = pytest.mark.server

ARGS = ["--train-batch-size", "4", "--train-max-wait", "0.2", "--learning-rate", "0.0001"]
QUESTIONS = [
    "hello",
    "what is 2 plus 3?",
    "what colour is the sky?",
    "name an animal",
    "good night",
]
SPREAD_S = 2.0
"""A kill comes up to this long after the moment it is armed: steps here take a fraction of that."""


class Voters:
    """Chats and votes on a thread until stopped; remembers what was acknowledged and what failed."""

    def __init__(self, url: str, seed: int) -> None:
        self.votes: set[str] = set()
        self.failures: list[str] = []
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(url,), daemon=True)
        self._thread.start()

    def _run(self, url: str) -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            while not self._stop.is_set():
                try:
                    self._vote(http)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    return
                # A person reads before the next question; the trainer gets the time between.
                self._stop.wait(0.15)

    def _vote(self, http: httpx.Client) -> None:
        body = {
            "model": "alchemist-tiny",
            "messages": [{"role": "user", "content": self._rng.choice(QUESTIONS)}],
            "max_tokens": 12,
        }
        answer = http.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            self.failures.append(answer.text)
            return
        vote = {"completion_id": answer.json()["id"], "rating": self._rng.choice(["up", "down"])}
        stored = http.post("/v1/feedback", json=vote)
        if stored.status_code == 201:
            self.votes.add(stored.json()["id"])
        else:
            self.failures.append(stored.text)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive()


def wait_all_trained(server: Server, num_votes: int) -> None:
    def done() -> bool:
        status = server.training()
        assert status["failed"] == 0, status
        return status["trained"] == num_votes and status["state"] == "idle"

    try:
        wait_for(done, 300, "all votes trained")
    except AssertionError as error:
        raise AssertionError(f"{error}: {server.training()}\n{server.tail()}") from None


def check_versions(server: Server, votes: set[str]) -> None:
    """The same account over HTTP: each vote in one version, versions in one line."""
    versions = server.versions()
    ids = [i for version in versions for i in version["feedback_ids"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == votes
    assert server.training()["trained"] == len(votes)
    by_name = {version["version"]: version for version in versions}
    live = server.training()["live_version"]
    chain = []
    while live != "v0":
        chain.append(live)
        live = by_name[live]["parent"]
    assert len(chain) == len(versions) - 1


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("kill") / "data"


def kill_trainers(server: Server, times: int, seed: int) -> Voters:
    """SIGKILL the trainer `times` times, each at a random instant of a run of steps."""
    rng = random.Random(seed)
    voters = Voters(server.url, seed)
    for number in range(times):
        pid = wait_for(lambda: is_learning(server), 300, "a trainer that trains")
        time.sleep(rng.uniform(0, SPREAD_S))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda n=number: server.training()["trainer"]["restarts"] > n, 60, "a restart")
    wait_for(lambda: is_learning(server), 300, "a trainer that trains")
    voters.stop()
    return voters


def is_learning(server: Server) -> int | None:
    """The trainer's pid once it is ready and has something to do."""
    status = server.training()
    has_work = status["pending"] > 0 or status["state"] == "training"
    return status["trainer"]["pid"] if has_work and status["state"] != "starting" else None


def kill_server(data_dir: Path, seed: int, votes: set[str]) -> None:
    """One server on `data_dir`, SIGKILLed at a random instant of a run of steps; adds to `votes`."""
    server = Server(data_dir, *ARGS)
    voters = Voters(server.url, seed)
    wait_for(lambda: is_learning(server), 300, "a trainer that trains")
    time.sleep(random.Random(seed).uniform(0, SPREAD_S))
    footprint = Footprint(server)
    server.process.kill()
    server.process.wait(30)
    voters.stop()
    # Cut off in the middle of a request: that one, and no other.
    assert len(voters.failures) <= 1, voters.failures
    votes |= voters.votes
    assert_only_files_are_left(footprint)


def assert_only_files_are_left(footprint: Footprint) -> None:
    """The scheduler, the detokenizer and the trainer die with the server, by themselves."""

    def alive() -> list[str]:
        try:
            return [left for left in footprint.remains() if left.startswith("process")]
        except psutil.NoSuchProcess:
            return ["a process"]

    wait_for(lambda: not alive(), 30, "children gone")


def trainer_killed(data_dir: Path, times: int, seed: int) -> set[str]:
    server = Server(data_dir, *ARGS)
    try:
        voters = kill_trainers(server, times, seed)
        assert voters.failures == []
        assert len(voters.votes) > 2 * times
        wait_all_trained(server, len(voters.votes))
        check_versions(server, voters.votes)
        assert server.training()["trainer"]["restarts"] == times
    finally:
        status = server.stop()
    assert status == 0, server.tail()
    assert_each_vote_trained_once(data_dir, voters.votes)
    return voters.votes


def server_killed(data_dir: Path, times: int, seed: int, votes: set[str]) -> None:
    for number in range(times):
        kill_server(data_dir, seed + number, votes)
    killed = list(Path(tempfile.gettempdir()).glob("alchemist-[0-9]*-*"))
    server = Server(data_dir, *ARGS)
    try:
        gone = [path for path in killed if not psutil.pid_exists(int(path.name.split("-")[1]))]
        assert not [path for path in gone if path.exists()]
        # A vote may be on disk whose acknowledgement the kill cut off: it counts like any other.
        trained = wait_settled(server)
        assert len(trained - votes) <= times
        assert votes <= trained
        check_versions(server, trained)
    finally:
        status = server.stop()
    assert status == 0, server.tail()
    assert_each_vote_trained_once(data_dir, trained)


def wait_settled(server: Server) -> set[str]:
    def done() -> bool:
        status = server.training()
        return status["pending"] == 0 and status["state"] == "idle"

    wait_for(done, 300, "nothing pending")
    assert server.training()["failed"] == 0
    return {i for version in server.versions() for i in version["feedback_ids"]}


@pytest.fixture(scope="module")
def votes_of_first_server(data_dir):
    return trainer_killed(data_dir, times=3, seed=1)


def test_trainer_killed_while_votes_come_in(votes_of_first_server):
    assert votes_of_first_server


def test_server_killed_while_votes_come_in(data_dir, votes_of_first_server):
    server_killed(data_dir, times=1, seed=100, votes=set(votes_of_first_server))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_trainer_killed_at_ten_random_instants(tmp_path):
    trainer_killed(tmp_path / "data", times=10, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_server_killed_at_ten_random_instants(tmp_path):
    server_killed(tmp_path / "data", times=10, seed=200, votes=set())
