"""Whether snapshots are fresh enough, as the answer of a monitoring plugin. Pure: the clock is an argument."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from qsnap.model.qemu import Struct
from qsnap.model.snapshots import InBacking, Snapshot
from qsnap.tags import is_of_series
from qsnap.upkeep.retention import Duration


class Level(StrEnum):
    """The states of a monitoring plugin; its exit codes are 0, 1, 2 and 3, in this order."""

    OK = "OK"
    WARNING = "WARNING"
    CRITICAL = "CRITICAL"
    UNKNOWN = "UNKNOWN"

    @property
    def exit_code(self) -> int:
        """The plugin's exit code."""
        return list(Level).index(self)


class Health(Struct, frozen=True):
    """The plugin's answer."""

    level: Level
    message: str
    newest: str | None = None
    """The tag of the newest snapshot that can be loaded."""
    age_s: int | None = None
    """Its age."""
    size: int | None = None
    """Bytes of its VM state."""
    snapshots: int | None = None
    """The number of snapshots, including those that cannot be loaded."""
    warn_age_s: int | None = None
    max_age_s: int | None = None

    def line(self) -> str:
        """The line for a monitoring system: the message, a bar, and the figures with their thresholds."""
        figures = []
        if self.age_s is not None:
            figures.append(f"age={self.age_s}s;{_or_empty(self.warn_age_s)};{_or_empty(self.max_age_s)};0")
        if self.snapshots is not None:
            figures.append(f"snapshots={self.snapshots};;;0")
        if self.size is not None:
            figures.append(f"size={self.size}B;;;0")
        text = " ".join(f"QSNAP {self.level} - {self.message}".split()).replace("|", "/")
        return f"{text} | {' '.join(figures)}" if figures else text


def _or_empty(number: int | None) -> str:
    return "" if number is None else str(number)


def is_sound(snapshot: Snapshot, left_out: Collection[str]) -> bool:
    """Whether it can be loaded, and holds all devices except those that are left out on purpose.

    :param left_out: node-names.
    """
    return snapshot.has_state and not snapshot.problems and set(snapshot.missing) <= set(left_out)


def judge(
    found: Sequence[Snapshot],
    now: datetime,
    max_age: Duration,
    *,
    warn_age: Duration | None = None,
    prefix: str | None = None,
    left_out: Collection[str] = (),
    troubles: Sequence[str] = (),
    in_backing: Sequence[InBacking] = (),
) -> Health:
    """Whether the newest sound snapshot is young enough.

    :param max_age: CRITICAL if it is older, or if there is none.
    :param warn_age: WARNING if it is older.
    :param prefix: check only this series.
    :param left_out: see :func:`is_sound`.
    :param troubles: other problems of the VM; each makes a WARNING.
    :param in_backing: tags out of reach below an overlay; mentioned if nothing else can be loaded.
    """
    series = [one for one in found if prefix is None or is_of_series(one.tag, prefix)]
    sound = [one for one in series if is_sound(one, left_out)]
    of_what = f"snapshot of series {prefix}" if prefix is not None else "snapshot"
    limits: dict[str, Any] = {
        "max_age_s": int((now - max_age.before(now)).total_seconds()),
        "warn_age_s": int((now - warn_age.before(now)).total_seconds()) if warn_age else None,
    }
    if not sound:
        there = f"{len(series)} that cannot be loaded" if series else "none at all"
        if below := [one for one in in_backing if prefix is None or is_of_series(one.tag, prefix)]:
            there += f", but {len(below)} in the backing image {below[0].image} of {below[0].device}"
        return Health(
            level=Level.CRITICAL, message=f"no {of_what} that can be loaded ({there})", snapshots=len(series), **limits
        )
    newest = max(sound, key=lambda one: one.date)
    last = max(series, key=lambda one: one.date)
    age_s = int((now - newest.date).total_seconds())
    level, message = Level.OK, f"{newest.tag} is {_aged(age_s)}, {len(series)} of them"
    warnings = list(troubles)
    if newest.runstate:
        warnings.append(f"it is of a guest that was {newest.runstate}")
    if last.date > newest.date:
        warnings.append(f"the newest, {last.tag}, is {last.kind}")
    if newest.date < max_age.before(now):
        level, message = Level.CRITICAL, f"the newest {of_what}, {newest.tag}, is {_aged(age_s)} (limit {max_age})"
    elif warn_age and newest.date < warn_age.before(now):
        level, message = Level.WARNING, f"the newest {of_what}, {newest.tag}, is {_aged(age_s)} (limit {warn_age})"
    elif age_s < 0:
        level, message = Level.WARNING, f"{newest.tag} is dated in the future: the clock is or was wrong"
    elif warnings:
        level = Level.WARNING
    return Health(
        level=level,
        message="; ".join([message, *warnings]),
        newest=newest.tag,
        age_s=age_s,
        size=newest.vm_state_size,
        snapshots=len(series),
        **limits,
    )


def _aged(seconds: int) -> str:
    """``25 h old``, in the largest unit of which there are at least two."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} old"
    return f"{seconds} s old"
