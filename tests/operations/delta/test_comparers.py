"""Comparisons by several processes: the results are the same, whoever compares, and whatever becomes of a helper."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

from qsnap.host import comparison, interpreter
from qsnap.host.processes import is_alive
from qsnap.inventory.extents import Extents
from qsnap.inventory.rows import HEADER, PAGE, SAME_BLOCK, WHOLE
from qsnap.operations.delta import comparers
from qsnap.operations.delta.comparers import Comparers, Job
from support.guest import open_files

pytestmark = pytest.mark.no_qemu

PAGES, ROWS = 64, 40
RECORD = HEADER + PAGE
MIB = 1 << 20


class Rows:
    """A state of rows of records, and memory that differs from it in some pages.

    Every fourth row is followed by something else before its end.
    """

    def __init__(self) -> None:
        dice = Random(7)  # noqa: S311 (the same in every run)
        self.memory = comparison.buffer(ROWS * PAGES * PAGE)
        self.memory[:] = dice.randbytes(len(self.memory))
        records = []
        for number in range(ROWS * PAGES):
            record = (number * PAGE | WHOLE | SAME_BLOCK).to_bytes(HEADER, "big")
            records.append(record + self.memory[number * PAGE : (number + 1) * PAGE])
        self.expected: list[bytes] = []
        for row in range(ROWS):
            pages = dice.choice([0, 1, PAGES - 1]) if row % 4 == 3 else PAGES
            if pages < PAGES:
                records[row * PAGES + pages] = bytes(RECORD)
            changed = dice.sample(range(pages), min(pages, dice.randrange(4)))
            for page in changed:
                self.memory[(row * PAGES + page) * PAGE + dice.randrange(PAGE)] ^= 1
            self.expected.append(bytes(page in changed for page in range(pages)))
        self.state = b"".join(records)
        self.address = comparison._address(self.memory)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows()


class Asked:
    """Comparisons of these rows, one after the other."""

    def __init__(self, compares: Comparers, rows: Rows) -> None:
        self.compares = compares
        self.rows = rows
        self._asked = 0
        self._jobs: deque[tuple[int, Job]] = deque()

    def ask(self, number: int) -> None:
        """Ask for so many comparisons."""
        for _ in range(number):
            row = self._asked % ROWS
            self._asked += 1
            page = row * PAGES
            job = self.compares.compare(page * RECORD, page, self.rows.address + page * PAGE, PAGES)
            self._jobs.append((row, job))

    def ask_helpers(self) -> comparers._Helper:
        """Ask until each helper has something that it has not answered as far as we know; one of them."""
        end = time.monotonic() + 20
        while not all(helper.jobs for helper in helpers(self.compares)):
            assert time.monotonic() < end
            self.ask(1)
        return helpers(self.compares)[0]

    def finish(self) -> None:
        """Wait for all results, and see that they are right."""
        while self._jobs:
            row, job = self._jobs.popleft()
            assert self.compares.result(job) == self.rows.expected[row]


def helpers(compares: Comparers) -> list[comparers._Helper]:
    return [*compares._helpers.values()]


@contextmanager
def started(monkeypatch: pytest.MonkeyPatch, rows: Rows, cores: int = 3, size: int = 1 << 30) -> Iterator[Asked]:
    """Comparers, by default with two helpers, which end with them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    file = os.memfd_create("state")
    try:
        os.write(file, rows.state)
        half = len(rows.state) // 2 + 1
        with Comparers(Extents(file, [(0, 0, half), (half, half, len(rows.state) - half)]), os.getpid()) as compares:
            compares.start(size)
            yield Asked(compares, rows)
            there = helpers(compares)
    finally:
        os.close(file)
    for helper in there:
        assert not is_alive(helper._process.pid)


