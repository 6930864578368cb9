"""A human monitor, against a server of our own: what comes in pieces, too late, or not at all."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from qsnap.errors import CommandFailed, JobFailed, MonitorError, MonitorLost, NotSupported
from qsnap.monitor.address import UnixAddress
from qsnap.monitor.connection import AnotherAnswers, connection
from qsnap.monitor.hmp import monitor as monitors
from qsnap.monitor.hmp.monitor import HmpMonitor
from support.guest import DEADLINE_S

pytestmark = pytest.mark.no_qemu

PROMPT = b"(qemu) "
BANNER = b"QEMU 7.2.3 monitor - type 'help' for more information\r\n" + PROMPT

#: What a line is answered; None: the connection is closed.
Answer = Callable[[str], bytes | None]


class Server:
    """It greets, and answers in pieces.

    :ivar lines: what it was told, but for the numbers to print.
    """

    def __init__(self, path: Path) -> None:
        self.address = UnixAddress(str(path))
        self.pieces = [BANNER]
        self.answer: Answer = lambda _: b""
        self.lines: list[str] = []
        self.ended = asyncio.Semaphore(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            for piece in self.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            await self._talk(reader, writer)
        writer.close()
        self.ended.release()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.readline():
            line = said.decode().removesuffix("\n")
            number = re.fullmatch(r"print (0x[0-9a-f]+)", line)
            if number is None:
                self.lines.append(line)
            answer = number[1].encode() + b"\r\n" if number else self.answer(line)
            if answer is None:
                return
            for piece in (line.encode(), b"\x1b[K\r\n", answer, PROMPT):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)

    async def is_asked(self, answer: bytes | None) -> None:
        """Wait for the next line. It is answered so, a little later."""
        asked = asyncio.Event()

        def answered(_: str) -> bytes | None:
            asked.set()
            return answer

        self.answer = answered
        async with asyncio.timeout(DEADLINE_S):
            await asked.wait()

    async def has_ended(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.ended.acquire()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    one = Server(tmp_path / "monitor")
    listening = await asyncio.start_unix_server(one.serve, one.address.path)
    try:
        yield one
    finally:
        listening.close()
    async with asyncio.timeout(DEADLINE_S):
        await listening.wait_closed()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)


async def connected(server: Server) -> HmpMonitor:
    async with connection(server.address, DEADLINE_S) as link:
        return await monitors.connect(link, server.address)


@pytest.fixture
async def monitor(server: Server) -> AsyncIterator[HmpMonitor]:
    one = await connected(server)
    server.lines.clear()
    yield one
    await one.aclose()


async def test_the_banner_may_come_in_pieces(server: Server) -> None:
    server.pieces = [BANNER[:5], BANNER[5:30], BANNER[30:-3], BANNER[-3:]]
    monitor = await connected(server)
    assert (monitor.version, monitor.address) == ((7, 2, 3), server.address)
    assert monitor.pid is not None
    await monitor.aclose()
    await server.has_ended()
    await monitor.aclose()
    assert monitor.sock is None


async def test_a_banner_that_is_cut_short(server: Server) -> None:
    """The connection is closed."""
    server.pieces = [BANNER, b"x"]
    server.answer = lambda _: None
    with pytest.raises(MonitorLost, match="it was closed"):
        await connected(server)
    await server.has_ended()


async def test_what_it_is_told(server: Server, monitor: HmpMonitor, caplog: pytest.LogCaptureFixture) -> None:
    server.answer = lambda line: f"{line}!\r\n".encode()
    with caplog.at_level(logging.DEBUG, "qsnap.hmp"):
        one, other = await asyncio.gather(monitor.human_answer("one"), monitor.human_answer("two é"))
    assert (one, other) == ("one!\n", "two é!\n")
    assert caplog.messages == ['-> "one"', '<- "one!\\n"', '-> "two \\u00e9"', '<- "two \\u00e9!\\n"']
    assert await monitor.name() == "info name!"


async def test_commands_that_are_silent(server: Server, monitor: HmpMonitor) -> None:
    for deed in (monitor.stop, monitor.cont, monitor.reset):
        await deed()
    await monitor.add_mark("m", "t")
    await monitor.delete_object("m")
    assert server.lines == [
        "stop", "cont", "system_reset", "object_add authz-simple,id=m,identity=t", "object_del m"
    ]  # fmt: skip
    server.answer = lambda _: b"Error: why\r\n"
    with pytest.raises(CommandFailed, match="QEMU refused object_del: why"):
        await monitor.delete_object("m")


async def test_questions_that_are_not_answered(server: Server, monitor: HmpMonitor) -> None:
    server.answer = lambda line: f"unknown command: '{line}'\r\n".encode()
    with pytest.raises(NotSupported, match="this QEMU's human monitor has no 'info status'"):
        await monitor.runstate()
    server.answer = lambda _: b"Error: why\r\n"
    with pytest.raises(CommandFailed, match="QEMU refused info name: why"):
        await monitor.name()
    server.answer = lambda _: b"nonsense\r\n"
    with pytest.raises(MonitorError, match="qom-get cannot be understood"):
        await monitor.read_property("/x", "type")
    server.answer = lambda _: b'"text"\r\n'
    assert await monitor.read_property("/x", "type") == "text"


@pytest.mark.parametrize("answer", [None, b"x" * (3 << 19)], ids=["none", "too much"])
async def test_an_answer_that_does_not_come(
    server: Server, monitor: HmpMonitor, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    """The connection is of no use any more: what comes of it then is no answer."""
    monkeypatch.setattr(monitors, "MAX_ANSWER_BYTES", 1 << 20)
    server.answer = lambda _: answer
    words = "lost during info: it was closed" if answer is None else "lost during info: its answer has more than 1 MiB"
    with pytest.raises(MonitorLost, match=words):
        await monitor.name()
    server.answer = lambda _: b""
    with pytest.raises(MonitorLost):
        await monitor.name()
    await monitor.aclose()
    await server.has_ended()


async def test_an_answer_that_nobody_waits_for_any_more(server: Server, monitor: HmpMonitor) -> None:
    """The next one is that to the next line; and a failure is nobody's."""
    asking = asyncio.create_task(monitor.human_answer("one"))
    await server.is_asked(b"one\r\n")
    asking.cancel()
    server.answer = lambda line: line.encode() + b"\r\n"
    assert await monitor.human_answer("two") == "two\n"
    asking = asyncio.create_task(monitor.human_answer("three"))
    await server.is_asked(None)
    asking.cancel()
    with pytest.raises(MonitorLost):
        await monitor.human_answer("four")
    await server.has_ended()


