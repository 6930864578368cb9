"""Large files written back and deleted little by little: what becomes of them, and of those who have them too."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qsnap.host import bulk_io

pytestmark = pytest.mark.no_qemu

MIB = 1 << 20


def made(path: Path, mebibytes: int = 4) -> Path:
    with path.open("wb") as file:
        for number in range(mebibytes):
            file.write(bytes([number + 1]) * MIB)
    return path


@pytest.fixture
def truncated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that files are shortened to; a MiB at a time."""
    sizes: list[int] = []
    real = os.ftruncate

    def noted(file: int, size: int) -> None:
        sizes.append(size)
        real(file, size)

    monkeypatch.setattr(bulk_io, "_DELETED_AT_ONCE", MIB)
    monkeypatch.setattr(os, "ftruncate", noted)
    return sizes


def test_a_file_goes_step_by_step(tmp_path: Path, truncated: list[int]) -> None:
    bulk_io.remove(made(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []
    assert truncated == [3 * MIB, 2 * MIB, MIB, 0]


def test_a_copy_by_another_name_keeps_what_it_holds(tmp_path: Path, truncated: list[int]) -> None:
    """As backups make them (cp --link)."""
    file = made(tmp_path / "file")
    copy = tmp_path / "copy"
    copy.hardlink_to(file)
    expected = file.read_bytes()
    bulk_io.remove(file)
    assert copy.read_bytes() == expected
    assert truncated == []


def test_who_reads_it_reads_it_to_its_end(tmp_path: Path, truncated: list[int]) -> None:
    file = made(tmp_path / "file")
    with file.open("rb") as reader:
        begin = reader.read(MIB)
        bulk_io.remove(file)
        assert begin + reader.read() == b"".join(bytes([number + 1]) * MIB for number in range(4))
    assert truncated == []
    assert not file.exists()


def test_no_signal_comes_of_those_who_look(tmp_path: Path) -> None:
    """The kernel tells the holder of a lease, by a signal that ends it, when somebody opens the file."""
    file = made(tmp_path / "file", 200)
    script = (
        "import sys; from pathlib import Path; from qsnap.host import bulk_io; "
        "bulk_io._DELETED_AT_ONCE = 1 << 20; bulk_io.remove(Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(file)])
    looks = 0
    while process.poll() is None:
        for link in Path(f"/proc/{process.pid}/fd").glob("*"):
            with suppress(OSError):
                if str(link.readlink()).startswith(str(file)):
                    os.close(os.open(link, os.O_RDONLY | os.O_NONBLOCK))
                    looks += 1
    assert looks > 0
    assert process.returncode == 0
    assert not file.exists()


def test_what_is_no_file(tmp_path: Path, truncated: list[int]) -> None:
    """A link goes, and what it points to stays; so a pipe goes, without a wait for somebody."""
    (tmp_path / "link").symlink_to(made(tmp_path / "file"))
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        bulk_io.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").stat().st_size == 4 * MIB
    with pytest.raises(FileNotFoundError):
        bulk_io.remove(tmp_path / "none")
    with pytest.raises(OSError, match="directory"):
        bulk_io.remove(tmp_path)


def test_what_is_written_back(tmp_path: Path) -> None:
    """The kernel itself tells what it has not written yet."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip("this file system is in memory")
    path = made(tmp_path / "file", 32)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0  # now all of it is in our page table
        assert dirty(path) >= 24 * MIB, "nobody else has written it"
        assert bulk_io.write_back(file.fileno(), 4 * MIB, 32 * MIB, 60) == 32 * MIB
        assert 0 < dirty(path) <= 4 * MIB
        assert bulk_io.write_back(file.fileno(), 0, 4 * MIB, 60) == 4 * MIB
        assert dirty(path) == 0


def dirty(path: Path) -> int:
    """Bytes of the file, which we have mapped, that are yet to be written."""
    _, _, rest = Path("/proc/self/smaps").read_text().partition(f" {path}\n")
    fields = dict(line.split(":", 1) for line in rest.partition("VmFlags")[0].splitlines())
    return sum(int(fields[name].split()[0]) for name in ("Shared_Dirty", "Private_Dirty")) * 1024


def test_it_takes_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with made(tmp_path / "file").open("r+b") as file:
        monkeypatch.setattr(bulk_io, "_WRITTEN_AT_ONCE", MIB)
        assert bulk_io.write_back(file.fileno(), 0, 4 * MIB, 3) == 2 * MIB


def test_what_cannot_be_written_back() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek"):
            bulk_io.write_back(write, 0, 1, 60)
    finally:
        os.close(read)
        os.close(write)
