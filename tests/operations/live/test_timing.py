"""How long QEMU took to read all RAM, as it is kept between live saves."""

from __future__ import annotations

import pytest

from qsnap.host.hugepages import Layout
from qsnap.operations.live.timing import ReadTime, SnapshotThread

pytestmark = pytest.mark.no_qemu


@pytest.mark.parametrize("text", ["", "5", "5 6 7", "a 6", "5 -6", "5  6", "5.0 6"])
def test_a_pace_that_is_none(text: str) -> None:
    """A mark that somebody else has made, or another version."""
    assert ReadTime.decode(text) is None


def test_a_time_is_of_ram_that_is_mapped_alike() -> None:
    seen = ReadTime(30, 1000)
    assert ReadTime.decode(seen.encode()) == seen
    assert all(seen.is_of(Layout(base, 1600 - base)) for base in (900, 1000, 1100))
    assert not any(seen.is_of(Layout(base, 1600 - base)) for base in (0, 899, 1101))
    assert not ReadTime(0, 1000).is_of(Layout(1000, 600)), "that nothing was seen is not a time"


async def test_the_goal_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest is stopped then, and not when QEMU has stopped it by itself."""
    seen = iter((0, 3, 8))
    monkeypatch.setattr(SnapshotThread, "spent_ns", property(lambda _: next(seen)))

    async def is_too_late() -> bool:
        return False

    assert await SnapshotThread(None).until_it_has_spent(8, is_too_late) == 3
