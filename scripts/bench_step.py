"""One training step: with reuse, without reuse, and with TRL + PEFT, on the same completions, float32.

    python scripts/bench_step.py [--quick] [--only NAME,…] [--json FILE|-]

The gate comes first: the adapter's gradient of every variant must agree with the recompute's (TRL's with ours, from the
same loss), else no number is printed. Variants are interleaved in rotated order. Time is of loss and gradient, without
the optimizer's update, which is the same for all. Peak memory is measured in a fresh process per variant, above what
was resident before the step; the base model and the recorded rows belong to the server and are not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_common import Row, Run, interleave, progress, quartiles, speed_up
from step_gemms import backward_products
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

from alchemist.server import cpu
from alchemist.trainer.step import Objective, StepGradients

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
WORKLOADS = {
    "1024_64": LAYERS,
    "4096_64": dataclasses.replace(LAYERS, prompt=4096, batch=1),
    "shared8": dataclasses.replace(SMALL, shared=1024, prompt=128, batch=8),
    "shared32": dataclasses.replace(SMALL, shared=1024, prompt=128, batch=32),
}


class RowSpec(NamedTuple):
    """One ratio: which variants of which workload, and its bar."""

    workload: str
    baseline: str
    ours: str
    bar: float | None


ROWS = {
    "sft_1024_64_vs_recompute": RowSpec("1024_64", "sft recompute", "sft recorded", 1.7),
    "kto_base_1024_64_vs_recompute": RowSpec("1024_64", "kto recompute", "kto recorded", 1.4),
    "dpo_base_1024_64_vs_recompute": RowSpec("1024_64", "dpo recompute", "dpo recorded", 1.4),
    "served_1024_64_vs_recompute": RowSpec("1024_64", "kto recompute", "served recorded", 2.4),
    "kto_base_1024_64_vs_trl": RowSpec("1024_64", "kto trl", "kto recorded", 2.2),
    "sft_1024_64_vs_trl": RowSpec("1024_64", "sft trl", "sft recorded", None),
    "sft_4096_64_vs_recompute": RowSpec("4096_64", "sft recompute", "sft recorded", 1.6),
    "kto_shared8_vs_trl": RowSpec("shared8", "kto trl", "kto recorded", 7.0),
    "kto_shared32_vs_trl": RowSpec("shared32", "kto trl", "kto recorded", None),
}
PEAKS = {
    "sft_peak_vs_trl": ("sft trl", "sft recorded", 0.53),
    "sft_peak_vs_trl_ckpt": ("sft trl checkpointing", "sft recorded", 1.0),
}
GEMM_ROW = "backward_gemm_fraction"
PEAK_BATCH, QUICK_PEAK_BATCH = 8, 2


class Variants:
    """Makes each variant's step when it is first asked for; one model for all of ours."""

    def __init__(self, config: WorkloadConfig) -> None:
        self.config = config
        self._ours: Ours | None = None
        samples = make_samples(config)
        self._votes = samples
        self._ups = [dataclasses.replace(s, label=True) for s in samples]
        self._pairs = as_pairs(samples)
        self._recorded: list[Any] | None = None

    def make(self, name: str) -> Callable[[], dict[str, Tensor]]:
        objective_name, kind = name.split(" ", 1)
        objective = OBJECTIVES[objective_name]
        samples = {"sft": self._ups, "dpo": self._pairs}.get(objective_name, self._votes)
        if kind.startswith("trl"):
            # PEFT changes the model it is given: every TRL variant has its own.
            model = build_model(self.config)
            adapter = Ours.of(model, self.config).adapter
            return trl_step(
                model, samples, adapter, objective.name, checkpointing="checkpointing" in kind
            )
        ours = self._ours = self._ours or Ours.of(build_model(self.config), self.config)
        if kind == "recorded":
            if self._recorded is None:
                self._recorded = ours.record(self._votes)
            # By prompt: the second answer of a pair has the first one's.
            recorded = {tuple(r.prompt_ids): r.recorded for r in self._recorded}
            samples = [
                dataclasses.replace(s, recorded=recorded[tuple(s.prompt_ids)]) for s in samples
            ]
        return lambda: ours.step(samples, objective).grads

    def recorded_step(self) -> Callable[[], StepGradients]:
        """One `sft recorded` step with its phases' seconds."""
        self.make("sft recorded")
        ours, samples = self._ours, self._recorded
        assert ours is not None
        assert samples is not None
        samples = [dataclasses.replace(s, label=True) for s in samples]
        return lambda: ours.step(samples, OBJECTIVES["sft"])


def gate(steps: dict[str, Callable[[], dict[str, Tensor]]]) -> None:
    """Gradients of one objective agree across its variants. Relative to the gradient's norm; float32 sums of about
    1e5 terms in different orders differ by some 1e-5.
    """
    first: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for name, step in steps.items():
        objective = name.split()[0]
        grads = {k: g.clone() for k, g in step().items()}
        reference_name, reference = first.setdefault(objective, (name, grads))
        error = sum(float((grads[k] - reference[k]).norm() ** 2) for k in reference) ** 0.5
        norm = sum(float(g.norm() ** 2) for g in reference.values()) ** 0.5
        if not error <= 1e-4 * norm:
            raise SystemExit(
                f"gate: the gradients of {name} and {reference_name} differ by {error / norm:.1e}"
            )


