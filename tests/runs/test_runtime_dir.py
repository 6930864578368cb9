"""Where the runtime directory is, and the decisions of groups in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qsnap.errors import BadUsage, QsnapError
from qsnap.runs import runtime_dir
from support.guest import open_files

pytestmark = pytest.mark.no_qemu

GROUP = "a" * 16


@pytest.mark.parametrize(
    ("uid", "is_writable", "expected"),
    [
        (0, True, "/run/qsnap"),
        (0, False, "/tmp/qsnap-0"),
        (1234, True, "/run/user/1234/qsnap"),
        (1234, False, "/tmp/qsnap-1234"),
    ],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, uid: int, is_writable: bool, expected: str) -> None:
    asked: list[Path] = []

    def access(path: Path, mode: int) -> bool:
        asked.append(path)
        assert mode == os.W_OK
        return is_writable

    monkeypatch.delenv("QSNAP_RUNTIME_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(os, "access", access)
    assert str(runtime_dir._location()) == expected
    assert asked == [Path("/run" if uid == 0 else f"/run/user/{uid}")]


def test_where_it_may_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSNAP_RUNTIME_DIR", "run")
    for look in (runtime_dir.problem, runtime_dir.existing, runtime_dir.directory):
        with pytest.raises(BadUsage, match="must be an absolute path, not 'run'"):
            look()


def test_a_decision_is_there_until_it_is_forgotten() -> None:
    assert (runtime_dir.is_decided(GROUP), runtime_dir.decisions()) == (False, set())
    runtime_dir.decide(GROUP)
    assert (runtime_dir.is_decided(GROUP), runtime_dir.is_decided("b" * 16)) == (True, False)
    assert runtime_dir.decisions() == {GROUP}
    runtime_dir.forget_decision("b" * 16)
    runtime_dir.forget_decision(GROUP)
    assert (runtime_dir.is_decided(GROUP), runtime_dir.decisions()) == (False, set())


def test_whether_there_are_journals(tmp_path: Path, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_dir.decide(GROUP)
    assert not runtime_dir.has_journals()
    (runtime_directory / f"{GROUP}.journal").touch()
    assert runtime_dir.has_journals()
    monkeypatch.setenv("QSNAP_RUNTIME_DIR", str(tmp_path / "none"))
    assert not runtime_dir.has_journals()


def test_what_cannot_be_written_down_is_not_decided(runtime_directory: Path) -> None:
    (runtime_directory / f"{GROUP}.decided").mkdir()
    with pytest.raises(QsnapError, match=r"the decision .* cannot be written: File exists"):
        runtime_dir.decide(GROUP)


def test_without_a_directory_nothing_is_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks does not make one."""
    place = tmp_path / "run"
    monkeypatch.setenv("QSNAP_RUNTIME_DIR", str(place))
    assert (runtime_dir.is_decided(GROUP), runtime_dir.decisions(), runtime_dir.problem()) == (False, set(), "")
    runtime_dir.forget_decision(GROUP)
    assert not place.exists()
    before, umask = open_files(), os.umask(0o777)
    try:
        assert runtime_dir.directory() == place
    finally:
        os.umask(umask)
    assert place.stat().st_mode & 0o777 == 0o700
    assert open_files() == before


def test_what_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, open_to_all = tmp_path / "file", tmp_path / "open"
    file.touch()
    open_to_all.mkdir()
    open_to_all.chmod(0o750)
    for place, unusable, not_made in (
        (file, "cannot be used: it is not a directory; set", "cannot be used: it is not a directory; set"),
        (open_to_all, "it is open to other users (mode 750); chmod 700 it, or", "(mode 750); chmod 700 it, or set"),
        (file / "run", "cannot be used: Not a directory; set", "cannot be made: Not a directory; set"),
        (tmp_path / "none" / "run", "", "cannot be made: No such file or directory; set"),
    ):
        monkeypatch.setenv("QSNAP_RUNTIME_DIR", str(place))
        assert unusable in runtime_dir.problem()
        assert bool(unusable) is bool(runtime_dir.problem())
        with pytest.raises(QsnapError, match=re.escape(not_made)):
            runtime_dir.directory()


def test_a_directory_that_goes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_: object, **__: object) -> None:
        raise FileExistsError

    monkeypatch.setenv("QSNAP_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(QsnapError, match=r"the runtime directory .* has gone; set QSNAP_RUNTIME_DIR"):
        runtime_dir.directory()
