"""Protection and state files that cannot be seen from here: over TCP, as another user, with another directory."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import qsnap
from qsnap.errors import JobFailed, PrecheckRefused, QsnapError
from qsnap.inventory.devices import survey
from qsnap.inventory.inventory import look
from qsnap.inventory.state_file import Content
from qsnap.inventory.state_store import StateStore
from qsnap.model.qemu import NodeSnapshot
from qsnap.model.requests import DeleteRequest, OnExists, SaveRequest
from qsnap.monitor.names import HERE, NOTED, PROTECTED
from qsnap.operations.delete import do_delvm
from qsnap.operations.plan import plan_load
from qsnap.operations.prune import PruneRequest, do_prune
from qsnap.operations.save import do_savevm
from qsnap.runs.run import Run
from qsnap.upkeep.retention import Policy
from support.fake_proc import as_nobody
from support.graphs import graph as graph_of
from support.graphs import node
from support.guest import Guest, Launch, blockdev, cli, disk_device, make_boot_disk, qemu_version, tags
from support.state_files import DATE, written

TCP = ("-qmp", "tcp:127.0.0.1:0,server=on,wait=off", "-monitor", "tcp:127.0.0.1:0,server=on,wait=off")


@pytest.fixture
def far(launch: Launch, tmp_path: Path) -> Guest:
    """A guest on one disk whose monitors are on TCP too; from there nobody sees its images."""
    make_boot_disk(tmp_path / "disk0.qcow2")
    guest = launch(*blockdev("disk0", tmp_path / "disk0.qcow2"), *disk_device("disk0", id="vd0"), *TCP)
    guest.wait_for_ticks(3)
    return guest


def addresses(guest: Guest) -> list[str]:
    """Of the monitors on TCP: QMP, and the human one."""
    found = [re.search(r"tcp:[^,]*", row["filename"]) for row in guest.qmp("query-chardev")]
    return sorted((match[0] for match in found if match), key=lambda address: int(address.rpartition(":")[2]))


def test_what_the_notes_protect_is_protected_over_every_monitor(far: Guest, tmp_path: Path) -> None:
    """QEMU shows it to those who cannot read the notes; where it does not, nothing is done away with."""
    disk = tmp_path / "disk0.qcow2"
    names = ["gold", "nightly-20260101T000000", "nightly-20260102T000000"]
    for tag in names:
        cli("save", tag, monitor=far.address)
    cli("protect", "gold", monitor=far.address)
    qmp, human = addresses(far)
    prune = ("prune", "--prefix", "nightly", "--keep-last", "1")
    for monitor, *command in (qmp, "delete", "gold"), (qmp, "save", "gold"), (human, "delete", "gold"):
        run = cli(*command, "--ignore-unseen", monitor=monitor, expect=6)
        assert "snapshot 'gold' is protected" in run.err
        listed = cli("list", "--json", monitor=monitor)
        assert {one["tag"] for one in listed.json["snapshots"] if one["protected"]} == {"gold"}
        assert "protected" not in listed.err

    # As if QEMU was started anew, and nobody who sees the notes had come since
    forget_marks(far)
    for monitor, *command in (qmp, "delete", "gold"), (qmp, "save", "gold"), (qmp, *prune), (human, "delete", "gold"):
        (finding,) = cli(*command, "--json", monitor=monitor, expect=6).error["findings"]
        assert finding["code"] == "unseen-notes"
        assert str(disk) in finding["message"]
        assert "run `qsnap recover` by a UNIX socket" in finding["cure"]
        assert "--ignore-unseen" in finding["cure"]
    assert f"notes of this VM may be beside {disk}" in cli("recover", monitor=qmp).err
    for words in (["list"], ["show", "gold"]):
        assert "cannot be seen from here which snapshots are protected" in cli(*words, monitor=qmp).err
    assert tags(disk) == names
    far.assert_running()
    cli("save", "new", monitor=qmp)
    config = tmp_path / "config.toml"
    config.write_text("[defaults]\nignore-unseen = true\n")
    assert "cannot be seen" not in cli(*prune, "--config", str(config), monitor=qmp).err
    cli("delete", "new", "--ignore-unseen", monitor=qmp)
    assert tags(disk) == [names[0], names[2]]

    # Somebody comes who sees them
    assert "cannot be seen" not in cli("recover", monitor=far.address).err + cli("recover", monitor=qmp).err
    for monitor in qmp, human:
        assert "is protected" in cli("delete", "gold", monitor=monitor, expect=6).err
    cli("unprotect", "gold", monitor=far.address)
    cli("save", "gold", monitor=qmp)
    cli("delete", "gold", monitor=human)
    assert tags(disk) == [names[2]]


def forget_marks(guest: Guest) -> None:
    for item in guest.qmp("qom-list", path="/objects"):
        if item["name"].startswith("qsnap-"):
            guest.qmp("object-del", id=item["name"])


def test_what_is_noted_of_one_is_not_told_of_another_of_the_same_moment(guest: Guest) -> None:
    """The clock of a guest that stands still is the same in both."""
    guest.qmp("stop")
    for tag in ("a", "b"):
        cli("save", tag, monitor=guest.address)
    cli("protect", "b", monitor=guest.address)
    listed = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert {one["tag"]: one["protected"] for one in listed} == {"a": False, "b": True}
    cli("delete", "a", monitor=guest.address)


def test_marks_go_by_the_notes(far: Guest, tmp_path: Path) -> None:
    """Whoever removes the file takes the protection away, as soon as a qsnap comes that sees it."""
    cli("save", "a", monitor=far.address)
    notes = tmp_path / "disk0.qcow2.qsnap-notes"
    cli("protect", "a", monitor=far.address)
    notes.unlink()
    cli("recover", monitor=far.address)
    cli("delete", "a", monitor=addresses(far)[0])
    assert tags(tmp_path / "disk0.qcow2") == []


def marks(guest: Guest) -> list[str]:
    """Those of protected snapshots, as QEMU tells without qsnap."""
    names = [item["name"] for item in guest.qmp("qom-list", path="/objects")]
    return [name for name in names if name.startswith(PROTECTED)]


def test_marks_for_notes_that_lay_elsewhere(far: Guest, tmp_path: Path) -> None:
    """The image was renamed since, and the notes with it; who takes the protection away takes those marks away, too."""
    cli("save", "a", monitor=far.address)
    cli("protect", "a", monitor=far.address)
    for name in ("disk0.qcow2", "disk0.qcow2.qsnap-notes"):
        (tmp_path / name).rename(tmp_path / name.replace("disk0", "new"))
    cli("unprotect", "a", monitor=far.address)
    assert marks(far) == []
    cli("delete", "a", monitor=addresses(far)[0])


def test_marks_of_what_is_gone_go_with_the_next_deletion(far: Guest, tmp_path: Path) -> None:
    """As the notes do."""
    for tag in ("a", "b"):
        cli("save", tag, monitor=far.address)
    cli("protect", "a", monitor=far.address)
    assert len(marks(far)) == 1
    assert far.qmp.hmp("delvm a") == ""
    cli("delete", "b", monitor=far.address)
    assert marks(far) == []
    assert not (tmp_path / "disk0.qcow2.qsnap-notes").exists()


def holding(directory: Path) -> tuple[list[str], list[str]]:
    """The files in a directory, and the tags of the disk in it."""
    return sorted(path.name for path in directory.iterdir()), tags(directory / "disk0.qcow2")


async def test_what_another_user_may_not_see(launch: Launch, open_directory: Path) -> None:
    """Neither the notes, nor a state file, nor the directory: nothing goes that may be protected or be part of it."""
    directory = open_directory
    disk = make_boot_disk(directory / "disk0.qcow2")
    guest = launch(*blockdev("disk0", disk), *disk_device("disk0", id="vd0"))
    guest.wait_for_ticks(3)
    cli("save", "full", monitor=guest.address)
    is_live = qemu_version() >= (6, 0)
    cli("save", *(["--live"] if is_live else []), "ram", monitor=guest.address)
    cli("describe", "full", "text", monitor=guest.address)
    before = holding(directory)
    forget_marks(guest)
    notes, state = directory / "disk0.qcow2.qsnap-notes", directory / "disk0.qcow2.ram.qsnap"
    async with qsnap.connect(guest.address) as vm:
        for hidden, tag, code in (
            (notes, "full", "unseen-notes"),
            *([(state, "ram", "state-file-unreadable")] if is_live else []),
            (directory, "ram", "unseen-notes"),
        ):
            mode = hidden.stat().st_mode & 0o777
            hidden.chmod(0)
            try:
                with as_nobody(), pytest.raises(PrecheckRefused) as refused:
                    await do_delvm(Run(vm._monitor, StateStore(guest.pid)), DeleteRequest(tags=(tag,)))
                assert refused.value.findings[0].code == code
                inventory = await look(vm._monitor, StateStore(guest.pid))
                if hidden == notes:
                    with as_nobody(), pytest.raises(QsnapError, match="Permission denied; a snapshot may be prot"):
                        inventory.notes.write(notes, (), ())
                if hidden == state:
                    with as_nobody():
                        ram = inventory.find("ram")
                        assert ram is not None
                        with pytest.raises(PrecheckRefused, match="may not be read by this user"):
                            await plan_load(Run(vm._monitor, StateStore(guest.pid)), "ram")
                    assert (ram.kind, ram.has_state) == ("live", True)
                    assert ram.problems == (f"its state file {state} may not be read by this user",)
            finally:
                hidden.chmod(mode)
        assert holding(directory) == before
        guest.assert_running()
        await vm.delete("full", "ram")
    assert holding(directory) == (["disk0.qcow2"], [])


@pytest.mark.skipif(qemu_version() < (6, 0), reason="QEMU before 6.0 has no background snapshots")
async def test_a_state_file_that_cannot_be_removed(
    launch: Launch, open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a snapshot is of no use, so nothing goes. Where that shows too late, it is said what has become of it."""
    disk, names = make_boot_disk(open_directory / "disk0.qcow2"), ("a", "b", "n-20260101T000000", "c")
    guest = launch(*blockdev("disk0", disk), *disk_device("disk0", id="vd0"))
    guest.wait_for_ticks(3)
    for tag in names:
        cli("save", "--live", tag, monitor=guest.address)
    files = {tag: open_directory / f"disk0.qcow2.{tag}.qsnap" for tag in names}
    for file in files.values():
        file.chmod(0o644)
    before = holding(open_directory)
    async with qsnap.connect(guest.address) as vm:
        run = Run(vm._monitor, StateStore(guest.pid))
        safe = SaveRequest("a", on_exists=OnExists.SAFE)
        open_directory.chmod(0o555)  # noqa: ASYNC240 (at once)
        await asyncio.to_thread(holding, open_directory)  # the other user cannot import what that takes
        for deed in (
            lambda: do_delvm(run, DeleteRequest(tags=("a",))),
            lambda: do_prune(run, PruneRequest("n", Policy(), allow_remove_all=True)),
            lambda: do_savevm(run, SaveRequest("a")),
            lambda: do_savevm(run, safe),
        ):
            with as_nobody(), pytest.raises(PrecheckRefused) as refused:
                await deed()
            assert [finding.code for finding in refused.value.findings] == ["state-file-stays"]
            assert f"{open_directory} cannot be written by this user" in str(refused.value)
            assert holding(open_directory) == before
        assert all(event["event"] not in ("STOP", "RESUME") for event in guest.qmp.events[-4:])

        # What cannot be foreseen
        monkeypatch.setattr("qsnap.host.files.obstacle_to_removal", lambda _: "")
        with as_nobody(), pytest.raises(JobFailed) as failed:
            await do_delvm(run, DeleteRequest(tags=("b",)))
        assert str(failed.value) == (
            f"unlink failed: the state file {files['b']} cannot be removed: Permission denied; its disks' snapshots "
            "are gone; the guest is running. Remove the file by hand"
        )
        with as_nobody():
            saved = await do_savevm(run, safe)
        assert [(one.code, one.cure) for one in saved.warnings] == [("replaced-left", "remove the file by hand")]
        assert f"{files['a']} cannot be removed: Permission denied" in saved.warnings[0].message
        open_directory.chmod(0o755)  # noqa: ASYNC240

        def refuse(path: Path) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

        with monkeypatch.context() as patched:
            patched.setattr("qsnap.host.bulk_io.remove", refuse)
            live = await vm.save("c", live=True)
        assert [finding.code for finding in live.warnings] == ["replaced-left"]
        assert {one.tag: one.kind for one in await vm.list()} == {
            "a": "full", "a.qsnap-2": "state-only", "b": "state-only", names[2]: "live",
            "c": "live", "c.qsnap-2": "state-only",
        }  # fmt: skip
        for tag in "ac":
            await vm.load(tag)
            guest.assert_running()
        await vm.delete(*names)
    assert holding(open_directory) == (["disk0.qcow2"], [])
    guest.assert_running()


