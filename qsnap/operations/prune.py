"""Prune: delete those snapshots of a series that a policy does not keep."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from qsnap.errors import PrecheckRefused
from qsnap.inventory.inventory import Inventory
from qsnap.model.requests import DeleteRequest
from qsnap.model.results import PruneDecision, PruneResult, SaveResult
from qsnap.model.snapshots import Kind, Snapshot
from qsnap.operations.delete import do_delvm
from qsnap.operations.removal import unseen_notes
from qsnap.operations.together import group_reasons
from qsnap.runs.run import Run
from qsnap.tags import all_series, check_prefix, is_of_series
from qsnap.upkeep import retention
from qsnap.upkeep.retention import Decision, Policy


class PruneRequest(NamedTuple):
    """A prune that is asked for.

    :ivar prefix: the series has the tags that :func:`qsnap.tags.series_tag` makes: PREFIX-YYYYMMDDTHHMMSS. Any other
        tag is not a candidate.
    :ivar policy: see :func:`qsnap.upkeep.retention.decide`.
    :ivar allow_remove_all: delete the newest whole one too, if the policy does not keep it.
    :ivar dry_run: decide everything and do nothing.
    :ivar pending: for a dry run: a snapshot that a save would have added by then.
    """

    prefix: str
    policy: Policy
    allow_remove_all: bool = False
    dry_run: bool = False
    pending: SaveResult | None = None


async def do_prune(run: Run, request: PruneRequest, inventory: Inventory | None = None) -> PruneResult:
    """Delete the snapshots of a series that the policy does not keep, the oldest first; ignore all others.

    The guest keeps its run state; a running guest stands still while QEMU deletes. Snapshots that were saved together
    with those of other VMs are kept, unless these are pruned together too, and none of them keeps its part.

    :param inventory: as for :func:`qsnap.operations.delete.do_delvm`.
    :return: the snapshots that were kept, with the reasons, and those that were deleted.
    :raise BadUsage: the policy is empty or not valid, or the prefix cannot be one; nothing was done.
    :raise QsnapError: the notes on what is protected cannot be read; nothing was done.
    :raise PartialFailure: some could not be deleted; the others were.
    :raise PrecheckRefused: it cannot be seen from here which ones are protected; nothing was done. Or as
        :func:`qsnap.operations.delete.do_delvm`.
    """
    check_prefix(request.prefix)
    inventory = inventory or await run.look()
    marks = await inventory.marks(run.monitor)
    series = [one for one in inventory.notes.added_to(inventory.snapshots) if is_of_series(one.tag, request.prefix)]
    if request.pending is not None:
        series.append(_imagined(request.pending))
    decisions = retention.decide(
        series,
        request.policy,
        datetime.now().astimezone(),
        protected=[one.tag for one in series if one.protected or marks.protects(one)],
        allow_remove_all=request.allow_remove_all,
    )
    together = await group_reasons(run, {one.snapshot.tag: (one.snapshot, one.is_kept) for one in decisions})
    decisions = tuple(
        decision._replace(reasons=(together[decision.snapshot.tag],)) if decision.snapshot.tag in together else decision
        for decision in decisions
    )
    remove = [decision for decision in decisions if not decision.is_kept]
    if remove and (refusals := await unseen_notes(run.monitor, inventory)):
        raise PrecheckRefused("nothing was pruned", refusals)
    if remove and not request.dry_run:
        oldest_first = tuple(decision.snapshot.tag for decision in reversed(remove))
        await do_delvm(run, DeleteRequest(tags=oldest_first, missing_ok=True), inventory)
    return PruneResult(
        prefix=request.prefix,
        keep=_decisions(decision for decision in decisions if decision.is_kept),
        remove=_decisions(remove),
        dry_run=request.dry_run,
        other_series=() if series else all_series(one.tag for one in inventory.snapshots),
    )


def _imagined(pending: SaveResult) -> Snapshot:
    """The snapshot that a dry run of a save would have made."""
    return Snapshot(
        tag=pending.tag,
        kind=Kind.FULL,
        vm_state_size=0,
        date=datetime.now().astimezone(),
        vm_clock_ns=0,
        vmstate=pending.vmstate,
        devices=pending.devices,
    )


def _decisions(decisions: Iterable[Decision]) -> tuple[PruneDecision, ...]:
    return tuple(
        PruneDecision(
            tag=one.tag, kind=one.kind, date=one.date, vm_state_size=one.vm_state_size, reasons=decision.reasons
        )
        for decision in decisions
        for one in (decision.snapshot,)
    )
