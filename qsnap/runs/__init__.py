"""What a run has under way: its journal, its mark in QEMU, the guest that it keeps stopped, and work that no
interrupt ends. Operations and supervision import it.
"""
