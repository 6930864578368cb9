"""The rules of the devices, on block graphs without a QEMU."""

from __future__ import annotations

import msgspec
import pytest

from qsnap.inventory import devices as rules
from qsnap.model.qemu import BlockBackend, RunState
from qsnap.operations.findings import runstate_findings
from support.graphs import graph, node

pytestmark = pytest.mark.no_qemu


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
        assert survey.devices[0].role == ("disk" if model == "virtio-blk" else "pflash")
    by_hmp = rules.survey(msgspec.structs.replace(plain, backends=backends, chooses_devices=False))
    assert by_hmp.devices[0].verdict == "refused"


def test_what_lies_below_an_image() -> None:
    """A node that nothing is told to lie below is not itself what stores the image."""
    known = graph(node("q", children=(("file", "p"),)), node("p", "file", filename="/p"))
    assert (rules.protocol(known, "q"), rules.protocol(known, "p")) == (known.nodes["p"], None)


def test_names_for_a_command_line() -> None:
    assert rules.for_shell("disk0", "drive0") == "disk0"
    assert rules.for_shell("#block123", "drive0") == "drive0"
    assert rules.for_shell("#block123") == "'#block123'"
