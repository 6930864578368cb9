"""What the human monitor tells of guest RAM: its blocks, where each lies in QEMU's memory, and who writes it. Pure.

Formats as QEMU prints them (system/physmem.c: ram_block_format; system/memory.c: mtree_print_flatview;
monitor/hmp-cmds-target.c: hmp_gpa2hva; hw/core/loader.c: hmp_info_roms), held against 7.2, 10.0 and 11.1. ``info
ramblock`` tells the addresses from some version between these on. Before, ``gpa2hva`` has to be asked about the
guest's addresses at which ``info mtree -f`` shows a block. A line that has not the form it should have tells nothing.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_BLOCK = re.compile(
    r"^ *(?P<name>\S+) +\d+ [KMG]?i?B +0x[0-9a-f]+ +0x(?P<used>[0-9a-f]+) +0x(?P<total>[0-9a-f]+)"
    r"(?: +0x(?P<address>[0-9a-f]+) +r[ow])?\s*$",
    re.MULTILINE,
)
_RANGE = re.compile(
    r"^ *(?P<first>[0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, (?P<kind>ram|romd?)\): "
    r"(?P<region>\S+)(?: @(?P<offset>[0-9a-f]{16}))?",
    re.MULTILINE,
)
_ADDRESS = re.compile(r"^Host virtual address for 0x[0-9a-f]+ \((?P<region>.*)\) is 0x(?P<address>[0-9a-f]+)\s*$")
_ROM_IN_RAM = re.compile(r'^addr=\S+ size=\S+ mem=ram name="(.*)"', re.MULTILINE)


class RamBlock(NamedTuple):
    """A block of RAM: its name in the migration stream, and where it lies; None where that is not told.

    :ivar used: the bytes that are in a VM state.
    :ivar size: the bytes that it may have.
    """

    name: str
    used: int
    size: int
    address: int | None


class Range(NamedTuple):
    """Where the guest sees a part of a memory region: from which address of its own, and from which byte of it on.

    :ivar is_rom: the guest cannot write it there.
    """

    region: str
    first: int
    offset: int
    is_rom: bool


def ram_blocks(text: str) -> list[RamBlock]:
    """The blocks that ``info ramblock`` shows."""
    return [
        RamBlock(
            row["name"],
            int(row["used"], 16),
            int(row["total"], 16),
            int(row["address"], 16) if row["address"] else None,
        )
        for row in _BLOCK.finditer(text)
    ]


def ram_ranges(text: str) -> list[Range]:
    """The RAM and ROM that ``info mtree -f`` shows in the address space of the processors."""
    views = [view for view in text.split("FlatView #") if ' AS "memory", root: system' in view]
    return [
        Range(row["region"], int(row["first"], 16), int(row["offset"] or "0", 16), row["kind"] != "ram")
        for view in views[:1]
        for row in _RANGE.finditer(view)
    ]


def host_address(text: str, region: str) -> int | None:
    """The address that ``gpa2hva`` tells; None where it tells none, or one in another region."""
    match = _ADDRESS.match(text.strip())
    return int(match["address"], 16) if match and match["region"] == region else None


def roms_in_ram(text: str) -> list[str]:
    """The files that ``info roms`` shows to be written into RAM by each reset."""
    return _ROM_IN_RAM.findall(text)
