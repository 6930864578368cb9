"""What is done about a run that has died, where QEMU would not let itself be brought into the state of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from qsnap.errors import GuestLeftStopped, QsnapError
from qsnap.host.processes import Process, this_process
from qsnap.model.qemu import RunState
from qsnap.model.results import Recovered
from qsnap.monitor.names import CLAIM, HALF_RESTORED, RECOVERY
from qsnap.runs import mark, runtime_dir
from qsnap.runs.journal import Journal
from qsnap.runs.mark import Holder
from qsnap.runs.record import DeleteWork, LoadStage, LoadWork, Record, SaveWork
from qsnap.supervision import recovery
from support.fake_monitor import FakeMonitor

pytestmark = pytest.mark.no_qemu

DISKS = ("disk0", "disk1")
#: The number is another process's by now.
ENDED = Process(pid=os.getpid(), start=1)
SAVE = SaveWork(disk_tag="t", vmstate="disk0", devices=DISKS, older=(), older_files=())
NOWHERE = "another boot"


def dead(monitor: FakeMonitor, operation: str = "save", **facts: Any) -> Journal:
    """The journal of a dead run that has the claim."""
    record = Record(token="a" * 16, operation=operation, tags=("t",), owner=ENDED, began="then", **facts)
    monitor.texts[CLAIM] = mark.holder(record, None, was_running=True).encode()
    return Journal(record)


async def actions(monitor: FakeMonitor, operation: str = "save", **facts: Any) -> tuple[str, ...]:
    """What is done about it."""
    done = await recovery.recover(monitor, dead(monitor, operation, **facts))
    assert (done.operation, done.tags, done.pid, done.began) == (operation, ("t",), ENDED.pid, "then")
    assert CLAIM not in monitor.texts
    return done.actions


async def test_a_write_that_goes_on_is_waited_for() -> None:
    """What it makes shows only when it has ended. The claim is kept until that is cleared up."""

    class Writing(FakeMonitor):
        journal: Journal
        writes = True
        is_claimed = False

        async def settle(self) -> QsnapError | None:
            assert not self.journal.record.stopped
            self.writes = False
            await self.snapshot_save("t", "disk0", DISKS)
            return None

        async def snapshot_delete(self, tag: str, devices: Sequence[str]) -> None:
            await super().snapshot_delete(tag, devices)
            self.is_claimed = CLAIM in self.texts

    monitor = Writing(state=RunState.PAUSED)
    monitor.journal = dead(monitor, stopped=True, work=msgspec.structs.replace(SAVE, saving=True))
    resumed, removed = (await recovery.recover(monitor, monitor.journal)).actions
    assert resumed == "the guest was resumed"
    assert removed.startswith("what this save made was removed from ")
    assert (monitor.writes, monitor.rows) == (False, {"disk0": [], "disk1": []})
    assert (monitor.is_claimed, monitor.texts) == (True, {})


async def test_a_save_that_had_not_begun() -> None:
    """It has only stopped the guest."""
    monitor = FakeMonitor(state=RunState.PAUSED)
    assert await actions(monitor, stopped=True, work=SAVE) == ("the guest was resumed",)
    assert await actions(FakeMonitor(), work=SAVE) == ()


async def test_what_has_become_since_of_a_save_that_was_done_is_not_touched() -> None:
    """Only its claim was left, and meanwhile its user has deleted a part of the snapshot by hand."""
    monitor = FakeMonitor()
    await monitor.snapshot_save("t", "disk0", ["disk0"])
    work = msgspec.structs.replace(SAVE, saving=True, is_complete=True)
    assert await actions(monitor, is_done=True, work=work) == ()
    assert monitor.calls == ["save"]


async def test_a_guest_that_qemu_does_not_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim and journal stay, for the next one who tries."""
    monkeypatch.setattr(recovery, "_CONT_TRIES", 2)
    monkeypatch.setattr(recovery, "_RETRY_S", 0)
    monitor = FakeMonitor(state=RunState.PAUSED, cont_fails=True)
    journal = dead(monitor, stopped=True)
    with pytest.raises(GuestLeftStopped, match="QEMU does not resume it: There is a dump in process"):
        await recovery.recover(monitor, journal)
    assert monitor.calls == ["cont", "cont"]
    assert journal.record.stopped
    assert CLAIM in monitor.texts


