"""The cases of QEMU's own tests for internal snapshots, written anew as tests of qsnap.

| QEMU's test | case | here |
|---|---|---|
| 267 | 1 no disk | test_267_refused[no_disk] |
| 267 | 2, 5 raw -drive, unattached and virtio | test_267_refused[drive_raw_none], [drive_raw_virtio] |
| 267 | 3, 4, 6 qcow2 -drive: unattached, virtio-blk, if=virtio | test_267_saved[drive_none], [..device], [..virtio] |
| 267 | 7 protocol node alone | test_267_refused[blockdev_file] |
| 267 | 8, 9, 10 qcow2; raw over it; copy-on-read over it | test_267_saved[blockdev_qcow2], [..raw], [..copy_on_read] |
| 267 | 11, 12 backing nodes are not counted | test_267_saved[backing_file], [backing_qcow2], test_267_12 |
| 267 | 13 an exported backing node is counted | test_267_13 |
| 068 | 1, 2 save, quit, load twice; with an iothread | test_068 |
| 286 | a tag of 52 characters in qemu-img's list | test_286 |
| 007 | ten saves in ten processes | test_007 |
| qcow2-internal-snapshots | a to d: patterns after loads, snapshots and deletes | test_qcow2_internal_snapshots |
| qcow2-internal-snapshots | e load of a missing tag | test_qcow2_internal_snapshots_missing |
| qcow2-internal-snapshots | f -incoming defer | test_qcow2_internal_snapshots_incoming |
| qcow2-internal-snapshots | g -loadvm with -incoming | QEMU's command line; nothing of qsnap's |
| internal-snapshots-qapi | 1, 6 one disk, two disks | test_qapi_save_load_delete |
| internal-snapshots-qapi | 2 no device | test_267_refused[no_disk] |
| internal-snapshots-qapi | 3 unknown node; 4 vmstate not among the devices; 5 protocol node | test_qapi_vmstate |
| internal-snapshots-qapi | 7 a raw disk among the devices; 8 left out | test_qapi_raw |
| internal-snapshots-qapi | 9 loaded without a device that was there | test_qapi_device_gone |
| internal-snapshots-qapi | 10 saved twice; 11, 12 load and delete of a missing tag | test_qapi_twice_and_missing |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.disks import attached, disk
from support.guest import (
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    blockdev,
    cli,
    make_disk,
    needs_snapshot_jobs,
    qemu_img,
    tags,
    until,
)

Topology = Callable[[Path], list[str]]


def no_disk(d: Path) -> list[str]:
    return []


def drive_raw_none(d: Path) -> list[str]:
    return ["-drive", f"driver=file,file={make_disk(d / 'a', '1M', 'raw')},if=none"]


def drive_raw_virtio(d: Path) -> list[str]:
    return ["-drive", f"driver=file,file={make_disk(d / 'a', '1M', 'raw')},if=virtio"]


def blockdev_file(d: Path) -> list[str]:
    return ["-blockdev", f"driver=file,filename={make_disk(d / 'a', '1M', 'raw')},node-name=file"]


def drive_none(d: Path) -> list[str]:
    return ["-drive", f"driver=qcow2,file={make_disk(d / 'a')},if=none"]


def drive_device(d: Path) -> list[str]:
    return ["-drive", f"driver=qcow2,file={make_disk(d / 'a')},if=none,id=none0", *attached("none0")]


def drive_virtio(d: Path) -> list[str]:
    return ["-drive", f"driver=qcow2,file={make_disk(d / 'a')},if=virtio"]


def blockdev_qcow2(d: Path) -> list[str]:
    return ["-blockdev", f"driver=file,filename={make_disk(d / 'a')},node-name=file",
            "-blockdev", "driver=qcow2,file=file,node-name=fmt"]  # fmt: skip


def blockdev_raw(d: Path) -> list[str]:
    return [*blockdev_qcow2(d), "-blockdev", "driver=raw,file=fmt,node-name=raw"]


def blockdev_copy_on_read(d: Path) -> list[str]:
    return [*blockdev_qcow2(d), "-blockdev", "driver=copy-on-read,file=fmt,node-name=filter"]


def backing_file(d: Path) -> list[str]:
    make_disk(d / "base", "1M", "raw")
    qemu_img("create", "-q", "-f", "qcow2", "-b", d / "base", "-F", "raw", d / "a")
    return ["-blockdev", f"driver=file,filename={d / 'base'},node-name=backing-file",
            *blockdev("fmt", d / "a", "qcow2", "backing=backing-file")]  # fmt: skip


def backing_qcow2(d: Path) -> list[str]:
    make_disk(d / "base", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", d / "base", "-F", "qcow2", d / "a")
    return [*blockdev("backing-fmt", d / "base"), *blockdev("fmt", d / "a", "qcow2", "backing=backing-fmt")]


@pytest.mark.parametrize("topology", [no_disk, drive_raw_none, drive_raw_virtio, blockdev_file])
def test_267_refused(topology: Topology, launch: Launch, tmp_path: Path) -> None:
    guest = launch(*topology(tmp_path), memory="16")
    run = cli("save", "snap0", monitor=guest.address, expect=6)
    if topology is no_disk:
        assert "no block device can store vmstate for snapshot" in run.err
        assert "no block device can store vmstate" in cli("save", "t", monitor=guest.hmp_address, expect=6).err
    else:
        assert "is writable but does not support snapshots" in run.err
    cli("load", "snap0", monitor=guest.address, expect=7)
    assert cli("list", "--json", monitor=guest.address).json["snapshots"] == []
    assert guest.runstate == "running"


@pytest.mark.parametrize(
    "topology",
    [drive_none, drive_device, drive_virtio, blockdev_qcow2, blockdev_raw, blockdev_copy_on_read, backing_file,
     backing_qcow2],
)  # fmt: skip
def test_267_saved(topology: Topology, launch: Launch, tmp_path: Path) -> None:
    guest = launch(*topology(tmp_path), memory="16")
    cli("save", "snap0", monitor=guest.address)
    assert [s["tag"] for s in cli("list", "--json", monitor=guest.address).json["snapshots"]] == ["snap0"]
    if topology in (blockdev_raw, blockdev_copy_on_read) and not HAS_SNAPSHOT_JOBS:
        guest.qmp("query-status")
        guest.qmp.events.clear()
        assert "the guest would hang" in cli("load", "snap0", monitor=guest.address, expect=5).err
        guest.qmp("query-status")
        assert guest.qmp.events == []
    else:
        cli("load", "snap0", monitor=guest.address)
    assert guest.runstate == "running"
    assert tags(tmp_path / "a") == ["snap0"]


def test_267_12(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*backing_qcow2(tmp_path), memory="16")
    cli("save", "snap0", monitor=guest.address)
    assert (tags(tmp_path / "a"), tags(tmp_path / "base")) == (["snap0"], [])


def test_267_13(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*backing_qcow2(tmp_path), memory="16")
    guest.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": f"{guest.directory}/nbd"}})
    guest.qmp("block-export-add", id="e", type="nbd", node_name="backing-fmt", writable=True)
    cli("save", "snap0", monitor=guest.address)
    assert (tags(tmp_path / "a"), tags(tmp_path / "base")) == (["snap0"], ["snap0"])
    cli("load", "snap0", monitor=guest.address)
    cli("delete", "snap0", monitor=guest.address)
    assert (tags(tmp_path / "a"), tags(tmp_path / "base")) == ([], [])


@pytest.mark.parametrize("iothread", [False, True])
def test_068(launch: Launch, tmp_path: Path, iothread: bool) -> None:
    args = [
        *(["-object", "iothread,id=iothread0"] if iothread else []),
        "-device", "virtio-scsi" + (",iothread=iothread0" if iothread else ""),
        *blockdev("a", make_disk(tmp_path / "a", "128K")), "-device", "scsi-hd,drive=a",
    ]  # fmt: skip
    first = launch(*args, memory="16")
    cli("save", "0", monitor=first.address)
    first.quit()
    second = launch("-S", *args, memory="16")
    for _ in range(2):
        cli("load", "0", monitor=second.address)
        assert second.runstate in ("prelaunch", "paused")
    cli("load", "0", "--running", monitor=second.address)
    assert second.runstate == "running"


def test_286(launch: Launch, tmp_path: Path) -> None:
    tag = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    guest = launch(*disk(tmp_path, "a"), memory="512")
    cli("save", tag, monitor=guest.address)
    rows = [line for line in qemu_img("snapshot", "-U", "-l", tmp_path / "a").splitlines() if tag in line]
    assert len(rows) == 1
    assert rows[0].split()[1] == tag
    assert [s["tag"] for s in cli("list", "--json", monitor=guest.address).json["snapshots"]] == [tag]


def test_007(launch: Launch, tmp_path: Path) -> None:
    args = disk(tmp_path, "a")
    for number in range(10):
        guest = launch(*args, memory="16")
        cli("save", f"test-{number}", monitor=guest.address)
        guest.quit()
        qemu_img("check", tmp_path / "a")
    assert tags(tmp_path / "a") == [f"test-{number}" for number in range(10)]


def qemu_io(guest: Guest, node: str, command: str) -> None:
    """HMP's qemu-io prints its verdict to QEMU's own output."""
    seen = len(guest.log)
    answer = guest.qmp.hmp(f'qemu-io {node} "{command}"')
    assert "Error" not in answer, answer
    verdict = until("qemu-io's verdict", lambda: guest.log[seen:] if " ops; " in guest.log[seen:] else None)
    assert "failed" not in verdict, verdict


def test_qcow2_internal_snapshots(launch: Launch, tmp_path: Path) -> None:
    args = [
        "-object", "iothread,id=io", "-device", "virtio-scsi,iothread=io",
        *blockdev("disk0", make_disk(tmp_path / "a", "64M")), "-device", "scsi-hd,drive=disk0,share-rw=on",
    ]  # fmt: skip
    a = launch(*args, memory="16")
    qemu_io(a, "disk0", "write -P 0x11 0 1M")
    cli("save", "snap0", monitor=a.address)
    qemu_io(a, "disk0", "write -P 0x22 0 1M")
    a.quit()
    b = launch("-S", *args, memory="16")
    cli("load", "snap0", monitor=b.address)
    qemu_io(b, "disk0", "read -P 0x11 0 1M")
    qemu_io(b, "disk0", "write -P 0x22 0 512k")
    cli("load", "snap0", monitor=b.address)
    qemu_io(b, "disk0", "read -P 0x11 0 1M")
    qemu_io(b, "disk0", "write -P 0x33 512k 512k")
    cli("save", "snap1", monitor=b.address)
    qemu_io(b, "disk0", "read -P 0x11 0 512k")
    qemu_io(b, "disk0", "read -P 0x33 512k 512k")
    assert tags(tmp_path / "a") == ["snap0", "snap1"]
    cli("delete", "snap1", monitor=b.address)
    qemu_io(b, "disk0", "read -P 0x33 512k 512k")
    assert tags(tmp_path / "a") == ["snap0"]
    b.quit()
    qemu_img("check", tmp_path / "a")


def test_qcow2_internal_snapshots_missing(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "a"), memory="16")
    cli("save", "snap0", monitor=guest.address)
    cli("load", "snap1", monitor=guest.address, expect=7)
    assert guest.runstate == "running"


def test_qcow2_internal_snapshots_incoming(launch: Launch, tmp_path: Path) -> None:
    args = disk(tmp_path, "a")
    first = launch(*args, memory="16")
    cli("save", "snap0", monitor=first.address)
    first.quit()
    guest = launch(*args, "-incoming", "defer", memory="16")
    cli("save", "snap1", monitor=guest.address, expect=6)
    run = cli("load", "snap0", monitor=guest.address, expect=None)
    assert run.code in (6, 7), run.err  # before 10.0 the inactive image shows its snapshots
    assert cli("delete", "snap0", monitor=guest.address, expect=None).code != 20
    assert guest.runstate == "inmigrate"


@pytest.mark.parametrize("disks", [1, 2])
def test_qapi_save_load_delete(launch: Launch, tmp_path: Path, disks: int) -> None:
    images = [tmp_path / f"d{number}" for number in range(disks)]
    args = [arg for number in range(disks) for arg in disk(tmp_path, f"d{number}")]
    guest = launch(*args, memory="16")
    assert cli("save", "snap0", "--json", monitor=guest.address).json["devices"] == [f"d{n}" for n in range(disks)]
    assert all(tags(image) == ["snap0"] for image in images)
    cli("load", "snap0", monitor=guest.address)
    cli("delete", "snap0", monitor=guest.address)
    assert all(tags(image) == [] for image in images)
    assert guest.jobs() == []


@needs_snapshot_jobs
def test_qapi_vmstate(launch: Launch, tmp_path: Path) -> None:
    guest = launch(
        "-blockdev", f"driver=file,filename={make_disk(tmp_path / 'a')},node-name=disk0",
        "-blockdev", "driver=qcow2,file=disk0,node-name=diskfmt0", *disk(tmp_path, "other"), memory="16",
    )  # fmt: skip
    unknown = cli("save", "snap0", "--vmstate", "diskfmt1729", monitor=guest.address, expect=6)
    assert "vmstate block device 'diskfmt1729' does not exist" in unknown.err
    left_out = cli("save", "snap0", "--vmstate", "diskfmt0", "--exclude", "diskfmt0", monitor=guest.address, expect=6)
    assert "cannot hold the VM state" in left_out.err
    protocol = cli("save", "snap0", "--vmstate", "disk0", monitor=guest.address, expect=6)
    assert "cannot hold the VM state" in protocol.err
    assert guest.runstate == "running"


def test_qapi_raw(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "d0"), *disk(tmp_path, "d1"), *disk(tmp_path, "d2", "raw"), memory="16")
    assert "'d2'" in cli("save", "snap0", monitor=guest.address, expect=6).err
    if not HAS_SNAPSHOT_JOBS:
        assert "--exclude" in cli("save", "snap0", "--exclude", "d2", monitor=guest.address, expect=5).err
        assert tags(tmp_path / "d0") == tags(tmp_path / "d1") == []
        return
    cli("save", "snap0", "--exclude", "d2", monitor=guest.address)
    cli("load", "snap0", "--exclude", "d2", monitor=guest.address)
    cli("delete", "snap0", monitor=guest.address)
    assert tags(tmp_path / "d0") == tags(tmp_path / "d1") == []


def test_qapi_device_gone(launch: Launch, tmp_path: Path) -> None:
    args = disk(tmp_path, "a")
    first = launch(*args, "-device", "virtio-rng", memory="16")
    cli("save", "snap0", monitor=first.address)
    first.quit()
    second = launch(*args, memory="16")
    assert "virtio-rng of PCI address" in cli("load", "snap0", monitor=second.address, expect=6).err
    run = cli("load", "snap0", "--force", monitor=second.address, expect=20)
    assert "Do not `cont` it" in run.err
    assert second.runstate != "running"
    assert second.jobs() == []


def test_qapi_twice_and_missing(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*disk(tmp_path, "a"), memory="16")
    cli("save", "snap0", monitor=guest.address)
    cli("save", "snap0", "--no-replace", monitor=guest.address, expect=8)
    cli("delete", "snap0", monitor=guest.address)
    cli("save", "snap0", "--no-replace", monitor=guest.address)
    cli("load", "snap1", monitor=guest.address, expect=7)
    cli("delete", "snap1", monitor=guest.address, expect=7)
    assert tags(tmp_path / "a") == ["snap0"]
    assert guest.runstate == "running"
