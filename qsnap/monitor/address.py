"""The address of a monitor: a user's text, made into a socket address. Pure.

Accepted are a path, ``unix:PATH``, ``tcp:HOST:PORT``, ``telnet:HOST:PORT``, and QEMU's own argument pasted whole, with
its option or without: ``-qmp unix:/run/vm.qmp,server=on,wait=off``, ``socket,id=mon,path=/run/vm.qmp,server=on``. The
error for any other kind of monitor names that kind. (The first bytes show whether TCP carries telnet, not the address.)

Here ``os.path`` serves instead of ``pathlib``, which would take as long to load as a monitor takes to answer.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qsnap.errors import BadUsage

#: sockaddr_un.sun_path holds 108 bytes, the last of them 0 (unix(7)).
MAX_UNIX_PATH_BYTES = 107

_EXAMPLES = "/run/vm.qmp, unix:/run/vm.qmp or tcp:localhost:4444"
_OPTION = re.compile(r"^-{1,2}(qmp|qmp-pretty|monitor|chardev|mon|serial)[ =]+")
_ANOTHER = "give QEMU one more monitor, by -qmp unix:/run/vm.qmp,server=on,wait=off"

#: What QEMU can have a monitor on that qsnap cannot connect to, by the word for it: the rest of a sentence about that
#: monitor (chardev/char.c: qemu_chr_parse_compat; qapi/char.json: ChardevBackendKind).
NO_SOCKET: Mapping[str, str] = {
    "stdio": "is on QEMU's own terminal",
    "pty": "is on a pseudo-terminal",
    "vc": "is in QEMU's window",
    "null": "is connected to nothing",
    "none": "is connected to nothing",
    "file": "is written to a file",
    "pipe": "is on a pipe",
    "udp": "is on UDP",
    "fd": "is on a descriptor that QEMU was given, and belongs to whoever made that",
    "mon": "shares its device with another one (mux), which may have the input",
    "ws": "speaks websocket",
    "wss": "speaks websocket",
    "websocket": "speaks websocket",
    "tn3270": "speaks tn3270",
    "vsock": "is on a vsock",
    "unix-abstract": "is on an abstract socket",
    "abstract": "is on an abstract socket",
    "chardev": "is on a chardev, which is named here and not described: paste what its -chardev says",
}
#: Texts that are not the address of a monitor at all, by their beginning.
_NO_MONITOR = ("ssh", "http", "https", "qemu", "qemu+unix", "qemu+ssh", "qemu+tcp", "qemu+tls")


def obstacle(options: Mapping[str, str]) -> str:
    """Why qsnap cannot connect to a socket chardev with these options, as the rest of a sentence; "" if it can."""
    if "fd" in options:
        return NO_SOCKET["fd"]
    if is_on(options, "mux"):
        return NO_SOCKET["mon"]
    if is_on(options, "abstract"):
        return NO_SOCKET["abstract"]
    option = next((word for word in ("tn3270", "websocket", "tls-creds") if is_on(options, word)), "")
    return f"speaks {option.removesuffix('-creds')}" if option else ""


def is_on(options: Mapping[str, str], key: str) -> bool:
    """Whether a flag is set, as QEMU reads them."""
    return options.get(key, "off") not in ("off", "no", "false", "n")


class UnixAddress(NamedTuple):
    """A Unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpAddress(NamedTuple):
    """A TCP port."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it: a monitor has no password."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse_address(text: str, *, relative_to: str = "") -> Address:
    """The address that *text* means.

    :param relative_to: the directory that relative paths start from. Default: the working directory.
    :raise BadUsage: *text* is not an address; the message shows valid ones.
    """
    address = _parse(text, relative_to)
    if not isinstance(address, UnixAddress):
        return address
    path = expanded(address.path, relative_to)
    if len(path.encode(errors="surrogateescape")) > MAX_UNIX_PATH_BYTES:
        raise BadUsage(
            f"the socket path {path!r} is longer than the {MAX_UNIX_PATH_BYTES} bytes that the system "
            "allows; use a shorter one, or a relative one from a directory nearer to it"
        )
    return UnixAddress(path)


def _parse(text: str, relative_to: str) -> Address:
    given = text.strip()
    if not given or "\0" in given:
        raise BadUsage(f"the monitor address is empty or broken; a good one is {_EXAMPLES}")
    pasted = _OPTION.sub("", given)
    kind, colon, rest = pasted.partition(":")
    if kind in ("unix", "tcp", "telnet") and colon:
        return _socket(kind, rest, given)
    if pasted.startswith("socket,"):
        return _chardev(pasted, given)
    # A plain path may look like anything; QEMU's words and options are seen only where no such file is.
    if os.path.exists(expanded(pasted, relative_to)):
        return _unix(pasted, given)
    _refuse_what_is_no_socket(pasted, given)
    if pasted.startswith("-"):
        raise BadUsage(f"{given!r} is not an option that gives QEMU a monitor; paste what -qmp or -monitor says")
    if colon and kind.lower() in ("unix", "tcp", "telnet"):
        raise BadUsage(f"{given!r}: write {kind.lower()}: in small letters")
    if "/" not in pasted and (port := re.fullmatch(r"([\w.-]*):(\d+)", pasted)):
        raise BadUsage(f"{given!r} looks like a host and port: write tcp:{port[1] or 'localhost'}:{port[2]}")
    if colon and re.fullmatch(r"[A-Za-z][\w+-]*", kind):
        raise BadUsage(
            f"{given!r}: there is no such file, and {kind!r} is not a kind of address; a good one is {_EXAMPLES}"
        )
    return _unix(_fields(pasted)[0], given)


def _socket(kind: str, rest: str, given: str) -> Address:
    """``unix:``, ``tcp:`` or ``telnet:``, with the options that QEMU takes behind it."""
    first, *more = _fields(rest)
    _refuse(obstacle(_flags(more)), given)
    return _unix(first, given) if kind == "unix" else _tcp(first, given)


def _flags(fields: Sequence[str]) -> dict[str, str]:
    return {key: value if equals else "on" for key, equals, value in (field.partition("=") for field in fields)}


def _refuse(reason: str, given: str) -> None:
    if reason:
        raise BadUsage(f"{given!r}: this monitor {reason}; {_ANOTHER}. A good address is {_EXAMPLES}")


def _refuse_what_is_no_socket(pasted: str, given: str) -> None:
    match = re.match(r"(?:mon:)*([\w+-]+)(?=[:,]|$)|(chardev)=", pasted)
    word = (match[1] or match[2]) if match else ""
    if word in _NO_MONITOR:
        raise BadUsage(f"{given!r} is not the address of a QEMU monitor; a good one is {_EXAMPLES}")
    _refuse(NO_SOCKET.get(word, NO_SOCKET["mon"] if pasted.startswith("mon:") else ""), given)


def _fields(text: str) -> list[str]:
    """What stands between single commas; QEMU writes a comma inside a value twice."""
    return [field.replace("\0", ",") for field in text.replace(",,", "\0").split(",")]


def _unix(path: str, given: str) -> UnixAddress:
    if not path:
        raise BadUsage(f"{given!r} does not name a socket; a good address is {_EXAMPLES}")
    return UnixAddress(path)


def expanded(path: str, relative_to: str = "") -> str:
    """A path as a user writes it, with ``~`` as a shell has it (unlike Path.expanduser, also for an unknown user)."""
    return os.path.join(relative_to, os.path.expanduser(path))


def _tcp(text: str, given: str) -> TcpAddress:
    match = re.fullmatch(r"\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]:(?P<p6>\d+)|(?P<host>[^:\s]*):(?P<port>\d+)", text)
    if not match:
        raise BadUsage(f"{given!r} is not a TCP address; a good one is tcp:localhost:4444 or tcp:[::1]:4444")
    port = int(match["p6"] or match["port"])
    if not 0 < port < 65536:
        raise BadUsage(f"{given!r}: a port is 1 to 65535; a good address is tcp:localhost:4444")
    return TcpAddress(match["v6"] or match["host"] or "localhost", port)


def _chardev(text: str, given: str) -> Address:
    options = _flags(_fields(text)[1:])
    _refuse(obstacle(options), given)
    if "path" in options:
        return _unix(options["path"], given)
    if "port" in options:
        return _tcp(f"{options.get('host', '')}:{options['port']}", given)
    raise BadUsage(f"{given!r} has neither path= nor port=; a good address is {_EXAMPLES}")
