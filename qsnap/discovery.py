"""The QEMUs that run on this machine: their names, their monitors, and who holds a monitor that is taken.

Nothing is connected to, as a monitor serves one client at a time. What it rests on:

* The command line (proc(5): cmdline) names the monitors. It is read as QEMU's own ``lookup_opt``, ``qemu_opts_parse``
  and ``qemu_chr_parse_compat`` do; what a ``-readconfig`` file or a later ``chardev-add`` says is not seen.
* An accepted Unix socket carries the path that its listener was bound to, spelled the same. Those in QEMU's own
  descriptors are its clients; so two QEMUs which bound one path, one after the other, are told apart.
* unix_diag (sock_diag(7)) tells the other end of a connection, and the file that a listener was bound to. Where it is
  refused, /proc/net/unix serves, which tells neither.

All is read below ``psutil.PROCFS_PATH``. Processes that end meanwhile, or may not be read, are passed over.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from qsnap.model import Struct
from qsnap.monitor.address import Address, TcpAddress, UnixAddress

if TYPE_CHECKING:
    import psutil

DEFAULT_MEMORY = 128 << 20
"""Bytes of RAM where no ``-m`` says: QEMU's default for most machines (hw/core/machine.c)."""


class MonitorState(StrEnum):
    """Whether a monitor would serve a client now."""

    FREE = "free"
    BUSY = "busy"
    """A client is connected, or waits to be."""
    GONE = "gone"
    """There is no such socket file, or QEMU does not listen on it."""
    FORBIDDEN = "forbidden"
    """This user may not write to the socket file."""
    UNKNOWN = "unknown"
    """It cannot be seen without connecting: TCP, or another's process."""
    UNUSABLE = "unusable"
    """It is no socket that qsnap could open; ``reason`` says why."""


class Holder(Struct, frozen=True):
    """A process that holds a connection to a monitor."""

    pid: int
    command: str
    """Its command line, quoted for a shell."""


class MonitorPoint(Struct, frozen=True):
    """One monitor of a QEMU."""

    protocol: Literal["qmp", "hmp"]
    address: Address | None = None
    """Where to connect; None where it is no socket."""
    state: MonitorState = MonitorState.UNKNOWN
    reason: str = ""
    """Why it is unusable, as the rest of a sentence about the monitor; "" for all other states."""
    holder: Holder | None = None
    """Of a busy one, where visible."""

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "address": str(self.address) if self.address else None}


class RunningVM(Struct, frozen=True):
    """A QEMU process, as its command line describes it."""

    pid: int
    uid: int
    """The effective user id."""
    user: str
    """That user's name; the number where it has none."""
    name: str | None = None
    """``-name``."""
    uuid: str | None = None
    """``-uuid``, as it was written."""
    memory: int = DEFAULT_MEMORY
    """Bytes of RAM at the start."""
    disks: tuple[str, ...] = ()
    """The file of each disk as it was written; of one without a file its node-name, id or driver."""
    monitors: tuple[MonitorPoint, ...] = ()
    managed_by: str | None = None
    """"libvirt", or None: the monitor that libvirt made for itself is then unusable for others."""

    @property
    def is_ours(self) -> bool:
        """Whether it runs as the user that we are."""
        return self.uid == os.geteuid()

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "monitors": [monitor.to_json() for monitor in self.monitors]}


def usable(vm: RunningVM) -> MonitorPoint | None:
    """The best monitor to connect to: a free one before one whose state is unknown, and then QMP before HMP."""
    order = [(state, protocol) for state in (MonitorState.FREE, MonitorState.UNKNOWN) for protocol in ("qmp", "hmp")]
    good = [monitor for monitor in vm.monitors if monitor.address and (monitor.state, monitor.protocol) in order]
    return min(good, key=lambda monitor: order.index((monitor.state, monitor.protocol)), default=None)


