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
from qsnap.errors import BadUsage, CommandFailed, MonitorBusy, OperationTimeout, SnapshotNotFound, VMLocked
from qsnap.model import (
    BlockGraph,
    CheckReport,
    DeleteResult,
    Device,
    LoadResult,
    NodeSnapshot,
    Recovered,
    SaveResult,
    Snapshot,
    Status,
    positive,
)
from qsnap.monitor import GREETING_TIMEOUT_S, HALF_RESTORED, Monitor, open_monitor
from qsnap.monitor.address import Address, parse_address

if TYPE_CHECKING:
    from qsnap.journal import Journal
    from qsnap.progress import Watcher

#: Seconds to wait for another qsnap.
LOCK_WAIT_S = 5.0
#: Seconds that a command whose time is over waits for QEMU to answer, before it leaves the guest to its guard.
TIMED_PATIENCE_S = 10.0


class VM:
    """A running QEMU, by its monitor. Made by :func:`connect`.

    :ivar address: where its monitor is.
    :ivar recovered: what had to be done about runs that had died, by whichever method came upon them.
    :ivar lock_wait_s: how many seconds to wait for another qsnap that is at work on this VM; 0 refuses at once.
    """

    def __init__(self, monitor: Monitor, address: Address, *, lock_wait_s: float, is_timed: bool = False) -> None:
        self._monitor = monitor
        self.address = address
        self.lock_wait_s = lock_wait_s
        self.recovered: list[Recovered] = []
        self._is_timed = is_timed
        self._turn = asyncio.Lock()

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
        safe_replace: bool = False,
    ) -> SaveResult:
        """Save RAM, device state and every writable disk under one tag: see :func:`qsnap.savevm.do_savevm`.

        :raise VMLocked: another qsnap is at work on this VM.
        """
        from qsnap.savevm import do_savevm

        async with self._claimed("save", (tag or "",), is_dry=dry_run) as journal:
            result = await do_savevm(
                self._monitor,
                tag,
                replace=replace,
                vmstate=vmstate,
                exclude=exclude,
                force=force,
                dry_run=dry_run,
                watch=watch,
                safe_replace=safe_replace,
                journal=journal,
            )
            await self._dismiss_leftovers()
        return result

    async def load(self, tag: str, *, running: bool | None = None, exclude: Collection[str] = ()) -> LoadResult:
        """Put RAM, device state and disks back: see :func:`qsnap.loadvm.do_loadvm`.

        :raise VMLocked: another qsnap is at work on this VM.
        """

        from qsnap.loadvm import do_loadvm

        async with self._claimed("load", (tag,)) as journal:
            await self._dismiss_leftovers()
            return await do_loadvm(self._monitor, tag, running=running, exclude=exclude, journal=journal)

    async def delete(self, *tags: str, missing_ok: bool = False) -> DeleteResult:
        """Delete snapshots from every device that holds them: see :func:`qsnap.delvm.do_delvm`.

        :raise VMLocked: another qsnap is at work on this VM.
        """

        from qsnap.delvm import do_delvm

        async with self._claimed("delete", tags) as journal:
            await self._dismiss_leftovers()
            return await do_delvm(self._monitor, tags, missing_ok=missing_ok, journal=journal)

    async def recover(self, *, force: bool = False) -> tuple[Recovered, ...]:
        """See runs through that died on this VM: resume the guest, remove what they left half made.

        Every other method but :meth:`status` does that too, before its own work.

        :param force: also one of another machine or container, where it cannot be told whether it is dead.
        :return: what was done; nothing where nothing was left to do.
        :raise VMLocked: a run is at work on this VM.
        """
        from qsnap.claim import recover_all

        done = await recover_all(self._monitor, self.address, force=force)
        await self._dismiss_leftovers()
        return tuple(done)

    async def list(self) -> tuple[Snapshot, ...]:
        """All snapshots, oldest first; those on some devices only and those that others made too."""
        await self._recover_if_seen()
        graph = await self._monitor.block_graph()
        return snapshots.snapshots(graph, self._devices_of(graph))

    async def show(self, tag: str) -> tuple[Snapshot, dict[str, tuple[NodeSnapshot, ...]]]:
        """One snapshot, and its rows in the snapshot table of each node that holds it.

        :raise SnapshotNotFound: no device holds it.
        """
        await self._recover_if_seen()
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

        await self._recover_if_seen()
        return (await plan_save(self._monitor, tag, vmstate=vmstate, exclude=exclude, force=force)).report

    async def status(self) -> Status:
        """The guest, and what an earlier qsnap has left behind on it. Changes nothing."""
        monitor = self._monitor
        from qsnap.claim import run_of

        graph, runstate, name, leftovers, half_restored = await asyncio.gather(
            monitor.block_graph(),
            monitor.runstate(),
            monitor.name(),
            monitor.leftover_jobs(),
            monitor.mark(HALF_RESTORED),
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
            run=await run_of(monitor),
            is_half_restored=half_restored is not None,
        )

    def _devices_of(self, graph: BlockGraph) -> Sequence[Device]:
        return rules.survey(graph, chooses_devices=self._monitor.chooses_devices).devices

    @asynccontextmanager
    async def _claimed(self, operation: str, tags: tuple[str, ...], *, is_dry: bool = False) -> AsyncIterator[Journal]:
        if is_dry:
            from qsnap.journal import Journal

            yield Journal()
            return
        from qsnap.claim import claimed
        from qsnap.journal import AFTERMATH_TIMEOUT_S

        patience_s = TIMED_PATIENCE_S if self._is_timed else AFTERMATH_TIMEOUT_S
        async with (
            self._turn,
            claimed(
                self._monitor,
                self.address,
                operation,
                tags,
                wait_s=self.lock_wait_s,
                patience_s=patience_s,
                tell=self.recovered.append,
            ) as journal,
        ):
            yield journal

    async def _recover_if_seen(self) -> None:
        """See a run through that died, before its remains are looked at."""
        from qsnap.claim import recover_all, unfinished
        from qsnap.marks import CLAIM

        if unfinished(self._monitor, self.address) or await self._monitor.mark(CLAIM) is not None:
            # It lives, or somebody else is at it already
            with suppress(VMLocked):
                self.recovered += await recover_all(self._monitor, self.address)

    async def _dismiss_leftovers(self) -> None:
        # Housekeeping: where QEMU will not hear of jobs (-preconfig), the pre-checks say so better.
        with suppress(CommandFailed):
            await self._monitor.dismiss(await self._monitor.leftover_jobs())


