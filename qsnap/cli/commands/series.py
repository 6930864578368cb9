"""The commands and options for snapshots that are made and pruned by a clock: series, policies, notes."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from qsnap.cli import options as given
from qsnap.cli.options import common_options, completes, work
from qsnap.cli.output.text import printable
from qsnap.errors import BadUsage, GuestLeftStopped, PartialFailure, QsnapError

if TYPE_CHECKING:
    from qsnap.cli.runner import Options, Outcome
    from qsnap.model.qemu import PruneResult, SaveResult, Snapshot
    from qsnap.targets.config import Settings
    from qsnap.upkeep.metrics import Metric
    from qsnap.upkeep.retention import Policy
    from qsnap.vm import VM

_T = TypeVar("_T")
Action: TypeAlias = "Callable[[VM, Settings], Awaitable[_T]]"

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
        lambda renderer, result: renderer.prune(result),
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
    return work(options, lambda vm, _: vm.note(*tags, **changes), lambda renderer, snapshots: renderer.noted(snapshots))


class Account:
    """What a command writes down about VMs for Prometheus; nothing without a file for it.

    :raise BadUsage: the file could not be written.
    """

    def __init__(self, path: Path | None, prefix: str | None) -> None:
        self._path = path
        self._prefix = prefix
        self._figures: dict[int, dict[Metric, float]] = {}
        self._trouble = ""
        if path is not None:
            from qsnap.upkeep import metrics

            metrics.check(path)

    def of_save(self, action: Action[SaveResult]) -> Action[SaveResult]:
        """A save that has its figures taken."""

        async def save(vm: VM, settings: Settings) -> SaveResult:
            result = await action(vm, settings)
            if self._path is not None:
                from qsnap.upkeep import metrics

                figures = {
                    metrics.LAST_SUCCESS: time.time(),
                    metrics.PAUSE: result.pause_ms / 1000,
                    metrics.DURATION: result.duration_ms / 1000,
                }
                self._figures[id(result)] = {**figures, **_figures(await vm.list(), self._prefix, result.excluded)}
            return result

        return save

    def of_status(self, action: Action[_T]) -> Action[_T]:
        """Another look at the VM, that has its figures taken."""

        async def look(vm: VM, settings: Settings) -> _T:
            result = await action(vm, settings)
            if self._path is not None:
                left_out = await _left_out(vm, settings)
                self._figures[id(result)] = _figures(await vm.list(), self._prefix, left_out)
            return result

        return look

    def entered(self, outcome: Outcome[_T]) -> Outcome[_T]:
        """Write down what became of a VM."""
        if self._path is None:
            return outcome
        from qsnap.upkeep import metrics

        values = self._figures.get(id(outcome.result), {}) if outcome.error is None else {}
        failed = outcome.error is not None
        if failed or metrics.LAST_SUCCESS in values:
            values = {**values, metrics.LAST_EXIT_CODE: outcome.error.status if outcome.error else 0}
        try:
            labels = {"vm": outcome.title, "prefix": self._prefix or ""}
            metrics.update(self._path, labels, values, failed=failed)
        except QsnapError as error:
            self._trouble = str(error)
        return outcome

    def closed(self, code: int) -> int:
        """The exit code of the command: *code*, if all that was to be written is."""
        if self._trouble:
            sys.stderr.write(printable(f"qsnap: {self._trouble}") + "\n")
        return code or (QsnapError.exit_code if self._trouble else 0)


def _figures(found: Sequence[Snapshot], prefix: str | None, left_out: Collection[str]) -> dict[Metric, float]:
    """What there is to tell of the snapshots of a VM, or of a series."""
    from qsnap.model.qemu import is_of_series
    from qsnap.upkeep import metrics
    from qsnap.upkeep.freshness import is_sound

    series = [one for one in found if prefix is None or is_of_series(one.tag, prefix)]
    figures: dict[Metric, float] = {metrics.COUNT: len(series)}
    if newest := max((one for one in series if is_sound(one, left_out)), key=lambda one: one.date, default=None):
        figures[metrics.NEWEST] = newest.date.timestamp()
        figures[metrics.AGE] = time.time() - newest.date.timestamp()
        figures[metrics.SIZE] = newest.vm_state_size
    return figures


async def _left_out(vm: VM, settings: Settings) -> Sequence[str]:
    """The node-names that the config file leaves out of snapshots."""
    if not settings.exclude:
        return ()
    return (await vm.check(exclude=settings.exclude)).excluded


def judged(
    options: Options, account: Account, prefix: str | None, max_age: str, warn_age: str | None
) -> tuple[Callable[[], object], int]:
    """Tell as a monitoring plugin does whether snapshots are fresh: what shows it, and the exit code."""
    from qsnap.cli import several
    from qsnap.upkeep.freshness import Health, Level, judge
    from qsnap.upkeep.retention import Duration

    async def look(vm: VM, settings: Settings) -> Health:
        status = await vm.status()
        troubles = [status.trouble] if status.trouble else []
        if status.is_half_restored:
            troubles.append("a load has failed midway: saves are refused until a good snapshot is loaded")
        if status.run is not None and status.run.is_alive is False:
            troubles.append("a qsnap has died and was not seen to: qsnap recover")
        return judge(
            await vm.list(),
            datetime.now().astimezone(),
            oldest,
            warn_age=old,
            prefix=prefix,
            left_out=await _left_out(vm, settings),
            troubles=troubles,
            in_backing=status.in_backing,
        )

    def seen(outcome: Outcome[Health]) -> Outcome[Health]:
        if outcome.error is None:
            return account.entered(outcome)
        return outcome._replace(result=Health(level=Level.UNKNOWN, message=str(outcome.error)), error=None)

    def worst(codes: Sequence[int]) -> int:
        return max(codes, key=(0, 1, 3, 2).index)

    try:
        oldest = Duration.parse_age(max_age)
        old = Duration.parse_age(warn_age) if warn_age is not None else None
        now = datetime.now().astimezone()
        if old and old.before(now) <= oldest.before(now):
            raise BadUsage(f"--warn-age {warn_age} must be shorter than --max-age {max_age}: it would never warn")
        return several.work(
            options,
            account.of_status(look),
            lambda renderer, health: renderer.health(health),
            several.Manner(exit_code=lambda health: health.level.exit_code, overall=worst),
            seen=seen,
        )
    except QsnapError as error:
        unknown = Health(level=Level.UNKNOWN, message=str(error))
        return lambda: options.renderer.health(unknown), unknown.level.exit_code