def find(vms: Iterable[RunningVM], wanted: str) -> tuple[RunningVM, ...]:
    """The VMs that *wanted* means: those of that exact name, else of that pid, else of that UUID in any case.

    :return: all of them, as several may have one name; none if there is none.
    """
    candidates = tuple(vms)
    for matches in (
        lambda vm: vm.name == wanted,
        lambda vm: str(vm.pid) == wanted,
        lambda vm: vm.uuid is not None and vm.uuid.lower() == wanted.lower(),
    ):
        if found := tuple(vm for vm in candidates if matches(vm)):
            return found
    return ()


def running_vms() -> tuple[RunningVM, ...]:
    """All QEMUs of this machine that this process may see, by pid; other users' too, see :attr:`RunningVM.is_ours`."""
    import psutil

    machine = _Machine(psutil.PROCFS_PATH)
    seen = [look for pid in sorted(psutil.pids()) if (look := _look(machine, pid))]
    owners = machine.owners(inode for _, clients in seen for inodes in clients for inode in inodes)
    return tuple(
        msgspec.structs.replace(
            vm,
            monitors=tuple(
                msgspec.structs.replace(monitor, holder=_holder(owners, inodes, but={vm.pid}))
                for monitor, inodes in zip(vm.monitors, clients, strict=True)
            ),
        )
        for vm, clients in seen
    )


def holder(path: str) -> Holder | None:
    """Who is connected to the monitor socket at *path*, or next in line for it, other than its QEMU and ourselves.

    :return: None where nobody is, and where the system does not show it.
    """
    import psutil

    machine = _Machine(psutil.PROCFS_PATH)
    try:
        file = _file(os.stat(path))
    except OSError:
        return None
    sockets = _from_netlink() or ()
    names = (path, os.path.abspath(path), os.path.realpath(path))
    ends = [socket for socket in sockets if socket.file == file] or [s for s in sockets if s.path in names]
    clients = _clients(ends)
    accepted = [socket.inode for socket in ends if not socket.listens]
    owners = machine.owners([*clients, *accepted])
    return _holder(owners, clients, but={os.getpid(), *(pid for inode in accepted for pid in owners.get(inode, ()))})


# The command line. All of this is pure.

_PROGRAM = re.compile(r"qemu-system-[\w.+-]+|qemu-kvm|kvm")
_LOADER = re.compile(r"ld-(linux|musl).*|ld-.*\.so|ld\.so|ld64\.so.*")
#: The options of ld.so(8) and musl's loader that take a value.
_LOADER_VALUES = frozenset(
    ("--library-path", "--inhibit-rpath", "--audit", "--preload", "--argv0", "--glibc-hwcaps-mask",
     "--glibc-hwcaps-prepend")
)  # fmt: skip
#: The options of QEMU that take no value: those of 5.2 to 11.1, and older ones (qemu-options.def).
_FLAGS = frozenset((
    "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize", "enable-fips", "enable-hax",
    "enable-kvm", "enable-sync-profile", "full-screen", "h", "help", "jitdump", "mem-prealloc", "no-acpi",
    "no-fd-bootchk", "no-frame", "no-hpet", "no-kvm", "no-kvm-irqchip", "no-kvm-pit", "no-kvm-pit-reinjection",
    "no-quit", "no-reboot", "no-shutdown", "no-user-config", "nodefaults", "nodefconfig", "nographic", "old-param",
    "only-migratable", "perfmap", "portrait", "preconfig", "s", "S", "sdl", "semihosting", "show-cursor",
    "singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach", "xen-create", "xen-domid-restrict",
))  # fmt: skip
_DISKS = frozenset(("hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "sd", "mtdblock", "pflash"))
_MONITORS = frozenset(("qmp", "qmp-pretty", "monitor", "mon"))
_OURS = _DISKS | _MONITORS | {"name", "uuid", "m", "drive", "blockdev", "chardev", "object", "serial", "display"}
_Chardevs = Mapping[str, dict[str, str]]
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,18})?|0[xX][0-9a-fA-F]{1,15})([bBkKmMgGtTpPeE]?)")
_NO_SOCKET = {
    "stdio": "is on QEMU's own terminal",
    "pty": "is on a pseudo-terminal",
    "vc": "is in QEMU's window",
    "null": "is connected to nothing",
    "none": "is connected to nothing",
}


