"""What scripts read: the VM in each document, devices by the names that people use, progress."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import qsnap
from qsnap.model.qemu import named
from support.guest import (
    Guest,
    Launch,
    blockdev,
    cli,
    finish,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    start_cli,
)
from support.proxy import Intercept, deed
from support.terminal import on_terminal


def test_devices_have_the_names_that_people_use(launch: Launch, tmp_path: Path) -> None:
    """QEMU makes up node-names for -drive, others at each start: they are beside, and nowhere else."""
    make_boot_disk(tmp_path / "a")
    make_disk(tmp_path / "b")
    drives = [f"file={tmp_path}/{name},if=virtio,id={label}" for name, label in (("a", "root"), ("b", "data"))]
    guest = launch("-drive", drives[0], "-drive", drives[1])
    guest.wait_for_ticks(1)
    saved = cli("save", "t", "--json", monitor=guest.address).json
    assert (saved["vm"], saved["vmstate"], saved["devices"]) == (guest.address, "root", ["root", "data"])
    assert sorted(saved["labels"].values()) == ["data", "root"]
    assert all(name.startswith("#block") for name in saved["labels"])
    for command in ("list", "show t", "load t", "delete t"):
        document = cli(*command.split(), "--json", monitor=guest.address).json
        assert document["vm"] == guest.address
        for one in document.get("snapshots", [document]):
            del one["labels"]
        assert "#block" not in json.dumps(document), command
    refused = cli("load", "x", "--json", monitor=guest.address, expect=7).error
    assert refused["vm"] == guest.address


@pytest.mark.no_qemu
def test_only_made_up_names_are_replaced() -> None:
    labels = {"#block1": "root"}
    document = {"devices": ["#block1", "data"], "deleted": {"t": ["#block1"]}, "tag": "#block1", "labels": labels}
    assert named({"snapshots": [document]}) == {
        "snapshots": [{"devices": ["root", "data"], "deleted": {"t": ["root"]}, "tag": "#block1", "labels": labels}]
    }


def test_progress_in_lines_of_json(guest: Guest) -> None:
    """On standard error, of a save and of a load; the document is on standard output, and complete."""
    for command, phase in (("save", "saving"), ("load", "loading")):
        run = cli(command, "t", "--json", "--progress", "json", monitor=guest.address)
        assert run.json["tag"] == "t"
        lines = [json.loads(line) for line in run.err.splitlines()]
        assert {line["message_type"] for line in lines} == {"status"}
        assert {line["vm"] for line in lines} == {guest.address}
        assert phase in {line["phase"] for line in lines}
        done = [line["bytes_done"] for line in lines if "bytes_done" in line and line["phase"] == phase]
        assert done == sorted(done)
        assert all(0 <= line.get("percent_done", 0) <= 1 for line in lines)
    assert cli("load", "t", "--progress", "none", monitor=guest.address).err == ""


def test_the_progress_of_several_vms(launch: Launch, tmp_path: Path) -> None:
    """Each has lines of its own, and a bar of its own, which begins with its name."""
    guests = [
        launch(*blockdev("disk", make_disk(tmp_path / name)), "-device", "virtio-blk,drive=disk", memory="16")
        for name in ("a", "b")
    ]
    names = [str(guest.pid) for guest in guests]
    both = [word for name in names for word in ("--vm", name)]
    lines = [json.loads(line) for line in cli("save", "t", "--progress", "json", *both).err.splitlines()]
    assert {line["vm"] for line in lines} == set(names)
    text = on_terminal("save", "t", *both, columns=80)
    for name in names:
        assert f"{name}: saving" in text
        assert f"{name}: saved t" in text
    assert ": saving" not in on_terminal("save", "t", "--progress", "none", *both)


@needs_snapshot_jobs
def test_an_interrupt_says_what_became_of_it(guest: Guest, intercept: Intercept) -> None:
    """Before anything was done, too: that nothing was saved, and that the guest runs."""
    running: list[subprocess.Popen[str]] = []

    def interrupt(message: dict[str, Any]) -> None:
        if deed(message) == "query-migrate" and running:
            running.pop().send_signal(signal.SIGINT)

    proxy = intercept(guest, on_command=interrupt)
    process = start_cli("save", "t", "--no-prepare", monitor=proxy.address)
    running.append(process)
    run = finish(process)
    assert run.code == 130
    assert "nothing was saved; the guest is running" in run.err
    guest.assert_running()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("qsnap.vm.VM._tidied", "nothing was loaded"),
        ("qsnap.operations.position.note_position", "'t' was loaded"),
        ("qsnap.operations.guest_clock.announce", "'t' was loaded"),
    ],
)
async def test_an_interrupt_of_a_load_says_whether_it_was_loaded(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, place: str, told: str
) -> None:
    """Wherever it comes."""
    cli("save", "t", monitor=guest.address)

    async def interrupted(*_: object, **__: object) -> None:
        raise asyncio.CancelledError

    async with qsnap.connect(guest.address) as vm:
        monkeypatch.setattr(place, interrupted)
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await vm.load("t")
    assert cancelled.value.__notes__ == [told]
    guest.assert_running()
