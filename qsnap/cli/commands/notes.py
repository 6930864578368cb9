"""Notes on snapshots: what each is, and whether it is protected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qsnap.cli.commands import work
from qsnap.cli.common import Options
from qsnap.cli.options import Command, common_options, tag_argument, tags_argument

if TYPE_CHECKING:
    from qsnap.cli.output.results import Notes
    from qsnap.vm import VM


@click.command(cls=Command)
@tags_argument
@common_options
def protect(options: Options, tags: tuple[str, ...]) -> int:
    """Protect snapshots from being replaced, deleted or pruned."""
    return _change_notes(options, tags, protected=True)


@click.command(cls=Command)
@tags_argument
@common_options
def unprotect(options: Options, tags: tuple[str, ...]) -> int:
    """Remove the protection of snapshots."""
    return _change_notes(options, tags, protected=False)


@click.command(cls=Command)
@tag_argument
@click.argument("description")
@common_options
def describe(options: Options, tag: str, description: str) -> int:
    """Describe snapshot TAG in one line.

    list and show print it; '' removes it.
    """
    return _change_notes(options, (tag,), description=description)


def _change_notes(options: Options, tags: tuple[str, ...], **changes: Any) -> int:  # noqa: ANN401 (of VM.note)
    from qsnap.cli.output.results import Notes

    async def changed(vm: VM, *_: object) -> Notes:
        return Notes(snapshots=tuple(await vm.note(*tags, **changes)))

    return work(options, changed)
