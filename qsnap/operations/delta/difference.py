"""Compare RAM with a VM state, and write a stream of what differs.

The state is read in pieces, in its order; several threads compare. What is in memory at a time is a few pieces, however
large the guest is. The new stream goes to a file, in the same order.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from qsnap.host import files, memory
from qsnap.inventory.stream import LONGEST_FRAME, PAGE, Frame, Part, Run, Stream, Unknown, kept
from qsnap.inventory.vm_state import VmState

#: Bytes of a piece: large enough that calls cost little, small enough to stay in the processor's cache.
_PIECE = 1 << 20
assert _PIECE > LONGEST_FRAME
#: More threads gain nothing: one reads the state, and is as quick as two or three that compare.
_MOST_THREADS = 4


class Block(NamedTuple):
    """A block of guest RAM: its bytes, and where it is in QEMU's memory."""

    size: int
    address: int


class Found(NamedTuple):
    """The result of a walk along a state.

    :ivar differing: pages of the compared blocks that differ.
    :ivar kept: bytes of RAM that are in the new stream.
    """

    differing: int
    kept: int


class TooMuch(Exception):
    """More differs than the new stream may hold."""


def walk(
    state: VmState,
    pid: int,
    blocks: Mapping[str, Block],
    ended: threading.Event,
    *,
    write: Callable[[bytes], None] = lambda _: None,
    accept: Callable[[str], None] = lambda _: None,
) -> Found:
    """Compare all of the RAM *blocks* of process *pid* with *state*.

    :param accept: called with the name of the state's machine, before RAM is compared.
    :param write: called with the new stream, from its beginning on.
    :param ended: set it to end the walk soon.
    :raise Unknown: the state is not as QEMU is known to write it.
    :raise OSError: the state, or the memory, cannot be read.
    """
    stream = Stream({name: block.size for name, block in blocks.items()})
    local = threading.local()

    def compared(piece: memoryview, parts: list[Part]) -> tuple[bytes, int, int]:
        if not hasattr(local, "comparison"):
            local.comparison = memory.Comparison(pid)
        return _compared(local.comparison, blocks, piece, parts)

    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    buffers = [memoryview(bytearray(_PIECE)) for _ in range(2 * threads)]
    pending: deque[tuple[Future[tuple[bytes, int, int]], memoryview]] = deque()
    differing = kept_bytes = begin = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            while begin < state.size or pending:
                if begin < state.size and buffers:
                    buffer = buffers.pop()
                    piece = buffer[: state.read(buffer, begin)]
                    parts, length = stream.parts(piece)
                    if not length or ended.is_set():
                        raise Unknown("it cannot be read to its end")
                    if not begin:
                        accept(stream.machine)
                    begin += length
                    pending.append((pool.submit(compared, piece, parts), buffer))
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
    if not stream.is_at_devices:
        raise Unknown("it ends before the devices")
    return Found(differing, kept_bytes)


def _compared(
    comparison: memory.Comparison, blocks: Mapping[str, Block], piece: memoryview, parts: list[Part]
) -> tuple[bytes, int, int]:
    """What of a piece goes into the new stream; the pages that differ, and the bytes of RAM that are kept."""
    out: list[bytes | memoryview] = []
    differing = size = 0
    for part in parts:
        if isinstance(part, Frame):
            out.append(piece[part.begin : part.end])
            continue
        found = list(memory.joined(_differing(comparison, blocks, piece, part)))
        if part.block in blocks:
            differing += sum(count for _, count in found)
        for first, count in [(0, part.pages)] if part.is_kept else found:
            out += kept(piece, part, first, count)
            size += count * PAGE
    return b"".join(out), differing, size


def _differing(
    comparison: memory.Comparison, blocks: Mapping[str, Block], piece: memoryview, run: Run
) -> Iterator[tuple[int, int]]:
    if run.block not in blocks:
        return iter(())
    address = blocks[run.block].address + run.page * PAGE
    if run.body == PAGE:
        return comparison.differing(piece, run.data, run.stride, address, run.pages)
    return comparison.not_zero(address, run.pages)


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
