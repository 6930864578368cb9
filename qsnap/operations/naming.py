"""The tags that qsnap chooses itself: that of a snapshot without a name, and the next one of a series."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from qsnap.errors import BadUsage
from qsnap.model.qemu import BlockGraph, automatic_tag, series_tag, tag_problem


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