def qemu_arguments(argv: Sequence[str], exe: str = "") -> Sequence[str] | None:
    """What follows QEMU's own name in a process's arguments; None for a process that is no QEMU.

    :param exe: the file that the process runs, "" if that is not known.
    """
    if not argv:
        return None
    if _is_qemu(argv[0]) or _is_qemu(exe.removesuffix(" (deleted)")):
        return argv[1:]
    if _LOADER.fullmatch(os.path.basename(argv[0])):
        at = 1
        while at < len(argv) and argv[at].startswith("-"):
            at += 2 if argv[at] in _LOADER_VALUES else 1
        if at < len(argv) and _is_qemu(argv[at]):
            return argv[at + 1 :]
    return None


def _is_qemu(program: str) -> bool:
    return bool(_PROGRAM.fullmatch(os.path.basename(program)))


def parse_arguments(arguments: Sequence[str], *, pid: int, uid: int, user: str, cwd: str | None) -> RunningVM:
    """The VM that QEMU's *arguments* describe; anything that makes no sense is passed over.

    :param arguments: without the program's name.
    :param cwd: QEMU's working directory, to which relative socket paths are resolved; None if it is not known.
    :return: with monitors that are ``unknown`` or ``unusable``: nothing was looked at.
    """
    given = list(_split(arguments))
    objects = [_options(value, "qom-type") for option, value in given if option == "object"]
    chardevs = {found.get("id", ""): found for option, value in given if option == "chardev"
                for found in [_options(value, "backend")]}  # fmt: skip
    uuids = [value for option, value in given if option == "uuid"]
    is_libvirts = _is_libvirts(objects, chardevs)
    return RunningVM(
        pid=pid,
        uid=uid,
        user=user,
        name=_merged(given, "name", "guest").get("guest"),
        uuid=uuids[-1] if uuids else None,
        memory=_memory(_merged(given, "m", "size").get("size", "")),
        disks=tuple(disk for option, value in given if (disk := _disk(option, value))),
        monitors=tuple(_monitors(given, chardevs, cwd, is_libvirts=is_libvirts)),
        managed_by="libvirt" if is_libvirts else None,
    )


