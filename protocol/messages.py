"""Every message between our processes. Tensors never travel: handles do.

    scheduler ── PUSH ─────────────► main        control.ipc    SchedulerHello, Finished
    trainer  ◄── DEALER/ROUTER ────► main        trainer.ipc    TrainerHello, TrainerReady, Welcome, Train,
                                                   StepDone, StepFailed, Stop
    trainer  ◄── DEALER/ROUTER ────► scheduler   rows-tpN.ipc   CheckOut, CheckedOut, CheckIn
    main     ◄── DEALER/ROUTER ────► scheduler   rows-tpN.ipc   Voted, Fresh, AskRows, RowStats

All sockets live in a 0700 directory. Encoding: msgpack, maps, tagged by class name. Token ids travel as little-endian
int32 bytes, logprobs as float32, slots/rows as int64. New fields are appended with defaults.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from alchemist.protocol.errors import PeerProtocolError
from alchemist.protocol.layout import RowLayout
from alchemist.protocol.shm import SegmentHandle, TensorHandle

_T = TypeVar("_T")


class _Message(msgspec.Struct, tag=True, kw_only=True, frozen=True):
    pass


class SharedRows(msgspec.Struct, kw_only=True, frozen=True):
    """Recorded rows; those on the device lie in the KV pool."""

    host: list[TensorHandle]
    """Per layer [host rows, width]."""
    gens: TensorHandle
    """[device rows + host rows] int64: raised whenever a row's content stops being what it was."""
    cells: TensorHandle
    """[device rows, slots_per_row] int64: KV slots of each row on the device."""
    counts: TensorHandle | None = None
    """[2] int64: how many ends of rows have begun, and how many of them show in `gens` (see `server.arrivals`).
    None: all.
    """


class SharedMemory(msgspec.Struct, kw_only=True, frozen=True):
    """What the scheduler owns and the trainer maps."""

    layout: RowLayout
    weights: dict[str, TensorHandle]
    """SGLang parameter name → tensor."""
    k: list[TensorHandle]
    """Per layer [slots, n_kv, d], after norm and rope."""
    v: list[TensorHandle]
    rows: SharedRows | None
    """None when nothing is recorded."""


class SchedulerHello(_Message, kw_only=True, frozen=True):
    """The scheduler's plugin is in place: what it wrapped and what it shares."""

    tp_rank: int
    pid: int
    hooks: list[str]
    """Targets found wrapped by us, after the fact."""
    missing: list[str]
    """Targets that should be wrapped and are not: the server must not start."""
    model_path: str
    context_length: int
    """Tokens a request may have, with its answer; longer than `max_position_embeddings` where rope is scaled."""
    memory: SharedMemory | None
    """None when there is no trainer to share with."""


STOPPED_BY_TEXT = "stop_text"
"""Finish reason "stop" of an answer that a stop string or expression ended: its last token is a part of that."""


class Finished(_Message, kw_only=True, frozen=True):
    """A request has ended in the scheduler."""

    rid: str
    lora_id: str | None
    extra_key: str | None
    """The radix tree's namespace of this request."""
    prompt_ids: bytes
    output_ids: bytes
    logprobs: bytes
    """float32, one per output token: log p at temperature 1, before penalties."""
    finish_reason: str
    """As SGLang says, or `STOPPED_BY_TEXT`."""
    prompt_recorded: int
    """Prompt tokens that have a row now."""


class TrainerHello(_Message, kw_only=True, frozen=True):
    pid: int


class TrainerReady(_Message, kw_only=True, frozen=True):
    """The trainer has mapped the server's memory and loaded its state."""

    pid: int
    weights_shared_bytes: int
    """Bytes of base weights it maps instead of holding."""


class Welcome(_Message, kw_only=True, frozen=True):
    """main → trainer: everything it needs to begin."""

    config: bytes
    """`Config` as JSON."""
    data_dir: str
    model_path: str
    context_length: int
    """As in `SchedulerHello`."""
    memory: SharedMemory
    lease: SegmentHandle
    rows_address: str | None


class TrainSample(msgspec.Struct, kw_only=True, frozen=True):
    """One completion with its vote."""

    feedback_id: str
    completion_id: str
    label: bool
    prompt_ids: bytes
    response_ids: bytes
    version: int
    """The version that served it."""
    extra_key: str | None
    is_correction: bool = False
    """The response is the user's corrected text, not what was served."""
    weight: float = 1.0
    match: str = ""
    """The preference pair it belongs to; objective dpo only."""


