"""How results and errors look to people: :func:`lines_of`, and :func:`quiet_lines_of` under ``--quiet``.

``lines_of`` dispatches on the type of the result; a type that it does not know is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import singledispatch
from typing import TYPE_CHECKING

from msgspec import structs

from qsnap.cli.output.lines import Aside, Column, Cut, Hint, Lines, Table
from qsnap.cli.output.results import (
    Details,
    KnownVMs,
    Notes,
    OfVM,
    Outcomes,
    PluginAnswer,
    Recoveries,
    Snapshots,
    exit_code_of,
)
from qsnap.cli.output.text import age, clock, date, duration, printable, seconds, shortened, size
from qsnap.errors import QsnapError
from qsnap.model.checks import CheckReport, Device, Finding, Labels, Verdict
from qsnap.model.machine import Machine
from qsnap.model.qemu import RunState
from qsnap.model.results import (
    BootResult,
    DeleteResult,
    DrillResult,
    ExportResult,
    GuestState,
    LoadResult,
    PruneResult,
    Recovered,
    SaveResult,
    Status,
    Unfinished,
    VerifyResult,
)
from qsnap.model.snapshots import Kind, Origin, Snapshot, StateFile, Tree

if TYPE_CHECKING:
    from qsnap.targets.choose import KnownVM


@singledispatch
def lines_of(result: object) -> Lines:
    """The lines that show *result* to people."""
    raise NotImplementedError(type(result))


_VERDICTS: Mapping[str, str] = {
    Verdict.SAVED: "green", Verdict.CARRIED: "cyan", Verdict.IGNORED: "dim", Verdict.EXCLUDED: "yellow",
    Verdict.REFUSED: "bold red",
}  # fmt: skip
_KINDS: Mapping[str, str] = {
    Kind.FULL: "green", Kind.LIVE: "green", Kind.DISK_ONLY: "yellow", Kind.STATE_ONLY: "red", Kind.PARTIAL: "red",
}  # fmt: skip
_TAG = Column("TAG")
_KIND = Column("KIND", styles=_KINDS)
_STATE = Column("STATE", is_number=True)
_DATE = Column("DATE")
_VM_CLOCK = Column("VM CLOCK", is_number=True)


@lines_of.register(QsnapError)
def _(error: QsnapError) -> Lines:
    from qsnap.targets.choose import SeveralVMs

    yield Aside(str(error))
    if isinstance(error, SeveralVMs):
        yield _vm_table(error.vms)


# Saves and loads

#: So many seconds are told that a guest's clock is behind.
_CLOCK_S = 60


@lines_of.register(SaveResult)
def _(result: SaveResult) -> Lines:
    yield from (Aside(_explained(finding), "warning") for finding in result.warnings)
    vmstate = _state_place(result.vmstate, result.file, result.labels)
    if result.dry_run:
        old = "replacing the older one" if result.replaced else "new"
        devices = _names(result.devices, result.labels)
        yield f"would save {result.tag} ({old}): VM state {vmstate}, snapshots on {devices}"
    else:
        pause = f", guest paused {seconds(result.pause_ms)}" if result.pause_ms else f", guest {result.runstate}"
        replaced = ", replaced the older one" if result.replaced else ""
        devices = _count(result.devices, "device")
        yield f"saved {result.tag}: {size(result.vm_state_size)} {vmstate}, {devices}{pause}{replaced}"
    if result.excluded:
        yield f"  NOT WHOLE: without {_names(result.excluded, result.labels)}"
    if result.carried:
        yield f"  {_names(result.carried, result.labels)}: contents are inside the VM state"
    if result.pruned and result.dry_run:
        yield from lines_of(result.pruned)
    elif result.pruned:
        yield f"  {_pruned(result.pruned)}"


@lines_of.register(LoadResult)
def _(result: LoadResult) -> Lines:
    asleep = ", as it was saved: `system_wakeup` in its monitor wakes it"
    yield (
        f"loaded {result.tag} of {date(result.date)}, guest {result.runstate}"
        f"{asleep if result.runstate is RunState.SUSPENDED else ''}"
    )
    read = size(result.vm_state_size)
    read = read if result.ram_bytes is None else f"{size(result.ram_bytes)} of {read} differed"
    # The path of a state file has no place in a line
    place = f"from {_names([result.vmstate], result.labels)}" if result.vmstate else "from its state file"
    yield f"  {read}, {place}, {_count(result.devices, 'device')}, {seconds(result.duration_ms)}"
    if result.excluded:
        yield f"  left as it is: {_names(result.excluded, result.labels)}"
    if result.runstate in (RunState.PAUSED, RunState.PRELAUNCH):
        yield Hint("  it is paused, as you left it or asked for; to run it: qsnap resume")
    if (behind_s := result.clock_behind_s) is not None and behind_s >= _CLOCK_S:
        yield Hint(f"  guest clock is {duration(behind_s)} behind, until the guest sets it, or --sync-time")
    if result.saved:
        yield f"  what it discarded is kept as {result.saved.tag}: qsnap undo"
    if result.differing_pages is not None:
        but = f" but for {result.differing_pages} pages that QEMU's devices wrote in the load"
        yield f"  verified: RAM is as in the snapshot{but if result.differing_pages else ''}"


@lines_of.register(CheckReport)
def _(report: CheckReport) -> Lines:
    yield _device_table(report.devices, report.vmstate)
    for finding in report.findings:
        yield from f"{'refused' if finding.refuses else 'warning'}: {_explained(finding)}".split("\n")
    verdict = "ok: this guest can be saved" if report.ok else "not ok: this guest cannot be saved now"
    yield f"{verdict} (guest {report.runstate})"


# Elsewhere


@lines_of.register(ExportResult)
def _(result: ExportResult) -> Lines:
    yield from (Aside(_explained(finding), "warning") for finding in result.warnings)
    yield (
        f"exported {result.tag} of {date(result.date)} to {result.directory}: {size(result.size)}, "
        f"{_count(result.disks, 'disk')}, {seconds(result.duration_ms)}"
    )


@lines_of.register(BootResult)
def _(result: BootResult) -> Lines:
    gone = ", which goes with it" if result.is_temporary else ""
    yield f"booted {result.tag}: process {result.pid}, QEMU {result.qemu_version}, guest {result.runstate}"
    yield from _facts(
        13,
        ("monitor", result.monitor),
        ("serial port", ", ".join(f"{path} (output: {path}.log)" for path in result.consoles)),
        ("directory", f"{result.directory}{gone}"),
        ("to end it", f"kill {result.pid}"),
    )


@lines_of.register(DrillResult)
def _(result: DrillResult) -> Lines:
    yield from (Aside(_explained(finding), "warning") for finding in result.warnings)
    text = f", it wrote {result.until!r}" if result.until else ""
    took = f"{seconds(result.duration_ms)}, QEMU {result.qemu_version}"
    yield f"{result.tag} starts and runs: {result.sign}{text}; {took}"


# Snapshots


@lines_of.register(Snapshots)
def _(found: Snapshots) -> Lines:
    yield from _snapshots_of({"": found})


def _snapshots_of(found: Mapping[str, Snapshots]) -> Lines:
    """The snapshots of VMs in one table; their names are in it if there are several."""
    for name, one in found.items():
        if not one.snapshots:
            others = f" of that series; there is {', '.join(one.other_series)}" if one.other_series else ""
            yield Aside(f"{f'{printable(name)}: ' if name else ''}no snapshots{others}")
    listed = [snapshot for one in found.values() for snapshot in one.snapshots]
    if not listed:
        return
    # Where something is wrong, it is seen in KIND and DEVICES
    has_gaps = any(one.missing or one.problems for one in listed)
    is_usual = not has_gaps and all(one.kind is Kind.FULL for one in listed)
    columns = (
        Column("VM", cut="middle"),
        Column("TAG", cut="middle", whole=40),
        Column("KIND", styles=_KINDS, is_dull=is_usual),
        _STATE,
        structs.replace(_DATE, goes=1),
        Column("AGE", is_number=True),
        Column("VM CLOCK", is_number=True, goes=4),
        Column("VMSTATE", cut="middle", is_dull=True, goes=3),
        Column("DEVICES", cut="end", is_dull=not has_gaps, goes=0 if has_gaps else 2),
        Column("NOTE", cut="end", whole=30),
    )
    now = datetime.now(UTC)
    rows = [(name, *_cells(snapshot, now)) for name, one in found.items() for snapshot in one.snapshots]
    unused = {"VM"} if len(found) == 1 else set()
    unused |= set() if any(map(_note, listed)) else {"NOTE"}
    yield Table(columns, rows).without(unused)
    for name, one in found.items():
        guest = f"{printable(name)}: " if name else ""
        if one.snapshots and one.position.tag is None and one.position.deleted:
            yield Hint(f"{guest}the guest has come from {one.position.deleted[0]}, which is deleted")
        # Where qsnap has never written anything down, there is nothing to miss
        if one.position.unknown and any(snapshot.parent is not None for snapshot in one.snapshots):
            yield Hint(f"{guest}not known where the guest is: {one.position.unknown}")


def _cells(snapshot: Snapshot, now: datetime) -> Sequence[str]:
    """The cells of a snapshot's row in a list."""
    return (
        snapshot.tag,
        snapshot.kind,
        size(snapshot.vm_state_size) if snapshot.vm_state_size else "-",
        date(snapshot.date),
        age(snapshot.date, now),
        clock(snapshot.vm_clock_ns),
        _file_or_node(snapshot.vmstate, snapshot.file, snapshot.labels, short=True),
        _devices(snapshot),
        _note(snapshot) or "-",
    )


