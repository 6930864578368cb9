"""Attacks on files: what an unprivileged owner of a directory, or of a monitor, arranges, and root's qsnap meets.

They are tried as two real users, root and nobody, so these tests run as root: any other user has nobody to fear.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import Launch
from guest import Guest, blockdev, finish, make_boot_disk, start_cli, tags, until
from machine import IS_ROOT, NOBODY
from qsnap import files, gentle, metrics
from qsnap.errors import BadUsage
from test_guard import wait_for_the_guard

SECRET = b"root's own\n"


@pytest.fixture(autouse=True)
def two_users() -> None:
    if not IS_ROOT:
        pytest.fail("these tests attack root's files as another user, so they run as root: sudo -E scripts/test")


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A directory that belongs to nobody."""
    path = Path(tempfile.mkdtemp(prefix="qs-"))
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A file that root alone may read and write; nobody may reach it."""
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


def become_nobody() -> None:
    """For good: of this process."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def as_nobody(deed: Callable[[], object]) -> None:
    """Do that as nobody, in a process of its own. (Not by a new Python: nobody may not read ours everywhere.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads are not needed there
        child = os.fork()
    if not child:
        status = 1
        try:
            become_nobody()
            deed()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def link(name: Path, target: Path) -> Path:
    """Nobody's link."""
    as_nobody(lambda: name.symlink_to(target))
    return name


def test_a_link_in_the_place_of_a_file(theirs: Path, ours: Path) -> None:
    """It is not read, written or emptied; removing it leaves alone what it leads to."""
    name = link(theirs / "name", ours)
    for attempt in (
        lambda: files.read(name),
        lambda: files.opened(name, os.O_RDWR),
        lambda: files.replace(name, b"x"),
        lambda: files.created(name),
    ):
        with pytest.raises(OSError):
            attempt()
    gentle.remove(name)
    assert not name.is_symlink()
    assert ours.read_bytes() == SECRET


def test_a_link_in_the_place_of_a_directory(theirs: Path, ours: Path) -> None:
    """Nothing is done below it: the owner of a directory on the way may exchange it at any time."""
    link(theirs / "vm", ours.parent)
    name = theirs / "vm" / ours.name
    for attempt in (
        lambda: files.read(name),
        lambda: files.replace(name, b"x"),
        lambda: files.created(name.with_name("new")),
        lambda: files.remove(name),
        lambda: gentle.remove(name),
        lambda: files.resolved(name.parent),
    ):
        with pytest.raises(OSError, match="link"):
            attempt()
    assert [path.name for path in ours.parent.iterdir()] == [ours.name]
    assert ours.read_bytes() == SECRET


def test_links_of_our_own_lead_to_a_directory(theirs: Path, tmp_path: Path) -> None:
    """Root has named it by a link of root's; as does a user by one of the user's own."""
    (tmp_path / "a").symlink_to("b/../c")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").symlink_to(theirs)
    assert files.resolved(tmp_path / "a") == theirs
    assert files.resolved_file(tmp_path / "a" / "x") == theirs / "x"


def test_a_pipe_and_a_device(theirs: Path) -> None:
    """Nobody waits for somebody at its other end."""
    name = theirs / "name"
    as_nobody(lambda: os.mkfifo(name))
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY):
        with pytest.raises(OSError):
            files.opened(name, flags)


def test_what_takes_the_place_of_a_file_is_left_alone(theirs: Path, ours: Path) -> None:
    """Only the very file that was made is renamed or removed; and no name is given that something has."""
    old, new = theirs / "old", theirs / "new"
    file = files.created(old)
    as_nobody(lambda: old.rename(theirs / "mine"))
    link(old, ours)
    with pytest.raises(OSError, match="another file"):
        files.rename(file, old, new)
    assert not files.remove(old, files.identity(file))
    assert old.is_symlink()
    link(new, ours)
    with pytest.raises(FileExistsError):
        files.rename(file, theirs / "mine", new)
    assert ours.read_bytes() == SECRET
    os.close(file)


def test_modes_and_owners(theirs: Path, ours: Path) -> None:
    """As an honest user expects: those of the file that is replaced, and of a new one what the umask leaves."""
    as_nobody(lambda: (theirs / "old").touch(0o640))
    files.replace(theirs / "old", b"x")
    info = (theirs / "old").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (NOBODY, NOBODY, 0o640)
    before = os.umask(0o777)
    try:
        os.close(files.created(theirs / "made"))
        files.replace(theirs / "new", b"x")
    finally:
        os.umask(before)
    files.replace(theirs / "plain", b"x")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in theirs.iterdir()}
    assert modes == {"old": 0o640, "made": 0o600, "new": 0o600, "plain": 0o666 & ~before}


def test_metrics(theirs: Path, ours: Path) -> None:
    """The directory of the collector is often its user's."""
    target = ours.with_name("new")
    for leads_to in (ours, target):
        path = link(theirs / "qsnap.prom", leads_to)
        with pytest.raises(BadUsage, match="link"):
            metrics.check(path)
        path.unlink()
    assert not target.exists()
    assert ours.read_bytes() == SECRET


def live_guest(launch: Launch, directory: Path) -> Guest:
    """A guest of root's on an image of nobody's, with so much RAM that its stream can be caught in the middle."""
    image = make_boot_disk(directory / "disk0")
    os.chown(image, NOBODY, NOBODY)
    guest = launch(*blockdev("disk0", image), "-device", "virtio-blk,drive=disk0", memory="512")
    guest.wait_for_ticks(5)
    return guest


def begun(guest: Guest, part: Path) -> subprocess.Popen[str]:
    """A live save that has its state file, and is writing it."""
    process = start_cli("save", "--live", "t", monitor=guest.address)
    until("the stream", lambda: (part.exists() and part.stat().st_size > (4 << 20)) or None)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_another_file_in_the_place_of_the_state_file(
    launch: Launch, theirs: Path, ours: Path, runtime_directory: Path, how: signal.Signals
) -> None:
    """The run empties what it has made, wherever that is; its guard too where it finds it, and nothing else."""
    guest = live_guest(launch, theirs)
    part, moved = theirs / "disk0.t.qsnap-part", theirs / "moved"
    process = begun(guest, part)
    as_nobody(lambda: part.rename(moved))
    link(part, ours)
    process.send_signal(how)
    finish(process)
    wait_for_the_guard(runtime_directory)
    assert ours.read_bytes() == SECRET
    assert part.is_symlink()
    assert how == signal.SIGKILL or moved.stat().st_size == 0
    assert tags(theirs / "disk0") == []
    guest.assert_running()


def test_another_file_in_the_place_of_the_new_snapshot(launch: Launch, theirs: Path, ours: Path) -> None:
    """What has come to stand at the name meanwhile is not replaced."""
    guest = live_guest(launch, theirs)
    process = begun(guest, theirs / "disk0.t.qsnap-part")
    name = theirs / "disk0.t.qsnap"
    as_nobody(lambda: name.write_bytes(b"theirs"))
    run = finish(process)
    assert run.code == 9
    assert f"another file has come to be at {name} meanwhile" in run.err
    assert name.read_bytes() == b"theirs"
    assert sorted(path.name for path in theirs.iterdir()) == ["disk0", name.name]
    assert tags(theirs / "disk0") == []
    guest.assert_running()
