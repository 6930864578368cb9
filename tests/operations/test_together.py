"""Several VMs at one moment: what they know of each other after a load, and that all of it is done, or nothing."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qsnap
from qsnap.errors import BadUsage, PrecheckRefused
from qsnap.inventory.state_store import PART_SUFFIX
from qsnap.tags import SECOND_SUFFIX
from support.guest import (
    Launch,
    Run,
    assert_nothing_left,
    blockdev,
    cli,
    deliver,
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
from support.instep import Pair, apart, round_trip
from support.killed import marks, wait_for_the_guard
from support.proxy import Intercept, deed
from support.terminal import on_terminal

NAMES = ("a", "b", "c")


@pytest.fixture
def pair(launch: Launch, tmp_path: Path) -> Iterator[Pair]:
    two = Pair(launch, tmp_path)
    yield two
    two.close()


#: Before 6.0 QEMU has no live saves.
WAYS = [pytest.param([], id="ordinary"), pytest.param(["--live"], id="live", marks=needs_snapshot_jobs)]


@pytest.mark.parametrize("how", WAYS)
def test_neither_has_seen_what_the_other_has_not_sent(pair: Pair, how: list[str]) -> None:
    for number in range(3):
        assert round_trip(pair, f"t{number}", *how) == []


def test_two_saves_by_themselves_are_of_two_moments(pair: Pair) -> None:
    """The control: what is found nothing of above is found here."""
    assert apart(pair, "t") != []


class Trio:
    """Three counting guests, each with an image of its own, and a config file with their names.

    :ivar addresses: where qsnap finds each; a test may put a proxy there.
    :ivar settings: what else the config file says of each.
    """

    def __init__(self, launch: Launch, directory: Path) -> None:
        self._directory = directory
        self.images = {name: make_boot_disk(directory / f"{name}.qcow2") for name in NAMES}
        self.guests = {name: launch(*self.drive(name), *disk_device("d0")) for name in NAMES}
        self.addresses = {name: guest.address for name, guest in self.guests.items()}
        self.settings = ""

    def drive(self, name: str) -> list[str]:
        return blockdev("d0", self.images[name])

    def start(self, *args: str, code: str = "") -> subprocess.Popen[str]:
        """qsnap with all three, not yet finished; *code* runs it another way."""
        return start_cli(*args, *self._vms(NAMES), env=self._environment(), code=code)

    def __call__(self, *args: str, names: tuple[str, ...] = NAMES, expect: int = 0) -> Run:
        return cli(*args, *self._vms(names), expect=expect, env=self._environment())

    def on_terminal(self, *args: str) -> str:
        """What qsnap shows there of all three."""
        return on_terminal(*args, *self._vms(NAMES), env=self._environment())

    def _vms(self, names: tuple[str, ...]) -> list[str]:
        return [word for name in names for word in ("--vm", name)]

    def _environment(self) -> dict[str, str]:
        config = self._directory / "config.toml"
        vms = (f'[vm.{name}]\nmonitor = "{at}"\n{self.settings}' for name, at in self.addresses.items())
        config.write_text("".join(vms))
        return {"QSNAP_CONFIG": str(config)}

    def assert_all_run(self, expected: list[str]) -> None:
        """Every guest runs with its contents as they were, and holds those snapshots, and nothing else is left."""
        for name, guest in self.guests.items():
            assert_nothing_left(guest, {self.images[name]: expected})
            assert marks(guest) == []

    def stops(self) -> int:
        """How often any guest was stopped so far."""
        for guest in self.guests.values():
            guest.qmp("query-status")  # what came before is read with its answer
        return sum(event["event"] == "STOP" for guest in self.guests.values() for event in guest.qmp.events)


@pytest.fixture
def trio(launch: Launch, tmp_path: Path) -> Trio:
    return Trio(launch, tmp_path)


def test_all_are_saved_and_loaded(trio: Trio) -> None:
    saved = trio("save", "t", "--together", "--json").json
    assert [one["exit_code"] for one in saved["vms"]] == [0, 0, 0]
    assert saved["stop_spread_ms"] < min(one["result"]["pause_ms"] for one in saved["vms"])
    trio.assert_all_run(["t"])
    counts = {name: guest.wait_for_ticks(30) for name, guest in trio.guests.items()}
    loaded = trio("load", "t", "--together", "--json").json
    assert loaded["resume_spread_ms"] >= 0
    assert all(guest.counter < counts[name] for name, guest in trio.guests.items())
    trio.assert_all_run(["t"])


def test_the_parts_know_each_other(trio: Trio) -> None:
    assert trio("save", "--together", "--prefix", "p").out.count("saved p-") == 3
    listed = trio("list").out
    assert [words in listed for words in ("with b, c", "with a, c", "with a, b")] == [True] * 3
    parts = [
        one["snapshots"][0]["together"]
        for one in (cli("list", "--json", monitor=at).json for at in trio.addresses.values())
    ]
    assert len({part["id"] for part in parts}) == 1
    assert [part["vms"] for part in parts] == [["b", "c"], ["a", "c"], ["a", "b"]]


def test_all_are_checked_before_one_is_touched(trio: Trio, launch: Launch, tmp_path: Path) -> None:
    """One VM has a disk that cannot have snapshots."""
    raw = make_disk(tmp_path / "raw", driver="raw")
    trio.guests["b"].quit()
    trio.guests["b"] = launch(*trio.drive("b"), *disk_device("d0"), *blockdev("r", raw, "raw"), *disk_device("r", 1))
    trio.addresses["b"] = trio.guests["b"].address
    run = trio("save", "t", "--together", "--json", expect=6)
    errors = {one["vm"]: one["error"] for one in run.json["vms"]}
    assert [error["error"] for error in errors.values()] == ["Abandoned", "PrecheckRefused", "Abandoned"]
    assert "because b has failed" in errors["a"]["message"]
    assert trio.stops() == 0
    trio.assert_all_run([])


@pytest.mark.parametrize("how", [[], ["--together"]])
def test_two_that_fail_differently(trio: Trio, launch: Launch, tmp_path: Path, how: list[str]) -> None:
    """That exits with 3, also where nothing was done."""
    trio("save", "t", names=("a",))
    raw = make_disk(tmp_path / "raw", driver="raw")
    trio.guests["b"].quit()
    trio.guests["b"] = launch(*trio.drive("b"), *disk_device("d0"), *blockdev("r", raw, "raw"), *disk_device("r", 1))
    trio.addresses["b"] = trio.guests["b"].address
    run = trio("save", "t", "--no-replace", "--json", *how, names=("a", "b"), expect=3)
    assert [one["exit_code"] for one in run.json["vms"]] == [8, 6]


def test_a_vm_that_is_not_there(trio: Trio) -> None:
    trio.guests["c"].quit()
    run = trio("save", "t", "--together", expect=4)
    assert "a: given up, because c has failed" in run.err
    del trio.guests["c"]
    assert trio.stops() == 0
    trio.assert_all_run([])


def test_if_one_write_fails_none_is_kept(launch: Launch, trio: Trio) -> None:
    """And what was to be replaced is as it was, on every VM."""
    trio("save", "t", "--together")
    trio.guests["b"].quit()
    fails = failing_disk("d0", trio.images["b"], "vmstate_save", 28)
    trio.guests["b"] = launch(*fails, *disk_device("d0"))
    trio.addresses["b"] = trio.guests["b"].address
    run = trio("save", "t", "--together", "--json", expect=9)
    assert [one["exit_code"] for one in run.json["vms"]] == [9, 9, 9]
    trio.assert_all_run(["t"])
    trio("load", "t", "--together")


class Holder:
    """Holds one VM's command back until it is told to let it pass."""

    def __init__(self, trio: Trio, intercept: Intercept, name: str, command: str) -> None:
        self.has_come = threading.Event()
        self.may_pass = threading.Event()

        def hold(message: dict[str, Any]) -> None:
            if deed(message) == command:
                self.has_come.set()
                self.may_pass.wait(60)

        trio.addresses[name] = intercept(trio.guests[name], on_command=hold).address

    def wait(self) -> None:
        assert self.has_come.wait(30)


