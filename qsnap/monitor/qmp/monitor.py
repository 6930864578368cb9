"""QMP: the verbs of a monitor, by QEMU's commands and its snapshot jobs.

Facts it rests on (QEMU's qapi/job.json, docs/interop/qmp-spec; measured on 5.2 to 11.1):

* A snapshot job answers ``{}`` at once or late, in any order with its events, and its error stands in
  query-jobs alone, until job-dismiss. So query-jobs is the authority and events only wake us up.
* QEMU's main loop is frozen while it writes: no answer comes, for as long as that takes.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from qsnap.errors import CommandFailed, JobFailed, NotSupported, QsnapError
from qsnap.model.qemu import BlockGraph, Job, QemuVersion, RunState, SnapshotTables
from qsnap.monitor import names
from qsnap.monitor.address import Address, UnixAddress
from qsnap.monitor.connection import Connection, peer_pid, understood
from qsnap.monitor.hmp.snapshots import HmpSnapshots
from qsnap.monitor.objects import Objects
from qsnap.monitor.protocol import NO_FILES
from qsnap.monitor.qmp import replies
from qsnap.monitor.qmp.channel import Channel, Client, inherited, negotiated

if TYPE_CHECKING:
    from qsnap.monitor.qmp.background import Background

#: Seconds between two looks at query-jobs where no event comes.
POLL_S = 0.5
#: Looks after which a job that has not concluded is given up: half a minute of answers.
STUCK_POLLS = 60
#: QMP commands that came with QEMU 6.0, all three together.
SNAPSHOT_JOBS_SINCE = (6, 0)


async def connect(link: Connection, address: Address, snapshot_jobs: bool | None) -> QmpMonitor:
    """Negotiate on *link*, and see which monitor this QEMU is. See :func:`qsnap.monitor.open_monitor`."""
    return _of(*await negotiated(link, address), address, link, snapshot_jobs)


async def adopt(sock: socket.socket, address: Address) -> QmpMonitor:
    """Go on with another process's connection. See :func:`qsnap.monitor.adopt_monitor`."""
    return _of(*await inherited(sock), address, Connection(sock, peer_pid(sock), "qmp"))


def _of(
    client: Client, version: QemuVersion, address: Address, link: Connection, snapshot_jobs: bool | None = None
) -> QmpMonitor:
    jobs = version >= SNAPSHOT_JOBS_SINCE if snapshot_jobs is None else snapshot_jobs
    return (QmpMonitor if jobs else LegacyQmpMonitor)(client, version, address, link)


class QmpMonitor(Channel, Objects):
    """A QEMU reached by QMP, with its snapshot jobs (6.0 and later). See :class:`qsnap.monitor.Monitor`."""

    transport = "qmp"
    chooses_devices = True

    def __init__(self, client: Client, version: QemuVersion, address: Address, link: Connection) -> None:
        super().__init__(client, version, address, link)
        self._unsettled: dict[str, str] = {}

    @property
    def who(self) -> str:
        return f"this QEMU ({self.version})"

    @property
    def live(self) -> Background:
        from qsnap.monitor.qmp.background import Background

        return Background(self)

    @property
    def live_obstacle(self) -> str:
        return "" if isinstance(self.address, UnixAddress) else NO_FILES

    def tag_obstacle(self, tag: str) -> str | None:
        return None

    async def runstate(self) -> RunState:
        return RunState((await self.query(replies.StatusInfo, "query-status")).status)

    async def stop(self) -> float | None:
        return await self.turn("stop", "STOP")

    async def cont(self) -> float | None:
        return await self.turn("cont", "RESUME")

    async def reset(self) -> None:
        await self.execute("system_reset")

    async def name(self) -> str:
        return (await self.query(replies.NameInfo, "query-name")).name

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
        job_id = names.job_id(verb)
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
        with self.job_changes(job_id) as changes:
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
            if names.pid_of_job(job.id) == pid:
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


def _is_abandoned(job_id: str) -> bool:
    """Whether this is a job of a qsnap that does not run any more; its id holds the process id."""
    from qsnap.host.processes import is_alive

    pid = names.pid_of_job(job_id)
    return pid not in (None, os.getpid()) and not is_alive(pid)


class LegacyQmpMonitor(HmpSnapshots, QmpMonitor):
    """A QEMU without snapshot jobs (before 6.0): savevm, loadvm and delvm by human-monitor-command."""

    transport = "qmp-hmp"
    human_answer = Channel.human_answer
    runstate = QmpMonitor.runstate

    async def block_graph(self) -> BlockGraph:
        return msgspec.structs.replace(await super().block_graph(), chooses_devices=False)
