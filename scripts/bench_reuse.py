"""How much of what serving recorded is still there when the vote comes, by the budget of the host tier.

    python scripts/bench_reuse.py --trace FILE.jsonl [--budgets 0,0.25,…] [--quick] [--json FILE|-] [--plot FILE.png]

A chat trace is replayed on a server of its own for each budget: conversations of several MT-bench questions, arriving
Poisson, each user with a system prompt of their own, each turn a chat completion of fixed length at temperature 0. A
turn follows the answer before it, a vote its answer, after delays drawn from log-normal distributions cut off at a
longest delay. The trace is the same for every server. Its seconds pass `--speed` times as fast, arrivals, thinking and
delays alike, so as many tokens lie between an answer and its vote as at normal speed; the server's own work does not
shrink with them. Training is on and takes the votes as they come.

    reuse_share_<GiB>    of the prompt tokens of answers that were voted on, the share that still had a row when the
                         vote came: by how much it raises the server's own count of them, so votes go one by one
    trained_share_<GiB>  what the trainer then took from rows, of the tokens it trained: prompts count once if shared,
                         answers count too; less if it comes to a vote late, or later than --max-staleness versions

Only turns while the load is steady are counted: not before the longest delay has passed once, nor so late that their
longest delay would end after the last arrival. Spreads are quartiles of 200 resamplings of the chats.
With `--policies value,lru` every budget is played with each `--activation-eviction`, the first under the names above,
the others with `_<policy>` behind them.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from activation_options import budget_flags, full_status
from bench_common import Row, Run, model_name, progress, quartiles
from chat_trace import Chat, LogNormal, Turn, build, read_questions
from reuse_figure import by_delay, plot
from serving_servers import ALCHEMIST, Target
from serving_targets import finish_training, started

from alchemist.server.main import TINY_MODEL

SYSTEM = "You are a helpful assistant. You are talking to {user}."


class Voted(NamedTuple):
    """An answer and what was left of its prompt when the vote came."""

    user: str
    turn: Turn
    prompt_tokens: int
    recorded_tokens: int


class Player:
    """Plays a trace on one server."""

    def __init__(self, target: Target, speed: float, answer_tokens: int) -> None:
        self._http = httpx.AsyncClient(base_url=target.url, timeout=600)
        self._speed, self._answer_tokens = speed, answer_tokens
        self._voting = asyncio.Lock()
        self._num_held = 0
        self.voted: list[Voted] = []
        self.lateness: list[float] = []
        """seconds of the clock by which a vote waited for those before it"""
        self.latencies: list[float] = []
        """seconds of the clock, an answer each"""

    async def play(self, trace: Sequence[Chat]) -> None:
        """Raises httpx.HTTPError when the server refuses anything."""
        async with self._http, asyncio.TaskGroup() as group:
            for chat in trace:
                group.create_task(self._chat(chat, group))

    async def _chat(self, chat: Chat, group: asyncio.TaskGroup) -> None:
        messages = [{"role": "system", "content": SYSTEM.format(user=chat.user)}]
        await asyncio.sleep(chat.start_s / self._speed)
        for turn in chat.turns:
            await asyncio.sleep(turn.think_s / self._speed)
            messages.append({"role": "user", "content": turn.text})
            asked = time.monotonic()
            answer = await self._http.post(
                "/v1/chat/completions",
                json={
                    "model": "default",
                    "messages": messages,
                    "max_tokens": self._answer_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                },
            )
            found = answer.raise_for_status().json()
            self.latencies.append(time.monotonic() - asked)
            text = found["choices"][0]["message"]["content"] or ""
            messages.append({"role": "assistant", "content": text})
            if turn.rating is not None:
                group.create_task(self._vote(chat.user, turn, found))

    async def _vote(self, user: str, turn: Turn, found: dict[str, Any]) -> None:
        """Args:
        found: the answer, as the chat API gave it.
        """
        await asyncio.sleep(turn.delay_s / self._speed)
        due = time.monotonic()
        vote = {"completion_id": found["id"], "rating": turn.rating, "user": user}
        async with self._voting:
            self.lateness.append(time.monotonic() - due)
            (await self._http.post("/v1/feedback", json=vote)).raise_for_status()
            before, self._num_held = self._num_held, await self._held()
            recorded = self._num_held - before
        self.voted.append(Voted(user, turn, found["usage"]["prompt_tokens"], recorded))

    async def _held(self) -> int:
        """Prompt tokens, of all answers voted on so far, that had a row then."""
        while True:
            status = (await self._http.get("/v1/training")).raise_for_status().json()
            # Empty while the scheduler is in a long batch.
            if status["activations"]:
                return int(status["activations"]["tokens_voted_held"])


def steady(voted: Iterable[Voted], load_s: float, longest_s: float) -> list[Voted]:
    """Those on turns that came, by plan, while the load was steady: the same of every server, whatever their delays.

    Args:
        load_s: when the last chat began.
    """
    return [v for v in voted if longest_s <= v.turn.planned_s <= load_s - longest_s]


def share(voted: Iterable[Voted]) -> float:
    """Of all prompt tokens."""
    prompt, recorded = 0, 0
    for vote in voted:
        prompt += vote.prompt_tokens
        recorded += vote.recorded_tokens
    return recorded / prompt


def share_row(name: str, voted: Sequence[Voted]) -> Row:
    chats: dict[str, list[Voted]] = {}
    for vote in voted:
        chats.setdefault(vote.user, []).append(vote)
    rng = random.Random(0)
    drawn = [
        share(vote for chat in rng.choices(list(chats.values()), k=len(chats)) for vote in chat)
        for _ in range(200)
    ]
    return Row(name, share(voted), "x", quartiles(drawn), len(voted), against="prompt tokens")


def row_name(what: str, budget: float, policy: str | None, is_first: bool) -> str:
    return f"{what}_{budget:g}" + ("" if is_first else f"_{policy}")


def main() -> None:
    options = parse()
    think = LogNormal(options.think_median, options.think_sigma, options.think_longest)
    delay = LogNormal(options.delay_median, options.delay_sigma, options.delay_longest)
    length_s = 2 * delay.longest + 60 * options.minutes
    try:
        questions = read_questions(options.trace)
    except (OSError, ValueError) as error:
        sys.exit(f"--trace: {error}")
    trace = build(
        questions,
        length_s=length_s,
        chats_per_minute=options.chats_per_minute,
        questions_per_chat=options.questions_per_chat,
        think=think,
        delay=delay,
        vote_share=options.vote_share,
        seed=options.seed,
    )
    # The prompts are nobody's business, nor is where they lie.
    figure, options.plot, options.trace = options.plot, None, options.trace.name
    run = Run("reuse", options)
    run.config = {
        "model": model_name(options.model),
        "think": think._asdict(),
        "delay": delay._asdict(),
        "chats": len(trace),
        "servers": {},
    }
    results: dict[tuple[str, float], list[Voted]] = {}
    policies = options.policies or [None]
    with tempfile.TemporaryDirectory(prefix="bench-reuse-") as name:
        for policy in policies:
            for budget in progress(options.budgets, f"budgets {policy or ''}"):
                folder = Path(name, f"{policy}-{budget:g}")
                folder.mkdir()
                is_first = policy == policies[0]
                played = measure(run, options, trace, folder, budget, policy, is_first)
                results[policy or "", budget] = played
    if figure:
        plot(
            {
                policy or "": [
                    (b, share(results[policy or "", b]), results[policy or "", b])
                    for b in options.budgets
                ]
                for policy in policies
            },
            delay,
            figure,
        )
    run.finish()


def measure(
    run: Run,
    options: argparse.Namespace,
    trace: list[Chat],
    folder: Path,
    budget: float,
    policy: str | None,
    is_first: bool,
) -> list[Voted]:
    """One server, one play; adds its rows."""
    args = ["--model-path", options.model, "--data-dir", str(folder / "data")]
    args += budget_flags(budget, options.activation_device_fraction)
    args += ["--activation-eviction", policy] if policy else []
    with started("alchemist", ALCHEMIST, [*args, *options.server_args.split()], folder) as target:
        target.wait_ready()
        player = Player(target, options.speed, options.answer_tokens)
        asyncio.run(player.play(trace))
        finish_training(target)
        status = full_status(target.http)
    voted = steady(player.voted, trace[-1].start_s, options.delay_longest)
    if not voted:
        sys.exit(
            "no vote on an answer of the steady part of the trace; more --minutes or chats are needed"
        )
    run.add(share_row(row_name("reuse_share", budget, policy, is_first), voted))
    reused, recomputed = status["tokens_reused"], status["tokens_recomputed"]
    trained = reused / max(1, reused + recomputed)
    name = row_name("trained_share", budget, policy, is_first)
    run.add(Row(name, trained, "x", (trained, trained), status["trained"], "tokens trained"))
    run.config["servers"][row_name("server", budget, policy, is_first)] = {
        "args": args[4:],
        "steps": status["step"],
        "trained": status["trained"],
        "failed": status["failed"],
        "activations": status["activations"],
        "answer_latency_s": statistics.median(player.latencies),
        "vote_lateness_s": statistics.median(player.lateness),
        "prompt_tokens_per_answer": sum(v.prompt_tokens for v in voted) / len(voted),
        "by_delay": by_delay(voted),
    }
    return voted


def parse() -> argparse.Namespace:
    parser = Run.parser(__doc__)
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE.jsonl", help="questions")
    parser.add_argument("--model", default=str(TINY_MODEL), help="directory (default: embedded)")
    parser.add_argument(
        "--budgets", type=numbers, default=None, metavar="GiB,…", help="of the host tier"
    )
    parser.add_argument(
        "--policies", type=lambda text: text.split(","), default=None, metavar="NAME,…"
    )
    parser.add_argument("--activation-device-fraction", type=float, default=1.0)
    parser.add_argument(
        "--minutes", type=float, default=0, help="counted (default: 10; quick: 1.5)"
    )
    parser.add_argument("--chats-per-minute", type=float, default=4)
    parser.add_argument("--questions-per-chat", type=int, default=2)
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--vote-share", type=float, default=1.0, help="of answers (default: 1)")
    parser.add_argument("--think-median", type=float, default=20, metavar="S")
    parser.add_argument("--think-sigma", type=float, default=0.8)
    parser.add_argument("--think-longest", type=float, default=120, metavar="S")
    parser.add_argument("--delay-median", type=float, default=60, metavar="S")
    parser.add_argument("--delay-sigma", type=float, default=1.5)
    parser.add_argument(
        "--delay-longest", type=float, default=0, metavar="S", help="(default: 600; quick: 60)"
    )
    parser.add_argument("--speed", type=float, default=10, help="trace seconds a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", default="", help="further flags of Alchemist, in one word")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curve")
    options = Run.parse(parser)
    quick = options.quick
    options.budgets = options.budgets or ([0, 0.25] if quick else [0, 0.125, 0.25, 0.5, 1, 2])
    options.minutes = options.minutes or (1.5 if quick else 10)
    options.delay_longest = options.delay_longest or (60 if quick else 600)
    return options


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
