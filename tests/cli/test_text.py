"""Text for people: numbers, tables, and characters that are not to be printed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from qsnap.cli.output import text
from qsnap.cli.output.lines import Column, Table

pytestmark = pytest.mark.no_qemu


def test_numbers_for_people() -> None:
    assert [text.size(n) for n in (0, 1023, 1024, 1536, 1 << 20, 5 << 30, 3 << 40, 5 << 50)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "5.0 GiB", "3.0 TiB", "5120.0 TiB",
    ]  # fmt: skip
    assert text.clock(3_723_004_000_000) == "0001:02:03.004"
    assert [text.seconds(ms) for ms in (3.21, 99.9, 310, 75_000)] == ["3.2 ms", "99.9 ms", "0.31 s", "75 s"]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    ages = [text.age(now - timedelta(seconds=s), now) for s in (0, 119, 120, 7199, 7200, 172800, -5)]
    assert ages == ["0 s", "119 s", "2 min", "119 min", "2 h", "2 d", "in the future"]


def test_printable() -> None:
    assert text.printable("a\x1b[31m\n\u202e\x9b é") == "a\\x1b[31m\\n\\u202e\\x9b é"
    assert text.printable("a\nb", keep_newlines=True) == "a\nb"


def test_wrapped() -> None:
    """At blanks alone; a line that is set in is a command, and stays as it is."""
    assert text.wrapped("qsnap: no more", 14) == "qsnap: no more"
    assert text.wrapped("qsnap: no more", 13) == "qsnap: no\n  more"
    assert text.wrapped("- one two  three", 11) == "- one two\n    three"
    assert text.wrapped("  qemu-img create", 5) == "  qemu-img create"
    assert text.wrapped("paused 59.4 ms, 1 device", 14) == "paused\n  59.4 ms, 1\n  device"
    assert text.wrapped("a" * 9 + " b", 5) == "a" * 9 + "\n  b"
    assert text.wrapped("\u96ea\u96ea \u96ea", 6) == "\u96ea\u96ea\n  \u96ea"


def test_plain_table() -> None:
    assert Table((Column("A"), Column("LONG")), [("1", "2"), ("333", "")]).plain() == "A    LONG\n1    2\n333"
    assert Table((Column("A"), Column("B")), [("雪", "2"), ("e\u0301é", "3")]).plain() == "A   B\n雪  2\ne\u0301é  3"
