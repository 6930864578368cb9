"""The live save: its sequence, the moment at which disks and device state are taken, and how long that may take."""
