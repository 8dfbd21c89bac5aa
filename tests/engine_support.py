"""Small random models and the naive gradient that the engine is compared with.

The naive gradient lays every completion out by itself, runs transformers + peft, and uses nothing but autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from alchemist.kernels import fp8_rows
from alchemist.protocol.layout import ActivationDtype
from alchemist.trainer.families import ModelShape
from alchemist.trainer.lora import LoraAdapter, LoraConfig
from alchemist.trainer.rows import ActivationView, Recorded
from alchemist.trainer.step import Objective, ReplayEngine, Sample, VersionGroup
from alchemist.trainer.weights import BaseWeights, fused_from_hf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCAB = 61


def random_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any):
    """A tiny transformers model with every parameter random, biases and norm weights too."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": family in ("qwen2", "qwen3"),
        "attn_implementation": "sdpa",
        "pad_token_id": None,
    }
    config |= {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "mistral": {"sliding_window": None, "head_dim": 8},
        "qwen2": {},
        "qwen3": {"head_dim": 10},
    }[family]
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**(config | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 2 else 0.2
            parameter.copy_(torch.randn(parameter.shape) * scale + (parameter.dim() == 1))
    model.requires_grad_(False)
    if dtype == torch.float64:
        _norms_in_float64(model)
    return model.to(dtype).eval()


def _norms_in_float64(model: Any) -> None:
    """transformers' RMSNorm goes through float32 whatever the dtype; for a float64 comparison it must not."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)


def engine_of(model: Any, **options: Any) -> ReplayEngine:
    shape = ModelShape.from_config(model.config)
    return ReplayEngine(BaseWeights(fused_from_hf(model), shape), shape, **options)


def random_adapter(
    shape: ModelShape, dtype: torch.dtype, seed: int, config: LoraConfig | None = None
) -> LoraAdapter:
    """A trained-looking adapter: B is not zero."""
    adapter = LoraAdapter.init(shape, config or LoraConfig(rank=3, alpha=5.0), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in adapter.weights.items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return adapter.as_served(dtype)


def with_peft(model: Any, adapter: LoraAdapter) -> Any:
    """The model with the adapter as trainable peft parameters. Undo with `.unload()`."""
    config = adapter.config
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=list(config.target_modules),
            use_rslora=config.use_rslora,
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=False,
    )
    dtype = next(iter(adapter.weights.values())).dtype
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = adapter.weights[name.replace(".default", "")].clone().to(dtype)
            parameter.requires_grad_()
    return adapted.eval()


def naive_logps(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(list(response))]


def naive_step(
    model: Any, groups: Sequence[VersionGroup], objective: Objective
) -> tuple[float, dict[str, Tensor], float]:
    """(loss, gradient by PEFT name, kl), one completion at a time, formulas written out again."""
    samples = [s for group in groups for s in group.samples]
    responses = [s.response_ids for s in samples]
    kl_of, index = [], 0
    with torch.no_grad():
        for group in groups:
            adapted = with_peft(model, group.adapter)
            for sample in group.samples:
                # The nearest one before it, in a circle, that is not its own.
                others = [responses[index - d] for d in range(1, len(responses))]
                other = next((r for r in others if list(r) != list(sample.response_ids)), None)
                index += 1
                if other is None:
                    continue
                ratio = naive_logps(adapted, sample.prompt_ids, other).sum()
                with adapted.disable_adapter():
                    ratio = ratio - naive_logps(adapted, sample.prompt_ids, other).sum()
                kl_of.append(ratio)
            adapted.unload()
    kl = torch.stack(kl_of).mean().clamp(min=0) if kl_of else torch.zeros(())
    if objective.name != "kto" or objective.reference == "served":
        kl = torch.zeros(())
    values: list[Tensor] = []
    base: list[Tensor] = []
    for group in groups:
        adapted = with_peft(model, group.adapter)
        with torch.no_grad():
            for sample in group.samples:
                values.append(naive_logps(adapted, *sample.pair))
                off = adapted.disable_adapter() if objective.reference == "base" else nullcontext()
                with off:
                    base.append(naive_logps(adapted, *sample.pair))
        adapted.unload()
    total = float(naive_loss(samples, values, base, kl, objective))
    grads: dict[str, Tensor] = {}
    index = 0
    for group in groups:
        adapted = with_peft(model, group.adapter)
        for sample in group.samples:
            # The gradient through one sample's log-probabilities, the others held still.
            logps = list(values)
            logps[index] = naive_logps(adapted, *sample.pair)
            index += 1
            loss = naive_loss(samples, logps, base, kl, objective)
            if loss.requires_grad:
                loss.backward()
        for name, parameter in adapted.named_parameters():
            if parameter.grad is not None:
                name = name.replace(".default", "")
                grads[name] = grads.get(name, 0) + parameter.grad
        adapted.unload()
    return total, grads, float(kl)


def naive_loss(
    samples: Sequence[Sample],
    logps: Sequence[Tensor],
    base: Sequence[Tensor],
    kl: Tensor,
    objective: Objective,
) -> Tensor:
    """The step's loss, sample by sample."""
    beta, smooth = objective.beta, objective.label_smoothing
    total = torch.zeros((), dtype=logps[0].dtype)
    for i, sample in enumerate(samples):
        ratio = (logps[i] - base[i]).sum()
        if objective.name == "sft":
            if sample.label:
                tokens = sum(len(s.response_ids) for s in samples if s.label)
                total = total - sample.weight * logps[i].sum() / tokens
        elif objective.name == "dpo":
            if not sample.label:
                continue
            (j,) = (j for j, s in enumerate(samples) if s.match == sample.match and not s.label)
            other = (logps[j] - base[j]).sum()
            p = torch.sigmoid(beta * (ratio - other))
            if objective.loss_type == "ipo":
                gap = ratio / len(logps[i]) - other / len(logps[j]) - 0.5 / beta
                loss = gap * gap
            elif objective.loss_type == "robust":
                loss = (-(1 - smooth) * p.log() + smooth * (1 - p).log()) / (1 - 2 * smooth)
            else:
                loss = -(1 - smooth) * p.log() - smooth * (1 - p).log()
            total = total + loss * (sample.weight + samples[j].weight) / len(samples)
        elif ":" in objective.name:
            # `user_losses:hinge` written out again.
            sign = 1 if sample.label else -1
            total = total + sample.weight * torch.relu(1 - sign * ratio) ** 2
        else:
            sign = 1 if sample.label else -1
            weight = objective.desirable_weight if sample.label else objective.undesirable_weight
            p = torch.sigmoid(beta * sign * (ratio - kl))
            total = total + sample.weight * weight * (1 - p) / len(samples)
    return total


def branching_samples(count: int, own: int) -> list[Sample]:
    """Completions of four tokens, liked and disliked in turn, on prompts that share nine tokens and add `own` each."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=generator).tolist()

    head = ids(9)
    return [
        Sample(prompt_ids=head + ids(own), response_ids=ids(4), label=i % 2 == 0)
        for i in range(count)
    ]


class Recorder:
    """Fills an `ActivationView` from transformers' own activations, at shuffled rows and slots: half of the rows in the
    KV pool, half on the host.
    """

    def __init__(
        self,
        shape: ModelShape,
        dtype: torch.dtype,
        num_rows: int = 2048,
        activation_dtype: ActivationDtype = "auto",
    ) -> None:
        layout = shape.row_layout(dtype, activation_dtype)
        generator = torch.Generator().manual_seed(1)
        size, num_slots = layout.slots_per_row, num_rows * (1 + layout.slots_per_row)
        kv = (num_slots, shape.num_kv_heads, shape.head_dim)
        nan = float("nan")

        def buffers(*size: int) -> list[Tensor]:
            return [torch.full(size, nan, dtype=dtype) for _ in range(shape.num_layers)]

        self.shape, self.layout, self.num_device = shape, layout, num_rows
        self.host, self.k, self.v = buffers(num_rows, layout.width), buffers(*kv), buffers(*kv)
        self.gens = torch.randint(1, 1000, (2 * num_rows,))
        self._free_rows = torch.randperm(2 * num_rows, generator=generator)
        slots = torch.randperm(num_slots, generator=generator)
        self.cells = slots[: num_rows * size].view(num_rows, size)
        self._free_slots = slots[num_rows * size :].repeat(2)
        self.view = ActivationView(layout, self.host, self.k, self.v, self.gens, self.cells)

    def record(
        self, model: Any, adapter: LoraAdapter, prompt: Sequence[int], mask: Tensor
    ) -> Recorded:
        """Run the prompt and store the rows of the tokens where `mask` is true."""
        adapted = with_peft(model, adapter)
        values = _activations(adapted, self.shape, prompt)
        adapted.unload()
        n = len(prompt)
        rows, self._free_rows = self._free_rows[:n], self._free_rows[n:]
        slots, self._free_slots = self._free_slots[:n], self._free_slots[n:]
        for layer, found in enumerate(values):
            for token in torch.nonzero(mask).flatten().tolist():
                self._store(layer, found, token, int(rows[token]), int(slots[token]))
        missing = torch.full_like(rows, -1)
        return Recorded(torch.where(mask, rows, missing), slots, self.gens[rows].clone())

    def as_on_gpu(self) -> ActivationView:
        """The view as it is on a GPU, over the same tensors."""
        from alchemist.trainer.gpu_rows import GpuView

        counts = torch.zeros(2, dtype=torch.int64)
        return GpuView(self.layout, self.host, self.k, self.v, self.gens, self.cells, counts)

    def damage(self, row: int) -> None:
        """Change what enters the first layer."""
        if row < self.num_device:
            self.k[0].flatten(1)[self.cells[row, 0], 0] += 1
        else:
            self.host[0][row - self.num_device, 0] += 1

    def _store(self, layer: int, found: dict[str, Tensor], token: int, row: int, slot: int) -> None:
        layout, planes = self.layout, (self.k[layer].flatten(1), self.v[layer].flatten(1))
        if row < self.num_device:
            self.k[layer][slot], self.v[layer][slot] = found["keys"][token], found["values"][token]
        for field, (start, width) in layout.fields.items():
            value = found[field][token].flatten()
            if layout.is_encoded(field):
                value = fp8_rows.encode(value[None])[0]
            if row >= self.num_device:
                self.host[layer][row - self.num_device, start : start + width] = value
            elif field not in ("keys", "values"):
                for plane, first, count, offset in layout.parts(field):
                    for i, piece in enumerate(value[offset:].split(layout.cell)[:count]):
                        planes[plane][self.cells[row, first + i], : piece.numel()] = piece


@torch.no_grad()
def _activations(model: Any, shape: ModelShape, prompt: Sequence[int]) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = [{} for _ in range(shape.num_layers)]
    handles = []

    def keep(layer: int, name: str, module: Any, is_input: bool) -> None:
        def hook(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[layer][name] = (args[0] if is_input else output)[0].clone()

        handles.append(module.register_forward_hook(hook))

    for i, layer in enumerate(model.get_base_model().model.layers):
        keep(i, "x", layer.input_layernorm, True)
        keep(i, "q", layer.self_attn.q_proj, False)
        keep(i, "k", layer.self_attn.k_proj, False)
        keep(i, "values", layer.self_attn.v_proj, False)
        keep(i, "attn", layer.self_attn.o_proj, True)
        keep(i, "mid", layer.post_attention_layernorm, True)
        keep(i, "gate", layer.mlp.gate_proj, False)
        keep(i, "up", layer.mlp.up_proj, False)
    cache = model(input_ids=torch.tensor([list(prompt)]), use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    for i, values in enumerate(found):
        values["gate_up"] = torch.cat([values["gate"], values["up"]], dim=-1)
        values["keys"] = cache.layers[i].keys[0].transpose(0, 1)
        values["values"] = values["values"].unflatten(-1, (shape.num_kv_heads, shape.head_dim))
    return found


def relative_error(ours: dict[str, Tensor], naive: dict[str, Tensor]) -> float:
    """Largest error of any gradient tensor, relative to the whole gradient's largest element (at least 1e-3: where
    the gradient is zero by construction both sides hold rounding noise).
    """
    scale = max(1e-3, *(float(g.abs().max()) for g in naive.values()))
    worst = 0.0
    for name, grad in ours.items():
        expected = naive.get(name)
        worst = max(worst, float((grad - expected if expected is not None else grad).abs().max()))
    return worst / scale


NUM_DEVICE, NUM_HOST = 4, 6
"""Rows of `make_view`; row r is of generation 10 + r."""


def make_view() -> tuple[Any, ...]:
    """A view over random rows: itself, its layout, host rows, keys, values, generations, cells."""
    shape = ModelShape.from_config(random_model("llama").config)
    layout = shape.row_layout(torch.float32)
    size = layout.slots_per_row
    host = [torch.randn(NUM_HOST, layout.width) for _ in range(shape.num_layers)]
    kv = (9 + NUM_DEVICE * size, layout.num_kv_heads, layout.head_dim)
    k, v = ([torch.randn(kv) for _ in range(shape.num_layers)] for _ in range(2))
    cells = 9 + torch.randperm(NUM_DEVICE * size).view(NUM_DEVICE, size)
    gens = torch.arange(10, 10 + NUM_DEVICE + NUM_HOST)
    return ActivationView(layout, host, k, v, gens, cells), layout, host, k, v, gens, cells
