"""Whether a snapshot may be deleted, pruned or replaced. What cannot be seen from here is not taken for absent."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import cached_property

import msgspec

from qsnap.errors import PrecheckRefused
from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.inventory.kept import Kept, kept
from qsnap.inventory.notes import Notes
from qsnap.inventory.snapshots import Holding
from qsnap.inventory.state_store import StateStore
from qsnap.model.qemu import BlockGraph, Device, Finding, Severity, Snapshot, SnapshotTables
from qsnap.monitor import Monitor
from qsnap.operations.plan import left_behind_finding, unreadable_finding

_WORD = "--ignore-unseen (config file: ignore-unseen = true)"


class Look:
    """What one moment shows of a VM's snapshots, and of what protects them: for all tags of one operation.

    What protects snapshots, and which state files there are, changes under a claim alone. So who has that reads it
    once. The snapshot tables belong to QEMU: whoever deletes gives back what is read after each deletion.

    :ivar graph: the block nodes, with their snapshots as they were last read.
    :ivar files: the state files that are there.
    """

    def __init__(
        self, monitor: Monitor, store: StateStore, graph: BlockGraph, devices: Sequence[Device] | None = None
    ) -> None:
        self.graph = graph
        self.devices = devices or rules.survey(graph, chooses_devices=monitor.chooses_devices).devices
        self.files = store.files(graph, self.devices)
        self._monitor = monitor
        self._store = store
        self._marks: Kept | None = None

    @cached_property
    def notes(self) -> Notes:
        """What is written down.

        :raise QsnapError: that is damaged.
        """
        return Notes(self._store, self.graph, self.devices)

    async def marks(self) -> Kept:
        """What QEMU itself says is protected."""
        if self._marks is None:
            self._marks = await kept(self._monitor)
        return self._marks

    def holding(self, tag: str) -> Holding:
        """All that is there of *tag*."""
        return snapshots.holding(self.graph, self.devices, tag, self.files)

    def without(self, files: Sequence[str], tables: SnapshotTables) -> None:
        """Take in that something was deleted.

        :param files: the state files that are gone.
        :param tables: as they are now.
        """
        self.graph = self.graph.with_tables(tables)
        self.files = tuple(file for file in self.files if file.path not in files)

    async def unseen(self) -> Sequence[Finding]:
        """What refuses where there may be notes that can neither be read nor are told by QEMU's marks."""
        if self._store.ignores_unseen:
            return ()
        return [*_unseen_notes(self.notes, await self.marks(), self.graph, self.devices)]

    async def refuse_removal(self, tag: str, what: str) -> None:
        """Refuse to do away with *tag* if it is protected, or if what is not seen from here may protect it or belong
        to it.

        :param what: what is not done, for people: "saved".
        :raise PrecheckRefused: one of these; nothing has been done.
        :raise QsnapError: the notes are damaged, so that it might be protected.
        """
        found = snapshots.meant(self.graph, self.devices, tag, self.files)
        if found and (findings := [finding async for finding in self._findings(found)]):
            raise PrecheckRefused(f"nothing was {what}", findings[:1])

    async def _findings(self, found: Sequence[Snapshot]) -> AsyncIterator[Finding]:
        notes, marks = self.notes, await self.marks()
        for snapshot in found:
            if notes.of(snapshot).protected or marks.protects(snapshot):
                yield Finding(
                    code="protected",
                    severity=Severity.REFUSE,
                    message=f"snapshot {snapshot.tag!r} is protected",
                    cure=f"qsnap unprotect {shlex.quote(snapshot.tag)}",
                )
        if self._store.ignores_unseen:
            return
        for finding in await self.unseen():
            yield finding
        for snapshot in found:
            if snapshot.file is not None and not snapshot.file.is_readable:
                yield unreadable_finding(snapshot.tag, snapshot.file)
            elif not snapshot.has_state and snapshot.file is None:
                for finding in _unseen_state(self._store, self.graph, self.devices, notes, snapshot):
                    yield finding


def _unseen_notes(notes: Notes, marks: Kept, graph: BlockGraph, devices: Sequence[Device]) -> Iterable[Finding]:
    if marks.tells_all(graph, devices):
        return
    for left in notes.left:
        yield Finding(
            code="unseen-notes",
            severity=Severity.REFUSE,
            message=f"a file with notes, of what is protected too, {left.told}",
            cure=f"{left.cure}; if it does not matter: {_WORD}",
        )
    if notes.unseen:
        yield Finding(
            code="unseen-notes",
            severity=Severity.REFUSE,
            message="it cannot be seen from here what is protected: notes of this VM may lie at "
            + ", ".join(notes.unseen),
            cure="run `qsnap recover` on the machine of QEMU, as its user, once after QEMU was started: then QEMU "
            f"itself tells what is protected. If there are no notes, or they do not matter: {_WORD}",
        )


def _unseen_state(
    store: StateStore, graph: BlockGraph, devices: Sequence[Device], notes: Notes, snapshot: Snapshot
) -> Iterable[Finding]:
    if left := left_behind_finding(store, graph, devices, snapshot):
        yield msgspec.structs.replace(left, cure=f"{left.cure}; if the file does not matter: {_WORD}")
    elif state_dir := notes.of(snapshot).state_dir:
        yield Finding(
            code="unseen-state-file",
            severity=Severity.REFUSE,
            message=f"snapshot {snapshot.tag!r} is a live one, and its state file was put into {state_dir}",
            cure=f"--state-dir {shlex.quote(state_dir)}; if the file is gone: {_WORD}",
        )
    elif places := store.unseen(graph, devices):
        yield Finding(
            code="unseen-state-file",
            severity=Severity.REFUSE,
            message=f"snapshot {snapshot.tag!r} may be a live one: it cannot be seen from here whether its state file "
            f"lies at {', '.join(places)}",
            cure=f"delete it where that can be seen; if there is no such file, or it does not matter: {_WORD}",
        )
