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
      - V(absent) deletes it, if it exists.
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
      - "The VMs: names in qsnap's config file, QEMU's C(-name), pids or UUIDs. Default: the only VM that runs."
    type: list
    elements: str
    default: []
    aliases: [vm]
  all_vms:
    description: All running VMs of the user that have a monitor.
    type: bool
    default: false
  together:
    description: The VMs are of one moment, and all of it is done, or nothing.
    type: bool
    default: false
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
    description: See C(--force) of C(qsnap save) and C(qsnap load).
    type: bool
    default: false
  timeout:
    description: Seconds after which the command is interrupted. The guest is resumed then.
    type: int
  config:
    description: qsnap's config file on the host.
    type: path
  executable:
    description: The command.
    type: path
    default: qsnap
author:
  - The qsnap maintainers (@qsnap)
attributes:
  check_mode:
    description: Everything is checked and decided, and nothing is done.
    support: full
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
snapshots:
  description: The tags that each VM has afterwards; in check mode, would have.
  returned: success
  type: dict
  sample: {web: [before-upgrade]}
"""

import json

from ansible.module_utils.basic import AnsibleModule


class Qsnap:
    """The command on the host, with the VMs that are meant."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module
        given = module.params
        self._vms = ["--all"] if given["all_vms"] else _named(given["vms"])
        self._base = [module.get_bin_path(given["executable"], required=True)]
        self._common = ["--json"]
        for option, name in (("--config", "config"), ("--timeout", "timeout")):
            if given[name] is not None:
                self._common += [option, str(given[name])]

    def __call__(self, *arguments: str, only: list[str] | None = None) -> list[dict]:
        """Run it with all VMs, or with *only* some; what it says of each. The task fails if it fails."""
        vms = self._vms if only is None or not self._vms else _named(only)
        command = [*self._base, *arguments, *self._common, *vms]
        code, out, err = self._module.run_command(command)
        try:
            document = json.loads(out or err)
        except ValueError:
            document = {}
        vms = document["vms"] if "vms" in document else [_one(document, code)]
        if code:
            errors = [(one["vm"], one["error"]) for one in vms if one.get("error")]
            message = "; ".join(f"{vm}: {error['message']}" if vm else error["message"] for vm, error in errors)
            self._module.fail_json(msg=message or err or out, exit_code=code, vms=vms, cmd=command)
        for line in err.splitlines():
            if line.startswith("warning: "):
                self._module.warn(line[len("warning: ") :])
        return vms

    def tags(self) -> dict[str, list[str]]:
        """The tags that each VM has."""
        return {one["vm"]: [row["tag"] for row in one["result"]["snapshots"]] for one in self("list")}


def _named(vms: list[str]) -> list[str]:
    return [word for name in vms for word in ("--vm", name)]


def _one(document: dict, code: int) -> dict:
    """The document about a single VM in the form of those about several."""
    key = "error" if code else "result"
    return {"vm": document.get("vm") or "", "exit_code": code, key: document or None}


def _policy(keep: dict) -> list[str]:
    words = []
    for name, value in keep.items():
        option = "--keep-" + str(name).replace("_", "-")
        words += [word for one in (value if isinstance(value, list) else [value]) for word in (option, str(one))]
    return words


def _save(given: dict, *, replaces: bool) -> list[str]:
    words = ["save", *(["--prefix", given["prefix"]] if given["prefix"] else [given["name"]])]
    words += {"yes": ["--live"], "no": ["--no-live"], "auto": ["--live=auto"], None: []}[given["live"]]
    words += ["--description", given["description"]] if given["description"] else []
    if not given["prefix"]:
        words.append("--safe-replace" if replaces else "--no-replace")
    return [*words, *_policy(given["keep"] or {}), *(["--force"] if given["force"] else [])]


def _command(given: dict, before: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """What qsnap has to do, and with which VMs; nothing with none of them."""
    name, vms = given["name"], list(before)
    if given["state"] == "pruned":
        return ["prune", "--prefix", given["prefix"], *_policy(given["keep"])], vms
    if given["state"] == "loaded":
        running = {True: ["--running"], False: ["--paused"], None: []}[given["running"]]
        return ["load", name, *running, *(["--force"] if given["force"] else [])], vms
    has = [vm for vm in vms if name in before[vm]]
    if given["state"] == "absent":
        return ["delete", name, "--missing-ok"], vms if has and given["together"] else has
    if given["prefix"] or given["replace"]:
        return _save(given, replaces=True), vms
    lacking = [vm for vm in vms if vm not in has]
    # Together, all get one of a new common moment if one lacks it
    return _save(given, replaces=given["together"]), vms if lacking and given["together"] else lacking


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
            "vms": {"type": "list", "elements": "str", "default": [], "aliases": ["vm"]},
            "all_vms": {"type": "bool", "default": False},
            "together": {"type": "bool", "default": False},
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
    qsnap = Qsnap(module)
    before = qsnap.tags()
    command, meant = _command(given, before)
    if given["state"] == "loaded" and (lacking := [vm for vm in meant if given["name"] not in before[vm]]):
        module.fail_json(msg=f"no snapshot {given['name']!r} on {', '.join(lacking)}; no guest was touched", vms=[])
    vms: list[dict] = []
    after = before
    if meant:
        can_try = command[0] in ("save", "prune")
        if given["together"]:
            command.append("--together")
        if module.check_mode and can_try:
            command.append("--dry-run")
        if can_try or not module.check_mode:
            vms = qsnap(*command, only=meant)
        after = _expected(given, before, vms) if module.check_mode else qsnap.tags()
    changed = bool(meant) and (given["state"] != "pruned" or any(_removed(vms).values()))
    module.exit_json(
        changed=changed,
        vms=vms,
        snapshots=after,
        diff={"before": _told(before), "after": _told(after)},
    )


def _told(tags: dict[str, list[str]]) -> str:
    return "".join(f"{vm}: {tag}\n" for vm, held in sorted(tags.items()) for tag in held)


if __name__ == "__main__":
    main()
