"""The load itself, for a stopped guest: a delta load if its result is certainly the same, or else a full load."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

from qsnap.errors import (
    UNTOUCHED,
    GuestLeftStopped,
    JobFailed,
    NotSupported,
    OperationTimeout,
    PrecheckRefused,
    VerifyFailed,
)
from qsnap.inventory import state_file
from qsnap.model.checks import Finding
from qsnap.model.snapshots import Snapshot
from qsnap.operations.delta import BrokenState, NoDelta
from qsnap.operations.findings import damaged_finding
from qsnap.runs.run import Run

if TYPE_CHECKING:
    from qsnap.inventory.vm_state import Place
    from qsnap.operations.delta.delta import Comparison, Delta
    from qsnap.operations.load_attempt import LoadAttempt
    from qsnap.operations.plan import LoadPlan


class Source(NamedTuple):
    """The source of the whole VM state for QEMU, and all nodes that take part in the load.

    :ivar state: where it can be read: its place in an image, or the open state file of a live snapshot; None if it
        cannot be seen from here.
    """

    vmstate: str
    devices: Sequence[str]
    state: Place | int | None


def refuse_flawed(file: int, snapshot: Snapshot, standing: str = UNTOUCHED) -> None:
    """Refuse an open state file that differs from what qsnap wrote.

    :raise PrecheckRefused: the file is damaged.
    """
    assert snapshot.file is not None
    if problem := state_file.flaw(lambda size, offset: os.pread(file, size, offset), os.fstat(file).st_size):
        finding = Finding.refusal(
            "state-file-damaged",
            f"the state file {snapshot.file.path} is damaged: {problem}",
            "if there is a good copy of the file, put that in its place; or load another snapshot",
        )
        raise PrecheckRefused(f"snapshot {snapshot.tag!r} cannot be loaded", [finding], standing)


async def refuse_incomparable(run: Run, plan: LoadPlan, source: Source) -> None:
    """Check that RAM can be compared with a snapshot, as far as that is known before the guest is touched.

    :raise NotSupported: RAM cannot be compared.
    """
    from qsnap.operations.delta.delta import comparison

    try:
        async with comparison(run, plan.snapshot, source.state, plan.peripherals, only_checks=True):
            pass
    except NoDelta as reason:
        raise NotSupported(f"{plan.snapshot.tag!r} cannot be verified: {reason}; {UNTOUCHED}") from reason


class Load:
    """A load of one snapshot.

    :param source: where its whole VM state is.
    :param attempt: has QEMU load.
    :param verify: RAM is to be compared after the load.
    :param force: load also if the VM state is damaged.
    :ivar why_full: why everything was loaded; "" where it was what differs.
    :ivar ram_bytes: bytes of RAM that differed, where it was that.
    :ivar found_by: how these were found, where it was that.
    :ivar differing_pages: pages of RAM that differ from the snapshot after the load; None before they are compared.
    """

    def __init__(
        self, run: Run, plan: LoadPlan, source: Source, attempt: LoadAttempt, *, verify: bool, force: bool
    ) -> None:
        self.why_full = ""
        self.ram_bytes: int | None = None
        self.found_by: Literal["soft-dirty", "comparison"] | None = None
        self.differing_pages: int | None = None
        self._run = run
        self._snapshot = plan.snapshot
        self._peripherals = plan.peripherals
        self._devices = plan.devices
        self._source = source
        self._attempt = attempt
        self._verifies = verify
        self._force = force
        self._comparison: Comparison | None = None
        self._delta: Delta | None = None

    @asynccontextmanager
    async def compared(self, why_full: str, standing: str) -> AsyncIterator[None]:
        """Compare RAM with the snapshot; for the duration of a block there is what differs, for QEMU to load.

        :param why_full: why everything is to be loaded, whatever differs; "" if only what differs is.
        :param standing: what a refusal says of the guest.
        :raise NotSupported: it cannot be compared, and is to be verified; nothing was loaded.
        :raise PrecheckRefused: it is damaged; nothing was loaded.
        """
        self.why_full = why_full
        async with AsyncExitStack() as stack:
            try:
                if not why_full or self._verifies:
                    from qsnap.operations.delta.delta import comparison

                    found = comparison(self._run, self._snapshot, self._source.state, self._peripherals)
                    self._comparison = await stack.enter_async_context(found)
                    if not why_full:
                        self._delta = await stack.enter_async_context(self._comparison.delta())
                        self.ram_bytes, self.found_by = self._delta.ram_bytes, self._delta.found_by
            except NoDelta as reason:
                self.why_full = str(reason)
                if isinstance(reason, BrokenState) and not self._force:
                    raise PrecheckRefused(
                        f"snapshot {self._snapshot.tag!r} cannot be loaded", [damaged_finding(reason)], standing
                    ) from reason
                if isinstance(self._source.state, int):  # it may have been damaged since it was looked at
                    await asyncio.to_thread(refuse_flawed, self._source.state, self._snapshot, standing)
                if self._verifies and self._comparison is None:
                    raise NotSupported(f"RAM cannot be compared: {reason}; {standing}") from reason
            yield
            if self._comparison is not None and not self.why_full:  # the guest runs again by now
                await self._comparison.settle()

    async def load(self) -> None:
        """Have QEMU load. An interrupt takes effect when it is certain what that has made."""
        if self._comparison is None or self._delta is None:
            await self._load_full()
            return
        devices = (*self._devices, self._delta.node)
        is_sure = self._comparison.is_still and not self._verifies
        try:
            is_seen = await self._attempt.load(self._delta.node, devices, is_sure=is_sure)
            doubt = "" if is_seen else "the monitor was lost during the delta load"
        except JobFailed as failure:
            doubt = f"QEMU did not load what differs: {failure.reason}"
        except asyncio.CancelledError:
            await self._made_sure(self._comparison, "")
            raise
        await self._made_sure(self._comparison, doubt)

    async def _made_sure(self, compared: Comparison, doubt: str) -> None:
        """Make sure of what the delta load has made, whatever interrupts us. Until then the guest must not run.

        :raise GuestLeftStopped: it cannot be made sure in time.
        """
        self._attempt.doubt()
        try:
            await self._run.shielded(self._make_sure(compared, doubt))
        except OperationTimeout as error:
            raise GuestLeftStopped(
                f"RAM was loaded, and not compared with {self._snapshot.tag!r}: {error}. So the guest is left stopped; "
                f"load a good snapshot (`qsnap list`, `qsnap load TAG --running`)"
            ) from error

    async def _make_sure(self, compared: Comparison, doubt: str) -> None:
        """Load everything if it is not certain what the delta load has made."""
        if not doubt and compared.was_resumed:
            doubt = "another client has resumed the guest during the delta load"
        if not doubt and (self._verifies or not compared.is_still):
            try:
                self.differing_pages = await compared.differing()
            except NoDelta as reason:
                doubt = f"the delta load could not be verified: {reason}"
            if self.differing_pages:
                doubt = f"{self.differing_pages} pages of RAM differed after the delta load"
        if doubt:
            self.why_full = doubt
            self.ram_bytes = self.found_by = self.differing_pages = None
            await self._load_full()
        self._attempt.be_sure()

    async def _load_full(self) -> None:
        try:
            await self._attempt.load(self._source.vmstate, self._source.devices)
        except JobFailed as failure:
            await self._attempt.fail(failure)

    async def verify(self) -> None:
        """Compare all of RAM with the snapshot, where that is to be and is not done.

        :raise VerifyFailed: it cannot be done.
        """
        if not self._verifies or self._comparison is None or self.differing_pages is not None:
            return
        reason: object = "another client has resumed the guest meanwhile" if self._comparison.was_resumed else None
        if reason is None:
            try:
                self.differing_pages = await self._comparison.differing()
            except NoDelta as error:
                reason = error
        if reason is not None:
            problem = f"it is loaded, and RAM could not be compared with it: {reason}"
            raise VerifyFailed(self._snapshot.tag, [problem])
