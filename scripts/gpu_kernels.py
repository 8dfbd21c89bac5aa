"""Part `kernels`: every kernel's error beside plain PyTorch's, both against float64: `tests/kernel_accuracy.py`.

A comparison is of one tensor, an output or a gradient. Its bar is that of the tests: twice PyTorch's largest error and
1.25 times its rms, plus a rounding for where PyTorch is exact by luck; that rounding is taken off before the ratio.

Nearly all of the time is Triton's compiler's, so comparisons are made by a process for each core, one for each dtype
and case, attention's by shape; this one compiles meanwhile what is to be timed when they are done.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gpu_alternatives as others
import torch
import torch.nn.functional as F
from gpu_part import Part
from gpu_rows import KERNEL_DTYPES
from gpu_timing import in_turn, ratios
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from alchemist.kernels import fp8_rows
from alchemist.kernels.path_attention import PathBlock, path_attention

SCRIPT = Path(__file__).parents[1] / "tests" / "kernel_accuracy.py"
sys.path.append(str(SCRIPT.parent))

from kernel_accuracy import shards  # noqa: E402

FACTORS = {"max": 2.0, "rms": 1.25}
TIMED_S = 16.0
"""Kept for what is timed after the comparisons."""
NO_RATIO = 1e6
"""Where PyTorch is exact and the kernel is not, by more than a rounding."""
_LOOK_S = 0.05


def ratio(comparison: dict[str, Any], kind: str) -> float:
    """Our error ÷ PyTorch's; at most the bar exactly when the comparison is passed."""
    plain, error = comparison[f"{kind}_plain"], comparison[f"{kind}_error"]
    floor = comparison[f"{kind}_allowed"] - FACTORS[kind] * plain
    if error <= floor:
        return 0.0
    # Written so that a NaN is no pass.
    value = (error - floor) / plain if plain else NO_RATIO
    return value if value < NO_RATIO else NO_RATIO


class Shard(NamedTuple):
    """What one process compares."""

    dtype: str
    name: str
    """of `kernel_accuracy.shards`"""

    @property
    def row(self) -> str:
        """The row that it is needed for."""
        return f"kernels_failed_{self.name.partition('/')[0]}_{self.dtype}"

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(SCRIPT), "--dtype", self.dtype, "--only", self.name]


class Comparisons:
    """Processes that compare, as many at once as there are cores, and what they have found."""

    def __init__(
        self, part: Part, waiting: Iterable[Shard], command: Callable[[Shard], list[str]]
    ) -> None:
        """Args:
        command: program of a shard, without its device.
        """
        self._part, self._command = part, command
        self._waiting = deque(waiting)
        self._all = list(self._waiting)
        self._running: dict[Shard, subprocess.Popen[bytes]] = {}
        self._ended: dict[Shard, str] = {}
        """Shard → why it is not complete; "": it is."""
        self.found: dict[Shard, list[dict[str, Any]]] = {}
        self.seconds: dict[str, float] = {}
        self._began: dict[Shard, float] = {}
        self._places = len(os.sched_getaffinity(0))

    def step(self) -> bool:
        """Start what there is a core for, and take what has ended; whether any is still to end."""
        for shard, process in list(self._running.items()):
            if process.poll() is not None:
                del self._running[shard]
                status = process.returncode
                self._end(shard, f"{SCRIPT.name} ended with status {status}" if status else "")
        while self._waiting and len(self._running) < self._places:
            self._start(self._waiting.popleft())
        return bool(self._running)

    def _log(self, shard: Shard) -> Path:
        return self._part.options.folder / f"kernels-{shard.dtype}-{shard.name.replace('/', '-')}"

    def _start(self, shard: Shard) -> None:
        # One thread each: there is one for every core.
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if self._part.device == "cpu":
            env["TRITON_INTERPRET"] = "1"
        self._began[shard] = time.monotonic()
        with self._log(shard).open("wb") as output:
            command = [*self._command(shard), "--device", self._part.device]
            self._running[shard] = subprocess.Popen(command, stdout=output, env=env)

    def _end(self, shard: Shard, why: str) -> None:
        self.seconds[f"{shard.dtype} {shard.name}"] = time.monotonic() - self._began[shard]
        lines = self._log(shard).read_text().splitlines(keepends=True)
        # The last one may be half of one.
        self.found[shard] = [json.loads(t) for t in lines if t[0] == "{" and t[-1] == "\n"]
        self._ended[shard] = why or ("" if self.found[shard] else "no comparison was made")
        mine = [other for other in self._all if other.row == shard.row]
        if any(self._ended.get(other, "not yet") for other in mine):
            return
        found = [comparison for other in mine for comparison in self.found[other]]
        self._part.add(shard.row, float(len(_failed(found))), n=len(found))

    def stop(self, why: str) -> None:
        """End those that still run; none begins any more."""
        for shard, process in self._running.items():
            process.kill()
            process.wait()
            self._end(shard, why)
        self._running.clear()
        for shard in self._waiting:
            self._ended[shard] = f"it had not begun: {why}"
        self._waiting.clear()

    def finish(self) -> None:
        """Wait for all that time suffices for, and write the rows."""
        while self.step():
            if self._part.left < TIMED_S:
                self.stop("the part's time was up")
                break
            time.sleep(_LOOK_S)
        self.report()

    def report(self) -> None:
        """The rows over all cases; each case that is not complete says which of its shards and why. What was compared
        counts even so; what was not has not passed.
        """
        part = self._part
        missing = {shard: why for shard, why in self._ended.items() if why}
        for shard in missing:
            said = [f"{s.name}: {why}" for s, why in missing.items() if s.row == shard.row]
            part.give_up([shard.row], "; ".join(said))
        found = [comparison for shard in self._all for comparison in self.found.get(shard, [])]
        part.config |= {
            "failed": _failed(found)[:40],
            "incomplete": {f"{s.dtype} {s.name}": why for s, why in missing.items()},
            "shard_s": self.seconds,
            "processes": self._places,
        }
        if not found:
            raise RuntimeError(next(iter(missing.values()), "no comparison was made"))
        note = f"{len(missing)} of {len(self._all)} shards incomplete" if missing else None
        part.add("kernels_cases", float(len(found)), against=note)
        for kind in FACTORS:
            worst = max(found, key=lambda c, kind=kind: ratio(c, kind))
            against = f"worst: {worst['case']}, {worst['tensor']}, {worst['dtype']}"
            against += f"; {note}" if note else ""
            value = ratio(worst, kind)
            part.add(f"kernels_{kind}_error", value, n=len(found), against=against)


