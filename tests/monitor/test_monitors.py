"""What a monitor may be beside the usual: pretty-printed, by telnet, silent, or not a monitor at all."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from qsnap.errors import BadUsage
from qsnap.monitor import open_monitor
from qsnap.monitor.address import TcpAddress, parse_address
from qsnap.monitor.connection import AnotherAnswers
from support.guest import Guest, Launch, blockdev, both_monitors, cli, disk_device, make_boot_disk, tags
from support.killed import Killer, assert_all_is_well
from support.proxy import Intercept, Proxy, deed

#: How QEMU is given each, at the socket NAME.
KINDS = {
    "pretty": ("-qmp-pretty", "unix:{path},server=on,wait=off"),
    "telnet": ("-chardev", "socket,id=odd,path={path},server=on,wait=off,telnet=on", "-mon", "odd"),
    "telnet-qmp": ("-qmp", "unix:{path},server=on,wait=off,telnet=on"),
}


def free_port() -> int:
    """A TCP port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


kinds = pytest.mark.parametrize("kind", KINDS)


def odd_guest(launch: Launch, tmp_path: Path, kind: str) -> tuple[Guest, Path]:
    """A guest with that kind of monitor, which is its ``address``."""
    image = make_boot_disk(tmp_path / "a")
    words = [word.format(path=tmp_path / "odd") for word in KINDS[kind]]
    guest = launch(*blockdev("a", image), *disk_device("a"), *words)
    guest.address = str(tmp_path / "odd")
    guest.wait_for_ticks()
    return guest, image


@kinds
def test_all_commands(launch: Launch, tmp_path: Path, kind: str) -> None:
    guest, image = odd_guest(launch, tmp_path, kind)
    cli("check", monitor=guest.address)
    cli("save", "a", monitor=guest.address)
    moment = guest.counter
    cli("save", "--live=auto", "live", monitor=guest.address)
    guest.wait_for_ticks()
    cli("load", "a", "--paused", monitor=guest.address)
    assert guest.counter <= moment
    cli("load", "live", "--running", monitor=guest.address)
    guest.assert_running()
    cli("protect", "live", monitor=guest.address)
    assert [one["tag"] for one in cli("list", "--json", monitor=guest.address).json["snapshots"]] == ["a", "live"]
    assert "live" in cli("show", "live", monitor=guest.address).out
    cli("delete", "a", monitor=guest.address)
    assert cli("status", "--json", monitor=guest.address).json["snapshots"] == 1
    cli("recover", monitor=guest.address)
    assert "a" not in tags(image)


@kinds
def test_the_guard_takes_it_over(
    launch: Launch, tmp_path: Path, intercept: Intercept, runtime_directory: Path, kind: str
) -> None:
    guest, image = odd_guest(launch, tmp_path, kind)
    killer = Killer("snapshot-save")
    killer.run("save", "t", monitor=intercept(guest, on_command=killer).address)
    assert_all_is_well(guest, runtime_directory, {image: []})


@kinds
def test_a_connection_that_breaks_is_made_anew(
    launch: Launch, tmp_path: Path, intercept: Intercept, runtime_directory: Path, kind: str
) -> None:
    guest, image = odd_guest(launch, tmp_path, kind)
    is_cut = False

    def cut(message: dict[str, Any]) -> None:
        nonlocal is_cut
        if deed(message) == "snapshot-save" and not is_cut:
            is_cut = True
            proxy.cut()

    proxy = intercept(guest, on_command=cut)
    run = cli("save", "t", monitor=proxy.address, expect=4)
    assert "the guest is running" in run.err
    assert_all_is_well(guest, runtime_directory, {image: []})


@both_monitors
async def test_a_new_connection_while_another_process_has_the_old_one_too(launch: Launch) -> None:
    """As a guard has. The monitor serves one client, so the old connection is ended for all who have it."""
    guest = launch()
    monitor = await open_monitor(parse_address(guest.address))
    try:
        assert monitor.sock is not None
        with monitor.sock.dup():
            await monitor.reconnect(10)
            assert await monitor.runstate() == "running"
    finally:
        await monitor.aclose()


@both_monitors
@pytest.mark.parametrize("what", ["another kind of monitor", "another version"])
async def test_another_qemu_answers_a_new_connection(launch: Launch, tmp_path: Path, what: str) -> None:
    """It is asked nothing: neither its state nor whose claim it has."""
    guest = launch()

    def changed(data: bytes) -> bytes:
        return re.sub(rb'("major": |QEMU )\d+', rb"\g<1>99", data) if was_lost else data

    was_lost = False
    proxy = Proxy(guest.address, tmp_path / "proxy", on_data=changed)
    try:
        monitor = await open_monitor(parse_address(proxy.address))
        was_lost = what == "another version"
        if not was_lost:
            proxy.target = guest.qmp_address if guest.address == guest.hmp_address else guest.hmp_address
        proxy.commands.clear()
        with pytest.raises(AnotherAnswers):
            await monitor.reconnect(10)
        await monitor.aclose()
    finally:
        proxy.close()
    # Over HMP no more than to read the banner takes: a line of nothing
    assert set(proxy.commands) <= {"qmp_capabilities"} or proxy.commands == ["hmp"]
    assert guest.runstate == "running"


