"""Processes that the tests alone know of: a directory, a /proc that shows chosen ones, and a qsnap that looks there.

Other QEMUs may run beside the tests, and whoever runs these may have a config file; neither must matter.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from qsnap.host.processes import is_alive
from qsnap.targets.running import running_vms
from support.guest import DEADLINE_S, QEMU, Run, finish, until

IS_ROOT = os.geteuid() == 0
NOBODY = 65534
BARE = ("-machine", "none", "-nodefaults", "-display", "none")


@contextmanager
def as_nobody() -> Iterator[None]:
    """As another user, for whom the permissions of files count. Any user but root is that already."""
    if IS_ROOT:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if IS_ROOT:
            os.seteuid(0)


class Machine:
    """A directory, a /proc that shows chosen processes, and those processes, which end with it."""

    def __init__(self) -> None:
        # Short, as socket paths are, and open to other users.
        self.directory = Path(tempfile.mkdtemp(prefix="qs-"))
        self.directory.chmod(0o777)
        self.proc = self.directory / "proc"
        self.proc.mkdir()
        for name in ("net", "stat"):
            (self.proc / name).symlink_to(f"/proc/{name}")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._daemons: list[int] = []
        self.config = self.directory / "config.toml"
        self.show(os.getpid())
        # A qsnap that looks through that /proc, as a program that a shell can find.
        self.program = self.directory / "bin" / "qsnap"
        self.program.parent.mkdir()
        self.program.write_text(
            f"#!{sys.executable}\nimport psutil\nfrom qsnap.__main__ import main\n"
            f"psutil.PROCFS_PATH = {str(self.proc)!r}\nmain()\n"
        )
        self.program.chmod(0o755)

    def show(self, pid: int) -> None:
        (self.proc / str(pid)).symlink_to(f"/proc/{pid}")

    def launch(self, *command: str, **more: object) -> subprocess.Popen[bytes]:
        """Start any process, and show it."""
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **{"cwd": self.directory, **more}
        )  # type: ignore[call-overload]
        self._processes.append(process)
        self.show(process.pid)
        return process  # type: ignore[no-any-return]

    def start_qsnap(
        self, *args: str, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """qsnap in this directory, not yet finished."""
        environment = {**os.environ, "COLUMNS": "200", "HOME": str(self.directory), **(env or {})}
        if self.config.exists():
            environment.setdefault("QSNAP_CONFIG", str(self.config))
        return subprocess.Popen(
            [*prefix, str(self.program), *args], cwd=self.directory, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def qsnap(self, *args: str, expect: int | None = 0, env: Mapping[str, str] | None = None) -> Run:
        """Run qsnap in this directory, and check its exit code unless *expect* is None."""
        run = finish(self.start_qsnap(*args, env=env))
        assert expect is None or run.code == expect, f"exit {run.code}\n{run.out}\n{run.err}"
        return run

    def start(self, *args: str, prefix: Sequence[str] = (), **more: object) -> int:
        """Start a QEMU, and wait until it listens on its Unix monitors; its pid."""
        process = self.launch(*prefix, QEMU, *BARE, *args, **more)
        until("QEMU's monitors", lambda: process.poll() is not None or self._listens(process.pid))
        assert process.poll() is None, f"QEMU ended with {process.returncode}: {process.args!r}"
        return process.pid

    def _listens(self, pid: int) -> bool:
        vms = [vm for vm in running_vms() if vm.pid == pid]
        return bool(vms) and all(monitor.state != "gone" for monitor in vms[0].monitors)

    def daemonize(self, *args: str) -> int:
        """Start a QEMU that goes into the background, as a shell would; its pid."""
        pidfile = self.directory / "pid"
        subprocess.run(
            [QEMU, *BARE, "-daemonize", "-pidfile", pidfile, *args],
            cwd=self.directory, env={**os.environ, "PWD": str(self.directory)}, check=True, timeout=DEADLINE_S,
        )  # fmt: skip
        pid = int(pidfile.read_text())
        self.end_by_pid(pid)
        self.show(pid)
        return pid

    def end_by_pid(self, pid: int) -> None:
        """Have a process ended with the test that is no child of ours."""
        self._daemons.append(pid)

    def connect(self, path: str | Path) -> subprocess.Popen[bytes]:
        """A process that is a client of this monitor, and is served."""
        client = self.launch(
            sys.executable, "-c",
            "import socket, sys\n"
            "s = socket.socket(socket.AF_UNIX)\n"
            f"s.settimeout({DEADLINE_S})\n"
            "s.connect(sys.argv[1])\n"
            "assert s.recv(1)\n"
            "print('served', flush=True)\n"
            "sys.stdin.read()\n",
            str(path),
        )  # fmt: skip
        assert client.stdout
        assert client.stdout.readline() == b"served\n"
        return client

    def end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.communicate(timeout=DEADLINE_S)

    def close(self) -> None:
        for pid in self._daemons:
            os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate(timeout=DEADLINE_S)
        until("the end of the daemons", lambda: not any(map(is_alive, self._daemons)))
        rmtree(self.directory)


def qmp(path: str | Path) -> list[str]:
    return ["-qmp", f"unix:{str(path).replace(',', ',,')},server=on,wait=off"]
