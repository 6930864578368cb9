"""An export is a whole of its own: its clones go on from the snapshot, and neither the guest nor the export changes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

import qsnap
import support.guest
from qsnap.errors import PrecheckRefused, VerifyFailed
from qsnap.host import processes
from qsnap.operations.portable.images import QemuImg, Source
from qsnap.operations.portable.manifest import called
from support.disks import firmware
from support.guest import (
    QEMU,
    Guest,
    Launch,
    Qmp,
    blockdev,
    cli,
    disk_device,
    finish,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    qemu_img,
    start_cli,
    tags,
    tool,
    until,
)
from support.killed import assert_all_is_well
from support.portable import booted, manifest, sums

pytestmark = needs_snapshot_jobs


def saved(guest: Guest, tag: str, *options: str) -> tuple[int, int]:
    """The counts between which a snapshot was made."""
    first = guest.wait_for_ticks(1)
    cli("save", tag, *options, monitor=guest.address)
    return first, guest.wait_for_ticks(1)


def exports(directory: Path) -> list[str]:
    """Whole ones and unfinished ones."""
    return [path.name for path in directory.iterdir() if "export" in path.name]


@pytest.mark.parametrize("live", [False, True], ids=["ordinary", "live"])
def test_clones_go_on_where_the_snapshot_left_off(guest: Guest, tmp_path: Path, live: bool) -> None:
    """Several at once, while the guest runs on; the export stays as it was, byte for byte."""
    between = saved(guest, "s", *(["--live"] if live else []))
    export = tmp_path / "export"
    told = cli("export", "s", str(export), "--json", monitor=guest.address).json
    assert (told["tag"], told["directory"], told["disks"]) == ("s", str(export), ["disk0", "disk1"])
    assert export.stat().st_mode & 0o777 == 0o700
    before = sums(export)
    assert {file["name"]: file["sha256"] for file in manifest(export)["files"]}.items() <= before.items()
    with ExitStack() as stack:
        named = stack.enter_context(booted(export, "--work", str(tmp_path / "work")))
        clones = [named, *(stack.enter_context(booted(export)) for _ in range(0 if live else 2))]
        assert len({clone.pid for clone in clones}) == len(clones)
        for clone in clones:
            assert clone.told["runstate"] == "running"
            clone.assert_goes_on_from(*between)
        # It is a guest like any other, under a name of its own
        cli("save", "again", monitor=named.told["monitor"])
        with named.monitor() as qmp:
            assert qmp("query-name") == {"name": "guest@s"}
    assert tags(tmp_path / "work" / "disk0.qcow2") == ["again"]
    assert sums(export) == before
    guest.assert_running()
    counts = [count for count, _ in guest.lines()]
    assert counts == list(range(counts[0], counts[0] + len(counts)))
    assert {bad for _, bad in guest.lines()} == {0}
    assert tags(tmp_path / "disk0.qcow2") == ["s"]


def test_all_kinds_of_drives(launch: Launch, tmp_path: Path) -> None:
    """Each drive of the clone holds what it held at the save: ids that QEMU makes up, an overlay that was made later, a
    medium that was put in later, an empty drive, an image below a filter, firmware, and variables in the state."""
    make_boot_disk(tmp_path / "boot")
    base = make_disk(tmp_path / "base")
    disk = make_disk(tmp_path / "disk", "8M", "qcow2", "-b", str(base), "-F", "qcow2")
    medium = make_disk(tmp_path / "a,b.iso", "1M", "raw")
    medium.write_bytes(b"medium".ljust(1 << 20, b"."))
    guest = launch(
        *firmware(tmp_path), "-drive", f"if=pflash,format=raw,file={make_disk(tmp_path / 'vars', '256k', 'raw')}",
        "-drive", f"if=none,id=first,file={tmp_path / 'boot'},cache=none",
        "-device", "virtio-blk,drive=first,bootindex=0",
        "-drive", f"if=virtio,file={disk}", "-cdrom", str(base),
        "-drive", "if=none,id=empty,media=cdrom",
        "-device", "virtio-scsi-pci", "-device", "scsi-cd,drive=empty,id=tray",
        *blockdev("file", base, "qcow2", "read-only=on"), "-object", "throttle-group,id=slow",
        "-blockdev", "throttle,node-name=filter,throttle-group=slow,file=file,read-only=on",
        "-device", "scsi-cd,drive=filter,id=slowly",
        "-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:0-:22", "-device", "virtio-net,netdev=net",
        "-object", "memory-backend-file,id=ram,size=32M,mem-path=/dev/shm,share=off",
        "-device", "virtio-rng", machine="q35,accel=tcg,memory-backend=ram",
    )  # fmt: skip
    guest.wait_for_ticks()
    guest.qmp("blockdev-change-medium", id="tray", filename=str(medium), format="raw")
    guest.qmp.hmp(f"snapshot_blkdev virtio0 {tmp_path / 'overlay'} qcow2")
    guest.qmp.hmp('qemu-io virtio0 "write -P 0x55 1M 64k"')
    between = saved(guest, "s")
    guest.qmp.hmp('qemu-io virtio0 "write -P 0x77 1M 64k"')
    guest.qmp("block_resize", device="virtio0", size=16 << 20)
    # Renamed since QEMU opened it: the name in the header of what stands on it leads nowhere
    base.rename(tmp_path / "moved")
    run = cli("export", "s", str(tmp_path / "export"), monitor=guest.address)
    (tmp_path / "moved").rename(base)
    assert "gets the medium that is in it now" in run.err
    disks = {one["device"]: tmp_path / "export" / one["file"] for one in manifest(tmp_path / "export")["disks"]}
    assert len(disks) == 7
    assert json.loads(qemu_img("info", "--output=json", disks["filter"]))["virtual-size"] == 8 << 20
    assert "Images are identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", disks["empty"], medium)
    pattern = [tool("qemu-io"), "-r", "-c", "read -P 0x55 1M 64k", "-c", "read -P 0 4M 1M", str(disks["virtio0"])]
    assert "failed" not in subprocess.run(pattern, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "backing" not in qemu_img("info", disks["virtio0"])
    assert "virtual size: 8 MiB" in qemu_img("info", disks["virtio0"])
    with booted(tmp_path / "export") as clone:
        clone.assert_goes_on_from(*between)
        with clone.monitor() as qmp:
            assert "restrict=on" in qmp.hmp("info network")
            inserted = {row["device"]: row.get("inserted", {}).get("ro") for row in qmp("query-block")}
            assert inserted == {"pflash0": True, "pflash1": False, "first": False, "virtio0": False, "ide2-cd0": True,
                                "empty": True, "": True}  # fmt: skip
    # On the image of now that the disk stands on, it is smaller
    cli("export", "s", str(tmp_path / "thin"), "--keep-backing", "-q", monitor=guest.address)
    thin = next(one for one in manifest(tmp_path / "thin")["disks"] if one["device"] == "virtio0")
    assert thin["backing"] == str(disk)
    with booted(tmp_path / "thin", "--paused") as clone:
        assert clone.told["runstate"] == "paused"
    guest.assert_running()


def can_tap() -> bool:
    """Whether a process may make a tap in a network namespace of its own, as QEMU does there."""
    made = ["unshare", "-rn", "sh", "-c", "test -r /dev/net/tun -a -w /dev/net/tun"]
    return subprocess.run(made, capture_output=True, timeout=30).returncode == 0


@pytest.mark.skipif(not can_tap(), reason="this machine lets nobody make a tap")
def test_a_card_on_a_tap(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state has an offload header (vnet_hdr), and is not loaded without one."""
    boot = make_boot_disk(tmp_path / "disk0")
    wrapper = tmp_path / "qemu"
    wrapper.write_text(f'#!/bin/sh\nexec unshare -rn {QEMU} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(support.guest, "QEMU", str(wrapper))
    guest = launch(
        *blockdev("disk0", boot), *disk_device("disk0"),
        "-netdev", "tap,id=net,ifname=t0,script=no,downscript=no", "-device", "virtio-net,netdev=net",
    )  # fmt: skip
    guest.wait_for_ticks()
    between = saved(guest, "s")
    cli("export", "s", str(tmp_path / "export"), monitor=guest.address)
    with booted(tmp_path / "export") as clone:
        clone.assert_goes_on_from(*between, ticks=3)
        devices = Path(f"/proc/{clone.pid}/net/dev").read_text()
        assert re.findall(r"(\w+):", devices) == ["lo", "qsnap0"]


def test_what_is_not_on_the_command_line_is_refused_by_name(launch: Launch, tmp_path: Path) -> None:
    guest = launch(
        *blockdev("disk0", make_boot_disk(tmp_path / "disk0")), *disk_device("disk0"),
        "-device", "qemu-xhci", "-device", "usb-mouse,id=gone", "-device", "usb-kbd",
        "-drive", f"file={make_disk(tmp_path / 'taken')},format=qcow2,index=3",
    )  # fmt: skip
    guest.qmp.hmp("drive_del ide3-hd0")
    guest.qmp.hmp(f"drive_add 0 if=none,id=other,file={make_disk(tmp_path / 'other')},format=qcow2")
    guest.qmp("device_add", driver="usb-tablet", id="added")
    guest.qmp("device_add", driver="usb-mouse")
    guest.qmp("device_del", id="gone")
    file = {"driver": "file", "filename": str(make_disk(tmp_path / "late"))}
    guest.qmp("blockdev-add", driver="qcow2", node_name="late", file=file)
    guest.qmp("device_add", driver="usb-storage", id="stick", drive="late")
    cli("save", "s", monitor=guest.address)
    run = cli("export", "s", str(tmp_path / "export"), "--json", monitor=guest.address, expect=6)
    told = [finding["message"] for finding in run.error["findings"]]
    assert sorted(told) == [
        f"-drive file={tmp_path / 'taken'},format=qcow2,index=3: QEMU does not have that drive any more",
        "a device usb-mouse without an id was plugged in after QEMU was started",
        "device 'added' (usb-tablet) was plugged in after QEMU was started",
        "device 'gone' was unplugged after QEMU was started",
        "device 'stick' (usb-storage) was plugged in after QEMU was started",
        "late: it is not on QEMU's command line, but was added later",
    ]
    assert not (tmp_path / "export").exists()


@pytest.mark.no_qemu
def test_how_an_emulator_is_called() -> None:
    loader = ["ld.so", "--library-path", "/l", "/t/qemu"]
    assert [*called([*loader, "-L", "/s", "-L", "/t"])] == [*called(loader)] == loader
    assert [*called([])] == ["qemu-system-x86_64"]


def damage(state: Path) -> None:
    with state.open("r+b") as file:
        file.seek(4 << 20)
        file.write(b"\xff" * 5000)  # the header of at least one page


def delete(guest: Guest) -> None:
    guest.qmp.hmp("delvm s")


async def test_refusals_before_anything_is_made(guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("save", "s", monitor=guest.address)
    there = tmp_path / "there"
    there.mkdir()
    assert "exists" in cli("export", "s", str(there), monitor=guest.address, expect=6).err
    assert "cannot be used" in cli("export", "s", str(tmp_path / "no" / "x"), monitor=guest.address, expect=6).err
    cli("export", "none", str(tmp_path / "export"), monitor=guest.address, expect=7)
    cli("save", "part", "--exclude", "disk1", monitor=guest.address)
    assert "disk1 lacks it" in cli("export", "part", str(tmp_path / "export"), monitor=guest.address, expect=7).err
    state = Path(cli("save", "live", "--live", "--json", monitor=guest.address).json["file"]["path"])
    damage(state)
    assert (
        "it is damaged, at byte" in cli("export", "live", str(tmp_path / "export"), monitor=guest.address, expect=6).err
    )
    async with qsnap.connect(guest.address) as vm:
        with monkeypatch.context() as patch, pytest.raises(PrecheckRefused, match="no room: the export takes up to"):
            patch.setattr(processes, "free_bytes", lambda _: (1 << 20, 1 << 20))
            await vm.export("s", tmp_path / "export")
        with pytest.raises(VerifyFailed, match="another client has changed it during the export"):
            await vm.export("s", tmp_path / "export", watch=lambda _: delete(guest))
    assert exports(tmp_path) == []
    assert exports(there) == []
    guest.assert_running()


def test_an_export_that_is_cut_short_leaves_nothing_under_its_name(
    guest: Guest, tmp_path: Path, runtime_directory: Path
) -> None:
    cli("save", "s", monitor=guest.address)
    export, part = tmp_path / "export", tmp_path / ".export.qsnap-part"
    for signum, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = start_cli("export", "s", str(export), monitor=guest.address)
        until("the export to begin", (part / "state").exists)
        process.send_signal(signum)
        assert finish(process).code == code
        assert not export.exists()
        assert part.exists() is (signum == signal.SIGKILL)
        assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": ["s"]})
    cli("export", "s", str(export), monitor=guest.address)
    assert not part.exists()


def connected(path: Path) -> Qmp | None:
    try:
        return Qmp(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None


def test_it_is_started_by_hand(guest: Guest, tmp_path: Path) -> None:
    """By the script alone, wherever the directory has been moved to. And what is damaged does not start by qsnap:
    nothing is left of a clone that does not come up, and QEMU's own words are quoted."""
    between = saved(guest, "s")
    cli("export", "s", str(tmp_path / "export"), monitor=guest.address)
    export = tmp_path / "it's elsewhere"
    (tmp_path / "export").rename(export)
    work = guest.directory / "by-hand"
    process = subprocess.Popen(
        [export / "start.sh", work, "-nodefaults"], env={**os.environ, "QEMU": QEMU, "QEMU_IMG": tool("qemu-img")},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        qmp = until("the monitor", lambda: connected(work / "qmp"))
        until("the state to be loaded", lambda: qmp("query-status")["status"] != "inmigrate")
        qmp("cont")
        qmp.close()
        log = work / "serial0.log"
        until("ticks", lambda: (log.exists() and log.read_text().count("bad=0000") > 12) or None)
        first = int(log.read_text().partition("c=")[2][:8], 16)
        assert between[0] <= first <= between[1] + 2
    finally:
        process.kill()
        process.wait(30)
    never = tmp_path / "never"
    assert "is not an export" in cli("boot", str(tmp_path), "--work", str(never), expect=1).err
    state = bytearray((export / "state").read_bytes())
    state[len(state) // 2] ^= 1
    (export / "state").write_bytes(state)
    assert "state has another checksum" in cli("boot", str(export), "--work", str(never), expect=1).err
    (export / "state").write_bytes(state[: len(state) // 2])
    assert "state has " in cli("boot", str(export), "--no-check", "--work", str(never), expect=1).err
    document = manifest(export)
    (export / "manifest.json").write_text(json.dumps({**document, "disks": [{"file": "../x", "device": "d"}]}))
    assert "names a disk that no export has" in cli("boot", str(export), "--work", str(never), expect=1).err
    (export / "manifest.json").write_text(json.dumps({**document, "emulator": ["/bin/sh"], "files": []}))
    env = {"QSNAP_QEMU": ""}  # click: as if there was none
    assert "is not a QEMU" in cli("boot", str(export), "--work", str(never), expect=1, env=env).err
    document["files"][0]["size"] = len(state) // 2
    (export / "manifest.json").write_text(json.dumps(document))
    run = cli("boot", str(export), "--no-check", "--work", str(never), expect=1)
    assert "QEMU did not load the export; its log: " in run.err
    assert "load of migration failed" in run.err
    assert not never.exists()


async def test_a_copy_that_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program does not go on."""
    program = tmp_path / "qemu-img"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    copying = asyncio.create_task(QemuImg(["qemu"]).copy(Source({}), tmp_path / "copy", lambda _: None))
    async with asyncio.timeout(30):
        while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
            await asyncio.sleep(0.01)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
    assert not Path(f"/proc/{int(pid)}").exists()  # noqa: ASYNC240 (at once)