@pytest.mark.skipif(qemu_version() < (6, 0), reason="QEMU before 6.0 has no background snapshots")
def test_a_directory_that_this_call_does_not_know(far: Guest, tmp_path: Path) -> None:
    """The notes tell where the RAM is, and protection holds under whatever name the disks have the snapshot."""
    states = tmp_path / "states"
    states.mkdir()
    where = ("--state-dir", str(states))
    for _ in range(2):
        cli("save", "--live", "t", *where, monitor=far.address)
    disk = tmp_path / "disk0.qcow2"
    assert tags(disk) == ["t.qsnap-2"]
    cli("save", "other", monitor=far.address)
    for tag in ("t", "t.qsnap-2"):
        (finding,) = cli("delete", tag, "--json", monitor=far.address, expect=6).error["findings"]
        assert (finding["code"], str(states) in finding["cure"]) == ("unseen-state-file", True)
    assert f"its state file was put into {states}" in cli("list", "--json", monitor=far.address).out
    cli("protect", "t", *where, monitor=far.address)
    cli("describe", "other", "text", monitor=far.address)
    cli("delete", "other", monitor=far.address)
    for command in (("delete", "t"), ("delete", "t.qsnap-2"), ("save", "t")):
        for more in ((), ("--ignore-unseen",)):
            assert "is protected" in cli(*command, *more, monitor=far.address, expect=6).err
    assert (tags(disk), len(list(states.iterdir()))) == (["t.qsnap-2"], 1)
    cli("unprotect", "t", *where, monitor=far.address)
    cli("delete", "t", *where, monitor=far.address)
    assert (tags(disk), list(states.iterdir())) == ([], [])
    assert not (tmp_path / "disk0.qcow2.qsnap-notes").exists()


