"""Part `preempt`: what training costs serving, and what serving costs training: an 8B model, 4k-token rows.

Servers that are up together are measured in turn with SGLang's own benchmark client; the trainers of the others are
paused meanwhile. Where the GPU has less than 100 GiB, `idle` and `slo` follow each other, each beside plain SGLang.

    plain    SGLang with the same flags, nothing of ours and no LoRA
    idle     Alchemist, a backlog of votes, lease policy idle
    slo      the same, policy slo with targets of 500 ms and 45 ms
    paused   idle's server with its trainer paused: a live adapter, nothing trained

Rows with bars come first, and from a first round: what time is left for then is a second round, and only that.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import httpx
from gpu_part import Part
from gpu_rows import POLICIES, SPECS
from gpu_servers import Flags, Server, host_room, running, total_gib
from serving_load import Load, Timing
from serving_servers import Backlog

SLO = ("--lease-policy", "slo", "--slo-ttft-ms", "500", "--slo-tpot-ms", "45")
TPOT_TARGET_MS = 45.0
AGAINST = "plain SGLang, eager prefill as ours, same run"
PAUSED = "paused"
OTHER_PROMPTS = 500
"""Added to a seed: the server has answered the prompts of the plain one already."""


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
    """at 5 requests a second"""
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
        self._plain = plain
        self._is_first = is_first
        self._of = {server.name: server for server in servers}
        self._turns: dict[str, list[list[Timing]]] = defaultdict(list)
        self._shares: dict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        part, rounds = self._part, self._sizes.rounds
        self._alone()
        for server in (self._plain, *self._of.values()):
            self._load.run(server.url, 4, math.inf, seed=0)
        rows = rows_of(list(self._of))
        bursts = [name for name in rows if name.startswith("output_throughput")]
        light = [name for name in rows if name == "train_share_light"]
        rest = [name for name in rows if name not in (*bursts, *light)]
        part.attempt("5 requests a second", lambda: self._round(0), rest, 30)
        part.attempt("1 request a second", self._light, light, 12)
        part.attempt("a burst", self._burst, bursts, 10)
        for r in range(1, rounds):
            what = f"5 requests a second, round {r + 1} of {rounds}"
            part.attempt(what, lambda r=r: self._round(r), [], 35)

    def _alone(self) -> None:
        """Every trainer's speed with nobody to serve. A server whose trainer has none is left out from here on."""
        part = self._part
        for name, server in list(self._of.items()):
            what = f"training alone under {name}"
            why = part.attempt(what, lambda s=server: self._train_alone(s), [], 10)
            if why:
                del self._of[name]
                part.give_up(rows_of([name]), why)
                with contextlib.suppress(httpx.HTTPError):
                    server.http.post("/v1/training/pause")
        if self._is_first and self._of:
            part.add(
                "train_tokens_dedicated",
                [_backlog(server).tokens_per_s for server in self._of.values()],
                against=f"4 completions of {self._sizes.trained_prompt + 24} tokens a step, sft",
            )

    def _train_alone(self, server: Server) -> None:
        sizes = self._sizes
        backlog = Backlog(server, prompt=sizes.trained_prompt, votes=sizes.votes)
        backlog.measure_alone(sizes.alone_steps)
        server.backlog = backlog
        self._part.config[f"alone_{server.name}"] = {
            "gates_per_s": backlog.gates_per_s,
            "tokens_per_s": backlog.tokens_per_s,
            "last_step": backlog.status()["last_step"],
        }

    def _turn(
        self, server: Server, requests: int, rate: float, seed: int, *, is_training: bool
    ) -> tuple[list[Timing], float]:
        """Timings, and the part of its dedicated rate that the server's trainer kept meanwhile; 0 of one that does not
        train.
        """
        if not is_training:
            return self._load.run(server.url, requests, rate, seed), 0.0
        backlog = _backlog(server)
        backlog.start()
        gates, started = backlog.gates, time.monotonic()
        timings = self._load.run(server.url, requests, rate, seed)
        share = (backlog.gates - gates) / (time.monotonic() - started) / backlog.gates_per_s
        backlog.stop()
        return timings, share

    def _round(self, r: int) -> None:
        """A turn of each, and the rows from all turns so far."""
        turns: list[tuple[str, Server, bool]] = [("plain", self._plain, False)]
        turns += [(name, server, True) for name, server in self._of.items()]
        if "idle" in self._of:
            turns.append((PAUSED, self._of["idle"], False))
        found = {}
        for i in range(len(turns)):
            name, server, is_training = turns[(i + r) % len(turns)]
            seed = r + (OTHER_PROMPTS if name == PAUSED else 0)
            requests = self._sizes.requests
            found[name] = self._turn(server, requests, 5.0, seed, is_training=is_training)
        # All or none: rows compare them by the round.
        for name, (timings, share) in found.items():
            self._turns[name].append(timings)
            if name in self._of:
                self._shares[name].append(share)
        self._note("5 requests a second")
        quantiles = (("p50", 0.5), ("p99", 0.99))
        for what, (label, q) in itertools.product(("ttft", "tpot"), quantiles):
            for name, of in self._turns.items():
                self._config("ms", f"{what} {name} {label}", _quantile(of, what, q))
                if name != "plain":
                    self._latency(name, what, label, q)
        for policy, shares in self._shares.items():
            self._config("shares", policy, shares)
        if "slo" in self._of:
            self._slo()
        if "idle" in self._of:
            self._revocations()

    def _config(self, field: str, key: str, value: object) -> None:
        self._part.config.setdefault(field, {})[key] = value

    def _note(self, when: str) -> None:
        """Lease and phases, by which to find out why a bar is missed."""
        for policy, server in self._of.items():
            status = server.status()
            kept = {key: status[key] for key in ("lease", "last_step", "last_error", "activations")}
            self._config("status", f"{policy}, {when}", kept)

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

    def _latency(self, name: str, what: str, label: str, q: float) -> None:
        """Ours ÷ plain over all requests; quartiles are those of the rounds."""
        ours, plain = self._turns[name], self._turns["plain"]
        rounds = [
            _quantile([mine], what, q) / _quantile([theirs], what, q)
            for mine, theirs in zip(ours, plain, strict=True)
        ]
        value = _quantile(ours, what, q) / _quantile(plain, what, q)
        n = sum(len(turn) for turn in ours)
        self._part.add(f"{what}_{label}_{name}", rounds, value=value, n=n, against=AGAINST)

    def _burst(self) -> None:
        sizes, throughput = self._sizes, {}
        for server in (self._plain, *self._of.values()):
            if server.backlog is not None:
                server.backlog.start()
            started = time.monotonic()
            self._load.run(server.url, sizes.burst, math.inf, seed=1000)
            seconds = time.monotonic() - started
            throughput[server.name] = sizes.burst * sizes.output_len / seconds
            if server.backlog is not None:
                server.backlog.stop()
            self._config("output_tokens_per_s", server.name, throughput[server.name])
        for policy in self._of:
            quotient = throughput[policy] / throughput["plain"]
            against = f"{AGAINST}, {sizes.burst} requests at once"
            self._part.add(f"output_throughput_{policy}", quotient, against=against)

    def _light(self) -> None:
        if "slo" not in self._of:
            return
        server, requests = self._of["slo"], self._sizes.light_requests
        _, share = self._turn(server, requests, 1.0, seed=2000, is_training=True)
        self._note("1 request a second")
        self._part.add("train_share_light", share, n=requests)


def rows_of(policies: Sequence[str]) -> list[str]:
    """Rows that servers of these policies give."""
    own = {"idle": ["revoke_p99_ms", "revoke_p50_ms", "train_tokens_dedicated"]}
    own["idle"] += [spec.name for spec in SPECS if spec.name.endswith(f"_{PAUSED}")]
    own["slo"] = ["train_share_light", "train_share_5rps", "tpot_45ms_met_5rps"]
    every = [spec.name for spec in SPECS if spec.part == "preempt"]
    return [
        name
        for name in every
        for policy in policies
        if name in own[policy] or name.endswith(f"_{policy}")
    ]


def _backlog(server: Server) -> Backlog:
    assert server.backlog is not None
    return server.backlog


def _quantile(turns: Sequence[Sequence[Timing]], what: str, q: float) -> float:
    values = sorted(getattr(timing, what) for timing in itertools.chain(*turns))
    return float(values[min(len(values) - 1, int(q * len(values)))])


def measure(part: Part) -> None:
    sizes, folder = SIZES[part.tiny], part.options.folder
    flags = Flags.of(part, sizes.slots)
    ours = ("--activation-host-gb", host_room(part))
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
