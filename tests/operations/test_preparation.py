"""What of a VM state's area is prepared, and in which pieces; what is said where it cannot be."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from msgspec import structs

from qsnap.errors import MonitorLost
from qsnap.host import processes
from qsnap.host.processes import Process, StateEstimate
from qsnap.inventory import vm_state
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.state_store import NO_STORE
from qsnap.inventory.vm_state import Stretch
from qsnap.model.qemu import BlockBackend, QemuVersion, RunState
from qsnap.model.requests import OnExists, SaveRequest
from qsnap.operations import prepare as preparing
from qsnap.operations.prepare import Preparation, plan_preparation, prepare
from qsnap.operations.progress import Phase, Progress
from qsnap.runs.journal import Journal
from qsnap.runs.record import Record
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.graphs import graph, node
from support.guest import open_files

pytestmark = pytest.mark.no_qemu

KIB, MIB = 1 << 10, 1 << 20
VERSION = QemuVersion(11, 1, 0)
LARGE = StateEstimate(at_least=80 * MIB, expected=100 * MIB, at_most=200 * MIB)

Found = Callable[..., list[Stretch]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    return path


@pytest.fixture
def lacks(monkeypatch: pytest.MonkeyPatch) -> Found:
    """Have the image lack these stretches, of a state of whatever size."""

    def found(*stretches: Stretch) -> list[Stretch]:
        monkeypatch.setattr(vm_state, "unprepared", lambda *_: [*stretches])
        return [*stretches]

    return found


def shared(begin: int, size: int) -> Stretch:
    return Stretch(begin, size, is_shared=True)


def missing(begin: int, size: int) -> Stretch:
    return Stretch(begin, size, is_shared=False)


def test_what_is_needed_always_and_what_only_if_it_pays(image: Path, lacks: Found) -> None:
    """Shared clusters up to the size that is expected; missing ones up to the size that is certain, or none."""
    preparation = Preparation(image=image, shared=MIB, missing=512 * KIB)
    copied = lacks(shared(0, 256 * KIB), missing(256 * KIB, 512 * KIB), shared(768 * KIB, MIB))[0]
    needed = [copied, shared(768 * KIB, 256 * KIB)]
    assert preparation.stretches() == needed
    wanted = [copied, missing(256 * KIB, 256 * KIB), needed[1]]
    assert preparation._replace(always=True).stretches() == wanted
    # It pays from 64 MiB on; what is shared does not count
    for size, pays in (64 * MIB, True), (64 * MIB - 64 * KIB, False):
        all_of_it = lacks(shared(0, MIB), missing(MIB, size))
        stretches = Preparation(image=image, shared=MIB, missing=MIB + size).stretches()
        assert stretches == (all_of_it if pays else all_of_it[:1])


def test_what_ends_where_the_state_does(image: Path, lacks: Found) -> None:
    """Whole clusters; what begins just behind it is none of it."""
    lacks(shared(0, 128 * KIB), shared(128 * KIB, 64 * KIB), missing(256 * KIB, 64 * KIB))
    preparation = Preparation(image=image, shared=64 * KIB + 1, missing=256 * KIB, always=True)
    assert preparation.stretches() == [shared(0, 128 * KIB)]
    assert Preparation().stretches() == []


def test_room(image: Path, lacks: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If there is not enough for all, what is shared comes first; if not even for that, nothing is prepared."""
    free = [0]
    monkeypatch.setattr(processes, "free_bytes", lambda _: (0, *free))
    both = lacks(shared(0, 64 * KIB), missing(64 * KIB, MIB))
    preparation = Preparation(image=image, shared=64 * KIB, missing=2 * MIB, always=True)
    for free[0], expected in (MIB + 64 * KIB, both), (MIB + 64 * KIB - 1, both[:1]), (64 * KIB - 1, []):
        assert preparation.stretches() == expected
    # Of a block device nobody knows; what is shared the save itself would copy
    assert preparation._replace(image=tmp_path).stretches() == both[:1]
    assert not preparing._has_room(tmp_path / ("x" * 300), both[:1]), "nothing of it can be seen"


