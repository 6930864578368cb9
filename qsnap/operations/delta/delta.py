"""Compare the guest with the snapshot that is to be loaded, and have QEMU load no more than what differs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Literal, NamedTuple

from qsnap.errors import CommandFailed, JobFailed, NotSupported, QsnapError
from qsnap.host import files, memory, soft_dirty
from qsnap.inventory import state_file, vm_state
from qsnap.inventory.qcow2 import Damaged, Unreadable
from qsnap.inventory.rows import PAGE
from qsnap.inventory.state_file import STREAM_OFFSET, Content
from qsnap.inventory.stream import Broken, Unknown
from qsnap.inventory.vm_state import Place, VmState
from qsnap.model.qemu import Peripheral
from qsnap.model.snapshots import Snapshot
from qsnap.monitor.names import STATE_NODE, state_node
from qsnap.monitor.qmp.background import Background
from qsnap.operations.delta import BrokenState, NoDelta, difference, ram
from qsnap.operations.delta.base import Base
from qsnap.operations.delta.comparers import Comparers
from qsnap.operations.delta.difference import Found, Layout, Output, Parts, TooMuch, Whole
from qsnap.operations.delta.ram import GuestRam
from qsnap.runs.journal import AFTERMATH_TIMEOUT_S
from qsnap.runs.run import Run
from qsnap.runs.shield import in_thread, shielded

#: A stream that is longer than this and than half of the state gains too little. It is in memory for the time of the
#: load, and may take a quarter of what is free.
_ALWAYS_BYTES = 64 << 20
_SHARE_OF_MEMORY = 4


class Delta(NamedTuple):
    """A stream of the differences, as a node in QEMU.

    :ivar node: its node-name.
    :ivar ram_bytes: bytes of RAM in it that differ.
    :ivar found_by: what was compared: what is maybe written, or all of RAM.
    """

    node: str
    ram_bytes: int
    found_by: Literal["soft-dirty", "comparison"]


class Comparison:
    """A comparison of the guest's RAM with the snapshot's. Its result is valid as long as the guest is stopped."""

    def __init__(
        self,
        background: Background,
        guest: GuestRam,
        comparers: Comparers,
        state: VmState,
        snapshot: Snapshot,
        base: Base,
    ) -> None:
        self._background = background
        self._guest = guest
        self._comparers = comparers
        self._state = state
        self._snapshot = snapshot
        self._base = base
        self._layout: Layout | None = None
        self._whole = Whole(state, guest.blocks)

    @property
    def is_still(self) -> bool:
        """Whether no device writes RAM while the guest is stopped, as far as its devices are known."""
        return self._guest.is_still

    @property
    def was_resumed(self) -> bool:
        """Whether the guest ran since the comparison began."""
        return any(name == "RESUME" for name, _ in self._background.stop_resume_events())

    @asynccontextmanager
    async def delta(self) -> AsyncIterator[Delta]:
        """The differences, as a node for the duration of a block.

        The stream is in a file without a name, in memory: if a process dies, nothing but the node is left.

        :raise NoDelta: a delta load is not possible, or gains nothing.
        """
        with files.in_memory(STATE_NODE) as file:
            try:
                with _doubts():
                    found = await in_thread(lambda ended: self._written(file, ended))
                    node = state_node()
                    await self._background.add_state_node(file, node)
                if self.was_resumed:
                    raise NoDelta("another client has resumed the guest during the comparison")
                found_by: Literal["soft-dirty", "comparison"] = "soft-dirty" if self._layout else "comparison"
                yield Delta(node, found.differing * PAGE, found_by)
            finally:
                if self._snapshot.file is None:  # that of a state file is still needed, and goes together with this one
                    with suppress(QsnapError):
                        await shielded(self._background.tidy(), AFTERMATH_TIMEOUT_S)

    def _written(self, file: int, ended: threading.Event) -> Found:
        """Compare, and write the stream and what makes it a state file."""
        most = min(max(self._state.size // 2, _ALWAYS_BYTES), memory.available_bytes() // _SHARE_OF_MEMORY)
        output = Output(file, STREAM_OFFSET, most)
        guest, state = self._guest, self._state
        states, self._layout = self._base.begin(state.identity)
        source = self._whole if self._layout is None else Parts(state, self._layout, states, guest.blocks)
        found = difference.walk(
            source, self._comparers, guest.blocks, ended, states=states, write=output.write, accept=guest.refuse_board
        )
        content = Content(
            tag=self._snapshot.disk_tag,
            image="",
            vm_state_size=output.size,
            date=self._snapshot.date,
            vm_clock_ns=self._snapshot.vm_clock_ns,
        )
        for offset, data in state_file.envelope(content):
            files.write(file, data, offset)
        return found

    async def differing(self) -> int:
        """Compare again, after a load; return the number of pages that differ.

        :raise NoDelta: the comparison is not possible.
        """
        guest = self._guest
        with _doubts():
            whole = Whole(self._state, guest.blocks)
            found = await in_thread(lambda ended: difference.walk(whole, self._comparers, guest.blocks, ended))
        return found.differing

    async def settle(self) -> None:
        """Let the next load profit from this one, which has put all differences back."""
        await asyncio.to_thread(self._base.settle, self._state.identity, self._layout or self._whole.layout())


@asynccontextmanager
async def comparison(
    run: Run,
    snapshot: Snapshot,
    state: Place | int | None,
    peripherals: Sequence[Peripheral],
    *,
    only_checks: bool = False,
) -> AsyncIterator[Comparison]:
    """A comparison with a snapshot, for the duration of a block.

    :param state: where its VM state is, as for :func:`qsnap.inventory.vm_state.of_snapshot`.
    :param peripherals: the guest's devices.
    :param only_checks: check only whether a comparison is possible; start no helpers.
    :raise NoDelta: the RAM of the guest or of the snapshot cannot be seen from here; or others than QEMU may write RAM.
    """
    monitor = run.monitor
    pid = ram.process(monitor)
    background = monitor.live
    background.forget_stop_resume_events()
    is_kept = soft_dirty.is_kept()
    with ExitStack() as stack:

        def opened(_: threading.Event) -> VmState:
            found = vm_state.of_snapshot(snapshot, state)
            stack.callback(found.close)
            return found

        with _doubts():
            found = await in_thread(opened)
            comparers = stack.enter_context(Comparers(found, pid))
            if not is_kept and not only_checks:  # it will be all of RAM
                comparers.start(found.size)
            guest = await ram.find(monitor, pid, peripherals, firmware=is_kept)
        yield Comparison(background, guest, comparers, found, snapshot, Base(guest, run.token, run.former))


@contextmanager
def _doubts() -> Iterator[None]:
    """Whatever goes wrong in a block means that there is no delta load: nothing has been done by then."""
    try:
        yield
    except TooMuch as error:
        raise NoDelta("so much of RAM differs that a delta load would gain nothing") from error
    except PermissionError as error:
        raise NoDelta(f"this user may not read QEMU's memory, or the VM state: {error.strerror}") from error
    except OSError as error:
        raise NoDelta(f"QEMU's memory, or the VM state, cannot be read: {error.strerror}") from error
    except (Broken, Damaged) as error:
        raise BrokenState(str(error)) from error
    except (Unknown, Unreadable) as error:
        raise NoDelta(f"the VM state cannot be compared: {error}") from error
    except MemoryError as error:
        raise NoDelta("there is too little memory for it") from error
    except (CommandFailed, JobFailed, NotSupported) as error:
        raise NoDelta(f"QEMU refuses a command that it takes: {error}") from error
