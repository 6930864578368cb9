"""Commands around a command of the user's: ``run`` puts the guest back after it, ``ensure`` has it provision the guest.

The exit code is the command's own. What fails of ours has codes that few commands use (those of env, timeout and
xargs), and never takes the place of a failure of the command's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from qsnap.cli import options as given
from qsnap.cli.options import completes, excluded, one_vm_options
from qsnap.cli.output.show import say
from qsnap.errors import BadUsage, Interrupted, QsnapError

if TYPE_CHECKING:
    import subprocess

    import psutil

    from qsnap.cli.runner import Options
    from qsnap.model.qemu import LoadResult, RunState, SaveResult, Snapshot
    from qsnap.targets.choose import Target
    from qsnap.targets.config import Settings
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
#: Seconds that what was killed has to be gone. What is not (it hangs in the kernel, or is another user's) is left.
KILL_S = 5.0
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
@one_vm_options
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
    noted = _note_signals()
    try:
        runstate = job.step(_runstate)
        if revert_to is not None:
            job.check_load(revert_to)
        if save_on_fail is not None:
            job.save(save_on_fail, dry_run=True)
        if revert:
            tag = f"qsnap-run-{datetime.now().astimezone():%Y%m%dT%H%M%S}-{os.getpid()}"
            job.save_to_revert(tag, runstate)
    except QsnapError as error:
        return _not_run(error)
    troubles: list[QsnapError] = []
    job.obeys_signals = False  # what is to be done after the command is done whatever comes
    code = _executed(command, options.timeout_s, noted)
    if code is None:
        if revert:
            job.attempt(troubles, lambda: job.delete(tag or ""))
        return _not_run(Interrupted(noted[0]))
    if code and save_on_fail is not None:
        job.attempt(troubles, lambda: job.save(save_on_fail))
    if tag is not None:
        was_loaded = job.attempt(troubles, lambda: job.load(tag, running=_is_live(runstate) if revert else None))
        if revert and was_loaded:
            job.attempt(troubles, lambda: job.delete(tag))
    return code or (FAILED_AFTER if troubles else 0)


@click.command(epilog=_EXITS)
@given.tag
@given.exclude
@one_vm_options
@_command
def ensure(options: Options, tag: str, exclude: tuple[str, ...], command: tuple[str, ...]) -> int:
    """Load snapshot TAG; if there is none, run a command that provisions the guest, and save TAG.

    So the second job of a machine begins where the first had got to. If the command fails, nothing is saved. A TAG that
    cannot be loaded, because it is not whole, is made anew.
    """
    job = _Job(options, exclude)
    noted = _note_signals()
    try:
        found, is_there = job.step(lambda vm, settings: _found(vm, tag, job.excluded(settings)))
        if found:
            job.load(tag)
            return 0
        job.save(tag, dry_run=True)
    except QsnapError as error:
        return _not_run(error)
    job.obeys_signals = False
    code = _executed(command, options.timeout_s, noted)
    if code is None:
        return _not_run(Interrupted(noted[0]))
    if code:
        _say(f"the command failed ({code}), so {tag!r} was not saved")
        return code
    troubles: list[QsnapError] = []
    # One that is there now and was not before is another job's: this guest was provisioned by both
    job.attempt(troubles, lambda: job.save(tag, replace=is_there, alive=True))
    return FAILED_AFTER if troubles else 0


class _Job:
    """The steps of ours around a command, each with a connection of its own to the same VM."""

    def __init__(self, options: Options, exclude: tuple[str, ...]) -> None:
        self._options = options
        self._exclude = exclude
        self._meant: Target | None = None
        self.obeys_signals = True

    def excluded(self, settings: Settings) -> tuple[str, ...]:
        """The devices that are left out."""
        return excluded(self._exclude, settings)

    def step(self, action: Callable[[VM, Settings], Awaitable[_T]]) -> _T:
        """Do one thing with the VM.

        :raise QsnapError: it failed, or a signal has ended it.
        """
        from qsnap.cli.runner import chosen, run_on

        if self._meant is None:
            self._meant = chosen(self._options)
        try:
            return run_on(self._options, self._meant, action, obeys_signals=self.obeys_signals)
        finally:
            # The command may start it anew: then it is another process at the same address
            self._meant = self._meant._replace(pid=None)

    def attempt(self, troubles: list[QsnapError], deed: Callable[[], object]) -> bool:
        """Do what is to be done whatever went wrong before, and say what goes wrong; whether it went well."""
        try:
            deed()
        except QsnapError as error:
            troubles.append(error)
            _say(str(error))
            return False
        return True

    def save(self, tag: str, *, replace: bool = True, dry_run: bool = False, alive: bool = False) -> None:
        """Save the guest, as the config file says; or find out whether that could be done now."""

        async def save(vm: VM, settings: Settings) -> SaveResult:
            return await vm.save(
                tag,
                replace=replace,
                vmstate=settings.vmstate,
                exclude=self.excluded(settings),
                live=settings.live or False,
                dry_run=dry_run,
                alive=alive,
            )

        result = self.step(save)
        if not dry_run:
            self._options.shown(result, sys.stderr)

    def save_to_revert(self, tag: str, runstate: RunState) -> None:
        """Save the guest under a tag of our own, and make sure that it can be put back; else nothing is left of it.

        :raise QsnapError: it cannot be saved, or not be loaded.
        """
        # QEMU before 9.0 does not put back a guest that is in S3
        self.save(tag, alive=runstate == "suspended")
        try:
            self.check_load(tag)
        except QsnapError:
            self.attempt([], lambda: self.delete(tag))
            raise

    def check_load(self, tag: str) -> None:
        """Find out whether the guest can be put back to *tag* now.

        :raise QsnapError: it cannot.
        """
        self.step(lambda vm, settings: vm.check_load(tag, exclude=self.excluded(settings)))

    def delete(self, tag: str) -> None:
        """Delete the temporary snapshot; the command may have done so. It is ours, so nobody has protected it."""
        self.step(lambda vm, _: vm.delete(tag, missing_ok=True, ignore_unseen=True))

    def load(self, tag: str, *, running: bool | None = None) -> None:
        """Put the guest back."""

        async def load(vm: VM, settings: Settings) -> LoadResult:
            return await vm.load(tag, running=running, exclude=self.excluded(settings))

        self._options.shown(self.step(load), sys.stderr)


def _is_live(runstate: RunState) -> bool:
    from qsnap.model.runstates import is_live

    return is_live(runstate)


async def _runstate(vm: VM, _: Settings) -> RunState:
    return (await vm.status()).runstate


async def _found(vm: VM, tag: str, left_out: Sequence[str]) -> tuple[Snapshot | None, bool]:
    """The snapshot of that tag, if it can be loaded; and whether there is anything of that tag."""
    from qsnap.upkeep.freshness import is_sound

    named = [one for one in await vm.list() if one.tag == tag]
    if not named:
        return None, False
    nodes = (await vm.check(exclude=left_out)).excluded if left_out else ()
    if sound := next((one for one in named if is_sound(one, nodes)), None):
        return sound, True
    _say(f"snapshot {tag!r} is {named[0].kind}, and cannot be loaded")
    return None, True


def _not_run(error: QsnapError) -> int:
    _say(f"the command was not run: {error}")
    return error.exit_code if isinstance(error, Interrupted) else FAILED_BEFORE


def _say(text: str) -> None:
    say(f"qsnap: {text}", keep_newlines=True)


def _executed(command: Sequence[str], timeout_s: float | None, noted: Sequence[int]) -> int | None:
    """Run the command to its end, with our streams, and pass signals on to it; its exit code, as a shell has it.

    Signals are held back and looked at one by one: what a terminal sends (Ctrl-C) reaches the command by itself.

    :param noted: signals that came before; if there are any the command is not run.
    :return: None if it was not run for that.
    """
    import subprocess

    with suppress(OSError, ValueError):
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)  # what is ignored here would be there
    passed_on = {signum for signum in _PASSED_ON if signal.getsignal(signum) is not signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on | {signal.SIGCHLD})
    _adopt_orphans()
    ours = _children()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        if noted:
            return None
        process = subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before))
        while (code := process.poll()) is None:
            left_s = 3600.0 if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                _say(f"the command was not done within {timeout_s:g} s; it is ended")
                _end(process, ours)
                return TIMED_OUT
            came = signal.sigtimedwait(passed_on | {signal.SIGCHLD}, left_s)
            # sigaction(2): si_code is above 0 for what the kernel sends
            if came is not None and came.si_signo != signal.SIGCHLD and came.si_code <= 0:
                process.send_signal(came.si_signo)
    except FileNotFoundError:
        _say(f"{command[0]}: not found")
        return NOT_FOUND
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        _say(f"{command[0]}: {getattr(error, 'strerror', None) or error}")
        return NOT_EXECUTABLE
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return code if code >= 0 else 128 - code


def _adopt_orphans() -> None:
    """Become the parent of what the command starts and leaves behind, so that it can be ended with it (prctl(2))."""
    import ctypes

    set_child_subreaper = 36
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def _children() -> set[int]:
    """Our own processes that are there before the command is: guards that have not ended yet."""
    with suppress(OSError, ValueError):
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    return set()


def _end(process: subprocess.Popen[bytes], ours: Collection[int]) -> None:
    """End a command and all that it has started: by SIGTERM, and what is left after a while by SIGKILL.

    :param ours: processes that are not the command's.
    """
    import psutil

    ourselves = psutil.Process()
    deadline = time.monotonic() + GRACE_S
    told: set[int] = set()
    while True:
        # Looked at again and again: what is ended may start something, or leave it behind
        found = [one for one in ourselves.children(recursive=True) if one.pid not in ours and not _is_zombie(one)]
        if process.poll() is not None and not found:
            return
        if time.monotonic() > deadline + KILL_S:
            _say(f"left behind, as it cannot be killed: process {', '.join(str(one.pid) for one in found)}")
            return
        is_over = time.monotonic() > deadline
        for one in found:
            with suppress(psutil.Error):
                if is_over:
                    one.kill()
                elif one.pid not in told:
                    one.terminate()
            told.add(one.pid)
        time.sleep(0.02)  # a poll with a deadline


def _is_zombie(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def _note_signals() -> list[int]:
    """See that no signal ends us from now on, whatever is done; it is noted in what is returned."""
    noted: list[int] = []
    for signum in _PASSED_ON[:3]:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda received, _: noted.append(received))
    return noted
