"""The walk along a migration stream: what is RAM, and what must stay, in whatever pieces it comes."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from qsnap.inventory.rows import PAGE
from qsnap.inventory.stream import Broken, Frame, Run, Stream, Unknown, is_one, joined, kept, moved
from support.streams import (
    BLOCKS,
    DEVICES,
    FOOTER,
    SECTION,
    configuration,
    named,
    part,
    record,
    sized,
    start,
    started,
    subsection,
)

pytestmark = pytest.mark.no_qemu


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
                yield b"".join(kept(one, piece[one.data : one.end])), one
        begin += length
    assert walk.is_at_devices
    assert walk.machine == "pc-q35-10.0"


PAGES = [os.urandom(PAGE) for _ in range(5)]
ZEROES = [record(page, b"\0") for page in range(3, 60)]
GOOD = (
    configuration() + b"\x08" + struct.pack(">HH", 9, 2) + b"xx" + start()
    + part(record(0, PAGES[0], "pc.ram"), record(1, PAGES[1]), record(2, PAGES[2]), *ZEROES)
    + part(record(0, b"\0", "vga.vram"), record(1, b"\0"), record(61, PAGES[3], "pc.ram"), record(0, PAGES[4]), kind=3)
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
    assert pages == [*once, ("vga.vram", 0, True), ("vga.vram", 1, True), ("pc.ram", 61, False), ("pc.ram", 0, True)]
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
    one = runs[0].cut(1, 1)
    assert b"".join(kept(one, piece[one.data : one.end])) == record(1, PAGES[1], "pc.ram")
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
        (configuration() + configuration()[8:], "type 7"),
        (configuration() + part(), "type 2"),
        (configuration() + start() + part().replace(struct.pack(">I", SECTION), struct.pack(">I", 7)), "section 7"),
        (configuration().replace(b"35", b"\xff5"), "ASCII"),
        (configuration() + started(3 * PAGE, sized("pc.ram", 3)), "sizes of RAM are missing"),
        (configuration() + started(3 * PAGE | 4, sized("a", 1) + sized("a", 2)), "'a' comes twice"),
        (configuration() + started(3 * PAGE | 4, sized("a", 0) + sized("b", 3)), "'a' .* a size of 0"),
        (configuration() + started(3 * PAGE | 4, sized("a", 2) + sized("b", 2)), "more to the RAM blocks"),
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


def test_damage_is_told_from_what_is_only_not_known() -> None:
    """A record has one of the flags that tell what it is, whatever QEMU wrote it."""
    for flags, kind in (0x240, Broken), (0x200, Unknown):
        with pytest.raises(Unknown) as error:
            walked(configuration() + start() + part(struct.pack(">Q", flags)), 1 << 20)
        assert type(error.value) is kind


def test_the_section_may_have_the_number_0() -> None:
    stream = configuration() + start() + part(record(5, PAGES[0], "pc.ram")) + DEVICES
    number = struct.pack(">I", SECTION)
    assert stream.removesuffix(DEVICES).count(number) == 4
    stream = stream.removesuffix(DEVICES).replace(number, bytes(4)) + DEVICES
    assert [run.page for _, run in walked(stream, 1 << 20) if run] == [5]
    again = stream.removesuffix(DEVICES) + start()
    with pytest.raises(Unknown, match="type 1"):
        walked(again, 1 << 20)


def test_the_longest_parts_of_the_configuration() -> None:
    name = b"x" * (1 << 16)
    walk = Stream(None)
    many = subsection("capabilities", data=struct.pack(">I", PAGE) + named("a") * PAGE)
    stream = b"QEVM\0\0\0\3\7" + struct.pack(">I", len(name)) + name + many + b"\4"
    with pytest.raises(Unknown, match="type 4"):
        walk.parts(memoryview(stream))
    assert walk.machine == name.decode()


@pytest.mark.parametrize("compared", [None, {"pc.ram": BLOCKS["pc.ram"]}])
def test_what_has_not_come(compared: dict[str, int] | None) -> None:
    walk = Stream(compared)
    stream = configuration() + start() + part(record(0, PAGES[0], "pc.ram"), record(0, b"\0", "vga.vram")) + DEVICES
    parts, _ = walk.parts(memoryview(stream))
    assert walk.missing() == {"pc.ram": BLOCKS["pc.ram"] // PAGE - 1} | ({} if compared else {"vga.vram": 1})
    assert [one.is_kept for one in parts if isinstance(one, Run)] == [False, bool(compared)]


def test_a_piece_may_end_anywhere() -> None:
    """What is whole is told; of what is not, nothing is remembered."""
    command = b"\x08" + struct.pack(">HH", 9, 2) + b"xx"
    pieces = [configuration()[:8], configuration()[8:] + command, start(), b"\2" + struct.pack(">I", SECTION)]
    pieces += [record(3, PAGES[0], "pc.ram"), record(4, b"\0"), struct.pack(">Q", 0x10) + FOOTER]
    whole = b"".join(pieces)
    for end in (*range(200), *range(200, len(whole) - 200, 97), *range(len(whole) - 200, len(whole))):
        walk = Stream(None)
        parts, begin = walk.parts(memoryview(whole)[:end])
        following, length = walk.parts(memoryview(whole)[begin:])
        assert begin + length == len(whole), end
        runs = [(one.block, one.page, one.pages) for one in [*parts, *following] if isinstance(one, Run)]
        assert runs == [("pc.ram", 3, 1), ("pc.ram", 4, 1)], end
    walk = Stream(None)
    for piece in pieces:
        assert walk.parts(memoryview(piece))[1] == len(piece)


@pytest.mark.parametrize("body", [b"\0", PAGES[0]], ids=["filled", "whole"])
@pytest.mark.parametrize("before", [1, 2, 8, 9, 10, 11, 100, 520, 521, 522, 523, 1034])
def test_a_run_ends_where_its_pages_do(before: int, body: bytes) -> None:
    """Wherever that is among the records that are looked at together."""
    blocks = {"pc.ram": 1500 * PAGE}
    pages = [*range(7, 7 + before), *range(1310, 1499)]
    records = [record(page, body, "" if number else "pc.ram") for number, page in enumerate(pages)]
    stream = memoryview(configuration() + start(blocks=blocks) + part(*records))
    runs = [one for one in Stream(blocks).parts(stream)[0] if isinstance(one, Run)]
    assert [(run.page, run.pages) for run in runs] == [(7, before), (1310, 189)]
    for run in runs:
        assert run.end == run.data + len(body) + (run.pages - 1) * (8 + len(body))
        assert is_one(stream, run)
        assert joined(run.cut(0, run.pages - 1), run.cut(run.pages - 1, 1)) == run
    for number in range(1, 189):
        at = runs[1].data + number * (8 + len(body)) - 8
        for byte in (0, 7):
            changed = memoryview(bytearray(stream))
            changed[at + byte] ^= 1
            assert not is_one(changed, runs[1])


def test_what_pages_are_filled_with_may_differ() -> None:
    """It is no address: such a run goes on, and stays."""
    records = [record(page, bytes([page % 256])) for page in range(1, 40)]
    stream = memoryview(configuration() + start() + part(record(0, b"\0", "pc.ram"), *records))
    runs = [one for one in Stream(None).parts(stream)[0] if isinstance(one, Run)]
    assert [(run.page, run.pages, run.is_kept) for run in runs] == [(0, 40, True)]


def test_parts_are_moved_and_joined() -> None:
    frame, run = Frame(3, 10), Run("a", 5, 2, 100, PAGE, is_kept=False)
    assert moved(frame, 7) == Frame(10, 17)
    assert moved(run, 7) == run._replace(data=107)
    assert joined(frame, Frame(10, 12)) == Frame(3, 12)
    assert joined(frame, Frame(11, 12)) is None
    assert joined(frame, run) is joined(run, frame) is joined(run, run) is None
    assert joined(run, run.cut(2, 4)) == run._replace(pages=6)
    assert joined(run, run.cut(2, 4)._replace(is_kept=True)) is None
