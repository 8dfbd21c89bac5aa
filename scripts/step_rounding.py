"""What rows in eight bits are worth and cost (`--activation-dtype fp8`), for `bench_step.py`.

    fp8_gradient_error            the adapter's gradient over rows whose gate_up is in eight bits against that over
                                  exact ones: norm of the difference ÷ norm; random weights
    fp8_gradient_error_embedded   the same of the embedded model, which was trained, on dialogues like those it knows
    bf16_gradient_error…          the same over float32 rows all of which were rounded to bfloat16
    fp8_row_bytes_vs_auto         a row on the host, with serving in bfloat16
    fp8_step_vs_auto              seconds of a step over exact rows ÷ over those, here of float32

The gate: an error is less than the encoding's largest, and not zero. How large depends on what is in the rows: where a
few of a token's numbers are much larger than the others, as in trained models, the others have fewer bits.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from bench_common import Row, Run, interleave, speed_up
from step_variants import OBJECTIVES, norm
from step_workload import Ours, WorkloadConfig, build_model, make_samples, model_config
from tiny_corpus import dialogue

from alchemist.protocol.layout import RowLayout
from alchemist.server.main import TINY_MODEL
from alchemist.trainer.families import ModelShape
from alchemist.trainer.step import Sample

KINDS: dict[str, dict[str, Any]] = {
    "fp8": {"activation_dtype": "fp8"},
    "bf16": {"rounded_to": torch.bfloat16},
}
MODELS = ("", "_embedded")
BYTES_ROW, STEP_ROW = "fp8_row_bytes_vs_auto", "fp8_step_vs_auto"
ROWS = [*(f"{kind}_gradient_error{m}" for m in MODELS for kind in KINDS), BYTES_ROW, STEP_ROW]
LARGEST_ERROR = 2.0**-4
"""Of a number in eight bits, relative to it."""
DIALOGUES = 32
OBJECTIVE = "kto"


def measure(run: Run, config: WorkloadConfig, repeats: int) -> None:
    """Every row of `ROWS` that is wanted."""
    if any(run.wants(f"{kind}_gradient_error") for kind in KINDS) or run.wants(STEP_ROW):
        ours, samples = Ours.of(build_model(config), config), make_samples(config)
        _errors(run, ours, samples, "")
        if run.wants(STEP_ROW):
            _seconds(run, ours, samples, repeats)
    if any(run.wants(f"{kind}_gradient_error_embedded") for kind in KINDS):
        _errors(run, *_embedded(config), "_embedded")
    if run.wants(BYTES_ROW):
        _bytes(run, ModelShape.from_config(model_config(config)))


def _embedded(config: WorkloadConfig) -> tuple[Ours, list[Sample]]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_MODEL)
    draw = random.Random(0)
    samples = []
    for i in range(DIALOGUES):
        *before, last = dialogue(draw)
        prompt = tokenizer.apply_chat_template(
            before, add_generation_prompt=True, return_dict=False
        )
        response = tokenizer(last["content"])["input_ids"] + [tokenizer.eos_token_id]
        samples.append(Sample(prompt_ids=prompt, response_ids=response, label=i % 2 == 0))
    return Ours.of(model.eval(), config), samples


def _errors(run: Run, ours: Ours, samples: Sequence[Sample], suffix: str) -> None:
    def gradient(**kind: Any) -> dict[str, torch.Tensor]:
        return ours.step(*_step_of(ours, samples, **kind)).grads

    exact = {name: g.clone() for name, g in gradient().items()}
    tokens = sum(len(s.prompt_ids) for s in samples)
    for name, kind in KINDS.items():
        if run.wants(f"{name}_gradient_error{suffix}"):
            found = gradient(**kind)
            error = norm({n: found[n] - exact[n] for n in exact}) / norm(exact)
            if not 0 < error < LARGEST_ERROR:
                sys.exit(f"gate: the gradient over {name} rows is off by {error:.1e}")
            row = Row(f"{name}_gradient_error{suffix}", error, "x", (error, error), 1)
            row.against = f"exact rows, {tokens} recorded tokens, {OBJECTIVE}"
            row.less_is_better = True
            run.add(row)


def _step_of(ours: Ours, samples: Sequence[Sample], **kind: Any) -> tuple[Any, ...]:
    """Arguments of `Ours.step`."""
    recorded, view = ours.record(samples, **kind)
    return recorded, OBJECTIVES[OBJECTIVE], view


def _seconds(run: Run, ours: Ours, samples: Sequence[Sample], repeats: int) -> None:
    arguments = {"auto": _step_of(ours, samples), "fp8": _step_of(ours, samples, **KINDS["fp8"])}
    steps = {name: lambda given=given: ours.step(*given) for name, given in arguments.items()}
    seconds = interleave(steps, repeats, STEP_ROW)
    against = f"{OBJECTIVE}, exact rows, {statistics.median(seconds['auto']):.2f} s a step"
    run.add(speed_up(STEP_ROW, seconds["auto"], seconds["fp8"], against=against))


def _bytes(run: Run, shape: ModelShape) -> None:
    layouts: dict[str, RowLayout] = {
        "auto": shape.row_layout(torch.bfloat16),
        "fp8": shape.row_layout(torch.bfloat16, "fp8"),
    }
    run.config["row"] = {
        name: {"bytes": layout.row_bytes, "slots": layout.slots_per_row}
        for name, layout in layouts.items()
    }
    ratio = layouts["fp8"].row_bytes / layouts["auto"].row_bytes
    against = f"{layouts['auto'].row_bytes} bytes a token, bfloat16"
    run.add(Row(BYTES_ROW, ratio, "x", (ratio, ratio), 1, against, less_is_better=True))
