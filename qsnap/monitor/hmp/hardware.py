"""What the human monitor tells of the machine: its type, accelerator, PCI devices and vCPUs. Pure.

Formats as QEMU prints them (system/qdev-monitor.c: qdev_print; hw/pci/pci-hmp-cmds.c: pcibus_dev_print;
hw/core/machine-hmp-cmds.c: hmp_info_cpus, hmp_hotpluggable_cpus), held against 5.2, 7.2, 10.0 and 11.1. A text in
another form tells nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

_TREE = re.compile(
    r'^(?P<indent> *)dev: (?P<model>[^,\r\n]+), id "'
    r"|^ *addr = (?P<slot>[0-9a-f]{2}\.[0-7])\s*$"
    r"|^ *class .*, addr [0-9a-f]+:[0-9a-f.]+, pci id (?P<id>[0-9a-f]{4}:[0-9a-f]{4}) ",
    re.MULTILINE,
)
_CPU = re.compile(r"^[* ] CPU #\d+:", re.MULTILINE)
_MODEL = re.compile(r'^ *type: "(.+)-[^-]+-cpu"', re.MULTILINE)
_SUFFIX = "-machine"


class PciDevice(NamedTuple):
    """A PCI device: QEMU's model, as "virtio-net-pci"; and vendor and device, as "1af4:1000"."""

    model: str
    pci_id: str


def machine_type(text: str) -> str:
    """The machine type that ``qom-get /machine type`` tells; "" if it tells none."""
    try:
        found = json.loads(text)
    except ValueError:
        return ""
    return found.removesuffix(_SUFFIX) if isinstance(found, str) else ""


def vcpus(text: str) -> int:
    """How many vCPUs ``info cpus`` shows."""
    return len(_CPU.findall(text))


def cpu_model(text: str) -> str:
    """The model of the CPUs that ``info hotpluggable-cpus`` shows; "" if it shows none.

    QEMU's type has the architecture behind it: "qemu64-x86_64-cpu".
    """
    match = _MODEL.search(text)
    return match[1] if match else ""


def accelerator(text: str) -> str:
    """What ``info kvm`` tells: "kvm" or "tcg"; "" if it tells nothing."""
    if "kvm support: enabled" in text:
        return "kvm"
    return "tcg" if "kvm support:" in text else ""


def pci_devices(text: str) -> Mapping[str, PciDevice]:
    """The PCI devices that ``info qtree`` shows, by their addresses as a migration stream has them.

    That is "0000:00:02.0", with a slot for each bridge on the way (hw/pci/pci.c: pcibus_get_dev_path).

    Empty if there are several PCI root buses, of which the text does not tell the addresses.
    """
    found: dict[str, PciDevice] = {}
    way: list[tuple[int, str, str]] = []
    for match in _TREE.finditer(text):
        if match["model"] is not None:
            indent = len(match["indent"])
            while way and way[-1][0] >= indent:
                way.pop()
            way.append((indent, match["model"], ""))
            if match["model"].startswith("pxb"):
                return {}
        elif match["slot"] is not None and way:
            way[-1] = (*way[-1][:2], match["slot"])
        elif match["id"] is not None and way and way[-1][2]:
            slots = ":".join(slot for _, _, slot in way if slot)
            found[f"0000:00:{slots}"] = PciDevice(way[-1][1], match["id"])
    return found
