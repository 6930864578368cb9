"""Every exit code, by a real cause; and after each of them the guest runs, with nothing lost and nothing left."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsnap.host import sockets
from support.busy import big_guest, in_the_write
from support.guest import (
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    assert_nothing_left,
    blockdev,
    both_monitors,
    cli,
    deliver,
    disk_device,
    failing_disk,
    finish,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    qemu_img,
    start_cli,
    state_sizes,
    tags,
    until,
)
from support.killed import wait_for_the_guard
from support.proxy import Intercept, deed


@pytest.fixture
def disks(tmp_path: Path) -> dict[Path, list[str]]:
    """The guest fixture's images, with nothing on them."""
    return {tmp_path / "disk0.qcow2": [], tmp_path / "disk1.qcow2": []}


def with_tags(disks: dict[Path, list[str]], *expected: str) -> dict[Path, list[str]]:
    return {image: list(expected) for image in disks}


@both_monitors
def test_0_done(guest: Guest, disks: dict[Path, list[str]]) -> None:
    cli("save", "t", monitor=guest.address)
    assert_nothing_left(guest, with_tags(disks, "t"))


@both_monitors
def test_12_timeout(launch: Launch, tmp_path: Path) -> None:
    guest, image = big_guest(launch, tmp_path)
    run = cli("save", "t", "--timeout", "0.4", "--json", monitor=guest.address, expect=12)
    assert (run.error["error"], run.error["exit_code"]) == ("OperationTimeout", 12)
    assert run.error["vm"] == guest.address
    assert_nothing_left(guest, {image: []})


@pytest.mark.parametrize("allowed", [5, 8, 14, 20])
def test_1_too_few_files(guest: Guest, disks: dict[Path, list[str]], allowed: int) -> None:
    """It is refused at once: in the middle there would be a way too few, or VMs that are not seen."""
    assert_refused_with(guest, allowed, "save", "t", "--json", expect=1)
    assert_refused_with(guest, allowed, "save", "t", expect=1)
    assert_refused_with(guest, allowed, "run", "--revert", "--", "true", expect=125)
    assert_refused_with(guest, allowed, "vms", expect=1)
    assert_nothing_left(guest, disks)


def assert_refused_with(guest: Guest, allowed: int, *arguments: str, expect: int) -> None:
    limited = ["sh", "-c", f'ulimit -n {allowed}; exec "$0" -m qsnap "$@"', sys.executable, *arguments]
    environment = {**os.environ, "QSNAP_MONITOR": guest.address}
    run = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == expect, run.stderr
    (line,) = run.stderr.splitlines()
    assert f"qsnap may open only {allowed} files, but needs 32: `ulimit -n 32`" in line


def test_2_usage(guest: Guest, disks: dict[Path, list[str]]) -> None:
    for arguments in (
        ("save", "a", "b"),
        ("save", "--no-such-option"),
        ("load",),
        ("frobnicate",),
        ("list", "-m", "tcp:nowhere"),
        ("list", "-m", ""),
        ("list", "--timeout", "-1"),
        ("list", "--timeout", "soon"),
        ("list", "--vm", "x", "-m", "y"),
    ):
        assert cli(*arguments, monitor=guest.address, expect=2).err
    error = cli("list", "-m", "", "--json", expect=2).error
    assert (error["error"], "a good one is" in error["message"]) == ("BadUsage", True)
    assert_nothing_left(guest, disks)


@both_monitors
def test_3_some_done_some_not(guest: Guest, disks: dict[Path, list[str]]) -> None:
    cli("save", "a", monitor=guest.address)
    cli("save", "b", monitor=guest.address)
    error = cli("delete", "a", "nope", "--json", monitor=guest.address, expect=3).error
    assert error["done"] == ["a"]
    assert [(f["tag"], f["exit_code"]) for f in error["failed"]] == [("nope", 7)]
    assert_nothing_left(guest, with_tags(disks, "b"))


def test_4_nobody_there(tmp_path: Path) -> None:
    assert "no socket" in cli("list", "-m", str(tmp_path / "none"), expect=4).err
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(tmp_path / "closed"))
    assert "nobody listens" in cli("list", "-m", str(tmp_path / "closed"), expect=4).err
    assert "nobody listens" in cli("list", "-m", "tcp:127.0.0.1:1", expect=4).err
    assert "no host is called 'none.invalid'" in cli("list", "-m", "tcp:none.invalid:1", expect=4).err


