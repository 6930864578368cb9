"""Attacks on files: what an unprivileged owner of a directory, or of a monitor, arranges, and root's qsnap meets.

They are tried as two real users, root and nobody, so these tests run as root: any other user has nobody to fear.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pwd
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from qsnap.errors import BadUsage, QsnapError
from qsnap.host import bulk_io, files, processes, trust
from qsnap.monitor.address import parse_address
from qsnap.runs import journal
from qsnap.runs.record import Record
from qsnap.supervision import guard
from qsnap.upkeep import metrics
from support.fake_monitor import FakeMonitor
from support.fake_proc import IS_ROOT, NOBODY
from support.guest import (
    Guest,
    Launch,
    blockdev,
    cli,
    disk_device,
    finish,
    make_boot_disk,
    needs_snapshot_jobs,
    qemu_version,
    start_cli,
    tags,
    until,
)
from support.killed import wait_for_the_guard

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
    bulk_io.remove(name)
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
        lambda: bulk_io.remove(name),
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


@pytest.mark.parametrize("at_once", [True, False])
def test_what_takes_the_place_of_a_file_is_left_alone(
    theirs: Path, ours: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Only the very file that was made is renamed or removed; and no name is given that something has.

    On NFS too, where a file cannot be renamed and nothing be replaced at once.
    """
    if not at_once:
        monkeypatch.setattr(files, "_renamed", lambda *_: False)
    old, new = theirs / "old", theirs / "new"
    file = files.created(old)
    as_nobody(lambda: old.rename(theirs / "mine"))
    link(old, ours)
    with pytest.raises(OSError, match="old is another file"):
        files.rename(file, old, new)
    assert not files.remove(old, files.identity(file))
    assert old.is_symlink()
    link(new, ours)
    with pytest.raises(FileExistsError):
        files.rename(file, theirs / "mine", new)
    assert ours.read_bytes() == SECRET
    files.rename(file, theirs / "mine", theirs / "named")
    assert sorted(path.name for path in theirs.iterdir()) == ["named", "new", "old"]
    assert files.identity_of((theirs / "named").stat()) == files.identity(file)
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
    guest = launch(*blockdev("disk0", image), *disk_device("disk0"), memory="512")
    guest.wait_for_ticks(5)
    return guest


def begun(guest: Guest, part: Path) -> subprocess.Popen[str]:
    """A live save that has its state file, and is writing it."""
    process = start_cli("save", "--live", "t", monitor=guest.address)
    until("the stream", lambda: (part.exists() and part.stat().st_size > (4 << 20)) or None)
    return process


@needs_snapshot_jobs
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


@needs_snapshot_jobs
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


def in_the_middle(path: Path, real: str, said: dict[str, str], opens: Path, loot: Path) -> None:
    """A monitor of nobody's: QEMU's own answers, but for the names in them. It reads and writes the files it is given.

    :param opens: it has that file open, to read it.
    """
    opened = opens.open("rb")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    while True:
        client, _ = listener.accept()
        with client, socket.socket(socket.AF_UNIX) as qemu:
            qemu.connect(real)
            answers = b""
            while True:
                ready, _, _ = select.select([client, qemu], [], [])
                if client in ready:
                    data, given, _, _ = socket.recv_fds(client, 1 << 20, 8)
                    if not data:
                        break
                    for file in given:
                        if text := os.pread(file, 1 << 20, 0):
                            loot.write_bytes(text)
                            os.pwrite(file, b"changed", 0)
                    socket.send_fds(qemu, [data], given)
                    for file in given:
                        os.close(file)
                if qemu in ready:
                    data = qemu.recv(1 << 20)
                    if not data:
                        break
                    *lines, answers = (answers + data).split(b"\n")
                    for line in lines:
                        for name, other in said.items():
                            line = line.replace(name.encode(), other.encode())
                        client.sendall(line + b"\n")
    assert opened


