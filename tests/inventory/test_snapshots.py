"""What the rows of all snapshot tables say of a tag."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec
import pytest

from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.model.checks import Device, Role, Verdict
from qsnap.model.qemu import NodeSnapshot
from qsnap.model.snapshots import Snapshot, StateFile
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


def names(found: Iterable[Snapshot]) -> dict[str, str]:
    return {one.tag: one.disk_tag for one in found}


def test_only_what_is_written_counts() -> None:
    """Neither what is ignored or carried, nor a node that the graph has not; of what cannot snapshot its own name."""

    def device(node: str | None, verdict: Verdict, image: str | None = None) -> Device:
        return Device(node=node, device="", driver="", role=Role.DISK, verdict=verdict, image=image)

    devices = [
        device("top", Verdict.SAVED, "a"),
        device("other", Verdict.EXCLUDED, "a"),
        device("raw", Verdict.REFUSED),
        device(None, Verdict.IGNORED),
        device("cd", Verdict.IGNORED, "cd"),
        device("vars", Verdict.CARRIED),
        device("gone", Verdict.SAVED, "gone"),
    ]
    assert snapshots.relevant_nodes(devices) == ("a", "raw", "gone")
    plain = graph(node("a", snapshots=(row("t", 5),)), node("raw", "raw"), node("cd", snapshots=(row("t"),)))
    assert snapshots.holders(plain, devices, "t") == ("a",)
    assert snapshots.holders(plain, devices, "u") == ()
    (one,) = snapshots.snapshots(plain, devices)
    assert (one.devices, one.missing, one.vmstate) == (("a",), ("raw", "gone"), "a")
    assert snapshots.unattached(devices, ["a", "b"]) == ("b",)


def test_what_nobody_uses_may_lack_a_snapshot() -> None:
    """QEMU 10.0's savevm leaves it out; nor does a device use it again by being switched to it."""
    two = graph(node("a", snapshots=(row("t", 5),)), node("spare", snapshots=(row("u", 5),)))
    two = msgspec.structs.replace(two, backends=two.backends[:1], with_parents=frozenset({"a"}))
    devices = rules.survey(two).devices
    assert [device.role for device in devices] == [Role.DISK, Role.NODE]
    found = {one.tag: one for one in snapshots.snapshots(two, devices)}
    assert (found["t"].kind, found["t"].missing) == ("full", ())
    assert (found["u"].kind, found["u"].missing) == ("partial", ("a",))
    assert snapshots.unattached(devices, ["a", "spare"]) == ("spare",)


def test_of_which_moment() -> None:
    """With a VM state all rows have one date and one clock; without one, dates of their own."""
    later = msgspec.structs.replace(row("disks"), date=datetime(2026, 1, 2, tzinfo=UTC))
    two = graph(
        node("a", snapshots=(row("disks"), row("clocks"), row("full", 5), row("twice", 5), row("twice", 5))),
        node("b", snapshots=(later, row("clocks", clock=2), msgspec.structs.replace(later, tag="full"), row("twice"))),
    )
    found = {one.tag: (one.kind, one.problems) for one in snapshots.snapshots(two, rules.survey(two).devices)}
    assert found == {
        "disks": ("disk-only", ()),
        "clocks": ("disk-only", ("b: made at another moment than the rest",)),
        "full": ("full", ("b: made at another moment than the rest",)),
        "twice": ("full", ("a holds it 2 times",)),
    }
    (state,) = [one for one in snapshots.snapshots(two, rules.survey(two).devices) if one.tag == "full"]
    assert (state.vmstate, state.vm_state_size, state.date) == ("a", 5, row("").date)
    assert [one.tag for one in snapshots.snapshots(two, rules.survey(two).devices)] == [
        "clocks", "disks", "full", "twice"
    ]  # fmt: skip


