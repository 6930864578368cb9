"""savevm, loadvm and delvm: snapshots by HMP's own commands, over whatever carries their text.

They take no devices and no vmstate node: QEMU takes all that a save must hold, and the first of them for the
VM state. The sequences make sure beforehand that it is the same choice. Success is silent; any text in the
answer is an error (QEMU's migration/migration-hmp-cmds.c and monitor/hmp.c; measured on 5.2 to 11.1).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qsnap.errors import JobFailed, NotSupported, QsnapError
from qsnap.model.qemu import RunState
from qsnap.model.runstates import is_live
from qsnap.monitor import NO_FILES, ignore
from qsnap.monitor.hmp import text as hmp_text

if TYPE_CHECKING:
    from qsnap.monitor.qmp.background import Background


class HmpSnapshots(ABC):
    """The snapshot verbs of :class:`qsnap.monitor.Monitor`, for a monitor that can give HMP a line."""

    chooses_devices = False
    live_obstacle = NO_FILES

    _under_way: asyncio.Task[None] | None = None

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
        await self._run("savevm", tag)

    async def snapshot_load(
        self, tag: str, vmstate: str, devices: Sequence[str], *, ended: Callable[[JobFailed | None], None] = ignore
    ) -> None:
        await self._run("loadvm", tag, ended)

    async def snapshot_delete(self, tag: str, devices: Sequence[str]) -> None:
        await self._run("delvm", tag)

    async def _run(self, command: str, tag: str, ended: Callable[[JobFailed | None], None] = ignore) -> None:
        line = f"{command} {hmp_text.quoted(tag)}"
        # A task of its own: a cancelled caller must not lose the answer, which settle() waits for.
        self._under_way = asyncio.create_task(self._done(command, line, ended))
        try:
            await asyncio.shield(self._under_way)
        finally:
            if self._under_way.done():
                self._under_way = None

    async def _done(self, command: str, line: str, ended: Callable[[JobFailed | None], None]) -> None:
        reason = hmp_text.error_in(await self.human_answer(line))
        failure = JobFailed(command, reason) if reason else None
        ended(failure)
        if failure:
            raise failure

    async def settle(self) -> QsnapError | None:
        if self._under_way is None:
            return None
        try:
            await self._under_way
        except JobFailed as failure:
            return failure
        finally:
            self._under_way = None
        return None

    async def load_outcome(self, doubt: QsnapError, *, was_running: bool) -> QsnapError | None:
        # loadvm stops a guest that runs, and resumes it after success alone
        return None if was_running and is_live(await self.runstate()) else doubt

    async def tidy(self) -> None:
        return  # HMP is handed no files