@contextmanager
def a_child(deed: Callable[[], object]) -> Iterator[int]:
    """A process of nobody's that does that until the end of the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            become_nobody()
            deed()
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@needs_snapshot_jobs
@pytest.mark.parametrize("where", ["beside the image", "in a directory"])
def test_a_monitor_that_claims_an_image_of_roots(launch: Launch, theirs: Path, tmp_path: Path, where: str) -> None:
    """Nothing that belongs to that image is read, handed over, changed, made or removed on its word."""
    shared = Path(tempfile.mkdtemp(prefix="qs-"))
    try:
        shared.chmod(0o755)
        tmp_path.chmod(0o755)
        image, copy = make_boot_disk(shared / "b.qcow2"), theirs / "i.qcow2"
        image.chmod(0o644)
        states = shared if where == "beside the image" else tmp_path / "states"
        states.mkdir(exist_ok=True)
        options = () if states == shared else ("--state-dir", str(states))
        guest = launch(*blockdev("disk0", image), *disk_device("disk0"))
        guest.wait_for_ticks(5)
        cli("save", "--live", "golden", *options, monitor=guest.address)
        cli("protect", "golden", *options, monitor=guest.address)
        as_nobody(lambda: shutil.copyfile(image, copy))
        attacker = launch(*blockdev("disk0", copy), *disk_device("disk0"))
        attacker.directory.chmod(0o755)
        Path(attacker.address).chmod(0o777)
        kept = {path: path.read_bytes() for path in (*shared.iterdir(), *states.iterdir()) if path != image}
        assert len(kept) == 3  # the state, the notes, and where the guest is
        fake, loot = theirs / "qmp", theirs / "loot"
        said = {str(copy): str(image)}
        with a_child(lambda: in_the_middle(fake, attacker.address, said, image, loot)):
            until("the fake monitor", lambda: fake.exists() or None)
            (listed,) = cli("list", "--json", *options, monitor=str(fake)).json["snapshots"]
            assert (listed["tag"], listed["protected"]) == ("golden", False)
            changes = (("save", "--live", "other"), ("unprotect", "golden")) if states == shared else ()
            for command in (("load", "golden"), *changes, ("delete", "golden")):
                cli(*command, *options, monitor=str(fake), expect=None)
        assert not loot.exists()
        now = {path: path.read_bytes() for path in (*shared.iterdir(), *states.iterdir()) if path != image}
        assert now == kept
        cli("load", "golden", *options, monitor=guest.address)
        guest.assert_running()
    finally:
        shutil.rmtree(shared)


def test_whose_a_qemu_is(theirs: Path, ours: Path) -> None:
    """By its process and by who listens; and only for what that process may write."""
    open_to_all = theirs / "image"
    open_to_all.touch()
    open_to_all.chmod(0o666)
    ready, tell = os.pipe()

    def hold() -> None:
        with open_to_all.open("r+b"), Path("/etc/passwd").open("rb"):
            os.write(tell, b"x")
            time.sleep(600)

    with a_child(hold) as pid:
        assert os.read(ready, 1) == b"x"
        passwd = Path("/etc/passwd")

        def seen(path: Path) -> tuple[str, list[Path]]:
            return str(path), [*processes.visible_files(pid, str(path))]

        assert trust.user_of(pid, NOBODY) == trust.user_of(pid, 0) == trust.user_of(pid, None) == NOBODY
        assert trust.image(NOBODY, *seen(open_to_all)) == open_to_all
        with pytest.raises(PermissionError, match="has not opened it for writing"):
            trust.image(NOBODY, *seen(passwd))
        assert trust.image(0, *seen(passwd)) == passwd
        with pytest.raises(PermissionError, match="listens there"):
            trust.user_of(os.getpid(), NOBODY)
    # It has ended: who it was is known by who listened there, or not at all; "not at all" is not "of this user"
    assert trust.user_of(pid, NOBODY) == NOBODY
    with pytest.raises(FileNotFoundError):
        trust.user_of(pid, None)
    os.close(ready)
    os.close(tell)


@needs_snapshot_jobs
@pytest.mark.parametrize("how", ["of nobody", "of root at first"])
def test_honest_qemus_of_other_users(launch: Launch, theirs: Path, tmp_path: Path, how: str) -> None:
    """Root saves, notes and loads beside the image of a QEMU that has not root's rights; also a state file."""
    image = make_boot_disk(theirs / "disk0")
    os.chown(image, NOBODY, NOBODY)
    drive = (*blockdev("disk0", image), *disk_device("disk0"))
    first = launch(*drive)
    first.wait_for_ticks(5)
    cli("save", "--live", "live", monitor=first.address)
    assert (theirs / "disk0.live.qsnap").stat().st_uid == NOBODY
    first.quit()
    user = pwd.getpwuid(NOBODY).pw_name
    given_up = ("-run-with", f"user={user}") if qemu_version() >= (9, 1) else ("-runas", user)
    guest = launch(*drive, user=NOBODY) if how == "of nobody" else launch(*drive, *given_up)
    guest.wait_for_ticks(3)
    cli("save", "a", "--description", "mine", monitor=guest.address)
    cli("protect", "live", monitor=guest.address)
    assert (theirs / "disk0.qsnap-notes").stat().st_uid == NOBODY
    found = {one["tag"]: one for one in cli("list", "--json", monitor=guest.address).json["snapshots"]}
    assert [found[tag][key] for tag, key in (("a", "description"), ("live", "protected"), ("live", "kind"))] == [
        "mine",
        True,
        "live",
    ]
    for tag in ("live", "a"):
        cli("load", tag, monitor=guest.address)
        guest.assert_running()