def _split(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, value) pairs. A word without an option is a disk, as in QEMU."""
    at = 0
    while at < len(arguments):
        word = arguments[at]
        at += 1
        if not word.startswith("-") or word == "-":
            yield "hda", word
            continue
        option = _option(word)
        if option in _FLAGS or at == len(arguments):
            yield option, ""
            continue
        # A flag that is newer than the list must not swallow an option that counts.
        if option not in _OURS and arguments[at].startswith("-") and _option(arguments[at]) in _OURS:
            yield option, ""
            continue
        yield option, arguments[at]
        at += 1


def _option(word: str) -> str:
    return word.removeprefix("-").removeprefix("-")


def _options(text: str, implied: str) -> dict[str, str]:
    """QEMU's ``value,key=value,flag,noflag``, where a comma inside a value is doubled; or the same as JSON.

    :param implied: the key of a first value without one.
    """
    if text.startswith("{"):
        return _from_json(text)
    found = {}
    for number, field in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = (part.replace("\0", ",") for part in field.partition("="))
        if equals and "\0" not in field.partition("=")[0]:
            found[key] = value
        elif number == 0 and implied:
            found[implied] = field.replace("\0", ",")
        elif key.startswith("no"):
            found[key[2:]] = "off"
        else:
            found[key] = "on"
    return found


def _from_json(text: str) -> dict[str, str]:
    """A JSON object, flattened: ``{"file": {"filename": "x"}}`` is ``file.filename=x``."""
    found: dict[str, str] = {}

    def add(key: str, value: object) -> None:
        if isinstance(value, dict):
            for inner, below in value.items():
                add(f"{key}.{inner}" if key else str(inner), below)
        elif isinstance(value, bool):
            found[key] = "on" if value else "off"
        else:
            found[key] = str(value)

    try:
        add("", msgspec.json.decode(text.encode(errors="surrogateescape")))
    except (ValueError, msgspec.DecodeError, RecursionError):
        return {}
    return found


def _merged(given: Sequence[tuple[str, str]], wanted: str, implied: str) -> dict[str, str]:
    """An option that QEMU merges where it is given more than once."""
    merged: dict[str, str] = {}
    for option, value in given:
        if option == wanted:
            merged |= _options(value, implied)
    return merged


def _memory(size: str) -> int:
    """Bytes: ``2G`` is 2 GiB, and a plain number counts MiB."""
    match = _SIZE.fullmatch(size)
    if not match:
        return DEFAULT_MEMORY
    digits, suffix = match.groups()
    # In hexadecimal, "b" and "e" are digits.
    number = int(digits, 16) if digits[:2] in ("0x", "0X") else float(digits)
    return int(number * 1024 ** "bkmgtpe".index(suffix.lower() or "m")) or DEFAULT_MEMORY


def _disk(option: str, value: str) -> str:
    """What to call the disk of an option; "" where it is none, or the file is another option's."""
    if option in _DISKS:
        return value
    if option == "drive":
        found = _options(value, "")
        return found.get("file") or found.get("file.filename") or found.get("id", "")
    if option == "blockdev":
        found = _options(value, "driver")
        files = [found[key] for key in found if key.rpartition(".")[2] == "filename"]
        if files or "file" in found:
            return files[0] if files else ""
        return found.get("node-name") or found.get("driver", "")
    return ""


def _is_libvirts(objects: Sequence[Mapping[str, str]], chardevs: _Chardevs) -> bool:
    own = chardevs.get("charmonitor", {})
    return (
        any("libvirt/qemu/" in found.get("file", "") for found in objects)
        or "fd" in own
        or "libvirt/qemu/" in own.get("path", "")
    )


def _monitors(
    given: Sequence[tuple[str, str]], chardevs: _Chardevs, cwd: str | None, *, is_libvirts: bool
) -> Iterator[MonitorPoint]:
    """The monitors in the order of the command line; without any, the one that QEMU makes by itself."""
    makes_its_own = True
    for option, value in given:
        protocol: Literal["qmp", "hmp"] = "qmp" if option.startswith("qmp") else "hmp"
        if option == "serial" and value.startswith("mon:"):
            device = _compat(value)
        elif option == "mon":
            mon = _options(value, "chardev")
            protocol = "qmp" if mon.get("mode") == "control" else "hmp"
            device = _chardev(mon.get("chardev", ""), chardevs)
        elif option in _MONITORS and not (option == "monitor" and value.startswith("none")):
            device = _chardev(value[8:], chardevs) if value.startswith("chardev:") else _compat(value)
        else:
            makes_its_own &= option not in ("nodefaults", "monitor")
            continue
        makes_its_own = False
        if is_libvirts and device.get("id") == "charmonitor":
            yield MonitorPoint(protocol=protocol, state=MonitorState.UNUSABLE, reason="belongs to libvirtd")
        else:
            yield _point(protocol, device, cwd)
    if makes_its_own and ("nographic", "") in given:
        yield _point("hmp", {"backend": "stdio"}, cwd)
    elif makes_its_own and ("daemonize", "") not in given and ("display", "none") not in given:
        yield _point("hmp", {"backend": "vc"}, cwd)


def _chardev(wanted: str, chardevs: _Chardevs) -> dict[str, str]:
    return chardevs.get(wanted, {"backend": "missing", "id": wanted})


