"""The moment of a live save: disk snapshots and device state taken in one stop of some milliseconds.

QEMU's background snapshot makes the VM state, and a transaction makes the disks' snapshots. They are of one moment if
the guest stands still from before the one until after the other. There are two ways to ensure that:

* *late*: the guest is stopped when QEMU's thread has read most of RAM, as far as that can be known: when it has had
  most of the processor time that it took the last time. If QEMU was faster nevertheless, it has stopped and resumed the
  guest by itself before, and the disks would be of another moment. That shows in the order of events; the attempt is
  given up, and repeated.
* *plain*: the guest is stopped first, and stands still while QEMU reads its RAM: where that takes no longer than to
  stop late, as with little RAM, or RAM in huge pages; and where nothing is known.

First RAM is put back into huge pages (:mod:`qsnap.host.hugepages`), where that is possible. If that is not enough for
the plain way, a stream that nobody wants is begun and cancelled, from 9.0 on: what QEMU has read a moment ago it reads
in a fraction of the time (4 GiB in huge pages in 10 to 20 ms, instead of up to 300 where the host has to find the
memory first), and that time is known then. Up to 8.2 a stream must not be cancelled. There qsnap does it once,
with a stream that runs to its end and is thrown away, and only for RAM in base pages.
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from qsnap.errors import JobFailed, QsnapError
from qsnap.host import bulk_io, files, hugepages
from qsnap.host.hugepages import Layout
from qsnap.inventory.state_file import STREAM_OFFSET
from qsnap.monitor.names import READ_TIME
from qsnap.monitor.qmp.background import Stream
from qsnap.operations.live.timing import ReadTime, SnapshotThread
from qsnap.operations.progress import INTERVAL_S, Phase, Progress, Watcher
from qsnap.runs.group import Point
from qsnap.runs.pause import Pause, stopped
from qsnap.runs.run import Run
from qsnap.runs.shield import shielded

_GIB = 1 << 30
#: The share of it after which the guest is stopped. It was seen to vary by a tenth.
_SHARE = 0.85
#: Nanoseconds per GiB that QEMU needs to read and protect RAM in base pages, and RAM in huge pages, at the slowest.
_BASE_NS, _HUGE_NS = 100_000_000, 5_000_000
#: The share of RAM in base pages with which it is left as it is.
_HARDLY_ANY = 1 / 32
#: Seconds between two looks whether the device state has been taken.
_LOOK_S = 0.001
#: Seconds that QEMU may take for the device state.
_STATE_TIMEOUT_S = 120.0


class Freeze(ABC):
    """A live save, from its first stop to the end of its stream.

    The subclasses hold the differences between QEMU before 9.0 and from 9.0 on.

    :cvar PLAIN_NS: nanoseconds that QEMU may take to read RAM in the pause: stopping late gains nothing below this.
    :cvar LATE_ATTEMPTS: attempts to stop late, before the guest is stopped first.
    :param file: the state file to be, open.
    :param snapshot_disks: takes the disks' snapshots while the guest is stopped.
    :param forget_disks: removes them again.
    :param images: files of the disks: the host's pending writes are flushed before the guest is stopped.
    """

    PLAIN_NS: int
    LATE_ATTEMPTS: int

    def __init__(
        self,
        run: Run,
        file: int,
        *,
        snapshot_disks: Callable[[], Awaitable[None]],
        forget_disks: Callable[[], Awaitable[None]],
        images: Sequence[Path],
    ) -> None:
        self._monitor = run.monitor
        self._background = run.monitor.live
        self._journal = run.journal
        # A description of its own, of which QEMU gets a copy: its position is QEMU's
        try:
            self._file = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise JobFailed("open", f"the state file: {error.strerror}") from error
        self._snapshot_disks = snapshot_disks
        self._forget_disks = forget_disks
        self._images = images

    async def freeze(self) -> Pause:
        """Take disks and device state, and leave the guest running, while QEMU writes its RAM.

        :raise JobFailed: QEMU reported an error. The guest runs; the stream may still be under way.
        """
        ram = await self._ram(await self._monitor.memory_size())
        if ram.base / _GIB * _BASE_NS + ram.other / _GIB * _HUGE_NS <= self.PLAIN_NS:
            await self._flush()
            pause, _ = await self._plain()
            return pause
        known = await self._known_read_ns(ram)
        read_ns = await self._expected_read_ns(known, ram)
        await self._flush()
        # The guests of a group are stopped together, and not each when its QEMU has read most of RAM
        for _ in range(self.LATE_ATTEMPTS if self._journal.member is None else 0):
            if not self._is_to_stop_late(read_ns):
                break
            late_pause, read_ns = await self._late(read_ns)
            if late_pause is not None:
                await self._remember(read_ns, known, ram)
                return late_pause
            await self._begin_anew()
        pause, read_ns = await self._plain()
        await self._remember(read_ns, known, ram)
        return pause

    async def _ram(self, ram_bytes: int) -> Layout:
        """The layout of RAM, after as much as possible was put into huge pages."""
        pid = self._monitor.pid
        ram = await asyncio.to_thread(hugepages.layout, pid, ram_bytes)
        if pid is None or ram.base <= ram_bytes * _HARDLY_ANY:
            return ram
        await hugepages.collapse(pid, ram_bytes)
        return await asyncio.to_thread(hugepages.layout, pid, ram_bytes)

    @property
    def stream_size(self) -> int:
        """Bytes that QEMU has written so far."""
        return os.lseek(self._file, 0, os.SEEK_CUR) - STREAM_OFFSET

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    async def _plain(self) -> tuple[Pause, int]:
        """Stop the guest first.

        :return: the pause, and the processor time that QEMU's thread needed.
        """
        thread = SnapshotThread(self._monitor.pid)
        async with stopped(self._monitor, self._journal) as pause:
            await self._take_both()
            spent = await self._state_taken(pause, thread)
            if self._journal.member is not None:
                self._journal.member.arrive(Point.WRITTEN)  # a pause of milliseconds waits for no other VM
        return pause, spent

    @abstractmethod
    async def _take_both(self) -> None:
        """Begin the stream, and take the disks' snapshots, of a guest that is stopped."""

    @abstractmethod
    def _goal(self, read_ns: int) -> int:
        """The processor time after which the guest is stopped."""

    @abstractmethod
    async def _expected_read_ns(self, known: int, ram: Layout) -> int:
        """The processor time that QEMU's thread will need next; 0 if that is not known."""

    @abstractmethod
    def _is_to_stop_late(self, read_ns: int) -> bool:
        """Whether something is known, and something is gained by it."""

    @abstractmethod
    async def _begin_rehearsal(self) -> None:
        """Begin a stream that nobody wants."""

    @abstractmethod
    async def _runs_or_may(self, pause: Pause, stream: Stream) -> bool:
        """Whether QEMU has the device state: the guest may run, or runs, where QEMU resumes it by itself."""

    @abstractmethod
    async def _was_in_time(self, *, at_the_disks: bool) -> bool:
        """Whether the guest was stopped before QEMU stopped it, and not resumed before it had the device state.

        :param at_the_disks: whether that was so when the disks' snapshots were taken.
        """

    @abstractmethod
    def _is_of_use_later(self, ram: Layout) -> bool:
        """Whether what was seen is of use the next time."""

    @abstractmethod
    def _read_ns_to_keep(self, spent_ns: int, known: int) -> int:
        """What to count on the next time."""

    async def _rehearse(self) -> int:
        """Have QEMU begin a stream that nobody wants; return the processor time that its thread needed.

        QEMU stops and resumes the guest by itself.

        :raise JobFailed: QEMU cannot do that; the guest was not stopped for a save.
        """
        thread = SnapshotThread(self._monitor.pid)
        await self._begin_rehearsal()
        spent = await thread.until_it_has_spent(None, self._has_begun)
        await self._raise_if_failed()
        await self._background.end_stream()
        return spent

    async def _late(self, read_ns: int) -> tuple[Pause | None, int]:
        """Stop the guest when QEMU's thread has had most of the time *read_ns*.

        :return: the pause, None where QEMU was faster; and the processor time that the thread needed.
        """
        thread = SnapshotThread(self._monitor.pid)
        await self._background.begin_stream(self._file, STREAM_OFFSET)
        spent = await thread.until_it_has_spent(self._goal(read_ns), self._has_begun)
        if await self._has_begun():
            await self._raise_if_failed()
            return None, spent
        async with stopped(self._monitor, self._journal) as pause:
            await self._snapshot_disks()
            # Events come before the answer to what came after them
            at_the_disks = self._stop_resume_events() == ["STOP"]
            spent = max(spent, await self._state_taken(pause, thread))
            was_in_time = await self._was_in_time(at_the_disks=at_the_disks)
        return (pause if was_in_time else None), spent

    def _stop_resume_events(self) -> list[str]:
        return [event for event, _ in self._background.stop_resume_events()]

    async def _state_taken(self, pause: Pause, thread: SnapshotThread) -> int:
        """Wait until QEMU has the device state, and the guest may run; or runs, where QEMU resumes it by itself.

        :return: the processor time that *thread* was seen to have had before.
        :raise JobFailed: QEMU does not take the device state, or takes too long.
        """
        spent = 0
        deadline = time.monotonic() + _STATE_TIMEOUT_S
        while time.monotonic() < deadline:
            before = thread.spent_ns
            stream = await self._background.stream()
            if stream.status == "setup":
                spent = before
            if await self._runs_or_may(pause, stream):
                return spent
            await self._raise_if_failed()
            await asyncio.sleep(_LOOK_S)
        raise JobFailed("migrate", f"QEMU has not taken the device state within {_STATE_TIMEOUT_S:g} s")

    async def _has_begun(self) -> bool:
        """Whether QEMU is about to take the device state, or beyond that."""
        return (await self._background.stream()).status != "setup"

    async def _raise_if_failed(self) -> None:
        stream = await self._background.stream()
        if stream.is_over and stream.status != "completed":
            raise JobFailed("migrate", stream.error or f"it was {stream.status}")

    async def _begin_anew(self) -> None:
        await self._background.end_stream()
        await self._forget_disks()

    async def _flush(self) -> None:
        """Flush the host's pending writes to the images now, because otherwise that would be part of the pause."""
        for image in self._images:
            with suppress(OSError):
                await asyncio.to_thread(_sync, image)

    async def _known_read_ns(self, ram: Layout) -> int:
        """The processor time that QEMU's thread needed the last time that RAM was mapped so; 0 if that is not known."""
        if not self._is_of_use_later(ram):
            return 0
        read_ns = ReadTime.decode(await self._monitor.mark(READ_TIME) or "")
        return read_ns.spent_ns if read_ns is not None and read_ns.is_of(ram) else 0

    async def _remember(self, spent_ns: int, known: int, ram: Layout) -> None:
        # Nothing was seen if QEMU was too quick, or its threads cannot be seen from here
        if not spent_ns or not self._is_of_use_later(ram):
            return
        with suppress(QsnapError):
            await self._monitor.clear_mark(READ_TIME)
            await self._monitor.set_mark(READ_TIME, ReadTime(self._read_ns_to_keep(spent_ns, known), ram.base).encode())

    async def wait_until_written(self, watch: Watcher | None) -> None:
        """Wait for the end of the stream.

        :raise JobFailed: QEMU could not write it, or somebody cancelled it.
        """
        began = time.monotonic()
        done = 0
        while not (stream := await self._background.stream()).is_over:
            elapsed_s = time.monotonic() - began
            if watch is not None:
                watch(Progress(Phase.SAVING, elapsed_s, stream.done, stream.total))
            done = await self._write_back(done)
            if done == self.stream_size:
                await asyncio.sleep(min(INTERVAL_S, 0.005 + elapsed_s / 10))
        if stream.status != "completed":
            raise JobFailed("migrate", stream.error or f"it was {stream.status}")
        while done < self.stream_size:
            done = await self._write_back(done)

    async def _write_back(self, done: int) -> int:
        """Have the kernel write what there is of the stream, from *done* on; how far it has come after a moment."""
        size = self.stream_size
        work = asyncio.to_thread(bulk_io.write_back, self._file, STREAM_OFFSET + done, STREAM_OFFSET + size, INTERVAL_S)
        try:
            return await shielded(work, _STATE_TIMEOUT_S) - STREAM_OFFSET
        except OSError:
            return size  # the error is reported when the file is completed


