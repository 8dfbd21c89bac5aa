"""The loss of a step's samples, whatever the objective: from log-probabilities to their gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .losses import apo_zero_unpaired_losses, dpo_losses, kto_losses
from .objective import Objective, Sample, SampleResult
from .user_loss import LossBatch, load_user_loss, user_loss


class StepLoss:
    """The samples' loss as a mean over the whole step, computed for any of them that are independent
    of the rest.

    Attributes:
        count: what the sum of losses is divided by: samples; response tokens (sft); pairs (dpo).
    """

    def __init__(self, objective: Objective, samples: Sequence[Sample]) -> None:
        """Raises:
        ValueError: objective dpo, and the samples are not pairs.
        UserLossError: there is no such function.
        """
        self.objective, self.samples = objective, samples
        self.count = len(samples)
        if objective.name == "sft":
            self.count = sum(len(s.response_ids) for s in samples if s.label)
        self.partner = _partners(samples) if objective.name == "dpo" else {}
        if self.partner:
            self.count = len(samples) // 2
        self.user_loss = load_user_loss(objective.name) if ":" in objective.name else None

    def is_coupled(self, batches: Sequence[Sequence[int]]) -> bool:
        """Whether, split so, a part's loss depends on the log-probabilities of another part."""
        if self.user_loss is not None:
            return len(batches) > 1
        return any(self.partner.get(i, i) not in members for members in batches for i in members)

    def differentiate(
        self,
        members: list[int],
        logps: Sequence[Tensor],
        reference: dict[int, Tensor],
        kl: float,
    ) -> tuple[list[SampleResult], list[Tensor]]:
        """Per-sample results and the gradient of the step's loss by each log-probability.

        Args:
            members: samples, by index; all that `is_coupled` says depend on each other.
            logps: their log-probabilities, [response tokens] each.
            reference: the same at the base, by index; missing: equal to the policy's.
            kl: KTO's estimate.
        """
        if self.user_loss is not None:
            return self._user_loss(members, logps, reference)
        goal = self.objective
        samples = [self.samples[i] for i in members]
        leaves = [t.detach().requires_grad_() for t in logps]
        with torch.enable_grad():
            sums = torch.stack([t.sum() for t in leaves])
            base = sums.detach().clone()
            for row, i in enumerate(members):
                if i in reference:
                    base[row] = reference[i].sum()
            weights = sums.new_tensor([s.weight for s in samples])
            labels = torch.tensor([s.label for s in samples], device=sums.device)
            scales = {
                "beta": goal.beta,
                "desirable_weight": goal.desirable_weight,
                "undesirable_weight": goal.undesirable_weight,
            }
            if goal.name == "sft":
                losses = -sums * weights
            elif goal.name == "dpo":
                losses = self._pair_losses(members, sums - base, weights)
            elif goal.name == "kto":
                losses = kto_losses(sums, base, labels, kl, **scales) * weights
            else:
                losses = apo_zero_unpaired_losses(sums, base, labels, **scales) * weights
            d_logps = list(torch.autograd.grad(losses.sum() / self.count, leaves))
        beta = 0.0 if goal.name == "sft" else goal.beta
        rewards = beta * (sums.detach() - base)
        results = [
            SampleResult(t.detach(), float(b), float(r), float(loss))
            for t, b, r, loss in zip(leaves, base, rewards, losses.detach(), strict=True)
        ]
        return results, d_logps

    def _pair_losses(self, members: list[int], ratios: Tensor, weights: Tensor) -> Tensor:
        """[n] half of its pair's loss for each sample, times the mean of the pair's weights."""
        row_of = {i: row for row, i in enumerate(members)}
        chosen = [i for i in members if self.samples[i].label]
        rows = torch.tensor([row_of[i] for i in chosen], device=ratios.device)
        other = torch.tensor([row_of[self.partner[i]] for i in chosen], device=ratios.device)
        tokens = ratios.new_tensor([len(self.samples[i].response_ids) for i in members])
        losses = dpo_losses(
            ratios[rows],
            ratios[other],
            tokens[rows],
            tokens[other],
            beta=self.objective.beta,
            loss_type=self.objective.loss_type,
            label_smoothing=self.objective.label_smoothing,
        )
        halves = losses * (weights[rows] + weights[other]) / 4
        return torch.zeros_like(ratios).index_add(0, rows, halves).index_add(0, other, halves)

    def _user_loss(
        self, members: list[int], logps: Sequence[Tensor], reference: dict[int, Tensor]
    ) -> tuple[list[SampleResult], list[Tensor]]:
        assert self.user_loss is not None
        samples = [self.samples[i] for i in members]
        own = [t.detach() for t in logps]
        base = [reference.get(i, t) for i, t in zip(members, own, strict=True)]
        policy = pad_sequence(own, batch_first=True).requires_grad_()
        lengths = torch.tensor([t.numel() for t in own], device=policy.device)
        batch = LossBatch(
            logps=policy,
            reference_logps=pad_sequence(base, batch_first=True),
            mask=torch.arange(policy.shape[1], device=policy.device) < lengths[:, None],
            labels=torch.tensor([s.label for s in samples], device=policy.device),
            weights=policy.new_tensor([s.weight for s in samples]),
            beta=self.objective.beta,
        )
        with torch.enable_grad():
            loss, grad = user_loss(self.objective.name, self.user_loss, batch)
        results = [
            # The loss is the step's, not the sample's: each is given an equal part of it.
            SampleResult(t, float(b.sum()), self.objective.beta * float((t - b).sum()), loss)
            for t, b in zip(own, base, strict=True)
        ]
        return results, [row[: t.numel()] for row, t in zip(grad, own, strict=True)]


def _partners(samples: Sequence[Sample]) -> dict[int, int]:
    """Both ways round, by index.

    Raises:
        ValueError: a sample's `match` does not name one desirable and one undesirable sample.
    """
    by_match: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_match.setdefault(sample.match, []).append(i)
    for match, members in by_match.items():
        if not match or sorted(samples[i].label for i in members) != [False, True]:
            raise ValueError(
                f"objective dpo wants pairs: {len(members)} sample(s) with match {match!r}"
            )
    return {i: j for a, b in by_match.values() for i, j in ((a, b), (b, a))}
