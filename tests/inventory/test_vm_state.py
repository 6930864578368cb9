"""The VM state in an image is found as QEMU finds it; where it cannot be read in the clear, it is said why."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from qsnap.inventory.devices import survey
from qsnap.inventory.qcow2 import COMPRESSED, COPIED, EXTENDED_L2, ZERO, Damaged, Unreadable
from qsnap.inventory.rows import PAGE
from qsnap.inventory.snapshots import snapshots
from qsnap.inventory.stream import Frame, Stream
from qsnap.inventory.vm_state import Place, Stretch, VmState, of_image, of_snapshot, place, unprepared
from qsnap.model.qemu import NodeSnapshot
from qsnap.monitor.qmp import replies
from support.graphs import graph as one_node
from support.graphs import node, over
from support.guest import Launch, blockdev, disk_device, make_boot_disk, open_files, qemu_img
from support.qcow2_files import CLUSTER, ENTRIES, OF_L1, Image, at


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
    assert sum(walk.blocks.values()) >= 8192 * PAGE


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


@pytest.mark.no_qemu
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


@pytest.fixture
def opened() -> Iterator[Callable[[Path], int]]:
    """Open files; they are closed with the test."""
    files: list[int] = []

    def start(path: Path) -> int:
        files.append(os.open(path, os.O_RDONLY))
        return files[-1]

    yield start
    for file in files:
        os.close(file)


Opened = Callable[[Path], int]


@pytest.mark.no_qemu
@pytest.mark.parametrize("size", [OF_L1 + 2 * CLUSTER, OF_L1 + CLUSTER + 1, 2 * OF_L1, OF_L1, CLUSTER, 1])
def test_clusters_in_any_order(tmp_path: Path, opened: Opened, size: int) -> None:
    """Two and two together, the second pair before the first: whatever is read begins and ends where it should."""
    image = Image()
    used = -(-size // OF_L1)
    order = [number ^ 2 for number in range(used * ENTRIES)]
    for number in order:
        image.fill(10 + number, number + 1)
    for table in range(used):
        image.put(2 + table, *(at(10 + number) for number in order[table * ENTRIES :][:ENTRIES]))
    row = image.snapshot("t", 5, 0, *(at(2 + table) for table in range(used)), size=size)
    expected = b"".join(bytes([number + 1]) * CLUSTER for number in order)[:size]
    again = image.snapshot("t", 9, 0, *(at(2 + table) for table in range(used)), size=size)
    file = opened(image.write(tmp_path / "a"))
    state = of_image(file, row)
    assert state.identity == of_image(file, row).identity != of_image(file, again).identity
    for piece in 1 << 20, 2 * CLUSTER, 700:
        assert b"".join(state.bytes(begin, piece) for begin in range(0, size, piece)) == expected
    for begin in size - 1, 0, size // 2, size, 0:
        assert state.bytes(begin, 3 * CLUSTER) == expected[begin:][: 3 * CLUSTER]


MISSING, NO_CLUSTER = "a part of the state is missing", "a part of the state is compressed, or missing"
DISK = 4  # an L2 table of the disk


@pytest.mark.no_qemu
@pytest.mark.parametrize(
    ("leaf", "cut", "words"),
    [(0, 0, NO_CLUSTER), (at(8, COPIED | ZERO), 0, NO_CLUSTER), (at(8, COPIED | COMPRESSED), 0, NO_CLUSTER),
     (at(8), CLUSTER - 8, NO_CLUSTER), (at(8), CLUSTER - 9, ""), (at(8, 0), 0, "")],
)  # fmt: skip
def test_a_cluster_that_is_not_there(tmp_path: Path, opened: Opened, leaf: int, cut: int, words: str) -> None:
    """The last one of the file, of which nine bytes are used."""
    image = Image()
    image.put(2, at(image.fill(7, 7)), leaf)
    image.fill(8, 8)
    row = image.snapshot("t", 3, 0, at(2), size=CLUSTER + 9)
    damaged(opened(image.write(tmp_path / "a", cut)), row, words)


@pytest.mark.no_qemu
@pytest.mark.parametrize(
    ("l1", "words"),
    [((at(DISK), at(2)), "the state's tables are shorter than it is"), ((at(DISK), 0, at(2)), MISSING),
     ((at(DISK), at(2), 0), MISSING), ((at(DISK), at(2), at(9)), MISSING), ((at(DISK), at(2), at(2)), "")],
)  # fmt: skip
def test_a_table_that_is_not_there(tmp_path: Path, opened: Opened, l1: tuple[int, ...], words: str) -> None:
    """Of a state of two tables; the one at 9 would begin where the file ends."""
    image = Image()
    image.put(2, *(at(image.fill(8, 8)) for _ in range(ENTRIES)))
    row = image.snapshot("t", 3, *l1, size=OF_L1 + CLUSTER)
    damaged(opened(image.write(tmp_path / "a")), row, words)


def damaged(file: int, row: NodeSnapshot, words: str) -> None:
    """Its state is not read for that reason; or it is, if there is none."""
    if words:
        with pytest.raises(Damaged, match=f"^{words}$"):
            of_image(file, row)
    else:
        assert len(of_image(file, row).bytes(0, row.vm_state_size)) == row.vm_state_size


@pytest.mark.no_qemu
def test_an_image_that_ends_too_early(tmp_path: Path, opened: Opened) -> None:
    """Within its header, in the table of what comes next, or as the state is read."""
    image = Image()
    image.put(2, at(image.fill(7, 7)))
    row = image.snapshot("t", 3, 0, at(2), size=CLUSTER)
    image.activate(4, 0, at(8))
    image.put(8, at(7))
    whole_image = image.write(tmp_path / "a")
    state = of_image(opened(whole_image), row)
    short = tmp_path / "short"
    short.write_bytes(whole_image.read_bytes()[:80])
    cannot = "^the image's tables cannot be read: "
    with pytest.raises(Unreadable, match=cannot):
        of_image(opened(short), row)
    with pytest.raises(Unreadable, match=cannot):
        unprepared(opened(short), 1)
    cut = opened(image.write(tmp_path / "cut", cut=CLUSTER - 8))
    assert unprepared(cut, CLUSTER) == []
    with pytest.raises(Damaged, match="a table of the next state is cut short"):
        unprepared(cut, CLUSTER + 1)
    os.truncate(whole_image, 7 * CLUSTER + 9)
    with pytest.raises(OSError, match="shorter than it was") as error:
        state.bytes(0, CLUSTER)
    assert error.value.errno == errno.EIO


@pytest.mark.no_qemu
@pytest.mark.parametrize("driver", ["file", "host_device"])
def test_an_image_that_can_be_seen(tmp_path: Path, opened: Opened, driver: str) -> None:
    """As a file, or on a block device. What it holds twice, or does not hold, has no state there."""
    (tmp_path / "a").touch()
    opened(tmp_path / "a")
    row = NodeSnapshot(tag="t", id="1", vm_state_size=9, date=datetime(2026, 1, 1, tzinfo=UTC), vm_clock_ns=1)
    protocol = node("p", driver, filename=str(tmp_path / "a"))
    graph = one_node(over("a", "qcow2", "p", snapshots=(row,)), protocol)
    (snapshot,) = snapshots(graph, survey(graph).devices)
    found = place(os.getpid(), graph, snapshot)
    assert found is not None
    assert (found.image.samefile(tmp_path / "a"), found.row) == (True, row)
    for rows in (row, row), ():
        other = one_node(over("a", "qcow2", "p", snapshots=rows), protocol)
        assert place(os.getpid(), other, snapshot) is None
    for vmstate in None, "gone":
        assert place(os.getpid(), graph, msgspec.structs.replace(snapshot, vmstate=vmstate)) is None


@pytest.mark.no_qemu
def test_files_are_closed(tmp_path: Path) -> None:
    """That of a state when it is closed, and that of an image without it at once."""
    image = Image()
    image.put(2, at(image.fill(7, 7)))
    row = image.snapshot("t", 3, 0, at(2), size=CLUSTER)
    image.write(tmp_path / "a")
    graph = one_node(node("a", filename=str(tmp_path / "a"), snapshots=(row,)))
    (snapshot,) = snapshots(graph, survey(graph).devices)
    before = open_files()
    of_snapshot(snapshot, Place(tmp_path / "a", row)).close()
    with pytest.raises(Unreadable, match="does not have it"):
        of_snapshot(snapshot, Place(tmp_path / "a", msgspec.structs.replace(row, id="9")))
    assert open_files() == before


@pytest.mark.no_qemu
def test_images_that_are_not_read(tmp_path: Path, opened: Opened) -> None:
    image = Image()
    image.put(2, at(image.fill(7, 7)))
    row = image.snapshot("t", 3, 0, at(2), size=CLUSTER)
    image.activate(4, 0, at(2))
    for features, encryption, of_state, of_next in (
        (0, 0, "", ""),
        (1 | 8, 0, "", ""),
        (EXTENDED_L2, 0, "the image has the features 0x10", ""),
        (2, 0, "the image has the features 0x2", "the image has the features 0x2"),
        (0, 2, "the image is encrypted", ""),
        (2, 2, "the image is encrypted", "the image has the features 0x2"),
    ):
        image.features, image.encryption = features, encryption
        file = opened(image.write(tmp_path / "a"))
        with pytest.raises(Unreadable, match=f"^{of_state}$") if of_state else nullcontext():
            of_image(file, row)
        with pytest.raises(Unreadable, match=f"^{of_next}$") if of_next else nullcontext():
            unprepared(file, CLUSTER)
    without = Image().write(tmp_path / "b")
    assert unprepared(opened(without), 2 * CLUSTER + 1) == [Stretch(0, 2 * CLUSTER + 1, is_shared=False)]
    assert unprepared(opened(without), 0) == []
    stateless = image.snapshot("none", 5, 0)
    image.features = image.encryption = 0
    with pytest.raises(Unreadable, match="tells of no state"):
        of_image(opened(image.write(tmp_path / "c")), stateless)


@pytest.mark.no_qemu
def test_what_the_next_state_has_to_make_first(tmp_path: Path, opened: Opened) -> None:
    """A cluster of its own is ready. Others are missing, or shared with a snapshot; which may be one that goes."""
    c = CLUSTER

    def made(l1_entry: int, *leaves: int, going: str = "", size: int = 6 * c) -> list[tuple[int, int, bool]]:
        image = Image()
        rows = {tag: image.snapshot(tag, 2 + number, 0, at(20 + number, 0)) for number, tag in enumerate("st")}
        image.activate(5, 0, l1_entry, at(21, 0))
        for table in 20, 21, 22:
            image.put(table, *leaves)
        file = opened(image.write(tmp_path / "a"))
        found = unprepared(file, size, [rows[tag] for tag in going])
        return [(one.begin // c, one.size, one.is_shared) for one in found]

    mine, shared, none = at(30), at(31, 0), 0
    own = at(22)
    assert made(own, mine, shared, shared, none, mine, none) == [(1, 2 * c, True), (3, c, False), (5, c, False)]
    assert made(own, none, none, shared, size=2 * c + 5) == [(0, 2 * c, False), (2, 5, True)]
    assert made(own, mine, shared, going="st", size=2 * c) == [(1, c, True)], "whose else it is is not looked for"
    assert made(0, mine, shared, size=3 * c) == [(0, 3 * c, False)], "there is not even a table"
    # The whole table is the snapshot's, and so all that it leads to
    for going, expected in {
        "": [(0, 2 * c, True), (2, c, False), (3, c, True)],
        "t": [(0, 2 * c, True), (2, c, False), (3, c, True)],
        "s": [(2, c, False)],
        "st": [(2, c, False)],
    }.items():
        assert made(at(20, 0), mine, shared, none, shared, going=going, size=4 * c) == expected
    # Of two tables each is looked at by itself; and behind the last there is nothing
    both = made(own, *[mine] * ENTRIES, going="", size=2 * OF_L1 + c)
    assert both == [(ENTRIES, OF_L1, True), (2 * ENTRIES, c, False)]
    assert made(own, *[mine] * ENTRIES, going="t", size=2 * OF_L1 + c) == [(2 * ENTRIES, c, False)]
