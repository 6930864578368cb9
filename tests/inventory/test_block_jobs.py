"""Block jobs, backups' filters, dirty bitmaps: what a save and a load do while QEMU's block layer is busy.

A load that is refused leaves the guest running and the job as it is; a save made beside one holds what it should.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsnap.errors import PrecheckRefused
from qsnap.model.requests import LoadRequest
from qsnap.operations.load import do_loadvm
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.guest import (
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    qemu_img,
    qemu_version,
    tags,
    tool,
    until,
)

#: So slow that it does not end by itself within a test: bytes in a second.
SLOW = 65536


@pytest.fixture
def overlaid(launch: Launch, tmp_path: Path) -> Guest:
    """The counting guest on one -drive "hd0", an overlay; the byte 7 from 4 MiB on is in the base alone."""
    base = make_boot_disk(tmp_path / "base.qcow2")
    subprocess.run([tool("qemu-io"), "-c", "write -q -P 7 4M 64k", base], check=True, timeout=60)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", tmp_path / "top.qcow2")
    guest = launch("-drive", f"file={tmp_path / 'top.qcow2'},format=qcow2,if=none,id=hd0", *disk_device("hd0"))
    guest.wait_for_ticks()
    return guest


def mirror(guest: Guest, copy: Path) -> None:
    guest.qmp("drive-mirror", job_id="j", device="hd0", target=str(copy), format="qcow2", sync="full")
    until("the mirror to be ready", lambda: guest.qmp("query-jobs")[0]["status"] == "ready")


def mirror_to_raw(guest: Guest, copy: Path) -> None:
    guest.qmp("drive-mirror", job_id="j", device="hd0", target=str(copy), format="raw", sync="full", speed=SLOW)


def commit(guest: Guest, copy: Path) -> None:
    guest.qmp("block-commit", job_id="j", device="hd0")
    until("the commit to be ready", lambda: guest.qmp("query-jobs")[0]["status"] == "ready")


def stream(guest: Guest, copy: Path) -> None:
    guest.qmp("block-stream", job_id="j", device="hd0", auto_finalize=False)
    until("the stream to wait", lambda: guest.qmp("query-jobs")[0]["status"] == "pending")


def backup(guest: Guest, copy: Path) -> None:
    guest.qmp("drive-backup", job_id="j", device="hd0", target=str(copy), format="raw", sync="full", speed=SLOW)


Job = Callable[[Guest, Path], None]
JOBS: list[Job] = [mirror, mirror_to_raw, commit, stream, backup]


def refused(guest: Guest, tag: str, *options: str) -> dict[str, Any]:
    """A load is refused, and neither the guest nor the jobs are touched by that: what is found, by code."""
    guest.qmp("query-status")
    guest.qmp.events.clear()
    jobs = guest.jobs()
    error = cli("load", tag, *options, "--json", monitor=guest.address, expect=6).error
    assert "the guest was not touched" in error["message"]
    assert "--exclude" not in error["message"]
    guest.qmp("query-status")
    assert not {event["event"] for event in guest.qmp.events} & {"STOP", "RESUME"}
    assert guest.jobs() == jobs
    guest.assert_running()
    return {finding["code"]: finding for finding in error["findings"]}


def end(guest: Guest, job: Job) -> None:
    """Cancel it, and wait until it is gone."""
    if job is stream:
        guest.qmp("job-cancel", id="j")
    else:
        guest.qmp("block-job-cancel", device="j", force=True)
    until("the end of the job", lambda: not guest.jobs())


@both_monitors
def test_nothing_is_loaded_while_a_job_works_on_the_disk(overlaid: Guest, tmp_path: Path) -> None:
    """QEMU would take the disk back, and the copy not. What there is is told as ever."""
    cli("save", "t", monitor=overlaid.address)
    for number, job in enumerate(JOBS):
        job(overlaid, tmp_path / f"copy{number}")
        (listed,) = cli("list", "--json", monitor=overlaid.address).json["snapshots"]
        assert (listed["tag"], listed["kind"], listed["missing"]) == ("t", "full", [])
        found = refused(overlaid, "t")
        assert list(found) == ["block-job"]
        assert "block job 'j'" in found["block-job"]["message"]
        if overlaid.address == overlaid.qmp_address:
            assert "hd0" in found["block-job"]["message"]
        assert "block-job-cancel device=j" in found["block-job"]["cure"]
        end(overlaid, job)
    cli("load", "t", monitor=overlaid.address)
    overlaid.assert_running()


async def test_a_job_that_begins_after_the_check_is_noticed() -> None:
    monitor = FakeMonitor(mirrors=True)
    await monitor.snapshot_save("t", "disk0", ["disk0", "disk1"])
    with pytest.raises(PrecheckRefused, match=r"block job 'j' \(mirror\) works on disk1") as refusal:
        await do_loadvm(Run(monitor), LoadRequest(tag="t"))
    assert "cannot be loaded now; the guest was stopped for a moment, and resumed" in str(refusal.value)
    assert monitor.calls == ["save", "stop", "cont"]


@needs_snapshot_jobs
def test_a_job_on_another_disk_is_no_matter(guest: Guest, tmp_path: Path) -> None:
    """Of a disk that stays as it is; and only of that."""
    cli("save", "t", monitor=guest.address)
    guest.qmp("drive-mirror", job_id="j", device="disk1", target=str(tmp_path / "copy"), sync="full", format="raw")
    assert "disk1" in refused(guest, "t")["block-job"]["message"]
    cli("load", "t", "--exclude", "disk1", monitor=guest.address)
    assert guest.jobs() == ["j"]


def test_a_save_beside_a_job(overlaid: Guest, tmp_path: Path) -> None:
    """It goes to the guest's disk alone, and holds what it should; what the end of the job does to it is said."""
    for number, job in enumerate(JOBS):
        job(overlaid, tmp_path / f"copy{number}")
        report = cli("check", "--json", monitor=overlaid.address, expect=None).json
        if not HAS_SNAPSHOT_JOBS:
            # savevm would make a snapshot in the copy, too, or fail at the filter of a backup
            assert [f["code"] for f in report["findings"] if f["severity"] == "refuse"] == ["block-job"]
            cli("save", "t", monitor=overlaid.address, expect=6)
            end(overlaid, job)
            continue
        assert [f["code"] for f in report["findings"]] == ([] if job is backup else ["block-job"])
        overlaid.qmp("stop")
        counter = overlaid.counter
        saved = cli("save", "t", "--json", monitor=overlaid.address).json
        assert (saved["kind"], saved["devices"]) == ("full", [saved["vmstate"]])
        overlaid.qmp("cont")
        overlaid.wait_for_ticks()
        end(overlaid, job)
        assert tags(tmp_path / "top.qcow2") == ["t"]
        assert tags(tmp_path / "base.qcow2") == []
        cli("load", "t", "--paused", monitor=overlaid.address)
        assert overlaid.counter == counter
        overlaid.qmp("cont")
        overlaid.assert_running()


