"""A run: one operation on one VM, and all that a sequence needs for it."""

from __future__ import annotations

from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from qsnap.inventory.inventory import Inventory, look
from qsnap.inventory.state_store import NO_STORE, StateStore
from qsnap.monitor import Monitor
from qsnap.runs.journal import Journal
from qsnap.runs.shield import shielded

_T = TypeVar("_T")


class Run:
    """The objects that a sequence works with.

    :ivar monitor: QEMU's monitor.
    :ivar store: the store of the state files of live saves. Default: qsnap looks for none.
    :ivar journal: the journal of the claim. Without a claim, nobody completes or undoes the work if we are killed.
    """

    def __init__(self, monitor: Monitor, store: StateStore = NO_STORE, journal: Journal | None = None) -> None:
        self.monitor = monitor
        self.store = store
        self.journal = journal or Journal()

    async def look(self, *, vmstate: str | None = None, exclude: Collection[str] = ()) -> Inventory:
        """Look at the VM as it is now: see :func:`qsnap.inventory.inventory.look`."""
        return await look(self.monitor, self.store, vmstate=vmstate, exclude=exclude)

    async def shielded(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do *work* to its end, whatever interrupts it: see :func:`qsnap.runs.shield.shielded`."""
        return await shielded(work, self.journal.patience_s)
