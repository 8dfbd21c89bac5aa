"""The HTTP process's half of the plugin: routes, the version of each request, and the earliest sign of load.

`FRONT` exists from plugin load on; the `Learner` it speaks for comes with the running event loop.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any, NoReturn

from alchemist.protocol.lease import Lease
from alchemist.server import processes
from alchemist.server.errors import EngineFailed
from alchemist.server.learner import Learner
from alchemist.server.ledger import Ledger
from alchemist.server.pacing import Pace, Pacing, apply_policy
from alchemist.server.publisher import HEALTH_PREFIX, PROBE_PREFIX
from alchemist.server.record_choice import may_be_recorded, opt_out
from alchemist.server.run import Run
from alchemist.server.suspension import Suspension

_VERSION = re.compile(r"v\d+")
RESERVED = (PROBE_PREFIX, HEALTH_PREFIX)
"""How the ids of our own requests and of SGLang's begin."""
_RID = re.compile(r"[!-~]{8,256}")
"""When a client goes away, SGLang aborts every request whose id begins with that one's, a short one anybody's."""


class Front:
    """Called from the hooks in `hooks.main_hooks`."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.lease: Lease | None = None
        self.learner: Learner | None = None
        self.ledger: Ledger | None = None
        self.pacing: Pacing | None = None
        self.suspension: Suspension | None = None
        self.is_ending = False
        self._in_flight: set[int] = set()
        self._tickets = itertools.count()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def begin(self, run: Run, lease: Lease, ledger: Ledger) -> None:
        """The launcher has made this run; called before SGLang starts."""
        self.run, self.lease, self.ledger = run, lease, ledger
        self.suspension = Suspension(lease)
        self.pacing = apply_policy(run.load_config(), lease)

    def keep_all(self) -> None:
        """The server is about to end without its event loop: write what is queued."""
        if self.ledger is not None:
            self.ledger.close()

    def remove_run(self) -> None:
        """Leave no file of this run behind."""
        if self.run is not None:
            processes.remove_run(self.run.directory)

    def on_launch(self, result: None, *args: Any, **kwargs: Any) -> None:
        """AFTER SGLang has taken SIGQUIT, by which its children report a failure, until the event loop does."""
        signal.signal(signal.SIGQUIT, _on_failed_child)

    def on_setup(self, server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
        """BEFORE `_setup_and_run_http_server`: join the app."""
        from sglang.srt.entrypoints.http_server import app

        from alchemist.server.app import install

        install(app, self, server_args, tokenizer_manager)

    @contextlib.asynccontextmanager
    async def serving(self, learner: Learner) -> AsyncIterator[None]:
        """The span between the event loop's start and its end."""
        self.learner = learner
        await learner.start()
        try:
            yield
        finally:
            await learner.stop()

    # Requests

    def resolve_model(self, original: Any, serving: Any, request_model: str, explicit: Any) -> Any:
        """`model` is `base` or `vN`, or ends so after a colon: pin that version. Any other name is the live version's,
        also with a colon in it, after which SGLang would look for an adapter.
        """
        return _pinned(request_model or "") or explicit

    async def generate(
        self, original: Any, manager: Any, obj: Any, request: Any = None
    ) -> AsyncIterator[Any]:
        """AROUND `generate_request`: give the request its version, hold the lease off while it runs."""
        learner = self.learner
        _require_known_tokens(obj, manager.model_config.vocab_size)
        # Our probe, and SGLang's own requests.
        is_clients = request is not None and not request.url.path.startswith("/health")
        if is_clients:
            _require_sound_names(obj)
        rid = obj.rid if isinstance(obj.rid, str) else ""
        is_ours = not is_clients and rid.startswith(RESERVED)
        if learner is None or is_ours or not hasattr(obj, "sampling_params"):
            async for out in original(manager, obj, request):
                yield out
            return
        if is_clients:
            if not await may_be_recorded(request):
                opt_out(obj)
            await _pin_response(obj, request)
        versions = learner.conversations.route(obj)
        rids: set[str] = set()
        in_use = learner.publisher.in_use([int(name[1:]) for name in versions])
        try:
            with self._busy(), in_use, self._pace(obj) as pace:
                async for out in original(manager, obj, request):
                    for place, item in enumerate(out if isinstance(out, list) else [out]):
                        version = _version_of(item.get("index", place), versions, obj)
                        item["meta_info"]["weight_version"] = version
                        learner.conversations.saw(item["meta_info"]["id"], version, obj)
                        rids.add(item["meta_info"]["id"])
                        if pace is not None:
                            pace.saw(item["meta_info"])
                    yield out
        finally:
            for rid in rids:
                learner.conversations.forget(rid)

    @contextlib.contextmanager
    def _busy(self) -> Any:
        assert self.lease is not None
        ticket = next(self._tickets)
        self._in_flight.add(ticket)
        self.lease.set_front_busy(len(self._in_flight))
        try:
            yield
        finally:
            self._in_flight.discard(ticket)
            self.lease.set_front_busy(len(self._in_flight))

    def _pace(self, obj: Any) -> contextlib.AbstractContextManager[Pace | None]:
        if self.pacing is None:
            return contextlib.nullcontext()
        return self.pacing.watch(is_stream=bool(getattr(obj, "stream", False)))

    async def stream(
        self, original: Any, serving: Any, adapted_request: Any, *args: Any
    ) -> AsyncIterator[Any]:
        """AROUND the OpenAI stream generators: every chunk carries the `metadata` a whole answer has."""
        async for chunk in original(serving, adapted_request, *args):
            version = getattr(adapted_request, "alchemist_version", None)
            if version and isinstance(chunk, str) and chunk.startswith("data: {"):
                yield f'data: {{"metadata":{{"weight_version":"{version}"}},' + chunk.removeprefix(
                    "data: {"
                )
            else:
                yield chunk

    def name_choices(
        self, original: Any, serving: Any, request: Any, ret: Any, created: int
    ) -> Any:
        """AROUND the builders of whole OpenAI answers: of several choices each has an id of its own to be voted on, and
        the answer's is the first one's.
        """
        answer = original(serving, request, ret, created)
        if len(ret) > 1 and isinstance(getattr(answer, "metadata", None), dict):
            answer.metadata["completion_ids"] = [item["meta_info"]["id"] for item in ret]
        return answer


