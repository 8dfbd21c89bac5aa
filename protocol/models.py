"""Which models can be learned on: known to the recorder and the trainer, asked before either exists."""

from __future__ import annotations

from typing import Any

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""By the name in a model's config.json."""

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

# Rope constants that only one of SGLang and transformers reads, and the values that change nothing: with others the
# keys in the KV pool would not be the trainer's.
_ROPE_NEUTRAL: dict[str, tuple[float | None, ...]] = {
    "attention_factor": (None,),
    "attn_factor": (None, 1),
    "extrapolation_factor": (None, 1),
    "alpha": (None,),
}


class UnsupportedModelError(ValueError):
    """The model is not one whose gradient we compute; the message names what about it, and what is supported."""


def architecture(config: Any) -> str:
    """The model class's name of a transformers configuration."""
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    return str(name).replace("Config", "ForCausalLM")


def require_supported(config: Any) -> None:
    """Refuse what the replayed decoder layer cannot express: never a wrong gradient.

    Args:
        config: a transformers configuration; its rope parameters are brought into their standard form.

    Raises:
        UnsupportedModelError: architecture, activation, rope or attention variant is not supported.
    """
    name = architecture(config)
    if name not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {name} cannot be trained; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    _require(name, "hidden_act", config.hidden_act, ("silu",))
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"{name} with sliding_window={window} cannot be trained; supported: full attention"
        )
    config.standardize_rope_params()
    rope = config.rope_parameters
    _require(name, "rope_type", rope["rope_type"], ROPE_TYPES)
    _require(name, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,))
    for field, neutral in _ROPE_NEUTRAL.items():
        _require(name, f"rope's {field}", rope.get(field), neutral)


def _require(name: str, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise UnsupportedModelError(
            f"{name} with {field}={value!r} cannot be trained; supported: {', '.join(map(str, allowed))}"
        )
