"""Which VM is meant: by its monitor's address, by a name, or because there is no other.

qsnap picks a VM on its own only if it is this user's only one that has a monitor on a socket. A VM whose monitor is
busy counts too: the choice must not depend on who is connected at the moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import structs

from qsnap.errors import BadUsage, NoVM
from qsnap.model.qemu import Struct
from qsnap.monitor.address import Address, UnixAddress, parse_address
from qsnap.targets.vms import MonitorPoint, MonitorState, RunningVM, find, usable

if TYPE_CHECKING:
    from qsnap.targets.config import Config, Settings
_START = "Start QEMU with -qmp unix:/run/vm.qmp,server=on,wait=off and use -m /run/vm.qmp; without a VM try: qsnap demo"


class Target(Struct, frozen=True):
    """The VM that is meant.

    :ivar pid: its process id, if it was found among the running VMs; any other process at the address is not it.
    :ivar settings: its defaults from the config file.
    :ivar title: its name in a sentence, if it was found among the running VMs.
    :ivar was_guessed: the user did not name it; it is the only one.
    :ivar selector: the value of ``--vm`` for it; "" if it was named by its address.
    """

    address: Address
    settings: Settings
    pid: int | None = None
    title: str = ""
    was_guessed: bool = False
    selector: str = ""

    @property
    def name(self) -> str:
        """Its name in a table or a label: the same whenever it is chosen in that way."""
        return self.selector or str(self.address)


class KnownVM(Struct, frozen=True):
    """A VM that runs, or that the config file names."""

    running: RunningVM | None
    """None: it does not run, as far as can be seen."""
    config: str | None
    """Its name in the config file."""
    monitor: Address | None
    """The address to which qsnap would connect; None if it cannot connect."""
    selector: str | None
    """The value of ``--vm`` that means only this VM; None if only ``-m`` can choose it."""

    @property
    def name(self) -> str | None:
        """Its ``-name``, or else its name in the config file."""
        return (self.running.name if self.running else None) or self.config

    @property
    def option(self) -> str:
        """The options that choose it, as typed in a shell; "" if none do."""
        import shlex

        if self.monitor is None:
            return ""
        return shlex.join(["--vm", self.selector] if self.selector else ["-m", str(self.monitor)])

    def to_json(self) -> dict[str, Any]:
        facts = self.running.to_json() if self.running else {"pid": None, "uid": None, "user": None, "name": self.name,
            "uuid": None, "memory": None, "disks": [], "monitors": [], "managed_by": None}  # fmt: skip
        return {
            **facts,
            "is_ours": self.running.is_ours if self.running else None,
            "config": self.config,
            "monitor": str(self.monitor) if self.monitor else None,
            "vm": self.selector,
        }


class SeveralVMs(BadUsage):
    """More than one running VM could be meant; nothing was tried.

    :ivar vms: the VMs, and how to name each.
    """

    def __init__(self, message: str, vms: Sequence[KnownVM]) -> None:
        super().__init__(message)
        self.vms = tuple(vms)

    def details(self) -> Mapping[str, object]:
        return {"vms": [vm.to_json() for vm in self.vms]}


def choose(
    config: Config, running: Callable[[], Sequence[RunningVM]], *, monitor: str | None = None, vm: str | None = None
) -> Target:
    """The VM that is meant.

    :param monitor: its monitor's address; or:
    :param vm: its name in the config file, its ``-name``, pid or UUID. Without both, the config's default-vm is meant,
        or else the only VM that runs.
    :param running: finds the running VMs; called only if needed.
    :raise BadUsage: both are given, or the address is not valid.
    :raise SeveralVMs: several VMs could be meant.
    :raise NoVM: it does not run, or has no monitor that could be used.
    """
    if monitor is not None and vm is not None:
        raise BadUsage("a monitor and a VM are both named; give -m or --vm, not both")
    if monitor is not None:
        address = parse_address(monitor)
        return Target(address, config.settings(_configured(config, address, None)))
    wanted = vm if vm is not None else config.default_vm
    if wanted is None:
        return _only(known_vms(config, running()), config)
    named = config.vms.get(wanted)
    if named and named.monitor:
        return Target(named.monitor, config.settings(wanted), selector=wanted)
    return _named(wanted, config, running())


def choose_all(config: Config, running: Sequence[RunningVM]) -> list[Target]:
    """Every running VM of this user with a usable monitor; VMs that libvirt manages do not count.

    :raise NoVM: there is none.
    """
    known = known_vms(config, running)
    reachable = [vm for vm in known if vm.running and vm.running.is_ours and vm.monitor]
    if not reachable:
        _only(known, config)  # says why
    return [_target(vm, config) for vm in reachable]


def known_vms(config: Config, running: Sequence[RunningVM]) -> list[KnownVM]:
    """All running VMs, by pid, and then those that only the config file names."""
    found = [_known(vm, config, running) for vm in running]
    shown = {vm.config for vm in found}
    idle = [vm for vm in config.vms.values() if vm.name not in shown]
    return found + [
        KnownVM(running=None, config=vm.name, monitor=vm.monitor, selector=vm.name if vm.monitor else None)
        for vm in idle
    ]


def reason(vm: RunningVM) -> str:
    """A sentence that says why qsnap can use none of its monitors."""
    if vm.managed_by:
        return (
            f"{vm.managed_by} manages it, and its monitor belongs to libvirtd: use virsh snapshot-create, or give it "
            "a monitor for qsnap, by <qemu:commandline> in its XML"
        )
    if not vm.monitors:
        return "it has no monitor; start it with -qmp unix:PATH,server=on,wait=off"
    words = {MonitorState.GONE: "has lost its socket file", MonitorState.FORBIDDEN: "may not be opened by this user"}
    return "; ".join(
        f"its {point.protocol.upper()} monitor {f'at {point.address} ' if point.address else ''}"
        f"{point.reason or words.get(point.state, 'cannot be used')}"
        for point in vm.monitors
    )


def _known(vm: RunningVM, config: Config, running: Sequence[RunningVM]) -> KnownVM:
    best = _best(vm)
    address = best.address if best else None
    configured = _configured(config, address, vm)
    if configured and (given := config.vms[configured].monitor):
        address = given
    selector = _selector(vm, configured, config, running) if address else None
    return KnownVM(running=vm, config=configured, monitor=address, selector=selector)


def _selector(vm: RunningVM, configured: str | None, config: Config, running: Sequence[RunningVM]) -> str | None:
    if configured and config.vms[configured].monitor:
        return configured
    for word in (vm.name, str(vm.pid), vm.uuid):
        is_anothers = word in config.vms and word != configured
        if word and not is_anothers and find(running, word) == (vm,):
            return word
    return None


def _best(vm: RunningVM) -> MonitorPoint | None:
    """The monitor to connect to. A busy one will do: its client may be about to leave."""
    busy = sorted(
        (point for point in vm.monitors if point.address and point.state is MonitorState.BUSY),
        key=lambda point: point.protocol != "qmp",
    )
    return usable(vm) or next(iter(busy), None)


def _configured(config: Config, address: Address | None, vm: RunningVM | None) -> str | None:
    """The config file's name for the VM with a monitor at *address*, or for the running *vm*."""
    # At the address of one that is gone may be another's.
    addresses = {
        _resolved(point.address)
        for point in (vm.monitors if vm else ())
        if point.address and point.state is not MonitorState.GONE
    }
    if address:
        addresses.add(_resolved(address))
    for name, one in config.vms.items():
        if _resolved(one.monitor) in addresses if one.monitor else vm is not None and vm.name == name:
            return name
    return None


