"""The library as others use it: its names are known to a type checker, and the same without ``await``."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import qsnap
import qsnap.sync
from qsnap import errors
from support.guest import Guest, Launch, blockdev, cli, disk_device, make_boot_disk, needs_snapshot_jobs, until

ROOT = Path(__file__).resolve().parents[2]

#: Each line that ends with "#" is wrong.
PROGRAM = """
import qsnap
import qsnap.sync

async def main() -> None:
    async with qsnap.connect(vm="web") as vm:
        await vm.prune("nightly", qsnap.Policy(last=1))
        pause: float = (await vm.save("t")).pause_ms

with qsnap.sync.connect(vm="web") as vm:
    tags: list[str] = [one.tag for one in vm.list()]
    number: int = vm.save("t")  #
    vm.nonsense()  #
try:
    qsnap.nonsense  #
except qsnap.PrecheckRefused as refused:
    print(refused.findings)
"""


@pytest.mark.no_qemu
def test_a_type_checker_knows_the_names(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", program], capture_output=True, text=True, timeout=110, cwd=ROOT
    )
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    wrong = {number for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("#")}
    assert found == wrong, done.stdout + done.stderr


@pytest.mark.no_qemu
def test_all_errors_are_at_the_top() -> None:
    of_module = {one.__name__ for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, Exception)}
    assert of_module <= set(qsnap.__all__)
    assert all(getattr(qsnap, name).__name__ == name for name in qsnap.__all__)
    with pytest.raises(AttributeError):
        getattr(qsnap, "nonsense")  # noqa: B009 (mypy knows that it is not there)


@needs_snapshot_jobs
async def test_a_program_that_stays_has_no_more_files_open_each_time(guest: Guest, tmp_path: Path) -> None:
    """Images, state files, directories, journals, sockets, guards: what a run has opened, it closes."""

    async def day() -> list[str]:
        async with qsnap.connect(guest.address) as vm:
            for _ in range(2):
                await vm.save("live", live=True)
            await vm.save("t")
            await vm.note("t", description="before the update", protected=True)
            await vm.list()
            await vm.verify()
            await vm.load("live")
            await vm.load("t", save_current=True)
            await vm.undo()
            await vm.export("t", tmp_path / "export")
            await vm.note("t", protected=False)
            await vm.delete("t", "live")
            await vm.status()
        shutil.rmtree(tmp_path / "export")
        return sorted(re.sub(r"\d+", "", os.readlink(f"/proc/self/fd/{file}")) for file in fds())  # noqa: PTH115

    def fds() -> Iterator[str]:
        return (name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}"))  # noqa: PTH208

    first = await day()
    assert await day() == first


def test_without_await(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    """Its results, errors and time-out are those of the library; also where a loop runs."""
    with qsnap.sync.connect(guest.address) as vm:
        assert vm.save("t").tag == "t"
        assert [one.tag for one in vm.list()] == ["t"]
        with pytest.raises(qsnap.SnapshotNotFound):
            vm.load("nope")
        assert vm.load("t").runstate == "running"
        assert vm.pid == guest.pid
        with qsnap.sync.connect(guest.hmp_address) as other:
            vm.save("t", watch=lambda _: [other.status()].clear())
        assert "cannot be watched: a watch cannot call a VM" in caplog.text

    async def inside() -> str:
        with qsnap.sync.connect(guest.address) as vm:
            return str(vm.status().runstate)

    with pytest.raises(qsnap.BadUsage, match="closed"):
        vm.list()
    assert "description" in inspect.signature(qsnap.sync.VM.save).parameters, "help() and editors know it"
    assert asyncio.run(inside()) == "running"
    assert [one.name for one in threading.enumerate() if one.name == "qsnap"] == []
    with pytest.raises(qsnap.BadUsage), qsnap.sync.connect():
        pass
    guest.assert_running()


def test_together_without_await(launch: Launch, tmp_path: Path) -> None:
    """Of one moment, or an error and nothing."""
    guests = {}
    for name in [f"vm{number}" for number in range(3)]:
        guests[name] = launch(*blockdev("disk0", make_boot_disk(tmp_path / name)), *disk_device("disk0"))
    with ExitStack() as stack:
        vms = {
            name: stack.enter_context(qsnap.sync.connect(guest.address, timeout_s=30)) for name, guest in guests.items()
        }
        done = qsnap.sync.together(vms, lambda vm: vm.save("t"))
        assert [result.tag for result in done.results.values()] == ["t"] * 3
        assert done.stop_spread_ms is not None
        for name, vm in vms.items():
            (snapshot,) = vm.list()
            assert snapshot.together is not None
            assert set(snapshot.together.vms) == set(vms) - {name}
        vms["vm1"].save("other")
        with pytest.raises(qsnap.SnapshotExists) as failed:
            qsnap.sync.together(vms, lambda vm: vm.save("other", replace=False))
        assert failed.value.vm == "vm1"
        assert [guest.node_tags("disk0") for guest in guests.values()].count(["t"]) == 2
        qsnap.sync.together(vms, lambda vm: vm.load("t"))
    assert {guest.runstate for guest in guests.values()} == {"running"}
    guests["vm0"].assert_running()


async def test_a_vm_after_its_block(guest: Guest) -> None:
    """It makes no new connection, which nobody would close."""
    async with qsnap.connect(guest.address) as vm:
        pass
    for call in (vm.list, vm.save, vm.status, vm.save):
        with pytest.raises(qsnap.BadUsage, match="closed"):
            await call()
    assert guest.node_tags("disk0") == []


def test_a_vm_by_its_name(launch: Launch, tmp_path: Path) -> None:
    """With what the config file has for it."""
    name = f"web-{os.getpid()}"
    guest = launch(
        *blockdev("disk0", make_boot_disk(tmp_path / "a")), *disk_device("disk0"), "-name", name
    )  # fmt: skip
    (tmp_path / "c.toml").write_text(f"[vm.{name}]\ntimeout = 0.000001\n")
    with qsnap.sync.connect(vm=name) as vm:
        assert vm.status().name == name
    late = (qsnap.OperationTimeout, qsnap.MonitorBusy)
    with pytest.raises(late), qsnap.sync.connect(vm=name, config=tmp_path / "c.toml") as vm:
        vm.save("t")
    with pytest.raises(qsnap.NoVM), qsnap.sync.connect(vm="nobody-of-that-name"):
        pass
    assert guest.runstate == "running"


INTERRUPTED = """
import sys
import qsnap.sync

