"""One look at a VM, and what is known after changes that were made since."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from qsnap.errors import NotSupported
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.state_store import StateStore
from qsnap.model.qemu import BlockNode, NodeSnapshot
from support.fake_monitor import FakeMonitor
from support.graphs import graph, node

pytestmark = pytest.mark.no_qemu


def row(tag: str) -> NodeSnapshot:
    return NodeSnapshot(tag=tag, id="1", vm_state_size=5, date=datetime(2026, 1, 1, tzinfo=UTC), vm_clock_ns=1)


def of(*nodes: BlockNode, states: Path | None = None) -> Inventory:
    return Inventory(graph(*nodes), StateStore(None, states))


async def test_marks_are_read_once_and_what_changes_is_known() -> None:
    """What is there already is not set again, and what is missing is not taken away."""
    monitor = FakeMonitor(texts={"qsnap-kept-a": "yes", "qsnap-kept-b": "yes"})
    inventory = of(node("a"))
    await inventory.change_marks(monitor, ["qsnap-kept-b", "qsnap-kept-c"], ["qsnap-kept-a", "qsnap-kept-z"])
    assert monitor.texts == {"qsnap-kept-b": "yes", "qsnap-kept-c": "yes"}
    monitor.texts.clear()
    assert (await inventory.marks(monitor)).names == {"qsnap-kept-b", "qsnap-kept-c"}
    assert (await of(node("a")).marks(monitor)).names == set()


def test_after_a_deletion(tmp_path: Path) -> None:
    """The tables are those that were read then; and files that are gone are gone."""
    inventory = of(node("a", snapshots=(row("t"), row("u"))), states=tmp_path)
    assert [one.tag for one in inventory.snapshots] == ["t", "u"]
    assert inventory.snapshots is inventory.snapshots
    inventory.without((), {"a": (row("u"),)})
    assert [one.tag for one in inventory.snapshots] == ["u"]


def test_the_snapshot_that_is_meant() -> None:
    """One that is spelt alike, or all if they are few."""
    few = of(node("a", snapshots=tuple(row(tag) for tag in ("Nightly", "b", "c", "d", "e"))))
    assert few.near("nightyl") == ". Did you mean 'Nightly'?"
    assert few.near("xxxx") == ". There is 'Nightly', 'b', 'c', 'd', 'e'"
    many = of(node("a", snapshots=tuple(row(tag) for tag in "bcdefg")))
    assert many.near("xxxx") == ""
    assert of(node("a")).near("x") == ". There are no snapshots"


def test_the_place_for_notes(tmp_path: Path) -> None:
    """Beside the image for the VM state; beside another one if there is none such."""
    both = of(node("first", "rbd"), node("second"), states=tmp_path)
    assert both.notes_path().name.startswith("second-")
    without = of(node("raw", "raw"), node("first", "rbd"), states=tmp_path)
    assert without.notes_path().name.startswith("first-")
    for nodes in (), (node("raw", "raw"),):
        with pytest.raises(NotSupported, match="there is no place for notes"):
            of(*nodes, states=tmp_path).notes_path()