def _compat(text: str) -> dict[str, str]:
    """The options of a -chardev that is written the short way, as after -qmp."""
    kind, _, rest = text.partition(":")
    if kind == "mon":
        # Once is enough, and a row of them must not become a row of calls.
        return {**_compat(re.sub(r"^(mon:)+", "", text)), "mux": "on"}
    if kind == "unix":
        return {"backend": "socket", **_options(rest, "path")}
    if kind in ("tcp", "telnet", "tn3270", "websocket"):
        match = re.match(r"(\[[^\]]*\]|[^:,]*):([^,]*),?", rest)
        if match:
            more = _options(rest[match.end() :], "")
            speaks = {} if kind == "tcp" else {kind: "on"}
            return {"backend": "socket", "host": match[1], "port": match[2], **speaks, **more}
    return {"backend": re.split("[:,]", text)[0]}


def _point(protocol: Literal["qmp", "hmp"], device: Mapping[str, str], cwd: str | None) -> MonitorPoint:
    address, reason = _address(device, cwd)
    state = MonitorState.UNUSABLE if reason else MonitorState.UNKNOWN
    return MonitorPoint(protocol=protocol, address=address, state=state, reason=reason)


def _address(device: Mapping[str, str], cwd: str | None) -> tuple[Address | None, str]:
    """Where a chardev listens, or why qsnap cannot connect to it."""
    backend = device.get("backend", "")
    reason = ""
    if backend == "missing":
        reason = f"is on chardev {device['id']!r}, which the command line does not define"
    elif backend != "socket":
        reason = _NO_SOCKET.get(backend, f"is on a device of kind {backend!r}, and not on a socket")
    elif "fd" in device:
        reason = "is on a socket that was passed to QEMU, and belongs to whoever made it"
    elif not _is_on(device, "server"):
        reason = "is a connection that QEMU has made, as its client, to another program"
    elif _is_on(device, "mux"):
        reason = "shares its socket with other devices (mux)"
    elif _is_on(device, "abstract"):
        reason = "is on an abstract socket"
    elif spoken := [word for word in ("telnet", "tn3270", "websocket", "tls-creds") if _is_on(device, word)]:
        reason = f"speaks {spoken[0].removesuffix('-creds')}"
    if reason:
        return None, reason
    if "path" in device:
        return _unix(device["path"], cwd)
    return _tcp(device.get("host", ""), device.get("port", ""))


def _is_on(device: Mapping[str, str], key: str) -> bool:
    return device.get(key, "off") not in ("off", "no", "false", "n")


def _unix(path: str, cwd: str | None) -> tuple[Address | None, str]:
    if not path or "\0" in path:
        return None, "is on a socket without a path"
    if not path.startswith("/") and cwd is None:
        return None, f"is at {path!r}, relative to a directory that cannot be seen"
    return UnixAddress(os.path.join(cwd or "/", path)), ""


def _tcp(host: str, port: str) -> tuple[Address | None, str]:
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        return None, f"is on TCP port {port!r}, which is no number"
    return TcpAddress(host.strip("[]") or "localhost", int(port)), ""


# The machine: processes and their sockets.


class _Socket(NamedTuple):
    """A Unix stream socket that listens or is connected.

    :ivar path: as it was bound; of an accepted one its listener's, of a client's "".
    :ivar file: (device, inode) of the socket file; None where that is not told.
    :ivar peer: the inode of the other end; 0 when that is closed; None where it is not told.
    :ivar waiting: the inodes of clients that have connected and are not yet accepted.
    """

    inode: int
    path: str
    listens: bool
    file: tuple[int, int] | None = None
    peer: int | None = None
    waiting: tuple[int, ...] = ()