@needs_snapshot_jobs
def test_a_state_file_that_has_another_name_too(launch: Launch, theirs: Path) -> None:
    """A QEMU of root's may have root's files; but who owns the directory can have linked any file of root's into it."""
    image = make_boot_disk(theirs / "disk0")
    os.chown(image, NOBODY, NOBODY)
    guest = launch(*blockdev("disk0", image), *disk_device("disk0"))
    guest.wait_for_ticks(5)
    cli("save", "--live", "t", monitor=guest.address)
    file = theirs / "disk0.t.qsnap"
    os.chown(file, 0, 0)
    cli("load", "t", monitor=guest.address)
    (theirs / "another").hardlink_to(file)
    error = cli("load", "t", monitor=guest.address, expect=6).err
    assert f"{file} is not handed to QEMU: it belongs to user 0, and the images to user {NOBODY}" in error
    guest.assert_running()


@needs_snapshot_jobs
def test_a_state_file_of_somebody_elses(launch: Launch, theirs: Path) -> None:
    """A file of root's that stands beside nobody's image is not handed to a QEMU of nobody's."""
    image = make_boot_disk(theirs / "disk0")
    os.chown(image, NOBODY, NOBODY)
    drive = (*blockdev("disk0", image), *disk_device("disk0"))
    first = launch(*drive)
    first.wait_for_ticks(5)
    cli("save", "--live", "t", monitor=first.address)
    first.quit()
    os.chown(theirs / "disk0.t.qsnap", 0, 0)
    guest = launch(*drive, user=NOBODY)
    guest.wait_for_ticks(3)
    error = cli("load", "t", monitor=guest.address, expect=6).err
    assert "is not handed to QEMU: it belongs to user 0, and the images to user 65534" in error
    guest.assert_running()


