"""The scheduler process's half of Alchemist: sharing memory, recording, the lease, and the row desk.

Everything runs on the scheduler's thread, called from the hooks in `hooks.py`. Trouble with the trainer is logged,
trouble with recording ends it (see `harmless.py`); neither reaches a request.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
import zmq

from alchemist.protocol import messages
from alchemist.protocol.cores import divides
from alchemist.protocol.layout import ActivationDtype, RowLayout
from alchemist.protocol.lease import Lease
from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Arena, DeviceExport, dtype_name, share
from alchemist.server.appraisal import Text
from alchemist.server.cores import Cores
from alchemist.server.harmless import guard, harmless
from alchemist.server.lender import Lender
from alchemist.server.machine_memory import auto_host_bytes, free_memory_bytes
from alchemist.server.pool import ActivationPool
from alchemist.server.publisher import HEALTH_PREFIX, PROBE_PREFIX
from alchemist.server.recorder import Recorder
from alchemist.server.row_desk import RowDesk, has_prefixes, match_slots
from alchemist.server.run import OPT_OUT, Run
from alchemist.server.sampled import Noted, Sampled
from alchemist.server.unloads import Unloads

if TYPE_CHECKING:
    from alchemist.server.gpu_recorder import GpuRecorder

logger = logging.getLogger(__name__)

PORTION_BYTES = 1 << 20
"""Copied to the host at a time: a fraction of a millisecond, which is how long a new request may wait for it."""
GPU_PORTION_BYTES = 64 << 20
"""The same over a link of some 50 GB/s: about a millisecond."""
HEDGE_S = 0.05
"""How often such a portion is enqueued while requests run, at most: it takes the scheduler about a millisecond."""
APPRAISE_S, BUSY_APPRAISE_S = 1.0, 10.0
"""How often the rows' values are brought up to date, at most: when nobody waits, and when requests run."""


