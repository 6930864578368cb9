"""Commands around a user's command: ``run`` restores the guest after it, ``ensure`` lets it provision the guest.

The exit code is that of the user's command. A failure of qsnap's own steps has a code that few commands use (those of
env, timeout and xargs), and never replaces a failure of the user's command.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Literal, TypeVar

import click
from msgspec import structs

from qsnap.cli.child import executed, not_executable, note_signals
from qsnap.cli.common import Options, excluded, liveness
from qsnap.cli.options import (
    Command,
    completes,
    exclude_option,
    live_auto_option,
    live_option,
    one_vm_options,
    tag_argument,
)
from qsnap.cli.output.show import say, write
from qsnap.errors import BadUsage, Interrupted, QsnapError

if TYPE_CHECKING:
    from qsnap.model.qemu import RunState, Struct
    from qsnap.model.results import LoadResult, SaveResult
    from qsnap.model.snapshots import Snapshot
    from qsnap.targets.choose import Target
    from qsnap.targets.config import Settings
    from qsnap.vm import VM

_T = TypeVar("_T")

#: The command succeeded, and what was to be done after it did not.
FAILED_AFTER = 123
#: What was to be done before the command failed; it was not run.
FAILED_BEFORE = 125

#: What these mean, as the help and the README say.
EXIT_TABLE = (
    ("123", "the command succeeded, but the work after it failed"),
    ("124", "`--timeout` ended the command"),
    ("125", "the work before the command failed, so it was not run"),
    ("126", "the command cannot be executed"),
    ("127", "the command was not found"),
    ("128 + n", "signal n ended the command"),
)
_EXITS = "\b\nExit codes: the command's own, and\n" + "\n".join(
    f"  {code:<9} {meaning.replace('`', '')}" for code, meaning in EXIT_TABLE
)


_command = click.argument("command", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)


@click.command(cls=Command, context_settings={"allow_interspersed_args": False}, epilog=_EXITS)
@click.option("--revert", is_flag=True, help="Restore the guest to where it was before the command.")
@click.option(
    "--revert-to", metavar="TAG", shell_complete=completes("tags"), help="Restore the guest to that snapshot instead."
)
@click.option(
    "--save-on-fail", metavar="TAG", help="If the command fails, save the guest as TAG before it is restored."
)
@live_option
@live_auto_option
@exclude_option
@one_vm_options
@_command
def run(
    options: Options,
    revert: bool,
    revert_to: str | None,
    save_on_fail: str | None,
    live: bool | None,
    live_auto: bool,
    exclude: tuple[str, ...],
    command: tuple[str, ...],
) -> int:
    """Run a command, and restore the guest afterwards.

    The monitor is free while the command runs, so the command may use qsnap itself. For --revert, the guest is saved
    under a tag of its own (qsnap-run-…), which is deleted when the guest is restored. --timeout limits the command, and
    each step of qsnap's before and after it.
    """
    if revert and revert_to is not None:
        raise BadUsage("--revert and --revert-to cannot be used together")
    if not shutil.which(command[0]):
        return not_executable(command[0])
    job = _Job(options, exclude, lambda settings: liveness(live, live_auto, settings))
    tag = revert_to
    signals_seen = note_signals()
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
    code = executed(command, options.timeout_s, signals_seen)
    if code is None:
        if revert:
            job.attempt(troubles, lambda: job.delete(tag or ""))
        return _not_run(Interrupted(signals_seen[0]))
    if code and save_on_fail is not None:
        job.attempt(troubles, lambda: job.save(save_on_fail))
    if tag is not None:
        was_loaded = job.attempt(troubles, lambda: job.load(tag, back_to=runstate if revert else None))
        if revert and was_loaded:
            job.attempt(troubles, lambda: job.delete(tag))
    return code or (FAILED_AFTER if troubles else 0)


@click.command(cls=Command, epilog=_EXITS)
@tag_argument
@exclude_option
@one_vm_options
@_command
def ensure(options: Options, tag: str, exclude: tuple[str, ...], command: tuple[str, ...]) -> int:
    """Load snapshot TAG, or run a command and then save TAG.

    If there is no TAG, the command provisions the guest; if it succeeds, TAG is saved. So the second job of a machine
    starts where the first had got to. A TAG that cannot be loaded, because it is not complete, is made anew.
    """
    job = _Job(options, exclude)
    signals_seen = note_signals()
    try:
        found, is_there = job.step(lambda vm, settings: _found(vm, tag, job.excluded(settings)))
        if found:
            job.load(tag)
            return 0
        job.save(tag, dry_run=True)
    except QsnapError as error:
        return _not_run(error)
    job.obeys_signals = False
    code = executed(command, options.timeout_s, signals_seen)
    if code is None:
        return _not_run(Interrupted(signals_seen[0]))
    if code:
        _say(f"the command failed ({code}), so {tag!r} was not saved")
        return code
    troubles: list[QsnapError] = []
    # One that is there now and was not before is another job's: this guest was provisioned by both
    job.attempt(troubles, lambda: job.save(tag, replace=is_there, alive=True))
    return FAILED_AFTER if troubles else 0


class _Job:
    """qsnap's steps around a command, each with a connection of its own to the same VM."""

    def __init__(
        self,
        options: Options,
        exclude: tuple[str, ...],
        live: Callable[[Settings], bool | Literal["auto"]] = lambda settings: settings.live or False,
    ) -> None:
        self._options = options
        self._live = live
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
        from qsnap.cli.pick import chosen, title_of
        from qsnap.cli.runner import run_on

        if self._meant is None:
            self._meant = chosen(self._options)
        try:
            return run_on(self._options, self._meant, action, obeys_signals=self.obeys_signals)
        except QsnapError as error:
            error.vm = title_of(self._options, self._meant)
            raise
        finally:
            # The command may start it anew: then it is another process at the same address
            self._meant = structs.replace(self._meant, pid=None)

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
                live=self._live(settings),
                prepare=settings.prepare,
                dry_run=dry_run,
                alive=alive,
            )

        result = self.step(save)
        if not dry_run:
            self._show(result)

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

    def load(self, tag: str, *, back_to: RunState | None = None) -> None:
        """Put the guest back; it runs, sleeps or stands still as in *back_to*, by default as :meth:`VM.load` does."""
        from qsnap.model.runstates import is_live

        running = None if back_to is None else is_live(back_to)

        async def load(vm: VM, settings: Settings) -> LoadResult:
            may_sleep = back_to == "suspended"
            return await vm.load(tag, running=running, exclude=self.excluded(settings), may_sleep=may_sleep)

        self._show(self.step(load))

    def _show(self, result: Struct) -> None:
        from qsnap.cli.output.results import OfVM
        from qsnap.cli.pick import title_of

        self._options.shown(OfVM(vm=title_of(self._options, self._meant), result=result), sys.stderr)


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
    from qsnap.cli.output.people import introduced

    write(introduced("the command was not run", error), sys.stderr)
    return error.exit_code if isinstance(error, Interrupted) else FAILED_BEFORE


def _say(text: str) -> None:
    say(f"qsnap: {text}", keep_newlines=True)
