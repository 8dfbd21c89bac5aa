"""Whether a request may leave recorded activations behind, as its client says: in the body or in a header."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request

from alchemist.server.run import OPT_OUT

RECORD_HEADER = "X-Alchemist-Record"
BODY_FIELD = "alchemist"
"""Ours in a request's body. SGLang's models of OpenAI's requests leave fields out that they do not know."""


async def may_be_recorded(request: Request) -> bool:
    """False if the header or the body says so.

    Raises:
        ValueError: one of them cannot be understood; names it, its value and what is allowed.
    """
    return _by_header(request.headers.get(RECORD_HEADER)) and _by_body(await _body(request))


def opt_out(obj: Any) -> None:
    """Mark a request, or every one of a batch, as not to be recorded: the scheduler sees its sampling parameters."""
    if obj.sampling_params is None:
        obj.sampling_params = {}
    several = (
        obj.sampling_params if isinstance(obj.sampling_params, list) else [obj.sampling_params]
    )
    for params in several:
        custom = params.get("custom_params") or {}
        if not isinstance(custom, dict):
            raise ValueError(f"custom_params is {_shown(custom)}; allowed: an object")
        params["custom_params"] = {**custom, OPT_OUT: True}


async def _body(request: Request) -> Any:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # FastAPI has read and parsed it by now: the request keeps both.
    return await request.json() if not media or media.endswith("json") else None


def _by_header(value: str | None) -> bool:
    choices = {"true": True, "false": False}
    if value is None:
        return True
    if value.strip().lower() not in choices:
        raise ValueError(f"header {RECORD_HEADER} is {value!r}; allowed: true or false")
    return choices[value.strip().lower()]


def _by_body(body: Any) -> bool:
    ours = body.get(BODY_FIELD) if isinstance(body, dict) else None
    if ours is None:
        return True
    if not isinstance(ours, dict):
        allowed = 'an object, {"record": true or false}'
        raise ValueError(f"{BODY_FIELD} is {_shown(ours)}; allowed: {allowed}")
    for field in ours:
        if field != "record":
            raise ValueError(f"{BODY_FIELD}.{field} is not known; allowed: record")
    record = ours.get("record", True)
    if not isinstance(record, bool):
        raise ValueError(f"{BODY_FIELD}.record is {_shown(record)}; allowed: true or false")
    return record


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
