"""A monitor in memory, for faults that QEMU will not produce on demand. It passes the contract test too."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from qsnap.errors import CommandFailed, JobFailed, NotSupported, QsnapError
from qsnap.model.qemu import (
    BlockBackend,
    BlockGraph,
    BlockJob,
    BlockNode,
    Job,
    Migration,
    NodeSnapshot,
    Peripheral,
    QemuVersion,
    RunState,
    SnapshotTables,
)
from qsnap.monitor.address import Address, UnixAddress
from qsnap.monitor.protocol import NO_FILES
from qsnap.monitor.qmp.background import Background


@dataclass
class FakeMonitor:
    """A guest with two qcow2 disks. The fields below are the faults."""

    address: Address = field(default=UnixAddress("/nowhere"))

    cont_fails: bool = False
    save_hangs: bool = False
    delete_does_nothing: bool = False
    #: Node-names that a save forgets.
    forgets: frozenset[str] = frozenset()
    #: A disk appears when the guest stops.
    hot_plugs: bool = False
    #: A mirror of disk1 begins when the guest stops.
    mirrors: bool = False
    #: The clock stands still there.
    now: datetime | None = None

    version: QemuVersion = field(default=QemuVersion(11, 1, 0))
    transport: str = "fake"
    who: str = "the fake"
    chooses_devices: bool = True
    live_obstacle: str = NO_FILES
    pid: int | None = None
    sock: socket.socket | None = None

    state: RunState = RunState.RUNNING
    texts: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[NodeSnapshot]] = field(default_factory=lambda: {"disk0": [], "disk1": []})
    calls: list[str] = field(default_factory=list)
    jobs: tuple[BlockJob, ...] = ()

    @property
    def live(self) -> Background:
        raise NotSupported("live snapshots take QMP")

    def tag_obstacle(self, tag: str) -> str | None:
        return None

    async def runstate(self) -> RunState:
        return self.state

    async def stop(self) -> float | None:
        self.calls.append("stop")
        self.state = RunState.PAUSED
        if self.hot_plugs:
            self.rows["disk2"] = []
        if self.mirrors:
            self.jobs = (BlockJob(id="j", type="mirror", status="running", nodes=(("source", "disk1"),)),)
        return None

    async def cont(self) -> float | None:
        self.calls.append("cont")
        if self.cont_fails:
            raise CommandFailed("cont", "There is a dump in process, please wait.")
        self.state = RunState.RUNNING
        return None

    async def reset(self) -> None:
        self.calls.append("reset")
        self.state = RunState.PRELAUNCH

    async def name(self) -> str:
        return ""

    async def human_answer(self, line: str) -> str:
        return "kvm support: enabled\r\n" if line == "info kvm" else ""

    async def block_graph(self) -> BlockGraph:
        await asyncio.sleep(0)
        return BlockGraph(
            nodes={
                name: BlockNode(node_name=name, driver="qcow2", snapshots=tuple(rows))
                for name, rows in self.rows.items()
            },
            backends=tuple(BlockBackend(qdev=f"/machine/peripheral/{name}", root=name) for name in self.rows),
            with_parents=frozenset(self.rows),
            chooses_devices=self.chooses_devices,
            jobs=self.jobs,
            peripherals=(
                Peripheral(path="/machine/peripheral/vd0", model="virtio-blk-pci"),
                Peripheral(path="/machine/peripheral-anon/device[0]", model="virtio-blk-pci"),
            ),
        )

    async def snapshot_tables(self) -> SnapshotTables:
        return {name: node.snapshots for name, node in (await self.block_graph()).nodes.items()}

    async def migration(self) -> Migration:
        return Migration()

    async def memory_size(self) -> int:
        return 32 << 20

    async def snapshot_save(self, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        self.calls.append("save")
        if self.save_hangs:
            await asyncio.Event().wait()
        row = NodeSnapshot(tag=tag, id="1", vm_state_size=0, date=self.now or datetime.now(UTC), vm_clock_ns=1)
        for name in devices:
            if name not in self.forgets:
                size = 1 << 20 if name == vmstate else 0
                self.rows[name].append(msgspec.structs.replace(row, vm_state_size=size))

    @asynccontextmanager
    async def snapshot_load(self, tag: str, vmstate: str, devices: Sequence[str]) -> AsyncIterator[JobFailed | None]:
        self.calls.append("load")
        failure = None
        if not all(any(row.tag == tag for row in self.rows[name]) for name in devices):
            failure = JobFailed("snapshot-load", f"Snapshot '{tag}' does not exist in one or more devices")
        yield failure
        if failure:
            raise failure

    async def snapshot_delete(self, tag: str, devices: Sequence[str]) -> None:
        self.calls.append("delete")
        for name in devices if not self.delete_does_nothing else ():
            first = next((row for row in self.rows[name] if row.tag == tag), None)
            if first is not None:
                self.rows[name].remove(first)

    async def marks(self, prefixes: tuple[str, ...]) -> Sequence[str]:
        return [name for name in self.texts if name.startswith(prefixes)]

    async def mark(self, name: str) -> str | None:
        return self.texts.get(name)

    async def set_mark(self, name: str, text: str) -> bool:
        return self.texts.setdefault(name, text) is text

    async def clear_mark(self, name: str) -> None:
        self.texts.pop(name, None)

    async def take_over(self, pid: int) -> None:
        pass

    async def settle(self) -> QsnapError | None:
        return None

    async def load_outcome(self, doubt: QsnapError, *, was_running: bool) -> QsnapError | None:
        ended_well = self.chooses_devices or (was_running and self.state is RunState.RUNNING)
        return None if ended_well else doubt

    async def leftover_jobs(self) -> Sequence[Job]:
        return ()

    async def dismiss(self, jobs: Sequence[Job]) -> None:
        pass

    async def tidy(self) -> None:
        pass

    async def reconnect(self, timeout_s: float) -> None:
        pass

    async def aclose(self) -> None:
        pass
