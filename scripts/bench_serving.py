"""What Alchemist costs serving: TTFT, TPOT and throughput beside plain SGLang, in one run.

    python scripts/bench_serving.py [--quick] [--only NAME,…] [--json FILE|-]

Four servers are up at once and measured in turn, in rotated order; the others are idle meanwhile:

    plain       SGLang with the same flags, nothing of ours and no LoRA
    off         Alchemist with --no-train --record none
    recording   Alchemist recording every prefill, its trainer idle
    idle        the same while training: a backlog of votes, lease policy idle

The load is SGLang's own benchmark client, with random token ids (no prefix is ever shared). Rounds are short and many:
a shared machine drifts by more within minutes than what is measured here. Latency ratios are ours ÷ plain in the same
round: less is better. The gate: greedy tokens and logprobs of all four servers' base model agree.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from bench_common import Row, Run, progress, quartiles

from alchemist.server.main import TINY_MODEL

ROOT = Path(__file__).parents[1]
WARM_UP = 4
"""Requests to each server before anything is measured."""
BARS = {"ttft_p50_recording": 1.05, "ttft_p50_idle": 1.25}


class Target:
    """One server under test."""

    def __init__(self, name: str, module: list[str], args: list[str], folder: Path) -> None:
        self.name = name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=300)
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

    def load(
        self, options: argparse.Namespace, folder: Path, seed: int, requests: int, rate: float
    ) -> dict[str, Any]:
        """One run of SGLang's benchmark client, `rate` requests a second; its result with per-request details, times
        in seconds."""
        from sglang.benchmark import serving

        result = folder / f"{self.name}-{seed}.jsonl"
        arguments = {
            "backend": "sglang",
            "host": "127.0.0.1",
            "port": self.port,
            "dataset-name": "random-ids",
            "model": options.model,
            "tokenizer": options.model,
            "seed": seed,
            "num-prompts": requests,
            "request-rate": rate,
            "random-input-len": options.input_len,
            "random-output-len": options.output_len,
            "random-range-ratio": 1.0,
            "warmup-requests": 1,
            "output-file": result,
        }
        words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        said = io.StringIO()
        argv, sys.argv = sys.argv, ["serving", *words, "--output-details", "--disable-tqdm"]
        try:
            with contextlib.redirect_stdout(said):
                serving.cli_main()
        finally:
            sys.argv = argv
        if not result.exists():
            sys.exit(f"the benchmark client failed on {self.name}:\n{said.getvalue()[-2000:]}")
        found: dict[str, Any] = json.loads(result.read_text().splitlines()[-1])
        if found["completed"] != requests:
            sys.exit(f"{self.name}: {found['completed']} of {requests} requests were answered")
        return found


class Backlog:
    """Votes enough to keep the trainer busy for as long as it may train."""

    def __init__(self, target: Target) -> None:
        self._http = target.http
        self._user = 0
        self.train_seconds = 0.0
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

    def dedicated_rate(self, steps: int) -> float:
        """Training tokens per second with nobody to serve, over whole steps."""
        self.start(4000)
        self._wait_for_step(self.status()["step"] + 1)
        before = self.status()["step"]
        return self.rate_over(lambda: self._wait_for_step(before + steps))[0]

    def _wait_for_step(self, step: int) -> None:
        while self.status()["step"] < step:
            time.sleep(0.02)

    def rate_over(self, action: Any) -> tuple[float, Any]:
        before, started = self.status(), time.monotonic()
        result = action()
        after, ended = self.status(), time.monotonic()
        tokens = sum(after[k] - before[k] for k in ("tokens_reused", "tokens_recomputed"))
        return tokens / (ended - started), result


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
        "--requests", type=int, default=12, help="requests per round and server (default: 12)"
    )
    parser.add_argument("--rounds", type=int, default=0, help="rounds (default: 20; quick: 2)")
    Run.add_arguments(parser)
    options = parser.parse_args()
    # However this ends, its servers end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    rounds = options.rounds or (2 if options.quick else 20)
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
    from sglang.benchmark import serving  # noqa: F401

    for target in progress(targets, "starting servers"):
        target.wait_ready()
    expected = targets[0].greedy()
    for target in targets[1:]:
        if target.greedy() != expected:
            sys.exit(
                f"gate: {target.name} does not answer as plain SGLang does; nothing was measured"
            )
    backlog = Backlog(targets[-1])
    dedicated = backlog.dedicated_rate(3 if options.quick else 12)
    backlog.stop()
    for target in progress(targets, "warm-up"):
        target.load(options, folder, seed=999, requests=WARM_UP, rate=math.inf)

    def load(target: Target, seed: int) -> dict[str, Any]:
        return target.load(options, folder, seed, options.requests, options.rate)

    results: dict[str, list[dict[str, Any]]] = {target.name: [] for target in targets}
    rates: list[float] = []
    order = [
        (r, targets[(i + r) % len(targets)]) for r in range(rounds) for i in range(len(targets))
    ]
    for r, target in progress(order, "measuring"):
        if target.name == "idle":
            backlog.start(4000)
            rate, result = backlog.rate_over(lambda t=target, s=r: load(t, s))
            rates.append(rate)
            backlog.stop()
        else:
            result = load(target, r)
        results[target.name].append(result)
    report(run, results, rates, dedicated, backlog.status()["lease"])


def report(
    run: Run,
    results: dict[str, list[dict[str, Any]]],
    rates: list[float],
    dedicated: float,
    lease: dict[str, Any],
) -> None:
    def latencies(name: str, what: str) -> list[list[float]]:
        """Milliseconds of each request, round by round, sorted within one."""
        if what == "ttft":
            found = [result["ttfts"] for result in results[name]]
        else:
            found = [[statistics.fmean(i) for i in r["itls"] if i] for r in results[name]]
        return [sorted(seconds * 1e3 for seconds in values) for values in found]

    def quantile(ordered: Sequence[float], q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    for what in ("ttft", "tpot"):
        rounds = {name: latencies(name, what) for name in results}
        pooled = {name: sorted(itertools.chain(*found)) for name, found in rounds.items()}
        for label, q in (("p50", 0.5), ("p99", 0.99)):
            plain = [quantile(values, q) for values in rounds["plain"]]
            value = quantile(pooled["plain"], q)
            run.add(Row(f"{what}_{label}_plain", value, "ms", quartiles(plain), len(plain)))
            for name in ("off", "recording", "idle"):
                # Each round against plain SGLang's measurement of the same round and the same requests. A round is too
                # short to have a 99th percentile: that one is of all requests of the run, its quartiles the rounds'.
                ratios = [
                    quantile(ours, q) / base for ours, base in zip(rounds[name], plain, strict=True)
                ]
                ratio = statistics.median(ratios)
                if label == "p99":
                    ratio = quantile(pooled[name], q) / value
                row = Row(f"{what}_{label}_{name}", ratio, "x", quartiles(ratios), len(ratios))
                row.against, row.less_is_better = "plain SGLang, same run", True
                row.bar = BARS.get(row.name)
                run.add(row)
    for name, found in results.items():
        values = [result["output_throughput"] for result in found]
        run.add(
            Row(
                f"output_throughput_{name}",
                statistics.median(values),
                "tokens/s",
                quartiles(values),
                len(values),
            )
        )
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
    shares = [rate / dedicated for rate in rates]
    run.add(
        Row(
            "train_share_idle",
            statistics.median(shares),
            "x",
            quartiles(shares),
            len(shares),
            against="dedicated",
        )
    )


if __name__ == "__main__":
    main()
