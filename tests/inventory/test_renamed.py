"""Images that QEMU calls otherwise than what they are called now: renamed, or relative to where it was started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsnap.host.processes import is_alive
from support.guest import (
    DEADLINE_S,
    QEMU,
    Guest,
    Launch,
    both_monitors,
    cli,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    tags,
    until,
)
from support.live import state_files

pytestmark = needs_snapshot_jobs


def drives(directory: Path) -> list[str]:
    """Two disks whose nodes have names of QEMU's own."""
    return ["-drive", f"file={make_boot_disk(directory / 'vm')},format=qcow2,if=virtio,id=hd0",
            "-drive", f"file={make_disk(directory / 'data')},format=qcow2,if=virtio,id=hd1"]  # fmt: skip


def assert_goes_back(guest: Guest, tag: str) -> None:
    at = guest.wait_for_ticks()
    cli("load", tag, monitor=guest.address)
    guest.assert_running()
    assert guest.lines()[-1][0] < at, "it has not gone back"


def test_renamed_while_qemu_has_it_open(launch: Launch, tmp_path: Path) -> None:
    """Both images, and a third in the place of one. What lies under the old name is named, and nothing is touched."""
    guest = launch(*drives(tmp_path))
    guest.wait_for_ticks()
    cli("save", "--live", "l0", monitor=guest.address)
    cli("save", "gold", monitor=guest.address)
    cli("protect", "gold", monitor=guest.address)
    (tmp_path / "vm").rename(tmp_path / "new")
    (tmp_path / "data").rename(tmp_path / "more")
    make_disk(tmp_path / "vm")

    before = {tmp_path / name: (tmp_path / name).read_bytes() for name in state_files(tmp_path)}
    assert [path.name for path in sorted(before)] == ["vm.l0.qsnap", "vm.qsnap-notes"]
    for command in ("load", "l0"), ("delete", "l0"), ("save", "--live", "l0"):
        (finding,) = cli(*command, "--json", monitor=guest.address, expect=6).error["findings"]
        assert finding["code"] == "state-file-left"
        assert f"'l0' is a live snapshot, and its state file lies at {tmp_path}/vm.l0.qsnap" in finding["message"]
        assert f"mv {tmp_path}/vm.l0.qsnap {tmp_path}/new.l0.qsnap" in finding["cure"]
    assert "is protected" in cli("delete", "gold", monitor=guest.address, expect=6).err
    moving = f"Rename it too: mv {tmp_path}/vm.qsnap-notes {tmp_path}/new.qsnap-notes"
    assert moving in cli("unprotect", "gold", monitor=guest.address, expect=1).err
    told = cli("list", monitor=guest.address).err
    assert moving in told
    assert f"mv {tmp_path}/vm.l0.qsnap" in told
    for item in guest.qmp("qom-list", path="/objects"):  # QEMU's own marks of what is protected
        if item["name"].startswith("qsnap-"):
            guest.qmp("object-del", id=item["name"])
    (finding,) = cli("delete", "gold", "--json", monitor=guest.address, expect=6).error["findings"]
    assert (finding["code"], f"mv {tmp_path}/vm.qsnap-notes" in finding["cure"]) == ("unseen-notes", True)
    guest.assert_running()
    assert before == {path: path.read_bytes() for path in before}
    assert tags(tmp_path / "new") == tags(tmp_path / "more") == ["l0", "gold"]

    (tmp_path / "vm.l0.qsnap").rename(tmp_path / "new.l0.qsnap")
    os.link(tmp_path / "vm.qsnap-notes", tmp_path / "new.qsnap-notes")
    assert moving not in cli("list", monitor=guest.address).err, "that would replace the notes beside the image"
    (tmp_path / "vm.qsnap-notes").unlink()
    assert_goes_back(guest, "l0")
    assert "is protected" in cli("delete", "gold", monitor=guest.address, expect=6).err
    cli("save", "--live", "l1", monitor=guest.address)
    assert state_files(tmp_path) == ["new.l0.qsnap", "new.l1.qsnap", "new.qsnap-notes"]
    assert_goes_back(guest, "l1")
    cli("unprotect", "gold", monitor=guest.address)
    cli("delete", "l0", "l1", "gold", monitor=guest.address)
    assert state_files(tmp_path) == []
    assert tags(tmp_path / "vm") == tags(tmp_path / "new") == tags(tmp_path / "more") == []