@needs_snapshot_jobs
@pytest.mark.parametrize("job", [mirror, commit, backup, stream])
def test_a_live_save_beside_a_job(overlaid: Guest, tmp_path: Path, job: Job) -> None:
    """QEMU would fail in the middle of it. It is refused in time, and where auto may choose it is an ordinary one."""
    job(overlaid, tmp_path / "copy")
    saved = cli("save", "--live=auto", "t", "--json", monitor=overlaid.address).json
    (told,) = (finding["message"] for finding in saved["warnings"] if finding["code"] == "not-live")
    assert saved["kind"] == "full"
    overlaid.qmp("query-status")
    overlaid.qmp.events.clear()
    error = cli("save", "--live", "l", "--json", monitor=overlaid.address, expect=5).error["message"]
    for message in told, error:
        assert "a live save is not possible while" in message
        assert "'j'" in message
        assert "on hd0" in message
        assert "wait for its end, or block-job-cancel device=j" in message
    assert "--no-live" in error
    overlaid.qmp("query-status")
    assert not {event["event"] for event in overlaid.qmp.events} & {"STOP", "RESUME"}
    assert overlaid.jobs() == ["j"]
    overlaid.assert_running()
    end(overlaid, job)
    at = overlaid.wait_for_ticks()
    cli("load", "t", monitor=overlaid.address)
    overlaid.assert_running()
    assert overlaid.lines()[-1][0] < at, "it has not gone back"
    assert tags(tmp_path / "top.qcow2") == ["t"]


