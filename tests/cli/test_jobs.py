"""run, ensure and the pytest plugin: commands around a guest, and what the guest holds afterwards."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from qsnap.cli import child
from qsnap.host.processes import is_alive
from qsnap.pytest_plugin import tag_of
from support.guest import (
    Guest,
    Launch,
    blockdev,
    both_monitors,
    cli,
    deliver,
    disk_device,
    failing_disk,
    finish,
    make_boot_disk,
    needs_snapshot_jobs,
    start_cli,
    tags,
    until,
)
from support.proxy import Intercept, deed

pytest_plugins = ["pytester"]


@pytest.fixture
def disk(guest: Guest, tmp_path: Path) -> Path:
    """The first image of the guest fixture."""
    return tmp_path / "disk0.qcow2"


def wait_script(guest: Guest, ticks: int, then: str = "true") -> list[str]:
    """A command that ends when the guest has gone on that much."""
    lines = len(guest.lines()) + ticks
    return ["sh", "-c", f"until [ $(grep -c bad= {guest.serial}) -ge {lines} ]; do sleep 0.01; done; {then}"]


def falls(guest: Guest) -> list[tuple[int, int]]:
    """Where the guest's count has fallen: from what, to what. It never does by itself."""
    counts = [count for count, _ in guest.lines()]
    return [(one, other) for one, other in pairwise(counts) if other <= one]


def assert_back_to(guest: Guest, before: int) -> None:
    """The guest's RAM has gone back to where it was, and counts on from there; its disks agree with it."""
    guest.wait_for_ticks()  # all slots of the disk's table have been compared
    assert guest.lines()[-1][1] == 0, "RAM and disks differ"
    assert falls(guest), "it was put back"
    assert abs(falls(guest)[-1][1] - before) <= 60


@both_monitors
@pytest.mark.parametrize("code", [0, 7])
def test_revert(guest: Guest, disk: Path, code: int) -> None:
    """Contents: the counter in RAM falls back to where it was, and the disk's table agrees."""
    before = guest.wait_for_ticks(3)
    run = cli("run", "--revert", "--", *wait_script(guest, 20, f"exit {code}"), monitor=guest.address, expect=code)
    assert_back_to(guest, before)
    assert tags(disk) == [], "the temporary one is gone"
    assert run.out == ""
    assert "loaded qsnap-run-" in run.err


def test_revert_to(guest: Guest, disk: Path) -> None:
    cli("save", "clean", monitor=guest.address)
    saved = guest.counter
    guest.wait_for_ticks(20)
    cli("run", "--revert-to", "clean", "-q", "--", "true", monitor=guest.address)
    assert_back_to(guest, saved)
    assert tags(disk) == ["clean"]
    marker = disk.with_name("ran")
    run = cli("run", "--revert-to", "nope", "--", "touch", str(marker), monitor=guest.address, expect=125)
    assert "the command was not run: no snapshot 'nope' on any device" in run.err
    assert not marker.exists()


def test_nothing_is_run_that_could_not_be_undone(guest: Guest, disk: Path) -> None:
    """A backup tool's dirty bitmap: QEMU saves such a disk, and does not take it back."""
    cli("save", "clean", monitor=guest.address)
    guest.qmp("block-dirty-bitmap-add", node="disk0", name="tool")
    marker = disk.with_name("ran")
    for option in (["--revert"], ["--revert-to", "clean"]):
        run = cli("run", *option, "--", "touch", str(marker), monitor=guest.address, expect=125)
        assert "disk0 has dirty bitmaps (tool)" in run.err
        assert not marker.exists()
        assert tags(disk) == ["clean"]
    guest.assert_running()


