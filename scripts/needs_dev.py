"""Import this first: what the Python scripts beside it need is there afterwards, installed as scripts/test does.

A script that is ended by SIGTERM ends the QEMUs that it has started, as it does after Ctrl-C. And the qsnap that it
runs has its bytecode, as an installed one does: a measurement should not compile it each time.

Where the Python that runs has no qsnap or no pytest (after scripts/demo alone, or by the system's Python), both are
installed into .venv, and the script begins anew there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

_TOP = Path(__file__).resolve().parent.parent
_NEEDS = """
. scripts/setup.sh
need_packages qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils
need_qsnap "[dev]"
"""

if not (find_spec("pytest") and find_spec("qsnap") and find_spec("qemu")):
    subprocess.run(["bash", "-c", _NEEDS], cwd=_TOP, check=True)
    python = _TOP / ".venv/bin/python"
    os.execv(python, [str(python), *sys.argv])  # noqa: S606

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
