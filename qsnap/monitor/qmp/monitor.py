"""QMP: the monitor over a ``-qmp`` socket. The one module that knows ``qemu.qmp``.

Facts it rests on (QEMU's qapi/job.json, docs/interop/qmp-spec; measured on 5.2 to 11.1):

* A snapshot job answers ``{}`` at once or late, in any order with its events, and its error stands in
  query-jobs alone, until job-dismiss. So query-jobs is the authority and events only wake us up.
* QEMU's main loop is frozen while it writes: no answer comes, for as long as that takes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError, StateError
from qemu.qmp.message import DeserializationError

from qsnap.errors import (
    CommandFailed,
    ConnectError,
    JobFailed,
    MonitorError,
    MonitorLost,
    NotSupported,
    QsnapError,
)
from qsnap.model.qemu import BlockGraph, Job, Migration, QemuVersion, RunState, SnapshotTables
from qsnap.monitor import NO_FILES
from qsnap.monitor.address import Address, UnixAddress
from qsnap.monitor.connection import (
    AnotherAnswers,
    Connection,
    connection,
    first_bytes,
    hang_up,
    lost,
    peer_pid,
    understood,
)
from qsnap.monitor.hmp.snapshots import HmpSnapshots
from qsnap.monitor.objects import Objects
from qsnap.monitor.qmp import replies

if TYPE_CHECKING:
    from qsnap.monitor.qmp.background import Background

_T = TypeVar("_T")

#: The QMP dialogue, one JSON text a line.
dialogue = logging.getLogger("qsnap.qmp")
# qemu.qmp reports what we report ourselves, and Python prints warnings that nobody handles.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False

#: Seconds between two looks at query-jobs where no event comes.
POLL_S = 0.5
#: Looks after which a job that has not concluded is given up: half a minute of answers.
STUCK_POLLS = 60
#: Seconds for an event that QEMU sends before the reply that has already come.
EVENT_S = 0.5

#: QMP commands that came with QEMU 6.0, all three together.
SNAPSHOT_JOBS_SINCE = (6, 0)

#: Of one message. An image takes 65536 snapshots, and tells some 200 bytes of each; with pretty=on twice as many.
MAX_MESSAGE_BYTES = 64 << 20

#: Of what cannot be read, for a message of ours.
_SHOWN = 40

_JOB_PREFIX = "qsnap-"
_JOB_ID = re.compile(rf"{_JOB_PREFIX}[a-z]+-(\d+)-\d+")


class _Unreadable(QMPError):
    """What came is not a message."""


class _Client(QMPClient):
    """qemu.qmp's client, with the dialogue shown, and for messages over several lines.

    :ivar unreadable: why the connection was given up, if that is because of a message; "" otherwise.
    """

    def __init__(self) -> None:
        super().__init__("qsnap", readbuflen=MAX_MESSAGE_BYTES)
        self.unreadable = ""

    async def _do_recv(self) -> Message:
        data = b""
        try:
            data = await self._message_bytes()
            return _whole(Message(data, eager=True), data)
        except (ValueError, RecursionError, QMPError) as error:
            reason = f"it begins with {data[:_SHOWN]!r}" if isinstance(error, DeserializationError) else str(error)
            self.unreadable = f"QEMU's message cannot be read: {reason}"
            raise _Unreadable(self.unreadable) from error

    async def _message_bytes(self) -> bytes:
        """A line; or several, from one that is ``{`` to one that is ``}`` (pretty=on). What is between is indented."""
        line = await self._line()
        if line.rstrip() != b"{":
            return line
        message = bytearray(line)
        while not line.startswith(b"}"):
            line = await self._line()
            message += line
            if len(message) > MAX_MESSAGE_BYTES:
                raise _too_large()
            if not line.startswith((b" ", b"\t", b"}")):
                raise ValueError(f"it breaks off at {line[:_SHOWN]!r}")
        return bytes(message)

    async def _line(self) -> bytes:
        assert self._reader is not None
        try:
            return await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            raise EOFError("it was closed") from error
        except asyncio.LimitOverrunError as error:
            raise _too_large() from error

    def _cb_outbound(self, msg: Message) -> Message:
        dialogue.debug("-> %s", _compact(msg))
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        dialogue.debug("<- %s", _compact(msg))
        return msg


def _whole(message: Message, data: bytes) -> Message:
    """*message*, if its texts hold no half of a pair of UTF-16: QEMU sends none, and nothing can be done with one."""
    if b"\\ud" in data.lower() or b"\xed" in data:
        json.dumps(dict(message), ensure_ascii=False).encode()
    return message


def _too_large() -> ValueError:
    return ValueError(f"it has more than {MAX_MESSAGE_BYTES >> 20} MiB")


def _compact(msg: Message) -> str:
    # ASCII, so that no message can move a terminal's cursor.
    return json.dumps(dict(msg)) if dialogue.isEnabledFor(logging.DEBUG) else ""


async def connect(link: Connection, address: Address, snapshot_jobs: bool | None) -> QmpMonitor:
    """Negotiate on *link*, and see which monitor this QEMU is. See :func:`qsnap.monitor.open_monitor`."""
    client = await _negotiated(link, address)
    try:
        version = _version(client)
    except MonitorError:
        await client.disconnect()
        raise
    jobs = version >= SNAPSHOT_JOBS_SINCE if snapshot_jobs is None else snapshot_jobs
    return (QmpMonitor if jobs else LegacyQmpMonitor)(client, version, address, link)


async def adopt(sock: socket.socket, address: Address) -> QmpMonitor:
    """Go on with another process's connection. See :func:`qsnap.monitor.adopt_monitor`."""
    command = "taking over"
    try:
        version = await _synchronized(sock)
        client = _Client()
        client.await_greeting = client.negotiate = False
        await client.connect(sock)
    except (QMPError, OSError, EOFError, ValueError) as error:
        # Its own words name a class
        raise lost(command, EOFError("it was closed before") if isinstance(error, StateError) else error) from error
    link = Connection(sock, peer_pid(sock), is_human=False)
    return (QmpMonitor if version >= SNAPSHOT_JOBS_SINCE else LegacyQmpMonitor)(client, version, address, link)


