"""The pre-checks: all that would make a save or a load fail or do harm, found before the guest is touched.

Each finding says what is wrong and how to cure it. All are collected; the first one does not end the search.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from qsnap.errors import UNTOUCHED, CommandFailed, NotSupported, PrecheckRefused, SnapshotNotFound
from qsnap.host import processes
from qsnap.inventory import block_jobs, descriptors, vm_state
from qsnap.inventory import devices as rules
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.vm_state import Place
from qsnap.model.checks import CheckReport, Verdict
from qsnap.model.qemu import BlockGraph, Peripheral, QemuVersion, RunState
from qsnap.model.requests import SaveRequest
from qsnap.model.snapshots import Snapshot
from qsnap.monitor import Monitor
from qsnap.monitor.names import HALF_RESTORED
from qsnap.operations.findings import (
    OF_THE_VMSTATE_IMAGE,
    aftermath_findings,
    background_findings,
    chain_findings,
    device_findings_for_load,
    elsewhere_findings,
    fixed_size_findings,
    load_findings,
    migration_findings,
    no_device_findings,
    no_machine,
    nvme_findings,
    refuse_exclusion,
    refuse_hmp_choices,
    refuse_untransportable,
    room_findings,
    runstate_findings,
    spoiled_finding,
    tag_findings,
    trouble_findings,
    unattached_findings,
)
from qsnap.operations.prepare import Preparation, plan_preparation
from qsnap.operations.reset import reset_findings
from qsnap.runs.run import Run

#: From here on loadvm looks for a snapshot on those nodes only that a device uses (block/snapshot.c).
_UNATTACHED_LEFT_OUT = QemuVersion(10, 0, 0)


class SavePlan(NamedTuple):
    """What a save will do, and what it was decided on.

    :ivar image: the vmstate image's file, where this process can stat it.
    :ivar estimate: how large the VM state will be, where that can be seen.
    :ivar preparation: the part of the image to prepare before the guest is stopped.
    """

    inventory: Inventory
    report: CheckReport
    image: Path | None
    estimate: processes.StateEstimate | None
    preparation: Preparation = Preparation()

    @property
    def vmstate(self) -> str:
        """The node that gets the VM state; a plan without one is refused."""
        assert self.report.vmstate is not None
        return self.report.vmstate

    def refuse_if_needed(self) -> None:
        """:raise PrecheckRefused: if a finding refuses the save."""
        if not self.report.ok:
            raise PrecheckRefused("the guest cannot be saved now", self.report.findings)


class LoadPlan(NamedTuple):
    """What a load will do: the snapshot, and the devices that it puts back.

    :ivar vmstate: the device that holds the VM state; None where it is in the snapshot's state file.
    :ivar first: QEMU's name for the device that it puts back first; "" if that is not certain.
    :ivar runstate: the guest's, before the load.
    :ivar state: where the VM state of an ordinary snapshot can be read; None if it cannot be seen from here.
    :ivar peripherals: the guest's devices.
    :ivar spoiled: a migration has failed, and QEMU must forget that first: see
        :meth:`qsnap.model.qemu.Migration.spoils_loads`.
    """

    snapshot: Snapshot
    vmstate: str | None
    devices: tuple[str, ...]
    excluded: tuple[str, ...]
    first: str
    runstate: RunState
    state: Place | None
    peripherals: tuple[Peripheral, ...]
    spoiled: bool


async def plan_save(run: Run, request: SaveRequest, *, state_elsewhere: bool = False) -> SavePlan:
    """Find out whether the guest can be saved now, and how.

    :param state_elsewhere: the VM state does not go into an image: no room is needed there.
    :raise NotSupported: HMP cannot honour the request.
    """
    monitor, vmstate, exclude = run.monitor, request.vmstate, request.exclude
    if request.tag is not None:
        refuse_untransportable(monitor, request.tag)
    try:
        runstate, migration, inventory, ram_bytes, half_restored, leftovers = await asyncio.gather(
            monitor.runstate(),
            monitor.migration(),
            run.look(vmstate=vmstate, exclude=exclude),
            monitor.memory_size(),
            monitor.mark(HALF_RESTORED),
            monitor.leftover_jobs(),
        )
    except CommandFailed as error:
        refusal = no_machine(error)
        report = CheckReport(ok=False, runstate=RunState.PRECONFIG, vmstate=None, devices=(), findings=(refusal,))
        return SavePlan(Inventory(BlockGraph(nodes={}, backends=()), run.store), report, None, None)
    graph, survey = inventory.graph, inventory.survey
    refuse_hmp_choices(monitor, graph, vmstate, exclude)
    image = descriptors.way(monitor.pid, graph, survey.vmstate) if survey.vmstate else None
    estimate = processes.state_estimate(monitor.pid, ram_bytes)
    findings = [
        *tag_findings(request.tag),
        *runstate_findings(runstate),
        *trouble_findings(runstate, monitor.version, alive=request.alive),
        *aftermath_findings(runstate, half_restored is not None, leftovers),
        *migration_findings(migration, graph, survey.devices),
        *nvme_findings(graph, monitor.version),
        *survey.findings,
        *block_jobs.save_findings(graph, survey.devices),
    ]
    preparation = Preparation()
    if state_elsewhere:
        findings = [finding for finding in findings if finding.code not in OF_THE_VMSTATE_IMAGE]
    else:
        findings += room_findings(graph, survey, request, image, estimate)
        stored = image or (descriptors.block_device(monitor.pid, graph, survey.vmstate) if survey.vmstate else None)
        findings += fixed_size_findings(graph, survey, request, estimate, ram_bytes)
        preparation = plan_preparation(inventory, request, runstate, monitor.version, stored, estimate)
        findings += preparation.findings
    report = CheckReport(
        ok=not any(finding.refuses for finding in findings),
        runstate=runstate,
        vmstate=survey.vmstate,
        devices=survey.devices,
        findings=tuple(findings),
    )
    return SavePlan(inventory, report, image, estimate, preparation)


async def plan_load(
    run: Run, tag: str, *, exclude: Collection[str] = (), force: bool = False, standing: str = UNTOUCHED
) -> LoadPlan:
    """Find out whether *tag* can be loaded now, and how.

    :param exclude: devices that keep their present contents.
    :param force: ignore that a disk's backing chain has changed since the tag was saved.
    :param standing: the guest's state, for the message of a refusal.
    :raise SnapshotNotFound: no device holds the tag, or one that is not excluded lacks it.
    :raise PrecheckRefused: a load would fail, or mix disks of different moments.
    :raise NotSupported: HMP cannot load it in this way.
    """
    monitor = run.monitor
    refuse_untransportable(monitor, tag)
    try:
        runstate, migration, inventory = await asyncio.gather(
            monitor.runstate(), monitor.migration(), run.look(exclude=exclude)
        )
    except CommandFailed as error:
        raise PrecheckRefused(f"snapshot {tag!r} cannot be loaded now", [no_machine(error)], standing) from error
    graph, survey = inventory.graph, inventory.survey
    refuse_exclusion(monitor, graph, exclude, "loads")
    snapshot = inventory.find(tag)
    if snapshot is None:
        raise inventory.not_found(tag, f"; {standing}")
    left_out = {d.image or d.node for d in survey.devices if d.verdict is Verdict.EXCLUDED}
    missing = [node for node in snapshot.missing if node not in left_out]
    unable = [node for d in survey.devices if d.verdict is Verdict.REFUSED and (node := d.image or d.node)]
    exclude_all = _exclude_options(graph, snapshot, dict.fromkeys((*missing, *unable)))
    if not force and (elsewhere := [*elsewhere_findings(inventory, snapshot)]):
        raise PrecheckRefused(f"snapshot {tag!r} cannot be loaded now", elsewhere, standing)
    if lacking := [node for node in missing if node not in unable]:
        names, can_load_rest = ", ".join(inventory.displayed(lacking)), snapshot.has_state and exclude_all
        rest = f" To load the rest and leave that as it is now: {exclude_all}" if can_load_rest else ""
        raise SnapshotNotFound(tag, f"snapshot {tag!r} is partial: {names} lacks it; {standing}.{rest}")
    devices = tuple(node for node in snapshot.devices if node not in left_out)
    findings = [
        *no_device_findings(inventory, snapshot, devices),
        *runstate_findings(runstate),
        *migration_findings(migration, graph, survey.devices),
        *background_findings(migration),
        *reset_findings(monitor, runstate),
        *device_findings_for_load(survey, exclude_all),
        *load_findings(inventory, snapshot, devices),
        *block_jobs.load_findings(graph, survey.devices, devices),
    ]
    if not force:
        findings += chain_findings(inventory, snapshot, devices)
    if not graph.chooses_devices and monitor.version < _UNATTACHED_LEFT_OUT:
        findings += unattached_findings(inventory, snapshot)
    spoiled = migration.spoils_loads(monitor.version)
    if spoiled and (monitor.live_obstacle or runstate is RunState.RESTORE_VM):
        findings.append(spoiled_finding(migration, runstate))
    if any(finding.refuses for finding in findings):
        raise PrecheckRefused(f"snapshot {tag!r} cannot be loaded now", findings, standing)
    _refuse_unable(monitor, inventory, snapshot, standing)
    return LoadPlan(
        snapshot=snapshot,
        vmstate=snapshot.vmstate,
        devices=devices,
        excluded=tuple(sorted(filter(None, left_out))),
        first=_first_to_go_back(graph, devices, snapshot.disk_tag),
        runstate=runstate,
        state=vm_state.place(monitor.pid, graph, snapshot),
        peripherals=graph.peripherals,
        spoiled=spoiled,
    )


def _exclude_options(graph: BlockGraph, snapshot: Snapshot, nodes: Collection[str]) -> str:
    """The options that leave *nodes* out of a load, as typed in a shell; "" if they cannot be left out."""
    if not rules.can_exclude(graph, nodes):
        return ""
    return " ".join(f"--exclude {rules.for_shell(node, snapshot.labels.get(node, ''))}" for node in nodes)


def _refuse_unable(monitor: Monitor, inventory: Inventory, snapshot: Snapshot, standing: str) -> None:
    """Refuse a snapshot that this monitor cannot load.

    :raise NotSupported: the monitor cannot load it.
    """
    survey, tag = inventory.survey, snapshot.tag
    if snapshot.file is not None and monitor.live_obstacle:
        raise NotSupported(
            f"{tag!r} is a live snapshot, with its RAM in a state file: {monitor.live_obstacle}; {standing}"
        )
    if inventory.graph.chooses_devices:
        return
    if snapshot.vmstate != survey.vmstate:
        raise NotSupported(
            f"the VM state of {tag!r} is on {snapshot.vmstate}, and {monitor.who} looks for it on "
            f"{survey.vmstate} alone; {standing}"
        )
    if any(d.image not in (d.node, None) for d in survey.devices):
        raise NotSupported(
            f"{monitor.who} cannot load through the filters above a disk's image: the guest would "
            f"hang. With the guest off: qemu-img snapshot -a TAG IMAGE, on every disk; {standing}"
        )


def _first_to_go_back(graph: BlockGraph, devices: Sequence[str], disk_tag: str) -> str:
    """See :attr:`LoadPlan.first`. QEMU takes the devices in its own order, or in the order of its arguments."""
    if not graph.chooses_devices:
        roots = {user.root for user in graph.backends}.intersection(devices)
        # Another node with the tag may belong to an export, which HMP does not show, and come before them
        if any(
            node.tagged(disk_tag) and not node.read_only for node in graph.nodes.values() if node.node_name not in roots
        ):
            return ""
    first = next(iter(devices), "")
    # block.c: bdrv_get_device_or_node_name
    return next((user.name for user in graph.backends if user.root == first and user.name), first)
