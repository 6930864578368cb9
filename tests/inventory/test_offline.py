"""Snapshots of a VM that is off: the same as QEMU shows of one that runs, and deletion from all images."""

from __future__ import annotations

import os
from pathlib import Path

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
    qemu_img,
    tags,
)
from support.live import state_files


def start(launch: Launch, directory: Path, *more: str) -> Guest:
    guest = launch(
        *blockdev("a", directory / "a"), *disk_device("a"),
        *blockdev("b", directory / "b"), *disk_device("b", 1), *more,
    )  # fmt: skip
    guest.wait_for_ticks(1)
    return guest


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    make_boot_disk(tmp_path / "a")
    make_disk(tmp_path / "b")
    return ["--image", str(tmp_path / "a"), "--image", str(tmp_path / "b")]


@needs_snapshot_jobs
def test_the_same_as_when_it_runs(launch: Launch, tmp_path: Path, images: list[str]) -> None:
    guest = start(launch, tmp_path)
    cli("save", "one", "--description", "a text", monitor=guest.address)
    cli("save", "two", monitor=guest.address)
    cli("save", "--live", "live", monitor=guest.address)
    cli("protect", "two", monitor=guest.address)
    shown = ("tag", "kind", "vm_state_size", "vmstate", "devices", "parent", "here", "description", "protected")

    def listed(*options: str, monitor: str | None = None) -> list[list[object]]:
        found = cli("list", "--json", *options, monitor=monitor).json["snapshots"]
        return [[one[key] for key in shown] for one in found]

    running = listed(monitor=guest.address)
    assert listed(*images) == running, "looked at beside the QEMU that has them open"
    assert "is in use: a QEMU has it open" in cli("delete", "one", *images, expect=1).err
    guest.quit()
    off = listed(*images)
    assert [row[:-4] for row in off] == [row[:-4] for row in running]
    assert "a text" in cli("show", "one", *images).out
    assert cli("verify", *images, "--json").json["snapshots"][0]["tag"] == "one"
    assert "is protected" in cli("delete", "two", *images, expect=6).err
    cli("delete", "one", "nope", *images, expect=7)
    assert tags(tmp_path / "a") == ["one", "two", "live"]
    cli("delete", "one", "live", *images)
    assert (tags(tmp_path / "a"), tags(tmp_path / "b")) == (["two"], ["two"])
    assert state_files(tmp_path) == ["a.qsnap-notes"]
    guest = start(launch, tmp_path, "-loadvm", "two")
    assert [row[0] for row in listed(monitor=guest.address)] == ["two"]
    guest.assert_running()


def test_what_is_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 1000)
    assert "the image is not qcow2" in cli("list", "--image", str(tmp_path / "text"), expect=2).err
    assert "No such file" in cli("list", "--image", str(tmp_path / "none"), expect=2).err
    damaged = make_disk(tmp_path / "damaged")
    qemu_img("snapshot", "-c", "t", damaged)
    with damaged.open("r+b") as file:
        os.pwrite(file.fileno(), b"\1" + bytes(7), 64)
    assert "table of snapshots is cut short" in cli("list", "--image", str(damaged), expect=2).err
    cli("list", "--image", str(make_disk(tmp_path / "d")), "--all", expect=2)
    assert "no snapshots" in cli("list", "--image", str(tmp_path / "d")).err


def test_a_tag_that_could_be_an_id(tmp_path: Path) -> None:
    """qemu-img would look it up among the IDs, too."""
    image = make_disk(tmp_path / "a")
    for tag in ("2", "other"):
        qemu_img("snapshot", "-c", tag, image)
    assert "could be the ID of another" in cli("delete", "2", "--image", str(image), expect=1).err
    assert tags(image) == ["2", "other"]
