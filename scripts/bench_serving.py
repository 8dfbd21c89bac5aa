"""What Alchemist costs serving: TTFT, TPOT and throughput beside plain SGLang, in one run.

    python scripts/bench_serving.py [--quick] [--only NAME,…] [--json FILE|-]

Servers that are up together are measured in turn, in rotated order; the others have come to rest by then. Memory holds
four or five: plain SGLang stays up, and the rest comes in two groups, each compared with plain's turns among its own.

    plain       SGLang with the same flags, nothing of ours and no LoRA

    again       the same a second time: what two servers that do the same differ by
    off         Alchemist with --no-train --record none
    recording   Alchemist recording every prefill, its trainer idle
    unrecorded  the same server, its requests not to be recorded: recording over unrecorded is what recording does
    decode      the same, recording answers, too
    idle        as recording, while training: a backlog of votes, lease policy idle
    paused      the same server, its trainer paused: what a trained version costs; idle over paused: what training does

    share       training, lease policy share: at least --share of the time
    slo         training, lease policy slo: one and a half times what plain SGLang keeps in 99 of 100 requests at half
                load, unless targets are given
    none        training without a lease: how bad it is otherwise

The first group is started --starts times, plain SGLang too: two servers that do the same differ by some percent for as
long as they live, by where their memory happens to lie. Of the group `again` is only started if --only names it.

The load is SGLang's own benchmark client, at --rate, and (rows that end in _at25 … _at90) at parts of the rate at which
plain SGLang is saturated, measured at every start, for a shared machine is not always as fast. Turns are short and
many: it drifts by more within minutes than what is measured here. Latency ratios are ours ÷ plain over all requests of
the run: less is better; their quartiles are those of 200 resamplings of the starts, or of the rounds if there was one
start. Rows of `pair` are the median of each request's ratio to plain's with the same prompt and arrival, which is
steadier where requests meet each other. The gate: greedy tokens and logprobs of all servers' base model agree. --quick
has the first group at --rate only; --only starts what its rows need.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from bench_common import Run, model_name, progress
from serving_load import Load
from serving_report import Measured, Slo, quantile, report_group, report_saturation
from serving_servers import ALCHEMIST, PLAIN, Backlog, Target, difference

from alchemist.server.main import TINY_MODEL

GROUPS = (("off", "recording", "unrecorded", "decode", "idle", "paused"), ("share", "slo", "none"))
AGAIN = "again"
TRAINING = ("idle", "share", "slo", "none")
RECORDING = ("recording", "decode", *TRAINING)
TWINS = {"unrecorded": "recording", "paused": "idle"}
"""Measured at another one's server."""
LEVELS = (25, 50, 75, 90)
"""Load in percent of the rate at which plain SGLang is saturated."""
WARM_UP = 4
"""Requests to each server before anything is measured; a turn at the highest level besides, where there are levels: the
first one that fills a server's memory pays for the pages.
"""
BURST = 8
"""Requests at once where throughput is measured."""
SATURATING = 32
"""Requests at once where the saturation rate is measured: twice what runs together."""
SLO_ROOM = 1.5
"""Targets of slo, in times of plain SGLang's p99 at half load: of a target that serving alone misses nothing is left
for training.
"""
TARGET_TURNS = 20
"""Turns of plain SGLang by which they are found."""
SETTLING = 160
"""Requests at half load with which slo's share settles before it is measured."""


def main() -> None:
    parser = Run.parser(__doc__)
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
    parser.add_argument("--starts", type=int, default=0, help="(default: 5; quick: 1)")
    parser.add_argument("--rounds", type=int, default=0, help="of a start (default: 12; quick: 2)")
    parser.add_argument(
        "--level-requests", type=int, default=16, help="the same at each load level (default: 16)"
    )
    parser.add_argument(
        "--level-rounds",
        type=int,
        default=0,
        help="at each level, all starts together (default: 20; quick: 2)",
    )
    parser.add_argument("--share", type=float, default=0.2, help="of policy share (default: 0.2)")
    parser.add_argument(
        "--slo-ttft-ms", type=float, default=0.0, help="target of slo (default: measured)"
    )
    parser.add_argument(
        "--slo-tpot-ms", type=float, default=0.0, help="target of slo (default: measured)"
    )
    options = Run.parse(parser)
    run = Run("serving", options)
    run.config = {"model": model_name(options.model)}
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        Bench(run, options, Path(name)).measure()
    run.finish()


