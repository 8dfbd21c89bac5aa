"""The formula of docs/memory.md against what torch's CPU allocator hands out in a real step."""

import pytest
import torch
from engine_support import engine_of, random_adapter, random_model
from torch.profiler import ProfilerActivity, profile

from alchemist.trainer.lora import LoraConfig
from alchemist.trainer.memory import step_bytes
from alchemist.trainer.rows import ActivationView, Recorded
from alchemist.trainer.step import Objective, Sample
from alchemist.trainer.tree import num_unique_tokens

SIZES = {
    "wide": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "vocab_size": 999,
    },
    # The attention's score tiles and the vocabulary are large beside the layers.
    "small": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "vocab_size": 9999,
    },
}


def peak_bytes(run):
    """Most that was allocated at once while `run` ran; every allocation is seen, inside operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def view_of(shape, dtype, num_rows, activation_dtype):
    """Rows of zeros, which eight bits have, too: sizes do not depend on what is in them."""
    layout = shape.row_layout(dtype, activation_dtype)
    size = layout.slots_per_row
    kv = (num_rows * (1 + size), shape.num_kv_heads, shape.head_dim)

    def buffers(*size):
        return [torch.zeros(size, dtype=dtype) for _ in range(shape.num_layers)]

    gens = torch.zeros(num_rows, dtype=torch.int64)
    cells = torch.arange(num_rows, kv[0]).view(num_rows, size)
    host = buffers(0, layout.width)
    return ActivationView(layout, host, buffers(*kv), buffers(*kv), gens, cells)


def make_samples(count, shared, prompt, response, share, vocab_size):
    """Completions that share a system prompt, with a share of their prompts' tokens recorded."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(0, vocab_size, (n,), generator=generator).tolist()

    head, length = ids(shared), shared + prompt
    samples = []
    for i in range(count):
        rows = torch.arange(i * length, (i + 1) * length)
        mask = torch.rand(length, generator=generator) < share
        samples.append(
            Sample(
                prompt_ids=head + ids(prompt),
                response_ids=ids(response),
                label=i % 2 == 0,
                match=f"pair {i // 2}",
                recorded=Recorded(torch.where(mask, rows, -1), rows, torch.zeros_like(rows)),
            )
        )
    return samples


def sequences(samples):
    return [[*s.prompt_ids, *s.response_ids[:-1]] for s in samples]


def formula(engine, dtype, config, samples, objective, reused):
    """`step_bytes` of the largest micro-batch, by tokens."""
    used = [s for s in samples if s.label or objective.name != "sft"]
    batches = engine.micro_batches([s.pair for s in used])
    largest = max(
        ([used[i] for i in members] for members in batches),
        key=lambda members: num_unique_tokens(sequences(members)),
    )
    tokens = num_unique_tokens(sequences(largest))
    recorded = reused if len(batches) == 1 else sum(map(num_recorded, largest))
    scored = 0
    if objective.name == "kto" and len(batches) == 1:
        mismatched = [
            [*s.prompt_ids, *samples[i - 1].response_ids[:-1]] for i, s in enumerate(samples)
        ]
        scored = num_unique_tokens(sequences(samples) + mismatched) - tokens
    return step_bytes(
        engine.shape,
        dtype,
        config,
        recorded=recorded,
        missing=tokens - recorded,
        response=sum(len(s.response_ids) for s in largest),
        longest=max(len(s.prompt_ids) + len(s.response_ids) for s in largest),
        scored=scored,
        reference=objective.name != "sft",
    )


def num_recorded(sample):
    return int((sample.recorded.rows >= 0).sum())


# count, shared, prompt, response, share recorded, max_tokens
BATCHES = {
    "recorded": (4, 0, 300, 40, 1.0, 1 << 16),
    "half": (4, 0, 300, 40, 0.5, 1 << 16),
    "missing": (4, 0, 300, 40, 0.0, 1 << 16),
    "long answers": (4, 0, 20, 300, 1.0, 1 << 16),
    "shared prompt": (8, 700, 30, 20, 1.0, 1 << 16),
    "one long prompt": (2, 0, 1500, 8, 1.0, 1 << 16),
    "split": (8, 0, 300, 40, 1.0, 700),
    "short": (2, 0, 20, 5, 0.5, 1 << 16),
}


MODELS = {
    "qwen3": ("qwen3", "wide", torch.float32, "auto"),
    "bfloat16": ("llama", "wide", torch.bfloat16, "auto"),
    "small": ("llama", "small", torch.float32, "auto"),
    "eight bits": ("llama", "wide", torch.bfloat16, "fp8"),
    "eight bits, float32": ("qwen3", "small", torch.float32, "fp8"),
}
CASES = [(batch, name, "qwen3") for batch in BATCHES for name in ("sft", "kto")]
CASES += [(batch, "dpo", "qwen3") for batch in ("half", "long answers", "split")]
CASES += [
    (batch, "kto", model)
    for batch in ("recorded", "missing", "long answers", "shared prompt")
    for model in ("bfloat16", "small")
]
CASES += [
    (batch, "kto", model)
    for batch in ("recorded", "half", "shared prompt")
    for model in ("eight bits", "eight bits, float32")
]


@pytest.mark.parametrize(("batch", "name", "model"), CASES)
def test_the_formula_bounds_a_step(batch, name, model):
    family, size, dtype, activation_dtype = MODELS[model]
    sizes = SIZES[size]
    head_dim = {"head_dim": sizes["hidden_size"] // 4} if family == "qwen3" else {}
    model = random_model(family, dtype, max_position_embeddings=2048, **sizes, **head_dim)
    count, shared, prompt, response, share, max_tokens = BATCHES[batch]
    engine = engine_of(model, max_tokens=max_tokens)
    config = LoraConfig(rank=8, alpha=16.0)
    adapter = random_adapter(engine.shape, dtype, 3, config)
    samples = make_samples(count, shared, prompt, response, share, sizes["vocab_size"])
    engine.view = view_of(engine.shape, dtype, count * (shared + prompt), activation_dtype)
    objective = Objective(name=name)
    found = []
    peak = peak_bytes(lambda: found.append(engine.gradients(samples, adapter, objective)))
    bound = formula(engine, dtype, config, samples, objective, found[0].tokens_reused)
    assert peak <= bound
    if batch != "short":
        assert bound <= 1.5 * peak
