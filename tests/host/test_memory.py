"""Comparisons with another process's memory: each page that differs is found, and no other."""

from __future__ import annotations

import ctypes
import mmap
import os
from random import Random

import pytest

from qsnap.host.memory import PAGE, Comparison, available_bytes, joined

pytestmark = pytest.mark.no_qemu


def address(buffer: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("pages", [1, 2, 511, 512, 513, 700])
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
    where = address(theirs)
    for share in (0.0, 0.02, 1.0):
        changed = sorted(page for page in range(pages) if dice.random() < share)
        for page in changed:
            theirs[page * PAGE + dice.choice([0, PAGE - 1])] ^= 1
        found = list(comparison.differing(memoryview(ours), begin, stride, where, pages))
        assert found == [(page, 1) for page in changed]
        for page in changed:
            theirs[page * PAGE : (page + 1) * PAGE] = ours[begin + page * stride : begin + page * stride + PAGE]


def test_pages_at_odd_distances_are_refused() -> None:
    """What is between them would be copied over them."""
    ours, theirs = bytearray(4 * PAGE), bytearray(3 * PAGE)
    with pytest.raises(ValueError, match="4100"):
        list(Comparison(os.getpid()).differing(memoryview(ours), 0, PAGE + 4, address(theirs), 3))


@pytest.mark.parametrize("pages", [1, 256, 600])
def test_what_is_not_zero(pages: int) -> None:
    dice = Random(pages)  # noqa: S311
    theirs = bytearray(pages * PAGE)
    changed = sorted({0, pages - 1, *(dice.randrange(pages) for _ in range(5))})
    for page in changed:
        theirs[page * PAGE + dice.randrange(PAGE)] = 1
    assert list(Comparison(os.getpid()).not_zero(address(theirs), pages)) == [(page, 1) for page in changed]


def test_what_is_not_there_is_an_error() -> None:
    """And so is what ends in the middle: nothing of it may count as equal."""
    memory = mmap.mmap(-1, 8 * PAGE)
    where = address(memory)
    libc = ctypes.CDLL(None)
    assert libc.munmap(ctypes.c_void_p(where + 4 * PAGE), ctypes.c_size_t(4 * PAGE)) == 0
    comparison = Comparison(os.getpid())
    assert list(comparison.not_zero(where, 4)) == []
    for begin, pages in [(0, 8), (5, 1)]:
        with pytest.raises(OSError, match="Bad address"):
            list(comparison.not_zero(where + begin * PAGE, pages))


def test_those_that_follow_each_other_are_joined() -> None:
    assert list(joined(iter([(0, 1), (1, 1), (2, 3), (7, 1), (8, 2)]))) == [(0, 5), (7, 3)]
    assert list(joined(iter([]))) == []


def test_there_is_memory() -> None:
    assert 0 < available_bytes() < os.sysconf("SC_PHYS_PAGES") * PAGE
