"""What comes over a monitor is data, and may be anything: it ends in an error with a code, and takes nothing down."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import Message

import qsnap
from qsnap.errors import VerifyFailed
from qsnap.monitor.qmp import channel
from qsnap.monitor.qmp import monitor as qmp
from support.guest import (
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    assert_sound,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    finish,
    make_boot_disk,
    start_cli,
    tags,
    until,
)
from support.killed import assert_all_is_well, guards, journals, marks
from support.proxy import Intercept, deed

Answer = Callable[[dict[str, Any]], bytes | None]

GREETING = json.dumps(
    {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 0}, "package": ""}, "capabilities": []}}
).encode()
#: More than is taken in one message.
BIG = 70 << 20
DEEP = 100_000


class Impostor:
    """A server that speaks as it likes. It answers ``{}`` to what *answer* leaves to it."""

    def __init__(self, path: Path, greeting: bytes, answer: Answer) -> None:
        self._greeting = greeting
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                client.sendall(self._greeting + b"\r\n")
                lines = json.JSONDecoder()
                pending = ""
                while data := client.recv(65536):
                    pending = (pending + data.decode(errors="replace")).lstrip()
                    while pending:
                        if pending[0] != "{":
                            line, _, pending = pending.partition("\n")
                            message: dict[str, Any] = {"execute": "hmp", "line": line}
                        else:
                            message, end = lines.raw_decode(pending)
                            pending = pending[end:].lstrip()
                        reply = self._answer(message)
                        client.sendall(reply if reply is not None else _returned(message, b"{}"))

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


def _returned(message: dict[str, Any], value: bytes) -> bytes:
    return b'{"return": %s, "id": %s}\r\n' % (value, json.dumps(message.get("id")).encode())


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start one; its address."""
    running: list[Impostor] = []

    def start(answer: Answer = lambda _: None, greeting: bytes = GREETING) -> str:
        path = tmp_path / f"impostor{len(running)}"
        running.append(Impostor(path, greeting, answer))
        return str(path)

    yield start
    for server in running:
        server.close()


def answering(command: str, value: bytes) -> Answer:
    """*value* to that command alone, as QMP would."""
    return lambda message: _returned(message, value) if message.get("execute") == command else None


def raw(command: str, text: bytes) -> Answer:
    """*text* to that command alone, whatever it is."""
    return lambda message: text if message.get("execute") == command else None


@pytest.mark.parametrize(
    "value",
    [
        b'{"status": "%s", "running": true, "singlestep": false}' % (b"x" * BIG),
        b"[" * DEEP + b"]" * DEEP,
        b'{"status": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
        b"null",
        b"[]",
        b'"x"',
        b'{"status": 1}',
        b'{"status": null}',
        b"1e999",
        b"9" * 5000,
    ],
    ids=["70MB", "deep", "nested", "null", "list", "string", "number", "no status", "infinite", "digits"],
)
def test_answers(impostor: Callable[..., str], value: bytes) -> None:
    """Each is an error of the monitor; none takes more than a few hundred MB."""
    address = impostor(answering("query-status", value))
    for verb in (["check"], ["status"], ["save", "t"]):
        run = limited(*verb, "-m", address, "--json")
        assert (run.returncode, "Traceback" in run.stderr) == (4, False), run.stderr[-2000:]
        assert json.loads(run.stderr)["exit_code"] == 4


#: Answers of a QEMU without disks, to which `status` exits with 0.
PLAIN = {
    "query-status": b'{"status": "running"}',
    "query-block": b"[]",
    "query-named-block-nodes": b"[]",
    "x-debug-query-block-graph": b'{"nodes": [], "edges": []}',
    "query-jobs": b"[]",
    "qom-list": b"[]",
}
NODE = b'{"drv": "qcow2", "ro": false, "file": "/a", "node-name": "a", "image": {"filename": "/a", "snapshots": [%s]}}'
ROW = (
    b'{"id": "1", "name": "a tag, %s", "vm-state-size": 1, "date-sec": %d, "date-nsec": 0, "vm-clock-sec": 0, '
    b'"vm-clock-nsec": 0}'
)
EDGES = b'{"nodes": [%s], "edges": [{"parent": 1, "child": 2, "name": "root"}]}'


