"""How much memory is free.

Facts (Linux): cgroup v2: what a file without a disk (memfd_create(2)) takes counts as memory.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def available_bytes() -> int:
    """Bytes of memory that are free, or could be made so at once: of the machine, and of the groups that we are in."""
    rooms = [sum(_number(line) for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable:")) * 1024]
    for line in _lines(Path("/proc/self/cgroup")):
        if line.startswith("0::"):
            group = Path("/sys/fs/cgroup") / line[3:].strip().lstrip("/")
            for level in (group, *group.parents):
                with suppress(OSError, ValueError):
                    most = int((level / "memory.max").read_text())
                    used = int((level / "memory.current").read_text())
                    rooms.append(most - used + sum(map(_number, filter(_is_cache, _lines(level / "memory.stat")))))
    return max(0, min(rooms))


def _is_cache(line: str) -> bool:
    return line.startswith(("inactive_file ", "active_file "))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(line: str) -> int:
    return int(line.split()[1])
