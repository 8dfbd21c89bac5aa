"""Whether recording takes anything from serving's memory: the same saturating requests, plain SGLang and Alchemist.

    python scripts/bench_capacity.py [--quick] [--only NAME,…] [--json FILE|-]

Conversations that share a system prompt and grow from turn to turn meet a KV pool too small for them, so requests
queue, running ones are retracted and the radix tree is evicted:

    plain         SGLang with the same flags, nothing of ours and no LoRA
    plain_again   the same server once more, on a flushed cache
    recording     Alchemist recording every prefill

Lengths are fixed, and the history in a prompt is the trace's own, not the server's answers. The first turns of all
conversations are one request of SGLang's batch API, then the second turns, and so on: all of a wave is in the queue
before its first batch, so what is scheduled when does not depend on time and must be the same to the token.
With `--concurrency N` as many clients play whole conversations instead. Then arrivals depend on time: rows are named
`closed_…`, have no bar, and `closed_capacity_plain_again_vs_plain` says by how much plain SGLang differs from itself.

`capacity_vs_plain` is the largest difference of any part, in percent of plain's. Tokens at once, requests at once,
batches and admissions are those of SGLang's log, a line a batch; evictions and retractions are its Prometheus
counters; the hit rate is of the answers' `cached_tokens`.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from activation_options import activation_rows, budget_flags, full_status
from bench_common import Row, Run, model_name, progress
from serving_servers import ALCHEMIST, PLAIN, Target
from serving_targets import started
from sglang_figures import LOG_EVERY_BATCH, batches, metric_sums

from alchemist.server.main import TINY_MODEL

BAR = 0.5
"""Percent."""
PARTS = {
    "max_total_tokens": "tokens",
    "peak_tokens": "tokens",
    "peak_running": "requests",
    "admissions": "requests",
    "prefills": "batches",
    "decodes": "batches",
    "new_tokens": "tokens",
    "evicted_tokens": "tokens",
    "retractions": "requests",
    "hit_rate": "x",
}
FULL = 0.9
"""Share of the pool that must have been in use at once, or the run says nothing."""


class Ask(NamedTuple):
    """One turn: everything said so far, and how long the answer is."""

    input_ids: list[int]
    max_new_tokens: int


class Played(NamedTuple):
    """What one server made of the trace."""

    parts: dict[str, float]
    """keys of `PARTS`"""
    tokens: list[list[int]]
    """of the answers, in the trace's order"""
    recorded_share: float
    """of prompt tokens that had a row when their answer ended; 0 of plain SGLang"""
    status: dict[str, Any]
    """`GET /v1/training`"""


def build_trace(conversations: int, turns: int, seed: int = 0) -> list[list[Ask]]:
    """Conversations of token ids that any model has. All begin with the same 64."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(10, 900) for _ in range(rng.randint(low, high))]

    system = ids(64, 64)
    out = []
    for _ in range(conversations):
        history, asks = list(system), []
        for _ in range(turns):
            history += ids(40, 200)
            answer = ids(32, 128)
            asks.append(Ask(list(history), len(answer)))
            history += answer
        out.append(asks)
    return out


def body(asks: Sequence[Ask]) -> dict[str, Any]:
    """A request of SGLang's batch API."""
    sampling = [
        {"max_new_tokens": ask.max_new_tokens, "temperature": 0, "ignore_eos": True} for ask in asks
    ]
    return {"input_ids": [ask.input_ids for ask in asks], "sampling_params": sampling}


def in_waves(target: Target, trace: list[list[Ask]]) -> list[dict[str, Any]]:
    """Play turn by turn, each turn of all conversations at once; the answers by conversation, then turn."""
    waves = []
    for asks in progress(list(zip(*trace, strict=True)), target.name):
        answer = target.http.post("/generate", json=body(asks), timeout=1800)
        waves.append(answer.raise_for_status().json())
    return [answer for of_conversation in zip(*waves, strict=True) for answer in of_conversation]


def in_closed_loop(
    target: Target, trace: list[list[Ask]], concurrency: int
) -> list[dict[str, Any]]:
    """Play conversation by conversation, `concurrency` at once; the answers as `in_waves` gives them."""

    async def play() -> list[list[dict[str, Any]]]:
        gate = asyncio.Semaphore(concurrency)
        async with httpx.AsyncClient(base_url=target.url, timeout=1800) as http:

            async def converse(asks: list[Ask]) -> list[dict[str, Any]]:
                answers = []
                async with gate:
                    for ask in asks:
                        answer = await http.post("/generate", json=body([ask]))
                        answers += answer.raise_for_status().json()
                return answers

            return await asyncio.gather(*(converse(asks) for asks in trace))

    return [answer for answers in asyncio.run(play()) for answer in answers]


