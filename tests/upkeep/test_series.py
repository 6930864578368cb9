"""Series: saved, pruned, protected, described; on real QEMU, and qemu-img as the witness."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.guest import (
    Guest,
    Launch,
    assert_nothing_left,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    failing_disk,
    finish,
    make_boot_disk,
    make_disk,
    needs_snapshot_jobs,
    start_cli,
    tags,
    until,
)


@pytest.fixture
def disk(guest: Guest, tmp_path: Path) -> Path:
    """The first image of the guest fixture."""
    return tmp_path / "disk0.qcow2"


def save_series(guest: Guest, *arguments: str, prefix: str = "nightly") -> Any:
    return cli("save", "--prefix", prefix, "--json", *arguments, monitor=guest.address).json


@both_monitors
def test_saved_and_pruned_in_one(guest: Guest, disk: Path) -> None:
    cli("save", "by-hand", monitor=guest.address)
    cli("save", "nightly-by-hand", monitor=guest.address)
    other = save_series(guest, prefix="weekly")["tag"]
    made = [save_series(guest, "--keep-last", "2") for _ in range(4)]
    names = [one["tag"] for one in made]
    assert len(set(names)) == 4, "two in one second do not replace each other"
    assert all(name.startswith("nightly-2") and len(name) == len("nightly-20261124T152738") for name in names)
    assert [one["tag"] for one in made[3]["pruned"]["remove"]] == [names[1]]
    assert {one["tag"]: one["reasons"] for one in made[3]["pruned"]["keep"]} == {
        names[3]: ["last snapshot"],
        names[2]: ["last snapshot"],
    }
    assert sorted(tags(disk)) == sorted(["by-hand", "nightly-by-hand", other, *names[2:]])
    guest.assert_running()


@both_monitors
def test_a_dry_run_counts_the_snapshot_that_would_be_there(guest: Guest, disk: Path) -> None:
    older, newer = (save_series(guest)["tag"] for _ in range(2))
    plan = save_series(guest, "--keep-last", "2", "--dry-run")
    assert [one["tag"] for one in plan["pruned"]["remove"]] == [older]
    assert {one["tag"] for one in plan["pruned"]["keep"]} == {newer, plan["tag"]}
    assert tags(disk) == [older, newer]


@both_monitors
def test_prune_by_itself(guest: Guest, disk: Path) -> None:
    names = [save_series(guest)["tag"] for _ in range(3)]
    dry = cli("prune", "--prefix", "nightly", "--keep-daily", "1", "-n", monitor=guest.address)
    assert "would remove" in dry.out
    assert tags(disk) == names
    result = cli("prune", "--prefix", "nightly", "--keep-hourly", "1", "--json", monitor=guest.address).json
    assert [one["tag"] for one in result["remove"]] == names[1::-1]
    assert result["keep"][0]["reasons"] == ["hourly snapshot"]
    assert tags(disk) == names[2:]
    assert cli("prune", "--prefix", "nightly", "--keep-hourly", "1", "-q", monitor=guest.address).out == ""
    guest.assert_running()


def test_the_newest_stays_unless_all_may_go(guest: Guest, disk: Path) -> None:
    names = [save_series(guest)["tag"] for _ in range(2)]
    cli("prune", "--prefix", "nightly", "--keep-tag", "nothing", monitor=guest.address)
    assert tags(disk) == names[1:]
    cli("prune", "--prefix", "nightly", "--allow-remove-all", monitor=guest.address)
    assert tags(disk) == []


def test_what_is_refused_changes_nothing(guest: Guest, disk: Path) -> None:
    names = [save_series(guest)["tag"] for _ in range(2)]
    for arguments in (
        ("prune", "--prefix", "nightly"),
        ("prune", "--prefix", "nightly", "--keep-daily", "0"),
        ("prune", "--keep-last", "1"),
        ("prune", "--prefix", "", "--keep-last", "1"),
        ("prune", "--prefix", "nightly", "--keep-last", "-1"),
        ("prune", "--prefix", "nightly", "--keep-within", "7"),
        ("prune", "--prefix", "x" * 250, "--keep-last", "1"),
        ("prune", "--prefix", "nightly", "--keep-tag", ""),
        ("prune", "--prefix", "\udcff", "--keep-last", "1"),
        ("save", "--prefix", "\udcff"),
        ("delete", "\udcff"),
        ("protect", "\udcff"),
        ("save", "--prefix", "nightly", "tag"),
        ("save", "--keep-last", "1"),
        ("save", "tag", "--keep-last", "1"),
        ("save", "--prefix", "nightly", "--keep-daily", "0"),
        ("save", "--prefix", "a\nb"),
        ("save", "tag", "--description", "two\nlines"),
    ):
        assert cli(*arguments, monitor=guest.address, expect=2).err, arguments
    assert tags(disk) == names
    guest.assert_running()


def test_a_prefix_is_no_pattern(guest: Guest, disk: Path) -> None:
    kept = [save_series(guest, prefix=prefix)["tag"] for prefix in ("nightly", "night-ly", "a.c", "abc")]
    cli("prune", "--prefix", "a.c", "--allow-remove-all", monitor=guest.address)
    cli("prune", "--prefix", "night", "--allow-remove-all", monitor=guest.address)
    cli("prune", "--prefix", "*", "--allow-remove-all", monitor=guest.address)
    assert tags(disk) == [tag for tag in kept if not tag.startswith("a.c")]


@needs_snapshot_jobs
def test_a_failed_save_prunes_nothing(launch: Launch, tmp_path: Path) -> None:
    image = make_boot_disk(tmp_path / "disk0.qcow2")
    guest = launch(*failing_disk("disk0", image, "vmstate_save", 28), *disk_device("disk0"))
    cli("save", "--prefix", "nightly", "--keep-last", "1", monitor=guest.address, expect=9)
    names = [save_series(guest)["tag"] for _ in range(3)]
    assert tags(image) == names
    guest.quit()
    guest = launch(*failing_disk("disk0", image, "vmstate_save", 28), *disk_device("disk0"))
    cli("save", "--prefix", "nightly", "--keep-last", "1", monitor=guest.address, expect=9)
    assert_nothing_left(guest, {image: names})


def test_saved_but_not_pruned(guest: Guest, disk: Path) -> None:
    """The save is told of, and the exit code says that something is left to do."""
    names = [save_series(guest)["tag"] for _ in range(2)]
    Path(f"{disk}.qsnap-notes").write_text("no JSON")
    # A save of a new name replaces nothing, and so does not ask what is protected
    run = cli("save", "--prefix", "nightly", "--keep-last", "1", "--json", monitor=guest.address, expect=3)
    assert run.error["done"][0] not in names
    assert "cannot be understood" in run.error["failed"][0]["message"]
    assert tags(disk) == [*names, run.error["done"][0]]
    guest.assert_running()


@needs_snapshot_jobs
def test_half_made_ones_do_not_count(launch: Launch, tmp_path: Path) -> None:
    images = [make_boot_disk(tmp_path / "disk0.qcow2"), make_disk(tmp_path / "disk1.qcow2")]
    guest = launch(
        *blockdev("disk0", images[0]), *disk_device("disk0"),
        *blockdev("disk1", images[1]), *disk_device("disk1", 1),
    )  # fmt: skip
    whole = save_series(guest)["tag"]
    partial = save_series(guest, "--exclude", "disk1")["tag"]
    result = cli("prune", "--prefix", "nightly", "--keep-last", "1", "--json", monitor=guest.address).json
    assert result["remove"] == []
    assert tags(images[0]) == [whole, partial]


# Notes


@both_monitors
def test_protected(guest: Guest, disk: Path) -> None:
    """Neither pruned, nor deleted, nor replaced, until it is unprotected."""
    names = [save_series(guest)["tag"] for _ in range(3)]
    assert cli("protect", names[0], monitor=guest.address).out == f"{names[0]}: protected\n"
    cli("prune", "--prefix", "nightly", "--keep-last", "1", monitor=guest.address)
    assert tags(disk) == [names[0], names[2]]
    for command in (("delete", names[0]), ("save", names[0]), ("save", "--safe-replace", names[0])):
        run = cli(*command, "--json", monitor=guest.address, expect=6)
        assert [(f["code"], f["cure"]) for f in run.error["findings"]] == [
            ("protected", f"qsnap unprotect {names[0]}"),
        ]
    assert tags(disk) == [names[0], names[2]]
    cli("load", names[0], monitor=guest.address)
    cli("unprotect", names[0], monitor=guest.address)
    cli("delete", names[0], monitor=guest.address)
    assert tags(disk) == [names[2]]
    guest.assert_running()


@needs_snapshot_jobs
def test_protected_from_a_live_save(guest: Guest, disk: Path) -> None:
    cli("save", "--live", "a", monitor=guest.address)
    before = sorted(path.name for path in disk.parent.iterdir())
    cli("protect", "a", monitor=guest.address)
    cli("save", "--live", "a", monitor=guest.address, expect=6)
    cli("delete", "a", monitor=guest.address, expect=6)
    assert sorted(path.name for path in disk.parent.iterdir()) == sorted([*before, "disk0.qcow2.qsnap-notes"])
    (found,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert (found["kind"], found["protected"]) == ("live", True)


def test_described(guest: Guest, disk: Path) -> None:
    cli("save", "a", "--description", "größer & [red] better", monitor=guest.address)
    cli("save", "b", monitor=guest.address)
    assert "größer & [red] better" in cli("list", monitor=guest.address).out
    assert "description:  größer & [red] better" in cli("show", "a", monitor=guest.address).out
    cli("describe", "a", "other", monitor=guest.address)
    listed = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert {one["tag"]: one["description"] for one in listed} == {"a": "other", "b": ""}
    cli("describe", "a", "", monitor=guest.address)
    assert not Path(f"{disk}.qsnap-notes").exists(), "nothing is written down any more"
    assert "other" not in cli("list", monitor=guest.address).out
    cli("describe", "nope", "x", monitor=guest.address, expect=7)
    cli("protect", "a", "nope", monitor=guest.address, expect=7)
    assert not Path(f"{disk}.qsnap-notes").exists()


def test_notes_survive_both_programs_and_are_of_one_snapshot(launch: Launch, tmp_path: Path) -> None:
    image = make_boot_disk(tmp_path / "disk0.qcow2")
    arguments = (*blockdev("disk0", image), *disk_device("disk0"))
    guest = launch(*arguments)
    cli("save", "a", "--description", "the first", monitor=guest.address)
    cli("protect", "a", monitor=guest.address)
    guest.quit()
    guest = launch(*arguments)
    (found,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert (found["protected"], found["description"]) == (True, "the first")
    # The same over the other monitor, whose tables round times
    (found,) = cli("list", "--json", monitor=guest.hmp_address).json["snapshots"]
    assert (found["protected"], found["description"]) == (True, "the first")
    ours = found["vm_clock_ns"] // 1_000_000

    def saved_by_others() -> Any:
        guest.qmp.hmp("savevm a")
        (found,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
        return found if found["vm_clock_ns"] // 1_000_000 != ours else None

    # Both QEMUs began at 0, and what is written down is known by the millisecond
    found = until("a snapshot of another moment", saved_by_others)
    assert (found["protected"], found["description"]) == (False, "")
    cli("delete", "a", monitor=guest.address)
    assert not Path(f"{image}.qsnap-notes").exists()


def test_protection_holds_in_any_time_zone(guest: Guest, disk: Path) -> None:
    """A human monitor tells dates in local time, and whose local time that is differs."""
    cli("save", "a", "--description", "text", monitor=guest.address)
    cli("save", "b", monitor=guest.address)
    cli("protect", "a", monitor=guest.address)
    for zone in ("America/New_York", "Asia/Kathmandu"):
        cli("delete", "a", monitor=guest.hmp_address, env={"TZ": zone}, expect=6)
        cli("describe", "b", zone, monitor=guest.hmp_address, env={"TZ": zone})
    listed = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert {one["tag"]: (one["protected"], one["description"]) for one in listed} == {
        "a": (True, "text"),
        "b": (False, "Asia/Kathmandu"),
    }


def test_notes_in_two_files_become_one(guest: Guest, disk: Path) -> None:
    """As where the disks were those of two VMs: none of them stays behind that says what is no more true."""
    cli("save", "a", monitor=guest.address)
    cli("save", "b", monitor=guest.address)
    cli("protect", "a", "b", monitor=guest.address)
    notes, others = Path(f"{disk}.qsnap-notes"), disk.with_name("disk1.qcow2.qsnap-notes")
    shutil.copy(notes, others)
    cli("unprotect", "a", monitor=guest.address)
    assert not others.exists()
    cli("delete", "a", monitor=guest.address)
    cli("delete", "b", monitor=guest.address, expect=6)


def test_notes_that_cannot_be_read(guest: Guest, disk: Path) -> None:
    """Nothing that may be protected is done away with; the rest goes on."""
    cli("save", "a", monitor=guest.address)
    notes = Path(f"{disk}.qsnap-notes")
    for text in ("no JSON", '{"version": 2, "notes": []}', '{"version": 1, "notes": [{"tag": 1}]}', "", "[" * 5000):
        notes.write_text(text)
        listed = cli("list", monitor=guest.address)
        assert "warning: the notes" in listed.err
        assert listed.out.splitlines()[1].startswith("a ")
        for command in (("delete", "a"), ("save", "a"), ("protect", "a")):
            assert "the notes" in cli(*command, monitor=guest.address, expect=1).err, command
        cli("load", "a", monitor=guest.address)
        assert notes.read_text() == text
    notes.unlink()
    os.mkfifo(notes)
    cli("delete", "a", monitor=guest.address, expect=1)
    notes.unlink()
    cli("delete", "a", monitor=guest.address)
    guest.assert_running()


def test_no_place_for_notes(guest: Guest, disk: Path) -> None:
    cli("save", "a", monitor=guest.address)
    notes = Path(f"{disk}.qsnap-notes")
    notes.mkdir()
    (notes / "x").touch()
    run = cli("save", "b", "--description", "text", monitor=guest.address, expect=1)
    assert "the notes" in run.err
    assert tags(disk) == ["a"], "looked at before the guest was touched"


@pytest.fixture
def two(launch: Launch, tmp_path: Path) -> tuple[list[Guest], list[Path], Path]:
    """Two guests, their images, and a config file that names them."""
    images = [make_boot_disk(tmp_path / f"{name}.qcow2") for name in ("web", "db")]
    guests = [launch(*blockdev("disk0", image), *disk_device("disk0")) for image in images]
    config = tmp_path / "config.toml"
    named = zip(("web", "db"), guests, strict=True)
    config.write_text("".join(f"[vm.{name}]\nmonitor = {json.dumps(guest.address)}\n" for name, guest in named))
    return guests, images, config


def test_several_vms(two: tuple[list[Guest], list[Path], Path]) -> None:
    guests, images, config = two
    env = {"QSNAP_CONFIG": str(config)}
    run = cli("save", "a", "--vm", "web", "--vm", "db", env=env)
    assert [line.partition(":")[0] for line in run.out.splitlines()] == ["web", "db"]
    run = cli("save", "--prefix", "n", "--keep-last", "1", "--vm", "web", "--vm", "db", env=env)
    assert [line.partition(":")[0] for line in run.out.splitlines()] == ["web", "db"], "one line each"
    cli("prune", "--prefix", "n", "--allow-remove-all", "--vm", "web", "--vm", "db", env=env)
    assert [tags(image) for image in images] == [["a"], ["a"]]
    listed = cli("list", "--vm", "web", "--vm", "db", "--json", env=env).json["vms"]
    assert [(one["vm"], one["exit_code"], one["result"]["snapshots"][0]["tag"]) for one in listed] == [
        ("web", 0, "a"),
        ("db", 0, "a"),
    ]
    for guest in guests:
        guest.assert_running()


def test_several_vms_some_fail(two: tuple[list[Guest], list[Path], Path]) -> None:
    guests, images, config = two
    env = {"QSNAP_CONFIG": str(config)}
    names = ("--vm", "web", "--vm", "nobody", "--vm", "db")
    cli("save", "b", "--vm", "db", env=env)
    run = cli("delete", "b", "--vm", "web", "--vm", "db", env=env, expect=3)
    assert run.out == "db: deleted b from disk0\n"
    assert "web: no snapshot 'b'" in run.err
    assert cli("delete", "b", "--vm", "web", "--vm", "db", env=env, expect=7).out == ""
    guests[1].kill()
    run = cli("save", "a", *names, "--json", env=env, expect=3)
    found = {one["vm"]: (one["exit_code"], one.get("error", {}).get("error")) for one in run.json["vms"]}
    assert found == {"web": (0, None), "nobody": (4, "NoVM"), "db": (4, "ConnectError")}
    assert tags(images[0]) == ["a"]
    guests[0].assert_running()


def test_several_vms_usage(two: tuple[list[Guest], list[Path], Path]) -> None:
    env = {"QSNAP_CONFIG": str(two[2])}
    for arguments in (
        ("list", "--vm", "web", "--all"),
        ("list", "--all", "-m", two[0][0].address),
        ("list", "--vm", "web", "--vm", "db", "-m", two[0][0].address),
        ("list", "--all", "--jobs", "0"),
    ):
        cli(*arguments, env=env, expect=2)
    twice = cli("list", "-q", "--vm", "web", "--vm", str(two[0][0].pid), "--json", env=env).json["vms"]
    assert [one["vm"] for one in twice] == ["web"], "one VM by two names is done once"


def test_an_interrupt_ends_the_work_on_all(two: tuple[list[Guest], list[Path], Path]) -> None:
    guests, images, config = two
    process = start_cli(
        "save", "a", "--vm", "web", "--vm", "db", "--lock-wait", "60", env={"QSNAP_CONFIG": str(config)}
    )
    until(
        "something is done", lambda: any(path.name != "x" for path in Path(os.environ["QSNAP_RUNTIME_DIR"]).iterdir())
    )
    process.terminate()
    run = finish(process)
    assert run.code == 143, run.err
    for guest, image in zip(guests, images, strict=True):
        guest.assert_running()
        assert tags(image) in ([], ["a"])


def test_a_series_that_there_is_not(guest: Guest) -> None:
    """A mistyped prefix would never prune anything."""
    run = cli("prune", "--prefix", "nigthly", "--keep-last", "1", "-q", monitor=guest.address)
    assert run.err == "warning: there is no series 'nigthly', so nothing was pruned\n"
    cli("save", "--prefix", "nightly", monitor=guest.address)
    run = cli("prune", "--prefix", "nigthly", "--keep-last", "1", "-q", monitor=guest.address)
    assert "there is no series 'nigthly', so nothing was pruned; there is nightly" in run.err
    assert cli("prune", "--prefix", "nightly", "--keep-last", "1", "-q", monitor=guest.address).err == ""
    assert "there is nightly" in cli("prune", "--keep-last", "1", monitor=guest.address, expect=2).err
    assert "there is nightly" in cli("list", "--prefix", "nigthly", monitor=guest.address).err
    assert ": nightly" in cli("load", "--latest", "--prefix", "nigthly", monitor=guest.address, expect=7).err
