"""Every way in which qsnap can fail, and the exit code of each.

::

    QsnapError                  1   anything without a code of its own
    ├── CommandFailed           1   QEMU refused a monitor command
    ├── BadUsage                2   an address, name or option that is not valid
    │   └── choose.SeveralVMs   2   it is not said which of them is meant
    ├── PartialFailure          3   of several tags, some were done and some not
    ├── MonitorError            4   the monitor: anything without a class of its own
    │   ├── ConnectError        4   nothing listens there, or it may not be opened
    │   │   └── NoVM            4   no such VM runs, or it has no monitor for us
    │   ├── MonitorBusy         4   it accepts, but does not greet: another client holds it
    │   └── MonitorLost         4   the connection broke; what QEMU did is not known
    ├── NotSupported            5   this QEMU, or this transport, cannot do it
    ├── PrecheckRefused         6   a pre-check found why it would fail; the guest was not touched
    ├── SnapshotNotFound        7   no device holds that tag
    ├── SnapshotExists          8   the tag is taken, and replacing it was ruled out
    ├── JobFailed               9   QEMU began the work and reported an error
    ├── VerifyFailed           10   QEMU reported success, and what is there says otherwise
    ├── VMLocked               11   another qsnap is using this VM
    ├── OperationTimeout       12   --timeout has passed; the guest was resumed
    ├── GuestLeftStopped       20   the guest was running and is stopped now: alert on this one
    └── Interrupted      128 + n   signal n ended the command; the guest was resumed

Data are attributes; ``str()`` is the sentence for people. Errors of libraries and of the system become one of these
where they arise (those of the connection in ``qsnap.monitor``), with the first error as ``__cause__``. ``SeveralVMs``
is in ``qsnap.targets.choose``; ``Abandoned``, which has the exit code of another VM's error, in ``qsnap.runs.group``.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from qsnap.model.checks import Finding


#: The state of the guest after a refusal before any change.
UNTOUCHED = "the guest was not touched"


class QsnapError(Exception):
    """Base class: whatever qsnap raises on purpose."""

    #: What a command that ends with this error exits with.
    exit_code = 1
    #: What the code means, as the exit table prints it.
    meaning: ClassVar[str] = "any other failure"
    #: What the failure leaves behind, and the state of the guest, as far as known; the sequences fill it in.
    outcome = ""
    #: A live save failed and was undone. The guest runs, and nothing of the new snapshot is left.
    undone = False
    #: The VM that it is about, by the name that the command line uses; "" if that is not known.
    vm = ""

    def __str__(self) -> str:
        sentence = self.sentence()
        return f"{sentence}; {self.outcome}" if self.outcome else sentence

    def sentence(self) -> str:
        """What went wrong, for people, without the outcome."""
        return super().__str__()

    def adds(self, more: str) -> None:
        """Add a clause to the outcome."""
        self.outcome = f"{self.outcome}; {more}" if self.outcome else more

    def to_json(self) -> dict[str, object]:
        """The document that ``--json`` shows: class, code and message, and :meth:`details`."""
        return {**self._summary(), **self.details()}

    def details(self) -> Mapping[str, object]:
        """What ``--json`` adds to the error document beyond class, code and message."""
        return {}

    def _summary(self) -> dict[str, object]:
        return {"error": type(self).__name__, "exit_code": self.exit_code, "message": str(self), "vm": self.vm or None}


class CommandFailed(QsnapError):
    """QEMU answered a monitor command with an error.

    :ivar command: the QMP command.
    :ivar reason: QEMU's own sentence.
    """

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"QEMU refused {command}: {reason}")
        self.command = command
        self.reason = reason


class OperationTimeout(QsnapError):
    """The time that the caller gave has passed. The guest was resumed before this was raised."""

    exit_code = 12
    meaning = "the time of `--timeout` is over (guest resumed)"


class BadUsage(QsnapError):
    """The request is not valid; nothing was tried."""

    exit_code = 2
    meaning = "usage"


class PartialFailure(QsnapError):
    """Of several tags some were done and some were not.

    :ivar done: the tags that were done.
    :ivar failed: the others, with the error of each.
    """

    exit_code = 3
    meaning = "some done, some not (several tags or VMs, or a prune); or several VMs have failed in different ways"

    def __init__(self, done: Sequence[str], failed: Mapping[str, QsnapError]) -> None:
        reasons = "; ".join(f"{tag!r}: {error}" for tag, error in failed.items())
        there = f"done: {', '.join(map(repr, done))}" if done else "nothing was done"
        super().__init__(f"{there}; {len(failed)} failed: {reasons}")
        self.done = tuple(done)
        self.failed = dict(failed)

    def details(self) -> Mapping[str, object]:
        return {
            "done": list(self.done),
            "failed": [{"tag": tag, **error._summary()} for tag, error in self.failed.items()],
        }


class MonitorError(QsnapError):
    """The monitor could not be used."""

    exit_code = 4
    meaning = "monitor: cannot connect, busy, or lost"


class ConnectError(MonitorError):
    """Nothing listens at the address, or it may not be opened."""


class NoVM(ConnectError):
    """The VM that is meant does not run, or has no monitor that qsnap could use."""


class MonitorBusy(MonitorError):
    """The socket takes the connection, and then no greeting comes.

    :ivar silence: a sentence that says which address is silent, and for how long.
    """

    def __init__(self, silence: str, why: str) -> None:
        super().__init__(f"{silence}: {why}")
        self.silence = silence


class MonitorLost(MonitorError):
    """The connection broke, or QEMU is gone. What the last command did is not known."""


class NotSupported(QsnapError):
    """This QEMU, or the way it is reached, cannot do what was asked. Nothing was changed."""

    exit_code = 5
    meaning = "this QEMU or transport cannot do it"


class PrecheckRefused(QsnapError):
    """The pre-checks found reasons why it would fail or do harm.

    :param outcome: the state of the guest.
    :ivar findings: all findings, warnings included.
    """

    exit_code = 6
    meaning = "a pre-check refused: a device, a blocker, no room, run state"

    def __init__(self, what: str, findings: Sequence[Finding], outcome: str = UNTOUCHED) -> None:
        super().__init__(what)
        self.findings = tuple(findings)
        self.outcome = outcome

    def __str__(self) -> str:
        lines = [super().__str__()]
        for finding in self.findings:
            if finding.refuses:
                lines.append(f"- {finding.message}")
                if finding.cure:
                    lines.append(f"  {finding.cure}")
        return "\n".join(lines)

    def details(self) -> Mapping[str, object]:
        return {"findings": [finding.to_json() for finding in self.findings]}


class SnapshotNotFound(QsnapError):
    """No device holds the tag.

    :ivar tag: the tag looked for.
    """

    exit_code = 7
    meaning = "no such snapshot"

    def __init__(self, tag: str, message: str | None = None) -> None:
        super().__init__(message or f"no snapshot {tag!r} on any device")
        self.tag = tag

    def details(self) -> Mapping[str, object]:
        return {"tag": self.tag}


class SnapshotExists(QsnapError):
    """The tag is taken, and the caller ruled out replacing it.

    :ivar tag: the tag.
    :ivar node_names: the nodes that hold it.
    """

    exit_code = 8
    meaning = "the snapshot exists (`--no-replace`)"

    def __init__(self, tag: str, node_names: Sequence[str]) -> None:
        super().__init__(
            f"snapshot {tag!r} already exists on {', '.join(node_names)}; nothing was changed. "
            "Choose another tag, or leave out --no-replace to replace it; if the name was chosen by qsnap, try again"
        )
        self.tag = tag
        self.node_names = tuple(node_names)

    def details(self) -> Mapping[str, object]:
        return {"tag": self.tag, "devices": list(self.node_names)}


class JobFailed(QsnapError):
    """QEMU began the work and reported an error.

    :ivar command: the QMP command or HMP line that failed.
    :ivar reason: QEMU's own sentence, unedited.
    """

    exit_code = 9
    meaning = "QEMU reported that the job failed"

    def __init__(self, command: str, reason: str, outcome: str = "") -> None:
        super().__init__(command, reason, outcome)
        self.command = command
        self.reason = reason
        self.outcome = outcome

    def sentence(self) -> str:
        return f"{self.command} failed: {self.reason}"

    def details(self) -> Mapping[str, object]:
        return {"command": self.command, "reason": self.reason}


class VerifyFailed(QsnapError):
    """The work ended, but what it left does not pass the check.

    :ivar tag: the tag.
    :ivar problems: what is wrong, a sentence each.
    """

    exit_code = 10
    meaning = "the job ended, but what it left does not verify"

    def __init__(self, tag: str, problems: Sequence[str], outcome: str = "") -> None:
        super().__init__(tag, problems, outcome)
        self.tag = tag
        self.problems = tuple(problems)
        self.outcome = outcome

    def sentence(self) -> str:
        return f"snapshot {self.tag!r} does not verify: {'; '.join(self.problems)}"

    def details(self) -> Mapping[str, object]:
        return {"tag": self.tag, "problems": list(self.problems)}


class VMLocked(QsnapError):
    """Another qsnap is using this VM; nothing was changed.

    :ivar holder: a description of that qsnap, in words.
    :ivar pid: its process id, if that is known and the process is on this machine.
    """

    exit_code = 11
    meaning = "another qsnap is using this VM"

    def __init__(self, holder: str, waited_s: float, cure: str = "", pid: int | None = None) -> None:
        waited = f" after {waited_s:g} s of waiting" if waited_s else ""
        super().__init__(f"another qsnap is using this VM{waited}: {holder}. {cure or 'Try again when it is done'}")
        self.holder = holder
        self.pid = pid

    def details(self) -> Mapping[str, object]:
        return {"holder": self.holder, "holder_pid": self.pid}


class GuestLeftStopped(QsnapError):
    """The guest was running and is stopped now.

    Raised *from* the error that led there. After a failed load the guest is left so on purpose.
    """

    exit_code = 20
    meaning = "**the guest was running and is stopped now**: the one to alert on"


class Interrupted(QsnapError):
    """A signal ended the command. The guest was resumed before this was raised.

    :ivar signum: the signal.
    """

    exit_code = 130
    meaning = "interrupted by SIGINT, SIGTERM (guest resumed)"

    def __init__(self, signum: int, outcome: str = "") -> None:
        name = signal.Signals(signum).name
        super().__init__(f"interrupted by {name}; {outcome}" if outcome else f"interrupted by {name}")
        self.signum = signum
        self.exit_code = 128 + signum


#: The exit table, code by code, in the order in which it is printed.
EXIT_TABLE: tuple[tuple[str, str], ...] = (
    ("0", "done"),
    *(
        (str(error.exit_code), error.meaning)
        for error in (
            QsnapError,
            BadUsage,
            PartialFailure,
            MonitorError,
            NotSupported,
            PrecheckRefused,
            SnapshotNotFound,
            SnapshotExists,
            JobFailed,
            VerifyFailed,
            VMLocked,
            OperationTimeout,
            GuestLeftStopped,
        )
    ),
    ("130, 143", Interrupted.meaning),
)
