"""A state machine as a literal table: what the table does not list is refused. Pure: no clock, no I/O."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from alchemist.protocol.errors import LocalProtocolError

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)


@dataclass(frozen=True, kw_only=True)
class Machine(Generic[S, E]):
    """States, events, and where each event leads from each state. It holds no state itself: its user does."""

    name: str
    about: str
    """What it describes, and who moves it."""
    initial: S
    events: type[E]
    table: Mapping[tuple[S, E], S]

    @property
    def states(self) -> type[S]:
        return type(self.initial)

    def step(self, state: S, event: E) -> S:
        """The state after `event`.

        Raises:
            LocalProtocolError: the table does not list the pair; nothing has changed.
        """
        try:
            return self.table[state, event]
        except KeyError:
            raise LocalProtocolError(
                f"{self.name}: event {event.name} is not allowed in state {state.name}"
            ) from None

    def diagram(self) -> str:
        """The table as a mermaid state diagram."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial.name}"]
        for (state, event), after in self.table.items():
            lines.append(f"    {state.name} --> {after.name}: {event.name.lower()}")
        return "\n".join(lines)
