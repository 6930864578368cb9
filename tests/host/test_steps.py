"""What qsnap does with files of its own, step by step, and that it leaves none of them open."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from qsnap.host import files, syscalls
from support.guest import open_files

pytestmark = pytest.mark.no_qemu


def chain(directory: Path, links: int) -> Path:
    """So many links, the first of which leads over all others to a directory."""
    (directory / "0").mkdir()
    for number in range(1, links + 1):
        (directory / str(number)).symlink_to(str(number - 1))
    return directory / str(links)


def test_as_many_links_as_the_kernel_follows(tmp_path: Path) -> None:
    last = chain(tmp_path, 41)
    assert files.resolved(tmp_path / "40") == (tmp_path / "40").resolve() == tmp_path / "0"
    with pytest.raises(OSError, match="is a symbolic link"):
        files.resolved(last)
    with pytest.raises(OSError, match="Too many levels"):
        files.resolved_file(last)


def test_a_file_behind_links_of_our_own(tmp_path: Path) -> None:
    """It is found where the user names it, and nowhere else is a link followed."""
    (tmp_path / "d").mkdir()
    (tmp_path / "l").symlink_to("d")
    (tmp_path / "d" / "file").write_bytes(b"x")
    (tmp_path / "d" / "link").symlink_to("file")
    assert files.resolved_file(tmp_path / "l" / "link") == tmp_path / "d" / "file"
    assert files.resolved_file(tmp_path / "l" / "none") == tmp_path / "d" / "none"
    with pytest.raises(OSError, match=r"'l' in .* is a symbolic link"):
        files.read(tmp_path / "l" / "file")
    with pytest.raises(OSError, match="it is a symbolic link"):
        files.read(tmp_path / "d" / "link")
    with pytest.raises(OSError, match="it is a symbolic link"):
        files.replace(tmp_path / "d" / "link", b"y")
    with pytest.raises(NotADirectoryError):
        files.resolved(tmp_path / "l" / "file")
    assert files.read(tmp_path / "d" / "file") == b"x"


def test_what_is_neither_a_file_nor_a_disk(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for or_disk in (False, True):
        for path in (fifo, tmp_path):
            with pytest.raises(PermissionError, match="it is not a regular file"):
                files.opened(path, or_disk=or_disk)
        with pytest.raises(FileNotFoundError, match="No such file"):
            files.opened(tmp_path / "none", or_disk=or_disk)
    with pytest.raises(PermissionError, match="it is not a regular file"):
        files.replace(fifo, b"x")
    assert fifo.is_fifo()


@pytest.mark.parametrize("or_disk", [False, True])
def test_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, or_disk: bool) -> None:
    """It is opened where it is asked for, and only there."""
    (tmp_path / "disk").touch()
    monkeypatch.setattr(stat, "S_ISREG", lambda _: False)
    monkeypatch.setattr(stat, "S_ISBLK", lambda _: True)
    if or_disk:
        os.close(files.opened(tmp_path / "disk", or_disk=True))
    else:
        with pytest.raises(PermissionError, match="it is not a regular file"):
            files.opened(tmp_path / "disk")


def test_nothing_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it succeeds or not."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def memory() -> None:
        with files.in_memory("x"):
            pass

    def unreadable() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            files.replace(plain, b"y")

    plain, link = tmp_path / "plain", tmp_path / "link"
    plain.touch()
    link.symlink_to(plain)
    (tmp_path / "to-dir").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    deeds: list[Callable[[], object]] = [
        lambda: files.resolved(tmp_path / "to-dir"),
        lambda: files.resolved(tmp_path / "none"),
        lambda: files.resolved(plain),
        lambda: files.resolved_file(link),
        lambda: files.resolved_file(plain),
        lambda: files.read(plain),
        lambda: files.read(tmp_path / "to-dir" / "plain"),
        lambda: files.opened(tmp_path / "fifo"),
        lambda: files.replace(plain, b"x"),
        lambda: files.obstacle_to_removal(plain),
        lambda: files.remove(tmp_path / "none"),
        memory,
        unreadable,
    ]
    for number, deed in enumerate(deeds):
        before = open_files()
        with suppress(OSError):
            deed()
        assert open_files() == before, number


def test_memory_is_given_back_even_if_another_has_it_open() -> None:
    with files.in_memory("x") as file:
        other = os.dup(file)
        os.write(file, bytes(9))
        assert os.fstat(other).st_size == 9
    assert os.fstat(other).st_size == 0
    os.close(other)


@pytest.mark.parametrize("offset", [None, 2])
def test_what_is_written_in_parts_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int | None
) -> None:
    """At the file's position, or from an offset on."""
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:3], at))
    file = files.created(tmp_path / "x")
    pwrite(file, b"ab", 0)
    os.lseek(file, 2, os.SEEK_SET)
    files.write(file, b"0123456789", offset)
    assert os.lseek(file, 0, os.SEEK_CUR) == (12 if offset is None else 2)
    os.close(file)
    assert (tmp_path / "x").read_bytes() == b"ab0123456789"


