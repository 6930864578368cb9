"""Compare RAM with a VM state, and write a stream of what differs.

The state is read in pieces, in its order. If a piece ends within a row of pages, the row probably goes on. Then all
cores compare what is expected next (:mod:`qsnap.operations.delta.comparers`), and each reads the state itself. A result
counts only as far as the records are the expected ones. Only a few pieces are in memory at a time, however large the
guest is. The new stream goes to a file, in the same order.

All of the state is read (:class:`Whole`); or no more than what may differ and what is not compared (:class:`Parts`),
where it is known which pages the guest has as they are in the state, and where each part of the state is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, Protocol

from qsnap.host import comparison, files, soft_dirty
from qsnap.host.comparison import AT_ONCE
from qsnap.inventory.rows import HEADER, PAGE
from qsnap.inventory.stream import (
    LONGEST_FRAME,
    Broken,
    Frame,
    Part,
    Run,
    Stream,
    Unknown,
    is_one,
    joined,
    kept,
    lead,
    moved,
)
from qsnap.inventory.vm_state import VmState
from qsnap.operations.delta.comparers import Comparers, Job

#: Bytes of a piece: large enough that calls cost little, small enough to stay in the processor's cache. (Of 1, 2 and
#: 4 MiB with as many pages at once, 2 took the least time, a sixth less than 1.)
_PIECE = 2 << 20
assert _PIECE > LONGEST_FRAME
#: Comparisons that are asked for at a time, at the most.
_MOST_JOBS = 16

#: The states of the pages of RAM blocks, a byte each: see :mod:`qsnap.host.soft_dirty`.
States = Mapping[str, bytes]


class Block(NamedTuple):
    """A block of guest RAM: its bytes, and where it is in QEMU's memory."""

    size: int
    address: int


class Layout(NamedTuple):
    """Where in a state its parts are, all of them in order; and the name of its machine."""

    machine: str
    parts: list[Part]


class Found(NamedTuple):
    """The result of a walk along a state.

    :ivar differing: pages of the compared blocks that differ.
    :ivar kept: bytes of RAM that are in the new stream.
    """

    differing: int
    kept: int


class TooMuch(Exception):
    """More differs than the new stream may hold."""


class Source(Protocol):
    """What is read of a state.

    :ivar state: the state.
    :ivar size: about how many bytes of it are read.
    """

    state: VmState
    size: int

    def machine(self) -> str:
        """The name of the state's machine; known when the first piece is read."""

    def fill(self, buffer: memoryview) -> tuple[memoryview, list[Part]] | None:
        """Read the next piece: its bytes, and what they consist of. None behind the last one.

        :raise Unknown: the state is not as QEMU is known to write it.
        :raise OSError: it cannot be read.
        """

    def expected(self) -> Run | None:
        """The whole pages that probably come next, and where in the state; None if nothing is known of them."""

    def go_on(self, run: Run) -> Run:
        """Continue behind *run*, a part of what was expected; the same run, which stays whole if it has to."""


