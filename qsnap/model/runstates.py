"""What a guest's run state means: who caused it, and what makes the guest run again. Pure.

::

    run state                        who         `cont`                     a load
    running                          -           -                          runs again
    suspended (ACPI S3)              the guest   nothing: `system_wakeup`   from 9.0 on runs again; before, keeps it
    paused, prelaunch                the user    runs                       keeps it
    guest-panicked, io-error,        the guest   runs                       puts back a guest that can run
    watchdog
    shutdown, internal-error         the guest   refused: `system_reset`    keeps it

Sources: QEMU's softmmu/runstate.c (runstate_needs_reset), monitor/qmp-cmds.c (qmp_cont), from 9.0 on system/cpus.c
(runstate_is_live, vm_was_suspended); all but internal-error, which TCG does not know, seen on 5.2 to 11.1.
"""

from __future__ import annotations

from qsnap.model.qemu import QemuVersion, RunState

#: From here on QEMU stops and resumes a guest in S3 as one that runs, and a snapshot of it holds that it is in S3.
S3_IS_SAVED = QemuVersion(9, 0, 0)

#: Run states that no `cont` ends: the guest has shut down, or broken down, by itself.
HAS_ENDED = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR})

#: Run states that a guest has come into by itself, and in which it does not go on; what has happened.
_BY_ITSELF = {
    RunState.GUEST_PANICKED: "its kernel has panicked",
    RunState.SHUTDOWN: "it has shut down",
    RunState.INTERNAL_ERROR: "QEMU could not go on with it",
    RunState.IO_ERROR: "a request to one of its disks has failed",
    RunState.WATCHDOG: "its watchdog has run out",
}


def is_live(runstate: RunState) -> bool:
    """Whether the guest runs, or sleeps by its own request (S3): nobody has to resume it."""
    return runstate in (RunState.RUNNING, RunState.SUSPENDED)


def takes_stop(runstate: RunState, version: QemuVersion) -> bool:
    """Whether `stop` stops the guest, and `cont` then restores the state before."""
    return runstate is RunState.RUNNING or (runstate is RunState.SUSPENDED and version >= S3_IS_SAVED)


def needs_reset(runstate: RunState, version: QemuVersion) -> bool:
    """Whether a load would keep the run state, and no `cont` would end it: the guest must be reset before the load."""
    return runstate in HAS_ENDED or (runstate is RunState.SUSPENDED and version < S3_IS_SAVED)


def runs_after_load(runstate: RunState) -> bool:
    """Whether a guest in that state should run after a load: every guest but one that its user paused."""
    return is_live(runstate) or runstate in _BY_ITSELF


def is_own_stop(runstate: RunState) -> bool:
    """Whether the guest stopped by itself, and `cont` ends that."""
    return runstate in _BY_ITSELF and runstate not in HAS_ENDED


def happened(runstate: RunState) -> str:
    """What happened to a guest that came into that state by itself; "" for any other state."""
    return _BY_ITSELF.get(runstate, "")


def trouble_of(runstate: RunState, version: QemuVersion) -> str:
    """Why a guest could not go on from a snapshot in that state; "" if it could."""
    if runstate in _BY_ITSELF:
        return f"the guest is {runstate}: {_BY_ITSELF[runstate]}"
    if runstate is RunState.SUSPENDED and version < S3_IS_SAVED:
        return "the guest is suspended (S3), and QEMU before 9.0 does not keep that: once loaded, nothing wakes it"
    return ""


def cure_of(runstate: RunState) -> str:
    """What makes a guest in that state run again."""
    match runstate:
        case RunState.IO_ERROR:
            return "its own writes fail. Make room on the file system of its images, then `cont` in its monitor"
        case RunState.SUSPENDED:
            return "it sleeps (S3). `system_wakeup` in its monitor wakes it"
        case _ if runstate in HAS_ENDED:
            return "it has ended by itself. `system_reset` in its monitor, then `cont`"
        case RunState.GUEST_PANICKED | RunState.WATCHDOG:
            return "load an older snapshot, or try `cont` in its monitor"
        case _:
            return "try `cont` in its monitor"
