"""The lease as `GET /v1/training` shows it."""

from __future__ import annotations

from typing import Any

from alchemist.protocol.lease import Lease
from alchemist.server.suspension import Suspension


def lease_status(lease: Lease, suspension: Suspension, policy: str) -> dict[str, Any]:
    """Its state now, and how fast the trainer has stood aside so far."""
    latencies = sorted(lease.latencies_ms() + suspension.latencies_ms())
    return {
        "policy": policy,
        "share": lease.share,
        "granted": lease.is_granted,
        "trainer_state": lease.state.name.lower(),
        "revocations": lease.num_acks + lease.num_suspended,
        "suspensions": lease.num_suspended,
        "revocations_missed": lease.num_missed,
        "revoke_p50_ms": _quantile(latencies, 0.5),
        "revoke_p99_ms": _quantile(latencies, 0.99),
        "revoke_max_ms": latencies[-1] if latencies else None,
        "longest_stretch_ms": lease.stretch_max_ms,
        "gates": lease.num_gates,
        "metered_s": lease.metered_s,
    }


def _quantile(ordered: list[float], q: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None
