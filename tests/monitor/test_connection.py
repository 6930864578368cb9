"""A connection to a monitor up to its first bytes, against sockets of our own."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from qsnap.errors import ConnectError, MonitorBusy, MonitorError
from qsnap.monitor.address import Address, TcpAddress, UnixAddress
from qsnap.monitor.connection import (
    Connection,
    _connect_error,
    connection,
    first_bytes,
    hang_up,
    listener_pid,
    lost,
    peer_pid,
    peer_user,
    understood,
)
from support.guest import DEADLINE_S

pytestmark = pytest.mark.no_qemu


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A UNIX socket that somebody listens at. It does not block."""
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "monitor"))
        one.listen(0)
        one.setblocking(False)
        yield one


def address_of(listener: socket.socket) -> Address:
    name = listener.getsockname()
    return UnixAddress(name) if isinstance(name, str) else TcpAddress(*name[:2])


@asynccontextmanager
async def greeting(listener: socket.socket, *pieces: bytes) -> AsyncIterator[asyncio.Task[socket.socket]]:
    """Whoever comes gets these bytes; after an empty piece the connection is closed."""
    loop = asyncio.get_running_loop()

    async def greet() -> socket.socket:
        client, _ = await loop.sock_accept(listener)
        for piece in pieces:
            if not piece:
                client.shutdown(socket.SHUT_WR)
                break
            await loop.sock_sendall(client, piece)
            await asyncio.sleep(0)
        return client

    task = asyncio.create_task(greet())
    yield task
    async with asyncio.timeout(DEADLINE_S):
        client = await task
    client.close()


async def assert_closed(client: socket.socket) -> None:
    """Whoever has come is gone; what was sent may be unread."""
    with suppress(ConnectionResetError):
        async with asyncio.timeout(DEADLINE_S):
            assert await asyncio.get_running_loop().sock_recv(client, 1) == b""


@pytest.mark.parametrize(
    ("pieces", "protocol", "start"),
    [
        ((b'{"QMP": {}}',), "qmp", b'{"QMP'),
        ((b'\r\n {"QMP": {}}',), "qmp", b'\r\n {"'),
        ((b"QEMU 7.2.0 monitor",), "hmp", b"QEMU "),
        ((b"\xff\xfb\x01\xff\xfb\x03\xff\xfb\x00\xff\xfd\x00QEMU 7",), "hmp", b"QEMU "),
        ((b"\xff", b"\xfb", b"\x01\xff\xfb", b'\x03{"QMP": {}}'), "qmp", b'{"QMP'),
    ],
)
async def test_what_a_monitor_speaks(
    listener: socket.socket, pieces: tuple[bytes, ...], protocol: str, start: bytes
) -> None:
    """What comes first tells it, and stays there to be read; but what telnet needs."""
    async with greeting(listener, *pieces), connection(address_of(listener), DEADLINE_S) as link:
        assert (link.protocol, link.pid) == (protocol, os.getpid())
        assert await first_bytes(link.sock) == start
        assert peer_user(link.sock) == os.getuid()
        link.sock.close()


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ((b"HTTP/1.1",), r"is not a QEMU monitor: it greets with b'HTTP/"),
        ((b"",), "was closed before the greeting"),
        ((b"\xff\xfb", b""), "was closed before the greeting"),
    ],
)
async def test_what_is_not_a_monitor(listener: socket.socket, pieces: tuple[bytes, ...], words: str) -> None:
    """Our end is closed."""
    async with greeting(listener, *pieces) as greeted:
        with pytest.raises(ConnectError, match=words):
            async with connection(address_of(listener), DEADLINE_S):
                pass
        await assert_closed(await greeted)


async def test_a_monitor_that_does_not_greet(listener: socket.socket) -> None:
    """Its process is named; and whoever waits behind a full queue gives up, too."""
    loop = asyncio.get_running_loop()
    with pytest.raises(MonitorBusy, match=r"has sent no greeting within 0\.05 s") as busy:
        async with connection(address_of(listener), 0.05):
            pass
    assert f"process {os.getpid()}," in str(busy.value)
    async with asyncio.timeout(DEADLINE_S):
        first, _ = await loop.sock_accept(listener)
    with first:
        await assert_closed(first)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(listener.getsockname())
        with pytest.raises(ConnectError, match=r"does not take connections; nothing came of it in 0\.2 s"):
            async with connection(address_of(listener), 0.2):
                pass
        opening = asyncio.create_task(opened(address_of(listener)))
        async with asyncio.timeout(DEADLINE_S):
            for number in range(2):
                client, _ = await loop.sock_accept(listener)
                with client:
                    await loop.sock_sendall(client, b"QEMU ")
                    if number:
                        assert (await opening).protocol == "hmp"