class FreezeBefore9(Freeze):
    """QEMU resumes the guest by itself, and a stream must not be cancelled: it leaves the guest hanging.

    So the disks' snapshots come before the stream, or while it is certain that QEMU has not resumed the guest. One
    attempt that fails takes as long as a whole save.
    """

    PLAIN_NS = 50_000_000  # the disks take part of the time
    LATE_ATTEMPTS = 1
    #: Nanoseconds that the disks' snapshots may take: they must be done before QEMU resumes the guest.
    DISKS_NS = 25_000_000

    async def _take_both(self) -> None:
        await self._snapshot_disks()
        await self._background.begin_stream(self._file, STREAM_OFFSET)

    def _goal(self, read_ns: int) -> int:
        return int(read_ns * _SHARE) - self.DISKS_NS

    async def _expected_read_ns(self, known: int, ram: Layout) -> int:
        # A stream goes on to its end, and splits what huge pages there are
        if known or self._journal.member is not None or self._monitor.pid is None or ram.base <= ram.other:
            return known
        return await self._rehearse()

    def _is_to_stop_late(self, read_ns: int) -> bool:
        return self._goal(read_ns) > 0

    async def _begin_rehearsal(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            await self._background.begin_stream(nowhere, 0)
        finally:
            os.close(nowhere)

    async def _runs_or_may(self, pause: Pause, stream: Stream) -> bool:
        resumed = [stamp for event, stamp in self._background.stop_resume_events() if event == "RESUME"]
        if resumed:
            pause.resumed_by_qemu(resumed[-1])
        return bool(resumed)

    async def _was_in_time(self, *, at_the_disks: bool) -> bool:
        return at_the_disks

    def _is_of_use_later(self, ram: Layout) -> bool:
        return True

    def _read_ns_to_keep(self, spent_ns: int, known: int) -> int:
        return min(spent_ns, known) if known else spent_ns


class FreezeSince9(Freeze):
    """QEMU leaves a guest that was stopped before as it is, and a stream may be cancelled.

    So the disks' snapshots are taken while QEMU reads RAM, and what it will need for that is tried out beforehand.
    """

    PLAIN_NS = 10_000_000
    LATE_ATTEMPTS = 3
    #: As PLAIN_NS, but measured for a second read, which overlaps the disks' snapshots.
    PLAIN_READ_AGAIN_NS = 25_000_000
    #: Streams that nobody wants, after the first one.
    MORE_REHEARSALS = 3

    async def _take_both(self) -> None:
        # It reads RAM in the meantime
        await self._background.begin_stream(self._file, STREAM_OFFSET)
        await self._snapshot_disks()

    def _goal(self, read_ns: int) -> int:
        return int(read_ns * _SHARE)

    async def _expected_read_ns(self, known: int, ram: Layout) -> int:
        # What it has read a moment ago it reads in a fraction of the time, until that is all that it takes
        read_ns = await self._rehearse()
        if known:
            return known
        for _ in range(self.MORE_REHEARSALS):
            if read_ns <= self.PLAIN_READ_AGAIN_NS:
                break
            before, read_ns = read_ns, await self._rehearse()
            if read_ns > before * _SHARE:
                break
        return read_ns

    def _is_to_stop_late(self, read_ns: int) -> bool:
        return read_ns > self.PLAIN_READ_AGAIN_NS

    async def _begin_rehearsal(self) -> None:
        await self._background.begin_stream(self._file, STREAM_OFFSET)

    async def _runs_or_may(self, pause: Pause, stream: Stream) -> bool:
        return bool(stream.pages) or stream.status == "completed"

    async def _was_in_time(self, *, at_the_disks: bool) -> bool:
        # The answer to this comes after whatever else QEMU's main loop had to do
        await self._monitor.runstate()
        return self._stop_resume_events() == ["STOP"]

    def _is_of_use_later(self, ram: Layout) -> bool:
        return ram.base > ram.other  # that of RAM in huge pages is tried out anew

    def _read_ns_to_keep(self, spent_ns: int, known: int) -> int:
        return spent_ns


def _sync(image: Path) -> None:
    file = files.opened(image, or_disk=True)
    try:
        os.fsync(file)
    finally:
        os.close(file)
