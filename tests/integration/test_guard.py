"""Who may call what, on the wire, and what of a server can be reached from outside."""

from __future__ import annotations

import http.client
import ipaddress
import stat
import time
from pathlib import Path

import httpx
import pytest
from live import Server
from remains import Footprint

from alchemist.server.routes import ROUTES, RouteClass

pytestmark = pytest.mark.server

KEY = "user-key"
ADMIN_KEY = "admin-key"
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")


def paths(kind: RouteClass) -> list[str]:
    """One concrete path for each template of a class."""
    templates = [path for path, of in ROUTES.items() if of is kind]
    return [
        path.replace("{model:path}", "x").replace("{", "").replace("}", "") for path in templates
    ]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server with an API key; its admin routes have no key that opens them."""
    args = ["--api-key", KEY, "--no-train"]
    running = Server(tmp_path_factory.mktemp("guard") / "data", *args, wait=False)
    running.http.headers["Authorization"] = f"Bearer {KEY}"
    running.wait_ready()
    yield running
    assert running.stop() == 0, running.tail()


@pytest.mark.parametrize("which", ["server", "keyed"])
def test_admin_routes_answer_403_without_an_admin_key(which, request):
    running = request.getfixturevalue(which)
    for path in paths(RouteClass.ADMIN):
        for method in METHODS:
            response = running.http.request(method, path, json={})
            assert response.status_code == 403, (method, path)
            assert response.json()["error"]["code"] == "forbidden"


def test_keys_are_not_written_to_the_log(keyed):
    written = keyed.log.read_text(errors="replace")
    assert "api_key='***'" in written
    assert KEY not in written


@pytest.mark.parametrize("which", ["server", "keyed"])
def test_every_route_the_app_tells_of_is_classified(which, request):
    running = request.getfixturevalue(which)
    told = running.http.get("/openapi.json").json()["paths"]
    assert len(told) > 50
    # OpenAPI writes a parameter without its converter.
    assert not set(told) - {path.replace(":path}", "}") for path in ROUTES}
    # One that nobody classified would be refused, so it is named here rather than met by a user.
    assert {"/v1/feedback", "/v1/chat/completions"} <= set(told)


def test_with_a_key_every_other_route_asks_for_it(keyed):
    with httpx.Client(base_url=keyed.url, timeout=120) as nobody:
        for kind in (RouteClass.USER, RouteClass.CONTROL):
            for path in paths(kind):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
                    response = nobody.get(path, headers=headers)
                    assert response.status_code == 401, (path, headers)
                    assert response.headers["WWW-Authenticate"] == "Bearer"
                    assert response.json()["error"]["type"] == "authentication_error"
        assert nobody.get("/health").status_code == 200


def test_the_key_opens_what_users_use(keyed):
    answer = keyed.chat("hello")
    assert answer["choices"][0]["message"]["content"]
    assert keyed.vote(answer["id"])["state"] == "pending"
    for path in ("/v1/models", "/v1/training", "/v1/versions", "/v1/feedback", "/server_info"):
        assert keyed.http.get(path).status_code == 200, path
    assert keyed.http.post("/v1/training/pause").status_code == 200
    assert keyed.http.post("/v1/training/resume").status_code == 200


def test_without_a_key_a_foreign_web_page_cannot_vote(server):
    answer = server.chat("hello")
    body = {"completion_id": answer["id"], "rating": "up"}
    response = server.http.post(
        "/v1/feedback", json=body, headers={"Origin": "https://elsewhere.example"}
    )
    assert response.status_code == 403


@pytest.mark.parametrize("which", ["server", "keyed"])
def test_nothing_listens_beyond_this_machine(which, request):
    running = request.getfixturevalue(which)
    listening = Footprint(running).listening
    assert ("127.0.0.1", running.port) in listening
    beyond = [(ip, port) for ip, port in listening if not ipaddress.ip_address(ip).is_loopback]
    assert beyond == []


@pytest.mark.parametrize("which", ["server", "keyed"])
def test_sockets_and_shared_names_are_this_users_only(which, request):
    running = request.getfixturevalue(which)
    footprint = Footprint(running)
    directories = [path for path in footprint.paths if path.is_dir()]
    assert len(directories) == 1
    assert stat.S_IMODE(directories[0].stat().st_mode) == 0o700
    sockets = {path for path in footprint.paths if path.is_socket()}
    assert len(sockets) >= 3
    assert {path.parent for path in sockets} == {directories[0]}
    for path in footprint.paths:
        if path.is_relative_to("/dev/shm"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    for name in ("ledger.sqlite3", "ledger.sqlite3-wal", "lock"):
        mode = stat.S_IMODE(Path(running.data_dir, name).stat().st_mode)
        assert mode == 0o600, name


def test_an_admin_key_opens_admin_routes_to_its_holder_only(tmp_path):
    running = Server(tmp_path / "data", "--admin-api-key", ADMIN_KEY, "--no-train")
    try:
        admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
        assert running.http.get("/v1/models").status_code == 200
        for path in paths(RouteClass.ADMIN):
            assert running.http.post(path, json={}).status_code == 403, path
        assert running.http.post("/v1/training/pause").status_code == 403
        assert running.http.post("/v1/training/pause", headers=admin).status_code == 200
        assert running.http.post("/flush_cache", headers=admin).status_code == 200
        profile = {"output_dir": str(tmp_path / "profile"), "activities": ["CPU"]}
        for path, body in (("/start_profile", profile), ("/stop_profile", {})):
            assert running.http.post(path, json=body, headers=admin).status_code == 200, path
    finally:
        status = running.stop()
    assert status == 0, running.tail()
    assert list((tmp_path / "profile").glob("*.trace.json.gz"))


def test_a_connection_outlives_the_reading_of_an_answer(server):
    """Longer than SGLang's five seconds, after which clients keep none either."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("GET", "/v1/models")
    connection.getresponse().read()
    before = connection.sock
    time.sleep(6.5)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 200
    assert connection.sock is before is not None
    connection.close()
