"""What a live save needs of QMP: background snapshots, disk snapshots on their own, files handed to QEMU.

Facts (QEMU's migration/options.c, migration.c, file.c, fd.c; measured on 7.2, 10.0 and 11.1):

* The capability ``background-snapshot`` (6.0 and later) is refused with a sentence that says why.
* A stream to a file begins at an offset by ``file:…,offset=N`` (8.2 and later). Before, and up to 10.x, ``fd:`` takes
  any descriptor that ``getfd`` was given.
* In 7.2 RAM stays write-protected after a background snapshot that failed or was cancelled (ram_write_tracking_stop
  is in bg_migration_completion alone): the guest hangs at its next write, for good. 10.0 and 11.1 do not have that;
  what is between them is taken for the worse.
* Up to 8.2 QEMU resumes the guest by itself when it has taken the device state. From 9.0 on it leaves a guest that was
  stopped before as it is. The status "active" comes before that; pages in the stream come after it.
* In 10.0 and 11.1 a background snapshot that fails or is cancelled while it is set up (status "setup") makes QEMU
  close its file descriptor 0, whatever that is by then: a monitor, or a disk's image (ram.c: ram_write_tracking_stop
  closes uffdio_fd, which is 0 as long as nothing was write-protected; seen).
* A migration begins with no error noted, and notes one when it fails, or is cancelled while it is set up. From then on
  until the next begins any load fails at its end (savevm.c: qemu_loadvm_state; seen in 10.0 and 11.1, not in 7.2).
* ``/dev/fdset/N`` names a descriptor that ``add-fd`` was given, in place of any file name; only one of the same access
  mode. ``remove-fd`` closes a set at once. In 7.2 it does so only if the guest runs; a set that was removed before
  that is closed by another ``remove-fd``, or when a monitor's connection ends, once the guest runs
  (monitor_fdset_cleanup). 10.0 and 11.1 do not have that; versions between 7.2 and 10.0 are
  treated like 7.2.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from qsnap.errors import CommandFailed, JobFailed
from qsnap.host import files
from qsnap.model import outside
from qsnap.model.qemu import MIGRATION_IDLE
from qsnap.monitor.connection import understood
from qsnap.monitor.hmp import tables as hmp_tables
from qsnap.monitor.names import STATE_NODE
from qsnap.monitor.qmp import replies
from qsnap.monitor.qmp.channel import Channel

#: Bytes a second; QEMU's own bound of it.
UNBOUNDED = (1 << 63) - 1
#: The first version that does not resume the guest by itself.
RESUMED_BY_US_SINCE = (9, 0)
#: The first version that certainly closes a removed file whether the guest runs or not.
_REMOVED_AT_ONCE_SINCE = (10, 0)

_CAPABILITY = "background-snapshot"
_BANDWIDTH = "max-bandwidth"
_DOWNTIME = "downtime-limit"
_POLL_S = 0.02
#: Bytes a second of a stream that is never to end. One that is less than a byte a tenth of a second has no bound.
_SLOW = 1000
#: Streams that are begun to have QEMU forget an error; the first one did in all of 40 trials.
_FORGETTING_TRIES = 5


class Stream(NamedTuple):
    """How far the stream has come.

    :ivar status: QEMU's MigrationStatus; None before the first.
    :ivar done: bytes of RAM that are written, zeroes among them.
    :ivar total: bytes of RAM.
    :ivar pages: of RAM in the stream: when there is one, the device state has been taken.
    :ivar error: QEMU's sentence, where it failed.
    """

    status: str | None
    done: int
    total: int
    pages: int
    error: str

    @property
    def is_over(self) -> bool:
        """Whether nothing is under way."""
        return self.status in MIGRATION_IDLE


class Background:
    """The verbs of a live save, on the channel to a QEMU 6.0 or later.

    :ivar is_before_9: QEMU resumes the guest by itself when it has taken the device state; and a stream that fails or
        is cancelled leaves the guest hanging.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.is_before_9 = channel.version < RESUMED_BY_US_SINCE

    async def settings(self) -> dict[str, int]:
        """What a live save and :meth:`forget_failure` change, as it is now: to be given to :meth:`put_back`."""
        capabilities, parameters = await asyncio.gather(
            self._channel.query(list[replies.CapabilityStatus], "query-migrate-capabilities"),
            self._channel.query(replies.MigrateParameters, "query-migrate-parameters"),
        )
        known = {item.capability: item.state for item in capabilities}
        with understood("query-migrate-capabilities"):
            is_on = known[_CAPABILITY]
        return {
            _CAPABILITY: int(is_on),
            _BANDWIDTH: parameters.max_bandwidth,
            _DOWNTIME: parameters.downtime_limit,
        }

    async def refused(self) -> str:
        """Why this QEMU, its kernel or its memory cannot do background snapshots, in its own words; "" if they can.

        It is asked by switching the capability on, and off again if it was off.
        """
        parameters = await self._channel.query(replies.MigrateParameters, "query-migrate-parameters")
        if parameters.tls_creds:
            return f"the migration parameter tls-creds is set ({parameters.tls_creds}), and a file speaks no TLS"
        before = await self.settings()
        try:
            await self.put_back({_CAPABILITY: 1})
        except CommandFailed as error:
            return error.reason
        await self.put_back({_CAPABILITY: before[_CAPABILITY]})
        return ""

    async def writers(self) -> Sequence[str]:
        """What writes into guest memory from outside QEMU, and is not one of the guest's devices, in words."""
        objects, networks = await asyncio.gather(
            self._channel.query(list[replies.ObjectPropertyInfo], "qom-list", {"path": "/objects"}),
            self._channel.human_answer("info network"),
        )
        return [
            *(f"object {one.name!r}" for one in objects if outside.writes_ram(one.type.removeprefix("child<"))),
            *(f"netdev {name!r}" for name in hmp_tables.outside_networks(networks)),
        ]

    async def memdevs(self) -> Sequence[replies.Memdev]:
        """The memory backends."""
        return await self._channel.query(list[replies.Memdev], "query-memdev")

    async def shares_memory(self) -> bool:
        """Whether other processes could have mapped guest memory."""
        return any(one.share for one in await self.memdevs())

    async def prepare(self) -> None:
        """Switch background snapshots on, and the bound of the stream's speed off."""
        await self.put_back({_CAPABILITY: 1, _BANDWIDTH: UNBOUNDED})

    async def put_back(self, settings: Mapping[str, int]) -> None:
        """Set what :meth:`settings` returned."""
        if _CAPABILITY in settings:
            capability = {"capability": _CAPABILITY, "state": bool(settings[_CAPABILITY])}
            await self._channel.execute("migrate-set-capabilities", {"capabilities": [capability]})
        if parameters := {name: settings[name] for name in (_BANDWIDTH, _DOWNTIME) if name in settings}:
            await self._channel.execute("migrate-set-parameters", parameters)

    async def snapshot_disks(self, tag: str, devices: Sequence[str]) -> None:
        """Take a snapshot of all *devices* at once, or of none.

        :param devices: root nodes, which no other node uses (blockdev.c: qmp_get_root_bs): QEMU goes down through
            filters to the image by itself.
        :raise JobFailed: QEMU reported an error; no device has it.
        """
        kind = "blockdev-snapshot-internal-sync"
        actions = [{"type": kind, "data": {"device": node, "name": tag}} for node in devices]
        try:
            await self._channel.execute("transaction", {"actions": actions})
        except CommandFailed as error:
            raise JobFailed(kind, error.reason) from error

    async def begin_stream(self, file: int, offset: int) -> None:
        """Have QEMU write its state to *file*, which can only be written, from *offset* on.

        :raise JobFailed: QEMU will not.
        """
        if self.is_before_9:
            os.lseek(file, offset, os.SEEK_SET)
            await self._channel.send_file(file)
            await self._channel.execute("getfd", {"fdname": STATE_NODE})
            uri = f"fd:{STATE_NODE}"
        else:
            uri = f"file:{await self._add_file(file)},offset={offset}"
        self._channel.forget_stop_resume_events()
        try:
            await self._channel.execute("migrate", {"uri": uri})
        except CommandFailed as error:
            raise JobFailed("migrate", error.reason) from error

    async def stream(self) -> Stream:
        """How far it has come."""
        info = await self._channel.query(replies.MigrationInfo, "query-migrate")
        ram = info.ram or replies.MigrationRam()
        return Stream(
            status=info.status,
            done=ram.total - ram.remaining if ram.total else 0,
            total=ram.total,
            pages=ram.normal + ram.duplicate,
            error=info.error_desc,
        )

    async def end_stream(self) -> None:
        """Cancel what is under way, as soon as it may be, and wait until it is over; what may not be only ends."""
        while not (stream := await self.stream()).is_over:
            if not self.is_before_9 and stream.status != "setup":
                with suppress(CommandFailed):
                    await self._channel.execute("migrate_cancel")
            await asyncio.sleep(_POLL_S)

    async def forget_failure(self) -> None:
        """Have QEMU forget that a migration has failed, where that spoils loads.

        An ordinary migration is begun and cancelled, which the guest does not notice: so slow a one never comes to the
        point where it would stop the guest. Its settings stay: :meth:`put_back` is to follow.

        :raise JobFailed: QEMU does not forget it.
        """
        for _ in range(_FORGETTING_TRIES):
            migration = await self._channel.migration()
            if not migration.spoils_loads(self._channel.version):
                return
            parameters = await self._channel.query(replies.MigrateParameters, "query-migrate-parameters")
            if parameters.mode != "normal" or "x-ignore-shared" in migration.capabilities:
                break  # that one would stop the guest
            await self.put_back({_CAPABILITY: 0, _BANDWIDTH: _SLOW, _DOWNTIME: 0})
            await self._begin_and_cancel()
        raise JobFailed("migrate", f"QEMU goes on to note that a migration has failed: {migration.error}")

    async def device_states(self) -> bytes:
        """The stream of all devices' states alone, without RAM.

        The guest should be stopped: if it runs, QEMU stops it for that time, which is milliseconds.

        :raise CommandFailed: QEMU cannot do it.
        """
        with files.in_memory(STATE_NODE) as memory:
            with _for_writing(memory) as file:
                name = await self._add_file(file)
            try:
                # Without "live" it would inactivate the images of a stopped guest
                await self._channel.execute("xen-save-devices-state", {"filename": name, "live": False})
            finally:
                await self._channel.execute("remove-fd", {"fdset-id": int(name.rpartition("/")[2])})
            return os.pread(memory, os.fstat(memory).st_size, 0)

    async def _begin_and_cancel(self) -> None:
        with files.in_memory(STATE_NODE) as memory, _for_writing(memory) as file:
            try:
                await self.begin_stream(file, 0)
            finally:
                await self.end_stream()
                await self.tidy()

    def forget_stop_resume_events(self) -> None:
        """Forget the STOP and RESUME events so far. A stream that begins does so, too."""
        self._channel.forget_stop_resume_events()

    def stop_resume_events(self) -> Sequence[tuple[str, float]]:
        """The STOP and RESUME events since they were forgotten, with their time stamps in seconds since 1970."""
        return self._channel.stop_resume_events()

    async def add_state_node(self, file: int, node: str) -> None:
        """Make a node of an open state file. It has no backing file, whatever its header says.

        :raise JobFailed: QEMU cannot use it.
        """
        try:
            below = {"driver": "file", "filename": await self._add_file(file)}
            image = {"driver": "qcow2", "node-name": node, "file": below, "backing": None}
            await self._channel.execute("blockdev-add", image)
        except CommandFailed as error:
            raise JobFailed("blockdev-add", error.reason) from error

    async def _add_file(self, file: int) -> str:
        await self._channel.send_file(file)
        added = await self._channel.query(replies.AddedFile, "add-fd", {"opaque": STATE_NODE})
        return f"/dev/fdset/{added.fdset_id}"

    async def _state_nodes(self) -> Sequence[str]:
        """The names of our nodes. One whose image QEMU found to be broken makes it refuse to list any, and is named."""
        try:
            nodes = await self._channel.query(list[replies.NodeName], "query-named-block-nodes", {"flat": True})
        except CommandFailed as error:
            return re.findall(rf"{STATE_NODE}-[0-9a-f]+", error.reason)
        return [node.node_name for node in nodes if node.node_name.startswith(STATE_NODE)]

    async def tidy(self) -> None:
        """Remove qsnap's nodes and files from QEMU; it is not an error if there are none."""
        for name in await self._state_nodes():
            with suppress(CommandFailed):
                await self._channel.execute("blockdev-del", {"node-name": name})
        await self._remove_files()

    async def close_lingering_files(self) -> None:
        """Have QEMU close the files that it has kept because the guest did not run when they were removed."""
        if self._channel.version < _REMOVED_AT_ONCE_SINCE:
            await self._remove_files()

    async def _remove_files(self) -> None:
        for given in await self._channel.query(list[replies.FileSet], "query-fdsets"):
            if any(file.opaque == STATE_NODE for file in given.fds):
                with suppress(CommandFailed):
                    await self._channel.execute("remove-fd", {"fdset-id": given.fdset_id})


@contextmanager
def _for_writing(memory: int) -> Iterator[int]:
    """A descriptor of the same file that can only be written, for the duration of a block."""
    file = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)
