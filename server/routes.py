"""Who may call which route, and the guard that sees to it.

Every route of the app, SGLang's and ours, is in `ROUTES`; one that is not answers 403 until somebody has
thought about it. Keys come as `Authorization: Bearer KEY`.

| class   | no key set | --api-key set | --admin-api-key set |
|---------|------------|---------------|---------------------|
| open    | yes        | yes           | yes                 |
| user    | yes        | either key    | yes, unless --api-key is set too |
| control | yes        | API key       | admin key           |
| admin   | 403        | 403           | admin key           |

Reads of SGLang's configuration are `control`, since they show the admin key. Pausing, promoting and rolling
back are `control`: whoever may use a loopback server may also steer it, until there is an admin.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from re import Pattern
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from alchemist.server.errors import Forbidden, Unauthorized, UserError


class RouteClass(StrEnum):
    """Ordered from the freest to the strictest."""

    OPEN = "open"
    USER = "user"
    CONTROL = "control"
    ADMIN = "admin"


_STRICTNESS = {kind: rank for rank, kind in enumerate(RouteClass)}

_OPEN = "/health /health_generate /metrics"

_USER = """
/ /ping /docs /docs/oauth2-redirect /redoc /openapi.json
/v1/models /v1/models/{model:path} /get_model_info /model_info /weight_version /get_weight_version
/v1/chat/completions /v1/completions /v1/responses /v1/responses/{response_id}
/v1/responses/{response_id}/cancel /v1/messages /v1/messages/count_tokens /v1/realtime
/v1/embeddings /v1/classify /v1/score /v1/rerank /v1/audio/transcriptions
/tokenize /v1/tokenize /detokenize /v1/detokenize
/generate /encode /classify /invocations /vertex_generate /parse_function_call /separate_reasoning
/api/chat /api/generate /api/tags /api/show
/open_session /close_session
/get_load /v1/loads
/v1/feedback /v1/feedback/{feedback_id} /v1/completions/{completion_id}/receipt
/v1/training /v1/training/flush /v1/versions
"""

_CONTROL = """
/get_server_info /server_info
/v1/training/pause /v1/training/resume /v1/versions/rollback /v1/versions/{version}/promote
"""

_ADMIN = """
/update_weights_from_disk /update_weights_from_tensor /update_weights_from_distributed
/update_weights_from_ipc /update_weight_version /init_weights_update_group
/destroy_weights_update_group /init_weights_send_group_for_remote_instance
/send_weights_to_remote_instance /get_remote_instance_transfer_engine_info
/remote_instance_transfer_engine_info /get_weights_by_name /weights_checker
/load_lora_adapter /load_lora_adapter_from_tensors /unload_lora_adapter
/flush_cache /clear_hicache_storage_backend /hicache/storage-backend/clear /hicache/storage-backend
/add_external_corpus /remove_external_corpus /list_external_corpora
/release_memory_occupation /resume_memory_occupation /slow_down /set_internal_state
/pause_generation /continue_generation /abort_request
/configure_logging /set_trace_level /start_profile /stop_profile /freeze_gc
/start_expert_distribution_record /stop_expert_distribution_record
/dump_expert_distribution_record /scale_elastic_ep /is_scaling_elastic_ep
"""

ROUTES: dict[str, RouteClass] = {
    path: kind
    for kind, paths in (
        (RouteClass.OPEN, _OPEN),
        (RouteClass.USER, _USER),
        (RouteClass.CONTROL, _CONTROL),
        (RouteClass.ADMIN, _ADMIN),
    )
    for path in paths.split()
}
"""Path template, as the app has it → class."""

_PRIVATE = (
    *("/v1/feedback", "/v1/training", "/v1/versions", "/v1/completions/"),
    *("/server_info", "/get_server_info"),
)
"""What without a key no web page may reach through its visitor's browser."""

_TRAINED_FROM = (
    *("/update_weights_from_", "/load_lora_adapter", "/unload_lora_adapter"),
    *("/release_memory_occupation", "/resume_memory_occupation"),
)
"""What would change the weights that the trainer maps and versions were made for, or the adapters that are versions."""


class Leaf(NamedTuple):
    """One route of an app, nested routers unfolded."""

    path: str
    """Template, prefixes included."""
    regex: Pattern[str]
    kind: RouteClass | None
    """None: nobody has classified it."""


def unfold(routes: Iterable[Any]) -> Iterator[Any]:
    """Every route, of included routers too: some versions of FastAPI keep such a router as one route."""
    for route in routes:
        if hasattr(route, "effective_candidates"):
            yield from unfold(route.effective_candidates())
            yield from unfold(route.effective_low_priority_routes())
        else:
            yield getattr(route, "starlette_route", None) or route


def walk(routes: Iterable[Any]) -> Iterator[Leaf]:
    """Every route: HTTP, WebSocket and mounts. Raises TypeError for a kind whose path it cannot tell."""
    for route in unfold(routes):
        path, regex = getattr(route, "path", None), getattr(route, "path_regex", None)
        if path is None or regex is None:
            raise TypeError(f"cannot tell the path of route {route!r}")
        yield Leaf(path, regex, ROUTES.get(path))


