"""The reset before a load: for a guest in a run state that a load keeps and no `cont` ends; and for a guest that stops
at once whenever it runs, so that its translated code cannot be dropped (:mod:`qsnap.operations.translation`).

The reset loses only what the load discards in any case. Afterwards the guest is in run state prelaunch, and has
executed no instruction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from qsnap.errors import PrecheckRefused
from qsnap.model.checks import Finding
from qsnap.model.qemu import RunState
from qsnap.model.runstates import needs_reset
from qsnap.monitor import Monitor

#: Seconds that a reset may take; it takes some milliseconds.
_RESET_S = 10.0
_LOOK_S = 0.01

#: What to do if qsnap makes no reset.
RESET_CURE = (
    "by QMP, from QEMU 6.0 on: `set-action` with reboot=reset, then `system_reset`; then load. Or start QEMU anew with "
    "-loadvm TAG"
)


def reset_findings(monitor: Monitor, runstate: RunState) -> Iterator[Finding]:
    """Why qsnap cannot reset a guest, although the load needs a reset.

    With -no-reboot, `system_reset` shuts the guest down: it does not leave run state shutdown then, and out of another
    state QEMU ends (qemu_system_reset_request; seen on 5.2 to 11.1).
    """
    if not needs_reset(runstate, monitor.version):
        return
    message = f"the guest is {runstate}, and only a reset ends that"
    match reboots(monitor.pid):
        case True:
            return
        case False:
            yield Finding.refusal(
                "runstate", f"{message}; but QEMU was started with -no-reboot, and shuts down instead", RESET_CURE
            )
        case None if runstate is not RunState.SHUTDOWN:
            yield Finding.refusal(
                "runstate",
                f"{message}; a reset would end QEMU if it was started with -no-reboot, which is not seen",
                "if it was not: `system_reset` in its monitor, then load",
            )


async def reset(monitor: Monitor) -> None:
    """Reset the guest, and wait until that is done.

    :raise PrecheckRefused: it stays in its run state; nothing was loaded.
    """
    before = await monitor.runstate()
    await monitor.reset()
    deadline = asyncio.get_running_loop().time() + _RESET_S
    while (runstate := await monitor.runstate()) is before:
        if asyncio.get_running_loop().time() > deadline:
            finding = Finding.refusal(
                "runstate",
                f"the guest stays {runstate} after a reset: QEMU may have been started with -no-reboot",
                RESET_CURE,
            )
            raise PrecheckRefused("nothing was loaded", [finding], "the guest is as it was before")
        await asyncio.sleep(_LOOK_S)


def reboots(pid: int | None) -> bool | None:
    """Whether QEMU resets a guest on the guest's request, by its command line; None if that is unknown."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes() if pid is not None else b""
    except OSError:
        raw = b""
    if not raw:
        return None
    words = [word.decode(errors="replace") for word in raw.split(b"\0")]
    given = [
        (word.removeprefix("-").removeprefix("-"), value)
        for word, value in zip(words, [*words[1:], ""], strict=True)
        if word.startswith("-")
    ]
    actions = ",".join(value for option, value in given if option == "action").split(",")
    if any(option == "no-reboot" for option, _ in given) or "reboot=shutdown" in actions:
        return False
    # A file of options may say so too
    return None if any(option in ("readconfig", "set") for option, _ in given) else True
