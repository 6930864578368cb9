"""Real QEMUs for the tests: a launcher, disks, a second monitor, and what the guest itself says.

The launcher is synchronous, so that tests of the command line and tests of the library can use it alike.
Every wait has a deadline. ``QSNAP_QEMU`` chooses the binary; a missing one fails.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

import qsnap.guest
from support.forks import Forked, can_fork

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., object])

#: The boot sectors, beside their sources.
GUESTS = Path(__file__).with_name("guests")
#: What monitors and commands said once.
RECORDED = Path(__file__).with_name("recorded")

QEMU = os.environ.get("QSNAP_QEMU", "qemu-system-x86_64")


@cache
def qemu_version() -> tuple[int, int]:
    """Of the QEMU under test; zeroes without one: then only tests run that need none."""
    if shutil.which(QEMU) is None:
        return 0, 0
    text = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    major, minor = text.split("version ")[1].split(".")[:2]
    return int(major), int(minor)


HAS_SNAPSHOT_JOBS = qemu_version() >= (6, 0)

#: Runs a test with qsnap on the guest's QMP socket, and again on its human monitor.
both_monitors = pytest.mark.parametrize("transport", ["qmp", "hmp"], indirect=True)
#: For a test whose subject is not there without them: choosing devices, carrying raw ones, jobs.
needs_snapshot_jobs = pytest.mark.skipif(not HAS_SNAPSHOT_JOBS, reason="QEMU before 6.0 has no snapshot jobs")


def newer(since: tuple[int, int], reason: str) -> Callable[[_F], _F]:
    """For a test of what QEMU has, or does wrong, since some version: skipped before. CI runs all of these on 11.1."""

    def marked(test: _F) -> _F:
        told: _F = pytest.mark.newer(pytest.mark.skipif(qemu_version() < since, reason=reason)(test))
        return told

    return marked


#: Seconds for anything that takes milliseconds on an idle machine.
DEADLINE_S = 30.0


def tool(name: str) -> str:
    """qemu-img or qemu-io, from beside the chosen QEMU if it is there."""
    beside = Path(QEMU).with_name(name)
    return str(beside) if "/" in QEMU and beside.exists() else name


def until(what: str, look: Callable[[], _T | None], deadline_s: float = DEADLINE_S) -> _T:
    """What *look* returns, as soon as that is not None (or False)."""
    end = time.monotonic() + deadline_s
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.005)  # a poll with a deadline, no synchronisation


def qemu_img(*args: str | Path) -> str:
    """Run qemu-img; what it prints."""
    done = subprocess.run([tool("qemu-img"), *map(str, args)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_sound(image: Path) -> None:
    """Nothing in the image is damaged. Clusters that a QEMU killed in the middle has leaked do no harm."""
    done = subprocess.run([tool("qemu-img"), "check", "-U", str(image)], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 3), done.stdout + done.stderr


def make_disk(path: Path, size: str = "8M", driver: str = "qcow2", *options: str) -> Path:
    """An empty image."""
    qemu_img("create", "-q", "-f", driver, *options, path, size)
    return path


def make_boot_disk(path: Path, driver: str = "qcow2", *options: str) -> Path:
    """An image that the counting guest boots from, and keeps its table on."""
    qsnap.guest.make_disk(path, qemu_img=tool("qemu-img"), driver=driver, options=options)
    return path


def tags(image: Path) -> list[str]:
    """The tags in an image's snapshot table, as qemu-img reads it: the witness that is not qsnap."""
    info = json.loads(qemu_img("info", "-U", "--output=json", image))
    return [row["name"] for row in info.get("snapshots", [])]


def state_sizes(image: Path) -> dict[str, int]:
    """The size of the VM state by tag, as qemu-img reads it."""
    info = json.loads(qemu_img("info", "-U", "--output=json", image))
    return {row["name"]: row["vm-state-size"] for row in info.get("snapshots", [])}


