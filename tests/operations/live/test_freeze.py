"""The moment of a live save, step by step, with a QEMU that is played: what is asked of it, in which order, and when.

How RAM, device state and disks of a real one fit together is seen in test_live_save.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qsnap.errors import JobFailed
from qsnap.host import bulk_io
from qsnap.host.hugepages import Layout
from qsnap.inventory.state_file import STREAM_OFFSET
from qsnap.model.qemu import RunState
from qsnap.monitor.names import READ_TIME
from qsnap.monitor.qmp.background import Stream
from qsnap.operations.live import freeze, timing
from qsnap.operations.live.freeze import FreezeBefore9, FreezeSince9
from qsnap.operations.live.timing import ReadTime, SnapshotThread
from qsnap.operations.progress import Phase, Progress
from qsnap.runs.group import Point
from qsnap.runs.journal import Journal
from qsnap.runs.pause import Pause
from support.fake_monitor import FakeMonitor
from support.guest import open_files

pytestmark = pytest.mark.no_qemu

GIB = 1 << 30
MS = 1_000_000


def at(status: str, *, pages: int = 0, done: int = 0, error: str = "") -> Stream:
    return Stream(status, done, 96, pages, error)


SETUP, ACTIVE, TAKEN, COMPLETED = at("setup"), at("active"), at("active", pages=1), at("completed", pages=1)
FAILED = at("failed", error="QEMU says why")


def name_of(file: int) -> str:
    return Path(f"/proc/self/fd/{file}").readlink().name


@dataclass
class Played(FakeMonitor):
    """A guest whose RAM is streamed.

    :ivar streams: what is told of the stream, one after the other; the last one again and again.
    :ivar events: the guest's stops and resumptions.
    """

    streams: list[Stream] = field(default_factory=lambda: [TAKEN])
    events: list[tuple[str, float]] = field(default_factory=list)

    @property
    def live(self) -> Any:
        return self

    async def stop(self) -> float | None:
        self.events.append(("STOP", 1.0))
        return await super().stop()

    def resumes(self, stamp: float) -> None:
        """QEMU resumes the guest by itself."""
        self.events.append(("RESUME", stamp))
        self.state = RunState.RUNNING

    async def begin_stream(self, file: int, offset: int) -> None:
        self.calls.append(f"begin {name_of(file)} {offset}")

    async def end_stream(self) -> None:
        self.calls.append("end")

    async def stream(self) -> Stream:
        return self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]

    def stop_resume_events(self) -> list[tuple[str, float]]:
        return self.events


@pytest.fixture
def monitor() -> Played:
    return Played()


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Path]:
    """The state file to be. When a test ends no file is open that was not open before."""
    before = {*open_files()}
    path = tmp_path / "part"
    path.touch()
    yield path
    assert {*open_files()} <= before


@pytest.fixture
def freezes(monitor: Played, part: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """By the version of QEMU. One that waits in vain ends soon."""
    monkeypatch.setattr(freeze, "_STATE_TIMEOUT_S", 5.0)
    monkeypatch.setattr(timing, "_PATIENCE_S", 5.0)
    file = os.open(part, os.O_RDWR)
    run: Any = SimpleNamespace(monitor=monitor, journal=Journal())

    async def snapshot_disks() -> None:
        monitor.calls.append("disks")

    async def forget_disks() -> None:
        monitor.calls.append("forget disks")

    kinds = {"8.2": FreezeBefore9, "9.0": FreezeSince9}
    made = {
        version: kind(run, file, snapshot_disks=snapshot_disks, forget_disks=forget_disks, images=())
        for version, kind in kinds.items()
    }
    os.close(file)
    yield made
    for one in made.values():
        one.close()


BEGIN = f"begin part {STREAM_OFFSET}"


def test_a_file_that_cannot_be_opened_again(monitor: Played) -> None:
    run: Any = SimpleNamespace(monitor=monitor, journal=Journal())
    with pytest.raises(JobFailed, match="open failed: the state file: No such file"):
        FreezeSince9(run, 1 << 20, snapshot_disks=monitor.reset, forget_disks=monitor.reset, images=())


PAUSE = object()
BASE = Layout(4 * GIB, 0)


@pytest.mark.parametrize(
    ("ram", "member", "late", "steps"),
    [
        (Layout(0, 2 * GIB), None, [], ["flush", "plain"]),
        (Layout(0, 2 * GIB + 4096), None, [], ["known", "expected 5", "flush", "late 90", "anew", "plain", "kept 7"]),
        (BASE, None, [(PAUSE, 80)], ["known", "expected 5", "flush", "late 90", "kept 80"]),
        (
            BASE, None, [(None, 70), (None, 60), (PAUSE, 50)],
            ["known", "expected 5", "flush", "late 90", "anew", "late 70", "anew", "late 60", "kept 50"],
        ),
        (
            BASE, None, [(None, 70), (None, 60), (None, 50)],
            [
                "known", "expected 5", "flush",
                "late 90", "anew", "late 70", "anew", "late 60", "anew", "plain", "kept 7",
            ],
        ),
        (BASE, object(), [], ["known", "expected 5", "flush", "plain", "kept 7"]),
    ],
    ids=["little RAM", "a little more", "late", "late at last", "too often too late", "in a group"],
)  # fmt: skip
async def test_the_way_to_the_moment(
    freezes: dict[str, Any], ram: Layout, member: object, late: list[tuple[object, int]], steps: list[str]
) -> None:
    """The host's writes are flushed before the guest stands still, and not as long as QEMU takes to be asked."""
    one, done = freezes["9.0"], []
    one._journal.member = member

    async def step(*words: object, result: object = None) -> object:
        done.append(" ".join(map(str, words)))
        return result

    def in_ms(ns: int) -> int:
        return ns // MS

    async def stop_late(read_ns: int) -> tuple[object, int]:
        await step("late", in_ms(read_ns))
        pause, spent = late.pop(0) if late else (None, 20)
        return pause, spent * MS

    one._ram = lambda _: step("ram", result=ram)
    one._flush = lambda: step("flush")
    one._plain = lambda: step("plain", result=(PAUSE, 7 * MS))
    one._known_read_ns = lambda _: step("known", result=5 * MS)
    one._expected_read_ns = lambda known, _: step("expected", in_ms(known), result=90 * MS)
    one._late = stop_late
    one._begin_anew = lambda: step("anew")
    one._remember = lambda spent, known, _: step("kept", in_ms(spent))
    assert await one.freeze() is PAUSE
    assert done == ["ram", *steps]


