"""What commands show beside the library's own results, each a type of its own.

The type alone decides how a result looks (``people``) and what the command exits with; ``to_json`` is its document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qsnap.errors import GuestLeftStopped, NotSupported, PartialFailure, PrecheckRefused, QsnapError, VerifyFailed
from qsnap.model.checks import CheckReport
from qsnap.model.machine import Machine
from qsnap.model.qemu import NodeSnapshot, Struct, named
from qsnap.model.results import Recovered, VerifyResult
from qsnap.model.snapshots import Position, Snapshot

if TYPE_CHECKING:
    from qsnap.targets.choose import KnownVM
    from qsnap.upkeep.freshness import Health


class Snapshots(Struct, frozen=True):
    """The snapshots, and where the guest is."""

    snapshots: tuple[Snapshot, ...]
    position: Position = Position()
    other_series: tuple[str, ...] = ()
    """The prefixes of the series that exist, if that of ``--prefix`` has no snapshot."""


class Notes(Struct, frozen=True):
    """The snapshots whose notes have changed."""

    snapshots: tuple[Snapshot, ...]


class Details(Struct, frozen=True):
    """A snapshot, and its rows in the tables of the devices."""

    snapshot: Snapshot
    rows: Mapping[str, tuple[NodeSnapshot, ...]]
    state: Machine | None = None

    def to_json(self) -> dict[str, Any]:
        rows = {node: [row.to_json() for row in held] for node, held in self.rows.items()}
        state = {"state": self.state.to_json()} if self.state else {}
        document: dict[str, Any] = named({"rows": rows, "labels": self.snapshot.labels})
        return {**self.snapshot.to_json(), "rows": document["rows"], **state}


class Recoveries(Struct, frozen=True):
    """What was done about runs that had died."""

    recovered: tuple[Recovered, ...]


class PluginAnswer(Struct, frozen=True):
    """Whether snapshots are fresh, as a monitoring plugin answers."""

    health: Health

    def to_json(self) -> dict[str, Any]:
        return {**self.health.to_json(), "exit_code": exit_code_of(self)}


class KnownVMs(Struct, frozen=True):
    """The VMs that run, and those that the config file names."""

    vms: tuple[KnownVM, ...]

    def to_json(self) -> dict[str, Any]:
        return {"vms": [vm.to_json() for vm in self.vms]}


class Outcome(NamedTuple):
    """The result, or the error, of one VM.

    :ivar title: what to call the VM.
    """

    title: str
    result: Struct | QsnapError

    def to_json(self) -> dict[str, Any]:
        key = "error" if isinstance(self.result, QsnapError) else "result"
        return {"vm": self.title, "exit_code": exit_code_of(self.result), key: self.result.to_json()}


class OfVM(Struct, frozen=True):
    """The result of a command for one VM, which is named."""

    vm: str
    result: Struct

    def to_json(self) -> dict[str, Any]:
        return {"vm": self.vm, **self.result.to_json()}


class Outcomes(Struct, frozen=True):
    """The results of a command for several VMs."""

    vms: tuple[Outcome, ...]
    stop_spread_ms: float | None = None
    """Together: milliseconds from the first guest's stop to the last one's; None if fewer than two were stopped."""
    resume_spread_ms: float | None = None
    """Together: milliseconds from the first guest's resumption to the last one's."""

    def to_json(self) -> dict[str, Any]:
        spreads = {"stop_spread_ms": self.stop_spread_ms, "resume_spread_ms": self.resume_spread_ms}
        return {
            "vms": [one.to_json() for one in self.vms],
            **{name: value for name, value in spreads.items() if value is not None},
        }


def exit_code_of(result: object) -> int:
    """The exit code of a command with this *result*."""
    match result:
        case OfVM():
            return exit_code_of(result.result)
        case QsnapError():
            return result.exit_code
        case CheckReport():
            return 0 if result.ok else PrecheckRefused.exit_code
        case VerifyResult():
            verdicts = [one.ok for one in result.snapshots]
            return VerifyFailed.exit_code if False in verdicts else NotSupported.exit_code if None in verdicts else 0
        case PluginAnswer():
            return result.health.level.exit_code
        case Outcomes():
            return _common_exit_code([result for _, result in result.vms])
    return 0


def _common_exit_code(results: Sequence[object]) -> int:
    """The code that all have in common; else the worst of plugins' answers, 20 if any guest is left stopped, or 3."""
    codes = {exit_code_of(result) for result in results}
    if all(isinstance(result, PluginAnswer) for result in results):
        return max(codes, key=(0, 1, 3, 2).index)
    if len(codes) == 1:
        return codes.pop()
    return GuestLeftStopped.exit_code if GuestLeftStopped.exit_code in codes else PartialFailure.exit_code