async def opened(address: Address) -> Connection:
    async with connection(address, DEADLINE_S) as link:
        link.sock.close()
        return link


@pytest.mark.parametrize("kind", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
async def test_a_block_that_fails(listener: socket.socket, kind: type[BaseException]) -> None:
    """Its error is the caller's own, and the connection is closed."""
    error = kind()
    async with greeting(listener, b"QEMU 7") as greeted:
        with pytest.raises(kind) as raised:
            async with connection(address_of(listener), DEADLINE_S):
                raise error
        assert raised.value is error
        await assert_closed(await greeted)


async def test_a_port_of_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that is listened at; and if there is none, why the last one cannot be used."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as other:
        listener.setblocking(False)
        other.bind(("127.0.0.1", 0))  # it does not listen
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        found = [(*kind, other.getsockname()), (*kind, listener.getsockname())]

        async def told(*_: object, **__: object) -> object:
            return found

        monkeypatch.setattr(loop, "getaddrinfo", told)
        async with greeting(listener, b"QEMU 7"), connection(TcpAddress("localhost", 1), DEADLINE_S) as link:
            assert link.sock.getpeername() == listener.getsockname()
            assert (link.pid, peer_user(link.sock)) == (None, None)
            link.sock.close()
        del found[1]
        with pytest.raises(ConnectError, match="nobody listens at tcp:localhost:1"):
            async with connection(TcpAddress("localhost", 1), DEADLINE_S):
                pass
        found.clear()
        with pytest.raises(ConnectError, match="cannot use tcp:localhost:1 as a monitor: no address for localhost"):
            async with connection(TcpAddress("localhost", 1), DEADLINE_S):
                pass


async def test_nobody_is_there(tmp_path: Path) -> None:
    """What lies at the path is told by its kind."""

    def fifo(path: Path) -> None:
        os.mkfifo(path)

    def image(path: Path) -> None:
        path.write_bytes(b"QFI\xfb")

    def left(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))

    kinds: list[tuple[Callable[[Path], object], str]] = [
        (lambda path: None, "there is no socket "),
        (left, "nobody listens at "),
        (Path.mkdir, " is a directory, not a monitor's"),
        (Path.touch, " is a file, not a monitor's"),
        (image, " is a qcow2 image, not a monitor's"),
        (fifo, " is a device or a pipe, not a monitor's"),
    ]
    for number, (make, words) in enumerate(kinds):
        path = tmp_path / str(number)
        make(path)
        with pytest.raises(ConnectError) as error:
            async with connection(UnixAddress(str(path)), DEADLINE_S):
                pass
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("kind", "about", "words"),
    [
        (ConnectionRefusedError, (), "nobody listens at tcp:h:1"),
        (PermissionError, (13, "Permission denied"), "may not be opened by this user: Permission denied"),
        (ConnectionResetError, (), "was closed before the greeting"),
        (socket.gaierror, (socket.EAI_NONAME, "x"), "no host is called 'h'"),
        (socket.gaierror, (socket.EAI_AGAIN, "later"), "as a monitor: later"),
        (OSError, ("x",), "as a monitor: x"),
        (ValueError, ("y",), "as a monitor: y"),
    ],
)
def test_what_went_wrong(kind: type[Exception], about: tuple[object, ...], words: str) -> None:
    assert words in str(_connect_error(TcpAddress("h", 1), kind(*about)))


def test_who_is_there(listener: socket.socket, tmp_path: Path) -> None:
    assert listener_pid(address_of(listener)) == os.getpid()
    assert listener_pid(UnixAddress(str(tmp_path / "nobody"))) is None
    assert listener_pid(TcpAddress("localhost", 1)) is None
    assert peer_user(None) is None
    with socket.socket(socket.AF_UNIX) as alone:
        assert peer_pid(alone) is None


def test_a_connection_is_ended_for_all_who_have_it() -> None:
    hang_up(None)
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.dup() as another:
        hang_up(ours)
        assert theirs.recv(1) == another.recv(1) == b""
        theirs.close()
        ours.close()
        hang_up(ours)


def test_answers_that_contradict_each_other() -> None:
    for error in (KeyError("x"), ValueError("x"), TypeError("x"), ZeroDivisionError("x"), RecursionError("x")):
        with pytest.raises(MonitorError, match="answers to a, b cannot be understood: "), understood("a", "b"):
            raise error
    with pytest.raises(OSError, match="x"), understood("a"):
        raise OSError("x")


def test_the_words_for_a_lost_connection() -> None:
    assert str(lost("cont", EOFError("gone."))).startswith("the monitor was lost during cont: gone. QEMU has ended")
    assert "during cont: EOFError. QEMU" in str(lost("cont", EOFError()))