@needs_snapshot_jobs
def test_a_live_save_that_fails_is_not_made_the_ordinary_way(trio: Trio, intercept: Intercept, tmp_path: Path) -> None:
    """That would be of another moment: the others have gone on."""
    holder = Holder(trio, intercept, "b", "transaction")
    states = tmp_path / "states"
    states.mkdir()
    process = trio.start("save", "t", "--together", "--live=auto", "--state-dir", str(states))
    holder.wait()
    (part,) = states.glob(f"b.*{PART_SUFFIX}")
    taken = part.with_suffix(".qsnap")
    taken.write_text("mine")
    holder.may_pass.set()
    assert "another file has come to be" in finish(process).err
    trio.assert_all_run([])
    assert taken.read_text() == "mine"


@needs_snapshot_jobs
def test_no_guest_is_stopped_before_all_can_be(trio: Trio, intercept: Intercept, tmp_path: Path) -> None:
    """What one VM has to prepare lengthens no other one's pause."""
    holder = Holder(trio, intercept, "b", "migrate-set-parameters")
    process = trio.start("save", "t", "--together", "--live", "--state-dir", str(tmp_path))
    holder.wait()
    for name in "ac":
        trio.guests[name].wait_for_ticks(10)
    assert trio.stops() == 0
    holder.may_pass.set()
    assert finish(process).code == 0
    trio.assert_all_run(["t"])


