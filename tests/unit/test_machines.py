"""Every state machine: each pair is listed or refused, every state can be reached, the page is fresh."""

import enum
import sys
from pathlib import Path

import pytest

from alchemist.protocol.errors import LocalProtocolError
from alchemist.protocol.lease import Lease
from alchemist.protocol.machine import Machine
from alchemist.protocol.states import LEASE, MACHINES, TRAINER, LeaseState, TrainerEvent

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import draw_machines

PAIRS = [
    pytest.param(machine, state, event, id=f"{machine.name}-{state.name}-{event.name}")
    for machine in MACHINES
    for state in machine.states
    for event in machine.events
]


@pytest.mark.parametrize(("machine", "state", "event"), PAIRS)
def test_a_pair_is_listed_or_refused(machine, state, event):
    if (state, event) in machine.table:
        assert machine.step(state, event) in machine.states
        return
    named = f"^{machine.name}: event {event.name} is not allowed in state {state.name}$"
    with pytest.raises(LocalProtocolError, match=named):
        machine.step(state, event)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_every_state_is_reached_and_every_event_is_used(machine):
    reached = {machine.initial}
    for _ in machine.states:
        reached |= {after for (state, _), after in machine.table.items() if state in reached}
    assert reached == set(machine.states)
    assert {event for _, event in machine.table} == set(machine.events)
    assert all(
        isinstance(state, machine.states) and isinstance(event, machine.events)
        for state, event in machine.table
    )


def test_names_are_unique():
    assert len({machine.name for machine in MACHINES}) == len(MACHINES)


@pytest.mark.parametrize("state", list(TRAINER.states))
@pytest.mark.parametrize("event", list(TrainerEvent))
def test_the_trainers_state_in_shared_memory_goes_through_its_table(state, event):
    lease = Lease.create()
    lease._block.state = state
    if (state, event) in TRAINER.table:
        lease.advance(event)
        assert lease.state is TRAINER.table[state, event]
        return
    with pytest.raises(LocalProtocolError):
        lease.advance(event)
    assert lease.state is state


def test_the_trainer_may_only_run_where_the_lease_lets_it():
    """Nothing leads from revoked to granted or metered but the two events that say so."""
    ways_out = {event.name for state, event in LEASE.table if state is LeaseState.REVOKED}
    assert ways_out == {"EARNED", "FREED"}


def test_the_page_is_what_the_tables_say():
    assert draw_machines.PAGE.read_text() == draw_machines.page(), (
        "run scripts/draw_machines.py: docs/machines.md is stale"
    )


def test_a_diagram_has_an_arrow_for_every_entry():
    class Light(enum.Enum):
        RED = 1
        GREEN = 2

    class Time(enum.Enum):
        PASSES = 1

    machine = Machine(
        name="light",
        about="",
        initial=Light.RED,
        events=Time,
        table={(Light.RED, Time.PASSES): Light.GREEN},
    )
    assert machine.diagram().splitlines() == [
        "stateDiagram-v2",
        "    [*] --> RED",
        "    RED --> GREEN: passes",
    ]
