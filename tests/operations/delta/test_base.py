"""Loads that compare only what was written since an earlier one: all of RAM is right after each, and any doubt ends it.

Where this kernel keeps no marks, a stand-in does (support.marks). ``scripts/prove-soft-dirty`` does all this with a
kernel that keeps them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import qsnap
from qsnap.host import soft_dirty
from qsnap.host.soft_dirty import Pagemap
from qsnap.inventory.vm_state import VmState
from qsnap.operations.delta import base, difference
from support.delta import MIB, PAGE, host_address, in_process, load, loaded_by_qemu, ram, scribble, seeded
from support.guest import Guest, Launch, blockdev, cli, disk_device, make_boot_disk, needs_snapshot_jobs
from support.marks import Marks

pytestmark = needs_snapshot_jobs


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> Marks:
    return Marks(monkeypatch)


class Saved:
    """A guest with snapshots, and what QEMU's own loads make of RAM."""

    def __init__(self, guest: Guest, *tags: str) -> None:
        self.guest = guest
        self.dice = seeded(3)
        self.expected: dict[str, str] = {}
        for tag in tags or ("t",):
            self.save(tag)

    def save(self, tag: str) -> None:
        scribble(self.guest, self.dice)
        cli("save", tag, *(["--live"] if tag.startswith("live") else []), monitor=self.guest.address)
        loaded_by_qemu(self.guest, tag)
        self.expected[tag] = ram(self.guest)
        self.guest.qmp("cont")

    def load(self, tag: str = "t", **how: Any) -> str | None:
        """Change RAM, load what differs, and compare all of RAM; how the differences were found."""
        scribble(self.guest, self.dice)
        result = in_process(self.guest, tag, running=False, **how)
        assert (result.method, result.why_full) == ("delta", "")
        assert ram(self.guest) == self.expected[tag]
        self.guest.qmp("cont")
        return result.found_by


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much is read of VM states."""
    found: list[int] = []
    reading = VmState.read

    def counted(state: VmState, buffer: memoryview, begin: int) -> int:
        found.append(reading(state, buffer, begin))
        return found[-1]

    monkeypatch.setattr(VmState, "read", counted)
    return found


def fill(guest: Guest, address: int, size: int) -> None:
    """Write what is not zero into RAM, from outside."""
    with Path(f"/proc/{guest.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(host_address(guest, address))
        memory.write(os.urandom(size))


def bases(runtime_directory: Path) -> list[str]:
    return sorted(path.name for path in runtime_directory.glob("*.base"))


@pytest.mark.parametrize("tag", ["t", "live"])
def test_only_what_is_written_is_read(
    guest: Guest, marks: Marks, read: list[int], runtime_directory: Path, tag: str
) -> None:
    fill(guest, 8 * MIB, 8 * MIB)
    saved = Saved(guest, tag)
    assert saved.load(tag) == "comparison"
    (name,) = bases(runtime_directory)
    assert name.startswith(f"{guest.pid}-")
    assert (runtime_directory / name).stat().st_mode & 0o077 == 0
    read.clear()
    assert saved.load(tag) == "soft-dirty"
    assert sum(read) < 3 * MIB
    assert saved.load(tag) == "soft-dirty"
    assert marks.clearings == 3
    guest.assert_running()


def test_several_in_random_order(guest: Guest, marks: Marks) -> None:
    """For each one that was loaded before, what was written since then is known."""
    saved = Saved(guest, "a", "b", "live")
    seen: set[str] = set()
    for tag in [*"abab", "live", *saved.dice.choices([*saved.expected], k=4)]:
        assert saved.load(tag) == ("soft-dirty" if tag in seen else "comparison")
        seen.add(tag)
    guest.assert_running()


def test_so_many_are_kept(guest: Guest, marks: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_MOST_SNAPSHOTS", 2)
    saved = Saved(guest, *"abc")
    assert [saved.load(tag) for tag in "abca"] == ["comparison"] * 4


def test_what_others_load_in_between(guest: Guest, marks: Marks) -> None:
    """QEMU's own load and saves write memory like anybody else."""
    saved = Saved(guest, "a", "b")
    assert saved.load("a") == "comparison"
    assert guest.qmp.hmp("loadvm b") == ""
    assert saved.load("a") == "soft-dirty"
    cli("save", "--live", "c", monitor=guest.address)
    assert saved.load("a") == "soft-dirty"


