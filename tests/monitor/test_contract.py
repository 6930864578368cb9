"""The contract of a monitor: the same assertions for every transport, and for the fake that the tests use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qsnap.errors import JobFailed
from qsnap.model.qemu import RunState
from qsnap.monitor import Monitor, open_monitor
from qsnap.monitor.address import UnixAddress
from support.fake_monitor import FakeMonitor
from support.guest import HAS_SNAPSHOT_JOBS, Guest, Launch, blockdev, make_boot_disk, make_disk, tags, until

#: What the QEMU under test offers.
TRANSPORTS = ["qmp", "qmp-hmp", "hmp"] if HAS_SNAPSHOT_JOBS else ["qmp-hmp", "hmp"]


async def opened(guest: Guest, transport: str) -> Monitor:
    """The guest's monitor by one of them."""
    where = guest.hmp_address if transport == "hmp" else guest.address
    monitor = await open_monitor(UnixAddress(where), snapshot_jobs=transport == "qmp")
    assert monitor.transport == transport
    return monitor


@pytest.fixture(params=[*TRANSPORTS, "fake"])
async def monitor(request: pytest.FixtureRequest, launch: Launch, tmp_path: Path) -> AsyncIterator[Monitor]:
    if request.param == "fake":
        yield FakeMonitor()
        return
    guest = launch(
        *blockdev("disk0", make_boot_disk(tmp_path / "disk0")), "-device", "virtio-blk,drive=disk0,id=vd0",
        *blockdev("disk1", make_disk(tmp_path / "disk1")), "-device", "virtio-blk,drive=disk1", "-name", "the guest",
    )  # fmt: skip
    guest.wait_for_ticks()
    running = await opened(guest, request.param)
    try:
        yield running
    finally:
        await running.aclose()


async def held(monitor: Monitor, tag: str) -> dict[str, list[int]]:
    """The VM state sizes of a tag's rows, by node."""
    graph = await monitor.block_graph()
    return {name: [row.vm_state_size for row in graph.nodes[name].tagged(tag)] for name in ("disk0", "disk1")}


DISKS = ("disk0", "disk1")


async def test_stop_and_cont(monitor: Monitor) -> None:
    assert await monitor.runstate() is RunState.RUNNING
    began = await monitor.stop()
    assert await monitor.runstate() is RunState.PAUSED
    await monitor.stop()
    assert await monitor.runstate() is RunState.PAUSED
    ended = await monitor.cont()
    assert await monitor.runstate() is RunState.RUNNING
    await monitor.cont()
    assert await monitor.runstate() is RunState.RUNNING
    assert (began is None) == (ended is None)
    if began is not None and ended is not None:
        assert 0 < ended - began < 10


@pytest.mark.parametrize("paused", [False, True])
async def test_save_load_delete(monitor: Monitor, paused: bool) -> None:
    if paused:
        await monitor.stop()
    before = await monitor.runstate()
    await monitor.snapshot_save("t", "disk0", DISKS)
    assert await monitor.runstate() is before
    ((size,), other) = (await held(monitor, "t")).values()
    assert size > 0
    assert other == [0]
    async with monitor.snapshot_load("t", "disk0", DISKS):
        pass
    assert await monitor.runstate() is before
    await monitor.snapshot_delete("t", DISKS)
    assert await held(monitor, "t") == {"disk0": [], "disk1": []}
    assert await monitor.settle() is None
    assert list(await monitor.leftover_jobs()) == []


async def test_dates_and_clocks_agree_on_all_devices(monitor: Monitor) -> None:
    await monitor.snapshot_save("t", "disk0", DISKS)
    graph = await monitor.block_graph()
    moments = {(row.date, row.vm_clock_ns) for name in DISKS for row in graph.nodes[name].tagged("t")}
    assert len(moments) == 1
    ((date, clock),) = moments
    assert date.tzinfo is not None
    assert clock > 0


async def test_deleting_what_is_not_there_is_no_error(monitor: Monitor) -> None:
    await monitor.snapshot_delete("nope", DISKS)


async def test_loading_what_is_not_there_fails_with_the_reason(monitor: Monitor) -> None:
    await monitor.stop()
    with pytest.raises(JobFailed, match="nope") as failure:
        async with monitor.snapshot_load("nope", "disk0", DISKS) as told:
            pass
    assert told is failure.value
    assert not failure.value.reason.startswith("Error:")
    assert await monitor.settle() is None


