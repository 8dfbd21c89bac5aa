"""Every route of the real app is classified, and the guard answers by class."""

from __future__ import annotations

import httpx
import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from alchemist.server.api import build_router
from alchemist.server.config import Config
from alchemist.server.ledger import Ledger
from alchemist.server.routes import (
    ROUTES,
    RouteClass,
    RouteGuard,
    leave_auth_to_guard,
    require_safe_bind,
    unfold,
    walk,
)


@pytest.fixture(scope="module")
def sglang_app() -> FastAPI:
    from sglang.srt.entrypoints.http_server import app

    return app


def test_every_route_of_sglang_is_classified(sglang_app: FastAPI) -> None:
    leaves = list(walk(sglang_app.routes))
    assert [leaf.path for leaf in leaves if leaf.kind is None] == []
    assert len(leaves) > 80
    assert {"/v1/realtime", "/v1/loads", "/scale_elastic_ep"} <= {leaf.path for leaf in leaves}


def test_every_route_of_ours_is_classified(tmp_path, sglang_app: FastAPI) -> None:
    class Service:
        config = Config()
        ledger = Ledger(tmp_path / "ledger.sqlite3")

    router = build_router(Service())  # type: ignore[arg-type]
    Service.ledger.close()
    ours = list(walk(router.routes))
    assert [leaf.path for leaf in ours if leaf.kind is None] == []
    theirs = {leaf.path for leaf in walk(sglang_app.routes)}
    # Nothing is classified that is not there; /metrics is mounted when SGLang starts.
    assert set(ROUTES) - {leaf.path for leaf in ours} - theirs == {"/metrics"}


def test_what_sglang_guards_is_not_for_users(sglang_app: FastAPI) -> None:
    guarded = {
        r.path for r in unfold(sglang_app.routes) if getattr(_endpoint(r), "_auth_level", None)
    }
    assert len(guarded) > 30
    assert "/scale_elastic_ep" in guarded
    assert {path for path in guarded if ROUTES[path] is not RouteClass.ADMIN} == set()
    words = ("weight", "lora", "cache", "logging", "memory", "profile", "pause", "abort", "trace")
    dangerous = {path for path in ROUTES if any(word in path for word in words)}
    readable = {"/weight_version", "/get_weight_version", "/v1/training/pause"}
    assert {p for p in dangerous if ROUTES[p] is not RouteClass.ADMIN} == readable


def _endpoint(route: object) -> object:
    return getattr(route, "endpoint", None)


def test_a_forgotten_route_is_found() -> None:
    app = FastAPI()
    inner = APIRouter(prefix="/inner")
    inner.add_api_route("/http", lambda: None)
    inner.add_api_websocket_route("/socket", lambda ws: None)
    app.include_router(inner, prefix="/outer")
    app.router.routes.append(Mount("/mounted", PlainTextResponse("")))
    found = {leaf.path for leaf in walk(app.routes) if leaf.kind is None}
    assert found == {"/outer/inner/http", "/outer/inner/socket", "/mounted"}


def small_app(api_key: str | None, admin_api_key: str | None) -> FastAPI:
    """A route of each class under its real path, and one that nobody knows."""
    app = FastAPI()
    inner = APIRouter()
    for path in ("/health", "/v1/chat/completions", "/v1/training/pause", "/v1/feedback"):
        inner.add_api_route(path, lambda: "done", methods=["GET", "POST"])
    for path in ("/load_lora_adapter_from_tensors", "/server_info", "/new"):
        app.add_api_route(path, lambda: "done", methods=["GET", "POST"])
    app.include_router(inner)

    @app.websocket("/v1/realtime")
    async def realtime(ws: WebSocket) -> None:
        await ws.accept()
        await ws.close()

    app.add_middleware(RouteGuard, routes=app.routes, api_key=api_key, admin_api_key=admin_api_key)
    app.router.routes.append(Mount("/metrics", PlainTextResponse("late")))
    return app


USER, CONTROL, ADMIN = (
    "/v1/chat/completions",
    "/v1/training/pause",
    "/load_lora_adapter_from_tensors",
)


@pytest.mark.parametrize(
    ("keys", "bearer", "expected"),
    [
        # keys set: (API, admin); expected status of: user, control, admin
        ((None, None), None, (200, 200, 403)),
        ((None, None), "x", (200, 200, 403)),
        (("u", None), None, (401, 401, 403)),
        (("u", None), "wrong", (401, 401, 403)),
        (("u", None), "u", (200, 200, 403)),
        ((None, "a"), None, (200, 403, 403)),
        ((None, "a"), "a", (200, 200, 200)),
        (("u", "a"), None, (401, 403, 403)),
        (("u", "a"), "u", (200, 403, 403)),
        (("u", "a"), "a", (200, 200, 200)),
        (("ü", None), "ü", (200, 200, 403)),
        (("", ""), "", (200, 200, 403)),
    ],
)
async def test_keys(keys, bearer, expected) -> None:
    headers = [("authorization", f"Bearer {bearer}".encode())] if bearer is not None else []
    async with client_of(small_app(*keys)) as client:
        for path, status in zip((USER, CONTROL, ADMIN), expected, strict=True):
            response = await client.post(path, headers=headers)
            assert response.status_code == status, path
            if status != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        for path in ("/health", "/metrics/"):
            assert (await client.get(path, headers=headers)).status_code == 200
        assert (await client.get("/new", headers=headers)).status_code == 403
        assert (await client.get("/nowhere", headers=headers)).status_code == 404


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:30000")


