"""The library: a running VM, and what can be done with its snapshots.

::

    async with qsnap.connect("/run/vm.qmp") as vm:
        result = await vm.save("before-upgrade")
        print(result.vm_state_size, result.pause_ms)

Each sequence is loaded when it is first used: a list should not wait for what a save needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from qsnap.errors import (
    BadUsage,
    CommandFailed,
    JobFailed,
    MonitorBusy,
    NotSupported,
    OperationTimeout,
    PrecheckRefused,
    QsnapError,
    VMLocked,
)
from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.inventory.state_store import StateStore
from qsnap.model.qemu import (
    BlockGraph,
    CheckReport,
    DeleteResult,
    Device,
    Finding,
    Kind,
    LoadResult,
    NodeSnapshot,
    PruneResult,
    Recovered,
    RunState,
    SaveResult,
    Severity,
    Snapshot,
    Status,
)
from qsnap.monitor import GREETING_TIMEOUT_S, HALF_RESTORED, Monitor, open_monitor
from qsnap.monitor.address import Address, parse_address
from qsnap.monitor.connection import peer_user

if TYPE_CHECKING:
    from qsnap.operations.progress import Watcher
    from qsnap.runs.journal import Journal
    from qsnap.upkeep.retention import Policy

#: Seconds to wait for another qsnap.
LOCK_WAIT_S = 5.0
#: Seconds that a command whose time is over waits for QEMU to answer, before it leaves the guest to its guard.
TIMED_PATIENCE_S = 10.0


class VM:
    """A running QEMU, by its monitor. Made by :func:`connect`.

    :ivar address: where its monitor is.
    :ivar recovered: what had to be done about runs that had died, by whichever method came upon them.
    :ivar remarks: what else is to be said to the user, a sentence each.
    :ivar lock_wait_s: how many seconds to wait for another qsnap that is at work on this VM; 0 refuses at once.
    """

    def __init__(
        self,
        monitor: Monitor,
        address: Address,
        *,
        lock_wait_s: float,
        is_timed: bool = False,
        state_dir: Path | None = None,
        ignore_unseen: bool = False,
    ) -> None:
        self._monitor = monitor
        self.address = address
        self.lock_wait_s = lock_wait_s
        self.recovered: list[Recovered] = []
        self.remarks: list[str] = []
        self._is_timed = is_timed
        self._store = StateStore(monitor.pid, state_dir, peer_user(monitor.sock), ignores_unseen=ignore_unseen)
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
        live: bool | Literal["auto"] = False,
        prefix: str | None = None,
        description: str = "",
        alive: bool = False,
    ) -> SaveResult:
        """Save RAM, device state and every writable disk under one tag: see :func:`qsnap.operations.save.do_savevm`.

        :param prefix: instead of a tag: save the next one of that series, as PREFIX-YYYYMMDDTHHMMSS in local time.
            A guest that could not go on from it is refused: it would push good snapshots out of the series.
        :param alive: refuse such a guest in any case. It has panicked, shut down, its watchdog has run out, a request
            to a disk has failed; or it is in S3, before QEMU 9.0. Default: warn, and write it down with the snapshot.
        :param description: written down beside the image: see :mod:`qsnap.inventory.notes`.
        :param safe_replace: a live save never is without a whole snapshot, with this or without.
        :param live: while the guest runs: see :func:`qsnap.operations.live.save.do_live_save`. A guest that is paused
            gains nothing by it, and is saved the ordinary way. "auto" saves the ordinary way also where a live save is
            not possible, or has failed and was undone. The result's warnings say so.
        :raise VMLocked: another qsnap is at work on this VM.
        """
        if tag is not None and prefix is not None:
            raise BadUsage("a tag and a prefix exclude each other")
        if description:
            from qsnap.inventory.notes import checked_description

            checked_description(description)
        async with self._claimed("save", (tag or prefix or "",), is_dry=dry_run) as journal:
            if prefix is not None:
                tag = await self._next_of_series(prefix)
            place = await self._place_of_notes() if description else None
            choice: dict[str, Any] = {"vmstate": vmstate, "exclude": exclude, "force": force, "journal": journal}
            common = {
                **choice,
                "replace": replace,
                "dry_run": dry_run,
                "watch": watch,
                "store": self._store,
            }
            not_live = await self._why_not_live(live, tag, **choice)
            result = None
            if live and not not_live:
                from qsnap.operations.live.save import do_live_save

                try:
                    result = await do_live_save(self._monitor, tag, **common)
                except QsnapError as error:
                    if live != "auto" or not error.undone:
                        raise
                    not_live = [_not_live(str(error))]
            if result is None:
                from qsnap.operations.save import do_savevm

                result = await do_savevm(
                    self._monitor, tag, safe_replace=safe_replace, alive=alive or prefix is not None, **common
                )
            graph = await self._dismiss_leftovers()
            if not dry_run:
                if place:
                    await self._write_down(place, result.tag, description=description)
                await self._write_down_trouble(result)
                if graph is not None:
                    await self._write_down_chains(graph, result)
                await self._write_down_state_dir(result)
        return msgspec.structs.replace(result, description=description, warnings=(*result.warnings, *not_live))

    async def _next_of_series(self, prefix: str) -> str:
        from qsnap.model.qemu import series_tag
        from qsnap.operations.prune import check_prefix
        from qsnap.operations.save import free_automatic_tag

        check_prefix(prefix)
        return free_automatic_tag(await self._monitor.block_graph(), lambda now: series_tag(prefix, now))

    async def _why_not_live(
        self,
        live: bool | Literal["auto"],
        tag: str | None,
        **choice: Any,  # noqa: ANN401 (of do_live_save)
    ) -> Sequence[Finding]:
        """Why a save that was to be live is to be made the ordinary way; nothing where it is live, or was not to be."""
        if not live:
            return ()
        why = ""
        if await self._monitor.runstate() is not RunState.RUNNING:
            why = "the guest does not run, so nothing is gained by a live save"
        elif live == "auto":
            from qsnap.operations.live.save import plan_live

            try:
                await plan_live(self._monitor, tag, store=self._store, **choice)
            except (NotSupported, PrecheckRefused, CommandFailed, JobFailed) as error:
                why = str(error)
        return [_not_live(why)] if why else ()

    async def load(
        self, tag: str, *, running: bool | None = None, exclude: Collection[str] = (), force: bool = False
    ) -> LoadResult:
        """Put RAM, device state and disks back: see :func:`qsnap.operations.load.do_loadvm`.

        :raise VMLocked: another qsnap is at work on this VM.
        """

        from qsnap.operations.load import do_loadvm

        async with self._claimed("load", (tag,)) as journal:
            self._warn_of_unseen_files_of((tag,), await self._tidied())
            return await do_loadvm(
                self._monitor, tag, store=self._store, running=running, exclude=exclude, force=force, journal=journal
            )

    async def delete(self, *tags: str, missing_ok: bool = False, ignore_unseen: bool = False) -> DeleteResult:
        """Delete snapshots from every device that holds them: see :func:`qsnap.operations.delete.do_delvm`.

        :param ignore_unseen: what cannot be seen from here does not matter, as with the same word of :func:`connect`.
        :raise VMLocked: another qsnap is at work on this VM.
        """

        from qsnap.operations.delete import do_delvm
        from qsnap.operations.removal import Look

        store = self._store.ignoring_unseen() if ignore_unseen else self._store
        async with self._claimed("delete", tags) as journal:
            graph = await self._tidied()
            self._warn_of_unseen_files_of(tags, graph)
            look = Look(self._monitor, store, graph)
            try:
                return await do_delvm(
                    self._monitor, tags, store=store, missing_ok=missing_ok, journal=journal, look=look
                )
            finally:
                await self._forget_notes()

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

        :raise VMLocked: another qsnap is at work on this VM.
        """
        from qsnap.operations.prune import do_prune

        async with self._claimed("delete", (f"{prefix}-*",), is_dry=dry_run) as journal:
            if not dry_run:
                await self._dismiss_leftovers()
            try:
                result = await do_prune(
                    self._monitor,
                    prefix,
                    policy,
                    store=self._store,
                    allow_remove_all=allow_remove_all,
                    dry_run=dry_run,
                    pending=pending,
                    journal=journal,
                )
                if result.other_series:
                    others = ", ".join(result.other_series)
                    self.remarks.append(f"there is no series {prefix!r}, so nothing was pruned; there is {others}")
                return result
            finally:
                if not dry_run:
                    await self._forget_notes()

    async def note(
        self, *tags: str, protected: bool | None = None, description: str | None = None
    ) -> tuple[Snapshot, ...]:
        """Protect snapshots, or describe them: see :mod:`qsnap.inventory.notes`. The guest is not touched.

        :param protected: whether they are from now on; None leaves that as it is.
        :param description: one line, "" for none; None leaves that as it is.
        :return: them, as they are now.
        :raise SnapshotNotFound: there is no such snapshot; nothing was written down.
        :raise NotSupported: the image cannot be seen from here.
        :raise VMLocked: another qsnap is at work on this VM.
        """
        from qsnap.inventory import kept
        from qsnap.inventory.notes import Notes, checked_description

        if description is not None:
            checked_description(description)
        async with self._claimed("note", tags):
            graph = await self._monitor.block_graph()
            devices = self._devices_of(graph)
            found = snapshots.snapshots(graph, devices, self._store.files(graph, devices))
            chosen = [one for one in found if one.tag in tags]
            if missing := [tag for tag in tags if tag not in {one.tag for one in chosen}]:
                raise snapshots.not_found(graph, devices, missing[0])
            notes = Notes(self._store, graph, devices)
            changes = {"protected": protected, "description": description}
            given = {name: value for name, value in changes.items() if value is not None}
            changed = [msgspec.structs.replace(notes.of(one), **given) for one in chosen]
            place = await self._place_of_notes()
            await kept.protect(self._monitor, changed, place)
            notes.write(place, changed, found)
            if protected is False:
                await kept.unprotect(self._monitor, chosen)
            await kept.mirror(self._monitor, notes, graph, devices)
            return notes.added_to(chosen)

    async def _forget_notes(self) -> None:
        """Leave out the notes of snapshots that are gone. They do no harm, so an error is none."""
        from qsnap.inventory.kept import mirror
        from qsnap.inventory.notes import Notes

        with suppress(QsnapError):
            graph = await self._monitor.block_graph()
            devices = self._devices_of(graph)
            notes = Notes(self._store, graph, devices)
            notes.forget(snapshots.snapshots(graph, devices, self._store.files(graph, devices)))
            await mirror(self._monitor, notes, graph, devices)

    async def _place_of_notes(self) -> Path:
        """The file for notes; see :func:`qsnap.inventory.notes.place`."""
        from qsnap.inventory.notes import place

        graph = await self._monitor.block_graph()
        survey = rules.survey(graph, chooses_devices=self._monitor.chooses_devices)
        node = survey.vmstate or next((d.image for d in survey.devices if d.image), None)
        if node is None:
            raise NotSupported("no device of this VM can have snapshots, so there is no place for notes")
        return place(self._store, graph, survey.devices, node)

    async def _write_down_trouble(self, saved: SaveResult) -> None:
        """Note the run state of a guest that could not go on from what was just saved; a remark where that fails."""
        from qsnap.model.runstates import trouble_of

        if trouble_of(saved.runstate, self._monitor.version):
            try:
                await self._write_down(await self._place_of_notes(), saved.tag, runstate=str(saved.runstate))
            except QsnapError as error:
                self.remarks.append(f"nothing will tell later that the guest was {saved.runstate}: {error}")

    async def _write_down_chains(self, graph: BlockGraph, saved: SaveResult) -> None:
        """Note what the disks of a new snapshot stand on, so that a load notices if that is gone.

        Where it cannot be written down, the snapshot is as good without.
        """
        if chains := snapshots.chains(graph, saved.devices):
            with suppress(QsnapError):
                await self._write_down(await self._place_of_notes(), saved.tag, chains=chains)

    async def _write_down(self, place: Path, tag: str, **what: object) -> None:
        """Write down something about a snapshot that was just saved: see :class:`qsnap.inventory.notes.Note`."""
        from qsnap.inventory.notes import Notes

        graph = await self._monitor.block_graph()
        devices = self._devices_of(graph)
        files = self._store.files(graph, devices)
        found = snapshots.snapshots(graph, devices, files)
        saved = snapshots.find(graph, devices, tag, files)
        if saved is None:
            raise QsnapError(f"snapshot {tag!r} was saved, and deleted by another client at once")
        try:
            notes = Notes(self._store, graph, devices)
            notes.write(place, [msgspec.structs.replace(notes.of(saved), **what)], found)
        except QsnapError as error:
            raise QsnapError(f"snapshot {tag!r} was saved, but not its {', '.join(what)}: {error}") from error

    async def _write_down_state_dir(self, saved: SaveResult) -> None:
        """Write down beside the image where a live save has put its state file, if it is elsewhere.

        So that who does not know of the directory does not take it for a snapshot of disks alone. It is a help: where
        no notes can be made, it is left out.
        """
        state_dir = self._store.state_dir
        if state_dir is None or saved.file is None:
            return
        with suppress(QsnapError):
            place = await self._place_of_notes()
            if place.parent != state_dir:
                await self._write_down(place, saved.tag, state_dir=str(state_dir))

    async def recover(self, *, force: bool = False) -> tuple[Recovered, ...]:
        """See runs through that died on this VM: resume the guest, remove what they left half made.

        Every other method but :meth:`status` does that too, before its own work.

        :param force: also one of another machine or container, where it cannot be told whether it is dead.
        :return: what was done; nothing where nothing was left to do.
        :raise VMLocked: a run is at work on this VM.
        """
        from qsnap.supervision.claim import recover_all

        done = await recover_all(self._monitor, self.address, force=force)
        await self._dismiss_leftovers()
        return tuple(done)

    async def list(self) -> tuple[Snapshot, ...]:
        """All snapshots, oldest first; those on some devices only and those that others made too."""
        await self._recover_if_seen()
        graph = await self._monitor.block_graph()
        devices = self._devices_of(graph)
        found = await self._noted(
            graph, devices, snapshots.snapshots(graph, devices, self._store.files(graph, devices))
        )
        self._warn_of_files_left(graph, devices, found)
        self._warn_of_unseen_files(graph, devices, found)
        self._tell_of_backing(graph, devices)
        return found

    async def show(self, tag: str) -> tuple[Snapshot, dict[str, tuple[NodeSnapshot, ...]]]:
        """One snapshot, and its rows in the snapshot table of each node that holds it.

        :raise SnapshotNotFound: no device holds it.
        """
        await self._recover_if_seen()
        graph = await self._monitor.block_graph()
        devices = self._devices_of(graph)
        snapshot = snapshots.find(graph, devices, tag, self._store.files(graph, devices))
        if snapshot is None:
            raise snapshots.not_found(graph, devices, tag)
        (snapshot,) = await self._noted(graph, devices, [snapshot])
        self._warn_of_files_left(graph, devices, [snapshot])
        self._warn_of_unseen_files(graph, devices, [snapshot])
        return snapshot, {name: graph.nodes[name].tagged(snapshot.disk_tag) for name in snapshot.devices}

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
        from qsnap.operations.plan import plan_save

        await self._recover_if_seen()
        return (await plan_save(self._monitor, tag, vmstate=vmstate, exclude=exclude, force=force)).report

    async def check_load(self, tag: str, *, exclude: Collection[str] = ()) -> Snapshot:
        """Run the pre-checks of a load alone: see :func:`qsnap.operations.plan.plan_load`. The guest is not touched.

        :return: what would be loaded.
        """
        from qsnap.operations.plan import plan_load

        await self._recover_if_seen()
        return (await plan_load(self._monitor, tag, store=self._store, exclude=exclude)).snapshot

    async def status(self) -> Status:
        """The guest, and what an earlier qsnap has left behind on it. Changes nothing."""
        monitor = self._monitor
        from qsnap.model.runstates import trouble_of
        from qsnap.supervision.claim import run_of

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
            trouble=trouble_of(runstate, monitor.version),
            monitor=str(self.address),
            transport=monitor.transport,
            snapshots=len(snapshots.snapshots(graph, survey.devices, self._store.files(graph, survey.devices))),
            vmstate=survey.vmstate,
            devices=survey.devices,
            leftover_jobs=tuple(leftovers),
            run=await run_of(monitor),
            is_half_restored=half_restored is not None,
            in_backing=snapshots.in_backing(graph, survey.devices),
        )

    def _tell_of_backing(self, graph: BlockGraph, devices: Sequence[Device]) -> None:
        """Say so where snapshots are out of reach below an overlay."""
        tags: dict[tuple[str, str], list[str]] = {}
        for one in snapshots.in_backing(graph, devices):
            tags.setdefault((one.image, one.device), []).append(one.tag)
        self.remarks += (
            f"the backing image {image} of {device} holds {', '.join(names)}: out of reach until the overlay is "
            "committed (block-commit)"
            for (image, device), names in tags.items()
        )

    def _warn_of_files_left(self, graph: BlockGraph, devices: Sequence[Device], found: Iterable[Snapshot]) -> None:
        """Say so where what looks like disks alone has its RAM in a file beside the former name of an image."""
        for snapshot in found:
            if snapshot.kind is Kind.DISK_ONLY and (left := self._store.left_behind(graph, devices, snapshot.disk_tag)):
                self.remarks.append(left.sentence(f"{snapshot.tag!r} is a live snapshot, and its state file"))

    def _warn_of_unseen_files(self, graph: BlockGraph, devices: Sequence[Device], found: Iterable[Snapshot]) -> None:
        """Say so where what looks like disks alone may have its RAM in a file that cannot be seen from here."""
        tags = [snapshot.tag for snapshot in found if snapshot.kind is Kind.DISK_ONLY]
        if tags and not self._store.ignores_unseen and (places := self._store.unseen(graph, devices)):
            self.remarks.append(
                f"it cannot be seen from here what lies at {', '.join(places)}: there may be the RAM of live snapshots "
                f"({', '.join(tags)})"
            )

    def _warn_of_unseen_files_of(self, tags: Collection[str], graph: BlockGraph) -> None:
        """The same before something is done with these *tags*."""
        devices = self._devices_of(graph)
        found = snapshots.snapshots(graph, devices, self._store.files(graph, devices))
        self._warn_of_unseen_files(graph, devices, [snapshot for snapshot in found if snapshot.tag in tags])

    async def _noted(
        self, graph: BlockGraph, devices: Sequence[Device], found: Sequence[Snapshot]
    ) -> tuple[Snapshot, ...]:
        """These snapshots, with what is written down about them as far as that can be seen from here."""
        if not found:
            return ()
        from qsnap.inventory.kept import kept
        from qsnap.inventory.notes import Notes

        marks = await kept(self._monitor)
        try:
            notes = Notes(self._store, graph, devices)
            found = notes.added_to(found)
            self.remarks += (left.sentence("a file with notes") for left in notes.left)
            if (
                notes.unseen
                and not notes.left
                and not self._store.ignores_unseen
                and not marks.tells_all(graph, devices)
            ):
                self.remarks.append(
                    "it cannot be seen from here which snapshots are protected: notes of this VM may lie at "
                    f"{', '.join(notes.unseen)}"
                )
        except QsnapError as error:
            self.remarks.append(str(error))
        return tuple(msgspec.structs.replace(one, protected=True) if marks.protects(one) else one for one in found)

    def _devices_of(self, graph: BlockGraph) -> Sequence[Device]:
        return rules.survey(graph, chooses_devices=self._monitor.chooses_devices).devices

    @asynccontextmanager
    async def _claimed(self, operation: str, tags: tuple[str, ...], *, is_dry: bool = False) -> AsyncIterator[Journal]:
        for tag in tags:
            try:
                tag.encode()
            except UnicodeEncodeError:
                raise BadUsage(f"the tag {tag!r} is not valid UTF-8") from None
        if is_dry:
            from qsnap.runs.journal import Journal

            yield Journal()
            return
        from qsnap.runs.journal import AFTERMATH_TIMEOUT_S
        from qsnap.supervision.claim import claimed

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
        from qsnap.runs.mark import CLAIM
        from qsnap.supervision.claim import has_journals, recover_all

        if has_journals(self._monitor, self.address) or await self._monitor.mark(CLAIM) is not None:
            # It lives, or somebody else is at it already
            with suppress(VMLocked):
                self.recovered += await recover_all(self._monitor, self.address)

    async def _tidied(self) -> BlockGraph:
        """The block nodes, once what earlier runs have left is gone."""
        return await self._dismiss_leftovers() or await self._monitor.block_graph()

    async def _dismiss_leftovers(self) -> BlockGraph | None:
        # Housekeeping: where QEMU will not hear of jobs (-preconfig), the pre-checks say so better.
        with suppress(CommandFailed):
            await self._monitor.dismiss(await self._monitor.leftover_jobs())
            graph = await self._monitor.block_graph()
            devices = self._devices_of(graph)
            self._store.remove_parts(graph, devices)
            await self._mirror_notes(graph, devices)
            return graph
        return None

    async def _mirror_notes(self, graph: BlockGraph, devices: Sequence[Device]) -> None:
        """Have QEMU show to everybody what is protected, as far as that can be seen from here."""
        from qsnap.inventory.kept import mirror
        from qsnap.inventory.notes import Notes

        try:
            notes = Notes(self._store, graph, devices)
        except QsnapError:
            return  # damaged: who is about to delete something is told
        await mirror(self._monitor, notes, graph, devices)


