"""Brings a trained version into service: a new adapter name, a probe, then new requests take it.

Never a reload under an old name (the radix tree would serve the old version's keys and values), never an unload of an
adapter that a request still uses (SGLang would hold back every load until it is drained).

Who uses an adapter is counted here. SGLang's own count drifts: a request whose client goes away, or that is refused
after it was given its adapter, is never taken off, and of `n` samples one too many is. It unloads what it counts 0
users of, and waits for that, with every other load, for as long as it takes. What the scheduler still computes for
nobody, the scheduler's plugin knows (`unloads`).
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alchemist.protocol import manifest
from alchemist.server.errors import Unavailable

logger = logging.getLogger(__name__)

PROBE_PREFIX = "alchemist-probe-"
HEALTH_PREFIX = "HEALTH_CHECK"
"""SGLang's own, of requests that are no client's."""


class PublishRefused(Unavailable):
    """The engine does not compute with this version what the trainer does.

    Attributes:
        is_busy: it could not be asked, and may be later.
    """

    def __init__(self, message: str, *, is_busy: bool = False) -> None:
        super().__init__(message)
        self.is_busy = is_busy


class Proven(NamedTuple):
    """A version that is loaded and computes what the trainer does."""

    difference: float
    """Mean |difference| of the probe's logprobs, nats per token."""
    load_s: float
    probe_s: float


class _Nobody:
    """Stands for SGLang's count of an adapter's users once there are none: an unload waits until it is 0."""

    def value(self) -> int:
        return 0

    async def increment(self, n: int = 1, notify_all: bool = True) -> None: ...

    async def decrement(self, n: int = 1, notify_all: bool = True) -> None: ...

    async def wait_for_zero(self) -> None: ...


class Publisher:
    """Owns which versions are loaded in the engine."""

    def __init__(self, tokenizer_manager: Any, keep: int, tolerance: float) -> None:
        """Args:
        keep: loaded versions beyond which idle old ones are unloaded.
        tolerance: largest mean |difference| of the probe's logprobs, nats per token.
        """
        self._manager = tokenizer_manager
        self._keep = keep
        self._tolerance = tolerance
        self.loaded: dict[int, str] = {}
        """version → lora_id."""
        self.live = 0
        """The version that answers requests which do not pin one."""
        self._users: Counter[int] = Counter()

    @contextlib.contextmanager
    def in_use(self, versions: Sequence[int]) -> Iterator[None]:
        """While a request is computed with them: they stay loaded."""
        self._users.update(versions)
        try:
            yield
        finally:
            self._users.subtract(versions)

    async def load(self, version: int, path: str) -> Proven:
        """Load and prove a version.

        Raises:
            PublishRefused: the adapter did not load or the probe disagrees; it is not loaded afterwards.
        """
        from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

        name = f"v{version}"
        await self.retire({self.live})
        room = self._manager.server_args.max_loaded_loras
        if room is not None and len(self.loaded) >= room:
            # SGLang would take out the one used longest ago, and wait for its users.
            raise PublishRefused(
                f"version {name}: all {room} adapters that may be loaded are in use", is_busy=True
            )
        try:
            proof = manifest.decode((Path(path) / manifest.FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise PublishRefused(f"version {name}: its manifest cannot be read: {error}") from None
        started = time.monotonic()
        result = await self._manager.load_lora_adapter(
            LoadLoRAAdapterReqInput(lora_name=name, lora_path=path)
        )
        if not result.success:
            raise PublishRefused(f"version {name} did not load: {result.error_message}")
        loaded = time.monotonic()
        try:
            difference = await self.probe(name, proof)
        except Exception as error:
            # Also what SGLang answers a client whose request it cannot take now.
            await self._unload(name)
            is_busy = getattr(error, "status_code", None) == 503
            reason = f"version {name}: its probe cannot be run: {error}"
            raise PublishRefused(reason, is_busy=is_busy) from error
        if not difference <= self._tolerance:
            await self._unload(name)
            raise PublishRefused(
                f"version {name}: the engine's logprobs of the probe differ from the trainer's by "
                f"{difference:.4f} nats per token, more than --probe-tolerance {self._tolerance}"
            )
        self.loaded[version] = self._manager.lora_ref_cache[name].lora_id
        return Proven(difference, loaded - started, time.monotonic() - loaded)

    async def probe(self, name: str, proof: manifest.Manifest) -> float:
        """Mean |difference| in nats between the engine's and the trainer's logprobs of the probe tokens.

        Infinite for an empty probe, which proves nothing. Raises ValueError for one the engine does not take.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(
            rid=PROBE_PREFIX + uuid.uuid4().hex,
            input_ids=proof.probe_ids,
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=0,
            lora_path=name,
        )
        out: dict[str, Any] = {}
        async for answer in self._manager.generate_request(request, None):
            out = answer
        # The first entry has no predecessor and no logprob.
        served = [entry[0] for entry in out["meta_info"]["input_token_logprobs"][1:]]
        pairs = list(zip(served, proof.probe_logprobs, strict=True))
        return sum(abs(a - b) for a, b in pairs) / len(pairs) if pairs else float("inf")

    async def drop(self, version: int) -> None:
        """Unload a version that did not go live, if it is loaded."""
        if self.loaded.pop(version, None) is not None:
            await self._unload(f"v{version}")

    async def retire(self, keep: set[int]) -> list[int]:
        """Unload the oldest idle versions until at most `keep` remain loaded; which ones went.

        Args:
            keep: versions that stay whatever their age (the live one).
        """
        gone: list[int] = []
        for version in sorted(self.loaded):
            if len(self.loaded) <= self._keep:
                break
            if version in keep or self._users[version] > 0:
                continue
            # First, so that no request is given it while it is on its way out.
            del self.loaded[version]
            await self._unload(f"v{version}")
            gone.append(version)
        return gone

    async def _unload(self, name: str) -> None:
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        lora_id = self._manager.lora_ref_cache[name].lora_id
        self._manager.lora_registry._counters[lora_id] = _Nobody()
        result = await self._manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))
        if not result.success:
            logger.warning("version %s was not unloaded: %s", name, result.error_message)