async def test_the_admin_key_does_not_leak_through_server_info() -> None:
    async with client_of(small_app(None, "a")) as client:
        assert (await client.get("/server_info")).status_code == 403


async def test_sglangs_own_check_does_not_contradict_the_guard(monkeypatch) -> None:
    from sglang.srt.utils import auth

    app = small_app("u", "a")
    auth.add_api_key_middleware(app, api_key="u", admin_api_key="a")
    original = auth.decide_request_auth
    monkeypatch.setattr(
        auth,
        "decide_request_auth",
        lambda *args, **kwargs: leave_auth_to_guard(original, *args, **kwargs),
    )
    async with client_of(app) as client:
        admin = {"authorization": "Bearer a"}
        for path in (USER, CONTROL, ADMIN):
            assert (await client.post(path, headers=admin)).status_code == 200
        refused = await client.post(USER)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"


async def test_schemes_and_other_methods() -> None:
    async with client_of(small_app("u", "a")) as client:
        basic = {"authorization": "Basic u"}
        assert (await client.post(USER, headers=basic)).status_code == 401
        lower = {"authorization": "bearer u"}
        assert (await client.post(USER, headers=lower)).status_code == 200
        assert (await client.put(ADMIN, headers=lower)).status_code == 403
        # A preflight carries no key; it reaches CORS or the router.
        assert (await client.options(USER)).status_code == 405


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://127.0.0.1:30000", 200),
        ("http://localhost:5173", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
async def test_a_web_page_elsewhere_can_neither_vote_nor_read_votes_without_a_key(
    origin, status
) -> None:
    headers = {"origin": origin} if origin else {}
    async with client_of(small_app(None, None)) as client:
        assert (await client.post("/v1/feedback", headers=headers)).status_code == status
        assert (await client.get("/v1/feedback", headers=headers)).status_code == status
        assert (await client.post(USER, headers=headers)).status_code == 200
    async with client_of(small_app("u", None)) as client:
        headers["authorization"] = "Bearer u"
        assert (await client.post("/v1/feedback", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:30000", 200),
        ("127.0.0.1:30000", 200),
        ("[::1]:30000", 200),
        ("192.168.1.7", 200),
        ("rebound.example:30000", 403),
        ("[", 403),
    ],
)
async def test_a_name_that_leads_here_is_not_this_server_without_a_key(host, status) -> None:
    """A page of that name is of the same origin for a browser."""
    headers = {"host": host, "origin": f"http://{host}"}
    async with client_of(small_app(None, None)) as client:
        assert (await client.post("/v1/feedback", headers=headers)).status_code == status
        del headers["origin"]
        refused = await client.get("/v1/feedback", headers=headers)
        assert refused.status_code == status
        assert status == 200 or host in refused.json()["error"]["message"]
        assert (await client.post(USER, headers=headers)).status_code == 200
    async with client_of(small_app("u", None)) as client:
        headers["authorization"] = "Bearer u"
        assert (await client.get("/v1/feedback", headers=headers)).status_code == 200


@pytest.mark.parametrize(("key", "first"), [(None, "websocket.close"), ("u", "websocket.accept")])
async def test_web_sockets_need_the_key(key: str | None, first: str) -> None:
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {
        "type": "websocket",
        "path": "/v1/realtime",
        "raw_path": b"/v1/realtime",
        "query_string": b"",
        "headers": headers,
        "subprotocols": [],
    }
    sent: list[str] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, str]) -> None:
        sent.append(message["type"])

    await small_app("u", None)(scope, receive, send)
    assert sent[0] == first


async def test_a_prefix_does_not_open_the_door() -> None:
    app = small_app(None, None)
    transport = httpx.ASGITransport(app, root_path="/prefix")
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        assert (await client.post(f"/prefix{ADMIN}")).status_code == 403
        assert (await client.post(ADMIN)).status_code == 403
        assert (await client.post(f"/prefix{USER}")).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_key(host: str) -> None:
    require_safe_bind(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.2", "example.com"])
def test_other_hosts_need_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="--api-key"):
        require_safe_bind(host, None)
    with pytest.raises(ValueError, match="--api-key"):
        require_safe_bind(host, "")
    require_safe_bind(host, "key")