def test_an_image_that_cannot_be_read(image: Path) -> None:
    """Nothing is left open."""
    image.write_bytes(b"no qcow2")
    before = open_files()
    for path in image, image.with_name("none"):
        assert Preparation(image=path, shared=MIB).stretches() == []
    assert open_files() == before


async def inventory_of(*backends: BlockBackend, tag: str = "t") -> Inventory:
    """Of two disks; the first has a snapshot, and gets the VM state."""
    monitor = FakeMonitor()
    await monitor.snapshot_save(tag, "disk0", ["disk0"])
    return Inventory(msgspec.structs.replace(await monitor.block_graph(), backends=backends), NO_STORE, vmstate="disk0")


BLOCKDEV = BlockBackend(qdev="/machine/peripheral/d", root="disk0")
DRIVE = BlockBackend(name="a b", qdev="/machine/peripheral/d", root="disk0")
OTHER = BlockBackend(name="other", root="disk1")
#: An export, which is no device of the guest.
EXPORT = BlockBackend(root="disk0")


@pytest.mark.parametrize(
    ("runstate", "prepares", "at_least", "missing", "always"),
    [
        (RunState.RUNNING, None, 80 * MIB, 90 * MIB, False),
        (RunState.RUNNING, True, 80 * MIB, 90 * MIB, True),
        (RunState.RUNNING, True, 0, 0, True),
        (RunState.PAUSED, None, 80 * MIB, 0, False),  # it feels no pause
        (RunState.PAUSED, True, 80 * MIB, 90 * MIB, True),
    ],
)
@pytest.mark.parametrize(
    ("backends", "name"),
    [((BLOCKDEV, OTHER), '-d "/machine/peripheral/d"'), ((EXPORT, DRIVE), r'"a b"'), ((DRIVE, BLOCKDEV), r'"a b"')],
)
async def test_what_is_planned(
    image: Path, lacks: Found, runstate: RunState, prepares: bool | None, at_least: int, missing: int, always: bool,
    backends: tuple[BlockBackend, ...], name: str,
) -> None:  # fmt: skip
    lacks(shared(0, MIB))
    inventory = await inventory_of(*backends)
    estimate = structs.replace(LARGE, at_least=at_least)
    request = SaveRequest(tag="t", prepare=prepares)
    planned = plan_preparation(inventory, request, runstate, VERSION, image, estimate)
    assert planned == Preparation(
        image=image, name=name, shared=100 * MIB, missing=missing, always=always,
        going=inventory.graph.nodes["disk0"].snapshots,
    )  # fmt: skip


async def test_what_the_save_deletes_before_it_writes(image: Path, lacks: Found) -> None:
    lacks(shared(0, MIB))
    inventory = await inventory_of(BLOCKDEV)
    rows = inventory.graph.nodes["disk0"].snapshots
    for tag, on_exists, going in (
        ("t", OnExists.REPLACE, rows),
        ("t", OnExists.SAFE, ()),
        ("t", OnExists.REFUSE, ()),
        ("other", OnExists.REPLACE, ()),
        (None, OnExists.REPLACE, ()),
    ):
        request = SaveRequest(tag=tag, on_exists=on_exists)
        assert plan_preparation(inventory, request, RunState.RUNNING, VERSION, image, LARGE).going == going


UNSEEN = "its image, or QEMU's memory, cannot be seen from here"
NO_DEVICE = "no device of the guest uses its image"
NO_ROOM = "there is not enough room to copy them"


