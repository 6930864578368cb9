"""The library: a running VM, and what can be done with its snapshots.

::

    async with qsnap.connect("/run/vm.qmp") as vm:
        result = await vm.save("before-upgrade")
        print(result.vm_state_size, result.pause_ms)

Each sequence is loaded when it is first used: a list should not wait for what a save needs.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from qsnap.errors import (
    BadUsage,
    CommandFailed,
    QsnapError,
    SnapshotNotFound,
    VMLocked,
)
from qsnap.inventory.state_store import StateStore
from qsnap.model.checks import CheckReport
from qsnap.model.qemu import NodeSnapshot, RunState
from qsnap.model.results import (
    DeleteResult,
    DrillResult,
    ExportResult,
    GuestState,
    LoadResult,
    PruneResult,
    Recovered,
    SaveResult,
    Status,
    VerifyResult,
)
from qsnap.model.snapshots import Snapshot, Tree
from qsnap.monitor import Monitor
from qsnap.monitor.connection import peer_user
from qsnap.monitor.names import CLAIM, HALF_RESTORED

if TYPE_CHECKING:
    from qsnap.inventory.inventory import Inventory
    from qsnap.model.machine import Machine
    from qsnap.model.requests import LoadRequest
    from qsnap.operations.progress import Watcher
    from qsnap.runs.group import Member
    from qsnap.runs.run import Run
    from qsnap.upkeep.retention import Policy

#: What a VM says whose block has ended.
CLOSED = "the connection to this VM is closed, because its `with` block has ended"
#: Seconds for a guest to show in a drill that it runs.
DRILL_S = 60.0
#: Seconds that a command waits for QEMU to answer after its time-out, before it leaves the guest to its guard.
TIMED_PATIENCE_S = 10.0


class VM:
    """A running QEMU, by its monitor. Made by :func:`qsnap.connect`.

    :ivar address: where its monitor is.
    :ivar recovered: what any method of this object did about runs that had died.
    :ivar remarks: further messages for the user, a sentence each.
    :ivar lock_wait_s: how many seconds to wait for another qsnap that is using this VM; 0 refuses at once.
    :ivar member: its part in a group of VMs: see :func:`qsnap.together`.
    """

    def __init__(
        self,
        monitor: Monitor,
        *,
        lock_wait_s: float,
        is_timed: bool = False,
        state_dir: Path | None = None,
        ignore_unseen: bool = False,
    ) -> None:
        self._connected: Monitor | None = monitor
        self.address = monitor.address
        self.lock_wait_s = lock_wait_s
        self.recovered: list[Recovered] = []
        self.remarks: list[str] = []
        self._is_timed = is_timed
        self._store = StateStore(monitor.pid, state_dir, peer_user(monitor.sock), ignores_unseen=ignore_unseen)
        self._turn = asyncio.Lock()
        self.member: Member | None = None

    @property
    def _monitor(self) -> Monitor:
        """
        :raise BadUsage: the block that it was opened for has ended.
        """
        if self._connected is None:
            raise BadUsage(CLOSED)
        return self._connected

    @property
    def pid(self) -> int | None:
        """The QEMU process, if it is on this machine and the socket reports it."""
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
        live: bool | Literal["auto"] = False,
        prefix: str | None = None,
        description: str = "",
        alive: bool = False,
        prepare: bool | None = None,
    ) -> SaveResult:
        """Save RAM, device state and every writable disk under one tag: see :func:`qsnap.operations.save.do_savevm`.

        :param prefix: instead of a tag: save the next snapshot of that series, as PREFIX-YYYYMMDDTHHMMSS in local time.
            A guest that could not go on from it is refused, because it would push good snapshots out of the series.
        :param alive: refuse such a guest in any case. It has panicked, shut down, its watchdog has run out, a request
            to a disk has failed; or it is in S3, before QEMU 9.0. Default: warn, and note it with the snapshot.
        :param description: is stored beside the image: see :mod:`qsnap.inventory.notes`.
        :param safe_replace: keep the older snapshot until the new one is complete. A live save always keeps a whole
            snapshot; this changes nothing there.
        :param live: save while the guest runs: see :func:`qsnap.operations.live.save.do_live_save`. A paused guest
            gains nothing by it, and is saved the ordinary way. "auto" saves the ordinary way also if a live save is
            not possible, or failed and was undone. The result's warnings say so.
        :param prepare: allocate the clusters of the VM state while the guest runs, which shortens the pause; False:
            never. Default: if it pays, see :mod:`qsnap.operations.prepare`.
        :raise VMLocked: another qsnap is using this VM.
        """
        from qsnap.inventory.notes import checked_description
        from qsnap.model.requests import OnExists, SaveRequest
        from qsnap.operations.live.choose import save_live_or_not
        from qsnap.operations.position import position_kept
        from qsnap.operations.together import with_tag

        if tag is not None and prefix is not None:
            raise BadUsage("a tag and a prefix exclude each other")
        if safe_replace and not replace:
            raise BadUsage("a safe replacement and no replacement exclude each other")
        request = SaveRequest(
            tag=tag,
            on_exists=OnExists.SAFE if safe_replace else OnExists.REPLACE if replace else OnExists.REFUSE,
            vmstate=vmstate,
            exclude=tuple(exclude),
            force=force,
            alive=alive or prefix is not None,
            prepare=prepare,
            dry_run=dry_run,
        )
        checked_description(description)
        outcome = "nothing was saved"
        async with _telling(lambda: outcome), self._claimed("save", (tag or prefix or "",), is_dry=dry_run) as run:
            request = await with_tag(run, request, prefix)
            if not dry_run:
                run.remember()
            if description:
                (await run.look()).notes_path()
            with position_kept(run):
                result = await save_live_or_not(run, request, live, watch)
            if not dry_run:
                outcome = f"{result.tag!r} was saved"
                await run.shielded(self._note_saved(run, result, description))
        return msgspec.structs.replace(result, description=description)

    async def _note_saved(self, run: Run, result: SaveResult, description: str) -> None:
        """Write down what was saved, and that the guest is there now."""
        from qsnap.operations.annotate import note_save
        from qsnap.operations.position import note_position

        inventory = await self._tidied(run)
        await note_position(run, inventory, inventory.find(result.tag), saved=True)
        remark = note_save(run, inventory, result, description)
        self.remarks += [remark] if remark else []

    async def load(
        self,
        tag: str,
        *,
        running: bool | None = None,
        exclude: Collection[str] = (),
        force: bool = False,
        may_sleep: bool = False,
        full: bool = False,
        verify: bool = False,
        save_current: bool | str = False,
        sync_time: bool = False,
        watch: Watcher | None = None,
    ) -> LoadResult:
        """Put RAM, device state and disks back: see :func:`qsnap.operations.load.do_loadvm`, and
        :class:`qsnap.model.requests.LoadRequest` for the arguments.

        :param save_current: save first what the load discards, live if that is possible: under that tag, or True: as
            the next snapshot of the series "before-load", of which the last one is kept once the load has succeeded.
            :meth:`undo` brings it back. If it cannot be saved, nothing is loaded; if the load fails, it stays.
        :param sync_time: set the guest's clock through the guest agent afterwards: see
            :mod:`qsnap.operations.guest_clock`. If that fails, a remark says why.
        :raise VMLocked: another qsnap is using this VM.
        """
        from qsnap.model.requests import LoadRequest

        request = LoadRequest(
            tag=tag,
            running=running,
            exclude=tuple(exclude),
            force=force,
            may_sleep=may_sleep,
            full=full,
            verify=verify,
        )
        if save_current is not False and self.member is not None:
            raise BadUsage("a load --together saves nothing first: save them together, and load with --no-save-current")
        if save_current is False:
            result = await self._load(request, watch)
        else:
            result = await self._load_saving(request, None if save_current is True else save_current, watch)
        if not sync_time or result.clock_behind_s is None:
            return result
        from qsnap.operations.guest_clock import set_clock

        if why := await set_clock(self._monitor):
            self.remarks.append(f"the guest's clock was not set: {why}")
            return result
        return msgspec.structs.replace(result, clock_behind_s=0.0)

    async def _load(self, request: LoadRequest, watch: Watcher | None, saved: SaveResult | None = None) -> LoadResult:
        from qsnap.operations.guest_clock import announce
        from qsnap.operations.load import do_loadvm
        from qsnap.operations.position import note_position, position_kept
        from qsnap.operations.progress import watched_load
        from qsnap.operations.together import refuse_other_moments

        outcome = "nothing was loaded"
        async with _telling(lambda: outcome), self._claimed("load", (request.tag,)) as run:
            run.remember()
            inventory = await self._tidied(run)
            found = inventory.find(request.tag)
            remark = await refuse_other_moments(run, inventory, found, force=request.force)
            self.remarks += [remark] if remark else []
            with position_kept(run):
                try:
                    async with watched_load(watch, self.pid, found.vm_state_size if found else 0):
                        result = await do_loadvm(run, request)
                finally:
                    if run.loads:
                        outcome = f"the load of {request.tag!r} had begun"
            outcome = f"{request.tag!r} was loaded"
            undo = inventory.find(saved.tag) if saved else None
            is_noted = await run.shielded(note_position(run, inventory, found, saved=False, undo=undo))
            if saved and not is_noted:
                self.remarks.append(
                    "the load could not be written down beside the image, so `qsnap undo` does not know of it; "
                    f"`qsnap load {saved.tag}` brings back what it discarded"
                )
            behind_s = None
            if result.runstate is RunState.RUNNING:
                await announce(run.monitor)
                behind_s = round(max(0.0, time.time() - result.date.timestamp()), 1)
            return msgspec.structs.replace(result, saved=saved, clock_behind_s=behind_s)

    async def _load_saving(self, request: LoadRequest, name: str | None, watch: Watcher | None) -> LoadResult:
        """Save what the load discards, and load."""
        from qsnap.operations.plan import plan_load
        from qsnap.tags import UNDO_SERIES, free_automatic_tag, series_tag
        from qsnap.upkeep.retention import Policy

        if name == request.tag:
            raise BadUsage(f"what the load of {name!r} discards cannot be saved under that tag, too")
        run = self._unclaimed()
        await plan_load(run, request.tag, exclude=request.exclude, force=request.force)  # before anything is saved
        graph = await run.monitor.block_graph()
        tag = name or free_automatic_tag(graph, lambda now: series_tag(UNDO_SERIES, now))
        try:
            saved = await self.save(tag, replace=False, live="auto", exclude=request.exclude, watch=watch)
        except QsnapError as error:
            error.adds("nothing was loaded, because what the load discards could not be saved")
            raise
        try:
            result = await self._load(request, watch, saved)
        except QsnapError as error:
            error.adds(f"what the guest had done before is saved as {tag!r}")
            raise
        except asyncio.CancelledError as cancelled:
            cancelled.add_note(f"what the guest had done before is saved as {tag!r}")
            raise
        if name is None:
            try:
                await self.prune(UNDO_SERIES, Policy(last=1))
            except QsnapError as error:
                self.remarks.append(f"of the series {UNDO_SERIES!r} not only the last snapshot is left: {error}")
        return result

    async def undo(self, *, save_current: bool = True, watch: Watcher | None = None) -> LoadResult:
        """Load what the last load has discarded, if that load saved it: see :meth:`load`.

        :param save_current: save first what this load discards in turn: another undo brings that back.
        :raise SnapshotNotFound: the last load saved nothing, or it is not known which load was the last.
        """
        from qsnap.inventory.lineage import key_of, lineage
        from qsnap.tags import UNDO_SERIES, is_of_series

        await self._recover_if_seen()
        inventory = await self._unclaimed().look()
        known = lineage(inventory, (await inventory.marks(self._monitor)).names)
        found = next((one.tag for one in inventory.snapshots if key_of(one) == known.undo), None)
        if found is None:
            why = known.position.unknown and f"it is not known which load was the last: {known.position.unknown}"
            series = [one.tag for one in inventory.snapshots if is_of_series(one.tag, UNDO_SERIES)]
            hint = f". There is {series[-1]!r}: qsnap load {series[-1]}" if series else ""
            nothing = (
                "the last load saved nothing first (qsnap load --save-current TAG does), or what it saved is deleted"
            )
            raise SnapshotNotFound("", f"nothing to undo: {why or nothing}{hint}")
        return await self.load(found, save_current=save_current, watch=watch)

    async def delete(
        self, *tags: str, missing_ok: bool = False, ignore_unseen: bool = False, alone: bool = False
    ) -> DeleteResult:
        """Delete snapshots from every device that holds them: see :func:`qsnap.operations.delete.do_delvm`.

        :param alone: also what was saved together with other VMs. Default: refuse, unless they delete it together.
        :param ignore_unseen: ignore notes and state files that cannot be seen from here: see :func:`qsnap.connect`.
        :raise VMLocked: another qsnap is using this VM.
        """
        from qsnap.model.requests import DeleteRequest
        from qsnap.operations import remarks
        from qsnap.operations.annotate import forget_notes
        from qsnap.operations.delete import do_delvm

        async with self._claimed("delete", tags) as run:
            if ignore_unseen:
                run.store = run.store.ignoring_unseen()
            inventory = await self._tidied(run)
            self.remarks += remarks.of_unseen_files(inventory, tags)
            try:
                result = await do_delvm(run, DeleteRequest(tags=tags, missing_ok=missing_ok, alone=alone), inventory)
                deleted = [tag for tag, nodes in result.deleted.items() if nodes]
                self.remarks += remarks.of_backing(inventory, deleted)
                return result
            finally:
                await forget_notes(run, inventory)

    async def prune(
        self,
        prefix: str,
        policy: Policy,
        *,
        allow_remove_all: bool = False,
        dry_run: bool = False,
        pending: SaveResult | None = None,
    ) -> PruneResult:
        """Delete the snapshots of a series that a policy does not keep: see :func:`qsnap.operations.prune.do_prune`.

        :raise VMLocked: another qsnap is using this VM.
        """
        from qsnap.operations.annotate import forget_notes
        from qsnap.operations.prune import PruneRequest, do_prune

        request = PruneRequest(prefix, policy, allow_remove_all, dry_run, pending)
        async with self._claimed("delete", (f"{prefix}-*",), is_dry=dry_run) as run:
            inventory = await run.look() if dry_run else await self._tidied(run)
            try:
                result = await do_prune(run, request, inventory)
                if not result.keep and not result.remove:
                    others = f"; there is {', '.join(result.other_series)}" if result.other_series else ""
                    self.remarks.append(f"there is no series {prefix!r}, so nothing was pruned{others}")
                return result
            finally:
                if not dry_run:
                    await forget_notes(run, inventory)

    async def note(
        self, *tags: str, protected: bool | None = None, description: str | None = None
    ) -> tuple[Snapshot, ...]:
        """Protect snapshots, or describe them: see :func:`qsnap.operations.annotate.annotate`.

        :raise VMLocked: another qsnap is using this VM.
        """
        from qsnap.inventory.notes import checked_description
        from qsnap.operations.annotate import annotate

        if description is not None:
            checked_description(description)
        async with self._claimed("note", tags) as run:
            return await annotate(run, tags, protected=protected, description=description)

    async def pause(self) -> GuestState:
        """Pause the guest: see :func:`qsnap.operations.stop_cont.pause`.

        :raise VMLocked: another qsnap is using this VM.
        """
        from qsnap.operations import stop_cont

        async with self._claimed("pause", ()) as run:
            return await stop_cont.pause(run)

    async def resume(self) -> GuestState:
        """Run a paused guest again: see :func:`qsnap.operations.stop_cont.resume`.

        :raise PrecheckRefused: a load has failed midway, so that it must not run.
        :raise VMLocked: another qsnap is using this VM.
        """
        from qsnap.operations import stop_cont

        async with self._claimed("resume", ()) as run:
            return await stop_cont.resume(run)

    async def recover(self, *, force: bool = False) -> tuple[Recovered, ...]:
        """Clean up after runs that died on this VM: resume the guest, remove what they left half made.

        Every other method except :meth:`status` does that too, before its own work.

        :param force: also after a run of another machine or container, although it may still be alive.
        :return: what was done; empty if nothing was left to do.
        :raise VMLocked: a run is using this VM.
        """
        from qsnap.operations.remarks import of_unseen_notes
        from qsnap.supervision.claim import recover_all
        from qsnap.tags import SECOND_SUFFIX

        done = await recover_all(self._monitor, force=force)
        with suppress(CommandFailed):  # under -preconfig there is nothing to tidy
            inventory = await self._tidied(self._unclaimed())
            self.remarks += [
                f"{tag!r} is left over from a replacement of {tag.removesuffix(SECOND_SUFFIX)!r} that was cut short: "
                f"qsnap delete {shlex.quote(tag)}"
                for tag in (one.tag for one in inventory.snapshots)
                if tag.endswith(SECOND_SUFFIX)
            ]
            with suppress(QsnapError):  # damaged notes: reported when something is deleted
                self.remarks += await of_unseen_notes(self._monitor, inventory)
        return tuple(done)

    async def list(self) -> tuple[Snapshot, ...]:
        """All snapshots, oldest first, including those on some devices only and those that qsnap did not make."""
        return (await self.tree()).snapshots

    async def tree(self) -> Tree:
        """All snapshots, oldest first, each with its parent; and where the guest is: :mod:`qsnap.inventory.lineage`."""
        from qsnap.inventory.lineage import lineage
        from qsnap.operations import remarks

        await self._recover_if_seen()
        inventory = await self._unclaimed().look()
        found, unseen = await remarks.with_notes(self._monitor, inventory, inventory.snapshots)
        self.remarks += unseen + remarks.of_files(inventory, found) + remarks.of_backing(inventory)
        known = lineage(inventory, (await inventory.marks(self._monitor)).names)
        return Tree(snapshots=known.added_to(found), position=known.position)

    async def show(self, tag: str) -> tuple[Snapshot, dict[str, tuple[NodeSnapshot, ...]]]:
        """One snapshot, and its rows in the snapshot table of each node that holds it.

        :raise SnapshotNotFound: no device holds it.
        """
        from qsnap.inventory.lineage import lineage
        from qsnap.operations import remarks

        await self._recover_if_seen()
        inventory = await self._unclaimed().look()
        known = lineage(inventory, (await inventory.marks(self._monitor)).names)
        found = [one for one in known.added_to(inventory.snapshots) if one.tag == tag]
        if not found:
            raise inventory.not_found(tag)
        (snapshot,), unseen = await remarks.with_notes(self._monitor, inventory, found)
        self.remarks += unseen + remarks.of_files(inventory, [snapshot])
        return snapshot, {name: inventory.graph.nodes[name].tagged(snapshot.disk_tag) for name in snapshot.devices}

    async def state(self, tag: str) -> Machine:
        """The machine that a snapshot's VM state is of: its type, RAM blocks and devices. The guest is not touched.

        :raise SnapshotNotFound: no device holds it.
        :raise NotSupported: it has no VM state, or that cannot be read from here.
        """
        from qsnap.operations.verify import machine_of

        inventory = await self._unclaimed().look()
        snapshot = inventory.find(tag)
        if snapshot is None:
            raise inventory.not_found(tag)
        return await machine_of(self._unclaimed(), snapshot, inventory)

    async def verify(
        self, *tags: str, prefix: str | None = None, read_data: bool = False, watch: Watcher | None = None
    ) -> VerifyResult:
        """Find out whether snapshots are whole: see :func:`qsnap.operations.verify.verify`. The guest is not touched.

        :param tags: default: all.
        :param prefix: instead of tags: the snapshots of that series.
        :param read_data: read all data, and compare them with checksums; take the checksums if there are none yet.
        :raise SnapshotNotFound: no device holds one of them.
        """
        from qsnap.operations.annotate import note_checksums
        from qsnap.operations.remarks import with_notes
        from qsnap.operations.verify import verify
        from qsnap.tags import is_of_series

        await self._recover_if_seen()
        run = self._unclaimed()
        inventory = await run.look()
        if missing := [tag for tag in tags if inventory.find(tag) is None]:
            raise inventory.not_found(missing[0])
        found, unseen = await with_notes(self._monitor, inventory, inventory.snapshots)
        self.remarks += unseen
        chosen = [
            one
            for one in found
            if (is_of_series(one.tag, prefix) if prefix is not None else not tags or one.tag in tags)
        ]
        result, new = await verify(run, chosen, inventory, read_data=read_data, watch=watch)
        if new:
            try:
                async with self._claimed("note", tuple(new)) as claimed:
                    await note_checksums(claimed, new)
            except QsnapError as error:
                self.remarks.append(f"the checksums could not be written down: {error}")
                snapshots = tuple(msgspec.structs.replace(one, recorded=0) for one in result.snapshots)
                result = msgspec.structs.replace(result, snapshots=snapshots)
        return result

    async def check(
        self,
        tag: str | None = None,
        *,
        vmstate: str | None = None,
        exclude: Collection[str] = (),
        force: bool = False,
    ) -> CheckReport:
        """Run only the pre-checks of a save. The guest is not touched.

        :raise NotSupported: HMP cannot honour *vmstate* or *exclude*.
        """
        from qsnap.model.requests import SaveRequest
        from qsnap.operations.plan import plan_save

        await self._recover_if_seen()
        request = SaveRequest(tag=tag, vmstate=vmstate, exclude=tuple(exclude), force=force)
        return (await plan_save(self._unclaimed(), request)).report

    async def check_load(self, tag: str, *, exclude: Collection[str] = ()) -> Snapshot:
        """Run only the pre-checks of a load: see :func:`qsnap.operations.load.check_load`. The guest is not touched.

        :return: the snapshot that a load would put back.
        """
        from qsnap.operations.load import check_load

        await self._recover_if_seen()
        return await check_load(self._unclaimed(), tag, exclude)

    async def export(
        self,
        tag: str,
        directory: str | Path,
        *,
        keep_backing: bool = False,
        force: bool = False,
        watch: Watcher | None = None,
    ) -> ExportResult:
        """Make a directory from which the guest can be started elsewhere: see
        :func:`qsnap.operations.portable.export.do_export`, and :class:`qsnap.model.requests.ExportRequest`.

        :raise VMLocked: another qsnap is using this VM.
        """
        from qsnap.model.requests import ExportRequest
        from qsnap.operations.portable.export import do_export

        request = ExportRequest(tag=tag, directory=str(directory), keep_backing=keep_backing, force=force)
        async with self._claimed("export", (tag,)) as run:
            return await do_export(run, request, watch)

    async def drill(
        self,
        tag: str | None = None,
        *,
        prefix: str | None = None,
        until: str = "",
        within_s: float = DRILL_S,
        place: str | Path | None = None,
        qemu: str | None = None,
        force: bool = False,
        watch: Watcher | None = None,
    ) -> DrillResult:
        """Export a snapshot to a temporary place, start it, see that its guest runs, and end it: see
        :func:`qsnap.operations.portable.drill.do_drill`.

        :param prefix: instead of a tag: the newest snapshot of that series that can be loaded.
        :param until: what the guest must write to a serial port, too.
        :param within_s: seconds for the guest to show that it runs, and for that text. Default 60.
        :param place: where the temporary directory is made. Default: $TMPDIR, or /tmp.
        :param qemu: the QEMU to run. Default: the one that the guest runs in.
        :raise VMLocked: another qsnap is using this VM.
        :raise VerifyFailed: the snapshot does not start, or its guest does not run.
        """
        from qsnap.operations.portable.drill import do_drill

        if (tag is None) is (prefix is None):
            raise BadUsage("a drill is of one tag, or of a series")
        positive("the time for the guest to run", within_s)
        chosen = tag if tag is not None else await self._newest(prefix or "")

        async def export(directory: Path) -> ExportResult:
            return await self.export(chosen, directory, force=force, watch=watch)

        where = None if place is None else Path(place)
        return await do_drill(export, until=until, within_s=within_s, place=where, qemu=qemu)

    async def status(self) -> Status:
        """The guest's state, and what earlier runs of qsnap left behind on it. Changes nothing."""
        from qsnap.model.runstates import trouble_of
        from qsnap.supervision.claim import run_of

        monitor = self._monitor
        inventory, runstate, name, leftovers, half_restored = await asyncio.gather(
            self._unclaimed().look(),
            monitor.runstate(),
            monitor.name(),
            monitor.leftover_jobs(),
            monitor.mark(HALF_RESTORED),
        )
        return Status(
            version=str(monitor.version),
            name=name,
            runstate=runstate,
            trouble=trouble_of(runstate, monitor.version),
            monitor=str(self.address),
            transport=monitor.transport,
            snapshots=len(inventory.snapshots),
            vmstate=inventory.vmstate,
            devices=inventory.devices,
            leftover_jobs=tuple(leftovers),
            run=await run_of(monitor),
            is_half_restored=half_restored is not None,
            in_backing=inventory.in_backing,
        )

    async def _newest(self, prefix: str) -> str:
        """The newest snapshot of a series that can be loaded.

        :raise SnapshotNotFound: there is none.
        """
        from qsnap.tags import is_of_series
        from qsnap.upkeep.freshness import is_sound

        found = [one for one in await self.list() if is_of_series(one.tag, prefix) and is_sound(one, ())]
        if not found:
            raise SnapshotNotFound(prefix, f"there is no snapshot of the series {prefix!r} that can be loaded")
        return max(found, key=lambda one: one.date).tag

    def _unclaimed(self) -> Run:
        """A run for read-only methods: no claim."""
        from qsnap.runs.run import Run

        return Run(self._monitor, self._store)

    @asynccontextmanager
    async def _claimed(self, operation: str, tags: tuple[str, ...], *, is_dry: bool = False) -> AsyncIterator[Run]:
        for tag in tags:
            try:
                tag.encode()
            except UnicodeEncodeError:
                raise BadUsage(f"the tag {tag!r} is not valid UTF-8") from None
        run, member = self._unclaimed(), self.member
        if member is not None:
            from qsnap.targets.running import is_qemu

            graph = await self._monitor.block_graph()
            images = "\n".join(sorted(node.filename for node in graph.nodes.values()))
            await member.take_turn(images, self.pid if self.pid and is_qemu(self.pid) else None)
        if is_dry:
            run.journal.member = member
            yield run
            return
        from qsnap.runs.group import Point
        from qsnap.runs.journal import AFTERMATH_TIMEOUT_S
        from qsnap.supervision.claim import claimed

        patience_s = TIMED_PATIENCE_S if self._is_timed else AFTERMATH_TIMEOUT_S
        async with (
            self._turn,
            claimed(
                self._monitor,
                operation,
                tags,
                wait_s=self.lock_wait_s,
                patience_s=patience_s,
                tell=self.recovered.append,
            ) as run.journal,
        ):
            if member is not None:
                run.journal.join(member)
                member.arrive(Point.CLAIMED)
            yield run

    async def _recover_if_seen(self) -> None:
        """Clean up after a run that died, before this one reads the VM's state."""
        from qsnap.runs import runtime_dir

        if problem := runtime_dir.problem():
            self.remarks.append(f"it is not known whether a run has died: {problem}")
        elif runtime_dir.has_journals() or await self._monitor.mark(CLAIM) is not None:
            from qsnap.supervision.claim import recover_all

            # The run lives, or another qsnap recovers it already
            with suppress(VMLocked):
                self.recovered += await recover_all(self._monitor)

    async def _tidied(self, run: Run) -> Inventory:
        """The VM's inventory, after the leftovers of earlier runs are removed."""
        from qsnap.operations.annotate import mirror_notes

        # Housekeeping: if QEMU refuses to list jobs (-preconfig), the pre-checks report that better.
        with suppress(CommandFailed):
            await run.monitor.dismiss(await run.monitor.leftover_jobs())
        inventory = await run.look()
        run.store.remove_parts(inventory.graph, inventory.devices)
        await mirror_notes(run, inventory)
        return inventory


def positive(what: str, value: float | None) -> float | None:
    """*value*, if it is a valid number of seconds or None.

    :raise BadUsage: *value* is not above 0.
    """
    if value is not None and not value > 0:
        raise BadUsage(f"{what} must be above 0, not {value:g}")
    return value


@asynccontextmanager
async def _telling(outcome: Callable[[], str]) -> AsyncIterator[None]:
    """Note on an interrupt what has become of the block's work, unless the work itself has noted that."""
    try:
        yield
    except asyncio.CancelledError as cancelled:
        if not getattr(cancelled, "__notes__", ()):
            cancelled.add_note(outcome())
        raise
