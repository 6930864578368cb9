"""The rules of block jobs, backups' filters and dirty bitmaps, on block graphs without a QEMU."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from qsnap.inventory import block_jobs
from qsnap.inventory import devices as rules
from qsnap.model.qemu import BlockBackend, BlockGraph, BlockJob
from support.graphs import graph, node, over

pytestmark = pytest.mark.no_qemu

ENDING = "block-job-cancel device=j (by HMP: block_job_cancel j)"
END_BACKUP = "end the backup, and take the filter out: by QMP, qom-set the device's drive back, then blockdev-del"


def job(kind: str, *nodes: tuple[str, str], status: str = "running") -> BlockJob:
    return BlockJob(id="j", type=kind, status=status, nodes=nodes)


def two(*jobs: BlockJob, by_hmp: bool = False, **more: Any) -> BlockGraph:
    """A guest with an empty drive, the disks "a" and "b" over "f", and "raw", which cannot be snapshotted."""
    nodes = (over("a", "qcow2", "f", **more), node("f", "file"), over("top", "throttle", "b"), node("b"),
             node("raw", "raw"))  # fmt: skip
    plain = graph(*nodes, jobs=jobs, chooses_devices=not by_hmp)
    return msgspec.structs.replace(plain, backends=(BlockBackend(name="cd"), *plain.backends))


def told(guest: BlockGraph, *going_back: str) -> dict[str, list[tuple[str, str | None, bool]]]:
    """What is found for a save, a load of these images, and a deletion: code, node, and whether it refuses."""
    devices = rules.survey(guest).devices
    found = {
        "save": block_jobs.save_findings(guest, devices),
        "load": block_jobs.load_findings(guest, devices, going_back),
        "delete": block_jobs.delete_findings(guest, devices),
    }
    return {what: [(one.code, one.node, one.refuses) for one in each] for what, each in found.items()}


@pytest.mark.parametrize("kind", ["mirror", "commit", "stream", "backup"])
def test_a_job_on_a_disk(kind: str) -> None:
    """A backup does no harm to a save. What lies below a disk is the disk's; what does not go back is no matter."""
    for place, device, image in ("a", "a", "a"), ("f", "a", "a"), ("b", "top", "b"), ("top", "top", "b"):
        guest = two(job(kind, ("main node", place)))
        warned = [] if kind == "backup" else [("block-job", device, False)]
        assert told(guest, "a", "b") == {"save": warned, "load": [("block-job", device, True)], "delete": []}
        assert told(guest, *({"a", "b"} - {image}))["load"] == []
        (finding,) = block_jobs.load_findings(guest, rules.survey(guest).devices, ["a", "b"])
        what = f"a backup runs on {image} (block job 'j')" if kind == "backup" else f"block job 'j' ({kind}) works on"
        assert finding.message.startswith(what)
        assert image in finding.message
        patience = "wait for its end, or " if kind == "backup" else "end it first: "
        assert finding.cure == patience + ENDING
        obstacle = block_jobs.live_obstacle(guest, rules.survey(guest).devices)
        assert obstacle.startswith(f"while {what}")
        assert obstacle.endswith(f": wait for its end, or {ENDING}")
    elsewhere = two(job(kind, ("main node", "raw")))
    assert told(elsewhere, "a", "b") == {"save": [], "load": [], "delete": []}
    assert block_jobs.live_obstacle(elsewhere, rules.survey(elsewhere).devices) == ""


@pytest.mark.parametrize("kind", ["mirror", "backup"])
def test_a_qemu_that_takes_all_disks(kind: str) -> None:
    """It fails beside a job. HMP does not tell which disk that works on, nor whether it has ended."""
    deletion = [("block-job", None, True)] if kind == "backup" else []
    for status, more in (("running", ""), ("", "; if it has ended: job-dismiss id=j, by QMP")):
        guest = two(job(kind, status=status), by_hmp=True)
        found = told(guest, "a", "b")
        assert found == {"save": [("block-job", None, True)], "load": [("block-job", None, True)], "delete": deletion}
        assert told(guest)["load"] == []
        (finding,) = block_jobs.save_findings(guest, rules.survey(guest).devices)
        ended = ", or has ended and was not dismissed" if more else ""
        assert finding.message == f"block job 'j' ({kind}) is under way{ended}: QEMU's savevm cannot save beside it"
        assert finding.cure == f"wait for its end, or {ENDING}{more}"
    # QEMU 5.2 tells by QMP, but takes all disks
    known = two(job(kind, ("main node", "raw")), by_hmp=True)
    assert told(known, "a", "b") == {"save": [("block-job", None, True)], "load": [], "delete": deletion}
    (finding,) = block_jobs.save_findings(known, rules.survey(known).devices)
    assert " raw" in finding.message


