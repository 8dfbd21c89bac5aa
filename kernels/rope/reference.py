"""Plain torch: the formula, for autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from alchemist.kernels.rms_norm.reference import add_rms_norm


def rope(x_TND: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    x1, x2 = x_TND.chunk(2, dim=-1)
    cos, sin = cos_TF.unsqueeze(-2), sin_TF.unsqueeze(-2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def norm_rope(
    x_TND: Tensor, weight_D: Tensor, eps: float, cos_TF: Tensor, sin_TF: Tensor
) -> Tensor:
    return rope(add_rms_norm(x_TND, None, weight_D, eps)[1], cos_TF, sin_TF)
