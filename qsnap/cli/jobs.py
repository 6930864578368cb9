"""Commands around a command of the user's: ``run`` puts the guest back after it, ``ensure`` has it provision the guest.

The exit code is the command's own. What fails of ours has codes that few commands use (those of env, timeout and
xargs), and never takes the place of a failure of the command's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import click

from qsnap.cli import options as given
from qsnap.cli.options import common_options, completes, excluded
from qsnap.cli.text import printable
from qsnap.errors import BadUsage, Interrupted, QsnapError, SnapshotNotFound

if TYPE_CHECKING:
    from qsnap.choice import Target
    from qsnap.cli.session import Options
    from qsnap.config import Settings
    from qsnap.model import LoadResult, SaveResult, Snapshot
    from qsnap.vm import VM

_T = TypeVar("_T")

#: The command succeeded, and what was to be done after it did not.
FAILED_AFTER = 123
#: --timeout ended the command.
TIMED_OUT = 124
#: What was to be done before the command failed; it was not run.
FAILED_BEFORE = 125
#: The command cannot be executed, or is not there.
NOT_EXECUTABLE = 126
NOT_FOUND = 127

#: What these mean, as the help and the README say.
EXIT_TABLE = (
    ("123", "the command succeeded, and what was to be done after it failed"),
    ("124", "`--timeout` has ended the command"),
    ("125", "what was to be done before the command failed; it was not run"),
    ("126", "the command cannot be executed"),
    ("127", "the command was not found"),
    ("128 + n", "signal n has ended the command"),
)
_EXITS = "\b\nExit codes: the command's own, and\n" + "\n".join(
    f"  {code:<9} {meaning.replace('`', '')}" for code, meaning in EXIT_TABLE
)

#: Seconds that a command whose time is over has to end by itself.
GRACE_S = 10.0
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

_command = click.argument("command", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)


@click.command(context_settings={"allow_interspersed_args": False}, epilog=_EXITS)
@click.option("--revert", is_flag=True, help="Put the guest back to where it was before the command.")
@click.option(
    "--revert-to", metavar="TAG", shell_complete=completes("tags"), help="Put the guest back to that snapshot instead."
)
@click.option(
    "--save-on-fail", metavar="TAG", help="If the command fails, save the guest as TAG, before it is put back."
)
@given.exclude
@common_options
@_command
def run(
    options: Options,
    revert: bool,
    revert_to: str | None,
    save_on_fail: str | None,
    exclude: tuple[str, ...],
    command: tuple[str, ...],
) -> int:
    """Run a command, and put the guest back afterwards.

    The monitor is free while the command runs: it may use qsnap itself. For --revert the guest is saved under a tag of
    its own (qsnap-run-…), which is deleted when the guest is back. --timeout bounds the command, and each step of ours
    before and after it.
    """
    if revert and revert_to is not None:
        raise BadUsage("--revert and --revert-to exclude each other")
    job = _Job(options, exclude)
    tag = revert_to
    with _signals_kept():
        try:
            was_running = job.step(lambda vm, _: _is_running(vm))
            if revert_to is not None:
                job.step(lambda vm, settings: _loadable(vm, revert_to, job.excluded(settings)))
            if revert:
                tag = f"qsnap-run-{datetime.now().astimezone():%Y%m%dT%H%M%S}-{os.getpid()}"
                job.save(tag)
        except QsnapError as error:
            return _not_run(error)
        code = _executed(command, options.timeout_s)
        troubles: list[QsnapError] = []
        if code and save_on_fail is not None:
            job.attempt(troubles, lambda: job.save(save_on_fail))
        if tag is not None:
            job.attempt(troubles, lambda: job.load(tag, running=was_running if revert else None))
        if revert and not troubles:
            job.attempt(troubles, lambda: job.step(lambda vm, _: vm.delete(tag or "", missing_ok=True)))
        return code or (FAILED_AFTER if troubles else 0)


@click.command(epilog=_EXITS)
@given.tag
@given.exclude
@common_options
@_command
def ensure(options: Options, tag: str, exclude: tuple[str, ...], command: tuple[str, ...]) -> int:
    """Load snapshot TAG; if there is none, run a command that provisions the guest, and save TAG.

    So the second job of a machine begins where the first had got to. If the command fails, nothing is saved. A TAG that
    cannot be loaded, because it is not whole, is made anew.
    """
    job = _Job(options, exclude)
    with _signals_kept():
        try:
            found = job.step(lambda vm, settings: _found(vm, tag, job.excluded(settings)))
            if found:
                job.load(tag)
                return 0
        except QsnapError as error:
            return _not_run(error)
        if code := _executed(command, options.timeout_s):
            _say(f"the command failed ({code}), so {tag!r} was not saved")
            return code
        troubles: list[QsnapError] = []
        job.attempt(troubles, lambda: job.save(tag))
        return FAILED_AFTER if troubles else 0


class _Job:
    """The steps of ours around a command, each with a connection of its own to the same VM."""

    def __init__(self, options: Options, exclude: tuple[str, ...]) -> None:
        self._options = options
        self._exclude = exclude
        self._meant: Target | None = None

    def excluded(self, settings: Settings) -> tuple[str, ...]:
        """The devices that are left out."""
        return excluded(self._exclude, settings)

    def step(self, action: Callable[[VM, Settings], Awaitable[_T]]) -> _T:
        """Do one thing with the VM.

        :raise QsnapError: it failed, or a signal has ended it.
        """
        from qsnap.cli.session import chosen, run_on

        if self._meant is None:
            self._meant = chosen(self._options)
        try:
            return run_on(self._options, self._meant, action)
        finally:
            # The command may start it anew: then it is another process at the same address
            self._meant = self._meant._replace(pid=None)
            _keep_signals()

    def attempt(self, troubles: list[QsnapError], deed: Callable[[], object]) -> None:
        """Do what is to be done whatever went wrong before; say what goes wrong."""
        try:
            deed()
        except QsnapError as error:
            troubles.append(error)
            _say(str(error))

    def save(self, tag: str) -> None:
        """Save the guest, as the config file says."""

        async def save(vm: VM, settings: Settings) -> SaveResult:
            return await vm.save(
                tag, vmstate=settings.vmstate, exclude=self.excluded(settings), live=settings.live or False
            )

        result = self.step(save)
        with redirect_stdout(sys.stderr):
            self._options.renderer.save(result)

    def load(self, tag: str, *, running: bool | None = None) -> None:
        """Put the guest back."""

        async def load(vm: VM, settings: Settings) -> LoadResult:
            return await vm.load(tag, running=running, exclude=self.excluded(settings))

        result = self.step(load)
        with redirect_stdout(sys.stderr):
            self._options.renderer.load(result)


async def _is_running(vm: VM) -> bool:
    from qsnap.model import RunState

    return (await vm.status()).runstate is RunState.RUNNING


async def _found(vm: VM, tag: str, left_out: Sequence[str]) -> Snapshot | None:
    """The snapshot of that tag, if it can be loaded."""
    from qsnap.health import is_sound

    named = [one for one in await vm.list() if one.tag == tag]
    if not named:
        return None
    nodes = (await vm.check(exclude=left_out)).excluded if left_out else ()
    if sound := next((one for one in named if is_sound(one, nodes)), None):
        return sound
    _say(f"snapshot {tag!r} is {named[0].kind}, and cannot be loaded")
    return None


async def _loadable(vm: VM, tag: str, left_out: Sequence[str]) -> Snapshot:
    found = await _found(vm, tag, left_out)
    if found is None:
        raise SnapshotNotFound(tag, f"there is no snapshot {tag!r} that can be loaded")
    return found


def _not_run(error: QsnapError) -> int:
    _say(f"the command was not run: {error}")
    return 128 + error.signum if isinstance(error, Interrupted) else FAILED_BEFORE


def _say(text: str) -> None:
    sys.stderr.write(printable(f"qsnap: {text}", keep_newlines=True) + "\n")


def _executed(command: Sequence[str], timeout_s: float | None) -> int:
    """Run the command to its end, with our streams, and pass signals on to it; its exit code, as a shell has it."""
    with suppress(OSError, ValueError):
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)  # what is ignored here would be there
    running: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(signum: int, _: FrameType | None) -> None:
        if not running:
            early.append(signum)
        # Ctrl-C reaches it by itself
        elif not (signum in (signal.SIGINT, signal.SIGQUIT) and _is_in_foreground()):
            with suppress(ProcessLookupError):
                running[0].send_signal(signum)

    for signum in _PASSED_ON:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, pass_on)
    try:
        process = subprocess.Popen(command)
        running.append(process)
        for received in early:
            process.send_signal(received)
        code = process.wait(timeout_s)
    except FileNotFoundError:
        _say(f"{command[0]}: not found")
        return NOT_FOUND
    except (OSError, ValueError) as error:
        _say(f"{command[0]}: {getattr(error, 'strerror', None) or error}")
        return NOT_EXECUTABLE
    except subprocess.TimeoutExpired:
        _say(f"the command was not done within {timeout_s:g} s; it is ended")
        _end(process)
        return TIMED_OUT
    finally:
        _keep_signals()
    return code if code >= 0 else 128 - code


def _is_in_foreground() -> bool:
    """Whether a terminal sends its signals to us, and so to the command too."""
    try:
        with open("/dev/tty") as terminal:  # noqa: PTH123 (a device)
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it has started: by SIGTERM, and what is left after a while by SIGKILL."""
    import psutil

    all_of_it = []
    with suppress(psutil.Error):
        root = psutil.Process(process.pid)
        all_of_it = [root, *root.children(recursive=True)]
    for one in all_of_it:
        with suppress(psutil.Error):
            one.terminate()
    deadline = time.monotonic() + GRACE_S
    _, alive = psutil.wait_procs([one for one in all_of_it if one.pid != process.pid], timeout=0)
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
    _, alive = psutil.wait_procs(alive, timeout=max(0.0, deadline - time.monotonic()))
    for one in alive:
        with suppress(psutil.Error):
            one.kill()
    process.kill()
    process.wait()


def _keep_signals() -> None:
    """See that no signal ends us between two steps: what is to be done after a command is done."""
    for signum in _PASSED_ON[:3]:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda *_: None)


@contextmanager
def _signals_kept() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in _PASSED_ON}
    _keep_signals()
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
