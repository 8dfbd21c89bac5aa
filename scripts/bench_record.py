"""What recording costs a request, what it saves the trainer, and from which prompt length on it pays.

    python scripts/bench_record.py [--quick] [--only NAME,…] [--json FILE|-]

Two servers of the embedded model, one that records and one that does not, are sent the same random prompts, one at a
time and in turn, with training paused. Then the answers are voted on, and each server trains them: the difference of
the steps' forward passes is what the rows saved. Costs are processor time of the scheduler, copies to the host
included, because what is done after the first token still takes a core. The gate: the recording server reused every
prompt token.

The model: recording costs `fixed + per_token · n` seconds for a prompt of n tokens, and saves `saved · n` if a vote
comes. With the chance p of a vote it pays from n = fixed / (p · saved − per_token) tokens on: `record_min_tokens_pP`.

`ttft_recording_N`: the time to the first token of prompts of N tokens ÷ that of others of the same length that are not
to be recorded, in turn on one server: two servers that do the same differ by more than what recording costs.

A third server records answers, too. `tpot_decode_recording`: the time of long answers to short prompts, one at a time,
÷ that of its answers to requests that are not to be recorded; `tpot_decode_recording_8`: of eight at once.
`answers_…_per_token_us`: what rows of whole completions cost that server's scheduler, in turn with requests that are
not to be recorded, and what they save its trainer; `answers_pay_from`: the share of answers that must be voted on for
it to pay; `answers_step_speed_up`: of the whole steps.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from activation_options import full_status
from bench_common import Row, Run, progress, quartiles
from serving_servers import ALCHEMIST, Target
from serving_targets import started

from alchemist.server.main import TINY_MODEL

LENGTHS = (16, 64, 256, 1024)
CHANCES = (1.0, 0.3, 0.1)
VOCABULARY = 1500
SHORT, LONG = 16, 128
"""Tokens of the prompts and answers by which recording answers is judged."""
ANSWERS = ("answers_cost_per_token_us", "answers_saved_per_token_us", "answers_pay_from")
ANSWERS_STEP = "answers_step_speed_up"
STEPS = 2
"""Of each kind: no more than the versions that a recording may be behind."""
TPOTS = {1: "tpot_decode_recording", 8: "tpot_decode_recording_8"}
"""By how many answers are given at once."""
TPOT_BAR = 1.02
TTFTS = {n: f"ttft_recording_{n}" for n in (128, 512, 2048)}
"""By prompt length."""
TTFT_BAR = 1.03


class Side:
    """One server, ready, its training paused."""

    def __init__(self, target: Target) -> None:
        self.target = target
        target.wait_ready()
        target.http.post("/v1/training/pause").raise_for_status()
        self.seconds: dict[int, list[float]] = {n: [] for n in LENGTHS}
        """Answer times by prompt length."""
        self.processor: dict[int, float] = {}
        """Processor seconds of the scheduler, by prompt length, over all requests."""
        self._ids: list[str] = []
        children = psutil.Process(target.process.pid).children(recursive=True)
        self._scheduler = next(p for p in children if "scheduler" in " ".join(p.cmdline()))

    def used(self) -> float:
        times = self._scheduler.cpu_times()
        return float(times.user + times.system)

    def ask(self, prompt: list[int]) -> None:
        seconds, answers = self.generate([prompt], 2)
        self.seconds[len(prompt)].append(seconds)
        self._ids.append(answers[0]["meta_info"]["id"])

    def generate(
        self, prompts: list[list[int]], num_tokens: int, *, record: bool = True
    ) -> tuple[float, list[Any]]:
        """Answers of so many tokens, all at once; with the seconds they took."""
        body = {
            "input_ids": prompts,
            "sampling_params": {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True},
            "alchemist": {"record": record},
        }
        started = time.perf_counter()
        answers = self.target.http.post("/generate", json=body).raise_for_status().json()
        return time.perf_counter() - started, answers

    def first_token(self, prompt: list[int], *, record: bool) -> tuple[float, str]:
        """Seconds until it comes, of an answer of a few; and the answer's id."""
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
            "stream": True,
            "alchemist": {"record": record},
        }
        started = time.perf_counter()
        with self.target.http.stream("POST", "/generate", json=body) as answer:
            chunks = (line for line in answer.iter_lines() if line.startswith("data: {"))
            first = next(chunks)
            seconds = time.perf_counter() - started
            for _ in chunks:
                continue
        return seconds, json.loads(first.removeprefix("data: "))["meta_info"]["id"]

    def settle(self) -> None:
        """Wait until nothing is left to be copied."""
        while self.status()["activations"].get("hedge_backlog"):
            time.sleep(0.05)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.target.http.get("/v1/training").json()
        return found

    @property
    def num_rows(self) -> int:
        return sum(full_status(self.target.http)["activations"]["rows"].values())

    def num_recorded(self, rid: str) -> int:
        receipt = self.target.http.get(f"/v1/completions/{rid}/receipt").raise_for_status()
        return int(receipt.json()["recorded_tokens"])

    def train_last(self, count: int) -> dict[str, Any]:
        """`train` of the last `count` answers."""
        return self.train(self._ids[-count:])

    def train(self, rids: Sequence[str]) -> dict[str, Any]:
        """One step of votes on these answers; its metrics."""
        for rid in rids:
            vote = {"completion_id": rid, "rating": "up"}
            self.target.http.post("/v1/feedback", json=vote).raise_for_status()
        before = self.status()["step"]
        self.target.http.post("/v1/training/resume").raise_for_status()
        self.target.http.post("/v1/training/flush").raise_for_status()
        while (status := self.status())["step"] == before or status["state"] != "idle":
            time.sleep(0.02)
        self.target.http.post("/v1/training/pause").raise_for_status()
        metrics: dict[str, Any] = status["last_step"]
        return metrics


