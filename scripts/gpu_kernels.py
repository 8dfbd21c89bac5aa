"""Part `kernels`: every kernel's error beside plain PyTorch's, both against float64: `tests/kernel_accuracy.py`.

A comparison is of one tensor, an output or a gradient. Its bar is that of the tests: twice PyTorch's largest error and
1.25 times its rms, plus a rounding for where PyTorch is exact by luck; that rounding is taken off before the ratio.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_part import Part
from gpu_timing import in_turn, ratios
from torch import Tensor

from alchemist.kernels import fp8_rows
from alchemist.kernels.path_attention import PathBlock, path_attention

SCRIPT = Path(__file__).parents[1] / "tests" / "kernel_accuracy.py"
DTYPES = ("bfloat16", "float32")
FACTORS = {"max": 2.0, "rms": 1.25}
READ_S = 5.0
"""Kept for reading what was found."""
NO_RATIO = 1e6
"""Where PyTorch is exact and the kernel is not, by more than a rounding."""


def ratio(comparison: dict[str, Any], kind: str) -> float:
    """Our error ÷ PyTorch's; at most the bar exactly when the comparison is passed."""
    plain, error = comparison[f"{kind}_plain"], comparison[f"{kind}_error"]
    floor = comparison[f"{kind}_allowed"] - FACTORS[kind] * plain
    if error <= floor:
        return 0.0
    # Written so that a NaN is no pass.
    value = (error - floor) / plain if plain else NO_RATIO
    return value if value < NO_RATIO else NO_RATIO


def measure(part: Part) -> None:
    # Side by side: nothing is timed, and most of the time is Triton's compiler's.
    runs = {}
    for dtype in DTYPES:
        command = [sys.executable, str(SCRIPT), "--device", part.device, "--dtype", dtype]
        # Not a pipe: nobody reads while the other one runs.
        output = (part.options.folder / f"kernels-{dtype}.jsonl").open("w+")
        runs[dtype] = output, subprocess.Popen(command, stdout=output)
    found: list[dict[str, Any]] = []
    failures = []
    for dtype, (output, process) in runs.items():
        try:
            status = process.wait(max(1.0, part.left - READ_S))
        except subprocess.TimeoutExpired:
            # What was compared counts even if the rest is not there in time.
            process.kill()
            status = process.wait()
        output.seek(0)
        found += [json.loads(line) for line in output if line[0] == "{" and line[-1] == "\n"]
        output.close()
        if status:
            failures.append(f"{dtype}: {SCRIPT.name} ended with status {status}")
    if not found:
        raise RuntimeError("; ".join(failures) or "no comparison was made")
    worst = {kind: max(found, key=lambda c, kind=kind: ratio(c, kind)) for kind in FACTORS}
    failed = [comparison for comparison in found if not comparison["ok"]]
    part.config |= {"failed": failed[:40], "worst": worst, "aborted": failures}
    part.add("kernels_cases", float(len(found)))
    if failures:
        # What was not compared has not passed.
        raise RuntimeError(
            "; ".join(failures) + f"; {len(found)} comparisons before, {len(failed)} failed"
        )
    part.add("kernels_failed", float(len(failed)), n=len(found))
    for kind, comparison in worst.items():
        against = f"worst: {comparison['case']}, {comparison['tensor']}, {comparison['dtype']}"
        part.add(f"kernels_{kind}_error", ratio(comparison, kind), n=len(found), against=against)


def _sequence(part: Part) -> tuple[list[Tensor], list[PathBlock]]:
    """Queries, keys and values of one sequence in an 8B model's heads, and its plan."""
    device, num_tokens = torch.device(part.device), 256 if part.tiny else 4096
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    leaves = [
        torch.randn(num_tokens, n, 128, generator=generator, device=device, dtype=dtype)
        for n in (32, 8, 8)
    ]
    tokens = torch.arange(num_tokens)
    plan = [PathBlock(tokens.to(device), tokens, tokens.to(device))]
    return [leaf.requires_grad_() for leaf in leaves], plan


