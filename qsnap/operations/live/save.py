"""Live save: the guest stands still for some milliseconds, and its RAM is written while it runs.

The order of things, so that nothing that the user had is ever lost: the new snapshot is made under a tag that the disks
do not have yet, its state file under a name that does not count; when all of it is on the disk the file gets its name,
and with that the snapshot exists. Only then the older one goes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from qsnap.errors import (
    GuestLeftStopped,
    JobFailed,
    MonitorError,
    MonitorLost,
    NotSupported,
    PrecheckRefused,
    QsnapError,
    SnapshotExists,
    VerifyFailed,
)
from qsnap.host import files, processes
from qsnap.inventory import block_jobs, snapshots, state_file
from qsnap.inventory import state_part as parts
from qsnap.inventory.state_store import PART_SUFFIX, read
from qsnap.model.checks import Device, Finding, Severity
from qsnap.model.qemu import BlockGraph, RunState
from qsnap.model.requests import OnExists, SaveRequest
from qsnap.model.results import SaveResult
from qsnap.model.snapshots import StateFile
from qsnap.monitor import Monitor
from qsnap.monitor.qmp.background import Background
from qsnap.operations.delete import delete_all, delete_everywhere, delete_replaced
from qsnap.operations.live.freeze import FreezeBefore9, FreezeSince9
from qsnap.operations.plan import SavePlan, plan_save
from qsnap.operations.progress import Watcher
from qsnap.operations.removal import refuse_removal
from qsnap.operations.save import explain, save_result, unchanged
from qsnap.operations.together import note_group
from qsnap.operations.writers import other_writers
from qsnap.runs.group import Point
from qsnap.runs.journal import Journal
from qsnap.runs.pause import has_ended, reconnect
from qsnap.runs.record import LiveWork
from qsnap.runs.run import Run
from qsnap.tags import free_automatic_tag

#: More than QEMU writes before there is any RAM in the stream: the names of devices and of blocks of RAM.
_SETUP_BYTES = 1 << 20
_PLACE_CURE = "choose another directory: --state-dir DIR"
#: What makes a live save possible, by words of QEMU's refusal (migration/options.c: migrate_caps_check).
_CURES = {
    "host kernel": "QEMU may not use userfaultfd with write protection here. It needs Linux 5.7 or later, and to be "
    "run as root, with CAP_SYS_PTRACE, or after `sysctl vm.unprivileged_userfaultfd=1`",
    "guest memory": "Start the guest with memory that is not in a file on a disk: ordinary memory, or, from Linux 5.19 "
    "on, shared memory (memory-backend-memfd, /dev/shm) or hugepages",
    "not compatible with": "Switch that capability off: migrate_set_capability NAME off",
    "tls-creds": 'Unset that parameter: migrate_set_parameter tls-creds ""',
}


class LivePlan(NamedTuple):
    """The plan of a live save.

    :ivar request: what was asked for.
    :ivar tag: the user's tag.
    :ivar new: the name under which the devices will hold the snapshot, and what it replaces.
    :ivar path: the path of its state file.
    """

    request: SaveRequest
    save: SavePlan
    tag: str
    new: snapshots.NewName
    path: Path

    @property
    def part(self) -> Path:
        """The state file's path until it is complete."""
        return self.path.with_suffix(PART_SUFFIX)


async def plan_live(run: Run, request: SaveRequest) -> LivePlan:
    """Find out whether the guest can be saved live, and how. QEMU's capability is tried, and put back.

    The journal holds what was set before.

    :raise NotSupported: this QEMU, its kernel, its memory or its monitor cannot do it.
    :raise PrecheckRefused: a save is not possible at all, or there is no place for the state file.
    """
    if run.monitor.live_obstacle:
        raise NotSupported(f"a live save is not possible: {run.monitor.live_obstacle}")
    background = run.monitor.live
    save = await plan_save(run, request, state_elsewhere=True)
    save.refuse_if_needed()
    if obstacle := block_jobs.live_obstacle(save.inventory.graph, save.report.devices):
        raise NotSupported(f"a live save is not possible {obstacle}; or save the ordinary way: --no-live")
    run.journal.note(settings=await background.settings())
    if reason := await background.refused():
        cure = next((cure for words, cure in _CURES.items() if words in reason), "")
        raise NotSupported(f"a live save is not possible: {reason}{'. ' if cure else ''}{cure}")
    inventory = save.inventory
    await _refuse_other_writers(run.monitor, inventory.graph)
    tag = request.tag if request.tag is not None else free_automatic_tag(inventory.graph)
    new = inventory.new_name(tag, keeps_older=True)
    path = run.store.path_for(inventory.graph, save.vmstate, new.disk_tag)
    taken = os.path.lexists(path) and str(path) not in (file.path for file in inventory.files)  # noqa: ASYNC240
    findings = (*save.report.findings, *await _place_findings(run.monitor, path, request.force, is_taken=taken))
    if any(finding.refuses for finding in findings):
        raise PrecheckRefused("the guest cannot be saved live now", findings)
    return LivePlan(request, save, tag, new, path)


