"""Whether a snapshot can be loaded, and how, from what a monitor tells, without a QEMU."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from qsnap.errors import NotSupported, PrecheckRefused, SnapshotNotFound
from qsnap.model.qemu import BlockBackend, BlockGraph, Migration, NodeSnapshot, QemuVersion, RunState
from qsnap.model.requests import SaveRequest
from qsnap.operations.plan import LoadPlan, plan_load, plan_save
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.graphs import graph, node, over, used_by_devices
from support.stores import Store, file

pytestmark = pytest.mark.no_qemu


class Showing(FakeMonitor):
    """A monitor that shows these block nodes."""

    def __init__(self, shown: BlockGraph, failed: str | None = "", **more: Any) -> None:
        super().__init__(chooses_devices=shown.chooses_devices, **more)
        self._graph = shown
        self._failed = failed

    async def block_graph(self) -> BlockGraph:
        return self._graph

    async def migration(self) -> Migration:
        return Migration(error=self._failed)


def held(size: int = 0, tag: str = "t") -> tuple[NodeSnapshot, ...]:
    return (NodeSnapshot(tag=tag, id="7", vm_state_size=size, date=datetime(2026, 1, 1, tzinfo=UTC), vm_clock_ns=1),)


async def planned(shown: BlockGraph, exclude: Collection[str] = (), force: bool = False, **more: Any) -> LoadPlan:
    return await plan_load(Run(Showing(shown, **more)), "t", exclude=exclude, force=force)


async def refused(shown: BlockGraph, *exclude: str, **more: Any) -> list[str]:
    """The codes of what is found."""
    with pytest.raises(PrecheckRefused) as error:
        await planned(shown, exclude, **more)
    return [finding.code for finding in error.value.findings]


TWO = (node("a", snapshots=held(5)), node("b", snapshots=held()))


async def test_what_goes_back() -> None:
    """All that is not left out, by the names of the images."""
    nodes = (*TWO, over("top", "throttle", "fmt"), node("fmt", snapshots=held()), node("r", "raw"))
    cd = BlockBackend(name="cd", root=None)
    shown = graph(*nodes)
    shown = msgspec.structs.replace(shown, backends=(cd, *shown.backends))
    plan = await planned(shown, ["r"])
    assert (plan.devices, plan.excluded, plan.vmstate) == (("a", "b", "fmt"), ("r",), "a")
    plan = await planned(shown, ["top", "r"])
    assert (plan.devices, plan.excluded) == (("a", "b"), ("fmt", "r"))
    assert await refused(shown) == ["device-cannot-snapshot"]
    with pytest.raises(SnapshotNotFound, match=r"partial: fmt lacks it; .* leave that as it is now: --exclude fmt$"):
        await planned(graph(*TWO, over("top", "throttle", "fmt"), node("fmt")))
    with pytest.raises(SnapshotNotFound, match=r"fmt lacks it; .* --exclude fmt --exclude r$"):
        await planned(graph(*TWO, over("top", "throttle", "fmt"), node("fmt"), node("r", "raw")))


async def test_what_cannot_go_back_is_refused_for_what_it_is() -> None:
    """And not because the snapshot lacks it."""
    below = (over("top", "throttle", "fmt"), node("fmt", refcount_bits=1))
    assert await refused(graph(*TWO, *below)) == ["device-cannot-snapshot"]
    assert (await planned(graph(*TWO, *below), ["top"])).excluded == ("fmt",)


async def test_what_stands_in_the_way_of_a_save() -> None:
    """Of a live one nothing does that is about the image for the VM state. By HMP nothing can be left out."""
    shown = graph(node("e", encrypted=True), node("r", "raw"))
    run, request = Run(Showing(shown)), SaveRequest(tag="t")
    for is_live, codes in (False, ["device-cannot-snapshot", "vmstate-encrypted"]), (True, ["device-cannot-snapshot"]):
        plan = await plan_save(run, request, state_elsewhere=is_live)
        assert [finding.code for finding in plan.report.findings] == codes
        with pytest.raises(PrecheckRefused, match="the guest cannot be saved now"):
            plan.refuse_if_needed()
    good = await plan_save(Run(Showing(graph(*TWO))), SaveRequest())
    good.refuse_if_needed()
    assert (good.vmstate, good.report.findings) == ("a", ())
    by_hmp = Run(Showing(graph(*TWO, chooses_devices=False)))
    with pytest.raises(NotSupported, match="the fake saves all devices or none"):
        await plan_save(by_hmp, SaveRequest(exclude=("b",)))


async def test_without_a_choice_nothing_is_offered() -> None:
    """By HMP all goes back or nothing; and a snapshot without RAM is none that can be loaded in part."""
    for nodes, by_hmp in (
        ((*TWO, node("c")), True),
        ((node("a", snapshots=held()), node("b")), False),
    ):
        with pytest.raises(SnapshotNotFound, match=r"lacks it; the guest was not touched\.$"):
            await planned(graph(*nodes, chooses_devices=not by_hmp))
    with pytest.raises(NotSupported, match="the fake loads all devices or none"):
        await planned(graph(*TWO, chooses_devices=False), ["b"])


async def test_a_monitor_that_takes_no_files() -> None:
    """It loads no live snapshot, and others as ever."""
    shown = graph(node("a", snapshots=held()), node("b", snapshots=held()))
    store = Store(file("t"))
    with pytest.raises(NotSupported, match="'t' is a live snapshot, with its RAM in a state file: no files"):
        await plan_load(Run(Showing(shown, live_obstacle="no files"), store), "t")
    plan = await plan_load(Run(Showing(shown, live_obstacle=""), store), "t")
    assert (plan.devices, plan.vmstate, plan.state) == (("a", "b"), None, None)
    assert (await planned(graph(*TWO), live_obstacle="no files")).vmstate == "a"


async def test_what_hmp_cannot_load() -> None:
    by_hmp = {"chooses_devices": False}
    swapped = (node("a", snapshots=held()), node("b", snapshots=held(5)))
    with pytest.raises(NotSupported, match="is on b, and the fake looks for it on a alone; the guest was not touched"):
        await planned(graph(*swapped, **by_hmp))
    await planned(graph(*swapped))
    filtered = (*TWO, over("top", "throttle", "fmt"), node("fmt", snapshots=held()))
    with pytest.raises(NotSupported, match="cannot load through the filters above a disk's image"):
        await planned(graph(*filtered, **by_hmp))
    await planned(graph(*filtered))
    iso = node("iso", "raw", read_only=True)
    await planned(graph(*TWO, iso, **by_hmp))


async def test_what_goes_back_first() -> None:
    """By the name that QEMU has for it in an error; none where an export may come before it, and HMP shows none."""
    named = (
        BlockBackend(name="cd", root="iso"), BlockBackend(qdev="/x", root="a"), BlockBackend(name="hd0", root="a"),
        BlockBackend(name="hd1", root="b"),
    )  # fmt: skip
    plain = (BlockBackend(name="cd", root="iso"), BlockBackend(qdev="/x", root="a"), BlockBackend(qdev="/y", root="b"))
    spare, iso = node("spare", snapshots=held()), node("iso", "raw", read_only=True)
    copy = node("copy", read_only=True, snapshots=held())
    for drives, more, by_hmp, first in (
        (named, (), False, "hd0"),
        (named, (spare,), False, "hd0"),
        (named, (), True, "hd0"),
        (plain, (), True, "a"),
        (named, (copy, node("empty"), node("other", snapshots=held(tag="u"))), True, "hd0"),
        (named, (spare,), True, ""),
    ):
        used = frozenset(str(drive.root) for drive in drives)
        shown = graph(iso, *TWO, *more, backends=drives, with_parents=used, chooses_devices=not by_hmp)
        assert (await planned(shown)).first == first


async def test_spare_nodes_stand_in_the_way_of_older_ones() -> None:
    """Where QEMU itself takes all."""
    for version, by_hmp, codes in (
        ((9, 2, 9), True, ["unattached-node"]), ((10, 0, 0), True, []), ((9, 2, 9), False, []),
    ):  # fmt: skip
        shown = graph(*TWO, node("spare"), **used_by_devices("a", "b"), chooses_devices=not by_hmp)
        if codes:
            assert await refused(shown, version=QemuVersion(*version)) == codes
        else:
            await planned(shown, version=QemuVersion(*version))


@pytest.mark.parametrize("failed", ["it broke", None, ""])
async def test_a_migration_that_has_failed(failed: str | None) -> None:
    """QEMU must be made to forget it, or else nothing can be loaded; an older one needs nothing of that."""
    for version, obstacle, state, refuses in (
        ((10, 0, 0), "", RunState.RUNNING, False),
        ((10, 0, 0), "no files", RunState.RUNNING, True),
        ((10, 0, 0), "", RunState.RESTORE_VM, True),
        ((7, 2, 0), "no files", RunState.RUNNING, None),
    ):
        spoiled = failed != "" and refuses is not None
        more: dict[str, Any] = {"version": QemuVersion(*version), "live_obstacle": obstacle, "state": state}
        if spoiled and refuses:
            assert (await refused(graph(*TWO), failed=failed, **more))[-1] == "migration-failed"
        else:
            assert (await planned(graph(*TWO), failed=failed, **more)).spoiled is spoiled


async def test_a_part_in_a_backing_image() -> None:
    """It is refused, unless the user says that this is no matter; then it can be left out."""
    shown = graph(*TWO, over("c", "qcow2", "base", edge="backing"), node("base", snapshots=held()))
    assert await refused(shown, "c") == await refused(shown) == ["in-backing"]
    assert (await planned(shown, ["c"], force=True)).devices == ("a", "b")
    with pytest.raises(SnapshotNotFound, match="c lacks it"):
        await planned(shown, force=True)


async def test_a_tag_that_the_monitor_cannot_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Showing(graph(*TWO))
    monkeypatch.setattr(monitor, "tag_obstacle", lambda _: "it has a blank")
    with pytest.raises(NotSupported, match="cannot be given the tag"):
        await plan_load(Run(monitor), "t")
    with pytest.raises(NotSupported, match="cannot be given the tag"):
        await plan_save(Run(monitor), SaveRequest(tag="t"))