@both_monitors
def test_4_busy(guest: Guest, disks: dict[Path, list[str]]) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(guest.address)
        assert other.recv(1), "it is served"
        run = cli("save", "t", "--json", "--timeout", "2", monitor=guest.address, expect=4)
    assert run.error["error"] == "MonitorBusy"
    if sockets.from_netlink() is not None:  # this kernel tells who is connected
        command = shlex.join(Path("/proc/self/cmdline").read_bytes().decode().removesuffix("\0").split("\0"))
        assert f"process {os.getpid()} holds it ({command[:60]}" in run.error["message"]
    else:
        assert "another client holds this monitor" in run.error["message"]
    assert_nothing_left(guest, disks)


def test_4_stopped_is_not_busy(guest: Guest) -> None:
    """A QEMU that does not answer at all, with nobody else on its monitor."""
    guest.process.send_signal(signal.SIGSTOP)
    try:
        run = cli("list", "--timeout", "1", monitor=guest.address, expect=4)
    finally:
        guest.process.send_signal(signal.SIGCONT)
    assert f"QEMU, process {guest.pid}, is in the middle of a save or stopped" in run.err


def test_4_not_a_monitor(guest: Guest, launch: Launch) -> None:
    launch("-serial", f"unix:{guest.directory}/serial-socket,server=on,wait=off", memory="16")
    assert cli("list", "-m", f"{guest.directory}/serial-socket", "--timeout", "2", expect=4).err


@both_monitors
def test_4_qemu_dies_in_the_middle(guest: Guest, intercept: Intercept) -> None:
    def kill(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-save":
            guest.process.kill()
            guest.process.wait(10)

    run = cli("save", "t", "--json", monitor=intercept(guest, on_command=kill).address, expect=None)
    assert run.code in (4, 20), run.err  # through the proxy qsnap cannot see that the process is gone


@both_monitors
def test_4_qemu_dies_in_the_middle_and_is_seen_to(launch: Launch, tmp_path: Path) -> None:
    guest, image = big_guest(launch, tmp_path)
    process = start_cli("save", "--no-prepare", "t", "--json", monitor=guest.address)
    with in_the_write(guest, image):
        guest.process.kill()
    run = finish(process)
    assert run.code == 4, run.err
    assert run.error["error"] == "MonitorLost"
    assert "no guest any more" in run.error["message"]


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)
def test_5_what_hmp_cannot_do(guest: Guest, disks: dict[Path, list[str]]) -> None:
    for arguments in (
        ("save", "t", "--exclude", "disk1"),
        ("save", "t", "--vmstate", "disk1"),
        ("save", "\u00db"),
        ("load", "t", "--exclude", "disk1"),
        ("delete", "t "),
    ):
        run = cli(*arguments, "--json", monitor=guest.address, expect=5)
        assert run.error["error"] == "NotSupported"
        assert "human monitor" in run.error["message"]
    assert "STOP" not in [event["event"] for event in guest.qmp.events]
    assert_nothing_left(guest, disks)


@both_monitors
def test_6_raw_disk(launch: Launch, tmp_path: Path) -> None:
    image = make_boot_disk(tmp_path / "a")
    raw = make_disk(tmp_path / "b", "8M", "raw")
    guest = launch(
        *blockdev("a", image), *disk_device("a"),
        *blockdev("b", raw, "raw"), *disk_device("b", 1, id="data"),
    )  # fmt: skip
    guest.wait_for_ticks()
    error = cli("save", "t", "--json", monitor=guest.address, expect=6).error
    assert [finding["node"] for finding in error["findings"]] == ["b"]
    assert "STOP" not in [event["event"] for event in guest.qmp.events]
    report = cli("check", "--json", monitor=guest.address, expect=6).json
    assert not report["ok"]
    assert_nothing_left(guest, {image: []})


@both_monitors
def test_7_no_such_snapshot(guest: Guest, disks: dict[Path, list[str]]) -> None:
    for verb in ("load", "show", "delete"):
        error = cli(verb, "nope", "--json", monitor=guest.address, expect=7).error
        assert (error["error"], error["tag"]) == ("SnapshotNotFound", "nope")
    cli("delete", "nope", "--missing-ok", monitor=guest.address)
    guest.qmp("query-status")
    assert "STOP" not in [event["event"] for event in guest.qmp.events]
    assert_nothing_left(guest, disks)


