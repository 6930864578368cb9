"""The sequences: what they do in which order, with a real QEMU where it can be had and a fake for the rest."""

from __future__ import annotations

import asyncio
import os
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import qsnap
from qsnap.errors import (
    GuestLeftStopped,
    MonitorLost,
    NotSupported,
    OperationTimeout,
    PrecheckRefused,
    SnapshotExists,
    SnapshotNotFound,
    VerifyFailed,
)
from qsnap.model.qemu import RunState
from qsnap.model.requests import LoadRequest, OnExists, SaveRequest
from qsnap.monitor import open_monitor
from qsnap.monitor.address import UnixAddress
from qsnap.operations.load import do_loadvm
from qsnap.operations.save import do_savevm
from qsnap.runs.journal import Journal
from qsnap.runs.pause import stopped
from qsnap.runs.record import LiveWork, LoadWork, Record
from qsnap.runs.run import Run
from support.disks import disk, filters, one_disk, pflash_raw
from support.fake_monitor import FakeMonitor
from support.guest import (
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    assert_nothing_left,
    both_monitors,
    cli,
    needs_snapshot_jobs,
    state_sizes,
    tags,
    until,
)
from support.proxy import Intercept, deed


def on_both(directory: Path) -> list[list[str]]:
    return [tags(directory / "disk0.qcow2"), tags(directory / "disk1.qcow2")]


async def test_the_order_of_a_save(guest: Guest, intercept: Intercept) -> None:
    """Check, stop, look up, delete the old one, save, resume, read back: nothing else in between."""
    proxy = intercept(guest)
    async with qsnap.connect(proxy.address) as vm:
        await vm.save("t")
        proxy.commands.clear()
        await vm.save("t")
    deeds = [c for c in proxy.commands if c in ("stop", "cont") or c.startswith("snapshot-") or c == "job-dismiss"]
    if HAS_SNAPSHOT_JOBS:
        assert deeds == ["stop", "snapshot-delete", "job-dismiss", "snapshot-save", "job-dismiss", "cont"]
    else:  # HMP's savevm deletes the old one itself, once it knows that nothing blocks it
        assert deeds == ["stop", "snapshot-save", "cont"]
    first_stop = proxy.commands.index("stop")
    assert "query-migrate" in proxy.commands[:first_stop]
    assert "query-named-block-nodes" in proxy.commands[:first_stop]
    assert "query-named-block-nodes" in proxy.commands[first_stop : proxy.commands.index(deeds[1])]
    save, cont = proxy.commands.index("snapshot-save"), proxy.commands.index("cont")
    assert "query-named-block-nodes" not in proxy.commands[save:cont], "the guest need not wait for that"
    assert "query-named-block-nodes" in proxy.commands[cont:]


async def test_the_figures_are_qemus_own(guest: Guest, tmp_path: Path) -> None:
    async with qsnap.connect(guest.address) as vm:
        result = await vm.save("t")
    guest.qmp("query-status")
    stamps = {
        event["event"]: event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        for event in guest.qmp.events
        if event["event"] in ("STOP", "RESUME")
    }
    assert result.pause_ms == pytest.approx((stamps["RESUME"] - stamps["STOP"]) * 1000, abs=0.01)
    assert result.vm_state_size == state_sizes(tmp_path / "disk0.qcow2")["t"]
    assert result.duration_ms > result.pause_ms > 0
    assert abs(datetime.now().astimezone() - result.date) < timedelta(seconds=30)


async def test_a_replacement(guest: Guest, tmp_path: Path) -> None:
    async with qsnap.connect(guest.address) as vm:
        assert not (await vm.save("t")).replaced
        first = guest.lines()[-1][0]
        guest.wait_for_ticks(10)
        assert (await vm.save("t")).replaced
        assert on_both(tmp_path) == [["t"], ["t"]]
        await vm.load("t", running=False)
        assert guest.counter >= first + 10
        await vm.load("t", running=True)
    guest.assert_running()


