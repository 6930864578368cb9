"""What becomes of a stop where QEMU does not resume the guest, or is gone, or another one answers in its place."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from qsnap.errors import CommandFailed, ConnectError, GuestLeftStopped, MonitorBusy, MonitorLost, QsnapError
from qsnap.host.processes import Process, process, this_process
from qsnap.model.qemu import QemuVersion, RunState
from qsnap.monitor.connection import AnotherAnswers
from qsnap.runs import pause as pausing
from qsnap.runs.group import Point
from qsnap.runs.journal import Journal
from qsnap.runs.pause import RECONNECT_ATTEMPTS, Pause, has_ended, reconnect, stopped
from qsnap.runs.record import Record
from support.fake_monitor import FakeMonitor

pytestmark = pytest.mark.no_qemu

REFUSED = "QEMU refused cont: There is a dump in process, please wait. "
AT_AN_ADDRESS = ("unix", "/nowhere")


class Guard:
    """Is ready at once."""

    pid = 17

    def __init__(self, monitor: FakeMonitor) -> None:
        self._monitor = monitor

    async def ready(self) -> None:
        self._monitor.calls.append("ready")


class Member:
    """Waits for nobody."""

    def __init__(self, monitor: FakeMonitor) -> None:
        self._monitor = monitor
        self.stopped: tuple[float | None, float] | None = None
        self.resumed: tuple[float | None, float] | None = None

    async def meet(self, point: Point) -> Mapping[str, Any]:
        self._monitor.calls.append(point.name)
        return {}


@dataclass
class Ending(FakeMonitor):
    """The guest comes into a run state when it is to be resumed, which QEMU refuses."""

    ends: RunState = RunState.SHUTDOWN

    async def cont(self) -> float | None:
        self.state = self.ends
        raise CommandFailed("cont", "Resetting the Virtual Machine is required")


@dataclass
class Lost(FakeMonitor):
    """The connection is lost as the guest is resumed. What is in *obstacles* meets a new one, in turn."""

    obstacles: tuple[type[Exception], ...] = ()
    is_lost: bool = False

    async def cont(self) -> float | None:
        if "cont" not in self.calls:
            self.is_lost = True
        await super().cont()
        if self.is_lost:
            raise MonitorLost("the connection was cut")
        return None

    async def runstate(self) -> RunState:
        if self.is_lost:
            raise MonitorLost("it is gone")
        return await super().runstate()

    async def reconnect(self, timeout_s: float) -> None:
        tries = self.calls.count("reconnect")
        self.calls.append("reconnect")
        if tries < len(self.obstacles):
            raise obstacle("it is silent", "why") if (obstacle := self.obstacles[tries]) is MonitorBusy else obstacle()
        self.is_lost = False

    async def aclose(self) -> None:
        self.calls.append("close")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits lets others have their turn, and takes no time."""
    monkeypatch.setattr(pausing, "asyncio", SimpleNamespace(sleep=lambda _: asyncio.sleep(0)))


@pytest.fixture
def living() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        yield child


@pytest.fixture
def dead() -> Process:
    child = subprocess.Popen(["true"])
    found = process(child.pid) or Process(pid=child.pid, start=0)
    child.wait()
    return found


@pytest.mark.parametrize(("stop", "cont"), [(100.0, 100.25), (100.0, None), (None, 100.25), (None, None)])
async def test_how_long_it_was(stop: float | None, cont: float | None) -> None:
    """By QEMU's time stamps, if there are both; by our clock otherwise."""
    monitor = FakeMonitor()

    def told(answer: float | None) -> Any:
        async def tell() -> float | None:
            return answer

        return tell

    monitor.stop, monitor.cont = told(stop), told(cont)  # type: ignore[method-assign]
    began = time.monotonic()
    async with stopped(monitor, Journal()) as pause:
        assert (pause.runstate, pause.pause_ms) == (RunState.RUNNING, 0.0)
    if stop and cont:
        assert pause.pause_ms == 250
    else:
        assert 0 < pause.pause_ms <= (time.monotonic() - began) * 1000


async def test_a_guest_that_is_to_stay_stopped() -> None:
    monitor = FakeMonitor()
    async with stopped(monitor, Journal()) as pause:
        pause.resume = False
    assert (pause.runstate, pause.pause_ms, monitor.calls) == (RunState.PAUSED, 0.0, ["stop"])


