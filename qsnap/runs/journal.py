"""The journal of a run: the file in which its record stands, written before anything is done.

It is a file in the user's runtime directory, mode 0600, with one JSON text a line. Each line adds to those before it; a
last line that was cut short does no harm. The file holds names, tags and process ids, and nothing secret. The run keeps
it locked (flock), and so does the guard that inherits it. So a journal without a lock belongs to a dead run, even if
its process id was reused. It is deleted when the run has ended and its guest runs as it should.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from qsnap.errors import QsnapError
from qsnap.host import files
from qsnap.host.processes import process, this_process
from qsnap.model import typed
from qsnap.model.qemu import Struct
from qsnap.monitor.address import Address, UnixAddress
from qsnap.runs import runtime_dir
from qsnap.runs.group import Member, Point
from qsnap.runs.record import Record

if TYPE_CHECKING:
    from qsnap.monitor import Monitor

#: Suffix of a journal whose record is not written yet.
_BEGINNING = ".beginning"
#: The names that qsnap gives, after the token of the run: other files are ignored.
_NAME = re.compile(rf"[0-9a-f]{{16}}({re.escape(runtime_dir.JOURNAL)}|{re.escape(_BEGINNING)})")
#: Seconds after which an incomplete journal counts as a dead run's; before it is locked, the two look alike.
_BEGINNING_S = 60.0

#: Seconds that a resume and a clean-up may take. QEMU answers nobody while it writes, and after an interrupt
#: the write has to end first: this bounds a save of several hundred GiB.
AFTERMATH_TIMEOUT_S = 900.0


class Guard(Protocol):
    """The process that resumes the guest if the run is killed: see :class:`qsnap.supervision.guard.Guard`."""

    pid: int

    async def ready(self) -> None: ...


class Journal:
    """The journal of a run of this process.

    Without a file the record is kept in memory only: for a sequence that is run without a claim.

    :ivar record: its contents.
    :ivar path: its file; None without one.
    :ivar patience_s: the seconds that an interrupted run waits for QEMU to answer, before it leaves the guest to its
        guard.
    :ivar guard: the run's guard; None without one.
    :ivar another_answers: at the monitor's address another QEMU answered than that of the run.
    :ivar member: the run's part in a group; None if it is of this VM alone, and in a process that recovers it.
    """

    def __init__(self, record: Record | None = None, file: int | None = None, path: Path | None = None) -> None:
        self.record = record or Record()
        self.path = path
        self.patience_s = AFTERMATH_TIMEOUT_S
        self.guard: Guard | None = None
        self.another_answers = False
        self.member: Member | None = None
        self._file = file

    async def armed(self) -> None:
        """Return as soon as the guard is ready to resume the guest if this process is killed.

        :raise QsnapError: the guard does not get ready; nothing was done.
        """
        if self.guard is not None:
            await self.guard.ready()

    def join(self, member: Member) -> None:
        """Make the run a part of a group.

        :raise QsnapError: as :meth:`note`.
        """
        self.note(group=member.token)
        self.member = member

    async def meet(self, point: Point) -> None:
        """Wait at a point for the other runs of the group.

        :raise Abandoned: one has failed, and this run is to undo its part.
        """
        if self.member is not None:
            await self.member.meet(point)

    async def decide(self) -> None:
        """Decide with the group that what its runs have made stays: see :meth:`Member.decide`."""
        if self.member is not None:
            await self.member.decide()

    @property
    def is_decided(self) -> bool | None:
        """Whether the group has decided that; None for a run of this VM alone.

        :raise QsnapError: the runtime directory cannot be trusted.
        """
        return runtime_dir.is_decided(self.record.group) if self.record.group else None

    @property
    def guard_pid(self) -> int | None:
        """The process id of its guard; None without one."""
        return self.guard.pid if self.guard is not None else None

    @classmethod
    def create(cls, record: Record) -> Journal:
        """Create a journal. It becomes visible to others when it is locked and holds *record*.

        :raise QsnapError: the runtime directory cannot be used.
        """
        path = runtime_dir.directory() / f"{record.token}{runtime_dir.JOURNAL}"
        beginning = path.with_suffix(_BEGINNING)
        try:
            file = files.created(beginning)
        except OSError as error:
            raise QsnapError(f"no journal can be made in {path.parent}: {error.strerror}; nothing was done") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            files.write(file, msgspec.json.encode(record) + b"\n")
            beginning.rename(path)
        except OSError as error:
            os.close(file)
            with suppress(OSError):
                beginning.unlink()
            raise QsnapError(f"the journal {path} cannot be written: {error.strerror}; nothing was done") from error
        return cls(record, file, path)

    def fileno(self) -> int | None:
        """The locked file, for a guard to inherit."""
        return self._file

    def note(self, **facts: Any) -> None:  # noqa: ANN401 (fields of Record)
        """Write down what is about to be done, or has been.

        :raise QsnapError: the journal cannot be written, or not in full; then the step must not be done.
        """
        if self._file is not None:
            try:
                # If the line before was cut short, this one is not lost with it.
                files.write(self._file, b"\n" + msgspec.json.encode(facts) + b"\n")
            except OSError as error:
                raise QsnapError(f"the journal {self.path} cannot be written: {error.strerror}") from error
        self.record = msgspec.structs.replace(self.record, **facts)

    def done(self, **facts: Any) -> None:  # noqa: ANN401 (fields of Record)
        """As :meth:`note`, for what is finished: a write error is ignored, and the record in memory is updated."""
        with suppress(QsnapError):
            self.note(**facts)
        self.record = msgspec.structs.replace(self.record, **facts)

    def advance(self, **facts: Any) -> None:  # noqa: ANN401 (fields of what is under way)
        """Write down how far :attr:`Record.work` has come.

        :raise QsnapError: as :meth:`note`.
        """
        self.note(work=self._advanced(facts))

    def has_advanced(self, **facts: Any) -> None:  # noqa: ANN401 (fields of what is under way)
        """As :meth:`advance`, for what is finished: a write error is ignored, as in :meth:`done`."""
        self.done(work=self._advanced(facts))

    def _advanced(self, facts: Mapping[str, Any]) -> Struct:
        assert self.record.work is not None
        return msgspec.structs.replace(self.record.work, **facts)

    def close(self, *, remove: bool) -> None:
        """Close the journal; *remove* the file if nothing is left to do."""
        if self._file is None:
            return
        if remove and self.path is not None:
            with suppress(OSError):
                self.path.unlink()
        os.close(self._file)
        self._file = None
        if self.record.group:
            with suppress(QsnapError):
                _forget_decisions()


def taken_over(file: int, path: Path) -> Journal | None:
    """The journal in an open, locked *file*; None if it cannot be read."""
    record = _read(file)
    return Journal(record, file, path) if record else None


class Found(Struct, frozen=True):
    """A journal in the runtime directory.

    :ivar is_held: its run goes on, or its guard is at work.
    """

    path: Path
    record: Record
    is_held: bool

    def take(self) -> Journal | None:
        """Lock the journal, to finish its run; None if another process holds it, or was faster."""
        try:
            file = files.opened(self.path, os.O_RDWR | os.O_APPEND)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink and (journal := taken_over(file, self.path)):
                return journal
        except OSError:
            pass
        os.close(file)
        return None


def found() -> Iterator[Found]:
    """All journals of this user. Journals of runs whose QEMU has ended are deleted on the way.

    :raise QsnapError: other users may write to the runtime directory, so that its contents cannot be trusted.
    """
    place = runtime_dir.existing()
    for path in sorted(path for path in place.iterdir() if _NAME.fullmatch(path.name)) if place else ():
        try:
            file = files.opened(path, os.O_RDWR)
        except OSError:
            continue
        try:
            info = os.fstat(file)
            if path.suffix == _BEGINNING and time.time() - info.st_mtime < _BEGINNING_S:
                continue
            is_held = not _can_lock(file)
            record = _read(file) if path.suffix == runtime_dir.JOURNAL else None
            is_over = record is None or (record.qemu is not None and not record.qemu.is_alive)
            if is_over and not is_held:
                with suppress(OSError):
                    path.unlink()
            elif record:
                yield Found(path, record, is_held)
        finally:
            os.close(file)


def _forget_decisions() -> None:
    """Remove those of which no run is left."""
    decided = runtime_dir.decisions()  # first: whose journals come later is not among them
    for group in decided - {other.record.group for other in found()}:
        runtime_dir.forget_decision(group)


def _can_lock(file: int) -> bool:
    try:
        # Shared: two readers must not take each other for the holder.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _read(file: int) -> Record | None:
    """The record in an open journal; None if there is none."""
    facts: dict[str, Any] = {}
    for line in os.pread(file, 1 << 22, 0).split(b"\n")[:-1]:
        with suppress(msgspec.DecodeError):
            facts |= typed.decode(line, dict[str, Any])
    try:
        return typed.convert(facts, Record) if facts else None
    except msgspec.ValidationError:
        return None


def new_record(operation: str, tags: tuple[str, ...], monitor: Monitor) -> Record:
    """The record of a run that this process begins now."""
    address = monitor.address
    return Record(
        token=os.urandom(8).hex(),
        operation=operation,
        tags=tags,
        began=datetime.now().astimezone().isoformat(timespec="seconds"),
        owner=this_process(),
        user=os.geteuid(),
        address=("unix" if isinstance(address, UnixAddress) else "tcp", *map(str, address)),
        socket=socket_identity(address),
        qemu=process(monitor.pid) if monitor.pid else None,
        transport=monitor.transport,
    )


def socket_identity(address: Address) -> tuple[str, ...]:
    """The identity of a monitor's socket, the same for all its names; () if there is none."""
    if not isinstance(address, UnixAddress):
        host = "127.0.0.1" if address.host == "localhost" else address.host
        return "tcp", host, str(address.port)
    try:
        info = os.stat(address.path)  # noqa: PTH116 (as in address.py)
    except (OSError, ValueError):
        return ()
    return "unix", str(info.st_dev), str(info.st_ino)