async def test_a_replacement_removes_partial_ones_too(guest: Guest, tmp_path: Path) -> None:
    async with qsnap.connect(guest.address) as vm:
        for node in ("disk0", "disk1"):
            await vm.save("t")
            guest.qmp("blockdev-snapshot-delete-internal-sync", device=node, name="t")
            assert (await vm.save("t")).replaced
            assert on_both(tmp_path) == [["t"], ["t"]]
            (listed,) = await vm.list()
            assert (listed.kind, listed.problems) == ("full", ())
        await vm.load("t")
    guest.assert_running()


@needs_snapshot_jobs
async def test_a_replacement_removes_partial_and_excluded_ones_too(guest: Guest, tmp_path: Path) -> None:
    async with qsnap.connect(guest.address) as vm:
        await vm.save("t", exclude=["disk0"])
        assert on_both(tmp_path) == [[], ["t"]]
        await vm.save("t", exclude=["disk1"])
        assert on_both(tmp_path) == [["t"], []]
        await vm.save("t")
        assert on_both(tmp_path) == [["t"], ["t"]]


@needs_snapshot_jobs
async def test_the_vmstate_node_is_chosen(guest: Guest, tmp_path: Path) -> None:
    async with qsnap.connect(guest.address) as vm:
        assert (await vm.save("t", vmstate="disk1")).vmstate == "disk1"
        assert state_sizes(tmp_path / "disk0.qcow2")["t"] == 0
        assert state_sizes(tmp_path / "disk1.qcow2")["t"] > 0
        (listed,) = await vm.list()
        assert (listed.kind, listed.vmstate) == ("full", "disk1")
        await vm.load("t")
    guest.assert_running()


async def test_snapshots_of_others_are_listed_and_loaded(guest: Guest) -> None:
    assert guest.qmp.hmp("savevm by-hmp") == ""
    counter = guest.lines()[-1][0]
    guest.wait_for_ticks()
    async with qsnap.connect(guest.address) as vm:
        (listed,) = await vm.list()
        assert (listed.tag, listed.kind, listed.vmstate) == ("by-hmp", "full", "disk0")
        await vm.load("by-hmp", running=False)
        assert guest.counter <= counter + 5
        await vm.load("by-hmp", running=True)
    guest.assert_running()


async def test_hmp_loads_what_qsnap_saved(guest: Guest) -> None:
    async with qsnap.connect(guest.address) as vm:
        await vm.save("by-qsnap")
    assert guest.qmp.hmp("loadvm by-qsnap") == ""
    guest.assert_running()


@pytest.mark.parametrize(("wanted", "expected"), [(None, "paused"), (True, "running"), (False, "paused")])
async def test_run_state_after_the_load_of_a_paused_guest(guest: Guest, wanted: bool | None, expected: str) -> None:
    async with qsnap.connect(guest.address) as vm:
        await vm.save("t")
        guest.qmp("stop")
        assert (await vm.load("t", running=wanted)).runstate == expected
    assert guest.runstate == expected


@pytest.mark.parametrize(("wanted", "expected"), [(None, "running"), (True, "running"), (False, "paused")])
async def test_run_state_after_the_load_of_a_running_guest(guest: Guest, wanted: bool | None, expected: str) -> None:
    async with qsnap.connect(guest.address) as vm:
        guest.qmp("stop")
        await vm.save("t")
        guest.qmp("cont")
        assert (await vm.load("t", running=wanted)).runstate == expected
    assert guest.runstate == expected


async def test_the_automatic_name(guest: Guest, tmp_path: Path) -> None:
    async with qsnap.connect(guest.address) as vm:
        began = datetime.now().astimezone()
        names = [(await vm.save()).tag for _ in range(3)]
        ended = datetime.now().astimezone()
    assert len(set(names)) == 3, "nobody asked to replace anything"
    for name in names:
        moment = datetime.strptime(name, "vm-%Y%m%d%H%M%S").astimezone()
        assert began - timedelta(seconds=1) <= moment <= ended + timedelta(seconds=2), "each takes a second of its own"
    assert tags(tmp_path / "disk0.qcow2") == names


