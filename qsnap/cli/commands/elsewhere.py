"""A snapshot elsewhere: export it, and start a guest from an export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qsnap.cli.commands import work
from qsnap.cli.common import Options
from qsnap.cli.options import Command, completes, one_vm_options, output_options, qemu_option, tag_argument, takes
from qsnap.errors import BadUsage

if TYPE_CHECKING:
    from qsnap.model.results import ExportResult
    from qsnap.operations.progress import Watcher
    from qsnap.vm import VM


@click.command(cls=Command)
@tag_argument
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path), shell_complete=completes("directories"))
@click.option(
    "--keep-backing",
    is_flag=True,
    help="Do not copy backing images: the disks of the export stand on them. Default: the disks are made complete.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Export even if a disk has other backing images than at the save, or if there seems to be too little room.",
)
@one_vm_options
def export(options: Options, tag: str, directory: Path, keep_backing: bool, force: bool) -> int:
    """Export snapshot TAG to DIR, to start it on another machine.

    DIR, which must not exist, gets the disks as they were, the VM state, QEMU's command line without what belongs to
    this host, and checksums. The guest runs meanwhile. An option or a device that cannot be used elsewhere is refused
    by name.
    """

    if options.is_of_several:
        raise BadUsage("DIR is for one VM: export one at a time")

    async def action(vm: VM, _: object, watch: Watcher | None) -> ExportResult:
        return await vm.export(tag, directory, keep_backing=keep_backing, force=force, watch=watch)

    return work(options, action, shows="exporting")


@click.command(cls=Command)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path), shell_complete=completes("directories"))
@click.argument("qemu_options", metavar="[-- QEMU OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    metavar="WORKDIR",
    shell_complete=completes("directories"),
    help="The new directory for overlays, sockets and logs. Default: a temporary one, which goes when QEMU ends.",
)
@click.option("--paused", is_flag=True, help="Leave the guest paused.")
@click.option("--network", is_flag=True, help="Connect the network cards to QEMU's user network. Default: to nothing.")
@click.option("--no-check", is_flag=True, help="Compare only the sizes of the files, not their checksums.")
@click.option(
    "--within",
    "within_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    default=600.0,
    help="How long QEMU may take to load the VM state. Default: 600.",
)
@qemu_option
@takes(*output_options)
def boot(
    options: Options,
    directory: Path,
    qemu_options: tuple[str, ...],
    work: Path | None,
    paused: bool,
    network: bool,
    no_check: bool,
    within_s: float,
    qemu: str | None,
) -> int:
    """Start a QEMU from the export in DIR, and leave it running.

    The guest goes on where the snapshot left off. It writes to overlays: the export stays as it is, and several can be
    started from it at once. It has no network. What follows -- is appended to QEMU's command line.
    """
    from qsnap.cli.signals import run_interruptibly
    from qsnap.model.requests import BootRequest
    from qsnap.operations.portable.boot import boot as start

    request = BootRequest(
        directory=str(directory),
        work=None if work is None else str(work),
        qemu=qemu,
        options=qemu_options,
        paused=paused,
        network=network,
        checks_sums=not no_check,
        within_s=within_s,
    )
    return options.shown(run_interruptibly(start(request)))
