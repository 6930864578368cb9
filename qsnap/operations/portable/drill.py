"""The restore drill: export a snapshot to a temporary place, boot it, see that its guest runs, and end it.

Only that shows that a snapshot can be restored: everything is read, by other programs than wrote it, and by a new QEMU.
The guest that it is of runs meanwhile, and so may other qsnaps from the end of the export on.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qsnap.errors import QsnapError, VerifyFailed
from qsnap.model.requests import BootRequest
from qsnap.model.results import DrillResult, ExportResult
from qsnap.operations.portable import manifest
from qsnap.operations.portable.boot import Clone, emulator_of, started
from qsnap.operations.portable.life import sign_of_life
from qsnap.runs.journal import AFTERMATH_TIMEOUT_S
from qsnap.runs.shield import shielded

_PREFIX = "qsnap-drill-"
#: Seconds for which a directory may be without its lock.
_NEW_S = 60.0
#: Seconds between two looks at the serial ports.
_LOOK_S = 0.05
_NOTHING_LEFT = "nothing is left of the drill, and the guest itself was not touched"


async def do_drill(
    export: Callable[[Path], Awaitable[ExportResult]],
    *,
    until: str,
    within_s: float,
    place: Path | None,
    qemu: str | None,
) -> DrillResult:
    """Do the drill.

    :param export: makes the export.
    :param until: the guest must write this to a serial port; "" for nothing.
    :param within_s: seconds for that, and for the guest to show that it runs.
    :param place: where the temporary directory is made. Default: $TMPDIR or /tmp.
    :param qemu: the QEMU to run. Default: the one that the guest runs in.
    :raise VerifyFailed: the export does not start, or the guest does not run, or does not write the text.
    """
    began = time.monotonic()
    async with _place(place) as directory:
        exported = await export(directory / "export")
        export_ms = _since(began)
        about = manifest.read(directory / "export")
        work = directory / "work"
        work.mkdir(mode=0o700)
        request = BootRequest(directory=exported.directory)
        begins = time.monotonic()
        try:
            # The checksums were just taken of what is there
            emulator = emulator_of(about, qemu)
            clone = await started(about, directory / "export", work, emulator, request, is_ours=True)
        except QsnapError as error:
            if type(error) is not QsnapError:
                raise
            raise VerifyFailed(
                exported.tag, [f"it was exported, and does not start: {error}"], _NOTHING_LEFT
            ) from error
        try:
            boot_ms = _since(begins)
            runs = time.monotonic()
            sign, vcpus = await _awaited(clone, exported.tag, until, within_s)
            run_ms = _since(runs)
        finally:
            await shielded(clone.end(), AFTERMATH_TIMEOUT_S)
    return DrillResult(
        tag=exported.tag,
        qemu_version=exported.qemu_version,
        sign=sign,
        until=until,
        vcpus=vcpus,
        export_ms=export_ms,
        boot_ms=boot_ms,
        run_ms=run_ms,
        duration_ms=_since(began),
        warnings=exported.warnings,
    )


async def _awaited(clone: Clone, tag: str, until: str, within_s: float) -> tuple[str, int]:
    """The sign of life, and the number of vCPUs.

    :raise VerifyFailed: the guest does not run, or does not write the text.
    """
    deadline = time.monotonic() + within_s
    pid = clone.process.pid
    if clone.runstate != "running":
        raise VerifyFailed(tag, [f"it starts, and its guest is {clone.runstate}"], _NOTHING_LEFT)
    try:
        sign, vcpus = await sign_of_life(clone.monitor, pid, within_s)
        runstate = await clone.monitor.runstate()
    except QsnapError as error:
        raise VerifyFailed(tag, [f"it starts, and its QEMU does not go on: {error}"], _NOTHING_LEFT) from error
    if not sign or runstate != "running":
        stands = f"its guest is {runstate}" if runstate != "running" else f"no vCPU does anything for {within_s:g} s"
        raise VerifyFailed(tag, [f"it starts, and {stands}"], _NOTHING_LEFT)
    while until and not _is_written(clone.work, until):
        if clone.process.poll() is not None or time.monotonic() > deadline:
            raise VerifyFailed(
                tag, [f"its guest runs, and does not write {until!r} within {within_s:g} s"], _NOTHING_LEFT
            )
        await asyncio.sleep(_LOOK_S)
    return sign, vcpus


def _is_written(work: Path, text: str) -> bool:
    """Whether a text is in the log of a serial port."""
    wanted = text.encode(errors="surrogateescape")
    return any(wanted in log.read_bytes() for log in work.glob("serial*.log"))


def _since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)


@asynccontextmanager
async def _place(parent: Path | None) -> AsyncIterator[Path]:
    """A temporary directory for the duration of a block. What drills left behind that were killed is removed.

    Whoever uses one holds a lock on it (flock).

    :raise QsnapError: it cannot be made.
    """
    where = Path(parent or tempfile.gettempdir())
    try:
        await asyncio.to_thread(_remove_dead, where)
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=where))
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise QsnapError(f"no temporary directory can be made in {where}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield directory
    finally:
        await shielded(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True), AFTERMATH_TIMEOUT_S)
        os.close(lock)


def _remove_dead(where: Path) -> None:
    """Remove the directories of drills that were killed. A new one may not be locked yet."""
    for directory in where.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                info = os.fstat(lock)
                if info.st_uid == os.geteuid() and info.st_mtime < time.time() - _NEW_S:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)
