"""A batch of prompts whose greedy tokens are certain: what a server must answer at any time, whatever else it does.

Who shares a batch with a request decides how large its matrix products are, and so how they round. In float32 that
moves a logprob by about 1e-5 nats, in bfloat16 by about 1e-1; a greedy token can change only where the two best are
closer. So candidates are kept only if, in the answer of the server that is taken for right, the best token of every
step leads the second by `margin`: their tokens are then equal in any company, and one that differs is wrong.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

ANSWER_TOKENS = 24
LENGTHS = (5, 40, 130, 280, 420)
"""Prompt tokens of the candidates, in turn."""


class Answer(NamedTuple):
    """To one prompt, at temperature 0."""

    tokens: list[int]
    logprobs: list[float]
    cached_tokens: int
    """of the prompt, found in the radix tree"""


def candidates(count: int, seed: int = 1) -> list[list[int]]:
    """Random token ids that any model has."""
    rng = random.Random(seed)
    return [
        [rng.randrange(10, 900) for _ in range(LENGTHS[i % len(LENGTHS)])] for i in range(count)
    ]


def body(prompts: Sequence[Sequence[int]], *, is_plain: bool, top: int = 0) -> dict[str, Any]:
    """A request of SGLang's batch API to the base model.

    Args:
        top: best tokens of each step whose logprobs are wanted.
    """
    sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    out: dict[str, Any] = {
        "input_ids": list(prompts),
        "sampling_params": sampling,
        "return_logprob": True,
        "top_logprobs_num": top,
    }
    # Plain SGLang was started without adapters and refuses the name.
    return out if is_plain else out | {"lora_path": "base"}


def read(answers: Sequence[dict[str, Any]]) -> list[Answer]:
    out = []
    for answer in answers:
        meta = answer["meta_info"]
        steps = meta["output_token_logprobs"]
        out.append(Answer([s[1] for s in steps], [s[0] for s in steps], meta["cached_tokens"]))
    return out


def num_wrong(found: Answer, right: Answer) -> int:
    """Tokens of `found` that are not the right ones, or are missing."""
    same = sum(a == b for a, b in zip(found.tokens, right.tokens, strict=False))
    return max(len(found.tokens), len(right.tokens)) - same


def difference(a: Answer, b: Answer) -> float:
    """Largest of their logprobs, in nats; of answers with the same tokens."""
    return max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))


def lead(answer: dict[str, Any]) -> float:
    """Nats by which the best token leads the second, at the step where it does so least; asked for with `top=2`."""
    return min(step[0][0] - step[1][0] for step in answer["meta_info"]["output_top_logprobs"])


def choose(
    prompts: Sequence[list[int]], answers: Sequence[dict[str, Any]], count: int, margin: float
) -> tuple[list[list[int]], list[Answer]]:
    """The first `count` prompts whose best tokens lead by `margin`, and what is right.

    Exits if there are too few.
    """
    right = read(answers)
    kept = [i for i, answer in enumerate(answers) if lead(answer) >= margin]
    if len(kept) < count:
        sys.exit(
            f"{len(kept)} of {len(prompts)} candidates have answers that lead by {margin:g} nats; wanted: {count} "
            "(more --candidates, a smaller --margin)"
        )
    return [list(prompts[i]) for i in kept[:count]], [right[i] for i in kept[:count]]