async def _opened(where: Address, greeting_s: float, lock_wait_s: float, snapshot_jobs: bool | None) -> Monitor:
    """The monitor, once no other qsnap holds it."""
    from qsnap.claim import wait_for_monitor

    if not lock_wait_s >= 0:  # nor is it if that is no number
        raise BadUsage(f"the time to wait for another qsnap must not be below 0, as {lock_wait_s:g} is")
    deadline = asyncio.get_running_loop().time() + lock_wait_s
    while True:
        await wait_for_monitor(where, deadline, lock_wait_s)
        left_s = deadline - asyncio.get_running_loop().time()
        try:
            return await open_monitor(where, timeout_s=max(greeting_s, left_s), snapshot_jobs=snapshot_jobs)
        except MonitorBusy:
            # Of two who began at once, the other may be another qsnap: by now that shows
            if not await wait_for_monitor(where, deadline, lock_wait_s):
                raise


@asynccontextmanager
async def connect(
    address: str | Address,
    *,
    timeout_s: float | None = None,
    lock_wait_s: float = LOCK_WAIT_S,
    snapshot_jobs: bool | None = None,
) -> AsyncIterator[VM]:
    """Connect to the monitor of a running QEMU, for the duration of a block.

    :param address: a path, ``unix:PATH``, ``tcp:HOST:PORT``, or QEMU's own argument pasted whole.
    :param timeout_s: seconds for the whole block, None for no bound. What is under way then is ended as by an
        interrupt: the guest is resumed, nothing half made is left. The greeting has its own bound of 5 s. Where
        QEMU does not answer for 10 s after that, the rest is left to the guard.
    :param lock_wait_s: seconds to wait for another qsnap that is at work on this VM; 0 refuses at once.
    :param snapshot_jobs: False goes by HMP's savevm inside QMP also where QEMU has snapshot jobs.
    :raise BadUsage: *address* cannot be meant.
    :raise ConnectError: nothing listens there, or it may not be opened.
    :raise MonitorBusy: another client holds it, or QEMU does not answer.
    :raise VMLocked: that client is another qsnap.
    :raise OperationTimeout: *timeout_s* have passed.
    """
    where = parse_address(address) if isinstance(address, str) else address
    positive("the time-out", timeout_s)
    greeting_s = GREETING_TIMEOUT_S if timeout_s is None else min(timeout_s, GREETING_TIMEOUT_S)
    clock = asyncio.get_running_loop().time
    deadline = None if timeout_s is None else clock() + timeout_s
    patience_s = lock_wait_s if timeout_s is None else min(lock_wait_s, timeout_s)
    monitor = await _opened(where, greeting_s, patience_s, snapshot_jobs)
    timer = asyncio.timeout_at(deadline)
    try:
        async with timer:
            yield VM(monitor, where, lock_wait_s=lock_wait_s, is_timed=timeout_s is not None)
    except TimeoutError as error:
        if not timer.expired():
            raise  # the caller's own
        notes = getattr(error.__cause__, "__notes__", ())
        raise OperationTimeout("; ".join((f"not done within {timeout_s:g} s", *notes))) from error
    finally:
        await monitor.aclose()
