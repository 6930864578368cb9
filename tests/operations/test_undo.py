"""No regret: what a load discards is saved first, and brought back."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.guest import Guest, Launch, blockdev, cli, disk_device, failing_disk, make_boot_disk, make_disk, until
from support.proxy import Intercept


def listed(guest: Guest) -> list[str]:
    return cli("list", "-q", monitor=guest.address).out.split()


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)  # by QMP in what follows
def test_back_and_forth(guest: Guest, transport: str) -> None:
    """RAM and disks are where they were; of the series the last one is kept; another undo goes back again."""
    guest.qmp("stop")
    cli("save", "one", monitor=guest.address)
    early = guest.counter
    guest.qmp("cont")
    guest.wait_for_ticks(3)
    guest.qmp("stop")
    late = guest.counter
    assert "qsnap undo" in cli("load", "one", "--save-current", monitor=guest.address).out
    assert guest.counter == early < late
    (first,) = set(listed(guest)) - {"one"}
    assert first.startswith("before-load-")
    cli("undo", monitor=guest.address)
    assert guest.counter == late
    (second,) = set(listed(guest)) - {"one"}
    assert second != first
    cli("undo", "--no-save-current", monitor=guest.address)
    assert guest.counter == early
    guest.qmp("cont")
    guest.assert_running()
    cli("load", "one", monitor=guest.address)
    text = cli("undo", monitor=guest.address, expect=7).err
    assert "nothing to undo: the last load saved nothing first" in text
    assert f"qsnap load {second}" in text


def test_under_a_name_and_by_default(guest: Guest, tmp_path: Path) -> None:
    cli("save", "one", monitor=guest.address)
    cli("load", "one", "--save-current=mine", monitor=guest.address)
    assert listed(guest) == ["one", "mine"]
    cli("load", "one", "--save-current=mine", monitor=guest.address, expect=8)
    cli("load", "one", "--save-current=one", monitor=guest.address, expect=2)
    cli("load", "nope", "--save-current", monitor=guest.address, expect=7)
    assert listed(guest) == ["one", "mine"], "nothing is saved for a load that is refused"
    config = tmp_path / "config.toml"
    config.write_text("[defaults]\nsave-current = true\n")
    document = cli("load", "one", "--json", "--config", str(config), monitor=guest.address).json
    assert listed(guest) == ["one", "mine", document["saved"]["tag"]]
    cli("load", "one", "--no-save-current", "--config", str(config), monitor=guest.address)
    assert len(listed(guest)) == 3


def test_a_load_that_fails_leaves_what_was_saved(launch: Launch, tmp_path: Path) -> None:
    make_boot_disk(tmp_path / "a")
    guest = launch(
        *failing_disk("a", tmp_path / "a", "vmstate_load", 5), "-device", "virtio-blk,drive=a",
        *blockdev("b", make_disk(tmp_path / "b")), "-device", "virtio-blk,drive=b",
    )  # fmt: skip
    guest.wait_for_ticks(5)
    assert guest.qmp.hmp("savevm one") == ""
    guest.wait_for_ticks()
    late = guest.counter
    text = cli("load", "one", "--full", "--save-current", monitor=guest.address, expect=20).err
    (saved,) = set(listed(guest)) - {"one"}
    assert f"what the guest had done before is saved as '{saved}'" in text
    cli("load", saved, "--running", monitor=guest.address)
    guest.assert_running()
    assert guest.counter >= late


@pytest.mark.parametrize("transport", ["hmp"], indirect=True)  # which saves into the image
def test_what_cannot_be_saved_is_not_discarded(launch: Launch, tmp_path: Path, transport: str) -> None:
    image = make_boot_disk(tmp_path / "a")
    guest = launch(*blockdev("a", image), *disk_device("a"))
    guest.wait_for_ticks(1)
    cli("save", "one", monitor=guest.address)
    early = guest.counter
    guest.quit()
    guest = launch(*failing_disk("a", image, "vmstate_save", 5, once=False), *disk_device("a"))
    until("what the load would discard", lambda: guest.counter > early + 10)
    late = guest.counter
    text = cli("load", "one", "--save-current", monitor=guest.address, expect=9).err
    assert "nothing was loaded, because what the load discards could not be saved" in text
    assert guest.counter >= late
    assert listed(guest) == ["one"]
    assert guest.runstate == "running"
    guest.wait_for_ticks(3)


def test_another_client_s_load_is_not_undone(guest: Guest) -> None:
    cli("save", "one", monitor=guest.address)
    cli("load", "one", "--save-current", monitor=guest.address)
    cli("save", "two", monitor=guest.address)
    assert guest.qmp.hmp("loadvm one") == ""
    assert "nothing to undo" in cli("undo", monitor=guest.address, expect=7).err


def test_a_load_that_cannot_be_written_down(guest: Guest, intercept: Intercept) -> None:
    """Through a proxy nobody sees the images; what does bring it back is said."""
    monitor = intercept(guest).address
    cli("save", "one", monitor=monitor)
    text = cli("load", "one", "--save-current", monitor=monitor).err
    (saved,) = set(listed(guest)) - {"one"}
    assert "`qsnap undo` does not know of it" in text
    assert f"`qsnap load {saved}`" in text
    assert f"qsnap load {saved}" in cli("undo", monitor=monitor, expect=7).err
