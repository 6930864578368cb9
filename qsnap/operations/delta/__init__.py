"""Delta loads: QEMU loads only what differs between the guest and the snapshot.

QEMU's loader touches only the pages of RAM that are in the stream. So a stream without the pages that the guest has
unchanged puts back the same as the whole one, in the time that the changed ones take. All else is in it as it was: the
devices, the video memory, the firmware. The order inside QEMU is that of any load (disks, reset, RAM, devices).

``ram`` finds out whether that is right for this guest, and where its RAM lies; ``base``, which pages need no comparison
because they are unwritten since an earlier load; ``difference`` compares and writes the stream; ``delta`` gives that to
QEMU as a node; ``load`` is what ``qsnap.operations.load`` uses. Whatever is not certain makes a full load, and says why
(:class:`NoDelta`).
"""


class NoDelta(Exception):
    """Only a full load is correct, or worthwhile. The text is a clause that says why."""


class BrokenState(NoDelta):
    """The VM state is damaged: QEMU would fail in the middle of a full load, too."""
