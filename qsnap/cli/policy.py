"""The options of a retention policy, and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qsnap.errors import BadUsage

if TYPE_CHECKING:
    from qsnap.upkeep.retention import Policy

#: The periods of :data:`qsnap.upkeep.retention.PERIODS`, and what one of each is called.
_UNITS = {"hourly": "hour", "daily": "day", "weekly": "week", "monthly": "month", "yearly": "year"}


def policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a retention policy, as ``restic forget`` has them."""
    made = [
        click.option("--keep-last", metavar="N", help="Keep the newest N."),
        *(
            click.option(f"--keep-{name}", metavar="N", help=f"Keep the newest of each of N {unit}s.")
            for name, unit in _UNITS.items()
        ),
        click.option(
            "--keep-within", metavar="DURATION", help="Keep all within DURATION of the newest snapshot: 2y5m7d3h."
        ),
        *(
            click.option(
                f"--keep-within-{name}",
                metavar="DURATION",
                help=f"Within DURATION of the newest snapshot, keep the newest of each {unit}.",
            )
            for name, unit in _UNITS.items()
        ),
        click.option(
            "--keep-tag", multiple=True, metavar="PATTERN", help="Keep those whose tag matches PATTERN. Repeatable."
        ),
    ]
    for option in reversed(made):
        command = option(command)
    return command


def policy_of(options: dict[str, Any], *, may_be_empty: bool = False) -> Policy:
    """The policy that the options of :func:`policy_options` mean.

    :raise BadUsage: a number or a duration is not valid, or the policy keeps nothing.
    """
    from qsnap.upkeep import retention

    counts, within = {}, {}
    for name in _UNITS:
        if (text := options[f"keep_{name}"]) is not None:
            counts[name] = retention.parse_count(text)
        if (text := options[f"keep_within_{name}"]) is not None:
            within[name] = retention.Duration.parse(text)
    if not all(options["keep_tag"]):
        raise BadUsage("--keep-tag '' is not a pattern: no tag is empty")
    policy = retention.Policy(
        last=retention.parse_count(options["keep_last"] or "0"),
        counts=counts,
        within=retention.Duration.parse(options["keep_within"]) if options["keep_within"] is not None else None,
        within_periods=within,
        tags=options["keep_tag"],
    )
    if policy.is_empty and not may_be_empty:
        raise BadUsage(retention.EMPTY_POLICY)
    return policy


def wants_policy(options: dict[str, Any]) -> bool:
    """Whether any option of a policy is given."""
    return any(value not in (None, ()) for name, value in options.items() if name.startswith("keep_"))