def play(target: Target, trace: list[list[Ask]], concurrency: int) -> Played:
    """On a cache that is empty, whatever the server's own checks left in it."""
    target.http.post("/flush_cache").raise_for_status()
    before = metric_sums(target.http.get("/metrics").text)
    log_bytes = target.log.stat().st_size
    answers = in_closed_loop(target, trace, concurrency) if concurrency else in_waves(target, trace)
    # The last batch's line is written after its answers are sent.
    time.sleep(1)
    counted = metric_sums(target.http.get("/metrics").text)
    seen = batches(target.log.read_bytes()[log_bytes:].decode(errors="replace"))
    metas = [answer["meta_info"] for answer in answers]
    prompt_tokens = sum(meta["prompt_tokens"] for meta in metas)
    parts = {
        "max_total_tokens": float(target.http.get("/server_info").json()["max_total_num_tokens"]),
        **{name: float(value) for name, value in seen._asdict().items() if name in PARTS},
        "evicted_tokens": _risen(counted, before, "sglang:evicted_tokens_total"),
        "retractions": _risen(counted, before, "sglang:num_retracted_requests_total"),
        "hit_rate": sum(meta["cached_tokens"] for meta in metas) / prompt_tokens,
    }
    status, recorded = {}, 0
    if not target.name.startswith("plain"):
        status = full_status(target.http)
        for meta in metas:
            receipt = target.http.get(f"/v1/completions/{meta['id']}/receipt")
            recorded += receipt.raise_for_status().json()["recorded_tokens"]
    tokens = [answer["output_ids"] for answer in answers]
    return Played({n: parts[n] for n in PARTS}, tokens, recorded / prompt_tokens, status)


def _risen(after: Mapping[str, float], before: Mapping[str, float], name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def difference(ours: float, plain: float) -> float:
    """In percent of plain's; of one where plain's is nothing."""
    return 100 * abs(ours - plain) / (abs(plain) or 1.0)


def rows(played: Mapping[str, Played], *, is_closed: bool = False) -> list[Row]:
    """Args:
    played: server → what it made of the trace; "plain" first.
    is_closed: it was played in a closed loop.
    """

    def row(name: str, value: float, unit: str, against: str | None = None, n: int = 1) -> Row:
        prefix = "closed_" if is_closed else ""
        return Row(prefix + name, value, unit, (value, value), n, against)

    plain = played["plain"]
    out = []
    for name, found in played.items():
        out += [row(f"{part}_{name}", found.parts[part], unit) for part, unit in PARTS.items()]
        if name == "plain":
            continue
        is_ours = name == "recording"
        apart = {part: difference(found.parts[part], plain.parts[part]) for part in PARTS}
        worst = max(apart, key=lambda part: apart[part])
        what = "capacity_vs_plain" if is_ours else f"capacity_{name}_vs_plain"
        worst_row = row(what, apart[worst], "%", f"plain SGLang, same requests; most: {worst}")
        worst_row.less_is_better = True
        worst_row.bar = BAR if is_ours and not is_closed else None
        differ = sum(a != b for a, b in zip(found.tokens, plain.tokens, strict=True))
        out += [
            worst_row,
            row(f"answers_differ_{name}", differ, "answers", n=len(plain.tokens)),
        ]
        if is_ours:
            out.append(row("recorded_share", found.recorded_share, "x", n=len(found.tokens)))
            out += activation_rows(found.status)
    return out


def require_saturated(plain: Played) -> None:
    """Exits if the trace did not fill the pool: then equal figures would say nothing."""
    share = plain.parts["peak_tokens"] / plain.parts["max_total_tokens"]
    if share < FULL or not plain.parts["evicted_tokens"]:
        sys.exit(
            f"gate: at most {share:.0%} of the pool was in use and {plain.parts['evicted_tokens']:g} tokens were "
            f"evicted; wanted: {FULL:.0%} and some (a smaller --max-total-tokens, more --conversations)"
        )


def main() -> None:
    parser = Run.parser(__doc__)
    parser.add_argument("--model", default=str(TINY_MODEL), help="directory (default: embedded)")
    parser.add_argument(
        "--max-total-tokens", type=int, default=4096, help="size of the KV pool (default: 4096)"
    )
    parser.add_argument(
        "--conversations", type=int, default=0, help="(default: 48; quick: 16)", metavar="N"
    )
    parser.add_argument("--turns", type=int, default=3, help="of each (default: 3)")
    parser.add_argument(
        "--concurrency", type=int, default=0, help="0: in waves; else a closed loop of so many"
    )
    parser.add_argument(
        "--activation-host-gb", type=float, default=1.0, help="GiB of the host tier (default: 1)"
    )
    parser.add_argument("--server-args", default="", help="further flags of Alchemist, in one word")
    options = Run.parse(parser)
    options.conversations = options.conversations or (16 if options.quick else 48)
    trace = build_trace(options.conversations, options.turns)
    run = Run("capacity", options)
    run.config = {"model": model_name(options.model)}
    both = ["--model-path", options.model, "--max-total-tokens", str(options.max_total_tokens)]
    # Admit eagerly, so that some must be retracted.
    both += ["--schedule-conservativeness", "0.1", *LOG_EVERY_BATCH]
    with tempfile.TemporaryDirectory(prefix="bench-capacity-") as name:
        folder = Path(name)
        ours = ["--data-dir", str(folder / "data"), *budget_flags(options.activation_host_gb)]
        ours += options.server_args.split()
        with (
            started("plain", PLAIN, both, folder) as plain,
            started("recording", ALCHEMIST, [*both, *ours], folder) as recording,
        ):
            for target in progress([plain, recording], "starting servers"):
                target.wait_ready()
            played = {"plain": play(plain, trace, options.concurrency)}
            require_saturated(played["plain"])
            played["plain_again"] = play(plain, trace, options.concurrency)
            played["recording"] = play(recording, trace, options.concurrency)
    if not played["recording"].recorded_share:
        sys.exit("gate: nothing was recorded, so equal figures would say nothing")
    for row in rows(played, is_closed=options.concurrency > 0):
        run.add(row)
    run.finish()


if __name__ == "__main__":
    main()
