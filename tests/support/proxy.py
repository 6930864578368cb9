"""A proxy between qsnap and QEMU's monitor, for what happens between two messages: a hook sees each of them."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Hook = Callable[[dict[str, Any]], None]
#: What becomes of bytes on their way from QEMU.
Change = Callable[[bytes], bytes]


#: What HMP calls it, for what QMP calls it.
HMP_NAMES = {
    "savevm": "snapshot-save",
    "loadvm": "snapshot-load",
    "delvm": "snapshot-delete",
    "info block": "query-block",
    "info block -n -v": "query-named-block-nodes",
    "stop": "stop",
    "cont": "cont",
}


def deed(message: dict[str, Any]) -> str:
    """The command of a message; what HMP calls savevm is a snapshot-save too. "flush" is a loadvm of nothing, which
    makes QEMU drop translated code."""
    line = str(message.get("arguments", {}).get("command-line", ""))
    if line.startswith("loadvm qsnap-none-"):
        return "flush"
    return HMP_NAMES.get(line, HMP_NAMES.get(line.partition(" ")[0], str(message.get("execute", ""))))


def messages(pending: str) -> tuple[list[dict[str, Any]], str]:
    """The whole messages at the beginning of a stream, and the rest; HMP's lines as if they came inside QMP."""
    found = []
    decoder = json.JSONDecoder()
    while pending := pending.lstrip():
        if pending[0] == "{":  # qemu.qmp puts nothing between its messages
            try:
                message, end = decoder.raw_decode(pending)
            except ValueError:
                break
        else:
            line, newline, _ = pending.partition("\n")
            if not newline:
                break
            message, end = {"execute": "hmp", "arguments": {"command-line": line}}, len(line) + 1
        pending = pending[end:]
        found.append(message)
    return found, pending


class Proxy:
    """Listens at ``address``, and connects each client on to QEMU.

    :param address: a socket file to make; None for a TCP port.
    :ivar target: QEMU's socket, for the next client.
    :ivar commands: the names of the commands that have passed.
    """

    def __init__(
        self, target: str, address: Path | None, *, on_command: Hook | None = None, on_data: Change | None = None
    ) -> None:
        self.commands: list[str] = []
        self.target = target
        self._on_command = on_command
        self._on_data = on_data
        self._sockets: list[socket.socket] = []
        if address is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(address))
            self.address = str(address)
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._sockets += [client, server]
                try:
                    server.connect(self.target)
                except OSError:
                    client.shutdown(socket.SHUT_RDWR)
                    continue
                for source, sink, hook in ((client, server, self._saw), (server, client, None)):
                    thread = threading.Thread(target=self._pump, args=(source, sink, hook), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _saw(self, message: dict[str, Any]) -> None:
        self.commands.append(deed(message))
        if self._on_command:
            self._on_command(message)

    def _pump(self, source: socket.socket, sink: socket.socket, hook: Hook | None) -> None:
        pending = ""
        with suppress(OSError):
            while True:
                # With whatever files come along
                data, files, _, _ = socket.recv_fds(source, 65536, 4)
                if not data:
                    break
                if hook:
                    passing, pending = messages(pending + data.decode())
                    for message in passing:
                        hook(message)
                if self._on_data and not hook:
                    data = self._on_data(data)
                if files:
                    socket.send_fds(sink, [data], files)
                    for file in files:
                        os.close(file)
                else:
                    sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break every connection."""
        for sock in list(self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def refuse(self) -> None:
        """Take no more connections, and break those that there are."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def close(self) -> None:
        """End it."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for sock in self._sockets:
            sock.close()


Intercept = Callable[..., Proxy]
"""Starts a proxy in front of a guest: the fixture ``intercept``."""