with qsnap.sync.connect(sys.argv[1]) as vm:
    try:
        vm.save("t", watch=lambda progress: print(progress.phase, flush=True))
    except KeyboardInterrupt:
        print("interrupted", vm.status().runstate, flush=True)
"""


TOGETHER_INTERRUPTED = """
import sys
import qsnap.sync

with qsnap.sync.connect(sys.argv[1]) as a, qsnap.sync.connect(sys.argv[2]) as b:
    try:
        qsnap.sync.together(
            {"a": a, "b": b}, lambda vm: vm.save("t", watch=lambda progress: print(progress.phase, flush=True))
        )
    except KeyboardInterrupt:
        assert a.list() == b.list() == ()
        print("interrupted", *{a.status().runstate, b.status().runstate}, flush=True)
"""


@pytest.mark.parametrize("program", [INTERRUPTED, TOGETHER_INTERRUPTED])
def test_ctrl_c_in_a_call(launch: Launch, tmp_path: Path, program: str) -> None:
    """The save is cancelled and cleared up as everywhere, the guest runs, and the connection goes on."""
    other = launch(*blockdev("b", make_boot_disk(tmp_path / "b")), *disk_device("b"))
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"),
        "-object", "memory-backend-ram,id=m,size=768M,prealloc=on",
        machine="q35,accel=tcg,memory-backend=m", memory="768",
    )  # fmt: skip
    guest.wait_for_ticks(1)
    with subprocess.Popen(
        [sys.executable, "-c", program, guest.address, other.address], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().splitlines()[-1] == "interrupted running"
    assert process.returncode == 0
    until("the guest runs", lambda: guest.runstate == "running")
    assert cli("list", "-q", monitor=guest.address).out == ""