@both_monitors
def test_a_deletion_beside_a_backup(overlaid: Guest, tmp_path: Path, transport: str) -> None:
    """HMP's delvm takes all disks: it fails at the filter, or (QEMU 5.2) leaves that disk out."""
    by_hmp = transport == "hmp" or not HAS_SNAPSHOT_JOBS
    for tag in ("t", "u"):
        cli("save", tag, monitor=overlaid.address)
    backup(overlaid, tmp_path / "copy")
    run = cli("delete", "t", "--json", monitor=overlaid.address, expect=6 if by_hmp else 0)
    if by_hmp:
        (finding,) = run.error["findings"]
        assert finding["code"] == "block-job"
        assert "QEMU's delvm cannot delete beside it" in finding["message"]
        assert "block_job_cancel j" in finding["cure"]
    assert tags(tmp_path / "top.qcow2") == (["t", "u"] if by_hmp else ["u"])
    end(overlaid, backup)
    cli("delete", "u", monitor=overlaid.address)
    assert "u" not in tags(tmp_path / "top.qcow2")
    overlaid.assert_running()


@both_monitors
def test_what_lies_below_an_external_overlay(overlaid: Guest, tmp_path: Path) -> None:
    """A backup tool, or virsh --disk-only, has put an overlay above the image that holds it."""
    cli("save", "good", monitor=overlaid.address)
    overlaid.qmp("blockdev-snapshot-sync", device="hd0", snapshot_file=str(tmp_path / "overlay"), format="qcow2")
    where = "in the backing image top.qcow2 of hd0"
    for verb in ("load", "show", "delete", "protect"):
        error = cli(verb, "good", "--json", monitor=overlaid.address, expect=7).error
        assert where in error["message"]
        assert "commit the overlay first" in error["message"]
    listed = cli("list", monitor=overlaid.address)
    assert "the backing image top.qcow2 of hd0 holds good" in listed.err
    assert f"none at all, but 1 {where}" in cli("status", "--max-age", "1h", monitor=overlaid.address, expect=2).out
    assert "top.qcow2 of hd0" in cli("status", monitor=overlaid.address).out
    overlaid.assert_running()
    cli("save", "good", monitor=overlaid.address)
    assert cli("list", monitor=overlaid.address).err == ""
    cli("load", "good", monitor=overlaid.address)
    cli("delete", "good", monitor=overlaid.address)
    overlaid.qmp("block-commit", job_id="j", device="hd0", base=str(tmp_path / "top.qcow2"))
    until("the commit to be ready", lambda: overlaid.qmp("query-jobs")[0]["status"] == "ready")
    overlaid.qmp("block-job-complete", device="j")
    until("the end of the job", lambda: not overlaid.jobs())
    cli("load", "good", monitor=overlaid.address)
    overlaid.assert_running()


def completed(guest: Guest) -> None:
    """The job's copy takes the disk's place."""
    until("the job to be ready", lambda: guest.qmp("query-jobs")[0]["status"] == "ready")
    guest.qmp("job-complete", id="j")
    until("the end of the job", lambda: not guest.jobs())


