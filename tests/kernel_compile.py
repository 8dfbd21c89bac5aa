"""Compiles every Triton kernel for Hopper (sm_90) without a GPU, at the shapes of 8B models, and prints one JSON object
a kernel: registers, bytes of stack (spilled registers) and of shared memory.

Nothing is launched: launches are made to stop after compilation, with tensors on the CPU for their dtypes and strides.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from kernel_accuracy import TREES, Bench, tree_plan
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from alchemist.kernels import dispatch, fp8_rows, linear_logprob, pack_rows, rms_norm, rope, swiglu
from alchemist.kernels.pack_rows import Field
from alchemist.kernels.path_attention import triton as attention

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class _Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(report: Callable[[str, object], None]) -> None:
    """From here on a launch compiles, calls `report(kernel name, compiled kernel)` and returns."""
    driver.set_active(_Hopper())

    def launcher(kernel: KernelInterface, grid: object) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            report(kernel.fn.__name__, kernel.run(*args, grid=grid, warmup=True, **kwargs))

        return launch

    KernelInterface.__getitem__ = launcher
    dispatch._INTERPRET = True


def usage(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    metadata = compiled.metadata
    return {
        "registers": registers,
        "stack": stack,
        "shared": metadata.shared,
        "warps": metadata.num_warps,
    }


def elementwise(bench: Bench) -> None:
    hidden, inner = 4096, 14336
    x, weight = bench.random(4, hidden), bench.random(hidden)
    for recorded in (None, x):
        _, _, rstd = rms_norm.triton.forward(x, x, weight, 1e-5, recorded)
    for d_sum in (None, x):
        rms_norm.triton.backward(x, rstd, weight, x, d_sum)
    heads, table = bench.random(4, 6144)[:, :4096].unflatten(-1, (32, 128)), bench.random(4, 64)
    rope.triton.forward(heads, table, table)
    rope.triton.backward(heads, table, table)
    rope.triton.forward(heads, table, table, weight[:128], 1e-6)
    rope.triton.backward(heads, table, table, heads, weight[:128], 1e-6)
    gate_up = bench.random(4, 2 * inner)
    swiglu.triton.forward(gate_up)
    swiglu.triton.backward(gate_up, gate_up[:, :inner])


def rows(bench: Bench) -> None:
    keys, values = bench.random(64, 1024), bench.random(64, 1024)
    cells = torch.randperm(64)[:44].view(2, 22)
    fields = [Field(bench.random(2, w), c) for w, c in ((4096, 8), (4096, 12), (28672, 16))]
    for function in (pack_rows.pack_rows, pack_rows.unpack_rows):
        function(fields, torch.arange(2), cells, keys, values)
        function(fields[:2], torch.arange(2), cells, keys, values)
    fp8_rows.decode(fp8_rows.encode(fields[2].value), torch.empty_like(fields[2].value))


def head(bench: Bench) -> None:
    h, weight = bench.random(3, 64), bench.random(1600, 64)
    at = torch.arange(3)
    for gradient in (False, True):
        result = linear_logprob.linear_logprob(h, weight, at, at, gradient=gradient)
    linear_logprob.linear_logprob_backward(result, weight, at, at, result.logps)


def paths(bench: Bench) -> None:
    for groups, dim in ((4, 128), (7, 128), (4, 64)):
        plan, num_queries, num_keys = tree_plan(bench, *TREES["branches"])
        q = bench.random(num_queries, 2 * groups, dim)
        k, v = bench.random(num_keys, 2, dim), bench.random(num_keys, 2, dim)
        attention.forward(q, k, v, plan, with_output=False)
        out, lse = attention.forward(q, k, v, plan)
        attention.backward(q, k, v, out, lse, out, plan)
        attention.merge_(out, lse, out, lse)


def main() -> None:
    seen: set[int] = set()
    place = ""

    def report(name: str, compiled: object) -> None:
        if id(compiled) not in seen:
            seen.add(id(compiled))
            print(json.dumps({"kernel": name, "for": place, **usage(compiled)}), flush=True)

    compile_only(report)
    import alchemist.kernels.rms_norm.triton
    import alchemist.kernels.rope.triton
    import alchemist.kernels.swiglu.triton  # noqa: F401

    for dtype in (torch.bfloat16, torch.float32):
        for function in (elementwise, rows, head, paths):
            place = f"{function.__name__}, {dtype}"
            function(Bench("cpu", dtype, is_small=True))


if __name__ == "__main__":
    main()
