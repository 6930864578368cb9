"""The sequences: save, load, delete, prune; the plan that is made before each, and what they share.

A sequence reads from top to bottom like QEMU's do_savevm. It is given a run (:class:`qsnap.runs.run.Run`) and what is
asked for, and looks at the VM twice: once before the stop, once after it. ``vm`` and ``supervision`` import this
package.
"""
