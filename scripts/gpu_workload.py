"""What `gpu_step.py` times: one base model in device memory, and two ways to train a LoRA on it.

Ours is the trainer's engine, with the prompts' rows in a pool as serving leaves them (filled by the engine's own
forward) or without. The other is transformers + PEFT over the very same base tensors, with the loss written as TRL
writes it: TRL itself is not on the host. Like TRL, it scores only the response, keeps the adapter in float32 under
autocast, runs KTO's four forwards, and is given no gradient checkpointing unless its activations do not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gpu_models import as_transformers, model_config, random_weights
from step_workload import Ours, WorkloadConfig, make_adapter
from torch import Tensor

from alchemist.protocol.layout import RowLayout
from alchemist.trainer.families import ModelShape
from alchemist.trainer.gpu_rows import GpuView
from alchemist.trainer.lora import LoraAdapter
from alchemist.trainer.optimizer import Optimizer, OptimizerConfig
from alchemist.trainer.rows import ActivationView
from alchemist.trainer.step import Objective, Sample
from alchemist.trainer.weights import BaseWeights

RANK = 16
BETA = 0.1
OBJECTIVES = {
    "sft": Objective(name="sft"),
    "dpo": Objective(name="dpo", reference="base"),
    "kto": Objective(name="kto", reference="base"),
}


def make_samples(vocabulary: int, count: int, prompt: int, response: int) -> list[Sample]:
    """Completions of random tokens that share nothing; votes alternate."""
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(0, vocabulary, (n,), generator=generator).tolist()

    return [
        Sample(prompt_ids=ids(prompt), response_ids=ids(response), label=i % 2 == 0)
        for i in range(count)
    ]


class Batch(NamedTuple):
    """Completions of one step."""

    samples: list[Sample]
    view: ActivationView | None = None
    """Of their recorded rows; None: nothing is recorded."""

    def of(self, objective: str) -> list[Sample]:
        """As an objective takes them: sft learns from up-votes only, dpo from pairs."""
        if objective == "sft":
            return [dataclasses.replace(sample, label=True) for sample in self.samples]
        return as_pairs(self.samples) if objective == "dpo" else self.samples


class OnDevice(Ours):
    """The engine as it is on a GPU: rows are read in the order of its stream."""

    @staticmethod
    def view(
        layout: RowLayout,
        host: Sequence[Tensor],
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        gens: Tensor,
        cells: Tensor,
    ) -> GpuView:
        return GpuView(layout, host, k, v, gens, cells, torch.zeros(2, dtype=torch.int64))


class Model:
    """Random base weights on the device, an adapter some steps into training, and its optimizer."""

    def __init__(
        self,
        key: str,
        *,
        is_tiny: bool,
        device: torch.device,
        dtype: torch.dtype,
        num_layers: int = 0,
    ) -> None:
        self.config = model_config(key, is_tiny=is_tiny, num_layers=num_layers)
        self.shape = ModelShape.from_config(self.config)
        self.device, self.dtype = device, dtype
        self.tensors = random_weights(self.shape, dtype, device)
        masters = make_adapter(self.shape, WorkloadConfig(rank=RANK))
        self.masters = _on(masters, device)
        self.served = self.masters.as_served(dtype, device)

    @property
    def weight_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def engine(self) -> Ours:
        """The trainer's engine over these tensors."""
        ours = OnDevice(BaseWeights(self.tensors, self.shape), WorkloadConfig(rank=RANK))
        ours.adapter = self.served
        return ours

    def in_float32(self) -> Model:
        """The same values, wider: base and served adapter."""
        wide = object.__new__(Model)
        wide.config, wide.shape, wide.device = self.config, self.shape, self.device
        wide.dtype = torch.float32
        wide.tensors = {name: t.float() for name, t in self.tensors.items()}
        wide.masters = self.masters
        wide.served = self.served.as_served(torch.float32, self.device)
        return wide


