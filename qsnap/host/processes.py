"""What can be seen of a QEMU from the machine it runs on: its image files and how much of its RAM is in use.

All of it is optional. A monitor over TCP, another user's QEMU or another operating system shows nothing, and
then ``None`` comes back. Read from proc(5): maps for the mappings, pagemap for the pages that exist; smaps, for which
the kernel goes over all pages of all mappings, only where it is needed.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qsnap.model.qemu import Struct

PAGE = 4096
#: Pages looked at: enough for an error below 1.6 % of RAM (one standard deviation), in about 5 ms.
SAMPLE_PAGES = 1024
#: Device state and qcow2 metadata beside the RAM: what guests with a few devices were seen to need, doubled.
OVERHEAD_BYTES = 32 << 20


class StateEstimate(Struct, frozen=True):
    """An estimate of the size of a guest's VM state, in bytes.

    :ivar at_least: it is almost surely larger (4 standard deviations); 0 where only the upper bound is known.
    :ivar expected: the most likely size.
    :ivar at_most: it cannot be larger, unless the guest goes on filling RAM.
    """

    at_least: int
    expected: int
    at_most: int


class Mapping(Struct, frozen=True):
    """A mapping of a process.

    :ivar start: its address.
    :ivar size: its bytes.
    :ivar permissions: as in proc(5), ``rw-p`` or so.
    :ivar file: the device and inode of what is mapped, as in proc(5); "00:00 0" for memory of the process alone.
    """

    start: int
    size: int
    permissions: str
    file: str


class Use(Struct, frozen=True):
    """How a mapping is used, in bytes.

    :ivar touched: what of it exists, in RAM or in swap.
    :ivar huge: what of that is mapped by huge pages.
    :ivar flags: as in proc(5), ``hg`` for one that is to have huge pages.
    """

    touched: int
    huge: int
    flags: tuple[str, ...]


class Process(Struct, frozen=True):
    """A process of this machine; its start time distinguishes it from a later process with the same id."""

    pid: int
    start: int
    """In clock ticks since the machine was booted (proc(5), stat)."""

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        found = process(self.pid)
        return found == self if found else is_alive(self.pid)


def process(pid: int) -> Process | None:
    """The process with that id; None if it has ended, or cannot be seen. A zombie has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else Process(pid=pid, start=int(fields[19]))


def this_process() -> Process:
    """The present process."""
    return process(os.getpid()) or Process(pid=os.getpid(), start=0)


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped, by SIGSTOP or a terminal's Ctrl-Z."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def is_alive(pid: int) -> bool:
    """Whether a process with that id runs."""
    if process(pid) is not None:
        return True
    if Path(f"/proc/{pid}").exists():
        return False  # a zombie
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # another user's, and hidden from us (proc(5), hidepid)
    except (OSError, OverflowError):
        return False
    return True


def visible_files(pid: int, filename: str) -> Iterator[Path]:
    """The paths by which this process can stat the file that QEMU has open, and that has the name *filename* still.

    They are its descriptors of that file, or where we may not see those the file's own path.
    """
    if not filename:
        return
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        absolute = filename if filename.startswith("/") else f"{Path(f'/proc/{pid}/cwd').readlink()}/{filename}"
    except OSError:
        # Another user's process: the path is all there is, and the file may be open to us all the same.
        path = Path(filename)
        if path.is_absolute() and _exists(path):
            yield path
        return
    wanted = os.path.normpath(absolute)
    try:
        real = os.path.realpath(f"/proc/{pid}/root{wanted}").removeprefix(f"/proc/{pid}/root")
    except OSError:
        real = wanted
    names = (wanted, real, os.path.realpath(wanted))
    for descriptor in descriptors:
        with suppress(OSError):
            if str(descriptor.readlink()) in names:
                yield descriptor


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def allocated_bytes(path: Path) -> int:
    """Bytes that the file takes on its file system; its length says nothing for an image with holes."""
    return path.stat().st_blocks * 512


def written_bytes(pid: int | None) -> int:
    """Bytes that the process has given the kernel to write (proc(5), /proc/PID/io); 0 if that may not be read."""
    return _io(pid, "wchar:")


def read_bytes(pid: int | None) -> int:
    """Bytes that the process has got from the kernel; 0 if that may not be read."""
    return _io(pid, "rchar:")


