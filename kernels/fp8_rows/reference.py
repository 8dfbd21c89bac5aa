"""Plain torch: every number by itself, from a table of all e4m3 values."""

from __future__ import annotations

import torch
from torch import Tensor


def round_trip(x_TD: Tensor) -> Tensor:
    """decode(encode(x)), by looking for the nearest of the 127 magnitudes."""
    magnitudes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(x_TD.dtype)
    scales = (x_TD.abs().amax(dim=1, keepdim=True) / 448).clamp(min=2.0**-100)
    distances = (x_TD.abs() / scales).unsqueeze(-1) - magnitudes.to(x_TD.device)
    nearest = magnitudes.to(x_TD.device)[distances.abs().argmin(dim=-1)]
    return nearest * x_TD.sign() * scales