async def _refuse_other_writers(monitor: Monitor, graph: BlockGraph) -> None:
    """Refuse where RAM would change behind QEMU's back while it is saved.

    :raise NotSupported: a device has RAM written from outside, or another process has it mapped, or may have.
    """
    try:
        writers = await other_writers(monitor, graph.peripherals)
    except OSError:
        raise NotSupported(
            "a live save is not possible: the guest's memory is shared, and from here it cannot be seen whether "
            "another process has it mapped; as root it can, or as the user of QEMU"
        ) from None
    if writers:
        raise NotSupported(
            f"a live save is not possible: {', '.join(writers)} may write into the guest's memory while it is saved, "
            "and QEMU does not notice that. Save it the ordinary way: --no-live"
        )


async def _place_findings(monitor: Monitor, path: Path, force: bool, *, is_taken: bool) -> Sequence[Finding]:
    """Findings about the place of the state file.

    :param is_taken: a file is there that is no state file of this VM.
    """
    directory = path.parent
    cure = _PLACE_CURE
    if is_taken:
        message = f"the state file would be {path}, and what is there is not a state file of this VM"
        cure = f"choose another tag, or {_PLACE_CURE.removeprefix('choose ')}"
        return [Finding.refusal("state-file-taken", message, cure)]
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        why = "cannot be written" if directory.is_dir() else "is not there"
        message = f"the state file cannot be put into {directory}: it {why}"
        return [Finding.refusal("state-dir", message, cure)]
    needed = await monitor.memory_size() + processes.OVERHEAD_BYTES
    free, _ = processes.free_bytes(directory)
    if free >= needed:
        return []
    message = f"{directory}: little room: the state of all RAM takes up to {needed:,} bytes, and {free:,} are free"
    severity = Severity.WARN if force else Severity.REFUSE
    return [
        Finding(code="no-room", severity=severity, message=message, cure=f"make room, or {cure}; --force tries anyway")
    ]


async def do_live_save(run: Run, plan: LivePlan, watch: Watcher | None = None) -> SaveResult:
    """Save a running guest under one tag, and stop it for some milliseconds only.

    RAM and device state go into a state file (:class:`qsnap.model.snapshots.StateFile`), the disks' snapshots into
    their images. An older snapshot of that tag is deleted when the new one is complete. The migration capability and
    the bandwidth that this needs are put back as they were.

    :param plan: made in the same run.
    :param watch: called every 0.1 s while QEMU writes, with the bytes of RAM that are written and the total.
    :return: the snapshot as read back.
    :raise PrecheckRefused: the older snapshot is protected, or the state file cannot be made; the guest was not
        touched.
    :raise SnapshotExists: the tag exists, and the request refuses to replace it; nothing has changed.
    :raise JobFailed: QEMU reported an error. The guest runs, nothing of the new snapshot is left, and the older one
        is as it was. The same holds after an interrupt.
    :raise VerifyFailed: the new snapshot is not as it should be; otherwise as for JobFailed.
    :raise GuestLeftStopped: the guest could not be resumed; the first error is the context.
    """
    began = time.monotonic()
    monitor, journal, background = run.monitor, run.journal, run.monitor.live
    inventory, report = plan.save.inventory, plan.save.report
    if plan.new.older.exists and plan.request.on_exists is OnExists.REFUSE:
        raise SnapshotExists(plan.tag, (*inventory.displayed(plan.new.older.nodes), *plan.new.older.files))
    await refuse_removal(run, inventory, (plan.tag,), "saved")
    await journal.meet(Point.CHECKED)
    if plan.request.dry_run:
        return save_result(plan.save, plan.tag, plan.new.older.exists, began, dry_run=True, is_live=True)

    await journal.armed()
    await delete_all(monitor, report.devices, plan.new.spare.tags, plan.new.spare.files)
    # Look up paths before the new file exists: images are recognised by content too (qsnap.inventory.descriptors).
    identity = run.store.identity(inventory.graph, plan.save.vmstate)
    file = await _begun(run, plan)
    attempt = LiveSaveAttempt(monitor, journal, report.devices, file)
    images = [path for node in report.saved if (path := run.store.image(inventory.graph, node))]

    async def snapshot_disks() -> None:
        await background.snapshot_disks(plan.new.disk_tag, report.roots)

    try:
        kind = FreezeBefore9 if background.is_before_9 else FreezeSince9
        with closing(
            kind(run, file, snapshot_disks=snapshot_disks, forget_disks=attempt.forget_disks, images=images)
        ) as freeze:
            await background.prepare()
            pause = await freeze.freeze()
            # An earlier change is still visible here; looking sooner would lengthen the pause.
            await unchanged(run, plan.request, plan.save)
            await freeze.wait_until_written(watch)
            content = await attempt.content(freeze.stream_size, identity)
        await run.shielded(asyncio.to_thread(_complete, file, plan, content))
        noted = await note_group(run, plan.tag, content)
        await journal.decide()
        found, left = await run.shielded(attempt.conclude())
    except BaseException as failure:
        await run.shielded(attempt.clear_up(failure))
        raise
    finally:
        os.close(file)
    return save_result(
        plan.save, plan.tag, plan.new.older.exists, began, pause=pause, is_live=True, file=found, left=(*noted, *left)
    )


