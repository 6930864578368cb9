"""A QMP connection, against a server of our own: what QEMU says only now and then, byte by byte."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qsnap.errors import CommandFailed, ConnectError, MonitorError, MonitorLost, NotSupported
from qsnap.monitor.address import UnixAddress
from qsnap.monitor.connection import AnotherAnswers, Connection, connection
from qsnap.monitor.qmp import channel as channels
from qsnap.monitor.qmp import replies
from qsnap.monitor.qmp.channel import Channel, inherited, negotiated
from support.guest import DEADLINE_S
from support.qmp_server import GREETING, VERSION, Answer, Server, event, failed, returned, serving

pytestmark = pytest.mark.no_qemu


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """Whoever gives up, or is closed, leaves nothing at work."""
    async with serving(tmp_path) as one:
        yield one


@asynccontextmanager
async def opened(server: Server) -> AsyncIterator[Channel]:
    async with connection(server.address, DEADLINE_S) as link:
        channel = Channel(*await negotiated(link, server.address), server.address, link)
    try:
        yield channel
    finally:
        await channel.aclose()


def answering(value: bytes) -> Answer:
    return lambda message: value.replace(b"ID", json.dumps(message["id"]).encode())


async def test_what_it_is_told(server: Server) -> None:
    async with opened(server) as channel:
        server.answer = lambda message: returned(message, message.get("arguments", "none"))
        assert await channel.execute("x") == await channel.query(str, "x") == "none"
        assert await channel.execute("x", {"a": 1}) == await channel.query(dict[str, int], "x", {"a": 1}) == {"a": 1}
        assert (channel.version, channel.address) == ((7, 2, 3), server.address)
        assert channel.pid is not None
    assert channel.sock is None
    await server.has_ended()
    await channel.aclose()


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (lambda message: failed(message, "CommandNotFound"), NotSupported, "this QEMU has no x"),
        (lambda message: failed(message, "GenericError"), CommandFailed, "^QEMU refused x: why"),
        (lambda message: returned(message, 1), MonitorError, "answer to x has not the form"),
        (lambda _: b"", MonitorLost, "^the monitor was lost during x: .* what it had done by then is not known"),
        (answering(b"nonsense\n"), MonitorLost, "given up during x: QEMU's message cannot be read: it begins"),
        (answering(b'{"event": {}}\n'), MonitorLost, "cannot be read: an event's name is not text"),
        (answering(b'{"event": "x", "data": "\\uD800"}\n'), MonitorLost, "cannot be read: .*surrogates"),
        (answering(b'{"event": "x", "data": "\xed\xa0\x80"}\n'), MonitorLost, "cannot be read"),
        (answering(b"{\n x\nx\n"), MonitorLost, "cannot be read: it breaks off at b'x"),
    ],
)  # fmt: skip
async def test_what_it_is_told_instead(server: Server, answer: Answer, kind: type[Exception], words: str) -> None:
    async with opened(server) as channel:
        server.answer = answer
        with pytest.raises(kind, match=words) as error:
            await channel.query(str, "x")
        assert type(error.value) is kind


async def test_both_halves_of_a_pair_are_a_character(server: Server) -> None:
    async with opened(server) as channel:
        server.answer = answering(b'{"return": "\\ud83d\\ude00 \xed\x95\x9c", "id": ID}\n')
        assert await channel.query(str, "x") == "\U0001f600 \ud55c"


@pytest.mark.parametrize("form", ['{"return": "%s", "id": ID}\n', '{\r\n    "return": "%s",\r\n\t"id": ID\r\n}\r\n'])
async def test_the_longest_message(server: Server, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Of one line or of several."""
    monkeypatch.setattr(channels, "MAX_MESSAGE_BYTES", 2 << 20)
    async with opened(server) as channel:
        fits = False

        def answer(message: dict[str, Any]) -> bytes:
            text = form.replace("ID", json.dumps(message["id"]))
            return (text % ("x" * ((2 << 20) - len(text) + 2 + (0 if fits else 2)))).encode()

        server.answer = answer
        fits = True
        assert len(await channel.query(str, "x")) > 1 << 20
        fits = False
        with pytest.raises(MonitorLost, match="it has more than 2 MiB"):
            await channel.query(str, "x")


