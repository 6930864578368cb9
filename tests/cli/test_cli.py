"""The command line as people and scripts meet it: output, progress, quiet, verbose, hostile names."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click
import pytest
from rich.console import Console

import qsnap
import qsnap.cli
from qsnap.cli import several
from qsnap.cli.common import Options
from qsnap.cli.output.bar import Watching, make_bar, update
from qsnap.host.processes import state_estimate
from qsnap.operations.progress import Phase, Progress
from support.guest import (
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    blockdev,
    cli,
    disk_device,
    finish,
    make_boot_disk,
    make_disk,
    start_cli,
    tags,
)
from support.terminal import on_terminal


def test_version_and_help() -> None:
    assert cli("--version").out == f"qsnap {qsnap.__version__}\n"
    for command in qsnap.cli.cli.commands:
        assert cli(command, "-h").out == cli(command, "--help").out != ""


def test_the_help_has_headings() -> None:
    """Every command is under one of them, and every option of a command."""
    text = cli("--help").out
    assert re.findall(r"^(\w.*):$", text, re.M) == [
        "Options", "Snapshots", "The guest", "Series and notes", "Elsewhere", "Around a command", "This machine",
        "Other names",
    ]  # fmt: skip
    assert set(re.findall(r"^  ([a-z]+) {2,}[A-Z]", text, re.M)) == set(qsnap.cli.cli.commands)
    text = cli("save", "--help").out
    assert re.findall(r"^(\w.*):$", text, re.M) == [
        "Options", "What to keep", "Common options (explained by: qsnap help options)", "Examples",
    ]  # fmt: skip
    for option in qsnap.cli.cli.commands["save"].params:
        assert option.opts[-1] in text or getattr(option, "hidden", True)
    assert "..." not in cli("--help").out.replace("[ARGS]...", "").replace("COMMAND...", ""), "nothing is cut"
    assert "Interrupt the command after that time" not in text
    assert "Interrupt the command after that time" in cli("help", "options").out
    assert cli("help", "save").out == text
    assert cli("help").out == cli("--help").out


def test_usage_errors_are_one_line() -> None:
    run = cli("completion", expect=2)
    assert run.err == (
        "qsnap: Missing argument '{bash|zsh|fish}'. Choose from: bash, zsh, fish (see qsnap completion --help)\n"
    )
    assert cli("sav", expect=2).err == "qsnap: There is no command 'sav'. Did you mean 'save'? (see qsnap --help)\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("list --prefx x", "--prefx is not an option. Did you mean '--prefix'? (see qsnap list --help)"),
        ("list --nonsense", "--nonsense is not an option. (see qsnap list --help)"),
        (
            "save t --image x",
            "save has no option --image; these have it: list, tree, show, delete, verify (see qsnap save --help)",
        ),
        ("delete x -m a -m b", "-m names one VM; several are named by --vm NAME --vm NAME (see qsnap delete --help)"),
        ("boot --vm x y", "boot has no option --vm (see qsnap boot --help)"),
        (
            "--latest load",
            "--latest comes after the command; these have it: load (see qsnap --help)",
        ),
    ],
)
def test_a_wrong_option(line: str, message: str) -> None:
    """Nothing is suggested that is only spelt a little like it, such as --ignore-unseen."""
    assert cli(*line.split(), expect=2).err == f"qsnap: {message}\n"


def test_usage_errors_with_an_older_click(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before 8.2 click has not all of its exceptions; qsnap takes 8.1.7."""
    for name in ("NoArgsIsHelpError", "NoSuchCommand"):
        monkeypatch.delattr(click.exceptions, name, raising=False)
    assert qsnap.cli._exit_code([]) == 2
    assert capsys.readouterr().err.startswith("Usage: qsnap ")
    assert qsnap.cli._exit_code(["list", "--bogus"]) == 2
    assert capsys.readouterr().err.startswith("qsnap: --bogus is not an option. (see")


def test_start_up_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qsnap", "--version"], capture_output=True, text=True, timeout=60
    )
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not loaded & {"rich", "asyncio", "qemu.qmp", "msgspec"}


def test_list_loads_what_it_needs(guest: Guest) -> None:
    """Of the commands its own, no rich into a pipe, and for a monitor that is named nothing that looks for VMs."""
    code = (
        "import sys, qsnap.cli; code = qsnap.cli._exit_code(sys.argv[1:]); print(code, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "list", "-m", guest.address], capture_output=True, text=True, timeout=60
    )
    exit_code, *loaded = done.stderr.split("no snapshots")[1].split()
    assert exit_code == "0"
    commands = {name.rpartition(".")[2] for name in loaded if name.startswith("qsnap.cli.commands.")}
    assert commands == {"snapshots"}
    assert not {"rich", "psutil", "qsnap.targets.running", "qsnap.upkeep", "qsnap.operations.save"} & set(loaded)


