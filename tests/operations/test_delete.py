"""What a delete does and says, tag by tag, where QEMU or the file system do not do all of it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qsnap.errors import JobFailed, NotSupported, PartialFailure, PrecheckRefused, SnapshotNotFound, VerifyFailed
from qsnap.inventory.devices import survey
from qsnap.inventory.snapshots import Holding
from qsnap.inventory.state_file import Content
from qsnap.inventory.state_store import read
from qsnap.model.qemu import RunState
from qsnap.model.requests import DeleteRequest
from qsnap.operations.delete import _deleted, delete_all, delete_replaced, do_delvm
from qsnap.runs.group import Point
from qsnap.runs.record import DeleteWork
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.state_files import DATE, written

pytestmark = pytest.mark.no_qemu

DISKS = ("disk0", "disk1")


class Noting(FakeMonitor):
    """It notes also the looks at its block nodes, and that state files are given back."""

    async def tidy(self) -> None:
        self.calls.append("tidy")


class Guard:
    pid = 17

    def __init__(self, monitor: FakeMonitor) -> None:
        self._monitor = monitor

    async def ready(self) -> None:
        self._monitor.calls.append("ready")


class Member:
    """Waits for nobody."""

    others = ("other",)

    def __init__(self, monitor: FakeMonitor) -> None:
        self._monitor = monitor

    async def meet(self, point: Point, value: Any = None) -> Mapping[str, Any]:
        self._monitor.calls.append(point.name)
        return {}

    async def decide(self) -> None:
        self._monitor.calls.append("decide")


async def holding(*tags: str) -> tuple[Noting, Run]:
    """A VM with these snapshots, and a guarded run."""
    monitor = Noting()
    for tag in tags:
        await monitor.snapshot_save(tag, "disk0", DISKS)
    monitor.calls.clear()
    run = Run(monitor)
    run.journal.guard = Guard(monitor)
    return monitor, run


async def test_each_tag_once() -> None:
    monitor, run = await holding("a", "b", "c")
    inventory = await run.look()
    deleted = await do_delvm(run, DeleteRequest(tags=("a", "x", "c", "a"), missing_ok=True), inventory)
    assert (deleted.deleted, deleted.files) == ({"a": DISKS, "x": (), "c": DISKS}, {})
    assert monitor.calls == ["ready", "delete", "ready", "delete"], "for what is not there nobody has to be ready"
    assert run.journal.record.work == DeleteWork(devices=DISKS, disk_tags=("c",), files=())
    assert run.journal.record.tags == ("c",)
    assert [inventory.holding(tag).nodes for tag in "abc"] == [(), DISKS, ()], "what the caller has is kept up to date"
    assert {row.tag for rows in monitor.rows.values() for row in rows} == {"b"}


@pytest.mark.parametrize(
    ("tags", "done", "message"),
    [
        (("x",), None, "no snapshot 'x' on any device"),
        (("x", "y"), None, "no snapshot 'x', 'y' on any device; nothing was deleted"),
        (("a", "x"), ("a",), "no snapshot 'x'"),
        (("a", "x", "y"), ("a",), "no snapshot 'x'"),
        (("x", "stuck"), (), "it does not go"),
    ],
)
async def test_what_is_said_if_some_are_not_deleted(
    tags: tuple[str, ...], done: tuple[str, ...] | None, message: str
) -> None:
    monitor, run = await holding("a", "stuck")
    delete = monitor.snapshot_delete

    async def refuse(tag: str, devices: Any) -> None:
        if tag == "stuck":
            raise JobFailed("snapshot-delete", "it does not go")
        await delete(tag, devices)

    monitor.snapshot_delete = refuse  # type: ignore[method-assign]
    with pytest.raises(SnapshotNotFound if done is None else PartialFailure) as failed:
        await do_delvm(run, DeleteRequest(tags=tags))
    assert message in str(failed.value)
    if isinstance(failed.value, PartialFailure):
        assert failed.value.done == done


async def test_a_deletion_that_fails_midway() -> None:
    """What is left is known to whoever goes on."""
    monitor, run = await holding("a")

    async def half(tag: str, devices: Any) -> None:
        monitor.rows["disk0"].clear()
        raise JobFailed("snapshot-delete", "it does not go")

    monitor.snapshot_delete = half  # type: ignore[method-assign]
    inventory = await run.look()
    with pytest.raises(JobFailed) as failed:
        await do_delvm(run, DeleteRequest(tags=("a",)), inventory)
    assert (inventory.holding("a").nodes, failed.value.outcome) == (("disk1",), "")


async def test_what_is_refused_before_anything_is_deleted() -> None:
    monitor, run = await holding("a")
    monitor.state = RunState.INMIGRATE
    with pytest.raises(PrecheckRefused, match="nothing can be deleted now"):
        await do_delvm(run, DeleteRequest(tags=("a",)))
    monitor.state = RunState.RUNNING
    monitor.tag_obstacle = lambda tag: "it has an umlaut"  # type: ignore[method-assign]
    with pytest.raises(NotSupported):
        await do_delvm(run, DeleteRequest(tags=("a",)))
    assert monitor.calls == []


@pytest.mark.parametrize("missing_ok", [True, False])
async def test_the_order_in_a_group(missing_ok: bool) -> None:
    """All is checked and written down before it is decided, and nothing deleted before that."""
    monitor, run = await holding("a", "b")
    run.journal.member = Member(monitor)  # type: ignore[assignment]
    request = DeleteRequest(tags=("a", "b", *(["x"] if missing_ok else []), "a"), missing_ok=missing_ok)
    await do_delvm(run, request)
    assert monitor.calls == ["GROUPED", "ready", "CHECKED", "decide", "delete", "delete"]
    assert run.journal.record.work == DeleteWork(devices=DISKS, disk_tags=("a", "b"), files=())
    monitor.calls.clear()
    with pytest.raises(SnapshotNotFound, match="--missing-ok deletes it on the other VMs"):
        await do_delvm(run, DeleteRequest(tags=("a",)))
    assert monitor.calls == []


async def test_an_interrupt() -> None:
    """What has begun is finished, and said."""
    monitor, run = await holding("a", "b", "c")
    delete = monitor.snapshot_delete

    async def interrupted(tag: str, devices: Any) -> None:
        if tag == "b":
            task.cancel()
        await delete(tag, devices)

    monitor.snapshot_delete = interrupted  # type: ignore[method-assign]
    task = asyncio.create_task(do_delvm(run, DeleteRequest(tags=("a", "b", "c"))))
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    assert cancelled.value.__notes__ == ["deleted by then: a, b"]
    assert {row.tag for rows in monitor.rows.values() for row in rows} == {"c"}


async def test_a_disk_that_has_it_several_times() -> None:
    """One goes at a time."""
    monitor, run = await holding("a", "a", "a")
    await do_delvm(run, DeleteRequest(tags=("a",)))
    assert monitor.calls == ["ready", "delete", "delete", "delete"]
    assert not any(monitor.rows.values())


async def test_state_files(tmp_path: Path) -> None:
    """They go last, when QEMU has none of them open any more; one that is gone is no failure."""
    monitor, _ = await holding("a")
    devices = survey(await monitor.block_graph()).devices
    files = [tmp_path / "gone", tmp_path / "there"]
    files[1].touch()
    tables = await monitor.snapshot_tables()
    assert await delete_all(monitor, devices, (), [str(file) for file in files], tables) == tables
    assert (monitor.calls, files[1].exists()) == (["tidy"], False)
    assert await delete_all(monitor, devices, (), ()) == {}
    assert monitor.calls == ["tidy"], "that takes a command for each"


@pytest.mark.parametrize("tags", [("a",), ()])
async def test_a_state_file_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tags: tuple[str, ...]) -> None:
    """The others go; and it is said what has become of the rest."""
    monitor, run = await holding(*tags)
    files = [tmp_path / "stays", tmp_path / "goes"]
    for file in files:
        file.touch()

    def remove(path: Path) -> None:
        if path == files[0]:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        path.unlink()

    monkeypatch.setattr("qsnap.host.bulk_io.remove", remove)
    inventory = await run.look()
    held = Holding(tags=tags, nodes=DISKS if tags else (), files=tuple(map(str, files)))
    with pytest.raises(JobFailed) as failed:
        await _deleted(monitor, held, inventory)
    gone = "its disks' snapshots are gone; " if tags else ""
    assert failed.value.reason == f"the state file {files[0]} cannot be removed: Operation not permitted"
    assert failed.value.outcome == f"{gone}the guest is running. Remove the file by hand"
    assert [file.exists() for file in files] == [True, False]
    (warning,) = await delete_replaced(monitor, inventory.devices, (), held.files)
    assert (warning.code, warning.cure) == ("replaced-left", "remove the file by hand")


async def test_a_state_file_whose_disks_have_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes as a snapshot does: the guard knows of it before."""
    file = written(tmp_path / "a.a.qsnap", Content("a", str(tmp_path / "a"), 9, DATE, 7))
    monitor, run = await holding("b")
    inventory = await run.look()
    monkeypatch.setattr(inventory.store, "files", lambda *_: (read(file),))
    deleted = await do_delvm(run, DeleteRequest(tags=("a", "b")), inventory)
    assert (deleted.deleted, deleted.files) == ({"a": (), "b": DISKS}, {"a": (str(file),)})
    assert (monitor.calls, file.exists()) == (["ready", "tidy", "ready", "delete"], False)


async def test_a_replaced_snapshot_that_stays() -> None:
    monitor, run = await holding("a")
    devices = (await run.look()).devices
    monitor.delete_does_nothing = True
    (warning,) = await delete_replaced(monitor, devices, ("a",), ())
    assert (warning.code, warning.cure) == ("replaced-left", "`qsnap list` shows it; delete it")
    with pytest.raises(VerifyFailed, match="disk0, disk1 still holds it"):
        await do_delvm(run, DeleteRequest(tags=("a",)))
    monitor.delete_does_nothing = False
    assert await delete_replaced(monitor, devices, ("a",), ()) == ()
    assert not any(monitor.rows.values())
