"""Writing down where the guest is, around a save and a load: see :mod:`qsnap.inventory.lineage`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qsnap.errors import QsnapError
from qsnap.inventory import lineage
from qsnap.inventory.inventory import Inventory
from qsnap.model.snapshots import Origin, Snapshot
from qsnap.monitor import Monitor
from qsnap.monitor.hmp import hardware
from qsnap.monitor.names import HERE
from qsnap.runs.run import Run


async def leave_position(run: Run) -> None:
    """Before a load: what is written down does not count any more. If the load is cut short, it is somewhere."""
    if run.first is None:
        return
    run.token = os.urandom(8).hex()
    inventory, _ = run.first
    with suppress(QsnapError):
        old = {name for name in (await inventory.marks(run.monitor)).names if name.startswith(HERE)}
        await inventory.change_marks(run.monitor, (f"{HERE}{run.token}",), old)
        run.former = old.pop().removeprefix(HERE) if len(old) == 1 else ""


async def note_position(
    run: Run, inventory: Inventory, last: Snapshot | None, *, saved: bool, undo: Snapshot | None = None
) -> bool:
    """Write down that the guest has come from *last*, and where that came from; whether that could be done.

    :param inventory: the VM's inventory after the save or load.
    :param last: the snapshot; None if it is gone already.
    :param saved: it was saved, and not loaded.
    :param undo: of a load, the snapshot of what it has discarded.
    """
    if run.first is None or last is None:
        return False
    _, before = run.first
    run.token = run.token or before.token
    if not run.token:  # QEMU has not the mark of what is written down: it was started anew
        await leave_position(run)
    origin = await _origin(run.monitor) if saved else None
    return await asyncio.to_thread(lineage.write, inventory, before, last, run.token, saved=origin, undo=undo)


async def _origin(monitor: Monitor) -> Origin:
    """What saves a snapshot now."""
    machine = cpus = kvm = ""
    with suppress(QsnapError):  # it is saved; this is for people
        machine, cpus, kvm = await asyncio.gather(
            *map(monitor.human_answer, ("qom-get /machine type", "info hotpluggable-cpus", "info kvm"))
        )
    return Origin(
        qemu=str(monitor.version),
        machine=hardware.machine_type(machine),
        cpu=hardware.cpu_model(cpus),
        accelerator=hardware.accelerator(kvm),
    )


def origin_of(run: Run, snapshot: Snapshot) -> Origin | None:
    """What saved a snapshot, if that is written down."""
    return run.first[1].origins.get(lineage.key_of(snapshot)) if run.first else None


@contextmanager
def position_kept(run: Run) -> Iterator[None]:
    """A save that fails in the block, or a load of which QEMU has touched nothing, leaves the guest where it was."""
    try:
        yield
    except BaseException:
        if run.first is not None and not run.loads:
            lineage.renew(*run.first, run.token)
        raise
