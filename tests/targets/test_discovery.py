"""The QEMUs of this machine, found without a word to their monitors: pure parts in tables, the rest on real ones.

Other QEMUs may run beside the tests. So the tests look through a /proc of their own, which shows chosen processes only.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from qsnap.host import sockets
from qsnap.monitor.address import TcpAddress, UnixAddress
from qsnap.targets.command_line import parse_arguments, qemu_arguments
from qsnap.targets.running import holder, running_vms
from qsnap.targets.vms import Holder, MonitorPoint, MonitorState, RunningVM, find, usable
from support.fake_proc import BARE, IS_ROOT, NOBODY, Machine, as_nobody, qmp
from support.guest import DEADLINE_S, QEMU, until

#: One after another: a QEMU whose socket has the same relative path makes another one's state uncertain.
pytestmark = pytest.mark.xdist_group("machine")


def parse(*arguments: str, cwd: str | None = "/vm") -> RunningVM:
    return parse_arguments(arguments, pid=1, uid=1000, user="me", cwd=cwd)


# What is a QEMU


@pytest.mark.parametrize(
    ("argv", "exe", "arguments"),
    [
        ("qemu-system-x86_64 -m 1", "", ["-m", "1"]),
        ("/usr/bin/qemu-system-aarch64", "", []),
        ("/usr/libexec/qemu-kvm -S", "", ["-S"]),
        ("/usr/bin/kvm -id 100", "", ["-id", "100"]),
        ("my-vm -S", "/usr/bin/qemu-system-x86_64", ["-S"]),
        ("my-vm -S", "/usr/bin/qemu-system-x86_64 (deleted)", ["-S"]),
        ("/t/ld-linux-x86-64.so.2 --library-path /l /t/qemu-system-x86_64 -L /s", "", ["-L", "/s"]),
        ("/t/ld-2.31.so --library-path /l /t/qemu-system-x86_64", "/t/ld-2.31.so", []),
        ("/lib/ld-musl-x86_64.so.1 --argv0 x -- /q/qemu-system-x86_64 -S", "", ["-S"]),
        ("/lib64/ld-linux-x86-64.so.2 /bin/bash -c qemu-system-x86_64", "", None),
        ("/lib64/ld-linux-x86-64.so.2", "", None),
        ("sudo qemu-system-x86_64 -S", "/usr/bin/sudo", None),
        ("bash -c qemu-system-x86_64", "/usr/bin/bash", None),
        ("timeout 60 qemu-system-x86_64", "/usr/bin/timeout", None),
        ("vim /src/qemu-system-x86_64", "/usr/bin/vim.basic", None),
        ("/bin/sh /opt/qemu-system-x86_64 -S", "/usr/bin/dash", None),
        ("qemu-img create", "/usr/bin/qemu-img", None),
        ("qemu-nbd", "", None),
        ("", "", None),
    ],
)
def test_which_processes_are_qemus(argv: str, exe: str, arguments: list[str] | None) -> None:
    assert qemu_arguments(argv.split(), exe) == arguments


# What its command line says


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["-name", "web"], "web"),
        (["--name", "web"], "web"),
        (["-name", "guest=a,,b,process=x"], "a,b"),
        (["-name", "a b,debug-threads=on"], "a b"),
        (["-name", "a,,b=c"], "a,b=c"),
        (["-name", "x=y,process=z"], None),
        (["-name", "one", "-name", "two"], "two"),
        (["-name", "one", "-name", "process=p"], "one"),
        (["-append", "-quiet", "-name", "web"], "web"),
        (["-brand-new-flag", "-name", "web"], "web"),
        (["-enable-kvm", "-name", "web"], "web"),
        (["-name"], ""),
        ([], None),
    ],
)
def test_names(arguments: list[str], name: str | None) -> None:
    assert parse(*arguments).name == name


@pytest.mark.parametrize(
    ("size", "mib"),
    [("512", 512), ("2G", 2048), ("2g", 2048), ("1.5G", 1536), ("size=512,slots=2,maxmem=4G", 512), ("0x400", 1024),
     ("0x400M", 1024), ("1T", 1 << 20), ("1048576k", 1024), ("slots=2,maxmem=1G", 128), ("", 128), ("much", 128),
     ("9" * 5000, 128), ("٣", 128), ("0", 128)],
)  # fmt: skip
def test_memory(size: str, mib: int) -> None:
    assert parse("-m", size).memory == mib << 20


def test_memory_by_default_and_of_the_last_option() -> None:
    assert parse().memory == 128 << 20
    assert parse("-m", "64", "-m", "slots=1").memory == 64 << 20


def test_memory_of_a_backend() -> None:
    for size in ("64M", "67108864"):
        backend = ("-object", f"memory-backend-ram,id=ram,size={size}", "-machine", "q35,memory-backend=ram")
        assert parse(*backend).memory == 64 << 20
    assert parse("-object", '{"qom-type":"memory-backend-ram","id":"r","size":67108864}',
                 "-M", "pc,memory-backend=r").memory == 64 << 20  # fmt: skip


def test_uuid() -> None:
    assert parse("-uuid", "A-B").uuid == "A-B"
    assert parse().uuid is None


@pytest.mark.parametrize(
    ("arguments", "disks"),
    [
        (["a.img"], ("a.img",)),
        (["-S", "a.img"], ("a.img",)),
        (["-m", "64", "a.img", "-snapshot"], ("a.img",)),
        (["-hda", "a,b.img", "-cdrom", "c.iso"], ("a,b.img", "c.iso")),
        (["-drive", "file=a,,b.img,if=virtio"], ("a,b.img",)),
        (["-drive", "if=none,id=cd0"], ("cd0",)),
        (["-drive", "driver=qcow2,file.filename=a.img"], ("a.img",)),
        (["-blockdev", "driver=qcow2,node-name=d,file.driver=file,file.filename=a.img"], ("a.img",)),
        (["-blockdev", '{"driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": "a,b"}}'],
         ("a,b",)),
        (["-blockdev", "file,node-name=f,filename=a.img", "-blockdev", "qcow2,node-name=d,file=f"], ("a.img",)),
        (["-blockdev", "null-co,node-name=n"], ("n",)),
        (["-blockdev", "{broken"], ()),
    ],
)  # fmt: skip
def test_disks(arguments: list[str], disks: tuple[str, ...]) -> None:
    assert parse(*arguments).disks == disks


CHARDEV = ("-chardev", "socket,id=c,path=/run/c,server=on,wait=off")


@pytest.mark.parametrize(
    ("arguments", "protocol", "where"),
    [
        (["-qmp", "unix:/run/q,server=on,wait=off"], "qmp", UnixAddress("/run/q")),
        (["--qmp", "unix:/run/q,server,nowait"], "qmp", UnixAddress("/run/q")),
        (["-qmp-pretty", "unix:/run/a,,b,server"], "qmp", UnixAddress("/run/a,b")),
        (["-monitor", "unix:m,server,nowait"], "hmp", UnixAddress("/vm/m")),
        (["-monitor", "tcp:127.0.0.1:4444,server"], "hmp", TcpAddress("127.0.0.1", 4444)),
        (["-qmp", "tcp::4444,server=on"], "qmp", TcpAddress("localhost", 4444)),
        (["-qmp", "tcp:[::1]:4444,server"], "qmp", TcpAddress("::1", 4444)),
        ([*CHARDEV, "-mon", "c"], "hmp", UnixAddress("/run/c")),
        (["-mon", "chardev=c,mode=control,pretty=on", *CHARDEV], "qmp", UnixAddress("/run/c")),
        ([*CHARDEV, "-mon", "chardev=c,mode=readline"], "hmp", UnixAddress("/run/c")),
        ([*CHARDEV, "-qmp", "chardev:c"], "qmp", UnixAddress("/run/c")),
        (["-chardev", "socket,id=c,host=::1,port=4444,server", "-qmp", "chardev:c"], "qmp", TcpAddress("::1", 4444)),
        (["-qmp", "unix:/run/q"], "qmp", "as its client"),
        (["-qmp", "unix:/run/q,server=off"], "qmp", "as its client"),
        (["-qmp", "unix:,server"], "qmp", "without a path"),
        (["-qmp", "unix:/run/q,server,abstract=on"], "qmp", "abstract"),
        (["-qmp", "tcp:localhost:http,server"], "qmp", "not a number"),
        (["-qmp", "tcp:localhost"], "qmp", "'tcp'"),
        (["-chardev", "socket,id=c,fd=5,server=on", "-mon", "c"], "hmp", "was given"),
        (["-chardev", "socket,id=c,path=/c,server=on,mux=on", "-mon", "c"], "hmp", "mux"),
        (["-chardev", "socket,id=c,host=,port=1,server=on,tls-creds=t", "-mon", "c"], "hmp", "speaks tls"),
        (["-monitor", "telnet:localhost:44,server"], "hmp", TcpAddress("localhost", 44)),
        (["-monitor", "stdio"], "hmp", "terminal"),
        (["-monitor", "pty"], "hmp", "pseudo-terminal"),
        (["-monitor", "vc:80Cx24C"], "hmp", "window"),
        (["-qmp", "null"], "qmp", "nothing"),
        (["-qmp", "file:/tmp/x"], "qmp", "to a file"),
        (["-mon", "chardev=lost"], "hmp", "'lost'"),
        (["-serial", "mon:stdio"], "hmp", "terminal"),
        (["-serial", "mon:mon:unix:/s,server"], "hmp", "mux"),
        (["-nographic"], "hmp", "terminal"),
        (["disk.img"], "hmp", "window"),
    ],
)
def test_monitors(arguments: list[str], protocol: str, where: object) -> None:
    (monitor,) = parse(*arguments).monitors
    assert monitor.protocol == protocol
    if isinstance(where, str):
        assert where in monitor.reason
        assert monitor.state == "unusable"
    else:
        assert (monitor.address, monitor.state, monitor.reason) == (where, "unknown", "")


@pytest.mark.parametrize(
    "arguments",
    [["-monitor", "none"], ["-nodefaults"], ["-display", "none"], ["-daemonize"], ["-nographic", "-monitor", "none"]],
)
def test_no_monitor_at_all(arguments: list[str]) -> None:
    assert parse(*arguments).monitors == ()


def test_the_monitors_keep_their_order() -> None:
    vm = parse("-monitor", "unix:/h,server", "-qmp", "unix:/q,server", "-serial", "null")
    assert [str(monitor.address) for monitor in vm.monitors] == ["unix:/h", "unix:/q"]


def test_a_relative_path_without_a_directory() -> None:
    vm = parse("-qmp", "unix:q,server", "-qmp", "unix:/q,server", cwd=None)
    assert [monitor.state for monitor in vm.monitors] == ["unusable", "unknown"]
    assert "cannot be seen" in vm.monitors[0].reason


LIBVIRT_KEY = "/var/lib/libvirt/qemu/domain-1-web/master-key.aes"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-object", json.dumps({"qom-type": "secret", "id": "masterKey0", "format": "raw", "file": LIBVIRT_KEY})],
        ["-object", f"secret,id=masterKey0,format=raw,file={LIBVIRT_KEY}"],
        ["-chardev", "socket,id=charmonitor,path=/var/lib/libvirt/qemu/domain-1-web/monitor.sock,server,nowait"],
        ["-chardev", "socket,id=charmonitor,fd=24,server=on,wait=off"],
    ],
)
def test_libvirts_own(arguments: list[str]) -> None:
    vm = parse(*arguments, "-mon", "chardev=charmonitor,mode=control", "-qmp", "unix:/run/mine,server=on,wait=off")
    assert vm.managed_by == "libvirt"
    if "-chardev" in arguments:
        assert vm.monitors[0].state == "unusable"
        assert "libvirtd" in vm.monitors[0].reason
    assert vm.monitors[1].address == UnixAddress("/run/mine")
    assert parse("-object", "secret,id=s,file=/home/me/key").managed_by is None


def test_arguments_never_raise() -> None:
    words = [
        "-qmp", "-monitor", "-mon", "-chardev", "-name", "-m", "-drive", "-blockdev", "-object", "-serial", "-uuid",
        "--", "-", "", ",", ",,", "=", "{", "{}", '{"a":' * 2000, "[" * 5000, "unix:", "tcp:", "tcp::", "mon:" * 3000,
        "chardev:", "socket,id=c", "socket,id=c,server,path=,", "c", "guest=", "no", "=,=", "\udcff", "\0", "9" * 5000,
        "٣", "1e999", "0x", "tcp::99999,server", "unix:\0,server", '{"id":[1,{"x":null}]}', "fd=1", "stdio",
        "-nographic",
    ]  # fmt: skip
    chance = random.Random(20)  # noqa: S311 (the same each time)
    for _ in range(5000):
        arguments = [
            "".join(chance.choices(words, k=chance.randint(1, 3))) if chance.random() < 0.3 else chance.choice(words)
            for _ in range(chance.randint(0, 12))
        ]
        for cwd in ("/vm", None):
            vm = parse_arguments(arguments, pid=1, uid=1, user="u", cwd=cwd)
            assert vm.to_json()["pid"] == 1
            usable(vm)
        qemu_arguments(arguments)


# Which one to take


def point(protocol: str, state: str) -> MonitorPoint:
    address = None if state == "unusable" else UnixAddress(f"/{protocol}-{state}")
    return MonitorPoint(protocol=protocol, state=MonitorState(state), address=address)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "best"),
    [
        ("hmp-free qmp-free", "/qmp-free"),
        ("qmp-busy hmp-free", "/hmp-free"),
        ("qmp-unknown hmp-free", "/hmp-free"),
        ("hmp-unknown qmp-unknown", "/qmp-unknown"),
        ("qmp-busy qmp-gone qmp-forbidden qmp-unusable", None),
        ("", None),
    ],
)
def test_the_best_monitor(given: str, best: str | None) -> None:
    monitors = tuple(point(*name.split("-")) for name in given.split())
    found = usable(msgspec.structs.replace(parse(), monitors=monitors))
    assert (found.address if found else None) == (UnixAddress(best) if best else None)


def test_finding() -> None:
    def vm(pid: int, name: str | None, uuid: str | None = None) -> RunningVM:
        return RunningVM(pid=pid, uid=0, user="root", name=name, uuid=uuid)

    vms = [vm(7, "web"), vm(8, "web"), vm(9, "7"), vm(10, None, "aB-1"), vm(11, None)]
    wanted = {"web": [7, 8], "7": [9], "8": [8], "Ab-1": [10], "10": [10], "we": [], "": [], "None": []}
    assert {text: [found.pid for found in find(vms, text)] for text in wanted} == wanted


def test_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert parse().is_ours
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert not parse().is_ours


def test_as_json() -> None:
    vm = msgspec.structs.replace(
        parse("-name", "web", "-qmp", "unix:/q,server", "-monitor", "stdio"),
        pid=5,
    )
    document = json.loads(json.dumps(vm.to_json()))
    assert (document["name"], document["pid"]) == ("web", 5)
    assert [(row["address"], row["state"]) for row in document["monitors"]] == [
        ("unix:/q", "unknown"), (None, "unusable"),
    ]  # fmt: skip


# Real ones


def only() -> RunningVM:
    """The one VM there is."""
    (vm,) = running_vms()
    return vm


def states() -> list[str]:
    return [str(monitor.state) for monitor in only().monitors]


def greeting(address: object) -> bytes:
    """What a monitor says first."""
    assert isinstance(address, UnixAddress)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(address.path)
        return client.recv(100)


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_however_many_there_are(machine: Machine, count: int) -> None:
    paths = [machine.directory / f"q{number}" for number in range(count)]
    started = [machine.launch(QEMU, *BARE, "-name", path.name, *qmp(path)) for path in paths]
    until("all monitors", lambda: all(machine._listens(process.pid) for process in started), 90)
    vms = running_vms()
    assert [vm.pid for vm in vms] == sorted(process.pid for process in started)
    assert {vm.name: vm.pid for vm in vms} == {
        path.name: process.pid for path, process in zip(paths, started, strict=True)
    }
    for vm in vms:
        best = usable(vm)
        assert best == MonitorPoint(
            protocol="qmp", address=UnixAddress(f"{machine.directory}/{vm.name}"), state=MonitorState.FREE
        )
        assert vm.is_ours
        assert vm.managed_by is None


def test_looking_disturbs_nobody(machine: Machine) -> None:
    machine.start(*qmp("q"))
    for _ in range(3):
        vm = only()
    best = usable(vm)
    assert best
    assert b'"QMP"' in greeting(best.address)


def test_odd_paths_memory_and_uuid(machine: Machine) -> None:
    path = machine.directory / "a b,c d é"
    uuid = "00000000-aBcd-0000-0000-000000000000"
    machine.start("-name", "guest=web,debug-threads=on", *qmp(path), "-m", "64", "-uuid", uuid)
    vm = only()
    assert (vm.name, vm.memory) == ("web", 64 << 20)
    assert [monitor.address for monitor in vm.monitors] == [UnixAddress(str(path))]
    assert states() == ["free"]
    assert find([vm], uuid.upper()) == (vm,)


def test_a_name_with_commas_and_spaces(machine: Machine) -> None:
    pid = machine.start("-name", "a,,b c", *qmp("q"))
    assert only().name == "a,b c"
    assert [vm.pid for vm in find(running_vms(), "a,b c")] == [pid]
    assert [vm.pid for vm in find(running_vms(), str(pid))] == [pid]


def test_a_socket_file_that_was_removed(machine: Machine) -> None:
    path = machine.directory / "q"
    machine.start(*qmp(path))
    path.unlink()
    assert states() == ["gone"]
    assert usable(only()) is None
    path.write_text("")
    assert states() == ["gone"]


def test_another_client(machine: Machine) -> None:
    path = machine.directory / "q"
    machine.start(*qmp("q"))
    assert holder(str(path)) is None
    client = machine.connect(path)
    (monitor,) = only().monitors
    assert monitor.state == "busy"
    assert monitor.holder
    assert monitor.holder.pid == client.pid
    assert str(path) in monitor.holder.command
    assert holder(str(path)) == monitor.holder
    assert usable(only()) is None
    machine.end(client)
    until("a free monitor", lambda: states() == ["free"])
    assert holder(str(path)) is None


def test_ourselves_as_the_client(machine: Machine) -> None:
    machine.start(*qmp("q"))
    path = str(machine.directory / "q")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(path)
        assert client.recv(1)
        (monitor,) = only().monitors
        assert monitor.holder
        assert monitor.holder.pid == os.getpid()
        assert holder(path) is None


def test_who_waits_behind_us(machine: Machine) -> None:
    """As an error says "another client holds it" while our own connection waits in the queue, and the other way."""
    machine.start(*qmp("q"))
    path = str(machine.directory / "q")
    first = machine.connect(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(path)
        found = holder(path)
    assert found
    assert found.pid == first.pid


def test_a_client_of_a_qemu_that_is_stopped(machine: Machine) -> None:
    pid = machine.start(*qmp("q"))
    os.kill(pid, signal.SIGSTOP)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(machine.directory / "q"))
            (monitor,) = only().monitors
            assert monitor.state == "busy"
            assert monitor.holder
            assert monitor.holder.pid == os.getpid()
    finally:
        os.kill(pid, signal.SIGCONT)


def test_both_protocols(machine: Machine) -> None:
    machine.start("-monitor", "unix:h,server=on,wait=off", *qmp("q"))
    assert [(monitor.protocol, monitor.state) for monitor in only().monitors] == [("hmp", "free"), ("qmp", "free")]
    best = usable(only())
    assert best
    assert best.protocol == "qmp"
    machine.connect(machine.directory / "q")
    best = usable(only())
    assert best
    assert best.protocol == "hmp"
    assert b"QEMU" in greeting(best.address)


def test_chardevs(machine: Machine) -> None:
    machine.start(
        "-chardev", "socket,id=one,path=1,server=on,wait=off", "-mon", "chardev=one,mode=control",
        "-chardev", "socket,id=two,path=2,server=on,wait=off", "-mon", "two",
        "-chardev", "socket,id=port,host=localhost,port=0,server=on,wait=off", "-mon", "port",
    )  # fmt: skip
    assert [(monitor.protocol, monitor.state) for monitor in only().monitors] == [
        ("qmp", "free"), ("hmp", "free"), ("hmp", "unusable"),
    ]  # fmt: skip


def test_a_monitor_over_tcp(machine: Machine) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machine.start("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
    best = usable(only())
    assert best == MonitorPoint(protocol="qmp", address=TcpAddress("127.0.0.1", port))


def test_two_qemus_at_one_path(machine: Machine) -> None:
    """The second takes the path from the first, which goes on listening where nobody can come."""
    first = machine.start(*qmp(machine.directory / "q"))
    second = machine.start(*qmp("q"))
    assert {vm.pid: vm.monitors[0].state for vm in running_vms()} == {first: "gone", second: "free"}
    machine.connect(machine.directory / "q")
    assert {vm.pid: vm.monitors[0].state for vm in running_vms()} == {first: "gone", second: "busy"}


def test_a_qemu_behind_another_command(machine: Machine) -> None:
    outer = machine.launch("timeout", "60", QEMU, *BARE, *qmp("q"))

    def child() -> int | None:
        pids = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        return int(pids[0]) if pids else None

    inner = until("QEMU", child)
    machine.end_by_pid(inner)
    machine.show(inner)
    until("its monitor", lambda: machine._listens(inner))
    assert only().pid == inner


def test_one_that_went_into_the_background(machine: Machine) -> None:
    """Its directory is "/" then, and the socket is where it was started."""
    pid = machine.daemonize(*qmp("q"))
    vm = only()
    assert vm.pid == pid
    assert [(monitor.address, monitor.state) for monitor in vm.monitors] == [
        (UnixAddress(f"{machine.directory}/q"), "free")
    ]


def test_arguments_as_libvirt_gives_them(machine: Machine) -> None:
    key = machine.directory / "key"
    key.write_bytes(base64.b64encode(bytes(32)))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(machine.directory / "monitor.sock"))
        listener.listen(1)
        machine.start(
            "-object", f"secret,id=masterKey0,format=base64,file={key}",
            "-chardev", f"socket,id=charmonitor,fd={listener.fileno()},server=on,wait=off",
            "-mon", "chardev=charmonitor,id=monitor,mode=control",
            *qmp("mine"),
            pass_fds=(listener.fileno(),),
        )  # fmt: skip
    vm = only()
    assert vm.managed_by == "libvirt"
    assert [monitor.state for monitor in vm.monitors] == ["unusable", "free"]
    best = usable(vm)
    assert best
    assert best.address == UnixAddress(f"{machine.directory}/mine")


def test_a_socket_that_we_may_not_open(machine: Machine) -> None:
    path = machine.directory / "q"
    machine.start(*qmp(path))
    path.chmod(0o500)
    with as_nobody():
        assert states() == ["forbidden"]
    machine.directory.chmod(0o711)
    path.chmod(0o777)
    with as_nobody():
        assert states() == ["free"]


@pytest.mark.skipif(not IS_ROOT, reason="only root may start a QEMU as another user")
def test_another_users(machine: Machine) -> None:
    machine.start(*qmp(machine.directory / "q"), user=NOBODY, group=NOBODY, extra_groups=[])
    vm = only()
    assert (vm.uid, vm.user, vm.is_ours) == (NOBODY, "nobody", False)
    assert [monitor.state for monitor in vm.monitors] == ["free"]


@pytest.mark.skipif(not IS_ROOT, reason="only root may see nothing of its own QEMU's descriptors")
def test_what_another_user_sees(machine: Machine) -> None:
    machine.start(*qmp(machine.directory / "q"), *qmp("relative"))
    (machine.directory / "q").chmod(0o777)
    with as_nobody():
        vm = only()
        assert not vm.is_ours
        assert [monitor.state for monitor in vm.monitors] == ["free", "unusable"]
    machine.connect(machine.directory / "q")
    with as_nobody():
        (monitor, _) = only().monitors
        assert (monitor.state, monitor.holder) == ("busy", None)


def may(*command: str) -> bool:
    """Whether a command works here."""
    try:
        return subprocess.run(command, capture_output=True, timeout=DEADLINE_S).returncode == 0
    except FileNotFoundError:
        return False


def test_another_network(machine: Machine) -> None:
    if not may("unshare", "-n", "true"):
        pytest.skip("no new network namespaces here")
    # A name of its own: there the kernel does not tell which file a socket is, and other tests' QEMUs have a "q", too
    machine.start(*qmp("far"), "-qmp", "tcp::4444,server=on,wait=off", prefix=("unshare", "-n"))
    assert states() == ["free", "unusable"]
    machine.connect(machine.directory / "far")
    assert states() == ["busy", "unusable"]


def test_a_container(machine: Machine) -> None:
    inside = machine.directory / "inside"
    inside.mkdir()
    if not may("unshare", "-m", "mount", "-t", "tmpfs", "none", str(inside)):
        pytest.skip("no new mount namespaces here")
    script = f'mount -t tmpfs none {inside} && exec "$@"'
    pid = machine.start(*qmp(inside / "q"), prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    assert not (inside / "q").exists()
    best = usable(only())
    assert best
    assert best.address == UnixAddress(f"{machine.proc}/{pid}/root{inside}/q")
    assert b'"QMP"' in greeting(best.address)
    client = machine.connect(best.address.path)
    assert holder(best.address.path) == Holder(pid=client.pid, command=shlex.join(psutil.Process(client.pid).cmdline()))


def refused() -> None:
    """What from_netlink says in a sandbox."""


def other_devices(original: Callable[[], list[sockets.Socket] | None]) -> list[sockets.Socket]:
    """What it says where socket files are on btrfs or overlayfs: device numbers that stat does not give."""
    return [row._replace(file=row.file and (0, row.file[1])) for row in original() or ()]


@pytest.mark.parametrize(("kind", "of_second"), [("refused", "unknown"), ("other devices", "free")])
def test_less_information(machine: Machine, monkeypatch: pytest.MonkeyPatch, kind: str, of_second: str) -> None:
    original = sockets.from_netlink
    told = refused if kind == "refused" else lambda: other_devices(original)
    monkeypatch.setattr(sockets, "from_netlink", told)
    path = machine.directory / f"less-{os.getpid()}"
    first = machine.start(*qmp(path))
    assert states() == ["free"]
    client = machine.connect(path)
    assert states() == ["busy"]
    assert (holder(str(path)) is None) == (kind == "refused")
    machine.end(client)
    until("a free monitor", lambda: states() == ["free"])
    second = machine.start(*qmp(path))
    assert {vm.pid: vm.monitors[0].state for vm in running_vms()} == {first: "unknown", second: of_second}
    path.unlink()
    assert {vm.pid: vm.monitors[0].state for vm in running_vms()} == {first: "gone", second: "gone"}


def test_processes_that_vanish(machine: Machine) -> None:
    """They end between the listing and the look, at any moment: here as links to nothing, or to a zombie."""
    (machine.proc / "999999999").symlink_to("/proc/999999999")
    process = machine.launch(QEMU, "--version")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert running_vms() == ()


def test_on_the_real_proc(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = machine.start(*qmp("q"))
    client = machine.connect(machine.directory / "q")
    monkeypatch.setattr(psutil, "PROCFS_PATH", "/proc")
    (vm,) = find(running_vms(), str(pid))
    assert vm.monitors[0].holder
    assert vm.monitors[0].holder.pid == client.pid


def test_psutil_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys, qsnap.targets.running; sys.exit('psutil' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S).returncode == 0