@pytest.mark.parametrize(
    ("is_seen", "backend", "is_shared", "tag", "prepares", "why", "cure"),
    [
        (False, BLOCKDEV, True, "t", None, "", ""),
        (False, BLOCKDEV, True, "t", True, UNSEEN, ""),
        (True, BLOCKDEV, False, "t", None, "", ""),
        (True, BLOCKDEV, False, "t", True, "", ""),
        (True, EXPORT, False, "t", None, "", ""),
        (True, EXPORT, False, "t", True, NO_DEVICE, ""),
        (True, EXPORT, True, "u", None, NO_DEVICE, "save with --live, or with --vmstate another disk"),
        (True, BLOCKDEV, True, "u", True, NO_ROOM, "make room, or save with --live"),
        (
            True, BLOCKDEV, True, "t", None, NO_ROOM,
            "delete the older snapshot of that name first, or make room, or save with --live",
        ),
        (True, BLOCKDEV, True, "t", False, "", ""),
    ],
)  # fmt: skip
async def test_what_is_said_where_it_cannot_be(
    image: Path, lacks: Found, monkeypatch: pytest.MonkeyPatch, is_seen: bool, backend: BlockBackend, is_shared: bool,
    tag: str, prepares: bool | None, why: str, cure: str,
) -> None:  # fmt: skip
    """A long pause is announced; else only who asks for preparation hears of it."""
    monkeypatch.setattr(processes, "free_bytes", lambda _: (0, 0 if why == NO_ROOM else 1 << 40))
    lacks(*([shared(0, MIB)] if is_shared else []))
    request = SaveRequest(tag=tag, prepare=prepares)
    seen = (image, LARGE) if is_seen else (None, None)
    planned = plan_preparation(await inventory_of(backend), request, RunState.RUNNING, VERSION, *seen)
    assert planned.stretches() == []
    if not why:
        assert planned.findings == ()
        return
    assert planned._replace(findings=()) == Preparation()
    (finding,) = planned.findings
    assert (finding.code, finding.node, finding.cure) == ("long-pause" if cure else "not-prepared", "disk0", cure)
    assert finding.message.startswith("disk0: ")
    assert finding.message.endswith(f": {why}")


async def test_the_device_is_one_above_the_image_itself(image: Path, lacks: Found) -> None:
    lacks(shared(0, MIB))
    monitor = FakeMonitor()
    inventory = Inventory(await monitor.block_graph(), NO_STORE, vmstate="disk1")
    planned = plan_preparation(inventory, SaveRequest(), RunState.RUNNING, VERSION, image, LARGE)
    assert planned.name == '-d "/machine/peripheral/disk1"'


async def test_half_of_what_is_needed_is_not_known(image: Path, lacks: Found) -> None:
    """Without the image or the size of the state nothing is prepared."""
    lacks(shared(0, MIB))
    inventory = await inventory_of(BLOCKDEV)
    for seen in (image, None), (None, LARGE):
        assert plan_preparation(inventory, SaveRequest(), RunState.RUNNING, VERSION, *seen) == Preparation()
        (finding,) = plan_preparation(inventory, SaveRequest(prepare=True), RunState.RUNNING, VERSION, *seen).findings
        assert finding.message == f"disk0: the save cannot be prepared: {UNSEEN}"
    nowhere = Inventory(graph(node("raw", "raw")), NO_STORE)
    assert (
        plan_preparation(nowhere, SaveRequest(prepare=True), RunState.RUNNING, VERSION, image, LARGE) == Preparation()
    )


class Writing(FakeMonitor):
    """Its clock goes on by so many seconds with each command, and stands still otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes: Iterable[float] = ()) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.slept: list[float] = []
        self._now = 0.0
        self._takes = iter(takes)

        async def slept(delay: float) -> None:
            self.slept.append(delay)
            self._now = 0.0
            await asyncio.sleep(0)

        monkeypatch.setattr(preparing, "asyncio", SimpleNamespace(sleep=slept, CancelledError=asyncio.CancelledError))
        monkeypatch.setattr(preparing, "time", SimpleNamespace(monotonic=lambda: self._now))

    async def human_answer(self, line: str) -> str:
        self.lines.append(line)
        self._now += next(self._takes, 0.02)
        return ""

    @property
    def written(self) -> list[tuple[int, int]]:
        """Where, and how much, in units of 64 KiB."""
        words = [line.removesuffix('"').split() for line in self.lines if "write" in line]
        return [(int(begin) >> 16, int(size) >> 16) for *_, begin, size in words]


async def test_the_pieces(image: Path, lacks: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as large when one took longer than it is to take, twice if it took a third; the guest has as long."""
    long, short = preparing._PIECE_S, preparing._PIECE_S / 3
    takes = [long, short, *[0.01] * 4, *[0.05] * 8, 0.03]
    monitor = Writing(monkeypatch, takes)
    lacks(missing(64 * KIB, 96 * MIB))
    seen: list[Progress] = []
    await prepare(Run(monitor), Preparation(image=image, name="d", missing=128 * MIB), seen.append)
    sizes = [32, 32, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8, 4, 2, 2]
    assert [size for _, size in monitor.written][: len(sizes)] == sizes
    assert monitor.lines[0] == f'qemu-io d "write -q -b -P 0 {64 * KIB} {2 * MIB}"'
    ends = [begin + size for begin, size in monitor.written]
    assert [begin for begin, _ in monitor.written] == [1, *ends[:-1]]
    assert ends[-1] == (96 * MIB >> 16) + 1
    assert monitor.slept[: len(takes)] == takes
    assert [(one.phase, one.written, one.expected) for one in seen] == [
        (Phase.PREPARING, (end << 16) - 64 * KIB, 96 * MIB) for end in ends
    ]
    assert seen[0].elapsed_s == long


