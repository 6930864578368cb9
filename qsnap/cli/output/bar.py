"""Progress on standard error: on a terminal a bar, which moves while QEMU answers nobody; or lines of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from qsnap.cli.output.show import is_terminal
from qsnap.cli.output.text import cut, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from qsnap.cli.common import Options
    from qsnap.operations.progress import Progress, Watcher

#: Who watches the work with the VM of a name, for the duration of a block; None where no progress is shown.
Watching: TypeAlias = "Callable[[str], AbstractContextManager[Watcher | None]]"
#: The columns of a terminal that a VM's name takes before a bar.
_TITLE = 16


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


def update(bar: Bar, task: int, progress: Progress, head: str = "") -> None:
    """Show *progress*. The total is an estimate, so the bar stops short of it until the save has ended.

    :param head: what the bar begins with.
    """
    from rich.progress import TaskID

    if progress.written is None or progress.expected is None:
        bar.update(TaskID(task), description=f"{head}{progress.phase} (QEMU does not answer meanwhile)")
        return
    total = progress.expected
    bar.update(
        TaskID(task),
        description=f"{head}{progress.phase:<8}",
        total=total,
        completed=min(progress.written, int(total * 0.99)),
    )


@contextmanager
def shown_progress(what: str, options: Options) -> Iterator[Watching]:
    """What gives the work with a VM its watcher, who shows its progress on standard error as the options say.

    :param what: what the bar says before the first look; "" shows no progress.
    """
    if what and options.progress == "json":
        yield lambda title: nullcontext(partial(_write_line, title))
    elif not what or options.quiet or options.progress == "none" or not is_terminal(sys.stderr):
        yield lambda _: nullcontext()
    else:
        with bars(what, is_of_several=options.is_of_several) as watching:
            yield watching


@contextmanager
def bars(what: str, *, is_of_several: bool = False) -> Iterator[Watching]:
    """A bar on standard error for each VM while there is work with it; of several it begins with the VM's name."""
    from rich.console import Console

    with make_bar(Console(stderr=True)) as bar:

        @contextmanager
        def watching(title: str) -> Iterator[Watcher]:
            head = f"{cut(printable(title), _TITLE)}: " if is_of_several else ""
            task = bar.add_task(head + what, total=None)
            try:
                yield lambda progress: update(bar, task, progress, head)
            finally:
                bar.remove_task(task)

        yield watching


def _write_line(title: str, progress: Progress) -> None:
    """A line of JSON, with the keys of restic's status messages, the VM and the phase."""
    done, total = progress.written, progress.expected
    share = {} if done is None or not total else {
        "percent_done": round(min(done / total, 1.0), 4), "total_bytes": total, "bytes_done": min(done, total),
    }  # fmt: skip
    when = {"phase": progress.phase, "seconds_elapsed": round(progress.elapsed_s, 1)}
    with suppress(OSError):
        sys.stderr.write(json.dumps({"message_type": "status", "vm": title or None, **when, **share}) + "\n")
