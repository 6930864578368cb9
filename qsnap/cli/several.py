"""One command for one VM or for several: the same work, its results shown together, and one exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qsnap.cli.output.results import Outcome, Outcomes
from qsnap.cli.runner import Options, run_each
from qsnap.errors import Interrupted, QsnapError

if TYPE_CHECKING:
    from qsnap.cli.runner import Action
    from qsnap.model.qemu import Struct


def do(options: Options, action: Action, seen: Callable[[Outcome], Outcome] = lambda outcome: outcome) -> Struct:
    """Do *action* with each VM that is meant.

    :param seen: is given what became of each, and may make something else of it.
    :return: what came of the one VM, or all that did of several.
    :raise QsnapError: of a single VM, what went wrong with it.
    """
    cut_off: list[str] = []
    try:
        outcomes = [seen(outcome) for outcome in run_each(options, action, cut_off.append)]
    except Interrupted as interrupted:
        for title in cut_off:
            seen(Outcome(title, interrupted))
        raise
    if options.is_of_several:
        return Outcomes(vms=tuple(outcomes))
    ((_, result),) = outcomes
    if isinstance(result, QsnapError):
        raise result
    return result
