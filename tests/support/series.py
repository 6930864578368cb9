"""Snapshots of a series that exist on paper only."""

from __future__ import annotations

from datetime import UTC, datetime

from qsnap.model.snapshots import Kind, Snapshot


def snapshot(date: datetime, kind: Kind = Kind.FULL, tag: str | None = None) -> Snapshot:
    return Snapshot(
        tag=tag or f"n-{date.astimezone(UTC):%Y%m%dT%H%M%S}",
        kind=kind,
        vm_state_size=1,
        date=date,
        vm_clock_ns=0,
        vmstate="disk0",
        devices=("disk0",),
    )
