"""How far a save has come, although QEMU reports nothing while it writes.

QEMU's main loop is frozen and its job only ever shows 0/1 or 1/1. What moves are the bytes that its process writes, as
the kernel counts them. Where that may not be seen, and of a disk with aio=native or io_uring, where it is not counted,
the blocks that the image's file takes grow with the state. (Its length does not do: a save that reuses freed clusters
does not change it.) Both stand still while the image is flushed at the end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from qsnap.host.processes import allocated_bytes, read_bytes, written_bytes

_log = logging.getLogger(__name__)

#: Seconds between two looks.
INTERVAL_S = 0.1
#: From this share of the expected state on, a standstill counts as the flush at the end.
_NEARLY_ALL = 0.9
#: Looks without growth that make a standstill.
_STANDSTILL = 2


class Phase(StrEnum):
    """The present phase of a save, a verification or an export."""

    PREPARING = "preparing"
    SAVING = "saving"
    FLUSHING = "flushing"
    VERIFYING = "verifying"
    EXPORTING = "exporting"
    LOADING = "loading"
    CHECKING = "checking"


class Progress(NamedTuple):
    """The progress of work under way. If the image cannot be seen, only the time is known."""

    phase: Phase
    elapsed_s: float
    written: int | None = None
    expected: int | None = None


Watcher = Callable[[Progress], None]


@asynccontextmanager
async def watched(
    watch: Watcher | None, pid: int | None, image: Path | None, expected: int | None
) -> AsyncIterator[None]:
    """Call *watch* every 0.1 s for the duration of a block.

    :param pid: QEMU's process, if it is on this machine.
    :param image: the file that holds the vmstate image, if it can be seen.
    :param expected: bytes that the VM state is likely to have.
    """
    if watch is None:
        yield
        return
    async with _beside(_look(watch, pid, image, expected)):
        yield


@asynccontextmanager
async def watched_load(watch: Watcher | None, pid: int | None, expected: int) -> AsyncIterator[None]:
    """Call *watch* every 0.1 s for the duration of a load.

    What moves are the bytes that QEMU reads, and those that we read to compare RAM with the snapshot: together about
    the VM state. Of another user's QEMU only the time is known.

    :param pid: QEMU's process, if it is on this machine.
    :param expected: bytes of the VM state.
    """
    if watch is None:
        yield
        return
    began, pids = time.monotonic(), (os.getpid(), pid)
    before = sum(map(read_bytes, pids))

    async def look() -> None:
        while True:
            done = sum(map(read_bytes, pids)) - before
            is_seen = bool(expected) and bool(read_bytes(pid))
            amounts = (min(done, expected), expected) if is_seen else (None, None)
            watch(Progress(Phase.LOADING, time.monotonic() - began, *amounts))
            await asyncio.sleep(INTERVAL_S)

    async with _beside(look()):
        yield


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do *work* for the duration of a block, and end it then."""
    looking = asyncio.create_task(work)
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.wait([looking])
        if not looking.cancelled() and (error := looking.exception()):
            cannot_watch(error)


def cannot_watch(error: BaseException) -> None:
    """Log the error. Neither a missing file nor a fault of the watcher is a fault of the save."""
    _log.warning("the save cannot be watched: %s", error)


async def _look(watch: Watcher, pid: int | None, image: Path | None, expected: int | None) -> None:
    began = time.monotonic()
    blocks = allocated_bytes(image) if image is not None else 0
    bytes_before = written_bytes(pid)
    written = standstill = 0
    while True:
        elapsed_s = time.monotonic() - began
        if image is None or not expected:
            watch(Progress(Phase.SAVING, elapsed_s))
        else:
            # A file system may free blocks that it reserved ahead; the state does not shrink by that.
            now = max(written, allocated_bytes(image) - blocks, written_bytes(pid) - bytes_before)
            standstill = standstill + 1 if now == written else 0
            written = now
            flushing = standstill >= _STANDSTILL and written >= _NEARLY_ALL * expected
            watch(Progress(Phase.FLUSHING if flushing else Phase.SAVING, elapsed_s, written, expected))
        await asyncio.sleep(INTERVAL_S)
