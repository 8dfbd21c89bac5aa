"""Part `preempt`: what training costs serving, and what serving costs training: an 8B model, 4k-token rows.

Servers that are up together are measured in turn with SGLang's own benchmark client; the trainers of the others are
paused meanwhile. Where the GPU has less than 100 GiB, `idle` and `slo` follow each other, each beside plain SGLang.

    plain   SGLang with the same flags, nothing of ours and no LoRA
    idle    Alchemist, a backlog of votes, lease policy idle
    slo     the same, policy slo with targets of 500 ms and 45 ms
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from gpu_part import Part
from gpu_rows import POLICIES, SPECS
from gpu_servers import Flags, Server, running, total_gib
from serving_load import Load, Timing
from serving_servers import Backlog

SLO = ("--lease-policy", "slo", "--slo-ttft-ms", "500", "--slo-tpot-ms", "45")
TPOT_TARGET_MS = 45.0
AGAINST = "plain SGLang, eager prefill as ours, same run"


class Sizes(NamedTuple):
    slots: int
    trained_prompt: int
    """tokens of the completions that are trained, 24 more are their answers"""
    votes: int
    """waiting when a turn begins"""
    alone_steps: int
    """by which the dedicated training rate is measured"""
    input_len: int
    output_len: int
    rounds: int
    requests: int
    """in a turn at 5 requests a second"""
    light_requests: int
    """in a turn at one request a second"""
    burst: int


SIZES = {
    False: Sizes(60_000, 4072, 200, 3, 1024, 128, 2, 30, 8, 32),
    True: Sizes(8192, 200, 60, 1, 64, 8, 1, 6, 3, 4),
}


class PreemptBench:
    """Plain SGLang and servers that train, and what requests to them have taken."""

    def __init__(
        self, part: Part, load: Load, plain: Server, servers: Sequence[Server], is_first: bool
    ) -> None:
        """Args:
        servers: named by their policy.
        is_first: the trainer's speed alone is this group's.
        """
        self._part, self._sizes, self._load = part, SIZES[part.tiny], load
        self.servers = [plain, *servers]
        self._is_first = is_first
        self._of = {server.name: server for server in servers}
        self._turns: dict[str, list[list[Timing]]] = defaultdict(list)
        self._shares: dict[str, list[float]] = defaultdict(list)
        self._throughput: dict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        part = self._part
        rows = rows_of(list(self._of))
        alone = ["train_tokens_dedicated"] if self._is_first else []
        part.attempt("training alone", self._alone, alone, 10)
        for server in self.servers:
            self._load.run(server.url, 4, math.inf, seed=0)
        bursts = [name for name in rows if name.startswith("output_throughput")]
        light = [name for name in rows if name == "train_share_light"]
        rest = [name for name in rows if name not in (*bursts, *light, *alone)]
        part.attempt("5 requests a second", self._rounds, rest, 30)
        part.attempt("bursts", self._bursts, bursts, 15)
        part.attempt("1 request a second", self._light, light, 15)

    def _alone(self) -> None:
        sizes = self._sizes
        for name, server in self._of.items():
            server.backlog = Backlog(server, prompt=sizes.trained_prompt, votes=sizes.votes)
            server.backlog.measure_alone(sizes.alone_steps)
            self._part.config[f"alone_{name}"] = {
                "gates_per_s": server.backlog.gates_per_s,
                "tokens_per_s": server.backlog.tokens_per_s,
                "last_step": server.backlog.status()["last_step"],
            }
        if self._is_first:
            self._part.add(
                "train_tokens_dedicated",
                [self._backlog(name).tokens_per_s for name in self._of],
                against=f"4 completions of {sizes.trained_prompt + 24} tokens a step, sft",
            )

    def _backlog(self, name: str) -> Backlog:
        backlog = self._of[name].backlog
        if backlog is None:
            raise RuntimeError(
                f"server {name} has no backlog of votes: see the row of training alone"
            )
        return backlog

    def _turn(
        self, server: Server, requests: int, rate: float, seed: int
    ) -> tuple[list[Timing], float]:
        """Timings, and the part of its dedicated rate that the server's trainer kept meanwhile; 0 of plain's."""
        backlog = server.backlog
        if backlog is not None:
            backlog.start()
        gates, started = backlog.gates if backlog else 0, time.monotonic()
        timings = self._load.run(server.url, requests, rate, seed)
        seconds = time.monotonic() - started
        if backlog is None:
            return timings, 0.0
        share = (backlog.gates - gates) / seconds / backlog.gates_per_s
        backlog.stop()
        return timings, share

    def _rounds(self) -> None:
        for name in self._of:
            self._backlog(name)
        for r in range(self._sizes.rounds):
            for i in range(len(self.servers)):
                server = self.servers[(i + r) % len(self.servers)]
                timings, share = self._turn(server, self._sizes.requests, 5.0, seed=r)
                self._turns[server.name].append(timings)
                self._shares[server.name].append(share)
        quantiles = (("p50", 0.5), ("p99", 0.99))
        for what, (label, q) in itertools.product(("ttft", "tpot"), quantiles):
            for name, turns in self._turns.items():
                self._config("ms", f"{what} {name} {label}", _quantile(turns, what, q))
            for policy in self._of:
                self._latency(policy, what, label, q)
        for policy in self._of:
            self._config("shares", policy, self._shares[policy])
            self._config("lease", policy, self._of[policy].status()["lease"])
        if "slo" in self._of:
            self._slo()
        if "idle" in self._of:
            self._revocations()

    def _config(self, field: str, key: str, value: object) -> None:
        self._part.config.setdefault(field, {})[key] = value

    def _slo(self) -> None:
        shares, turns = self._shares["slo"], self._turns["slo"]
        self._part.add("train_share_5rps", shares, against="layers with nobody to serve")
        met = [timing.tpot <= TPOT_TARGET_MS for timing in itertools.chain(*turns)]
        self._part.add("tpot_45ms_met_5rps", statistics.fmean(met), n=len(met))

    def _revocations(self) -> None:
        lease = self._of["idle"].status()["lease"]
        if not lease["revocations"]:
            raise RuntimeError("no revocation met a working trainer")
        for label in ("p99", "p50"):
            value = lease[f"revoke_{label}_ms"]
            self._part.add(f"revoke_{label}_ms", value, n=lease["revocations"])

    def _latency(self, policy: str, what: str, label: str, q: float) -> None:
        """Ours ÷ plain over all requests; quartiles are those of the rounds."""
        ours, plain = self._turns[policy], self._turns["plain"]
        rounds = [
            _quantile([mine], what, q) / _quantile([theirs], what, q)
            for mine, theirs in zip(ours, plain, strict=True)
        ]
        value = _quantile(ours, what, q) / _quantile(plain, what, q)
        n = sum(len(turn) for turn in ours)
        self._part.add(f"{what}_{label}_{policy}", rounds, value=value, n=n, against=AGAINST)

    def _bursts(self) -> None:
        for r in range(self._sizes.rounds):
            for i in range(len(self.servers)):
                server = self.servers[(i + r) % len(self.servers)]
                if server.backlog is not None:
                    server.backlog.start()
                started = time.monotonic()
                self._load.run(server.url, self._sizes.burst, math.inf, seed=1000 + r)
                tokens = self._sizes.burst * self._sizes.output_len
                self._throughput[server.name].append(tokens / (time.monotonic() - started))
                if server.backlog is not None:
                    server.backlog.stop()
        for name, speeds in self._throughput.items():
            self._config("output_tokens_per_s", name, speeds)
        for policy in self._of:
            pairs = zip(self._throughput[policy], self._throughput["plain"], strict=True)
            quotients = [ours / plain for ours, plain in pairs]
            against = f"{AGAINST}, {self._sizes.burst} requests at once"
            self._part.add(f"output_throughput_{policy}", quotients, against=against)

    def _light(self) -> None:
        for policy, server in self._of.items():
            self._backlog(policy)
            _, share = self._turn(server, self._sizes.light_requests, 1.0, seed=2000)
            self._config("light_shares", policy, share)
            if policy == "slo":
                self._part.add("train_share_light", share, n=self._sizes.light_requests)


def rows_of(policies: Sequence[str]) -> list[str]:
    """Rows that servers of these policies give."""
    own = {"idle": ["revoke_p99_ms", "revoke_p50_ms", "train_tokens_dedicated"]}
    own["slo"] = ["train_share_light", "train_share_5rps", "tpot_45ms_met_5rps"]
    every = [spec.name for spec in SPECS if spec.part == "preempt"]
    return [
        name
        for name in every
        for policy in policies
        if name in own[policy] or name.endswith(f"_{policy}")
    ]


def _quantile(turns: Sequence[Sequence[Timing]], what: str, q: float) -> float:
    values = sorted(getattr(timing, what) for timing in itertools.chain(*turns))
    return float(values[min(len(values) - 1, int(q * len(values)))])


def measure(part: Part) -> None:
    sizes, folder = SIZES[part.tiny], part.options.folder
    flags = Flags.of(part, sizes.slots)
    ours = ("--activation-host-gb", "64MiB" if part.tiny else "8GiB")
    has_room = part.device == "cpu" or total_gib() >= 100
    groups = [POLICIES] if has_room else [(policy,) for policy in POLICIES]
    part.config |= {"sizes": sizes._asdict(), "slo": SLO, "groups": groups}

    def start(policy: str) -> Server:
        flags_of = SLO if policy == "slo" else ("--lease-policy", policy)
        return Server.alchemist(policy, flags, folder, *ours, *flags_of)

    plain = Server.plain(flags, folder)
    up = [start(policy) for policy in groups[0]]
    # Slow to import: while the servers start.
    load = Load(str(flags.model), sizes.input_len, sizes.output_len)
    with running(part, [plain]):
        for i, group in enumerate(groups):
            servers = up if i == 0 else [start(policy) for policy in group]
            with running(part, servers):
                PreemptBench(part, load, plain, servers, is_first=i == 0).run()


def main() -> None:
    part = Part.from_argv("preempt", __doc__ or "")
    part.attempt("servers", lambda: measure(part), part.row_names, 30)


if __name__ == "__main__":
    main()
