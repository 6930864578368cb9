"""The commands, each parsed by click and handed on. ``cli`` adds them to its group."""

from __future__ import annotations

from collections.abc import Sequence

from qsnap.cli.common import Action, Options


def work(
    options: Options,
    action: Action,
    *,
    looks: bool = False,
    images: Sequence[str] = (),
    shows: str = "",
    together: bool = False,
) -> int:
    """Do *action* with each chosen VM, show the result, and return the exit code.

    :param looks: it changes nothing.
    :param images: of a VM that is off, instead.
    :param shows: what its progress is called; "" if it has none.
    :param together: with all at one moment.
    """
    from qsnap.cli.several import do

    return options.shown(do(options, action, looks=looks, images=images, shows=shows, together=together))
