"""Guests for live saves, and whether what was loaded is of one moment."""

from __future__ import annotations

from pathlib import Path

import qsnap.guest
from qsnap.inventory import lineage
from support.guest import (
    GUESTS,
    Guest,
    blockdev,
    disk_device,
    make_disk,
    tool,
)

#: A round of the guest's blocks of pages, and a little more.
ROUND = 70


def make_heavy_disk(path: Path) -> Path:
    sector = (GUESTS / "heavy.bin").read_bytes()
    qsnap.guest.make_disk(path, qemu_img=tool("qemu-img"), sector=sector)
    return path


def two_disks(d: Path) -> list[str]:
    return [*blockdev("disk0", make_heavy_disk(d / "disk0")), *disk_device("disk0", 0),
            *blockdev("disk1", make_disk(d / "disk1")), *disk_device("disk1", 1)]  # fmt: skip


def state_files(directory: Path) -> list[str]:
    """What qsnap keeps there, but for which snapshot was made from which."""
    names = (path.name for path in directory.iterdir())
    return sorted(name for name in names if ".qsnap" in name and not name.endswith(lineage.SUFFIX))


def assert_in_order(guest: Guest) -> None:
    """Over a whole round of its pages and disk slots the guest finds nothing of another moment."""
    guest.wait_for_ticks(ROUND)
    assert guest.lines()[-1][1] == 0, f"differences: {guest.lines()[-3:]}"
