"""What HMP says of guest RAM, as QEMU 7.2 and 11.1 print it."""

from __future__ import annotations

import pytest

from qsnap.monitor.hmp import ram

pytestmark = pytest.mark.no_qemu

OLD = """              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000100000000 0x0000000100000000
    /rom@etc/acpi/tables    4 KiB  0x00000001210c0000 0x0000000000020000 0x0000000000200000
            /objects/big    2 MiB  0x0000000100000000 0x0000000020000000 0x0000000020000000
"""
NEW = """Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000100000000 0x0000000100000000 0x00007f6ddbe00000  rw
                 pc.bios    4 KiB  0x0000000120000000 0x0000000000040000 0x0000000000040000 0x00007f6f21a00000  ro
"""
VIEWS = """FlatView #0
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000bfffffff (prio 0, ram): pc.ram @00000000000c0000
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000013fffffff (prio 0, ram): pc.ram @00000000c0000000 KVM
"""
ROMS = """fw=genroms/kvmvapic.bin size=0x002400 name="kvmvapic.bin"
addr=00000000fffc0000 size=0x040000 mem=rom name="bios-256k.bin"
addr=0000000001000000 size=0x003a98 mem=ram name="/tmp/a file"
/rom@etc/acpi/tables size=0x200000 name="etc/acpi/tables"
"""


def test_blocks() -> None:
    """That of the ACPI tables may become larger."""
    assert ram.ram_blocks(OLD.replace("\n", "\r\n")) == [
        ("pc.ram", 1 << 32, 1 << 32, None),
        ("/rom@etc/acpi/tables", 0x20000, 0x200000, None),
        ("/objects/big", 512 << 20, 512 << 20, None),
    ]
    assert ram.ram_blocks(NEW) == [
        ("pc.ram", 1 << 32, 1 << 32, 0x7F6DDBE00000),
        ("pc.bios", 0x40000, 0x40000, 0x7F6F21A00000),
    ]
    assert ram.ram_blocks("unknown command: 'info ramblock'") == []


def test_ranges() -> None:
    assert ram.ram_ranges(VIEWS.replace("\n", "\r\n")) == [
        ("pc.ram", 0, 0, False), ("pc.ram", 0xC0000, 0xC0000, False), ("pc.bios", 0xFFFC0000, 0, True),
        ("pc.ram", 1 << 32, 0xC0000000, False),
    ]  # fmt: skip
    assert ram.ram_ranges("") == []


def test_addresses() -> None:
    answer = "Host virtual address for 0x100000000 (pc.ram) is 0x7ffb37e00000\r\n"
    assert ram.host_address(answer, "pc.ram") == 0x7FFB37E00000
    assert ram.host_address(answer, "vga.vram") is None
    assert ram.host_address("No memory is mapped at address 0xf0000000", "pc.ram") is None


def test_roms() -> None:
    assert ram.roms_in_ram(ROMS) == ["/tmp/a file"]
