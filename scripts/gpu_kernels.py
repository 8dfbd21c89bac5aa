"""Part `kernels`: every kernel's error beside plain PyTorch's, both against float64: `tests/kernel_accuracy.py`.

A comparison is of one tensor, an output or a gradient. Its bar is that of the tests: twice PyTorch's largest error and
1.25 times its rms, plus a rounding for where PyTorch is exact by luck; that rounding is taken off before the ratio.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_part import Part

SCRIPT = Path(__file__).parents[1] / "tests" / "kernel_accuracy.py"
DTYPES = ("bfloat16", "float32")
FACTORS = {"max": 2.0, "rms": 1.25}
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
        status = process.wait()
        output.seek(0)
        found += [json.loads(line) for line in output if line.startswith("{")]
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


def main() -> None:
    part = Part.from_argv("kernels", __doc__ or "")
    part.attempt("comparisons", lambda: measure(part), part.row_names)


if __name__ == "__main__":
    main()
