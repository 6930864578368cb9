"""A QEMU, as the sequences use it: the verbs that they need, over any transport."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from qsnap.errors import JobFailed, QsnapError
from qsnap.model.qemu import BlockGraph, Job, Migration, QemuVersion, RunState, SnapshotTables

if TYPE_CHECKING:
    import socket

    from qsnap.monitor.address import Address
    from qsnap.monitor.qmp.background import Background

#: See :attr:`Monitor.live_obstacle`.
NO_FILES = "this monitor cannot hand QEMU a file, which takes QMP over a UNIX socket, and QEMU 6.0 or later"


class Monitor(Protocol):
    """A QEMU.

    The ``snapshot_*`` verbs return when the work has succeeded and nothing of it is left in QEMU's job list,
    or raise JobFailed with QEMU's own sentence. They have no time-out of their own: QEMU answers nobody while
    it writes. Any verb may raise MonitorLost. When one is cancelled, the work goes on inside QEMU;
    :meth:`settle` waits for its end.
    """

    #: Where the monitor is.
    address: Address
    version: QemuVersion
    #: "qmp" (snapshot jobs), "qmp-hmp" (savevm by human-monitor-command) or "hmp", for people and logs.
    transport: str
    #: False: QEMU itself chooses the devices and the vmstate node (HMP savevm).
    chooses_devices: bool
    #: The process at the other end, where it is on this machine and the socket tells: QEMU, or a proxy before it.
    pid: int | None
    #: The connection itself, for a guard to inherit; None where there is none.
    sock: socket.socket | None

    @property
    def live(self) -> Background:
        """The verbs for live snapshots.

        :raise NotSupported: this monitor does not have them.
        """

    @property
    def live_obstacle(self) -> str:
        """Why no live snapshot can be made or loaded over this monitor; "" if it can."""

    @property
    def who(self) -> str:
        """Who it is that cannot do what HMP cannot, for messages."""

    def tag_obstacle(self, tag: str) -> str | None:
        """Why a valid *tag* cannot be sent over this transport; None if it can."""

    async def runstate(self) -> RunState:
        """The guest's run state."""

    async def stop(self) -> float | None:
        """Stop the guest; return QEMU's time stamp of the stop in seconds since 1970, or None."""

    async def cont(self) -> float | None:
        """Resume the guest; return QEMU's time stamp of that in seconds since 1970, or None.

        :raise CommandFailed: QEMU refuses to resume it.
        """

    async def reset(self) -> None:
        """Request a reset of the guest; QEMU does it a little later. With -no-reboot it shuts the guest down."""

    async def name(self) -> str:
        """The guest's -name; "" without."""

    async def human_answer(self, line: str) -> str:
        """HMP's answer to *line*; an error is text, too."""

    async def block_graph(self) -> BlockGraph:
        """Every block node with its snapshots and its users; and all devices that the user gave the guest."""

    async def snapshot_tables(self) -> SnapshotTables:
        """Only the snapshot tables, by node-name, with one command, to read them again after a change."""

    async def migration(self) -> Migration:
        """The state of migration, which shares its code with savevm."""

    async def memory_size(self) -> int:
        """Bytes of RAM, hot-plugged memory included."""

    async def snapshot_save(self, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        """Write RAM and device state to *vmstate* and snapshot *devices*, all under *tag*."""

    def snapshot_load(
        self, tag: str, vmstate: str, devices: Sequence[str]
    ) -> AbstractAsyncContextManager[JobFailed | None]:
        """Put back what *tag* holds. A failure may leave RAM and disks half restored.

        The block gets the error, or None, while QEMU still keeps the job: if a process dies before it has noted the end
        of the load, the next one can read it there. The error is raised after the block.
        """

    async def snapshot_delete(self, tag: str, devices: Sequence[str]) -> None:
        """Remove one snapshot with that *tag* from each of *devices*; QEMU reports no error if there is none."""

    async def mark(self, name: str) -> str | None:
        """The text of a mark that a qsnap has set since this QEMU was started; None if there is none.

        "" if an object has that name and is not a mark.

        A mark is an object of no effect in QEMU. It is the same over every monitor of a VM, and ends with its QEMU.
        """

    async def marks(self, prefixes: tuple[str, ...]) -> Sequence[str]:
        """The names of the marks that begin with one of these."""

    async def set_mark(self, name: str, text: str) -> bool:
        """Set a mark; False if a mark with that name exists. If two processes try at once, one succeeds.

        :param text: at most 900 of the characters that base64 has in URLs.
        """

    async def clear_mark(self, name: str) -> None:
        """Remove a mark, if it exists."""

    async def take_over(self, pid: int) -> None:
        """Count what the qsnap of process *pid* began as begun here, so that :meth:`settle` waits for it."""

    async def settle(self) -> QsnapError | None:
        """Wait until nothing that a cancelled verb began is under way any more, and clear it away.

        Return the error with which it ended; None if it succeeded or nothing was under way.
        """

    async def load_outcome(self, doubt: QsnapError, *, was_running: bool) -> QsnapError | None:
        """The error of a load whose end was not seen; None if it succeeded, *doubt* if nothing shows the end."""

    async def leftover_jobs(self) -> Sequence[Job]:
        """Jobs of an earlier qsnap that has ended: they stay in QEMU until somebody dismisses them."""

    async def dismiss(self, jobs: Sequence[Job]) -> None:
        """Clear concluded jobs away."""

    async def tidy(self) -> None:
        """Remove from QEMU the state files that it was given; it is not an error if there are none."""

    async def reconnect(self, timeout_s: float) -> None:
        """Open the connection anew after it was lost. What was under way is then known to :meth:`settle`.

        Only the mark of a claim shows whether it leads to the same QEMU: see
        :func:`qsnap.runs.pause.reconnect`.

        :param timeout_s: seconds until the greeting; QEMU sends none while it writes.
        :raise AnotherAnswers: a QEMU of another version, or another kind of monitor, is there.
        :raise MonitorError: as :func:`qsnap.monitor.opening.open_monitor`.
        """

    async def aclose(self) -> None:
        """Close the connection. Never raises, and takes no time."""
