"""A file of metrics for Prometheus' node exporter (its textfile collector): the last save and drill, and the snapshots.

A file holds the metrics of any number of VMs and series; a run keeps the values that it does not know. The file is
replaced by renaming, so nobody reads half of it. qsnap does not touch a file that holds anything but its own metrics.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from qsnap.errors import BadUsage, QsnapError
from qsnap.host import files


class Metric(NamedTuple):
    """One kind of metric."""

    name: str
    type: str
    help: str


LAST_SUCCESS = Metric("qsnap_save_last_success_timestamp_seconds", "gauge", "When the last save succeeded.")
LAST_EXIT_CODE = Metric("qsnap_save_last_exit_code", "gauge", "Exit code of the last save.")
FAILURES = Metric("qsnap_save_failures_total", "counter", "Number of failed saves.")
PAUSE = Metric("qsnap_save_pause_seconds", "gauge", "How long the last save paused the guest.")
DURATION = Metric("qsnap_save_duration_seconds", "gauge", "How long the last save took.")
DRILL_SUCCESS = Metric("qsnap_drill_last_success_timestamp_seconds", "gauge", "When the last restore drill succeeded.")
DRILL_EXIT_CODE = Metric("qsnap_drill_last_exit_code", "gauge", "Exit code of the last restore drill.")
DRILL_DURATION = Metric("qsnap_drill_duration_seconds", "gauge", "How long the last restore drill took.")
COUNT = Metric("qsnap_snapshots", "gauge", "Number of snapshots.")
NEWEST = Metric(
    "qsnap_snapshot_newest_timestamp_seconds", "gauge", "When the newest snapshot that can be loaded was made."
)
AGE = Metric("qsnap_snapshot_newest_age_seconds", "gauge", "Age of that snapshot when this was written.")
SIZE = Metric("qsnap_snapshot_newest_size_bytes", "gauge", "Size of its VM state.")

METRICS = (
    LAST_SUCCESS, LAST_EXIT_CODE, FAILURES, PAUSE, DURATION, DRILL_SUCCESS, DRILL_EXIT_CODE, DRILL_DURATION, COUNT,
    NEWEST, AGE, SIZE,
)  # fmt: skip

#: A metric, and its labels as they are written.
_Key = tuple[str, str]


def check(path: Path) -> None:
    """Refuse a path where metrics could not be written.

    :raise BadUsage: no file can be created there, or the file there is not qsnap's.
    """
    try:
        place = files.resolved_file(path)
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it cannot be written")
    except OSError as error:
        raise BadUsage(
            f"a metrics file cannot be created in {path.parent}: {error.strerror}; nothing was done"
        ) from error
    _read(place)


def update(path: Path, labels: Mapping[str, str], values: Mapping[Metric, float], *, failed: bool = False) -> None:
    """Write *values* of one VM and series into the file at *path*.

    :param failed: count one more failure.
    :raise QsnapError: the file cannot be written.
    :raise BadUsage: the file there is not qsnap's.
    """
    written = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    try:
        place = files.resolved_file(path)
        with _alone(place.parent):
            figures = _read(place)
            for metric, value in values.items():
                figures[metric.name, written] = value
            count = figures.get((FAILURES.name, written), 0)
            if failed or LAST_EXIT_CODE in values:
                figures[FAILURES.name, written] = count + failed
            _write(place, figures)
    except OSError as error:
        raise QsnapError(f"the metrics file {path} cannot be written: {error.strerror}") from error


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Lock the files of a directory against other qsnaps, for the duration of a block."""
    with files.directory(directory) as where:
        lock = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=where)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _escaped(text: str) -> str:
    clean = text.encode(errors="replace").decode()
    return clean.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _read(path: Path) -> dict[_Key, float]:
    try:
        text = files.read(path).decode()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadUsage(f"{path} cannot be read, so it is left alone: {reason}") from error
    names = {metric.name for metric in METRICS}
    figures: dict[_Key, float] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"(\w+)\{(.*)\} ([-+.\de]+|[-+]?Inf|NaN)", line)
        if not found or found[1] not in names:
            raise BadUsage(f"{path} contains what is not a metric of qsnap ({line[:60]!r}), so it is left alone")
        figures[found[1], found[2]] = float(found[3])
    return figures


def _write(path: Path, figures: Mapping[_Key, float]) -> None:
    lines = []
    for metric in METRICS:
        own = [(labels, value) for (name, labels), value in figures.items() if name == metric.name]
        if own:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.type}"]
            lines += [f"{metric.name}{{{labels}}} {value!r}" for labels, value in sorted(own)]
    # The exporter is another user
    files.replace(path, ("\n".join(lines) + "\n").encode(), mode=0o644)
