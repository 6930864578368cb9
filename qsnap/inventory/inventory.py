"""One look at a VM: its devices, its snapshots, their state files, and what is written down about them.

An inventory answers all questions from one reading of the VM. A caller that needs the later state looks again: a
sequence does so after it has stopped the guest, and after QEMU has saved.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

from qsnap.errors import NotSupported, SnapshotNotFound
from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.inventory.notes import Notes, notes_path
from qsnap.inventory.protection import Marks, read_marks
from qsnap.inventory.snapshots import Holding, NewName
from qsnap.inventory.state_store import LeftBehind, StateStore
from qsnap.model.checks import Device
from qsnap.model.qemu import BlockGraph, SnapshotTables
from qsnap.model.snapshots import InBacking, Snapshot, StateFile
from qsnap.monitor import Monitor

#: So many snapshots are named where one does not exist.
_NAMED = 5


async def look(
    monitor: Monitor, store: StateStore, *, vmstate: str | None = None, exclude: Collection[str] = ()
) -> Inventory:
    """Ask QEMU for all block nodes, and look at them.

    :param store: where the state files of live saves are.
    :param vmstate: the device that the user wants the VM state on. Default: QEMU's own choice.
    :param exclude: the devices that the user leaves out.
    """
    graph = await monitor.block_graph()
    return Inventory(graph, store, vmstate=vmstate, exclude=exclude)


class Inventory:
    """The state of a VM at one moment.

    State files, notes and marks change only under a claim, so a run that holds the claim reads them once. The snapshot
    tables belong to QEMU: after a deletion the caller passes the tables that it read then to :meth:`without`.

    :ivar graph: the block nodes, with their snapshot tables.
    :ivar store: where state files and notes are.
    :ivar survey: what a save would do with each device.
    """

    def __init__(
        self,
        graph: BlockGraph,
        store: StateStore,
        *,
        vmstate: str | None = None,
        exclude: Collection[str] = (),
    ) -> None:
        self.graph = graph
        self.store = store
        self.survey = rules.survey(graph, vmstate=vmstate, exclude=exclude)
        self._files: tuple[StateFile, ...] | None = None
        self._snapshots: tuple[Snapshot, ...] | None = None
        self._marks: Marks | None = None

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices, in QEMU's order."""
        return self.survey.devices

    @property
    def vmstate(self) -> str | None:
        """The node-name of the device that the VM state goes to; None if none can hold it."""
        return self.survey.vmstate

    @property
    def files(self) -> tuple[StateFile, ...]:
        """The state files that are there."""
        if self._files is None:
            self._files = self.store.files(self.graph, self.devices)
        return self._files

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """All snapshots, oldest first, without their notes."""
        if self._snapshots is None:
            self._snapshots = snapshots.snapshots(self.graph, self.devices, self.files)
        return self._snapshots

    @cached_property
    def notes(self) -> Notes:
        """The notes on the snapshots.

        :raise QsnapError: the notes are damaged.
        """
        return Notes(self.store, self.graph, self.devices)

    async def marks(self, monitor: Monitor) -> Marks:
        """The marks in QEMU that show which snapshots are protected."""
        if self._marks is None:
            self._marks = await read_marks(monitor)
        return self._marks

    async def change_marks(self, monitor: Monitor, to_set: Collection[str], to_clear: Collection[str]) -> None:
        """Set and remove marks. It is not an error if a mark exists, or is missing, already."""
        names = (await self.marks(monitor)).names
        for name in sorted(set(to_set) - names):
            await monitor.set_mark(name, "yes")
        for name in sorted(names.intersection(to_clear)):
            await monitor.clear_mark(name)
        self._marks = Marks((names | set(to_set)) - set(to_clear))

    def find(self, tag: str) -> Snapshot | None:
        """The snapshot *tag*, or None."""
        return snapshots.named(self.snapshots, tag)

    def under(self, tag: str) -> tuple[Snapshot, ...]:
        """The snapshots under *tag*: they are deleted when it is deleted or replaced."""
        return snapshots.under(self.snapshots, tag)

    def holding(self, tag: str) -> Holding:
        """Everything that exists under *tag*, whole or not."""
        return snapshots.holding(self.snapshots, self.devices, tag)

    def new_name(self, tag: str, *, keeps_older: bool) -> NewName:
        """The name under which the devices get a new snapshot: see :func:`qsnap.inventory.snapshots.new_name`."""
        return snapshots.new_name(self.snapshots, self.devices, tag, keeps_older=keeps_older)

    def holders(self, tag: str) -> tuple[str, ...]:
        """The node-names that hold *tag* in their snapshot tables, QEMU's first device first."""
        return snapshots.holders(self.graph, self.devices, tag)

    def not_found(self, tag: str, hint: str = "") -> SnapshotNotFound:
        """The error that no device holds *tag*; it says so if a backing image does, and names one that may be meant."""
        return snapshots.not_found(self.graph, self.devices, tag, f"{hint}{self.near(tag)}")

    def near(self, tag: str) -> str:
        """A sentence about the snapshot that is meant by a wrong *tag*, or about all if they are few; "" for many."""
        from difflib import get_close_matches

        tags = [one.tag for one in self.snapshots]
        spelt = {one.casefold(): one for one in tags}
        if near := get_close_matches(tag.casefold(), spelt, 1):
            return f". Did you mean {spelt[near[0]]!r}?"
        if len(tags) > _NAMED:
            return ""
        return f". There is {', '.join(map(repr, tags))}" if tags else ". There are no snapshots"

    @property
    def in_backing(self) -> tuple[InBacking, ...]:
        """The tags that are out of reach below an overlay."""
        return snapshots.in_backing(self.graph, self.devices)

    def displayed(self, nodes: Collection[str]) -> list[str]:
        """The names that messages use for the devices of these node-names."""
        return rules.displayed(nodes, self.devices)

    def left_behind(self, disk_tag: str) -> LeftBehind | None:
        """The state file of a tag that stayed at its former place when its image was renamed."""
        return self.store.left_behind(self.graph, self.devices, disk_tag)

    @cached_property
    def unseen(self) -> Sequence[str]:
        """Places where state files of this VM may lie, but qsnap cannot look."""
        return self.store.unseen(self.graph, self.devices)

    def notes_path(self) -> Path:
        """The file for notes: beside the image that would hold the VM state.

        :raise NotSupported: no device can have snapshots, or the image cannot be seen from here.
        :raise QsnapError: the directory cannot be written, or notes that are there cannot be read.
        """
        node = self.vmstate or next((device.image for device in self.devices if device.image), None)
        if node is None:
            raise NotSupported("no device of this VM can have snapshots, so there is no place for notes")
        return notes_path(self.store, self.graph, self.notes, node)

    def without(self, files: Collection[str], tables: SnapshotTables) -> None:
        """Update the inventory after a deletion.

        :param files: the paths of the state files that are gone.
        :param tables: the snapshot tables as they are now.
        """
        self._files = tuple(file for file in self.files if file.path not in files)
        self._snapshots = None
        self.graph = self.graph.with_tables(tables)
