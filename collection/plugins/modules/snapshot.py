#!/usr/bin/python
# Apache-2.0 (see LICENSE of the project)
"""Ansible's module for snapshots: what is asked for is handed to the command ``qsnap`` on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot
short_description: Snapshots of running QEMU guests
version_added: "0.1.0"
description:
  - Saves, loads, deletes and prunes snapshots of QEMU guests that run on the host, by the command C(qsnap) there.
  - All is checked before a guest is touched. A guest that was running runs again, whatever happens.
options:
  state:
    description:
      - V(present) saves the snapshot, if it does not exist yet on a VM.
      - V(absent) deletes it, if it exists. The VM must run.
      - V(loaded) puts RAM, devices and disks back. What the guest has done since is lost.
      - V(pruned) deletes the snapshots of the series O(prefix) that O(keep) does not keep.
    type: str
    choices: [present, absent, loaded, pruned]
    default: present
  name:
    description: The snapshot's tag.
    type: str
    aliases: [tag]
  prefix:
    description:
      - A series, instead of O(name). With O(state=present) its next snapshot is saved, each time.
    type: str
  vms:
    description:
      - "The VMs: names in qsnap's config file, QEMU's C(-name), pids or UUIDs. Default: the only VM that runs. An empty
        list is refused."
    type: list
    elements: str
    aliases: [vm]
  all_vms:
    description: All running VMs that have a monitor, of the user that the task runs as.
    type: bool
    default: false
  together:
    description:
      - The VMs are of one moment, and all of it is done, or nothing.
      - With O(state=present), snapshots that exist and were not saved together are refused, unless O(replace) is given.
      - With O(state=absent), V(false) deletes the part of one VM of what was saved together. Without O(together), that
        is refused.
    type: bool
  live:
    description: Whether the guest runs while it is saved. V(auto) saves live if that is possible.
    type: str
    choices: ["yes", "no", auto]
  replace:
    description:
      - With O(state=present), save again if the snapshot exists. What it replaces stays until the new one is complete.
    type: bool
    default: false
  description:
    description: A line about the new snapshot.
    type: str
  running:
    description: "With O(state=loaded): whether the guest runs afterwards. Default: as before."
    type: bool
  keep:
    description:
      - "What is kept of the series O(prefix), as in restic's policies, for example C({last: 3, daily: 7}). Also pruned
        so after a save with O(prefix)."
    type: dict
  force:
    description:
      - With O(state=present), save even if there seems to be too little room.
      - With O(state=loaded), load even if a disk has other backing images than at the save, if the machine is a
        different one, or, with O(together), if the snapshots are of different moments.
    type: bool
    default: false
  timeout:
    description: Seconds after which qsnap gives up, with RV(exit_code) 12. The guest is resumed then.
    type: int
  config:
    description: "qsnap's config file on the host. Default: that of the user that the task runs as."
    type: path
  executable:
    description: The command.
    type: path
    default: qsnap
author:
  - The qsnap maintainers (@qsnap)
attributes:
  check_mode:
    description: Nothing is done.
    details:
      - With O(state=present) and O(state=pruned), everything is checked and decided.
      - With O(state=loaded) and O(state=absent), only whether the snapshots exist. What else qsnap may refuse is not
        known before.
    support: partial
  diff_mode:
    description: The tags of each VM, before and after.
    support: full
"""

EXAMPLES = r"""
- name: Save the web server before an upgrade
  qsnap.qsnap.snapshot:
    name: before-upgrade
    vms: [web]

- name: A nightly snapshot of a database and its application, of one moment
  qsnap.qsnap.snapshot:
    prefix: nightly
    vms: [db, app]
    together: true
    live: auto
    keep: {daily: 7, weekly: 4}

- name: Go back
  qsnap.qsnap.snapshot:
    name: before-upgrade
    state: loaded
    vms: [web]

- name: Delete it
  qsnap.qsnap.snapshot:
    name: before-upgrade
    state: absent
    vms: [web]
"""

RETURN = r"""
vms:
  description: What qsnap says of each VM, as its JSON documents have it; empty if nothing had to be done.
  returned: always
  type: list
  elements: dict
exit_code:
  description: "qsnap's exit code, for example 6: refused beforehand, or 20: a guest is stopped now."
  returned: failure
  type: int
  sample: 6
snapshots:
  description: The tags that each VM has afterwards; in check mode, would have.
  returned: success
  type: dict
  sample: {web: [before-upgrade]}
"""

import json

from ansible.module_utils.basic import AnsibleModule

