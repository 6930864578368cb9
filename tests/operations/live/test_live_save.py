"""Live saves: the guest runs while its RAM is written, and what a load brings back is of one moment.

The guest of most tests writes heavily: on every tick 256 pages of RAM, each of which it checks a round of 64 ticks
later, and a slot of every disk, which it compares with RAM. Whatever comes from another moment than the rest is seen.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qsnap
import qsnap.guest
from qsnap.errors import JobFailed, PrecheckRefused, QsnapError, VerifyFailed
from qsnap.host import hugepages
from qsnap.host.hugepages import Layout
from qsnap.inventory import state_file
from qsnap.inventory import state_part as parts
from qsnap.inventory.state_file import Content
from qsnap.inventory.state_store import StateStore
from qsnap.model.requests import SaveRequest
from qsnap.monitor.names import READ_TIME
from qsnap.monitor.qmp.background import Stream
from qsnap.operations.live import freeze
from qsnap.operations.live.save import LiveSaveAttempt, do_live_save, plan_live
from qsnap.operations.live.timing import ReadTime, SnapshotThread
from qsnap.runs.group import Point
from qsnap.runs.journal import Journal
from qsnap.runs.pause import stopped
from qsnap.runs.record import LiveWork, Record
from qsnap.runs.run import Run
from support.guest import (
    Guest,
    Launch,
    assert_sound,
    blockdev,
    cli,
    deliver,
    disk_device,
    failing_disk,
    finish,
    make_disk,
    newer,
    qemu_img,
    qemu_version,
    start_cli,
    tags,
    until,
)
from support.killed import Killer, assert_all_is_well, kill_guard, marks, wait_for_the_guard
from support.live import ROUND, assert_in_order, make_heavy_disk, state_files, two_disks
from support.proxy import Intercept, deed
from support.state_files import DATE, written

pytestmark = pytest.mark.skipif(qemu_version() < (6, 0), reason="QEMU before 6.0 has no background snapshots")

#: QEMU does not resume the guest by itself, and a stream may fail or be cancelled.
IS_NEW = qemu_version() >= (9, 0)


def two_drives(d: Path) -> list[str]:
    return ["-drive", f"file={make_heavy_disk(d / 'disk0')},format=qcow2,if=virtio",
            "-drive", f"file={make_disk(d / 'disk1')},format=qcow2,if=virtio"]  # fmt: skip


def iothread(d: Path) -> list[str]:
    return ["-object", "iothread,id=io",
            *blockdev("disk0", make_heavy_disk(d / "disk0")), "-device", "virtio-blk,drive=disk0,iothread=io",
            *blockdev("disk1", make_disk(d / "disk1")), "-device", "virtio-blk,drive=disk1,iothread=io"]  # fmt: skip


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    return [tmp_path / "disk0", tmp_path / "disk1"]


@pytest.fixture
def heavy(launch: Launch, tmp_path: Path) -> Guest:
    """The guest that writes heavily, on two disks."""
    guest = launch(*two_disks(tmp_path), memory="96")
    guest.wait_for_ticks(10)
    return guest


def assert_nothing_live_left(guest: Guest, directory: Path, kept: list[str] | None = None) -> None:
    """No file, node or setting of a live save is left, and no snapshot but the older ones."""
    guest.assert_running()
    assert state_files(directory) == []
    assert [tags(directory / name) for name in ("disk0", "disk1")] == [kept or []] * 2
    assert_settings_are_as_they_were(guest)
    assert open_state_files(guest.pid) == []


def assert_settings_are_as_they_were(guest: Guest) -> None:
    assert [row["capability"] for row in guest.qmp("query-migrate-capabilities") if row["state"]] == []
    parameters = guest.qmp("query-migrate-parameters")
    assert (parameters["max-bandwidth"], parameters["downtime-limit"]) == (128 << 20, 300)
    assert [
        node["node-name"] for node in guest.qmp("query-named-block-nodes", flat=True) if "qsnap" in node["node-name"]
    ] == []
    # Of a paused guest QEMU lets go of files when some monitor's client has left (before 9.0)
    cli("status", monitor=guest.qmp_address)
    assert until("the sets of files to go", lambda: guest.qmp("query-fdsets") == [] or None)


# Contents


@pytest.mark.parametrize("topology", [two_disks, two_drives, iothread], ids=lambda topology: topology.__name__)
def test_what_a_load_brings_back(launch: Launch, tmp_path: Path, topology: Callable[[Path], list[str]]) -> None:
    """Several live snapshots beside an ordinary one, loaded in any order into the running QEMU."""
    guest = launch(*topology(tmp_path), memory="96")
    counts: dict[str, tuple[int, int]] = {}
    for tag in ("a", "b", "c"):
        guest.wait_for_ticks(ROUND)
        before = guest.counter
        result = cli("save", "--live", tag, "--json", monitor=guest.address).json
        counts[tag] = before, guest.counter
        assert (result["kind"], result["runstate"], result["vmstate"]) == ("live", "running", None)
        assert result["pause_ms"] > 0
        # The independent witness
        assert tags(tmp_path / "disk0").count(tag) == tags(tmp_path / "disk1").count(tag) == 1
        assert tags(Path(result["file"]["path"])) == [tag]
        assert_sound(Path(result["file"]["path"]))
    cli("save", "ordinary", monitor=guest.address)
    for tag in ("b", "a", "c", "ordinary", "a"):
        loaded = cli("load", tag, "--paused", "--json", monitor=guest.address).json
        if tag != "ordinary":
            low, high = counts[tag]
            assert low <= guest.counter <= high, f"{tag} was saved between {low} and {high}"
            assert loaded["file"]["path"].endswith(f"disk0.{tag}.qsnap")
        guest.qmp("cont")
        assert_in_order(guest)
    assert_settings_are_as_they_were(guest)

    # The negative control: RAM goes back and the disks do not, and the guest's own check sees it at once
    file = tmp_path / "disk0.b.qsnap"
    guest.qmp(
        "blockdev-add", **{"driver": "qcow2", "node-name": "s", "file": {"driver": "file", "filename": str(file)}}
    )
    guest.qmp("snapshot-load", **{"job-id": "j", "tag": "b", "vmstate": "s", "devices": ["s"]})
    until("the load to end", lambda: [job for job in guest.qmp("query-jobs") if job["status"] == "concluded"])
    until("the guest to see it", lambda: guest.lines()[-1][1] > 0 or None)


@contextmanager
def lent_hugepages(mebibytes: int) -> Iterator[None]:
    """Huge pages of 2 MiB for that much memory, in whatever the system has of them."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = int(setting.read_text())
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]

    def set_to(pages: int) -> int:
        subprocess.run([*sudo, "tee", setting], input=str(pages), text=True, stdout=subprocess.DEVNULL, check=False)
        return int(setting.read_text())

    if set_to(before + mebibytes // 2) < before + mebibytes // 2:
        set_to(before)
        pytest.skip("this system lends no huge pages")
    try:
        yield
    finally:
        set_to(before)


@pytest.mark.parametrize("options", ["share=on", "share=on,hugetlb=on"])
def test_memory_that_is_shared_or_in_huge_pages(launch: Launch, tmp_path: Path, options: str) -> None:
    """Linux 5.19 and later."""
    memory = f"memory-backend-memfd,id=memory,size=96M,{options}"
    with lent_hugepages(96) if "hugetlb" in options else nullcontext():
        guest = launch(
            *two_disks(tmp_path), "-object", memory, memory="96", machine="q35,accel=tcg,memory-backend=memory"
        )
        guest.wait_for_ticks(ROUND)
        for number in range(3):
            cli("save", "--live", f"t{number}", monitor=guest.address)
            guest.wait_for_ticks(10)
        for number in (1, 0, 2):
            cli("load", f"t{number}", monitor=guest.address)
            assert_in_order(guest)
        guest.quit()


def test_memory_in_a_file(launch: Launch, tmp_path: Path) -> None:
    """On a disk it will not do, with the reason and the cure; in /dev/shm it does."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    memory = f"memory-backend-file,id=memory,size=96M,share=on,mem-path={tmp_path}/memory"
    guest = launch(*two_disks(tmp_path), "-object", memory, memory="96", machine="q35,accel=tcg,memory-backend=memory")
    guest.wait_for_ticks(5)
    if kind.strip() == "tmpfs":
        cli("save", "--live", "t", monitor=guest.address)
        return
    run = cli("save", "--live", "t", monitor=guest.address, expect=5)
    assert "guest memory configuration" in run.err
    assert "memory that is not in a file on a disk" in run.err
    assert_nothing_live_left(guest, tmp_path)


def test_a_state_over_512_mib(launch: Launch, tmp_path: Path) -> None:
    """Its table has two levels and more than one table."""
    guest = launch(*two_disks(tmp_path), memory="600")
    guest.wait_for_ticks(10)
    before = guest.counter
    result = cli("save", "--live", "t", "--json", monitor=guest.address).json
    after = guest.counter
    assert result["vm_state_size"] > 512 << 20
    assert_sound(tmp_path / "disk0.t.qsnap")
    cli("load", "t", "--paused", monitor=guest.address)
    assert before <= guest.counter <= after
    guest.qmp("cont")
    assert_in_order(guest)


def test_many_rounds_in_one_process(heavy: Guest, disks: list[Path]) -> None:
    """Each replaces the one before, and is loaded."""
    for _ in range(10):
        before = heavy.counter
        cli("save", "--live", "t", monitor=heavy.address)
        after = heavy.counter
        heavy.wait_for_ticks(5)
        cli("load", "t", "--paused", monitor=heavy.address)
        assert before <= heavy.counter <= after
        heavy.qmp("cont")
        heavy.wait_for_ticks(5)
    assert_in_order(heavy)
    (snapshot,) = cli("list", "--json", monitor=heavy.address).json["snapshots"]
    assert (snapshot["tag"], snapshot["kind"]) == ("t", "live")
    heavy.quit()
    for image in (*disks, Path(snapshot["file"]["path"])):
        assert_sound(image)


def test_the_guest_runs_meanwhile(heavy: Guest) -> None:
    """By QEMU's own events it stands still for a part of the save only."""
    heavy.qmp.events.clear()
    result = cli("save", "--live", "t", "--json", monitor=heavy.address).json
    heavy.qmp("query-status")
    turns = [event["event"] for event in heavy.qmp.events if event["event"] in ("STOP", "RESUME")]
    assert turns == ["STOP", "RESUME"]
    assert result["pause_ms"] < result["duration_ms"]


# How the moment is taken


#: RAM that is in base pages, and cannot be put into huge ones; and the other way round.
LAYOUTS = {"base pages": Layout(96 << 20, 0), "huge pages": Layout(0, 96 << 20)}


def never_plain(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    """Have the guest stopped late, however little RAM it has."""
    for kind in freeze.FreezeBefore9, freeze.FreezeSince9:
        monkeypatch.setattr(kind, "PLAIN_NS", -1)
    monkeypatch.setattr(freeze.FreezeSince9, "PLAIN_READ_AGAIN_NS", -1)
    monkeypatch.setattr(hugepages, "layout", lambda *_: layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("read_ns", [None, 10**15, 1], ids=["unknown", "too slow", "too quick"])
async def test_late_stops(heavy: Guest, monkeypatch: pytest.MonkeyPatch, read_ns: int | None, layout: Layout) -> None:
    """Whatever was known of QEMU's time: where it was quicker than the stop, the attempt is repeated."""
    never_plain(monkeypatch, layout)
    if read_ns is not None:
        text = ReadTime(read_ns, layout.base).encode()
        heavy.qmp("object-add", **{"qom-type": "authz-simple", "id": READ_TIME, "identity": text})
    async with qsnap.connect(heavy.address) as vm:
        for tag in ("a", "b"):
            before = heavy.counter
            result = await vm.save(tag, live=True)
            assert result.runstate == "running"
            after = heavy.counter
            stamps = {event["event"]: event["timestamp"] for event in heavy.qmp.events}
            began, ended = (stamps[turn]["seconds"] + stamps[turn]["microseconds"] / 1e6 for turn in ("STOP", "RESUME"))
            assert result.pause_ms == pytest.approx((ended - began) * 1000, abs=0.01), "it is not told by QEMU's clock"
            await vm.load(tag, running=False)
            assert before <= heavy.counter <= after
            heavy.qmp("cont")
            assert_in_order(heavy)
    found = [item["name"] for item in heavy.qmp("qom-list", path="/objects")]
    if read_ns is not None or READ_TIME in found:  # where nothing was seen there is none
        kept = ReadTime.decode(heavy.qmp("qom-get", path=f"/objects/{READ_TIME}", property="identity"))
        assert kept is not None
        assert kept.is_of(layout)
    assert_settings_are_as_they_were(heavy)


@pytest.mark.parametrize(
    ("layout", "known", "rehearsed", "read_ns", "is_late"),
    [
        ("huge pages", 0, [15], 15, False),
        ("huge pages", 0, [25], 25, False),
        ("huge pages", 0, [300, 62, 17], 17, False),
        ("huge pages", 0, [200, 70, 65], 65, True),
        ("huge pages", 0, [900, 500, 300, 200], 200, True),
        ("base pages", 0, [300, 90, 85], 85, True),
        ("base pages", 90, [300], 90, True),
    ],
)
async def test_rehearsals(
    monkeypatch: pytest.MonkeyPatch, layout: str, known: int, rehearsed: list[int], read_ns: int, is_late: bool
) -> None:
    """RAM is read until that takes no less any more, and where it is little then the guest is stopped first (ms)."""
    left = [each * 1_000_000 for each in rehearsed]

    async def rehearse(_: object) -> int:
        return left.pop(0)

    monkeypatch.setattr(freeze.Freeze, "_rehearse", rehearse)
    taken = object.__new__(freeze.FreezeSince9)
    found = await taken._expected_read_ns(known * 1_000_000, LAYOUTS[layout])
    assert (found, left) == (read_ns * 1_000_000, [])
    assert taken._is_to_stop_late(found) == is_late


@pytest.mark.parametrize(
    ("known", "member", "pid", "layout", "is_rehearsed"),
    [
        (0, None, 1, "base pages", True),
        (5, None, 1, "base pages", False),
        (0, object(), 1, "base pages", False),
        (0, None, None, "base pages", False),
        (0, None, 1, "huge pages", False),
        (0, None, 1, "half and half", False),
    ],
)
async def test_a_rehearsal_that_takes_as_long_as_a_save(
    monkeypatch: pytest.MonkeyPatch, known: int, member: object, pid: int | None, layout: str, is_rehearsed: bool
) -> None:
    """Before QEMU 9.0 there is none but where it is of use, and then once."""

    async def rehearse(_: object) -> int:
        return 7

    monkeypatch.setattr(freeze.Freeze, "_rehearse", rehearse)
    taken: Any = object.__new__(freeze.FreezeBefore9)
    taken._journal, taken._monitor = SimpleNamespace(member=member), SimpleNamespace(pid=pid)
    layouts = {**LAYOUTS, "half and half": Layout(48 << 20, 48 << 20)}
    assert await taken._expected_read_ns(known, layouts[layout]) == (7 if is_rehearsed else known)


@pytest.mark.parametrize(("pid", "base", "is_collapsed"), [(1, 4, True), (1, 2, False), (None, 64, False)])
async def test_ram_is_put_into_huge_pages_first(
    monkeypatch: pytest.MonkeyPatch, pid: int | None, base: int, is_collapsed: bool
) -> None:
    """Where there is enough in base pages to gain by it."""
    before, after = Layout(base, 64 - base), Layout(0, 64)
    collapsed: list[int] = []

    async def collapse(process: int, _: int) -> None:
        collapsed.append(process)

    monkeypatch.setattr(hugepages, "layout", lambda *_: after if collapsed else before)
    monkeypatch.setattr(hugepages, "collapse", collapse)
    taken: Any = object.__new__(freeze.FreezeSince9)
    taken._monitor = SimpleNamespace(pid=pid)
    assert await taken._ram(64) == (after if is_collapsed else before)
    assert collapsed == ([pid] if is_collapsed else [])


async def test_a_stream_that_fails_in_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest does not stand still until the device state is overdue."""

    async def stream() -> Stream:
        return Stream("failed", 0, 0, 0, "QEMU says why")

    monkeypatch.setattr(freeze, "_STATE_TIMEOUT_S", 0.5)
    taken: Any = object.__new__(freeze.FreezeSince9)
    taken._background = SimpleNamespace(stream=stream)
    with pytest.raises(JobFailed, match="QEMU says why"):
        await taken._state_taken(None, SimpleNamespace(spent_ns=0))


async def test_a_resumption_that_is_told_late_is_seen() -> None:
    """QEMU's events come before the answer to a question, and it is asked one before they are looked at."""
    events = [("STOP", None)]

    async def runstate() -> str:
        events.append(("RESUME", None))
        return "running"

    taken: Any = object.__new__(freeze.FreezeSince9)
    taken._monitor = SimpleNamespace(runstate=runstate)
    taken._background = SimpleNamespace(stop_resume_events=lambda: events)
    assert not await taken._was_in_time(at_the_disks=True)


async def test_that_nothing_was_seen_is_not_remembered(guest: Guest) -> None:
    """What was known before stays, and where nothing was known no mark is left."""
    async with qsnap.connect(guest.address) as vm:
        taken = object.__new__(freeze.FreezeSince9)
        taken._monitor = vm._monitor
        await taken._remember(0, 0, Layout(7, 0))
        assert await vm._monitor.mark(READ_TIME) is None
        await taken._remember(5, 0, Layout(7, 0))
        await taken._remember(0, 5, Layout(7, 0))
        assert await vm._monitor.mark(READ_TIME) == ReadTime(5, 7).encode()
        assert await taken._known_read_ns(Layout(7, 0)) == 5
        # RAM in huge pages is rehearsed anew every time, where that is possible
        await taken._remember(9, 0, Layout(0, 7))
        assert await vm._monitor.mark(READ_TIME) == ReadTime(5, 7).encode()
        await taken._remember(9, 0, Layout(7, 0))
        assert await taken._known_read_ns(Layout(7, 6)) == 9
        assert await taken._known_read_ns(Layout(7, 8)) == 0


async def test_a_stop_that_comes_too_late_is_seen(
    heavy: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU has taken the device state, and the guest has run on, when our stop comes: that attempt must not count."""
    held: list[bool] = []
    real = stopped

    async def at_once(*_: object) -> int:
        return 1

    async def not_yet(*_: object) -> bool:
        return False

    def wait() -> None:
        until("QEMU to be too early", lambda: heavy.qmp("query-migrate").get("ram", {}).get("normal", 0) > 0 or None)
        heavy.wait_for_ticks(3)

    @asynccontextmanager
    async def too_late(*arguments: Any) -> AsyncIterator[Any]:
        if not held:
            held.append(True)
            await asyncio.to_thread(wait)
        async with real(*arguments) as pause:
            yield pause

    never_plain(monkeypatch, LAYOUTS["base pages"])
    monkeypatch.setattr(freeze.FreezeBefore9, "DISKS_NS", 0)
    monkeypatch.setattr(freeze, "stopped", too_late)
    monkeypatch.setattr(SnapshotThread, "until_it_has_spent", at_once)
    monkeypatch.setattr(freeze.Freeze, "_has_begun", not_yet)
    heavy.qmp("object-add", **{"qom-type": "authz-simple", "id": READ_TIME, "identity": f"100 {96 << 20}"})
    heavy.qmp.events.clear()
    async with qsnap.connect(heavy.address) as vm:
        result = await vm.save("t", live=True)
        assert held
        assert result.kind == "live"
        await vm.load("t")
    assert_in_order(heavy)
    assert [tags(tmp_path / name) for name in ("disk0", "disk1")] == [["t"]] * 2


async def test_a_disk_plugged_between_check_and_stop(heavy: Guest, tmp_path: Path, intercept: Intercept) -> None:
    """Its contents would be of another moment than the rest, or of none: nothing is saved."""
    spare = make_disk(tmp_path / "spare")

    def plug(message: dict[str, Any]) -> None:
        if message["execute"] == "stop":
            options = {"driver": "qcow2", "node-name": "spare", "file": {"driver": "file", "filename": str(spare)}}
            heavy.qmp("blockdev-add", **options)

    async with qsnap.connect(intercept(heavy, on_command=plug).address, state_dir=tmp_path) as vm:
        with pytest.raises(PrecheckRefused, match="changed between"):
            await vm.save("t", live=True)
    assert_nothing_live_left(heavy, tmp_path)
    assert tags(spare) == []
    assert_in_order(heavy)


# One kind of snapshot


def test_list_show_delete(heavy: Guest, disks: list[Path], tmp_path: Path) -> None:
    cli("save", "plain", monitor=heavy.address)
    saved = cli("save", "--live", "--no-replace", "a b/é", "--json", monitor=heavy.address).json
    file = Path(saved["file"]["path"])
    assert file.parent == tmp_path
    assert file.stat().st_mode & 0o777 == 0o600
    assert saved["file"]["size"] == file.stat().st_size
    plain, live = cli("list", "--json", monitor=heavy.address).json["snapshots"]
    assert (plain["kind"], plain["file"], live["kind"], live["tag"]) == ("full", None, "live", "a b/é")
    assert (live["file"]["path"], live["devices"], live["missing"], live["problems"]) == (
        str(file), ["disk0", "disk1"], [], [],
    )  # fmt: skip
    assert live["vm_state_size"] == saved["vm_state_size"]
    assert "live" in cli("list", monitor=heavy.address).out
    assert str(file) in cli("show", "a b/é", monitor=heavy.address).out
    assert cli("list", "-q", monitor=heavy.address).out.splitlines() == ["plain", "a b/é"]
    assert json.loads(cli("status", "--json", monitor=heavy.address).out)["snapshots"] == 2
    deleted = cli("delete", "a b/é", "--json", monitor=heavy.address).json
    assert deleted["files"] == {"a b/é": [str(file)]}
    assert not file.exists()
    assert [tags(image) for image in disks] == [["plain"]] * 2


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)
def test_by_a_human_monitor(heavy: Guest, disks: list[Path], tmp_path: Path) -> None:
    """It cannot make or load one, but shows and deletes them."""
    run = cli("save", "--live", "t", monitor=heavy.address, expect=5)
    assert "QMP" in run.err
    cli("save", "--live", "t", monitor=heavy.qmp_address)
    (snapshot,) = cli("list", "--json", monitor=heavy.address).json["snapshots"]
    assert (snapshot["kind"], snapshot["problems"]) == ("live", [])
    assert "state file" in cli("load", "t", monitor=heavy.address, expect=5).err
    cli("delete", "t", monitor=heavy.address)
    assert_nothing_live_left(heavy, tmp_path)


@pytest.mark.parametrize("how", ["killed", "interrupted", "the file is gone"])
def test_a_delete_that_is_disturbed(
    heavy: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path, how: str
) -> None:
    """It is completed, by itself or by the guard: the state file goes too."""
    where = ("--state-dir", str(tmp_path))
    cli("save", "--live", "t", *where, monitor=heavy.address)
    killer = Killer("snapshot-delete" if how == "killed" else "")

    def disturb(message: dict[str, Any]) -> None:
        if how == "interrupted" and deed(message) == "snapshot-delete":
            deliver(deleting, signal.SIGTERM)
        elif how == "the file is gone" and deed(message) == "snapshot-delete":
            (tmp_path / state_files(tmp_path)[0]).unlink()
        killer(message)

    address = intercept(heavy, on_command=disturb).address
    if how == "killed":
        killer.run("delete", "t", *where, monitor=address)
    else:
        deleting = start_cli("delete", "t", *where, monitor=address)
        assert finish(deleting).code == (143 if how == "interrupted" else 0)
    wait_for_the_guard(runtime_directory)
    assert_nothing_live_left(heavy, tmp_path)
    assert heavy.jobs() == []


def open_state_files(pid: int) -> list[str]:
    """Those that a process has open. One that is deleted takes up room as long as it does."""
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # QEMU opens and closes others
            names.append(str(link.readlink()))
    return [name for name in names if ".qsnap" in name]


def test_qemu_lets_go_of_a_file_that_is_deleted(
    heavy: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path
) -> None:
    """A load was killed with its guard, and its journal is another user's: QEMU has the state file open still."""
    where = ("--state-dir", str(tmp_path))
    cli("save", "--live", "t", *where, monitor=heavy.address)
    # From 10.2 on there is a `cont` before, which drops translated code
    killer = Killer("cont", 2 if qemu_version() >= (10, 2) else 1)

    def kill_both(message: dict[str, Any]) -> None:
        if deed(message) == "cont" and killer.left == 1:
            kill_guard(runtime_directory)
        killer(message)

    killer.run("load", "t", *where, monitor=intercept(heavy, on_command=kill_both).address)
    for journal in runtime_directory.iterdir():
        journal.unlink()

    assert open_state_files(heavy.pid)
    heavy.qmp("cont")
    cli("delete", "t", *where, monitor=heavy.address)
    assert_nothing_live_left(heavy, tmp_path)


def test_an_ordinary_save_over_it_that_fails(launch: Launch, tmp_path: Path) -> None:
    """Its disks were deleted by then: without them its file is of no use, and takes as much room as the RAM."""
    make_heavy_disk(tmp_path / "disk0")
    guest = launch(
        *failing_disk("disk0", tmp_path / "disk0", "vmstate_save", errno.ENOSPC), *disk_device("disk0"),
        memory="96",
    )  # fmt: skip
    guest.wait_for_ticks(5)
    where = ("--state-dir", str(tmp_path))
    cli("save", "--live", "t", *where, monitor=guest.address)
    assert len(state_files(tmp_path)) == 1
    run = cli("save", "t", "--no-prepare", *where, monitor=guest.address, expect=9)
    assert "the older snapshot 't' had already been deleted" in run.err
    assert (state_files(tmp_path), tags(tmp_path / "disk0")) == ([], [])
    guest.assert_running()


def test_replacing(heavy: Guest, disks: list[Path], tmp_path: Path) -> None:
    """Live over ordinary, live over live, ordinary over live: one is left each time, and it is the newer one."""
    cli("save", "t", monitor=heavy.address)
    for options, kind in (["--live"], "live"), (["--live"], "live"), ([], "full"), (["--live"], "live"):
        heavy.wait_for_ticks(20)
        before = heavy.counter
        assert cli("save", *options, "t", "--json", monitor=heavy.address).json["replaced"] is True
        assert open_state_files(heavy.pid) == []
        (snapshot,) = cli("list", "--json", monitor=heavy.address).json["snapshots"]
        assert (snapshot["tag"], snapshot["kind"]) == ("t", kind)
        assert len(state_files(tmp_path)) == (kind == "live")
        assert [len(tags(image)) for image in disks] == [1, 1]
        cli("load", "t", "--paused", monitor=heavy.address)
        assert heavy.counter >= before
        heavy.qmp("cont")
    refused = cli("save", "--live", "--no-replace", "t", monitor=heavy.address, expect=8)
    assert "disk0" in refused.err
    assert cli("save", "--no-replace", "t", monitor=heavy.address, expect=8).err
    cli("delete", "t", monitor=heavy.address)
    assert_nothing_live_left(heavy, tmp_path)


def test_what_a_replacement_that_was_cut_short_has_left(heavy: Guest, disks: list[Path], tmp_path: Path) -> None:
    """Whatever the disks call it, it is listed, and deleted, beside the snapshot that counts, which loads."""
    for _ in range(2):
        cli("save", "--live", "t", monitor=heavy.address)
        heavy.wait_for_ticks(5)
    assert [tags(disk) for disk in disks] == [["t.qsnap-2"], ["t.qsnap-2"]]
    heavy.qmp("blockdev-snapshot-internal-sync", device="disk1", name="t")

    def listed() -> list[tuple[str, str]]:
        rows = cli("list", "--json", monitor=heavy.address).json["snapshots"]
        return sorted((row["tag"], row["kind"]) for row in rows)

    assert listed() == [("t", "live"), ("t.qsnap-2", "partial")]
    cli("load", "t", monitor=heavy.address)
    assert_in_order(heavy)
    cli("delete", "t.qsnap-2", monitor=heavy.address)
    assert listed() == [("t", "live")]
    cli("load", "t", monitor=heavy.address)
    assert_in_order(heavy)
    # The next save takes it away too, and a file that none of the disks belongs to
    heavy.qmp("blockdev-snapshot-internal-sync", device="disk0", name="t")
    written(tmp_path / "disk0.t.qsnap", Content("t", str(disks[0]), 9, DATE, 5))
    cli("save", "--live", "t", monitor=heavy.address)
    assert listed() == [("t", "live")]
    assert [tags(disk) for disk in disks] == [["t"], ["t"]]
    assert state_files(tmp_path) == ["disk0.t.qsnap"]


def test_a_directory_of_its_own(heavy: Guest, disks: list[Path], tmp_path: Path) -> None:
    states = tmp_path / "states"
    states.mkdir()
    saved = cli("save", "--live", "t", "--json", "--state-dir", str(states), monitor=heavy.address).json
    assert Path(saved["file"]["path"]).parent == states
    (alone,) = cli("list", "--json", monitor=heavy.address).json["snapshots"]
    assert alone["kind"] == "disk-only"
    config = tmp_path / "config.toml"
    config.write_text('[defaults]\nlive = true\nstate-dir = "states"\n')
    (snapshot,) = cli("list", "--json", "--config", str(config), monitor=heavy.address).json["snapshots"]
    assert snapshot["kind"] == "live"
    cli("load", "t", "--state-dir", str(states), monitor=heavy.address)
    assert_in_order(heavy)
    assert cli("save", "t", "--json", "--config", str(config), monitor=heavy.address).json["kind"] == "live"
    assert len(list(states.iterdir())) == 1
    cli("delete", "t", "--state-dir", str(states), monitor=heavy.address)
    assert list(states.iterdir()) == []


def test_a_file_without_its_disks_and_disks_without_their_file(heavy: Guest, disks: list[Path], tmp_path: Path) -> None:
    cli("save", "--live", "a", monitor=heavy.address)
    cli("save", "--live", "b", monitor=heavy.address)
    (tmp_path / "disk0.b.qsnap").unlink()
    heavy.qmp.hmp("delvm a")
    kinds = {row["tag"]: row["kind"] for row in cli("list", "--json", monitor=heavy.address).json["snapshots"]}
    assert kinds == {"a": "state-only", "b": "disk-only"}
    assert "only deleted" in cli("load", "a", monitor=heavy.address, expect=6).err
    assert "no RAM" in cli("load", "b", monitor=heavy.address, expect=6).err
    heavy.assert_running()
    cli("delete", "a", "b", monitor=heavy.address)
    assert_nothing_live_left(heavy, tmp_path)


def test_a_file_that_is_not_ours_is_left_alone(heavy: Guest, tmp_path: Path) -> None:
    """Another VM's in the same directory, and what only has such a name."""
    other = tmp_path / "other.t.qsnap"
    other.write_bytes(b"something else")
    cli("save", "--live", "t", monitor=heavy.address)
    foreign = tmp_path / "copy.t.qsnap"
    foreign.write_bytes((tmp_path / "disk0.t.qsnap").read_bytes().replace(b"/disk0", b"/diskx"))
    (tmp_path / "diskx").write_bytes(b"")
    cli("delete", "t", monitor=heavy.address)
    assert state_files(tmp_path) == ["copy.t.qsnap", "other.t.qsnap"]


def test_who_cannot_see_the_images_is_told_so(heavy: Guest, tmp_path: Path, intercept: Intercept) -> None:
    """A state file may lie beside them; from another machine, say, it is not found, and so its disks do not go."""
    cli("save", "--live", "t", monitor=heavy.address)
    elsewhere = intercept(heavy, on_command=lambda _: None).address
    states = ("--state-dir", str(tmp_path / "none"))
    told = "there may be the RAM of live snapshots (t)"
    for more in (), states:
        run = cli("list", "--json", *more, monitor=elsewhere)
        assert [snapshot["kind"] for snapshot in run.json["snapshots"]] == ["disk-only"]
        assert told in run.err
        refused = cli("delete", "t", *more, monitor=elsewhere, expect=6)
        assert "cannot be seen from here whether its state file lies at" in refused.err
    refused = cli("load", "t", monitor=elsewhere, expect=6)
    assert "'t' may be a live one: it cannot be seen from here whether its state file lies at" in refused.err
    assert "no RAM in it" not in refused.err
    assert (state_files(tmp_path), tags(tmp_path / "disk0")) == (["disk0.t.qsnap"], ["t"])
    cli("delete", "t", "--ignore-unseen", monitor=elsewhere)
    assert state_files(tmp_path) == ["disk0.t.qsnap"], "that is what the word says"
    assert told not in cli("list", monitor=elsewhere).err
    assert told not in cli("delete", "t", monitor=heavy.address).err
    assert state_files(tmp_path) == []


@pytest.mark.parametrize("how", ["copied", "linked"])
def test_copies_beside_the_original_are_left_alone(heavy: Guest, tmp_path: Path, how: str) -> None:
    """A backup in the same directory, or the state file of a VM that runs on copies of the images."""
    cli("save", "--live", "a", monitor=heavy.address)
    copies = [tmp_path / "disk0.bak.a.qsnap", tmp_path / "backup.qsnap"]
    for copy in copies:
        shutil.copy(tmp_path / "disk0.a.qsnap", copy) if how == "copied" else copy.hardlink_to(
            tmp_path / "disk0.a.qsnap"
        )
    contents = copies[0].read_bytes()
    assert cli("list", "-q", monitor=heavy.address).out.splitlines() == ["a"]
    cli("save", "--live", "a", monitor=heavy.address)
    assert cli("list", "-q", monitor=heavy.address).out.splitlines() == ["a"]
    cli("delete", "a", monitor=heavy.address)
    assert state_files(tmp_path) == sorted(copy.name for copy in copies)
    assert all(copy.read_bytes() == contents for copy in copies)


def test_without_qsnap(heavy: Guest, disks: list[Path], launch: Launch, tmp_path: Path) -> None:
    """As the README says: the state file is a migration stream from 64 KiB on."""
    before = heavy.counter
    cli("save", "--live", "t", monitor=heavy.address)
    after = heavy.counter
    heavy.quit()
    for image in disks:
        qemu_img("snapshot", "-a", "t", image)
    stream = f"exec:tail -c +65537 {tmp_path}/disk0.t.qsnap"
    arguments = [*blockdev("disk0", disks[0]), *disk_device("disk0"),
                 *blockdev("disk1", disks[1]), *disk_device("disk1", 1)]  # fmt: skip
    again = launch(*arguments, "-incoming", stream, "-S", memory="96")
    until("the state to be there", lambda: again.runstate in ("paused", "prelaunch") or None)
    assert before <= again.counter <= after
    again.qmp("cont")
    assert_in_order(again)


# Where it is not possible, and where it is not needed


def test_a_paused_guest_is_saved_the_ordinary_way(heavy: Guest) -> None:
    heavy.qmp("stop")
    run = cli("save", "--live", "t", "--json", monitor=heavy.address)
    assert run.json["kind"] == "full"
    assert [warning["code"] for warning in run.json["warnings"]] == ["not-live"]
    assert heavy.runstate == "paused"
    assert "ordinary way" in cli("save", "--live", "u", monitor=heavy.address).err


def test_a_capability_that_does_not_go_with_it(heavy: Guest, tmp_path: Path) -> None:
    """QEMU's reason and the cure; --live=auto falls back and says so; the user's setting is left alone."""
    postcopy = {"capability": "postcopy-ram", "state": True}
    heavy.qmp("migrate-set-capabilities", capabilities=[postcopy])
    run = cli("save", "--live", "t", monitor=heavy.address, expect=5)
    assert "postcopy-ram" in run.err
    assert "migrate_set_capability" in run.err
    assert state_files(tmp_path) == []
    automatic = cli("save", "--live=auto", "t", monitor=heavy.address)
    assert "saved the ordinary way" in automatic.err
    assert "postcopy-ram" in automatic.err
    enabled = [row["capability"] for row in heavy.qmp("query-migrate-capabilities") if row["state"]]
    assert enabled == ["postcopy-ram"]


def test_over_tcp(launch: Launch, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    guest = launch(*two_disks(tmp_path), "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off", memory="96")
    assert "UNIX socket" in cli("save", "--live", "t", monitor=f"tcp:127.0.0.1:{port}", expect=5).err
    assert guest.runstate == "running"


def test_a_directory_that_will_not_do(heavy: Guest, tmp_path: Path) -> None:
    run = cli("save", "--live", "t", "--state-dir", str(tmp_path / "none"), monitor=heavy.address, expect=6)
    assert "is not there" in run.err
    (tmp_path / "file").touch()
    cli("save", "--live", "t", "--state-dir", str(tmp_path / "file"), monitor=heavy.address, expect=6)
    assert_nothing_live_left(heavy, tmp_path)


async def test_a_guard_that_does_not_get_ready(guest: Guest, tmp_path: Path) -> None:
    """Nothing is done then: not even to what an earlier save has left."""

    async def ready() -> None:
        raise QsnapError("it is not ready")

    async with qsnap.connect(guest.address) as vm:
        for _ in range(2):
            await vm.save("t", live=True)
        guest.qmp("blockdev-snapshot-internal-sync", device="disk0", name="t")
        run = Run(vm._monitor, StateStore(guest.pid))
        plan = await plan_live(run, SaveRequest("t"))
        assert plan.new.spare.tags == ("t",)
        run.journal.guard = SimpleNamespace(ready=ready, pid=0)
        with pytest.raises(QsnapError, match="it is not ready"):
            await do_live_save(run, plan)
    assert tags(tmp_path / "disk0.qcow2") == ["t.qsnap-2", "t"]
    assert state_files(tmp_path) == ["disk0.qcow2.t.qsnap-2.qsnap"]
    guest.assert_running()


async def test_what_is_refused_alone_is_not_left_to_the_others(guest: Guest) -> None:
    """In a group the others begin when all have been checked: by then this one knows whether it may."""
    met: list[Point] = []

    async def meet(point: Point, *_: object) -> tuple[()]:
        met.append(point)
        return ()

    async with qsnap.connect(guest.address) as vm:
        await vm.save("t", live=True)
        await vm.note("t", protected=True)
        run = Run(vm._monitor, StateStore(guest.pid))
        member: Any = SimpleNamespace(meet=meet)
        run.journal.member = member
        request = SaveRequest("t", dry_run=True)
        with pytest.raises(PrecheckRefused, match="protected"):
            await do_live_save(run, await plan_live(run, request))
        assert Point.CHECKED not in met
        await vm.note("t", protected=False)
        assert (await do_live_save(run, await plan_live(run, request))).dry_run
        assert met[-1] is Point.CHECKED


async def test_a_journal_that_cannot_be_written(
    heavy: Guest, disks: list[Path], monkeypatch: pytest.MonkeyPatch, runtime_directory: Path
) -> None:
    """What cannot be written down is not left: nobody would know whose file that is."""

    def advance(_: object, **__: object) -> None:
        raise QsnapError("no room")

    monkeypatch.setattr(Journal, "advance", advance)
    async with qsnap.connect(heavy.address) as vm:
        with pytest.raises(QsnapError, match="no room"):
            await vm.save("t", live=True)
        assert await vm.list() == ()
        assert open_state_files(os.getpid()) == []
    assert list(disks[0].parent.glob("*.qsnap*")) == []
    assert list(runtime_directory.iterdir()) == []  # noqa: ASYNC240 (at once)
    heavy.assert_running()


def test_settings_of_the_user_s(heavy: Guest) -> None:
    heavy.qmp("migrate-set-parameters", **{"max-bandwidth": 1234567890})
    heavy.qmp("migrate-set-capabilities", capabilities=[{"capability": "background-snapshot", "state": True}])
    cli("save", "--live", "t", monitor=heavy.address)
    assert heavy.qmp("query-migrate-parameters")["max-bandwidth"] == 1234567890
    assert "background-snapshot" in cli("load", "t", monitor=heavy.address, expect=6).err
    heavy.qmp("migrate-set-capabilities", capabilities=[{"capability": "background-snapshot", "state": False}])
    cli("load", "t", monitor=heavy.address)
    assert_in_order(heavy)


def test_dry_run(heavy: Guest, tmp_path: Path) -> None:
    assert "would save t" in cli("save", "--live", "-n", "t", monitor=heavy.address).out
    assert_nothing_live_left(heavy, tmp_path)


def test_a_refusal_comes_before_anything_is_tried(launch: Launch, tmp_path: Path, intercept: Intercept) -> None:
    raw = make_disk(tmp_path / "raw", driver="raw")
    guest = launch(*two_disks(tmp_path), *blockdev("raw", raw, "raw"), "-device", "virtio-blk,drive=raw", memory="96")
    proxy = intercept(guest)
    assert "raw" in cli("save", "--live", "t", monitor=proxy.address, expect=6).err
    assert "migrate-set-capabilities" not in proxy.commands
    cli("save", "--live", "t", "--exclude", "raw", "--state-dir", str(tmp_path), monitor=proxy.address)
    assert "migrate-set-capabilities" in proxy.commands


# What goes wrong in the middle


@pytest.fixture
def big(launch: Launch, tmp_path: Path) -> Guest:
    """The same guest with so much RAM that its stream can be caught in the middle."""
    guest = launch(*two_disks(tmp_path), memory="512")
    guest.wait_for_ticks(10)
    return guest


def is_written(directory: Path) -> bool:
    """Whether some of the stream is in the file."""
    for part in directory.glob("*.qsnap-part"):
        with suppress(FileNotFoundError), part.open("rb") as file:
            file.seek(8 << 20)
            return any(file.read(1 << 16))
    return False


def until_it_is_written(directory: Path) -> None:
    until("the stream to be written", lambda: is_written(directory))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    big: Guest, intercept: Intercept, tmp_path: Path, signum: signal.Signals, runtime_directory: Path
) -> None:
    """It asks how far the stream is, and QEMU is asked when the signal was taken."""
    cli("save", "t", monitor=big.address)
    states = tmp_path / "states"
    states.mkdir()
    seen = threading.Event()

    def interrupt(message: dict[str, Any]) -> None:
        # Not in a rehearsal, whose stream goes nowhere
        if message.get("execute") == "query-migrate" and is_written(states) and not seen.is_set():
            seen.set()
            deliver(process, signum)

    proxy = intercept(big, on_command=interrupt)
    process = start_cli("save", "--live", "t", "--state-dir", str(states), monitor=proxy.address)
    run = finish(process)
    assert seen.is_set()
    assert run.code == 128 + signum
    assert "nothing of it is left" in run.err
    assert "is as it was" in run.err
    assert run.err.count("the guest is running") == 1, run.err
    assert list(states.iterdir()) == []
    assert_nothing_live_left(big, tmp_path, ["t"])
    assert_all_is_well(big, runtime_directory, {tmp_path / "disk0": ["t"]})


def test_killed_in_the_write(big: Guest, tmp_path: Path, runtime_directory: Path) -> None:
    process = start_cli("save", "--live", "t", monitor=big.address)
    until_it_is_written(tmp_path)
    process.kill()
    process.communicate()
    wait_for_the_guard(runtime_directory)
    assert_nothing_live_left(big, tmp_path)
    assert big.jobs() == []


def test_killed_with_its_guard(big: Guest, tmp_path: Path, runtime_directory: Path) -> None:
    process = start_cli("save", "--live", "t", monitor=big.address)
    until_it_is_written(tmp_path)
    process.send_signal(signal.SIGSTOP)
    kill_guard(runtime_directory)
    process.kill()
    process.communicate()
    assert cli("recover", "--json", monitor=big.address).json
    assert_nothing_live_left(big, tmp_path)
    assert marks(big) == []


STEPS = ["migrate-set-capabilities", "stop", "transaction", "migrate", "object-del"]


@pytest.mark.parametrize("command", [*STEPS, *(["cont", "add-fd"] if IS_NEW else ["getfd"])])
def test_killed_at_each_step_of_a_replacement(
    heavy: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path, command: str
) -> None:
    """A whole snapshot of that name is there afterwards, the older or the newer one."""
    states = tmp_path / "states"
    states.mkdir()
    where = ("--state-dir", str(states))
    cli("save", "--live", "t", *where, monitor=heavy.address)
    heavy.wait_for_ticks(10)
    killer = Killer(command)
    killer.run("save", "--live", "t", *where, monitor=intercept(heavy, on_command=killer).address)
    wait_for_the_guard(runtime_directory)
    heavy.assert_running()
    (snapshot,) = cli("list", "--json", *where, monitor=heavy.address).json["snapshots"]
    assert (snapshot["tag"], snapshot["kind"]) == ("t", "live")
    assert len(list(states.iterdir())) == 1
    assert_settings_are_as_they_were(heavy)
    cli("load", "t", *where, monitor=heavy.address)
    assert_in_order(heavy)


def test_killed_in_a_load(heavy: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path) -> None:
    states = ("--state-dir", str(tmp_path))
    cli("save", "--live", "t", *states, monitor=heavy.address)
    for command in ("blockdev-add", "snapshot-load", "cont", "blockdev-del"):
        killer = Killer(command)
        killer.run("load", "t", *states, monitor=intercept(heavy, on_command=killer).address)
        wait_for_the_guard(runtime_directory)
        assert_in_order(heavy)
        assert_settings_are_as_they_were(heavy)
    heavy.quit()
    assert_sound(tmp_path / next(iter(state_files(tmp_path))))


def test_the_connection_is_cut(big: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path) -> None:
    proxy = intercept(big)
    process = start_cli("save", "--live", "t", "--state-dir", str(tmp_path), monitor=proxy.address)
    until("the stream", lambda: any(name.endswith("part") for name in state_files(tmp_path)) or None)
    until("the guest to run again", lambda: ("transaction" in proxy.commands and big.runstate == "running") or None)
    proxy.cut()
    run = finish(process)
    assert run.code in (0, 4), run.err
    wait_for_the_guard(runtime_directory)
    if run.code:
        assert "nothing of it is left; the guest is running" in run.err
        assert_nothing_live_left(big, tmp_path)


def test_qemu_is_killed(big: Guest, disks: list[Path], launch: Launch, tmp_path: Path, runtime_directory: Path) -> None:
    """The disks have their snapshots by then. They are shown as what they are, and can be deleted."""
    process = start_cli("save", "--live", "t", monitor=big.address)
    until_it_is_written(tmp_path)
    big.process.kill()
    run = finish(process)
    assert run.code == 4
    assert "qsnap delete t" in run.err
    assert state_files(tmp_path) == []
    again = launch(*blockdev("disk0", disks[0]), *disk_device("disk0"),
                   *blockdev("disk1", disks[1]), *disk_device("disk1", 1), memory="512")  # fmt: skip
    (snapshot,) = cli("list", "--json", monitor=again.address).json["snapshots"]
    assert snapshot["kind"] == "disk-only"
    cli("delete", "t", monitor=again.address)
    assert [tags(image) for image in disks] == [[], []]


def test_everything_is_killed_and_qemu_too(
    big: Guest, disks: list[Path], launch: Launch, tmp_path: Path, runtime_directory: Path
) -> None:
    """What nobody could clear up is cleared up by the next live save of that name."""
    process = start_cli("save", "--live", "t", monitor=big.address)
    until_it_is_written(tmp_path)
    process.send_signal(signal.SIGSTOP)
    kill_guard(runtime_directory)
    big.process.kill()
    big.process.wait(30)
    process.kill()
    process.communicate()
    assert state_files(tmp_path) == ["disk0.t.qsnap-part"]
    again = launch(*blockdev("disk0", disks[0]), *disk_device("disk0"),
                   *blockdev("disk1", disks[1]), *disk_device("disk1", 1), memory="512")  # fmt: skip
    again.wait_for_ticks(5)
    cli("save", "--live", "t", monitor=again.address)
    (snapshot,) = cli("list", "--json", monitor=again.address).json["snapshots"]
    assert (snapshot["tag"], snapshot["kind"]) == ("t", "live")
    assert len(state_files(tmp_path)) == 1
    assert [len(tags(image)) for image in disks] == [1, 1]


def descriptor_0(guest: Guest) -> str:
    """What QEMU's file descriptor 0 is."""
    return str(Path(f"/proc/{guest.pid}/fd/0").readlink())


def test_no_room(big: Guest, tmp_path: Path) -> None:
    """A small file system: refused beforehand; and with --force QEMU's error, the guest running, nothing left."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", "size=48m,mode=777", "tmpfs", small], check=True)
    try:
        cli("save", "t", monitor=big.address)
        where = ("--state-dir", str(small))
        assert "little room" in cli("save", "--live", "t", *where, monitor=big.address, expect=6).err
        # Before 9.0 the guest would hang if QEMU found no room: it is taken beforehand, or not
        run = cli("save", "--live", "--force", "t", *where, monitor=big.address, expect=9 if IS_NEW else 6)
        assert "No space left on device" in run.err or "Unable to write" in run.err
        assert not IS_NEW or "the older snapshot 't' is as it was" in run.err
        assert list(small.iterdir()) == []
        assert_nothing_live_left(big, tmp_path, ["t"])
        assert "error-desc" not in big.qmp("query-migrate"), "QEMU would load nothing"
        cli("load", "t", monitor=big.address)
        assert_in_order(big)
        # No room for anything: QEMU would fail in setting it up, and close its file descriptor 0
        with (small / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, os.statvfs(small).f_bfree * os.statvfs(small).f_frsize - (64 << 10))
        run = cli("save", "--live", "--force", "t", *where, monitor=big.address, expect=6)
        assert "No space left on device" in run.err
        assert descriptor_0(big) == os.devnull
        run = cli("save", "--live=auto", "--force", "t", *where, monitor=big.address)
        assert "saved the ordinary way" in run.err
    finally:
        subprocess.run([*sudo, "umount", small], check=True)


@newer((9, 0), "before 9.0 QEMU itself leaves the guest hanging then")
def test_somebody_cancels_it(big: Guest, tmp_path: Path) -> None:
    process = start_cli("save", "--live", "t", monitor=big.address)
    until_it_is_written(tmp_path)
    big.qmp("migrate_cancel")
    run = finish(process)
    assert run.code == 9
    assert_nothing_live_left(big, tmp_path)


async def test_disks_that_cannot_be_snapshotted_then(heavy: Guest, tmp_path: Path, intercept: Intercept) -> None:
    """QEMU refuses the transaction: the guest runs, and the state that was begun is given up."""
    taken: list[dict[str, Any]] = []

    def take(message: dict[str, Any]) -> None:
        if message.get("execute") == "transaction" and not taken:
            taken.append(message)
            name = message["arguments"]["actions"][0]["data"]["name"]
            heavy.qmp("blockdev-snapshot-internal-sync", device="disk1", name=name)

    async with qsnap.connect(intercept(heavy, on_command=take).address, state_dir=tmp_path) as vm:
        with pytest.raises(JobFailed, match="already exists") as failed:
            await vm.save("t", live=True)
        assert "older" not in failed.value.outcome
        heavy.assert_running()
        assert state_files(tmp_path) == []

        # An older snapshot of which only the file is there stays as well
        await vm.save("t", live=True)
        (file,) = state_files(tmp_path)
        heavy.qmp.hmp("delvm t")
        taken.clear()
        with pytest.raises(JobFailed, match="already exists") as failed:
            await vm.save("t", live=True)
        assert "the older snapshot 't' is as it was" in failed.value.outcome
    heavy.assert_running()
    assert state_files(tmp_path) == [file]
    assert_settings_are_as_they_were(heavy)


async def test_what_the_others_leave_of_a_save_that_died(heavy: Guest, tmp_path: Path) -> None:
    """Its snapshot is complete if every disk has it, once, and the state file is there."""
    async with qsnap.connect(heavy.address, state_dir=tmp_path) as vm:
        await vm.save("t", live=True)
        (name,) = state_files(tmp_path)
        assert open_state_files(os.getpid()) == []
        stream = await vm._monitor.live.stream()
        assert stream.done == stream.total > stream.pages > 0
        work = LiveWork(
            disk_tag="t", vmstate="disk0", devices=("disk0", "disk1"), older=(), older_files=(),
            path=str(tmp_path / name), part=str(tmp_path / "part"),
        )  # fmt: skip
        attempt = LiveSaveAttempt(vm._monitor, Journal(Record(tags=("t",), work=work)), ())
        assert attempt._is_complete(await vm._monitor.block_graph())
        heavy.qmp("blockdev-snapshot-delete-internal-sync", device="disk1", name="t")
        assert not attempt._is_complete(await vm._monitor.block_graph())
        (tmp_path / name).unlink()
        with pytest.raises(VerifyFailed, match="is not a state file"):
            await attempt.conclude()


# State files that were touched by others, and neighbours


def cut(path: Path, clusters: int) -> None:
    os.truncate(path, max(0, path.stat().st_size - clusters * 65536) if clusters else 0)


@pytest.mark.parametrize("clusters", [1, 2, 3, 20])
def test_a_state_file_that_is_cut_short(heavy: Guest, tmp_path: Path, clusters: int) -> None:
    """It is refused before the guest is touched, shown as what it is, and goes when it is deleted."""
    cli("save", "--live", "good", monitor=heavy.address)
    cli("save", "--live", "bad", monitor=heavy.address)
    path = tmp_path / "disk0.bad.qsnap"
    cut(path, clusters)
    assert "cut short" in cli("list", "--json", monitor=heavy.address).out
    before = heavy.wait_for_ticks(3)
    cli("load", "bad", monitor=heavy.address, expect=6)
    assert heavy.wait_for_ticks(3) > before
    cli("load", "good", monitor=heavy.address)
    assert_in_order(heavy)
    cli("delete", "bad", monitor=heavy.address)
    assert state_files(tmp_path) == ["disk0.good.qsnap"]
    assert tags(tmp_path / "disk0") == ["good"]


#: Bytes of the header, and what is put there: by docs/interop/qcow2.txt.
@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize("damage", ["link", "empty", "garbage", "half"])
def test_a_state_file_that_is_no_longer_one(heavy: Guest, tmp_path: Path, damage: str, is_second: bool) -> None:
    """It is told what is wrong with it, and not that the snapshot never had any RAM."""
    for _ in range(1 + is_second):
        cli("save", "t", "--live", monitor=heavy.address)
    (name,) = state_files(tmp_path)
    file = tmp_path / name
    if damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "half":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_bytes(b"" if damage == "empty" else b"no image" * 9000)
    what = {"link": "a symbolic link", "empty": "it is empty", "garbage": "lost its end", "half": "cut short"}[damage]
    (row,) = cli("list", "--json", monitor=heavy.address).json["snapshots"]
    assert (row["tag"], row["kind"]) == ("t", "live")
    assert what in row["file"]["trouble"]
    error = cli("load", "t", "--json", monitor=heavy.address, expect=6).error
    assert [(str(file) in one["message"], what.removeprefix("it ") in one["message"]) for one in error["findings"]] == [
        (True, True)
    ]
    heavy.assert_running()
    if damage == "link":
        for words in (["delete", "t"], ["save", "t"], ["save", "t", "--live"]):
            assert what in cli(*words, monitor=heavy.address, expect=6).err
        file.unlink()
        (tmp_path / "elsewhere").rename(file)
        cli("load", "t", monitor=heavy.address)
        assert_in_order(heavy)
    cli("delete", "t", monitor=heavy.address)
    assert cli("list", "--json", monitor=heavy.address).json["snapshots"] == []
    assert state_files(tmp_path) == []


_HEADER_DAMAGE = {
    "a backing file": (8, struct.pack(">QI", 400, 7)),
    "another version": (4, struct.pack(">I", 2)),
    "the cluster size": (20, struct.pack(">I", 15)),
    "the disk's size": (24, struct.pack(">Q", 1 << 40)),
    "encryption": (32, struct.pack(">I", 2)),
    "a long L1 table": (36, struct.pack(">I", 1 << 20)),
    "the active L1 table": (40, struct.pack(">Q", 1 << 40)),
    "the refcount table": (48, struct.pack(">Q", 65536)),
    "a long refcount table": (56, struct.pack(">I", 1 << 10)),
    "no snapshot": (60, struct.pack(">I", 0)),
    "two snapshots": (60, struct.pack(">I", 2)),
    "the snapshot table": (64, struct.pack(">Q", 3 * 65536)),
    "an external data file": (72, struct.pack(">Q", 4)),
    "extended L2 entries": (72, struct.pack(">Q", 16)),
    "an unknown feature": (72, struct.pack(">Q", 1 << 40)),
    "lazy refcounts": (80, struct.pack(">Q", 1)),
    "an unknown autoclear feature": (88, struct.pack(">Q", 1 << 40)),
    "narrow refcounts": (96, struct.pack(">I", 0)),
    "a short header": (100, struct.pack(">I", 72)),
}


async def test_a_state_file_that_is_damaged(guest: Guest, tmp_path: Path) -> None:
    """Whatever is changed around its stream, it is refused before the guest is touched; and so after a load."""
    cli("save", "--live", "t", monitor=guest.address)
    path = tmp_path / "disk0.qcow2.t.qsnap"
    rng = random.Random(27)  # noqa: S311 (the same in every run)

    def metadata() -> tuple[bytes, int, bytes]:
        """The header, and what is behind the stream, with its offset."""
        whole = path.read_bytes()
        content = state_file.content_of(lambda size, offset: whole[offset : offset + size])
        assert content is not None
        begin = 65536 * (1 + -(-content.vm_state_size // 65536))
        return whole[:65536], begin, whole[begin:]

    def change(offset: int, data: bytes) -> None:
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), data, offset)

    async with qsnap.connect(guest.address) as vm:
        for damages, behind in (dict(_HEADER_DAMAGE), 16), ({}, 8):
            head, begin, tail = metadata()
            used = [begin + offset for offset, byte in enumerate(tail) if byte]
            damages |= {f"{at:#x}": (at, bytes([tail[at - begin] ^ 0x55])) for at in rng.sample(used, behind)}
            guest.assert_running()
            guest.qmp.events.clear()
            for name, (offset, data) in damages.items():
                change(offset, data)
                change(400, b"secret\0" if name == "a backing file" else bytes(7))
                damaged = path.read_bytes()
                with pytest.raises(PrecheckRefused):
                    await vm.load("t")
                assert path.read_bytes() == damaged, f"{name}: QEMU has written to it"
                change(0, head)
                change(begin, tail)
            guest.assert_running()
            assert not {"STOP", "RESUME"} & {event["event"] for event in guest.qmp.events}, "the guest was touched"
            count = guest.counter
            await vm.load("t", running=False)
            assert guest.counter < count
            guest.qmp("cont")
            guest.assert_running()
    change(begin + 65536 + 15, b"\1")
    run = cli("load", "t", monitor=guest.address, expect=6)
    assert f"the state file {path} is damaged: its L1 table differs" in run.err
    assert "the guest was not touched" in run.err


@newer((9, 0), "the capability came with QEMU 9.0")
def test_mapped_ram(heavy: Guest, tmp_path: Path) -> None:
    """QEMU would save it, and never load it."""
    heavy.qmp("migrate-set-capabilities", capabilities=[{"capability": "mapped-ram", "state": True}])
    for how in (["--live"], ["--live=auto"], []):
        error = cli("save", "t", *how, "--json", monitor=heavy.address, expect=6).error
        assert "migration-capability" in {finding["code"] for finding in error["findings"]}
    heavy.qmp("migrate-set-capabilities", capabilities=[{"capability": "mapped-ram", "state": False}])
    assert_nothing_live_left(heavy, tmp_path)


def test_tls_for_migrations(heavy: Guest, tmp_path: Path) -> None:
    """It is meant for streams over a network, and would fail a live one into a file: told beforehand."""
    heavy.qmp("object-add", qom_type="tls-creds-anon", id="tls0", endpoint="client")
    heavy.qmp("migrate-set-parameters", tls_creds="tls0")
    run = cli("save", "--live", "t", monitor=heavy.address, expect=5)
    assert '. Unset that parameter: migrate_set_parameter tls-creds ""' in run.err
    assert "saved the ordinary way" in cli("save", "--live=auto", "t", monitor=heavy.address).err
    assert tags(tmp_path / "disk0") == ["t"]
    heavy.assert_running()


def test_what_is_in_the_file_s_place_stays(heavy: Guest, tmp_path: Path) -> None:
    """A file of the user's, or of another VM's, is not written over."""
    place = tmp_path / "disk0.report.qsnap"
    for make in (lambda: place.write_text("my report"), place.mkdir, lambda: place.symlink_to("/etc/passwd")):
        make()
        error = cli("save", "--live", "report", "--json", monitor=heavy.address, expect=6).error
        assert [finding["code"] for finding in error["findings"] if finding["severity"] == "refuse"] == [
            "state-file-taken"
        ]
        assert os.path.lexists(place)
        place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()
    assert_nothing_live_left(heavy, tmp_path)


def test_a_neighbour_whose_image_begins_alike(launch: Launch, tmp_path: Path) -> None:
    """Whatever is done with the VM of image "vm", the live save of the VM of image "vm.data" goes on."""
    guests = []
    for name in ("vm", "vm.data"):
        disk = make_heavy_disk(tmp_path / name)
        guests.append(launch(*blockdev("disk0", disk), *disk_device("disk0"), memory="256"))
    ours, theirs = guests
    theirs.wait_for_ticks(5)
    part = tmp_path / "vm.data.1x.qsnap-part"
    process = start_cli("save", "--live", "1x", monitor=theirs.address)
    until("it is at work on it", lambda: part.exists() and f":{part.stat().st_ino} " in Path("/proc/locks").read_text())
    process.send_signal(signal.SIGSTOP)
    assert part.exists(), "the save has ended already"
    try:
        cli("save", "a", monitor=ours.address)
        cli("recover", monitor=ours.address)
        # The same name in the end, as VM "vm" with tag "data.1x"
        cli("save", "--live", "data.1x", monitor=ours.address, expect=6)
    finally:
        process.send_signal(signal.SIGCONT)
    assert finish(process).code == 0
    cli("save", "--live", "data.1x", monitor=ours.address, expect=6)
    cli("load", "1x", monitor=theirs.address)
    for guest in guests:
        assert_in_order(guest)


@pytest.mark.parametrize("how", ["copied", "moved", "renamed"])
def test_images_and_their_state_files_elsewhere(launch: Launch, tmp_path: Path, how: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    guest = launch(*two_disks(old), memory="96")
    guest.wait_for_ticks(ROUND)
    cli("save", "--live", "a", monitor=guest.address)
    guest.quit()
    if how == "moved":
        old.rename(new)
    else:
        shutil.copytree(old, new)
    name = "other.img" if how == "renamed" else "disk0"
    (new / "disk0").rename(new / name)
    (new / "disk0.a.qsnap").rename(new / f"{name}.a.qsnap")
    again = launch(*blockdev("disk0", new / name), *disk_device("disk0"),
                   *blockdev("disk1", new / "disk1"), *disk_device("disk1", 1), memory="96")  # fmt: skip
    again.wait_for_ticks(2)
    (found,) = cli("list", "--json", monitor=again.address).json["snapshots"]
    assert (found["tag"], found["kind"]) == ("a", "live")
    cli("load", "a", monitor=again.address)
    assert_in_order(again)
    cli("delete", "a", monitor=again.address)
    assert state_files(new) == []
    if how == "copied":
        assert state_files(old) == ["disk0.a.qsnap"], "the other VM's stays"


async def test_a_state_file_with_both_names(heavy: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file cannot be renamed, it has both for a moment: the new one counts, and the old one goes."""
    complete = parts.complete

    def linked(file: int, part: Path, path: Path, *more: Any) -> None:
        complete(file, part, path, *more)
        os.link(path, part)
        raise OSError(errno.EIO, "the disk is gone for a moment")

    monkeypatch.setattr(parts, "complete", linked)
    async with qsnap.connect(heavy.address) as vm:
        with pytest.raises(JobFailed) as failed:
            await vm.save("t", live=True)
        assert "was complete and is kept" in failed.value.outcome
        assert state_files(tmp_path) == ["disk0.t.qsnap"]
        await vm.load("t")
    heavy.assert_running()


async def test_a_state_file_that_comes_to_its_place_meanwhile(
    heavy: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is put back from a backup: by its tag it is the new one, by its clock it is not."""
    place, backup, complete = tmp_path / "disk0.t.qsnap", tmp_path / "backup", parts.complete

    def put_back(*args: Any) -> None:
        os.link(backup, place)
        complete(*args)

    async with qsnap.connect(heavy.address) as vm:
        await vm.save("t", live=True)
        os.link(place, backup)
        await vm.delete("t")
        monkeypatch.setattr(parts, "complete", put_back)
        with pytest.raises(JobFailed, match="another file has come to be") as failed:
            await vm.save("t", live=True)
    assert "nothing of it is left" in failed.value.outcome
    assert place.samefile(backup)
    place.unlink()
    assert_nothing_live_left(heavy, tmp_path)


# After a migration that failed, from 9.0 on QEMU fails in the middle of any load, until the next one begins; 7.2 does
# not. So it does after one that was cancelled while it was set up.


def let_a_migration_fail(guest: Guest) -> None:
    """By a destination that hangs up."""
    path = guest.directory / f"m{len(list(guest.directory.iterdir()))}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        guest.qmp("migrate", uri=f"unix:{path}")
        connection, _ = listener.accept()
        connection.close()
    until("its failure", lambda: guest.qmp("query-migrate")["status"] == "failed" or None)


def cancel_a_migration_too_early(guest: Guest) -> None:
    """At once, until QEMU was hit in its set-up."""

    def cancelled() -> bool:
        guest.qmp("migrate", uri=f"file:{guest.directory}/migrated")
        guest.qmp("migrate_cancel")
        until("its end", lambda: guest.qmp("query-migrate")["status"] in ("cancelled", "completed") or None)
        return "error-desc" in guest.qmp("query-migrate")

    until("an error of it", cancelled)


SPOILERS = [let_a_migration_fail, *([cancel_a_migration_too_early] if IS_NEW else [])]


def turns(guest: Guest) -> list[str]:
    """The guest's stops and resumptions so far."""
    guest.qmp("query-status")
    return [event["event"] for event in guest.qmp.events if event["event"] in ("STOP", "RESUME")]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_load_after_a_migration_that_failed(heavy: Guest, spoil: Callable[[Guest], None]) -> None:
    """QEMU is made to forget it first, which the guest does not notice."""
    cli("save", "good", monitor=heavy.address)
    spoil(heavy)
    heavy.qmp.events.clear()
    cli("load", "good", monitor=heavy.address)
    # Its own; and from 10.2 on those that drop translated code
    assert turns(heavy) == ["STOP", "RESUME"] * (2 if qemu_version() >= (10, 1) else 1)
    assert_in_order(heavy)
    assert_settings_are_as_they_were(heavy)


@newer((9, 0), "QEMU itself loads then")
def test_a_load_after_one_that_failed_because_of_that(heavy: Guest) -> None:
    """It has left "restore-vm", where QEMU aborts if a migration begins: it cannot be made to forget there."""
    cli("save", "good", monitor=heavy.address)
    let_a_migration_fail(heavy)
    assert "Error" in heavy.qmp.hmp("loadvm good")
    assert heavy.runstate == "restore-vm"
    error = cli("load", "good", "--running", "--json", monitor=heavy.address, expect=6).error
    assert "migration-failed" in [finding["code"] for finding in error["findings"]]
    heavy.qmp("cont")
    heavy.qmp("stop")
    cli("load", "good", "--running", monitor=heavy.address)
    assert_in_order(heavy)


@newer((9, 0), "QEMU itself loads then")
@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_load_after_a_migration_that_failed_where_it_cannot_be_forgotten(
    heavy: Guest, spoil: Callable[[Guest], None]
) -> None:
    """Refused before the guest is touched; a save is the cure."""
    cli("save", "good", monitor=heavy.address)
    spoil(heavy)
    heavy.qmp.events.clear()

    def refused(monitor: str) -> None:
        error = cli("load", "good", "--json", monitor=monitor, expect=6).error
        assert [finding["code"] for finding in error["findings"]] == ["migration-failed"]
        assert "qsnap save TAG" in error["findings"][0]["cure"]

    def set_shared_memory_aside(state: bool) -> None:
        heavy.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": state}])

    refused(heavy.hmp_address)
    set_shared_memory_aside(True)
    refused(heavy.qmp_address)
    set_shared_memory_aside(False)
    assert turns(heavy) == []
    assert_settings_are_as_they_were(heavy)
    cli("save", "other", monitor=heavy.hmp_address)
    cli("load", "good", monitor=heavy.hmp_address)
    assert_in_order(heavy)


@newer((9, 0), "QEMU itself loads then")
def test_killed_when_it_is_forgotten(heavy: Guest, intercept: Intercept, runtime_directory: Path) -> None:
    """The stream that is begun for that is cancelled by the guard, and the settings are put back."""
    cli("save", "good", monitor=heavy.address)
    for command in ("migrate-set-capabilities", "migrate-set-parameters", "add-fd", "migrate", "migrate_cancel"):
        let_a_migration_fail(heavy)
        heavy.qmp.events.clear()
        killer = Killer(command)
        killer.run("load", "good", monitor=intercept(heavy, on_command=killer).address)
        wait_for_the_guard(runtime_directory)
        assert heavy.qmp("query-migrate")["status"] in ("failed", "cancelled")
        assert turns(heavy) == []
        assert_settings_are_as_they_were(heavy)
    let_a_migration_fail(heavy)
    cli("load", "good", "--full", monitor=heavy.address)
    assert_in_order(heavy)
    assert heavy.qmp("query-fdsets") == []


@contextmanager
def without_huge_pages() -> Iterator[None]:
    """What is started here gets its memory in pages of 4 KiB alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_thp_disable = 41  # linux/prctl.h
    assert libc.prctl(pr_set_thp_disable, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        assert libc.prctl(pr_set_thp_disable, 0, 0, 0, 0) == 0


@newer((9, 0), "before 9.0 nothing is cancelled")
def test_a_live_save_that_was_interrupted_early_spoils_no_load(
    launch: Launch, intercept: Intercept, tmp_path: Path
) -> None:
    """While QEMU sets it up, which takes some 20 ms, as this guest has much memory in small pages.

    Cancelled then, QEMU closes its file descriptor 0 besides.
    """
    with without_huge_pages():
        guest = launch(*two_disks(tmp_path), memory="3072")
    guest.wait_for_ticks(10)
    for _ in range(6):
        processes: list[subprocess.Popen[str]] = []
        moments = [1]

        def interrupt(
            message: dict[str, Any], started: list[subprocess.Popen[str]] = processes, moments: list[int] = moments
        ) -> None:
            if deed(message) == "migrate" and moments:
                moments.clear()
                until("the process", lambda: started or None)[0].send_signal(signal.SIGINT)

        proxy = intercept(guest, on_command=interrupt)
        processes.append(start_cli("save", "--live", "t", "--state-dir", str(tmp_path), monitor=proxy.address))
        run = finish(processes[0])
        assert run.code == 130
        assert "nothing of it is left" in run.err
        assert "error-desc" not in guest.qmp("query-migrate"), "QEMU would load nothing"
        assert descriptor_0(guest) == os.devnull
    assert_nothing_live_left(guest, tmp_path)


def test_a_tag_that_the_locale_does_not_know(heavy: Guest) -> None:
    """A file name has the bytes that the tag has in QEMU, whatever the locale."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    cli("save", "--live", "snow-☃", monitor=heavy.address)
    for arguments in (["list"], ["show", "snow-☃"], ["status"], ["save", "plain"], ["load", "snow-☃"]):
        cli(*arguments, monitor=heavy.address, env=ascii_only)
    (snow,) = [one for one in cli("list", "--json", monitor=heavy.address, env=ascii_only).json["snapshots"]
               if one["kind"] == "live"]  # fmt: skip
    assert snow["tag"] == "snow-☃"
    cli("delete", "snow-☃", monitor=heavy.address, env=ascii_only)
    assert [one["tag"] for one in cli("list", "--json", monitor=heavy.address).json["snapshots"]] == ["plain"]
