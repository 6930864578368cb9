"""A pytest plugin for tests against a running guest: it begins where a snapshot is, and a failure leaves one behind.

Inert until a test asks for it, by the fixture ``qsnap_vm`` or the marker ``qsnap``::

    @pytest.mark.qsnap(load="clean-install")     # put the guest back to that before the test
    def test_upgrade(qsnap_vm):
        ...
        qsnap_vm.save("upgraded")

The VM is named by ``--qsnap-monitor=ADDRESS`` or ``--qsnap-vm=NAME``, in the ini file by ``qsnap_monitor`` or
``qsnap_vm``, or by ``$QSNAP_MONITOR``; qsnap never picks one on its own, because its state will be lost. Under
pytest-xdist each worker needs a VM of its own: ``{worker}`` in the name is replaced by ``gw0``, ``gw1``, … With
``--qsnap-save-failed`` (ini: ``qsnap_save_failed = true``) the guest of a test that failed is saved as ``failed-`` and
the test's id, before anything is torn down.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from qsnap.model.checks import CheckReport
    from qsnap.model.results import DeleteResult, LoadResult, SaveResult, Status
    from qsnap.model.snapshots import Snapshot
    from qsnap.targets.choose import Target
    from qsnap.vm import VM

_T = TypeVar("_T")

#: A test that fails in here is shown by its own line, and the error.
__tracebackhide__ = True
#: The most bytes of a tag that a test's id may take.
_ID_MAX = 200


class GuestVM:
    """The VM under test: the methods of :class:`qsnap.VM`, for tests that do not await.

    Each call has a connection of its own; the monitor is free between two calls.

    :ivar timeout_s: seconds that each call may take; None for no bound.
    """

    def __init__(self, target: Target, timeout_s: float | None) -> None:
        self._target = target
        self.timeout_s = timeout_s

    @property
    def address(self) -> str:
        """Where its monitor is."""
        return str(self._target.address)

    @property
    def identity(self) -> str:
        """What tells the VM from others: its process, because one VM may have several monitors; else its address."""
        from qsnap.targets.running import running_vms

        for one in running_vms():
            if any(point.address == self._target.address for point in one.monitors):
                return f"process {one.pid}"
        return self.address

    def call(self, action: Callable[[VM], Awaitable[_T]]) -> _T:
        """Connect, do *action*, and return what it returns; also where an event loop runs already."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        from qsnap.connecting import connect
        from qsnap.errors import QsnapError

        async def connected() -> _T:
            settings = self._target.settings
            async with connect(
                self._target.address,
                timeout_s=self.timeout_s,
                state_dir=settings.state_dir,
                ignore_unseen=bool(settings.ignore_unseen),
            ) as vm:
                return await action(vm)

        failure: QsnapError | None = None
        with ThreadPoolExecutor(1) as thread:
            try:
                return thread.submit(asyncio.run, connected()).result()
            except QsnapError as error:
                failure = error.with_traceback(None)
        raise failure from None

    def save(self, tag: str | None = None, **how: Any) -> SaveResult:  # noqa: ANN401 (of VM.save)
        """Save the guest: see :meth:`qsnap.VM.save`."""
        settings = self._target.settings
        given = {"vmstate": settings.vmstate, "exclude": settings.exclude or (), "live": settings.live or False, **how}
        return self.call(lambda vm: vm.save(tag, **given))

    def load(self, tag: str, **how: Any) -> LoadResult:  # noqa: ANN401 (of VM.load)
        """Put the guest back: see :meth:`qsnap.VM.load`."""
        given = {"exclude": self._target.settings.exclude or (), **how}
        return self.call(lambda vm: vm.load(tag, **given))

    def delete(self, *tags: str, missing_ok: bool = False) -> DeleteResult:
        """Delete snapshots: see :meth:`qsnap.VM.delete`."""
        return self.call(lambda vm: vm.delete(*tags, missing_ok=missing_ok))

    def list(self) -> tuple[Snapshot, ...]:
        """All snapshots, oldest first."""
        return self.call(lambda vm: vm.list())

    def check(self) -> CheckReport:
        """Whether the guest can be saved now."""
        return self.call(lambda vm: vm.check(exclude=self._target.settings.exclude or ()))

    def status(self) -> Status:
        """The guest's run state and devices."""
        return self.call(lambda vm: vm.status())

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (of VM)
        """Any other method of :class:`qsnap.VM`."""
        from inspect import iscoroutinefunction

        from qsnap.vm import VM

        method = getattr(VM, name, None)
        if name.startswith("_") or not iscoroutinefunction(method):
            raise AttributeError(f"the VM under test has no method {name!r}")
        return lambda *given, **how: self.call(lambda vm: method(vm, *given, **how))


