"""The pure parts: addresses, HMP's quoting, text for people, the device rules without a QEMU."""

from __future__ import annotations

import ast
import runpy
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

import qsnap
from qsnap import errors
from qsnap.cli.output import text
from qsnap.errors import BadUsage, NotSupported, QsnapError
from qsnap.host.hugepages import Layout
from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.model.qemu import BlockBackend, BlockGraph, BlockNode, NodeSnapshot, RunState, automatic_tag, tag_problem
from qsnap.monitor.address import TcpAddress, UnixAddress, parse_address
from qsnap.monitor.hmp import text as hmp_text
from qsnap.monitor.qmp.replies import image_path
from qsnap.operations.live.timing import Pace
from qsnap.operations.plan import runstate_findings


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/run/vm.qmp", UnixAddress("/run/vm.qmp")),
        ("vm.qmp", UnixAddress("vm.qmp")),
        ("unix:/run/vm.qmp", UnixAddress("/run/vm.qmp")),
        ("unix:/run/vm.qmp,server=on,wait=off", UnixAddress("/run/vm.qmp")),
        ("unix:/run/vm.qmp,server,nowait", UnixAddress("/run/vm.qmp")),
        ("/run/vm.qmp,server=on,wait=off", UnixAddress("/run/vm.qmp")),
        ("unix:/run/a,,b,server=on", UnixAddress("/run/a,b")),
        ("-qmp unix:/run/vm.qmp,server=on", UnixAddress("/run/vm.qmp")),
        ("-monitor tcp:127.0.0.1:4444,server,nowait", TcpAddress("127.0.0.1", 4444)),
        ("-chardev socket,id=mon,path=/run/vm.qmp,server=on", UnixAddress("/run/vm.qmp")),
        ("socket,id=mon,host=localhost,port=4444,server=on", TcpAddress("localhost", 4444)),
        ("tcp:localhost:4444", TcpAddress("localhost", 4444)),
        ("tcp::4444,server=on", TcpAddress("localhost", 4444)),
        ("tcp:[::1]:4444", TcpAddress("::1", 4444)),
        (" /run/vm.qmp ", UnixAddress("/run/vm.qmp")),
    ],
)
def test_addresses(given: str, meant: object) -> None:
    assert parse_address(given) == meant


@pytest.mark.parametrize(
    "given",
    ["", "unix:", "unix:,server=on", "tcp:", "tcp:host", "tcp:host:port", "tcp:host:0", "tcp:host:99999",
     "localhost:44", "stdio", "pty", "socket,id=x", "/" + "x" * 120, "a\0b"],
)  # fmt: skip
def test_bad_addresses_show_a_good_one(given: str) -> None:
    with pytest.raises(BadUsage) as error:
        parse_address(given)
    assert "tcp:" in str(error.value) or "shorter" in str(error.value)


def test_an_existing_path_with_a_comma(tmp_path: Path) -> None:
    path = tmp_path / "a,server=on"
    path.write_text("")
    assert parse_address(str(path)) == UnixAddress(str(path))


def test_home_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_address("~/vm.qmp") == UnixAddress("/home/me/vm.qmp")


def test_loopback() -> None:
    assert TcpAddress("127.0.0.1", 1).is_loopback
    assert TcpAddress("::1", 1).is_loopback
    assert not TcpAddress("example.org", 1).is_loopback
    assert str(TcpAddress("::1", 1)) == "tcp:[::1]:1"


def test_hmp_quoting() -> None:
    assert hmp_text.quoted('a "b" \\') == '"a \\"b\\" \\\\"'
    for bad in ("a\nb", "\x1b", "\x7f"):
        with pytest.raises(NotSupported):
            hmp_text.quoted(bad)


def test_hmp_errors() -> None:
    assert hmp_text.error_in("") == hmp_text.error_in("\r\n") == ""
    assert hmp_text.error_in("Error: Snapshot 'x' does not exist in one or more devices\r\n") == (
        "Snapshot 'x' does not exist in one or more devices"
    )
    assert hmp_text.error_in("Size mismatch: pc.ram\r\nError: Error -22 while loading VM state\r\n") == (
        "Size mismatch: pc.ram; Error -22 while loading VM state"
    )


