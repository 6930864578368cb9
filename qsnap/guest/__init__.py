"""The guest that fits into a boot sector, for the demo, the tests and the benchmarks.

Its source is ``boot.asm`` beside this file, and says what it does: it counts on its serial port, and checks
its disks against its RAM on every tick.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

#: Where in RAM it counts, and where it keeps the number of differences it has seen (32 bits each).
COUNTER = 0x600
BAD = 0x604

#: The table on its disks: sectors, each full of the count that was last written to it.
TABLE_OFFSET = 64 * 512
TABLE_SLOTS = 8

#: A disk's size in bytes; the guest uses the first 48 KiB.
DISK_BYTES = 8 << 20


def boot_sector() -> bytes:
    """The 512 bytes."""
    return Path(__file__).with_name("boot.bin").read_bytes()


def make_disk(
    path: Path,
    *,
    qemu_img: str = "qemu-img",
    driver: str = "qcow2",
    options: Sequence[str] = (),
    sector: bytes | None = None,
) -> None:
    """Create a disk image that boots the guest.

    :param options: for ``qemu-img convert``, such as ``-o``, ``refcount_bits=1``.
    :param sector: another boot sector than the counting guest's.
    :raise FileNotFoundError: there is no qemu-img.
    :raise subprocess.CalledProcessError: qemu-img failed.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".boot-") as raw:
        raw.write(sector or boot_sector())
        raw.truncate(DISK_BYTES)
        raw.flush()
        subprocess.run(
            [qemu_img, "convert", "-f", "raw", "-O", driver, *options, raw.name, str(path)], check=True, timeout=60
        )


def disk_counter(path: Path, *, qemu_img: str = "qemu-img") -> int:
    """The highest count on a disk of the guest, which may be in use; the guest should be paused."""
    with tempfile.NamedTemporaryFile(prefix="qsnap-table-") as raw:
        subprocess.run([qemu_img, "convert", "-U", "-O", "raw", str(path), raw.name], check=True, timeout=60)
        table = raw.read()[TABLE_OFFSET:]
    return max(int.from_bytes(table[slot * 512 : slot * 512 + 4], "little") for slot in range(TABLE_SLOTS))
