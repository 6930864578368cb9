"""The walk along a migration stream: what is RAM, and what must stay, in whatever pieces it comes."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from qsnap.inventory.stream import PAGE, Frame, Run, Stream, Unknown, kept

pytestmark = pytest.mark.no_qemu

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
    head = b"\1" + struct.pack(">I", SECTION) + named(name) + struct.pack(">II", 0, version)
    return head + struct.pack(">Q", sum(blocks.values()) | 4) + sizes + more + struct.pack(">Q", 0x10) + FOOTER


def record(page: int, body: bytes, block: str = "") -> bytes:
    flags = 0x08 if len(body) == PAGE else 0x02
    head = struct.pack(">Q", page * PAGE | flags | (0 if block else 0x20))
    return head + (named(block) if block else b"") + body


def part(*records: bytes, kind: int = 2) -> bytes:
    return bytes([kind]) + struct.pack(">I", SECTION) + b"".join(records) + struct.pack(">Q", 0x10) + FOOTER


def walked(stream: bytes, piece_bytes: int, compared: dict[str, int] | None = None) -> list[tuple[bytes, Run | None]]:
    """What the walk tells: bytes that stay, and runs."""
    return list(_walked(stream, piece_bytes, {"pc.ram": BLOCKS["pc.ram"]} if compared is None else compared))


def _walked(stream: bytes, piece_bytes: int, compared: dict[str, int]) -> Iterator[tuple[bytes, Run | None]]:
    walk, begin = Stream(compared), 0
    while begin < len(stream):
        piece = memoryview(stream)[begin : begin + piece_bytes]
        parts, length = walk.parts(piece)
        if not length:
            raise Unknown("stuck")
        for one in parts:
            if isinstance(one, Frame):
                yield bytes(piece[one.begin : one.end]), None
            else:
                yield b"".join(kept(piece, one, 0, one.pages)), one
        begin += length
    assert walk.is_at_devices
    assert walk.machine == "pc-q35-10.0"


PAGES = [os.urandom(PAGE) for _ in range(5)]
DEVICES = b"\4" + os.urandom(9000) + b"\0\6{}"
ZEROES = [record(page, b"\0") for page in range(3, 60)]
GOOD = (
    configuration() + b"\x08" + struct.pack(">HH", 9, 2) + b"xx" + start()
    + part(record(0, PAGES[0], "pc.ram"), record(1, PAGES[1]), record(2, PAGES[2]), *ZEROES)
    + part(record(0, b"\0", "vga.vram"), record(1, b"\0"), record(61, PAGES[3], "pc.ram"), record(1, PAGES[4]), kind=3)
    + DEVICES
)  # fmt: skip


@pytest.mark.parametrize("piece_bytes", [5000, 9000, 20000, 1 << 20])
def test_pieces_make_no_difference(piece_bytes: int) -> None:
    """All that stays is there in its order; and of each page of RAM the block, the number and the contents are told."""
    found = walked(GOOD, piece_bytes)
    pages: list[tuple[str, int, bool]] = []
    for _, run in found:
        if run is not None:
            pages += [(run.block, run.page + n, run.is_kept) for n in range(run.pages)]
    once = [("pc.ram", n, False) for n in range(60)]
    # What is not compared stays, and so does a page that has come before
    assert pages == [*once, ("vga.vram", 0, True), ("vga.vram", 1, True), ("pc.ram", 61, False), ("pc.ram", 1, True)]
    # With every run kept it is a stream that says the same
    again = b"".join(data for data, _ in found)
    assert again.startswith(configuration())
    assert again.endswith(DEVICES)
    assert [(r.block, r.page, r.pages) for _, r in walked(again, 1 << 20) if r] == [
        (r.block, r.page, r.pages) for _, r in found if r
    ]
    for body in PAGES:
        assert body in again


def test_each_record_by_itself_stands_alone() -> None:
    """A record that is taken out of a run names its block."""
    run = next(run for _, run in walked(GOOD, 1 << 20) if run)
    walk = Stream({"pc.ram": BLOCKS["pc.ram"]})
    piece = memoryview(GOOD)
    runs = [one for one in walk.parts(piece)[0] if isinstance(one, Run)]
    assert b"".join(kept(piece, runs[0], 1, 1)) == record(1, PAGES[1], "pc.ram")
    assert run.pages == 3


def test_a_page_filled_with_something_stays() -> None:
    stream = configuration() + start() + part(record(0, b"\xaa", "pc.ram"), record(1, b"\xaa")) + DEVICES
    assert all(run.is_kept for _, run in walked(stream, 1 << 20) if run)


def test_the_parts_of_the_configuration_are_gone_over() -> None:
    """Those that QEMU writes when it is asked to compare capabilities or the UUID, or when pages have other sizes."""
    capabilities = subsection("capabilities", data=struct.pack(">I", 2) + named("mapped-ram") + named("validate-uuid"))
    pages, uuid = subsection("target-page-bits", data=struct.pack(">I", 12)), subsection("uuid", data=os.urandom(16))
    stream = configuration(capabilities + pages + uuid) + start() + part(record(5, PAGES[0], "pc.ram")) + DEVICES
    assert [run.page for _, run in walked(stream, 1 << 20) if run] == [5]


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b"QEVM\0\0\0\2" + GOOD[8:], "does not begin"),
        (b"QEVM\0\0\0\3" + start(), "type 1"),
        (configuration()[:9] + struct.pack(">I", 1 << 17), "name is too long"),
        (configuration(subsection("other")) + start(), "configuration/other"),
        (configuration(subsection("target-page-bits", data=struct.pack(">I", 14))), "another size"),
        (configuration(subsection("capabilities", data=struct.pack(">I", 1 << 16))), "too many"),
        (configuration() + start("dirty-bitmap"), "dirty-bitmap"),
        (configuration() + start(version=5), "ram"),
        (configuration() + start(more=b"\0" * 8), "more to the RAM blocks"),  # x-ignore-shared
        (configuration() + start(blocks={**BLOCKS, "odd": 2048, "end": 2048}), "'odd' .* a size of 2,048"),
        (configuration() + start(blocks={"pc.ram": 128 * PAGE}), "pc.ram"),
        (configuration() + start(blocks={"other": 128 * PAGE}), "pc.ram"),
        (configuration() + start() + part(record(64, b"\0", "pc.ram")), "no page"),
        (configuration() + start() + part(record(0, b"\0", "other")), "no page"),
        (configuration() + start() + part(record(0, b"\0")), "no page"),
        (configuration() + start() + part(struct.pack(">Q", 0x240)), "flags 0x240"),
        (configuration() + start() + part(struct.pack(">Q", 0x200)), "flags 0x200"),
        (configuration() + start() + start(), "type 1"),
        (configuration() + b"\4", "type 4"),
        (configuration() + start() + b"\x09", "type 9"),
        (GOOD.replace(FOOTER, b"\x7e\0\0\0\7"), "footer"),
        (configuration() + start() + part(kind=3) + part(), "type 2"),
        (configuration() + start() + part(record(0, PAGES[0], "pc.ram"))[:2000], "stuck"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(stream: bytes, words: str) -> None:
    with pytest.raises(Unknown, match=words):
        walked(stream, 1 << 20)
