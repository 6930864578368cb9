"""A connection to a monitor, up to its first bytes: they tell QMP from HMP.

Read in QEMU's chardev/char-socket.c and monitor/, and measured on 5.2 to 11.1:

* A monitor socket serves one client. A second one is connected by the kernel and then gets no greeting; once
  the queue of waiting clients is full, connecting fails with EAGAIN.
* QMP greets with a JSON object, HMP with ``QEMU 7.2.22 monitor - type …``. Neither waits for the client.
* QEMU's main loop is frozen while it writes a snapshot, and greets nobody then.
* One that speaks telnet first sends four commands of three bytes each, ``IAC WILL ECHO`` and so on, and waits for no
  answer. After that it sends every byte as it is, 0xff too; what it is sent has 0xff twice (tcp_chr_telnet_init,
  tcp_chr_process_IAC_bytes). We send none: neither JSON nor UTF-8 has that byte.
* One with websocket or TLS waits for the client to begin. With mux=on another device may have what comes and goes.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Literal

import msgspec

from qsnap.errors import ConnectError, MonitorBusy, MonitorError, MonitorLost, QsnapError
from qsnap.monitor.address import Address, UnixAddress

#: Seconds between two tries to get into the queue of waiting clients.
_QUEUE_POLL_S = 0.05

#: The commands of telnet that a monitor begins with: this byte and two more.
_IAC = b"\xff"
_IAC_BYTES = 3

#: What to do if a monitor is not for qsnap.
ANOTHER = "give QEMU one more monitor, by -qmp unix:PATH,server=on,wait=off"
_CURE = "is QEMU running, with -qmp unix:PATH,server=on,wait=off?"


class Connection(msgspec.Struct, frozen=True):
    """A socket on which a monitor has begun to greet. Its bytes are still there to be read.

    :ivar pid: the process at the other end, if it is on this machine and the socket reports it.
    :ivar protocol: what the monitor speaks.
    """

    sock: socket.socket
    pid: int | None
    protocol: Literal["qmp", "hmp"]


@asynccontextmanager
async def connection(address: Address, timeout_s: float) -> AsyncIterator[Connection]:
    """Connect to *address*, wait for the first bytes, and let the block greet back.

    The block's work is under the same time-out. If it fails, the connection is closed; else it stays open.

    :param timeout_s: seconds for all of it.
    :raise ConnectError: nothing listens there, it may not be opened, or it is not a monitor.
    :raise MonitorBusy: it does not greet in time.
    """
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            sock = await _connected(address)
            protocol = _protocol(await _greeting(sock), address)
            yield Connection(sock, peer_pid(sock), protocol)
    except TimeoutError as error:
        if sock is None:
            raise ConnectError(f"{address} does not take connections; nothing came of it in {timeout_s:g} s") from error
        busy = _busy(sock, address, timeout_s)
        sock.close()
        raise busy from error
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, (OSError, EOFError)):
            raise _connect_error(address, error) from error
        raise


def _busy(sock: socket.socket, address: Address, timeout_s: float) -> MonitorBusy:
    pid = peer_pid(sock)
    return MonitorBusy(
        f"{address} accepts connections but has sent no greeting within {timeout_s:g} s",
        "another client holds this monitor (it serves one at a time), or QEMU"
        f"{f', process {pid},' if pid else ''} is in the middle of a save or stopped; one that speaks websocket or "
        f"TLS, or shares its socket (mux), is silent too. End the other client, or {ANOTHER}",
    )


async def _connected(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    if not isinstance(address, UnixAddress):
        infos = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        failure = OSError(f"no address for {address.host}")
        for family, kind, protocol, _, target in infos:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            try:
                await loop.sock_connect(sock, target)
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(address.path)
        except BlockingIOError:  # EAGAIN: the queue of waiting clients is full (connect(2))
            sock.close()
            await asyncio.sleep(_QUEUE_POLL_S)
        except BaseException:
            sock.close()
            raise
        else:
            return sock


async def _greeting(sock: socket.socket) -> bytes:
    """The first bytes of the greeting, after telnet's commands before it were read and dropped."""
    loop = asyncio.get_running_loop()
    while (start := await first_bytes(sock)).startswith(_IAC):
        for _ in range(_IAC_BYTES):
            await loop.sock_recv(sock, 1)
    return start


