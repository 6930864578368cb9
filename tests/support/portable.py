"""Exports and clones: what is in a directory, and what a clone's guest says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import qsnap.guest
from support.guest import Qmp, cli, until


def sums(directory: Path) -> dict[str, str]:
    """The checksum of each file, taken by hand."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def manifest(directory: Path) -> Any:
    return json.loads((directory / "manifest.json").read_text())


class Clone:
    """A guest that runs from an export.

    :ivar told: the document of the command that started it.
    """

    def __init__(self, told: Any) -> None:
        self.told = told
        self.pid: int = told["pid"]
        self.directory = Path(told["directory"])

    def lines(self) -> list[tuple[int, int]]:
        """What it has printed since it was started: (counter, differences between RAM and disks)."""
        text = Path(f"{self.told['consoles'][0]}.log").read_text(errors="replace")
        found = re.findall(r"c=([0-9A-F]{8}) bad=([0-9A-F]{4})\r?\n", text)
        return [(int(count, 16), int(bad, 16)) for count, bad in found]

    def assert_goes_on_from(self, first: int, last: int, ticks: int = qsnap.guest.TABLE_SLOTS + 2) -> None:
        """It counts on from a snapshot that was made between these counts, and its disks agree with its RAM."""
        until(f"{ticks} ticks of the clone", lambda: len(self.lines()) > ticks or None)
        lines = self.lines()
        # The first line may have begun before the snapshot, and is cut then
        assert first <= lines[0][0] <= last + 2, (first, lines[0], last)
        assert [count for count, _ in lines] == list(range(lines[0][0], lines[0][0] + len(lines)))
        assert {bad for _, bad in lines} == {0}

    def end(self) -> None:
        """End it; nothing of it is left."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        if self.told["is_temporary"]:
            until("the working directory to go", lambda: not self.directory.exists())
        else:
            until("QEMU to end", lambda: not is_alive(self.pid))

    @contextmanager
    def monitor(self) -> Iterator[Qmp]:
        qmp = Qmp(Path(self.told["monitor"]))
        try:
            yield qmp
        finally:
            qmp.close()


@contextmanager
def booted(directory: Path, *options: str) -> Iterator[Clone]:
    """A clone, for the duration of a block; afterwards nothing of it is left."""
    clone = Clone(cli("boot", str(directory), "--json", *options).json)
    try:
        yield clone
    finally:
        clone.end()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