def test_in_a_directory_for_state_files(launch: Launch, tmp_path: Path) -> None:
    """There the names go by the image's, and so the image's is to be put right."""
    states = tmp_path / "states"
    states.mkdir()
    guest = launch(*drives(tmp_path))
    guest.wait_for_ticks()
    cli("save", "--live", "l0", "--state-dir", str(states), monitor=guest.address)
    (tmp_path / "vm").rename(tmp_path / "new")
    options = ("--state-dir", str(states))
    for command in ("load", "l0"), ("delete", "l0"):
        (finding,) = cli(*command, *options, "--json", monitor=guest.address, expect=6).error["findings"]
        assert f"give {tmp_path}/new the name that it had" in finding["cure"]
    (tmp_path / "new").rename(tmp_path / "vm")
    cli("load", "l0", *options, monitor=guest.address)
    guest.assert_running()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Path]:
    """The sockets' directory of a QEMU that works in / and was given its images relative to another directory."""
    images = tmp_path / "images"
    images.mkdir()
    make_boot_disk(images / "vm")
    make_disk(images / "data")
    pidfile = tmp_path / "pid"
    subprocess.run(
        [
            QEMU, "-machine", "q35,accel=tcg", "-m", "32", "-nodefaults", "-display", "none", "-daemonize",
            "-pidfile", pidfile, "-serial", "file:../serial",
            *(part for kind, name in (("qmp", "qmp"), ("monitor", "hmp"))
              for part in (f"-{kind}", f"unix:{tmp_path}/{name},server=on,wait=off")),
            "-drive", "file=vm,format=qcow2,if=virtio", "-drive", "file=./data,format=qcow2,if=virtio",
        ],
        cwd=images, check=True, timeout=DEADLINE_S,
    )  # fmt: skip
    pid = int(pidfile.read_text())
    yield tmp_path
    os.kill(pid, 9)
    until("QEMU's end", lambda: not is_alive(pid))


def test_relative_to_a_directory_that_qemu_has_left(daemon: Path) -> None:
    images, monitor = daemon / "images", str(daemon / "qmp")

    def counted() -> int:
        return len((daemon / "serial").read_text().splitlines())

    until("the guest", lambda: counted() > 40)
    cli("save", "--live", "l0", monitor=monitor)
    assert state_files(images) == ["vm.l0.qsnap"]
    cli("protect", "l0", monitor=monitor)
    assert (images / "vm.qsnap-notes").exists()
    assert "is protected" in cli("delete", "l0", monitor=str(daemon / "hmp"), expect=6).err
    at = counted()
    until("the guest", lambda: counted() > at + 10)
    cli("load", "l0", monitor=monitor)
    at = counted()
    until("the guest", lambda: counted() > at + 10)
    assert (daemon / "serial").read_text().splitlines()[-1].endswith("bad=0000")

    (images / "vm").rename(images / "new")
    cure = cli("load", "l0", "--json", monitor=monitor, expect=6).error["findings"][0]["cure"]
    assert f"mv {images}/vm.l0.qsnap {images}/new.l0.qsnap" in cure
    assert "is protected" in cli("delete", "l0", monitor=monitor, expect=6).err


@both_monitors
def test_two_that_cannot_be_told_apart(launch: Launch, tmp_path: Path) -> None:
    """Fresh images under new names: no files are put beside either. They are called as the user calls them."""
    guest = launch(*drives(tmp_path))
    (tmp_path / "vm").rename(tmp_path / "new")
    (tmp_path / "data").rename(tmp_path / "more")
    guest.wait_for_ticks()
    refused = cli("save", "a", "--description", "x", monitor=guest.address, expect=5).err
    assert "beside the image of hd0: it cannot be seen from here" in refused
    cli("save", "a", monitor=guest.address)
    described = cli("describe", "a", "x", monitor=guest.address).err
    assert described == ""
    assert (tmp_path / "new.qsnap-notes").exists(), "the one with the VM state is told by that"
