"""Peak memory of one step, each in a fresh process, and how many tokens fit where TRL's do.

A peak is what is resident at the step's highest, above what was resident before it. The base model and the recorded
rows belong to the server and are not counted, nor are keys and values, which are its cache's; `rows_counted` says what
would become of the figure if the rows were.

The gate of these figures: at equal batch, the gradients that the processes computed have the same norm.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_common import Row, Run
from step_variants import TOLERANCE, Variants, norm
from step_workload import WorkloadConfig, model_config

from alchemist.trainer.families import ModelShape

ROW = "tokens_same_memory_vs_trl"
BAR = 2.0
THEIRS, OURS, UNSPLIT = "sft trl", "sft recorded", "sft recorded whole"


class Peak(NamedTuple):
    num_bytes: int
    grad_norm: float


def measure(name: str, config: WorkloadConfig) -> Peak:
    """One warm-up on a single completion, then one step and its high-water mark."""
    step = Variants(config).make(name)
    Variants(dataclasses.replace(config, batch=1, prompt=32, response=4)).make(name)()
    gc.collect()
    # Give freed memory back, or the step would reuse it unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    grads = step()
    return Peak(_status("VmHWM") - before, norm(grads))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


class Peaks:
    """Peaks by variant and batch, each measured when it is first asked for.

    Args:
        command: what runs `measure` and prints its result; the variant and the batch are added to it.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._found: dict[tuple[str, int], Peak] = {}

    def of(self, name: str, batch: int) -> int:
        """Bytes.

        Raises:
            SystemExit: the process failed, or its gradient is not that of another variant at the same batch.
        """
        if (name, batch) not in self._found:
            command = [*self._command, "--peak-of", name, "--peak-batch", str(batch)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=3600
            )
            if done.returncode:
                raise SystemExit(
                    f"{name}: the process measuring its memory failed\n{done.stderr[-2000:]}"
                )
            peak = Peak(*json.loads(done.stdout.splitlines()[-1]))
            for (other, n), known in self._found.items():
                if (
                    n == batch
                    and abs(known.grad_norm - peak.grad_norm) > TOLERANCE * peak.grad_norm
                ):
                    raise SystemExit(
                        f"gate: at batch {batch} the gradients of {name} and {other} have norms "
                        f"{peak.grad_norm:.6g} and {known.grad_norm:.6g}"
                    )
            self._found[name, batch] = peak
        return self._found[name, batch].num_bytes

    @property
    def measured(self) -> list[tuple[str, int]]:
        """Variants and batches."""
        return list(self._found)

    def as_json(self) -> dict[str, int]:
        return {f"{name}, batch {n}": peak.num_bytes for (name, n), peak in self._found.items()}


class Fit(NamedTuple):
    """bytes = fixed + per_token · tokens"""

    fixed: float
    per_token: float

    @classmethod
    def of(cls, peaks: Peaks, name: str, batches: Iterable[int], tokens: int) -> Fit:
        """Least squares over `batches` completions of `tokens` tokens."""
        points = [(n * tokens, peaks.of(name, n)) for n in batches]
        slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
        return cls(intercept, slope)

    def tokens_within(self, budget: int) -> float:
        return (budget - self.fixed) / self.per_token


def same_memory(
    run: Run,
    peaks: Peaks,
    config: WorkloadConfig,
    *,
    budget_batch: int,
    most: int,
    quick: bool,
) -> dict[str, Any]:
    """Trainable tokens of one step in the memory that TRL takes for `budget_batch` completions: add the row, return the
    fits and what else is worth knowing; when `quick`, only what the row needs.

    Bytes grow linearly with tokens until our step is split; from there on they hardly grow. So the row is what was
    really run: `most` completions if those stay within the budget, else the fit's prediction or, if that was too much,
    less.
    """
    tokens = config.prompt + config.response
    budget = peaks.of(THEIRS, budget_batch)
    # So few are not split.
    ours = Fit.of(peaks, OURS, range(1, max(3, budget_batch // 2)), tokens)
    predicted = min(most, int(ours.tokens_within(budget) // tokens))
    split = _most_within(peaks, OURS, budget, [most, *_down_from(predicted)])
    bound = ", a lower bound: no more was tried" if split == most else ""
    against = (
        f"{THEIRS}, {budget_batch * tokens} tokens as one device batch in {budget / 2**20:.0f} MiB; "
        f"ours splits its step{bound}; recorded rows are the server's"
    )
    run.add(Row(ROW, split / budget_batch, "x", (split / budget_batch,) * 2, 1, against, BAR))
    shape = ModelShape.from_config(model_config(config))
    row_bytes = shape.row_layout(torch.float32).width * torch.float32.itemsize * shape.num_layers
    counted = _with_rows(peaks, ours, budget, split, tokens, config.prompt * row_bytes)
    found: dict[str, Any] = {
        "budget_bytes": budget,
        "budget_is": f"{THEIRS} at {budget_batch} completions of {tokens} tokens",
        "bytes": {OURS: ours._asdict()},
        "completions": split,
        "rows_counted": {
            "bytes_per_prompt_token": row_bytes,
            "completions": counted,
            "x": counted / budget_batch,
        },
    }
    if not quick:
        batches = (budget_batch // 4, budget_batch // 2, budget_batch)
        found["bytes"][THEIRS] = Fit.of(peaks, THEIRS, batches, tokens)._asdict()
        whole = _most_within(peaks, UNSPLIT, budget, _down_from(predicted))
        found["completions_in_one_device_batch"] = whole
    return found


def _down_from(count: int) -> list[int]:
    """`count` and ever fewer, to one."""
    counts = [max(1, count)]
    while counts[-1] > 1:
        counts.append(counts[-1] * 3 // 4)
    return counts


def _most_within(peaks: Peaks, name: str, budget: int, counts: list[int]) -> int:
    """The first of `counts` completions whose step stays within the budget; 0: none does."""
    return next((n for n in counts if peaks.of(name, n) <= budget), 0)


def _with_rows(peaks: Peaks, ours: Fit, budget: int, most: int, tokens: int, rows_each: int) -> int:
    """Completions within the budget when each also costs `rows_each` bytes: by the fit, or by the peak of `most`, which
    is no less than that of fewer, whichever is less.
    """
    ceiling = peaks.of(OURS, most) if most else budget
    for n in range(most, 0, -1):
        if min(ours.fixed + ours.per_token * n * tokens, ceiling) + n * rows_each <= budget:
            return n
    return 0
