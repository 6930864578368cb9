"""What a live save says to QEMU, in QEMU's words and order, against a server of our own: what it says only in need."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qsnap.errors import CommandFailed, JobFailed
from qsnap.monitor.connection import connection
from qsnap.monitor.names import STATE_NODE
from qsnap.monitor.qmp import background as backgrounds
from qsnap.monitor.qmp.background import UNBOUNDED, Background
from qsnap.monitor.qmp.channel import Channel, negotiated
from support.guest import DEADLINE_S, open_files
from support.qmp_server import FILE, Server, event, failed, returned, serving

pytestmark = pytest.mark.no_qemu


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path) as one:
        yield one


@asynccontextmanager
async def opened(server: Server, major: int = 7) -> AsyncIterator[Background]:
    server.greeting = server.greeting.replace(b'"major": 7', b'"major": %d' % major)
    async with connection(server.address, DEADLINE_S) as link:
        channel = Channel(*await negotiated(link, server.address), server.address, link)
    try:
        yield Background(channel)
    finally:
        await channel.aclose()


class Told:
    """A QEMU that tells what is given for each command: the next of a list, and its last one from then on.

    :ivar refused: commands that fail.
    """

    def __init__(self, server: Server, **answers: list[object]) -> None:
        self.server = server
        self.answers = {command.replace("_", "-"): answer for command, answer in answers.items()}
        self.refused: set[str] = set()
        server.answer = self.answer

    def answer(self, message: dict[str, Any]) -> bytes | None:
        command = message["execute"]
        if command in self.refused:
            return failed(message, "GenericError")
        if command in self.answers:
            left = self.answers[command]
            return returned(message, left.pop(0) if len(left) > 1 else left[0])
        return None

    def taken(self) -> list[tuple[str, Any]]:
        """What was asked since, and with which arguments."""
        asked = [(message["execute"], message.get("arguments")) for message in self.server.asked]
        self.server.asked.clear()
        return [one for one in asked if one[0] != "qmp_capabilities"]


CAPABILITIES = [{"capability": "other", "state": True}, {"capability": "background-snapshot", "state": False}]
PARAMETERS = {"max-bandwidth": 5, "downtime-limit": 6}


def capability(state: bool) -> tuple[str, object]:
    switched = {"capabilities": [{"capability": "background-snapshot", "state": state}]}
    return "migrate-set-capabilities", switched


async def test_the_settings(server: Server) -> None:
    told = Told(server, query_migrate_capabilities=[CAPABILITIES], query_migrate_parameters=[PARAMETERS])
    async with opened(server) as background:
        settings = await background.settings()
        assert settings == {"background-snapshot": 0, "max-bandwidth": 5, "downtime-limit": 6}
        told.taken()
        await background.put_back(settings)
        await background.put_back({"background-snapshot": 1})
        await background.put_back({"downtime-limit": 7})
        await background.prepare()
    assert told.taken() == [
        capability(False),
        ("migrate-set-parameters", PARAMETERS),
        capability(True),
        ("migrate-set-parameters", {"downtime-limit": 7}),
        capability(True),
        ("migrate-set-parameters", {"max-bandwidth": UNBOUNDED}),
    ]


async def test_whether_it_can_be_done(server: Server) -> None:
    told = Told(server, query_migrate_capabilities=[CAPABILITIES], query_migrate_parameters=[PARAMETERS])
    async with opened(server) as background:
        assert await background.refused() == ""
        assert told.taken()[-2:] == [capability(True), capability(False)]
        told.refused = {"migrate-set-capabilities"}
        assert await background.refused() == "why"
        told.answers["query-migrate-parameters"] = [{**PARAMETERS, "tls-creds": "t"}]
        told.taken()
        assert "tls-creds is set (t)" in await background.refused()
    assert told.taken() == [("query-migrate-parameters", None)]


async def test_who_writes_into_memory(server: Server) -> None:
    told = Told(
        server,
        qom_list=[[{"name": "a", "type": "child<cryptodev-vhost-user>"}, {"name": "b", "type": "child<iothread>"}]],
        human_monitor_command=["hub\r\n \\ n: index=0,type=vhost-user,chardev=c\r\nm: index=0,type=tap\r\n"],
        query_memdev=[[{"share": False}], [{"share": False}, {"share": True}]],
    )
    async with opened(server) as background:
        assert await background.writers() == ["object 'a'", "netdev 'n'"]
        assert [await background.shares_memory() for _ in range(2)] == [False, True]
    assert told.taken()[0] == ("qom-list", {"path": "/objects"})


async def test_snapshots_of_disks(server: Server) -> None:
    told = Told(server)
    async with opened(server) as background:
        await background.snapshot_disks("t", ["a", "b"])
        assert told.taken() == [
            ("transaction", {"actions": [
                {"type": "blockdev-snapshot-internal-sync", "data": {"device": "a", "name": "t"}},
                {"type": "blockdev-snapshot-internal-sync", "data": {"device": "b", "name": "t"}},
            ]}),
        ]  # fmt: skip
        told.refused = {"transaction"}
        with pytest.raises(JobFailed, match="blockdev-snapshot-internal-sync failed: why"):
            await background.snapshot_disks("t", ["a"])


@pytest.mark.parametrize(
    ("major", "commands"),
    [
        (8, [(FILE, None), ("getfd", {"fdname": STATE_NODE}), ("migrate", {"uri": f"fd:{STATE_NODE}"})]),
        (9, [(FILE, None), ("add-fd", {"opaque": STATE_NODE}), ("migrate", {"uri": "file:/dev/fdset/3,offset=77"})]),
    ],
)
async def test_a_stream_begins(server: Server, tmp_path: Path, major: int, commands: list[tuple[str, object]]) -> None:
    """At its offset; with no event of a time before."""
    told = Told(server, add_fd=[{"fdset-id": 3}])
    file = os.open(tmp_path / "state", os.O_WRONLY | os.O_CREAT)
    try:
        async with opened(server, major) as background:
            assert background.is_before_9 == (major < 9)
            server.clients[0].write(event("STOP"))
            await background.begin_stream(file, 77)
            assert told.taken() == commands
            assert os.lseek(file, 0, os.SEEK_CUR) == (77 if major < 9 else 0)
            assert background.stop_resume_events() == ()
            server.clients[0].write(event("STOP"))
            await background.stream()
            assert background.stop_resume_events() == (("STOP", 5.25),)
            background.forget_stop_resume_events()
            assert background.stop_resume_events() == ()
            told.refused = {"migrate"}
            with pytest.raises(JobFailed, match="migrate failed: why"):
                await background.begin_stream(file, 0)
    finally:
        os.close(file)


async def test_how_far_a_stream_is(server: Server) -> None:
    ram = {"total": 100, "remaining": 30, "normal": 4, "duplicate": 5}
    Told(server, query_migrate=[{}, {"status": "active", "ram": ram}, {"status": "failed", "error-desc": "why"}])
    async with opened(server) as background:
        found = [await background.stream() for _ in range(3)]
    assert found == [(None, 0, 0, 0, ""), ("active", 70, 100, 9, ""), ("failed", 0, 0, 0, "why")]
    assert [one.is_over for one in found] == [True, False, True]


@pytest.mark.parametrize(("major", "cancels"), [(8, 0), (9, 2)])
async def test_the_end_of_a_stream(server: Server, monkeypatch: pytest.MonkeyPatch, major: int, cancels: int) -> None:
    """It is cancelled where that harms nothing: neither the guest, nor QEMU while it sets it up."""
    monkeypatch.setattr(backgrounds, "_POLL_S", 0)
    statuses = ["setup", "setup", "active", "cancelling", "cancelled", "active"]
    told = Told(server, query_migrate=[{"status": status} for status in statuses])
    told.refused = {"migrate_cancel"}
    async with opened(server, major) as background:
        await background.end_stream()
    commands = [command for command, _ in told.taken()]
    assert commands.count("query-migrate") == 5
    assert commands[3:].count("migrate_cancel") == commands.count("migrate_cancel") == cancels


async def test_a_failure_is_forgotten(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a migration that is begun, so slow that it never ends, and cancelled."""
    monkeypatch.setattr(backgrounds, "_POLL_S", 0)
    spoiling, idle = {"status": "failed", "error-desc": "why"}, {"status": "cancelled"}
    told = Told(
        server,
        query_migrate=[spoiling, {"status": "active"}, idle],
        query_migrate_capabilities=[CAPABILITIES],
        query_migrate_parameters=[PARAMETERS],
        query_named_block_nodes=[[]],
        query_fdsets=[[{"fdset-id": 3, "fds": [{"opaque": STATE_NODE}]}]],
        add_fd=[{"fdset-id": 3}],
    )
    async with opened(server, 11) as background:
        before = open_files()
        await background.forget_failure()
        assert open_files() == before
        commands = [one for one in told.taken() if not one[0].startswith("query-")]
        slow = {"max-bandwidth": 1000, "downtime-limit": 0}
        assert commands == [
            capability(False),
            ("migrate-set-parameters", slow),
            (FILE, None),
            ("add-fd", {"opaque": STATE_NODE}),
            ("migrate", {"uri": "file:/dev/fdset/3,offset=0"}),
            ("migrate_cancel", None),
            ("remove-fd", {"fdset-id": 3}),
        ]
        await background.forget_failure()
        assert [one for one in told.taken() if not one[0].startswith("query-")] == []


