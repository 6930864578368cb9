"""The examples, the systemd units and the line for cron, run as those who run them do."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.guest import QEMU, Guest, cli, make_boot_disk, needs_snapshot_jobs, tags, tool

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
UNITS = ROOT / "scripts" / "systemd"


class Job:
    """A directory for a job, with a provisioning script and tests that can be told to fail."""

    def __init__(self, directory: Path, guest: Guest | None) -> None:
        self.directory = directory
        programs = directory / "bin"
        programs.mkdir()
        (programs / "qsnap").symlink_to(Path(sys.executable).with_name("qsnap"))
        self.write("provision", "echo provisioned >> log")
        self.tests("true")
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:/usr/bin:/bin",
            "QSNAP_MONITOR": guest.address if guest else "",
        }

    def write(self, name: str, text: str) -> None:
        path = self.directory / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def tests(self, text: str) -> None:
        self.write("run-tests", f"echo tests >> log\n{text}")

    def run(self, *command: str | Path, expect: int = 0, **more: str) -> str:
        done = subprocess.run(
            [str(part) for part in command], cwd=self.directory, env={**self.environment, **more},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    def shell(self, script: str, expect: int = 0, **more: str) -> str:
        return self.run("bash", "-e", "-c", script, expect=expect, **more)

    @property
    def log(self) -> list[str]:
        return (self.directory / "log").read_text().split()


@pytest.fixture
def job(guest: Guest, tmp_path: Path) -> Job:
    directory = tmp_path / "job"
    directory.mkdir()
    return Job(directory, guest)


@pytest.fixture
def disk(guest: Guest, tmp_path: Path) -> Path:
    """The first image of the guest fixture."""
    return tmp_path / "disk0.qcow2"


def test_the_shell_script(job: Job, guest: Guest, disk: Path) -> None:
    job.run(EXAMPLES / "job.sh")
    job.run(EXAMPLES / "job.sh")
    assert job.log == ["provisioned", "tests", "tests"]
    job.tests("exit 5")
    job.run(EXAMPLES / "job.sh", expect=5, JOB_ID="77")
    assert tags(disk) == ["provisioned", "failed-77"]
    job.tests("kill -TERM $PPID")
    job.run(EXAMPLES / "job.sh", expect=143, JOB_ID="78")
    assert tags(disk) == ["provisioned", "failed-77", "failed-78"]
    guest.assert_running()


def test_the_makefile(job: Job, guest: Guest, disk: Path) -> None:
    cli("save", "provisioned", monitor=guest.address)
    job.run("make", "-f", EXAMPLES / "Makefile", "check")
    assert tags(disk) == ["provisioned"]
    job.tests("exit 5")
    assert "Error 5" in job.run("make", "-f", EXAMPLES / "Makefile", "check", expect=2)
    assert tags(disk) == ["provisioned", "failed"]
    guest.assert_running()


def test_github_actions(job: Job, guest: Guest, disk: Path) -> None:
    document: dict[str, Any] = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    steps = [step for step in document["jobs"]["test"]["steps"] if "run" in step]
    for fails in (False, True, True):
        job.tests("exit 1" if fails else "true")
        failed = False
        for step in steps:
            when = step.get("if", "success()")
            if when == "always()" or (when == "failure()") == failed:
                job.shell(step["run"], expect=int(fails and step["run"] == "./run-tests"), GITHUB_RUN_ID="9")
                failed = failed or (fails and step["run"] == "./run-tests")
    assert job.log == ["provisioned", "tests", "tests", "tests"]
    assert [re.sub(r"-.*", "", tag) for tag in tags(disk)] == ["provisioned", "failed", "failed"]
    (*_, last) = cli("list", "--json", monitor=guest.address).json["snapshots"]
    assert last["description"] == "run 9"
    guest.assert_running()


def test_gitlab(job: Job, guest: Guest, disk: Path) -> None:
    document: dict[str, Any] = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text())["test"]
    for status in ("success", "failed"):
        job.tests("false" if status == "failed" else "true")
        job.shell("\n".join(document["before_script"] + document["script"]), expect=int(status == "failed"))
        job.shell("\n".join(document["after_script"]), CI_JOB_STATUS=status, CI_JOB_ID="4")
    assert job.log == ["provisioned", "tests", "tests"]
    assert [re.sub(r"-.*", "", tag) for tag in tags(disk)] == ["provisioned", "failed"]
    guest.assert_running()


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[Job]:
    """A job on a machine without a guest. What it would install is there: QEMU, qemu-img and qsnap."""
    directory = tmp_path / "job"
    directory.mkdir()
    job = Job(directory, None)
    make_boot_disk(directory / "guest.qcow2")
    for name in ("qemu-system-x86_64", "qemu-img"):
        program = shutil.which(QEMU if name.startswith("qemu-s") else tool(name))
        assert program is not None
        (directory / "bin" / name).symlink_to(program)
    job.environment |= {"QSNAP_MONITOR": str(tmp_path / "guest.qmp"), "IMAGE": "guest.qcow2"}
    pid = tmp_path / "guest.pid"
    yield job
    if pid.exists():
        with suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def on_this_machine(script: str, tmp_path: Path) -> str:
    """A script with its files below a directory of the test, and a guest as small as that of the test."""
    return script.replace("/tmp/guest", f"{tmp_path}/guest").replace("-m 1G", "-m 32")


@needs_snapshot_jobs
@pytest.mark.parametrize("fails", [False, True])
def test_github_s_own_runner(hosted: Job, tmp_path: Path, fails: bool) -> None:
    document: dict[str, Any] = yaml.safe_load((EXAMPLES / "github-hosted.yml").read_text())
    steps = [step for step in document["jobs"]["test"]["steps"] if "run" in step and step["name"] != "Install"]
    hosted.tests("exit 7" if fails else "true")
    failed = False
    for step in steps:
        when = step.get("if", "success()")
        if when == "always()" or (when == "failure()") == failed:
            is_test = fails and step["name"] == "Test"
            hosted.shell(on_this_machine(step["run"], tmp_path), expect=7 if is_test else 0)
            failed = failed or is_test
    assert hosted.log == ["provisioned", "tests"]
    assert tags(hosted.directory / "guest.qcow2") == ["provisioned", "failed"][: 1 + fails]
    assert (hosted.directory / "failed-guest").is_dir() == fails


@needs_snapshot_jobs
def test_gitlab_s_own_runner(hosted: Job, tmp_path: Path) -> None:
    document: dict[str, Any] = yaml.safe_load((EXAMPLES / "gitlab-hosted.yml").read_text())["test"]
    begins = [line for line in document["before_script"] if not line.startswith(("apt-get", "pipx"))]
    hosted.tests("exit 1")
    hosted.shell(on_this_machine("\n".join(begins + document["script"]), tmp_path), expect=1)
    hosted.shell(on_this_machine("\n".join(document["after_script"]), tmp_path), CI_JOB_STATUS="failed")
    assert tags(hosted.directory / "guest.qcow2") == ["provisioned", "failed"]
    assert (hosted.directory / "failed-guest").is_dir()


def test_the_ansible_tasks_commands(job: Job, guest: Guest, disk: Path) -> None:
    """The commands, and that the JSON has what the playbook reads; Ansible itself is not needed for that."""
    (play,) = yaml.safe_load((EXAMPLES / "ansible.yml").read_text())
    commands = [task["ansible.builtin.command"] for task in play["tasks"] if "ansible.builtin.command" in task]
    save, prune = (command.replace("{{ tag }}", play["vars"]["tag"]) for command in commands)
    assert '"pause_ms":' in job.shell(save)
    job.shell(save, expect=8)
    assert '"remove": []' in job.shell(prune)
    assert tags(disk) == ["before-upgrade"]


# Every night


def cron_line() -> str:
    (line,) = re.findall(r"^15 3 \* \* \*  (.+)$", (ROOT / "docs" / "scheduled.md").read_text(), re.M)
    return str(line)


def test_the_line_for_cron(job: Job, guest: Guest, disk: Path, tmp_path: Path) -> None:
    """As cron runs it: by sh, with next to no environment, and nothing said while all is well."""
    config = tmp_path / "home" / ".config" / "qsnap" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f"[vm.web]\nmonitor = '{guest.address}'\n")
    environment = {
        "PATH": job.environment["PATH"], "HOME": str(tmp_path / "home"), "SHELL": "/bin/sh", "LOGNAME": "root",
        "QSNAP_RUNTIME_DIR": os.environ["QSNAP_RUNTIME_DIR"],
    }  # fmt: skip
    assert "%" not in cron_line(), "cron would make a new line of it"
    for _ in range(2):
        done = subprocess.run(
            ["/bin/sh", "-c", cron_line()], env=environment, cwd="/", stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [tag.partition("-")[0] for tag in tags(disk)] == ["nightly", "nightly"], (
        "the newest of the day, and the oldest"
    )
    guest.assert_running()


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units of a VM called web."""
    directory = tmp_path / "units"
    shutil.copytree(UNITS, directory)
    for kind in ("service", "timer"):
        shutil.copy(UNITS / f"qsnap-save@.{kind}", directory / f"qsnap-save@web.{kind}")
    return directory