@pytest.mark.parametrize(
    ("command", "value", "message"),
    [
        (
            "x-debug-query-block-graph",
            b'{"nodes": [], "edges": [{"parent": 1, "child": 2, "name": "x"}]}',
            "understood",
        ),
        ("query-named-block-nodes", b"[" + NODE % (ROW % (b"", 1 << 60)) + b"]", "not the form"),
        ("query-status", b'{"status": "\\u001b[31m"}', "not the form"),
        ("query-name", b'{"name": "\\ud800"}', "cannot be read"),
        ("query-name", b'{"name": "%s"}' % (b"x" * BIG), "more than 64 MiB"),
    ],
    ids=["unknown node", "date", "run state", "half a character", "size"],
)
def test_answers_of_the_right_form(impostor: Callable[..., str], command: str, value: bytes, message: str) -> None:
    """They make no sense all the same. What is at fault is said, and nothing of it reaches the terminal as it is."""
    answers = PLAIN | {command: value}
    run = limited("status", "-m", impostor(lambda asked: _of(answers, asked)))
    assert (run.returncode, "Traceback" in run.stderr) == (4, False), run.stderr[-2000:]
    assert message in run.stderr
    assert "\x1b" not in run.stderr + run.stdout


def test_many_snapshots(impostor: Callable[..., str]) -> None:
    """An image takes 65536; that is more than 10 MiB in one message."""
    rows = b", ".join([ROW % (b"x" * 60, 1)] * 65536)
    assert len(rows) > 10 << 20
    answers = PLAIN | {
        "query-named-block-nodes": b"[" + NODE % rows + b"]",
        "query-block": b'[{"device": "b", "removable": false, "inserted": {"node-name": "a"}}]',
        "x-debug-query-block-graph": EDGES
        % b'{"id": 1, "type": "block-backend", "name": "b"}, {"id": 2, "type": "block-driver", "name": "a"}',
    }
    run = limited("status", "-m", impostor(lambda asked: _of(answers, asked)), "--json")
    assert run.returncode == 0, run.stderr[-2000:]


def _of(answers: dict[str, bytes], asked: dict[str, Any]) -> bytes | None:
    command = str(asked.get("execute"))
    return _returned(asked, answers[command]) if command in answers else None


@pytest.mark.parametrize("stamp", [{}, {"timestamp": {}}, {"timestamp": {"seconds": -1, "microseconds": -1}}])
def test_events_without_a_time(stamp: dict[str, Any]) -> None:
    """As QEMU sends them where its clock fails: the pause is then measured by ours."""
    assert channel._stamp(Message({"event": "STOP", **stamp})) is None


@pytest.mark.parametrize(
    "text",
    [
        b"garbage\r\n",
        b"\x00\xff\xfe\r\n",
        b"{\r\n",
        b'{"return": {}',
        b"{}\r\n",
        b"[1]\r\n",
        b'{"id": "x"}\r\n',
        b"\r\n" * 9,
        b'{"timestamp": {}, "event": {}}\r\n',
    ],
    ids=["text", "binary", "cut", "no end", "empty", "list", "no return", "blank", "event"],
)
def test_answers_that_are_no_json(impostor: Callable[..., str], text: bytes) -> None:
    address = impostor(raw("query-status", text))
    run = limited("status", "-m", address, "--json", "--timeout", "3")
    assert run.returncode in (1, 4), run.stderr
    assert json.loads(run.stderr)["error"] in ("MonitorLost", "MonitorError", "OperationTimeout")


@pytest.mark.parametrize(
    "greeting",
    [
        b'{"QMP": "%s"}' % (b"x" * BIG),
        b'{"QMP": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"QMP": {}}',
        b"{}",
        b'{"QMP": {"version": {"qemu": {"major": "x", "minor": [], "micro": null}}, "capabilities": []}}',
        b"QEMU \x1b[31m monitor",
        b"QEMU 7.2.0 monitor - " + b"x" * BIG,
        b"HTTP/1.1 400 Bad Request",
    ],
    ids=["70MB", "deep", "empty", "no QMP", "no version", "half HMP", "HMP 70MB", "HTTP"],
)
def test_greetings(impostor: Callable[..., str], greeting: bytes) -> None:
    run = limited("list", "-m", impostor(greeting=greeting), "--json", "--timeout", "4")
    assert (run.returncode, "Traceback" in run.stderr) == (4, False), run.stderr[-2000:]
    assert "\x1b" not in run.stderr


def test_no_greeting(tmp_path: Path) -> None:
    """QEMU closes a monitor's connection in its end."""
    address = tmp_path / "closing"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        listener.settimeout(20)
        run = start_cli("list", "-m", str(address))
        listener.accept()[0].close()
        assert f"{address} was closed before the greeting" in finish(run).err


