"""Devices with a part outside QEMU, which the block layer and the VM state do not know. Pure.

Devices that write into the guest's RAM from outside spoil a live save: the protection of RAM during a live save
(userfaultfd) covers QEMU's own page tables alone, so that the save mixes RAM of several moments (seen with a process
that has the guest's memory mapped, on 7.2 and 11.1).

QEMU's savevm does not report them: it saves, reports success, and a load puts RAM back beside contents of another
moment (seen with vhost-user-blk, virtio-pmem and cxl-type3 on 7.2 and 11.1). They are recognised by their model (QOM
type) alone. nvdimm and ivshmem are not among them: their memory is in the VM state. virtio-9p is not either: QEMU
refuses to save while the guest has it mounted.
"""

from __future__ import annotations

#: Models that keep the guest's data outside, by what their names begin with, and where the data are.
_NOT_SAVED = {
    "vhost-user-blk": "its disk is served by another process (vhost-user)",
    "vhost-user-scsi": "its disks are served by another process (vhost-user)",
    "vhost-scsi": "its disks are served by the host's kernel (vhost)",
    "vhost-user-fs": "its files are in a directory of the host (virtiofs)",
    "virtio-pmem": "its contents are in its memory backend, which QEMU leaves out of the VM state",
    "cxl-type3": "its contents are in its memory backends, which QEMU leaves out of the VM state",
}
#: Models that pass on whatever the host has: a disk, or something that holds no data.
_PASSED_ON = (
    "usb-host",
    "usb-redir",
    "vfio-",
    "vhost-vdpa-device",
    "vhost-user-device",
    "vhost-user-test-device",
    "x-pci-proxy-dev",
)


#: Models whose other half, a process or a piece of hardware, writes into guest memory by itself.
_WRITERS = ("vhost-user-", "vhost-vdpa", "vfio-", "ivshmem", "x-pci-proxy-dev")
#: Objects (-object) of the same kind.
_WRITING_OBJECTS = ("cryptodev-vhost-user", "x-remote-object")


def writes_ram(model: str) -> bool:
    """Whether a device or object of that model has guest memory written from outside QEMU."""
    return model.startswith((*_WRITERS, *_WRITING_OBJECTS))


#: Models that leave the guest's RAM alone while it is stopped, whatever comes from outside, by what their names begin
#: with: disks (their requests have ended), network cards (they take no packet), input (it is dropped), and what has
#: nothing outside.
_STILL = (
    "virtio-blk", "virtio-scsi", "virtio-net", "virtio-balloon", "virtio-mem", "virtio-keyboard", "virtio-mouse",
    "virtio-tablet", "virtio-gpu", "virtio-vga", "scsi-hd", "scsi-cd", "ide-", "nvme", "ahci", "ich9-", "lsi53c",
    "mptsas", "megasas", "pvscsi", "am53c974", "floppy", "isa-fdc", "e1000", "igb", "rtl8139", "vmxnet3", "ne2k_",
    "pcnet", "i82", "tulip", "VGA", "secondary-vga", "cirrus-vga", "bochs-display", "ramfb", "vmware-svga", "qemu-xhci",
    "nec-usb-xhci", "usb-ehci", "piix3-", "piix4-", "usb-tablet", "usb-kbd", "usb-mouse", "usb-hub", "usb-storage",
    "pc-dimm", "nvdimm", "isa-serial", "pci-serial", "isa-debug", "pvpanic", "pcie-", "pci-bridge", "ioh3420", "pxb",
    "x3130-", "xio3130-", "i6300esb", "ib700", "vmcoreinfo", "vmgenid", "intel-iommu", "amd-iommu", "tpm-",
)  # fmt: skip


def is_still(model: str) -> bool:
    """Whether a device of that model is known to leave guest memory alone while the guest is stopped."""
    return model.startswith(_STILL) or model.endswith("-x86_64-cpu")


def why_not_saved(model: str) -> str:
    """Where a device of that model keeps the guest's data, in words; "" if that is inside QEMU."""
    return next((where for prefix, where in _NOT_SAVED.items() if model.startswith(prefix)), "")


def is_passed_on(model: str) -> bool:
    """Whether a device of that model may be a disk of the host's, as far as the model tells."""
    return model.startswith(_PASSED_ON)