@pytest.mark.parametrize("how", WAYS)
def test_no_guest_runs_on_before_all_are_stopped(
    trio: Trio, intercept: Intercept, tmp_path: Path, how: list[str]
) -> None:
    holder = Holder(trio, intercept, "b", "stop")
    process = trio.start("save", "t", "--together", "--state-dir", str(tmp_path), *how)
    holder.wait()
    until("the others to be stopped", lambda: {trio.guests[name].runstate for name in "ac"} == {"paused"})
    assert trio.guests["b"].runstate == "running"
    reached = trio.guests["a"].counter
    trio.guests["b"].wait_for_ticks(10)
    assert trio.guests["a"].counter == reached
    assert {name: tags(trio.images[name]) for name in NAMES} == {name: [] for name in NAMES}
    holder.may_pass.set()
    assert finish(process).code == 0
    trio.assert_all_run(["t"])


def test_all_run_on_at_the_same_time(trio: Trio, intercept: Intercept) -> None:
    """A cluster does not miss one member while the others run."""
    holder = Holder(trio, intercept, "c", "snapshot-save")
    process = trio.start("save", "t", "--together")
    holder.wait()
    until("the others to have written", lambda: [tags(trio.images[name]) for name in "ab"] == [["t"], ["t"]])
    reached = [trio.guests[name].counter for name in "ab"]
    assert [trio.guests[name].runstate for name in "ab"] == ["paused", "paused"]
    holder.may_pass.set()
    assert finish(process).code == 0
    assert all(trio.guests[name].counter >= then for name, then in zip("ab", reached, strict=True))
    trio.assert_all_run(["t"])


#: Where it is stopped: what is given next, and whether the common decision was made by then.
MOMENTS = [
    ("stop", [], False),
    ("snapshot-save", [], False),
    ("cont", [], False),
    ("snapshot-delete", [], True),
    pytest.param("transaction", ["--live"], False, marks=needs_snapshot_jobs),
    pytest.param("snapshot-delete", ["--live"], True, marks=needs_snapshot_jobs),
]


