"""The feedback API: votes, receipts, training, versions. Documented for clients in docs/api.md.

The router joins SGLang's app, whose exception handlers speak another dialect; so every route here turns its
own errors into the envelope of `errors.py`. What a vote may hold is in `api_models.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import APIRouter, Header, Query
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from alchemist.server.api_models import (
    FeedbackRequest,
    feedback_object,
    invalid_fields,
    receipt_object,
    version_object,
)
from alchemist.server.config import Config
from alchemist.server.errors import (
    AlchemistError,
    InvalidRequest,
    NotFound,
    TooLarge,
    UnsupportedMedia,
    envelope,
)
from alchemist.server.ledger import Ledger
from alchemist.server.records import FeedbackState

logger = logging.getLogger(__name__)

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_VERSION = re.compile(r"v?(\d{1,18})")


class Service(Protocol):
    """What the routes need: the ledger, and someone who trains and publishes."""

    @property
    def config(self) -> Config: ...

    @property
    def ledger(self) -> Ledger: ...

    async def voted(self, completion_id: str) -> None:
        """A vote was stored."""

    def num_recorded(self, rid: str) -> int:
        """Prompt tokens of a completion that have recorded activations."""

    async def settle(self, rid: str) -> None:
        """Wait a moment for a completion whose answer was just given to be stored."""

    async def training_status(self) -> dict[str, Any]:
        """The body of `GET /v1/training`."""

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def flush(self) -> None:
        """Train what is pending now."""

    async def promote(self, version: int) -> None:
        """Raises NotFound, Conflict."""

    async def rollback(self) -> None:
        """Raises Conflict if there is nothing to go back to."""


class EnvelopeRoute(APIRoute):
    """A route whose every error is the OpenAI envelope, and never a stack trace."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except AlchemistError as error:
                if error.status >= 500:
                    logger.error("%s %s: %s", request.method, request.url.path, error)
                return JSONResponse(error.envelope(), error.status)
            except RequestValidationError as error:
                refused = invalid_fields(error.errors())
                return JSONResponse(refused.envelope(), refused.status)
            except HTTPException as error:
                return JSONResponse(envelope(error.status_code, error.detail), error.status_code)
            except ClientDisconnect:
                return Response(status_code=400)
            except Exception:
                # What is left is a fault of ours. SGLang's handlers would answer it in their dialect.
                logger.exception("%s %s", request.method, request.url.path)
                return JSONResponse(envelope(500, "internal error; see the server's log"), 500)

        return handle


def build_router(service: Service) -> APIRouter:
    """The routes; they hold nothing but `service`."""
    router = APIRouter(route_class=EnvelopeRoute)
    _add_feedback(router, service)
    _add_training(router, service)
    _refuse_other_methods(router)
    return router


def _add_feedback(router: APIRouter, service: Service) -> None:
    ledger = service.ledger

    @router.post("/v1/feedback", status_code=201)
    async def create_feedback(
        request: Request, idempotency_key: Annotated[str | None, Header(max_length=255)] = None
    ) -> Response:
        vote = await _read(FeedbackRequest, request, service.config.max_feedback_bytes)
        answer = ledger.put_feedback(vote.to_vote(), idempotency_key=idempotency_key or None)
        feedback, is_created = await answer
        await service.voted(feedback.completion_id)
        return JSONResponse(feedback_object(feedback), 201 if is_created else 200)

    @router.get("/v1/feedback")
    async def list_feedback(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        completion_id: str | None = None,
        user: str | None = None,
        state: FeedbackState | None = None,
    ) -> Any:
        page, has_more = await ledger.list_feedback(
            limit=limit,
            after=after,
            is_ascending=order == "asc",
            completion_id=completion_id,
            user=user,
            state=state,
        )
        return _list([feedback_object(feedback) for feedback in page], has_more)

    @router.get("/v1/feedback/{feedback_id}")
    async def get_feedback(feedback_id: str) -> Any:
        return feedback_object(await ledger.get_feedback(feedback_id))

    @router.delete("/v1/feedback/{feedback_id}")
    async def delete_feedback(feedback_id: str) -> Any:
        await ledger.delete_feedback(feedback_id)
        return {"id": feedback_id, "object": "feedback.deleted", "deleted": True}

    @router.get("/v1/completions/{completion_id}/receipt")
    async def get_receipt(completion_id: str, tokens: bool = False) -> Any:
        await service.settle(completion_id)
        completion = await ledger.get_completion(completion_id)
        votes, _ = await ledger.list_feedback(completion_id=completion_id, limit=100)
        recorded = service.num_recorded(completion_id)
        return receipt_object(completion, votes, recorded, has_tokens=tokens)