def measure(run: Run, none: Side, recording: Side, requests: int, batch: int) -> None:
    draw = random.Random(0)
    saved: dict[int, float] = {}
    for length in progress(LENGTHS, "prompt lengths"):
        used = {side: side.used() for side in (none, recording)}
        for i in range(requests):
            prompt = [draw.randrange(10, VOCABULARY) for _ in range(length)]
            for side in (none, recording) if i % 2 else (recording, none):
                side.ask(prompt)
        recording.settle()
        for side in (none, recording):
            side.processor[length] = side.used() - used[side]
        # Both trainers work on the same prompts, one after the other.
        steps = [side.train_last(batch) for side in (none, recording)]
        if steps[1]["tokens_reused"] < batch * (length - 1):
            sys.exit(f"gate: {steps[1]['tokens_reused']} of {batch * length} tokens were reused")
        forward = [step["forward_s"] + step["rows_s"] for step in steps]
        saved[length] = (forward[0] - forward[1]) / batch
        ratios = [
            r / n for r, n in zip(recording.seconds[length], none.seconds[length], strict=True)
        ]
        run.add(
            Row(
                f"answer_time_{length}",
                statistics.median(ratios),
                "x",
                quartiles(ratios),
                len(ratios),
                against="the same request, not recorded",
                less_is_better=True,
            )
        )
    costs = [
        (recording.processor[n] - none.processor[n]) / (len(recording.seconds[n])) for n in LENGTHS
    ]
    per_token, fixed = statistics.linear_regression(LENGTHS, costs)
    worth, _ = statistics.linear_regression(LENGTHS, [saved[n] for n in LENGTHS])
    for name, value, unit in (
        ("record_fixed_us", fixed * 1e6, "us"),
        ("record_per_token_us", per_token * 1e6, "us"),
        ("saved_per_token_us", worth * 1e6, "us"),
    ):
        run.add(Row(name, value, unit, (value, value), 1))
    for chance in CHANCES:
        margin = chance * worth - per_token
        # It never pays: more tokens than any prompt has.
        least = max(0.0, fixed) / margin if margin > 0 else float("inf")
        name = f"record_min_tokens_p{round(100 * chance)}"
        run.add(Row(name, least, "tokens", (least, least), 1, against=f"{chance:.0%} are voted on"))
    run.config |= {
        "processor_s": {str(n): costs[i] for i, n in enumerate(LENGTHS)},
        "saved_s": {str(n): s for n, s in saved.items()},
    }


def beside_unrecorded(name: str, seconds: dict[bool, list[float]], bar: float) -> Row:
    """The median of pairs' ratios; `seconds` by whether it was recorded."""
    ratios = [ours / its for ours, its in zip(seconds[True], seconds[False], strict=True)]
    row = Row(name, statistics.median(ratios), "x", quartiles(ratios), len(ratios))
    row.against, row.less_is_better, row.bar = "the same, not recorded", True, bar
    return row


def measure_ttft(run: Run, side: Side, rounds: int) -> None:
    draw = random.Random(3)
    for length, name in TTFTS.items():
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for i in progress(range(rounds), name):
            for record in (True, False) if i % 2 else (False, True):
                prompt = [draw.randrange(10, VOCABULARY) for _ in range(length)]
                took, rid = side.first_token(prompt, record=record)
                side.settle()
                recorded = side.num_recorded(rid)
                # The first tokens may be cached, of a prompt of the other kind.
                if not (length - 2 <= recorded if record else recorded <= 2):
                    sys.exit(f"gate: {recorded} tokens recorded of a prompt of {length}")
                seconds[record].append(took)
        run.add(beside_unrecorded(name, seconds, TTFT_BAR))


