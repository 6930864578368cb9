"""What commands show, by the type of the result."""

from __future__ import annotations

import inspect

import pytest

import qsnap
from qsnap.cli.output import results
from qsnap.cli.output.lines import Aside
from qsnap.cli.output.people import lines_of
from qsnap.cli.output.results import Outcome, Outcomes, Recoveries, Snapshots
from qsnap.cli.output.show import show
from qsnap.errors import QsnapError
from qsnap.model.qemu import Struct

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
