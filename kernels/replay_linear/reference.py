"""Plain torch: the formula, for autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import LoraPart


def replay_linear(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    parts: Sequence[LoraPart],
    scaling: float,
    splits: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    y = x_TD @ weight_ED.T
    if bias_E is not None:
        y = y + bias_E
    for part in parts:
        delta = scaling * (x_TD @ part.a.T) @ part.b.T
        y = y + torch.nn.functional.pad(delta, (part.start, weight_ED.shape[0] - part.end))
    return tuple(y.split(tuple(splits or (weight_ED.shape[0],)), dim=-1))
