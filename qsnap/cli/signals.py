"""Signals: they cancel the work, which then clears up and ends in its own time."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from qsnap.cli.output.show import say
from qsnap.errors import Interrupted

_T = TypeVar("_T")

#: A hang-up is a lost terminal: as final as the other two.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
            say("qsnap: cleaning up first; Ctrl-\\ (SIGQUIT) ends qsnap at once")
        elif len(received) == 1:
            task.cancel()
        else:
            say("qsnap: waiting for QEMU to answer, so that the guest can be resumed")

    # A stopped qsnap would keep the guest stopped: Ctrl-Z is ignored until the work is done.
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
