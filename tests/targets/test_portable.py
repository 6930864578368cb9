"""What becomes of QEMU's command line elsewhere: devices stay, and what is behind them on this host goes."""

from __future__ import annotations

import json
import shlex

import pytest

from qsnap.targets.portable import Contents, Portable, portable

pytestmark = pytest.mark.no_qemu


def made(line: str, *, machine: str = "", chardevs: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> Portable:
    return portable(
        shlex.split(line), machine=machine, chardevs=chardevs, networks="type=user", is_file=lambda path: path in files
    )


def words(line: str, **more: tuple[str, ...]) -> str:
    """The arguments for a command line without a card, without the display that all get."""
    found = made(f"-nic none {line}", **more)  # type: ignore[arg-type]
    assert found.refusals == []
    contents = {number: Contents(f"d{number}") for number in range(len(found.drives))}
    text = shlex.join(found.finished(contents))
    assert "-nic none" in text
    return text.replace("-nic none", "", 1).removesuffix("-display none").replace("  ", " ").strip()


CONSOLE = "socket,id={},path=serial{},server=on,wait=off,logfile=serial{}.log"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-m 2G -smp 4,cores=2 -cpu qemu64 -uuid 1 -rtc utc", "-m 2G -smp 4,cores=2 -cpu qemu64 -uuid 1 -rtc utc"),
        ("-S -daemonize -pidfile p -name a,debug-threads=on -sandbox on -monitor stdio -qmp unix:x -D log -d int", ""),
        ("-mon chardev=m -chardev socket,id=m,path=/run/m,server=on", "-chardev null,id=m"),
        ("-object monitor-qmp,id=m,chardev=c -object tls-creds-x509,id=t,dir=/etc -dfilter 0x0", ""),
        ("-vnc :1 -spice port=1 -display gtk -loadvm x -incoming defer", ""),
        ("-enable-kvm", "-accel kvm"),
        ("-machine pc,accel=kvm:tcg,usb=on", "-machine pc,usb=on -accel kvm -accel tcg"),
        ("-M pc -machine usb=on", "-machine pc,usb=on"),
        ("-M pc,firmware=bios.bin", "-machine pc,firmware=bios.bin"),
        ("-device e1000,romfile=/gone", "-device e1000,romfile=/gone"),
        ("-nographic", "-machine graphics=off"),
        (
            "-chardev pty,id=c -device isa-serial,chardev=c",
            f"-chardev {CONSOLE.format('c', 0, 0)} -device isa-serial,chardev=c",
        ),
        ("-chardev pty,id=c -serial chardev:c", f"-chardev {CONSOLE.format('c', 0, 0)} -serial chardev:c"),
        ("-serial mon:stdio", f"-chardev {CONSOLE.format('qsnap-serial0', 0, 0)} -serial chardev:qsnap-serial0"),
        ("-serial none -parallel none", "-serial none -parallel none"),
        ("-parallel /dev/lp0 -debugcon file:x", "-parallel null -debugcon null"),
        (
            "-chardev socket,id=c,path=/x -device virtserialport,chardev=c",
            "-chardev null,id=c -device virtserialport,chardev=c",
        ),
        (
            "-netdev user,id=n,net=10.1.0.0/24,hostfwd=tcp::22-:22,smb=/x -device e1000,netdev=n",
            "-netdev user,id=n,net=10.1.0.0/24,restrict=on -device e1000,netdev=n",
        ),
        (
            "-netdev tap,id=n,ifname=tap0 -device e1000,netdev=n -netdev socket,id=o,listen=:1",
            "-netdev hubport,hubid=7100,id=n -device e1000,netdev=n -netdev hubport,hubid=7101,id=o",
        ),
        ("-nic tap,model=e1000,mac=52:54:00:00:00:01,script=x",
         "-nic hubport,hubid=7100,model=e1000,mac=52:54:00:00:00:01"),
        ("-net nic -net tap,ifname=x", "-net nic"),
        ("-audiodev pa,id=a,server=x -device intel-hda", "-audiodev none,id=a -device intel-hda"),
        ("-object memory-backend-file,id=r,size=1G,mem-path=/dev/shm/x,share=on,prealloc=on",
         "-object memory-backend-ram,id=r,size=1G,share=on"),
        ("-object secret,id=s,data=letmein -object iothread,id=i", "-object iothread,id=i"),
        ("-mem-path /dev/hugepages -mem-prealloc -overcommit mem-lock=on", ""),
        ("-boot c,splash=/x.jpg", "-boot order=c"),
        ("disk.img", "-drive index=0,media=disk,file=d0,format=qcow2"),
        ("-cdrom x.iso", "-drive index=2,media=cdrom,file=d0,format=qcow2"),
        (
            "-drive if=virtio,file=a,,b,cache=none,aio=native,id=x,iops=3,werror=stop",
            "-drive if=virtio,id=x,werror=stop,file=d0,format=qcow2",
        ),
    ],
)  # fmt: skip
def test_what_stays_and_what_is_replaced(line: str, expected: str) -> None:
    assert words(line) == expected