@pytest.mark.parametrize("has_stopped", [True, False])
async def test_a_stop_that_is_qemu_s_own(has_stopped: bool) -> None:
    """It resumes the guest, too; if it does not, that is done here."""
    monitor, journal = FakeMonitor(), Journal()
    journal.member = member = Member(monitor)  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        async with stopped(monitor, journal, by_qemu=True):
            assert not journal.record.stopped
            if has_stopped:
                monitor.state = RunState.PAUSED
            raise ZeroDivisionError
    assert monitor.calls == ["READY", "STOPPED", *(["cont"] if has_stopped else [])]
    assert (member.resumed is not None) is has_stopped
    assert monitor.state is RunState.RUNNING


async def test_qemu_resumes_the_guest_in_the_block() -> None:
    """So it did where it runs at the end, and when is known."""
    monitor = FakeMonitor()
    async with stopped(monitor, Journal()) as pause:
        monitor.state = RunState.RUNNING
        pause.resumed_by_qemu(None)
        assert pause.pause_ms > 0
    assert monitor.calls == ["stop"]


def test_what_a_guest_has_come_into_by_itself() -> None:
    pause = Pause(RunState.RUNNING, QemuVersion(11, 1, 0))
    pause.deed = "'t' was loaded"
    assert str(pause.runs_no_more(RunState.GUEST_PANICKED)).startswith(
        "'t' was loaded; since then the guest is guest-panicked (its kernel has panicked): load an older"
    )
    assert str(pause.runs_no_more(RunState.PAUSED)).startswith("'t' was loaded; since then the guest is paused: try")


@pytest.mark.parametrize("was", [RunState.RUNNING, RunState.PAUSED])
async def test_a_guest_that_has_ended_by_itself(was: RunState) -> None:
    """No guard has to go on with it."""
    monitor, journal = Ending(state=was), Journal()
    with pytest.raises(QsnapError) as failed:
        async with stopped(monitor, journal) as pause:
            pause.resume = True
    kind, words = (GuestLeftStopped, "was running") if was is RunState.RUNNING else (QsnapError, "was to run")
    assert type(failed.value) is kind
    assert str(failed.value).startswith(f"the guest {words} and is shutdown: it has ended by itself")
    assert not journal.record.stopped


@pytest.mark.parametrize(
    ("was", "is_guarded", "kind", "message"),
    [
        (
            RunState.RUNNING, True, GuestLeftStopped,
            f"the guest was running and is stopped now, and resuming it failed: {REFUSED}Process 17, its guard, goes "
            "on trying. If that is in vain: Try `cont` in its monitor",
        ),
        (
            RunState.RUNNING, False, GuestLeftStopped,
            f"the guest was running and is stopped now, and resuming it failed: {REFUSED}Try `cont` in its monitor",
        ),
        # Its guard resumes none that was paused
        (
            RunState.PAUSED, True, QsnapError,
            f"the guest is still stopped, and resuming it failed: {REFUSED}Try `cont` in its monitor",
        ),
    ],
)  # fmt: skip
async def test_who_goes_on_with_a_guest_that_is_not_resumed(
    dead: Process, was: RunState, is_guarded: bool, kind: type[QsnapError], message: str
) -> None:
    """A QEMU that answers lives, whatever is seen of a process."""
    monitor, journal = FakeMonitor(state=was, cont_fails=True), Journal(Record(qemu=dead))
    journal.guard = Guard(monitor) if is_guarded else None
    with pytest.raises(QsnapError) as failed:
        async with stopped(monitor, journal) as pause:
            pause.resume = True
    assert (type(failed.value), str(failed.value)) == (kind, message)
    assert journal.record.stopped is (was is RunState.RUNNING)


async def test_the_connection_is_lost_for_good(at_once: None) -> None:
    monitor, journal = Lost(obstacles=(ConnectError,) * RECONNECT_ATTEMPTS), Journal()
    with pytest.raises(GuestLeftStopped, match=r"Connect again and send `cont`$") as failed:
        async with stopped(monitor, journal):
            pass
    assert isinstance(failed.value.__cause__, ConnectError)
    assert monitor.calls.count("reconnect") == RECONNECT_ATTEMPTS
    assert journal.record.stopped


