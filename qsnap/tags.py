"""What a tag may be, and every name that qsnap makes of one. Pure.

Which of these names the disks have is decided by ``qsnap/inventory/snapshots.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta

from qsnap.errors import BadUsage
from qsnap.model.qemu import BlockGraph

#: A tag's greatest length in bytes of UTF-8: QEMUSnapshotInfo.name is char[256] (block/snapshot.h).
MAX_TAG_BYTES = 255
#: What the second name of a tag ends with. A snapshot that is made while the older one of its tag stays is on the disks
#: under that, or under the tag itself if the older one has the second name.
SECOND_SUFFIX = ".qsnap-2"
#: What no tag of a user's ends with. The second one is what earlier versions of qsnap called such a snapshot.
RESERVED_SUFFIXES = (SECOND_SUFFIX, ".qsnap-stand-in")


def tag_problem(tag: str) -> str | None:
    """Why QEMU or a terminal would make something else of this tag; None for a good one.

    QEMU takes an empty tag, cuts a long one without a word, and HMP is wrecked by control characters.
    """
    if not tag:
        return "the tag is empty"
    try:
        size = len(tag.encode())
    except UnicodeEncodeError:
        return "the tag is not valid UTF-8"
    if size > MAX_TAG_BYTES:
        return f"the tag has {size} bytes, and QEMU keeps {MAX_TAG_BYTES}"
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in tag):
        return "the tag holds control characters"
    return None


def looks_like_id(tag: str) -> bool:
    """Whether a tag could be an ID in a snapshot table, where those are numbers from 1 on.

    QEMU looks for the snapshot that it goes back to by ID first, and then by tag (qcow2-snapshot.c).
    """
    return bool(re.fullmatch(r"[1-9][0-9]*", tag, re.ASCII))


def series_tag(prefix: str, now: datetime) -> str:
    """The name of a snapshot of a series, from the local time *now*."""
    return f"{prefix}-{now:%Y%m%dT%H%M%S}"


def series_of(tag: str) -> str | None:
    """The prefix of the series that a tag is of; None if :func:`series_tag` has not made it."""
    match = re.fullmatch(r"(.+)-[0-9]{8}T[0-9]{6}", tag, re.DOTALL)
    return match[1] if match else None


def is_of_series(tag: str, prefix: str) -> bool:
    """Whether :func:`series_tag` has made that name of *prefix*; a name made by hand is not of a series."""
    return series_of(tag) == prefix


def automatic_tag(now: datetime) -> str:
    """The name of a snapshot that was given none: do_savevm's, from the local time *now*."""
    return now.strftime("vm-%Y%m%d%H%M%S")


def second_name(tag: str) -> str:
    """The other name under which the disks may have a snapshot of *tag*.

    :raise BadUsage: it would be too long.
    """
    name = f"{tag}{SECOND_SUFFIX}"
    if len(name.encode(errors="surrogateescape")) > MAX_TAG_BYTES:
        raise BadUsage(
            f"the tag {tag!r} is too long for a live save or a safe replacement: with the {len(SECOND_SUFFIX)} bytes "
            f"of {SECOND_SUFFIX!r} behind it, it has more than {MAX_TAG_BYTES}"
        )
    return name


def free_automatic_tag(graph: BlockGraph, name: Callable[[datetime], str] = automatic_tag) -> str:
    """The automatic tag; that of a later second where it is taken, as nobody asked to replace anything.

    :param name: makes it of the local time.
    """
    taken = {row.tag for node in graph.nodes.values() for row in node.snapshots}
    now = datetime.now().astimezone()
    while (tag := name(now)) in taken:
        now += timedelta(seconds=1)
    return tag


def next_of_series(graph: BlockGraph, prefix: str) -> str:
    """The tag of the next snapshot of a series.

    :raise BadUsage: *prefix* cannot begin the names of one.
    """
    check_prefix(prefix)
    return free_automatic_tag(graph, lambda now: series_tag(prefix, now))


def check_prefix(prefix: str) -> None:
    """Refuse what cannot begin the names of a series.

    :raise BadUsage: it cannot.
    """
    if not prefix:
        raise BadUsage("the prefix is empty")
    if problem := tag_problem(series_tag(prefix, datetime(2000, 1, 1))):  # noqa: DTZ001 (any will do)
        raise BadUsage(f"{prefix!r} is not a prefix for tags: with the time behind it, {problem}")