def test_tags() -> None:
    assert tag_problem("x" * 255) is None
    assert tag_problem("ü" * 127) is None
    for bad in ("", "x" * 256, "ü" * 128, "a\x00", "\x1f", "\x7f", "\x9b", "\udcff"):
        assert tag_problem(bad)
    assert automatic_tag(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) == "vm-20260102030405"


def test_run_states_that_are_not_known_are_kept() -> None:
    state = RunState("hibernating")
    assert (state, str(state), state.value) == ("hibernating", "hibernating", "hibernating")
    assert RunState("running") is RunState.RUNNING


def test_numbers_for_people() -> None:
    assert [text.size(n) for n in (0, 1023, 1024, 1536, 1 << 20, 5 << 30, 3 << 40, 5 << 50)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "5.0 GiB", "3.0 TiB", "5120.0 TiB",
    ]  # fmt: skip
    assert text.clock(3_723_004_000_000) == "0001:02:03.004"
    assert [text.seconds(ms) for ms in (3.21, 99.9, 310, 75_000)] == ["3.2 ms", "99.9 ms", "0.31 s", "75 s"]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    ages = [text.age(now - timedelta(seconds=s), now) for s in (0, 119, 120, 7199, 7200, 172800, -5)]
    assert ages == ["0 s", "119 s", "2 min", "119 min", "2 h", "2 d", "in the future"]


def test_printable() -> None:
    assert text.printable("a\x1b[31m\n\u202e\x9b é") == "a\\x1b[31m\\n\\u202e\\x9b é"
    assert text.printable("a\nb", keep_newlines=True) == "a\nb"


def test_plain_table() -> None:
    assert text.table(("A", "LONG"), [("1", "2"), ("333", "")]) == "A    LONG\n1    2\n333"


def test_image_paths() -> None:
    assert image_path("/a/b") == "/a/b"
    assert image_path('json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/x"}}') == "/x"
    for odd in ("json:", "json:[]", 'json:{"file": "node"}', "json:{" * 5000, "nbd://host/x"):
        assert image_path(odd) in ("", "nbd://host/x")


def node(name: str, driver: str = "qcow2", **more: object) -> BlockNode:
    return BlockNode(node_name=name, driver=driver, **more)  # type: ignore[arg-type]


def graph(*nodes: BlockNode, has_edges: bool = True) -> BlockGraph:
    children = {child for n in nodes for _, child in n.children}
    tops = [n.node_name for n in nodes if n.node_name not in children]
    return BlockGraph(
        nodes={n.node_name: n for n in nodes},
        backends=tuple(BlockBackend(qdev=f"/machine/peripheral/{name}", root=name) for name in tops),
        with_parents=frozenset([*children, *tops]),
        has_edges=has_edges,
    )


@pytest.mark.parametrize("state", ["inmigrate", "postmigrate", "finish-migrate", "preconfig", "colo", "save-vm"])
def test_run_states_that_must_not_be_touched(state: str) -> None:
    (finding,) = runstate_findings(RunState(state))
    assert finding.refuses
    assert state in finding.message
    assert finding.cure


@pytest.mark.parametrize("state", ["running", "paused", "prelaunch", "guest-panicked", "io-error", "suspended"])
def test_run_states_that_may_be_saved(state: str) -> None:
    assert list(runstate_findings(RunState(state))) == []


def test_rbd_can_snapshot_but_holds_no_state() -> None:
    survey = rules.survey(graph(node("r", "rbd"), node("q")))
    assert [d.verdict for d in survey.devices] == ["saved", "saved"]
    assert survey.vmstate == "q"
    assert rules.survey(graph(node("r", "rbd"))).findings[0].code == "no-vmstate-device"


def test_a_qemu_that_tells_no_edges() -> None:
    survey = rules.survey(graph(node("q"), node("f", "throttle"), has_edges=False))
    assert [d.verdict for d in survey.devices] == ["saved", "refused"]
    assert "does not tell" in survey.devices[1].why


def test_pflash_of_the_other_kind_is_not_carried() -> None:
    for model, verdict in (("cfi.pflash01", "carried"), ("cfi.pflash02", "refused"), ("virtio-blk", "refused")):
        plain = graph(node("v", "raw"), node("q"))
        backends = (BlockBackend(qdev="/machine/system.flash1", qdev_type=model, root="v"), plain.backends[1])
        survey = rules.survey(msgspec.structs.replace(plain, backends=backends))
        assert survey.devices[0].verdict == verdict
    by_hmp = rules.survey(msgspec.structs.replace(plain, backends=backends), chooses_devices=False)
    assert by_hmp.devices[0].verdict == "refused"


