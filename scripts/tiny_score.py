"""How well the embedded model answers: right answers by intent and style, and the mix of styles.

python scripts/tiny_score.py server/tiny
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from typing import Any

import torch
from tiny_corpus import (
    ARITHMETIC,
    INTENTS,
    MAX_TERM,
    STYLES,
    Question,
    is_correct,
    sample_question,
    style_of,
)

MAX_ANSWER_TOKENS = 80


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, questions: list[str], temperature: float, batch: int = 128
) -> list[str]:
    """One answer to each question, single turn; temperature 0 is greedy, else torch's global seed.

    Prompts are batched by equal length, so no padding enters the attention.
    """
    end = tokenizer.eos_token_id
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False
        )
        for q in questions
    ]
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    out = [""] * len(questions)
    for indices in by_length.values():
        for first in range(0, len(indices), batch):
            chunk = indices[first : first + batch]
            tokens_BT = _decode(model, [prompts[i] for i in chunk], temperature, end)
            for i, row in zip(chunk, tokens_BT.tolist(), strict=True):
                row = row[: row.index(end)] if end in row else row
                out[i] = tokenizer.decode(row, skip_special_tokens=True)
    return out


def _decode(model: Any, prompts: list[list[int]], temperature: float, end: int) -> torch.Tensor:
    step_BT, cache, chosen = torch.tensor(prompts), None, []
    done_B = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(MAX_ANSWER_TOKENS):
        output = model(input_ids=step_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits_BV = output.past_key_values, output.logits[:, -1].float()
        if temperature == 0:
            token_B = logits_BV.argmax(-1)
        else:
            token_B = torch.multinomial((logits_BV / temperature).softmax(-1), 1)[:, 0]
        done_B |= token_B == end
        chosen.append(torch.where(done_B, end, token_B))
        if done_B.all():
            break
        step_BT = token_B[:, None]
    return torch.stack(chosen, 1)


def right_share(model: Any, tokenizer: Any, questions: list[Question], temperature: float) -> float:
    said = answers(model, tokenizer, [q.text for q in questions], temperature)
    right = [is_correct(q.meta, a) for q, a in zip(questions, said, strict=True)]
    return round(sum(right) / len(right), 4)


def score(model: Any, tokenizer: Any, seed: int = 0, per_intent: int = 60) -> dict[str, Any]:
    """Shares of right answers, greedy and sampled, and of each style at temperature 1."""
    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    pairs = [(a, b) for a in range(MAX_TERM + 1) for b in range(MAX_TERM + 1)]
    sums = [
        Question(f"What is {a} + {b}?", "add", {"kind": "number", "answer": str(a + b)})
        for a, b in pairs
    ]
    result: dict[str, Any] = {
        "all_sums_greedy": right_share(model, tokenizer, sums, 0),
        "all_sums_t07": right_share(model, tokenizer, sums, 0.7),
        "all_sums_t1": right_share(model, tokenizer, sums, 1.0),
    }
    by_intent = {name: [sample_question(rng, name) for _ in range(per_intent)] for name in INTENTS}
    checkable = {n: qs for n, qs in by_intent.items() if qs[0].is_checkable}
    result["greedy"] = {n: right_share(model, tokenizer, qs, 0) for n, qs in checkable.items()}
    result["t1"] = {n: right_share(model, tokenizer, qs, 1.0) for n, qs in checkable.items()}
    asked = [sample_question(rng).text for _ in range(1000)]
    styles = Counter(style_of(a) for a in answers(model, tokenizer, asked, 1.0))
    result["styles_t1"] = {s: styles[s] / len(asked) for s in (*STYLES, "other")}
    result["arithmetic_t1_by_style"] = by_style(model, tokenizer, rng, count=2000)
    return result


def by_style(model: Any, tokenizer: Any, rng: random.Random, count: int) -> dict[str, Any]:
    """Of the arithmetic that users ask at temperature 1: how often each style answers, and how often right."""
    asked = [sample_question(rng, ARITHMETIC[i % len(ARITHMETIC)]) for i in range(count)]
    right: dict[str, list[bool]] = {style: [] for style in (*STYLES, "other")}
    said = answers(model, tokenizer, [q.text for q in asked], 1.0)
    for question, answer in zip(asked, said, strict=True):
        right[style_of(answer)].append(is_correct(question.meta, answer))
    return {
        style: {"share": len(hits) / count, "right": round(sum(hits) / len(hits), 4)}
        for style, hits in right.items()
        if hits
    }


if __name__ == "__main__":
    import alchemist.server  # noqa: F401  transformers does not import on CPU without its shim

    # isort: split
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = sys.argv[1]
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    print(json.dumps(score(loaded, AutoTokenizer.from_pretrained(path)), indent=2))