@needs_snapshot_jobs
@pytest.mark.parametrize("command", ["blockdev-mirror", "block-commit"])
def test_a_device_that_has_left_its_image(launch: Launch, tmp_path: Path, command: str) -> None:
    """With the disk as it is now the guest would find data of two moments: nothing offers that."""
    base = make_boot_disk(tmp_path / "base")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", tmp_path / "top")
    make_disk(tmp_path / "other")
    guest = launch(
        *blockdev("hd", tmp_path / "top"), *disk_device("hd", id="vd"),
        *blockdev("other", tmp_path / "other"), *disk_device("other", 1, id="vo"),
    )  # fmt: skip
    guest.wait_for_ticks()
    cli("save", "a", monitor=guest.address)
    more: dict[str, object] = {}
    if command == "blockdev-mirror":
        copy = make_disk(tmp_path / "copy")
        guest.qmp("blockdev-add", node_name="copy", driver="qcow2", file={"driver": "file", "filename": str(copy)})
        more = {"target": "copy", "sync": "full"}
    guest.qmp(command, job_id="j", device="hd", **more)
    completed(guest)
    guest.wait_for_ticks()
    for options in ([], ["--exclude", "vd"]):
        error = cli("load", "a", *options, "--json", monitor=guest.address, expect=6).error
        (finding,) = error["findings"]
        assert (finding["code"], "hd holds it" in finding["message"]) == ("left-its-image", True), finding
        assert "the guest was not touched" in error["message"]
        assert "leave that as it is now" not in error["message"]
    error = cli("load", "a", "--exclude", "vd", "--exclude", "vo", "--force", "--json", monitor=guest.address, expect=6)
    assert [finding["code"] for finding in error.error["findings"]] == ["no-device"]
    guest.wait_for_ticks()
    assert guest.lines()[-1][1] == 0, "RAM and disk are of one moment still"


@needs_snapshot_jobs
def test_one_of_two_disks_below_an_external_overlay(guest: Guest, tmp_path: Path) -> None:
    cli("save", "good", monitor=guest.address)
    cli("save", "live", "--live", monitor=guest.address)
    guest.qmp(
        "blockdev-snapshot-sync", node_name="disk1", snapshot_file=str(tmp_path / "ext"), snapshot_node_name="ext",
        format="qcow2",
    )  # fmt: skip
    assert "the backing image disk1.qcow2 of ext holds good, live" in cli("list", monitor=guest.address).err
    for tag in "good", "live":
        for options in ([], ["--exclude", "vd1"]):
            error = cli("load", tag, *options, "--json", monitor=guest.address, expect=6).error
            (finding,) = error["findings"]
            assert (finding["code"], "--exclude" in error["message"]) == ("in-backing", False), error
    assert "the backing image disk1.qcow2 of ext holds good" in cli("delete", "good", monitor=guest.address).err
    cli("save", "later", "--exclude", "vd1", monitor=guest.address)
    cli("load", "later", "--exclude", "vd1", monitor=guest.address)  # no part of that is in the backing image
    guest.qmp("block-commit", job_id="j", device="ext", base_node="disk1")
    completed(guest)
    cli("load", "live", monitor=guest.address)
    guest.wait_for_ticks()
    assert guest.lines()[-1][1] == 0


@needs_snapshot_jobs
def test_dirty_bitmaps_block_a_load(launch: Launch, tmp_path: Path) -> None:
    """On the image QEMU would refuse; on a filter above, the next backup would miss what has gone back.

    So it is said before the night's save, and not first at the load.
    """
    guest = launch(
        "-object", "throttle-group,id=tg",
        *blockdev("fmt", make_boot_disk(tmp_path / "a")),
        "-blockdev", "driver=throttle,node-name=top,throttle-group=tg,file=fmt",
        *disk_device("top"),
    )  # fmt: skip
    guest.wait_for_ticks()
    assert cli("check", "--json", monitor=guest.address).json["findings"] == []
    cli("save", "t", monitor=guest.address)
    for node in ("fmt", "top"):
        guest.qmp("block-dirty-bitmap-add", node=node, name="tool")
        (warned,) = cli("check", "--json", monitor=guest.address).json["findings"]
        assert (warned["code"], warned["severity"]) == ("dirty-bitmaps", "warn")
        assert "(tool): no snapshot can be loaded" in cli("save", "t", monitor=guest.address).err
        found = refused(guest, "t")
        assert list(found) == ["dirty-bitmaps"]
        assert "block-dirty-bitmap-remove" in found["dirty-bitmaps"]["cure"]
        guest.qmp("block-dirty-bitmap-remove", node=node, name="tool")
    cli("load", "t", monitor=guest.address)
    guest.assert_running()


