"""Work that a cancelled caller must still see through: resuming a guest, clearing up after a save."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from qsnap.errors import OperationTimeout

_T = TypeVar("_T")

#: Seconds for a thread to end that is to end: a piece takes milliseconds, a disk that does not answer much longer.
_END_S = 60.0


async def shielded(work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
    """Run *work* to its end, whoever cancels the caller meanwhile; pass the cancellation on afterwards.

    :param timeout_s: seconds after which even this ends.
    :raise OperationTimeout: they have passed.
    """

    async def bounded() -> _T:
        timer = asyncio.timeout(timeout_s)
        try:
            async with timer:
                return await work
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise OperationTimeout(f"QEMU, or the file system, has not answered for {timeout_s:g} s") from error

    task = asyncio.ensure_future(bounded())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


async def in_thread(work: Callable[[threading.Event], _T]) -> _T:
    """Do *work* in a thread. If we are cancelled, the event is set; it is to end soon then, and is waited for, because
    it uses open files."""
    ended = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, ended))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        ended.set()

        async def end() -> None:
            with suppress(Exception):
                await task

        await shielded(end(), _END_S)
        raise