class _Machine:
    """One look at this machine: whatever is needed of it is read once."""

    def __init__(self, proc: str) -> None:
        self.proc = proc
        self._namespace = _inode(f"{proc}/net/unix")

    def is_near(self, pid: int) -> bool:
        """Whether its network is ours. (Each network namespace has a /proc/net of its own, hence the inode.)"""
        return _inode(f"{self.proc}/{pid}/net/unix") == self._namespace

    @cached_property
    def sockets(self) -> Sequence[_Socket] | None:
        """The Unix sockets of all network namespaces; None where none may be read.

        A path leads from one namespace into another, and an accepted socket is in that of its client.
        """
        import psutil

        tables = {self._namespace: f"{self.proc}/net/unix"}
        for pid in psutil.pids():
            table = f"{self.proc}/{pid}/net/unix"
            tables.setdefault(_inode(table), table)
        tables.pop(None, None)
        readings = [
            (_from_netlink() if namespace == self._namespace else None) or _from_proc(table)
            for namespace, table in tables.items()
        ]
        return [socket for reading in readings for socket in reading or ()] or None

    def descriptors(self, pid: int) -> set[int] | None:
        """The inodes of the sockets that a process has open; None if they may not be read."""
        found = set()
        try:
            with os.scandir(f"{self.proc}/{pid}/fd") as entries:
                for entry in entries:
                    try:
                        target = os.readlink(entry.path)
                    except OSError:
                        continue
                    if target.startswith("socket:["):
                        found.add(int(target[8:-1]))
        except OSError:
            return None
        return found

    def owners(self, inodes: Iterable[int]) -> dict[int, list[int]]:
        """The processes that have these sockets open, by inode."""
        import psutil

        wanted = set(inodes)
        found: dict[int, list[int]] = {}
        for pid in sorted(psutil.pids()) if wanted else ():
            for inode in wanted & (self.descriptors(pid) or set()):
                found.setdefault(inode, []).append(pid)
        return found


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _file(info: os.stat_result) -> tuple[int, int]:
    """A file as unix_diag names it: with 32 bits of its inode's number."""
    return info.st_dev, info.st_ino & 0xFFFFFFFF


def _clients(sockets: Iterable[_Socket]) -> tuple[int, ...]:
    """The inodes of the clients' ends: of those that are served, and then of those that wait."""
    ends = list(sockets)
    served = [socket.peer for socket in ends if not socket.listens and socket.peer]
    return (*served, *(inode for socket in ends for inode in socket.waiting if inode))


def _holder(owners: Mapping[int, Sequence[int]], inodes: Iterable[int], *, but: set[int]) -> Holder | None:
    """The process at the first of these sockets that has a visible one."""
    for inode in inodes:
        for pid in owners.get(inode, ()):
            if pid not in but:
                return Holder(pid=pid, command=_command(pid))
    return None


def _command(pid: int) -> str:
    import shlex

    import psutil

    try:
        return shlex.join(psutil.Process(pid).cmdline())
    except (psutil.Error, OSError):
        return ""


