"""Plain torch: the formula, for autograd."""

from __future__ import annotations

from torch import Tensor

from alchemist.kernels.replay_linear.reference import replay_linear
from alchemist.kernels.swiglu.reference import swiglu

from . import Projection


def gated_mlp(
    x_TH: Tensor, gate_up: Projection, down: Projection, scaling: float
) -> tuple[Tensor, Tensor]:
    (inner,) = replay_linear(x_TH, *gate_up, scaling)
    (y,) = replay_linear(swiglu(inner), *down, scaling)
    return inner, y
