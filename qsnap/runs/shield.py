"""Work that a cancelled caller must still see through: resuming a guest, clearing up after a save."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from qsnap.errors import OperationTimeout

_T = TypeVar("_T")


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