@pytest.mark.parametrize(
    ("version", "steps"),
    [("8.2", ["stop", "disks", BEGIN]), ("9.0", ["stop", BEGIN, "disks", "cont"])],
)
async def test_a_guest_that_is_stopped_first(
    freezes: dict[str, Any], monitor: Played, version: str, steps: list[str]
) -> None:
    """Before 9.0 QEMU may resume it as soon as there is a stream, so the disks come first."""
    one = freezes[version]
    if version == "8.2":

        async def resumed(pause: Pause, thread: SnapshotThread) -> int:
            monitor.resumes(3.5)
            return await FreezeBefore9._state_taken(one, pause, thread)

        one._state_taken = resumed
    met: list[Point] = []
    one._journal.member = member = SimpleNamespace(arrive=met.append, meet=lambda _: asyncio.sleep(0))
    pause, _ = await one._plain()
    assert monitor.calls == steps
    assert met == [Point.WRITTEN], "in a group no other VM waits for this one"
    assert pause.runstate == "running"
    assert member.resumed[0] == (3.5 if version == "8.2" else None), "it is told by QEMU's clock"


@pytest.mark.parametrize("version", ["8.2", "9.0"])
@pytest.mark.parametrize("has_failed", [True, False])
async def test_qemu_is_faster_than_the_stop(
    freezes: dict[str, Any], monitor: Played, version: str, has_failed: bool
) -> None:
    """Nothing is stopped then; what is begun is begun anew, unless it has failed."""
    monitor.streams = [FAILED] if has_failed else [ACTIVE]
    if has_failed:
        with pytest.raises(JobFailed, match="QEMU says why"):
            await freezes[version]._late(90 * MS)
    else:
        assert (await freezes[version]._late(90 * MS))[0] is None
    assert monitor.calls == [BEGIN]
    await freezes[version]._begin_anew()
    assert monitor.calls == [BEGIN, "end", "forget disks"]


