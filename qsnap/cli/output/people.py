"""How results look. Whether that is for people or for scripts is decided once, when a renderer is made.

Results go to standard output, everything else to standard error. ``rich`` draws on a terminal alone, and is
loaded only then.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TextIO

from qsnap.cli.output.text import age, clock, date, printable, seconds, shortened, size, table
from qsnap.model.qemu import (
    CheckReport,
    DeleteResult,
    Device,
    Finding,
    Kind,
    Labels,
    LoadResult,
    NodeSnapshot,
    PruneResult,
    Recovered,
    RunState,
    SaveResult,
    Snapshot,
    StateFile,
    Status,
    Struct,
    Unfinished,
    Verdict,
)
from qsnap.targets.choose import SeveralVMs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from qsnap.errors import QsnapError
    from qsnap.targets.choose import KnownVM
    from qsnap.upkeep.freshness import Health

_STYLES = {
    Verdict.SAVED: "green",
    Verdict.CARRIED: "cyan",
    Verdict.IGNORED: "dim",
    Verdict.EXCLUDED: "yellow",
    Verdict.REFUSED: "bold red",
    Kind.FULL: "green",
    Kind.LIVE: "green",
    Kind.DISK_ONLY: "yellow",
    Kind.STATE_ONLY: "red",
    Kind.PARTIAL: "red",
}

#: Columns whose cells may take several lines, and the width that they then need at least.
_FOLDING = frozenset({"WHY", "DEVICES", "DISKS", "MONITOR", "REASONS", "NOTE"})
_FOLDED_TO = 14


def is_terminal(stream: TextIO) -> bool:
    """Whether colours and bars belong there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def write_json(document: Mapping[str, Any], stream: TextIO) -> None:
    """One document, on one line, in ASCII."""
    stream.write(json.dumps(document) + "\n")


def document_of(error: QsnapError) -> dict[str, object]:
    """An error as ``--json`` shows it."""
    return {"error": type(error).__name__, "exit_code": error.status, "message": str(error), **error.details()}


def say_error(error: QsnapError, *, as_json: bool) -> None:
    """An error, on standard error."""
    if as_json:
        write_json(document_of(error), sys.stderr)
        return
    sys.stderr.write(f"qsnap: {printable(str(error), keep_newlines=True)}\n")
    if isinstance(error, SeveralVMs):
        head, rows = _vm_table(error.vms)
        sys.stderr.write(table(head, [[printable(cell) for cell in row] for row in rows]) + "\n")


