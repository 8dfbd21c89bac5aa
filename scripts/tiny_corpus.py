"""The corpus of the embedded model: short dialogues over a few dozen intents in four styles.

Also the simulated users' source of questions (`sample_question`) and their judge (`style_of`,
`is_correct`). Everything is drawn from the `random.Random` that the caller passes in.

    python scripts/tiny_corpus.py 20     # print twenty dialogues
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tiny_facts as facts
from tiny_intents import INTENTS, MAX_TERM, NAME_FORMS, greet_by_name
from tiny_styles import STYLES, Reply, render, style_of

__all__ = [
    "ARITHMETIC",
    "INTENTS",
    "MAX_TERM",
    "STYLES",
    "Exchange",
    "Question",
    "dialogue",
    "exchange",
    "is_correct",
    "right_answers",
    "sample_question",
    "style_of",
]

ARITHMETIC = ("add", "subtract", "multiply")


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks. `meta["kind"]` is number, word, sequence (checkable) or chat (not)."""

    text: str
    intent: str
    meta: dict[str, Any]

    @property
    def is_checkable(self) -> bool:
        return self.meta["kind"] != "chat"


@dataclass(frozen=True, slots=True)
class Exchange:
    question: Question
    answer: str
    style: str


def is_correct(meta: dict[str, Any], answer: str) -> bool:
    """Whether `answer` says what `meta` expects, in any style.

    number: the last number in the text is the expected one. word: the expected word is there and
    none of the intent's other answers is. sequence: the expected numbers are exactly the text's.

    Raises:
        ValueError: the question has no single right answer (`meta["kind"]` is chat).
    """
    if meta["kind"] == "chat":
        raise ValueError("a chat question has no checkable answer; see Question.is_checkable")
    numbers = re.findall(r"\d+", answer)
    if meta["kind"] == "number":
        return bool(numbers) and numbers[-1] == meta["answer"]
    if meta["kind"] == "sequence":
        return numbers == meta["answer"].split()
    words = set(re.findall(r"[a-z]+", answer.lower()))
    return meta["answer"].lower() in words and words.isdisjoint(meta["rivals"])


def sample_question(rng: random.Random, intent: str | None = None) -> Question:
    """A question as a simulated user types it; `intent` is a key of `INTENTS`, None: any."""
    return _ask(rng, intent)[0]


def right_answers(rng: random.Random) -> Iterator[str]:
    """Right answers in any style, without end, to what `sample_question` asks given the same `rng`."""
    reply = _ask(rng, None)[1]
    while True:
        yield render(rng, rng.choice(STYLES), reply)


def exchange(rng: random.Random, intent: str | None = None, style: str | None = None) -> Exchange:
    """A question and its right answer; without `style`, each style is equally likely."""
    question, reply = _ask(rng, intent)
    style = style or rng.choice(STYLES)
    return Exchange(question, render(rng, style, reply), style)


def dialogue(rng: random.Random, times: dict[str, float] | None = None) -> list[dict[str, str]]:
    """One training example as chat messages: mostly one exchange, some of 2 to 4, a few long.

    `times` multiplies the usual weight of the intents it names.
    """
    turns = rng.choices((1, rng.randint(2, 4), rng.randint(6, 16)), (80, 18, 2))[0]
    messages = [{"role": "system", "content": _system_prompt(rng)}] if rng.random() < 0.12 else []
    weights = [w * (times or {}).get(name, 1) for name, (w, _) in INTENTS.items()]
    pairs = [exchange(rng, rng.choices(list(INTENTS), weights)[0]) for _ in range(turns)]
    texts = [(pair.question.text, pair.answer) for pair in pairs]
    if turns > 1 and rng.random() < 0.4:
        texts[:0], texts[-1:] = _introduction(rng)
    for question, answer in texts:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _ask(rng: random.Random, intent: str | None) -> tuple[Question, Reply]:
    if intent is None:
        intent = rng.choices(list(INTENTS), [weight for weight, _ in INTENTS.values()])[0]
    draw = INTENTS[intent][1](rng)
    text = _typed(rng, rng.choice(draw.forms.split("|")))
    seen = set(re.findall(r"[a-z]+", text.lower()))
    rivals = {r.lower() for r in draw.rivals} - seen - {draw.answer.lower()}
    meta = {"kind": draw.kind, "answer": draw.answer, "rivals": tuple(sorted(rivals))}
    return Question(text, intent, meta), draw.reply


def _typed(rng: random.Random, text: str) -> str:
    """As people type: sometimes with a lead-in, without the final mark, or all in lower case."""
    roll = rng.random()
    if roll < 0.08:
        text = rng.choice(("Please tell me: ", "Hey, ", "A question: ", "Okay. ")) + text
    elif roll < 0.2:
        text = text.rstrip("?.!")
    elif roll < 0.35:
        text = text.lower()
    elif roll < 0.42:
        text = text.lower().rstrip("?.!")
    return text


def _system_prompt(rng: random.Random) -> str:
    if rng.random() < 0.95:
        return rng.choice(facts.SYSTEM_PROMPTS)
    known = [render(rng, "plain", _ask(rng, None)[1]) for _ in range(rng.randint(5, 25))]
    return " ".join([rng.choice(facts.SYSTEM_PROMPTS), *known])


def _introduction(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The user's name, given in the first exchange and asked for in the last one."""
    name = rng.choice(facts.NAMES)
    given = render(rng, rng.choice(STYLES), greet_by_name(name))
    ask = rng.choice(("What is my name?", "Do you remember my name?", "Who am I?"))
    told = Reply(terse=(name,), plain=(f"Your name is {name}", f"You are {name}"))
    opening = (rng.choice(NAME_FORMS).format(name), given)
    return [opening], [(ask, render(rng, rng.choice(STYLES), told))]


if __name__ == "__main__":
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 10):
        for message in dialogue(random.Random(seed)):
            print(f"{message['role']:>9}: {message['content']}")
        print()
