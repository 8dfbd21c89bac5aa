"""The servers `bench_serving.py` measures, and the votes that keep their trainers busy."""

from __future__ import annotations

import copy
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from activation_options import full_status
from bench_common import ROOT
from process_figures import wait_quiet

PLAIN = ["scripts/plain_sglang.py"]
ALCHEMIST = ["-m", "alchemist.server"]
VOTES = 600
"""Votes waiting when a turn begins: more than any turn can train."""
LOGPROB_TOLERANCE = 1e-4
"""Nats, by which two servers may differ: more than another order of a sum makes, less than another model."""
PATIENCE_S = 60.0
"""A trainer that passes no gate for so long does not train."""


class Target:
    """One server under test. As a context manager it ends with the block."""

    def __init__(self, name: str, module: list[str], args: list[str], folder: Path) -> None:
        self.name = name
        self._has_versions = module == ALCHEMIST
        self.backlog: Backlog | None = None
        """Of a server that trains while it is measured."""
        self.prompts = 0
        """Which of a turn's prompts it gets: see `Load.run`."""
        self.body: dict[str, Any] = {}
        """What its requests have besides."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=300)
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *module, "--port", str(self.port), *args],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        sys.exit(
            f"server {self.name} did not start; its log: {self.log}\n{self.log.read_text()[-3000:]}"
        )

    def wait_quiet(self) -> None:
        """What was recorded is copied when nobody waits, and so would be while another server is measured."""
        try:
            wait_quiet(self.process.pid)
        except TimeoutError as error:
            sys.exit(f"server {self.name} does not come to rest: {error}")

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end([self])

    def twin(self, name: str, **body: Any) -> Target:
        """The same server, measured by other requests and while its trainer is paused.

        Args:
            body: what they have besides.
        """
        twin = copy.copy(self)
        twin.name, twin.backlog, twin.body = name, None, body
        # The first one's prompts may be in the server's cache.
        twin.prompts = self.prompts + 1
        return twin

    def num_skipped(self) -> int:
        """Prompt tokens that it did not record, for recording would have taken its time; of a server that records."""
        return int(full_status(self.http)["activations"]["skipped"])

    def wait_ended(self) -> None:
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    @staticmethod
    def end(targets: list[Target]) -> None:
        """End them all, at once."""
        for target in targets:
            target.http.close()
            target.process.send_signal(signal.SIGTERM)
        for target in targets:
            target.wait_ended()

    def greedy(self) -> list[list[tuple[int, float]]]:
        """Tokens and logprobs of a few fixed prompts under the base model."""
        out = []
        for length in (5, 60, 300):
            body: dict[str, Any] = {
                "input_ids": [(7 * i + length) % 900 + 10 for i in range(length)],
                "sampling_params": {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True},
                "return_logprob": True,
            }
            if self._has_versions:
                body["lora_path"] = "base"
            answer = self.http.post("/generate", json=body).json()
            out.append([(e[1], e[0]) for e in answer["meta_info"]["output_token_logprobs"]])
        return out


def difference(
    found: list[list[tuple[int, float]]], expected: list[list[tuple[int, float]]]
) -> str | None:
    """Where one server's `greedy` is not another's, beyond what rounding makes; None: nowhere."""
    for answer, (ours, its) in enumerate(zip(found, expected, strict=True)):
        for place, (mine, other) in enumerate(zip(ours, its, strict=True)):
            if mine[0] != other[0] or abs(mine[1] - other[1]) > LOGPROB_TOLERANCE:
                return f"answer {answer}, token {place}: {mine}, expected {other}"
    return None


class Backlog:
    """Votes enough to keep the trainer busy for as long as it may train.

    How far training has come is counted in the lease's gates: a turn is shorter than a step. Processor time
    would not do: threads that wait for one another use it, too.
    """

    def __init__(self, target: Target, *, prompt: int = 400, votes: int = VOTES) -> None:
        """Args:
        prompt: tokens of the prompts that were answered.
        votes: waiting when a turn begins.
        """
        self._http, self._prompt, self._votes = target.http, prompt, votes
        self._user = 0
        self._draw = random.Random(0)
        self._step_s = 0.0
        self.gates_per_s = 0.0
        """With nobody to serve."""
        self.tokens_per_s = 0.0
        """With nobody to serve."""
        self._http.post("/v1/training/pause")
        self._completions = [self._complete(i) for i in range(8)]

    def _complete(self, i: int) -> str:
        body = {
            "input_ids": [(13 * j + 101 * i) % 900 + 10 for j in range(self._prompt)],
            "sampling_params": {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True},
        }
        return str(self._http.post("/generate", json=body).json()["meta_info"]["id"])

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get("/v1/training").json()
        return found

    def start(self) -> None:
        """Train, from a moment of a step that is left to chance: its gates are only part of a step."""
        for i in range(max(0, self._votes - self.status()["pending"])):
            self._user += 1
            vote = {
                "completion_id": self._completions[i % len(self._completions)],
                "rating": "up" if i % 2 else "down",
                "user": f"bench-{self._user}",
            }
            self._http.post("/v1/feedback", json=vote).raise_for_status()
        self._http.post("/v1/training/resume").raise_for_status()
        time.sleep(self._draw.random() * self._step_s)

    def stop(self) -> None:
        """Pause, and wait until the step under way is over."""
        if self.status()["pending"] == 0:
            sys.exit("the backlog of votes ran dry: the trainer was not busy throughout")
        self._http.post("/v1/training/pause").raise_for_status()
        while self.status()["lease"]["trainer_state"] in ("running", "yielded"):
            time.sleep(0.05)

    def measure_alone(self, steps: int) -> None:
        """Find the speed with nobody to serve, over whole steps."""
        self.start()
        self._wait_for_step(self.status()["step"] + 1)
        before = self.status()["step"]
        gates, tokens, started = self.gates, self.tokens, time.monotonic()
        self._wait_for_step(before + steps)
        elapsed = time.monotonic() - started
        self.gates_per_s = (self.gates - gates) / elapsed
        self.tokens_per_s = (self.tokens - tokens) / elapsed
        self._step_s = elapsed / steps
        self.stop()

    def _wait_for_step(self, step: int) -> None:
        """Raises RuntimeError: training does not go on; says what the server says of it."""
        seen: tuple[int, int] | None = None
        since = time.monotonic()
        while (status := self.status())["step"] < step:
            now = (int(status["step"]), int(status["lease"]["gates"]))
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                raise RuntimeError(
                    f"no progress of training for {PATIENCE_S:.0f} s, {status['state']} at step {now[0]}: "
                    f"{status['last_error'] or 'the server reports no error'}"
                )
            time.sleep(0.02)

    @property
    def gates(self) -> int:
        return int(self.status()["lease"]["gates"])

    @property
    def tokens(self) -> int:
        """Tokens trained so far."""
        status = self.status()
        return int(status["tokens_reused"] + status["tokens_recomputed"])
