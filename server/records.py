"""What the ledger keeps, as values: completions, votes, steps, versions. No I/O here."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

CompletionState = Literal["streaming", "done", "aborted"]
FeedbackState = Literal["waiting", "pending", "trained", "failed"]
VersionState = Literal["staged", "live", "retired", "failed"]


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One answered request."""

    id: str
    """SGLang's rid, the id the client saw."""
    version: int
    """The version that answered; 0 is the base model."""
    prompt_ids: list[int]
    response_ids: list[int]
    response_logprobs: list[float]
    """Nats, one per response token, or empty where serving did not compute them. Kept as float32."""
    model: str = ""
    """What the request asked for, as it wrote it."""
    sampling: dict[str, Any] = {}
    """Sampling parameters; values JSON has no form for are kept as their `str`."""
    finish_reason: str | None = None
    extra_key: str | None = None
    """SGLang's radix-cache namespace of the request."""
    state: CompletionState = "done"
    created: float = 0.0
    """Unix time in seconds; 0: when it is added."""


class Vote(msgspec.Struct, frozen=True, kw_only=True):
    """A vote as it comes in."""

    completion_id: str
    rating: Literal[1, -1]
    correction: str | None = None
    """What the answer should have been, as text."""
    comment: str | None = None
    tags: list[str] = []
    user: str | None = None
    """Who votes; there is one vote for a completion and user, and one without a user."""
    metadata: dict[str, Any] = {}
    id: str | None = None
    """Id to store it under; None: one is made."""


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """A vote as it is stored."""

    id: str
    completion_id: str
    user: str | None
    rating: Literal[1, -1]
    correction: str | None
    comment: str | None
    tags: list[str]
    metadata: dict[str, Any]
    state: FeedbackState
    """waiting (the answer still streams), pending, trained, failed."""
    reason: str | None
    """Why it failed."""
    step: int | None
    version: int | None
    """The step it was trained in, and the version that came of it."""
    created: float
    updated: float
    """Unix times in seconds."""


class TrainingItem(msgspec.Struct, frozen=True, kw_only=True):
    """A pending vote with the completion it is about."""

    feedback_id: str
    label: bool
    """True: desirable."""
    correction: str | None
    completion: Completion
    match: str = ""
    """The preference pair it is half of; with a correction, all of."""


class Trainable(msgspec.Struct, frozen=True, kw_only=True):
    """The pending votes that a batch could be made of now."""

    count: int
    waited_s: float
    """For how long the first of them has been trainable, a pair since its later vote."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    step: int
    parent: int
    """Version whose master weights the step started from."""
    version: int
    """Version it made."""
    created: float
    metrics: dict[str, Any]


class Version(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    step: int | None
    """None for version 0."""
    parent: int | None
    state: VersionState
    path: str | None
    """Its PEFT directory, absolute; None for version 0 before the first training, and once it was given up."""
    created: float
    reason: str | None
    feedback_ids: list[str]


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What a restart found."""

    live: int
    staged: int | None
    """Newest version that was trained but not yet live: to be published."""
    directories: list[str]
    """Absolute paths that versions refer to; anything else under versions/ is an orphan."""
    num_failed_feedback: int
    """Votes that waited for an answer which never finished."""
