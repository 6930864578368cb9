"""Comparisons with another process's memory: each page that differs is found, and no other."""

from __future__ import annotations

import ctypes
import mmap
import os
from random import Random

import pytest

from qsnap.host.comparison import PAGE, Comparison

pytestmark = pytest.mark.no_qemu


def address(buffer: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def ones(*pages: int, of: int) -> bytes:
    return bytes(page in pages for page in range(of))


@pytest.mark.parametrize("pages", [1, 2, 7, 8, 9, 67, 256, 511, 512])
@pytest.mark.parametrize("stride", [PAGE, PAGE + 8, PAGE + 24])
@pytest.mark.parametrize("begin", [0, 8, 17])
def test_what_differs(pages: int, stride: int, begin: int) -> None:
    """In one byte, the first or the last one of a page; what is between the pages makes no difference."""
    dice = Random(pages * stride + begin)  # noqa: S311 (the same in every run)
    theirs = bytearray(dice.randbytes(pages * PAGE))
    ours = bytearray(dice.randbytes(begin + pages * stride))
    for page in range(pages):
        at = begin + page * stride
        ours[at : at + PAGE] = theirs[page * PAGE : (page + 1) * PAGE]
    comparison = Comparison(os.getpid())
    for share in (0.0, 0.02, 1.0):
        changed = [page for page in range(pages) if dice.random() < share]
        for page in changed:
            theirs[page * PAGE + dice.choice([0, PAGE - 1])] ^= 1
        assert comparison.differing(memoryview(ours), begin, stride, address(theirs), pages) == ones(*changed, of=pages)
        for page in changed:
            theirs[page * PAGE : (page + 1) * PAGE] = ours[begin + page * stride : begin + page * stride + PAGE]


@pytest.mark.parametrize(
    ("begin", "stride", "pages"),
    [
        *((0, stride, 2) for stride in (PAGE + 4, PAGE - 8, 2 * PAGE + 8)),
        *((0, PAGE, pages) for pages in (0, 5, 513)),
        (0, PAGE + 8, 0),
        (8, PAGE, 4),
    ],
)
def test_other_pages_are_refused(begin: int, stride: int, pages: int) -> None:
    """They would lead to memory that is not meant."""
    ours, theirs = bytearray(4 * PAGE), bytearray(513 * PAGE)
    with pytest.raises(ValueError, match=r"cannot compare|has only"):
        Comparison(os.getpid()).differing(memoryview(ours), begin, stride, address(theirs), pages)


@pytest.mark.parametrize("pages", [1, 256, 512])
def test_what_is_not_zero(pages: int) -> None:
    dice = Random(pages)  # noqa: S311
    theirs = bytearray(pages * PAGE)
    changed = {0, pages - 1, *(dice.randrange(pages) for _ in range(5))}
    for page in changed:
        theirs[page * PAGE + dice.randrange(PAGE)] = 1
    assert Comparison(os.getpid()).not_zero(address(theirs), pages) == ones(*changed, of=pages)


def test_what_is_not_there_is_an_error() -> None:
    """And so is what ends in the middle: nothing of it may count as equal."""
    memory = mmap.mmap(-1, 8 * PAGE)
    where = address(memory)
    libc = ctypes.CDLL(None)
    assert libc.munmap(ctypes.c_void_p(where + 4 * PAGE), ctypes.c_size_t(4 * PAGE)) == 0
    comparison = Comparison(os.getpid())
    assert comparison.not_zero(where, 4) == bytes(4)
    for begin, pages in [(0, 8), (5, 1)]:
        with pytest.raises(OSError, match="Bad address"):
            comparison.not_zero(where + begin * PAGE, pages)
