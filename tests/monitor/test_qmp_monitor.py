"""Snapshot jobs over QMP, against a server of our own: what QEMU tells of them only now and then."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qsnap.errors import CommandFailed, JobFailed
from qsnap.monitor.address import TcpAddress
from qsnap.monitor.connection import connection
from qsnap.monitor.protocol import NO_FILES
from qsnap.monitor.qmp import monitor as monitors
from qsnap.monitor.qmp.monitor import LegacyQmpMonitor, QmpMonitor
from support.guest import DEADLINE_S
from support.qmp_server import Server, event, failed, returned, serving

pytestmark = pytest.mark.no_qemu

#: Whom no process has.
NOBODY = 1 << 22


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path) as one:
        yield one


@pytest.fixture
async def monitor(server: Server) -> AsyncIterator[QmpMonitor]:
    opened = await connected(server)
    yield opened
    await opened.aclose()


async def connected(server: Server, snapshot_jobs: bool | None = None) -> QmpMonitor:
    async with connection(server.address, DEADLINE_S) as link:
        return await monitors.connect(link, server.address, snapshot_jobs)


class Jobs:
    """The jobs of a QEMU: each is what is given, until it is dismissed."""

    def __init__(self, server: Server, *jobs: dict[str, str]) -> None:
        self.rows = list(jobs)
        #: What a new job is.
        self.new = {"status": "concluded"}
        server.answer = self.answer

    def answer(self, message: dict[str, Any]) -> bytes | None:
        command, arguments = message["execute"], message.get("arguments", {})
        if command == "query-jobs":
            return returned(message, self.rows)
        if command.startswith("snapshot-"):
            self.rows.append({"id": arguments["job-id"], "type": command, **self.new})
        if command == "job-dismiss":
            self.rows = [row for row in self.rows if row["id"] != arguments["id"]]
        return None


def asked(server: Server) -> list[str]:
    return [message["execute"] for message in server.asked[1:]]


def job(pid: int, number: int, status: str = "concluded", **more: str) -> dict[str, str]:
    return {"id": f"qsnap-save-{pid}-{number}", "type": "snapshot-save", "status": status, **more}


async def test_which_it_is(server: Server) -> None:
    for version, wanted, kind in (
        (b"7", None, QmpMonitor),
        (b"5", None, LegacyQmpMonitor),
        (b"6", None, QmpMonitor),
        (b"7", False, LegacyQmpMonitor),
        (b"5", True, QmpMonitor),
    ):
        server.greeting = server.greeting.replace(b'"major": 7', b'"major": ' + version)
        monitor = await connected(server, wanted)
        assert type(monitor) is kind
        server.greeting = server.greeting.replace(b'"major": ' + version, b'"major": 7')
        await monitor.aclose()


async def test_where_files_can_be_handed_over(monitor: QmpMonitor) -> None:
    assert monitor.live_obstacle == ""
    monitor.address = TcpAddress("localhost", 44)
    assert monitor.live_obstacle == NO_FILES


async def test_what_is_said_in_one_command(server: Server, monitor: QmpMonitor) -> None:
    await monitor.reset()
    await monitor.add_mark("m", "text")
    await monitor.delete_object("m")
    assert server.asked[1:] == [
        {"execute": "system_reset", "id": server.asked[1]["id"]},
        {
            "execute": "object-add",
            "arguments": {"qom-type": "authz-simple", "id": "m", "identity": "text"},
            "id": server.asked[2]["id"],
        },
        {"execute": "object-del", "arguments": {"id": "m"}, "id": server.asked[3]["id"]},
    ]


async def test_a_job_that_concludes(server: Server, monitor: QmpMonitor) -> None:
    """It is dismissed behind the block, and nothing of it is left."""
    jobs = Jobs(server, job(os.getpid(), 1, "running"))
    async with monitor.snapshot_load("t", "a", ["a", "b"]) as failure:
        assert failure is None
        assert "job-dismiss" not in asked(server)
    assert asked(server) == ["snapshot-load", "query-jobs", "job-dismiss"]
    assert server.asked[1]["arguments"] | {"job-id": ""} == {
        "job-id": "", "tag": "t", "vmstate": "a", "devices": ["a", "b"],
    }  # fmt: skip
    assert await monitor.settle() is None
    assert len(asked(server)) == 3
    assert len(jobs.rows) == 1


async def test_a_job_that_fails(server: Server, monitor: QmpMonitor) -> None:
    jobs = Jobs(server)
    jobs.new = {"status": "concluded", "error": "why"}
    with pytest.raises(JobFailed, match="why") as error:
        async with monitor.snapshot_load("t", "a", ["a"]) as failure:
            pass
    assert error.value is failure
    with pytest.raises(JobFailed, match="why"):
        await monitor.snapshot_save("t", "a", ["a"])
    with pytest.raises(JobFailed, match="why"):
        await monitor.snapshot_delete("t", ["a"])
    assert jobs.rows == []
    assert await monitor.settle() is None


async def test_a_job_that_does_not_begin(server: Server, monitor: QmpMonitor) -> None:
    """What QEMU has said is told, and nothing is waited for."""
    server.answer = lambda message: failed(message, "GenericError")
    with pytest.raises(CommandFailed, match="why"):
        await monitor.snapshot_save("t", "a", ["a"])
    assert await monitor.settle() is None
    assert asked(server) == ["snapshot-save"]


async def test_a_job_that_another_client_has_dismissed(server: Server, monitor: QmpMonitor) -> None:
    server.answer = lambda message: returned(message, [] if message["execute"] == "query-jobs" else {})
    with pytest.raises(JobFailed, match="its job has vanished"):
        await monitor.snapshot_save("t", "a", ["a"])
    assert asked(server) == ["snapshot-save", "query-jobs"]
    assert await monitor.settle() is None


async def test_a_job_that_does_not_end(server: Server, monitor: QmpMonitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled, and dismissed. Whether that can be done is another question."""
    monkeypatch.setattr(monitors, "STUCK_POLLS", 2)
    monkeypatch.setattr(monitors, "POLL_S", 0.01)
    jobs = Jobs(server)
    jobs.new = {"status": "running"}
    with pytest.raises(JobFailed, match="its job does not end; QEMU answers, and calls it running"):
        await monitor.snapshot_save("t", "a", ["a"])
    assert asked(server) == ["snapshot-save", "query-jobs", "query-jobs", "job-cancel", "job-dismiss"]

    def answer(message: dict[str, Any]) -> bytes | None:
        return failed(message, "GenericError") if message["execute"].startswith("job-") else jobs.answer(message)

    server.answer = answer
    with pytest.raises(JobFailed, match="its job does not end"):
        await monitor.snapshot_save("t", "a", ["a"])
    assert asked(server)[-2:] == ["job-cancel", "job-dismiss"]


