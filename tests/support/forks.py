"""qsnap's command line in a process of its own, without the time that Python and the imports take: by a fork.

A server, one for each process that runs tests, has imported qsnap. For each command it forks; the child gets the
command's arguments, environment and pipes, and goes on as ``python -m qsnap`` would. What depends on how the
interpreter was started (locale, time zone, its own options) takes a process started anew: see :func:`can_fork`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path

#: What the interpreter reads when it starts.
_AT_START = ("PYTHON", "LC_", "LANG", "TZ")

_SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from support.forks import serve
serve(int(sys.argv[2]))
"""


def can_fork(env: Mapping[str, str]) -> bool:
    """Whether a command in that environment behaves the same as in one whose interpreter was started in it."""
    return all(
        env.get(name) == os.environ.get(name) for name in {*env, *os.environ} if name.startswith(_AT_START)
    ) and (_environment_at_start() == {name: value for name, value in os.environ.items() if name.startswith(_AT_START)})


@cache
def _environment_at_start() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_AT_START)}


class Forked:
    """A command that has finished, or has not, as subprocess.Popen shows one."""

    def __init__(self, arguments: tuple[str, ...], env: Mapping[str, str]) -> None:
        out, err = os.pipe(), os.pipe()
        self._control, theirs = socket.socketpair()
        request = json.dumps({"arguments": arguments, "env": dict(env), "cwd": str(Path.cwd())}).encode()
        server = _server()
        with server.lock, theirs:
            socket.send_fds(server.sock, [len(request).to_bytes(4, "big")], [out[1], err[1], theirs.fileno()])
            server.sock.sendall(request)
        os.close(out[1])
        os.close(err[1])
        self._out, self._err = os.fdopen(out[0], "rb"), os.fdopen(err[0], "rb")

    def finish(self, timeout_s: float) -> tuple[int, str, str]:
        """Its exit code and what it printed, once it has ended.

        :raise subprocess.TimeoutExpired: it has not; it was killed.
        """
        read: dict[str, bytes] = {}
        threads = [
            threading.Thread(target=lambda name=name, file=file: read.__setitem__(name, file.read()), daemon=True)
            for name, file in (("out", self._out), ("err", self._err))
        ]
        for thread in threads:
            thread.start()
        self._control.settimeout(timeout_s)
        pid = int.from_bytes(self._control.recv(4), "big")
        try:
            code = int.from_bytes(self._control.recv(4), "big", signed=True)
        except TimeoutError as error:
            os.kill(pid, 9)
            raise subprocess.TimeoutExpired("qsnap", timeout_s) from error
        finally:
            self._control.close()
        for thread in threads:
            thread.join(timeout_s)
        self._out.close()
        self._err.close()
        return code, read["out"].decode(), read["err"].decode()


class _Server:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sock, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVER, str(Path(__file__).parents[1]), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            )  # fmt: skip


@cache
def _server() -> _Server:
    _environment_at_start()
    return _Server()


def serve(number: int) -> None:
    """The server: until its client is gone."""
    import signal

    import qsnap.cli
    import qsnap.connecting
    import qsnap.monitor.hmp.monitor
    import qsnap.monitor.qmp.monitor
    import qsnap.operations.delete
    import qsnap.operations.load
    import qsnap.operations.save
    import qsnap.supervision.claim
    import qsnap.vm

    dict(qsnap.cli.cli.commands)  # loads their modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=number) as sock:
        while True:
            head, files, _, _ = socket.recv_fds(sock, 4, 3)
            if not head:
                return
            length = int.from_bytes(head, "big")
            request = b""
            while len(request) < length:
                request += sock.recv(length - len(request))
            if not os.fork():
                sock.close()
                _run(json.loads(request), *files)
            for file in files:
                os.close(file)


def _run(request: dict[str, object], out: int, err: int, control: int) -> None:
    """One command, waited for by a process between it and the server."""
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        os.close(out)
        os.close(err)
        os.write(control, pid.to_bytes(4, "big"))
        _, status = os.waitpid(pid, 0)
        os.write(control, os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
        os._exit(0)
    os.close(control)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    # Those of the server know what they were opened on
    sys.stdout = open(1, "w", encoding=sys.stdout.encoding, errors="strict", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=sys.stderr.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    arguments, env = request["arguments"], request["env"]
    assert isinstance(arguments, list)
    assert isinstance(env, dict)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(str(request["cwd"]))
    sys.argv = [str(Path(sys.executable).parent / "qsnap"), *arguments]
    import runpy

    code = 1
    try:
        runpy.run_module("qsnap", run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (as the interpreter does)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