def _add_training(router: APIRouter, service: Service) -> None:
    ledger = service.ledger

    @router.get("/v1/training")
    async def get_training() -> Any:
        return await service.training_status()

    @router.post("/v1/training/pause")
    async def pause_training() -> Any:
        await service.pause()
        return await service.training_status()

    @router.post("/v1/training/resume")
    async def resume_training() -> Any:
        await service.resume()
        return await service.training_status()

    @router.post("/v1/training/flush")
    async def flush_training() -> Any:
        await service.flush()
        return await service.training_status()

    @router.get("/v1/versions")
    async def list_versions(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        page, has_more = await ledger.list_versions(
            limit=limit,
            after=None if after is None else _version_number(after, "after"),
            is_ascending=order == "asc",
        )
        return _list([version_object(version) for version in page], has_more)

    @router.post("/v1/versions/rollback")
    async def roll_back() -> Any:
        await service.rollback()
        return version_object(await ledger.get_version(await ledger.live_version()))

    @router.post("/v1/versions/{version}/promote")
    async def promote_version(version: str) -> Any:
        number = _version_number(version, "version")
        await service.promote(number)
        return version_object(await ledger.get_version(number))


def _version_number(name: str, field: str) -> int:
    match = _VERSION.fullmatch("v0" if name == "base" else name)
    if match is None:
        raise NotFound(f"no version {name!r}; versions are v0, v1, …", field)
    return int(match[1])


def _refuse_other_methods(router: APIRouter) -> None:
    allowed: dict[str, set[str]] = {}
    for route in router.routes:
        assert isinstance(route, APIRoute)
        allowed.setdefault(route.path, set()).update(route.methods or ())
    for path, methods in allowed.items():
        router.add_api_route(
            path,
            _refusal(sorted(methods)),
            methods=[method for method in _METHODS if method not in methods],
            include_in_schema=False,
        )


def _refusal(allowed: list[str]) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(request: Request) -> Response:
        message = f"{request.method} is not allowed here; allowed: {', '.join(allowed)}"
        body = envelope(405, message, code="method_not_allowed")
        return JSONResponse(body, 405, headers={"Allow": ", ".join(allowed)})

    return refuse


T = TypeVar("T", bound=FeedbackRequest)


async def _read(model: type[T], request: Request, max_bytes: int) -> T:
    """The request's JSON body as `model`.

    Raises:
        TooLarge: by Content-Length, or as soon as more than `max_bytes` bytes came.
        UnsupportedMedia: the body is not declared as JSON.
        InvalidRequest: it is not JSON, or not what `model` takes.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise UnsupportedMedia("send the body as JSON, with Content-Type: application/json")
    declared = request.headers.get("content-length", "0")
    too_large = TooLarge(f"the body is larger than {max_bytes} bytes, the server's limit")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        if problems[0]["type"] == "json_invalid":
            raise InvalidRequest("the body is not valid JSON", None, "invalid_json") from None
        raise invalid_fields(problems) from None


def _list(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0].get("id") if data else None,
        "last_id": data[-1].get("id") if data else None,
        "has_more": has_more,
    }
