"""Groups of snapshots: those of several VMs, saved at one moment. They are loaded, deleted and pruned as a whole.

Which group a snapshot is part of stands in its note (:mod:`qsnap.inventory.notes`). The runs on the VMs tell each other
what they know at the points of :mod:`qsnap.runs.group`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import msgspec

from qsnap.errors import PrecheckRefused, QsnapError
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.notes import Note
from qsnap.inventory.state_file import Content
from qsnap.model.checks import Finding
from qsnap.model.qemu import NodeSnapshot
from qsnap.model.requests import OnExists, SaveRequest
from qsnap.model.snapshots import Snapshot, Together
from qsnap.runs.group import Member, Point
from qsnap.runs.run import Run
from qsnap.tags import free_automatic_tag, next_of_series


async def with_tag(run: Run, request: SaveRequest, prefix: str | None) -> SaveRequest:
    """The request of a save, with the tag of the next snapshot of a series, if it is one.

    The VMs of a group agree on an automatic tag, and keep what they replace until all have their new snapshot.
    """
    member = run.journal.member
    if request.tag is None and (prefix is not None or member):
        graph = await run.monitor.block_graph()
        tag = next_of_series(graph, prefix) if prefix is not None else free_automatic_tag(graph)
        if member is not None:
            tag = max((await member.meet(Point.NAMED, tag)).values())
        # Nobody asked to replace anything
        return msgspec.structs.replace(request, tag=tag, on_exists=OnExists.REFUSE)
    if member is not None and request.on_exists is OnExists.REPLACE:
        return msgspec.structs.replace(request, on_exists=OnExists.SAFE)
    return request


async def note_group(run: Run, tag: str, saved: NodeSnapshot | Content) -> tuple[Finding, ...]:
    """Write down which group a new snapshot is part of, if it is of one. The snapshot is complete, and not decided on.

    :param saved: has its date and its clock.
    :return: a warning if that cannot be written: over TCP, for example.
    """
    member = run.journal.member
    if member is None or not member.others:
        return ()
    inventory = await run.look()
    note = Note(
        tag=tag,
        date=int(saved.date.timestamp()),
        vm_clock_ms=saved.vm_clock_ns // 1_000_000,
        together=Together(id=member.token, vms=member.others),
    )
    try:
        inventory.notes.write(inventory.notes_path(), [note], inventory.snapshots)
    except QsnapError as error:
        message = f"it is not noted that {tag!r} was saved together with {', '.join(member.others)}: {error}"
        return (Finding.warning("group-not-noted", message, "`load --together` needs --force then"),)
    return ()


async def lone_parts(run: Run, inventory: Inventory, found: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    """Those of *found*, with their notes, that are part of a group whose parts on other VMs are not meant too.

    :raise QsnapError: the notes are damaged.
    """
    parts = [one for one in inventory.notes.added_to(found) if one.together] if found else []
    member = run.journal.member
    if member is None:
        return tuple(parts)
    told = await member.meet(Point.GROUPED, [one.together.id for one in parts if one.together])
    return tuple(one for one in parts if one.together and not _is_whole(one.together, member, told))


def part_finding(part: Snapshot, what: str) -> Finding:
    """The refusal to have a part of a group *what*: "saved" (replaced) or "deleted"."""
    assert part.together is not None
    others = ", ".join(part.together.vms)
    if what == "saved":
        cure = "choose another tag, or save them together again: --together, with all these VMs"
    else:
        cure = "name these VMs too, with --together; or --no-together, for this VM alone"
    return Finding.refusal("part-of-group", f"snapshot {part.tag!r} was saved together with {others}", cure)


async def refuse_other_moments(run: Run, inventory: Inventory, found: Snapshot | None, *, force: bool) -> str:
    """Refuse to load snapshots together that were not saved together, all of them.

    :param found: this VM's snapshot; a missing one is refused elsewhere.
    :return: a remark on a part that is loaded without the others; "" for none.
    :raise PrecheckRefused: they are of different moments, or not known to be of one; no guest was touched.
    """
    member = run.journal.member
    if member is None:
        with suppress(QsnapError):  # damaged notes keep nobody from a load
            if found and (together := inventory.notes.of(found).together):
                return _lone_remark(found, together)
        return ""
    together = inventory.notes.of(found).together if found else None
    told = await member.meet(Point.GROUPED, [together.id] if together else [])
    if found is None or force or (together and _is_whole(together, member, told)):
        return ""
    what = f"together with {', '.join(together.vms)}" if together else "by itself, as far as is known"
    finding = Finding.refusal(
        "other-moments",
        f"snapshot {found.tag!r} was saved {what}, and would be loaded together with {', '.join(member.others)}",
        "load what was saved together, on all its VMs; --force loads it nevertheless",
    )
    raise PrecheckRefused("nothing was loaded", [finding])


def _lone_remark(found: Snapshot, together: Together) -> str:
    others = ", ".join(together.vms)
    return (
        f"{found.tag!r} was saved together with {others}: what was loaded here is of another moment than they are now"
    )


async def group_reasons(run: Run, series: Mapping[str, tuple[Snapshot, bool]]) -> Mapping[str, str]:
    """Why parts of groups are kept although this VM's own series does not keep them.

    :param series: the snapshots of the series by their tags, with their notes, and whether the policy keeps each.
    :return: by tag.
    """
    parts = {tag: (one.together, kept) for tag, (one, kept) in series.items() if one.together}
    member = run.journal.member
    if member is None:
        return {tag: f"together with {', '.join(part.vms)}" for tag, (part, kept) in parts.items() if not kept}
    verdicts = await member.meet(Point.NAMED, {part.id: kept for part, kept in parts.values()})
    kept_anywhere = {part for theirs in verdicts.values() for part, kept in theirs.items() if kept}
    return {
        tag: "kept on another VM" if part.id in kept_anywhere else f"together with {', '.join(part.vms)}"
        for tag, (part, kept) in parts.items()
        if not kept and (part.id in kept_anywhere or not _is_whole(part, member, verdicts))
    }


def _is_whole(group: Together, member: Member, told: Mapping[str, Collection[str]]) -> bool:
    """Whether all VMs of a group are worked on: each that has a part has said so; or, if some have lost theirs, all
    were named."""
    return sum(group.id in theirs for theirs in told.values()) > len(group.vms) or set(group.vms) <= set(member.others)
