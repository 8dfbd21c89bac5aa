"""Losses as a user would write them, good and bad: named `user_losses:<function>` in tests."""

import os
import signal

import torch


def hinge(batch):
    """Squared hinge on the log-ratio, summed over samples."""
    ratio = ((batch.logps - batch.reference_logps) * batch.mask).sum(-1)
    sign = torch.where(batch.labels, 1.0, -1.0)
    return (batch.weights * torch.relu(1 - sign * ratio) ** 2).sum()


def vector(batch):
    return batch.logps.sum(-1)


def not_finite(batch):
    return batch.logps.sum() * float("nan")


def detached(batch):
    return batch.logps.detach().sum()


def unrelated(batch):
    return torch.ones((), requires_grad=True) * 2


def number(batch):
    return 1.0


def broken(batch):
    raise KeyError("advantage")


def infinite_gradient(batch):
    return (batch.logps.sum() * 0).sqrt()


def in_place(batch):
    scale = batch.logps.exp()
    loss = (scale**2).sum()
    scale.add_(1)
    return loss


def imaginary(batch):
    return batch.logps.sum() * 1j


def steep(batch):
    """Finite, and so is its gradient by the log-probabilities; not that by the weights."""
    return 1e36 * (batch.logps * batch.mask).sum()


def killed_by_two(batch):
    """As if memory did not suffice for two: the system would end the process like this."""
    if batch.labels.numel() > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch.logps.sum()


not_callable = 3