def _look(machine: _Machine, pid: int) -> tuple[RunningVM, list[tuple[int, ...]]] | None:
    """The VM of a process, and for each of its monitors the clients' sockets; None if it is no QEMU, or is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        argv = process.cmdline()
        arguments = qemu_arguments(argv) or qemu_arguments(argv, _read(process.exe) or "")
        if arguments is None:
            return None
        uid = process.uids().effective
    except (psutil.Error, OSError):
        return None
    vm = parse_arguments(arguments, pid=pid, uid=uid, user=_user(uid), cwd=_read(process.cwd))
    if not vm.monitors:
        return vm, []
    sight = _Sight(machine, process)
    states = [sight.of(monitor) for monitor in vm.monitors]
    return msgspec.structs.replace(vm, monitors=tuple(state for state, _ in states)), [inodes for _, inodes in states]


def _read(what: Callable[[], str]) -> str | None:
    """A property of a process; None if it may not be read."""
    import psutil

    try:
        return what() or None
    except (psutil.Error, OSError):
        return None


@cache
def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class _Sight:
    """The monitors of one QEMU, as they are now."""

    def __init__(self, machine: _Machine, process: psutil.Process) -> None:
        self._process = process
        self._root = f"{machine.proc}/{process.pid}/root"
        self._is_near = machine.is_near(process.pid)
        self._all = machine.sockets
        self._own = machine.descriptors(process.pid)
        self._cwd = _read(process.cwd) or "/"

    def of(self, monitor: MonitorPoint) -> tuple[MonitorPoint, tuple[int, ...]]:
        """The monitor with its state, and the sockets of its clients."""
        if isinstance(monitor.address, TcpAddress) and not self._is_near:
            reason = "is in another network namespace"
            return MonitorPoint(protocol=monitor.protocol, state=MonitorState.UNUSABLE, reason=reason), ()
        if not isinstance(monitor.address, UnixAddress) or self._all is None:
            return monitor, ()
        path, state, inodes = self._unix(monitor.address.path, self._all)
        return msgspec.structs.replace(monitor, address=UnixAddress(path), state=state), inodes

    def _unix(self, path: str, sockets: Sequence[_Socket]) -> tuple[str, MonitorState, tuple[int, ...]]:
        bound = [socket for socket in sockets if socket.path and os.path.join(self._cwd, socket.path) == path]
        own = [socket for socket in bound if self._own is None or socket.inode in self._own]
        listeners = [socket for socket in own if socket.listens]
        if not listeners:
            return path, MonitorState.GONE, ()
        # Without their descriptors it cannot be told which of two QEMUs has which.
        if len(listeners) > 1:
            return path, MonitorState.UNKNOWN, ()
        rivals = any(socket.listens and socket not in own for socket in bound)
        path, state = self._place(path, listeners[0], has_rivals=rivals)
        if state is not MonitorState.FREE:
            return path, state, ()
        # A connection whose other end is closed (0) only waits for QEMU to notice.
        is_busy = listeners[0].waiting or any(not socket.listens and socket.peer != 0 for socket in own)
        return path, MonitorState.BUSY if is_busy else MonitorState.FREE, _clients(own)

    def _place(self, path: str, listener: _Socket, *, has_rivals: bool) -> tuple[str, MonitorState]:
        """The path by which we reach the listener's socket file, and whether we do."""
        likely = []
        for candidate in self._candidates(path, listener.path):
            try:
                info = os.stat(candidate)
            except PermissionError:
                if candidate == path:
                    return path, MonitorState.FORBIDDEN
                continue
            except OSError:
                continue
            if listener.file == _file(info):
                return candidate, _access(candidate)
            # Some file systems (btrfs, overlayfs) tell stat another device, and then a difference proves nothing.
            if stat.S_ISSOCK(info.st_mode) and (listener.file is None or listener.file[0] != info.st_dev):
                likely.append((candidate, info))
        same = [(name, info) for name, info in likely if listener.file and listener.file[1] == _file(info)[1]]
        return self._likely_place(path, same or likely, is_sure=bool(same) or not has_rivals)

    def _likely_place(
        self, path: str, likely: Sequence[tuple[str, os.stat_result]], *, is_sure: bool
    ) -> tuple[str, MonitorState]:
        """The same by the path alone: as QEMU sees it, and written as short as possible."""
        found = dict(likely)
        inside = self._root + path
        if inside in found and not (path in found and os.path.samestat(found[path], found[inside])):
            path = inside
        if path not in found:
            return path, MonitorState.GONE
        return path, _access(path) if is_sure else MonitorState.UNKNOWN

    def _candidates(self, path: str, bound: str) -> Iterator[str]:
        """Where the socket file may be: as written, in QEMU's container, or where QEMU was before -daemonize."""
        yield path
        yield self._root + path
        if not os.path.isabs(bound):
            for directory in (_read(lambda: self._process.environ().get("PWD", "")), _read(os.getcwd)):
                if directory:
                    yield os.path.join(directory, bound)


