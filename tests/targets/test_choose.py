"""Which VM is meant: the rules, and then the command line on real QEMUs, seen through a /proc of the tests' own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest

from qsnap.errors import BadUsage, NoVM
from qsnap.monitor.address import UnixAddress
from qsnap.targets.choose import SeveralVMs, Target, choose, known_vms, reason
from qsnap.targets.config import Config, Settings, parse
from qsnap.targets.running import running_vms
from qsnap.targets.vms import MonitorPoint, MonitorState, RunningVM
from support.fake_proc import BARE, IS_ROOT, NOBODY, Machine, qmp
from support.guest import QEMU, make_disk, needs_snapshot_jobs, until
from support.terminal import on_terminal

#: One after another: a QEMU whose socket has the same relative path makes another one's state uncertain.
pytestmark = pytest.mark.xdist_group("machine")

NONE = Config()


def at(path: str, state: str = "free", protocol: str = "qmp") -> MonitorPoint:
    return MonitorPoint(protocol=protocol, address=UnixAddress(path), state=MonitorState(state))  # type: ignore[arg-type]


def vm(pid: int, name: str | None, *monitors: MonitorPoint, uid: int | None = None) -> RunningVM:
    return RunningVM(pid=pid, uid=os.geteuid() if uid is None else uid, user="u", name=name, monitors=monitors)


def configured(text: str) -> Config:
    return parse(text, Path("/etc/c.toml"))


WEB, DB = vm(7, "web", at("/web")), vm(8, "db", at("/db"))


def chosen(
    *running: RunningVM, config: Config = NONE, monitor: str | None = None, wanted: str | None = None
) -> tuple[str, int | None, bool]:
    """Address, pid, and whether it was taken unasked."""
    target = choose(config, lambda: running, monitor=monitor, vm=wanted)
    return str(target.address), target.pid, target.was_guessed


def test_an_address_needs_no_look() -> None:
    def look() -> tuple[RunningVM, ...]:
        raise AssertionError

    assert choose(NONE, look, monitor="/m") == Target(UnixAddress("/m"), Settings())
    config = configured("default-vm='x'\n[vm.x]\nmonitor='/x'\ntimeout=5")
    assert (
        choose(config, look)
        == choose(config, look, vm="x")
        == Target(UnixAddress("/x"), Settings(timeout=5), selector="x")
    )
    assert choose(config, look, monitor="/x").settings == Settings(timeout=5), "it is the same VM"
    assert choose(config, look, monitor="/y").settings == Settings()
    with pytest.raises(BadUsage, match="not both"):
        choose(config, look, monitor="/x", vm="x")


def test_by_name_pid_and_uuid() -> None:
    other = msgspec.structs.replace(DB, uuid="AB-1")
    for wanted in ("db", "8", "ab-1"):
        assert chosen(WEB, other, wanted=wanted) == ("unix:/db", 8, False)
    drill = msgspec.structs.replace(vm(9, None), uuid="AB-1")
    assert chosen(other, drill, wanted="ab-1") == ("unix:/db", 8, False), "a copy without a monitor is not meant"
    with pytest.raises(NoVM, match=r"no VM 'x' is running, by -name, pid or UUID \(known: web, db\)"):
        chosen(WEB, DB, wanted="x")
    with pytest.raises(SeveralVMs) as error:
        chosen(WEB, vm(9, "web", at("/other")), DB, wanted="web")
    assert [(known.selector, known.option) for known in error.value.vms] == [("7", "--vm 7"), ("9", "--vm 9")]


def test_the_only_one() -> None:
    assert chosen(WEB) == ("unix:/web", 7, True)
    assert chosen(vm(7, None, at("/q", "busy"))) == ("unix:/q", 7, True), "whoever is connected may be about to leave"
    others = (vm(9, "other", at("/other"), uid=12345), vm(10, "mute"), vm(11, "gone", at("/gone", "gone")))
    assert chosen(WEB, *others) == ("unix:/web", 7, True)
    with pytest.raises(SeveralVMs, match="2 VMs are running") as error:
        chosen(WEB, DB, *others)
    assert [known.option for known in error.value.vms] == ["--vm web", "--vm db"]


def test_none_at_all() -> None:
    with pytest.raises(NoVM) as error:
        chosen(
            vm(9, "other", at("/other"), uid=12345), vm(10, "mute"), vm(11, None, at("/gone", "gone")),
            config=configured("[vm.x]\nmonitor='/x'\n[vm.y]"),
        )  # fmt: skip
    assert str(error.value).splitlines()[1:] == [
        "mute (process 10): it has no monitor; start it with -qmp unix:PATH,server=on,wait=off",
        "the VM of process 11: its QMP monitor at unix:/gone has lost its socket file",
        "qsnap never picks another user's VM on its own: --vm other",
        "the config file names: --vm x",
    ]


def test_the_config_and_what_runs() -> None:
    config = configured("[defaults]\ntimeout=1\n[vm.web]\ntimeout=2\n[vm.prod]\nmonitor='/db'\ntimeout=3\n[vm.off]\n"
                        "monitor='/off'\n[vm.idle]")  # fmt: skip
    assert choose(config, lambda: (WEB,)).settings.timeout == 2
    assert choose(config, lambda: (DB,)).settings.timeout == 3
    assert choose(config, lambda: (vm(9, "x", at("/x")),)).settings.timeout == 1
    assert choose(config, lambda: (WEB, DB), vm="web").settings.timeout == 2
    assert chosen(WEB, DB, config=config, wanted="prod") == ("unix:/db", None, False)
    assert [(one.name, one.config, one.selector, str(one.monitor)) for one in known_vms(config, (WEB, DB))] == [
        ("web", "web", "web", "unix:/web"),
        ("db", "prod", "prod", "unix:/db"),
        ("off", "off", "off", "unix:/off"),
        ("idle", "idle", None, "None"),
    ]
    with pytest.raises(NoVM, match="no VM 'idle'"):
        chosen(WEB, config=config, wanted="idle")


def test_the_config_s_monitor_is_the_one_that_is_used() -> None:
    """A VM may have one QMP socket for another program, and one for qsnap."""
    config = configured("[vm.web]\nmonitor='/mine'")
    running = vm(7, "w", at("/theirs"), at("/mine"))
    assert chosen(running, config=config) == ("unix:/mine", 7, True)
    assert str(known_vms(config, [running])[0].monitor) == "unix:/mine"


def test_a_configured_path_that_another_has_taken() -> None:
    config = configured("[vm.web]\nmonitor='/web'")
    first, second = vm(7, "one", at("/web", "gone"), at("/hmp", protocol="hmp")), vm(8, "two", at("/web"))
    assert [(one.config, one.selector) for one in known_vms(config, (first, second))] == [(None, "one"), ("web", "web")]


def test_a_word_means_one_vm() -> None:
    """A -name that is another's pid, or a name of the config file for another, is not shown as a way to choose."""
    config = configured("[vm.db]\nmonitor='/elsewhere'")
    found = known_vms(config, (vm(7, "web", at("/a")), vm(8, "7", at("/b")), DB, vm(10, "mute")))
    words = [(one.name, one.selector) for one in found]
    assert words == [("web", "web"), ("7", "7"), ("db", None), ("mute", None), ("db", "db")]
    assert [one.option for one in found] == ["--vm web", "--vm 7", "-m unix:/db", "", "--vm db"]


