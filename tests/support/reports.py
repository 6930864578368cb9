"""What ``qsnap check`` says of a guest."""

from __future__ import annotations

from typing import Any

from support.guest import (
    Guest,
    cli,
)


def findings(guest: Guest, *options: str, ok: bool = False) -> dict[str, dict[str, Any]]:
    """What check finds, by code; a save must then agree with it, and leave the guest alone."""
    guest.qmp("query-status")
    guest.qmp.events.clear()
    report = cli("check", "--json", *options, monitor=guest.address, expect=0 if ok else 6).json
    assert report["ok"] is ok
    if not ok:
        refused = cli("save", "t", "--json", *options, monitor=guest.address, expect=6).error
        assert [f["code"] for f in refused["findings"]] == [f["code"] for f in report["findings"]]
    guest.qmp("query-status")
    assert [event["event"] for event in guest.qmp.events if event["event"] in ("STOP", "RESUME")] == []
    assert guest.jobs() == []
    return {finding["code"]: finding for finding in report["findings"]}