def wanted(options: argparse.Namespace) -> tuple[list[list[str]], list[int], bool]:
    """Groups of servers, load levels, and whether the load of --rate is wanted, by --quick and --only."""
    if not options.only:
        groups = GROUPS[:1] if options.quick else GROUPS
        return [list(group) for group in groups], [] if options.quick else list(LEVELS), True
    rows = options.only.split(",")
    # Of every trainer there is a train_share; share is a server, too.
    words = {word for row in rows for word in row.replace("train_share", "").split("_")}
    if words & {"revoke", "revocations", "longest", "dedicated"}:
        words.add("idle")
    words |= {its for twin, its in TWINS.items() if twin in words}
    groups = [[name for name in group if name in words] for group in GROUPS]
    if AGAIN in words:
        groups[0].insert(0, AGAIN)
    at_half = {"slo_met", "slo_train_share"}
    levels = [at for at in LEVELS if f"at{at}" in words or (at == 50 and at_half & set(rows))]
    alone = {*at_half, "saturation_rate", "slo_ttft_target_ms", "slo_tpot_target_ms"}
    has_base = any(row not in alone and not row.rpartition("_at")[2].isdigit() for row in rows)
    return [group for group in groups if group] or [[]], levels, has_base


class Bench:
    """One run: its servers and what it has found so far."""

    def __init__(self, run: Run, options: argparse.Namespace, folder: Path) -> None:
        self._run, self._options, self._folder = run, options, folder
        self._groups, self._levels, self._has_base = wanted(options)
        self._rounds = options.rounds or (2 if options.quick else 12)
        self._starts = options.starts or (1 if options.quick else 5)
        self._level_rounds = options.level_rounds or (2 if options.quick else 20)
        self._slo = Slo(options.slo_ttft_ms, options.slo_tpot_ms)
        self._seeds = itertools.count()
        """One for each turn's prompts and arrivals."""
        self._rates: list[float] = []
        """At which plain SGLang was saturated, in requests a second, the last one as it is now; empty: not measured."""

    def measure(self) -> None:
        up: list[Target] = []
        try:
            for group in self._groups:
                if group is self._groups[0] and "slo" not in group:
                    self._measure_starts(up, group)
                    continue
                # slo's targets are only known when plain has been measured.
                if not up:
                    self._begin(up, [])
                self._measure_beside(up, group)
        finally:
            Target.end(up)
        if self._rates:
            report_saturation(self._run, self._rates)

    def _measure_starts(self, up: list[Target], group: list[str]) -> None:
        """Plain SGLang and a group, started together several times; the last of them stay `up`."""
        found = Measured(["plain", *group], is_first=True, starts=self._starts)
        for start in range(self._starts):
            Target.end(up)
            up.clear()
            self._begin(up, group, start)
            self._find_rate(up[0])
            self._measure_group(up, found, start)
        report_group(self._run, found, self._slo, burst=BURST)

    def _measure_beside(self, up: list[Target], group: list[str]) -> None:
        """Another group beside the plain SGLang that is up."""
        Target.end(up[1:])
        self._find_rate(up[0])
        if "slo" in group and self._slo.is_open:
            self._slo = self._targets(up[0])
        del up[1:]
        self._start_all(up, group)
        self._wait(up)
        is_first = group is self._groups[0]
        found = Measured([target.name for target in up], is_first=is_first, starts=1)
        self._measure_group(up, found)
        report_group(self._run, found, self._slo, burst=BURST)

    def _begin(self, up: list[Target], group: list[str], start: int = 0) -> None:
        """Start plain SGLang and a group; of the first plain, what all others are measured by."""
        is_first = start == 0
        names = [name for name in ("plain", *group) if name not in TWINS]
        # None of them is always the first to take its memory.
        first = start % len(names)
        self._start_all(up, [*names[first:], *names[:first]])
        up.sort(key=lambda target: names.index(target.name))
        load = self._load
        self._wait(up)
        load.run(up[0].url, WARM_UP, math.inf, seed=-1 % 2**32)
        if is_first:
            self._expected = up[0].greedy()

    def _find_rate(self, plain: Target) -> None:
        has_slo = any("slo" in group for group in self._groups)
        if self._levels or has_slo or self._run.wants("saturation_rate"):
            self._rates.append(self._saturation(plain))

    @cached_property
    def _load(self) -> Load:
        # Slow to import: first asked for while the servers start.
        return Load(self._options.model, self._options.input_len, self._options.output_len)

    @staticmethod
    def _wait(targets: list[Target]) -> None:
        for target in progress(targets, "starting servers"):
            target.wait_ready()

    def _start_all(self, up: list[Target], names: Sequence[str]) -> None:
        """One by one into `up`: what has been started ends with the run, also where the next one fails."""
        for name in names:
            up.append(self._start(name))

    def _start(self, name: str) -> Target:
        options = self._options
        model = ["--model-path", options.model]
        if name in ("plain", AGAIN):
            return Target(name, PLAIN, model, self._folder)
        flags = {
            "off": ["--no-train", "--record", "none"],
            "recording": ["--record", "prefill"],
            "decode": ["--record", "decode"],
            "idle": [],
            "share": ["--lease-policy", "share", "--lease-share", str(options.share)],
            "slo": ["--lease-policy", "slo", *self._slo.flags],
            "none": ["--lease-policy", "none"],
        }
        args = [*model, "--data-dir", str(self._folder / name), "--train-batch-size", "16"]
        return Target(name, ALCHEMIST, [*args, *flags[name]], self._folder)

    def _saturation(self, plain: Target) -> float:
        """Requests a second when more are there than can run together: the median of a few bursts."""
        rates = []
        for _ in progress(range(2 if self._options.quick else 5), "finding the saturation rate"):
            started = time.monotonic()
            self._load.run(plain.url, SATURATING, math.inf, next(self._seeds))
            rates.append(SATURATING / (time.monotonic() - started))
        return statistics.median(rates)

    def _targets(self, plain: Target) -> Slo:
        requests, rate = self._options.level_requests, self._rates[-1] / 2
        turns = [
            self._load.run(plain.url, requests, rate, next(self._seeds))
            for _ in progress(range(TARGET_TURNS), "finding slo's targets")
        ]
        ttft = quantile([[timing.ttft for timing in turn] for turn in turns], 0.99)
        tpot = quantile([[timing.tpot for timing in turn] for turn in turns], 0.99)
        return Slo(SLO_ROOM * ttft, SLO_ROOM * tpot)

    def _measure_group(self, targets: list[Target], found: Measured, start: int = 0) -> None:
        for target in targets[1:]:
            if differs := difference(target.greedy(), self._expected):
                sys.exit(
                    f"gate: {target.name} does not answer as plain SGLang does: {differs}; nothing was measured"
                )
        for target in targets:
            if target.name in TRAINING:
                target.backlog = Backlog(target)
                target.backlog.measure_alone(3 if self._options.quick else 12)
        for target in progress(targets, "warm-up"):
            self._load.run(target.url, WARM_UP, math.inf, seed=-1 % 2**32)
            if self._levels:
                rate = self._rates[-1] * self._levels[-1] / 100
                self._load.run(target.url, self._options.level_requests, rate, next(self._seeds))
            if target.name == "slo" and target.backlog is not None:
                target.backlog.start()
                self._load.run(target.url, SETTLING, self._rates[-1] / 2, next(self._seeds))
                target.backlog.stop()
        for target in targets:
            target.wait_quiet()
        by_name = {target.name: target for target in targets}
        if "unrecorded" in found.names:
            by_name["unrecorded"] = by_name["recording"].twin(
                "unrecorded", alchemist={"record": False}
            )
        if "paused" in found.names:
            by_name["paused"] = by_name["idle"].twin("paused")
        targets = list(by_name.values())
        options = self._options
        # The same prompts for all servers, and never again: plain SGLang, which stays up, would have them in its cache.
        seeds = defaultdict[tuple[int | None, int], int](lambda: next(self._seeds))
        if self._has_base:
            plan = _rotated(targets, self._rounds, first=start * self._rounds)
            for r, target in progress(plan, "measuring"):
                self._turn(found, target, None, options.requests, options.rate, seeds[None, r])
            bursts = plan[: max(len(targets), len(plan) // 6)]
            for r, target in progress(bursts, "measuring all at once"):
                seconds = self._turn(found, target, -1, BURST, math.inf, seeds[-1, r])
                found.throughput[target.name].append(BURST * options.output_len / seconds)
        rounds = -(-self._level_rounds // found.starts)
        levels = [
            (r, at, target)
            for r in range(start * rounds, (start + 1) * rounds)
            for at in self._levels
            for _, target in _rotated(targets, 1, first=r)
        ]
        for r, at, target in progress(levels, "measuring at load levels"):
            rate = self._rates[-1] * at / 100
            self._turn(found, target, at, options.level_requests, rate, seeds[at, r])
        for target in targets:
            if target.backlog is not None:
                found.trained[target.name] = target.backlog

    def _turn(
        self,
        found: Measured,
        target: Target,
        at: int | None,
        requests: int,
        rate: float,
        seed: int,
    ) -> float:
        """One server's turn; the seconds it took. Its trainer works meanwhile, if it is to.

        Args:
            at: load level; None: the load of --rate; -1: not kept.
        """
        backlog = target.backlog
        if backlog is not None:
            backlog.start()
        records = target.name in RECORDING and at != -1
        skipped = target.num_skipped() if records else 0
        gates, started = backlog.gates if backlog else 0, time.monotonic()
        timings = self._load.run(
            target.url, requests, rate, seed, prompts=target.prompts, body=target.body
        )
        seconds = time.monotonic() - started
        if backlog is not None:
            speed = (backlog.gates - gates) / seconds
            found.add_share(target.name, at, speed / backlog.gates_per_s)
            backlog.stop()
        if records:
            part = (target.num_skipped() - skipped) / (requests * self._options.input_len)
            found.add_recorded(target.name, at, 1 - part)
        found.add(target.name, at, timings)
        target.wait_quiet()
        return seconds


def _rotated(targets: Sequence[Target], rounds: int, first: int = 0) -> list[tuple[int, Target]]:
    return [
        (r, targets[(i + r) % len(targets)])
        for r in range(first, first + rounds)
        for i in range(len(targets))
    ]


if __name__ == "__main__":
    main()
