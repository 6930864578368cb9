"""One command, run: the VM that is meant, the connection, and the signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from qsnap.cli.render import Renderer, renderer
from qsnap.cli.text import printable
from qsnap.errors import ConnectError, Interrupted
from qsnap.monitor.address import TcpAddress
from qsnap.vm import LOCK_WAIT_S, VM, connect

if TYPE_CHECKING:
    from qsnap.choice import Target
    from qsnap.config import Settings
    from qsnap.discovery import RunningVM

_T = TypeVar("_T")
_V = TypeVar("_V")

#: A hang-up is a lost terminal: as final as the other two.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Options(NamedTuple):
    """The options that every command takes; those that choose a VM only if it is to be one.

    :ivar monitor: None where the command line and the environment name none.
    """

    as_json: bool
    quiet: bool
    verbose: bool
    config: str | None
    monitor: str | None = None
    vm: str | None = None
    timeout_s: float | None = None
    lock_wait_s: float | None = None
    state_dir: str | None = None

    @property
    def renderer(self) -> Renderer:
        """How results are shown."""
        return renderer(as_json=self.as_json, quiet=self.quiet)


def target(options: Options) -> Target:
    """The VM that the options mean: see :func:`qsnap.choice.choose`."""
    from qsnap.choice import choose
    from qsnap.config import load

    return choose(load(options.config), _running_vms, monitor=options.monitor, vm=options.vm)


def _running_vms() -> Sequence[RunningVM]:
    from qsnap.discovery import running_vms

    return running_vms()


def run(options: Options, action: Callable[[VM, Settings], Awaitable[_T]]) -> _T:
    """Find the VM, connect, do *action*, and return what it returns.

    :param action: is given the VM, and the defaults that the config file has for it.
    :raise BadUsage: a monitor was named that cannot be meant; or none, and several VMs run.
    :raise NoVM: no such VM runs, or none at all.
    :raise Interrupted: by a signal; the guest was resumed.
    """
    if options.verbose:
        _show_dialogue()
    meant = target(options)
    address = meant.address
    if isinstance(address, TcpAddress) and not address.is_loopback:
        sys.stderr.write(f"warning: {address}: a monitor has no password; whoever reaches it controls the VM\n")
    if meant.is_found and not options.quiet and not options.as_json:
        sys.stderr.write(printable(f"qsnap: using {meant.title} at {address}") + "\n")
    timeout_s = _first(options.timeout_s, meant.settings.timeout)
    lock_wait_s = _first(options.lock_wait_s, meant.settings.lock_wait)
    state_dir = _first(options.state_dir, meant.settings.state_dir)

    async def connected() -> _T:
        async with connect(
            address,
            timeout_s=timeout_s,
            lock_wait_s=LOCK_WAIT_S if lock_wait_s is None else lock_wait_s,
            state_dir=None if state_dir is None else os.path.expanduser(state_dir),  # noqa: PTH111, ASYNC240 (as above)
        ) as vm:
            if meant.pid and vm.pid not in (None, meant.pid):
                raise ConnectError(f"{meant.title} is not what answers at {address}: that is process {vm.pid}")
            try:
                return await action(vm, meant.settings)
            finally:
                if not options.quiet:
                    options.renderer.aftermath(vm.recovered)

    return run_interruptibly(connected())


def _first(*values: _V | None) -> _V | None:
    """The first that is given."""
    return next((value for value in values if value is not None), None)


def run_interruptibly(work: Awaitable[_T]) -> _T:
    """Run *work* on a loop of its own; a signal cancels it, and it then ends in its own time.

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
        with _signals_handled(task, received):
            try:
                return await task
            except asyncio.CancelledError as cancelled:
                if not received:
                    raise
                notes = getattr(cancelled, "__notes__", ())
                raise Interrupted(received[0], "; ".join(notes)) from cancelled

    return asyncio.run(main())


@contextmanager
def _signals_handled(task: asyncio.Future[_T], received: list[int]) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def handle(signum: int) -> None:
        received.append(signum)
        if len(received) == 1:
            task.cancel()
        else:
            sys.stderr.write("qsnap: waiting for QEMU to answer, so that the guest can be resumed\n")

    # A stopped qsnap would keep the guest stopped: Ctrl-Z is not obeyed meanwhile.
    with suppress(OSError, ValueError):
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    # One that is ignored (nohup) stays so.
    handled = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    for signum in handled:
        loop.add_signal_handler(signum, handle, signum)
    try:
        yield
    finally:
        for signum in handled:
            loop.remove_signal_handler(signum)


def _show_dialogue() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("qsnap")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
