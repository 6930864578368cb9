"""Pause and resume the guest, as `stop` and `cont` do; a resume that would run a broken guest is refused."""

from __future__ import annotations

from qsnap.errors import CommandFailed, PrecheckRefused, QsnapError
from qsnap.model.checks import Finding
from qsnap.model.qemu import RunState
from qsnap.model.results import GuestState
from qsnap.model.runstates import HAS_ENDED, cure_of, is_live
from qsnap.monitor.names import HALF_RESTORED
from qsnap.runs.run import Run


async def pause(run: Run) -> GuestState:
    """Pause the guest; one that does not run, whatever stopped it, is left as it is.

    :return: its run state before and now.
    :raise QsnapError: it has not stopped.
    """
    monitor = run.monitor
    before = await monitor.runstate()
    if is_live(before):
        await monitor.stop()
    now = await monitor.runstate()
    if is_live(now):
        raise QsnapError(f"the guest is {now}, and `stop` does not stop it")
    return GuestState(runstate=now, before=before)


async def resume(run: Run) -> GuestState:
    """Run a guest that is paused, or has stopped by itself where `cont` ends that.

    :return: its run state before and now.
    :raise PrecheckRefused: a load has failed midway, so that it must not run; or it has ended, or is asleep.
    :raise QsnapError: it does not run.
    """
    monitor = run.monitor
    before = await monitor.runstate()
    if before is RunState.RUNNING:
        return GuestState(runstate=before, before=before)
    if await monitor.mark(HALF_RESTORED) is not None:
        finding = Finding.refusal(
            "half-restored", "a load has failed midway: RAM and disks may be of different moments",
            "load a good snapshot: qsnap load TAG",
        )  # fmt: skip
        raise PrecheckRefused("the guest is not resumed", [finding])
    if before in HAS_ENDED or before is RunState.SUSPENDED:
        raise PrecheckRefused(
            "the guest is not resumed", [Finding.refusal("run-state", f"it is {before}", cure_of(before))]
        )
    try:
        await monitor.cont()
    except CommandFailed as error:
        raise QsnapError(f"the guest does not run: {error.reason}") from error
    now = await monitor.runstate()
    if not is_live(now):
        raise QsnapError(f"the guest was resumed, and is {now}: {cure_of(now)}")
    return GuestState(runstate=now, before=before)