#: What qsnap's list says of each snapshot, by VM and tag.
Held = dict[str, dict[str, dict]]


class Qsnap:
    """The command on the host, with the VMs that are meant."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module
        given = module.params
        self._vms = ["--all"] if given["all_vms"] else _named(given["vms"] or [])
        self._base = [module.get_bin_path(given["executable"], required=True)]
        self._common = ["--json"]
        for option, name in (("--config", "config"), ("--timeout", "timeout")):
            if given[name] is not None:
                self._common.append(f"{option}={given[name]}")

    def __call__(self, *words: str, tag: str | None = None, only: list[str] | None = None) -> list[dict]:
        """Run it with all VMs, or with *only* some; what it says of each. The task fails if it fails.

        :param words: the verb and its options.
        """
        vms = self._vms if only is None or not self._vms else _named(only)
        command = [*self._base, *words, *self._common, *vms, *(["--", tag] if tag is not None else [])]
        # A tag may be "$HOME", or "~"
        code, out, err = self._module.run_command(command, expand_user_and_vars=False)
        said = out or next((line for line in err.splitlines() if line.startswith("{")), "")
        try:
            document = json.loads(said)
        except ValueError:
            document = {}
        several = "vms" in document and "error" not in document
        if "vms" in document and not several:
            document["message"] += f": {', '.join(one['vm'] for one in document['vms'])}"
        about = document["vms"] if several else [_one(document, code)] if document.get("vm") else []
        if code:
            self._fail(code, about, document.get("message") or err or out, command)
        for line in err.splitlines():
            if line.startswith("warning: "):
                self._module.warn(line[len("warning: ") :])
        for one in about:
            # live=auto is asked for where nobody wants to know
            wanted = (finding for finding in one["result"].get("warnings") or [] if finding["code"] != "not-live")
            for finding in wanted:
                self._module.warn(": ".join(filter(None, [one["vm"], finding["message"], finding["cure"]])))
        return about

    def _fail(self, code: int, about: list[dict], message: str, command: list[str]) -> None:
        errors = [(one["vm"], one["error"]) for one in about if one.get("error")]
        # Where one has failed, the others of a group were only given up
        told = [(vm, error) for vm, error in errors if error["error"] != "Abandoned"] or errors
        message = "; ".join(f"{vm}: {error['message']}" for vm, error in told) or message
        if command[1] == "list":
            code = told[0][1]["exit_code"] if told else code
            message += "; nothing was done"
        self._module.fail_json(msg=message, exit_code=code, vms=about, cmd=command)

    def held(self) -> Held:
        """The snapshots of each VM, by their tags."""
        return {one["vm"]: {row["tag"]: row for row in one["result"]["snapshots"]} for one in self("list")}


def _named(vms: list[str]) -> list[str]:
    return [f"--vm={name}" for name in vms]


def _one(document: dict, code: int) -> dict:
    """The document about a single VM in the form of those about several."""
    return {"vm": document["vm"], "exit_code": code, "error" if code else "result": document}


def _policy(keep: dict) -> list[str]:
    words = []
    for name, value in keep.items():
        option = "--keep-" + str(name).replace("_", "-")
        words += [f"{option}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def _save(given: dict) -> list[str]:
    words = ["save", *([f"--prefix={given['prefix']}"] if given["prefix"] is not None else [])]
    words += {"yes": ["--live"], "no": ["--no-live"], "auto": ["--live=auto"], None: []}[given["live"]]
    words += [f"--description={given['description']}"] if given["description"] else []
    if given["prefix"] is None:
        words.append("--safe-replace" if given["replace"] else "--no-replace")
    return [*words, *_policy(given["keep"] or {}), *(["--force"] if given["force"] else [])]


def _command(given: dict, held: Held) -> tuple[list[str], list[str]]:
    """What qsnap has to do, and with which VMs; nothing with none of them."""
    name, vms = given["name"], list(held)
    if given["state"] == "pruned":
        return ["prune", f"--prefix={given['prefix']}", *_policy(given["keep"])], vms
    if given["state"] == "loaded":
        running = {True: ["--running"], False: ["--paused"], None: []}[given["running"]]
        return ["load", *running, *(["--force"] if given["force"] else [])], vms
    if given["state"] == "absent":
        has = [vm for vm in vms if name in held[vm]]
        alone = ["--no-together"] if given["together"] is False else []
        return ["delete", "--missing-ok", *alone], vms if has and given["together"] else has
    anew = given["prefix"] is not None or given["replace"]
    return _save(given), vms if anew else [vm for vm in vms if not _can_be_loaded(held[vm].get(name))]


def _can_be_loaded(row: dict | None) -> bool:
    return row is not None and row["kind"] in ("full", "live") and not row["problems"]


def _refusal(given: dict, held: Held) -> tuple[str, int]:
    """Why it cannot be done, and qsnap's exit code for that; "" where qsnap itself decides."""
    name = given["name"]
    has = [vm for vm in held if name in held[vm]]
    if given["state"] == "loaded" and len(has) < len(held):
        return f"no snapshot {name!r} on {', '.join(vm for vm in held if vm not in has)}", 7
    if given["state"] == "present" and given["together"] and has and not given["replace"]:
        groups = {(held[vm].get(name, {}).get("together") or {}).get("id") for vm in held}
        if len(groups) > 1 or None in groups:
            lacking = [vm for vm in held if vm not in has]
            why = f"and not on {', '.join(lacking)}" if lacking else "but was not saved together, as far as is known"
            return f"snapshot {name!r} is on {', '.join(has)}, {why}; with replace, all get a new one", 8
    return "", 0


