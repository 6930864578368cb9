"""Stores of state files that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qsnap.inventory.state_store import LeftBehind, StateStore
from qsnap.model.snapshots import StateFile


class Store(StateStore):
    """A store of these state files, as it would find them beside images."""

    def __init__(self, *found: StateFile, unseen: Sequence[str] = (), left: str = "", ignores: bool = False) -> None:
        super().__init__(None, ignores_unseen=ignores)
        self._found, self._unseen, self._left = found, unseen, left

    def files(self, *_: object) -> tuple[StateFile, ...]:
        return self._found

    def unseen(self, *_: object) -> tuple[str, ...]:
        return (*self._unseen,)

    def left_behind(self, _: object, __: object, disk_tag: str) -> LeftBehind | None:
        return LeftBehind(Path("/former"), Path("/now"), None) if disk_tag == self._left else None


def file(tag: str, **more: Any) -> StateFile:
    fields: dict[str, Any] = {
        "vm_state_size": 5,
        "date": datetime(2026, 1, 1, tzinfo=UTC),
        "vm_clock_ns": 1,
        "size": 9,
        "disk_tag": tag,
    }
    return StateFile(path=f"/{tag}", image="/a", **(fields | more))
