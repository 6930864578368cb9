"""Whether a guest runs, as far as that can be seen from outside, whatever the guest is.

A run state "running" does not tell: a guest that hangs has it too. What counts is that a vCPU does something, by one of
two signs:

* Its registers have changed from one look to the next.
* It sleeps, and was woken several times between two looks: a guest that is idle, with a timer. On x86 it must let
  interrupts through, because QEMU wakes a vCPU for each interrupt, and one that has them off goes to sleep again.

A guest that has halted with interrupts off, or goes round in a loop of one instruction, shows neither. One that goes
round in a longer loop with interrupts off cannot be told from one that works.

Facts: proc(5), /proc/PID/task/TID/status, voluntary_ctxt_switches; QEMU's ``info registers`` (target/i386/cpu-dump.c:
EFL and HLT), with TCG and with KVM.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qsnap.monitor import Monitor

#: Seconds between two looks: an idle Linux wakes up several times a second.
_LOOK_S = 0.5
#: How often a vCPU must have been woken between two looks. The first one may be due to the look before.
_WOKEN = 3
_INTERRUPTS_ON = 0x200


async def sign_of_life(monitor: Monitor, pid: int, within_s: float) -> tuple[str, int]:
    """Wait for a sign that the guest runs.

    :return: the sign, a clause, "" if there was none; and the number of vCPUs.
    """
    deadline = time.monotonic() + within_s
    # "* CPU #0: thread_id=1234"
    rows = re.findall(r"CPU #(\d+):.*?thread_id=(\d+)", await monitor.human_answer("info cpus"))
    threads = {int(number): int(thread) for number, thread in rows}
    before = await _registers(monitor)
    while True:
        woken = {number: _sleeps(pid, thread) for number, thread in threads.items()}
        await asyncio.sleep(min(_LOOK_S, max(0.0, deadline - time.monotonic())))
        times = {number: _sleeps(pid, thread) - woken[number] for number, thread in threads.items()}
        now = await _registers(monitor)
        for number, text in now.items():
            if text != before.get(number):
                return f"vCPU {number} executes instructions", len(threads)
            if times.get(number, 0) >= _WOKEN and _is_open(text):
                return f"vCPU {number} is idle, and was woken {times[number]} times in {_LOOK_S:g} s", len(threads)
        if time.monotonic() >= deadline:
            return "", len(threads)
        before = now


async def _registers(monitor: Monitor) -> Mapping[int, str]:
    """The registers of each vCPU, as text."""
    _, *parts = re.split(r"^CPU#(\d+)\s*$", await monitor.human_answer("info registers -a"), flags=re.M)
    return dict(zip(map(int, parts[::2]), parts[1::2], strict=True))


def _is_open(registers: str) -> bool:
    """Whether a vCPU lets interrupts through, as far as its registers are known."""
    flags = re.search(r"\b[RE]FL=([0-9a-f]+)", registers)
    return flags is None or bool(int(flags[1], 16) & _INTERRUPTS_ON)


def _sleeps(pid: int, thread: int) -> int:
    """How often a thread has gone to sleep by itself; 0 if that cannot be seen."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/task/{thread}/status").read_text()
        if match := re.search(r"^voluntary_ctxt_switches:\s*(\d+)", text, re.M):
            return int(match[1])
    return 0
