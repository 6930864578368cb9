"""Connecting to a running VM: which one is meant, who holds its monitor, and how long all of it may take."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qsnap.errors import BadUsage, MonitorBusy, OperationTimeout, QsnapError
from qsnap.monitor import GREETING_TIMEOUT_S, Monitor, open_monitor
from qsnap.monitor.address import Address, parse_address
from qsnap.runs import runtime_dir
from qsnap.vm import VM, positive

if TYPE_CHECKING:
    from qsnap.targets.choose import Target

#: Seconds to wait for another qsnap.
LOCK_WAIT_S = 5.0


async def _awaited(where: Address, deadline: float, lock_wait_s: float) -> bool:
    """Wait until no other qsnap is using the VM; whether one was: see
    :func:`qsnap.supervision.claim.wait_for_monitor`."""
    if runtime_dir.problem() or not runtime_dir.has_journals():
        return False  # what cannot be trusted is reported by a run that writes there
    from qsnap.supervision.claim import wait_for_monitor

    return await wait_for_monitor(where, deadline, lock_wait_s)


async def _opened(where: Address, greeting_s: float, lock_wait_s: float, snapshot_jobs: bool | None) -> Monitor:
    """The open monitor, as soon as no other qsnap holds it."""
    if not lock_wait_s >= 0:  # also refuses NaN
        raise BadUsage(f"the time to wait for another qsnap must not be below 0, as {lock_wait_s:g} is")
    deadline = asyncio.get_running_loop().time() + lock_wait_s
    while True:
        await _awaited(where, deadline, lock_wait_s)
        left_s = deadline - asyncio.get_running_loop().time()
        try:
            return await open_monitor(where, timeout_s=max(greeting_s, left_s), snapshot_jobs=snapshot_jobs)
        except MonitorBusy as busy:
            from qsnap.targets.running import explained

            # If another qsnap began at the same time, its claim shows by now.
            if not await _awaited(where, deadline, lock_wait_s):
                raise explained(busy, where) from busy


async def _tell_of_guest(monitor: Monitor, cancelled: asyncio.CancelledError) -> None:
    """Note the guest's run state on an interrupt, unless that tells of the guest already or QEMU does not answer."""
    if any("guest" in note for note in getattr(cancelled, "__notes__", ())):
        return
    with suppress(QsnapError, TimeoutError):
        async with asyncio.timeout(1):
            cancelled.add_note(f"the guest is {await monitor.runstate()}")


def _chosen(address: str | Address | None, vm: str, config: str | Path | None) -> Target:
    from qsnap.targets.choose import choose
    from qsnap.targets.config import load
    from qsnap.targets.running import running_vms

    if address is not None:
        raise BadUsage("an address and vm=NAME are both given; one of them names the VM")
    return choose(load(config or os.environ.get("QSNAP_CONFIG") or None), running_vms, vm=vm)


@asynccontextmanager
async def connect(
    address: str | Address | None = None,
    *,
    vm: str | None = None,
    config: str | Path | None = None,
    timeout_s: float | None = None,
    lock_wait_s: float | None = None,
    snapshot_jobs: bool | None = None,
    state_dir: str | Path | None = None,
    ignore_unseen: bool | None = None,
) -> AsyncIterator[VM]:
    """Connect to the monitor of a running QEMU, for the duration of a block.

    :param address: a path, ``unix:PATH``, ``tcp:HOST:PORT``, or QEMU's own argument pasted whole; or:
    :param vm: the name of the VM in the config file, its ``-name``, pid or UUID. What the config file has for it is the
        default of the arguments below.
    :param config: the config file for *vm*. Default: ``$QSNAP_CONFIG``, or ``~/.config/qsnap/config.toml``.
    :param timeout_s: seconds for the whole block, None for no bound. An operation that is under way then ends as after
        an interrupt: the guest is resumed, nothing half made is left. The greeting has its own bound of 5 s. If QEMU
        does not answer for 10 s after the time-out, qsnap leaves the rest to the guard.
    :param lock_wait_s: seconds to wait for another qsnap that is using this VM; 0 refuses at once. Default: 5.
    :param snapshot_jobs: False uses HMP's savevm inside QMP even if QEMU has snapshot jobs.
    :param state_dir: the directory for the state files of live saves. Default: beside the images; qsnap looks there in
        any case.
    :param ignore_unseen: delete, prune and replace even if notes that protect the snapshot, or a state file that
        belongs to it, may exist and cannot be seen from here (over TCP, as another user). Default: refuse.
    :raise BadUsage: *address* is not valid, or neither it nor *vm* is given; or *vm* means several.
    :raise NoVM: *vm* does not run, or has no monitor that could be used.
    :raise ConnectError: nothing listens there, or it may not be opened.
    :raise MonitorBusy: another client holds it, or QEMU does not answer.
    :raise VMLocked: that client is another qsnap.
    :raise OperationTimeout: *timeout_s* have passed.
    """
    if vm is not None:
        target = await asyncio.to_thread(_chosen, address, vm, config)
        settings, address = target.settings, target.address
        timeout_s = settings.timeout if timeout_s is None else timeout_s
        lock_wait_s = settings.lock_wait if lock_wait_s is None else lock_wait_s
        state_dir = settings.state_dir if state_dir is None else state_dir
        ignore_unseen = settings.ignore_unseen if ignore_unseen is None else ignore_unseen
    if address is None:
        raise BadUsage("name the VM: its monitor's address, or vm=NAME")
    if lock_wait_s is None:
        lock_wait_s = LOCK_WAIT_S
    where = parse_address(address) if isinstance(address, str) else address
    positive("the time-out", timeout_s)
    greeting_s = GREETING_TIMEOUT_S if timeout_s is None else min(timeout_s, GREETING_TIMEOUT_S)
    clock = asyncio.get_running_loop().time
    deadline = None if timeout_s is None else clock() + timeout_s
    wait_s = lock_wait_s if timeout_s is None else min(lock_wait_s, timeout_s)
    try:
        monitor = await _opened(where, greeting_s, wait_s, snapshot_jobs)
    except asyncio.CancelledError as cancelled:
        cancelled.add_note("the guest was not touched")
        raise
    timer = asyncio.timeout_at(deadline)
    try:
        async with timer:
            opened = VM(
                monitor,
                lock_wait_s=lock_wait_s,
                is_timed=timeout_s is not None,
                state_dir=None if state_dir is None else Path(state_dir),
                ignore_unseen=bool(ignore_unseen),
            )
            try:
                yield opened
            except asyncio.CancelledError as cancelled:
                await _tell_of_guest(monitor, cancelled)
                raise
            finally:
                opened._connected = None
    except TimeoutError as error:
        if not timer.expired():
            raise  # the caller's own
        notes = getattr(error.__cause__, "__notes__", ())
        raise OperationTimeout("; ".join((f"not done within {timeout_s:g} s", *notes))) from error
    finally:
        await monitor.aclose()