def test_the_machine_is_the_one_that_the_state_names() -> None:
    assert made("-M q35,smm=off", machine="pc-q35-7.2").finished({})[:2] == ["-machine", "pc-q35-7.2,smm=off"]
    assert made("-m 1", machine="pc-i440fx-7.2").finished({})[:2] == ["-machine", "pc-i440fx-7.2"]


def test_what_qemu_adds_by_itself_is_written_down() -> None:
    found = made("-m 1", chardevs=("serial0", "parallel0"))
    assert found.consoles == ["serial0"]
    assert found.finished({})[-8:-2] == ["-serial", "chardev:qsnap-serial0", "-net", "nic", "-net", "user,restrict=on"]


def test_nodes_below_filters_are_one_image() -> None:
    """Only the node that a device names stays; what it stood on is in the image."""
    file = json.dumps({"driver": "file", "node-name": "f", "filename": "/x"})
    top = json.dumps({"driver": "throttle", "node-name": "top", "throttle-group": "g", "file": "f"})
    found = made(f'-blockdev \'{file}\' -blockdev \'{top}\' -device \'{{"driver": "virtio-blk", "drive": "top"}}\'')
    (drive,) = found.drives
    assert (drive.name, drive.is_node) == ("top", True)
    option, text = drive.words(Contents("d0", is_read_only=True))
    assert option == "-blockdev"
    assert json.loads(text) == {
        "driver": "qcow2", "node-name": "top", "read-only": True, "file": {"driver": "file", "filename": "d0"}
    }  # fmt: skip
    assert json.loads(drive.words(Contents(""))[1])["driver"] == "null-co"


def test_a_drive_that_was_read_only_is_so_again() -> None:
    (disk,) = made("-drive file=a").drives
    assert disk.words(Contents("d0", is_read_only=True)) == ("-drive", "file=d0,format=qcow2,readonly=on")
    assert disk.words(Contents("d0")) == ("-drive", "file=d0,format=qcow2")


def test_files_are_copied() -> None:
    files = ("vmlinuz", "/a/initrd", "/a/rom", "s.bin", "t1", "t2")
    line = (
        "-kernel vmlinuz -initrd /a/initrd -append ro -bios bios.bin -device e1000,romfile=/a/rom "
        "-fw_cfg name=opt/x,file=s.bin -fw_cfg name=opt/y,string=z -acpitable file=t1:t2 -kernel vmlinuz"
    )
    found = made(f"{line} -nic none", files=files)
    assert [(file.path, file.name) for file in found.files] == [
        ("vmlinuz", "files/0-vmlinuz"), ("/a/initrd", "files/1-initrd"), ("/a/rom", "files/2-rom"),
        ("s.bin", "files/3-s.bin"), ("t1", "files/4-t1"), ("t2", "files/5-t2"),
    ]  # fmt: skip
    assert words(line, files=files) == (
        "-kernel export/files/0-vmlinuz -initrd export/files/1-initrd -append ro -bios bios.bin "
        "-device e1000,romfile=export/files/2-rom -fw_cfg name=opt/x,file=export/files/3-s.bin "
        "-fw_cfg name=opt/y,string=z -acpitable file=export/files/4-t1:export/files/5-t2 -kernel export/files/0-vmlinuz"
    )


@pytest.mark.parametrize(
    "line",
    [
        "-device vfio-pci,host=01:00.0", "-device usb-host,vendorid=1", "-device vhost-user-blk-pci,chardev=c",
        "-device tpm-tis,tpmdev=t", "-tpmdev emulator,id=t,chardev=c", "-device ivshmem-plain,memdev=m",
        "-device scsi-block,drive=d", "-virtfs local,path=/,mount_tag=t", "-fsdev local,id=f,path=/",
        "-readconfig x.cfg", "-snapshot", "-kernel missing", "-machine kernel=missing", "-set drive.d.file=x",
        "-usbdevice braille", "-object sev-guest,id=s", "-machine confidential-guest-support=s",
        "-netdev vhost-user,id=n,chardev=c", "-newer-than-qsnap x",
    ],
)  # fmt: skip
def test_what_cannot_be_used_elsewhere_is_refused_by_name(line: str) -> None:
    (refusal,) = made(line).refusals
    option, value = line.split()[0], line.split()[1:]
    assert option in refusal
    assert not value or value[0].split(",")[0].split("=")[-1] in refusal


def test_a_tap_under_a_virtio_card_stays_a_tap() -> None:
    """QEMU does not load a virtio-net that had an offload header into one without. It leads nowhere, either."""
    tap = "ifname=qsnap0,script=no,downscript=no"
    found = made("-netdev tap,id=n,br=x,vhost=on,fds=3:4 -device virtio-net-pci,netdev=n")
    assert (found.taps, found.refusals) == (["qsnap0"], [])
    assert found.finished({})[:2] == ["-netdev", f"tap,{tap},id=n,queues=2"]
    found = made("-nic bridge,br=br0,model=virtio-net-pci")
    assert found.finished({})[:2] == ["-nic", f"tap,{tap},model=virtio-net-pci"]


def test_the_guest_s_name_and_a_cpu_that_is_the_host_s() -> None:
    found = made("-name guest=web,process=x -cpu host,+vmx")
    assert found.name == "web"
    assert "-cpu host,+vmx" in found.warnings[0]
