"""The guests are what their sources say, and the demo runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import qsnap.guest
from support.guest import GUESTS, HAS_SNAPSHOT_JOBS, QEMU, cli, finish, start_cli

BOOT = Path(qsnap.guest.__file__).with_name("boot.asm")


@pytest.mark.parametrize(
    ("source", "binary", "options"),
    [
        (BOOT, BOOT.with_suffix(".bin"), []),
        (BOOT, GUESTS / "heavy.bin", ["-DPAGES=256"]),
        (GUESTS / "pflash.asm", GUESTS / "pflash.bin", []),
        (GUESTS / "instep.asm", GUESTS / "instep.bin", []),
        (GUESTS / "selfmod.asm", GUESTS / "selfmod.bin", []),
        (GUESTS / "states.asm", GUESTS / "states.bin", []),
    ],
    ids=["boot", "heavy", "pflash", "instep", "selfmod", "states"],
)
def test_the_binary_is_what_the_source_says(source: Path, binary: Path, options: list[str], tmp_path: Path) -> None:
    subprocess.run(["nasm", *options, "-f", "bin", source, "-o", tmp_path / "out"], check=True, timeout=60)
    assert (tmp_path / "out").read_bytes() == binary.read_bytes()
    assert len(binary.read_bytes()) == (1024 if options else 512)


def test_demo() -> None:
    out = cli("demo", "--qemu", QEMU).out
    directory = re.search(r"boots in (\S+):", out)
    assert directory is not None
    assert not Path(directory[1]).exists()
    on_disk = re.search(r"On the disk the count is (\d+) again; it was (\d+) before the load", out)
    back = re.search(r"The guest goes on with (\d+): it was saved between (\d+) and (\d+)", out)
    assert on_disk is not None
    assert back is not None
    assert int(back[2]) <= int(on_disk[1]) <= int(back[3]) < int(on_disk[2])
    assert int(back[1]) - int(on_disk[1]) in (0, 1)
    assert ": 0 differences" in out
    live = r"\d+ ms \(--live\) or " if HAS_SNAPSHOT_JOBS else ""
    assert re.search(rf"A save paused the guest for {live}\d+ ms;\n# savevm for \d+ ms, and for \d+ ms", out)
    assert re.search(r"A load paused it for \d+ ms, loadvm for \d+ ms", out)
    shown = ["check", "save before", "list", "load before --paused", "load before --running", "save live", "load live"]
    for command in shown:
        assert f"$ qsnap {command}" in out


def test_demo_without_qemu(tmp_path: Path) -> None:
    run = cli("demo", "--qemu", str(tmp_path / "none"), expect=5)
    assert "apt install" in run.err


def test_demo_ends_its_guest_when_interrupted() -> None:
    process = start_cli("demo", "--qemu", QEMU)
    assert process.stdout is not None
    line = process.stdout.readline()
    directory = re.search(r"boots in (\S+):", line)
    assert directory is not None
    assert [process.stdout.readline()[:4] for _ in range(2)] == ["# it", "# It"]
    process.terminate()
    assert finish(process).code == 143
    assert not Path(directory[1]).exists()
    assert directory[1] not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_tools_are_there() -> None:
    assert shutil.which("nasm"), "the guests' sources are assembled by the tests: apt install nasm"