@pytest.mark.parametrize(("command", "how", "is_decided"), MOMENTS)
def test_killed(
    trio: Trio,
    intercept: Intercept,
    tmp_path: Path,
    runtime_directory: Path,
    command: str,
    how: list[str],
    is_decided: bool,
) -> None:
    """The guards finish it: all VMs have the new snapshot, or all have the older one."""
    trio("save", "t", "--together", "--state-dir", str(tmp_path), *how)
    dates = {name: snapshot_dates(trio, name) for name in NAMES}
    for guest in trio.guests.values():
        guest.wait_for_ticks(60)  # another second
    holder = Holder(trio, intercept, "b", command)
    process = trio.start("save", "t", "--together", "--ignore-unseen", "--state-dir", str(tmp_path), *how)
    holder.wait()
    if how and not is_decided:
        until("the others' state files to be complete", lambda: len(list(tmp_path.glob("*.qsnap"))) == 5)
    process.kill()
    process.wait(30)
    holder.may_pass.set()
    finish(process)
    wait_for_the_guard(runtime_directory)
    for name, guest in trio.guests.items():
        assert_nothing_left(guest, {trio.images[name]: tags(trio.images[name])})
        assert marks(guest) == []
        assert len(tags(trio.images[name])) == 1
    states = [path for path in tmp_path.iterdir() if path.suffix in (".qsnap", PART_SUFFIX)]
    assert len(states) == (3 if how else 0)
    assert list(runtime_directory.iterdir()) == []
    assert [snapshot_dates(trio, name) != dates[name] for name in NAMES] == [is_decided] * 3


#: qsnap, which is killed as soon as the common decision is made.
KILLED = """
import os, signal, sys
from qsnap.runs import runtime_dir
def decide(group, decide=runtime_dir.decide):
    decide(group)
    os.kill(os.getpid(), signal.SIGKILL)
runtime_dir.decide = decide
from qsnap.__main__ import main
main()
"""


@pytest.mark.parametrize("arguments", [["save", "t"], ["delete", "t"]], ids=["save", "delete"])
def test_killed_when_it_is_decided(trio: Trio, runtime_directory: Path, arguments: list[str]) -> None:
    """Nothing of it shows yet but the decision: all guards go by that."""
    trio("save", "t", "--together")
    dates = {name: snapshot_dates(trio, name) for name in NAMES}
    for guest in trio.guests.values():
        guest.wait_for_ticks(60)  # another second
    process = trio.start(*arguments, "--together", code=KILLED)
    assert finish(process).code == -signal.SIGKILL
    (runtime_directory / "0123456789abcdef.decided").touch()  # of a group that is long gone
    wait_for_the_guard(runtime_directory)
    if arguments[0] == "delete":
        trio.assert_all_run([])
        return
    trio.assert_all_run([f"t{SECOND_SUFFIX}"])
    assert all(snapshot_dates(trio, name) != dates[name] for name in NAMES)
    trio("load", "t", "--together")


def test_killed_before_a_load_begins(trio: Trio, runtime_directory: Path) -> None:
    """The guards do not go on with a load that had not begun. Every guest runs on, and the next list says so."""
    trio("save", "t", "--together")
    counts = {name: guest.wait_for_ticks(60) for name, guest in trio.guests.items()}
    assert finish(trio.start("load", "t", "--together", code=KILLED)).code == -signal.SIGKILL
    wait_for_the_guard(runtime_directory)
    assert list(runtime_directory.iterdir()) == []
    trio.assert_all_run(["t"])
    assert all(guest.counter > counts[name] for name, guest in trio.guests.items())
    listed = {one["vm"]: one["result"]["position"] for one in trio("list", "--json").json["vms"]}
    assert ["not completed" in listed[name]["unknown"] for name in NAMES] == [True] * 3
    shown = trio.on_terminal("list")
    assert [f"{name}: not known where the guest is: the last load" in shown for name in NAMES] == [True] * 3


def snapshot_dates(trio: Trio, name: str) -> list[str]:
    document = cli("list", "--json", monitor=trio.guests[name].address).json
    assert [one["tag"] for one in document["snapshots"]] == ["t"]
    return [one["date"] for one in document["snapshots"]]


