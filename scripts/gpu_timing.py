"""Seconds and peak memory of functions that work on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def in_turn(
    device: torch.device, steps: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each, in alternating order, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(-1, repeats):
        for name in names if i % 2 else reversed(names):
            synchronize(device)
            started = time.perf_counter()
            steps[name]()
            synchronize(device)
            if i >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    """Give unused memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(device: torch.device, step: Callable[[], object]) -> int:
    """What `step` takes at its highest above what is there before, after one warm-up: on a GPU what its tensors take,
    else what becomes resident.
    """
    step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    resident = _resident("VmRSS")
    step()
    # So small a step may stay within what is resident.
    return max(1, _resident("VmHWM") - resident)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def ratios(baseline: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Of the rounds, baseline ÷ ours."""
    return [b / o for b, o in zip(baseline, ours, strict=True)]


def profile(device: torch.device, step: Callable[[], object], most: int = 20) -> dict[str, object]:
    """Where one call's time goes: milliseconds in all, those in which the device worked, and its longest kernels (on a
    CPU: operations).
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    is_cuda = device.type == "cuda"
    if is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize(device)
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        synchronize(device)
    elapsed = time.perf_counter() - started
    # Of a GPU its own events only: an operator's count its kernels a second time.
    found = [
        (e.self_device_time_total if is_cuda else e.self_cpu_time_total, e.key, e.count)
        for e in recorded.key_averages()
        if not is_cuda or e.device_type.name == "CUDA"
    ]
    found.sort(reverse=True)
    return {
        "ms": elapsed * 1e3,
        "busy_ms": sum(us for us, _, _ in found) / 1e3,
        "longest": [
            {"name": name[:120], "ms": us / 1e3, "calls": calls} for us, name, calls in found[:most]
        ],
    }
