"""The VM state in an image is found as QEMU finds it; where it cannot be read in the clear, it is said why."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from qsnap.inventory.devices import survey
from qsnap.inventory.qcow2 import Unreadable
from qsnap.inventory.snapshots import snapshots
from qsnap.inventory.stream import PAGE, Frame, Stream
from qsnap.inventory.vm_state import VmState, of_image, of_snapshot, place
from qsnap.model.qemu import NodeSnapshot
from qsnap.monitor.qmp import replies
from support.graphs import graph as one_node
from support.graphs import node
from support.guest import Launch, blockdev, disk_device, make_boot_disk, qemu_img


@pytest.fixture
def saved(launch: Launch, tmp_path: Path) -> tuple[Path, NodeSnapshot]:
    """An image with a state, as QEMU has it open; and the snapshot's row."""
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*blockdev("a", image), *disk_device("a"))
    guest.wait_for_ticks(3)
    for tag in ("before", "t", "after"):
        assert guest.qmp.hmp(f"savevm {tag}") == ""
    infos = msgspec.convert(guest.qmp("query-named-block-nodes", flat=True), list[replies.BlockDeviceInfo])
    return image, next(row for row in replies.snapshot_tables(infos)["a"] if row.tag == "t")


def whole(state: VmState) -> bytes:
    data = bytearray(state.size)
    begin = 0
    while begin < state.size:
        begin += state.read(memoryview(data)[begin : begin + 70_001], begin)
    return bytes(data)


def test_it_is_walked_to_its_end(saved: tuple[Path, NodeSnapshot]) -> None:
    image, row = saved
    file = os.open(image, os.O_RDONLY)
    try:
        data = whole(of_image(file, row))
        again = of_image(file, row)
        buffer = memoryview(bytearray(100))
        assert again.read(buffer, len(data) - 50) == 50  # and back again
        assert (again.read(buffer, 5), bytes(buffer)) == (100, data[5:105])
    finally:
        os.close(file)
    assert len(data) == row.vm_state_size
    assert data.endswith(b"}")
    walk = Stream({"pc.ram": 32 << 20})
    begin = 0
    while not walk.is_at_devices:
        parts, length = walk.parts(memoryview(data)[begin : begin + (1 << 20)])
        assert length
        begin += length
    assert isinstance(parts[-1], Frame)
    assert walk.machine.startswith("pc-q35-")
    assert walk.ram_bytes >= 8192 * PAGE


def features(bits: int) -> Callable[[bytearray], None]:
    def change(head: bytearray) -> None:
        head[72:80] = struct.pack(">Q", bits)

    return change


def encryption(head: bytearray) -> None:
    head[32:36] = struct.pack(">I", 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [(encryption, "encrypted"), (features(2), "0x2"), (features(4), "0x4"), (features(16), "0x10"),
     (lambda head: head.__setitem__(0, 0), "not qcow2")],
    ids=["encrypted", "corrupt", "data-file", "extended-l2", "raw"],
)  # fmt: skip
def test_what_cannot_be_read(
    saved: tuple[Path, NodeSnapshot], tmp_path: Path, change: Callable[[bytearray], None], words: str
) -> None:
    image, row = saved
    data = bytearray(image.read_bytes())
    change(data)
    refused(tmp_path, data, row, words)


def test_another_snapshot_of_that_name(saved: tuple[Path, NodeSnapshot], tmp_path: Path) -> None:
    """It is told by its ID and its clock too; and so is another image."""
    image, row = saved
    data = bytearray(image.read_bytes())
    refused(tmp_path, data, msgspec.structs.replace(row, vm_clock_ns=row.vm_clock_ns + 1), "does not have it")
    refused(tmp_path, data, msgspec.structs.replace(row, id="77"), "does not have it")
    refused(tmp_path, data, msgspec.structs.replace(row, vm_state_size=row.vm_state_size - 1), "another state")
    refused(tmp_path, data[: len(data) // 8], row, "missing|table|does not have")
    empty = tmp_path / "empty"
    qemu_img("create", "-q", "-f", "qcow2", empty, "8M")
    refused(tmp_path, bytearray(empty.read_bytes()), row, "does not have it")


def refused(directory: Path, data: bytearray, row: NodeSnapshot, words: str) -> None:
    copy = directory / "copy"
    copy.write_bytes(data)
    file = os.open(copy, os.O_RDONLY)
    try:
        with pytest.raises(Unreadable, match=words):
            of_image(file, row)
    finally:
        os.close(file)


def test_an_image_that_cannot_be_seen() -> None:
    """As over TCP, or beside another user's QEMU."""
    row = NodeSnapshot(tag="t", id="1", vm_state_size=9, date=datetime(2026, 1, 1, tzinfo=UTC), vm_clock_ns=1)
    graph = one_node(node("a", filename="/not/there", snapshots=(row,)))
    (snapshot,) = snapshots(graph, survey(graph).devices)
    assert place(None, graph, snapshot) is None
    twice = one_node(node("a", filename="/not/there", snapshots=(row, row)))
    assert place(os.getpid(), twice, snapshot) is None
    with pytest.raises(Unreadable, match="cannot be seen from here"):
        of_snapshot(snapshot, None)
