"""The state file, byte by byte: what the writer makes is what QEMU's own tool takes for an image, at any size."""

from __future__ import annotations

import json
import os
import random
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from qsnap.errors import BadUsage
from qsnap.inventory import snapshots, state_file, state_store
from qsnap.inventory.devices import survey
from qsnap.inventory.state_file import CLUSTER, STREAM_OFFSET, Content
from qsnap.model.qemu import NodeSnapshot
from qsnap.model.snapshots import StateFile
from qsnap.tags import MAX_TAG_BYTES, SECOND_SUFFIX, second_name
from support.graphs import graph, node
from support.guest import assert_sound, qemu_img, tags
from support.state_files import DATE, written

MIB, GIB = 1 << 20, 1 << 30
#: Around the ends of clusters, of L2 tables (512 MiB), of refcount blocks (2 GiB), and of 32 bits.
SIZES = [1, CLUSTER - 1, CLUSTER, CLUSTER + 1, 512 * MIB - 1, 512 * MIB, 512 * MIB + 1, 2 * GIB - 6 * CLUSTER,
         2 * GIB, 4 * GIB - 1, 4 * GIB, 4 * GIB + 1, 40 * GIB + 12345]  # fmt: skip


def content_of(path: Path) -> Content | None:
    with path.open("rb") as file:
        return state_file.content_of(lambda size, offset: os.pread(file.fileno(), size, offset))


@pytest.mark.parametrize("size", SIZES)
def test_any_size(tmp_path: Path, size: int) -> None:
    content = Content("before upgrade é", "/vm/root.qcow2", size, DATE, 123_456_789_012_345)
    path = written(tmp_path / "state", content)
    assert content_of(path) == content
    # The independent witness
    assert_sound(path)
    (row,) = json.loads(qemu_img("info", "--output=json", path))["snapshots"]
    assert (row["name"], row["vm-state-size"]) == (content.tag, size)
    assert (row["date-sec"], row["date-nsec"]) == (int(DATE.timestamp()), 456789000)
    assert row["vm-clock-sec"] * 10**9 + row["vm-clock-nsec"] == content.vm_clock_ns
    assert mapped(path) == (size + CLUSTER - 1) // CLUSTER


