"""How qsnap talks to a QEMU. Errors of libraries and of the system are mapped to qsnap's own inside this package.

A sequence gets a :class:`Monitor` and never learns which one. :func:`open_monitor` finds out what is at an address.
"""

from __future__ import annotations

from qsnap.monitor.opening import GREETING_TIMEOUT_S, adopt_monitor, open_monitor
from qsnap.monitor.protocol import Monitor

__all__ = ["GREETING_TIMEOUT_S", "Monitor", "adopt_monitor", "open_monitor"]