async def test_the_connection_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cut it may cut the next, so some time passes between two attempts."""
    monitor, journal = Lost(obstacles=(ConnectError, ConnectError)), Journal()
    pauses: list[float] = []

    async def slept(delay: float) -> None:
        pauses.append(delay)
        await asyncio.sleep(0)

    monkeypatch.setattr(pausing, "asyncio", SimpleNamespace(sleep=slept))
    async with stopped(monitor, journal) as pause:
        pass
    assert [call for call in monitor.calls if call != "stop"] == ["cont", *["reconnect"] * 3, "cont"]
    assert (pause.runstate, journal.record.stopped) == (RunState.RUNNING, False)
    assert pauses == sorted(pauses)
    assert len([delay for delay in pauses if delay > 0]) == 2


async def test_a_monitor_that_another_client_holds_is_tried_once(at_once: None) -> None:
    """Each attempt has waited for long already."""
    monitor, journal = Lost(obstacles=(MonitorBusy,)), Journal()
    with pytest.raises(GuestLeftStopped, match="it is silent: why"):
        async with stopped(monitor, journal):
            pass
    assert monitor.calls.count("reconnect") == 1


async def test_qemu_has_ended(dead: Process) -> None:
    """There is nothing left that a guard could resume."""
    monitor, journal = Lost(obstacles=(MonitorBusy,)), Journal(Record(qemu=dead))
    with pytest.raises(MonitorLost) as lost:
        async with stopped(monitor, journal):
            pass
    assert str(lost.value) == "QEMU has ended; there is no guest any more"
    assert not journal.record.stopped


async def test_another_qemu_answers() -> None:
    """It has not the mark of the run: it is left alone, at once."""
    monitor, journal = Lost(), Journal(Record(token="mine", address=AT_AN_ADDRESS))  # noqa: S106 (no secret)
    with pytest.raises(AnotherAnswers):
        await reconnect(monitor, journal)
    assert monitor.calls == ["reconnect", "close"]
    assert journal.another_answers
    monitor.calls.clear()
    with pytest.raises(MonitorLost) as lost:
        async with stopped(monitor, journal):
            pass
    assert str(lost.value) == f"QEMU has ended; there is no guest any more, and {AnotherAnswers(journal.record.where)}"
    assert monitor.calls == ["stop", "cont", "reconnect", "close"]


async def test_whether_its_process_ends(at_once: None, dead: Process) -> None:
    """Behind a proxy only the proxy's is seen, which lives."""
    for qemu, another_answers, expected in (
        (dead, False, True),
        (None, False, False),
        (None, True, True),
        (this_process(), False, False),
        (this_process(), True, True),
    ):
        journal = Journal(Record(qemu=qemu))
        journal.another_answers = another_answers
        assert await has_ended(journal) is expected, (qemu, another_answers)


async def test_a_process_may_end_a_little_later(living: subprocess.Popen[bytes]) -> None:
    def end() -> None:
        living.kill()
        living.wait(30)

    asyncio.get_running_loop().call_soon(end)
    assert await has_ended(Journal(Record(qemu=process(living.pid))))


async def test_the_order_in_a_group() -> None:
    """All guards are ready before any guest is stopped; what is about to be done is written down first."""
    monitor, journal = FakeMonitor(), Journal()
    member = Member(monitor)
    journal.guard, journal.member = Guard(monitor), member  # type: ignore[assignment]
    stop = monitor.stop

    async def noted() -> float | None:
        assert journal.record.stopped
        return await stop()

    monitor.stop = noted  # type: ignore[method-assign]
    async with stopped(monitor, journal):
        assert monitor.calls == ["ready", "READY", "stop", "STOPPED"]
        assert member.stopped is not None
        assert member.resumed is None
    assert monitor.calls[4:] == ["cont"]
    assert member.resumed is not None
    assert member.resumed > member.stopped


async def test_a_paused_guest_of_a_group() -> None:
    """It was not stopped, and does not count for how far apart the guests were stopped and resumed."""
    monitor, journal = FakeMonitor(state=RunState.PAUSED), Journal()
    journal.member = member = Member(monitor)  # type: ignore[assignment]
    async with stopped(monitor, journal) as pause:
        pass
    assert (member.stopped, member.resumed, pause.pause_ms, monitor.calls) == (None, None, 0.0, ["READY", "STOPPED"])