class Whole:
    """All of a state.

    :param blocks: the RAM blocks that are compared.
    """

    def __init__(self, state: VmState, blocks: Mapping[str, Block]) -> None:
        self.state = state
        self.size = state.size
        self._blocks = blocks
        self._stream = Stream({name: block.size for name, block in blocks.items()})
        self._begin = 0
        self._parts: list[Part] = []

    def machine(self) -> str:
        """As :meth:`Source.machine`."""
        return self._stream.machine

    def layout(self) -> Layout:
        """Where the parts are that have been read."""
        return Layout(self._stream.machine, self._parts)

    def fill(self, buffer: memoryview) -> tuple[memoryview, list[Part]] | None:
        """As :meth:`Source.fill`."""
        begin = self._begin
        if begin >= self.state.size:
            if not self._stream.is_at_devices:
                raise Unknown("it ends before the devices")
            return None
        piece = buffer[: self.state.read(buffer, begin)]
        parts, length = self._stream.parts(piece)
        if not length:
            raise Unknown("it cannot be read to its end")
        self._begin += length
        for part in parts:
            self._append(moved(part, begin))
        return piece, parts

    def expected(self) -> Run | None:
        """As :meth:`Source.expected`."""
        if not self._parts or isinstance(last := self._parts[-1], Frame) or last.body != PAGE:
            return None
        if last.block not in self._blocks:
            return None
        left = self._blocks[last.block].size // PAGE - last.page - last.pages
        return last.cut(last.pages, min(left, (self.state.size - self._begin) // last.stride))

    def go_on(self, run: Run) -> Run:
        """As :meth:`Source.go_on`."""
        run = self._stream.come(run._replace(is_kept=False))
        self._begin = run.end
        self._append(run)
        return run

    def _append(self, part: Part) -> None:
        if self._parts and (both := joined(self._parts[-1], part)):
            self._parts[-1] = both
        else:
            self._parts.append(part)


class Parts:
    """Of a state the pages that may differ, and all that is not compared.

    :param states: those of the pages of some blocks. Others may differ whole.
    :param blocks: the RAM blocks that are compared.
    """

    def __init__(self, state: VmState, layout: Layout, states: States, blocks: Collection[str]) -> None:
        self.state = state
        self.size = PAGE * sum(soft_dirty.not_unwritten(one).count(1) for one in states.values())
        self._layout = layout
        self._left = _wanted(layout.parts, states, blocks)
        self._next = next(self._left, None)

    def machine(self) -> str:
        """As :meth:`Source.machine`."""
        return self._layout.machine

    def fill(self, buffer: memoryview) -> tuple[memoryview, list[Part]] | None:
        """As :meth:`Source.fill`."""
        found: list[Part] = []
        at = 0
        while self._next is not None:
            before = 0 if isinstance(self._next, Frame) else lead(self._next)
            part, rest = _split(self._next, max(0, len(buffer) - at - before))
            if part is None:
                break
            begin = (part.begin if isinstance(part, Frame) else part.data) - before
            size = self.state.read(buffer[at : at + part.end - begin], begin)
            part = moved(part, at - begin)
            if isinstance(part, Run) and not is_one(buffer, part):
                raise Broken("it has changed since it was loaded")
            found.append(part)
            at += size
            self._next = rest or next(self._left, None)
        return (buffer[:at], found) if found else None

    def expected(self) -> Run | None:
        """As :meth:`Source.expected`."""
        if isinstance(self._next, Run) and self._next.body == PAGE and not self._next.is_kept:
            return self._next
        return None

    def go_on(self, run: Run) -> Run:
        """As :meth:`Source.go_on`."""
        assert isinstance(self._next, Run)
        rest = self._next.pages - run.pages
        self._next = self._next.cut(run.pages, rest) if rest else next(self._left, None)
        return run


def _wanted(parts: list[Part], states: States, blocks: Collection[str]) -> Iterator[Part]:
    not_unwritten = {name: soft_dirty.not_unwritten(one) for name, one in states.items()}
    written = {name: soft_dirty.written(one) for name, one in states.items()}
    for part in parts:
        if isinstance(part, Frame) or part.is_kept:
            yield part
        elif part.block not in states:
            yield part._replace(is_kept=part.block not in blocks)
        else:
            pages = (not_unwritten if part.body == PAGE else written)[part.block]
            found = _ones(pages, part.page, part.page + part.pages)
            yield from (part.cut(first - part.page, count) for first, count in found)


def _ones(pages: bytes, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Where in a part of a map there is 1: (first, how many)."""
    first = pages.find(1, begin, end)
    while first >= 0:
        last = pages.find(0, first, end)
        last = end if last < 0 else last
        yield first, last - first
        first = pages.find(1, last, end)


def _split(part: Part, room: int) -> tuple[Part | None, Part | None]:
    """What of a part there is room for, and the rest; None for nothing."""
    if isinstance(part, Frame):
        end = min(part.end, part.begin + room)
        return Frame(part.begin, end) if room else None, Frame(end, part.end) if end < part.end else None
    count = min(part.pages, max(0, room - part.body) // part.stride + 1 if room >= part.body else 0)
    rest = part.cut(count, part.pages - count) if count < part.pages else None
    return part.cut(0, count) if count else None, rest


def walk(
    source: Source,
    comparers: Comparers,
    blocks: Mapping[str, Block],
    ended: threading.Event,
    *,
    states: States | None = None,
    write: Callable[[bytes], None] = lambda _: None,
    accept: Callable[[str], None] = lambda _: None,
) -> Found:
    """Compare the RAM *blocks* of a process with what is read of a state.

    :param states: those of the pages, where they are known. Of those that are zeroes in the state, only the written
        ones are read.
    :param accept: called with the name of the state's machine, before RAM is compared.
    :param write: called with the new stream, from its beginning on.
    :param ended: set it to end the walk soon.
    :raise Unknown: the state is not as QEMU is known to write it.
    :raise OSError: the state, or the memory, cannot be read.
    """
    written = {name: soft_dirty.written(one) for name, one in (states or {}).items()}
    new = _New(write)
    is_begun = False
    buffer = comparison.buffer(_PIECE)
    comparers.start(source.size)
    while (filled := source.fill(buffer)) is not None:
        _refuse_ended(ended)
        if not is_begun:
            accept(source.machine())
            is_begun = True
        piece, parts = filled
        for part in parts:
            if isinstance(part, Frame):
                new.add(piece[part.begin : part.end])
            else:
                differs = _differs(comparers, blocks, written, piece, part)
                new.add_run(part, differs, partial(_within, piece))
        new.write()
        for row, differs in _ahead(comparers, blocks, source.expected()):
            _refuse_ended(ended)
            new.add_run(source.go_on(row), differs, lambda run: source.state.bytes(run.data, run.end - run.data))
            new.write()
    return Found(new.differing, new.kept)


class _New:
    """The new stream, as it is found.

    :ivar differing: as :attr:`Found.differing`; *kept* as there, too.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.differing = self.kept = 0
        self._write = write
        self._out: list[bytes | memoryview] = []

    def add(self, data: memoryview) -> None:
        """Add what is no record of RAM."""
        self._out.append(data)

    def add_run(self, run: Run, differs: bytes, data: Callable[[Run], bytes | memoryview]) -> None:
        """Add what has to be in it of a run.

        :param differs: of each page 1 if it differs, or 0.
        :param data: gives the bytes of a part of the run.
        """
        self.differing += differs.count(1)
        for one in _staying(run, differs):
            self._out += kept(one, data(one))
            self.kept += one.pages * PAGE

    def write(self) -> None:
        """Write what was added."""
        self._write(b"".join(self._out))
        self._out.clear()


def _within(piece: memoryview, run: Run) -> memoryview:
    return piece[run.data : run.end]


def _refuse_ended(ended: threading.Event) -> None:
    if ended.is_set():
        raise Unknown("it cannot be read to its end")


def _differs(
    comparers: Comparers, blocks: Mapping[str, Block], written: Mapping[str, bytes], piece: memoryview, run: Run
) -> bytes:
    """Which pages of a run differ: a byte of each, 1 or 0. Those of a block that is not compared do not."""
    differs = bytearray(run.pages)
    if run.block not in blocks:
        return bytes(differs)
    base = blocks[run.block].address
    if run.body == PAGE:
        for first in range(0, run.pages, AT_ONCE):
            pages = min(AT_ONCE, run.pages - first)
            differs[first : first + pages] = comparers.records.comparison.differing(
                piece, run.data + first * run.stride, run.stride, base + (run.page + first) * PAGE, pages
            )
        return bytes(differs)
    stretches: Iterable[tuple[int, int]] = [(run.page, run.pages)]
    if (pages_written := written.get(run.block)) is not None:
        stretches = _ones(pages_written, run.page, run.page + run.pages)
    jobs = [
        comparers.compare(-1, page, base + page * PAGE, min(AT_ONCE, first + count - page))
        for first, count in stretches
        for page in range(first, first + count, AT_ONCE)
    ]
    for job in jobs:
        first = job.page - run.page
        differs[first : first + job.pages] = comparers.result(job)
    return bytes(differs)


def _staying(run: Run, differs: bytes) -> Iterator[Run]:
    """What of a run goes into the new stream."""
    for first, count in [(0, run.pages)] if run.is_kept else _ones(differs, 0, run.pages):
        yield run.cut(first, count)


def _ahead(comparers: Comparers, blocks: Mapping[str, Block], expected: Run | None) -> Iterator[tuple[Run, bytes]]:
    """Compare what is expected, in parts, as far as it is so: each part, and which of its pages differ.

    No more is asked for ahead than has been right so far: many rows are short.
    """
    if expected is None or expected.pages < AT_ONCE:
        return
    base = blocks[expected.block].address
    jobs: deque[Job] = deque()
    asked = right = 0
    while asked < expected.pages or jobs:
        if asked < expected.pages and len(jobs) <= min(right, _MOST_JOBS) and not (jobs and jobs[0].found is not None):
            run = expected.cut(asked, min(AT_ONCE, expected.pages - asked))
            asked += run.pages
            jobs.append(comparers.compare(run.data - HEADER, run.page, base + run.page * PAGE, run.pages))
            continue
        job = jobs.popleft()
        differs = comparers.result(job)
        if differs:
            yield expected.cut(job.page - expected.page, len(differs)), differs
        if len(differs) < job.pages:
            return
        right += 1


class Output:
    """A file for the new stream.

    :param begin: where in the file it begins.
    :param limit: the most bytes that it may have.
    :ivar size: the bytes that it has.
    """

    def __init__(self, file: int, begin: int, limit: int) -> None:
        self.size = 0
        self._file = file
        self._begin = begin
        self._limit = limit

    def write(self, data: bytes) -> None:
        """Append to the stream.

        :raise TooMuch: the stream would be longer than the limit.
        :raise OSError: it cannot be written.
        """
        if self.size + len(data) > self._limit:
            raise TooMuch
        files.write(self._file, data, self._begin + self.size)
        self.size += len(data)
