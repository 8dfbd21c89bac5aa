"""An adapter leaves the scheduler when nothing is computed with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Unload = Callable[[Any, Any], Any]
"""SGLang's `Scheduler.unload_lora_adapter`: (scheduler, request) → answer."""


class Unloads:
    """Of one scheduler. A request whose client has gone is still computed for a while, and SGLang would end by it."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Unload, Any]] = []

    def ask(self, original: Unload, scheduler: Any, request: Any) -> Any:
        """AROUND `Scheduler.unload_lora_adapter`: unload it now, or later if requests have it. The answer does not
        wait: by now no new request is given the adapter.
        """
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqOutput

        if request.lora_id not in _in_use(scheduler):
            return original(scheduler, request)
        self._waiting.append((original, request))
        return UnloadLoRAAdapterReqOutput(success=True)

    def go_on(self, scheduler: Any) -> None:
        """Unload what nobody has any more; to be called once a loop."""
        if not self._waiting:
            return
        in_use = _in_use(scheduler)
        waiting, self._waiting = self._waiting, []
        for original, request in waiting:
            if request.lora_id in in_use:
                self._waiting.append((original, request))
            else:
                original(scheduler, request)


def _in_use(scheduler: Any) -> set[str | None]:
    """Adapters of the requests that wait or run."""
    batches = [b for b in (scheduler.running_batch, scheduler.last_batch) if b is not None]
    requests = [request for batch in batches for request in batch.reqs]
    requests += [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
    if scheduler.chunked_req is not None:
        requests.append(scheduler.chunked_req)
    return {request.lora_id for request in requests}
