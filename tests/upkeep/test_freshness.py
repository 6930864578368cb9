"""Whether snapshots are fresh: the monitoring plugin's answer, Prometheus' file, the health check's calls."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest

from qsnap.errors import BadUsage, QsnapError
from qsnap.model.snapshots import InBacking, Kind, Snapshot
from qsnap.upkeep import metrics
from qsnap.upkeep.freshness import Health, Level, judge
from qsnap.upkeep.retention import Duration
from support.guest import Guest, cli, finish, needs_snapshot_jobs, start_cli, tags, until
from support.series import snapshot

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def made(hours_ago: float, kind: Kind = Kind.FULL, tag: str | None = None, missing: tuple[str, ...] = ()) -> Snapshot:
    vmstate = None if kind is Kind.DISK_ONLY else "disk0"
    plain = snapshot(NOW - timedelta(hours=hours_ago), kind, tag)
    return msgspec.structs.replace(plain, vm_state_size=7, vmstate=vmstate, missing=missing)


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        ([made(3), made(27)], Level.OK, "is 3 h old, 2 of them"),
        ([made(25.5)], Level.OK, "25 h old"),
        ([made(27)], Level.CRITICAL, "27 h old (limit 26h)"),
        ([], Level.CRITICAL, "none at all"),
        ([made(1, Kind.DISK_ONLY)], Level.CRITICAL, "1 that cannot be loaded"),
        ([msgspec.structs.replace(made(1), problems=("of two moments",))], Level.CRITICAL, "1 that cannot be loaded"),
        ([made(30), made(1, Kind.PARTIAL, missing=("disk1",))], Level.CRITICAL, "30 h old"),
        (
            [made(3), made(1, Kind.PARTIAL, missing=("disk1",))],
            Level.WARNING,
            "the newest, n-20261124T110000, is partial",
        ),
        ([made(3), made(1, Kind.PARTIAL, missing=("scratch",))], Level.OK, "60 min old"),
        ([made(-2)], Level.WARNING, "in the future"),
        ([made(3, tag="by-hand"), made(27)], Level.CRITICAL, "27 h old"),
        ([made(3, Kind.LIVE)], Level.OK, "3 h old"),
        ([msgspec.structs.replace(made(3), runstate="shutdown")], Level.WARNING, "of a guest that was shutdown"),
        # At the very limits
        ([made(26)], Level.OK, "26 h old"),
        ([made(0)], Level.OK, "0 s old"),
        ([made(2)], Level.OK, "2 h old"),
        ([made(48, tag="other"), made(1)], Level.OK, "60 min old, 1 of them"),
        ([made(3, Kind.PARTIAL, "n-20261124T090001", ("disk1",)), made(3)], Level.OK, "3 h old, 2 of them"),
    ],
)
def test_how_fresh(found: list[Snapshot], level: Level, words: str) -> None:
    health = judge(found, NOW, Duration(hours=26), prefix="n", left_out=["scratch"])
    assert (health.level, words in health.message) == (level, True), health


@pytest.mark.parametrize(
    ("hours", "level"), [(2, Level.OK), (2.1, Level.WARNING), (26, Level.WARNING), (26.1, Level.CRITICAL)]
)
def test_a_warning_comes_before(hours: float, level: Level) -> None:
    health = judge([made(hours)], NOW, Duration(hours=26), warn_age=Duration(hours=2))
    assert health.level == level
    assert (health.warn_age_s, health.max_age_s) == (7200, 93600)


@pytest.mark.parametrize(("prefix", "number"), [(None, 2), ("n", 1), ("other", 0)])
def test_what_is_out_of_reach_below_an_overlay(prefix: str | None, number: int) -> None:
    """It is told of the series that is looked at."""
    below = [InBacking(tag=tag, image="base", device="hd0") for tag in ("n-20261124T090000", "by-hand")]
    health = judge([], NOW, Duration(hours=26), prefix=prefix, in_backing=below)
    told = f"none at all, but {number} in the backing image base of hd0" if number else "none at all"
    of_what = f"snapshot of series {prefix}" if prefix else "snapshot"
    assert health.message == f"no {of_what} that can be loaded ({told})"
    assert health.line() == f"QSNAP CRITICAL - {health.message} | snapshots=0;;;0"


def test_a_line_without_figures() -> None:
    assert Health(level=Level.UNKNOWN, message="nobody\nanswers").line() == "QSNAP UNKNOWN - nobody answers"


def test_the_line_is_a_plugin_s() -> None:
    health = judge([made(3), made(28)], NOW, Duration(days=1), warn_age=Duration(hours=2), troubles=["a | b"])
    assert health.line() == (
        "QSNAP WARNING - the newest snapshot, n-20261124T090000, is 3 h old (limit 2h); a / b "
        "| age=10800s;7200;86400;0 snapshots=2;;;0 size=7B;;;0"
    )
    assert [level.exit_code for level in Level] == [0, 1, 2, 3]


@needs_snapshot_jobs
def test_status_as_a_plugin(guest: Guest, tmp_path: Path) -> None:
    run = cli("status", "--max-age", "26h", monitor=guest.address, expect=2)
    assert run.out.startswith("QSNAP CRITICAL - no snapshot that can be loaded (none at all) | snapshots=0")
    tag = cli("save", "--prefix", "nightly", "--json", monitor=guest.address).json["tag"]
    run = cli("status", "--max-age", "26h", "--prefix", "nightly", monitor=guest.address)
    assert re.fullmatch(
        rf"QSNAP OK - {tag} is \d+ s old, 1 of them \| age=\d+s;;93600;0 snapshots=1;;;0 size=\d+B;;;0\n", run.out
    )
    assert cli("status", "--max-age", "26h", "-q", monitor=guest.address).out == "", "for cron"
    other = cli("status", "--max-age", "26h", "--prefix", "weekly", "-q", monitor=guest.address, expect=2)
    assert other.out.startswith("QSNAP CRITICAL")
    cli("save", "part", "--exclude", "disk1", monitor=guest.address)
    assert "is partial" in cli("status", "--max-age", "26h", monitor=guest.address, expect=1).out
    config = tmp_path / "config.toml"
    config.write_text("[defaults]\nexclude = ['disk1']\n")
    assert "OK - part" in cli("status", "--max-age", "26h", "--config", str(config), monitor=guest.address).out
    found = cli("status", "--max-age", "26h", "--prefix", "nightly", "--json", monitor=guest.address).json
    assert (found["level"], found["exit_code"], found["newest"]) == ("OK", 0, tag)


def test_status_as_a_plugin_when_nobody_answers(tmp_path: Path) -> None:
    run = cli("status", "--max-age", "26h", "-m", str(tmp_path / "none"), expect=3)
    assert run.out.startswith("QSNAP UNKNOWN - ")
    assert run.err == ""
    assert "UNKNOWN" in cli("status", "--max-age", "26", "-m", str(tmp_path / "none"), expect=3).out
    cli("status", "--prefix", "x", "-m", str(tmp_path / "none"), expect=2)


# Prometheus


def figures(path: Path) -> dict[str, float]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@needs_snapshot_jobs
def test_a_file_of_metrics(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "qsnap.prom"
    label = f'{{vm="{guest.address}",prefix="nightly"}}'
    arguments = ("save", "--prefix", "nightly", "--textfile", str(path))
    result = cli(*arguments, "--json", monitor=guest.address).json
    found = figures(path)
    assert found[f"qsnap_save_pause_seconds{label}"] == pytest.approx(result["pause_ms"] / 1000)
    assert found[f"qsnap_save_duration_seconds{label}"] == pytest.approx(result["duration_ms"] / 1000)
    assert found[f"qsnap_snapshot_newest_size_bytes{label}"] == result["vm_state_size"]
    assert found[f"qsnap_snapshots{label}"] == 1
    assert found[f"qsnap_save_failures_total{label}"] == 0
    assert 0 <= found[f"qsnap_save_last_success_timestamp_seconds{label}"] - time.time() + 60 < 61
    assert found[f"qsnap_snapshot_newest_timestamp_seconds{label}"] == pytest.approx(
        datetime.fromisoformat(result["date"]).timestamp(), abs=1e-3
    )
    cli(*arguments, "--exclude", "nope", monitor=guest.address, expect=6)
    after = figures(path)
    assert after[f"qsnap_save_failures_total{label}"] == 1
    assert after[f"qsnap_save_last_exit_code{label}"] == 6
    changed = {f"qsnap_save_failures_total{label}", f"qsnap_save_last_exit_code{label}"}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in found.items() if k not in changed}
    path.chmod(0o600)  # Prometheus could not read it
    cli("status", "--max-age", "1d", "--textfile", str(path), monitor=guest.address)
    whole = f'{{vm="{guest.address}",prefix=""}}'
    assert figures(path)[f"qsnap_snapshots{whole}"] == 1
    assert f"qsnap_save_failures_total{whole}" not in figures(path), "no save was seen"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in tmp_path.iterdir() if "prom" in one.name] == ["qsnap.prom"]


def test_a_file_that_is_not_ours_is_left_alone(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    cli("save", "a", "--textfile", str(path), monitor=guest.address, expect=2)
    cli("save", "a", "--textfile", str(tmp_path / "none" / "x.prom"), monitor=guest.address, expect=2)
    assert path.read_text() == "my notes\n"
    assert tags(tmp_path / "disk0.qcow2") == [], "looked at before the guest was touched"


def test_what_is_no_regular_file_is_left_alone(guest: Guest, tmp_path: Path) -> None:
    """Neither replaced, nor waited for."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "to-fifo").symlink_to(fifo)
    for path in (fifo, tmp_path / "to-fifo", tmp_path):
        run = cli("save", "a", "--textfile", str(path), monitor=guest.address, expect=2)
        assert "left alone" in run.err
    assert fifo.is_fifo()
    link, target = tmp_path / "link.prom", tmp_path / "target.prom"
    link.symlink_to(target)
    cli("save", "a", "--textfile", str(link), monitor=guest.address)
    assert link.is_symlink()
    assert figures(target)


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal (proc(5), status)."""
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (signum - 1) & 1)


def test_an_interrupted_save_has_failed(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "x.prom"
    with socket.socket(socket.AF_UNIX) as other:  # it waits for the monitor
        other.connect(guest.address)
        assert other.recv(1)
        process = start_cli("save", "a", "--textfile", str(path), "--lock-wait", "30", monitor=guest.address)
        until("it handles signals", lambda: catches(process.pid, signal.SIGTERM))
        process.send_signal(signal.SIGTERM)
        run = finish(process)
    assert run.code == 143, run.err
    assert [value for name, value in figures(path).items() if "failures" in name] == [1]


def test_metrics_of_several_writers(tmp_path: Path) -> None:
    path = tmp_path / "x.prom"
    names = [f'vm "{number}"\\' for number in range(8)]

    def write(name: str) -> None:
        for count in range(20):
            metrics.update(path, {"vm": name, "prefix": ""}, {metrics.COUNT: count}, failed=True)

    threads = [threading.Thread(target=write, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = figures(path)
    assert len(found) == 16
    assert {value for name, value in found.items() if name.startswith("qsnap_snapshots")} == {19}
    assert {value for name, value in found.items() if "failures" in name} == {20}, "none is lost"
    with pytest.raises(QsnapError, match="cannot be written"):
        metrics.update(tmp_path / "none" / "x", {"vm": ""}, {metrics.COUNT: 1})
    (tmp_path / "dir").mkdir()
    with pytest.raises(BadUsage, match="left alone"):
        metrics.check(tmp_path / "dir")


# The health check


class Checks:
    """A health check that takes down what it is called with."""

    def __init__(self, status: int = 200) -> None:
        calls = self.calls = []  # type: list[tuple[str, str]]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer("")

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

            def answer(self, body: str) -> None:
                calls.append((self.path, body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/ping/uuid?x=1"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def checks(request: pytest.FixtureRequest) -> Iterator[Checks]:
    server = Checks(getattr(request, "param", 200))
    yield server
    server.close()


def test_pings(guest: Guest, checks: Checks) -> None:
    cli("save", "a", "--ping", checks.url, monitor=guest.address)
    assert checks.calls == [("/ping/uuid/start?x=1", ""), ("/ping/uuid?x=1", "")]
    checks.calls.clear()
    cli("save", "a", "--no-replace", "--ping", checks.url, monitor=guest.address, expect=8)
    assert [path for path, _ in checks.calls] == ["/ping/uuid/start?x=1", "/ping/uuid/fail?x=1"]
    assert "already exists" in checks.calls[1][1]
    checks.calls.clear()
    cli("save", "a", "-n", "--ping", checks.url, monitor=guest.address)
    assert checks.calls == []


def test_a_server_that_speaks_something_else(guest: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"SSH-2.0-nonsense\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        run = cli("save", "a", "-q", "--ping", url, monitor=guest.address)
        thread.join(10)
    assert run.err.count("warning: the health check") == 1, "the same is said once"
    assert "Traceback" not in run.err


@pytest.mark.parametrize("checks", [500], indirect=True)
def test_a_check_that_fails_fails_nothing(guest: Guest, checks: Checks, tmp_path: Path) -> None:
    run = cli("save", "a", "--ping", checks.url, monitor=guest.address)
    assert "warning: the health check at 127.0.0.1 answered 500 " in run.err
    run = cli("save", "b", "--ping", "http://127.0.0.1:1/x", monitor=guest.address)
    assert run.err == "warning: the health check at 127.0.0.1 could not be reached: Connection refused\n"
    assert tags(tmp_path / "disk0.qcow2") == ["a", "b"]
    for url in ("", "file:///etc/passwd", "ftp://x/", "http://", "http://[x/", "http://a b/", "http://a:b/"):
        assert "not a URL" in cli("save", "c", "--ping", url, monitor=guest.address, expect=2).err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-age", "90m"], "min for minutes, or mo for months"),
        (["--max-age", "1h", "--warn-age", "2h"], "must be shorter"),
        (["--max-age", "1h", "--warn-age", "60min"], "must be shorter"),
    ],
)
def test_ages_that_would_never_alert(options: list[str], words: str) -> None:
    run = cli("status", *options, monitor="/nowhere", expect=3)
    assert words in run.out
