"""savevm, loadvm and delvm: snapshots by HMP's own commands, over whatever carries their text.

They take no devices and no vmstate node: QEMU takes all that a save must hold, and the first of them for the
VM state. The sequences make sure beforehand that it is the same choice. Success is silent; any text in the
answer is an error (QEMU's migration/migration-hmp-cmds.c and monitor/hmp.c; measured on 5.2 to 11.1).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from qsnap.errors import JobFailed, NotSupported, QsnapError
from qsnap.model.qemu import RunState
from qsnap.model.runstates import is_live
from qsnap.monitor.hmp import text as hmp_text
from qsnap.monitor.protocol import NO_FILES

if TYPE_CHECKING:
    from qsnap.monitor.qmp.background import Background


class HmpSnapshots(ABC):
    """The snapshot verbs of :class:`qsnap.monitor.Monitor`, for a monitor that can give HMP a line."""

    chooses_devices = False
    live_obstacle = NO_FILES

    _under_way: asyncio.Task[JobFailed | None] | None = None

    @property
    def live(self) -> Background:
        raise NotSupported("live snapshots, and clearing up after one that was cut short, take QMP")

    @abstractmethod
    async def human_answer(self, line: str) -> str:
        """What HMP answers to *line*."""

    @abstractmethod
    async def runstate(self) -> RunState:
        """The guest's run state."""

    async def snapshot_save(self, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        async with self._ended("savevm", tag):
            pass

    def snapshot_load(
        self, tag: str, vmstate: str, devices: Sequence[str]
    ) -> AbstractAsyncContextManager[JobFailed | None]:
        return self._ended("loadvm", tag)

    async def snapshot_delete(self, tag: str, devices: Sequence[str]) -> None:
        async with self._ended("delvm", tag):
            pass

    @asynccontextmanager
    async def _ended(self, command: str, tag: str) -> AsyncIterator[JobFailed | None]:
        line = f"{command} {hmp_text.quoted(tag)}"
        # A task of its own: a cancelled caller must not lose the answer, which settle() waits for.
        self._under_way = asyncio.create_task(self._done(command, line))
        try:
            failure = await asyncio.shield(self._under_way)
        finally:
            if self._under_way.done():
                self._under_way = None
        yield failure
        if failure:
            raise failure

    async def _done(self, command: str, line: str) -> JobFailed | None:
        reason = hmp_text.error_in(await self.human_answer(line))
        return JobFailed(command, reason) if reason else None

    async def settle(self) -> QsnapError | None:
        try:
            return await self._under_way if self._under_way else None
        finally:
            self._under_way = None

    async def load_outcome(self, doubt: QsnapError, *, was_running: bool) -> QsnapError | None:
        # loadvm stops a guest that runs, and resumes it after success alone
        return None if was_running and is_live(await self.runstate()) else doubt

    async def tidy(self) -> None:
        return  # HMP is handed no files