@pytest.mark.parametrize("command", ["stop", "snapshot-save", "cont"])
def test_interrupted(trio: Trio, intercept: Intercept, command: str) -> None:
    holder = Holder(trio, intercept, "b", command)
    process = trio.start("save", "t", "--together")
    holder.wait()
    deliver(process, signal.SIGINT)
    holder.may_pass.set()
    run = finish(process)
    assert run.code == 130
    named = re.findall(r"; ((?:[abc], )*[abc]): ", run.err)
    assert sorted(", ".join(named).split(", ")) == [*NAMES], f"each is named once: {run.err}"
    trio.assert_all_run([])


def test_an_interrupt_lets_all_clear_up(trio: Trio, intercept: Intercept) -> None:
    """Saved at once, but not together: the one that takes longest undoes its save too, before qsnap ends."""
    holder = Holder(trio, intercept, "b", "snapshot-save")
    process = trio.start("save", "t", "--jobs", "3")
    holder.wait()
    until("the others to be done", lambda: [tags(trio.images[name]) for name in "ac"] == [["t"], ["t"]])
    deliver(process, signal.SIGINT)
    holder.may_pass.set()
    assert finish(process).code == 130
    assert tags(trio.images["b"]) == []
    trio.guests["b"].assert_running()
    assert [marks(guest) for guest in trio.guests.values()] == [[], [], []]


def test_a_qemu_that_ends_in_the_write(trio: Trio, intercept: Intercept) -> None:
    holder = Holder(trio, intercept, "a", "snapshot-save")
    process = trio.start("save", "t", "--together", "--json")
    holder.wait()
    trio.guests["b"].process.kill()
    trio.guests["b"].process.wait(30)
    holder.may_pass.set()
    run = finish(process)
    assert run.code == 4, run.out
    assert [one["exit_code"] for one in run.json["vms"]] == [4, 4, 4]
    del trio.guests["b"]
    trio.assert_all_run([])


def test_what_was_not_saved_together_is_not_loaded_together(trio: Trio) -> None:
    for name in NAMES:
        trio("save", "t", names=(name,))
    stops = trio.stops()
    run = trio("load", "t", "--together", expect=6)
    assert "would be loaded together with b, c" in run.err
    trio("save", "u", "--together")
    stops += 3
    assert "would be loaded together with b" in trio("load", "u", "--together", names=("a", "b"), expect=6).err
    assert trio.stops() == stops
    assert "saved together with b, c" in trio("load", "u", names=("a",)).err
    trio("load", "t", "--together", "--force")
    trio.assert_all_run(["t", "u"])


def test_a_load_that_one_vm_cannot_do_is_done_by_none(trio: Trio) -> None:
    trio("save", "t", "--together")
    trio("delete", "t", "--no-together", names=("b",))
    counts = {name: guest.wait_for_ticks(3) for name, guest in trio.guests.items()}
    stops = trio.stops()
    assert "given up, because b has failed" in trio("load", "t", "--together", expect=7).err
    assert trio.stops() == stops
    assert all(guest.counter >= counts[name] for name, guest in trio.guests.items())


def test_a_load_that_fails_midway_leaves_that_guest_stopped(trio: Trio, launch: Launch) -> None:
    """There is no way back by then, so the others are loaded, and run."""
    trio("save", "t", "--together")
    trio.guests["b"].quit()
    trio.guests["b"] = launch(*failing_disk("d0", trio.images["b"], "vmstate_load", 5, once=False), *disk_device("d0"))
    trio.addresses["b"] = trio.guests["b"].address
    counts = {name: trio.guests[name].wait_for_ticks(30) for name in "ac"}
    run = trio("load", "t", "--together", "--full", "--force", "--json", expect=20)
    assert [one["exit_code"] for one in run.json["vms"]] == [0, 20, 0]
    assert trio.guests["b"].runstate != "running"
    for name in "ac":
        assert trio.guests[name].counter < counts[name]
        trio.guests[name].assert_running()