async def first_bytes(sock: socket.socket) -> bytes:
    """The first bytes that the other side sends; they stay in the socket."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(sock, _set, readable)
    try:
        await readable
    finally:
        loop.remove_reader(sock)
    return sock.recv(5, socket.MSG_PEEK)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _protocol(start: bytes, address: Address) -> Literal["qmp", "hmp"]:
    if not start:
        raise EOFError
    if start.startswith(b"QEMU"):
        return "hmp"
    if start.lstrip().startswith(b"{"):
        return "qmp"
    raise ConnectError(f"{address} is not a QEMU monitor: it greets with {start!r}")


def _connect_error(address: Address, error: Exception) -> QsnapError:
    match error:
        case FileNotFoundError():
            return ConnectError(f"there is no socket {address}; {_CURE}")
        case ConnectionRefusedError() if file := _kind_of_file(address):
            return ConnectError(
                f"{address} is {file}, not a monitor's socket: that of a running QEMU is needed (qsnap vms)"
            )
        case ConnectionRefusedError():
            return ConnectError(f"nobody listens at {address}; {_CURE}")
        case PermissionError():
            return ConnectError(f"{address} may not be opened by this user: {error.strerror}")
        case EOFError() | ConnectionError():
            return ConnectError(f"{address} was closed before the greeting; {_CURE}")
        case socket.gaierror() if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return ConnectError(f"cannot use {address} as a monitor: no host is called {address[0]!r}")
        case OSError():
            return ConnectError(f"cannot use {address} as a monitor: {error.strerror or error}")
        case _:
            return ConnectError(f"cannot use {address} as a monitor: {error}")


def _kind_of_file(address: Address) -> str:
    """What kind of file lies at the path of a socket; "" if it is a socket."""
    if not isinstance(address, UnixAddress):
        return ""
    from pathlib import Path

    path = Path(address.path)
    if path.is_file():
        with suppress(OSError), path.open("rb") as file:
            if file.read(4) == b"QFI\xfb":
                return "a qcow2 image"
        return "a file"
    return "" if path.is_socket() else "a directory" if path.is_dir() else "a device or a pipe"


def peer_pid(sock: socket.socket) -> int | None:
    """The process at the other end of a Unix socket (SO_PEERCRED: whoever called listen)."""
    return _peer(sock)[0] or None


def peer_user(sock: socket.socket | None) -> int | None:
    """Its user, at that time."""
    return None if sock is None else _peer(sock)[1]


def _peer(sock: socket.socket) -> tuple[int, int | None]:
    if sock.family == socket.AF_UNIX:
        with suppress(OSError):
            pid, user, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return pid, user
    return 0, None


def listener_pid(address: Address) -> int | None:
    """The process that listens at a Unix socket, without waiting for it; None if unknown."""
    if not isinstance(address, UnixAddress):
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock, suppress(OSError):
        sock.connect(address.path)
        return peer_pid(sock)
    return None


def hang_up(sock: socket.socket | None) -> None:
    """End a connection for all processes that hold it: closing would not free the monitor while a guard holds it.

    :param sock: a duplicate, which stays open even if the library has closed its own.
    """
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class AnotherAnswers(MonitorLost):
    """A new connection leads to another QEMU than the old one. It was closed, and no command was sent."""

    def __init__(self, address: Address) -> None:
        super().__init__(f"another QEMU answers at {address} now, and was left as it is")


@contextmanager
def understood(*commands: str) -> Iterator[None]:
    """Report answers that have the right form, but contradict each other, as an error of the monitor."""
    try:
        yield
    except (LookupError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        what = ", ".join(commands)
        raise MonitorError(f"QEMU's answers to {what} cannot be understood: {type(error).__name__}: {error}") from error


def lost(command: str, error: BaseException) -> MonitorLost:
    """The error of a connection that broke during *command*."""
    return MonitorLost(
        f"the monitor was lost during {command}: {str(error).rstrip('.') or type(error).__name__}. QEMU has ended, or "
        "closed the connection; what it had done by then is not known"
    )
