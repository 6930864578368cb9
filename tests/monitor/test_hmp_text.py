"""The human monitor's text, read: as four QEMUs sent it byte for byte, and as hypothesis makes it up.

The recordings are made by scripts/record-hmp. What is made up follows QEMU's own formats, written here from its
source (block/qapi.c: bdrv_snapshot_dump; util/readline.c: readline_update) and not from the parser.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qsnap.errors import MonitorError, NotSupported
from qsnap.inventory import devices as rules
from qsnap.model.qemu import QemuVersion, RunState
from qsnap.monitor.hmp import tables as hmp_tables
from qsnap.monitor.hmp import text as hmp_text
from qsnap.tags import tag_problem
from support.guest import RECORDED

RECORDINGS = sorted(RECORDED.glob("hmp-*.json"))
#: What scripts/record-hmp saved, but the automatic tag, in its order.
TAGS = [
    "a b",
    " c",
    "it ends with a blank  ",
    "é",
    'quo"te \\',
    "1",
    "long" * 9,
    "5 MiB 2020-01-01 00:00:00 00:00:00.000",
]

few = settings(max_examples=1000, deadline=None, derandomize=True)
many = settings(few, max_examples=3000)


class Recording:
    """What one QEMU sent: the banner, and for each line all its answers."""

    def __init__(self, path: Path) -> None:
        recorded = json.loads(path.read_text())
        self.version = QemuVersion(*recorded["version"])
        banner, *exchanges = recorded["exchanges"]
        self.banner = banner["stream"].encode("latin-1")
        self.exchanges: list[tuple[str, int, bytes]] = [
            (exchange["line"], exchange["number"], exchange["stream"].encode("latin-1")) for exchange in exchanges
        ]

    @cache  # noqa: B019 (there are four)
    def answers(self, line: str) -> list[str]:
        found = [hmp_text.answer(stream, number) for said, number, stream in self.exchanges if said == line]
        assert found
        assert None not in found
        return [answer[0] for answer in found if answer]


@cache
def read(path: Path) -> Recording:
    return Recording(path)


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def recording(request: pytest.FixtureRequest) -> Recording:
    return read(request.param)


def test_there_is_one_of_each_version() -> None:
    assert {read(path).version[:2] for path in RECORDINGS} == {(5, 2), (7, 2), (10, 0), (11, 1)}


def test_the_banner(recording: Recording) -> None:
    assert hmp_text.banner(recording.banner) == recording.version
    for end in range(len(recording.banner)):
        assert hmp_text.banner(recording.banner[:end]) is None


def test_answers_end_where_they_end(recording: Recording) -> None:
    """Whatever part of it has come: no answer before it is whole, and then the same."""
    for line, number, stream in recording.exchanges:
        whole = hmp_text.answer(stream, number)
        assert whole is not None
        for end in range(0, len(stream), 1 + len(stream) // 50):
            assert hmp_text.answer(stream[:end], number) in (None, (whole[0], b"")), line
        assert hmp_text.answer(stream + b"(qemu) s\x1b[K", number) == (whole[0], whole[1] + b"(qemu) s\x1b[K")


def test_success_is_silent_and_errors_are_text(recording: Recording) -> None:
    for line, _, _ in recording.exchanges:
        (answer, *_) = recording.answers(line)
        if line.startswith(('savevm "', "delvm", "stop", "cont")):
            assert hmp_text.error_in(answer) == "", line
    assert "nope" in hmp_text.error_in(recording.answers('loadvm "nope"')[0])
    assert "extraneous" in hmp_text.error_in(recording.answers("savevm a b")[0])
    assert recording.answers("nosuch")[0].startswith("unknown command")
    blocked = hmp_text.error_in(recording.answers("savevm blocked")[0])
    assert "non-migratable device" in blocked


def test_warnings_are_not_errors() -> None:
    """What HMP says to a loadvm on ppc64 that is done, and to one that is not."""
    warned = "warning: TCG doesn't support requested feature, cap-cfpc=workaround\r\n"
    assert hmp_text.error_in(warned * 2) == ""
    assert "nothing there" in hmp_text.error_in(f"{warned}Error: nothing there\r\n")


def test_run_states(recording: Recording) -> None:
    states = [hmp_tables.runstate(answer) for answer in recording.answers("info status")]
    assert states[:3] == [RunState.RUNNING, RunState.RUNNING, RunState.PAUSED]


def test_migration(recording: Recording) -> None:
    capabilities = recording.answers("info migrate_capabilities")[0]
    before, after, plugged = (hmp_tables.migration(info, capabilities) for info in recording.answers("info migrate"))
    assert before.status in (None, "none")
    assert after.status == "completed"
    assert after.blocked_reasons == ()
    assert [reason.rpartition("/")[2] for reason in plugged.blocked_reasons] == (
        ["usb-mtp"] if recording.version >= (6, 0) else []  # older ones do not tell
    )
    on = capabilities.replace("multifd: off", "multifd: on")
    assert hmp_tables.migration("", on).capabilities == {"multifd"}


def test_the_error_of_a_migration() -> None:
    """As 10.0 and 11.1 print it; of one that was cancelled they tell nothing."""
    why = "ram_save_setup failed: Input/output error"
    for head in ("globals:\nMigration status: ", "Status: \t\t"):
        failed, cancelled, completed = (
            hmp_tables.migration(f"{head}{status}\ntotal time: 0 ms\n", "")
            for status in (f"failed ({why})", "cancelled", "completed")
        )
        assert (failed.status, failed.error) == ("failed", why)
        assert (cancelled.status, cancelled.error) == ("cancelled", None)
        assert (completed.status, completed.error) == ("completed", "")


def test_other_answers(recording: Recording) -> None:
    assert hmp_tables.memory_size(recording.answers("info memory_size_summary")[0]) == 16 << 20
    assert "pc.ram" in hmp_tables.objects(recording.answers("qom-list /objects")[0])
    assert json.loads(recording.answers("qom-get /machine/peripheral/vd0 type")[0]) == "virtio-blk-pci"


def test_the_block_graph(recording: Recording) -> None:
    backends = recording.answers("info block")[-1]
    qdevs = hmp_tables.attached_to(backends)
    graph = hmp_tables.block_graph(
        backends, recording.answers("info block -n -v")[0], {qdevs[0]: "ide-hd"}, recording.version
    )
    ide, cd, virtio = graph.backends
    assert (ide.name, ide.qdev_type, ide.removable) == ("ide0-hd0", "ide-hd", False)
    assert (cd.name, cd.root, cd.removable) == ("cd", None, True)
    assert (virtio.name, virtio.root, virtio.label) == ("", "top", "vd0")
    assert graph.nodes["top"].children == (("file", "a"),)
    assert graph.nodes["a"].children == (("file", "file-a"),)
    assert dict(graph.nodes[ide.root or ""].children).keys() == {"file", "backing"}
    base = dict(graph.nodes[ide.root or ""].children)["backing"]
    assert (graph.nodes[base].driver, graph.nodes[base].read_only) == ("qcow2", True)
    assert "spare" not in graph.with_parents
    assert {"a", "file-a", "top", base} <= graph.with_parents
    assert graph.nodes["a"].refcount_bits == 16
    assert not graph.nodes["a"].external_data_file
    survey = rules.survey(graph)
    assert [(d.node, d.verdict.value) for d in survey.devices] == [
        (ide.root, "saved"), (None, "ignored"), ("top", "saved"), ("spare", "saved"),
    ]  # fmt: skip
    assert survey.vmstate == ide.root


def test_a_device_without_a_medium() -> None:
    """7.2 calls a drive that has neither a name nor a node by its device."""
    text = "cd0: [not inserted]\n    Attached to:      cd0\n    Removable device: not locked, tray closed\n"
    (backend,) = hmp_tables.block_graph(text, "", {}, QemuVersion(7, 2, 0)).backends
    assert (backend.name, backend.qdev, backend.removable, backend.root) == ("", "cd0", True, None)


def test_an_inactive_image(recording: Recording) -> None:
    """As a migration leaves it; told from 10.0 on (block-hmp-cmds.c: print_block_info)."""
    nodes = recording.answers("info block -n -v")[0]
    (header,) = (line for line in nodes.splitlines() if line.startswith("a: "))
    nodes = nodes.replace(header, header.replace("(qcow2)", "(qcow2, inactive)"))
    graph = hmp_tables.block_graph(recording.answers("info block")[-1], nodes, {}, recording.version)
    assert [name for name, node in graph.nodes.items() if not node.active] == ["a"]
    top = next(device for device in rules.survey(graph).devices if device.node == "top")
    assert top.verdict == "refused"


def test_the_snapshots_of_each_node(recording: Recording) -> None:
    graph = hmp_tables.block_graph(
        recording.answers("info block")[-1], recording.answers("info block -n -v")[0], {}, recording.version
    )
    root = graph.backends[0].root or ""
    for node in (root, "a", "top"):
        rows = graph.nodes[node].snapshots
        assert rows[0].tag.startswith("vm-2")
        assert [row.tag for row in rows[1:-1]] == TAGS
        assert rows[-1].tag == "savevm (qemu)"  # its last blank is not to be seen
        assert [row.id for row in rows] == [str(number) for number in range(1, len(TAGS) + 3)]
        assert all((row.vm_state_size > 100_000) == (node == root) for row in rows)
        assert all(row.vm_clock_ns < 60e9 for row in rows)
        assert len({row.date for row in rows}) <= 3


def test_info_snapshots_has_the_same_rows(recording: Recording) -> None:
    _, header, *rows = recording.answers("info snapshots")[-1].splitlines()
    layout = hmp_tables.table_layout(header, recording.version)
    assert layout is not None
    read_rows = [hmp_tables.snapshot_row(row, layout) for row in rows]
    assert [row.tag for row in read_rows[1:-1]] == TAGS
    assert {row.id for row in read_rows} == {"--"}


# What QEMU's source makes of anything.

VERSIONS = [
    QemuVersion(5, 2, 0),
    QemuVersion(7, 2, 22),
    QemuVersion(8, 2, 0),
    QemuVersion(9, 0, 0),
    QemuVersion(11, 1, 3),
]
characters = st.characters(exclude_categories=("Cs", "Cc"))
tags = st.one_of(
    st.text(characters, min_size=1, max_size=255),
    st.text(" 0123456789-:.KMGiB", min_size=1, max_size=60),
    st.text(' "\\\'$`;|&<>*?%(){}[]#~!', min_size=1, max_size=40),
    st.sampled_from(["1", "--", "(qemu)", "-x", "427 KiB", "Images:", "image: /a", "Format specific information:",
                     "ID        TAG               VM SIZE", "None", "Error: x"]),
).filter(lambda tag: tag_problem(tag) is None)  # fmt: skip
sizes = st.sampled_from(["0 B", "999 B", "1 KiB", "427 KiB", "2.95 MiB", "1e+03 KiB", "16 EiB"])
moments = st.integers(100_000, 4_000_000_000).map(
    lambda second: datetime.fromtimestamp(second, UTC).replace(tzinfo=None)
)


def padded(text: str, width: int) -> str:
    """C's ``%-*s`` and ``%*s``: it counts bytes."""
    return text + " " * (width - len(text.encode())) if width >= 0 else " " * (-width - len(text.encode())) + text


