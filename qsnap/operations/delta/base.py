"""Which pages of RAM a load need not compare: those unwritten since an earlier load made them what the snapshot has.

A load clears the kernel's marks (:mod:`qsnap.host.soft_dirty`) while the guest is stopped, before it compares and
loads. From then on this holds, whoever writes (the guest, a device, any load): **a page of RAM without a mark is as it
was at the clearing.** That load itself marks the pages that it puts back; so after it, a page without a mark is as in
the snapshot that was loaded. For each of the snapshots loaded before, the pages that had a mark at some clearing since
are kept, and compared as well.

That is written down, with where each page is in the VM state, in the user's runtime directory. It counts only if all of
this is certain:

* QEMU has the mark of that very load (``qsnap-here-TOKEN``, :mod:`qsnap.operations.position`), which every qsnap of
  every user replaces before its next load; and it is the same process, with the same blocks of RAM.
* Nobody else has cleared the marks: the pages of the firmware (read-only memory, which only loads write) still have
  them all. That they had none after our own clearing, and have some after the load, shows that this kernel keeps marks.
* No device writes RAM while the guest is stopped; the memory is of QEMU's process alone, and not of a file; equal pages
  have not been merged meanwhile.
* The VM state is the same one: not only its tag.

If anything is not, all of RAM is compared. What is written down is removed before the marks are cleared, and written
again when the load has certainly ended well.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from qsnap.errors import QsnapError
from qsnap.host import files, processes, soft_dirty
from qsnap.host.processes import Process
from qsnap.host.soft_dirty import PAGE, Pagemap
from qsnap.inventory.stream import Frame, Run
from qsnap.model.qemu import Struct
from qsnap.operations.delta.difference import Block, Layout, States
from qsnap.operations.delta.ram import GuestRam
from qsnap.runs import runtime_dir

_SUFFIX = ".base"
_VERSION = 1
#: Snapshots that are kept, the ones loaded last; and parts of the VM state of one, as many as are read quickly.
_MOST_SNAPSHOTS = 4
_MOST_PARTS = 100_000


class _Snapshot(Struct, frozen=True):
    """A snapshot that was loaded.

    :ivar written: of each block the pages written since, up to the last clearing (bytes of 0 and 1, compressed).
    """

    machine: str
    parts: list[list[Any]]
    written: dict[str, bytes]


class _Record(Struct, frozen=True):
    """What is written down.

    :ivar token: of the mark that the load has set in QEMU.
    :ivar blocks: the private blocks of RAM that are compared.
    :ivar firmware: addresses of the firmware's pages that had a mark after the load.
    :ivar merging: the counters of the merging of equal pages.
    :ivar snapshots: by the identities of their VM states, the one loaded last at the end.
    """

    version: int
    token: str
    process: Process
    blocks: dict[str, Block]
    firmware: list[int]
    merging: Mapping[str, str]
    snapshots: dict[str, _Snapshot]


class Known(NamedTuple):
    """What is known before a comparison.

    :ivar states: those of the pages of the private blocks.
    :ivar layout: where the parts of the VM state are; None if all of it is to be read, and no page is unwritten.
    """

    states: States
    layout: Layout | None


_NOTHING = Known({}, None)


class Base:
    """The base of one load, and the next one's. Its methods block.

    :param token: of the mark that this load has set in QEMU.
    :param former: of the one before; None if this load's is not certainly set.
    """

    def __init__(self, guest: GuestRam, token: str, former: str | None) -> None:
        self._guest = guest
        self._token = token
        self._former = former
        self._process = processes.process(guest.pid)
        self._is_set = False
        self._blocks: dict[str, Block] = {}
        self._merging: Mapping[str, str] | None = None
        self._others: dict[str, _Snapshot] = {}

    def begin(self, identity: str) -> Known:
        """Find out what is unwritten, and clear the marks. The guest is stopped, and has to stay so until it is loaded.

        :param identity: of the VM state that is loaded.
        """
        with suppress(OSError, QsnapError):
            pages = Pagemap.of(self._guest.pid)
            try:
                return self._begun(pages, identity)
            finally:
                pages.close()
        return _NOTHING

    def _begun(self, pages: Pagemap, identity: str) -> Known:
        guest = self._guest
        maps = Path(f"/proc/{guest.pid}/maps").read_text(errors="replace")
        blocks = {name: one for name, one in guest.blocks.items() if soft_dirty.is_private(maps, one.address, one.size)}
        states = {name: pages.states(one.address, one.size) for name, one in blocks.items()}
        self._blocks = blocks
        self._merging = soft_dirty.merging() if soft_dirty.is_kept() else None
        known = Known({name: soft_dirty.doubted(one) for name, one in states.items()}, None)
        if not self._is_possible(maps):
            return known
        record = self._record()
        if record is not None and self._is_certain(record, pages):
            self._others = {key: _later(one, states) for key, one in record.snapshots.items()}
            if found := self._others.pop(identity, None):
                known = Known(
                    {name: soft_dirty.with_written(one, _pages(found, name)) for name, one in states.items()},
                    _layout(found),
                )
        self._path().unlink(missing_ok=True)
        soft_dirty.clear(guest.pid)
        self._is_set = not self._marked(pages)
        return known

    def _is_possible(self, maps: str) -> bool:
        """Whether the marks will tell the next load what is unwritten."""
        guest = self._guest
        return (
            self._process is not None
            and self._merging is not None
            and self._former is not None
            and guest.is_still
            and bool(self._blocks)
            and bool(guest.firmware)
            and all(soft_dirty.is_private(maps, one.address, one.size) for one in guest.firmware)
        )

    def settle(self, identity: str, layout: Layout) -> None:
        """Write down that the load has ended well: RAM was as in the VM state then, or has a mark where it was not."""
        if not self._is_set or len(layout.parts) > _MOST_PARTS:
            return
        with suppress(OSError, QsnapError):
            pages = Pagemap.of(self._guest.pid)
            try:
                self._settled(pages, identity, layout)
            finally:
                pages.close()

    def _settled(self, pages: Pagemap, identity: str, layout: Layout) -> None:
        assert self._process is not None
        assert self._merging is not None
        marked = self._marked(pages)
        if not marked:
            return
        none = {name: zlib.compress(bytes(block.size // PAGE), 1) for name, block in self._blocks.items()}
        others = dict([*self._others.items()][1 - _MOST_SNAPSHOTS :])
        latest = _Snapshot(machine=layout.machine, parts=[[*part] for part in layout.parts], written=none)
        record = _Record(
            version=_VERSION,
            token=self._token,
            process=self._process,
            blocks=self._blocks,
            firmware=marked,
            merging=self._merging,
            snapshots={**others, identity: latest},
        )
        _forget_ended()
        path = self._path()
        path.unlink(missing_ok=True)
        file = files.created(path)
        try:
            files.write(file, msgspec.msgpack.encode(record))
        finally:
            os.close(file)

    def _record(self) -> _Record | None:
        """What is written down; None if nothing is, or nothing that can be read."""
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.msgpack.decode(files.read(self._path()), type=_Record)
        return None

    def _is_certain(self, record: _Record, pages: Pagemap) -> bool:
        same = (_VERSION, self._former, self._process, self._blocks, self._merging)
        return (
            same == (record.version, record.token, record.process, record.blocks, record.merging)
            and bool(record.firmware)
            and set(record.firmware) <= set(self._marked(pages))
        )

    def _marked(self, pages: Pagemap) -> list[int]:
        """The addresses of the firmware's pages that have a mark."""
        return [
            block.address + number * PAGE
            for block in self._guest.firmware
            for number, mark in enumerate(pages.marks(block.address, block.size))
            if mark
        ]

    def _path(self) -> Path:
        assert self._process is not None
        return runtime_dir.directory() / f"{self._process.pid}-{self._process.start}{_SUFFIX}"


def _later(snapshot: _Snapshot, states: States) -> _Snapshot:
    """The same at the next clearing."""
    written = {
        name: zlib.compress(soft_dirty.not_unwritten(soft_dirty.with_written(one, _pages(snapshot, name))), 1)
        for name, one in states.items()
    }
    return msgspec.structs.replace(snapshot, written=written)


def _pages(snapshot: _Snapshot, name: str) -> bytes:
    return zlib.decompress(snapshot.written[name])


def _layout(snapshot: _Snapshot) -> Layout:
    return Layout(snapshot.machine, [Frame(*part) if len(part) == 2 else Run(*part) for part in snapshot.parts])


def _forget_ended() -> None:
    """Remove what is written down of processes that have ended."""
    for path in runtime_dir.directory().glob(f"*{_SUFFIX}"):
        with suppress(OSError, ValueError):
            pid, start = map(int, path.stem.split("-"))
            if not Process(pid=pid, start=start).is_alive:
                path.unlink()
