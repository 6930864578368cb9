"""The notes on snapshots: which are protected, a description and the group of each, and the disks' backing chains.

An image that QEMU has open has no place for notes. So they lie in a file beside the image that would hold the VM state,
``IMAGE.qsnap-notes``: move or copy it together with the images. (If the image cannot be seen, the file is in the
directory for state files.) It is JSON, and small. A note belongs to the snapshot with its tag and VM clock: a later
snapshot with the same tag does not inherit it. Notes of deleted snapshots are dropped when the file is next written.

If the file is lost, so are descriptions and protection, and nothing else. If it cannot be read, nothing that might be
protected is replaced, deleted or pruned. Users who cannot see the file learn from QEMU what is protected, if qsnap has
marked it there: see :mod:`qsnap.inventory.protection`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import msgspec

from qsnap.errors import BadUsage, QsnapError
from qsnap.host import files
from qsnap.inventory import snapshots
from qsnap.inventory.state_store import StateStore
from qsnap.model import typed
from qsnap.model.checks import Device
from qsnap.model.qemu import BlockGraph, Struct
from qsnap.model.snapshots import Snapshot, Together

#: The suffix of the file's name.
SUFFIX = ".qsnap-notes"
#: The greatest length of a description, in characters: it is a line in a table.
MAX_DESCRIPTION = 1000
_VERSION = 1


class Note(Struct, frozen=True):
    """The note on one snapshot. Tag and clock identify the snapshot.

    The date does not, because a human monitor shows local time, which differs between time zones.
    """

    tag: str
    date: int
    """Seconds since 1970; for people."""
    vm_clock_ms: int
    protected: bool = False
    description: str = ""
    runstate: str = ""
    """The guest's run state at the save, if the guest could not go on from it. qsnap itself notes that."""
    chains: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """The backing chain of each image, if any had one: see :func:`qsnap.inventory.snapshots.chains`.

    qsnap itself notes that.
    """
    state_dir: str = ""
    """The directory of its state file, if that is not beside the image. qsnap itself notes that."""
    together: Together | None = None
    """The group that it is part of. qsnap itself notes that."""

    checksums: dict[str, str] = msgspec.field(default_factory=dict)
    """SHA-256 of what is stored in each image, and in the state file, from the first verification that read it all.

    qsnap itself notes that.
    """

    @property
    def says_something(self) -> bool:
        """Whether the note is worth keeping."""
        return self.protected or bool(
            self.description or self.runstate or self.chains or self.state_dir or self.together or self.checksums
        )


class ChangeBelow(Struct, frozen=True):
    """An image whose backing chain has changed since a snapshot was saved.

    :ivar node: the image's node-name.
    :ivar then: file names, the nearest first.
    """

    node: str
    then: tuple[str, ...]
    now: tuple[str, ...]

    def clause(self, name: str) -> str:
        """The change in words, for the disk with the user's *name*."""
        then, now = (" and ".join(names) or "no other image" for names in (self.then, self.now))
        return f"{name} had {then} below it when it was saved, and has {now} now"


class _File(Struct, frozen=True):
    version: int
    notes: tuple[Note, ...]


def _key(note: Note) -> tuple[str, int]:
    return note.tag, note.vm_clock_ms


