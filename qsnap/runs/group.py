"""Runs on several VMs that are of one moment: they wait for each other, and all take effect or none does.

Each VM has a run of its own, with its claim, its journal and its guard. The runs meet at the points below: none goes
beyond one before all have come to it. So all checks of all VMs come before the first stop, no guest runs on before the
last one is stopped, and what one has sent to another before the common moment was never received before it was sent.

Until the *decision*, the failure of one ends all: each undoes what it has made. The last run to come to it decides for
all, by making a file beside the journals; from there on each goes on for itself. A run that is interrupted, or the
guard of one that was killed, looks for that file: if it is there, it completes its part, and otherwise undoes it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from qsnap.errors import BadUsage, GuestLeftStopped, QsnapError
from qsnap.runs import runtime_dir


class Point(IntEnum):
    """Where the runs of a group meet, in this order. Who is at one has passed those before it."""

    JOINED = 0
    CONNECTED = 1
    """The VM answers, and is none of the others."""
    CLAIMED = 2
    NAMED = 3
    """A save: the name of the new snapshot is agreed on. A prune: each knows what the others' policies keep."""
    GROUPED = 4
    """Each knows of which groups the others' snapshots are."""
    CHECKED = 5
    """Nothing speaks against it; no guest was touched."""
    READY = 6
    """The guest is about to be stopped."""
    STOPPED = 7
    WRITTEN = 8
    """Of an ordinary save or a load: the guest is about to be resumed."""
    DECIDED = 9


class Abandoned(QsnapError):
    """The run of another VM of the group has failed, so this one was given up. It exits as that one does, but
    with 1 where that one has left its guest stopped: this guest runs.

    :ivar because_of: that VM.
    :ivar failure: what has happened there.
    """

    def __init__(self, because_of: str, failure: QsnapError) -> None:
        super().__init__(f"given up, because {because_of} has failed: {failure.sentence()}")
        self.because_of = because_of
        self.failure = failure
        if not isinstance(failure, GuestLeftStopped):
            self.exit_code = failure.exit_code


class Group:
    """Some VMs, and how far the run on each has come.

    :ivar token: the group's name in journals and notes, and that of its decision.
    :ivar members: one for each VM, in the order of their titles.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        self.token = os.urandom(8).hex()
        self.members = tuple(Member(self, title) for title in titles)
        self._failure: tuple[str, QsnapError] | None = None
        self._is_decided = False
        self._change = asyncio.Event()

    @property
    def stop_spread_ms(self) -> float | None:
        """Milliseconds from the first guest's stop to the last one's; None if fewer than two were stopped."""
        return _spread([one.stopped for one in self.members])

    @property
    def resume_spread_ms(self) -> float | None:
        """Milliseconds from the first guest's resumption to the last one's; None if fewer than two were resumed."""
        return _spread([one.resumed for one in self.members])

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _fail(self, title: str, failure: QsnapError) -> None:
        if self._failure is None:
            self._failure = title, failure
        self._changed()

    def _decide_if_all_have_come(self) -> None:
        """With no pause between the look and the deed: nobody can begin to undo its part meanwhile."""
        waits = any(one.at is Point.DECIDED for one in self.members)
        if waits and self._failure is None and not self._is_decided and self._has_come(Point.DECIDED):
            runtime_dir.decide(self.token)
            self._is_decided = True
            self._changed()

    def _has_come(self, point: Point) -> bool:
        return all(one.at >= point or one.has_left for one in self.members)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something holds.

        :raise Abandoned: one has failed, and nothing is decided.
        """
        while True:
            if self._failure is not None and not self._is_decided:
                raise Abandoned(*self._failure)
            if is_so():
                return
            await self._change.wait()