class Train(_Message, kw_only=True, frozen=True):
    """Do one step on these samples, from version `parent` to `version`."""

    step: int
    parent: int
    version: int
    samples: list[TrainSample]


class StepDone(_Message, kw_only=True, frozen=True):
    """The version directory is on disk under its final name; nothing is committed yet."""

    step: int
    version: int
    path: str
    metrics: dict[str, float]
    failed: dict[str, str]
    """feedback_id → why it could not be trained."""
    tokens_reused: int
    tokens_recomputed: int


class StepFailed(_Message, kw_only=True, frozen=True):
    """No version came out of the step."""

    step: int
    reason: str
    failed: dict[str, str]
    """The samples at fault; the others stay pending."""


class Stop(_Message, kw_only=True, frozen=True):
    pass


class Prompt(msgspec.Struct, kw_only=True, frozen=True):
    """A completion's prompt, as its rows are looked for."""

    rid: str
    extra_key: str | None
    token_ids: bytes


class CheckOut(_Message, kw_only=True, frozen=True):
    """Where are these prompts' tokens recorded? Held until `CheckIn`."""

    ticket: int
    prompts: list[Prompt]


class Places(msgspec.Struct, kw_only=True, frozen=True):
    """Of every token of a prompt, int64 each; row −1: not recorded."""

    slots: bytes
    rows: bytes
    gens: bytes
    hedge_rows: bytes
    """Copies on the host, should a row on the device be taken away; −1: none."""
    hedge_gens: bytes


class CheckedOut(_Message, kw_only=True, frozen=True):
    ticket: int
    places: list[Places | None]
    """By prompt; None: nothing is recorded."""


class CheckIn(_Message, kw_only=True, frozen=True):
    """The rows of a `CheckOut` have been read."""

    ticket: int


class Voted(_Message, kw_only=True, frozen=True):
    """A vote on a completion is on disk: its rows will be wanted."""

    rid: str


class Trained(_Message, kw_only=True, frozen=True):
    """Votes on these completions have been trained, or cannot be: their rows are not waited for."""

    rids: list[str]


class Fresh(_Message, kw_only=True, frozen=True):
    """Another version is live: of which adapters' answers the trainer would still take rows."""

    lora_ids: list[str]
    """As SGLang names adapters; "": the base model."""


class AskRows(_Message, kw_only=True, frozen=True):
    """How is the activation pool?"""

    ticket: int


class RowStats(_Message, kw_only=True, frozen=True):
    ticket: int
    stats: bytes
    """JSON, see `ActivationPool.stats`."""


ToMain = SchedulerHello | Finished | TrainerHello | TrainerReady | StepDone | StepFailed | RowStats
ToTrainer = Welcome | Train | Stop | CheckedOut
ToScheduler = CheckOut | CheckIn | Voted | Trained | Fresh | AskRows

_encoder = msgspec.msgpack.Encoder()
_to_main: msgspec.msgpack.Decoder[ToMain] = msgspec.msgpack.Decoder(ToMain)
_to_trainer: msgspec.msgpack.Decoder[ToTrainer] = msgspec.msgpack.Decoder(ToTrainer)
_to_scheduler: msgspec.msgpack.Decoder[ToScheduler] = msgspec.msgpack.Decoder(ToScheduler)


def encode(message: _Message) -> bytes:
    return _encoder.encode(message)


def decode_to_main(data: bytes) -> ToMain:
    """Raises PeerProtocolError for bytes that are not such a message; the same for the two below."""
    return _decode(_to_main, data)


def decode_to_trainer(data: bytes) -> ToTrainer:
    return _decode(_to_trainer, data)


def decode_to_scheduler(data: bytes) -> ToScheduler:
    return _decode(_to_scheduler, data)


def _decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise PeerProtocolError(f"undecodable message of {len(data)} bytes: {error}") from None


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as little-endian int32."""
    return _little("i", ids)


def unpack_ids(data: bytes) -> list[int]:
    return _unpack("i", data)


def pack_floats(values: Iterable[float]) -> bytes:
    """Logprobs as little-endian float32."""
    return _little("f", values)


def unpack_floats(data: bytes) -> list[float]:
    return _unpack("f", data)


def _little(code: str, values: Iterable[int] | Iterable[float]) -> bytes:
    items = array.array(code, values)
    if sys.byteorder == "big":
        items.byteswap()
    return items.tobytes()


def _unpack(code: str, data: bytes) -> list[Any]:
    items = array.array(code)
    items.frombytes(data)
    if sys.byteorder == "big":
        items.byteswap()
    return items.tolist()
