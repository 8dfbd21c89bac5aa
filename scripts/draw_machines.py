"""Draws the protocol's state machines from their tables: writes docs/machines.md.

python scripts/draw_machines.py
"""

from __future__ import annotations

from pathlib import Path

from alchemist.protocol.states import MACHINES

PAGE = Path(__file__).parents[1] / "docs" / "machines.md"
_HEAD = """# State machines

Drawn by `python scripts/draw_machines.py` from the tables of `protocol/states.py`, which the running code goes through:
what has no arrow here is refused.
"""


def page() -> str:
    """The whole of docs/machines.md."""
    parts = [_HEAD]
    for machine in MACHINES:
        parts.append(
            f"## {machine.name}\n\n{machine.about}\n\n```mermaid\n{machine.diagram()}\n```\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