def tag_of(nodeid: str) -> str:
    """The tag under which the guest of a failed test is saved.

    If the id is cut or has characters that a tag cannot take, a checksum makes the tag unique.
    """
    function, bracket, parameters = nodeid.removeprefix("tests/").partition("[")
    clean = re.sub(r"[^\w.\[\]-]+", "-", parameters)
    name = re.sub(r"[^\w.-]+", "-", function) + bracket + clean
    if len(name.encode()) > _ID_MAX or clean != parameters:
        import hashlib

        digest = hashlib.sha256(nodeid.encode()).hexdigest()[:12]
        name = f"{name.encode()[: _ID_MAX - 13].decode(errors='ignore')}-{digest}"
    return f"failed-{name}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options and ini values."""
    group = parser.getgroup("qsnap", "snapshots of a running QEMU guest")
    group.addoption("--qsnap-monitor", metavar="ADDRESS", help="the monitor of the VM under test")
    group.addoption("--qsnap-vm", metavar="NAME", help="the VM under test: a name, pid or UUID (see qsnap vms)")
    group.addoption("--qsnap-timeout", metavar="SECONDS", type=float, help="for each step of qsnap (default: 120)")
    group.addoption("--qsnap-save-failed", action="store_true", default=None, help="save the guest of a failed test")
    parser.addini("qsnap_monitor", "the monitor of the VM under test")
    parser.addini("qsnap_vm", "the VM under test: a name, pid or UUID (see qsnap vms); {worker}: gw0, gw1, …")
    parser.addini("qsnap_timeout", "seconds for each step of qsnap", default="120")
    parser.addini("qsnap_save_failed", "save the guest of a failed test", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line("markers", "qsnap(load=TAG): put the guest back to snapshot TAG before the test")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give a marked test the fixture, before all others, so that those find the guest as it was saved."""
    if item.get_closest_marker("qsnap") and (names := getattr(item, "fixturenames", None)) is not None:
        if "qsnap_vm" in names:
            names.remove("qsnap_vm")
        names.insert(0, "qsnap_vm")


@pytest.fixture
def qsnap_vm(request: pytest.FixtureRequest) -> Iterator[GuestVM]:
    """The VM under test; put back to the snapshot that the marker ``qsnap`` names, if there is one.

    Tests of several processes (pytest-xdist) that use the same guest wait for each other.
    """
    from qsnap.errors import QsnapError

    __tracebackhide__ = False  # where it shows no frame at all, pytest says so, beside our message
    vm, tag, why = None, None, ""
    try:
        marker = request.node.get_closest_marker("qsnap")
        tag = None if marker is None else _marked_tag(marker)
        vm = GuestVM(_target(request.config), _timeout_s(request.config))
        why = _shared(vm)
    except (QsnapError, pytest.UsageError) as error:
        why = str(error)
    if vm is None or why:  # not in the handler, whose traceback nobody needs
        pytest.fail(f"qsnap: {why}", pytrace=False)
    with _alone_with(vm):
        failure: QsnapError | None = None
        try:
            if tag is not None:
                vm.load(tag)
        except QsnapError as error:
            failure = error
        if failure is not None:  # not in the handler, whose traceback nobody needs
            pytest.fail(f"qsnap: the guest could not be put back to {tag!r}: {failure}", pytrace=False)
        yield vm


def _shared(vm: GuestVM) -> str:
    """Why another worker of the same run (pytest-xdist) would use this VM, too; "" if none does."""
    import fcntl

    run, worker = os.environ.get("PYTEST_XDIST_TESTRUNUID"), os.environ.get("PYTEST_XDIST_WORKER")
    if not run:
        return ""  # other runs take turns, test by test
    file = _lock_file(vm, "owner")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        owner, _, its_run = os.pread(file, 200, 0).decode().partition(" ")
        if its_run == run and owner != worker:
            return (
                f"the workers {owner} and {worker} would share the VM at {vm.address}, and put it back under each "
                "other's tests; give each worker its own (--qsnap-vm='ci-{worker}'), or run without -n"
            )
        os.ftruncate(file, 0)
        os.pwrite(file, f"{worker} {run}".encode(), 0)
    finally:
        os.close(file)
    return ""


def _lock_file(vm: GuestVM, kind: str) -> int:
    import hashlib

    from qsnap.runs.runtime_dir import directory

    name = f"pytest-{kind}-{hashlib.sha256(vm.identity.encode(errors='surrogateescape')).hexdigest()[:16]}.lock"
    return os.open(directory() / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextmanager
def _alone_with(vm: GuestVM) -> Iterator[None]:
    """Lock this guest (flock), so that no test of another process uses it. The lock ends with this process."""
    import fcntl

    file = _lock_file(vm, "test")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Save the guest of a failed test, before anything is torn down."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    vm = getattr(item, "funcargs", {}).get("qsnap_vm")
    if report.when != "call" or not report.failed or vm is None or not _saves_failed(item.config):
        return
    tag = tag_of(item.nodeid)
    try:
        vm.save(tag)
        text = f"the guest was saved as {tag!r}"
    except Exception as error:  # noqa: BLE001 (the test's own failure is what is reported)
        text = f"the guest could not be saved as {tag!r}: {error}"
    report.sections.append(("qsnap", text))


def _marked_tag(marker: pytest.Mark) -> str:
    names = (*marker.args, *marker.kwargs.values())
    if len(names) != 1 or not isinstance(names[0], str) or set(marker.kwargs) - {"load"}:
        raise pytest.UsageError("the marker qsnap takes the tag of a snapshot: @pytest.mark.qsnap(load='TAG')")
    return names[0]


def _target(config: pytest.Config) -> Target:
    from qsnap.targets import config as files
    from qsnap.targets.choose import choose
    from qsnap.targets.running import running_vms

    monitor, vm = config.getoption("--qsnap-monitor"), config.getoption("--qsnap-vm")
    if not monitor and not vm:
        monitor, vm = config.getini("qsnap_monitor"), config.getini("qsnap_vm")
        if monitor and config.inipath and not re.match(r"unix:|tcp:|-|/", monitor):
            monitor = str(Path(config.inipath).parent / monitor)
    if not monitor and not vm:
        monitor = os.environ.get("QSNAP_MONITOR")
    if not monitor and not vm:
        raise pytest.UsageError(
            "say which VM is under test: --qsnap-monitor=ADDRESS or --qsnap-vm=NAME (ini: qsnap_monitor, qsnap_vm)"
        )
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    monitor, vm = (word and word.replace("{worker}", worker) for word in (monitor, vm))
    return choose(files.load(os.environ.get("QSNAP_CONFIG")), running_vms, monitor=monitor or None, vm=vm or None)


def _timeout_s(config: pytest.Config) -> float:
    given = config.getoption("--qsnap-timeout")
    return float(given if given is not None else config.getini("qsnap_timeout"))


def _saves_failed(config: pytest.Config) -> bool:
    given = config.getoption("--qsnap-save-failed")
    return bool(given if given is not None else config.getini("qsnap_save_failed"))
