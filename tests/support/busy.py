"""A guest whose save takes long, and QEMU held still in the middle of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.guest import (
    Guest,
    Launch,
    blockdev,
    disk_device,
    make_boot_disk,
    tags,
    until,
)


def big_guest(launch: Launch, tmp_path: Path) -> tuple[Guest, Path]:
    """A guest whose save takes long enough to be interrupted."""
    image = make_boot_disk(tmp_path / "big")
    guest = launch(*blockdev("big", image), *disk_device("big"), memory="768")
    guest.wait_for_ticks()
    return guest, image


@contextmanager
def in_the_write(guest: Guest, image: Path) -> Iterator[None]:
    """QEMU held still in the middle of writing the VM state, however fast or busy the machine is.

    Only the image shows how far it is; so the save is to be one with --no-prepare, which would be seen there, too.
    """
    base = image.stat().st_blocks
    until("the VM state to be written", lambda: image.stat().st_blocks > base + (64 << 20) // 512 or None)
    guest.process.send_signal(signal.SIGSTOP)
    try:
        assert tags(image) == [], "the save has ended already"
        yield
    finally:
        guest.process.send_signal(signal.SIGCONT)