def _not_live(why: str) -> Finding:
    return Finding(code="not-live", severity=Severity.WARN, message=f"saved the ordinary way: {why}")


def _positive(what: str, value: float | None) -> float | None:
    """*value*, if it can be a number of seconds or is None.

    :raise BadUsage: it is not above 0.
    """
    if value is not None and not value > 0:
        raise BadUsage(f"{what} must be above 0, not {value:g}")
    return value


async def _opened(where: Address, greeting_s: float, lock_wait_s: float, snapshot_jobs: bool | None) -> Monitor:
    """The monitor, once no other qsnap holds it."""
    from qsnap.supervision.claim import wait_for_monitor

    if not lock_wait_s >= 0:  # nor is it if that is no number
        raise BadUsage(f"the time to wait for another qsnap must not be below 0, as {lock_wait_s:g} is")
    deadline = asyncio.get_running_loop().time() + lock_wait_s
    while True:
        await wait_for_monitor(where, deadline, lock_wait_s)
        left_s = deadline - asyncio.get_running_loop().time()
        try:
            return await open_monitor(where, timeout_s=max(greeting_s, left_s), snapshot_jobs=snapshot_jobs)
        except MonitorBusy as busy:
            from qsnap.targets import explained

            # Of two who began at once, the other may be another qsnap: by now that shows
            if not await wait_for_monitor(where, deadline, lock_wait_s):
                raise explained(busy, where) from busy