def measure_answers(run: Run, side: Side, rounds: int) -> None:
    draw = random.Random(1)
    for at_once, name in TPOTS.items():
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for i in progress(range(rounds), name):
            prompts = [
                [draw.randrange(10, VOCABULARY) for _ in range(SHORT)] for _ in range(at_once)
            ]
            for record in (True, False) if i % 2 else (False, True):
                held = side.num_rows
                took, _ = side.generate(prompts, LONG, record=record)
                side.settle()
                recorded = side.num_rows - held
                if i < 2 and (recorded >= at_once * LONG) != record:
                    sys.exit(f"gate: {recorded} new rows, {at_once} answers of {LONG} tokens")
                seconds[record].append(took)
                side.target.http.post("/flush_cache").raise_for_status()
        run.add(beside_unrecorded(name, seconds, TPOT_BAR))


def measure_whole(run: Run, side: Side, requests: int, batch: int) -> None:
    """What rows of whole completions cost and save, recorded and not in turn on one server: two servers that do the
    same differ by more than what recording costs.
    """
    draw = random.Random(2)
    used: dict[bool, list[float]] = {True: [], False: []}
    asked: dict[bool, list[str]] = {True: [], False: []}
    for i in progress(range(requests), "whole answers"):
        for record in (True, False) if i % 2 else (False, True):
            prompt = [draw.randrange(10, VOCABULARY) for _ in range(SHORT)]
            before = side.used()
            _, answers = side.generate([prompt], LONG, record=record)
            side.settle()
            used[record].append(side.used() - before)
            asked[record].append(answers[0]["meta_info"]["id"])
    tokens = SHORT + LONG - 1
    costs = [(a - b) / tokens * 1e6 for a, b in zip(used[True], used[False], strict=True)]
    cost = statistics.mean(costs)
    # A clock tick of the processor's time is most of what a pair differs by: no median, which would be one of a few.
    drawn = [statistics.mean(draw.choices(costs, k=requests)) for _ in range(200)]
    saved, speed_up = [], []
    for _ in progress(range(STEPS), "steps"):
        steps = {}
        for record, ids in asked.items():
            steps[record] = side.train([ids.pop() for _ in range(batch)])
        if steps[True]["tokens_reused"] < batch * (tokens - 1) or steps[False]["tokens_reused"]:
            sys.exit(f"gate: tokens reused: {[step['tokens_reused'] for step in steps.values()]}")
        forward = {r: step["forward_s"] + step["rows_s"] for r, step in steps.items()}
        saved.append((forward[False] - forward[True]) / (batch * tokens) * 1e6)
        speed_up.append(steps[False]["step_s"] / steps[True]["step_s"])
    worth = statistics.median(saved)
    run.add(Row(ANSWERS[0], cost, "us", quartiles(drawn), requests))
    run.add(Row(ANSWERS[1], worth, "us", quartiles(saved), STEPS))
    least, most = quartiles(drawn)
    run.add(Row(ANSWERS[2], cost / worth, "x", (least / worth, most / worth), 1, against="answers"))
    against = f"steps of {batch} answers of {LONG} tokens, not recorded"
    run.add(
        Row(ANSWERS_STEP, statistics.median(speed_up), "x", quartiles(speed_up), STEPS, against)
    )


def main() -> None:
    options = Run.parse(Run.parser(__doc__))
    run = Run("record", options)
    requests, batch, rounds = (16, 4, 2) if options.quick else (200, 16, 40)
    run.config = {"requests": requests, "votes": batch, "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="bench-record-") as name, ExitStack() as up:

        def server(record: str) -> Target:
            flags = ["--model-path", str(TINY_MODEL), "--data-dir", f"{name}/{record}"]
            flags += ["--record", record, "--objective", "sft"]
            flags += ["--train-batch-size", str(batch), "--train-max-wait", "600"]
            return up.enter_context(started(record, ALCHEMIST, flags, Path(name)))

        wants_tpot = any(map(run.wants, TPOTS.values()))
        wants_whole = any(map(run.wants, (*ANSWERS, ANSWERS_STEP)))
        if wants_tpot or wants_whole:
            decode = Side(server("decode"))
            if wants_tpot:
                measure_answers(run, decode, rounds)
            if wants_whole:
                measure_whole(run, decode, requests // 2, batch)
            up.close()
        of_answers = {*TPOTS.values(), *ANSWERS, ANSWERS_STEP}
        wanted = set(options.only.split(",")) - of_answers if options.only else {"all"}
        if wanted:
            recording = Side(server("prefill"))
            if wanted & {"all", *TTFTS.values()}:
                measure_ttft(run, recording, requests)
            if wanted - {*TTFTS.values()}:
                measure(run, Side(server("none")), recording, requests, batch)
    run.finish()


if __name__ == "__main__":
    main()
