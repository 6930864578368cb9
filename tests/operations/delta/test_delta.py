"""Delta loads: after each one all of RAM is what a full load of the same snapshot makes it.

The witness is QEMU: its own ``loadvm`` (of a live snapshot, a full load), and ``pmemsave`` of all that the guest sees.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from qemu.qmp import Message

import qsnap
from qsnap.errors import GuestLeftStopped, VerifyFailed
from qsnap.inventory import state_file, vm_state
from qsnap.inventory.stream import Run
from qsnap.operations import load as operations_load
from qsnap.operations.delta import NoDelta, comparers, delta, difference
from qsnap.operations.delta.comparers import Comparers, Job
from qsnap.vm import VM
from support.delta import MIB, PAGE, host_address, in_process, load, loaded_by_qemu, ram, scribble, seeded
from support.guest import (
    Guest,
    Launch,
    blockdev,
    cli,
    disk_device,
    finish,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    open_files,
    start_cli,
    until,
)
from support.killed import assert_all_is_well, marks, wait_for_the_guard
from support.live import state_files

pytestmark = needs_snapshot_jobs


def nothing_of_ours(guest: Guest) -> bool:
    """Whether QEMU has no node and no descriptor from qsnap."""
    nodes = [node["node-name"] for node in guest.qmp("query-named-block-nodes")]
    files = [file for files in guest.qmp("query-fdsets") for file in files["fds"]]
    return not files and not any(name.startswith("qsnap-state") for name in nodes)


@pytest.fixture
def big(launch: Launch, tmp_path: Path) -> Guest:
    """The counting guest with a display and a keyboard."""
    make_boot_disk(tmp_path / "disk0.qcow2")
    make_disk(tmp_path / "disk1.qcow2")
    guest = launch(
        *blockdev("disk0", tmp_path / "disk0.qcow2"), *disk_device("disk0"),
        *blockdev("disk1", tmp_path / "disk1.qcow2"), *disk_device("disk1", 1),
        "-vga", "none", "-device", "VGA", "-device", "qemu-xhci", "-device", "usb-tablet",
    )  # fmt: skip
    guest.wait_for_ticks()
    return guest


def test_all_of_ram_in_random_order(big: Guest) -> None:
    """Of snapshots made by qsnap, live, and by QEMU's own savevm; after each load the guest goes on in order."""
    dice = seeded(18)
    expected: dict[str, str] = {}
    scribble(big, dice)
    cli("save", "ordinary", monitor=big.address)
    scribble(big, dice)
    cli("save", "--live", "live", monitor=big.address)
    scribble(big, dice)
    big.qmp("stop")
    assert big.qmp.hmp("savevm hmp") == ""
    for tag in ("ordinary", "live", "hmp"):
        loaded_by_qemu(big, tag)
        expected[tag] = ram(big)
        big.qmp("cont")
    assert len({*expected.values()}) == 3
    for tag in dice.choices([*expected], k=9):
        scribble(big, dice)
        result = load(big, tag, "--paused")
        assert (result["method"], result["why_full"]) == ("delta", "")
        assert 100 * PAGE < result["ram_bytes"] < 30 * MIB
        assert ram(big) == expected[tag]
        big.qmp("cont")
        big.assert_running()
    assert cli("load", "live", monitor=big.address).out.count(" differed, from ") == 1
    assert nothing_of_ours(big)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("options", [[], ["--live"]], ids=["ordinary", "live"])