def test_a_paused_guest_is_paused_again(guest: Guest, disk: Path) -> None:
    guest.qmp("stop")
    cli("run", "--revert", "--", "sh", "-c", "true", monitor=guest.address)
    assert guest.runstate == "paused"
    # The command may resume it
    resume = f"{sys.executable} -m qsnap load --running x"
    cli("save", "x", monitor=guest.address)
    cli("run", "--revert", "--", "sh", "-c", resume, monitor=guest.address, env={"QSNAP_MONITOR": guest.address})
    assert guest.runstate == "paused"


def test_save_on_fail(guest: Guest, disk: Path) -> None:
    """The failed state can be looked at later; and the guest is back where it was all the same."""
    before = guest.wait_for_ticks(3)
    command = wait_script(guest, 20, "exit 3")
    cli("run", "--revert", "--save-on-fail", "failed-7", "--", *command, monitor=guest.address, expect=3)
    assert_back_to(guest, before)
    assert tags(disk) == ["failed-7"]
    now = guest.counter
    cli("load", "failed-7", monitor=guest.address)
    guest.wait_for_ticks()
    assert guest.lines()[-1][1] == 0
    assert guest.counter > min(now, before + 20)
    cli("run", "--save-on-fail", "other", "--", "true", monitor=guest.address)
    assert tags(disk) == ["failed-7"]


def test_the_command_s_code_and_streams(guest: Guest) -> None:
    run = cli("run", "--", "sh", "-c", "echo out; echo err >&2; exit 42", monitor=guest.address, expect=42)
    assert (run.out, run.err) == ("out\n", "err\n")
    cli("run", "--", "sh", "-c", "kill -9 $$", monitor=guest.address, expect=137)
    cli("run", "no-such-program", monitor=guest.address, expect=127)
    cli("run", "--", "/etc/passwd", monitor=guest.address, expect=126)
    cli("run", monitor=guest.address, expect=2)
    cli("run", "--revert", "--revert-to", "x", "--", "true", monitor=guest.address, expect=2)
    cli("run", "--vm", "a", "--vm", "b", "--", "true", expect=125)
    cli("run", "--", "true", "-m", "/none", monitor=guest.address)  # options behind the command are the command's


def test_nobody_there(tmp_path: Path) -> None:
    run = cli("run", "--revert", "-m", str(tmp_path / "none"), "--", "touch", str(tmp_path / "ran"), expect=125)
    assert "the command was not run: " in run.err
    assert not (tmp_path / "ran").exists()


def test_a_hanging_command(guest: Guest, disk: Path, tmp_path: Path) -> None:
    """It and what it has started are ended, and the guest is put back."""
    before = guest.wait_for_ticks(3)
    script = f"sleep 1000 & echo $! > {tmp_path}/pid; wait"
    run = cli(
        "run", "--revert", "--timeout", "2", "--", "sh", "-c", script, monitor=guest.address, expect=124
    )  # fmt: skip
    assert "did not finish within 2 s" in run.err
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert_back_to(guest, before)
    assert tags(disk) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_the_command_s(guest: Guest, disk: Path, tmp_path: Path, signum: int) -> None:
    before = guest.wait_for_ticks(3)
    script = f"trap 'exit 9' TERM INT HUP; touch {tmp_path}/up; while :; do sleep 0.05; done"
    process = start_cli("run", "--revert", "--", "sh", "-c", script, monitor=guest.address)
    until("the command runs", (tmp_path / "up").exists)
    guest.wait_for_ticks()
    process.send_signal(signum)
    assert finish(process).code == 9
    assert_back_to(guest, before)
    assert tags(disk) == []


def test_a_killed_command(guest: Guest, disk: Path, tmp_path: Path) -> None:
    before = guest.wait_for_ticks(3)
    script = f"echo $$ > {tmp_path}/pid.part; mv {tmp_path}/pid.part {tmp_path}/pid; exec sleep 1000"
    process = start_cli("run", "--revert", "--save-on-fail", "f", "--", "sh", "-c", script, monitor=guest.address)
    until("the command runs", (tmp_path / "pid").exists)
    guest.wait_for_ticks()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert finish(process).code == 137
    assert_back_to(guest, before)
    assert tags(disk) == ["f"]


