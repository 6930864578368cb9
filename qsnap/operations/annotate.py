"""The notes on snapshots: protection, descriptions, and facts for a later load.

The notes are in a file beside the image (:mod:`qsnap.inventory.notes`), and QEMU shows to everybody what they protect
(:mod:`qsnap.inventory.protection`). The guest is not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress

import msgspec

from qsnap.errors import QsnapError
from qsnap.inventory import lineage, protection, snapshots
from qsnap.inventory.inventory import Inventory
from qsnap.model.results import SaveResult
from qsnap.model.runstates import trouble_of
from qsnap.model.snapshots import Snapshot
from qsnap.runs.run import Run


async def annotate(
    run: Run, tags: Collection[str], *, protected: bool | None = None, description: str | None = None
) -> tuple[Snapshot, ...]:
    """Protect snapshots, or describe them.

    :param protected: whether the snapshots are protected from now on; None keeps the present state.
    :param description: one line, "" for none; None keeps the present one.
    :return: the snapshots, as they are now.
    :raise SnapshotNotFound: there is no such snapshot; no note was written.
    :raise NotSupported: the image cannot be seen from here.
    """
    inventory = await run.look()
    chosen = [one for one in inventory.snapshots if one.tag in tags]
    if missing := [tag for tag in tags if tag not in {one.tag for one in chosen}]:
        raise inventory.not_found(missing[0])
    given = {
        name: value for name, value in (("protected", protected), ("description", description)) if value is not None
    }
    notes = inventory.notes
    changed = [msgspec.structs.replace(notes.of(one), **given) for one in chosen]
    place = inventory.notes_path()
    await inventory.change_marks(run.monitor, protection.of_notes(changed, place), ())
    notes.write(place, changed, inventory.snapshots)
    if protected is False:
        await inventory.change_marks(run.monitor, (), (await inventory.marks(run.monitor)).of(chosen))
    await mirror_notes(run, inventory)
    return notes.added_to(chosen)


def note_save(run: Run, inventory: Inventory, saved: SaveResult, description: str = "") -> str:
    """Write the note of a new snapshot, for a later load.

    It holds the description; the run state of a guest that could not go on from the snapshot; the disks' backing
    chains; and the directory of a state file that is not beside the image. The snapshot is as good without the last
    two.

    :param inventory: the VM's inventory after the save.
    :return: which part of the note could not be written; "" if none, or if it does not matter.
    :raise QsnapError: the description could not be written.
    """
    snapshot = inventory.find(saved.tag)
    if snapshot is None:
        raise QsnapError(f"snapshot {saved.tag!r} was saved, and deleted by another client at once")
    told: dict[str, object] = {"description": description} if description else {}
    runstate = str(saved.runstate) if trouble_of(saved.runstate, run.monitor.version) else ""
    if runstate:
        told["runstate"] = runstate
    if chains := snapshots.chains(inventory.graph, saved.devices):
        told["chains"] = chains
    state_dir = run.store.state_dir
    try:
        if saved.file and state_dir not in (None, inventory.notes_path().parent):
            told["state_dir"] = str(state_dir)
        if told:
            note = msgspec.structs.replace(inventory.notes.of(snapshot), **told)
            inventory.notes.write(inventory.notes_path(), [note], inventory.snapshots)
    except QsnapError as error:
        if description:
            raise QsnapError(f"snapshot {saved.tag!r} was saved, but not its description: {error}") from error
        return f"nothing will tell later that the guest was {runstate}: {error}" if runstate else ""
    return ""


async def note_checksums(run: Run, checksums: Mapping[str, Mapping[str, str]]) -> None:
    """Write down checksums of snapshots, by tag: see :mod:`qsnap.operations.verify`.

    :raise QsnapError: they cannot be written.
    """
    inventory = await run.look()
    notes = inventory.notes
    changed = [
        msgspec.structs.replace(note, checksums={**note.checksums, **checksums[one.tag]})
        for one, note in ((one, notes.of(one)) for one in inventory.snapshots if one.tag in checksums)
    ]
    notes.write(inventory.notes_path(), changed, inventory.snapshots)


async def forget_notes(run: Run, inventory: Inventory) -> None:
    """Drop what is written down of deleted snapshots. It does no harm, so an error is ignored.

    :param inventory: taken in this run, and updated after each deletion.
    """
    lineage.forget(inventory)
    with suppress(QsnapError):
        inventory.notes.forget(inventory.snapshots)
        await mirror_notes(run, inventory)


async def mirror_notes(run: Run, inventory: Inventory) -> None:
    """Set QEMU's marks for all users from the notes, as far as those can be seen from here."""
    try:
        notes = inventory.notes
    except QsnapError:
        return  # the notes are damaged: reported when something is deleted
    marks = await inventory.marks(run.monitor)
    await inventory.change_marks(run.monitor, *marks.changes(notes, inventory.graph, inventory.devices))
