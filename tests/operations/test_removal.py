"""What may be removed, where part of it cannot be seen from here. No QEMU: a block graph, and files beside an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsnap.errors import PrecheckRefused
from qsnap.inventory import protection
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.notes import SUFFIX, Note
from qsnap.inventory.state_file import Content
from qsnap.inventory.state_store import StateStore
from qsnap.model.checks import Finding
from qsnap.model.qemu import BlockGraph, NodeSnapshot
from qsnap.monitor.names import PROTECTED
from qsnap.operations.removal import refuse_removal
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.graphs import graph, node
from support.state_files import DATE, written

pytestmark = pytest.mark.no_qemu


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """An image that this process has open, as a QEMU would."""
    path = tmp_path / "disk"
    path.touch()
    with path.open("rb"):
        yield path


def beside(image: Path) -> BlockGraph:
    """A guest with that image, and with one that cannot be seen from here."""

    def row(tag: str, number: int, size: int = 0) -> NodeSnapshot:
        return NodeSnapshot(tag=tag, id=str(number), vm_state_size=size, date=DATE, vm_clock_ns=number * 1_000_000)

    rows = (
        row("full", 1, 9),
        row("disks", 2),
        *(row(tag, 3 + n) for n, tag in enumerate(("live", "cut", "link", "mixed"))),
    )
    return graph(
        node("a", snapshots=rows, children=(("file", "below"),)), node("below", "file", filename=str(image)),
        node("far", children=(("file", "net"),)), node("net", "nbd"),
    )  # fmt: skip


async def refused(image: Path, tag: str, **how: Any) -> str:
    """The code of what refuses it."""
    finding = await refusal(image, tag, **how)
    return "" if finding is None else finding.code


async def refusal(
    image: Path, tag: str, *, ignores_unseen: bool = False, told: bool = True, mark: str = ""
) -> Finding | None:
    store = StateStore(os.getpid(), ignores_unseen=ignores_unseen)
    inventory = Inventory(beside(image), store)
    marks = [mark] if mark else []
    if told:
        marks.append(protection._noted(inventory.graph, inventory.devices))
    monitor = FakeMonitor(texts=dict.fromkeys(marks, "yes"))
    try:
        await refuse_removal(Run(monitor, store), inventory, (tag,), "deleted", alone=True)
    except PrecheckRefused as error:
        (finding,) = error.findings
        return finding
    return None


async def test_what_may_be_a_live_one(image: Path) -> None:
    """What has RAM is none; what has a state file is one, however much is left of that."""
    files = {tag: image.with_name(f"disk.{tag}.qsnap") for tag in ("live", "cut", "link", "mixed", "alone")}
    for number, tag in enumerate(("live", "cut", "mixed")):
        written(files[tag], Content(tag if tag != "mixed" else "else", str(image), 9, DATE, (3 + number) * 1_000_000))
    os.truncate(files["cut"], files["cut"].stat().st_size // 2)
    files["link"].symlink_to(files["live"])
    written(files["alone"], Content("alone", str(image), 9, DATE, 7))  # its disks' snapshots are gone
    found = {
        tag: await refused(image, tag) for tag in ("full", "disks", "live", "cut", "link", "mixed", "none", "alone")
    }
    assert found == {
        "full": "", "disks": "unseen-state-file", "live": "", "cut": "", "link": "state-file-link",
        "mixed": "state-file-mixed-up", "none": "", "alone": "",
    }  # fmt: skip
    assert {await refused(image, tag, ignores_unseen=True) for tag in found} == {""}


async def test_what_may_be_protected(image: Path) -> None:
    assert await refused(image, "full", told=False) == "unseen-notes"
    assert await refused(image, "full", told=False, ignores_unseen=True) == ""
    head = protection._digest("full", 1)
    assert await refused(image, "full", mark=f"{PROTECTED}{head}-x", ignores_unseen=True) == "protected"


async def test_what_the_notes_tell(image: Path) -> None:
    """Whom they protect, marks or none; and where the state file of a live one was put."""
    inventory = Inventory(beside(image), StateStore(os.getpid()))
    noted = (
        Note(tag="full", date=0, vm_clock_ms=1, protected=True),
        Note(tag="disks", date=0, vm_clock_ms=2, state_dir="/elsewhere"),
    )
    inventory.notes.write(
        image.with_name(f"disk{SUFFIX}"), noted, [*inventory.under("full"), *inventory.under("disks")]
    )
    assert await refused(image, "full", ignores_unseen=True) == "protected"
    finding = await refusal(image, "disks")
    assert finding is not None
    assert "its state file was put into /elsewhere" in finding.message
    assert await refused(image, "disks", ignores_unseen=True) == ""
