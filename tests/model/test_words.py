"""Tags, descriptions and run states: which are good, and that unknown states are kept."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from qsnap.errors import BadUsage
from qsnap.inventory.notes import MAX_DESCRIPTION, checked_description
from qsnap.model.qemu import RunState
from qsnap.tags import automatic_tag, tag_problem

pytestmark = pytest.mark.no_qemu


def test_tags() -> None:
    assert tag_problem("x" * 255) is None
    assert tag_problem("ü" * 127) is None
    for bad in ("", "x" * 256, "ü" * 128, "a\x00", "\x1f", "\x7f", "\x9b", "\udcff"):
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
