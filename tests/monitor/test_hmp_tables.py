"""The human monitor's tables, as QEMU prints them where the recordings have nothing of the kind."""

from __future__ import annotations

import pytest

from qsnap.errors import MonitorError
from qsnap.model.qemu import BlockGraph, QemuVersion, RunState
from qsnap.monitor.hmp import tables

pytestmark = pytest.mark.no_qemu

VERSION = QemuVersion(7, 2, 0)
OLD = "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"
ROW_END = "0 B 2026-11-24 02:06:43 00:00:00.010"


def graph(*nodes: str) -> BlockGraph:
    return tables.block_graph("", "\n\n".join(nodes), {}, VERSION)


def children(*nodes: str) -> dict[str, dict[str, str]]:
    return {name: dict(node.children) for name, node in graph(*nodes).nodes.items()}


def test_the_widths_of_a_table() -> None:
    assert tables.table_layout(OLD, QemuVersion(5, 2, 9)) == (9, 17, 7)
    assert tables.table_layout(OLD, QemuVersion(6, 0, 0)) == (9, 16, 8)
    assert tables.table_layout("ID TAG", VERSION) is None


@pytest.mark.parametrize(
    "row",
    ["1         t", f"1 {ROW_END}", f"x         t  {ROW_END}", f"1 {ROW_END} x", f"         t  {ROW_END}"],
    ids=["no end", "no tag", "no id", "more", "nothing"],
)
def test_what_is_no_row(row: str) -> None:
    layout = tables.table_layout(OLD, VERSION)
    assert layout is not None
    with pytest.raises(MonitorError, match="a row that cannot be read"):
        tables.snapshot_row(row, layout)


@pytest.mark.parametrize("header", ["", "\nID TAG"])
def test_a_table_without_its_header(header: str) -> None:
    with pytest.raises(MonitorError, match="a header that is not known"):
        graph(f"a: /a (qcow2)\n\nImages:\nimage: /a\nSnapshot list:{header}")


def test_blank_lines_make_no_difference() -> None:
    found = graph("", "a: /a (file)\n    Cache mode:  writeback", "", "", "b: /b (file, encrypted)\n\n")
    assert {node.node_name: node.encrypted for node in found.nodes.values()} == {"a": False, "b": True}


@pytest.mark.parametrize("line", ["nothing", "a: /a", "a: /a (qcow2) x", "a b: /a (qcow2)"])
def test_what_is_no_node(line: str) -> None:
    with pytest.raises(MonitorError, match="info block has a line that cannot be read"):
        graph(line)


def test_bitmaps() -> None:
    """Behind the number of each, between its members."""
    image = """\
Images:
image: /a
Format specific information:
    compat: 1.1
    name: of something else
    bitmaps:
        [0]:
            flags:
                [0]: auto
            name: one
            granularity: 65536
        [1]:
            flags:
            name: two
            granularity: 65536
    refcount bits: 16"""
    assert graph("a: /a (qcow2)", image).nodes["a"].dirty_bitmaps == ("one", "two")


def test_jobs() -> None:
    text = (
        "Type mirror, device m: Completed 0 of 1 bytes, speed limit 0 bytes/s\n"
        "Streaming device s: Completed 0 of 1 bytes, speed limit 0 bytes/s\n"
    )
    assert [(job.id, job.type) for job in tables.block_jobs(text)] == [("m", "mirror"), ("s", "stream")]
    assert [*tables.block_jobs("No active jobs\n\n")] == []
    with pytest.raises(MonitorError, match="info block-jobs has a line that cannot be read: 'x'"):
        [*tables.block_jobs("x\n")]


def test_a_job_s_filter_stands_on_the_image_of_its_file_name() -> None:
    nodes = ("f: /a (file)", "other: /b (qcow2)", "a: /a (qcow2)")
    for driver, edge in ("mirror_top", "backing"), ("copy-before-write", "file"):
        found = children(*nodes, f"x: /a ({driver})", f"y: /c ({driver})")
        assert (found["x"], found["y"]) == ({edge: "a"}, {})


def test_what_a_node_stands_on() -> None:
    """By its options, whatever else is among them; and its backing file is told by a line of its own."""
    inner = '{"driver": "qcow2", "file": {"driver": "file", "filename": "/driver"}, "backing": {"driver": "null-co"}}'
    crypt = '{"driver": "rbd", "image": "i", "encrypt": {"format": "luks", "parent": {"format": "luks2"}}}'
    found = children(
        "f: /driver (file)",
        "a: /driver (qcow2)\n    Backing file:     /base (chain depth: 1)",
        "g: /base (file)",
        "base: /base (qcow2)",
        f'top: json:{{"driver": "raw", "size": 512, "file": {inner}}} (raw)',
        f"r: json:{crypt} (rbd)",
        f'over: json:{{"driver": "raw", "file": {crypt}}} (raw)',
    )
    assert found == {
        "f": {}, "a": {"file": "f", "backing": "base"}, "g": {}, "base": {"file": "g"}, "top": {"file": "a"},
        "r": {}, "over": {"file": "r"},
    }  # fmt: skip


def test_run_states() -> None:
    for text, state in (
        ("running", RunState.RUNNING),
        ("running (single step mode)", RunState.RUNNING),
        ("paused (restore-vm)", RunState("restore-vm")),
        ("paused (single step mode) (io-error)", RunState("io-error")),
    ):
        assert tables.runstate(f"VM status: {text}\n") == state
    with pytest.raises(MonitorError, match="info status says what cannot be read"):
        tables.runstate("running")


def test_the_size_of_memory() -> None:
    assert tables.memory_size("base memory: 3\nplugged memory: 4\n") == 7
    with pytest.raises(MonitorError, match="info memory_size_summary says what cannot be read"):
        tables.memory_size("unknown command: 'info memory_size_summary'\n")