def test_signals_after_the_command(guest: Guest, disk: Path, tmp_path: Path, intercept: Intercept) -> None:
    """A job that is cancelled late: what is to be done after the command is done all the same."""
    before = guest.wait_for_ticks(3)
    ran, after = tmp_path / "ran", []

    def cancel(message: dict[str, Any]) -> None:
        if ran.exists() and deed(message).startswith("snapshot-"):
            after.append(deed(message))
            deliver(process, signal.SIGINT, signal.SIGTERM, signal.SIGINT)

    process = start_cli(
        "run", "--revert", "--save-on-fail", "f", "--", *wait_script(guest, 45, f"touch {ran}; exit 5"),
        monitor=intercept(guest, on_command=cancel).address,
    )  # fmt: skip
    assert finish(process).code == 5
    assert after == ["snapshot-save", "snapshot-load", "snapshot-delete"]
    assert_back_to(guest, before)
    assert tags(disk) == ["f"]


SIGNALLED_IN_BETWEEN = """
import asyncio, os, signal
end, end_of_loop = os._exit, asyncio.BaseEventLoop.shutdown_asyncgens

def signalled():
    for signum in (signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), signum)

async def shutdown_asyncgens(loop):
    if os.path.exists(RAN):
        signalled()
    await end_of_loop(loop)

def _exit(code):
    signalled()
    end(code)

asyncio.BaseEventLoop.shutdown_asyncgens, os._exit = shutdown_asyncgens, _exit
"""


def test_a_signal_between_the_steps_after_the_command(guest: Guest, disk: Path, tmp_path: Path) -> None:
    """Each has a loop of its own: a signal at the end of one, or of us, ends nothing either."""
    ran = tmp_path / "ran"
    (tmp_path / "sitecustomize.py").write_text(SIGNALLED_IN_BETWEEN.replace("RAN", repr(str(ran))))
    before = guest.wait_for_ticks(3)
    command = wait_script(guest, 20, f"touch {ran}; exit 5")
    args = ("run", "--revert", "--save-on-fail", "f", "--", *command)
    cli(*args, monitor=guest.address, expect=5, env={"PYTHONPATH": str(tmp_path)})
    assert_back_to(guest, before)
    assert tags(disk) == ["f"]


SIGNALLED_BEFORE = """
import os, signal
block = signal.pthread_sigmask

def pthread_sigmask(how, signals):
    # The last thing before the command is to be run: signals are held back from here on
    signal.pthread_sigmask = block
    os.kill(os.getpid(), signal.SIGTERM)
    return block(how, signals)

signal.pthread_sigmask = pthread_sigmask
"""


@pytest.mark.parametrize("command", [["run", "--revert"], ["ensure", "t"]], ids=" ".join)
def test_a_signal_at_the_last_moment_before_the_command(
    guest: Guest, disk: Path, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNALLED_BEFORE)
    ran = tmp_path / "ran"
    env = {"PYTHONPATH": str(tmp_path)}
    run = cli(*command, "--", "touch", str(ran), monitor=guest.address, expect=143, env=env)
    assert "the command was not run" in run.err
    assert not ran.exists()
    assert tags(disk) == []


def children(pid: int) -> list[str]:
    """The commands of its children that are shells; one that ends while we look has ended."""
    names = []
    for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            names.append(Path(f"/proc/{one}/comm").read_text())
    return [name for name in names if "sh" in name]


