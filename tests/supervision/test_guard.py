"""A qsnap may be killed at any moment: the guest runs again, and nothing half made is left. By its guard, at once; or,
where that dies too, by the next command."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import syslog
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

import qsnap
from qsnap.errors import GuestLeftStopped, QsnapError
from qsnap.host.processes import Process, is_alive
from qsnap.model.qemu import RunState
from qsnap.monitor.address import parse_address
from qsnap.runs import mark
from qsnap.runs.journal import Journal, found, new_record
from qsnap.runs.mark import of_this_process
from qsnap.runs.record import Record
from qsnap.supervision import guard, recovery
from support.busy import big_guest, in_the_write
from support.fake_monitor import FakeMonitor
from support.guest import (
    DEADLINE_S,
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    Qmp,
    assert_sound,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    failing_disk,
    finish,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    open_files,
    qemu_img,
    start_cli,
    state_sizes,
    tags,
    until,
    waits,
)
from support.killed import (
    CLAIM,
    Killer,
    assert_all_is_well,
    guards,
    journals,
    kill_guard,
    marks,
    set_claim,
    wait_for_the_guard,
)
from support.proxy import Intercept, deed


@both_monitors
def test_killed_in_the_write(launch: Launch, tmp_path: Path, runtime_directory: Path) -> None:
    guest, image = big_guest(launch, tmp_path)
    process = start_cli("save", "--no-prepare", "t", monitor=guest.address)
    with in_the_write(guest, image):
        (journal,) = journals(runtime_directory)
        assert journal.stat().st_mode & 0o777 == 0o600
        assert runtime_directory.stat().st_mode & 0o777 == 0o700
        process.kill()
        process.communicate()
    assert_all_is_well(guest, runtime_directory, {image: []})


def test_the_whole_process_group_is_killed(launch: Launch, tmp_path: Path, runtime_directory: Path) -> None:
    """As a CI runner does, or a terminal that hangs up. Its files are gone by then too: the guard has read them."""
    files = shutil.copytree(Path(qsnap.__file__).parent, tmp_path / "site" / "qsnap")
    guest, image = big_guest(launch, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "qsnap", "save", "--no-prepare", "t", "-m", guest.address], cwd=files.parent,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    with in_the_write(guest, image):
        (guard,) = guards(runtime_directory)
        memory = Path(f"/proc/{guard}/maps")
        until("the guard to have read all", lambda: "msgspec" in memory.read_text() and waits(guard))
        shutil.rmtree(files)
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            os.kill(guard, signum)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert_all_is_well(guest, runtime_directory, {image: []})


#: What a save does under a proxy's eyes, and what is there if it is killed just then: (command, which, kept).
#: The older snapshot is gone once QEMU is told to delete it; what was to replace it is kept if it is complete.
MOMENTS = [
    ("query-migrate", 1, "old"),
    ("stop", 1, "old"),
    ("snapshot-save", 1, "new"),
    ("cont", 1, "new"),
    ("object-del", 1, "new"),
]


@pytest.mark.parametrize(("command", "nth", "kept"), [*MOMENTS, ("snapshot-delete", 1, "neither")])
@pytest.mark.skipif(not HAS_SNAPSHOT_JOBS, reason="HMP's savevm deletes the older snapshot itself")
def test_killed_at_each_step_of_a_replacement(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path, command: str, nth: int, kept: str
) -> None:
    killed_replacement(guest, intercept, tmp_path, runtime_directory, Killer(command, nth), kept)


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)
@pytest.mark.parametrize(
    ("line", "kept"), [("info migrate", "old"), ("stop", "old"), ("savevm", "new"), ("cont", "new")]
)
def test_killed_at_each_step_of_a_replacement_over_hmp(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path, line: str, kept: str
) -> None:
    words = {"savevm": "snapshot-save", "info migrate": "hmp"}
    killed_replacement(guest, intercept, tmp_path, runtime_directory, Killer(words.get(line, line)), kept)


def killed_replacement(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path, killer: Killer, kept: str
) -> None:
    images = [tmp_path / "disk0.qcow2", tmp_path / "disk1.qcow2"]
    cli("save", "t", monitor=guest.address)
    before = guest.lines()[-1][0]
    guest.wait_for_ticks(10)
    killer.run("save", "t", monitor=intercept(guest, on_command=killer).address)
    expected = [] if kept == "neither" else ["t"]
    assert_all_is_well(guest, runtime_directory, dict.fromkeys(images, expected))
    if kept == "neither":
        return
    # Contents: the counter that comes back tells whose state it is, and the guest checks its disks against it
    cli("load", "t", "--paused", monitor=guest.address)
    assert (guest.counter > before + 5) == (kept == "new")
    cli("load", "t", "--running", monitor=guest.address)
    guest.assert_running()


def test_a_guest_that_the_user_paused_stays_paused(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path
) -> None:
    guest.qmp("stop")
    killer = Killer("snapshot-save")
    killer.run("save", "t", monitor=intercept(guest, on_command=killer).address)
    wait_for_the_guard(runtime_directory)
    assert guest.runstate == "paused"
    assert (tags(tmp_path / "disk0.qcow2"), guest.jobs(), marks(guest)) == ([], [], [])


async def test_the_guard_waits_for_a_monitor_that_is_away_for_a_moment(
    guest: Guest, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its work, done here: the connection is lost, and at first nobody listens at the address."""
    leave_a_journal(guest, guest.address, runtime_directory)
    (dead,) = found()
    journal = dead.take()
    assert journal is not None
    away = Path(guest.address).rename(f"{guest.address}-away")  # noqa: ASYNC240
    sleep = asyncio.sleep

    async def back_again(delay: float) -> None:
        if away.exists():
            away.rename(guest.address)
        await sleep(delay)

    monkeypatch.setattr(asyncio, "sleep", back_again)
    await recovery.after_death(journal, None)
    assert journals(runtime_directory) == []
    guest.assert_running()