class RouteGuard:
    """ASGI middleware: answers 401 or 403 in OpenAI's envelope, or lets the request through.

    A path that several routes match is judged by the strictest, whatever the method, so that nothing
    depends on which of them the router would take.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Sequence[BaseRoute],
        host: str = "localhost",
        is_training: bool = False,
        api_key: str | None = None,
        admin_api_key: str | None = None,
    ) -> None:
        """Args:
        routes: of the app itself; read when requests come, since routes are still added after this.
        host: the server's `--host`.
        is_training: whether there is a trainer.
        """
        self.app = app
        self._routes = routes
        self._host, self._is_training = host, is_training
        self._api_key = api_key or None
        self._admin_api_key = admin_api_key or None
        self._leaves: list[Leaf] = []
        self._num_routes = -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._judge(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
            response = JSONResponse(refusal.envelope(), refusal.status, headers=headers)
            await response(scope, receive, send)
        else:
            # Before it is accepted, a WebSocket that is closed is answered 403 by the server.
            await send({"type": "websocket.close", "code": 1008, "reason": refusal.message})

    def _judge(self, scope: Scope) -> UserError | None:
        headers = Headers(scope=scope)
        if scope.get("method") == "OPTIONS":
            return None
        path = route_path(scope)
        kinds = [leaf.kind for leaf in self._all_leaves() if leaf.regex.match(path)]
        if not kinds:
            return None
        known = [kind for kind in kinds if kind is not None]
        if len(known) < len(kinds):
            return Forbidden(f"{path} is not classified; this server does not serve it")
        refusal = self._judge_key(max(known, key=_STRICTNESS.__getitem__), headers, path)
        if refusal is None and self._is_training and path.startswith(_TRAINED_FROM):
            return Forbidden(
                f"{path} is served with --no-train only: versions are made for these weights"
            )
        if refusal is None and self._api_key is None and path.startswith(_PRIVATE):
            return self._judge_host(headers) or _judge_origin(headers)
        return refusal

    def _judge_host(self, headers: Headers) -> UserError | None:
        # A web page whose own name leads to this machine is, for its visitor's browser, this server.
        host = headers.get("host")
        if host is None:
            return None
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if _address(name) is not None or name in ("localhost", self._host):
            return None
        return Forbidden(
            f"header Host is {host}; allowed here without an API key: localhost, or this machine's address"
        )

    def _all_leaves(self) -> list[Leaf]:
        if len(self._routes) != self._num_routes:
            self._leaves = list(walk(self._routes))
            self._num_routes = len(self._routes)
        return self._leaves

    def _judge_key(self, kind: RouteClass, headers: Headers, path: str) -> UserError | None:
        key = _bearer(headers)
        is_admin = _is_same(key, self._admin_api_key)
        is_user = _is_same(key, self._api_key)
        if kind is RouteClass.OPEN or is_admin:
            return None
        if kind is RouteClass.ADMIN:
            if self._admin_api_key is None:
                return Forbidden(f"{path} is served only with --admin-api-key set and presented")
            return Forbidden(f"{path} needs the admin API key")
        if kind is RouteClass.CONTROL and self._admin_api_key is not None:
            return Forbidden(f"{path} needs the admin API key")
        if self._api_key is None or is_user:
            return None
        return Unauthorized("missing or wrong API key; send Authorization: Bearer KEY")


def leave_auth_to_guard(original: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `sglang.srt.utils.auth.decide_request_auth`: the guard judges every request.

    SGLang's own check stands outside the guard, cannot tell the routes of included routers apart, lets
    WebSockets pass, and answers in another form; two judges would contradict each other.
    """
    from sglang.srt.utils.auth import AuthDecision

    return AuthDecision(allowed=True)


def require_safe_bind(host: str, api_key: str | None) -> None:
    """Raises ValueError when `host` is not loopback and there is no key."""
    if not api_key and not _is_loopback(host):
        raise ValueError(
            f"--host {host} is reachable from other machines; allowed without --api-key: "
            "127.0.0.1, ::1 or localhost"
        )


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None: it is a name."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _judge_origin(headers: Headers) -> UserError | None:
    # Without a key any web page could vote through its visitor's browser: SGLang allows every origin.
    origin = headers.get("origin")
    if origin is None:
        return None
    try:
        parts = urlsplit(origin)
        is_ours = parts.netloc == headers.get("host") or _is_loopback(parts.hostname or "")
    except ValueError:
        is_ours = False
    if is_ours:
        return None
    return Forbidden(
        f"origin {origin} may neither read nor change anything here without an API key"
    )


def route_path(scope: Scope) -> str:
    """The path as the router sees it: without the prefix the app is mounted under."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) or "/" if root and path.startswith(root + "/") else path


def _bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _is_same(given: str, key: str | None) -> bool:
    # Header bytes come decoded as latin-1.
    return key is not None and secrets.compare_digest(given.encode("latin-1"), key.encode())