def test_a_signal_before_the_command(guest: Guest, disk: Path, tmp_path: Path, intercept: Intercept) -> None:
    """It is not lost, wherever it comes: the command does not run, and nothing is left."""
    sent: list[int] = []
    process: list[subprocess.Popen[str]] = []

    def end(message: dict[str, Any]) -> None:
        if message.get("execute") == "query-status" and process and not sent:
            sent.append(1)
            process[0].send_signal(signal.SIGTERM)

    proxy = intercept(guest, on_command=end)
    ran = tmp_path / "ran"
    process.append(start_cli("run", "--revert", "--", "touch", str(ran), monitor=proxy.address))
    run = finish(process[0])
    assert sent
    assert run.code == 143, run.err
    assert not ran.exists()
    assert tags(disk) == []
    guest.assert_running()


def test_orphans_are_ended_with_the_command(guest: Guest, tmp_path: Path) -> None:
    """What it has left behind must not hold the job's output open."""
    script = f"(sleep 1000 & echo $! > {tmp_path}/a); setsid sleep 1000 & echo $! > {tmp_path}/b; wait"
    began = time.monotonic()
    cli("run", "--timeout", "2", "--", "sh", "-c", script, monitor=guest.address, expect=124)
    assert time.monotonic() - began < 30, "the streams are closed"
    for name in ("a", "b"):
        assert not is_alive(int((tmp_path / name).read_text()))


def test_our_own_guards_are_not_the_command_s() -> None:
    """One may be at work still on what a step before the command has left to it."""
    with subprocess.Popen(["sleep", "1000"]) as guard:
        ours = child._children()
        try:
            with subprocess.Popen(["sh", "-c", "sleep 1000 & wait"]) as command:
                child._end(command, ours)
            assert command.returncode == -signal.SIGTERM
            assert guard.poll() is None
        finally:
            guard.kill()


def test_what_cannot_be_killed_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a process that hangs in the kernel, or another user's: it must not hang the job. (Here no signal is sent.)"""
    for name, value in (("GRACE_S", 0.1), ("KILL_S", 0.1)):
        monkeypatch.setattr(child, name, value)
    ours = child._children()
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            for name in ("terminate", "kill"):
                monkeypatch.setattr(psutil.Process, name, lambda _: None)
            ended = threading.Thread(target=child._end, args=(process, ours), daemon=True)
            ended.start()
            ended.join(30)
            assert not ended.is_alive()
            assert f"left behind, because it cannot be killed: process {process.pid}" in capsys.readouterr().err
        finally:
            process.kill()


def test_what_ignores_sigterm_is_killed(guest: Guest, tmp_path: Path) -> None:
    script = f"trap '' TERM; echo $$ > {tmp_path}/a; while :; do sleep 1; done"
    cli("run", "--timeout", "1", "--", "sh", "-c", script, monitor=guest.address, expect=124)
    assert not is_alive(int((tmp_path / "a").read_text()))


@pytest.mark.parametrize("tag", ["bad\ntag", "17", "kept"])
def test_a_tag_that_cannot_be_saved_is_told_of_before(guest: Guest, disk: Path, tmp_path: Path, tag: str) -> None:
    cli("save", "kept", monitor=guest.address)
    cli("protect", "kept", monitor=guest.address)
    ran = str(tmp_path / "ran")
    cli("run", "--save-on-fail", tag, "--", "touch", ran, monitor=guest.address, expect=125)
    if tag != "kept":
        cli("ensure", tag, "--", "touch", ran, monitor=guest.address, expect=125)
    assert not Path(ran).exists()
    assert tags(disk) == ["kept"]


COUNTS_INTERRUPTS = """
import os, signal, sys, time
from pathlib import Path

caught = []
signal.signal(signal.SIGINT, lambda *_: caught.append(1))
here = Path(sys.argv[1])
(here / "up").touch()
while not caught:
    time.sleep(0.01)
(here / "first").touch()

def has_taken_it():
    status = dict(line.split(":\\t") for line in Path(f"/proc/{os.getppid()}/status").read_text().splitlines())
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return status["State"][0] == "S" and not pending

while not has_taken_it():  # qsnap, which would have passed it on by then
    time.sleep(0.01)
(here / "caught").write_text(str(len(caught)))
sys.exit(9)
"""


