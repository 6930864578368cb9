"""What the rows of all snapshot tables say of a tag."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.model.qemu import NodeSnapshot
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
