"""QMP: the monitor over a ``-qmp`` socket. The one module that knows ``qemu.qmp``.

Facts it rests on (QEMU's qapi/job.json, docs/interop/qmp-spec; measured on 5.2 to 11.1):

* A snapshot job answers ``{}`` at once or late, in any order with its events, and its error stands in
  query-jobs alone, until job-dismiss. So query-jobs is the authority and events only wake us up.
* QEMU's main loop is frozen while it writes: no answer comes, for as long as that takes.
* A QMP socket serves one client. A second one is connected by the kernel and then gets no greeting.
* HMP's errors are text in a successful reply; no text at all is success.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import msgspec
from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError

from qsnap.errors import (
    CommandFailed,
    ConnectError,
    JobFailed,
    MonitorBusy,
    MonitorError,
    MonitorLost,
    NotSupported,
    QsnapError,
)
from qsnap.model import BlockGraph, Job, Migration, QemuVersion, RunState
from qsnap.monitor import hmp_text, wire
from qsnap.monitor.address import Address, UnixAddress

_T = TypeVar("_T")

#: The QMP dialogue, one JSON text a line.
dialogue = logging.getLogger("qsnap.qmp")
# qemu.qmp reports what we report ourselves, and Python prints warnings that nobody handles.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False

#: Seconds between two looks at query-jobs where no event comes.
POLL_S = 0.5
#: Seconds for an event that QEMU sends before the reply that has already come.
EVENT_S = 0.5

#: QMP commands that came with QEMU 6.0, all three together.
SNAPSHOT_JOBS_SINCE = (6, 0)

_JOB_PREFIX = "qsnap-"
#: An object of no effect whose presence is the mark of a load that failed midway; it ends with its QEMU.
HALF_RESTORED = "qsnap-half-restored"
_numbers = itertools.count(1)


class _Client(QMPClient):
    """qemu.qmp's client, with the dialogue shown."""

    def _cb_outbound(self, msg: Message) -> Message:
        dialogue.debug("-> %s", _compact(msg))
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        dialogue.debug("<- %s", _compact(msg))
        return msg


def _compact(msg: Message) -> str:
    # ASCII, so that no message can move a terminal's cursor.
    return json.dumps(dict(msg)) if dialogue.isEnabledFor(logging.DEBUG) else ""


async def connect(address: Address, *, timeout_s: float, snapshot_jobs: bool | None) -> QmpMonitor:
    """Connect, make sure that it is QMP, negotiate. See :func:`qsnap.monitor.open_monitor`."""
    client, pid = await _greeted(address, timeout_s)
    try:
        version = _version(client)
    except MonitorError:
        await client.disconnect()
        raise
    jobs = version >= SNAPSHOT_JOBS_SINCE if snapshot_jobs is None else snapshot_jobs
    return (QmpMonitor if jobs else HumanQmpMonitor)(client, version, address, pid)


async def _greeted(address: Address, timeout_s: float) -> tuple[_Client, int | None]:
    """A client that has negotiated, and the process at the other end."""
    sock: socket.socket | None = None
    client = _Client("qsnap")
    try:
        async with asyncio.timeout(timeout_s):
            sock = await _connected(address)
            await _expect_qmp(sock, address)
            await client.connect(sock)
    except TimeoutError as error:
        if sock is None:
            raise ConnectError(f"{address} does not take connections; nothing came of it in {timeout_s:g} s") from error
        sock.close()
        raise MonitorBusy(
            f"{address} accepts connections but has sent no greeting within {timeout_s:g} s: another client "
            "holds this monitor (it serves one at a time), or QEMU is in the middle of a save or stopped. "
            "End the other client, or give QEMU a second -qmp socket"
        ) from error
    except BaseException as error:
        _close(sock)
        if isinstance(error, (QMPError, OSError, EOFError)):
            raise _connect_error(address, error) from error
        raise
    return client, _peer_pid(sock)


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