def foreign_clearing(saved: Saved, *_: object) -> None:
    soft_dirty.clear(saved.guest.pid)


def another_load(saved: Saved, *_: object) -> None:
    """Of another user, for example, who would clear the marks."""
    assert load(saved.guest, "t", "--full")["method"] == "full"


def replaced_snapshot(saved: Saved, *_: object) -> None:
    saved.save("t")


def merged_pages(_: Saved, monkeypatch: pytest.MonkeyPatch, *__: object) -> None:
    monkeypatch.setattr(soft_dirty, "merging", lambda: {"run": "0\n", "full_scans": "1\n"})


def merging_pages(_: Saved, monkeypatch: pytest.MonkeyPatch, *__: object) -> None:
    monkeypatch.setattr(soft_dirty, "merging", lambda: None)


def cut_record(_: Saved, __: pytest.MonkeyPatch, runtime_directory: Path) -> None:
    (name,) = bases(runtime_directory)
    path = runtime_directory / name
    os.truncate(path, path.stat().st_size - 1)


def another_process(_: Saved, __: pytest.MonkeyPatch, runtime_directory: Path) -> None:
    """One that had this number before."""
    (name,) = bases(runtime_directory)
    contents = (runtime_directory / name).read_bytes()
    start = int(name.removesuffix(".base").partition("-")[2])
    key = b"\xa5start\xce"
    assert contents.count(key + start.to_bytes(4, "big")) == 1
    (runtime_directory / name).write_bytes(
        contents.replace(key + start.to_bytes(4, "big"), key + (start - 1).to_bytes(4, "big"))
    )


def no_base_kept(_: Saved, __: pytest.MonkeyPatch, runtime_directory: Path) -> None:
    (name,) = bases(runtime_directory)
    (runtime_directory / name).unlink()


DOUBTS: list[Callable[..., None]] = [
    foreign_clearing, another_load, replaced_snapshot, merged_pages, merging_pages, cut_record, another_process,
    no_base_kept,
]  # fmt: skip


def test_doubts(guest: Guest, marks: Marks, monkeypatch: pytest.MonkeyPatch, runtime_directory: Path) -> None:
    """All of RAM is compared; and where the doubt is over, that is the new base."""
    saved = Saved(guest)
    assert saved.load() == "comparison"
    for doubt in DOUBTS:
        assert saved.load() == "soft-dirty"
        scribble(guest, saved.dice)
        with monkeypatch.context() as tampered:
            doubt(saved, tampered, runtime_directory)
            assert saved.load() == "comparison", doubt
        if doubt in (merged_pages, merging_pages):  # the counters are others again
            assert saved.load() == "comparison", doubt


