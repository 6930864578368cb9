"""Retention: what a policy keeps, and why. Pure: the clock and the time zone are given.

``scripts/compare-restic`` puts the same questions to restic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qsnap.errors import BadUsage
from qsnap.model.snapshots import Kind, Snapshot
from qsnap.upkeep.retention import PERIODS, Decision, Duration, Policy, decide, parse_count
from support.series import snapshot

pytestmark = pytest.mark.no_qemu

BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 11, 24, 12, 30, tzinfo=UTC)


def hourly(start: datetime, end: datetime, every: timedelta = timedelta(hours=1)) -> list[Snapshot]:
    """One snapshot an hour, by time that passes."""
    moment, made = start.astimezone(UTC), []
    while moment <= end:
        made.append(snapshot(moment))
        moment += every
    return made


def kept(decisions: Iterable[Decision]) -> list[Snapshot]:
    return [decision.snapshot for decision in decisions if decision.is_kept]


def local(snapshots: Iterable[Snapshot], form: str = "%Y-%m-%d %H:%M", zone: ZoneInfo = BERLIN) -> list[str]:
    return [f"{one.date.astimezone(zone):{form}}" for one in snapshots]


# Invariants

durations = st.builds(Duration, *(st.integers(0, top) for top in (2, 14, 40, 50, 90))).filter(any)
policies = st.builds(
    Policy,
    last=st.integers(0, 5),
    counts=st.dictionaries(st.sampled_from([period.name for period in PERIODS]), st.integers(0, 6)),
    within=st.none() | durations,
    within_periods=st.dictionaries(st.sampled_from([period.name for period in PERIODS]), durations),
    tags=st.lists(st.sampled_from(["n-2026*", "n-*T00*", "*5", "nothing"]), max_size=2).map(tuple),
).filter(lambda policy: not policy.is_empty)
series = st.lists(
    st.builds(
        snapshot,
        st.integers(-3, 30_000).map(lambda hours: NOW - timedelta(hours=hours, minutes=hours % 7)),
        st.sampled_from([Kind.FULL, Kind.FULL, Kind.FULL, Kind.LIVE, Kind.PARTIAL]),
    ),
    max_size=40,
    unique_by=lambda one: one.tag,
)


@given(series, policies)
def test_each_is_kept_or_removed_and_kept_for_a_reason(snapshots: list[Snapshot], policy: Policy) -> None:
    decisions = decide(snapshots, policy, NOW, zone=BERLIN)
    assert sorted(one.snapshot.tag for one in decisions) == sorted(one.tag for one in snapshots)
    assert [one.snapshot.date for one in decisions] == sorted((one.date for one in snapshots), reverse=True)
    assert not snapshots or any(one.is_kept for one in decisions)
    assert all(one.is_kept for one in decisions if one.snapshot.date > NOW)
    whole = [one for one in decisions if one.snapshot.kind is not Kind.PARTIAL and one.snapshot.date <= NOW]
    assert not whole or whole[0].is_kept


@given(series, policies, policies)
def test_more_rules_never_remove_more(snapshots: list[Snapshot], one: Policy, other: Policy) -> None:
    names = [period.name for period in PERIODS]
    within = [duration for duration in (one.within, other.within) if duration]
    both = Policy(
        last=max(one.last, other.last),
        counts={name: max(one.counts.get(name, 0), other.counts.get(name, 0)) for name in names},
        within=min(within, key=lambda duration: Duration.parse(str(duration)).before(NOW), default=None),
        within_periods={**other.within_periods, **one.within_periods},
        tags=one.tags + other.tags,
    )
    # Which of two durations in months is longer depends on where they end
    assume(both.within == one.within)
    fewer = {s.tag for s in kept(decide(snapshots, one, NOW, zone=BERLIN))}
    assert fewer <= {s.tag for s in kept(decide(snapshots, both, NOW, zone=BERLIN))}


@given(series, policies)
def test_a_second_time_nothing_is_removed(snapshots: list[Snapshot], policy: Policy) -> None:
    once = kept(decide(snapshots, policy, NOW, zone=BERLIN))
    assert kept(decide(once, policy, NOW, zone=BERLIN)) == once


@given(series, policies)
def test_half_made_ones_take_nobody_s_place(snapshots: list[Snapshot], policy: Policy) -> None:
    whole = [one for one in snapshots if one.kind is not Kind.PARTIAL]
    of_all = [one for one in kept(decide(snapshots, policy, NOW, zone=BERLIN)) if one.kind is not Kind.PARTIAL]
    assert of_all == kept(decide(whole, policy, NOW, zone=BERLIN))


@given(series, policies, st.integers(0, 40))
def test_what_is_protected_is_kept(snapshots: list[Snapshot], policy: Policy, number: int) -> None:
    for chosen in snapshots[number : number + 1]:
        decisions = decide(snapshots, policy, NOW, protected={chosen.tag})
        assert next(one for one in decisions if one.snapshot is chosen).reasons[0] == "protected"


# A year, hour by hour


def a_year(year: int) -> tuple[list[Snapshot], datetime]:
    start, end = datetime(year, 1, 1, tzinfo=BERLIN), datetime(year, 12, 31, 23, 30, tzinfo=BERLIN)
    return hourly(start, end), end


def test_a_year_of_days_across_both_clock_changes() -> None:
    snapshots, now = a_year(2026)
    assert len(snapshots) == 365 * 24, "one hour less in March, one more in October"
    found = kept(decide(snapshots, Policy(counts={"daily": 365}), now, zone=BERLIN))
    assert len(found) == 365, "one a day: neither the short nor the long day counts twice"
    assert local(found[:2]) == ["2026-12-31 23:00", "2026-12-30 23:00"]
    assert set(local(found, "%H:%M")) == {"23:00"}, "the newest of each day"


def test_the_hour_that_the_clocks_go_through_twice_is_one_hour() -> None:
    night = hourly(datetime(2026, 10, 25, 0, tzinfo=BERLIN), datetime(2026, 10, 25, 4, tzinfo=BERLIN))
    assert local(night, "%H") == ["00", "01", "02", "02", "03", "04"]
    found = kept(decide(night, Policy(counts={"hourly": 5}), NOW, zone=BERLIN))
    assert local(found, "%H %Z") == ["04 CET", "03 CET", "02 CET", "01 CEST", "00 CEST"]


def test_the_hour_that_the_clocks_leave_out() -> None:
    night = hourly(datetime(2026, 3, 29, 0, tzinfo=BERLIN), datetime(2026, 3, 29, 5, tzinfo=BERLIN))
    found = kept(decide(night, Policy(counts={"hourly": 4}), datetime(2026, 4, 1, tzinfo=UTC), zone=BERLIN))
    assert local(found, "%H") == ["05", "04", "03", "01"]


def test_a_day_s_end_is_that_of_local_time() -> None:
    """23:30 UTC is the next day in Berlin."""
    two = [snapshot(datetime(2026, 5, 1, 21, 30, tzinfo=UTC)), snapshot(datetime(2026, 5, 1, 23, 30, tzinfo=UTC))]
    policy = Policy(counts={"daily": 2})
    assert len(kept(decide([*two, *hourly(two[0].date - timedelta(hours=9), two[0].date - timedelta(hours=2))],
                           policy, NOW, zone=BERLIN))) == 2  # fmt: skip
    assert [one.reasons for one in decide(two, policy, NOW, zone=BERLIN)] == [("daily snapshot",)] * 2
    assert [one.reasons for one in decide(two, policy, NOW, zone=ZoneInfo("UTC"))] == [
        ("daily snapshot",),
        ("oldest daily snapshot",),
    ]


def test_the_leap_day_is_a_day() -> None:
    snapshots, now = a_year(2028)
    found = kept(decide(snapshots, Policy(counts={"daily": 400}), now, zone=BERLIN))
    assert len(found) == 366 + 1, "and the oldest, as there are counts left"
    assert "2028-02-29 23:00" in local(found)
    assert Duration(years=1).before(datetime(2028, 2, 29, tzinfo=UTC), UTC) == datetime(2027, 3, 1, tzinfo=UTC)


def test_weeks_are_those_of_iso_8601_around_new_year() -> None:
    """The first of January 2027 is a Friday, of week 53 of 2026."""
    days = [snapshot(datetime(2026, 12, 24, 12, tzinfo=BERLIN) + timedelta(days=day)) for day in range(15)]
    found = kept(decide(days, Policy(counts={"weekly": 3}), days[-1].date, zone=BERLIN))
    assert local(found, "%a %d %G-W%V") == ["Thu 07 2027-W01", "Sun 03 2026-W53", "Sun 27 2026-W52"]
    years = kept(decide(days, Policy(counts={"yearly": 2}), days[-1].date, zone=BERLIN))
    assert local(years, "%d %b %Y") == ["07 Jan 2027", "31 Dec 2026"]


def test_months_and_years_of_hourly_snapshots() -> None:
    snapshots, now = a_year(2026)
    policy = Policy(last=3, counts={"daily": 7, "weekly": 4, "monthly": 12, "yearly": 2})
    decisions = decide(snapshots, policy, now, zone=BERLIN)
    found = kept(decisions)
    assert local(found, "%m-%d %H") == [
        "12-31 23", "12-31 22", "12-31 21", "12-30 23", "12-29 23", "12-28 23", "12-27 23", "12-26 23", "12-25 23",
        "12-20 23", "12-13 23", "11-30 23", "10-31 23", "09-30 23", "08-31 23", "07-31 23", "06-30 23", "05-31 23",
        "04-30 23", "03-31 23", "02-28 23", "01-31 23", "01-01 00",
    ]  # fmt: skip
    assert decisions[0].reasons == (
        "last snapshot", "daily snapshot", "weekly snapshot", "monthly snapshot", "yearly snapshot",
    )  # fmt: skip
    assert decisions[-1].reasons == ("oldest yearly snapshot",)


def test_within_counts_from_the_newest_and_not_from_now() -> None:
    old = hourly(datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 3, tzinfo=UTC))
    found = kept(decide(old, Policy(within=Duration(hours=2)), NOW, zone=BERLIN))
    assert local(found, "%d %H:%M", ZoneInfo("UTC")) == ["03 00:00", "02 23:00"]


def test_within_a_period() -> None:
    snapshots, now = a_year(2026)
    policy = Policy(within_periods={"monthly": Duration.parse("3m")})
    assert local(kept(decide(snapshots, policy, now, zone=BERLIN)), "%m-%d") == ["12-31", "11-30", "10-31"]


# Single rules


def test_an_empty_policy_is_refused() -> None:
    some = hourly(NOW - timedelta(hours=3), NOW)
    for policy in (Policy(), Policy(counts={"daily": 0})):
        with pytest.raises(BadUsage, match="keep nothing"):
            decide(some, policy, NOW)
        assert kept(decide(some, policy, NOW, allow_remove_all=True)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        Policy(last=-1), Policy(last="3"), Policy(counts={"dayly": 7}), Policy(counts={"daily": -1}),  # type: ignore[arg-type]
        Policy(within="7"), Policy(within_periods={"day": "7d"}), Policy(last=1, tags="keep*"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_a_policy_that_is_not_one(wrong: Policy) -> None:
    """In a program nobody parses it; a rule whose name is wrong would keep nothing."""
    for snapshots in hourly(NOW - timedelta(hours=3), NOW), []:
        with pytest.raises(BadUsage):
            decide(snapshots, wrong, NOW)


def test_a_duration_may_be_a_text() -> None:
    some = hourly(NOW - timedelta(hours=50), NOW)
    for text in ("26h", "1d2h"):
        for length in (text, Duration.parse(text)):
            assert len(kept(decide(some, Policy(within=length), NOW))) == 26
            assert len(kept(decide(some, Policy(within_periods={"hourly": length}), NOW))) == 26


def test_the_newest_whole_one_stays_whatever_the_policy_says() -> None:
    some = hourly(NOW - timedelta(hours=3), NOW - timedelta(hours=1))
    broken = snapshot(NOW, Kind.PARTIAL)
    policy = Policy(tags=("nothing",))
    decisions = decide([*some, broken], policy, NOW)
    assert [(one.snapshot, one.reasons) for one in decisions if one.is_kept] == [(some[-1], ("newest whole snapshot",))]
    assert kept(decide([broken], policy, NOW)) == [broken]
    assert kept(decide([*some, broken], policy, NOW, allow_remove_all=True)) == []


def test_from_the_future() -> None:
    """It stays, and is not counted: a clock that was wrong once must not cost the real ones."""
    future = [snapshot(NOW + timedelta(days=day)) for day in (1, 400)]
    past = hourly(NOW - timedelta(hours=3), NOW)
    decisions = decide([*past, *future], Policy(last=1), NOW)
    assert [one.reasons for one in decisions] == [
        ("in the future",), ("in the future",), ("last snapshot",), (), (), (),
    ]  # fmt: skip


def test_where_there_is_nothing_to_choose_from() -> None:
    future = snapshot(NOW + timedelta(days=1))
    assert decide([], Policy(last=1), NOW) == ()
    assert decide([future], Policy(last=1), NOW) == (Decision(future, ("in the future",)),)


def test_the_newest_whole_one_stays_whatever_else_is_kept() -> None:
    past = hourly(NOW - timedelta(hours=3), NOW)
    decisions = decide(past, Policy(tags=(past[0].tag,)), NOW, protected=[past[1].tag])
    assert [one.reasons for one in decisions] == [
        ("newest whole snapshot",), (), ("protected",), (f"tag {past[0].tag}",),
    ]  # fmt: skip


def test_the_same_week_of_two_years_is_two_weeks() -> None:
    year = timedelta(weeks=52)
    oldest, older, newest = (snapshot(NOW - age) for age in (year + timedelta(weeks=8), year, timedelta()))
    assert older.date.isocalendar().week == newest.date.isocalendar().week
    decisions = decide([oldest, older, newest], Policy(counts={"weekly": 2}), NOW, zone=BERLIN)
    assert kept(decisions) == [newest, older]


def test_half_made_ones_are_counted_apart() -> None:
    past = hourly(NOW - timedelta(hours=3), NOW)
    broken = [snapshot(one.date + timedelta(seconds=1), Kind.PARTIAL) for one in past[:-1]]
    decisions = decide([*past, *broken], Policy(last=1), NOW)
    assert kept(decisions) == [past[-1], broken[-1]]


def test_unlimited() -> None:
    some = hourly(NOW - timedelta(days=30), NOW)
    found = kept(decide(some, Policy(counts={"daily": parse_count("unlimited")}), NOW, zone=ZoneInfo("UTC")))
    assert len(found) == 31 + 1


@pytest.mark.parametrize("text", ["", "-1", "1.5", "all", "0x1", "٣", "9999999999"])
def test_a_bad_count(text: str) -> None:
    with pytest.raises(BadUsage, match="not a number"):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "0d", "7", "d", "1y 2d", "-1d", "1.5h", "1s", "٣d", "9999999d"])
def test_a_bad_duration(text: str) -> None:
    with pytest.raises(BadUsage, match="not a duration"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2y5m7d3h", "2y5m7d3h"),
        ("26h", "26h"),
        ("90min", "90min"),
        ("2w", "14d"),
        ("1h1h", "2h"),
        ("999999y", "999999y"),
    ],
)
def test_a_good_duration(text: str, shown: str) -> None:
    assert str(Duration.parse(text)) == shown


@pytest.mark.parametrize(
    ("moment", "text", "before"),
    [
        ("2026-03-31T12:00:00+00:00", "1m", "2026-03-03T12:00:00+00:00"),
        ("2028-03-31T12:00:00+00:00", "1m", "2028-03-02T12:00:00+00:00"),
        ("2026-01-15T12:00:00+00:00", "1y1m", "2024-12-15T12:00:00+00:00"),
        ("2026-01-15T12:00:00+00:00", "2025y", "0001-01-15T12:00:00+00:00"),
        ("2026-11-24T12:00:00+00:00", "999999y", "0001-01-01T00:00:00+00:00"),
        ("2026-11-24T12:00:00+00:00", "999999d", "0001-01-01T00:00:00+00:00"),
    ],
)
def test_earlier_by_the_calendar(moment: str, text: str, before: str) -> None:
    found = Duration.parse(text).before(datetime.fromisoformat(moment), UTC)
    assert found == datetime.fromisoformat(before)


def test_a_day_is_one_of_the_calendar_and_an_hour_is_time_that_passes() -> None:
    noon = datetime(2026, 10, 25, 12, tzinfo=BERLIN)  # the clocks have gone back that night
    assert Duration(days=1).before(noon, BERLIN) == datetime(2026, 10, 24, 12, tzinfo=BERLIN)
    assert Duration(hours=24).before(noon, BERLIN) == datetime(2026, 10, 24, 13, tzinfo=BERLIN)


def golden(decisions: Sequence[Decision]) -> list[str]:
    return [f"{decision.snapshot.tag} {', '.join(decision.reasons)}".rstrip() for decision in decisions]


def test_the_answer_as_people_read_it() -> None:
    some = [snapshot(NOW - timedelta(hours=hours)) for hours in (1, 2, 26, 27, 200, 2000)]
    policy = Policy(last=1, counts={"daily": 2, "monthly": 3}, within=Duration(days=9), tags=("*T103*",))
    assert golden(decide(some, policy, NOW, zone=ZoneInfo("UTC"), protected={some[5].tag})) == [
        "n-20261124T113000 within 9d, last snapshot, daily snapshot, monthly snapshot",
        "n-20261124T103000 tag *T103*, within 9d",
        "n-20261123T103000 tag *T103*, within 9d, daily snapshot",
        "n-20261123T093000 within 9d",
        "n-20261116T043000 within 9d",
        "n-20260902T043000 protected, monthly snapshot",
    ]


@settings(max_examples=20)
@given(series)
def test_the_order_of_the_list_means_nothing(snapshots: list[Snapshot]) -> None:
    policy = Policy(counts={"daily": 3, "weekly": 2})
    assert decide(snapshots, policy, NOW, zone=BERLIN) == decide(snapshots[::-1], policy, NOW, zone=BERLIN)


def test_an_age_in_months_is_not_taken_for_minutes() -> None:
    assert Duration.parse_age("90min") == Duration(minutes=90)
    assert Duration.parse_age("1y6mo") == Duration(years=1, months=6)
    for text in "90m", "1y6m":
        with pytest.raises(BadUsage, match="say min for minutes, or mo for months"):
            Duration.parse_age(text)
