"""qsnap: named, checked, restorable snapshots of running QEMU guests, from the monitor socket alone.

The names below are the public library; importing ``qsnap`` alone loads none of it.
"""

from __future__ import annotations

TYPE_CHECKING = False  # known to type checkers by its name; ``typing`` itself takes a tenth of our start
if TYPE_CHECKING:
    from qsnap.errors import QsnapError
    from qsnap.model.checks import CheckReport
    from qsnap.model.results import DeleteResult, LoadResult, SaveResult, Status
    from qsnap.model.snapshots import Snapshot
    from qsnap.vm import VM, connect

__version__ = "0.1.0"

__all__ = [
    "VM",
    "CheckReport",
    "DeleteResult",
    "LoadResult",
    "QsnapError",
    "SaveResult",
    "Snapshot",
    "Status",
    "connect",
]  # fmt: skip

_HOMES = {
    "connect": "vm", "VM": "vm", "QsnapError": "errors", "CheckReport": "model.checks", "Snapshot": "model.snapshots",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'qsnap' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"qsnap.{_HOMES.get(name, 'model.results')}"), name)