async def test_a_dry_run_does_nothing(guest: Guest, tmp_path: Path) -> None:
    async with qsnap.connect(guest.address) as vm:
        await vm.save("t")
        guest.qmp("query-status")
        guest.qmp.events.clear()
        plan = await vm.save("t", dry_run=True)
    assert (plan.dry_run, plan.replaced, plan.devices, plan.vmstate) == (True, True, ("disk0", "disk1"), "disk0")
    guest.qmp("query-status")
    assert guest.qmp.events == []
    assert on_both(tmp_path) == [["t"], ["t"]]


async def test_delete_many(guest: Guest, tmp_path: Path) -> None:
    async with qsnap.connect(guest.address) as vm:
        for tag in ("a", "b", "c"):
            await vm.save(tag)
        result = await vm.delete("a", "c", "a")
        assert result.deleted == {"a": ("disk0", "disk1"), "c": ("disk0", "disk1")}
        with pytest.raises(SnapshotNotFound):
            await vm.delete("x", "y")
        assert (await vm.delete("x", missing_ok=True)).deleted == {"x": ()}
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": ["b"], tmp_path / "disk1.qcow2": ["b"]})


@needs_snapshot_jobs
async def test_jobs_of_a_dead_qsnap_are_dismissed_and_foreign_ones_are_not(guest: Guest, tmp_path: Path) -> None:
    finished = await asyncio.create_subprocess_exec("true")
    await finished.wait()
    ours_alive = f"qsnap-save-{os.getppid()}-1"
    for job_id in (f"qsnap-save-{finished.pid}-1", ours_alive, "somebody-elses"):
        guest.qmp("snapshot-delete", job_id=job_id, tag="none", devices=["disk0"])
    until("three jobs", lambda: len([j for j in guest.qmp("query-jobs") if j["status"] == "concluded"]) == 3 or None)
    backup = {"device": "disk0", "target": str(tmp_path / "copy"), "format": "raw", "sync": "full", "speed": 1}
    guest.qmp("drive-backup", job_id=f"qsnap-save-{finished.pid}-2", **backup)
    async with qsnap.connect(guest.address) as vm:
        left = [job.id for job in (await vm.status()).leftover_jobs]
        assert left == [f"qsnap-save-{finished.pid}-1"], "what goes on is not left over"
        guest.qmp("block-job-cancel", device=f"qsnap-save-{finished.pid}-2", force=True)
        until("the backup to end", lambda: len(guest.jobs()) == 3)
        await vm.save("t")
        assert (await vm.status()).leftover_jobs == ()
    assert sorted(guest.jobs()) == sorted([ours_alive, "somebody-elses"])


async def test_hmp_refuses_what_it_cannot_honour(guest: Guest, tmp_path: Path) -> None:
    async with qsnap.connect(guest.address, snapshot_jobs=False) as vm:
        guest.qmp.events.clear()
        with pytest.raises(NotSupported, match="--exclude"):
            await vm.save("t", exclude=["disk1"])
        with pytest.raises(NotSupported, match="--vmstate"):
            await vm.save("t", vmstate="disk1")
        guest.qmp("query-status")
        assert guest.qmp.events == []
        await vm.save("t", vmstate="disk0")
        await vm.save("t")
        assert on_both(tmp_path) == [["t"], ["t"]]
        with pytest.raises(NotSupported, match="--exclude"):
            await vm.load("t", exclude=["disk1"])
        await vm.load("t")
        await vm.delete("t")
    assert on_both(tmp_path) == [[], []]
    guest.assert_running()


async def test_hmp_does_not_load_from_another_vmstate_node(launch: Launch, tmp_path: Path) -> None:
    """As it comes about: the disks were in another order at the save."""
    first = disk(tmp_path, "disk0")
    second = disk(tmp_path, "disk1")
    swapped = launch(*second, *first, memory="16")
    async with qsnap.connect(swapped.address) as vm:
        assert (await vm.save("t")).vmstate == "disk1"
    swapped.quit()
    guest = launch(*first, *second, memory="16")
    async with qsnap.connect(guest.address, snapshot_jobs=False) as vm:
        with pytest.raises(NotSupported, match="disk1"):
            await vm.load("t")
    guest.qmp("query-status")
    assert guest.qmp.events == []
    assert guest.runstate == "running"


