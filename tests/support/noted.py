"""A VM of two disks whose images this process has open, as a QEMU has its own, and the notes beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from qsnap.inventory import snapshots
from qsnap.inventory.devices import survey
from qsnap.inventory.notes import Note, Notes
from qsnap.inventory.state_file import Content
from qsnap.inventory.state_store import StateStore
from qsnap.model.checks import Device
from qsnap.model.qemu import BlockGraph, NodeSnapshot
from qsnap.model.snapshots import Snapshot
from support.graphs import graph, node
from support.state_files import DATE, written


def row(tag: str, clock_ms: int, size: int = 5) -> NodeSnapshot:
    return NodeSnapshot(tag=tag, id="1", vm_state_size=size, date=DATE, vm_clock_ns=clock_ms * 1_000_000 + 7)


class Vm:
    """Two disks, of which the first holds snapshots, in a directory.

    :ivar places: the files for notes.
    :ivar base: the file name of what lies below the first disk; "" where nothing does.
    """

    def __init__(self, directory: Path) -> None:
        self.images = [directory / "a", directory / "b"]
        self.names = [*map(str, self.images)]
        self.places = [Path(f"{image}.qsnap-notes") for image in self.images]
        self.base = ""
        self.rows: tuple[NodeSnapshot, ...] = (row("t", 1), row("u", 2))
        for image in self.images:  # any image that can be known by what is in it
            written(image, Content("t", str(image), 9, DATE, 7))

    @property
    def graph(self) -> BlockGraph:
        below = (("file", "below-a"), *((("backing", "base"),) if self.base else ()))
        return graph(
            node("a", filename=self.names[0], snapshots=self.rows, children=below),
            *([node("base", filename=self.base)] if self.base else []),
            node("below-a", "file", filename=self.names[0]),
            node("b", filename=self.names[1], snapshots=self.rows, children=(("file", "below-b"),)),
            node("below-b", "file", filename=self.names[1]),
        )

    @property
    def devices(self) -> Sequence[Device]:
        return survey(self.graph).devices

    @property
    def found(self) -> tuple[Snapshot, ...]:
        return snapshots.snapshots(self.graph, self.devices)

    def notes(self) -> Notes:
        return Notes(StateStore(os.getpid()), self.graph, self.devices)

    def write(self, place: int, *notes: tuple[str, int], text: str = "") -> None:
        """A file of notes on protected snapshots, each by its tag and its clock."""
        rows = [{"tag": tag, "date": 0, "vm_clock_ms": clock, "protected": True} for tag, clock in notes]
        self.places[place].write_text(text or json.dumps({"version": 1, "notes": rows}))

    def written(self) -> list[tuple[str, int]]:
        """What is noted, by tag and clock, all together."""
        there = [json.loads(place.read_text()) for place in self.places if place.exists()]
        return [(note["tag"], note["vm_clock_ms"]) for file in there for note in file["notes"]]


def note(tag: str, clock_ms: int, **more: object) -> Note:
    return Note(tag=tag, date=0, vm_clock_ms=clock_ms, **more)  # type: ignore[arg-type]