def test_a_part_is_not_deleted_replaced_or_pruned_alone(trio: Trio) -> None:
    for _ in range(2):
        trio("save", "--prefix", "p", "--together")
    older, newer = tags(trio.images["a"])
    for arguments in (["delete", older], ["save", older], ["save", older, "--live=auto"]):
        assert "was saved together with b, c" in trio(*arguments, names=("a",), expect=6).err
    pruned = trio("prune", "--prefix", "p", "--keep-last", "1", "--json", names=("a",)).json
    assert [one["reasons"] for one in pruned["keep"]] == [["last snapshot"], ["together with b, c"]]
    assert "was saved together with" in trio("delete", older, "--together", names=("a", "b"), expect=6).err
    trio.assert_all_run([older, newer])
    trio("prune", "--prefix", "p", "--keep-last", "1", "--together")
    trio.assert_all_run([newer])
    trio("delete", newer, "--together")
    trio.assert_all_run([])


def test_a_part_of_a_vm_that_is_off(trio: Trio, launch: Launch) -> None:
    trio("save", "t", "--together")
    trio.guests.pop("b").quit()
    image = ("--image", str(trio.images["b"]))
    assert "was saved together with a, c" in cli("delete", "t", *image, expect=6).err
    cli("delete", "t", "--together", *image, expect=2)
    assert tags(trio.images["b"]) == ["t"]
    cli("delete", "t", "--no-together", *image)
    assert tags(trio.images["b"]) == []
    trio.guests["b"] = launch(*trio.drive("b"), *disk_device("d0"))
    trio.addresses["b"] = trio.guests["b"].address
    assert "--missing-ok deletes it on the other VMs" in trio("delete", "t", "--together", expect=7).err
    trio("delete", "t", "--together", "--missing-ok")
    trio.assert_all_run([])


def test_one_vm_twice_is_not_several(trio: Trio, tmp_path: Path) -> None:
    assert "--together is for several VMs" in trio("save", "t", "--together", names=("a", "a"), expect=2).err
    trio.addresses["d"] = trio.addresses["a"]
    assert "a and d are one VM" in trio("save", "t", "--together", names=("a", "d"), expect=2).err
    into = str(tmp_path / "into")
    assert "one at a time" in trio("export", "t", into, names=("a", "b"), expect=2).err
    trio.assert_all_run([])


def test_prune_keeps_the_whole_if_one_vm_keeps_its_part(trio: Trio) -> None:
    for _ in range(2):
        trio("save", "--prefix", "p", "--together")
    older, newer = tags(trio.images["a"])
    trio("protect", older, names=("b",))
    assert "would save" not in trio("save", older, "--together", "-n", expect=6).out
    pruned = trio("prune", "--prefix", "p", "--keep-last", "1", "--together", "--json").json
    reasons = [one["result"]["keep"][1]["reasons"] for one in pruned["vms"]]
    assert reasons == [["kept on another VM"], ["protected"], ["kept on another VM"]]
    trio.assert_all_run([older, newer])


def test_remains_can_be_pruned(trio: Trio) -> None:
    """One VM has lost its part: that is no reason to keep the others for ever."""
    for _ in range(2):
        trio("save", "--prefix", "p", "--together")
    older, newer = tags(trio.images["a"])
    trio("delete", older, "--no-together", names=("b",))
    trio("prune", "--prefix", "p", "--keep-last", "1", "--together")
    trio.assert_all_run([newer])


#: What is given next, and what is left.
DELETIONS = [("query-named-block-nodes", ["t", "u"]), ("snapshot-delete", [])]