async def _synchronized(sock: socket.socket) -> QemuVersion:
    """Read away what the other process has left, up to the answer to a question of our own: QEMU's version.

    The stream may begin in the middle of a line, and may go on behind the answer with events.
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    word = secrets.token_hex(8)
    await loop.sock_sendall(sock, f'\n{{"execute": "query-version", "id": "{word}"}}\n'.encode())
    message = line = b""
    while True:
        await first_bytes(sock)
        ahead = sock.recv(1 << 16, socket.MSG_PEEK)
        if not ahead:
            raise EOFError("it was closed")
        end = ahead.find(b"\n") + 1 or len(ahead)
        line = (line + sock.recv(end))[-(1 << 16) :]
        if not line.endswith(b"\n"):
            continue
        # With pretty=on a message goes from a line that is "{" to one that is "}"
        message = (line if line.startswith(b"{") else message + line)[-(1 << 16) :]
        if word.encode() in message and line.startswith((b"{", b"}")):
            try:
                return msgspec.json.decode(message, type=replies.VersionReply).result.version
            except msgspec.DecodeError as error:
                raise EOFError(f"its answer cannot be read: {error}") from error
        line = b""


async def _negotiated(link: Connection, address: Address) -> _Client:
    client = _Client()
    try:
        await client.connect(link.sock)
    except QMPError as error:
        raise ConnectError(
            f"cannot use {address} as a monitor: {client.unreadable or str(error).rstrip(': ')}"
        ) from error
    return client


def _version(client: QMPClient) -> QemuVersion:
    greeting = client.greeting
    try:
        qemu: Any = greeting.QMP.version["qemu"]  # type: ignore[union-attr]
        return QemuVersion(int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MonitorError("the greeting does not tell QEMU's version") from error


@contextmanager
def _mapped_errors(command: str, client: _Client) -> Iterator[None]:
    """The seam: what qemu.qmp, msgspec and the system raise, made into qsnap's own."""
    try:
        yield
    except ExecuteError as error:
        if error.error_class == "CommandNotFound":
            raise NotSupported(f"this QEMU has no {command}") from error
        raise CommandFailed(command, str(error)) from error
    except msgspec.ValidationError as error:
        raise MonitorError(f"QEMU's answer to {command} has not the form it should have: {error}") from error
    except (QMPError, OSError, EOFError) as error:
        if client.unreadable:
            raise MonitorLost(
                f"the connection was given up during {command}: {client.unreadable}. What QEMU has done is not known"
            ) from error
        raise lost(command, error) from error


