"""State files: the RAM and device state of live saves, each in a qcow2 image of its own.

A migration stream has the form of a savevm state, so QEMU's ``snapshot-load`` takes one, if it lies where a qcow2 image
has its VM state.

    qcow2.py   pure: the image, written around a stream that is there already
    shelf.py   where the files lie, and which VM each belongs to
"""
