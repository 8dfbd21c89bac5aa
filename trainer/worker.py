"""The trainer process: takes batches of votes, makes versions.

It holds the LoRA masters and the optimizer state, and maps everything else: the base weights, the KV pool and the
recorded rows are the server's own memory. It commits nothing: a step's result is a directory on disk and an answer; the
server decides what becomes of both. It may be killed at any instant.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
import zmq
from transformers import AutoConfig

from alchemist.protocol import messages
from alchemist.protocol.cores import divides, trainer_cores
from alchemist.protocol.lease import Gate, Lease
from alchemist.protocol.manifest import Manifest
from alchemist.protocol.states import LeaseState, TrainerEvent
from alchemist.protocol.tensors import Importer
from alchemist.trainer.families import ModelShape
from alchemist.trainer.launches import Launches
from alchemist.trainer.lora import LoraAdapter, LoraConfig
from alchemist.trainer.optimizer import Optimizer, OptimizerConfig
from alchemist.trainer.rowdesk import RowDesk
from alchemist.trainer.rows import ActivationView, Recorded
from alchemist.trainer.step import (
    Objective,
    ReplayEngine,
    Sample,
    SampleTooLarge,
    VersionGroup,
    is_of_memory,
)
from alchemist.trainer.user_loss import UserLossError
from alchemist.trainer.versions import VersionStore
from alchemist.trainer.weights import BaseWeights

logger = logging.getLogger(__name__)

PROBE_TOKENS = 64


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The server's configuration as far as the trainer needs it; same names, see `server.config.Config`."""

    objective: str
    loss_type: str
    label_smoothing: float
    lora_rank: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    learning_rate: float
    optimizer: str
    weight_decay: float
    beta: float
    desirable_weight: float
    undesirable_weight: float
    reference: str
    max_grad_norm: float
    train_max_tokens: int
    max_staleness: int
    lease_policy: str
    seed: int


class SampleError(ValueError):
    """A sample that cannot be trained; the message says why."""


MAX_OUT_OF_MEMORY = 3
"""Times in a row that a step may run out of memory where it cannot be split, before its votes fail."""


