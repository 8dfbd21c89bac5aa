"""Servers that a benchmark starts, each for as long as a `with` block."""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving_servers import Target


@contextlib.contextmanager
def started(name: str, module: list[str], args: list[str], folder: Path) -> Iterator[Target]:
    """A server that is starting, and ended with the block. Its client has the administrator's key, so that it may flush
    the cache; the rest of the API needs none.
    """
    key = secrets.token_hex(16)
    with Target(name, module, [*args, "--admin-api-key", key], folder) as target:
        target.http.headers["Authorization"] = f"Bearer {key}"
        yield target


def finish_training(target: Target) -> None:
    """Train what is pending."""
    target.http.post("/v1/training/flush").raise_for_status()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        status: dict[str, Any] = target.http.get("/v1/training").json()
        if not status["pending"]:
            return
        time.sleep(0.5)
    sys.exit(f"{status['pending']} votes are pending 300 s after a flush: {status['last_error']}")
