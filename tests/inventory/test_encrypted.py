"""Encrypted disks: QEMU ends with an assertion when it writes the VM state into one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.guest import (
    DEADLINE_S,
    HAS_SNAPSHOT_JOBS,
    Launch,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    make_boot_disk,
    needs_snapshot_jobs,
    tags,
    tool,
    until,
)
from support.reports import findings

SECRET = ("-object", "secret,id=s,data=abc")


def encrypted(node: str, path: Path) -> list[str]:
    """A disk that the guest boots from, or uses."""
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    plain = make_boot_disk(path.with_suffix(".plain"))
    command = [tool("qemu-img"), "convert", "--object", SECRET[1], "-O", "qcow2", "-o", options, str(plain), str(path)]
    # On a busy machine it may say that it cannot tell how long a round of the key's derivation takes
    until("an encrypted image", lambda: subprocess.run(command, timeout=DEADLINE_S).returncode == 0)
    return [*SECRET, *blockdev(node, path, "qcow2", "encrypt.format=luks", "encrypt.key-secret=s"),
            *disk_device(node)]  # fmt: skip


@both_monitors
def test_it_is_refused_where_no_other_image_can_hold_the_state(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*encrypted("e", tmp_path / "e"))
    (found,) = findings(guest).values()
    assert (found["code"], found["node"]) == ("vmstate-encrypted", "e")
    assert "--live" in found["cure"]
    assert "--vmstate" in found["cure"]
    assert "in the clear" in found["cure"]
    assert cli("list", "--json", monitor=guest.address).json["snapshots"] == []
    guest.assert_running()


@both_monitors
def test_another_image_is_taken(launch: Launch, tmp_path: Path, transport: str) -> None:
    """Where QEMU can be told which; the encrypted disk goes back too."""
    guest = launch(
        *encrypted("e", tmp_path / "e"),
        *blockdev("plain", make_boot_disk(tmp_path / "p")), *disk_device("plain", 1),
    )  # fmt: skip
    if not HAS_SNAPSHOT_JOBS or transport == "hmp":
        (found,) = findings(guest).values()
        assert (found["code"], found["node"]) == ("vmstate-encrypted", "e")
        assert "over QMP: --vmstate plain" in found["cure"]
        return
    (found,) = findings(guest, ok=True).values()
    assert (found["code"], found["node"]) == ("vmstate-not-encrypted", "plain")
    guest.wait_for_ticks()
    saved = cli("save", "t", "--json", monitor=guest.address).json
    assert (saved["kind"], saved["vmstate"], saved["devices"]) == ("full", "plain", ["e", "plain"])
    assert "in the clear" in saved["warnings"][0]["message"]
    at = guest.wait_for_ticks()
    cli("load", "t", monitor=guest.address)
    guest.assert_running()
    assert guest.lines()[-1][0] < at, "it has not gone back"
    assert findings(guest, "--vmstate", "plain", ok=True) == {}, "it is not warned of what was asked for"
    assert "--vmstate plain" in findings(guest, "--vmstate", "e")["vmstate-encrypted"]["cure"]
    assert tags(tmp_path / "p") == ["t"]


@needs_snapshot_jobs
def test_a_live_save_needs_no_image_for_the_state(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*encrypted("e", tmp_path / "e"))
    guest.wait_for_ticks()
    saved = cli("save", "--live", "t", "--json", monitor=guest.address).json
    assert (saved["kind"], saved["warnings"]) == ("live", [])
    at = guest.wait_for_ticks()
    cli("load", "t", monitor=guest.address)
    guest.assert_running()
    assert guest.lines()[-1][0] < at