def _devices(snapshot: Snapshot) -> str:
    """The devices that hold it; what is wrong comes first, because the cell may be cut."""
    held, lacking = snapshot.devices, snapshot.missing
    gap = f"{len(held)} of {len(held) + len(lacking)}, not {_names(lacking, snapshot.labels)}" if lacking else ""
    return ("(!) " if snapshot.problems else "") + (
        ": ".join(filter(None, (gap, _names(held, snapshot.labels)))) or "-"
    )


@lines_of.register(Tree)
def _(tree: Tree) -> Lines:
    """Each snapshot below its parent, and the guest below the one that it has come from.

    Only where there are several below one are they set in: a series of a hundred is not a staircase.
    """
    position = tree.position
    tags = {one.tag for one in tree.snapshots}
    if not tags:
        yield Aside("no snapshots")
        return
    after = f" (after {position.deleted[0]}, which is deleted)" if position.deleted else ""
    below: dict[str, list[tuple[str, str]]] = {}
    for one in tree.snapshots:
        below.setdefault(one.parent if one.parent in tags else "", []).append((one.tag, _in_tree(one)))
    if not position.unknown:
        below.setdefault(position.tag or "", []).append(("", f"* you are here{after}"))
    roots, unknown = below.pop(""), {one.tag for one in tree.snapshots if one.parent is None}
    for number, root in enumerate(roots):
        if number and root[0] not in unknown:
            yield ""  # what is below another without a gap was made from it
        left = [(root, "", "")]
        while left:
            (tag, text), head, rest = left.pop()
            yield Cut(head + text)
            match below.get(tag, []):
                case [child]:
                    left.append((child, rest, rest))
                case [*others, last]:
                    left.append((last, f"{rest}└── ", f"{rest}    "))
                    left.extend((one, f"{rest}├── ", f"{rest}│   ") for one in reversed(others))
    if position.unknown:
        yield f"not known where the guest is: {position.unknown}"


