"""The bar that moves while QEMU writes and answers nobody; on a terminal alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from qsnap.cli.output.show import is_terminal
from qsnap.operations.progress import Progress, Watcher

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar


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
    """The same for ``VM.save``."""
    return progress_bar("saving", quiet=quiet)


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Watcher | None]:
    """A watcher that draws the bar on standard error; None where none belongs."""
    if quiet or not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console

    with make_bar(Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda progress: update(bar, task, progress)
