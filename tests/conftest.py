"""Fixtures: guests that end with their test, and a directory for images."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qsnap.inventory import protection
from support.fake_proc import Machine
from support.guest import QEMU, Guest, Launch, blockdev, disk_device, make_boot_disk, make_disk
from support.proxy import Intercept, Proxy


def pytest_sessionstart(session: pytest.Session) -> None:
    """A missing QEMU fails the run: a green one without it would say nothing."""
    if shutil.which(QEMU) is None and session.config.option.markexpr != "no_qemu":
        pytest.exit(f"{QEMU} is not installed (or not what QSNAP_QEMU should name)", returncode=3)
    # A shell starts its background jobs with SIGINT ignored, nohup ignores SIGHUP; and so would every qsnap of ours.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # What whoever runs the tests has set up for their own VMs is none of ours.
    os.environ["XDG_CONFIG_HOME"] = "/nonexistent"
    for name in ("QSNAP_CONFIG", "QSNAP_MONITOR"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the runs of this test keep their journals; whatever else is at work on this machine is not seen there."""
    with tempfile.TemporaryDirectory(prefix="qs-run-") as name:
        monkeypatch.setenv("QSNAP_RUNTIME_DIR", name)
        yield Path(name)


@pytest.fixture
def transport(request: pytest.FixtureRequest) -> str:
    """Which of a guest's monitors qsnap is given, "qmp" or "hmp". Set by ``both_monitors``."""
    return getattr(request, "param", "qmp")


@pytest.fixture
def launch(transport: str) -> Iterator[Launch]:
    """Start guests; they are ended with the test."""
    guests: list[Guest] = []

    def start(*args: str, **more: Any) -> Guest:
        guests.append(Guest(*args, transport=transport, **more))
        return guests[-1]

    yield start
    for guest in guests:
        guest.kill()


@pytest.fixture
def intercept(launch: Launch) -> Iterator[Intercept]:
    """Proxies in front of a guest's monitor; they are closed with the test.

    Through one nobody sees the images. So QEMU is told beforehand that no notes beside them protect anything.
    """
    proxies: list[Proxy] = []

    def start(guest: Guest, **hooks: Any) -> Proxy:
        files = {row["image"]["filename"] for row in guest.qmp("query-named-block-nodes") if row["drv"] == "file"}
        guest.qmp.hmp(f"object_add authz-simple,id={protection.noted(files)},identity=yes")
        proxies.append(Proxy(guest.address, guest.directory / f"proxy{len(proxies)}", **hooks))
        return proxies[-1]

    yield start
    for running in proxies:
        running.close()


@pytest.fixture
def guest(launch: Launch, tmp_path: Path) -> Guest:
    """The counting guest on two qcow2 disks, nodes "disk0" and "disk1"."""
    make_boot_disk(tmp_path / "disk0.qcow2")
    make_disk(tmp_path / "disk1.qcow2")
    running = launch(
        *blockdev("disk0", tmp_path / "disk0.qcow2"), *disk_device("disk0", 0, id="vd0"),
        *blockdev("disk1", tmp_path / "disk1.qcow2"), *disk_device("disk1", 1, id="vd1"),
    )  # fmt: skip
    running.wait_for_ticks()
    return running


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter, as pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="qs-"))
    directory.chmod(0o755)
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(machine.proc))
    try:
        yield machine
    finally:
        machine.close()
