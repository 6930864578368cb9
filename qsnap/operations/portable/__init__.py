"""Snapshots that leave the VM that they were made of: a directory with all that it takes to start the guest elsewhere.

``export`` makes the directory, ``boot`` starts a QEMU on overlays of it, and ``drill`` does both to see that a snapshot
can be restored. ``drives`` finds what each drive held, ``images`` runs qemu-img, ``manifest`` is what is written down,
and ``life`` is the look at whether a guest runs.
"""
