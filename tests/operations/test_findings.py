"""The findings of the pre-checks, each from what a monitor tells, without a QEMU."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from qsnap.errors import CommandFailed, NotSupported
from qsnap.host.processes import OVERHEAD_BYTES, StateEstimate
from qsnap.inventory import devices as rules
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.state_store import StateStore
from qsnap.model.checks import Finding
from qsnap.model.qemu import (
    BlockBackend,
    BlockGraph,
    Job,
    Migration,
    NodeSnapshot,
    Peripheral,
    QemuVersion,
    RunState,
)
from qsnap.model.requests import OnExists, SaveRequest
from qsnap.model.snapshots import Snapshot
from qsnap.operations import findings
from support.fake_monitor import FakeMonitor
from support.graphs import graph, node, over, used_by_devices
from support.stores import Store, file

pytestmark = pytest.mark.no_qemu

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def row(tag: str, size: int = 0, id: str = "7") -> NodeSnapshot:  # noqa: A002 (QEMU's word)
    return NodeSnapshot(tag=tag, id=id, vm_state_size=size, date=NOW, vm_clock_ns=1)


def inventory(*nodes: Any, store: StateStore | None = None, **more: Any) -> Inventory:
    return Inventory(graph(*nodes, **more), store or Store())


def found(of: Inventory, tag: str) -> Snapshot:
    snapshot = of.find(tag)
    assert snapshot is not None
    return snapshot


def codes(those: Iterable[Finding]) -> list[tuple[str, str | None]]:
    return [(one.code, one.node) for one in those]


@pytest.mark.parametrize(
    ("state", "version", "severity", "cure"),
    [
        ("running", (7, 2, 0), None, ""),
        ("paused", (7, 2, 0), None, ""),
        ("suspended", (9, 0, 0), None, ""),
        ("suspended", (8, 2, 0), "warn", "`system_wakeup` wakes it"),
        ("guest-panicked", (9, 0, 0), "warn", "to go on, load an older snapshot"),
    ],
)
def test_a_guest_in_trouble(state: str, version: tuple[int, int, int], severity: str | None, cure: str) -> None:
    for alive in False, True:
        told = list(findings.trouble_findings(RunState(state), QemuVersion(*version), alive=alive))
        expected = [("not-alive", "refuse" if alive else severity, cure)] if severity else []
        assert [(one.code, one.severity, one.cure) for one in told] == expected


def test_a_load_that_has_failed_is_warned_of() -> None:
    (finding,) = findings.runstate_findings(RunState.RESTORE_VM)
    assert (finding.code, finding.refuses) == ("restore-vm", False)


def test_an_error_of_another_kind_is_not_that_of_preconfig() -> None:
    for sentence in (
        "permitted only after machine initialization has completed",
        "isn't permitted in 'preconfig' state",
    ):
        assert findings.no_machine(CommandFailed("x", f"The command {sentence}")).code == "runstate"
    with pytest.raises(CommandFailed):
        findings.no_machine(CommandFailed("x", "something else"))


@pytest.mark.parametrize("state", [RunState.PAUSED, RunState.RUNNING])
def test_what_earlier_runs_have_left(state: RunState) -> None:
    left = [Job(id="qsnap-save-1-1", type="snapshot-save", status="concluded")]
    for half in False, True:
        for jobs in [], left:
            told = [one.code for one in findings.aftermath_findings(state, half, jobs)]
            assert told == ["half-restored"] * half + ["killed-qsnap"] * bool(jobs and state is RunState.PAUSED)


def test_migrations() -> None:
    guest = graph(node("a"))
    devices = rules.survey(guest).devices
    for status, expected in (None, []), ("completed", []), ("active", [("migration-running", True)]):
        told = findings.migration_findings(Migration(status=status), guest, devices)
        assert [(one.code, one.refuses) for one in told] == expected
    for name, refuses in {"multifd": True, "block": True, "mapped-ram": True, "x-ignore-shared": False}.items():
        (finding,) = findings.migration_findings(Migration(capabilities=frozenset({name, "events"})), guest, devices)
        assert (finding.code, finding.refuses, name in finding.message) == ("migration-capability", refuses, True)
        assert finding.cure == f"switch it off: migrate_set_capability {name} off"
    assert list(findings.background_findings(Migration(capabilities=frozenset({"events"})))) == []


BLOCKED = "The vvfat (rw) format used by node '{}' does not support live migration"
VVFAT = "give the guest that directory read-only (without rw), or its files in a qcow2 image"


def test_what_blocks_a_migration() -> None:
    """The device by the name that its user knows, and what helps where there is something."""
    guest = graph(node("#f", "vvfat"), over("#top", "raw", "#f"), node("#other", "vvfat"), over("mine", "raw", "#f2"),
                  node("#f2", "vvfat"), node("#nobody_s", "vhdx", filename="/x"), node("q"))  # fmt: skip
    guest = msgspec.structs.replace(guest, backends=(
        BlockBackend(name="dir", root="#top"), BlockBackend(root="#other"), BlockBackend(name="data", root="mine"),
    ), with_parents=frozenset(guest.nodes))  # fmt: skip
    convert = "with the guest off: qemu-img convert -O qcow2 {} NEW.qcow2, and use that"
    for name, shown, cure in (
        ("#f", "dir", VVFAT), ("#f2", "data", VVFAT), ("mine", "mine", VVFAT), ("#other", "#other", VVFAT),
        ("#nobody_s", "#nobody_s", convert.format("/x")), ("hidden", "hidden", convert.format("IMAGE")),
    ):  # fmt: skip
        (finding,) = findings.migration_findings(
            Migration(blocked_reasons=(BLOCKED.format(name),)), guest, rules.survey(guest).devices
        )
        assert (finding.code, finding.message, finding.cure) == ("migration-blocker", BLOCKED.format(shown), cure)
    for reason, cure in (
        ("Migration is disabled when using feature 'peer mode' in device 'ivshmem'", "start the guest with master=on"),
        ("State blocked by non-migratable device 'amd-iommu'", "unplug that device, or start the guest without it"),
    ):
        (finding,) = findings.migration_findings(Migration(blocked_reasons=(reason,)), guest, ())
        assert finding.message == reason
        assert finding.cure.startswith(cure)


def test_a_migration_that_spoils_loads() -> None:
    failed, unknown = Migration(error="it broke"), Migration(error=None)
    for migration, words in (failed, "has failed (it broke)"), (unknown, "was cancelled, and may have failed by that"):
        for state, cure in (RunState.RUNNING, "a save of any kind"), (RunState.RESTORE_VM, "the guest must leave run"):
            finding = findings.spoiled_finding(migration, state)
            assert words in finding.message
            assert finding.cure.startswith(cure)


def test_nvme_without_a_drive_crashes_newer_ones() -> None:
    """By its path, or, as HMP tells it, by its id."""
    peripherals = tuple(
        Peripheral(path=f"/machine/{path}", model=model)
        for path, model in (("peripheral/none", "nvme"), ("peripheral/one", "nvme"), ("peripheral/two", "nvme"),
                            ("peripheral-anon/device[0]", "nvme"), ("peripheral/disk", "virtio-blk-pci"))
    )  # fmt: skip
    drives = (BlockBackend(qdev="/machine/peripheral/one", root="a"), BlockBackend(qdev="two", root="b"))
    guest = graph(node("a"), node("b"), backends=drives, peripherals=peripherals)
    assert list(findings.nvme_findings(guest, QemuVersion(10, 2, 9))) == []
    for version in QemuVersion(11, 0, 0), QemuVersion(11, 1, 0):
        told = list(findings.nvme_findings(guest, version))
        assert codes(told) == [("nvme-without-drive", None)] * 2
        assert [one.message.split()[3] for one in told] == ["none", "device[0]"]


class TestRoom:
    """A file system with 1000 bytes for users, and 100 more for root."""

    @pytest.fixture(autouse=True)
    def file_system(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_frsize=10, f_bavail=100, f_bfree=110))

    def told(self, estimate: StateEstimate | None, guest: BlockGraph | None = None, **request: Any) -> list[Finding]:
        guest = guest or graph(node("a"))
        image = request.pop("image", Path("/a"))
        survey = rules.survey(guest)
        return list(findings.room_findings(guest, survey, SaveRequest(**request), image, estimate))

    @pytest.mark.parametrize(
        ("at_least", "at_most", "code"),
        [(1101, 2000, "no-room"), (1100, 2000, "little-room"), (5, 1001, "little-room"), (5, 1000, "")],
    )
    def test_how_much_there_is(self, at_least: int, at_most: int, code: str) -> None:
        estimate = StateEstimate(at_least, at_least, at_most)
        for force in False, True:
            for by_hmp in False, True:
                told = self.told(estimate, graph(node("a"), chooses_devices=not by_hmp), force=force)
                assert [(one.code, one.node, one.refuses) for one in told] == (
                    [(code, "a", code == "no-room" and not force)] if code else []
                )
                for finding in told:
                    assert ("--vmstate" in finding.cure) != by_hmp
                    assert ("--force" in finding.cure) == finding.refuses

    def test_what_is_replaced_makes_room(self) -> None:
        guest = graph(node("a", snapshots=(row("t", 50), row("other", 500))))
        estimate = StateEstimate(1101, 1101, 1101)
        assert [one.code for one in self.told(estimate, guest, tag="t")] == ["little-room"]
        for request in {"tag": "u"}, {"tag": "t", "on_exists": OnExists.SAFE}, {"tag": None}:
            assert [one.code for one in self.told(estimate, guest, **request)] == ["no-room"]

    def test_nothing_is_said_of_what_is_not_known(self) -> None:
        estimate = StateEstimate(1101, 1101, 1101)
        assert self.told(None) == self.told(estimate, image=None) == self.told(estimate, graph(node("r", "raw"))) == []


@pytest.mark.parametrize("driver", ["nbd", "file"])
def test_an_image_that_cannot_grow(driver: str) -> None:
    estimate = StateEstimate(300, 400, 500)
    ram = 1000
    without = 2000 + 70 + ram + OVERHEAD_BYTES
    for size, guess, force, code, words in (
        (299, estimate, False, "no-room", "299 bytes must hold"),
        (299, estimate, True, "cannot-grow", "299 bytes must hold"),
        (300, estimate, False, "cannot-grow", "about 400 bytes"),
        (2569, estimate, False, "cannot-grow", "2,569 bytes must hold"),
        (2570, estimate, False, "", ""),
        (0, estimate, False, "cannot-grow", "what it has must hold"),
        (without - 1, None, False, "cannot-grow", "about 1,000 bytes"),
        (without, None, False, "", ""),
    ):
        guest = graph(
            over("q", "qcow2", "p", virtual_size=2000, snapshots=(row("t", 30), row("u", 40))),
            node("p", driver, virtual_size=size),
        )
        told = list(findings.fixed_size_findings(guest, rules.survey(guest), SaveRequest(force=force), guess, ram))
        assert codes(told) == ([(code, "q")] if code and driver == "nbd" else [])
        for finding in told:
            assert finding.refuses == (code == "no-room")
            assert words in finding.message
            assert ("--force" in finding.cure) == finding.refuses
    for other in graph(node("r", "raw")), graph(node("q")):
        assert list(findings.fixed_size_findings(other, rules.survey(other), SaveRequest(), estimate, ram)) == []


def test_devices_in_the_way_of_a_load() -> None:
    guest = graph(
        node("r", "raw"), node("a"), peripherals=(Peripheral(path="/machine/peripheral/u", model="usb-host"),)
    )
    survey = rules.survey(guest, exclude=["nope"])
    assert {one.code for one in survey.findings} == {"device-cannot-snapshot", "device-passed-on", "exclude-unknown"}
    for options, cure in ("--exclude r", "if you want that: --exclude r"), ("", "if the snapshot was made without it"):
        told = list(findings.device_findings_for_load(survey, options))
        assert codes(told) == [("device-cannot-snapshot", "r"), ("exclude-unknown", None)]
        assert "it would keep the contents that it has now" in told[0].message
        assert told[0].cure.startswith(cure)


def test_what_only_qmp_can() -> None:
    """A choice that is QEMU's own is no choice. Where there is none at all, the findings say so."""
    monitor: Any = FakeMonitor(chooses_devices=False)
    by_hmp = {"chooses_devices": False}
    guest = graph(node("a"), node("b"), **by_hmp)
    for vmstate in None, "a", "/machine/peripheral/a":
        findings.refuse_hmp_choices(monitor, guest, vmstate, [])
    for vmstate in "b", "nope":
        with pytest.raises(NotSupported, match=f"itself \\(a\\): --vmstate {vmstate} is beyond it"):
            findings.refuse_hmp_choices(monitor, guest, vmstate, [])
        findings.refuse_hmp_choices(monitor, msgspec.structs.replace(guest, chooses_devices=True), vmstate, ["a"])
    with pytest.raises(NotSupported, match="the fake saves all devices or none: --exclude is beyond it"):
        findings.refuse_hmp_choices(monitor, guest, None, ["a"])
    for vmstate in None, "r":
        findings.refuse_hmp_choices(monitor, graph(node("r", "raw"), **by_hmp), vmstate, [])


