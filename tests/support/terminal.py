"""qsnap on a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import unicodedata


def on_terminal(
    *args: str,
    columns: int = 200,
    env: dict[str, str] | None = None,
    program: tuple[str, ...] = (sys.executable, "-m", "qsnap"),
    interrupt_at: str = "",
) -> str:
    """What qsnap writes when both outputs are a terminal.

    :param interrupt_at: it gets a SIGINT as soon as it has written that.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", **(env or {})}
    environment.pop("COLUMNS", None)
    environment.pop("QSNAP_MONITOR", None)
    process = subprocess.Popen([*program, *args], stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    chunks = []
    try:
        while chunk := os.read(master, 65536):
            chunks.append(chunk)
            if interrupt_at and interrupt_at in b"".join(chunks).decode(errors="replace"):
                process.send_signal(signal.SIGINT)
                interrupt_at = ""
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(master)
        process.wait(60)
    return b"".join(chunks).decode()


def lines_on_terminal(*args: str, columns: int = 80) -> list[str]:
    """Its lines without colours, as they are at the end; none is wider than the terminal."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_terminal(*args, columns=columns))
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip("\n").split("\n")]
    assert max(map(cells, lines)) <= columns, lines
    return lines


def cells(text: str) -> int:
    """The columns of a terminal that *text* takes."""
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text if not unicodedata.combining(char))
