"""A series: what is kept of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qsnap.cli.commands import work
from qsnap.cli.common import Options
from qsnap.cli.options import Command, common_options, prefix_option, together_option
from qsnap.cli.policy import policy_of, policy_options
from qsnap.errors import BadUsage
from qsnap.tags import all_series

if TYPE_CHECKING:
    from qsnap.model.qemu import Struct
    from qsnap.vm import VM


async def _which_series(vm: VM, *_: object) -> Struct:
    """Refuse to choose.

    :raise BadUsage: always; it names the series that there are.
    """
    found = ", ".join(all_series(one.tag for one in await vm.list()))
    there = f"there is {found}" if found else "there is none yet"
    raise BadUsage(f"name the series: --prefix PREFIX; {there}. Snapshots outside a series are never pruned")


@click.command(cls=Command)
@prefix_option
@policy_options
@click.option("--allow-remove-all", is_flag=True, help="Remove even the newest, if the policy does not keep it.")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be kept and removed, but do nothing.")
@together_option
@common_options
def prune(
    options: Options,
    prefix: str | None,
    allow_remove_all: bool,
    dry_run: bool,
    together: bool,
    **keep: Any,  # noqa: ANN401 (of policy_options)
) -> int:
    """Delete snapshots of a series that the policy does not keep.

    The rules are those of restic: the newest snapshot of each period is kept, in local time, and a snapshot is kept if
    any rule keeps it. N may be "unlimited". Protected snapshots, those dated in the future and the newest complete one
    are always kept. So is what several VMs saved together, unless --together prunes them together: then it goes if none
    of them keeps it.
    """
    if prefix is None:
        return work(options, _which_series, looks=True)
    policy = policy_of(keep, may_be_empty=allow_remove_all)
    return work(
        options,
        lambda vm, *_: vm.prune(prefix, policy, allow_remove_all=allow_remove_all, dry_run=dry_run),
        together=together,
    )
