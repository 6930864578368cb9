"""Whether a VM state fits the machine that runs: found out before QEMU loads anything.

QEMU itself notices in the middle of a load. By then it has put the disks back and reset the guest.

QEMU refuses (migration/savevm.c, ram.c, hw/pci/pci.c: get_pci_config_device; each seen on 7.2, 10.0 and 11.1):

* another machine type;
* a RAM block that it does not have, or that has another size. Only those of firmware's tables ("/rom@") may change;
* a device that it does not have, or whose format is of a later version;
* a PCI device with another identity, other capabilities, or another number of interrupt vectors;
* another number of places for vCPUs or memory, where firmware uses the list of them (in 11.1: always).

It loads all else, and the guest goes on: devices, RAM and vCPUs that are new, another CPU model under TCG.

Before the guest is touched, HMP is asked. When it is stopped, QEMU writes the states of its devices, which takes
milliseconds, and they are compared one by one. Only QMP can do that.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from qsnap.errors import UNTOUCHED, CommandFailed, PrecheckRefused
from qsnap.inventory import machine, vm_state
from qsnap.inventory.machine import Contents, Devices
from qsnap.inventory.qcow2 import Damaged, Unreadable
from qsnap.inventory.stream import Broken, Unknown
from qsnap.inventory.vm_state import Place
from qsnap.model.checks import Finding
from qsnap.model.machine import RamBlock
from qsnap.model.snapshots import Snapshot
from qsnap.monitor import Monitor
from qsnap.monitor.hmp import hardware, ram
from qsnap.monitor.hmp.hardware import PciDevice
from qsnap.operations.findings import damaged_finding

#: Begins the names of RAM blocks whose size QEMU changes to that of the stream.
_RESIZED = "/rom@"
#: The idstr of each vCPU's section.
_VCPU = "cpu_common"
_AS_SAVED = "start the guest as it was when it was saved: qsnap show {tag} --state tells its machine and devices"


class Hardware(NamedTuple):
    """The machine that runs, as HMP tells; what it does not tell is empty.

    :ivar name: the machine type.
    :ivar pci: the PCI devices, by their addresses.
    """

    name: str
    ram_blocks: Mapping[str, ram.RamBlock]
    pci: Mapping[str, PciDevice]
    vcpus: int


async def refuse_other_machine(
    monitor: Monitor, snapshot: Snapshot, state: Place | int | None, standing: str = UNTOUCHED
) -> Contents | None:
    """Refuse a snapshot that QEMU would refuse in the middle of its load, as far as can be seen from outside.

    :param state: where its VM state can be read: see :func:`qsnap.inventory.vm_state.of_snapshot`.
    :return: the contents of the VM state; None if they cannot be read from here, so that nothing is known.
    :raise PrecheckRefused: the machine is another one, or the VM state is damaged as far as its ends and tables show.
    """
    try:
        saved, now = await asyncio.gather(asyncio.to_thread(_contents, snapshot, state), _hardware(monitor))
    except (Broken, Damaged) as error:
        raise PrecheckRefused(
            f"snapshot {snapshot.tag!r} cannot be loaded", [damaged_finding(error)], standing
        ) from error
    except (Unreadable, Unknown, OSError):
        return None
    _refuse(snapshot.tag, [*differences(saved, now)], standing)
    return saved


async def refuse_other_devices(monitor: Monitor, tag: str, saved: Contents, standing: str) -> None:
    """Refuse a snapshot of other devices, by what QEMU itself writes of its present ones. The guest must be stopped.

    :param standing: the guest's state, for the message of a refusal.
    :raise PrecheckRefused: the machine is another one.
    """
    if monitor.live_obstacle:
        return
    try:
        now = machine.of_devices(await monitor.live.device_states())
    except (CommandFailed, Unknown):
        return  # a device whose state cannot be saved; or this QEMU does not have the command
    _refuse(tag, [*_device_differences(saved.devices, now)], standing)


def _contents(snapshot: Snapshot, place: Place | int | None) -> Contents:
    state = vm_state.of_snapshot(snapshot, place)
    try:
        return machine.of_state(state)
    finally:
        state.close()


async def _hardware(monitor: Monitor) -> Hardware:
    name, blocks, tree, cpus = await asyncio.gather(
        *map(monitor.human_answer, ("qom-get /machine type", "info ramblock", "info qtree", "info cpus"))
    )
    return Hardware(
        hardware.machine_type(name),
        {block.name: block for block in ram.ram_blocks(blocks)},
        hardware.pci_devices(tree),
        hardware.vcpus(cpus),
    )


def _refuse(tag: str, differences: list[tuple[str, str]], standing: str) -> None:
    findings = [
        Finding.refusal("another-machine", message, cure or _AS_SAVED.format(tag=tag)) for message, cure in differences
    ]
    if findings:
        raise PrecheckRefused(
            f"snapshot {tag!r} was saved on another machine, and QEMU would not load it", findings, standing
        )


def differences(saved: Contents, now: Hardware) -> Iterator[tuple[str, str]]:
    """What QEMU would refuse, and what to do about it; "" for what is said of all."""
    then = saved.machine
    if now.name and now.name != then.name:
        yield f"the machine type is {now.name}, and was {then.name}", f"start the guest with -machine {then.name}"
        return  # all else differs by that
    gone = dict(_pci_differences(saved, now.pci))
    yield from ((text, "") for text in gone.values())
    if now.ram_blocks:
        yield from _ram_differences([one for one in then.ram_blocks if machine.pci_path(one.name) not in gone], now)
    vcpus = sum(section.name == _VCPU for section in then.sections)
    if 0 < now.vcpus < vcpus:
        yield (
            f"the guest has {now.vcpus} vCPU{'s' * (now.vcpus > 1)}, and had {vcpus}",
            f"start the guest with -smp {vcpus}",
        )


def _pci_differences(saved: Contents, now: Mapping[str, PciDevice]) -> Iterator[tuple[str, str]]:
    """The PCI addresses at which there is another device now, or none; and what to say of each."""
    if not now:
        return
    sections: dict[str, str] = {}
    configurations = saved.devices.configurations
    for section in saved.machine.sections:
        if path := machine.pci_path(section.name):
            sections.setdefault(path, section.name)
    free = {path: device for path, device in now.items() if path not in sections}
    for path, name in sections.items():
        what = name.rpartition("/")[2]
        then = machine.pci_id(configurations[name]) if name in configurations else ""
        at = path.removeprefix("0000:00:")
        if path not in now:
            there = [other for other, device in free.items() if device.pci_id == then]
            moved = f"is at {there[0].removeprefix('0000:00:')} now" if there else "is missing"
            yield path, f"the device {what} of PCI address {at} {moved}"
        elif then and now[path].pci_id != then:
            yield path, f"at PCI address {at} is {now[path].model} ({now[path].pci_id}), and was {what} ({then})"


def _ram_differences(then: Iterable[RamBlock], now: Hardware) -> Iterator[tuple[str, str]]:
    for block in then:
        there = now.ram_blocks.get(block.name)
        cure = f"start the guest with -m {block.size >> 20}M" if block.name.endswith(".ram") else ""
        if there is None:
            yield f"the RAM block {block.name} of {block.size:,} bytes is missing", ""
        elif block.size > there.size or (block.size != there.used and not block.name.startswith(_RESIZED)):
            yield f"the RAM block {block.name} has {there.used:,} bytes, and had {block.size:,}", cure


def _device_differences(then: Devices, now: Devices) -> Iterator[tuple[str, str]]:
    versions = {section.name: section.version for section in now.sections}
    left = Counter(section.name for section in now.sections)
    for section in then.sections:
        name = section.name
        left[name] -= 1
        if name not in versions:
            yield f"the device {name} is missing", ""
        elif left[name] < 0:
            yield f"there are fewer devices {name} than at the save", ""
        elif section.version > versions[name]:
            yield (
                f"the device {name} was saved in version {section.version} of its format, and this QEMU reads up to "
                f"{versions[name]}",
                "load it with a later QEMU",
            )
    for name, before in then.configurations.items():
        if name in now.configurations and (difference := machine.difference(before, now.configurations[name])):
            yield f"the device {name} has {difference}", ""
    for name, size in then.lists.items():
        if now.lists.get(name, size) != size:
            yield (
                f"the device {name} lists other numbers of vCPUs or of memory slots than at the save",
                "start the guest with the same -smp (maxcpus=) and -m (slots=)",
            )
