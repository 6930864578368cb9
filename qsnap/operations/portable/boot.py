"""Boot: a QEMU that goes on from an export, on overlays of its own. The export is only read.

QEMU gets the VM state as an incoming migration, and not as a snapshot: it then only reads it, so any number of clones
can be started from one export at once. Each has a working directory with its overlays, its sockets and its logs; a
temporary one is removed when QEMU ends, whatever ends it: a process waits for the end of a pipe that QEMU holds.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from qsnap.errors import BadUsage, CommandFailed, MonitorError, NotSupported, QsnapError
from qsnap.host import files, syscalls
from qsnap.model.qemu import RunState
from qsnap.model.requests import BootRequest
from qsnap.model.results import BootResult
from qsnap.monitor import GREETING_TIMEOUT_S, Monitor, open_monitor
from qsnap.monitor.address import UnixAddress
from qsnap.operations.portable import manifest
from qsnap.operations.portable.images import QemuImg
from qsnap.operations.portable.manifest import MONITOR, Manifest
from qsnap.runs.shield import in_thread
from qsnap.targets.command_line import qemu_arguments
from qsnap.targets.portable import EXPORT, joined

#: Seconds between two looks at a QEMU that loads.
_LOOK_S = 0.02
#: Seconds for a QEMU to end that is killed, and for one to end by itself whose monitor has gone.
_END_S = 10.0
#: The most bytes of the path of a socket (unix(7)).
_SOCKET_PATH = 107
#: What QEMU prints, in its working directory; and how much of its end a message quotes.
LOG = "log"
_QUOTED_LINES = 8
#: Options of the user's that are instead of those of the export: QEMU would take both.
_INSTEAD = ("-accel", "-cpu")
#: Waits until nobody holds the other end of standard input, and removes the directory.
_REMOVER = 'cat >/dev/null; cd /; rm -rf -- "$1"'

#: Guests that run on when we have ended. Python complains of a process that nobody waits for.
_left_running: list[subprocess.Popen[bytes]] = []


class _NotLoaded(Exception):
    """QEMU did not come up; the text is a clause."""


class Clone(NamedTuple):
    """A QEMU that has loaded an export.

    :ivar work: its working directory.
    """

    process: subprocess.Popen[bytes]
    work: Path
    monitor: Monitor
    runstate: RunState

    async def end(self) -> None:
        """End it, and wait until it has ended."""
        await self.monitor.aclose()
        end(self.process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that qsnap started, and wait for its end; its output is discarded."""
    with suppress(ProcessLookupError):
        process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)


async def boot(request: BootRequest) -> BootResult:
    """Start a QEMU from an export, and leave it running.

    :raise QsnapError: it is not an export, or is damaged; or QEMU does not start, or does not load it: its log is
        quoted, and nothing is left.
    :raise NotSupported: QEMU or qemu-img is not installed.
    """
    began = time.monotonic()
    directory = await asyncio.to_thread(Path(request.directory).absolute)
    about = manifest.read(directory)
    if damages := await in_thread(
        lambda ended: manifest.damages(directory, about, sums=request.checks_sums, ended=ended.is_set)
    ):
        raise QsnapError(f"the export in {directory} is damaged: {'; '.join(damages)}")
    emulator = emulator_of(about, request.qemu)
    with _work_directory(request.work) as work:
        reader, writer = os.pipe()
        try:
            clone = await started(about, directory, work, emulator, request, held=(writer,))
            if request.work is None:
                _remove_when_closed(reader, work)
        finally:
            os.close(reader)
            os.close(writer)
        version = clone.monitor.version
        await clone.monitor.aclose()
        _left_running.append(clone.process)
    return BootResult(
        tag=about.tag,
        pid=clone.process.pid,
        directory=str(work),
        is_temporary=request.work is None,
        monitor=str(work / MONITOR),
        consoles=tuple(str(work / name) for name in about.consoles),
        qemu_version=str(version),
        runstate=clone.runstate,
        duration_ms=round((time.monotonic() - began) * 1000, 3),
    )


