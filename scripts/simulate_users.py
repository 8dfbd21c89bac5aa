"""Simulated users chat with a running server and vote by a rule; watch the answers change.

    python scripts/simulate_users.py --prefer cheerful
    python scripts/simulate_users.py --max-length 40 --votes 200 --plot docs/learning.png

The rule is what all of `--prefer`, `--keyword` and `--max-length` that are given say; an answer
that keeps it gets a thumbs-up, any other a thumbs-down, save for `--noise`. A fixed set of questions
is asked before the first vote and after the last step: preferred rate at temperature 1, correctness
at 0.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from chat_client import Answer, ChatClient
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tiny_corpus import (
    ARITHMETIC,
    INTENTS,
    STYLES,
    Question,
    is_correct,
    right_answers,
    sample_question,
    style_of,
)
from users_report import WINDOW, plot, table

KL_ANSWERS_PER_VERSION = 8
KL_ANSWERS_AFTER = 64
"""Answers of the evaluation after the last step whose KL to the base is measured."""
CORRECTION_TRIES = 50
"""Wordings a user thinks of before giving up on a correction that keeps the rule."""
DRAW_BLOCK = 20
"""Votes of which `--noise` and `--corrections` take their share: multiples of a twentieth."""
WAIT_SECONDS = 120
"""How long votes may stay pending before the run gives up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What the users like."""

    prefer: str | None
    """One of `STYLES`."""
    keyword: str | None
    """Must be in the answer, in any case."""
    max_length: int | None
    """Characters."""

    def __post_init__(self) -> None:
        if self.prefer is None and self.keyword is None and self.max_length is None:
            raise ValueError("no rule: give --prefer, --keyword or --max-length")

    def likes(self, text: str) -> bool:
        return (
            (self.prefer is None or style_of(text) == self.prefer)
            and (self.keyword is None or self.keyword.lower() in text.lower())
            and (self.max_length is None or 0 < len(text) <= self.max_length)
        )


@dataclass(slots=True)
class Run:
    """What happened so far; one entry of `votes` per vote, in order."""

    votes: list[dict[str, Any]] = field(default_factory=list)
    kl: dict[str, list[float]] = field(default_factory=dict)
    """Version → log-ratios to the base of the scored answers' tokens, nats."""
    scored: dict[str, int] = field(default_factory=dict)
    """Version → number of answers scored."""
    asked: int = 0
    """Answers asked for, each to be voted on."""
    paired: int = 0
    """Votes given that make preference pairs with others of theirs, or by a correction."""
    status: dict[str, Any] = field(default_factory=dict)
    trained_before: int | None = None
    """Votes the server had trained before the first one of ours."""
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Step → its metrics; one that another replaced between two looks is missing."""

    def see(self, status: dict[str, Any]) -> None:
        """Take in what `GET /v1/training` said."""
        self.status = status
        if self.trained_before is None:
            self.trained_before = status["trained"]
        elif status["last_step"] and status["trained"] > self.trained_before:
            self.steps[status["last_step"]["step"]] = status["last_step"]

    def num_behind(self) -> int:
        """Votes the trainer has still to train. With objective dpo the pending ones without a partner are none."""
        if self.status["objective"] != "dpo":
            return self.status["pending"]
        return self.paired - (self.status["trained"] - (self.trained_before or 0))

    def recent_rate(self) -> float:
        """Share of liked answers among the last `WINDOW`."""
        recent = self.votes[-WINDOW:]
        return sum(v["liked"] for v in recent) / len(recent) if recent else 0.0

    def is_over(self, args: argparse.Namespace) -> bool:
        """All votes are given out, or the users are content: people stop voting when they get what they like."""
        is_content = len(self.votes) >= WINDOW and self.recent_rate() >= args.until
        return is_content or self.asked >= args.votes


async def evaluate(
    client: ChatClient, rule: Rule, args: argparse.Namespace
) -> tuple[dict[str, float], list[Answer]]:
    """Preferred rate, and correctness of arithmetic and of the other checkable intents, 0 to 1; and the
    answers that the first is of.
    """
    rng = random.Random(12345)
    checkable = [i for i in INTENTS if sample_question(rng, i).is_checkable]
    others = [i for i in checkable if i not in ARITHMETIC]
    sets = {
        "preferred": ([sample_question(rng) for _ in range(args.eval_questions)], 1.0),
        "arithmetic": (_spread(rng, ARITHMETIC, args.eval_questions), 0.0),
        "other": (_spread(rng, others, args.eval_questions), 0.0),
    }
    gate = asyncio.Semaphore(args.concurrency)

    async def say(question: Question, temperature: float) -> Answer:
        async with gate:
            return await client.ask(question.text, temperature)

    shares, free = {}, []
    for name, (questions, temperature) in sets.items():
        answers = await asyncio.gather(*(say(q, temperature) for q in questions))
        if name == "preferred":
            free = answers
            hits = [rule.likes(a.text) for a in answers]
        else:
            hits = [is_correct(q.meta, a.text) for q, a in zip(questions, answers, strict=True)]
        shares[name] = sum(hits) / len(hits)
    return shares, free


async def mean_kl(client: ChatClient, answers: list[Answer]) -> float:
    """KL to the base in nats per token, estimated from answers sampled at temperature 1."""
    ratios = [r for answer in answers for r in await client.kl_to_base(answer.completion_id)]
    return sum(ratios) / len(ratios)


def _spread(rng: random.Random, intents: tuple[str, ...] | list[str], count: int) -> list[Question]:
    return [sample_question(rng, intents[i % len(intents)]) for i in range(count)]


async def one_user(client: ChatClient, rule: Rule, args: argparse.Namespace, run: Run) -> None:
    """Ask and vote until the run is over; holds back while the trainer is behind."""
    while not run.is_over(args):
        index, run.asked = run.asked, run.asked + args.answers
        await _until_caught_up(client, args, run)
        seed = args.seed * 1_000_003 + index
        question = sample_question(random.Random(seed))
        votes = []
        for again in range(args.answers):
            answer = await client.ask(question.text, args.temperature)
            is_mistake = is_drawn(args.noise, f"noise {args.seed}", index + again)
            vote = _opinion(rule, question, answer, is_mistake)
            is_written = is_drawn(args.corrections, f"corrections {args.seed}", index + again)
            if is_written and not vote["liked"] and not is_mistake:
                vote["correction"] = _correction(seed, rule)
            await client.vote(answer.completion_id, vote["rating"], vote["correction"])
            votes.append(vote)
            run.votes.append(vote)
            await _score(client, answer, run)
        run.paired += num_paired(votes)


def is_drawn(share: float, seed: str, index: int) -> bool:
    """Whether that vote is one of the share: equally many of every `DRAW_BLOCK`, so that luck does not make runs of
    a few hundred votes differ.
    """
    block, place = divmod(index, DRAW_BLOCK)
    order = random.Random(f"{seed} {block}").sample(range(DRAW_BLOCK), DRAW_BLOCK)
    return order[place] < round(share * DRAW_BLOCK)


def _opinion(rule: Rule, question: Question, answer: Answer, is_mistake: bool) -> dict[str, Any]:
    """An entry of `Run.votes`."""
    liked = rule.likes(answer.text)
    right = is_correct(question.meta, answer.text) if question.is_checkable else None
    return {
        "version": answer.version,
        "liked": liked,
        "rating": "up" if liked != is_mistake else "down",
        "correction": None,
        "arithmetic": right if question.intent in ARITHMETIC else None,
        "other": None if question.intent in ARITHMETIC else right,
        "question": question.text,
        "answer": answer.text,
    }


def _correction(seed: int, rule: Rule) -> str | None:
    """A right answer that keeps the rule to the question of that seed, if the user thinks of one."""
    thoughts = itertools.islice(right_answers(random.Random(seed)), CORRECTION_TRIES)
    return next((text for text in thoughts if rule.likes(text)), None)


def num_paired(votes: list[dict[str, Any]]) -> int:
    """How many votes on one question make preference pairs: corrections, and opposite votes on different answers."""
    alone = [vote for vote in votes if vote["correction"] is None]
    num_corrections = len(votes) - len(alone)
    downs = [vote["answer"] for vote in alone if vote["rating"] == "down"]
    pairs = 0
    for up in (vote["answer"] for vote in alone if vote["rating"] == "up"):
        partner = next((down for down in downs if down != up), None)
        if partner is not None:
            downs.remove(partner)
            pairs += 1
    return num_corrections + 2 * pairs


async def _until_caught_up(client: ChatClient, args: argparse.Namespace, run: Run) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        run.see(await client.training())
        if run.num_behind() <= args.max_pending:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run.num_behind()} votes not trained for {WAIT_SECONDS} s")
        await asyncio.sleep(0.2)


async def _score(client: ChatClient, answer: Answer, run: Run) -> None:
    if run.scored.get(answer.version, 0) < KL_ANSWERS_PER_VERSION:
        run.scored[answer.version] = run.scored.get(answer.version, 0) + 1
        ratios = await client.kl_to_base(answer.completion_id)
        run.kl.setdefault(answer.version, []).extend(ratios)


async def show(progress: Progress, run: Run, total: int) -> None:
    bar = progress.add_task("votes", total=total, version="", liked="", pending="")
    while True:
        progress.update(
            bar,
            completed=len(run.votes),
            version=run.status.get("live_version", "…"),
            liked=f"{100 * run.recent_rate():.0f} %",
            pending=run.status.get("pending", 0),
        )
        await asyncio.sleep(0.2)


async def simulate(
    args: argparse.Namespace,
    rule: Rule,
    console: Console,
    before: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The whole run: evaluate, vote, flush, evaluate. What `--json` writes.

    Args:
    before: the first evaluation, if it is known from an earlier run with the same rule on the same base model.
    """
    started, run = time.monotonic(), Run()
    columns = (
        TextColumn("votes"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("live {task.fields[version]} · preferred {task.fields[liked]}"),
        TextColumn("· pending {task.fields[pending]}"),
        TimeElapsedColumn(),
    )
    async with ChatClient(args.url.rstrip("/"), args.api_key) as client:
        if before is None:
            before, _ = await evaluate(client, rule, args)
        first_vote = time.monotonic()
        with Progress(*columns, console=console) as progress:
            shown = asyncio.create_task(show(progress, run, args.votes))
            users = (one_user(client, rule, args, run) for _ in range(args.concurrency))
            await asyncio.gather(*users)
            status = await client.flush(WAIT_SECONDS)
            trained = time.monotonic()
            run.see(status)
            await asyncio.sleep(0.3)
            shown.cancel()
        after, answers = await evaluate(client, rule, args)
        kl_after = await mean_kl(client, answers[:KL_ANSWERS_AFTER])
    return {
        "rule": {"prefer": rule.prefer, "keyword": rule.keyword, "max_length": rule.max_length},
        "before": before,
        "after": after,
        "seconds_voting": round(trained - first_vote, 1),
        "seconds": round(time.monotonic() - started, 1),
        "training": status,
        "steps": list(run.steps.values()),
        "kl_after": kl_after,
        "kl": {v: sum(r) / len(r) for v, r in run.kl.items() if r},
        "votes": run.votes,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--prefer", choices=STYLES, default=None, help="the style that is liked")
    parser.add_argument("--keyword", default=None, help="liked answers contain it")
    parser.add_argument("--max-length", type=int, default=None, help="characters, at most")
    parser.add_argument("--votes", type=int, default=300)
    parser.add_argument(
        "--until",
        type=float,
        default=0.9,
        help=f"users stop voting when this share of the last {WINDOW} answers is liked (above 1: never)",
    )
    parser.add_argument("--concurrency", type=int, default=4, help="users at once")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the voted answers")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="share of votes the wrong way round"
    )
    parser.add_argument(
        "--answers", type=int, default=1, help="how often each question is asked and voted on"
    )
    parser.add_argument(
        "--corrections",
        type=float,
        default=0.0,
        help="share of disliked answers that are corrected",
    )
    parser.add_argument("--max-pending", type=int, default=32, help="votes; users wait above it")
    parser.add_argument("--eval-questions", type=int, default=120, help="in each of three sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=None, help="write the curve as PNG")
    parser.add_argument("--json", type=Path, default=None, help="write everything that was seen")
    return parser.parse_args(argv)


def main() -> int:
    args, console = parse(sys.argv[1:]), Console()
    try:
        rule = Rule(prefer=args.prefer, keyword=args.keyword, max_length=args.max_length)
        result = asyncio.run(simulate(args, rule, console))
    except (httpx.HTTPError, openai.APIError, TimeoutError, ValueError) as error:
        text = f"{args.url}: {type(error).__name__}: {error}"
        console.print(text, style="red", markup=False)
        return 1
    console.print(table(result))
    before, after = result["before"], result["after"]
    for name in before:
        console.print(f"{name:>10}: {100 * before[name]:5.1f} % → {100 * after[name]:5.1f} %")
    console.print(f"{'KL':>10}: {result['kl_after']:5.3f} nats per token to the base")
    console.print(f"{result['seconds_voting']} s of voting, {result['seconds']} s in all")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