@pytest.mark.parametrize("whose", ["nobody's", "open to all"])
def test_a_runtime_directory_that_others_may_write(
    guest: Guest, theirs: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """As /tmp/qsnap-UID, made beforehand. What lies there is neither believed nor removed."""
    place = theirs / "run"
    if whose == "open to all":
        place.mkdir()
        place.chmod(0o777)
        name = place / f"{'a' * 16}.journal"
        as_nobody(lambda: name.write_bytes(b"theirs"))
    else:
        as_nobody(lambda: place.mkdir(0o700))
    monkeypatch.setenv("QSNAP_RUNTIME_DIR", str(place))
    record = journal.new_record("save", ("t",), FakeMonitor(parse_address(guest.address), pid=guest.pid))
    held = place / f"{record.token}.journal"

    def hold() -> None:
        with held.open("wb") as file:
            file.write(msgspec.json.encode(record) + b"\n")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
            held.with_suffix(".held").touch()
            time.sleep(600)

    with a_child(hold):
        until("the journal to be held", lambda: held.with_suffix(".held").exists() or None)
        kept = set(place.iterdir())
        for command in (("list",), ("save", "t"), ("recover",)):
            # Who only looks can do without
            run = cli(*command, monitor=guest.address, expect=0 if command == ("list",) else 1)
            why = "it was made by user 65534" if whose == "nobody's" else "it is open to other users (mode 777)"
            assert f"the runtime directory {place} cannot be used: {why}" in run.err
            assert ("; chmod 700 it, or set" in run.err) is (whose == "open to all")
            assert "set QSNAP_RUNTIME_DIR to a directory of your own" in run.err
        assert set(place.iterdir()) == kept
    guest.assert_running()


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file gets larger than that, as on a file system that is full; the write that comes there is cut short."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_cannot_be_written_down_whole_is_not_done(runtime_directory: Path) -> None:
    ours = journal.Journal.create(Record(token="a" * 16))
    assert ours.path
    with room(ours.path.stat().st_size + 4):
        with pytest.raises(QsnapError, match="cannot be written"):
            ours.note(stopped=True)
        assert not ours.record.stopped
        ours.done(is_done=True)
    assert ours.record.is_done
    ours.note(operation="save")
    (found,) = journal.found()
    assert (found.record.stopped, found.record.operation) == (False, "save")
    ours.close(remove=True)


def test_a_guard_keeps_no_secrets(runtime_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    ours = journal.Journal.create(Record(token="a" * 16))
    started = guard.start(ours, None)
    try:
        asyncio.run(started.ready())
        environment = Path(f"/proc/{started.pid}/environ").read_bytes().split(b"\0")
        assert b"TZ=Asia/Tokyo" in environment
        assert not any(entry.startswith(b"API_TOKEN") for entry in environment)
    finally:
        started.dismiss()
        ours.close(remove=True)


def test_what_cannot_be_removed_is_known_beforehand(theirs: Path) -> None:
    """By the directory's mode, by its sticky bit, and by an attribute, where the file system has those."""
    file = theirs / "file"
    file.touch()
    assert files.obstacle_to_removal(file) == files.obstacle_to_removal(theirs / "none") == ""

    def refused_by(words: str) -> None:
        def look() -> None:
            obstacle = files.obstacle_to_removal(file)
            assert words in obstacle
            assert bool(words) is bool(obstacle)

        as_nobody(look)

    os.chown(theirs, 0, 0)
    theirs.chmod(0o755)
    refused_by("cannot be written by this user")
    theirs.chmod(0o700)
    refused_by("Permission denied")
    theirs.chmod(0o777)
    refused_by("")
    theirs.chmod(0o1777)
    refused_by("only user 0, whom it belongs to, may do that")
    os.chown(file, NOBODY, NOBODY)
    refused_by("")
    as_nobody(file.unlink)
    for what, attribute in (file, "i"), (file, "a"), (theirs, "i"), (theirs, "a"):
        file.touch()
        if subprocess.run(["chattr", f"+{attribute}", what], capture_output=True).returncode:
            continue  # this file system has none
        try:
            assert "has the attribute" in files.obstacle_to_removal(file)
            with pytest.raises(PermissionError):
                file.unlink()
        finally:
            subprocess.run(["chattr", f"-{attribute}", what], check=True)
    assert files.obstacle_to_removal(file) == ""
    file.unlink()
