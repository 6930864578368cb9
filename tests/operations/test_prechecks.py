"""The pre-checks: each finding by a real cause, and the guest is not touched by any of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qsnap
from support.disks import disk
from support.guest import (
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    blockdev,
    both_monitors,
    cli,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    qemu_img,
    qemu_version,
    tags,
    until,
)
from support.proxy import Intercept, deed
from support.reports import findings


def assert_beyond(guest: Guest, option: str, node: str) -> None:
    """Without snapshot jobs QEMU chooses the devices: the option is refused by check and save, and nothing is done."""
    guest.qmp("query-status")
    guest.qmp.events.clear()
    for verb in (["check"], ["save", "t"]):
        error = cli(*verb, option, node, "--json", monitor=guest.address, expect=5).error
        assert error["error"] == "NotSupported"
        assert option in error["message"]
    guest.qmp("query-status")
    assert guest.qmp.events == []
    assert cli("list", "--json", monitor=guest.address).json["snapshots"] == []


def test_all_findings_at_once(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "a"), *disk(tmp_path, "r1", "raw"), *disk(tmp_path, "r2", "raw"), memory="16")
    guest.qmp("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
    report = cli("check", "--json", monitor=guest.address, expect=6).json
    assert [(f["code"], f["node"]) for f in report["findings"]] == [
        ("migration-capability", None),
        ("device-cannot-snapshot", "r1"),
        ("device-cannot-snapshot", "r2"),
    ]
    assert all(finding["cure"] for finding in report["findings"])
    text = cli("check", monitor=guest.address, expect=6).out
    assert "Device 'r1' is writable but does not support snapshots" in text
    assert ("--exclude r1" in text) == HAS_SNAPSHOT_JOBS, "a cure is named where it works"
    assert "qemu-img convert" in text


@needs_snapshot_jobs
def test_excluding_them_knowingly(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "a"), *disk(tmp_path, "r1", "raw"), *disk(tmp_path, "r2", "raw"), memory="16")
    run = cli("save", "t", "--exclude", "r1", "--exclude", "r2", monitor=guest.address)
    assert "NOT WHOLE: without r1, r2" in run.out
    result = cli("save", "t", "--exclude", "r1", "--exclude", "r2", "--json", monitor=guest.address).json
    assert (result["kind"], result["excluded"], result["devices"]) == ("partial", ["r1", "r2"], ["a"])
    (listed,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert (listed["kind"], listed["missing"]) == ("partial", ["r1", "r2"])
    assert "--exclude r1 --exclude r2" in cli("load", "t", monitor=guest.address, expect=6).err
    assert cli("load", "t", "--exclude", "r1", "--exclude", "r2", monitor=guest.address)


@needs_snapshot_jobs
def test_the_guest_notices_a_disk_that_was_not_put_back(launch: Launch, tmp_path: Path) -> None:
    """The negative control: without it, "bad=0" would prove nothing."""
    raw = make_disk(tmp_path / "raw", "8M", "raw")
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a")),
        "-device",
        "virtio-blk,drive=a",
        *blockdev("raw", raw, "raw"),
        "-device",
        "virtio-blk,drive=raw",
    )
    guest.wait_for_ticks()
    cli("save", "t", "--exclude", "raw", monitor=guest.address)
    guest.assert_running()
    guest.wait_for_ticks()
    cli("load", "t", "--exclude", "raw", monitor=guest.address)
    guest.wait_for_ticks(3)
    assert guest.lines()[-1][1] > 0


@needs_snapshot_jobs
def test_exclude_and_vmstate_take_any_name(launch: Launch, tmp_path: Path) -> None:
    guest = launch(
        "-drive", f"file={make_disk(tmp_path / 'a')},format=qcow2,if=none,id=first", "-device",
        "virtio-blk,drive=first,id=dev0",
        "-drive", f"file={make_disk(tmp_path / 'b')},format=qcow2,if=none,id=second", "-device",
        "virtio-blk,drive=second,id=dev1", memory="16",
    )  # fmt: skip
    for name in ("second", "dev1", "/machine/peripheral/dev1/virtio-backend"):
        cli("save", "t", "--vmstate", name, monitor=guest.address)
        assert tags(tmp_path / "b") == ["t"]
        shown = cli("show", "t", "--json", monitor=guest.address).json
        assert shown["vmstate"] == "second"
        result = cli("save", "u", "--exclude", name, "--json", monitor=guest.address).json
        assert result["devices"] == ["first"]


def test_excluding_what_is_not_there(guest: Guest) -> None:
    if not HAS_SNAPSHOT_JOBS:
        assert_beyond(guest, "--exclude", "nope")
        return
    assert "no such block device" in findings(guest, "--exclude", "nope")["exclude-unknown"]["message"]


def test_external_data_file(launch: Launch, tmp_path: Path) -> None:
    make_disk(tmp_path / "a", "1M", "qcow2", "-o", f"data_file={tmp_path / 'data'}")
    guest = launch("-drive", f"if=virtio,format=qcow2,file={tmp_path / 'a'}", memory="16")
    found = findings(guest)
    assert found["device-cannot-snapshot"]["message"].startswith("virtio0: a qcow2 image with an external data file")
    assert "no-vmstate-device" in found


@needs_snapshot_jobs
def test_an_image_below_a_filter_that_cannot_be_snapshotted(launch: Launch, tmp_path: Path) -> None:
    """A load is refused because of what it is, and not because the snapshot lacks it."""
    make_disk(tmp_path / "b", "1M", "qcow2", "-o", "refcount_bits=1")
    filtered = ("-blockdev", "driver=copy-on-read,node-name=top,file=b", "-device", "virtio-blk,drive=top")
    guest = launch(*disk(tmp_path, "a"), *blockdev("b", tmp_path / "b"), *filtered, memory="16")
    cli("save", "t", "--exclude", "top", monitor=guest.address)
    error = cli("load", "t", "--json", monitor=guest.address, expect=6).error
    assert [finding["code"] for finding in error["findings"]] == ["device-cannot-snapshot"]
    cli("load", "t", "--exclude", "top", monitor=guest.address)


def test_one_bit_refcounts(launch: Launch, tmp_path: Path) -> None:
    make_disk(tmp_path / "b", "1M", "qcow2", "-o", "refcount_bits=1")
    guest = launch(*disk(tmp_path, "a"), *blockdev("b", tmp_path / "b"), "-device", "virtio-blk,drive=b", memory="16")
    finding = findings(guest)["device-cannot-snapshot"]
    assert finding["node"] == "b"
    assert "refcount_bits=1" in finding["message"]
    if HAS_SNAPSHOT_JOBS:
        findings(guest, "--exclude", "b", ok=True)
    else:
        assert_beyond(guest, "--exclude", "b")


def test_the_cure_for_both_works(launch: Launch, tmp_path: Path) -> None:
    image = tmp_path / "cured"
    qemu_img("convert", "-O", "qcow2", make_disk(tmp_path / "b", "1M", "qcow2", "-o", "refcount_bits=1"), image)
    guest = launch(*blockdev("b", image), "-device", "virtio-blk,drive=b", memory="16")
    cli("save", "t", monitor=guest.address)
    assert tags(image) == ["t"]


def test_no_device_for_the_vm_state(launch: Launch) -> None:
    assert findings(launch(memory="16"))["no-vmstate-device"]["cure"]


def test_vmstate_unknown_or_unable(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "iso").write_bytes(bytes(1 << 20))
    iso = blockdev("iso", tmp_path / "iso", "raw", "read-only=on")
    guest = launch(*disk(tmp_path, "a"), *iso, "-device", "ide-cd,drive=iso", memory="16")
    if not HAS_SNAPSHOT_JOBS:
        assert_beyond(guest, "--vmstate", "nope")
        assert_beyond(guest, "--vmstate", "iso")
        findings(guest, "--vmstate", "a", ok=True)  # that is QEMU's own choice
        return
    assert "does not exist" in findings(guest, "--vmstate", "nope")["vmstate-unknown"]["message"]
    assert "a" in findings(guest, "--vmstate", "iso")["vmstate-unable"]["cure"]


def test_migration_blocker(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "a"), *blockdev("v", make_disk(tmp_path / "v", "1M", "vpc"), "vpc"), memory="16")
    found = findings(guest)
    assert "device-cannot-snapshot" in found
    if HAS_SNAPSHOT_JOBS:  # before 6.0 QEMU tells of no blocker until it refuses: see the next test
        assert "does not support live migration" in found["migration-blocker"]["message"]


@both_monitors
def test_nvme_without_a_drive(launch: Launch, tmp_path: Path, transport: str) -> None:
    """From 11 on QEMU crashes in a save of it; before, it names it as a blocker. With a drive it can be saved."""
    nodes = [word for name in ("b", "c") for word in blockdev(name, make_disk(tmp_path / name))]
    good = ("-device", "nvme,serial=1,drive=b", *nodes)
    guest = launch(*disk(tmp_path, "a"), *good, "-device", "nvme,serial=2,id=n", "-device", "nvme-ns,drive=c,bus=n",
                   "-device", "nvme,serial=3", memory="16")  # fmt: skip
    if qemu_version() < (11, 0):
        if HAS_SNAPSHOT_JOBS and transport == "qmp":
            assert "nvme" in findings(guest)["migration-blocker"]["message"]
        return
    report = cli("check", "--json", monitor=guest.address, expect=6).json
    assert [finding["code"] for finding in report["findings"]] == ["nvme-without-drive"] * 2
    assert [finding["message"].split()[3] for finding in report["findings"]] == ["n", "device[3]"]
    assert "drive= on the controller" in cli("save", "t", monitor=guest.address, expect=6).err
    assert guest.runstate == "running"
    guest.kill()
    guest = launch(*disk(tmp_path, "a2"), *good, memory="16")
    cli("save", "t", monitor=guest.address)
    assert guest.runstate == "running"


def test_a_blocker_costs_nobody_the_older_snapshot(launch: Launch, tmp_path: Path) -> None:
    """Before 6.0 QEMU tells of it only when it refuses to save: what was to be replaced must be there then."""
    args = disk(tmp_path, "a")
    blocked = launch(*args, "-device", "amd-iommu", memory="16")
    blocked.qmp("blockdev-snapshot-internal-sync", device="a", name="t")
    before = cli("list", "--json", monitor=blocked.address).json
    if HAS_SNAPSHOT_JOBS:
        assert "amd-iommu" in findings(blocked)["migration-blocker"]["message"]
    else:
        findings(blocked, ok=True)
        error = cli("save", "t", "--json", monitor=blocked.address, expect=9).error
        assert "State blocked by non-migratable device 'amd-iommu'" in error["reason"]
        assert "the older snapshot 't' is as it was; the guest is running" in error["message"]
        assert "nothing of it is left; the guest is running" in cli("save", "u", monitor=blocked.address, expect=9).err
    assert blocked.runstate == "running"
    assert cli("list", "--json", monitor=blocked.address).json == before


def test_a_migration_is_running(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "a"), memory="64")
    guest.qmp("migrate-set-parameters", max_bandwidth=4096)
    guest.qmp("migrate", uri="exec:cat > /dev/null")
    until("the migration", lambda: guest.qmp("query-migrate").get("status") == "active" or None)
    assert "active" in findings(guest)["migration-running"]["message"]
    guest.qmp("migrate_cancel")
    until("its end", lambda: guest.qmp("query-migrate").get("status") == "cancelled" or None)
    findings(guest, ok=True)


@pytest.mark.parametrize("capability", ["multifd", "block", "mapped-ram"])
def test_capabilities_that_break_savevm(launch: Launch, tmp_path: Path, capability: str) -> None:
    guest = launch(*disk(tmp_path, "a"), memory="16")
    known = {row["capability"] for row in guest.qmp("query-migrate-capabilities")}
    if capability not in known:
        findings(guest, ok=True)  # a QEMU that does not know it cannot be broken by it
        return
    guest.qmp("migrate-set-capabilities", capabilities=[{"capability": capability, "state": True}])
    assert capability in findings(guest)["migration-capability"]["message"]
    guest.qmp("migrate-set-capabilities", capabilities=[{"capability": capability, "state": False}])
    findings(guest, ok=True)


def test_run_state_inmigrate(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "a"), "-incoming", "defer", memory="16")
    assert "inmigrate" in findings(guest)["runstate"]["message"]


def test_run_state_postmigrate(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "a"), memory="16")
    guest.qmp("migrate", uri="exec:cat > /dev/null")
    until("postmigrate", lambda: guest.runstate == "postmigrate" or None)
    assert "postmigrate" in findings(guest)["runstate"]["message"]


def test_run_state_preconfig(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "a"), "-preconfig", memory="16")
    report = cli("check", "--json", monitor=guest.address, expect=6).json
    assert [finding["code"] for finding in report["findings"]] == ["runstate"]
    for verb in ("save", "load"):
        error = cli(verb, "t", "--json", monitor=guest.address, expect=6).error
        assert [finding["code"] for finding in error["findings"]] == ["runstate"]


@pytest.mark.parametrize("tag", ["", "x" * 256, "é" * 128, "a\nb", "\x1b[31mred", "tab\there", "\x7f", "\u0085"])
def test_bad_tags(guest: Guest, tag: str) -> None:
    error = cli("save", tag, "--json", monitor=guest.address, expect=6).error
    assert [finding["code"] for finding in error["findings"]] == ["bad-tag"]
    assert guest.node_tags("disk0") == []


@pytest.mark.parametrize("tag", ["x" * 255, "a b", '"', "\\", "-dash", "01", "é" * 127, "[red]", "$(true)", "a;b"])
def test_good_tags(guest: Guest, tmp_path: Path, tag: str) -> None:
    separator = ["--"] if tag.startswith("-") else []
    cli("save", *separator, tag, monitor=guest.address)
    assert tags(tmp_path / "disk0.qcow2") == [tag]
    assert cli("list", "--json", monitor=guest.address).json["snapshots"][0]["tag"] == tag
    cli("load", *separator, tag, monitor=guest.address)
    cli("delete", *separator, tag, monitor=guest.address)
    assert tags(tmp_path / "disk0.qcow2") == tags(tmp_path / "disk1.qcow2") == []


def test_temporary_overlay_is_a_warning(launch: Launch, tmp_path: Path) -> None:
    guest = launch("-drive", f"file={make_disk(tmp_path / 'a')},format=qcow2,if=virtio,snapshot=on", memory="16")
    assert "vanish" in findings(guest, ok=True)["temporary-overlay"]["message"]
    assert "warning:" in cli("save", "t", monitor=guest.address).err
    assert tags(tmp_path / "a") == []


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    point = tmp_path / "small"
    point.mkdir()
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", "size=48m,mode=777", "tmpfs", point], check=True)
    yield point
    subprocess.run([*sudo, "umount", "-l", point], check=True)


def test_no_room(launch: Launch, small_file_system: Path) -> None:
    image = make_boot_disk(small_file_system / "a")
    guest = launch(*blockdev("a", image), "-device", "virtio-blk,drive=a", memory="128")
    guest.wait_for_ticks()
    finding = findings(guest)["no-room"]
    assert "--force" in finding["cure"]
    assert ("--vmstate" in finding["cure"]) == HAS_SNAPSHOT_JOBS, "a cure is named where it works"
    # --force tries; it is QEMU then that finds no room, and the guest may be hit by it too (ENOSPC).
    run = cli("save", "t", "--force", "--json", monitor=guest.address, expect=9)
    assert "Error while writing VM state" in run.error["reason"]
    assert "the guest is running. a: no room: " in run.error["message"], "QEMU says only input/output error"
    assert tags(image) == []


def test_little_room_is_a_warning(launch: Launch, small_file_system: Path) -> None:
    image = make_boot_disk(small_file_system / "a")
    guest = launch("-drive", f"file={image},if=virtio,format=qcow2,id=hd0", memory="32")
    guest.wait_for_ticks()
    assert findings(guest, ok=True)["little-room"]["message"].startswith("hd0: "), "its name is the user's"
    cli("save", "t", monitor=guest.address)
    assert tags(image) == ["t"]
    # What a replacement gives back counts as room: 30 MiB would not fit beside the old ones.
    cli("save", "t", monitor=guest.address)
    report = cli("check", "--json", monitor=guest.address, expect=6).json
    assert [finding["code"] for finding in report["findings"]] == ["no-room"]
    assert report["findings"][0]["message"].startswith("hd0: ")


def test_a_disk_only_snapshot_is_not_loaded(guest: Guest) -> None:
    for node in ("disk0", "disk1"):
        guest.qmp("blockdev-snapshot-internal-sync", device=node, name="d")
    (listed,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert (listed["kind"], listed["vmstate"], listed["vm_state_size"]) == ("disk-only", None, 0)
    error = cli("load", "d", "--json", monitor=guest.address, expect=6).error
    assert "disk-only" in [finding["code"] for finding in error["findings"]]
    guest.assert_running()


@needs_snapshot_jobs
def test_the_device_with_the_vm_state_cannot_be_left_out(guest: Guest) -> None:
    guest.qmp.hmp("savevm t")
    guest.qmp.events.clear()
    error = cli("load", "t", "--exclude", "disk0", "--json", monitor=guest.address, expect=6).error
    assert [finding["code"] for finding in error["findings"]] == ["vmstate-excluded"]
    guest.qmp("query-status")
    assert "STOP" not in [event["event"] for event in guest.qmp.events]


def test_a_partial_snapshot_is_not_loaded_by_accident(guest: Guest) -> None:
    cli("save", "t", monitor=guest.address)
    guest.qmp("blockdev-snapshot-delete-internal-sync", device="disk1", name="t")
    (listed,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert (listed["kind"], listed["devices"], listed["missing"]) == ("partial", ["disk0"], ["disk1"])
    run = cli("load", "t", monitor=guest.address, expect=7)
    assert "disk1 lacks it" in run.err
    assert ("--exclude disk1" in run.err) == HAS_SNAPSHOT_JOBS
    guest.assert_running()
    cli("load", "t", "--exclude", "disk1", monitor=guest.address, expect=0 if HAS_SNAPSHOT_JOBS else 5)
    cli("delete", "t", monitor=guest.address)
    assert guest.node_tags("disk0") == []
    guest.qmp("blockdev-snapshot-internal-sync", device="disk0", name="disk only")
    run = cli("load", "disk only", monitor=guest.address, expect=7)
    assert "disk1 lacks it" in run.err
    assert "--exclude" not in run.err, "the rest cannot be loaded either"


@pytest.mark.parametrize("paused", [False, True])
def test_a_snapshot_of_different_moments_is_not_loaded(guest: Guest, paused: bool) -> None:
    """Whether the guest's clock tells that, or, as it stood still, the dates alone."""
    if paused:
        guest.qmp("stop")
    cli("save", "t", monitor=guest.address)
    guest.qmp("blockdev-snapshot-delete-internal-sync", device="disk1", name="t")
    if not paused:
        guest.wait_for_ticks(3)
    guest.qmp("blockdev-snapshot-internal-sync", device="disk1", name="t")
    error = cli("load", "t", "--json", monitor=guest.address, expect=6).error
    assert [finding["code"] for finding in error["findings"]] == ["mixed-snapshot"]
    health = cli("status", "--max-age", "26h", monitor=guest.address, expect=2).out
    assert "no snapshot that can be loaded (1 that cannot be loaded)" in health
    guest.qmp("cont")
    guest.assert_running()


