"""The library without ``await``: the same methods, which return when they are done.

::

    import qsnap.sync

    with qsnap.sync.connect("/run/vm.qmp") as vm:
        print(vm.save("before-upgrade").pause_ms)

Made from the one implementation: each call is done by :class:`qsnap.VM` on an event loop in a thread, over one
connection. So it works where a loop runs already, and Ctrl-C ends a call as it does everywhere: the guest runs again.
What there is to call is in ``sync.pyi``, which scripts/docs writes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any

import qsnap.connecting
import qsnap.vm
from qsnap.errors import BadUsage
from qsnap.monitor.address import Address

__all__ = ["VM", "connect"]


class VM:
    """A running QEMU: the methods of :class:`qsnap.VM`, each without ``await``. Made by :func:`connect`."""

    def __init__(self, vm: qsnap.vm.VM, session: _Session) -> None:
        self._vm = vm
        self._session = session

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (what is not a method of VM)
        return getattr(self._vm, name)


def _without_await(method: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: VM, *args: Any, **how: Any) -> Any:  # noqa: ANN401 (of that method)
        return self._session.call(lambda: method(self._vm, *args, **how))

    return call


for _name, _method in vars(qsnap.vm.VM).items():
    if iscoroutinefunction(_method) and not _name.startswith("_"):
        setattr(VM, _name, _without_await(_method))


@contextmanager
def connect(address: str | Address | None = None, **how: Any) -> Iterator[VM]:  # noqa: ANN401 (of qsnap.connect)
    """Connect to the monitor of a running QEMU, for the duration of a block: see :func:`qsnap.connect`."""
    session = _Session(lambda: qsnap.connecting.connect(address, **how))
    try:
        yield VM(session.opened(), session)
    finally:
        session.close()


class _Session:
    """A connection, and the thread with the event loop that it belongs to.

    One task does all of it, one call after another, so that the time-out of the connection bounds the calls.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._opened: Future[qsnap.vm.VM] = Future()
        self._present: Future[Any] = self._opened
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._is_interrupted = False
        self._thread = threading.Thread(target=self._run, name="qsnap", daemon=True)
        self._thread.start()
        self._ready.wait()

    def opened(self) -> qsnap.vm.VM:
        """The VM, as soon as it is connected."""
        found: qsnap.vm.VM = self._awaited(self._opened)
        return found

    def call(self, deed: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 (of that deed)
        """Do *deed* in the thread, and return what it returns."""
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive():
            raise BadUsage(qsnap.vm.CLOSED)
        future: Future[Any] = Future()
        self._loop.call_soon_threadsafe(self._jobs.put_nowait, (deed, future))
        return self._awaited(future)

    def close(self) -> None:
        """Close the connection, and end the thread."""
        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._jobs.put_nowait, None)
        self._thread.join()

    def _awaited(self, future: Future[Any]) -> Any:  # noqa: ANN401 (what it holds)
        while True:
            try:
                return future.result()
            except KeyboardInterrupt:
                if future.done():
                    raise
                self._loop.call_soon_threadsafe(self._interrupt)

    def _interrupt(self) -> None:
        self._is_interrupted = True
        self._task.cancel()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
            self._error = error
            if not self._present.done():
                self._present.set_exception(error)
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._jobs = asyncio.get_running_loop(), asyncio.Queue[Any]()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._ready.set()
        async with self._connect() as vm:
            self._opened.set_result(vm)
            while (job := await self._jobs.get()) is not None:
                deed, self._present = job
                try:
                    result = await deed()
                except asyncio.CancelledError:
                    if not self._is_interrupted:
                        raise  # the time of the connection is over
                    self._is_interrupted = False
                    task.uncancel()
                    self._present.set_exception(KeyboardInterrupt())
                except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
                    self._present.set_exception(error)
                else:
                    self._present.set_result(result)