def mapped(path: Path) -> int:
    """Follow the snapshot's tables: the clusters of its VM state, which must be those behind the header in order."""
    with path.open("rb") as file:

        def numbers(offset: int, count: int) -> tuple[int, ...]:
            return struct.unpack(f">{count}Q", os.pread(file.fileno(), 8 * count, offset))

        (rows_at,) = numbers(64, 1)
        l1_at, entries = struct.unpack(">QI", os.pread(file.fileno(), 12, rows_at))
        disk, *tables = numbers(l1_at, entries)
        assert disk == 0, "the disk is to be empty"
        clusters = [entry for table in tables for entry in numbers(table, CLUSTER // 8)]
    used = [entry for entry in clusters if entry]
    assert used == clusters[: len(used)] == list(range(STREAM_OFFSET, STREAM_OFFSET + len(used) * CLUSTER, CLUSTER))
    return len(used)


def flaw_of(path: Path) -> str:
    with path.open("rb") as file:
        return state_file.flaw(lambda size, offset: os.pread(file.fileno(), size, offset), path.stat().st_size)


def flaw_in(data: bytes | bytearray) -> str:
    return state_file.flaw(lambda size, offset: bytes(data[offset : offset + size]), len(data))


def content_in(data: bytes | bytearray) -> Content | None:
    return state_file.content_of(lambda size, offset: bytes(data[offset : offset + size]))


# The file of 2 GiB - 5 clusters ends with the last cluster that its refcount block counts
@pytest.mark.parametrize("size", [9, CLUSTER, 512 * MIB + 1, *(2 * GIB - n * CLUSTER for n in (11, 10, 9, 8))])
def test_what_a_load_leaves_is_no_flaw(tmp_path: Path, size: int) -> None:
    """The witness goes to the snapshot as QEMU does (bdrv_snapshot_goto); again changes nothing any more."""
    path = written(tmp_path / "state", Content("t", "/vm/root", size, DATE, 5))
    assert flaw_of(path) == ""
    for _ in range(3):
        qemu_img("snapshot", "-a", "t", path)
        assert flaw_of(path) == ""
    assert_sound(path)
    # An active table that leads elsewhere than the snapshot's
    with path.open("r+b") as file:
        (at,) = struct.unpack(">Q", os.pread(file.fileno(), 8, 40))
        os.pwrite(file.fileno(), struct.pack(">Q", CLUSTER), at + 8)
    assert flaw_of(path) == "its active L1 table differs"


@pytest.mark.parametrize("size", [9, 3 * CLUSTER, 512 * MIB + 1])
def test_a_load_that_was_cut_short(tmp_path: Path, size: int) -> None:
    """QEMU was killed when it had the longer table, and nothing in it yet. The witness finds nothing wrong either."""
    path = written(tmp_path / "state", Content("t", "/vm/root", size, DATE, 5))
    qemu_img("snapshot", "-a", "t", path)
    with path.open("r+b") as file:
        length, at = struct.unpack(">IQ", os.pread(file.fileno(), 12, 36))
        os.pwrite(file.fileno(), bytes(8 * length), at)
        ((counts_at,),) = struct.iter_unpack(">Q", os.pread(file.fileno(), 8, CLUSTER * (at // CLUSTER - 2)))
        counts = os.pread(file.fileno(), CLUSTER, counts_at)
        os.pwrite(file.fileno(), counts.replace(b"\0\2", b"\0\1"), counts_at)
    assert_sound(path)
    assert flaw_of(path) == ""


def test_what_is_behind_the_end_does_not_count(tmp_path: Path) -> None:
    """As of a QEMU that was killed before its longer table counted."""
    path = written(tmp_path / "state", Content("t", "/vm/root", 3 * CLUSTER, DATE, 5))
    path.write_bytes(path.read_bytes() + b"\1" * CLUSTER)
    assert flaw_of(path) == ""


def test_how_a_state_file_is_told(tmp_path: Path) -> None:
    """By qcow2's magic and version, and by our extension of its header, beside whatever others there are."""
    content = Content("t", "/vm/root", 9, DATE, 5)
    whole = written(tmp_path / "state", content).read_bytes()

    def image_in(data: bytes) -> str | None:
        return state_file.image_of(lambda size, offset: data[offset : offset + size])

    other = b"\1\2\3\4" + struct.pack(">I", 3) + b"abc" + bytes(5)
    more = whole[:104] + other + whole[104 : CLUSTER - len(other)] + whole[CLUSTER:]
    assert (content_in(more), image_in(more)) == (content, "/vm/root")
    assert flaw_in(more) == "its header differs"
    nameless = whole.replace(b"qsnp", b"else")
    assert (content_in(nameless), image_in(nameless)) == (None, None)
    no_image = b"QFI\0" + whole[4:]
    assert (content_in(no_image), image_in(no_image), flaw_in(no_image)) == (None, None, "it is not a state file")
    old = whole[:4] + b"\0\0\0\2" + whole[8:]
    assert (content_in(old), image_in(old)) == (None, "/vm/root")
    short = whole[: len(whole) // 2]
    assert (content_in(short), image_in(short), flaw_in(short)) == (None, "/vm/root", "it is not a state file")
    assert flaw_in(whole[:-1]) == "it is cut short"


@pytest.mark.parametrize("is_loaded", [False, True])
def test_every_bit_around_the_stream_counts(tmp_path: Path, is_loaded: bool) -> None:
    size = 3 * CLUSTER
    path = written(tmp_path / "state", Content("t", "/vm/root", size, DATE, 5))
    if is_loaded:
        qemu_img("snapshot", "-a", "t", path)
    whole = path.read_bytes()
    stream_end = STREAM_OFFSET + size
    rng = random.Random(14)  # noqa: S311 (the same in every run)
    used = [offset for offset, byte in enumerate(whole) if byte and not STREAM_OFFSET <= offset < stream_end]
    places = {*rng.sample(used, 60), *rng.sample(range(CLUSTER), 20), *rng.sample(range(stream_end, len(whole)), 60)}
    for offset in sorted(places):
        changed = bytearray(whole)
        changed[offset] ^= 1 << rng.randrange(8)
        # What says which snapshot it is may be anything: then it is that of another one
        assert flaw_in(changed) or content_in(changed) != content_in(whole), f"at {offset:#x}"
    for cluster in (STREAM_OFFSET, stream_end - CLUSTER):
        changed = bytearray(whole)
        changed[cluster : cluster + CLUSTER] = b"\1" * CLUSTER
        assert "a VM state does" in flaw_in(changed)


def test_a_state_file_has_one_snapshot(tmp_path: Path) -> None:
    """One with more is somebody else's, whatever the first of them is."""
    path = written(tmp_path / "state", Content("t", "/vm/root", CLUSTER, DATE, 5))
    qemu_img("snapshot", "-c", "second", path)
    assert content_of(path) is None


@given(
    st.builds(
        Content,
        tag=st.text(min_size=1, max_size=60),
        image=st.text(max_size=200),
        vm_state_size=st.integers(1, 1 << 44),
        date=st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
        vm_clock_ns=st.integers(0, (1 << 63) - 1),
    )
)
def test_what_is_written_is_read(content: Content) -> None:
    """Also where nothing but the header and the snapshot table is looked at."""
    parts = dict(state_file.envelope(structs.replace(content, vm_state_size=min(content.vm_state_size, GIB))))
    content = structs.replace(content, vm_state_size=min(content.vm_state_size, GIB))

    def pread(size: int, offset: int) -> bytes:
        return (parts.get(offset, b"") + bytes(size))[:size]

    assert state_file.content_of(pread) == content


@given(st.binary(max_size=400), st.sampled_from([b"", b"QFI\xfb\0\0\0\3"]))
def test_what_is_no_state_file(data: bytes, head: bytes) -> None:
    assert state_file.content_of(lambda size, offset: (head + data)[offset : offset + size]) is None


@pytest.mark.parametrize("offset", [1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_snapshot_table_that_is_nowhere(tmp_path: Path, offset: int) -> None:
    """Where no file can have it, even: whoever lists the others is not to fail for that."""
    path = written(tmp_path / "state", Content("t", "/vm/root", 9, DATE, 5))
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack(">Q", offset), 64)
    assert state_store.read(path) is None
    assert flaw_of(path) == "it is not a state file"


def test_a_date_beyond_all_dates(tmp_path: Path) -> None:
    """As far as the seconds go, and a fraction of four seconds more."""
    path = written(tmp_path / "state", Content("t", "/vm/root", 9, DATE, 5))
    with path.open("r+b") as file:
        (rows_at,) = struct.unpack(">Q", os.pread(file.fileno(), 8, 64))
        os.pwrite(file.fileno(), b"\xff" * 8, rows_at + 16)
    content = content_of(path)
    assert content is not None
    assert content.date.isoformat() == "2106-02-07T06:28:15.999999+00:00"
    assert flaw_of(path) == "its snapshot table differs"


def test_an_image_of_another_kind(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "disk", "8M")
    qemu_img("snapshot", "-c", "t", tmp_path / "disk")
    assert content_of(tmp_path / "disk") is None
    assert state_store.read(tmp_path / "disk") is None
    assert state_store.read(tmp_path / "none") is None
    os.mkfifo(tmp_path / "fifo")
    assert state_store.read(tmp_path / "fifo") is None
    assert tags(tmp_path / "disk") == ["t"]


def test_names() -> None:
    def name(base: str, tag: str) -> str:
        return state_store._fitting(base + state_store._ending(tag), state_store.SUFFIX)

    assert name("root.qcow2", "before-upgrade") == "root.qcow2.before-upgrade.qsnap"
    assert name("d", "a/b\\%\n") == "d.a%2Fb%5C%25%0A.qsnap"
    # As long as a name may be while the file is written, and a byte longer
    assert name("d" * 242, "t") == "d" * 242 + ".t.qsnap"
    assert "~" in name("d" * 243, "t")
    long = [name("d" * 100, "é" * 120 + last) for last in "ab"]
    assert long[0] != long[1]
    assert all(len(os.fsencode(name)) + len(".qsnap-part") - len(".qsnap") <= 255 for name in long)


def test_a_directory_that_leads_in_a_circle(tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(BadUsage, match="cannot be the directory for state files"):
        state_store.StateStore(None, circle)


def test_the_longest_tag_that_has_a_second_name() -> None:
    longest = "é" + "x" * (MAX_TAG_BYTES - len(SECOND_SUFFIX) - 2)
    assert second_name(longest) == longest + SECOND_SUFFIX
    with pytest.raises(BadUsage, match="too long"):
        second_name(f"{longest}x")


def test_which_disks_a_file_belongs_to() -> None:
    """By the tag and the guest's clock; a second name is the tag, once that is gone; over HMP clocks are rounded."""

    def row(tag: str, clock: int, later_ms: int = 0, size: int = 0) -> NodeSnapshot:
        date = DATE + timedelta(milliseconds=later_ms)
        return NodeSnapshot(tag=tag, id="1", vm_state_size=size, date=date, vm_clock_ns=clock)

    def file(tag: str, clock: int, *, is_whole: bool = True) -> StateFile:
        return StateFile(
            path=f"/vm/{tag}", size=9, disk_tag=tag, image="/vm/a", vm_state_size=5, date=DATE, vm_clock_ns=clock,
            is_whole=is_whole, trouble="" if is_whole else "it is cut short",
        )  # fmt: skip

    rows = [
        ("live", 1_234_567), ("rounded", 5_000_000), ("stale", 7), ("new.qsnap-2", 8), ("both", 9),
        ("both.qsnap-2", 10), ("cut", 11), ("cut.qsnap-2", 12), ("short.qsnap-2", 13), ("half.qsnap-2", 14),
    ]  # fmt: skip
    two = graph(
        node("a", snapshots=(*(row(tag, clock, clock) for tag, clock in rows), row("full", 3, size=7))),
        node("b", snapshots=(*(row(tag, clock, 4) for tag, clock in rows if tag != "cut"), row("full", 3))),
    )
    files = [
        file("live", 1_234_567), file("rounded", 5_123_456), file("stale", 6), file("new.qsnap-2", 8), file("both", 9),
        file("both.qsnap-2", 10), file("full", 3), file("gone", 1), file("cut", 11), file("cut.qsnap-2", 12),
        file("short.qsnap-2", 13, is_whole=False),
    ]  # fmt: skip
    found = [(s.tag, s.kind.value, s.disk_tag) for s in snapshots.snapshots(two, survey(two).devices, files)]
    assert sorted(found) == [
        ("both", "live", "both.qsnap-2"),
        ("both.qsnap-2", "live", "both"),
        ("cut", "live", "cut.qsnap-2"),
        ("cut.qsnap-2", "partial", "cut"),
        ("full", "full", "full"),
        ("full.qsnap-2", "state-only", "full"),
        ("gone", "state-only", "gone"),
        ("half.qsnap-2", "disk-only", "half.qsnap-2"),
        ("live", "live", "live"),
        ("new", "live", "new.qsnap-2"),
        ("rounded", "live", "rounded"),
        ("short", "live", "short.qsnap-2"),
        ("stale", "disk-only", "stale"),
        ("stale", "state-only", "stale"),
    ]
    troubled = [s.tag for s in snapshots.snapshots(two, survey(two).devices, files) if s.devices and s.problems]
    assert troubled == ["short"]

    found_all = snapshots.snapshots(two, survey(two).devices, files)
    meant = snapshots.named(found_all, "stale")
    assert meant is not None
    assert meant.devices == ("a", "b"), "what the disks hold goes before a file without them"

    def held(tag: str) -> snapshots.Holding:
        return snapshots.holding(found_all, survey(two).devices, tag)

    assert held("both") == (("both", "both.qsnap-2"), ("a", "b"), ("/vm/both", "/vm/both.qsnap-2"))
    assert held("both.qsnap-2") == (("both",), ("a", "b"), ("/vm/both",)), "what is listed so"
    assert held("cut.qsnap-2") == (("cut",), ("a",), ("/vm/cut",))
    assert held("full.qsnap-2") == ((), (), ("/vm/full",))