def test_a_directory_that_may_not_be_listed(open_directory: Path) -> None:
    """State files are found there by their names; where not even that is possible, they may be there."""
    image = open_directory / "disk0"
    path = written(open_directory / "disk0.t.qsnap", Content("t", str(image), 9, DATE, 7))
    image.touch()
    for file in image, path:
        file.chmod(0o644)
    row = NodeSnapshot(tag="t", id="1", vm_state_size=0, date=DATE, vm_clock_ns=7)
    disk = node("a", snapshots=(row,), children=(("file", "below"),))
    both = graph_of(disk, node("below", "file", filename=str(image)))
    devices, store = survey(both).devices, StateStore(os.getpid())
    far = graph_of(node("far", children=(("file", "net"),)), node("net", "nbd"))
    assert store.unseen(far, survey(far).devices) == ("far",), "it has no file name, and is named nevertheless"
    with image.open("rb"):
        for mode, seen in (0o755, ["t"]), (0o711, ["t"]), (0, []):
            open_directory.chmod(mode)
            with as_nobody():
                assert [file.disk_tag for file in store.files(both, devices)] == seen, oct(mode)
                assert bool(store.unseen(both, devices)) is not bool(seen)
        open_directory.chmod(0o755)
        # Through a link it would be somebody else's
        path.rename(open_directory / "else")
        path.symlink_to(open_directory / "else")
        (link,) = store.files(both, devices)
        assert (link.is_link, link.is_whole, link.vm_state_size) == (True, False, 0), "nothing of it is read"


