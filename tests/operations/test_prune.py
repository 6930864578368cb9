"""What a prune of a series does, and what it leaves alone, without QEMU."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from qsnap.errors import BadUsage, PrecheckRefused
from qsnap.inventory.state_store import StateStore
from qsnap.operations.prune import PruneRequest, do_prune
from qsnap.runs.run import Run
from qsnap.upkeep.retention import Policy
from support.fake_monitor import FakeMonitor

pytestmark = pytest.mark.no_qemu

TAGS = ("n-20260101T000000", "n-20260102T000000", "n-20260103T000000")


async def with_series() -> FakeMonitor:
    """Three snapshots of a series, and one of none."""
    monitor = FakeMonitor()
    for day, tag in enumerate((*TAGS, "other")):
        monitor.now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day)
        await monitor.snapshot_save(tag, "disk0", ["disk0", "disk1"])
    monitor.calls.clear()
    return monitor


def left(monitor: FakeMonitor) -> list[str]:
    return [row.tag for row in monitor.rows["disk0"]]


@pytest.mark.parametrize("dry_run", [True, False])
async def test_what_the_policy_does_not_keep(dry_run: bool) -> None:
    monitor = await with_series()
    run = Run(monitor)
    inventory = await run.look()
    result = await do_prune(run, PruneRequest("n", Policy(last=1), dry_run=dry_run), inventory)
    assert ([one.tag for one in result.keep], [one.tag for one in result.remove]) == ([TAGS[2]], [TAGS[1], TAGS[0]])
    assert (result.dry_run, result.other_series) == (dry_run, ())
    assert left(monitor) == ([*TAGS, "other"] if dry_run else [TAGS[2], "other"])
    assert inventory.holding(TAGS[0]).exists is dry_run, "what the caller has is kept up to date"


async def test_nothing_to_remove() -> None:
    monitor = await with_series()
    result = await do_prune(Run(monitor), PruneRequest("n", Policy(last=3)))
    assert (len(result.keep), result.remove, monitor.calls) == (3, (), [])
    other = await do_prune(Run(monitor), PruneRequest("m", Policy(last=1)))
    assert (other.keep, other.remove, other.other_series) == ((), (), ("n",))
    with pytest.raises(BadUsage):
        await do_prune(Run(monitor), PruneRequest("", Policy(last=1)))
    assert left(monitor) == [*TAGS, "other"]


async def test_notes_that_cannot_be_seen() -> None:
    """What is protected may stand there: nothing is removed. Where nothing is to be, nobody asks."""
    monitor = await with_series()
    run = Run(monitor, StateStore(None))
    assert len((await do_prune(run, PruneRequest("n", Policy(last=3)))).keep) == 3
    with pytest.raises(PrecheckRefused, match="nothing was pruned"):
        await do_prune(run, PruneRequest("n", Policy(last=1)))
    assert left(monitor) == [*TAGS, "other"]