class Engine:
    """One scheduler rank. Created at plugin load; comes to life when the memory pools exist."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = run.load_config()
        self.lease = Lease.attach(run.lease)
        # Requests may come before the first idle turn of the loop.
        self.lease.set_engine_busy(True)
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.PUSH)
        self._control.setsockopt(zmq.LINGER, 1000)
        self._control.setsockopt(zmq.SNDHWM, 0)
        self._control.connect(run.control_address)
        self._desk: RowDesk | None = None
        self._cores: Cores | None = None
        """Where they are divided with the trainer."""
        self._scheduler: Any = None
        """SGLang's; None before its loop begins."""
        self._kv: Arena | DeviceExport | None = None
        self._kv_handles: dict[str, TensorHandle] = {}
        self._weights: Arena | DeviceExport | None = None
        self.pool: ActivationPool | None = None
        self.recorder: Recorder | GpuRecorder | None = None
        self.sampled = Sampled()
        self.unloads = Unloads()
        self._unrecorded: set[str] = set()
        """Requests in flight that are not recorded: they asked for it, or are too short."""
        self._rows_per_portion = 1
        self._appraised = self._hedged = 0.0

    # Memory

    def share_kv(self, kv_pool: Any) -> None:
        """Make the KV pool's buffers ones that others can map, before anything takes their addresses."""
        if self.config.no_train or kv_pool.k_buffer is None or kv_pool.k_buffer[0].dim() != 3:
            return
        buffers = {
            f"{name}{layer}": buffer
            for name in ("k", "v")
            for layer, buffer in enumerate(getattr(kv_pool, f"{name}_buffer"))
        }
        # SGLang zeroes its own buffers, so their pages are there; an untouched one would cost a prefill a page fault.
        self._kv = share("kv", buffers, are_zero=True)
        layers = range(kv_pool.layer_num)
        kv_pool.k_buffer = [self._kv.tensors[f"k{layer}"] for layer in layers]
        kv_pool.v_buffer = [self._kv.tensors[f"v{layer}"] for layer in layers]
        # SGLang keeps float8 in buffers of bytes, because torch cannot write single elements of it.
        dtype = dtype_name(kv_pool.dtype)
        self._kv_handles = {
            name: msgspec.structs.replace(handle, dtype=dtype)
            for name, handle in self._kv.handles.items()
        }

    def attach(self, runner: Any, hooks: list[str], missing: list[str]) -> None:
        """The model and its pools exist: share the weights, make the activation pool, say hello."""
        hello = messages.SchedulerHello(
            tp_rank=runner.ps.tp_rank,
            pid=os.getpid(),
            hooks=hooks,
            missing=missing,
            model_path=runner.model_config.model_path,
            context_length=runner.model_config.context_len,
            memory=None if self.config.no_train else self._share(runner),
        )
        self._control.send(messages.encode(hello))
        if runner.device == "cpu" and divides(self.config.lease_policy):
            self._cores = Cores(self.lease)

    def _share(self, runner: Any) -> messages.SharedMemory:
        """What the trainer maps: weights, KV pool, recorded rows."""
        if self._kv is None:
            raise RuntimeError(
                f"the KV pool {type(runner.token_to_kv_pool).__name__} on {runner.device} is not shared: "
                "Alchemist trains with a plain multi-head KV pool, one [slots, heads, head size] a layer; "
                "start with --no-train to serve without learning"
            )
        require_unscaled_kv(runner)
        layout = layout_of(runner, self.config.activation_dtype)
        weights = self._share_weights(runner.model)
        if self.config.record != "none":
            self._make_pool(runner, layout)
        rows = None
        if self.pool is not None:
            host, gens, cells, counts = self.pool.handles
            rows = messages.SharedRows(host=host, gens=gens, cells=cells, counts=counts)
        k, v = (
            [self._kv_handles[f"{name}{layer}"] for layer in range(layout.num_layers)]
            for name in ("k", "v")
        )
        return messages.SharedMemory(layout=layout, weights=weights, k=k, v=v, rows=rows)

    def _share_weights(self, model: torch.nn.Module) -> dict[str, TensorHandle]:
        """Share every parameter; the module goes on with what is shared, so there is one copy."""
        parameters = {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in model.named_parameters()
        }
        self._weights = share("weights", {name: p.data for name, p in parameters.items()})
        for name, parameter in parameters.items():
            parameter.data = self._weights.tensors[name]
        return self._weights.handles

    def _make_pool(self, runner: Any, layout: RowLayout) -> None:
        kv, config = runner.token_to_kv_pool, self.config
        num_slots = kv.k_buffer[0].shape[0]
        num_device_rows = (
            int((num_slots - layout.page_size) * config.activation_device_fraction)
            // layout.slots_per_row
        )
        if num_device_rows < 1:
            raise RuntimeError(
                f"--activation-device-fraction {config.activation_device_fraction} of {num_slots} KV slots holds "
                f"no row; one token of this model takes {layout.slots_per_row} slots"
            )
        lender = Lender(runner.token_to_kv_pool_allocator)
        self.pool = ActivationPool(
            layout,
            kv.k_buffer,
            kv.v_buffer,
            lender,
            num_device_rows=num_device_rows,
            num_host_rows=self._num_host_rows(layout, num_slots),
            eviction=config.activation_eviction,
        )
        self.recorder = self._make_recorder(runner, layout, self.pool)
        self.pool.install(lambda call, default: guard(call, default, self.stop_recording))
        portion = GPU_PORTION_BYTES if kv.k_buffer[0].is_cuda else PORTION_BYTES
        self._rows_per_portion = max(1, portion // layout.row_bytes)
        logger.info(
            "activation pool: up to %d rows, in %d free KV slots each, of %d; "
            "%d rows of %d bytes on the host (%.2f GiB)",
            num_device_rows,
            layout.slots_per_row,
            num_slots,
            self.pool.num_host_rows,
            layout.row_bytes,
            self.pool.num_host_rows * layout.row_bytes / 2**30,
        )

    def _make_recorder(
        self, runner: Any, layout: RowLayout, pool: ActivationPool
    ) -> Recorder | GpuRecorder:
        if not pool.arrivals.is_deferred:
            return Recorder(runner.model, layout, pool, busy_share=self.config.record_busy_share)
        # Not before: a machine without a GPU need not have Triton.
        from alchemist.server.gpu_recorder import GpuRecorder

        # One token a request; decode graphs are padded to no more than there can be requests.
        most = runner.req_to_token_pool.size if self.config.record == "decode" else 0
        return GpuRecorder(runner.model, layout, pool, max_decode_tokens=most)

    def _num_host_rows(self, layout: RowLayout, num_slots: int) -> int:
        available = free_memory_bytes()
        num_bytes = self.config.activation_host_bytes
        if num_bytes < 0:
            # More than a few times what the KV cache remembers is seldom voted on.
            return min(4 * num_slots, auto_host_bytes(available) // layout.row_bytes)
        if num_bytes > available:
            raise RuntimeError(
                f"--activation-host-gb asks for {num_bytes} bytes; {available} bytes are free"
            )
        num_rows = num_bytes // layout.row_bytes
        if num_bytes and not num_rows:
            raise RuntimeError(
                f"--activation-host-gb {num_bytes} bytes holds no row; one token of this model takes "
                f"{layout.row_bytes} bytes"
            )
        return num_rows

    def stop_recording(self, error: Exception) -> None:
        """For the rest of this run: what is recorded ends, and the trainer computes everything."""
        # Memory may be what was missing: first let go of what the failed call has, and of what waits for `flush`.
        traceback.clear_frames(error.__traceback__)
        self._end_recording(f"{type(error).__name__}: {error}")
        logger.error(
            "recording has failed and ends here; serving and training go on", exc_info=error
        )

    def _end_recording(self, why: str) -> None:
        if self.recorder is not None:
            self.recorder.release()
            self.recorder = None
        if self.pool is not None and self.pool.stopped is None:
            self.pool.stop(why)

    # Forward passes

    @harmless(False)
    def begin_forward(self, batch: Any) -> bool:
        """Whether this forward is being recorded."""
        if self._cores is not None:
            is_decode = batch.forward_mode.is_decode()
            self._cores.take(is_decode=is_decode, is_alone=self._is_alone(batch))
        # SGLang's own warm-up has no requests.
        if self.recorder is None or batch.rids is None:
            return False
        is_decode = not batch.forward_mode.is_extend()
        if is_decode:
            if self.config.record != "decode" or not batch.forward_mode.is_decode():
                return False
            wanted = [
                self._is_wanted(rid, lora_id)
                for rid, lora_id in zip(batch.rids, _adapters(batch), strict=False)
            ]
            which = None if all(wanted) else torch.nonzero(torch.tensor(wanted)).flatten()
        else:
            which = self._wanted(batch)
        if which is not None and not which.numel():
            return False
        positions = positions_of(batch, is_decode)
        return self.recorder.begin(batch.out_cache_loc, positions, which, is_decode=is_decode)

    def _is_alone(self, batch: Any) -> bool:
        """Whether it is of one request, and none waits behind it."""
        scheduler = self._scheduler
        return batch.batch_size == 1 and scheduler is not None and not scheduler.waiting_queue

    def _wanted(self, batch: Any) -> torch.Tensor | None:
        """Which tokens of a prefill are to be recorded; None: all."""
        wanted = [
            self._is_wanted(rid, lora_id)
            for rid, lora_id in zip(batch.rids, _adapters(batch), strict=False)
        ]
        if all(wanted):
            return None
        mask = torch.tensor(wanted).repeat_interleave(torch.as_tensor(batch.extend_seq_lens_cpu))
        return torch.nonzero(mask).flatten()

    def _is_wanted(self, rid: str, lora_id: str | None) -> bool:
        """Whether a request is to be recorded: it is none that is not, its version is not too old to be trained
        from, and it is in the share of those that are. By its id, so that all its chunks and steps are treated alike.
        """
        assert self.pool is not None
        if rid in self._unrecorded or not self.pool.is_fresh(lora_id or ""):
            return False
        fraction = self.config.record_fraction
        return fraction >= 1 or zlib.crc32(rid.encode()) < fraction * 2**32

    @harmless(None)
    def end_forward(self) -> None:
        if self.recorder is not None:
            self.recorder.end()

    def finished(self, req: Any, tree_cache: Any) -> None:
        """A request has ended and its KV is about to go to the tree: report it."""
        noted = self.sampled.ended(req.rid)
        self._unrecorded.discard(req.rid)
        if _is_unvotable(req):
            return
        prompt = list(req.origin_input_ids)
        output = list(req.output_ids_through_stop)
        reason = _finish_reason(req.finished_reason)
        report = partial(
            self._report, req.rid, req.lora_id, req.extra_key, prompt, output, noted, reason
        )
        if not self._with_slots(req, tree_cache, len(prompt), report):
            report(None)

    @harmless(False)
    def _with_slots(
        self, req: Any, tree_cache: Any, length: int, report: Callable[[torch.Tensor], None]
    ) -> bool:
        """Whether `report` is called with the KV slots of a request's first tokens: now, or when they are known."""
        if self.pool is None or req.req_pool_idx is None or self.pool.stopped is not None:
            return False
        slots = tree_cache.req_to_token_pool.req_to_token[req.req_pool_idx, :length]
        self.pool.arrivals.then((slots,), report)
        return True

    def _report(
        self,
        rid: str,
        lora_id: str | None,
        extra_key: str | None,
        prompt: list[int],
        output: list[int],
        noted: Noted,
        reason: str,
        slots: torch.Tensor | None,
    ) -> None:
        """Args:
        slots: of the prompt, on the CPU.
        """
        logprobs = noted.of_answer(len(prompt), len(output))
        text = Text(np.array(prompt, np.int32), extra_key)
        recorded = 0 if slots is None else self._num_recorded(rid, slots, text)
        report = messages.Finished(
            rid=rid,
            lora_id=lora_id,
            extra_key=extra_key,
            prompt_ids=messages.pack_ids(prompt),
            output_ids=messages.pack_ids(output),
            logprobs=messages.pack_floats(logprobs),
            finish_reason=reason,
            prompt_recorded=recorded,
        )
        try:
            self._control.send(messages.encode(report))
        except ValueError as error:
            # Text that is none, in an id or a namespace.
            logger.error("completion %s is not kept: %s", ascii(rid), error)

    @harmless(0)
    def _num_recorded(self, rid: str, slots: torch.Tensor, text: Text) -> int:
        if self.pool is None:
            return 0
        return self.pool.num_held(rid, slots.long(), text.token_ids.size, text)

    @harmless(None)
    def released(self, req: Any, tree_cache: Any) -> None:
        """The request's KV is in the tree now, under slots that may be others' (those of an equal prefix)."""
        if self.pool is not None and not _is_unvotable(req):
            token_ids = list(req.origin_input_ids)
            if self.config.record == "decode":
                # The last token was sampled and never computed.
                token_ids += list(req.output_ids_through_stop)[:-1]
            slots = match_slots(tree_cache, token_ids, req.extra_key)
            text = Text(np.array(token_ids, np.int32), req.extra_key)
            of = (req.rid, text, time.monotonic(), req.lora_id or "")
            self.pool.arrivals.then((slots,), partial(self._release, *of))

    def _release(
        self, rid: str, text: Text, now: float, served_by: str, slots: torch.Tensor
    ) -> None:
        assert self.pool is not None
        self.pool.finish(rid, slots, text.token_ids.size, now, served_by, text)

    # The scheduler's loop

    def on_requests(self, scheduler: Any, requests: list[Any]) -> None:
        """Called once a loop, before the requests are looked at."""
        self._scheduler = scheduler
        if requests:
            self.lease.set_engine_busy(True)
            # A batch of the native API is one of them.
            every = [one for r in requests for one in getattr(r, "batch", (r,))]
            self._unrecorded.update(one.rid for one in every if self._is_excluded(one))
            self.sampled.began(one.rid for one in every if hasattr(one, "rid"))
        else:
            # Not before a prefill: somebody waits for their first token.
            self._relieve()
        self.unloads.go_on(scheduler)
        desk = self._desk or self._open_desk(scheduler)
        self._settle()
        self._hedge_beside()
        self._appraise(BUSY_APPRAISE_S)
        desk.serve()
        self._prepare()

    def _is_excluded(self, request: Any) -> bool:
        ids = getattr(request, "input_ids", None)
        return _is_opted_out(request) or (
            ids is not None and len(ids) < self.config.record_min_tokens
        )

    def on_idle(self, scheduler: Any) -> None:
        """Nothing waits and nothing runs: the trainer may."""
        if scheduler.is_fully_idle():
            self.lease.set_engine_busy(False)
            # What was sampled past the end of an aborted request belongs to nobody, nor does what one wanted that was
            # aborted before it began.
            self.sampled.clear()
            self._unrecorded.clear()
            self._keep_house(scheduler)
        # It may sleep for long, and somebody may wait for what has not been settled.
        self._settle(True)

    @harmless(None)
    def _flush(self) -> None:
        if self.recorder is not None:
            self.recorder.flush()

    def _flush_some(self) -> bool:
        return self.recorder is not None and self.recorder.flush_some()

    @harmless(None)
    def _relieve(self) -> None:
        if self.recorder is not None:
            self.recorder.relieve()

    @harmless(None)
    def _keep_house(self, scheduler: Any) -> None:
        """What the pool has to do when nobody waits: appraise, and copy to the host, a portion at a time."""
        if self.pool is None or self.pool.stopped is not None:
            return
        self._appraise(APPRAISE_S)
        sleeper = scheduler.idle_sleeper
        while self._flush_some() or self.pool.hedge(self._rows_per_portion):
            # A scheduler that does not sleep comes back by itself.
            if sleeper is None or not self.lease.is_granted or sleeper.poller.poll(0):
                return

    @harmless(None)
    def _appraise(self, interval_s: float) -> None:
        now = time.monotonic()
        if self.pool is None or self.pool.stopped is not None or now - self._appraised < interval_s:
            return
        self._appraised = now
        self.pool.appraise(now)

    @harmless(None)
    def _hedge_beside(self) -> None:
        """On a GPU rows are copied to the host while requests run, too: the link is free, and the stream another one.
        Seldom, because enqueuing it is the scheduler's time.
        """
        now = time.monotonic()
        if self.pool is None or not self.pool.copies_aside or now - self._hedged < HEDGE_S:
            return
        self._hedged = now
        self.pool.hedge(self._rows_per_portion)

    @harmless(None)
    def _settle(self, wait: bool = False) -> None:
        """Do what waits for the device. Also after recording has ended: requests' reports may be among it."""
        if self.pool is not None:
            self.pool.settle(wait=wait)

    @harmless(None)
    def _prepare(self) -> None:
        if self.pool is not None:
            self.pool.prepare()

    def _open_desk(self, scheduler: Any) -> RowDesk:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(self.run.rows_address(scheduler.ps.tp_rank))
        desk = self._desk = RowDesk(
            socket,
            scheduler.tree_cache,
            self.pool,
            flush=self._flush,
            stop_recording=self.stop_recording,
        )
        if self.pool is not None and not has_prefixes(scheduler.tree_cache):
            logger.warning(
                "nothing is recorded: rows are found by SGLang's RadixCache, which is off"
            )
            self._end_recording("SGLang's RadixCache is off")
        # An idle scheduler sleeps on its own sockets; ours must wake it too.
        if scheduler.idle_sleeper is not None:
            scheduler.idle_sleeper.poller.register(socket, zmq.POLLIN)
        return desk

    def close(self) -> None:
        self._context.destroy(linger=1000)


def _adapters(batch: Any) -> Sequence[str | None]:
    """Of each request of a pass, and of what a graph's batch is filled up with."""
    found: Sequence[str | None] = batch.lora_ids or [None] * len(batch.rids)
    return found


def _finish_reason(reason: Any) -> str:
    """As `Finished` has it."""
    said = reason.to_json() if reason else {"type": "abort"}
    is_by_text = said["type"] == "stop" and isinstance(said.get("matched"), str)
    return messages.STOPPED_BY_TEXT if is_by_text else str(said["type"])


def _is_unvotable(req: Any) -> bool:
    """Whether nobody will ever have this request's id: health checks, probes of versions, and the request without an
    answer by which SGLang computes a prompt before its `n` samples.
    """
    return req.rid.startswith((HEALTH_PREFIX, PROBE_PREFIX)) or (
        req.sampling_params.max_new_tokens == 0
    )


def _is_opted_out(request: Any) -> bool:
    """Whether the front has marked a request as not to be recorded."""
    sampling = getattr(request, "sampling_params", None)
    params = getattr(sampling, "custom_params", None)
    return isinstance(params, dict) and bool(params.get(OPT_OUT))


def require_unscaled_kv(runner: Any) -> None:
    """Keys and values must be what the KV cache says they are, rounded at most.

    Raises:
        RuntimeError: they are to be multiplied by scales that are somewhere else.
    """
    layers = runner.model.model.layers
    has_scales = any(layer.self_attn.attn.k_scale is not None for layer in layers)
    if has_scales or runner.token_to_kv_pool.is_quantized_kv_cache:
        raise RuntimeError(
            f"--kv-cache-dtype is {runner.server_args.kv_cache_dtype!r} with scales; allowed: auto, bf16, fp8_e4m3 or "
            "fp8_e5m2 with a model that has none (or add --no-train to serve it without learning)"
        )


def layout_of(runner: Any, activation_dtype: ActivationDtype) -> RowLayout:
    """Row layout of a loaded model.

    Raises:
        ValueError: its rows cannot be stored in `activation_dtype`.
    """
    config = runner.model_config.hf_text_config
    attention = runner.model.model.layers[0].self_attn
    keys = runner.token_to_kv_pool.k_buffer[0]
    return RowLayout(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        intermediate_size=config.intermediate_size,
        has_qk_norm=hasattr(attention, "q_norm"),
        dtype=dtype_name(runner.dtype),
        cell=keys[0].numel() * keys.element_size() // runner.dtype.itemsize,
        page_size=runner.token_to_kv_pool_allocator.page_size,
        activation_dtype=activation_dtype,
    )


def positions_of(batch: Any, is_decode: bool) -> torch.Tensor:
    """Of a pass's tokens in their sequences, [tokens] int64 on the CPU, without waiting for a device."""
    if not batch.positions.is_cuda:
        positions: torch.Tensor = batch.positions
        return positions
    if is_decode:
        lengths: torch.Tensor = batch.seq_lens_cpu
        return lengths.long() - 1
    spans = zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True)
    return torch.cat([torch.arange(first, first + count) for first, count in spans])
