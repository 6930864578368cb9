"""Addresses of monitors: what is meant by what was typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qsnap.errors import BadUsage
from qsnap.monitor.address import TcpAddress, UnixAddress, parse_address

pytestmark = pytest.mark.no_qemu


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/run/vm.qmp", UnixAddress("/run/vm.qmp")),
        ("vm.qmp", UnixAddress("vm.qmp")),
        ("unix:/run/vm.qmp", UnixAddress("/run/vm.qmp")),
        ("unix:/run/vm.qmp,server=on,wait=off", UnixAddress("/run/vm.qmp")),
        ("unix:/run/vm.qmp,server,nowait", UnixAddress("/run/vm.qmp")),
        ("/run/vm.qmp,server=on,wait=off", UnixAddress("/run/vm.qmp")),
        ("unix:/run/a,,b,server=on", UnixAddress("/run/a,b")),
        ("-qmp unix:/run/vm.qmp,server=on", UnixAddress("/run/vm.qmp")),
        ("-monitor tcp:127.0.0.1:4444,server,nowait", TcpAddress("127.0.0.1", 4444)),
        ("-chardev socket,id=mon,path=/run/vm.qmp,server=on", UnixAddress("/run/vm.qmp")),
        ("socket,id=mon,host=localhost,port=4444,server=on", TcpAddress("localhost", 4444)),
        ("tcp:localhost:4444", TcpAddress("localhost", 4444)),
        ("tcp::4444,server=on", TcpAddress("localhost", 4444)),
        ("tcp:[::1]:4444", TcpAddress("::1", 4444)),
        (" /run/vm.qmp ", UnixAddress("/run/vm.qmp")),
    ],
)
def test_addresses(given: str, meant: object) -> None:
    assert parse_address(given) == meant


@pytest.mark.parametrize(
    "given",
    ["", "unix:", "unix:,server=on", "tcp:", "tcp:host", "tcp:host:port", "tcp:host:0", "tcp:host:99999",
     "localhost:44", "stdio", "pty", "socket,id=x", "/" + "x" * 120, "a\0b"],
)  # fmt: skip
def test_bad_addresses_show_a_good_one(given: str) -> None:
    with pytest.raises(BadUsage) as error:
        parse_address(given)
    assert "tcp:" in str(error.value) or "shorter" in str(error.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("-incoming tcp:0:44", "is not an option that gives QEMU a monitor"),
        ("TCP:localhost:4444", "write tcp: in small letters"),
        ("tls:localhost:4444", "'tls' is not a kind of address"),
        (":4444", "write tcp:localhost:4444"),
        ("vm:4444", "write tcp:vm:4444"),
    ],
)
def test_what_is_wrong_with_an_address(given: str, told: str) -> None:
    with pytest.raises(BadUsage, match=re.escape(told)):
        parse_address(given)


def test_an_existing_path_with_a_comma(tmp_path: Path) -> None:
    path = tmp_path / "a,server=on"
    path.write_text("")
    assert parse_address(str(path)) == UnixAddress(str(path))


def test_home_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_address("~/vm.qmp") == UnixAddress("/home/me/vm.qmp")


def test_loopback() -> None:
    assert TcpAddress("127.0.0.1", 1).is_loopback
    assert TcpAddress("::1", 1).is_loopback
    assert not TcpAddress("example.org", 1).is_loopback
    assert str(TcpAddress("::1", 1)) == "tcp:[::1]:1"
