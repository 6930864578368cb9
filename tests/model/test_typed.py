"""Several threads meet a type of ours for the first time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qsnap

pytestmark = pytest.mark.no_qemu

#: With msgspec's own functions this ends with SIGSEGV.
THREADS = """
import sys
import threading
import msgspec
from qsnap.model import typed

sys.setswitchinterval(1e-6)
for number in range(300):
    inner = msgspec.defstruct("Inner", [(f"f{n}", int | None, None) for n in range(6)])
    kind = msgspec.defstruct("Kind", [("a", list[inner]), ("b", inner | None, None), ("c", dict[str, inner], {})])
    gate = threading.Barrier(3)

    def use():
        gate.wait()
        value = {"a": [{"f0": 1}]}
        typed.decode(msgspec.json.encode(value), kind) if number % 2 else typed.convert(value, kind)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_a_type_that_several_threads_use_first() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_else_makes_values_of_a_type() -> None:
    package = Path(qsnap.__file__).parent
    makes = re.compile(r"msgspec\.convert\(|msgspec\.json\.(decode\(.*type=|Decoder)")
    found = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if makes.search(path.read_text())]
    assert found == ["model/typed.py"]