#: What a shell, HMP, a table or a file system might take for something else. (A number, which a load takes for an ID,
#: is refused above the monitors.)
TAGS = [
    "a b", " a", 'quo"te', "back\\slash", "\\n", "-x", "--", "01", "ü", "日本語", "x;y", "%s%n", "'", "$(HOME)",
    "[b]", "a|b&c>d", "../a/b", "(qemu) x", "None", "5 MiB 2020-01-01 00:00:00 00:00:00.000", "x" * 255, "ü" * 127,
]  # fmt: skip


async def test_tags_are_data(monitor: Monitor) -> None:
    """Each is saved, listed, loaded and deleted, and never hits another one."""
    await monitor.stop()
    await monitor.snapshot_save("decoy", "disk0", DISKS)
    for tag in TAGS:
        assert monitor.tag_obstacle(tag) is None
        await monitor.snapshot_save(tag, "disk0", DISKS)
        graph = await monitor.block_graph()
        for name in DISKS:
            assert [row.tag for row in graph.nodes[name].snapshots] == ["decoy", tag]
        async with monitor.snapshot_load(tag, "disk0", DISKS):
            pass
        await monitor.snapshot_delete(tag, DISKS)
        assert await held(monitor, tag) == {"disk0": [], "disk1": []}
        assert len((await held(monitor, "decoy"))["disk0"]) == 1


async def test_what_it_tells(monitor: Monitor) -> None:
    assert await monitor.memory_size() == 32 << 20
    assert await monitor.name() in ("the guest", "")
    migration = await monitor.migration()
    assert (migration.status in (None, "none"), migration.blocked_reasons) == (True, ())
    graph = await monitor.block_graph()
    assert [graph.nodes[backend.root or ""].driver for backend in graph.backends] == ["qcow2", "qcow2"]
    assert {(one.path.rpartition("/")[0], one.device_id, one.model) for one in graph.peripherals} == {
        ("/machine/peripheral", "vd0", "virtio-blk-pci"),
        ("/machine/peripheral-anon", "", "virtio-blk-pci"),
    }
    assert monitor.version[0] >= 5


async def test_one_transport_loads_and_deletes_what_another_saved(guest: Guest, tmp_path: Path) -> None:
    for saver in TRANSPORTS:
        monitor = await opened(guest, saver)
        for other in TRANSPORTS:
            await monitor.snapshot_save(f"by {saver} for {other}", "disk0", DISKS)
        await monitor.aclose()
    everything = {f"by {saver} for {other}" for saver in TRANSPORTS for other in TRANSPORTS}
    assert set(tags(tmp_path / "disk0.qcow2")) == everything
    for other in TRANSPORTS:
        monitor = await opened(guest, other)
        graph = await monitor.block_graph()
        assert {row.tag for row in graph.nodes["disk1"].snapshots} == everything
        for saver in TRANSPORTS:
            await monitor.stop()
            async with monitor.snapshot_load(f"by {saver} for {other}", "disk0", DISKS):
                pass
            await monitor.cont()
            await monitor.snapshot_delete(f"by {saver} for {other}", DISKS)
            everything.remove(f"by {saver} for {other}")
        await monitor.aclose()
        guest.assert_running()
    assert tags(tmp_path / "disk0.qcow2") == tags(tmp_path / "disk1.qcow2") == []


@pytest.mark.skipif(not HAS_SNAPSHOT_JOBS, reason="QEMU before 6.0 has no snapshot jobs")
@pytest.mark.parametrize("nodes", [["disk0", "nowhere"], ["nowhere", "disk0"]])
async def test_of_two_jobs_the_one_that_failed_is_told(guest: Guest, nodes: list[str]) -> None:
    """In whatever order QEMU lists them."""
    for number, node in enumerate(nodes):
        guest.qmp("snapshot-delete", job_id=f"qsnap-delete-4711-{number}", tag="none", devices=[node])
    until("the jobs", lambda: all(job["status"] == "concluded" for job in guest.qmp("query-jobs")) or None)
    monitor = await opened(guest, "qmp")
    try:
        await monitor.take_over(4711)
        assert "nowhere" in str(await monitor.settle())
        assert guest.jobs() == []
    finally:
        await monitor.aclose()
