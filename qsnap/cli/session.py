"""One command, run: the connection, the signals, and how errors become exit codes."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from qsnap.cli.render import Renderer, renderer
from qsnap.errors import BadUsage, Interrupted
from qsnap.monitor.address import TcpAddress, parse_address
from qsnap.vm import VM, connect

_T = TypeVar("_T")

#: A hang-up is a lost terminal: as final as the other two.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Options(NamedTuple):
    """The options that every command takes."""

    monitor: str | None
    as_json: bool
    quiet: bool
    verbose: bool
    timeout_s: float | None

    @property
    def renderer(self) -> Renderer:
        """How results are shown."""
        return renderer(as_json=self.as_json, quiet=self.quiet)


def run(options: Options, action: Callable[[VM], Awaitable[_T]]) -> _T:
    """Connect, do *action*, and return what it returns.

    :raise BadUsage: no monitor was named, or none that can be meant.
    :raise Interrupted: by a signal; the guest was resumed.
    """
    if options.monitor is None:
        raise BadUsage(
            "no monitor given: -m ADDRESS, or QSNAP_MONITOR in the environment. Start QEMU with "
            "-qmp unix:/run/vm.qmp,server=on,wait=off and use -m /run/vm.qmp; without a VM try: qsnap demo"
        )
    if options.verbose:
        _show_dialogue()
    address = parse_address(options.monitor)
    if isinstance(address, TcpAddress) and not address.is_loopback:
        sys.stderr.write(f"warning: {address}: a monitor has no password; whoever reaches it controls the VM\n")

    async def connected() -> _T:
        async with connect(address, timeout_s=options.timeout_s) as vm:
            return await action(vm)

    return run_interruptibly(connected())


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