class Worker:
    """One trainer, from the server's welcome on."""

    def __init__(
        self, welcome: messages.Welcome, context: zmq.Context[zmq.Socket[bytes]], server_pid: int
    ) -> None:
        self.settings = settings = msgspec.json.decode(welcome.config, type=Settings)
        memory = welcome.memory
        config = AutoConfig.from_pretrained(welcome.model_path, trust_remote_code=False)
        self.shape = ModelShape.from_config(config)
        self._max_tokens = welcome.context_length
        self._importer = Importer()
        tensors = {name: self._importer.open(handle) for name, handle in memory.weights.items()}
        self.shared_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        weights = BaseWeights(tensors, self.shape)
        self.dtype, self.device = weights.dtype, weights.device
        self.lease = Lease.attach(welcome.lease)
        launches = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            launches = Launches(self.device)
        self.gate = Gate(
            self.lease,
            alive=lambda: os.getppid() == server_pid,
            drain=launches.drain if launches else None,
            on_state=_take_cores() if launches is None and divides(settings.lease_policy) else None,
        )
        view = None
        self.desk: RowDesk | None = None
        if memory.rows is not None and welcome.rows_address is not None:
            view = self._make_view(memory, memory.rows)
            self.desk = RowDesk(context, welcome.rows_address)
        self.engine = ReplayEngine(
            weights,
            self.shape,
            view=view,
            gate=launches.bounded(self.gate) if launches else self.gate,
            max_tokens=settings.train_max_tokens,
        )
        self.objective = Objective(
            name=settings.objective,
            loss_type=settings.loss_type,  # type: ignore[arg-type]
            label_smoothing=settings.label_smoothing,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
            reference=settings.reference,  # type: ignore[arg-type]
        )
        self.store = VersionStore(Path(welcome.data_dir) / "versions", welcome.model_path)
        self._served: dict[int, LoraAdapter] = {}
        self._times_out_of_memory = 0
        """Since the last step that was done."""
        self._masters: LoraAdapter | None = None
        self._optimizer: Optimizer | None = None
        self._masters_of = -1
        if not self.store.exists(0):
            self._make_v0()
        if self.device.type == "cuda":
            self._try_out(weights)
        self.lease.advance(TrainerEvent.ATTACHED)

    def _make_view(
        self, memory: messages.SharedMemory, rows: messages.SharedRows
    ) -> ActivationView:
        """The recorded rows, mapped."""
        opened = self._importer.open
        host, k, v = ([opened(h) for h in handles] for handles in (rows.host, memory.k, memory.v))
        gens, cells = opened(rows.gens), opened(rows.cells)
        if self.device.type == "cpu" or rows.counts is None:
            return ActivationView(memory.layout, host, k, v, gens, cells)
        # Not before: a machine without a GPU need not have Triton.
        from alchemist.trainer.gpu_rows import GpuView

        for handle in rows.host[:1]:
            # All layers are in one segment.
            self._importer.pin(handle)
        return GpuView(memory.layout, host, k, v, gens, cells, opened(rows.counts))

    def close(self) -> None:
        """Let go of the server's memory."""
        self._importer.close()

    def _make_v0(self) -> None:
        """The base model as an adapter: A as PEFT initialises it, B zero. Every first step starts from it."""
        config = LoraConfig(
            rank=self.settings.lora_rank,
            alpha=self.settings.lora_alpha,
            target_modules=self.settings.target_modules,
        )
        masters = LoraAdapter.init(self.shape, config, self.settings.seed)
        proof = Manifest(version=0, parent=None, step=0, probe_ids=[], probe_logprobs=[])
        self.store.save(proof, masters, self._make_optimizer(masters))

    def _try_out(self, weights: BaseWeights) -> None:
        """A step of a few tokens that changes nothing: what this GPU or its software cannot do then fails the
        start, and not the votes.
        """
        sample = Sample(prompt_ids=[0, 0], response_ids=[0, 0], label=True)
        engine = ReplayEngine(weights, self.shape)
        found = engine.gradients([sample], self._as_served(0), Objective(name="sft"))
        logger.info("a step of two tokens: loss %.3g", found.loss)

    def _make_optimizer(self, masters: LoraAdapter) -> Optimizer:
        config = OptimizerConfig(
            name=self.settings.optimizer,
            learning_rate=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            max_grad_norm=self.settings.max_grad_norm,
        )
        return Optimizer(masters.weights, config)

    # One step

    def train(self, request: messages.Train) -> messages.StepDone | messages.StepFailed:
        """Do one step. Failures of samples or of the whole step are answers, not exceptions."""
        self.gate.start()
        self.lease.advance(TrainerEvent.STEP_BEGUN)
        try:
            return self._train(request)
        except (ArithmeticError, SampleTooLarge, UserLossError) as error:
            logger.exception("step %d failed", request.step)
            # It would fail again: its votes must not come back for ever.
            failed = {sample.feedback_id: str(error) for sample in request.samples}
            return messages.StepFailed(step=request.step, reason=str(error), failed=failed)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            is_out = is_of_memory(error)
            if isinstance(error, RuntimeError) and not is_out:
                raise
            logger.exception("step %d failed", request.step)
            reason = f"{type(error).__name__}: {error}"
            self._times_out_of_memory += is_out
            failed = {}
            if self._times_out_of_memory >= MAX_OUT_OF_MEMORY:
                # Outside of what is split: nothing will make it fit.
                failed = {sample.feedback_id: reason for sample in request.samples}
                self._times_out_of_memory = 0
            return messages.StepFailed(step=request.step, reason=reason, failed=failed)
        finally:
            self.lease.advance(TrainerEvent.STEP_ENDED)

    def _train(self, request: messages.Train) -> messages.StepDone | messages.StepFailed:
        started = time.perf_counter()
        waited_before = self.gate.waited_s
        self.gate()
        masters, optimizer = self._state_of(request.parent)
        failed = self._unfit(request.samples)
        good = _without(request.samples, failed)
        versions = [self._differentiate_at(sample, request.parent) for sample in good]
        ticket, recorded = self._check_out(good, versions)
        try:
            failed |= self._foreign(good, recorded)
            fit = {id(sample) for sample in _without(good, failed)}
            every = zip(versions, good, recorded, strict=True)
            chosen = sorted((one for one in every if id(one[1]) in fit), key=lambda one: one[0])
            if not chosen:
                return messages.StepFailed(
                    step=request.step, reason="no sample can be trained", failed=failed
                )
            members: dict[int, list[Sample]] = {}
            for version, sample, rows in chosen:
                members.setdefault(version, []).append(_sample(sample, rows))
            good = [sample for _, sample, _ in chosen]
            groups = [VersionGroup(self._as_served(v), members[v]) for v in members]
            checked_out = time.perf_counter()
            result = self.engine.step_gradients(groups, self.objective)
        except SampleTooLarge as error:
            if not error.samples:
                raise
            failed |= {good[i].feedback_id: str(error) for i in error.samples}
            _without(good, failed)
            return messages.StepFailed(step=request.step, reason=str(error), failed=failed)
        finally:
            if ticket is not None and self.desk is not None:
                self.desk.check_in(ticket)
        if not math.isfinite(result.loss):
            bad = {
                sample.feedback_id: "its log-probabilities are not finite"
                for sample, found in zip(good, result.samples, strict=True)
                if not bool(torch.isfinite(found.logps).all())
            }
            if not bad:
                raise FloatingPointError(f"the loss is {result.loss}")
            _without(good, bad)
            reason = f"the loss is {result.loss}"
            return messages.StepFailed(step=request.step, reason=reason, failed=failed | bad)
        before_update = time.perf_counter()
        grad_norm = optimizer.step(result.grads)
        served = masters.as_served(self.dtype)
        after_update = time.perf_counter()
        metrics = {
            "loss": result.loss,
            "grad_norm": grad_norm,
            **result.metrics,
            "num_samples": float(len(good)),
            "num_stale": float(
                sum(self._differentiate_at(s, request.parent) != s.version for s in good)
            ),
            "tokens_reference": float(result.tokens_reference),
            "rows_revoked": float(result.rows_revoked),
            "check_out_s": checked_out - started,
            **{f"{phase}_s": seconds for phase, seconds in result.seconds.items()},
            "optimizer_s": after_update - before_update,
            "lease_wait_s": self.gate.waited_s - waited_before,
        }
        probe_ids, probe_logprobs = self._probe(good, served)
        proof = Manifest(
            version=request.version,
            parent=request.parent,
            step=request.step,
            probe_ids=probe_ids,
            probe_logprobs=probe_logprobs,
            metrics=metrics,
        )
        path = self.store.save(proof, masters, optimizer)
        self._masters_of = request.version
        self._times_out_of_memory = 0
        self._served[request.version] = served
        metrics["save_s"] = time.perf_counter() - after_update
        metrics["step_s"] = time.perf_counter() - started
        return messages.StepDone(
            step=request.step,
            version=request.version,
            path=str(path),
            metrics=metrics,
            failed=failed,
            tokens_reused=result.tokens_reused,
            tokens_recomputed=result.tokens_recomputed,
        )

    def _state_of(self, version: int) -> tuple[LoraAdapter, Optimizer]:
        """Masters and optimizer state of a version, in memory when they are the ones of the last step."""
        # Until the step's directory is on disk, memory and disk differ: after a failure they are read again.
        at, self._masters_of = self._masters_of, -1
        if at != version or self._masters is None or self._optimizer is None:
            masters = self.store.load(version, self.shape)
            self._masters = masters.as_served(torch.float32, self.device)
            self._optimizer = self._make_optimizer(self._masters)
            self.store.load_optimizer(version, self._optimizer)
        return self._masters, self._optimizer

    def _as_served(self, version: int) -> LoraAdapter:
        """The adapter that answered for a version, in the serving dtype."""
        if version not in self._served:
            self._served[version] = self.store.load(version, self.shape).as_served(
                self.dtype, self.device
            )
        adapter = self._served.pop(version)
        self._served[version] = adapter
        while len(self._served) > self.settings.max_staleness + 2:
            self._served.pop(next(iter(self._served)))
        return adapter

    def _differentiate_at(self, sample: messages.TrainSample, parent: int) -> int:
        """The version whose weights the sample's gradient is taken at: its own, if `parent` is that or was trained from
        it in no more than --max-staleness steps; not if it is too old, gone, or was rolled back.
        """
        version: int | None = parent
        for _ in range(self.settings.max_staleness + 1):
            if version is None or not self.store.exists(version):
                break
            if version == sample.version:
                return version
            try:
                version = self.store.parent(version)
            except (OSError, ValueError):
                # As good as gone.
                break
        return parent

    def _unfit(self, samples: Sequence[messages.TrainSample]) -> dict[str, str]:
        """Samples that cannot be trained: feedback id → why."""
        failed: dict[str, str] = {}
        for sample in samples:
            try:
                self._check_sample(sample)
            except SampleError as error:
                failed[sample.feedback_id] = str(error)
        return failed

    def _foreign(
        self, samples: Sequence[messages.TrainSample], recorded: Sequence[Recorded | None]
    ) -> dict[str, str]:
        """Samples whose recorded rows are not those of their tokens: feedback id → why."""
        failed: dict[str, str] = {}
        for sample, rows in zip(samples, recorded, strict=True):
            if rows is None:
                continue
            token = self.engine.foreign_token(messages.unpack_ids(_served(sample)), rows)
            if token is not None:
                failed[sample.feedback_id] = (
                    f"the activations recorded for token {token} are not that token's"
                )
                logger.error("feedback %s: %s", sample.feedback_id, failed[sample.feedback_id])
        return failed

    def _check_sample(self, sample: messages.TrainSample) -> None:
        prompt, response = (
            messages.unpack_ids(ids) for ids in (sample.prompt_ids, sample.response_ids)
        )
        if not prompt or not response:
            raise SampleError("the completion has no tokens to learn from")
        if self.objective.name == "sft" and not sample.label:
            raise SampleError("objective sft learns from up-votes and corrections only")
        limit = self._max_tokens
        if len(prompt) + len(response) > limit:
            raise SampleError(f"{len(prompt) + len(response)} tokens; the model takes {limit}")
        if not all(0 <= token < self.shape.vocab_size for token in (*prompt, *response)):
            raise SampleError(f"a token id is outside the vocabulary of {self.shape.vocab_size}")

    def _check_out(
        self, samples: Sequence[messages.TrainSample], versions: Sequence[int]
    ) -> tuple[int | None, list[Recorded | None]]:
        """Recorded rows of each sample's prompt, for those differentiated at the version that served them."""
        rows: list[Recorded | None] = [None] * len(samples)
        own = [i for i, sample in enumerate(samples) if sample.version == versions[i]]
        if self.desk is None or not own:
            return None, rows
        ticket, found = self.desk.check_out(
            [
                messages.Prompt(
                    rid=samples[i].completion_id,
                    extra_key=samples[i].extra_key,
                    token_ids=_served(samples[i]),
                )
                for i in own
            ]
        )
        for i, recorded in zip(own, found, strict=True):
            rows[i] = recorded
        return ticket, rows

    def _probe(
        self, samples: Sequence[messages.TrainSample], served: LoraAdapter
    ) -> tuple[list[int], list[float]]:
        """Tokens for the engine to prove the new version on, and our logprobs of all but the first."""
        ids = [
            *messages.unpack_ids(samples[0].prompt_ids),
            *messages.unpack_ids(samples[0].response_ids),
        ]
        ids = ids[:PROBE_TOKENS]
        logprobs = self.engine.score([(ids[:1], ids[1:])], served)[0]
        return ids, [float(value) for value in logprobs]


