"""The life of a recorded row, as a table: what each event does to it.

FREE      nobody's
DEVICE    in borrowed KV slots; its token is in the KV cache
HEDGED    the same, and copied to the host
HOSTED    on the host only, because serving took the borrowed slots back, or because there was none to borrow; its token
          is still in the KV cache
DETACHED  on the host only; its token left the KV cache, and a completion that may still be voted on wants it

RECORD      the token was computed, and kept in borrowed slots
RECORD_HOST the same, where no slot could be borrowed: kept on the host
HEDGE       the copy to the host is complete
RECLAIM     its borrowed slots are wanted: by serving, or for newer rows
SLOT_FREED  its token leaves the KV cache (or is computed anew), and no completion wants the row
SLOT_LOST   the same, and a completion wants it
UNHEDGE     its place on the host is wanted for a more valuable row
UNWANTED    the last completion that wanted it is forgotten
"""

from __future__ import annotations

import enum


class RowState(enum.IntEnum):
    FREE = 0
    DEVICE = 1
    HEDGED = 2
    HOSTED = 3
    DETACHED = 4


class RowEvent(enum.Enum):
    RECORD = "record"
    RECORD_HOST = "record on the host"
    HEDGE = "hedge"
    RECLAIM = "reclaim"
    SLOT_FREED = "slot freed"
    SLOT_LOST = "slot lost"
    UNHEDGE = "unhedge"
    UNWANTED = "unwanted"


_S, _E = RowState, RowEvent
ROW: dict[tuple[RowState, RowEvent], RowState] = {
    (_S.FREE, _E.RECORD): _S.DEVICE,
    (_S.FREE, _E.RECORD_HOST): _S.HOSTED,
    (_S.DEVICE, _E.HEDGE): _S.HEDGED,
    (_S.DEVICE, _E.RECLAIM): _S.FREE,
    (_S.DEVICE, _E.SLOT_FREED): _S.FREE,
    (_S.DEVICE, _E.SLOT_LOST): _S.FREE,
    (_S.DEVICE, _E.UNWANTED): _S.DEVICE,
    (_S.HEDGED, _E.RECLAIM): _S.HOSTED,
    (_S.HEDGED, _E.SLOT_FREED): _S.FREE,
    (_S.HEDGED, _E.SLOT_LOST): _S.DETACHED,
    (_S.HEDGED, _E.UNHEDGE): _S.DEVICE,
    (_S.HEDGED, _E.UNWANTED): _S.HEDGED,
    (_S.HOSTED, _E.SLOT_FREED): _S.FREE,
    (_S.HOSTED, _E.SLOT_LOST): _S.DETACHED,
    (_S.HOSTED, _E.UNHEDGE): _S.FREE,
    (_S.HOSTED, _E.UNWANTED): _S.HOSTED,
    (_S.DETACHED, _E.UNHEDGE): _S.FREE,
    (_S.DETACHED, _E.UNWANTED): _S.FREE,
}
"""Pairs that are missing cannot happen."""
