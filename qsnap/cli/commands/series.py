"""A series: what is kept of it."""

from __future__ import annotations

from typing import Any

import click

from qsnap.cli.common import Options, work
from qsnap.cli.options import Command, common_options, prefix_option
from qsnap.cli.policy import policy_of, policy_options
from qsnap.errors import BadUsage


@click.command(cls=Command)
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
