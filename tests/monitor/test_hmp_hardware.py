"""What HMP says of the machine, as QEMU 7.2 prints it."""

from __future__ import annotations

import pytest

from qsnap.monitor.hmp import hardware

pytestmark = pytest.mark.no_qemu

TREE = """bus: main-system-bus
  type System
  dev: q35-pcihost, id ""
    bus: pcie.0
      type PCIE
      dev: pcie-root-port, id "rp"
        port = 0 (0x0)
        addr = 04.0
        class PCI bridge, addr 00:04.0, pci id 1b36:000c (sub 0000:0000)
        bar 0: mem at 0xffffffffffffffff [0xffe]
        bus: rp
          type PCIE
          dev: virtio-blk-pci, id ""
            class = 0 (0x0)
            addr = 00.0
            class SCSI controller, addr 01:00.0, pci id 1af4:1042 (sub 1af4:1100)
            bus: virtio-bus
              dev: virtio-blk-device, id ""
      dev: e1000, id "a, id \\""
        addr = 03.0
        class Ethernet controller, addr 00:03.0, pci id 8086:100e (sub 1af4:1100)
  dev: fw_cfg_io, id ""
"""


def test_pci_devices() -> None:
    """Of those behind a bridge, the bridge's slot comes first."""
    expected = {
        "0000:00:04.0": ("pcie-root-port", "1b36:000c"),
        "0000:00:04.0:00.0": ("virtio-blk-pci", "1af4:1042"),
        "0000:00:03.0": ("e1000", "8086:100e"),
    }
    assert hardware.pci_devices(TREE.replace("\n", "\r\n")) == expected
    assert hardware.pci_devices("unknown command: 'info qtree'") == {}


def test_several_root_buses() -> None:
    """Which of them a device is on, the text does not tell."""
    assert hardware.pci_devices(TREE + '  dev: pxb-pcie, id ""\n') == {}


def test_machine_type() -> None:
    assert hardware.machine_type('"pc-q35-7.2-machine"\r\n') == "pc-q35-7.2"
    assert hardware.machine_type("Error: Property not found") == ""
    assert hardware.machine_type("17") == ""


def test_cpu_model() -> None:
    text = 'Hotpluggable CPUs:\r\n  type: "Haswell-v4-x86_64-cpu"\r\n  vcpus_count: "1"\r\n'
    assert hardware.cpu_model(text) == "Haswell-v4"
    assert hardware.cpu_model('  type: "cortex-a57-arm-cpu"\n') == "cortex-a57"
    assert hardware.cpu_model("Error: unsupported") == ""


def test_accelerator() -> None:
    assert hardware.accelerator("kvm support: enabled\r\n") == "kvm"
    assert hardware.accelerator("kvm support: disabled\r\n") == "tcg"
    assert hardware.accelerator("unknown command: 'info kvm'") == ""


def test_vcpus() -> None:
    assert hardware.vcpus("* CPU #0: thread_id=81\r\n  CPU #1: thread_id=82\r\n") == 2
    assert hardware.vcpus("") == 0
