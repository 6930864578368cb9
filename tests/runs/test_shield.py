"""Work that a cancelled caller sees through."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qsnap.errors import OperationTimeout
from qsnap.runs.shield import in_thread, shielded

pytestmark = pytest.mark.no_qemu

#: Seconds after which a thread of these tests ends by itself.
_DEADLINE_S = 20.0


async def test_a_thread_is_told_to_end_and_waited_for() -> None:
    """It uses open files, which its caller closes."""
    begun, told, may_end, has_ended = (threading.Event() for _ in range(4))

    def work(ended: threading.Event) -> None:
        begun.set()
        assert ended.wait(_DEADLINE_S)
        told.set()
        assert may_end.wait(_DEADLINE_S)
        has_ended.set()

    caller = asyncio.ensure_future(in_thread(work))
    assert await asyncio.to_thread(begun.wait, _DEADLINE_S)
    caller.cancel()
    assert await asyncio.to_thread(told.wait, _DEADLINE_S)
    done, _ = await asyncio.wait([caller], timeout=0.05)
    assert not done
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert has_ended.is_set()


async def test_who_is_cancelled_learns_of_it_when_the_work_is_done() -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        begun.set()
        await may_end.wait()
        return "done"

    caller = asyncio.ensure_future(shielded(work(), _DEADLINE_S))
    async with asyncio.timeout(_DEADLINE_S):
        await begun.wait()
    for _ in range(2):
        caller.cancel()
        done, _ = await asyncio.wait([caller], timeout=0.01)
        assert not done
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await shielded(work(), _DEADLINE_S) == "done"


async def test_even_that_does_not_last_for_ever() -> None:
    with pytest.raises(OperationTimeout, match=r"has not answered for 0\.01 s"):
        await shielded(asyncio.Event().wait(), 0.01)


async def test_a_time_out_of_the_work_itself() -> None:
    async def work() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await shielded(work(), _DEADLINE_S)
