"""What a save needs of the image is made before the guest is stopped, and nothing else changes by it.

What QEMU does, and when, is told by its own trace.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import qsnap
from qsnap.errors import MonitorLost
from qsnap.inventory.qcow2 import Unreadable
from qsnap.inventory.vm_state import Stretch, unprepared
from qsnap.operations.progress import Phase, Progress
from support.guest import (
    Guest,
    Launch,
    assert_nothing_left,
    assert_sound,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    finish,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    start_cli,
    state_sizes,
    tags,
    until,
)
from support.killed import assert_all_is_well

_EVENTS = re.compile(
    r"(?P<allocate>qcow2_do_alloc_clusters_offset)|(?P<prepare>cmdline: qemu-io)"
    r"|(?P<stop>vm_state_notify running 0)|(?P<cont>vm_state_notify running 1)"
)
#: Requests for clusters in the pause of a save that is not prepared: some 245 with 32 MiB. If it is prepared, there are
#: some for tables, and for what the state is larger than was expected.
MANY = 40


class Trace:
    """What QEMU does from now on: "allocate" (clusters of an image), "prepare", "stop" and "cont"."""

    def __init__(self, guest: Guest) -> None:
        self._log = guest.directory / "log"
        for event in ("qcow2_do_alloc_clusters_offset", "vm_state_notify", "handle_hmp_command"):
            guest.qmp.hmp(f"trace-event {event} on")
        self.begin()

    def begin(self) -> None:
        """Begin anew."""
        self._seen = len(self._log.read_text())

    @property
    def events(self) -> list[str]:
        """All of them, in order."""
        return [match.lastgroup or "" for match in _EVENTS.finditer(self._log.read_text()[self._seen :])]

    @property
    def prepares(self) -> bool:
        """Whether anything was prepared."""
        return "prepare" in self.events

    @property
    def in_pause(self) -> int:
        """How many requests for clusters there were while the guest stood still."""
        events = self.events
        return events[events.index("stop") : events.index("cont")].count("allocate")


def look(image: Path, size: int = 1 << 20) -> list[Stretch]:
    """What of a state is not prepared, read from the image itself."""
    file = os.open(image, os.O_RDONLY)
    try:
        return unprepared(file, size)
    finally:
        os.close(file)


@pytest.fixture(params=["-blockdev", "-drive"])
def beside(request: pytest.FixtureRequest, launch: Launch, tmp_path: Path) -> Guest:
    """A guest whose VM state goes to a disk that the guest itself does not write."""
    spare, boot = make_disk(tmp_path / "spare"), make_boot_disk(tmp_path / "boot")
    if request.param == "-blockdev":
        disk = [*blockdev("spare", spare), *disk_device("spare", id="s")]
    else:
        disk = ["-drive", f"format=qcow2,id=spare,if=virtio,file={spare}"]
    guest = launch(*disk, *blockdev("boot", boot), "-device", "virtio-blk,drive=boot,bootindex=0")
    guest.wait_for_ticks()
    return guest


@both_monitors
def test_the_first_save_after_a_load_copies_nothing_in_the_pause(beside: Guest, tmp_path: Path, transport: str) -> None:
    """Cluster by cluster it would take 3 to 40 times as long. The control is the same without."""
    guest, trace, spare = beside, Trace(beside), tmp_path / "spare"
    counts = {}
    for tag, option in ("a", "--no-prepare"), ("b", "--no-prepare"), ("c", "--prepare"), ("d", None):
        counts[tag] = guest.wait_for_ticks(20)
        trace.begin()
        cli("save", tag, *([option] if option else []), monitor=guest.address)
        assert (trace.in_pause > MANY, trace.prepares) == (option == "--no-prepare", option != "--no-prepare")
        cli("load", tag, monitor=guest.address)
        assert look(spare)[0].is_shared, "after a load it is the snapshot's"
    assert_nothing_left(guest, {spare: ["a", "b", "c", "d"], tmp_path / "boot": ["a", "b", "c", "d"]})
    for tag in "adbc":
        cli("load", tag, "--paused", monitor=guest.address)
        assert guest.counter >= counts[tag]
        cli("load", tag, "--running", monitor=guest.address)
        guest.assert_running()
    guest.quit()
    assert_sound(spare)
    assert_sound(tmp_path / "boot")


@both_monitors
def test_what_is_ready_is_left(guest: Guest, tmp_path: Path, transport: str) -> None:
    """Whatever has loaded the state that is shared; and to delete the only other one that has it is enough."""
    guest.qmp.hmp("savevm a")
    guest.qmp.hmp("loadvm a")
    trace = Trace(guest)

    def saved(*arguments: str) -> tuple[bool, bool]:
        trace.begin()
        cli("save", *arguments, monitor=guest.address)
        return trace.prepares, trace.in_pause > MANY

    assert saved("b") == (True, False)
    assert saved("c") == (False, True), "this state is small, and none is loaded"
    cli("load", "c", monitor=guest.address)
    assert saved("c") == (False, False), "it replaces what it shares with"
    cli("load", "c", monitor=guest.address)
    assert saved("c", "--safe-replace") == (True, False)
    guest.qmp.hmp("loadvm a")
    if transport == "qmp":  # the disks alone, as a live save has them
        guest.qmp("blockdev-snapshot-internal-sync", device="disk0", name="disks")
        assert saved("a") == (True, False), "another one has it, too"
        assert sorted(tags(tmp_path / "disk0.qcow2")) == ["a", "b", "c.qsnap-2", "disks"]
    guest.qmp("stop")  # QEMU writes down what it knows of the image
    assert_sound(tmp_path / "disk0.qcow2")
    guest.qmp("cont")
    for tag in "abc":
        cli("load", tag, monitor=guest.address)
        guest.assert_running()


@pytest.mark.parametrize(
    "options", ["compat=0.10", "cluster_size=512", "cluster_size=2M", "extended_l2=on,cluster_size=128k"]
)
def test_other_images(launch: Launch, tmp_path: Path, options: str) -> None:
    image = make_boot_disk(tmp_path / "a", "qcow2", "-o", options)
    guest = launch(*blockdev("a", image), *disk_device("a"))
    guest.wait_for_ticks()
    cli("save", "a", monitor=guest.address)
    cli("load", "a", monitor=guest.address)
    assert look(image)[0].is_shared
    cli("save", "b", monitor=guest.address)
    for tag in ("a", "b"):
        cli("load", tag, monitor=guest.address)
        guest.assert_running()
    guest.quit()
    assert_sound(image)


def test_what_is_missing(launch: Launch, tmp_path: Path) -> None:
    """Of a large state that is made before, too; the options and the config file say whether."""
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*blockdev("a", image), *disk_device("a"), memory="96")
    guest.wait_for_ticks()
    trace = Trace(guest)
    config = tmp_path / "config.toml"
    config.write_text("[defaults]\nprepare = false\n")
    environment = {"QSNAP_CONFIG": str(config)}
    for options, env, prepares in (
        ((), None, True),
        (("--no-prepare",), None, False),
        ((), environment, False),
        (("--prepare",), environment, True),
    ):
        trace.begin()
        cli("save", "t", *options, monitor=guest.address, env=env)
        assert (trace.prepares, trace.in_pause > MANY) == (prepares, not prepares)
        cli("delete", "t", monitor=guest.address)
    guest.qmp("stop")
    trace.begin()
    cli("save", "t", monitor=guest.address)
    assert not trace.prepares, "a guest that stands still feels no pause"
    guest.qmp("cont")
    cli("load", "t", monitor=guest.address)
    guest.assert_running()


def test_the_image_does_not_grow_by_it(launch: Launch, tmp_path: Path) -> None:
    """A state that is smaller than the one that was loaded leaves none of that behind in the new snapshots."""
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*blockdev("a", image), *disk_device("a"), memory="96")
    guest.wait_for_ticks()
    cli("save", "large", monitor=guest.address)
    cli("load", "large", monitor=guest.address)
    guest.qmp("stop")  # else it fills its RAM again
    zero_most_of_ram(guest)
    grown = []
    for tag in "abc":
        before = image.stat().st_blocks
        cli("save", tag, monitor=guest.address)
        grown.append((image.stat().st_blocks - before) * 512)
    size = state_sizes(image)["c"]
    assert size < 48 << 20
    assert max(grown) < size * 1.25 + (2 << 20), "as with bare savevm, and a little for tables"


def zero_most_of_ram(guest: Guest) -> None:
    """All from 16 MiB on: the boot-sector guest does not look there."""
    begin = int(guest.qmp.hmp("gpa2hva 0x1000000").split()[-1], 16)
    with Path(f"/proc/{guest.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(begin)
        memory.write(bytes(80 << 20))


@needs_snapshot_jobs
def test_what_qemu_has_not_written_down(launch: Launch, tmp_path: Path) -> None:
    """A disk that nobody flushes: its file shows for long what QEMU has discarded. Each large save is prepared."""
    spare = make_disk(tmp_path / "spare")
    guest = launch(
        *blockdev("boot", make_boot_disk(tmp_path / "boot")), *disk_device("boot"),
        *blockdev("spare", spare), "-device", "pcie-root-port,id=rp0,chassis=3", memory="96",
    )  # fmt: skip
    guest.wait_for_ticks()
    guest.qmp("device_add", driver="virtio-blk-pci", id="late", bus="rp0", drive="spare")
    trace = Trace(guest)
    for tag in "abc":
        trace.begin()
        cli("save", tag, "--vmstate", "spare", monitor=guest.address)
        assert (trace.prepares, trace.in_pause < MANY) == (True, True), tag
    for tag in "ca":
        cli("load", tag, monitor=guest.address)
        guest.assert_running()


@pytest.mark.parametrize(("at", "text"), [(36, b"\x7f\xff\xff\xff"), (60, b"\x7f\xff\xff\xff")])
def test_a_header_that_somebody_has_changed(guest: Guest, tmp_path: Path, at: int, text: bytes) -> None:
    """It makes nobody read gigabytes; QEMU goes by what it has read."""
    with (tmp_path / "disk0.qcow2").open("r+b") as image:
        image.seek(at)
        before = image.read(len(text))
        image.seek(at)
        image.write(text)
        image.truncate(20 << 30)
        image.flush()
        with pytest.raises(Unreadable):
            look(tmp_path / "disk0.qcow2")
        cli("check", monitor=guest.address)
        image.seek(at)
        image.write(before)
    guest.assert_running()


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 256 MiB."""
    backing = tmp_path / "backing"
    backing.touch()
    os.truncate(backing, 256 << 20)
    made = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