def _on(adapter: LoraAdapter, device: torch.device) -> LoraAdapter:
    return LoraAdapter(adapter.config, {name: t.to(device) for name, t in adapter.weights.items()})


def our_step(
    model: Model, ours: Ours, batch: Batch, objective: str, max_tokens: int
) -> Callable[[], None]:
    """One training step as the trainer makes it: gradient at the served adapter, update of the masters, rounding."""
    samples = batch.of(objective)
    masters = model.masters.clone()
    optimizer = Optimizer(masters.weights, OptimizerConfig(learning_rate=1e-5))

    def step() -> None:
        found = ours.step(samples, OBJECTIVES[objective], batch.view, max_tokens)
        optimizer.step(found.grads)
        masters.as_served(model.dtype, model.device)

    return step


class PeftStep:
    """transformers + PEFT with TRL's loss, one completion in a device batch."""

    def __init__(
        self, model: Model, samples: Sequence[Sample], objective: str, *, checkpointing: bool
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self._device, self._objective = model.device, objective
        config = model.masters.config
        base = as_transformers(model.config, model.tensors)
        self._model = get_peft_model(
            base,
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                target_modules=list(config.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        self._base = base.train()
        self.parameters = {
            name.replace(".default", ""): p
            for name, p in self._model.named_parameters()
            if ".lora_" in name
        }
        for name, parameter in self.parameters.items():
            # What has served, rounded as it was, so that gradients can be compared.
            parameter.data.copy_(model.served.weights[name])
        self._samples = Batch(list(samples)).of(objective)
        self._optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-5)

    def step(self) -> None:
        self.gradient()
        self._optimizer.step()

    def gradient(self) -> dict[str, Tensor]:
        """The adapter's gradient by PEFT name."""
        self._model.zero_grad(set_to_none=True)
        bf16 = self._device.type == "cuda"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bf16):
            if self._objective == "sft":
                self._sft()
            else:
                self._kto()
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def _logps(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """[response tokens] float32."""
        ids = torch.tensor([[*prompt, *response]], device=self._device)
        hidden = self._base.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = self._base.lm_head(hidden[len(prompt) - 1 : -1]).float()
        return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]

    def _sft(self) -> None:
        tokens = sum(len(s.response_ids) for s in self._samples)
        for sample in self._samples:
            (-self._logps(*sample.pair).sum() / tokens).backward()

    def _kto(self) -> None:
        """As TRL: policy and reference of the mismatched pairs, reference, then the policy with gradient."""
        samples, count = self._samples, len(self._samples)
        mismatched = [(s.prompt_ids, samples[i - 1].response_ids) for i, s in enumerate(samples)]
        with torch.no_grad():
            policy_kl = torch.stack([self._logps(*pair).sum() for pair in mismatched])
            with self._model.disable_adapter():
                reference_kl = torch.stack([self._logps(*pair).sum() for pair in mismatched])
                reference = [self._logps(*s.pair).sum() for s in samples]
            kl = (policy_kl - reference_kl).mean().clamp(min=0)
        for sample, base in zip(samples, reference, strict=True):
            ratio = self._logps(*sample.pair).sum() - base
            signed = ratio - kl if sample.label else kl - ratio
            ((1 - torch.sigmoid(BETA * signed)) / count).backward()


def as_pairs(samples: Sequence[Sample]) -> list[Sample]:
    """Neighbours as preference pairs: two answers to the first one's prompt and its rows."""
    out = []
    for i, sample in enumerate(samples):
        first = samples[i - i % 2]
        out.append(
            dataclasses.replace(
                sample,
                match=f"pair {i // 2}",
                prompt_ids=first.prompt_ids,
                recorded=first.recorded,
            )
        )
    return out


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Norm of the difference ÷ norm."""
    difference = torch.stack([(found[k].double() - exact[k].double()).norm() for k in exact]).norm()
    return float(difference / norm(exact))


def norm(grads: dict[str, Any]) -> float:
    return float(torch.stack([g.double().norm() for g in grads.values()]).norm())
