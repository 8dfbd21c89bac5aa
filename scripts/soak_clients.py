"""The clients of `soak.py`: conversations in bursts, votes, fixed batches, and looks at the server meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import time
from dataclasses import dataclass, field
from typing import Any

import fixed_batch
import httpx
from process_figures import Sample, sample
from rich.console import Console
from serving_servers import Target
from sglang_figures import metric_sums

MAX_PENDING = 48
"""Votes the trainer may be behind by; users do not vote meanwhile, or a long run would only fill the ledger, and every
vote would be on an answer of a version too old to be trained from its rows.
"""


@dataclass(slots=True)
class Seen:
    """What happened so far."""

    requests: int = 0
    answer_tokens: int = 0
    votes: int = 0
    batches: int = 0
    wrong_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    """one text for each answer of a fixed batch with other tokens"""
    difference: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """of fixed batches"""
    errors: list[str] = field(default_factory=list)
    in_use: list[float] = field(default_factory=list)
    """share of the KV pool, a look each"""
    samples: list[Sample] = field(default_factory=list)
    pending: int = 0


class Soak:
    """The clients of one server, for `minutes`."""

    def __init__(
        self,
        target: Target,
        options: argparse.Namespace,
        prompts: list[list[int]],
        right: list[fixed_batch.Answer],
    ) -> None:
        self._target, self._options = target, options
        self._prompts, self._right = prompts, right
        self._http = httpx.AsyncClient(
            base_url=target.url, timeout=600, limits=httpx.Limits(max_connections=None)
        )
        self._numbers = itertools.count(1)
        self._began = self._ends = self._burst_ends = 0.0
        self.seen = Seen()

    async def run(self) -> None:
        """Bursts until the time is over; the pause after each begins when its last answer has come."""
        self._began = time.monotonic()
        self._ends = self._began + 60 * self._options.minutes
        clients = [random.Random(i) for i in range(self._options.clients)]
        async with self._http, asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            while (now := time.monotonic()) < self._ends:
                self._burst_ends = min(now + self._options.burst, self._ends)
                await asyncio.gather(*(self._client(rng) for rng in clients))
                await asyncio.sleep(self._options.lull)

    @property
    def _is_burst(self) -> bool:
        return time.monotonic() < self._burst_ends

    async def _client(self, rng: random.Random) -> None:
        history: list[int] = []
        while self._is_burst:
            try:
                if next(self._numbers) % self._options.every == 0:
                    await self._fixed()
                else:
                    history = await self._converse(history, rng)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.seen.errors.append(f"{type(error).__name__}: {str(error)[:300]}")
                await asyncio.sleep(1)

    async def _converse(self, history: list[int], rng: random.Random) -> list[int]:
        """One turn, and perhaps a vote on it; the history with it."""
        if len(history) > self._options.history:
            history = []
        prompt = history + [rng.randrange(10, 900) for _ in range(rng.randint(40, 160))]
        sampling = {
            "max_new_tokens": rng.randint(32, 128),
            "temperature": 1.0,
            "ignore_eos": True,
        }
        answer = await self._post("/generate", {"input_ids": prompt, "sampling_params": sampling})
        self.seen.requests += 1
        self.seen.answer_tokens += len(answer["output_ids"])
        if rng.random() < self._options.vote_share and self.seen.pending < MAX_PENDING:
            vote = {
                "completion_id": answer["meta_info"]["id"],
                "rating": rng.choice(("up", "down")),
            }
            await self._post("/v1/feedback", vote)
            self.seen.votes += 1
        return prompt + answer["output_ids"]

    async def _fixed(self) -> None:
        asked = fixed_batch.body(self._prompts, is_plain=False)
        for _ in range(2):
            answers = fixed_batch.read(await self._post("/generate", asked))
            self.seen.batches += 1
            self.seen.requests += len(answers)
            for prompt, right, found in zip(self._prompts, self._right, answers, strict=True):
                self._compare(prompt, right, found)

    def _compare(
        self, prompt: list[int], right: fixed_batch.Answer, found: fixed_batch.Answer
    ) -> None:
        self.seen.prompt_tokens += len(prompt)
        self.seen.cached_tokens += found.cached_tokens
        if wrong := fixed_batch.num_wrong(found, right):
            at = time.monotonic() - self._began
            self.seen.wrong_tokens += wrong
            self.seen.wrong.append(
                f"{at:.0f} s, prompt of {len(prompt)}, {found.cached_tokens} cached: {found.tokens}, not {right.tokens}"
            )
        else:
            self.seen.difference = max(self.seen.difference, fixed_batch.difference(found, right))

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = await self._http.post(path, json=body)
        if response.is_error:
            raise ValueError(f"{path}: {response.status_code} {response.text}")
        return response.json()

    async def _watch(self) -> None:
        console = Console(stderr=True)
        for look in itertools.count():
            if time.monotonic() >= self._ends:
                return
            with contextlib.suppress(httpx.HTTPError):
                await self._look(console, look)
            await asyncio.sleep(1)

    async def _look(self, console: Console, look: int) -> None:
        status = (await self._http.get("/v1/training")).json()
        self.seen.pending = status["pending"]
        if self._is_burst:
            gauges = metric_sums((await self._http.get("/metrics")).text)
            pool = gauges["sglang:max_total_num_tokens"]
            self.seen.in_use.append(gauges["sglang:num_used_tokens"] / pool)
        if look % max(1, int(self._options.minutes)) == 0:
            at = time.monotonic() - self._began
            self.seen.samples.append(sample(self._target.process.pid, status["trainer"]["pid"], at))
        if look % 60 == 0:
            seen = self.seen
            console.print(
                f"{(time.monotonic() - self._began) / 60:.1f} min: {seen.requests} requests, {seen.batches} fixed "
                f"batches, {len(seen.wrong)} wrong, {len(seen.errors)} errors, step {status['step']}"
            )
