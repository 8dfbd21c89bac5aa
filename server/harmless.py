"""What is done for recording only may fail, and no request may feel it: recording ends then, for the rest of the run.

That is for memory that is not there, and for faults of ours alike. Serving runs in the same process, on the same thread
and over the same KV slots, so a failure must neither be raised to it nor leave half of a change behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol


class _Recording(Protocol):
    def stop_recording(self, error: Exception) -> None: ...


def harmless(default: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method that returns `default` when it fails, after its object's `stop_recording`."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def attempt(self: _Recording, *args: Any) -> Any:
            try:
                return method(self, *args)
            except Exception as error:
                self.stop_recording(error)
                return default

        return attempt

    return decorate


def guard(
    call: Callable[..., Any], default: Any, on_error: Callable[[Exception], None]
) -> Callable[..., Any]:
    """The same of a function."""

    def attempt(*args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            on_error(error)
            return default

    return attempt