@pytest.mark.parametrize(
    ("running", "words"),
    [
        (vm(1, "a"), "it has no monitor"),
        (vm(1, "a", at("/q", "forbidden")), "may not be opened by this user"),
        (vm(1, "a", at("/q", "gone"), at("/h", "gone", "hmp")), "its HMP monitor at unix:/h has lost"),
        (vm(1, "a", MonitorPoint(protocol="hmp", state=MonitorState.UNUSABLE, reason="is x")), "its HMP monitor is x"),
        (msgspec.structs.replace(vm(1, "a"), managed_by="libvirt"), "belongs to libvirtd: use virsh"),
    ],
)
def test_reasons(running: RunningVM, words: str) -> None:
    assert words in reason(running)


# The command line, on real QEMUs


def test_none_is_running(machine: Machine) -> None:
    run = machine.qsnap("list", expect=4)
    assert "no monitor is given, and qsnap finds no running VM" in run.err
    assert "qsnap demo" in run.err
    assert machine.qsnap("list", "--json", expect=4).error["error"] == "NoVM"
    run = machine.qsnap("vms")
    assert (run.out, run.err) == ("", "qsnap: no QEMU is running that this user can see\n")
    assert machine.qsnap("vms", "--json").json == {"vms": []}
    assert machine.qsnap("vms", "-q").out == ""


