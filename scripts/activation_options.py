"""How benchmarks give a server its memory for activations, and what they read back of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from bench_common import Row

from alchemist.server.config import Config

HAS_TIERS = any(f.name.startswith("activation_host") for f in dataclasses.fields(Config))
"""Whether the server has a device tier and a host tier, or one reservation, `--activation-memory`."""
SMALLEST_GB = 1 / 16
"""What a budget of nothing is where the server knows one reservation only, which cannot be empty."""
BARS = {"reclaim_p99_us_per_1000": 100.0}


def budget_flags(host_gb: float, device_fraction: float = 1.0) -> list[str]:
    """Args:
    host_gb: GiB of the host tier; 0: none.
    device_fraction: share of the KV pool's slots that may be borrowed.
    """
    if HAS_TIERS:
        flags = {"host-gb": host_gb, "device-fraction": device_fraction}
        return [
            word for name, value in flags.items() for word in (f"--activation-{name}", f"{value:g}")
        ]
    return ["--activation-memory", f"{max(host_gb, SMALLEST_GB):.6f}GiB"]


def activation_rows(status: Mapping[str, Any]) -> list[Row]:
    """A row for each number under "activations" of `GET /v1/training`, named as there; none if there is no such key."""
    out = []
    for name, value in _numbers(status.get("activations") or {}):
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
    for unit in ("bytes", "ms", "us", "rows", "slots"):
        if unit in name.split("_"):
            return unit
    return ""
