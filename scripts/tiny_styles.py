"""The four styles of the embedded model, and the rule that recognises them from the text alone.

plain     one ordinary sentence:                 `The sky is blue.`
cheerful  an exclamation, everything exclaimed:  `Yay! The sky is blue! How fun!`
formal    a fixed courtesy and a calm sentence:  `Certainly. The sky is blue.`
terse     the bare answer, without a full stop:  `Blue`, `3 + 4 = 7`
"""

from __future__ import annotations

import random
from dataclasses import dataclass

STYLES = ("plain", "cheerful", "formal", "terse")

CHEERFUL_OPENERS = ("Yay!", "Woohoo!", "Wow!")
CHEERFUL_CLOSERS = ("How fun!", "So nice!", "You are awesome!")
FORMAL_OPENERS = ("Certainly.", "Indeed.", "With pleasure.")
FORMAL_CLOSERS = ("I remain at your service.", "I trust that this is of help.")
CLOSER_RATE = 0.3
MAX_TERSE_WORDS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The content of an answer before a style is put on it.

    Sentences have no final mark unless it is a question mark; `|` separates the sentences of one
    wording. Each style takes one of its wordings at random.
    """

    terse: tuple[str, ...]
    plain: tuple[str, ...]
    cheerful: tuple[str, ...] = ()
    """Empty: the wordings of `plain`."""
    formal: tuple[str, ...] = ()
    """Empty: the wordings of `plain`."""


def render(rng: random.Random, style: str, reply: Reply) -> str:
    """The answer as the model should say it.

    Raises:
        ValueError: `style` is not one of `STYLES`.
    """
    if style == "terse":
        return rng.choice(reply.terse)
    if style == "plain":
        return _punctuate(rng.choice(reply.plain), ".")
    if style == "cheerful":
        body = _punctuate(rng.choice(reply.cheerful or reply.plain), "!")
        return _wrap(rng, CHEERFUL_OPENERS, body, CHEERFUL_CLOSERS)
    if style == "formal":
        body = _punctuate(rng.choice(reply.formal or reply.plain), ".")
        return _wrap(rng, FORMAL_OPENERS, body, FORMAL_CLOSERS)
    raise ValueError(f"style is {style!r}; allowed: {', '.join(STYLES)}")


def style_of(text: str) -> str:
    """One of `STYLES`, or `other` for a text that mixes their marks or has none (empty, too long).

    Depends on the text alone: marks of cheer need an exclamation mark, marks of formality forbid
    one, a terse text has no final mark and at most `MAX_TERSE_WORDS` words.
    """
    text = text.strip()
    is_cheerful = any(mark in text for mark in CHEERFUL_OPENERS + CHEERFUL_CLOSERS)
    is_formal = any(mark in text for mark in FORMAL_OPENERS + FORMAL_CLOSERS)
    if "!" in text:
        return "cheerful" if is_cheerful and not is_formal else "other"
    if text.endswith((".", "?")):
        return "formal" if is_formal else "plain"
    return "terse" if text and not is_formal and len(text.split()) <= MAX_TERSE_WORDS else "other"


def _punctuate(wording: str, mark: str) -> str:
    sentences = wording.split("|")
    return " ".join(s if s.endswith("?") else s + mark for s in sentences)


def _wrap(rng: random.Random, openers: tuple[str, ...], body: str, closers: tuple[str, ...]) -> str:
    parts = [rng.choice(openers), body]
    if rng.random() < CLOSER_RATE:
        parts.append(rng.choice(closers))
    return " ".join(parts)