def _served(sample: messages.TrainSample) -> bytes:
    """Packed ids of the tokens that serving may have recorded: of the answer all but the last one, which was sampled
    and never computed.
    """
    return sample.prompt_ids + (b"" if sample.is_correction else sample.response_ids[:-4])


def _without(
    samples: Sequence[messages.TrainSample], failed: dict[str, str]
) -> list[messages.TrainSample]:
    """The samples that have not failed; one whose pair has lost its other answer fails with it."""
    lost = {sample.match for sample in samples if sample.feedback_id in failed} - {""}
    for sample in samples:
        if sample.match in lost:
            failed.setdefault(sample.feedback_id, "the other answer of its pair cannot be trained")
    return [sample for sample in samples if sample.feedback_id not in failed]


def _sample(sample: messages.TrainSample, recorded: Recorded | None) -> Sample:
    return Sample(
        prompt_ids=messages.unpack_ids(sample.prompt_ids),
        response_ids=messages.unpack_ids(sample.response_ids),
        label=sample.label,
        weight=sample.weight,
        recorded=recorded,
        match=sample.match,
    )


def run(address: str, server_pid: int) -> None:
    """Say hello at `address` and serve until told to stop or process `server_pid`, our parent, is gone."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(address)
    socket.send(messages.encode(messages.TrainerHello(pid=os.getpid())))
    worker: Worker | None = None
    while os.getppid() == server_pid:
        if not socket.poll(500):
            continue
        message = messages.decode_to_trainer(socket.recv())
        if isinstance(message, messages.Stop):
            break
        if isinstance(message, messages.Welcome):
            worker = Worker(message, context, server_pid)
            # It lives as long as the process; a search of it for garbage is a stretch without a gate.
            gc.freeze()
            ready = messages.TrainerReady(pid=os.getpid(), weights_shared_bytes=worker.shared_bytes)
            socket.send(messages.encode(ready))
        elif isinstance(message, messages.Train) and worker is not None:
            socket.send(messages.encode(worker.train(message)))
    if worker is not None:
        worker.close()
    context.destroy(linger=1000)


def _take_cores() -> Callable[[LeaseState], None]:
    """On a CPU the trainer keeps to its part of the cores where it does not have them for itself."""
    every = torch.get_num_threads()

    def on_state(state: LeaseState) -> None:
        torch.set_num_threads(every if state is LeaseState.GRANTED else trainer_cores(every))

    return on_state
