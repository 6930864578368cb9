"""What a tag may be, and every name that qsnap makes of one. Pure.

Which of these names the disks have is decided by ``qsnap/inventory/snapshots.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

from qsnap.errors import BadUsage
from qsnap.model.qemu import BlockGraph

#: A tag's greatest length in bytes of UTF-8: QEMUSnapshotInfo.name is char[256] (block/snapshot.h).
MAX_TAG_BYTES = 255
#: The suffix of a tag's second name. If an older snapshot stays while a new one is made, the disks hold the new one
#: under the second name, or under the tag itself if the older one has the second name.
SECOND_SUFFIX = ".qsnap-2"
#: Suffixes that no user's tag may have. Earlier versions of qsnap used the last one for such a snapshot.
RESERVED_SUFFIXES = (SECOND_SUFFIX, ".qsnap-stand-in")

#: Seconds by which automatic tags are looked for ahead of the time: there is one for each save within a second.
_AHEAD_S = 120

#: The series of what loads have discarded: ``load --save-current`` makes it, and ``undo`` loads it.
UNDO_SERIES = "before-load"


def tag_problem(tag: str) -> str | None:
    """Why QEMU or a terminal would change this tag; None for a good tag.

    QEMU accepts an empty tag, silently cuts a long one, and control characters break HMP.
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
    """Whether a tag could be an ID in a snapshot table: IDs are numbers from 1 on.

    For a load, QEMU looks a snapshot up by ID first, and then by tag (qcow2-snapshot.c).
    """
    return bool(re.fullmatch(r"[1-9][0-9]*", tag, re.ASCII))


def series_tag(prefix: str, now: datetime) -> str:
    """The name of a snapshot of a series, from the local time *now*."""
    return f"{prefix}-{now:%Y%m%dT%H%M%S}"


def series_of(tag: str) -> str | None:
    """The prefix of the series that a tag belongs to; None if :func:`series_tag` did not make it."""
    match = re.fullmatch(r"(.+)-[0-9]{8}T[0-9]{6}", tag, re.DOTALL)
    return match[1] if match else None


def all_series(tags: Iterable[str]) -> tuple[str, ...]:
    """The prefixes of the series that *tags* belong to, sorted."""
    return tuple(sorted(filter(None, set(map(series_of, tags)))))


def is_of_series(tag: str, prefix: str) -> bool:
    """Whether :func:`series_tag` made that tag from *prefix*; a tag made by hand belongs to no series."""
    return series_of(tag) == prefix


def automatic_tag(now: datetime) -> str:
    """The tag of a snapshot without a name from the user: as do_savevm makes it, from the local time *now*."""
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
    """The automatic tag; if it is taken, that of a later second, because nobody asked to replace anything.

    It comes after all that are ahead of the time for that reason, so that the names stay in order.

    :param name: makes the tag from the local time.
    """
    taken = {row.tag for node in graph.nodes.values() for row in node.snapshots}
    now = datetime.now().astimezone()
    ahead = [second for second in range(_AHEAD_S) if name(now + timedelta(seconds=second)) in taken]
    now += timedelta(seconds=ahead[-1] + 1 if ahead else 0)
    while (tag := name(now)) in taken:
        now += timedelta(seconds=1)
    return tag


def next_of_series(graph: BlockGraph, prefix: str) -> str:
    """The tag of the next snapshot of a series.

    :raise BadUsage: *prefix* cannot begin the tags of a series.
    """
    check_prefix(prefix)
    return free_automatic_tag(graph, lambda now: series_tag(prefix, now))


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that cannot begin the tags of a series.

    :raise BadUsage: *prefix* cannot.
    """
    if not prefix:
        raise BadUsage("the prefix is empty")
    if problem := tag_problem(series_tag(prefix, datetime(2000, 1, 1))):  # noqa: DTZ001 (any will do)
        raise BadUsage(f"{prefix!r} is not a prefix for tags: with the time behind it, {problem}")
