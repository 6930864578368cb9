"""Export: a directory from which the guest can be started elsewhere, as it was in a snapshot. The guest runs meanwhile.

What belongs to a snapshot does not change while it is there, and while the claim is held no qsnap deletes it. Another
client of QEMU could, so everything is looked at again at the end.

The directory is made under another name beside the final one, and renamed when all of it is on the disk.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from qsnap.errors import CommandFailed, NotSupported, PrecheckRefused, QsnapError, SnapshotNotFound, VerifyFailed
from qsnap.host import files, processes, trust
from qsnap.inventory import qcow2, stream, vm_state
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.qcow2 import Unreadable
from qsnap.inventory.vm_state import VmState
from qsnap.model.checks import Finding
from qsnap.model.qemu import NodeSnapshot
from qsnap.model.requests import ExportRequest
from qsnap.model.results import ExportResult
from qsnap.model.snapshots import Snapshot
from qsnap.monitor.connection import peer_user
from qsnap.operations.delta.load import refuse_flawed
from qsnap.operations.findings import chain_findings, elsewhere_findings, load_findings, no_machine
from qsnap.operations.portable import manifest
from qsnap.operations.portable.drives import Held, holdings
from qsnap.operations.portable.images import QemuImg
from qsnap.operations.portable.manifest import ExportedDisk, ExportedFile, Manifest
from qsnap.operations.progress import Phase, Progress, Watcher
from qsnap.operations.verify import flaws
from qsnap.runs.journal import AFTERMATH_TIMEOUT_S
from qsnap.runs.run import Run
from qsnap.runs.shield import in_thread, shielded
from qsnap.targets.command_line import qemu_arguments
from qsnap.targets.portable import FILES, Contents, HostFile, Portable, portable

_PIECE = 4 << 20
#: Bytes beside the disks, the state and the files: manifest, script, directories.
_OVERHEAD = 1 << 20


class _Qemu(NamedTuple):
    """How a QEMU was started.

    :ivar emulator: the words before its own arguments, and where it finds its firmware.
    :ivar cwd: its working directory.
    """

    emulator: tuple[str, ...]
    arguments: Sequence[str]
    cwd: Path


class _Plan(NamedTuple):
    """What an export will copy."""

    snapshot: Snapshot
    version: str
    machine: str
    qemu: _Qemu
    made: Portable
    drives: Sequence[Held]
    sizes: Sequence[int]
    warnings: Sequence[Finding]

    @property
    def size(self) -> int:
        """Bytes that the export takes at the most."""
        copied = (self.path(file).stat().st_size for file in self.made.files)
        return self.snapshot.vm_state_size + sum(self.sizes) + sum(copied) + _OVERHEAD

    def path(self, file: HostFile) -> Path:
        """Where a file of the command line is."""
        return self.qemu.cwd / file.path


async def do_export(run: Run, request: ExportRequest, watch: Watcher | None = None) -> ExportResult:
    """Copy a snapshot's disks, its VM state, and what QEMU was started with, to a new directory.

    The guest is not touched. The state is the stream itself, so that any QEMU can load it (``-incoming``). The
    directory has mode 0700, because the guest's memory is in it.

    :raise SnapshotNotFound: no device holds the tag, or one lacks it.
    :raise NotSupported: QEMU's command line cannot be seen from here, or there is no qemu-img.
    :raise PrecheckRefused: the directory exists, or there is too little room; or the guest cannot be started elsewhere:
        the message names each option and device for which it cannot. Nothing was made.
    :raise VerifyFailed: the snapshot was deleted or replaced by another client meanwhile; nothing is left.
    """
    began = time.monotonic()
    target = _target(Path(request.directory))
    qemu = _qemu(run)
    images = QemuImg(qemu.emulator)
    async with _opened(run, request) as (inventory, snapshot, state):
        plan = await _plan(run, request, inventory, snapshot, state, qemu, images)
        _refuse_without_room(plan, target, force=request.force)
        async with _directory(target) as part:
            report = _Report(watch, plan.size)
            try:
                written = await _written(part, plan, state, images, report)
            except QsnapError:
                await _refuse_changed(run, inventory, snapshot)  # which explains it better
                raise
            await _refuse_changed(run, inventory, snapshot)
            size = await in_thread(lambda _: _complete(part, target, written, plan))
    return ExportResult(
        tag=snapshot.tag,
        directory=str(target),
        size=size,
        vm_state_size=snapshot.vm_state_size,
        date=snapshot.date,
        machine=plan.machine,
        qemu_version=str(run.monitor.version),
        disks=tuple(disk.device for disk in written.disks),
        duration_ms=round((time.monotonic() - began) * 1000, 3),
        warnings=tuple(plan.warnings),
    )


# What is there


def _target(path: Path) -> Path:
    """The real path of the directory that is to be made.

    :raise PrecheckRefused: it exists, or its parent does not.
    """
    try:
        target = files.resolved(path.absolute().parent) / path.name
    except OSError as error:
        refusal = Finding.refusal("no-parent", f"{path.parent} cannot be used: {error.strerror}", "make it first")
        raise PrecheckRefused("nothing was exported", [refusal]) from error
    if os.path.lexists(target):
        refusal = Finding.refusal("exists", f"{target} exists", "choose another name, or remove it")
        raise PrecheckRefused("nothing was exported", [refusal])
    return target


def _qemu(run: Run) -> _Qemu:
    """How the QEMU behind the monitor was started.

    :raise NotSupported: that cannot be seen from here, or it is another user's.
    """
    pid = run.monitor.pid
    if pid is None:
        raise NotSupported("an export needs QEMU's command line, which cannot be seen over this monitor")
    try:
        user = trust.user_of(pid, peer_user(run.monitor.sock))
        argv = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError as error:
        raise NotSupported(f"QEMU's command line cannot be read: {error.strerror}") from error
    if not trust.is_believed(user):
        raise NotSupported(
            f"that QEMU belongs to user {user}, whose command line may name any file of this machine: run the export "
            "as that user"
        )
    exe, cwd = "", Path("/")
    with suppress(OSError):
        exe = str(Path(f"/proc/{pid}/exe").readlink()).removesuffix(" (deleted)")
    with suppress(OSError):
        cwd = Path(f"/proc/{pid}/cwd").readlink()
    arguments = qemu_arguments(argv, exe)
    if arguments is None:
        raise NotSupported(f"process {pid}, which answers at the monitor, is not QEMU but something before it")
    emulator = argv[: len(argv) - len(arguments)]
    if len(emulator) == 1 and exe:
        emulator = [exe]
    firmware = (word for at, word in enumerate(arguments) if "-L" in (word, *arguments[at - 1 : at]))
    return _Qemu((*emulator, *firmware), arguments, cwd)


async def _refuse_changed(run: Run, inventory: Inventory, snapshot: Snapshot) -> None:
    """:raise VerifyFailed: the snapshot is not what it was in *inventory* any more."""
    again = await run.look()
    if again.find(snapshot.tag) != snapshot or _rows(again, snapshot) != _rows(inventory, snapshot):
        raise VerifyFailed(snapshot.tag, ["another client has changed it during the export"], "nothing is left of that")


def _rows(inventory: Inventory, snapshot: Snapshot) -> list[tuple[NodeSnapshot, ...]]:
    """The rows of a snapshot in the tables of its devices."""
    nodes = inventory.graph.nodes
    return [nodes[name].tagged(snapshot.disk_tag) for name in snapshot.devices if name in nodes]


@asynccontextmanager
async def _opened(run: Run, request: ExportRequest) -> AsyncIterator[tuple[Inventory, Snapshot, VmState]]:
    """The snapshot, and its VM state, open for the duration of a block.

    :raise SnapshotNotFound: no device holds the tag, or one lacks it.
    :raise PrecheckRefused: it is not whole, or its state cannot be read from here.
    """
    tag = request.tag
    try:
        inventory = await run.look()
    except CommandFailed as error:
        raise PrecheckRefused(f"snapshot {tag!r} cannot be exported now", [no_machine(error)]) from error
    snapshot = inventory.find(tag)
    if snapshot is None:
        raise inventory.not_found(tag)
    findings = [*elsewhere_findings(inventory, snapshot)]
    if not findings and snapshot.missing:
        lacking = ", ".join(inventory.displayed(snapshot.missing))
        reason = f"snapshot {tag!r} is partial: {lacking} lacks it, so no guest can be started from it"
        raise SnapshotNotFound(tag, reason)
    findings += load_findings(inventory, snapshot, snapshot.devices)
    if not request.force:
        findings += chain_findings(inventory, snapshot, snapshot.devices)
    if any(finding.refuses for finding in findings):
        raise PrecheckRefused(f"snapshot {tag!r} cannot be exported", findings)
    with _readable(tag):
        state = await asyncio.to_thread(_open_state, run, inventory, snapshot)
    try:
        yield inventory, snapshot, state
    finally:
        state.close()


def _open_state(run: Run, inventory: Inventory, snapshot: Snapshot) -> VmState:
    """The VM state of a snapshot, open.

    :raise PrecheckRefused: its state file is damaged.
    :raise Unreadable: it cannot be seen from here.
    :raise OSError: it cannot be opened.
    """
    if snapshot.file is None:
        return vm_state.of_snapshot(snapshot, vm_state.place(run.monitor.pid, inventory.graph, snapshot))
    file = files.opened(Path(snapshot.file.path))
    try:
        refuse_flawed(file, snapshot)
        return vm_state.of_snapshot(snapshot, file)
    finally:
        os.close(file)


@contextmanager
def _readable(tag: str) -> Iterator[None]:
    """Turn what keeps a VM state from being read into a refusal."""
    try:
        yield
    except (Unreadable, OSError, stream.Unknown) as error:
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        refusal = Finding.refusal("state-unreadable", f"the VM state of {tag!r} cannot be read: {why}")
        raise PrecheckRefused(f"snapshot {tag!r} cannot be exported", [refusal]) from error


async def _plan(
    run: Run,
    request: ExportRequest,
    inventory: Inventory,
    snapshot: Snapshot,
    state: VmState,
    qemu: _Qemu,
    images: QemuImg,
) -> _Plan:
    """Find out what is to be copied.

    :raise PrecheckRefused: it could not be started elsewhere.
    """
    with _readable(snapshot.tag):
        machine = await in_thread(partial(_machine, state))
    chardevs = await run.monitor.human_answer("info chardev")
    made = portable(
        qemu.arguments,
        machine=machine,
        chardevs={line.partition(":")[0] for line in chardevs.splitlines()},
        networks=await run.monitor.human_answer("info network"),
        is_file=lambda path: (qemu.cwd / path).is_file(),
    )
    held = holdings(inventory, snapshot, made, run.monitor.pid, keep_backing=request.keep_backing)
    refusals = [*made.refusals, *held.refusals]
    if refusals:
        findings = [Finding.refusal("not-portable", reason) for reason in refusals]
        raise PrecheckRefused(f"snapshot {snapshot.tag!r} cannot be exported, because of this machine", findings)
    warnings = [Finding.warning("not-the-same", text) for text in (*made.warnings, *held.warnings)]
    sizes = await asyncio.gather(*(images.size(one.source) for one in held.drives if one.source is not None))
    return _Plan(snapshot, str(run.monitor.version), machine, qemu, made, held.drives, sizes, warnings)


def _machine(state: VmState, ended: threading.Event) -> str:
    """The machine type that a VM state names.

    :raise Unreadable: it is damaged.
    :raise Unknown: it is not known how to read it.
    """
    walk = stream.Stream({})
    walk.parts(memoryview(state.bytes(0, stream.LONGEST_FRAME)))
    if damages := [*flaws(state, ended, lambda _: None)]:
        raise Unreadable(f"it is damaged, {'; '.join(damages)}")
    return walk.machine


def _refuse_without_room(plan: _Plan, target: Path, *, force: bool) -> None:
    """:raise PrecheckRefused: there is too little room beside *target*."""
    free, _ = processes.free_bytes(target.parent)
    if free < plan.size and not force:
        message = f"{target.parent}: no room: the export takes up to {plan.size:,} bytes, and {free:,} are free"
        refusal = Finding.refusal("no-room", message, "make room; --force tries all the same")
        raise PrecheckRefused("nothing was exported", [refusal])


# What is made


class _Report:
    """How far it has come, for a watcher. What is under way counts beside what is done."""

    def __init__(self, watch: Watcher | None, expected: int) -> None:
        self._watch = watch
        self._began = time.monotonic()
        self._done = 0
        self.expected = expected

    def at(self, under_way: int, phase: Phase = Phase.EXPORTING) -> None:
        """So many bytes of the present file are there."""
        if self._watch is not None:
            elapsed_s = time.monotonic() - self._began
            self._watch(Progress(phase, elapsed_s, min(self._done + under_way, self.expected), self.expected))

    def add(self, done: int) -> None:
        """A file of so many bytes is complete."""
        self._done += done


@asynccontextmanager
async def _directory(target: Path) -> AsyncIterator[Path]:
    """A directory for the export, under a name that does not count, for the duration of a block; then it is gone.

    One that an export left behind that was killed is removed first: whoever works in one holds a lock on it (flock).

    :raise PrecheckRefused: another export to the same target is under way, or it cannot be made.
    """
    part = target.with_name(f".{target.name}.qsnap-part")
    try:
        lock = _locked(part)
    except BlockingIOError as error:
        refusal = Finding.refusal("in-use", f"another export to {target} is under way")
        raise PrecheckRefused("nothing was exported", [refusal]) from error
    except OSError as error:
        refusal = Finding.refusal("no-directory", f"no directory can be made in {target.parent}: {error.strerror}")
        raise PrecheckRefused("nothing was exported", [refusal]) from error
    try:
        yield part
    except OSError as error:
        raise QsnapError(f"the export cannot be written: {error.strerror}; nothing is left of it") from error
    finally:
        # Under its final name it is not here any more
        await shielded(asyncio.to_thread(shutil.rmtree, part, ignore_errors=True), AFTERMATH_TIMEOUT_S)
        os.close(lock)


def _locked(part: Path) -> int:
    """Make the directory anew, and lock it.

    :raise BlockingIOError: somebody else has locked it.
    """
    with suppress(FileNotFoundError):
        old = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part)
        finally:
            os.close(old)
    part.mkdir(mode=0o700)
    lock = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


class _Written(NamedTuple):
    """What has been written."""

    disks: list[ExportedDisk]
    files: list[ExportedFile]
    contents: dict[int, Contents]


async def _written(part: Path, plan: _Plan, state: VmState, images: QemuImg, report: _Report) -> _Written:
    """Write everything but the manifest and what is made from it."""
    written = _Written([], [], {})
    path = part / manifest.STATE
    sum_ = await in_thread(partial(_copy_state, state, path, report, plan.snapshot.tag))
    written.files.append(ExportedFile(name=path.name, size=state.size, sha256=sum_))
    report.add(state.size)
    for number, held in enumerate(plan.drives):
        if held.source is None:
            written.contents[number] = Contents("")
            continue
        name = f"disk{len(written.disks)}.qcow2"
        await images.copy(held.source, part / name, report.at)
        await _cut(part / name, plan, held, images)
        report.add(processes.allocated_bytes(part / name))
        backing = held.source.backing[0] if held.source.backing else ""
        disk = ExportedDisk(file=name, device=held.label, is_read_only=held.is_read_only, backing=backing)
        written.disks.append(disk)
        written.contents[number] = Contents(f"export/{name}" if held.is_read_only else name, held.is_read_only)
        written.files.append(await in_thread(partial(_summed, part, name, report)))
    if plan.made.files:
        (part / FILES).mkdir(mode=0o700)
    for file in plan.made.files:
        await asyncio.to_thread(shutil.copyfile, plan.path(file), part / file.name)
        written.files.append(await in_thread(partial(_summed, part, file.name, report)))
    return written


def _copy_state(state: VmState, path: Path, report: _Report, tag: str, ended: threading.Event) -> str:
    """Write the VM state to a file, and return its checksum.

    :raise PrecheckRefused: it is damaged, or cannot be read.
    """
    sum_ = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    file = files.created(path)
    begin = 0
    try:
        while begin < state.size:
            if ended.is_set():
                raise InterruptedError
            with _readable(tag):
                piece = buffer[: state.read(buffer, begin)]
            sum_.update(piece)
            files.write(file, piece, begin)
            begin += len(piece)
            report.at(begin)
        os.fsync(file)
    finally:
        os.close(file)
    return sum_.hexdigest()


async def _cut(path: Path, plan: _Plan, held: Held, images: QemuImg) -> None:
    """Give a disk the size that it had: qemu-img copies as much as the disk has now."""
    size = held.disk_size
    if size is None or (now := await asyncio.to_thread(_disk_size, path)) == size:
        return
    if size > now:
        tag = plan.snapshot.tag
        raise QsnapError(f"{held.label} had {size:,} bytes in {tag!r} and has {now:,} now: the rest cannot be read")
    await images.cut(path, size)


def _disk_size(path: Path) -> int:
    """Bytes of the disk in a qcow2 image."""
    file = files.opened(path)
    try:
        return qcow2.header(file).disk_size
    finally:
        os.close(file)


def _summed(part: Path, name: str, report: _Report, ended: threading.Event) -> ExportedFile:
    """A file that has been written, on the disk, with its checksum."""
    file = files.opened(part / name, os.O_RDWR)
    try:
        os.fchmod(file, 0o600)
        os.fsync(file)
        size = os.fstat(file).st_size
        sum_ = manifest.checksum(file, ended.is_set, lambda _: report.at(0, Phase.CHECKING))
        return ExportedFile(name=name, size=size, sha256=sum_)
    finally:
        os.close(file)


def _complete(part: Path, target: Path, written: _Written, plan: _Plan) -> int:
    """Write the manifest and what is made from it, and give the directory its name; return the bytes that it takes.

    :raise OSError: it cannot be written, or something has that name by now.
    """
    snapshot = plan.snapshot
    about = Manifest(
        tag=snapshot.tag,
        date=snapshot.date,
        vm_clock_ns=snapshot.vm_clock_ns,
        vm_state_size=snapshot.vm_state_size,
        name=plan.made.name,
        qemu_version=plan.version,
        machine=plan.machine,
        emulator=plan.qemu.emulator,
        arguments=tuple(plan.made.finished(written.contents)),
        consoles=tuple(plan.made.consoles),
        is_isolated=bool(plan.made.taps),
        disks=tuple(written.disks),
        files=tuple(written.files),
        warnings=tuple(finding.message for finding in plan.warnings),
    )
    document = msgspec.json.format(msgspec.json.encode(about))
    texts: Sequence[tuple[str, bytes, int]] = (
        (manifest.README, about.read_me().encode(errors="replace"), 0o600),
        (manifest.START, about.script().encode(errors="surrogateescape"), 0o700),
        (manifest.MANIFEST, document, 0o600),
    )
    for name, text, mode in texts:
        file = files.created(part / name, mode)
        try:
            files.write(file, text, 0)
            os.fsync(file)
        finally:
            os.close(file)
    size = sum(processes.allocated_bytes(path) for path in part.rglob("*"))
    with files.directory(part) as where:
        files.sync(where)
    files.rename_directory(part, target)
    return size