async def test_an_event_wakes_it_up(server: Server, monitor: QmpMonitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks it waits for one, however long."""
    monkeypatch.setattr(monitors, "STUCK_POLLS", 3)
    monkeypatch.setattr(monitors, "POLL_S", 1000)
    jobs = Jobs(server)
    jobs.new = {"status": "running"}

    def conclude() -> None:
        jobs.rows[0]["status"] = "concluded"
        server.clients[-1].write(event("JOB_STATUS_CHANGE", id=jobs.rows[0]["id"], status="concluded"))

    def answer(message: dict[str, Any]) -> bytes | None:
        if message["execute"] == "query-jobs" and asked(server).count("query-jobs") == 1:
            asyncio.get_running_loop().call_soon(conclude)
        return jobs.answer(message)

    server.answer = answer
    async with asyncio.timeout(DEADLINE_S):
        await monitor.snapshot_save("t", "a", ["a"])
    assert asked(server).count("query-jobs") == 2


async def test_the_jobs_of_a_dead_process(server: Server, monitor: QmpMonitor) -> None:
    """They are waited for, and dismissed; the first error is told."""
    jobs = Jobs(
        server, job(7, 1), job(8, 2, error="of another"), job(7, 3, error="first"), job(7, 4, error="second"), job(7, 5)
    )
    await monitor.take_over(7)
    assert "first" in str(await monitor.settle())
    assert [row["id"] for row in jobs.rows] == ["qsnap-save-8-2"]
    assert await monitor.settle() is None
    await monitor.take_over(8)
    outcome = await monitor.load_outcome(JobFailed("x", "doubt"), was_running=True)
    assert "of another" in str(outcome)


async def test_jobs_that_nobody_waits_for(server: Server, monitor: QmpMonitor) -> None:
    """Those of qsnaps that do not run any more, and have concluded."""
    Jobs(
        server, job(NOBODY, 1), job(NOBODY, 2, "running"), job(os.getpid(), 3), job(os.getppid(), 4),
        {"id": "other", "type": "mirror", "status": "concluded"},
    )  # fmt: skip
    left = await monitor.leftover_jobs()
    assert [one.id for one in left] == [f"qsnap-save-{NOBODY}-1"]
    await monitor.dismiss(left)
    assert [one["arguments"] for one in server.asked if one["execute"] == "job-dismiss"] == [{"id": left[0].id}]


@pytest.mark.parametrize("edges", [None, [], [1]], ids=["not told", "no job", "a job"])
async def test_when_it_is_asked_for_block_jobs(server: Server, monitor: QmpMonitor, edges: list[int] | None) -> None:
    """Where there is one; or where that is not told."""
    nodes = [{"id": number, "type": "block-job", "name": "j"} for number in edges or ()]

    def answer(message: dict[str, Any]) -> bytes | None:
        if message["execute"] == "x-debug-query-block-graph":
            if edges is None:
                return failed(message, "CommandNotFound")
            return returned(message, {"nodes": nodes, "edges": []})
        if message["execute"] == "query-jobs":
            return returned(message, [{"id": "j", "type": "mirror", "status": "running"}])
        if message["execute"] == "query-block":
            return returned(message, [{"device": "", "qdev": "vd0", "removable": False}])
        return returned(message, "virtio-blk-pci" if message["execute"] == "qom-get" else [])

    server.answer = answer
    graph = await monitor.block_graph()
    assert [one.id for one in graph.jobs] == ([] if edges == [] else ["j"])
    assert monitor.qdev_types == {"vd0": "virtio-blk-pci"}


async def test_it_is_tidied_up(server: Server, monitor: QmpMonitor) -> None:
    server.answer = lambda message: returned(message, [])
    await monitor.tidy()
    assert asked(server) == ["query-named-block-nodes", "query-fdsets"]
