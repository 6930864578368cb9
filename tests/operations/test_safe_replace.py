"""--safe-replace: at every instant a whole snapshot stands under the tag, or under its stand-in."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import qsnap
from qsnap.errors import BadUsage, JobFailed
from qsnap.inventory.snapshots import STAND_IN_SUFFIX
from qsnap.model.requests import OnExists, SaveRequest
from qsnap.operations.save import do_savevm
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.guest import (
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    assert_nothing_left,
    assert_sound,
    blockdev,
    both_monitors,
    cli,
    failing_disk,
    finish,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    start_cli,
    tags,
    until,
)
from support.killed import Killer, assert_all_is_well
from support.proxy import Intercept, deed

STAND_IN = f"t{STAND_IN_SUFFIX}"


@both_monitors
async def test_the_order(guest: Guest, intercept: Intercept, tmp_path: Path, transport: str) -> None:
    """Stand-in, old one away, new one, stand-in away: all in one stop of the guest."""
    proxy = intercept(guest)
    async with qsnap.connect(proxy.address) as vm:
        await vm.save("t", safe_replace=True)
        proxy.commands.clear()
        before = guest.lines()[-1][0]
        guest.wait_for_ticks(20)
        result = await vm.save("t", safe_replace=True)
        deeds = [c for c in proxy.commands if c in ("stop", "cont") or c.startswith("snapshot-")]
        if transport == "qmp" and HAS_SNAPSHOT_JOBS:
            assert deeds == ["stop", "snapshot-save", "snapshot-delete", "snapshot-save", "snapshot-delete", "cont"]
        else:  # savevm deletes the old one itself
            assert deeds == ["stop", "snapshot-save", "snapshot-save", "snapshot-delete", "cont"]
        assert (result.replaced, result.tag) == (True, "t")
        assert_nothing_left(guest, {tmp_path / "disk0.qcow2": ["t"], tmp_path / "disk1.qcow2": ["t"]})
        await vm.load("t", running=False)
        assert guest.counter >= before + 20
        await vm.load("t", running=True)
    guest.assert_running()


#: Killed when it gives that command for the n-th time: what stands then, and whose state that is.
MOMENTS = [
    ("stop", 1, "t", "old"),
    ("snapshot-save", 1, "t", "old"),
    ("snapshot-delete", 1, STAND_IN, "new"),
    ("snapshot-save", 2, "t", "new"),
    ("snapshot-delete", 2, "t", "new"),
    ("cont", 1, "t", "new"),
]


@pytest.mark.parametrize(("command", "nth", "stands", "state"), MOMENTS)
@pytest.mark.skipif(not HAS_SNAPSHOT_JOBS, reason="HMP's savevm deletes the older snapshot itself")
def test_qsnap_is_killed(
    guest: Guest,
    intercept: Intercept,
    tmp_path: Path,
    runtime_directory: Path,
    command: str,
    nth: int,
    stands: str,
    state: str,
) -> None:
    before = save_and_go_on(guest)
    killer = Killer(command, nth)
    killer.run("save", "t", "--safe-replace", monitor=intercept(guest, on_command=killer).address)
    assert_all_is_well(
        guest, runtime_directory, {tmp_path / "disk0.qcow2": [stands], tmp_path / "disk1.qcow2": [stands]}
    )
    assert_loads(guest, stands, state, before)


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)
@pytest.mark.parametrize(("command", "nth", "state"), [("snapshot-save", 1, "old"), ("snapshot-save", 2, "new")])
def test_qsnap_is_killed_over_hmp(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path, command: str, nth: int, state: str
) -> None:
    before = save_and_go_on(guest)
    killer = Killer(command, nth)
    killer.run("save", "t", "--safe-replace", monitor=intercept(guest, on_command=killer).address)
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": ["t"], tmp_path / "disk1.qcow2": ["t"]})
    assert_loads(guest, "t", state, before)


def save_and_go_on(guest: Guest) -> int:
    cli("save", "t", monitor=guest.address)
    before = guest.lines()[-1][0]
    guest.wait_for_ticks(20)
    return before


def assert_loads(guest: Guest, tag: str, state: str, before: int) -> None:
    """Contents: the counter tells whose state it is, and the guest checks its disks against its RAM."""
    cli("load", tag, "--paused", monitor=guest.address)
    assert (guest.counter > before + 10) == (state == "new")
    cli("load", tag, "--running", monitor=guest.address)
    guest.assert_running()


@pytest.mark.parametrize(
    ("command", "nth", "safely"),
    [
        ("snapshot-save", 1, True),
        ("snapshot-save", 2, True),
        ("snapshot-delete", 2, True),
        ("snapshot-save", 1, False),
    ],
)
@pytest.mark.skipif(not HAS_SNAPSHOT_JOBS, reason="the writes of HMP's savevm are not seen apart")
def test_qemu_is_killed(
    launch: Launch, intercept: Intercept, tmp_path: Path, command: str, nth: int, safely: bool
) -> None:
    """In the middle of each write, and as the stand-in goes: a whole snapshot is in the image, and can be loaded.

    The control is an ordinary replacement: QEMU killed in its write leaves none.
    """
    image = make_boot_disk(tmp_path / "a")
    disk = [*blockdev("a", image), "-device", "virtio-blk,drive=a"]
    guest = launch(*disk, memory="256")
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.address)
    seen = 0

    def kill(message: dict[str, Any]) -> None:
        nonlocal seen
        seen += deed(message) == command
        if (deed(message), seen) == (command, nth):
            if command == "snapshot-save":
                threading.Thread(target=kill_in_the_write, args=(guest, image, image.stat().st_blocks)).start()
            else:
                guest.process.kill()

    options = ["--safe-replace"] if safely else []
    run = finish(start_cli("save", "t", *options, monitor=intercept(guest, on_command=kill).address))
    # Through a proxy it cannot be seen that QEMU has ended.
    assert run.code == 20, run.err
    guest.process.wait(30)
    assert_sound(image)
    whole = tags(image)
    if not safely:
        assert whole == []
        return
    assert whole
    assert set(whole) <= {"t", STAND_IN}
    second = launch(*disk, memory="256")
    for tag in whole:
        cli("load", tag, monitor=second.address)
        second.assert_running()


def kill_in_the_write(guest: Guest, image: Path, base: int) -> None:
    """End QEMU when it has written some of the state."""
    until("some of the state", lambda: image.stat().st_blocks > base + (16 << 20) // 512)
    guest.process.kill()


async def test_the_second_write_fails() -> None:
    """The stand-in stays, and the error says so."""
    monitor = FakeMonitor()
    await do_savevm(Run(monitor), SaveRequest(tag="t"))
    save = monitor.snapshot_save

    async def fail(tag: str, vmstate: str, devices: Any) -> None:
        if tag == "t":
            raise JobFailed("snapshot-save", "Error while writing VM state: No space left on device")
        await save(tag, vmstate, devices)

    monitor.snapshot_save = fail  # type: ignore[method-assign]
    with pytest.raises(JobFailed) as failure:
        await do_savevm(Run(monitor), SaveRequest(tag="t", on_exists=OnExists.SAFE))
    assert failure.value.outcome == (
        "nothing of it is left; the older snapshot 't' had been deleted by then; the same state stands complete under "
        f"'{STAND_IN}', and can be loaded by that name; the guest is running"
    )
    assert {row.tag for rows in monitor.rows.values() for row in rows} == {STAND_IN}


@both_monitors
def test_no_room_for_the_stand_in(launch: Launch, tmp_path: Path) -> None:
    """The older snapshot is as it was."""
    image, spare = make_boot_disk(tmp_path / "a"), make_disk(tmp_path / "b")
    first = launch(*blockdev("a", image), "-device", "virtio-blk,drive=a", *blockdev("b", spare))
    first.wait_for_ticks()
    cli("save", "t", monitor=first.address)
    first.quit()
    guest = launch(
        *failing_disk("a", image, "vmstate_save", 28), "-device", "virtio-blk,drive=a", *blockdev("b", spare)
    )
    guest.wait_for_ticks()
    run = cli("save", "t", "--safe-replace", monitor=guest.address, expect=9)
    assert "the older snapshot 't' is as it was; the guest is running" in run.err
    assert_nothing_left(guest, {image: ["t"], spare: ["t"]})


@pytest.fixture
def with_a_stand_in(
    guest: Guest, intercept: Intercept, runtime_directory: Path, transport: str
) -> tuple[Guest, Intercept]:
    """A guest on which nothing but the stand-in is left of a replacement that was killed."""
    cli("save", "t", monitor=guest.address)
    guest.qmp.hmp(f"savevm {STAND_IN}")  # qsnap itself refuses such a name
    cli("delete", "t", monitor=guest.address)
    return guest, intercept


@both_monitors
def test_a_load_names_the_stand_in(with_a_stand_in: tuple[Guest, Intercept]) -> None:
    guest, _ = with_a_stand_in
    assert f"can be loaded: {STAND_IN}" in cli("load", "t", monitor=guest.address, expect=7).err
    cli("load", STAND_IN, monitor=guest.address)
    guest.assert_running()


@both_monitors
def test_the_next_one_completes_it(with_a_stand_in: tuple[Guest, Intercept], tmp_path: Path) -> None:
    guest, intercept = with_a_stand_in
    proxy = intercept(guest)
    assert cli("save", "t", "--safe-replace", "--json", monitor=proxy.address).json["replaced"] is False
    deeds = [c for c in proxy.commands if c.startswith("snapshot-")]
    assert deeds == ["snapshot-save", "snapshot-delete"], "it protects until the new one is whole"
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": ["t"], tmp_path / "disk1.qcow2": ["t"]})


def test_killed_again_it_is_kept_again(
    with_a_stand_in: tuple[Guest, Intercept], tmp_path: Path, runtime_directory: Path
) -> None:
    guest, intercept = with_a_stand_in
    killer = Killer("stop")
    killer.run("save", "t", "--safe-replace", monitor=intercept(guest, on_command=killer).address)
    assert_all_is_well(
        guest, runtime_directory, {tmp_path / "disk0.qcow2": [STAND_IN], tmp_path / "disk1.qcow2": [STAND_IN]}
    )


def test_a_stand_in_that_is_of_no_more_use_goes_first(guest: Guest, intercept: Intercept, tmp_path: Path) -> None:
    guest.qmp.hmp(f"savevm {STAND_IN}")
    cli("save", "t", monitor=guest.address)
    guest.qmp("blockdev-snapshot-delete-internal-sync", device="disk1", name=STAND_IN)
    cli("save", "t", "--safe-replace", monitor=intercept(guest).address)
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": ["t"], tmp_path / "disk1.qcow2": ["t"]})


@needs_snapshot_jobs
def test_an_older_stand_in_does_not_pass_for_the_new_state(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path
) -> None:
    """It is whole, but what it was made for is done: it goes, and the new state gets one of its own."""
    guest.qmp.hmp(f"savevm {STAND_IN}")
    before = save_and_go_on(guest)
    killer = Killer("snapshot-delete", 2)
    killer.run("save", "t", "--safe-replace", monitor=intercept(guest, on_command=killer).address)
    assert_all_is_well(
        guest, runtime_directory, {tmp_path / "disk0.qcow2": [STAND_IN], tmp_path / "disk1.qcow2": [STAND_IN]}
    )
    assert_loads(guest, STAND_IN, "new", before)


def test_what_cannot_be_meant(guest: Guest) -> None:
    run = cli("save", "x" * 245, "--safe-replace", monitor=guest.address, expect=2)
    assert "too long to be replaced safely" in run.err
    cli("save", "t", "--no-replace", "--safe-replace", monitor=guest.address, expect=2)
    guest.qmp("query-status")
    assert "STOP" not in [event["event"] for event in guest.qmp.events]


async def test_what_excludes_each_other_in_the_library(guest: Guest) -> None:
    async with qsnap.connect(guest.address) as vm:
        with pytest.raises(BadUsage):
            await vm.save("t", safe_replace=True, replace=False)
