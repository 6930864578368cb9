"""Every block of the docs does what the page says: a page's blocks are run from top to bottom, on real guests.

``sh`` is what a reader pastes, a command a line. ``console`` is a dialogue: a terminal shows what the page shows, but
for numbers, dates and directories ("…" stands for lines that do not matter). ``python`` runs, or is a test for the
pytest that the page calls; ``toml`` is a config file; ``yaml`` is a play, whose options
are checked here, and whose like test_collection runs; ``text`` is not run: what a command takes, and drawings.

The tables below hold what a page does not say: what was there before, what cannot run here, what does not exit with 0.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from qsnap.cli import cli
from support.guest import QEMU, make_boot_disk, make_disk, needs_snapshot_jobs, tool

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}

#: Beginnings of commands that are not run here, and why.
NOT_RUN = {
    "scripts/demo": "installs packages; test_guest runs the demo",
    "scripts/test": "runs the tests",
    "qsnap demo": "test_guest runs it",
    "sudo ": "installs and starts systemd's units; test_examples runs what they run",
    "15 3 * * * ": "test_examples runs it as cron does",
    'eval "$(qsnap completion zsh)"': "is for zsh, where test_completion runs it",
    "qsnap pause --all": "would pause whatever else runs on this machine",
}

#: The exit code of a command, if that is not 0.
EXITS = {
    ("ci.md", "qsnap run --revert --save-on-fail failed-42 -- make check"): 2,
    ("everyday.md", "qsnap check"): 6,
    ("everyday.md", "qsnap delete before-upgrade"): 6,
}

#: Before a command of a page ("": before its first): the guests that run, and what was done.
BEFORE = {
    ("README.md", ""): "export QSNAP_MONITOR=$HOME/vm.qmp",
    ("ci.md", ""): r"""guest web qmp root data; qsnap save -q clean-install; printf 'check:\n\tfalse\n' > Makefile""",
    (
        "elsewhere.md",
        "qsnap boot failed-job",
    ): "guest web qmp root; qsnap save -q job-4711; qsnap export -q job-4711 failed-job",
    ("everyday.md", ""): "guest raw qmp root data.img",
    ("everyday.md", "qsnap tree"): """
        guest web qmp root data
        for tag in clean-install before-upgrade upgraded; do qsnap save -q $tag; done
        qsnap describe -q before-upgrade 'all packages up to date'; qsnap load -q clean-install""",
    ("install.md", "qsnap vms"): "guest 'web server' qmp root; guest db mon db",
    ("live.md", ""): "guest web qmp root data",
    ("python.md", ""): "guest vm qmp root; guest web qmp root; qsnap save -q --prefix nightly",
    ("reference.md", ""): """
        guest web qmp root data scratch
        for tag in old clean clean-install gold; do qsnap save -q $tag; done""",
    (
        "reference.md",
        "qsnap save before-upgrade --vm db",
    ): "guest db qmp root; guest app qmp root; export QSNAP_MONITOR=$HOME/web.qmp",
    ("reference.md", "qsnap undo"): "qsnap load -q before-upgrade --save-current",
    ("reference.md", "qsnap verify before-upgrade"): "qsnap save -q before-upgrade",
    ("scheduled.md", ""): """
        guest db qmp root; guest web qmp root data
        for n in 1 2 3; do qsnap save -q --prefix nightly; done""",
    ("scheduled.md", "qsnap prune"): "qsnap save -q --prefix nightly",
    ("scheduled.md", "qsnap save --vm web --vm db"): "qsnap prune -q --prefix nightly --keep-last 1",
    ("together.md", ""): "guest db qmp root; guest app qmp root data",
    ("verify.md", ""): "guest web qmp root data; qsnap save -q before-upgrade; qsnap save -q --prefix nightly",
}

#: Programs that the pages call and that are not ours. What they do does not matter.
STAND_INS = ("ansible-playbook", "ssh", "./provision.sh", "./test.sh")
#: What a real guest says on the pages, and what ours says.
SAYS = {"login:": "bad="}
#: Other guests of this machine may be listed among ours.
AMONG_OTHERS = ("qsnap vms",)

#: ``guest NAME qmp|mon DISK...``: start a guest of that name with that monitor, which qsnap then means.
GUEST = """
guest() {
  local name=$1 directory=$HOME/${1%% *} monitor=$2 contents=boot number=0 ids=(vda vdb vdc) options=() disk file
  local -A format=([qcow2]=qcow2 [img]=raw)
  shift 2
  mkdir $directory
  for disk in "$@"; do
    file=$directory/$disk; [[ $disk = *.img ]] || file+=.qcow2
    cp templates/$contents.${file##*.} $file
    options+=(-blockdev "driver=${format[${file##*.}]},node-name=${disk%.img},file.driver=file,file.filename=$file")
    options+=(-device ide-hd,drive=${disk%.img},bus=ide.$number,id=${ids[number]})
    contents=empty number=$((number + 1))
  done
  export QSNAP_MONITOR=$directory.$monitor
  [ $monitor = qmp ] && options+=(-qmp) || options+=(-monitor)
  options+=(unix:$QSNAP_MONITOR,server=on,wait=off -serial file:$directory/serial)
  qemu-system-x86_64 -name "$name" -machine q35 -nodefaults "${options[@]}"
  printf "[vm.'%s']\nmonitor = '%s'\n" "$name" $QSNAP_MONITOR >> .config/qsnap/config.toml
}
"""

#: How wide the pages' terminal is.
COLUMNS = 120

#: Python as on the pages, where an ``await`` may stand outside of a function.
PYTHON = """
import ast, asyncio, inspect, pathlib, sys, types
code = compile(pathlib.Path(sys.argv[1]).read_text(), sys.argv[1], "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
done = types.FunctionType(code, {})()
if inspect.iscoroutine(done):
    asyncio.run(done)
"""


class Block(NamedTuple):
    """What is between two fences."""

    page: str
    line: int
    language: str
    text: str


class Step(NamedTuple):
    """A command of a page; what the page says that it prints, if it says so."""

    command: str
    where: str
    shown: str | None = None


def blocks_of(page: str) -> Iterator[Block]:
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S):
        yield Block(page, PAGES[page][: block.start()].count("\n") + 2, block[1], block[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def is_run(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


def steps_of(block: Block) -> Iterator[Step]:
    """The commands of a block; files for them are ``blocks/LINE.*``."""
    where = f"{block.page}:{block.line}"
    if block.language == "sh":
        yield from (Step(line, where) for line in block.text.splitlines() if is_run(line))
    elif block.language == "console":
        for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
            command, _, shown = part.partition("\n")
            if is_run(command):
                yield Step(command, where, shown)
    elif block.language == "toml":
        yield Step(f"qsnap vms --config blocks/{block.line}.toml", where)
    elif block.language == "python" and "pytest" not in block.text:
        yield Step(f"python blocks.py blocks/{block.line}.py", where)


def steps(page: str) -> list[Step]:
    return [step for block in blocks_of(page) for step in steps_of(block)]


def shape(text: str) -> list[str]:
    """The lines of an output without what differs from one time to another."""
    text = re.sub(r"(?:/[\w.@+-]+)+/", "", text)
    text = re.sub(r"qsnap-boot-\w+", "qsnap-boot-#", text)
    text = re.sub(r"\d[\d.:-]*(?:T\d+)?", "#", text)
    text = re.sub(r"# ?(?:[KMG]iB|B|ms|s|min|h|d)\b", "#", text)
    text = re.sub(r"# device\b", "# devices", text)
    text = re.sub(r"vCPU # (?:executes instructions|is idle, and was woken # times in #)", "vCPU # works", text)
    return [" ".join(line.split()) for line in text.splitlines()]


def agree(shown: list[str], printed: list[str]) -> bool:
    """Whether the words are the same, wherever a terminal breaks its lines; "…" is any number of words."""
    return re.fullmatch(re.escape(" ".join(shown)).replace("…", ".*"), " ".join(printed)) is not None


class Stage:
    """A home directory with what the pages take for granted; it ends the guests that were started there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in (
            "bin",
            "pids",
            "templates",
            "blocks",
            "printed",
            "backups",
            ".config/qsnap",
            ".config/fish/completions",
        ):
            (home / name).mkdir(parents=True)
        make_boot_disk(home / "templates" / "boot.qcow2")
        make_disk(home / "templates" / "empty.qcow2")
        make_disk(home / "templates" / "empty.img", driver="raw")
        shutil.copy(home / "templates" / "boot.qcow2", home / "root.qcow2")
        for name in ("qsnap", "pytest", "python"):
            self.program(name, f'exec {Path(sys.executable).with_name(name)} "$@"')
        qemu, qemu_img = shutil.which(QEMU), shutil.which(tool("qemu-img"))
        assert qemu is not None
        assert qemu_img is not None
        (home / "bin" / "qemu-img").symlink_to(qemu_img)
        self.program("qemu-system-x86_64", f'exec {qemu} "$@" -m 32 -display none -daemonize -pidfile pids/$$')
        for name in STAND_INS:
            self.program(name, "exit 0")
        (home / "blocks.py").write_text(PYTHON)
        (home / "Makefile").write_text("check:\n\ttrue\n")

    def program(self, name: str, text: str) -> None:
        path = self.home / name if "/" in name else self.home / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def perform(self, page: str) -> None:
        """Run a page in one shell; what a command prints is in ``printed/N``, its exit code in ``printed/N.exit``."""
        for block in blocks_of(page):
            suffix = f"{block.line}.{block.language}"
            name = "test_page.py" if "import pytest" in block.text else f"blocks/{suffix.replace('python', 'py')}"
            (self.home / name).write_text(block.text)
        script = ["set -e", GUEST]
        before = {begin: text for (where, begin), text in BEFORE.items() if where == page}
        for number, step in enumerate(steps(page)):
            script += [before.pop(begin) for begin in list(before) if step.command.startswith(begin)]
            command = step.command
            for theirs, ours in SAYS.items():
                command = command.replace(theirs, ours)
            if step.shown is not None:
                (self.home / "blocks" / f"{number}.sh").write_text(f"stty cols {COLUMNS}\n{command}\n")
                command = f"script --quiet --return --command 'bash blocks/{number}.sh' /dev/null"
            script.append(f"{{\n{command}\n}} > printed/{number} 2>&1 && code=0 || code=$?")
            script.append(f"echo $code > printed/{number}.exit")
        done = subprocess.run(
            ["bash", "-c", "\n".join(map(textwrap.dedent, script))], cwd=self.home, env=self.environment(),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.home), "PATH": f"{self.home}/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "TERM": "xterm",
            "QSNAP_RUNTIME_DIR": os.environ["QSNAP_RUNTIME_DIR"], "TMPDIR": str(self.home),
            "TZ": f"noon{time.gmtime().tm_hour - 12:+d}",  # so that no day ends before the page does
        }  # fmt: skip

    def printed(self, number: int) -> tuple[str, int]:
        path = self.home / "printed" / str(number)
        # A progress bar is gone when the command has ended
        text = re.sub(r".*\n.*\x1b\[1A\x1b\[2K", "", path.read_bytes().decode().replace("\r\n", "\n"))
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        text = "".join(f"{line.rpartition(chr(13))[2].rstrip()}\n" for line in text.split("\n")[:-1])
        return text, int(path.with_suffix(".exit").read_text())

    def clear(self) -> None:
        pids = [path.read_text() for path in (self.home / "pids").iterdir()]
        for path in (self.home / "printed").iterdir():
            pids += re.findall(r"to end it: +kill (\d+)", path.read_text())
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="qs-", ignore_cleanup_errors=True) as name:
        stage = Stage(Path(name))
        yield stage
        stage.clear()


