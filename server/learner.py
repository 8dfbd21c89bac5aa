"""Turns votes into versions: hands batches to the trainer, commits what comes back, publishes it.

Lives on the HTTP process's event loop. The ledger is the authority: a vote is consumed in the same transaction that
records the step and its version, so a trainer (or this process) that dies at any instant costs a repetition of work,
never a vote. One step is under way at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio

from alchemist.protocol import messages
from alchemist.protocol.errors import PeerProtocolError
from alchemist.protocol.lease import Lease
from alchemist.server.config import Config
from alchemist.server.conversations import Conversations
from alchemist.server.lease_status import lease_status
from alchemist.server.ledger import Ledger
from alchemist.server.live_version import LiveVersion, num_kept
from alchemist.server.publisher import Proven, Publisher, PublishRefused
from alchemist.server.records import Trainable, TrainingItem
from alchemist.server.row_link import RowLink
from alchemist.server.run import Run
from alchemist.server.samples import train_samples
from alchemist.server.suspension import Suspension
from alchemist.server.trainer_link import TrainerGone, TrainerLink

if TYPE_CHECKING:
    from alchemist.server.metrics import LearningMetrics

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_RECOUNT_S = 30.0
"""Votes are counted again when something says so; and after this long, if what should have said so was lost."""
_BUSY_REST_S = 30.0
"""After attempts to publish through a full queue, before there is another step to publish."""
_HELLO_TIMEOUT_S = 60.0
_ROWS_EVERY_S = 5.0
_DIRECTORY = re.compile(r"v\d+|\.tmp-.*")
"""How the trainer names a version's directory, and one that it is writing."""
_MAX_CRASHES = 3
"""Times a batch may end the trainer by its own fault before its votes are given up."""
_MAX_KILLS = 20
"""Times something else may end the trainer at work, each time on half as many votes, before the same."""


