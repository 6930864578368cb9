"""What a user should know of a VM's snapshots beside what the list says: what is out of reach, or cannot be seen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from qsnap.errors import QsnapError
from qsnap.inventory.inventory import Inventory
from qsnap.model.snapshots import Kind, Snapshot
from qsnap.monitor import Monitor


def of_backing(inventory: Inventory, only: Collection[str] | None = None) -> list[str]:
    """Snapshots, or their parts, that are out of reach below an overlay; *only* those with some tags."""
    tags: dict[tuple[str, str], list[str]] = {}
    for one in inventory.in_backing if only is None else (one for one in inventory.in_backing if one.tag in only):
        tags.setdefault((one.image, one.device), []).append(one.tag)
    return [
        f"the backing image {image} of {device} holds {', '.join(names)}: out of reach until the overlay is "
        "committed (block-commit)"
        for (image, device), names in tags.items()
    ]


def of_files(inventory: Inventory, found: Iterable[Snapshot]) -> list[str]:
    """Disk-only snapshots whose RAM is in a file beside the former name of an image, or may be where we cannot look."""
    disks = [one for one in found if one.kind is Kind.DISK_ONLY]
    left = [(one, inventory.left_behind(one.disk_tag)) for one in disks]
    remarks = [file.sentence(f"{one.tag!r} is a live snapshot, and its state file") for one, file in left if file]
    return remarks + of_unseen_files(inventory, [one.tag for one in disks])


def of_unseen_files(inventory: Inventory, tags: Collection[str]) -> list[str]:
    """Disk-only snapshots among *tags* that may have their RAM in a file that cannot be seen from here."""
    disks = [one.tag for one in inventory.snapshots if one.kind is Kind.DISK_ONLY and one.tag in tags]
    if not disks or inventory.store.ignores_unseen or not (places := inventory.unseen):
        return []
    return [
        f"it cannot be seen from here what is at {', '.join(places)}: there may be the RAM of live snapshots "
        f"({', '.join(disks)})"
    ]


async def of_unseen_notes(monitor: Monitor, inventory: Inventory) -> list[str]:
    """Notes that may exist and cannot be seen from here, if QEMU does not report what they protect.

    :raise QsnapError: the notes are damaged.
    """
    notes, marks = inventory.notes, await inventory.marks(monitor)
    remarks = [left.sentence("a file with notes") for left in notes.left]
    is_all_told = inventory.store.ignores_unseen or marks.tells_all(inventory.graph, inventory.devices)
    if notes.unseen and not notes.left and not is_all_told:
        remarks.append(
            "it cannot be seen from here which snapshots are protected: notes of this VM may be beside "
            f"{', '.join(notes.unseen)}"
        )
    return remarks


async def with_notes(
    monitor: Monitor, inventory: Inventory, found: Sequence[Snapshot]
) -> tuple[tuple[Snapshot, ...], list[str]]:
    """These snapshots with their notes, as far as those can be seen from here; and what cannot be seen of them."""
    if not found:
        return (), []
    marks = await inventory.marks(monitor)
    try:
        found = inventory.notes.added_to(found)
        remarks = await of_unseen_notes(monitor, inventory)
    except QsnapError as error:
        remarks = [str(error)]
    return tuple(msgspec.structs.replace(one, protected=True) if marks.protects(one) else one for one in found), remarks
