"""save: by hand, or as the next of a series with its policy, metrics and health check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsnap.cli.common import Options, excluded, liveness
from qsnap.cli.options import (
    Command,
    common_options,
    exclude_option,
    live_auto_option,
    live_option,
    ping_option,
    prefix_option,
    textfile_option,
    together_option,
    vmstate_option,
)
from qsnap.cli.policy import policy_of, policy_options, wants_policy
from qsnap.errors import BadUsage, GuestLeftStopped, PartialFailure, QsnapError

if TYPE_CHECKING:
    from qsnap.model.qemu import Struct
    from qsnap.model.results import PruneResult, SaveResult
    from qsnap.operations.progress import Watcher
    from qsnap.targets.config import Settings
    from qsnap.upkeep.retention import Policy
    from qsnap.vm import VM


@click.command(cls=Command)
@click.argument("tag", required=False)
@prefix_option
@live_option
@live_auto_option
@click.option(
    "--replace/--no-replace", default=None, help="If the snapshot exists: replace it (the default), or refuse."
)
@click.option(
    "--safe-replace/--no-safe-replace",
    default=None,
    help="Keep the old snapshot until the new one is complete; needs room for one more state.",
)
@click.option(
    "--prepare/--no-prepare",
    default=None,
    help="Allocate the image's space for the VM state while the guest runs, for a shorter pause. Default: if it pays.",
)
@vmstate_option
@exclude_option
@click.option("--description", metavar="TEXT", default="", help="One-line description, shown by list and show.")
@policy_options
@textfile_option
@ping_option
@click.option("--force", is_flag=True, help="Try even if there seems to be too little room. Overrides nothing else.")
@click.option("-n", "--dry-run", is_flag=True, help="Check and decide everything, but do nothing.")
@together_option
@common_options
def save(
    options: Options,
    tag: str | None,
    prefix: str | None,
    live: bool | None,
    live_auto: bool,
    replace: bool | None,
    safe_replace: bool | None,
    prepare: bool | None,
    vmstate: str | None,
    exclude: tuple[str, ...],
    description: str,
    textfile: Path | None,
    ping: str | None,
    force: bool,
    dry_run: bool,
    together: bool,
    **keep: Any,  # noqa: ANN401 (of policy_options)
) -> int:
    """Save RAM, device state and all disks as snapshot TAG.

    Without TAG, it is named vm-YYYYmmddHHMMSS. The guest is paused while QEMU writes, and then runs again; with --live
    it runs meanwhile. A snapshot of that name is replaced, unless --no-replace is given. With --prefix it is the next
    one of a series; with a policy (--keep-…) the series is pruned after the save.

    With --together, all VMs are checked before one is touched, and their guests are paused at the same time. If one
    save fails, none is kept.
    """
    from qsnap.cli.monitoring import MetricsRecorder
    from qsnap.cli.output.results import exit_code_of
    from qsnap.cli.ping import pinged
    from qsnap.cli.several import do

    if tag is not None and prefix is not None:
        raise BadUsage("a tag and --prefix cannot be used together: snapshots of a series are named by the time")
    policy = policy_of(keep) if wants_policy(keep) else None
    if policy is not None and prefix is None:
        raise BadUsage("a policy (--keep-…) needs a series: name it with --prefix PREFIX")

    async def action(vm: VM, settings: Settings, watch: Watcher | None) -> SaveResult:
        result = await vm.save(
            tag,
            prefix=prefix,
            description=description,
            vmstate=vmstate or settings.vmstate,
            exclude=excluded(exclude, settings),
            force=force,
            dry_run=dry_run,
            watch=watch,
            live=liveness(live, live_auto, settings),
            prepare=settings.prepare if prepare is None else prepare,
            **_replacement(replace, safe_replace, settings),
        )
        if policy is None or prefix is None or together:
            return result
        import msgspec

        return msgspec.structs.replace(result, pruned=await _prune_after(vm, prefix, policy, result))

    recorder = MetricsRecorder(None if dry_run else textfile, prefix)
    with pinged(None if dry_run else ping) as report:
        shows = "" if dry_run else "saving"
        result = do(options, recorder.around(action), recorder.record, shows=shows, together=together)
        if together and policy is not None and prefix is not None:
            result = _pruned_together(options, prefix, policy, result)
        code = recorder.exit_code(exit_code_of(result))
        report(code)
    options.shown(result)
    return code


def _replacement(replace: bool | None, safely: bool | None, settings: Settings) -> dict[str, Any]:
    """What the options say of a snapshot that exists, and where they say nothing the config file."""
    if replace is None:
        replace = bool(safely) or not settings.no_replace
    if safely is None:
        safely = replace and bool(settings.safe_replace)
    return {"replace": replace, "safe_replace": safely}


def _pruned_together(options: Options, prefix: str, policy: Policy, saved: Struct) -> Struct:
    """What became of a save of several VMs together, after their series were pruned together."""
    import msgspec

    from qsnap.cli.output.results import Outcome, Outcomes
    from qsnap.cli.several import do
    from qsnap.model.results import PruneResult, SaveResult

    assert isinstance(saved, Outcomes)
    of = {title: result for title, result in saved.vms if isinstance(result, SaveResult)}
    if len(of) < len(saved.vms):
        return saved  # an older one is worth more now

    async def action(vm: VM, *_: object) -> PruneResult:
        assert vm.member is not None
        one = of[vm.member.title]
        return await vm.prune(prefix, policy, dry_run=one.dry_run, pending=one if one.dry_run else None)

    pruned = do(options, action, together=True)
    assert isinstance(pruned, Outcomes)
    outcomes = []
    for title, result in pruned.vms:
        if isinstance(result, QsnapError):
            failure = PartialFailure((of[title].tag,), {f"prune --prefix {prefix}": result})
            outcomes.append(Outcome(title, failure))
        else:
            assert isinstance(result, PruneResult)
            outcomes.append(Outcome(title, msgspec.structs.replace(of[title], pruned=result)))
    return msgspec.structs.replace(saved, vms=tuple(outcomes))


async def _prune_after(vm: VM, prefix: str, policy: Policy, saved: SaveResult) -> PruneResult:
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
