"""Prepare the VM state's area of an image: what QEMU would do for it in the pause is done before, while the guest runs.

QEMU writes a VM state through the active table of the image. What has no clusters there is allocated in the pause.
What a load has left shared with its snapshot is copied first, a cluster at a time, with a flush for each: with that the
first save after a load pauses the guest 3 to 40 times as long as others. Zeroes that are written over all of it in
large pieces break the sharing and allocate what is missing; the save then writes over them. Nothing of the disk and of
any snapshot changes.

The pieces are written by QEMU's own ``qemu-io`` command (HMP), whose ``-b`` addresses the VM state (qemu-io-cmds.c:
do_save_vmstate). QEMU's main loop does nothing else meanwhile, and the guest's devices wait. So each piece is short,
and the guest has as much time for itself as the piece took.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from qsnap.errors import UNTOUCHED, MonitorLost
from qsnap.host import processes
from qsnap.host.processes import StateEstimate
from qsnap.inventory import vm_state
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.qcow2 import Unreadable
from qsnap.inventory.vm_state import Stretch
from qsnap.model.checks import Finding
from qsnap.model.qemu import BlockBackend, NodeSnapshot, QemuVersion, RunState
from qsnap.model.requests import OnExists, SaveRequest
from qsnap.model.runstates import takes_stop
from qsnap.monitor.hmp import text as hmp_text
from qsnap.operations.progress import Phase, Progress, Watcher, cannot_watch
from qsnap.runs.pause import has_ended
from qsnap.runs.run import Run

#: Bytes that must be missing for it to pay: below that the pause is short anyway.
_PAYS_FROM = 64 << 20
#: ``qemu-io`` refuses what is not a multiple of 512 bytes; this is the usual cluster.
_ALIGNMENT = 64 << 10
#: Bytes of the first piece, of the smallest (a disk may be slow, or throttled), and of the largest.
_PIECE = 2 << 20
_SMALLEST = 128 << 10
_LARGEST = 16 << 20
#: Seconds that a piece is to take; the next one is half as large if one took longer, and twice if it took a third.
_PIECE_S = 0.045


class Preparation(NamedTuple):
    """What is to be prepared; by default nothing.

    :ivar image: the image's file, or block device.
    :ivar name: the name by which ``qemu-io`` addresses the guest's device above the image.
    :ivar shared: bytes of the VM state up to which shared clusters are copied. What lies behind the coming state would
        stay in the new snapshot.
    :ivar missing: bytes of it up to which missing clusters are allocated; 0 if its size is not known well.
    :ivar always: missing clusters are allocated, however few there are. Else only if they pay.
    :ivar going: snapshots that the save deletes before it writes.
    :ivar findings: warnings before the save.
    """

    image: Path | None = None
    name: str = ""
    shared: int = 0
    missing: int = 0
    always: bool = False
    going: tuple[NodeSnapshot, ...] = ()
    findings: tuple[Finding, ...] = ()

    def stretches(self) -> list[Stretch]:
        """The stretches to write, as the image's file shows them now; fewer or none if there is no room."""
        shared, missing = (-(-size // _ALIGNMENT) * _ALIGNMENT for size in (self.shared, self.missing))
        found = _unprepared(self.image, max(shared, missing), self.going) if self.image else ()
        ends = ((one, (shared if one.is_shared else missing) - one.begin) for one in found)
        wanted = [one._replace(size=min(one.size, size)) for one, size in ends if size > 0]
        needed = [one for one in wanted if one.is_shared]
        if not self.always and _bytes(wanted) - _bytes(needed) < _PAYS_FROM:
            wanted = needed
        return next((some for some in (wanted, needed) if self.image and _has_room(self.image, some)), [])


def plan_preparation(
    inventory: Inventory,
    request: SaveRequest,
    runstate: RunState,
    version: QemuVersion,
    image: Path | None,
    estimate: StateEstimate | None,
) -> Preparation:
    """Find out what to prepare, and warn of a long pause if preparation is needed and impossible.

    Shared clusters are prepared unless the request forbids it, also for a guest that stands still, because the whole
    save becomes faster. Missing clusters are prepared if the guest runs and at least :data:`_PAYS_FROM` bytes are
    missing.

    :param image: the image's file or block device, if it can be seen.
    :param estimate: how large the VM state will be. Without one nothing is prepared.
    """
    vmstate = inventory.vmstate
    if vmstate is None or request.prepare is False:
        return Preparation()
    name = _writable_as(inventory, vmstate)
    tag = request.tag if request.on_exists is OnExists.REPLACE else None
    plan = Preparation(name=name, going=inventory.graph.nodes[vmstate].tagged(tag) if tag else ())
    if image is None or estimate is None:
        return _without(inventory, vmstate, request, plan, "its image, or QEMU's memory, cannot be seen from here")
    runs = takes_stop(runstate, version)
    plan = plan._replace(
        image=image,
        shared=estimate.expected,
        # Two standard deviations less: hardly ever is more prepared than written
        missing=(estimate.at_least + estimate.expected) // 2 if estimate.at_least and (runs or request.prepare) else 0,
        always=bool(request.prepare),
    )
    if name and plan.stretches():
        return plan
    why = "there is not enough room to copy them" if name else "no device of the guest uses its image"
    return _without(inventory, vmstate, request, plan, why)


def _without(inventory: Inventory, vmstate: str, request: SaveRequest, plan: Preparation, why: str) -> Preparation:
    """No preparation, and what is to be said of that: the guest may pause long, or --prepare cannot be honoured."""
    (device,) = inventory.displayed([vmstate])
    found = _unprepared(plan.image, plan.shared, plan.going) if plan.image else ()
    if shared := _bytes(one for one in found if one.is_shared):
        # It is not certain: the file may still show what QEMU has discarded after a save, and not yet written down
        message = (
            f"{device}: the guest may pause much longer than usual, because {shared:,} bytes of the image's area for "
            f"VM states seem to be shared with a snapshot that was loaded, and qsnap cannot copy them beforehand: {why}"
        )
        cure = "make room, or save with --live" if plan.name else "save with --live, or with --vmstate another disk"
        if plan.going:
            cure = f"delete the older snapshot of that name first, or {cure}"
        return Preparation(findings=(Finding.warning("long-pause", message, cure, vmstate),))
    if request.prepare and not (plan.image and plan.name):
        message = f"{device}: the save cannot be prepared: {why}"
        return Preparation(findings=(Finding.warning("not-prepared", message, "", vmstate),))
    return Preparation()


def _unprepared(image: Path, size: int, going: Collection[NodeSnapshot]) -> Sequence[Stretch]:
    """The stretches of a VM state of *size* bytes without clusters of their own; none if that cannot be seen."""
    try:
        file = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ()
    try:
        return vm_state.unprepared(file, size, going)
    except (Unreadable, OSError):
        return ()
    finally:
        os.close(file)


def _bytes(stretches: Iterable[Stretch]) -> int:
    return sum(one.size for one in stretches)


def _has_room(image: Path, stretches: Sequence[Stretch]) -> bool:
    """Whether the image can grow by all of them. If it is not a file, only shared stretches count as possible: the save
    itself would copy them, so it has room for them."""
    try:
        if not image.is_file():
            return all(one.is_shared for one in stretches)
        return processes.free_bytes(image)[1] >= _bytes(stretches)
    except OSError:
        return False


def _writable_as(inventory: Inventory, vmstate: str) -> str:
    """The name by which ``qemu-io`` addresses the guest device above the image; "" if there is none.

    It takes the name of a ``-drive``, or a device; by a node-name it would not get the right to write.
    """
    roots = {device.node for device in inventory.devices if device.image == vmstate}
    users = (user for user in inventory.graph.backends if user.root in roots)
    return next((name for user in users if (name := _name(user))), "")


def _name(user: BlockBackend) -> str:
    if user.name:
        return hmp_text.quoted(user.name)
    return f"-d {hmp_text.quoted(user.qdev)}" if user.qdev else ""


async def prepare(run: Run, preparation: Preparation, watch: Watcher | None) -> None:
    """Do it: see :func:`_prepared`. An interrupt says how things stand.

    :raise MonitorLost: QEMU has ended, or the connection broke; nothing was saved.
    """
    try:
        await _prepared(run, preparation, watch)
    except MonitorLost as lost:
        if await has_ended(run.journal):
            raise MonitorLost("QEMU has ended; there is no guest any more; nothing was saved") from lost
        raise
    except asyncio.CancelledError as cancelled:
        cancelled.add_note(f"nothing was saved; {UNTOUCHED}. What was prepared in the image is used by the next save")
        raise


async def _prepared(run: Run, preparation: Preparation, watch: Watcher | None) -> None:
    """Have QEMU make the clusters of the next VM state.

    After an interrupt, or if QEMU ends, nothing has to be undone: the next save skips what is done already.
    """
    stretches = preparation.stretches()
    if any(one.is_shared for one in stretches):
        # The file may still show clusters that QEMU discarded after a save, until QEMU flushes its tables
        await _qemu_io(run, preparation, "flush")
        stretches = preparation.stretches()
    began = time.monotonic()
    total = _bytes(stretches)
    done, piece = 0, _PIECE
    for one in stretches:
        begin, end = one.begin, one.begin + one.size
        while begin < end:
            size = min(piece, end - begin)
            took = await _qemu_io(run, preparation, f"write -q -b -P 0 {begin} {size}")
            begin, done = begin + size, done + size
            if watch is not None:
                try:
                    watch(Progress(Phase.PREPARING, time.monotonic() - began, done, total))
                except Exception as error:  # noqa: BLE001 (of the watcher's own)
                    cannot_watch(error)
                    watch = None
            if took > _PIECE_S:
                piece = max(_SMALLEST, piece // 2)
            elif took < _PIECE_S / 3:
                piece = min(_LARGEST, piece * 2)
            await asyncio.sleep(took)


async def _qemu_io(run: Run, preparation: Preparation, command: str) -> float:
    """Have QEMU execute *command*; return the seconds that it took. Errors appear only on QEMU's standard output."""
    began = time.monotonic()
    await run.shielded(run.monitor.human_answer(f'qemu-io {preparation.name} "{command}"'))
    return time.monotonic() - began
