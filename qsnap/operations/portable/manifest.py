"""The manifest of an export: what is in the directory, where it comes from, and how it is started.

Everything is started in a directory of its own, the working directory, with a link ``export`` to the directory of the
export; there are the overlays, the sockets and the logs. So the arguments are the same wherever both are.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from qsnap.errors import QsnapError
from qsnap.host import files
from qsnap.model import typed
from qsnap.model.qemu import Struct
from qsnap.targets.portable import EXPORT

FORMAT = 1
MANIFEST = "manifest.json"
README = "README.txt"
START = "start.sh"
#: The VM state: the stream as it is in a migration.
STATE = "state"
#: The monitor's socket in the working directory.
MONITOR = "qmp"
#: The name of a disk's file; its overlay has the same.
_DISK = re.compile(r"disk\d+\.qcow2")
_PIECE = 4 << 20


class ExportedFile(Struct, frozen=True):
    """A file of an export."""

    name: str
    """Relative to the directory."""
    size: int
    sha256: str


class ExportedDisk(Struct, frozen=True):
    """A disk or medium of an export: a qcow2 image."""

    file: str
    device: str
    """What people call it."""
    is_read_only: bool = False
    """A medium: it gets no overlay."""
    backing: str = ""
    """The image that it stands on, if that was not copied."""


class Manifest(Struct, frozen=True):
    """What an export consists of, and how it is started."""

    tag: str
    date: datetime
    """When the snapshot was made."""
    vm_clock_ns: int
    vm_state_size: int
    name: str
    """The guest's ``-name``; "" without one."""
    qemu_version: str
    machine: str
    """The machine type of the VM state."""
    emulator: tuple[str, ...]
    """How QEMU was called on the machine where the export was made, without its arguments."""
    arguments: tuple[str, ...]
    """QEMU's arguments, without those that load the state."""
    consoles: tuple[str, ...]
    """The sockets of its serial ports; the log of each has ``.log`` behind its name."""
    disks: tuple[ExportedDisk, ...]
    files: tuple[ExportedFile, ...]
    """All files but the manifest itself."""
    is_isolated: bool = False
    """QEMU is started in a network namespace of its own, and may make taps there (unshare(1), -r and -n)."""
    warnings: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def isolation(self) -> tuple[str, ...]:
        """What comes before the program."""
        return ("unshare", "--map-root-user", "--net", "--") if self.is_isolated else ()

    @property
    def loading(self) -> tuple[str, ...]:
        """The arguments that load the state."""
        return ("-incoming", f"exec:cat {EXPORT}/{STATE}")

    @property
    def overlays(self) -> Iterator[tuple[str, ...]]:
        """The arguments of qemu-img that make the overlays, in the working directory."""
        for disk in self.disks:
            if not disk.is_read_only:
                yield ("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"{EXPORT}/{disk.file}", disk.file)

    def read_me(self) -> str:
        """The text for whoever finds the directory."""
        warnings = "".join(f"* {warning}\n" for warning in self.warnings)
        return (
            f"This is snapshot {self.tag!r} of a QEMU guest{f' called {self.name!r}' if self.name else ''}, made "
            f"{self.date.isoformat()} by QEMU {self.qemu_version}.\n\n"
            f"To start it:          qsnap boot DIRECTORY\n"
            f"Without qsnap:        ./{START}   (the comment in it says more)\n\n"
            f"{MANIFEST} says what is in here, and the SHA-256 of each file. {STATE} holds the guest's memory: whoever "
            "can read it can read what the guest had in its RAM. The guest writes only to overlays, which are made "
            f"when it is started. It needs QEMU {self.qemu_version} or later, with the machine type {self.machine}.\n"
            + (f"\n{warnings}" if warnings else "")
        )

    def script(self) -> str:
        """A shell script that starts it by hand."""
        overlays = "\n".join(f'"${{QEMU_IMG:-qemu-img}}" {shlex.join(line)}' for line in self.overlays)
        monitors = ("-qmp", f"unix:{MONITOR},server=on,wait=off", "-monitor", "stdio")
        words = (*self.arguments, *monitors, *self.loading)
        return _SCRIPT.format(
            tag=" ".join(shlex.quote(self.tag).split()),
            qemu=shlex.quote(Path(called(self.emulator)[-1]).name),
            overlays=overlays,
            isolation="".join(f"{word} " for word in self.isolation),
            arguments=shlex.join(words),
        )


_SCRIPT = """#!/bin/sh
# Starts the guest as it was in snapshot {tag}, without qsnap: start.sh [WORKING-DIRECTORY [QEMU OPTIONS]]
# The guest is paused, as savevm leaves it in the state: type c (cont) in QEMU's monitor, which is on this terminal.
# The working directory gets overlays, sockets and logs. By default it is a new one in /tmp, which stays.
# QEMU and QEMU_IMG in the environment choose the programs.
set -e
here=$(cd "$(dirname "$0")" && pwd)
directory=${{1:-$(mktemp -d)}}
[ $# -eq 0 ] || shift
mkdir -p "$directory"
cd "$directory"
ln -sfn "$here" export
{overlays}
echo "QEMU runs in $directory, with a QMP monitor at $directory/qmp. The guest is paused: c lets it run" >&2
exec {isolation}"${{QEMU:-{qemu}}}" {arguments} "$@"
"""


def read(directory: Path) -> Manifest:
    """The manifest of the export in *directory*.

    :raise QsnapError: it is not an export, or is damaged, or of a later qsnap.
    """
    path = directory / MANIFEST
    try:
        manifest = typed.decode(files.read(path), Manifest)
    except FileNotFoundError as error:
        raise QsnapError(f"{directory} is not an export of qsnap: there is no {MANIFEST} in it") from error
    except OSError as error:
        raise QsnapError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise QsnapError(f"{path} is damaged, or of a later qsnap: {error}") from error
    if not all(_DISK.fullmatch(disk.file) for disk in manifest.disks):
        raise QsnapError(f"{path} is damaged: it names a disk that no export has")
    if manifest.format != FORMAT:
        raise QsnapError(f"{path} is of a later qsnap: its format is {manifest.format}")
    return manifest


def damages(directory: Path, manifest: Manifest, *, sums: bool, ended: Callable[[], bool]) -> list[str]:
    """What is wrong with the files of an export, a clause each.

    :param sums: compare the checksums, too, which reads all of it; else only the sizes.
    :param ended: whether somebody wants it to end.
    """
    found = []
    for file in manifest.files:
        path = directory / file.name
        try:
            opened = files.opened(path)
        except OSError as error:
            found.append(f"{file.name}: {error.strerror}")
            continue
        try:
            size = os.fstat(opened).st_size
            if size != file.size:
                found.append(f"{file.name} has {size:,} bytes instead of {file.size:,}")
            elif sums and checksum(opened, ended) != file.sha256:
                found.append(f"{file.name} has another checksum than when it was exported")
        except OSError as error:
            found.append(f"{file.name} cannot be read: {error.strerror}")
        finally:
            os.close(opened)
    return found


def checksum(file: int, ended: Callable[[], bool], told: Callable[[int], None] = lambda _: None) -> str:
    """The SHA-256 of an open file.

    :param told: is called with the bytes that have been read since the last call.
    :raise InterruptedError: somebody wants it to end.
    """
    sum_ = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    begin = 0
    while got := os.preadv(file, [buffer], begin):
        if ended():
            raise InterruptedError
        sum_.update(buffer[:got])
        begin += got
        told(got)
    return sum_.hexdigest()


def called(emulator: Sequence[str]) -> Sequence[str]:
    """How an emulator is called, without the places of its firmware; the last word is its file.

    :param emulator: as :attr:`Manifest.emulator`.
    """
    words = list(emulator) or ["qemu-system-x86_64"]
    while len(words) > 1 and words[-2] == "-L":
        del words[-2:]
    return words


def program(emulator: Sequence[str], name: str) -> tuple[str, ...] | None:
    """How to call the tool *name* from beside an emulator, by the same loader; None if it is not there."""
    *loader, qemu = called(emulator)
    beside = Path(qemu).with_name(name)
    return (*loader, str(beside)) if "/" in qemu and beside.is_file() else None
