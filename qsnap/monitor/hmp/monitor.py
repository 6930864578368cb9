"""HMP: the human monitor over a socket of its own (``-monitor unix:…``), for a QEMU without a ``-qmp`` one.

Less than QMP can be had by it: no events (so no time stamps of QEMU's own), no jobs, no choice of devices, and
sizes and times as they are shown to people. How its lines and tables read is in :mod:`hmp_text` and
:mod:`hmp_tables`; here is the connection.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress

from qsnap.errors import CommandFailed, NotSupported, QsnapError
from qsnap.model.qemu import BlockGraph, Job, Migration, QemuVersion, RunState, SnapshotTables
from qsnap.monitor.address import Address
from qsnap.monitor.connection import AnotherAnswers, Connection, connection, hang_up, lost, peer_pid, understood
from qsnap.monitor.hmp import tables as hmp_tables
from qsnap.monitor.hmp import text as hmp_text
from qsnap.monitor.hmp.snapshots import HmpSnapshots
from qsnap.monitor.objects import Objects

_log = logging.getLogger("qsnap.hmp")

_CHUNK = 1 << 16
#: A snapshot's row has some hundred bytes, an image takes 65536 snapshots.
MAX_ANSWER_BYTES = 16 << 20


class _Line:
    """The connection: one line at a time, each with its answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        self._rest = b""

    async def banner(self) -> QemuVersion:
        """QEMU's version; what may have come from before our time is read away."""
        stream = b""
        while (version := hmp_text.banner(stream)) is None:
            stream += await self._more("connecting")
        await self.answer("")
        return version

    async def answer(self, line: str) -> str:
        """Give HMP *line* and return its answer, however long that takes.

        The connection is held to the end of the answer, also if the caller is cancelled.
        """
        task = asyncio.create_task(self._exchange(line))
        task.add_done_callback(_seen)
        return await asyncio.shield(task)

    async def _exchange(self, line: str) -> str:
        command = line.split(" ")[0]
        async with self._turn:
            number = int.from_bytes(os.urandom(8)) >> 2
            _log.debug("-> %s", json.dumps(line))
            try:
                self._writer.write(hmp_text.typed(line, number))
                stream = bytearray(self._rest)
                end = b"%#x" % number
                # A look at all of it for each piece would take ever longer
                while end not in stream[-_CHUNK - 64 :] or (found := hmp_text.answer(bytes(stream), number)) is None:
                    if len(stream) > MAX_ANSWER_BYTES:
                        raise EOFError(f"its answer has more than {MAX_ANSWER_BYTES >> 20} MiB")
                    stream += await self._more(command)
            except (OSError, EOFError) as error:
                self._writer.close()
                raise lost(command, error) from error
            text, self._rest = found
            _log.debug("<- %s", json.dumps(text))
            return text

    async def _more(self, command: str) -> bytes:
        chunk = await self._reader.read(_CHUNK)
        if not chunk:
            raise lost(command, EOFError("it was closed"))
        return chunk

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._writer.wait_closed()


def _seen(task: asyncio.Task[str]) -> None:
    """Take note of a failure that nobody waits for any more: a shield that was cancelled does not."""
    if not task.cancelled():
        task.exception()


async def connect(link: Connection, address: Address) -> HmpMonitor:
    """Read the banner on *link*. See :func:`qsnap.monitor.open_monitor`."""
    line, version = await _greeted(link)
    return HmpMonitor(line, version, address, link)


async def adopt(sock: socket.socket, address: Address) -> HmpMonitor:
    """Go on with another process's connection. See :func:`qsnap.monitor.adopt_monitor`."""
    link = Connection(sock, peer_pid(sock), "hmp")
    line = _Line(*await asyncio.open_connection(sock=sock))
    try:
        await line.answer("")  # what the other process has left is read away with it
        version = hmp_text.version(await line.answer("info version"))
    except BaseException:
        await line.close()
        raise
    return HmpMonitor(line, version, address, link)


