"""Verify: whether snapshots are whole, found out while the guest runs on.

Of each snapshot these are looked at:

* The VM state, from the first byte to the last one: every page of every RAM block has come, every device's section is
  closed, and the description at the end names the same devices.
* The tables: of a state file all that qsnap wrote around the state; of each image those of the snapshot.
* With *read_data* all that is stored for it is read, and compared with checksums. The first time there are none yet,
  and they are written down.

Nothing of that changes while the snapshot is there. So no claim is needed, and QEMU is asked for its block nodes alone.
If something seems to be damaged, the VM is looked at again: another client may have deleted the snapshot.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qsnap.errors import NotSupported
from qsnap.inventory import descriptors, machine, snapshots, state_file, vm_state
from qsnap.inventory.clusters import StoredSnapshot
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.qcow2 import Damaged, NotThere, Unreadable
from qsnap.inventory.state_store import StateStore
from qsnap.inventory.stream import LONGEST_FRAME, Broken, Stream, Unknown
from qsnap.inventory.vm_state import Place, VmState
from qsnap.model.machine import Machine
from qsnap.model.results import Verified, VerifyResult
from qsnap.model.snapshots import Kind, Snapshot
from qsnap.operations.progress import INTERVAL_S, Phase, Progress, Watcher, cannot_watch
from qsnap.runs.run import Run
from qsnap.runs.shield import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_PIECE = 1 << 20
assert _PIECE > LONGEST_FRAME
#: The key of a state file's checksum; those of images have the images' file names.
STATE = "vm-state"


class Found(NamedTuple):
    """What came of one snapshot.

    :ivar checksums: of what was read, by the image's file name, or :data:`STATE`.
    """

    verified: Verified
    checksums: Mapping[str, str]


async def verify(
    run: Run, chosen: Sequence[Snapshot], inventory: Inventory, *, read_data: bool, watch: Watcher | None = None
) -> tuple[VerifyResult, Mapping[str, Mapping[str, str]]]:
    """Verify snapshots, one after another. The guest is not touched.

    :param inventory: the VM, with the *chosen* ones in it.
    :param read_data: read all data, and compare them with checksums.
    :param watch: called with how far it has come.
    :return: the result; and the checksums that are not written down yet, by tag.
    """
    found = []
    new: dict[str, Mapping[str, str]] = {}
    async with _watched(watch, sum(one.vm_state_size for one in chosen)) as counted:
        for snapshot in chosen:
            known = inventory.notes.of(snapshot).checksums
            checks = _Checks(run, inventory, snapshot, known, read_data=read_data, counted=counted)
            one = await in_thread(checks.run)
            if one.verified.problems and not await _is_there(run, snapshot):
                continue
            found.append(one.verified)
            if not one.verified.problems and (added := one.checksums.keys() - known.keys()):
                new[snapshot.tag] = {name: one.checksums[name] for name in added}
    return VerifyResult(snapshots=tuple(found), read_data=read_data), new


async def _is_there(run: Run, snapshot: Snapshot) -> bool:
    now = (await run.look()).find(snapshot.tag)
    return now is not None and (now.date, now.vm_clock_ns) == (snapshot.date, snapshot.vm_clock_ns)


async def machine_of(run: Run, snapshot: Snapshot, inventory: Inventory) -> Machine:
    """The machine that a snapshot's VM state is of. The guest is not touched.

    :raise NotSupported: it has no VM state, or that cannot be read from here.
    """

    def read() -> Machine:
        with _state(run.store, run.monitor.pid, inventory, snapshot) as state:
            return machine.of_state(state).machine

    if not snapshot.has_state:
        raise NotSupported(f"snapshot {snapshot.tag!r} has no VM state")
    try:
        return await asyncio.to_thread(read)
    except (Unreadable, Unknown, OSError) as error:
        raise NotSupported(f"the VM state of {snapshot.tag!r} cannot be read: {_why(error)}") from error


@contextmanager
def _state(store: StateStore, pid: int | None, inventory: Inventory, snapshot: Snapshot) -> Iterator[VmState]:
    """A snapshot's VM state, for the duration of a block."""
    with ExitStack() as stack:
        where: Place | int | None
        if snapshot.file is not None:
            where = store.opened(snapshot.file)
            stack.callback(os.close, where)
        else:
            where = vm_state.place(pid, inventory.graph, snapshot)
        state = vm_state.of_snapshot(snapshot, where)
        stack.callback(state.close)
        yield state