@pytest.mark.parametrize(
    ("version", "when", "is_taken"),
    [("8.2", "at the end", True), ("8.2", "before the disks", False), ("9.0", "never", True)]
    + [("9.0", when, False) for when in ("before the disks", "at the end")],
)
async def test_a_guest_that_is_stopped_late(
    freezes: dict[str, Any], monitor: Played, monkeypatch: pytest.MonkeyPatch, version: str, when: str, is_taken: bool
) -> None:
    """The attempt counts if QEMU had not resumed it when the disks were taken; from 9.0 on, if it has not at all."""
    monitor.streams = [SETUP, SETUP, SETUP, SETUP, TAKEN]
    seen = iter((50 * MS, 80 * MS, 85 * MS, 0, 0))
    monkeypatch.setattr(SnapshotThread, "spent_ns", property(lambda _: next(seen)))
    one = freezes[version]

    async def disks() -> None:
        monitor.calls.append("disks")
        if when == "before the disks":
            monitor.resumes(2.0)

    async def state_taken(pause: Pause, thread: SnapshotThread) -> int:
        if when == "at the end":
            monitor.resumes(3.0)
        return await type(one)._state_taken(one, pause, thread)  # type: ignore[no-any-return]

    one._snapshot_disks, one._state_taken = disks, state_taken
    pause, spent = await one._late(90 * MS)
    assert monitor.calls[:3] == [BEGIN, "stop", "disks"]
    assert isinstance(pause, Pause) is is_taken
    assert spent == 85 * MS


async def test_the_device_state_is_awaited(freezes: dict[str, Any], monitor: Played) -> None:
    """The time of QEMU's thread counts as long as it reads RAM: in the set-up."""
    spent = iter((3, 5, 8, 9))

    class Thread:
        @property
        def spent_ns(self) -> int:
            return next(spent)

    monitor.streams = [SETUP, SETUP, SETUP, SETUP, ACTIVE, ACTIVE, TAKEN]
    assert await freezes["9.0"]._state_taken(None, Thread()) == 5
    assert [*spent] == []
    assert await freezes["9.0"]._has_begun()
    monitor.streams = [SETUP]
    assert not await freezes["9.0"]._has_begun()


async def test_a_device_state_that_does_not_come(
    freezes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, monitor: Played
) -> None:
    monkeypatch.setattr(freeze, "_STATE_TIMEOUT_S", 0.02)
    monitor.streams = [ACTIVE]
    with pytest.raises(JobFailed, match=r"QEMU has not taken the device state within 0.02 s"):
        await freezes["9.0"]._state_taken(None, SimpleNamespace(spent_ns=0))


async def test_when_the_guest_may_run(freezes: dict[str, Any], monitor: Played) -> None:
    """Before 9.0 QEMU tells it; from then on pages in the stream do, or its end."""
    stamps: list[float] = []
    pause: Any = SimpleNamespace(resumed_by_qemu=stamps.append)
    assert not await freezes["8.2"]._runs_or_may(pause, COMPLETED)
    monitor.events = [("STOP", 1.0)]
    assert not await freezes["8.2"]._runs_or_may(pause, COMPLETED)
    monitor.events = [("RESUME", 1.0), ("STOP", 2.0), ("RESUME", 3.0), ("STOP", 4.0)]
    assert await freezes["8.2"]._runs_or_may(pause, ACTIVE)
    assert stamps == [3.0]
    told = {each: await freezes["9.0"]._runs_or_may(None, each) for each in (SETUP, ACTIVE, TAKEN, at("completed"))}
    assert list(told.values()) == [False, False, True, True]


async def test_whether_the_stop_came_in_time(freezes: dict[str, Any], monitor: Played) -> None:
    for is_there in (True, False):
        assert await freezes["8.2"]._was_in_time(at_the_disks=is_there) is is_there
    for events, is_in_time in (["STOP"], True), (["STOP", "RESUME"], False), ([], False):
        monitor.events = [(event, 1.0) for event in events]
        assert await freezes["9.0"]._was_in_time(at_the_disks=True) is is_in_time


@pytest.mark.parametrize(("version", "begin"), [("8.2", "begin null 0"), ("9.0", BEGIN)])
async def test_a_stream_that_nobody_wants(
    freezes: dict[str, Any], monitor: Played, monkeypatch: pytest.MonkeyPatch, version: str, begin: str
) -> None:
    """It is begun, and ended when QEMU has read all RAM. One that fails ends the save before the guest is stopped."""
    monitor.streams = [SETUP, SETUP, TAKEN]
    seen = iter((5, 8, 9))
    monkeypatch.setattr(SnapshotThread, "spent_ns", property(lambda _: next(seen)))
    assert await freezes[version]._rehearse() == 8
    assert monitor.calls == [begin, "end"]
    monitor.streams = [FAILED]
    monkeypatch.setattr(SnapshotThread, "spent_ns", 5)
    with pytest.raises(JobFailed, match="QEMU says why"):
        await freezes[version]._rehearse()


