"""A chat trace: who says what when, and when each answer is voted on. Made of questions, distributions and a seed.

All seconds are of the trace; a player may let them pass faster. A turn comes `think_s` after the answer before it, a
vote `delay_s` after its own answer, both drawn from log-normal distributions.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import NamedTuple


class LogNormal(NamedTuple):
    """A log-normal distribution of seconds, cut off at `longest`."""

    median: float
    sigma: float
    """standard deviation of the logarithm"""
    longest: float

    def draw(self, rng: random.Random) -> float:
        while True:
            value = self.median * math.exp(self.sigma * rng.gauss(0, 1))
            if value <= self.longest:
                return value


class Turn(NamedTuple):
    text: str
    think_s: float
    """after the answer before it; 0 of a first turn"""
    planned_s: float
    """when it would come if answers took no time"""
    delay_s: float
    """between its answer and the vote on it"""
    rating: str | None
    """up or down; None: nobody votes on it"""


class Chat(NamedTuple):
    user: str
    start_s: float
    turns: tuple[Turn, ...]


def read_questions(path: Path) -> list[list[str]]:
    """Turns of each question of a JSONL file in the form of MT-bench: one object a line, with a list `turns`.

    Raises:
        ValueError: a line is not of that form; names file and line.
    """
    out = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            turns = json.loads(line)["turns"]
            is_right = bool(turns) and all(isinstance(turn, str) and turn for turn in turns)
        except (ValueError, KeyError, TypeError):
            is_right = False
        if not is_right:
            raise ValueError(f'{path}:{number}: must be an object with "turns", a list of texts')
        out.append(turns)
    if not out:
        raise ValueError(f"{path}: holds no question")
    return out


def build(
    questions: list[list[str]],
    *,
    length_s: float,
    chats_per_minute: float,
    questions_per_chat: int,
    think: LogNormal,
    delay: LogNormal,
    vote_share: float,
    seed: int,
) -> list[Chat]:
    """Chats that begin within `length_s`, Poisson; each takes the next questions of an order that is shuffled anew when
    it is used up.
    """
    rng = random.Random(seed)
    order: list[list[str]] = []
    out: list[Chat] = []
    now = rng.expovariate(chats_per_minute / 60)
    while now < length_s:
        texts: list[str] = []
        for _ in range(questions_per_chat):
            if not order:
                order = rng.sample(questions, len(questions))
            texts += order.pop()
        turns, planned_s = [], now
        for text in texts:
            think_s = think.draw(rng) if turns else 0.0
            planned_s += think_s
            rating = rng.choice(("up", "down")) if rng.random() < vote_share else None
            turns.append(Turn(text, think_s, planned_s, delay.draw(rng), rating))
        out.append(Chat(f"user-{len(out)}", now, tuple(turns)))
        now += rng.expovariate(chats_per_minute / 60)
    return out
