"""The commands, each parsed by click and handed on. ``cli`` adds them to its group."""
