"""The QEMUs that run on this machine, the config file's names for VMs, and which VM is meant.

Nothing is connected to, as a monitor serves one client at a time: the command lines name the monitors
(``command_line``), and the kernel shows what is at their sockets (``running``, and ``qsnap.host.sockets``).
"""
