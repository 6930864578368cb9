"""Migration streams, record by record, as QEMU writes them (:mod:`qsnap.inventory.stream`)."""

from __future__ import annotations

import os
import struct

from qsnap.inventory.rows import PAGE

SECTION = 2
BLOCKS = {"pc.ram": 64 * PAGE, "vga.vram": 2 * PAGE}
FOOTER = b"\x7e" + struct.pack(">I", SECTION)


def named(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def configuration(more: bytes = b"") -> bytes:
    return b"QEVM\0\0\0\3\7" + struct.pack(">I", 11) + b"pc-q35-10.0" + more


def subsection(name: str, version: int = 1, data: bytes = b"") -> bytes:
    return b"\5" + named(f"configuration/{name}") + struct.pack(">I", version) + data


def start(name: str = "ram", version: int = 4, blocks: dict[str, int] = BLOCKS, more: bytes = b"") -> bytes:
    sizes = b"".join(named(block) + struct.pack(">Q", size) for block, size in blocks.items())
    return started(sum(blocks.values()) | 4, sizes + more, name, version)


def started(total: int, sizes: bytes, name: str = "ram", version: int = 4) -> bytes:
    head = b"\1" + struct.pack(">I", SECTION) + named(name) + struct.pack(">II", 0, version)
    return head + struct.pack(">Q", total) + sizes + struct.pack(">Q", 0x10) + FOOTER


def sized(block: str, pages: int) -> bytes:
    return named(block) + struct.pack(">Q", pages * PAGE)


def record(page: int, body: bytes, block: str = "") -> bytes:
    flags = 0x08 if len(body) == PAGE else 0x02
    head = struct.pack(">Q", page * PAGE | flags | (0 if block else 0x20))
    return head + (named(block) if block else b"") + body


def part(*records: bytes, kind: int = 2) -> bytes:
    return bytes([kind]) + struct.pack(">I", SECTION) + b"".join(records) + struct.pack(">Q", 0x10) + FOOTER


#: What comes behind the RAM.
DEVICES = b"\4" + os.urandom(9000) + b"\0\6{}"
