"""Whether a snapshot may be deleted, pruned or replaced. What cannot be seen from here is not taken for absent."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from qsnap import snapshots
from qsnap.errors import PrecheckRefused
from qsnap.kept import Kept, kept
from qsnap.model import BlockGraph, Device, Finding, Severity, Snapshot
from qsnap.monitor import Monitor
from qsnap.notes import Notes
from qsnap.precheck import unreadable_finding
from qsnap.statefile.shelf import Shelf

_WORD = "--ignore-unseen (config file: ignore-unseen = true)"


async def refuse_removal(
    monitor: Monitor, shelf: Shelf, graph: BlockGraph, devices: Sequence[Device], tag: str, what: str
) -> None:
    """Refuse to do away with *tag* if it is protected, or if what is not seen from here may protect it or belong to it.

    :param what: what is not done, for people: "saved".
    :raise PrecheckRefused: one of these; nothing has been done.
    :raise QsnapError: the notes are damaged, so that it might be protected.
    """
    found = snapshots.meant(graph, devices, tag, shelf.files(graph, devices))
    if not found:
        return
    notes = Notes(shelf, graph, devices)
    marks = await kept(monitor)
    if findings := [*_findings(shelf, graph, devices, notes, marks, found)]:
        raise PrecheckRefused(f"nothing was {what}", findings[:1])


def _findings(
    shelf: Shelf, graph: BlockGraph, devices: Sequence[Device], notes: Notes, marks: Kept, found: Iterable[Snapshot]
) -> Iterable[Finding]:
    found = tuple(found)
    for snapshot in found:
        if notes.of(snapshot).protected or marks.protects(snapshot):
            yield Finding(
                code="protected",
                severity=Severity.REFUSE,
                message=f"snapshot {snapshot.tag!r} is protected",
                cure=f"qsnap unprotect {shlex.quote(snapshot.tag)}",
            )
    if shelf.ignores_unseen:
        return
    yield from unseen_findings(notes, marks, graph, devices)
    for snapshot in found:
        if snapshot.file is not None and not snapshot.file.is_readable:
            yield unreadable_finding(snapshot.tag, snapshot.file)
        elif not snapshot.has_state and snapshot.file is None:
            yield from _unseen_state(shelf, graph, devices, notes, snapshot)


def unseen_findings(notes: Notes, marks: Kept, graph: BlockGraph, devices: Sequence[Device]) -> Iterable[Finding]:
    """What refuses where there may be notes that can neither be read nor are told by QEMU's marks."""
    if notes.unseen and not marks.tells_all(graph, devices):
        yield Finding(
            code="unseen-notes",
            severity=Severity.REFUSE,
            message="it cannot be seen from here what is protected: notes of this VM may lie at "
            + ", ".join(notes.unseen),
            cure="run `qsnap recover` on the machine of QEMU, as its user, once after QEMU was started: then QEMU "
            f"itself tells what is protected. If there are no notes, or they do not matter: {_WORD}",
        )


def _unseen_state(
    shelf: Shelf, graph: BlockGraph, devices: Sequence[Device], notes: Notes, snapshot: Snapshot
) -> Iterable[Finding]:
    if state_dir := notes.of(snapshot).state_dir:
        yield Finding(
            code="unseen-state-file",
            severity=Severity.REFUSE,
            message=f"snapshot {snapshot.tag!r} is a live one, and its state file was put into {state_dir}",
            cure=f"--state-dir {shlex.quote(state_dir)}; if the file is gone: {_WORD}",
        )
    elif places := shelf.unseen(graph, devices):
        yield Finding(
            code="unseen-state-file",
            severity=Severity.REFUSE,
            message=f"snapshot {snapshot.tag!r} may be a live one: it cannot be seen from here whether its state file "
            f"lies at {', '.join(places)}",
            cure=f"delete it where that can be seen; if there is no such file, or it does not matter: {_WORD}",
        )
