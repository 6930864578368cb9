"""The guests of the scripts, which write heavily, and check their RAM and two disks against each other on every tick.

Whatever comes from another moment than the rest is counted as a difference.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import qsnap.guest
from support.guest import Guest, blockdev, make_disk, tool, until

ROOT = Path(__file__).resolve().parents[2]
#: Ticks in which the guests check all their pages, and a little more.
ROUND = 70
#: MiB that the kernel needs beside what the guest fills.
KERNEL_MIB = 160


def boot_sector(directory: Path) -> Guest:
    """The boot-sector guest on two disks that have an iothread."""
    sector = (ROOT / "tests" / "support" / "guests" / "heavy.bin").read_bytes()
    qsnap.guest.make_disk(directory / "disk0", qemu_img=tool("qemu-img"), sector=sector)
    return Guest(
        "-object", "iothread,id=io",
        *blockdev("disk0", directory / "disk0"), "-device", "virtio-blk,drive=disk0,iothread=io",
        *blockdev("disk1", make_disk(directory / "disk1")), "-device", "virtio-blk,drive=disk1,iothread=io",
        memory="384",
    )  # fmt: skip


def boot_linux(directory: Path, *, fill: int, stamps: int = 256, iothread: bool = False) -> Guest:
    """tests/support/guests/init.c on Debian's kernel, as scripts/get-linux makes it, on two disks, counting.

    :param fill: MiB of its memory that are not zero.
    :param stamps: pages that it writes every 10 ms.
    :param iothread: the disks have one. Under TCG QEMU 10.0 and 11.1 (not 7.2) then lose an interrupt of theirs now and
        then when the guest is stopped and resumed, by whomever, and Linux waits for it for good: scripts/prove-live
        --control shows it.
    """
    linux = ROOT / ".venv" / "linux"
    subprocess.run([ROOT / "scripts" / "get-linux", linux], check=True)
    more = ",iothread=io" if iothread else ""
    append = f"console=ttyS0 quiet panic=-1 fill={fill} stamps={stamps}"
    guest = Guest(
        *(["-object", "iothread,id=io"] if iothread else []),
        *blockdev("disk0", make_disk(directory / "disk0")), "-device", f"virtio-blk,drive=disk0{more}",
        *blockdev("disk1", make_disk(directory / "disk1")), "-device", f"virtio-blk,drive=disk1{more}",
        "-kernel", str(linux / "vmlinuz"), "-initrd", str(linux / "initrd"),
        "-append", append, "-cpu", "max",
        memory=str(fill + fill // 8 + KERNEL_MIB),
    )  # fmt: skip
    try:
        until("Linux to count", lambda: len(guest.lines()) > 10 or None, 120)
    except AssertionError:
        guest.kill()
        raise
    return guest