async def test_the_marks_are_asked_for_once(far: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else changes them under the claim; what a command itself has changed it knows."""
    for tag in ("a", "n-20260101T000000", "n-20260102T000000"):
        cli("save", tag, monitor=far.address)
    asked: list[tuple[str, ...]] = []
    async with qsnap.connect(far.address) as vm:
        ask = vm._monitor.marks

        async def counted(prefixes: tuple[str, ...]) -> Sequence[str]:
            asked.append(prefixes)
            return await ask(prefixes)

        monkeypatch.setattr(vm._monitor, "marks", counted)
        for deed in (
            lambda: vm.note("a", protected=True, description="x"),
            lambda: vm.note("a", protected=False),
            lambda: vm.delete("a"),
            lambda: vm.prune("n", Policy(last=1)),
        ):
            await deed()
            assert asked.count((PROTECTED, NOTED, HERE)) == 1
            asked.clear()
        assert len(await ask((PROTECTED,))) == 0
        assert [one.tag for one in await vm.list()] == ["n-20260102T000000"]


async def test_notes_lie_beside_the_image_whatever_directory_was_chosen(guest: Guest, tmp_path: Path) -> None:
    """So whoever names no directory, or another one, finds them."""
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    async with qsnap.connect(guest.address, state_dir=chosen) as vm:
        await vm.save("t", description="before")
    assert [*chosen.iterdir()] == []
    async with qsnap.connect(guest.address) as vm:
        assert [one.description for one in await vm.list()] == ["before"]
