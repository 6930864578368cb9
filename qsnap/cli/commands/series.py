"""The commands and options for snapshots that are made and pruned by a clock: series, policies, notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsnap.cli import options as given
from qsnap.cli.options import common_options, completes, work
from qsnap.errors import BadUsage, GuestLeftStopped, PartialFailure, QsnapError

if TYPE_CHECKING:
    from qsnap.cli.runner import Options
    from qsnap.model.qemu import PruneResult, SaveResult
    from qsnap.targets.config import Settings
    from qsnap.upkeep.retention import Policy
    from qsnap.vm import VM

prefix_option = click.option(
    "--prefix", metavar="PREFIX", help="The series: snapshots named PREFIX-YYYYmmddTHHMMSS, and no others."
)


#: The periods of :data:`qsnap.upkeep.retention.PERIODS`, and what one of each is called.
_UNITS = {"hourly": "hour", "daily": "day", "weekly": "week", "monthly": "month", "yearly": "year"}


textfile_option = click.option(
    "--textfile",
    type=click.Path(path_type=Path),
    metavar="PATH",
    shell_complete=completes("files"),
    help="Write metrics for Prometheus' node exporter into that file (*.prom).",
)
ping_option = click.option(
    "--ping",
    metavar="URL",
    callback=lambda _context, _parameter, url: _checked_url(url),
    help="Call a health check: URL/start, and URL or URL/fail. It never fails the command.",
)


def _checked_url(url: str | None) -> str | None:
    from qsnap.cli.ping import checked

    return None if url is None else checked(url)


def policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a retention policy, as ``restic forget`` has them."""
    made = [
        click.option("--keep-last", metavar="N", help="Keep the newest N."),
        *(
            click.option(f"--keep-{name}", metavar="N", help=f"Keep the newest of each of N {unit}s.")
            for name, unit in _UNITS.items()
        ),
        click.option("--keep-within", metavar="DURATION", help="Keep those within DURATION of the newest: 2y5m7d3h."),
        *(
            click.option(f"--keep-within-{name}", metavar="DURATION", help=f"Of those keep the newest of each {unit}.")
            for name, unit in _UNITS.items()
        ),
        click.option(
            "--keep-tag", multiple=True, metavar="PATTERN", help="Keep those with a tag like that. Repeatable."
        ),
    ]
    for option in reversed(made):
        command = option(command)
    return command


def policy_of(options: dict[str, Any]) -> Policy:
    """The policy that the options of :func:`policy_options` mean.

    :raise BadUsage: a number or a duration is none.
    """
    from qsnap.upkeep import retention

    counts, within = {}, {}
    for name in _UNITS:
        if (text := options[f"keep_{name}"]) is not None:
            counts[name] = retention.parse_count(text)
        if (text := options[f"keep_within_{name}"]) is not None:
            within[name] = retention.Duration.parse(text)
    if not all(options["keep_tag"]):
        raise BadUsage("--keep-tag '' is no pattern: no tag is empty")
    return retention.Policy(
        last=retention.parse_count(options["keep_last"] or "0"),
        counts=counts,
        within=retention.Duration.parse(options["keep_within"]) if options["keep_within"] is not None else None,
        within_periods=within,
        tags=options["keep_tag"],
    )


def wants_policy(options: dict[str, Any]) -> bool:
    """Whether any option of a policy is given."""
    return any(value not in (None, ()) for name, value in options.items() if name.startswith("keep_"))


async def prune_after(vm: VM, prefix: str, policy: Policy, saved: SaveResult) -> PruneResult:
    """Prune the series that a save has added to; of a dry run, as if it had.

    :raise PartialFailure: the save is done, and that failed.
    :raise GuestLeftStopped: by that.
    """
    try:
        return await vm.prune(prefix, policy, dry_run=saved.dry_run, pending=saved if saved.dry_run else None)
    except GuestLeftStopped:
        raise
    except QsnapError as error:
        if saved.dry_run:
            raise
        raise PartialFailure((saved.tag,), {f"prune --prefix {prefix}": error}) from error


@click.command()
@prefix_option
@policy_options
@click.option("--allow-remove-all", is_flag=True, help="Also the newest, if the policy does not keep it.")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be kept and removed, and do nothing.")
@common_options
def prune(options: Options, prefix: str | None, allow_remove_all: bool, dry_run: bool, **keep: Any) -> int:  # noqa: ANN401
    """Delete the snapshots of a series that the policy does not keep.

    The words are those of restic: the newest of each period is kept, in local time, and a snapshot is kept if any
    rule keeps it. N may be "unlimited". Protected snapshots, those from the future and the newest whole one are kept in
    any case.
    """
    if prefix is None:
        raise BadUsage("say which series: --prefix PREFIX. Snapshots that are of none are never pruned")
    policy = policy_of(keep)
    if policy.is_empty and not allow_remove_all:
        raise BadUsage(
            "the policy is empty: it would keep nothing. Say what to keep, as in --keep-daily 7, or --allow-remove-all"
        )
    return work(
        options,
        lambda vm, _: vm.prune(prefix, policy, allow_remove_all=allow_remove_all, dry_run=dry_run),
    )


_tags = click.argument("tags", metavar="TAG...", nargs=-1, required=True, shell_complete=completes("tags"))


@click.command()
@_tags
@common_options
def protect(options: Options, tags: tuple[str, ...]) -> int:
    """Protect snapshots: none is replaced, deleted or pruned until it is unprotected."""
    return _noted(options, tags, protected=True)


@click.command()
@_tags
@common_options
def unprotect(options: Options, tags: tuple[str, ...]) -> int:
    """Take the protection of snapshots away."""
    return _noted(options, tags, protected=False)


@click.command()
@given.tag
@click.argument("description")
@common_options
def describe(options: Options, tag: str, description: str) -> int:
    """Describe snapshot TAG in one line, which list and show tell; '' for no description."""
    return _noted(options, (tag,), description=description)


def _noted(options: Options, tags: tuple[str, ...], **changes: Any) -> int:  # noqa: ANN401 (of VM.note)
    from qsnap.cli.output.results import Notes

    async def noted(vm: VM, _: Settings) -> Notes:
        return Notes(snapshots=tuple(await vm.note(*tags, **changes)))

    return work(options, noted)