def test_a_block_device(launch: Launch, tmp_path: Path, loop_device: Path) -> None:
    """What is shared is prepared there, too: the save itself would copy it. Whether there is more room nobody knows."""
    image = make_boot_disk(tmp_path / "a")
    with loop_device.open("r+b") as device:
        device.write(image.read_bytes())
    disk = f"driver=qcow2,node-name=a,file.driver=host_device,file.filename={loop_device}"
    guest = launch("-blockdev", disk, *disk_device("a"))
    guest.wait_for_ticks()
    cli("save", "a", monitor=guest.address)
    cli("load", "a", monitor=guest.address)
    trace = Trace(guest)
    cli("save", "b", monitor=guest.address)
    assert (trace.prepares, trace.in_pause < MANY) == (True, True)
    cli("verify", "--read-data", monitor=guest.address)
    for tag in "ab":
        cli("load", tag, monitor=guest.address)
        guest.assert_running()
    guest.quit()


@needs_snapshot_jobs
def test_no_device_of_the_guest(launch: Launch, tmp_path: Path) -> None:
    """The area of such an image cannot be prepared: that is said beforehand, and the save does without."""
    spare = make_disk(tmp_path / "spare")
    guest = launch(
        *blockdev("boot", make_boot_disk(tmp_path / "boot")), *disk_device("boot"),
        *blockdev("spare", spare),
    )  # fmt: skip
    guest.wait_for_ticks()
    where = ("--vmstate", "spare")
    cli("save", "a", *where, monitor=guest.address)
    cli("load", "a", monitor=guest.address)
    for command, said in ("check", "findings"), ("save b -n", "warnings"):
        (finding,) = cli(*command.split(), *where, "--json", monitor=guest.address).json[said]
        assert finding["code"] == "long-pause"
        assert "spare: the guest may pause much longer than usual" in finding["message"]
        assert "copy them beforehand: no device of the guest uses its image" in finding["message"]
    cli("save", "b", *where, monitor=guest.address)
    cli("load", "b", monitor=guest.address)
    guest.assert_running()


