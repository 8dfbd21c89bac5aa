"""What SGLang says of itself: its Prometheus metrics, and the line it logs for every batch."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

LOG_EVERY_BATCH = ["--enable-metrics", "--decode-log-interval", "1"]
"""Flags with which `batches` sees every decode batch."""

_PREFILL = re.compile(
    r"Prefill batch.*?, #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+),"
)
_DECODE = re.compile(r"Decode batch.*?, #running-req: (\d+), #token: (\d+),.* #queue-req: (\d+)")


class Batches(NamedTuple):
    """Of a stretch of a server's log."""

    peak_tokens: int
    """most tokens that running requests held at once in the KV pool"""
    peak_running: int
    """most requests at once in a decode batch"""
    peak_queue: int
    prefills: int
    decodes: int
    admissions: int
    """requests in prefill batches: one that is chunked or was retracted counts again"""
    new_tokens: int
    """computed in prefill"""
    cached_tokens: int
    """found in the radix tree at admission"""


def batches(log: str) -> Batches:
    """Read the lines of a server started with `LOG_EVERY_BATCH`.

    Raises:
        ValueError: there is no batch in them: the lines of this SGLang look otherwise.
    """
    prefills = [tuple(map(int, match)) for match in _PREFILL.findall(log)]
    decodes = [tuple(map(int, match)) for match in _DECODE.findall(log)]
    if not prefills or not decodes:
        raise ValueError(f"{len(prefills)} prefill and {len(decodes)} decode batches in the log")
    running, tokens, queue = (max(column) for column in zip(*decodes, strict=True))
    new_seqs, new_tokens, cached = (sum(column) for column in zip(*prefills, strict=True))
    return Batches(
        tokens, running, queue, len(prefills), len(decodes), new_seqs, new_tokens, cached
    )


def metric_sums(text: str) -> Counter[str]:
    """Name of each sample on a `/metrics` page → sum over its labels; without buckets."""
    out: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" not in sample.labels:
                out[sample.name] += sample.value
    return out