class Qmp:
    """A QMP client of a few lines, which shares no code with qsnap."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(DEADLINE_S)
        try:
            self._sock.connect(str(path))
        except OSError:
            self._sock.close()
            raise
        self._received = b""
        self.events: list[dict[str, Any]] = []
        try:
            self._next()
            self("qmp_capabilities")
        except (OSError, ValueError):
            self.close()
            raise ConnectionRefusedError from None

    def __call__(self, command: str, **arguments: object) -> Any:
        """Run a command; underscores in argument names stand for hyphens."""
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        while True:
            reply = self._next()
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise QmpError(reply["error"]["desc"])
            else:
                return reply["return"]

    def next_event(self, wait_s: float) -> str | None:
        """The name of the next event, without a command (a savevm lets QEMU answer none); None if none came so soon."""
        if b"\n" not in self._received and not select.select([self._sock], [], [], wait_s)[0]:
            return None
        self.events.append(self._next())
        return str(self.events[-1]["event"])

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            if not (chunk := self._sock.recv(1 << 16)):
                raise ConnectionResetError("QEMU ended the connection")
            self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def hmp(self, line: str) -> str:
        """Run a line of the human monitor; its text."""
        return str(self("human-monitor-command", command_line=line))

    def close(self) -> None:
        self._sock.close()


class QmpError(Exception):
    """An error reply."""


class Guest:
    """A running QEMU with two QMP sockets, one for qsnap and one for the test, and a human monitor.

    :param user: whose QEMU it is, which only root may choose.
    :ivar qmp: the test's own monitor.
    :ivar address: the one for qsnap: the other QMP socket, or the human one if *transport* is "hmp".
    :ivar qmp_address: the QMP socket for qsnap.
    :ivar hmp_address: the human one.
    """

    def __init__(
        self,
        *args: str,
        memory: str = "32",
        machine: str = "q35,accel=tcg",
        wait_s: float = 20,
        transport: str = "qmp",
        user: int | None = None,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="qs-"))
        if user is not None:
            os.chown(self.directory, user, user)
        self.qmp_address = str(self.directory / "qmp")
        self.hmp_address = str(self.directory / "hmp")
        self.address = self.hmp_address if transport == "hmp" else self.qmp_address
        self.serial = self.directory / "serial"
        self.args = args
        self._log = (self.directory / "log").open("w+b")
        self.process = subprocess.Popen(
            [
                QEMU, "-machine", machine, "-m", memory, "-nodefaults", "-display", "none",
                "-qmp", f"unix:{self.qmp_address},server=on,wait=off",
                "-qmp", f"unix:{self.directory}/test,server=on,wait=off",
                "-monitor", f"unix:{self.hmp_address},server=on,wait=off",
                "-chardev", f"file,id=serial,path={self.serial}", "-serial", "chardev:serial",
                *args,
            ],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            user=user, group=user, extra_groups=None if user is None else [],
        )  # fmt: skip
        try:
            self.qmp = until("QEMU's monitor", self._connect, wait_s)
        except BaseException:
            self.kill()
            raise

    def _connect(self) -> Qmp | None:
        if self.process.poll() is not None:
            raise AssertionError(f"QEMU ended with {self.process.returncode}: {self.log}\n{self.process.args!r}")
        try:
            return Qmp(self.directory / "test")
        except (FileNotFoundError, ConnectionRefusedError):
            return None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """What QEMU has printed; the verdict of HMP's qemu-io stands here."""
        self._log.flush()
        return (self.directory / "log").read_text(errors="replace")

    @property
    def runstate(self) -> str:
        return str(self.qmp("query-status")["status"])

    @property
    def counter(self) -> int:
        """The guest's counter, read from its RAM."""
        return self.word(qsnap.guest.COUNTER)

    def word(self, address: int) -> int:
        """32 bits of guest RAM."""
        text = self.qmp.hmp(f"xp /1wx {address:#x}")
        return int(text.split(":")[1].strip(), 16)

    def lines(self) -> list[tuple[int, int]]:
        """What the guest has printed: (counter, differences between RAM and disks)."""
        text = self.serial.read_text(errors="replace") if self.serial.exists() else ""
        return [
            (int(count, 16), int(bad, 16)) for count, bad in re.findall(r"c=([0-9A-F]{8}) bad=([0-9A-F]{4})\r?\n", text)
        ]

    def wait_for_ticks(self, ticks: int = qsnap.guest.TABLE_SLOTS + 2) -> int:
        """Wait until the guest has printed that many lines from now on; by default once through all disk slots."""
        start = len(self.lines())
        until(f"{ticks} ticks", lambda: len(self.lines()) >= start + ticks or None)
        return self.lines()[-1][0]

    def assert_running(self) -> None:
        """The guest runs, goes on counting, and its disks agree with its RAM."""
        assert self.runstate == "running"
        self.wait_for_ticks(3)
        assert self.lines()[-1][1] == 0, f"RAM and disks differ: {self.lines()[-5:]}"

    def jobs(self) -> list[str]:
        return [job["id"] for job in self.qmp("query-jobs")]

    def node_tags(self, node: str) -> list[str]:
        """The tags on a node, as QEMU tells without qsnap."""
        for info in self.qmp("query-named-block-nodes", flat=True):
            if info["node-name"] == node:
                return [row["name"] for row in info["image"].get("snapshots", [])]
        raise AssertionError(f"no node {node}")

    def quit(self) -> None:
        """End QEMU in an orderly way; the images stay."""
        with suppress(OSError, ValueError):  # it may be gone before its answer is read
            self.qmp("quit")
        self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        """End QEMU by its own pid, and remove what belongs to it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        self._log.close()
        if hasattr(self, "qmp"):
            self.qmp.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def blockdev(node: str, path: Path, driver: str = "qcow2", *more: str) -> list[str]:
    """A -blockdev of an image file."""
    options = ",".join((f"driver={driver},node-name={node},file.driver=file,file.filename={path}", *more))
    return ["-blockdev", options]


class Run:
    """A finished qsnap: its exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        """The JSON error on standard error."""
        return json.loads(self.err)