def row(tag: str, size: int = 0, clock: int = 1) -> NodeSnapshot:
    return NodeSnapshot(tag=tag, id="1", vm_state_size=size, date=datetime(2026, 1, 1, tzinfo=UTC), vm_clock_ns=clock)


def test_kinds_of_snapshots() -> None:
    two = graph(
        node("a", snapshots=(row("full", 5), row("disks"), row("half", 5), row("mixed", 5))),
        node("b", snapshots=(row("full"), row("disks"), row("mixed", 0, 2))),
    )
    found = {s.tag: s for s in snapshots.snapshots(two, rules.survey(two).devices)}
    assert {tag: s.kind for tag, s in found.items()} == {
        "full": "full", "disks": "disk-only", "half": "partial", "mixed": "full",
    }  # fmt: skip
    assert found["half"].missing == ("b",)
    assert found["mixed"].problems


def test_the_error_tree_is_drawn() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, QsnapError)]
    for error in classes:
        assert error.__name__ in (errors.__doc__ or "")
    codes = {code for code, _ in errors.EXIT_TABLE}
    assert {str(c.exit_code) for c in classes} - {"130"} <= codes


PACKAGE = Path(qsnap.__file__).parent
#: Which modules may import which library: each has one home.
HOMES = {
    "rich": ("cli/output/people.py", "cli/output/bar.py"),
    "click": (
        "cli/__init__.py", "cli/options.py", "cli/completion.py",
        "cli/commands/everyday.py", "cli/commands/series.py", "cli/commands/job.py",
    ),
    "qemu": ("monitor/qmp/monitor.py",),
    "psutil": ("targets/running.py", "cli/commands/job.py"),
    "pytest": ("pytest_plugin.py",),
}  # fmt: skip
#: From top to bottom; a package imports from itself and from the layers below.
LAYERS = [
    ["__main__", "__init__"],
    ["cli", "pytest_plugin"],
    ["vm"],
    ["supervision"],
    ["operations"],
    ["upkeep"],
    ["inventory", "runs"],
    ["targets"],
    ["monitor"],
    ["host"],
    ["errors"],
    ["model"],
    ["guest"],
]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, for type checking too."""
    found: set[str] = set()
    for item in ast.walk(ast.parse(path.read_text())):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module:
            found |= {f"{item.module}.{alias.name}" for alias in item.names} | {item.module}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    level = next(number for number, layer in enumerate(LAYERS) if own in layer)
    above = {name for layer in LAYERS[: level + 1] for name in layer} - {own}
    for name in imports(path):
        library, *rest = name.split(".")
        assert str(relative) in HOMES.get(library, (str(relative),)), f"{relative} imports {name}"
        assert library != "qsnap" or not rest or rest[0] not in above, f"{relative} imports {name}"


def test_every_module_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_each_module_that_guards_a_guest_has_tests_that_find_changes() -> None:
    """The table of scripts/mutate names modules and tests that are there."""
    script = runpy.run_path(str(PACKAGE.parent / "scripts" / "mutate"))
    for module, tests in script["TESTS"].items():
        assert script["Changes"](module).found
        assert all((Path(__file__).parent / f"test_{name}.py").exists() for name in tests)


@pytest.mark.parametrize("text", ["", "5", "5 6 7", "a 6", "5 -6", "5  6", "5.0 6"])
def test_a_pace_that_is_none(text: str) -> None:
    """A mark that somebody else has made, or another version."""
    assert Pace.decode(text) is None


def test_a_pace_is_of_ram_that_is_mapped_alike() -> None:
    pace = Pace(30, 1000)
    assert Pace.decode(pace.encode()) == pace
    assert all(pace.is_of(Layout(base, 1600 - base)) for base in (900, 1000, 1100))
    assert not any(pace.is_of(Layout(base, 1600 - base)) for base in (0, 899, 1101))
    assert not Pace(0, 1000).is_of(Layout(1000, 600)), "that nothing was seen is not a pace"
