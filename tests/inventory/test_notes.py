"""The notes on snapshots, in files beside images that this process has open, as a QEMU has its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qsnap.errors import BadUsage, QsnapError
from qsnap.inventory import notes as rules
from qsnap.inventory import protection, snapshots
from qsnap.inventory.notes import ChangeBelow, blank
from qsnap.inventory.protection import Marks
from qsnap.inventory.state_store import StateStore
from qsnap.model.snapshots import StateFile, Together
from qsnap.monitor.names import HERE, NOTED, PROTECTED
from support.fake_proc import as_nobody
from support.noted import Vm, note, row
from support.state_files import DATE

pytestmark = pytest.mark.no_qemu


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    vm = Vm(tmp_path)
    with ExitStack() as stack:
        for image in vm.images:
            stack.enter_context(image.open("r+b"))
        yield vm


@pytest.mark.parametrize(
    "what",
    [
        {"protected": True},
        {"description": "text"},
        {"runstate": "shutdown"},
        {"chains": {"a": ("base",)}},
        {"state_dir": "/states"},
        {"together": Together(id="1", vms=("other",))},
        {"checksums": {"a": "0"}},
    ],
)
def test_whatever_it_says_is_kept(vm: Vm, what: dict[str, object]) -> None:
    """And what says nothing is not; a file for nothing is neither made nor left."""
    vm.notes().write(vm.places[0], [note("t", 1)], vm.found)
    assert not vm.places[0].exists()
    ours = vm.notes()
    ours.write(vm.places[0], [note("t", 1, **what), note("u", 2)], vm.found)
    assert vm.written() == [("t", 1)]
    for notes in ours, vm.notes():
        assert notes.of(vm.found[0]) == note("t", 1, **what)
        assert notes.of(vm.found[1]) == blank(vm.found[1])
    ours.write(vm.places[0], [note("t", 1)], vm.found)
    assert not vm.places[0].exists()


def test_which_notes_stay(vm: Vm) -> None:
    """A tag that is saved again does not inherit; the older of two snapshots of one tag keeps its own."""
    vm.rows = (row("t", 1), row("t.qsnap-2", 3), row("u", 2))
    vm.write(0, ("t", 1), ("t", 9), ("u", 8), ("gone", 4))
    vm.notes().write(vm.places[0], [note("t", 3, protected=True)], vm.found)
    assert vm.written() == [("t", 1), ("u", 8), ("t", 3)]
    vm.notes().write(vm.places[0], [note("t", 3, protected=True, description="x")], vm.found)
    assert vm.written() == [("t", 1), ("u", 8), ("t", 3)], "one of each"


def test_two_files_become_one(vm: Vm) -> None:
    """Whichever place is meant for new notes, they go where notes are."""
    vm.write(0, ("t", 1))
    vm.write(1, ("u", 2))
    notes = vm.notes()
    assert [notes.of(one).protected for one in vm.found] == [True, True]
    notes.write(vm.places[1], (), vm.found)
    assert [place.exists() for place in vm.places] == [True, False]
    assert vm.written() == [("t", 1), ("u", 2)]
    assert {place: len(found) for place, found in notes.by_place.items()} == {vm.places[0]: 2, vm.places[1]: 0}


def test_of_deleted_snapshots_nothing_is_kept(vm: Vm) -> None:
    """If none was deleted, nothing is written."""
    vm.write(0, ("t", 1), ("u", 2))
    before = vm.places[0].stat().st_ino
    vm.notes().forget(vm.found)
    assert vm.places[0].stat().st_ino == before
    vm.rows = (row("u", 2),)
    vm.notes().forget(vm.found)
    assert vm.written() == [("u", 2)]
    vm.rows = ()
    vm.notes().forget(vm.found)
    assert not vm.places[0].exists()


def test_a_note_is_of_one_snapshot(vm: Vm) -> None:
    """By its tag and its clock, also if the disks hold it under a second name."""
    vm.rows = (row("t.qsnap-2", 1), row("u", 1), row("v", 2))
    vm.write(0, ("t", 1), ("v", 1))
    assert {one.tag: one.protected for one in vm.notes().added_to(vm.found)} == {"t": True, "u": False, "v": False}


def test_what_was_noted_is_told(vm: Vm) -> None:
    together = Together(id="1", vms=("other",))
    notes = vm.notes()
    notes.write(
        vm.places[0],
        [
            note("t", 1, protected=True, description="x", runstate="shutdown", together=together),
            note("u", 2, chains={"a": ("base", "root"), "b": ()}),
        ],
        vm.found,
    )
    t, u = notes.added_to(vm.found)
    assert (t.protected, t.description, t.runstate, t.together, t.problems) == (True, "x", "shutdown", together, ())
    assert notes.changes_below(t) == ()
    assert notes.changes_below(u) == (ChangeBelow("a", ("base", "root"), ()),)
    assert u.problems == ("a had base and root below it when it was saved, and has no other image now",)


def test_where_the_ram_is_if_it_is_not_seen(vm: Vm) -> None:
    """Of a live snapshot; not of one that has its state in an image, or a file that is seen."""
    vm.rows = (row("live", 1, 0), row("full", 2), row("plain", 3, 0))
    notes = vm.notes()
    changed = [note(tag, clock, state_dir="/states") for tag, clock in (("live", 1), ("full", 2), ("gone", 4))]
    file = StateFile(
        path="/x", size=9, disk_tag="gone", image="/a", vm_state_size=5, date=DATE, vm_clock_ns=4_000_000
    )  # fmt: skip
    found = snapshots.snapshots(vm.graph, vm.devices, [file])
    notes.write(vm.places[0], changed, found)
    told = {one.tag: [text for text in one.problems if "/states" in text] for one in notes.added_to(found)}
    assert told == {
        "live": ["its RAM is not seen: its state file was put into /states (--state-dir)"],
        "full": [], "plain": [], "gone": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("clocks", "text", "is_left"), [((1,), "", True), ((9,), "", False), ((), "no JSON", True), ((), "", False)]
)
def test_notes_beside_the_former_name(vm: Vm, clocks: tuple[int, ...], text: str, is_left: bool) -> None:
    """They are not used; if they may be of these snapshots, nothing is written in their place."""
    vm.write(0, *(("t", clock) for clock in clocks), text=text)
    new = vm.images[0].rename(vm.images[0].with_name("new"))
    notes = vm.notes()
    assert not any(notes.by_place.values())
    assert [left.path for left in notes.left] == [vm.places[0]] * is_left
    assert notes.unseen == (str(vm.places[0]),) * is_left
    place = Path(f"{new}.qsnap-notes")
    changed = [note("t", 1, protected=True)]
    if not is_left:
        notes.write(rules.notes_path(StateStore(os.getpid()), vm.graph, notes, "a"), changed, vm.found)
        assert place.exists()
        return
    for attempt in (
        lambda: notes.write(place, changed, vm.found),
        lambda: rules.notes_path(StateStore(os.getpid()), vm.graph, notes, "a"),
    ):
        with pytest.raises(QsnapError, match="nothing was done: a file with notes lies at"):
            attempt()
    assert not place.exists()


def test_what_is_no_file_of_notes(vm: Vm) -> None:
    place = vm.places[0]
    notes = vm.notes()
    place.mkdir()
    with pytest.raises(QsnapError) as unreadable:
        vm.notes()
    assert str(unreadable.value) == (
        f"the notes {place} cannot be read: it is not a regular file; a snapshot may be protected"
    )
    with pytest.raises(QsnapError) as unwritable:
        notes.write(place, [note("t", 1, protected=True)], vm.found)
    assert str(unwritable.value) == f"the notes {place} cannot be written: it is not a regular file"
    place.rmdir()
    for text, words in (
        ("no JSON", "cannot be understood: .*; mend the file, or move it away"),
        ('{"version": 2, "notes": []}', r"are of a later qsnap \(version 2 of their form\)"),
    ):
        vm.write(0, text=text)
        with pytest.raises(QsnapError, match=words):
            vm.notes()


def test_a_directory_that_may_not_be_written(open_directory: Path) -> None:
    """Notes there are read. That no new ones can be made is said beforehand, as is that there are some out of sight."""
    vm = Vm(open_directory)
    vm.write(0, ("t", 1))
    with vm.images[0].open("rb"), vm.images[1].open("rb"):
        for path in (*vm.images, *vm.places[:1]):
            path.chmod(0o644)
        open_directory.chmod(0o555)
        with as_nobody():
            notes = vm.notes()
            assert notes.of(vm.found[0]).protected
            with pytest.raises(QsnapError, match=f"no notes can be made in {open_directory}: it cannot be written"):
                rules.notes_path(StateStore(os.getpid()), vm.graph, notes, "a")
        vm.places[0].chmod(0)
        with as_nobody():
            notes = vm.notes()
            assert notes.unseen == (str(vm.places[0]),)
            for attempt in (
                lambda: rules.notes_path(StateStore(os.getpid()), vm.graph, notes, "a"),
                lambda: notes.write(vm.places[1], (), vm.found),
            ):
                with pytest.raises(QsnapError, match="Permission denied; a snapshot may be protected"):
                    attempt()
        vm.places[0].chmod(0o644)
    assert vm.written() == [("t", 1)]


@pytest.mark.parametrize("text", ["", " ~\xa0é", "x" * 1000])
def test_a_description(text: str) -> None:
    assert rules.checked_description(text) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x" * 1001, "has 1001 characters, and may have 1000"),
        *((f"a{chr(number)}b", "must be one line") for number in (0, 0x1F, 0x7F, 0x9F)),
        ("\udcff", "not valid UTF-8"),
    ],
)
def test_what_is_no_description(text: str, words: str) -> None:
    with pytest.raises(BadUsage, match=words):
        rules.checked_description(text)


def test_the_marks_follow_the_notes(vm: Vm) -> None:
    """Those for the notes that can be read; of other places nothing is known."""
    vm.write(0, ("t", 1))
    (mark,) = protection.of_notes([note("t", 1, protected=True)], vm.places[0])
    (other,) = protection.of_notes([note("u", 2, protected=True)], vm.places[0])
    (far,) = protection.of_notes([note("u", 2, protected=True)], Path("/far"))
    place = mark.rpartition("-")[2]
    noted = protection.noted(vm.names)
    kept = frozenset({far, f"{HERE}{place}"})

    def changes(*names: str) -> tuple[set[str], set[str]]:
        added, removed = Marks(kept | set(names)).changes(vm.notes(), vm.graph, vm.devices)
        return {*added}, {*removed}

    assert mark.startswith(PROTECTED)
    assert changes() == ({mark, noted}, set())
    assert changes(mark, noted) == (set(), set())
    assert changes(mark, noted, other, f"{NOTED}old") == (set(), {other, f"{NOTED}old"})
    marks = Marks(frozenset({far, noted}))
    assert marks.tells_all(vm.graph, vm.devices)
    assert not Marks(frozenset({far, f"{NOTED}old"})).tells_all(vm.graph, vm.devices)
    assert {one.tag: marks.protects(one) for one in vm.found} == {"t": False, "u": True}
    assert marks.of(vm.found) == {far}
    vm.images[1].unlink()  # now it is out of sight, and with it the notes beside it
    assert changes(other, f"{NOTED}old") == ({mark}, {other})