def test_from_a_terminal(guest: Guest, disk: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the command once, as the terminal sends it; and a kill of qsnap alone is passed on."""
    import pty

    command = [sys.executable, "-c", COUNTS_INTERRUPTS, str(tmp_path)]
    for by_terminal in (True, False):
        for name in ("up", "first", "caught"):
            (tmp_path / name).unlink(missing_ok=True)
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ["QSNAP_MONITOR"] = guest.address
            os.execv(sys.executable, [sys.executable, "-m", "qsnap", "run", "--revert", "--", *command])  # noqa: S606
        until("the command runs", (tmp_path / "up").exists)
        if by_terminal:
            os.kill(pid, signal.SIGSTOP)  # two that come at once would look like one
            os.write(terminal, b"\x03")
            until("the command has caught it", (tmp_path / "first").exists)
            os.kill(pid, signal.SIGCONT)
        else:
            os.kill(pid, signal.SIGINT)
        ended = until("its end", lambda p=pid: ((found := os.waitpid(p, os.WNOHANG))[0] and found) or None)  # type: ignore[misc]
        os.close(terminal)
        assert os.waitstatus_to_exitcode(ended[1]) == 9
        assert (tmp_path / "caught").read_text() == "1"
        assert tags(disk) == []
    guest.assert_running()


def test_what_fails_afterwards_is_told(guest: Guest, disk: Path) -> None:
    """The command's own failure is not masked; its success is no success then."""
    cli("save", "clean", monitor=guest.address)
    delete = [sys.executable, "-m", "qsnap", "delete", "clean"]
    env = {"QSNAP_MONITOR": guest.address}
    for code, expect in ((0, 123), (5, 5)):
        command = ["sh", "-c", f'"$@"; exit {code}', "x", *delete, "--missing-ok"]
        if code:
            cli("save", "clean", monitor=guest.address)
        run = cli("run", "--revert-to", "clean", "--", *command, monitor=guest.address, expect=expect, env=env)
        assert "no snapshot 'clean'" in run.err
        guest.assert_running()


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)  # a delta load does not read what cannot be read here
def test_what_the_guest_could_not_be_put_back_to_stays(launch: Launch, tmp_path: Path) -> None:
    """A load that fails midway leaves it stopped: the temporary snapshot is the only way back then."""
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*failing_disk("a", image, "vmstate_load", errno.EIO), *disk_device("a"))
    before = guest.wait_for_ticks()
    cli("run", "--revert", "--", *wait_script(guest, 20), monitor=guest.address, expect=123)
    (tag,) = tags(image)
    cli("load", tag, "--running", monitor=guest.address)  # the fault comes once
    assert_back_to(guest, before)


# ensure


@both_monitors
def test_ensure(guest: Guest, disk: Path, tmp_path: Path) -> None:
    command = ("sh", "-c", f"echo x >> {tmp_path}/runs")
    run = cli("ensure", "warm", "--", *command, monitor=guest.address)
    assert "saved warm" in run.err
    saved = guest.counter
    guest.wait_for_ticks(20)
    run = cli("ensure", "warm", "--", *command, monitor=guest.address)
    assert "loaded warm" in run.err
    assert_back_to(guest, saved)
    assert (tmp_path / "runs").read_text() == "x\n", "once"
    assert tags(disk) == ["warm"]
    guest.assert_running()


def test_two_jobs_at_once(guest: Guest, disk: Path, tmp_path: Path) -> None:
    """Both provision the guest; the second is told so, and takes nothing away."""
    script = f"touch {tmp_path}/up; until [ -e {tmp_path}/go ]; do sleep 0.01; done"
    process = start_cli("ensure", "warm", "--", "sh", "-c", script, monitor=guest.address)
    until("it runs", (tmp_path / "up").exists)
    first = cli("ensure", "warm", "--", "true", monitor=guest.address)
    assert "saved warm" in first.err
    made = cli("list", "--json", monitor=guest.address).json["snapshots"]
    (tmp_path / "go").touch()
    run = finish(process)
    assert (run.code, "already exists" in run.err) == (123, True), run.err
    assert cli("list", "--json", monitor=guest.address).json["snapshots"] == made


