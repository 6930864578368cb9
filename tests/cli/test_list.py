"""What ``list`` and ``vms`` show on a terminal, and which snapshots, in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsnap.cli.output.lines import Column, Table
from qsnap.cli.output.text import cut
from support.guest import Guest, Launch, blockdev, cli, make_disk
from support.terminal import cells, lines_on_terminal


def savevm(guest: Guest, *tags: str) -> None:
    """Make snapshots as quickly as QEMU does."""
    for tag in tags:
        assert guest.qmp.hmp(f"savevm {tag}") == ""


def test_a_snapshot_is_a_line_at_80_columns(guest: Guest) -> None:
    """With the columns that differ; a wide character takes two."""
    savevm(guest, "clean", "nightly-20261126T031500", "\u96ea\u96ea")
    head, *rows = lines_on_terminal("list", "-m", guest.address)
    assert head.split() == ["TAG", "STATE", "DATE", "AGE", "VM", "CLOCK"]
    assert [row.split()[0] for row in rows] == ["clean", "nightly-20261126T031500", "\u96ea\u96ea"]
    assert len({cells(row) for row in rows}) == 1
    head, *rows = lines_on_terminal("list", "--wide", "-m", guest.address, columns=200)
    assert head.split() == ["TAG", "KIND", "STATE", "DATE", "AGE", "VM", "CLOCK", "VMSTATE", "DEVICES"]
    assert cli("list", monitor=guest.address).out.splitlines()[0].split() == head.split(), "a pipe gets everything"


def test_a_snapshot_is_a_line_with_ten_disks(launch: Launch, tmp_path: Path) -> None:
    """And with one that lacks a disk, which is seen; --wide has all their names."""
    names = [f"disk-of-data-{number}" for number in range(10)]
    guest = launch(
        *(word for name in names for word in blockdev(name, make_disk(tmp_path / name))),
        *(word for name in names for word in ("-device", f"virtio-blk,drive={name}")),
        memory="16",
    )
    savevm(guest, "a", "b-tag-that-somebody-has-made-by-hand-and-that-is-too-long-2026-11-26")
    assert len(lines_on_terminal("list", "-m", guest.address)) == 3
    guest.qmp("blockdev-snapshot-delete-internal-sync", device=names[9], name="a")
    head, first, second = lines_on_terminal("list", "-m", guest.address)
    assert head.split() == ["TAG", "KIND", "STATE", "AGE", "DEVICES"]
    assert first.split()[:2] == ["a", "partial"]
    assert " 9 of 10, not " in first
    assert "\u2026" in first
    assert second.startswith("b-tag-that-")
    assert second.split()[0].endswith("-11-26")
    text = "".join(lines_on_terminal("list", "--wide", "-m", guest.address, columns=1000))
    assert text.count("disk-of-data-5") == 2


def test_which_and_in_which_order(guest: Guest) -> None:
    savevm(guest, "n-20261126T031500", "b", "n-20261127T031500", "a", "n-x")

    def listed(*options: str) -> list[str]:
        text = cli("list", "-q", *options, monitor=guest.address).out
        assert [one["tag"] for one in cli("list", "--json", *options, monitor=guest.address).json["snapshots"]] == (
            text.split()
        )
        return [tag.removeprefix("n-202611") for tag in text.split()]

    assert listed() == ["26T031500", "b", "27T031500", "a", "n-x"]
    assert listed("--prefix", "n") == ["26T031500", "27T031500"]
    assert listed("--last", "2", "--reverse") == ["n-x", "a"]
    assert listed("--prefix", "n", "--last", "1") == ["27T031500"]
    assert listed("--sort", "tag") == ["a", "b", "26T031500", "27T031500", "n-x"]
    assert listed("--sort", "size", "--last", "1") == ["n-x"]
    cli("list", "--last", "0", monitor=guest.address, expect=2)


def test_several_vms_are_in_one_table(launch: Launch, tmp_path: Path) -> None:
    guests = [
        launch("-name", name, *blockdev("disk", make_disk(tmp_path / name)), "-device", "virtio-blk,drive=disk",
               memory="16")
        for name in ("web", "db")
    ]  # fmt: skip
    savevm(guests[0], "one", "two")
    savevm(guests[1], "three")
    names = [word for guest in guests for word in ("--vm", str(guest.pid))]
    web, db = (str(guest.pid) for guest in guests)
    rows = [line.split()[:2] for line in lines_on_terminal("list", *names)]
    assert rows == [["VM", "TAG"], [web, "one"], [web, "two"], [db, "three"]]


def test_vms_is_a_line_for_each(launch: Launch, tmp_path: Path) -> None:
    names = [f"disk-of-data-{number}" for number in range(10)]
    guest = launch(
        "-name",
        "database",
        *(word for name in names for word in blockdev(name, make_disk(tmp_path / name))),
        memory="16",
    )
    (row,) = [line for line in lines_on_terminal("vms") if str(guest.directory)[:10] in line and "database" in line]
    assert "QMP, " in row
    assert row.rstrip().endswith(("--vm database", f"--vm {guest.pid}"))


@pytest.mark.no_qemu
@pytest.mark.parametrize(
    ("text", "columns", "middle", "expected"),
    [
        ("abc", 3, False, "abc"),
        ("abcd", 3, False, "ab\u2026"),
        ("abcdefgh", 5, True, "ab\u2026gh"),
        ("\u96ea\u96ea\u96ea", 4, False, "\u96ea\u2026"),
        ("\u96ea\u96ea\u96ea\u96ea", 5, True, "\u96ea\u2026\u96ea"),
    ],
)
def test_cut(text: str, columns: int, middle: bool, expected: str) -> None:
    assert cut(text, columns, middle=middle) == expected


@pytest.mark.no_qemu
def test_what_goes_first() -> None:
    """A column that says the same, then one that may go, and then what is longest is cut."""
    columns = (Column("A", cut="end", whole=20), Column("B", is_dull=True), Column("C", goes=1), Column("D", cut="end"))
    table = Table(columns, [("a" * 30, "same", "c" * 10, "d" * 30), ("a", "same", "c", "d")])

    def heads(available: int) -> str:
        return "".join(column.head for column in table._fitting(available).columns)

    assert (heads(100), heads(50), heads(40)) == ("ACD", "ACD", "AD")
    assert [len(cell) for cell in table._fitting(50).rows[0]] == [21, 10, 15]
