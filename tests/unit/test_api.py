"""The feedback routes over ASGI, on the real ledger and a service small enough to be seen through."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from alchemist.server.api import build_router
from alchemist.server.config import Config
from alchemist.server.errors import Conflict
from alchemist.server.ledger import Ledger
from alchemist.server.records import Completion


@dataclasses.dataclass
class Service:
    """Trains nothing: says what it was asked, and moves versions in the ledger."""

    config: Config
    ledger: Ledger
    state: str = "idle"
    votes: list[str] = dataclasses.field(default_factory=list)

    async def voted(self, completion_id: str) -> None:
        self.votes.append(completion_id)

    async def settle(self, rid: str) -> None:
        """Completions here are stored before anybody can ask."""

    def num_recorded(self, rid: str) -> int:
        return 2

    async def training_status(self) -> dict[str, Any]:
        return {"state": self.state, "pending": await self.ledger.count("pending")}

    async def pause(self) -> None:
        self.state = "paused"

    async def resume(self) -> None:
        self.state = "idle"

    async def flush(self) -> None:
        self.state = "training"

    async def promote(self, version: int) -> None:
        await self.ledger.set_version_state(version, "live")

    async def rollback(self) -> None:
        target = await self.ledger.rollback_target()
        if target is None:
            raise Conflict("there is no earlier version")
        await self.promote(target)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    config = Config(data_dir=str(tmp_path / "data"), max_feedback_bytes=2048)
    service = Service(config, Ledger(config.ledger_path))
    for number in range(3):
        await service.ledger.add_completion(
            Completion(
                id=f"c{number}",
                version=0,
                prompt_ids=[1, 2, 3],
                response_ids=[4, 5],
                response_logprobs=[-0.5, -1.0],
                finish_reason="stop",
            )
        )
    yield service
    service.ledger.close()


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(build_router(service))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return body["error"]


@pytest.mark.parametrize(
    ("rating", "stored"),
    [("up", "up"), (1, "up"), (True, "up"), ("down", "down"), (-1, "down"), (False, "down")],
)
async def test_ratings(client: httpx.AsyncClient, rating: object, stored: str) -> None:
    response = await client.post("/v1/feedback", json={"completion_id": "c0", "rating": rating})
    assert response.status_code == 201
    assert response.json()["rating"] == stored


async def test_create_replace_get_delete(client: httpx.AsyncClient, service: Service) -> None:
    vote = {
        "completion_id": "c0",
        "rating": "up",
        "correction": "Hello!",
        "comment": "ünïcode ☃",
        "tags": ["greeting"],
        "user": "ann",
        "metadata": {"a": [1, {"b": None}]},
        "id": "vote-1",
    }
    response = await client.post("/v1/feedback", json=vote)
    assert response.status_code == 201
    created = response.json()
    assert created.items() >= vote.items()
    assert created["object"] == "feedback"
    assert (created["state"], created["step"], created["version"]) == ("pending", None, None)
    assert len(service.votes) == 1
    response = await client.post("/v1/feedback", json={**vote, "rating": "down"})
    assert response.status_code == 200
    assert (response.json()["id"], response.json()["rating"]) == ("vote-1", "down")
    assert (await client.get("/v1/feedback/vote-1")).json()["rating"] == "down"
    response = await client.delete("/v1/feedback/vote-1")
    assert response.json() == {"id": "vote-1", "object": "feedback.deleted", "deleted": True}
    response = await client.get("/v1/feedback/vote-1")
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"rating": "sideways"}, "rating"),
        ({"rating": 1.0}, "rating"),
        ({"rating": 2}, "rating"),
        ({"rating": None}, "rating"),
        ({"completion_id": 3}, "completion_id"),
        ({"completion_id": ""}, "completion_id"),
        ({"correction": ""}, "correction"),
        ({"comment": 5}, "comment"),
        ({"tags": "a"}, "tags"),
        ({"tags": ["a", 1]}, "tags.1"),
        ({"tags": ["a"] * 65}, "tags"),
        ({"user": ["x"]}, "user"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": {"a": [{"n": float("inf")}]}}, "metadata"),
        ({"id": "../../etc"}, "id"),
        ({"surprise": 1}, "surprise"),
    ],
)
async def test_malformed_fields_are_named(client, service, change, param) -> None:
    vote = {"completion_id": "c0", "rating": "up", **change}
    headers = {"content-type": "application/json"}
    response = await client.post("/v1/feedback", content=json.dumps(vote), headers=headers)
    assert response.status_code == 422
    error = error_of(response)
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert error["type"] == "invalid_request_error"
    assert await service.ledger.count("pending") == 0


@pytest.mark.parametrize(
    ("rating", "got"),
    [
        ('"sideways"', '(got "sideways")'),
        ("1.5", "(got 1.5)"),
        ("null", "(got null)"),
        ("[1]", None),
        (f'"{"x" * 65}"', None),
        ("9" * 1500, None),
    ],
)
async def test_a_refused_value_is_repeated_if_it_is_short(client, rating, got) -> None:
    body = f'{{"completion_id": "c0", "rating": {rating}}}'
    headers = {"content-type": "application/json"}
    response = await client.post("/v1/feedback", content=body, headers=headers)
    assert response.status_code == 422
    message = error_of(response)["message"]
    allowed = 'rating: must be "up", "down", 1, -1, true or false'
    assert message == (f"{allowed} {got}" if got else allowed)


async def test_a_missing_field_is_named(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/feedback", json={"completion_id": "c0"})
    assert error_of(response)["param"] == "rating"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 2000, b'{"completion_id": "\\ud800", "rating": 1}'],
)
async def test_what_is_not_an_object_is_422(client: httpx.AsyncClient, body: bytes) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = await client.post("/v1/feedback", content=body, headers=headers)
    assert response.status_code == 422
    error_of(response)


async def test_other_media_types(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/feedback", data={"rating": "up"})
    assert response.status_code == 415
    assert "Content-Type: application/json" in error_of(response)["message"]


async def test_unknown_completion(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/feedback", json={"completion_id": "zz", "rating": 1})
    assert response.status_code == 404
    error = error_of(response)
    assert (error["param"], error["code"]) == ("completion_id", "completion_not_found")


async def test_a_large_body_is_refused_by_its_length(client: httpx.AsyncClient) -> None:
    vote = {"completion_id": "c0", "rating": 1, "comment": "x" * 3000}
    response = await client.post("/v1/feedback", json=vote)
    assert response.status_code == 413
    assert "2048 bytes" in error_of(response)["message"]


async def test_a_large_body_is_not_read_to_its_end(client: httpx.AsyncClient) -> None:
    num_read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_read
        while True:
            num_read += 1
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    response = await client.post("/v1/feedback", content=endless(), headers=headers)
    assert response.status_code == 413
    assert num_read <= 4


async def test_idempotency_key(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "once"}
    vote = {"completion_id": "c0", "rating": 1}
    first = await client.post("/v1/feedback", json=vote, headers=headers)
    again = await client.post("/v1/feedback", json=vote, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    other = {"completion_id": "c1", "rating": 1}
    response = await client.post("/v1/feedback", json=other, headers=headers)
    assert response.status_code == 422
    assert error_of(response)["code"] == "idempotency_key_reused"
    response = await client.post("/v1/feedback", json=vote, headers={"Idempotency-Key": "k" * 300})
    assert response.status_code == 422


async def test_a_consumed_vote_is_409(client: httpx.AsyncClient, service: Service) -> None:
    vote = {"completion_id": "c0", "rating": 1}
    created = (await client.post("/v1/feedback", json=vote)).json()
    await train(service, 1, [created["id"]])
    for response in (
        await client.post("/v1/feedback", json={**vote, "rating": -1}),
        await client.delete(f"/v1/feedback/{created['id']}"),
    ):
        assert response.status_code == 409
        assert error_of(response)["code"] == "feedback_consumed"
    stored = (await client.get(f"/v1/feedback/{created['id']}")).json()
    assert (stored["state"], stored["step"], stored["version"]) == ("trained", 1, "v1")


async def train(service: Service, version: int, ids: list[str]) -> None:
    path = service.config.versions_path / f"v{version}"
    path.mkdir(parents=True)
    await service.ledger.commit_step(
        parent=version - 1, version=version, step=version, path=path, metrics={}, trained=ids
    )
    await service.ledger.set_version_state(version, "live")


async def test_list(client: httpx.AsyncClient) -> None:
    ids = []
    for number in range(3):
        vote = {"completion_id": f"c{number}", "rating": 1}
        ids.append((await client.post("/v1/feedback", json=vote)).json()["id"])
    page = (await client.get("/v1/feedback?limit=2")).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (ids[2], ids[1])
    page = (await client.get(f"/v1/feedback?limit=2&after={ids[1]}")).json()
    assert [f["id"] for f in page["data"]] == ids[:1]
    assert not page["has_more"]
    page = (await client.get("/v1/feedback?order=asc&completion_id=c1&state=pending")).json()
    assert [f["id"] for f in page["data"]] == [ids[1]]
    empty = (await client.get("/v1/feedback?user=nobody")).json()
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("state=gone", "state")],
)
async def test_bad_queries_are_named(client: httpx.AsyncClient, query: str, param: str) -> None:
    response = await client.get(f"/v1/feedback?{query}")
    assert response.status_code == 422
    assert error_of(response)["param"] == param


async def test_receipt(client: httpx.AsyncClient, service: Service) -> None:
    await client.post("/v1/feedback", json={"completion_id": "c0", "rating": 1})
    receipt = (await client.get("/v1/completions/c0/receipt")).json()
    assert (receipt["version"], receipt["state"], receipt["finish_reason"]) == (
        *("v0", "done", "stop"),
    )
    assert (receipt["prompt_tokens"], receipt["response_tokens"]) == (3, 2)
    assert receipt["recorded_tokens"] == 2
    assert [f["state"] for f in receipt["feedback"]] == ["pending"]
    assert "prompt_token_ids" not in receipt
    receipt = (await client.get("/v1/completions/c0/receipt?tokens=true")).json()
    assert receipt["prompt_token_ids"] == [1, 2, 3]
    assert receipt["response_token_ids"] == [4, 5]
    assert receipt["response_logprobs"] == [-0.5, -1.0]
    assert (await client.get("/v1/completions/zz/receipt")).status_code == 404
    service.ledger.mark_streaming("s")
    await client.post("/v1/feedback", json={"completion_id": "s", "rating": 1})
    receipt = (await client.get("/v1/completions/s/receipt")).json()
    assert (receipt["state"], receipt["version"]) == ("streaming", None)
    assert receipt["feedback"][0]["state"] == "waiting"


async def test_training(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/training")).json() == {"state": "idle", "pending": 0}
    for word, state in (("pause", "paused"), ("resume", "idle"), ("flush", "training")):
        response = await client.post(f"/v1/training/{word}")
        assert response.status_code == 200
        assert response.json()["state"] == state


async def test_versions(client: httpx.AsyncClient, service: Service) -> None:
    for number in (0, 1):
        vote = {"completion_id": f"c{number}", "rating": 1, "id": f"f{number}"}
        await client.post("/v1/feedback", json=vote)
        await train(service, number + 1, [f"f{number}"])
    page = (await client.get("/v1/versions", params={"order": "asc"})).json()
    data = page["data"]
    assert not page["has_more"]
    assert [(v["version"], v["state"], v["step"], v["parent"]) for v in data] == [
        ("v0", "retired", None, None),
        ("v1", "retired", 1, "v0"),
        ("v2", "live", 2, "v1"),
    ]
    assert [v["feedback_ids"] for v in data] == [[], ["f0"], ["f1"]]
    assert data[0]["path"] is None
    assert data[1]["path"] == str(service.config.versions_path / "v1")
    pages, after = [], {}
    while True:
        page = (await client.get("/v1/versions", params={"limit": 2, **after})).json()
        pages.append([v["version"] for v in page["data"]])
        after = {"after": page["last_id"]}
        if not page["has_more"]:
            break
    assert pages == [["v2", "v1"], ["v0"]]
    for after in ("v9", "latest"):
        response = await client.get("/v1/versions", params={"after": after})
        assert (response.status_code, error_of(response)["param"]) == (404, "after")
    response = await client.post("/v1/versions/rollback")
    assert (response.status_code, response.json()["version"]) == (200, "v1")
    for word in ("v2", "2", "base"):
        response = await client.post(f"/v1/versions/{word}/promote")
        assert response.json()["state"] == "live"
    response = await client.post("/v1/versions/rollback")
    assert response.status_code == 409
    for word in ("v9", "vx", "9" * 30):
        response = await client.post(f"/v1/versions/{word}/promote")
        assert response.status_code == 404
        assert error_of(response)["param"] == "version"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/feedback", "GET, POST"),
        ("DELETE", "/v1/feedback", "GET, POST"),
        ("POST", "/v1/feedback/x", "DELETE, GET"),
        ("POST", "/v1/training", "GET"),
        ("GET", "/v1/training/pause", "POST"),
        ("DELETE", "/v1/versions", "GET"),
        ("GET", "/v1/versions/v1/promote", "POST"),
        ("POST", "/v1/completions/c0/receipt", "GET"),
    ],
)
async def test_wrong_methods(client: httpx.AsyncClient, method, path, allowed) -> None:
    response = await client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert allowed in error_of(response)["message"]


async def test_a_full_disk_is_507_and_a_closed_ledger_503(client, service: Service) -> None:
    await service.ledger._store.write(lambda db: db.execute("PRAGMA max_page_count=1").fetchone())
    vote = {"completion_id": "c0", "rating": 1, "comment": "x" * 1900}
    for number in range(20):
        response = await client.post("/v1/feedback", json={**vote, "user": str(number)})
        if response.status_code != 201:
            break
    assert response.status_code == 507
    assert error_of(response)["code"] == "ledger_full"
    assert (await client.get("/v1/feedback")).status_code == 200
    service.ledger.close()
    response = await client.get("/v1/feedback")
    assert response.status_code == 503
    assert error_of(response)["code"] == "ledger_unavailable"


async def test_a_bug_shows_no_stack_trace(client, service, monkeypatch, caplog) -> None:
    monkeypatch.setattr(service, "ledger", None)
    response = await client.get("/v1/training")
    assert response.status_code == 500
    assert "AttributeError" not in response.text
    assert "AttributeError" in caplog.text
    error_of(response)


async def test_bodies_are_json_all_the_way(client: httpx.AsyncClient) -> None:
    vote = {"completion_id": "c0", "rating": 1, "metadata": {"x": 0.1, "s": "\x00</script>"}}
    response = await client.post("/v1/feedback", json=vote)
    assert response.headers["content-type"] == "application/json"
    stored = await client.get(f"/v1/feedback/{response.json()['id']}")
    assert json.loads(stored.content)["metadata"] == vote["metadata"]


async def test_the_openai_client_can_vote(service: Service) -> None:
    app = FastAPI()
    app.include_router(build_router(service))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
    ) as client:
        body = {"completion_id": "c0", "rating": "up"}
        vote = await client.post("/feedback", body=body, cast_to=dict[str, object])
        assert (vote["object"], vote["state"]) == ("feedback", "pending")
        versions = await client.get("/versions", cast_to=dict[str, object])
        assert versions["object"] == "list"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.get("/feedback/nope", cast_to=dict[str, object])
        assert caught.value.code == "not_found"
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            await client.post("/feedback", body={**body, "rating": "?"}, cast_to=dict[str, object])
        assert refused.value.param == "rating"
