"""When to stop the guest in a live save, so that it stands still for a few milliseconds whatever its memory.

Before QEMU takes the device state it reads a byte of every page of RAM (migration.c: bg_migration_thread; ram.c:
ram_write_tracking_prepare), so that each page is there to be write-protected. That takes 5 ms per GiB in a fresh
process with huge pages, and 40 to 100 ms per GiB in each later save, as write protection splits them. The guest may
run meanwhile. QEMU tells nothing of it; but the kernel tells how much processor time QEMU's thread has had, which
varies little from save to save of RAM in base pages (wall time varies by a factor of three on a busy machine). Of RAM
in huge pages it was seen to vary from 10 to 300 ms for 4 GiB, unless it was read a moment before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from qsnap.host.hugepages import Layout

#: What was learnt is of use as long as no more of the RAM than that share has changed between base and huge pages.
_SAME = 1 / 16
#: Seconds between two looks.
_LOOK_S = 0.001
#: Seconds after which the guest is stopped whatever the thread does: it has read some hundred GiB by then.
_PATIENCE_S = 60.0


class ReadTime(NamedTuple):
    """How long QEMU took.

    :ivar spent_ns: processor time of its thread, before it took the device state.
    :ivar base: bytes of RAM that were in base pages.
    """

    spent_ns: int
    base: int

    @classmethod
    def decode(cls, text: str) -> ReadTime | None:
        """What :meth:`encode` has written; None if it has not."""
        fields = text.split(" ")
        return cls(*map(int, fields)) if len(fields) == len(cls._fields) and all(map(str.isdecimal, fields)) else None

    def encode(self) -> str:
        """As the text of a mark."""
        return f"{self.spent_ns} {self.base}"

    def is_of(self, ram: Layout) -> bool:
        """Whether it can be expected of RAM that is mapped so."""
        return self.spent_ns > 0 and abs(self.base - ram.base) <= sum(ram) * _SAME


class SnapshotThread:
    """The thread that QEMU starts for a background snapshot: of those that come up from now on the busiest.

    Where /proc does not show QEMU's threads it is never seen to have had any time.
    """

    def __init__(self, pid: int | None) -> None:
        self._tasks = Path(f"/proc/{pid}/task") if pid is not None else None
        self._before = self._names()

    def _names(self) -> set[str]:
        if self._tasks is not None:
            with suppress(OSError):
                return {path.name for path in self._tasks.iterdir()}
        return set()

    @property
    def spent_ns(self) -> int:
        """The processor time that it has had; 0 if it is not there."""
        spent = [0]
        for name in self._names() - self._before if self._before else ():
            assert self._tasks is not None
            with suppress(OSError, ValueError, IndexError):
                spent.append(int((self._tasks / name / "schedstat").read_text().split()[0]))
        return max(spent)

    async def until_it_has_spent(self, goal_ns: int | None, is_too_late: Callable[[], Awaitable[bool]]) -> int:
        """Return when it has had that much processor time, or when it *is_too_late*.

        :return: the processor time that was seen last.
        """
        spent = 0
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            seen = self.spent_ns
            if (goal_ns is not None and seen >= goal_ns) or await is_too_late():
                break
            spent = max(spent, seen)
            await asyncio.sleep(_LOOK_S)
        return spent
