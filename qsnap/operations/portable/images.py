"""qemu-img, for what it alone can do: read a snapshot out of an image that QEMU has open, and make overlays.

A snapshot's clusters do not change while it is there, so a reader needs no lock (``-U``). A snapshot is named by its
id, because a tag may be there twice. Facts: qemu-img(1).
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from qsnap.errors import NotSupported, QsnapError
from qsnap.host import processes, syscalls
from qsnap.operations.portable import manifest

#: Seconds between two looks at how far it has come.
_LOOK_S = 0.1


class Source(NamedTuple):
    """An image that is copied.

    :ivar options: its block nodes, as qemu-img takes them after ``json:``.
    :ivar snapshot: the id of the snapshot in it; "" for its present contents.
    :ivar backing: the image below it that is not copied, and that one's format.
    """

    options: Mapping[str, Any]
    snapshot: str = ""
    backing: tuple[str, str] | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The arguments for qemu-img that choose it."""
        chosen = ("-l", f"snapshot.id={self.snapshot}") if self.snapshot else ()
        return ("-U", *chosen, f"json:{json.dumps(self.options)}")


class QemuImg:
    """qemu-img, of the same build as a QEMU if it is beside that.

    :param emulator: how QEMU is called.
    :raise NotSupported: it is not installed.
    """

    def __init__(self, emulator: Sequence[str]) -> None:
        found = manifest.program(emulator, "qemu-img")
        if found is None and (on_path := shutil.which("qemu-img")):
            found = (on_path,)
        if found is None:
            raise NotSupported("qemu-img is not installed; on Debian and Ubuntu: sudo apt install qemu-utils")
        self._program = found

    async def size(self, source: Source) -> int:
        """Bytes that a copy takes at the most.

        :raise QsnapError: qemu-img cannot read it.
        """
        told = json.loads(await self.run("measure", "--output=json", "-O", "qcow2", *source.words))
        return int(told["required"])

    async def copy(self, source: Source, path: Path, watch: Callable[[int], None]) -> None:
        """Copy an image to a new one at *path*, with holes where it is zero.

        :param watch: is called with the bytes that are there.
        :raise QsnapError: qemu-img cannot read or write it.
        """
        below = ("-B", source.backing[0], "-F", source.backing[1]) if source.backing else ()
        copying = asyncio.ensure_future(
            self.run("convert", "-O", "qcow2", *below, *source.words, path.name, cwd=path.parent)
        )
        try:
            while not (await asyncio.wait([copying], timeout=_LOOK_S))[0]:
                with suppress(OSError):
                    watch(processes.allocated_bytes(path))
        finally:
            copying.cancel()
            await asyncio.wait([copying])
        copying.result()

    async def cut(self, path: Path, size: int) -> None:
        """Make the disk in a qcow2 image smaller."""
        await self.run("resize", "-q", "-f", "qcow2", "--shrink", path.name, str(size), cwd=path.parent)

    async def run(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run it to its end, and return what it prints. If we are cancelled or killed, it is killed.

        :raise QsnapError: it failed.
        """
        process = await asyncio.create_subprocess_exec(
            *self._program,
            *arguments,
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=syscalls.die_with_parent,
        )
        try:
            out, err = await process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if process.returncode:
            said = err.decode(errors="replace").strip().removeprefix("qemu-img: ")
            raise QsnapError(f"qemu-img {arguments[0]} failed: {said or f'exit code {process.returncode}'}")
        return out.decode(errors="replace")