def test_telnet_over_tcp(launch: Launch, tmp_path: Path) -> None:
    """Under its own name, pasted whole, and where only its first bytes tell; names of any bytes go through it."""
    port = free_port()
    word = f"telnet:127.0.0.1:{port},server=on,wait=off"
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"), "-monitor", word,
        "-name", b"x\xff\xfb\xff\xff\xfez",
    )  # fmt: skip
    for address in (f"telnet:127.0.0.1:{port}", f"-monitor {word}", f"tcp:127.0.0.1:{port}"):
        cli("save", "é日", "--ignore-unseen", monitor=address)  # the second replaces the first
        assert tags(tmp_path / "a") == ["é日"]
        assert cli("status", "--json", monitor=address).json["name"] == "x\ufffd\ufffd\ufffd\ufffd\ufffdz"
    monitors = next(vm for vm in cli("vms", "--json").json["vms"] if vm["pid"] == guest.pid)["monitors"]
    assert f"tcp:127.0.0.1:{port}" in [monitor["address"] for monitor in monitors]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("ws:127.0.0.1:44", "speaks websocket"),
        ("-qmp websocket:127.0.0.1:44,server=on", "speaks websocket"),
        ("-chardev socket,id=c,host=::1,port=44,server=on,websocket=on", "speaks websocket"),
        ("tcp:127.0.0.1:44,server=on,tls-creds=t", "speaks tls"),
        ("vsock:3:4444", "is on a vsock"),
        ("mon:stdio", "QEMU's own terminal"),
        ("-serial mon:unix:/x,server=on", "mux"),
        ("unix:/x,mux=on", "mux"),
        ("unix-abstract:x", "abstract"),
        ("unix:x,server=on,abstract=on", "abstract"),
        ("stdio", "QEMU's own terminal"),
        ("-monitor stdio", "QEMU's own terminal"),
        ("pty", "pseudo-terminal"),
        ("-mon chardev=w", "its -chardev says"),
        ("chardev:w", "its -chardev says"),
        ("fd:5", "descriptor"),
        ("socket,id=c,fd=5", "descriptor"),
        ("qemu+ssh://host/system", "not the address of a QEMU monitor"),
    ],
)
def test_addresses_of_other_kinds(given: str, named: str) -> None:
    """Each is named for what it is, with a cure."""
    with pytest.raises(BadUsage, match=named) as error:
        parse_address(given)
    assert "/run/vm.qmp" in str(error.value)


def test_a_file_may_have_the_name_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "vsock:3").touch()
    assert str(parse_address("vsock:3", relative_to=str(tmp_path))) == f"unix:{tmp_path}/vsock:3"
    assert parse_address("telnet:[::1]:44,server,nowait") == TcpAddress("::1", 44)


def test_a_monitor_that_shares_its_socket(launch: Launch, tmp_path: Path) -> None:
    """The command line of QEMU tells why it is silent."""
    path = tmp_path / "odd"
    shared = f"socket,id=odd,path={path},server=on,wait=off,mux=on"
    launch("-chardev", shared, "-mon", "odd", "-serial", "chardev:odd")
    run = cli("list", "--timeout", "1", monitor=str(path), expect=4)
    assert "shares its device with another one (mux)" in run.err
    assert "-qmp unix:PATH,server=on,wait=off" in run.err
    assert "another client" not in run.err


def test_a_monitor_that_speaks_websocket(launch: Launch) -> None:
    """It waits for the client to begin. Where no command line is to be seen, the message says what it may be."""
    port = free_port()
    launch("-chardev", f"socket,id=odd,host=127.0.0.1,port={port},server=on,wait=off,websocket=on", "-mon", "odd")
    run = cli("list", "--timeout", "1", monitor=f"tcp:127.0.0.1:{port}", expect=4)
    assert "this monitor speaks websocket" in run.err
    with socket.create_server(("127.0.0.1", 0)) as silent:
        run = cli("list", "--timeout", "1", monitor=f"tcp:127.0.0.1:{silent.getsockname()[1]}", expect=4)
    assert "speaks websocket or TLS, or shares its socket (mux)" in run.err


def test_an_image_instead_of_a_socket(tmp_path: Path) -> None:
    image, text = make_boot_disk(tmp_path / "a.qcow2"), tmp_path / "text"
    text.touch()
    for path, named in ((image, "is a qcow2 image"), (text, "is a file"), (tmp_path, "is a directory")):
        run = cli("list", monitor=str(path), expect=4)
        assert f"{named}, not a monitor's socket" in run.err