def test_a_human_monitor_that_never_ends_its_answer(impostor: Callable[..., str]) -> None:
    """It is cut off before it fills the memory."""
    banner = b"QEMU 7.2.0 monitor - type 'help' for more information\r\n(qemu) "

    def answer(message: dict[str, Any]) -> bytes:
        line = str(message["line"])
        return f"\r\n{line.split()[1]}\r\n(qemu) ".encode() if line.startswith("print") else b"x" * BIG * bool(line)

    run = limited("list", "-m", impostor(answer, banner), "--json")
    assert (run.returncode, "Traceback" in run.stderr) == (4, False), run.stderr[-2000:]
    assert "more than 16 MiB" in json.loads(run.stderr)["message"]


def limited(*arguments: str) -> subprocess.CompletedProcess[str]:
    """qsnap, with 1 GiB of address space and no more than a minute."""
    return subprocess.run(
        [sys.executable, "-m", "qsnap", *arguments], capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "text", [b"garbage\r\n", b"[" * DEEP + b"\r\n", b"x" * BIG + b"\r\n"], ids=["text", "deep", "70MB"]
)
@pytest.mark.parametrize("command", ["stop", "snapshot-save", "query-jobs", "cont"])
@pytest.mark.skipif(not HAS_SNAPSHOT_JOBS, reason="these are commands of snapshot jobs")
def test_garbage_in_the_middle_of_a_save(
    guest: Guest, tmp_path: Path, intercept: Intercept, runtime_directory: Path, command: str, text: bytes
) -> None:
    """The connection is given up and made anew, the guest runs, nothing half made is left."""
    left = 2 if command == "query-jobs" else 1
    spoils = False

    def count(message: dict[str, Any]) -> None:
        nonlocal left, spoils
        left -= deed(message) == command
        spoils = left == 0 and deed(message) == command

    def spoil(data: bytes) -> bytes:
        nonlocal spoils
        if not spoils or b'"return"' not in data:
            return data
        spoils = False
        return text

    proxy = intercept(guest, on_command=count, on_data=spoil)
    run = cli("save", "t", "--json", monitor=proxy.address, expect=0 if command == "cont" else 4)
    expected = ["t"] if run.code == 0 else []
    images = (tmp_path / "disk0.qcow2", tmp_path / "disk1.qcow2")
    assert_all_is_well(guest, runtime_directory, dict.fromkeys(images, expected))


#: For a shell, HMP, QMP's options, rich's markup, a format string, a terminal and a path.
NAMES = ["a b", "$(id)", "`id`", "[red]x[/red]", "%s%n", "x,y=z", "../../x", "{}", "'", '"', "-rf", "é日"]


@both_monitors
def test_tags_and_names_of_the_guest(launch: Launch, tmp_path: Path) -> None:
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a [b] $(id)")), *disk_device("a"),
        "-name", "guest=x [red]\x1b[31m $(id) `id`",
    )  # fmt: skip
    guest.wait_for_ticks()
    for name in NAMES:
        cli("save", "--", name, monitor=guest.address)
        cli("load", "--", name, monitor=guest.address)
        assert tags(tmp_path / "a [b] $(id)") == [name]
        cli("delete", "--", name, monitor=guest.address)
    status = cli("status", monitor=guest.address)
    assert "\x1b" not in status.out
    assert "[red]\\x1b[31m $(id) `id`" in status.out
    guest.assert_running()


