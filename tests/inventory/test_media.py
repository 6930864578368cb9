"""Media that the VM state had better not go into, or beside which no file can be: what is said, and that it helps."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.guest import (
    DEADLINE_S,
    HAS_SNAPSHOT_JOBS,
    Launch,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    state_sizes,
    tool,
    until,
)
from support.reports import findings


def drive(name: str, path: Path, driver: str = "qcow2") -> list[str]:
    return ["-drive", f"file={path},format={driver},if=none,id={name}"]


@both_monitors
def test_removable_media_that_hold_the_state(launch: Launch, tmp_path: Path, transport: str) -> None:
    """A floppy and a stick come first. It is said, and not where the user has chosen."""
    guest = launch(
        "-drive", f"file={make_disk(tmp_path / 'fd', '1440K')},format=qcow2,if=floppy,id=fd",
        *drive("stick", make_disk(tmp_path / "stick")), "-device", "qemu-xhci", "-device", "usb-storage,drive=stick",
        *drive("hd0", make_boot_disk(tmp_path / "hd0")), *disk_device("hd0"),
        machine="pc,accel=tcg",
    )  # fmt: skip
    guest.wait_for_ticks()
    (found,) = findings(guest, ok=True).values()
    assert (found["code"], found["severity"]) == ("vmstate-removable", "warn")
    assert found["message"].startswith("QEMU's choice for the VM state is fd, a removable medium")
    chooses = HAS_SNAPSHOT_JOBS and transport == "qmp"
    assert found["cure"] == ("" if chooses else "over QMP: ") + "--vmstate hd0"
    saved = cli("save", "t", "--json", monitor=guest.address).json
    assert [one["code"] for one in saved["warnings"]] == ["vmstate-removable"]
    if chooses:
        assert findings(guest, "--vmstate", "hd0", ok=True) == {}
        assert findings(guest, "--vmstate", "fd", ok=True) == {}
        assert cli("save", "--live", "l", "--json", monitor=guest.address).json["warnings"] == []
        cli("save", "t", "--vmstate", "hd0", monitor=guest.address)
        assert (state_sizes(tmp_path / "fd")["t"], state_sizes(tmp_path / "hd0")["t"] > 0) == (0, True)
    guest.assert_running()


@needs_snapshot_jobs
def test_a_stick_is_removable(launch: Launch, tmp_path: Path) -> None:
    """Alone it is told what helps; QEMU itself does not call it removable."""
    guest = launch(
        "-drive", f"file={make_disk(tmp_path / 'a')},format=qcow2,if=none,id=a", "-device", "qemu-xhci",
        "-device", "usb-storage,drive=a,id=stick",
    )  # fmt: skip
    (found,) = findings(guest, ok=True).values()
    assert found["code"] == "vmstate-removable"
    assert found["cure"] == "give the guest a qcow2 disk (of any size), and name it with --vmstate"


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[str]:
    """A qcow2 image of 8 MiB, stored in an export that is too small for any VM state beside it: its address."""
    image = make_boot_disk(tmp_path / "small")
    with image.open("r+b") as file:
        file.truncate(4 << 20)
    path = tmp_path / "nbd"
    server = subprocess.Popen([tool("qemu-nbd"), "-t", "-f", "raw", "-k", str(path), str(image)])
    until("the export", lambda: path.exists() or server.poll() is not None)
    yield str(path)
    server.kill()
    server.wait(DEADLINE_S)


@both_monitors
def test_an_export_that_cannot_grow(launch: Launch, exported: str, tmp_path: Path, transport: str) -> None:
    """QEMU gives an input/output error. It is said before, with cures that work."""
    guest = launch(
        *("-blockdev", "driver=nbd,node-name=n,server.type=unix,server.path=" + exported),
        *("-blockdev", "driver=qcow2,node-name=hd,file=n", *disk_device("hd")),
    )  # fmt: skip
    guest.wait_for_ticks()
    knows = transport == "qmp"  # a human monitor gives no exact sizes
    (found,) = findings(guest, ok=not knows).values()
    assert found["code"] == ("no-room" if knows else "cannot-grow")
    assert "hd is stored by driver nbd, where it cannot grow: " in found["message"]
    assert ("4,194,304 bytes" in found["message"]) == knows
    if HAS_SNAPSHOT_JOBS and knows:
        assert "(driver nbd)" in cli("save", "--live", "l", monitor=guest.address, expect=5).err
        saved = cli("save", "--live", "l", "--json", "--state-dir", str(tmp_path), monitor=guest.address).json
        assert exported in saved["file"]["image"], "QEMU's next start may give the node another name"
        at = guest.wait_for_ticks()
        cli("load", "l", "--state-dir", str(tmp_path), monitor=guest.address)
        guest.assert_running()
        assert guest.lines()[-1][0] < at
        cli("delete", "l", "--state-dir", str(tmp_path), monitor=guest.address)
    failed = cli("save", "t", "--force", monitor=guest.address, expect=9)
    assert "hd is stored by driver nbd, where it cannot grow" in failed.err
    guest.assert_running()
    assert guest.node_tags("hd") == []


def test_an_export_beside_a_file(launch: Launch, exported: str, tmp_path: Path) -> None:
    """The only image that QEMU has open as a file is not taken for the exported one."""
    guest = launch(
        *blockdev("boot", make_boot_disk(tmp_path / "boot")), *disk_device("boot"),
        *("-blockdev", "driver=nbd,node-name=n,server.type=unix,server.path=" + exported),
        *("-blockdev", "driver=qcow2,node-name=far,file=n", *disk_device("far", 1)),
    )  # fmt: skip
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.address)
    assert "far: its image cannot be seen from here" in cli("verify", "t", monitor=guest.address, expect=5).out


@needs_snapshot_jobs
def test_where_no_file_can_be_beside_the_image(launch: Launch, tmp_path: Path) -> None:
    """The overlay of snapshot=on: why a live save is not possible, on the device that the user knows, and the cure."""
    guest = launch("-drive", f"file={make_boot_disk(tmp_path / 'a')},format=qcow2,if=virtio,id=hd0,snapshot=on")
    guest.wait_for_ticks()
    refused = cli("save", "--live", "l", monitor=guest.address, expect=5).err
    assert "beside the image of hd0: it is the temporary overlay of snapshot=on" in refused
    (warning,) = findings(guest, ok=True).values()
    assert warning["message"].startswith("hd0 was opened with snapshot=on")
    options = ("--state-dir", str(tmp_path))
    cli("save", "--live", "l", *options, monitor=guest.address)
    at = guest.wait_for_ticks()
    cli("load", "l", *options, monitor=guest.address)
    guest.assert_running()
    assert guest.lines()[-1][0] < at


@both_monitors
def test_directories_and_old_formats(launch: Launch, tmp_path: Path) -> None:
    """Each is called as the user calls it, with what can be done about it."""
    (tmp_path / "shared").mkdir()
    guest = launch(
        "-drive", f"file=fat:rw:{tmp_path}/shared,format=raw,if=virtio,id=dir",
        *drive("old", make_disk(tmp_path / "old", driver="qcow"), "qcow"), *disk_device("old"),
        "-drive", f"file={make_disk(tmp_path / 'a')},format=qcow2,if=virtio",
    )  # fmt: skip
    found = cli("check", "--json", monitor=guest.address, expect=6).json["findings"]
    cures = {one["message"]: one["cure"] for one in found}
    assert "#block" not in str(cures)
    assert [
        cure
        for message, cure in cures.items()
        if "'old'" in message and "(driver qcow over file)" in message and "convert -O qcow2" in cure
    ]
    directory = [cure for message, cure in cures.items() if "'dir'" in message or "vvfat" in message]
    assert directory
    assert all("read-only (without rw)" in cure for cure in directory), cures