async def test_hmp_says_what_it_cannot_carry_or_load(launch: Launch, tmp_path: Path) -> None:
    """Without snapshot jobs: a raw variable store is refused beforehand, and so is a load through filters."""
    uefi = launch("-S", *one_disk(tmp_path), *pflash_raw(tmp_path)[-4:], memory="16")
    async with qsnap.connect(uefi.address, snapshot_jobs=False) as vm:
        assert [d.verdict for d in (await vm.check()).devices if d.device == "pflash1"] == ["refused"]
    uefi.kill()
    filtered = launch(*filters(tmp_path))
    filtered.wait_for_ticks()
    async with qsnap.connect(filtered.address, snapshot_jobs=False) as vm:
        await vm.save("t")
        with pytest.raises(NotSupported, match="filters"):
            await vm.load("t")
    filtered.assert_running()


async def test_a_guest_that_cannot_be_resumed() -> None:
    monitor = FakeMonitor(cont_fails=True)
    with pytest.raises(GuestLeftStopped, match=r"dump in process, please wait\. Try `cont` in its monitor$"):
        await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert monitor.calls == ["stop", "save", "cont"]
    assert all(rows for rows in monitor.rows.values()), "a good snapshot is not thrown away for that"


async def test_a_paused_guest_is_neither_stopped_nor_resumed() -> None:
    monitor = FakeMonitor(state=RunState.PAUSED)
    result = await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert monitor.calls == ["save"]
    assert (result.pause_ms, result.runstate) == (0.0, "paused")


async def test_a_guest_that_qemu_stops_again_at_once() -> None:
    """`cont` succeeds, and the guest's own next write finds no room: it was running and is stopped now."""
    monitor = FakeMonitor()

    async def cont() -> float | None:
        monitor.state = RunState.IO_ERROR
        return None

    monitor.cont = cont  # type: ignore[method-assign]
    with pytest.raises(GuestLeftStopped, match=r"io-error.*Make room"):
        await do_savevm(Run(monitor), SaveRequest(tag="t"))


@pytest.mark.parametrize("is_live", [True, False])
async def test_a_guest_that_qemu_pauses_again_at_once(is_live: bool) -> None:
    """As it does from 9.0 on where a live save is undone while its stream begins; else somebody means it."""
    monitor = FakeMonitor()
    work = LiveWork(disk_tag="t", vmstate="a", devices=(), path="t", part="t", older=(), older_files=())
    resumed = monitor.cont

    async def cont() -> float | None:
        await resumed()
        if monitor.calls.count("cont") == 1:
            monitor.state = RunState.PAUSED
        return None

    monitor.cont = cont  # type: ignore[method-assign]
    with nullcontext() if is_live else pytest.raises(GuestLeftStopped, match="is paused"):
        async with stopped(monitor, Journal(Record(work=work if is_live else None))):
            pass
    assert monitor.state is (RunState.RUNNING if is_live else RunState.PAUSED)
    assert monitor.calls.count("cont") == (2 if is_live else 1)
    if is_live:  # what runs is left alone
        monitor = FakeMonitor()
        async with stopped(monitor, Journal(Record(work=work))):
            pass
        assert monitor.calls == ["stop", "cont"]


