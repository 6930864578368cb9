"""Several VMs at one moment.

::

    async with qsnap.connect(vm="db") as db, qsnap.connect(vm="app") as app:
        done = await qsnap.together({"db": db, "app": app}, lambda vm: vm.save("before-upgrade"))
        print(done.results["db"].pause_ms, done.stop_spread_ms)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

from qsnap.errors import GuestLeftStopped, PartialFailure, QsnapError
from qsnap.runs.group import Abandoned, Group, Member
from qsnap.vm import VM

_T = TypeVar("_T")


class Done(NamedTuple, Generic[_T]):
    """What was done with several VMs together.

    :ivar results: the result of each VM, by its name.
    :ivar stop_spread_ms: milliseconds from the first guest's stop to the last one's; None if fewer than two were
        stopped.
    :ivar resume_spread_ms: the same of their resumption.
    """

    results: Mapping[str, _T]
    stop_spread_ms: float | None
    resume_spread_ms: float | None


async def together(vms: Mapping[str, VM], deed: Callable[[VM], Awaitable[_T]]) -> Done[_T]:
    """Save, load, delete or prune on several VMs at one moment: all of it is done, or nothing.

    All VMs are checked before one guest is touched. All guests are stopped before the first one is written or loaded,
    and run on at the same time. If one fails, what the others have made is removed. Only a load that QEMU has begun
    cannot be taken back: then the other VMs are loaded nevertheless.

    :param vms: the connected VMs by names of your choice: that of a part of the group shows in the lists of the others.
    :param deed: one call of :meth:`VM.save`, :meth:`VM.load`, :meth:`VM.delete` or :meth:`VM.prune`, the same for all.
    :raise GuestLeftStopped: a guest was running, and is stopped now.
    :raise PartialFailure: after the common decision, some have failed.
    :raise QsnapError: what has failed first, with its VM's name as ``vm``; nothing was changed.
    """
    group = Group(tuple(vms))

    async def one(vm: VM, member: Member) -> _T:
        with member:
            vm.member = member
            try:
                return await deed(vm)
            finally:
                vm.member = None

    outcomes = await asyncio.gather(*map(one, vms.values(), group.members), return_exceptions=True)
    results: dict[str, _T] = {}
    errors: dict[str, QsnapError] = {}
    for name, outcome in zip(vms, outcomes, strict=True):
        if isinstance(outcome, QsnapError):
            outcome.vm = name
            errors[name] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            results[name] = outcome
    if errors:
        raise _foremost(results, errors)
    return Done(results, group.stop_spread_ms, group.resume_spread_ms)


def _foremost(results: Mapping[str, object], errors: Mapping[str, QsnapError]) -> QsnapError:
    """The error that tells of all."""
    stopped = next((error for error in errors.values() if isinstance(error, GuestLeftStopped)), None)
    if stopped is not None or not results:
        return stopped or next(error for error in errors.values() if not isinstance(error, Abandoned))
    return PartialFailure(tuple(results), errors)
