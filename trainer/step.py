"""A training step's loss and gradient: samples by version, objective, reference, micro-batches.

Each group of samples is differentiated at the adapter that served it. The loss is over all samples
of the step however they are grouped or split: denominators are the step's, and KTO's KL estimate is
made from all its completions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from .batch import Pair, TokenBatch
from .families import ModelShape
from .lora import LoraAdapter
from .losses import apo_zero_unpaired_losses, kl_estimate, kto_losses, rotate_completions
from .objective import Objective, Sample, SampleResult, StepGradients, VersionGroup
from .replay import Gate, Phases, Replay
from .rows import ActivationView, Recorded, RowsRevoked
from .tree import num_unique_tokens
from .weights import BaseWeights

T = TypeVar("T")

__all__ = [
    "Objective",
    "ReplayEngine",
    "Sample",
    "SampleResult",
    "StepGradients",
    "VersionGroup",
]


class ReplayEngine:
    """Gradients and scores over borrowed base weights and recorded rows.

    Args:
        view: recorded rows; None: samples must not have any.
        gate: called at every layer boundary, forward and backward; may block. Blocking changes no
            result.
        max_tokens: unique tokens per micro-batch; a step with more is split, exactly. A sample that
            is longer by itself is a micro-batch of its own.
    """

    def __init__(
        self,
        weights: BaseWeights,
        shape: ModelShape,
        *,
        view: ActivationView | None = None,
        gate: Gate = lambda: None,
        max_tokens: int = 1 << 16,
    ) -> None:
        self.shape, self.view, self.gate, self.max_tokens = shape, view, gate, max_tokens
        self._weights = weights
        self._device = weights.device

    def gradients(
        self, samples: Sequence[Sample], adapter_as_served: LoraAdapter, objective: Objective
    ) -> StepGradients:
        """`step_gradients` of one version group."""
        return self.step_gradients([VersionGroup(adapter_as_served, samples)], objective)

    def step_gradients(self, groups: Sequence[VersionGroup], objective: Objective) -> StepGradients:
        """Loss and gradient over all samples of all groups. Revoked rows are recomputed and
        counted.
        """
        return _Step(self, groups, objective).run()

    def score(
        self,
        sequences: Sequence[Pair],
        adapter: LoraAdapter | None,
        recorded: Sequence[Recorded | None] | None = None,
    ) -> list[Tensor]:
        """Log-probability of every response token of every (prompt ids, response ids); no gradient.

        Args:
            adapter: None: the base model.
            recorded: rows that `adapter` served, per sequence.

        Raises:
            RowsRevoked: a recorded row was taken away.
        """
        return self.score_with(Phases(self._device), "forward", sequences, adapter, recorded)[0]

    def score_with(
        self,
        phases: Phases,
        phase: str,
        sequences: Sequence[Pair],
        adapter: LoraAdapter | None,
        recorded: Sequence[Recorded | None] | None = None,
    ) -> tuple[list[Tensor], int]:
        """`score`, with its time put under `phase`; also the number of tokens computed."""
        records = list(recorded) if recorded is not None else [None] * len(sequences)
        results: list[Tensor] = [torch.empty(0)] * len(sequences)
        computed = 0
        replay = self.replay(phases)
        for members in self.micro_batches(sequences):
            with phases.phase(phase):
                batch = TokenBatch(
                    [], [sequences[i] for i in members], [records[i] for i in members], self._device
                )
                state = replay.forward(batch, adapter, gradient=False)
            computed += batch.num_tokens - batch.num_recorded
            for i, logps in zip(members, state.logps, strict=True):
                results[i] = logps
        return results, computed

    def replay(self, phases: Phases) -> Replay:
        return Replay(self._weights, self.view, self.gate, phases)

    def micro_batches(self, sequences: Sequence[Pair]) -> list[list[int]]:
        """Indices of `sequences` in groups of at most `max_tokens` unique tokens; neighbours share
        prefixes.
        """
        whole = [(*prompt, *response[:-1]) for prompt, response in sequences]
        if not whole:
            return []
        if num_unique_tokens(whole) <= self.max_tokens:
            return [list(range(len(whole)))]
        batches: list[list[int]] = []
        size = 0
        previous: tuple[int, ...] = ()
        for i in sorted(range(len(whole)), key=lambda i: whole[i]):
            # In lexicographic order the new tokens of a sequence are those its predecessor does not
            # share.
            new = len(whole[i]) - _common_prefix(previous, whole[i])
            if not batches or size + new > self.max_tokens:
                batches.append([])
                size, new = 0, len(whole[i])
            batches[-1].append(i)
            size += new
            previous = whole[i]
        return batches

    def zero_grads(self, adapter: LoraAdapter) -> dict[str, Tensor]:
        wide = torch.float64 if self._weights.dtype == torch.float64 else torch.float32
        return {
            name: torch.zeros(t.shape, dtype=wide, device=self._device)
            for name, t in adapter.weights.items()
        }


class _Step:
    """One call of `step_gradients`."""

    def __init__(
        self, engine: ReplayEngine, groups: Sequence[VersionGroup], objective: Objective
    ) -> None:
        if not groups or not all(group.samples for group in groups):
            raise ValueError("a step needs at least one version group, and every group a sample")
        self.engine, self.objective = engine, objective
        self.adapters = [group.adapter for group in groups]
        self.samples = [sample for group in groups for sample in group.samples]
        self.group_of = [g for g, group in enumerate(groups) for _ in group.samples]
        self.phases = Phases(engine._device)
        self.grads = engine.zero_grads(self.adapters[0])
        self.results: dict[int, SampleResult] = {}
        self.count = len(self.samples)
        if objective.name == "sft":
            self.count = sum(len(s.response_ids) for s in self.samples if s.label)
        self.tokens_reused = self.tokens_recomputed = self.tokens_reference = 0
        self.rows_revoked = 0

    def run(self) -> StepGradients:
        used = [i for i, s in enumerate(self.samples) if s.label or self.objective.name != "sft"]
        by_group = [[i for i in used if self.group_of[i] == g] for g in range(len(self.adapters))]
        batches = [
            (g, [members[j] for j in chosen])
            for g, members in enumerate(by_group)
            for chosen in self.engine.micro_batches([self.samples[i].pair for i in members])
        ]
        mismatched = self._mismatched_pairs()
        # At base the mismatched pairs' log-ratio is zero: nothing to compute for what v0 served.
        reference, reference_kl = self._reference(used, mismatched)
        kl: float | None = None if mismatched else 0.0
        together = mismatched if len(batches) == 1 else {}
        if mismatched and not together:
            kl = self._kl_alone(mismatched, reference_kl)
        for group, members in batches:
            kl = self._micro_batch(group, members, together, reference, reference_kl, kl)
        return self._result(kl or 0.0)

    def _mismatched_pairs(self) -> dict[int, Pair]:
        """By sample: its prompt with the completion before it, where the log-ratio is not zero by
        construction.
        """
        if self.objective.name != "kto" or self.objective.reference != "base":
            return {}
        zero = [adapter.is_zero for adapter in self.adapters]
        source = rotate_completions(len(self.samples))
        return {
            i: (sample.prompt_ids, self.samples[source[i]].response_ids)
            for i, sample in enumerate(self.samples)
            if not zero[self.group_of[i]]
        }

    def _reference(
        self, used: list[int], mismatched: dict[int, Pair]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Base log-probabilities, summed, of samples and of mismatched pairs, for versions that are
        not the base.
        """
        if self.objective.name == "sft" or self.objective.reference != "base":
            return {}, {}
        zero = [adapter.is_zero for adapter in self.adapters]
        needed = [i for i in used if not zero[self.group_of[i]]]
        pairs = [self.samples[i].pair for i in needed] + list(mismatched.values())
        logps, computed = self.engine.score_with(self.phases, "reference", pairs, None)
        self.tokens_reference = computed
        sums = [token_logps.sum() for token_logps in logps]
        return (
            dict(zip(needed, sums, strict=False)),
            dict(zip(mismatched, sums[len(needed) :], strict=True)),
        )

    def _kl(self, policy: dict[int, Tensor], reference: dict[int, Tensor]) -> float:
        """Over all completions of the step; those missing here have a log-ratio of zero."""
        zeros = torch.zeros(len(self.samples), dtype=torch.float64)
        ours, base = zeros.clone(), zeros.clone()
        for i in policy:
            ours[i], base[i] = policy[i], reference[i]
        return float(kl_estimate(ours, base))

    def _kl_alone(self, mismatched: dict[int, Pair], reference: dict[int, Tensor]) -> float:
        """The KL estimate before several micro-batches that all need it."""
        policy: dict[int, Tensor] = {}
        for g, adapter in enumerate(self.adapters):
            members = [i for i in mismatched if self.group_of[i] == g]
            pairs = [mismatched[i] for i in members]

            def attempt(
                members: list[int] = members,
                pairs: list[Pair] = pairs,
                adapter: LoraAdapter = adapter,
            ) -> tuple[list[Tensor], int]:
                records = [self.samples[i].recorded for i in members]
                return self.engine.score_with(self.phases, "forward", pairs, adapter, records)

            if members:
                logps, computed = self._retry(members, attempt)
                self.tokens_recomputed += computed
                policy |= {i: t.sum() for i, t in zip(members, logps, strict=True)}
        return self._kl(policy, reference)

    def _retry(self, members: Iterable[int], attempt: Callable[[], T]) -> T:
        """Run `attempt`; when rows were revoked, forget those and run it again."""
        while True:
            try:
                return attempt()
            except RowsRevoked as revoked:
                self.rows_revoked += len(revoked.rows)
                self._forget(members, set(revoked.rows))

    def _forget(self, members: Iterable[int], gone: set[int]) -> None:
        bad = torch.tensor(sorted(gone))
        for i in members:
            record = self.samples[i].recorded
            if record is not None:
                rows = torch.where(torch.isin(record.rows, bad), -1, record.rows)
                self.samples[i] = replace(self.samples[i], recorded=replace(record, rows=rows))

    def _micro_batch(
        self,
        group: int,
        members: list[int],
        together: dict[int, Pair],
        reference: dict[int, Tensor],
        reference_kl: dict[int, Tensor],
        kl: float | None,
    ) -> float | None:
        """Forward, loss and backward of some samples of one group. Returns the KL estimate."""
        adapter = self.adapters[group]

        def attempt() -> tuple[TokenBatch, list[SampleResult], dict[str, Tensor], float | None]:
            replay = self.engine.replay(self.phases)
            with self.phases.phase("forward"):
                pairs = [self.samples[i].pair for i in members]
                records = [self.samples[i].recorded for i in [*members, *together]]
                batch = TokenBatch(pairs, list(together.values()), records, self.engine._device)
                state = replay.forward(batch, adapter, gradient=True)
            with self.phases.phase("loss"):
                estimate = kl
                if together:
                    sums = [t.sum() for t in state.logps[len(members) :]]
                    estimate = self._kl(dict(zip(together, sums, strict=True)), reference_kl)
                logps = state.logps[: len(members)]
                results, d_logps = self._loss(members, logps, reference, estimate or 0.0)
            grads = self.engine.zero_grads(adapter)
            with self.phases.phase("backward"):
                replay.backward(batch, state, adapter, d_logps, grads)
            return batch, results, grads, estimate

        batch, results, grads, kl = self._retry(members, attempt)
        self.tokens_reused += batch.num_recorded
        self.tokens_recomputed += batch.num_tokens - batch.num_recorded
        self.results |= dict(zip(members, results, strict=True))
        for name, grad in grads.items():
            self.grads[name].add_(grad)
        return kl

    def _loss(
        self,
        members: list[int],
        logps: Sequence[Tensor],
        reference: dict[int, Tensor],
        kl: float,
    ) -> tuple[list[SampleResult], list[Tensor]]:
        """Per-sample losses and the gradient of the step's loss by each log-probability."""
        goal = self.objective
        samples = [self.samples[i] for i in members]
        leaves = [t.detach().requires_grad_() for t in logps]
        with torch.enable_grad():
            sums = torch.stack([t.sum() for t in leaves])
            weights = torch.tensor(
                [s.weight for s in samples], dtype=sums.dtype, device=sums.device
            )
            base = sums.detach().clone()
            for row, i in enumerate(members):
                if i in reference:
                    base[row] = reference[i]
            if goal.name == "sft":
                losses = -sums * weights
            else:
                labels = torch.tensor([s.label for s in samples], device=sums.device)
                scales = {
                    "beta": goal.beta,
                    "desirable_weight": goal.desirable_weight,
                    "undesirable_weight": goal.undesirable_weight,
                }
                if goal.name == "kto":
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

    def _result(self, kl: float) -> StepGradients:
        skipped = SampleResult(torch.empty(0), 0.0, 0.0, 0.0)
        results = [self.results.get(i, skipped) for i in range(len(self.samples))]
        metrics = {"kl": kl}
        for name, wanted in (("chosen", True), ("rejected", False)):
            some = [self.results[i] for i in self.results if self.samples[i].label is wanted]
            if some:
                metrics[f"rewards/{name}"] = sum(r.reward for r in some) / len(some)
                metrics[f"logps/{name}"] = sum(float(r.logps.sum()) for r in some) / len(some)
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        phases = ("rows", "forward", "reference", "loss", "backward")
        return StepGradients(
            loss=sum(r.loss for r in results) / max(1, self.count),
            grads=self.grads,
            samples=results,
            kl=kl,
            tokens_reused=self.tokens_reused,
            tokens_recomputed=self.tokens_recomputed,
            tokens_reference=self.tokens_reference,
            seconds={name: self.phases.seconds.get(name, 0.0) for name in phases},
            rows_revoked=self.rows_revoked,
            metrics=metrics,
        )


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
