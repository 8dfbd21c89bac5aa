"""AdamW or SGD over the float32 masters, by name; state in safetensors.

The arithmetic is torch.optim's. With SGD, no weight decay and no clipping a step is exactly θ ← θ −
lr·∇L.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Names and defaults as torch.optim's."""

    name: str = "adamw"
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    """Decoupled: θ ← θ(1 − lr·weight_decay), for both optimizers."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 0.0
    """Gradients are scaled down to this global norm; 0: never."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.name!r}, allowed: {', '.join(OPTIMIZERS)}")
        for field in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} is {getattr(self, field)}, must be 0 or more and finite")


class Optimizer:
    """Owns the optimizer state; updates the tensors of `masters` in place."""

    def __init__(self, masters: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        self.config = config
        self._masters = dict(masters)
        parameters = list(self._masters.values())
        if config.name == "adamw":
            self._optim: torch.optim.Optimizer = torch.optim.AdamW(
                parameters,
                lr=config.learning_rate,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
            )
        else:
            self._optim = torch.optim.SGD(parameters, lr=config.learning_rate)

    def step(self, grads: Mapping[str, Tensor]) -> float:
        """One update with `grads` by the masters' names (not changed). Returns the norm before
        clipping.

        Raises:
            FloatingPointError: the gradient is not finite; nothing was changed.
        """
        norm = float(torch.nn.utils.get_total_norm([grads[name] for name in self._masters]))
        if not norm < float("inf"):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        limit = self.config.max_grad_norm
        factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        decay = 1 - self.config.learning_rate * self.config.weight_decay
        with torch.no_grad():
            for name, master in self._masters.items():
                master.grad = grads[name].to(master.dtype)
                if factor != 1.0:
                    master.grad = master.grad * factor
                if self.config.name == "sgd" and decay != 1.0:
                    master.mul_(decay)
            self._optim.step()
        self._optim.zero_grad(set_to_none=True)
        return norm

    def save(self, path: str | Path) -> None:
        """State as safetensors, `<field>/<master's name>`."""
        tensors = {
            f"{field}/{name}": value.detach().cpu().contiguous()
            for name, master in self._masters.items()
            for field, value in self._optim.state.get(master, {}).items()
            if isinstance(value, Tensor)
        }
        save_file(tensors, path, metadata={"optimizer": self.config.name})

    def load(self, path: str | Path) -> None:
        """Take over a saved state.

        Raises:
            ValueError: another kind of optimizer wrote it, or a tensor belongs to no master or has another shape.
        """
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get("optimizer")
        if kind != self.config.name:
            raise ValueError(f"{path} is of optimizer {kind}, not {self.config.name}")
        state: dict[Tensor, dict[str, Tensor]] = {}
        for full_name, value in load_file(path).items():
            field, name = full_name.split("/", 1)
            master = self._masters.get(name)
            if master is None or (value.dim() and value.shape != master.shape):
                raise ValueError(f"{path}: {full_name} fits no adapter weight")
            # The count of steps stays on the CPU, where the optimizer reads it.
            state.setdefault(master, {})[field] = value.to(master.device) if value.dim() else value
        for master, fields in state.items():
            self._optim.state[master] = fields
