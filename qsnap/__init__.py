"""qsnap: named, checked, restorable snapshots of running QEMU guests, from the monitor socket alone.

The names below are the public library; importing ``qsnap`` alone loads none of it. ``qsnap.sync`` is the same without
``await``.
"""

from __future__ import annotations

TYPE_CHECKING = False  # known to type checkers by its name; ``typing`` itself takes a tenth of our start
if TYPE_CHECKING:
    from qsnap.connecting import connect
    from qsnap.errors import (
        BadUsage,
        CommandFailed,
        ConnectError,
        GuestLeftStopped,
        Interrupted,
        JobFailed,
        MonitorBusy,
        MonitorError,
        MonitorLost,
        NotSupported,
        NoVM,
        OperationTimeout,
        PartialFailure,
        PrecheckRefused,
        QsnapError,
        SnapshotExists,
        SnapshotNotFound,
        VerifyFailed,
        VMLocked,
    )
    from qsnap.joint import Done, together
    from qsnap.model.checks import CheckReport
    from qsnap.model.results import DeleteResult, LoadResult, PruneResult, SaveResult, Status
    from qsnap.model.snapshots import Position, Snapshot, Tree
    from qsnap.operations.progress import Progress
    from qsnap.targets.choose import SeveralVMs
    from qsnap.upkeep.retention import Policy
    from qsnap.vm import VM

__version__ = "0.1.0"

__all__ = [
    "VM",
    "BadUsage",
    "CheckReport",
    "CommandFailed",
    "ConnectError",
    "DeleteResult",
    "Done",
    "GuestLeftStopped",
    "Interrupted",
    "JobFailed",
    "LoadResult",
    "MonitorBusy",
    "MonitorError",
    "MonitorLost",
    "NoVM",
    "NotSupported",
    "OperationTimeout",
    "PartialFailure",
    "Policy",
    "Position",
    "PrecheckRefused",
    "Progress",
    "PruneResult",
    "QsnapError",
    "SaveResult",
    "SeveralVMs",
    "Snapshot",
    "SnapshotExists",
    "SnapshotNotFound",
    "Status",
    "Tree",
    "VMLocked",
    "VerifyFailed",
    "connect",
    "together",
]

#: Where names are that are not in ``errors``.
_HOMES = {
    "connect": "connecting", "VM": "vm", "CheckReport": "model.checks", "Snapshot": "model.snapshots",
    "Position": "model.snapshots", "Tree": "model.snapshots", "Progress": "operations.progress",
    "Policy": "upkeep.retention", "SeveralVMs": "targets.choose", "DeleteResult": "model.results",
    "LoadResult": "model.results", "PruneResult": "model.results", "SaveResult": "model.results",
    "Status": "model.results", "together": "joint", "Done": "joint",
}  # fmt: skip

if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'qsnap' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"qsnap.{_HOMES.get(name, 'errors')}"), name)