@pytest.mark.skipif(qemu_version() < (6, 0), reason="QEMU 5.2 crashes when its nodes are listed beside such a job")
def test_a_job_that_has_ended_and_was_not_dismissed(overlaid: Guest, tmp_path: Path) -> None:
    """QMP tells, and it is in nobody's way. HMP shows it like one that works: so what ends that is told."""
    cli("save", "t", monitor=overlaid.address)
    copy = str(tmp_path / "copy")
    overlaid.qmp("drive-backup", job_id="j", device="hd0", target=copy, format="raw", sync="full", auto_dismiss=False)
    until("the end of the backup", lambda: overlaid.qmp("query-jobs")[0]["status"] == "concluded")
    cli("load", "t", monitor=overlaid.qmp_address)
    for command in "load", "save", "delete":
        error = cli(command, "t", monitor=overlaid.hmp_address, expect=6).err
        assert "'j' (backup) is under way, or has ended and was not dismissed" in error
        assert "if it has ended: job-dismiss id=j, by QMP" in error
    overlaid.qmp("job-dismiss", id="j")
    cli("load", "t", monitor=overlaid.hmp_address)
    overlaid.assert_running()


def test_dirty_bitmaps_that_hmp_does_not_show(launch: Launch, tmp_path: Path) -> None:
    """QEMU comes upon them in the middle of the load. On the first disk nothing has gone back by then."""
    guest = launch(
        "-drive", f"file={make_boot_disk(tmp_path / 'a')},format=qcow2,if=none,id=vdb",
        *disk_device("vdb"),
        *blockdev("second", make_disk(tmp_path / "b")), *disk_device("second", 1, id="first"),
    )  # fmt: skip
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.hmp_address)
    guest.wait_for_ticks(3)
    first = guest.qmp("query-block")[0]["inserted"]["node-name"]
    guest.qmp("block-dirty-bitmap-add", node=first, name="tool")
    for is_running in (True, False):
        error = cli("load", "t", "--json", monitor=guest.hmp_address, expect=9).error
        assert "on 'vdb': Device has active dirty bitmaps; nothing was loaded" in error["message"]
        assert "Remove the dirty bitmaps of vdb by QMP" in error["message"]
        assert cli("tree", "--json", monitor=guest.address).json["position"]["tag"] == "t", "it is where it was"
        assert guest.runstate == ("running" if is_running else "paused")
        if is_running:
            guest.wait_for_ticks()
            guest.assert_running()
            guest.qmp("stop")
            counter = guest.counter
    # From 10.2 on QEMU drops translated code only if the guest runs for an instant
    assert counter <= guest.counter <= counter + (2 if qemu_version() >= (10, 2) else 0)
    guest.qmp("cont")
    guest.assert_running()

    guest.qmp("block-dirty-bitmap-remove", node=first, name="tool")
    guest.qmp("block-dirty-bitmap-add", node="second", name="tool")
    for code in (20, 9):
        error = cli("load", "t", "--running", "--json", monitor=guest.hmp_address, expect=code).error
        assert "RAM and disks may be half restored" in error["message"]
        assert "Remove the dirty bitmaps of second by QMP" in error["message"]
        assert "Then load 't' again, with --running" in error["message"]
        assert guest.runstate != "running"
    guest.qmp("block-dirty-bitmap-remove", node="second", name="tool")
    cli("load", "t", "--running", monitor=guest.hmp_address)
    guest.wait_for_ticks()
    guest.assert_running()


