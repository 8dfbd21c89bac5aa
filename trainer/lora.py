"""The LoRA adapter: float32 masters under PEFT's names.

Key names are those of a PEFT checkpoint,
`base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight`; gradients and optimizer state use
the same names. A directory written here loads with `peft.PeftModel.from_pretrained` and in SGLang.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .families import ModelShape

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What PEFT calls `r`, `lora_alpha`, `target_modules`, `use_rslora`."""

    rank: int = 16
    """Columns of B, 1 or more."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha/rank (rslora: alpha/sqrt(rank))."""
    target_modules: tuple[str, ...] = MODULES
    """Any non-empty subset of `MODULES`; "all-linear" in `from_names` means all of them."""
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, must be at least 1")
        unknown = sorted(set(self.target_modules) - set(MODULES))
        if unknown or not self.target_modules:
            raise ValueError(
                f"target_modules is {self.target_modules}, allowed: {', '.join(MODULES)}"
            )

    @staticmethod
    def from_names(names: str | Sequence[str]) -> tuple[str, ...]:
        """`"all-linear"`, `"q_proj,v_proj"` or a list → modules in the canonical order."""
        wanted = names.split(",") if isinstance(names, str) else list(names)
        wanted = [name.strip() for name in wanted]
        if "all-linear" in wanted:
            return MODULES
        known = tuple(name for name in MODULES if name in wanted)
        return known if len(known) == len(set(wanted)) else tuple(wanted)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoraAdapter:
    """One adapter's weights by PEFT key. A is [rank, in], B is [out, rank]."""

    def __init__(self, config: LoraConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = weights

    @classmethod
    def init(cls, shape: ModelShape, config: LoraConfig, seed: int = 0) -> LoraAdapter:
        """A fresh adapter as PEFT makes it: A kaiming-uniform with a = √5, B zero; float32, on the
        CPU.

        The same seed gives the same A: version v0 is this adapter, and equals the base model.
        """
        generator = torch.Generator().manual_seed(seed)
        weights: dict[str, Tensor] = {}
        for layer in range(shape.num_layers):
            for module, (fan_out, fan_in) in module_sizes(shape).items():
                if module not in config.target_modules:
                    continue
                a = torch.empty(config.rank, fan_in)
                torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
                weights[key(layer, module, "A")] = a
                weights[key(layer, module, "B")] = torch.zeros(fan_out, config.rank)
        return cls(config, weights)

    @property
    def is_zero(self) -> bool:
        """All B are exactly zero: the adapted model is the base model."""
        return not any(bool(t.any()) for name, t in self.weights.items() if ".lora_B." in name)

    def as_served(
        self, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> LoraAdapter:
        """The copy that serves: the masters rounded to the serving dtype. Always a copy: masters change in place.

        Args:
            device: None: where the masters are.
        """
        return LoraAdapter(
            self.config,
            {n: t.to(device=device, dtype=dtype, copy=True) for n, t in self.weights.items()},
        )

    def clone(self) -> LoraAdapter:
        return LoraAdapter(self.config, {name: t.clone() for name, t in self.weights.items()})

    def layer(self, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        """module → (A, B) of one layer."""
        return {
            module: (self.weights[key(index, module, "A")], self.weights[key(index, module, "B")])
            for module in self.config.target_modules
        }

    def save_peft(self, directory: str | Path, base_model: str = "") -> None:
        """Write a PEFT directory (it may exist). Weights in their own dtype: masters stay float32."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.weights.items()}
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(self.config.target_modules),
            "use_rslora": self.config.use_rslora,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
        }
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load_peft(cls, directory: str | Path, shape: ModelShape | None = None) -> LoraAdapter:
        """Read a PEFT directory, ours or another's.

        Raises:
            ValueError: not a plain LoRA of the seven linears, or (with `shape`) of another model.
        """
        directory = Path(directory)
        raw: dict[str, Any] = json.loads((directory / CONFIG_FILE).read_text())
        for field, plain in (
            ("use_dora", False),
            ("rank_pattern", {}),
            ("alpha_pattern", {}),
            ("layers_to_transform", None),
            ("modules_to_save", None),
        ):
            if raw.get(field, plain) not in (plain, None):
                raise ValueError(f"{directory}: {field}={raw[field]!r} is not supported")
        config = LoraConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            target_modules=LoraConfig.from_names(raw["target_modules"]),
            use_rslora=bool(raw.get("use_rslora", False)),
        )
        adapter = cls(config, load_file(directory / WEIGHTS_FILE))
        if shape is not None:
            adapter.check(shape)
        return adapter

    def check(self, shape: ModelShape) -> None:
        """Raises ValueError unless the adapter has exactly the tensors that `shape` and the config
        imply.
        """
        expected = {}
        for layer in range(shape.num_layers):
            for module, (fan_out, fan_in) in module_sizes(shape).items():
                if module in self.config.target_modules:
                    expected[key(layer, module, "A")] = (self.config.rank, fan_in)
                    expected[key(layer, module, "B")] = (fan_out, self.config.rank)
        have = {name: tuple(t.shape) for name, t in self.weights.items()}
        if have != expected:
            wrong = sorted(
                name for name in have.keys() | expected if have.get(name) != expected.get(name)
            )
            name = wrong[0]
            raise ValueError(
                f"the adapter does not fit the model: {name} is {have.get(name)}, expected {expected.get(name)}"
            )


def key(layer: int, module: str, matrix: str) -> str:
    """PEFT's name of one adapter matrix; `matrix` is "A" or "B"."""
    block = "self_attn" if module in MODULES[:4] else "mlp"
    return f"base_model.model.model.layers.{layer}.{block}.{module}.lora_{matrix}.weight"


def module_sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """module → (outputs, inputs)."""
    q, kv, _ = shape.qkv_splits
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return {
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
