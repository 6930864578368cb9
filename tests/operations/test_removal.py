"""Which snapshots are not removed because their RAM may be in a file that is out of sight, or must be left alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from qsnap.inventory.inventory import Inventory
from qsnap.inventory.state_store import NO_STORE, StateStore
from qsnap.model.snapshots import StateFile
from qsnap.operations.removal import _unseen_states
from support.fake_monitor import FakeMonitor
from support.state_files import DATE

pytestmark = pytest.mark.no_qemu

FILE = StateFile(path="/p", size=99, disk_tag="t", image="/i", vm_state_size=10, date=DATE, vm_clock_ns=1)


@pytest.mark.parametrize(
    ("has_state", "file", "codes"),
    [
        (True, None, []),
        (False, {}, []),
        (False, {"is_whole": False, "vm_state_size": 0, "trouble": "is cut short"}, []),
        (False, {"is_readable": False}, ["state-file-unreadable"]),
        (False, {"holds": "another"}, ["state-file-mixed-up"]),
        (False, None, ["unseen-state-file"]),
    ],
)
async def test_where_the_state_is(
    monkeypatch: pytest.MonkeyPatch, has_state: bool, file: dict[str, Any] | None, codes: list[str]
) -> None:
    monitor = FakeMonitor()
    await monitor.snapshot_save("t", "disk0" if has_state else "none", ["disk0", "disk1"])
    files = () if file is None else (msgspec.structs.replace(FILE, **file),)
    for store, found in (StateStore(None), codes), (NO_STORE, []):
        with monkeypatch.context() as patched:
            patched.setattr(store, "files", lambda *_: files)
            inventory = Inventory(await monitor.block_graph(), store)
            assert [finding.code for finding in _unseen_states(inventory, inventory.snapshots)] == found
