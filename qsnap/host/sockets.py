"""The Unix stream sockets of this machine, from the kernel's two tables of them.

unix_diag (sock_diag(7)) tells the other end of a connection, and the file that a listener was bound to. Where it is
refused, /proc/net/unix serves, which tells neither.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple


class Socket(NamedTuple):
    """A Unix stream socket that listens or is connected.

    :ivar path: as it was bound; of an accepted one its listener's, of a client's "".
    :ivar file: (device, inode) of the socket file; None where that is not told.
    :ivar peer: the inode of the other end; 0 when that is closed; None where it is not told.
    :ivar waiting: the inodes of clients that have connected and are not yet accepted.
    """

    inode: int
    path: str
    listens: bool
    file: tuple[int, int] | None = None
    peer: int | None = None
    waiting: tuple[int, ...] = ()


_NETLINK_SOCK_DIAG = 4
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_TCP_ESTABLISHED, _TCP_LISTEN = 1, 10
_SHOW_NAME, _SHOW_VFS, _SHOW_PEER, _SHOW_ICONS = 1, 2, 4, 8
_NAME, _VFS, _PEER, _ICONS = 0, 1, 2, 3
#: How long the kernel may take to answer, in seconds; it answers at once.
_NETLINK_TIMEOUT_S = 2.0


def from_netlink() -> list[Socket] | None:
    """The Unix stream sockets of our network namespace by unix_diag; None where that is refused.

    Source: linux/unix_diag.h, linux/netlink.h; sock_diag(7).
    """
    import socket

    wanted = 1 << _TCP_ESTABLISHED | 1 << _TCP_LISTEN
    show = _SHOW_NAME | _SHOW_VFS | _SHOW_PEER | _SHOW_ICONS
    body = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, wanted, 0, show, 0, 0)
    header = struct.pack("=IHHII", 16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    found: list[Socket] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(_NETLINK_TIMEOUT_S)
            kernel.sendall(header + body)
            while True:
                for kind, message in _messages(kernel.recv(1 << 18)):
                    if kind == _NLMSG_DONE:
                        return found
                    if kind == _NLMSG_ERROR:
                        return None
                    if message[1] == socket.SOCK_STREAM:
                        found.append(_diagnosed(message))
    except (OSError, AttributeError, struct.error):
        return None


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each netlink message."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        yield kind, data[at + 16 : at + length]
        at += max(16, length + 3 & ~3)


def _diagnosed(message: bytes) -> Socket:
    """A struct unix_diag_msg and the attributes behind it."""
    attributes = {}
    at = 16
    while at + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, at)
        attributes[kind] = message[at + 4 : at + length]
        at += max(4, length + 3 & ~3)
    file = None
    if _VFS in attributes:
        number, device = struct.unpack("=II", attributes[_VFS])
        # The kernel's own dev_t, of 12 and 20 bits.
        file = (os.makedev(device >> 20, device & 0xFFFFF), number)
    icons = attributes.get(_ICONS, b"")
    return Socket(
        inode=struct.unpack_from("=I", message, 4)[0],
        path=os.fsdecode(attributes.get(_NAME, b"").rstrip(b"\0")),
        listens=message[2] == _TCP_LISTEN,
        file=file,
        peer=struct.unpack("=I", attributes[_PEER])[0] if _PEER in attributes else 0,
        waiting=struct.unpack(f"={len(icons) // 4}I", icons),
    )


#: Columns: Num RefCount Protocol Flags Type St Inode Path, of proc(5). Type 1 is a stream, state 3 is connected.
_ROW = re.compile(rb"\S+: \S+ \S+ (?P<flags>\S+) 0001 (?P<state>\S\S) +(?P<inode>[0-9]+)(?: (?P<path>.*))?")
_ACCEPTS = 0x10000


def from_proc(table: str) -> list[Socket] | None:
    """The sockets that *table* (/proc/net/unix) lists, without files, peers and waiting clients; None if unreadable."""
    found = []
    try:
        with open(table, "rb") as rows:
            for row in rows:
                match = _ROW.fullmatch(row.rstrip(b"\n"))
                if not match:
                    continue
                listens = bool(int(match["flags"], 16) & _ACCEPTS)
                if listens or match["state"] == b"03":
                    path = os.fsdecode(match["path"] or b"")
                    found.append(Socket(inode=int(match["inode"]), path=path, listens=listens))
    except OSError:
        return None
    return found
