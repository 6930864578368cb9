"""KVM, as far as it starts here: the sequences, and what they bring back.

The guest need not run: its RAM is written from outside, through QEMU's gdb stub.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.gdb import Stub
from support.guest import Guest, Launch, blockdev, cli, disk_device, make_boot_disk, needs_snapshot_jobs, tags


def _opens() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _opens(), reason="/dev/kvm does not open")

#: Where nothing of the firmware's is.
ADDRESS = 0x1000000
OLD, NEW = "11223344", "55667788"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_boot_disk(tmp_path / "a.qcow2")


@pytest.fixture
def guest(launch: Launch, image: Path, tmp_path: Path) -> Guest:
    args = (*blockdev("a", image), *disk_device("a"), "-gdb", f"unix:{tmp_path}/gdb,server=on,wait=off")
    guest: Guest = launch(*args, machine="q35,accel=kvm")
    assert "enabled" in guest.qmp.hmp("info kvm")
    return guest


@pytest.fixture
def stub(guest: Guest, tmp_path: Path) -> Iterator[Stub]:
    connected = Stub(tmp_path / "gdb")
    assert connected(f"M{ADDRESS:x},4:{OLD}") == "OK"
    yield connected
    connected.close()


@pytest.mark.parametrize("how", [[], ["--full"]], ids=["delta", "full"])
@pytest.mark.parametrize("kind", [[], pytest.param(["--live"], marks=needs_snapshot_jobs)], ids=["ordinary", "live"])
def test_what_a_load_brings_back(guest: Guest, stub: Stub, image: Path, kind: list[str], how: list[str]) -> None:
    guest.qmp("cont")
    cli("save", "t", *kind, monitor=guest.address)
    assert guest.runstate == "running"
    assert tags(image) == ["t"]
    guest.qmp("stop")
    assert stub(f"M{ADDRESS:x},4:{NEW}") == "OK"
    guest.qmp("cont")
    loaded = cli("load", "t", "--json", *how, monitor=guest.address).json
    assert guest.runstate == "running"
    if how:
        assert loaded["why_full"] == "it was asked for"
    guest.qmp("stop")
    assert stub(f"m{ADDRESS:x},4") == OLD
    assert cli("verify", monitor=guest.address).out.strip() == "t: whole"
