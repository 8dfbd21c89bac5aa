"""What a training step is given and what it returns: plain values, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

from torch import Tensor

from alchemist.protocol.objectives import ALLOWED, LossType, Reference, is_allowed

from .batch import Pair
from .lora import LoraAdapter
from .rows import Recorded


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion with its vote. `label`: desirable (an up-vote or a correction)."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    label: bool
    weight: float = 1.0
    """Multiplies the sample's loss; denominators do not change."""
    recorded: Recorded | None = None
    match: str = ""
    """The preference pair it belongs to: objective dpo wants one desirable and one undesirable
    sample of each."""

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "response_ids"):
            if not len(getattr(self, name)):
                raise ValueError(f"a sample's {name} is empty")

    @property
    def pair(self) -> Pair:
        return self.prompt_ids, self.response_ids


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Field names and defaults as in TRL's KTOConfig and DPOConfig."""

    name: str = "kto"
    """One of `protocol.objectives.OBJECTIVES`, or `module:function`: a user's loss, see `user_loss`."""
    loss_type: LossType = "sigmoid"
    """Of dpo."""
    label_smoothing: float = 0.0
    """Of dpo's sigmoid and robust: the share of votes taken to be the wrong way round."""
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: Reference = "base"
    """`base`: the adapter off. `served`: the log-probabilities at the version that served, so the
    log-ratio and the KL are identically zero."""

    def __post_init__(self) -> None:
        if not is_allowed(self.name):
            raise ValueError(f"objective name is {self.name!r}, allowed: {ALLOWED}")
        for name, kind in (("loss_type", LossType), ("reference", Reference)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"objective {name} is {getattr(self, name)!r}, allowed: {', '.join(get_args(kind))}"
                )
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more and finite")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, must be 0 or more and below 0.5"
            )


@dataclass(frozen=True)
class VersionGroup:
    """Samples that one version served, and its adapter as it served (`LoraAdapter.as_served`)."""

    adapter: LoraAdapter
    samples: Sequence[Sample]


@dataclass(frozen=True)
class SampleResult:
    """What one sample contributed."""

    logps: Tensor
    """[response tokens] at the version that served, float32 or wider; empty if the objective
    skipped the sample.
    """
    reference_logp: float
    """Sum over the response; equal to the policy's for reference `served`."""
    reward: float
    """β (log π − log π_ref); 0 for sft."""
    loss: float
    """The sample's weighted loss before the mean."""


@dataclass
class StepGradients:
    """Loss and gradient of one step."""

    loss: float
    grads: dict[str, Tensor]
    """By PEFT name, float32 (float64 models: float64), in the shape of the masters."""
    samples: list[SampleResult]
    """In step order: groups in the order given, their samples in order."""
    kl: float
    tokens_reused: int
    """Unique tokens taken from recorded rows."""
    tokens_recomputed: int
    """Unique tokens computed at the policy, mismatched pairs included."""
    tokens_reference: int
    """Unique tokens computed for the base reference."""
    seconds: dict[str, float]
    """By phase: rows, forward, reference, loss, backward."""
    rows_revoked: int = 0
    """Rows that were taken away while in use; their tokens were recomputed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """TRL's names: kl, rewards/chosen, rewards/rejected, rewards/margins, logps/chosen,
    logps/rejected.
    """