def test_many_loads_leave_nothing_behind(guest: Guest, options: list[str], running: bool) -> None:
    """Neither in QEMU nor in the process that loads, over one connection; nor what QEMU has of files in memory."""
    cli("save", "t", *options, monitor=guest.address)

    def counts() -> tuple[int, int, int, bool]:
        ours, theirs = (len([*Path(f"/proc/{pid}/fd").iterdir()]) for pid in ("self", guest.pid))
        gc.collect()
        messages = [one for one in gc.get_objects() if isinstance(one, Message)]
        return ours, theirs, len(guest.qmp("query-named-block-nodes")), len(messages) < 20

    def in_memory() -> int:
        """Bytes of memory of the files without a name that QEMU has open."""
        total = 0
        for file in Path(f"/proc/{guest.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # QEMU has closed it
                if "memfd:qsnap" in str(file.readlink()):
                    total += file.stat().st_blocks * 512
        return total

    async def loads() -> None:
        async with qsnap.connect(guest.address) as vm:
            before = None
            for _ in range(14):
                assert (await vm.load("t", running=running)).method == "delta"
                assert in_memory() == 0
                guest.qmp("cont")
                before = before or counts()
            assert counts() == before

    asyncio.run(loads())
    guest.assert_running()


ONE = ["-machine", "memory-backend=m0", "-object", "memory-backend-memfd,id=m0,size=32M,share=on"]
SHM = ["-machine", "memory-backend=m0", "-object", "memory-backend-file,id=m0,size=32M,share=on,mem-path=/dev/shm"]
TWO = [
    "-object", "memory-backend-ram,id=m0,size=32M", "-numa", "node,memdev=m0",
    "-object", "memory-backend-memfd,id=m1,size=32M", "-numa", "node,memdev=m1",
    "-object", "memory-backend-ram,id=m2,size=128M", "-device", "pc-dimm,memdev=m2,id=dimm",
]  # fmt: skip
HUGE = [
    "-machine", "memory-backend=m0",
    "-object", "memory-backend-memfd,id=m0,size=32M,share=off,hugetlb=on,hugetlbsize=2M",
]  # fmt: skip
THREAD = ["-object", "iothread,id=io", "-device", "virtio-blk-pci,drive=b,iothread=io"]
HIGH = 1 << 32


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """As many pages of 2 MiB as a guest of 32 MiB needs, reserved by the kernel."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = int(pool.read_text()) if pool.exists() else 0
    try:
        pool.write_text(str(before + 20))
    except OSError:
        pytest.skip("only root may have huge pages reserved")
    try:
        if int(pool.read_text()) < before + 20:
            pytest.skip("the kernel has no room for huge pages")
        yield
    finally:
        pool.write_text(str(before))


@pytest.mark.parametrize(
    ("memory", "options", "ranges"),
    [
        ("32", ONE, [(0, 32 * MIB)]),
        ("32", SHM, [(0, 32 * MIB)]),
        ("64,slots=1,maxmem=1G", TWO, [(0, 32 * MIB), (32 * MIB, 32 * MIB), (HIGH, 32 * MIB)]),
        ("64", ["-machine", "max-ram-below-4g=32M"], [(0, 32 * MIB), (HIGH, 32 * MIB)]),
        ("32", HUGE, [(0, 32 * MIB)]),
        ("32", THREAD, [(0, 32 * MIB)]),
    ],
    ids=["memfd", "shm", "numa-and-dimm", "above-4-gib", "hugetlb", "iothread"],
)
def test_other_memory(
    launch: Launch,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    memory: str,
    options: list[str],
    ranges: list[tuple[int, int]],
) -> None:
    """And a disk that a thread of its own serves."""
    if options is HUGE:
        request.getfixturevalue("huge_pages")
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"),
        *blockdev("b", make_disk(tmp_path / "b")), *options, memory=memory,
    )  # fmt: skip
    guest.wait_for_ticks()
    dice = seeded(len(options))
    addresses = [begin or 4 * MIB for begin, _ in ranges]
    scribble(guest, dice, *addresses)
    cli("save", "t", monitor=guest.address)
    loaded_by_qemu(guest, "t")
    expected = ram(guest, *ranges)
    guest.qmp("cont")
    for _ in range(2):
        scribble(guest, dice, *addresses)
        result = load(guest, "t", "--paused")
        assert (result["method"], result["why_full"]) == ("delta", "")
        # Of each block of RAM what was written there
        assert result["ram_bytes"] > len(ranges) * 100 * PAGE
        assert ram(guest, *ranges) == expected
        guest.qmp("cont")
    guest.assert_running()


class Changed:
    """A guest with a snapshot, "t", that has changed since; and what a full load makes of RAM."""

    def __init__(self, guest: Guest, *how: str) -> None:
        self.guest = guest
        dice = seeded(7)
        cli("save", "t", *how, monitor=guest.address)
        guest.qmp("stop")
        load(guest, "t", "--full") if how else loaded_by_qemu(guest, "t")
        self.expected = ram(guest)
        guest.qmp("cont")
        scribble(guest, dice)


@pytest.fixture
def changed(guest: Guest, request: pytest.FixtureRequest) -> Changed:
    return Changed(guest, *getattr(request, "param", []))


both_kinds = pytest.mark.parametrize("changed", [[], ["--live"]], indirect=True, ids=["ordinary", "live"])


def losing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have that one of the differing pages lost from the new stream."""
    left = number
    staying = difference._staying

    def found(run: Run, differs: bytes) -> Iterator[Run]:
        nonlocal left
        kept = bytearray(differs)
        for page, one in enumerate(differs):
            left -= one
            if one and not left:
                kept[page] = 0
        return staying(run, bytes(kept))

    monkeypatch.setattr(difference, "_staying", found)


def test_one_page_left_out_is_found(changed: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of all these tests: what they look at tells of a single page."""
    losing(50, monkeypatch)
    assert in_process(changed.guest, running=False).method == "delta"
    assert ram(changed.guest) != changed.expected


def filled(guest: Guest, *rows: int) -> None:
    """Have rows of so many pages with something in them, and a page of zeroes behind each; by default one long row."""
    guest.qmp("stop")
    with Path(f"/proc/{guest.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(host_address(guest, 4 * MIB))
        for pages in rows or [24 * MIB // PAGE]:
            memory.write(os.urandom(pages * PAGE) + bytes(PAGE))
    guest.qmp("cont")


@pytest.mark.parametrize("ended_by", [None, signal.SIGKILL, signal.SIGSTOP])
def test_compared_by_several_processes(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, ended_by: signal.Signals | None
) -> None:
    """The result is the same, also where those that help stop in the middle."""
    filled(guest)
    changed = Changed(guest)
    start, ask = Comparers.start, comparers._Helper.ask
    asked: list[Job] = []

    def started(self: Comparers, size: int) -> None:
        start(self, size)
        until("the helpers", lambda: self._take(0) or all(helper.has_room for helper in self._helpers.values()))

    def asks(self: comparers._Helper, job: Job) -> None:
        ask(self, job)
        asked.append(job)
        if ended_by and job.begin > 0:
            os.kill(self._process.pid, ended_by)

    monkeypatch.setattr(comparers, "_WORTHWHILE", MIB)
    monkeypatch.setattr(comparers, "_SILENT_S", 0.2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    monkeypatch.setattr(Comparers, "start", started)
    monkeypatch.setattr(comparers._Helper, "ask", asks)
    result = in_process(changed.guest, running=False, verify=True)
    assert (result.method, result.differing_pages) == ("delta", 0)
    assert ram(changed.guest) == changed.expected
    assert any(job.begin > 0 for job in asked)


def test_rows_that_do_not_go_on_as_expected(guest: Guest) -> None:
    """Rows of all lengths, among them those that end just where what is expected does."""
    lengths = [511, 512, 513, 1, 1022, 1023, 1024, 1025, 300]
    filled(guest, *lengths)
    changed = Changed(guest)
    assert load(guest, "t", "--verify", "--paused")["method"] == "delta"
    assert ram(guest) == changed.expected


def test_verify_finds_it_and_loads_everything(changed: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(50, monkeypatch)
    result = in_process(changed.guest, running=False, verify=True)
    assert (result.method, result.why_full) == ("full", "1 pages of RAM differed after the delta load")
    assert result.differing_pages == 0
    assert ram(changed.guest) == changed.expected


@pytest.mark.parametrize("more", [[], ["--full"]])
def test_verified(changed: Changed, more: list[str]) -> None:
    """By either way; and the line for people says so."""
    run = cli("load", "t", "--verify", "--paused", *more, monitor=changed.guest.address)
    assert "  verified: RAM is as in the snapshot\n" in run.out
    assert (" differed, from " in run.out) is not bool(more)
    assert ram(changed.guest) == changed.expected


@pytest.mark.parametrize("running", [False, True])
def test_loaded_and_not_verified(
    changed: Changed, monkeypatch: pytest.MonkeyPatch, runtime_directory: Path, running: bool
) -> None:
    """A guest that is to be paused stays so: its guard does not resume it either."""

    async def fail(_: object) -> int:
        raise NoDelta("it cannot be read any more")

    monkeypatch.setattr(delta.Comparison, "differing", fail)
    with pytest.raises(VerifyFailed, match="it is loaded, and RAM could not be compared with it: it cannot be read"):
        in_process(changed.guest, running=running, verify=True, full=True)
    wait_for_the_guard(runtime_directory)
    assert changed.guest.runstate == ("running" if running else "paused")
    assert marks(changed.guest) == []


def test_a_comparison_that_cannot_be_made_at_last(changed: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot is loaded, and the guest is left as it was asked for."""

    def walk(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(difference, "walk", walk)
    with pytest.raises(VerifyFailed, match="it is loaded, and RAM could not be compared with it: this user may not"):
        in_process(changed.guest, running=False, full=True, verify=True)
    assert changed.guest.runstate == "paused"
    assert ram(changed.guest) == changed.expected


@pytest.mark.parametrize("verify", [False, True])
def test_a_page_changes_between_comparison_and_load(
    changed: Changed, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """Who resumes the guest is noticed; who writes its memory from outside only if RAM is verified."""
    guest, walk = changed.guest, difference.walk
    done: list[bool] = []

    def walked(*given: Any, **more: Any) -> difference.Found:
        found = walk(*given, **more)
        if not done:
            done.append(True)
            if verify:
                with Path(f"/proc/{guest.pid}/mem").open("r+b", buffering=0) as memory:
                    memory.seek(host_address(guest, 20 * MIB) + 5)
                    memory.write(b"changed")
            else:
                guest.qmp("cont")
                guest.wait_for_ticks(2)
                guest.qmp("stop")
        return found

    monkeypatch.setattr(difference, "walk", walked)
    result = in_process(guest, running=False, verify=verify)
    assert result.method == "full"
    assert ("of RAM differed" if verify else "resumed the guest") in result.why_full
    assert ram(guest) == changed.expected
    guest.qmp("cont")
    guest.assert_running()


def test_a_device_that_may_write_meanwhile(restless: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """virtio-serial takes what comes for a port also while the guest is stopped. So a load is verified unasked."""
    guest, changed = restless, Changed(restless)
    assert in_process(guest).differing_pages == 0
    scribble(guest, seeded(3))
    losing(50, monkeypatch)
    assert in_process(guest, running=False).method == "full"
    assert ram(guest) == changed.expected


def test_a_device_that_comes_after_the_check(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may write RAM is seen when the guest has been stopped."""
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"), "-device", "pcie-root-port,id=behind",
    )  # fmt: skip
    guest.wait_for_ticks()
    changed = Changed(guest)
    refuse = vars(operations_load)["refuse_other_machine"]

    async def plugged(*given: Any) -> Any:
        guest.qmp("device_add", driver="virtio-serial-pci", id="late", bus="behind")
        return await refuse(*given)

    monkeypatch.setattr(operations_load, "refuse_other_machine", plugged)
    result = in_process(guest, running=False)
    assert (result.method, result.differing_pages) == ("delta", 0)
    assert ram(guest) == changed.expected


@both_kinds
@pytest.mark.parametrize("nth", [1, 3])
def test_qemu_refuses_the_delta(changed: Changed, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Before it has begun, or in the middle, when disks are reverted: everything is loaded, and all is well."""
    content = state_file.envelope

    def envelope(given: state_file.Content) -> Iterator[tuple[int, bytes]]:
        if nth == 1:
            given = structs.replace(given, tag="other")
        for offset, data in content(given):
            yield offset, data
            if offset == 0 and nth == 3:
                yield state_file.STREAM_OFFSET + 8, b"\0" * 8

    monkeypatch.setattr(state_file, "envelope", envelope)
    result = in_process(changed.guest, running=False)
    assert result.method == "full"
    assert result.why_full.startswith("QEMU did not load what differs: ")
    assert ram(changed.guest) == changed.expected
    changed.guest.qmp("cont")
    changed.guest.assert_running()


def test_memory_that_may_not_be_read(changed: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or any other error of the comparison: everything is loaded."""

    def walk(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(difference, "walk", walk)
    result = in_process(changed.guest, running=False)
    assert result.why_full == "this user may not read QEMU's memory, or the VM state: Operation not permitted"
    assert ram(changed.guest) == changed.expected


@both_kinds
def test_too_much_differs(changed: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "_ALWAYS_BYTES", 0)
    monkeypatch.setattr(delta, "_SHARE_OF_MEMORY", 1 << 40)
    result = in_process(changed.guest, running=False)
    assert result.why_full == "so much of RAM differs that a delta load would gain nothing"
    assert ram(changed.guest) == changed.expected


def test_what_a_reset_writes_into_ram(launch: Launch, tmp_path: Path) -> None:
    """As -device loader has it do: a load resets the guest after the comparison."""
    (tmp_path / "rom").write_bytes(b"rom" * 5000)
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"),
        "-device", f"loader,file={tmp_path / 'rom'},addr=0x1000000,force-raw=on",
    )  # fmt: skip
    guest.wait_for_ticks()
    scribble(guest, seeded(1), 0x1000000)
    changed = Changed(guest)
    result = load(guest, "t", "--paused")
    assert result["why_full"] == f"a reset writes '{tmp_path / 'rom'}' into RAM"
    assert ram(guest) == changed.expected


def test_another_process_has_the_memory(launch: Launch, tmp_path: Path) -> None:
    """It may write while RAM is compared."""
    guest = launch(*blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"), *ONE)
    guest.wait_for_ticks()
    changed = Changed(guest)
    file = next(
        path for path in Path(f"/proc/{guest.pid}/fd").iterdir() if "memory-backend-memfd" in str(path.readlink())
    )
    code = (
        f"import mmap, sys; f = open({str(file)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        result = load(guest, "t", "--paused")
        assert result["why_full"] == f"process {other.pid}, which has it mapped, may write into the guest's memory"
        other.communicate()
    assert ram(guest) == changed.expected
    guest.qmp("cont")
    assert load(guest, "t")["method"] == "delta"


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)
def test_a_human_monitor(guest: Guest) -> None:
    """Everything is loaded; and what is to be verified there is refused before the guest is touched."""
    cli("save", "t", monitor=guest.address)
    result = load(guest, "t")
    assert (result["method"], result["ram_bytes"]) == ("full", None)
    assert (
        result["why_full"]
        == "this monitor cannot hand QEMU a file, which takes QMP over a UNIX socket, and QEMU 6.0 or later"
    )
    guest.wait_for_ticks(3)
    count = guest.counter
    error = cli("load", "t", "--verify", "--json", monitor=guest.address, expect=5).error
    assert "'t' cannot be verified: this monitor cannot hand QEMU a file" in error["message"]
    assert guest.counter >= count
    guest.assert_running()


def test_killed_during_the_comparison(guest: Guest, tmp_path: Path, runtime_directory: Path) -> None:
    """The guest runs on as it was, and nothing is left."""
    cli("save", "--live", "t", monitor=guest.address)
    for _ in range(3):
        process = start_cli("load", "t", monitor=guest.address)
        guest.qmp.events.clear()
        until("the stop", lambda: guest.qmp("query-status") and any(e["event"] == "STOP" for e in guest.qmp.events))
        process.send_signal(signal.SIGKILL)
        finish(process)
        wait_for_the_guard(runtime_directory)
        assert nothing_of_ours(guest)
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": ["t"], tmp_path / "disk1.qcow2": ["t"]})
    assert state_files(tmp_path) == ["disk0.qcow2.t.qsnap"]
    assert load(guest, "t")["method"] == "delta"


@pytest.fixture
def restless(launch: Launch, tmp_path: Path) -> Guest:
    """A guest with a device that may write its RAM while it is stopped."""
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"),
        "-device", "virtio-serial", "-chardev", "null,id=c", "-device", "virtserialport,chardev=c",
    )  # fmt: skip
    guest.wait_for_ticks()
    return guest


def test_killed_before_the_load_is_verified(restless: Guest, runtime_directory: Path) -> None:
    """The guard does not resume a guest whose RAM nobody has compared."""
    guest, changed = restless, Changed(restless)
    killed = """
import os, signal
from qsnap.cli import main
from qsnap.operations.delta.delta import Comparison
Comparison.differing = lambda self: os.kill(os.getpid(), signal.SIGKILL)
main()
"""
    process = start_cli("load", "t", monitor=guest.address, code=killed)
    assert finish(process).code == -signal.SIGKILL
    wait_for_the_guard(runtime_directory)
    assert not guest.qmp("query-status")["running"]
    assert cli("status", "--json", monitor=guest.address).json["is_half_restored"]
    assert in_process(guest, running=False).differing_pages == 0
    assert ram(guest) == changed.expected
    guest.qmp("cont")
    guest.assert_running()


def test_the_load_is_not_verified_in_time(
    restless: Guest, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest does not run on RAM that nobody has compared, neither by us nor by the guard."""

    async def never(_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(qsnap.vm, "TIMED_PATIENCE_S", 0.2)
    cli("save", "t", monitor=restless.address)
    with monkeypatch.context() as patched:
        patched.setattr(delta.Comparison, "differing", never)
        with pytest.raises(GuestLeftStopped, match=r"RAM was loaded, and not compared with 't': .* is left stopped; "):
            in_process(restless, timeout_s=30)
    wait_for_the_guard(runtime_directory)
    assert not restless.qmp("query-status")["running"]
    assert cli("status", "--json", monitor=restless.address).json["is_half_restored"]
    assert in_process(restless, running=True).differing_pages == 0
    restless.assert_running()


def test_interrupted_during_the_verification(
    restless: Guest, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is seen through, and then the guest runs."""
    cli("save", "t", monitor=restless.address)
    differing, tasks = delta.Comparison.differing, list[asyncio.Task[None]]()

    async def interrupted(comparison: delta.Comparison) -> int:
        tasks[0].cancel()
        await asyncio.sleep(0)  # it is on its way by now
        return await differing(comparison)

    async def load() -> None:
        async with qsnap.connect(restless.address) as vm:
            await vm.load("t")

    async def main() -> None:
        tasks.append(asyncio.create_task(load()))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    monkeypatch.setattr(delta.Comparison, "differing", interrupted)
    asyncio.run(main())
    assert restless.runstate == "running"
    wait_for_the_guard(runtime_directory)
    assert marks(restless) == []
    restless.assert_running()


def test_interrupted_during_the_comparison(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison ends, nothing was loaded, and the guest runs on."""
    cli("save", "t", monitor=guest.address)
    guest.wait_for_ticks(3)
    count, walk = guest.counter, difference.walk
    tasks: list[asyncio.Task[Any]] = []

    def walked(*given: Any, **more: Any) -> difference.Found:
        loop = tasks[0].get_loop()
        loop.call_soon_threadsafe(tasks[0].cancel)
        assert given[3].wait(10)  # it is told to end
        return walk(*given, **more)

    monkeypatch.setattr(difference, "walk", walked)

    async def interrupted(vm: VM) -> None:
        tasks.append(asyncio.ensure_future(vm.load("t")))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    async def main() -> None:
        async with qsnap.connect(guest.address) as vm:
            await interrupted(vm)

    asyncio.run(main())
    assert guest.counter > count
    guest.assert_running()


def test_interrupted_while_the_state_is_opened(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed again."""
    cli("save", "t", monitor=guest.address)
    of_snapshot = vm_state.of_snapshot
    tasks: list[asyncio.Task[Any]] = []

    async def main() -> None:
        async with qsnap.connect(guest.address) as vm:
            before = open_files()
            tasks.append(asyncio.ensure_future(vm.load("t")))
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            assert open_files() == before

    def opened(*given: Any) -> vm_state.VmState:
        if asked := guest.runstate != "running":  # in the pause: before, the machines are compared
            cancelled = threading.Event()
            loop = tasks[0].get_loop()
            loop.call_soon_threadsafe(lambda: (tasks[0].cancel(), loop.call_soon(cancelled.set)))
            assert cancelled.wait(10) is asked
        return of_snapshot(*given)

    monkeypatch.setattr(vm_state, "of_snapshot", opened)
    asyncio.run(main())
    guest.assert_running()


def test_a_state_file_that_is_cut_meanwhile(guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before QEMU has begun: so nothing is loaded, and the guest runs on."""
    cli("save", "--live", "t", monitor=guest.address)
    path = tmp_path / "disk0.qcow2.t.qsnap"
    guest.wait_for_ticks(3)
    count, walk = guest.counter, difference.walk

    def walked(*given: Any, **more: Any) -> difference.Found:
        os.truncate(path, 100_000)
        return walk(*given, **more)

    monkeypatch.setattr(difference, "walk", walked)
    with pytest.raises(qsnap.QsnapError, match=r"resumed\n.* is damaged: ") as caught:
        in_process(guest)
    assert caught.value.exit_code == 6
    assert guest.counter > count
    guest.assert_running()


def test_a_state_file_that_is_replaced_meanwhile(guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened is what is loaded."""
    cli("save", "--live", "t", monitor=guest.address)
    guest.qmp("stop")
    load(guest, "t", "--full")
    expected = ram(guest)
    guest.qmp("cont")
    scribble(guest, seeded(5))
    walk = difference.walk

    def walked(*given: Any, **more: Any) -> difference.Found:
        (tmp_path / "other").write_bytes(b"something else" * 10000)
        (tmp_path / "other").rename(tmp_path / "disk0.qcow2.t.qsnap")
        return walk(*given, **more)

    monkeypatch.setattr(difference, "walk", walked)
    assert in_process(guest, running=False).method == "delta"
    assert ram(guest) == expected