class Learner:
    """See the module. Created and used on one event loop."""

    def __init__(
        self,
        run: Run,
        config: Config,
        lease: Lease,
        suspension: Suspension,
        ledger: Ledger,
        manager: Any,
        metrics: LearningMetrics | None = None,
    ) -> None:
        """Args:
        manager: SGLang's TokenizerManager.
        """
        self._metrics = metrics
        self.run = run
        self.config = config
        self.lease, self.suspension = lease, suspension
        self.ledger = ledger
        self.step = 0
        self.paused = False
        self.stopping = False
        self.tokens_reused = 0
        self.tokens_recomputed = 0
        self.last_step: dict[str, Any] = {}
        self.last_error: str | None = None
        self.publisher = Publisher(manager, num_kept(config), config.probe_tolerance)
        self.conversations = Conversations(ledger, self.publisher, self.wake)
        self._context = zmq.asyncio.Context()
        self.trainer = TrainerLink(
            self._context,
            run.trainer_address,
            lease,
            config.lease_policy,
            config.trainer_timeout_s,
            self._welcome,
            self._trainer_ready,
            self._trainer_ended,
        )
        if manager.server_args.device == "cpu":
            suspension.attach(lambda: self.trainer.process.pid)
        self._rows = RowLink(self._context, run.rows_address())
        self._live = LiveVersion(config, ledger, self.publisher, self._rows, metrics)
        self._manager = manager
        self._hello: messages.SchedulerHello | None = None
        self._hello_came = asyncio.Event()
        self._training = False
        self._wake = asyncio.Event()
        self._flush_left = 0
        self._next_version = 1
        self._rests_until = 0.0
        """When a step is worth its while again after one that could not be published; monotonic seconds."""
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def live(self) -> int:
        """The version that answers requests which do not pin one."""
        return self._live.number

    # Life

    async def start(self) -> None:
        """Bring back what the ledger holds; requests may come when this returns.

        Raises:
            RuntimeError: the plugin in the scheduler is not whole.
        """
        control = self._context.socket(zmq.PULL)
        control.bind(self.run.control_address)
        self._spawn(self._hear_scheduler(control))
        try:
            await asyncio.wait_for(self._hello_came.wait(), _HELLO_TIMEOUT_S)
        except TimeoutError:
            raise RuntimeError("the plugin in the scheduler process did not say hello") from None
        assert self._hello is not None
        if self._hello.missing:
            raise RuntimeError(
                "SGLang functions are not wrapped: " + ", ".join(self._hello.missing)
            )
        await self._restore()
        if not self.config.no_train:
            self.trainer.start()
            self._spawn(self._train_forever())
            if self._metrics is not None:
                self._spawn(self._watch_rows(self._metrics))
        # What SGLang's processes have built until now lives as long as they do. To look through it for garbage would
        # stop serving for half a second every now and then.
        await self._manager.freeze_gc()

    async def stop(self) -> None:
        """End the trainer and keep everything; the ledger stays open for the caller to close."""
        self.stopping = True
        self.suspension.end()
        await self.trainer.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    def _spawn(self, coroutine: Any) -> None:
        self._tasks.append(asyncio.create_task(coroutine))

    async def _restore(self) -> None:
        recovery = await self.ledger.recover()
        versions = await self.ledger.versions()
        self._next_version = max((v.version for v in versions), default=0) + 1
        self.step = max((v.step or 0 for v in versions), default=0)
        self.paused = bool(await self.ledger.get_setting("paused", False))
        self.tokens_reused = int(await self.ledger.sum_metric("tokens_reused"))
        self.tokens_recomputed = int(await self.ledger.sum_metric("tokens_recomputed"))
        last = await self.ledger.last_step()
        if last is not None:
            self.last_step = {"step": last.step, "version": f"v{last.version}", **last.metrics}
        self._delete_orphans({Path(path).name for path in recovery.directories})
        paths = {v.version: v.path for v in versions if v.path and Path(v.path).is_dir()}
        refused = await self._live.restore(recovery, versions, paths)
        if refused is not None:
            # As in `_publish`: learning waits for a person.
            self.last_error, self.paused = str(refused), True
        if recovery.staged is not None and recovery.staged in paths:
            await self._publish(recovery.staged, paths[recovery.staged], recovery.live)
        logger.info(
            "live version v%d, step %d, %d version(s) loaded", self.live, self.step, len(paths)
        )

    def _delete_orphans(self, known: set[str]) -> None:
        """Directories of versions that were never committed; what others put there stays."""
        self.config.versions_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self.config.versions_path.iterdir():
            is_ours = _DIRECTORY.fullmatch(path.name) is not None
            if is_ours and path.name not in known and path.name != "v0":
                shutil.rmtree(path, ignore_errors=True)

    @property
    def is_ready(self) -> bool:
        """Whether the plugin is whole and the trainer, if one is wanted, is there."""
        return self._hello_came.is_set() and (self.config.no_train or self.trainer.is_ready)

    # Messages

    async def _hear_scheduler(self, control: zmq.asyncio.Socket) -> None:
        while True:
            data = await control.recv()
            try:
                message = messages.decode_to_main(data)
                if isinstance(message, messages.SchedulerHello):
                    self._hello = message
                    self._hello_came.set()
                elif isinstance(message, messages.Finished):
                    self.conversations.finished(message)
            except (PeerProtocolError, ValueError):
                logger.exception("a message of the scheduler was refused")

    def _welcome(self) -> messages.Welcome:
        assert self._hello is not None
        memory = self._hello.memory
        assert memory is not None
        return messages.Welcome(
            config=self.config.to_json().encode(),
            data_dir=self.config.data_dir,
            model_path=self._hello.model_path,
            context_length=self._hello.context_length,
            memory=memory,
            lease=self.run.lease,
            rows_address=self.run.rows_address(self._hello.tp_rank) if memory.rows else None,
        )

    def _trainer_ready(self) -> None:
        # v0 is a version like any other: its directory holds the weights the first step starts from.
        self.ledger.set_path(0, self.config.versions_path / "v0")
        self.wake()

    def _trainer_ended(self) -> None:
        if self._metrics is not None:
            self._metrics.on_trainer_restart()

    async def _watch_rows(self, metrics: LearningMetrics) -> None:
        while True:
            if stats := await self._rows.stats():
                metrics.on_rows(stats)
            await asyncio.sleep(_ROWS_EVERY_S)

    # Training

    async def voted(self, completion_id: str) -> None:
        """A vote was stored."""
        if not self.config.no_train:
            await self._rows.voted(completion_id)
        self.wake()

    def wake(self) -> None:
        """Something may have become trainable."""
        self._wake.set()

    async def _train_forever(self) -> None:
        waiting_since, failed_at = math.inf, -math.inf
        crashes = kills = 0
        has_given_up = False
        size, pairs = self.config.train_batch_size, self.config.objective == "dpo"
        pending: Trainable | None = None
        counted = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _POLL_S)
            if self._wake.is_set() or time.monotonic() - counted > _RECOUNT_S:
                self._wake.clear()
                pending = None
            is_resting = time.monotonic() < self._rests_until
            if self.paused or is_resting or not self.trainer.is_ready or self.stopping:
                continue
            try:
                await self._live.settle()
                if pending is None:
                    pending = await self.ledger.trainable(size, pairs=pairs)
                    counted = time.monotonic()
                    # Clocks that tell the time may be set back.
                    waiting_since = min(waiting_since, counted - pending.waited_s)
                if not pending.count:
                    waiting_since, self._flush_left = math.inf, 0
                    continue
                waited_s = time.monotonic() - max(waiting_since, failed_at)
                is_due = pending.count >= size or waited_s >= self.config.train_max_wait
                if not is_due and not self._flush_left:
                    continue
                # What may have ended the trainer for want of memory is tried again in smaller batches.
                items = await self.ledger.next_batch(
                    max(1, size >> kills), pairs=pairs, versions=self._live.fresh
                )
                # Votes may have been deleted since they were counted.
                if items:
                    try:
                        num_done = await self._train(items)
                        failed_at = -math.inf if num_done else time.monotonic()
                        self._flush_left = max(0, self._flush_left - num_done)
                    finally:
                        await self.ledger.release_batch()
                else:
                    self._flush_left = 0
                crashes = kills = 0
                has_given_up = False
                waiting_since = math.inf
                self._wake.set()
            except TrainerGone as error:
                self.last_error = str(error)
                crashes, kills = crashes + error.crashed, kills + error.killed
                if crashes >= _MAX_CRASHES or kills >= _MAX_KILLS:
                    reason = f"the trainer ended {crashes + kills} times on this batch: {error}"
                    if has_given_up:
                        # And on the one before: it is not the votes.
                        self.last_error, self.paused = f"training is paused: {reason}", True
                        logger.error("%s", self.last_error)
                        has_given_up, crashes, kills = False, 0, 0
                    elif await self._give_up(items, reason):
                        has_given_up = True
                        crashes = kills = 0
            except Exception as error:
                # Whatever goes wrong here must not end learning for good, nor touch serving.
                self.last_error = str(error)
                logger.exception("a training step did not complete; its votes stay pending")
                await asyncio.sleep(1.0)

    async def _give_up(self, items: list[TrainingItem], reason: str) -> bool:
        """Let votes fail that end the trainer; whether that could be written."""
        try:
            await self.ledger.fail_feedback({item.feedback_id: reason for item in items})
        except Exception as error:
            # A full disk, or one of them was deleted: they are tried again.
            self.last_error = str(error)
            logger.exception("votes that end the trainer stay pending")
            await asyncio.sleep(1.0)
            return False
        self._wake.set()
        return True

    async def _train(self, items: list[TrainingItem]) -> int:
        """One step; how many of the votes are not pending any more."""
        version, step, parent = self._next_version, self.step + 1, self.live
        samples, failed = train_samples(items, self.config.objective, self._manager.tokenizer)
        if failed:
            await self.ledger.fail_feedback(failed)
            items = [item for item in items if item.feedback_id not in failed]
        if not samples:
            return len(failed)
        request = messages.Train(step=step, parent=parent, version=version, samples=samples)
        self._training = True
        try:
            answer = await self.trainer.step(request)
            if isinstance(answer, messages.StepFailed):
                await self._step_failed(answer)
                return len(failed) + len(answer.failed)
            metrics: dict[str, Any] = {
                **answer.metrics,
                "tokens_reused": answer.tokens_reused,
                "tokens_recomputed": answer.tokens_recomputed,
            }
            trained = [item.feedback_id for item in items if item.feedback_id not in answer.failed]
            await self.ledger.commit_step(
                parent=parent,
                version=version,
                step=step,
                path=answer.path,
                metrics=metrics,
                trained=trained,
                failed=answer.failed,
            )
            self._next_version, self.step = version + 1, step
            self.tokens_reused += answer.tokens_reused
            self.tokens_recomputed += answer.tokens_recomputed
            self.last_error = None
            published = time.monotonic()
            proven = await self._publish(version, answer.path, parent)
            if proven is not None:
                await self._rows.trained(sorted({item.completion.id for item in items}))
            metrics["publish_s"] = time.monotonic() - published
            if proven is not None:
                metrics["publish_load_s"], metrics["publish_probe_s"] = proven[1:]
            self.last_step = {"step": step, "version": f"v{version}", **metrics}
            if self._metrics is not None:
                self._metrics.on_step(metrics)
            logger.info("step %d → v%d: %s", step, version, _brief(metrics))
            return len(failed) + (len(items) if proven is not None else len(answer.failed))
        finally:
            self._training = False

    async def _step_failed(self, answer: messages.StepFailed) -> None:
        self.last_error = answer.reason
        logger.error("step %d failed: %s", answer.step, answer.reason)
        if answer.failed:
            await self.ledger.fail_feedback(answer.failed)
        else:
            # Nobody in particular is at fault: try again later rather than at once.
            await asyncio.sleep(1.0)

    async def _publish(self, version: int, path: str, parent: int) -> Proven | None:
        """Make a version live; None: that was not to be, and its votes are pending again."""
        try:
            return await self._live.publish(version, path, parent)
        except PublishRefused as error:
            # Training waits for a person, but where the engine was only too busy.
            self.last_error = str(error)
            self._rests_until = time.monotonic() + _BUSY_REST_S if error.is_busy else 0.0
            self.paused = self.paused or not error.is_busy
            return None

    # What the API asks

    @property
    def state(self) -> str:
        """starting, idle, training, paused or off."""
        if self.config.no_train:
            return "off"
        if self.paused:
            return "paused"
        if self._training:
            return "training"
        return "idle" if self.trainer.is_ready else "starting"

    async def pause(self) -> None:
        """No step begins until `resume`; survives a restart. A step under way completes."""
        self.paused = True
        await self.ledger.set_setting("paused", True)

    async def resume(self) -> None:
        self.paused = False
        await self.ledger.set_setting("paused", False)
        self.wake()

    async def flush(self) -> None:
        """Train what is pending now without waiting for a full batch; returns at once."""
        self._flush_left = await self.ledger.count("pending")
        self.wake()

    async def promote(self, version: int) -> None:
        """Make a version live; the next step starts from it.

        Raises:
            NotFound: no such version. Conflict: it failed or its directory is gone.
        """
        await self._live.promote(version)

    async def rollback(self) -> None:
        """Make the live version's nearest servable ancestor live.

        Raises:
            Conflict: the base model is live.
        """
        await self._live.rollback()

    def num_recorded(self, rid: str) -> int:
        """See `Conversations`."""
        return self.conversations.num_recorded(rid)

    async def settle(self, rid: str) -> None:
        """See `Conversations`."""
        await self.conversations.settle(rid)

    async def training_status(self) -> dict[str, Any]:
        """The body of `GET /v1/training`."""
        counts = {
            state: await self.ledger.count(state)
            for state in ("waiting", "pending", "trained", "failed")
        }
        reused, recomputed = self.tokens_reused, self.tokens_recomputed
        return {
            "state": self.state,
            "step": self.step,
            "live_version": f"v{self.live}",
            **counts,
            "tokens_reused": reused,
            "tokens_recomputed": recomputed,
            "reuse_ratio": reused / max(1, reused + recomputed),
            "objective": self.config.objective,
            "reference": self.config.reference,
            "last_step": self.last_step,
            "last_error": self.last_error,
            "activations": {} if self.config.no_train else await self._rows.stats(),
            "trainer": {
                "pid": self.trainer.process.pid,
                "restarts": self.trainer.process.num_restarts,
            },
            "lease": lease_status(self.lease, self.suspension, self.config.lease_policy),
        }


def _brief(metrics: dict[str, Any]) -> str:
    return " ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in metrics.items()
    )
