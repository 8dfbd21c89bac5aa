"""A training step's loss and gradient: samples by version, objective, reference, micro-batches.

Each group of samples is differentiated at the adapter that served it. The loss is over all samples
of the step however they are grouped or split: denominators are the step's, and KTO's KL estimate is
made from all its completions. Where samples of different micro-batches meet in the loss (pairs served
by different versions, a user's loss), their log-probabilities are computed first, then differentiated.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from .batch import Pair, TokenBatch
from .families import ModelShape
from .lora import LoraAdapter
from .losses import kl_estimate, mismatched_completions
from .objective import Objective, Sample, SampleResult, StepGradients, VersionGroup
from .replay import Gate, Phases, Replay
from .rows import ActivationView, Recorded, RowsRevoked
from .step_loss import StepLoss
from .tree import num_unique_tokens
from .weights import BaseWeights

logger = logging.getLogger(__name__)

T = TypeVar("T")

__all__ = [
    "Objective",
    "ReplayEngine",
    "Sample",
    "SampleResult",
    "SampleTooLarge",
    "StepGradients",
    "VersionGroup",
]


class SampleTooLarge(MemoryError):
    """Memory does not suffice for a micro-batch that cannot be split.

    Attributes:
        samples: its members, counted through all version groups; empty: it is not known which.
    """

    def __init__(self, samples: list[int]) -> None:
        super().__init__("there is too little memory to train this completion by itself")
        self.samples = samples


class ReplayEngine:
    """Gradients and scores over borrowed base weights and recorded rows.

    Args:
        view: recorded rows; None: samples must not have any.
        gate: called at every layer boundary, forward and backward, and on a CPU between a layer's
            operations; may block. Blocking changes no result.
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
        counted. Where memory does not suffice, this step and those after it are split further.

        Raises:
            SampleTooLarge: there is too little for one sample (or pair) by itself; later steps are split as before.
        """
        before = self.max_tokens
        while True:
            step = None
            try:
                step = _Step(self, groups, objective)
                return step.run()
            except (RuntimeError, MemoryError) as error:
                if not is_of_memory(error):
                    raise
                # Frames hold what the attempt had.
                traceback.clear_frames(error.__traceback__)
                if self.view is not None:
                    self.view.forget()
            running = [] if step is None else step.running
            step = None
            if self.max_tokens == 1:
                self.max_tokens = before
                raise SampleTooLarge(running)
            self.max_tokens //= 2
            logger.warning("out of memory: steps are split at %d tokens now", self.max_tokens)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

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
        begun: Callable[[list[int]], None] = lambda members: None,
    ) -> tuple[list[Tensor], int]:
        """`score`, with its time put under `phase`; also the number of tokens computed.

        Args:
            begun: told which sequences are computed next, by index.
        """
        records = list(recorded) if recorded is not None else [None] * len(sequences)
        results: list[Tensor] = [torch.empty(0)] * len(sequences)
        computed = 0
        replay = self.replay(phases)
        for members in self.micro_batches(sequences):
            begun(members)
            with phases.phase(phase):
                batch = TokenBatch(
                    [], [sequences[i] for i in members], [records[i] for i in members], self._device
                )
                state = replay.forward(batch, adapter, gradient=False)
            computed += batch.num_tokens - batch.num_recorded
            for i, logps in zip(members, state.logps, strict=True):
                results[i] = logps
        return results, computed

    def foreign_token(self, prompt_ids: Sequence[int], recorded: Recorded) -> int | None:
        """Position of the first token whose row is another token's: what enters the first layer is the token's
        embedding, so the rows carry their own checksum. None: every row is its token's, or has ended meanwhile, which
        the step will notice by itself.
        """
        assert self.view is not None
        (where,) = torch.nonzero(recorded.rows >= 0, as_tuple=True)
        rows = recorded.rows[where]
        expected = self._weights.embed[torch.tensor(prompt_ids)[where].to(self._device)]
        found = torch.empty_like(expected)
        self.view.fetch(0, "x", rows, found)
        try:
            self.view.check(rows, recorded.gens[where])
            self.view.confirm()
        except RowsRevoked:
            return None
        (bad,) = torch.nonzero((found != expected).any(dim=-1), as_tuple=True)
        return int(where[bad[0]]) if bad.numel() else None

    def replay(self, phases: Phases) -> Replay:
        return Replay(self._weights, self.view, self.gate, phases)

    def micro_batches(
        self, sequences: Sequence[Pair], units: Sequence[Hashable] | None = None
    ) -> list[list[int]]:
        """Indices of `sequences` in groups of at most `max_tokens` unique tokens; neighbours share
        prefixes. Sequences with equal `units` stay together, whatever their length.
        """
        whole = [(*prompt, *response[:-1]) for prompt, response in sequences]
        if not whole:
            return []
        if num_unique_tokens(whole) <= self.max_tokens:
            return [list(range(len(whole)))]
        members: dict[Hashable, list[int]] = {}
        for i in sorted(range(len(whole)), key=lambda i: whole[i]):
            members.setdefault(units[i] if units else i, []).append(i)
        batches: list[list[int]] = []
        size = 0
        previous: tuple[int, ...] = ()
        for unit in members.values():
            new = _num_new([whole[i] for i in unit], previous)
            if not batches or size + new > self.max_tokens:
                batches.append([])
                size, new = 0, _num_new([whole[i] for i in unit], ())
            batches[-1].extend(unit)
            size += new
            previous = whole[unit[-1]]
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
        self.loss = StepLoss(objective, self.samples)
        self.tokens_reused = self.tokens_recomputed = self.tokens_reference = 0
        self.rows_revoked = 0
        self.no_estimate: set[int] = set()
        """Samples that have no part in the KL estimate."""
        self.running: list[int] = []
        """The samples that are computed."""

    def run(self) -> StepGradients:
        used = [i for i, s in enumerate(self.samples) if s.label or self.objective.name != "sft"]
        by_group = [[i for i in used if self.group_of[i] == g] for g in range(len(self.adapters))]
        batches = [
            (g, [members[j] for j in chosen])
            for g, members in enumerate(by_group)
            for chosen in self.engine.micro_batches(
                [self.samples[i].pair for i in members],
                [self.samples[i].match or i for i in members],
            )
        ]
        mismatched = self._mismatched_pairs()
        # At base the mismatched pairs' log-ratio is zero: nothing to compute for what v0 served.
        reference, reference_kl = self._reference(used, mismatched)
        kl: float | None = None if mismatched else 0.0
        together = mismatched if len(batches) == 1 and self._fit(used, mismatched) else {}
        if mismatched and not together:
            kl = self._kl_alone(mismatched, reference_kl)
        is_coupled = self.loss.is_coupled([members for _, members in batches])
        known = self._losses_first(batches, reference) if is_coupled else {}
        for group, members in batches:
            self.running = members
            kl = self._micro_batch(group, members, together, reference, reference_kl, kl, known)
        return self._result(kl or 0.0)

    def _fit(self, used: list[int], mismatched: dict[int, Pair]) -> bool:
        """Whether samples and mismatched pairs make one micro-batch."""
        pairs = [*(self.samples[i].pair for i in used), *mismatched.values()]
        return len(self.engine.micro_batches(pairs)) == 1

    def _losses_first(
        self, batches: list[tuple[int, list[int]]], reference: dict[int, Tensor]
    ) -> dict[int, tuple[SampleResult, Tensor]]:
        """Every sample's result and the gradient by its log-probabilities, from a forward of its own."""
        logps: dict[int, Tensor] = {}
        for group, members in batches:
            logps |= self._policy(group, {i: self.samples[i].pair for i in members})
        every = list(logps)
        results, d_logps = self.loss.differentiate(every, [logps[i] for i in every], reference, 0.0)
        return dict(zip(every, zip(results, d_logps, strict=True), strict=True))

    def _mismatched_pairs(self) -> dict[int, Pair]:
        """By sample: its prompt with another one's completion, where the log-ratio is not zero by construction."""
        if self.objective.name != "kto" or self.objective.reference != "base":
            return {}
        sources = mismatched_completions([sample.response_ids for sample in self.samples])
        self.no_estimate = {i for i, source in enumerate(sources) if source is None}
        zero = [adapter.is_zero for adapter in self.adapters]
        return {
            i: (self.samples[i].prompt_ids, self.samples[source].response_ids)
            for i, source in enumerate(sources)
            if source is not None and not zero[self.group_of[i]]
        }

    def _reference(
        self, used: list[int], mismatched: dict[int, Pair]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Base log-probabilities of samples [tokens], and of mismatched pairs, summed, for versions
        that are not the base.
        """
        if self.objective.name == "sft" or self.objective.reference != "base":
            return {}, {}
        zero = [adapter.is_zero for adapter in self.adapters]
        needed = [i for i in used if not zero[self.group_of[i]]]
        pairs = [self.samples[i].pair for i in needed] + list(mismatched.values())
        logps, computed = self.engine.score_with(
            self.phases, "reference", pairs, None, begun=self._begun([*needed, *mismatched])
        )
        self.tokens_reference = computed
        rest = [token_logps.sum() for token_logps in logps[len(needed) :]]
        return (
            dict(zip(needed, logps, strict=False)),
            dict(zip(mismatched, rest, strict=True)),
        )

    def _kl(self, policy: dict[int, Tensor], reference: dict[int, Tensor]) -> float:
        """Over all completions of the step that have one; those missing here have a log-ratio of zero."""
        estimated = [i for i in range(len(self.samples)) if i not in self.no_estimate]
        zeros = torch.zeros(len(estimated), dtype=torch.float64)
        ours, base = zeros.clone(), zeros.clone()
        for row, i in enumerate(estimated):
            if i in policy:
                ours[row], base[row] = policy[i], reference[i]
        return float(kl_estimate(ours, base))

    def _begun(self, samples: Sequence[int]) -> Callable[[list[int]], None]:
        """For `score_with`: notes whose tokens are computed.

        Args:
            samples: for each sequence that is scored, by index: the sample whose prompt it has.
        """

        def note(members: list[int]) -> None:
            self.running = sorted({samples[j] for j in members})

        return note

    def _kl_alone(self, mismatched: dict[int, Pair], reference: dict[int, Tensor]) -> float:
        """The KL estimate before several micro-batches that all need it."""
        policy: dict[int, Tensor] = {}
        for g in range(len(self.adapters)):
            pairs = {i: pair for i, pair in mismatched.items() if self.group_of[i] == g}
            policy |= self._policy(g, pairs) if pairs else {}
        return self._kl({i: t.sum() for i, t in policy.items()}, reference)

    def _policy(self, group: int, pairs: dict[int, Pair]) -> dict[int, Tensor]:
        """Log-probabilities of `pairs` (by the sample whose prompt they have) at a group's adapter."""

        def attempt() -> tuple[list[Tensor], int]:
            records = [self._record(i, pair) for i, pair in pairs.items()]
            adapter = self.adapters[group]
            sequences, begun = list(pairs.values()), self._begun([*pairs])
            return self.engine.score_with(
                self.phases, "forward", sequences, adapter, records, begun
            )

        logps, computed = self._retry(pairs, attempt)
        self.tokens_recomputed += computed
        return dict(zip(pairs, logps, strict=True))

    def _record(self, i: int, pair: Pair) -> Recorded | None:
        """What is recorded of `pair`: sample i's prompt with its own response, or with another one's."""
        record = self.samples[i].recorded
        if record is None or list(pair[1]) == list(self.samples[i].response_ids):
            return record
        return record.head(len(pair[0]))

    def _retry(self, members: Iterable[int], attempt: Callable[[], T]) -> T:
        """Run `attempt`; when rows were revoked, forget those and run it again."""
        while True:
            try:
                return attempt()
            except RowsRevoked as revoked:
                assert self.engine.view is not None
                self.engine.view.forget()
                self.rows_revoked += len(revoked.rows)
                self._forget(members, set(revoked.rows))

    def _forget(self, members: Iterable[int], gone: set[int]) -> None:
        bad = torch.tensor(sorted(gone))
        for i in members:
            record = self.samples[i].recorded
            if record is not None:
                self.samples[i] = replace(self.samples[i], recorded=record.without(bad))

    def _micro_batch(
        self,
        group: int,
        members: list[int],
        together: dict[int, Pair],
        reference: dict[int, Tensor],
        reference_kl: dict[int, Tensor],
        kl: float | None,
        known: dict[int, tuple[SampleResult, Tensor]],
    ) -> float | None:
        """Forward, loss and backward of some samples of one group. Returns the KL estimate."""
        adapter = self.adapters[group]

        def attempt() -> tuple[TokenBatch, list[SampleResult], dict[str, Tensor], float | None]:
            replay = self.engine.replay(self.phases)
            with self.phases.phase("forward"):
                pairs = [self.samples[i].pair for i in members]
                records = [self.samples[i].recorded for i in members]
                records += [self._record(i, pair) for i, pair in together.items()]
                batch = TokenBatch(pairs, list(together.values()), records, self.engine._device)
                state = replay.forward(batch, adapter, gradient=True)
            with self.phases.phase("loss"):
                estimate = kl
                if together:
                    sums = [t.sum() for t in state.logps[len(members) :]]
                    estimate = self._kl(dict(zip(together, sums, strict=True)), reference_kl)
                if known:
                    results, d_logps = ([known[i][part] for i in members] for part in (0, 1))
                else:
                    logps = state.logps[: len(members)]
                    results, d_logps = self.loss.differentiate(
                        members, logps, reference, estimate or 0.0
                    )
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
            loss=sum(r.loss for r in results) / max(1, self.loss.count),
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


def is_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: torch has a class of its own for its GPU allocator's, and words for others'."""
    is_out = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_out or any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED")
"""What a CPU's allocator says; CUDA, Triton's launcher and pinned memory; cuBLAS."""


def _num_new(sequences: Iterable[tuple[int, ...]], previous: tuple[int, ...]) -> int:
    """Tokens that each sequence does not share with the one before it: in lexicographic order, the
    new ones.
    """
    total = 0
    for sequence in sequences:
        total += len(sequence) - _common_prefix(previous, sequence)
        previous = sequence
    return total


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
