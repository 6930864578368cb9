"""A QMP connection: commands and their answers, files, and the events that are waited for.

The one module that knows ``qemu.qmp``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TypeVar

import msgspec
from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError, StateError
from qemu.qmp.message import DeserializationError

from qsnap.errors import CommandFailed, ConnectError, MonitorError, MonitorLost, NotSupported
from qsnap.model import typed
from qsnap.model.qemu import Migration, QemuVersion
from qsnap.monitor.address import Address
from qsnap.monitor.connection import AnotherAnswers, Connection, connection, first_bytes, hang_up, lost
from qsnap.monitor.qmp import replies

_T = TypeVar("_T")

#: The QMP dialogue, one JSON text a line.
dialogue = logging.getLogger("qsnap.qmp")
# qemu.qmp reports what we report ourselves, and Python prints warnings that nobody handles.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False

#: Seconds for an event that QEMU sends before the reply that has already come.
EVENT_S = 0.5

#: Of one message. An image takes 65536 snapshots, and tells some 200 bytes of each; with pretty=on twice as many.
MAX_MESSAGE_BYTES = 64 << 20
#: How much of an unreadable reply an error shows.
_SHOWN = 40
_STOP_RESUME = ("STOP", "RESUME")


class _Unreadable(QMPError):
    """What came is not a message."""


class Client(QMPClient):
    """qemu.qmp's client, with the dialogue shown, and for messages over several lines.

    :ivar unreadable: why the connection was given up, if that is because of a message; "" otherwise.
    """

    def __init__(self) -> None:
        super().__init__("qsnap", readbuflen=MAX_MESSAGE_BYTES)
        self.events.event_filter = lambda _: False  # a listener keeps all that it gets
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
    """*message*, if its texts hold no half of a pair of UTF-16, and its event has a name.

    QEMU sends no such halves, and nothing can be done with one. The library looks an event's name up in sets.

    :raise ValueError: they do, or it has not.
    """
    if not isinstance(message.get("event", ""), str):
        raise ValueError("an event's name is not text")  # noqa: TRY004 (of what came, not of an argument)
    if b"\\ud" in data.lower() or b"\xed" in data:
        json.dumps(dict(message), ensure_ascii=False).encode()
    return message


def _too_large() -> ValueError:
    return ValueError(f"it has more than {MAX_MESSAGE_BYTES >> 20} MiB")


def _compact(msg: Message) -> str:
    # ASCII, so that no message can move a terminal's cursor.
    return json.dumps(dict(msg)) if dialogue.isEnabledFor(logging.DEBUG) else ""


async def _synchronized(sock: socket.socket) -> QemuVersion:
    """Read away what the other process has left, up to the answer to a question of our own: QEMU's version.

    The stream may begin in the middle of a line, and may go on behind the answer with events.
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    word = os.urandom(8).hex()
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
                return typed.decode(message, replies.VersionReply).result.version
            except msgspec.DecodeError as error:
                raise EOFError(f"its answer cannot be read: {error}") from error
        line = b""


async def negotiated(link: Connection, address: Address) -> tuple[Client, QemuVersion]:
    """Greet QEMU on *link*.

    :raise MonitorError: it is not a QMP monitor.
    """
    client = Client()
    try:
        await client.connect(link.sock)
    except AssertionError as error:
        # qemu.qmp asserts that the connection still stands when QEMU has greeted
        with suppress(Exception):
            await client.disconnect()
        raise ConnectError(f"cannot use {address} as a monitor: QEMU has closed it, or has ended") from error
    except QMPError as error:
        raise ConnectError(
            f"cannot use {address} as a monitor: {client.unreadable or str(error).rstrip(': ')}"
        ) from error
    try:
        return client, _version(client)
    except MonitorError:
        await client.disconnect()
        raise


async def inherited(sock: socket.socket) -> tuple[Client, QemuVersion]:
    """Go on with a connection of another process, in whatever state it left it.

    :raise MonitorLost: it is closed, or cannot be read.
    """
    try:
        version = await _synchronized(sock)
        client = Client()
        client.await_greeting = client.negotiate = False
        await client.connect(sock)
    except (QMPError, OSError, EOFError, ValueError) as error:
        # Its own words name a class
        reason = EOFError("it was closed before") if isinstance(error, StateError) else error
        raise lost("taking over", reason) from error
    return client, version