def dead_run(guest: Guest, address: str, operation: str = "save", **facts: Any) -> Journal:
    """The journal of a run that has died and has the claim; taken by this process, as by its guard."""
    begun = new_record(operation, ("t",), FakeMonitor(parse_address(address), pid=guest.pid))
    record = msgspec.structs.replace(begun, owner=Process(pid=os.getpid(), start=1), **facts)
    set_claim(guest, mark.holder(record, None, was_running=True))
    return Journal.create(record)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What comes into the system's log."""
    written: list[tuple[object, ...]] = []
    monkeypatch.setattr(syslog, "openlog", lambda *how: written.append(how))
    monkeypatch.setattr(syslog, "syslog", lambda *what: written.append(what))
    return written


async def test_what_the_guard_tells(launch: Launch, runtime_directory: Path, log: list[tuple[object, ...]]) -> None:
    """Nobody waits for it: it goes into the system's log."""
    guest = launch(memory="16")
    how = ("qsnap", syslog.LOG_PID, syslog.LOG_USER)
    guest.qmp("stop")
    await recovery.after_death(dead_run(guest, guest.address, stopped=True), None)
    cleaned_up = "cleaned up after a qsnap that died (save 't'): the guest was resumed"
    assert log == [how, (syslog.LOG_WARNING, cleaned_up)]
    log.clear()
    await recovery.after_death(dead_run(guest, guest.address, "pause"), None)
    assert log == [how, (syslog.LOG_WARNING, "cleaned up after a qsnap that died (pause 't'): nothing to do")]
    log.clear()
    assert (journals(runtime_directory), marks(guest), guest.runstate) == ([], [], "running")
    # This takes QMP: it is left to the next qsnap
    journal = dead_run(guest, guest.hmp_address, settings={"max-bandwidth": 1})
    await recovery.after_death(journal, None)
    ((_, (level, text)),) = (log,)
    assert level == syslog.LOG_WARNING
    assert str(text).startswith("the guest of a qsnap that died (save 't') could not be cleaned up after: ")
    assert (journals(runtime_directory), marks(guest)) == ([journal.path], [CLAIM])