def _in_tree(snapshot: Snapshot) -> str:
    parent = "its parent is not known" if snapshot.parent is None else ""
    kind = "" if snapshot.kind in (Kind.FULL, Kind.LIVE) else snapshot.kind
    protected = "protected" if snapshot.protected else ""
    note = ": ".join(filter(None, (protected, _together(snapshot), snapshot.description)))
    return "  ".join(filter(None, (snapshot.tag, date(snapshot.date), kind, note, f"({parent})" if parent else "")))


@lines_of.register(Details)
def _(details: Details) -> Lines:
    snapshot = details.snapshot
    place = _state_place(snapshot.vmstate, snapshot.file, snapshot.labels)
    yield from _facts(
        14,
        ("tag", snapshot.tag),
        ("kind", snapshot.kind),
        ("description", snapshot.description),
        ("protected", "yes" if snapshot.protected else ""),
        ("saved", f"together with {', '.join(snapshot.together.vms)}" if snapshot.together else ""),
        ("guest was", snapshot.runstate),
        ("VM state", f"{size(snapshot.vm_state_size)} {place}" if snapshot.vmstate or snapshot.file else "none"),
        ("on the disks", snapshot.disk_tag if snapshot.disk_tag != snapshot.tag else ""),
        ("date", f"{date(snapshot.date)} ({age(snapshot.date, datetime.now(UTC))} ago)"),
        ("VM clock", clock(snapshot.vm_clock_ns)),
        ("missing on", _names(snapshot.missing, snapshot.labels)),
        ("saved by", _origin(snapshot.origin)),
        *(("problem", problem) for problem in snapshot.problems),
    )
    yield Table(
        (Column("NODE"), Column("ID"), _STATE, _DATE, _VM_CLOCK),
        [
            (_names([node], snapshot.labels), row.id, size(row.vm_state_size), date(row.date), clock(row.vm_clock_ns))
            for node, held in details.rows.items()
            for row in held
        ],
    )
    if details.state:
        yield from lines_of(details.state)


