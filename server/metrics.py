"""Prometheus metrics of learning, beside SGLang's own on `/metrics` (with `--enable-metrics`).

Import only after SGLang has set up its multiprocess directory: prometheus_client reads it once, at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge

_PHASES = (
    "check_out",
    "rows",
    "forward",
    "reference",
    "loss",
    "backward",
    "optimizer",
    "save",
    "publish",
    "lease_wait",
)
_GAUGES = {
    "loss": "Loss of the last step",
    "kl": "KL estimate to the reference of the last step",
    "grad_norm": "Gradient norm of the last step, before clipping",
    "rewards/chosen": "Mean reward of up-votes in the last step",
    "rewards/rejected": "Mean reward of down-votes in the last step",
}
_POOL = {
    "slots_borrowed": "KV slots that hold recorded rows now",
    "slots_reclaimed": "KV slots that serving has taken back",
    "reclaim_p99_us_per_1000": "Microseconds to give a thousand slots back, 99th percentile",
    "hedge_backlog": "Rows that wait for their copy on the host",
    "hedged": "Rows copied to the host",
    "hedge_bytes_per_s": "Bytes a second while copies were made",
    "lost": "Tokens that were to be recorded and found no room",
    "skipped": "Tokens that were not recorded because copying them would have taken serving's time",
    "dropped": "Rows that ended before they had a copy, because serving wanted their slots",
    "tokens_voted": "Prompt tokens of answers that were voted on",
    "tokens_voted_held": "Of these, tokens that still had a row when the vote came",
}


class LearningMetrics:
    """One instance a process."""

    def __init__(self) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(
                f"alchemist_{name.replace('/', '_')}", text, multiprocess_mode="mostrecent"
            )

        self._last = {name: gauge(name, text) for name, text in _GAUGES.items()}
        self._live = gauge("live_version", "Number of the live version")
        self._steps = Counter("alchemist_steps", "Training steps committed")
        self._tokens = Counter("alchemist_tokens", "Training tokens by origin", ["origin"])
        self._seconds = Counter(
            "alchemist_step_seconds", "Seconds spent in steps, by phase", ["phase"]
        )
        self._rows = Gauge(
            "alchemist_rows",
            "Recorded rows by state",
            ["state"],
            multiprocess_mode="mostrecent",
        )
        self._pool = {name: gauge(name, text) for name, text in _POOL.items()}
        self._stopped = gauge(
            "recording_stopped", "1 when recording has failed and ended for the rest of the run"
        )
        self._restarts = Counter(
            "alchemist_trainer_restarts", "Times the trainer was started again"
        )

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """A step was committed; `metrics` are those of `GET /v1/training`'s `last_step`."""
        self._steps.inc()
        for name, instrument in self._last.items():
            if name in metrics:
                instrument.set(metrics[name])
        for origin in ("reused", "recomputed"):
            self._tokens.labels(origin).inc(metrics[f"tokens_{origin}"])
        for phase in _PHASES:
            self._seconds.labels(phase).inc(max(0.0, metrics.get(f"{phase}_s", 0.0)))

    def on_rows(self, stats: Mapping[str, Any]) -> None:
        """How the activation pool is: `ActivationPool.stats`."""
        for state, count in stats["rows"].items():
            self._rows.labels(state).set(count)
        self._stopped.set(stats["stopped"] is not None)
        for name, instrument in self._pool.items():
            if stats[name] is not None:
                instrument.set(stats[name])

    def on_live(self, version: int) -> None:
        self._live.set(version)

    def on_trainer_restart(self) -> None:
        self._restarts.inc()
