"""A restore drill passes for a guest that goes on, and fails for one that hangs, although it is called running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import qsnap
import qsnap.guest
from qsnap.errors import VerifyFailed
from qsnap.targets.running import running_vms
from qsnap.targets.vms import usable
from support.guest import (
    Guest,
    Launch,
    blockdev,
    cli,
    disk_device,
    needs_snapshot_jobs,
    tool,
    until,
)

pytestmark = needs_snapshot_jobs

#: cli; hlt: sleeps, and the timer's interrupts are not let through.
HALTED = bytes.fromhex("fa f4 eb fc")
#: cli; jmp: goes round in one instruction.
SPINNING = bytes.fromhex("fa eb fd")
#: sti; hlt; jmp: idle, woken by the BIOS's timer. Between that its registers are the same.
IDLE = bytes.fromhex("fb f4 eb fc")


def left(directory: Path) -> list[Path]:
    return list(directory.glob("qsnap-drill-*"))


def started(launch: Launch, directory: Path, code: bytes) -> Guest:
    """A guest that runs this code."""
    path = directory / "disk"
    sector = code.ljust(510, b"\0") + b"\x55\xaa"
    qsnap.guest.make_disk(path, qemu_img=tool("qemu-img"), sector=sector)
    guest = launch(*blockdev("disk", path), *disk_device("disk"))
    until("its code to run", lambda: "IP=00007c0" in guest.qmp.hmp("info registers"))
    return guest


def test_it_is_a_command_for_cron(guest: Guest, tmp_path: Path) -> None:
    """Of the newest of a series: a line, an exit code, metrics."""
    text = tmp_path / "drill.prom"
    options = ("--boot", "--prefix", "s", "--place", str(tmp_path), "--textfile", str(text))
    cli("verify", *options, monitor=guest.address, expect=7)
    cli("save", "--prefix", "s", monitor=guest.address)
    newest = cli("save", "--prefix", "s", "--json", monitor=guest.address).json["tag"]
    run = cli("verify", *options, "--until", "c=", monitor=guest.address)
    sign = r"vCPU 0 (executes instructions|is idle, and was woken \d+ times in 0.5 s)"
    assert re.match(rf"{newest} starts and runs: {sign}, it wrote 'c='; ", run.out)
    assert len(run.out.splitlines()) == 1
    assert "qsnap_drill_last_exit_code{vm=" in text.read_text()
    assert "qsnap_drill_last_success_timestamp_seconds" in text.read_text()
    assert "qsnap_save_failures_total" not in text.read_text()
    run = cli("verify", *options, "--until", "no", "--within", "0.5", "--json", monitor=guest.address, expect=10)
    assert run.error["problems"] == ["its guest runs, and does not write 'no' within 0.5 s"]
    assert re.search(r"^qsnap_drill_last_exit_code\{.*\} 10$", text.read_text(), re.M)
    assert not [one for one in psutil.Process().children() if "-incoming" in one.cmdline()]
    guest.assert_running()
    for wrong in (("--boot",), ("--boot", "a", "b"), ("--boot", "a", "--read-data"), ("--until", "x")):
        cli("verify", *wrong, monitor=guest.address, expect=2)
    assert not left(tmp_path)


@pytest.mark.parametrize("code", [HALTED, SPINNING], ids=["halted", "spinning"])
async def test_a_guest_that_hangs(launch: Launch, tmp_path: Path, code: bytes) -> None:
    guest = started(launch, tmp_path, code)
    assert guest.runstate == "running"
    async with qsnap.connect(guest.address) as vm:
        await vm.save("s")
        with pytest.raises(VerifyFailed, match="it starts, and no vCPU does anything for 2 s"):
            await vm.drill("s", within_s=2, place=tmp_path)
    assert not left(tmp_path)


async def test_a_guest_that_is_idle(launch: Launch, tmp_path: Path) -> None:
    guest = started(launch, tmp_path, IDLE)
    async with qsnap.connect(guest.address) as vm:
        await vm.save("s")
        result = await vm.drill("s", place=tmp_path)
    assert result.sign.startswith(("vCPU 0 is idle, and was woken", "vCPU 0 executes"))


def test_a_drill_that_is_killed_takes_its_guest_along(guest: Guest, tmp_path: Path) -> None:
    """And the next one removes what it has left."""
    cli("save", "s", monitor=guest.address)
    script = (
        "import asyncio, sys, qsnap\n"
        "async def main():\n"
        "    async with qsnap.connect(sys.argv[1]) as vm:\n"
        "        await vm.drill('s', until=sys.argv[3], place=sys.argv[2])\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, guest.address, str(tmp_path), "never"])
    try:
        clone = until("the clone to run", lambda: next(iter(tmp_path.glob("qsnap-drill-*/*/serial0.log")), None))
        (child,) = (one for one in psutil.Process(process.pid).children() if "-incoming" in one.cmdline())
        until("its output", lambda: clone.read_bytes().count(b"c=") > 2)
        # Nobody who looks for a VM takes it for one
        assert [usable(vm) for vm in running_vms() if vm.pid == child.pid] == [None]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    until("its QEMU to end", lambda: not child.is_running())
    (dead,) = left(tmp_path)
    os.utime(dead, (0, 0))
    subprocess.run([sys.executable, "-c", script, guest.address, tmp_path, ""], check=True, timeout=60)
    assert not left(tmp_path)
    guest.assert_running()