@needs_snapshot_jobs
def test_a_snapshot_that_changes_between_the_check_and_the_stop(guest: Guest, intercept: Intercept) -> None:
    """Another client saves under its tag, and then changes it on one disk: QEMU would load each."""
    cli("save", "t", monitor=guest.address)
    before = guest.wait_for_ticks()

    def save_again(message: dict[str, Any]) -> None:
        if deed(message) == "stop":
            guest.qmp.hmp("savevm t")

    def mix(message: dict[str, Any]) -> None:
        if deed(message) == "stop":
            guest.qmp("blockdev-snapshot-delete-internal-sync", device="disk1", name="t")
            guest.qmp("blockdev-snapshot-internal-sync", device="disk1", name="t")

    for change, code in (save_again, "snapshots-changed"), (mix, "mixed-snapshot"):
        proxy = intercept(guest, on_command=change)
        error = cli("load", "t", "--json", monitor=proxy.address, expect=6).error
        assert [finding["code"] for finding in error["findings"]] == [code]
        proxy.close()
    guest.assert_running()
    assert guest.counter > before


@pytest.mark.parametrize("jobs", [None, False])
async def test_a_tag_that_qemu_img_made_twice(launch: Launch, tmp_path: Path, jobs: bool | None) -> None:
    """By HMP too: savevm would delete one of them."""
    image = make_boot_disk(tmp_path / "a")
    for _ in range(2):
        qemu_img("snapshot", "-c", "t", image)
    guest = launch(*blockdev("a", image), "-device", "virtio-blk,drive=a")
    guest.wait_for_ticks()
    assert tags(image) == ["t", "t"]
    async with qsnap.connect(guest.address, snapshot_jobs=jobs) as vm:
        (listed,) = await vm.list()
        assert listed.problems == ("a holds it 2 times",)
        with pytest.raises(qsnap.errors.PrecheckRefused):
            await vm.load("t")
        assert (await vm.save("t")).replaced
        assert tags(image) == ["t"]
        await vm.load("t")
    guest.assert_running()


