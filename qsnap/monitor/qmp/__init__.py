"""QMP: the monitor of a ``-qmp`` socket, what its replies hold, and what a live save needs of it."""
