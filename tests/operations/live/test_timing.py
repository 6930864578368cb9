"""How long QEMU took to read all RAM, as it is kept between live saves."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from qsnap.host.hugepages import Layout
from qsnap.operations.live import timing
from qsnap.operations.live.timing import ReadTime, SnapshotThread
from support.guest import until

pytestmark = pytest.mark.no_qemu


@pytest.mark.parametrize("text", ["", "5", "5 6 7", "a 6", "5 -6", "5  6", "5.0 6"])
def test_a_pace_that_is_none(text: str) -> None:
    """A mark that somebody else has made, or another version."""
    assert ReadTime.decode(text) is None


def test_a_time_is_of_ram_that_is_mapped_alike() -> None:
    seen = ReadTime(30, 1000)
    assert ReadTime.decode(seen.encode()) == seen
    assert all(seen.is_of(Layout(base, 1600 - base)) for base in (900, 1000, 1100))
    assert not any(seen.is_of(Layout(base, 1600 - base)) for base in (0, 899, 1101))
    assert not ReadTime(0, 1000).is_of(Layout(1000, 600)), "that nothing was seen is not a time"


async def test_the_goal_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest is stopped then, and not when QEMU has stopped it by itself."""
    seen = iter((0, 3, 8))
    monkeypatch.setattr(SnapshotThread, "spent_ns", property(lambda _: next(seen)))

    async def is_too_late() -> bool:
        return False

    assert await SnapshotThread(None).until_it_has_spent(8, is_too_late) == 3


@pytest.mark.parametrize("goal", [None, 100])
async def test_what_was_seen_when_it_is_too_late(monkeypatch: pytest.MonkeyPatch, goal: int | None) -> None:
    """The most of it: where the thread has ended there is nothing any more."""
    seen = iter((0, 3, 8, 0))
    late = iter((False, False, False, True))
    monkeypatch.setattr(SnapshotThread, "spent_ns", property(lambda _: next(seen)))

    async def is_too_late() -> bool:
        return next(late)

    assert await SnapshotThread(None).until_it_has_spent(goal, is_too_late) == 8


async def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PATIENCE_S", 0.02)

    async def is_too_late() -> bool:
        return False

    assert await asyncio.wait_for(SnapshotThread(None).until_it_has_spent(None, is_too_late), 20) == 0


def test_a_process_of_another_machine() -> None:
    assert SnapshotThread(None).spent_ns == 0


def test_the_time_of_a_thread_that_comes_up() -> None:
    """Not of those that were there before: they have had much more."""
    seen = SnapshotThread(os.getpid())
    assert seen.spent_ns == 0
    may_end = threading.Event()

    def work() -> None:
        while not may_end.is_set():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert 0 < until("its time", lambda: seen.spent_ns or None, 20) < 20_000_000_000
    finally:
        may_end.set()
        thread.join()
