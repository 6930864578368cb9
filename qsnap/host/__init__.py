"""What this machine shows of a QEMU, and qsnap's own files on it: processes, memory, sockets, files.

Nothing here talks to a monitor or knows what a snapshot is. Any package above may import it.
"""
