"""What a run has under way: its journal, its mark in QEMU, the guest that it keeps stopped, shielded work.

:class:`qsnap.runs.run.Run` is what a sequence is given of it. Operations and supervision import this package.
"""
