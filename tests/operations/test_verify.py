"""Verify: whole snapshots are told to be whole, damage of each kind is found, and the guest runs on meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qsnap
from qsnap.inventory import qcow2
from qsnap.inventory.clusters import StoredSnapshot
from qsnap.inventory.qcow2 import Unreadable
from qsnap.inventory.state_file import STREAM_OFFSET
from qsnap.inventory.vm_state import of_snapshot
from qsnap.operations import verify
from support.guest import (
    Guest,
    Launch,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
)
from support.proxy import Intercept

CLUSTER = 65536


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    return {name: make_boot_disk(tmp_path / name) for name in ("a", "b")}


@pytest.fixture
def guest(launch: Launch, images: dict[str, Path]) -> Guest:
    disks = [(*blockdev(name, path), *disk_device(name, number)) for number, (name, path) in enumerate(images.items())]
    guest = launch(*disks[0], *disks[1])
    guest.wait_for_ticks(3)
    return guest


def verdicts(guest: Guest, *args: str, expect: int = 0) -> dict[str, tuple[bool | None, str]]:
    found = cli("verify", *args, "--json", monitor=guest.address, expect=expect).json["snapshots"]
    return {one["tag"]: (one["ok"], "; ".join((*one["problems"], *one["unchecked"]))) for one in found}


def rows(image: Path) -> dict[str, qcow2.Row]:
    file = os.open(image, os.O_RDONLY)
    try:
        return {row.name[1]: row for row in qcow2.rows(file, qcow2.header(file))}
    finally:
        os.close(file)


def changed(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def entry(image: Path, offset: int) -> int:
    file = os.open(image, os.O_RDONLY)
    try:
        return qcow2.entries(file, offset, 1)[0]
    finally:
        os.close(file)


def l2_of(image: Path, tag: str, *, state: bool) -> int:
    """Where the first L2 table of a snapshot is that leads to its VM state, or to its disk."""
    row = rows(image)[tag]
    first = -(-row.disk_size // (CLUSTER * CLUSTER // 8)) if state else 0
    return entry(image, row.l1_at + 8 * first) & qcow2.OFFSET


@both_monitors
def test_whole(guest: Guest) -> None:
    """Whoever made them. The guest is neither stopped nor resumed."""
    cli("save", "one", monitor=guest.address)
    assert guest.qmp.hmp("savevm two") == ""
    guest.qmp.events.clear()
    assert verdicts(guest) == {"one": (True, ""), "two": (True, "")}
    assert verdicts(guest, "two") == {"two": (True, "")}
    out = cli("verify", "--read-data", monitor=guest.address).out
    assert out.splitlines() == [f"{tag}: whole, 2 checksums taken for the first time" for tag in ("one", "two")]
    guest.assert_running()
    out = cli("verify", "--read-data", "one", monitor=guest.address).out
    assert out == "one: whole, 2 checksums compared\n"
    guest.qmp("query-status")
    assert [event for event in guest.qmp.events if event["event"] in ("STOP", "RESUME")] == []
    cli("verify", "nothing", monitor=guest.address, expect=7)


def test_a_series(guest: Guest) -> None:
    cli("save", "other", monitor=guest.address)
    cli("save", "--prefix", "daily", monitor=guest.address)
    assert [tag.partition("-")[0] for tag in verdicts(guest, "--prefix", "daily")] == ["daily"]
    cli("verify", "other", "--prefix", "daily", monitor=guest.address, expect=2)


def test_the_same_tag_again_has_checksums_of_its_own(guest: Guest) -> None:
    cli("save", "t", monitor=guest.address)
    cli("verify", "--read-data", monitor=guest.address)
    cli("save", "t", monitor=guest.address)
    assert "taken for the first time" in cli("verify", "--read-data", monitor=guest.address).out


#: What is damaged of the snapshot "t" in image "a", what verify says, and whether a load finds it, too.
DAMAGE: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "L1 table": (
        lambda image: changed(image, rows(image)["t"].l1_at, struct.pack(">Q", 1 << 40)),
        "a: L2 table 0 is not in the file",
        False,
    ),
    "the state's L2 table": (
        lambda image: changed(image, l2_of(image, "t", state=True), bytes(8)),
        "its VM state: a part of the state is compressed, or missing",
        True,
    ),
    "a cluster of the state is zeroed": (
        lambda image: changed(image, entry(image, l2_of(image, "t", state=True) + 80) & qcow2.OFFSET, bytes(CLUSTER)),
        "its VM state: at byte .*: a record of RAM has the flags 0x0",
        True,
    ),
    "the beginning of the state": (
        lambda image: changed(image, entry(image, l2_of(image, "t", state=True)) & qcow2.OFFSET, b"q"),
        "its VM state: .*it does not begin as a VM state does",
        True,
    ),
    "a cluster of the disk is shared": (
        lambda image: changed(
            image,
            l2_of(image, "t", state=False),
            struct.pack(">Q", entry(image, l2_of(image, "t", state=True) + 80) & qcow2.OFFSET),
        ),
        "a: cluster [0-9]+ lies where another part of it does",
        False,
    ),
    "the table of snapshots": (
        lambda image: changed(image, _header_of(image).rows_at + 12, b"\xff\xff"),
        "its VM state: the image's table of snapshots .*; a: the image's table of snapshots",
        True,
    ),
}


def _header_of(image: Path) -> qcow2.Header:
    file = os.open(image, os.O_RDONLY)
    try:
        return qcow2.header(file)
    finally:
        os.close(file)


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_tables(guest: Guest, images: dict[str, Path], what: str) -> None:
    """Of the other snapshot nothing is said, unless the table is that of all. A load that would fail is refused."""
    damage, words, stops_load = DAMAGE[what]
    cli("save", "t", monitor=guest.address)
    cli("save", "other", monitor=guest.address)
    damage(images["a"])
    found = verdicts(guest, expect=10)
    assert found["t"][0] is False
    assert re.search(words, found["t"][1])
    assert found["other"][0] is (what != "the table of snapshots")
    if stops_load:
        run = cli("load", "t", monitor=guest.address, expect=None)
        assert (run.code, "cannot be loaded" in run.err) == (6, True) or what == "the table of snapshots"
    guest.assert_running()


@pytest.mark.parametrize("node", ["a", "b"])
def test_a_flipped_byte(guest: Guest, images: dict[str, Path], node: str) -> None:
    """In a page of RAM, or in a disk: only the checksums find it."""
    cli("save", "t", monitor=guest.address)
    cli("verify", "--read-data", monitor=guest.address)
    cluster = (
        entry(images[node], l2_of(images[node], "t", state=node == "a") + (80 if node == "a" else 0)) & qcow2.OFFSET
    )
    data = images[node].read_bytes()[cluster + 5000]
    changed(images[node], cluster + 5000, bytes([data ^ 1]))
    assert verdicts(guest)["t"][0] is True
    ok, words = verdicts(guest, "--read-data", expect=10)["t"]
    assert ok is False
    assert words == f"{node}: its data are not those that were read when it was first verified"
    # Nothing new was written down
    assert verdicts(guest, "--read-data", expect=10)["t"][0] is False


def test_a_large_sparse_disk(launch: Launch, tmp_path: Path) -> None:
    """Most of its L1 table is empty; with small clusters, and large ones."""
    boot = make_boot_disk(tmp_path / "boot")
    more = []
    for size in (4096, 2 << 20):
        path = make_disk(
            tmp_path / f"d{size}",
            "40G",
            "qcow2",
            "-o",
            f"cluster_size={size},extended_l2={'on' if size > 16384 else 'off'}",
        )
        more += [*blockdev(f"d{size}", path), *disk_device(f"d{size}", 1 + (size > 16384))]
    guest = launch(*blockdev("boot", boot), *disk_device("boot"), *more)
    guest.wait_for_ticks(40)
    cli("save", "t", monitor=guest.address)
    assert verdicts(guest, "--read-data") == {"t": (True, "")}
    guest.wait_for_ticks(40)
    assert verdicts(guest, "--read-data") == {"t": (True, "")}


async def test_deleted_meanwhile(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another client: what is found of it then is no problem of a snapshot."""
    cli("save", "t", monitor=guest.address)
    cli("save", "other", monitor=guest.address)
    flaws = verify.flaws

    def after_the_deletion(*args: Any) -> Iterator[str]:
        if "t" in guest.node_tags("a"):
            guest.qmp.hmp("delvm t")
        return flaws(*args)

    monkeypatch.setattr(verify, "flaws", after_the_deletion)
    async with qsnap.connect(guest.address) as vm:
        found = await vm.verify()
    assert [(one.tag, one.ok) for one in found.snapshots] == [("other", True)]


