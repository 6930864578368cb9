"""Who holds a monitor that does not greet us: the process at the other end of its one connection.

The kernel tells by unix_diag (sock_diag(7)) which Unix sockets are connected to which, and /proc/PID/fd whose
they are. All of it is optional: what is not shown is None. A monitor over TCP is not looked for.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SHOW_NAME_AND_PEER = 1 | 4
_NAME, _PEER = 0, 2
_TIMEOUT_S = 1.0

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_MESSAGE = struct.Struct("=BBBBIII")
_ATTRIBUTE = struct.Struct("=HH")


class Holder(NamedTuple):
    """A process that is connected to a monitor.

    :ivar command: its command line, as far as it may be read.
    """

    pid: int
    command: str


class _End(NamedTuple):
    name: bytes
    peer: int


def holder(waiting: socket.socket, qemu_pid: int | None) -> Holder | None:
    """The client that the monitor serves while *waiting* stands in its queue; None where that is not shown.

    :param waiting: our own connection, to which nothing has been said yet.
    """
    if waiting.family != socket.AF_UNIX or qemu_pid is None:
        return None
    try:
        ends = dict(_ends())
        # Accepted connections carry the name that the listener was bound to.
        name = os.fsencode(waiting.getpeername()) + b"\0"
        clients = {ends[inode].peer for inode in _sockets(qemu_pid) & ends.keys() if ends[inode].name == name} - {0}
    except (OSError, struct.error):
        return None
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()) if clients else ():
        with suppress(OSError):
            if pid != os.getpid() and clients & _sockets(pid):
                return Holder(pid, _command(pid))
    return None


def _ends() -> Iterator[tuple[int, _End]]:
    """Every Unix socket of this machine (of this network namespace), by its inode."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_TIMEOUT_S)
        body = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_NAME_AND_PEER, 0, 0)
        netlink.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + body)
        while True:
            data = netlink.recv(1 << 16)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    return
                yield _end(data[_HEADER.size : length])
                data = data[_aligned(length) :]


def _end(message: bytes) -> tuple[int, _End]:
    inode = _MESSAGE.unpack_from(message)[4]
    name, peer = b"", 0
    rest = message[_MESSAGE.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        value = rest[_ATTRIBUTE.size : length]
        if kind == _NAME:
            name = value
        elif kind == _PEER:
            (peer,) = struct.unpack("=I", value)
        rest = rest[_aligned(max(length, _ATTRIBUTE.size)) :]
    return inode, _End(name, peer)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _sockets(pid: int) -> set[int]:
    """The inodes of the sockets that a process has open."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return found


def _command(pid: int) -> str:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    return " ".join(argument.decode(errors="replace") for argument in arguments)
