"""One command, run: the VMs that are meant, the connections, and the signals."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TextIO, TypeAlias, TypeVar

from qsnap.cli.options import JOBS
from qsnap.cli.output.results import Outcome, exit_code_of
from qsnap.cli.output.show import say, show
from qsnap.errors import BadUsage, ConnectError, Interrupted, QsnapError
from qsnap.monitor.address import Address, TcpAddress
from qsnap.vm import LOCK_WAIT_S, VM, connect

if TYPE_CHECKING:
    from qsnap.model.qemu import Struct
    from qsnap.targets import RunningVM
    from qsnap.targets.choose import Target
    from qsnap.targets.config import Settings

#: What a command does with each VM, given the defaults that the config file has for it.
Action: TypeAlias = "Callable[[VM, Settings], Awaitable[Struct]]"
_T = TypeVar("_T")
_V = TypeVar("_V")

#: A hang-up is a lost terminal: as final as the other two.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Open files that a command needs, and that each VM adds. With one VM 14 were enough; notes and modules may take more.
_FILES, _FILES_OF_A_VM = 16, 16


class Options(NamedTuple):
    """The options that every command takes; those that choose a VM only if it is to be one.

    :ivar monitor: None where the command line and the environment name none.
    :ivar vms: the names after ``--vm``.
    :ivar all_vms: every VM of this user that runs.
    :ivar jobs: at so many VMs the work is done at once.
    """

    as_json: bool
    quiet: bool
    verbose: bool
    config: str | None
    monitor: str | None = None
    vms: tuple[str, ...] = ()
    all_vms: bool = False
    jobs: int = JOBS
    timeout_s: float | None = None
    lock_wait_s: float | None = None
    state_dir: str | None = None
    ignore_unseen: bool | None = None

    @property
    def is_of_several(self) -> bool:
        """Whether more than one VM is asked for."""
        return self.all_vms or len(self.vms) > 1

    def shown(self, result: Struct, stream: TextIO | None = None) -> int:
        """Show a result, and return the exit code for it: see :func:`qsnap.cli.output.show.show`."""
        show(result, as_json=self.as_json, quiet=self.quiet, stream=stream)
        return exit_code_of(result)


def target(options: Options) -> Target:
    """The VM that the options mean: see :func:`qsnap.targets.choose.choose`."""
    from qsnap.targets.choose import choose
    from qsnap.targets.config import load

    refuse_few_files()
    if options.is_of_several:
        raise BadUsage("this is done with one VM at a time; name one, with --vm or -m")
    vm = options.vms[0] if options.vms else None
    return choose(load(options.config), _running_vms, monitor=options.monitor, vm=vm)


def _targets(options: Options) -> Iterator[tuple[str, Target | QsnapError]]:
    """The VMs that the options mean, and what to call each; an error for one that cannot be had."""
    if not options.is_of_several:
        title = next(iter(options.vms), options.monitor) or ""
        try:
            meant = target(options)
            yield title or meant.name, meant
        except QsnapError as error:
            yield title, error
        return
    from qsnap.targets.choose import choose, choose_all
    from qsnap.targets.config import load

    if options.monitor is not None or (options.vms and options.all_vms):
        raise BadUsage("-m, --vm and --all exclude each other")
    config = load(options.config)
    if options.all_vms:
        yield from ((meant.name, meant) for meant in choose_all(config, _running_vms()))
        return
    running = cache(_running_vms)
    seen: set[Address] = set()
    for name in dict.fromkeys(options.vms):
        try:
            meant = choose(config, running, vm=name)
        except QsnapError as error:
            yield name, error
            continue
        if meant.address not in seen:
            yield name, meant
        seen.add(meant.address)


def refuse_few_files(at_once: int = 1) -> None:
    """Refuse to begin where this process may have so few files open that it would fail in the middle.

    :param at_once: VMs.
    :raise QsnapError: it may not have enough; nothing was done.
    """
    needed = _FILES + at_once * _FILES_OF_A_VM
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise QsnapError(f"qsnap may have only {allowed} files open, and needs {needed}: `ulimit -n {needed}`")


def _running_vms() -> Sequence[RunningVM]:
    from qsnap.targets import running_vms

    return running_vms()


def chosen(options: Options) -> Target:
    """The VM that is meant, said on standard error if it was taken unasked.

    :raise BadUsage: a monitor was named that cannot be meant; or none, and several VMs run; or several were named.
    :raise NoVM: no such VM runs, or none at all.
    """
    meant = target(options)
    _say_which(options, meant)
    return meant


def run_on(
    options: Options, meant: Target, action: Callable[[VM, Settings], Awaitable[_T]], *, obeys_signals: bool = True
) -> _T:
    """Connect to a VM that was chosen, do *action*, and return what it returns.

    :param action: is given the VM, and the defaults that the config file has for it.
    :param obeys_signals: False goes on to the end, and only says that it does.
    :raise Interrupted: by a signal; the guest was resumed.
    """
    return run_interruptibly(_connected(options, meant, action), obeys_signals=obeys_signals)


def run_each(
    options: Options,
    action: Action,
    interrupted: Callable[[str], object] = lambda _: None,
) -> list[Outcome]:
    """Do *action* with each VM that is meant, one or several, at ``options.jobs`` of them at once.

    :param action: is given the VM, and the defaults that the config file has for it.
    :param interrupted: is given the title of each that a signal has kept from being done.
    :raise BadUsage: the options that choose the VMs contradict each other.
    :raise QsnapError: too few files may be open for so many at once.
    :raise Interrupted: by a signal; the guests were resumed.
    """
    refuse_few_files(options.jobs if options.is_of_several else 1)
    targets = list(_targets(options))
    if not options.is_of_several:
        for meant in (meant for _, meant in targets if not isinstance(meant, QsnapError)):
            _say_which(options, meant)
    turns = asyncio.Semaphore(options.jobs)
    ended: list[tuple[str, str]] = []

    async def one(title: str, meant: Target | QsnapError) -> Outcome:
        if isinstance(meant, QsnapError):
            return Outcome(title, meant)
        try:
            async with turns:
                outcome = Outcome(title, await _connected(options, meant, action))
            ended.append((title, "done"))
        except QsnapError as error:
            outcome = Outcome(title, error)
            ended.append((title, str(error)))
        except asyncio.CancelledError as cancelled:
            ended.extend((title, note) for note in getattr(cancelled, "__notes__", ()))
            interrupted(title)
            raise
        return outcome

    async def each() -> list[Outcome]:
        try:
            return await asyncio.gather(*(one(title, meant) for title, meant in targets))
        except asyncio.CancelledError:
            told = asyncio.CancelledError()
            for title, note in ended:
                told.add_note(f"{title}: {note}" if options.is_of_several else note)
            raise told from None

    return run_interruptibly(each())


def _say_which(options: Options, meant: Target) -> None:
    """Tell of a VM that was taken unasked, and warn of a monitor that anybody can reach."""
    address = meant.address
    if isinstance(address, TcpAddress) and not address.is_loopback:
        say(f"warning: {address}: a monitor has no password; whoever reaches it controls the VM")
    if meant.is_found and not options.quiet and not options.as_json:
        say(f"qsnap: using {meant.title} at {address}")


async def _connected(options: Options, meant: Target, action: Callable[[VM, Settings], Awaitable[_T]]) -> _T:
    if options.verbose:
        _show_dialogue()
    address = meant.address
    lock_wait_s = _first(options.lock_wait_s, meant.settings.lock_wait)
    state_dir = _first(options.state_dir, meant.settings.state_dir)
    async with connect(
        address,
        timeout_s=_first(options.timeout_s, meant.settings.timeout),
        lock_wait_s=LOCK_WAIT_S if lock_wait_s is None else lock_wait_s,
        state_dir=None if state_dir is None else os.path.expanduser(state_dir),  # noqa: PTH111, ASYNC240 (as above)
        ignore_unseen=bool(_first(options.ignore_unseen, meant.settings.ignore_unseen)),
    ) as vm:
        if meant.pid and vm.pid not in (None, meant.pid):
            raise ConnectError(f"{meant.title} is not what answers at {address}: that is process {vm.pid}")
        try:
            return await action(vm, meant.settings)
        finally:
            if vm.recovered and not options.quiet and not options.as_json:
                from qsnap.cli.output.people import lines_of

                for line in itertools.chain(*map(lines_of, vm.recovered)):
                    say(f"qsnap: {line}")
            for remark in vm.remarks:
                say(f"warning: {remark}")


def _first(*values: _V | None) -> _V | None:
    """The first that is given."""
    return next((value for value in values if value is not None), None)


def run_interruptibly(work: Awaitable[_T], *, obeys_signals: bool = True) -> _T:
    """Run *work* on a loop of its own; a signal cancels it, and it then ends in its own time.

    :param obeys_signals: False lets it go on.
    :raise Interrupted: a signal came; *work* has cleared up.
    """

    # What is loaded by now stays; the collector need not look at it again, only at what comes.
    gc.freeze()
    # "socket.send() raised exception" says nothing that our own error does not say better.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    gc.enable()

    async def main() -> _T:
        task = asyncio.ensure_future(work)
        received: list[int] = []
        with _signals_handled(task, received, obeys_signals):
            try:
                return await task
            except asyncio.CancelledError as cancelled:
                if not received:
                    raise
                notes = getattr(cancelled, "__notes__", ())
                raise Interrupted(received[0], "; ".join(notes)) from cancelled

    return asyncio.run(main())


@contextmanager
def _signals_handled(task: asyncio.Future[_T], received: list[int], obeys: bool) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def handle(signum: int) -> None:
        received.append(signum)
        if not obeys:
            say("qsnap: putting things in order first; Ctrl-\\ (SIGQUIT) ends qsnap at once")
        elif len(received) == 1:
            task.cancel()
        else:
            say("qsnap: waiting for QEMU to answer, so that the guest can be resumed")

    # A stopped qsnap would keep the guest stopped: Ctrl-Z is not obeyed meanwhile.
    with suppress(OSError, ValueError):
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    # One that is ignored (nohup) stays so.
    before = {signum: handler for signum in SIGNALS if (handler := signal.getsignal(signum)) is not signal.SIG_IGN}
    for signum in before:
        # The loop's own way, add_signal_handler, ends with the signal's default: it would end us between two steps
        signal.signal(signum, lambda came, _: loop.call_soon_threadsafe(handle, came))
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _show_dialogue() -> None:
    if logging.getLogger("qsnap").handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("qsnap")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