@asynccontextmanager
async def connect(
    address: str | Address,
    *,
    timeout_s: float | None = None,
    lock_wait_s: float = LOCK_WAIT_S,
    snapshot_jobs: bool | None = None,
    state_dir: str | Path | None = None,
    ignore_unseen: bool = False,
) -> AsyncIterator[VM]:
    """Connect to the monitor of a running QEMU, for the duration of a block.

    :param address: a path, ``unix:PATH``, ``tcp:HOST:PORT``, or QEMU's own argument pasted whole.
    :param timeout_s: seconds for the whole block, None for no bound. What is under way then is ended as by an
        interrupt: the guest is resumed, nothing half made is left. The greeting has its own bound of 5 s. Where
        QEMU does not answer for 10 s after that, the rest is left to the guard.
    :param lock_wait_s: seconds to wait for another qsnap that is at work on this VM; 0 refuses at once.
    :param snapshot_jobs: False goes by HMP's savevm inside QMP also where QEMU has snapshot jobs.
    :param state_dir: where the state files of live saves lie. Default: beside the images; they are looked for there
        in any case.
    :param ignore_unseen: delete, prune and replace also where there may be notes that protect a snapshot, or a state
        file that belongs to it, which cannot be seen from here (over TCP, as another user). Default: that is refused.
    :raise BadUsage: *address* cannot be meant.
    :raise ConnectError: nothing listens there, or it may not be opened.
    :raise MonitorBusy: another client holds it, or QEMU does not answer.
    :raise VMLocked: that client is another qsnap.
    :raise OperationTimeout: *timeout_s* have passed.
    """
    where = parse_address(address) if isinstance(address, str) else address
    _positive("the time-out", timeout_s)
    greeting_s = GREETING_TIMEOUT_S if timeout_s is None else min(timeout_s, GREETING_TIMEOUT_S)
    clock = asyncio.get_running_loop().time
    deadline = None if timeout_s is None else clock() + timeout_s
    patience_s = lock_wait_s if timeout_s is None else min(lock_wait_s, timeout_s)
    monitor = await _opened(where, greeting_s, patience_s, snapshot_jobs)
    timer = asyncio.timeout_at(deadline)
    try:
        async with timer:
            yield VM(
                monitor,
                where,
                lock_wait_s=lock_wait_s,
                is_timed=timeout_s is not None,
                state_dir=None if state_dir is None else Path(state_dir),
                ignore_unseen=ignore_unseen,
            )
    except TimeoutError as error:
        if not timer.expired():
            raise  # the caller's own
        notes = getattr(error.__cause__, "__notes__", ())
        raise OperationTimeout("; ".join((f"not done within {timeout_s:g} s", *notes))) from error
    finally:
        await monitor.aclose()
