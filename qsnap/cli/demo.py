"""The demo: a tiny guest of qsnap's own, saved and loaded before the user's eyes, and then by QEMU's own commands.

The guest counts on its serial port, writes every count to its disk, and compares the two on every tick. None of its RAM
is zero, so that QEMU has to save every page.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import qsnap.guest
from qsnap.cli.output.bar import bars
from qsnap.cli.output.results import Snapshots
from qsnap.cli.output.show import show
from qsnap.connecting import connect
from qsnap.errors import ConnectError, NotSupported, QsnapError, VerifyFailed
from qsnap.model.snapshots import Kind
from qsnap.vm import VM

#: Seconds for the guest to do something that takes it milliseconds.
PATIENCE_S = 30.0
#: Seconds for a savevm, which flushes the disk some thousand times if it is the first one after a load.
BARE_PATIENCE_S = 300.0
#: MiB of guest RAM.
MEMORY = 256


async def demo(qemu: str) -> None:
    """Boot the guest in a throw-away directory, save it, let it count on, and load it.

    :param qemu: the QEMU to run.
    :raise NotSupported: QEMU or qemu-img is not installed.
    :raise VerifyFailed: the counter or the disk is not back.
    """
    qemu_img = _installed(_sibling(qemu, "qemu-img"), "qemu-utils")
    _installed(qemu, "qemu-system-x86")
    with tempfile.TemporaryDirectory(prefix="qsnap-demo-") as name:
        directory = Path(name)
        disk = directory / "disk.qcow2"
        qsnap.guest.make_disk(disk, qemu_img=qemu_img)
        _say(f"A guest of {MEMORY} MiB with one disk boots in {directory}:")
        _say("it counts, and writes each count to its disk.")
        async with _booted(qemu, directory, disk) as serial:
            address = str(directory / "qmp")
            await _watch(serial, 5, "It counts")
            async with connect(address) as vm:
                pause_ms = await _walk_through(vm, serial, disk, qemu_img)
                await _compare(vm, pause_ms, directory / "bare")
    _say("The guest has been ended, and its directory removed. For yours: qsnap --help")


async def _walk_through(vm: VM, serial: Path, disk: Path, qemu_img: str) -> float:
    """Check, save, list and load; the save's pause in milliseconds."""
    _command("check")
    show(await vm.check())
    _command("save before")
    before = _last(serial)
    with bars("saving") as watching, watching("") as watch:
        saved = await vm.save("before", watch=watch)
        show(saved)
    after = await _watch(serial, 1, "The guest runs on")
    later = await _watch(serial, 40, "... and on")
    _command("list")
    show(Snapshots(snapshots=tuple(await vm.list())))
    _command("load before --paused")
    show(await vm.load("before", running=False))
    on_disk = await asyncio.to_thread(qsnap.guest.disk_counter, disk, qemu_img=qemu_img)
    _say(f"On the disk the count is {on_disk} again; it was {later} before the load.")
    _command("load before --running")
    seen = len(_counts(serial))
    show(await vm.load("before", running=True))
    back, bad = (await _lines(serial, seen + 1))[seen]
    _say(f"The guest goes on with {back}: it was saved between {before} and {after}.")
    _say(f"It has compared its RAM with its disk after every count: {bad} differences.")
    if not (before <= on_disk <= after and on_disk <= back <= on_disk + 1 and bad == 0):
        raise VerifyFailed("before", [f"disk {on_disk}, guest {back}, saved between {before} and {after}, {bad} bad"])
    return saved.pause_ms


