"""Rows of `bench_serving.py`."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench_common import Row, Run, quartiles
from serving_load import Timing
from serving_servers import Backlog

T = TypeVar("T")
BARS = {"ttft_p50_recording": 1.03, "ttft_p50_idle": 1.10, "ttft_p99_idle": 1.5}
SLO_MET, SLO_TRAIN_SHARE = 0.97, 0.40


@dataclass(frozen=True)
class Slo:
    """Targets in milliseconds; 0: not known yet."""

    ttft: float
    tpot: float

    @property
    def is_open(self) -> bool:
        return not (self.ttft or self.tpot)

    @property
    def flags(self) -> list[str]:
        targets = {"--slo-ttft-ms": self.ttft, "--slo-tpot-ms": self.tpot}
        return [word for flag, value in targets.items() if value for word in (flag, f"{value:.2f}")]

    def is_met(self, timing: Timing) -> bool:
        return not (self.ttft and timing.ttft > self.ttft) and not (
            self.tpot and timing.tpot > self.tpot
        )


class Measured:
    """What one group of servers has shown: turns of requests by server and load level (None: the load of --rate)."""

    def __init__(self, names: list[str], is_first: bool, starts: int) -> None:
        """Args:
        starts: how often the servers are started; every start adds as many turns at a level as every other.
        """
        self.names = names
        self.starts = starts
        self.is_first = is_first
        """Plain SGLang's own figures are those of the first group."""
        self.turns: dict[int | None, dict[str, list[list[Timing]]]] = defaultdict(
            lambda: {name: [] for name in names}
        )
        self.shares: dict[int | None, dict[str, list[float]]] = defaultdict(dict)
        self.recorded: dict[int | None, dict[str, list[float]]] = defaultdict(dict)
        self.throughput: dict[str, list[float]] = {name: [] for name in names}
        self.trained: dict[str, Backlog] = {}

    def add(self, name: str, at: int | None, timings: list[Timing]) -> None:
        self.turns[at][name].append(timings)

    def add_share(self, name: str, at: int | None, share: float) -> None:
        self.shares[at].setdefault(name, []).append(share)

    def add_recorded(self, name: str, at: int | None, part: float) -> None:
        """The part of a turn's prompt tokens that was recorded."""
        self.recorded[at].setdefault(name, []).append(part)

    @property
    def levels(self) -> list[int | None]:
        """-1 are the bursts."""
        return [at for at in self.turns if at != -1]


def quantile(turns: Sequence[Sequence[float]], q: float) -> float:
    """Of all requests of the turns."""
    values = sorted(itertools.chain(*turns))
    return values[min(len(values) - 1, int(q * len(values)))]


def resampled(turns: Sequence[T], starts: int) -> list[Sequence[T]]:
    """The turns as measured, then drawn with replacement 200 times, all of a start together if there were several: the
    same for every server.
    """
    draw = random.Random(0)
    if starts == 1:
        return [turns, *(draw.choices(turns, k=len(turns)) for _ in range(200))]
    each = len(turns) // starts
    by_start = [turns[i * each : (i + 1) * each] for i in range(starts)]
    drawn = (draw.choices(by_start, k=starts) for _ in range(200))
    return [turns, *(list(itertools.chain(*some)) for some in drawn)]


def report_saturation(run: Run, rates: Sequence[float]) -> None:
    """Args:
    rates: of every start of plain SGLang, and of every group beside it.
    """
    median = statistics.median(rates)
    row = Row("saturation_rate", median, "requests/s", quartiles(rates), len(rates))
    row.against = "plain SGLang"
    run.add(row)


def report_group(run: Run, found: Measured, slo: Slo, burst: int) -> None:
    for at in found.levels:
        suffix = "" if at is None else f"_at{at}"
        _latencies(run, found, at, suffix)
        _shares(run, found, at, suffix)
        _recorded(run, found, at, suffix)
        if "slo" in found.names and at is not None:
            _met(run, found, at, slo)
    _throughput(run, found, burst)
    if "idle" in found.trained:
        _lease(run, found.trained["idle"])
    if "slo" in found.names:
        for what, target in (("ttft", slo.ttft), ("tpot", slo.tpot)):
            run.add(Row(f"slo_{what}_target_ms", target, "ms", (target, target), 1))


