"""TCG's translated code, which must not outlive a load.

Facts (QEMU's accel/tcg/tcg-all.c, system/cpus.c, system/runstate.c; seen on 11.1):

* TCG keeps translation blocks (TBs) of the guest's code. A load writes RAM without TCG's notice, so the TBs of before
  must go. Up to 10.0 every load flushes them (cpu_common_post_load).
* Since 10.2 only a guest that stops *into* the run state "restore-vm" has them flushed. A load of a guest that is
  already stopped keeps them: the guest then runs code that its RAM does not hold.
* HMP's ``loadvm`` of a tag that does not exist stops a running guest into "restore-vm" and touches nothing else. It is
  the one way to have the flush without a load, on every monitor.
* "restore-vm" is not a state to leave a guest in: QEMU aborts when a migration, or a live save, begins there ("invalid
  runstate transition"; seen on 7.2, 10.0 and 11.1). Only `cont` leads out of it.
* ``info jit`` counts the TBs, and must not be asked: it ends QEMU where as many hash chains have one length as have
  another one, which happens with few TBs (util/qdist.c: qdist_pr_internal divides by nothing; seen on 11.1).
* A TB is used only where it was made under the same flags, and "one instruction per TB" is one (accel/tcg/cpu-exec.c:
  curr_cflags, tb_lookup; since 8.1 HMP's ``one-insn-per-tb`` sets it for a QEMU that runs).
* KVM translates nothing.
"""

from __future__ import annotations

import asyncio
import os

from qsnap.errors import JobFailed
from qsnap.model.qemu import QemuVersion, RunState
from qsnap.model.runstates import is_live, is_own_stop
from qsnap.monitor import Monitor
from qsnap.monitor.hmp import hardware

#: From here on a load of a stopped guest keeps TBs: wrong in 11.1, right in 10.0, and the source has it in 10.2.
_KEPT_SINCE = QemuVersion(10, 1, 0)
_SINGLY = "one-insn-per-tb"


async def flush_translations(monitor: Monitor, *, runs: bool) -> None:
    """Have QEMU drop the translated code of a stopped guest whose RAM is about to be loaded.

    The guest runs for some milliseconds. Only what it does to devices that are not loaded outlasts the load.

    :param runs: the guest is to run after the load; it is left in "restore-vm". If not, it is left paused: what it
        executes to get there is translated one instruction at a time, and thus never used again.
    :raise JobFailed: QEMU keeps the code, so that a load would be wrong. Nothing was loaded.
    """
    if monitor.version < _KEPT_SINCE or hardware.accelerator(await monitor.human_answer("info kvm")) == "kvm":
        if not runs:
            await _leave_own_stop(monitor)
        return
    if runs:
        await _drop(monitor)
        return
    await monitor.human_answer(f"{_SINGLY} on")
    try:
        await _drop(monitor)
        await leave_restore_vm(monitor)
        await _leave_own_stop(monitor)
    finally:
        await monitor.human_answer(f"{_SINGLY} off")


async def end_flush(monitor: Monitor, *, was_running: bool) -> None:
    """After a flush that may not have come to its end: QEMU translates as ever, and a guest that was paused is so."""
    if monitor.version >= _KEPT_SINCE:
        await monitor.human_answer(f"{_SINGLY} off")
    if not was_running:
        await leave_restore_vm(monitor)


async def _drop(monitor: Monitor) -> None:
    await _pass(monitor, "cont", f"loadvm qsnap-none-{os.urandom(8).hex()}")
    if await monitor.runstate() is not RunState.RESTORE_VM:
        reason = "QEMU keeps code that it has translated, and would run that in place of what RAM holds"
        raise JobFailed("load", reason, "nothing was loaded: RAM and disks are as they were")


async def leave_restore_vm(monitor: Monitor) -> None:
    """Have a guest that is stopped in "restore-vm" paused, or one that runs: it runs for less than a millisecond."""
    runstate = await monitor.runstate()
    if runstate is RunState.RESTORE_VM or is_live(runstate):
        await _pass(monitor, "cont", "stop")


async def _leave_own_stop(monitor: Monitor) -> None:
    """Have a guest that has stopped by itself (it has panicked, ...) paused, as if by its user: a load keeps the state.

    It runs for less than a millisecond; so this is due before a load, which throws away what it does in that.
    """
    if is_own_stop(await monitor.runstate()):
        await _pass(monitor, "cont", "stop")


async def _pass(monitor: Monitor, *lines: str) -> None:
    """Give HMP *lines* one after the other, with as little time between them as the monitor allows."""
    await asyncio.gather(*(monitor.human_answer(line) for line in lines))
