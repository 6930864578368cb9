"""A guest's RAM, written from outside: through QEMU's gdb stub, whatever the architecture and the accelerator."""

from __future__ import annotations

import re
import socket
from pathlib import Path


class Stub:
    """QEMU's gdb stub, as far as it reads and writes memory. QEMU stops the guest as soon as it is connected.

    :param path: the socket of QEMU's ``-gdb``.
    """

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(10)
        self._sock.connect(str(path))
        self._pending = b""

    def __call__(self, packet: str) -> str:
        self._sock.sendall(f"${packet}#{sum(packet.encode()) % 256:02x}".encode())
        while True:
            while not (found := re.search(rb"\$([^#]*)#..", self._pending)):
                self._pending += self._sock.recv(4096)
            self._pending = self._pending[found.end() :]
            self._sock.sendall(b"+")
            if not found[1].startswith(b"T"):  # a stop of the guest, which comes at any time
                return found[1].decode()

    def close(self) -> None:
        self._sock.close()
