"""Do a command's work with one VM or with several at a time, and give its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

from qsnap.cli.common import Action, Options
from qsnap.cli.output.bar import Watching, shown_progress
from qsnap.cli.output.results import OfVM, Outcome, Outcomes
from qsnap.cli.pick import refuse_few_files, say_which, targets
from qsnap.cli.runner import connected
from qsnap.cli.signals import run_interruptibly
from qsnap.errors import BadUsage, Interrupted, QsnapError

if TYPE_CHECKING:
    from qsnap.model.qemu import Struct
    from qsnap.runs.group import Group, Member
    from qsnap.targets.choose import Target
    from qsnap.targets.config import Settings
    from qsnap.vm import VM


def do(
    options: Options,
    action: Action,
    seen: Callable[[Outcome], Outcome] = lambda outcome: outcome,
    *,
    looks: bool = False,
    images: Sequence[str] = (),
    shows: str = "",
    together: bool = False,
) -> Struct:
    """Do *action* with each chosen VM, with ``options.jobs`` of them at a time.

    :param seen: is given each outcome, and returns the one that counts.
    :param looks: it changes nothing, so no message says which VM was chosen.
    :param images: with these instead, of a VM that is off.
    :param shows: what its progress is called; "" if it has none.
    :param together: with all of them at one moment: see :func:`qsnap.together`.
    :return: the result of the one VM, or the outcomes of several.
    :raise BadUsage: the options that choose the VMs contradict each other.
    :raise Interrupted: by a signal; the guests were resumed.
    :raise QsnapError: the error of a single VM; or too few files may be open for so many at a time.
    """
    if images:
        if together:
            raise BadUsage("--image is for one VM that is off; --together is for several that run")
        return _offline(options, action, images, shows)
    if together and not options.all_vms and len(set(options.vms)) < 2:
        raise BadUsage("--together is for several VMs: name each with --vm, or --all")
    cut_off: list[str] = []
    meant = list(targets(options))
    if together and not options.all_vms and len(meant) < 2:
        raise BadUsage(f"{' and '.join(dict.fromkeys(options.vms))} are one VM; --together is for several")
    group: Group | None = None
    if together:
        from qsnap.runs.group import Group

        group = Group([title for title, _ in meant])
    try:
        outcomes = [
            seen(outcome) for outcome in _each(options, action, meant, group, cut_off, looks=looks, shows=shows)
        ]
    except Interrupted as interrupted:
        if len(cut_off) == 1:
            (interrupted.vm,) = cut_off
        for title in cut_off:
            seen(Outcome(title, interrupted))
        raise
    if group is not None:
        return Outcomes(tuple(outcomes), group.stop_spread_ms, group.resume_spread_ms)
    if options.is_of_several:
        return Outcomes(vms=tuple(outcomes))
    ((title, result),) = outcomes
    if isinstance(result, QsnapError):
        raise result
    return OfVM(vm=title, result=result)


def _offline(options: Options, action: Action, images: Sequence[str], shows: str) -> Struct:
    from qsnap.offline import Images
    from qsnap.targets.config import Settings

    if options.vms or options.all_vms:
        raise BadUsage("--image is for a VM that is off; --vm and --all are for those that run")
    opened = Images(images, options.state_dir)

    async def work() -> Struct:
        with shown_progress(shows, options) as progress, progress("") as watch:
            return await action(cast("VM", opened), Settings(), watch)

    try:
        return run_interruptibly(work())
    finally:
        opened.close()


def _each(
    options: Options,
    action: Action,
    meant: Sequence[tuple[str, Target | QsnapError]],
    group: Group | None,
    cut_off: list[str],
    *,
    looks: bool,
    shows: str,
) -> list[Outcome]:
    """The outcome of each VM; *cut_off* gets the titles of those that an interrupt cut off."""
    at_once = len(meant) if group else options.jobs
    refuse_few_files(at_once if options.is_of_several else 1)
    turns = asyncio.Semaphore(at_once)
    ended: list[tuple[str, str]] = []

    async def one(title: str, target: Target | QsnapError, member: Member | None, progress: Watching) -> Outcome:
        async def part(vm: VM, settings: Settings) -> Struct:
            vm.member = member
            return await action(vm, settings, watch)

        try:
            async with turns:
                with member or nullcontext(), progress(title) as watch:
                    if isinstance(target, QsnapError):
                        raise target
                    outcome = Outcome(title, await connected(options, target, part))
            ended.append((title, "done"))
        except QsnapError as error:
            error.vm = title
            outcome = Outcome(title, error)
            ended.append((title, str(error)))
        except asyncio.CancelledError as cancelled:
            ended.extend((title, note) for note in getattr(cancelled, "__notes__", ()))
            cut_off.append(title)
            raise
        return outcome

    async def each() -> list[Outcome]:
        members = group.members if group else (None,) * len(meant)
        try:
            # Signals are handled by now, so that a bar is always taken away again
            with shown_progress(shows, options) as progress:
                parts = zip(meant, members, strict=True)
                return await _all(one(*named, member, progress) for named, member in parts)
        except asyncio.CancelledError:
            told = asyncio.CancelledError()
            for note in _by_vm(ended) if options.is_of_several else [note for _, note in ended]:
                told.add_note(note)
            raise told from None

    for _, target in meant:
        if not options.is_of_several and not isinstance(target, QsnapError):
            say_which(options, target, looks=looks)
    return run_interruptibly(each())


def _by_vm(ended: Sequence[tuple[str, str]]) -> Sequence[str]:
    """The notes on each VM; VMs with the same notes are named together."""
    of_vm: dict[str, list[str]] = {}
    for title, note in ended:
        of_vm.setdefault(title, []).append(note)
    titles: dict[str, list[str]] = {}
    for title, notes in of_vm.items():
        titles.setdefault(", ".join(notes), []).append(title)
    return [f"{', '.join(named)}: {notes}" for notes, named in titles.items()]


async def _all(works: Iterable[Awaitable[Outcome]]) -> list[Outcome]:
    """The outcomes of all; after an interrupt this waits until the last one has cleared up."""
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