def _removed(vms: list[dict]) -> dict[str, list[str]]:
    """The tags that a prune removes, also one after a save, or would."""
    found = {}
    for one in vms:
        pruned = one["result"].get("pruned") or one["result"]
        found[one["vm"]] = [row["tag"] for row in pruned.get("remove") or []]
    return found


def _expected(given: dict, before: dict[str, list[str]], vms: list[dict]) -> dict[str, list[str]]:
    """The tags that each VM would have."""
    removed = _removed(vms)
    after = {vm: [tag for tag in tags if tag not in removed.get(vm, [])] for vm, tags in before.items()}
    for one in vms if given["state"] == "present" else ():
        after[one["vm"]] = [*(tag for tag in after[one["vm"]] if tag != one["result"]["tag"]), one["result"]["tag"]]
    if given["state"] == "absent":
        after = {vm: [tag for tag in tags if tag != given["name"]] for vm, tags in after.items()}
    return after


def main() -> None:
    """Do what the task says."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent", "loaded", "pruned"], "default": "present"},
            "name": {"type": "str", "aliases": ["tag"]},
            "prefix": {"type": "str"},
            "vms": {"type": "list", "elements": "str", "aliases": ["vm"]},
            "all_vms": {"type": "bool", "default": False},
            "together": {"type": "bool"},
            "live": {"type": "str", "choices": ["yes", "no", "auto"]},
            "replace": {"type": "bool", "default": False},
            "description": {"type": "str"},
            "running": {"type": "bool"},
            "keep": {"type": "dict"},
            "force": {"type": "bool", "default": False},
            "timeout": {"type": "int"},
            "config": {"type": "path"},
            "executable": {"type": "path", "default": "qsnap"},
        },
        mutually_exclusive=[("name", "prefix"), ("vms", "all_vms")],
        required_one_of=[("name", "prefix")],
        required_if=[
            ("state", "absent", ["name"]),
            ("state", "loaded", ["name"]),
            ("state", "pruned", ["prefix", "keep"]),
        ],
        supports_check_mode=True,
    )
    given = module.params
    if given["vms"] == []:
        module.fail_json(msg="vms is an empty list; without vms, the only VM that runs is meant", exit_code=2, vms=[])
    qsnap = Qsnap(module)
    held = qsnap.held()
    why, code = _refusal(given, held)
    if why:
        module.fail_json(msg=f"{why}; nothing was done", exit_code=code, vms=[])
    before = _tags(held)
    words, meant = _command(given, held)
    vms: list[dict] = []
    after = before
    if meant:
        can_try = words[0] in ("save", "prune")
        if given["together"]:
            words.append("--together")
        if module.check_mode and can_try:
            words.append("--dry-run")
        if can_try or not module.check_mode:
            vms = qsnap(*words, tag=given["name"], only=meant)
        after = _expected(given, before, vms) if module.check_mode else _tags(qsnap.held())
    changed = bool(meant) and (given["state"] != "pruned" or any(_removed(vms).values()))
    module.exit_json(
        changed=changed,
        vms=vms,
        snapshots=after,
        diff={"before": _told(before), "after": _told(after)},
    )


def _tags(held: Held) -> dict[str, list[str]]:
    return {vm: list(rows) for vm, rows in held.items()}


def _told(tags: dict[str, list[str]]) -> str:
    return "".join(f"{vm}: {tag}\n" for vm, held in sorted(tags.items()) for tag in held)


if __name__ == "__main__":
    main()