@needs_snapshot_jobs
async def test_a_name_that_qsnap_has_chosen_replaces_nothing(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else has made one of that name since: it stays, and the guest runs."""
    monkeypatch.setattr("qsnap.operations.save.free_automatic_tag", lambda graph: "vm-auto")

    async def save_another(*_: object) -> None:
        guest.qmp.hmp("savevm vm-auto")

    monkeypatch.setattr("qsnap.operations.save.prepare", save_another)
    async with qsnap.connect(guest.address) as vm:
        with pytest.raises(SnapshotExists, match="try again"):
            await vm.save()
        (theirs,) = await vm.list()
        monkeypatch.setattr("qsnap.operations.together.next_of_series", lambda *_: "vm-auto")
        with pytest.raises(SnapshotExists):
            await vm.save(prefix="vm")
        assert await vm.list() == (theirs,)
    guest.assert_running()


async def test_half_a_set_is_removed() -> None:
    monitor = FakeMonitor(forgets=frozenset({"disk1"}))
    with pytest.raises(VerifyFailed, match="disk1 holds it 0 times") as failure:
        await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert "removed from disk0" in failure.value.outcome
    assert monitor.calls == ["stop", "save", "cont", "delete"], "the guest is resumed first"
    assert monitor.rows == {"disk0": [], "disk1": []}


async def test_what_qemu_reports_an_error_of_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if it looks whole, and the older one is gone: its contents may lack anything."""
    monitor = FakeMonitor()
    await do_savevm(Run(monitor), SaveRequest(tag="t"))
    save = monitor.snapshot_save

    async def fails_at_the_end(tag: str, vmstate: str, devices: Any) -> None:
        await save(tag, vmstate, devices)
        raise qsnap.errors.JobFailed("snapshot-save", "Input/output error")

    monkeypatch.setattr(monitor, "snapshot_save", fails_at_the_end)
    with pytest.raises(VerifyFailed, match="Input/output error"):
        await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert not any(monitor.rows.values())


async def test_half_a_set_that_looks_like_the_older_one_is_removed() -> None:
    """Saved again within a second while the guest is paused: neither date nor clock tells them apart."""
    monitor = FakeMonitor(state=RunState.PAUSED, now=datetime(2026, 11, 24, tzinfo=UTC))
    await do_savevm(Run(monitor), SaveRequest(tag="t"))
    monitor.forgets = frozenset({"disk1"})
    with pytest.raises(VerifyFailed):
        await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert monitor.rows == {"disk0": [], "disk1": []}


async def test_a_disk_plugged_between_check_and_stop() -> None:
    monitor = FakeMonitor(hot_plugs=True)
    with pytest.raises(PrecheckRefused, match="changed between"):
        await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert monitor.calls == ["stop", "cont"]


async def test_a_save_that_never_ends() -> None:
    monitor = FakeMonitor(save_hangs=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert monitor.calls == ["stop", "save", "cont"]
    assert monitor.state is RunState.RUNNING


async def test_a_watcher_that_fails_does_not_fail_the_save(guest: Guest, tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    async with qsnap.connect(guest.address) as vm:
        await vm.save("t", watch=fail)
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": ["t"]})


@needs_snapshot_jobs
async def test_an_interrupt_while_the_older_one_is_deleted(guest: Guest, tmp_path: Path, intercept: Intercept) -> None:
    """Its job is dismissed, and the message says where the older one is."""
    loop = asyncio.get_running_loop()

    def interrupt(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-delete":
            loop.call_soon_threadsafe(task.cancel)

    async with qsnap.connect(intercept(guest, on_command=interrupt).address) as vm:
        await vm.save("t")
        task = asyncio.create_task(vm.save("t"))
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await task
    assert "the older snapshot 't' had already been deleted; the guest is running" in cancelled.value.__notes__
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": [], tmp_path / "disk1.qcow2": []})


async def test_the_older_one_cannot_be_deleted() -> None:
    """A failure there ends the save: nothing is written over it."""
    monitor = FakeMonitor()
    await do_savevm(Run(monitor), SaveRequest(tag="t"))

    async def refuse(tag: str, devices: Any) -> None:
        raise qsnap.errors.JobFailed("snapshot-delete", "Could not delete snapshot 't' on 'disk0': Input/output error")

    monitor.snapshot_delete = refuse  # type: ignore[method-assign]
    with pytest.raises(qsnap.errors.JobFailed, match="was to be deleted from disk0, disk1, and is on disk0, disk1"):
        await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert monitor.calls == ["stop", "save", "cont", "stop", "cont"]
    assert monitor.state is RunState.RUNNING
    saved = await do_savevm(Run(monitor), SaveRequest(tag="t", on_exists=OnExists.SAFE))
    (finding,) = saved.warnings
    assert (finding.code, finding.cure) == ("replaced-left", "`qsnap list` shows it; delete it")


@pytest.mark.parametrize(
    ("left", "outcome"),
    [
        (("disk0", "disk1"), "the older snapshot 't' is as it was; the guest is running"),
        (
            ("disk1",),
            "the older snapshot 't' was to be deleted from disk0, disk1, and is on disk1; the guest is running",
        ),
        ((), "nothing of it is left; the older snapshot 't' had already been deleted; the guest is running"),
    ],
)
async def test_a_savevm_that_fails_before_it_writes(left: tuple[str, ...], outcome: str) -> None:
    """HMP's savevm replaces by itself; what it has not deleted of the older snapshot is not for us to delete."""
    monitor = FakeMonitor(chooses_devices=False)
    await do_savevm(Run(monitor), SaveRequest(tag="t"))
    monitor.calls.clear()
    older = {name: rows if name in left else [] for name, rows in monitor.rows.items()}

    async def refuse(tag: str, vmstate: str, devices: Any) -> None:
        monitor.rows = older
        raise qsnap.errors.JobFailed("savevm", "State blocked by non-migratable device")

    monitor.snapshot_save = refuse  # type: ignore[method-assign]
    with pytest.raises(qsnap.errors.JobFailed) as failure:
        await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert failure.value.outcome == outcome
    assert monitor.calls == ["stop", "cont"]
    assert monitor.rows == older


def test_a_human_monitor_tells_dates_in_local_time(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "WEST9:30")
    guest = launch("-S", *disk(tmp_path, "a"), memory="16")
    guest.qmp.hmp("savevm t")
    dates = []
    for address in (guest.qmp_address, guest.hmp_address):
        (snapshot,) = cli("list", "--json", monitor=address).json["snapshots"]
        dates.append(datetime.fromisoformat(snapshot["date"]).replace(microsecond=0))
    assert dates[0] == dates[1]


@both_monitors
async def test_a_paused_guest_is_saved_twice_within_a_second(guest: Guest, tmp_path: Path) -> None:
    guest.qmp("stop")
    async with qsnap.connect(guest.address) as vm:
        for _ in range(4):
            await vm.save("t")
    assert on_both(tmp_path) == [["t"], ["t"]]
    assert guest.runstate == "paused"


async def test_a_savevm_that_says_nothing_and_does_nothing() -> None:
    monitor = FakeMonitor(chooses_devices=False)
    await do_savevm(Run(monitor), SaveRequest(tag="t"))

    async def idle(tag: str, vmstate: str, devices: Any) -> None:
        pass

    monitor.snapshot_save = idle  # type: ignore[method-assign]
    with pytest.raises(VerifyFailed, match="the older snapshot is still there, and no new one") as failure:
        await do_savevm(Run(monitor), SaveRequest(tag="t"))
    assert failure.value.outcome == "the older snapshot 't' is as it was; the guest is running"
    assert all(monitor.rows.values())


async def test_several_cancellations_do_not_keep_the_guest_stopped() -> None:
    monitor = FakeMonitor(save_hangs=True)
    task = asyncio.create_task(do_savevm(Run(monitor), SaveRequest(tag="t")))
    while "save" not in monitor.calls:
        await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert monitor.state is RunState.RUNNING


async def test_stopped_resumes_after_an_error() -> None:
    monitor = FakeMonitor()
    with pytest.raises(ZeroDivisionError):
        async with stopped(monitor, Journal()):
            assert monitor.state is RunState.PAUSED
            raise ZeroDivisionError
    assert monitor.state is RunState.RUNNING


async def test_timeout_of_the_library(guest: Guest) -> None:
    with pytest.raises(OperationTimeout, match=r"0\.2 s"):
        async with qsnap.connect(guest.address, timeout_s=0.2):
            await asyncio.Event().wait()
    guest.assert_running()


async def test_a_time_out_of_the_caller_s_own(guest: Guest) -> None:
    for timeout_s in (None, 60):
        with pytest.raises(TimeoutError, match="mine"):
            async with qsnap.connect(guest.address, timeout_s=timeout_s):
                raise TimeoutError("mine")


async def test_a_lost_monitor_leaves_no_warning(guest: Guest, intercept: Intercept) -> None:
    proxy = intercept(guest)
    with pytest.raises(qsnap.errors.MonitorLost):
        async with qsnap.connect(proxy.address) as vm:
            proxy.cut()
            await vm.list()


async def test_the_connection_is_given_back(guest: Guest) -> None:
    for _ in range(5):
        monitor = await open_monitor(UnixAddress(guest.address))
        assert monitor.pid == guest.pid
        await monitor.aclose()


def test_list_and_show_for_people(guest: Guest) -> None:
    cli("save", "first", monitor=guest.address)
    holder = "disk1" if HAS_SNAPSHOT_JOBS else "disk0"
    cli("save", "second one", "--vmstate", holder, monitor=guest.address)
    text = cli("list", monitor=guest.address).out
    assert [line.split()[0] for line in text.splitlines()] == ["TAG", "first", "second"]
    assert cli("list", "-q", monitor=guest.address).out == "first\nsecond one\n"
    shown = cli("show", "second one", monitor=guest.address).out
    assert f"on {holder}" in shown


@both_monitors
def test_a_tag_that_is_an_id(guest: Guest, tmp_path: Path) -> None:
    """QEMU goes back to IDs first. Such a tag is not made, and one that others have made is not loaded wrongly."""
    cli("save", "first", monitor=guest.address)
    error = cli("save", "1", "--json", monitor=guest.address, expect=6).error
    assert [(f["code"], f["cure"]) for f in error["findings"]] == [("bad-tag", "choose a tag with a letter: v1")]
    guest.wait_for_ticks()
    guest.qmp.hmp("savevm 1")
    assert tags(tmp_path / "disk0.qcow2") == ["first", "1"]
    before = guest.wait_for_ticks()
    error = cli("load", "1", "--json", monitor=guest.address, expect=6).error
    assert "'1' is the ID of snapshot 'first'" in error["findings"][0]["message"]
    assert guest.wait_for_ticks(3) > before, "it was not touched"
    # What stands in the way goes: then it is the one that is meant
    cli("delete", "first", monitor=guest.address)
    cli("load", "1", monitor=guest.address)
    guest.wait_for_ticks()
    guest.assert_running()
    cli("delete", "1", monitor=guest.address)
    assert tags(tmp_path / "disk0.qcow2") == []


@pytest.mark.parametrize("ending", [".qsnap-2", ".qsnap-stand-in"])
def test_tags_that_are_qsnap_s_own(guest: Guest, tmp_path: Path, ending: str) -> None:
    """They are not made by that name; what has one is the snapshot of the tag, and goes with it."""
    assert "qsnap's own" in cli("save", f"b{ending}", monitor=guest.address, expect=6).err
    guest.qmp.hmp(f"savevm b{ending}")
    (listed,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert (listed["tag"], listed["kind"]) == ("b", "full")
    cli("load", "b", monitor=guest.address)
    guest.assert_running()
    cli("save", "b", monitor=guest.address)
    assert tags(tmp_path / "disk0.qcow2") == ["b"]
    guest.qmp.hmp(f"savevm b{ending}")
    cli("delete", "b", monitor=guest.address)
    assert tags(tmp_path / "disk0.qcow2") == []


async def test_what_a_load_has_not_ended_stays_for_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor is lost for good as QEMU drops translated code: a paused guest may still be in "restore-vm"."""
    monitor = FakeMonitor()
    await do_savevm(Run(monitor), SaveRequest(tag="t"))
    monitor.state = RunState.PAUSED

    async def lost(*_: object) -> Any:
        raise MonitorLost("it is gone")

    async def human_answer(line: str) -> str:
        if line != "info kvm":
            return ""
        monitor.runstate = monitor.reconnect = lost  # type: ignore[method-assign, assignment]
        return str(await lost())

    monitor.human_answer = human_answer  # type: ignore[method-assign]
    monkeypatch.setattr("qsnap.runs.pause.RECONNECT_ATTEMPTS", 1)
    run = Run(monitor)
    with pytest.raises(MonitorLost):
        await do_loadvm(run, LoadRequest(tag="t"))
    assert isinstance(run.journal.record.work, LoadWork)
    assert "load" not in monitor.calls