def test_one_is_taken_and_said(machine: Machine) -> None:
    """In three words, to a person, where it is changed."""
    machine.start("-name", "a,,b c", *qmp("q"))
    run = machine.qsnap("status")
    assert run.err == ""
    assert "a,b c, running" in run.out
    assert machine.qsnap("pause").err == ""

    def on_screen(*words: str) -> list[str]:
        environment = {"HOME": str(machine.directory)}
        return on_terminal(*words, program=(str(machine.program),), env=environment).splitlines()

    assert on_screen("resume") == ["using a,b c", "guest running"]
    assert on_screen("pause", "-q") == []
    assert not any("using" in line for line in on_screen("status"))
    found = machine.qsnap("status", "--json")
    assert (found.json["name"], found.err) == ("a,b c", "")
    assert machine.qsnap("load", "x", "--json", expect=7).error["exit_code"] == 7, "one document on standard error"


@pytest.mark.parametrize("count", [2, 50])
def test_several(machine: Machine, count: int) -> None:
    paths = [machine.directory / f"q{number}" for number in range(count)]
    started = [
        machine.launch(QEMU, *BARE, "-m", "64", "-name", f"vm {path.name}", *qmp(path),
                       "-drive", f"if=none,driver=null-co,id=disk-{path.name}")
        for path in paths
    ]  # fmt: skip
    until("all monitors", lambda: all(machine._listens(process.pid) for process in started), 90)
    run = machine.qsnap("list", expect=2)
    head, *lines = run.err.splitlines()
    assert head == f"qsnap: {count} VMs are running; choose one"
    assert run.out == ""
    assert machine.qsnap("vms").out.splitlines() == lines
    assert lines[0].split("  ")[0] == "NAME"
    assert len(lines) == count + 1
    for line, process, path in zip(lines[1:], started, paths, strict=True):
        state = (f"unix:{path} ", "QMP, free")
        for word in (f"vm {path.name} ", str(process.pid), "64.0 MiB", f"disk-{path.name}", *state):
            assert word in line
        assert line.endswith(f"--vm 'vm {path.name}'")
    assert machine.qsnap("vms", "-q").out.splitlines() == [f"vm {path.name}" for path in paths]
    rows = machine.qsnap("vms", "--json").json["vms"]
    assert [(row["pid"], row["vm"], row["memory"]) for row in rows] == [
        (process.pid, f"vm {path.name}", 64 << 20) for process, path in zip(started, paths, strict=True)
    ]
    assert machine.qsnap("list", "--json", expect=2).error["vms"] == rows
    assert f"vm {paths[1].name}, running" in machine.qsnap("status", "--vm", f"vm {paths[1].name}").out
    assert f"vm {paths[1].name}, running" in machine.qsnap("status", "--vm", str(started[1].pid)).out


def test_choosing(machine: Machine) -> None:
    uuid = "00000000-abcd-0000-0000-000000000000"
    machine.start("-name", "-x", *qmp("one"), "-uuid", uuid)
    machine.start("-name", "two", "-monitor", "unix:two,server=on,wait=off")
    for arguments in (["--vm=-x"], ["--vm", "-x"], ["--vm", uuid.upper()], ["-m", "one"]):
        assert "guest:       -x, " in machine.qsnap("status", *arguments).out
    run = machine.qsnap("status", "--vm", "two", env={"QSNAP_MONITOR": "one"})
    assert ("guest:       two, " in run.out, run.err) == (True, ""), "--vm wins over the environment"
    assert "guest:       -x, " in machine.qsnap("status", env={"QSNAP_MONITOR": "one"}).out
    assert "give -m or --vm, not both" in machine.qsnap("status", "--vm", "two", "-m", "one", expect=2).err
    assert "known: -x, two" in machine.qsnap("status", "--vm", "three", expect=4).err
    assert "no VM '' is running" in machine.qsnap("status", "--vm", "", expect=4).err


