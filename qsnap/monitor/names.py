"""All names that qsnap leaves in a QEMU, and what they are for.

Marks are objects of no effect, which keep a text: see :meth:`qsnap.monitor.protocol.Monitor.mark`.
"""

from __future__ import annotations

import os
import re

#: The mark of the run that uses the VM.
CLAIM = "qsnap-claim"
#: The mark of a process that recovers a dead run by nothing but its claim.
RECOVERY = "qsnap-recovery"
#: The mark of a load that failed midway: RAM and disks may be of different moments.
HALF_RESTORED = "qsnap-half-restored"
#: The mark that keeps how long QEMU took to read RAM in the last live save.
READ_TIME = "qsnap-pace"
#: What the names of the marks begin with that tell which snapshots are protected, and whose notes they know of.
PROTECTED, NOTED = "qsnap-kept-", "qsnap-noted-"
#: What the name of the mark begins with that tells which save or load was the last: see qsnap/inventory/lineage.py.
HERE = "qsnap-here-"
#: What the node-name of a state file begins with while QEMU uses it, and what the set of its descriptor is called.
STATE_NODE = "qsnap-state"

_JOB = re.compile(r"qsnap-[a-z]+-(\d+)-\d+")


def state_node() -> str:
    """A new node-name for a state file."""
    return f"{STATE_NODE}-{os.urandom(4).hex()}"


def job_id(verb: str) -> str:
    """A name for a snapshot job of this process. qsnaps in two containers may have the same process id."""
    return f"qsnap-{verb}-{os.getpid()}-{int.from_bytes(os.urandom(4))}"


def pid_of_job(job_id: str) -> int | None:
    """The process that began a snapshot job; None if that was not a qsnap."""
    match = _JOB.fullmatch(job_id)
    return int(match[1]) if match else None