@lines_of.register(Machine)
def _(machine: Machine) -> Lines:
    yield f"{'machine:':<14}{machine.name}"
    yield Table(
        (Column("RAM BLOCK"), Column("BYTES", is_number=True)),
        [(block.name, f"{block.size:,}") for block in machine.ram_blocks],
    )
    yield Table(
        (
            Column("SECTION"),
            Column("INSTANCE", is_number=True),
            Column("VERSION", is_number=True),
            Column("BYTES", is_number=True),
        ),
        [(one.name, str(one.instance), str(one.version), f"{one.size:,}") for one in machine.sections],
    )


@lines_of.register(VerifyResult)
def _(result: VerifyResult) -> Lines:
    for one in result.snapshots:
        read = [
            f"{number} checksum{'' if number == 1 else 's'} {verb}"
            for number, verb in ((one.compared, "compared"), (one.recorded, "taken for the first time"))
            if number
        ]
        verdict = {True: "whole", False: "DAMAGED", None: "not wholly checked"}[one.ok]
        yield f"{one.tag}: {', '.join([verdict, *read])}"
        yield from (f"  {problem}" for problem in one.problems)
        yield from (f"  not checked: {what}" for what in one.unchecked)
    if not result.snapshots:
        yield Aside("no snapshots")


@lines_of.register(Notes)
def _(notes: Notes) -> Lines:
    for snapshot in notes.snapshots:
        protected = "protected" if snapshot.protected else "not protected"
        yield f"{snapshot.tag}: {': '.join(filter(None, (protected, snapshot.description)))}"


@lines_of.register(DeleteResult)
def _(result: DeleteResult) -> Lines:
    for tag, nodes in result.deleted.items():
        files = result.files.get(tag, ())
        places = [*([f"from {_names(nodes, result.labels)}"] if nodes else []), *files]
        yield f"deleted {tag} {' and '.join(places)}" if places else f"no snapshot {tag}"


@lines_of.register(PruneResult)
def _(result: PruneResult) -> Lines:
    """What became of each snapshot of the series, the newest first, and why."""
    decisions = sorted((*result.keep, *result.remove), key=lambda one: (one.date, one.tag), reverse=True)
    if decisions:
        yield Table(
            (_TAG, _KIND, _DATE, Column(""), Column("REASONS", folds=True)),
            [
                (one.tag, one.kind, date(one.date), "keep" if one.reasons else "remove", ", ".join(one.reasons) or "-")
                for one in decisions
            ],
        )
    yield _pruned(result)


# The guest, and the machine


@lines_of.register(Status)
def _(status: Status) -> Lines:
    yield from _facts(
        13,
        ("guest", f"{status.name or '(no name)'}, {status.runstate}"),
        ("warning", status.trouble),
        ("QEMU", status.version),
        ("monitor", f"{status.monitor} ({status.transport})"),
        ("snapshots", str(status.snapshots) + _below_overlays(status)),
        ("in use by", _in_use_by(status)),
        ("left behind", "; ".join(_left_behind(status)) or "nothing"),
    )
    yield _device_table(status.devices, status.vmstate)


@lines_of.register(GuestState)
def _(state: GuestState) -> Lines:
    yield f"guest {state.runstate}" + (", as it was" if state.runstate == state.before else "")


@lines_of.register(PluginAnswer)
def _(answer: PluginAnswer) -> Lines:
    yield answer.health.line()


@lines_of.register(Recovered)
def _(item: Recovered) -> Lines:
    deed = f"{item.operation} {', '.join(item.tags)}".rstrip()
    known = f"that died ({deed}, process {item.pid}, begun {item.began})" if item.operation else "that is not known"
    yield f"cleaned up after a qsnap {known}: {'; '.join(item.actions) or 'nothing was left to do'}"