def _resolved(address: Address) -> Address:
    return UnixAddress(os.path.realpath(address.path)) if isinstance(address, UnixAddress) else address


def _named(wanted: str, config: Config, running: Sequence[RunningVM]) -> Target:
    found = [_known(vm, config, running) for vm in find(running, wanted)]
    if not found:
        names = ", ".join(vm.name for vm in known_vms(config, running) if vm.name)
        those = f"known: {names}" if names else "qsnap vms lists those that run"
        raise NoVM(f"no VM {wanted!r} is running, by -name, pid or UUID ({those})")
    # Not one without a monitor for us, as that of a restore drill, which has the UUID of the VM that it copies
    found = [vm for vm in found if vm.monitor] or found
    if len(found) > 1:
        raise SeveralVMs(f"{len(found)} VMs are called {wanted!r}; choose one", found)
    return _target(found[0], config, wanted if wanted in config.vms else None)


def _only(known: Sequence[KnownVM], config: Config) -> Target:
    runs = [vm for vm in known if vm.running]
    ours = [vm for vm in runs if vm.running and vm.running.is_ours]
    reachable = [vm for vm in ours if vm.monitor]
    if len(reachable) == 1:
        return structs.replace(_target(reachable[0], config), was_guessed=True)
    if reachable:
        raise SeveralVMs(f"{len(reachable)} VMs are running; choose one", reachable)
    sentences = [f"no monitor is given, and qsnap finds no running VM that it could use. {_START}"]
    sentences += [f"{_title(vm.running)}: {reason(vm.running)}" for vm in ours if vm.running]
    if others := [vm.option for vm in runs if vm not in ours and vm.monitor]:
        sentences.append(f"qsnap never picks another user's VM on its own: {', '.join(others)}")
    if idle := [vm.option for vm in known if not vm.running and vm.monitor]:
        sentences.append(f"the config file names: {', '.join(idle)}")
    raise NoVM("\n".join(sentences))


def _target(known: KnownVM, config: Config, name: str | None = None) -> Target:
    vm = known.running
    assert vm is not None
    if known.monitor is None:
        raise NoVM(f"{_title(vm)} cannot be reached: {reason(vm)}")
    return Target(
        known.monitor, config.settings(name or known.config), vm.pid, _title(vm), selector=name or known.selector or ""
    )


def _title(vm: RunningVM) -> str:
    return f"{vm.name} (process {vm.pid})" if vm.name else f"the VM of process {vm.pid}"