@both_monitors
def test_8_exists(guest: Guest, disks: dict[Path, list[str]]) -> None:
    first = cli("save", "t", "--json", monitor=guest.address).json
    guest.qmp("query-status")
    guest.qmp.events.clear()
    error = cli("save", "t", "--no-replace", "--json", monitor=guest.address, expect=8).error
    assert error["devices"] == ["disk0", "disk1"]
    guest.qmp("query-status")
    assert guest.qmp.events == []
    (kept,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert (kept["date"], kept["vm_clock_ns"]) == (first["date"], first["vm_clock_ns"])
    assert_nothing_left(guest, with_tags(disks, "t"))


@pytest.fixture
def full_disk_guest(launch: Launch, tmp_path: Path) -> Guest:
    """A guest whose vmstate image has no room: each write of VM state fails with ENOSPC."""
    make_boot_disk(tmp_path / "a")
    guest = launch(*failing_disk("a", tmp_path / "a", "vmstate_save", errno.ENOSPC), *disk_device("a"))
    guest.wait_for_ticks()
    return guest


@both_monitors
def test_9_disk_full(full_disk_guest: Guest, tmp_path: Path) -> None:
    error = cli("save", "t", "--json", monitor=full_disk_guest.address, expect=9).error
    assert error["error"] == "JobFailed"
    assert error["reason"].startswith(("Error while writing VM state: ", "ram_save_setup failed: "))  # from 10.0 on
    assert "nothing of it is left; the guest is running" in error["message"]
    assert_nothing_left(full_disk_guest, {tmp_path / "a": []})


@both_monitors
def test_9_says_that_the_old_snapshot_is_gone(full_disk_guest: Guest, tmp_path: Path) -> None:
    full_disk_guest.qmp("blockdev-snapshot-internal-sync", device="a", name="t")
    run = cli("save", "t", monitor=full_disk_guest.address, expect=9)
    assert "the older snapshot 't' had already been deleted" in run.err
    assert_nothing_left(full_disk_guest, {tmp_path / "a": []})


@both_monitors
def test_9_or_10_second_disk_fails(launch: Launch, tmp_path: Path) -> None:
    """The seed's case: an error while creating one device's snapshot. Nobody is left with half a set.

    QEMU from 6.0 on removes it itself (9); older ones leave it, and it is for qsnap to remove it (10).
    """
    image, spare = make_boot_disk(tmp_path / "a"), make_disk(tmp_path / "b")
    guest = launch(*blockdev("a", image), *disk_device("a"), *failing_disk("b", spare, "cluster_alloc", errno.EIO))
    guest.wait_for_ticks()
    error = cli("save", "t", "--json", monitor=guest.address, expect=9 if HAS_SNAPSHOT_JOBS else 10).error
    assert "create snapshot 't' on 'b'" in error["message"] or "creating snapshot on 'b'" in error["message"]
    assert ("what this save made was removed from a" in error["message"]) == (not HAS_SNAPSHOT_JOBS)
    assert_nothing_left(guest, {image: [], spare: []})


def only_the_disk(guest: Guest, node: str) -> None:
    guest.qmp("blockdev-snapshot-internal-sync", device=node, name="t")


def state_too(guest: Guest, *nodes: str) -> None:
    """A save of that tag by another client, with the state on the first of those nodes."""
    guest.qmp("snapshot-save", job_id="j", tag="t", vmstate=nodes[0], devices=nodes)
    until("the job", lambda: guest.qmp("query-jobs")[0]["status"] == "concluded" or None)
    guest.qmp("job-dismiss", id="j")


@pytest.mark.parametrize(
    ("transport", "deleted", "make", "problem"),
    [
        ("qmp", "disk1", lambda guest: None, "disk1 holds it 0 times instead of once"),
        ("hmp", "disk1", lambda guest: None, "disk1 holds it 0 times instead of once"),
        ("qmp", "disk0", lambda guest: only_the_disk(guest, "disk0"), "disk0 holds no VM state"),
        pytest.param(
            "qmp", "disk1", lambda guest: state_too(guest, "disk1"), "disk1 holds a VM state that belongs on disk0",
            marks=needs_snapshot_jobs,
        ),
        # QEMU refuses a tag only if it is on all devices
        pytest.param(
            "qmp", "disk1", lambda guest: state_too(guest, "disk0", "disk1"), "disk0 holds it 2 times instead of once",
            marks=needs_snapshot_jobs,
        ),
    ],
    indirect=["transport"],
)  # fmt: skip
def test_10_does_not_verify(
    guest: Guest,
    disks: dict[Path, list[str]],
    intercept: Intercept,
    deleted: str,
    make: Callable[[Guest], None],
    problem: str,
) -> None:
    """Another client changes the snapshot on one disk, between the end of the save and the look at it."""
    is_done = False

    def meddle(message: dict[str, Any]) -> None:
        nonlocal is_done
        if deed(message) == "query-named-block-nodes" and not is_done and "t" in guest.node_tags("disk1"):
            is_done = True
            guest.qmp("blockdev-snapshot-delete-internal-sync", device=deleted, name="t")
            make(guest)

    proxy = intercept(guest, on_command=meddle)
    error = cli("save", "t", "--json", monitor=proxy.address, expect=10).error
    assert (error["error"], error["problems"]) == ("VerifyFailed", [problem])
    assert "what this save made was removed from disk0" in error["message"]
    assert_nothing_left(guest, disks)


@both_monitors
def test_20_load_fails_in_the_middle(launch: Launch, tmp_path: Path) -> None:
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*failing_disk("a", image, "vmstate_load", errno.EIO), *disk_device("a"))
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.address)
    guest.wait_for_ticks(3)
    error = cli("load", "t", "--full", "--json", monitor=guest.address, expect=20).error
    assert error["error"] == "GuestLeftStopped"
    assert "RAM and disks may be half restored, so the guest is left stopped on purpose" in error["message"]
    assert "qemu-img snapshot -a t" in error["message"]
    assert guest.runstate != "running"
    assert guest.jobs() == []
    assert tags(image) == ["t"]