def test_quiet_is_silent(guest: Guest) -> None:
    for arguments in (["save", "t"], ["load", "t"], ["show", "t"], ["check"], ["status"], ["delete", "t"], ["list"]):
        run = cli(*arguments, "-q", monitor=guest.address)
        assert (run.out, run.err) == ("", ""), arguments


def test_the_monitor_option_wins_over_the_environment(guest: Guest) -> None:
    cli("list", "-m", guest.address, monitor="/nowhere")
    cli("list", "--monitor", f"-qmp unix:{guest.address},server=on,wait=off", monitor="/nowhere")


def test_verbose_shows_the_dialogue_on_stderr(guest: Guest) -> None:
    run = cli("save", "t\u202e", "-v", "--json", monitor=guest.address)
    assert json.loads(run.out)["tag"] == "t\u202e"
    command = (
        '"snapshot-save"' if HAS_SNAPSHOT_JOBS else '"human-monitor-command", "arguments": {"command-line": "savevm '
    )
    assert f'-> {{"execute": {command}' in run.err
    assert '<- {"timestamp"' in run.err
    assert run.err.isascii()


def test_json_errors_are_one_document(guest: Guest) -> None:
    run = cli("load", "nope", "--json", monitor=guest.address, expect=7)
    assert run.out == ""
    assert run.error.keys() >= {"error", "exit_code", "message"}


def test_json_keys(guest: Guest) -> None:
    saved = cli("save", "t", "--json", monitor=guest.address).json
    assert saved.keys() >= {
        "tag", "replaced", "kind", "vmstate", "devices", "vm_state_size", "date", "vm_clock_ns", "pause_ms",
        "duration_ms", "runstate",
    }  # fmt: skip
    (listed,) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert listed.keys() >= {"tag", "kind", "vm_state_size", "date", "vm_clock_ns", "vmstate", "devices"}
    assert {key: listed[key] for key in ("tag", "kind", "vm_state_size", "date", "vm_clock_ns", "devices")} == {
        key: saved[key] for key in ("tag", "kind", "vm_state_size", "date", "vm_clock_ns", "devices")
    }
    report = cli("check", "--json", monitor=guest.address).json
    assert report.keys() >= {"ok", "runstate", "vmstate", "devices", "findings"}
    assert report["devices"][0].keys() >= {"node", "device", "driver", "role", "verdict", "why", "cure"}


def test_names_are_data(guest: Guest) -> None:
    """A tag that others made may hold anything; a terminal must not obey it, and rich must not read it."""
    evil = "\x1b]0;title\x07\x1b[31m[bold]\u202e\n"
    guest.qmp("blockdev-snapshot-internal-sync", device="disk0", name=evil)
    for verb in (["list"], ["list", "-q"], ["show", evil]):
        run = cli(*verb, monitor=guest.address)
        assert "\x1b" not in run.out
        assert "\x07" not in run.out
        assert "\\x1b]0;title\\x07" in run.out
    # HMP, the way of a QEMU without snapshot jobs, takes no control characters.
    deleted = cli("delete", evil, monitor=guest.address, expect=0 if HAS_SNAPSHOT_JOBS else 5)
    assert guest.node_tags("disk0") == ([] if HAS_SNAPSHOT_JOBS else [evil])
    missing = cli("load", evil, monitor=guest.address, expect=7)
    for text in (deleted.out, deleted.err, missing.err):
        assert "\x1b" not in text
        assert "\x07" not in text


def test_rich_markup_in_names_is_text(guest: Guest) -> None:
    cli("save", "[red]x[/red]", monitor=guest.address)
    assert "[red]x[/red]" in on_terminal("list", "-m", guest.address)


def test_a_closed_pipe_is_no_error(guest: Guest) -> None:
    script = f"{sys.executable} -m qsnap list -m {guest.address} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("save t >&-", 0),
        ("save t 2>&-", 0),
        ("save t >&- 2>&-", 0),
        ("load nope 2>&-", 7),
        ("load nope --json >&-", 7),
        ("load nope 2>/dev/full", 7),
        ("list >/dev/full", 1),
        ("check >&-", 0),
    ],
)
def test_closed_and_full_streams(guest: Guest, command: str, code: int) -> None:
    """They change no exit code of what was done; only a result that is lost for want of room is an error."""
    cli("save", "t", monitor=guest.address)
    script = f"QSNAP_MONITOR={guest.address} {sys.executable} -m qsnap {command}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