@needs_snapshot_jobs
def test_a_tag_that_one_image_holds_twice(guest: Guest) -> None:
    """QEMU's own check looks only for tags that are on all devices (its first match is then the oldest)."""
    for devices in (["disk0"], ["disk0", "disk1"]):
        guest.qmp("snapshot-save", job_id="j", tag="t", vmstate="disk0", devices=devices)
        until("the job", lambda: guest.qmp("query-jobs")[0]["status"] == "concluded" or None)
        assert "error" not in guest.qmp("query-jobs")[0]
        guest.qmp("job-dismiss", id="j")
    assert guest.node_tags("disk0") == ["t", "t"]
    (listed,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert "disk0 holds it 2 times" in listed["problems"]
    cli("load", "t", monitor=guest.address, expect=6)
    cli("save", "t", monitor=guest.address)
    assert (guest.node_tags("disk0"), guest.node_tags("disk1")) == (["t"], ["t"])
    cli("load", "t", monitor=guest.address)
    guest.assert_running()


def test_a_disk_that_cannot_go_back_is_named_with_a_cure_that_works(launch: Launch, tmp_path: Path) -> None:
    """A snapshot from before a raw disk was attached: it can be left as it is, or, without snapshot jobs, unplugged."""
    args = disk(tmp_path, "a")
    first = launch(*args, memory="16")
    cli("save", "t", monitor=first.address)
    first.quit()
    guest = launch(*args, *blockdev("r", make_disk(tmp_path / "r", "1M", "raw"), "raw"), memory="16")
    (finding,) = cli("load", "t", "--json", monitor=guest.address, expect=6).error["findings"]
    assert (finding["code"], finding["node"]) == ("device-cannot-snapshot", "r")
    if HAS_SNAPSHOT_JOBS:
        assert finding["cure"] == "if you want that: --exclude r"
        cli("load", "t", "--exclude", "r", monitor=guest.address)
    else:
        assert finding["cure"] == "if the snapshot was made without it: unplug it"
        guest.qmp("blockdev-del", node_name="r")
        cli("load", "t", monitor=guest.address)
    assert guest.runstate == "running"


def test_nothing_is_deleted_while_a_migration_is_awaited(launch: Launch, tmp_path: Path) -> None:
    """QEMU 5.2 crashes there."""
    image = make_disk(tmp_path / "a")
    qemu_img("snapshot", "-c", "old", image)
    guest = launch(*blockdev("a", image), "-device", "virtio-blk,drive=a", "-incoming", "defer", memory="16")
    assert "inmigrate" in cli("delete", "old", monitor=guest.address, expect=6).err
    assert guest.runstate == "inmigrate"


@needs_snapshot_jobs
def test_names_in_cures_can_be_pasted(launch: Launch, tmp_path: Path) -> None:
    """ "#block123" would begin a comment in a shell."""
    image = make_disk(tmp_path / "r", "1M", "raw")
    guest = launch(*disk(tmp_path, "a"), "-drive", f"file={image},format=raw,if=virtio,id=data", memory="16")
    text = cli("check", monitor=guest.address, expect=6).out
    assert "--exclude data" in text
    cli("save", "t", "--exclude", "data", monitor=guest.address)
    text = cli("load", "t", monitor=guest.address, expect=6).err
    assert "--exclude data" in text
    cli("load", "t", "--exclude", "data", monitor=guest.address)


@needs_snapshot_jobs
def test_a_guest_that_a_killed_qsnap_has_left_paused(guest: Guest) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    guest.qmp("snapshot-delete", job_id=f"qsnap-save-{ended.pid}-1", tag="none", devices=["disk0"])
    until("the job", lambda: guest.qmp("query-jobs")[0]["status"] == "concluded" or None)
    assert cli("check", "--json", monitor=guest.address).json["findings"] == []
    guest.qmp("stop")
    (finding,) = cli("check", "--json", monitor=guest.address).json["findings"]
    assert finding["code"] == "killed-qsnap"
    assert "was killed" in cli("save", "t", monitor=guest.address).err
    assert guest.jobs() == []


@needs_snapshot_jobs
def test_a_blocker_that_has_a_cure(launch: Launch, tmp_path: Path) -> None:
    """It is not "unplug": ivshmem's memory can be part of the VM state, and an image can be converted."""
    memory = ("-object", "memory-backend-memfd,id=mm,size=1M,share=on")
    shared = launch(*disk(tmp_path, "a"), *memory, "-device", "ivshmem-plain,memdev=mm", memory="16")
    assert "master=on" in findings(shared)["migration-blocker"]["cure"]
    shared.kill()
    shared = launch(*disk(tmp_path, "b"), *memory, "-device", "ivshmem-plain,memdev=mm,master=on", memory="16")
    cli("save", "t", monitor=shared.address)
    shared.kill()
    (tmp_path / "files").mkdir()
    fat = ("-blockdev", f"driver=vvfat,node-name=v,dir={tmp_path}/files,rw=on", "-device", "virtio-blk,drive=v,id=fat")
    blocker = findings(launch(*disk(tmp_path, "c"), *fat, memory="16"))["migration-blocker"]
    assert "without rw" in blocker["cure"]
    assert "node 'v'" in blocker["message"], "the user's own name for it stays"


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)
def test_a_tag_that_a_human_monitor_cannot_name(guest: Guest) -> None:
    """It is not said to be missing."""
    for verb in ("load", "save"):
        assert "takes for a key" in cli(verb, "\u00db", monitor=guest.address, expect=5).err
    guest.assert_running()
