"""Access to a QEMU through this machine, and to qsnap's own files: processes, memory, sockets, files.

Nothing here talks to a monitor or knows what a snapshot is. Any package above may import it.
"""
