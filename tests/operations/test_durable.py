"""What a power cut may take: a name tells of a file when that is on the disk, and the older one goes after that.

No machine is cut off here. The order of the steps is looked at, in this process, with the real calls behind them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

import qsnap
from qsnap.host import bulk_io, files
from qsnap.monitor.qmp.monitor import QmpMonitor
from support.fake_proc import IS_ROOT, as_nobody
from support.guest import Guest, qemu_version, tags

#: A file is given its name, and the disk knows that.
NAMED = ["contents on the disk", "named", "names on the disk"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """What has been done with qsnap's files in the test's directory since it was last asked."""
    done: list[str] = []

    def told(owner: object, name: str, tell: Callable[..., str | None]) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            step = tell(*args, **more)
            result = real(*args, **more)
            if step:
                done.append(step)
            return result

        monkeypatch.setattr(owner, name, call)

    def is_ours(file: int) -> bool:
        path = Path(f"/proc/self/fd/{file}").readlink()
        return path.parent == tmp_path and ".qsnap" in path.name and os.fstat(file).st_nlink > 0

    def is_here(directory: int) -> bool:
        return Path(f"/proc/self/fd/{directory}").readlink() == tmp_path

    def synced(file: int) -> str | None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            return "names on the disk" if is_here(file) else None
        return "contents on the disk" if is_ours(file) else None

    def renamed(*_: object, src_dir_fd: int | None = None, **__: object) -> str | None:
        return "named" if src_dir_fd is not None and is_here(src_dir_fd) else None

    def written(file: int, data: bytes, offset: int | None = None) -> str | None:
        return ("header written" if offset == 0 else "written") if is_ours(file) else None

    async def deleted(*_: object) -> None:
        await delete(*_)  # type: ignore[arg-type]
        done.append("older one deleted from the disks")

    delete = QmpMonitor.snapshot_delete
    monkeypatch.setattr(QmpMonitor, "snapshot_delete", deleted)
    told(os, "fsync", synced)
    told(os, "sync", lambda: "names on the disk")
    told(os, "rename", renamed)
    told(files, "_renamed", lambda where, *_: "named" if is_here(where) else None)
    told(files, "write", written)
    told(bulk_io, "remove", lambda _: "older file removed")

    def taken() -> list[str]:
        found = [step for step, _ in groupby(done)]
        done.clear()
        return found

    return taken


@pytest.mark.skipif(qemu_version() < (6, 0), reason="QEMU before 6.0 has no background snapshots")
async def test_a_live_save_in_the_place_of_another(
    guest: Guest, tmp_path: Path, steps: Callable[[], list[str]]
) -> None:
    """The header makes the file a state file, so it comes when the rest is there."""
    async with qsnap.connect(guest.address) as vm:
        await vm.save("t", live=True)
        steps()
        await vm.save("t", live=True)
        older_goes = ["older one deleted from the disks", "older file removed"]
        written_down = ["written", *NAMED]  # that the guest has come from it
        assert steps() == [
            "written", "contents on the disk", "header written", *NAMED, *older_goes, *written_down
        ]  # fmt: skip
        assert tags(tmp_path / "disk0.qcow2") == ["t.qsnap-2"]
        await vm.note("t", protected=True)
        assert steps() == ["written", *NAMED]
        assert [one.protected for one in await vm.list()] == [True]


@pytest.mark.no_qemu
def test_a_name_is_told_to_the_disk(tmp_path: Path, steps: Callable[[], list[str]]) -> None:
    """Of a file that replaces another, of one that is renamed, and of a directory."""
    path = tmp_path / "x.qsnap"
    files.replace(path, b"x")
    assert steps() == ["written", *NAMED]
    with path.open("rb") as file:
        files.rename(file.fileno(), path, tmp_path / "y.qsnap")
    assert steps() == NAMED[1:]
    (tmp_path / "a").mkdir()
    files.rename_directory(tmp_path / "a", tmp_path / "b")
    assert steps() == NAMED[2:]


@pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
def test_a_directory_that_may_be_written_and_not_read(tmp_path: Path, steps: Callable[[], list[str]]) -> None:
    """It cannot be opened to have the disk know its names: then the disk is told of all there is."""
    tmp_path.chmod(0o333)
    with files.directory(tmp_path) as where, as_nobody():
        files.sync(where)
    assert steps() == ["names on the disk"]