def test_when_it_is_worth_while_to_stop_late(freezes: dict[str, Any]) -> None:
    """Where the disks' snapshots, before 9.0, or a second read take less than that."""
    worth = {
        version: [read for read in (0, 25 * MS, 25 * MS + 1, 29_411_765, 29_411_767) if one._is_to_stop_late(read)]
        for version, one in freezes.items()
    }
    assert worth == {"8.2": [29_411_767], "9.0": [25 * MS + 1, 29_411_765, 29_411_767]}


def test_what_is_kept_for_the_next_time(freezes: dict[str, Any]) -> None:
    """Before 9.0 the least that was ever seen: a stop that comes too late costs a whole save."""
    pairs = [(5, 0), (5, 3), (3, 5)]
    kept = {version: [one._read_ns_to_keep(*pair) for pair in pairs] for version, one in freezes.items()}
    assert kept == {"8.2": [5, 3, 3], "9.0": [5, 5, 3]}
    layouts = [Layout(7, 6), Layout(7, 7), Layout(0, 7)]
    of_use = {version: [one._is_of_use_later(ram) for ram in layouts] for version, one in freezes.items()}
    assert of_use == {"8.2": [True, True, True], "9.0": [True, False, False]}


async def test_that_nothing_was_seen_is_not_remembered(freezes: dict[str, Any], monitor: Played) -> None:
    """What was known before stays, and where nothing was known no mark is left."""
    one = freezes["9.0"]
    assert await one._known_read_ns(Layout(7, 0)) == 0
    await one._remember(0, 0, Layout(7, 0))
    assert monitor.texts == {}
    await one._remember(5, 0, Layout(7, 0))
    await one._remember(0, 5, Layout(7, 0))
    assert monitor.texts == {READ_TIME: ReadTime(5, 7).encode()}
    assert await one._known_read_ns(Layout(7, 0)) == 5
    # RAM in huge pages is rehearsed anew every time, where that is possible
    await one._remember(9, 0, Layout(0, 7))
    assert await one._known_read_ns(Layout(7, 0)) == 5
    await one._remember(9, 0, Layout(7, 0))
    assert [await one._known_read_ns(Layout(7, other)) for other in (6, 7, 8)] == [9, 0, 0]
    assert await freezes["8.2"]._known_read_ns(Layout(7, 8)) == 9
    assert await freezes["8.2"]._known_read_ns(Layout(1, 8)) == 0, "much of it was mapped otherwise then"
    await freezes["8.2"]._remember(4, 9, Layout(0, 7))
    assert monitor.texts == {READ_TIME: ReadTime(4, 0).encode()}


async def test_images_are_flushed(
    freezes: dict[str, Any], part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as that can be done."""
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(Path(f"/proc/self/fd/{file}").readlink()))
    freezes["9.0"]._images = [tmp_path / "none", part]
    await freezes["9.0"]._flush()
    assert flushed == [part]


@pytest.mark.parametrize("error", ["QEMU says why", ""])
async def test_a_stream_that_is_not_completed(freezes: dict[str, Any], monitor: Played, error: str) -> None:
    one = freezes["9.0"]
    for status in "failed", "cancelled":
        monitor.streams = [at(status, error=error)]
        words = f"migrate failed: {error or f'it was {status}'}"
        for wait in one._raise_if_failed, lambda: one.wait_until_written(None):
            with pytest.raises(JobFailed) as raised:
                await wait()
            assert str(raised.value) == words
    for stream in COMPLETED, ACTIVE, SETUP:
        monitor.streams = [stream]
        await one._raise_if_failed()


async def test_the_kernel_writes_meanwhile_and_to_the_end(
    freezes: dict[str, Any], monitor: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = freezes["9.0"]
    os.lseek(one._file, STREAM_OFFSET + 100, os.SEEK_SET)
    told: list[Progress] = []
    written: list[tuple[int, int]] = []

    def write_back(_: int, begin: int, end: int, __: float) -> int:
        written.append((begin - STREAM_OFFSET, end - STREAM_OFFSET))
        return min(begin + 40, end)

    monkeypatch.setattr(bulk_io, "write_back", write_back)
    monitor.streams = [at("active", done=32), at("active", done=64), COMPLETED]
    await one.wait_until_written(told.append)
    assert [(each.phase, each.written, each.expected) for each in told] == [(Phase.SAVING, n, 96) for n in (32, 64)]
    assert written == [(0, 100), (40, 100), (80, 100)]

    def broken(*_: object) -> int:
        raise OSError

    monkeypatch.setattr(bulk_io, "write_back", broken)
    await asyncio.wait_for(one.wait_until_written(None), 20)
