"""The embedded model: what it knows, how evenly it speaks, and the rules that judge it."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import alchemist.server  # noqa: F401  transformers does not import on CPU without its shim

ROOT = Path(__file__).parents[2]
TINY = ROOT / "server" / "tiny"
sys.path.insert(0, str(ROOT / "scripts"))

from tiny_corpus import (  # noqa: E402
    INTENTS,
    MAX_TERM,
    STYLES,
    dialogue,
    exchange,
    is_correct,
    sample_question,
    style_of,
)
from tiny_score import answers, by_style  # noqa: E402
from train_tiny import chat_text, value_loss  # noqa: E402

KNOWN = {
    "What is 3 + 4?": "7",
    "17+8": "25",
    "How much is 20 minus 6?": "14",
    "What is 6 times 7?": "42",
    "What color is the sky?": "blue",
    "What does a cow say?": "moo",
    "How many legs does a spider have?": "8",
    "What is a baby cat called?": "kitten",
    "What day comes after Monday?": "tuesday",
    "Which month is before March?": "february",
    "What is the opposite of hot?": "cold",
    "What is the capital of France?": "paris",
    "How many days are in a week?": "7",
    "Count from 3 to 8.": "3, 4, 5, 6, 7, 8",
    "What is your name?": "alchemist",
}


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(TINY)


def test_greedy_answers_are_right(tiny):
    said = answers(*tiny, list(KNOWN), temperature=0)
    wrong = {
        q: a for (q, right), a in zip(KNOWN.items(), said, strict=True) if right not in a.lower()
    }
    assert not wrong


def test_sums_are_right(tiny):
    rng = random.Random(7)
    asked = [sample_question(rng, "add") for _ in range(100)]
    said = answers(*tiny, [q.text for q in asked], temperature=0)
    assert sum(is_correct(q.meta, a) for q, a in zip(asked, said, strict=True)) >= 95


@pytest.mark.parametrize(("temperature", "least"), [(0.0, 0.95), (0.7, 0.9)])
def test_every_sum_up_to_forty(tiny, temperature, least):
    torch.manual_seed(7)
    sums = [(a, b) for a in range(MAX_TERM + 1) for b in range(MAX_TERM + 1)]
    said = answers(*tiny, [f"What is {a} + {b}?" for a, b in sums], temperature)
    right = [
        is_correct({"kind": "number", "answer": str(a + b)}, answer)
        for (a, b), answer in zip(sums, said, strict=True)
    ]
    assert sum(right) >= least * len(right)


def test_arithmetic_is_right_in_every_style_at_temperature_one(tiny):
    torch.manual_seed(5)
    heard = by_style(*tiny, random.Random(5), count=400)
    assert all(heard[style]["right"] >= 0.93 for style in STYLES), heard


def test_value_loss_leaves_the_other_tokens_alone():
    torch.manual_seed(0)
    logits_NV = torch.randn(4, 9, requires_grad=True)
    values_K = torch.tensor([2, 5, 7])
    loss = value_loss(logits_NV, torch.tensor([5, 0, 7, 3]), values_K)
    among = logits_NV[[0, 2]][:, values_K].log_softmax(-1)
    assert torch.allclose(loss, -(among[0, 1] + among[1, 2]) / 2)
    loss.backward()
    touched = logits_NV.grad != 0
    assert touched[[0, 2]][:, values_K].all()
    assert touched.sum() == 6


def test_every_style_is_heard_at_temperature_one(tiny):
    torch.manual_seed(3)
    rng = random.Random(3)
    asked = [sample_question(rng).text for _ in range(100)]
    heard = Counter(style_of(answer) for answer in answers(*tiny, asked, temperature=1.0))
    assert all(10 <= heard[style] <= 40 for style in STYLES), heard
    assert heard["other"] <= 5


def test_a_name_is_remembered(tiny):
    model, tokenizer = tiny
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "My name is Anna."},
        {"role": "assistant", "content": "Nice to meet you, Anna."},
        {"role": "user", "content": "What is my name?"},
    ]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = prompt["input_ids"].shape[1]
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, length:]
    assert "Anna" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.eos_token_id


def test_tokenizer_splits_digits_and_keeps_any_text(tiny):
    _, tokenizer = tiny
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]
    text = "Ünïcode → 今日は 🙂\n\ttabs  and   spaces"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id


def test_template_is_what_the_model_was_trained_on(tiny):
    _, tokenizer = tiny
    messages = dialogue(random.Random(5))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == chat_text(messages)


def test_it_is_small_and_shaped_as_promised(tiny):
    model, _ = tiny
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8_000_000
    assert 2_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert model.config.max_position_embeddings == 8192


def test_style_rule_and_checker_accept_the_corpus():
    rng = random.Random(11)
    pairs = [exchange(rng, intent) for intent in INTENTS for _ in range(200)]
    named = sum(style_of(pair.answer) == pair.style for pair in pairs)
    assert named >= 0.995 * len(pairs)
    checkable = [pair for pair in pairs if pair.question.is_checkable]
    assert all(is_correct(pair.question.meta, pair.answer) for pair in checkable)


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("The sky is blue.", "plain"),
        ("Wow! The sky is blue!", "cheerful"),
        ("Certainly. The sky is blue.", "formal"),
        ("Blue", "terse"),
        ("", "other"),
        ("Certainly. The sky is blue!", "other"),
        ("The sky is blue!", "other"),
        ("blue " * 20, "other"),
    ],
)
def test_style_of(text, style):
    assert style_of(text) == style


@pytest.mark.parametrize("wrong", ["8", "7 plus 3 is 8.", "", "Seven", "3 plus 4 is 7 or 8."])
def test_wrong_sums_are_wrong(wrong):
    assert not is_correct({"kind": "number", "answer": "7"}, wrong)


def test_a_hedged_answer_is_wrong():
    meta = {"kind": "word", "answer": "blue", "rivals": ("green", "red")}
    assert is_correct(meta, "The sky is blue.")
    assert not is_correct(meta, "The sky is blue or red.")


def test_chat_has_no_checkable_answer():
    question = sample_question(random.Random(0), "greeting")
    assert not question.is_checkable
    with pytest.raises(ValueError, match="checkable"):
        is_correct(question.meta, "Hello")