def test_a_tag_that_is_bad_anyway_is_not_said_to_be_beyond_the_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor: Any = FakeMonitor()
    findings.refuse_untransportable(monitor, "t")
    monkeypatch.setattr(monitor, "tag_obstacle", lambda _: "it has a blank")
    for tag in "", "a\nb ":
        findings.refuse_untransportable(monitor, tag)
    with pytest.raises(NotSupported, match="the fake cannot be given the tag 't '"):
        findings.refuse_untransportable(monitor, "t ")


@pytest.mark.parametrize("tag", [None, "t", "01", "1a"])
def test_tags_that_may_be(tag: str | None) -> None:
    assert list(findings.tag_findings(tag)) == []


def test_a_part_that_is_elsewhere() -> None:
    """Below an overlay, or on a node that no device uses any more."""
    base = node("base", filename="/base", snapshots=(row("t"), row("other")))
    below = inventory(node("a", snapshots=(row("t", 5), row("u", 5))), over("b", "qcow2", "base", edge="backing"), base,
                      over("c", "qcow2", "base2", edge="backing"), node("base2", snapshots=(row("u"),)))  # fmt: skip
    (finding,) = findings.elsewhere_findings(below, found(below, "t"))
    assert (finding.code, finding.node) == ("in-backing", "b")
    assert finding.message == "the part of b is in its backing image base: an overlay was made above it"
    assert codes(findings.elsewhere_findings(below, found(below, "u"))) == [("in-backing", "c")]

    nodes = (node("a", snapshots=(row("t", 5),)), node("b"), node("old", snapshots=(row("t"),)))
    for used, expected in ("ab", [("left-its-image", "b")]), (["a", "b", "old"], []):
        switched = inventory(*nodes, **used_by_devices(*used))
        assert codes(findings.elsewhere_findings(switched, found(switched, "t"))) == expected


