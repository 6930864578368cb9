"""What the rows of all snapshot tables say of a tag."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest

from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.model.qemu import NodeSnapshot
from qsnap.model.snapshots import StateFile
from support.graphs import graph, node

pytestmark = pytest.mark.no_qemu


def row(tag: str, size: int = 0, clock: int = 1) -> NodeSnapshot:
    return NodeSnapshot(tag=tag, id="1", vm_state_size=size, date=datetime(2026, 1, 1, tzinfo=UTC), vm_clock_ns=clock)


def test_kinds_of_snapshots() -> None:
    two = graph(
        node("a", snapshots=(row("full", 5), row("disks"), row("half", 5), row("mixed", 5))),
        node("b", snapshots=(row("full"), row("disks"), row("mixed", 0, 2))),
    )
    found = {s.tag: s for s in snapshots.snapshots(two, rules.survey(two).devices)}
    assert {tag: s.kind for tag, s in found.items()} == {
        "full": "full", "disks": "disk-only", "half": "partial", "mixed": "full",
    }  # fmt: skip
    assert found["half"].missing == ("b",)
    assert found["mixed"].problems


def test_of_two_that_cannot_be_loaded_neither_gets_the_others_name() -> None:
    newer = msgspec.structs.replace(row("t.qsnap-2", 5, 2), date=datetime(2026, 1, 2, tzinfo=UTC))
    two = graph(node("a", snapshots=(row("t", 5), newer)), node("b"))
    found = snapshots.snapshots(two, rules.survey(two).devices)
    assert {one.tag: one.disk_tag for one in found} == {"t": "t", "t.qsnap-2": "t.qsnap-2"}


@pytest.mark.parametrize("whole", ["t", "t.qsnap-2"])
def test_only_what_is_of_no_use_makes_room_for_the_new_one(whole: str) -> None:
    """Two names of one tag, each with a state file: what does not count may go before a live save, and no more."""
    half = {"t": "t.qsnap-2", "t.qsnap-2": "t"}[whole]
    both = graph(node("a", snapshots=(row(whole), row(half, clock=2))), node("b", snapshots=(row(whole),)))
    files = [
        StateFile(
            path=f"/{name}", size=9, disk_tag=name, image="/a", vm_state_size=5, date=row("").date, vm_clock_ns=clock
        )
        for name, clock in ((whole, 1), (half, 2))
    ]
    devices = rules.survey(both).devices
    new = snapshots.new_name(snapshots.snapshots(both, devices, files), devices, "t", keeps_older=True)
    assert new.disk_tag == half
    assert (new.spare.tags, new.spare.files) == ((half,), (f"/{half}",))
    assert (new.older.tags, new.older.files) == ((whole,), (f"/{whole}",))