async def test_the_dialogue_is_shown(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(server) as channel:
        await channel.execute("unseen")
        with caplog.at_level("DEBUG", "qsnap.qmp"):
            server.answer = lambda message: returned(message, "é")
            await channel.execute("seen")
    said, heard = caplog.messages[:2]
    assert said.startswith('-> {"execute": "seen"')
    assert heard.startswith('<- {"return": "\\u00e9"')
    assert "unseen" not in caplog.text


async def test_the_events_of_a_job(server: Server) -> None:
    async with opened(server) as channel:
        with channel.job_changes("ours") as changes:
            nothing = b'{"event": "JOB_STATUS_CHANGE", "data": "x"}\n{"event": "JOB_STATUS_CHANGE"}\n'
            others = event("OTHER", id="ours") + event("JOB_STATUS_CHANGE", id="other")
            ours = event("JOB_STATUS_CHANGE", id="ours", status="null")
            server.answer = lambda message: nothing + others + ours + returned(message, {})
            await channel.execute("x")
            assert [one["data"] for one in changes.clear()] == [{"id": "ours", "status": "null"}]
        assert channel._client.events.empty(), "what nobody waits for is not kept"


async def test_when_it_took_effect(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "EVENT_S", 0.01)
    async with opened(server) as channel:
        assert await channel.turn("stop", "STOP") is None
        monkeypatch.setattr(channels, "EVENT_S", DEADLINE_S)
        server.answer = lambda message: returned(message, {}) + event("RESUME", 4) + event("STOP")
        assert await channel.turn("stop", "STOP") == 5.25
        assert [message["execute"] for message in server.asked][1:] == ["stop", "stop"]


async def test_the_stops_and_resumptions(server: Server) -> None:
    """Until they are forgotten, also over a new connection."""
    async with opened(server) as channel:
        timeless = b'{"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}}\n'
        server.answer = lambda message: event("STOP", 1) + timeless + event("OTHER") + returned(message, {})
        await channel.execute("x")
        assert channel.stop_resume_events() == (("STOP", 1.25),)
        server.answer = lambda message: event("RESUME", 2) + returned(message, {})
        await channel.execute("x")
        both = (("STOP", 1.25), ("RESUME", 2.25))
        assert channel.stop_resume_events() == channel.stop_resume_events() == both
        await channel.execute("x")
        channel.forget_stop_resume_events()
        assert channel.stop_resume_events() == ()
        await channel.execute("x")
        await channel.reconnect(DEADLINE_S)
        await channel.execute("x")
        assert channel.stop_resume_events() == (("RESUME", 2.25), ("RESUME", 2.25))


async def test_a_migration(server: Server) -> None:
    answers: dict[str, object] = {
        "query-migrate": {"status": "failed", "error-desc": "why", "blocked-reasons": ["a"]},
        "query-migrate-capabilities": [{"capability": "a", "state": True}, {"capability": "b", "state": False}],
    }
    async with opened(server) as channel:
        server.answer = lambda message: returned(message, answers[message["execute"]])
        migration = await channel.migration()
    assert (migration.status, migration.error, migration.blocked_reasons) == ("failed", "why", ("a",))
    assert migration.capabilities == {"a"}


async def test_a_new_connection(server: Server) -> None:
    """The old one is ended for all who have it; the new one is as good."""
    async with opened(server) as channel:
        channel.pid = -1
        assert channel.sock is not None
        with channel.sock.dup() as theirs:
            await channel.reconnect(DEADLINE_S)
            theirs.setblocking(False)
            async with asyncio.timeout(DEADLINE_S):
                assert await asyncio.get_running_loop().sock_recv(theirs, 1) == b""
        await server.has_ended()
        assert (len(server.clients), channel.pid) == (2, os.getpid())
        assert channel.sock is not None
        assert await channel.execute("x") == {}


@pytest.mark.parametrize(
    "greeting", [GREETING.replace(b"7", b"8"), b"QEMU 7.2.3 monitor - type 'help'\r\n(qemu) "], ids=["version", "hmp"]
)
async def test_another_qemu_answers(server: Server, greeting: bytes) -> None:
    async with opened(server) as channel:
        server.greeting = greeting
        with pytest.raises(AnotherAnswers):
            await channel.reconnect(DEADLINE_S)
        for _ in range(2):
            await server.has_ended()
        assert channel.sock is None
        assert [message["execute"] for message in server.asked] == ["qmp_capabilities"] * (2 if b"8" in greeting else 1)


@pytest.mark.parametrize(
    ("greeting", "kind", "words"),
    [
        (b'{"QMP": {"version": {"qemu": {"major": "x"}}, "capabilities": []}}\n', MonitorError, "does not tell QEMU's"),
        (b'{"QMP": {}}\n', ConnectError, "cannot use .*/monitor as a monitor: "),
        (b"{x\n", ConnectError, "as a monitor: QEMU's message cannot be read: it begins with b'{x"),
    ],
)
async def test_greetings_of_others(server: Server, greeting: bytes, kind: type[Exception], words: str) -> None:
    """The connection is closed: a monitor serves one client."""
    server.greeting = greeting
    with pytest.raises(kind, match=words) as error:
        async with connection(server.address, DEADLINE_S) as link:
            await negotiated(link, server.address)
    assert type(error.value) is kind
    assert not str(error.value).endswith(": ")
    await server.has_ended()


#: The answer to the question, with ID for its number; before it what another process has left, and behind it events.
ONE_LINE = b'{"return": %s, "id": ID}\r\n' % json.dumps(VERSION).encode()
PRETTY = (
    b'{\r\n    "return": {\r\n        "qemu": {\r\n            "micro": 3,\r\n            "minor": 2,\r\n'
    b'            "major": 7\r\n        },\r\n        "package": ""\r\n    },\r\n    "id": ID\r\n}\r\n'
)
PRETTY_EVENT = b'{\r\n    "event": "X",\r\n    "data": {\r\n        "a": 1\r\n    }\r\n}\r\n'


@pytest.mark.parametrize(
    "pieces",
    [
        [ONE_LINE],
        [b'alf": "of a line"}\r\n' + event("X") + b'{"return": {}, "id": "other"}\r\n' + ONE_LINE + event("X")],
        [event("X") + ONE_LINE[:9], ONE_LINE[9:30], ONE_LINE[30:] + event("X")[:9], event("X")[9:]],
        [PRETTY],
        [b'    "of": "a message"\r\n}\r\n' + PRETTY_EVENT + PRETTY + PRETTY_EVENT],
        [PRETTY_EVENT + PRETTY[:60], PRETTY[60:] + PRETTY_EVENT[:20], PRETTY_EVENT[20:]],
        [b"x" * (1 << 17) + b"\r\n" + ONE_LINE],
    ],
    ids=["line", "among lines", "in pieces", "pretty", "among others", "pretty pieces", "long"],
)
async def test_going_on_with_another_process_s_connection(pieces: list[bytes]) -> None:
    """In whatever state it was left; what comes behind the answer is not lost."""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    with theirs:
        theirs.setblocking(False)
        going = asyncio.create_task(inherited(ours))
        async with asyncio.timeout(DEADLINE_S):
            question = json.loads(await loop.sock_recv(theirs, 4096))
            assert question["execute"] == "query-version"
            for piece in pieces:
                await loop.sock_sendall(theirs, piece.replace(b"ID", json.dumps(question["id"]).encode()))
                await taken(ours, going)
            client, version = await going
            assert version == (7, 2, 3)
            channel = Channel(client, version, UnixAddress("/x"), Connection(ours, None, "qmp"))
            asked = asyncio.create_task(channel.query(replies.NameInfo, "query-name"))
            message = json.loads(await loop.sock_recv(theirs, 4096))
            await loop.sock_sendall(theirs, returned(message, {"name": "n"}))
            assert (await asked).name == "n"
            await channel.aclose()


async def taken(sock: socket.socket, going: asyncio.Task[Any]) -> None:
    """Wait until everything was read from a socket, or its reader has the answer."""
    while not going.done():
        try:
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"", "taking over: it was closed"), (b'{"return": 1, "id": ID}\n', "taking over: its answer cannot be read")],
)
async def test_a_connection_that_cannot_be_gone_on_with(answer: bytes, words: str) -> None:
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    with theirs, ours:
        theirs.setblocking(False)
        going = asyncio.create_task(inherited(ours))
        async with asyncio.timeout(DEADLINE_S):
            question = json.loads(await loop.sock_recv(theirs, 4096))
            await loop.sock_sendall(theirs, answer.replace(b"ID", json.dumps(question["id"]).encode()))
            if not answer:
                theirs.shutdown(socket.SHUT_RDWR)
            with pytest.raises(MonitorLost, match=words):
                await going