@needs_snapshot_jobs
@pytest.mark.parametrize("page", [page for page in PAGES if steps(page)])
def test_a_page_does_what_it_says(page: str, stage: Stage) -> None:
    stage.perform(page)
    wrong = []
    for number, step in enumerate(steps(page)):
        printed, code = stage.printed(number)
        expected = EXITS.get((page, step.command), 0)
        shown, seen = shape(step.shown or ""), shape(printed)
        for theirs, ours in SAYS.items():
            shown = [line.replace(theirs, ours) for line in shown]
        if step.command.startswith(AMONG_OTHERS):
            seen = [line for line in seen if line in shown]
        if code != expected or (step.shown is not None and not agree(shown, seen)):
            wrong.append(
                f"{step.where}: $ {step.command}\n{printed}exit code {code}\n"
                + "\n".join(("shown:", *shown, "seen:", *seen))
            )
    assert not wrong, "\n\n".join(wrong)
    for said in (path.read_text() for path in stage.home.glob("*/serial")):
        assert set(re.findall(r"bad=(\w{4})", said)) <= {"0000"}, "a guest's RAM and disks differ"


@pytest.mark.no_qemu
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in {"sh", "console", "python", "toml", "text", "yaml"}
    if block.language == "yaml":
        module = runpy.run_path(str(ROOT / "collection" / "plugins" / "modules" / "snapshot.py"))
        options = yaml.safe_load(module["DOCUMENTATION"])["options"]
        for play in yaml.safe_load(block.text):
            for task in play.get("tasks", ()):
                assert set(task.get("qsnap.qsnap.snapshot", ())) <= set(options)
    if block.language == "console":
        assert block.text.startswith("$ ")
    if block.language == "text" and block.text.startswith("qsnap "):
        name = block.text.split()[1]
        known = {option for one in cli.commands[name].params for option in (*one.opts, *one.secondary_opts)}
        assert set(re.findall(r"--[a-z-]+", block.text)) <= known
    elif block.language == "text":
        assert "$ " not in block.text


@pytest.mark.no_qemu
def test_the_tables_hold_nothing_that_is_gone() -> None:
    lines = [line.removeprefix("$ ") for block in BLOCKS for line in block.text.splitlines()]
    for begin in (*NOT_RUN, *AMONG_OTHERS):
        assert any(line.startswith(begin) for line in lines), begin
    for text in (*STAND_INS, *SAYS):
        assert any(text in line for line in lines), text
    for page, command in EXITS:
        assert command in [step.command for step in steps(page)], command
    for page, begin in BEFORE:
        assert any(step.command.startswith(begin) for step in steps(page)), (page, begin)