async def _reserved(monitor: Monitor, background: Background) -> int:
    """Bytes to reserve on the file system: what QEMU needs to set the stream up, because it must not fail until
    then; before QEMU 9.0 all that it can need, because there it must not fail at all. A page of RAM takes 9
    bytes more in the stream."""
    if not background.is_before_9:
        return state_file.STREAM_OFFSET + _SETUP_BYTES
    ram_bytes = await monitor.memory_size()
    return ram_bytes + ram_bytes // 256 + processes.OVERHEAD_BYTES


async def _begun(run: Run, plan: LivePlan) -> int:
    """Write down what will be made, and create the state file, open and locked.

    :raise PrecheckRefused: it cannot be made; the guest was not touched.
    """
    journal, vmstate = run.journal, plan.save.vmstate
    work = LiveWork(
        disk_tag=plan.new.disk_tag,
        vmstate=vmstate,
        devices=plan.save.report.saved,
        older=plan.new.older.tags,
        older_files=plan.new.older.files,
        path=str(plan.path),
        part=str(plan.part),
    )
    journal.note(tags=(plan.tag,), work=work)
    file = None
    try:
        image = run.store.image(plan.save.inventory.graph, vmstate)
        file = _created(plan.part, image, await _reserved(run.monitor, run.monitor.live))
        journal.advance(made=files.identity(file))
    except QsnapError as error:
        if file is not None:
            parts.remove(plan.part, plan.path, files.identity(file), file=file)
            os.close(file)
        journal.done(work=None)
        error.undone = True
        raise
    return file


def _created(part: Path, image: Path | None, reserved: int) -> int:
    """The state file to be: see :func:`qsnap.inventory.state_part.create`.

    :raise PrecheckRefused: it cannot be made; the guest was not touched.
    """
    try:
        return parts.create(part, image, reserved)
    except OSError as error:
        finding = Finding.refusal("state-file", f"the state file {part} cannot be made: {error.strerror}", _PLACE_CURE)
        raise PrecheckRefused("the guest cannot be saved live now", [finding]) from error


def _complete(file: int, plan: LivePlan, content: state_file.Content) -> None:
    """Write the image around the stream, and give it its name when all of it is on the disk.

    :raise JobFailed: it cannot be written.
    """
    path, size = plan.path, state_file.file_size(content.vm_state_size)
    try:
        parts.complete(file, plan.part, path, size, state_file.envelope(content))
    except FileExistsError as error:
        raise JobFailed("rename", f"another file has come to be at {path} meanwhile; it is as it was") from error
    except OSError as error:
        raise JobFailed("write", f"the state file {path} cannot be written: {error.strerror}") from error


