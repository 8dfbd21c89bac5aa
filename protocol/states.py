"""The protocol's state machines. Those listed in `MACHINES` are drawn in docs/machines.md and tested pair by pair."""

from __future__ import annotations

import enum
from typing import Any

from alchemist.protocol.machine import Machine
from alchemist.protocol.rows import ROW, RowEvent, RowState


class TrainerState(enum.IntEnum):
    """What the trainer is doing, as seen by everybody."""

    DETACHED = 0
    IDLE = 1
    RUNNING = 2
    YIELDED = 3


class TrainerEvent(enum.Enum):
    ATTACHED = enum.auto()
    """It has mapped the server's memory."""
    STEP_BEGUN = enum.auto()
    REVOKED = enum.auto()
    """At a gate it found that it may not go on."""
    GRANTED = enum.auto()
    STEP_ENDED = enum.auto()
    """Done or failed."""
    DIED = enum.auto()
    """Its process is gone; said by the server."""


TRAINER = Machine(
    name="trainer",
    about="What the trainer does. It moves itself, in the lease's control block; when it has died, the server does.",
    initial=TrainerState.DETACHED,
    events=TrainerEvent,
    table={
        (TrainerState.DETACHED, TrainerEvent.ATTACHED): TrainerState.IDLE,
        (TrainerState.IDLE, TrainerEvent.STEP_BEGUN): TrainerState.RUNNING,
        (TrainerState.RUNNING, TrainerEvent.REVOKED): TrainerState.YIELDED,
        (TrainerState.YIELDED, TrainerEvent.GRANTED): TrainerState.RUNNING,
        (TrainerState.RUNNING, TrainerEvent.STEP_ENDED): TrainerState.IDLE,
        (TrainerState.DETACHED, TrainerEvent.DIED): TrainerState.DETACHED,
        (TrainerState.IDLE, TrainerEvent.DIED): TrainerState.DETACHED,
        (TrainerState.RUNNING, TrainerEvent.DIED): TrainerState.DETACHED,
        (TrainerState.YIELDED, TrainerEvent.DIED): TrainerState.DETACHED,
    },
)


class LeaseState(enum.Enum):
    """What the lease allows the trainer, as its gate finds it."""

    GRANTED = enum.auto()
    """Nothing is in flight."""
    METERED = enum.auto()
    """Requests are in flight; the trainer runs on the allowance its policy gives."""
    REVOKED = enum.auto()
    """Requests are in flight and there is no allowance: the trainer sleeps."""


class LeaseEvent(enum.Enum):
    REQUESTED = enum.auto()
    """Something is in flight."""
    SPENT = enum.auto()
    """The allowance is used up; under policy idle there never is one."""
    EARNED = enum.auto()
    """A quantum of allowance has come together."""
    FREED = enum.auto()
    """Nothing is in flight any more."""


LEASE = Machine(
    name="lease",
    about="What the trainer may do. Its gate moves it, by the busy words and the share in the control block.",
    initial=LeaseState.GRANTED,
    events=LeaseEvent,
    table={
        (LeaseState.GRANTED, LeaseEvent.REQUESTED): LeaseState.METERED,
        (LeaseState.METERED, LeaseEvent.SPENT): LeaseState.REVOKED,
        (LeaseState.REVOKED, LeaseEvent.EARNED): LeaseState.METERED,
        (LeaseState.METERED, LeaseEvent.FREED): LeaseState.GRANTED,
        (LeaseState.REVOKED, LeaseEvent.FREED): LeaseState.GRANTED,
    },
)

RECORDED_ROW = Machine(
    name="recorded row",
    about="Where one token's recorded activations are. The pool moves them, many at a time; see `protocol/rows.py`.",
    initial=RowState.FREE,
    events=RowEvent,
    table=ROW,
)

MACHINES: tuple[Machine[Any, Any], ...] = (TRAINER, LEASE, RECORDED_ROW)
