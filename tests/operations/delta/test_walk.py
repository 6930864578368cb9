"""Walks along made-up states: what the new stream puts back is what the whole one does, whoever compares."""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from random import Random

import pytest

from qsnap.host import comparison
from qsnap.inventory.rows import PAGE
from qsnap.inventory.stream import Broken, Run, Stream, Unknown
from qsnap.inventory.vm_state import VmState
from qsnap.operations.delta import comparers, difference
from qsnap.operations.delta.comparers import Comparers
from qsnap.operations.delta.difference import Block, Found, Layout, Parts, States, Whole, walk
from support.streams import DEVICES, configuration, part, record, start

pytestmark = pytest.mark.no_qemu

SIZE = 2000
OLD, NEW = ([bytes([kind, page % 251]) * (PAGE // 2) for page in range(SIZE)] for kind in (1, 2))
Memory = dict[str, memoryview]


@contextmanager
def state(*sections: bytes, blocks: dict[str, int], cuts: tuple[int, ...] = ()) -> Iterator[VmState]:
    """A state with these sections of records; where it is cut, its stretches lie in the file the other way round."""
    data = configuration() + start(blocks=blocks) + b"".join(sections) + DEVICES
    at = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    extents, offset = [], 0
    file = os.memfd_create("state")
    for begin, end in reversed([*pairwise(at)]):
        os.pwrite(file, data[begin:end], offset)
        extents.append((begin, offset, end - begin))
        offset += end - begin + 7
    found = VmState(file, sorted(extents), "")
    try:
        yield found
    finally:
        found.close()


def ram(contents: list[bytes]) -> memoryview:
    memory = comparison.buffer(len(contents) * PAGE)
    memory[:] = b"".join(contents)
    return memory


def walked(
    of: VmState, memory: Memory, layout: Layout | None = None, states: States | None = None
) -> tuple[Layout, Found, bytes]:
    """A walk along the whole state, or along parts of it; the new stream."""
    out: list[bytes] = []
    blocks = {name: Block(len(one), comparison._address(one)) for name, one in memory.items()}
    with Comparers(of, os.getpid()) as compares:
        whole = Whole(of, blocks)
        source = whole if layout is None else Parts(of, layout, states or {}, blocks)
        found = walk(source, compares, blocks, threading.Event(), states=states, write=out.append)
    return layout or whole.layout(), found, b"".join(out)


def put_back(stream: bytes, memory: dict[str, bytearray]) -> None:
    """What QEMU does with a stream."""
    view, at, walk_along = memoryview(stream), 0, Stream(None)
    while at < len(view):
        parts, size = walk_along.parts(view[at:])
        assert size
        for run in parts:
            for number in range(run.pages if isinstance(run, Run) else 0):
                assert isinstance(run, Run)
                begin = at + run.data + number * run.stride
                body = stream[begin : begin + run.body] * (PAGE // run.body)
                page = run.page + number
                memory[run.block][page * PAGE : (page + 1) * PAGE] = body
        at += size


def pages(stream: bytes) -> dict[int, bytes]:
    """The pages of pc.ram in a stream."""
    nothing = b"\xff" * PAGE
    memory = {"pc.ram": bytearray(nothing * SIZE)}
    put_back(stream, memory)
    found = {page: bytes(memory["pc.ram"][page * PAGE :][:PAGE]) for page in range(SIZE)}
    return {page: data for page, data in found.items() if data != nothing}


def row(contents: list[bytes]) -> list[bytes]:
    return [record(page, body, "" if page else "pc.ram") for page, body in enumerate(contents)]


def test_a_page_that_comes_twice_stays() -> None:
    """RAM is as the second records say, and QEMU would load the first ones too."""
    blocks = {"pc.ram": SIZE * PAGE}
    again = [record(0, b"\0"), *(record(page, NEW[page]) for page in range(1, SIZE))]
    with state(part(*row(OLD), *again), blocks=blocks) as one:
        _, _, stream = walked(one, {"pc.ram": ram(NEW)})
        assert pages(stream) == {0: bytes(PAGE)} | dict(enumerate(NEW[1:], 1))


@pytest.mark.parametrize("at", [600, 1023, 1024, 1025, 1500])
def test_another_record_in_the_place_of_one(at: int) -> None:
    """What was expected has been compared with the wrong page there, and behind it."""
    last = SIZE - 1
    order = [at, *(page for page in range(last) if page != at)]
    order.insert(at + 1, last)
    records = [record(page, OLD[page], "" if number else "pc.ram") for number, page in enumerate(order)]
    with state(part(*records), blocks={"pc.ram": SIZE * PAGE}) as one:
        memory = {"pc.ram": ram(OLD)}
        for page in (at, last):
            memory["pc.ram"][page * PAGE] ^= 1
        layout, found, stream = walked(one, memory)
        assert pages(stream) == {at: OLD[at], last: OLD[last]}
        assert found == Found(2, 2 * PAGE)
        for written in ({at, last, 3}, {*range(SIZE)}):
            states = {"pc.ram": bytes(page in written for page in range(SIZE))}
            assert pages(walked(one, memory, layout, states)[2]) == {at: OLD[at], last: OLD[last]}


@pytest.mark.parametrize("page", [0, 1, 510, 511, 512, 700, 1023, 1024, 1535, 1999])
@pytest.mark.parametrize("word", [0, 5 * PAGE | 0x28])
def test_a_record_that_has_changed(page: int, word: int) -> None:
    """Where a state is read again, each record is looked at again."""
    with state(part(*row(OLD)), blocks={"pc.ram": SIZE * PAGE}) as one:
        memory = {"pc.ram": ram(OLD)}
        layout, _, _ = walked(one, memory)
        run = next(run for run in layout.parts if isinstance(run, Run))
        before = 8 if page else 8 + 1 + len("pc.ram")
        os.pwrite(one.file, struct.pack(">Q", word), run.data + page * run.stride - before)
        for written in ({*range(SIZE)}, {page}):
            states = {"pc.ram": bytes(page in written for page in range(SIZE))}
            with pytest.raises(Broken, match="it has changed since"):
                walked(one, memory, layout, states)


def test_a_block_that_is_compared_no_more_stays() -> None:
    """Its pages count as equal only where they have been compared."""
    blocks = {"pc.ram": PAGE, "other": SIZE * PAGE}
    others = [record(page, OLD[page], "" if page else "other") for page in range(SIZE)]
    with state(part(record(0, OLD[0], "pc.ram"), *others), blocks=blocks) as one:
        memory = {"pc.ram": ram(OLD[:1]), "other": ram(OLD)}
        layout, found, _ = walked(one, memory)
        assert found == Found(0, 0)
        del memory["other"]
        _, found, _ = walked(one, memory, layout, {"pc.ram": b"\0"})
        assert found == Found(0, SIZE * PAGE)


def test_a_walk_that_is_to_end() -> None:
    """It asks for nothing more."""
    ended = threading.Event()
    ended.set()
    memory = ram(OLD)
    blocks = {"pc.ram": Block(len(memory), comparison._address(memory))}
    with (
        state(part(*row(OLD)), blocks={"pc.ram": SIZE * PAGE}) as one,
        Comparers(one, os.getpid()) as compares,
        pytest.raises(Unknown, match="to its end"),
    ):
        walk(Whole(one, blocks), compares, blocks, ended, write=lambda _: pytest.fail("it goes on"))


BODIES = [Random(0).randbytes(PAGE) for _ in range(40)]  # noqa: S311 (the same in every run)
RAM = {"pc.ram": 1200, "b": 600, "vga.vram": 2}


def sections(dice: Random) -> list[bytes]:
    """Rows of all lengths, in any order; pages that come again, or are filled; headers that name their block or not."""
    found, block = [], ""
    for _ in range(dice.randrange(1, 4)):
        records = []
        for _ in range(dice.randrange(1, 6)):
            named = block if block and dice.random() < 0.7 else dice.choice([*RAM])
            first = dice.randrange(RAM[named]) if dice.random() < 0.5 else 0
            kind = dice.random()
            for page in range(first, min(RAM[named], first + dice.choice([1, 2, 8, 60, 500, 1200]))):
                body = b"\0" if kind < 0.2 else b"\7" if kind < 0.25 else dice.choice(BODIES)
                records.append(record(page, body, named if named != block or dice.random() < 0.004 else ""))
                block = named
        found.append(part(*records))
    return found


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("fails", [False, True], ids=["sound", "failing"])
def test_whatever_a_state_has(monkeypatch: pytest.MonkeyPatch, seed: int, fails: bool) -> None:
    """The new stream, of all of the state or of what was written since, makes the same of RAM; also if helpers fail."""
    dice = Random(seed)  # noqa: S311
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    monkeypatch.setattr(comparers, "_WORTHWHILE", 1)
    monkeypatch.setattr(comparers, "_SILENT_S", 0.1)
    monkeypatch.setattr(difference, "_PIECE", dice.choice([140_000, 300_000, 2 << 20]))
    monkeypatch.setattr(difference, "AT_ONCE", dice.choice([2, 8, 31, 512]))
    ask = comparers._Helper.ask

    def asked(self: comparers._Helper, job: comparers.Job) -> None:
        ask(self, job)
        if fails and dice.random() < 0.05:
            os.kill(self._process.pid, dice.choice([signal.SIGKILL, signal.SIGSTOP]))

    monkeypatch.setattr(comparers._Helper, "ask", asked)
    bytes_of = {name: count * PAGE for name, count in RAM.items()}
    cuts = tuple(dice.randrange(1 << 30) for _ in range(dice.randrange(4)))
    with state(*sections(dice), blocks=bytes_of, cuts=cuts) as one:
        whole = one.bytes(0, one.size)
        loaded = {name: bytearray(size) for name, size in bytes_of.items()}
        put_back(whole, loaded)
        memory = {name: comparison.buffer(size) for name, size in bytes_of.items()}
        written = {name: bytearray(count) for name, count in RAM.items()}
        for name, contents in loaded.items():
            memory[name][:] = contents
            for page in range(RAM[name]):
                if dice.random() < 0.05:
                    written[name][page] = 1
                    memory[name][page * PAGE + dice.randrange(PAGE)] ^= dice.choice([0, 1])
        expected = {name: bytearray(one) for name, one in memory.items()}
        put_back(whole, expected)
        compared = {name: memory[name] for name in dice.choice([["pc.ram"], ["pc.ram", "b"]])}
        layout, _, stream = walked(one, compared)
        _, _, again = walked(one, compared, layout, {name: bytes(written[name]) for name in compared})
        for found in (stream, again):
            result = {name: bytearray(one) for name, one in memory.items()}
            put_back(found, result)
            assert result == expected
