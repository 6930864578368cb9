"""--safe-replace: at every instant a whole snapshot stands under the tag."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import qsnap
from qsnap.errors import BadUsage
from qsnap.tags import SECOND_SUFFIX
from support.guest import (
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    assert_nothing_left,
    assert_sound,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    failing_disk,
    finish,
    make_boot_disk,
    make_disk,
    start_cli,
    tags,
    until,
)
from support.killed import Killer, assert_all_is_well
from support.proxy import Intercept, deed

SECOND = f"t{SECOND_SUFFIX}"


@both_monitors
async def test_the_order(guest: Guest, intercept: Intercept, tmp_path: Path, transport: str) -> None:
    """The new one beside the older one, in one write; the older one goes when the guest runs again."""
    proxy = intercept(guest)
    disks = [tmp_path / "disk0.qcow2", tmp_path / "disk1.qcow2"]
    async with qsnap.connect(proxy.address) as vm:
        await vm.save("t", safe_replace=True)
        for name in (SECOND, "t"):
            proxy.commands.clear()
            reached = guest.wait_for_ticks(10)
            result = await vm.save("t", safe_replace=True)
            deeds = [c for c in proxy.commands if c in ("stop", "cont") or c.startswith("snapshot-")]
            assert deeds == ["stop", "snapshot-save", "cont", "snapshot-delete"]
            assert (result.replaced, result.tag) == (True, "t")
            assert_nothing_left(guest, {disk: [name] for disk in disks})
            assert [one.tag for one in await vm.list()] == ["t"]
            await vm.load("t", running=False)
            assert guest.counter >= reached
            await vm.load("t", running=True)
    guest.assert_running()


#: Killed when it gives that command: what stands then, and whose state that is.
MOMENTS = [
    ("stop", "t", "old"),
    ("snapshot-save", "t", "old"),
    ("cont", "t", "old"),
    ("snapshot-delete", SECOND, "new"),
]


@both_monitors
@pytest.mark.parametrize(("command", "stands", "state"), MOMENTS)
def test_qsnap_is_killed(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path, command: str, stands: str, state: str
) -> None:
    before = save_and_go_on(guest)
    killer = Killer(command)
    killer.run("save", "t", "--safe-replace", monitor=intercept(guest, on_command=killer).address)
    assert_all_is_well(
        guest, runtime_directory, {tmp_path / "disk0.qcow2": [stands], tmp_path / "disk1.qcow2": [stands]}
    )
    assert_loads(guest, state, before)


def save_and_go_on(guest: Guest) -> int:
    cli("save", "t", monitor=guest.address)
    before = guest.lines()[-1][0]
    guest.wait_for_ticks(10)
    return before


def assert_loads(guest: Guest, state: str, before: int) -> None:
    """Contents: the counter tells whose state it is, and the guest checks its disks against its RAM."""
    cli("load", "t", "--paused", monitor=guest.address)
    assert (guest.counter > before + 5) == (state == "new")
    cli("load", "t", "--running", monitor=guest.address)
    guest.assert_running()


@pytest.mark.parametrize(
    ("command", "safely"), [("snapshot-save", True), ("snapshot-delete", True), ("snapshot-save", False)]
)
@pytest.mark.skipif(not HAS_SNAPSHOT_JOBS, reason="the writes of HMP's savevm are not seen apart")
def test_qemu_is_killed(launch: Launch, intercept: Intercept, tmp_path: Path, command: str, safely: bool) -> None:
    """In the middle of the write, and as the older one goes: a whole snapshot is in the image, and can be loaded.

    The control is an ordinary replacement: QEMU killed in its write leaves none.
    """
    image = make_boot_disk(tmp_path / "a")
    disk = [*blockdev("a", image), *disk_device("a")]
    guest = launch(*disk, memory="256")
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.address)

    def kill(message: dict[str, Any]) -> None:
        if deed(message) == command == "snapshot-save":
            threading.Thread(target=kill_in_the_write, args=(guest, image, image.stat().st_blocks)).start()
        elif deed(message) == command:
            guest.process.kill()

    options = ["--safe-replace"] if safely else []
    run = finish(start_cli("save", "t", *options, monitor=intercept(guest, on_command=kill).address))
    # Through a proxy it cannot be seen that QEMU has ended.
    assert run.code in (4, 20), run.err
    guest.process.wait(30)
    assert_sound(image)
    whole = tags(image)
    if not safely:
        assert whole == []
        return
    assert whole
    assert set(whole) <= {"t", SECOND}
    second = launch(*disk, memory="256")
    cli("load", "t", monitor=second.address)
    second.assert_running()
    cli("save", "t", "--safe-replace", monitor=second.address)
    assert len(tags(image)) == 1


def kill_in_the_write(guest: Guest, image: Path, base: int) -> None:
    """End QEMU when it has written some of the state."""
    until("some of the state", lambda: image.stat().st_blocks > base + (16 << 20) // 512)
    guest.process.kill()


@both_monitors
def test_no_room_for_the_new_one(launch: Launch, tmp_path: Path) -> None:
    """The older snapshot is as it was."""
    image, spare = make_boot_disk(tmp_path / "a"), make_disk(tmp_path / "b")
    first = launch(*blockdev("a", image), *disk_device("a"), *blockdev("b", spare))
    first.wait_for_ticks()
    cli("save", "t", monitor=first.address)
    first.quit()
    guest = launch(*failing_disk("a", image, "vmstate_save", 28), *disk_device("a"), *blockdev("b", spare))
    guest.wait_for_ticks()
    run = cli("save", "t", "--safe-replace", monitor=guest.address, expect=9)
    assert "the older snapshot 't' is as it was; the guest is running" in run.err
    assert_nothing_left(guest, {image: ["t"], spare: ["t"]})


@both_monitors
def test_what_a_replacement_that_was_cut_short_has_left(guest: Guest, tmp_path: Path, transport: str) -> None:
    """Both names are taken: what cannot be loaded goes first, and what can be stays until the new one is complete."""
    before = save_and_go_on(guest)
    guest.qmp("blockdev-snapshot-internal-sync", device="disk1", name=SECOND)
    assert cli("save", "t", "--safe-replace", "--json", monitor=guest.address).json["replaced"] is True
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": [SECOND], tmp_path / "disk1.qcow2": [SECOND]})
    assert_loads(guest, "new", before)


def test_recover_names_what_is_left(guest: Guest, tmp_path: Path) -> None:
    """As after qsnap, its guard and QEMU all died when the new one was complete: both are whole, the newer counts."""
    guest.qmp.hmp("savevm t")
    guest.wait_for_ticks(3)
    guest.qmp.hmp(f"savevm {SECOND}")
    listed = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert [(one["tag"], one["kind"], one["disk_tag"]) for one in listed] == [
        (SECOND, "full", "t"), ("t", "full", SECOND),
    ]  # fmt: skip
    assert f"qsnap delete {SECOND}" in cli("recover", monitor=guest.address).err
    cli("delete", SECOND, monitor=guest.address)
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": [SECOND], tmp_path / "disk1.qcow2": [SECOND]})
    assert "replacement" not in cli("recover", monitor=guest.address).err


def test_what_cannot_be_meant(guest: Guest) -> None:
    cli("save", "x" * 248, "--safe-replace", monitor=guest.address)
    guest.qmp("query-status")
    guest.qmp.events.clear()
    run = cli("save", "x" * 248, "--safe-replace", monitor=guest.address, expect=2)
    assert "too long for a live save or a safe replacement" in run.err
    cli("save", "t", "--no-replace", "--safe-replace", monitor=guest.address, expect=2)
    guest.qmp("query-status")
    assert "STOP" not in [event["event"] for event in guest.qmp.events]


async def test_what_excludes_each_other_in_the_library(guest: Guest) -> None:
    async with qsnap.connect(guest.address) as vm:
        with pytest.raises(BadUsage):
            await vm.save("t", safe_replace=True, replace=False)