@pytest.mark.skipif(qemu_version() < (6, 2), reason="a copy-before-write filter cannot be put in before QEMU 6.2")
@both_monitors
def test_the_filter_of_a_backup_without_a_job(launch: Launch, tmp_path: Path, transport: str) -> None:
    """What lies below it is told as ever, saved, and not loaded before the filter is gone."""
    guest = launch(*blockdev("fmt", make_boot_disk(tmp_path / "a")), *disk_device("fmt", id="vd"))
    guest.wait_for_ticks()
    cli("save", "t", monitor=guest.address)
    device = guest.qmp("query-block")[0]["qdev"]
    copy = {"driver": "file", "filename": str(make_disk(tmp_path / "copy", "8M", "raw"))}
    guest.qmp("blockdev-add", driver="copy-before-write", node_name="cbw", file="fmt", target=copy)
    guest.qmp("qom-set", path=device, property="drive", value="cbw")
    (listed,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert (listed["tag"], listed["kind"], listed["devices"]) == ("t", "full", ["fmt"])
    cli("status", "--max-age", "1h", monitor=guest.address)
    guest.qmp("stop")
    counter = guest.counter
    saved = cli("save", "t", "--json", monitor=guest.address, expect=6 if transport == "hmp" else 0)
    if transport == "qmp":
        guest.qmp("cont")
        error = cli("save", "l", "--live", monitor=guest.address, expect=5).err
        assert "a live save is not possible while the filter cbw is above fmt: end the backup" in error
        guest.qmp("stop")
        counter = guest.counter
        cli("save", "t", monitor=guest.address)
    if transport == "hmp":
        assert [f["code"] for f in saved.error["findings"]] == ["backup-filter"]
        error = cli("delete", "t", "--json", monitor=guest.address, expect=6).error
        assert [f["code"] for f in error["findings"]] == ["backup-filter"]
    guest.qmp("cont")
    guest.wait_for_ticks()
    assert list(refused(guest, "t")) == ["backup-filter"]
    guest.qmp("qom-set", path=device, property="drive", value="fmt")
    guest.qmp("blockdev-del", node_name="cbw")
    cli("load", "t", "--paused", monitor=guest.address)
    assert guest.counter == counter or transport == "hmp"
    guest.qmp("cont")
    guest.assert_running()


@both_monitors
def test_a_backing_file_that_was_streamed_away(overlaid: Guest, tmp_path: Path) -> None:
    """The snapshot has lost what was in it. What is written down beside the image tells; nothing else does."""
    cli("save", "t", monitor=overlaid.address)
    for _ in range(2):
        cli("save", "again", monitor=overlaid.address)
    noted = json.loads((tmp_path / "top.qcow2.qsnap-notes").read_text())["notes"]
    assert [note["tag"] for note in noted] == ["t", "again"], "one each"
    cli("load", "t", monitor=overlaid.address)
    overlaid.qmp("block-stream", job_id="j", device="hd0")
    until("the end of the job", lambda: not overlaid.jobs())
    found = refused(overlaid, "t")
    assert list(found) == ["backing-changed"]
    message = found["backing-changed"]["message"]
    assert "hd0 had base.qcow2 below it when it was saved, and has no other image now" in message
    listed = cli("list", "--json", monitor=overlaid.address).json["snapshots"]
    assert [len(one["problems"]) for one in listed] == [1, 1]
    assert "2 that cannot be loaded" in cli("status", "--max-age", "1h", monitor=overlaid.address, expect=2).out
    cli("save", "after", monitor=overlaid.address)
    cli("load", "after", monitor=overlaid.address)
    overlaid.assert_running()
    # The negative control: what would have been lost
    overlaid.qmp("stop")
    cli("load", "t", "--force", monitor=overlaid.address)
    assert in_base(overlaid) == {0}
    cli("load", "after", monitor=overlaid.address)
    assert in_base(overlaid) == {7}


def in_base(guest: Guest) -> set[int]:
    """The bytes of what was in the base alone, as QEMU reads the guest's disk."""
    before = len(guest.log)
    guest.qmp.hmp('qemu-io hd0 "read -v 4M 512"')
    dump = until("qemu-io's dump", lambda: guest.log[before:] if "512/512" in guest.log[before:] else None)
    rows = re.findall(r"^[0-9a-f]{8}: +((?:[0-9a-f]{2} )+)", dump, re.MULTILINE)
    return {int(byte, 16) for row in rows for byte in row.split()}
