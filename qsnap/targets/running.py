"""This machine's processes and their sockets: which of them are QEMUs, what is at their monitors, and who holds one.

* The command line is that of proc(5), cmdline.
* An accepted Unix socket carries the path that its listener was bound to, spelled the same. Those in QEMU's own
  descriptors are its clients; so two QEMUs which bound one path, one after the other, are told apart.

All is read below ``psutil.PROCFS_PATH``. Processes that end meanwhile, or may not be read, are passed over.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING

import msgspec

from qsnap.errors import ConnectError, MonitorBusy, MonitorError
from qsnap.host import sockets
from qsnap.host.sockets import Socket
from qsnap.monitor.address import Address, TcpAddress, UnixAddress
from qsnap.monitor.connection import ANOTHER
from qsnap.targets.command_line import parse_arguments, qemu_arguments
from qsnap.targets.vms import Holder, MonitorPoint, MonitorState, RunningVM

if TYPE_CHECKING:
    import psutil

#: Characters of a command line that a message shows.
_COMMAND_SHOWN = 80


def running_vms() -> tuple[RunningVM, ...]:
    """All QEMUs of this machine that this process can see, by pid; also other users': :attr:`RunningVM.is_ours`."""
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


def explained(busy: MonitorBusy, address: Address) -> MonitorError:
    """The error for a monitor that does not greet: its protocol, or the process that holds it, if visible."""
    points = (point for vm in running_vms() for point in vm.monitors if point.address == _absolute(address))
    if point := next((point for point in points if point.state is MonitorState.UNUSABLE), None):
        return ConnectError(f"{address} cannot be used: this monitor {point.reason}; {ANOTHER}")
    if isinstance(address, UnixAddress) and (other := holder(address.path)):
        command = " ".join(other.command.split())
        command = command if len(command) <= _COMMAND_SHOWN else f"{command[:_COMMAND_SHOWN]}…"
        why = (
            f"it serves one client at a time, and process {other.pid} holds it ({command}). End that one, or {ANOTHER}"
        )
        return MonitorBusy(busy.silence, why)
    return busy


def _absolute(address: Address) -> Address:
    return UnixAddress(os.path.abspath(address.path)) if isinstance(address, UnixAddress) else address


def holder(path: str) -> Holder | None:
    """The process that is connected to the monitor socket at *path*, or first in its queue, except its QEMU and us.

    :return: None if there is none, or if the system does not show it.
    """
    import psutil

    machine = _Machine(psutil.PROCFS_PATH)
    try:
        file = _file(os.stat(path))
    except OSError:
        return None
    seen = sockets.from_netlink() or ()
    names = (path, os.path.abspath(path), os.path.realpath(path))
    ends = [socket for socket in seen if socket.file == file] or [socket for socket in seen if socket.path in names]
    clients = _clients(ends)
    accepted = [socket.inode for socket in ends if not socket.listens]
    owners = machine.owners([*clients, *accepted])
    return _holder(owners, clients, but={os.getpid(), *(pid for inode in accepted for pid in owners.get(inode, ()))})


def is_qemu(pid: int) -> bool:
    """Whether that process is a QEMU, as far as its command line is visible; a proxy before a QEMU is not."""
    try:
        with open(f"/proc/{pid}/cmdline", errors="replace") as file:
            return qemu_arguments(file.read().split("\0")) is not None
    except OSError:
        return False


class _Machine:
    """One look at this machine: whatever is needed of it is read once."""

    def __init__(self, proc: str) -> None:
        self.proc = proc
        self._namespace = _inode(f"{proc}/net/unix")

    def is_near(self, pid: int) -> bool:
        """Whether its network is ours. (Each network namespace has a /proc/net of its own, hence the inode.)"""
        return _inode(f"{self.proc}/{pid}/net/unix") == self._namespace

    @cached_property
    def sockets(self) -> Sequence[Socket] | None:
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
            (sockets.from_netlink() if namespace == self._namespace else None) or sockets.from_proc(table)
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


def _clients(sockets: Iterable[Socket]) -> tuple[int, ...]:
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
    """The VM of a process, and for each of its monitors the clients' sockets; None if it is not a QEMU, or is gone."""
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
        if monitor.state is MonitorState.UNUSABLE:
            return monitor, ()
        if isinstance(monitor.address, TcpAddress) and not self._is_near:
            reason = "is in another network namespace"
            return MonitorPoint(protocol=monitor.protocol, state=MonitorState.UNUSABLE, reason=reason), ()
        if not isinstance(monitor.address, UnixAddress) or self._all is None:
            return monitor, ()
        path, state, inodes = self._unix(monitor.address.path, self._all)
        return msgspec.structs.replace(monitor, address=UnixAddress(path), state=state), inodes

    def _unix(self, path: str, sockets: Sequence[Socket]) -> tuple[str, MonitorState, tuple[int, ...]]:
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

    def _place(self, path: str, listener: Socket, *, has_rivals: bool) -> tuple[str, MonitorState]:
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
        """What :meth:`_place` returns if only the paths tell: the path that QEMU means, as short as possible."""
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
