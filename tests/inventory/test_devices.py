"""The rules of the devices, on block graphs without a QEMU."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from qsnap.inventory import devices as rules
from qsnap.model.qemu import BlockBackend, BlockJob, BlockNode, Peripheral, RunState
from qsnap.operations.findings import runstate_findings
from support.graphs import graph, node, over

pytestmark = pytest.mark.no_qemu


@pytest.mark.parametrize("state", ["inmigrate", "postmigrate", "finish-migrate", "preconfig", "colo", "save-vm"])
def test_run_states_that_must_not_be_touched(state: str) -> None:
    (finding,) = runstate_findings(RunState(state))
    assert finding.refuses
    assert state in finding.message
    assert finding.cure


@pytest.mark.parametrize("state", ["running", "paused", "prelaunch", "guest-panicked", "io-error", "suspended"])
def test_run_states_that_may_be_saved(state: str) -> None:
    assert list(runstate_findings(RunState(state))) == []


def test_rbd_can_snapshot_but_holds_no_state() -> None:
    survey = rules.survey(graph(node("r", "rbd"), node("q")))
    assert [d.verdict for d in survey.devices] == ["saved", "saved"]
    assert survey.vmstate == "q"
    assert rules.survey(graph(node("r", "rbd"))).findings[0].code == "no-vmstate-device"


def test_a_qemu_that_tells_no_edges() -> None:
    survey = rules.survey(graph(node("q"), node("f", "throttle"), has_edges=False))
    assert [d.verdict for d in survey.devices] == ["saved", "refused"]
    assert "does not tell" in survey.devices[1].why


def test_pflash_of_the_other_kind_is_not_carried() -> None:
    for model, driver, chooses, verdict in (
        ("cfi.pflash01", "raw", True, "carried"), ("cfi.pflash01", "qcow2", True, "saved"),
        ("cfi.pflash01", "raw", False, "refused"), ("cfi.pflash02", "raw", True, "refused"),
        ("virtio-blk", "raw", True, "refused"),
    ):  # fmt: skip
        flash = BlockBackend(qdev="/machine/system.flash1", qdev_type=model, root="v")
        (device,) = rules.survey(graph(node("v", driver), backends=(flash,), chooses_devices=chooses)).devices
        assert device.verdict == verdict
        assert device.role == ("disk" if model == "virtio-blk" else "pflash")


def test_what_lies_below_an_image() -> None:
    """A node that nothing is told to lie below is not itself what stores the image."""
    known = graph(node("q", children=(("file", "p"),)), node("p", "file", filename="/p"))
    assert (rules.protocol(known, "q"), rules.protocol(known, "p")) == (known.nodes["p"], None)


def test_names_for_a_command_line() -> None:
    assert rules.for_shell("disk0", "drive0") == "disk0"
    assert rules.for_shell("#block123", "drive0") == "drive0"
    assert rules.for_shell("#block123") == "'#block123'"


@pytest.mark.parametrize(
    ("backend", "role"),
    [
        (BlockBackend(qdev="/m", qdev_type="virtio-blk-pci", root="used"), "disk"),
        (BlockBackend(qdev="/m", qdev_type="scsi-cd", root="used"), "cdrom"),
        (BlockBackend(qdev="/m", qdev_type="floppy", root="used"), "floppy"),
        (BlockBackend(qdev="/m", qdev_type="cfi.pflash02", root="used"), "pflash"),
        (BlockBackend(root="used"), "export or job"),
        (BlockBackend(name="spare", root="used"), "unattached node"),
        (BlockBackend(root="nobody_s"), "unattached node"),
    ],
)
def test_what_a_device_is_for_the_guest(backend: BlockBackend, role: str) -> None:
    (device, *_) = rules.survey(graph(node(str(backend.root)), backends=(backend,), with_parents={"used"})).devices
    assert device.role == role


def test_what_counts_as_a_device() -> None:
    """Each node once, and what nobody uses behind; of empty drives those that somebody can name."""
    drives = (
        BlockBackend(qdev="/machine/unattached/device[0]"), BlockBackend(name="floppy0"), BlockBackend(),
        BlockBackend(qdev="/m", root="a"), BlockBackend(root="a"),
    )  # fmt: skip
    nodes = (over("a", "qcow2", "f"), node("f", "file"), node("b"))
    for told, expected in ({"f"}, ["a", "b"]), ({"a", "f", "b"}, ["a"]):
        survey = rules.survey(graph(*nodes, backends=drives, with_parents=told))
        assert [(d.node, d.device, d.why) for d in survey.devices[:2]] == [(None, "device[0]", "empty"),
                                                                          (None, "floppy0", "empty")]  # fmt: skip
        assert [d.node for d in survey.devices[2:]] == expected
    alone = rules.survey(graph(*nodes, backends=drives, with_parents={"f"}, has_edges=False))
    assert [d.node for d in alone.devices] == [None, None, "a"], "who cannot tell what is used names no spare ones"


@pytest.mark.parametrize(
    ("top", "image"),
    [
        (over("top", "throttle", "q"), "q"),
        (over("top", "mirror_top", "q", edge="backing"), "q"),
        (node("top", "copy-before-write", children=(("target", "other"), ("file", "q"))), "q"),
        (node("top", "raw", children=(("file", "q"), ("backing", "other"))), "q"),
        (over("top", "quorum", "q"), None),
        (over("top", "quorum", "q", "other"), None),
        (over("top", "raw", "q", read_only=True), None),
        (over("top", "raw", "q", active=False), None),
        (over("top", "raw", "not told"), None),
        (node("top", "raw"), None),
    ],
)
def test_the_image_below_a_device(top: BlockNode, image: str | None) -> None:
    below = graph(top, node("q"), node("other", "raw"))
    assert [one.node_name for one in rules.path_to_image(below, "top")] == (["top", image] if image else [])
    (device, *_) = rules.survey(below).devices
    assert (device.image, device.why) == (image, "in its image q") if image else device.image is None
    assert rules.path_to_image(below, None) == rules.path_to_image(below, "nobody's") == ()
    assert rules.survey(below).devices[-1].why != "in its image other"


def test_what_lies_below_a_node() -> None:
    """Each once, whatever ways lead there; what QEMU does not tell of is a name and no more."""
    two = graph(
        over("q", "quorum", "a", "b"), over("a", "raw", "f"), over("b", "raw", "f", "hidden"), node("f", "file")
    )
    assert rules.at_or_below(two, "q") == ["q", "a", "b", "f", "hidden"]
    assert rules.at_or_below(two, None) == []
    devices = rules.survey(graph(*two.nodes.values(), node("z"), backends=(
        BlockBackend(name="cd"), BlockBackend(root="z"), BlockBackend(root="q")
    ))).devices  # fmt: skip
    assert [d.node for d in devices] == [None, "z", "q"]
    assert rules.device_above(two, devices, "f") == devices[2]
    assert rules.device_above(two, devices, "other") is None


def test_what_stores_an_image() -> None:
    known = graph(
        over("q", "qcow2", "d"), over("d", "blkdebug", "p", edge="image"), node("p", "file"),
        over("n", "qcow2", "far"), node("far", "nbd"), over("lost", "qcow2", "not told"),
    )  # fmt: skip
    assert (rules.protocol(known, "q"), rules.image_file(known, "q")) == (known.nodes["p"], known.nodes["p"])
    assert (rules.protocol(known, "n"), rules.image_file(known, "n")) == (known.nodes["far"], None)
    for image in "p", "lost", "nobody's":
        assert rules.protocol(known, image) is rules.image_file(known, image) is None


def test_names_that_people_know() -> None:
    """QEMU's own for what has no other; and one that somebody has given stays."""
    drives = (
        BlockBackend(name="cd"), BlockBackend(name="hd0", root="#top"), BlockBackend(root="#spare"),
        BlockBackend(name="hd1", root="mine"),
    )  # fmt: skip
    nodes = (over("#top", "throttle", "#fmt"), node("#fmt"), node("#spare"), node("mine"))
    devices = rules.survey(graph(*nodes, backends=drives)).devices
    assert rules.labels(devices) == {"#top": "hd0", "#fmt": "hd0"}
    assert rules.displayed(["#fmt", "#spare", "mine"], devices) == ["hd0", "#spare", "mine"]