def test_who_gets_the_tag() -> None:
    """What can be loaded, of two the newer; a leftover keeps the second name."""
    new = datetime(2026, 1, 2, tzinfo=UTC)

    def second(tag: str, size: int) -> NodeSnapshot:
        return msgspec.structs.replace(row(f"{tag}.qsnap-2", size, 2), date=new)

    both = [row("both", 5), second("both", 5)]
    half = [row("half", 5), second("half", 0)]
    alone, disks, broken = second("alone", 5), second("disks", 0), [second("broken", 5)] * 2
    one = graph(node("a", snapshots=(*both, *half, alone, disks, *broken)))
    found = snapshots.snapshots(one, rules.survey(one).devices)
    assert names(found) == {
        "both": "both.qsnap-2", "both.qsnap-2": "both",
        "half": "half", "half.qsnap-2": "half.qsnap-2",
        "alone": "alone.qsnap-2", "disks.qsnap-2": "disks.qsnap-2", "broken": "broken.qsnap-2",
    }  # fmt: skip
    assert {snapshots.owner(one) for one in found} == {"both", "half", "alone", "disks", "broken"}
    assert {one.tag for one in found if not snapshots.is_loadable(one)} == {
        "half.qsnap-2", "disks.qsnap-2", "broken"
    }  # fmt: skip
    assert {one.tag for one in snapshots.under(found, "both")} == {"both", "both.qsnap-2"}
    assert [one.tag for one in snapshots.under(found, "both.qsnap-2")] == ["both.qsnap-2"]


def state(tag: str, clock: int, trouble: str = "") -> StateFile:
    return StateFile(
        path=f"/{tag}", size=9, disk_tag=tag, image="/a", vm_state_size=7, date=row("").date, vm_clock_ns=clock,
        trouble=trouble,
    )  # fmt: skip


def test_a_state_file_and_its_disks() -> None:
    """By the tag and the clock: exactly, where QEMU tells nanoseconds; a file whose clock is lost by the tag alone."""
    disk = node(
        "a",
        snapshots=(
            row("exact", clock=1_000_001), row("near", clock=1_000_001), row("ms", clock=1_000_000),
            row("lost", clock=3), row("full", 5, 4),
        ),
    )  # fmt: skip
    one = graph(disk)
    files = [
        state("exact", 1_000_001), state("near", 1_000_002), state("ms", 1_999_999), state("lost", 0, "it is cut"),
        state("full", 4), state("gone", 5), state("short", 6, "it is empty"),
    ]  # fmt: skip
    found = snapshots.snapshots(one, rules.survey(one).devices, files)
    assert {(s.tag, s.kind.value, s.vm_state_size) for s in found} == {
        ("exact", "live", 7), ("near", "disk-only", 0), ("near", "state-only", 7), ("ms", "live", 7),
        ("lost", "live", 7), ("full", "full", 5), ("full.qsnap-2", "state-only", 7), ("gone", "state-only", 7),
        ("short", "state-only", 7),
    }  # fmt: skip
    gone = "the disks' snapshots that belong to its state file are gone"
    assert {s.disk_tag: s.problems for s in found if s.kind in ("live", "state-only") and s.problems} == {
        "near": (gone,), "full": (gone,), "gone": (gone,),
        "lost": ("its state file /lost is cut",), "short": ("its state file /short is empty",),
    }  # fmt: skip
    meant = snapshots.named(found, "near")
    assert meant is not None
    assert meant.devices == ("a",)
    alone = snapshots.named(found, "gone")
    assert alone is not None
    assert alone.file == files[5]
    assert snapshots.named(found, "none") is None


def test_everything_under_a_tag() -> None:
    two = graph(node("a", snapshots=(row("t", 5), row("t.qsnap-2", clock=2))), node("b", snapshots=(row("u", 5),)))
    devices = rules.survey(two).devices
    found = snapshots.snapshots(two, devices, [state("t.qsnap-2", 2), state("alone", 3)])
    assert snapshots.holding(found, devices, "t") == (("t", "t.qsnap-2"), ("a",), ("/t.qsnap-2",))
    assert snapshots.holding(found, devices, "alone") == ((), (), ("/alone",))
    assert snapshots.holding(found, devices, "alone").exists
    assert snapshots.holding(found, devices, "u").exists
    assert not snapshots.holding(found, devices, "none").exists


