"""Work that a cancelled caller sees through."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qsnap.runs.shield import in_thread

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
