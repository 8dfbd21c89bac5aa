"""Which version answers, and how one takes the place of another: after a step, by a person, after a restart.

One at a time: whatever changes the live version, or which ones are loaded, holds the lock. The ledger is told first
what is to be, so that a restart finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alchemist.server.config import Config
from alchemist.server.errors import Conflict
from alchemist.server.ledger import Ledger
from alchemist.server.publisher import Proven, Publisher, PublishRefused
from alchemist.server.records import Recovery, Version
from alchemist.server.row_link import RowLink

if TYPE_CHECKING:
    from alchemist.server.metrics import LearningMetrics

logger = logging.getLogger(__name__)

_BUSY_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between attempts to publish through a full queue."""


def num_kept(config: Config) -> int:
    """Versions that are kept loaded and on disk."""
    # A recording may be as old as max_staleness and is differentiated with its own version.
    return max(config.keep_versions, config.max_staleness + 1)


class LiveVersion:
    """Lives on the HTTP process's event loop."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        publisher: Publisher,
        rows: RowLink,
        metrics: LearningMetrics | None,
    ) -> None:
        self._config, self._ledger, self._publisher = config, ledger, publisher
        self._rows, self._metrics = rows, metrics
        self._changing = asyncio.Lock()
        self._parents: dict[int, int | None] = {}
        self._unsettled: set[int] = set()
        """Versions that did not go live, which the ledger could not be told."""

    @property
    def number(self) -> int:
        """Of the version that answers requests which do not pin one."""
        return self._publisher.live

    @property
    def fresh(self) -> list[int]:
        """Versions whose answers are differentiated at the version that served them, the live one first. Votes on those
        are trained first: where more come than can be trained, waiting in line would make every one of them stale.
        """
        found: list[int] = []
        version: int | None = self.number
        while version is not None and len(found) <= self._config.max_staleness:
            found.append(version)
            version = self._parents.get(version)
        return found

    # After a restart

    async def restore(
        self, recovery: Recovery, versions: Sequence[Version], paths: Mapping[int, str]
    ) -> PublishRefused | None:
        """Load what the ledger holds; why the version that was live cannot be, if it cannot.

        Args:
            paths: of the versions whose directories are there.
        """
        for version in sorted(paths)[-num_kept(self._config) :]:
            if version not in (0, recovery.live, recovery.staged):
                with contextlib.suppress(PublishRefused):
                    await self._publisher.load(version, paths[version])
        self._parents = {v.version: v.parent for v in versions}
        self._publisher.live, refused = await self._restore_live(recovery.live, paths)
        await self._went_live(self.number)
        return refused

    async def _restore_live(
        self, live: int, paths: Mapping[int, str]
    ) -> tuple[int, PublishRefused | None]:
        """Load the live version, or its nearest ancestor that can be proven; which one it is."""
        version, refused = live, None
        skipped: list[int] = []
        while version:
            try:
                if version not in self._publisher.loaded:
                    if version not in paths:
                        raise PublishRefused(f"version v{version} is no longer kept")
                    await self._publisher.load(version, paths[version])
                break
            except PublishRefused as error:
                refused = error
                skipped.append(version)
                version = self._parents[version] or 0
        if refused is not None:
            await self._ledger.set_version_state(version, "live", None)
            for number in skipped:
                # What serves now has learned from none of them.
                await self._ledger.set_version_state(number, "failed", str(refused), requeue=True)
            logger.error("v%d cannot be served as it was made; v%d is live instead", live, version)
        return version, refused

    # After a step

    async def publish(self, version: int, path: str, parent: int) -> Proven | None:
        """Make a version live that was trained from `parent`; None: by now another one is, and stays. Where it does not
        go live its votes are pending again, for nobody was served by what they made.

        Raises:
            PublishRefused: it does not compute what the trainer does, or the engine is too busy to be asked.
        """
        self._parents[version] = parent
        try:
            async with self._changing:
                return await self._publish(version, path, parent)
        except PublishRefused:
            raise
        except Exception:
            if self.number != version:
                self._unsettled.add(version)
            raise

    async def _publish(self, version: int, path: str, parent: int) -> Proven | None:
        if self.number != parent:
            # Somebody promoted or rolled back while the step ran: that is not undone behind their back. The votes are
            # trained from what is live now.
            reason = f"v{self.number} was made live during the step"
            await self._ledger.set_version_state(version, "failed", reason, requeue=True)
            return None
        try:
            proven = await self._load_in_time(version, path)
        except PublishRefused as error:
            logger.error("%s; v%d stays live", error, self.number)
            await self._ledger.set_version_state(version, "failed", str(error), requeue=True)
            raise
        await self._ledger.set_version_state(version, "live", None)
        await self._went_live(version)
        logger.info("v%d is live (probe difference %.2g nats)", version, proven.difference)
        await self._publisher.retire({version})
        await self._prune()
        return proven

    async def _load_in_time(self, version: int, path: str) -> Proven:
        """`Publisher.load`, tried again where the engine is too busy for a probe."""
        for delay in _BUSY_S:
            try:
                return await self._publisher.load(version, path)
            except PublishRefused as error:
                if not error.is_busy:
                    raise
                await asyncio.sleep(delay)
        return await self._publisher.load(version, path)

    async def settle(self) -> None:
        """What a version has learned that did not go live is in nothing that serves: its votes are pending again. To be
        called before a step; the ledger may not have been told.
        """
        async with self._changing:
            for version in sorted(self._unsettled):
                # Somebody may have promoted it since.
                if version != self.number:
                    await self._publisher.drop(version)
                    reason = "it could not be published"
                    await self._ledger.set_version_state(version, "failed", reason, requeue=True)
                self._unsettled.discard(version)

    # By a person

    async def promote(self, version: int) -> None:
        """Make a version live; the next step starts from it.

        Raises:
            NotFound: no such version. Conflict: it failed or its directory is gone.
        """
        async with self._changing:
            found = await self._ledger.get_version(version)
            if found.state == "failed":
                raise Conflict(f"version v{version} failed: {found.reason}", "version")
            if version and version not in self._publisher.loaded:
                if found.path is None or not Path(found.path).is_dir():
                    raise Conflict(f"version v{version} is no longer kept")
                try:
                    await self._publisher.load(version, found.path)
                except PublishRefused as error:
                    raise Conflict(str(error)) from error
            await self._ledger.set_version_state(version, "live", None)
            await self._went_live(version)
            await self._publisher.retire({version})

    async def rollback(self) -> None:
        """Make the live version's nearest servable ancestor live.

        Raises:
            Conflict: the base model is live.
        """
        target = await self._ledger.rollback_target()
        if target is None:
            raise Conflict("v0 is live; there is no earlier version")
        await self.promote(target)

    # What comes of it

    async def _went_live(self, version: int) -> None:
        self._publisher.live = version
        if not self._config.no_train:
            fresh, loaded = self.fresh, self._publisher.loaded
            adapters = [loaded[v] for v in fresh if v in loaded]
            await self._rows.fresh([*([""] if 0 in fresh else []), *adapters])
        if self._metrics is not None:
            self._metrics.on_live(version)

    async def _prune(self) -> None:
        """Delete the directories of versions beyond --keep-versions that nothing needs."""
        for path in await self._ledger.prune_versions(num_kept(self._config)):
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
