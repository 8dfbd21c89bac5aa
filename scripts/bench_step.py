"""One training step: with reuse, without reuse, and with TRL + PEFT, on the same completions, float32.

    python scripts/bench_step.py [--quick] [--only NAME,…] [--lengths FILE] [--json FILE|-]

The gate comes first: the adapter's gradient of every variant must agree with the recompute's (TRL's with ours, from the
same loss), else no number is printed. Variants are interleaved in rotated order. Time is of loss and gradient, without
the optimizer's update, which is the same for all. Memory: see `step_memory.py`; rows in eight bits:
`step_rounding.py`. `kto_real_lengths_vs_trl` needs a file of labelled conversations and is left out without one: see
`step_lengths.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import step_lengths
import step_memory
import step_rounding
import torch
from bench_common import Row, Run, interleave, progress, quartiles, speed_up
from step_gemms import backward_products
from step_memory import Peaks
from step_variants import LAYERS, SMALL, TOLERANCE, Variants, gate
from step_workload import WorkloadConfig

from alchemist.server import cpu
from alchemist.trainer.step import StepGradients

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
    "kto_base_1024_64_decode_vs_recompute": RowSpec(
        "1024_64", "kto recompute", "kto recorded decode", None
    ),
    "dpo_base_1024_64_decode_vs_recompute": RowSpec(
        "1024_64", "dpo recompute", "dpo recorded decode", None
    ),
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
LENGTHS_ROW = "kto_real_lengths_vs_trl"
LENGTHS_GROUP = 4
"""Conversations in a device batch, sorted by length: TRL pads a batch to its longest. Ours gets the same batches."""


class Sizes(NamedTuple):
    """What `--quick` makes smaller."""

    repeats: int
    peak_batch: int
    """completions whose memory is compared"""
    budget_batch: int
    """completions of TRL's step whose memory is the budget for ours"""
    most: int
    """completions, at most, that are tried in it"""
    conversations: int


SIZES = {False: Sizes(5, 8, 4, 16, 16), True: Sizes(2, 2, 2, 4, 4)}


def gemm_fraction(run: Run, config: WorkloadConfig, quick: bool) -> dict[str, float]:
    """How much of the backward phase is what its bare matrix products take; adds the row, returns the phases."""
    step, products = Variants(config).make_ours("sft recorded"), backward_products(config)
    fractions, phases = [], []
    step()
    for _ in progress(range(SIZES[quick].repeats), GEMM_ROW):
        phases.append(step()[0].seconds)
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