def _version(client: QMPClient) -> QemuVersion:
    greeting = client.greeting
    try:
        qemu: Any = greeting.QMP.version["qemu"]  # type: ignore[union-attr]
        return QemuVersion(int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MonitorError("the greeting does not tell QEMU's version") from error


@contextmanager
def _mapped_errors(command: str, client: Client) -> Iterator[None]:
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


class Channel:
    """A QMP connection, which can be opened anew.

    :ivar version: of the QEMU at its other end.
    :ivar pid: the process there, where it is on this machine: QEMU, or a proxy before it.
    :ivar sock: the connection itself, for a guard to inherit; None when it is closed.
    """

    def __init__(self, client: Client, version: QemuVersion, address: Address, link: Connection) -> None:
        super().__init__()
        self.version = version
        self.address = address
        self.pid = link.pid
        self.sock: socket.socket | None = link.sock.dup()
        self._client = client
        self._seen = EventListener(_STOP_RESUME)
        self._past: list[tuple[str, float]] = []
        client.register_listener(self._seen)

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Have QEMU execute a command; what it returns."""
        with _mapped_errors(command, self._client):
            return await self._client.execute(command, dict(arguments) if arguments else None)

    async def query(self, kind: type[_T], command: str, arguments: Mapping[str, object] | None = None) -> _T:
        """Have QEMU execute a command; what it returns, read as *kind*."""
        with _mapped_errors(command, self._client):
            return typed.convert(await self._client.execute(command, dict(arguments) if arguments else None), kind)

    async def send_file(self, file: int) -> None:
        """Hand an open file to QEMU, over a UNIX socket: the next command may take it."""
        with _mapped_errors("getfd", self._client):
            self._client.send_fd_scm(file)

    def forget_stop_resume_events(self) -> None:
        """Forget the STOP and RESUME events so far."""
        self._client.remove_listener(self._seen)
        self._seen = EventListener(_STOP_RESUME)  # a listener keeps all that it has given, too
        self._past.clear()
        self._client.register_listener(self._seen)

    def stop_resume_events(self) -> Sequence[tuple[str, float]]:
        """The STOP and RESUME events since they were forgotten, with their time stamps in seconds since 1970."""
        stamped = ((str(event["event"]), _stamp(event)) for event in self._seen.clear())
        self._past += ((name, stamp) for name, stamp in stamped if stamp is not None)
        return tuple(self._past)

    def job_changes(self, job_id: str) -> AbstractContextManager[EventListener]:
        """The JOB_STATUS_CHANGE events of a job, for the duration of a block."""

        def ours(event: Message) -> bool:
            data = event.get("data")
            return isinstance(data, dict) and data.get("id") == job_id

        return self._client.listener("JOB_STATUS_CHANGE", ours)

    async def turn(self, command: str, event: str) -> float | None:
        """Execute a command of which an event tells when it took effect: the event's time stamp, None without one."""
        with self._client.listener(event) as turns:
            await self.execute(command)
            with suppress(TimeoutError):
                async with asyncio.timeout(EVENT_S):
                    return _stamp(await turns.get())
        return None

    async def human_answer(self, line: str) -> str:
        return await self.query(str, "human-monitor-command", {"command-line": line})

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

    async def reconnect(self, timeout_s: float) -> None:
        hang_up(self.sock)
        await self.aclose()
        async with connection(self.address, timeout_s) as link:
            if link.protocol != "qmp":
                raise AnotherAnswers(self.address)
            client, version = await negotiated(link, self.address)
            if version != self.version:
                await client.disconnect()
                raise AnotherAnswers(self.address)
            self.sock, self.pid = link.sock.dup(), link.pid
        self._client = client
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
        stamp = typed.convert(event.get("timestamp"), replies.Timestamp)
    except msgspec.ValidationError:
        return None
    return stamp.seconds + stamp.microseconds / 1e6
