"""One run at a time on a VM, and who finishes for one that was killed.

A run's *journal* says what it has under way; its *guard* is a process that outlives it; its *mark* is the lock, an
object in QEMU. The *claim* is all three. *Recovery* is what is done when a run has died: by its guard at once, or by
the next command. ``vm`` imports this package.
"""
