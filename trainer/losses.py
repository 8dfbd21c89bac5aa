"""Losses of TRL on sequence log-probabilities: pure functions, no model.

Names and definitions as in TRL's `KTOTrainer`, `DPOTrainer` and `SFTTrainer`; r = log π − log π_ref:

    kto                 1 − σ(β(r − kl)) desirable, 1 − σ(β(kl − r)) undesirable
    apo_zero_unpaired   1 − σ(β r) desirable, σ(β r) undesirable
    dpo   sigmoid       −(1 − ε) log σ(βΔ) − ε log σ(−βΔ)                 Δ = r_chosen − r_rejected
          robust        (−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε)
          ipo           (Δ' − 1/2β)²                     Δ' of the log-ratios' means over tokens
    sft                 −mean of the response tokens' log-probabilities

ε is the label smoothing. TRL's `sigmoid` ignores it (1.16; its `robust` does not): ours is conservative DPO. Sources:
KTO, arXiv 2402.01306; APO, arXiv 2408.06266; DPO, arXiv 2305.18290, its section on noisy labels; robust DPO, arXiv
2403.00409; IPO, arXiv 2310.12036.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def kto_losses(
    logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """[n] weighted losses. `logps`, `reference_logps` [n] sums over response tokens; `labels` [n]
    bool.
    """
    margin = logps - reference_logps - kl
    losses = 1 - torch.sigmoid(beta * torch.where(labels, margin, -margin))
    return losses * _weights(labels, losses, desirable_weight, undesirable_weight)


def apo_zero_unpaired_losses(
    logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """[n] weighted losses, as `kto_losses` with kl = 0 (APO-zero's own form)."""
    ratio = torch.sigmoid(beta * (logps - reference_logps))
    losses = torch.where(labels, 1 - ratio, ratio)
    return losses * _weights(labels, losses, desirable_weight, undesirable_weight)


def dpo_losses(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """[pairs] losses from the log-ratios [pairs], sums over response tokens, and the numbers of
    those tokens.
    """
    if loss_type == "ipo":
        delta = chosen_ratio / chosen_tokens - rejected_ratio / rejected_tokens
        return (delta - 1 / (2 * beta)) ** 2
    delta = beta * (chosen_ratio - rejected_ratio)
    right, flipped = -logsigmoid(delta), -logsigmoid(-delta)
    if loss_type == "robust":
        mixed = (1 - label_smoothing) * right - label_smoothing * flipped
        return mixed / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * flipped


def _weights(labels: Tensor, like: Tensor, desirable: float, undesirable: float) -> Tensor:
    return torch.full_like(like, undesirable).masked_fill_(labels, desirable)


def kl_estimate(kl_logps: Tensor, reference_kl_logps: Tensor) -> Tensor:
    """KTO's KL to the reference: the mean log-ratio of mismatched pairs, not below zero; detached,
    a scalar.
    """
    return (kl_logps - reference_kl_logps).mean().detach().clamp(min=0)


def mismatched_completions(responses: Sequence[Sequence[int]]) -> list[int | None]:
    """Whose completion goes under each prompt in the KL estimate: the one before's, the first takes the last's, as TRL
    does. Where that is the same completion, as of two users who like one answer, the nearest one before it that is not:
    with its own the estimate would be the reward. None: there is no such one.
    """
    own = [tuple(response) for response in responses]
    sources: list[int | None] = []
    for i, response in enumerate(own):
        before = ((i - distance) % len(own) for distance in range(1, len(own)))
        sources.append(next((j for j in before if own[j] != response), None))
    return sources
