"""Other architectures than x86: what a load brings back. scripts/test-matrix runs this with their QEMUs.

On aarch64 and riscv64 guests of our own count, and change their own code. On the others the guest stands still, and its
RAM is written through QEMU's gdb stub. On aarch64 the firmware AAVMF writes to its variable store.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from support.gdb import Stub
from support.guest import (
    GUESTS,
    HAS_SNAPSHOT_JOBS,
    QEMU,
    Guest,
    Launch,
    blockdev,
    both_monitors,
    cli,
    make_disk,
    needs_snapshot_jobs,
    tags,
    tool,
    until,
)

ARCHITECTURE = QEMU.rpartition("qemu-system-")[2]

pytestmark = pytest.mark.skipif(
    ARCHITECTURE == "x86_64", reason="scripts/test-matrix runs it with the QEMUs of other architectures"
)


class Board(NamedTuple):
    """A machine with two flash chips, the guest's code in the first one.

    :ivar flash: bytes of a chip.
    :ivar ram: where RAM begins.
    """

    options: list[str]
    flash: int
    ram: int


BOARDS = {
    "aarch64": Board(["-cpu", "cortex-a57"], 64 << 20, 0x40000000),
    "riscv64": Board(["-bios", "none"], 32 << 20, 0x80000000),
}
counts = pytest.mark.skipif(ARCHITECTURE not in BOARDS, reason="its guest stands still")
MEMORY = 32
#: Of the guests of our own, from the beginning of RAM: the count, and how often other code ran than RAM holds.
COUNT, BAD = 0x200000, 0x200004
#: Where code is that changes.
CODE = 0x201000


class Counting:
    """The guest that counts, with a disk and a variable store that the test writes to."""

    def __init__(self, launch: Launch, directory: Path) -> None:
        self.board = BOARDS[ARCHITECTURE]
        code, self.variables, self.disk = directory / "code", directory / "vars.qcow2", directory / "disk.qcow2"
        with code.open("wb") as file:
            file.write((GUESTS / f"{ARCHITECTURE}.bin").read_bytes())
            file.truncate(self.board.flash)
        make_disk(self.variables, str(self.board.flash))
        make_disk(self.disk)
        self.guest: Guest = launch(
            *self.board.options,
            "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}",
            "-drive", f"if=pflash,unit=1,format=qcow2,file={self.variables},id=vars",
            *blockdev("disk", self.disk), "-device", "virtio-blk-pci,drive=disk,share-rw=on",
            machine="virt,accel=tcg", memory=str(MEMORY),
        )  # fmt: skip
        self.dump = directory / "ram"
        self.go_on()

    def word(self, offset: int) -> int:
        return self.guest.word(self.board.ram + offset)

    def go_on(self, steps: int = 100_000) -> None:
        """Until it has counted so far from now on."""
        begun = self.word(COUNT)
        until("it to count", lambda: self.word(COUNT) >= begun + steps)

    def ram(self) -> bytes:
        """All of its RAM; it stands still."""
        self.guest.qmp("pmemsave", val=self.board.ram, size=MEMORY << 20, filename=str(self.dump))
        return self.dump.read_bytes()

    def write(self, value: int) -> None:
        for device in ("disk", "vars"):
            assert self.guest.qmp.hmp(f'qemu-io {device} "write -P {value} 0 64k"') == ""

    def holds(self, value: int) -> bool:
        """Whether disk and variable store hold what :meth:`write` has written."""
        seen = len(self.guest.log)
        for device in ("disk", "vars"):
            self.guest.qmp.hmp(f'qemu-io {device} "read -P {value} 0 64k"')
        return self.guest.log[seen:].count("read 65536/65536") == 2 and "failed" not in self.guest.log[seen:]

    def assert_runs_its_own_code(self) -> None:
        code = self.word(CODE)
        self.go_on()
        until("it to change its code", lambda: self.word(CODE) != code)
        assert self.word(BAD) == 0


@pytest.fixture
def counting(launch: Launch, tmp_path: Path) -> Counting:
    return Counting(launch, tmp_path)


@counts
@both_monitors
def test_what_a_load_brings_back(counting: Counting, transport: str) -> None:
    """All of RAM, byte for byte, the disk, the variable store, and the code that runs."""
    guest = counting.guest
    counting.write(0x11)
    guest.qmp("stop")
    before = counting.ram()
    cli("save", "t", monitor=guest.address)
    assert counting.ram() == before
    assert (tags(counting.disk), tags(counting.variables)) == (["t"], ["t"])
    guest.qmp("cont")
    for how in ([], ["--full"]) if transport == "hmp" or not HAS_SNAPSHOT_JOBS else ([], ["--verify"], ["--full"]):
        counting.go_on()
        counting.write(0x22)
        assert not counting.holds(0x11)
        loaded = cli("load", "t", "--paused", "--json", *how, monitor=guest.address).json
        assert counting.ram() == before
        assert counting.holds(0x11)
        assert (loaded["method"], loaded["why_full"]) != ("full", "")
        cli("resume", monitor=guest.address)
        counting.assert_runs_its_own_code()
    cli("delete", "t", monitor=guest.address)
    assert (tags(counting.disk), tags(counting.variables)) == ([], [])


@counts
def test_a_load_while_it_runs(counting: Counting) -> None:
    guest = counting.guest
    before = counting.word(COUNT)
    cli("save", "t", monitor=guest.address)
    after = counting.word(COUNT)
    for _ in range(3):
        counting.go_on(1_000_000)
        cli("load", "t", monitor=guest.address)
        counting.assert_runs_its_own_code()
    cli("load", "t", "--paused", monitor=guest.address)
    assert before <= counting.word(COUNT) <= after


@counts
@needs_snapshot_jobs
def test_a_live_save(counting: Counting) -> None:
    guest = counting.guest
    counting.write(0x11)
    before = counting.word(COUNT)
    cli("save", "t", "--live", monitor=guest.address)
    after = counting.word(COUNT)
    counting.go_on(1_000_000)
    counting.write(0x22)
    cli("load", "t", "--paused", monitor=guest.address)
    assert before <= counting.word(COUNT) <= after
    assert counting.holds(0x11)
    cli("resume", monitor=guest.address)
    counting.assert_runs_its_own_code()


AAVMF = Path("/usr/share/AAVMF")
#: Where the second flash chip of "virt" is.
STORE = 64 << 20


@pytest.mark.skipif(ARCHITECTURE != "aarch64", reason="that is aarch64's firmware")
@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_firmware_in_flash(launch: Launch, tmp_path: Path, driver: str) -> None:
    """What AAVMF has written to its variable store comes and goes with the snapshots, and it runs on."""
    store, chip = tmp_path / "vars", tmp_path / "chip"
    empty = (AAVMF / "AAVMF_VARS.fd").read_bytes()
    convert = [tool("qemu-img"), "convert", "-U", "-f"]
    subprocess.run([*convert, "raw", "-O", driver, AAVMF / "AAVMF_VARS.fd", store], check=True, timeout=60)
    guest = launch(
        "-S", "-cpu", "cortex-a57",
        "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={AAVMF}/AAVMF_CODE.fd",
        "-drive", f"if=pflash,unit=1,format={driver},file={store}",
        # With a virtio disk this firmware now and then waits forever for a request that QEMU has not noticed.
        *blockdev("disk", make_disk(tmp_path / "disk.qcow2")),
        "-device", "ich9-ahci,id=ahci", "-device", "ide-hd,bus=ahci.0,drive=disk",
        machine="virt,accel=tcg", memory="128",
    )  # fmt: skip

    def held() -> bytes:
        """What the guest reads."""
        guest.qmp("pmemsave", val=STORE, size=len(empty), filename=str(chip))
        return chip.read_bytes()

    def kept() -> bytes:
        """What is in the file."""
        subprocess.run([*convert, driver, "-O", "raw", store, chip], check=True, timeout=60)
        return chip.read_bytes()

    cannot = driver == "raw" and not HAS_SNAPSHOT_JOBS
    checked = cli("check", "--json", monitor=guest.address, expect=6 if cannot else 0).json
    verdicts = {one["device"]: one["verdict"] for one in checked["devices"]}
    assert verdicts["pflash0"] == "ignored"
    assert verdicts["pflash1"] == ("refused" if cannot else "carried" if driver == "raw" else "saved")
    if cannot:
        return
    cli("save", "fresh", monitor=guest.address)
    guest.qmp("cont")
    until("the firmware's shell", lambda: b"5 seconds to skip" in guest.serial.read_bytes())
    guest.qmp("stop")
    written = held()
    assert written != empty
    cli("save", "booted", monitor=guest.address)

    cli("load", "fresh", monitor=guest.address)
    assert held() == empty
    cli("resume", monitor=guest.address)
    until("the file to be as it was", lambda: kept() != written)

    cli("load", "booted", "--paused", monitor=guest.address)
    assert held() == written
    said = guest.serial.stat().st_size
    cli("resume", monitor=guest.address)
    until("the firmware to go on", lambda: guest.serial.stat().st_size > said)
    guest.qmp("stop")
    assert kept() == written


#: The machines whose guest stands still, and the disk's device.
STANDING = {"s390x": ("s390-ccw-virtio", "virtio-blk-ccw"), "ppc64": ("pseries", "virtio-blk-pci")}
ADDRESS = 0x100000


@pytest.mark.skipif(ARCHITECTURE not in STANDING, reason="its guest counts")
@both_monitors
def test_a_guest_that_stands_still(launch: Launch, tmp_path: Path, transport: str) -> None:
    machine, device = STANDING[ARCHITECTURE]
    disk = make_disk(tmp_path / "disk.qcow2")
    guest = launch(
        "-S", "-gdb", f"unix:{tmp_path}/gdb,server=on,wait=off",
        *blockdev("disk", disk), "-device", f"{device},drive=disk,share-rw=on",
        machine=f"{machine},accel=tcg", memory="512",
    )  # fmt: skip
    stub = Stub(tmp_path / "gdb")
    try:
        assert stub(f"M{ADDRESS:x},4:11223344") == "OK"
        assert guest.qmp.hmp('qemu-io disk "write -P 17 0 64k"') == ""
        cli("save", "t", monitor=guest.address)
        assert tags(disk) == ["t"]
        for how in ([], ["--full"]):
            assert stub(f"M{ADDRESS:x},4:55667788") == "OK"
            assert guest.qmp.hmp('qemu-io disk "write -P 34 0 64k"') == ""
            cli("load", "t", *how, monitor=guest.address)
            assert stub(f"m{ADDRESS:x},4") == "11223344"
            seen = len(guest.log)
            guest.qmp.hmp('qemu-io disk "read -P 17 0 64k"')
            assert "read 65536/65536" in guest.log[seen:]
            assert "failed" not in guest.log[seen:]
        assert cli("check", "--json", monitor=guest.address).json["ok"]
        cli("delete", "t", monitor=guest.address)
        assert tags(disk) == []
    finally:
        stub.close()


#: For "pseries", from address 0x100, where its processor starts as a big-endian one; and from 0x200, little-endian.
TURNS = (
    0x7C6000A6,  # mfmsr r3
    0x60630001,  # ori r3, r3, 1    (MSR.LE)
    0x7C7B03A6,  # mtsrr1 r3
    0x38800200,  # li r4, 0x200
    0x7C9A03A6,  # mtsrr0 r4
    0x4C000024,  # rfid
)
COUNTS = (
    0x3CA00010,  # lis r5, 0x10     (ADDRESS)
    0x38C00000,  # li r6, 0
    0x38C60001,  # addi r6, r6, 1
    0x90C50000,  # stw r6, 0(r5)
    0x4BFFFFF8,  # b -8
)


@pytest.mark.skipif(ARCHITECTURE != "ppc64", reason="that is pseries")
@both_monitors
def test_a_little_endian_guest(launch: Launch, tmp_path: Path, transport: str) -> None:
    """ppc64le: it counts on, in its own byte order."""
    firmware, dump = tmp_path / "firmware", tmp_path / "dump"
    firmware.write_bytes(bytes(0x100) + struct.pack(">6I", *TURNS).ljust(0x100, b"\0") + struct.pack("<5I", *COUNTS))
    guest = launch(
        "-bios", str(firmware), *blockdev("disk", make_disk(tmp_path / "disk.qcow2")),
        "-device", "virtio-blk-pci,drive=disk",
        machine="pseries,accel=tcg", memory="512",
    )  # fmt: skip

    def count() -> int:
        guest.qmp("pmemsave", val=ADDRESS, size=4, filename=str(dump))
        return int.from_bytes(dump.read_bytes(), "little")

    until("it to count", lambda: count() > 100_000)
    guest.qmp("stop")
    assert re.search(r"MSR [0-9a-f]{15}[13579bdf]", guest.qmp.hmp("info registers"))  # the last bit is LE
    before = count()
    cli("save", "t", monitor=guest.address)
    guest.qmp("cont")
    until("it to count on", lambda: count() != before)
    cli("load", "t", "--paused", monitor=guest.address)
    assert count() == before
    cli("resume", monitor=guest.address)
    until("it to count on", lambda: count() != before)


@counts
def test_the_binary_is_what_the_source_says(tmp_path: Path) -> None:
    tools = f"{ARCHITECTURE}-linux-gnu-"
    assert shutil.which(f"{tools}as"), f"apt install binutils-{ARCHITECTURE}-linux-gnu"
    subprocess.run([f"{tools}as", GUESTS / f"{ARCHITECTURE}.s", "-o", tmp_path / "o"], check=True, timeout=60)
    subprocess.run([f"{tools}objcopy", "-O", "binary", tmp_path / "o", tmp_path / "bin"], check=True, timeout=60)
    assert (tmp_path / "bin").read_bytes() == (GUESTS / f"{ARCHITECTURE}.bin").read_bytes()