@pytest.mark.parametrize(
    ("cores", "size", "expected"),
    [(1, 1 << 40, 0), (2, 1 << 40, 1), (4, 1 << 40, 3), (64, 1 << 40, 3), (8, 64 * MIB - 1, 0), (8, 128 * MIB, 2)],
)
def test_as_many_helpers_as_are_worthwhile(
    monkeypatch: pytest.MonkeyPatch, rows: Rows, cores: int, size: int, expected: int
) -> None:
    with started(monkeypatch, rows, cores, size) as asked:
        assert len(helpers(asked.compares)) == expected
        if expected:
            asked.ask_helpers()
        asked.ask(3 * ROWS)
        asked.finish()
        assert len(helpers(asked.compares)) == expected
        asked.compares.start(1 << 40)
        assert len(helpers(asked.compares)) == (expected or min(3, cores - 1))


def test_helpers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(interpreter, "start", fail)
    with started(monkeypatch, rows) as asked:
        asked.ask(ROWS)
        asked.finish()


@pytest.mark.parametrize("when", ["starting", "asked", "idle"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_helpers_that_say_nothing(monkeypatch: pytest.MonkeyPatch, rows: Rows, signum: int, when: str) -> None:
    """What they were asked for is compared here."""
    monkeypatch.setattr(comparers, "_SILENT_S", 0.05)
    with started(monkeypatch, rows) as asked:
        if when != "starting":
            asked.ask_helpers()
        if when == "idle":
            asked.finish()
        for helper in helpers(asked.compares):
            os.kill(helper._process.pid, signum)
        asked.ask(ROWS)
        asked.finish()
        assert all(not helper.jobs for helper in helpers(asked.compares))


def test_what_nobody_waits_for_any_more(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    """What a helper that is gone was asked for is compared when it is wanted, and only then."""
    with started(monkeypatch, rows, cores=2) as asked:
        helper = asked.ask_helpers()
        asked.finish()
        os.kill(helper._process.pid, signal.SIGSTOP)
        abandoned = asked.compares.compare(-1, 0, 0, 1)  # there is no memory at 0
        wanted = asked.compares.compare(0, 0, rows.address, PAGES)
        assert [*helper.jobs] == [abandoned, wanted]
        monkeypatch.setattr(comparers, "_SILENT_S", 0.05)
        assert asked.compares.result(wanted) == rows.expected[0]
        assert helpers(asked.compares) == []
        with pytest.raises(OSError, match="Bad address"):
            asked.compares.result(abandoned)


def test_behind_the_end_of_the_state_is_nothing(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    """Not even what was read before."""
    with started(monkeypatch, rows, cores=1) as asked:
        for records in (PAGES, 10):
            asked.compares.records._state.size = records * RECORD
            found = asked.compares.result(asked.compares.compare(0, 0, rows.address, PAGES))
            assert found == rows.expected[0][:records]


def test_with_zeroes(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    """The state is not read for it."""
    with started(monkeypatch, rows) as asked:
        memory = comparison.buffer(3 * PAGE)
        memory[PAGE] = 1
        asked.ask_helpers()
        asked.finish()
        for _ in range(5):
            assert asked.compares.result(asked.compares.compare(-1, 0, comparison._address(memory), 3)) == b"\0\1\0"


def test_what_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    with started(monkeypatch, rows) as asked:
        asked.ask_helpers()
        asked.finish()
        with pytest.raises(OSError, match="Bad address"):
            asked.compares.result(asked.compares.compare(-1, 0, 0, 1))


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    """Of files and processes, after an error in the middle too."""
    gc.collect()
    before = open_files()
    pid = 0
    with pytest.raises(ZeroDivisionError), started(monkeypatch, rows) as asked:
        pid = asked.ask_helpers()._process.pid
        raise ZeroDivisionError
    assert not is_alive(pid)
    assert open_files() == before


def test_a_helper_ends_when_nobody_can_ask_it_any_more() -> None:
    file = os.memfd_create("test")
    process = interpreter.start(
        "qsnap-compare", "qsnap.operations.delta.records.serve", str(os.getpid()), str(file), str(file),
        files=[file], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    os.close(file)
    with process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