def test_leaving_devices_out() -> None:
    """By any name. What that does not change is said; what there is not is refused, with the names of what there is."""
    guest = graph(
        over("top", "throttle", "fmt"), node("fmt"), node("r", "raw"), node("ro", read_only=True), node("v", "raw"),
        peripherals=(
            Peripheral(path="/machine/peripheral/vub", model="vhost-user-blk-pci"),
            Peripheral(path="/machine/peripheral/usb", model="usb-host"),
        ),
    )  # fmt: skip
    flash = BlockBackend(qdev="/machine/flash", qdev_type="cfi.pflash01", root="v")
    guest = msgspec.structs.replace(guest, backends=(*guest.backends[:3], flash))
    for names in (["fmt", "r", "vub"], ["top", "/machine/peripheral/r", "/machine/peripheral/vub"]):
        left = rules.survey(guest, exclude=names)
        assert [d.verdict for d in left.devices] == ["excluded", "excluded", "ignored", "carried", "excluded"]
        assert {d.why for d in left.devices if d.verdict == "excluded"} == {
            "left out as asked: a load will leave its contents as they are then"
        }
        assert [one.code for one in left.findings] == ["device-passed-on", "no-vmstate-device"]
        assert left.devices[-1].cure == ""
    mixed = rules.survey(guest, exclude=["nope", "v", "ro"])
    assert [(one.code, one.refuses) for one in mixed.findings] == [
        ("exclude-carried", False), ("device-cannot-snapshot", True), ("device-cannot-snapshot", True),
        ("device-passed-on", False), ("exclude-unknown", True),
    ]  # fmt: skip
    assert mixed.findings[0].message.startswith("--exclude flash changes nothing: its contents travel inside")
    assert [one.node for one in mixed.findings] == [
        "v",
        "r",
        "/machine/peripheral/vub",
        "/machine/peripheral/usb",
        None,
    ]
    assert mixed.findings[-1].cure == "its devices: top, r, vub"
    assert mixed.devices[-1].cure == "unplug it, or leave it out knowingly: --exclude vub"
    assert rules.survey(graph(), exclude=["nope"]).findings[0].cure == "its devices: none"
    by_hmp = msgspec.structs.replace(guest, chooses_devices=False)
    assert [rules.can_exclude(one, names) for one in (guest, by_hmp) for names in (["r"], ["vub"])] == [
        True, True, False, True,
    ]  # fmt: skip