def test_systemd_takes_the_units(units: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", units / "qsnap-save@web.service", units / "qsnap-save@web.timer"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    broken = units / "qsnap-save@web.timer"
    broken.write_text(broken.read_text().replace("OnCalendar=daily", "OnCalendar=fortnightly"))
    done = subprocess.run(["systemd-analyze", "verify", broken], capture_output=True, text=True, timeout=60)
    assert "fortnightly" in done.stderr, "it finds what is wrong"


def test_the_service_fired(job: Job, guest: Guest, disk: Path, tmp_path: Path, units: Path) -> None:
    """What the service runs, with the words of its file taken apart as systemd does; nothing said while all is well."""
    config = tmp_path / "config.toml"
    config.write_text(f"[vm.web]\nmonitor = '{guest.address}'\n")
    text = (units / "qsnap-save@web.service").read_text()
    settings = dict(re.findall(r"^(\w+)=(.*)$", text, re.M))
    environment = dict(pair.split("=", 1) for pair in shlex.split(settings["Environment"]))
    environment = {name: value.replace("%i", "web") for name, value in environment.items()}
    environment["QSNAP_KEEP"] = "--keep-last 1"  # of /etc/qsnap/web.env
    command: list[str] = []
    for word in shlex.split(settings["ExecStart"]):
        if word.startswith("${"):
            command.append(environment[word[2:-1]])
        else:
            command += environment[word[1:]].split() if word.startswith("$") else [word]
    for _ in range(3):
        out = job.run(*command, QSNAP_CONFIG=str(config), QSNAP_MONITOR="")
        assert out == ""
    assert [tag.partition("-")[0] for tag in tags(disk)] == ["timer"]
    assert settings["KillMode"] == "process", "the guard outlives a qsnap that is killed"
    guest.assert_running()
