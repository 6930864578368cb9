"""The config file: what it may say, what wins, and which key a mistake is in."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from msgspec import structs

from qsnap.cli import cli
from qsnap.errors import BadUsage
from qsnap.monitor.address import TcpAddress, UnixAddress
from qsnap.targets import config
from qsnap.targets.config import Config, ConfiguredVM, Settings, load, parse

pytestmark = pytest.mark.no_qemu

INSTALL = (Path(__file__).resolve().parents[2] / "docs" / "install.md").read_text()
FILE = Path("/etc/qsnap.toml")


def error_of(text: str) -> str:
    with pytest.raises(BadUsage) as error:
        parse(text, FILE)
    return str(error.value)


def test_all_of_it() -> None:
    assert parse(
        'default-vm = "web"\n[defaults]\ntimeout = 600\nexclude = ["a"]\n'
        '[vm.web]\nmonitor = "/run/web"\nexclude = ["b", "c"]\nvmstate = "root"\nno-replace = true\ntimeout = 1.5\n'
        '[vm."a b"]\n',
        FILE,
    ) == Config(
        "web",
        Settings(timeout=600, exclude=("a",)),
        {
            "web": ConfiguredVM("web", UnixAddress("/run/web"), Settings(1.5, "root", ("b", "c"), True)),
            "a b": ConfiguredVM("a b", None, Settings()),
        },
    )


def test_an_empty_one() -> None:
    assert parse("", FILE) == Config()
    assert parse("[vm]\n[defaults]\n", FILE) == Config()


def test_what_wins() -> None:
    read = parse('[defaults]\ntimeout = 9\nexclude = ["a"]\nno-replace = true\n[vm.x]\nexclude = []\n'
                 "no-replace = false\n", FILE)  # fmt: skip
    assert read.settings("x") == Settings(timeout=9, exclude=(), no_replace=False)
    assert read.settings("unknown") == read.settings(None) == Settings(timeout=9, exclude=("a",), no_replace=True)


@pytest.mark.parametrize(
    ("monitor", "address"),
    [
        ("web.qmp", UnixAddress("/etc/web.qmp")),
        ("unix:run/web,server=on", UnixAddress("/etc/run/web")),
        ("-qmp unix:web,server=on,wait=off", UnixAddress("/etc/web")),
        ("../run/web", UnixAddress("/etc/../run/web")),
        ("/run/web", UnixAddress("/run/web")),
        ("~/web", UnixAddress("/home/me/web")),
        ("unix:~/web", UnixAddress("/home/me/web")),
        ("tcp:localhost:4444", TcpAddress("localhost", 4444)),
    ],
)
def test_where_a_monitor_is(monkeypatch: pytest.MonkeyPatch, monitor: str, address: object) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(f'[vm.x]\nmonitor = "{monitor}"', FILE).vms["x"].monitor == address


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("defualts = 1", "defualts", "did you mean 'defaults'?"),
        ("\n\nzzz = 1", "zzz", "known here: default-vm, defaults, vm"),
        ("[vm.web]\n# monitr\nmonitr = 'x'", "vm.web.monitr", "did you mean 'monitor'?"),
        ("[defaults]\nmonitor = 'x'", "defaults.monitor", "known here: timeout, vmstate"),
        ("[vm.web]\nno_replace = true", "vm.web.no_replace", "did you mean 'no-replace'?"),
        ("vm.web.tiemout = 1", "vm.web.tiemout", "timeout"),
        ("vm = {web = {tiemout = 1}}", "vm.web.tiemout", "timeout"),
        ("[vm.'a b']\n\n'x y' = 1", "vm.'a b'.'x y'", "is not known"),
        ("[vm.web]\nexclude = [\n 'a',\n]\nx = 1", "vm.web.x", "is not known"),
        ("[vm.web]\nvmstate = '''\n[vm.web]\nx = 1\n'''\nx = 1", "vm.web.x", "is not known"),
        ("[vm.one]\n[vm.two]\n[vm.one.x]", "vm.one.x", "is not known"),
        ("[[vm.web]]", "vm.web", "must be a table: [vm.web]"),
        ("vm = 1", "vm", "must be a table: [vm]"),
        ("\ndefaults = []", "defaults", "must be a table"),
        ("default-vm = 1", "default-vm", "must be the name"),
        ("default-vm = ''", "default-vm", "must be the name"),
        ("[vm.x]\nmonitor = 1", "vm.x.monitor", "must be a string"),
        ("[vm.x]\nmonitor = ''", "vm.x.monitor", "a good one is"),
        ("[vm.x]\nmonitor = 'stdio'", "vm.x.monitor", "own terminal"),
        ("[vm.x]\ntimeout = '5'", "vm.x.timeout", "seconds above 0"),
        ("[vm.x]\ntimeout = 0", "vm.x.timeout", "seconds above 0"),
        ("[vm.x]\ntimeout = nan", "vm.x.timeout", "seconds above 0"),
        ("[vm.x]\ntimeout = inf", "vm.x.timeout", "seconds above 0"),
        (f"[vm.x]\ntimeout = 1{'0' * 400}", "vm.x.timeout", "seconds above 0"),
        ("[vm.x]\ntimeout = true", "vm.x.timeout", "seconds above 0"),
        ("[vm.x]\nexclude = 'a'", "vm.x.exclude", "a list of nodes"),
        ("[vm.x]\nexclude = [1]", "vm.x.exclude", "a list of nodes"),
        ("[vm.x]\nvmstate = ['a']", "vm.x.vmstate", "the name of a node"),
        ("[vm.x]\nno-replace = 'yes'", "vm.x.no-replace", "true or false"),
        ("[vm.'']", "vm.''", "needs a name"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key(text: str, where: str, what: str) -> None:
    for written in (text, text.replace("\n", "\r\n")):
        message = error_of(written)
        assert message.startswith(f"/etc/qsnap.toml: {where} "), message
        assert what in message


@pytest.mark.parametrize("text", ["x = ", "[vm.x]\n[vm.x]", "x = 1\nx = 2", "a = " + "[" * 5000, "\0"])
def test_what_is_no_toml(text: str) -> None:
    assert error_of(text).startswith("/etc/qsnap.toml: ")


def test_where_it_is_read_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load() == Config(), "the default one need not exist"
    (tmp_path / "qsnap").mkdir()
    (tmp_path / "qsnap" / "config.toml").write_text("default-vm = 'a'\n[vm.a]\nmonitor = 'a.sock'")
    assert load().vms["a"].monitor == UnixAddress(str(tmp_path / "qsnap" / "a.sock"))
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert load() == Config()
    (tmp_path / ".config").symlink_to(tmp_path)
    assert load().default_vm == "a"
    assert load("~/qsnap/config.toml").default_vm == "a"


def test_a_relative_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c").write_text("[vm.a]\nmonitor = 'a.sock'")
    monkeypatch.chdir(tmp_path)
    assert load("c").vms["a"].monitor == UnixAddress(str(tmp_path / "a.sock"))


@pytest.mark.parametrize("path", ["/nonexistent/x", "/", "", "~nobody-of-that-name/x", "a\0b", "/dev/null/x"])
def test_files_that_cannot_be_read(path: str) -> None:
    with pytest.raises(BadUsage, match="cannot be read"):
        load(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"x = '\xff'")
    with pytest.raises(BadUsage, match="cannot be read"):
        load(tmp_path / "c")


def test_every_key_is_an_option() -> None:
    options = {
        name.removeprefix("--")
        for command in cli.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    assert {"monitor", *config.OPTIONS} <= options
    assert {key.replace("-", "_") for key in config.OPTIONS} == set(Settings.__struct_fields__)


def test_every_key_is_in_the_docs() -> None:
    example = re.search(r"```toml\n(.*?)```", INSTALL, re.S)
    assert example
    read = parse(example[1], FILE)
    shown = {key for vm in read.vms.values() for key in (*structs.asdict(vm.settings), "monitor")}
    assert shown == {"monitor", *Settings.__struct_fields__}
    for key in ("default-vm", "[defaults]", "monitor", *config.OPTIONS):
        assert key in example[1], key