def printed(
    version: QemuVersion, row_id: str, tag: str, size: str, moment: datetime, clock_ms: int, icount: str
) -> str:
    seconds, ms = divmod(clock_ms, 1000)
    hours, minutes = divmod(seconds // 60, 60)[0], seconds // 60 % 60
    date = moment.strftime("%Y-%m-%d %H:%M:%S")
    if version >= (9, 0):
        clock = f"{hours:04d}:{minutes:02d}:{seconds % 60:02d}.{ms:03d}"
        columns = (padded(row_id, 7), padded(tag, 16), padded(size, -8), padded(date, -19), padded(clock, -15),
                   padded(icount or "--", -10))  # fmt: skip
        return " ".join(columns)
    clock = f"{hours:02d}:{minutes:02d}:{seconds % 60:02d}.{ms:03d}"
    tag_width, size_width = (17, -7) if version < (6, 0) else (16, -8)
    return (
        f"{padded(row_id, 9)} {padded(tag, tag_width)} {padded(size, size_width)}{padded(date, -20)}"
        f"{padded(clock, -13)}{padded(icount, -11)}"
    )


def layout_of(version: QemuVersion) -> hmp_tables.TableLayout:
    old = "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"
    new = "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
    layout = hmp_tables.table_layout(new if version >= (9, 0) else old, version)
    assert layout is not None
    return layout


@pytest.mark.timeout(900)
@many
@given(
    version=st.sampled_from(VERSIONS),
    number=st.integers(1, 999_999),
    tag=tags,
    size=sizes,
    moment=moments,
    clock_ms=st.integers(0, 9999 * 3600 * 1000),
    icount=st.one_of(st.just(""), st.integers(0, 10**9).map(str)),
)
def test_no_wrong_tag(
    version: QemuVersion, number: int, tag: str, size: str, moment: datetime, clock_ms: int, icount: str
) -> None:
    line = printed(version, str(number), tag, size, moment, clock_ms, icount)
    row = hmp_tables.snapshot_row(line, layout_of(version))
    if hmp_text.tag_obstacle(tag) == hmp_text.tag_obstacle("x "):
        assert row.tag == tag.rstrip(" ")
    else:
        assert row.tag == tag or len(tag.encode()) == 17 > len(tag.rstrip(" ").encode())  # 5.2's column is wider
    assert (row.id, row.vm_clock_ns) == (str(number), clock_ms * 1_000_000)
    assert row.date.replace(tzinfo=None) == moment
    assert row.vm_state_size == int(float(size.split()[0]) * 1024 ** "BKMGTPE".index(size.split()[1][0]))


@few
@given(line=st.text(characters, max_size=120), version=st.sampled_from(VERSIONS))
def test_what_is_no_row_is_an_error(line: str, version: QemuVersion) -> None:
    with suppress(MonitorError):
        row = hmp_tables.snapshot_row(line, layout_of(version))
        assert row.tag in line


def echo(line: bytes) -> bytes:
    """What readline sends back while *line* is typed: it draws the line anew for each byte."""
    drawn = b""
    for length in range(1, len(line) + 1):
        drawn += b"\x1b[D" * (length - 1) + line[:length] + b"\x1b[K"
    return drawn


@pytest.mark.timeout(900)
@many
@given(data=st.data())
def test_no_wrong_answer(data: Any) -> None:
    """An echo stream in pieces, with a prompt or the number of another line wherever the text may hold one."""
    tag = data.draw(tags.map(lambda tag: tag[:40]))  # the echo grows with its square
    number = data.draw(st.integers(0, 2**62))
    assume(hmp_text.tag_obstacle(tag) is None)
    pieces = st.sampled_from(
        ["(qemu) ", "\r\n(qemu) ", "\r\n", f"{number:#x}", f"print {number:#x}", "\x1b[K", "Error: x", "é"]
    )
    text = "".join(data.draw(st.lists(pieces, max_size=8))).replace(f"\r\n{number:#x}\r\n", "")
    assume(f"\r\n{number:#x}\r\n" not in f"\r\n{text}\r\n")
    text += "\r\n" if text else ""
    command, sentinel, end = hmp_text.typed(f"savevm {hmp_text.quoted(tag)}", number).split(b"\n")
    assert end == b""
    stream = (
        b"(qemu) " + echo(command) + b"\r\n" + text.encode()
        + b"(qemu) " + echo(sentinel) + b"\r\n" + b"%#x\r\n" % number
    )  # fmt: skip
    for cut in sorted(data.draw(st.lists(st.integers(0, len(stream) - 1), max_size=5))):
        assert hmp_text.answer(stream[:cut], number) in (None, (text.replace("\r\n", "\n"), b""))
    assert hmp_text.answer(stream + b"(qemu) ", number) == (text.replace("\r\n", "\n"), b"(qemu) ")


@few
@given(backends=st.text(max_size=200), nodes=st.text(max_size=400))
def test_no_graph_out_of_nonsense(backends: str, nodes: str) -> None:
    with suppress(MonitorError):
        hmp_tables.block_graph(backends, nodes, {}, QemuVersion(7, 2, 0))


@few
@given(data=st.data())
def test_a_damaged_graph_is_an_error_or_a_graph(data: Any) -> None:
    """Lines of a real answer, left out, doubled and mixed."""
    recorded = read(data.draw(st.sampled_from(RECORDINGS)))
    lines = recorded.answers("info block -n -v")[0].splitlines()
    for _ in range(data.draw(st.integers(0, 6))):
        place, other = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, len(lines) - 1))
        lines[place : place + 1] = data.draw(st.sampled_from([[], [lines[place]] * 2, [lines[other]], [""]])) or [""]
    with suppress(MonitorError):
        hmp_tables.block_graph(recorded.answers("info block")[-1], "\n".join(lines), {}, recorded.version)


@pytest.mark.parametrize("tag", ["\u00db", "caf\u00e9 \u26db", "a ", "\n"])
def test_tags_that_hmp_would_make_others_of(tag: str) -> None:
    assert hmp_text.tag_obstacle(tag)
    if tag != "a ":
        with pytest.raises(NotSupported):
            hmp_text.typed(f"savevm {tag}", 1)


@pytest.mark.parametrize("tag", ["a", "é", "x" * 254 + " ", 'q"\\', " a", "1"])
def test_tags_that_hmp_can_take(tag: str) -> None:
    assert hmp_text.tag_obstacle(tag) is None
    assert hmp_text.typed(tag, 10) == tag.encode() + b"\nprint 0xa\n"