@needs_snapshot_jobs
def test_20_nobody_knows_how_the_load_ended(
    launch: Launch, tmp_path: Path, intercept: Intercept, runtime_directory: Path
) -> None:
    """Another client has dismissed its job, and with it the error that stood there. Nothing is left to the guard."""
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*failing_disk("a", image, "vmstate_load", errno.EIO), *disk_device("a"))
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.address)

    def dismiss(message: dict[str, Any]) -> None:
        if deed(message) == "query-jobs" and (jobs := guest.qmp("query-jobs")):
            (job,) = jobs
            assert (job["type"], job["status"]) == ("snapshot-load", "concluded")
            guest.qmp("job-dismiss", id=job["id"])

    proxy = intercept(guest, on_command=dismiss)
    error = cli("load", "t", "--json", monitor=proxy.address, expect=20).error
    assert "its job has vanished" in error["message"]
    wait_for_the_guard(runtime_directory)
    assert proxy.commands[proxy.commands.index("snapshot-load") :].count("object-add") == 1, "a guard marks it again"
    assert guest.runstate != "running"
    cli("save", "t", monitor=guest.address, expect=6)


@both_monitors
def test_9_load_fails_in_the_middle_of_a_paused_guest(launch: Launch, tmp_path: Path) -> None:
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*failing_disk("a", image, "vmstate_load", errno.EIO), *disk_device("a"))
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.address)
    guest.qmp("stop")
    error = cli("load", "t", "--full", "--json", monitor=guest.address, expect=9).error
    assert "may be half restored" in error["message"]
    assert guest.runstate != "running"


@both_monitors
def test_20_no_room_for_the_guest_either(launch: Launch, tmp_path: Path) -> None:
    """The save fails for want of room, and so do the guest's own writes once it runs again: QEMU stops it."""
    image = make_boot_disk(tmp_path / "a")
    args = failing_disk("a", image, "vmstate_save", errno.ENOSPC, once=False)
    guest = launch(*args, "-device", "virtio-blk,drive=a,werror=stop")
    guest.wait_for_ticks()
    run = cli("save", "t", "--json", monitor=guest.address, expect=None)
    until("the guest's own write", lambda: guest.runstate == "io-error" or None)
    if run.code == 9:
        return  # its write came after our last look
    assert run.code == 20, run.err
    assert "Make room" in run.error["message"]


@both_monitors
def test_6_nothing_is_saved_over_a_good_one_after_a_failed_load(launch: Launch, tmp_path: Path) -> None:
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*failing_disk("a", image, "vmstate_load", errno.EIO), *disk_device("a"))
    guest.wait_for_ticks()
    cli("save", "good", monitor=guest.address)
    before = cli("list", "--json", monitor=guest.address).json
    cli("load", "good", "--full", monitor=guest.address, expect=20)
    for verb in (["check"], ["save", "good"], ["save", "other"]):
        run = cli(*verb, monitor=guest.address, expect=6)
        assert "a load has failed midway" in run.out + run.err
    assert cli("list", "--json", monitor=guest.address).json == before
    cli("load", "good", "--running", monitor=guest.address)  # the fault comes once
    guest.assert_running()
    cli("save", "other", monitor=guest.address)
    assert sorted(tags(image)) == ["good", "other"]