async def test_an_answer_that_cannot_be_understood(
    launch: Launch, intercept: Intercept, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard tries again, over a connection that does not have to wait for the one before."""
    monkeypatch.setattr(recovery, "_GREETING_S", 0.2)
    spoilt: list[bytes] = []

    def spoil(data: bytes) -> bytes:
        if b'"status"' in data and not spoilt:
            spoilt.append(data)
            return data.replace(b'"status"', b'"statue"')
        return data

    guest = launch(memory="16")
    guest.qmp("stop")
    proxy = intercept(guest, on_data=spoil)
    async with asyncio.timeout(20):
        await recovery.after_death(dead_run(guest, proxy.address, stopped=True), None)
    assert spoilt
    assert (journals(runtime_directory), marks(guest), guest.runstate) == ([], [], "running")


async def test_answers_that_can_never_be_understood(
    launch: Launch, intercept: Intercept, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard gives up and leaves the monitor to others: its journal and its mark tell them."""
    monkeypatch.setattr(recovery, "_RETRY_S", 0.01)
    monkeypatch.setattr(recovery, "_ANSWER_TRIES", 3)
    said: list[str] = []
    monkeypatch.setattr(recovery, "_report", said.append)
    guest = launch(memory="16")
    guest.qmp("stop")
    proxy = intercept(guest, on_data=lambda data: data.replace(b'"status"', b'"statue"'))
    journal = dead_run(guest, proxy.address, stopped=True)
    async with asyncio.timeout(20):
        await recovery.after_death(journal, None)
    assert len(said) == 1
    assert "could not be cleaned up after: QEMU's answer to query-status" in said[0]
    assert (journals(runtime_directory), marks(guest)) == ([journal.path], [CLAIM])


def test_the_guard_goes_on_with_the_connection_of_the_run(launch: Launch, runtime_directory: Path) -> None:
    """Whoever waits in the queue of the monitor would be served before a new one."""
    guest = launch(memory="16")
    guest.qmp("stop")
    qmp = Qmp(Path(guest.address))
    journal = dead_run(guest, guest.address, stopped=True)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(guest.address)
        started = guard.start(journal, qmp._sock)
        journal.close(remove=False)
        qmp.close()
        started.hand_over()
        wait_for_the_guard(runtime_directory)
    assert (marks(guest), guest.runstate) == ([], "running")


async def test_of_a_qemu_that_has_ended_only_the_journal_is_left(runtime_directory: Path) -> None:
    record = Record(token="a" * 16, qemu=Process(pid=os.getpid(), start=1))
    await recovery.after_death(Journal.create(record), None)
    assert journals(runtime_directory) == []


async def test_a_guard_takes_the_standard_library_s_own_modules(
    runtime_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports most of them when the run is gone; what has such a name beside qsnap must not come first."""
    (tmp_path / "pathlib.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    journal = Journal.create(Record(token="a" * 16, qemu=Process(pid=os.getpid(), start=1)))
    started = guard.start(journal, None)
    await started.ready()
    journal.close(remove=False)
    started.hand_over()
    wait_for_the_guard(runtime_directory)
    assert journals(runtime_directory) == []


async def test_of_a_qemu_that_nobody_can_reach_the_journal_stays(
    runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over TCP: nothing tells that it has ended."""
    monkeypatch.setattr(recovery, "_UNREACHABLE_S", 0)
    journal = Journal.create(Record(token="a" * 16, address=("unix", "/nonexistent/monitor")))
    await recovery.after_death(journal, None)
    assert journals(runtime_directory) == [journal.path]
    assert journal.fileno() is None, "the next qsnap may take it"


@needs_snapshot_jobs
async def test_jobs_that_a_run_has_left_whose_process_goes_on(launch: Launch, tmp_path: Path) -> None:
    """As a library's does: the number in their names does not tell that they are nobody's any more."""
    guest = launch(*blockdev("a", make_disk(tmp_path / "a")), *disk_device("a"), memory="16")
    guest.qmp("snapshot-delete", job_id=f"qsnap-delete-{os.getpid()}-1", tag="nope", devices=["a"])
    until("the job to end", lambda: [job["status"] for job in guest.qmp("query-jobs")] == ["concluded"])
    await recovery.after_death(dead_run(guest, guest.address), None)
    assert (guest.jobs(), marks(guest)) == ([], [])


async def test_a_guard_that_was_let_go_leaves_no_trace(
    runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process that has ended and was not waited for, and no open file."""
    monkeypatch.setattr(guard, "_left", [])

    def started() -> tuple[guard.Guard, Path]:
        begun = guard.start(journal, None)
        return begun, Path(f"/proc/{begun.pid}")

    journal = Journal.create(Record(token="a" * 16))
    before = open_files()
    dismissed, process = started()
    for _ in range(2):
        await dismissed.ready()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        os.kill(dismissed.pid, signum)
    until("it to have taken them", lambda: waits(dismissed.pid))
    assert is_alive(dismissed.pid)
    dismissed.dismiss()
    assert not process.exists()
    assert open_files() == before
    handed_over, process = started()
    os.kill(handed_over.pid, signal.SIGKILL)
    handed_over.hand_over()
    assert open_files() == before
    until("it to have ended", lambda: not is_alive(handed_over.pid))
    assert process.exists(), "it was not waited for yet"
    last, _ = started()
    assert not process.exists()
    assert guard._left == []
    last.dismiss()
    journal.close(remove=True)


#: A run of a QEMU that has ended, which has forked another process when it dies.
FORKED = """
import asyncio, os, time
from qsnap.host.processes import Process
from qsnap.runs.journal import Journal
from qsnap.runs.record import Record
from qsnap.supervision import guard
started = guard.start(Journal.create(Record(token="a" * 16, qemu=Process(pid=os.getpid(), start=1))), None)
asyncio.run(started.ready())
if child := os.fork():
    print(child, flush=True)
    os._exit(0)
time.sleep(60)
"""


def test_a_process_that_the_run_has_forked_holds_its_files_too(runtime_directory: Path) -> None:
    """The guard looks for the end of the run itself."""
    with subprocess.Popen([sys.executable, "-c", FORKED], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        if not select.select([run.stdout], [], [], DEADLINE_S)[0]:
            run.kill()
        child = int(run.stdout.readline())
        try:
            wait_for_the_guard(runtime_directory)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("free", [0, 2])
def test_a_guard_that_cannot_be_started_leaves_no_file_open(runtime_directory: Path, free: int) -> None:
    """There is none left for its socket, or for the process."""
    journal = Journal.create(Record(token="a" * 16))
    before = open_files()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.dup(0)
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + free, limits[1]))
    try:
        with pytest.raises(QsnapError, match="no guard can be started: Too many open files; nothing was done"):
            guard.start(journal, None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert open_files() == before
    journal.close(remove=True)


async def test_a_connection_that_is_of_no_use_is_closed(guest: Guest, runtime_directory: Path) -> None:
    """Else it would keep the next one waiting: a monitor serves one client."""
    leave_a_journal(guest, guest.address, runtime_directory)
    (dead,) = found()
    journal = dead.take()
    assert journal is not None
    ours, theirs = socket.socketpair()
    with theirs:
        taken = asyncio.create_task(recovery._inherited(journal, ours))
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            question = json.loads(await loop.sock_recv(theirs, 4096))
            theirs.sendall(json.dumps({"id": question["id"], "return": "unheard of"}).encode() + b"\n")
            assert await taken is None
            assert await loop.sock_recv(theirs, 1) == b""
    await recovery.after_death(journal, None)
    assert journals(runtime_directory) == []
    guest.assert_running()


def test_another_client_in_the_queue_does_not_keep_the_guard_out(
    launch: Launch, tmp_path: Path, runtime_directory: Path
) -> None:
    """A monitor serves one client. The guard goes on with the dead run's connection, and is served before others."""
    guest, image = big_guest(launch, tmp_path)
    process = start_cli("save", "--no-prepare", "t", monitor=guest.address)
    with socket.socket(socket.AF_UNIX) as other, in_the_write(guest, image):
        other.connect(guest.address)
        process.kill()
        process.communicate()
        guest.process.send_signal(signal.SIGCONT)
        assert_all_is_well(guest, runtime_directory, {image: []})


@pytest.fixture
def abandoned(launch: Launch, intercept: Intercept, tmp_path: Path, runtime_directory: Path) -> tuple[Guest, Path]:
    """A guest that a killed qsnap has stopped, and whose guard was killed too. Its save was not to replace anything."""

    def kill_both(data: bytes) -> bytes:
        if "snapshot-save" in proxy.commands and process.poll() is None:
            kill_guard(runtime_directory)
            process.kill()
            process.wait(DEADLINE_S)
        return data

    image = make_boot_disk(tmp_path / "a")
    guest = launch(*blockdev("a", image), *disk_device("a"))
    guest.wait_for_ticks()
    cli("save", "good", monitor=guest.address)
    proxy = intercept(guest, on_data=kill_both)
    process = start_cli("save", "t", monitor=proxy.address)
    assert finish(process).code == -signal.SIGKILL
    until("the save to end", lambda: tags(image) == ["good", "t"] and guest.runstate == "paused")
    return guest, image


@both_monitors
def test_the_next_command_sees_to_it(abandoned: tuple[Guest, Path], runtime_directory: Path) -> None:
    guest, image = abandoned
    status = cli("status", "--json", monitor=guest.address).json
    assert (status["run"]["operation"], status["run"]["tags"], status["run"]["is_alive"]) == ("save", ["t"], False)
    assert "which died: qsnap recover" in cli("status", monitor=guest.address).out
    assert guest.runstate == "paused", "status only looks"
    run = cli("list", "-m", guest.address)
    assert "the guest was resumed; what this save made was removed from a" in run.err
    assert [line.split()[0] for line in run.out.splitlines()] == ["TAG", "good"]
    assert_all_is_well(guest, runtime_directory, {image: ["good"]})
    assert cli("status", "--json", monitor=guest.address).json["run"] is None


@pytest.mark.parametrize("verb", [("recover",), ("save", "next"), ("load", "good"), ("delete", "good"), ("check",)])
def test_whichever_command_is_next(
    abandoned: tuple[Guest, Path], runtime_directory: Path, verb: tuple[str, ...]
) -> None:
    guest, image = abandoned
    cli(*verb, monitor=guest.address)
    left = {"save": ["good", "next"], "delete": []}.get(verb[0], ["good"])
    assert_all_is_well(guest, runtime_directory, {image: left})


def test_what_recover_says(abandoned: tuple[Guest, Path]) -> None:
    guest, _ = abandoned
    (item,) = cli("recover", "--json", monitor=guest.address).json["recovered"]
    assert (item["operation"], item["tags"]) == ("save", ["t"])
    assert item["actions"] == ["the guest was resumed", "what this save made was removed from a"]
    assert cli("recover", "--json", monitor=guest.address).json["recovered"] == []
    assert "nothing to recover" in cli("recover", monitor=guest.address).err


def test_another_users_journal_is_not_needed(
    abandoned: tuple[Guest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark in QEMU tells enough to resume the guest."""
    guest, _ = abandoned
    monkeypatch.setenv("QSNAP_RUNTIME_DIR", str(tmp_path / "another"))
    (item,) = cli("recover", "--json", monitor=guest.address).json["recovered"]
    assert item["actions"] == ["the guest was resumed"]
    guest.assert_running()
    assert marks(guest) == []


def test_a_qemu_that_was_restarted_is_another_one(launch: Launch, tmp_path: Path, runtime_directory: Path) -> None:
    """Its guest waits for its user, and is not taken for the one that a killed qsnap had stopped."""
    image = make_boot_disk(tmp_path / "a")
    disk = [*blockdev("a", image), *disk_device("a")]
    address = tmp_path / "same"
    first = launch(*disk, "-qmp", f"unix:{address},server=on,wait=off")
    first.wait_for_ticks()
    journal = leave_a_journal(first, str(address), runtime_directory)
    first.kill()
    second = launch("-S", *disk, "-qmp", f"unix:{address},server=on,wait=off")
    assert journal.exists()
    run = cli("list", monitor=str(address))
    assert "recovered" not in run.err
    assert second.runstate == "prelaunch"
    assert not journal.exists()


def leave_a_journal(guest: Guest, address: str, directory: Path) -> Path:
    """Kill a save and its guard while the guest is stopped."""
    process = start_cli("save", "t", monitor=address)
    guest.qmp("query-status")
    until("the stop", lambda: guest.qmp("query-status")["status"] != "running")
    guest.process.send_signal(signal.SIGSTOP)
    try:
        kill_guard(directory)
        process.kill()
        process.communicate()
    finally:
        guest.process.send_signal(signal.SIGCONT)
    (journal,) = journals(directory)
    return journal


def test_a_guest_that_another_run_has_taken_by_force_is_not_touched(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path
) -> None:
    """As by recover --force on another machine, while the guard of the dead run did nothing: it comes too late."""

    class KillerOfTheGuardToo(Killer):
        def __call__(self, message: dict[str, Any]) -> None:
            if deed(message) == self.command:
                (guard,) = guards(runtime_directory)
                os.kill(guard, signal.SIGSTOP)
            super().__call__(message)

    killer = KillerOfTheGuardToo("snapshot-save")
    killer.run("save", "t", monitor=intercept(guest, on_command=killer).address)
    until("the save to end", lambda: guest.node_tags("disk1") == ["t"])
    theirs = of_this_process("save", "t").encode()
    guest.qmp("object-del", id=CLAIM)
    guest.qmp("object-add", qom_type="authz-simple", id=CLAIM, identity=theirs)
    (guard,) = guards(runtime_directory)
    os.kill(guard, signal.SIGCONT)
    wait_for_the_guard(runtime_directory)
    assert guest.runstate == "paused"
    assert (tags(tmp_path / "disk0.qcow2"), tags(tmp_path / "disk1.qcow2")) == (["t"], ["t"])
    assert guest.qmp("qom-get", path=f"/objects/{CLAIM}", property="identity") == theirs


def test_the_journal_of_a_vm_that_is_gone_is_removed(guest: Guest, launch: Launch, runtime_directory: Path) -> None:
    journal = leave_a_journal(guest, guest.address, runtime_directory)
    text = journal.read_text()
    guest.kill()
    other = launch(memory="16")
    cli("list", monitor=other.address)
    assert journals(runtime_directory) == []
    for line in filter(None, text.splitlines()):
        assert isinstance(json.loads(line), dict)


def test_the_journal_of_another_vm_is_left_alone(guest: Guest, launch: Launch, runtime_directory: Path) -> None:
    """It tells what is to be done there, and goes when that is done; also if a run has died on the other, too."""
    journal = leave_a_journal(guest, guest.address, runtime_directory)
    (record,) = (one.record for one in found())
    other = launch(memory="16")
    cli("list", monitor=other.address)
    assert journals(runtime_directory) == [journal]
    set_claim(other, mark.holder(msgspec.structs.replace(record, token="0" * 16), None, was_running=True))
    cli("list", monitor=other.address)
    assert (journals(runtime_directory), marks(other)) == ([journal], [])
    assert "the guest was resumed" in cli("list", monitor=guest.address).err
    assert journals(runtime_directory) == []
    guest.assert_running()


def guest_over_tcp(launch: Launch, image: Path) -> tuple[Guest, str]:
    """A guest, and an address at which its QEMU cannot be seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp:127.0.0.1:{free.getsockname()[1]}"
    guest = launch(*blockdev("a", make_boot_disk(image)), *disk_device("a"), "-qmp", f"{address},server=on,wait=off")
    guest.wait_for_ticks()
    return guest, address


def test_a_journal_without_a_mark_of_a_qemu_that_cannot_be_seen(
    launch: Launch, tmp_path: Path, runtime_directory: Path
) -> None:
    """Over TCP a journal is known by the address alone."""
    guest, address = guest_over_tcp(launch, tmp_path / "a")
    leave_a_journal(guest, address, runtime_directory)
    until("the save to end", lambda: guest.node_tags("a"))
    guest.qmp("object-del", id=CLAIM)
    cli("list", monitor=address)
    assert journals(runtime_directory) == []


def test_a_journal_without_a_mark_over_another_monitor(launch: Launch, tmp_path: Path, runtime_directory: Path) -> None:
    """Where QEMU can be seen, the journal is known by its process."""
    guest = launch(*blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"))
    guest.wait_for_ticks()
    leave_a_journal(guest, str(guest.qmp_address), runtime_directory)
    until("the save to end", lambda: guest.node_tags("a"))
    guest.qmp("object-del", id=CLAIM)
    cli("list", monitor=str(guest.hmp_address))
    assert journals(runtime_directory) == []


def test_the_journal_of_another_vm_neither_of_which_can_be_seen(
    launch: Launch, tmp_path: Path, runtime_directory: Path
) -> None:
    guest, address = guest_over_tcp(launch, tmp_path / "a")
    _, other = guest_over_tcp(launch, tmp_path / "b")
    journal = leave_a_journal(guest, address, runtime_directory)
    cli("list", monitor=other)
    assert journals(runtime_directory) == [journal]
    assert "the guest was resumed" in cli("list", monitor=address).err


def test_a_broken_journal_does_no_harm(guest: Guest, runtime_directory: Path) -> None:
    for name, text in (("a", b""), ("b", b"{"), ("c", b"[]\n"), ("d", b"\xff\n"), ("e", b'{"token": 1}\n')):
        (runtime_directory / f"{name * 16}.journal").write_bytes(text)
    (runtime_directory / f"{'f' * 16}.journal").mkdir()
    os.mkfifo(runtime_directory / f"{'0' * 16}.journal")
    (runtime_directory / f"{'1' * 16}.beginning").write_text("")
    os.utime(runtime_directory / f"{'1' * 16}.beginning", (0, 0))
    others = [runtime_directory / name for name in ("mine.journal", f"{'A' * 16}.journal", "backup.beginning")]
    for path in others:
        path.write_text("not qsnap's")
        os.utime(path, (0, 0))
    cli("save", "t", monitor=guest.address)
    left = {runtime_directory / f"{name * 16}.journal" for name in "f0"}
    assert set(runtime_directory.iterdir()) == {*left, *others}
    guest.assert_running()


def test_a_last_line_that_was_cut_short(abandoned: tuple[Guest, Path], runtime_directory: Path) -> None:
    guest, image = abandoned
    (journal,) = journals(runtime_directory)
    with journal.open("ab") as file:
        file.write(b'\n{"saving": tr\n{"transport": "qmp"}\n')
    cli("recover", monitor=guest.address)
    assert_all_is_well(guest, runtime_directory, {image: ["good"]})


@pytest.mark.parametrize("spoil", ["mode", "link", "file", "missing"])
def test_a_runtime_directory_of_others_is_refused(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    place = tmp_path / "run"
    if spoil == "mode":
        place.mkdir(mode=0o755)
    elif spoil == "link":
        (tmp_path / "real").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "real")
    elif spoil == "file":
        place.write_text("")
    else:
        place /= "none"
    monkeypatch.setenv("QSNAP_RUNTIME_DIR", str(place))
    run = cli("save", "t", monitor=guest.address, expect=1)
    assert ("cannot be made: No such file" in run.err) == (spoil == "missing")
    assert "QSNAP_RUNTIME_DIR" in run.err
    assert "STOP" not in [event["event"] for event in guest.qmp.events]
    guest.assert_running()
    assert marks(guest) == []


async def test_without_a_guard_nothing_is_stopped_or_deleted(
    guest: Guest, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with qsnap.connect(guest.address) as vm:
        await vm.save("kept")
        guest.qmp("query-status")
        guest.qmp.events.clear()
        for program in ("/bin/false", "/nonexistent/python"):
            monkeypatch.setattr(sys, "executable", program)
            for begun in (vm.save("t"), vm.load("kept"), vm.delete("kept")):
                with pytest.raises(QsnapError, match="guard"):
                    await begun
                assert journals(runtime_directory) == []
    guest.qmp("query-status")
    assert "STOP" not in [event["event"] for event in guest.qmp.events]
    assert (marks(guest), guest.node_tags("disk0")) == ([], ["kept"])
    guest.assert_running()


@both_monitors
def test_killed_in_a_load(guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path) -> None:
    """QEMU completes it, and the guest runs on from there."""
    cli("save", "t", monitor=guest.address)
    saved = guest.lines()[-1][0]
    guest.wait_for_ticks(12)
    late = guest.lines()[-1][0]
    killer = Killer("snapshot-load")
    killer.run("load", "t", monitor=intercept(guest, on_command=killer).address)
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": ["t"], tmp_path / "disk1.qcow2": ["t"]})
    counters = [count for count, _ in guest.lines()]
    back = next(later for earlier, later in pairwise(counters) if later < earlier)
    assert abs(back - saved) <= 5 < late - back


@pytest.mark.parametrize(
    ("transport", "command"),
    [
        ("qmp", "snapshot-load"),
        ("hmp", "snapshot-load"),
        # QEMU itself does not know any more then how the load ended
        pytest.param("qmp", "job-dismiss", marks=needs_snapshot_jobs),
    ],
    indirect=["transport"],
)
def test_killed_in_a_load_that_fails(
    launch: Launch, intercept: Intercept, tmp_path: Path, runtime_directory: Path, command: str
) -> None:
    """It is left stopped on purpose, and a save is refused, as after any load that failed midway."""
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*failing_disk("a", image, "vmstate_load", 5), *disk_device("a"))
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.address)
    killer = Killer(command)
    killer.run("load", "t", monitor=intercept(guest, on_command=killer).address)
    wait_for_the_guard(runtime_directory)
    assert guest.runstate != "running"
    assert (marks(guest), guest.jobs(), tags(image)) == (["qsnap-half-restored"], [], ["t"])
    cli("save", "t", monitor=guest.address, expect=6)
    cli("load", "t", "--running", monitor=guest.address)  # the fault comes once
    guest.assert_running()


@both_monitors
@pytest.mark.parametrize("command", ["stop", "object-add"])
def test_killed_before_a_load_began(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path, command: str, transport: str
) -> None:
    if transport == "hmp":
        command = "hmp"
    elif command == "stop" and not HAS_SNAPSHOT_JOBS:
        command = "query-migrate"  # loadvm stops the guest itself
    cli("save", "t", monitor=guest.address)
    killer = Killer(command)
    killer.run("load", "t", monitor=intercept(guest, on_command=killer).address)
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": ["t"], tmp_path / "disk1.qcow2": ["t"]})


def test_the_guard_makes_a_new_connection(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path
) -> None:
    """The one that it has inherited breaks just when it resumes the guest."""
    killer = Killer("snapshot-save")

    def kill_and_cut(message: dict[str, Any]) -> None:
        killer(message)
        if deed(message) == "cont" and proxy.commands.count("cont") == 1:
            proxy.cut()

    proxy = intercept(guest, on_command=kill_and_cut)
    killer.run("save", "t", monitor=proxy.address)
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": [], tmp_path / "disk1.qcow2": []})
    assert proxy.commands.count("cont") == 2


def test_a_claim_that_cannot_be_given_back_is_left_to_the_guard(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path
) -> None:
    """The save is done, and only then the connection breaks."""

    def cut(message: dict[str, Any]) -> None:
        if deed(message) == "object-del" and proxy.commands.count("object-del") == 1:
            proxy.cut()

    proxy = intercept(guest, on_command=cut)
    cli("save", "t", monitor=proxy.address)
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": ["t"], tmp_path / "disk1.qcow2": ["t"]})


@both_monitors
def test_killed_before_a_delete_began(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path
) -> None:
    """QEMU was not told of it, as the connection breaks too: nobody completes it."""
    cli("save", "t", monitor=guest.address)
    killer = Killer("snapshot-delete")

    def kill_and_cut(message: dict[str, Any]) -> None:
        killer(message)
        if deed(message) == "snapshot-delete" and killer.left == 0:
            proxy.cut()

    proxy = intercept(guest, on_command=kill_and_cut)
    killer.run("delete", "t", monitor=proxy.address)
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": ["t"], tmp_path / "disk1.qcow2": ["t"]})


@both_monitors
def test_killed_in_a_delete(guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path) -> None:
    """It is completed. The job of another qsnap, which lives, is not the guard's."""
    for tag in ("a", "b"):
        cli("save", tag, monitor=guest.address)
    theirs = f"qsnap-delete-{os.getpid()}-1"
    if HAS_SNAPSHOT_JOBS:
        guest.qmp("snapshot-delete", job_id=theirs, tag="nope", devices=["disk0"])
    killer = Killer("snapshot-delete")
    killer.run("delete", "a", "b", monitor=intercept(guest, on_command=killer).address)
    wait_for_the_guard(runtime_directory)
    if HAS_SNAPSHOT_JOBS:
        assert guest.jobs() == [theirs]
        guest.qmp("job-dismiss", id=theirs)
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": ["b"], tmp_path / "disk1.qcow2": ["b"]})
    for image in ("disk0.qcow2", "disk1.qcow2"):
        qemu_img("check", "-U", tmp_path / image)


def test_a_qemu_that_does_not_answer_is_left_to_the_guard(
    launch: Launch, tmp_path: Path, runtime_directory: Path
) -> None:
    """--timeout ends the command even then; the guest runs once QEMU answers."""
    guest, image = big_guest(launch, tmp_path)
    process = start_cli("save", "--no-prepare", "t", "--timeout", "1", "--json", monitor=guest.address)
    with in_the_write(guest, image):
        run = finish(process)
        assert run.code == 20, run.err
        (guard,) = guards(runtime_directory)
        assert f"Process {guard}, its guard, goes on" in run.error["message"]
        assert cli("list", "--lock-wait", "0", monitor=guest.address, expect=11).err
    assert_all_is_well(guest, runtime_directory, {image: []})


@needs_snapshot_jobs
async def test_a_load_that_fails_while_qemu_does_not_answer(
    launch: Launch, intercept: Intercept, tmp_path: Path, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells it to go on before it is known how the load ended: what waits for QEMU would be done then."""
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*failing_disk("a", image, "vmstate_load", errno.EIO), *disk_device("a"))
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.address)
    is_frozen = threading.Event()

    def freeze(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-load":
            guest.process.send_signal(signal.SIGSTOP)
            is_frozen.set()

    proxy = intercept(guest, on_command=freeze)
    monkeypatch.setattr("qsnap.vm.TIMED_PATIENCE_S", 0.2)
    async with qsnap.connect(proxy.address, timeout_s=60) as vm:
        load = asyncio.create_task(vm.load("t"))
        assert await asyncio.to_thread(is_frozen.wait, 30)
        load.cancel()
        with pytest.raises(GuestLeftStopped, match="its guard, resumes it if the load goes well"):
            await load
    guest.process.send_signal(signal.SIGCONT)
    wait_for_the_guard(runtime_directory)
    # From 10.2 on there is one before, which drops translated code
    assert "cont" not in proxy.commands[proxy.commands.index("snapshot-load") :]
    assert guest.runstate != "running"
    assert (marks(guest), guest.jobs(), tags(image)) == (["qsnap-half-restored"], [], ["t"])


def test_a_guest_that_qemu_does_not_resume_is_left_to_the_guard(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path
) -> None:
    """Another client dumps its memory: QEMU refuses every `cont` until that is done. The claim is kept as long."""
    pipe = tmp_path / "dump"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def dump(message: dict[str, Any]) -> None:
        if deed(message) == "cont" and proxy.commands.count("cont") == 1:
            guest.qmp("dump-guest-memory", paging=False, protocol=f"file:{pipe}", detach=True)

    proxy = intercept(guest, on_command=dump)
    try:
        error = cli("save", "t", "--json", monitor=proxy.address, expect=20).error
        (guard,) = guards(runtime_directory)
        assert "There is a dump in process" in error["message"]
        assert f"Process {guard}, its guard, goes on trying" in error["message"]
        assert (guest.runstate, marks(guest)) == ("paused", [CLAIM])
        cli("save", "x", "--lock-wait", "0", monitor=guest.hmp_address, expect=11)
        tried = proxy.commands.count("cont")
        until("the guard to try again", lambda: proxy.commands.count("cont") > tried + 1)
    finally:
        os.close(reader)  # which ends the dump
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": [], tmp_path / "disk1.qcow2": []})


def test_the_guest_dies_with_its_qsnap(launch: Launch, tmp_path: Path, runtime_directory: Path) -> None:
    guest, image = big_guest(launch, tmp_path)
    process = start_cli("save", "--no-prepare", "t", monitor=guest.address)
    with in_the_write(guest, image):
        process.kill()
        process.communicate()
        guest.process.kill()
    wait_for_the_guard(runtime_directory)
    guest.process.wait(30)
    assert_sound(image)
    assert tags(image) == []
    assert state_sizes(image) == {}


@both_monitors
def test_nothing_is_left_of_a_run_that_ends_well(guest: Guest, runtime_directory: Path) -> None:
    ends: list[Callable[[], object]] = [
        lambda: cli("save", "t", monitor=guest.address),
        lambda: cli("load", "t", monitor=guest.address),
        lambda: cli("load", "nope", monitor=guest.address, expect=7),
        lambda: cli("delete", "t", monitor=guest.address),
        lambda: cli("save", "t", "--dry-run", monitor=guest.address),
    ]
    for end in ends:
        end()
        assert (journals(runtime_directory), guards(runtime_directory), marks(guest)) == ([], [], [])


@both_monitors
def test_a_long_run_is_left_alone(guest: Guest, intercept: Intercept, runtime_directory: Path) -> None:
    """After a while the guard loads what it may need, and goes on to wait: it says nothing to QEMU."""
    has_come, may_go = threading.Event(), threading.Event()

    def hold(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-save":
            has_come.set()
            may_go.wait(60)

    proxy = intercept(guest, on_command=hold)
    process = start_cli("save", "t", monitor=proxy.address)
    try:
        assert has_come.wait(60)
        at = len(proxy.commands)
        (guard,) = guards(runtime_directory)

        def has_loaded() -> bool:
            resident = int(Path(f"/proc/{guard}/statm").read_text().split()[1])
            is_asleep = Path(f"/proc/{guard}/stat").read_text().rpartition(") ")[2].startswith("S")
            return resident > at_first * 5 / 4 and is_asleep

        at_first = int(Path(f"/proc/{guard}/statm").read_text().split()[1])
        until("the guard to load it", lambda: has_loaded() or None)
    finally:
        may_go.set()
    assert finish(process).code == 0
    assert not any("version" in command for command in proxy.commands[at:]), "this is how a guard begins"
    guest.assert_running()
    assert (journals(runtime_directory), guards(runtime_directory), marks(guest)) == ([], [], [])


async def test_a_guard_that_does_not_get_ready(
    guest: Guest, tmp_path: Path, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is begun without it."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr("qsnap.supervision.guard._READY_S", 0.3)
    async with qsnap.connect(guest.address) as vm:
        with pytest.raises(qsnap.QsnapError, match="did not start: it says nothing; nothing was done"):
            await vm.save("t")
        assert await vm.list() == ()
    guest.assert_running()
    assert "STOP" not in {event["event"] for event in guest.qmp.events}
    assert journals(runtime_directory) == []


async def test_a_guest_that_a_stream_stops_once_more_is_resumed_again() -> None:
    """Where a live save's stream has just begun, the first cont is in vain; what stays stopped is named."""

    class Stopping(FakeMonitor):
        in_vain = 1

        async def cont(self) -> float | None:
            await super().cont()
            if self.calls.count("cont") <= self.in_vain:
                self.state = RunState.PAUSED
            return None

    monitor = Stopping(state=RunState.PAUSED)
    assert await recovery._resume(monitor) == ["the guest was resumed"]
    assert (monitor.calls, monitor.state) == (["cont", "cont"], RunState.RUNNING)
    monitor = Stopping(state=RunState.PAUSED)
    monitor.in_vain = 2
    (action,) = await recovery._resume(monitor)
    assert "is paused" in action
    assert monitor.calls == ["cont", "cont"]
