"""The library: a running VM, and what can be done with its snapshots.

::

    async with qsnap.connect("/run/vm.qmp") as vm:
        result = await vm.save("before-upgrade")
        print(result.vm_state_size, result.pause_ms)

Each sequence is loaded when it is first used: a list should not wait for what a save needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from qsnap import devices as rules
from qsnap import snapshots
from qsnap.errors import CommandFailed, OperationTimeout, SnapshotNotFound
from qsnap.model import (
    BlockGraph,
    CheckReport,
    DeleteResult,
    Device,
    LoadResult,
    NodeSnapshot,
    SaveResult,
    Snapshot,
    Status,
    positive,
)
from qsnap.monitor import GREETING_TIMEOUT_S, Monitor, open_monitor
from qsnap.monitor.address import Address, parse_address

if TYPE_CHECKING:
    from qsnap.progress import Watcher


class VM:
    """A running QEMU, by its monitor. Made by :func:`connect`.

    :ivar address: where its monitor is.
    """

    def __init__(self, monitor: Monitor, address: Address) -> None:
        self._monitor = monitor
        self.address = address

    @property
    def pid(self) -> int | None:
        """The QEMU process, where it is on this machine and the socket tells."""
        return self._monitor.pid

    async def save(
        self,
        tag: str | None = None,
        *,
        replace: bool = True,
        vmstate: str | None = None,
        exclude: Collection[str] = (),
        force: bool = False,
        dry_run: bool = False,
        watch: Watcher | None = None,
    ) -> SaveResult:
        """Save RAM, device state and every writable disk under one tag: see :func:`qsnap.savevm.do_savevm`."""
        from qsnap.savevm import do_savevm

        result = await do_savevm(
            self._monitor,
            tag,
            replace=replace,
            vmstate=vmstate,
            exclude=exclude,
            force=force,
            dry_run=dry_run,
            watch=watch,
        )
        await self._dismiss_leftovers()
        return result

    async def load(self, tag: str, *, running: bool | None = None, exclude: Collection[str] = ()) -> LoadResult:
        """Put RAM, device state and disks back: see :func:`qsnap.loadvm.do_loadvm`."""

        from qsnap.loadvm import do_loadvm

        await self._dismiss_leftovers()
        return await do_loadvm(self._monitor, tag, running=running, exclude=exclude)

    async def delete(self, *tags: str, missing_ok: bool = False) -> DeleteResult:
        """Delete snapshots from every device that holds them: see :func:`qsnap.delvm.do_delvm`."""

        from qsnap.delvm import do_delvm

        await self._dismiss_leftovers()
        return await do_delvm(self._monitor, tags, missing_ok=missing_ok)

    async def list(self) -> tuple[Snapshot, ...]:
        """All snapshots, oldest first; those on some devices only and those that others made too."""
        graph = await self._monitor.block_graph()
        return snapshots.snapshots(graph, self._devices_of(graph))

    async def show(self, tag: str) -> tuple[Snapshot, dict[str, tuple[NodeSnapshot, ...]]]:
        """One snapshot, and its rows in the snapshot table of each node that holds it.

        :raise SnapshotNotFound: no device holds it.
        """
        graph = await self._monitor.block_graph()
        snapshot = snapshots.find(graph, self._devices_of(graph), tag)
        if snapshot is None:
            raise SnapshotNotFound(tag)
        return snapshot, {name: graph.nodes[name].tagged(tag) for name in snapshot.devices}

    async def check(
        self,
        tag: str | None = None,
        *,
        vmstate: str | None = None,
        exclude: Collection[str] = (),
        force: bool = False,
    ) -> CheckReport:
        """Run the pre-checks of a save alone. The guest is not touched.

        :raise NotSupported: HMP cannot honour *vmstate* or *exclude*.
        """
        from qsnap.precheck import plan_save

        return (await plan_save(self._monitor, tag, vmstate=vmstate, exclude=exclude, force=force)).report

    async def status(self) -> Status:
        """The guest, and what an earlier qsnap has left behind on it. Changes nothing."""
        monitor = self._monitor
        graph, runstate, name, leftovers = await asyncio.gather(
            monitor.block_graph(), monitor.runstate(), monitor.name(), monitor.leftover_jobs()
        )
        survey = rules.survey(graph, chooses_devices=monitor.chooses_devices)
        return Status(
            version=str(monitor.version),
            name=name,
            runstate=runstate,
            monitor=str(self.address),
            transport=monitor.transport,
            snapshots=len(snapshots.snapshots(graph, survey.devices)),
            vmstate=survey.vmstate,
            devices=survey.devices,
            leftover_jobs=tuple(leftovers),
        )

    def _devices_of(self, graph: BlockGraph) -> Sequence[Device]:
        return rules.survey(graph, chooses_devices=self._monitor.chooses_devices).devices

    async def _dismiss_leftovers(self) -> None:
        # Housekeeping: where QEMU will not hear of jobs (-preconfig), the pre-checks say so better.
        with suppress(CommandFailed):
            await self._monitor.dismiss(await self._monitor.leftover_jobs())


@asynccontextmanager
async def connect(
    address: str | Address, *, timeout_s: float | None = None, snapshot_jobs: bool | None = None
) -> AsyncIterator[VM]:
    """Connect to the monitor of a running QEMU, for the duration of a block.

    :param address: a path, ``unix:PATH``, ``tcp:HOST:PORT``, or QEMU's own argument pasted whole.
    :param timeout_s: seconds for the whole block, None for no bound. What is under way then is ended as by an
        interrupt: the guest is resumed, nothing half made is left. The greeting has its own bound of 5 s.
    :param snapshot_jobs: False goes by HMP's savevm inside QMP also where QEMU has snapshot jobs.
    :raise BadUsage: *address* cannot be meant.
    :raise ConnectError: nothing listens there, or it may not be opened.
    :raise MonitorBusy: another client holds it, or QEMU does not answer.
    :raise OperationTimeout: *timeout_s* have passed.
    """
    where = parse_address(address) if isinstance(address, str) else address
    positive("the time-out", timeout_s)
    greeting_s = GREETING_TIMEOUT_S if timeout_s is None else min(timeout_s, GREETING_TIMEOUT_S)
    clock = asyncio.get_running_loop().time
    deadline = None if timeout_s is None else clock() + timeout_s
    monitor = await open_monitor(where, timeout_s=greeting_s, snapshot_jobs=snapshot_jobs)
    timer = asyncio.timeout_at(deadline)
    try:
        async with timer:
            yield VM(monitor, where)
    except TimeoutError as error:
        if not timer.expired():
            raise  # the caller's own
        notes = getattr(error.__cause__, "__notes__", ())
        raise OperationTimeout("; ".join((f"not done within {timeout_s:g} s", *notes))) from error
    finally:
        await monitor.aclose()
