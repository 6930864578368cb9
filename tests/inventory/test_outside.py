"""Devices of which a part lies outside QEMU: data that are in no snapshot, and memory that others write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsnap.monitor.hmp import tables as hmp_tables
from support.disks import disk
from support.guest import (
    DEADLINE_S,
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    tags,
    tool,
    until,
)
from support.reports import findings

#: RAM that another process can map.
SHARED = ("-object", "memory-backend-memfd,id=m,size=32M,share=on", "-machine", "memory-backend=m")


class Backend:
    """A process that serves a disk by vhost-user, as SPDK does.

    :ivar options: QEMU's, for its device "vub".
    """

    def __init__(self, directory: Path) -> None:
        self.image = make_disk(directory / "vub.raw", "8M", "raw")
        path = directory / "vub.sock"
        self._process = subprocess.Popen(
            [
                tool("qemu-storage-daemon"),
                "--blockdev", f"driver=file,node-name=f,filename={self.image}",
                "--export", f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={path},writable=on",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until("the disk's server", lambda: path.exists() or self._process.poll() is not None)
        self.options = ("-chardev", f"socket,id=c,path={path}", "-device", "vhost-user-blk-pci,chardev=c,id=vub")

    def end(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    running = Backend(tmp_path)
    yield running
    running.end()


@pytest.fixture
def beside(launch: Launch, backend: Backend, tmp_path: Path) -> Guest:
    """The counting guest on a qcow2 disk and on one that another process serves."""
    guest = launch(
        *SHARED, *blockdev("disk0", make_boot_disk(tmp_path / "disk0")), *disk_device("disk0"),
        *backend.options,
    )  # fmt: skip
    guest.wait_for_ticks()
    return guest


@both_monitors
def test_a_disk_of_another_process(beside: Guest, tmp_path: Path) -> None:
    """It is in no snapshot: refused by name, unless it is left out; and the guest sees then that it did not go back."""
    found = findings(beside)
    assert list(found) == ["device-cannot-snapshot"]
    assert found["device-cannot-snapshot"]["message"].startswith("Device 'vub' (vhost-user-blk-pci) cannot be")
    assert found["device-cannot-snapshot"]["cure"].endswith("--exclude vub")
    assert tags(tmp_path / "disk0") == []
    assert "vub" in cli("check", monitor=beside.address, expect=6).out

    saved = cli("save", "t", "--exclude", "vub", "--json", monitor=beside.address).json
    names = saved["labels"]
    assert (saved["kind"], [names.get(one, one) for one in saved["excluded"]]) == ("partial", ["vub"])
    (listed,) = cli("list", "--json", monitor=beside.address).json["snapshots"]
    assert (listed["kind"], [names.get(one, one) for one in listed["missing"]]) == ("partial", ["vub"])
    beside.assert_running()
    beside.wait_for_ticks()
    refused = cli("load", "t", monitor=beside.address, expect=6).err
    assert "--exclude vub" in refused
    assert "keep the contents that it has now" in refused
    beside.assert_running()

    loaded = cli("load", "t", "--exclude", "vub", "--json", monitor=beside.address).json
    assert [names.get(one, one) for one in loaded["excluded"]] == ["vub"]
    beside.wait_for_ticks(3)
    assert beside.lines()[-1][1] > 0, "the disk went back, so there was no need to refuse"


def test_it_is_seen_when_it_is_plugged(launch: Launch, backend: Backend, tmp_path: Path) -> None:
    """A snapshot made before lacks it."""
    guest = launch(*SHARED, *disk(tmp_path, "a"), "-device", "pcie-root-port,id=hole")
    assert cli("save", "t", "--json", monitor=guest.address).json["kind"] == "full"
    path = backend.options[1].partition("path=")[2]
    socket = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": path}}, "server": False}}
    guest.qmp("chardev-add", id="c", backend=socket)
    guest.qmp("device_add", driver="vhost-user-blk-pci", id="vub", chardev="c", bus="hole")
    assert "--exclude vub" in cli("load", "t", monitor=guest.address, expect=6).err
    if HAS_SNAPSHOT_JOBS:  # QEMU 5.2 itself fails where the port was empty
        cli("load", "t", "--exclude", "/machine/peripheral/vub", monitor=guest.address)


@both_monitors
def test_memory_that_is_not_in_the_state(launch: Launch, tmp_path: Path) -> None:
    """Its data are in a file of its own. Without an id it goes by its path."""
    (tmp_path / "pm").write_bytes(bytes(2 << 20))
    guest = launch(
        *disk(tmp_path, "a"), "-object", f"memory-backend-file,id=pm,share=on,mem-path={tmp_path}/pm,size=2M",
        "-device", "virtio-pmem-pci,memdev=pm", memory="16,maxmem=64M",
    )  # fmt: skip
    found = findings(guest)
    path = found["device-cannot-snapshot"]["node"]
    assert path.startswith("/machine/peripheral-anon/device[")
    assert f"--exclude '{path}'" in found["device-cannot-snapshot"]["cure"]
    saved = cli("save", "t", "--exclude", path, "--json", monitor=guest.address).json
    assert (saved["kind"], saved["excluded"]) == ("partial", [path])
    cli("load", "t", "--exclude", path, monitor=guest.address)


#: A process that has the guest's memory mapped, as whoever serves a vhost-user device has; it ends with its input.
MAPPER = """
import mmap, os, sys
pid = sys.argv[1]
(number, *_) = [n for n in os.listdir(f"/proc/{pid}/fd") if "/memfd:" in os.readlink(f"/proc/{pid}/fd/{n}")]
memory = mmap.mmap(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


@needs_snapshot_jobs
def test_live_beside_a_disk_of_another_process(beside: Guest) -> None:
    """Its server writes into RAM: not live, and --live=auto saves the ordinary way."""
    refused = cli("save", "--live", "t", "--exclude", "vub", monitor=beside.address, expect=5).err
    assert "device 'vub' (vhost-user-blk-pci)" in refused
    saved = cli("save", "--live=auto", "t", "--exclude", "vub", "--json", monitor=beside.address).json
    assert saved["file"] is None
    assert "vub" in saved["warnings"][-1]["message"]
    beside.assert_running()


@needs_snapshot_jobs
def test_live_while_another_process_has_memory_mapped(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*SHARED, *disk(tmp_path, "a"))
    mapper = subprocess.Popen(
        [sys.executable, "-c", MAPPER, str(guest.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert mapper.stdout is not None
        assert mapper.stdout.readline() == "mapped\n"
        assert f"process {mapper.pid}" in cli("save", "--live", "t", monitor=guest.address, expect=5).err
        assert cli("save", "--live=auto", "t", "--json", monitor=guest.address).json["file"] is None
    finally:
        mapper.communicate(timeout=DEADLINE_S)
    assert cli("save", "--live", "u", "--json", monitor=guest.address).json["kind"] == "live"


def test_networks_served_by_others() -> None:
    """As QEMU prints them (net/net.c: print_net_client)."""
    text = (
        "nic: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n"
        " \\ vn: index=0,type=vhost-user,vhost-user0 to unix:/run/vn.sock\n"
        "vhost-user1: index=0,type=tap,ifname=tap0\n"
        "vd: index=0,type=vhost-vdpa,vhost-vdpa0\n"
        "hub 0\n \\ u: index=0,type=user,net=10.0.2.0,restrict=off\n"
    )
    assert hmp_tables.outside_networks(text) == ("vn", "vd")