class QmpMonitor(Objects):
    """A QEMU reached by QMP, with its snapshot jobs (6.0 and later). See :class:`qsnap.monitor.Monitor`."""

    transport = "qmp"
    chooses_devices = True

    @property
    def who(self) -> str:
        return f"this QEMU ({self.version})"

    def __init__(self, client: _Client, version: QemuVersion, address: Address, link: Connection) -> None:
        super().__init__()
        self.version = version
        self.address = address
        self.pid = link.pid
        self.sock: socket.socket | None = link.sock.dup()
        self._client = client
        self._unsettled: dict[str, str] = {}
        self._turns = EventListener(("STOP", "RESUME"))
        self._seen = EventListener(("STOP", "RESUME"))
        self._past: list[tuple[str, float]] = []
        client.register_listener(self._turns)
        client.register_listener(self._seen)

    @property
    def live(self) -> Background:
        from qsnap.monitor.qmp.background import Background

        return Background(self)

    @property
    def live_obstacle(self) -> str:
        return "" if isinstance(self.address, UnixAddress) else NO_FILES

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Have QEMU execute a command; what it returns."""
        with _mapped_errors(command, self._client):
            return await self._client.execute(command, dict(arguments) if arguments else None)

    async def query(self, kind: type[_T], command: str, arguments: Mapping[str, object] | None = None) -> _T:
        """The same, read as *kind*."""
        with _mapped_errors(command, self._client):
            return msgspec.convert(await self._client.execute(command, dict(arguments) if arguments else None), kind)

    async def send_file(self, file: int) -> None:
        """Hand an open file to QEMU: the next command may take it."""
        with _mapped_errors("getfd", self._client):
            self._client.send_fd_scm(file)

    def forget_stop_resume_events(self) -> None:
        """Begin anew to remember STOP and RESUME events."""
        self._seen.clear()
        self._past.clear()

    def stop_resume_events(self) -> Sequence[tuple[str, float]]:
        """Those that have come since."""
        stamped = ((str(event["event"]), _stamp(event)) for event in self._seen.clear())
        self._past += ((name, stamp) for name, stamp in stamped if stamp is not None)
        return tuple(self._past)

    def tag_obstacle(self, tag: str) -> str | None:
        return None

    async def runstate(self) -> RunState:
        return RunState((await self.query(replies.StatusInfo, "query-status")).status)

    async def stop(self) -> float | None:
        return await self._turn("stop", "STOP")

    async def cont(self) -> float | None:
        return await self._turn("cont", "RESUME")

    async def _turn(self, command: str, event: str) -> float | None:
        self._turns.clear()
        await self.execute(command)
        with suppress(TimeoutError):
            async with asyncio.timeout(EVENT_S):
                while (message := await self._turns.get())["event"] != event:
                    pass
                return _stamp(message)
        return None

    async def reset(self) -> None:
        await self.execute("system_reset")

    async def name(self) -> str:
        return (await self.query(replies.NameInfo, "query-name")).name

    async def human_answer(self, line: str) -> str:
        return await self.query(str, "human-monitor-command", {"command-line": line})

    async def block_graph(self) -> BlockGraph:
        # Sent together, so that nothing comes between them.
        devices, infos, graph, found = await asyncio.gather(
            self.query(list[replies.BlockInfo], "query-block"),
            self.query(list[replies.BlockDeviceInfo], "query-named-block-nodes", {"flat": True}),
            self._graph_edges(),
            self.peripherals(),
        )
        await asyncio.gather(*(self.learn_qdev_type(row.qdev) for row in devices if row.qdev))
        is_busy = graph is None or graph.has_jobs
        jobs = await self.query(list[replies.JobInfo], "query-jobs") if is_busy else ()
        with understood("query-block", "query-named-block-nodes", "x-debug-query-block-graph"):
            return replies.block_graph(devices, infos, graph, self.qdev_types, jobs, found)

    async def snapshot_tables(self) -> SnapshotTables:
        infos = await self.query(list[replies.BlockDeviceInfo], "query-named-block-nodes", {"flat": True})
        with understood("query-named-block-nodes"):
            return replies.snapshot_tables(infos)

    async def _graph_edges(self) -> replies.XDbgBlockGraph | None:
        try:
            return await self.query(replies.XDbgBlockGraph, "x-debug-query-block-graph")
        except (NotSupported, CommandFailed):
            return None

    async def list_objects(self, path: str) -> Mapping[str, str]:
        properties = await self.query(list[replies.ObjectPropertyInfo], "qom-list", {"path": path})
        return {item.name: item.type for item in properties}

    async def read_property(self, path: str, name: str) -> str:
        return await self.query(str, "qom-get", {"path": path, "property": name})

    async def add_mark(self, name: str, text: str) -> None:
        await self.execute("object-add", {"qom-type": "authz-simple", "id": name, "identity": text})

    async def delete_object(self, name: str) -> None:
        await self.execute("object-del", {"id": name})

    async def migration(self) -> Migration:
        info, capabilities = await asyncio.gather(
            self.query(replies.MigrationInfo, "query-migrate"),
            self.query(list[replies.CapabilityStatus], "query-migrate-capabilities"),
        )
        return Migration(
            status=info.status,
            blocked_reasons=tuple(info.blocked_reasons),
            capabilities=frozenset(item.capability for item in capabilities if item.state),
            error=info.error_desc,
        )

    async def memory_size(self) -> int:
        info = await self.query(replies.MemoryInfo, "query-memory-size-summary")
        return info.base_memory + info.plugged_memory

    async def snapshot_save(self, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        async with self._job("save", {"tag": tag, "vmstate": vmstate, "devices": list(devices)}):
            pass

    def snapshot_load(
        self, tag: str, vmstate: str, devices: Sequence[str]
    ) -> AbstractAsyncContextManager[JobFailed | None]:
        return self._job("load", {"tag": tag, "vmstate": vmstate, "devices": list(devices)})

    async def snapshot_delete(self, tag: str, devices: Sequence[str]) -> None:
        async with self._job("delete", {"tag": tag, "devices": list(devices)}):
            pass

    @asynccontextmanager
    async def _job(self, verb: str, arguments: Mapping[str, object]) -> AsyncIterator[JobFailed | None]:
        """Run a snapshot job; the block gets the error in which it ended. It is dismissed behind the block."""
        command = f"snapshot-{verb}"
        # In two containers two qsnaps may have the same process id.
        job_id = f"{_JOB_PREFIX}{verb}-{os.getpid()}-{secrets.randbits(32)}"
        self._unsettled[job_id] = command
        try:
            await self.execute(command, {"job-id": job_id, **arguments})
        except (CommandFailed, NotSupported):
            del self._unsettled[job_id]
            raise
        async with self._concluded(job_id, command) as failure:
            yield failure
        if failure:
            raise failure

    @asynccontextmanager
    async def _concluded(self, job_id: str, command: str) -> AsyncIterator[JobFailed | None]:
        """Wait until the job has concluded; the block gets the error in which it ended. It is dismissed behind it.

        QEMU answers nobody while such a job works. One that is still there after many answers does not work.
        """

        def ours(event: Message) -> bool:
            data = event.get("data")
            return isinstance(data, dict) and data.get("id") == job_id

        with self._client.listener("JOB_STATUS_CHANGE", ours) as changes:
            for _ in range(STUCK_POLLS):
                job = next((job for job in await self._jobs() if job.id == job_id), None)
                if job is None or job.is_concluded:
                    break
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await changes.get()
        if job is None:
            yield JobFailed(command, "its job has vanished: another client has dismissed it")
        elif not job.is_concluded:
            yield JobFailed(command, f"its job does not end; QEMU answers, and calls it {job.status}")
        else:
            yield JobFailed(command, job.error) if job.error else None
        if job is not None:
            await self._rid_of(job)
        self._unsettled.pop(job_id, None)

    async def _rid_of(self, job: Job) -> None:
        if not job.is_concluded:
            with suppress(CommandFailed):
                await self.execute("job-cancel", {"id": job.id})
        await self.dismiss([job])

    async def _jobs(self) -> list[Job]:
        return [job.model() for job in await self.query(list[replies.JobInfo], "query-jobs")]

    async def take_over(self, pid: int) -> None:
        for job in await self._jobs():
            if (match := _JOB_ID.fullmatch(job.id)) and int(match[1]) == pid:
                self._unsettled[job.id] = job.type

    async def settle(self) -> QsnapError | None:
        failure = None
        for job_id, command in list(self._unsettled.items()):
            async with self._concluded(job_id, command) as ended:
                failure = failure or ended
        return failure

    async def load_outcome(self, doubt: QsnapError, *, was_running: bool) -> QsnapError | None:
        return await self.settle()

    async def leftover_jobs(self) -> Sequence[Job]:
        return [job for job in await self._jobs() if job.is_concluded and _is_abandoned(job.id)]

    async def dismiss(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            # Whoever else dismissed it has done our work.
            with suppress(CommandFailed):
                await self.execute("job-dismiss", {"id": job.id})

    async def tidy(self) -> None:
        await self.live.tidy()

    async def reconnect(self, timeout_s: float) -> None:
        hang_up(self.sock)
        await self.aclose()
        async with connection(self.address, timeout_s) as link:
            if link.is_human:
                raise AnotherAnswers(self.address)
            client = await _negotiated(link, self.address)
            if _version(client) != self.version:
                await client.disconnect()
                raise AnotherAnswers(self.address)
            self.sock, self.pid = link.sock.dup(), link.pid
        self._client = client
        self._client.register_listener(self._turns)
        self._client.register_listener(self._seen)

    async def aclose(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(1):
                await self._client.disconnect()


def _stamp(event: Message) -> float | None:
    """When QEMU sent an event, in seconds since 1970; None where it does not tell (-1: its clock failed)."""
    try:
        stamp = msgspec.convert(event.get("timestamp"), replies.Timestamp)
    except msgspec.ValidationError:
        return None
    return stamp.seconds + stamp.microseconds / 1e6


def _is_abandoned(job_id: str) -> bool:
    """Whether this is a job of a qsnap that does not run any more; its id holds the process id."""
    match = _JOB_ID.fullmatch(job_id)
    if match is None:
        return False
    from qsnap.host.processes import is_alive

    return int(match[1]) != os.getpid() and not is_alive(int(match[1]))


class LegacyQmpMonitor(HmpSnapshots, QmpMonitor):
    """A QEMU without snapshot jobs (before 6.0): savevm, loadvm and delvm by human-monitor-command."""

    transport = "qmp-hmp"
    human_answer = QmpMonitor.human_answer
    runstate = QmpMonitor.runstate

    async def block_graph(self) -> BlockGraph:
        return msgspec.structs.replace(await super().block_graph(), chooses_devices=False)