def _io(pid: int | None, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def free_bytes(path: Path) -> tuple[int, int]:
    """Free space of the file's file system: what any user may take, and with root's reserve."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize, info.f_bfree * info.f_frsize


def state_estimate(pid: int | None, ram_bytes: int) -> StateEstimate | None:
    """How large the VM state of the guest in process *pid* will be; None where /proc does not show it.

    QEMU writes a page of zeroes as 9 bytes and any other whole, so the state is as large as the pages that
    hold something. A sample of them says how many do; where memory may not be read, all touched ones count.
    """
    if pid is None:
        return None
    try:
        mappings = ram_mappings(pid, ram_bytes)
        size = sum(mapping.size for mapping in mappings)
        is_private = bool(mappings) and all(mapping.permissions == "rw-p" for mapping in mappings)
        touched = min(size, _touched(pid)) if is_private else _touched_there(pid, mappings)
    except (OSError, ValueError):
        return None
    fallback = StateEstimate(0, touched, touched + OVERHEAD_BYTES)
    if not is_private:
        return fallback
    try:
        share = _used_share(pid, mappings)
    except OSError:
        return fallback
    deviation = (share * (1 - share) / SAMPLE_PAGES) ** 0.5
    # A share of 0 or 1 in the sample does not mean 0 or 1 in all: no fewer than 4 pages of doubt.
    doubt = max(4 * deviation, 4 / SAMPLE_PAGES)
    return StateEstimate(
        at_least=int(size * max(0.0, share - doubt)),
        expected=int(size * share),
        at_most=int(min(touched, size * min(1.0, share + doubt))) + OVERHEAD_BYTES,
    )


def ram_mappings(pid: int, ram_bytes: int) -> list[Mapping]:
    """The largest mappings that together are as large as the guest's RAM. (TCG's code buffer is executable.)

    :return: none if there are none that could be it.
    :raise OSError: /proc does not show them.
    """
    chosen = []
    total = 0
    data = [mapping for mapping in _mappings(pid) if mapping.permissions.startswith("rw-")]
    # One block of RAM is a mapping of just that size; another one may be larger (a heap, of a small guest)
    if exact := [mapping for mapping in data if mapping.size == ram_bytes]:
        used = uses(pid) if len(exact) > 1 else {}
        return [max(exact, key=lambda mapping: used[mapping.start].touched if mapping.start in used else 0)]
    for mapping in sorted(data, key=lambda mapping: mapping.size, reverse=True):
        if total >= ram_bytes:
            break
        chosen.append(mapping)
        total += mapping.size
    return chosen if total >= ram_bytes else []


def _mappings(pid: int) -> Iterator[Mapping]:
    with Path(f"/proc/{pid}/maps").open(errors="replace") as maps:
        for line in maps:
            addresses, permissions, _, device, inode, *_ = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield Mapping(start, end - start, permissions, f"{device} {inode}")


def uses(pid: int) -> dict[int, Use]:
    """How the mappings of a process are used, by their addresses. It takes long where much is mapped.

    :raise OSError: /proc does not show it.
    """
    found = {}
    start = touched = huge = 0
    with Path(f"/proc/{pid}/smaps").open(errors="replace") as smaps:
        for line in smaps:
            if line[0] in "0123456789abcdef":  # the first line of each; the others begin with a capital
                start, touched, huge = int(line.partition("-")[0], 16), 0, 0
            elif line.startswith(("Rss:", "Swap:")):
                touched += int(line.split()[1]) * 1024
            elif line.startswith(("AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:")):
                huge += int(line.split()[1]) * 1024
            elif line.startswith("VmFlags:"):  # the last line of each
                found[start] = Use(touched, huge, tuple(line.split()[1:]))
    return found


def _touched_there(pid: int, mappings: list[Mapping]) -> int:
    """How much of some mappings exists, in bytes."""
    used = uses(pid) if mappings else {}
    return sum(used[mapping.start].touched for mapping in mappings if mapping.start in used)


def _touched(pid: int) -> int:
    """How much of all its memory a process has touched, in bytes; but for shared memory that was swapped out."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS:", "VmSwap:", "HugetlbPages:")))


def sharers(pid: int, ram_bytes: int) -> list[int]:
    """The other processes that have mapped the guest's RAM so that they can write to it, as far as they can be seen.

    Of other users' processes only root sees what they have mapped.

    :raise OSError: QEMU's own mappings cannot be seen.
    """
    shared = {mapping.file for mapping in ram_mappings(pid, ram_bytes) if mapping.permissions == "rw-s"}
    found = []
    for entry in Path("/proc").iterdir() if shared else ():
        if not entry.name.isdecimal() or int(entry.name) == pid:
            continue
        with suppress(OSError):
            rows = _mappings(int(entry.name))
            if any(re.fullmatch("rw.s", one.permissions) and one.file in shared for one in rows):
                found.append(int(entry.name))
    return sorted(found)


def _used_share(pid: int, mappings: list[Mapping]) -> float:
    """The share of pages that are not all zeroes, from a random sample. A page that never was is all zeroes."""
    sample = (_page(mappings, number) for number in array("Q", os.urandom(8 * SAMPLE_PAGES)))
    zeroes = bytes(PAGE)
    used = 0
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for address in sample:
                entry = os.pread(pagemap, 8, address // PAGE * 8)
                # Bits 63 and 62: in RAM, in swap. Reading a page that is neither would make QEMU have it.
                if len(entry) == 8 and entry[7] & 0xC0:
                    used += os.pread(memory, PAGE, address) != zeroes
        finally:
            os.close(pagemap)
    finally:
        os.close(memory)
    return used / SAMPLE_PAGES


def _page(mappings: list[Mapping], number: int) -> int:
    """The address of a page: the number-th of all, counted anew from the first one behind the last one."""
    left = number % sum(mapping.size // PAGE for mapping in mappings)
    for mapping in mappings:
        if left < mapping.size // PAGE:
            return mapping.start + left * PAGE
        left -= mapping.size // PAGE
    raise AssertionError