def test_files_and_sockets_of_ours_are_private(guest: Guest, runtime_directory: Path, intercept: Intercept) -> None:
    """Whatever the umask is: the journal, its directory, and all that the guard has open."""
    (runtime_directory / "x").mkdir()
    seen: list[tuple[int, int]] = []

    def look(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-save":
            place = runtime_directory / "x" / "run"
            seen.extend((path.stat().st_mode & 0o777, path.stat().st_uid) for path in (place, *place.iterdir()))

    proxy = intercept(guest, on_command=look)
    script = f"umask 0; exec {sys.executable} -m qsnap save t -m {proxy.address}"
    environment = {**os.environ, "QSNAP_RUNTIME_DIR": str(runtime_directory / "x" / "run")}
    subprocess.run(["sh", "-c", script], check=True, env=environment, timeout=60, capture_output=True)
    assert [mode for mode, _ in seen] == [0o700, 0o600]


@both_monitors
def test_another_client_deletes_the_snapshot_under_a_load(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path
) -> None:
    """QEMU then refuses before it touches anything, but leaves the guest stopped: it is resumed."""
    cli("save", "t", monitor=guest.address)

    def meddle(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-load":
            for node in ("disk0", "disk1"):
                guest.qmp("blockdev-snapshot-delete-internal-sync", device=node, name="t")

    run = cli("load", "t", monitor=intercept(guest, on_command=meddle).address, expect=7)
    assert "deleted by another client just now; nothing was loaded" in run.err
    images = (tmp_path / "disk0.qcow2", tmp_path / "disk1.qcow2")
    assert_all_is_well(guest, runtime_directory, {image: [] for image in images})
    cli("save", "t", monitor=guest.address)


@both_monitors
def test_the_image_is_gone(launch: Launch, tmp_path: Path, runtime_directory: Path) -> None:
    """QEMU has it open still: a save works, and so does a load; only the witness cannot look."""
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*blockdev("a", image), *disk_device("a"))
    guest.wait_for_ticks()
    image.unlink()
    cli("save", "t", monitor=guest.address)
    cli("load", "t", monitor=guest.address)
    guest.assert_running()
    assert (journals(runtime_directory), guards(runtime_directory), marks(guest)) == ([], [], [])
    assert guest.node_tags("a") == ["t"]


@pytest.mark.skipif(not HAS_SNAPSHOT_JOBS, reason="without jobs none can hang")
async def test_a_job_that_never_concludes(
    guest: Guest, tmp_path: Path, intercept: Intercept, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU answers, and the job stands still: it is given up, the guest runs, and the snapshot is removed."""
    monkeypatch.setattr(qmp, "STUCK_POLLS", 12)
    monkeypatch.setattr(qmp, "POLL_S", 0.1)
    at: dict[str, float] = {}

    def note(message: dict[str, Any]) -> None:
        at.setdefault(deed(message), time.monotonic())

    def pause(data: bytes) -> bytes:
        return data.replace(b'"concluded"', b'"paused"') if b"qsnap-save" in data else data

    proxy = intercept(guest, on_command=note, on_data=pause)
    async with qsnap.connect(proxy.address) as vm:
        with pytest.raises(VerifyFailed, match="its job does not end; QEMU answers, and calls it paused") as failure:
            await vm.save("t")
    assert at["job-cancel"] - at["snapshot-save"] > 0.5, "it is given up too early"
    assert "the guest is running" in failure.value.outcome
    assert "job-cancel" in proxy.commands
    assert_all_is_well(guest, runtime_directory, {tmp_path / name: [] for name in ("disk0.qcow2", "disk1.qcow2")})


@both_monitors
def test_the_guest_shuts_down_by_itself(
    launch: Launch, tmp_path: Path, intercept: Intercept, runtime_directory: Path
) -> None:
    """Just before it is stopped. QEMU ends with it: that is said, and nothing of ours is left."""
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*blockdev("a", image), *disk_device("a"), "-no-reboot")
    guest.wait_for_ticks()
    cli("save", "old", monitor=guest.address)

    def shut_down(message: dict[str, Any]) -> None:
        if deed(message) == "stop":
            guest.qmp("system_reset")  # which ends it, by -no-reboot
            guest.process.wait(30)

    run = cli("save", "t", "--json", monitor=intercept(guest, on_command=shut_down).address, expect=None)
    # Through a proxy it cannot be seen that QEMU has ended.
    assert run.code in (4, 20), run.err
    assert run.error["error"] in ("MonitorLost", "GuestLeftStopped")
    assert "Client" not in run.error["message"]
    assert ".." not in run.error["message"]
    assert_sound(image)
    assert tags(image) == ["old"]
    until("the guard to give up", lambda: not guards(runtime_directory), 60)


@pytest.mark.skipif(not HAS_SNAPSHOT_JOBS, reason="-action came with QEMU 6.0 too")
@both_monitors
def test_the_guest_shuts_down_and_qemu_stays(
    launch: Launch, tmp_path: Path, intercept: Intercept, runtime_directory: Path
) -> None:
    """It ran, and has ended by itself: it is not for us to resume."""
    image = make_boot_disk(tmp_path / "a")
    action = ("-action", "reboot=shutdown,shutdown=pause")
    guest = launch(*blockdev("a", image), *disk_device("a"), *action)
    guest.wait_for_ticks()

    def shut_down(message: dict[str, Any]) -> None:
        if deed(message) == "stop":
            guest.qmp("system_reset")
            until("the guest to end", lambda: guest.runstate == "shutdown")

    run = cli("save", "t", "--json", monitor=intercept(guest, on_command=shut_down).address, expect=20)
    assert "system_reset" in run.error["message"]
    until("the guard to be gone", lambda: not guards(runtime_directory))
    assert (guest.runstate, journals(runtime_directory), marks(guest), guest.jobs()) == ("shutdown", [], [], [])
