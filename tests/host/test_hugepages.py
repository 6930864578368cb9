"""RAM in huge pages before a live save: what becomes of it, of the process that has it, and of the guest."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

import qsnap
from qsnap.host import hugepages, processes
from qsnap.host.hugepages import Layout
from qsnap.host.processes import Use
from support.guest import Guest, Launch, cli, finish, qemu_version
from support.live import ROUND, assert_in_order, two_disks

MIB = 1 << 20
#: Of the heavy guest.
RAM = 96 * MIB

_LINUX = tuple(map(int, platform.release().split(".")[:2]))
_WANTED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_the_kernel = pytest.mark.skipif(
    os.geteuid() != 0 or _LINUX < (6, 1) or not _WANTED.exists() or "[never]" in _WANTED.read_text(),
    reason="only root can, on Linux 6.1 or later, where it has transparent huge pages",
)
needs_background_snapshots = pytest.mark.skipif(qemu_version() < (6, 0), reason="QEMU before 6.0 has no such snapshots")

#: Huge pages of which all base pages are there, all but 16, all but 17, half of them, and again all.
HOLDER = """
import ctypes, mmap, sys
HUGE, PAGE = 2 << 20, 4096
memory = mmap.mmap(-1, 64 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
first = -start % HUGE
for number, pages in enumerate((512, 496, 495, 256, 512)):
    for page in range(pages):
        offset = first + number * HUGE + page * PAGE
        memory[offset : offset + 8] = (offset + 1).to_bytes(8, "little")
print(start + first, flush=True)
sys.stdin.readline()
pages = range(first, first + 5 * HUGE, PAGE)
there = [offset for offset in pages if memory[offset : offset + 8] == (offset + 1).to_bytes(8, "little")]
print(len(there), all(not any(memory[offset : offset + 8]) for offset in set(pages) - set(there)), flush=True)
"""


class Holder:
    """A process with some memory, all of it in base pages."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.start = int(self._process.stdout.readline())

    @property
    def layout(self) -> Layout:
        return hugepages.layout(self.pid, 128 * MIB)

    def huge(self) -> list[int]:
        """Which of its memory is in huge pages."""
        (mapping,) = processes.ram_mappings(self.pid, 128 * MIB)
        assert mapping.start <= self.start
        return [number for number in range(5) if self._is_huge(self.start + number * 2 * MIB)]

    def _is_huge(self, address: int) -> bool:
        # Bit 22 of /proc/kpageflags: THP. Only root can see it.
        with Path(f"/proc/{self.pid}/pagemap").open("rb") as pagemap:
            pagemap.seek(address // 4096 * 8)
            entry = int.from_bytes(pagemap.read(8), "little")
        if not entry >> 63:
            return False
        with Path("/proc/kpageflags").open("rb") as flags:
            flags.seek((entry & ((1 << 55) - 1)) * 8)
            return bool(int.from_bytes(flags.read(8), "little") >> 22 & 1)

    def contents(self) -> tuple[int, bool]:
        """How many base pages hold what was written there, and whether the others are zero."""
        out, _ = self._process.communicate("\n", timeout=30)
        count, zero = out.split()
        return int(count), zero == "True"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def holder() -> Iterator[Holder]:
    if "[madvise]" not in _WANTED.read_text():
        pytest.skip("the kernel's daemon is after all memory here, not only after what wants huge pages")
    found = Holder()
    yield found
    found.end()


def flagged(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Have memory seen with these flags. (With the real ones the kernel's daemon would be at it.)"""
    real = processes.uses

    def seen(pid: int) -> dict[int, Use]:
        return {start: structs.replace(use, flags=(*use.flags, *flags)) for start, use in real(pid).items()}

    monkeypatch.setattr(processes, "uses", seen)


@needs_the_kernel
async def test_only_what_is_there_is_put_into_huge_pages(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process grows by less than was missing in one huge page, and its memory holds what it held."""
    flagged(monkeypatch, "hg")
    before = holder.layout
    assert before.base == (512 + 496 + 495 + 256 + 512) * 4096
    (mapping,) = processes.ram_mappings(holder.pid, 128 * MIB)
    assert [size for _, size in hugepages._filled(holder.pid, mapping)] == [4 * MIB, 2 * MIB]
    monkeypatch.setattr(hugepages, "_AT_ONCE", 2 * MIB)
    assert [size for _, size in hugepages._filled(holder.pid, mapping)] == [2 * MIB] * 3
    await hugepages.collapse(holder.pid, 128 * MIB)
    assert holder.huge() == [0, 1, 4]
    assert holder.layout.base == (495 + 256) * 4096
    assert sum(holder.layout) == sum(before)
    assert holder.contents() == (512 + 496 + 495 + 256 + 512, True)


@needs_the_kernel
@pytest.mark.parametrize("flags", [(), ("hg", "nh"), ("hg", "pf"), ("hg", "io")], ids=" ".join)
async def test_memory_that_is_not_to_have_huge_pages_gets_none(
    holder: Holder, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    flagged(monkeypatch, *flags)
    await hugepages.collapse(holder.pid, 128 * MIB)
    assert holder.huge() == []


@needs_the_kernel
@pytest.mark.parametrize(
    ("setting", "text", "huge"),
    [
        ("enabled", "always madvise [never]", []),
        ("ksm", "1", []),
        ("ksm", "0", [0, 1, 4]),
        ("khugepaged/max_ptes_none", "0", [0, 4]),
    ],
)
async def test_what_the_administrator_wants(
    holder: Holder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, text: str, huge: list[int]
) -> None:
    """No huge pages at all; pages merged; no base page more than there is."""
    flagged(monkeypatch, "hg", "mg")
    (tmp_path / "khugepaged").mkdir()
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / setting).write_text(text + "\n")
    monkeypatch.setattr(hugepages, "_THP", tmp_path)
    monkeypatch.setattr(hugepages, "_KSM", tmp_path / "ksm")
    await hugepages.collapse(holder.pid, 128 * MIB)
    assert holder.huge() == huge


def test_a_process_that_cannot_be_seen() -> None:
    """The worst is assumed."""
    assert hugepages.layout(None, 5) == hugepages.layout(2**22 + 1, 5) == Layout(5, 0)


async def test_a_process_that_is_gone() -> None:
    await hugepages.collapse(2**22 + 1, 5)


@pytest.fixture
def heavy(launch: Launch, tmp_path: Path) -> Guest:
    """The guest that writes heavily, when it has written all that it writes to."""
    guest = launch(*two_disks(tmp_path), memory="96")
    guest.wait_for_ticks(ROUND)
    return guest


def rss(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_the_kernel
@needs_background_snapshots
async def test_a_guest_whose_ram_is_put_into_huge_pages(heavy: Guest) -> None:
    """It runs on meanwhile, and finds nothing amiss in its RAM and on its disks; nor after a load."""
    cli("save", "--live", "a", monitor=heavy.address)
    assert hugepages.layout(heavy.pid, RAM).base > RAM / 4, "a live save splits them"
    before, size = heavy.counter, rss(heavy.pid)
    await hugepages.collapse(heavy.pid, RAM)
    assert hugepages.layout(heavy.pid, RAM).base < RAM / 32
    assert rss(heavy.pid) < size + RAM / 8
    heavy.wait_for_ticks(ROUND)
    assert heavy.counter > before
    assert_in_order(heavy)
    cli("save", "--live", "b", monitor=heavy.address)
    for tag in ("a", "b"):
        cli("load", tag, monitor=heavy.address)
        assert_in_order(heavy)


@needs_the_kernel
@needs_background_snapshots
async def test_a_live_save_puts_ram_into_huge_pages(heavy: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one but the first, which finds it so."""
    bases: list[int] = []
    real = hugepages.layout

    def noted(pid: int | None, ram_bytes: int) -> Layout:
        found = real(pid, ram_bytes)
        bases.append(found.base)
        return found

    monkeypatch.setattr(hugepages, "layout", noted)
    async with qsnap.connect(heavy.address) as vm:
        for tag in ("a", "b"):
            await vm.save(tag, live=True)
        split, joined = bases[-2:]
        assert split > RAM / 4
        assert joined < RAM / 32
        for tag in ("a", "b"):
            await vm.load(tag)
            assert_in_order(heavy)


@needs_the_kernel
@needs_background_snapshots
def test_without_the_right_to(heavy: Guest) -> None:
    """It is saved all the same, and its RAM is left as it is."""
    cli("save", "--live", "a", monitor=heavy.address)
    without = ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", sys.executable]
    code = f"import asyncio; from qsnap.host import hugepages; asyncio.run(hugepages.collapse({heavy.pid}, {RAM}))"
    subprocess.run([*without, "-c", code], check=True, timeout=60)
    assert hugepages.layout(heavy.pid, RAM).base > RAM / 4
    process = subprocess.Popen(
        [*without, "-m", "qsnap", "save", "--live", "b", "-m", heavy.address],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = finish(process)
    assert run.code == 0, run.err
    for tag in ("a", "b"):
        cli("load", tag, monitor=heavy.address)
        assert_in_order(heavy)
