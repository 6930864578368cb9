"""How many commands QEMU is asked: each costs a little of every run, and what is asked twice costs twice."""

from __future__ import annotations

from support.guest import Guest, cli, needs_snapshot_jobs, qemu_version
from support.proxy import Intercept

#: With two disks, on a VM on which nothing else is left. Through a proxy notes cannot be seen.
MOST = {
    ("list",): 10,
    ("check",): 16,
    ("save", "a"): 45,
    ("save", "b"): 46,
    ("save", "c"): 46,
    ("save", "c", "--ignore-unseen"): 51,
    ("load", "c", "--full"): 51 if qemu_version() >= (10, 1) else 48,  # there, translated code has to be dropped
    ("delete", "a", "--ignore-unseen"): 22,
    ("delete", "b", "c", "--ignore-unseen"): 26,
}
#: A whole look at the block nodes.
LOOKS = {"list": 1, "check": 1, "save": 3, "load": 4, "delete": 1}


@needs_snapshot_jobs
def test_no_more_than_that(guest: Guest, intercept: Intercept) -> None:
    proxy = intercept(guest)
    asked = {}
    for command in MOST:
        proxy.commands.clear()
        cli(*command, monitor=proxy.address)
        asked[command] = len(proxy.commands)
        assert proxy.commands.count("query-block") <= LOOKS[command[0]], command
    assert {command: number for command, number in asked.items() if number > MOST[command]} == {}
