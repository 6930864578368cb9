"""Protection as QEMU itself shows it, so that a user who cannot read the notes does not delete what they protect.

The notes lie in a file beside the image (:mod:`qsnap.inventory.notes`). Over TCP, from another container or as another
user they may be out of sight. So qsnap sets marks in QEMU, which all its monitors show, and which end with its process:

* ``qsnap-kept-SNAPSHOT-PLACE``: a snapshot is protected by the notes at that place.
* ``qsnap-noted-IMAGES``: the notes beside these images have been read, and what they protect has such marks.

SNAPSHOT, PLACE and IMAGES are digests, so that the names carry all the data, and one command lists them. Every command
that holds the claim and can read the notes updates the marks.

No better place survives QEMU. A persistent dirty bitmap would lie in the image, but QEMU loads no
snapshot of an image that has one, even if it is disabled ("Device has active dirty bitmaps"; seen on 7.2, 10.0 and
11.1). A disk-only snapshot as a mark would keep a copy of every cluster that the guest goes on to write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.inventory.notes import Note, Notes
from qsnap.model.checks import Device
from qsnap.model.qemu import BlockGraph
from qsnap.model.snapshots import Snapshot
from qsnap.monitor import Monitor
from qsnap.monitor.names import HERE, NOTED, PROTECTED


class Marks(msgspec.Struct, frozen=True):
    """The marks of a VM: see above.

    :ivar names: the names of the marks.
    """

    names: frozenset[str]

    def protects(self, snapshot: Snapshot) -> bool:
        """Whether any notes protect the snapshot."""
        return any(name.startswith(_heads(snapshot)) for name in self.names)

    def of(self, found: Iterable[Snapshot]) -> frozenset[str]:
        """The marks of snapshots, whichever notes protect them."""
        return frozenset(name for one in found for name in self.names if name.startswith(_heads(one)))

    def changes(
        self, notes: Notes, graph: BlockGraph, devices: Iterable[Device]
    ) -> tuple[frozenset[str], frozenset[str]]:
        """The marks to add and to remove, so that QEMU's marks match the notes that can be read."""
        wanted = {_protecting(note, path) for path, found in notes.by_place.items() for note in found if note.protected}
        places = tuple(_digest(path) for path in notes.by_place)
        stale = {name for name in self.names if name.startswith(PROTECTED) and name.endswith(places)} - wanted
        if not notes.unseen:
            wanted.add(_noted(graph, devices))
            stale |= {name for name in self.names if name.startswith(NOTED)} - wanted
        return frozenset(wanted - self.names), frozenset(stale)

    def tells_all(self, graph: BlockGraph, devices: Iterable[Device]) -> bool:
        """Whether the marks include everything that the notes beside the images protect."""
        return _noted(graph, devices) in self.names


async def read_marks(monitor: Monitor) -> Marks:
    """Ask QEMU for the marks, and for that of :mod:`qsnap.inventory.lineage`."""
    return Marks(frozenset(await monitor.marks((PROTECTED, NOTED, HERE))))


def of_notes(notes: Iterable[Note], place: Path) -> frozenset[str]:
    """The marks for the notes at *place*. They are set before the notes are written, so that none is ever missing."""
    return frozenset(_protecting(note, place) for note in notes if note.protected)


def _heads(snapshot: Snapshot) -> tuple[str, ...]:
    clock_ms = snapshot.vm_clock_ns // 1_000_000
    return tuple(f"{PROTECTED}{_digest(tag, clock_ms)}-" for tag in {snapshot.tag, snapshots.owner(snapshot)})


def _protecting(note: Note, place: Path) -> str:
    return f"{PROTECTED}{_digest(note.tag, note.vm_clock_ms)}-{_digest(place)}"


def _noted(graph: BlockGraph, devices: Iterable[Device]) -> str:
    files = (rules.image_file(graph, device.image) for device in devices if device.image)
    return noted({file.filename for file in files if file is not None})


def noted(images: Collection[str]) -> str:
    """The name of the mark that says that the notes beside all *images* have been read.

    :param images: QEMU's names of the files, which are the same for every user.
    """
    return f"{NOTED}{_digest(*sorted(images))}"


def _digest(*parts: object) -> str:
    import hashlib

    text = "\0".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
