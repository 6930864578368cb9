"""Where the guest is, as far as it is written down around a save and a load: the marks, with a monitor in memory."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from qsnap.errors import QsnapError
from qsnap.inventory import lineage
from qsnap.inventory.inventory import Inventory, look
from qsnap.inventory.lineage import Lineage, key_of
from qsnap.inventory.state_store import NO_STORE, StateStore
from qsnap.model.snapshots import Origin, Position
from qsnap.monitor.names import HERE
from qsnap.operations.position import leave_position, note_position, origin_of, position_kept
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.noted import Vm

pytestmark = pytest.mark.no_qemu


async def run_with(*marks: str, of: str = "") -> Run:
    """A run on a VM with the snapshot "t" and these marks.

    :param of: the mark of what is written down.
    """
    monitor = FakeMonitor()
    await monitor.snapshot_save("t", "disk0", ["disk0", "disk1"])
    monitor.texts |= {f"{HERE}{name}": "yes" for name in marks}
    run = Run(monitor)
    run.first = (await look(monitor, NO_STORE), Lineage(Position(), token=of))
    return run


def tokens(run: Run) -> list[str]:
    assert isinstance(run.monitor, FakeMonitor)
    return [name.removeprefix(HERE) for name in run.monitor.texts]


@pytest.mark.parametrize(("marks", "former"), [((), ""), (("old",), "old"), (("old", "older"), "")])
async def test_a_load_leaves_one_mark_of_its_own(marks: tuple[str, ...], former: str) -> None:
    """And knows that of the load before, if there was one."""
    run = await run_with(*marks)
    await leave_position(run)
    assert tokens(run) == [run.token]
    assert run.token not in ("", *marks)
    assert run.former == former


async def test_who_does_not_ask_where_the_guest_is_marks_nothing() -> None:
    run = await run_with("old", of="old")
    assert run.first is not None
    inventory, run.first = run.first[0], None
    await leave_position(run)
    assert not await note_position(run, inventory, inventory.snapshots[0], saved=True)
    assert (run.token, run.former, tokens(run)) == ("", None, ["old"])
    assert origin_of(run, inventory.snapshots[0]) is None


async def test_a_save_keeps_the_mark_that_is_there() -> None:
    """Where QEMU was started anew it sets one; and none for a snapshot that is gone already."""
    for marks in ("old",), ():
        run = await run_with(*marks, of="".join(marks))
        assert run.first is not None
        inventory = run.first[0]
        assert not await note_position(run, inventory, None, saved=True)
        assert tokens(run) == [*marks]
        await note_position(run, inventory, inventory.snapshots[0], saved=True)
        assert tokens(run) == [run.token]
        assert (run.token in marks) is bool(marks)


async def test_what_has_saved_it() -> None:
    run = await run_with()
    assert run.first is not None
    (snapshot,) = run.first[0].snapshots
    assert origin_of(run, snapshot) is None
    run.first = run.first[0], Lineage(Position(), origins={key_of(snapshot): Origin(qemu="7.2.0")})
    assert origin_of(run, snapshot) == Origin(qemu="7.2.0")


@pytest.mark.parametrize(
    ("ending", "loads", "looked", "token"),
    [
        (None, False, True, "old"),
        (QsnapError, False, True, "new"),
        (asyncio.CancelledError, False, True, "new"),
        (QsnapError, True, True, "old"),
        (QsnapError, False, False, "old"),
    ],
)
def test_what_touches_nothing_leaves_the_guest_where_it_was(
    tmp_path: Path, ending: type[BaseException] | None, loads: bool, looked: bool, token: str
) -> None:
    """With the mark that QEMU was given before; and nothing else does."""
    vm = Vm(tmp_path)
    with vm.images[0].open("r+b"), vm.images[1].open("r+b"):
        inventory = Inventory(vm.graph, StateStore(os.getpid()))
        assert lineage.write(inventory, Lineage(Position()), vm.found[0], "old", saved=Origin())
        run = Run(FakeMonitor())
        run.first = (inventory, lineage.lineage(inventory, [f"{HERE}old"])) if looked else None
        run.loads, run.token = loads, "new"
        with pytest.raises(ending) if ending else nullcontext(), position_kept(run):
            if ending:
                raise ending("it failed")
        assert json.loads((tmp_path / "a.qsnap-tree").read_text())["token"] == token


@pytest.mark.parametrize("saved", [True, False])
async def test_what_is_written_down(tmp_path: Path, saved: bool) -> None:
    """With the mark of this run, if it has set one; and what has saved the snapshot, if that was now."""
    vm = Vm(tmp_path)
    with vm.images[0].open("r+b"), vm.images[1].open("r+b"):
        inventory = Inventory(vm.graph, StateStore(os.getpid()))
        run = Run(FakeMonitor())
        run.first = (inventory, Lineage(Position(), token="old"))  # noqa: S106 (of a mark)
        run.token = "" if saved else "new"
        assert await note_position(run, inventory, vm.found[0], saved=saved)
    record = json.loads((tmp_path / "a.qsnap-tree").read_text())
    assert record["token"] == ("old" if saved else "new")
    assert [origin["qemu"] for _, origin in record["origins"]] == ["11.1.0"] * saved