@lines_of.register(Recoveries)
def _(done: Recoveries) -> Lines:
    for item in done.recovered:
        yield from lines_of(item)
    if not done.recovered:
        yield Aside("nothing to recover")


@lines_of.register(KnownVMs)
def _(known: KnownVMs) -> Lines:
    yield _vm_table(known.vms) if known.vms else Aside("no QEMU is running that this user can see")


# Of which VM


@lines_of.register(OfVM)
def _(one: OfVM) -> Lines:
    return lines_of(one.result)


# Several VMs


@lines_of.register(Outcomes)
def _(several: Outcomes) -> Lines:
    found = {one.title: one.result for one in several.vms if isinstance(one.result, Snapshots)}
    failed = [one for one in several.vms if isinstance(one.result, QsnapError)]
    if not found or len(found) + len(failed) < len(several.vms):
        yield from _titled(several, lines_of)
        if several.stop_spread_ms is not None:
            resumed = several.resume_spread_ms
            ran = "" if resumed is None else f", and ran again within {seconds(resumed)}"
            yield f"together: the guests were stopped within {seconds(several.stop_spread_ms)}{ran}"
        return
    for title, error in failed:
        yield from introduced(printable(title), error)
    yield from _snapshots_of(found)


def introduced(what: str, error: object) -> Lines:
    """The lines of an error; the first begins with *what* it is about."""
    first, *more = lines_of(error)
    assert isinstance(first, Aside)
    yield from (structs.replace(first, text=f"{what}: {first.text}"), *more)


def quiet_lines_of(result: object) -> Lines:
    """The lines that ``--quiet`` leaves: warnings, and the names in a list, for a loop in a script."""
    match result:
        case OfVM():
            yield from quiet_lines_of(result.result)
        case Snapshots():
            yield from (snapshot.tag for snapshot in result.snapshots)
        case KnownVMs():
            yield from (vm.selector for vm in result.vms if vm.selector)
        case BootResult():
            yield result.monitor
        case SaveResult():
            # --live=auto is asked for where nobody wants to know
            wanted = (finding for finding in result.warnings if finding.code != "not-live")
            yield from (Aside(_explained(finding), "warning") for finding in wanted)
        case PluginAnswer() | VerifyResult() if exit_code_of(result):
            yield from lines_of(result)
        case Outcomes():
            yield from _titled(result, quiet_lines_of)


def _titled(several: Outcomes, its_lines: Callable[[object], Lines]) -> Lines:
    """The lines of each VM: a line begins with the name of the VM, a table is below it."""
    for outcome in several.vms:
        title, result = printable(outcome.title), outcome.result
        if isinstance(result, QsnapError):
            yield from introduced(title, result)
            continue
        lines = list(its_lines(result))
        yield from (structs.replace(line, text=f"{title}: {line.text}") for line in lines if isinstance(line, Aside))
        first, *more = [line for line in lines if not isinstance(line, Aside | Hint)] or [""]
        details = [line.strip() for line in more if isinstance(line, str) and line.startswith("  ")]
        if isinstance(first, Table | Cut) or len(details) < len(more):
            yield from (f"{title}:", first, *more, "")
        elif first:
            yield f"{title}: {'; '.join([first, *details])}"


# Parts of them


def _facts(indent: int, *facts: tuple[str, str]) -> Iterator[str]:
    """A line for each fact that is not empty."""
    return (f"{name + ':':<{indent}}{value}" for name, value in facts if value)


def _device_table(devices: Sequence[Device], vmstate: str | None) -> Table:
    def why(device: Device) -> str:
        holds = "holds the VM state" if vmstate and device.image == vmstate else ""
        return "; ".join(filter(None, (holds, device.why)))

    return Table(
        (
            # Whoever has DEVICE can do without, because options take that, too
            Column("NODE", goes=1 if all(device.device for device in devices) else 0),
            Column("DEVICE"),
            Column("DRIVER"),
            Column("ROLE"),
            Column("VERDICT", styles=_VERDICTS),
            Column("WHY", folds=True, whole=len("holds the VM state")),
        ),
        [
            (device.node or "-", device.device or "-", device.driver or "-", device.role, device.verdict, why(device))
            for device in devices
        ],
    )