def test_ensure_saves_nothing_of_a_failure(guest: Guest, disk: Path) -> None:
    run = cli("ensure", "warm", "--", "sh", "-c", "exit 6", monitor=guest.address, expect=6)
    assert "was not saved" in run.err
    assert tags(disk) == []


@needs_snapshot_jobs
def test_ensure_makes_a_broken_one_anew(guest: Guest, disk: Path) -> None:
    cli("save", "warm", "--exclude", "disk1", monitor=guest.address)
    run = cli("ensure", "warm", "--", "true", monitor=guest.address)
    assert "is partial" in run.err
    assert cli("list", "--json", monitor=guest.address).json["snapshots"][0]["kind"] == "full"
    guest.assert_running()


# The plugin

PLUGIN_TEST = """
import time
from pathlib import Path

import pytest

SERIAL = Path(SERIAL_PATH)

def wait_for_a_tick():
    # Two lines are begun: without one in between, the guest would not be seen to have been put back twice
    size, deadline = SERIAL.stat().st_size, time.monotonic() + 30
    while SERIAL.stat().st_size < size + 2 * len("c=00000000 bad=0000\\r\\n"):
        assert time.monotonic() < deadline
        time.sleep(0.005)

@pytest.mark.qsnap(load="clean")
def test_good():
    wait_for_a_tick()

@pytest.mark.qsnap("clean")
def test_bad(qsnap_vm, other):
    wait_for_a_tick()
    assert other == "set up after the load"
    assert [s.tag for s in qsnap_vm.list()] == ["clean"]
    assert False, "on purpose"

@pytest.fixture
def other(qsnap_vm):
    yield "set up after the load"
    qsnap_vm.load("clean")

def test_unmarked(qsnap_vm):
    assert qsnap_vm.status().runstate == "running"
    assert qsnap_vm.check().ok
    assert qsnap_vm.save("mine").tag == "mine"
    qsnap_vm.delete("mine")
"""


