"""A live SGD step against transformers + peft: θ' = θ − lr·∇L, from receipts and version directories alone."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alchemist.server.main import TINY_MODEL

LEARNING_RATE = 0.05
BETA = 0.1


class Cache:
    """Attention over the first `length` tokens as a KV cache of `dtype` holds them; gradients pass the rounding."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.length = 0
        AttentionInterface.register("over_a_cache", self.attend)
        AttentionMaskInterface.register("over_a_cache", sdpa_mask)

    def attend(self, module, query, key, value, attention_mask, **options):
        key, value = self.rounded(key), self.rounded(value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def rounded(self, states):
        held = states[:, :, : self.length]
        lost = (held.to(self.dtype).to(states.dtype) - held).detach()
        return torch.cat((held + lost, states[:, :, self.length :]), dim=2)


def sequence_logp(model, prompt, response):
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum()


def outside_step(parent_path, completions, kv_dtype):
    """Masters after one SGD step on TRL's KTO loss with reference base.

    Args:
        completions: (prompt ids, response ids, label) in the step's order.
        kv_dtype: of the served keys and values.
    """
    torch.set_num_threads(1)
    cache = Cache(kv_dtype)
    base = AutoModelForCausalLM.from_pretrained(
        TINY_MODEL, dtype=torch.float32, attn_implementation="over_a_cache"
    )
    model = peft.PeftModel.from_pretrained(base, parent_path, is_trainable=True)

    def served_logp(prompt, response, length):
        """Of a pair whose first `length` tokens were served."""
        cache.length = length
        logp = sequence_logp(model, prompt, response)
        cache.length = 0
        return logp

    with torch.no_grad():
        mismatched = [(p, completions[i - 1][1]) for i, (p, _, _) in enumerate(completions)]
        policy = torch.stack([served_logp(p, r, len(p)) for p, r in mismatched])
        with model.disable_adapter():
            reference = torch.stack([sequence_logp(model, *pair) for pair in mismatched])
            base_logps = [sequence_logp(model, p, r) for p, r, _ in completions]
        kl = (policy - reference).mean().clamp(min=0)
    loss = torch.zeros((), dtype=torch.float64)
    for (prompt, response, label), logp_base in zip(completions, base_logps, strict=True):
        ratio = served_logp(prompt, response, len(prompt + response)) - logp_base
        loss = loss + 1 - torch.sigmoid(BETA * (ratio - kl if label else kl - ratio))
    (loss / len(completions)).backward()
    step = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            step[name.replace(".default", "")] = (
                parameter - LEARNING_RATE * parameter.grad
            ).detach()
    return step, float(kl)


@pytest.mark.parametrize("from_base", [True, False])
def test_one_live_step_equals_the_step_of_transformers_and_peft(server, from_base):
    if from_base:
        assert server.http.post("/v1/versions/v0/promote").status_code == 200
    parent = server.training()["live_version"]
    if not from_base:
        assert parent != "v0"
    step, kl, error = train_and_compare(server)
    assert step["tokens_reused"] > 0
    assert step["kl"] == pytest.approx(kl, abs=1e-4)
    assert error <= 1e-4


def train_and_compare(server, kv_dtype=torch.float32):
    """One step of four votes on the live version.

    Args:
        kv_dtype: of the server's KV cache.

    Returns:
        The step's metrics, the KL estimate computed outside, and how far the masters' move is from the one computed
        outside: relative to it, beyond what float32 rounding of the masters explains.
    """
    parent = server.training()["live_version"]
    answers = [
        server.chat(q, temperature=1.0)
        for q in ("Hello!", "What is 2 + 9?", "Tell me a story.", "Who are you?")
    ]
    assert {a["metadata"]["weight_version"] for a in answers} == {parent}
    labels = [True, False, True, True]
    for answer, label in zip(answers, labels, strict=True):
        server.vote(answer["id"], label)
    status = server.flush()
    version = next(v for v in server.versions() if v["version"] == status["live_version"])
    assert version["parent"] == parent
    assert len(version["feedback_ids"]) == 4
    receipts = [server.receipt(a["id"]) for a in answers]
    completions = [
        (r["prompt_token_ids"], r["response_token_ids"], label)
        for r, label in zip(receipts, labels, strict=True)
    ]
    parent_path = server.data_dir / "versions" / parent
    expected, kl = outside_step(parent_path, completions, kv_dtype)
    before = load_file(parent_path / "adapter_model.safetensors")
    after = load_file(f"{version['path']}/adapter_model.safetensors")
    assert after.keys() == expected.keys()
    moved = torch.cat([(after[n] - before[n]).flatten() for n in sorted(after)]).double()
    wanted = torch.cat([(expected[n] - before[n]).flatten() for n in sorted(after)]).double()
    # What a step adds is far smaller than what it adds to, so float32 rounding of θ bounds what can be compared.
    rounding = (
        torch.cat([before[n].abs().flatten() for n in sorted(after)]).double().norm() * 2**-23
    )
    assert wanted.norm() > 100 * rounding
    assert all(t.dtype == torch.float32 for t in after.values())
    return status["last_step"], kl, float(((moved - wanted).norm() - rounding) / wanted.norm())
