"""A run: one operation on one VM, and all that a sequence needs for it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from qsnap.inventory.inventory import Inventory, look
from qsnap.inventory.lineage import Lineage, lineage
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
    :ivar first: the first look at the VM, and what was known then of where the guest is; None before it, and if the
        run does not ask for that: :meth:`remember`.
    :ivar loads: QEMU may have got the command to load, and did not refuse it before it had touched anything.
    :ivar token: that of the mark that the run has set in QEMU: see :mod:`qsnap.operations.position`.
    :ivar former: that of the mark of the load before; "" if there was not one mark, None if this run's is not set.
    """

    def __init__(self, monitor: Monitor, store: StateStore = NO_STORE, journal: Journal | None = None) -> None:
        self.monitor = monitor
        self.store = store
        self.journal = journal or Journal()
        self.first: tuple[Inventory, Lineage] | None = None
        self.token = ""
        self.former: str | None = None
        self.loads = False
        self._remembers = False

    def remember(self) -> None:
        """Find out at the first look where the guest is, because afterwards it is somewhere else."""
        self._remembers = True

    async def look(self, *, vmstate: str | None = None, exclude: Collection[str] = ()) -> Inventory:
        """Look at the VM as it is now: see :func:`qsnap.inventory.inventory.look`."""
        inventory = await look(self.monitor, self.store, vmstate=vmstate, exclude=exclude)
        if self._remembers and self.first is None:
            marks = await inventory.marks(self.monitor)
            self.first = inventory, await asyncio.to_thread(lineage, inventory, marks.names)
        return inventory

    async def shielded(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do *work* to its end, whatever interrupts it: see :func:`qsnap.runs.shield.shielded`."""
        return await shielded(work, self.journal.patience_s)
