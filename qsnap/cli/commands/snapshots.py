"""Snapshots that are there: load, list, show and delete them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qsnap.cli.commands import work
from qsnap.cli.common import Options, excluded
from qsnap.cli.options import (
    Command,
    common_options,
    completes,
    exclude_option,
    prefix_option,
    tag_argument,
    tags_argument,
)
from qsnap.errors import BadUsage

if TYPE_CHECKING:
    from qsnap.cli.output.results import Details, Snapshots
    from qsnap.targets.config import Settings
    from qsnap.vm import VM


@click.command(cls=Command)
@tag_argument
@click.option("--paused", is_flag=True, help="Leave the guest paused.")
@click.option("--running", is_flag=True, help="Run the guest, even if it was paused.")
@exclude_option
@click.option(
    "--force",
    is_flag=True,
    help="Load even if a disk has other backing images, or the machine is another one, than at the save.",
)
@click.option("--full", is_flag=True, help="Load all of RAM, not only what differs.")
@click.option("--verify", is_flag=True, help="Compare all of RAM with the snapshot before the guest runs again.")
@common_options
def load(
    options: Options,
    tag: str,
    paused: bool,
    running: bool,
    exclude: tuple[str, ...],
    force: bool,
    full: bool,
    verify: bool,
) -> int:
    """Restore RAM, device state and all disks from snapshot TAG.

    What the guest has done since is lost. It is left in the run state that it had, running or paused.
    """
    if paused and running:
        raise BadUsage("--paused and --running cannot be used together")
    wanted = running if paused or running else None
    return work(
        options,
        lambda vm, settings: vm.load(
            tag, running=wanted, exclude=excluded(exclude, settings), force=force, full=full, verify=verify
        ),
    )


@click.command("list", cls=Command)
@common_options
def list_(options: Options) -> int:
    """List the snapshots, oldest first."""
    from qsnap.cli.output.results import Snapshots

    async def found(vm: VM, _: Settings) -> Snapshots:
        return Snapshots(snapshots=tuple(await vm.list()))

    return work(options, found)


@click.command(cls=Command)
@tag_argument
@click.option("--state", is_flag=True, help="Show the machine in its VM state: its type, RAM blocks and devices.")
@common_options
def show(options: Options, tag: str, state: bool) -> int:
    """Show snapshot TAG, device by device."""
    from qsnap.cli.output.results import Details

    async def found(vm: VM, _: Settings) -> Details:
        snapshot, rows = await vm.show(tag)
        return Details(snapshot=snapshot, rows=rows, state=await vm.state(tag) if state else None)

    return work(options, found)


@click.command(cls=Command)
@click.argument("tags", metavar="[TAG]...", nargs=-1, shell_complete=completes("tags"))
@prefix_option
@click.option("--read-data", is_flag=True, help="Read all data, and compare them with checksums.")
@common_options
def verify(options: Options, tags: tuple[str, ...], prefix: str | None, read_data: bool) -> int:
    """Verify that snapshots are whole, while the guest runs on.

    Without TAG: all snapshots. Each VM state is read from its first byte to its last one, and the tables of the images
    are checked. With --read-data all that is stored is read. The first time, its checksums are written down; later they
    are compared. Exit code 10: something is damaged; 5: nothing is, but something could not be checked.
    """
    from qsnap.cli.output.bar import progress_bar

    if tags and prefix is not None:
        raise BadUsage("a tag and --prefix cannot be used together")
    with progress_bar("verifying", quiet=options.quiet or options.is_of_several) as watch:
        return work(options, lambda vm, _: vm.verify(*tags, prefix=prefix, read_data=read_data, watch=watch))


@click.command(cls=Command)
@tags_argument
@click.option("--missing-ok", is_flag=True, help="It is not an error if a snapshot does not exist.")
@common_options
def delete(options: Options, tags: tuple[str, ...], missing_ok: bool) -> int:
    """Delete snapshots from every device that holds them."""
    return work(options, lambda vm, _: vm.delete(*tags, missing_ok=missing_ok))
