"""QEMU's command line, read as its own ``lookup_opt``, ``qemu_opts_parse`` and ``qemu_chr_parse_compat`` do. Pure.

What a ``-readconfig`` file or a later ``chardev-add`` says is not seen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from qsnap.monitor.address import NO_SOCKET, Address, TcpAddress, UnixAddress, is_on, obstacle
from qsnap.targets.vms import DEFAULT_MEMORY, MonitorPoint, MonitorState, RunningVM

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


def qemu_arguments(argv: Sequence[str], exe: str = "") -> Sequence[str] | None:
    """What follows QEMU's own name in a process's arguments; None for a process that is not a QEMU.

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
    given = list(split(arguments))
    objects = [options(value, "qom-type") for option, value in given if option == "object"]
    chardevs = {found.get("id", ""): found for option, value in given if option == "chardev"
                for found in [options(value, "backend")]}  # fmt: skip
    uuids = [value for option, value in given if option == "uuid"]
    is_libvirts = _is_libvirts(objects, chardevs)
    return RunningVM(
        pid=pid,
        uid=uid,
        user=user,
        name=merged(given, "name", "guest").get("guest"),
        uuid=uuids[-1] if uuids else None,
        memory=_memory(given, objects),
        disks=tuple(disk for option, value in given if (disk := _disk(option, value))),
        monitors=tuple(_monitors(given, chardevs, cwd, is_libvirts=is_libvirts)),
        managed_by="libvirt" if is_libvirts else None,
    )


def split(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
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
    name = word.removeprefix("-").removeprefix("-")
    return "machine" if name == "M" else name


def options(text: str, implied: str) -> dict[str, str]:
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


def merged(given: Sequence[tuple[str, str]], wanted: str, implied: str) -> dict[str, str]:
    """An option that QEMU merges where it is given more than once."""
    found: dict[str, str] = {}
    for option, value in given:
        if option == wanted:
            found |= options(value, implied)
    return found


def _memory(given: Sequence[tuple[str, str]], objects: Sequence[Mapping[str, str]]) -> int:
    """Bytes of RAM: what ``-m`` says, else the machine's memory backend, else QEMU's default."""
    size = _size(merged(given, "m", "size").get("size", ""), "m")
    backend = merged(given, "machine", "type").get("memory-backend")
    for found in objects if backend else ():
        if found.get("id") == backend:
            size = size or _size(found.get("size", ""), "b")
    return size or DEFAULT_MEMORY


def _size(text: str, unit: str) -> int:
    """Bytes: ``2G`` is 2 GiB, and a plain number counts *unit*; 0 for what is not a size."""
    match = _SIZE.fullmatch(text)
    if not match:
        return 0
    digits, suffix = match.groups()
    # In hexadecimal, "b" and "e" are digits.
    number = int(digits, 16) if digits[:2] in ("0x", "0X") else float(digits)
    return int(number * 1024 ** "bkmgtpe".index(suffix.lower() or unit))


def _disk(option: str, value: str) -> str:
    """What to call the disk of an option; "" where it is none, or the file is another option's."""
    if option in _DISKS:
        return value
    if option == "drive":
        found = options(value, "")
        return found.get("file") or found.get("file.filename") or found.get("id", "")
    if option == "blockdev":
        found = options(value, "driver")
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
            mon = options(value, "chardev")
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
        return {"backend": "socket", **options(rest, "path")}
    if kind in ("tcp", "telnet", "tn3270", "websocket"):
        match = re.match(r"(\[[^\]]*\]|[^:,]*):([^,]*),?", rest)
        if match:
            more = options(rest[match.end() :], "")
            speaks = {} if kind == "tcp" else {kind: "on"}
            return {"backend": "socket", "host": match[1], "port": match[2], **speaks, **more}
    return {"backend": re.split("[:,]", text)[0]}


def _point(protocol: Literal["qmp", "hmp"], device: Mapping[str, str], cwd: str | None) -> MonitorPoint:
    address, reason = _address(device, cwd)
    state = MonitorState.UNUSABLE if reason else MonitorState.UNKNOWN
    return MonitorPoint(protocol=protocol, address=address, state=state, reason=reason)


def _address(device: Mapping[str, str], cwd: str | None) -> tuple[Address | None, str]:
    """Where a chardev listens, and why qsnap cannot connect to it all the same; "" where it can."""
    backend = device.get("backend", "")
    if backend == "missing":
        return None, f"is on chardev {device['id']!r}, which the command line does not define"
    if backend != "socket":
        return None, NO_SOCKET.get(backend, f"is on a device of kind {backend!r}, and not on a socket")
    reason = obstacle(device)
    if "fd" in device or is_on(device, "abstract"):
        return None, reason
    if not is_on(device, "server"):
        return None, "is a connection that QEMU has made, as its client, to another program"
    if "path" in device:
        address, no_address = _unix(device["path"], cwd)
    else:
        address, no_address = _tcp(device.get("host", ""), device.get("port", ""))
    return address, no_address or reason


def _unix(path: str, cwd: str | None) -> tuple[Address | None, str]:
    if not path or "\0" in path:
        return None, "is on a socket without a path"
    if not path.startswith("/") and cwd is None:
        return None, f"is at {path!r}, relative to a directory that cannot be seen"
    return UnixAddress(os.path.join(cwd or "/", path)), ""


def _tcp(host: str, port: str) -> tuple[Address | None, str]:
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        return None, f"is on TCP port {port!r}, which is not a number"
    return TcpAddress(host.strip("[]") or "localhost", int(port)), ""
