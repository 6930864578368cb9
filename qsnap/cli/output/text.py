"""Numbers and names as people read them. Pure, and light: no rich here."""

from __future__ import annotations

import re
import unicodedata
from datetime import datetime, timedelta

#: A word and the blanks behind it; a number and its unit are one.
_WORDS = re.compile(r"(?:\S*\d [A-Za-z]{1,3}(?![A-Za-z])\S*|\S+)\s*")


def printable(text: str, *, keep_newlines: bool = False) -> str:
    r"""*text* with everything that could move a cursor, change a colour or hide itself shown as ``\x1b``.

    Tags, node names and QEMU's messages are data: a terminal must not obey them.
    """
    return "".join(
        char
        if (char == "\n" and keep_newlines) or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def shortened(text: str, length: int = 60) -> str:
    """*text*, or its beginning."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def size(number: int) -> str:
    """``1.5 GiB``; bytes below 1 KiB."""
    if number < 1024:
        return f"{number} B"
    value = float(number)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024 or unit == "TiB":
            break
    return f"{value:.1f} {unit}"


def date(moment: datetime) -> str:
    """Local time, to the second."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def age(then: datetime, now: datetime) -> str:
    """``5 min``, ``3 h``, ``12 d``: in the largest unit of which there are at least two, rounded down."""
    seconds = int((now - then).total_seconds())
    if seconds < 0:
        return "in the future"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def duration(number: float) -> str:
    """``95 s``, ``3 h 20 min``, ``12 d 4 h``: in the two largest units."""
    left, parts = int(number), []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"


def seconds(milliseconds: float) -> str:
    """``3.2 ms``, ``0.31 s``, ``75 s``."""
    if milliseconds < 100:
        return f"{milliseconds:.1f} ms"
    value = milliseconds / 1000
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def clock(nanoseconds: int) -> str:
    """Time since the guest's start, as QEMU's own table shows it: ``0000:02:13.118``."""
    whole, rest = divmod(timedelta(milliseconds=nanoseconds // 1_000_000), timedelta(seconds=1))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:04d}:{minute:02d}:{second:02d}.{rest // timedelta(milliseconds=1):03d}"


def width(text: str) -> int:
    """How many columns of a terminal *text* takes: two for a wide character, none for one that combines."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in ("W", "F")) for char in text
    )


def wrapped(line: str, columns: int) -> str:
    """*line* with breaks at its blanks, so that no word is torn apart at the edge of a terminal of so many columns, and
    no number from its unit.

    A line that is set in stays whole: it may be a command, which somebody copies.
    """
    if width(line) <= columns or line.startswith(" "):
        return line
    set_in = "    " if line.startswith("- ") else "  "
    first, *more = _WORDS.findall(line)
    lines = [first]
    for word in more:
        if width((lines[-1] + word).rstrip()) <= columns:
            lines[-1] += word
        else:
            lines.append(set_in + word)
    return "\n".join(one.rstrip() for one in lines)


def cut(text: str, columns: int, *, middle: bool = False) -> str:
    """*text* if it fits into so many columns of a terminal; else without its end, or its middle, and with a "…"."""
    if width(text) <= columns:
        return text
    behind = (columns - 1) // 2 if middle else 0
    head, tail = list(text), list(reversed(text))
    return f"{_fitting(head, columns - 1 - behind)}…{_fitting(tail, behind)[::-1]}"


def _fitting(chars: list[str], columns: int) -> str:
    """The first of *chars* that fit."""
    text = ""
    for char in chars:
        columns -= width(char)
        if columns < 0:
            break
        text += char
    return text