class Member:
    """The part of one VM in a group.

    :ivar title: what the VM is called.
    :ivar at: the last point that its run has come to.
    :ivar has_left: its run is over.
    :ivar stopped: when its guest was stopped: QEMU's time stamp if it has told one, and our clock, in seconds.
    :ivar resumed: when it was resumed, by both clocks.
    """

    def __init__(self, group: Group, title: str) -> None:
        self._group = group
        self.title = title
        self.at = Point.JOINED
        self.has_left = False
        self.stopped: tuple[float | None, float] | None = None
        self.resumed: tuple[float | None, float] | None = None
        self._images = ""
        self._qemu: int | None = None
        self._told: dict[Point, Any] = {}

    @property
    def token(self) -> str:
        """The token of the group."""
        return self._group.token

    @property
    def others(self) -> tuple[str, ...]:
        """The titles of the other VMs."""
        return tuple(one.title for one in self._group.members if one is not self)

    def arrive(self, point: Point) -> None:
        """Come to a point, and do not wait for the others."""
        self.at = max(self.at, point)
        self._group._changed()

    async def meet(self, point: Point, value: Any = None) -> Mapping[str, Any]:  # noqa: ANN401 (whatever is exchanged)
        """Come to a point, and wait for the others.

        :return: the values with which the members have come, by their titles; of those that came by.
        :raise Abandoned: another one has failed before the decision.
        """
        self._told[point] = value
        self.arrive(point)
        try:
            await self._group._until(lambda: self._group._has_come(point))
        except asyncio.CancelledError:
            self._group._fail(self.title, QsnapError("it was interrupted"))
            raise
        return {one.title: one._told[point] for one in self._group.members if point in one._told}

    async def take_turn(self, images: str, qemu: int | None) -> None:
        """Wait until it is this VM's turn to be claimed: all groups claim in the same order, so that two that share VMs
        do not each hold what the other one waits for.

        :param images: the names of this VM's images, the same over every monitor: the order goes by them.
        :param qemu: the QEMU process, if it can be seen.
        :raise BadUsage: another member is the same VM, or this is the second operation of this one.
        """
        if self.at is not Point.JOINED:
            raise BadUsage("together, each VM does one operation")
        self._images, self._qemu = images, qemu
        await self.meet(Point.CONNECTED)
        members = self._group.members
        twins = [one.title for one in members if qemu is not None and one._qemu == qemu]
        if len(twins) > 1:
            raise BadUsage(f"{' and '.join(twins)} are one VM")
        before = [one for one in members if one._images < images]
        await self._group._until(lambda: all(one.at >= Point.CLAIMED or one.has_left for one in before))

    async def decide(self) -> None:
        """Come to the decision, and return when it is made. After an error it was not made, and will not be.

        :raise Abandoned: another one has failed.
        :raise QsnapError: the decision cannot be written down.
        """
        group = self._group
        self.arrive(Point.DECIDED)
        try:
            group._decide_if_all_have_come()
            await group._until(lambda: group._is_decided)
        except BaseException as error:
            if not group._is_decided:
                failure = error if isinstance(error, QsnapError) else QsnapError("it was interrupted")
                group._fail(self.title, failure)
            raise

    def __enter__(self) -> Member:
        return self

    def __exit__(self, _: object, failure: BaseException | None, __: object) -> None:
        """Leave the group: nobody waits for this VM any more."""
        self.has_left = True
        group = self._group
        if failure is None:
            try:
                group._decide_if_all_have_come()  # it had nothing to decide, and the others wait
            except QsnapError as error:
                failure = error
        if failure is not None:
            told = failure if isinstance(failure, QsnapError) else QsnapError(str(failure) or "it was interrupted")
            group._fail(self.title, told)
        group._changed()


def _spread(moments: Sequence[tuple[float | None, float] | None]) -> float | None:
    """Milliseconds between the first and the last: by QEMU's time stamps if all have one, by our clock otherwise."""
    known = [one for one in moments if one is not None]
    if len(known) < 2:
        return None
    stamps = [stamp for stamp, _ in known if stamp is not None]
    times = stamps if len(stamps) == len(known) else [ours for _, ours in known]
    return round((max(times) - min(times)) * 1000, 3)