async def test_a_snapshot_that_is_made_meanwhile(server: Server, monitor: HmpMonitor) -> None:
    """Its end is waited for, also when its caller is gone; over a new connection it is not known."""
    saving = asyncio.create_task(monitor.snapshot_save("t", "a", ["a"]))
    await server.is_asked(b"Error: why\r\n")
    saving.cancel()
    with suppress(asyncio.CancelledError):
        await saving
    assert "why" in str(await monitor.settle())
    assert await monitor.settle() is None
    with pytest.raises(JobFailed, match="why"):
        await monitor.snapshot_delete("t", ["a"])
    saving = asyncio.create_task(monitor.snapshot_save("t", "a", ["a"]))
    await server.is_asked(None)
    saving.cancel()
    with suppress(asyncio.CancelledError):
        await saving
    await server.has_ended()
    server.answer = lambda _: b""
    await monitor.reconnect(DEADLINE_S)
    assert await monitor.settle() is None


async def test_a_new_connection(server: Server, monitor: HmpMonitor) -> None:
    """The old one is ended for all who have it."""
    monitor.pid = -1
    assert monitor.sock is not None
    with monitor.sock.dup() as theirs:
        await monitor.reconnect(DEADLINE_S)
        theirs.setblocking(False)
        async with asyncio.timeout(DEADLINE_S):
            with suppress(ConnectionResetError):
                while await asyncio.get_running_loop().sock_recv(theirs, 1):
                    pass
    await server.has_ended()
    assert monitor.pid != -1
    assert monitor.sock is not None
    assert await monitor.name() == ""


@pytest.mark.parametrize(
    "greeting", [BANNER.replace(b"7.2", b"8.2"), b'{"QMP": {"version": {}}}\r\n'], ids=["version", "qmp"]
)
async def test_another_qemu_answers(server: Server, monitor: HmpMonitor, greeting: bytes) -> None:
    server.pieces = [greeting]
    with pytest.raises(AnotherAnswers):
        await monitor.reconnect(DEADLINE_S)
    for _ in range(2):
        await server.has_ended()
    assert monitor.sock is None
    assert set(server.lines) <= {""}


@pytest.mark.parametrize("left", [b"", PROMPT, b"\r\nhalf an answer\r\n" + PROMPT + b"info\x1b[K\r\nx\r\n(qe"])
async def test_going_on_with_another_process_s_connection(left: bytes) -> None:
    """What it has left is no answer to us."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    writer.write(left)
    server = Server(Path("/x"))
    server.answer = lambda line: b"7.2.3 (Debian)\r\n" if line == "info version" else b""
    talking = asyncio.create_task(server._talk(reader, writer))
    async with asyncio.timeout(DEADLINE_S):
        monitor = await monitors.adopt(ours, server.address)
        assert monitor.version == (7, 2, 3)
        assert not ours.getblocking()
        assert await monitor.name() == ""
        await monitor.aclose()
        await talking
    writer.close()
    assert server.lines == ["", "info version", "info name"]


async def test_a_connection_that_cannot_be_gone_on_with() -> None:
    """It is closed: it would keep the next one waiting."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    server = Server(Path("/x"))
    server.answer = lambda _: b"nonsense\r\n"
    talking = asyncio.create_task(server._talk(reader, writer))
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(MonitorError, match="tells no version: 'nonsense"):
            await monitors.adopt(ours, server.address)
        await talking
    writer.close()


async def test_the_models_of_the_drives(server: Server, monitor: HmpMonitor) -> None:
    answers = {
        "info block": b"cd0: [not inserted]\r\n    Attached to:      cd0\r\n    Removable device: not locked\r\n",
        'qom-get "/machine/peripheral/cd0" type': b'"ide-cd"\r\n',
    }
    server.answer = lambda line: answers.get(line, b"")
    assert [one.qdev_type for one in (await monitor.block_graph()).backends] == ["ide-cd"]


async def test_a_connection_that_is_closed_during_an_answer() -> None:
    """That the connection was closed meanwhile is no error that the event loop reports."""
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: reported.append(what))
    ours, theirs = socket.socketpair()
    with theirs:
        line = monitors._Line(*await asyncio.open_connection(sock=ours))
        asking = asyncio.create_task(line.answer("info block"))
        assert b"info block" in await asyncio.to_thread(theirs.recv, 100)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        await line.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    async with asyncio.timeout(DEADLINE_S):
        if others:
            await asyncio.wait(others)
    del others, asking, line
    gc.collect()
    assert reported == []
