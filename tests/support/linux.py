"""The Linux guest of the scripts: tests/support/guests/init.c on Debian's kernel, as scripts/get-linux makes it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.guest import Guest, blockdev, make_disk, until

ROOT = Path(__file__).resolve().parents[2]
#: MiB that the kernel needs beside what the guest fills.
KERNEL_MIB = 160


def boot_linux(directory: Path, *, fill: int, stamps: int = 256, iothread: bool = False) -> Guest:
    """The guest on two disks, counting.

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