def attention(part: Part) -> None:
    """Both directions beside PyTorch's flash attention, which serves no tree."""
    device = torch.device(part.device)
    leaves, plan = _sequence(part)
    q, k, v = leaves
    dy = torch.randn_like(q)

    def ours() -> Tensor:
        return path_attention(q, k, v, plan)

    def theirs() -> Tensor:
        heads_first = [t.transpose(0, 1)[None] for t in leaves]
        y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return y[0].transpose(0, 1)

    outputs = {"ours": ours(), "theirs": theirs()}
    forward = {"ours": ours, "theirs": theirs}
    backward = {
        name: lambda y=y: torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for name, y in outputs.items()
    }
    for name, functions in (("forward", forward), ("backward", backward)):
        seconds = in_turn(device, functions, 5 if part.tiny else 30)
        part.add(
            f"attention_{name}_vs_sdpa",
            ratios(seconds["theirs"], seconds["ours"]),
            against=f"{q.shape[0]} tokens, {statistics.median(seconds['ours']) * 1e3:.3f} ms",
        )


def flashinfer_forward(part: Part) -> None:
    """Whether the missing rows' forward should be FlashInfer's."""
    from alchemist.kernels.path_attention import flashinfer

    if not flashinfer.is_available():
        raise RuntimeError("flashinfer is not installed")
    device = torch.device(part.device)
    leaves, plan = _sequence(part)
    q, k, v = (t.detach() for t in leaves)
    functions = {
        "triton": lambda: path_attention(q, k, v, plan),
        "flashinfer": lambda: flashinfer.forward(q, k, v, plan),
    }
    error = (functions["triton"]() - functions["flashinfer"]()).float().norm()
    error /= functions["triton"]().float().norm()
    part.config["flashinfer_error"] = float(error)
    # Two roundings to bfloat16 differ by less.
    if not float(error) < 0.02:
        raise RuntimeError(f"FlashInfer's outputs differ by {float(error):.1e} of their norm")
    seconds = in_turn(device, functions, 30)
    part.add("attention_flashinfer", ratios(seconds["triton"], seconds["flashinfer"]))


def eight_bits(part: Part) -> None:
    """Rows in eight bits and back, beside a plain copy of the activation: all are bound by memory."""
    device, (num_tokens, width) = (
        torch.device(part.device),
        (64, 1024) if part.tiny else (4096, 28_672),
    )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(num_tokens, width, generator=generator, device=device, dtype=dtype)
    encoded, out = fp8_rows.encode(x), torch.empty_like(x)
    functions = {
        "copy": lambda: out.copy_(x),
        "encode": lambda: fp8_rows.encode(x),
        "decode": lambda: fp8_rows.decode(encoded, out),
    }
    seconds = in_turn(device, functions, 5 if part.tiny else 30)
    for name in ("encode", "decode"):
        against = f"{num_tokens} x {width}, {statistics.median(seconds[name]) * 1e3:.3f} ms"
        part.add(f"fp8_{name}_vs_copy", ratios(seconds["copy"], seconds[name]), against=against)


def main() -> None:
    part = Part.from_argv("kernels", __doc__ or "")
    speeds = [name for name in part.row_names if name.endswith("_vs_sdpa")]
    accuracy = [name for name in part.row_names if name.startswith("kernels")]
    eight = [name for name in part.row_names if name.startswith("fp8")]
    part.attempt("attention's speed", lambda: attention(part), speeds, 5)
    part.attempt("FlashInfer", lambda: flashinfer_forward(part), ["attention_flashinfer"], 5)
    part.attempt("eight bits", lambda: eight_bits(part), eight, 5)
    part.attempt("comparisons", lambda: measure(part), accuracy)


if __name__ == "__main__":
    main()