CONVERT = "with the guest off: qemu-img convert -O qcow2 {} NEW.qcow2, and use that"


@pytest.mark.parametrize(
    ("top", "why", "cure"),
    [
        (over("r", "raw", "f"), "driver raw over file", CONVERT.format("IMAGE")),
        (over("r", "raw", "f", filename="/a b"), "driver raw over file", CONVERT.format("'/a b'")),
        (over("r", "raw", "not told"), "driver raw", CONVERT.format("IMAGE")),
        (over("r", "quorum", "f", "fat"), "driver quorum over file, vvfat",
         "QEMU cannot snapshot several images as one"),
        (over("r", "qcow2", "f", active=False), "the image is inactive: a migration has handed it over",
         "resume the guest (`cont`); QEMU has its images then"),
        (over("r", "raw", "fat"), "driver raw over vvfat",
         "give the guest that directory read-only (without rw), or its files in a qcow2 image"),
    ],
)  # fmt: skip
def test_why_not_and_what_helps(top: BlockNode, why: str, cure: str) -> None:
    guest = graph(top, node("f", "file"), node("fat", "vvfat"))
    device = rules.survey(guest).devices[0]
    assert device.why == f"Device 'r' is writable but does not support snapshots ({why})"
    assert device.cure == f"{cure}; or leave it out knowingly: --exclude r"
    assert rules.cure_of(guest, "r") == cure
    by_hmp = rules.survey(msgspec.structs.replace(guest, chooses_devices=False)).devices[0]
    assert by_hmp.cure == cure
    for drive, shown in (BlockBackend(name="hd0", root="r"), "hd0"), (BlockBackend(root="r"), "r"):
        (device, *_) = rules.survey(msgspec.structs.replace(guest, backends=(drive,))).devices
        assert device.why.startswith(f"Device {shown!r} is writable")
    assert rules.cure_of(guest, None) == rules.cure_of(guest, "nobody's") == CONVERT.format("IMAGE")


