"""How benchmarks give a server its memory for activations, and what they read back of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from bench_common import Row

BARS = {"reclaim_p99_us_per_1000": 100.0}
TIMEOUT_S = 60.0


def budget_flags(host_gb: float, device_fraction: float = 1.0) -> list[str]:
    """And everything is recorded, whoever waits: these benchmarks are about its memory.

    Args:
        host_gb: GiB of the host tier; 0: none.
        device_fraction: share of the KV pool's slots that may be borrowed.
    """
    flags = {
        "--activation-host-gb": host_gb,
        "--activation-device-fraction": device_fraction,
        "--record-busy-share": 1,
    }
    return [word for name, value in flags.items() for word in (name, f"{value:g}")]


def full_status(http: httpx.Client) -> dict[str, Any]:
    """`GET /v1/training` with "activations" filled in: a scheduler in a long batch may not answer the first time.

    Raises:
        TimeoutError: it did not answer for a minute, or nothing is recorded.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        status: dict[str, Any] = http.get("/v1/training").raise_for_status().json()
        if status["activations"]:
            return status
        time.sleep(0.2)
    raise TimeoutError(f'/v1/training: no "activations" for {TIMEOUT_S:.0f} s')


def activation_rows(status: Mapping[str, Any]) -> list[Row]:
    """A row for each number under "activations" of `GET /v1/training`, named as there."""
    out = []
    for name, value in _numbers(status["activations"]):
        bar = BARS.get(name)
        row_name = name if bar is not None else f"activations_{name}"
        out.append(Row(row_name, value, _unit(name), (value, value), 1, None, bar, bar is not None))
    return out


def _numbers(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)


def _unit(name: str) -> str:
    if name.endswith("_bytes_per_s"):
        return "bytes/s"
    if name in ("lost", "skipped"):
        return "tokens"
    for unit in ("us", "rows", "slots", "tokens"):
        if unit in name.split("_"):
            return unit
    return "rows"