def _version_of(place: int, versions: list[str], obj: Any) -> str:
    """Of a batch's output `place`: SGLang gives all samples of the first prompt, then those of the second."""
    each = getattr(obj, "parallel_sample_num", None) or 1
    return versions[min(place // each, len(versions) - 1)]


def _require_sound_names(obj: Any) -> None:
    """Raises ValueError for an id or a cache namespace of a client's own that would harm others."""
    for field in ("rid", "extra_key"):
        value = getattr(obj, field, None)
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str):
                continue
            if field == "rid" and not (_RID.fullmatch(name) and not name.startswith(RESERVED)):
                raise ValueError(
                    f"rid is {ascii(name)[:80]}; allowed: 8 to 256 printable ASCII characters without spaces, "
                    f"not beginning with {' or '.join(RESERVED)}"
                )
            if not _is_unicode(name):
                raise ValueError(
                    f"{field} is {ascii(name)[:80]}; allowed: text without lone surrogates"
                )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _pin_response(obj: Any, request: Any) -> None:
    """SGLang's `/v1/responses` drops the version that `model` names."""
    if request.url.path.rstrip("/").endswith("/v1/responses") and obj.lora_path is None:
        body = await request.json()
        model = body.get("model") if isinstance(body, dict) else None
        if isinstance(model, str):
            obj.lora_path = _pinned(model)


def _pinned(model: str) -> str | None:
    """The version that a request's `model` names, by itself or after a colon; None: it names none."""
    name = model.rpartition(":")[2]
    return name if name == "base" or _VERSION.fullmatch(name) else None


def _require_known_tokens(obj: Any, vocab_size: int) -> None:
    """Raises ValueError for a token id that the model does not have: the scheduler would end by it."""
    ids = getattr(obj, "input_ids", None) or []
    for prompt in ids if isinstance(ids[0] if ids else None, list) else [ids]:
        for extreme in (min(prompt), max(prompt)) if prompt else ():
            if not 0 <= extreme < vocab_size:
                raise ValueError(f"input_ids has {extreme}; allowed: 0 to {vocab_size - 1}")


def _on_failed_child(number: int, frame: FrameType | None) -> NoReturn:
    raise EngineFailed("a process of SGLang failed while starting; what it said is above")


FRONT = Front()
