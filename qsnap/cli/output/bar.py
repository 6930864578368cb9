"""Progress on standard error: on a terminal a bar, which moves while QEMU answers nobody; or lines of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from qsnap.cli.output.show import is_terminal
from qsnap.operations.progress import Progress, Watcher

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from qsnap.cli.common import Options


def make_bar(console: Console, clock: Callable[[], float] = time.monotonic) -> Bar:
    """A bar in bytes; without a total only the time runs."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        get_time=clock,
    )


def update(bar: Bar, task: int, progress: Progress) -> None:
    """Show *progress*. The total is an estimate, so the bar stops short of it until the save has ended."""
    from rich.progress import TaskID

    if progress.written is None or progress.expected is None:
        bar.update(TaskID(task), description=f"{progress.phase} (QEMU does not answer meanwhile)")
        return
    total = progress.expected
    bar.update(
        TaskID(task),
        description=f"{progress.phase:<8}",
        total=total,
        completed=min(progress.written, int(total * 0.99)),
    )


def save_bar(*, quiet: bool) -> AbstractContextManager[Watcher | None]:
    """A bar for ``VM.save``."""
    return _bar("saving", quiet=quiet)


def shown_progress(what: str, options: Options) -> AbstractContextManager[Watcher | None]:
    """A watcher that shows progress on standard error, as the options say; None where none is shown.

    Of several VMs none is, because their bars would be mixed up.

    :param what: what the bar says before the first look.
    """
    if options.progress == "json" and not options.is_of_several:
        return nullcontext(_write_line)
    return _bar(what, quiet=options.quiet or options.is_of_several or options.progress == "none")


def _write_line(progress: Progress) -> None:
    """A line of JSON, with the keys of restic's status messages and the phase."""
    done, total = progress.written, progress.expected
    share = {} if done is None or not total else {
        "percent_done": round(min(done / total, 1.0), 4), "total_bytes": total, "bytes_done": min(done, total),
    }  # fmt: skip
    line = {"message_type": "status", "phase": progress.phase, "seconds_elapsed": round(progress.elapsed_s, 1), **share}
    with suppress(OSError):
        sys.stderr.write(json.dumps(line) + "\n")


@contextmanager
def _bar(what: str, *, quiet: bool) -> Iterator[Watcher | None]:
    """A watcher that draws the bar on standard error; None where none belongs."""
    if quiet or not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console

    with make_bar(Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda progress: update(bar, task, progress)