class _Checks:
    """The checks of one snapshot, for a thread."""

    def __init__(
        self,
        run: Run,
        inventory: Inventory,
        snapshot: Snapshot,
        known: Mapping[str, str],
        *,
        read_data: bool,
        counted: Callable[[int], None],
    ) -> None:
        self._store = run.store
        self._pid = run.monitor.pid
        self._inventory = inventory
        self._snapshot = snapshot
        self._known = known
        self._reads = read_data
        self._counted = counted
        self._problems = [*snapshot.problems]
        self._unchecked: list[str] = []
        self._checksums: dict[str, str] = {}
        self._compared = 0

    def run(self, ended: threading.Event) -> Found:
        """Do all of them."""
        snapshot = self._snapshot
        if snapshot.missing:
            names = ", ".join(self._inventory.displayed(snapshot.missing))
            self._problems.append(f"it is partial: {names} lacks it")
        if snapshot.file is not None:
            self._check_state_file(ended)
        elif snapshot.has_state:
            self._check_state(vm_state.place(self._pid, self._inventory.graph, snapshot), ended)
        elif snapshot.kind is Kind.STATE_ONLY:
            self._problems.append("its disks' snapshots are gone")
        for node in snapshot.devices:
            self._check_disk(node, ended)
        return Found(
            Verified(
                tag=snapshot.tag,
                ok=False if self._problems else None if self._unchecked else True,
                problems=tuple(self._problems),
                unchecked=tuple(self._unchecked),
                compared=self._compared,
                recorded=len(self._checksums) - self._compared if not self._problems else 0,
            ),
            self._checksums,
        )

    def _check_state_file(self, ended: threading.Event) -> None:
        snapshot = self._snapshot
        assert snapshot.file is not None
        if not snapshot.file.is_whole or snapshot.file.is_foreign:
            self._problems.append(f"its state file {snapshot.file.path}{snapshot.file.trouble.removeprefix('it')}")
            return
        try:
            file = self._store.opened(snapshot.file)
        except OSError as error:
            self._unchecked.append(f"its state file {snapshot.file.path} cannot be opened: {error.strerror}")
            return
        try:
            if flaw := state_file.flaw(lambda size, offset: os.pread(file, size, offset), os.fstat(file).st_size):
                self._problems.append(f"its state file {snapshot.file.path} is damaged: {flaw}")
            self._check_state(file, ended)
        except OSError as error:
            self._problems.append(f"its state file {snapshot.file.path} cannot be read: {error.strerror}")
        finally:
            os.close(file)

    def _check_state(self, where: Place | int | None, ended: threading.Event) -> None:
        try:
            state = vm_state.of_snapshot(self._snapshot, where)
        except (Damaged, NotThere) as error:
            self._problems.append(f"its VM state: {error}")
            return
        except (Unreadable, OSError) as error:
            self._unchecked.append(f"its VM state: {_why(error)}")
            return
        try:
            try:
                self._problems += (f"its VM state: {flaw}" for flaw in flaws(state, ended, self._counted))
            except Unknown as error:
                self._unchecked.append(f"its VM state is not as QEMU is known to write it: {error}")
            if self._reads and isinstance(where, int) and not self._problems:
                self._compare(STATE, "its VM state", lambda: checksum(state, ended))
        finally:
            state.close()

    def _check_disk(self, node: str, ended: threading.Event) -> None:
        graph = self._inventory.graph
        (label,) = self._inventory.displayed([node])
        rows = graph.nodes[node].tagged(self._snapshot.disk_tag)
        image = descriptors.way(self._pid, graph, node) or descriptors.block_device(self._pid, graph, node)
        if image is None or len(rows) != 1:
            self._unchecked.append(f"{label}: its image cannot be seen from here")
            return
        name, _ = snapshots.chain_of(graph, node)
        try:
            with _opened(image) as file:
                stored = StoredSnapshot(file, rows[0])
                if flaws := {*stored.flaws()}:  # QEMU may have been writing a table of the disk in use
                    flaws.intersection_update(StoredSnapshot(file, rows[0]).flaws())
                self._problems += (f"{label}: {flaw}" for flaw in sorted(flaws))
                if self._reads and not self._problems:
                    self._compare(name, label, lambda: stored.checksum(ended.is_set))
        except (Damaged, NotThere) as error:
            self._problems.append(f"{label}: {error}")
        except Unreadable as error:
            self._unchecked.append(f"{label}: {error}")
        except PermissionError as error:
            self._unchecked.append(f"{label}: {error.strerror}")
        except OSError as error:
            self._problems.append(f"{label}: its image cannot be read: {error.strerror}")

    def _compare(self, key: str, what: str, checksum: Callable[[], str]) -> None:
        self._checksums[key] = checksum()
        if (known := self._known.get(key)) is not None:
            self._compared += 1
            if known != self._checksums[key]:
                self._problems.append(f"{what}: its data are not those that were read when it was first verified")


