"""The machine that a VM state belongs to: read from the beginning and the end of its migration stream.

The beginning tells the machine type and the RAM blocks; the devices come at the end, behind all RAM. A device's section
does not tell its length. But it ends with a footer that repeats its number, and the next section follows at once. So
the sections are found from the last one backwards.

QEMU can also write its devices alone (``xen-save-devices-state``), with the same sections: see
:meth:`qsnap.monitor.qmp.background.Background.device_states`.

Facts (QEMU's migration/savevm.c: qemu_savevm_state_complete_precopy_non_iterable, save_section_header, find_se): a
section is 04, its number, its idstr, instance and version, contents, and the footer 7e with the number again; machine
types before 2.4 have no footers. 00 is behind the last section, then 06 and a description in JSON up to the end. The
first thing that a PCI device writes are the version 2 and its configuration space (hw/pci/pci.c: vmstate_pci_device).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from qsnap.inventory.stream import LONGEST_FRAME, Broken, Stream, Unknown
from qsnap.inventory.vm_state import VmState
from qsnap.model import typed
from qsnap.model.machine import Machine, RamBlock, Section

#: Bytes at the end that are read first; they hold the devices of most guests. It is doubled up to the most.
_TAIL_BYTES = 1 << 20
_MOST_BYTES = 256 << 20
_HEAD = b"QEVM\0\0\0\3"
#: A footer, and how it begins.
_FOOTER = 5
_FOOT = b"\x7e"
#: Bytes of a PCI device's configuration space that every device has, and those of the version before it.
_CONFIGURATION = 256
_PCI_VERSION = b"\0\0\0\2"
#: In it (PCI Local Bus Specification 3.0, 6.1): revision and class; and the type of header.
_FIXED = slice(0x08, 0x0C)
_HEADER_TYPE = 0x0E
_MSIX = 0x11
#: The subsections with such lists (hw/acpi/ich9.c, piix4.c, generic_event_device.c).
_LIST = re.compile(rb"/(?:cpuhp|memhp)\0")
#: There is no room for more.
_MOST_CAPABILITIES = 48


class Devices(NamedTuple):
    """The devices in a stream.

    :ivar configurations: the configuration space of each PCI device that was seen to have one, by its section's name.
    :ivar lists: the bytes of each section with a list of what can be hot-plugged (vCPUs, memory). The list is as long
        as the board has places, and the stream does not tell how many.
    """

    sections: tuple[Section, ...]
    configurations: Mapping[str, bytes]
    lists: Mapping[str, int]


class Contents(NamedTuple):
    """What a VM state holds besides RAM."""

    machine: Machine
    devices: Devices


def of_state(state: VmState) -> Contents:
    """The contents of a VM state. Neither RAM nor the whole of a device's state is read for it.

    :raise Unknown: the stream is not as QEMU is known to write it.
    :raise Broken: it is damaged.
    :raise OSError: it cannot be read.
    """
    stream = Stream({})
    stream.parts(memoryview(state.bytes(0, LONGEST_FRAME)))
    if stream.section < 0:
        raise Unknown("its beginning does not tell the RAM blocks")
    size = min(_TAIL_BYTES, state.size)
    while True:
        at_end = _at_end(state.bytes(state.size - size, size), stream.section)
        if at_end is not None:
            break
        if size in (state.size, _MOST_BYTES):
            raise Unknown("the devices at its end cannot be told apart")
        size = min(2 * size, state.size, _MOST_BYTES)
    found, description = at_end
    if description and _described(description) != [(section.name, section.instance) for section, _ in found]:
        raise Broken("the description at its end is of other devices")
    blocks = tuple(RamBlock(name=name, size=block) for name, block in stream.blocks.items())
    devices = _devices(found)
    return Contents(Machine(name=stream.machine, ram_blocks=blocks, sections=devices.sections), devices)


def of_devices(data: bytes) -> Devices:
    """The devices in what QEMU wrote of its devices alone.

    :raise Unknown: it is not as QEMU is known to write it.
    """
    found = _sections(data, len(data) - 1, None)
    if found is None:
        raise Unknown("the devices cannot be told apart")
    return _devices(found)


_Found = list[tuple[Section, bytes]]


def _at_end(tail: bytes, ram: int) -> tuple[_Found, bytes] | None:
    """The sections in the end of a stream, each with its contents, and the description behind them.

    None where the first section begins before it.
    """
    at = len(tail)
    while (at := tail.rfind(b"\6", 0, at)) >= 0:  # there is none in JSON, and there may be some in its length
        if len(tail) - at > _FOOTER and int.from_bytes(tail[at + 1 : at + 5]) == len(tail) - at - 5:
            break
    end = len(tail) - 1 if at < 0 else at - 1
    found = _sections(tail, end, ram)
    return None if found is None else (found, b"" if at < 0 else tail[at + 5 :])


def _sections(data: bytes, end: int, ram: int | None) -> _Found | None:
    """The sections up to *end*, where the byte 00 is.

    :param ram: the number of the section that comes before the first one; None: the first one is the first of all.
    """
    found: _Found = []
    end -= _FOOTER
    while data[end : end + 1] == _FOOT:
        number = data[end + 1 : end + _FOOTER]
        if ram is not None and int.from_bytes(number) == ram:
            return found[::-1]
        if (begin := _beginning(data, number, end)) < 0:
            return None
        name_at = begin + _FOOTER + 1
        name_end = name_at + data[name_at - 1]
        instance, version = struct.unpack_from(">II", data, name_end)
        state = name_end + 8
        name = data[name_at:name_end].decode(errors="replace")
        section = Section(name=name, instance=instance, version=version, size=end - state)
        found.append((section, data[state:end]))
        if ram is None and begin == len(_HEAD):
            return found[::-1]
        end = begin - _FOOTER
    return None


def _beginning(data: bytes, number: bytes, end: int) -> int:
    """Where the section of that number begins which ends at *end*: behind another one's footer, or the head. -1: before
    the data."""
    at = end
    while (at := data.rfind(b"\4" + number, 0, at)) >= 0:
        if data[at - _FOOTER : at - _FOOTER + 1] == _FOOT or (at == len(_HEAD) and data.startswith(_HEAD)):
            break
    return at


def _described(description: bytes) -> list[tuple[str, int]]:
    """The names and instances of the devices in the description at the end of a stream."""
    try:
        devices = typed.decode(description, _Description).devices
    except msgspec.DecodeError as error:
        raise Broken(f"the description at its end is damaged: {error}") from error
    return [(device.name, device.instance_id) for device in devices]


class _Device(msgspec.Struct):
    name: str
    instance_id: int


class _Description(msgspec.Struct):
    devices: list[_Device]


def _devices(found: _Found) -> Devices:
    begin = len(_PCI_VERSION)
    return Devices(
        tuple(section for section, _ in found),
        {
            section.name: state[begin : begin + _CONFIGURATION]
            for section, state in found
            if pci_path(section.name) and len(state) >= begin + _CONFIGURATION and state.startswith(_PCI_VERSION)
        },
        {section.name: len(state) for section, state in found if _LIST.search(state)},
    )


_PCI = re.compile(r"[0-9a-f]{4}(?::[0-9a-f]{2})?(?::[0-9a-f]{2}\.[0-7])+(?=/)")


def pci_path(name: str) -> str:
    """The PCI address in the name of a section or RAM block: "0000:00:02.0", with a slot for each bridge on the way.

    "" if it begins with none. (hw/pci/pci.c: pcibus_get_dev_path.)
    """
    match = _PCI.match(name)
    return match[0] if match else ""


def pci_id(configuration: bytes) -> str:
    """Vendor and device of a PCI device: "1af4:1000"."""
    vendor, device = struct.unpack_from("<HH", configuration)
    return f"{vendor:04x}:{device:04x}"


def difference(then: bytes, now: bytes) -> str:
    """What QEMU would find to be another in a PCI device's configuration space, as a clause; "" if nothing.

    QEMU compares what a guest cannot write, and the identity among it. Of that, this knows the identity, the list of
    capabilities, and MSI-X.
    """
    if pci_id(then) != pci_id(now):
        return f"the PCI identity {pci_id(now)}, and had {pci_id(then)}"
    if (then[_FIXED], then[_HEADER_TYPE]) != (now[_FIXED], now[_HEADER_TYPE]):
        return "another revision or class than it had"
    if [*_capabilities(then)] != [*_capabilities(now)]:
        return "other PCI capabilities than it had"
    for kind, at in _capabilities(then):
        if kind == _MSIX:
            vectors, before = ((int.from_bytes(one[at + 2 : at + 4], "little") & 0x7FF) + 1 for one in (now, then))
            if vectors != before:
                return (
                    f"{vectors} interrupt vectors (MSI-X), and had {before}: they follow from the number of its "
                    "queues, which can follow from that of the vCPUs"
                )
            if then[at + 4 : at + 12] != now[at + 4 : at + 12]:
                return "its interrupt vectors (MSI-X) at another place than it had"
    return ""


def _capabilities(configuration: bytes) -> Iterator[tuple[int, int]]:
    """The kind and the place of each capability in a PCI device's configuration space."""
    at = configuration[0x34] & ~3
    for _ in range(_MOST_CAPABILITIES):
        if not at:
            return
        yield configuration[at], at
        at = configuration[at + 1] & ~3
