"""What all commands have in common: their options, and how a result is shown. Light: no click, no asyncio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal, TextIO, TypeAlias

import msgspec

if TYPE_CHECKING:
    from qsnap.model.qemu import Struct
    from qsnap.operations.progress import Watcher
    from qsnap.targets.config import Settings
    from qsnap.vm import VM

#: What a command does with a VM, given its defaults from the config file, and the watcher of its progress.
Action: TypeAlias = "Callable[[VM, Settings, Watcher | None], Awaitable[Struct]]"

#: VMs that are worked on at once by default: they share disks.
PARALLEL_VMS = 2
#: How progress is shown; the first is the default.
PROGRESS_KINDS = ("auto", "json", "none")


class Options(msgspec.Struct, frozen=True):
    """The options that every command takes; those that choose a VM only if it is about VMs.

    Each is named as the parameter that click makes of its option: see :func:`qsnap.cli.options.takes`.

    :ivar progress: how progress is shown: one of :data:`PROGRESS_KINDS`.
    :ivar monitor: None where the command line and the environment name none.
    :ivar vms: the names after ``--vm``.
    :ivar all_vms: every VM of this user that runs.
    :ivar jobs: at so many VMs the work is done at once.
    """

    as_json: bool
    quiet: bool
    verbose: bool
    config: str | None
    progress: str = PROGRESS_KINDS[0]
    monitor: str | None = None
    vms: tuple[str, ...] = ()
    all_vms: bool = False
    jobs: int = PARALLEL_VMS
    timeout_s: float | None = None
    lock_wait_s: float | None = None
    state_dir: str | None = None
    ignore_unseen: bool | None = None

    @property
    def is_of_several(self) -> bool:
        """Whether more than one VM is asked for."""
        return self.all_vms or len(self.vms) > 1

    def shown(self, result: Struct, stream: TextIO | None = None, *, wide: bool = False) -> int:
        """Show a result, and return the exit code for it: see :func:`qsnap.cli.output.show.show`."""
        from qsnap.cli.output.results import exit_code_of
        from qsnap.cli.output.show import show

        show(result, as_json=self.as_json, quiet=self.quiet, stream=stream, wide=wide)
        return exit_code_of(result)


def excluded(given: tuple[str, ...], settings: Settings) -> tuple[str, ...]:
    """The devices to leave out: those of the command line, else those of the config file. "" leaves out none."""
    return tuple(filter(None, given)) if given else settings.exclude or ()


def liveness(live: bool | None, auto: bool, settings: Settings) -> bool | Literal["auto"]:
    """Whether to save live, by the options, and where they say nothing by the config file."""
    if auto:
        return "auto"
    return live if live is not None else settings.live or False
