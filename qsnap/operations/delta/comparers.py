"""Compare by all cores: this process, and helpers that read the state and the memory themselves.

(Threads gain little: each needs the interpreter's lock several times for each piece, and waiting for it takes as long
as the work. Measured for 1 GiB with 16 MiB changed on two cores: one thread 235 ms; two 205, with a third more
processor time; two processes 150.)

Helpers are optional: what they do not answer, this process does itself.
"""

from __future__ import annotations

import os
import select
import subprocess
from collections import deque
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from qsnap.host import files, interpreter
from qsnap.inventory.extents import Extents
from qsnap.operations.delta import records
from qsnap.operations.delta.records import READY, Records

#: More helpers gain little, and would take what other guests need.
_MOST_HELPERS = 3
#: Bytes of the state for which another helper is worth its start.
_WORTHWHILE = 64 << 20
#: Requests that a helper has at a time: with a second one it need not wait for us.
_AT_A_TIME = 2
#: Seconds without any answer after which this process does what helpers were asked for.
_SILENT_S = 2.0


class Job:
    """A comparison that is asked for, as by :meth:`Records.compare`.

    :ivar found: its result; None until there is one.
    """

    __slots__ = ("address", "begin", "found", "page", "pages")

    def __init__(self, begin: int, page: int, address: int, pages: int) -> None:
        self.begin = begin
        self.page = page
        self.address = address
        self.pages = pages
        self.found: bytes | None = None


class _Helper:
    """A process that compares.

    :ivar jobs: what it has been asked for and has not answered, in this order.
    :ivar answers: the descriptor by which it answers.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.jobs: deque[Job] = deque()
        self.answers = process.stdout.fileno()
        self._requests = process.stdin.fileno()
        self._process = process
        self._is_ready = False
        self._got = bytearray()

    @property
    def has_room(self) -> bool:
        """Whether it is ready and could be asked for more."""
        return self._is_ready and len(self.jobs) < _AT_A_TIME

    def ask(self, job: Job) -> None:
        """Ask for a comparison.

        :raise OSError: it has ended.
        """
        os.write(self._requests, records.asked(job.begin, job.page, job.address, job.pages))
        self.jobs.append(job)

    def take(self) -> bool:
        """Take what it has written; False if it has ended."""
        if not (data := os.read(self.answers, 1 << 16)):
            return False
        self._got += data
        if not self._is_ready:
            self._is_ready = True
            del self._got[: len(READY)]
        while self.jobs and (found := records.answered(self._got)) is not None:
            self.jobs.popleft().found = found
        return True

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()

    def wait(self) -> None:
        """Wait until it is gone."""
        with self._process:  # closes the pipes, too
            pass


class Comparers:
    """Comparisons of a *state* with the memory of process *pid*, for the duration of a block.

    :ivar records: those of this process.
    :raise OSError: the C library lacks process_vm_readv, or memory is short.
    """

    def __init__(self, state: Extents, pid: int) -> None:
        self.records = Records(state, pid)
        self._state = state
        self._pid = pid
        self._stack = ExitStack()
        self._helpers: dict[int, _Helper] = {}
        self._poll = select.poll()
        self._is_started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._stack:
            for helper in self._helpers.values():
                helper.kill()
            for helper in self._helpers.values():
                helper.wait()

    def start(self, size: int) -> None:
        """Start as many helpers as are worthwhile for so many bytes of the state, unless some were started before."""
        count = min(_MOST_HELPERS, len(os.sched_getaffinity(0)) - 1, size // _WORTHWHILE)
        if self._is_started or not count:
            return
        self._is_started = True
        with suppress(OSError):
            extents = self._stack.enter_context(files.in_memory("qsnap-extents"))
            files.write(extents, self._state.packed())
            given = [*map(str, (self._pid, self._state.file, extents))]
            for _ in range(count):
                process = interpreter.start(
                    "qsnap-compare", "qsnap.operations.delta.records.serve", *given,
                    files=[self._state.file, extents], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
                helper = _Helper(process)
                self._helpers[helper.answers] = helper
                self._poll.register(helper.answers, select.POLLIN)

    def compare(self, begin: int, page: int, address: int, pages: int) -> Job:
        """Have a helper compare, or do it here if none has room: as :meth:`Records.compare`.

        :raise OSError: the state, or the memory, cannot be read.
        """
        job = Job(begin, page, address, pages)
        self._take(0)
        for helper in [*self._helpers.values()]:
            if helper.has_room:
                try:
                    helper.ask(job)
                except OSError:
                    self._lose(helper)
                else:
                    return job
        self._do(job)
        return job

    def result(self, job: Job) -> bytes:
        """Wait for the result of a comparison.

        :raise OSError: the state, or the memory, cannot be read.
        """
        while job.found is None:
            if not any(job in helper.jobs for helper in self._helpers.values()):
                self._do(job)
            elif not self._take(_SILENT_S):
                for helper in [*self._helpers.values()]:
                    self._lose(helper)
        return job.found

    def _do(self, job: Job) -> None:
        job.found = self.records.compare(job.begin, job.page, job.address, job.pages)

    def _take(self, timeout_s: float) -> bool:
        """Take the answers that are there, or that come in time; whether there were any."""
        came = self._poll.poll(timeout_s * 1000) if self._helpers else []
        for file, _ in came:
            helper = self._helpers[file]
            if not helper.take():
                self._lose(helper)
        return bool(came)

    def _lose(self, helper: _Helper) -> None:
        """Do without a helper that has ended, or does not answer."""
        del self._helpers[helper.answers]
        self._poll.unregister(helper.answers)
        helper.kill()
        helper.wait()