def test_ram_alone_does_not_go_back() -> None:
    """If all that the snapshot is on belongs to no device of the guest any more."""
    nodes = (node("old", snapshots=(row("t", 5),)), node("new"), node("r", "raw"))

    def told(devices: list[str], *used: str) -> list[str]:
        of = inventory(*nodes, **used_by_devices(*used))
        return [one.code for one in findings.no_device_findings(of, found(of, "t"), devices)]

    assert told(["old"], "new") == ["no-device"]
    assert told([], "old", "new") == ["no-device"], "all are left out"
    assert told(["old"], "old", "new") == []
    assert told(["old"]) == told(["old"], "r") == [], "a guest without disks"


def test_nodes_that_older_ones_stumble_over() -> None:
    """Those that no device uses, and that QEMU would look for the snapshot on."""
    nodes = (node("a", snapshots=(row("t", 5),)), node("has", snapshots=(row("t"),)), node("lacks"), node("r", "raw"))
    of = inventory(*nodes, **used_by_devices("a"))
    assert codes(findings.unattached_findings(of, found(of, "t"))) == [("unattached-node", "lacks")]


def test_what_a_load_finds_in_a_snapshot() -> None:
    """Each disk that would bring back another one, by QEMU's look at IDs first."""
    of = inventory(
        node("a", snapshots=(row("1", 5, id="2"), row("first", 5, id="1"))),
        node("b", snapshots=(row("1", id="1"),)),
    )
    told = list(findings.load_findings(of, found(of, "1"), ["a", "b"]))
    assert codes(told) == [("tag-is-an-id", "a")]
    assert codes(findings.load_findings(of, found(of, "1"), ["b"])) == [("vmstate-excluded", "a")]
    assert list(findings.load_findings(of, found(of, "first"), ["a"])) == []
    mixed = msgspec.structs.replace(found(of, "first"), problems=("one", "two"))
    assert [one.code for one in findings.load_findings(of, mixed, ["a"])] == ["mixed-snapshot"] * 2


