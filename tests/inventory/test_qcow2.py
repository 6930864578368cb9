"""The header and the tables of a qcow2 image, made by hand: what counts, what is damaged, and what shows a way."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest

from qsnap.inventory import qcow2
from qsnap.inventory.qcow2 import Damaged, L1Tables, NotThere, Row, Unreadable
from qsnap.model.qemu import NodeSnapshot

pytestmark = pytest.mark.no_qemu

CLUSTER = 512
#: What an entry of an L1 table of such an image leads to.
OF_L1 = CLUSTER * CLUSTER // 8
ROWS_AT, ACTIVE_AT = 2 * CLUSTER, 8 * CLUSTER

Written = Callable[[bytes], int]


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    """Open an image with these bytes."""
    files: list[int] = []
    numbers = count()

    def write(data: bytes) -> int:
        path = tmp_path / str(next(numbers))
        path.write_bytes(data)
        files.append(os.open(path, os.O_RDONLY))
        return files[-1]

    yield write
    for file in files:
        os.close(file)


def header(
    version: int = 3, bits: int = 9, l1_size: int = 0, rows: int = 0, features: int = 0, order: int = 4,
    disk_size: int = 4 * OF_L1, magic: bytes = b"QFI\xfb",
) -> bytes:  # fmt: skip
    first = struct.pack(
        ">4sIQIIQIIQQIIQ", magic, version, 0, 0, bits, disk_size, 0, l1_size, ACTIVE_AT, 0, 0, rows, ROWS_AT
    )
    return first + (struct.pack(">Q16xII", features, order, 104) if version == 3 else b"")


def row(
    tag: str = "t",
    identity: str = "1",
    added: bytes = struct.pack(">QQ", 7, 4 * OF_L1),
    l1_size: int = 0,
    l1_at: int = 0,
    clock_ns: int = 5,
) -> bytes:
    head = struct.pack(
        ">QIHHIIQII", l1_at, l1_size, len(identity.encode()), len(tag.encode()), 1000, 9, clock_ns, 3, len(added)
    )
    data = head + added + identity.encode() + tag.encode()
    return data + bytes(-len(data) % 8)


def table(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}Q", *numbers)


def laid_out(**places: bytes) -> bytes:
    """An image of bytes that lie at ``at_…``."""
    image = bytearray()
    for name, data in places.items():
        at = int(name.removeprefix("at_"))
        image += bytes(max(0, at + len(data) - len(image)))
        image[at : at + len(data)] = data
    return bytes(image)


def test_the_header(written: Written) -> None:
    head = qcow2.header(written(header(l1_size=3, rows=2, features=17, order=6)))
    assert (head.cluster, head.disk_size, head.l1_size, head.l1_at) == (CLUSTER, 4 * OF_L1, 3, ACTIVE_AT)
    assert (head.rows, head.rows_at, head.features, head.refcount_bits, head.step) == (2, ROWS_AT, 17, 64, 2)
    assert (head.of_l1, head.first_of_state(4 * OF_L1), head.is_encrypted) == (OF_L1 // 2, 8, False)
    old = qcow2.header(written(header(version=2)))
    assert (old.features, old.refcount_bits, old.step, old.of_l1) == (0, 16, 1, OF_L1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not qcow2"),
        (header(version=2)[:71], "not qcow2"),
        (header(magic=b"QFI\xfa"), "not qcow2"),
        (header(version=1) + bytes(32), "not qcow2"),
        (header(version=4) + bytes(32), "not qcow2"),
        (header(bits=8), "not qcow2"),
        (header(bits=22), "not qcow2"),
        (header(l1_size=(4 << 20) + 1), "header is damaged"),
        (header(rows=65537), "header is damaged"),
        (header(order=7), "header is damaged"),
    ],
)
def test_what_is_no_header(written: Written, data: bytes, words: str) -> None:
    with pytest.raises(Unreadable, match=words) as error:
        qcow2.header(written(data))
    assert isinstance(error.value, Damaged) == ("damaged" in words)


def test_the_greatest_numbers_in_a_header(written: Written) -> None:
    head = qcow2.header(written(header(bits=21, l1_size=4 << 20, rows=65536, order=6)))
    assert (head.cluster, head.l1_size, head.rows, head.refcount_bits) == (2 << 20, 4 << 20, 65536, 64)


def found_rows(written: Written, number: int, data: bytes) -> list[Row]:
    file = written(laid_out(at_0=header(rows=number), **{f"at_{ROWS_AT}": data}))
    return [*qcow2.rows(file, qcow2.header(file))]


def test_the_rows(written: Written) -> None:
    """Up to the last byte of the file; in an old one the state has 32 bits, and no size of the disk is told."""
    more = struct.pack(">QQQ", 1 << 40, 99, 1)
    data = row("é", "77", l1_size=4 << 20, l1_at=5) + row(added=more) + row("old", added=bytes(8)) + row("o", added=b"")
    first, second, third, last = found_rows(written, 4, data.rstrip(b"\0"))
    assert first == Row(5, 4 << 20, 7, 4 * OF_L1, ("77", "é", 1000), 5, 9)
    assert (second.size, second.disk_size) == (1 << 40, 99)
    assert [(one.size, one.disk_size, one.name[1]) for one in (third, last)] == [
        (3, 4 * OF_L1, "old"), (3, 4 * OF_L1, "o"),
    ]  # fmt: skip


def test_damaged_rows(written: Written) -> None:
    for number, data, words in (
        (2, row(), "cut short"),
        (1, row()[:39], "cut short"),
        (1, row("tag").rstrip(b"\0")[:-1], "is damaged"),
        (1, row(l1_size=(4 << 20) + 1), "is damaged"),
    ):
        with pytest.raises(Damaged, match=words):
            found_rows(written, number, data)


def test_behind_all_files_there_is_nothing(written: Written) -> None:
    file = written(b"x" * 20)
    assert qcow2.read(file, 8, 1 << 63) == b""
    assert [*qcow2.entries(file, (1 << 64) - 1, 2)] == []
    assert [*qcow2.entries(file, 0, 9)] == [int.from_bytes(b"x" * 8)] * 2
    assert qcow2.size_of(file) == 20


def wanted(clock_ns: int, tag: str = "t", second: int = 1000, size: int = 7) -> NodeSnapshot:
    return NodeSnapshot(
        tag=tag, id="1", vm_state_size=size, date=datetime.fromtimestamp(second, UTC), vm_clock_ns=clock_ns
    )


def test_which_row_is_meant(written: Written) -> None:
    """HMP tells the clock in ms, the size in three digits, and a date without a zone."""
    data = row(clock_ns=5_000_007) + row(identity="2", clock_ns=6_000_000)
    file = written(laid_out(at_0=header(rows=2), **{f"at_{ROWS_AT}": data}))
    head = qcow2.header(file)
    for one in wanted(5_000_007), wanted(5_000_000, second=1, size=8):
        assert qcow2.row_of(file, head, one).vm_clock_ns == 5_000_007
    for one in (
        wanted(5_000_008), wanted(5_000_007, second=1001), wanted(6_000_000), wanted(4_000_000), wanted(5_000_007, "u")
    ):  # fmt: skip
        with pytest.raises(NotThere):
            qcow2.row_of(file, head, one)
    with pytest.raises(Unreadable, match="another state") as error:
        qcow2.row_of(file, head, wanted(5_000_007, size=8))
    assert not isinstance(error.value, NotThere)


#: Tables of clusters: A, AB and AC have one in common.
A, B, C, AB, AC = (number * CLUSTER for number in range(10, 15))
COPIED = qcow2.COPIED


def with_tables(active: list[int], mine: list[int], other: list[int], *, features: int = 0) -> bytes:
    """An image of three entries a table, and the active one and two snapshots' ones."""
    clusters = {A: [0, 50 * CLUSTER, 51 * CLUSTER], B: [0, 0, 61 * CLUSTER], AB: [0, 50 * CLUSTER | COPIED, 0]}
    clusters |= {C: [70 * CLUSTER, 0, 0], AC: [0, 50 * CLUSTER, 71 * CLUSTER]}
    step = 2 if features & qcow2.EXTENDED_L2 else 1
    spread = {at: [word for entry in some for word in [entry, 51 * CLUSTER][:step]] for at, some in clusters.items()}
    places = [20 * CLUSTER, 21 * CLUSTER]
    snapshots = [
        row(name, l1_at=at, l1_size=len(entries), clock_ns=5_000_000)
        for name, at, entries in zip("mo", places, (mine, other), strict=True)
    ]
    return laid_out(
        at_0=header(rows=2, l1_size=len(active), features=features),
        **{f"at_{ROWS_AT}": b"".join(snapshots), f"at_{ACTIVE_AT}": table(*active)},
        **{f"at_{at}": table(*entries) for at, entries in zip(places, (mine, other), strict=True)},
        **{f"at_{at}": table(*entries) for at, entries in spread.items()},
    )


