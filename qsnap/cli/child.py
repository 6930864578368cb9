"""Run the command of ``run`` and ``ensure``: it gets qsnap's streams and signals, and is ended with its children."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qsnap.cli.output.show import say

if TYPE_CHECKING:
    import subprocess

    import psutil

#: --timeout ended the command.
TIMED_OUT = 124
#: The command cannot be executed, or is not there.
NOT_EXECUTABLE = 126
NOT_FOUND = 127

#: Seconds that a command whose time is over has to end by itself.
GRACE_S = 10.0
#: Seconds that what was killed has to be gone. What is not (it hangs in the kernel, or is another user's) is left.
KILL_S = 5.0
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def executed(command: Sequence[str], timeout_s: float | None, signals_seen: Sequence[int]) -> int | None:
    """Run the command to its end, with our streams, and pass signals on to it; its exit code, as a shell has it.

    Signals are held back and looked at one by one: what a terminal sends (Ctrl-C) reaches the command by itself.

    :param signals_seen: signals that came before; if there are any the command is not run.
    :return: None if it was not run for that.
    """
    import subprocess

    with suppress(OSError, ValueError):
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)  # what is ignored here would be there
    passed_on = {signum for signum in _PASSED_ON if signal.getsignal(signum) is not signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on | {signal.SIGCHLD})
    _adopt_orphans()
    ours = _children()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        if signals_seen:
            return None
        process = subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before))
        while (code := process.poll()) is None:
            left_s = 3600.0 if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                say(f"qsnap: the command did not finish within {timeout_s:g} s; it is ended")
                _end(process, ours)
                return TIMED_OUT
            came = signal.sigtimedwait(passed_on | {signal.SIGCHLD}, left_s)
            # sigaction(2): si_code is above 0 for what the kernel sends
            if came is not None and came.si_signo != signal.SIGCHLD and came.si_code <= 0:
                process.send_signal(came.si_signo)
    except FileNotFoundError:
        return not_executable(command[0])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        say(f"qsnap: {command[0]}: {getattr(error, 'strerror', None) or error}")
        return NOT_EXECUTABLE
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return code if code >= 0 else 128 - code


def not_executable(program: str) -> int:
    """Say that a command is not there, or cannot be executed; its exit code, as a shell has it."""
    is_there = os.path.lexists(program) if "/" in program else False
    say(f"qsnap: {program}: {'it cannot be executed' if is_there else 'not found'}")
    return NOT_EXECUTABLE if is_there else NOT_FOUND


def _adopt_orphans() -> None:
    """Become the parent of what the command starts and leaves behind, so that it can be ended with it."""
    from qsnap.host import syscalls

    with suppress(OSError):
        syscalls.become_subreaper()


def _children() -> set[int]:
    """Our own processes that are there before the command is: guards that have not ended yet."""
    with suppress(OSError, ValueError):
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    return set()


def _end(process: subprocess.Popen[bytes], ours: Collection[int]) -> None:
    """End a command and all that it has started: by SIGTERM, and what is left after a while by SIGKILL.

    :param ours: processes that are not the command's.
    """
    import psutil

    ourselves = psutil.Process()
    deadline = time.monotonic() + GRACE_S
    told: set[int] = set()
    while True:
        # Looked at again and again: what is ended may start something, or leave it behind
        found = [one for one in ourselves.children(recursive=True) if one.pid not in ours and not _is_zombie(one)]
        if process.poll() is not None and not found:
            return
        if time.monotonic() > deadline + KILL_S:
            say(f"qsnap: left behind, because it cannot be killed: process {', '.join(str(one.pid) for one in found)}")
            return
        is_over = time.monotonic() > deadline
        for one in found:
            with suppress(psutil.Error):
                if is_over:
                    one.kill()
                elif one.pid not in told:
                    one.terminate()
            told.add(one.pid)
        time.sleep(0.02)  # a poll with a deadline


def _is_zombie(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def note_signals() -> list[int]:
    """Keep signals from ending qsnap from now on; the list that is returned gets those that come."""
    signals_seen: list[int] = []
    for signum in _PASSED_ON[:3]:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda received, _: signals_seen.append(received))
    return signals_seen