def _access(path: str) -> MonitorState:
    may = os.access(path, os.W_OK, effective_ids=True)
    return MonitorState.FREE if may else MonitorState.FORBIDDEN


# Two sources of sockets.

_NETLINK_SOCK_DIAG = 4
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_TCP_ESTABLISHED, _TCP_LISTEN = 1, 10
_SHOW_NAME, _SHOW_VFS, _SHOW_PEER, _SHOW_ICONS = 1, 2, 4, 8
_NAME, _VFS, _PEER, _ICONS = 0, 1, 2, 3
#: How long the kernel may take to answer, in seconds; it answers at once.
_NETLINK_TIMEOUT_S = 2.0


def _from_netlink() -> list[_Socket] | None:
    """The Unix stream sockets of our network namespace by unix_diag; None where that is refused.

    Source: linux/unix_diag.h, linux/netlink.h; sock_diag(7).
    """
    import socket

    wanted = 1 << _TCP_ESTABLISHED | 1 << _TCP_LISTEN
    show = _SHOW_NAME | _SHOW_VFS | _SHOW_PEER | _SHOW_ICONS
    body = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, wanted, 0, show, 0, 0)
    header = struct.pack("=IHHII", 16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    found: list[_Socket] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(_NETLINK_TIMEOUT_S)
            kernel.sendall(header + body)
            while True:
                for kind, message in _messages(kernel.recv(1 << 18)):
                    if kind == _NLMSG_DONE:
                        return found
                    if kind == _NLMSG_ERROR:
                        return None
                    if message[1] == socket.SOCK_STREAM:
                        found.append(_diagnosed(message))
    except (OSError, AttributeError, struct.error):
        return None


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each netlink message."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        yield kind, data[at + 16 : at + length]
        at += max(16, length + 3 & ~3)


def _diagnosed(message: bytes) -> _Socket:
    """A struct unix_diag_msg and the attributes behind it."""
    attributes = {}
    at = 16
    while at + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, at)
        attributes[kind] = message[at + 4 : at + length]
        at += max(4, length + 3 & ~3)
    file = None
    if _VFS in attributes:
        number, device = struct.unpack("=II", attributes[_VFS])
        # The kernel's own dev_t, of 12 and 20 bits.
        file = (os.makedev(device >> 20, device & 0xFFFFF), number)
    icons = attributes.get(_ICONS, b"")
    return _Socket(
        inode=struct.unpack_from("=I", message, 4)[0],
        path=os.fsdecode(attributes.get(_NAME, b"").rstrip(b"\0")),
        listens=message[2] == _TCP_LISTEN,
        file=file,
        peer=struct.unpack("=I", attributes[_PEER])[0] if _PEER in attributes else 0,
        waiting=struct.unpack(f"={len(icons) // 4}I", icons),
    )


#: Columns: Num RefCount Protocol Flags Type St Inode Path, of proc(5). Type 1 is a stream, state 3 is connected.
_ROW = re.compile(rb"\S+: \S+ \S+ (?P<flags>\S+) 0001 (?P<state>\S\S) +(?P<inode>[0-9]+)(?: (?P<path>.*))?")
_ACCEPTS = 0x10000


def _from_proc(table: str) -> list[_Socket] | None:
    """The same from /proc/net/unix, without files, peers and those that wait; None if it may not be read."""
    found = []
    try:
        with open(table, "rb") as rows:
            for row in rows:
                match = _ROW.fullmatch(row.rstrip(b"\n"))
                if not match:
                    continue
                listens = bool(int(match["flags"], 16) & _ACCEPTS)
                if listens or match["state"] == b"03":
                    path = os.fsdecode(match["path"] or b"")
                    found.append(_Socket(inode=int(match["inode"]), path=path, listens=listens))
    except OSError:
        return None
    return found