class LiveSaveAttempt:
    """How far a live save has come, and how it is undone or concluded: by itself, or by whoever clears up after it.

    All that this takes is in the record of its journal.

    :param file: the state file to be, open, where we have made it ourselves.
    """

    def __init__(self, monitor: Monitor, journal: Journal, devices: Sequence[Device], file: int | None = None) -> None:
        self._monitor = monitor
        self._journal = journal
        self._devices = devices
        assert isinstance(journal.record.work, LiveWork)
        self._work = journal.record.work
        (self._tag,) = journal.record.tags
        self._undone = False
        self._file = file

    async def forget_disks(self) -> None:
        """Take the disks' new snapshots away."""
        await delete_everywhere(self._monitor, self._devices, self._work.disk_tag)

    async def content(self, vm_state_size: int, image: Path) -> state_file.Content:
        """What the state file is to say, with the clock as the disks' snapshots have it.

        :raise VerifyFailed: those are not what they should be.
        """
        graph = await self._monitor.block_graph()
        tag, saved = self._work.disk_tag, self._work.devices
        rows = {node: graph.nodes[node].tagged(tag) if node in graph.nodes else () for node in saved}
        problems = [
            f"{node} holds it {len(found)} times instead of once" for node, found in rows.items() if len(found) != 1
        ]
        if not problems and len({found[0].vm_clock_ns for found in rows.values()}) != 1:
            problems.append("the disks have it of different moments")
        if problems:
            raise VerifyFailed(self._tag, problems)
        row = rows[self._work.vmstate if self._work.vmstate in rows else saved[0]][0]
        return state_file.Content(
            tag=tag, image=str(image), vm_state_size=vm_state_size, date=row.date, vm_clock_ns=row.vm_clock_ns
        )

    async def conclude(self) -> tuple[StateFile, Sequence[Finding]]:
        """Put QEMU's settings back, and delete what was replaced; the new snapshot is there.

        :return: it, and what is left of the older one.
        :raise VerifyFailed: it is not.
        """
        found = read(Path(self._work.path))
        if found is None or not found.is_whole:
            raise VerifyFailed(self._tag, [f"{self._work.path} is not a state file"])
        await self._put_back()
        older = [path for path in self._work.older_files if path != self._work.path]
        left = await delete_replaced(self._monitor, self._devices, self._work.older, older)
        self._journal.done(work=None)
        return found, left

    async def _put_back(self) -> None:
        background = self._monitor.live
        await background.tidy()
        await background.put_back(self._journal.record.settings)

    def _is_complete(self, graph: BlockGraph) -> bool:
        """Whether the new snapshot is there: a state file of its name, and of the moment of the disks' snapshots."""
        file = read(Path(self._work.path))
        if file is None or not file.is_whole or file.disk_tag != self._work.disk_tag:
            return False
        rows = [graph.nodes[node].tagged(file.disk_tag) for node in self._work.devices if node in graph.nodes]
        return bool(rows) and all(len(found) == 1 and found[0].vm_clock_ns == file.vm_clock_ns for found in rows)

    async def undo(self) -> str:
        """Leave nothing half made: conclude the save if its snapshot is complete, and else remove what there is of it.
        In a group it is complete when all have decided so.

        :return: what has become of it, in words.
        """
        await self._monitor.live.end_stream()
        parts.forget_name(Path(self._work.part), Path(self._work.path), self._work.made)
        graph = await self._monitor.block_graph()
        if self._journal.is_decided is not False and self._is_complete(graph):
            _, left = await self.conclude()
            return "; ".join(
                (f"the new snapshot {self._tag!r} was complete and is kept", *(one.message for one in left))
            )
        self.remove_part()
        await self.forget_disks()
        try:
            # Else the user's other snapshots could not be loaded
            await self._monitor.live.forget_failure()
        finally:
            await self._put_back()
        self._journal.done(work=None)
        self._undone = True
        replaced = self._work.older or self._work.older_files
        return "nothing of it is left" + (f"; the older snapshot {self._tag!r} is as it was" if replaced else "")

    def remove_part(self) -> None:
        """Remove the state file that is not complete: see :func:`qsnap.inventory.state_part.remove`."""
        parts.remove(Path(self._work.part), Path(self._work.path), self._work.made, file=self._file)

    async def clear_up(self, failure: BaseException) -> None:
        """Undo the save after *failure*, and say there how things stand.

        :raise GuestLeftStopped: the guest runs no more, as it has no room for its own writes either.
        :raise JobFailed: QEMU refused a command in the middle of it.
        """
        runstate = RunState.RUNNING
        try:
            await _reconnected(self._monitor, self._journal)
            outcome = await self.undo()
            runstate = await self._monitor.runstate()
            outcome += f"; the guest is {runstate}"
        except QsnapError as trouble:
            outcome = f"clearing up after it failed: {trouble}"
            if not isinstance(trouble, MonitorError):
                self._journal.done(work=None)
            elif await has_ended(self._journal):
                self._journal.done(work=None)
                self.remove_part()
                ended = "QEMU has ended; there is no guest any more"
                outcome = f"if its disks have snapshots of it: qsnap delete {self._tag}"
                outcome = outcome if ended in str(failure) else f"{ended}. {outcome}"
        if not isinstance(failure, GuestLeftStopped):
            explain(failure, outcome, runstate, undone=self._undone)


async def _reconnected(monitor: Monitor, journal: Journal) -> None:
    """See that there is a connection."""
    try:
        await monitor.runstate()
    except MonitorLost:
        await reconnect(monitor, journal)
