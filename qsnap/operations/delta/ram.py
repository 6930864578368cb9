"""Where the guest's RAM lies in QEMU's memory, and whether a delta load of it is right.

Facts (QEMU's source; trials on 7.2, 10.0 and 11.1):

* The RAM of the guest is that of memory backends (``query-memdev``), the one that ``-m`` makes among them. A backend's
  block has its id in the stream, or the id behind "/objects/". All other blocks (video memory, firmware, option ROMs)
  are small; and a reset, which is a part of any load, writes some of them. They are loaded whole.
* A reset of a PC writes into RAM what ``info roms`` shows there (an ELF kernel, -device loader), and nothing else.
* A stopped guest's RAM is still: QEMU has ended all requests to disks, and takes no packets and no input. But some
  devices go on to take what comes from outside: a virtio-serial port, virtio-rng, a redirected USB device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qsnap.model import outside
from qsnap.model.qemu import Peripheral
from qsnap.monitor import Monitor
from qsnap.monitor.hmp import ram
from qsnap.monitor.qmp.replies import Memdev
from qsnap.operations.delta import NoDelta
from qsnap.operations.delta.difference import Block
from qsnap.operations.writers import other_writers
from qsnap.targets.running import is_qemu

#: Machines of which it is known what their reset writes, by what their names begin with.
_BOARDS = ("pc-i440fx-", "pc-q35-")
#: Blocks of RAM with a PC's firmware: without flash memory, and with it.
_FIRMWARE = ("pc.bios", "system.flash0")
#: Ranges of a block that are asked about. A PC shows one in two or three.
_MOST_RANGES = 16


class GuestRam(NamedTuple):
    """The guest's RAM.

    :ivar pid: the QEMU process.
    :ivar blocks: by their names in the stream.
    :ivar roms: the files that each reset writes into it.
    :ivar is_still: certainly nothing writes it while the guest is stopped.
    :ivar firmware: the memory of the firmware, which the guest cannot write and each load does, where it was asked for.
    """

    pid: int
    blocks: Mapping[str, Block]
    roms: Sequence[str]
    is_still: bool
    firmware: Sequence[Block] = ()

    def refuse_board(self, machine: str) -> None:
        """Check that the reset in a load of *machine* does not change RAM.

        :raise NoDelta: it may change RAM.
        """
        if self.roms:
            raise NoDelta(f"a reset writes {self.roms[0]!r} into RAM")
        if not machine.startswith(_BOARDS):
            raise NoDelta(f"it is not known what a reset of the machine {machine!r} writes into RAM")


def process(monitor: Monitor) -> int:
    """The QEMU process.

    :raise NoDelta: it cannot be seen from here, or its monitor cannot load a stream of ours.
    """
    if monitor.live_obstacle:
        raise NoDelta(monitor.live_obstacle)
    if monitor.pid is None or not is_qemu(monitor.pid):
        raise NoDelta("QEMU's process cannot be seen from here")
    return monitor.pid


async def find(monitor: Monitor, pid: int, peripherals: Sequence[Peripheral], *, firmware: bool) -> GuestRam:
    """Find the guest's RAM.

    :param pid: the QEMU process, as :func:`process` finds it.
    :param peripherals: the guest's devices.
    :param firmware: find the firmware, too.
    :raise NoDelta: the RAM cannot be seen, or other processes may write it.
    """
    try:
        writers = await other_writers(monitor, peripherals)
    except OSError as error:
        raise NoDelta("the guest's memory is shared, and it cannot be seen with whom") from error
    if writers:
        raise NoDelta(f"{writers[0]} may write into the guest's memory")
    memdevs, text, roms = await asyncio.gather(
        monitor.live.memdevs(), monitor.human_answer("info ramblock"), monitor.human_answer("info roms")
    )
    rows = ram.ram_blocks(text)
    of_backends = [row for memdev in memdevs for row in _of_backend(memdev, rows)]
    roms_of_board = [row for row in rows if firmware and row.name in _FIRMWARE]
    found = await _blocks(monitor, [*of_backends, *roms_of_board])
    blocks = {row.name: found[row.name] for row in of_backends if row.name in found}
    if not blocks:
        raise NoDelta("QEMU does not tell where the guest's memory lies")
    is_still = all(outside.is_still(one.model) for one in peripherals)
    in_roms = [found[row.name] for row in roms_of_board if row.name in found]
    return GuestRam(pid, blocks, ram.roms_in_ram(roms), is_still, in_roms)


def _of_backend(memdev: Memdev, rows: Sequence[ram.RamBlock]) -> list[ram.RamBlock]:
    """The block that certainly is that memory backend; none if no one is."""
    names = (memdev.id, f"/objects/{memdev.id}")
    same = [row for row in rows if row.name in names and row.used == row.size == memdev.size]
    return same if len(same) == 1 and memdev.id else []


async def _blocks(monitor: Monitor, rows: Sequence[ram.RamBlock]) -> dict[str, Block]:
    """Those blocks whose addresses are certain."""
    found: dict[str, Block] = {}
    ranges: list[ram.Range] | None = None
    for row in rows:
        address = row.address
        if address is None:
            if ranges is None:
                ranges = ram.ram_ranges(await monitor.human_answer("info mtree -f"))
            backend = row.name.removeprefix("/objects/")
            names, is_rom = (backend, f"/objects/{backend}"), row.name in _FIRMWARE
            address = await _address(monitor, [one for one in ranges if one.region in names and one.is_rom is is_rom])
        if address is not None:
            found[row.name] = Block(row.size, address)
    return found


async def _address(monitor: Monitor, ranges: Sequence[ram.Range]) -> int | None:
    """Where a block begins, by all ranges at which the guest sees it; None where these do not agree."""
    if not 0 < len(ranges) <= _MOST_RANGES:
        return None
    answers = await asyncio.gather(*(monitor.human_answer(f"gpa2hva {one.first:#x}") for one in ranges))
    begins = set()
    for one, answer in zip(ranges, answers, strict=True):
        address = ram.host_address(answer, one.region)
        begins.add(None if address is None else address - one.offset)
    return begins.pop() if len(begins) == 1 else None