def _vm_table(vms: Sequence[KnownVM]) -> Table:
    columns = (
        Column("NAME", cut="middle"),
        Column("PID", is_number=True, goes=3),
        # Shown where one is another user's
        Column("USER"),
        Column("MEMORY", is_number=True, goes=2),
        Column("DISKS", cut="end", goes=1),
        Column("MONITOR", cut="middle", whole=30),
        Column("STATE", cut="end", whole=20),
        Column("CHOOSE IT BY"),
    )
    is_ours = all(vm.running.is_ours for vm in vms if vm.running)
    return Table(columns, [_vm_row(vm) for vm in vms]).without({"USER"} if is_ours else ())


def _vm_row(vm: KnownVM) -> Sequence[str]:
    from qsnap.targets.choose import reason

    name, option = vm.name or "-", vm.option or "-"
    if vm.running is None:
        return name, "-", "-", "-", "-", str(vm.monitor) if vm.monitor else "-", "not seen running", option
    running = vm.running
    point = next((point for point in running.monitors if vm.monitor and point.address == vm.monitor), None)
    state = f"{point.protocol.upper()}, {point.state}" if point else reason(running)
    if point and point.holder:
        state += f", held by process {point.holder.pid}: {shortened(point.holder.command)}"
    disks = ", ".join(disk.rpartition("/")[2] or disk for disk in running.disks) or "-"
    monitor = str(point.address) if point else "-"
    return name, str(running.pid), running.user, size(running.memory), disks, monitor, state, option


def _below_overlays(status: Status) -> str:
    if not status.in_backing:
        return ""
    places = dict.fromkeys(f"{one.image} of {one.device}" for one in status.in_backing)
    return f", and {len(status.in_backing)} out of reach in a backing image ({', '.join(places)})"


def _in_use_by(status: Status) -> str:
    run = status.run
    if run is None or run.is_alive is False:
        return "nobody"
    doubt = "" if run.is_alive else " (on another machine or in a container: it may be dead; qsnap recover --force)"
    return f"{_run(run)}{doubt}"


def _left_behind(status: Status) -> Iterator[str]:
    if status.run and status.run.is_alive is False:
        yield f"{_run(status.run)}, which died: qsnap recover"
    if status.is_half_restored:
        yield "a load that failed midway: load a good snapshot"
    for job in status.leftover_jobs:
        yield f"{job.id} ({job.error or 'done'})"


def _run(run: Unfinished) -> str:
    if not run.operation:
        return "a qsnap whose claim cannot be read"
    return f"{run.operation} {', '.join(run.tags)} by process {run.pid}, begun {run.began}"


def _note(snapshot: Snapshot) -> str:
    """What is written down about it, in a line."""
    state = f"guest was {snapshot.runstate}" if snapshot.runstate else ""
    here = "you are here" if snapshot.here else ""
    protected = "protected" if snapshot.protected else ""
    return ": ".join(filter(None, (here, protected, _together(snapshot), state, snapshot.description)))


def _together(snapshot: Snapshot) -> str:
    return f"saved with {', '.join(snapshot.together.vms)}" if snapshot.together else ""


def _pruned(result: PruneResult) -> str:
    removed = ", ".join(one.tag for one in result.remove)
    verb = "would remove" if result.dry_run else "removed"
    kept = f"{'would keep' if result.dry_run else 'kept'} {len(result.keep)} of series {result.prefix}"
    return f"{kept}, {verb} {removed or 'none'}"


def _origin(origin: Origin | None) -> str:
    if origin is None:
        return ""
    return ", ".join(filter(None, (f"QEMU {origin.qemu}", origin.machine, origin.cpu, origin.accelerator)))


def _explained(finding: Finding) -> str:
    """What was found, and what to do about it."""
    return f"{finding.message}\n  {finding.cure}" if finding.cure else finding.message


def _names(nodes: Sequence[str], labels: Labels) -> str:
    return ", ".join(labels.get(node, node) for node in nodes)


def _state_place(vmstate: str | None, file: StateFile | None, names: Labels) -> str:
    """Where the VM state is, in words; of a live save that was not made yet in general."""
    place = _file_or_node(vmstate, file, names)
    return f"on {place}" if vmstate else f"in {place}"


def _file_or_node(vmstate: str | None, file: StateFile | None, names: Labels, *, short: bool = False) -> str:
    if vmstate:
        return _names([vmstate], names)
    if short:
        return "(file)" if file else "-"
    return file.path if file else "a state file"


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