@pytest.fixture
def half_prepared(launch: Launch, tmp_path: Path) -> tuple[Guest, Trace, list[str]]:
    """A guest with a large state, after a load; and what it was started with."""
    disk = [*blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a")]
    guest = launch(*disk, memory="128")
    guest.wait_for_ticks()
    cli("save", "a", monitor=guest.address)
    cli("load", "a", monitor=guest.address)
    return guest, Trace(guest), disk


@both_monitors
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_qsnap_ends_in_the_middle(
    half_prepared: tuple[Guest, Trace, list[str]],
    tmp_path: Path,
    runtime_directory: Path,
    transport: str,
    number: signal.Signals,
) -> None:
    """The guest was never stopped, and nothing is to be undone."""
    guest, trace, _ = half_prepared
    saving = start_cli("save", "b", monitor=guest.address)
    until("the first piece", lambda: trace.prepares)
    saving.send_signal(number)
    assert finish(saving).code == (-number if number is signal.SIGKILL else 128 + number)
    assert_all_is_well(guest, runtime_directory, {tmp_path / "a": ["a"]})
    assert "stop" not in trace.events
    trace.begin()
    cli("save", "b", monitor=guest.address)
    assert trace.in_pause < MANY
    for tag in "ab":
        cli("load", tag, monitor=guest.address)
        guest.assert_running()


async def test_qemu_ends_in_the_middle(
    half_prepared: tuple[Guest, Trace, list[str]], launch: Launch, tmp_path: Path
) -> None:
    """Older snapshots load, and the image is sound but for clusters that nobody has."""
    guest, trace, disk = half_prepared

    def strike(progress: Progress) -> None:
        assert progress.phase is Phase.PREPARING
        assert (progress.written or 0) < (progress.expected or 0)
        guest.process.kill()
        guest.process.wait(30)

    async with qsnap.connect(guest.address) as vm:
        with pytest.raises(MonitorLost) as lost:
            await vm.save("b", watch=strike)
    assert str(lost.value) == "QEMU has ended; there is no guest any more; nothing was saved"
    assert "stop" not in trace.events
    assert_sound(tmp_path / "a")
    second = launch(*disk, memory="128")
    cli("load", "a", monitor=second.address)
    second.assert_running()
    cli("save", "b", monitor=second.address)
    cli("load", "b", monitor=second.address)
    second.assert_running()
