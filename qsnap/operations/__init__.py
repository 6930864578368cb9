"""The sequences: save, load, delete, prune; the plan that is made before each, and what they share.

A sequence reads from top to bottom like QEMU's do_savevm. It is given a monitor, and never learns which one. ``vm`` and
``supervision`` import this package.
"""