@pytest.mark.parametrize(
    ("rows", "keeps_older", "disk_tag", "spare", "older"),
    [
        ([], True, "t", (), ()),
        ([row("t", 5)], False, "t", ("t",), ()),
        ([row("t", 5)], True, "t.qsnap-2", (), ("t",)),
        ([row("t.qsnap-2", 5)], True, "t", (), ("t.qsnap-2",)),
        ([row("t.qsnap-2", 5)], False, "t", (), ("t.qsnap-2",)),
        # Both can be loaded: that counts which is listed as "t", the newer
        ([row("t", 5), row("t.qsnap-2", 5, 2)], True, "t.qsnap-2", ("t.qsnap-2",), ("t",)),
        # Neither can: the second name is the more dispensable
        ([row("t"), row("t.qsnap-2", clock=2)], False, "t", ("t",), ("t.qsnap-2",)),
    ],
)
def test_the_name_of_a_new_one(
    rows: list[NodeSnapshot], keeps_older: bool, disk_tag: str, spare: tuple[str, ...], older: tuple[str, ...]
) -> None:
    one = graph(node("a", snapshots=tuple(rows)))
    devices = rules.survey(one).devices
    new = snapshots.new_name(snapshots.snapshots(one, devices), devices, "t", keeps_older=keeps_older)
    assert (new.disk_tag, new.spare.tags, new.older.tags) == (disk_tag, spare, older)
    assert new.spare.nodes == (("a",) if spare else ())


def test_a_state_file_without_disks_goes_when_the_new_one_is_complete() -> None:
    one = graph(node("a"))
    devices = rules.survey(one).devices
    new = snapshots.new_name(snapshots.snapshots(one, devices, [state("t", 1)]), devices, "t", keeps_older=True)
    assert (new.disk_tag, new.spare.files, new.older.files) == ("t", (), ("/t",))


def test_a_tag_that_is_not_there_needs_no_second_name() -> None:
    one = graph(node("a"))
    tag = "x" * 255
    assert snapshots.new_name((), rules.survey(one).devices, tag, keeps_older=True).disk_tag == tag


def test_what_is_wrong_with_a_new_one() -> None:
    two = graph(
        node("a", snapshots=(row("good", 5), row("none"), row("twice", 5), row("twice", 5))),
        node("b", snapshots=(row("good"), row("none", 5), row("twice"))),
    )

    def problems(tag: str, *devices: str) -> list[str]:
        return snapshots.save_problems(two, tag, "a", devices)

    assert problems("good", "a", "b") == []
    assert problems("good", "a", "gone") == ["gone holds it 0 times instead of once"]
    assert problems("none", "a", "b") == ["a holds no VM state", "b holds a VM state that belongs on a"]
    assert problems("twice", "a", "b") == ["a holds it 2 times instead of once"]
    assert problems("new", "a") == ["a holds it 0 times instead of once"]


def test_what_lies_below() -> None:
    """Through filters, no node twice; also where the graph ends in the middle, or goes in a circle."""
    disk = node(
        "a", filename="/vm/a.img", children=(("file", "file-a"), ("backing", "filter")), snapshots=(row("own"),)
    )
    below = [
        node("file-a", "file"),
        node("filter", "copy-on-read", children=(("file", "base"),)),
        node("base", filename="/vm/base.img", snapshots=(row("own"), row("t.qsnap-2"), row("t.qsnap-2")),
             children=(("file", "file-base"), ("backing", "root"))),
        node("file-base", "file"),
        node("root", filename="/vm/root.img", children=(("backing", "base"),)),
        node("b", filename="/vm/b.img", children=(("backing", "gone"),)),
    ]  # fmt: skip
    chained = graph(disk, *below)
    assert snapshots.chain_of(chained, "a") == ("a.img", ("base.img", "root.img"))
    assert snapshots.chains(chained, ["a", "b", "none"]) == {"a.img": ("base.img", "root.img"), "b.img": ()}
    assert snapshots.chains(chained, ["b"]) == {}
    devices = [Device(node="a", device="hd0", driver="qcow2", role=Role.DISK, verdict=Verdict.SAVED, image="a")]
    assert [(one.tag, one.image) for one in snapshots.in_backing(chained, devices)] == [("t.qsnap-2", "base.img")]
    for tag in "t", "t.qsnap-2":
        assert str(snapshots.not_found(chained, devices, tag, "; hint")) == (
            f"no snapshot {tag!r} on any device; hint. It is in the backing image base.img of a: commit the overlay "
            "first (block-commit), if no other image has that one below it"
        )
    assert str(snapshots.not_found(chained, devices, "u")) == "no snapshot 'u' on any device"
