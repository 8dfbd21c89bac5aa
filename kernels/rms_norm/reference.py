"""Plain torch: the formula, for autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm(
    x_TD: Tensor, addend_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed = x_TD if addend_TD is None else x_TD + addend_TD
    wide = summed.double() if summed.dtype == torch.float64 else summed.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return summed, (normed * weight_D).to(summed.dtype)