def gemm_fraction(run: Run, config: WorkloadConfig, quick: bool) -> dict[str, float]:
    """How much of the backward phase is what its bare matrix products take; adds the row, returns the phases."""
    step, products = Variants(config).recorded_step(), backward_products(config)
    fractions, phases = [], []
    step()
    for _ in progress(range(2 if quick else 5), "backward_gemm_fraction"):
        phases.append(step().seconds)
        started = time.perf_counter()
        for product in products:
            product()
        fractions.append((time.perf_counter() - started) / phases[-1]["backward"])
    run.add(
        Row(
            GEMM_ROW,
            statistics.median(fractions),
            "x",
            quartiles(fractions),
            len(fractions),
            against="torch.matmul of the same shapes",
            bar=0.7,
        )
    )
    return {name: statistics.median(p[name] for p in phases) for name in phases[0]}


def peak_bytes(name: str, quick: bool) -> int:
    """Peak resident bytes of one step above what was resident before it, in a fresh process."""
    command = [sys.executable, __file__, "--peak-of", name, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    if done.returncode:
        raise SystemExit(f"{name}: the process measuring its memory failed\n{done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def measure_peak(name: str, config: WorkloadConfig) -> int:
    """Run one warm-up on a single completion, then one step, and read the high-water mark."""
    step = Variants(config).make(name)
    Variants(dataclasses.replace(config, batch=1, prompt=32, response=4)).make(name)()
    gc.collect()
    # Give freed memory back, or the step would reuse it unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def sized(config: WorkloadConfig, quick: bool) -> WorkloadConfig:
    """The workload, with a model of a sixth of the work and at most eight completions when quick."""
    if not quick:
        return config
    small = min(config.hidden_size, 1024)
    return dataclasses.replace(
        config,
        hidden_size=small,
        num_heads=small // 128,
        num_kv_heads=max(1, small // 256),
        intermediate_size=3 * small,
        num_layers=2,
        batch=min(config.batch, 8),
    )


def measure(
    run: Run, rows: dict[str, RowSpec], config: WorkloadConfig, quick: bool
) -> dict[str, float]:
    """Gate, then time the variants that `rows` name, and add the rows; median seconds by variant."""
    names = sorted({variant for row in rows.values() for variant in (row.baseline, row.ours)})
    variants = Variants(config)
    # A variant's first step, in the gate, is its warm-up.
    steps = {name: variants.make(name) for name in names}
    gate(steps)
    seconds = interleave(steps, 2 if quick else 5, rows[next(iter(rows))].workload, warm_up=0)
    for name, row in rows.items():
        against = f"{row.baseline}, {statistics.median(seconds[row.baseline]):.2f} s a step"
        run.add(
            speed_up(name, seconds[row.baseline], seconds[row.ours], against=against, bar=row.bar)
        )
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Run.add_arguments(parser)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cpu.prepare()
    peak_config = dataclasses.replace(
        sized(LAYERS, options.quick), batch=QUICK_PEAK_BATCH if options.quick else PEAK_BATCH
    )
    if options.peak_of:
        peak = measure_peak(options.peak_of, peak_config)
        print(json.dumps({"peak_bytes": peak}))
        return
    del options.peak_of
    run = Run("step", options)
    known = [*ROWS, GEMM_ROW, *PEAKS]
    if unknown := sorted(set((options.only or known[0]).split(",")) - set(known)):
        parser.error(f"--only: no row {', '.join(unknown)}; rows are {', '.join(known)}")

    seconds: dict[str, float] = {}
    for workload, config in WORKLOADS.items():
        wanted = {n: r for n, r in ROWS.items() if r.workload == workload and run.wants(n)}
        if wanted:
            found = measure(run, wanted, sized(config, options.quick), options.quick)
            seconds |= {f"{workload} {name}": round(s, 4) for name, s in found.items()}

    phases: dict[str, float] = {}
    if run.wants(GEMM_ROW):
        phases = gemm_fraction(run, sized(LAYERS, options.quick), options.quick)

    peaks: dict[str, int] = {}
    for name, (baseline, ours, bar) in PEAKS.items():
        if not run.wants(name):
            continue
        for variant in (baseline, ours):
            if variant not in peaks:
                peaks[variant] = peak_bytes(variant, options.quick)
        value = peaks[ours] / peaks[baseline]
        against = f"{baseline}, {peaks[baseline] / 2**20:.0f} MiB"
        run.add(Row(name, value, "x", (value, value), 1, against, bar, less_is_better=True))

    run.config = {
        "workloads": {n: dataclasses.asdict(sized(w, options.quick)) for n, w in WORKLOADS.items()},
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "sft_recorded_phases": phases,
        "peak_bytes": peaks,
        "peak_batch": peak_config.batch,
        "trl": {name: trl_settings(name, LAYERS.batch, False) for name in ("sft", "kto")},
    }
    run.finish()


if __name__ == "__main__":
    main()
