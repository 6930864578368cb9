"""Where a monitor is: what a user writes, made into a socket address. Pure.

Taken are a path, ``unix:PATH``, ``tcp:HOST:PORT``, and QEMU's own argument pasted whole, with its option or
without: ``-qmp unix:/run/vm.qmp,server=on,wait=off``, ``socket,id=mon,path=/run/vm.qmp,server=on``.

Here ``os.path`` serves instead of ``pathlib``, which would take as long to load as a monitor takes to answer.
"""

from __future__ import annotations

import os.path
import re
from typing import NamedTuple

from qsnap.errors import BadUsage

#: sockaddr_un.sun_path holds 108 bytes, the last of them 0 (unix(7)).
MAX_UNIX_PATH_BYTES = 107

_EXAMPLES = "/run/vm.qmp, unix:/run/vm.qmp or tcp:localhost:4444"
_OPTION = re.compile(r"^-{1,2}(qmp|qmp-pretty|monitor|chardev|mon)[ =]+")


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
    :raise BadUsage: none; the message shows good ones.
    """
    address = _parse(text, relative_to)
    if not isinstance(address, UnixAddress):
        return address
    path = _path(address.path, relative_to)
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
    kind, _, rest = pasted.partition(":")
    if kind == "unix":
        return _unix(_first_field(rest), given)
    if kind == "tcp":
        return _tcp(_first_field(rest), given)
    if pasted.startswith("socket,"):
        return _chardev(pasted, given)
    if kind in ("stdio", "pty", "vc", "null", "file", "telnet", "ssh", "qemu+unix") and rest + kind == pasted:
        raise BadUsage(f"{given!r} is no monitor socket; a good address is {_EXAMPLES}")
    if "/" not in pasted and re.fullmatch(r"[\w.-]+:\d+", pasted):
        raise BadUsage(f"{given!r} looks like a host and port: write tcp:{pasted}")
    # A plain path may hold commas of its own; QEMU's options follow only where no such file is.
    if "," in pasted and not os.path.exists(_path(pasted, relative_to)):
        return _unix(_first_field(pasted), given)
    return _unix(pasted, given)


def _first_field(text: str) -> str:
    """*text* up to its first single comma; QEMU writes a comma inside a value twice."""
    return _fields(text)[0]


def _fields(text: str) -> list[str]:
    return [field.replace("\0", ",") for field in text.replace(",,", "\0").split(",")]


def _unix(path: str, given: str) -> UnixAddress:
    if not path:
        raise BadUsage(f"{given!r} names no socket; a good address is {_EXAMPLES}")
    return UnixAddress(path)


def _path(path: str, relative_to: str) -> str:
    return os.path.join(relative_to, os.path.expanduser(path))


def _tcp(text: str, given: str) -> TcpAddress:
    match = re.fullmatch(r"\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]:(?P<p6>\d+)|(?P<host>[^:\s]*):(?P<port>\d+)", text)
    if not match:
        raise BadUsage(f"{given!r} is no TCP address; a good one is tcp:localhost:4444 or tcp:[::1]:4444")
    port = int(match["p6"] or match["port"])
    if not 0 < port < 65536:
        raise BadUsage(f"{given!r}: a port is 1 to 65535; a good address is tcp:localhost:4444")
    return TcpAddress(match["v6"] or match["host"] or "localhost", port)


def _chardev(text: str, given: str) -> Address:
    options = dict(field.partition("=")[::2] for field in _fields(text)[1:])
    if "path" in options:
        return _unix(options["path"], given)
    if "port" in options:
        return _tcp(f"{options.get('host', '')}:{options['port']}", given)
    raise BadUsage(f"{given!r} has neither path= nor port=; a good address is {_EXAMPLES}")