async def test_a_guest_that_qemu_resumes_when_it_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the way ends meanwhile."""
    monkeypatch.setattr(recovery, "_RETRY_S", 0)
    monitor = FakeMonitor(state=RunState.PAUSED, cont_fails=True)

    async def dump() -> None:
        monitor.cont_fails = False

    dumping = asyncio.create_task(dump())
    assert await actions(monitor, stopped=True) == ("the guest was resumed",)
    assert monitor.calls == ["cont", "cont"]
    await dumping


async def test_a_guest_that_has_shut_down() -> None:
    """QEMU refuses to resume it, and nobody goes on trying."""
    monitor = FakeMonitor(state=RunState.SHUTDOWN, cont_fails=True)
    (action,) = await actions(monitor, stopped=True)
    assert action.startswith("the guest is shutdown: it has ended by itself")
    assert monitor.calls == ["cont"]


@pytest.mark.parametrize("stopped", [True, False])
async def test_a_load_that_went_well(stopped: bool) -> None:
    """A guest that its user had paused stays paused."""
    tidied: list[int] = []

    class Tidy(FakeMonitor):
        async def tidy(self) -> None:
            tidied.append(1)

    monitor = Tidy(state=RunState.PAUSED)
    work = LoadWork(was_running=stopped, stage=LoadStage.BEGUN)
    done = await actions(monitor, "load", stopped=stopped, work=work)
    assert done == (("the guest was resumed",) if stopped else ())
    assert monitor.calls == (["cont"] if stopped else [])
    assert tidied, "QEMU may still have a state file"
    assert monitor.texts == {}


@pytest.mark.parametrize(
    ("stage", "knows", "why"),
    [
        (LoadStage.FAILED, True, "QEMU reported an error"),
        (LoadStage.BEGUN, False, "nobody has seen how the load ended"),
    ],
)
async def test_a_load_that_failed(stage: LoadStage, knows: bool, why: str) -> None:
    monitor = FakeMonitor(state=RunState.PAUSED, chooses_devices=knows)
    (action,) = await actions(monitor, "load", stopped=True, work=LoadWork(was_running=True, stage=stage))
    assert action.startswith(f"the load of t has failed midway ({why})")
    assert (monitor.calls, monitor.texts) == ([], {HALF_RESTORED: "yes"})


@pytest.mark.parametrize("stage", [LoadStage.FLUSHING, LoadStage.LOADED])
@pytest.mark.parametrize("was_running", [True, False])
async def test_a_load_that_had_not_begun_or_was_done(was_running: bool, stage: LoadStage) -> None:
    """Its guest runs on, or is paused, as before. Once it is, a later try would do that to whatever it is then."""
    lines: list[str] = []

    class Human(FakeMonitor):
        async def human_answer(self, line: str) -> str:
            lines.append(line)
            return ""

    monitor = Human(state=RunState.RESTORE_VM)
    journal = dead(monitor, "load", stopped=was_running, work=LoadWork(was_running=was_running, stage=stage))
    done = await recovery.recover(monitor, journal)
    assert done.actions == (("the guest was resumed",) if was_running else ())
    assert (lines, monitor.calls) == (
        (["one-insn-per-tb off"], ["cont"]) if was_running else (["one-insn-per-tb off", "cont", "stop"], [])
    )
    assert journal.record.work is None


async def test_settings_are_put_back_when_the_stream_has_ended() -> None:
    calls: list[tuple[str, Mapping[str, int] | None]] = []

    class Live:
        async def end_stream(self) -> None:
            calls.append(("end_stream", None))

        async def put_back(self, settings: Mapping[str, int]) -> None:
            calls.append(("put_back", settings))

    class Streaming(FakeMonitor):
        live = SimpleNamespace()  # type: ignore[assignment]

    monitor = Streaming()
    monitor.live = Live()  # type: ignore[assignment]
    ended, put_back = ("end_stream", None), ("put_back", {"max-bandwidth": 1})
    for facts, expected in (
        ({}, []),
        ({"forgetting": True}, [ended]),
        ({"settings": {"max-bandwidth": 1}}, [put_back]),
        ({"forgetting": True, "settings": {"max-bandwidth": 1}}, [ended, put_back]),
    ):
        calls.clear()
        assert await actions(monitor, "delete", **facts) == ()
        assert calls == expected


#: What of the tag is on which disks; how many of two state files there are, or of none; what a group has decided; and
#: whether the deletion is completed.
DELETIONS = [
    pytest.param(DISKS, 2, None, False, id="not begun"),
    pytest.param(("disk0",), 2, None, True, id="one disk"),
    pytest.param((), 2, None, True, id="all disks"),
    pytest.param((), 0, None, False, id="all"),
    pytest.param(("disk0",), -1, None, True, id="one disk, without files"),
    pytest.param(DISKS, 1, None, True, id="a file"),
    pytest.param(DISKS, 2, True, True, id="decided"),
    pytest.param(("disk0",), 2, False, False, id="not decided"),
]


@pytest.mark.parametrize(("on", "left", "decided", "completes"), DELETIONS)
async def test_a_deletion_that_has_begun_is_completed(
    tmp_path: Path, on: tuple[str, ...], left: int, decided: bool | None, completes: bool
) -> None:
    monitor = FakeMonitor()
    if on:
        await monitor.snapshot_save("t", on[0], on)
    files = [tmp_path / name for name in ("b", "a")] if left >= 0 else []
    there = files[: max(left, 0)]
    for file in there:
        file.write_text("")
    group = "b" * 16 if decided is not None else ""
    if decided:
        runtime_dir.decide(group)
    work = DeleteWork(devices=DISKS, disk_tags=("t",), files=tuple(map(str, files)))
    done = await actions(monitor, "delete", work=work, group=group)
    assert done == (("the deletion of 't' was completed",) if completes else ())
    assert [name for name, rows in monitor.rows.items() if rows] == ([] if completes else list(on))
    assert [file for file in files if file.exists()] == ([] if completes else there)


async def test_a_deletion_that_cannot_be_completed(tmp_path: Path) -> None:
    """It shows in the list, and may be tried again."""
    (tmp_path / "a").mkdir()
    work = DeleteWork(devices=(), disk_tags=(), files=(str(tmp_path / "a"), str(tmp_path / "b")))
    (action,) = await actions(FakeMonitor(), "delete", work=work)
    assert action.startswith("the deletion of 't' could not be completed: ")


async def test_a_run_whose_mark_is_gone_is_not_recovered() -> None:
    """This is another QEMU, or the run had not begun."""
    monitor = FakeMonitor(state=RunState.PAUSED)
    journal = dead(monitor, stopped=True)
    theirs = monitor.texts[CLAIM] = mark.of_this_process("save", "x").encode()
    assert (await recovery.recover(monitor, journal)).actions == ()
    assert (monitor.state, monitor.calls, monitor.texts) == (RunState.PAUSED, [], {CLAIM: theirs})
    monitor.texts.clear()
    assert (await recovery.recover(monitor, journal)).actions == ()
    assert (monitor.state, monitor.calls) == (RunState.PAUSED, [])


def claim_of(operation: str = "save", *, was_running: bool = True) -> Holder:
    record = Record(token="a" * 16, operation=operation, tags=("t",), owner=ENDED, began="then")
    return mark.holder(record, None, was_running=was_running)


@pytest.mark.parametrize(
    ("operation", "was_running", "resumes"), [("save", True, True), ("save", False, False), ("load", True, False)]
)
async def test_by_the_mark_alone_only_what_a_save_has_stopped_is_resumed(
    operation: str, was_running: bool, resumes: bool
) -> None:
    text = claim_of(operation, was_running=was_running).encode()
    monitor = FakeMonitor(state=RunState.PAUSED, texts={CLAIM: text})
    done = await recovery.recover_by_mark(monitor, text)
    told = ("the guest was resumed",) if resumes else ()
    assert done == Recovered(operation=operation, tags=("t",), pid=ENDED.pid, began="then", actions=told)
    assert (monitor.calls, monitor.texts) == (["cont"] if resumes else [], {})


async def test_a_claim_that_has_changed_meanwhile_is_left_alone() -> None:
    theirs = mark.of_this_process("save", "x").encode()
    monitor = FakeMonitor(state=RunState.PAUSED, texts={CLAIM: theirs})
    assert await recovery.recover_by_mark(monitor, claim_of().encode()) is None
    assert (monitor.calls, monitor.texts) == ([], {CLAIM: theirs})


async def test_a_guest_that_runs_needs_no_cure() -> None:
    monitor = FakeMonitor(texts={CLAIM: "garbage"})
    done = await recovery.recover_by_mark(monitor, "garbage", force=True)
    told = ("the claim was taken away, and the guest was left as it is, running",)
    assert done == Recovered(operation="", tags=(), pid=0, began="", actions=told)
    assert monitor.texts == {}


FAR = msgspec.structs.replace(mark.of_this_process("recover", "t"), owner=ENDED, machine=NOWHERE).encode()
LIVING = mark.of_this_process("recover", "t").encode()
GONE = msgspec.structs.replace(mark.of_this_process("recover", "t"), owner=ENDED).encode()


@pytest.mark.parametrize(
    ("other", "force", "goes"),
    [
        (FAR, False, False),
        (FAR, True, True),
        ("garbage", False, False),
        ("garbage", True, True),
        (LIVING, False, False),
        (LIVING, True, False),
        (GONE, False, True),
    ],
)
async def test_who_recovers_already(other: str, force: bool, goes: bool) -> None:
    """It is left to him; if he has died, the next look tries again."""
    assert this_process().is_alive
    text = claim_of().encode()
    monitor = FakeMonitor(state=RunState.PAUSED, texts={CLAIM: text, RECOVERY: other})
    assert await recovery.recover_by_mark(monitor, text, force=force) is None
    assert (monitor.calls, monitor.state) == ([], RunState.PAUSED)
    assert monitor.texts == ({CLAIM: text} if goes else {CLAIM: text, RECOVERY: other})


async def test_who_has_recovered_just_now() -> None:
    """His mark was there, and is gone before it is read."""

    class Late(FakeMonitor):
        async def set_mark(self, name: str, text: str) -> bool:
            return False

    assert await recovery.recover_by_mark(Late(), claim_of().encode()) is None
