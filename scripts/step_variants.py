"""The ways to make one training step, by name, and the gate that says that they are the same step.

A name is an objective and a kind: `kto recorded`, `sft trl checkpointing`.

    recorded    the prompts' rows are in a pool, as serving leaves them
    recompute   the same engine without rows
    trl         TRL + PEFT

`apart` after one of the first two: each completion laid out by itself, so that nothing is shared. `whole`: the step is
never split, however many tokens it has. `recorded decode`: the responses have rows, too, as with `--record decode`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from step_workload import (
    Ours,
    WorkloadConfig,
    as_pairs,
    build_model,
    make_samples,
    trl_settings,
    trl_step,
)
from torch import Tensor

from alchemist.trainer.rows import ActivationView
from alchemist.trainer.step import Objective, Sample, StepGradients

OBJECTIVES = {
    "sft": Objective(name="sft"),
    "kto": Objective(name="kto", reference="base"),
    "served": Objective(name="kto", reference="served"),
    "dpo": Objective(name="dpo", reference="base"),
}
LAYERS = WorkloadConfig()
SMALL = WorkloadConfig(
    hidden_size=512, num_layers=2, num_heads=8, num_kv_heads=4, intermediate_size=1536
)
TOLERANCE = 1e-4
"""Largest difference of two gradients, relative to their norm: float32 sums of about 1e5 terms in different orders
differ by some 1e-5.
"""
_MAX_TOKENS = {"apart": 1, "whole": 1 << 40}


class Variants:
    """Makes each variant's step when it is first asked for; one model for all of ours.

    Args:
        samples: completions with their votes; default: random ones of the workload's sizes.
        num_recorded: how many of each prompt's tokens are recorded, from its first on; default: all.
        group: completions in one device batch, of which a step then has several; its gradient is their mean. 0: all in
            one.
    """

    def __init__(
        self,
        config: WorkloadConfig,
        samples: Sequence[Sample] | None = None,
        *,
        num_recorded: Sequence[int] | None = None,
        group: int = 0,
    ) -> None:
        self.config = config
        self._ours: Ours | None = None
        self._votes = list(samples or make_samples(config))
        self._num_recorded = num_recorded
        self._group = group or len(self._votes)
        self._recorded: tuple[list[Sample], ActivationView] | None = None

    def make(self, name: str) -> Callable[[], dict[str, Tensor]]:
        """A function that makes one step and returns the adapter's gradient by PEFT name."""
        objective_name, kind, *rest = name.split()
        objective = OBJECTIVES[objective_name]
        if kind == "trl":
            # PEFT changes the model it is given: every TRL variant has its own.
            model = build_model(self.config)
            adapter = Ours.of(model, self.config).adapter
            return trl_step(
                model,
                self._labelled(objective.name),
                adapter,
                objective.name,
                device_batch=self._group,
                checkpointing=rest == ["checkpointing"],
            )
        step = self.make_ours(name)
        return lambda: _mean([part.grads for part in step()])

    def make_ours(self, name: str) -> Callable[[], list[StepGradients]]:
        """`make` of one of ours, with all that the engine says of each device batch."""
        objective_name, kind, *rest = name.split()
        ours, objective = self._engine(), OBJECTIVES[objective_name]
        samples = self._labelled(objective.name)
        view = None
        if rest == ["decode"]:
            samples, view = ours.record(samples, with_responses=True)
        elif kind == "recorded":
            self._recorded = self._recorded or ours.record(self._votes, self._num_recorded)
            prompts, view = self._recorded
            # By prompt: the second answer of a pair has the first one's.
            recorded = {tuple(s.prompt_ids): s.recorded for s in prompts}
            samples = [
                dataclasses.replace(s, recorded=recorded[tuple(s.prompt_ids)]) for s in samples
            ]
        groups = [samples[i : i + self._group] for i in range(0, len(samples), self._group)]
        limit = _MAX_TOKENS.get(rest[0]) if rest else None
        return lambda: [ours.step(group, objective, view, limit) for group in groups]

    def settings(self, name: str) -> dict[str, Any]:
        """TRL's settings of a variant."""
        objective_name, _, *rest = name.split()
        return trl_settings(
            OBJECTIVES[objective_name].name,
            self._group,
            rest == ["checkpointing"],
            -(-len(self._votes) // self._group),
        )

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The adapter's weights by PEFT name."""
        return self._engine().adapter.weights

    def _engine(self) -> Ours:
        self._ours = self._ours or Ours.of(build_model(self.config), self.config)
        return self._ours

    def _labelled(self, objective: str) -> list[Sample]:
        if objective == "sft":
            return [dataclasses.replace(s, label=True) for s in self._votes]
        return as_pairs(self._votes) if objective == "dpo" else self._votes


def _mean(grads: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(grads) == 1:
        return grads[0]
    return {name: torch.stack([g[name] for g in grads]).mean(0) for name in grads[0]}


def gate(steps: Mapping[str, Callable[[], dict[str, Tensor]]]) -> dict[str, float]:
    """Run every variant once: the gradients of one objective must agree across its variants. Relative errors by
    variant, but for the one of each objective that the others are compared with.

    Raises:
        SystemExit: two gradients differ by more than `TOLERANCE`.
    """
    first: dict[str, tuple[str, dict[str, Tensor]]] = {}
    errors: dict[str, float] = {}
    for name, step in steps.items():
        objective = name.split()[0]
        grads = {k: g.clone() for k, g in step().items()}
        reference_name, reference = first.setdefault(objective, (name, grads))
        if reference_name == name:
            continue
        difference = norm({k: grads[k] - reference[k] for k in reference})
        errors[name] = difference / norm(reference)
        if not errors[name] <= TOLERANCE:
            raise SystemExit(
                f"gate: the gradients of {name} and {reference_name} differ by {errors[name]:.1e}"
            )
    return errors


def norm(grads: Mapping[str, Tensor]) -> float:
    return sum(float(g.double().norm() ** 2) for g in grads.values()) ** 0.5