def _latencies(run: Run, found: Measured, at: int | None, suffix: str) -> None:
    for what in ("ttft", "tpot"):
        rounds = {
            name: [[getattr(timing, what) for timing in turn] for turn in turns]
            for name, turns in found.turns[at].items()
        }
        n, starts = len(rounds["plain"]), found.starts
        for label, q in (("p50", 0.5), ("p99", 0.99)):
            base = [quantile(turns, q) for turns in resampled(rounds["plain"], starts)]
            if found.is_first:
                run.add(Row(f"{what}_{label}_plain{suffix}", base[0], "ms", quartiles(base), n))
            for name in found.names[1:]:
                ours = [quantile(turns, q) for turns in resampled(rounds[name], starts)]
                ratios = [mine / its for mine, its in zip(ours, base, strict=True)]
                row = Row(f"{what}_{label}_{name}{suffix}", ratios[0], "x", quartiles(ratios), n)
                row.against, row.less_is_better = "plain SGLang, same run", True
                row.bar = BARS.get(f"{what}_{label}_{name}")
                run.add(row)
        for name in found.names[1:]:
            pairs = [_ratios(*turns) for turns in zip(rounds[name], rounds["plain"], strict=True)]
            if not all(pairs):
                continue
            medians = [quantile(some, 0.5) for some in resampled(pairs, starts)]
            row = Row(f"{what}_pair_{name}{suffix}", medians[0], "x", quartiles(medians), n)
            row.against, row.less_is_better = "plain SGLang, request by request", True
            run.add(row)


def _ratios(ours: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Of requests with one prompt that came at the same moment of a turn; of one token there is no TPOT."""
    return [mine / its for mine, its in zip(ours, plain, strict=True) if its]


def _shares(run: Run, found: Measured, at: int | None, suffix: str) -> None:
    for name, shares in found.shares[at].items():
        value = statistics.fmean(shares)
        row = Row(f"train_share_{name}{suffix}", value, "x", quartiles(shares), len(shares))
        row.against = "the same trainer with nobody to serve, by gates"
        run.add(row)
        if name == "slo" and at == 50:
            half = Row("slo_train_share", value, "x", row.spread, row.n, row.against)
            half.bar = SLO_TRAIN_SHARE
            run.add(half)


def _recorded(run: Run, found: Measured, at: int | None, suffix: str) -> None:
    for name, parts in found.recorded[at].items():
        value, spread = statistics.fmean(parts), quartiles(parts)
        run.add(Row(f"recorded_{name}{suffix}", value, "x", spread, len(parts), "prompt tokens"))


def _met(run: Run, found: Measured, at: int, slo: Slo) -> None:
    """The part of each server's requests that met both targets; of plain SGLang and the others to compare with."""
    for name, turns in found.turns[at].items():
        parts = [_mean(slo.is_met, drawn) for drawn in resampled(turns, found.starts)]
        label = f"slo_met_at{at}" if name == "slo" else f"slo_met_{name}_at{at}"
        n = sum(len(turn) for turn in turns)
        row = Row(label, parts[0], "x", quartiles(parts), n, "requests within both targets")
        row.bar = SLO_MET if name == "slo" else None
        run.add(row)
        if name == "slo" and at == 50:
            run.add(Row("slo_met", parts[0], "x", row.spread, n, row.against, SLO_MET))


def _mean(is_met: Callable[[Timing], bool], turns: Sequence[Sequence[Timing]]) -> float:
    return statistics.fmean(is_met(timing) for timing in itertools.chain(*turns))


def _throughput(run: Run, found: Measured, burst: int) -> None:
    for name, values in found.throughput.items():
        if values and (found.is_first or name != "plain"):
            value = statistics.median(values)
            row = Row(
                f"output_throughput_{name}", value, "tokens/s", quartiles(values), len(values)
            )
            row.against = f"{burst} requests at once"
            run.add(row)


def _lease(run: Run, idle: Backlog) -> None:
    lease = idle.status()["lease"]
    acks = lease["revocations"]
    for label in ("p50", "p99", "max"):
        value = lease[f"revoke_{label}_ms"]
        if value is not None:
            run.add(Row(f"revoke_{label}_ms", value, "ms", (value, value), acks))
    missed = float(lease["revocations_missed"])
    run.add(Row("revocations_missed", missed, "times", (missed, missed), 1))
    longest = lease["longest_stretch_ms"]
    run.add(Row("longest_stretch_ms", longest, "ms", (longest, longest), acks))
    speed = idle.tokens_per_s
    run.add(Row("train_tokens_dedicated", speed, "tokens/s", (speed, speed), 1))
