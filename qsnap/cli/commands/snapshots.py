"""Snapshots that are there: load, list, show, verify and delete them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsnap.cli.commands import work
from qsnap.cli.common import Options, excluded
from qsnap.cli.options import (
    Command,
    common_options,
    completes,
    exclude_option,
    image_option,
    prefix_option,
    qemu_option,
    tag_argument,
    tags_argument,
    textfile_option,
    together_option,
    whole_option,
    wide_option,
)
from qsnap.errors import BadUsage, SnapshotNotFound
from qsnap.tags import UNDO_SERIES, all_series, is_of_series

if TYPE_CHECKING:
    from qsnap.cli.output.results import Details, Snapshots
    from qsnap.model.results import DeleteResult, DrillResult, LoadResult
    from qsnap.model.snapshots import Snapshot
    from qsnap.operations.progress import Watcher
    from qsnap.targets.config import Settings
    from qsnap.vm import VM

#: By what ``list`` can be sorted.
_SORT_KEYS: Mapping[str, Callable[[Snapshot], Any]] = {
    "date": lambda one: (one.date, one.tag),
    "tag": lambda one: one.tag,
    "size": lambda one: (one.vm_state_size, one.date),
}


@click.command(cls=Command)
@click.argument("tag", required=False, shell_complete=completes("tags"))
@click.option("--latest", is_flag=True, help="The newest that can be loaded, except what undo keeps.")
@prefix_option
@click.option("--paused", is_flag=True, help="Leave the guest paused.")
@click.option("--running", is_flag=True, help="Run the guest, even if it was paused.")
@exclude_option
@click.option(
    "--force",
    is_flag=True,
    help="Load even if a disk has other backing images than at the save, or the machine is a different one.",
)
@click.option("--full", is_flag=True, help="Load all of RAM, not only what differs.")
@click.option("--verify", is_flag=True, help="Compare all of RAM with the snapshot before the guest runs again.")
@click.option(
    "--save-current/--no-save-current",
    default=None,
    help="First save what the load discards, for qsnap undo (the last one is kept); =TAG saves it as TAG, for good.",
)
@click.option("--save-current-as", hidden=True)
@click.option("--sync-time", is_flag=True, help="Set the guest's clock afterwards, through the guest agent.")
@together_option
@common_options
def load(
    options: Options,
    tag: str | None,
    latest: bool,
    prefix: str | None,
    paused: bool,
    running: bool,
    exclude: tuple[str, ...],
    force: bool,
    full: bool,
    verify: bool,
    save_current: bool | None,
    save_current_as: str | None,
    sync_time: bool,
    together: bool,
) -> int:
    """Restore RAM, device state and all disks from snapshot TAG.

    What the guest has done since is lost, unless --save-current is given. It is left in the run state that it had,
    running or paused. With --together, all VMs are checked before one is touched, and all guests run on at the same
    time. If QEMU fails to load one, that guest is left stopped, and the others are loaded.
    """
    if paused and running:
        raise BadUsage("--paused and --running cannot be used together")
    if (tag is None) != latest:
        raise BadUsage("name a snapshot, or --latest for the newest" if tag is None else "a TAG and --latest: use one")
    if prefix is not None and not latest:
        raise BadUsage("--prefix goes with --latest")
    wanted = running if paused or running else None

    async def loaded(vm: VM, settings: Settings, watch: Watcher | None) -> LoadResult:
        return await vm.load(
            tag if tag is not None else _newest(await vm.list(), prefix),
            running=wanted,
            exclude=excluded(exclude, settings),
            force=force,
            full=full,
            verify=verify,
            save_current=save_current_as or (settings.save_current or False if save_current is None else save_current),
            sync_time=sync_time,
            watch=watch,
        )

    return work(options, loaded, shows="loading", together=together)


def _newest(found: Sequence[Snapshot], prefix: str | None) -> str:
    """The tag of the newest that can be loaded, of a series or of all that undo does not keep.

    :raise SnapshotNotFound: there is none.
    """
    from qsnap.inventory.snapshots import is_loadable

    def is_meant(tag: str) -> bool:
        return not is_of_series(tag, UNDO_SERIES) if prefix is None else is_of_series(tag, prefix)

    tags = [one.tag for one in found if is_loadable(one) and is_meant(one.tag)]
    if not tags:
        of_series = "" if prefix is None else f" of series {prefix!r}"
        there = ", ".join(all_series(one.tag for one in found)) if prefix is not None else ""
        others = f"; the series that there are: {there}" if there else ""
        raise SnapshotNotFound("", f"no snapshot{of_series} can be loaded; the guest was not touched{others}")
    return tags[-1]


@click.command(cls=Command)
@click.option(
    "--save-current/--no-save-current", default=True, help="Save first what this discards, for another undo (default)."
)
@common_options
def undo(options: Options, save_current: bool) -> int:
    """Undo the last load: restore what it discarded.

    That load must have saved it: qsnap load --save-current TAG, or save-current = true in the config file.
    """
    return work(options, lambda vm, _, watch: vm.undo(save_current=save_current, watch=watch), shows="loading")


@click.command("list", cls=Command)
@prefix_option
@click.option("--last", type=click.IntRange(1), metavar="N", help="Only the newest N.")
@click.option(
    "--sort", type=click.Choice([*_SORT_KEYS]), default="date", metavar="KEY", help=f"Sort by {', '.join(_SORT_KEYS)}."
)
@click.option("--reverse", is_flag=True, help="The newest, or greatest, first.")
@wide_option
@image_option
@common_options
def list_(
    options: Options,
    images: tuple[str, ...],
    prefix: str | None,
    last: int | None,
    sort: str,
    reverse: bool,
    wide: bool,
) -> int:
    """List the snapshots, oldest first.

    On a terminal, columns that say the same everywhere are left out, and long texts are cut; --wide shows everything,
    as a pipe gets it.
    """
    from qsnap.cli.output.results import Snapshots
    from qsnap.cli.several import do

    async def found(vm: VM, *_: object) -> Snapshots:
        tree = await vm.tree()
        of_it = [one for one in tree.snapshots if prefix is None or is_of_series(one.tag, prefix)]
        shown = sorted(of_it[-last if last else 0 :], key=_SORT_KEYS[sort], reverse=reverse)
        others = all_series(one.tag for one in tree.snapshots) if prefix is not None and not of_it else ()
        return Snapshots(snapshots=tuple(shown), position=tree.position, other_series=others)

    return options.shown(do(options, found, looks=True, images=images), wide=wide)


@click.command(cls=Command)
@image_option
@common_options
def tree(options: Options, images: tuple[str, ...]) -> int:
    """Show what was made from what, and where you are.

    Each snapshot is below the one that the guest had come from when it was saved: in the same column, or as a branch
    if there are several. You are below the one that was loaded or saved last. If another client may have loaded or
    saved since, and nothing in the image tells, that is said. On a terminal, long lines are cut.
    """
    return work(options, lambda vm, *_: vm.tree(), looks=True, images=images)


@click.command(cls=Command)
@tag_argument
@click.option("--state", is_flag=True, help="Show the machine in its VM state: its type, RAM blocks and devices.")
@image_option
@common_options
def show(options: Options, tag: str, state: bool, images: tuple[str, ...]) -> int:
    """Show snapshot TAG, device by device."""
    from qsnap.cli.output.results import Details

    async def found(vm: VM, *_: object) -> Details:
        snapshot, rows = await vm.show(tag)
        return Details(snapshot=snapshot, rows=rows, state=await vm.state(tag) if state else None)

    if state and images:
        raise BadUsage("--state needs the running VM, and not --image")
    return work(options, found, looks=True, images=images)


@click.command(cls=Command)
@click.argument("tags", metavar="[TAG]...", nargs=-1, shell_complete=completes("tags"))
@prefix_option
@click.option("--read-data", is_flag=True, help="Read all data, and compare them with checksums.")
@click.option(
    "--boot",
    is_flag=True,
    help="A restore drill: start the snapshot in another QEMU, see that its guest runs, and end it.",
)
@click.option(
    "--until", metavar="TEXT", default="", help="With --boot: wait until the guest writes TEXT to a serial port."
)
@click.option(
    "--within",
    "within_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="With --boot: how long the guest may take to show that it runs, and to write TEXT. Default: 60.",
)
@click.option(
    "--place",
    type=click.Path(path_type=Path),
    metavar="DIR",
    shell_complete=completes("directories"),
    help="With --boot: where the temporary copy is made. Default: $TMPDIR, or /tmp.",
)
@qemu_option
@textfile_option
@image_option
@common_options
def verify(
    options: Options,
    images: tuple[str, ...],
    tags: tuple[str, ...],
    prefix: str | None,
    read_data: bool,
    boot: bool,
    until: str,
    within_s: float | None,
    place: Path | None,
    qemu: str | None,
    textfile: Path | None,
) -> int:
    """Verify that snapshots are whole, while the guest runs on.

    Without TAG: all snapshots. Each VM state is read from its first byte to its last one, and the tables of the images
    are checked. With --read-data all that is stored is read. The first time, its checksums are written down; later they
    are compared. Exit code 10: something is damaged; 5: nothing is, but something could not be checked.

    With --boot: of one TAG, or of the newest snapshot of a series, a copy is started in another QEMU, without network.
    Exit code 10: it does not start, or its guest does not run.
    """
    if tags and prefix is not None:
        raise BadUsage("a tag and --prefix cannot be used together")
    if boot:
        if read_data or images or len(tags) != (prefix is None):
            raise BadUsage("--boot takes one TAG, or --prefix PREFIX, and neither --read-data nor --image")
        tag = tags[0] if tags else None
        return _drill(options, tag, prefix, textfile, until=until, within_s=within_s, place=place, qemu=qemu)
    if until or within_s or place or textfile:
        raise BadUsage("--until, --within, --place and --textfile go with --boot")
    return work(
        options,
        lambda vm, _, watch: vm.verify(*tags, prefix=prefix, read_data=read_data, watch=watch),
        looks=True,
        images=images,
        shows="verifying",
    )


def _drill(
    options: Options,
    tag: str | None,
    prefix: str | None,
    textfile: Path | None,
    *,
    within_s: float | None,
    **given: Any,  # noqa: ANN401 (of VM.drill)
) -> int:
    """The restore drill of one snapshot."""
    from qsnap.cli.monitoring import MetricsRecorder
    from qsnap.cli.several import do
    from qsnap.vm import DRILL_S

    async def action(vm: VM, _: Settings, watch: Watcher | None) -> DrillResult:
        return await vm.drill(tag, prefix=prefix, within_s=within_s or DRILL_S, watch=watch, **given)

    recorder = MetricsRecorder(textfile, prefix, of_drills=True)
    result = do(options, recorder.around(action), recorder.record, shows="exporting")
    return recorder.exit_code(options.shown(result))


@click.command(cls=Command)
@tags_argument
@click.option("--missing-ok", is_flag=True, help="It is not an error if a snapshot does not exist.")
@whole_option
@image_option
@common_options
def delete(
    options: Options, tags: tuple[str, ...], missing_ok: bool, together: bool | None, images: tuple[str, ...]
) -> int:
    """Delete snapshots from every device that holds them.

    What was saved together with other VMs is deleted with their parts (--together), or alone (--no-together).
    """

    async def deleted(vm: VM, *_: object) -> DeleteResult:
        return await vm.delete(*tags, missing_ok=missing_ok, alone=together is False)

    return work(options, deleted, images=images, together=bool(together))
