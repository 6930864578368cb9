"""QMP: the monitor over a ``-qmp`` socket. The one module that knows ``qemu.qmp``.

Facts it rests on (QEMU's qapi/job.json, docs/interop/qmp-spec; measured on 5.2 to 11.1):

* A snapshot job answers ``{}`` at once or late, in any order with its events, and its error stands in
  query-jobs alone, until job-dismiss. So query-jobs is the authority and events only wake us up.
* QEMU's main loop is frozen while it writes: no answer comes, for as long as that takes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import msgspec
from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError

from qsnap.errors import (
    CommandFailed,
    ConnectError,
    JobFailed,
    MonitorError,
    NotSupported,
    QsnapError,
)
from qsnap.model import BlockGraph, Job, Migration, QemuVersion, RunState
from qsnap.monitor import HALF_RESTORED, PERIPHERALS, wire
from qsnap.monitor.address import Address
from qsnap.monitor.connection import Connection, another_answers, connection, lost
from qsnap.monitor.human import HumanSnapshots

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


async def connect(link: Connection, address: Address, snapshot_jobs: bool | None) -> QmpMonitor:
    """Negotiate on *link*, and see which monitor this QEMU is. See :func:`qsnap.monitor.open_monitor`."""
    client = await _negotiated(link, address)
    try:
        version = _version(client)
    except MonitorError:
        await client.disconnect()
        raise
    jobs = version >= SNAPSHOT_JOBS_SINCE if snapshot_jobs is None else snapshot_jobs
    return (QmpMonitor if jobs else HumanQmpMonitor)(client, version, address, link.pid)


async def _negotiated(link: Connection, address: Address) -> _Client:
    client = _Client("qsnap")
    try:
        await client.connect(link.sock)
    except QMPError as error:
        raise ConnectError(f"cannot use {address} as a monitor: {error}") from error
    return client


def _version(client: QMPClient) -> QemuVersion:
    greeting = client.greeting
    try:
        qemu: Any = greeting.QMP.version["qemu"]  # type: ignore[union-attr]
        return QemuVersion(int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MonitorError("the greeting does not tell QEMU's version") from error


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
        raise lost(command, error) from error


class QmpMonitor:
    """A QEMU reached by QMP, with its snapshot jobs (6.0 and later). See :class:`qsnap.monitor.Monitor`."""

    transport = "qmp"
    chooses_devices = True

    @property
    def limit(self) -> str:
        return f"this QEMU ({self.version})"

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

    def tag_obstacle(self, tag: str) -> str | None:
        return None

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

    async def without_drive(self, kind: str) -> Sequence[str]:
        paths = [
            f"{parent}/{item.name}"
            for parent in PERIPHERALS
            for item in await self._query(list[wire.ObjectPropertyInfo], "qom-list", {"path": parent})
            if item.type == f"child<{kind}>"
        ]
        return [path for path in paths if not await self._query(str, "qom-get", {"path": path, "property": "drive"})]

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
        async with connection(self.address, timeout_s) as link:
            if link.is_human or link.pid != self.pid:
                raise another_answers(self.address)
            client = await _negotiated(link, self.address)
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


class HumanQmpMonitor(HumanSnapshots, QmpMonitor):
    """A QEMU without snapshot jobs (before 6.0): savevm, loadvm and delvm by human-monitor-command."""

    transport = "qmp-hmp"

    async def human_answer(self, line: str) -> str:
        return await self._query(str, "human-monitor-command", {"command-line": line})
