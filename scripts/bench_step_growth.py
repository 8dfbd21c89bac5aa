"""How a step's cost grows with its prompt and with the completions on one prefix, and where its time goes.

    python scripts/bench_step_growth.py [--quick] [--only PART,…] [--json FILE|-] [--plot FILE.png]

Parts, all on a model of two layers with H 512, float32:

    prompt        sft on one completion, 256 to 8192 tokens in all: recorded, recompute, and the operations counted
    completions   sft on 1 to 32 completions that begin with the same 1024 tokens: ours; ours with every completion laid
                  out by itself; TRL, while that is few
    phases        seconds by phase of sft, kto against the base and kto against what served, recorded and recompute

The gate comes first, at every size: see `step_variants.py`; and the operations that the formula counts are those that
torch counts (`step_flops.py`).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import step_figures
import torch
from bench_common import Row, Run, interleave, quartiles, speed_up
from step_flops import counted, sft_flops
from step_variants import SMALL, TOLERANCE, Variants, gate

from alchemist.server import cpu
from alchemist.server.config import Config
from alchemist.trainer.optimizer import Optimizer, OptimizerConfig

PARTS = ("prompt", "completions", "phases")
RESPONSE = 64
OBJECTIVES = ("sft", "kto", "served")
KINDS = ("recorded", "recompute")


class Sizes(NamedTuple):
    """What `--quick` makes smaller."""

    repeats: int
    lengths: tuple[int, ...]
    """tokens of prompt and response"""
    completions: tuple[int, ...]
    trl: int
    """completions, at most, of TRL's steps"""


SIZES = {
    False: Sizes(5, (256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16, 32), 8),
    True: Sizes(2, (256, 1024), (1, 4), 4),
}


def seconds_row(name: str, seconds: Sequence[float]) -> Row:
    return Row(name, statistics.median(seconds), "s", quartiles(seconds), len(seconds))


def grow_prompt(run: Run, sizes: Sizes) -> None:
    for length in sizes.lengths:
        config = dataclasses.replace(SMALL, batch=1, prompt=length - RESPONSE, response=RESPONSE)
        variants = Variants(config)
        steps = {kind: variants.make(f"sft {kind}") for kind in KINDS}
        errors = gate({f"sft {kind}": step for kind, step in steps.items()})
        run.config["gate"]["errors"] |= {f"prompt {length} {n}": e for n, e in errors.items()}
        flops = {kind: sft_flops(config, recorded=kind == "recorded") for kind in KINDS}
        for kind, step in steps.items():
            if (found := counted(step)) != flops[kind].total:
                raise SystemExit(
                    f"gate: at {length} tokens {kind} is {found} operations, by formula {flops[kind].total}"
                )
        seconds = interleave(steps, sizes.repeats, f"prompt {length}", warm_up=0)
        for kind in KINDS:
            run.add(seconds_row(f"prompt_{length}_{kind}", seconds[kind]))
            giga = flops[kind].total / 1e9
            run.add(Row(f"prompt_{length}_{kind}_operations", giga, "GFLOP", (giga, giga), 1))
        expected = flops["recompute"].total / flops["recorded"].total
        run.add(
            speed_up(
                f"prompt_{length}_vs_recompute",
                seconds["recompute"],
                seconds["recorded"],
                against=f"recompute; {expected:.3g}x by operations",
            )
        )


def grow_completions(run: Run, sizes: Sizes) -> None:
    for count in sizes.completions:
        variants = Variants(
            dataclasses.replace(SMALL, shared=1024, prompt=128, response=RESPONSE, batch=count)
        )
        names = ["sft recorded", "sft recorded apart"]
        if count <= sizes.trl:
            names.append("sft trl")
            run.config["trl"][f"completions {count} sft trl"] = variants.settings("sft trl")
        steps = {name: variants.make(name) for name in names}
        errors = gate(steps)
        run.config["gate"]["errors"] |= {f"completions {count} {n}": e for n, e in errors.items()}
        seconds = interleave(steps, sizes.repeats, f"completions {count}", warm_up=0)
        ours = seconds["sft recorded"]
        for name in names:
            short = name.split()[-1]
            run.add(seconds_row(f"completions_{count}_{short}", seconds[name]))
            if name != "sft recorded":
                run.add(
                    speed_up(f"completions_{count}_vs_{short}", seconds[name], ours, against=name)
                )


def break_down(run: Run, sizes: Sizes) -> None:
    variants = Variants(SMALL)
    names = [f"{objective} {kind}" for objective in OBJECTIVES for kind in KINDS]
    errors = gate({name: variants.make(name) for name in names})
    run.config["gate"]["errors"] |= {f"phases {name}": e for name, e in errors.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    steps = {name: whole_step(variants, name, found[name]) for name in names}
    interleave(steps, sizes.repeats, "phases", warm_up=0)
    for objective in OBJECTIVES:
        medians = {}
        for kind in KINDS:
            steps_seconds = found[f"{objective} {kind}"]
            for phase in steps_seconds[0]:
                values = [seconds[phase] for seconds in steps_seconds]
                run.add(seconds_row(f"phases_{objective}_{kind}_{phase}", values))
            medians[kind] = statistics.median(s["forward"] for s in steps_seconds)
        shares = [
            (s["forward"] - medians["recorded"]) / sum(s.values())
            for s in found[f"{objective} recompute"]
        ]
        of_forward = 1 - medians["recorded"] / medians["recompute"]
        run.add(
            Row(
                f"phases_{objective}_repeated_forward",
                statistics.median(shares),
                "x",
                quartiles(shares),
                len(shares),
                against=f"recompute's step; {of_forward:.0%} of its forward",
            )
        )


def whole_step(variants: Variants, name: str, found: list[dict[str, float]]) -> Callable[[], None]:
    """A step with the optimizer's update, whose seconds by phase are added to `found`."""
    step = variants.make_ours(name)
    # Copies: the adapter that served stays as it is.
    masters = {key: weight.clone() for key, weight in variants.adapter.items()}
    optimizer = Optimizer(masters, OptimizerConfig(max_grad_norm=Config().max_grad_norm))

    def run() -> None:
        started = time.perf_counter()
        (gradients,) = step()
        updating = time.perf_counter()
        optimizer.step(gradients.grads)
        ended = time.perf_counter()
        other = updating - started - sum(gradients.seconds.values())
        found.append({**gradients.seconds, "optimizer": ended - updating, "other": other})

    return run


def main() -> None:
    parser = Run.parser(__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the three parts")
    options = Run.parse(parser)
    parts = options.only.split(",") if options.only else list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--only: no part {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    figure = options.plot
    # `Run` takes `only` for names of rows; a path is nobody's business.
    options.only = options.plot = None
    cpu.prepare()
    sizes = SIZES[options.quick]
    run = Run("step_growth", options)
    run.config = {
        "parts": parts,
        "model": dataclasses.asdict(SMALL),
        "sizes": sizes._asdict(),
        "threads": torch.get_num_threads(),
        "gate": {"tolerance": TOLERANCE, "errors": {}},
        "trl": {},
    }
    measures = {"prompt": grow_prompt, "completions": grow_completions, "phases": break_down}
    for part in parts:
        measures[part](run, sizes)
    if figure:
        step_figures.plot(run.rows, figure)
    run.finish()


if __name__ == "__main__":
    main()
