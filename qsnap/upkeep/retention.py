"""Which snapshots of a series to keep, and why. Pure: the clock and the time zone are arguments.

The words, and what they mean, are those of ``restic forget``: each rule goes through the snapshots from the newest to
the oldest and keeps the newest of each period that has one; a snapshot is kept if any rule keeps it. Periods are those
of local time: hours, days, ISO weeks, months, years. While a rule has counts left, it keeps the oldest snapshot too, so
that a history grows to its full length. ``within`` counts back from the newest snapshot, not from now: a series that
has stopped does not vanish. (``scripts/compare-restic`` puts the same questions to both.)

Four rules are added, because a snapshot may be the only copy:

* A snapshot from the future (the host's clock was wrong) is kept, and takes no other snapshot's place.
* Whole and incomplete snapshots are counted apart: an incomplete one never takes the place of a whole one.
* The newest whole one is kept, whatever the policy says; if none is whole, the newest.
* A protected one is kept. It counts like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from fnmatch import fnmatchcase
from typing import NamedTuple

from qsnap.errors import BadUsage
from qsnap.inventory.snapshots import is_loadable
from qsnap.model.snapshots import Snapshot

#: An unlimited count, as restic writes it.
UNLIMITED = "unlimited"
EMPTY_POLICY = (
    "the policy is empty: it would keep nothing. Say what to keep, for example --keep-daily 7 "
    "(prune --allow-remove-all removes all)"
)
_FOREVER = 1 << 62


class Duration(NamedTuple):
    """A length of time in calendar units: the length of a month depends on the date."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0
    minutes: int = 0

    @classmethod
    def parse(cls, text: str) -> Duration:
        """``2y5m7d3h``, as restic writes it; ``w`` for weeks, ``mo`` for months and ``min`` for minutes too.

        :raise BadUsage: it is not a duration, or its length is 0.
        """
        counts = dict.fromkeys(("y", "m", "w", "d", "h", "min"), 0)
        if re.fullmatch(r"([0-9]{1,6}(min|mo|[ymwdh]))+", text):
            for number, unit in re.findall(r"(\d+)(min|mo|[ymwdh])", text):
                counts["m" if unit == "mo" else unit] += int(number)
        if not any(counts.values()):
            raise BadUsage(
                f"{text!r} is not a duration; a good one is 26h, 90min, 7d, 8w or 1y6m (m: months), but not 0h"
            )
        return cls(counts["y"], counts["m"], counts["d"] + 7 * counts["w"], counts["h"], counts["min"])

    @classmethod
    def parse_age(cls, text: str) -> Duration:
        """An age. A lone ``m`` is refused: 90m would mean 90 months, and there would be no warning for years.

        :raise BadUsage: as :meth:`parse`; or it has a lone ``m``.
        """
        if re.search(r"[0-9]m(?![a-z])", text):
            raise BadUsage(f"{text!r}: say min for minutes, or mo for months; m could mean either")
        return cls.parse(text)

    def __str__(self) -> str:
        parts = zip(self, ("y", "m", "d", "h", "min"), strict=True)
        return "".join(f"{number}{unit}" for number, unit in parts if number)

    def before(self, moment: datetime, zone: tzinfo | None = None) -> datetime:
        """The moment that much earlier, by the calendar and the clocks of a time zone.

        A day that a month does not have is counted on into the next: a month before the 31st of March is the 3rd of
        March, or the 2nd in a leap year. Hours and minutes are time that passes, whatever the clocks do.

        :param zone: None is the system's.
        """
        local = moment.astimezone(zone)
        months = (local.year - self.years) * 12 + local.month - 1 - self.months
        if months < 12:
            return datetime.min.replace(tzinfo=UTC)
        try:
            first = local.replace(year=months // 12, month=months % 12 + 1, day=1, tzinfo=None, fold=0)
            naive = first + timedelta(days=local.day - 1 - self.days)
            then = (naive.astimezone() if zone is None else naive.replace(tzinfo=zone)).astimezone(UTC)
            return then - timedelta(hours=self.hours, minutes=self.minutes)
        except (OverflowError, ValueError):  # before there was a calendar
            return datetime.min.replace(tzinfo=UTC)


class Period(NamedTuple):
    """A kind of period, and the period of that kind in which a local time lies."""

    name: str
    of: Callable[[datetime], object]


#: By the names of the options, the finest first.
PERIODS = (
    Period("hourly", lambda local: (local.date(), local.hour)),
    Period("daily", lambda local: local.date()),
    Period("weekly", lambda local: local.isocalendar()[:2]),
    Period("monthly", lambda local: (local.year, local.month)),
    Period("yearly", lambda local: local.year),
)


class Policy(NamedTuple):
    """What to keep: a snapshot is kept if any of these rules keeps it.

    Periods are called "hourly", "daily", "weekly", "monthly" and "yearly". A duration may be a text, such as "26h" or
    "1y6m".

    :ivar last: the number of newest snapshots to keep.
    :ivar counts: by the name of a period: the number of periods of which to keep the newest snapshot.
    :ivar within: keep all snapshots that are no older than that, counted from the newest snapshot.
    :ivar within_periods: by the name of a period: keep the newest of each period that reaches into that time.
    :ivar tags: keep the snapshots whose tag matches one of these shell patterns.
    """

    last: int = 0
    counts: Mapping[str, int] = {}
    within: Duration | str | None = None
    within_periods: Mapping[str, Duration | str] = {}
    tags: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the policy keeps nothing."""
        return not (self.last or any(self.counts.values()) or self.within or self.within_periods or self.tags)

    def check(self) -> None:
        """Refuse what is not a policy: a word that is wrong would be a rule that keeps nothing.

        :raise BadUsage: a count, a duration or the name of a period is not valid.
        """
        names = [period.name for period in PERIODS]
        for name in (*self.counts, *self.within_periods):
            if name not in names:
                raise BadUsage(f"a policy has no period {name!r}; it has {', '.join(names)}")
        for count in (self.last, *self.counts.values()):
            if not isinstance(count, int) or count < 0:
                raise BadUsage(f"{count!r} is not a number of snapshots to keep; it must be 0 or more")
        if isinstance(self.tags, str):
            raise BadUsage(f"the tags of a policy are several patterns: ({self.tags!r},)")
        for length in (self.within, *self.within_periods.values()):
            if length is not None:
                _duration(length)


class Decision(NamedTuple):
    """Whether a snapshot is kept.

    :ivar reasons: why it is kept; empty: it is removed.
    """

    snapshot: Snapshot
    reasons: tuple[str, ...]

    @property
    def is_kept(self) -> bool:
        """Whether the snapshot is kept."""
        return bool(self.reasons)


def _duration(length: Duration | str) -> Duration:
    """That length of time.

    :raise BadUsage: it is not one.
    """
    return length if isinstance(length, Duration) else Duration.parse(str(length))


def parse_count(text: str) -> int:
    """A number of periods: 0 or more, or ``unlimited``.

    :raise BadUsage: it is neither.
    """
    if text == UNLIMITED:
        return _FOREVER
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise BadUsage(f"{text!r} is not a number of snapshots to keep; it must be 0 or more, or {UNLIMITED!r}")
    return int(text)


def decide(
    snapshots: Sequence[Snapshot],
    policy: Policy,
    now: datetime,
    *,
    zone: tzinfo | None = None,
    protected: Collection[str] = (),
    allow_remove_all: bool = False,
) -> tuple[Decision, ...]:
    """The decision on each of the *snapshots* of one series, the newest first.

    :param now: a later snapshot is from the future.
    :param zone: the time zone of the periods; None is the system's.
    :param protected: the tags of the protected snapshots.
    :param allow_remove_all: keep only what the policy or protection keeps, even if that is nothing.
    :raise BadUsage: the policy is not valid; or it is empty, and not all may be removed.
    """
    policy.check()
    if policy.is_empty and not allow_remove_all:
        raise BadUsage(EMPTY_POLICY)
    ordered = sorted(snapshots, key=lambda snapshot: (snapshot.date, snapshot.tag), reverse=True)
    past = [snapshot for snapshot in ordered if snapshot.date <= now]
    reasons: dict[str, list[str]] = {snapshot.tag: [] for snapshot in ordered}
    for snapshot in ordered:
        if snapshot.tag in protected:
            reasons[snapshot.tag].append("protected")
        if snapshot.date > now:
            reasons[snapshot.tag].append("in the future")
    for is_whole in (True, False):
        group = [snapshot for snapshot in past if is_loadable(snapshot) is is_whole]
        for snapshot, reason in _kept(group, policy, zone):
            reasons[snapshot.tag].append(reason)
    if not allow_remove_all and past:
        newest = next(filter(is_loadable, past), past[0])
        if not reasons[newest.tag]:
            reasons[newest.tag].append("newest whole snapshot" if is_loadable(newest) else "newest snapshot")
    return tuple(Decision(snapshot, tuple(reasons[snapshot.tag])) for snapshot in ordered)


def _kept(group: Sequence[Snapshot], policy: Policy, zone: tzinfo | None) -> Iterator[tuple[Snapshot, str]]:
    """The snapshots that the policy keeps, the newest first, and the reasons, rule by rule."""
    if not group:
        return
    for pattern in policy.tags:
        yield from ((snapshot, f"tag {pattern}") for snapshot in group if fnmatchcase(snapshot.tag, pattern))
    latest = group[0].date
    if policy.within:
        length = _duration(policy.within)
        start = length.before(latest, zone)
        yield from ((snapshot, f"within {length}") for snapshot in group if snapshot.date > start)
    yield from _newest(group, "last snapshot", policy.last, [snapshot.tag for snapshot in group])
    for period in PERIODS:
        periods = [period.of(snapshot.date.astimezone(zone)) for snapshot in group]
        yield from _newest(group, f"{period.name} snapshot", policy.counts.get(period.name, 0), periods)
        if given := policy.within_periods.get(period.name):
            within = _duration(given)
            start = within.before(latest, zone)
            near = [snapshot for snapshot in group if snapshot.date > start]
            reaches_all = len(near) == len(group)
            yield from _newest(
                near, f"{period.name} within {within}", _FOREVER, periods[: len(near)], keeps_oldest=reaches_all
            )


def _newest(
    group: Sequence[Snapshot], reason: str, count: int, periods: Sequence[object], *, keeps_oldest: bool = True
) -> Iterator[tuple[Snapshot, str]]:
    """The newest of each of *count* periods; and the oldest of all, if counts are left."""
    last: object = None
    for number, (snapshot, period) in enumerate(zip(group, periods, strict=True), start=1):
        is_oldest = number == len(group) and keeps_oldest and period == last
        if count and (period != last or is_oldest):
            yield snapshot, f"oldest {reason}" if is_oldest else reason
            last = period
            count -= 1
