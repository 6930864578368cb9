"""The file of a run: what comes into it, who holds it, and when it goes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec
import pytest

from qsnap.errors import QsnapError
from qsnap.monitor.address import TcpAddress, UnixAddress
from qsnap.runs import journal, runtime_dir
from qsnap.runs.group import Group, Point
from qsnap.runs.journal import Found, Journal, found, new_record
from qsnap.runs.record import Record, SaveWork
from support.fake_monitor import FakeMonitor
from support.guest import open_files

pytestmark = pytest.mark.no_qemu

RECORD = Record(token="a" * 16, operation="save")


def test_its_name_must_be_free(runtime_directory: Path) -> None:
    (runtime_directory / f"{RECORD.token}.beginning").touch()
    with pytest.raises(QsnapError, match=r"no journal can be made in /.*File exists; nothing was done"):
        Journal.create(RECORD)


def test_it_is_its_user_s_alone() -> None:
    """Whatever the umask."""
    before = os.umask(0o777)
    try:
        ours = Journal.create(RECORD)
    finally:
        os.umask(before)
    assert ours.path
    assert ours.path.stat().st_mode & 0o777 == 0o600
    ours.close(remove=True)


def test_a_broken_journal_does_no_harm(runtime_directory: Path) -> None:
    for name, text in (("a", b""), ("b", b"{"), ("c", b"[]\n"), ("d", b"\xff\n"), ("e", b'{"token": 1}\n')):
        (runtime_directory / f"{name * 16}.journal").write_bytes(text)
    (runtime_directory / f"{'f' * 16}.journal").mkdir()
    os.mkfifo(runtime_directory / f"{'0' * 16}.journal")
    (runtime_directory / f"{'1' * 16}.beginning").write_text("")
    os.utime(runtime_directory / f"{'1' * 16}.beginning", (0, 0))
    others = [runtime_directory / name for name in ("mine.journal", f"{'A' * 16}.journal", "backup.beginning")]
    for path in others:
        path.write_text("not qsnap's")
        os.utime(path, (0, 0))
    ours = Journal.create(msgspec.structs.replace(RECORD, token="2" * 16))
    assert [one.record.token for one in found()] == ["2" * 16]
    left = {runtime_directory / f"{name * 16}.journal" for name in "f02"}
    assert set(runtime_directory.iterdir()) == {*left, *others}
    dead = Found(others[0], RECORD, is_held=False)
    assert dead.take() is None, "it cannot be read"
    ours.close(remove=True)


def test_a_line_that_was_cut_short_takes_none_with_it() -> None:
    """As by a full disk, which has room again for the next one."""
    ours = Journal.create(RECORD)
    assert ours.path
    end = ours.path.stat().st_size
    ours.note(tags=("lost",))
    os.truncate(ours.path, end + 5)
    ours.note(stopped=True)
    (one,) = found()
    assert (one.record.tags, one.record.stopped) == ((), True)
    ours.close(remove=True)


def test_how_far_the_work_has_come() -> None:
    work = SaveWork(disk_tag="t", vmstate="a", devices=("a",), older=(), older_files=())
    ours = Journal.create(msgspec.structs.replace(RECORD, work=work))
    ours.advance(saving=True)
    assert ours.record.work == msgspec.structs.replace(work, saving=True)
    ours.has_advanced(is_complete=True)
    assert ours.record.work == msgspec.structs.replace(work, saving=True, is_complete=True)
    assert [one.record for one in found()] == [ours.record]
    ours.close(remove=True)


def test_who_holds_it(runtime_directory: Path) -> None:
    """Each look tells, and leaves nothing open."""
    before = open_files()
    ours = Journal.create(RECORD)
    (held,) = found()
    assert (held.is_held, held.record, held.path) == (True, RECORD, ours.path)
    assert held.take() is None
    ours.close(remove=False)
    ours.close(remove=True)
    assert open_files() == before
    for dead in found():
        assert not dead.is_held
        taken = dead.take()
        assert taken is not None, "who looks does not hold it"
        assert [again.is_held for again in found()] == [True]
        assert dead.take() is None
        taken.close(remove=True)
    assert dead.take() is None
    assert list(runtime_directory.iterdir()) == []
    assert open_files() == before


def test_what_cannot_be_written_down_is_not_joined() -> None:
    full = Journal(RECORD, os.open("/dev/full", os.O_WRONLY))
    member = Group(["a"]).members[0]
    with pytest.raises(QsnapError, match="No space left on device"):
        full.join(member)
    assert full.member is None
    full.close(remove=False)
    ours = Journal(RECORD)
    ours.join(member)
    assert (ours.member, ours.record.group) == (member, member.token)


async def test_what_a_run_waits_for() -> None:
    """Its guard and the others of its group; nobody, where it has neither."""
    alone = Journal()
    assert (alone.record, alone.patience_s, alone.another_answers) == (Record(), journal.AFTERMATH_TIMEOUT_S, False)
    await alone.armed()
    await alone.meet(Point.READY)
    await alone.decide()
    assert Journal().guard_pid is None
    waited: list[int] = []

    class Guard:
        pid = 1

        async def ready(self) -> None:
            waited.append(self.pid)

    group = Group(["a"])
    alone.guard = Guard()
    alone.join(group.members[0])
    await alone.armed()
    await alone.meet(Point.READY)
    assert (alone.guard_pid, waited, group.members[0].at) == (1, [1], Point.READY)
    await alone.decide()
    assert runtime_dir.is_decided(group.token)
    assert alone.is_decided


@pytest.mark.parametrize("remove", [True, False])
def test_the_decision_of_a_group_goes_with_its_last_journal(remove: bool) -> None:
    group = "b" * 16
    ours, theirs = (
        Journal.create(msgspec.structs.replace(RECORD, token=name * 16, group=group)) for name in ("a", "c")
    )
    runtime_dir.decide(group)
    ours.close(remove=True)
    assert ours.is_decided
    theirs.close(remove=remove)
    assert theirs.is_decided is not remove
    assert Journal(RECORD).is_decided is None


def test_where_a_run_is(tmp_path: Path) -> None:
    """The same monitor under each of its names."""
    local, far = (new_record("save", (), FakeMonitor(TcpAddress(host, 1))) for host in ("localhost", "10.0.0.1"))
    assert local.socket == journal.socket_identity(TcpAddress("127.0.0.1", 1)) == ("tcp", "127.0.0.1", "1")
    assert (far.socket, far.where, far.qemu) == (("tcp", "10.0.0.1", "1"), TcpAddress("10.0.0.1", 1), None)
    path, link = tmp_path / "socket", tmp_path / "link"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    link.symlink_to(path)
    here = new_record("save", (), FakeMonitor(UnixAddress(str(link)), pid=os.getpid()))
    assert here.socket == journal.socket_identity(UnixAddress(str(path)))
    assert here.socket[0] == "unix"
    assert (here.where, here.qemu) == (UnixAddress(str(link)), here.owner)
    assert journal.socket_identity(UnixAddress(str(tmp_path / "none"))) == ()
