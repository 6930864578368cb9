"""Other writers of the guest's memory: with them, what QEMU saves or compares is not of one moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from qsnap.host import processes
from qsnap.model import outside
from qsnap.model.qemu import Peripheral
from qsnap.monitor import Monitor


async def other_writers(monitor: Monitor, peripherals: Sequence[Peripheral]) -> Sequence[str]:
    """What may write into guest memory and is not QEMU, in words: a device has it written, or a process has it mapped.

    :param peripherals: the guest's devices.
    :raise OSError: the memory is shared, and whether another process has it mapped cannot be seen.
    """
    writers = [f"device {one.label!r} ({one.model})" for one in peripherals if outside.writes_ram(one.model)]
    writers += await monitor.live.writers()
    if writers or not await monitor.live.shares_memory():
        return writers
    if monitor.pid is None:
        raise FileNotFoundError
    sharers = await asyncio.to_thread(processes.sharers, monitor.pid, await monitor.memory_size())
    return [f"process {pid}, which has it mapped," for pid in sharers]
