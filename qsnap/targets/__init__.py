"""The QEMUs that run on this machine: their names, their monitors, and who holds a monitor that is taken.

Nothing is connected to, as a monitor serves one client at a time: the command lines name the monitors
(``arguments``), and the kernel tells what is at their sockets (``sockets``, ``machine``).
"""

from qsnap.targets.command_line import parse_arguments, qemu_arguments
from qsnap.targets.running import explained, holder, is_qemu, running_vms
from qsnap.targets.vms import DEFAULT_MEMORY, Holder, MonitorPoint, MonitorState, RunningVM, find, usable

__all__ = [
    "DEFAULT_MEMORY",
    "Holder",
    "MonitorPoint",
    "MonitorState",
    "RunningVM",
    "explained",
    "find",
    "holder",
    "is_qemu",
    "parse_arguments",
    "qemu_arguments",
    "running_vms",
    "usable",
]