def test_the_disk_in_use(guest: Guest, images: dict[str, Path]) -> None:
    """A load would free what its tables lead to."""
    cli("save", "t", monitor=guest.address)
    guest.wait_for_ticks(10)
    image = images["b"]
    guest.qmp("stop")
    head = _header_of(image)
    own = entry(image, l2_of(image, "t", state=False)) & qcow2.OFFSET
    changed(image, (entry(image, head.l1_at) & qcow2.OFFSET) + 8, struct.pack(">Q", own | qcow2.COPIED))
    assert (
        "b: cluster 1 of the disk in use, which any load gives up, lies where a part"
        in verdicts(guest, expect=10)["t"][1]
    )


def test_counted_as_free(guest: Guest, images: dict[str, Path]) -> None:
    """QEMU would write the next data there."""
    cli("save", "t", monitor=guest.address)
    image = images["a"]
    head = _header_of(image)
    cluster = entry(image, l2_of(image, "t", state=True) + 80) & qcow2.OFFSET
    block = entry(image, head.refcounts_at)
    guest.qmp("stop")  # QEMU would write the same block again
    changed(image, block + 2 * (cluster // CLUSTER), bytes(2))
    assert "counts as free, and would be written over" in verdicts(guest, expect=10)["t"][1]


@needs_snapshot_jobs
class TestStateFiles:
    """Of live snapshots."""

    @pytest.fixture
    def file(self, guest: Guest) -> Path:
        cli("save", "t", "--live", monitor=guest.address)
        path = Path(cli("show", "t", "--json", monitor=guest.address).json["file"]["path"])
        assert (
            cli("verify", "--read-data", monitor=guest.address).out
            == "t: whole, 3 checksums taken for the first time\n"
        )
        return path

    def test_whole(self, guest: Guest, file: Path) -> None:
        """Also after a load, which changes the tables in the file."""
        loaded = cli("load", "t", "--full", "--json", monitor=guest.address).json
        assert (loaded["method"], loaded["why_full"]) == ("full", "it was asked for")
        assert cli("verify", "--read-data", monitor=guest.address).out == "t: whole, 3 checksums compared\n"
        assert file.exists()

    async def test_interrupted(self, guest: Guest, images: dict[str, Path], file: Path) -> None:
        """It ends at the next piece, however much is left to read; and what was read is not called whole."""
        async with qsnap.connect(guest.address) as vm:
            snapshot, rows = await vm.show("t")
        ended = threading.Event()
        ended.set()
        with images["a"].open("rb") as image, file.open("rb") as state:
            vm_state = of_snapshot(snapshot, state.fileno())
            for read in (
                lambda: StoredSnapshot(image.fileno(), rows["a"][0]).checksum(ended.is_set),
                lambda: [*verify.flaws(vm_state, ended, lambda _: None)],
                lambda: verify.checksum(vm_state, ended),
            ):
                with pytest.raises(Unreadable, match="not read to its end"):
                    read()
            vm_state.close()

    def test_flipped(self, guest: Guest, file: Path) -> None:
        changed(file, STREAM_OFFSET + (1 << 20), b"\x77\x66")
        words = verdicts(guest, "--read-data", expect=10)["t"][1]
        assert "its VM state: its data are not those" in words or "its VM state: at byte" in words

    def test_cut(self, guest: Guest, file: Path) -> None:
        os.truncate(file, file.stat().st_size // 2)
        assert verdicts(guest, expect=10)["t"][0] is False

    def test_swapped(self, guest: Guest, file: Path) -> None:
        """The files of two tags have exchanged their names. Nothing is loaded from them, and nothing deleted."""
        cli("save", "u", "--live", monitor=guest.address)
        other = file.with_name(file.name.replace(".t.", ".u."))
        shutil.move(file, file.with_suffix(".x"))
        shutil.move(other, file)
        shutil.move(file.with_suffix(".x"), other)
        found = verdicts(guest, expect=10)
        assert [ok for ok, _ in found.values()] == [False, False]
        assert "holds the state of 'u'" in found["t"][1]
        for command in ("load", "delete"):
            assert "holds the state of 'u'" in cli(command, "t", monitor=guest.address, expect=6).err
        guest.assert_running()
        shutil.move(other, file.with_suffix(".x"))
        shutil.move(file, other)
        shutil.move(file.with_suffix(".x"), file)
        assert verdicts(guest, "--read-data") == {"t": (True, ""), "u": (True, "")}


def test_what_cannot_be_seen(guest: Guest, intercept: Intercept) -> None:
    """Through a proxy: it is not called whole."""
    cli("save", "t", monitor=guest.address)
    proxy = intercept(guest)
    found = cli("verify", "--json", monitor=proxy.address, expect=5).json["snapshots"]
    assert found[0]["ok"] is None
    assert found[0]["problems"] == []
    assert len(found[0]["unchecked"]) == 3


def test_the_machine(guest: Guest) -> None:
    """As QEMU's own list of RAM blocks, and of the devices that it has; and what saved it."""
    cli("save", "t", monitor=guest.address)
    origin = cli("show", "t", "--json", monitor=guest.address).json["origin"]
    version = guest.qmp("query-version")["qemu"]
    assert origin["qemu"] == "{major}.{minor}.{micro}".format(**version)
    assert f"{origin['machine']}-machine" == guest.qmp("qom-get", path="/machine", property="type")
    assert (origin["cpu"], origin["accelerator"]) == ("qemu64", "tcg")
    state = cli("show", "t", "--state", "--json", monitor=guest.address).json["state"]
    assert state["name"] + "-machine" == guest.qmp("qom-get", path="/machine", property="type")
    blocks = guest.qmp.hmp("info ramblock")
    for block in state["ram_blocks"]:
        assert re.search(rf"{re.escape(block['name'])} .* 0x{block['size']:016x} ", blocks), block
    names = [section["name"] for section in state["sections"]]
    assert {"timer", "cpu", "0000:00:1f.2/ich9_ahci", "globalstate"} <= {*names}
    out = cli("show", "t", "--state", monitor=guest.address).out
    assert f"machine:      {state['name']}" in out