def test_the_config_file(machine: Machine) -> None:
    machine.start("-name", "one", *qmp("one.qmp"))
    machine.start("-name", "two", *qmp("two.qmp"))
    machine.config.write_text(
        "default-vm = 'second'\n[vm.first]\nmonitor = 'one.qmp'\n[vm.second]\nmonitor = '~/two.qmp'"
    )
    assert "guest:       two, " in machine.qsnap("status").out
    assert "guest:       one, " in machine.qsnap("status", "--vm", "first").out
    other = machine.directory / "other"
    other.write_text("[vm.two]\n[vm.off]\nmonitor='off.qmp'")
    assert "2 VMs are running" in machine.qsnap("status", "--config", "other", expect=2).err
    text = machine.qsnap("run", "--config", "other", "--", "true", expect=125).err
    assert "the command was not run: 2 VMs are running" in text
    assert "--vm two" in text, "how each is chosen"
    lines = machine.qsnap("vms", "--config", "~/other").out.splitlines()
    assert "off.qmp  not seen running" in lines[3]
    assert machine.qsnap("vms", "-q", "--config", "other").out == "one\ntwo\noff\n"
    other.write_text("[vm.two]\nvmstat = 'x'")
    for command in (["status"], ["vms"], ["status", "-m", "one.qmp"]):
        run = machine.qsnap(*command, "--config", "other", expect=2)
        assert run.err == "qsnap: other: vm.two.vmstat is not known; did you mean 'vmstate'?\n"
    assert "/none cannot be read" in machine.qsnap("vms", "--config", "/none", expect=2).err


@needs_snapshot_jobs
def test_what_the_config_says_of_options(machine: Machine) -> None:
    """And that the command line wins, also with an option that says no."""
    disks = [make_disk(machine.directory / name) for name in ("a", "b")]
    nodes = [word for disk in disks for word in ("-blockdev", f"qcow2,node-name={disk.name},file.driver=file,"
             f"file.filename={disk}", "-device", f"virtio-blk,drive={disk.name}")]  # fmt: skip
    process = machine.launch(QEMU, "-M", "q35,accel=tcg", "-S", "-nodefaults", "-display", "none", "-m", "16", "-name",
                             "web", *qmp("q"), *nodes)  # fmt: skip
    until("its monitor", lambda: machine._listens(process.pid))
    machine.config.write_text("[vm.web]\nvmstate = 'b'\nexclude = ['a']\nno-replace = true\ntimeout = 1e9")

    def planned(*arguments: str, verb: tuple[str, ...] = ("save", "t", "-n")) -> tuple[str, list[str]]:
        found = machine.qsnap(*verb, "--json", *arguments).json
        return found["vmstate"], found["excluded"]

    assert planned() == ("b", ["a"])
    assert planned("--exclude", "") == ("b", [])
    assert planned("--exclude", "", "--vmstate", "a") == ("a", [])
    assert planned("--exclude", "", "--config", os.devnull) == ("a", [])
    report = machine.qsnap("check", "--json").json
    assert (report["vmstate"], [row["verdict"] for row in report["devices"]]) == ("b", ["excluded", "saved"])
    machine.qsnap("save", "t")
    assert "already exists" in machine.qsnap("save", "t", expect=8).err
    assert machine.qsnap("save", "t", "--replace", "--json").json["replaced"]
    machine.config.write_text("[defaults]\nno-replace = true")
    machine.qsnap("save", "t", "--exclude", "a", expect=8)
    machine.config.write_text("[defaults]\ntimeout = 0.000001")
    assert machine.qsnap("list", expect=None).code in (1, 4)
    machine.qsnap("list", "--timeout", "60")


def test_a_busy_monitor(machine: Machine) -> None:
    machine.start("-name", "web", *qmp("q"))
    client = machine.connect(machine.directory / "q")
    row = machine.qsnap("vms").out.splitlines()[1]
    assert f"QMP, busy, held by process {client.pid}: " in row
    (monitor,) = machine.qsnap("vms", "--json").json["vms"][0]["monitors"]
    assert (monitor["state"], monitor["holder"]["pid"]) == ("busy", client.pid)
    run = machine.qsnap("status", "--timeout", "2", expect=None)
    assert run.code == 4, run.err
    assert f"process {client.pid} holds it" in run.err
    assert len(run.err.splitlines()) == 1
    machine.end(client)
    until("a free monitor", lambda: machine.qsnap("vms", "--json").json["vms"][0]["monitors"][0]["state"] == "free")
    machine.qsnap("status")


def test_a_dead_one(machine: Machine) -> None:
    machine.start("-name", "web", *qmp("q"))
    (machine.directory / "q").unlink()
    run = machine.qsnap("status", expect=4)
    assert "has lost its socket file" in run.err
    assert "has lost its socket file" in machine.qsnap("status", "--vm", "web", expect=4).err
    assert "has lost its socket file" in machine.qsnap("vms").out


