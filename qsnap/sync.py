"""The library without ``await``: the same methods, which return when they are done.

::

    import qsnap.sync

    with qsnap.sync.connect("/run/vm.qmp") as vm:
        print(vm.save("before-upgrade").pause_ms)

Made from the one implementation: each call is done by :class:`qsnap.VM`, over one connection, on an event loop in a
thread. So it works where a loop runs already, and Ctrl-C ends a call as it does everywhere: the guest runs again.
What there is to call is in ``sync.pyi``, which scripts/docs writes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, TypeVar

import qsnap.connecting
import qsnap.joint
import qsnap.vm
from qsnap.errors import BadUsage
from qsnap.monitor.address import Address

__all__ = ["VM", "connect", "together"]

_T = TypeVar("_T")


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
    with _loop:
        session = _Session(lambda: qsnap.connecting.connect(address, **how))
        try:
            yield VM(session.opened(), session)
        finally:
            session.close()


def together(vms: Mapping[str, VM], deed: Callable[[VM], _T]) -> qsnap.joint.Done[_T]:
    """Save, load, delete or prune on several VMs at one moment: see :func:`qsnap.together`.

    :param deed: is called for each VM in a thread of its own.
    """
    ours = {vm._vm: vm for vm in vms.values()}

    def called(vm: VM) -> _T:
        try:
            return deed(vm)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted from interrupt  # it would end the loop

    async def each() -> qsnap.joint.Done[_T]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max(1, len(vms)), "qsnap") as threads:
            return await qsnap.joint.together(
                {name: vm._vm for name, vm in vms.items()},
                lambda vm: loop.run_in_executor(threads, called, ours[vm]),
            )

    with _loop:
        done = _loop.start(each())
        while True:
            try:
                return done.result()
            except KeyboardInterrupt:
                if done.done():
                    raise
                for vm in ours.values():
                    vm._session.interrupt()
            except _Interrupted:
                raise KeyboardInterrupt from None


class _Interrupted(Exception):
    """A KeyboardInterrupt in a thread."""


class _Loop:
    """The event loop of all connections, in a thread. It runs while there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses = 0

    def start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def refuse_itself(self) -> None:
        """Refuse to wait on the loop for what the loop has to do.

        :raise BadUsage: the caller is a *watch*, which is called there.
        """
        if self._uses and threading.current_thread() is self._thread:
            raise BadUsage("a watch cannot call a VM: each would wait for the other")

    def __enter__(self) -> None:
        self.refuse_itself()
        with self._lock:
            self._uses += 1
            if self._uses == 1:
                self._began: Future[None] = Future()
                self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="qsnap", daemon=True)
                self._thread.start()
                self._began.result()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._uses -= 1
            if self._uses == 0:
                self.loop.call_soon_threadsafe(self._end.set)
                self._thread.join()

    async def _run(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._began.set_result(None)
        await self._end.wait()


_loop = _Loop()


class _Session:
    """A connection, and the task on the event loop that it belongs to.

    One task does all of it, one call after another, so that the time-out of the connection bounds the calls.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._opened: Future[qsnap.vm.VM] = Future()
        self._present: Future[Any] = self._opened
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._is_interrupted = False
        self._ended = _loop.start(self._run())
        self._ready.wait()

    def opened(self) -> qsnap.vm.VM:
        """The VM, as soon as it is connected."""
        found: qsnap.vm.VM = self._awaited(self._opened)
        return found

    def call(self, deed: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 (of that deed)
        """Do *deed* in the thread, and return what it returns."""
        _loop.refuse_itself()
        if self._error is not None:
            raise self._error
        if self._ended.done():
            raise BadUsage(qsnap.vm.CLOSED)
        future: Future[Any] = Future()
        _loop.loop.call_soon_threadsafe(self._jobs.put_nowait, (deed, future))
        return self._awaited(future)

    def close(self) -> None:
        """Close the connection."""
        _loop.loop.call_soon_threadsafe(self._jobs.put_nowait, None)
        self._ended.result()

    def _awaited(self, future: Future[Any]) -> Any:  # noqa: ANN401 (what it holds)
        while True:
            try:
                return future.result()
            except KeyboardInterrupt:
                if future.done():
                    raise
                self.interrupt()

    def interrupt(self) -> None:
        """End the present call, if there is one."""

        def cancel() -> None:
            if not self._present.done():
                self._is_interrupted = True
                self._task.cancel()

        _loop.loop.call_soon_threadsafe(cancel)

    async def _run(self) -> None:
        try:
            await self._serve()
        except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
            self._error = error
            if not self._present.done():
                self._present.set_exception(error)
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._jobs = asyncio.Queue[Any]()
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