def sized(config: WorkloadConfig, quick: bool) -> WorkloadConfig:
    """The workload, with a model of a tenth of the work and at most four completions when quick."""
    if not quick:
        return config
    small = min(config.hidden_size, 768)
    return dataclasses.replace(
        config,
        hidden_size=small,
        num_heads=small // 128,
        num_kv_heads=max(1, small // 256),
        intermediate_size=3 * small,
        num_layers=2,
        batch=min(config.batch, 4),
    )


def measure(
    run: Run, workload: str, rows: dict[str, RowSpec], variants: Variants, repeats: int
) -> None:
    """Gate, then time the variants that `rows` name, and add the rows and what the configuration says of them."""
    names = sorted({variant for row in rows.values() for variant in (row.baseline, row.ours)})
    # A variant's first step, in the gate, is its warm-up.
    steps: dict[str, Callable[[], object]] = {name: variants.make(name) for name in names}
    gated: dict[str, Any] = dict(steps)
    for objective in {name.split()[0] for name in names}:
        # Something of every objective to compare with.
        if f"{objective} recompute" not in gated:
            gated[f"{objective} recompute"] = variants.make(f"{objective} recompute")
    errors = gate(dict(sorted(gated.items())))
    phases: dict[str, list[dict[str, float]]] = {}
    for name in names:
        if " trl" not in name:
            steps[name] = _kept_phases(variants.make_ours(name), phases.setdefault(name, []))
    seconds = interleave(steps, repeats, workload, warm_up=0)
    for name, found in phases.items():
        run.config["phases"][f"{workload} {name}"] = {
            phase: round(statistics.median(step[phase] for step in found), 4) for phase in found[0]
        }
    for name, row in rows.items():
        against = f"{row.baseline}, {statistics.median(seconds[row.baseline]):.2f} s a step"
        run.add(
            speed_up(name, seconds[row.baseline], seconds[row.ours], against=against, bar=row.bar)
        )
    for name in names:
        run.config["seconds"][f"{workload} {name}"] = round(statistics.median(seconds[name]), 4)
        if " trl" in name:
            run.config["trl"][f"{workload} {name}"] = variants.settings(name)
    run.config["gate"]["errors"] |= {f"{workload} {name}": e for name, e in errors.items()}


def _kept_phases(
    step: Callable[[], list[StepGradients]], found: list[dict[str, float]]
) -> Callable[[], object]:
    """The step, whose seconds by phase are added to `found`."""

    def run() -> None:
        parts = step()
        found.append({phase: sum(p.seconds[phase] for p in parts) for phase in parts[0].seconds})

    return run


def measure_lengths(run: Run, path: Path, quick: bool) -> None:
    """KTO at the lengths of real conversations, whose prompts a real server has answered."""
    served = step_lengths.serve(path, SIZES[quick].conversations)
    run.config["lengths"] = {"file": path.name, **served.as_json()}
    variants = Variants(
        SMALL, served.samples, num_recorded=served.num_recorded, group=LENGTHS_GROUP
    )
    row = RowSpec("lengths", "kto trl", "kto recorded", None)
    measure(run, "lengths", {LENGTHS_ROW: row}, variants, SIZES[quick].repeats)


def measure_memory(run: Run, peaks: Peaks, config: WorkloadConfig, quick: bool) -> None:
    sizes = SIZES[quick]
    for name, (baseline, ours, bar) in PEAKS.items():
        if run.wants(name):
            theirs = peaks.of(baseline, sizes.peak_batch)
            value = peaks.of(ours, sizes.peak_batch) / theirs
            against = f"{baseline}, {theirs / 2**20:.0f} MiB"
            run.add(Row(name, value, "x", (value, value), 1, against, bar, less_is_better=True))
    if run.wants(step_memory.ROW):
        run.config["same_memory"] = step_memory.same_memory(
            run, peaks, config, budget_batch=sizes.budget_batch, most=sizes.most, quick=quick
        )
    run.config["peak_bytes"] = peaks.as_json()
    for name, batch in peaks.measured:
        if " trl" in name:
            settings = Variants(dataclasses.replace(config, batch=batch)).settings(name)
            run.config["trl"][f"memory {name}, batch {batch}"] = settings


def main() -> None:
    parser = Run.parser(__doc__)
    parser.add_argument(
        "--lengths", type=Path, metavar="FILE", help=f"labelled conversations, for {LENGTHS_ROW}"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--peak-batch", type=int, help=argparse.SUPPRESS)
    options = Run.parse(parser)
    cpu.prepare()
    quick, lengths = options.quick, options.lengths
    if options.peak_of:
        config = dataclasses.replace(sized(LAYERS, quick), batch=options.peak_batch)
        print(json.dumps(step_memory.measure(options.peak_of, config)))
        return
    # The result names the file's conversations, not where it lies.
    del options.peak_of, options.peak_batch, options.lengths
    run = Run("step", options)
    known = [*ROWS, LENGTHS_ROW, GEMM_ROW, *step_rounding.ROWS, *PEAKS, step_memory.ROW]
    if unknown := sorted(set((options.only or known[0]).split(",")) - set(known)):
        parser.error(f"--only: no row {', '.join(unknown)}; rows are {', '.join(known)}")
    run.config = {
        "workloads": {n: dataclasses.asdict(sized(w, quick)) for n, w in WORKLOADS.items()},
        "threads": torch.get_num_threads(),
        "gate": {"tolerance": TOLERANCE, "errors": {}},
        "seconds": {},
        "phases": {},
        "trl": {},
    }

    for workload, config in WORKLOADS.items():
        wanted = {n: r for n, r in ROWS.items() if r.workload == workload and run.wants(n)}
        if wanted:
            measure(run, workload, wanted, Variants(sized(config, quick)), SIZES[quick].repeats)
    if run.wants(LENGTHS_ROW):
        if lengths:
            measure_lengths(run, lengths, quick)
        else:
            print(f"{LENGTHS_ROW}: left out, it needs --lengths FILE", file=sys.stderr)
    if run.wants(GEMM_ROW):
        run.config["sft_recorded_phases"] = gemm_fraction(run, sized(LAYERS, quick), quick)
    step_rounding.measure(run, sized(LAYERS, quick), SIZES[quick].repeats)
    command = [sys.executable, __file__, *(["--quick"] if quick else [])]
    measure_memory(run, Peaks(command), sized(LAYERS, quick), quick)
    run.finish()


if __name__ == "__main__":
    main()