def _remove_when_closed(reader: int, work: Path) -> None:
    """Have a directory removed when nobody holds the other end of a pipe any more."""
    _left_running.append(
        subprocess.Popen(
            ["/bin/sh", "-c", _REMOVER, "sh", str(work)],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )


@contextmanager
def _work_directory(named: str | None) -> Iterator[Path]:
    """The working directory, new; removed again if the block fails.

    :raise QsnapError: it exists, or cannot be made.
    """
    try:
        if named is None:
            work = Path(tempfile.mkdtemp(prefix="qsnap-boot-"))
        else:
            work = Path(named).absolute()
            work.mkdir(mode=0o700)
    except OSError as error:
        raise QsnapError(f"the working directory {named or ''} cannot be made: {error.strerror}") from error
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def emulator_of(about: Manifest, named: str | None) -> tuple[str, ...]:
    """How to call the QEMU for an export.

    :param named: the one that the user wants.
    :raise NotSupported: it is not installed.
    :raise QsnapError: the export names another program.
    """
    if named is not None:
        if shutil.which(named) is None:
            raise NotSupported(f"{named} is not installed")
        return (named,)
    words = manifest.called(about.emulator)
    if qemu_arguments(words) is None:
        raise QsnapError(f"{' '.join(about.emulator)}, which the export names, is not a QEMU; name one: --qemu PROGRAM")
    name = Path(words[-1]).name
    if "/" in words[-1] and all(os.access(word, os.X_OK) for word in (words[0], words[-1])):
        return about.emulator
    found = shutil.which(name)
    if found is None:
        raise NotSupported(f"{name} is not installed; name a QEMU: --qemu PROGRAM")
    return (found,)


async def _older(emulator: Sequence[str], about: Manifest) -> str:
    """A clause that says so if a QEMU is older than the one that has saved the state; "" if not, or if unknown."""
    with suppress(OSError, AttributeError, ValueError):
        process = await asyncio.create_subprocess_exec(
            *emulator, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        text = (await process.communicate())[0].decode(errors="replace")
        version = re.search(r"version (\d+\.\d+\.\d+)", text)[1]  # type: ignore[index]
        now, then = ([int(number) for number in one.split(".")[:2]] for one in (version, about.qemu_version))
        if now < then:
            return f"it is QEMU {version}, and the state was saved by {about.qemu_version}; "
    return ""


async def started(
    about: Manifest,
    directory: Path,
    work: Path,
    emulator: Sequence[str],
    request: BootRequest,
    *,
    held: Sequence[int] = (),
    is_ours: bool = False,
) -> Clone:
    """A QEMU that has loaded the state, and whose guest runs unless the request says otherwise.

    :param work: its working directory, which is empty.
    :param held: descriptors that it is to hold.
    :param is_ours: it is to end with us, and no other qsnap is to find it among the running VMs.
    :raise QsnapError: it did not start or did not load the state. It has ended.
    """
    if len(os.fsencode(work / MONITOR)) > _SOCKET_PATH:
        raise BadUsage(f"the path {work} is too long for a socket in it; choose a shorter one, or set TMPDIR")
    (work / EXPORT).symlink_to(directory)
    images = QemuImg(emulator)
    await asyncio.gather(*(images.run(*line, cwd=work) for line in about.overlays))
    words = [*about.isolation, *emulator, *_arguments(about, request)]
    listener: socket.socket | None = None
    if is_ours:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(work / MONITOR))
        listener.listen(1)
        # One without an address is not found: see qsnap.targets.command_line
        chardev = f"socket,id=qsnap-monitor,fd={listener.fileno()},server=on,wait=off"
        words += ["-chardev", chardev, "-mon", "chardev=qsnap-monitor,mode=control"]
        held = (*held, listener.fileno())
    else:
        words += ["-qmp", f"unix:{MONITOR},server=on,wait=off", "-name", _name(about)]
    words += ["-S", *about.loading, *request.options]
    log = files.created(work / LOG)
    try:
        process = _spawned(words, work, log, held, is_ours=is_ours)
    except OSError as error:
        raise QsnapError(f"{words[0]} cannot be run: {error.strerror}") from error
    finally:
        os.close(log)
        if listener is not None:
            listener.close()
    try:
        return await _loaded(process, work, request)
    except BaseException as error:
        said = _log_of(process, work)
        end(process)
        if not isinstance(error, _NotLoaded):
            raise
        raise QsnapError(f"{error}; {await _older(emulator, about)}{said}") from error


def _spawned(
    words: Sequence[str], work: Path, log: int, held: Sequence[int], *, is_ours: bool
) -> subprocess.Popen[bytes]:
    # In this thread: a process that ends with its parent ends with the thread that has started it
    return subprocess.Popen(
        words,
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=tuple(held),
        start_new_session=True,
        preexec_fn=syscalls.die_with_parent if is_ours else None,
    )


def _name(about: Manifest) -> str:
    """Another name than that of the guest it was made of, which may run on the same machine."""
    return joined({"guest": f"{about.name or 'guest'}@{about.tag}"})


def _arguments(about: Manifest, request: BootRequest) -> Iterator[str]:
    """The export's arguments, as the request wants them."""
    words = iter(about.arguments)
    for word in words:
        if word in _INSTEAD and word in request.options:
            next(words)
        elif word in ("-netdev", "-nic", "-net") and request.network:
            yield from (word, _networked(next(words)))
        else:
            yield word


def _networked(value: str) -> str:
    """The value of an option that connects the network card to QEMU's user network."""
    return re.sub(r"^hubport,hubid=\d+", "user", value.removesuffix(",restrict=on"))


async def _loaded(process: subprocess.Popen[bytes], work: Path, request: BootRequest) -> Clone:
    """Wait until QEMU has loaded the state, and have the guest run.

    :raise _NotLoaded: it ended, or takes too long.
    """
    deadline = time.monotonic() + request.within_s
    monitor: Monitor | None = None
    try:
        while True:
            if process.poll() is not None:
                raise _NotLoaded("QEMU did not load the export")
            if time.monotonic() > deadline:
                raise _NotLoaded(f"QEMU has not loaded the export within {request.within_s:g} s")
            with suppress(MonitorError):
                if monitor is None:
                    monitor = await open_monitor(UnixAddress(str(work / MONITOR)), timeout_s=GREETING_TIMEOUT_S)
                if await monitor.runstate() is not RunState.INMIGRATE:
                    break
            await asyncio.sleep(_LOOK_S)
        runstate = await monitor.runstate()
        if not request.paused and runstate in (RunState.PAUSED, RunState.PRELAUNCH):
            try:
                await monitor.cont()
            except CommandFailed as error:
                raise _NotLoaded(f"the guest does not run: {error.reason}") from error
            runstate = await monitor.runstate()
        return Clone(process, work, monitor, runstate)
    except BaseException:
        if monitor is not None:
            await monitor.aclose()
        raise


def _log_of(process: subprocess.Popen[bytes], work: Path) -> str:
    """What QEMU has printed, as a clause."""
    with suppress(OSError):
        lines = (work / LOG).read_text(errors="replace").strip().splitlines()[-_QUOTED_LINES:]
        if lines:
            return "its log: " + "; ".join(lines)
    return "it has printed nothing" + ("" if process.returncode is None else f", exit code {process.returncode}")