@pytest.mark.parametrize("offset", [None, 2])
def test_what_is_not_written_at_all_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int | None) -> None:
    answers = iter([0])
    for name in ("write", "pwrite"):
        monkeypatch.setattr(os, name, lambda *_: next(answers))
    with (tmp_path / "x").open("wb") as file, pytest.raises(OSError, match="nothing of it was written"):
        files.write(file.fileno(), b"x", offset)


def test_nobody_reads_what_replaces_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even before it has its mode: who has opened it then could read what is written later."""
    before: list[int] = []
    fchmod = os.fchmod

    def noted(file: int, mode: int) -> None:
        before.append(stat.S_IMODE(os.fstat(file).st_mode))
        fchmod(file, mode)

    monkeypatch.setattr(os, "fchmod", noted)
    private = tmp_path / "private"
    private.touch(0o600)
    umask = os.umask(0)
    try:
        files.replace(private, b"x")
        files.replace(tmp_path / "new", b"x", mode=0o640)
        files.replace(private, b"y", mode=0o644)
        files.replace(tmp_path / "plain", b"x")
    finally:
        os.umask(umask)
    assert before == [0o600] * 3
    modes = {path.name: (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()}
    assert modes == {"private": (b"y", 0o644), "new": (b"x", 0o640), "plain": (b"x", 0o666)}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_only_a_new_file_is_given_away(tmp_path: Path) -> None:
    """One that replaces another has the owner of that."""
    for name in ("old", "new"):
        if name == "old":
            (tmp_path / name).touch()
            os.chown(tmp_path / name, 7, 8)
        files.replace(tmp_path / name, b"x", owner=65534)
    owners = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in tmp_path.iterdir()}
    assert owners == {"old": (7, 8), "new": (65534, tmp_path.stat().st_gid)}


def test_a_replacement_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


def test_whether_a_name_was_there(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / "other"
    for one in (path, other):
        one.touch()
    assert not files.remove(path, files.identity_of(other.stat()))
    assert files.remove(path, files.identity_of(path.stat()))
    assert not files.remove(path)
    assert files.remove(other)


def test_a_name_that_came_to_be_another_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody exchanges the files after the look and before the renaming."""
    old, new, other = (tmp_path / name for name in ("old", "new", "other"))
    file = files.created(old)
    other.touch()

    def exchanged(*_: object) -> bool:
        other.rename(new)
        return True

    monkeypatch.setattr(files, "_renamed", exchanged)
    with pytest.raises(PermissionError, match="new is another file now"):
        files.rename(file, old, new)
    os.close(file)


@pytest.mark.parametrize("why", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES])
def test_a_file_system_that_does_not_rename_without_replacing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(syscalls, "rename_exclusively", refuse)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    file = files.created(tmp_path / "x")
    if why == errno.EACCES:
        with pytest.raises(PermissionError):
            files.rename_directory(tmp_path / "a", tmp_path / "c")
        with pytest.raises(PermissionError):
            files.rename(file, tmp_path / "x", tmp_path / "y")
    else:
        with pytest.raises(FileExistsError):
            files.rename_directory(tmp_path / "a", tmp_path / "b")
        files.rename_directory(tmp_path / "a", tmp_path / "c")
        files.rename(file, tmp_path / "x", tmp_path / "y")
    os.close(file)
    there = ["a", "b", "x"] if why == errno.EACCES else ["b", "c", "y"]
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_a_directory_is_renamed_where_nothing_is(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError):
        files.rename_directory(tmp_path / "a", tmp_path / "b")
    files.rename_directory(tmp_path / "a", tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