async def test_what_is_shared_is_looked_for_after_a_flush(
    image: Path, lacks: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may show what QEMU has discarded already."""
    monitor = Writing(monkeypatch)
    lacks(shared(0, MIB), missing(MIB, MIB))
    preparation = Preparation(image=image, name="d", shared=2 * MIB, missing=2 * MIB, always=True)
    answer = monitor.human_answer

    async def flushed(line: str) -> str:
        if "flush" in line:
            lacks(missing(0, 2 * MIB))
        return await answer(line)

    monitor.human_answer = flushed  # type: ignore[method-assign]
    await prepare(Run(monitor), preparation, None)
    assert monitor.lines == ['qemu-io d "flush"', f'qemu-io d "write -q -b -P 0 0 {2 * MIB}"']
    monitor.lines.clear()
    await prepare(Run(monitor), preparation, None)
    assert monitor.lines == [f'qemu-io d "write -q -b -P 0 0 {2 * MIB}"'], "none is shared"


async def test_a_watcher_that_fails(
    image: Path, lacks: Found, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not asked again, and the rest is prepared."""
    monitor = Writing(monkeypatch)
    lacks(missing(0, 64 * MIB))

    def fail(_: Progress) -> None:
        raise ZeroDivisionError("mine")

    with caplog.at_level(logging.WARNING):
        await prepare(Run(monitor), Preparation(image=image, missing=64 * MIB), fail)
    assert [record.getMessage() for record in caplog.records] == ["the save cannot be watched: mine"]
    assert sum(size for _, size in monitor.written) == 64 * MIB >> 16


@pytest.mark.parametrize("has_ended", [True, False])
async def test_the_monitor_is_lost(image: Path, lacks: Found, monkeypatch: pytest.MonkeyPatch, has_ended: bool) -> None:
    """The save ends there, and says so."""
    child = subprocess.Popen(["true"])  # noqa: ASYNC220 (it ends at once)
    child.wait()
    monitor = FakeMonitor()

    async def lost(line: str) -> str:
        raise MonitorLost("it is gone")

    monitor.human_answer = lost  # type: ignore[method-assign]
    lacks(missing(0, 64 * MIB))
    journal = Journal(Record(qemu=Process(pid=child.pid, start=0) if has_ended else None))
    with pytest.raises(MonitorLost) as failed:
        await prepare(Run(monitor, journal=journal), Preparation(image=image, missing=64 * MIB), None)
    words = "QEMU has ended; there is no guest any more; nothing was saved" if has_ended else "it is gone"
    assert str(failed.value) == words


async def test_an_interrupt(image: Path, lacks: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes effect after the piece, and says how things stand."""
    monitor = Writing(monkeypatch)
    answer = monitor.human_answer

    async def interrupted(line: str) -> str:
        task.cancel()
        return await answer(line)

    monitor.human_answer = interrupted  # type: ignore[method-assign]
    lacks(missing(0, 64 * MIB))
    task = asyncio.create_task(prepare(Run(monitor), Preparation(image=image, missing=64 * MIB), None))
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    assert len(monitor.lines) == 1
    (note,) = cancelled.value.__notes__
    assert note.startswith("nothing was saved; the guest was not touched")
