"""Where the guest is: true whoever has saved or loaded, kept when QEMU ends, and not guessed."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

import qsnap
from qsnap.inventory.lineage import SUFFIX
from qsnap.inventory.qcow2 import L1Table, L1Tables
from support.guest import (
    DEADLINE_S,
    Guest,
    Launch,
    blockdev,
    cli,
    disk_device,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    qemu_img,
    tool,
    until,
)

NOTHING: dict[str, object] = {"tag": None, "deleted": [], "unknown": ""}


def tree(guest: Guest) -> Any:
    return cli("tree", "--json", monitor=guest.address).json


def here(guest: Guest) -> str:
    """The snapshot that the guest has come from; "?" and why, if that is not known."""
    document = tree(guest)
    position = document["position"]
    assert [one["tag"] for one in document["snapshots"] if one["here"]] == [position["tag"]] * bool(position["tag"])
    return str(position["tag"] or f"? {position['unknown']}")


def parents(guest: Guest) -> dict[str, str | None]:
    return {one["tag"]: one["parent"] for one in tree(guest)["snapshots"]}


def start(launch: Launch, directory: Path) -> Guest:
    """The counting guest on two disks, of which the second has room that the guest does not use."""
    guest = launch(
        *blockdev("a", directory / "a"), *disk_device("a", share_rw="on"),
        *blockdev("b", directory / "b"), *disk_device("b", 1, share_rw="on"),
    )  # fmt: skip
    guest.wait_for_ticks(1)
    return guest


@pytest.fixture
def images(tmp_path: Path) -> Path:
    make_boot_disk(tmp_path / "a")
    make_disk(tmp_path / "b")
    return tmp_path


def test_saves_and_loads(launch: Launch, images: Path) -> None:
    """By qsnap and by others; and when QEMU was started anew."""
    guest = start(launch, images)
    assert tree(guest) == {"vm": guest.address, "snapshots": [], "position": NOTHING}
    for line in ("save one", "save two", "load one", "save three"):
        cli(*line.split(), monitor=guest.address)
    assert here(guest) == "three"
    assert parents(guest) == {"one": "", "two": "one", "three": "one"}
    assert guest.qmp.hmp("loadvm two") == ""
    assert here(guest) == "two", "another client's load shows in the image"
    cli("save", "four", monitor=guest.address)
    assert parents(guest)["four"] == "two"
    guest.quit()
    guest = start(launch, images)
    assert here(guest) == "four"
    cli("delete", "four", monitor=guest.address)
    assert tree(guest)["position"] == {"tag": "two", "deleted": ["four"], "unknown": ""}
    assert guest.qmp.hmp("savevm five") == ""
    assert here(guest) == "? another client has made 'five' since"
    assert guest.qmp.hmp("delvm five") == ""
    assert here(guest) == "? another client has saved or loaded since"
    cli("save", "six", monitor=guest.address)
    assert (here(guest), parents(guest)["six"]) == ("six", None), "its parent is not invented"
    guest.quit()
    for name in ("a", "b"):
        qemu_img("snapshot", "-a", "three", images / name)
    assert here(start(launch, images)) == "three", "qemu-img's, too"


@needs_snapshot_jobs
def test_a_live_snapshot_shares_its_place(launch: Launch, images: Path) -> None:
    """Made after a load, it has the L2 tables for VM states of the one that was loaded: only the disks differ."""
    guest = start(launch, images)
    cli("save", "full", monitor=guest.address)
    cli("load", "full", monitor=guest.address)
    guest.qmp.hmp('qemu-io b "write -P 7 6M 64k"')
    cli("save", "--live", "live", monitor=guest.address)
    guest.wait_for_ticks()
    assert here(guest) == "live"
    assert parents(guest)["live"] == "full"
    assert guest.qmp.hmp("loadvm full") == ""
    guest.wait_for_ticks()
    assert here(guest) == "? another client may have loaded 'full' since: nothing in the image tells"
    cli("load", "live", monitor=guest.address)
    assert here(guest) == "live"
    (images / f"a{SUFFIX}").unlink()
    assert here(guest).startswith("?"), "both may be it"


@needs_snapshot_jobs
def test_disks_that_may_have_been_put_back_while_the_vm_was_off(launch: Launch, tmp_path: Path) -> None:
    """To a live snapshot, too, which no QEMU loads by itself: where nothing in the disks tells it from another one."""
    image = make_disk(tmp_path / "a")
    guest = launch(*blockdev("a", image), *disk_device("a"), memory="16")
    for line in ("save full", "load full", "save --live live", "load full"):
        cli(*line.split(), monitor=guest.address)
    assert here(guest) == "full"
    guest.quit()
    qemu_img("snapshot", "-a", "live", image)
    guest = launch(*blockdev("a", image), *disk_device("a"), memory="16")
    assert here(guest) == (
        "? the disks may have been put back to 'live' while the VM was off: nothing in them tells"
    )  # fmt: skip


def test_a_disk_that_cannot_be_seen(launch: Launch, tmp_path: Path) -> None:
    """What it holds may be of another moment, whatever the other disks say."""
    make_boot_disk(tmp_path / "a")
    with make_disk(tmp_path / "b").open("r+b") as file:
        file.truncate(4 << 20)  # an export does not grow
    export = tmp_path / "nbd"
    server = subprocess.Popen([tool("qemu-nbd"), "-t", "-f", "raw", "-k", export, tmp_path / "b"])
    try:
        until("the export", lambda: export.exists() or server.poll() is not None)
        guest = launch(
            *blockdev("a", tmp_path / "a"), *disk_device("a"),
            "-blockdev", f"driver=nbd,node-name=n,server.type=unix,server.path={export}",
            "-blockdev", "driver=qcow2,node-name=b,file=n", *disk_device("b", 1),
        )  # fmt: skip
        cli("save", "one", monitor=guest.address)
        assert here(guest) == "? the image of b cannot be seen from here"
    finally:
        server.kill()
        server.wait(DEADLINE_S)


@needs_snapshot_jobs
def test_what_could_not_be_written_down_is_not_guessed(launch: Launch, images: Path) -> None:
    """Of live snapshots nothing in the image tells which was loaded; the mark in QEMU tells that one was."""
    guest = start(launch, images)
    for tag in ("one", "two"):
        cli("save", "--live", tag, monitor=guest.address)
    place = images / f"a{SUFFIX}"
    kept = place.read_bytes()
    cli("load", "one", monitor=guest.address)
    assert here(guest) == "one"
    place.write_bytes(kept)
    assert here(guest) == "? the last load was not completed, or could not be written down"


def test_a_save_that_fails_changes_nothing(launch: Launch, images: Path) -> None:
    """It has written where the next VM state goes; the guest is where it was."""
    guest = start(launch, images)
    cli("save", "one", monitor=guest.address)
    cli("load", "one", monitor=guest.address)
    guest.qmp.hmp('qemu-io b "write -P 7 6M 64k"')
    before = (images / f"a{SUFFIX}").read_bytes()
    cli("load", "nope", monitor=guest.address, expect=7)
    assert (images / f"a{SUFFIX}").read_bytes() == before
    cli("save", "two", "--timeout", "0.3", "--prepare", monitor=guest.address, expect=None)
    assert here(guest) in ("one", "two")
    cli("load", "one", "--exclude", "b", monitor=guest.address, expect=None)
    assert here(guest) in ("one", "two")


async def test_a_load_that_ends_before_qemu_begins_with_it(
    launch: Launch, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it: the guest is where it was."""
    guest = start(launch, images)
    for line in ("save one", "save two"):
        cli(*line.split(), monitor=guest.address)

    async def interrupted() -> None:
        raise asyncio.CancelledError

    async with qsnap.connect(guest.address) as vm:
        monkeypatch.setattr(vm._monitor, "stop", interrupted)
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await vm.load("one")
    assert cancelled.value.__notes__ == ["nothing was loaded"]
    assert here(guest) == "two"
    guest.assert_running()


@needs_snapshot_jobs
def test_the_list_and_the_tree_say_so(launch: Launch, images: Path) -> None:
    guest = start(launch, images)
    cli("save", "one", monitor=guest.address)
    cli("save", "two", "--description", "a text", monitor=guest.address)
    cli("load", "one", monitor=guest.address)
    one, two = cli("list", monitor=guest.address).out.splitlines()[1:]
    assert one.endswith("you are here")
    assert two.endswith("a text")
    lines = cli("tree", monitor=guest.address).out.splitlines()
    assert [line[:7] for line in lines] == ["one  20", "├── two", "└── * y"]
    cli("delete", "one", monitor=guest.address)
    assert cli("tree", monitor=guest.address).out.splitlines()[-1] == "* you are here (after one, which is deleted)"


def test_an_image_that_nothing_was_written_to(tmp_path: Path) -> None:
    with make_disk(tmp_path / "empty", "40G").open("rb") as file:
        assert L1Tables(file.fileno()).active == L1Table(disk=(0,) * 80, state=())