async def _connected(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    if not isinstance(address, UnixAddress):
        infos = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        failure: OSError | None = None
        for family, kind, protocol, _, target in infos:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            try:
                await loop.sock_connect(sock, target)
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure or OSError(f"no address for {address.host}")
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(address.path)
        except BlockingIOError:  # EAGAIN: the queue of waiting clients is full (connect(2))
            sock.close()
            await asyncio.sleep(0.05)
        except BaseException:
            sock.close()
            raise
        else:
            return sock


async def _expect_qmp(sock: socket.socket, address: Address) -> None:
    """Look at the first byte, and leave it there: QMP greets with a JSON object, HMP with a banner."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(sock, _set, readable)
    try:
        await readable
    finally:
        loop.remove_reader(sock)
    start = sock.recv(5, socket.MSG_PEEK)
    if start.startswith(b"QEMU"):
        raise NotSupported(
            f"{address} is a human monitor (HMP), and qsnap speaks QMP: give QEMU a QMP socket beside it, "
            "-qmp unix:PATH,server=on,wait=off"
        )
    if start and not start.lstrip().startswith(b"{"):
        raise ConnectError(f"{address} is no QEMU monitor: it greets with {start!r}")


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _connect_error(address: Address, error: Exception) -> QsnapError:
    cure = "is QEMU running, with -qmp unix:PATH,server=on,wait=off?"
    match error:
        case FileNotFoundError():
            return ConnectError(f"there is no socket {address}; {cure}")
        case ConnectionRefusedError():
            return ConnectError(f"nobody listens at {address}; {cure}")
        case PermissionError():
            return ConnectError(f"{address} may not be opened by this user: {error.strerror}")
        case EOFError() | ConnectionError():
            return ConnectError(f"{address} was closed before the greeting; {cure}")
        case _:
            return ConnectError(f"cannot use {address} as a monitor: {error}")


def _version(client: QMPClient) -> QemuVersion:
    greeting = client.greeting
    try:
        qemu: Any = greeting.QMP.version["qemu"]  # type: ignore[union-attr]
        return QemuVersion(int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MonitorError("the greeting does not tell QEMU's version") from error


def _peer_pid(sock: socket.socket | None) -> int | None:
    """The process at the other end of a Unix socket (SO_PEERCRED: whoever called listen)."""
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    with suppress(OSError):
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid) or None
    return None


@contextmanager
def _mapped_errors(command: str) -> Iterator[None]:
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
        raise MonitorLost(
            f"the monitor was lost during {command}: {str(error) or type(error).__name__}. QEMU has ended, or "
            "closed the connection; what it had done by then is not known"
        ) from error


class QmpMonitor:
    """A QEMU reached by QMP, with its snapshot jobs (6.0 and later). See :class:`qsnap.monitor.Monitor`."""

    transport = "qmp"
    chooses_devices = True

    def __init__(self, client: QMPClient, version: QemuVersion, address: Address, pid: int | None) -> None:
        self.version = version
        self.address = address
        self.pid = pid
        self._client = client
        self._unsettled: dict[str, str] = {}
        self._qdev_types: dict[str, str] = {}
        self._turns = EventListener(("STOP", "RESUME"))
        client.register_listener(self._turns)

    async def _execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        with _mapped_errors(command):
            return await self._client.execute(command, dict(arguments) if arguments else None)

    async def _query(self, kind: type[_T], command: str, arguments: Mapping[str, object] | None = None) -> _T:
        with _mapped_errors(command):
            return msgspec.convert(await self._client.execute(command, dict(arguments) if arguments else None), kind)

    async def runstate(self) -> RunState:
        return RunState((await self._query(wire.StatusInfo, "query-status")).status)

    async def stop(self) -> float | None:
        return await self._turn("stop", "STOP")

    async def cont(self) -> float | None:
        return await self._turn("cont", "RESUME")

    async def _turn(self, command: str, event: str) -> float | None:
        self._turns.clear()
        await self._execute(command)
        with suppress(TimeoutError):
            async with asyncio.timeout(EVENT_S):
                while (message := await self._turns.get())["event"] != event:
                    pass
                stamp: Any = message["timestamp"]
                return float(stamp["seconds"] + stamp["microseconds"] / 1e6)
        return None

    async def name(self) -> str:
        return (await self._query(wire.NameInfo, "query-name")).name

    async def block_graph(self) -> BlockGraph:
        # Sent together, so that nothing comes between them.
        devices, infos, graph = await asyncio.gather(
            self._query(list[wire.BlockInfo], "query-block"),
            self._query(list[wire.BlockDeviceInfo], "query-named-block-nodes", {"flat": True}),
            self._graph_edges(),
        )
        await asyncio.gather(*(self._learn_qdev_type(row.qdev) for row in devices if row.qdev))
        return wire.block_graph(devices, infos, graph, self._qdev_types)

    async def _graph_edges(self) -> wire.XDbgBlockGraph | None:
        try:
            return await self._query(wire.XDbgBlockGraph, "x-debug-query-block-graph")
        except (NotSupported, CommandFailed):
            return None

    async def _learn_qdev_type(self, qdev: str) -> None:
        if qdev in self._qdev_types:
            return
        path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
        try:
            self._qdev_types[qdev] = await self._query(str, "qom-get", {"path": path, "property": "type"})
        except (NotSupported, CommandFailed):
            self._qdev_types[qdev] = ""

    async def migration(self) -> Migration:
        info, capabilities = await asyncio.gather(
            self._query(wire.MigrationInfo, "query-migrate"),
            self._query(list[wire.CapabilityStatus], "query-migrate-capabilities"),
        )
        return Migration(
            status=info.status,
            blocked_reasons=tuple(info.blocked_reasons),
            capabilities=frozenset(item.capability for item in capabilities if item.state),
        )

    async def is_half_restored(self) -> bool:
        objects = await self._query(list[wire.ObjectPropertyInfo], "qom-list", {"path": "/objects"})
        return any(item.name == HALF_RESTORED for item in objects)

    async def mark_half_restored(self, yes: bool) -> None:
        if yes == await self.is_half_restored():
            return
        if yes:
            await self._execute("object-add", {"qom-type": "throttle-group", "id": HALF_RESTORED})
        else:
            await self._execute("object-del", {"id": HALF_RESTORED})

    async def memory_size(self) -> int:
        info = await self._query(wire.MemoryInfo, "query-memory-size-summary")
        return info.base_memory + info.plugged_memory

    async def snapshot_save(self, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        await self._run_job("save", {"tag": tag, "vmstate": vmstate, "devices": list(devices)})

    async def snapshot_load(self, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        await self._run_job("load", {"tag": tag, "vmstate": vmstate, "devices": list(devices)})

    async def snapshot_delete(self, tag: str, devices: Sequence[str]) -> None:
        await self._run_job("delete", {"tag": tag, "devices": list(devices)})

    async def _run_job(self, verb: str, arguments: Mapping[str, object]) -> None:
        command = f"snapshot-{verb}"
        job_id = f"{_JOB_PREFIX}{verb}-{os.getpid()}-{next(_numbers)}"
        self._unsettled[job_id] = command
        try:
            await self._execute(command, {"job-id": job_id, **arguments})
        except (CommandFailed, NotSupported):
            del self._unsettled[job_id]
            raise
        if failure := await self._concluded(job_id, command):
            raise failure

    async def _concluded(self, job_id: str, command: str) -> JobFailed | None:
        """Wait until the job has concluded, dismiss it, and return the error in which it ended."""

        def ours(event: Message) -> bool:
            data = event.get("data")
            return isinstance(data, dict) and data.get("id") == job_id

        with self._client.listener("JOB_STATUS_CHANGE", ours) as changes:
            while True:
                job = next((job for job in await self._jobs() if job.id == job_id), None)
                if job is not None and not job.is_concluded:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(POLL_S):
                            await changes.get()
                    continue
                if job is not None:
                    await self.dismiss([job])
                self._unsettled.pop(job_id, None)
                if job is None:
                    return JobFailed(command, "its job has vanished: another client has dismissed it")
                return JobFailed(command, job.error) if job.error else None

    async def _jobs(self) -> list[Job]:
        return [job.model() for job in await self._query(list[wire.JobInfo], "query-jobs")]

    async def settle(self) -> QsnapError | None:
        failure = None
        for job_id, command in list(self._unsettled.items()):
            failure = await self._concluded(job_id, command)
        return failure

    async def leftover_jobs(self) -> Sequence[Job]:
        return [job for job in await self._jobs() if job.is_concluded and _is_abandoned(job.id)]

    async def dismiss(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            # Whoever else dismissed it has done our work.
            with suppress(CommandFailed):
                await self._execute("job-dismiss", {"id": job.id})

    async def reconnect(self, timeout_s: float) -> None:
        await self.aclose()
        client, pid = await _greeted(self.address, timeout_s)
        if pid != self.pid:
            await client.disconnect()
            raise MonitorLost(f"another QEMU answers at {self.address} now; the one that was there has ended")
        self._client = client
        self._client.register_listener(self._turns)

    async def aclose(self) -> None:
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(1):
                await self._client.disconnect()


def _is_abandoned(job_id: str) -> bool:
    """Whether this is a job of a qsnap that does not run any more; its id holds the process id."""
    match = re.fullmatch(rf"{_JOB_PREFIX}[a-z]+-(\d+)-\d+", job_id)
    if match is None:
        return False
    from qsnap.local import is_alive

    return int(match[1]) != os.getpid() and not is_alive(int(match[1]))


class HumanQmpMonitor(QmpMonitor):
    """A QEMU without snapshot jobs (before 6.0): savevm, loadvm and delvm by human-monitor-command.

    They take no devices and no vmstate node: QEMU takes all that a save must hold, and the first of them
    for the VM state. The sequences make sure beforehand that it is the same choice.
    """

    transport = "qmp-hmp"
    chooses_devices = False

    _under_way: asyncio.Task[None] | None = None

    async def snapshot_save(self, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        await self._hmp("savevm", tag)

    async def snapshot_load(self, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        await self._hmp("loadvm", tag)

    async def snapshot_delete(self, tag: str, devices: Sequence[str]) -> None:
        await self._hmp("delvm", tag)

    async def _hmp(self, command: str, tag: str) -> None:
        line = f"{command} {hmp_text.quoted(tag)}"
        # A task of its own: a cancelled caller must not lose the answer, which settle() waits for.
        self._under_way = asyncio.create_task(self._human_command(command, line))
        try:
            await asyncio.shield(self._under_way)
        finally:
            if self._under_way.done():
                self._under_way = None

    async def _human_command(self, command: str, line: str) -> None:
        answer = await self._query(str, "human-monitor-command", {"command-line": line})
        if reason := hmp_text.error_in(answer):
            raise JobFailed(command, reason)

    async def settle(self) -> QsnapError | None:
        if self._under_way is None:
            return None
        try:
            await self._under_way
        except JobFailed as failure:
            return failure
        finally:
            self._under_way = None
        return None
