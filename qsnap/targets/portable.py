"""QEMU's command line as another machine can use it. Pure.

A VM state is loaded into a machine with the same devices. So every device stays, with its id, its place and its
properties; what is behind it on this host is replaced:

* A disk or medium gets another file (:class:`Drive`): its contents are copied, see
  :mod:`qsnap.operations.portable.export`. Filters above its image, caches and limits belong to this host.
* A network card is connected to nothing: a hub without another port; or, because its state is in the VM state, QEMU's
  own user network, which is restricted so that it leads nowhere (``restrict=on``). A card that needs a tap gets one,
  and QEMU a network namespace in which there is nothing else.
* A serial port or console gets a socket in the working directory, and a log beside it; any other chardev is ``null``.
* RAM that comes from a file is plain RAM: a RAM block is known by the object's id.
* The machine type is the one that the VM state names: an alias such as ``q35`` is another machine in every version.
* Monitors, displays, sockets, pid files, sandboxes, traces and secrets are left out; and so is what only says how to
  begin (``-S``, ``-loadvm``).

An option of which it is not known what it stands for is refused, and so is a device that hands on a piece of this host.
All paths that come out are relative to a working directory with a link ``export`` to the directory of the export.

Facts: qemu-options.def, and qemu_init of softmmu/vl.c, 5.2 to 11.1: which devices QEMU adds by default, and which
options are short for a -drive.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qsnap.model import outside
from qsnap.targets.command_line import merged, options, split

#: The link to the export in the directory in which QEMU is started, and what is copied besides disks.
EXPORT = "export"
FILES = "files"

#: Of this host, or only for the beginning.
_LEFT_OUT = frozenset((
    "S", "D", "add-fd", "alt-grab", "async-teardown", "chroot", "compat", "ctrl-grab", "curses", "d", "daemonize",
    "dfilter", "display", "dump-vmstate", "echr", "enable-fips", "enable-sync-profile", "full-screen", "gdb",
    "incoming", "iscsi", "jitdump", "loadvm", "mem-path", "mem-prealloc", "mon", "monitor", "msg", "name", "no-frame",
    "no-quit", "overcommit", "perfmap", "pidfile", "plugin", "preconfig", "qmp", "qmp-pretty", "qtest", "qtest-log",
    "run-with", "runas", "s", "sandbox", "sdl", "show-cursor", "spice", "trace", "user", "vnc", "writeconfig",
))  # fmt: skip
#: Of the guest, and nothing of this host is in them.
_KEPT = frozenset((
    "accel", "action", "append", "g", "global", "k", "m", "no-acpi", "no-fd-bootchk", "no-hpet", "no-kvm",
    "no-kvm-irqchip", "no-kvm-pit", "no-kvm-pit-reinjection", "no-reboot", "no-shutdown", "no-user-config",
    "nodefaults", "nodefconfig", "numa", "old-param", "only-migratable", "portrait", "prom-env", "rotate", "rtc",
    "seed", "semihosting", "semihosting-config", "singlestep", "smp", "soundhw", "tb-size", "usb", "uuid", "vga",
    "watchdog", "watchdog-action", "win2k-hack",
))  # fmt: skip
#: Names of files that are copied.
_FILES = frozenset(("kernel", "shim", "initrd", "dtb", "option-rom"))
#: What is short for a -drive, and what it stands for.
_DRIVES: Mapping[str, Mapping[str, str]] = {
    "hda": {"index": "0", "media": "disk"},
    "hdb": {"index": "1", "media": "disk"},
    "hdc": {"index": "2", "media": "disk"},
    "hdd": {"index": "3", "media": "disk"},
    "cdrom": {"index": "2", "media": "cdrom"},
    "fda": {"if": "floppy", "index": "0"},
    "fdb": {"if": "floppy", "index": "1"},
    "sd": {"if": "sd"},
    "mtdblock": {"if": "mtd"},
    "pflash": {"if": "pflash"},
}
#: What stays of a -drive; and of a user network.
_OF_DRIVES = frozenset(
    ("if", "bus", "unit", "index", "media", "id", "node-name", "serial", "addr", "werror", "rerror", "boot")
)
_OF_USER_NETWORKS = frozenset((
    "id", "net", "host", "dhcpstart", "dns", "hostname", "domainname", "ipv4", "ipv6", "ipv6-net", "ipv6-prefix",
    "ipv6-prefixlen", "ipv6-host", "ipv6-dns", "model", "mac", "addr", "vectors", "name",
))  # fmt: skip
_OF_CARDS = frozenset(("model", "mac", "addr", "vectors", "name", "id"))
#: Networks with an offload header (vnet_hdr): a virtio-net card that had one is not loaded without one ("saved image
#: requires vnet_hdr=on", hw/net/virtio-net.c). What stays of them besides the card.
_OF_TAPS = frozenset(("queues", "vnet_hdr"))
_TAPS = frozenset(("tap", "bridge"))
_CARDS_WITH_HEADER = ("virtio-net", "virtio", "e1000e", "igb", "vmxnet3")
_REFUSED_NETWORKS = frozenset(("vhost-user", "vhost-vdpa"))
#: Ports whose output people read.
_CONSOLES = ("isa-serial", "pci-serial", "usb-serial", "virtconsole", "spapr-vty", "sclpconsole", "sclplmconsole")
#: Chardevs that are input devices, or memory.
_KEPT_CHARDEVS = frozenset(("msmouse", "wctablet", "testdev", "ringbuf", "null"))
#: Devices that hand on a piece of this host, by what their models begin with, beside those of :mod:`outside`.
_REFUSED_DEVICES = (
    "vhost-", "ivshmem", "scsi-block", "scsi-generic", "tpm-", "virtio-9p", "virtio-input-host", "u2f-passthru", "xen",
)  # fmt: skip
#: Objects that stay as they are, that become plain RAM, and that are of this host: what their types begin with.
_KEPT_OBJECTS = (
    "iothread", "throttle-group", "memory-backend-ram", "rng-builtin", "rng-random", "can-bus",
    "cryptodev-backend-builtin", "acpi-generic-initiator", "acpi-generic-port",
)  # fmt: skip
_RAM_OBJECTS = ("memory-backend-file", "memory-backend-memfd", "memory-backend-epc", "memory-backend-shm")
_HOST_OBJECTS = (
    "secret", "tls-", "authz-", "filter-", "colo-compare", "input-linux", "input-barrier", "monitor-", "pr-manager-",
    "thread-context", "throttle-", "main-loop", "dbus-vmstate",
)  # fmt: skip
_OF_RAM = frozenset(("id", "size", "merge", "dump", "share", "reserve", "x-use-canonical-path-for-ramblock-id"))
_USB = frozenset(("tablet", "mouse", "keyboard", "wacom-tablet", "ccid"))


class Contents(NamedTuple):
    """The file that a drive gets.

    :ivar file: a qcow2 image, relative to the working directory; "" for an empty drive.
    """

    file: str
    is_read_only: bool = False


class Drive(NamedTuple):
    """A drive of the command line, whose contents are yet to come.

    :ivar name: its node-name, or its id; "" where QEMU makes up the id.
    :ivar is_node: it is a -blockdev.
    :ivar interface: as in ``if=``; "" for the machine's default.
    :ivar kept: its options that stay.
    :ivar text: the option as it was written.
    """

    name: str
    is_node: bool
    interface: str
    kept: Mapping[str, str]
    text: str

    def words(self, contents: Contents) -> tuple[str, str]:
        """The option, and its value, that give the drive these contents."""
        if self.is_node and contents.file:
            file = {"driver": "file", "filename": contents.file}
            node = {"driver": "qcow2", "node-name": self.name, "read-only": contents.is_read_only, "file": file}
            return "-blockdev", json.dumps(node)
        if self.is_node:
            return "-blockdev", json.dumps({"driver": "null-co", "node-name": self.name, "size": 0, "read-only": True})
        more = {"file": contents.file, "format": "qcow2"} if contents.file else {}
        read_only = {"readonly": "on"} if contents.is_read_only else {}
        return "-drive", joined({**self.kept, **more, **read_only})


class GuestDevice(NamedTuple):
    """A -device, or one that another option stands for."""

    model: str
    device_id: str


class HostFile(NamedTuple):
    """A file that is to be copied.

    :ivar path: where QEMU had it.
    :ivar name: in the export.
    """

    path: str
    name: str


class Portable(NamedTuple):
    """What has become of a command line.

    :ivar words: the arguments, with drives yet to be given their contents.
    :ivar refusals: why it cannot be used elsewhere, a clause for each option; then nothing else counts.
    :ivar devices: the devices that the user has given the guest.
    :ivar taps: the taps that QEMU makes, in a network namespace of its own.
    :ivar name: the guest's ``-name``; "" without one.
    :ivar consoles: the names of its serial ports and consoles: each is a socket, and its log has ``.log`` behind that.
    """

    words: list[str | Drive]
    files: list[HostFile]
    refusals: list[str]
    warnings: list[str]
    devices: list[GuestDevice]
    consoles: list[str]
    taps: list[str]
    name: str

    @property
    def drives(self) -> list[Drive]:
        """The drives, in the order of the command line."""
        return [word for word in self.words if isinstance(word, Drive)]

    def finished(self, contents: Mapping[int, Contents]) -> list[str]:
        """The arguments, with the contents of each of :attr:`drives` by its number there."""
        left = iter(range(len(self.drives)))
        found: list[str] = []
        for word in self.words:
            found += word.words(contents[next(left)]) if isinstance(word, Drive) else [word]
        return found


def portable(
    arguments: Sequence[str],
    *,
    machine: str,
    chardevs: Collection[str],
    networks: str,
    is_file: Callable[[str], bool],
) -> Portable:
    """What becomes of *arguments*, which are those after QEMU's name.

    :param machine: the machine type of the VM state; "" if it does not tell.
    :param chardevs: the labels of the chardevs that QEMU has: it makes some by default.
    :param networks: the answer to ``info network``: by default there is a user network, where QEMU has those.
    :param is_file: whether there is a file at a path, as QEMU would find it.
    """
    translation = _Translation([*split(arguments)], is_file)
    return translation.translated(machine, chardevs, networks)


def joined(given: Mapping[str, str], implied: str = "") -> str:
    """Options as QEMU takes them: see :func:`qsnap.targets.command_line.options`.

    :param implied: the key whose value comes first, without the key.
    """
    first = [given[implied].replace(",", ",,")] if implied in given else []
    rest = (f"{key}={value.replace(',', ',,')}" for key, value in given.items() if key != implied)
    return ",".join((*first, *rest))


class _Translation:
    """The translation of one command line. The method ``option_X`` translates an option ``-X`` of that value."""

    def __init__(self, given: Sequence[tuple[str, str]], is_file: Callable[[str], bool]) -> None:
        self._given = given
        self._is_file = is_file
        self._made = Portable([], [], [], [], [], [], [], merged(given, "name", "guest").get("guest", ""))
        #: Which chardevs are consoles, by id.
        self._consoles = {
            found["chardev"]
            for option, value in given
            if option == "device"
            for found in [options(value, "driver")]
            if found.get("driver", "").startswith(_CONSOLES) and "chardev" in found
        } | {value[8:] for option, value in given if option == "serial" and value.startswith("chardev:")}
        #: Everything that a device, the machine or a global property may name a node by.
        self._named = {
            word
            for option, value in given
            if option in ("device", "machine", "global", "set")
            for word in options(value, "").values()
        }
        self._nics = [options(value, "driver") for option, value in given if option == "device"]

    def translated(self, machine: str, chardevs: Collection[str], networks: str) -> Portable:
        for option, value in self._given:
            self._one(option, value)
        self._machine(machine)
        self._defaults(chardevs, networks)
        self._made.words.extend(("-display", "none"))
        return self._made

    def _one(self, option: str, value: str) -> None:
        if option in _LEFT_OUT or option in ("machine", "L", "nographic"):
            return
        handler = getattr(self, f"option_{option.replace('-', '_')}", None)
        if option in _KEPT:
            self._keep(option, value)
        elif option in _FILES:
            self._keep(option, self._copied(option, value))
        elif option in _DRIVES:
            self._drive_of({**_DRIVES[option], "file": value}, f"-{option} {value}")
        elif handler is not None:
            handler(value)
        else:
            self._refuse(option, value, "qsnap does not know what it means on another machine")

    def _keep(self, option: str, value: str) -> None:
        self._made.words.extend((f"-{option}", value) if value else (f"-{option}",))

    def _refuse(self, option: str, value: str, why: str) -> None:
        self._made.refusals.append(f"{f'-{option} {value}'.rstrip()}: {why}")

    def _copied(self, option: str, path: str) -> str:
        """The name under which QEMU finds the copy of a file."""
        if not self._is_file(path):
            self._refuse(option, path, "there is no such file any more")
            return path
        known = next((file.name for file in self._made.files if file.path == path), None)
        name = known or f"{FILES}/{len(self._made.files)}-{Path(path).name}"
        if known is None:
            self._made.files.append(HostFile(path, name))
        return f"{EXPORT}/{name}"

    # The machine

    def _machine(self, machine: str) -> None:
        found = merged(self._given, "machine", "type")
        if machine:
            found["type"] = machine
        if ("nographic", "") in self._given:
            found.setdefault("graphics", "off")
        found.pop("dumpdtb", None)
        for key in ("confidential-guest-support", "memory-encryption"):
            if key in found:
                self._refuse("machine", f"{key}={found[key]}", "only this host has its keys")
        for key in ("kernel", "initrd", "dtb", "firmware"):
            if key in found and (key != "firmware" or self._is_file(found[key])):
                found[key] = self._copied("machine", found[key])
        accelerators = [name for name in found.pop("accel", "").split(":") if name]
        first = ["-machine", joined(found, "type")] if found else []
        self._made.words[:0] = [*first, *(word for name in accelerators for word in ("-accel", name))]

    def option_enable_kvm(self, _: str) -> None:
        self._made.words.extend(("-accel", "kvm"))

    def _defaults(self, chardevs: Collection[str], networks: str) -> None:
        """Say what QEMU would add by itself, where that is connected to this host."""
        given = {option for option, _ in self._given}
        if "serial" not in given and "serial0" in chardevs:
            self.option_serial("vc")
        if not given & {"net", "netdev", "nic", "nodefaults"}:
            self._made.words.extend(("-net", "nic"))
            if "type=user" in networks:
                self._made.words.extend(("-net", "user,restrict=on"))

    def option_cpu(self, value: str) -> None:
        if value.split(",")[0] in ("host", "max"):
            self._made.warnings.append(
                f"-cpu {value} is the CPU of this host: it starts only where there is one like it"
            )
        self._keep("cpu", value)

    # Files

    def option_bios(self, value: str) -> None:
        # Else it is one of QEMU's own
        self._made.words.extend(("-bios", self._copied("bios", value) if self._is_file(value) else value))

    def _with_files(self, option: str, value: str, keys: Sequence[str]) -> None:
        found = options(value, "")
        for key in keys:
            if key in found:
                found[key] = ":".join(self._copied(option, path) for path in found[key].split(":"))
        self._made.words.extend((f"-{option}", joined(found) if found.keys() & set(keys) else value))

    def option_fw_cfg(self, value: str) -> None:
        self._with_files("fw_cfg", value, ("file",))

    def option_smbios(self, value: str) -> None:
        self._with_files("smbios", value, ("file", "path"))

    def option_acpitable(self, value: str) -> None:
        self._with_files("acpitable", value, ("file", "data"))

    def option_boot(self, value: str) -> None:
        kept = {key: one for key, one in options(value, "order").items() if key != "splash"}
        self._made.words.extend(("-boot", joined(kept)))

    def option_icount(self, value: str) -> None:
        kept = {key: one for key, one in options(value, "shift").items() if not key.startswith("rr")}
        if kept:
            self._made.words.extend(("-icount", joined(kept)))

    def option_set(self, value: str) -> None:
        if value.startswith("device."):
            self._keep("set", value)
        else:
            self._refuse("set", value, "it changes what belongs to this host")

    def option_readconfig(self, value: str) -> None:
        self._refuse("readconfig", value, "qsnap reads no such files; put what it says on the command line")

    # Disks and media

    def option_drive(self, value: str) -> None:
        self._drive_of(options(value, ""), f"-drive {value}")

    def _drive_of(self, found: Mapping[str, str], text: str) -> None:
        kept = {key: value for key, value in found.items() if key in _OF_DRIVES}
        if found.get("if") == "virtio":
            self._made.devices.append(GuestDevice("virtio-blk", ""))
        self._made.words.append(Drive(found.get("id", ""), False, found.get("if", ""), kept, text))

    def option_blockdev(self, value: str) -> None:
        name = options(value, "driver").get("node-name", "")
        if name in self._named:
            self._made.words.append(Drive(name, True, "", {}, f"-blockdev {value}"))

    # Devices, and what is behind them

    def option_device(self, value: str) -> None:
        found = options(value, "driver")
        model = found.get("driver", "")
        self._made.devices.append(GuestDevice(model, found.get("id", "")))
        if outside.why_not_saved(model) or outside.is_passed_on(model) or model.startswith(_REFUSED_DEVICES):
            self._refuse("device", value, outside.why_not_saved(model) or "it hands on a piece of this host")
            return
        rom = found.get("romfile", "")
        if Path(rom).is_absolute() and self._is_file(rom):
            value = _with(value, "romfile", self._copied("device", rom))
        self._made.words.extend(("-device", value))

    def option_usbdevice(self, value: str) -> None:
        if value in _USB:
            self._keep("usbdevice", value)
        else:
            self._refuse("usbdevice", value, "it hands on a piece of this host")

    def option_snapshot(self, value: str) -> None:
        self._refuse("snapshot", value, "the disks' contents are in overlays without a name")

    def option_virtfs(self, value: str) -> None:
        self._refuse("virtfs", value, "the directory of this host is not in the snapshot")

    def option_fsdev(self, value: str) -> None:
        self._refuse("fsdev", value, "the directory of this host is not in the snapshot")

    def option_tpmdev(self, value: str) -> None:
        self._refuse("tpmdev", value, "what the TPM keeps is not in the snapshot")

    def option_object(self, value: str) -> None:
        found = options(value, "qom-type")
        kind = found.get("qom-type", "")
        if kind.startswith(_RAM_OBJECTS):
            kept = {key: one for key, one in found.items() if key in _OF_RAM}
            self._made.words.extend(("-object", joined({"qom-type": "memory-backend-ram", **kept}, "qom-type")))
        elif kind == "rng-egd":
            self._made.words.extend(("-object", f"rng-builtin,id={found.get('id', '')}"))
        elif kind in _KEPT_OBJECTS:
            self._made.words.extend(
                ("-object", _without(value, ("host-nodes", "policy", "prealloc", "prealloc-context")))
            )
        elif not kind.startswith(_HOST_OBJECTS):
            self._refuse("object", value, "qsnap does not know what it means on another machine")

    # Chardevs

    def option_chardev(self, value: str) -> None:
        found = options(value, "backend")
        name = found.get("id", "")
        if name in self._consoles:
            self._made.words.extend(("-chardev", self._console(name)))
        elif found.get("backend") in _KEPT_CHARDEVS:
            self._keep("chardev", value)
        else:
            self._made.words.extend(("-chardev", joined({"backend": "null", "id": name}, "backend")))

    def _console(self, name: str) -> str:
        """A chardev on a socket, with a log."""
        socket = f"serial{len(self._made.consoles)}"
        self._made.consoles.append(socket)
        return joined(
            {
                "backend": "socket",
                "id": name,
                "path": socket,
                "server": "on",
                "wait": "off",
                "logfile": f"{socket}.log",
            },
            "backend",
        )

    def option_serial(self, value: str) -> None:
        if value in ("none", "null", "msmouse") or value.startswith("chardev:"):
            self._keep("serial", value)
        else:
            name = f"qsnap-serial{len(self._made.consoles)}"
            self._made.words.extend(("-chardev", self._console(name), "-serial", f"chardev:{name}"))

    def option_parallel(self, value: str) -> None:
        self._keep("parallel", "none" if value == "none" else "null")

    def option_debugcon(self, _: str) -> None:
        self._keep("debugcon", "null")

    # Networks

    def _network(self, option: str, found: Mapping[str, str], card: str) -> None:
        """A network that leads nowhere, for a card of some model."""
        kind = found.get("type", "")
        text = f"{kind},id={found['id']}" if "id" in found else kind
        number = sum(isinstance(word, str) and word.startswith("hubport,") for word in self._made.words)
        if kind in _REFUSED_NETWORKS:
            self._refuse(option, text, "the other half of its card is outside QEMU")
        elif kind in _TAPS and card.startswith(_CARDS_WITH_HEADER):
            kept = {key: one for key, one in found.items() if key in (*_OF_CARDS, *_OF_TAPS)}
            if "fds" in found:
                kept["queues"] = str(len(found["fds"].split(":")))
            name = f"qsnap{len(self._made.taps)}"
            self._made.taps.append(name)
            tap = {"type": "tap", "ifname": name, "script": "no", "downscript": "no", **kept}
            self._made.words.extend((f"-{option}", joined(tap, "type")))
        elif kind == "user":
            kept = {key: one for key, one in found.items() if key in _OF_USER_NETWORKS}
            network = joined({"type": "user", **kept, "restrict": "on"}, "type")
            self._made.words.extend((f"-{option}", network))
        else:
            kept = {key: one for key, one in found.items() if key in _OF_CARDS}
            # Numbers that nobody uses for hubs of his own
            network = joined({"type": "hubport", "hubid": str(7100 + number), **kept}, "type")
            self._made.words.extend((f"-{option}", network))

    def option_netdev(self, value: str) -> None:
        found = options(value, "type")
        card = next((one.get("driver", "") for one in self._nics if one.get("netdev") == found.get("id")), "")
        self._network("netdev", found, card)

    def option_nic(self, value: str) -> None:
        found = options(value, "type")
        if found.get("type") == "none":
            self._keep("nic", value)
        else:
            self._network("nic", found, found.get("model", ""))

    def option_net(self, value: str) -> None:
        found = options(value, "type")
        if found.get("type") in ("nic", "none"):
            self._keep("net", value)
        elif found.get("type") == "user":
            self._network("net", found, "")
        # A card on a hub without another port is connected to nothing

    # Sound

    def option_audiodev(self, value: str) -> None:
        name = options(value, "driver").get("id", "")
        self._made.words.extend(("-audiodev", joined({"driver": "none", "id": name}, "driver")))

    def option_audio(self, value: str) -> None:
        found = options(value, "driver")
        kept = {key: one for key, one in found.items() if key in ("id", "model")}
        self._made.words.extend(("-audio", joined({"driver": "none", **kept}, "driver")))


def _with(value: str, key: str, new: str) -> str:
    """An option's text with another value for a key that it has."""
    if value.startswith("{"):
        document: dict[str, Any] = json.loads(value)
        return json.dumps({**document, key: new})
    return ",".join(f"{key}={new.replace(',', ',,')}" if part.startswith(f"{key}=") else part for part in _parts(value))


def _without(value: str, keys: Collection[str]) -> str:
    """An option's text without some keys."""
    if value.startswith("{"):
        document: dict[str, Any] = json.loads(value)
        return json.dumps({key: one for key, one in document.items() if key not in keys})
    return ",".join(part for part in _parts(value) if re.sub(r"\.\d+$", "", part.partition("=")[0]) not in keys)


def _parts(value: str) -> Iterator[str]:
    """The parts between single commas; doubled ones stay."""
    return (part.replace("\0", ",,") for part in value.replace(",,", "\0").split(","))
