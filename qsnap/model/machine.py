"""The machine that a VM state belongs to, as the migration stream tells of it. No I/O."""

from __future__ import annotations

from qsnap.model.qemu import Struct


class RamBlock(Struct, frozen=True):
    """A RAM block: guest RAM, video memory, or the ROM of a device."""

    name: str
    """Its idstr in the stream: "pc.ram", "0000:00:02.0/virtio-net-pci.rom"."""
    size: int
    """Bytes."""


class Section(Struct, frozen=True):
    """The state of one device."""

    name: str
    """Its idstr in the stream: "serial"; of a PCI device with its address before it: "0000:00:02.0/virtio-net"."""
    instance: int
    """Which of several with that name."""
    version: int
    """The version of its format. A QEMU refuses a later one than its own."""
    size: int
    """Bytes."""


class Machine(Struct, frozen=True):
    """The machine type, with its RAM and its devices."""

    name: str
    """The machine type, without aliases: "pc-q35-7.2"."""
    ram_blocks: tuple[RamBlock, ...]
    sections: tuple[Section, ...]