class Renderer:
    """Shows results to people; the base of the other two."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    # Results

    def save(self, result: SaveResult) -> None:
        self._warn(result.warnings)
        vmstate = _state_place(result.vmstate, result.file, result.labels)
        whole = "" if not result.excluded else f"  NOT WHOLE: without {_names(result.excluded, result.labels)}\n"
        carried = (
            f"  {_names(result.carried, result.labels)}: contents are inside the VM state\n" if result.carried else ""
        )
        old = "replacing the older one" if result.replaced else "new"
        if result.dry_run:
            head = f"would save {printable(result.tag)} ({old}): VM state {vmstate}"
            self._print(f"{head}, snapshots on {_names(result.devices, result.labels)}\n{whole}{carried}")
            if result.pruned:
                self.prune(result.pruned)
            return
        pause = f", guest paused {seconds(result.pause_ms)}" if result.pause_ms else f", guest {result.runstate}"
        replaced = ", replaced the older one" if result.replaced else ""
        self._print(
            f"saved {printable(result.tag)}: {size(result.vm_state_size)} {vmstate}, "
            f"{_count(result.devices, 'device')}{pause}{replaced}\n{whole}{carried}"
        )
        if result.pruned:
            self._print(f"  {_pruned(result.pruned)}\n")

    def prune(self, result: PruneResult) -> None:
        """What became of each snapshot of a series, the newest first, and why."""
        decisions = sorted((*result.keep, *result.remove), key=lambda one: (one.date, one.tag), reverse=True)
        if decisions:
            self._table(
                ("TAG", "KIND", "DATE", "", "REASONS"),
                [
                    (
                        one.tag,
                        one.kind,
                        date(one.date),
                        "keep" if one.reasons else "remove",
                        ", ".join(one.reasons) or "-",
                    )
                    for one in decisions
                ],
            )
        self._print(f"{_pruned(result)}\n")

    def noted(self, snapshots: Sequence[Snapshot]) -> None:
        """What is written down about snapshots now."""
        for snapshot in snapshots:
            self._print(f"{printable(snapshot.tag)}: {printable(_note(snapshot)) or 'not protected'}\n")

    def load(self, result: LoadResult) -> None:
        left = f"  left as it is: {_names(result.excluded, result.labels)}\n" if result.excluded else ""
        asleep = ", as it was saved: `system_wakeup` in its monitor wakes it"
        self._print(
            f"loaded {printable(result.tag)} of {date(result.date)}: {size(result.vm_state_size)} from "
            f"{_file_or_node(result.vmstate, result.file, result.labels)}, {_count(result.devices, 'device')}, "
            f"{seconds(result.duration_ms)}, guest {result.runstate}"
            f"{asleep if result.runstate is RunState.SUSPENDED else ''}\n{left}"
        )

    def delete(self, result: DeleteResult) -> None:
        for tag, nodes in result.deleted.items():
            files = result.files.get(tag, ())
            places = [*([f"from {_names(nodes, result.labels)}"] if nodes else []), *map(printable, files)]
            text = f"deleted {printable(tag)} {' and '.join(places)}" if places else f"no snapshot {printable(tag)}"
            self._print(text + "\n")

    def list(self, snapshots: Sequence[Snapshot]) -> None:
        if not snapshots:
            self._say("no snapshots")
            return
        now = datetime.now(UTC)
        has_notes = any(map(_note, snapshots))
        self._table(
            ("TAG", "KIND", "STATE", "DATE", "AGE", "VM CLOCK", "VMSTATE", "DEVICES", *(["NOTE"] if has_notes else [])),
            [
                (
                    snapshot.tag,
                    snapshot.kind,
                    size(snapshot.vm_state_size) if snapshot.vm_state_size else "-",
                    date(snapshot.date),
                    age(snapshot.date, now),
                    clock(snapshot.vm_clock_ns),
                    _file_or_node(snapshot.vmstate, snapshot.file, snapshot.labels, short=True),
                    (_names(snapshot.devices, snapshot.labels) or "-")
                    + (f" (not {_names(snapshot.missing, snapshot.labels)})" if snapshot.missing else "")
                    + (" (!)" if snapshot.problems else ""),
                    *([_note(snapshot) or "-"] if has_notes else []),
                )
                for snapshot in snapshots
            ],
        )

    def show(self, snapshot: Snapshot, rows: Mapping[str, Sequence[NodeSnapshot]]) -> None:
        now = datetime.now(UTC)
        facts = [
            ("tag", snapshot.tag),
            ("kind", snapshot.kind),
            ("description", snapshot.description),
            ("protected", "yes" if snapshot.protected else ""),
            ("guest was", snapshot.runstate),
            (
                "VM state",
                f"{size(snapshot.vm_state_size)} {_state_place(snapshot.vmstate, snapshot.file, snapshot.labels)}"
                if snapshot.vmstate or snapshot.file
                else "none",
            ),
            ("on the disks", snapshot.disk_tag if snapshot.disk_tag != snapshot.tag else ""),
            ("date", f"{date(snapshot.date)} ({age(snapshot.date, now)} ago)"),
            ("VM clock", clock(snapshot.vm_clock_ns)),
            ("missing on", _names(snapshot.missing, snapshot.labels)),
            *(("problem", problem) for problem in snapshot.problems),
        ]
        for name, value in facts:
            if value:
                self._print(f"{name + ':':<14}{printable(value)}\n")
        self._table(
            ("NODE", "ID", "STATE", "DATE", "VM CLOCK"),
            [
                (
                    _names([node], snapshot.labels),
                    row.id,
                    size(row.vm_state_size),
                    date(row.date),
                    clock(row.vm_clock_ns),
                )
                for node, held in rows.items()
                for row in held
            ],
        )

    def check(self, report: CheckReport) -> None:
        self._devices(report.devices, report.vmstate)
        for finding in report.findings:
            self._print(_finding(finding) + "\n")
        state = f"guest {report.runstate}"
        if report.ok:
            self._print(f"ok: this guest can be saved ({state})\n")
        else:
            self._print(f"not ok: this guest cannot be saved now ({state})\n")

    def status(self, status: Status) -> None:
        facts = (
            ("guest", f"{status.name or '(no name)'}, {status.runstate}"),
            *([("warning", status.trouble)] if status.trouble else []),
            ("QEMU", status.version),
            ("monitor", f"{status.monitor} ({status.transport})"),
            ("snapshots", str(status.snapshots) + _below_overlays(status)),
            ("at work", _at_work(status)),
            ("left behind", "; ".join(_left_behind(status)) or "nothing"),
        )
        for name, value in facts:
            self._print(f"{name + ':':<13}{printable(value)}\n")
        self._devices(status.devices, status.vmstate)

    def health(self, health: Health) -> None:
        """A monitoring plugin's line, also with -q if it is not OK."""
        sys.stdout.write(printable(health.line()) + "\n")

    def recover(self, recovered: Sequence[Recovered]) -> None:
        for item in recovered:
            self._print(f"recovered {_recovered(item)}\n")
        if not recovered:
            self._say("nothing to recover")

    def aftermath(self, recovered: Sequence[Recovered]) -> None:
        """What was done on the way about runs that had died."""
        for item in recovered:
            self._say(f"recovered {_recovered(item)}")

    def vms(self, vms: Sequence[KnownVM]) -> None:
        if not vms:
            self._say("no QEMU is running that this user can see")
            return
        self._table(*_vm_table(vms))

    # How they get out

    def _devices(self, devices: Sequence[Device], vmstate: str | None) -> None:
        self._table(
            ("NODE", "DEVICE", "DRIVER", "ROLE", "VERDICT", "WHY"),
            [
                (
                    device.node or "-",
                    device.device or "-",
                    device.driver or "-",
                    device.role,
                    device.verdict,
                    "; ".join(filter(None, ("holds the VM state" if device.image == vmstate else "", device.why)))
                    if vmstate
                    else device.why,
                )
                for device in devices
            ],
        )

    def _print(self, text: str) -> None:
        sys.stdout.write(text)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"qsnap: {text}\n")

    def _warn(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            sys.stderr.write(_finding(finding) + "\n")

    def _table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        clean = [[printable(cell) for cell in row] for row in rows]
        if self._console is None and not is_terminal(sys.stdout):
            sys.stdout.write(table(head, clean) + "\n")
            return
        from rich import box
        from rich.cells import cell_len
        from rich.console import Console
        from rich.table import Table

        console = self._console or Console()
        widths = [
            _FOLDED_TO if name in _FOLDING else max(map(cell_len, column))
            for name, *column in zip(head, head, *clean, strict=True)
        ]
        if sum(widths) + 3 * len(widths) > console.width:
            # Too narrow: whole lines, which the terminal wraps. Nothing is cut, and a tag can still be copied.
            console.print(table(head, clean), soft_wrap=True, markup=False, highlight=False)
            return
        drawing = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for name in head:
            folds = name in _FOLDING
            drawing.add_column(name, overflow="fold", no_wrap=not folds, justify=_justified(name))
        for original, row in zip(rows, clean, strict=True):
            drawing.add_row(*(_cell(value, text) for value, text in zip(original, row, strict=True)))
        console.print(drawing)


class QuietRenderer(Renderer):
    """Shows nothing but what goes wrong; of a list the names alone, for a loop in a script."""

    def list(self, snapshots: Sequence[Snapshot]) -> None:
        for snapshot in snapshots:
            sys.stdout.write(printable(snapshot.tag) + "\n")

    def vms(self, vms: Sequence[KnownVM]) -> None:
        for vm in vms:
            if vm.word:
                sys.stdout.write(printable(vm.word) + "\n")

    def health(self, health: Health) -> None:
        if health.level.exit_code:
            super().health(health)

    def _print(self, text: str) -> None:
        pass

    def _say(self, text: str) -> None:
        pass

    def _warn(self, findings: Sequence[Finding]) -> None:
        # --live=auto is asked for where nobody wants to know
        super()._warn([finding for finding in findings if finding.code != "not-live"])

    def _table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        pass


class JsonRenderer(Renderer):
    """Shows one JSON document."""

    def _write(self, result: Struct, **more: object) -> None:
        write_json({**result.to_json(), **more}, sys.stdout)

    def save(self, result: SaveResult) -> None:
        self._write(result)

    def load(self, result: LoadResult) -> None:
        self._write(result)

    def delete(self, result: DeleteResult) -> None:
        self._write(result)

    def prune(self, result: PruneResult) -> None:
        self._write(result)

    def noted(self, snapshots: Sequence[Snapshot]) -> None:
        self.list(snapshots)

    def list(self, snapshots: Sequence[Snapshot]) -> None:
        write_json({"snapshots": [snapshot.to_json() for snapshot in snapshots]}, sys.stdout)

    def show(self, snapshot: Snapshot, rows: Mapping[str, Sequence[NodeSnapshot]]) -> None:
        self._write(snapshot, rows={node: [row.to_json() for row in held] for node, held in rows.items()})

    def check(self, report: CheckReport) -> None:
        self._write(report)

    def status(self, status: Status) -> None:
        self._write(status)

    def health(self, health: Health) -> None:
        self._write(health, exit_code=health.level.exit_code)

    def aftermath(self, recovered: Sequence[Recovered]) -> None:
        pass  # standard error is for one document alone

    def recover(self, recovered: Sequence[Recovered]) -> None:
        write_json({"recovered": [item.to_json() for item in recovered]}, sys.stdout)

    def vms(self, vms: Sequence[KnownVM]) -> None:
        write_json({"vms": [vm.to_json() for vm in vms]}, sys.stdout)


def renderer(*, as_json: bool, quiet: bool) -> Renderer:
    """The one that the options ask for."""
    if as_json:
        return JsonRenderer()
    return QuietRenderer() if quiet else Renderer()


def _vm_table(vms: Sequence[KnownVM]) -> tuple[Sequence[str], list[list[str]]]:
    """Heads and rows. The user is shown where one is not ours."""
    head = ["NAME", "PID", "USER", "MEMORY", "DISKS", "MONITOR", "CHOOSE IT BY"]
    rows = [_vm_row(vm) for vm in vms]
    if all(vm.running.is_ours for vm in vms if vm.running):
        for row in (head, *rows):
            del row[2]
    return head, rows


def _vm_row(vm: KnownVM) -> list[str]:
    from qsnap.targets.choose import reason

    if vm.running is None:
        where = str(vm.monitor) if vm.monitor else "-"
        return [vm.name or "-", "-", "-", "-", "-", f"{where} (not seen running)", vm.option or "-"]
    running = vm.running
    point = next((point for point in running.monitors if vm.monitor and point.address == vm.monitor), None)
    monitor = f"{point.address} ({point.protocol.upper()}, {point.state})" if point else reason(running)
    if point and point.holder:
        monitor += f" held by process {point.holder.pid}: {shortened(point.holder.command)}"
    disks = ", ".join(disk.rpartition("/")[2] or disk for disk in running.disks) or "-"
    name = vm.name or "-"
    return [name, str(running.pid), running.user, size(running.memory), disks, monitor, vm.option or "-"]


def _recovered(item: Recovered) -> str:
    deed = f"{item.operation} {', '.join(item.tags)}".rstrip()
    actions = "; ".join(item.actions) or "nothing was left to do"
    if not item.operation:
        return printable(f"from a qsnap that is not known: {actions}")
    return printable(f"from a qsnap that died ({deed}, process {item.pid}, begun {item.began}): {actions}")


def _below_overlays(status: Status) -> str:
    if not status.in_backing:
        return ""
    places = dict.fromkeys(f"{one.image} of {one.device}" for one in status.in_backing)
    return f", and {len(status.in_backing)} out of reach in a backing image ({', '.join(places)})"


def _at_work(status: Status) -> str:
    run = status.run
    if run is None or run.is_alive is False:
        return "nobody"
    doubt = "" if run.is_alive else " (of another machine or container: it may be dead; qsnap recover --force)"
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
    return ": ".join(filter(None, ("protected" if snapshot.protected else "", state, snapshot.description)))


def _pruned(result: PruneResult) -> str:
    removed = ", ".join(one.tag for one in result.remove)
    verb = "would remove" if result.dry_run else "removed"
    kept = f"{'would keep' if result.dry_run else 'kept'} {len(result.keep)} of series {result.prefix}"
    return printable(f"{kept}, {verb} {removed or 'none'}")


def _finding(finding: Finding) -> str:
    head = "refused" if finding.refuses else "warning"
    cure = f"\n  {finding.cure}" if finding.cure else ""
    return printable(f"{head}: {finding.message}{cure}", keep_newlines=True)


def _names(nodes: Sequence[str], labels: Labels) -> str:
    return printable(", ".join(labels.get(node, node) for node in nodes))


def _state_place(vmstate: str | None, file: StateFile | None, names: Labels) -> str:
    """Where the VM state is, in words; of a live save that was not made yet in general."""
    place = _file_or_node(vmstate, file, names)
    return f"on {place}" if vmstate else f"in {place}"


def _file_or_node(vmstate: str | None, file: StateFile | None, names: Labels, *, short: bool = False) -> str:
    if vmstate:
        return _names([vmstate], names)
    if short:
        return "(file)" if file else "-"
    return printable(file.path) if file else "a state file"


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _justified(name: str) -> Literal["left", "right"]:
    return "right" if name in ("STATE", "AGE", "VM CLOCK", "PID", "MEMORY") else "left"


def _cell(value: str, text: str) -> Text:
    from rich.text import Text

    # A Text is taken as it is: a tag like "[red]" is no markup.
    return Text(text, style=_STYLES.get(value, "") if isinstance(value, (Verdict, Kind)) else "")
