"""Arguments for QEMU: disks and firmware of all kinds."""

from __future__ import annotations

from pathlib import Path

from support.guest import blockdev, make_boot_disk, make_disk


def disk(d: Path, name: str, driver: str = "qcow2", *, device: str = "virtio-blk") -> list[str]:
    return [*blockdev(name, make_disk(d / name, "1M", driver), driver), "-device", f"{device},drive={name}"]


def attached(node: str) -> list[str]:
    return ["-device", f"virtio-blk,drive={node}"]


def one_disk(d: Path) -> list[str]:
    return [*blockdev("a", make_boot_disk(d / "a")), "-device", "virtio-blk,drive=a"]


def filters(d: Path) -> list[str]:
    make_boot_disk(d / "a")
    return [
        "-object", "throttle-group,id=tg",
        *blockdev("fmt", d / "a"),
        "-blockdev", "driver=throttle,node-name=thr,throttle-group=tg,file=fmt",
        "-blockdev", "driver=copy-on-read,node-name=cor,file=thr",
        "-blockdev", "driver=raw,node-name=top,file=cor",
        "-device", "virtio-blk,drive=top",
    ]  # fmt: skip


def pflash_raw(d: Path) -> list[str]:
    return [
        *one_disk(d),
        *firmware(d),
        "-drive",
        f"if=pflash,format=raw,file={make_disk(d / 'vars', '256k', 'raw')}",
    ]


def firmware(d: Path) -> list[str]:
    """SeaBIOS in flash: a machine with a variable store must boot from flash."""
    return ["-drive", f"if=pflash,format=raw,readonly=on,file={bios()}"]


def bios() -> Path:
    return next(path for path in map(Path, BIOS_PATHS) if path.exists())


BIOS_PATHS = ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin")