@both_monitors
def test_20_load_into_another_machine(launch: Launch, tmp_path: Path) -> None:
    image = make_boot_disk(tmp_path / "a")
    disk = [*blockdev("a", image), *disk_device("a")]
    small = launch(*disk, memory="32")
    small.wait_for_ticks()
    cli("save", "t", monitor=small.address)
    small.quit()
    large = launch(*disk, memory="48")
    large.wait_for_ticks()
    cli("load", "t", monitor=large.address, expect=6)
    run = cli("load", "t", "--force", monitor=large.address, expect=20)
    assert "while loading" in run.err
    assert large.runstate != "running"
    assert large.jobs() == []


@both_monitors
def test_20_the_monitor_is_gone_while_the_guest_is_stopped(guest: Guest, intercept: Intercept) -> None:
    def cut(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-save":
            proxy.refuse()

    proxy = intercept(guest, on_command=cut)
    run = cli("save", "t", "--json", monitor=proxy.address, expect=20)
    assert "is stopped now" in run.error["message"]
    assert guest.runstate == "paused"


@both_monitors
@pytest.mark.parametrize("command", ["stop", "snapshot-save", "cont"])
def test_4_the_connection_is_cut_and_made_anew(
    guest: Guest, disks: dict[Path, list[str]], intercept: Intercept, command: str
) -> None:
    """The guest is resumed over a new connection, and what had begun is cleared up."""

    def cut(message: dict[str, Any]) -> None:
        if deed(message) == command and proxy.commands.count(command) == 1:
            proxy.cut()

    proxy = intercept(guest, on_command=cut)
    run = cli("save", "t", "--json", monitor=proxy.address, expect=0 if command == "cont" else 4)
    if command == "cont":
        assert run.json["tag"] == "t"
        disks = with_tags(disks, "t")
    else:
        assert run.error["error"] == "MonitorLost"
    assert_nothing_left(guest, disks)


@both_monitors
def test_20_the_connection_is_cut_in_a_load_that_fails(
    launch: Launch, tmp_path: Path, intercept: Intercept, transport: str
) -> None:
    """A guest that may be half restored is not resumed over the new connection either."""
    disk = [*blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a")]
    small = launch(*disk, memory="32")
    small.wait_for_ticks()
    cli("save", "t", monitor=small.address)
    small.quit()
    guest = launch(*disk, memory="48")
    guest.wait_for_ticks()

    def cut(message: dict[str, Any]) -> None:
        if deed(message) == "query-jobs" and "snapshot-load" in proxy.commands and "cut" not in proxy.commands:
            proxy.commands.append("cut")
            proxy.cut()

    proxy = intercept(guest, on_command=cut if HAS_SNAPSHOT_JOBS and transport == "qmp" else None)
    cli("load", "t", monitor=proxy.address, expect=20)
    assert guest.runstate != "running"
    assert guest.jobs() == []
    cli("save", "t", monitor=guest.address, expect=6)


@both_monitors
def test_4_the_connection_of_a_paused_guest_is_cut(
    guest: Guest, disks: dict[Path, list[str]], intercept: Intercept
) -> None:
    guest.qmp("stop")

    def cut(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-save":
            proxy.cut()

    proxy = intercept(guest, on_command=cut)
    cli("save", "t", monitor=proxy.address, expect=4)
    assert guest.runstate == "paused"
    guest.qmp("cont")
    assert_nothing_left(guest, disks)


@both_monitors
def test_4_the_connection_is_cut_while_qemu_writes(launch: Launch, tmp_path: Path, intercept: Intercept) -> None:
    guest, image = big_guest(launch, tmp_path)
    proxy = intercept(guest)
    process = start_cli("save", "--no-prepare", "t", "--json", monitor=proxy.address)
    with in_the_write(guest, image):
        proxy.cut()
    run = finish(process)
    assert run.code == 4, run.err
    assert "the guest is running" in run.error["message"]
    assert_nothing_left(guest, {image: []})


@both_monitors
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_128_and_the_signal(launch: Launch, tmp_path: Path, signum: signal.Signals) -> None:
    guest, image = big_guest(launch, tmp_path)
    process = start_cli("save", "--no-prepare", "t", "--json", monitor=guest.address)
    with in_the_write(guest, image):
        deliver(process, signum)
    run = finish(process)
    assert run.code == 128 + signum, run.err
    assert run.error["exit_code"] == 128 + signum
    assert_nothing_left(guest, {image: []})


@needs_snapshot_jobs
@pytest.mark.parametrize("what", ["all of it", "a part"])
def test_7_it_went_while_the_guest_was_stopped(
    guest: Guest, disks: dict[Path, list[str]], intercept: Intercept, what: str
) -> None:
    """A refusal of the second look does not say that the guest was not touched."""
    cli("save", "t", monitor=guest.address)

    def meddle(message: dict[str, Any]) -> None:
        if deed(message) == "stop" and what == "a part":
            guest.qmp("blockdev-snapshot-delete-internal-sync", device="disk1", name="t")
        elif deed(message) == "stop":
            assert guest.qmp.hmp("delvm t") == ""

    error = cli("load", "t", "--json", monitor=intercept(guest, on_command=meddle).address, expect=7).error
    why = "'t' is partial: disk1 lacks it" if what == "a part" else "no snapshot 't' on any device"
    assert f"{why}; the guest was stopped for a moment, and resumed" in error["message"]
    guest.assert_running()
    assert "STOP" in {event["event"] for event in guest.qmp.events}


@both_monitors
def test_an_interrupted_replacement_keeps_the_new_one(launch: Launch, tmp_path: Path, intercept: Intercept) -> None:
    guest, image = big_guest(launch, tmp_path)
    cli("save", "t", monitor=guest.address)
    (old,) = cli("list", "--json", monitor=guest.address).json["snapshots"]

    def interrupt(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-save":
            deliver(process, signal.SIGTERM)

    process = start_cli("save", "t", monitor=intercept(guest, on_command=interrupt).address)
    run = finish(process)
    assert run.code == 143
    assert "is kept: it replaced an older one" in run.err
    assert_nothing_left(guest, {image: ["t"]})
    (new,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert new["vm_clock_ns"] > old["vm_clock_ns"]  # HMP tells the date in whole seconds
    assert state_sizes(image)["t"] > 256 << 20
    cli("load", "t", monitor=guest.address)
    guest.assert_running()


@both_monitors
def test_a_paused_guest_stays_paused_when_interrupted(launch: Launch, tmp_path: Path) -> None:
    guest, image = big_guest(launch, tmp_path)
    guest.qmp("stop")
    process = start_cli("save", "--no-prepare", "t", monitor=guest.address)
    with in_the_write(guest, image):
        process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert guest.runstate == "paused"
    assert tags(image) == []


@both_monitors
def test_an_interrupted_load_ends_with_the_guest_running(launch: Launch, tmp_path: Path, intercept: Intercept) -> None:
    guest, image = big_guest(launch, tmp_path)
    cli("save", "t", monitor=guest.address)

    def interrupt(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-load":
            deliver(process, signal.SIGTERM)

    process = start_cli("load", "t", monitor=intercept(guest, on_command=interrupt).address)
    run = finish(process)
    assert run.code == 143, run.err
    assert_nothing_left(guest, {image: ["t"]})


@both_monitors
def test_images_stay_clean(guest: Guest, disks: dict[Path, list[str]]) -> None:
    cli("save", "t", monitor=guest.address)
    cli("save", "t", monitor=guest.address)
    cli("delete", "t", monitor=guest.address)
    guest.quit()
    for image in disks:
        qemu_img("check", image)


def test_7_and_3_say_what_was_deleted(guest: Guest) -> None:
    error = cli("delete", "b", "c", monitor=guest.address, expect=7).err
    assert "no snapshot 'b', 'c' on any device; nothing was deleted" in error
    cli("save", "a", monitor=guest.address)
    error = cli("delete", "a", "b", "c", monitor=guest.address, expect=3).err
    assert "done: 'a'; 2 failed: 'b': no snapshot 'b'" in error


def test_a_json_of_the_command_that_is_run_is_not_ours() -> None:
    for options in (["--bogus", "x"], ["-m", "/nowhere", "x"]):
        error = cli("ensure", *options, "--", "echo", "--json", expect=None).err
        assert error.startswith("qsnap: "), error
    assert '"error"' in cli("ensure", "--json", "--bogus", "x", "--", "echo", expect=2).err
    assert '"error"' in cli("list", "-m", "/nowhere", "--json", expect=4).err
