"""A user's own loss, named `module:function`.

The function is given a `LossBatch` and returns the step's loss, a scalar that depends on `logps`. It sees all samples
of the step at once, however the engine splits the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alchemist.protocol.objectives import load_function


class UserLossError(ValueError):
    """The user's function cannot be found, failed, or returned something that is no loss; the message names it."""


@dataclass(frozen=True)
class LossBatch:
    """One step's samples: n of them, t response tokens in the longest. Float32 (float64 models: float64)."""

    logps: Tensor
    """[n, t] log-probabilities of response tokens at the version that served; 0 where `mask` is
    False. Requires grad."""
    reference_logps: Tensor
    """[n, t] the same at the reference; equal to `logps`, detached, for reference `served`."""
    mask: Tensor
    """[n, t] bool: True for response tokens."""
    labels: Tensor
    """[n] bool: True for up-votes and corrections."""
    weights: Tensor
    """[n] sample weights."""
    beta: float
    """--beta"""


UserLoss = Callable[[LossBatch], Tensor]


def load_user_loss(name: str) -> UserLoss:
    """The function that `module:function` names.

    Raises:
        UserLossError: there is none.
    """
    try:
        return load_function(name)
    except ValueError as error:
        raise UserLossError(str(error)) from None


def user_loss(name: str, function: UserLoss, batch: LossBatch) -> tuple[float, Tensor]:
    """The loss and its gradient by `batch.logps`, [n, t], zero where `mask` is False.

    Raises:
        UserLossError: the function failed, or its result is not a finite scalar that depends on `logps`.
    """
    try:
        loss = function(batch)
    except Exception as error:
        raise UserLossError(f"objective {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.ndim > 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise UserLossError(f"objective {name} returned {what}; allowed: a scalar tensor")
    if not loss.is_floating_point():
        raise UserLossError(f"objective {name} returned {loss.dtype}; allowed: a real number")
    if not bool(torch.isfinite(loss)):
        raise UserLossError(f"objective {name} returned {loss.item()}; allowed: a finite scalar")
    if not loss.requires_grad:
        raise UserLossError(
            f"objective {name} returned a value detached from the log-probabilities"
        )
    try:
        (grad,) = torch.autograd.grad(loss.sum(), batch.logps, allow_unused=True)
    except RuntimeError as error:
        raise UserLossError(f"objective {name} cannot be differentiated: {error}") from error
    if grad is None:
        raise UserLossError(f"objective {name} returned a value that does not depend on logps")
    if not bool(torch.isfinite(grad).all()):
        raise UserLossError(f"objective {name} has a gradient that is not finite")
    return float(loss.detach()), grad * batch.mask