async def _compare(vm: VM, pause_ms: float, monitor: Path) -> None:
    """A live save and a load, and the same by QEMU's own commands through another monitor."""
    reader, writer = await asyncio.open_unix_connection(monitor)

    def send(command: str, **arguments: str) -> None:
        writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    async def stopped_ms(line: str = "") -> float:
        """For how long the guest was stopped, by QEMU's own events: by *line* of the human monitor, or just before."""
        if line:
            send("human-monitor-command", **{"command-line": line})
        stamps: dict[str, float] = {}
        while not {"STOP", "RESUME"} <= stamps.keys():
            try:
                message = json.loads(await asyncio.wait_for(reader.readline(), BARE_PATIENCE_S))
            except TimeoutError:
                raise QsnapError(f"QEMU has not done {line!r} within {BARE_PATIENCE_S:g} s") from None
            if message.get("return"):
                raise QsnapError(f"{line}: {message['return']}")
            if "event" in message:
                at = message["timestamp"]
                stamps[message["event"]] = at["seconds"] * 1000 + at["microseconds"] / 1000
        return stamps["RESUME"] - stamps["STOP"]

    with closing(writer):
        _command("save live --live=auto")
        with bars("saving") as watching, watching("") as watch:
            live = await vm.save("live", live="auto", watch=watch)
            show(live)
        send("qmp_capabilities")
        _command("load live")
        show(await vm.load("live"))
        load = await stopped_ms()
        _say("The same by QEMU's own commands, savevm and loadvm:")
        first, second, bare = [await stopped_ms(line) for line in ("savevm a", "savevm b", "loadvm b")]
    pauses = f"{live.pause_ms:.0f} ms (--live) or {pause_ms:.0f} ms" if live.kind is Kind.LIVE else f"{pause_ms:.0f} ms"
    _say(f"A save paused the guest for {pauses};")
    _say(f"savevm for {second:.0f} ms, and for {first:.0f} ms when it was the first one after a load.")
    _say(f"A load paused it for {load:.0f} ms, loadvm for {bare:.0f} ms.")


@asynccontextmanager
async def _booted(qemu: str, directory: Path, disk: Path) -> AsyncIterator[Path]:
    """QEMU with its monitor at ``directory/qmp``; the file that takes the guest's serial output."""
    serial = directory / "serial"
    process = await asyncio.create_subprocess_exec(
        qemu, "-machine", "q35,accel=tcg", "-m", str(MEMORY), "-nodefaults", "-display", "none", "-name", "qsnap-demo",
        "-qmp", f"unix:{directory}/qmp,server=on,wait=off", "-qmp", f"unix:{directory}/bare,server=on,wait=off",
        "-serial", f"file:{serial}",
        "-blockdev", f"driver=qcow2,node-name=disk0,file.driver=file,file.filename={disk}",
        "-device", "virtio-blk,drive=disk0,id=vda",
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        await _lines(serial, 1, process)
        yield serial
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def _counts(serial: Path) -> list[tuple[int, int]]:
    text = serial.read_text(errors="replace") if serial.exists() else ""
    return [(int(c, 16), int(bad, 16)) for c, bad in re.findall(r"c=([0-9A-F]{8}) bad=([0-9A-F]{4})\r?\n", text)]


def _last(serial: Path) -> int:
    return _counts(serial)[-1][0]


async def _lines(serial: Path, number: int, process: asyncio.subprocess.Process | None = None) -> list[tuple[int, int]]:
    """The guest's lines, once there are *number* of them."""
    end = time.monotonic() + PATIENCE_S
    while len(counts := _counts(serial)) < number:
        if process is not None and process.returncode is not None:
            _, errors = await process.communicate()
            raise ConnectError(f"QEMU did not start: {errors.decode(errors='replace').strip()}")
        if time.monotonic() > end:
            raise QsnapError(f"the demo's guest has said nothing for {PATIENCE_S:g} s")
        await asyncio.sleep(0.02)
    return counts


async def _watch(serial: Path, number: int, what: str) -> int:
    """Let the guest count *number* times more; where it then is."""
    start = len(_counts(serial))
    counts = await _lines(serial, start + number)
    _say(f"{what}: {counts[-1][0]}")
    return counts[-1][0]


def _sibling(qemu: str, name: str) -> str:
    """The tool from beside a QEMU that was named by its path, or the one on PATH."""
    beside = Path(qemu).with_name(name)
    return str(beside) if "/" in qemu and beside.exists() else name


def _installed(program: str, package: str) -> str:
    if shutil.which(program) is None:
        raise NotSupported(f"{program} is not installed; on Debian and Ubuntu: sudo apt install {package}")
    return program


def _say(text: str) -> None:
    sys.stdout.write(f"# {text}\n")
    sys.stdout.flush()


def _command(text: str) -> None:
    sys.stdout.write(f"\n$ qsnap {text}\n")
    sys.stdout.flush()
