"""The claim on a VM: one qsnap at a time, and each with a guard that finishes for it if it dies.

A run that changes something makes, in this order: its journal, its guard, and its mark in QEMU. The mark is the claim:
QEMU itself decides who has it, over whatever monitor. Before the claim of a dead run is taken, that run is recovered.
Nobody keeps a monitor while waiting, because the holder, or its guard, may need just that one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

from qsnap.errors import CommandFailed, MonitorBusy, MonitorError, MonitorLost, PrecheckRefused, QsnapError, VMLocked
from qsnap.host.processes import is_alive, is_stopped, process
from qsnap.model.results import Recovered, Unfinished
from qsnap.model.runstates import takes_stop
from qsnap.monitor import GREETING_TIMEOUT_S, Monitor
from qsnap.monitor.address import Address
from qsnap.monitor.connection import AnotherAnswers, listener_pid
from qsnap.monitor.names import CLAIM
from qsnap.runs import journal, mark
from qsnap.runs.journal import Found, Journal
from qsnap.runs.mark import Holder
from qsnap.runs.pause import has_ended
from qsnap.runs.record import LiveWork, Record
from qsnap.runs.shield import shielded
from qsnap.supervision import guard

#: Seconds between two looks at a claim.
_LOOK_S = 0.1
#: Seconds for giving a claim back; after that, its guard does it.
_RELEASE_TIMEOUT_S = 10.0
#: Seconds for leaving that to the guard: see :func:`has_ended`, and closing the connection.
_HAND_OVER_S = 5.0


@asynccontextmanager
async def claimed(
    monitor: Monitor,
    operation: str,
    tags: tuple[str, ...],
    *,
    wait_s: float,
    patience_s: float = journal.AFTERMATH_TIMEOUT_S,
    tell: Callable[[Recovered], None],
) -> AsyncIterator[Journal]:
    """Hold the claim on a VM for the duration of a block, and have its run guarded.

    If the block should have resumed the guest and left it stopped, the guard goes on with that.

    :param operation: what the run does, for others to see: see :attr:`qsnap.runs.record.Record.operation`.
    :param wait_s: seconds to wait for another qsnap; 0 refuses at once.
    :param patience_s: see :class:`Journal`.
    :param tell: is called with what had to be done first about a dead run.
    :return: the journal, for noting what is about to be done.
    :raise VMLocked: another qsnap is using this VM.
    :raise QsnapError: no journal or guard can be made; nothing was done.
    """
    ours = await _acquired(monitor, operation, tags, wait_s, tell)
    ours.patience_s = patience_s
    try:
        yield ours
        ours.done(is_done=True)
    finally:
        await shielded(_release(monitor, ours), _RELEASE_TIMEOUT_S + _HAND_OVER_S)


async def _acquired(
    monitor: Monitor,
    operation: str,
    tags: tuple[str, ...],
    wait_s: float,
    tell: Callable[[Recovered], None],
) -> Journal:
    clock = asyncio.get_running_loop().time
    deadline = clock() + wait_s
    if monitor.sock is None:
        await monitor.reconnect(max(wait_s, GREETING_TIMEOUT_S))  # an earlier refusal closed it
    while True:
        text = await monitor.mark(CLAIM)
        if text is None:
            if ours := await _claim(monitor, operation, tags):
                return ours
            continue
        holder = mark.decode(text)
        if recovered := await _recovered(monitor, text):
            tell(recovered)
            continue
        if clock() >= deadline:
            raise _locked(holder, wait_s)
        pid = monitor.pid
        await monitor.aclose()
        await asyncio.sleep(_LOOK_S)
        try:
            await monitor.reconnect(max(_LOOK_S, deadline - clock()))
        except MonitorBusy as busy:
            raise _locked(holder, wait_s) from busy
        if monitor.pid != pid:
            raise AnotherAnswers(monitor.address)


async def _claim(monitor: Monitor, operation: str, tags: tuple[str, ...]) -> Journal | None:
    """Make the claim; None if another qsnap was faster."""
    was_running = takes_stop(await monitor.runstate(), monitor.version)
    record = journal.new_record(operation, tags, monitor)
    if monitor.pid is not None and not is_alive(monitor.pid):
        # Nothing would show later that the journal's QEMU has ended
        raise MonitorLost("QEMU has ended; nothing was done")
    ours = Journal.create(record)
    try:
        ours.guard = watching = guard.start(ours, monitor.sock)
    except BaseException:
        ours.close(remove=True)
        raise
    try:
        holder = mark.holder(record, process(watching.pid), was_running=was_running)
        is_ours = await monitor.set_mark(CLAIM, holder.encode())
    except (MonitorLost, asyncio.CancelledError):
        # QEMU may have set the mark nevertheless: the guard will look
        await _hand_over(monitor, ours, watching)
        raise
    except BaseException as error:
        _drop(ours, watching)
        if not isinstance(error, CommandFailed):
            raise
        from qsnap.operations.findings import no_machine

        raise PrecheckRefused("nothing can be done now", [no_machine(error)]) from error
    if not is_ours:
        _drop(ours, watching)
    return ours if is_ours else None


async def _hand_over(monitor: Monitor, ours: Journal, watching: guard.Guard) -> None:
    """Leave the rest to the guard. It goes on with our connection, which two processes cannot use at once."""
    await monitor.aclose()
    ours.close(remove=False)
    watching.hand_over()


def _drop(ours: Journal, watching: guard.Guard) -> None:
    ours.close(remove=True)
    watching.dismiss()


async def _release(monitor: Monitor, ours: Journal) -> None:
    """Give the claim back; or leave that to the guard, if something is left that this process cannot do."""
    watching = ours.guard
    assert isinstance(watching, guard.Guard)
    is_done = not ours.record.stopped and not isinstance(ours.record.work, LiveWork)
    if is_done:
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                await mark.give_up(monitor, CLAIM, ours.record.token)
        except (QsnapError, TimeoutError) as error:
            is_done = isinstance(error, MonitorError) and await has_ended(ours)
    if is_done:
        _drop(ours, watching)
    else:
        await _hand_over(monitor, ours, watching)


def _locked(holder: Holder | None, waited_s: float) -> VMLocked:
    if holder is None:
        cure = "If no qsnap is using the VM: qsnap recover --force removes the claim, and leaves the guest as it is"
        return VMLocked(f"its claim (the object {CLAIM} in QEMU) is of another version, or damaged", waited_s, cure)
    cure = _cure_of_stopped(holder.owner.pid) if holder.is_here else ""
    if not holder.is_here:
        cure = "It is on another machine or in another container. If it is dead: qsnap recover --force"
    return VMLocked(str(holder), waited_s, cure, holder.owner.pid if holder.is_here else None)


def _cure_of_stopped(pid: int) -> str:
    """What to do about a holder that somebody stopped; "" for one that works."""
    if not is_stopped(pid):
        return ""
    return f"It is stopped itself (SIGSTOP): kill -CONT {pid}; or kill -KILL {pid}, and its guard resumes the guest"


async def _recovered(monitor: Monitor, text: str, *, force: bool = False) -> Recovered | None:
    """Recover the run whose claim's mark has that *text*, if it is dead; None if it lives, or if that is unknown.

    :param force: if that is unknown, treat it as dead.
    """
    from qsnap.supervision import recovery

    holder = mark.decode(text)
    for other in journal.found():
        if holder and other.record.token == holder.token:
            return await _recover(monitor, other)
    is_dead = not holder.is_alive if holder and holder.is_here else force
    return await recovery.recover_by_mark(monitor, text, force=force) if is_dead else None


async def _recover(monitor: Monitor, dead: Found) -> Recovered | None:
    from qsnap.supervision import recovery

    taken = dead.take()
    if taken is None:
        return None
    try:
        return await recovery.recover(monitor, taken)
    finally:
        taken.close(remove=False)


async def recover_all(monitor: Monitor, *, force: bool = False) -> list[Recovered]:
    """Recover every run on this VM that died.

    :param force: also a run that may still live: it belongs to another machine or container, or its claim cannot be
        read.
    :raise VMLocked: a run lives.
    """
    done: list[Recovered | None] = []
    if (text := await monitor.mark(CLAIM)) is not None:
        recovered = await _recovered(monitor, text, force=force)
        if recovered is None:
            raise _locked(mark.decode(text), 0)
        done.append(recovered)
    # Journals without a mark belong to a QEMU that has ended, or to a run that died before it began or after it had
    # ended; one that is held cannot be taken
    done += [await _recover(monitor, other) for other in _journals(monitor)]
    return [item for item in done if item and item.actions]


async def run_of(monitor: Monitor) -> Unfinished | None:
    """The run that holds the claim on this VM; None if there is none."""
    text = await monitor.mark(CLAIM)
    if text is None:
        return None
    holder = mark.decode(text)
    if holder is None:
        return Unfinished(operation="", tags=(), pid=0, began="", is_alive=None)
    is_alive = next((other.is_held for other in journal.found() if other.record.token == holder.token), None)
    if is_alive is None and holder.is_here:
        is_alive = holder.is_alive
    return Unfinished(
        operation=holder.operation, tags=(holder.tag,), pid=holder.owner.pid, began=holder.began, is_alive=is_alive
    )


def _journals(monitor: Monitor) -> Iterator[Found]:
    socket = journal.socket_identity(monitor.address)
    qemu = process(monitor.pid) if monitor.pid else None
    for other in journal.found():
        if other.record.socket == socket or (qemu and other.record.qemu == qemu):
            yield other


async def wait_for_monitor(address: Address, deadline: float, wait_s: float) -> bool:
    """Wait until no qsnap of this user is using the VM at *address*.

    While QEMU writes, it answers over no monitor; and each monitor serves one client.

    :return: whether a qsnap was using it.
    :param deadline: by the loop's clock.
    :raise VMLocked: a qsnap still uses it, and the *wait_s* seconds to the deadline are over.
    """
    runs = [other.record for other in journal.found() if other.is_held]
    socket = journal.socket_identity(address)
    # Ask at most once, because it costs QEMU a connection.
    pid = listener_pid(address) if runs and not any(run.socket == socket for run in runs) else None

    def run_there() -> Record | None:
        held = (other.record for other in journal.found() if other.is_held)
        return next((run for run in held if _is_of(run, socket, pid)), None)

    if not any(_is_of(run, socket, pid) for run in runs):
        return False
    clock = asyncio.get_running_loop().time
    while record := run_there():
        if clock() >= deadline:
            owner = record.owner.pid if record.owner else 0
            cure = _cure_of_stopped(owner)
            raise VMLocked(f"process {owner}, {record.deed} since {record.began}", wait_s, cure, owner)
        await asyncio.sleep(_LOOK_S)
    return True


def _is_of(run: Record, socket: tuple[str, ...], pid: int | None) -> bool:
    """Whether the run uses this VM: same monitor socket, or same QEMU process."""
    if socket and run.socket == socket:
        return True
    if run.qemu is None or run.qemu.pid != pid:
        return False
    from qsnap.targets.running import is_qemu

    return is_qemu(run.qemu.pid)  # and not a proxy that leads to several
