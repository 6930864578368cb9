"""What is written down about snapshots: protection, descriptions, and what a later load should know.

The notes are in a file beside the image (:mod:`qsnap.inventory.notes`), and QEMU shows to everybody what they protect
(:mod:`qsnap.inventory.kept`). The guest is not touched.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

import msgspec

from qsnap.errors import QsnapError
from qsnap.inventory import kept, snapshots
from qsnap.inventory.inventory import Inventory
from qsnap.model.results import SaveResult
from qsnap.model.runstates import trouble_of
from qsnap.model.snapshots import Snapshot
from qsnap.runs.run import Run


async def annotate(
    run: Run, tags: Collection[str], *, protected: bool | None = None, description: str | None = None
) -> tuple[Snapshot, ...]:
    """Protect snapshots, or describe them.

    :param protected: whether they are from now on; None leaves that as it is.
    :param description: one line, "" for none; None leaves that as it is.
    :return: them, as they are now.
    :raise SnapshotNotFound: there is no such snapshot; nothing was written down.
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
    await inventory.change_marks(run.monitor, kept.of_notes(changed, place), ())
    notes.write(place, changed, inventory.snapshots)
    if protected is False:
        await inventory.change_marks(run.monitor, (), (await inventory.marks(run.monitor)).of(chosen))
    await mirror_notes(run, inventory)
    return notes.added_to(chosen)


def note_save(run: Run, inventory: Inventory, saved: SaveResult, description: str = "") -> str:
    """Write down what belongs to a snapshot that was just saved: who loads it later should know.

    That is its description; the run state of a guest that could not go on from it; what its disks stand on; and where
    a state file is that is not beside the image. The snapshot is as good without the last two.

    :param inventory: of the VM after the save.
    :return: what could not be written down, in words; "" if that does not matter.
    :raise QsnapError: the description could not be.
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
        place = inventory.notes_path() if told or (saved.file and state_dir) else None
        if place and saved.file and state_dir not in (None, place.parent):
            told["state_dir"] = str(state_dir)
        if place and told:
            note = msgspec.structs.replace(inventory.notes.of(snapshot), **told)
            inventory.notes.write(place, [note], inventory.snapshots)
    except QsnapError as error:
        if description:
            raise QsnapError(f"snapshot {saved.tag!r} was saved, but not its description: {error}") from error
        return f"nothing will tell later that the guest was {runstate}: {error}" if runstate else ""
    return ""


async def forget_notes(run: Run, inventory: Inventory) -> None:
    """Leave out the notes of snapshots that are gone. They do no harm, so an error is none.

    :param inventory: taken in this run, and told of what was deleted since.
    """
    with suppress(QsnapError):
        inventory.notes.forget(inventory.snapshots)
        await mirror_notes(run, inventory)


async def mirror_notes(run: Run, inventory: Inventory) -> None:
    """Have QEMU show to everybody what is protected, as far as that can be seen from here."""
    try:
        notes = inventory.notes
    except QsnapError:
        return  # they are damaged: who is about to delete something is told
    marks = await inventory.marks(run.monitor)
    await inventory.change_marks(run.monitor, *marks.changes(notes, inventory.graph, inventory.devices))
