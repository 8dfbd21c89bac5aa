"""Base-reference log-probabilities: scored by the trainer, and by the engine itself as ordinary requests.

    python scripts/bench_reference.py [--quick] [--only NAME,…] [--json FILE|-]

A real server, the embedded model. Each round, completions of the live version are voted on and trained with KTO against
the base: the step's own figure says how long its reference pass took (`reference_s`), mismatched pairs of the KL
estimate included. Then the same sequences, the mismatched ones too, are sent to the server as requests of the base
model that ask for the logprobs of the response. Ratios are engine ÷ trainer: above one, the trainer is faster. The
gate: the engine's log-probabilities are repeatable and finite for every sequence.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from bench_common import Row, Run, progress, quartiles
from serving_servers import ALCHEMIST, Target

from alchemist.server.main import TINY_MODEL

BATCH = 16


class Votes:
    """Completions of one server, and the steps made of them."""

    def __init__(self, url: str, vocabulary: int) -> None:
        self.http = httpx.Client(base_url=url, timeout=300)
        self._random = random.Random(0)
        self._vocabulary = vocabulary

    def ids(self, count: int) -> list[int]:
        return [self._random.randrange(10, self._vocabulary) for _ in range(count)]

    def answer(self, prompt: list[int], tokens: int) -> list[int]:
        """The live version's answer to `prompt`, voted on; up and down in turn by its first token."""
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True},
        }
        found = self.http.post("/generate", json=body).raise_for_status().json()
        vote = {
            "completion_id": found["meta_info"]["id"],
            "rating": "up" if self._random.random() < 0.5 else "down",
        }
        self.http.post("/v1/feedback", json=vote).raise_for_status()
        ids: list[int] = found["output_ids"]
        return ids

    def train(self) -> dict[str, Any]:
        """One step of everything pending; its metrics."""
        before = self.http.get("/v1/training").json()["step"]
        self.http.post("/v1/training/flush").raise_for_status()
        while True:
            status: dict[str, Any] = self.http.get("/v1/training").json()
            if status["step"] > before and status["state"] == "idle":
                metrics: dict[str, Any] = status["last_step"]
                return metrics
            time.sleep(0.05)


async def engine_scores(url: str, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Sum of the base model's logprobs of each response, all requests at once."""

    async def one(http: httpx.AsyncClient, prompt: list[int], response: list[int]) -> float:
        body = {
            "input_ids": [*prompt, *response],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": len(prompt) - 1,
            "lora_path": "base",
        }
        answer = (await http.post("/generate", json=body)).raise_for_status().json()
        logprobs = answer["meta_info"]["input_token_logprobs"][-len(response) :]
        return sum(entry[0] for entry in logprobs)

    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        return list(await asyncio.gather(*(one(http, p, r) for p, r in pairs)))


def measure(run: Run, target: Target, rounds: int, shared: int, prompt: int) -> None:
    name = f"shared{shared}" if shared else "own"
    votes = Votes(target.url, 1500)
    trainer: list[float] = []
    engine: list[float] = []
    for _ in progress(range(rounds), name):
        system = votes.ids(shared)
        prompts = [system + votes.ids(prompt - shared) for _ in range(BATCH)]
        responses = [votes.answer(ids, 64) for ids in prompts]
        metrics = votes.train()
        trainer.append(metrics["reference_s"])
        mismatched = zip(prompts, [responses[-1], *responses[:-1]], strict=True)
        pairs = [*zip(prompts, responses, strict=True), *mismatched]
        started = time.perf_counter()
        scores = asyncio.run(engine_scores(target.url, pairs))
        engine.append(time.perf_counter() - started)
        again = asyncio.run(engine_scores(target.url, pairs[:1]))
        if not all(math.isfinite(s) for s in scores) or abs(again[0] - scores[0]) > 1e-2:
            sys.exit("gate: the engine's log-probabilities are not finite or not repeatable")
    for side, seconds in (("trainer", trainer), ("engine", engine)):
        value = statistics.median(seconds)
        run.add(Row(f"reference_{side}_{name}", value, "s", quartiles(seconds), rounds))
    ratios = [e / t for e, t in zip(engine, trainer, strict=True)]
    against = f"{2 * BATCH} requests of the base model, prompt {prompt}, response 64"
    row = Row(
        f"reference_{name}_vs_engine", statistics.median(ratios), "x", quartiles(ratios), rounds
    )
    row.against = against
    run.add(row)


def main() -> None:
    options = Run.parse(Run.parser(__doc__))
    run = Run("reference", options)
    run.config = {"batch": BATCH}
    with tempfile.TemporaryDirectory(prefix="bench-reference-") as name:
        folder = Path(name)
        flags = ["--model-path", str(TINY_MODEL), "--data-dir", str(folder / "data")]
        flags += ["--train-batch-size", str(BATCH), "--train-max-wait", "600"]
        with Target("reference", ALCHEMIST, flags, folder) as target:
            target.wait_ready()
            # The first version: what v0 served needs no reference pass.
            votes = Votes(target.url, 1500)
            votes.answer(votes.ids(64), 8)
            votes.train()
            for shared, prompt in ((0, 512), (512, 768)):
                measure(run, target, 2 if options.quick else 5, shared, prompt)
    run.finish()


if __name__ == "__main__":
    main()