def _failed(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [comparison for comparison in found if not comparison["ok"]]


def all_shards(*, is_small: bool) -> list[Shard]:
    """Those that take longest to compile first: attention, in float32, of large heads."""
    out = [
        Shard(dtype, name)
        for dtype in KERNEL_DTYPES
        for name in shards(getattr(torch, dtype), is_small=is_small)
    ]

    def effort(shard: Shard) -> tuple[bool, bool, int]:
        shape = shard.name.partition("/")[2]
        return bool(shape), shard.dtype == "float32", int(shape.rpartition("x")[2] or 0)

    return sorted(out, key=effort, reverse=True)


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


def _attention(part: Part) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Forward and backward of ours and of PyTorch's flash attention, which serves no tree; and queries."""
    leaves, plan = _sequence(part)
    q, k, v = leaves
    dy = torch.randn_like(q)

    def ours() -> Tensor:
        return path_attention(q, k, v, plan)

    def theirs() -> Tensor:
        heads_first = [t.transpose(0, 1)[None] for t in leaves]
        # No other of its kernels may take over.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return y[0].transpose(0, 1)

    outputs = {"ours": ours(), "theirs": theirs()}
    forward = {"ours": ours, "theirs": theirs}
    backward = {
        name: lambda y=y: torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for name, y in outputs.items()
    }
    return forward, backward, q


def attention(part: Part) -> None:
    """Both directions beside PyTorch's."""
    forward, backward, q = _attention(part)
    for name, functions in (("forward", forward), ("backward", backward)):
        seconds = in_turn(q.device, functions, 5 if part.tiny else 30)
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


def _eight_bits(part: Part) -> tuple[dict[str, Any], Tensor]:
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
    return functions, x


def eight_bits(part: Part) -> None:
    """Rows in eight bits and back, beside a plain copy of the activation: all are bound by memory."""
    functions, x = _eight_bits(part)
    seconds = in_turn(x.device, functions, 5 if part.tiny else 30)
    for name in ("encode", "decode"):
        against = f"{x.shape[0]} x {x.shape[1]}, {statistics.median(seconds[name]) * 1e3:.3f} ms"
        part.add(f"fp8_{name}_vs_copy", ratios(seconds["copy"], seconds[name]), against=against)


def compile_timed(part: Part, meanwhile: Callable[[], object]) -> None:
    """Have what is timed compiled, one call each, with `meanwhile` between them."""
    for functions in (*_attention(part)[:2], _eight_bits(part)[0]):
        for function in functions.values():
            function()
            meanwhile()


def main() -> None:
    part = Part.from_argv("kernels", __doc__ or "")
    speeds = [name for name in part.row_names if name.endswith("_vs_sdpa")]
    accuracy = [name for name in part.row_names if name.startswith("kernels")]
    eight = [name for name in part.row_names if name.startswith("fp8")]
    # The interpreter's shapes are the small ones.
    waiting = all_shards(is_small=part.device == "cpu")
    comparisons = Comparisons(part, waiting, lambda shard: shard.command)
    try:
        comparisons.step()
        compiling = lambda: compile_timed(part, comparisons.step)  # noqa: E731
        part.attempt("compiling what is timed", compiling, [])
        part.attempt("comparisons", comparisons.finish, accuracy)
    finally:
        comparisons.stop("the part was ended")
    part.attempt("attention's speed", lambda: attention(part), speeds, 2)
    part.attempt("FlashInfer", lambda: flashinfer_forward(part), ["attention_flashinfer"], 3)
    part.attempt("eight bits", lambda: eight_bits(part), eight, 2)
    errors = ["attention_pool_max_error", "attention_pool_rms_error"]
    part.attempt("reading the pool", lambda: others.pool_accuracy(part), errors, 3)
    speed = ["attention_pool_vs_copy"]
    part.attempt("the pool's speed", lambda: others.pool_speed(part), speed, 3)
    liger = [name for name in part.row_names if name.startswith("liger")]
    part.attempt("Liger", lambda: others.liger(part), liger, 10)
    # Last: torch's compiler makes its kernels.
    flex = [name for name in part.row_names if name.startswith("attention_flex")]
    part.attempt("FlexAttention", lambda: others.flex(part), flex, 30)


if __name__ == "__main__":
    main()
