"""What is written down after a save, and of protection, beside images that this process has open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from qsnap.errors import QsnapError, SnapshotNotFound
from qsnap.inventory import protection
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.state_store import StateStore
from qsnap.model.qemu import BlockGraph, RunState
from qsnap.model.results import SaveResult
from qsnap.model.snapshots import Kind, StateFile
from qsnap.monitor.names import NOTED, PROTECTED
from qsnap.operations.annotate import annotate, forget_notes, note_checksums, note_save
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.noted import Vm, note
from support.state_files import DATE

pytestmark = pytest.mark.no_qemu


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    vm = Vm(tmp_path)
    with ExitStack() as stack:
        for image in vm.images:
            stack.enter_context(image.open("r+b"))
        yield vm


FILE = StateFile(path="/x", size=9, disk_tag="t", image="/a", vm_state_size=5, date=DATE, vm_clock_ns=1)


def after_save(vm: Vm, description: str = "", state_dir: Path | None = None, **how: object) -> str:
    """What is told after a save of "t"."""
    store = StateStore(os.getpid(), state_dir)
    saved = SaveResult(
        tag="t", replaced=False, kind=Kind.FULL, vmstate="a", devices=("a", "b"), excluded=(), carried=(),
        vm_state_size=5, date=DATE, vm_clock_ns=1, pause_ms=0, duration_ms=0, runstate=RunState.RUNNING,
    )  # fmt: skip
    saved = msgspec.structs.replace(saved, **how)
    return note_save(Run(FakeMonitor(), store), Inventory(vm.graph, store), saved, description)


def test_what_is_noted_after_a_save(vm: Vm, tmp_path: Path) -> None:
    """Nothing, where there is nothing to say; else what there was stays."""
    states = tmp_path / "states"
    states.mkdir()
    for state_dir, file in (None, None), (None, FILE), (states, None), (tmp_path, FILE):
        assert after_save(vm, state_dir=state_dir, file=file) == ""
        assert not vm.places[0].exists()
    for description, state_dir, how in (
        ("text", None, {}),
        ("", None, {"runstate": RunState.SHUTDOWN}),
        ("", states, {"file": FILE}),
    ):
        assert after_save(vm, description, state_dir, **how) == ""
    wanted = note("t", 1, description="text", runstate="shutdown", state_dir=str(states))
    assert vm.notes().of(vm.found[0]) == msgspec.structs.replace(wanted, date=int(DATE.timestamp()))
    vm.base = "base"
    before = vm.places[0].stat().st_ino
    after_save(vm)
    assert vm.notes().of(vm.found[0]).chains == {"a": ("base",), "b": ()}
    assert vm.notes().of(vm.found[0]).description == "text"
    assert vm.places[0].stat().st_ino != before
    vm.base = ""
    before = vm.places[0].stat().st_ino
    after_save(vm, file=FILE)
    assert vm.places[0].stat().st_ino == before, "nothing was to be written"


def test_what_could_not_be_noted_is_told(vm: Vm) -> None:
    """Where it matters: a description that the user gave, and that the guest could not go on."""
    vm.places[0].mkdir()
    vm.base = "base"
    why = f"the notes {vm.places[0]} cannot be read: it is not a regular file; a snapshot may be protected"
    assert after_save(vm) == after_save(vm, file=FILE) == ""
    told = after_save(vm, runstate=RunState.SHUTDOWN)
    assert told == f"nothing will tell later that the guest was shutdown: {why}"
    for runstate in RunState.RUNNING, RunState.SHUTDOWN:
        with pytest.raises(QsnapError) as failed:
            after_save(vm, "text", runstate=runstate)
        assert str(failed.value) == f"snapshot 't' was saved, but not its description: {why}"
    vm.rows = ()
    with pytest.raises(QsnapError, match="'t' was saved, and deleted by another client at once"):
        after_save(vm)


class Marked(FakeMonitor):
    """A monitor of that VM, which tells what is done: marks that are set and removed, and whether there are notes."""

    def __init__(self, vm: Vm) -> None:
        super().__init__()
        self.vm = vm

    async def block_graph(self) -> BlockGraph:
        return self.vm.graph

    async def set_mark(self, name: str, text: str) -> bool:
        self.calls.append(f"{name[: len(PROTECTED)]} {self.vm.places[0].exists()}")
        return await super().set_mark(name, text)

    async def clear_mark(self, name: str) -> None:
        self.calls.append(f"-{name[: len(PROTECTED)]} {self.vm.places[0].exists()}")
        await super().clear_mark(name)


async def test_a_mark_is_there_before_the_note(vm: Vm) -> None:
    """So none is ever missing; and it goes after that. What else is noted changes none."""
    monitor = Marked(vm)
    run = Run(monitor, StateStore(os.getpid()))
    with pytest.raises(SnapshotNotFound, match="no snapshot 'none'"):
        await annotate(run, ("t", "none"), protected=True)
    assert (monitor.calls, vm.written()) == ([], [])
    (t,) = await annotate(run, ("t",), protected=True)
    assert (t.tag, t.protected) == ("t", True)
    assert monitor.calls == [f"{PROTECTED} False", f"{NOTED} True"[: len(PROTECTED)] + " True"]
    monitor.calls.clear()
    (t,) = await annotate(run, ("t",), description="text")
    assert (t.protected, t.description, monitor.calls) == (True, "text", [])
    monitor.texts[f"{PROTECTED}{'0' * 16}-{'1' * 16}"] = "yes"  # of another snapshot, by other notes
    (far,) = protection.of_notes([note("t", 1, protected=True)], Path("/far"))
    monitor.texts[far] = "yes"
    (t,) = await annotate(run, ("t",), protected=False)
    assert (t.protected, t.description) == (False, "text")
    assert monitor.calls == [f"-{PROTECTED} True"] * 2
    assert [name for name in monitor.texts if name.startswith(PROTECTED)] == [f"{PROTECTED}{'0' * 16}-{'1' * 16}"]


async def test_what_is_deleted_is_forgotten(vm: Vm) -> None:
    """Its note, its mark, and where the guest is if there is nothing left; notes that are damaged are left alone."""
    monitor = Marked(vm)
    run = Run(monitor, StateStore(os.getpid()))
    await annotate(run, ("t", "u"), protected=True)
    vm.rows = vm.rows[1:]
    tree = vm.places[0].with_name("a.qsnap-tree")
    tree.touch()
    await forget_notes(run, await run.look())
    (mark,) = protection.of_notes([note("u", 2, protected=True)], vm.places[0])
    assert vm.written() == [("u", 2)]
    assert [name for name in monitor.texts if name.startswith(PROTECTED)] == [mark]
    assert tree.exists()
    vm.rows = ()
    vm.places[0].write_text("no JSON")
    await forget_notes(run, await run.look())
    assert not tree.exists()
    assert vm.places[0].read_text() == "no JSON"
    assert mark in monitor.texts


async def test_checksums_of_some(vm: Vm) -> None:
    """They are added to those that were noted, and the rest of the note stays."""
    run = Run(Marked(vm), StateStore(os.getpid()))
    await annotate(run, ("t",), description="text")
    for checksums in {"t": {"a": "1"}}, {"t": {"b": "2"}}, {"none": {"a": "3"}}:
        await note_checksums(run, checksums)
    assert vm.notes().of(vm.found[0]).checksums == {"a": "1", "b": "2"}
    assert vm.notes().of(vm.found[0]).description == "text"
    assert vm.written() == [("t", 1)]