def leads(file: int) -> bool:
    tables = L1Tables(file)
    mine, other = tables.of("m", 5), tables.of("o", 5)
    assert mine is not None
    assert other is not None
    return tables.leads_from(mine, other)


@pytest.mark.parametrize(
    ("active", "mine", "other", "does"),
    [
        ([A | COPIED], [A], [B], True),
        ([A], [A], [A], False),
        ([B], [A], [B], False),
        ([0], [0], [A], False),
        ([0], [A], [0], False),
        ([A], [0], [0], False),
        ([A], [0], [B], False),
        ([0, A], [B, A], [B, 0], True),
        ([AB], [A], [0], True),
        ([AB], [A], [B], True),
        ([AB], [B], [A], False),
        ([AB], [B], [0], False),
        ([A], [AB], [B], True),
        ([A], [B], [AB], False),
        ([AB], [A], [], True),
        ([B], [AB], [A], False),
        ([B], [C], [A], False),
        ([AB], [A], [AC], False),
    ],
)
def test_what_the_active_table_goes_on_from(
    written: Written, active: list[int], mine: list[int], other: list[int], does: bool
) -> None:
    """Either a whole table of clusters, or a cluster: one that the other snapshot does not use in that place."""
    assert leads(written(with_tables(active, mine, other))) is does


def test_with_entries_of_16_bytes(written: Written) -> None:
    """What the second half of one says leads nowhere."""
    assert not leads(written(with_tables([AB], [B], [0], features=qcow2.EXTENDED_L2)))
    assert leads(written(with_tables([AB], [A], [B], features=qcow2.EXTENDED_L2)))


def test_the_tables_of_an_image(written: Written) -> None:
    """Those of the disk as long as the disk; those of VM states to the last one that is used."""
    file = written(with_tables([A, 0, 0, 0, B | COPIED, 0, 0], [0, 0, 0, 0, 0], [A]))
    tables = L1Tables(file)
    assert tables.active == ((A, 0, 0, 0), (B,))
    assert tables.of("m", 5) == ((0, 0, 0, 0), ())
    assert tables.of("o", 5) == ((A,), ())
    assert tables.of("o", 6) is tables.of("x", 5) is None


def test_features_that_change_where_tables_are(written: Written) -> None:
    for bits in 1, 4, 8, 16:
        assert L1Tables(written(header(features=bits))).active == ((), ())
    for bits in 2, 32:
        with pytest.raises(Unreadable, match=f"the features {bits:#x}"):
            L1Tables(written(header(features=bits)))
