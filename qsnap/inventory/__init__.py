"""What exists on a VM: the devices and their rules, the snapshots, the state files of live saves, the notes.

:class:`qsnap.inventory.inventory.Inventory` is one look at all of it.

The modules look things up and judge them, and change nothing but qsnap's own notes and marks. Operations import them.
"""
