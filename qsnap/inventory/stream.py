"""The migration stream that a VM state is: which bytes of it are pages of RAM, and which must stay as they are.

Pure: it is given the stream piece by piece, and tells of each what it consists of. It knows what QEMU's savevm and its
background snapshots write on x86, and refuses all else: whoever leaves bytes out must know what each one means.

Facts (QEMU's migration/savevm.c, ram.c, vmstate.c; streams of 7.2, 10.0 and 11.1 walked to their ends):

* "QEVM" and the version 3; then sections, each of a type of one byte. 07: the configuration, the machine's name and
  subsections. 08: a command, of no meaning to us. 01: the beginning of what comes in parts, here "ram" alone: the names
  and sizes of the RAM blocks. 02, 03: a part of it, and the last one, which a background snapshot does not mark. 04: a
  device, whole. Of devices the length is not told; they come behind the RAM, and up to the end nothing else does but 00
  and a description (06).
* A part is a row of records: 64 bits of address in the block and flags; the block's name, or 0x20 where it is that of
  the record before (of the part before, too); then a page (0x08), or the one byte that it is filled with (0x02). 0x10
  ends the row. The 01, 02 and 03 sections have a footer,
  7e and the section's number.
* A background snapshot writes a page out of turn that the guest is about to write. A page may come twice; the last one
  counts. The loader touches only pages that come.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qsnap.inventory.rows import FILLED, HEADER, PAGE, SAME_BLOCK, WHOLE, going_on

#: Bytes that are enough for whatever is not RAM and comes before the devices.
LONGEST_FRAME = 1 << 17

_HEAD = b"QEVM\0\0\0\3"
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _CONFIGURATION, _COMMAND = 0, 1, 2, 3, 4, 5, 7, 8
_FOOTER = 0x7E
_SIZES, _EOS = 0x04, 0x10
_FLAGS = PAGE - 1
_RAM_VERSION = 4
_U64 = struct.Struct(">Q")
_U32 = struct.Struct(">I")
_START_OF_COMMAND = struct.Struct(">BHH")


class Unknown(ValueError):
    """The stream is not as QEMU is known to write it. The text is a clause that says where."""


class Broken(Unknown):
    """The stream is damaged: QEMU would refuse it, too."""


class Frame(NamedTuple):
    """Bytes of a piece that have to stay: from, to."""

    begin: int
    end: int


class Run(NamedTuple):
    """Records of a piece that follow each other, of pages that follow each other.

    :ivar page: the first page's number in its block.
    :ivar data: where in the piece the first page's contents are; the next ones' are each a record further.
    :ivar body: bytes of contents of each: those of a page, or the one that it is filled with.
    :ivar is_kept: it has to stay: its block is not compared, or one of its pages has come before.
    """

    block: str
    page: int
    pages: int
    data: int
    body: int
    is_kept: bool

    @property
    def stride(self) -> int:
        """From one record to the next one."""
        return HEADER + self.body

    @property
    def end(self) -> int:
        """Where the last record ends."""
        return self.data + (self.pages - 1) * self.stride + self.body

    def cut(self, first: int, count: int) -> Run:
        """*Count* pages of it, from the *first* one on."""
        return Run(self.block, self.page + first, count, self.data + first * self.stride, self.body, self.is_kept)


Part = Frame | Run


def moved(part: Part, offset: int) -> Part:
    """The same part where all bytes are so much further."""
    if isinstance(part, Frame):
        return Frame(part.begin + offset, part.end + offset)
    return part._replace(data=part.data + offset)


def joined(part: Part, following: Part) -> Part | None:
    """Two parts of which the second one goes on with the first one, as one; None if it does not."""
    if isinstance(part, Frame) or isinstance(following, Frame):
        if isinstance(part, Frame) and isinstance(following, Frame) and part.end == following.begin:
            return Frame(part.begin, following.end)
        return None
    is_next = following == part.cut(part.pages, following.pages)
    return part._replace(pages=part.pages + following.pages) if is_next else None


class _Short(Exception):
    """The piece ends within what begins here."""


class Stream:
    """A walk along one stream.

    :param compared: the RAM blocks that are compared with it, and their sizes in bytes. None: all that it tells of.
    :ivar machine: the machine's name in QEMU, as "pc-q35-7.2"; "" before it came.
    :ivar blocks: the sizes of the RAM blocks in bytes, by their names.
    :ivar section: the number of the section "ram".
    :ivar is_at_devices: all RAM has come.
    """

    def __init__(self, compared: Mapping[str, int] | None) -> None:
        self.machine = ""
        self.is_at_devices = False
        self._compared = compared
        #: Which pages have come, a byte each.
        self._come = {block: bytearray(size // PAGE) for block, size in (compared or {}).items()}
        self._has_begun = self._has_ended = False
        self.section = -1
        self.blocks: dict[str, int] = {}
        #: The type of the part that it is in; 0 between two.
        self._part = 0
        self._block = ""

    def parts(self, piece: memoryview) -> tuple[list[Part], int]:
        """What the next piece of the stream consists of, and how many of its bytes that is: the next piece is to begin
        behind them.

        :raise Unknown: it is not as it should be.
        """
        found: list[Part] = []
        at = 0
        while at < len(piece):
            try:
                part = self._next(piece, at)
            except (_Short, struct.error, IndexError):
                break
            at = part.end
            if found and (both := joined(found[-1], part)):
                found[-1] = both
            else:
                found.append(part)
        return found, at

    def missing(self) -> Mapping[str, int]:
        """How many pages have not come, of each compared block that is not whole."""
        return {block: count for block, come in self._come.items() if (count := come.count(0))}

    def _next(self, piece: memoryview, at: int) -> Part:
        if self.is_at_devices:
            return Frame(at, len(piece))
        if self._part:
            return self._records(piece, at)
        return Frame(at, self._frame(piece, at))

    def _frame(self, piece: memoryview, at: int) -> int:
        """Go over what is between records; where it ends."""
        if not self._has_begun:
            if _bytes(piece, at, len(_HEAD)) != _HEAD:
                raise Broken("it does not begin as a VM state does")
            self._has_begun = True
            return at + len(_HEAD)
        kind = piece[at]
        if kind == _CONFIGURATION and not self.machine:
            return self._configuration(piece, at + 1)
        if kind == _COMMAND:
            _, _, size = _START_OF_COMMAND.unpack_from(piece, at)
            return at + _START_OF_COMMAND.size + len(_bytes(piece, at + _START_OF_COMMAND.size, size))
        if kind == _START and self.section < 0 and self.machine:
            return self._start(piece, at + 1)
        if kind in (_PART, _END) and self.section >= 0 and not self._has_ended:
            (number,) = _U32.unpack_from(piece, at + 1)
            if number != self.section:
                raise Broken(f"a part is of section {number}, not of ram's")
            self._part = kind
            return at + 5
        if kind == _FULL and self.section >= 0:
            self.is_at_devices = True
            return len(piece)
        raise Unknown(f"a section of type {kind} comes where none of that type does")

    def _configuration(self, piece: memoryview, at: int) -> int:
        (size,) = _U32.unpack_from(piece, at)
        if size > LONGEST_FRAME // 2:
            raise Unknown("the machine's name is too long")
        machine = _text(_bytes(piece, at + 4, size))
        at += 4 + size
        while piece[at] == _SUBSECTION:
            name, at = _name(piece, at + 1)
            (version,) = _U32.unpack_from(piece, at)
            at += 4
            if (name, version) == ("configuration/capabilities", 1):
                (count,) = _U32.unpack_from(piece, at)
                at += 4
                if count > PAGE:
                    raise Unknown("there are too many capabilities")
                for _ in range(count):
                    _, at = _name(piece, at)
            elif (name, version) == ("configuration/target-page-bits", 1):
                if _U32.unpack_from(piece, at) != (PAGE.bit_length() - 1,):
                    raise Unknown("its pages have another size")
                at += 4
            elif (name, version) == ("configuration/uuid", 1):
                at += len(_bytes(piece, at, 16))
            else:
                raise Unknown(f"the configuration has {name!r}, version {version}")
        self.machine = machine
        return at

    def _start(self, piece: memoryview, at: int) -> int:
        (section,) = _U32.unpack_from(piece, at)
        name, at = _name(piece, at + 4)
        if (name, _U32.unpack_from(piece, at), _U32.unpack_from(piece, at + 4)) != ("ram", (0,), (_RAM_VERSION,)):
            raise Unknown(f"beside RAM there is {name!r} that comes in parts")
        (total,) = _U64.unpack_from(piece, at + 8)
        if total & _FLAGS != _SIZES:
            raise Unknown("the sizes of RAM are missing")
        total -= _SIZES
        at += 16
        sizes: dict[str, int] = {}
        while sum(sizes.values()) < total:
            block, at = _name(piece, at)
            (size,) = _U64.unpack_from(piece, at)
            at += 8
            if block in sizes or not size or size % PAGE:
                raise Unknown(f"the RAM block {block!r} comes twice, or has a size of {size:,} bytes")
            sizes[block] = size
        if sum(sizes.values()) != total or _U64.unpack_from(piece, at) != (_EOS,):
            raise Unknown("there is more to the RAM blocks than their sizes")
        at = _footer(piece, at + 8, section)
        if self._compared is None:
            self._come = {block: bytearray(size // PAGE) for block, size in sizes.items()}
        for block, size in (self._compared or {}).items():
            if sizes.get(block) != size:
                raise Unknown(f"the RAM block {block!r} has {sizes.get(block, 0):,} bytes there, and {size:,} now")
        self.section, self.blocks = section, sizes
        return at

    def _records(self, piece: memoryview, at: int) -> Part:
        (word,) = _U64.unpack_from(piece, at)
        flags, address = word & _FLAGS, word & ~_FLAGS
        if word == _EOS:
            end = _footer(piece, at + 8, self.section)
            self._has_ended = self._part == _END
            self._part = 0
            return Frame(at, end)
        body = {WHOLE: PAGE, FILLED: 1}.get(flags & ~SAME_BLOCK)
        if body is None:
            # Of those that tell what it is there is always one (ram.c: ram_load_precopy)
            is_one = (flags & ~SAME_BLOCK).bit_count() == 1
            raise (Unknown if is_one else Broken)(f"a record of RAM has the flags {flags:#x}")
        block, data = (self._block, at + HEADER) if flags & SAME_BLOCK else _name(piece, at + HEADER)
        if (size := self.blocks.get(block)) is None or address >= size:
            raise Broken(f"there is no page at {address:#x} of the RAM block {block!r}")
        if data + body > len(piece):
            raise _Short
        self._block = block
        count = 1 + going_on(piece, data + body, body, address + PAGE, min(size, address + _most(piece, data, body)))
        is_kept = body == 1 and any(piece[data : data + count * 9 : 9])
        return self.come(Run(block, address // PAGE, count, data, body, is_kept))

    def come(self, run: Run) -> Run:
        """Note that a run has come. The same run; it has to stay if it is not compared, or a page of it came before."""
        come = self._come.get(run.block)
        if come is None:
            return run._replace(is_kept=True)
        end = run.page + run.pages
        is_kept = run.is_kept or come.find(1, run.page, end) >= 0
        come[run.page : end] = b"\1" * run.pages
        return run._replace(is_kept=is_kept)


def lead(run: Run) -> int:
    """The most bytes that the header before the first contents of a run can have."""
    return HEADER + 1 + len(run.block)


def is_one(piece: memoryview, run: Run) -> bool:
    """Whether the records of a run that is read again, from its :func:`lead` on, are as they were."""
    before = bytes(piece[run.data - lead(run) : run.data])
    word = run.page * PAGE | (WHOLE if run.body == PAGE else FILLED)
    if before != _named(word, run.block) and not before.endswith(_U64.pack(word | SAME_BLOCK)):
        return False
    first = (run.page + 1) * PAGE
    return run.pages == 1 + going_on(piece, run.data + run.body, run.body, first, first + (run.pages - 1) * PAGE)


def kept(run: Run, data: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """The records of a run, so that they can come behind any other record.

    :param data: the bytes from the first one's contents on.
    """
    yield _named(run.page * PAGE | (WHOLE if run.body == PAGE else FILLED), run.block)
    yield data


def _named(word: int, block: str) -> bytes:
    """A record's header with its block's name."""
    return _U64.pack(word) + bytes([len(block)]) + block.encode()


def _most(piece: memoryview, data: int, body: int) -> int:
    """Bytes of pages of which there is room for the records in a piece from *data* on."""
    return (1 + (len(piece) - data - body) // (HEADER + body)) * PAGE


def _footer(piece: memoryview, at: int, section: int) -> int:
    kind, number = struct.unpack_from(">BI", piece, at)
    if (kind, number) != (_FOOTER, section):
        raise Broken("a section has no footer")
    return at + 5


def _name(piece: memoryview, at: int) -> tuple[str, int]:
    """A name that stands behind its length, and where it ends."""
    end = at + 1 + piece[at]
    return _text(_bytes(piece, at + 1, piece[at])), end


def _bytes(piece: memoryview, at: int, size: int) -> bytes:
    if at + size > len(piece):
        raise _Short
    return bytes(piece[at : at + size])


def _text(name: bytes) -> str:
    try:
        return name.decode("ascii")
    except UnicodeDecodeError:
        raise Unknown("a name is not in ASCII") from None