def test_a_load_that_does_not_end_well(guest: Guest, marks: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the marks were cleared: nothing is known any more, until a load has ended well."""
    saved = Saved(guest)
    assert [saved.load() for _ in range(2)] == ["comparison", "soft-dirty"]
    scribble(guest, saved.dice)
    walk = difference.walk

    def fails(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(difference, "walk", fails)
    assert in_process(guest).method == "full"
    monkeypatch.setattr(difference, "walk", walk)
    assert saved.load() == "comparison"


def test_somebody_resumes_the_guest_meanwhile(guest: Guest, marks: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Saved(guest)
    assert saved.load() == "comparison"
    walk = difference.walk

    def walked(*given: Any, **more: Any) -> difference.Found:
        guest.qmp("cont")
        guest.wait_for_ticks(2)
        guest.qmp("stop")
        return walk(*given, **more)

    monkeypatch.setattr(difference, "walk", walked)
    assert in_process(guest).method == "full"
    monkeypatch.setattr(difference, "walk", walk)
    assert saved.load() == "comparison"


def lying(monkeypatch: pytest.MonkeyPatch, address: int) -> None:
    """Have one written page shown as unwritten."""
    states = Pagemap.states

    def shown(pages: Pagemap, begin: int, size: int) -> bytes:
        found = bytearray(states(pages, begin, size))
        assert found[(address - begin) // PAGE] != soft_dirty.UNWRITTEN
        found[(address - begin) // PAGE] = soft_dirty.UNWRITTEN
        return bytes(found)

    monkeypatch.setattr(Pagemap, "states", shown)


@pytest.mark.parametrize("verify", [False, True])
def test_one_page_left_out_is_found(guest: Guest, marks: Marks, monkeypatch: pytest.MonkeyPatch, verify: bool) -> None:
    """The control of these tests; and --verify looks at no marks."""
    saved = Saved(guest)
    assert saved.load() == "comparison"
    fill(guest, 20 * MIB, 1)
    lying(monkeypatch, host_address(guest, 20 * MIB))
    result = in_process(guest, running=False, verify=verify)
    assert result.method == ("full" if verify else "delta")
    assert (ram(guest) == saved.expected["t"]) is verify


def test_a_device_that_may_write_meanwhile(launch: Launch, tmp_path: Path, marks: Marks) -> None:
    """It could write between the look at the marks and the clearing."""
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"),
        "-device", "virtio-serial", "-chardev", "null,id=c", "-device", "virtserialport,chardev=c",
    )  # fmt: skip
    guest.wait_for_ticks()
    saved = Saved(guest)
    assert [saved.load() for _ in range(2)] == ["comparison"] * 2
    assert marks.clearings == 0


MIXED = [
    "-object", "memory-backend-ram,id=m0,size=32M", "-numa", "node,memdev=m0",
    "-object", "memory-backend-memfd,id=m1,size=32M", "-numa", "node,memdev=m1",
]  # fmt: skip


@pytest.mark.parametrize(("options", "block"), [(MIXED, "m0"), (["-machine", "pc"], "pc.ram")])
def test_other_memory(
    launch: Launch, tmp_path: Path, marks: Marks, runtime_directory: Path, options: list[str], block: str
) -> None:
    """A block of a file is compared whole, beside one that is not."""
    guest = launch(*blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"), *options, memory="64")
    guest.wait_for_ticks()
    ranges = [(0, 32 * MIB), (32 * MIB, 32 * MIB)]
    dice = seeded(5)
    scribble(guest, dice, 4 * MIB, 40 * MIB)
    cli("save", "t", monitor=guest.address)
    loaded_by_qemu(guest, "t")
    expected = ram(guest, *ranges)
    guest.qmp("cont")
    for found_by in ("comparison", "soft-dirty", "soft-dirty"):
        scribble(guest, dice, 4 * MIB, 40 * MIB)
        assert in_process(guest, running=False).found_by == found_by
        assert ram(guest, *ranges) == expected
        guest.qmp("cont")
    guest.assert_running()
    (name,) = bases(runtime_directory)
    assert [*msgspec.msgpack.decode((runtime_directory / name).read_bytes())["blocks"]] == [block]


def test_a_state_that_has_changed(guest: Guest, marks: Marks, tmp_path: Path) -> None:
    """Where it is read again, the records must be as they were; the guest runs on."""
    fill(guest, 4 * MIB, 2 * MIB)
    saved = Saved(guest, "live")
    assert saved.load("live") == "comparison"
    page = 5 * MIB // PAGE
    path = tmp_path / "disk0.qcow2.live.qsnap"
    contents = bytearray(path.read_bytes())
    contents[contents.index(((page + 1) * PAGE | 0x28).to_bytes(8, "big")) + 7] = 0x29
    path.write_bytes(contents)
    fill(guest, page * PAGE, 3 * PAGE)
    count = guest.counter
    with pytest.raises(qsnap.PrecheckRefused, match="it has changed since it was loaded"):
        in_process(guest, "live")
    assert guest.counter > count
    guest.assert_running()


def test_this_kernel(guest: Guest, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the stand-in: where the kernel keeps no marks, none are cleared, and loads compare all of RAM."""
    clearings: list[int] = []
    clear = soft_dirty.clear

    def counted(pid: int) -> None:
        clearings.append(pid)
        clear(pid)

    monkeypatch.setattr(soft_dirty, "clear", counted)
    saved = Saved(guest)
    has = soft_dirty.is_kept()
    assert saved.load() == "comparison"
    assert saved.load() == ("soft-dirty" if has else "comparison")
    assert clearings == [guest.pid] * 2 * has
    assert len(bases(runtime_directory)) == has


def test_records_of_processes_that_have_ended_go(guest: Guest, marks: Marks, runtime_directory: Path) -> None:
    (runtime_directory / "1-1.base").write_bytes(b"")
    (runtime_directory / f"{os.getpid()}-1.base").write_bytes(b"")
    assert Saved(guest).load() == "comparison"
    assert [name.split("-")[0] for name in bases(runtime_directory)] == [str(guest.pid)]