async def _greeted(link: Connection) -> tuple[_Line, QemuVersion]:
    reader, writer = await asyncio.open_connection(sock=link.sock)
    line = _Line(reader, writer)
    try:
        return line, await line.banner()
    except BaseException:
        await line.close()
        raise


class HmpMonitor(HmpSnapshots, Objects):
    """A QEMU reached by a human monitor's socket. See :class:`qsnap.monitor.Monitor`."""

    transport = "hmp"
    who = "the human monitor (HMP)"

    def __init__(self, line: _Line, version: QemuVersion, address: Address, link: Connection) -> None:
        super().__init__()
        self.version = version
        self.address = address
        self.pid = link.pid
        self.sock: socket.socket | None = link.sock.dup()
        self._line = line

    async def human_answer(self, line: str) -> str:
        return await self._line.answer(line)

    async def _silent(self, line: str) -> None:
        """A command that says nothing when it succeeds."""
        if reason := hmp_text.error_in(await self._line.answer(line)):
            raise CommandFailed(line.split(" ")[0], reason)

    async def _query(self, line: str) -> str:
        text = await self._line.answer(line)
        if text.startswith("unknown command"):
            raise NotSupported(f"this QEMU's human monitor has no {line!r}")
        if text.startswith("Error: "):
            raise CommandFailed(line, hmp_text.error_in(text))
        return text

    def tag_obstacle(self, tag: str) -> str | None:
        return hmp_text.tag_obstacle(tag)

    async def runstate(self) -> RunState:
        return hmp_tables.runstate(await self._query("info status"))

    async def stop(self) -> float | None:
        await self._silent("stop")
        return None

    async def cont(self) -> float | None:
        await self._silent("cont")
        return None

    async def reset(self) -> None:
        await self._silent("system_reset")

    async def name(self) -> str:
        return (await self._query("info name")).removesuffix("\n")

    async def block_graph(self) -> BlockGraph:
        backends = await self._query("info block")
        nodes = await self._query("info block -n -v")
        jobs = await self._query("info block-jobs")
        for qdev in hmp_tables.attached_to(backends):
            await self.learn_qdev_type(qdev)
        found = await self.peripherals()
        with understood("info block"):
            return hmp_tables.block_graph(backends, nodes, self.qdev_types, self.version, jobs, found)

    async def snapshot_tables(self) -> SnapshotTables:
        nodes = await self._query("info block -n -v")
        with understood("info block -n -v"):
            return hmp_tables.snapshot_tables(nodes, self.version)

    async def list_objects(self, path: str) -> Mapping[str, str]:
        return hmp_tables.objects(await self._query(f"qom-list {path}"))

    async def read_property(self, path: str, name: str) -> str:
        text = await self._query(f"qom-get {hmp_text.quoted(path)} {name}")
        with understood("qom-get"):
            return str(json.loads(text))

    async def add_mark(self, name: str, text: str) -> None:
        await self._silent(f"object_add authz-simple,id={name},identity={text}")

    async def delete_object(self, name: str) -> None:
        await self._silent(f"object_del {name}")

    async def migration(self) -> Migration:
        return hmp_tables.migration(await self._query("info migrate"), await self._query("info migrate_capabilities"))

    async def memory_size(self) -> int:
        text = await self._query("info memory_size_summary")
        with understood("info memory_size_summary"):
            return hmp_tables.memory_size(text)

    async def take_over(self, pid: int) -> None:
        pass  # whoever gets an answer here knows that all before it has ended

    async def leftover_jobs(self) -> Sequence[Job]:
        return ()  # HMP neither makes jobs nor shows them

    async def dismiss(self, jobs: Sequence[Job]) -> None:
        pass

    async def reconnect(self, timeout_s: float) -> None:
        hang_up(self.sock)
        await self.aclose()
        self._under_way = None
        async with connection(self.address, timeout_s) as link:
            if link.protocol != "hmp":
                raise AnotherAnswers(self.address)
            self._line, version = await _greeted(link)
            if version != self.version:
                await self._line.close()
                raise AnotherAnswers(self.address)
            self.sock, self.pid = link.sock.dup(), link.pid

    async def aclose(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        with suppress(QsnapError):
            await self._line.close()
