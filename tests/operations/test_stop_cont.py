"""`pause` and `resume`: what they refuse, and what they report where QEMU does not do it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qsnap.errors import CommandFailed, PrecheckRefused, QsnapError
from qsnap.model.qemu import RunState
from qsnap.model.results import GuestState
from qsnap.model.runstates import HAS_ENDED
from qsnap.monitor.names import HALF_RESTORED
from qsnap.operations.stop_cont import pause, resume
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor

pytestmark = pytest.mark.no_qemu

RUNNING, PAUSED, SUSPENDED = RunState.RUNNING, RunState.PAUSED, RunState.SUSPENDED


@dataclass
class Willful(FakeMonitor):
    """`stop` and `cont` bring the guest into another run state than they should; None: QEMU refuses."""

    into: RunState | None = None

    async def stop(self) -> float | None:
        return await self._into("stop")

    async def cont(self) -> float | None:
        return await self._into("cont")

    async def _into(self, command: str) -> float | None:
        self.calls.append(command)
        if self.into is None:
            raise CommandFailed(command, "no")
        self.state = self.into
        return None


@pytest.mark.parametrize("before", RunState)
async def test_only_what_runs_is_stopped(before: RunState) -> None:
    monitor = FakeMonitor(state=before)
    is_stopped = before in (RUNNING, SUSPENDED)
    assert await pause(Run(monitor)) == GuestState(runstate=PAUSED if is_stopped else before, before=before)
    assert monitor.calls == (["stop"] if is_stopped else [])


async def test_a_guest_that_does_not_stop() -> None:
    """Before 9.0 QEMU does not stop one that is asleep."""
    with pytest.raises(QsnapError, match="the guest is suspended, and `stop` does not stop it"):
        await pause(Run(Willful(state=SUSPENDED, into=SUSPENDED)))


@pytest.mark.parametrize("before", [one for one in RunState if one not in (SUSPENDED, *HAS_ENDED)])
async def test_what_is_stopped_is_resumed(before: RunState) -> None:
    monitor = FakeMonitor(state=before)
    assert await resume(Run(monitor)) == GuestState(runstate=RUNNING, before=before)
    assert monitor.calls == ([] if before is RUNNING else ["cont"])


async def test_a_guest_that_falls_asleep_as_it_is_resumed() -> None:
    """It does what it wants to do."""
    monitor = Willful(state=PAUSED, into=SUSPENDED)
    assert await resume(Run(monitor)) == GuestState(runstate=SUSPENDED, before=PAUSED)


@pytest.mark.parametrize("before", [SUSPENDED, *sorted(HAS_ENDED)])
async def test_what_cont_does_not_end_is_refused(before: RunState) -> None:
    monitor = FakeMonitor(state=before)
    with pytest.raises(PrecheckRefused, match=f"it is {before}") as refused:
        await resume(Run(monitor))
    assert [finding.code for finding in refused.value.findings] == ["run-state"]
    assert monitor.calls == []


async def test_a_guest_that_a_load_has_half_restored_is_not_resumed() -> None:
    monitor = FakeMonitor(state=PAUSED, texts={HALF_RESTORED: "yes"})
    with pytest.raises(PrecheckRefused, match="a load has failed midway"):
        await resume(Run(monitor))
    assert (monitor.calls, monitor.state) == ([], PAUSED)
    monitor.state = RUNNING  # somebody has resumed it, with `cont`
    assert await resume(Run(monitor)) == GuestState(runstate=RUNNING, before=RUNNING)


@pytest.mark.parametrize(
    ("into", "message"),
    [
        (None, "the guest does not run: no"),
        (RunState.IO_ERROR, "the guest was resumed, and is io-error: its own writes fail"),
    ],
)
async def test_a_guest_that_does_not_run(into: RunState | None, message: str) -> None:
    with pytest.raises(QsnapError, match=message):
        await resume(Run(Willful(state=PAUSED, into=into)))
