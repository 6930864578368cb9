"""Two or more examples of each command, for its help, its man page and the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

EXAMPLES: Mapping[str, Sequence[tuple[str, str]]] = {
    "check": (
        ("qsnap check", "can this guest be saved now?"),
        ("qsnap check --exclude scratch", "and without that disk?"),
    ),
    "save": (
        ("qsnap save before-upgrade", "RAM, device state and all disks"),
        ("qsnap save --live=auto --prefix nightly --keep-daily 7", "the next of a series, which is then pruned"),
        ("qsnap save before-upgrade --vm db --vm app --together", "two VMs at one moment"),
    ),
    "list": (
        ("qsnap list", "the oldest first"),
        ("qsnap list --prefix nightly --last 3 --reverse", "the newest 3 of a series"),
    ),
    "tree": (
        ("qsnap tree", "what was made from what"),
        ("qsnap tree --vm web", "of that VM"),
    ),
    "show": (
        ("qsnap show before-upgrade", "device by device"),
        ("qsnap show before-upgrade --json", "for a script"),
    ),
    "load": (
        ("qsnap load before-upgrade --save-current", "and keep the present, for qsnap undo"),
        ("qsnap load --latest --prefix nightly", "the newest of a series"),
    ),
    "undo": (
        ("qsnap undo", "what the last load has discarded, back again"),
        ("qsnap undo --no-save-current", "without saving the present first"),
    ),
    "delete": (
        ("qsnap delete before-upgrade old", "several at once"),
        ("qsnap delete --missing-ok old", "no error if there is none"),
    ),
    "verify": (
        ("qsnap verify before-upgrade", "is it whole?"),
        ("qsnap verify --prefix nightly", "a whole series"),
    ),
    "status": (
        ("qsnap status", "the guest, its devices, what was left behind"),
        ("qsnap status --max-age 26h --prefix nightly", "as a monitoring plugin"),
    ),
    "pause": (
        ("qsnap pause", "as `stop` in QEMU's monitor"),
        ("qsnap pause --all", "all your VMs"),
    ),
    "resume": (
        ("qsnap resume", "as `cont` in QEMU's monitor"),
        ("qsnap resume --vm web", "that VM"),
    ),
    "recover": (
        ("qsnap recover", "after a qsnap that was killed"),
        ("qsnap recover --force", "although that ran on another machine"),
    ),
    "prune": (
        ("qsnap prune --prefix nightly --keep-daily 7 --dry-run", "what would be kept and removed?"),
        ("qsnap prune --prefix nightly --keep-last 3", "keep the newest 3"),
    ),
    "protect": (
        ("qsnap protect before-upgrade", "until qsnap unprotect"),
        ("qsnap protect clean-install gold", "several at once"),
    ),
    "unprotect": (
        ("qsnap unprotect before-upgrade", "it can be deleted again"),
        ("qsnap unprotect clean-install gold", "several at once"),
    ),
    "describe": (
        ("qsnap describe before-upgrade 'all packages up to date'", "shown by list and show"),
        ("qsnap describe before-upgrade ''", "remove it"),
    ),
    "export": (
        ("qsnap export before-upgrade ~/backups/before-upgrade", "with disks and VM state"),
        ("qsnap export before-upgrade ~/backups/thin --keep-backing", "on the same backing images"),
    ),
    "boot": (
        ("qsnap boot ~/backups/before-upgrade", "where the snapshot left off"),
        ("qsnap boot ~/backups/before-upgrade --work ~/second --network", "and keep what it does"),
    ),
    "run": (
        ("qsnap run --revert -- make check", "and put the guest back"),
        ("qsnap run --revert-to clean --save-on-fail failed -- ./test.sh", "to a snapshot, and keep a failure"),
    ),
    "ensure": (
        ("qsnap ensure provisioned -- ./provision.sh", "load it, or make it"),
        ("qsnap ensure base --timeout 600 -- ansible-playbook site.yml", "within ten minutes"),
    ),
    "vms": (
        ("qsnap vms", "and how to choose each"),
        ("qsnap vms -q", "names only, for a loop"),
    ),
    "demo": (
        ("qsnap demo", "with a tiny guest of its own"),
        ("qsnap demo --qemu /opt/qemu/bin/qemu-system-x86_64", "with another QEMU"),
    ),
    "completion": (
        ('eval "$(qsnap completion bash)"', "in ~/.bashrc"),
        ("qsnap completion fish > ~/.config/fish/completions/qsnap.fish", "once"),
    ),
    "help": (
        ("qsnap help load", "all about load"),
        ("qsnap help options", "the options that commands share"),
    ),
}  # fmt: skip