@pytest.mark.parametrize("more", [{"external_data_file": True}, {"refcount_bits": 1}])
def test_qcow2_that_cannot_snapshot(more: dict[str, Any]) -> None:
    """It goes by the name that its user knows."""
    for backend, name, option in (
        (BlockBackend(name="hd0", root="#block1"), "hd0", "hd0"),
        (BlockBackend(root="#block1"), "#block1", "'#block1'"),
        (BlockBackend(name="hd0", root="mine"), "mine", "mine"),
    ):
        (device,) = rules.survey(graph(node(str(backend.root), **more), backends=(backend,))).devices
        assert device.verdict == "refused"
        assert device.why.startswith(f"{name}: a qcow2 image with ")
        assert device.cure == f"{CONVERT.format('IMAGE')}; or leave it out knowingly: --exclude {option}"
    assert rules.survey(graph(node("a", refcount_bits=16))).devices[0].verdict == "saved"


def test_copies_are_no_devices() -> None:
    """What a job or a backup writes to. HMP does not tell what that is: whatever no device uses may be one."""
    mirror = BlockJob(id="j", type="mirror", status="running", nodes=(("source", "a"), ("target", "t")))
    hidden = BlockJob(id="j", type="mirror", status="")
    told = node("cbw", "copy-before-write", children=(("file", "a"), ("target", "t")))
    spare = "the copy that a block job or a backup makes, or a spare"
    for nodes, jobs, why in (
        ((node("a"),), (mirror,), "the copy that block job 'j' (mirror) makes"),
        ((node("a"),), (msgspec.structs.replace(mirror, nodes=(("source", "a"),)),), ""),
        ((node("a"),), (hidden,), spare),
        ((node("a"), over("cbw", "backup-top", "a", edge="backing")), (), spare),
        ((node("a"), told), (), ""),
        ((node("a"), over("top", "throttle", "a")), (), ""),
    ):
        for backend in BlockBackend(root="t"), BlockBackend(name="t", root="t"), BlockBackend(qdev="/m", root="t"):
            copied = graph(*nodes, node("t"), jobs=jobs, backends=(BlockBackend(qdev="/a", root="a"), backend))
            (device,) = (d for d in rules.survey(copied).devices if d.node == "t")
            assert (device.verdict, device.why) == (("ignored", why) if why and backend.label == "" else ("saved", ""))


def test_who_can_hold_the_vm_state() -> None:
    guest = graph(
        node("ro", read_only=True), over("r", "raw", "f"), node("f", "file"), node("#a", filename="/a"), node("b"),
        node("rbd", "rbd"),
    )  # fmt: skip
    drives = (*guest.backends[:2], BlockBackend(name="hd0", qdev="/machine/peripheral/vd0", root="#a"),
              *guest.backends[3:], BlockBackend(name="cd"))  # fmt: skip
    guest = msgspec.structs.replace(guest, backends=drives)
    assert rules.survey(guest, exclude=["r"]).vmstate == "#a"
    assert rules.survey(guest, exclude=["r", "hd0"]).vmstate == "b"
    for wanted, node_name in {"hd0": "#a", "vd0": "#a", "/machine/peripheral/vd0": "#a", "#a": "#a", "b": "b"}.items():
        assert rules.survey(guest, vmstate=wanted).vmstate == node_name
    for wanted, code, words in (
        ("nope", "vmstate-unknown", "vmstate block device 'nope' does not exist"),
        ("f", "vmstate-unable", "this device cannot hold the VM state"),
        ("/machine/peripheral/r", "vmstate-unable", "this device cannot hold the VM state"),
        ("cd", "vmstate-unable", "this device cannot hold the VM state"),
        ("rbd", "vmstate-unable", "this device cannot hold the VM state"),
    ):
        survey = rules.survey(guest, exclude=["r"], vmstate=wanted)
        (finding,) = survey.findings
        assert (survey.vmstate, finding.code, finding.cure) == (None, code, "devices that can: hd0, b")
        assert finding.message == f"--vmstate {wanted}: {words}"
    (finding,) = rules.survey(graph(node("ro", read_only=True)), vmstate="ro").findings
    assert finding.cure == "devices that can: none"


