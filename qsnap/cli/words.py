"""What people type: other names of commands, words that mean one, and options before the verb. Light: no click here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

#: Other names of commands, from incus, multipass, docker, virsh and VirtualBox.
ALIASES: Mapping[str, str] = {
    "ls": "list",
    "rm": "delete",
    "restore": "load",
    "revert": "load",
    "create": "save",
    "take": "save",
    "info": "show",
}

#: What a word that is not a command most likely means. Spelling alone would take "pause" for "prune".
_MEANINGS: Mapping[str, str] = {
    "add": "save", "backup": "save", "checkpoint": "save", "commit": "save", "make": "save", "new": "save",
    "savevm": "save", "snap": "save", "snapshot": "save",
    "apply": "load", "goto": "load", "loadvm": "load", "reset": "load", "rollback": "load", "switch": "load",
    "back": "undo", "redo": "undo",
    "clear": "delete", "del": "delete", "delvm": "delete", "destroy": "delete", "drop": "delete", "erase": "delete",
    "remove": "delete",
    "all": "list", "get": "list", "snapshots": "list",
    "branches": "tree", "current": "tree", "graph": "tree", "history": "tree", "log": "tree", "where": "tree",
    "describe-snapshot": "show", "details": "show", "inspect": "show", "view": "show",
    "freeze": "pause", "halt": "pause", "stop": "pause", "suspend": "pause",
    "cont": "resume", "continue": "resume", "go": "resume", "start": "resume", "thaw": "resume", "unpause": "resume",
    "clean": "recover", "cleanup": "recover", "fix": "recover", "repair": "recover", "unlock": "recover",
    "expire": "prune", "forget": "prune", "gc": "prune", "rotate": "prune",
    "keep": "protect", "lock": "protect", "pin": "protect",
    "release": "unprotect", "unpin": "unprotect",
    "annotate": "describe", "comment": "describe", "label": "describe", "note": "describe",
    "exec": "run", "test": "run", "with": "run",
    "provision": "ensure", "setup": "ensure",
    "find": "vms", "machines": "vms", "ps": "vms", "vm": "vms",
    "doctor": "check", "precheck": "check", "try": "demo", "tutorial": "demo",
    "health": "status", "state": "status",
}  # fmt: skip

#: The options that all commands share, which may stand before the verb: whether each takes a value.
SHARED: Mapping[str, bool] = {
    "-m": True, "--monitor": True, "--vm": True, "--timeout": True, "--lock-wait": True, "--state-dir": True,
    "--jobs": True, "--config": True, "--progress": True, "--ignore-unseen": False, "--all": False,
    "--json": False, "-q": False, "--quiet": False, "-v": False, "--verbose": False,
}  # fmt: skip


def meant_by(word: str, commands: Collection[str]) -> str:
    """The command that a word most likely means, by its meaning, or else by its spelling; "" if none."""
    from difflib import get_close_matches

    known = [*commands, *ALIASES, *_MEANINGS]
    near = next(iter(get_close_matches(word.lower(), known, 1, 0.7)), "")
    found = ALIASES.get(near) or _MEANINGS.get(near) or near
    return found if found in commands else ""


def verb_first(arguments: Sequence[str]) -> list[str]:
    """The command line with the options that stand before the verb put behind it."""
    for at, word in enumerate(_words(arguments)):
        if word is None:
            return list(arguments)
        if word:
            return [arguments[at], *arguments[:at], *arguments[at + 1 :]]
    return list(arguments)


def _words(arguments: Sequence[str]) -> Sequence[bool | None]:
    """For each argument up to the verb whether it is the verb; None for an option that not all commands share."""
    found: list[bool | None] = []
    is_value = False
    for argument in arguments:
        if is_value:
            is_value = False
            found.append(False)
            continue
        name = argument.partition("=")[0]
        is_value = SHARED.get(argument, False)
        if argument.startswith("-"):
            is_known = name in SHARED or (argument[1:2] != "-" and argument[:2] in SHARED)
            found.append(False if is_known else None)
        else:
            found.append(True)
        if found[-1] is not False:
            break
    return found