class _opened:  # noqa: N801 (used as a function)
    """An image, open for the duration of a block."""

    def __init__(self, image: Path) -> None:
        self._file = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)

    def __enter__(self) -> int:
        return self._file

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def flaws(state: VmState, ended: threading.Event, counted: Callable[[int], None]) -> Iterator[str]:
    """What is wrong with a VM state, a clause each.

    :raise Unknown: it is not as QEMU is known to write it.
    """
    stream = Stream(None)
    buffer = memoryview(bytearray(_PIECE))
    begin = 0
    try:
        while begin < state.size:
            if ended.is_set():
                raise Unreadable("it was not read to its end")
            _, length = stream.parts(buffer[: state.read(buffer, begin)])
            if not length:
                yield f"it ends in the middle of its RAM, at byte {begin:,} of {state.size:,}"
                return
            begin += length
            counted(length)
        for block, pages in stream.missing().items():
            yield f"{pages} pages of the RAM block {block} are missing"
        machine.of_state(state)
    except Broken as error:
        yield str(error) if stream.is_at_devices else f"at byte {begin:,} or behind it: {error}"
    except OSError as error:
        yield f"it cannot be read: {error.strerror}"


def checksum(state: VmState, ended: threading.Event) -> str:
    """SHA-256 of a VM state.

    :raise Unreadable: it was to end.
    """
    import hashlib

    sum_ = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    done = 0
    while done < state.size:
        if ended.is_set():
            raise Unreadable("it was not read to its end")
        got = state.read(buffer, done)
        sum_.update(buffer[:got])
        done += got
    return sum_.hexdigest()


@asynccontextmanager
async def _watched(watch: Watcher | None, expected: int) -> AsyncIterator[Callable[[int], None]]:
    """A counter of bytes for the duration of a block; *watch* is called with what it counted, every 0.1 s."""
    done = 0

    def counted(size: int) -> None:
        nonlocal done
        done += size

    async def look(watch: Watcher) -> None:
        began = time.monotonic()
        while True:
            watch(Progress(Phase.VERIFYING, time.monotonic() - began, done, max(expected, 1)))
            await asyncio.sleep(INTERVAL_S)

    looking = asyncio.ensure_future(look(watch)) if watch else None
    try:
        yield counted
    finally:
        if looking:
            looking.cancel()
            await asyncio.wait([looking])
            if not looking.cancelled() and (error := looking.exception()):
                cannot_watch(error)
