"""qsnap's verdicts against QEMU's own: HMP savevm is asked about the same guest, and must agree.

It refuses where qsnap refuses, names the device that qsnap names first, and puts the VM state where qsnap
would. (A raw variable store is the one case in which they differ on purpose: see test_pflash.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qsnap
from qsnap.model.checks import CheckReport, Role, Verdict
from support.disks import attached, disk
from support.guest import Guest, Launch, blockdev, make_disk, needs_snapshot_jobs, qemu_img

Topology = Callable[[Path], list[str]]


def none(d: Path) -> list[str]:
    return []


def qcow2(d: Path) -> list[str]:
    return disk(d, "a")


def raw(d: Path) -> list[str]:
    return disk(d, "a", "raw")


def qcow2_and_raw(d: Path) -> list[str]:
    return [*disk(d, "a"), *disk(d, "b", "raw")]


def drive_raw(d: Path) -> list[str]:
    return ["-drive", f"file={make_disk(d / 'a', '1M', 'raw')},format=raw,if=virtio"]


def drive_unattached_raw(d: Path) -> list[str]:
    return [*disk(d, "a"), "-drive", f"file={make_disk(d / 'b', '1M', 'raw')},format=raw,if=none,id=spare"]


def drive_unattached_qcow2(d: Path) -> list[str]:
    return ["-drive", f"file={make_disk(d / 'b')},format=qcow2,if=none,id=spare", *disk(d, "a")]


def node_unattached_qcow2(d: Path) -> list[str]:
    return [*blockdev("spare", make_disk(d / "spare")), *disk(d, "a")]


def node_unattached_raw(d: Path) -> list[str]:
    return [*disk(d, "a"), *blockdev("spare", make_disk(d / "spare", "1M", "raw"), "raw")]


def node_unattached_file(d: Path) -> list[str]:
    make_disk(d / "spare", "1M", "raw")
    return [*disk(d, "a"), "-blockdev", f"driver=file,node-name=spare,filename={d / 'spare'}"]


def devices_in_other_order(d: Path) -> list[str]:
    return [*blockdev("a", make_disk(d / "a")), *blockdev("b", make_disk(d / "b")), *attached("b"), *attached("a")]


def drive_after_blockdev(d: Path) -> list[str]:
    return [*disk(d, "a"), "-drive", f"file={make_disk(d / 'b')},format=qcow2,if=virtio"]


def throttle_over_raw(d: Path) -> list[str]:
    return ["-object", "throttle-group,id=tg", *blockdev("fmt", make_disk(d / "a", "1M", "raw"), "raw"),
            "-blockdev", "driver=throttle,node-name=top,throttle-group=tg,file=fmt", *attached("top")]  # fmt: skip


def filters_over_qcow2(d: Path) -> list[str]:
    return [*blockdev("fmt", make_disk(d / "a")), "-blockdev", "driver=copy-on-read,node-name=cor,file=fmt",
            "-blockdev", "driver=raw,node-name=top,file=cor,offset=65536,size=65536", *attached("top")]  # fmt: skip


def quorum(d: Path) -> list[str]:
    return [*blockdev("x", make_disk(d / "x")), *blockdev("y", make_disk(d / "y")),
            "-blockdev", "driver=quorum,node-name=top,vote-threshold=2,children.0=x,children.1=y",
            *attached("top")]  # fmt: skip


def blkverify(d: Path) -> list[str]:
    return [*blockdev("x", make_disk(d / "x")), *blockdev("y", make_disk(d / "y")),
            "-blockdev", "driver=blkverify,node-name=top,raw=x,test=y", *attached("top")]  # fmt: skip


def vmdk(d: Path) -> list[str]:
    return [*disk(d, "a"), *disk(d, "b", "vmdk")]


def vdi_first(d: Path) -> list[str]:
    return [*disk(d, "b", "vdi"), *disk(d, "a")]


def read_only_first(d: Path) -> list[str]:
    make_disk(d / "ro")
    return ["-device", "virtio-scsi", *blockdev("ro", d / "ro", "qcow2", "read-only=on"),
            "-device", "scsi-hd,drive=ro", *disk(d, "a")]  # fmt: skip


def cdroms(d: Path) -> list[str]:
    (d / "iso").write_bytes(bytes(1 << 20))
    return ["-device", "ide-cd,bus=ide.0", *blockdev("iso", d / "iso", "raw", "read-only=on"),
            "-device", "ide-cd,drive=iso,bus=ide.1", *disk(d, "a")]  # fmt: skip


def backing_chain(d: Path) -> list[str]:
    make_disk(d / "base")
    qemu_img("create", "-q", "-f", "qcow2", "-b", d / "base", "-F", "qcow2", d / "a")
    return [*blockdev("base", d / "base"), *blockdev("a", d / "a", "qcow2", "backing=base"), *attached("a")]


def pflash_qcow2_first(d: Path) -> list[str]:
    from support.disks import firmware

    return [*firmware(d), "-drive", f"if=pflash,format=qcow2,file={make_disk(d / 'vars', '256k')}", *disk(d, "a")]


def snapshot_on(d: Path) -> list[str]:
    return ["-drive", f"file={make_disk(d / 'a')},format=qcow2,if=virtio,snapshot=on"]


TOPOLOGIES: list[Topology] = [
    none, qcow2, raw, qcow2_and_raw, drive_raw, drive_unattached_raw, drive_unattached_qcow2, node_unattached_qcow2,
    node_unattached_raw, node_unattached_file, devices_in_other_order, drive_after_blockdev, throttle_over_raw,
    filters_over_qcow2, quorum, blkverify, vmdk, vdi_first, read_only_first, cdroms, backing_chain,
    pflash_qcow2_first, snapshot_on,
]  # fmt: skip


def checked(guest: Guest, address: str | None = None) -> CheckReport:
    async def ask() -> CheckReport:
        async with qsnap.connect(address or guest.address) as vm:
            return await vm.check()

    return asyncio.run(ask())


def assert_agreement(guest: Guest) -> None:
    report = checked(guest)
    answer = guest.qmp.hmp("savevm witness")
    assert report.ok == (answer == ""), (answer, report.findings)
    if answer.startswith("Error: Device '"):
        refused = next(device for device in report.devices if device.verdict is Verdict.REFUSED)
        assert answer.split("'")[1] in (refused.device, refused.node)
    elif report.ok:
        nodes: list[dict[str, Any]] = guest.qmp("query-named-block-nodes", flat=True)
        rows = {n["node-name"]: s for n in nodes for s in n["image"].get("snapshots", []) if s["name"] == "witness"}
        # QEMU 10.0 alone leaves out what nobody uses.
        assert {d.image for d in report.devices if d.verdict is Verdict.SAVED and d.role is not Role.NODE} <= set(rows)
        assert rows[report.vmstate or ""]["vm-state-size"] > 0


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda topology: topology.__name__)
def test_qemu_agrees(topology: Topology, launch: Launch, tmp_path: Path) -> None:
    """And so does what a human monitor shows of it, where names alone tell what lies below what."""
    guest = launch("-S", *topology(tmp_path), memory="16")
    report, by_names = checked(guest), checked(guest, guest.hmp_address)
    assert by_names.ok == report.ok
    if report.ok:
        assert (by_names.saved, by_names.vmstate) == (report.saved, report.vmstate)
    assert_agreement(guest)


def test_qemu_agrees_on_an_exported_backing_file(launch: Launch, tmp_path: Path) -> None:
    args = backing_chain(tmp_path)
    guest = launch("-S", *args[: args.index("-device")], memory="16")  # a disk in use keeps its backing file to itself
    guest.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": f"{guest.directory}/nbd"}})
    guest.qmp("block-export-add", id="e", type="nbd", node_name="base", writable=True)
    report = checked(guest)
    assert set(report.saved) == {"a", "base"}
    assert_agreement(guest)


@needs_snapshot_jobs
def test_qemu_agrees_during_a_mirror_job(launch: Launch, tmp_path: Path) -> None:
    target = blockdev("target", make_disk(tmp_path / "t", "1M"))
    guest = launch("-S", *qcow2(tmp_path), *target, memory="16")
    guest.qmp("blockdev-mirror", job_id="m", device="a", target="target", sync="full")
    assert_agreement(guest)


def test_a_filter_is_saved_in_its_image(launch: Launch, tmp_path: Path) -> None:
    report = checked(launch("-S", *filters_over_qcow2(tmp_path), memory="16"))
    assert report.saved == ("fmt",)
    assert report.vmstate == "fmt"
    assert [(d.node, d.image) for d in report.devices] == [("top", "fmt")]


def test_a_node_with_two_devices_is_judged_once(launch: Launch, tmp_path: Path) -> None:
    device = ["-device", "virtio-blk,drive=a,share-rw=on"]
    guest = launch("-S", *blockdev("a", make_disk(tmp_path / "a")), *device, *device, memory="16")
    assert [found.node for found in checked(guest).devices] == ["a"]
    assert_agreement(guest)


def test_an_image_with_two_users_is_saved_once(launch: Launch, tmp_path: Path) -> None:
    guest = launch(
        "-S", *blockdev("fmt", make_disk(tmp_path / "a")),
        "-blockdev", "driver=throttle,node-name=top,throttle-group=tg,file=fmt", "-object", "throttle-group,id=tg",
        *attached("top"), memory="16",
    )  # fmt: skip
    guest.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": f"{guest.directory}/nbd"}})
    guest.qmp("block-export-add", id="e", type="nbd", node_name="fmt")
    assert checked(guest).saved == ("fmt",)