def test_a_reader_that_has_gone_changes_no_exit_code(launch: Launch) -> None:
    guest = launch(memory="16")
    script = f"QSNAP_MONITOR={guest.address} {sys.executable} -m qsnap check | true; echo ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60).stdout == "6\n"
    script = f"{{ {sys.executable} -m qsnap list -m /none; echo $? >&3; }} 3>&1 >/dev/null 2> >(true)"
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60).stdout == "4\n"


def test_names_that_the_terminal_cannot_show(guest: Guest) -> None:
    run = cli("save", "snow\u2603", monitor=guest.address, env={"PYTHONIOENCODING": "ascii"})
    assert run.out.startswith("saved snow\\u2603: ")


@pytest.mark.parametrize(
    "module", ["click", "qsnap.errors", "asyncio", "qsnap.model.qemu", "qsnap.vm", "qsnap.monitor.qmp.monitor"]
)
def test_an_early_interrupt(guest: Guest, module: str) -> None:
    """Once qsnap has taken over from Python: no traceback, 130 or the signal itself, and the guest runs."""
    process = start_cli("save", "t", monitor=guest.address, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert process.stderr is not None
    for line in process.stderr:  # Python tells of each import when it is done
        if line.rpartition("|")[2].strip() == module:
            break
    process.send_signal(signal.SIGINT)
    run = finish(process)
    assert run.code in (130, -signal.SIGINT), run.err
    assert "Traceback" not in run.err
    guest.assert_running()
    assert guest.jobs() == []


#: Holds the process still at an import, until a signal comes.
AT_AN_IMPORT = """
import os
import sys


def hold(event, arguments):
    if event == "import" and arguments[0] == os.environ["HELD_AT"] and "qsnap" in sys.modules:
        os.write(1, b"held")
        os.read(0, 1)


sys.addaudithook(hold)
"""


@pytest.mark.parametrize("program", [[sys.executable, "-m", "qsnap"], [str(Path(sys.executable).with_name("qsnap"))]])
@pytest.mark.parametrize("module", ["signal", "qsnap.cli"])
def test_an_interrupt_in_our_first_imports(tmp_path: Path, program: list[str], module: str) -> None:
    """Ctrl-C as soon as Python has come to qsnap: the process just ends by it, so that a shell says 130."""
    (tmp_path / "sitecustomize.py").write_text(AT_AN_IMPORT)
    process = subprocess.Popen(
        [*program, "--version"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HELD_AT": module},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(4) == "held"
    process.send_signal(signal.SIGINT)
    run = finish(process)
    assert (run.code, run.err) == (-signal.SIGINT, "")


@pytest.mark.parametrize("columns", [20, 60, 80, 100, 120])
def test_a_narrow_terminal_loses_nothing(guest: Guest, columns: int) -> None:
    snapshot = cli("save", "--json", monitor=guest.address).json
    guest.qmp("blockdev-snapshot-delete-internal-sync", device="disk1", name=snapshot["tag"])
    text = on_terminal("list", "--wide", "-m", guest.address, columns=columns)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    for piece in (snapshot["tag"], "partial", "MiB", "AGE", "VM CLOCK", "VMSTATE", "1 of 2, not disk1"):
        assert piece in plain
    folded = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal("check", "-m", guest.address, columns=columns))
    assert "holds the VM" in folded


def test_colours_on_a_terminal_only(guest: Guest) -> None:
    assert "\x1b[" in on_terminal("check", "-m", guest.address)
    assert "\x1b[3" not in on_terminal("check", "-m", guest.address, env={"NO_COLOR": "1"})
    assert "\x1b" not in cli("check", monitor=guest.address).out


def test_the_bar_moves_truthfully(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*blockdev("big", make_boot_disk(tmp_path / "big")), *disk_device("big"), memory="1024")
    guest.wait_for_ticks()
    text = on_terminal("save", "t", "-m", guest.address)
    shown = [int(match) for match in re.findall(r"(\d+)%", text.rpartition("preparing")[2].partition("saving")[2])]
    assert "preparing" in text
    assert shown == sorted(shown), "it never goes back"
    assert len(set(shown)) >= 4, f"it moves: {shown}"
    assert max(shown) < 100, "the end is told by the result, not by the bar"
    assert "saved t" in text


def test_the_bar_does_not_go_back_when_the_writing_goes_on() -> None:
    """A standstill near the end is read as the flush; on a busy machine it may not have been."""
    bar = make_bar(Console(file=io.StringIO()))
    task = bar.add_task("saving", total=None)
    looks = [(Phase.SAVING, 980), (Phase.FLUSHING, 995), (Phase.SAVING, 996), (Phase.SAVING, 1200)]
    shown = []
    for phase, written in looks:
        update(bar, task, Progress(phase, 1.0, written, 1000))
        shown.append(bar.tasks[0].completed)
    assert shown == [980, 990, 990, 990]


def test_a_bar_that_is_interrupted_is_taken_away(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cursor comes back: signals are handled before the bar hides it, and until it is back."""
    text = on_terminal("save", "t", "-m", guest.address, interrupt_at="saving")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    handlers = []

    @contextmanager
    def shown_progress(what: str, options: Options) -> Iterator[Watching]:
        handlers.append(signal.getsignal(signal.SIGINT))
        yield lambda _: nullcontext()
        handlers.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(several, "shown_progress", shown_progress)
    before = signal.getsignal(signal.SIGINT)
    assert qsnap.cli._exit_code(["save", "t", "-m", guest.address]) == 0
    assert len(handlers) == 2
    assert before not in handlers


def test_no_bar_where_nobody_looks(guest: Guest) -> None:
    run = cli("save", "t", monitor=guest.address)
    assert run.err == ""
    assert run.out.startswith("saved t: ")


async def test_progress_and_its_expectation(launch: Launch, tmp_path: Path) -> None:
    guest = launch(*blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"), memory="768")
    guest.wait_for_ticks()
    seen: list[Progress] = []
    async with qsnap.connect(guest.address) as vm:
        result = await vm.save("t", watch=seen.append)
    preparing = [look.written or 0 for look in seen if look.phase is Phase.PREPARING]
    written = [look.written or 0 for look in seen if look.phase in (Phase.SAVING, Phase.FLUSHING)]
    assert [look.phase for look in seen[: len(preparing)]] == [Phase.PREPARING] * len(preparing), "that comes first"
    assert (preparing, written) == (sorted(preparing), sorted(written))
    assert written[-1] > result.vm_state_size * 0.3
    for look in seen[0], seen[-1]:
        assert look.expected == pytest.approx(result.vm_state_size, rel=0.05)
    assert preparing[-1] == seen[0].expected


async def test_progress_without_an_image_to_look_at(launch: Launch, tmp_path: Path) -> None:
    """Over TCP nothing is known of the process: then only the time is shown, and no number is invented."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    guest = launch(
        *blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"),
        "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off", memory="512",
    )  # fmt: skip
    guest.wait_for_ticks()
    seen: list[Progress] = []
    async with qsnap.connect(f"tcp:127.0.0.1:{port}") as vm:
        await vm.save("t", watch=seen.append)
    assert seen
    assert {(look.written, look.expected) for look in seen} == {(None, None)}
    assert "QEMU does not answer meanwhile" in on_terminal("save", "u", "-m", f"tcp:127.0.0.1:{port}")
    guest.assert_running()


def test_the_estimate_knows_zero_pages(launch: Launch, tmp_path: Path) -> None:
    """RAM that was written with zeroes takes memory of the host, and no room in a snapshot."""
    empty = launch("-S", *blockdev("a", make_disk(tmp_path / "a")), "-object", "memory-backend-ram,id=m,size=256M,"
                   "prealloc=on", machine="q35,accel=tcg,memory-backend=m", memory="256")  # fmt: skip
    estimate = state_estimate(empty.pid, 256 << 20)
    assert estimate is not None
    assert estimate.expected < 4 << 20
    assert estimate.at_least == 0
    result = cli("save", "t", "--json", monitor=empty.address).json
    assert result["vm_state_size"] < estimate.at_most
    assert tags(tmp_path / "a") == ["t"]


def test_status_of_a_named_guest(launch: Launch) -> None:
    guest = launch("-name", "web [1],process=x", memory="16")
    status = cli("status", "--json", monitor=guest.address).json
    assert (status["name"], status["runstate"], status["transport"] in ("qmp", "qmp-hmp")) == (
        "web [1]", "running", True,
    )  # fmt: skip
    assert "web [1], running" in cli("status", monitor=guest.address).out


def test_a_monitor_that_others_can_reach_is_warned_of() -> None:
    """A name that resolves nowhere: the warning comes before the connection."""
    assert "has no password" in cli("list", "-m", "tcp:qsnap.invalid:4444", "--timeout", "3", expect=4).err
    assert "has no password" not in cli("list", "-m", "tcp:127.0.0.1:1", expect=4).err
