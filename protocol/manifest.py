"""`manifest.json` of a version directory: written by the trainer, read by whoever publishes or checks the version."""

from __future__ import annotations

import msgspec

FILE = "manifest.json"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    parent: int | None
    """Version whose masters the step started from; None for v0."""
    step: int
    probe_ids: list[int]
    probe_logprobs: list[float]
    """The trainer's log p of probe_ids[1:] under this version as served, nats."""
    metrics: dict[str, float] = {}


def decode(data: bytes) -> Manifest:
    """Raises msgspec.ValidationError / DecodeError, both ValueError, for anything else."""
    return msgspec.json.decode(data, type=Manifest)


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)