def test_the_filter_of_a_backup() -> None:
    """One that belongs to a job goes with that; where HMP tells of a job, it may be any."""
    below = node("cbw", "copy-before-write", children=(("file", "q"), ("target", "t")))
    mine, hidden = job("backup", ("main node", "cbw")), job("backup")
    refusal = ("backup-filter", "top", True)
    for jobs, by_hmp, save, load, delete in (
        ((), False, [], [refusal], []),
        ((), True, [refusal], [refusal], [refusal]),
        ((mine,), False, [], [("block-job", "top", True)], []),
        ((hidden,), True, [("block-job", None, True)], [("block-job", None, True)], [("block-job", None, True)]),
    ):
        nodes = (over("top", "throttle", "cbw"), below, node("q"), node("t", "raw"))
        guest = graph(*nodes, jobs=jobs, chooses_devices=not by_hmp)
        assert told(guest, "q") == {"save": save, "load": load, "delete": delete}
        assert told(guest)["load"] == []
        devices = rules.survey(guest).devices
        obstacle = block_jobs.live_obstacle(guest, devices)
        what = "block job 'j' (backup) is under way" if hidden in jobs else "a backup runs on q (block job 'j')"
        working = f"while {what}: wait for its end, or {ENDING}"
        assert obstacle == (working if jobs else f"while the filter cbw is above q: {END_BACKUP}")
        left_out = rules.survey(guest, exclude=["top"]).devices
        assert block_jobs.live_obstacle(guest, left_out) == ""
        if not jobs:
            assert list(block_jobs.save_findings(guest, left_out)) == []
    (finding,) = block_jobs.load_findings(graph(*nodes), rules.survey(graph(*nodes)).devices, ["q"])
    assert (finding.message, finding.cure) == (
        "the filter cbw is above q, for a backup: its copy would be of two moments", END_BACKUP
    )  # fmt: skip


@pytest.mark.parametrize("by_hmp", [False, True])
def test_dirty_bitmaps(by_hmp: bool) -> None:
    """On the image or above it. One without a name is a job's or a filter's, and said if nothing of that is seen."""
    named = two(dirty_bitmaps=("one", "", "more"), by_hmp=by_hmp)
    warned, refused = [("dirty-bitmaps", "a", False)], [("dirty-bitmaps", "a", True)]
    assert told(named, "a", "b") == {"save": warned, "load": refused, "delete": []}
    assert told(named, "b")["load"] == []
    (finding,) = block_jobs.save_findings(named, rules.survey(named).devices)
    assert finding.message == "a has dirty bitmaps (more, one): no snapshot can be loaded while it has"
    assert list(block_jobs.save_findings(named, rules.survey(named, exclude=["a"]).devices)) == []
    above = graph(over("top", "throttle", "q", dirty_bitmaps=("tool",)), node("q"))
    assert told(above, "q")["load"] == [("dirty-bitmaps", "top", True)]

    nameless = two(dirty_bitmaps=("",), by_hmp=by_hmp)
    assert told(nameless, "a", "b") == {"save": [], "load": refused, "delete": []}
    (finding,) = block_jobs.load_findings(nameless, rules.survey(nameless).devices, ["a", "b"])
    assert "They have no name" in finding.message
    working = two(job("mirror", ("main node", "a")), dirty_bitmaps=("",))
    assert told(working, "a", "b")["load"] == [("block-job", "a", True)]
    other = two(job("mirror", ("main node", "b")), dirty_bitmaps=("",))
    assert told(other, "a", "b")["load"] == [("block-job", "top", True), ("dirty-bitmaps", "a", True)]
    filtered = graph(over("top", "copy-before-write", "q"), node("q", dirty_bitmaps=("",)))
    assert told(filtered, "q")["load"] == [("backup-filter", "top", True)]
