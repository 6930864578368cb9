"""A snapshot of another machine is refused while the guest runs on, and each refusal has its twin: QEMU's own failure.

What QEMU would load is not refused, and the contents are right afterwards.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import qsnap
from qsnap.errors import PrecheckRefused
from qsnap.inventory.machine import Contents, Devices, of_devices
from qsnap.inventory.stream import Unknown
from qsnap.model.machine import Machine, RamBlock, Section
from qsnap.operations.same_machine import Hardware, differences
from support.guest import (
    Guest,
    Launch,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    make_boot_disk,
    needs_snapshot_jobs,
    qemu_version,
)

#: QEMU tells the monitor all that it knows, and writes nothing to its log.
HAS_LONG_ERRORS = qemu_version() >= (11, 0)
DISK = disk_device("disk")
NIC = "virtio-net-pci,addr=11"
XHCI = ["-device", "qemu-xhci,addr=13"]
#: (machine, RAM in MiB, more) of the guest that is saved, and the same of the one that loads.
Kind = tuple[str, str, list[str]]


def kind(*more: str, machine: str = "q35", memory: str = "32") -> Kind:
    return machine, memory, [*more]


#: What HMP tells without any effect on the guest.
SEEN: dict[str, tuple[Kind, Kind, str]] = {
    "memory": (kind(), kind(memory="48"), "RAM block pc.ram has 50,331,648 bytes, and had 33,554,432"),
    "less memory": (kind(memory="48"), kind(), "start the guest with -m 48M"),
    "machine type": (kind(), kind(machine="pc"), "the machine type is pc-i440fx-"),
    "machine version": (kind(machine="pc-q35-6.2"), kind(), "start the guest with -machine pc-q35-6.2"),
    "no NIC": (kind("-device", NIC), kind(), "the device virtio-net of PCI address 11.0 is missing"),
    "NIC moved": (
        kind("-device", NIC),
        kind("-device", "virtio-net-pci,addr=12"),
        "the device virtio-net of PCI address 11.0 is at 12.0 now",
    ),
    "NIC of another model": (
        kind("-device", NIC),
        kind("-device", "e1000,addr=11"),
        "at PCI address 11.0 is e1000 (8086:100e), and was virtio-net (1af4:1000)",
    ),
    "behind a bridge": (
        kind("-device", "pcie-root-port,id=rp,addr=12,slot=3", "-device", "virtio-rng,bus=rp"),
        kind("-device", "pcie-root-port,id=rp,addr=12,slot=3"),
        "the device virtio-rng of PCI address 12.0:00.0 is missing",
    ),
    "fewer vCPUs": (kind("-smp", "2"), kind(), "the guest has 1 vCPU, and had 2"),
    "video memory": (
        kind("-device", "VGA,addr=14"),
        kind("-device", "VGA,addr=14,vgamem_mb=8"),
        "RAM block 0000:00:14.0/vga.vram has 8,388,608 bytes, and had 16,777,216",
    ),
}
#: What takes QEMU's own list of devices.
WRITTEN: dict[str, tuple[Kind, Kind, str]] = {
    "no serial port": (kind("-serial", "null"), kind(), "there are fewer devices serial than at the save"),
    "no USB tablet": (
        kind(*XHCI, "-device", "usb-tablet"),
        kind(*XHCI),
        "the device 0000:00:13.0/1/usb-ptr is missing",
    ),
    "no user network": (
        kind("-netdev", "user,id=n", "-device", f"{NIC},netdev=n"),
        kind("-device", NIC),
        "the device slirp is missing",
    ),
    "more queues": (
        kind("-device", f"{NIC},mq=on,vectors=10"),
        kind("-device", NIC),
        "the device 0000:00:11.0/virtio-net has 4 interrupt vectors (MSI-X), and had 10",
    ),
}
if qemu_version() >= (11, 0):  # before, the firmware of this guest does not use the list
    WRITTEN["more places for vCPUs"] = (kind(), kind("-smp", "1,maxcpus=2"), "lists other numbers of vCPUs")

#: What QEMU loads.
ACCEPTED: dict[str, tuple[Kind, Kind]] = {
    "a new NIC": (kind(), kind("-device", NIC)),
    "a new serial port": (kind(), kind("-serial", "null")),
    "more vCPUs": (kind("-smp", "1,maxcpus=2"), kind("-smp", "2")),
    "another CPU model": (kind("-cpu", "Haswell"), kind("-cpu", "Nehalem")),
    "a device whose state does not begin with its configuration": (kind("-device", "sdhci-pci"),) * 2,
    "features of a NIC": (kind("-device", f"{NIC},csum=off"), kind("-device", NIC)),
}


def launched(launch: Launch, image: Path, of: Kind) -> Guest:
    machine, memory, more = of
    return launch(*blockdev("disk", image), *DISK, *more, memory=memory, machine=f"{machine},accel=tcg")


def saved(launch: Launch, image: Path, of: Kind, tag: str = "t") -> int:
    """Save a guest, and end it; its counter just before."""
    guest = launched(launch, image, of)
    guest.wait_for_ticks(3)
    counter = guest.counter
    assert guest.qmp.hmp(f"savevm {tag}") == ""
    guest.quit()
    return counter


def assert_refused(guest: Guest, text: str) -> None:
    guest.wait_for_ticks(3)
    before = guest.counter
    run = cli("load", "t", monitor=guest.address, expect=6)
    assert text in run.err
    assert "another machine" in run.err
    guest.assert_running()
    assert guest.counter > before


def assert_fails_in_qemu(guest: Guest) -> None:
    """The twin of a refusal: QEMU does not load it. What it says of that in its log is quoted."""
    before = guest.log
    run = cli("load", "t", "--force", monitor=guest.address, expect=20)
    assert "RAM and disks may be half restored" in run.err
    added = guest.log.removeprefix(before).splitlines()
    assert all(line in run.err for line in added)
    assert added or HAS_LONG_ERRORS
    assert guest.runstate != "running"


@pytest.mark.parametrize("what", SEEN)
def test_seen_from_outside(launch: Launch, tmp_path: Path, what: str) -> None:
    """Nothing has stopped the guest."""
    then, now, text = SEEN[what]
    image = make_boot_disk(tmp_path / "disk")
    saved(launch, image, then)
    guest = launched(launch, image, now)
    guest.qmp.events.clear()
    assert_refused(guest, text)
    guest.qmp("query-status")
    assert [event["event"] for event in guest.qmp.events if event["event"] in ("STOP", "RESUME")] == []
    assert_fails_in_qemu(guest)


@needs_snapshot_jobs
async def test_it_is_told_before_a_load_is_due(launch: Launch, tmp_path: Path) -> None:
    """Wherever the VM state is."""
    image = make_boot_disk(tmp_path / "disk")
    guest = launched(launch, image, kind())
    guest.wait_for_ticks(3)
    for options in ["full"], ["--live", "live"]:
        cli("save", *options, monitor=guest.address)
    guest.quit()
    guest = launched(launch, image, kind(memory="48"))
    async with qsnap.connect(guest.address) as vm:
        for tag in "full", "live":
            with pytest.raises(PrecheckRefused, match="another machine"):
                await vm.check_load(tag)


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)
def test_over_hmp(launch: Launch, tmp_path: Path) -> None:
    then, now, text = SEEN["NIC moved"]
    image = make_boot_disk(tmp_path / "disk")
    saved(launch, image, then)
    guest = launched(launch, image, now)
    assert_refused(guest, text)


@pytest.mark.parametrize("what", WRITTEN)
def test_seen_in_qemus_devices(launch: Launch, tmp_path: Path, what: str) -> None:
    then, now, text = WRITTEN[what]
    image = make_boot_disk(tmp_path / "disk")
    saved(launch, image, then)
    guest = launched(launch, image, now)
    assert_refused(guest, text)
    assert_fails_in_qemu(guest)


@pytest.mark.no_qemu
def test_what_cannot_be_told_is_not_refused() -> None:
    """A QEMU whose human monitor tells nothing of its machine; and one that writes its devices in another way."""
    sections = (Section(name="cpu_common", instance=0, version=1, size=1),)
    machine = Machine(name="pc-q35-7.2", ram_blocks=(RamBlock(name="pc.ram", size=1 << 20),), sections=sections)
    assert [*differences(Contents(machine, Devices(sections, {}, {})), Hardware("", {}, {}, 0))] == []
    one = b"\4\0\0\0\1\3dev\0\0\0\0\0\0\0\1state\x7e\0\0\0\1\0"
    assert of_devices(b"QEVM\0\0\0\3" + one).sections == (Section(name="dev", instance=0, version=1, size=5),)
    for data in (b"", one, bytes(8) + one, b"QEVM\0\0\0\3" + bytes(100)):
        with pytest.raises(Unknown):
            of_devices(data)


@both_monitors
@pytest.mark.parametrize("what", ACCEPTED)
def test_qemu_loads_it(launch: Launch, tmp_path: Path, what: str) -> None:
    then, now = ACCEPTED[what]
    image = make_boot_disk(tmp_path / "disk")
    counter = saved(launch, image, then)
    guest = launched(launch, image, now)
    guest.wait_for_ticks(counter + 10)
    before = guest.counter
    cli("load", "t", monitor=guest.address)
    guest.assert_running()
    assert counter <= guest.lines()[-1][0] < before
