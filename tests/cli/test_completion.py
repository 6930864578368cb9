"""Completion in real shells, on a terminal, as a user meets it: what is typed, a Tab, and what the shell then runs.

The words that a shell runs ``qsnap`` with are written down by a program of that name, which hands what completion
asks for to qsnap itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.fake_proc import Machine, qmp
from support.guest import DEADLINE_S, make_disk, qemu_img, until

#: One after another: a QEMU whose socket has the same relative path makes another one's state uncertain.
pytestmark = pytest.mark.xdist_group("machine")

#: Each has two letters of its own at the start.
TAGS = [
    "aaplain", "abwith a blank", "acit's", 'adsay "x"', "ae$(touch pwned)", "af`touch pwned`", "ag!now", "ahx:y:z",
    "aix,y", "ajcomma,", "akx=y", "alünïcödé ☃", "am\\back\\n", "an;touch pwned;", "ao*?[a]{b,c}", "ap~#%h",
    "aq|touch pwned&", "arend ", "as$HOME", "at<x>@y", "au^x-y", "av'touch pwned'", "-dash", "=equals", "~tilde",
    "#hash",
]  # fmt: skip
#: They cannot be typed, and are left out. No name of a temporary directory, as in a prompt, has capitals.
UNTYPED = ["ZZ\nZZ", "ZZ\tx", "ZZ\x1b[31m", "ZZ\u202ex"]


class Shell:
    """An interactive shell that has completion set up as the README says."""

    def __init__(self, name: str, machine: Machine, monitor: Path | None) -> None:
        program = shutil.which(name)
        assert program, f"{name} is needed: apt install {name}"
        self.name = name
        self._ran = machine.directory / "ran"
        directory = machine.directory / "shell"
        directory.mkdir()
        recorder = directory / "qsnap"
        recorder.write_text(
            f"#!{sys.executable}\nimport json, os, pathlib, sys\n"
            "if '_QSNAP_COMPLETE' in os.environ or 'completion' in sys.argv:\n"
            f"    os.execv({str(machine.program)!r}, sys.argv)\n"
            f"path = pathlib.Path({str(self._ran)!r})\n"
            "path.with_suffix('.new').write_text(json.dumps(sys.argv[1:]))\npath.with_suffix('.new').rename(path)\n"
        )
        recorder.chmod(0o755)
        arguments, setup = {
            "bash": (["--norc", "--noprofile", "-i"], 'eval "$(qsnap completion bash)"'),
            "zsh": (["-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(qsnap completion zsh)"'),
            "fish": (["--no-config", "-i"], "qsnap completion fish | source"),
        }[name]
        environment = {
            **os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "HOME": str(directory), "TERM": "xterm",
            "LC_ALL": "C.UTF-8", "PS1": "ready> ", "HISTFILE": "", "COLUMNS": "200", "ZDOTDIR": str(directory),
            "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory),
            "XDG_RUNTIME_DIR": str(directory), "INPUTRC": "/dev/null",
        }  # fmt: skip
        if monitor:
            environment["QSNAP_MONITOR"] = str(monitor)
        if machine.config.exists():
            environment["QSNAP_CONFIG"] = str(machine.config)
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [program, *arguments], cwd=machine.directory, stdin=slave, stdout=slave, stderr=slave, env=environment,
            start_new_session=True, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.text = ""
        self.run(f"{setup}; qsnap ready")

    def run(self, typed: str) -> list[str]:
        """Type this and Enter; the words that qsnap was then run with."""
        self._ran.unlink(missing_ok=True)
        os.write(self._master, typed.encode() + b"\r")
        try:
            until("what it runs", lambda: self._read() or (self._ran.exists() and self._edits()))
        except AssertionError as error:
            raise AssertionError(f"{error} after {typed!r}; seen: {self.text[-500:]!r}") from None
        words: list[str] = json.loads(self._ran.read_text())
        return words

    def listed(self, typed: str, last: str) -> str:
        """Type this and Tab twice; what the shell shows, up to *last*. The line is then given up."""
        start = len(self.text)
        os.write(self._master, typed.encode() + b"\t\t")
        until(f"{last!r} after {typed!r}", lambda: self._read() or last in self._plain(start))
        os.write(self._master, b"\x15")  # not an interrupt, with which the terminal throws away what is typed next
        found = self._plain(start)
        self.run("qsnap ready")
        return found

    def _edits(self) -> bool:
        """Whether its line editor is at work again, and not a command."""
        return not termios.tcgetattr(self._master)[3] & termios.ICANON

    def _plain(self, start: int) -> str:
        return re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[()].|[=>])", "", self.text[start:])

    def _read(self) -> bool:
        """Take what the shell has written; False, for a wait that goes on with ``or``."""
        while select.select([self._master], [], [], 0)[0]:
            try:
                self.text += os.read(self._master, 65536).decode(errors="replace")
            except OSError:
                break
        return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        os.close(self._master)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


Start = Callable[..., Shell]


@pytest.fixture
def shell(machine: Machine) -> Iterator[Start]:
    """Start shells; they are ended with the test."""
    shells: list[Shell] = []

    def start(name: str, monitor: Path | None = None) -> Shell:
        shells.append(Shell(name, machine, monitor))
        return shells[-1]

    yield start
    for running in shells:
        running.close()


SHELLS = pytest.mark.parametrize("name", ["bash", "zsh", "fish"])


def start_vm(machine: Machine, name: str = "vm") -> Path:
    """A VM of that name with all those tags; its monitor."""
    disk = make_disk(machine.directory / "disk.qcow2")
    for tag in (*TAGS, *UNTYPED):
        qemu_img("snapshot", "-c", tag, disk)
    node = f"qcow2,node-name=disk,file.driver=file,file.filename={disk}"
    machine.start("-name", name, *qmp(machine.directory / "q"), "-blockdev", node)
    return machine.directory / "q"


@SHELLS
def test_every_tag_becomes_one_word(machine: Machine, shell: Start, name: str) -> None:
    running = shell(name, start_vm(machine))
    for tag in TAGS:
        if tag[0] == "a":
            assert running.run(f"qsnap show {tag[:2]}\t") == ["show", tag]
    assert running.run("true; qsnap show ab\t") == ["show", "abwith a blank"]
    assert running.run("qsnap delete aa\tab\tac\t") == ["delete", "aaplain", "abwith a blank", "acit's"]
    assert not (machine.directory / "pwned").exists()


@SHELLS
def test_odd_first_characters(machine: Machine, shell: Start, name: str) -> None:
    running = shell(name, start_vm(machine))
    assert running.run("qsnap show -- -d\t") == ["show", "--", "-dash"]
    assert running.run("qsnap show '~t\t") == ["show", "~tilde"]
    assert running.run("qsnap show '#h\t") == ["show", "#hash"]


@SHELLS
def test_inside_of_quotes(machine: Machine, shell: Start, name: str) -> None:
    running = shell(name, start_vm(machine))
    # What cannot be written so, bash does not offer. fish lets a quote open behind a comma, for more to follow.
    impossible = {"bash": ("'.*'|\".*!"), "zsh": "$^", "fish": ".*,$"}[name]
    for number, tag in enumerate(TAGS):
        special = re.search("['\"$`\\\\!,]", tag)  # what means something in quotes
        for quote in "'\"" if special else "'\""[number % 2]:
            if tag[0] == "a" and not re.match(impossible, quote + tag):
                assert running.run(f"qsnap show {quote}{tag[:2]}\t") == ["show", tag]
    assert not (machine.directory / "pwned").exists()


@SHELLS
def test_in_the_middle_of_a_tag(machine: Machine, shell: Start, name: str) -> None:
    running = shell(name, start_vm(machine))
    for typed, tag in (("ahx:", "ahx:y:z"), ("ahx:y:", "ahx:y:z"), ("akx=", "akx=y"), ("abwith\\ a", "abwith a blank"),
                       ("alünï", "alünïcödé ☃"), ("at\\<x\\>@", "at<x>@y"), ("aix,", "aix,y")):  # fmt: skip
        assert running.run(f"qsnap show {typed}\t") == ["show", tag]


@SHELLS
def test_commands_and_options(machine: Machine, shell: Start, name: str) -> None:
    running = shell(name)
    assert running.run("qsnap sta\t") == ["status"]
    assert running.run("qsnap pau\t") == ["pause"]
    assert running.run("qsnap list --sort si\t") == ["list", "--sort", "size"]
    assert running.run("qsnap rm --missing\t y") == ["rm", "--missing-ok", "y"]
    assert running.run("qsnap save --no-r\t") == ["save", "--no-replace"]
    assert running.run("qsnap delete x --missing\t y") == ["delete", "x", "--missing-ok", "y"]
    (machine.directory / "some file").touch()
    assert running.run("qsnap list --config some\t") == ["list", "--config", "some file"]
    shown = running.listed("qsnap s", "status")  # of all, fish shows as many as there is room for
    assert all(word in shown for word in ("save", "show"))


@SHELLS
def test_names_of_vms(machine: Machine, shell: Start, name: str) -> None:
    machine.config.write_text("[vm.prod]\nmonitor = 'prod.qmp'")
    start_vm(machine, "web $(touch pwned) 'x'")
    pid = machine.start(*qmp("other"))
    running = shell(name)
    web = "web $(touch pwned) 'x'"
    assert running.run("qsnap list --vm we\t") == ["list", "--vm", web]
    assert running.run("qsnap list --vm=we\t") == ["list", f"--vm={web}"]
    assert running.run("qsnap list --vm pr\t") == ["list", "--vm", "prod"]
    assert running.run("qsnap --vm pr\t list") == ["--vm", "prod", "list"]
    assert running.run("qsnap --vm prod tre\t") == ["--vm", "prod", "tree"]
    assert running.run("qsnap --vm prod list --rev\t") == ["--vm", "prod", "list", "--reverse"]
    assert running.run(f"qsnap list --vm={str(pid)[:-1]}\t") == ["list", f"--vm={pid}"]
    quoted = shlex.quote(web) if name != "fish" else "'" + web.replace("'", "\\'") + "'"
    assert running.run(f"qsnap show --vm {quoted} ab\t") == ["show", "--vm", web, "abwith a blank"]
    assert running.run("qsnap save --vm " + quoted + " --vmstate di\t") == ["save", "--vm", web, "--vmstate", "disk"]
    assert not (machine.directory / "pwned").exists()


@SHELLS
def test_the_lists_show_what_there_is(machine: Machine, shell: Start, name: str) -> None:
    running = shell(name, start_vm(machine))
    shown = running.listed("qsnap show a", "av")
    assert all(f"{tag[:2]}" in shown for tag in TAGS if tag[0] == "a")
    assert "ZZ" not in shown
    assert not (machine.directory / "pwned").exists()


@SHELLS
def test_silence_where_nothing_answers(machine: Machine, shell: Start, name: str) -> None:
    """Nothing there, a broken config, a monitor that somebody holds: the line stays, and nothing is written on it."""
    running = shell(name, machine.directory / "nowhere")
    start = len(running.text)
    assert running.run("qsnap show x\ty") == ["show", "xy"]
    machine.start(*qmp("held"))
    machine.connect(machine.directory / "held")
    assert running.run("qsnap show -m held x\ty") == ["show", "-m", "held", "xy"]
    (machine.directory / "broken").write_text("x = ")
    assert running.run("qsnap show --config broken x\ty") == ["show", "--config", "broken", "xy"]
    for word in ("Traceback", "qsnap:", "rror", "using"):
        assert word not in running.text[start:]


def asked(machine: Machine, shell: str, line: str, **more: str) -> subprocess.CompletedProcess[str]:
    """What qsnap answers to a shell's script."""
    words, _, last = line.rpartition(" ")
    env = {"bash": {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_WORDBREAKS": " \t\n\"'@><=;|&(:"},
           "zsh": {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))},
           "fish": {"COMP_WORDS": words.replace(" ", "\n"), "COMP_CWORD": last}}[shell]  # fmt: skip
    return subprocess.run(
        [machine.program], capture_output=True, text=True, timeout=DEADLINE_S, cwd=machine.directory,
        env={**os.environ, "HOME": str(machine.directory), "_QSNAP_COMPLETE": f"{shell}_complete", **env, **more},
    )  # fmt: skip