def test_an_empty_removable_drive_is_not_to_hold_anything() -> None:
    empty = graph(backends=(BlockBackend(name="cd", removable=True),))
    assert [finding.code for finding in rules.survey(empty).findings] == ["no-vmstate-device"]


def test_removable_media() -> None:
    """QEMU calls a stick a fixed disk. It is told by the USB device above it: by its path, or by HMP by its id."""
    stick = Peripheral(path="/machine/peripheral/stick", model="usb-storage")
    hub = Peripheral(path="/machine/peripheral/hub", model="usb-hub")
    nameless = Peripheral(path="/machine/peripheral-anon/device[0]", model="usb-uas")
    drives = {
        BlockBackend(qdev="/machine/peripheral/vd", root="m"): False,
        BlockBackend(qdev="/machine/peripheral/vd", root="m", removable=True): True,
        BlockBackend(qdev="/machine/peripheral/stick/stick.0/legacy[0]", root="m"): True,
        BlockBackend(qdev="stick", root="m"): True,
        BlockBackend(qdev="/machine/peripheral/stick2", root="m"): False,
        BlockBackend(qdev="/machine/peripheral/hub/x", root="m"): False,
        BlockBackend(qdev="/machine/peripheral-anon/device[0]/x", root="m"): True,
        BlockBackend(root="m"): False,
    }
    fixed = BlockBackend(qdev="/machine/peripheral/vd9", root="fixed")
    for drive, is_removable in drives.items():
        for more, cure in ((fixed,), "--vmstate fixed"), ((), "give the guest a qcow2 disk (of any size), and name it"):
            nodes = [node(str(one.root)) for one in (drive, *more)]
            guest = graph(*nodes, backends=(drive, *more), peripherals=(hub, stick, nameless))
            survey = rules.survey(guest)
            assert survey.vmstate == "m"
            assert [(one.code, one.node) for one in survey.findings] == [("vmstate-removable", "m")] * is_removable
            for finding in survey.findings:
                assert finding.cure.startswith(cure)
            for finding in rules.survey(msgspec.structs.replace(guest, chooses_devices=False)).findings:
                assert finding.cure.startswith(f"over QMP: {cure}")
            assert rules.survey(guest, vmstate="m").findings == ()


def test_encrypted_images() -> None:
    secret, plain = node("e", encrypted=True), node("p")
    by_hmp = {"chooses_devices": False}
    for guest, wanted, vmstate, code, cure in (
        (graph(secret), None, "e", "vmstate-encrypted", "give the guest a qcow2 image that is not encrypted"),
        (graph(secret, plain), None, "p", "vmstate-not-encrypted", "--vmstate p confirms that you want this"),
        (graph(secret, plain), "e", "e", "vmstate-encrypted", "--vmstate p; or save with --live"),
        (graph(secret, plain), "p", "p", "", ""),
        (graph(plain, secret), None, "p", "", ""),
        (graph(secret, plain, **by_hmp), None, "e", "vmstate-encrypted", "over QMP: --vmstate p; or save with --live"),
    ):
        survey = rules.survey(guest, vmstate=wanted)
        assert survey.vmstate == vmstate
        assert [(one.code, one.cure.startswith(cure)) for one in survey.findings] == [(code, True)] * bool(code)


def test_an_overlay_that_vanishes() -> None:
    overlay = node("top", filename="/var/tmp/vl.aB3xYz", children=(("backing", "base"),))
    for shown, device in (node("x"), None), (overlay, "top"), (msgspec.structs.replace(overlay, read_only=True), None):
        found = [one.node for one in rules.survey(graph(node("base"), shown)).findings if one.code.startswith("temp")]
        assert found == ([device] if device else [])
