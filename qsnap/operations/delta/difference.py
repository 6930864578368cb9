"""Compare RAM with a VM state, and write a stream of what differs.

The state is read in pieces, in its order; several threads compare. What is in memory at a time is a few pieces, however
large the guest is. The new stream goes to a file, in the same order.

All of the state is read (:class:`Whole`); or no more than what may differ and what is not compared (:class:`Parts`),
where it is known which pages the guest has as they are in the state, and where each part of the state is.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

from qsnap.host import files, memory, soft_dirty
from qsnap.inventory.stream import (
    LONGEST_FRAME,
    PAGE,
    Broken,
    Frame,
    Part,
    Run,
    Stream,
    Unknown,
    is_one,
    joined,
    kept,
    moved,
)
from qsnap.inventory.vm_state import VmState

#: Bytes of a piece: large enough that calls cost little, small enough to stay in the processor's cache. (Of 1, 2 and
#: 4 MiB with as many pages at once, 2 took the least time, a sixth less than 1.)
_PIECE = 2 << 20
assert _PIECE > LONGEST_FRAME
#: More threads gain nothing: one reads the state, and is as quick as two or three that compare.
_MOST_THREADS = 4

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
    """What is read of a state."""

    def machine(self) -> str:
        """The name of the state's machine; known when the first piece is read."""

    def fill(self, buffer: memoryview) -> tuple[memoryview, list[Part]] | None:
        """Read the next piece: its bytes, and what they consist of. None behind the last one.

        :raise Unknown: the state is not as QEMU is known to write it.
        :raise OSError: it cannot be read.
        """


class Whole:
    """All of a state.

    :param blocks: the RAM blocks that are compared.
    """

    def __init__(self, state: VmState, blocks: Mapping[str, Block]) -> None:
        self._state = state
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
        if begin >= self._state.size:
            if not self._stream.is_at_devices:
                raise Unknown("it ends before the devices")
            return None
        piece = buffer[: self._state.read(buffer, begin)]
        parts, length = self._stream.parts(piece)
        if not length:
            raise Unknown("it cannot be read to its end")
        self._begin += length
        for part in parts:
            one = moved(part, begin)
            if self._parts and (both := joined(self._parts[-1], one)):
                self._parts[-1] = both
            else:
                self._parts.append(one)
        return piece, parts


class Parts:
    """Of a state the pages that may differ, and all that is not compared.

    :param states: those of the pages of some blocks. Others may differ whole.
    """

    def __init__(self, state: VmState, layout: Layout, states: States) -> None:
        self._state = state
        self._layout = layout
        self._left = _wanted(layout.parts, states)
        self._next = next(self._left, None)

    def machine(self) -> str:
        """As :meth:`Source.machine`."""
        return self._layout.machine

    def fill(self, buffer: memoryview) -> tuple[memoryview, list[Part]] | None:
        """As :meth:`Source.fill`."""
        found: list[Part] = []
        at = 0
        while self._next is not None:
            part, rest = _split(self._next, len(buffer) - at)
            if part is None:
                break
            begin = part.begin if isinstance(part, Frame) else part.data
            size = self._state.read(buffer[at : at + part.end - begin], begin)
            part = moved(part, at - begin)
            if isinstance(part, Run) and not is_one(buffer, part):
                raise Broken("it has changed since it was loaded")
            found.append(part)
            at += size
            self._next = rest or next(self._left, None)
        return (buffer[:at], found) if found else None


def _wanted(parts: list[Part], states: States) -> Iterator[Part]:
    not_unwritten = {name: soft_dirty.not_unwritten(one) for name, one in states.items()}
    written = {name: soft_dirty.written(one) for name, one in states.items()}
    for part in parts:
        if isinstance(part, Frame) or part.is_kept or part.block not in states:
            yield part
        else:
            pages = (not_unwritten if part.body == PAGE else written)[part.block]
            yield from (part.cut(first - part.page, count) for first, count in _stretches(pages, part))


def _stretches(pages: bytes, run: Run) -> Iterator[tuple[int, int]]:
    """Where in a map there is 1, for the pages of a run: (first, how many)."""
    end = run.page + run.pages
    first = pages.find(1, run.page, end)
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
    pid: int,
    blocks: Mapping[str, Block],
    ended: threading.Event,
    *,
    states: States | None = None,
    write: Callable[[bytes], None] = lambda _: None,
    accept: Callable[[str], None] = lambda _: None,
) -> Found:
    """Compare the RAM *blocks* of process *pid* with what is read of a state.

    :param states: those of the pages, where they are known. Of those that are zeroes in the state, only the written
        ones are read.
    :param accept: called with the name of the state's machine, before RAM is compared.
    :param write: called with the new stream, from its beginning on.
    :param ended: set it to end the walk soon.
    :raise Unknown: the state is not as QEMU is known to write it.
    :raise OSError: the state, or the memory, cannot be read.
    """
    local = threading.local()
    written = {name: soft_dirty.written(one) for name, one in (states or {}).items()}

    def compared(piece: memoryview, parts: list[Part]) -> tuple[bytes, int, int]:
        if not hasattr(local, "comparison"):
            local.comparison = memory.Comparison(pid)
        return _compared(local.comparison, blocks, written, piece, parts)

    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    buffers = [memory.buffer(_PIECE) for _ in range(2 * threads)]
    pending: deque[tuple[Future[tuple[bytes, int, int]], memoryview]] = deque()
    differing = kept_bytes = 0
    is_begun = is_read = False
    with ThreadPoolExecutor(threads) as pool:
        try:
            while not is_read or pending:
                if not is_read and buffers:
                    filled = source.fill(buffers[-1])
                    if ended.is_set():
                        raise Unknown("it cannot be read to its end")
                    if filled is None:
                        is_read = True
                        continue
                    if not is_begun:
                        accept(source.machine())
                        is_begun = True
                    pending.append((pool.submit(compared, *filled), buffers.pop()))
                else:
                    future, buffer = pending.popleft()
                    data, pages, size = future.result()
                    buffers.append(buffer)
                    differing += pages
                    kept_bytes += size
                    write(data)
        finally:
            for future, _ in pending:
                future.cancel()
    return Found(differing, kept_bytes)


def _compared(
    comparison: memory.Comparison,
    blocks: Mapping[str, Block],
    written: Mapping[str, bytes],
    piece: memoryview,
    parts: list[Part],
) -> tuple[bytes, int, int]:
    """What of a piece goes into the new stream; the pages that differ, and the bytes of RAM that are kept."""
    out: list[bytes | memoryview] = []
    differing = size = 0
    for part in parts:
        if isinstance(part, Frame):
            out.append(piece[part.begin : part.end])
            continue
        found = list(memory.joined(_differing(comparison, blocks, written, piece, part)))
        if part.block in blocks:
            differing += sum(count for _, count in found)
        for first, count in [(0, part.pages)] if part.is_kept else found:
            out += kept(piece, part, first, count)
            size += count * PAGE
    return b"".join(out), differing, size


def _differing(
    comparison: memory.Comparison,
    blocks: Mapping[str, Block],
    written: Mapping[str, bytes],
    piece: memoryview,
    run: Run,
) -> Iterator[tuple[int, int]]:
    if run.block not in blocks:
        return
    base = blocks[run.block].address
    if run.body == PAGE:
        yield from comparison.differing(piece, run.data, run.stride, base + run.page * PAGE, run.pages)
        return
    pages = written.get(run.block)
    for page, length in [(run.page, run.pages)] if pages is None else _stretches(pages, run):
        for first, count in comparison.not_zero(base + page * PAGE, length):
            yield page - run.page + first, count


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
