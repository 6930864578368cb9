"""A raw UEFI variable store travels inside the VM state: what a guest wrote to it after the save is undone.

The guest marks one byte of its second flash chip after another. After a load, the marks that it made since
the save must be gone, from what the guest reads and from the file.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import qsnap.guest
from support.disks import firmware
from support.guest import (
    GUESTS,
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    blockdev,
    cli,
    make_disk,
    needs_snapshot_jobs,
    tool,
    until,
)

#: Where the guest sees the chip.
FLASH = 0xFFF80000


@pytest.fixture
def flash_guest(launch: Launch, tmp_path: Path) -> Guest:
    sector = (GUESTS / "pflash.bin").read_bytes()
    qsnap.guest.make_disk(tmp_path / "boot", qemu_img=tool("qemu-img"), sector=sector)
    variables = make_disk(tmp_path / "vars", "256k", "raw")
    guest = launch(
        *firmware(tmp_path), "-drive", f"if=pflash,format=raw,file={variables}",
        *blockdev("disk0", tmp_path / "boot"), "-device", "virtio-blk,drive=disk0",  # 11.1's firmware in flash: no AHCI
    )  # fmt: skip
    wait_for_counter(guest, 8)
    return guest


def wait_for_counter(guest: Guest, value: int) -> None:
    until(f"counter {value}", lambda: guest.counter >= value or None)


def marks(guest: Guest, first: int, last: int) -> list[int]:
    """Bytes of the chip as the guest reads them."""
    return [guest.word(FLASH + offset) & 0xFF for offset in range(first, last + 1)]


def stop_between_marks(guest: Guest) -> int:
    """Stop the guest where the chip is in no mark, and answers with no status; return the counter."""

    def stopped() -> int | None:
        guest.qmp("stop")
        counter = guest.counter
        if marks(guest, counter, counter) == [0xAA]:
            return counter
        guest.qmp("cont")
        return None

    return until("the guest to stop between two marks", stopped)


def test_check_says_carried(flash_guest: Guest) -> None:
    report = cli("check", "--json", monitor=flash_guest.address, expect=0 if HAS_SNAPSHOT_JOBS else 6).json
    verdicts = {device["device"]: (device["role"], device["verdict"]) for device in report["devices"]}
    assert verdicts["pflash0"] == ("pflash", "ignored")
    assert verdicts["pflash1"] == ("pflash", "carried" if HAS_SNAPSHOT_JOBS else "refused")
    assert report["ok"] is HAS_SNAPSHOT_JOBS
    assert report["vmstate"] == "disk0"


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)
def test_a_human_monitor_cannot_carry_it(flash_guest: Guest) -> None:
    report = cli("check", "--json", monitor=flash_guest.address, expect=6).json
    assert {device["device"]: device["verdict"] for device in report["devices"]}["pflash1"] == "refused"


def test_human_savevm_refuses_this_guest(flash_guest: Guest) -> None:
    """What qsnap does better is worth showing."""
    assert "Device 'pflash1' is writable but does not support snapshots" in flash_guest.qmp.hmp("savevm x")


@needs_snapshot_jobs
def test_the_bytes_come_back(flash_guest: Guest, tmp_path: Path) -> None:
    variables = tmp_path / "vars"
    saved = stop_between_marks(flash_guest)
    result = cli("save", "t", "--json", monitor=flash_guest.address).json
    assert len(result["carried"]) == 1
    assert result["kind"] == "full"
    flash_guest.qmp("cont")
    wait_for_counter(flash_guest, saved + 30)
    later = stop_between_marks(flash_guest)
    assert marks(flash_guest, 1, later) == [0xAA] * later
    assert variables.read_bytes()[1 : later + 1] == b"\xaa" * later

    loaded = cli("load", "t", "--paused", "--json", monitor=flash_guest.address).json
    assert (loaded["devices"], loaded["method"]) == (["disk0"], "delta")
    assert flash_guest.counter == saved
    assert marks(flash_guest, 1, later) == [0xAA] * saved + [0] * (later - saved)
    # QEMU writes the chip back to its file when the loaded state starts to run.
    flash_guest.qmp("cont")
    until("the guest to go on", lambda: flash_guest.counter > saved or None)
    now = stop_between_marks(flash_guest)
    assert now < later, "the guest has overtaken the test; nothing can be seen"
    assert variables.read_bytes()[1 : later + 1] == b"\xaa" * now + bytes(later - now)


@needs_snapshot_jobs
def test_a_list_counts_it_as_whole(flash_guest: Guest) -> None:
    cli("save", "t", monitor=flash_guest.address)
    (snapshot,) = cli("list", "--json", monitor=flash_guest.address).json["snapshots"]
    assert snapshot["kind"] == "full"
    assert snapshot["missing"] == []
