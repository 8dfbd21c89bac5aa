"""What goes over HTTP: the body of a vote, and the objects that come back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from alchemist.protocol import messages
from alchemist.server.errors import InvalidRequest
from alchemist.server.records import Completion, Feedback, Version, Vote

LONGEST_SHOWN = 64
"""Characters of a refused value that its error repeats."""


def _rating(value: object) -> object:
    # `1 == True == 1.0` in Python, so the type is asked as well.
    for rating, words in ((1, ("up", 1, True)), (-1, ("down", -1, False))):
        if any(value == word and type(value) is type(word) for word in words):
            return rating
    raise ValueError('must be "up", "down", 1, -1, true or false')


def _storable(value: dict[str, Any]) -> dict[str, Any]:
    # Infinities and NaN do not come back as they went in.
    if msgspec.json.decode(msgspec.json.encode(value)) != value:
        raise ValueError("must hold finite numbers")
    return value


class FeedbackRequest(BaseModel):
    """Body of `POST /v1/feedback`; types are not converted, unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")

    completion_id: Annotated[str, Field(min_length=1, max_length=256)]
    rating: Annotated[Literal[1, -1], BeforeValidator(_rating)]
    correction: Annotated[str, Field(min_length=1)] | None = None
    comment: str | None = None
    tags: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=64)
    ] = []
    user: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    metadata: Annotated[dict[str, Any], AfterValidator(_storable)] = {}
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None

    def to_vote(self) -> Vote:
        return Vote(**self.model_dump())


def invalid_fields(problems: Sequence[Any]) -> InvalidRequest:
    """From pydantic's errors: every field in the message with its value, the first field in `param`."""
    named = [
        (
            ".".join(map(str, _place(p["loc"]))),
            p["msg"].removeprefix("Value error, ") + (_got(p["input"]) if p["loc"] else ""),
        )
        for p in problems
    ]
    message = "; ".join(f"{field}: {text}" if field else text for field, text in named)
    return InvalidRequest(message, named[0][0] or None)


def _got(value: object) -> str:
    """Of a short plain value what it was; whoever sent more knows it."""
    is_short = value is None or isinstance(value, float)
    if isinstance(value, int):
        # One of thousands of digits has no text in Python.
        is_short = abs(value) < 10**LONGEST_SHOWN
    elif isinstance(value, str):
        is_short = len(value) <= LONGEST_SHOWN
    return f" (got {json.dumps(value)})" if is_short else ""


def _place(loc: Sequence[Any]) -> Sequence[Any]:
    # FastAPI puts where the parameter was found before its name.
    return loc[1:] if loc and loc[0] in ("query", "path", "header", "body") else loc


def feedback_object(feedback: Feedback) -> dict[str, Any]:
    return {
        "id": feedback.id,
        "object": "feedback",
        "created_at": int(feedback.created),
        "updated_at": int(feedback.updated),
        "completion_id": feedback.completion_id,
        "user": feedback.user,
        "rating": "up" if feedback.rating > 0 else "down",
        "correction": feedback.correction,
        "comment": feedback.comment,
        "tags": feedback.tags,
        "metadata": feedback.metadata,
        "state": feedback.state,
        "reason": feedback.reason,
        "step": feedback.step,
        "version": _name(feedback.version),
    }


def version_object(version: Version) -> dict[str, Any]:
    return {
        "id": _name(version.version),
        "object": "version",
        "version": _name(version.version),
        "state": version.state,
        "step": version.step,
        "parent": _name(version.parent),
        "feedback_ids": version.feedback_ids,
        "path": version.path,
        "created_at": int(version.created),
        "reason": version.reason,
    }


def receipt_object(
    completion: Completion, votes: Sequence[Feedback], num_recorded: int, *, has_tokens: bool
) -> dict[str, Any]:
    """`has_tokens`: with token ids and logprobs."""
    receipt = {
        "id": completion.id,
        "object": "completion.receipt",
        "created_at": int(completion.created),
        "state": completion.state,
        "model": completion.model,
        "version": _name(completion.version) if completion.state != "streaming" else None,
        "finish_reason": "stop"
        if completion.finish_reason == messages.STOPPED_BY_TEXT
        else completion.finish_reason,
        "prompt_tokens": len(completion.prompt_ids),
        "response_tokens": len(completion.response_ids),
        "recorded_tokens": num_recorded,
        "feedback": [feedback_object(vote) for vote in votes],
    }
    if has_tokens:
        receipt["prompt_token_ids"] = completion.prompt_ids
        receipt["response_token_ids"] = completion.response_ids
        receipt["response_logprobs"] = completion.response_logprobs
    return receipt


def _name(version: int | None) -> str | None:
    return None if version is None else f"v{version}"
