"""What Alchemist costs serving: TTFT, TPOT and throughput beside plain SGLang, in one run.

    python scripts/bench_serving.py [--quick] [--only NAME,…] [--json FILE|-]

Four servers are up at once and measured in turn, in rotated order; the others are idle meanwhile:

    plain       SGLang with the same flags, nothing of ours and no LoRA
    off         Alchemist with --no-train --record none
    recording   Alchemist recording every prefill, its trainer idle
    idle        the same while training: a backlog of votes, lease policy idle

The load is SGLang's own benchmark client. Turns are short and many: a shared machine drifts by more within minutes than
what is measured here. Latency ratios are ours ÷ plain over all requests of the run: less is better; their quartiles are
those of 200 resamplings of the rounds. The gate: greedy tokens and logprobs of all four servers' base model agree.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from bench_common import Row, Run, progress, quartiles
from serving_load import Load, Timing

from alchemist.server.main import TINY_MODEL

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
WARM_UP = 4
"""Requests to each server before anything is measured."""
BURST = 8
"""Requests at once where throughput is measured."""
BARS = {"ttft_p50_recording": 1.05, "ttft_p50_idle": 1.25}


class Target:
    """One server under test."""

    def __init__(self, name: str, module: list[str], args: list[str], folder: Path) -> None:
        self.name = name
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

    def wait_ended(self) -> None:
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def greedy(self) -> list[Any]:
        """Tokens and logprobs of a few fixed prompts under the base model."""
        out = []
        for length in (5, 60, 300):
            body: dict[str, Any] = {
                "input_ids": [(7 * i + length) % 900 + 10 for i in range(length)],
                "sampling_params": {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True},
                "return_logprob": True,
            }
            if self.name != "plain":
                body["lora_path"] = "base"
            answer = self.http.post("/generate", json=body).json()
            out.append(
                [(e[1], round(e[0], 4)) for e in answer["meta_info"]["output_token_logprobs"]]
            )
        return out


class Backlog:
    """Votes enough to keep the trainer busy for as long as it may train."""

    def __init__(self, target: Target) -> None:
        self._http = target.http
        self._user = 0
        self._trainer = psutil.Process(self.status()["trainer"]["pid"])
        self._http.post("/v1/training/pause")
        self._completions = [self._complete(i) for i in range(8)]

    def _complete(self, i: int) -> str:
        body = {
            "input_ids": [(13 * j + 101 * i) % 900 + 10 for j in range(400)],
            "sampling_params": {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True},
        }
        return str(self._http.post("/generate", json=body).json()["meta_info"]["id"])

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get("/v1/training").json()
        return found

    def start(self, votes: int) -> None:
        missing = votes - self.status()["pending"]
        for i in range(max(0, missing)):
            self._user += 1
            vote = {
                "completion_id": self._completions[i % len(self._completions)],
                "rating": "up" if i % 2 else "down",
                "user": f"bench-{self._user}",
            }
            self._http.post("/v1/feedback", json=vote).raise_for_status()
        self._http.post("/v1/training/resume").raise_for_status()

    def stop(self) -> int:
        """Pause, wait until the step under way is over; steps done so far."""
        if self.status()["pending"] == 0:
            sys.exit("the backlog of votes ran dry: the trainer was not busy throughout")
        self._http.post("/v1/training/pause").raise_for_status()
        while self.status()["lease"]["trainer_state"] in ("running", "yielded"):
            time.sleep(0.05)
        return int(self.status()["step"])

    def dedicated(self, steps: int) -> tuple[float, float]:
        """With nobody to serve, over whole steps: training tokens and the trainer's processor seconds, per second."""
        self.start(4000)
        self._wait_for_step(self.status()["step"] + 1)
        before = self.status()["step"]
        tokens, seconds, started = self.tokens, self.train_seconds, time.monotonic()
        self._wait_for_step(before + steps)
        elapsed = time.monotonic() - started
        return (self.tokens - tokens) / elapsed, (self.train_seconds - seconds) / elapsed

    def _wait_for_step(self, step: int) -> None:
        while self.status()["step"] < step:
            time.sleep(0.02)

    @property
    def train_seconds(self) -> float:
        """Processor time the trainer has used: what a turn of seconds can be measured by, as steps cannot."""
        times = self._trainer.cpu_times()
        return times.user + times.system

    @property
    def tokens(self) -> int:
        """Tokens trained so far."""
        status = self.status()
        return int(status["tokens_reused"] + status["tokens_recomputed"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(TINY_MODEL), help="model directory (default: the embedded one)"
    )
    parser.add_argument("--input-len", type=int, default=512, help="prompt tokens (default: 512)")
    parser.add_argument("--output-len", type=int, default=24, help="answer tokens (default: 24)")
    parser.add_argument(
        "--rate", type=float, default=2.0, help="requests per second, Poisson (default: 2)"
    )
    parser.add_argument(
        "--requests", type=int, default=4, help="requests per round and server (default: 4)"
    )
    parser.add_argument("--rounds", type=int, default=0, help="rounds (default: 60; quick: 2)")
    Run.add_arguments(parser)
    options = parser.parse_args()
    # However this ends, its servers end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    rounds = options.rounds or (2 if options.quick else 60)
    run = Run("serving", options)
    run.config = {"model": os.path.relpath(options.model, ROOT)}
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        folder = Path(name)
        alchemist = ["-m", "alchemist.server"]
        model = ["--model-path", options.model]

        def data(variant: str) -> list[str]:
            return [*model, "--data-dir", str(folder / variant)]

        targets = [
            Target("plain", ["scripts/plain_sglang.py"], model, folder),
            Target("off", alchemist, [*data("off"), "--no-train", "--record", "none"], folder),
            Target("recording", alchemist, data("recording"), folder),
            Target("idle", alchemist, [*data("idle"), "--train-batch-size", "16"], folder),
        ]
        try:
            measure(run, options, targets, rounds, folder)
        finally:
            for target in targets:
                target.process.send_signal(signal.SIGTERM)
            for target in targets:
                target.wait_ended()
    run.finish()


def measure(
    run: Run, options: argparse.Namespace, targets: list[Target], rounds: int, folder: Path
) -> None:
    # Slow to import: while the servers start.
    load = Load(options.model, options.input_len, options.output_len)
    for target in progress(targets, "starting servers"):
        target.wait_ready()
    expected = targets[0].greedy()
    for target in targets[1:]:
        if target.greedy() != expected:
            sys.exit(
                f"gate: {target.name} does not answer as plain SGLang does; nothing was measured"
            )
    backlog = Backlog(targets[-1])
    dedicated, busy = backlog.dedicated(3 if options.quick else 12)
    backlog.stop()
    for target in progress(targets, "warm-up"):
        load.run(target.url, WARM_UP, math.inf, seed=-1 % 2**32)
    results: dict[str, list[list[Timing]]] = {target.name: [] for target in targets}
    throughput: dict[str, list[float]] = {target.name: [] for target in targets}
    shares: list[float] = []

    def turn(target: Target, requests: int, rate: float, seed: int) -> tuple[list[Timing], float]:
        """What the client saw, and the seconds it took; the trainer works meanwhile if it is that one's turn."""
        if target.name == "idle":
            backlog.start(4000)
        before, started = backlog.train_seconds, time.monotonic()
        timings = load.run(target.url, requests, rate, seed)
        seconds = time.monotonic() - started
        if target.name == "idle":
            shares.append((backlog.train_seconds - before) / seconds / busy)
            backlog.stop()
        return timings, seconds

    order = [
        (r, targets[(i + r) % len(targets)]) for r in range(rounds) for i in range(len(targets))
    ]
    for r, target in progress(order, "measuring"):
        results[target.name].append(turn(target, options.requests, options.rate, r)[0])
    paced = list(shares)
    bursts = order[: max(len(targets), len(order) // 6)]
    for r, target in progress(bursts, "measuring all at once"):
        seconds = turn(target, BURST, math.inf, rounds + r)[1]
        throughput[target.name].append(BURST * options.output_len / seconds)
    report(run, results, throughput, paced, dedicated, backlog.status()["lease"])


def quantile(turns: Sequence[Sequence[float]], q: float) -> float:
    """Of all requests of the turns."""
    values = sorted(itertools.chain(*turns))
    return values[min(len(values) - 1, int(q * len(values)))]


def resampled(turns: Sequence[T]) -> list[Sequence[T]]:
    """The turns as measured, then drawn with replacement 200 times: the same rounds for every server."""
    draw = random.Random(0)
    return [turns, *(draw.choices(turns, k=len(turns)) for _ in range(200))]


def report(
    run: Run,
    results: dict[str, list[list[Timing]]],
    throughput: dict[str, list[float]],
    shares: list[float],
    dedicated: float,
    lease: dict[str, Any],
) -> None:
    for what in ("ttft", "tpot"):
        rounds = {
            name: [[getattr(timing, what) for timing in turn] for turn in turns]
            for name, turns in results.items()
        }
        n = len(rounds["plain"])
        for label, q in (("p50", 0.5), ("p99", 0.99)):
            base = [quantile(turns, q) for turns in resampled(rounds["plain"])]
            run.add(Row(f"{what}_{label}_plain", base[0], "ms", quartiles(base), n))
            for name in ("off", "recording", "idle"):
                ours = [quantile(turns, q) for turns in resampled(rounds[name])]
                ratios = [mine / its for mine, its in zip(ours, base, strict=True)]
                row = Row(f"{what}_{label}_{name}", ratios[0], "x", quartiles(ratios), n)
                row.against, row.less_is_better = "plain SGLang, same run", True
                row.bar = BARS.get(row.name)
                run.add(row)
    for name, values in throughput.items():
        value = statistics.median(values)
        row = Row(f"output_throughput_{name}", value, "tokens/s", quartiles(values), len(values))
        row.against = f"{BURST} requests at once"
        run.add(row)
    acks = lease["revocations"]
    for label in ("p50", "p99"):
        value = lease[f"revoke_{label}_ms"]
        if value is not None:
            run.add(Row(f"revoke_{label}_ms", value, "ms", (value, value), acks))
    missed = float(lease["revocations_missed"])
    run.add(Row("revocations_missed", missed, "times", (missed, missed), 1))
    run.add(
        Row(
            "longest_layer_ms",
            lease["longest_layer_ms"],
            "ms",
            (lease["longest_layer_ms"],) * 2,
            acks,
        )
    )
    run.add(Row("train_tokens_dedicated", dedicated, "tokens/s", (dedicated, dedicated), 1))
    run.add(
        Row(
            "train_share_idle",
            statistics.median(shares),
            "x",
            quartiles(shares),
            len(shares),
            against="dedicated, by processor time",
        )
    )


if __name__ == "__main__":
    main()
