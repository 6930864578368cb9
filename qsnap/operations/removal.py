"""Whether a snapshot may and can be deleted, pruned or replaced. What is not visible from here may still exist."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import msgspec

from qsnap.errors import PrecheckRefused
from qsnap.host import files
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.notes import Notes
from qsnap.model.checks import Finding
from qsnap.model.snapshots import Snapshot
from qsnap.monitor import Monitor
from qsnap.operations.findings import foreign_finding, left_behind_finding, unreadable_finding, unseen_state_finding
from qsnap.operations.together import lone_parts, part_finding
from qsnap.runs.run import Run

_WORD = "--ignore-unseen (config file: ignore-unseen = true)"


async def refuse_removal(
    run: Run, inventory: Inventory, tags: Collection[str], what: str, *, alone: bool = False
) -> None:
    """Refuse to delete or replace *tags* if one is, or may be, protected; or if its state file may be out of sight, or
    could not be removed (useless without the disks); or if it is part of a group that would not go as a whole.

    :param what: the refused action for the message: "saved".
    :param alone: also a part of a group.
    :raise PrecheckRefused: one of these is the case; nothing was done.
    :raise QsnapError: the notes are damaged, so that it might be protected.
    """
    monitor = run.monitor
    found = [one for tag in tags for one in inventory.under(tag)]
    parts = () if alone else await lone_parts(run, inventory, found)
    if not found:
        return
    marks = await inventory.marks(monitor)
    protected = [one for one in found if inventory.notes.of(one).protected or marks.protects(one)]
    findings = [
        *(
            Finding.refusal(
                "protected",
                f"snapshot {snapshot.tag!r} is protected",
                f"qsnap unprotect {shlex.quote(snapshot.tag)}",
            )
            for snapshot in protected
        ),
        *await unseen_notes(monitor, inventory),
        *(part_finding(one, what) for one in parts),
        *_unseen_states(inventory, found),
        *_states_that_stay(found),
    ]
    if findings:
        raise PrecheckRefused(f"nothing was {what}", findings[:1])


async def unseen_notes(monitor: Monitor, inventory: Inventory) -> Sequence[Finding]:
    """Refusals if there may be notes that cannot be read and that QEMU's marks do not cover."""
    marks = await inventory.marks(monitor)
    if inventory.store.ignores_unseen or marks.tells_all(inventory.graph, inventory.devices):
        return ()
    return tuple(_unseen_notes(inventory.notes))


def _unseen_states(inventory: Inventory, found: Iterable[Snapshot]) -> Iterable[Finding]:
    """Refusals if the RAM of one of these snapshots may be in a file that is unreadable or out of sight."""
    for snapshot in found if not inventory.store.ignores_unseen else ():
        if snapshot.file is not None and not snapshot.file.is_readable:
            yield unreadable_finding(snapshot.tag, snapshot.file)
        elif snapshot.file is not None and snapshot.file.is_foreign:
            yield foreign_finding(snapshot.tag, snapshot.file)
        elif not snapshot.has_state and snapshot.file is None:
            yield from _unseen_state(inventory, snapshot)


def _states_that_stay(found: Iterable[Snapshot]) -> Iterable[Finding]:
    for snapshot in found:
        if snapshot.file is not None and (why := files.obstacle_to_removal(Path(snapshot.file.path))):
            path = shlex.quote(snapshot.file.path)
            yield Finding.refusal(
                "state-file-stays",
                f"the state file {snapshot.file.path} of {snapshot.tag!r} cannot be removed: {why}",
                f"run qsnap as a user who may remove it, or see to that first: rm {path}",
            )


def _unseen_notes(notes: Notes) -> Iterable[Finding]:
    for left in notes.left:
        yield Finding.refusal(
            "unseen-notes",
            f"a file with notes, of what is protected too, {left.clause}",
            f"{left.cure}; if it does not matter: {_WORD}",
        )
    if notes.unseen:
        yield Finding.refusal(
            "unseen-notes",
            ("it cannot be seen from here what is protected: notes of this VM may lie at " + ", ".join(notes.unseen)),
            (
                "run `qsnap recover` by a UNIX socket of that QEMU, on its machine and as its user, once after it was "
                "started: then QEMU itself tells what is protected. If there are no notes, or they do not matter: "
                f"{_WORD}"
            ),
        )


def _unseen_state(inventory: Inventory, snapshot: Snapshot) -> Iterable[Finding]:
    if left := left_behind_finding(inventory, snapshot):
        yield msgspec.structs.replace(left, cure=f"{left.cure}; if the file does not matter: {_WORD}")
    elif state_dir := inventory.notes.of(snapshot).state_dir:
        yield Finding.refusal(
            "unseen-state-file",
            f"snapshot {snapshot.tag!r} is a live one, and its state file was put into {state_dir}",
            f"--state-dir {shlex.quote(state_dir)}; if the file is gone: {_WORD}",
        )
    elif inventory.unseen:
        cure = f"delete it where that can be seen; if there is no such file, or it does not matter: {_WORD}"
        yield unseen_state_finding(inventory, snapshot, cure)
