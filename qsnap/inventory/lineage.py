"""Which snapshot the guest has come from last, from which each snapshot was made, and what saved it.

qsnap writes that down beside the image, in ``IMAGE.qsnap-tree``, after each save and load. QEMU keeps none of it, and
another client may have saved or loaded since. So what is written down counts only while nothing speaks against it:

* QEMU has the mark of the last load (``qsnap-here-TOKEN``), which every qsnap sets before it loads, also if it cannot
  write beside the image. If there is none, QEMU has been started anew.
* All images have the same snapshots as then, or fewer: each save by another client adds one.
* The active L1 tables lead to the same L2 tables for VM states as then: each save makes new ones, and each load puts
  those of the snapshot there, where no guest ever writes (:mod:`qsnap.inventory.vm_state`).

The same tables show which snapshot another client has loaded: the one whose L2 tables for VM states are in use. If two
snapshots share these (a live save after a load adds a second), the disk's clusters decide, as far as they differ.

If nothing of all that decides, the answer is that it is not known. The file is for people: if it is lost, no more is
lost than that. What an image without VM states was put back to (``qemu-img snapshot -a``) is found out the same way.

Facts: QEMU's block/qcow2-snapshot.c, qcow2_snapshot_create and qcow2_snapshot_goto; seen on 5.2 to 11.1.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from qsnap.errors import NotSupported
from qsnap.host import files
from qsnap.inventory.devices import SNAPSHOT_DRIVERS
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.qcow2 import L1Table, L1Tables, Unreadable
from qsnap.inventory.snapshots import owner, relevant_nodes
from qsnap.model import typed
from qsnap.model.qemu import Struct
from qsnap.model.snapshots import Kind, Origin, Position, Snapshot
from qsnap.monitor.names import HERE

SUFFIX = ".qsnap-tree"
_VERSION = 1
#: Snapshots before a snapshot that are remembered: so many of them may be deleted.
_REMEMBERED = 16

#: A snapshot's tag, and its VM clock in ms: together they tell it from a later one of that tag.
Key = tuple[str, int]


def key_of(snapshot: Snapshot) -> Key:
    """What identifies a snapshot for good."""
    return owner(snapshot), snapshot.vm_clock_ns // 1_000_000


class _Record(Struct, frozen=True):
    """What is written down.

    :ivar token: that of the mark that QEMU had then.
    :ivar trail: the snapshots that the guest has come from, the last one first.
    :ivar areas: a digest of where the active L1 tables lead for VM states.
    :ivar seen: the snapshots that there were.
    :ivar parents: for each snapshot the trail at its save.
    :ivar undo: the snapshot of what the last load has discarded; None if that was not saved.
    :ivar origins: what saved each snapshot.
    """

    version: int
    token: str
    trail: tuple[Key, ...]
    areas: str
    seen: tuple[Key, ...]
    parents: tuple[tuple[Key, tuple[Key, ...]], ...]
    undo: Key | None = None
    origins: tuple[tuple[Key, Origin], ...] = ()


class Lineage(Struct, frozen=True):
    """What is known of the snapshots of a VM.

    :ivar position: where the guest is.
    :ivar trail: the snapshots that it has come from, the last one first; empty if that is not known.
    :ivar parents: the same for the snapshots, as they were saved.
    :ivar token: that of the mark in QEMU, if it belongs to what is written down; else "".
    :ivar undo: the snapshot of what the last load has discarded; None if that was not saved, or is not known.
    :ivar origins: what saved the snapshots, as far as qsnap did.
    """

    position: Position
    trail: tuple[Key, ...] = ()
    parents: Mapping[Key, tuple[Key, ...]] = {}
    token: str = ""
    undo: Key | None = None
    origins: Mapping[Key, Origin] = {}

    def added_to(self, found: Iterable[Snapshot]) -> tuple[Snapshot, ...]:
        """These snapshots, with their parents."""
        found = tuple(found)
        tags = {key_of(one): one.tag for one in found}
        return tuple(
            msgspec.structs.replace(
                one,
                parent=self._parent(one, tags),
                here=one.tag == self.position.tag,
                origin=self.origins.get(key_of(one)),
            )
            for one in found
        )

    def _parent(self, snapshot: Snapshot, tags: Mapping[Key, str]) -> str | None:
        trail = self.parents.get(key_of(snapshot))
        if trail is None:
            return None
        return next((tags[key] for key in trail if key in tags), "")


def lineage(inventory: Inventory, marks: Collection[str]) -> Lineage:
    """Find out where the guest is.

    :param marks: the names of QEMU's marks.
    """
    record = _read(inventory)
    parents = dict(record.parents) if record else {}
    origins = dict(record.origins) if record else {}
    token = record.token if record and f"{HERE}{record.token}" in marks else ""
    if not inventory.snapshots and record is None:
        return Lineage(Position())
    with ExitStack() as stack:
        try:
            trail, unknown = _trail(inventory, record, _images(inventory, stack), marks)
        except Unreadable as error:
            trail, unknown = (), str(error)
        except OSError as error:
            trail, unknown = (), f"an image cannot be read: {error.strerror}"
    if unknown:
        return Lineage(Position(unknown=unknown), (), parents, token, origins=origins)
    tags = {key_of(one): one.tag for one in inventory.snapshots}
    last = next((number for number, key in enumerate(trail) if key in tags), len(trail))
    position = Position(
        tag=tags[trail[last]] if last < len(trail) else None, deleted=tuple(tag for tag, _ in trail[:last])
    )
    undo = record.undo if record and record.trail == trail else None
    return Lineage(position, trail, parents, token, undo, origins)


def _trail(
    inventory: Inventory, record: _Record | None, images: Mapping[str, L1Tables], marks: Collection[str]
) -> tuple[tuple[Key, ...], str]:
    """The snapshots that the guest has come from; or why that is not known."""
    alike = [one for one in inventory.snapshots if _shares_area(one, images)]
    valid, doubt = _is_valid(inventory, record, images, marks)
    if record is not None and valid:
        there = {key_of(one): one for one in inventory.snapshots}
        here = next((there[key] for key in record.trail if key in there), None)
        is_same_qemu = f"{HERE}{record.token}" in marks
        # A QEMU that runs loads only those that have a VM state; qemu-img puts disks back to any
        rivals = [one for one in alike if one is not here and (one.kind is Kind.FULL or not is_same_qemu)]
        if rival := next((one for one in rivals if here is None or not _leads_from(here, one, images)), None):
            if is_same_qemu:
                return (), f"another client may have loaded {rival.tag!r} since: nothing in the image tells"
            return (), f"the disks may have been put back to {rival.tag!r} while the VM was off: nothing in them tells"
        return record.trail, ""
    full = [one for one in alike if one.kind is Kind.FULL and any(images[node].active.state for node in one.devices)]
    if len(full) == len(alike) == 1:
        (found,) = full
        parents = dict(record.parents) if record else {}
        return (key_of(found), *parents.get(key_of(found), ())), ""
    return (), doubt


def _is_valid(
    inventory: Inventory, record: _Record | None, images: Mapping[str, L1Tables], marks: Collection[str]
) -> tuple[bool, str]:
    """Whether nothing speaks against what is written down; else what does."""
    if record is None or not record.trail:
        return False, "no save or load by qsnap is written down"
    if any(name.startswith(HERE) and name != f"{HERE}{record.token}" for name in marks):
        return False, "the last load was not completed, or could not be written down"
    seen = set(record.seen)
    if new := [one.tag for one in inventory.snapshots if key_of(one) not in seen]:
        return False, f"another client has made {new[-1]!r} since"
    if record.areas != _areas(inventory, images):
        return False, "another client has saved or loaded since"
    return True, ""


def _shares_area(snapshot: Snapshot, images: Mapping[str, L1Tables]) -> bool:
    """Whether the active tables lead to the same for VM states as those of the snapshot do, on all its devices."""
    ways = [(images[node], _l1_table(images[node], snapshot)) for node in snapshot.devices if node in images]
    return bool(ways) and all(way is not None and image.active.state == way.state for image, way in ways)


def _leads_from(mine: Snapshot, other: Snapshot, images: Mapping[str, L1Tables]) -> bool:
    for image in images.values():
        own, others = _l1_table(image, mine), _l1_table(image, other)
        if own and others and image.leads_from(own, others):
            return True
    return False


def _l1_table(image: L1Tables, snapshot: Snapshot) -> L1Table | None:
    return image.of(snapshot.disk_tag, snapshot.vm_clock_ns // 1_000_000)


def _areas(inventory: Inventory, images: Mapping[str, L1Tables]) -> str:
    """A digest of where the active tables lead for VM states. Node-names change with each start, files do not."""
    import hashlib

    graph = inventory.graph
    parts = sorted((str(inventory.store.image(graph, node) or ""), images[node].active.state) for node in images)
    return hashlib.sha256(repr([(Path(name).name, state) for name, state in parts]).encode()).hexdigest()[:32]


def write(
    inventory: Inventory,
    before: Lineage,
    last: Snapshot,
    token: str,
    *,
    saved: Origin | None,
    undo: Snapshot | None = None,
) -> bool:
    """Write down that *last* was saved or loaded; whether that could be done.

    :param inventory: taken after that; or before a load, which changes no snapshot table.
    :param before: what was known before.
    :param token: of the mark that QEMU gets.
    :param saved: what saved it; None: it was loaded.
    :param undo: of a load, the snapshot of what it has discarded.
    """
    key = key_of(last)
    parents, origins = dict(before.parents), dict(before.origins)
    if saved:
        origins[key] = saved
        parents.pop(key, None)
        if not before.position.unknown:
            parents[key] = before.trail[:_REMEMBERED]
    trail = (key, *parents.get(key, ()))[:_REMEMBERED]
    there = tuple(key_of(one) for one in inventory.snapshots)
    kept = tuple((one, parents[one]) for one in there if one in parents)
    undone = before.undo if saved else key_of(undo) if undo else None
    record = _Record(
        version=_VERSION,
        token=token,
        trail=trail,
        areas="",
        seen=there,
        parents=kept,
        undo=undone,
        origins=tuple((one, origins[one]) for one in there if one in origins),
    )
    return _try_write(inventory, record)


def renew(inventory: Inventory, before: Lineage, token: str) -> None:
    """Write down that the guest is where it was, after a save that failed or a load that was refused.

    A save changes where the active tables lead, and a load the mark.

    :param inventory: taken before it.
    :param token: of the mark that QEMU was given since; "" if it was given none.
    """
    record = _read(inventory)
    if record is not None and before.trail and before.trail == record.trail:
        _try_write(inventory, msgspec.structs.replace(record, token=token or record.token))


def forget(inventory: Inventory) -> None:
    """Remove what is written down, if there is no snapshot any more."""
    if not inventory.snapshots:
        for path in _places(inventory):
            with suppress(OSError):
                files.remove(path)


def _try_write(inventory: Inventory, record: _Record) -> bool:
    """Write the record. It is for people: if it cannot be written, it is not known later where the guest is."""
    with suppress(OSError, NotSupported, Unreadable):
        _write(inventory, record)
        return True
    return False


def _write(inventory: Inventory, record: _Record) -> None:
    """Write the record, with where the active tables lead now."""
    with ExitStack() as stack:
        images = _images(inventory, stack)
        record = msgspec.structs.replace(record, areas=_areas(inventory, images))
    node = inventory.vmstate or next(iter(images))
    place = inventory.store.beside(inventory.graph, node, "", SUFFIX, always=True)
    existing = [path for path in _places(inventory) if os.path.lexists(path)]
    for path in existing:
        if path != place:  # of another choice of the image for VM states
            files.remove(path)
    try:
        user = files.status(place.with_name(place.name.removesuffix(SUFFIX))).st_uid
    except OSError:
        user = None
    files.replace(place, msgspec.json.encode(record) + b"\n", owner=user)


def _read(inventory: Inventory) -> _Record | None:
    """What is written down; None if nothing is, or nothing that can be read."""
    for path in _places(inventory):
        with suppress(OSError, ValueError, msgspec.DecodeError):
            record = typed.decode(files.read(path), _Record)
            if record.version == _VERSION and record.trail:
                return record
    return None


def _places(inventory: Inventory) -> tuple[Path, ...]:
    return inventory.store.all_beside(inventory.graph, inventory.devices, SUFFIX)


def _images(inventory: Inventory, stack: ExitStack) -> dict[str, L1Tables]:
    """The images that can have snapshots, by node-name.

    :param stack: closes their files.
    :raise Unreadable: one cannot be seen, or is encrypted in a way that hides its tables.
    :raise OSError: one may not be read.
    """
    graph, found = inventory.graph, {}
    for node in relevant_nodes(inventory.devices):
        if node not in graph.nodes or graph.nodes[node].driver not in SNAPSHOT_DRIVERS:
            continue
        path = inventory.store.way(graph, node)
        if path is None:
            raise Unreadable(f"the image of {inventory.displayed([node])[0]} cannot be seen from here")
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        stack.callback(os.close, file)
        found[node] = L1Tables(file)
    if not found:
        raise Unreadable("no device can have snapshots")
    return found