def test_a_qemu_that_ends_between_the_look_and_the_connection(machine: Machine) -> None:
    """What then answers at the path is another VM, and it is not touched."""
    pid = machine.start("-name", "web", *qmp("q"))
    target = choose(NONE, running_vms)
    assert target.pid == pid
    os.kill(pid, signal.SIGKILL)
    (machine.proc / str(pid)).unlink()
    machine.start("-name", "other", *qmp("q"))
    code = (
        "import sys\nfrom qsnap.targets import choose\nfrom qsnap.__main__ import main\n"
        "from qsnap.monitor.address import UnixAddress\nfrom qsnap.targets.config import Settings\n"
        f"choose.choose = lambda *a, **k: choose.Target(UnixAddress('q'), Settings(), {pid}, 'web')\n"
        "sys.argv = ['qsnap', 'status']\nmain()\n"
    )
    machine.program.write_text(f"#!{machine.program.read_text().splitlines()[0][2:]}\n{code}")
    assert "web is not what answers at unix:q: that is process" in machine.qsnap("status", expect=4).err


@pytest.mark.skipif(not IS_ROOT, reason="only root may start a QEMU as another user")
def test_all(machine: Machine) -> None:
    """All that run, of this user, with a monitor; neither libvirt's, nor one that is not running, nor one without."""
    assert "no running VM" in machine.qsnap("status", "--all", expect=4).err
    machine.start("-name", "one", *qmp("one"))
    machine.start("-name", "none", "-monitor", "none")
    assert machine.qsnap("status", "--all").out.startswith("one:\nguest:       one, running\n")
    machine.start("-name", "two", "-monitor", "unix:two,server=on,wait=off")
    if IS_ROOT:
        machine.start("-name", "theirs", *qmp("theirs"), user=NOBODY, group=NOBODY, extra_groups=[])
    machine.config.write_text("[vm.off]\nmonitor='off.qmp'\n[vm.first]\nmonitor='one'")
    found = machine.qsnap("status", "--all", "--json", env={"QSNAP_MONITOR": "off.qmp"}).json["vms"]
    assert [(one["vm"], one["exit_code"], one["result"]["name"]) for one in found] == [
        ("first", 0, "one"),
        ("two", 0, "two"),
    ]
    assert machine.qsnap("check", "--all", "-q", expect=6).out == "", "no devices: all for the same reason"
    assert machine.qsnap("load", "x", "--all", expect=7).err.count("no snapshot 'x'") == 2


def test_another_user_s(machine: Machine) -> None:
    theirs = machine.start("-name", "theirs", *qmp("theirs"), user=NOBODY, group=NOBODY, extra_groups=[])
    assert "another user's VM on its own: --vm theirs" in machine.qsnap("status", expect=4).err
    assert "guest:       theirs, " in machine.qsnap("status", "--vm", "theirs").out
    ours = machine.start("-name", "ours", *qmp("ours"))
    assert "ours, running" in machine.qsnap("status").out
    rows = [line.split()[:3] for line in machine.qsnap("vms").out.splitlines()]
    assert rows == [["NAME", "PID", "USER"], ["theirs", str(theirs), "nobody"], ["ours", str(ours), "root"]]


def test_libvirt_s(machine: Machine) -> None:
    (machine.directory / "libvirt" / "qemu").mkdir(parents=True)
    machine.start(
        "-name", "guest=web,debug-threads=on",
        "-chardev", "socket,id=charmonitor,path=libvirt/qemu/monitor.sock,server=on,wait=off",
        "-mon", "chardev=charmonitor,id=monitor,mode=control",
    )  # fmt: skip
    for arguments in (["list"], ["list", "--vm", "web"]):
        assert (
            "libvirt manages it, and its monitor belongs to libvirtd: use virsh"
            in machine.qsnap(*arguments, expect=4).err
        )
    assert "libvirt manages it" in machine.qsnap("vms").out
    assert machine.qsnap("vms", "-q").out == ""
    assert machine.qsnap("vms", "--json").json["vms"][0]["managed_by"] == "libvirt"


def test_names_are_data(machine: Machine) -> None:
    machine.start("-name", "\x1b]0;x\x07 $(touch pwned)", *qmp("q"))
    for arguments in (["vms"], ["vms", "-q"], ["list"], ["list", "--vm", "x"]):
        run = machine.qsnap(*arguments, expect=4 if "--vm" in arguments else 0)
        assert "\x1b" not in run.out + run.err
    assert not (machine.directory / "pwned").exists()