def test_the_plugin(guest: Guest, disk: Path, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\n")
    pytester.makepyfile(PLUGIN_TEST.replace("SERIAL_PATH", repr(str(guest.serial))))
    cli("save", "clean", monitor=guest.address)
    saved = guest.counter
    guest.wait_for_ticks(20)
    result = pytester.runpytest_subprocess(
        f"--qsnap-monitor={guest.address}", "--qsnap-save-failed", "-k", "good or bad"
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*the guest was saved as 'failed-test_the_plugin.py-test_bad'*"])
    assert len(falls(guest)) == 3, "before each of the two tests, and by the fixture of one"
    assert all(abs(to - saved) <= 60 for _, to in falls(guest))
    assert tags(disk) == ["clean", "failed-test_the_plugin.py-test_bad"]
    cli("load", "failed-test_the_plugin.py-test_bad", monitor=guest.address)
    guest.assert_running()
    pytester.runpytest_subprocess(f"--qsnap-monitor={guest.address}", "-k", "unmarked").assert_outcomes(passed=1)
    assert tags(disk) == ["clean", "failed-test_the_plugin.py-test_bad"]


def test_the_plugin_by_its_ini(guest: Guest, disk: Path, pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\nqsnap_monitor = {guest.address}\nqsnap_save_failed = true\n")
    pytester.makepyfile("def test_x(qsnap_vm):\n    assert 0\n")
    pytester.runpytest_subprocess().assert_outcomes(failed=1)
    assert tags(disk) == ["failed-test_the_plugin_by_its_ini.py-test_x"]


def test_the_plugin_is_inert(pytester: pytest.Pytester) -> None:
    """Without a test that asks for it, nothing of qsnap but itself is loaded."""
    pytester.makepyfile("""
        import sys
        def test_x():
            heavy = {"click", "rich", "msgspec", "psutil", "qemu.qmp", "asyncio"} & set(sys.modules)
            assert "qsnap.pytest_plugin" in sys.modules
            assert {n for n in sys.modules if n.startswith("qsnap")} == {"qsnap", "qsnap.pytest_plugin"}, heavy
    """)
    pytester.runpytest_subprocess("-p", "no:asyncio").assert_outcomes(passed=1)


def test_the_plugin_takes_no_vm_unasked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_x(qsnap_vm):\n    pass\n")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*say which VM is under test*"])


def test_tags_of_tests() -> None:
    assert tag_of("tests/test_a.py::TestB::test_c[x-1]") == "failed-test_a.py-TestB-test_c[x-1]"
    assert len({tag_of(f"test_a.py::test_c[a{char}b]") for char in "- /:é\n"}) == 6
    long = [tag_of("tests/test_a.py::test[" + "é" * 300 + end) for end in "ab"]
    assert long[0] != long[1]
    assert all(len(tag.encode()) < 256 for tag in long)


@pytest.mark.parametrize("by", ["the config file", "looking"])
def test_a_guest_that_is_started_anew(launch: Launch, tmp_path: Path, by: str) -> None:
    """The command may end QEMU and start it again, at the same address: as another process than the one first seen."""
    image = make_boot_disk(tmp_path / "disk0.qcow2")
    name = f"web-{os.getpid()}"  # there may be others
    guest = launch(*blockdev("disk0", image), *disk_device("disk0"), "-name", name)
    cli("save", "clean", monitor=guest.address)
    is_named = by == "the config file"
    (tmp_path / "config.toml").write_text(f"[vm.{name}]\nmonitor = '{guest.address}'\n" if is_named else "")
    process = start_cli(
        "run", "--revert-to", "clean", "--config", str(tmp_path / "config.toml"), "--vm", name, "--",
        "sh", "-c", f"touch {tmp_path}/up; until [ -e {tmp_path}/go ]; do sleep 0.01; done",
    )  # fmt: skip
    until("the command runs", (tmp_path / "up").exists)
    arguments = Path(f"/proc/{guest.pid}/cmdline").read_text().split("\0")[:-1]
    guest.quit()
    again = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
    try:
        until("its monitor", lambda: _listens(guest.address))
        (tmp_path / "go").touch()
        assert finish(process).code == 0
    finally:
        again.kill()
        again.wait(10)


def _listens(address: str) -> bool:
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(address)
        except OSError:
            return False
        end = time.monotonic() + 5
        sock.settimeout(max(0.1, end - time.monotonic()))
        return bool(sock.recv(1))


def test_the_plugin_says_in_a_line_that_there_is_no_such_snapshot(guest: Guest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.qsnap(load='nope')\ndef test_x(qsnap_vm): pass\n")
    result = pytester.runpytest_subprocess(f"--qsnap-monitor={guest.address}")
    result.assert_outcomes(errors=1)
    text = result.stdout.str()
    assert "qsnap: the guest could not be put back to 'nope': no snapshot 'nope' on any device" in text
    assert "Traceback" not in text
    assert "During handling" not in text
    assert len(text.splitlines()) < 20
    guest.assert_running()


def test_runs_wait_for_each_other(guest: Guest, pytester: pytest.Pytester) -> None:
    """Two runs of pytest that drive one guest would put it back under each other: their tests take turns."""
    pytester.makepyfile(
        """
        import os, pathlib, pytest
        FLAG = pathlib.Path(__file__).with_name("busy")

        @pytest.mark.parametrize("n", range(3))
        def test_alone(qsnap_vm, n):
            os.close(os.open(FLAG, os.O_CREAT | os.O_EXCL))
            qsnap_vm.status()
            FLAG.unlink()
        """
    )
    line = [sys.executable, "-m", "pytest", "-p", "no:asyncio", f"--qsnap-monitor={guest.address}"]
    runs = [subprocess.Popen(line, cwd=pytester.path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]


def test_run_looks_for_its_command_before_it_saves(guest: Guest, disk: Path) -> None:
    run = cli("run", "--revert", "--", "no-such-program", monitor=guest.address, expect=127)
    assert run.err == "qsnap: no-such-program: not found\n"
    assert "cannot be executed" in cli("run", "--revert", "--", "/etc/passwd", monitor=guest.address, expect=126).err
    assert tags(disk) == []


@needs_snapshot_jobs
def test_run_saves_live(guest: Guest, disk: Path) -> None:
    run = cli("run", "--revert", "--live", "--json", "--", "true", monitor=guest.address)
    saved, loaded = (json.loads(line) for line in run.err.splitlines())
    assert (saved["kind"], saved["vm"]) == ("live", guest.address)
    assert loaded["tag"] == saved["tag"]
    assert tags(disk) == []
    guest.assert_running()


WORKERS_TEST = """
import pytest

@pytest.mark.parametrize("number", range(4))
def test_x(qsnap_vm, number):
    assert qsnap_vm.status().name
"""


def test_each_worker_has_its_own(launch: Launch, pytester: pytest.Pytester) -> None:
    """pytest-xdist: by its name; and where two would share one, that is refused in a line."""
    for name in ("ci-gw0", "ci-gw1"):
        launch("-name", name, memory="16")
    pytester.makepyfile(WORKERS_TEST)
    options = ("-n2", "-p", "no:asyncio", "--dist=each")
    own = pytester.runpytest_subprocess("--qsnap-vm=ci-{worker}", *options)
    own.assert_outcomes(passed=8)
    shared = pytester.runpytest_subprocess("--qsnap-vm=ci-gw0", *options)
    shared.assert_outcomes(passed=4, errors=4)
    text = shared.stdout.str()
    assert "would share the VM" in text
    assert "Traceback" not in text


def test_errors_of_the_plugin_are_short(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_x(qsnap_vm):\n    qsnap_vm.load('x')\n")
    text = pytester.runpytest_subprocess("--qsnap-vm=nobody", "-p", "no:asyncio").stdout.str()
    assert "qsnap: no VM 'nobody' is running" in text
    assert "pytest_plugin.py" not in text
    assert "hidden" not in text
    pytester.makepyfile("import pytest\n@pytest.mark.qsnap(lod='x')\ndef test_x(): pass\n")
    text = pytester.runpytest_subprocess("--qsnap-vm=nobody", "-p", "no:asyncio").stdout.str()
    assert "\nqsnap: the marker qsnap takes the tag of a snapshot: @pytest.mark.qsnap(load='TAG')\n" in text


def test_the_fixture_has_the_methods_of_a_vm(guest: Guest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        def test_x(qsnap_vm):
            assert qsnap_vm.pause().runstate == "paused"
            qsnap_vm.save("x")
            qsnap_vm.load("x", save_current=True)
            assert qsnap_vm.undo(save_current=False).tag.startswith("before-load-")
            assert qsnap_vm.resume().runstate == "running"
            with pytest.raises(AttributeError):
                qsnap_vm.nonsense()
    """)
    pytester.runpytest_subprocess(f"--qsnap-monitor={guest.address}", "-p", "no:asyncio").assert_outcomes(passed=1)


def test_an_error_in_a_test_is_shown_by_its_line(guest: Guest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_x(qsnap_vm):\n    qsnap_vm.load('x')\n")
    text = pytester.runpytest_subprocess(f"--qsnap-monitor={guest.address}", "-p", "no:asyncio").stdout.str()
    assert "qsnap.errors.SnapshotNotFound: no snapshot 'x' on any device" in text
    assert "pytest_plugin.py" not in text