@SHELLS
def test_what_is_offered(machine: Machine, name: str) -> None:
    env = {"QSNAP_MONITOR": str(start_vm(machine))}
    text = asked(machine, name, "qsnap show ", **env).stdout
    assert "aaplain" in text
    assert "=equals" in text
    assert "-dash" not in text, "it would be taken for an option"
    assert "-dash" in asked(machine, name, "qsnap show -- ", **env).stdout
    assert "ZZ" not in text
    text = asked(machine, name, "qsnap delete aaplain ", **env).stdout
    assert "aaplain" not in text
    assert "aix" in text
    assert asked(machine, name, "qsnap list ", **env).stdout.strip() == ""


@SHELLS
def test_a_qemu_that_does_not_answer_is_given_up(machine: Machine, name: str) -> None:
    machine.start(*qmp("q"))
    machine.connect(machine.directory / "q")
    for line in ("qsnap show ", "qsnap save --vmstate "):
        done = asked(machine, name, line)
        assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("instruction", ["", "x", "tcsh_complete", "bash_complete", "zsh_complete", "fish_complete"])
def test_a_broken_request_is_answered_with_silence(machine: Machine, instruction: str) -> None:
    done = machine.qsnap("--version", env={"_QSNAP_COMPLETE": instruction}, expect=None)
    assert done.err == ""
    assert ("version" in done.out or done.out.startswith("qsnap ")) == (instruction == "")


def test_the_scripts_start_nothing(machine: Machine) -> None:
    """They are read at the start of each shell."""
    for name in ("bash", "zsh", "fish"):
        script = machine.qsnap("completion", name).out
        assert "_QSNAP_COMPLETE" in script
    assert "bash', 'zsh', 'fish'" in machine.qsnap("completion", "tcsh", expect=2).err
