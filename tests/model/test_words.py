"""Tags, descriptions and run states: which are good, and that unknown states are kept."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from qsnap.errors import BadUsage
from qsnap.inventory.notes import MAX_DESCRIPTION, checked_description
from qsnap.model.qemu import NodeSnapshot, RunState
from qsnap.tags import (
    MAX_TAG_BYTES,
    all_series,
    automatic_tag,
    check_prefix,
    free_automatic_tag,
    is_of_series,
    looks_like_id,
    next_of_series,
    series_of,
    series_tag,
    tag_problem,
)
from support.graphs import graph, node

pytestmark = pytest.mark.no_qemu


def test_tags() -> None:
    assert tag_problem("x" * 255) is None
    assert tag_problem("ü" * 127) is tag_problem("a b\xa0~") is None
    for bad in ("", "x" * 256, "ü" * 128, "a\x00", "\x1f", "\x7f", "\x9f", "\udcff"):
        assert tag_problem(bad)
    assert automatic_tag(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) == "vm-20260102030405"


def test_descriptions() -> None:
    longest = "x" * MAX_DESCRIPTION
    assert checked_description(longest) == longest
    for bad in (longest + "x", "two\nlines", "\x9b", "\udcff"):
        with pytest.raises(BadUsage):
            checked_description(bad)


def test_run_states_that_are_not_known_are_kept() -> None:
    state = RunState("hibernating")
    assert (state, str(state), state.value) == ("hibernating", "hibernating", "hibernating")
    assert RunState("running") is RunState.RUNNING


def test_tags_of_a_series() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert series_tag("a-b", moment) == "a-b-20260102T030405"
    assert [series_of(tag) for tag in ("a-b-20260102T030405", "a\n-20260102T030405")] == ["a-b", "a\n"]
    for other in (
        "-20260102T030405",
        "a-20260102T03040",
        "a-20260102t030405",
        "a20260102T030405",
        "a-20260102T0304055",
    ):
        assert series_of(other) is None
    assert is_of_series("a-20260102T030405", "a")
    assert not is_of_series("a-20260102T030405", "b")
    assert all_series(["b-20260102T030405", "x", "a-20260102T030405", "b-20270102T030405"]) == ("a", "b")
    assert [tag for tag in ("1", "90", "0", "01", "1a", "\u0661", "") if looks_like_id(tag)] == ["1", "90"]


def test_prefixes() -> None:
    longest = "x" * (MAX_TAG_BYTES - len("-20260102T030405"))
    for good in ("a b", longest):
        check_prefix(good)
        assert is_of_series(next_of_series(graph(), good), good)
    for bad, words in (
        ("", "the prefix is empty"),
        (f"{longest}x", "is not a prefix for tags: with the time behind it, the tag has 256 bytes"),
        ("a\n", "control characters"),
    ):
        with pytest.raises(BadUsage, match=words):
            next_of_series(graph(), bad)


@pytest.mark.parametrize(("taken", "free"), [([90], 91), ([80, 90], 91), ([90, 91, 92], 93), (range(300), 300)])
def test_an_automatic_tag_comes_after_all_that_are_ahead(taken: Sequence[int], free: int) -> None:
    """However many there are; and nothing is replaced."""
    now = datetime.now().astimezone()
    rows = tuple(
        NodeSnapshot(tag=automatic_tag(now + timedelta(seconds=n)), id="1", vm_state_size=0, date=now, vm_clock_ns=0)
        for n in taken
    )
    assert free_automatic_tag(graph(node("a", snapshots=rows))) == automatic_tag(now + timedelta(seconds=free))


def test_an_automatic_tag_is_the_time() -> None:
    before = datetime.now().astimezone()
    tag = free_automatic_tag(graph(node("a")))
    assert automatic_tag(before) <= tag <= automatic_tag(datetime.now().astimezone())
