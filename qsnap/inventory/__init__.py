"""What is there: the devices and their rules, the snapshots, the state files of live saves, the notes.

:class:`qsnap.inventory.inventory.Inventory` is one look at all of it.

Everything is looked up and judged here, and nothing is changed but qsnap's own notes and marks. Operations import it.
"""
