"""Live saves of disks below filter nodes; and what --live=auto does where a live save fails in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.guest import (
    Guest,
    Launch,
    blockdev,
    cli,
    disk_device,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    tags,
)
from support.live import state_files
from support.proxy import Intercept

pytestmark = needs_snapshot_jobs

FILTERS = {
    "throttle": [
        "-object", "throttle-group,id=tg", "-blockdev", "driver=throttle,node-name=top,throttle-group=tg,file=q",
    ],
    "copy-on-read": ["-blockdev", "driver=copy-on-read,node-name=top,file=q"],
    "raw": ["-blockdev", "driver=raw,node-name=top,file=q"],
}  # fmt: skip


def below(launch: Launch, d: Path, *names: str) -> Guest:
    """The counting guest: its disks below these filters, the last one without."""
    disks = [make_boot_disk(d / "q0"), *(make_disk(d / f"q{number}") for number in range(1, len(names)))]
    guest = launch(
        *(part for number, (name, path) in enumerate(zip(names, disks, strict=True)) for part in (
            *blockdev(f"q{number}", path),
            *(option.replace("=top", f"=top{number}").replace("file=q", f"file=q{number}") for option in FILTERS[name]),
            *disk_device(f"top{number}", number),
        )),
        *blockdev("disk1", make_disk(d / "disk1")), *disk_device("disk1", len(names)),
    )  # fmt: skip
    guest.wait_for_ticks()
    return guest


def test_live_snapshots_below_filters_go_back(launch: Launch, tmp_path: Path) -> None:
    guest = below(launch, tmp_path, *FILTERS)
    images = [tmp_path / name for name in ("q0", "q1", "q2", "disk1")]
    saved = cli("save", "--live", "l", "--json", monitor=guest.address).json
    assert (saved["kind"], saved["devices"]) == ("live", [image.name for image in images])
    assert [tags(image) for image in images] == [["l"]] * 4
    at = guest.wait_for_ticks()
    cli("load", "l", monitor=guest.address)
    guest.assert_running()
    assert guest.lines()[-1][0] < at, "it has not gone back"
    guest.wait_for_ticks()
    guest.assert_running()
    cli("delete", "l", monitor=guest.address)
    assert [*map(tags, images), state_files(tmp_path)] == [[]] * 5


@pytest.mark.parametrize("how", ["--live", "--live=auto"])
def test_a_live_save_that_fails_midway(launch: Launch, tmp_path: Path, intercept: Intercept, how: str) -> None:
    """Another snapshot comes in between, so that the disks cannot be snapshotted: nothing is left below the filter; and
    "auto" saves the ordinary way then."""
    guest = below(launch, tmp_path, "throttle")

    def take(message: dict[str, Any]) -> None:
        if message.get("execute") == "transaction":
            guest.qmp("blockdev-snapshot-internal-sync", device="disk1", name="l")

    address = str(intercept(guest, on_command=take).address)
    place = ("--state-dir", str(tmp_path))
    run = cli("save", how, "l", *place, "--json", monitor=address, expect=9 if how == "--live" else 0)
    assert state_files(tmp_path) == []
    guest.assert_running()
    if how == "--live":
        assert "nothing of it is left" in run.error["message"]
        assert tags(tmp_path / "q0") == []
        return
    (why,) = (found["message"] for found in run.json["warnings"] if found["code"] == "not-live")
    assert "saved the ordinary way: " in why
    assert "nothing of it is left" in why
    assert (run.json["kind"], tags(tmp_path / "q0"), tags(tmp_path / "disk1")) == ("full", ["l"], ["l"])
    at = guest.wait_for_ticks()
    cli("load", "l", monitor=guest.address)
    guest.assert_running()
    assert guest.lines()[-1][0] < at