def blank(snapshot: Snapshot) -> Note:
    """An empty note for a snapshot."""
    return Note(tag=snapshot.tag, date=int(snapshot.date.timestamp()), vm_clock_ms=snapshot.vm_clock_ns // 1_000_000)


class Notes:
    """The notes of one VM, as they were read.

    :ivar by_place: the notes in each file that may hold some; empty for a missing file.
    :ivar unseen: the images beside which there may be notes that cannot be seen from here, and files of notes that may
        not be read, or that lie beside the former name of an image.
    :ivar left: the files beside former names. qsnap does not use them until they lie beside the image again.
    :raise QsnapError: the notes are damaged, or not a file.
    """

    def __init__(self, store: StateStore, graph: BlockGraph, devices: Sequence[Device]) -> None:
        self._graph = graph
        self._paths = store.all_beside(graph, devices, SUFFIX)
        self.by_place: dict[Path, Sequence[Note]] = {}
        self._unread: dict[Path, OSError] = {}
        for path in self._paths:
            try:
                self.by_place[path] = _read(path)
            except OSError as error:
                if error.errno != errno.EACCES:
                    raise _unreadable(path, error) from error
                self._unread[path] = error
        clocks = {row.vm_clock_ns // 1_000_000 for d in devices if d.image for row in graph.nodes[d.image].snapshots}
        self.left = tuple(left for left in store.left_beside(graph, devices, SUFFIX) if _is_about(left.path, clocks))
        self.unseen = (
            *store.unseen_images(graph, devices),
            *map(str, self._unread),
            *(str(left.path) for left in self.left),
        )

    def refuse_unread(self) -> None:
        """Refuse to write if other notes cannot be read.

        :raise QsnapError: there are notes that cannot be read.
        """
        for path, error in self._unread.items():
            raise _unreadable(path, error)
        for left in self.left:
            raise QsnapError(left.sentence("nothing was done: a file with notes"))

    @property
    def _notes(self) -> Sequence[Note]:
        return [note for notes in self.by_place.values() for note in notes]

    def of(self, snapshot: Snapshot) -> Note:
        """The note of a snapshot, under any of its names; an empty note if there is none."""
        wanted = blank(snapshot)
        tags = (wanted.tag, snapshots.owner(snapshot))
        for note in self._notes:
            if note.tag in tags and note.vm_clock_ms == wanted.vm_clock_ms:
                return note
        return wanted

    def added_to(self, found: Iterable[Snapshot]) -> tuple[Snapshot, ...]:
        """These snapshots, with their notes, and with the problems that came up since the save."""
        return tuple(
            msgspec.structs.replace(
                one,
                protected=note.protected,
                description=note.description,
                runstate=note.runstate,
                together=note.together,
                problems=(
                    *one.problems,
                    *(change.clause(one.labels.get(change.node, change.node)) for change in changes),
                    *_problems(one, note),
                ),
            )
            for one, note, changes in ((one, self.of(one), self.changes_below(one)) for one in found)
        )

    def changes_below(self, snapshot: Snapshot) -> tuple[ChangeBelow, ...]:
        """The images whose backing chain has changed since the snapshot was saved: it lacks the data of the former one.

        After a block-stream nothing else shows this: the clusters that the snapshot read from the chain read as zeroes.
        """
        then = self.of(snapshot).chains
        found = []
        for node in snapshot.devices if then else ():
            name, now = snapshots.chain_of(self._graph, node)
            if then.get(name, now) != now:
                found.append(ChangeBelow(node, then[name], now))
        return tuple(found)

    def write(self, place: Path, changed: Collection[Note], present: Collection[Snapshot]) -> None:
        """Write *changed* notes, and drop those of tags that are not *present*.

        :param place: the file for them, if there is none yet.
        :raise QsnapError: it cannot be written, or other notes cannot be read; the file is unchanged.
        """
        self.refuse_unread()
        tags = _tags(present)
        new = {note.tag for note in changed}
        there = {(tag, blank(one).vm_clock_ms) for one in present for tag in _tags([one])} - set(map(_key, changed))
        # A tag that was saved again does not inherit the note of the older snapshot
        old = [note for note in self._notes if note.tag in tags and (note.tag not in new or _key(note) in there)]
        kept = [note for note in (*old, *changed) if note.says_something]
        existing = [path for path in self._paths if os.path.lexists(path)]
        for path in existing[1:]:
            _write(path, ())  # two images had one each
        if kept or existing:
            place = existing[0] if existing else place
            _write(place, kept)
        self.by_place = {**dict.fromkeys(self._paths, ()), place: kept}

    def forget(self, present: Collection[Snapshot]) -> None:
        """Drop the notes of tags that are not *present*.

        :raise QsnapError: the file cannot be written.
        """
        if {note.tag for note in self._notes} - _tags(present):
            self.write(self._paths[0], (), present)


def notes_path(store: StateStore, graph: BlockGraph, notes: Notes, node: str) -> Path:
    """The file for notes: beside the image of *node*, which would hold the VM state.

    :param notes: the existing notes.

    :raise NotSupported: the image cannot be seen from here, and no directory was chosen.
    :raise QsnapError: the directory cannot be written, or notes that are there cannot be read.
    """
    path = store.beside(graph, node, "", SUFFIX, always=True)
    notes.refuse_unread()
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
        raise QsnapError(f"no notes can be made in {path.parent}: it cannot be written; nothing was done")
    return path


def checked_description(text: str) -> str:
    """*text*, if it is a valid description: one line.

    :raise BadUsage: *text* is not valid.
    """
    if len(text) > MAX_DESCRIPTION:
        raise BadUsage(f"the description has {len(text)} characters, and may have {MAX_DESCRIPTION}")
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in text):
        raise BadUsage("the description must be one line, without control characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadUsage("the description is not valid UTF-8") from None
    return text


def _problems(snapshot: Snapshot, note: Note) -> Iterable[str]:
    if note.state_dir and not snapshot.has_state and snapshot.file is None:
        yield f"its RAM is not seen: its state file was put into {note.state_dir} (--state-dir)"


def _unreadable(path: Path, error: OSError) -> QsnapError:
    return QsnapError(f"the notes {path} cannot be read: {error.strerror}; a snapshot may be protected")


def _tags(present: Iterable[Snapshot]) -> set[str]:
    """The tags under which notes of these snapshots may be stored."""
    return {tag for one in present for tag in (one.tag, snapshots.owner(one))}


def _read(path: Path) -> Sequence[Note]:
    try:
        text = files.read(path)
    except FileNotFoundError:
        return ()
    try:
        file = typed.decode(text, _File)
    except (msgspec.DecodeError, ValueError) as error:
        cure = "mend the file, or move it away: then nothing is protected"
        raise QsnapError(f"the notes {path} cannot be understood: {error}; {cure}") from error
    if file.version != _VERSION:
        raise QsnapError(f"the notes {path} are of a later qsnap (version {file.version} of their form)")
    return file.notes


def _is_about(path: Path, clocks: Collection[int]) -> bool:
    """Whether a file holds notes on snapshots with these clocks (in ms), or cannot be read."""
    try:
        return any(note.vm_clock_ms in clocks for note in _read(path))
    except (OSError, QsnapError):
        return True


def _write(path: Path, notes: Sequence[Note]) -> None:
    """Replace the file with one that holds *notes*, at once; remove it if there are no notes."""
    try:
        if not notes:
            files.remove(path)
            return
        text = msgspec.json.format(msgspec.json.encode(_File(version=_VERSION, notes=tuple(notes))), indent=1)
        files.replace(path, text + b"\n", owner=_owner(path))
    except OSError as error:
        raise QsnapError(f"the notes {path} cannot be written: {error.strerror}") from error


def _owner(path: Path) -> int | None:
    """The owner to give notes that root creates: the image's, so that its owner can read them whatever root's umask."""
    try:
        return files.status(path.with_name(path.name.removesuffix(SUFFIX))).st_uid
    except OSError:
        return None
