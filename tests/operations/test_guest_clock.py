"""After a load: the network learns where the guest is, and its clock is told of, and set."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest

from qsnap.cli.output.text import duration
from qsnap.operations.guest_clock import agent_socket
from support.guest import Guest, Launch, blockdev, cli, disk_device, make_boot_disk, until
from support.terminal import on_terminal


def network(tmp_path: Path) -> list[str]:
    return [
        "-netdev", "socket,id=n,udp=127.0.0.1:9,localaddr=127.0.0.1:0", "-device", "e1000,netdev=n",
        "-object", f"filter-dump,id=f,netdev=n,file={tmp_path}/packets",
    ]  # fmt: skip


def agent(tmp_path: Path) -> list[str]:
    return [
        "-chardev", f"socket,id=ga,path={tmp_path}/ga,server=on,wait=off", "-device", "virtio-serial",
        "-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
    ]  # fmt: skip


@pytest.fixture
def guest(launch: Launch, tmp_path: Path) -> Guest:
    disk = [*blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a")]
    running = launch(*disk, *network(tmp_path), *agent(tmp_path))
    running.wait_for_ticks(1)
    return running


class Agent(threading.Thread):
    """A guest agent, at the place of QEMU's socket; it answers what is left of another talk first."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        path.unlink()
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen(1)
        self.times: list[int] = []
        self.start()

    def run(self) -> None:
        client, _ = self.server.accept()
        with client, client.makefile("rwb") as stream:
            stream.write(b'\xff{"return": {"left": 1}}\n')
            for line in stream:
                command = json.loads(line)
                if command["execute"] == "guest-set-time":
                    self.times.append(command["arguments"]["time"])
                stream.write(json.dumps({"return": command["arguments"].get("id", {})}).encode() + b"\n")
                stream.flush()


@pytest.mark.parametrize("transport", ["qmp", "hmp"], indirect=True)
def test_announced_and_set(guest: Guest, tmp_path: Path, transport: str) -> None:
    """The card sends RARP packets (0x8035), which switches learn from; the agent is given the host's time."""
    cli("save", "t", monitor=guest.address)
    run = cli("load", "t", "--json", "--sync-time", monitor=guest.address)
    assert "the guest's clock was not set: no guest agent answers" in run.err
    assert 0 < run.json["clock_behind_s"] < 60
    until("the announcement", lambda: b"\x80\x35" in (tmp_path / "packets").read_bytes())
    answering = Agent(tmp_path / "ga")
    before = time.time_ns()
    assert cli("load", "t", "--json", "--sync-time", monitor=guest.address).json["clock_behind_s"] == 0
    (given,) = answering.times
    assert before <= given <= time.time_ns()
    answering.server.close()
    guest.qmp("stop")
    assert cli("load", "t", "--json", monitor=guest.address).json["clock_behind_s"] is None


def test_told_on_a_terminal(guest: Guest) -> None:
    """How far it is behind; the snapshot's date is QEMU's host's."""
    cli("save", "t", monitor=guest.address)
    assert "behind" not in on_terminal("load", "t", "-m", guest.address), "of seconds nobody needs to know"


@pytest.mark.no_qemu
def test_texts() -> None:
    assert [duration(n) for n in (0, 95, 12_000, 1_051_200, 86_400)] == [
        "0 s",
        "1 min 35 s",
        "3 h 20 min",
        "12 d 4 h",
        "1 d",
    ]
    qtree = (
        '  dev: virtserialport, id ""\n    nr = 1\n    chardev = "ga"\n    name = "org.qemu.guest_agent.0"\n  dev: x'
    )
    for row in ("ga: filename=disconnected:unix:/a b/ga,server=on", "ga: filename=unix:/a b/ga,server\r"):
        assert agent_socket(qtree, f"x: filename=null\n{row}\n") == "/a b/ga"
    assert agent_socket(qtree.replace("guest_agent", "other"), "ga: filename=unix:/x") is None
    assert agent_socket(qtree, "ga: filename=pty:/dev/pts/1") is None
