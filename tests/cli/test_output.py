"""What commands show, by the type of the result."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime

import pytest

import qsnap
from qsnap.cli.output import results, text
from qsnap.cli.output.lines import Aside, Cut, Table
from qsnap.cli.output.people import lines_of
from qsnap.cli.output.results import Outcome, Outcomes, Recoveries, Snapshots
from qsnap.cli.output.show import show
from qsnap.errors import QsnapError
from qsnap.model.checks import CheckReport, Device, Role, Verdict
from qsnap.model.qemu import RunState, Struct
from qsnap.model.snapshots import Kind, Position, Snapshot, Tree
from qsnap.targets.choose import KnownVM, SeveralVMs

pytestmark = pytest.mark.no_qemu


def is_struct(member: object) -> bool:
    return isinstance(member, type) and issubclass(member, Struct)


def test_every_result_is_known() -> None:
    """Those of the library, and those that the command line makes of them."""
    own = {one for _, one in inspect.getmembers(results, is_struct) if one.__module__ == results.__name__}
    named = {one for name in qsnap.__all__ if is_struct(one := getattr(qsnap, name)) and name.endswith("Result")}
    assert len(own) > 5
    assert len(named) > 2
    assert own | named <= lines_of.registry.keys()


def test_a_result_that_is_not_known_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    class New(Struct, frozen=True):
        number: int

    with pytest.raises(NotImplementedError):
        show(New(number=1))
    show(New(number=1), as_json=True)
    assert capsys.readouterr().out == '{"number": 1}\n'


def test_what_is_said_of_several_vms_names_them() -> None:
    """On standard error too; and a VM's name is data."""
    vms = (
        Outcome("web", Snapshots(snapshots=())),
        Outcome("d\nb", Recoveries(recovered=())),
        Outcome("bad", QsnapError("no\nmore")),
    )
    assert list(lines_of(Outcomes(vms=vms))) == [
        Aside("web: no snapshots"), Aside("d\\nb: nothing to recover"), Aside("bad: no\nmore"),
    ]  # fmt: skip


def test_of_several_vms_that_are_meant_each_can_be_chosen() -> None:
    """Also where that is one of several names."""
    one = KnownVM(running=None, config="web", monitor=None, selector="web")
    error, table = lines_of(Outcomes(vms=(Outcome("web", SeveralVMs("2 VMs", [one, one])),)))
    assert error == Aside("web: 2 VMs")
    assert isinstance(table, Table)
    assert len(table.rows) == 2


def in_tree(*family: tuple[str, str | None], here: str | None = None, deleted: tuple[str, ...] = ()) -> list[str]:
    """The tree of snapshots of these tags and parents, without dates."""
    made = datetime(2026, 11, 26, tzinfo=UTC)
    snapshots = tuple(
        Snapshot(tag=tag, kind=Kind.FULL, vm_state_size=1, date=made, vm_clock_ns=0, vmstate="a", devices=("a",),
                 parent=parent)
        for tag, parent in family
    )  # fmt: skip
    lines = [
        line.text if isinstance(line, Cut) else str(line)
        for line in lines_of(Tree(snapshots=snapshots, position=Position(tag=here, deleted=deleted)))
    ]
    return [line.replace(f"  {text.date(made)}", "") for line in lines]


def test_a_tree_is_set_in_only_where_it_branches() -> None:
    """So a series is not a staircase; what was made from nothing that is there is behind a gap."""
    assert in_tree(
        ("root", ""), ("one", "root"), ("two", "one"), ("fork", "one"), ("three", "two"), ("other", ""), here="three"
    ) == ["root", "one", "\u251c\u2500\u2500 two", "\u2502   three", "\u2502   * you are here",
          "\u2514\u2500\u2500 fork", "", "other"]  # fmt: skip
    assert in_tree(("a", None), ("b", None), here=None, deleted=("y", "x")) == [
        "a  (its parent is not known)", "b  (its parent is not known)", "",
        "* you are here (after y, which is deleted)",
    ]  # fmt: skip
    long = [("t0", ""), *((f"t{number}", f"t{number - 1}") for number in range(1, 3000))]
    lines = in_tree(*long, here="t2999")
    assert lines == [*(tag for tag, _ in long), "* you are here"]
    forks = [("t0", ""), *((f"{kind}{number}", f"t{number - 1}") for number in range(1, 1100) for kind in "tu")]
    assert len(in_tree(*forks)) == len(forks) + 2


@pytest.mark.parametrize(("device", "heads"), [("database-data-9", "DEVICE DRIVER"), ("", "NODE DEVICE DRIVER")])
def test_a_device_is_a_line_at_80_columns(device: str, heads: str) -> None:
    """Its node-name goes first, if it can be named otherwise."""
    devices = (
        Device(node="#block1983", device="database-data-9", driver="qcow2", role=Role.DISK, verdict=Verdict.SAVED,
               image="#block1983"),
        Device(node="#block99", device=device, driver="raw", role=Role.NODE, verdict=Verdict.IGNORED, why="empty"),
    )  # fmt: skip
    report = CheckReport(ok=True, runstate=RunState.RUNNING, devices=devices, findings=(), vmstate="#block1983")
    table = next(iter(lines_of(report)))
    assert isinstance(table, Table)
    fitted = table._fitting(80)
    assert " ".join(column.head for column in fitted.columns).startswith(heads)
    assert not device or sum(fitted._widths()) + 2 * (len(fitted.columns) - 1) <= 80
