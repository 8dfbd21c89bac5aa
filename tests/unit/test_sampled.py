"""Log-probabilities of what was sampled are the model's own, whatever the sampler does to its logits meanwhile."""

import math
from types import SimpleNamespace

import pytest
import torch

from alchemist.server import sampled as module
from alchemist.server.sampled import Sampled

VOCAB = 11


def step(sampled, rids, lengths, logits=None):
    """A batch is sampled; its own log-probabilities."""
    logits = torch.randn(len(rids), VOCAB) if logits is None else logits
    token_ids = logits.argmax(-1).int()
    expected = torch.log_softmax(logits.float(), -1).gather(1, token_ids.long()[:, None])[:, 0]
    kept = sampled.before(logits)
    # As the sampler does with a temperature, and the next step with its buffers.
    logits.div_(0.3)
    batch = SimpleNamespace(rids=rids, seq_lens=torch.tensor(lengths), seq_lens_cpu=None)
    sampled.after(batch, kept, token_ids)
    token_ids.zero_()
    return expected.tolist()


@pytest.mark.parametrize("aside_bytes", [0, 3 * VOCAB * 4, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_has_the_models_own(monkeypatch, aside_bytes, dtype):
    """At once, some steps at a time, and all of them when the first request ends."""
    monkeypatch.setattr(module, "ASIDE_BYTES", aside_bytes)
    sampled, a, b = Sampled(), [], []
    for i in range(7):
        found = step(sampled, ["a", "b"], [4 + i, 9 + i], torch.randn(2, VOCAB, dtype=dtype))
        a.append(found[0])
        b.append(found[1])
    assert sampled.ended("a").of_answer(4, 7) == a
    b += step(sampled, ["b"], [16], torch.randn(1, VOCAB, dtype=dtype))
    assert sampled.ended("b").of_answer(9, 8) == b
    assert sampled._num_aside_bytes == 0


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "ASIDE_BYTES", 5 * VOCAB * 4)
    sampled = Sampled()
    for i in range(20):
        step(sampled, ["a", "b"], [i, i])
        assert sum(logits.nbytes for _, logits, _ in sampled._aside) <= module.ASIDE_BYTES


def test_chunks_of_a_prompt_and_steps_past_the_end_are_nobodys():
    sampled = Sampled()
    step(sampled, ["a"], [3])
    own = step(sampled, ["a"], [6]) + step(sampled, ["a"], [7])
    found = sampled.ended("a").of_answer(6, 3)
    assert found[:2] == own
    assert math.isnan(found[2])
    step(sampled, ["a"], [8])
    assert all(map(math.isnan, sampled.ended("a").of_answer(6, 3)))
    sampled.began(["a"])
    assert sampled.ended("a").of_answer(6, 1) != step(sampled, ["a"], [6])
    sampled.began(["a"])
    own = step(sampled, ["a"], [6])
    assert sampled.ended("a").of_answer(6, 1) == own


def test_no_memory_costs_the_log_probabilities_and_nothing_else(monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("no memory")

    sampled = Sampled()
    step(sampled, ["a"], [6])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "log_softmax", fails)
        found = sampled.ended("a").of_answer(6, 1)
    assert math.isnan(found[0])
    sampled.began(["a"])
    own = step(sampled, ["a"], [6])
    assert sampled.ended("a").of_answer(6, 1) == own
    assert caplog.text.count("log-probabilities of some answers are missing: no memory") == 1