@pytest.mark.parametrize(
    ("more", "codes"),
    [
        ({}, []),
        ({"is_readable": False}, ["state-file-unreadable"]),
        ({"is_link": True}, ["state-file-link"]),
        ({"holds": "u"}, ["state-file-mixed-up"]),
        ({"is_whole": False, "trouble": "it is cut short"}, ["state-file"]),
    ],
)
def test_the_file_of_a_live_snapshot(more: dict[str, Any], codes: list[str]) -> None:
    of = inventory(node("a", snapshots=(row("t"),)), store=Store(file("t", **more), unseen=["/x"]))
    told = list(findings.load_findings(of, found(of, "t"), ["a"]))
    assert [one.code for one in told] == codes
    for finding in told:
        assert "its state file /t" in finding.message


def test_disks_without_ram() -> None:
    """Their state file may be where it cannot be seen, or have stayed behind when the image was renamed."""
    disks, full = node("a", snapshots=(row("t"),)), node("a", snapshots=(row("t", 5),))
    for image, store, expected in (
        (disks, Store(), ["disk-only"]),
        (disks, Store(unseen=["/x"]), ["unseen-state-file"]),
        (disks, Store(unseen=["/x"], ignores=True), ["disk-only"]),
        (disks, Store(left="t", unseen=["/x"]), ["state-file-left"]),
        (disks, Store(left="u"), ["disk-only"]),
        (full, Store(left="t", unseen=["/x"]), []),
    ):
        of = inventory(image, store=store)
        assert [one.code for one in findings.load_findings(of, found(of, "t"), ["a"])] == expected


def test_a_file_without_its_disks() -> None:
    of = inventory(node("a"), store=Store(file("t")))
    gone = found(of, "t")
    assert [one.code for one in findings.load_findings(of, gone, [])] == ["state-only"]
    assert list(findings.no_device_findings(of, gone, [])) == [], "it is said once why"


def test_after_a_deletion_its_files_are_gone() -> None:
    of = inventory(node("a", snapshots=(row("t"), row("u"))), store=Store(file("t"), file("u")))
    assert [(one.tag, one.kind) for one in of.snapshots] == [("t", "live"), ("u", "live")]
    of.without(["/t"], {"a": (row("u"),)})
    assert [(one.tag, one.kind) for one in of.snapshots] == [("u", "live")]