@pytest.mark.parametrize(("command", "left"), DELETIONS, ids=["not decided", "decided"])
def test_killed_in_a_delete(
    trio: Trio, intercept: Intercept, runtime_directory: Path, command: str, left: list[str]
) -> None:
    """Once it is decided, the guards delete the rest, everywhere. Before, nothing is deleted."""
    for tag in ("t", "u"):
        trio("save", tag, "--together")
    holder = Holder(trio, intercept, "b", command)
    process = trio.start("delete", "t", "u", "--together", "--ignore-unseen")
    holder.wait()
    process.kill()
    process.wait(30)
    holder.may_pass.set()
    finish(process)
    wait_for_the_guard(runtime_directory)
    trio.assert_all_run(left)


def test_the_config_file_has_the_present_saved_first(trio: Trio) -> None:
    """That is not done together, so nothing is discarded without a word."""
    trio("save", "t", "--together")
    stops = trio.stops()
    trio.settings = "save-current = true\n"
    assert "load with --no-save-current" in trio("load", "t", "--together", expect=2).err
    assert trio.stops() == stops
    trio("load", "t", "--together", "--no-save-current")
    trio.assert_all_run(["t"])


def test_nothing_is_done(trio: Trio) -> None:
    out = trio("save", "t", "--together", "-n").out
    assert out.count("would save t") == 3
    assert "--together is for several VMs" in cli("save", "t", "--together", monitor=trio.addresses["a"], expect=2).err
    trio.addresses["b"] = str(trio.guests["a"].qmp_address)
    trio.addresses["c"] = str(trio.guests["a"].hmp_address)
    assert "b and c are one VM" in trio("save", "t", "--together", names=("b", "c"), expect=2).err
    assert trio.stops() == 0


def test_over_other_monitors_too(trio: Trio) -> None:
    """One VM by its human monitor: no jobs, and another way to save and to load."""
    trio.addresses["b"] = trio.guests["b"].hmp_address
    trio("save", "t", "--together")
    counts = {name: guest.wait_for_ticks(30) for name, guest in trio.guests.items()}
    trio("load", "t", "--together")
    assert all(guest.counter < counts[name] for name, guest in trio.guests.items())
    trio.assert_all_run(["t"])
    trio("delete", "t", "--together")
    trio.assert_all_run([])


def test_two_groups_that_share_vms_do_not_wait_for_each_other(trio: Trio, intercept: Intercept) -> None:
    """All claim in one order: the first one, kept from its first claim, has none of what the second one needs."""
    by_hmp = {name: guest.hmp_address for name, guest in trio.guests.items()}
    holder = Holder(trio, intercept, "a", "object-add")  # by the names of the images it is the first
    first = trio.start("save", "t", "--together", "--lock-wait", "30")
    holder.wait()
    trio.addresses = by_hmp
    trio("save", "u", "--together")
    holder.may_pass.set()
    run = finish(first)
    assert run.code == 0, run.err
    trio.assert_all_run(["u", "t"])


async def test_the_library(trio: Trio) -> None:
    async with (
        qsnap.connect(trio.addresses["a"]) as a,
        qsnap.connect(trio.addresses["b"]) as b,
        qsnap.connect(trio.addresses["c"]) as c,
    ):
        vms = {"a": a, "b": b, "c": c}
        done = await qsnap.together(vms, lambda vm: vm.save("t"))
        assert {name: result.tag for name, result in done.results.items()} == dict.fromkeys(NAMES, "t")
        assert done.stop_spread_ms is not None
        await b.delete("t", alone=True)
        with pytest.raises(PrecheckRefused, match="would be loaded together with") as refused:
            await qsnap.together({"a": a, "c": c}, lambda vm: vm.load("t"))
        assert refused.value.vm in ("a", "c")

        async def twice(vm: qsnap.VM) -> None:
            await vm.delete("t", alone=True)
            await vm.save("t")

        with pytest.raises(BadUsage, match="one operation"):
            await qsnap.together({"a": a, "c": c}, twice)
        await qsnap.together({"a": a}, lambda vm: vm.save("alone"))
        assert [one.together for one in await a.list()] == [None], "one VM is not a group"
        await a.delete("alone")
    trio.assert_all_run([])
