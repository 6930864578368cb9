"""Put the guest's RAM back into huge pages before a live save, so that the guest stands still for less time.

While the guest is stopped QEMU reads all of RAM once and write-protects it. That takes some 5 ms per GiB in huge pages,
and up to 100 ms per GiB in base pages. QEMU asks for huge pages for its RAM (MADV_HUGEPAGE) and has them at first; but
each live save splits all of them, as protection is lifted from one base page after the other, and the kernel's own
daemon looks at 16 MiB in ten seconds by default. The kernel does it at once for whoever asks, while the guest runs.

Facts (Linux: mm/madvise.c, mm/khugepaged.c; madvise(2), process_madvise(2), proc(5); measured on 6.18):

* MADV_COLLAPSE copies what base pages hold into huge pages; Linux 6.1 and later do it for another process, too, for
  who may read its memory and has CAP_SYS_NICE: root. It takes 0.2 s per GiB, which is the caller's processor time.
* It fills up what is missing in a huge page with zeroes. So only those are asked for of which nearly all is there: the
  process grows by 3 % at the most, also where a balloon has given back a page here and there.
* It ignores what /sys says of transparent huge pages; we do not.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from qsnap.host import processes
from qsnap.host.processes import Mapping, Use

#: Seconds that it may take in all; what is left then stays as it is.
PATIENCE_S = 20.0

_HUGE = 2 << 20
#: Bytes that are asked for at once: some 15 ms. Who is cancelled in between asks for no more.
_AT_ONCE = 64 << 20
#: A huge page of which more base pages than that are missing is left alone.
_MISSING_AT_MOST = 16
#: The top byte of an entry of /proc/PID/pagemap: the page is there, and it is nobody else's.
_THERE = b"\x81"
_ENTRY = 8

#: They will come every time.
_HOPELESS = {errno.EPERM, errno.ENOSYS, errno.ESRCH, errno.EBADF, errno.EACCES}

_THP = Path("/sys/kernel/mm/transparent_hugepage")
_KSM = Path("/sys/kernel/mm/ksm/run")


class Layout(NamedTuple):
    """How the guest's RAM is mapped in QEMU, in bytes.

    :ivar base: by base pages, and what was swapped out.
    :ivar other: by huge pages, or not at all yet.
    """

    base: int
    other: int


def layout(pid: int | None, ram_bytes: int) -> Layout:
    """How the RAM of the guest in process *pid* is mapped; where /proc does not show it the worst is assumed."""
    found: Sequence[tuple[Mapping, Use]] = ()
    if pid is not None:
        with suppress(OSError, ValueError):
            found = _used(pid, ram_bytes)
    if not found:
        return Layout(ram_bytes, 0)
    base = sum(use.touched - use.huge for _, use in found)
    return Layout(base, sum(mapping.size for mapping, _ in found) - base)


def _used(pid: int, ram_bytes: int) -> list[tuple[Mapping, Use]]:
    """The mappings of the guest's RAM, and how they are used.

    :raise OSError: /proc does not show them.
    """
    uses = processes.uses(pid)
    return [(one, uses[one.start]) for one in processes.ram_mappings(pid, ram_bytes) if one.start in uses]


async def collapse(pid: int, ram_bytes: int) -> None:
    """Put into huge pages what is in base pages of the RAM of the guest in process *pid*.

    Where that is not possible (not root, an old kernel, memory of another kind) it is left as it is. The guest may run.
    """
    deadline = time.monotonic() + PATIENCE_S
    try:
        mappings = [mapping for mapping, use in _used(pid, ram_bytes) if _may_have_huge_pages(mapping, use)]
        process = os.pidfd_open(pid)
    except (OSError, ValueError):
        return
    try:
        for mapping in mappings:
            for start, size in await asyncio.to_thread(_filled, pid, mapping):
                if time.monotonic() > deadline or await asyncio.to_thread(_asked, process, start, size) in _HOPELESS:
                    return
    except OSError:
        return
    finally:
        os.close(process)


def _may_have_huge_pages(mapping: Mapping, use: Use) -> bool:
    """Whether it is private memory that lacks huge pages, and both the administrator and QEMU want it to have them."""
    wanted = _chosen("enabled")
    return (
        mapping.permissions == "rw-p"
        and use.huge < use.touched
        and not {"nh", "ht", "pf", "io"} & set(use.flags)
        and (wanted == "always" or (wanted == "madvise" and "hg" in use.flags))
        # Pages that are merged are to be shared, and each in its own place
        and not ("mg" in use.flags and _read(_KSM) == "1")
    )


def _chosen(name: str) -> str:
    """What is in brackets in that file."""
    return _read(_THP / name).partition("[")[2].partition("]")[0]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _filled(pid: int, mapping: Mapping) -> list[tuple[int, int]]:
    """Address and size of the parts of a mapping of which nearly all is there, in whole huge pages.

    :raise OSError: /proc does not show it.
    """
    allowed = _read(_THP / "khugepaged" / "max_ptes_none")
    missing = min(_MISSING_AT_MOST, int(allowed)) if allowed.isdecimal() else _MISSING_AT_MOST
    pages = _HUGE // processes.PAGE
    parts: list[tuple[int, int]] = []
    first = -(-mapping.start // _HUGE) * _HUGE
    for start, entries in _pagemap(pid, first, (mapping.start + mapping.size) // _HUGE * _HUGE):
        there = entries[_ENTRY - 1 :: _ENTRY]
        for index in range(len(there) // pages):
            if there.count(_THERE, index * pages, (index + 1) * pages) < pages - missing:
                continue
            address = start + index * _HUGE
            if parts and sum(parts[-1]) == address and parts[-1][1] < _AT_ONCE:
                parts[-1] = (parts[-1][0], parts[-1][1] + _HUGE)
            else:
                parts.append((address, _HUGE))
    return parts


def _pagemap(pid: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The entries from one address to another, piece by piece."""
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for address in range(start, end, _AT_ONCE):
            count = (min(_AT_ONCE, end - address)) // processes.PAGE
            yield address, os.pread(pagemap, count * _ENTRY, address // processes.PAGE * _ENTRY)
    finally:
        os.close(pagemap)


def _asked(process: int, start: int, size: int) -> int:
    """Ask the kernel for huge pages there; its errno, 0 for none."""
    from qsnap.host import syscalls

    try:
        syscalls.collapse(process, start, size)
    except OSError as error:
        return error.errno or 0
    return 0