@pytest.mark.parametrize("what", ["mode", "capability", "it stays"])
async def test_a_failure_that_cannot_be_forgotten(server: Server, what: str) -> None:
    """Not where that migration would stop the guest."""
    on = [{"capability": "x-ignore-shared", "state": True}]
    told = Told(
        server,
        query_migrate=[{"status": "failed", "error-desc": "why"}],
        query_migrate_capabilities=[CAPABILITIES + (on if what == "capability" else [])],
        query_migrate_parameters=[{**PARAMETERS, "mode": "cpr-reboot" if what == "mode" else "normal"}],
        query_named_block_nodes=[[]],
        query_fdsets=[[]],
        add_fd=[{"fdset-id": 3}],
    )
    async with opened(server, 11) as background:
        with pytest.raises(JobFailed, match="QEMU goes on to note that a migration has failed: why"):
            await background.forget_failure()
    assert [command for command, _ in told.taken()].count("migrate") == (5 if what == "it stays" else 0)


async def test_the_states_of_the_devices(server: Server) -> None:
    """Into a file that QEMU forgets, whether it has written it or not."""
    told = Told(server, add_fd=[{"fdset-id": 12}])
    async with opened(server) as background:
        before = open_files()
        assert await background.device_states() == b""
        commands = [
            (FILE, None),
            ("add-fd", {"opaque": STATE_NODE}),
            ("xen-save-devices-state", {"filename": "/dev/fdset/12", "live": False}),
            ("remove-fd", {"fdset-id": 12}),
        ]
        assert told.taken() == commands
        told.refused = {"xen-save-devices-state"}
        with pytest.raises(CommandFailed, match="why"):
            await background.device_states()
        assert told.taken() == commands
        assert open_files() == before


