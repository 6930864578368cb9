"""Rows of records of a migration stream: pages of RAM that follow each other, looked at many at a time.

What a record is, :mod:`qsnap.inventory.stream` says. (This module imports little: helpers that compare need it, and are
to be up soon.)
"""

from __future__ import annotations

import struct

#: Bytes of a page of RAM in the stream of an x86 guest.
PAGE = 4096
#: Bytes of a record's address and flags.
HEADER = 8
#: Flags of a record: its page is one byte that fills it; it is whole; its block is that of the record before.
FILLED, WHOLE, SAME_BLOCK = 0x02, 0x08, 0x20

_WORD = struct.Struct(">Q")
#: Records that are looked at one by one, before so many are looked at together: many rows have very few.
_FEW, _MANY = 8, 512


def going_on(piece: memoryview, at: int, body: int, address: int, end: int) -> int:
    """How many records from *at* on go on with the pages from *address* on, up to *end* at the most.

    :param body: bytes of contents of each: those of a page, or the one that it is filled with.
    """
    stride = HEADER + body
    word = address | (WHOLE if body == PAGE else FILLED) | SAME_BLOCK
    count, left = 0, (end - address) // PAGE
    while count < left and _WORD.unpack_from(piece, at)[0] == word:
        batch = min(_MANY, left - count)
        if count < _FEW:
            same = 1
        elif body == PAGE:
            words = piece[at : at + (batch - 1) * stride + HEADER].cast("Q")[:: stride // HEADER]
            same = _HEADERS.same(bytes(words), batch, word)
        else:
            same = _FILLED_RECORDS.same(piece[at : at + batch * stride], batch, word)
        count += same
        at += same * stride
        word += same * PAGE
    return count


class _Row:
    """Up to :data:`_MANY` records as one large integer, which is compared many times faster than they are one by one.

    :param spare: bits of each behind the address and flags. The first record has the highest ones.
    """

    def __init__(self, spare: int) -> None:
        def row(*words: int) -> int:
            return int.from_bytes(b"".join(word.to_bytes(HEADER, "big") + bytes(spare // 8) for word in words), "big")

        self._width = HEADER * 8 + spare
        self._ones = row(*[1] * _MANY)
        self._steps = row(*range(0, _MANY * PAGE, PAGE))
        self._mask = row(*[(1 << HEADER * 8) - 1] * _MANY)

    def same(self, records: bytes | memoryview, count: int, word: int) -> int:
        """How many of the *count* records go on, each with the next page.

        :param word: the address and flags that the first one has if it does.
        """
        rest = (_MANY - count) * self._width
        differs = int.from_bytes(records, "big") ^ (word * self._ones + self._steps >> rest)
        differs &= self._mask >> rest
        return count - -(-differs.bit_length() // self._width)


#: The addresses and flags of whole pages; and all of the records of filled ones, which are not at multiples of 8.
_HEADERS, _FILLED_RECORDS = _Row(0), _Row(8)
