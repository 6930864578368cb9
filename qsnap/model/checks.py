"""The results of the pre-checks: what a save does with each device, and what prevents it. No I/O."""

from __future__ import annotations

from enum import StrEnum

from qsnap.model.qemu import RunState, Struct


class Role(StrEnum):
    """What a device is for the guest."""

    DISK = "disk"
    CDROM = "cdrom"
    FLOPPY = "floppy"
    PFLASH = "pflash"
    EXPORT = "export or job"
    NODE = "unattached node"
    OUTSIDE = "outside QEMU"
    """It keeps its contents where the block layer does not see them: see :mod:`qsnap.model.outside`."""


#: What people call a node: the user's name for the device of each name that QEMU made up ("#block123"), or of a path.
Labels = dict[str, str]


class Verdict(StrEnum):
    """What a save does with a device."""

    SAVED = "saved"
    """It gets a snapshot."""
    CARRIED = "carried"
    """It cannot have a snapshot, and its contents travel inside the VM state."""
    IGNORED = "ignored"
    """Empty or read-only: there is nothing to save."""
    EXCLUDED = "excluded"
    """The user excluded it."""
    REFUSED = "refused"
    """Writable and unable to snapshot."""


class Device(Struct, frozen=True):
    """A block device of the guest, and what becomes of it in a save."""

    node: str | None
    """The node-name; None in an empty drive. Of a device outside the block layer its path in the object tree."""
    device: str
    driver: str
    role: Role
    verdict: Verdict
    why: str = ""
    cure: str = ""
    image: str | None = None
    """The node that takes the snapshot: this one, or the one below its filters; None where none can."""


class Severity(StrEnum):
    """What a finding does: refuse the operation, or warn and go on."""

    REFUSE = "refuse"
    WARN = "warn"


class Finding(Struct, frozen=True):
    """Something that a pre-check has to say. ``code`` is for scripts; ``message`` and ``cure`` for people."""

    code: str
    severity: Severity
    message: str
    cure: str = ""
    node: str | None = None

    @classmethod
    def refusal(cls, code: str, message: str, cure: str = "", node: str | None = None) -> Finding:
        """One that refuses the operation."""
        return cls(code=code, severity=Severity.REFUSE, message=message, cure=cure, node=node)

    @classmethod
    def warning(cls, code: str, message: str, cure: str = "", node: str | None = None) -> Finding:
        """One that only warns."""
        return cls(code=code, severity=Severity.WARN, message=message, cure=cure, node=node)

    @property
    def refuses(self) -> bool:
        """Whether it refuses the operation, rather than only warns."""
        return self.severity is Severity.REFUSE


class CheckReport(Struct, frozen=True):
    """The result of the pre-checks."""

    ok: bool
    runstate: RunState
    vmstate: str | None
    devices: tuple[Device, ...]
    findings: tuple[Finding, ...]

    @property
    def saved(self) -> tuple[str, ...]:
        """The node-names that a save takes a snapshot of, in QEMU's order; an image with two users once."""
        return tuple(dict.fromkeys(d.image for d in self.devices if d.verdict is Verdict.SAVED and d.image))

    @property
    def roots(self) -> tuple[str, ...]:
        """For each of :attr:`saved` the topmost node of a device: a snapshot without a job is requested for that."""
        above = {d.image: d.node for d in reversed(self.devices) if d.verdict is Verdict.SAVED and d.image and d.node}
        return tuple(above[image] for image in self.saved)

    @property
    def excluded(self) -> tuple[str, ...]:
        """The node-names that the user excluded."""
        left_out = (d.image or d.node for d in self.devices if d.verdict is Verdict.EXCLUDED)
        return tuple(name for name in left_out if name)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that do not refuse."""
        return tuple(finding for finding in self.findings if not finding.refuses)