async def test_nodes_of_state_files(server: Server, tmp_path: Path) -> None:
    """They and their files are removed, as far as that can be done; what is not ours stays."""
    mine, other = f"{STATE_NODE}-12ab", "disk"
    told = Told(
        server,
        add_fd=[{"fdset-id": 3}],
        query_named_block_nodes=[[{"node-name": mine}, {"node-name": other}, {}]],
        query_fdsets=[[
            {"fdset-id": 3, "fds": [{}, {"opaque": STATE_NODE}]}, {"fdset-id": 4, "fds": [{"opaque": "x"}]},
            {"fdset-id": 5, "fds": [{"opaque": STATE_NODE}]},
        ]],
    )  # fmt: skip
    async with opened(server) as background:
        with (tmp_path / "state").open("wb") as file:
            await background.add_state_node(file.fileno(), mine)
            below = {"driver": "file", "filename": "/dev/fdset/3"}
            image = {"driver": "qcow2", "node-name": mine, "file": below, "backing": None}
            assert told.taken() == [(FILE, None), ("add-fd", {"opaque": STATE_NODE}), ("blockdev-add", image)]
            told.refused = {"blockdev-add"}
            with pytest.raises(JobFailed, match="blockdev-add failed: why"):
                await background.add_state_node(file.fileno(), mine)
        told.taken()
        removals = [("remove-fd", {"fdset-id": 3}), ("remove-fd", {"fdset-id": 5})]
        told.refused = {"blockdev-del", "remove-fd"}
        await background.tidy()
        assert told.taken() == [
            ("query-named-block-nodes", {"flat": True}), ("blockdev-del", {"node-name": mine}), ("query-fdsets", None),
            *removals,
        ]  # fmt: skip
        await background.close_lingering_files()
        assert told.taken() == [("query-fdsets", None), *removals]

        def broken(message: dict[str, Any]) -> bytes | None:
            text = failed(message, "GenericError").replace(b"why", f"{mine}: broken".encode())
            return text if message["execute"] == "query-named-block-nodes" else told.answer(message)

        server.answer = broken
        await background.tidy()
        assert told.taken()[1] == ("blockdev-del", {"node-name": mine})


async def test_files_that_qemu_closes_by_itself(server: Server) -> None:
    told = Told(server)
    async with opened(server, 10) as background:
        await background.close_lingering_files()
    assert told.taken() == []
