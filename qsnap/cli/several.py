"""One command for one VM or for several: the same work, its results shown together, and one exit code."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from qsnap.cli.output.people import Renderer, document_of, write_json
from qsnap.cli.output.text import printable
from qsnap.cli.runner import Options, Outcome, run_each
from qsnap.errors import GuestLeftStopped, Interrupted, PartialFailure

if TYPE_CHECKING:
    from qsnap.targets.config import Settings
    from qsnap.vm import VM

_T = TypeVar("_T")


def _of_several(codes: Sequence[int]) -> int:
    """The exit code for several VMs: what all have in common; else 3, or 20 if any guest is left stopped."""
    if len(set(codes)) == 1:
        return codes[0]
    return GuestLeftStopped.exit_code if GuestLeftStopped.exit_code in codes else PartialFailure.exit_code


class Manner(NamedTuple):
    """What is peculiar to a command.

    :ivar exit_code: that of a result.
    :ivar overall: that of several VMs, from those of each.
    """

    exit_code: Callable[[Any], int] = lambda _: 0
    overall: Callable[[Sequence[int]], int] = _of_several


_PLAIN = Manner()


def work(
    options: Options,
    action: Callable[[VM, Settings], Awaitable[_T]],
    show: Callable[[Renderer, _T], object],
    manner: Manner = _PLAIN,
    seen: Callable[[Outcome[_T]], Outcome[_T]] = lambda outcome: outcome,
) -> tuple[Callable[[], object], int]:
    """Do *action* with each VM that is meant.

    :param show: shows one result.
    :param seen: is given what became of each, and may make something else of it.
    :return: what shows the results, and the exit code.
    :raise QsnapError: of a single VM, what went wrong with it.
    """
    cut_off: list[str] = []
    try:
        outcomes = [seen(outcome) for outcome in run_each(options, action, cut_off.append)]
    except Interrupted as interrupted:
        for title in cut_off:
            seen(Outcome(title, error=interrupted))
        raise
    codes = [outcome.error.status if outcome.error else manner.exit_code(outcome.result) for outcome in outcomes]
    renderer = options.renderer
    if options.is_of_several:
        return lambda: _show_all(options, renderer, outcomes, codes, show), manner.overall(codes)
    (only,) = outcomes
    if only.error is not None:
        raise only.error
    return lambda: show(renderer, only.result), codes[0]  # type: ignore[arg-type]


def _show_all(
    options: Options,
    renderer: Renderer,
    outcomes: Sequence[Outcome[_T]],
    codes: Sequence[int],
    show: Callable[[Renderer, _T], object],
) -> None:
    documents: list[dict[str, Any]] = []
    for outcome, code in zip(outcomes, codes, strict=True):
        text = io.StringIO()
        if outcome.error is None:
            with redirect_stdout(text):
                show(renderer, outcome.result)  # type: ignore[arg-type]
        if options.as_json:
            more = {"error": document_of(outcome.error)} if outcome.error else {"result": json.loads(text.getvalue())}
            documents.append({"vm": outcome.title, "exit_code": code, **more})
        elif outcome.error is not None:
            sys.stderr.write(f"qsnap: {printable(f'{outcome.title}: {outcome.error}', keep_newlines=True)}\n")
        else:
            sys.stdout.write(_titled(printable(outcome.title), text.getvalue()))
    if options.as_json:
        write_json({"vms": documents}, sys.stdout)


def _titled(title: str, text: str) -> str:
    """What was printed about one VM: a line begins with its name, a table stands below it."""
    first, *more = text.splitlines() or [""]
    if all(line.startswith("  ") for line in more):
        # What else there is to say of a result stands in the same line
        return f"{title}: {'; '.join([first, *(line.strip() for line in more)])}\n" if first else ""
    return f"{title}:\n{text}\n"
