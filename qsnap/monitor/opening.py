"""Connecting to a QEMU: which monitor is at an address, or at the other end of a dead process's connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qsnap.monitor.protocol import Monitor

if TYPE_CHECKING:
    import socket

    from qsnap.monitor.address import Address

#: Seconds for connecting and for the greeting. QEMU greets within milliseconds unless its main loop is
#: frozen by a save, or another client holds the monitor.
GREETING_TIMEOUT_S = 5.0


async def adopt_monitor(sock: socket.socket, address: Address, transport: str) -> Monitor:
    """Go on with the connection of a process that has died, in whatever state it left it.

    It waits for QEMU's answer as long as the connection stands, because QEMU answers nobody while it writes.

    :param transport: that of the monitor: see :attr:`qsnap.monitor.Monitor.transport`.
    :raise MonitorError: the connection is closed, or another kind of monitor is at its end.
    """
    if transport == "hmp":
        from qsnap.monitor.hmp import monitor as hmp

        return await hmp.adopt(sock, address)
    from qsnap.monitor.qmp import monitor as qmp

    return await qmp.adopt(sock, address)


async def open_monitor(
    address: Address, *, timeout_s: float = GREETING_TIMEOUT_S, snapshot_jobs: bool | None = None
) -> Monitor:
    """Connect to the monitor at *address*, and find out by its first bytes which one it is.

    :param timeout_s: seconds until the greeting has come. Default 5.
    :param snapshot_jobs: for QMP: whether to use the jobs that QEMU has since 6.0. Default: if this QEMU has
        them; False uses HMP's savevm inside QMP.
    :raise ConnectError: nothing listens there, it may not be opened, or it is not a monitor.
    :raise MonitorBusy: it does not greet in time.
    """
    from qsnap.monitor.connection import connection

    async with connection(address, timeout_s) as link:
        if link.protocol == "hmp":
            from qsnap.monitor.hmp import monitor as hmp

            return await hmp.connect(link, address)
        from qsnap.monitor.qmp import monitor as qmp

        return await qmp.connect(link, address, snapshot_jobs)
