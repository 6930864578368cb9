"""The state file while it is made: who has a right to it, and what is left of it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsnap.host import files
from qsnap.inventory import state_part
from support.fake_proc import IS_ROOT, NOBODY
from support.guest import open_files

pytestmark = pytest.mark.no_qemu


@pytest.fixture(autouse=True)
def no_file_stays_open() -> Iterator[None]:
    """One would take up the room of the guest's memory."""
    before = {*open_files()}
    yield
    assert {*open_files()} <= before


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "t.qsnap-part"


def test_a_new_one(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ours alone, has its room, and the image's owner. What a dead run has left is in nobody's way."""
    image = part.with_name("image")
    image.touch()
    part.write_bytes(b"left")
    owner = os.geteuid()
    if IS_ROOT:
        owner = NOBODY
        os.chown(image, NOBODY, NOBODY + 1)
    file = state_part.create(part, image, 1 << 20)
    info = part.stat()
    assert (info.st_uid, info.st_mode & 0o777, info.st_size) == (owner, 0o600, 1 << 20)
    assert not IS_ROOT or info.st_gid == NOBODY + 1
    assert info.st_blocks * 512 >= 1 << 20
    with part.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    # Somebody is at work on it
    with pytest.raises(FileExistsError):
        state_part.create(part, image, 1 << 20)
    state_part.remove_unused(part)
    assert files.identity_of(part.stat()) == files.identity(file)
    os.close(file)
    state_part.remove_unused(part)
    assert not part.exists()
    state_part.remove_unused(part)

    os.close(state_part.create(part, None, 1))
    assert part.stat().st_uid == os.geteuid(), "the image cannot be seen"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    os.close(state_part.create(part, image, 1))
    assert part.stat().st_uid == os.getuid(), "only root gives it away"


def test_one_without_room(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match="No space left"):
        state_part.create(part, None, 1)
    assert not part.exists()


def test_all_of_it_is_written_before_it_has_its_name(part: Path) -> None:
    path = part.with_name("t.qsnap")
    file = state_part.create(part, None, 100)
    try:
        state_part.complete(file, part, path, 9, [(6, b"ghi"), (3, b"def"), (0, b"abc")])
        assert path.read_bytes() == b"abcdefghi"
        assert not part.exists()
        path.rename(part)
        path.touch()
        with pytest.raises(FileExistsError):
            state_part.complete(file, part, path, 9, ())
        assert (part.exists(), path.stat().st_size) == (True, 0)
    finally:
        os.close(file)


def test_what_a_dead_run_has_begun_gives_its_room_back(part: Path) -> None:
    """At once, although QEMU has it open; another file in its place stays as it is."""
    path, other = part.with_name("t.qsnap"), part.with_name("other")
    part.write_bytes(b"state")
    made = files.identity_of(part.stat())
    other.write_bytes(b"another one")
    with part.open("rb") as open_in_qemu:
        state_part.remove(other, path, made)
        assert other.read_bytes() == b"another one"
        state_part.remove(part, path, made)
        assert os.fstat(open_in_qemu.fileno()).st_size == 0
    assert [one.name for one in part.parent.iterdir()] == ["other"]


def test_what_has_its_name_already_goes_too(part: Path) -> None:
    """Where what belongs to it could not be completed; and it is emptied wherever somebody has moved it."""
    path, moved = part.with_name("t.qsnap"), part.with_name("moved")
    path.write_bytes(b"state")
    state_part.remove(part, path, files.identity_of(path.stat()))
    assert not path.exists()
    file = files.created(part)
    try:
        files.write(file, b"state")
        part.rename(moved)
        state_part.remove(part, path, files.identity(file), file=file)
        assert moved.stat().st_size == 0
    finally:
        os.close(file)


def test_what_was_not_noted(part: Path) -> None:
    """It may be any file: what has the name that does not count goes, and nothing is emptied."""
    path, link = part.with_name("t.qsnap"), part.with_name("link")
    for one in part, path:
        one.write_bytes(b"x")
    link.hardlink_to(part)
    state_part.remove(part, path, None)
    assert (part.exists(), link.read_bytes(), path.read_bytes()) == (False, b"x", b"x")


def test_a_file_with_both_names(part: Path) -> None:
    """The one that does not count goes, where it is the same file."""
    path = part.with_name("t.qsnap")
    part.write_bytes(b"state")
    made = files.identity_of(part.stat())
    state_part.forget_name(part, path, made)
    assert part.exists(), "it has no other name"
    path.write_bytes(b"another one")
    state_part.forget_name(part, path, made)
    state_part.forget_name(part, path, None)
    assert part.exists(), "the other name is another file's"
    path.unlink()
    path.hardlink_to(part)
    state_part.forget_name(part, path, made)
    assert (part.exists(), path.read_bytes()) == (False, b"state")