def start_cli(
    *args: str, monitor: str | None = None, env: dict[str, str] | None = None, code: str = ""
) -> subprocess.Popen[str]:
    """qsnap as a process of its own, not yet finished; *code* is what runs it, instead of its own."""
    how = ["-c", code] if code else ["-m", "qsnap"]
    return subprocess.Popen(
        [sys.executable, *how, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=_environment(monitor, env),
    )  # fmt: skip


def _environment(monitor: str | None, env: dict[str, str] | None) -> dict[str, str]:
    environment = {**os.environ, "COLUMNS": "200", **(env or {})}
    environment.pop("QSNAP_MONITOR", None)
    if monitor is not None:
        environment["QSNAP_MONITOR"] = monitor
    return environment


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> Run:
    """Wait for it."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Run(process.returncode, out, err)


def cli(*args: str, monitor: str | None = None, expect: int | None = 0, env: dict[str, str] | None = None) -> Run:
    """Run qsnap, and check its exit code unless *expect* is None."""
    environment = _environment(monitor, env)
    if can_fork(environment):
        run = Run(*Forked(args, environment).finish(60))
    else:
        run = finish(start_cli(*args, monitor=monitor, env=env))
    assert expect is None or run.code == expect, f"exit {run.code}\n{run.out}\n{run.err}"
    return run


def deliver(process: subprocess.Popen[str], *signums: int) -> None:
    """Send signals; return when the process has taken each and waits again: what it does about it at once is done.

    So what a proxy holds meanwhile comes after that, however busy the machine is.
    """
    for signum in signums:
        process.send_signal(signum)
        until("the signal to be taken", lambda: waits(process.pid))


def waits(pid: int) -> bool:
    """Whether a process sleeps (or has ended), and no signal is on its way to it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    fields = dict(line.split(":\t", 1) for line in lines)
    return fields["State"][0] in "SZ" and not int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)


def open_files() -> list[str]:
    """The descriptors that this process has open."""
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 (it is named in tests that are coroutines, too)


def disk_device(node: str, number: int = 0, **more: str) -> list[str]:
    """A -device for a disk whose kind is not what the test is about, the *number*-th of the machine.

    SeaBIOS, by which the guest reads and writes, burns many times as much of the host's time while it waits for a
    virtio disk as for this one. All kinds of disks are in test_contents.
    """
    options = [f"{name.replace('_', '-')}={value}" for name, value in more.items()]
    return ["-device", ",".join([f"ide-hd,drive={node},bus=ide.{number}", *options])]


def failing_disk(node: str, path: Path, event: str, errno: int, *, once: bool = True) -> list[str]:
    """A -blockdev whose next request after QEMU's *event* fails with *errno*, or all from then on: a real fault.

    QEMU's events are in qapi/block-core.json (BlkdebugEvent): vmstate_save, vmstate_load, cluster_alloc, ...
    """
    options = (
        f"driver=qcow2,node-name={node},file.driver=blkdebug,file.image.driver=file,file.image.filename={path},"
        f"file.inject-error.0.event={event},file.inject-error.0.errno={errno},"
        f"file.inject-error.0.once={'on' if once else 'off'}"
    )
    return ["-blockdev", options]


def assert_nothing_left(guest: Guest, expected: dict[Path, list[str]]) -> None:
    """The guest runs with its contents as they were, and neither a job nor a half-made snapshot is left."""
    guest.assert_running()
    assert guest.jobs() == [], guest.qmp("query-jobs")
    assert {image: tags(image) for image in expected} == expected


Launch = Callable[..., Guest]
"""Starts a guest: the fixture ``launch``."""
