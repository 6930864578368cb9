"""The Ansible collection: built, installed, and used by real plays on real guests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qsnap
from support.guest import Launch, blockdev, disk_device, make_boot_disk, tags

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


def ansible(command: str, *arguments: str | Path, home: Path, **more: Any) -> str:
    """Run one of Ansible's commands; what it prints."""
    environment = {
        **os.environ, "HOME": str(home), "ANSIBLE_COLLECTIONS_PATH": str(home), "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false", "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8",
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable, **more,
    }  # fmt: skip
    done = subprocess.run(
        [BIN / command, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the collection is installed from what ``ansible-galaxy collection build`` makes."""
    ansible("ansible-galaxy", "collection", "build", ROOT / "collection", "--output-path", tmp_path, home=tmp_path)
    (built,) = tmp_path.glob("*.tar.gz")
    assert built.name == f"qsnap-qsnap-{qsnap.__version__}.tar.gz"
    ansible("ansible-galaxy", "collection", "install", built, "--offline", "-p", tmp_path, home=tmp_path)
    return tmp_path


def test_a_play(home: Path, launch: Launch) -> None:
    guests, images, config = {}, {}, home / "config.toml"
    for name in ("db", "app"):
        images[name] = make_boot_disk(home / f"{name}.qcow2")
        guests[name] = launch(*blockdev("d0", images[name]), *disk_device("d0"))
    config.write_text("".join(f'[vm.{name}]\nmonitor = "{guest.address}"\n' for name, guest in guests.items()))
    losing = home / "losing"
    losing.write_text(f'#!/bin/sh\n[ $1 = list ] || kill -9 {guests["app"].process.pid}\nexec {BIN / "qsnap"} "$@"\n')
    losing.chmod(0o755)
    given = f"qsnap={BIN / 'qsnap'} config={config} losing={losing}"
    said = ansible("ansible-playbook", "--diff", HERE / "play.yml", "-e", given, home=home)
    assert "failed=0" in said
    assert re.search(r"^\+app: a$", said, re.MULTILINE), said
    guests["db"].assert_running()
    for name in guests:
        *_, kept, newest = tags(images[name])
        assert kept == "b"
        assert newest.startswith("n-")


def test_the_role(home: Path) -> None:
    """In check mode, and twice: the second time nothing is changed."""
    for name in ("bin", "units"):
        (home / name).mkdir()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(home), str(ROOT)]
    subprocess.run(build, check=True, stdin=subprocess.DEVNULL, timeout=110)
    (wheel,) = home.glob("*.whl")
    given = (
        f"qsnap_wheel={wheel} qsnap_venv={home}/venv qsnap_bin_dir={home}/bin qsnap_unit_dir={home}/units "
        f"qsnap_config_dir={home}/etc"
    )
    assert "failed=0" in ansible("ansible-playbook", "--check", HERE / "role.yml", "-e", given, home=home)
    assert not (home / "venv").exists()
    assert "failed=0" in ansible("ansible-playbook", HERE / "role.yml", "-e", given, home=home)
    assert re.search(r"changed=0 .*failed=0", ansible("ansible-playbook", HERE / "role.yml", "-e", given, home=home))
    version = subprocess.run(
        [home / "bin" / "qsnap", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert qsnap.__version__ in version.stdout
    units = home / "units"
    assert (units / "qsnap-save@.service").read_text() == (ROOT / "scripts/systemd/qsnap-save@.service").read_text()
    assert "OnCalendar=02:30" in (units / "qsnap-save@web.timer.d" / "calendar.conf").read_text()
    assert (home / "etc" / "web.env").read_text().splitlines()[1:] == [
        'QSNAP_VM="web"',
        "QSNAP_KEEP=--keep-daily 7 --keep-tag 'a b' --keep-tag c ",
        "QSNAP_OPTIONS=--live=auto",
    ]
    assert (home / "etc" / "a___b.env").read_text().splitlines()[1:] == ['QSNAP_VM="a \\"\\$b"']


def test_what_the_module_says_of_itself(home: Path) -> None:
    said = ansible("ansible-doc", "qsnap.qsnap.snapshot", home=home)
    assert "before-upgrade" in said
    assert "qsnap_timers" in ansible("ansible-doc", "-t", "role", "qsnap.qsnap.qsnap", home=home)
